"""Does batch norm help under every optimizer?

Claim: A net with batch norm can be trained with SGD or any of its variants, and ends more accurate
than one without, each at its own best learning rate.

Source: Ioffe & Szegedy 2015, section 3.1, https://arxiv.org/abs/1502.03167, for the first half: SGD
with minibatches, or variants such as Adagrad. That batch norm ends more accurate is ours.

Protocol: The net of the paper's figure 1, three hidden layers of 100 sigmoids, on MNIST, batches of
60, 1,000 steps over which the learning rate falls linearly to 0, each net and optimizer at the best
of four or more first rates. Measured is the test accuracy at the end.

Command: normlab run optimizers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Source, Verdict, decide, draw, tuned

TRAINS = 90.0
"""Percent of the test set that a net which was trained gets right, at least; chosen before any run
of this claim. A linear model gets 92."""

RATES = {
    "sgd": (0.3, 1.0, 3.0, 10.0),
    "momentum": (0.1, 0.3, 1.0, 3.0),
    "adagrad": (0.01, 0.03, 0.1, 0.3),
    "rmsprop": (0.001, 0.003, 0.01, 0.03),
    "adam": (0.001, 0.003, 0.01, 0.03),
}
"""The first learning rates that each optimizer tries."""

SOURCE = Source("ioffe2015", "section 3.1")


@dataclasses.dataclass(frozen=True)
class Optimizers(Config):
    """The config.

    Attributes:
      norms: What stands before each sigmoid.
      optimizers: Names of `RATES`, in the place of `optimizer`.
    """

    INSTEAD: ClassVar = {"optimizer": "--optimizers"}

    norms: tuple[str, ...] = ("none", "batch")
    optimizers: tuple[str, ...] = tuple(RATES)
    schedule: Schedule = "linear"
    evaluations: int = 1


QUICK = Optimizers()
SECONDS = 240
FULL = Optimizers(steps=50_000, evaluations=50)


def run(config: Optimizers) -> Iterator[Condition]:
    """Each optimizer and norm."""
    for optimizer in config.optimizers:
        here = dataclasses.replace(config, optimizer=optimizer)
        for norm in config.norms:
            measure = tuned(here, nl.get(norm), RATES[optimizer])
            yield Condition({"norm": norm, "optimizer": optimizer}, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """Whether batch norm trains under each optimizer, and its gain."""
    for optimizer in records.values("optimizer"):
        none, batch = (records.accuracy(optimizer=optimizer, norm=n) for n in ("none", "batch"))
        claim = f"{optimizer} trains a net with batch norm (test accuracy)"
        id = f"{optimizer}.trains"
        yield decide(id, claim, batch, at_least=TRAINS, unit="%", source=SOURCE)
        claim = f"{optimizer} at its best rate: batch norm ends more accurate"
        yield decide(f"{optimizer}.gain", claim, batch - none, at_least=0, unit="points")


def figure(records: Records) -> Figure:
    """The test error at the end under each optimizer."""
    best = records.last()
    names, norms = (best.values(key) for key in ("optimizer", "norm"))
    picture, (axes,) = draw.canvas(width=5.5)
    place = {(o, n): i + 0.15 * j for i, o in enumerate(names) for j, n in enumerate(norms)}
    draw.against(axes, best, lambda r: place[r["optimizer"], r["norm"]], draw.test_error, ls="")
    axes.set_xticks(range(len(names)), names)
    draw.frame(axes, xlabel="optimizer", legend=True)
    return picture
