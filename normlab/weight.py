"""Norms that look at the weights: weight normalization and weight standardization.

    weight normalization      μ = 0        σ = ‖w‖            h = g · w·x / ‖w‖ + b
    weight standardization    μ = w̄·Σx     σ = ‖w − w̄‖        h = g · (w − w̄)·x / ‖w − w̄‖ + b

w̄ is the mean of a unit's K weights, and ‖w − w̄‖ = std(w)·√K. Either is a change of the kernel
alone, which `weight_norm` and `weight_standardization` write out.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import checked, not_negative
from normlab._checks import expand, gain_and_bias, invalid, promote, result_dtype
from normlab.devices.merging import all_reduce
from normlab.devices.topology import AxisName
from normlab.equation import Parts, affine
from normlab.linear import output_shape
from normlab._weights import align_weights
from normlab.measure import moments
from normlab.equation import Affine
from normlab.site import Site


@checked("weight norm")
def weight_norm(v: Array, g: Array | None = None) -> Array:
    """Weight normalization (Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868).

    w = g · v / ‖v‖ for the incoming weights v of each unit.

    The norm is taken after division by max|v|, so weights of 1e-20 and of 1e20 normalize alike. A
    zero vector stays zero, with derivative g.

    Args:
      v: `[..., K, C]`, a kernel with its units last.
      g: `[C]`, the length of each unit's weights; `None` for 1.

    Returns:
      w, in the shape and type of `v`.

    Raises:
      ValueError: If `g` is not `[C]`.

    >>> weight_norm(jnp.array([[3.0], [4.0]]), jnp.array([10.0])).tolist()
    [[6.0], [8.0]]
    """
    params = None if g is None else Affine(g, None)
    gain, _ = gain_and_bias("weight norm", params, v, -1)
    unit, _ = units_and_lengths(v)
    return (gain * unit).astype(result_dtype(v))


@checked("weight standardization")
def weight_standardization(v: Array, g: Array | None = None) -> Array:
    """Weight standardization, scaled by the fan-in.

    w = g · (v − v̄) / (std(v)·√K) for the K incoming weights v of each unit, so that w has mean 0
    and length g: the form of Brock et al. 2021 (https://arxiv.org/abs/2101.08692). The original of
    Qiao et al. 2019 (https://arxiv.org/abs/1903.10520) has no √K: pass g = √K.

    Weights of 1e-20 and of 1e20 standardize alike. A constant vector becomes zero, with a bounded
    derivative.

    Args:
      v: `[..., K, C]`, a kernel with its units last.
      g: `[C]`, the length of each unit's weights; `None` for 1.

    Returns:
      w, in the shape and type of `v`.

    Raises:
      ValueError: If `g` is not `[C]`.

    >>> weight_standardization(jnp.array([[1.0], [5.0]]), jnp.array([2.0])).round(3).tolist()
    [[-1.4140000343322754], [1.4140000343322754]]
    """
    params = None if g is None else Affine(g, None)
    gain, _ = gain_and_bias("weight standardization", params, v, -1)
    unit, _ = units_and_lengths(deviations(v)[0])
    return (gain * unit).astype(result_dtype(v))


@checked("weight standardization")
def weight_standardization_parts(params: Any, site: Site) -> Parts:
    """The parts of weight standardization: μ = w̄·Σx, σ = ‖w − w̄‖.

    Where w is constant σ = 1 and g = 0, so that h = b whatever rounding leaves of a − μ.

    Args:
      params: `Affine(g [C], b [C])`, or `None`.
      site: A site with `a`, `x` and `w`.

    Raises:
      ValueError: If `x` or `w` is missing or does not fit `a`.
    """
    where = "weight standardization"
    w, x = promote(kernel(where, site)), inputs(where, site)
    g, b = gain_and_bias(where, params, site.a, site.linear.channel_axis)
    deviation, w_bar = deviations(w)
    ndim, channel = site.a.ndim, site.linear.channel_axis
    _, length = units_and_lengths(deviation)
    length = expand(length, ndim, channel)
    mu = expand(w_bar, ndim, channel) * site.linear.patch_sum(x, w)
    constant = length == 0
    return Parts(mu, jnp.where(constant, 1, length), jnp.where(constant, 0, g), b)


@checked("weight norm")
def weight_parts(params: Any, site: Site) -> Parts:
    """The parts of weight normalization: μ = 0, σ = ‖w‖ (1 where w = 0).

    Args:
      params: `Affine(g [C], b [C])`, or `None`.
      site: A site with `a` and `w`.

    Raises:
      ValueError: If `w` is missing or does not fit `a`.
    """
    w = kernel("weight norm", site, of_x=False)
    g, b = gain_and_bias("weight norm", params, site.a, site.linear.channel_axis)
    _, length = units_and_lengths(w)
    sigma = expand(jnp.where(length == 0, 1, length), site.a.ndim, site.linear.channel_axis)
    return Parts(jnp.zeros((), sigma.dtype), sigma, g, b)


@checked("weight norm", eps=not_negative)
def weight_norm_init(site: Site, *, eps: float = 0.0, axis_name: AxisName | None = None) -> Affine:
    """Data-dependent initialization (Salimans & Kingma 2016, section 3).

    Chooses g = 1/sd[t] and b = −mean[t]/sd[t] for t = w·x/‖w‖, so that on this batch every unit
    has mean 0 and standard deviation 1.

    Args:
      site: A site with values, not shapes: `a = linear(x, w)` and `w`.
      eps: Added to the variance of t under the root; 0 as in the paper. A unit that is constant on
        the batch is not rescaled.
      axis_name: Mapped axes over which the batch is one.

    Returns:
      `Affine(g [C], b [C])`.
    """
    t = affine(weight_parts(None, site), site.a)
    axes = [i for i in range(t.ndim) if i != site.linear.channel_axis % t.ndim]
    weights = align_weights("weight norm", site.weights, t, site.linear.channel_axis)
    m = all_reduce(moments(t, axes, weights=weights), axis_name)
    var = m.var() + eps
    g = jnp.where(var == 0, 1, lax.rsqrt(jnp.where(var == 0, 1, var)))
    return Affine(g=g.ravel(), b=(-m.mean * g).ravel())


def units_and_lengths(w: ArrayLike) -> tuple[Array, Array]:
    """Returns w/‖w‖ and ‖w‖ of each unit, `[..., K, C]` and `[1, ..., 1, C]`.

    Neither overflows nor underflows; where w is zero both are, with finite derivatives.
    """
    w = promote(w)
    axes = tuple(range(w.ndim - 1))
    peak = lax.stop_gradient(jnp.max(jnp.abs(w), axes, keepdims=True))
    peak = jnp.where(peak == 0, 1, peak)
    length = safe_sqrt(jnp.square(w / peak).sum(axes, keepdims=True))
    return w / peak / jnp.where(length == 0, 1, length), length * peak


def deviations(w: ArrayLike) -> tuple[Array, Array]:
    """Returns w − w̄ and w̄ of each unit, `[..., K, C]` and `[1, ..., 1, C]`.

    What rounding leaves of a constant vector is no direction: there w − w̄ is zero.
    """
    w = promote(w)
    m = moments(w, range(w.ndim - 1))
    deviation = w - m.mean
    noise = 8 * jnp.finfo(w.dtype).eps * jnp.abs(lax.stop_gradient(m.mean))
    largest = lax.stop_gradient(jnp.abs(deviation).max(range(w.ndim - 1), keepdims=True))
    return jnp.where(largest <= noise, 0, deviation), m.mean


def safe_sqrt(q: Array) -> Array:
    """√q for q ≥ 0, with derivative zero at zero."""
    return jnp.where(q == 0, 0, jnp.sqrt(jnp.where(q == 0, 1, q)))


def inputs(where: str, site: Site) -> Array:
    """Returns `site.x`, or says that it is missing."""
    if site.x is None:
        raise invalid(
            where,
            "a site without x",
            "the input of the layer",
            "pass Site(a=linear(x, w), x=x, w=w, linear=linear)",
        )
    return site.x


def kernel(where: str, site: Site, *, of_x: bool = True) -> Array:
    """Returns `site.w`, or says what is missing or does not fit.

    That `a` has the shape of `linear(x, w)` is seen by the shapes alone, and of symbolic sizes
    those that are known to differ are refused. Whoever does not look `of_x` asks for no more than
    the layer: `a` may be that of other examples.
    """
    if site.w is None:
        raise invalid(
            where,
            "a site without w",
            "the kernel of the layer",
            "pass Site(a=linear(x, w), x=x, w=w, linear=linear)",
        )
    a, w = jnp.shape(site.a), jnp.shape(site.w)
    if site.x is not None:
        made = output_shape(where, "Site", site.linear, site.x, site.w)
        first = 0 if of_x else 1
        if len(made) != len(a) or any(map(_unequal, made[first:], a[first:])):
            raise invalid(
                where,
                f"a of shape {a} for x of shape {jnp.shape(site.x)} and w of shape {w}, of which "
                f"{site.linear} makes {made}",
                "a = linear(x, w)",
                "pass Site(..., linear=Conv(...)) with the strides, padding, groups and "
                "channel_axis of the layer that made a, and its own x and w",
            )
    elif w[-1] != site.channels:
        raise invalid(
            where,
            f"a kernel of shape {w} for a pre-activation of shape {a} with {site.linear}",
            f"a kernel with {site.channels} units, on its last axis",
            "pass the w of the same layer, units last, and the layer: Site(..., linear=Conv(...))",
        )
    return site.w


def _unequal(m: Any, n: Any) -> bool:
    """Whether two sizes are known to differ; those that are symbolic may be equal."""
    difference = m - n
    return isinstance(difference, int) and difference != 0
