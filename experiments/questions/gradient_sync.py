"""Must the gradient see the synchronization?

Claim: It is enough to merge the statistics forward; a backward pass that sees each device's own
moments alone, and needs no collective, trains as well. Statistics that are held constant in the
gradient do not do: the gradient step must account for the normalization.

Source: Peng et al. 2018, who merge in both passes, https://arxiv.org/abs/1711.07240; Ioffe &
Szegedy 2015, section 2, https://arxiv.org/abs/1502.03167

Protocol: Fashion-MNIST, an MLP (three layers of 100 sigmoids), 1,000 steps of SGD with momentum 0.9
at rate 0.05 on 8 devices with 4 examples each, statistics of all devices forward (except for
"backward"), and four gradients: `Sync(gradient=...)`. Beside it, each device alone.

Command: python -m experiments run gradient_sync
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Records, Verdict, decide, draw
from ..engine.devices import Config, learn

LOSS = 0.5
"""Points of test accuracy that a gradient of one pass may cost."""

CONSTANT = 0.5
"""Points of test accuracy that statistics held constant must cost at least."""


@dataclasses.dataclass(frozen=True)
class GradientSync(Config):
    """The config.

    Attributes:
      gradients: What the gradient sees, beside "both".
    """

    gradients: tuple[nl.devices.Gradient, ...] = ("forward", "backward", "none")


QUICK = GradientSync()
SECONDS = 145
FULL = GradientSync(dataset="cifar10", model="conv", steps=20_000, evaluations=20, seeds=10)


def run(config: GradientSync) -> Iterator[Condition]:
    """Trains with each gradient, and each device alone."""
    syncs = {"both": nl.Sync(config.axes), "local": nl.Sync(config.axes, groups=1)}
    syncs |= {gradient: nl.Sync(config.axes, gradient=gradient) for gradient in config.gradients}
    for name, sync in syncs.items():
        yield Condition({"condition": name}, learn(config, sync))


def verdict(records: Records) -> Iterator[Verdict]:
    """What each gradient costs against that of both passes."""
    for name in records.values("condition"):
        lost = records.accuracy("both") - records.accuracy(name)
        if name in ("forward", "backward"):
            claim = f"{name} alone trains as well as both (accuracy lost)"
            yield decide(claim, lost, at_most=LOSS, unit="points")
        if name == "none":
            claim = "statistics held constant lose accuracy"
            yield decide(claim, lost, at_least=CONSTANT, unit="points")


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
