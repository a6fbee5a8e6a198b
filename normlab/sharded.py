"""Examples that lie on several devices: which devices share one, and how what each saw is merged.

    tensor parallel      the channels of a position lie on several devices
    sequence parallel    the positions of an example do

A batch norm merges what devices measured of one channel, a norm of examples what they measured of
one example. The rules are the same (`normlab.devices`): one collective forward, of a few numbers
for each sample, and one backward.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from normlab._arguments import checked, either, instance
from normlab._checks import check_groups
from normlab._trees import static
from normlab._xla import partitioned
from normlab.devices.groups import merge_groups
from normlab.devices.mapped import axis_sizes, device_count, is_bound, vary
from normlab.devices.merging import differentiated, values_per_channel
from normlab.devices.topology import NAMES, AxisName, Sync, as_sync, plan
from normlab.devices.whole import merge_whole, pack, unpack
from normlab.errors import invalid
from normlab.measure import Moments


@static
@checked("Sharded", channels=NAMES, positions=NAMES)
@dataclasses.dataclass(frozen=True)
class Sharded:
    """Along which axes of devices the channels of an example lie, and along which its positions.

    Takes the place of an `axis_name` in the norms that measure each example by itself. A norm
    merges over the axes of what it measures over, and no others: layer norm of the channels takes
    in `channels` alone, instance norm `positions` alone; so one spec serves every norm of a net. A
    plain name means that what is measured over lies along it, whatever that is.

    Channels lie on the devices in their order, the first of them on the first device.

    Attributes:
      channels: The axes of devices that share the channels of a position.
      positions: The axes of devices that share the positions of an example.

    Raises:
      ValueError: If no axis is named, or one twice.

    >>> Sharded(channels="model")
    Sharded(channels='model', positions=())
    """

    channels: str | tuple[str, ...] = ()
    positions: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError if no axis is named, or one twice."""
        names = (*_names(self.channels), *_names(self.positions))
        if not names or len({*names}) < len(names):
            given = f"channels={self.channels!r} and positions={self.positions!r}"
            change = 'pass Sharded(channels="model"), or None where an example is on one device'
            raise invalid("Sharded", given, "at least one axis, each named once", change)


ExampleAxes = AxisName | Sharded
"""The name, or names, of axes along which an example lies; a `Sync` of them; or a `Sharded`."""

OVER = either(
    "the name of a mapped axis, a tuple of names, a Sync, or a Sharded",
    'pass for example axis_name="model", the axis along which each example lies',
    NAMES,
    instance(Sync, "", arrays=False),
    instance(Sharded, "", arrays=False),
)
"""What the `axis_name` of a norm of examples must be."""


def shared(where: str, axis_name: ExampleAxes | None, *, channels: bool, positions: bool) -> Sync:
    """Over which devices a sample is merged that takes in the channels, the positions, or both.

    Raises ValueError if an axis is not bound, or a `Sync` cuts the batch of a device.
    """
    if isinstance(axis_name, Sharded):
        of_channels, of_positions = _names(axis_name.channels), _names(axis_name.positions)
        _check_bound(where, axis_name, (*of_channels, *of_positions))
        return Sync((of_channels if channels else ()) + (of_positions if positions else ()))
    sync = as_sync(axis_name)
    if sync.shards > 1 or sync.virtual_batch or sync.every or not (sync.names or sync.whole):
        expected = "devices that hold parts of the same examples"
        raise invalid(where, f"{sync}", expected, "name the axes, and groups of devices, alone")
    _check_bound(where, axis_name, sync.names)
    return sync


