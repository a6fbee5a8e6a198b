"""Moments of all devices along axes: one sum of 2C + 1 numbers each way, however many there are.

The moments of devices i with counts nᵢ, means μᵢ and squared deviations Mᵢ, merged about a *pivot*
k that all of them know, are

    N = Σ nᵢ        μ = k + Σ nᵢ·(μᵢ − k) / N        M = Σ Mᵢ + nᵢ·(μᵢ − k)² − N·(μ − k)²

They do not depend on k, but in floating point M loses log10(1 + (μ − k)²/var) digits. The pivot is
the running mean where all devices have the same, else 0. Where more than two digits are lost the
sums are taken again, about the mean that they gave: the result has the digits of Chan's rule.

The derivative is a sum over devices of what each knows, and so is its transpose:

    dμ = Σ nᵢ/N · dμᵢ + (μᵢ − μ)/N · dnᵢ        dM = Σ dMᵢ + 2·nᵢ·(μᵢ − μ)·dμᵢ + (μᵢ − μ)²·dnᵢ
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from normlab._arguments import KINDS, Kind, checked
from normlab.devices.mapped import check_bound, device_count, is_typed, vary, varying_axes
from normlab.devices.topology import AxisName, Second, as_sync
from normlab.errors import invalid
from normlab.measure import Moments

Tree = TypeVar("Tree")

LOST = 10.0
"""How many σ μ may be from k before the sums are taken again: two digits are lost."""

MOST = 8
"""How often they are taken again: each time leaves an ulp of what the pivot was off by."""


def _moments(value: Any) -> Any:
    for leaf in jax.tree.leaves(value, is_leaf=_is_moments):
        KINDS["p"].read(leaf)
    return value


def _is_moments(leaf: Any) -> bool:
    return isinstance(leaf, Moments)


@checked(
    "all_reduce",
    m=Kind(
        "moments, or a pytree of them", KINDS["p"].change, _moments, ("x", 3, [print], {"a": 1})
    ),
)
def all_reduce(m: Tree, axis_name: AxisName | None) -> Tree:
    """Merges the samples of all devices along named axes, each weighted by its count.

    One collective forward and one backward, in which each device puts in 2C + 1 numbers, whatever
    the number of devices and of moments; forward a second one where the mean is more than ten σ. A
    `Sync` says more: `second` whether it is to be, `staged=True` takes one for each axis.

    Args:
      m: This device's moments, or a pytree of such.
      axis_name: One mapped axis or several, or a `Sync` without groups; `None` returns `m`.

    Raises:
      ValueError: If an axis name is not bound where this is called.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from normlab import moments
    >>> mean = lambda x: all_reduce(moments(x, 0), "data").mean
    >>> jax.vmap(mean, axis_name="data")(jnp.array([[1.0, 3.0], [5.0, 7.0]])).tolist()
    [[4.0], [4.0]]
    """
    sync = as_sync(axis_name)
    if not sync.whole:
        raise invalid(
            "all_reduce", "a Sync with groups", "one that merges all", "name the axes alone"
        )
    check_bound("all_reduce", sync.names)
    each, structure = jax.tree.flatten(m, is_leaf=_is_moments)
    if not each:
        return m
    merged, _ = merge_whole(each, sync.stages, second=sync.second)
    return jax.tree.unflatten(structure, merged)


def merge_whole(
    each: Sequence[Moments],
    stages: Sequence[tuple[str, ...]],
    *,
    extra: Array | None = None,
    pivots: Sequence[Array | None] | None = None,
    second: Second = "when_needed",
) -> tuple[list[Moments], Array | None]:
    """`all_reduce`, and the sum of `extra`, which travels along.

    Args:
      each: This device's moments.
      stages: The axes to merge over, one collective after the other.
      extra: Any numbers, not differentiated; or `None`.
      pivots: Of the size of each mean, close to what the merged one will be; `None` for 0.
      second: `Sync.second`.
    """
    pivots = [None] * len(each) if pivots is None else pivots
    # Of the rank of the mean: what travels as a vector comes back so.
    ranks = [m.mean.ndim - m.count.ndim for m in each]
    ms = [
        m._replace(count=m.count.reshape((1,) * rank + m.count.shape))
        for m, rank in zip(each, ranks, strict=True)
    ]
    for names in filter(None, stages):
        known = [known_pivot(k, m, names) for k, m in zip(pivots, ms, strict=True)]
        constant, extra = lax.stop_gradient((ms, extra))
        values, extra = _merge(constant, names, known, extra, second)
        ms = _merged(ms, values, names, is_typed(names))
    return ms, extra


def known_pivot(k: Array | None, m: Moments, names: tuple[str, ...]) -> Array | None:
    """A pivot in the form of the mean, unless its type says that devices have others."""
    if k is None or (is_typed(names) and varying_axes(k) & {*names}):
        return None
    k = lax.stop_gradient(k).reshape(m.mean.shape).astype(m.mean.dtype)
    return jnp.where(jnp.isfinite(k), k, 0)


class _Sums(NamedTuple):
    """What the sums about pivots gave, the same on all devices.

    Attributes:
      merged: The moments.
      lost: `[]` bool, whether some of them lost more than two digits.
    """

    merged: list[Moments]
    lost: Array


def _merge(
    ms: list[Moments],
    names: tuple[str, ...],
    pivots: list[Array | None],
    extra: Array | None,
    second: Second,
) -> tuple[list[Moments], Array | None]:
    given = [k for k in pivots if k is not None]
    seen = None
    if given and not is_typed(names):
        # Nothing says that all devices have the same pivots: they compare.
        if second == "always":
            pivots = [None] * len(ms)
        else:
            seen = _fingerprint(given, device_count(names))
    sums, found = _about(pivots, ms, names, [extra, seen])
    extra = found[0]
    if second == "always":
        return _about([m.mean for m in sums.merged], ms, names, [])[0].merged, extra
    told = found[1]
    alike = jnp.bool_(True) if told is None else _alike(told, device_count(names))
    if second == "never":
        return jax.tree.map(lambda v: jnp.where(alike, v, jnp.nan), sums.merged), extra

    def go_on(carry: Any) -> Array:
        times, _, sums = carry
        return sums.lost & (times < MOST)

    def again(carry: Any) -> Any:
        times, alike, sums = carry
        # Sums about different pivots say nothing.
        means = [jnp.where(alike, m.mean, 0) for m in sums.merged]
        return times + 1, alike | True, _about(means, ms, names, [])[0]

    sums = sums._replace(lost=sums.lost | ~alike)
    alike = alike | jnp.zeros_like(sums.lost)  # of its type
    return lax.while_loop(go_on, again, (0, alike, sums))[2].merged, extra


def _about(
    pivots: Sequence[Array | None],
    ms: list[Moments],
    names: tuple[str, ...],
    extra: list[Array | None],
) -> tuple[_Sums, list[Array | None]]:
    """The moments of all devices about pivots: one collective."""
    moved = []
    for m, k in zip(ms, pivots, strict=True):
        d = m.mean if k is None else m.mean - k
        first = m.count * d
        moved.append(m._replace(mean=first, m2=m.m2 + m.product(first, d)))
    summed, found = unpack(lax.psum(vary(pack(moved, extra), names), names), ms, extra)
    merged, lost = [], []
    for m, k in zip(summed, pivots, strict=True):
        delta = m.mean / jnp.where(m.count > 0, m.count, 1)
        mean = delta if k is None else jnp.where(m.count > 0, k + delta, 0)
        m2 = m.m2 - m.count * m.product(delta, delta)
        one = m._replace(mean=mean, m2=jnp.maximum(m2, 0) if type(m) is Moments else m2)
        merged.append(one)
        lost.append((~(away(one, delta) <= LOST)).any())
    return _Sums(merged, functools.reduce(jnp.logical_or, lost)), found


def away(m: Moments, delta: Array) -> Array:
    """|δ|/σ of δ = μ − k: log10 of 1 + its square is how many digits sums about k lose.

    0 where δ is a rounding of μ, for there var has no digit more, and where δ is not finite;
    infinite, or NaN, where of the variance nothing is left.
    """
    root = math.sqrt(jnp.finfo(delta.dtype).eps)
    far = jnp.isfinite(delta) & (jnp.abs(delta) > root * jnp.abs(m.mean))
    sigma = jnp.sqrt(m.squares / jnp.where(m.count > 0, m.count, 1))
    ratio = jnp.abs(delta) / jnp.where(sigma == 0, 1, sigma)
    return jnp.where(far, jnp.where(sigma == 0, jnp.inf, ratio), 0)


def _fingerprint(pivots: list[Array], devices: int) -> Array:
    """Small whole numbers made of the pivots' bits, and their squares: their sums are exact."""
    bits = [lax.bitcast_convert_type(k, jnp.uint32).ravel() for k in pivots]
    v = jnp.concatenate(bits)
    odd = 2 * jnp.arange(v.size, dtype=jnp.uint32) + 1
    v = (v * odd * jnp.uint32(0x9E3779B1)).sum(dtype=jnp.uint32)
    v = (v ^ (v >> 15)) * jnp.uint32(0x2C1B3C6D)
    v = v ^ (v >> 12)
    limit = max(2, math.isqrt(2**24 // devices))  # the sum of squares is exact in float32
    number = math.ceil(_BITS / math.log2(limit))
    parts = jnp.stack([v // limit**k % limit for k in range(number)]).astype(pivots[0].dtype)
    return jnp.concatenate([parts, jnp.square(parts)])


_BITS = 20
"""Of a fingerprint: of a million different pivots one is taken for the same."""


def _alike(sums: Array, devices: int) -> Array:
    """Whether whole numbers are the same everywhere: Σ v² is the smallest for the mean there is."""
    mean, squares = jnp.split(sums, 2)
    mean = mean / devices
    return ((mean == jnp.round(mean)) & (squares == devices * jnp.square(mean))).all()


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _merged(
    ms: list[Moments], values: list[Moments], names: tuple[str, ...], typed: bool
) -> list[Moments]:
    """What the devices' `ms` were merged to, which is `values`; with the derivatives by `ms`."""
    del ms, names, typed
    return values


@_merged.defjvp
def _(names: tuple[str, ...], typed: bool, primals: Any, tangents: Any) -> Any:
    (ms, values), (dms, _) = primals, tangents
    merged = _merged(ms, values, names, typed)
    local = []
    for m, whole, dm in zip(ms, merged, dms, strict=True):
        share = 1 / jnp.where(whole.count > 0, whole.count, 1)
        delta = m.mean - whole.mean
        moved = m.count * dm.mean
        mean = (moved + delta * dm.count) * share
        m2 = dm.m2 + m.product(moved, delta) + m.product(delta, moved + delta * dm.count)
        local.append(type(m)(dm.count, mean, m2))
    # Of collectives, vmap knows no other here.
    packed = pack(local, [])
    return merged, unpack(lax.psum(vary(packed, names) if typed else packed, names), ms, [])[0]


def without(whole: Moments, own: Moments) -> Moments:
    """What is left of merged moments without a part of them: undoes `merge`."""
    count = whole.count - own.count
    there = count > 0
    n = jnp.where(there, count, 1)
    delta = own.mean - whole.mean
    m2 = whole.m2 - own.m2 - whole.product(delta, delta) * own.count * whole.count / n
    mean = jnp.where(there, whole.mean - delta * own.count / n, 0)
    m2 = jnp.where(there, jnp.maximum(m2, 0) if type(own) is Moments else m2, 0)
    return type(own)(jnp.where(there, count, 0), mean, m2)


def pack(ms: Sequence[Moments], extra: Sequence[Array | None] = ()) -> Array:
    """The fields as one vector, 2C + 1 numbers of each if its channels have one count; and more."""
    fields = [field for m in ms for field in (m.mean, m.m2, m.count)]
    fields += [v for v in extra if v is not None]
    return jnp.concatenate([field.ravel() for field in fields])


def unpack(
    v: Array, like: Sequence[Moments], extra: Sequence[Array | None] = ()
) -> tuple[list[Moments], list[Array | None]]:
    """Undoes `pack`, for vectors `[..., 2C + 1]`."""
    fields = [field for m in like for field in (m.mean, m.m2, m.count)]
    fields += [more for more in extra if more is not None]
    ends = list(itertools.accumulate(field.size for field in fields))
    parts = iter(jnp.split(v, ends[:-1], axis=-1))

    def taken(field: Array) -> Array:
        return next(parts).reshape(*v.shape[:-1], *field.shape)

    ms = []
    for m in like:
        mean, m2, count = (taken(field) for field in (m.mean, m.m2, m.count))
        ms.append(type(m)(count, mean, m2))
    return ms, [None if more is None else taken(more) for more in extra]
