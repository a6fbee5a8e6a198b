"""Population statistics for inference, as an explicit state.

A `Running` is an exponential moving average that knows its own mass, which makes it exact from
the first update on (no bias towards its initial value):

    mass  ← decay·mass + (1 − decay)          rate = (1 − decay) / mass
    mean  ← mean + rate·(batch mean − mean)   var ← var + rate·(batch var − var)

From mass 0 this is the debiased average of Adam; from mass 1 the rate stays 1 − decay, which is
the plain average that starts at mean 0 and variance 1.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from normlab.checks import check_decay, invalid, nearest
from normlab.collective import all_reduce
from normlab.moments import Moments
from normlab.sync import AxisName

BadBatch = Literal["skip", "propagate", "raise"]
"""What becomes of a batch that is empty, fully masked, or holds a NaN or an Inf.

`"skip"`: the running statistics stay as they were, and `skipped` counts it. `"propagate"`: the
batch is taken in as it is, and an empty one as NaN. `"raise"`: as skip, with an error; under `jit`
JAX raises it, as a `JaxRuntimeError`, once the batch has been computed.
"""


class Running(NamedTuple):
    """Running statistics, float32 at least.

    Attributes:
      mean: `[C]`, the running mean.
      var: `[C]`, the running variance, of which `ddof` is that of the updates (0 by default).
      mass: `[]`, the sum of the weights of all updates: 0 before the first, towards 1.
      updates: `[]` int32, the number of batches taken in.
      skipped: `[]` int32, the number of batches left out: empty, or not finite.
    """

    mean: Array
    var: Array
    mass: Array
    updates: Array
    skipped: Array


def init_running(channels: int, *, debias: bool = True, dtype: DTypeLike = jnp.float32) -> Running:
    """Returns running statistics with mean 0 and variance 1.

    Args:
      channels: `C`.
      debias: Whether the initial values are to weigh nothing (the default) or as much as a batch
        seen forever ago, as in most libraries.
      dtype: The statistics' type, float32 or float64.
    """
    zero = jnp.zeros((), jnp.int32)
    mass = jnp.full((), 0 if debias else 1, dtype)
    return Running(jnp.zeros(channels, dtype), jnp.ones(channels, dtype), mass, zero, zero)


def update_running(
    state: Running, m: Moments, *, decay: float, ddof: int = 0, bad_batch: BadBatch = "skip"
) -> Running:
    """Takes one batch in. Carries no gradient.

    A batch is bad if it is empty (or has no more than `ddof` values), or if its statistics are not
    finite.

    Args:
      state: The statistics so far.
      m: The batch's moments, `C` values in each of mean and m2, in any shape.
      decay: The weight of the old value, in [0, 1).
      ddof: 0 averages the variance that normalized the batch, 1 the unbiased one, for which
        weights are counts.
      bad_batch: What becomes of a bad batch.

    Raises:
      ValueError: If `decay` is outside [0, 1), or the policy is unknown.
      FloatingPointError: For a bad batch with the policy `"raise"`.
    """
    check_decay("running statistics", decay)
    m = check_batch("running statistics", lax.stop_gradient(m), bad_batch, ddof)
    mean = m.mean.reshape(state.mean.shape).astype(state.mean.dtype)
    var = m.var(ddof).reshape(state.var.shape).astype(state.var.dtype)
    mass = decay * state.mass + (1 - decay)
    rate = (1 - decay) / jnp.where(mass > 0, mass, 1)
    good = (m.count > ddof).all() & jnp.isfinite(mean).all() & jnp.isfinite(var).all()
    if bad_batch == "propagate":
        good = jnp.ones_like(good)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(good, new, old).astype(old.dtype)

    return Running(
        mean=keep(state.mean + rate * (mean - state.mean), state.mean),
        var=keep(state.var + rate * (var - state.var), state.var),
        mass=keep(mass, state.mass),
        updates=state.updates + good.astype(jnp.int32),
        skipped=state.skipped + (~good).astype(jnp.int32),
    )


def check_batch(where: str, m: Moments, bad_batch: BadBatch, ddof: int = 0) -> Moments:
    """Returns the moments of a batch as the policy has them, or says that they are bad.

    Args:
      where: The caller, for the error.
      m: The batch's moments.
      bad_batch: `"propagate"` makes the moments of an empty batch NaN, `"raise"` raises.
      ddof: A batch of no more than this many values has no variance.
    """
    if bad_batch not in get_args(BadBatch):
        raise invalid(
            where,
            f"bad_batch={bad_batch!r}",
            "the name of a policy",
            f"use a known one: {nearest(str(bad_batch), get_args(BadBatch))}",
        )
    if bad_batch == "propagate":
        seen = m.count > ddof
        return m._replace(mean=jnp.where(seen, m.mean, jnp.nan), m2=jnp.where(seen, m.m2, jnp.nan))
    if bad_batch == "raise":
        check = functools.partial(_raise_if_bad, where, ddof)
        jax.debug.callback(check, *lax.stop_gradient(m))
    return m


def _raise_if_bad(where: str, ddof: int, *m: Array) -> None:
    count, mean, m2 = map(np.asarray, m)
    if not (count > ddof).all():
        given = f"a batch with {count.min():g} values (or weight) per channel"
        expected = f"more than {ddof}"
    elif not (np.isfinite(mean).all() and np.isfinite(m2).all()):
        bad = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(m2)))
        given = f"a batch with a NaN or an Inf in {bad.size} of {mean.size} channels, "
        given += f"the first of them {bad[0]}"
        expected = "finite values"
    else:
        return
    change = 'give these examples the weight 0, or pass bad_batch="skip"'
    raise FloatingPointError(str(invalid(where, given, expected, change)))


def pool_running(state: Running, axis_name: AxisName) -> Running:
    """Merges the running statistics of devices that kept their own, along a named axis.

    Each device weighs as much as its mass. The variance between the devices' means is part of the
    result; averaging the variances would lose it. `updates` and `skipped` are the largest of any
    device.

    Args:
      state: This device's statistics.
      axis_name: One mapped axis or several.

    Raises:
      ValueError: If an axis name is not bound where this is called.
    """
    m = all_reduce(Moments(state.mass, state.mean, state.mass * state.var), axis_name)
    seen = m.count > 0
    return Running(
        mean=jnp.where(seen, m.mean, lax.pmean(state.mean, axis_name)),
        var=jnp.where(seen, m.var(), lax.pmean(state.var, axis_name)),
        mass=lax.pmean(state.mass, axis_name),
        updates=lax.pmax(state.updates, axis_name),
        skipped=lax.pmax(state.skipped, axis_name),
    )


def merge_running(states: Running) -> Running:
    """As `pool_running`, of the statistics of all devices in one place, stacked as `[D, ...]`.

    So does a checkpoint of D devices come to another number of them: `merge_running`, then the
    result for each.

    Args:
      states: `Running` whose fields have a leading axis of the devices.

    Raises:
      ValueError: If they have none, or it is empty.

    >>> states = jax.tree.map(lambda v: jnp.stack([v, v]), init_running(3))
    >>> merge_running(states).mean.shape
    (3,)
    """
    if states.mass.ndim != 1 or not states.mass.size or states.mean.ndim != 2:
        raise invalid(
            "merge running",
            f"a mass of shape {states.mass.shape} and a mean of shape {states.mean.shape}",
            "(D,) and (D, C), of D devices",
            "stack the devices' statistics along a new first axis",
        )
    return jax.tree.map(
        lambda v: v[0], jax.vmap(lambda s: pool_running(s, "_"), axis_name="_")(states)
    )
