"""Statistics that devices kept apart, merged; and those of a model, averaged over its steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import KINDS, checked, number
from normlab.devices.topology import AxisName
from normlab.errors import invalid
from normlab.population._averages import pooled
from normlab.population.checkpoint import check_conventions
from normlab.population.optional import is_population, pool, pool_inner, share
from normlab.population.running import Running


@checked("pool running")
def pool_running(states: Any, axis_name: AxisName) -> Any:
    """Merges the running statistics of devices that kept their own, along a named axis.

    After every step, every few, or once: what was alike since the last time counts once, and what
    lies between the devices counts as if one device had seen the batches of all as one. With norms
    over `"chip"`, and this over `"host"` after the step, the population is that of all chips. After
    several steps in a row it is

        var = Σ ωᵢ·varᵢ + ρ·Σ ωᵢ·(mᵢ − m)²

    with the share ωᵢ of a device in the values since, its average mᵢ of them, and their weight ρ:
    what lies between the batches of different steps is left out, as by the average itself (not by
    `estimator="pooled"`, nor by sums). The averages of a net take four small collectives together.

    Args:
      states: A state, or a pytree of states: each `Population` in it is merged by its `pool`,
        whatever else it holds is returned as it is.
      axis_name: One mapped axis or several: all those over which averages are kept apart, at once.
        Where they were not alike after the last pool, as hosts whose chips alone were merged, what
        lies between them counts as it stands, and so as too little.

    Raises:
      ValueError: If an axis name is not bound where this is called.

    >>> from normlab import batch_norm, init_running
    >>> def step(state, a):
    ...     _, state = batch_norm(a, None, state, train=True)    # of this device's batch
    ...     return pool_running(state, "data")
    >>> step = jax.vmap(step, axis_name="data")
    >>> state = jax.tree.map(lambda v: jnp.stack([v, v]), init_running(1))
    >>> for _ in range(3):
    ...     state = step(state, jnp.array([[[0.0], [2.0]], [[4.0], [6.0]]]))
    >>> state.mean[0].tolist(), state.var[0].round(5).tolist()
    ([3.0], [5.0])
    """
    leaves, structure = jax.tree.flatten(states, is_leaf=is_population)
    held = {i: _average(leaf) for i, leaf in enumerate(leaves)}
    held = {i: average for i, average in held.items() if average is not None}
    new = dict(zip(held, pooled([*held.values()], axis_name), strict=True)) if held else {}
    for i, leaf in enumerate(leaves):
        if i in new:
            leaves[i] = _around(leaf, new[i])
        elif is_population(leaf):
            leaves[i] = pool(leaf, axis_name)
    return jax.tree.unflatten(structure, leaves)


@checked("merge running")
def merge_running(states: Any) -> Any:
    """As `pool_running`, of the statistics of all devices in one place, stacked as `[D, ...]`.

    So does a checkpoint of D devices come to another number of them: `merge_running`, then the
    result for each.

    Args:
      states: A state, or a pytree of states, whose arrays have a leading axis of the devices.

    Raises:
      ValueError: If they have none, or it is empty, or the numbers differ.

    >>> from normlab import init_running
    >>> states = jax.tree.map(lambda v: jax.numpy.stack([v, v]), init_running(3))
    >>> merge_running(states).mean.shape
    (3,)
    """
    states = jax.tree.map(jnp.asarray, states)
    leaves = jax.tree.leaves(states)
    if not leaves:
        return states
    devices = {v.shape[0] if v.ndim else 0 for v in leaves}
    if len(devices) > 1 or 0 in devices:
        none = [v.shape for v in leaves if not v.ndim or not v.shape[0]]
        given = f"an array of shape {none[0]}" if none else f"arrays of {sorted(devices)} devices"
        raise invalid(
            "merge running",
            given,
            "a leading axis of the devices, of one length, in every array",
            "stack the devices' statistics along a new first axis",
        )
    return _in_one_place(states)


@jax.jit
def _in_one_place(states: Any) -> Any:
    merged = jax.vmap(lambda s: pool_running(s, "_"), axis_name="_")(states)
    return share_running(jax.tree.map(lambda v: v[0], merged), 1)


@checked("share running")
def share_running(states: Any, devices: int) -> Any:
    """What each of some devices keeps of merged statistics, so that pooling gives them back.

    An average is the same on all; of what is counted, each device takes its share. States that were
    pooled inside the map take theirs by themselves, as long as the number of devices is the same.

    Args:
      states: A state, or a pytree of states, as `merge_running` returned it.
      devices: Their number.

    >>> from normlab import moments
    >>> from normlab.population import init_cumulative
    >>> state = init_cumulative(1).update(moments(jnp.array([[1.0], [3.0]]), 0))
    >>> state.count.tolist(), share_running(state, 2).count.tolist()
    ([2.0], [1.0])
    """
    one = lambda leaf: share(leaf, devices) if is_population(leaf) else leaf  # noqa: E731
    return jax.tree.map(one, states, is_leaf=is_population)


@checked(
    "average running",
    average=KINDS["states"],
    step_size=number("a number from 0 to 1", "pass for example 0.001", lambda v: 0 <= v <= 1),
)
def average_running(states: Any, average: Any, step_size: ArrayLike) -> Any:
    """Returns average + step_size · (states − average): the running average of a model's states.

    As `optax.incremental_update`, which averages counters as well: here what is counted in whole
    numbers, the domain that is current and whether a transaction is broken are those of `states`.

    Args:
      states: The states of the model, or any pytree that holds them.
      average: Their average so far.
      step_size: The weight of the new ones.

    Raises:
      ValueError: If the two do not keep the same (see `conventions`).

    >>> from normlab import init_running
    >>> new = init_running(1)._replace(mean=jnp.ones(1), updates=jnp.int32(7))
    >>> average = average_running(new, init_running(1), 0.25)
    >>> average.mean.tolist(), average.updates.item()
    ([0.25], 7)
    """
    check_conventions(average, states)

    def one(new: Any, old: Any) -> Array:
        new, old = jnp.asarray(new), jnp.asarray(old)
        if not jnp.issubdtype(old.dtype, jnp.inexact):
            return new
        return old + jnp.asarray(step_size, old.dtype) * (new.astype(old.dtype) - old)

    return jax.tree.map(one, states, average)


def _average(state: Any) -> Running | None:
    """The average that a population is, or of which alone it merges: all of a net go together."""
    while getattr(type(state), "pool", None) is pool_inner:
        state = state.inner
    return state if isinstance(state, Running) else None


def _around(state: Any, average: Running) -> Any:
    """The population with that average in place of its own."""
    if isinstance(state, Running):
        return average
    return state._replace(inner=_around(state.inner, average))
