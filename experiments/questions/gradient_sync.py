"""Must the gradient see the synchronization?

Claim: It is enough to merge the statistics forward; a backward pass that sees each device's own
moments alone, and needs no collective, trains as well. To merge in the backward pass alone does not
do, nor do statistics that are held constant in the gradient: the gradient step must account for the
normalization.

Source: Ioffe & Szegedy 2015, section 2, https://arxiv.org/abs/1502.03167: the model blew up in
first experiments whose gradient ignored the normalization; the paper counts no points. What one
pass alone does is ours; cross-device batch norm is of Peng et al. 2018,
https://arxiv.org/abs/1711.07240, whose abstract does not speak of the backward pass.

Protocol: Fashion-MNIST, an MLP (three layers of 100 sigmoids), 800 steps of SGD with momentum 0.9
on 8 devices with 4 examples each, at a rate that falls linearly from 0.05 to 0, for all: at a
constant one seeds end further apart than what is asked for here. The statistics are those of all
devices forward (except for "backward"), and there are four gradients: `Sync(gradient=...)`.

Command: normlab run gradient_sync
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Records, Schedule, Source, Verdict, decide, draw
from ..engine.devices import Config, learn

POINTS = 0.5
"""Points of test accuracy that a gradient of the forward statistics may cost at most; and that the
others cost, if it is much. Ours, set before the first run; that "backward" does not do is worded
after runs of seeds 0 to 4."""

SOURCE = Source("ioffe2015", "section 2", "the model blew up")


@dataclasses.dataclass(frozen=True)
class GradientSync(Config):
    """The config.

    Attributes:
      gradients: What the gradient sees, beside "both".
    """

    gradients: tuple[nl.devices.Gradient, ...] = ("forward", "backward", "none")
    schedule: Schedule = "linear"
    steps: int = 800
    evaluations: int = 5


QUICK = GradientSync()
SECONDS = 190
FULL = GradientSync(dataset="cifar10", model="conv", steps=20_000, evaluations=20)


def run(config: GradientSync) -> Iterator[Condition]:
    """Trains with each gradient."""
    syncs = {"both": nl.Sync(config.axes)}
    syncs |= {gradient: nl.Sync(config.axes, gradient=gradient) for gradient in config.gradients}
    for name, sync in syncs.items():
        yield Condition({"condition": name}, learn(config, sync))


def verdict(records: Records) -> Iterator[Verdict]:
    """What each gradient costs against that of both passes."""
    claims = {
        "forward": "forward alone trains as well as both (accuracy lost)",
        "backward": "backward alone does not do (accuracy lost)",
        "none": "statistics held constant do not do (accuracy lost)",
    }
    for name in records.where(lambda r: r["condition"] in claims).values("condition"):
        lost = records.accuracy("both") - records.accuracy(name)
        how: dict[str, Any] = (
            {"at_most": POINTS} if name == "forward" else {"at_least": 0, "size": POINTS}
        )
        source = SOURCE if name == "none" else None
        yield decide(name, claims[name], lost, unit="points", untuned=True, source=source, **how)


def figure(records: Records) -> Figure:
    """Learning curves, and the test error at the end."""
    ends = records.where(kind="evaluation")
    picture, (left, right) = draw.canvas(2)
    draw.over_steps(left, ends, draw.test_error, by="condition", marker=True)
    draw.frame(left, log=True)
    draw.columns(right, {name: 100 - ends.accuracy(name) for name in ends.values("condition")})
    right.set_title(f"after {max(ends.values('step'))} steps")
    title = "What the gradient sees: median, band of all seeds; mean, 95% interval"
    return draw.finish(picture, title)
