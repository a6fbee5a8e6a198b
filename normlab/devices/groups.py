"""Moments of groups of devices: exchanges between their members, merged by Chan's rule.

    N = n₁ + n₂        μ = μ₁ + (μ₂ − μ₁)·n₂/N        M = M₁ + M₂ + (μ₂ − μ₁)²·n₁·n₂/N

No digit is lost to a large mean, and the derivative is that of the rule itself: what a device sent
comes back by the same ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from normlab.devices.mapped import device_count, permute
from normlab.devices.routes import Circles, Matchings, Members, Pairs, of_devices, route
from normlab.measure import Moments, merge, merge_axes


def merge_groups(local: Moments, members: Members, names: tuple[str, ...]) -> Moments:
    """Each shard merged with its members.

    Args:
      local: Those of this device's shards, fields `[shards, ...]`.
      members: Of each shard of all devices.
      names: The mapped axes.

    Returns:
      Fields `[shards, ...]`.
    """
    shards = local.mean.shape[0]
    way = route(members, shards)
    if not names and isinstance(way, Matchings):
        return _merge_members(local, jnp.asarray(way.chosen[0]))
    alike = shards > 1 and of_devices(members, shards) is not None
    (found,) = _go([merge_axes(local, 0) if alike else local], way, names)
    return jax.tree.map(lambda f: jnp.broadcast_to(f, (shards, *f.shape[1:])), found)


def merge_others(
    each: Sequence[Moments], members: Members, names: tuple[str, ...]
) -> list[Moments]:
    """The members of this device's group but itself, merged: for many moments at once."""
    ms = [jax.tree.map(lambda f: f[None], m) for m in each]
    found = _go(ms, route(members, 1, others=True), names)
    return [jax.tree.map(lambda f: f[0], m) for m in found]


def merge_everyone(
    v: Array, join: Callable[[Array, Array], Array], names: tuple[str, ...]
) -> Array:
    """`v` of all devices joined by any associative rule, the same on all of them.

    For what is no sum: ⌈log₂ D⌉ exchanges of `v`, or of twice that, and one sum by which all have
    what the first has.
    """
    count = device_count(names)
    way = route((tuple(range(count)),) * count, 1)
    assert isinstance(way, Circles)

    def joined(earlier: Array | None, later: Array) -> Array:
        return later if earlier is None else join(earlier, later)

    (v,) = _in_circles([v], way, names, joined, [None])
    return lax.psum(jnp.where(lax.axis_index(names) == 0, v, 0), names)


def _go(ms: list[Moments], way: Circles | Matchings, names: tuple[str, ...]) -> list[Moments]:
    if isinstance(way, Matchings):
        return _one_by_one(ms, way, names)
    return _in_circles(ms, way, names, merge, jax.tree.map(jnp.zeros_like, ms))


def _in_circles(
    held: list[Any],
    way: Circles,
    names: tuple[str, ...],
    join: Callable[[Any, Any], Any],
    done: list[Any],
) -> list[Any]:
    """What those in a row have, joined in their order.

    Args:
      held: This device's; from then on, of the 2ʲ members that end here.
      way: Who is in a row.
      names: The mapped axes.
      join: Joins two.
      done: Of nobody; from then on, of as many members as the lower bits of the length say.
    """
    last = max(way.lengths).bit_length()
    for j in range(last):
        step = 2**j
        more = [length >= 2 * step for length in way.lengths]
        taken = [bool(length & step) for length in way.lengths]
        joined = [
            took and length % step > 0 for took, length in zip(taken, way.lengths, strict=True)
        ]
        moves = [a or b for a, b in zip(more, joined, strict=True)]
        sent = (held if any(more) else []) + (done if any(joined) else [])
        heard = sent
        if sent:
            heard = _hear(sent, way.shift(step, moves), names)
        longer = heard[: len(held)] if any(more) else None
        before = heard[-len(held) :] if any(joined) else done
        if any(taken):
            new = [join(b, h) for b, h in zip(before, held, strict=True)]
            done = _where(way, taken, new, done, names)
        if longer is not None:
            held = [join(b, h) for b, h in zip(longer, held, strict=True)]
    if way.ends and last:
        done = _hear(done, way.shift(-way.ends, [True] * len(way.circles)), names)
    return done


def _where(
    way: Circles, chosen: list[bool], new: list[Moments], old: list[Moments], names: tuple[str, ...]
) -> list[Moments]:
    """`new` in the circles that are chosen."""
    if all(chosen):
        return new
    table = np.zeros(sum(map(len, way.circles)), bool)
    for circle, is_one in zip(way.circles, chosen, strict=True):
        table[[*circle]] = is_one
    here = jnp.asarray(table)[lax.axis_index(names)]
    return jax.tree.map(lambda v, w: jnp.where(here, v, w), new, old)


def _one_by_one(ms: list[Moments], way: Matchings, names: tuple[str, ...]) -> list[Moments]:
    heard = [[m] for m in ms]
    for pairs in way.rounds:
        for known, m in zip(heard, _hear(ms, pairs, names), strict=True):
            known.append(m)
    mine = jnp.asarray(way.chosen)[lax.axis_index(names)]
    found = []
    for known in heard:
        everyone = jax.tree.map(lambda *fields: jnp.concatenate(fields), *known)
        found.append(_merge_members(everyone, mine))
    return found


def _hear(sent: list[Any], pairs: Pairs, names: tuple[str, ...]) -> list[Any]:
    """What was sent to this device; zeros, which are empty moments, where nothing was."""
    flat, back = ravel_pytree(sent)
    return back(permute(flat, names, pairs))


def _merge_members(m: Moments, members: Array) -> Moments:
    """Of fields `[S, ...]` and `members [rows, S]`, what each row names, merged: `[rows, ...]`."""
    count = jnp.broadcast_to(m.count, m.mean.shape)
    chosen = members.reshape(*members.shape, *(1,) * (m.mean.ndim - 1))
    shape = (*members.shape, *m.mean.shape[1:])
    within = jnp.where(chosen, m.m2, 0).sum(1)
    mean = jnp.broadcast_to(m.mean, shape)
    between = m.measured(mean, (1,), weights=jnp.where(chosen, count, 0))
    return type(m)(between.count[:, 0], between.mean[:, 0], between.m2[:, 0] + within)
