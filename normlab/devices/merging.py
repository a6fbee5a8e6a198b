"""What is measured on each device, merged over the devices and parts of the batch of a `Sync`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from normlab._checks import promote
from normlab._segments import moments_of_segments, segment_totals
from normlab._sums import count_values
from normlab._xla import derivative_of, partitioned
from normlab.devices.groups import merge_groups
from normlab.devices.mapped import axis_sizes, check_bound, device_count, is_bound, vary
from normlab.devices.topology import Sync, plan
from normlab.devices.whole import merge_whole
from normlab.errors import invalid
from normlab.measure import Algorithm, Moments, merge_axes, moments


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
    pivot: Array | None = None,
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
      pivot: Where the mean of all devices is likely to be, one number for each channel.

    Returns:
      `(m, population)`: the moments that normalize `a`, of leading size 1 or N, and those of all
      the examples along the axes. They are the same where `sync.whole`.
    """
    of = functools.partial(of, algorithm=algorithm) if of is moments else of
    run = functools.partial(_measure, where, tuple(axes), sync, of, least)
    if not sync.names or is_bound(sync.names):
        return partitioned(run, a, weights, pivot)
    # Plain jit: the same, in a shard_map over the mesh's axes.
    layout(where, sync, a.shape[0])  # says so where there is no such axis
    split, alike = PartitionSpec(sync.names), PartitionSpec()
    by_example = weights is not None and weights.shape[0] != 1
    same = sync.whole and sync.gradient in ("both", "none")  # or its derivative is the device's own

    def body(a: Array, w: Array | None, k: Array | None) -> tuple[Moments, Moments]:
        m, population = partitioned(run, a, w, k)
        if not same:
            m = vary(m, sync.names)  # first, or a row for each example is summed backward
            m = jax.tree.map(lambda f: jnp.broadcast_to(f, (a.shape[0], *f.shape[1:])), m)
        return m, population

    given = jax.sharding.get_abstract_mesh() if sync.mesh is None else sync.mesh
    mesh = given.abstract_mesh
    mapped = jax.shard_map(
        body,
        mesh=None if mesh.explicit_axes else sync.mesh,  # there `partitioned` has one of its own
        in_specs=(split, split if by_example else alike, alike),
        out_specs=(alike if same else split, alike),
        axis_names=set(sync.names),
    )
    return partitioned(mapped, a, weights, pivot, mesh=mesh)


