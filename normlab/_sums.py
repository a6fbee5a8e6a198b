"""How the sums of moments are taken: about which pivot, in which order, with which roundings.

The moments themselves are defined in `normlab.measure`; nothing here changes what they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from normlab._checks import promote, promote_dtype
from normlab._weights import align_weights
from normlab._xla import apart, widen, zeros_of


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


def pivot_of(x: Array, axes: tuple[int, ...], w: Array | None, algorithm: str) -> Array:
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


def near_zero(x: Array, axes: tuple[int, ...], w: Array | None, algorithm: str) -> bool:
    """Whether the sums may be those about 0, if they tell that they lost nothing to speak of.

    Of channels over many examples, and over the innermost axis. Among fewer values a mean is often
    far from 0 by chance; and over the positions alone, as where an example is of one colour.
    """
    n = math.prod(x.shape[i] for i in axes)
    ours = 0 in axes or x.ndim - 1 in axes
    return w is None and algorithm == "auto" and ours and isinstance(n, int) and n in _NEAR_ZERO


_NEAR_ZERO = range(2**5, 2**17 + 1)
"""Of how many values sums about 0 are faster, and their mean is right to two units."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def sums_near_zero(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Returns k, Σ (x − k) and Σ (x − k)² over `axes`; k has no derivative.

    On a CPU about 0, and where a channel lost more than log10(17) digits, mean² > 16·var, about
    `pivot_of`. There x alone is summed faster than a difference, and a pivot costs as much as a
    sum. Elsewhere about `pivot_of`: a condition can cost an accelerator more than a sample does.
    """
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_about_zero, axes=axes),
        default=functools.partial(_about_pivot, axes=axes),
    )


def _about_pivot(
    x: Array, axes: tuple[int, ...], algorithm: str = "auto"
) -> tuple[Array, Array, Array]:
    pivot = pivot_of(x, axes, None, algorithm)
    return pivot, *power_sums(x, pivot, axes)


def _about_zero(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    n = math.prod(x.shape[i] for i in axes)
    (x1,) = apart(x)
    (x2,) = apart(x1)
    first = promote(x1).sum(axes, keepdims=True)
    second = jnp.square(promote(x2)).sum(axes, keepdims=True)
    square = jnp.square(first / n)
    var = second / n - square
    kept = ((square < 16 * var) & (var < jnp.inf)) | (first == 0)
    sums = zeros_of(first), first, second

    def again(carry: Any) -> Any:
        # A sample that lost nothing keeps its sums, so that it does not depend on the others.
        about = _about_pivot(x, axes, "shifted")
        return carry[0] & False, [jnp.where(kept, v, u) for v, u in zip(sums, about, strict=True)]

    # A loop and no conditional: under vmap that runs where one lane needs it, not always.
    lost = jnp.where(kept, 0, jnp.ones((), first.dtype)).sum() > 0  # a sum of numbers is faster
    return tuple(lax.while_loop(lambda carry: carry[0], again, (lost, list(sums)))[1])


@sums_near_zero.defjvp
def _(axes: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    sums = sums_near_zero(x, axes)
    d, dd = promote(x) - sums[0], promote(dx)
    first, second = dd.sum(axes, keepdims=True), 2 * (d * dd).sum(axes, keepdims=True)
    return sums, (zeros_of(sums[0]), first, second)


def weighted_sums(x: Array, pivot: Array, axes: Sequence[int], w: Array) -> tuple[Array, Array]:
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


@jax.custom_jvp
def squared(x: Array) -> Array:
    """x² in the statistics' type; the derivative converts x for itself."""
    return jnp.square(promote(x))


@squared.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    (x1,) = apart(x)
    return squared(x), 2 * promote(x1) * promote(dx)


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
