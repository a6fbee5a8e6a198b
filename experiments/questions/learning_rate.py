"""Does batch norm allow higher learning rates, and fewer steps?

Claim: A net with batch norm is stable at higher learning rates than one without. It comes to the
other's best accuracy in fewer steps, at the same rate and with the rate raised, and goes on to a
higher accuracy.

Source: Ioffe & Szegedy 2015, section 4.2.2, https://arxiv.org/abs/1502.03167: Inception diverges at
5 times its rate, with batch norm it trains at 30 times. It needs 31.0 million steps to its best
accuracy; with batch norm 13.3 at the same rate, 2.1 at 5 times that and 2.7 at 30 times, where it
ends 2.6 points higher. At the raised rates the paper changes more than the rate: no dropout, less
weight decay, a faster decay of the rate. Layer norm's rate is ours.

Protocol: MNIST, three hidden layers of 100 ReLUs, batches of 60, SGD with momentum 0.9. The largest
stable rate of each seed is searched in runs of 500 steps, to a factor of 1.15: stable is a net
whose loss stays finite and that gets 85% of held-out training images right. Steps: the net without
a norm at the best of four or more rates, chosen on held-out images, for 1,500 steps, measured 30
times on 5,000 test images; its best accuracy is what batch norm has to reach, at 1, 5 and 30 times
that rate. A net that never comes there counts with its last step.

Command: normlab run learning_rate
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import (
    Checkpoint,
    Condition,
    Config,
    Measure,
    Record,
    Records,
    Source,
    Verdict,
    decide,
    draw,
    lanes,
    largest_stable,
    learn,
    searched,
    tuned,
)

STABLE = 0.85
"""The share of held-out images that a stable net gets right, at least; chosen before any run of
this protocol."""

RATIO = 6.0
"""The largest stable rate with batch norm over that without is above it in the source: 30 / 5."""

FEWER = {1: 2.3, 5: 14.0, 30: 11.0}
"""By the factor of the rate: the source's steps without a norm over those with batch norm. They
were asked for as thresholds, rounded down, in a protocol on other seeds, and are sizes now."""

NUMBERS = {1: "31.0 M against 13.3 M", 5: "14 times fewer", 30: "31.0 M against 2.7 M"}

BETTER = 2.6
"""Points of accuracy that batch norm at 30 times the rate ends above the baseline in the source."""

WHERE = "section 4.2.2"


@dataclasses.dataclass(frozen=True)
class LearningRate(Config):
    """The config.

    Attributes:
      norms: What stands before each ReLU in the search of the largest stable rate.
      rates: The grid of that search.
      search: Its steps.
      starts: Rates of which the net without a norm has its best.
      tests: How many test images are read.
    """

    INSTEAD: ClassVar = {"lr": "--rates"}

    norms: tuple[str, ...] = ("none", "batch", "layer")
    rates: tuple[float, ...] = (0.01, 0.08, 0.64, 5.12, 40.96)
    search: int = 500
    starts: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    tests: int = 5000
    optimizer: str = "momentum"
    steps: int = 1500
    evaluations: int = 30


QUICK = LearningRate()
SECONDS = 230
FULL = LearningRate(
    dataset="cifar10", model="vgg", batch_size=128, steps=30_000, search=5000, tests=10_000
)


def run(config: LearningRate) -> Iterator[Condition]:
    """The search with each norm, and the race."""
    search = dataclasses.replace(config, steps=config.search, evaluations=1)
    for norm in config.norms:
        measure = largest_stable(search, nl.get(norm), config.rates, stable, activation=nn.relu)
        says = searched(config.rates)
        yield Condition({"measured": "largest rate", "norm": norm}, measure, says)
    says = [{"norm": "none", "factor": 0}, *({"norm": "batch", "factor": f} for f in FEWER)]
    yield Condition(
        {"measured": "steps"}, race(config), [{"kind": "evaluation", **s} for s in says]
    )


def stable(record: Record) -> bool:
    """Whether a net is, by its record on held-out images."""
    return record["diverged"] is None and record["accuracy"] >= STABLE


def race(config: LearningRate) -> Measure:
    """The net without a norm at its best rate, then batch norm at multiples of that rate."""

    def fewer(data: Dataset) -> Dataset:
        images, labels = data.test_inputs[: config.tests], data.test_labels[: config.tests]
        return data._replace(test_inputs=images, test_labels=labels)

    options = {"prepare": fewer, "activation": nn.relu}
    baseline = tuned(config, nl.get("none"), config.starts, **options)

    def run(resume: Checkpoint | None) -> Iterator[Record | Checkpoint]:
        first, best = True, 0.0
        if resume is not None:  # which net, the best rate, and where that net stands
            first, best = bool(resume.leaves[0]), float(resume.leaves[1])
            resume = resume._replace(leaves=resume.leaves[2:])
        if first:
            for found in baseline(resume):
                if isinstance(found, Checkpoint):
                    yield found._replace(leaves=[np.True_, best, *found.leaves])
                else:
                    best = found["lr"] if found["kind"] == "tuning" else best
                    yield {**found, "norm": "none", "factor": 0}
            resume = None
        factors = {multiple(best, factor): factor for factor in FEWER}
        rows = lanes(config, lr=list(factors))
        for found in learn(config, nl.get("batch"), side_by_side=rows, **options)(resume):
            if isinstance(found, Checkpoint):
                yield found._replace(leaves=[np.False_, best, *found.leaves])
            else:
                yield {**found, "norm": "batch", "factor": factors[found["lr"]]}

    return run


def multiple(lr: float, factor: float) -> float:
    """A multiple of a rate, without the float's last digits."""
    return round(lr * factor, 9)


