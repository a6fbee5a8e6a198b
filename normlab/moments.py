"""Weighted moments as a monoid: measure and merge.

Everything that pools statistics in this library (axes of an array, channels of a group, devices)
goes through `Moments`, so weights, empty shards and uneven shards are right everywhere at once.

The mean and the squared deviations are taken about a *pivot* k:

    mean = k + Σ w·(x − k) / Σ w        m2 = Σ w·(x − k)² − (Σ w·(x − k))² / Σ w

Both are independent of k in exact arithmetic, so k carries no gradient; in floating point they
lose about log10(1 + (mean − k)²/var) digits. The `Algorithm` is nothing but the choice of k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from normlab.checks import floating, invalid, nearest, normalize_axes, promote, promote_dtype
from normlab.lowering import apart, derivative_of, widen

Algorithm = Literal["auto", "shifted", "two_pass", "one_pass"]
"""About which pivot the moments are taken.

`"two_pass"`: the mean, from a pass of its own about the first value. `"shifted"`: the mean of a
sixteenth of the values; their distance from the mean is part of the variance, so at most log10(17)
digits are lost at any mean. Both give the mean to its last bit. `"one_pass"`: 0, that is
E[x²] − E[x]², which loses log10(1 + mean²/var) digits. `"auto"`: `"shifted"`; over the innermost
axis, where XLA makes one loop of it, the mean as XLA sums it, which may be off by two units in its
last place. Weighted moments know no sixteenth: there `"shifted"` is two passes, the mean corrected
by the second (Chan, Golub & LeVeque 1983).
"""


class Moments(NamedTuple):
    """Count, mean and summed squared deviations of a weighted sample.

    A commutative monoid under `merge`, with `empty` as its identity. Reduced axes stay with size
    1, so the fields broadcast against the array they were measured on.

    Attributes:
      count: Σ w, broadcastable to `mean`. The number of values when there are no weights.
      mean: Σ w·x / Σ w; zero for an empty sample.
      m2: Σ w·(x − mean)², never negative.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array
    m2: Array

    def var(self, ddof: float = 0) -> Array:
        """The variance m2 / (count − ddof); zero where the count does not exceed `ddof`."""
        dof = self.count - ddof
        return jnp.where(dof > 0, self.m2 / jnp.where(dof > 0, dof, 1), 0)

    def scale(self, eps: float) -> Array:
        """σ = √(var + ε); infinite where nothing was measured, so that g·(a − μ)/σ + b is b."""
        return jnp.where(self.count > 0, jnp.sqrt(self.var() + eps), jnp.inf)

    def cancellation(self) -> Array:
        """mean²/var: log10 of 1 + this is how many digits of the variance E[x²] − E[x]² loses.

        Infinite where the variance is zero and the mean is not. From about 1e7 on, that form has
        nothing left of a float32 variance; the other algorithms do not mind.
        """
        square, var = jnp.square(self.mean), self.var()
        ratio = square / jnp.where(var == 0, 1, var)
        return jnp.where(var == 0, jnp.where(square == 0, 0, jnp.inf), ratio)


def empty(shape: Sequence[int] = (), dtype: DTypeLike = jnp.float32) -> Moments:
    """The moments of no values at all: the identity of `merge`.

    Args:
      shape: The shape of each field.
      dtype: Their type, float32 or float64.
    """
    return Moments(*(jnp.zeros(shape, dtype) for _ in Moments._fields))


