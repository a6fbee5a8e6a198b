"""Moments of more than one device: one small collective each way.

The merged moments of devices i with counts nᵢ, means μᵢ and squared deviations Mᵢ are

    N = Σ nᵢ        μ = Σ nᵢ·μᵢ / N        M = Σ Mᵢ + Σ nᵢ·(μᵢ − μ)²

Forward, the devices gather each other's packed (μᵢ, Mᵢ, nᵢ), 2C + 1 numbers, and merge them: no
digit is lost to a large mean, as it is in sums of x and x². Where all devices are one batch, the
derivative is a sum over devices of what each knows, and so is its transpose:

    dμ = Σ nᵢ/N · dμᵢ + (μᵢ − μ)/N · dnᵢ        dM = Σ dMᵢ + 2·nᵢ·(μᵢ − μ)·dμᵢ + (μᵢ − μ)²·dnᵢ
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from normlab._arguments import checked
from normlab._checks import promote
from normlab._segments import moments_of_segments, segment_totals
from normlab._sums import count_values
from normlab._xla import derivative_of, partitioned
from normlab.devices.topology import AxisName, Plan, Sync, as_sync, plan
from normlab.errors import invalid
from normlab.measure import Algorithm, Moments, merge_axes, moments

Tree = TypeVar("Tree")


def measure(
    where: str,
    a: Array,
    axes: Sequence[int],
    sync: Sync,
    *,
    weights: Array | None = None,
    algorithm: Algorithm = "auto",
    least: int = 1,
    of: Callable[..., Moments] = moments,
) -> tuple[Moments, Moments]:
    """Measures `a` over `axes`, and over the devices and parts of the batch that `sync` names.

    Args:
      where: The caller, for errors.
      a: `[N, ...]`, with the examples first.
      axes: Non-negative axes, the examples' among them.
      sync: What is merged.
      weights: As `align_weights` returns them.
      algorithm: As in `moments`.
      least: A population of fewer values with a weight than this counts as empty.
      of: `moments`, or what else measures an array over axes with weights.

    Returns:
      `(m, population)`: the moments that normalize `a`, of leading size 1 or N, and those of all
      the examples along the axes. They are the same where `sync.whole`.
    """
    of = functools.partial(of, algorithm=algorithm) if of is moments else of
    run = functools.partial(_measure, where, tuple(axes), sync, of, least)
    if not sync.names or is_bound(sync.names):
        return partitioned(run, a, weights)
    # Plain jit: the same, in a shard_map over the mesh's axes.
    layout(where, sync, a.shape[0])  # says so where there is no such axis
    split, alike = PartitionSpec(sync.names), PartitionSpec()
    by_example = weights is not None and weights.shape[0] != 1
    same = sync.whole and sync.gradient in ("both", "none")  # or its derivative is the device's own

    def body(a: Array, w: Array | None) -> tuple[Moments, Moments]:
        m, population = partitioned(run, a, w)
        if not same:
            m = jax.tree.map(lambda f: jnp.broadcast_to(f, (a.shape[0], *f.shape[1:])), m)
            m = vary(m, sync.names)
        return m, population

    given = jax.sharding.get_abstract_mesh() if sync.mesh is None else sync.mesh
    mesh = given.abstract_mesh
    mapped = jax.shard_map(
        body,
        mesh=None if mesh.explicit_axes else sync.mesh,  # there `partitioned` has one of its own
        in_specs=(split, split if by_example else alike),
        out_specs=(alike if same else split, alike),
        axis_names=set(sync.names),
    )
    return partitioned(mapped, a, weights, mesh=mesh)


def measure_segments(
    a: Array,
    axes: Sequence[int],
    sync: Sync,
    ids: Array,
    segments: int,
    *,
    weights: Array | None = None,
    least: int = 1,
) -> tuple[Moments, Moments]:
    """What `measure` returns for the examples of each id alone, `[segments, ...]`.

    In one pass over `a`, whatever their number. The devices' axes are bound, and all of them are
    one batch.
    """
    (kept,) = {*range(a.ndim)} - {*axes}

    def run(a: Array, w: Array | None, ids: Array) -> Any:
        x = jnp.moveaxis(promote(a), kept, -1)
        v = jnp.ones((), x.dtype) if w is None else jnp.moveaxis(w, kept, -1)
        rows = (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
        x, v = x.reshape(rows), jnp.broadcast_to(v, x.shape).reshape(rows)
        local = moments_of_segments(x, v, ids, segments)
        values = segment_totals(ids, segments, (v > 0).astype(x.dtype).sum(1))[0]
        if w is None or w.shape[kept] == 1:
            local, values = local._replace(count=local.count[:, :1]), values[:, :1]
        population, number = jax.vmap(lambda m, n: _all_reduce(m, sync, n))(local, values)
        m = differentiated(sync, local, population)
        count = jnp.where(jnp.asarray(number) < least, 0, population.count.reshape(values.shape))
        population = population._replace(count=count)
        shape = [-1 if i == kept else 1 for i in range(a.ndim)]
        m = m._replace(count=m.count.reshape(count.shape))
        return [
            jax.tree.map(lambda f, i=i: f[i].reshape(shape), (m, population))
            for i in range(segments)
        ]

    each = partitioned(run, a, weights, ids)
    return jax.tree.map(lambda *fields: jnp.stack(fields), *each)


def _measure(
    where: str,
    axes: tuple[int, ...],
    sync: Sync,
    of: Callable[..., Moments],
    least: int,
    a: Array,
    w: Array | None,
) -> tuple[Moments, Moments]:
    values = None  # those with a weight; without weights their number is known
    if w is not None and least > 1:
        values = count_values(a, axes, (w > 0).astype(w.dtype))
    if sync.whole:
        local = of(a, axes, weights=w)
        population, values = _all_reduce(local, sync, values)
        m = differentiated(sync, local, population)
    else:
        m, population, values = _measure_parts(where, axes, sync, of, a, w, values)
    if values is not None:
        count = jnp.where(values < least, 0, population.count)
        population = population._replace(count=count)
    return m, population


def _measure_parts(
    where: str,
    axes: tuple[int, ...],
    sync: Sync,
    of: Callable[..., Moments],
    a: Array,
    w: Array | None,
    values: Array | None,
) -> tuple[Moments, Moments, Array | None]:
    devices, examples = _size(sync.names), a.shape[0]
    cut = plan(where, sync, devices, examples)
    a = a.reshape(cut.shards, -1, *a.shape[1:])
    if w is not None and w.shape[0] == 1:
        w = jnp.broadcast_to(w[None], (cut.shards, *w.shape))
    elif w is not None:
        w = w.reshape(cut.shards, -1, *w.shape[1:])
    local = of(a, [i + 1 for i in axes], weights=w)
    count = jnp.broadcast_to(local.count, (cut.shards, *local.count.shape[1:]))
    local = jax.tree.map(lambda f: f[:, 0], local._replace(count=count))
    merged, population, values = _merge(local, cut, sync.names, values)
    chosen = differentiated(sync, local, merged)
    m = jax.tree.map(lambda f: jnp.repeat(f, examples // cut.shards, axis=0), chosen)
    return m, population, values


def _merge(
    local: Moments, cut: Plan, names: tuple[str, ...], values: Array | None
) -> tuple[Moments, Moments, Array | None]:
    """Of `local [shards, ...]`, each shard merged with its members, and all of all devices."""
    shards = local.mean.shape[0]
    if cut.members is None:
        # Every block is on one device: nothing is asked of the others but the population.
        blocks = jax.tree.map(lambda f: f.reshape(-1, cut.block, *f.shape[1:]), local)
        blocks = jax.tree.map(lambda f: f[:, 0], merge_axes(blocks, 1))
        own = merge_axes(blocks, 0)
        population, values = _all_reduce(own, Sync(names), values)
        blocks = jax.tree.map(lambda f: jnp.repeat(f, cut.block, axis=0), blocks)
        return blocks, population, values
    table = pack(local, values)
    table = _gather(table, names) if names else table[None]
    everything, each = unpack(table, local, values)
    population = merge_axes(jax.tree.map(_flat, everything), 0)
    table = vary(table, names)  # at once, so that its cotangents are added up at once
    everything = jax.tree.map(_flat, unpack(table, local, values)[0])
    rows = jnp.asarray(cut.members)
    if names:
        rows = lax.dynamic_slice_in_dim(rows, lax.axis_index(names) * shards, shards)
    return merge_members(everything, rows), population, None if each is None else each.sum(0)


def gather(m: Moments, names: tuple[str, ...]) -> Moments:
    """The moments of every device, fields `[D, ...]`: one collective."""
    return unpack(_gather(pack(m), names), m)[0]


def gather_members(
    each: list[Moments], members: np.ndarray, names: tuple[str, ...]
) -> list[Moments]:
    """The merged moments of those devices that this one's row of `members [D, D]` names."""
    packed = [pack(m) for m in each]
    table = _gather(jnp.concatenate(packed), names)
    tables = jnp.split(table, np.cumsum([v.size for v in packed])[:-1], axis=-1)
    row = lax.dynamic_slice_in_dim(jnp.asarray(members), lax.axis_index(names), 1)
    everything = (unpack(v, m)[0] for v, m in zip(tables, each, strict=True))
    return [jax.tree.map(lambda f: f[0], merge_members(m, row)) for m in everything]


