"""Should batch norm stand before the activation or after it?

Claim: Before a ReLU and after a sigmoid: a net with batch norm is more accurate so.

Source: None says it. Ioffe & Szegedy 2015, section 3.2, https://arxiv.org/abs/1502.03167, stand
before the activation, for a reason and without an experiment: the outputs of a nonlinearity change
the shape of their distribution over training. The side is that of a pilot.

Protocol: MNIST, three hidden layers of 100 sigmoids or ReLUs, batches of 60, 1,000 steps of plain
SGD, over which the learning rate falls linearly to 0, each placement at the best of five or more
first rates. Before is f(norm(w·x)), after is norm(f(w·x + b)). Measured is the test accuracy at the
end.

Command: normlab run placement
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Verdict, decide, draw, tuned

BETTER = {"sigmoid": "after", "relu": "before"}
"""Where the norm is to stand, by the activation: as on seeds that were looked at first."""


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
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    schedule: Schedule = "linear"
    evaluations: int = 5


QUICK = Placement()
SECONDS = 120
FULL = Placement(dataset="cifar10", model="vgg", batch_size=128, steps=30_000)


def run(config: Placement) -> Iterator[Condition]:
    """Each activation and placement."""
    for activation in config.activations:
        for placement in config.placements:
            options = {"activation": getattr(nn, activation), "placement": placement}
            measure = tuned(config, nl.get("batch"), config.rates, **options)
            yield Condition({"activation": activation, "placement": placement}, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """One placement against the other, with each activation."""
    for activation in records.values("activation"):
        here = records.where(activation=activation)
        better = BETTER.get(activation, "before")
        [worse] = {"before", "after"} - {better}
        gain = here.accuracy(placement=better) - here.accuracy(placement=worse)
        claim = f"batch norm {better} the {activation} is more accurate than {worse} it"
        yield decide(activation, claim, gain, at_least=0, unit="points")


def figure(records: Records) -> Figure:
    """The test error on the way, each placement at its best rate, a panel for each activation."""
    trained = records.where(kind="evaluation").trained()
    picture, panels = draw.panels(trained, "activation", width=4)
    for axes, activation, here in panels:
        draw.over_steps(axes, here, draw.test_error, by="placement", marker=True)
        draw.frame(axes, log=True, title=activation)
    return draw.finish(picture)
