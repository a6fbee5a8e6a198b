"""The exponential moving average of the batches' means and variances.

It knows its own mass, which makes it exact from the first update on (no bias towards its initial
value):

    mass  ← decay·mass + (1 − decay)          rate = (1 − decay) / mass
    mean  ← mean + rate·(batch mean − mean)   var ← (1 − rate)·var + rate·batch var

From mass 0 this is the debiased average of Adam; from mass 1 the rate stays 1 − decay, which is
the plain average that starts at mean 0 and variance 1.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike

from normlab._arguments import checked, one_of, settled_decay
from normlab._trees import register
from normlab.comoments import sample, second_shape
from normlab.devices.topology import AxisName
from normlab.measure import Moments
from normlab.population._averages import never_merged, pooled, product, remembering
from normlab.population._batches import BadBatch, arrays, check_batch, statistics_dtype, taken_in


class Running(NamedTuple):
    """The exponential moving average of the batches' means and variances, float32 at least.

    Attributes:
      mean: `[C]`, the running mean.
      var: `[C]`, the running variance, of which `ddof` is that of the updates; or the covariance of
        groups of channels, `[G, D, D]`.
      mass: `[]`, the sum of the weights of all updates: 0 before the first, towards 1.
      count: `[]`, the number of values (or weight) of a channel in a batch, averaged as the mean
        is, from the first update on; 0 if it is not known.
      updates: `[]` int32, the number of batches taken in.
      skipped: `[]` int32, the number of batches left out: empty, or not finite.
      fresh: `[4]`, of the batches since the states of devices were last merged, of all if they
        never were: their weight out of `mass`, the number of their values, their own number; and a
        mark of what the merge came to, 0 before the first.
      before: `[2C]`, mean and variance as they were merged last, where the next merge asks for
        them: with ddof 1 or `sigma_eps`; else `None`.
      decay: The weight of the old value in an update that names no other; not a leaf.
      ddof: 0 for the variance that normalized the batch, 1 for the unbiased one; not a leaf.
      sigma_eps: `None` averages the variances. A number ε averages σ = √(var + ε), as batch
        renormalization does, and `var` is σ² − ε; not a leaf.
      estimator: `None` averages the variances alone. `"pooled"` adds the part between the means of
        the batches, rate·(1 − rate)·(batch mean − mean)²: the variance of all values together,
        each with the weight of its batch; not a leaf.

    >>> from normlab import moments
    >>> state = init_running(1).update(moments(jnp.array([[1.0], [3.0]]), 0))
    >>> state.mean.tolist(), state.var.tolist(), int(state.updates)
    ([2.0], [1.0], 1)
    """

    mean: Array
    var: Array
    mass: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    updates: Array
    skipped: Array
    fresh: Array = np.zeros(4, np.float32)  # pyright: ignore[reportAssignmentType]
    before: Array | None = None
    decay: float = 0.9
    ddof: int = 0
    sigma_eps: float | None = None
    estimator: Literal["pooled"] | None = None

    @checked("running statistics")
    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Running:
        """Takes one batch in, as any `Population`; a traced decay is trusted, and may be 1.

        Raises:
          ValueError: If `decay` is outside [0, 1), or the policy is unknown.
          FloatingPointError: For a bad batch with the policy `"raise"`.
        """
        self = arrays(self)
        decay = self.decay if decay is None else decay
        if isinstance(decay, Array):
            decay = decay.astype(self.mass.dtype)
        m = check_batch("running statistics", m, bad_batch, self.ddof)
        mean = m.mean.reshape(self.mean.shape).astype(self.mean.dtype)
        var = jnp.where(jnp.isnan(m.m2), m.m2, m.var(self.ddof))  # NaN of a bad batch, if at all
        var = var.reshape(self.var.shape).astype(self.var.dtype)
        mass = decay * self.mass + (1 - decay)
        rate = (1 - decay) / jnp.where(mass > 0, mass, 1)
        count = m.count.mean().astype(self.count.dtype)
        known = jnp.where(self.count > 0, rate, 1)
        weight, values, batches, mark = self.fresh.astype(self.mass.dtype)
        # Those before of an average that did not know their count had as many values each.
        values += count * jnp.where(values > 0, 1, batches + 1)
        fresh = jnp.stack([decay * weight + (1 - decay), values, batches + 1, mark])
        new = self._averaged(rate, var)
        if self.estimator == "pooled":
            new += rate * (1 - rate) * product(self, mean - self.mean)
        return taken_in(
            self,
            m,
            bad_batch,
            self.ddof,
            mean=self.mean + rate * (mean - self.mean),
            var=new,
            mass=mass,
            count=self.count + known * (count - self.count),
            fresh=fresh,
        )

    def _averaged(self, rate: Array, var: Array) -> Array:
        eps = self.sigma_eps
        if eps is None:
            return (1 - rate) * self.var + rate * var  # from 1, no digit is lost
        sigma = (1 - rate) * jnp.sqrt(self.var + eps) + rate * jnp.sqrt(var + eps)
        return jnp.maximum(jnp.square(sigma) - eps, 0)

    def read(self) -> tuple[Array, Array]:
        """Returns `(mean, var)`, `[C]`."""
        return arrays((self.mean, self.var))

    def pool(self, axis_name: AxisName) -> Running:
        """Merges with those of the other devices, each weighted by the values that it saw."""
        return pooled([self], axis_name)[0]

    def moments(self) -> Moments:
        """Moments that weigh as much as the state's mass."""
        m = sample(self.mass[..., None], self.mean, self.var)
        return m._replace(m2=m.count * m.m2)

    def options(self) -> dict[str, Any]:
        """Those of an average; a plain one is told from a complete one by its mass alone.

        Under `jit` that has no value.
        """
        plain = not isinstance(self.mass, Tracer) and bool((self.mass == 1).all())
        name = "ema" if plain else "debiased"
        kept = {"population": name, "decay": self.decay, "ddof": self.ddof}
        return kept if self.estimator is None else {**kept, "estimator": self.estimator}

    def settled(self, seen: Any, estimator: str | None) -> Running:
        """The same, with the statistics that a transaction saw."""
        mean, var = seen._replace(ddof=self.ddof, estimator=estimator or "pooled").read()
        batches = jnp.maximum(seen.updates, 1).astype(mean.dtype)
        new = self._replace(
            mean=mean,
            var=var,
            mass=jnp.ones_like(self.mass),
            count=seen.count.mean(-1) / batches,
            updates=seen.updates,
            skipped=seen.skipped,
        )
        return never_merged(new)

    def lacking(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The fields that a checkpoint from before there were such does not have."""
        if "fresh" in saved:
            return {}
        new = never_merged(self._replace(**{n: saved[n] for n in KEPT if n in saved}))
        return {"fresh": new.fresh, "before": new.before}


register(Running, "decay", "ddof", "sigma_eps", "estimator")

KEPT = ("mean", "var", "mass", "count", "updates")
"""The fields from which those follow that came later."""


POOLED = one_of(Literal["pooled"], "None or 'pooled'")


@checked("running statistics", decay=settled_decay, estimator=POOLED)
def init_running(
    channels: int,
    *,
    decay: float = 0.9,
    ddof: int = 0,
    debias: bool = True,
    estimator: Literal["pooled"] | None = None,
    groups: int | None = None,
    dtype: DTypeLike | None = None,
) -> Running:
    """Returns running statistics with mean 0 and variance 1.

    Args:
      channels: `C`.
      decay: The weight of the old value in an update, in [0, 1).
      ddof: 0 averages the variance that normalized the batch, 1 the unbiased one, for which
        weights are counts.
      debias: Whether the initial values are to weigh nothing (the default) or as much as a batch
        seen forever ago, as in most libraries.
      estimator: `"pooled"` averages what is between the batches' means too; see `Running`.
      groups: Keeps the covariance of so many groups of channels, `[G, D, D]`, which starts at I.
      dtype: The statistics' type, float32 (`None`; half types are kept in it too) or float64.

    Raises:
      ValueError: If `decay` is outside [0, 1), `ddof` neither 0 nor 1, the groups do not divide the
        channels, or the type is no real floating type.

    >>> state = init_running(2, decay=0.9)
    >>> state.mean.tolist(), state.var.tolist(), float(state.mass)
    ([0.0, 0.0], [1.0, 1.0], 0.0)
    """
    dtype = statistics_dtype(dtype)
    shape = second_shape("running statistics", channels, groups)
    one = jnp.ones(shape, dtype) if groups is None else jnp.eye(shape[-1], dtype=dtype)
    new = Running(
        mean=jnp.zeros(channels, dtype),
        var=jnp.broadcast_to(one, shape),
        mass=jnp.full((), 0 if debias else 1, dtype),
        count=jnp.zeros((), dtype),
        updates=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        fresh=jnp.zeros(4, dtype),
        decay=decay,
        ddof=ddof,
        estimator=estimator,
    )
    return remembering(new)