def measure_segments(
    a: Array,
    axes: Sequence[int],
    sync: Sync,
    ids: Array,
    segments: int,
    *,
    weights: Array | None = None,
    least: int = 1,
    pivot: Array | None = None,
) -> tuple[Moments, Moments]:
    """What `measure` returns for the examples of each id alone, `[segments, ...]`.

    In one pass over `a`, whatever their number. The devices' axes are bound, and all of them are
    one batch.
    """
    (kept,) = {*range(a.ndim)} - {*axes}

    def run(a: Array, w: Array | None, ids: Array, k: Array | None) -> Any:
        x = jnp.moveaxis(promote(a), kept, -1)
        v = jnp.ones((), x.dtype) if w is None else jnp.moveaxis(w, kept, -1)
        rows = (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
        x, v = x.reshape(rows), jnp.broadcast_to(v, x.shape).reshape(rows)
        local = moments_of_segments(x, v, ids, segments)
        values = segment_totals(ids, segments, (v > 0).astype(x.dtype).sum(1))[0]
        if w is None or w.shape[kept] == 1:
            local, values = local._replace(count=local.count[:, :1]), values[:, :1]
        population, number = jax.vmap(lambda m, n: _reduce(m, sync, n, k))(local, values)
        m = differentiated(sync, local, population)
        count = jnp.where(jnp.asarray(number) < least, 0, population.count.reshape(values.shape))
        population = population._replace(count=count)
        shape = [-1 if i == kept else 1 for i in range(a.ndim)]
        m = m._replace(count=m.count.reshape(count.shape))
        return [
            jax.tree.map(lambda f, i=i: f[i].reshape(shape), (m, population))
            for i in range(segments)
        ]

    each = partitioned(run, a, weights, ids, pivot)
    return jax.tree.map(lambda *fields: jnp.stack(fields), *each)


def _measure(
    where: str,
    axes: tuple[int, ...],
    sync: Sync,
    of: Callable[..., Moments],
    least: int,
    a: Array,
    w: Array | None,
    pivot: Array | None,
) -> tuple[Moments, Moments]:
    values = None  # those with a weight; without weights their number is known
    if w is not None and least > 1:
        values = count_values(a, axes, (w > 0).astype(w.dtype))
    if sync.along:
        local = of(a, axes, weights=w)
        merged, told = _reduce(local, sync, values, pivot)
        m, population = differentiated(sync, local, merged), merged
        if not sync.whole:  # over all axes: along the others alone a torus takes many steps more
            everyone = Sync(sync.names, second=sync.second)
            population, told = _reduce(local, everyone, values, pivot)
        values = told
    else:
        m, population, values = _measure_parts(where, axes, sync, of, a, w, values, pivot)
    if values is not None:
        count = jnp.where(values < least, 0, population.count)
        population = population._replace(count=count)
    return m, population


def _measure_parts(
    where: str,
    over: tuple[int, ...],
    sync: Sync,
    of: Callable[..., Moments],
    a: Array,
    w: Array | None,
    values: Array | None,
    pivot: Array | None,
) -> tuple[Moments, Moments, Array | None]:
    examples = a.shape[0]
    cut = plan(where, sync, axis_sizes(sync.names), examples)
    a = a.reshape(cut.shards, -1, *a.shape[1:])
    if w is not None and w.shape[0] == 1:
        w = jnp.broadcast_to(w[None], (cut.shards, *w.shape))
    elif w is not None:
        w = w.reshape(cut.shards, -1, *w.shape[1:])
    local = of(a, [i + 1 for i in over], weights=w)
    count = jnp.broadcast_to(local.count, (cut.shards, *local.count.shape[1:]))
    local = jax.tree.map(lambda f: f[:, 0], local._replace(count=count))
    if cut.members is None:
        # Every block is on one device: nothing is asked of the others but the population.
        blocks = jax.tree.map(lambda f: f.reshape(-1, cut.block, *f.shape[1:]), local)
        blocks = jax.tree.map(lambda f: f[:, 0], merge_axes(blocks, 1))
        own = merge_axes(blocks, 0)
        merged = jax.tree.map(lambda f: jnp.repeat(f, cut.block, axis=0), blocks)
    else:
        own = merge_axes(local, 0)
        merged = merge_groups(local, cut.members, sync.names)
    # Where the channels have one count it is sent once.
    each = tuple(slice(None if n > 1 else 1) for n in local.count.shape[1:])
    own = own._replace(count=own.count[:, *each])
    population, values = _reduce(own, Sync(sync.names, second=sync.second), values, pivot)
    chosen = differentiated(sync, local, merged)
    m = jax.tree.map(lambda f: jnp.repeat(f, examples // cut.shards, axis=0), chosen)
    return m, population, values


def _reduce(
    m: Moments, sync: Sync, values: Array | None, pivot: Array | None
) -> tuple[Moments, Array | None]:
    """Those of the devices along axes, and the sum of `values`."""
    (merged,), values = merge_whole(
        [m], sync.stages, extra=values, pivots=[pivot], second=sync.second
    )
    return merged, values


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


def layout(where: str, sync: Sync, examples: int) -> tuple[tuple[int, ...], int]:
    """The number of devices along each axis, and of examples on each device.

    `examples` is the length of the batch: of the device's where the axes are mapped, of the whole
    one in plain jit. Raises ValueError if an axis is neither mapped nor the mesh's, or the batch
    does not divide.
    """
    if not sync.names or is_bound(sync.names):
        return axis_sizes(sync.names), examples
    mesh = sync.mesh or jax.sharding.get_abstract_mesh()
    if not set(sync.names) <= set(mesh.axis_names):
        check_bound(where, sync.names)
    sizes = tuple(mesh.shape[name] for name in sync.names)
    devices = math.prod(sizes)
    if examples % devices:
        raise invalid(
            where,
            f"a batch of {examples} examples over the {devices} devices of the mesh's {sync.axes}",
            "a batch that divides over them",
            f"use a multiple of {devices}",
        )
    return sizes, examples // devices


def values_per_channel(where: str, sync: Sync, shape: tuple[int, ...], axes: Sequence[int]) -> Any:
    """How many values the smallest group has of a channel, measured over `axes`, 0 among them.

    `shape` is that of the input, `[N, ...]`: of the device's where the axes are mapped, else of the
    whole one. Raises ValueError if the batch cannot be cut as `sync` says.
    """
    positions = math.prod(shape[i] for i in axes if i)
    if sync.whole and (not sync.names or is_bound(sync.names)):
        return device_count(sync.names) * positions * (shape[0] if 0 in axes else 1)
    sizes, examples = layout(where, sync, shape[0])
    if sync.whole:
        return math.prod(sizes) * examples * positions
    cut = plan(where, sync, sizes, examples)
    shards = cut.block if cut.members is None else min(len({*row}) for row in cut.members)
    return shards * (examples // cut.shards) * positions
