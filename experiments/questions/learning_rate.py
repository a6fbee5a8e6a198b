"""Does batch norm allow higher learning rates, and fewer steps?

Claim: A net with batch norm learns at rates at which one without diverges. With the rate raised it
is where the other ends after a small part of the steps, and goes on to a higher accuracy.

Source: Ioffe & Szegedy 2015, section 4.2.2, https://arxiv.org/abs/1502.03167: Inception needs
31.0 million steps to its best accuracy; with batch norm 13.3 at the same rate, 2.1 at 5 times that,
2.7 at 30 times, where it ends 2.6 points higher.

Protocol: MNIST, three hidden layers of 100 ReLUs, batches of 60, 1,500 steps of SGD with momentum
0.9. The baseline is the net without a norm at its best rate, on average over the seeds; its best
accuracy is what the others have to reach. A rate is stable if the loss stays finite and the net
ends with nine tenths of the baseline's accuracy. It is measured 30 times on the way, on 5,000 of
the test images. The paper's factors are those of a deep conv net on ImageNet, where the baseline
trains for weeks.

Command: python -m experiments run learning_rate
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import Condition, Config, Records, Verdict, decide, draw, lanes, learn

STABLE = 0.9
"""The accuracy at the end with a stable rate, as a share of the baseline's, at least."""

HIGHER = 10.0
"""The largest stable rate with a norm over that without, at least."""

FEWER = {1.0: 2.0, 5.0: 14.0, 30.0: 11.0}
"""By the factor of the rate: the steps of the baseline over those with batch norm, at least. They
are the paper's, rounded down."""

NETS = 40
"""That are trained side by side, at most."""

BETTER = 2.6
"""Points of accuracy that batch norm at 30 times the rate ends above the baseline, at least."""


@dataclasses.dataclass(frozen=True)
class LearningRate(Config):
    """The config.

    Attributes:
      norms: What stands before each ReLU.
      rates: The learning rates of every norm.
      starts: Those among which the baseline finds its best; batch norm has the multiples of each.
      tests: How many test images are read.
    """

    norms: tuple[str, ...] = ("none", "batch", "layer")
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    starts: tuple[float, ...] = (0.003, 0.01, 0.03)
    tests: int = 5000
    optimizer: str = "momentum"
    steps: int = 1500
    evaluations: int = 30


QUICK = LearningRate()
SECONDS = 105
FULL = LearningRate(
    dataset="cifar10", model="vgg", batch_size=128, steps=30_000, tests=10_000, seeds=10
)


def run(config: LearningRate) -> Iterator[Condition]:
    """Each norm, with rates and seeds side by side, as many as the memory holds."""
    multiples = {multiple(lr, factor) for lr in config.starts for factor in FEWER}

    def fewer(data: Dataset) -> Dataset:
        images, labels = data.test_inputs[: config.tests], data.test_labels[: config.tests]
        return data._replace(test_inputs=images, test_labels=labels)

    for norm in config.norms:
        more = {"none": config.starts, "batch": multiples}.get(norm, ())
        rates = sorted({*config.rates, *more})
        count = max(1, NETS // config.seeds)
        for some in (rates[at : at + count] for at in range(0, len(rates), count)):
            rows = lanes(config, lr=some)
            options = {"side_by_side": rows, "prepare": fewer, "activation": nn.relu}
            labels = {"norm": norm, "rates": f"{some[0]:g} to {some[-1]:g}"}
            yield Condition(labels, learn(config, nl.get(norm), **options))


def multiple(lr: float, factor: float) -> float:
    """A multiple of a rate, without the float's last digits."""
    return round(lr * factor, 9)


def largest_stable(records: Records, norm: str) -> np.ndarray:
    """The largest stable rate of each seed, of those that all norms had; NaN if none is."""
    rates = records.where(norm="none", kind="evaluation").values("lr")
    enough = least_accuracy(records)

    def largest(ends: Records) -> float:
        stable = ends.where(lambda r: 100 * r["accuracy"] >= enough, diverged=None)
        return max(stable.values("lr"), default=np.nan)

    return records.last().where(lambda r: r["lr"] in rates, norm=norm).each_seed(largest)


def least_accuracy(records: Records) -> float:
    """What a net with a stable rate ends with, in percent, at least."""
    return STABLE * float(records.where(norm="none").tuned().accuracy().mean())


def baseline(records: Records) -> Records:
    """The last evaluations without a norm at the best rate that batch norm had the multiples of."""
    had = records.where(norm="batch").values("lr")
    none = records.where(lambda r: all(multiple(r["lr"], f) in had for f in FEWER), norm="none")
    return none.tuned()


def speed(records: Records, factor: float) -> np.ndarray:
    """The baseline's steps to its best accuracy over those with batch norm, of each seed.

    A net that never comes there is taken to come there with its last step.
    """
    rate = baseline(records)[0]["lr"]

    def one(mine: Records) -> float:
        base = mine.where(norm="none", lr=rate)
        batch = mine.where(norm="batch", lr=multiple(rate, factor)).trained()
        target = max(base.values("accuracy"))
        there = batch.where(lambda r: r["accuracy"] >= target).values("step")
        return base.steps_to(target)[0] / min([*there, max(batch.values("step"))])

    return records.where(kind="evaluation").each_seed(one)


def verdict(records: Records) -> Iterator[Verdict]:
    """Stable rates, steps at each multiple of the baseline's rate, and the accuracy at the end."""
    plain = largest_stable(records, "none")
    for norm in ("batch", "layer"):
        claim = f"{norm} norm: the largest stable rate is {HIGHER:g} times that without a norm"
        factor = largest_stable(records, norm) / plain
        yield decide(claim, factor, at_least=HIGHER, unit="times", geometric=True)
    for factor, fewer in FEWER.items():
        claim = f"batch norm at {factor:g} times the rate: there in {fewer:g} times fewer steps"
        yield decide(claim, speed(records, factor), at_least=fewer, unit="times", geometric=True)
    base = baseline(records)
    high = records.accuracy(norm="batch", lr=multiple(base[0]["lr"], 30))
    claim = f"batch norm at 30 times the rate ends {BETTER:g} points more accurate"
    yield decide(claim, high - base.accuracy(), at_least=BETTER, unit="points")


def figure(records: Records) -> Figure:
    """The error at the end against the rate, and on the way at the baseline's rate and above."""
    picture, (left, right) = draw.canvas(2)
    draw.against(left, records.last(), "lr", draw.test_error)
    least = 100 - least_accuracy(records)
    draw.frame(left, threshold=least, xscale="log", log=True, xlabel="learning rate", legend=True)
    left.set_ylabel("test error at the end (%)")
    rate = baseline(records)[0]["lr"]
    way = records.where(kind="evaluation").trained()
    base = way.where(norm="none", lr=rate)
    draw.over_steps(right, base, draw.test_error, label=f"none, rate {rate:g}")
    for factor, line in zip(FEWER, ("-", "--", ":"), strict=True):
        lr = multiple(rate, factor)
        batch = way.where(norm="batch", lr=lr)
        draw.over_steps(right, batch, draw.test_error, label=f"batch, rate {lr:g}", ls=line)
    draw.frame(right, log=True, legend=True)
    return picture