def speed(records: Records, factor: float) -> np.ndarray:
    """The baseline's steps to its best accuracy over those with batch norm, of each seed."""

    def one(mine: Records) -> float:
        base, batch = mine.where(factor=0), mine.where(factor=factor)
        target = max(base.values("accuracy"))
        [there] = batch.steps_to(target)
        return base.steps_to(target)[0] / min(there, max(batch.values("step")))

    return records.where(kind="evaluation").each_seed(one)


def verdict(records: Records) -> Iterator[Verdict]:
    """Stable rates, steps at each multiple of the baseline's rate, and the accuracy at the end."""

    def source(number: str) -> Source:
        return Source("ioffe2015", WHERE, number)

    largest = records.where(kind="largest")
    plain = largest.by_seed("lr", norm="none")
    for norm in largest.values("norm"):
        if norm != "none":
            claim = f"{norm} norm: the largest stable rate over that without a norm"
            ratio = largest.by_seed("lr", norm=norm) / plain
            how = {"at_least": 1, "unit": "times", "geometric": True}
            if norm == "batch":
                how |= {"size": RATIO, "source": source("trains at ×30; without, not at ×5")}
            yield decide(f"stable.{norm}", claim, ratio, **how)
    for factor, fewer in FEWER.items():
        claim = f"batch norm at {factor:g} times the rate: the baseline's steps over its own"
        how = {"unit": "times", "geometric": True, "source": source(NUMBERS[factor])}
        yield decide(
            f"steps.x{factor}", claim, speed(records, factor), at_least=1, size=fewer, **how
        )
    gain = records.accuracy(norm="batch", factor=30) - records.accuracy(norm="none")
    claim = "batch norm at 30 times the rate ends more accurate"
    how = {"unit": "points", "source": source("72.2 → 74.8%")}
    yield decide("better.x30", claim, gain, at_least=0, size=BETTER, **how)


def figure(records: Records) -> Figure:
    """The largest stable rate of each norm, and the error on the way, at the baseline's rate."""
    picture, (left, right) = draw.canvas(2)
    largest = records.where(kind="largest")
    draw.columns(left, {norm: largest.by_seed("lr", norm=norm) for norm in largest.values("norm")})
    draw.frame(left, log=True, ylabel="largest stable learning rate", title="seeds, mean")
    way = records.where(kind="evaluation").trained()
    for factor, line in zip((0, *FEWER), ("-", "-", "--", ":"), strict=True):
        here = way.where(factor=factor)
        [rate] = here.values("lr")
        label = f"{here[0]['norm']}, rate {rate:g}"
        draw.over_steps(right, here, draw.test_error, label=label, ls=line)
    draw.frame(right, log=True, legend=True)
    return picture
