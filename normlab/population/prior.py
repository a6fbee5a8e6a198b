"""Test-time adaptation: the source's statistics and the test batch's, weighed by their counts.

    w = n / (N + n)        μ = (1 − w)·μ_s + w·μ_b
                           var = (1 − w)·var_s + w·var_b  [+ w·(1 − w)·(μ_b − μ_s)²]

N says how many examples the source is worth: 0 is the batch's statistics, ∞ the source's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import checked, flag, number
from normlab._sums import standard_deviation
from normlab._trees import register
from normlab.devices.topology import Sync
from normlab.measure import Moments
from normlab.population._batches import arrays
from normlab.population.cumulative import Estimator
from normlab.population.frozen import RULE, where_chosen
from normlab.population.optional import (
    Run,
    normalizer,
    observe,
    options_of,
    pool_inner,
    read_inner,
    update_inner,
)


class Prior(NamedTuple):
    """In inference, the statistics of `inner`, the source, and of the batch together.

    Schneider et al. 2020 (https://arxiv.org/abs/2006.16971); α-BN's fixed share α of the source is
    N = n·α/(1 − α). Training is that of `inner`.

    Attributes:
      inner: The source's statistics.
      count: `[]`, N, the number of examples that the source is worth; of a batch as many count as
        it has, whatever their positions.
      estimator: `"within"`, the paper's, mixes variances; `"pooled"` is the variance of both
        together, as if they had been one batch: it has the part between their means; not a leaf.
      by_example: Whether each example is a batch of its own, n = 1; not a leaf.

    >>> from normlab import batch_norm
    >>> from normlab.population import init_prior
    >>> a, state = jnp.array([[1.0], [3.0]]), init_prior(1, count=2.0)
    >>> _, state = batch_norm(a, None, state, train=True)
    >>> h, state = batch_norm(a + 4, None, state, train=False)   # μ = (2·2 + 2·6)/4, var = 1
    >>> h.round(2).tolist(), state.read()[0].tolist()
    ([[1.0], [3.0]], [2.0])
    """

    inner: Any
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    estimator: Estimator = "within"
    by_example: bool = False

    update, read, pool = update_inner, read_inner, pool_inner

    def measures(self, train: bool) -> bool:
        """Yes, in inference too."""
        del train
        return True

    def observe(self, run: Run, sync: Sync) -> tuple[Moments, Moments, Prior]:
        """Measures; in inference with counts in examples."""
        if self.by_example and not run.train:
            run = run._replace(measure=lambda *_: (run.each(),) * 2)
        m, taken, inner = observe(self.inner, run, sync)
        if not run.train:
            positions = jnp.asarray(run.positions).astype(m.count.dtype)
            m = Moments(m.count / positions, m.mean, m.m2 / positions)
        return m, taken, self._replace(inner=inner)

    def normalizer(self, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
        """In inference μ and σ of both; else those of `inner`."""
        if train or m is None:
            return normalizer(self.inner, m, eps, train=train)
        dtype = m.mean.dtype
        mean, var = (jnp.atleast_2d(v).astype(dtype) for v in self.read())
        given = jnp.asarray(self.count).astype(dtype)
        whole = jnp.isinf(given)
        total = m.count + jnp.where(whole, 1, given)
        share = jnp.where(whole, 0, m.count / jnp.where(total > 0, total, 1))
        used = share > 0  # or a NaN of a batch that counts for nothing would come through
        own_mean, own_var = jnp.where(used, m.mean, mean), jnp.where(used, m.var(), var)
        mu, square = ((1 - share) * s + share * b for s, b in ((mean, own_mean), (var, own_var)))
        if self.estimator == "pooled":
            square += share * (1 - share) * jnp.square(own_mean - mean)
        return mu, standard_deviation(square, total, eps)

    def options(self) -> dict[str, Any]:
        """Those of `inner`, with the name and the estimator of this."""
        return options_of("prior", self.inner) | {"estimator": self.estimator}


register(Prior, "estimator", "by_example")

WORTH = number(
    "a number of examples, at least 0",
    "use 0 for the batch's statistics, 16 to trust small batches less, math.inf for the source's",
    lambda v: v >= 0,
)


def around(inner: Any, count: Any, estimator: Estimator, by_example: bool) -> Prior:
    """A `Prior` whose count has the type of the statistics."""
    dtype = arrays(inner.read()[0]).dtype
    return Prior(inner, jnp.asarray(count, dtype), estimator, by_example)


@checked("adapt", count=WORTH, by_example=flag(), rule=RULE)
def adapt(
    states: Any,
    count: ArrayLike = 16.0,
    *,
    estimator: Estimator = "within",
    by_example: bool = False,
    rule: str | Callable[[str], bool] | None = None,
) -> Any:
    """Adapts the norms of a trained network, or of some of its layers, to the batches of a test.

    Args:
      states: A state, or a pytree of states.
      count: N, how many examples the source is worth, as in `Prior`.
      estimator: `Prior.estimator`.
      by_example: `Prior.by_example`.
      rule: Which layers, as in `freeze`; `None` for all.

    Returns:
      The states, each a `Prior`; what was one has the new settings.

    Raises:
      ValueError: If nothing matches, with the paths there are, or the count is negative.

    >>> from normlab import batch_norm, init_running
    >>> states = adapt({"norm": init_running(1)}, count=2)
    >>> h, _ = batch_norm(jnp.array([[0.0], [4.0]]), None, states["norm"], train=False)
    >>> h.round(3).tolist()                    # μ = (2·0 + 2·2)/4, var = (2·1 + 2·4)/4
    [[-0.6320000290870667], [1.8970000743865967]]
    """

    def one(state: Any) -> Prior:
        inner = state.inner if isinstance(state, Prior) else state
        return around(inner, count, estimator, by_example)

    return where_chosen("adapt", states, rule, one)
