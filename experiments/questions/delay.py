"""Can the statistics of other devices be some steps old?

Claim: Statistics that are one step or a few steps old serve as well as fresh ones, so that a net
needs one collective per step or less. Against it: statistics of earlier iterations, taken as they
are, were found to do no good, because the weights have changed.

Source: Yao et al. 2021, cross-iteration batch norm, https://arxiv.org/abs/2002.05712

Protocol: Fashion-MNIST, an MLP (three layers of 100 sigmoids), 1,000 steps of SGD with momentum 0.9
at rate 0.05 on 8 devices with 4 examples each. Each device merges its
own moments with those that the others had when statistics were last exchanged, every 1, 2, 4, …
steps. Beside it fresh statistics of all devices, and each device alone. What is received carries no
gradient, so that the gradient sees the device's own moments alone: with their share of the merged
ones, or ("forward") as if they were the merged ones. "fresh, forward" and "fresh, constant" (no
gradient through statistics) tell apart what is due to age and what to that.

Command: python -m experiments run delay
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Records, Verdict, decide, draw
from ..engine.devices import Config, learn

LOSS = 0.5
"""Points of test accuracy that old statistics may cost."""


@dataclasses.dataclass(frozen=True)
class Delay(Config):
    """The config.

    Attributes:
      every: After how many steps statistics are exchanged.
      references: Whether to train with the two other gradients of fresh statistics.
    """

    every: tuple[int, ...] = (1, 2, 4, 8)
    references: bool = True


QUICK = Delay()
SECONDS = 385
FULL = Delay(
    dataset="cifar10",
    model="conv",
    every=(1, 2, 4, 8, 16, 32),
    steps=20_000,
    evaluations=20,
    seeds=10,
)


def run(config: Delay) -> Iterator[Condition]:
    """Trains with fresh statistics, with each delay, and with none of the others'."""
    syncs = {"fresh": nl.Sync(config.axes), "local": nl.Sync(config.axes, groups=1)}
    if config.references:
        syncs["fresh, forward"] = nl.Sync(config.axes, gradient="forward")
        syncs["fresh, constant"] = nl.Sync(config.axes, gradient="none")
    for every in config.every:
        syncs[f"every {every}"] = nl.Sync(config.axes, every=every)
        syncs[f"every {every}, forward"] = nl.Sync(config.axes, every=every, gradient="forward")
    for name, sync in syncs.items():
        yield Condition({"condition": name}, learn(config, sync))


def verdict(records: Records) -> Iterator[Verdict]:
    """What the delays cost against fresh statistics, and against none of the others'."""
    fresh, local = records.accuracy("fresh"), records.accuracy("local")
    names = records.values("condition")
    for name in (name for name in names if name.startswith("every")):
        delayed = records.accuracy(name)
        claim = f"statistics exchanged {name} serve as well as fresh ones (accuracy lost)"
        yield decide(claim, fresh - delayed, at_most=LOSS, unit="points")
        claim = f"statistics exchanged {name} serve better than each device's own"
        yield decide(claim, delayed - local, at_least=0, unit="points")


def figure(records: Records) -> Figure:
    """The test error at the end against the delay, beside that of each reference."""
    errors = {name: 100 - records.accuracy(name) for name in records.values("condition")}
    references = [name for name in errors if not name.startswith("every")]
    delays = sorted({int(name.split()[1].strip(",")) for name in errors if name not in references})
    gradients = {"": "own moments by their share", ", forward": "own moments whole"}
    styles = draw.styles([*gradients, *references])
    picture, (axes,) = draw.canvas(width=8, height=4.2)
    for gradient, label in gradients.items():
        values = [errors[f"every {delay}{gradient}"] for delay in delays]
        draw.spread(axes, delays, values, label=f"old, {label}", **styles[gradient])
    for at, name in enumerate(references, 1):
        place = 2 * max(delays) * 1.25**at
        draw.spread(axes, [place], [errors[name]], label=name, ls="", **styles[name])
        axes.axhline(float(np.mean(errors[name])), color=styles[name]["color"], lw=0.8, ls=":")
    draw.frame(axes, xlabel="steps between exchanges", doubling=True, ticks=delays)
    axes.set_ylabel("test error (%)")
    picture.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    last = max(records.values("step"))
    picture.suptitle(f"Delayed statistics: {last} steps; mean and 95% interval", fontsize=10)
    return picture