def merge_members(m: Moments, members: Array) -> Moments:
    """Of fields `[S, ...]` and `members [rows, S]`, what each row names, merged: `[rows, ...]`."""
    count = jnp.broadcast_to(m.count, m.mean.shape)
    chosen = members.reshape(*members.shape, *(1,) * (m.mean.ndim - 1))
    shape = (*members.shape, *m.mean.shape[1:])
    within = jnp.where(chosen, m.m2, 0).sum(1)
    mean = jnp.broadcast_to(m.mean, shape)
    between = m.measured(mean, (1,), weights=jnp.where(chosen, count, 0))
    return type(m)(between.count[:, 0], between.mean[:, 0], between.m2[:, 0] + within)


def differentiated(sync: Sync, local: Moments, merged: Moments) -> Moments:
    """The moments with the value and the derivative that `sync.gradient` asks for.

    `local` are this device's own, `merged` the same with those of others.
    """
    if sync.gradient == "both":
        return merged
    value = lax.stop_gradient(local if sync.gradient == "backward" else merged)
    if sync.gradient == "none":
        return value
    source = merged if sync.gradient == "backward" else local
    mean = value.mean + derivative_of(source.mean)
    return value._replace(mean=mean, m2=value.m2 + value.count * derivative_of(source.var()))


