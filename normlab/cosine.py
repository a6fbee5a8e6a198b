"""Norms that look at the weights and at the input: cosine and centred cosine.

    cosine     μ = 0          σ = ‖w‖·‖x‖           h = g · cos(w, x) + b
    centred    μ = K·w̄·x̄     σ = ‖w − w̄‖·‖x − x̄‖   h = g · r(w, x) + b

x is the patch of K inputs that meets the unit's weights w: the whole input of a dense layer, a
window of a convolution, its padding included. r is Pearson's correlation.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import array, checked
from normlab._checks import (
    expand,
    gain_and_bias,
    inputs,
    kernel,
    output_shape,
    promote,
    result_dtype,
)
from normlab._units import deviations, safe_sqrt, units_and_lengths
from normlab.equation import Affine, Parts, affine
from normlab.linear import Dense, Linear
from normlab.site import Site


@checked("cosine norm", w=array())
def cosine_norm(
    x: ArrayLike,
    w: ArrayLike,
    params: Affine | None = None,
    *,
    linear: Linear = Dense(),  # noqa: B008
    centred: bool = False,
) -> Array:
    """Cosine normalization (Luo et al. 2017, https://arxiv.org/abs/1702.05870).

    h = g · w·x / (‖w‖‖x‖) + b; centred, w and x each lose their mean first, and the fraction is
    Pearson's correlation. Without `params` |h| ≤ 1.

    Args:
      x: `[N, ..., K]`, the layer's input.
      w: `[..., K, C]`, its kernel.
      params: `Affine(g [C], b [C])`, or `None`.
      linear: `Dense()` or a `Conv`.
      centred: Whether to subtract the means of w and of each patch.

    Returns:
      h, in the shape of `linear(x, w)` and the floating type of `x`. A zero vector, and in the
      centred form a constant one, has cosine 0.

    Raises:
      ValueError: If the shapes do not fit.

    >>> cosine_norm(jnp.array([[3.0, 4.0]]), jnp.array([[30.0], [40.0]])).round(3).tolist()
    [[1.0]]
    """
    dtype = result_dtype(x)
    where = "centred cosine norm" if centred else "cosine norm"
    output_shape(where, "cosine_norm", linear, x, w)
    x, w = promote(x), promote(w)
    # The cosine does not see the lengths: divide them out before the product can overflow.
    x = x / _peak(x, linear)
    w, _ = units_and_lengths(deviations(w)[0] if centred else w)
    site = Site(linear(x, w), x, w, linear=linear)
    return affine(cosine_parts(site, params, centred=centred), site.a).astype(dtype)


@checked("cosine norm")
def cosine_parts(site: Site, params: Affine | None = None, *, centred: bool = False) -> Parts:
    """The parts of cosine normalization.

    A zero vector has σ = 1. In the centred form a constant w or x has the σ of the plain one, and
    a constant w has g = 0 too, so that h = b whatever rounding leaves of a − μ.

    The arguments are those of `weight_parts`, which see, of a site that has an `x` too; `centred`
    is that of `cosine_norm`.
    """
    where = "centred cosine norm" if centred else "cosine norm"
    w, x = promote(kernel(where, site)), promote(inputs(where, site))
    g, b = gain_and_bias(where, params, site.a, site.linear.channel_axis)

    def per_unit(v: Array) -> Array:
        return expand(v, site.a.ndim, site.linear.channel_axis)

    peak = _peak(x, site.linear)
    x = x / peak
    _, length_w = units_and_lengths(w)
    sigma = per_unit(length_w) * safe_sqrt(site.linear.patch_sum(jnp.square(x), w)) * peak
    sigma = jnp.where(sigma == 0, 1, sigma)
    if not centred:
        return Parts(jnp.zeros((), w.dtype), sigma, g, b)
    patch = site.linear.patch_moments(x, w)
    deviation, w_bar = deviations(w)
    mu = patch.count * per_unit(w_bar) * patch.mean * peak
    length_w = per_unit(units_and_lengths(deviation)[1])
    # What rounding leaves of a constant patch is no direction. There σ is the plain one, beside
    # which the rounding of a − μ is nothing.
    noise = 8 * jnp.finfo(w.dtype).eps * jnp.abs(patch.mean)
    square = jnp.where(patch.m2 <= patch.count * jnp.square(noise), 0, patch.m2)
    contrast = length_w * safe_sqrt(square) * peak
    sigma = jnp.where(contrast == 0, lax.stop_gradient(sigma), contrast)
    return Parts(mu, sigma, jnp.where(length_w == 0, 0, g), b)


def _peak(x: Array, linear: Linear) -> Array:
    """max|x| over the axes of a patch, 1 where it is zero, without a gradient."""
    peak = lax.stop_gradient(jnp.max(jnp.abs(x), linear.patch_axes(x), keepdims=True))
    return jnp.where(peak == 0, 1, peak)
