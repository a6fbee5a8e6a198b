"""Norms that look at the weights: each a change of the kernel alone, w' = g · (w − m) / σ.

    weight normalization      m = 0    σ = ‖w‖           of each unit, or of the whole kernel
    weight standardization    m = w̄    σ = ‖w − w̄‖       of each unit
    centred weights           m = w̄    σ = 1

w̄ is the mean of a unit's K weights, and ‖w − w̄‖ = std(w)·√K. What is measured of a kernel is a
`Mapped` (`normlab.maps`), of which both the kernel and the parts of the norm are made.
"""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import (
    KINDS,
    checked,
    declare,
    not_negative,
    one_of,
)
from normlab._checks import (
    kernel,
)
from normlab._units import deviations, safe_sqrt, units_and_lengths
from normlab._weights import align_weights
from normlab.devices.topology import AxisName
from normlab.devices.whole import all_reduce
from normlab.equation import Affine, Parts, affine
from normlab.maps import Mapped, mapped_kernel, mapped_parts
from normlab.measure import moments
from normlab.site import Site

Of = Literal["unit", "kernel"]
"""What weight norm has one length of: each unit, or the whole kernel."""

Form = Literal["exact", "qiao", "timm", "brock"]
"""Where weight standardization has its ε, if any: see `weight_standardization`."""

declare(form=one_of(Form, "the name of a form"))
OF = one_of(Of, "'unit' or 'kernel'")
FORM_EPS = KINDS["eps"]._replace(
    expected="a positive number, or None for the form's own", change="pass for example eps=1e-5"
)


def of_lengths(w: ArrayLike, of: Of = "unit") -> Mapped:
    """What weight norm measures."""
    unit, length = units_and_lengths(w, range(jnp.ndim(w)) if of == "kernel" else None)
    return Mapped(unit, None, length.reshape(()) if of == "kernel" else length)


def of_deviations(w: ArrayLike, form: Form = "exact", eps: float | None = None) -> Mapped:
    """What weight standardization measures."""
    deviation, w_bar = deviations(w)
    if form == "exact" and eps is None:
        unit, length = units_and_lengths(deviation)
        return Mapped(unit, w_bar, length)
    size, axes = math.prod(deviation.shape[:-1]), range(deviation.ndim - 1)
    square = jnp.square(deviation).sum(axes, keepdims=True)
    eps = {"qiao": 1e-5, "timm": 1e-6, "brock": 1e-4}[form] if eps is None else eps
    sigma = {
        "exact": lambda: jnp.sqrt(square + eps),
        "qiao": lambda: safe_sqrt(square / max(size - 1, 1)) + eps,
        "timm": lambda: jnp.sqrt(square / size + eps),
        "brock": lambda: jnp.sqrt(jnp.maximum(square, eps)),
    }[form]()
    return Mapped(deviation / sigma, w_bar, jnp.where(square == 0, 0, sigma))


@checked("weight norm", of=OF)
def weight_norm(v: ArrayLike, params: Affine | None = None, *, of: Of = "unit") -> Array:
    """Weight normalization (Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868).

    w = g · v / ‖v‖ for the incoming weights v of each unit.

    The norm is taken after division by max|v|, so weights of 1e-20 and of 1e20 normalize alike. A
    zero vector stays zero, with derivative g.

    Args:
      v: `[..., K, C]`, a kernel with its units last.
      params: `Affine(g [C], None)` with the length of each unit's weights; `None` for 1. A bias
        is the layer's: it is no part of the kernel, and is left out.
      of: What has one length: each `"unit"`, or the whole `"kernel"` (torch's `dim=None`), whose
        units then keep the lengths that they have beside each other.

    Returns:
      w, in the shape and type of `v`.

    Raises:
      ValueError: If g is not `[C]`.

    >>> weight_norm(jnp.array([[3.0], [4.0]]), Affine(jnp.array([10.0]), None)).tolist()
    [[6.0], [8.0]]
    """
    return mapped_kernel("weight norm", of_lengths(v, of), v, params)


@checked("weight standardization", eps=FORM_EPS)
def weight_standardization(
    v: ArrayLike, params: Affine | None = None, *, form: Form = "exact", eps: float | None = None
) -> Array:
    """Weight standardization, scaled by the fan-in.

    w = g · (v − v̄) / (std(v)·√K) for the K incoming weights v of each unit, so that w has mean 0
    and length g: the form of Brock et al. 2021 (https://arxiv.org/abs/2101.08692). The original of
    Qiao et al. 2019 (https://arxiv.org/abs/1903.10520) has no √K: pass g = √K.

    Weights of 1e-20 and of 1e20 standardize alike. A constant vector becomes zero, with a bounded
    derivative. For the kernels of other libraries there are their forms of σ, with an ε that such
    weights feel:

        "exact"    √(Σ(v − v̄)² + ε)             ε = 0
        "qiao"     √(Σ(v − v̄)²/(K − 1)) + ε     ε = 1e-5, their PyTorch code
        "timm"     √(Σ(v − v̄)²/K + ε)           ε = 1e-6, StdConv2d
        "brock"    √max(Σ(v − v̄)², ε)           ε = 1e-4, NFNet's WSConv2D

    Args:
      v: As in `weight_norm`, which see, as are params, the result and the errors.
      params: As there.
      form: One of these.
      eps: ε; `None` for the form's own.

    >>> weight_standardization(jnp.array([[1.0], [5.0]])).round(3).tolist()
    [[-0.7070000171661377], [0.7070000171661377]]
    """
    return mapped_kernel("weight standardization", of_deviations(v, form, eps), v, params)


