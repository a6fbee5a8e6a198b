"""A measure about zero: any population, of a batch norm that subtracts no mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from normlab._trees import node
from normlab.devices.topology import Sync
from normlab.measure import Moments
from normlab.population._batches import BadBatch
from normlab.population.optional import (
    Run,
    normalizer,
    observe_inner,
    options_of,
    pool_inner,
    read_inner,
    updated,
)


def about_zero(m: Moments) -> Moments:
    """The moments about zero instead of the mean: mean 0, m2 = Σ a²."""
    return Moments(m.count, jnp.zeros_like(m.mean), m.m2 + m.count * jnp.square(m.mean))


def observe_about_zero(self: Any, run: Run, sync: Sync) -> tuple[Moments, Moments, Any]:
    """As `inner` does, if there is one, about zero: so that who holds this meets no mean."""
    found = observe_inner(self, run, sync) if hasattr(self, "inner") else (*run(sync), self)
    return about_zero(found[0]), about_zero(found[1]), found[2]


@node
class Rms(NamedTuple):
    """Moments about zero, in `inner`: μ = 0 and σ = √(mean a² + ε).

    Attributes:
      inner: Any population, whose means stay 0 and whose variances are means of squares.

    >>> import jax.numpy as jnp
    >>> from normlab import batch_norm, init_running
    >>> h, state = batch_norm(jnp.array([[1.0], [7.0]]), None, Rms(init_running(1)), train=True)
    >>> (5 * h).round(2).tolist(), [v.tolist() for v in state.read()]
    ([[1.0], [7.0]], [[0.0], [25.0]])
    """

    inner: Any

    observe, read, pool = observe_about_zero, read_inner, pool_inner

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Rms:
        """Takes the moments about zero into `inner`."""
        return Rms(updated(self.inner, about_zero(m), decay=decay, bad_batch=bad_batch))

    def normalizer(self, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
        """Those of `inner` for the moments about zero."""
        return normalizer(self.inner, None if m is None else about_zero(m), eps, train=train)

    def options(self) -> dict[str, Any]:
        """Those of `inner`, with the name of this."""
        return options_of("rms", self.inner)
