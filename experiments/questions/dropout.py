"""Does a net with batch norm need less dropout?

Claim: Batch norm does some of what dropout is for: with it dropout can be left out, and the net is
no less accurate.

Source: Ioffe & Szegedy 2015, sections 3.4 and 4.2, https://arxiv.org/abs/1502.03167: with batch
norm dropout can be removed or reduced. Inception with batch norm has none, at no more overfitting,
and at 30 times the learning rate ends at 74.8% where Inception, with dropout, ends at 72.2%; the
ensemble leaves out 5 or 10% in the place of 40%. What dropout wins is not compared there, and what
counts as a difference is ours.

Protocol: 2,000 examples of MNIST, drawn anew with each seed, few enough to be learned by heart;
three hidden layers of 100 ReLUs, batches of 60, 1,500 steps of SGD with momentum 0.9, over which
the learning rate falls linearly to 0. Dropout behind each ReLU leaves out 0, 20 or 50% of the
outputs. Each net has the best of four or more first rates. What dropout wins is the accuracy at the
better of the two positive shares less that without; the better one is chosen with the rates, on
held-out images.

Command: normlab run dropout
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import flax.linen as nn
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Source, Verdict, decide, draw, tuned
from .data_size import few

POINTS = 0.3
"""Points of test accuracy: dropout wins so many more without a norm, and with batch norm so many at
most. As many as batch norm has to win in figure 1, chosen before any run."""


@dataclasses.dataclass(frozen=True)
class Dropout(Config):
    """The config.

    Attributes:
      norms: What stands before each ReLU.
      shares: What dropout leaves out.
      rates: First learning rates, of which each net has its best.
      examples: Training examples.
    """

    norms: tuple[str, ...] = ("none", "batch")
    shares: tuple[float, ...] = (0.0, 0.2, 0.5)
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    examples: int = 2000
    optimizer: str = "momentum"
    schedule: Schedule = "linear"
    steps: int = 1500
    evaluations: int = 1


QUICK = Dropout()
SECONDS = 250
FULL = Dropout(shares=(0.0, 0.1, 0.2, 0.3, 0.5), steps=20_000, evaluations=20)


def run(config: Dropout) -> Iterator[Condition]:
    """Each norm and share."""
    for norm in config.norms:
        for share in config.shares:
            options = {"activation": nn.relu, "dropout": share}
            drawn = functools.partial(few, size=config.examples)
            measure = tuned(config, nl.get(norm), config.rates, draw=drawn, **options)
            yield Condition({"norm": norm, "dropout": share}, measure)


def best_share(records: Records, norm: str) -> float:
    """The positive share with the best accuracy on the held-out images."""
    trials = records.where(lambda r: r["dropout"] > 0, kind="tuning", norm=norm)
    found = {
        r["dropout"]: max((v for v in r["accuracies"] if v is not None), default=0.0)
        for r in trials
    }
    return max(found, key=found.__getitem__)


def verdict(records: Records) -> Iterator[Verdict]:
    """What dropout wins without and with batch norm, and one in the place of the other."""
    both = ("none", "batch")
    dropped = {n: records.accuracy(norm=n, dropout=best_share(records, n)) for n in both}
    plain = {n: records.accuracy(norm=n, dropout=0.0) for n in both}
    won = {n: dropped[n] - plain[n] for n in both}
    points = functools.partial(decide, unit="points")
    claim = "dropout wins more without a norm than with batch norm"
    yield points("less-won", claim, won["none"] - won["batch"], at_least=0, size=POINTS)
    claim = f"with batch norm dropout wins at most {POINTS:g} points"
    source = Source("ioffe2015", "sections 3.4, 4.2.1", "5 to 10% in the place of 40%")
    yield points("batch.won", claim, won["batch"], at_most=POINTS, source=source)
    claim = "batch norm without dropout is more accurate than dropout without a norm"
    source = Source("ioffe2015", "section 4.2.2", "72.2 → 74.8%, at 30 times the rate")
    yield points(
        "batch.instead", claim, plain["batch"] - dropped["none"], at_least=0, source=source
    )


def figure(records: Records) -> Figure:
    """The test error at the end against the share that is left out."""
    picture, (axes,) = draw.canvas(width=5.5)
    draw.against(axes, records.where(kind="evaluation").last(), "dropout", draw.test_error)
    draw.frame(axes, xlabel="share that dropout leaves out", legend=True)
    return picture