@checked("weight standardization", eps=FORM_EPS)
def weight_standardization_parts(
    site: Site, params: Affine | None = None, *, form: Form = "exact", eps: float | None = None
) -> Parts:
    """The parts of weight standardization: μ = w̄·Σx, σ = ‖w − w̄‖, or that of another `form`.

    Where w is constant σ = 1 and g = 0, so that h = b whatever rounding leaves of a − μ.

    The arguments are those of `weight_parts` and of `weight_standardization`, which see; the site
    has an `x` too.

    >>> from normlab.site import Site
    >>> x, w = jnp.ones((1, 2)), jnp.array([[3.0], [5.0]])
    >>> parts = weight_standardization_parts(Site(x @ w, x, w))
    >>> print(parts.mu, parts.sigma.round(3))
    [[8.]] [[1.414]]
    """
    where = "weight standardization"
    return mapped_parts(where, of_deviations(kernel(where, site), form, eps), site, params)


@checked("weight norm", of=OF)
def weight_parts(site: Site, params: Affine | None = None, *, of: Of = "unit") -> Parts:
    """The parts of weight normalization: μ = 0, σ = ‖w‖ (1 where w = 0).

    Args:
      site: A site with `a` and `w`.
      params: `Affine(g [C], b [C])`, or `None`.
      of: As in `weight_norm`.

    Raises:
      ValueError: If `w` is missing or does not fit `a`.

    >>> from normlab.site import Site
    >>> x, w = jnp.ones((1, 2)), jnp.array([[3.0], [4.0]])
    >>> weight_parts(Site(x @ w, x, w)).sigma.tolist()
    [[5.0]]
    """
    w = kernel("weight norm", site, of_x=False)
    return mapped_parts("weight norm", of_lengths(w, of), site, params)


@checked("centred weights")
def centred_weight(w: ArrayLike, params: Affine | None = None) -> Array:
    """Centred weights: w' = g · (w − w̄), w̄ the mean of the K incoming weights of each unit.

    Of a positive input, as behind a relu, the mean of h is near zero then: batch norm by mean
    squares (MABN, Yan et al. 2020, https://arxiv.org/abs/2001.06838) asks for it.

    The arguments are those of `weight_norm`, which see.

    >>> centred_weight(jnp.array([[1.0], [5.0]])).tolist()
    [[-2.0], [2.0]]
    """
    return mapped_kernel("centred weights", centred(w), w, params)


@checked("centred weights")
def centred_weight_parts(site: Site, params: Affine | None = None) -> Parts:
    """The parts of `centred_weight`, which see: μ = w̄·Σx, σ = 1; the site has an `x` too.

    >>> from normlab.site import Site
    >>> x, w = jnp.ones((1, 2)), jnp.array([[3.0], [5.0]])
    >>> centred_weight_parts(Site(x @ w, x, w)).sigma.tolist()
    [[1.0]]
    """
    where = "centred weights"
    return mapped_parts(where, centred(kernel(where, site)), site, params)


def centred(w: ArrayLike) -> Mapped:
    """What centred weights measure: σ is 1, and 0 where nothing is left."""
    deviation, w_bar = deviations(w)
    some = jnp.any(deviation != 0, range(deviation.ndim - 1), keepdims=True)
    return Mapped(deviation, w_bar, some.astype(deviation.dtype))


@checked("weight norm", eps=not_negative, of=OF)
def weight_norm_init(
    site: Site, *, eps: float = 0.0, axis_name: AxisName | None = None, of: Of = "unit"
) -> Affine:
    """Data-dependent initialization (Salimans & Kingma 2016, section 3).

    Chooses g = 1/sd[t] and b = −mean[t]/sd[t] for t = w·x/‖w‖, so that on this batch every unit
    has mean 0 and standard deviation 1.

    Args:
      site: A site with values, not shapes: `a = linear(x, w)` and `w`.
      eps: Added to the variance of t under the root; 0 as in the paper. A unit that is constant on
        the batch is not rescaled.
      axis_name: Mapped axes over which the batch is one.
      of: As in `weight_norm`.

    Returns:
      `Affine(g [C], b [C])`.

    >>> from normlab.site import Site
    >>> x, w = jnp.array([[1.0], [3.0]]), jnp.array([[2.0]])
    >>> params = weight_norm_init(Site(x @ w, x, w))
    >>> params.g.tolist(), params.b.tolist()
    ([1.0], [-2.0])
    """
    t = affine(weight_parts(site, of=of), site.a)
    axes = [i for i in range(t.ndim) if i != site.linear.channel_axis % t.ndim]
    weights = align_weights("weight norm", site.weights, t, site.linear.channel_axis)
    m = all_reduce(moments(t, axes, weights=weights), axis_name)
    var = m.var() + eps
    g = jnp.where(var == 0, 1, lax.rsqrt(jnp.where(var == 0, 1, var)))
    return Affine(g=g.ravel(), b=(-m.mean * g).ravel())
