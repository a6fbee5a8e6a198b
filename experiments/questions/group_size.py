"""Does accuracy grow with the number of devices that are normalized together?

Claim: At a few examples per device, batch norm over each device alone costs accuracy, the more the
fewer there are, and merging the statistics of a group of devices wins it back. The same should be
so of parts of a device's batch ("ghost batches"): what counts is how many examples are normalized
together.

Source: Wu & He 2018, https://arxiv.org/abs/1803.08494; Peng et al. 2018,
https://arxiv.org/abs/1711.07240; Ying et al. 2018, https://arxiv.org/abs/1811.06992; Hoffer et al.
2017, https://arxiv.org/abs/1705.08741

Protocol: Fashion-MNIST, an MLP (three layers of 100 sigmoids), 600 steps of SGD with momentum 0.9
at rate 0.05 on 8 devices, the same batches and kernels for all conditions; groups of 1, 2, 4 and 8
devices, and parts of a device's batch. The running statistics are those of all devices in every
condition, so that only the training differs.

Command: python -m experiments run group_size
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Records, Verdict, decide, draw
from ..engine.devices import Config, learn

GAIN = 0.5
"""Points of test accuracy that all devices together must be better than each alone, and each
device's batch than its smallest parts."""


@dataclasses.dataclass(frozen=True)
class GroupSize(Config):
    """The config.

    Attributes:
      per_devices: Examples per device, in the place of `per_device`.
      groups: Devices in a group.
      ghost: Examples in the parts of a device's batch.
    """

    per_devices: tuple[int, ...] = (2, 8)
    groups: tuple[int, ...] = (1, 2, 4, 8)
    ghost: tuple[int, ...] = (2, 4)
    steps: int = 600
    evaluations: int = 5


QUICK = GroupSize()
SECONDS = 235
FULL = GroupSize(
    dataset="cifar10",
    model="conv",
    per_devices=(2, 4, 8),
    steps=20_000,
    evaluations=20,
    seeds=10,
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
        most = max(here.values("group"))
        alone = here.accuracy(group=1)
        gain = here.accuracy(group=most) - alone
        claim = f"{per_device} per device: {most} devices together beat each alone"
        yield decide(claim, gain, at_least=GAIN, unit="points")
        parts = sorted(here.where(group=0).values("together"))
        if parts:
            loss = alone - here.accuracy(group=0, together=parts[0])
            claim = f"{per_device} per device: a device's batch beats its parts of {parts[0]}"
            yield decide(claim, loss, at_least=GAIN, unit="points")


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
