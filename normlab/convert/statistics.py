"""The statistics of batch norm: what other libraries keep, as a state of normlab, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import read
from normlab.convert.value import Converted
from normlab.errors import invalid
from normlab.population._averages import never_merged
from normlab.population.by_name import init_population
from normlab.population.optional import options
from normlab.population.protocol import Population

ROUNDING = 1e-6
"""A mass that is so near to 1 is 1: the recursion in float32 comes no nearer."""


def average(
    where: str,
    found: Mapping[str, Array],
    *,
    decay: Any,
    ddof: int = 0,
    mass: Any = 1,
    updates: Any = 0,
) -> Population:
    """Returns the average with a mean, a variance and a mass; by default the plain one.

    Raises:
      ValueError: If the decay is outside [0, 1), or the statistics do not fit each other, or are
        of less than float32.
    """
    mean, var = mean_and_var_of(where, found)
    decay = read(where, "decay", decay)
    empty = init_population("ema", mean.size, decay=decay, ddof=ddof, dtype=mean.dtype)
    found = empty._replace(
        mean=mean,
        var=var,
        mass=jnp.asarray(mass, mean.dtype),
        updates=jnp.asarray(updates, jnp.int32),
    )
    return never_merged(found)


def mean_and_var_of(where: str, found: Mapping[str, Array]) -> tuple[Array, Array]:
    """Returns the mean and the variance; raises ValueError if they do not fit each other."""
    mean, var = found["mean"], found["var"]
    for v in (mean, var):
        statistics_dtype(where, v)
    if mean.shape != var.shape or mean.dtype != var.dtype:
        given = f"a mean {mean.dtype}{[*mean.shape]} and a variance {var.dtype}{[*var.shape]}"
        change = "pass the leaves of one and the same layer"
        raise invalid(where, given, "as many channels in both, of the same type", change)
    return mean, var


def statistics_dtype(where: str, v: Array) -> Any:
    """Returns the type of `v`; raises ValueError if it is too narrow for statistics."""
    if jnp.finfo(v.dtype).bits >= 32:
        return v.dtype
    change = "cast them to float32 before, and keep them so in the layer"
    raise invalid(where, f"running statistics in {v.dtype}", "float32 or float64", change)


def is_average(norm: Converted) -> bool:
    """Whether the state is an exponential moving average, as other libraries have it."""
    kept = options(norm.state)
    return kept.get("population") in ("ema", "debiased") and "estimator" not in kept


def decay_of(norm: Converted) -> dict[str, Any]:
    """Returns the decay by its name; none of a state that is no average."""
    return {"decay": norm.state.decay} if is_average(norm) else {}


def mean_and_var(
    where: str, norm: Converted, lost: dict[str, str], *, ddof: int = 0, holds: tuple[str, ...] = ()
) -> tuple[Array, Array]:
    """Returns what a library without a mass keeps, and adds to `lost` what it cannot keep.

    Args:
      where: The converter.
      norm: A batch norm.
      lost: The convention's name -> what it is, and how to keep it; changed.
      ddof: That of the library's variance.
      holds: The counters that the library has.

    Raises:
      ValueError: If there are no statistics at all.
    """
    state = norm.state
    if not isinstance(state, Population):
        change = "convert a state with statistics, or keep none in the other library"
        given = f"a state without statistics, of type {type(state).__name__}"
        raise invalid(where, given, "a population of batch norm", change)
    if not is_average(norm):
        lost["population"] = f"{type(state).__name__}: only what it reads now would be kept"
        return state.read()
    kept: Any = state
    if not abs(float(kept.mass) - 1) <= ROUNDING:
        lost["debias"] = (
            f"a mass of {float(kept.mass):g}: the other average counts as complete, so that the "
            "next updates would weigh less"
        )
    if kept.ddof != ddof:
        lost["ddof"] = (
            f"{kept.ddof}, the other variance has {ddof}: with n values of a channel in a batch, "
            f"norm._replace(state=normlab.population.change_ddof(norm.state, {ddof}, count=n))"
        )
    for name in ("updates", "skipped", "count"):
        if name not in holds and (number := float(getattr(state, name))):
            lost[name] = f"{number:g}: the other library has no such counter"
    return state.read()


@functools.partial(jax.jit, static_argnames="dtype")
def mass_after(updates: ArrayLike, decay: ArrayLike, dtype: Any) -> Array:
    """1 − decay^updates, to the bit as a jitted program of these libraries has it."""
    return 1 - jnp.power(jnp.asarray(decay, dtype), jnp.asarray(updates).astype(dtype))


def counted(where: str, norm: Converted, lost: dict[str, str]) -> tuple[Array, Array, int]:
    """Returns the mean, the variance and the updates for a library with mass 1 − decay^updates.

    Adds to `lost` what it cannot keep. A mass of 1 is written as that of very many updates.
    """
    mean, var = mean_and_var(where, norm, lost, holds=("updates",))
    if not is_average(norm):
        return mean, var, 0
    lost.pop("debias", None)
    state = norm.state
    updates, mass = int(state.updates), float(state.mass)
    if np.isclose(mass, mass_after(updates, state.decay, state.mean.dtype), rtol=1e-4, atol=0):
        return mean, var, updates
    if abs(mass - 1) <= ROUNDING:
        many = endless(state.decay)
        lost["updates"] = f"{updates} at a mass of 1, which the other has only after {many} updates"
        return mean, var, many
    lost["mass"] = f"{mass:g} after {updates} updates: the other has 1 - decay ** updates"
    return mean, var, updates


def endless(decay: float) -> int:
    """The number of updates after which 1 − decay^updates is 1 in float64, and so in float32."""
    return 1 if decay == 0 else math.ceil(-60 * math.log(2) / math.log(decay))
