"""The importance of values: weights of any size that align with them, and what they leave out."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from normlab._arguments import checked
from normlab._checks import normalize_axes, promote, promote_dtype
from normlab.errors import invalid


def aligned(
    where: str,
    a: ArrayLike,
    weights: ArrayLike | None,
    channel_axis: int,
    *,
    by_example: bool = False,
) -> tuple[Array, int, Array | None]:
    """Returns `a` as an array, the number of its axis of channels, and the weights aligned.

    Args:
      where: The caller, for errors.
      a: Values.
      weights: Their weights.
      channel_axis: The axis of the channels.
      by_example: Whether the examples have axis 0 for themselves.
    """
    a = jnp.asarray(a)
    (channel,) = normalize_axes(where, channel_axis, a.ndim)
    if by_example and channel == 0:
        raise invalid(
            where,
            f"channel_axis={channel_axis} for an input of shape {a.shape}",
            "examples on axis 0 and channels on another",
            "move the examples first, or add an axis for the one example",
        )
    return a, channel, align_weights(where, weights, a, channel)


def align_weights(
    where: str, weights: ArrayLike | None, x: ArrayLike, channel_axis: int | None = None
) -> Array | None:
    """Returns `weights` in the rank and the statistics' type of `x`, to broadcast against it.

    Args:
      where: The caller, for the error.
      weights: `None`, or an array aligned with the leading axes of `x` other than its channels;
        or of the rank of `x`, with sizes 1 where it does not vary.
      x: The values.
      channel_axis: The axis of the channels; `None` if no axis is special.

    Raises:
      ValueError: If it is not aligned with `x`, complex, or one is negative or not finite (where
        that can be seen).
    """
    if weights is None:
        return None
    shape = jnp.shape(x)
    _check_weights(where, weights)
    w = _in_range(jnp.asarray(weights).astype(promote_dtype(x)))
    given = w.shape
    if channel_axis is not None:
        channel_axis %= len(shape)
    full = w.ndim == len(shape)
    if channel_axis is not None and channel_axis < w.ndim < len(shape):
        w = jnp.expand_dims(w, channel_axis)
    else:
        channel_axis = None
    if w.ndim > len(shape) or any(
        have != want and i != channel_axis and not (full and have == 1)
        for i, (have, want) in enumerate(zip(w.shape, shape, strict=False))
    ):
        raise invalid(
            where,
            f"weights of shape {given} for values of shape {shape}",
            "the leading axes of the values (without their channels), or their whole rank with "
            "sizes 1",
            f"pass one weight per example, shape {shape[:1]}",
        )
    return w.reshape(w.shape + (1,) * (len(shape) - w.ndim))


def _check_weights(where: str, weights: ArrayLike) -> None:
    """Raises ValueError for weights that are no weights, as far as that can be seen."""
    change = "use 0 to leave a value out"
    if jnp.issubdtype(jnp.result_type(weights), jnp.complexfloating):
        raise invalid(where, f"weights of type {jnp.result_type(weights)}", "real ones", change)
    if isinstance(weights, Tracer) or not getattr(weights, "is_fully_addressable", True):
        return
    w = np.asarray(weights)
    wrong = w[~((w >= 0) & (w < np.inf))]
    if wrong.size:
        raise invalid(where, f"a weight of {wrong[0]}", "finite weights of at least 0", change)


def _in_range(w: Array) -> Array:
    """Weights of any size as numbers whose sums and products are numbers too.

    Only their ratios matter: where the largest is beyond 2^±60 (float32), all are multiplied by
    2^∓90, and denormal ones, which XLA takes for zero, are read off their bits.
    """
    info = jnp.finfo(w.dtype)
    far, step = 2.0 ** (info.maxexp * 15 // 32), 2.0 ** (info.maxexp * 45 // 64)
    peak = lax.stop_gradient(jnp.max(w, initial=0))
    scale = jnp.where(peak > far, 1 / step, jnp.where(peak < 1 / far, step, 1))
    bits = lax.bitcast_convert_type(lax.stop_gradient(w), jnp.dtype(f"int{info.bits}"))
    denormal = (bits & ((1 << info.nmant) - 1)).astype(w.dtype)
    return jnp.where(peak == 0, denormal, w * scale.astype(w.dtype))


def leave_out(a: ArrayLike, weights: Array | None) -> Array:
    """Returns `a` with zero where it is not finite and weighs nothing: no gradient passes there.

    Args:
      a: Values.
      weights: As `align_weights` returned them.
    """
    a = jnp.asarray(a)
    if weights is None or not jnp.issubdtype(a.dtype, jnp.floating):
        return a
    return jnp.where((weights > 0) | jnp.isfinite(a), a, jnp.zeros((), a.dtype))


@checked("effective sample size")
def effective_sample_size(weights: ArrayLike, axes: int | Sequence[int] | None = None) -> Array:
    """Kish's effective sample size (Σ w)² / Σ w²: n equal weights are worth n examples.

    A statistic over weighted examples is about as uncertain as one over this many equal ones. With
    weights of 0 and 1 it is the number of ones; of nothing it is 0.

    Args:
      weights: Importance, at least 0.
      axes: The axes of `weights` to count over; `None` for all.

    Returns:
      The size, in float32 at least, without the axes counted over.

    >>> effective_sample_size(jnp.array([1.0, 1.0, 0.0])).item()
    2.0
    """
    where = "effective sample size"
    w = promote(weights)
    axes = tuple(range(w.ndim)) if axes is None else normalize_axes(where, axes, w.ndim)
    peak = jnp.max(w, axes, keepdims=True, initial=0)
    w = w / jnp.where(peak > 0, peak, 1)
    square = jnp.square(w).sum(axes)
    return jnp.square(w.sum(axes)) / jnp.where(square > 0, square, 1)
