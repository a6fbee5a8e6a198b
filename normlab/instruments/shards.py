"""How far the statistics of devices have drifted apart.

With counts nᵢ, means μᵢ and variances vᵢ, the variance of all examples splits in two:

    v = Σ nᵢ·vᵢ / N + Σ nᵢ·(μᵢ − μ)² / N        within the devices, and between them

An average of the variances keeps the first half alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from normlab._arguments import checked, instance
from normlab.devices.mapped import check_bound, gather
from normlab.devices.topology import AxisName, as_sync
from normlab.devices.whole import pack, unpack
from normlab.errors import invalid
from normlab.measure import Moments, merge_axes
from normlab.population._batches import arrays
from normlab.population.optional import moments
from normlab.population.protocol import Population


class Drift(NamedTuple):
    """The moments of D devices beside those of all of them.

    Attributes:
      mean: `[C]`, of all examples.
      within: `[C]`, the mean of the devices' variances, weighted by their counts.
      between: `[C]`, the variance of their means.
      shift: `[D, C]`, (μᵢ − μ)/σ: how far each device's mean is off, in global σ.
      ratio: `[D, C]`, vᵢ/v: each device's variance as a share of the global one.

    >>> stats = Moments(jnp.ones((2, 1)), jnp.array([[0.0], [4.0]]), jnp.zeros((2, 1)))
    >>> found = drift(stats)                                          # two devices
    >>> found.mean.tolist(), found.shift.ravel().tolist(), found.share.tolist()
    ([2.0], [-1.0, 1.0], [1.0])
    """

    mean: Array
    within: Array
    between: Array
    shift: Array
    ratio: Array

    @property
    def share(self) -> Array:
        """`[C]`, the part of the variance that is between devices, 0 to 1."""
        var = self.within + self.between
        return self.between / jnp.where(var == 0, 1, var)


STATS = instance((Moments, Population), "pass the statistics of the devices")


@checked("drift", stats=STATS)
def drift(stats: Moments | Population, axis_name: AxisName | None = None) -> Drift:
    """Compares the statistics of devices with those of all of them together.

    Args:
      stats: `Moments` of `[..., C]`, or a population: an average weighs as much as its mass, one
        that counts values as their number, and one that says neither as much as any other. With an
        axis name, this device's; without one, those of all devices, stacked as `[D, ...]`.
      axis_name: Mapped axes.

    Raises:
      ValueError: If an axis is not bound, or there is no axis of devices.

    >>> stats = Moments(jnp.ones((2, 1)), jnp.array([[0.0], [4.0]]), jnp.array([[4.0], [4.0]]))
    >>> found = drift(stats)
    >>> found.within.tolist(), found.between.tolist(), found.share.tolist()
    ([4.0], [4.0], [0.5])
    """
    m = stats if isinstance(stats, Moments) else moments(stats)
    names = as_sync(axis_name).names
    if names:
        check_bound("drift", names)
        m = m._replace(count=jnp.broadcast_to(m.count, m.mean.shape))
        m = unpack(gather(pack([m]), names), [m])[0][0]
    if m.mean.ndim < 2:
        raise invalid(
            "drift",
            f"statistics of shape {m.mean.shape} without an axis name",
            "those of several devices, [D, ..., C]",
            "stack them along a new first axis, or name the axis",
        )
    m = jax.tree.map(lambda f: jnp.broadcast_to(f, m.mean.shape), arrays(m))
    m = jax.tree.map(lambda f: f.reshape(f.shape[0], -1, f.shape[-1]), m)
    m = Moments(*(field[:, 0] for field in merge_axes(m, 1)))
    whole = Moments(*(field[0] for field in merge_axes(m, 0)))
    count = jnp.where(whole.count > 0, whole.count, 1)
    within = m.m2.sum(0) / count
    var = whole.var()
    sigma = jnp.sqrt(var)
    return Drift(
        mean=whole.mean,
        within=within,
        between=jnp.maximum(var - within, 0),
        shift=(m.mean - whole.mean[None]) / jnp.where(sigma == 0, 1, sigma)[None],
        ratio=m.var() / jnp.where(var == 0, 1, var)[None],
    )
