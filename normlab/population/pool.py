"""Statistics that devices kept apart, merged; and what the statistics of a tree are, in words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from normlab.checks import invalid
from normlab.population.cumulative import Cumulative
from normlab.population.protocol import Population, arrays
from normlab.sync import AxisName


def pool_running(states: Any, axis_name: AxisName) -> Any:
    """Merges the running statistics of devices that kept their own, along a named axis.

    Args:
      states: A state, or a pytree of states: each `Population` in it is merged by its `pool`,
        whatever else it holds is returned as it is.
      axis_name: One mapped axis or several.

    Raises:
      ValueError: If an axis name is not bound where this is called.
    """
    return map_populations(lambda state: state.pool(axis_name), states)


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
        some = next((v.shape for v in leaves if not v.ndim or not v.shape[0]), None)
        given = (
            f"arrays of {sorted(devices)} devices" if some is None else f"an array of shape {some}"
        )
        raise invalid(
            "merge running",
            given,
            "a leading axis of the devices, of one length, in every array",
            "stack the devices' statistics along a new first axis",
        )
    pooled = jax.vmap(lambda s: pool_running(s, "_"), axis_name="_")(states)
    return jax.tree.map(lambda v: v[0], pooled)


def conventions(states: Any) -> dict[str, str]:
    """Says what each running statistic of a pytree is, in words to be kept with a checkpoint.

    Args:
      states: A state, or a pytree of states.

    Returns:
      By path, the kind of each outermost `Population` and its settings.

    >>> from normlab import init_running
    >>> conventions({"stem": init_running(2, decay=0.99)})
    {'stem': 'Running(decay=0.99, ddof=0)'}
    """
    is_leaf = lambda leaf: isinstance(leaf, Population)  # noqa: E731
    leaves, _ = jax.tree_util.tree_flatten_with_path(states, is_leaf=is_leaf)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _describe(leaf)
        for path, leaf in leaves
        if is_leaf(leaf)
    }


def _describe(state: Any) -> str:
    fields = {name: getattr(state, name) for name in getattr(state, "_fields", ())}
    said = [
        f"{name}={_describe(value) if isinstance(value, Population) else repr(value)}"
        for name, value in fields.items()
        if isinstance(value, Population | int | float | str)
    ]
    return f"{type(state).__name__}({', '.join(said)})"


def share_running(states: Any, devices: int) -> Any:
    """What each of some devices keeps of merged statistics, so that pooling gives them back.

    An average is the same on all; of what is counted, each device takes its share.

    Args:
      states: A state, or a pytree of states, as `merge_running` returned it.
      devices: Their number.
    """

    def share(state: Any) -> Any:
        if not isinstance(state, Cumulative):
            return state
        state = arrays(state)
        parts = {name: getattr(state, name) / devices for name in ("count", "within", "between")}
        counters = jnp.stack([state.updates, state.skipped], -1)
        whole = -(-counters // devices)
        exact = (counters.astype(state.rest.dtype) + state.rest) / devices
        rest = exact - whole.astype(exact.dtype)
        parts |= {"updates": whole[..., 0], "skipped": whole[..., 1], "rest": rest}
        return state._replace(**parts)

    return jax.tree.map(share, states, is_leaf=lambda leaf: isinstance(leaf, Cumulative))


def map_populations(f: Any, states: Any) -> Any:
    """Applies `f` to every outermost `Population` of a pytree."""
    return jax.tree.map(
        lambda leaf: f(leaf) if isinstance(leaf, Population) else leaf,
        states,
        is_leaf=lambda leaf: isinstance(leaf, Population),
    )