def moments(
    x: ArrayLike,
    axes: int | Sequence[int],
    *,
    weights: ArrayLike | None = None,
    algorithm: Algorithm = "auto",
) -> Moments:
    """Measures the moments of `x` over `axes`.

    Values of weight zero are left out, whatever they are: a NaN there reaches neither the moments
    nor their gradient. Values are squared: in float32 deviations beyond 1e19 overflow.

    Args:
      x: Any real array; statistics are taken in float32 at least.
      axes: The axes to measure over. They stay, with size 1.
      weights: Non-negative importance, aligned with the *leading* axes of `x`: shape
        `x.shape[:k]` for some k, or the rank of `x` with sizes 1 where it does not vary.
      algorithm: The pivot, an `Algorithm`.

    Returns:
      `Moments`; those of an empty sample are `empty`.

    Raises:
      ValueError: If an axis is out of range or repeated, `weights` is not aligned with `x`, or the
        algorithm is unknown.

    >>> m = moments(jnp.array([1.0, 2.0, 3.0, jnp.nan]), 0, weights=jnp.array([1, 1, 1, 0]))
    >>> m.count.item(), m.mean.item(), m.m2.item()
    (3.0, 2.0, 2.0)
    """
    x = floating(x)
    axes = normalize_axes("moments", axes, x.ndim)
    check_algorithm("moments", algorithm)
    w = align_weights("moments", weights, x)
    x = x if w is None else jnp.where(w > 0, x, jnp.zeros((), x.dtype))
    two_passes = _two_passes(x, axes, algorithm)
    if w is not None:
        pivot = lax.stop_gradient(_pivot(x, axes, w, algorithm))
        offset, count = average(promote(x) - pivot, axes, weights=w)
        square, _ = average(jnp.square(promote(x) - pivot), axes, weights=w)
        mean = pivot + offset
    else:
        n = math.prod(x.shape[i] for i in axes)
        count = jnp.full((1,) * x.ndim, n, promote_dtype(x))
        pivot = _pivot(x, axes, None, algorithm)
        first, second = power_sums(x, lax.stop_gradient(pivot), axes)
        square = second / max(n, 1)
        if two_passes:
            mean, offset = pivot, derivative_of(pivot)
        else:
            offset = first / max(n, 1)
            mean = lax.stop_gradient(pivot) + offset
    m2 = count * (square - jnp.square(offset))
    if w is not None or not two_passes:
        # `where` and not `maximum`: at m2 = 0 the derivatives of every order must pass whole.
        m2 = jnp.where(m2 < 0, 0, m2)
    return Moments(count, mean, m2)


def _two_passes(x: Array, axes: tuple[int, ...], algorithm: Algorithm) -> bool:
    return algorithm == "two_pass" or (algorithm == "auto" and x.ndim - 1 in axes)


