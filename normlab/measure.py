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
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normlab._arguments import checked, declare, flag, instance, integer, one_of, sequence
from normlab._checks import floating, normalize_axes
from normlab._sums import (
    count_values,
    innermost,
    near_zero,
    pivot_of,
    power_sums,
    standard_deviation,
    sums_innermost,
    sums_near_zero,
    weighted_sums,
)
from normlab._trees import node
from normlab._weights import align_weights, effective_sample_size
from normlab._xla import derivative_of, partitioned
from normlab.errors import invalid

__all__ = [
    "Algorithm",
    "Moments",
    "effective_sample_size",
    "empty",
    "merge",
    "merge_axes",
    "moments",
]

Algorithm = Literal["auto", "shifted", "two_pass", "one_pass"]
"""About which pivot the moments are taken.

`"two_pass"`: the mean, from a pass of its own. `"shifted"`: the mean of a sixteenth of the values;
their distance from the mean is part of the variance, so at most log10(17) digits are lost at any
mean. `"one_pass"`: 0, that is E[x²] − E[x]², which loses log10(1 + mean²/var) digits. `"auto"`:
`"shifted"`; over the innermost axis, where XLA makes one loop of it, the mean as XLA sums it; on a
CPU, over up to 131,072 values, 0 where all means are within 4σ: log10(17) digits, too.
Weighted moments know no sixteenth: there `"shifted"` is two passes.

With all of them the mean is corrected by Σ (x − k), or taken about the first value, or within 4σ of
0: it is right to two units in its last place, and the mean of a constant is that constant, so that
h is b.
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

    >>> m = moments(jnp.array([1.0, 3.0, 5.0]), 0)
    >>> m.count.tolist(), m.mean.tolist(), m.m2.tolist()
    ([3.0], [3.0], [8.0])
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array
    m2: Array

    @staticmethod
    def product(u: Array, v: Array) -> Array:
        """What two deviations add to m2: their product, channel by channel."""
        return u * v

    @staticmethod
    def measured(
        x: Array,
        axes: Sequence[int],
        *,
        weights: Array | None = None,
        algorithm: Algorithm = "auto",
    ) -> Moments:
        """The moments of this kind of an array that is laid out as the mean is."""
        return moments(x, axes, weights=weights, algorithm=algorithm)

    @property
    def squares(self) -> Array:
        """The squared deviations of each channel, in the shape of the mean: m2."""
        return self.m2

    def one(self) -> Array:
        """The variance that stands for none: 1."""
        return jnp.ones((), self.m2.dtype)

    def var(self, ddof: float = 0) -> Array:
        """The variance m2 / (count − ddof); zero where the count does not exceed `ddof`."""
        dof = self.count - ddof
        return jnp.where(dof > 0, self.m2 / jnp.where(dof > 0, dof, 1), 0)

    def sigma(self, eps: float) -> Array:
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


@checked("empty", shape=SHAPE)
def empty(shape: Sequence[int] = (), dtype: DTypeLike = jnp.float32) -> Moments:
    """The moments of no values at all: the identity of `merge`.

    Args:
      shape: The shape of each field.
      dtype: Their type, float32 or float64.

    >>> m = moments(jnp.array([1.0, 3.0]), 0)
    >>> merge(m, empty()).mean.tolist()
    [2.0]
    """
    return Moments(*(jnp.zeros(shape, dtype) for _ in Moments._fields))


@checked("moments", _whole=flag())
def moments(
    x: ArrayLike,
    axes: int | Sequence[int],
    *,
    weights: ArrayLike | None = None,
    algorithm: Algorithm = "auto",
    _whole: bool = False,
) -> Moments:
    """Measures the moments of `x` over `axes`.

    Values of weight zero are left out, whatever they are: a NaN there reaches neither the moments
    nor their gradient. Values are squared: in float32 deviations beyond 1e19 overflow. Norms that
    apply the moments at once, on one device, say so (`_whole`).

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
    return partitioned(functools.partial(_moments, axes, algorithm, _whole), x, w)


def _moments(
    axes: tuple[int, ...], algorithm: Algorithm, whole: bool, x: Array, w: Array | None
) -> Moments:
    count = count_values(x, axes, w)
    n = jnp.where(count > 0, count, 1)
    if w is not None:
        x = jnp.where(w > 0, x, jnp.zeros((), x.dtype))
    if innermost(x, axes, w, algorithm):
        pivot, first, second = sums_innermost(x, axes, whole)
    elif near_zero(x, axes, w, algorithm):
        pivot, first, second = sums_near_zero(x, axes)
    else:
        pivot = lax.stop_gradient(pivot_of(x, axes, w, algorithm))
        about = x, pivot, axes
        first, second = power_sums(*about) if w is None else weighted_sums(*about, w)
    if algorithm == "one_pass":
        mean, zero = pivot + first / n, jnp.zeros_like(pivot)
        _, second = power_sums(x, zero, axes) if w is None else weighted_sums(x, zero, axes, w)
        # n times the mean, divided by n, would not be the mean of a constant any more.
        return from_sums(count, zero, mean * n, second)._replace(mean=mean)
    return from_sums(count, pivot, first, second)


def from_sums(count: Array, pivot: Array, first: Array, second: Array) -> Moments:
    """The moments of Σ w, k, Σ w·(x − k) and Σ w·(x − k)²."""
    n = jnp.where(count > 0, count, 1)
    offset = first / n
    m2 = count * (second / n - jnp.square(offset))
    # Where rounding left less than nothing, the derivatives of every order must pass whole.
    m2 = lax.stop_gradient(jnp.maximum(m2, 0)) + derivative_of(m2)
    return Moments(count, pivot + offset, m2)


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
    if type(p) is not type(q):
        given = f"{type(p).__name__} and {type(q).__name__}"
        raise invalid("merge", given, "two of one kind", "measure both with the same function")
    count = p.count + q.count
    share = q.count / jnp.where(count > 0, count, 1)
    delta = q.mean - p.mean
    between = p.product(delta, delta) * p.count * share
    return type(p)(count, p.mean + delta * share, p.m2 + q.m2 + between)


@checked("merge_axes")
def merge_axes(m: Moments, axes: int | Sequence[int]) -> Moments:
    """Merges the samples along array axes: `m2` within them plus `m2` between their means.

    Args:
      m: Moments of many samples, one per position along `axes`.
      axes: Axes of `m.mean`; they stay, with size 1.

    >>> m = moments(jnp.array([[1.0, 3.0], [5.0, 7.0]]), 0)
    >>> m = merge_axes(m, 1)
    >>> m.count.tolist(), m.mean.tolist()
    ([[4.0]], [[4.0]])
    """
    axes = normalize_axes("merge_axes", axes, m.mean.ndim)
    count = jnp.broadcast_to(m.count, m.mean.shape)
    between = m.measured(m.mean, axes, weights=count)
    return between._replace(m2=between.m2 + m.m2.sum(axes, keepdims=True))
