"""Population statistics for inference, as an explicit state.

A `Running` is an exponential moving average that knows its own mass, which makes it exact from
the first update on (no bias towards its initial value):

    mass  ← decay·mass + (1 − decay)          rate = (1 − decay) / mass
    mean  ← mean + rate·(batch mean − mean)   var ← var + rate·(batch var − var)

From mass 0 this is the debiased average of Adam; from mass 1 the rate stays 1 − decay, which is
the plain average that starts at mean 0 and variance 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from normlab.checks import check_decay
from normlab.moments import AxisName, Moments, all_reduce


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


def update_running(state: Running, m: Moments, *, decay: float, ddof: int = 0) -> Running:
    """Takes one batch in. Carries no gradient.

    A batch that is empty (or has no more than `ddof` values), or whose statistics are not finite,
    changes nothing but `skipped`.

    Args:
      state: The statistics so far.
      m: The batch's moments, `C` values in each of mean and m2, in any shape.
      decay: The weight of the old value, in [0, 1).
      ddof: 0 averages the variance that normalized the batch, 1 the unbiased one, for which
        weights are counts.

    Raises:
      ValueError: If `decay` is outside [0, 1).
    """
    check_decay("running statistics", decay)
    m = lax.stop_gradient(m)
    mean = m.mean.reshape(state.mean.shape).astype(state.mean.dtype)
    var = m.var(ddof).reshape(state.var.shape).astype(state.var.dtype)
    mass = decay * state.mass + (1 - decay)
    rate = (1 - decay) / jnp.where(mass > 0, mass, 1)
    good = (m.count > ddof).all() & jnp.isfinite(mean).all() & jnp.isfinite(var).all()

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(good, new, old).astype(old.dtype)

    return Running(
        mean=keep(state.mean + rate * (mean - state.mean), state.mean),
        var=keep(state.var + rate * (var - state.var), state.var),
        mass=keep(mass, state.mass),
        updates=state.updates + good.astype(jnp.int32),
        skipped=state.skipped + (~good).astype(jnp.int32),
    )


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
