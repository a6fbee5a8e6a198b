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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from normlab._arguments import checked, declare, instance, integer, one_of, sequence
from normlab._checks import floating, invalid, normalize_axes, promote, promote_dtype
from normlab._trees import node
from normlab._xla import apart, derivative_of, partitioned, widen

Algorithm = Literal["auto", "shifted", "two_pass", "one_pass"]
"""About which pivot the moments are taken.

`"two_pass"`: the mean, from a pass of its own. `"shifted"`: the mean of a sixteenth of the values;
their distance from the mean is part of the variance, so at most log10(17) digits are lost at any
mean. `"one_pass"`: 0, that is E[x²] − E[x]², which loses log10(1 + mean²/var) digits. `"auto"`:
`"shifted"`; over the innermost axis, where XLA makes one loop of it, the mean as XLA sums it.
Weighted moments know no sixteenth: there `"shifted"` is two passes.

With all of them the mean is corrected by Σ (x − k), or taken about the first value: it is right to
two units in its last place, and the mean of a constant is that constant, so that h is b.
"""

declare(algorithm=one_of(Algorithm, "the name of an algorithm"))


@node
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
        """σ = √(var + ε), as `standard_deviation`."""
        return standard_deviation(self.var(), self.count, eps)

    def cancellation(self) -> Array:
        """mean²/var: log10 of 1 + this is how many digits of the variance E[x²] − E[x]² loses.

        Infinite where the variance is zero and the mean is not. From about 1e7 on, that form has
        nothing left of a float32 variance; the other algorithms do not mind.
        """
        square, var = jnp.square(self.mean), self.var()
        ratio = square / jnp.where(var == 0, 1, var)
        return jnp.where(var == 0, jnp.where(square == 0, 0, jnp.inf), ratio)


SAMPLE = instance(Moments, "pass what moments(x, axes) returned")
SHAPE = sequence(integer("a size", "", 0), "a shape", "pass a tuple of ints, such as (3,)")
declare(m=SAMPLE, p=SAMPLE, q=SAMPLE)


