"""Does a net with batch norm need less dropout?

Claim: Batch norm does some of what dropout is for: with it dropout can be left out, and the net is
no less accurate.

Source: Ioffe & Szegedy 2015, sections 3.4 and 4.2.1, https://arxiv.org/abs/1502.03167, where
Inception with batch norm has no dropout.

Protocol: 2,000 examples of MNIST, few enough to be learned by heart; three hidden layers of 100
ReLUs, batches of 60, 1,500 steps of SGD with momentum 0.9, over which the learning rate falls
linearly to 0. Dropout behind each ReLU leaves out 0, 20 or 50% of the outputs. Each net has the
best of four first rates. What dropout wins is the accuracy at the better of the two positive
shares less that without. What counts as a difference is ours: as many points as batch norm has to
win in figure 1.

Command: python -m experiments run dropout
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import Condition, Config, Records, Schedule, Verdict, decide, draw, lanes, learn

POINTS = 0.3
"""Points of test accuracy: dropout wins at least so many more without a norm, and with batch norm
so many at most."""


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
    evaluations: int = 2
    seeds: int = 5


QUICK = Dropout()
SECONDS = 145
FULL = Dropout(shares=(0.0, 0.1, 0.2, 0.3, 0.5), steps=20_000, evaluations=20, seeds=10)


def run(config: Dropout) -> Iterator[Condition]:
    """Each norm and share, with all rates and seeds side by side."""
    rows = lanes(config, lr=config.rates)

    def few(data: Dataset) -> Dataset:
        images, labels = data.train_inputs[: config.examples], data.train_labels[: config.examples]
        return data._replace(train_inputs=images, train_labels=labels)

    for norm in config.norms:
        for share in config.shares:
            options = {"prepare": few, "activation": nn.relu, "dropout": share}
            measure = learn(config, nl.get(norm), side_by_side=rows, **options)
            yield Condition({"norm": norm, "dropout": share}, measure)


def best_share(best: Records, norm: str) -> np.ndarray:
    """The accuracy of each seed at the positive share that is best on average."""
    shares = set(best.values("dropout")) - {0.0}
    return max((best.accuracy(norm=norm, dropout=p) for p in shares), key=np.mean)


def verdict(records: Records) -> Iterator[Verdict]:
    """What dropout wins without and with batch norm, and one in the place of the other."""
    best = records.tuned("norm", "dropout")
    dropped = {norm: best_share(best, norm) for norm in ("none", "batch")}
    plain = {norm: best.accuracy(norm=norm, dropout=0.0) for norm in dropped}
    won = {norm: dropped[norm] - plain[norm] for norm in dropped}
    claim = f"dropout wins {POINTS:g} points more without a norm than with batch norm"
    yield decide(claim, won["none"] - won["batch"], at_least=POINTS, unit="points")
    claim = f"with batch norm dropout wins at most {POINTS:g} points"
    yield decide(claim, won["batch"], at_most=POINTS, unit="points")
    claim = f"batch norm without dropout is at most {POINTS:g} points below dropout without a norm"
    yield decide(claim, plain["batch"] - dropped["none"], at_least=-POINTS, unit="points")


def figure(records: Records) -> Figure:
    """The test error at the end against the share that is left out."""
    picture, (axes,) = draw.canvas(width=5.5)
    draw.against(axes, records.tuned("norm", "dropout"), "dropout", draw.test_error)
    draw.frame(axes, xlabel="share that dropout leaves out", legend=True)
    return picture
