"""Which devices, and which parts of their batches, are normalized together: topology as data."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from normlab._arguments import (
    checked,
    declare,
    either,
    flag,
    instance,
    integer,
    one_of,
    sequence,
    text,
)
from normlab._trees import static
from normlab.errors import invalid

Gradient = Literal["both", "forward", "backward", "none"]
"""What the gradient sees of the synchronization.

μ and σ normalize, x̂ = (x − μ)/σ; ⟨·⟩ is a mean over examples, and μ' is that of x over the same:

    ∂L/∂x = g · (dy/σ − ⟨dy/σ⟩ − (x − μ')·⟨dy·x̂/σ²⟩)

`"both"`: μ, σ and ⟨·⟩ are over all examples that are merged: the gradient of the loss of all
devices. `"forward"`: μ, σ over all, ⟨·⟩ over the device's own: the derivative of its own moments
stands in for that of the merged ones, and the backward pass has no collective. `"backward"`: μ, σ
over its own, ⟨·⟩ over all. `"none"`: μ, σ over all, held constant: without both ⟨·⟩.

With `every`, what came from other devices is constant: in `"both"` ⟨·⟩ is over the device's own
examples and counts by their share n/N of all; in `"forward"` it counts whole.
"""


Second = Literal["when_needed", "always", "never"]
"""Whether the sums over devices are taken a second time, about the mean that they gave.

About a pivot k, the running mean or 0, the sums lose log10(1 + (μ − k)²/var) digits of var.
`"when_needed"`: again where more than two are lost, which every device tells from the same numbers.
`"always"`: two collectives, and nothing to decide. `"never"`: one, and NaN where the running means
of the devices differ; `normlab.population.Digits` keeps what is lost.
"""


NAMES = text("the name of an axis", "pass a string")
NAMES = either(
    "the name of an axis, or a tuple of names", 'name them: "data"', NAMES, sequence(NAMES)
)
SHARD = integer("the number of a shard", "", 0)
SHARDS = sequence(sequence(SHARD), "tuples of the numbers of shards", "number them from 0")


@static
@checked(
    "Sync",
    axes=NAMES,
    together=NAMES,
    groups=either(
        "at least 1 shard, or tuples of their numbers",
        "pass an int or ((0, 1), (2, 3))",
        integer("", "", 1),
        SHARDS,
    ),
    members=SHARDS,
    shards=integer("at least 1 part", "pass 1 to leave the batch whole", 1),
    virtual_batch=integer("at least 1 example", "pass an int", 1),
    staged=flag(),
    gradient=one_of(Gradient, "what the gradient sees"),
    second=one_of(Second, "whether to sum a second time"),
    every=integer("at least 0 batches", "pass 0 to ask in every norm", 0),
    mesh=instance((Mesh, AbstractMesh), "make it with jax.make_mesh", arrays=False),
)
@dataclasses.dataclass(frozen=True)
class Sync:
    """Which examples are one batch. Takes the place of an `axis_name`; a plain name means all.

    The same spec works in `pmap`, `shard_map` (with and without `check_vma`), `vmap` and, where
    the axes are those of a mesh, plain `jit`. However the batch is cut, parts are merged with
    their counts (Chan's rule), so that uneven, masked and empty parts weigh what they hold.

    A device's batch is cut into `shards` of consecutive examples; all shards of all devices, in the
    order of the devices, are numbered 0, 1, …; `groups` or `members` say which of them are merged.
    The running statistics take in the shards of *all* the named axes, whatever the groups.

    What a device sends does not depend on how many there are: 2C + 1 numbers for all of them or
    along `together`, and again for the running statistics; ⌈log₂ g⌉ times as many, or twice that,
    for groups of g devices; as many as it has neighbours for `members` that overlap.

    Attributes:
      axes: The named axes of which the devices are meant: of `pmap`, `shard_map`, `vmap`, or of
        the mesh. Empty for the device alone.
      together: Those of the axes along which devices are merged, where they are groups of a mesh:
        `Sync(("host", "chip"), together="chip")`. `None` for all axes.
      groups: `None` merges all shards. A number merges blocks of so many consecutive shards (1:
        every shard on its own). Tuples of numbers are the groups: they may be strided or uneven,
        and must hold every shard once.
      members: For each shard, the shards that it is normalized with; these may overlap (`ring`).
      shards: Into how many parts each device's batch is cut ("ghost batches").
      virtual_batch: The number of examples in a group, instead of `groups` and `shards`: the
        same numbers on however many devices the batch lies.
      staged: Merges over the last of the axes first, then over the one before, and so on: one
        collective for each, every one of them small. Only without groups.
      gradient: What the gradient sees, a `Gradient`.
      every: If positive, the statistics of other devices are not asked for in the norm but taken
        from the state, where `exchange` puts them; it refreshes those of at least this age.
      second: Whether sums over whole axes are taken a second time, a `Second`.
      mesh: In plain `jit`, the mesh that has the axes; by default the one of `jax.set_mesh`.

    Raises:
      ValueError: For a combination that means nothing.

    >>> Sync("data", groups=2).groups  # two halves of the devices
    2
    >>> Sync(virtual_batch=32).virtual_batch  # batches of 32 in each device
    32
    """

    axes: str | tuple[str, ...] = ()
    together: str | tuple[str, ...] | None = None
    groups: int | tuple[tuple[int, ...], ...] | None = None
    members: tuple[tuple[int, ...], ...] | None = None
    shards: int = 1
    virtual_batch: int | None = None
    staged: bool = False
    gradient: Gradient = "both"
    every: int = 0
    second: Second = "when_needed"
    mesh: Mesh | AbstractMesh | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a combination that means nothing."""
        cuts = {
            name: getattr(self, name)
            for name in ("together", "groups", "members", "virtual_batch")
            if getattr(self, name) is not None
        }
        alone = [name for name in ("staged", "every") if getattr(self, name)]
        if len(cuts) > 1 or (cuts and self.staged) or len(alone) > 1:
            given = " and ".join([*cuts, *alone])
            raise invalid("Sync", given, "one way to cut the batch", "leave all but one out")
        if self.virtual_batch is not None and self.shards > 1:
            change = "leave shards out: the virtual batch says how the batch is cut"
            raise invalid("Sync", "virtual_batch and shards", "one of them", change)
        if self.every and (self.shards > 1 or self.virtual_batch):
            change = "leave every out, or the shards"
            raise invalid("Sync", "every with parts of a batch", "whole devices", change)
        if self.every and self.gradient == "backward":
            change = 'use gradient="forward", "none" or "both"'
            given = "every and gradient='backward'"
            raise invalid("Sync", given, "a gradient that asks no other device", change)
        distinct = len({*self.near}) == len(self.near)
        some = self.near and {*self.near} < {*self.names}
        if self.together is not None and not (some and distinct):
            given = f"together={self.together!r} of the axes {self.axes!r}"
            change = 'for example Sync(("host", "chip"), together="chip"); leave it out for all'
            raise invalid("Sync", given, "some of the axes, not all", change)
        if (self.every or self.staged) and not self.names:
            given = "every" if self.every else "staged"
            raise invalid("Sync", f"{given} without axes", "axes to merge over", "name the axes")

    @property
    def names(self) -> tuple[str, ...]:
        """The axes, as a tuple."""
        return (self.axes,) if isinstance(self.axes, str) else tuple(self.axes)

    @property
    def whole(self) -> bool:
        """Whether all examples along the axes are one batch."""
        cuts = (self.together, self.groups, self.members, self.virtual_batch)
        return all(cut is None for cut in cuts)

    @property
    def near(self) -> tuple[str, ...]:
        """The axes along which devices are merged, where groups are not given by number."""
        if self.together is None:
            return self.names
        return (self.together,) if isinstance(self.together, str) else tuple(self.together)

    @property
    def along(self) -> bool:
        """Whether all devices along some axes are merged, and no groups by number."""
        return self.whole or self.together is not None

    @property
    def stages(self) -> list[tuple[str, ...]]:
        """The axes to merge over, where that is so: one collective after the other."""
        return [(name,) for name in reversed(self.near)] if self.staged else [self.near]


AxisName = str | tuple[str, ...] | Sync
"""The name, or names, of axes over which statistics are merged; or a `Sync`."""

declare(
    axis_name=either(
        "the name of a mapped axis, a tuple of names, or a Sync",
        'pass for example axis_name="data"',
        NAMES,
        instance(Sync, "", arrays=False),
    )
)


def as_sync(axis_name: AxisName | None) -> Sync:
    """The `Sync` that is meant by a name, names, or `None`."""
    if isinstance(axis_name, Sync):
        return axis_name
    return Sync(() if axis_name is None else axis_name)


@checked(
    "ring",
    count=integer("a number of shards, at least 1", "count the shards", 1),
    reach=integer("a number of neighbours, at least 0", "pass 1 for one on either side", 0),
)
def ring(count: int, reach: int = 1) -> tuple[tuple[int, ...], ...]:
    """The `members` of a ring: each of `count` shards with `reach` neighbours on either side.

    >>> ring(4)
    ((3, 0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 0))
    """
    neighbours = range(-reach, reach + 1)
    return tuple(tuple(dict.fromkeys((i + k) % count for k in neighbours)) for i in range(count))


class Plan(NamedTuple):
    """A `Sync` for given devices and examples.

    Attributes:
      shards: Parts of each device's batch.
      block: If positive, consecutive shards of this number are merged, and no block is in two
        devices.
      members: Of each shard, by number, else: with which it is merged. `None` for all.
    """

    shards: int
    block: int
    members: tuple[tuple[int, ...], ...] | None


def plan(where: str, sync: Sync, sizes: Sequence[int], examples: int) -> Plan:
    """Cuts a batch of `examples` on each device of a grid.

    Args:
      where: The caller, for errors.
      sync: How.
      sizes: The number of devices along each of its axes.
      examples: The number of examples on each.

    Raises:
      ValueError: If it cannot be cut so, or groups are not a partition of the shards.
    """
    devices = math.prod(sizes)
    shards, groups = sync.shards, sync.groups
    if sync.virtual_batch is not None:
        if devices * examples % sync.virtual_batch:
            raise invalid(
                where,
                f"a virtual batch of {sync.virtual_batch} examples for a batch of "
                f"{devices * examples} ({devices} x {examples})",
                "a batch that is a multiple of it",
                f"use a virtual batch of {_divisor(devices * examples, sync.virtual_batch)}",
            )
        size = math.gcd(examples, sync.virtual_batch)
        shards, groups = examples // size, sync.virtual_batch // size
    if not examples or examples % shards:
        raise invalid(
            where,
            f"{shards} shards of a device's batch of {examples}",
            "a number of shards that divides the batch",
            f"use {_divisor(examples, shards)} shards" if examples else "give the batch examples",
        )
    count = devices * shards
    if sync.together is not None:
        return Plan(1, 0, _along(sync, sizes))
    if sync.members is not None:
        return Plan(shards, 0, _members(where, sync.members, count))
    if isinstance(groups, int):
        if count % groups:
            raise invalid(
                where,
                f"groups of {groups} for {_shards(devices, shards)}",
                "a size that divides them",
                f"use groups of {_divisor(count, groups)}",
            )
        if shards % groups == 0:
            return Plan(shards, groups, None)
        groups = tuple(tuple(range(i, i + groups)) for i in range(0, count, groups))
    if groups is None:
        return Plan(1, 0, None)
    return Plan(shards, 0, _partition(where, groups, devices, shards))


def _along(sync: Sync, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Of each device those that differ from it along `together` alone."""
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    inner = tuple(i for i, name in enumerate(sync.names) if name in sync.near)
    rows = np.moveaxis(grid, inner, range(-len(inner), 0))
    groups = rows.reshape(-1, math.prod(sizes[i] for i in inner))
    found = {int(i): tuple(map(int, group)) for group in groups for i in group}
    return tuple(found[i] for i in range(grid.size))


def _members(where: str, members: Sequence[Sequence[int]], count: int) -> Any:
    if len(members) != count:
        raise invalid(
            where,
            f"members for {len(members)} shards where there are {count}",
            "one tuple for each",
            f"give {count} of them, as ring({count}) does",
        )
    for i, row in enumerate(members):
        if not row or any(not 0 <= j < count for j in row):
            raise invalid(
                where,
                f"the members {tuple(row)} of shard {i}",
                f"numbers of shards, 0 to {count - 1}, at least one",
                f"mend members[{i}]; a shard on its own is ({i},)",
            )
    return tuple(map(tuple, members))


def _partition(where: str, groups: Sequence[Sequence[int]], devices: int, shards: int) -> Any:
    count = devices * shards
    of = {i: tuple(group) for group in groups for i in group}
    number = sum(map(len, groups))
    if not all(groups) or number != count or of.keys() != {*range(count)}:
        listed = collections.Counter(i for group in groups for i in group)
        wrong = {
            "empty groups at": [i for i, group in enumerate(groups) if not group],
            "missing": [i for i in range(count) if i not in of],
            "not there": sorted(i for i in of if not 0 <= i < count),
            "in more than one place": sorted(i for i, times in listed.items() if times > 1),
        }
        said = "; ".join(f"{what}: {_some(found)}" for what, found in wrong.items() if found)
        raise invalid(
            where,
            f"groups that do not partition {_shards(devices, shards)} ({said})",
            f"each of 0 to {count - 1} in one group",
            "mend the groups; a shard on its own is a group of one, and members may overlap",
        )
    return tuple(of[i] for i in range(count))


def _shards(devices: int, shards: int) -> str:
    return f"{devices} devices" if shards == 1 else f"{devices} x {shards} shards"


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


def _divisor(number: int, near: int) -> int:
    """The divisor of `number` that is nearest to `near`."""
    divisors = [k for k in range(1, number + 1) if number % k == 0]
    return min(divisors, key=lambda k: abs(k - near))
