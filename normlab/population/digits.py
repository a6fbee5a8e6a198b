"""Which digits of the variance sums over devices lost: what a sum about a pivot costs, kept.

About a pivot k, the running mean, the sums of all devices tell var with log10(1 + (μ − k)²/var)
digits fewer than they have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from normlab._trees import node
from normlab.devices.topology import AxisName, Sync, as_sync
from normlab.devices.whole import away, known_pivot
from normlab.measure import Moments
from normlab.population.optional import (
    Run,
    observe,
    options_of,
    pivot,
    pool,
    read_inner,
    update_inner,
)


@node
class Digits(NamedTuple):
    """Statistics in `inner`, and how many digits their merging over devices lost.

    That is what the first sum lost: `Sync(second="when_needed")` takes a second one where it is
    more than 2, `"never"` leaves it at that. A float32 has 7.

    Attributes:
      inner: The statistics.
      last: `[C]`, the digits of the variance that the last batch lost; 0 on one device.
      most: `[C]`, the most that any batch has lost.

    >>> import jax
    >>> from normlab import Sync, batch_norm
    >>> from normlab.population import init_digits
    >>> def step(a):
    ...     return batch_norm(a, None, init_digits(1), train=True, axis_name=Sync("d"))[1]
    >>> a = 1000 + jnp.array([[[-1.0], [1.0]], [[-1.0], [1.0]]])       # two devices, var 1
    >>> state = jax.vmap(step, axis_name="d")(a)
    >>> state.read()[0].ravel().tolist(), state.most.round(2).ravel().tolist()
    ([1000.0, 1000.0], [6.0, 6.0])
    """

    inner: Any
    last: Array
    most: Array

    update, read = update_inner, read_inner

    def observe(self, run: Run, sync: Sync) -> tuple[Moments, Moments, Digits]:
        """As `inner` does, and keeps what was lost."""
        m, population, inner = observe(self.inner, run, sync)
        if not sync.names:
            return m, population, self._replace(inner=inner)
        merged = lax.stop_gradient(population)
        k = known_pivot(pivot(self.inner, sync), merged, sync.names)
        far = away(merged, merged.mean if k is None else merged.mean - k)
        lost = jnp.where(far > 1e6, 2 * jnp.log10(far), jnp.log10(1 + jnp.square(far)))
        # A constant has no digit to lose; but for a sum alone what lost all of them looks so.
        nothing = jnp.inf if sync.second == "never" else 0
        lost = jnp.where(jnp.isinf(far) & (merged.squares == 0), nothing, lost)
        lost = jnp.where(jnp.isnan(lost) & jnp.isfinite(merged.mean), jnp.inf, lost)
        lost = lost.reshape(self.last.shape).astype(self.last.dtype)
        return m, population, Digits(inner, lost, jnp.fmax(lost, self.most))

    def pool(self, axis_name: AxisName) -> Digits:
        """Merges `inner`; of the digits the most of any device."""
        names = as_sync(axis_name).names
        lost = (lax.pmax(v, names) for v in (self.last, self.most))
        return Digits(pool(self.inner, axis_name), *lost)

    def options(self) -> dict[str, Any]:
        """Those of `inner`, with the name of this."""
        return options_of("digits", self.inner)
