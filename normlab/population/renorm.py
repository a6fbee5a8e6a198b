"""Batch renormalization: training normalizes as inference does, within limits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normlab._arguments import checked, integer, number, settled_decay, settled_eps
from normlab._trees import node
from normlab.errors import invalid
from normlab.measure import Moments
from normlab.population._averages import remembering
from normlab.population._batches import arrays
from normlab.population.optional import normalizer, pool_inner, read_inner, settled, update_inner
from normlab.population.running import init_running


@node
class Renorm(NamedTuple):
    """Batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275).

    Training normalizes by the statistics of the batch, corrected towards the running ones:

        h = g · ((a − μ_B)/σ_B · r + d) + b      r = clip(σ_B/σ, 1/r_max, r_max)
                                                 d = clip((μ_B − μ)/σ, −d_max, d_max)

    As in the paper, the running statistics average the means and the standard deviations, not the
    variances: σ ← decay·σ + (1 − decay)·σ_B with σ_B = √(var_B + ε).

    r and d carry no gradient. With r = 1, d = 0, until `begin` and before the first update, this is
    batch norm, operation by operation to the bit. From there the limits grow linearly with the
    number of updates, r_max from 1 until `r_end`, d_max from 0 until `d_end`. Another schedule is
    `state._replace(r_max=...)`.

    Attributes:
      inner: The running statistics, a `Running` with `sigma_eps`: μ and σ = √(var + ε).
      r_max: `[]`, the last limit of r, at least 1.
      d_max: `[]`, the last limit of d, at least 0.
      begin: `[]` int32, the number of updates up to which this is batch norm.
      r_end: `[]` int32, that from which on r_max holds.
      d_end: `[]` int32, that from which on d_max holds.

    >>> from normlab import batch_norm
    >>> a = jnp.array([[1.0], [3.0]])
    >>> state = init_renorm(1, begin=0, r_end=1, d_end=1)
    >>> for batch in (a, a + 2):
    ...     h, state = batch_norm(batch, None, state, train=True)
    >>> h.round(2).tolist()                                      # by μ = 2 and σ = 1 of the first
    [[1.0], [3.0]]
    >>> [round(v.item(), 2) for v in state.read()]
    [3.05, 1.0]
    """

    inner: Any
    r_max: Array
    d_max: Array
    begin: Array
    r_end: Array
    d_end: Array

    update, read, pool = update_inner, read_inner, pool_inner

    def limits(self) -> tuple[Array, Array]:
        """The limits of r and of d that hold now."""
        self = arrays(self)
        r = 1 + (self.r_max - 1) * self._grown(self.r_end)
        return r, self.d_max * self._grown(self.d_end)

    def _grown(self, end: Array) -> Array:
        since = (self.inner.updates - self.begin).astype(self.r_max.dtype)
        span = jnp.maximum(end - self.begin, 1).astype(self.r_max.dtype)
        return jnp.clip(since / span, 0, 1)

    def normalizer(self, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
        """Returns μ_B − d·σ_B/r and σ_B/r in training; else those of `inner`."""
        if m is None or not train:
            return normalizer(self.inner, None, eps, train=False)
        self = arrays(self)
        mu, sigma = m.mean, m.sigma(eps)
        mean, var = (lax.stop_gradient(v)[None] for v in self.read())
        r_max, d_max = (v.astype(mean.dtype) for v in self.limits())
        known = self.inner.updates > 0
        old = jnp.sqrt(var + eps)
        new_mu, new_sigma = lax.stop_gradient((mu, sigma))
        r = jnp.where(known, jnp.clip(new_sigma / old, 1 / r_max, r_max), 1)
        d = jnp.where(known, jnp.clip((new_mu - mean) / old, -d_max, d_max), 0)
        # Where nothing was measured σ is the largest number, and there is nothing to correct.
        seen = sigma < jnp.finfo(sigma.dtype).max
        scale = jnp.where(seen, sigma / r, sigma)
        return mu - jnp.where(seen, d * scale, 0), scale

    def settled(self, seen: Any, estimator: str | None) -> Renorm:
        """The same, with the statistics that a transaction saw."""
        return self._replace(inner=settled(self.inner, seen, estimator))


UPDATES = integer("a number of updates, at least 0", "pass an int", 0)


@checked(
    "batch renorm",
    r_max=number(
        "a number of at least 1", "use 1 for batch norm, 3 as in the paper", lambda v: v >= 1
    ),
    d_max=number(
        "a number of at least 0", "use 0 for batch norm, 5 as in the paper", lambda v: v >= 0
    ),
    begin=UPDATES,
    r_end=UPDATES,
    d_end=UPDATES,
    eps=settled_eps,
    decay=settled_decay,
)
def init_renorm(
    channels: int,
    *,
    r_max: ArrayLike = 3.0,
    d_max: ArrayLike = 5.0,
    begin: int = 5000,
    r_end: int = 40000,
    d_end: int = 25000,
    eps: float = 1e-5,
    decay: float = 0.9,
    ddof: int = 0,
    debias: bool = True,
    dtype: DTypeLike | None = None,
) -> Renorm:
    """Returns the state of batch renormalization; its defaults are the paper's limits.

    `r_max`, `d_max`, `begin`, `r_end` and `d_end` are the fields of `Renorm`, `eps` is that of the
    σ that is averaged: the norm's own. The other arguments are those of `init_running`, which see.

    Raises:
      ValueError: If r_max < 1, d_max < 0, a limit's end comes before `begin`, or as `init_running`.

    >>> from normlab import batch_norm
    >>> a, state = jnp.array([[1.0], [3.0]]), init_renorm(1)
    >>> h, state = batch_norm(a, None, state, train=True)
    >>> print(h.round(2))
    [[-1.]
     [ 1.]]
    """
    if begin > min(r_end, d_end):
        raise invalid(
            "batch renorm",
            f"begin={begin}, r_end={r_end}, d_end={d_end}",
            "0 <= begin <= r_end and d_end, in updates",
            "let the limits grow after begin",
        )
    running = init_running(channels, decay=decay, ddof=ddof, debias=debias, dtype=dtype)
    running = remembering(running._replace(sigma_eps=eps))
    limits = (jnp.array(v, running.mean.dtype) for v in (r_max, d_max))
    return Renorm(running, *limits, *(jnp.int32(v) for v in (begin, r_end, d_end)))
