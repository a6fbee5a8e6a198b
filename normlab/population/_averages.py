"""How running averages that devices kept apart are merged: those of a net in a few collectives.

Since the states were last alike, device i took in nᵢ values, which have the share ρᵢ of its mass:

    meanᵢ = (1 − ρᵢ)·(mean that was alike) + ρᵢ·(mean of its own)           and so the variance
    mean  = Σ ωᵢ·meanᵢ         var = Σ ωᵢ·varᵢ + Σ ωᵢ·(meanᵢ − mean)²/ρ     ωᵢ = nᵢ / Σ n

(meanᵢ − mean)² has ρ² of what lies between the devices' own means, where ρ of it is to count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from normlab.comoments import sample
from normlab.devices.mapped import check_bound, device_count, vary
from normlab.devices.topology import AxisName, Sync, as_sync
from normlab.errors import invalid
from normlab.population._batches import arrays


def pooled(states: Sequence[Any], axis_name: AxisName) -> list[Any]:
    """Merges each average with those of the other devices, each weighted by the values it saw.

    That is since they were last merged, or ever, if they never were; where no device saw any since,
    by `count · updates`, and where no count is known, by mass. A device that saw nothing weighs
    nothing. The result is the average of one device that saw all the batches of a step as one,
    if there was one step since; after several, what lies between the devices is what lies between
    their averages of these steps. `count` is that of a batch for which var·n/(n − 1) is unbiased:
    after one step that of all devices' together. `updates` and `skipped` are the largest of any.
    Equal states are merged to themselves.

    Averages of one type take three sums and a maximum, whatever their number.
    """
    sync = as_sync(axis_name)
    if not sync.whole:
        given = "a Sync that merges parts"
        raise invalid("pool", given, "one that merges all", "name the axes alone")
    check_bound("pool", sync.names)
    states = [arrays(state) for state in states]
    kinds = [(state.mass.shape, state.mass.dtype) for state in states]
    merged: dict[int, Any] = {}
    for kind in dict.fromkeys(kinds):
        at = [i for i, other in enumerate(kinds) if other == kind]
        merge: Callable[[list[Any]], list[Any]] = functools.partial(_merged, sync=sync)
        for _ in kind[0]:  # stacked
            merge = jax.vmap(merge)
        merged |= zip(at, merge([states[i] for i in at]), strict=True)
    return [merged[i] for i in range(len(states))]


class Weights(NamedTuple):
    """What an average weighs on this device, and what all of them have; `[]`, or one for each.

    Attributes:
      share: ω, of the values.
      free: The same of what they have of degrees of freedom, less what the means have.
      own: ρᵢ.
      rho: ρ, of the merged average.
      unbiased: N/(N − ddof).
    """

    share: Array
    free: Array
    own: Array
    rho: Array
    unbiased: Array


def _merged(states: list[Any], sync: Sync) -> list[Any]:
    names = sync.names
    devices = device_count(names)
    every = {n: jnp.stack([getattr(s, n) for s in states]) for n in ("mass", "count", "updates")}
    mass, count, updates = every["mass"], every["count"], every["updates"]
    fresh = jnp.stack([s.fresh for s in states]).astype(mass.dtype)
    weight, values, batches, mark = jnp.moveaxis(fresh, -1, 0)
    mark = mark.astype(jnp.int32)
    counters = [updates, jnp.stack([s.skipped for s in states]), mark, -mark]
    own = jnp.stack([mark_of(s.mean, s.var) for s in states])
    (updates_, skipped, high, low), copies = largest(counters, own, names)

    ddof = np.array([s.ddof for s in states], mass.dtype)
    new = weight > 0
    known, seen = new & (values > 0), jnp.where(mass > 0, updates, 0).astype(mass.dtype)
    counted = jnp.where(count > 0, seen, 0)
    sums = [jnp.where(known, values, 0), jnp.where(known, batches, 0)]
    sums += [jnp.where(new & ~known, batches, 0), (new & (batches > 0)).astype(mass.dtype)]
    sums += [counted * count, counted, seen - counted, mass]
    n_known, b_known, b_unknown, many, n_ever, b_ever, rest, masses = _sum(jnp.stack(sums), sync)

    # One that does not know its count has batches like the others'.
    typical, ever = _ratio(n_known, b_known), _ratio(n_ever, b_ever)
    n = jnp.where(known, values, jnp.where(new, batches * typical, 0))
    total, all_batches = n_known + typical * b_unknown, b_known + b_unknown
    like = jnp.where(ever > 0, ever, 1)
    earlier, all_earlier = seen * jnp.where(count > 0, count, like), n_ever + like * rest
    share = jnp.where(masses > 0, _ratio(mass, masses), 1 / devices)
    share = jnp.where(all_earlier > 0, _ratio(earlier, all_earlier), share)
    share = jnp.where(total > 0, _ratio(n, total), share)

    # Where they never were alike along these axes, what lies between them counts whole.
    since = (total > 0) & (high == -low)
    each = jnp.where(since & new, jnp.minimum(_ratio(weight, mass), 1), 1)
    # Devices that are copies of each other count once.
    copies = copies.astype(mass.dtype)
    n_all, different = total / copies, jnp.maximum(many / copies, 1)
    steps = jnp.maximum(_ratio(all_batches, many), 1)
    gain = 1 / (1 - (1 - 1 / different) / steps)
    of_batch = gain * _ratio(total, all_batches)
    counts = share * (count - each * _ratio(n, batches))
    ever_new = gain * _ratio(jnp.where(new, count, 0), many) - share * each * of_batch
    counts = jnp.where(batches < updates.astype(mass.dtype), counts, ever_new)
    means = [_weighed(w, s.mean) for w, s in zip(share, states, strict=True)]
    rows = jnp.stack([share * mass, share * weight, counts])
    *means, rows = _sum_all([*means, rows], sync)
    mass_, weight_, counts = rows
    rho = jnp.where(since & (weight_ > 0), jnp.minimum(_ratio(weight_, mass_), 1), 1)
    counts = jnp.where(since, counts + rho * of_batch, ever)
    enough = since & (ddof > 0) & (n_all > ddof) & (total > all_batches)
    unbiased = jnp.where(enough, _ratio(n_all, n_all - ddof), 1)
    lost = _ratio(different - 1, n_all - 1)
    free = jnp.where(enough, _ratio(n - batches, total - all_batches) * (1 - lost), share)
    weights = Weights(share, free, each, rho, unbiased)
    variances = [
        _variance(s, mean, jax.tree.map(lambda v, i=i: v[i], weights))
        for i, (s, mean) in enumerate(zip(states, means, strict=True))
    ]
    sums = _sum_all([local for local, _ in variances], sync)
    found = []
    for i, (s, mean, square, (_, finish)) in enumerate(
        zip(states, means, sums, variances, strict=True)
    ):
        var = finish(square)
        fresh = jnp.zeros(4, mass.dtype).at[-1].set(mark_of(mean, var).astype(mass.dtype))
        found.append(
            s._replace(
                mean=mean,
                var=var,
                mass=mass_[i],
                count=counts[i],
                updates=updates_[i],
                skipped=skipped[i],
                fresh=fresh,
                before=None if s.before is None else _joined(mean, var),
            )
        )
    return found


def _variance(state: Any, mean: Array, at: Weights) -> tuple[Array, Callable[[Array], Array]]:
    """What is to be summed over the devices, and the merged variance of the sum."""
    square = lambda d: product(state, d)  # noqa: E731
    between = _weighed(at.share, square(state.mean - mean))
    all_, eps = state.estimator == "pooled", state.sigma_eps
    if state.before is None or (all_ and eps is not None):
        gain = 1 if all_ else 1 / at.rho
        return _weighed(at.share, state.var) + gain * between, lambda v: v
    old_mean, old_var = jnp.split(state.before, [state.mean.size])
    old_var = old_var.reshape(state.var.shape)
    kept = 1 - at.own
    if eps is None:
        part = state.var - kept * old_var
        gain = at.unbiased / at.rho
        if all_:
            part -= kept / at.own * square(state.mean - old_mean)
            gain = 1 + (at.unbiased - 1) / at.rho
        local = at.share * state.var + (at.free - at.share) * part
        return _guarded(at.share, local) + gain * between, lambda v: v
    old = kept * jnp.sqrt(old_var + eps)
    own = jnp.square((jnp.sqrt(state.var + eps) - old) / at.own) - eps
    part = _weighed(at.free, own) + at.unbiased / jnp.square(at.rho) * between

    def finish(sums: Array) -> Array:
        sigma = sums[0] + at.rho * jnp.sqrt(jnp.maximum(sums[1], 0) + eps)
        return jnp.maximum(jnp.square(sigma) - eps, 0)

    return jnp.stack([_weighed(at.share, old), part]), finish


def never_merged(state: Any) -> Any:
    """An average of which nothing is known to be alike on other devices."""
    state = arrays(state)
    updates = state.updates.astype(state.mass.dtype)
    fresh = [state.mass, state.count * updates, updates, jnp.zeros_like(state.mass)]
    return remembering(state._replace(fresh=jnp.stack(fresh, -1)))


def remembering(state: Any) -> Any:
    """With the statistics that were alike, where a merge of its convention asks for them."""
    needed = state.ddof > 0 or state.sigma_eps is not None
    return state._replace(before=_joined(state.mean, state.var) if needed else None)


def _joined(mean: Array, var: Array) -> Array:
    return jnp.concatenate([mean, var.reshape(*mean.shape[:-1], -1)], -1)


def mark_of(*fields: Array) -> Array:
    """`[]` int32, 24 bits: the same for the same statistics, to the bit, and hardly for others."""
    bits = [lax.bitcast_convert_type(v, jnp.uint32).ravel() for v in fields]
    bits = jnp.concatenate(bits)
    odd = 2 * lax.iota(jnp.uint32, bits.size) + 1
    mixed = (bits ^ (bits >> 15)) * odd * jnp.uint32(2654435761)
    mixed = (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32)
    return ((mixed ^ (mixed >> 16)) & 0xFFFFFF).astype(jnp.int32)


def largest(
    rows: Sequence[Array], marks: Array, names: tuple[str, ...]
) -> tuple[list[Array], Array]:
    """The largest of integers on any device, and on how many devices each is a copy of another's.

    Copies are those along axes on all of which the marks are equal.
    """
    if not names:
        return list(rows), jnp.ones_like(marks)
    more = [marks, -marks]
    if len(names) > 1:
        ends = vary(jnp.stack(more), names)
        more = [lax.pmax(ends, name).sum(0) for name in names]
    found = lax.pmax(vary(jnp.stack([*rows, *more]), names), names)
    found, more = found[: len(rows)], found[len(rows) :]
    apart = more if len(names) > 1 else more.sum(0, keepdims=True)  # the highest − the lowest
    copies = jnp.ones(marks.shape, jnp.int32)
    for name, differ in zip(names, apart, strict=True):
        copies *= jnp.where(differ != 0, 1, lax.axis_size(name))
    return list(found), copies


def _sum(v: Array, sync: Sync) -> Array:
    for names in filter(None, sync.stages):
        v = lax.psum(vary(v, names), names)
    return v


def _sum_all(each: Sequence[Array], sync: Sync) -> list[Array]:
    """The sums of arrays of any shapes, in one collective."""
    flat = _sum(jnp.concatenate([v.ravel() for v in each]), sync)
    parts = jnp.split(flat, np.cumsum([v.size for v in each])[:-1])
    return [part.reshape(v.shape) for part, v in zip(parts, each, strict=True)]


def _ratio(part: Array, whole: Array) -> Array:
    return part / jnp.where(whole > 0, whole, 1)


def _weighed(weight: Array, v: Array) -> Array:
    return _guarded(weight, weight * v)


def _guarded(weight: Array, v: Array) -> Array:
    """Nothing of a device that weighs nothing, whatever it holds."""
    return jnp.where(weight > 0, v, 0)


def product(state: Any, d: Array) -> Array:
    """The squares of deviations `[C]`; of groups of channels their products, `[G, D, D]`."""
    m = sample(state.mass[None], d, state.var)
    return m.product(m.mean, m.mean)
