"""Does a net with batch norm need less data?

Claim: With batch norm a net is as accurate with fewer examples, and the gain is the larger the
fewer there are.

Source: None: all claims are ours. It is said in courses and posts, without an experiment that we
know of. Ioffe & Szegedy 2015, section 3.4, https://arxiv.org/abs/1502.03167, say that batch norm
regularizes, which would be a reason.

Protocol: 500 to 4,000 examples of MNIST, drawn anew with each seed, three hidden layers of 100
ReLUs, batches of 60, 1,500 steps of SGD with momentum 0.9 whatever the number of examples, over
which the learning rate falls linearly to 0, each net at the best of four or more first rates. The
examples that batch norm needs for the accuracy that no norm has with 2,000 are read off its
accuracies, linearly in the logarithm of the number, from 500 to 4,000.

Command: normlab run data_size
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
from ..engine import Condition, Config, Records, Schedule, Verdict, decide, draw, tuned
from ..training.trainer import minibatches

SHARE = 0.75
"""The examples that batch norm needs, as a share of those without a norm. As in the steps of figure
1; chosen before any run, as the points below."""

GAIN = 0.3
"""Points of test accuracy: what batch norm wins with the fewest examples, and by how much that is
more than with the most."""


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
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    optimizer: str = "momentum"
    schedule: Schedule = "linear"
    steps: int = 1500
    evaluations: int = 1


QUICK = DataSize()
SECONDS = 250
FULL = DataSize(sizes=(500, 1000, 2000, 4000, 8000, 16_000, 32_000), steps=20_000)


def run(config: DataSize) -> Iterator[Condition]:
    """Each norm and number of examples."""
    for norm in config.norms:
        for size in config.sizes:
            options = {"draw": functools.partial(few, size=size), "activation": nn.relu}
            measure = tuned(config, nl.get(norm), config.rates, **options)
            yield Condition({"norm": norm, "examples": size}, measure)


def few(seed: int, data: Dataset, config: Config, size: int) -> np.ndarray:
    """Minibatches of so many training examples, which the seed draws from all of them."""
    size = min(size, len(data.train_inputs))
    drawn = np.random.default_rng(seed).choice(len(data.train_inputs), size, replace=False)
    rows = minibatches(seed, size, config.batch_size, config.steps)
    return drawn[rows].astype(rows.dtype)


def needed(accuracies: np.ndarray, sizes: Sequence[int], target: np.ndarray) -> np.ndarray:
    """The number of examples for an accuracy; the least or the most that there is beyond these.

    Args:
      accuracies: `[sizes, ...]`.
      sizes: The numbers of examples.
      target: `[...]`.

    >>> needed(np.array([[80.0], [90.0]]), [100, 400], np.array([85.0])).round()
    array([200.])
    """
    rising = np.maximum.accumulate(accuracies)  # what fewer examples reach, more do too
    read = np.vectorize(lambda at, *known: np.interp(at, known, np.log(sizes)))
    return np.exp(read(target, *rising))


def verdict(records: Records) -> Iterator[Verdict]:
    """The share of the examples, and the gain with the fewest and with the most."""
    sizes = sorted(records.values("examples"))
    none, batch = (
        np.array([records.accuracy(norm=norm, examples=size) for size in sizes])
        for norm in ("none", "batch")
    )
    share = needed(batch, sizes, none[-2]) / sizes[-2]
    claim = f"batch norm needs fewer examples for the accuracy without a norm at {sizes[-2]} "
    claim += "(as a share)"
    yield decide("share", claim, share, at_most=1, size=SHARE, geometric=True)
    least, most = batch[0] - none[0], batch[-1] - none[-1]
    points = {"at_least": 0, "size": GAIN, "unit": "points"}
    claim = f"with {sizes[0]} examples batch norm is more accurate"
    yield decide("fewest.gain", claim, least, **points)
    claim = f"batch norm wins more with {sizes[0]} examples than with {sizes[-1]}"
    yield decide("fewest.more", claim, least - most, **points)


def figure(records: Records) -> Figure:
    """The test error at the end against the number of examples."""
    picture, (axes,) = draw.canvas(width=5.5)
    draw.against(axes, records.where(kind="evaluation"), "examples", draw.test_error)
    sizes = records.values("examples")
    draw.frame(axes, xscale="log", xlabel="training examples", ticks=sizes, legend=True)
    return picture
