"""The state of a Flax batch norm: its arguments, and its pair of running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from normlab._checks import invalid, promote_dtype
from normlab._flax.calls import together
from normlab._flax.words import read
from normlab.devices.topology import as_sync
from normlab.population.by_name import init_population, takes
from normlab.population.delayed import delay
from normlab.population.protocol import Population
from normlab.population.running import Running


def check_momentum(where: str, momentum: float) -> float:
    """Returns Flax's momentum as a decay; raises ValueError unless it is in [0, 1)."""
    return float(read(where, "momentum", momentum))


def is_training(where: str, *use_running_average: bool | None) -> bool:
    """Whether the first that is given says so; raises ValueError if none is."""
    for given in use_running_average:
        if given is not None:
            return not read(where, "use_running_average", given)
    raise invalid(
        where,
        "no use_running_average",
        "True or False",
        "pass it to the module or to the call, or call model.train() or model.eval()",
    )


def has_average(state: Any) -> bool:
    """Whether a state holds something that batches update."""
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, Population))
    return any(isinstance(leaf, Population) for leaf in leaves)


def population(
    name: str | Callable[[int], Any], features: int, *, decay: float, axis_name: Any
) -> Any:
    """The initial state of a batch norm, with the decay if that kind has one.

    Args:
      name: As in `init_population`.
      features: Their number.
      decay: The weight of the old value.
      axis_name: What the batch is one over; with `Sync(every=...)` the state is a `Delayed`.
    """
    options = {} if callable(name) or not takes(name, "decay") else {"decay": decay}
    with jax.ensure_compile_time_eval():  # a module asks anew each time it is traced
        state = init_population(name, features, **options)
        return delay(state) if as_sync(axis_name).every else state


def check_whole(where: str, axis_name: Any) -> None:
    """Raises ValueError where `mean` and `var` alone cannot hold the state."""
    if as_sync(axis_name).every:
        raise invalid(
            where,
            f"axis_name={axis_name} with population='ema'",
            "a population that keeps more than mean and var: those of other devices",
            'pass population="debiased"',
        )


def average(mean: Array, var: Array, decay: float, dtype: Any = jnp.float32) -> Running:
    """Flax's pair of running statistics as a `Running`: biased towards mean 0 and variance 1.

    Args:
      mean: `[..., C]`.
      var: `[..., C]`.
      decay: The weight of the old value.
      dtype: That in which a batch is measured: the statistics' is no narrower, nor than float32.
    """
    zero = jnp.zeros(mean.shape[:-1], jnp.int32)
    wide = together(promote_dtype(mean), dtype)
    mean, var = mean.astype(wide), var.astype(wide)
    one = jnp.ones(zero.shape, mean.dtype)
    return Running(mean, var, one, 0 * one, zero, zero, decay=decay, ddof=0)
