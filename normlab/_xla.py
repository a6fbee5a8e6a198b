"""What the compiler has to be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def partitioned(
    f: Callable[..., Tree], a: Array, *others: Any, mesh: AbstractMesh | None = None
) -> Tree:
    """Returns `f(a, *others)`; where the types of arrays say how they are sharded, left to XLA.

    With a mesh of explicit axes JAX wants to know of every slice and reshape what becomes of the
    sharding. Here it does not matter: a result is sharded as `a` is, on the axes that it shares.

    Args:
      f: Returns arrays that broadcast to `a`, or trees of them.
      a: An array.
      *others: Other arrays, or trees of them.
      mesh: One that `f` maps over; `None` for that of the arrays, if one of them is sharded.
    """
    shardings = [jax.typeof(v).sharding for v in jax.tree.leaves((a, others))]
    meshes = [s.mesh for s in shardings if any(s.spec)] if mesh is None else [mesh]
    mesh = next((m for m in meshes if m.explicit_axes), None)
    if mesh is None:
        return f(a, *others)

    def like_a(v: Any) -> NamedSharding:
        more = max(v.ndim - a.ndim, 0)  # axes of groups of channels: what it shares comes first
        own = slice(0 if more else a.ndim - v.ndim, None)
        shape, spec = (*a.shape[own], *[1] * more), (*shardings[0].spec[own], *[None] * more)
        kept = zip(v.shape, shape, spec, strict=True)
        return NamedSharding(mesh, PartitionSpec(*(s if n == m != 1 else None for n, m, s in kept)))

    def run(out: Any) -> Any:
        return jax.sharding.auto_axes(f, axes=mesh.explicit_axes, out_sharding=out)

    shapes = jax.eval_shape(run(NamedSharding(mesh, PartitionSpec())), a, *others)
    return run(jax.tree.map(like_a, shapes))(a, *others)


def sharded_as(tree: Tree, channel: int, v: Array) -> Tree:
    """Arrays, sharded on the axis `channel` as `v` is on its last, where types say so."""

    def one(f: Array) -> Array:
        mesh = jax.typeof(f).sharding.mesh
        if not mesh.explicit_axes:
            return f
        spec = [None] * f.ndim
        spec[channel] = jax.typeof(v).sharding.spec[-1] if f.shape[channel] != 1 else None
        return jax.sharding.reshard(f, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(one, tree)


@jax.custom_jvp
def apart(*arrays: Array) -> tuple[Array, ...]:
    """Returns the arrays, as values that XLA on a CPU does not know to be the same.

    Two sums over the same elementwise expression of one array would share that expression, and so
    keep it in memory: slower than computing it twice. Written on arrays taken apart, each sum reads
    its input once and keeps nothing. On accelerators, where XLA fuses such sums into one pass, this
    is the identity; to derivatives it is everywhere.
    """
    return lax.platform_dependent(*arrays, cpu=_barrier, default=_identity)


@apart.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return apart(*primals), tangents


def _barrier(*arrays: Array) -> tuple[Array, ...]:
    return lax.optimization_barrier(arrays)


def _identity(*arrays: Array) -> tuple[Array, ...]:
    return arrays


def zeros_of(v: Array) -> Array:
    """Zeros like `v`, and varying over the same mapped axes; `v` itself is not computed."""
    return jnp.where(jnp.zeros((), bool), v, jnp.zeros((), v.dtype))


@jax.custom_jvp
def derivative_of(v: Array) -> Array:
    """Zero, with the derivatives of `v`: v − (the value of v), of which nothing is computed."""
    return zeros_of(v)


@derivative_of.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return derivative_of(*primals), tangents[0]


class Wide(NamedTuple):
    """`[lead, positions, C]` seen as `[lead, positions / factor, factor · C]`.

    XLA's CPU sums over the positions of each example in rows of C values; that is slow where C is
    small, and rows of `factor` positions are faster. On accelerators nothing is widened.
    """

    lead: int
    rows: int
    factor: int
    channels: int

    def array(self, x: Array) -> Array:
        """Widens an array of the whole shape: `[lead, rows, factor · C]`."""
        return x.reshape(self.lead, self.rows, self.factor * self.channels)

    def statistic(self, v: Array) -> Array:
        """Repeats a statistic, one value per lead and channel: `[lead, 1, factor · C]`."""
        v = v.reshape(self.lead, 1, self.channels)
        v = jnp.broadcast_to(v, (self.lead, self.factor, self.channels))
        return v.reshape(self.lead, 1, self.factor * self.channels)

    def total(self, v: Array, shape: Sequence[int]) -> Array:
        """Adds up what `statistic` repeats, and returns it in `shape`."""
        return v.reshape(self.lead, self.factor, self.channels).sum(1).reshape(shape)


def widen(shape: Sequence[int], axes: Sequence[int]) -> Wide | None:
    """Returns how to widen sums over `axes`; `None` where there is nothing to gain.

    They are widened where the axes are the positions: all but the first axes and the last. The
    program is taken to be for the default backend.
    """
    first, last = min(axes, default=0), len(shape) - 2
    if jax.default_backend() != "cpu" or first == 0 or list(axes) != list(range(first, last + 1)):
        return None
    positions, channels = math.prod(shape[first:-1]), shape[-1]
    known = isinstance(positions, int) and isinstance(channels, int)  # and not symbolic
    if not known or not positions or not channels:
        return None
    factors = range(1, min(_ROW // channels, positions // 8) + 1)
    factor = max((k for k in factors if positions % k == 0), default=1)
    if factor == 1:
        return None
    return Wide(math.prod(shape[:first]), positions // factor, factor, channels)


_ROW = 2048  # values: past it nothing more is gained