def _pivot(x: Array, axes: tuple[int, ...], w: Array | None, algorithm: Algorithm) -> Array:
    if algorithm == "one_pass":
        return jnp.zeros((1,) * x.ndim, promote_dtype(x))
    if w is None and axes and not _two_passes(x, axes, algorithm):
        # Every 16th slice along one axis (or the nearest divisor), not the first slices: where
        # the axis is sharded, each device has its share of them.
        step = {i: max((k for k in range(2, 17) if x.shape[i] % k == 0), default=1) for i in axes}
        axis = max(axes, key=lambda i: (step[i] >= 8, 0 < i < x.ndim - 1, step[i]))
        split = (*x.shape[:axis], -1, step[axis], *x.shape[axis + 1 :])
        if x.size:
            x = lax.index_in_dim(x.reshape(split), 0, axis + 1, keepdims=False)
        return average(promote(x), axes)[0]
    if algorithm == "two_pass" and w is None and x.size:
        # About the first value: the mean is right to its last bit, and that of a constant exact.
        first = x[tuple(slice(1) if i in axes else slice(None) for i in range(x.ndim))]
        first = lax.stop_gradient(promote(first))
        return first + average(promote(x) - first, axes)[0]
    return average(promote(x), axes, weights=w)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def power_sums(x: Array, pivot: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns Σ (x − k) and Σ (x − k)² over `axes`, which stay with size 1.

    Args:
      x: A floating array.
      pivot: k, which broadcasts to `x`, in the statistics' type.
      axes: Non-negative, distinct axes.
    """
    if x.ndim - 1 in axes:
        # Over the innermost axis XLA's CPU keeps both sums and what follows in one loop.
        d = promote(x) - pivot
        return d.sum(axes, keepdims=True), jnp.square(d).sum(axes, keepdims=True)
    total = [1 if i in axes else n for i, n in enumerate(x.shape)]
    wide = widen(x.shape, axes)
    if wide:
        x, pivot = wide.array(x), wide.statistic(jnp.broadcast_to(pivot, total))
        axes = (1,)
    x1, k1 = apart(x, pivot)
    x2, k2 = apart(x1, k1)
    first = (promote(x1) - k1).sum(axes, keepdims=True)
    second = jnp.square(promote(x2) - k2).sum(axes, keepdims=True)
    return (wide.total(first, total), wide.total(second, total)) if wide else (first, second)


@power_sums.defjvp
def _(axes: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    (x, pivot), (dx, dk) = primals, tangents
    # The deviations are formed anew: sharing those of the sums would keep them in memory.
    d, dd = promote(x) - pivot, promote(dx) - dk
    first, second = dd.sum(axes, keepdims=True), 2 * (d * dd).sum(axes, keepdims=True)
    return power_sums(x, pivot, axes), (first, second)


def check_algorithm(where: str, algorithm: str) -> None:
    """Raises ValueError unless `algorithm` is an `Algorithm`."""
    if algorithm not in get_args(Algorithm):
        raise invalid(
            where,
            f"algorithm={algorithm!r}",
            "the name of an algorithm",
            f"use a known one: {nearest(str(algorithm), get_args(Algorithm))}",
        )


def average(
    x: Array, axes: Sequence[int], *, weights: ArrayLike | None = None
) -> tuple[Array, Array]:
    """Returns `(Σ w·x / Σ w, Σ w)` over `axes`, which stay with size 1; the mean of nothing is 0.

    Args:
      x: A floating array.
      axes: Non-negative, distinct axes.
      weights: As in `moments`.
    """
    w = align_weights("average", weights, x)
    if w is None:
        count = jnp.full((1,) * x.ndim, math.prod(x.shape[i] for i in axes), x.dtype)
        total = x.sum(axes, keepdims=True)
    else:
        repeats = math.prod(x.shape[i] for i in axes if w.shape[i] == 1)
        count = repeats * w.sum([i for i in axes if w.shape[i] != 1], keepdims=True)
        total = (w * jnp.where(w > 0, x, 0)).sum(axes, keepdims=True)
    return total / jnp.where(count > 0, count, 1), count


def merge(p: Moments, q: Moments) -> Moments:
    """The moments of two samples together (Chan, Golub & LeVeque 1983).

    Commutative and associative up to rounding; `merge(empty(), q)` is q exactly.

    Args:
      p: The moments of one sample.
      q: Those of another, of a shape that broadcasts with `p`.

    >>> merge(moments(jnp.array([1.0, 2.0]), 0), moments(jnp.array([6.0]), 0)).mean.item()
    3.0
    """
    count = p.count + q.count
    share = q.count / jnp.where(count > 0, count, 1)
    delta = q.mean - p.mean
    return Moments(count, p.mean + delta * share, p.m2 + q.m2 + jnp.square(delta) * p.count * share)


def merge_axes(m: Moments, axes: int | Sequence[int]) -> Moments:
    """Merges the samples along array axes: `m2` within them plus `m2` between their means.

    Args:
      m: Moments of many samples, one per position along `axes`.
      axes: Axes of `m.mean`; they stay, with size 1.
    """
    axes = normalize_axes("merge_axes", axes, m.mean.ndim)
    count = jnp.broadcast_to(m.count, m.mean.shape)
    between = moments(m.mean, axes, weights=count)
    return between._replace(m2=between.m2 + m.m2.sum(axes, keepdims=True))


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
      ValueError: If it is not aligned with `x`, or one is negative (where that can be seen).
    """
    if weights is None:
        return None
    shape = jnp.shape(x)
    w = jnp.asarray(weights).astype(promote_dtype(x))
    given = w.shape
    if not isinstance(weights, Tracer) and (np.asarray(weights) < 0).any():
        raise invalid(
            where,
            f"a weight of {np.asarray(weights).min()}",
            "weights of at least 0",
            "use 0 to leave a value out",
        )
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
