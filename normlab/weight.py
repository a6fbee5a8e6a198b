"""Norms that look at the weights: weight normalization and weight standardization.

    weight normalization      μ = 0        σ = ‖w‖            h = g · w·x / ‖w‖ + b
    weight standardization    μ = w̄·Σx     σ = ‖w − w̄‖        h = g · (w − w̄)·x / ‖w − w̄‖ + b

w̄ is the mean of a unit's K weights, and ‖w − w̄‖ = std(w)·√K. Either is a change of the kernel
alone, which `weight_norm` and `weight_standardization` write out.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import checked, not_negative
from normlab._checks import expand, gain_and_bias, inputs, kernel, promote, result_dtype
from normlab._units import deviations, units_and_lengths
from normlab._weights import align_weights
from normlab.devices.merging import all_reduce
from normlab.devices.topology import AxisName
from normlab.equation import Affine, Parts, affine
from normlab.measure import moments
from normlab.site import Site


@checked("weight norm")
def weight_norm(v: ArrayLike, params: Affine | None = None) -> Array:
    """Weight normalization (Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868).

    w = g · v / ‖v‖ for the incoming weights v of each unit.

    The norm is taken after division by max|v|, so weights of 1e-20 and of 1e20 normalize alike. A
    zero vector stays zero, with derivative g.

    Args:
      v: `[..., K, C]`, a kernel with its units last.
      params: `Affine(g [C], None)` with the length of each unit's weights; `None` for 1. A bias
        is the layer's: it is no part of the kernel, and is left out.

    Returns:
      w, in the shape and type of `v`.

    Raises:
      ValueError: If g is not `[C]`.

    >>> weight_norm(jnp.array([[3.0], [4.0]]), Affine(jnp.array([10.0]), None)).tolist()
    [[6.0], [8.0]]
    """
    gain, _ = gain_and_bias("weight norm", params, v, -1)
    unit, _ = units_and_lengths(v)
    return (gain * unit).astype(result_dtype(v))


@checked("weight standardization")
def weight_standardization(v: ArrayLike, params: Affine | None = None) -> Array:
    """Weight standardization, scaled by the fan-in.

    w = g · (v − v̄) / (std(v)·√K) for the K incoming weights v of each unit, so that w has mean 0
    and length g: the form of Brock et al. 2021 (https://arxiv.org/abs/2101.08692). The original of
    Qiao et al. 2019 (https://arxiv.org/abs/1903.10520) has no √K: pass g = √K.

    Weights of 1e-20 and of 1e20 standardize alike. A constant vector becomes zero, with a bounded
    derivative.

    The arguments are those of `weight_norm`, which see.

    >>> weight_standardization(jnp.array([[1.0], [5.0]])).round(3).tolist()
    [[-0.7070000171661377], [0.7070000171661377]]
    """
    gain, _ = gain_and_bias("weight standardization", params, v, -1)
    unit, _ = units_and_lengths(deviations(v)[0])
    return (gain * unit).astype(result_dtype(v))


@checked("weight standardization")
def weight_standardization_parts(site: Site, params: Affine | None = None) -> Parts:
    """The parts of weight standardization: μ = w̄·Σx, σ = ‖w − w̄‖.

    Where w is constant σ = 1 and g = 0, so that h = b whatever rounding leaves of a − μ.

    The arguments are those of `weight_parts`, which see; the site has an `x` too.
    """
    where = "weight standardization"
    w, x = promote(kernel(where, site)), inputs(where, site)
    g, b = gain_and_bias(where, params, site.a, site.linear.channel_axis)
    deviation, w_bar = deviations(w)
    ndim, channel = site.a.ndim, site.linear.channel_axis
    length = expand(units_and_lengths(deviation)[1], ndim, channel)
    mu = expand(w_bar, ndim, channel) * site.linear.patch_sum(x, w)
    constant = length == 0
    return Parts(mu, jnp.where(constant, 1, length), jnp.where(constant, 0, g), b)


@checked("weight norm")
def weight_parts(site: Site, params: Affine | None = None) -> Parts:
    """The parts of weight normalization: μ = 0, σ = ‖w‖ (1 where w = 0).

    Args:
      site: A site with `a` and `w`.
      params: `Affine(g [C], b [C])`, or `None`.

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
    t = affine(weight_parts(site), site.a)
    axes = [i for i in range(t.ndim) if i != site.linear.channel_axis % t.ndim]
    weights = align_weights("weight norm", site.weights, t, site.linear.channel_axis)
    m = all_reduce(moments(t, axes, weights=weights), axis_name)
    var = m.var() + eps
    g = jnp.where(var == 0, 1, lax.rsqrt(jnp.where(var == 0, 1, var)))
    return Affine(g=g.ravel(), b=(-m.mean * g).ravel())
