"""Is what batch norm gains the larger learning rate, and does one layer of it gain much of that?

Claim: At the learning rate that is best without a norm, a net with batch norm is about as accurate.
Batch norm allows far larger rates, and batch norm in the last hidden layer alone much of that.

Source: Bjorck et al. 2018, https://arxiv.org/abs/1806.02375: a ResNet of 110 layers on CIFAR-10
learns alike at a small rate with and without batch norm, and allows 0.1 with it and 0.0001 without
(quoted second-hand). That one layer gains much of it is said of that paper; its text was not seen,
and that claim is ours. "About" is half a point here, "far larger" ten times and "much" half of it
in logarithms: all chosen before any run.

Protocol: Ten layers of 64 ReLUs on MNIST at 14×14 pixels, batches of 60, SGD. Accuracy: 3,000
steps, over which the rate falls linearly to 0, no norm at its best of five rates or two more
beyond, and batch norm at the same. Rates: 300 steps at a constant rate; a rate is stable if the
loss over the last third is below 2 nats; the largest stable one is bisected to a factor of 1.3 for
each seed. Seeds are those from 200 on: a run of those from 100 on trained for 1,000 steps at a
constant rate, at whose end the net without a norm was still improving.

Command: normlab run last_layer_norm
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Checkpoint,
    Condition,
    Config,
    Record,
    Records,
    Schedule,
    Source,
    Verdict,
    decide,
    draw,
    exact,
    largest_stable,
    learn,
    pooled,
    searched,
    tuned,
)

WITHIN = 0.5
"""Points of accuracy between the nets at one rate, at most."""

LARGER = 10.0
"""The largest stable rate with batch norm over that without, if it is far larger."""

LEARNS = 2.0
"""Nats of training loss below which a net learns; chance is 2.3."""

BJORCK = Source("bjorck2018", "", "rate 0.1 with, 0.0001 without", "second-hand")


@dataclasses.dataclass(frozen=True)
class LastLayerNorm(Config):
    """The config; its steps are those of the comparison of accuracies.

    Attributes:
      rates: Of which the net without a norm has its best.
      grid: On which the search for the largest stable rate begins.
      short: Steps of that search.
      depth: Hidden layers.
      width: Units of each.
      pool: Pixels along each axis whose mean makes one.
    """

    INSTEAD: ClassVar = {"lr": "--rates"}

    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    grid: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)
    short: int = 300
    depth: int = 10
    width: int = 64
    pool: int = 2
    steps: int = 3000
    schedule: Schedule = "linear"
    evaluations: int = 5


QUICK = LastLayerNorm(first_seed=200)
SECONDS = 150
FULL = LastLayerNorm(
    dataset="cifar10", model="resnet110", pool=1, batch_size=128, steps=20_000, short=2000
)


def run(config: LastLayerNorm) -> Iterator[Condition]:
    """Both nets at one rate, and the largest rates without, in the last layer and in all."""
    options: dict[str, Any] = {"activation": nn.relu}
    if config.model == "mlp":
        options["widths"] = (config.width,) * config.depth
    options["prepare"] = lambda data: pooled(data, config.pool)
    says = [{"kind": "evaluation", "norm": norm} for norm in ("none", "batch")]
    says += [{"kind": "tuning", "norm": "none", "lr": 0.1}]
    yield Condition({"part": "accuracy"}, exact(at_one_rate, config, options), says)
    here = dataclasses.replace(config, steps=config.short, schedule="constant", evaluations=3)
    last = f"Normed_{config.depth - 1}" if config.model == "mlp" else "stage3_block18_conv2"
    for norms, own in (("none", {}), ("last layer", {"where": (last,)}), ("batch", {})):
        norm = nl.get("none" if norms == "none" else "batch")
        measure = largest_stable(here, norm, config.grid, stable, fine=1.3, **options, **own)
        yield Condition({"part": "rates", "norm": norms}, measure, searched(config.grid))


def stable(record: Record) -> bool:
    """Whether a net has learned by the end."""
    loss = record["train_loss"]
    return record["diverged"] is None and loss is not None and loss < LEARNS


def at_one_rate(config: LastLayerNorm, options: dict[str, Any]) -> Iterator[Record]:
    """No norm at its best rate, then batch norm at that."""
    lr = config.lr
    for record in tuned(config, nl.get("none"), config.rates, **options)(None):
        if not isinstance(record, Checkpoint):
            lr = record["lr"] if record["kind"] == "tuning" else lr
            yield {"norm": "none", **record}
    here = dataclasses.replace(config, lr=lr)
    for record in learn(here, nl.get("batch"), **options)(None):
        if not isinstance(record, Checkpoint):
            yield {"norm": "batch", **record}


def verdict(records: Records) -> Iterator[Verdict]:
    """The accuracy at one rate, and how much larger rates may be."""
    none, batch = (records.accuracy(part="accuracy", norm=n) for n in ("none", "batch"))
    claim = "at the best rate of the net without a norm, batch norm is as accurate (difference)"
    near = {"at_least": -WITHIN, "at_most": WITHIN, "unit": "points"}
    yield decide("same-rate", claim, batch - none, **near, source=BJORCK)

    def largest(norm: str) -> np.ndarray:
        return records.by_seed("lr", kind="largest", norm=norm)

    none, last, batch = map(largest, ("none", "last layer", "batch"))
    how: dict[str, Any] = {"at_least": 1, "geometric": True}
    claim = "the largest stable rate with batch norm over that without"
    yield decide("rate.batch", claim, batch / none, size=LARGER, **how, source=BJORCK)
    claim = (
        "the largest stable rate with batch norm in the last hidden layer alone over that without"
    )
    yield decide("rate.last", claim, last / none, **how)
    claim = "the same over the geometric mean of that with batch norm in all layers and in none"
    yield decide("rate.half", claim, last / np.sqrt(none * batch), **how)


def figure(records: Records) -> Figure:
    """The learning curves at one rate, and the largest stable rates."""
    picture, (left, right) = draw.canvas(2)
    here = records.where(kind="evaluation", part="accuracy")
    draw.over_steps(left, here, draw.test_error, marker=True)
    rate = records.best_rate(part="accuracy")
    draw.frame(left, log=True, title=f"at rate {rate:g}, the best without a norm", legend=True)
    largest = records.where(kind="largest")
    groups = {n: largest.by_seed("lr", norm=n) for n in largest.values("norm")}
    draw.columns(right, groups, mean=False)
    draw.frame(
        right, log=True, ylabel="largest stable rate", title="batch norm in no, one, all layers"
    )
    return picture
