"""Norms that look at the weights and at the input: cosine and centred cosine.

    cosine     μ = 0          σ = ‖w‖·‖x‖           h = g · cos(w, x) + b
    centred    μ = K·w̄·x̄     σ = ‖w − w̄‖·‖x − x̄‖   h = g · r(w, x) + b

x is the patch of K inputs that meets the unit's weights w: the whole input of a dense layer, a
window of a convolution, its padding included. r is Pearson's correlation.

The K inputs may lie on several devices, each with its rows of the kernel, as in a row-parallel
layer: then a is the sum over devices, and so are the squares of the lengths.
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
    no_mean,
    output_shape,
    promote,
    result_dtype,
)
from normlab._units import deviations, safe_sqrt, units_and_lengths
from normlab.devices.topology import Sync
from normlab.equation import Affine, Parts, affine
from normlab.errors import invalid
from normlab.linear import Dense, Linear
from normlab.measure import moments
from normlab.sharded import OVER, ExampleAxes, largest, merged, shared, summed
from normlab.site import Site


@checked("cosine norm", w=array(), axis_name=OVER)
def cosine_norm(
    x: ArrayLike,
    w: ArrayLike,
    params: Affine | None = None,
    *,
    linear: Linear = Dense(),  # noqa: B008
    centred: bool = False,
    axis_name: ExampleAxes | None = None,
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
      axis_name: Mapped axes along which the K inputs lie, and with them the rows of w, as in a
        row-parallel layer; h is then that of all of them, on every device. Where the units lie on
        several devices and the inputs do not, it is `None`.

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
    x, w, over = promote(x), promote(w), _sharing(where, axis_name, linear)
    # The cosine does not see the lengths: divide them out before the product can overflow.
    if over.names:
        w = _deviations(where, over, w)[0] if centred else w
        peak_x, peak_w = _peaks(over, x, w, linear)
        x, w = x / peak_x, w / peak_w
        (a,) = summed(where, over, linear(x, w), spread=False)
    else:
        x = x / _peaks(over, x, w, linear)[0]
        w, _ = units_and_lengths(deviations(w)[0] if centred else w)
        a = linear(x, w)
    site = Site(a, x, w, linear=linear)
    parts = cosine_parts(site, params, centred=centred, axis_name=axis_name)
    return affine(parts, site.a).astype(dtype)


@checked("cosine norm", axis_name=OVER)
def cosine_parts(
    site: Site,
    params: Affine | None = None,
    *,
    centred: bool = False,
    axis_name: ExampleAxes | None = None,
) -> Parts:
    """The parts of cosine normalization.

    A zero vector has σ = 1. In the centred form a constant w or x has the σ of the plain one, and
    a constant w has g = 0 too, so that h = b whatever rounding leaves of a − μ.

    The arguments are those of `weight_parts`, which see, of a site that has an `x` too; the others
    are those of `cosine_norm`. With an `axis_name`, x and w are those of the device and a is the
    sum over devices.

    >>> import jax.numpy as jnp
    >>> from normlab.site import Site
    >>> x, w = jnp.array([[3.0, 4.0]]), jnp.array([[1.0], [0.0]])
    >>> cosine_parts(Site(x @ w, x, w)).sigma.tolist()
    [[5.0]]
    """
    where = "centred cosine norm" if centred else "cosine norm"
    w, x = promote(kernel(where, site)), promote(inputs(where, site))
    g, b = gain_and_bias(where, params, site.a, site.linear.channel_axis)

    def per_unit(v: Array) -> Array:
        return expand(v, site.a.ndim, site.linear.channel_axis)

    over, units = _sharing(where, axis_name, site.linear), tuple(range(w.ndim - 1))
    peak, peak_w = _peaks(over, x, w, site.linear)
    x = x / peak
    squares = site.linear.patch_sum(jnp.square(x), w)
    of_w = jnp.square(w / peak_w).sum(units, keepdims=True)
    squares, of_w = summed(where, over, squares, of_w, spread=False)
    sigma = per_unit(safe_sqrt(of_w) * peak_w) * safe_sqrt(squares) * peak
    sigma = jnp.where(sigma == 0, 1, sigma)
    if not centred:
        return Parts(no_mean(w.dtype), sigma, g, b)
    patch = merged(where, site.linear.patch_moments(x, w), over)
    deviation, w_bar = _deviations(where, over, w)
    mu = patch.count * per_unit(w_bar) * patch.mean * peak
    (peak_w,) = largest(over, jnp.abs(deviation).max(units, keepdims=True))
    peak_w = jnp.where(peak_w == 0, 1, peak_w)
    of_w = jnp.square(deviation / peak_w).sum(units, keepdims=True)
    (of_w,) = summed(where, over, of_w, spread=False)
    length_w = per_unit(safe_sqrt(of_w) * peak_w)
    # What rounding leaves of a constant patch is no direction. There σ is the plain one, beside
    # which the rounding of a − μ is nothing.
    noise = 8 * jnp.finfo(w.dtype).eps * jnp.abs(patch.mean)
    square = jnp.where(patch.m2 <= patch.count * jnp.square(noise), 0, patch.m2)
    contrast = length_w * safe_sqrt(square) * peak
    sigma = jnp.where(contrast == 0, lax.stop_gradient(sigma), contrast)
    return Parts(mu, sigma, jnp.where(length_w == 0, 0, g), b)


def _sharing(where: str, axis_name: ExampleAxes | None, linear: Linear) -> Sync:
    """Over which devices the inputs of a unit lie."""
    over = shared(where, axis_name, channels=True, positions=False)
    if over.names and getattr(linear, "groups", 1) != 1:
        given = f"{linear} with axis_name={axis_name!r}"
        change = "leave axis_name out: the inputs of a group are on one device"
        raise invalid(where, given, "units that see all the inputs", change)
    if over != Sync(over.axes):
        raise invalid(where, f"{over}", "whole axes of devices", "name the axes alone")
    return over


def _peaks(over: Sync, x: Array, w: Array, linear: Linear) -> tuple[Array, Array]:
    """max|x| over the axes of a patch, max|w| of a unit; 1 where it is zero, without a gradient."""
    of_x = jnp.max(jnp.abs(x), linear.patch_axes(x), keepdims=True)
    of_w = jnp.max(jnp.abs(w), range(w.ndim - 1), keepdims=True, initial=0)
    of_x, of_w = largest(over, of_x, of_w)
    return jnp.where(of_x == 0, 1, of_x), jnp.where(of_w == 0, 1, of_w)


def _deviations(where: str, over: Sync, w: Array) -> tuple[Array, Array]:
    """`deviations` of units that lie on several devices."""
    if not over.names:
        return deviations(w)
    units = range(w.ndim - 1)
    mean = merged(where, moments(w, units), over).mean
    deviation = w - mean
    noise = 8 * jnp.finfo(w.dtype).eps * jnp.abs(lax.stop_gradient(mean))
    (most,) = largest(over, jnp.abs(deviation).max(units, keepdims=True))
    return jnp.where(most <= noise, 0, deviation), mean
