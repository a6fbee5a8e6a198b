"""How running averages that devices kept apart are merged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from normlab.comoments import sample
from normlab.devices.mapped import check_bound
from normlab.devices.topology import AxisName, as_sync
from normlab.devices.whole import all_reduce
from normlab.population._batches import arrays


def pooled(state: Any, axis_name: AxisName) -> Any:
    """Merges with those of the other devices, each weighted by the number of values it saw.

    That number is `count · updates`; a device that has seen nothing weighs nothing, and where
    no count is known all weigh as much as their mass. The variance between the devices' means
    is part of the result, also where σ is averaged: averaging variances would lose it. `mass`
    is averaged with the same weights, so that the next update has the rate it has on the
    devices; `count` is per batch, as it was; `updates` and `skipped` are the largest of any.
    Equal states are merged to themselves.
    """
    state = arrays(state)
    if state.mass.ndim:  # stacked
        return jax.vmap(lambda each: each.pool(axis_name))(state)
    weight, count = _weight(state, axis_name)
    m = all_reduce(sample(weight[None], state.mean, weight * state.var), axis_name)
    names = as_sync(axis_name).names
    return state._replace(
        mean=m.mean.reshape(state.mean.shape),
        var=m.var(),
        mass=lax.psum(weight * state.mass, names) / m.count.reshape(state.mass.shape),
        count=count,
        updates=lax.pmax(state.updates, names),
        skipped=lax.pmax(state.skipped, names),
    )


def _weight(state: Any, axis_name: AxisName) -> tuple[Array, Array]:
    """The share of this device's values in those of all, and the count of a batch of any."""
    names = as_sync(axis_name).names
    check_bound("pool", names)
    batches = jnp.where(state.mass > 0, state.updates, 0).astype(state.mass.dtype)
    known = jnp.where(state.count > 0, batches, 0)
    values, number = lax.psum((known * state.count, known), names)
    count = values / jnp.where(number > 0, number, 1)
    typical = jnp.where(count > 0, count, 1)  # of a device that does not know its own
    weight = batches * jnp.where(state.count > 0, state.count, typical)
    nothing = lax.psum(weight, names) == 0
    weight = jnp.where(nothing, state.mass, weight)
    weight = jnp.where(lax.psum(weight, names) == 0, 1, weight)
    return weight / lax.psum(weight, names), count
