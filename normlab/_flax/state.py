"""The state of a Flax batch norm: its arguments, and its pair of running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from normlab._checks import promote_dtype
from normlab._flax.calls import together
from normlab._flax.words import read
from normlab.devices.topology import as_sync
from normlab.errors import invalid
from normlab.population.by_name import init_batch_state, init_population, takes
from normlab.population.optional import is_population


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
    return any(map(is_population, jax.tree.leaves(state, is_leaf=is_population)))


def initial(
    population: str | Callable[[int], Any],
    features: int,
    *,
    decay: float,
    eps: float,
    axis_name: Any,
) -> Any:
    """The initial state of a batch norm, as `init_population` makes it.

    A name gets decay and ε, if its population has them; a function says its own. With
    `Sync(every=...)` as the `axis_name` the state remembers what other devices measured.
    """
    named = not callable(population) and takes(population, "decay")
    make = init_batch_state(population, eps, as_sync(axis_name), decay=decay if named else None)
    with jax.ensure_compile_time_eval():  # a module asks anew each time it is traced
        return make(features, None)


def check_whole(where: str, axis_name: Any) -> None:
    """Raises ValueError where `mean` and `var` alone cannot hold the state."""
    if as_sync(axis_name).every:
        raise invalid(
            where,
            f"axis_name={axis_name} with population='ema'",
            "a population that keeps more than mean and var: those of other devices",
            'pass population="debiased"',
        )


def average(mean: Array, var: Array, decay: float, dtype: Any = jnp.float32) -> Any:
    """Flax's pair of running statistics, `[..., C]`, as the population "ema".

    Its type is no narrower than float32, nor than `dtype`, that in which a batch is measured.
    """
    wide = together(promote_dtype(mean), dtype)
    one = init_population("ema", mean.shape[-1], decay=decay, dtype=wide)
    each = jax.tree.map(lambda v: jnp.broadcast_to(v, (*mean.shape[:-1], *v.shape)), one)
    return each._replace(mean=mean.astype(wide), var=var.astype(wide))