def in_groups(
    where: str,
    axis_name: ExampleAxes | None,
    groups: int,
    channels: int,
    *,
    positions: bool = True,
) -> tuple[int, Sync]:
    """The groups that a device measures, of its `channels`, and over which devices it merges them.

    A device has several groups whole, or part of one.

    Args:
      where: The caller, for errors.
      axis_name: Along which axes an example lies.
      groups: Into how many groups all its channels are cut.
      channels: How many of them are on this device.
      positions: Whether a group takes in the positions.

    Raises:
      ValueError: If a group would be cut by the end of a device, or it is not said whether the
        channels or the positions lie along an axis.
    """
    sync = shared(where, axis_name, channels=True, positions=positions)
    if not isinstance(axis_name, Sharded):
        plain = sync == Sync(sync.axes)
        if groups == 1 or not sync.names:
            check_groups(where, groups, channels)
            return groups, sync
        if positions or not plain:
            expected = "whether channels or positions lie along it: a group has some channels"
            change = "pass axis_name=Sharded(channels=...) or axis_name=Sharded(positions=...)"
            raise invalid(where, f"groups={groups} with axis_name={axis_name!r}", expected, change)
        axis_name = Sharded(channels=sync.names)
    of_channels = _names(axis_name.channels)
    rest = _names(axis_name.positions) if positions else ()
    devices = device_count(of_channels)
    if groups >= 1 and groups % devices == 0 and channels % (groups // devices) == 0:
        return groups // devices, Sync(rest)
    if groups >= 1 and devices % groups == 0:
        block = devices // groups * device_count(rest)
        return 1, Sync((*of_channels, *rest), groups=None if groups == 1 else block)
    total = devices * channels
    fit = [g for g in range(1, total + 1) if devices % g == 0]
    fit += [g for g in range(devices, total + 1, devices) if total % g == 0 and g not in fit]
    raise invalid(
        where,
        f"groups={groups!r} of {total} channels, {channels} on each of {devices} devices",
        "groups of which no device has one whole and a part of another",
        f"use one of {', '.join(map(str, sorted(fit)))}",
    )


def sharers(where: str, axis_name: ExampleAxes | None) -> Any:
    """How many devices share an example, the fewest; 1 where none is named."""
    sync = shared(where, axis_name, channels=True, positions=True)
    return values_per_channel(where, sync, (1,), (0,))


def merged(where: str, m: Moments, sync: Sync, *, spread: bool = False) -> Moments:
    """The moments of samples of which each device has a part.

    With `spread` they are of the type of what differs between devices, where there are such types:
    at once, so that what flows back to them is added up by one collective.
    """
    if not sync.names:
        return m

    def run(mean: Array, m: Moments) -> Moments:
        del mean
        if sync.along:
            (found,), _ = merge_whole([m], sync.stages, second=sync.second)
        else:
            cut = plan(where, sync, axis_sizes(sync.names), 1)
            rank = m.mean.ndim - m.count.ndim
            one = m._replace(count=m.count.reshape((1,) * rank + m.count.shape))
            one = jax.tree.map(lambda f: f[None], one)
            one = one if cut.members is None else merge_groups(one, cut.members, sync.names)
            found = jax.tree.map(lambda f: f[0], one)
        found = differentiated(sync, m, found)
        return unpack(vary(pack([found]), sync.names), [found])[0][0] if spread else found

    return partitioned(run, m.mean, m)


def summed(where: str, sync: Sync, *values: Array, spread: bool = True) -> tuple[Array, ...]:
    """Sums over devices: of all the values by one collective, forward and backward.

    `spread` is as in `merged`.
    """
    if not sync.names:
        return values

    def run(first: Array, *rest: Array) -> tuple[Array, ...]:
        each = (first, *rest)
        v = _packed(each)
        if sync.along and sync.gradient == "both":
            for names in sync.stages:
                v = lax.psum(vary(v, names), names)
            v = vary(v, sync.names) if spread else v
        else:
            m = Moments(jnp.ones(1, v.dtype), v, jnp.zeros_like(v))
            m = merged(where, m, sync)
            v = m.mean * m.count
        return _unpacked(v, each)

    return partitioned(run, *values)


def averaged(
    where: str,
    sync: Sync,
    mean: Array,
    count: Array,
    *more: Array,
    weighted: bool,
    spread: bool = True,
) -> tuple[Array, ...]:
    """The means over devices of what each has a mean and a count of, the counts, and `more` sums.

    Without weights every device has counted as many, and the means are all that is sent. `spread`
    is as in `merged`.
    """
    if not sync.names:
        return mean, count, *more
    if sync.along and not weighted:
        total, *sums = summed(where, sync, mean, *more, spread=spread)
        devices = device_count(sync.near)
        return total / devices, count * devices, *sums
    total, n, *sums = summed(where, sync, mean * count, count, *more, spread=spread)
    return total / jnp.where(n > 0, n, 1), n, *sums


def largest(sync: Sync, *values: Array) -> tuple[Array, ...]:
    """The largest values of all devices, without a gradient, by one collective."""
    values = tuple(map(lax.stop_gradient, values))
    if not sync.names:
        return values

    def run(*each: Array) -> tuple[Array, ...]:
        return _unpacked(lax.pmax(vary(_packed(each), sync.names), sync.names), each)

    return partitioned(run, *values)


def channels_in_all(axis_name: ExampleAxes | None, channels: int) -> int:
    """How many channels there are on all devices; where no axis is bound all are here."""
    axis_name = where_bound(axis_name)
    names = axis_name.channels if isinstance(axis_name, Sharded) else as_sync(axis_name).names
    return channels * device_count(_names(names))


def where_bound(axis_name: ExampleAxes | None) -> ExampleAxes | None:
    """The axes where they are mapped, else `None`: what is there is the whole example.

    So it is where `init` is called before the map.
    """
    return axis_name if axis_name is None or is_bound(names_of(axis_name)) else None


def names_of(axis_name: ExampleAxes | None) -> tuple[str, ...]:
    """All the axes that are named."""
    if isinstance(axis_name, Sharded):
        return (*_names(axis_name.channels), *_names(axis_name.positions))
    return as_sync(axis_name).names


def _packed(values: Sequence[Array]) -> Array:
    return jnp.concatenate([v.ravel() for v in values])


def _unpacked(v: Array, like: Sequence[Array]) -> tuple[Array, ...]:
    ends = list(itertools.accumulate(one.size for one in like))
    parts = jnp.split(v, ends[:-1])
    return tuple(part.reshape(one.shape) for part, one in zip(parts, like, strict=True))


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _check_bound(where: str, given: Any, names: tuple[str, ...]) -> None:
    if names and not is_bound(names):
        raise invalid(
            where,
            f"axis_name={given!r}",
            "mapped axes, along which each example lies",
            "call this inside shard_map, pmap or vmap with such an axis; in plain jit pass "
            "axis_name=None: there the whole example is one array, however it is sharded",
        )
