"""The moments of segments: of the rows of an array that have one id."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from normlab._xla import derivative_of
from normlab.measure import Moments


def segment_totals(ids: Array, segments: int, *values: Array) -> list[Array]:
    """Of values `[R, C]`, their sums over the rows of every segment, `[segments, C]`.

    A row whose id is not from 0 to `segments` − 1 is in none.
    """
    table = jax.ops.segment_sum(jnp.stack(values, -1), ids, segments)
    return [table[..., i] for i in range(len(values))]


def of_rows(v: Array, ids: Array) -> Array:
    """Of `[segments, C]`, that of the segment of every row, `[R, C]`; 0 for a row in none."""
    return jnp.take(v, jnp.where(ids < 0, len(v), ids), axis=0, mode="fill", fill_value=0)


def moments_of_segments(
    x: Array, w: Array, ids: Array, segments: int, *, channels_too: bool = False
) -> Moments:
    """Measures every segment in two sums, the second about the mean that the first found.

    Args:
      x: `[R, P, C]`, in the statistics' type: P values in each row.
      w: `[R, P, C]`, their weights.
      ids: `[R]`, the segment of each row.
      segments: How many there are.
      channels_too: Whether all channels are measured together.

    Returns:
      Fields `[segments, C]`, or `[segments, 1]`.
    """
    w = jnp.where(((ids >= 0) & (ids < segments))[:, None, None], w, 0)
    x = jnp.where(w > 0, x, 0)

    def totals(*values: Array) -> list[Array]:
        axes = (1, 2) if channels_too else 1
        sums = [v.sum(axes, keepdims=True)[:, 0] for v in values]
        return segment_totals(ids, segments, *sums)

    count, first = totals(w, w * x)
    n = jnp.where(count > 0, count, 1)
    pivot = lax.stop_gradient(first / n)
    d = jnp.where(w > 0, x - of_rows(pivot, ids)[:, None], 0)
    first, second = totals(w * d, w * jnp.square(d))
    m2 = count * (second / n - jnp.square(first / n))
    m2 = lax.stop_gradient(jnp.maximum(m2, 0)) + derivative_of(m2)
    return Moments(count, pivot + first / n, m2)
