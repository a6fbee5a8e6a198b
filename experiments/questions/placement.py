"""Should batch norm stand before the activation or after it?

Claim: Before: the outputs of a nonlinearity change the shape of their distribution over training,
so that fixing their mean and variance helps less.

Source: Ioffe & Szegedy 2015, section 3.2, https://arxiv.org/abs/1502.03167, which gives the reason
and no experiment.

Protocol: MNIST, three hidden layers of 100 sigmoids or ReLUs, batches of 60, 1,000 steps of plain
SGD, over which the learning rate falls linearly to 0, each placement at the best of four first
rates. Before is f(norm(w·x)), after is norm(f(w·x + b)). Measured is the test accuracy at the end.
What counts as better is ours: as many points as batch norm has to win in figure 1.

Command: python -m experiments run placement
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Verdict, decide, draw, lanes, learn

GAIN = 0.3
"""Points of test accuracy that the norm before the activation is better, at least."""


@dataclasses.dataclass(frozen=True)
class Placement(Config):
    """The config.

    Attributes:
      activations: Names of functions of `flax.linen`.
      placements: Where the norm stands.
      rates: First learning rates, of which each net has its best.
    """

    activations: tuple[str, ...] = ("sigmoid", "relu")
    placements: tuple[str, ...] = ("before", "after")
    rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    schedule: Schedule = "linear"
    evaluations: int = 5
    seeds: int = 4


QUICK = Placement()
SECONDS = 55
FULL = Placement(dataset="cifar10", model="vgg", batch_size=128, steps=30_000, seeds=10)


def run(config: Placement) -> Iterator[Condition]:
    """Each activation and placement, with all rates and seeds side by side."""
    rows = lanes(config, lr=config.rates)
    for activation in config.activations:
        for placement in config.placements:
            options = {"activation": getattr(nn, activation), "placement": placement}
            measure = learn(config, nl.get("batch"), side_by_side=rows, **options)
            yield Condition({"activation": activation, "placement": placement}, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """Before against after, with each activation."""
    best = records.tuned("activation", "placement")
    for activation in best.values("activation"):
        here = best.where(activation=activation)
        before, after = (here.accuracy(placement=p) for p in ("before", "after"))
        claim = f"batch norm before the {activation} is more accurate than after it"
        yield decide(claim, before - after, at_least=GAIN, unit="points")


def figure(records: Records) -> Figure:
    """The test error on the way, each placement at its best rate, a panel for each activation."""
    best = records.at_best_rate("activation", "placement").trained()
    picture, panels = draw.panels(best, "activation", width=4)
    for axes, activation, here in panels:
        draw.over_steps(axes, here, draw.test_error, by="placement", marker=True)
        draw.frame(axes, log=True, title=activation)
    return draw.finish(picture)
