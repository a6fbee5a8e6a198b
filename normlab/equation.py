"""The one equation, its inverse, and its absorption into the layer before.

h = g · (a − μ) / σ + b
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import checked, declare, instance
from normlab._checks import (
    expand,
    floating,
    invalid,
    normalize_axes,
    promote,
    promote_dtype,
    result_dtype,
)
from normlab._trees import node
from normlab._xla import apart, derivative_of, partitioned, widen, zeros_of
from normlab._weights import align_weights, leave_out


@node
class Parts(NamedTuple):
    """The four parts of a normalization, each broadcastable to the pre-activation `a`.

    `mu, sigma, g, b = parts`.

    Attributes:
      shift: μ, in the units of `a`.
      scale: σ > 0, in the units of `a`; the largest number of its type where nothing was measured.
      rescale: g, the learned gain.
      reshift: b, the learned bias.
    """

    shift: Array
    scale: Array
    use_gain: Array
    use_bias: Array


declare(parts=instance(Parts, "take them from a *_parts, or make Parts(mu, sigma, g, b)"))


@checked("affine")
def affine(
    parts: Parts,
    a: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    channel_axis: int | None = None,
) -> Array:
    """Applies the four parts: h = g · (a − μ) / σ + b.

    The arithmetic is done in float32 at least, whatever the type of `a`. The subtraction comes
    first, so nothing is lost when |μ| is much larger than σ.

    Args:
      parts: Shift, scale, rescale, reshift, each broadcastable to `a`.
      a: `[N, ..., C]`, the pre-activation.
      weights: The weights that the parts were measured with, if any. A value that is not finite
        and weighs nothing counts as zero, so that it reaches no gradient.
      channel_axis: The axis of the channels, which the weights pass over; `None` if they have none.

    Returns:
      h, in the shape of `a` and in its floating type (float32 for integers).

    Raises:
      ValueError: If a part does not broadcast to the shape of `a`, or the weights do not fit.

    >>> parts = Parts(*map(jnp.float32, (1.0, 2.0, 3.0, 10.0)))
    >>> affine(parts, jnp.array([1.0, 5.0])).tolist()
    [10.0, 16.0]
    """
    if channel_axis is not None:
        (channel_axis,) = normalize_axes("affine", channel_axis, jnp.ndim(a))
    parts = _checked(parts, jnp.shape(a), promote_dtype(a))
    a, weights = jnp.asarray(a), align_weights("affine", weights, a, channel_axis)
    return partitioned(_affine, a, parts, weights)


def _affine(a: Array, parts: Parts, weights: Array | None) -> Array:
    mu, sigma, g, b = parts
    a = floating(leave_out(a, weights))
    # (a − μ)/σ about a pivot, the value of μ: (a − k)·r + c with r = 1/σ and c = (k − μ)/σ. c is
    # zero, and carries the derivative of μ: so that the gradient of μ is that of c, a small array,
    # and needs no sum over a of its own.
    pivot = lax.stop_gradient(mu)
    r = _reciprocal(sigma, weights is not None)
    small = jnp.broadcast_shapes(r.shape, g.shape, b.shape, (1,) * a.ndim)
    if small != a.shape:
        r = r * g
        c, g, b = _shift(mu, r) + b, jnp.ones((), r.dtype), jnp.zeros((), r.dtype)
        small = jnp.broadcast_shapes(r.shape, c.shape, (1,) * a.ndim)
        axes = [i for i, n in enumerate(a.shape) if n != small[i]]
        wide = widen(a.shape, axes)
        if wide:
            shape = a.shape
            pivot, r, c = (wide.statistic(jnp.broadcast_to(v, small)) for v in (pivot, r, c))
            return _apply(wide.array(a), pivot, r, c, g, b).astype(a.dtype).reshape(shape)
    else:
        c = _shift(mu, r)
    return _apply(a, pivot, r, c, g, b).astype(a.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _reciprocal(sigma: Array, weighted: bool) -> Array:
    """1/σ, with the derivative −(dσ/σ)/σ: 1/σ² would overflow from 1e-19 on.

    Where there are weights, the largest σ there is stands for none that was measured: 0.
    """
    r = 1 / sigma
    return jnp.where(sigma >= jnp.finfo(sigma.dtype).max, 0, r) if weighted else r


@_reciprocal.defjvp
def _(weighted: bool, primals: Any, tangents: Any) -> Any:
    r = _reciprocal(*primals, weighted)
    return r, -(tangents[0] * r) * r


@jax.custom_jvp
def _shift(mu: Array, r: Array) -> Array:
    """(k − μ)·r where k is the value of μ: zero, with all the derivatives."""
    return zeros_of(mu * r)


@_shift.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (mu, r), (dmu, dr) = primals, tangents
    return _shift(mu, r), -dmu * r - derivative_of(mu) * dr


@jax.custom_jvp
def _apply(a: Array, pivot: Array, r: Array, c: Array, g: Array, b: Array) -> Array:
    """((a − k)·r + c)·g + b, with a derivative that reads `a` once for each of its sums."""
    return ((promote(a) - pivot) * r + c) * g + b


@_apply.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (a, pivot, r, c, g, b), (da, dk, dr, dc, dg, db) = primals, tangents
    a1, k1, r1, g1 = apart(a, pivot, r, g)
    a2, k2, r2, g2 = apart(a1, k1, r1, g1)
    by_a = (promote(da) - dk) * r * g
    by_r = (promote(a1) - k1) * g1 * dr
    by_g = ((promote(a2) - k2) * r2 + c) * dg
    return _apply(a, pivot, r, c, g, b), by_a + by_r + dc * g2 + by_g + db


@checked("invert")
def invert(parts: Parts, h: ArrayLike) -> Array:
    """Undoes `affine`: a = (h − b) · σ / g + μ.

    Where g is zero the information is gone and the result is not finite.

    Args:
      parts: The parts that made `h`.
      h: `[N, ..., C]`, what `affine` returned.

    Returns:
      a, in the shape and floating type of `h`.

    Raises:
      ValueError: If a part does not broadcast to the shape of `h`.
    """
    mu, sigma, g, b = _checked(parts, jnp.shape(h), promote_dtype(h))
    return ((promote(h) - b) * sigma / g + mu).astype(result_dtype(h))


@checked("fold")
def fold(
    parts: Parts, kernel: Array, bias: Array | None = None, *, unit_axis: int = -1
) -> tuple[Array, Array]:
    """Writes the parts into the linear layer before them, so that they cost nothing at inference.

    With k = g/σ per channel, `affine(parts, linear(x, kernel) + bias)` equals
    `linear(x, kernel·k) + (bias − μ)·k + b` (Ioffe & Szegedy 2015, section 3.1).

    Args:
      parts: Parts that are numbers or vary along the channels alone, such as batch norm's with
        `train=False`. Parts that depend on the example cannot be folded: `fold_norm` finds them.
      kernel: `[..., K, C]`: of a dense layer or of any convolution, also grouped or transposed.
      bias: `[C]`, the layer's own bias; `None` for none.
      unit_axis: Where `kernel` has its `C` units, if not last: 0 in torch (1 in its
        transposed convolutions), -2 in a transposed convolution with a kernel `[..., C, K]`.

    Returns:
      `(kernel, bias)` of the folded layer, in the shape of `kernel` and `[C]`.

    Raises:
      ValueError: If a part varies along anything but `C` channels, or the bias is not `[C]`.

    >>> parts = Parts(*map(jnp.float32, (1.0, 2.0, 4.0, 10.0)))
    >>> kernel, bias = fold(parts, jnp.array([[3.0], [5.0]]))
    >>> kernel.tolist(), bias.tolist()
    ([[6.0], [10.0]], [8.0])
    """
    (unit_axis,) = normalize_axes("fold", unit_axis, kernel.ndim)
    channels = kernel.shape[unit_axis]
    for name, part in zip(Parts._fields, parts, strict=True):
        shape = jnp.shape(part)
        by_example = len(shape) > 1 and shape[0] != 1
        if (
            jnp.size(part) not in (1, channels)
            or max(shape, default=1) != jnp.size(part)
            or by_example
        ):
            raise invalid(
                "fold",
                f"a {name} of shape {shape}",
                f"one value for each of the kernel's {channels} output channels",
                "take parts that do not depend on the examples, as batch norm's with train=False, "
                "and set unit_axis if the kernel does not have its units last",
            )
    if bias is not None and bias.shape != (channels,):
        raise invalid(
            "fold",
            f"a bias of shape {bias.shape} for a kernel of shape {kernel.shape}",
            f"shape ({channels},)",
            "pass the bias of the same layer, and set unit_axis if the units are not last",
        )
    mu, sigma, g, b = (jnp.broadcast_to(jnp.ravel(part), channels) for part in parts)
    dtype = jnp.promote_types(promote_dtype(kernel), (g / sigma).dtype)
    k = (g / sigma).astype(dtype)
    bias = jnp.zeros(channels, dtype) if bias is None else bias.astype(dtype)
    scaled = kernel.astype(dtype) * expand(k, kernel.ndim, unit_axis)
    return scaled.astype(kernel.dtype), (bias - mu.astype(dtype)) * k + b.astype(dtype)


def _checked(parts: Parts, shape: tuple[int, ...], dtype: Any) -> Parts:
    """The parts as arrays, Python's numbers of the type; ValueError unless they fit the shape."""
    for name, part in zip(Parts._fields, parts, strict=True):
        try:
            fits = jnp.broadcast_shapes(jnp.shape(part), shape) == tuple(shape)
        except ValueError:
            fits = False
        if not fits:
            raise invalid(
                "affine",
                f"a {name} of shape {jnp.shape(part)} for a pre-activation of shape {shape}",
                "a part that broadcasts to the pre-activation",
                "measure the parts on the same layout, or check the channel axis",
            )
    return Parts(*(jnp.asarray(part, None if hasattr(part, "dtype") else dtype) for part in parts))
