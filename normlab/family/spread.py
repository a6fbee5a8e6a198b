"""Batch norms whose scale is another measure of spread than the standard deviation.

    L1       σ = √(π/2) · mean |a − μ|
    L∞       σ = c(n) · max |a − μ|
    top k    σ = c(n) · the mean of the k largest |a − μ|

Each σ is that of a Gaussian in expectation; c(n) = ½(1 + √(π ln 4))/√(2 ln n) for n values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from normlab._arguments import checked, count, declare, one_of
from normlab._checks import expand, promote
from normlab._weights import aligned
from normlab._xla import partitioned
from normlab.combine import tuple_of
from normlab.devices.groups import merge_everyone
from normlab.devices.mapped import device_count, is_bound, vary
from normlab.devices.topology import AxisName, Sync, as_sync
from normlab.equation import Parts
from normlab.errors import invalid
from normlab.factories import of_any_batch
from normlab.family.mixtures import batch_of
from normlab.making import made_of
from normlab.measure import Moments
from normlab.population.optional import updated
from normlab.site import Norm, Site, State

Spread = Literal["l1", "max", "top"]
"""What is measured of |a − μ|: its mean, its maximum, or the mean of its k largest values."""

declare(spread=one_of(Spread, "a measure of spread"))


@checked("Lp batch norm", k=count)
def lp_batch(
    *,
    spread: Spread = "l1",
    k: int = 10,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """L1, L∞ and top-k batch normalization (Hoffer et al. 2018, https://arxiv.org/abs/1803.01814).

    h = g · (a − μ) / √(s² + ε) + b with s as the module says, `k` for `"top"`. In inference μ and s
    are averages over the batches. The paper's code averages 1/s; its c(n), made for the maximum, is
    too large for the top 10 of 4,096 values by a quarter.

    Over D devices L1 takes two collectives, as |a − μ| wants μ first. L∞ and top k take, beside
    that of μ, ⌈log₂ D⌉ exchanges of what was found and one sum; they want a `Sync` of whole axes.
    """
    sync = as_sync(axis_name)
    if spread != "l1" and not (sync.whole and sync.gradient == "both" and not sync.every):
        change = "use spread='l1', which merges as moments do, or name the axes alone"
        raise invalid("Lp batch norm", f"spread={spread!r} with {sync}", "whole axes", change)
    how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias}
    centre = batch_of(batch, eps=eps, axis_name=axis_name, **how)
    wide = of_any_batch(batch_of(batch, eps=eps, axis_name=axis_name))

    def init(site: Site) -> tuple[Any, State]:
        params, state = centre.init(site)
        return params, (state, wide.init(site)[1])

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        found, first = centre.parts(params, state[0], site, train=train)
        axis, a = site.linear.channel_axis, promote(site.a)
        if spread == "l1":
            c = math.sqrt(math.pi / 2)
            away = site._replace(a=jnp.abs(a - found.mu) - 1 / c)
            of, second = wide.parts(None, state[1], away, train=train)
            s = c * of.mu + 1
        elif train or state[1] == ():
            s, second = _extreme(site, found.mu, 1 if spread == "max" else k, sync), state[1]
            if train and second != ():
                held = lax.stop_gradient(s).ravel() - 1
                seen = Moments(jnp.ones_like(held[:1]), held, jnp.zeros_like(held))
                second = updated(second, seen)
        else:
            second, s = state[1], expand(state[1].read()[0] + 1, a.ndim, axis).astype(a.dtype)
        seen = found.sigma < jnp.finfo(found.sigma.dtype).max  # else nothing was measured
        sigma = jnp.where(seen, jnp.sqrt(jnp.square(s) + eps), found.sigma)
        return found._replace(sigma=sigma), (first, second)

    # The second population holds s − 1, so that before the first batch s is 1.
    return made_of("Lp batch norm", init, parts, state=tuple_of("12"))


def _extreme(site: Site, mu: Array, k: int, sync: Sync) -> Array:
    """c(n) times the mean of the k largest |a − μ| of each channel, or of as many as there are."""
    a, channel, w = aligned("Lp batch norm", site.a, site.weights, site.linear.channel_axis)

    def largest(a: Array, mu: Array, w: Array | None) -> tuple[Array, Array]:
        away = jnp.abs(promote(a) - mu)
        there = jnp.ones((), bool) if w is None else jnp.broadcast_to(w > 0, away.shape)
        rows = jnp.moveaxis(jnp.where(there, away, -1), channel, 0).reshape(a.shape[channel], -1)
        n = jnp.where(rows >= 0, 1.0, 0.0).astype(rows.dtype).sum(1)
        return lax.top_k(rows, min(k, rows.shape[1]))[0], n

    top, n = partitioned(largest, a, mu, w) if not is_bound(sync.names) else largest(a, mu, w)
    if sync.names and is_bound(sync.names):
        n = lax.psum(vary(n, sync.names), sync.names)
        wider = min(k, top.shape[1] * device_count(sync.names)) - top.shape[1]
        top = jnp.pad(top, ((0, 0), (0, wider)), constant_values=-1)

        def join(u: Array, v: Array) -> Array:
            return lax.top_k(jnp.concatenate([u, v], 1), top.shape[1])[0]

        top = merge_everyone(top, join, sync.names)
    there = top >= 0
    mean = jnp.where(there, top, 0).sum(1) / jnp.maximum(there.sum(1), 1).astype(top.dtype)
    c = (1 + math.sqrt(math.pi * math.log(4))) / 2 / jnp.sqrt(2 * jnp.log(jnp.maximum(n, 2)))
    return expand(mean * lax.stop_gradient(c), a.ndim, channel)