def standard_deviation(var: Array, count: Array, eps: float) -> Array:
    """σ = √(var + ε); the largest number where nothing was measured, NaN where var overflowed.

    `affine` divides by the largest number as by infinity: h is b, and no gradient passes.

    Args:
      var: A variance, or a mean of squares.
      count: Of how many values.
      eps: ε.
    """
    square, info = var + eps, jnp.finfo(var.dtype)
    if isinstance(eps, Tracer) or eps < 2.0 ** (info.minexp + info.nmant + 4):
        sigma = jnp.sqrt(square) + lax.stop_gradient(square - square)  # zero, or NaN
    else:
        sigma = _root(square, 2.0 ** ((info.maxexp - 2 + math.floor(math.log2(min(eps, 1)))) // 2))
    return jnp.where(count > 0, sigma, info.max)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _root(square: Array, factor: float) -> Array:
    """√v; NaN where v is infinite, as an infinite σ would look like a constant sample.

    With a power of 2 for f, √v = f / √(f²/v − tiny): tiny is nothing beside f²/v, but beside 0.
    Each value is used once, so that XLA's CPU can still make one loop of a norm.
    """
    return factor / jnp.sqrt(factor * factor / square - jnp.finfo(square.dtype).tiny)


@_root.defjvp
def _(factor: float, primals: Any, tangents: Any) -> Any:
    sigma = _root(*primals, factor)
    return sigma, tangents[0] / (2 * sigma)


@checked("empty", shape=SHAPE)
def empty(shape: Sequence[int] = (), dtype: DTypeLike = jnp.float32) -> Moments:
    """The moments of no values at all: the identity of `merge`.

    Args:
      shape: The shape of each field.
      dtype: Their type, float32 or float64.
    """
    return Moments(*(jnp.zeros(shape, dtype) for _ in Moments._fields))


@checked("moments")
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
        `x.shape[:k]` for some k, or the rank of `x` with sizes 1 where it does not vary. Of any
        size: where the largest is beyond 1e±18 (float32) the count is in other units.
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
    w = align_weights("moments", weights, x)
    return partitioned(functools.partial(_moments, axes, algorithm), x, w)


def _moments(axes: tuple[int, ...], algorithm: Algorithm, x: Array, w: Array | None) -> Moments:
    count = count_values(x, axes, w)
    n = jnp.where(count > 0, count, 1)
    if w is not None:
        x = jnp.where(w > 0, x, jnp.zeros((), x.dtype))
    pivot = lax.stop_gradient(_pivot(x, axes, w, algorithm))
    first, second = power_sums(x, pivot, axes) if w is None else _weighted_sums(x, pivot, axes, w)
    offset = first / n
    mean = pivot + offset
    if algorithm == "one_pass":
        zero = jnp.zeros_like(pivot)
        _, second = power_sums(x, zero, axes) if w is None else _weighted_sums(x, zero, axes, w)
        offset = mean
    m2 = count * (second / n - jnp.square(offset))
    # Where rounding left less than nothing, the derivatives of every order must pass whole.
    return Moments(count, mean, lax.stop_gradient(jnp.maximum(m2, 0)) + derivative_of(m2))


def count_values(x: Array, axes: Sequence[int], w: Array | None) -> Array:
    """Σ w over `axes`, which stay with size 1; or the number of values, which may be symbolic."""
    dtype = promote_dtype(x)
    if w is None:
        n = math.prod(x.shape[i] for i in axes)
        return jnp.asarray(n).astype(dtype).reshape((1,) * x.ndim)
    repeats = math.prod(x.shape[i] for i in axes if w.shape[i] == 1)
    return jnp.asarray(repeats).astype(dtype) * w.sum(
        [i for i in axes if w.shape[i] != 1], keepdims=True
    )


def _pivot(x: Array, axes: tuple[int, ...], w: Array | None, algorithm: Algorithm) -> Array:
    """k, without a gradient: of a constant sample its value, wherever that is cheap."""
    if w is not None:
        return average(promote(x), axes, weights=w)[0]
    first = _first(x, axes)
    if algorithm == "one_pass" or 0 in x.shape:
        return first
    if algorithm == "shifted" or (algorithm == "auto" and x.ndim - 1 not in axes):
        # Every 16th slice along one axis (or the nearest divisor), not the first slices: where
        # the axis is sharded, each device has its share of them.
        step = {i: max((k for k in range(2, 17) if x.shape[i] % k == 0), default=1) for i in axes}
        axis = max(axes, key=lambda i: (step[i] >= 8, 0 < i < x.ndim - 1, step[i]), default=None)
        if axis is not None:
            split = (*x.shape[:axis], -1, step[axis], *x.shape[axis + 1 :])
            x = lax.index_in_dim(x.reshape(split), 0, axis + 1, keepdims=False)
    elif algorithm == "auto" and _short(math.prod(x.shape[i] for i in axes)):
        # XLA's CPU keeps this, both sums and what follows in one loop. What it is off by at a
        # constant is a whole number of units of the last place, so few that Σ (x − k) is exact.
        return average(promote(x), axes)[0]
    return first + average(promote(x) - first, axes)[0]


def _short(n: Any) -> bool:
    """Whether Σ (x − k) is exact for a constant of n values with any sum of them for k."""
    return isinstance(n, int) and n <= 4096


def _first(x: Array, axes: Sequence[int]) -> Array:
    """The first value of each sample; 0 for an empty one."""
    if 0 in x.shape:
        return jnp.zeros([1 if i in axes else n for i, n in enumerate(x.shape)], promote_dtype(x))
    ends = [1 if i in axes else n for i, n in enumerate(x.shape)]
    return promote(lax.slice(x, (0,) * x.ndim, ends))


def _weighted_sums(x: Array, pivot: Array, axes: Sequence[int], w: Array) -> tuple[Array, Array]:
    """Σ w·(x − k) and Σ w·(x − k)² over `axes`."""
    d = jnp.where(w > 0, promote(x) - pivot, 0)
    return (w * d).sum(axes, keepdims=True), (w * jnp.square(d)).sum(axes, keepdims=True)


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
    count = count_values(x, axes, w)
    total = (x if w is None else w * jnp.where(w > 0, x, 0)).sum(axes, keepdims=True)
    return total / jnp.where(count > 0, count, 1), count


@checked("merge")
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


@checked("merge_axes")
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
