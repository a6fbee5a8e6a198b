"""Who sends to whom, so that each device hears of those it is merged with, and of no other.

Groups that share no device go round in circles. After round j each device holds the 2ʲ⁺¹ members
that end with it; from these it puts together as many as there are, in ⌈log₂ g⌉ rounds. Members that
overlap, as in a ring, ask each other one by one, in as many rounds as one has members: every round
is a matching of senders and receivers. What a device sends does not depend on the number of others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Pairs = tuple[tuple[int, int], ...]
"""`(source, target)`, each device at most once on either side."""

Members = tuple[tuple[int, ...], ...]
"""Of each shard, or device, those with which it is merged."""


class Circles(NamedTuple):
    """Devices in circles, of which each is merged with so many that stand in a row.

    Attributes:
      circles: The devices of each, in order.
      lengths: How many of each circle are merged.
      ends: How many places ahead of a device the last of them stands.
    """

    circles: Members
    lengths: tuple[int, ...]
    ends: int

    @property
    def rounds(self) -> int:
        """The number of exchanges."""
        return (max(self.lengths) - 1).bit_length() + (self.ends != 0)

    def shift(self, places: int, among: Sequence[bool]) -> Pairs:
        """Everyone in some of the circles to the one so many places ahead."""
        return tuple(
            (device, circle[(i + places) % len(circle)])
            for circle, chosen in zip(self.circles, among, strict=True)
            if chosen
            for i, device in enumerate(circle)
        )


class Matchings(NamedTuple):
    """Exchanges of all the shards of a device.

    Attributes:
      rounds: Who sends to whom.
      chosen: `[D, shards, (1 + rounds) · shards]` bool: with which shards, its own first and then
        those it hears of, each shard of a device is merged.
    """

    rounds: tuple[Pairs, ...]
    chosen: np.ndarray


@functools.lru_cache(maxsize=256)
def route(members: Members, shards: int, others: bool = False) -> Circles | Matchings:
    """The exchanges after which every shard is merged with its members.

    Args:
      members: Of each shard, by number.
      shards: The number of shards of each device; where all of them have the same members, whole
        devices, they are one, and this is a route for devices.
      others: Whether a device, which is one shard, is left out of its own members.
    """
    if shards > 1 and (devices := of_devices(members, shards)) is not None:
        return route(devices, 1)
    asked = [sorted({*row} - {i} if others else {*row}) for i, row in enumerate(members)]
    if shards == 1:
        found = _circles(members, others)
        degree = max(len({*row} - {i}) for i, row in enumerate(asked))
        if found is not None and found.rounds <= degree:
            return found
    return _matchings(asked, shards)


def of_devices(members: Members, shards: int) -> Members | None:
    """The members of each device; `None` unless all its shards have the same, whole devices."""
    found = []
    for first in range(0, len(members), shards):
        rows = {frozenset(row) for row in members[first : first + shards]}
        devices = sorted({i // shards for i in members[first]})
        if len(rows) > 1 or len(devices) * shards != len({*members[first]}):
            return None
        found.append(tuple(devices))
    return tuple(found)


def _circles(members: Members, others: bool) -> Circles | None:
    """The members as circles; `None` if they are neither groups nor a window of neighbours."""
    rows = [tuple(sorted({*row})) for row in members]
    if all(rows[j] == row for row in dict.fromkeys(rows) for j in row) and all(
        i in row for i, row in enumerate(rows)
    ):
        groups = tuple(dict.fromkeys(rows))
        return Circles(groups, tuple(len(g) - others for g in groups), -1 if others else 0)
    count = len(rows)
    ahead = sorted((j + count // 2) % count - count // 2 for j in rows[0])
    row_of = [tuple(sorted((i + k) % count for k in ahead)) for i in range(count)]
    if others or rows != row_of or ahead != [*range(ahead[0], ahead[-1] + 1)]:
        return None
    return Circles((tuple(range(count)),), (len(ahead),), ahead[-1])


def _matchings(asked: list[list[int]], shards: int) -> Matchings:
    count = len(asked) // shards
    heard = [
        sorted({j // shards for row in asked[i * shards : (i + 1) * shards] for j in row} - {i})
        for i in range(count)
    ]
    # The nearest first, so that a round of a ring is a shift of it.
    edges = [(j, i) for i, sources in enumerate(heard) for j in sources]
    rounds = matched(sorted(edges, key=lambda e: (e[1] - e[0]) % count), count)
    chosen = np.zeros((count, shards, 1 + len(rounds), shards), bool)
    place = {pair: k + 1 for k, pairs in enumerate(rounds) for pair in pairs}
    for shard, row in enumerate(asked):
        device, own = divmod(shard, shards)
        for j in row:
            source, theirs = divmod(j, shards)
            chosen[device, own, place.get((source, device), 0), theirs] = True
    return Matchings(rounds, chosen.reshape(count, shards, -1))


def matched(edges: Sequence[tuple[int, int]], count: int) -> tuple[Pairs, ...]:
    """Edges `(source, target)` in as few matchings as there can be (Kőnig 1916).

    That is as many as one device has edges on one side.

    >>> matched([(0, 1), (1, 2), (2, 0), (1, 0), (2, 1), (0, 2)], 3)
    (((0, 1), (1, 2), (2, 0)), ((0, 2), (1, 0), (2, 1)))
    """
    # Of each side, by vertex: which vertex of the other a round joins it to.
    joined: tuple[list[dict[int, int]], list[dict[int, int]]] = (
        [{} for _ in range(count)],
        [{} for _ in range(count)],
    )

    def free(side: int, vertex: int) -> int:
        return next(k for k in range(len(edges)) if k not in joined[side][vertex])

    for source, target in edges:
        here, there = free(0, source), free(1, target)
        if here != there:
            # What leaves `target` by rounds `here` and `there` in turns changes them: then both
            # ends have `here` free, for the way cannot come to `source`.
            way, side, vertex, k = [], 1, target, here
            while k in joined[side][vertex]:
                other = joined[side][vertex][k]
                way.append((k, (vertex, other) if side else (other, vertex)))
                side, vertex, k = 1 - side, other, here + there - k
            for k, (t, s) in way:
                del joined[0][s][k], joined[1][t][k]
            for k, (t, s) in way:
                joined[0][s][here + there - k] = t
                joined[1][t][here + there - k] = s
        joined[0][source][here] = target
        joined[1][target][here] = source
    number = 1 + max((k for at in joined[0] for k in at), default=-1)
    return tuple(
        tuple((s, at[k]) for s, at in enumerate(joined[0]) if k in at) for k in range(number)
    )