@checked("all_reduce")
def all_reduce(m: Moments, axis_name: AxisName | None) -> Moments:
    """Merges the samples of all devices along named axes, each weighted by its count.

    One collective forward, in which a device gathers 2C + 1 numbers from each; one backward, in
    which 2C + 1 are summed. A `Sync` with `staged=True` takes one for each axis.

    Args:
      m: This device's moments.
      axis_name: One mapped axis or several, or a `Sync` without groups; `None` returns `m`.

    Raises:
      ValueError: If an axis name is not bound where this is called.
    """
    sync = as_sync(axis_name)
    if not sync.whole:
        raise invalid(
            "all_reduce", "a Sync with groups", "one that merges all", "name the axes alone"
        )
    check_bound("all_reduce", sync.names)
    return _all_reduce(m, sync, None)[0]


def _all_reduce(m: Moments, sync: Sync, values: Array | None) -> tuple[Moments, Array | None]:
    """`all_reduce`, and the sum of `values`, of the shape of the counts, which travels along."""
    rank = m.mean.ndim - m.count.ndim
    m = m._replace(count=m.count.reshape((1,) * rank + m.count.shape))
    for names in [(name,) for name in reversed(sync.names)] if sync.staged else [sync.names]:
        if names:
            everything, each = unpack(_gather(pack(lax.stop_gradient(m), values), names), m, values)
            values = None if each is None else each.sum(0)
            merged = merge_axes(everything, 0)
            value = type(m)(everything.count.sum(0), merged.mean[0], merged.m2[0])
            m = _merged(m, value, names, is_typed(names))
    return m, values


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _merged(m: Moments, value: Moments, names: tuple[str, ...], typed: bool) -> Moments:
    """What the devices' `m` were merged to, which is `value`; with the derivatives by `m`."""
    del m, names, typed
    return value


@_merged.defjvp
def _(names: tuple[str, ...], typed: bool, primals: Any, tangents: Any) -> Any:
    (m, value), (dm, _) = primals, tangents
    merged = _merged(m, value, names, typed)
    share = 1 / jnp.where(merged.count > 0, merged.count, 1)
    delta = m.mean - merged.mean
    moved = m.count * dm.mean
    local = type(m)(
        dm.count,
        (moved + delta * dm.count) * share,
        dm.m2 + m.product(moved, delta) + m.product(delta, moved + delta * dm.count),
    )
    # Of collectives, vmap knows no other here.
    packed = lax.psum(vary(pack(local), names) if typed else pack(local), names)
    return merged, unpack(packed, m)[0]


def pack(m: Moments, values: Array | None = None) -> Array:
    """The fields as one vector: 2C + 1 numbers, if all channels have one count; and `values`."""
    fields = (m.mean, m.m2, m.count, *([] if values is None else [values]))
    return jnp.concatenate([field.ravel() for field in fields])


def unpack(v: Array, like: Moments, values: Array | None = None) -> tuple[Moments, Array | None]:
    """Undoes `pack`, for vectors `[..., 2C + 1]`."""
    fields = (like.mean, like.m2, like.count, *([] if values is None else [values]))
    ends = list(itertools.accumulate(field.size for field in fields))
    parts = jnp.split(v, ends[:-1], axis=-1)
    mean, m2, count, *rest = (
        part.reshape(*v.shape[:-1], *field.shape) for part, field in zip(parts, fields, strict=True)
    )
    return type(like)(count, mean, m2), rest[0] if rest else None


