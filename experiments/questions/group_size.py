"""How many devices should be normalized together?

Claim: At a few examples per device, batch norm over each device alone costs accuracy, the more the
fewer there are, and merging the statistics of a group of devices wins it back. A device's batch
that is cut into parts of as few loses as much.

Source: Wu & He 2018, section 4.1 and table 2, https://arxiv.org/abs/1803.08494, for what few
examples per device cost: there all of a step's examples become fewer, here they stay. The cure is
that of Peng et al. 2018, https://arxiv.org/abs/1711.07240, and Ying et al. 2018,
https://arxiv.org/abs/1811.06992, whose abstracts have no number for it. More is not better without
end: Wu & Johnson 2021, https://arxiv.org/abs/2105.07576, are said to find the best error at 32 to
128, and parts of a large batch generalize better than the whole in Hoffer et al. 2017,
https://arxiv.org/abs/1705.08741; neither is asked here.

Protocol: Fashion-MNIST, an MLP (three layers of 100 sigmoids), 400 steps of SGD with momentum 0.9
on 8 devices, at a rate that falls linearly from 0.05 to 0, the same batches and kernels for all
conditions; groups of 1, 2 and 8 devices, and parts of a device's batch. The running statistics are
those of all devices in every condition, so that only the training differs.

Command: normlab run group_size
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Records, Schedule, Source, Verdict, decide, draw
from ..engine.devices import Config, learn

GAIN = 0.5
"""Points of test accuracy by which all devices together are better than each alone, and each
device's batch than its smallest parts, if it is by much. Ours, set before the first run."""

ERRORS = {2: 34.7, 4: 27.3, 8: 24.8, 16: 23.7, 32: 23.6}
"""Percent that Wu & He found, by the examples that were normalized together."""


def source(few: int, many: int) -> Source:
    """Their numbers for so many examples together; they have none for more than 32."""
    many = min(many, max(ERRORS))
    known = {few, many} <= ERRORS.keys()
    number = f"{ERRORS[few]} → {ERRORS[many]}% error from {few} to {many} together" if known else ""
    return Source("wu2018", "table 2", number)


@dataclasses.dataclass(frozen=True)
class GroupSize(Config):
    """The config.

    Attributes:
      per_devices: Examples per device, in the place of `per_device`.
      groups: Devices in a group.
      ghost: Examples in the parts of a device's batch.
    """

    INSTEAD: ClassVar = {"per_device": "--per-devices"}

    per_devices: tuple[int, ...] = (2, 8)
    groups: tuple[int, ...] = (1, 2, 8)
    ghost: tuple[int, ...] = (2,)
    schedule: Schedule = "linear"
    steps: int = 400
    evaluations: int = 2


QUICK = GroupSize()
SECONDS = 250
FULL = GroupSize(
    dataset="cifar10",
    model="conv",
    per_devices=(2, 4, 8),
    groups=(1, 2, 4, 8),
    ghost=(2, 4),
    steps=20_000,
    evaluations=20,
)


def run(config: GroupSize) -> Iterator[Condition]:
    """Trains each group size at each batch per device."""
    for per_device in config.per_devices:
        here = dataclasses.replace(config, per_device=per_device)
        for part in config.ghost:
            if part < per_device:
                sync = nl.Sync(config.axes, shards=per_device // part, groups=1)
                labels = {"per_device": per_device, "together": part, "group": 0}
                yield Condition(labels, learn(here, sync))
        for group in config.groups:
            together = group * per_device
            labels = {"per_device": per_device, "together": together, "group": group}
            yield Condition(labels, learn(here, here.grouped(group)))


def verdict(records: Records) -> Iterator[Verdict]:
    """All together against each alone, each alone against its parts, at every batch size."""
    for per_device in sorted(records.values("per_device")):
        here = records.where(per_device=per_device)
        how = {"at_least": 0, "size": GAIN, "unit": "points", "untuned": True}
        most = max(here.values("group"))
        alone = here.accuracy(group=1)
        gain = here.accuracy(group=most) - alone
        claim = f"{per_device} per device: {most} devices together beat each alone"
        theirs = source(per_device, most * per_device)
        yield decide(f"per-device-{per_device}.all", claim, gain, source=theirs, **how)
        parts = sorted(here.where(group=0).values("together"))
        if parts:
            loss = alone - here.accuracy(group=0, together=parts[0])
            claim = f"{per_device} per device: a device's batch beats its parts of {parts[0]}"
            theirs = source(parts[0], per_device)
            yield decide(f"per-device-{per_device}.parts", claim, loss, source=theirs, **how)


def figure(records: Records) -> Figure:
    """The test error at the end against the number of examples normalized together."""
    picture, (axes,) = draw.canvas(width=6.4, height=4.2)
    for size, style in draw.styles(sorted(records.values("per_device"))).items():
        for ghost, label in ((False, "devices"), (True, "parts of a device's batch")):
            here = records.where(lambda r, ghost=ghost: (not r["group"]) == ghost, per_device=size)
            places = sorted(here.values("together"))
            errors = [100 - here.accuracy(together=n) for n in places]
            look = {**style, "ls": ":" if ghost else "-", "mfc": "w" if ghost else None}
            if places:
                draw.spread(axes, places, errors, label=f"{size} per device: {label}", **look)
    axes.set(xlabel="examples normalized together", ylabel="test error (%)")
    draw.frame(axes, doubling=True, log=True, legend=True)
    last = max(records.values("step"))
    picture.suptitle(f"Group size: {last} steps; mean and 95% interval over seeds", fontsize=10)
    return picture
