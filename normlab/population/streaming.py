"""Training normalizes by the population, as inference does: a stream that is never seen whole.

after:  take the batch in, then h = (a − μ)/√(var + ε) with μ and var of all that was seen
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array, lax

from normlab._trees import register
from normlab.measure import Moments
from normlab.population.optional import (
    normalizer,
    observe_inner,
    options_of,
    pool_inner,
    read_inner,
    update_inner,
)


class Streaming(NamedTuple):
    """Training normalizes by `inner` as inference does, while `inner` goes on.

    The observations of reinforcement learning are normalized so: `after` the batch was taken in, by
    everything that was seen. The statistics are constants to the gradient. In a transaction `inner`
    stays as it was at `begin`.

    Attributes:
      inner: The statistics.
      after: Whether a batch is taken in before it is normalized, or after; not a leaf.

    >>> import jax.numpy as jnp
    >>> from normlab import batch_norm
    >>> from normlab.population import init_streaming
    >>> a, state = jnp.array([[1.0], [3.0]]), init_streaming(1)
    >>> for batch in (a, a + 4):
    ...     h, state = batch_norm(batch, None, state, train=True)
    >>> (h * 5**0.5).round(2).tolist(), [v.round(2).tolist() for v in state.read()]
    ([[1.0], [3.0]], [[4.0], [5.0]])
    """

    inner: Any
    after: bool = True

    observe, update, read, pool = observe_inner, update_inner, read_inner, pool_inner

    def alone(self, train: bool) -> bool:
        """No: one value is normalized by what was seen."""
        del train
        return False

    def updated_first(self) -> bool:
        """Whether the batch is taken in first."""
        return self.after

    def normalizer(self, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
        """Those of `inner` in inference; in training without a gradient."""
        del m
        mu, sigma = normalizer(self.inner, None, eps, train=False)
        return lax.stop_gradient((mu, sigma)) if train else (mu, sigma)

    def options(self) -> dict[str, Any]:
        """Those of `inner`, with the name of this."""
        return options_of("streaming", self.inner)


register(Streaming, "after")
