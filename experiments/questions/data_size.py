"""Does a net with batch norm need less data?

Claim: With batch norm a net is as accurate with fewer examples, and the gain is the larger the
fewer there are.

Source: Said of batch norm in courses and posts, without an experiment that we know of. Ioffe &
Szegedy 2015, section 3.4, https://arxiv.org/abs/1502.03167, say that it regularizes, which would be
a reason.

Protocol: The first 500 to 4,000 examples of MNIST, three hidden layers of 100 ReLUs, batches of 60,
1,500 steps of SGD with momentum 0.9 whatever the number of examples, over which the learning rate
falls linearly to 0, each net at the best of three first rates. The examples that batch norm needs
for the accuracy that no norm has with all are read off its accuracies, linearly in the logarithm of
the number. The share is that of the steps in figure 1, the points are what batch norm has to win
there; both are ours here.

Command: python -m experiments run data_size
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import Condition, Config, Records, Schedule, Verdict, decide, draw, lanes, learn

SHARE = 0.75
"""The examples that batch norm needs, as a share of those without a norm, at most."""

GAIN = 0.3
"""Points of test accuracy: what batch norm wins with the fewest examples, and by how much that is
more than with all, at least."""


@dataclasses.dataclass(frozen=True)
class DataSize(Config):
    """The config.

    Attributes:
      norms: What stands before each ReLU.
      sizes: Numbers of training examples.
      rates: First learning rates, of which each net has its best.
    """

    norms: tuple[str, ...] = ("none", "batch")
    sizes: tuple[int, ...] = (500, 1000, 2000, 4000)
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    optimizer: str = "momentum"
    schedule: Schedule = "linear"
    steps: int = 1500
    evaluations: int = 2
    seeds: int = 5


QUICK = DataSize()
SECONDS = 130
FULL = DataSize(sizes=(500, 1000, 2000, 4000, 8000, 16_000, 32_000), steps=20_000, seeds=10)


def run(config: DataSize) -> Iterator[Condition]:
    """Each norm and number of examples, with all rates and seeds side by side."""
    rows = lanes(config, lr=config.rates)
    for norm in config.norms:
        for size in config.sizes:
            options = {"prepare": functools.partial(first, size=size), "activation": nn.relu}
            measure = learn(config, nl.get(norm), side_by_side=rows, **options)
            yield Condition({"norm": norm, "examples": size}, measure)


def first(data: Dataset, size: int) -> Dataset:
    """The first examples of the training set."""
    images, labels = data.train_inputs[:size], data.train_labels[:size]
    return data._replace(train_inputs=images, train_labels=labels)


def needed(accuracies: Sequence[float], sizes: Sequence[int], target: float) -> float:
    """The number of examples for an accuracy; the least or the most that there is beyond these.

    >>> round(needed([80.0, 90.0], [100, 400], 85.0))
    200
    """
    rising = np.maximum.accumulate(accuracies)  # what fewer examples reach, more do too
    return float(np.exp(np.interp(target, rising, np.log(sizes))))


def verdict(records: Records) -> Iterator[Verdict]:
    """The share of the examples, and the gain with the fewest and with all."""
    best = records.tuned("norm", "examples")
    sizes = sorted(best.values("examples"))
    none, batch = (
        np.array([best.accuracy(norm=norm, examples=size) for size in sizes])
        for norm in ("none", "batch")
    )
    share = [needed(b, sizes, n[-1]) / sizes[-1] for n, b in zip(none.T, batch.T, strict=True)]
    few, more = batch[0] - none[0], (batch[0] - none[0]) - (batch[-1] - none[-1])
    claim = f"batch norm needs at most {SHARE:g} of the examples for the accuracy without a norm "
    yield decide(f"{claim}at {sizes[-1]}", share, at_most=SHARE, geometric=True)
    claim = f"with {sizes[0]} examples batch norm is more accurate"
    yield decide(claim, few, at_least=GAIN, unit="points")
    claim = f"batch norm wins more with {sizes[0]} examples than with {sizes[-1]}"
    yield decide(claim, more, at_least=GAIN, unit="points")


def figure(records: Records) -> Figure:
    """The test error at the end against the number of examples."""
    picture, (axes,) = draw.canvas(width=5.5)
    draw.against(axes, records.tuned("norm", "examples"), "examples", draw.test_error)
    sizes = records.values("examples")
    draw.frame(axes, xscale="log", xlabel="training examples", ticks=sizes, legend=True)
    return picture