def _gather(v: Array, names: tuple[str, ...]) -> Array:
    """`v` of every device, `[D, ...]`; known to be alike on all where devices' types say so."""
    if is_typed(names):
        return lax.all_gather(vary(v, names), names, to="invarying")
    if len(names) == 1:
        return lax.all_gather(v, names[0])
    # vmap gathers no two axes at once, but it adds.
    table = jnp.zeros((_size(names), *v.shape), v.dtype)
    return lax.psum(table.at[lax.axis_index(names)].set(v), names)


def gathered(v: Array, names: tuple[str, ...]) -> Array:
    """`v` of every device, `[D, ...]`, of the type of what is alike where there are types."""
    return _gather(v, names)


def _flat(field: Array) -> Array:
    """`[D, shards, ...]` as `[D · shards, ...]`."""
    return field.reshape(-1, *field.shape[2:])


def is_typed(names: tuple[str, ...]) -> bool:
    """Whether the types of arrays say over which axes they vary: shard_map with check_vma."""
    return bool(names) and bool(varying_axes(lax.axis_index(names)))


def varying_axes(v: Array) -> frozenset[str]:
    return jax.typeof(v).manual_axis_type.varying  # pyright: ignore[reportAttributeAccessIssue]


def vary(tree: Tree, names: tuple[str, ...]) -> Tree:
    """The arrays, of a type that varies over all the names where there are such types."""

    def one(v: Array) -> Array:
        missing = tuple(name for name in names if name not in varying_axes(v))
        return lax.pcast(v, missing, to="varying") if missing else v

    return jax.tree.map(one, tree) if is_typed(names) else tree


def _size(names: tuple[str, ...]) -> int:
    return lax.axis_size(names) if names else 1


def layout(where: str, sync: Sync, examples: int) -> tuple[int, int]:
    """The number of devices, and of examples on each.

    `examples` is the length of the batch: of the device's where the axes are mapped, of the whole
    one in plain jit. Raises ValueError if an axis is neither mapped nor the mesh's, or the batch
    does not divide.
    """
    if not sync.names or is_bound(sync.names):
        return _size(sync.names), examples
    mesh = sync.mesh or jax.sharding.get_abstract_mesh()
    if not set(sync.names) <= set(mesh.axis_names):
        check_bound(where, sync.names)
    devices = math.prod(mesh.shape[name] for name in sync.names)
    if examples % devices:
        raise invalid(
            where,
            f"a batch of {examples} examples over the {devices} devices of the mesh's {sync.axes}",
            "a batch that divides over them",
            f"use a multiple of {devices}",
        )
    return devices, examples // devices


def values_per_channel(where: str, sync: Sync, shape: tuple[int, ...], axes: Sequence[int]) -> Any:
    """How many values the smallest group has of a channel, measured over `axes`, 0 among them.

    `shape` is that of the input, `[N, ...]`: of the device's where the axes are mapped, else of the
    whole one. Raises ValueError if the batch cannot be cut as `sync` says.
    """
    positions = math.prod(shape[i] for i in axes if i)
    if sync.whole and (not sync.names or is_bound(sync.names)):
        return _size(sync.names) * positions * (shape[0] if 0 in axes else 1)
    devices, examples = layout(where, sync, shape[0])
    if sync.whole:
        return devices * examples * positions
    cut = plan(where, sync, devices, examples)
    shards = cut.block if cut.members is None else int(cut.members.sum(1).min())
    return shards * (examples // cut.shards) * positions


def is_bound(names: tuple[str, ...]) -> bool:
    """Whether the axes are mapped here; those of a mesh in plain `jit` are not."""
    with contextlib.suppress(NameError):
        lax.axis_size(names)
        return True
    return False


def check_bound(where: str, names: tuple[str, ...]) -> None:
    """Raises ValueError, with the axes that are bound, unless all of these are."""
    if is_bound(names):
        return
    raise invalid(
        where,
        f"axis_name={names[0]!r}" if len(names) == 1 else f"axis_name={names!r}",
        f"the name of a mapped axis; bound here: {_bound_names()}",
        "call this inside pmap, shard_map or vmap with that axis_name, under jax.set_mesh with a "
        "mesh that has it, or pass axis_name=None",
    )


def _bound_names() -> str:
    """The mapped axes, for an error; JAX tells them by no public function."""
    found: list[str] = []
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.core import get_axis_env

        found = [str(name) for name in get_axis_env().axis_sizes]
    return ", ".join(map(repr, found)) or "none"
