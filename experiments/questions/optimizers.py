"""Does batch norm help under every optimizer?

Claim: A net with batch norm is more accurate after the same number of steps of SGD, SGD with
momentum, RMSprop and Adam, each at its own best learning rate.

Source: Ioffe & Szegedy 2015, section 3.1, https://arxiv.org/abs/1502.03167: a net with batch norm
can be trained with SGD or any of its variants, such as Adagrad. The other three are ours.

Protocol: The net of the paper's figure 1, three hidden layers of 100 sigmoids, on MNIST, batches of
60, 1,500 steps over which the learning rate falls linearly to 0, each net and optimizer at the best
of three first rates. Measured is the test accuracy at the end. The threshold is what batch norm has
to win in figure 1.

Command: python -m experiments run optimizers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Verdict, decide, draw, lanes, learn

GAIN = 0.3
"""Points of test accuracy that batch norm is better at the end, at least."""

RATES = {
    "sgd": (1.0, 3.0, 10.0),
    "momentum": (0.3, 1.0, 3.0),
    "rmsprop": (0.003, 0.01, 0.03),
    "adam": (0.003, 0.01, 0.03),
}
"""The first learning rates that each optimizer tries."""


@dataclasses.dataclass(frozen=True)
class Optimizers(Config):
    """The config.

    Attributes:
      norms: What stands before each sigmoid.
      optimizers: Names of `RATES`, in the place of `optimizer`.
    """

    norms: tuple[str, ...] = ("none", "batch")
    optimizers: tuple[str, ...] = tuple(RATES)
    schedule: Schedule = "linear"
    steps: int = 1500
    evaluations: int = 2


QUICK = Optimizers()
SECONDS = 100
FULL = Optimizers(steps=50_000, evaluations=50, seeds=10)


def run(config: Optimizers) -> Iterator[Condition]:
    """Each optimizer and norm, with all rates and seeds side by side."""
    for optimizer in config.optimizers:
        here = dataclasses.replace(config, optimizer=optimizer)
        for norm in config.norms:
            rows = lanes(here, lr=RATES[optimizer])
            measure = learn(here, nl.get(norm), side_by_side=rows)
            yield Condition({"norm": norm, "optimizer": optimizer}, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """The gain under each optimizer."""
    best = records.tuned("optimizer", "norm")
    for optimizer in best.values("optimizer"):
        none, batch = (best.accuracy(optimizer=optimizer, norm=n) for n in ("none", "batch"))
        claim = f"{optimizer} at its best rate: batch norm ends more accurate"
        yield decide(claim, batch - none, at_least=GAIN, unit="points")


def figure(records: Records) -> Figure:
    """The test error at the end under each optimizer."""
    best = records.tuned("optimizer", "norm")
    names, norms = (best.values(key) for key in ("optimizer", "norm"))
    picture, (axes,) = draw.canvas(width=5.5)
    place = {(o, n): i + 0.15 * j for i, o in enumerate(names) for j, n in enumerate(norms)}
    draw.against(axes, best, lambda r: place[r["optimizer"], r["norm"]], draw.test_error, ls="")
    axes.set_xticks(range(len(names)), names)
    draw.frame(axes, xlabel="optimizer", legend=True)
    return picture
