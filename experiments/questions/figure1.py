"""Does batch norm learn faster, and does it keep the distribution of activations still?

Claim: With batch norm the network reaches a higher test accuracy, in fewer steps, and the
distribution of the inputs to a typical sigmoid of the last hidden layer is much more stable over
training.

Source: Ioffe & Szegedy 2015, figure 1, https://arxiv.org/abs/1502.03167

Protocol: The paper's network and run: binary MNIST, three hidden layers of 100 sigmoids, small
Gaussian initial weights, batches of 60, 50,000 steps of plain SGD. The paper names neither the
learning rate nor the size of the initial weights: rate 0.1 with standard deviations 0.1 and 0.01
here, and rate 0.5 and standard deviation 1 beside them. The distribution is that of each unit's
input over 256 training images: its median wanders over training, measured in units of its width
(from the 15th to the 85th percentile), and the median unit counts.

Command: python -m experiments run figure1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..data import Dataset
from ..engine import Condition, Config, Net, Records, Verdict, decide, draw, lanes, learn

GAIN = 0.3
"""Points of test accuracy that batch norm is better at the end, at least."""

SPEED = 0.75
"""Its steps to the accuracy `TARGET`, as a share of those without a norm, at most."""

TARGET = 0.95

STILLER = 2.0
"""The factor by which the median wanders less with batch norm, at least."""


@dataclasses.dataclass(frozen=True)
class Figure1(Config):
    """The config.

    Attributes:
      norms: What stands before each sigmoid.
      starts: Pairs of the initial kernels' standard deviation and the learning rate.
    """

    norms: tuple[str, ...] = ("none", "batch")
    starts: tuple[tuple[float, float], ...] = ((0.1, 0.1), (0.01, 0.1), (0.1, 0.5), (1.0, 0.1))
    steps: int = 50_000
    evaluations: int = 100


QUICK = Figure1()
SECONDS = 640
FULL = Figure1(seeds=10)


def run(config: Figure1) -> Iterator[Condition]:
    """Each norm, with all starts and seeds side by side."""
    rows = [lane for sd, lr in config.starts for lane in lanes(config, sd=[sd], lr=[lr])]
    for name in config.norms:
        measure = learn(config, nl.get(name), side_by_side=rows, prepare=binary, instrument=inputs)
        yield Condition({"norm": name}, measure)


def binary(data: Dataset) -> Dataset:
    """Pixels of 0 and 1."""
    train, test = ((v > 127).astype(np.float32) for v in (data.train_inputs, data.test_inputs))
    return data._replace(train_inputs=train, test_inputs=test)


def inputs(net: Net) -> dict[str, Array]:
    """The percentiles of what enters the sigmoids of the last hidden layer, `[3, units]`."""
    *_, flowing = net.activations(train=True).values()
    return {"percentiles": instruments.percentiles(flowing.z)}


def wander(records: Records, **wanted: object) -> np.ndarray:
    """The range of each unit's median over its mean width; the median unit of each seed."""
    here = records.trained().where(**wanted)
    return here.each_seed(lambda mine: np.median(wandered([r["percentiles"] for r in mine])))


def wandered(percentiles: Any) -> np.ndarray:
    """The same of each unit; the percentiles are `[T, 3, units]`."""
    low, middle, high = np.array(percentiles).swapaxes(0, 1)
    return np.ptp(middle, axis=0) / (high - low).mean(axis=0)


def verdict(records: Records) -> Iterator[Verdict]:
    """Accuracy, steps and stability, at the paper's small initial weights and beside them."""
    for sd, lr in records.values("sd", "lr"):
        where = f"sd {sd:g}, rate {lr:g}: "
        none, batch = ({"norm": norm, "sd": sd, "lr": lr} for norm in ("none", "batch"))
        gain = records.accuracy(**batch) - records.accuracy(**none)
        claim = where + "batch norm ends more accurate"
        yield decide(claim, gain, at_least=GAIN, unit="points")
        share = records.share_of_steps(TARGET, batch, none)
        claim = where + f"it is at {TARGET:.0%} in fewer steps (as a share)"
        yield decide(claim, share, at_most=SPEED)
        claim = where + "the medians of the last layer's inputs wander less (factor)"
        factor = wander(records, **none) / wander(records, **batch)
        yield decide(claim, factor, at_least=STILLER, geometric=True)


def figure(records: Records) -> Figure:
    """The paper's figure: accuracy, and the percentiles of a typical input without and with."""
    starts = records.values("sd", "lr")
    picture, grid = draw.canvas(3, len(starts), height=2.9)
    for (sd, lr), (first, *others) in zip(starts, np.atleast_2d(grid), strict=True):
        here = records.where(sd=sd, lr=lr)
        draw.over_steps(first, here.trained(), draw.accuracy)
        first.set_title(f"sd {sd:g}, rate {lr:g}")
        for axes, norm in zip(others, ("none", "batch"), strict=True):
            mine = here.where(norm=norm, seed=0)
            values = np.array([r["percentiles"] for r in mine])  # [T, 3, units]
            unit = np.argsort(wandered(values[1:]))[values.shape[-1] // 2]  # as the median unit
            look = {"color": draw.styles([norm])[norm]["color"], "label": norm}
            for at, line in enumerate((":", "-", ":")):
                axes.plot(mine.values("step"), values[:, at, unit], ls=line, **look)
            axes.set(title=f"{norm}, unit {unit}", xlabel="optimizer step")
            axes.set_ylabel("input to the sigmoid")
    title = "Accuracy; 15th, 50th, 85th percentile of an input that wanders typically"
    return draw.finish(picture, title)
