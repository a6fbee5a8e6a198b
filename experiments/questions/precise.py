"""Are statistics of many batches better than a moving average, and when?

Claim: While the weights change, a moving average lags behind, and the statistics of many batches
with the weights as they are ("PreciseBN") are more accurate. At the end of training both are equal.

Source: Wu & Johnson 2021, section 3, https://arxiv.org/abs/2105.07576: an average mixes statistics
of many models, PreciseBN is better and more stable, and once the net has converged both do as well.
The rates and the decays are ours.

Protocol: MNIST, three layers of 100 ReLUs, batches of 100, plain SGD. At each evaluation one and
the same net is tested with its moving average, with the statistics of 32 training batches, and with
those of the test batch itself (100 examples), on 5,000 test images. Two runs: 60 steps at a
constant rate, low or high; and 900 steps at the high rate, which falls to zero as a cosine. The
average is debiased: it does not begin at mean 0 and variance 1, to which a plain one would owe most
of its error in the first steps. What is compared is the mean over the evaluations of a part of a
run.

Command: normlab run precise
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..data import Dataset
from ..engine import (
    Condition,
    Config,
    Net,
    Records,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    lanes,
    learn,
)
from ..rundir import require, words

EQUAL = 0.2
"""Points by which both may differ at the end of training."""

SOURCE = Source("wu2021", "section 3", "", "second-hand")


@dataclasses.dataclass(frozen=True)
class Precise(Config):
    """The config; the steps are those of the run whose rate falls.

    Attributes:
      averages: Pairs of the moving average, a population's name, and its decay.
      rates: The low and the high learning rate, in the place of `lr`.
      early: Steps of the run at a constant rate.
      batches: Training batches of which the precise statistics are made.
      tests: How many test images are read.
    """

    INSTEAD: ClassVar = {"lr": "--rates"}

    averages: tuple[tuple[str, float], ...] = (("debiased", 0.9), ("debiased", 0.99))
    rates: tuple[float, float] = (0.1, 3.0)
    early: int = 60
    batches: int = 32
    tests: int = 5000
    batch_size: int = 100
    steps: int = 900
    evaluations: int = 6

    def __post_init__(self) -> None:
        """Raises RunError for rates that are no two, as well."""
        super().__post_init__()
        pair = len(self.rates) == 2 and self.rates[0] < self.rates[1]
        require(pair, "rates", words(self.rates), "two, a low and a high one")


QUICK = Precise()
SECONDS = 100
FULL = Precise(steps=12_000, evaluations=20, batches=100, tests=10_000)


def run(config: Precise) -> Iterator[Condition]:
    """Each average, at constant rates and at one that falls."""
    low, high = config.rates
    early = dataclasses.replace(config, steps=config.early)
    falling = dataclasses.replace(config, schedule="cosine")
    for population, decay in config.averages:
        norm = nl.get("batch", population=population, decay=decay)
        options = {
            "prepare": functools.partial(fewer, config.tests),
            "instrument": functools.partial(accuracies, config),
            "activation": nn.relu,
        }
        labels = {"average": population, "decay": decay}
        rows = lanes(config, lr=(low, high))
        measure = learn(early, norm, side_by_side=rows, **options)
        yield Condition({**labels, "rate": "constant"}, measure)
        rows = lanes(config, lr=(high,))
        measure = learn(falling, norm, side_by_side=rows, **options)
        yield Condition({**labels, "rate": "falling"}, measure)


def floats(data: Dataset) -> Dataset:
    """Pixels from −1 to 1."""
    train, test = (
        (v / np.float32(127.5) - 1).astype(np.float32)
        for v in (data.train_inputs, data.test_inputs)
    )
    return data._replace(train_inputs=train, test_inputs=test)


def fewer(tests: int, data: Dataset) -> Dataset:
    """`floats` of the data with so many of the test images."""
    images, labels = data.test_inputs[:tests], data.test_labels[:tests]
    return floats(data._replace(test_inputs=images, test_labels=labels))


def accuracies(config: Precise, net: Net) -> dict[str, Array]:
    """The test accuracy with each kind of statistics, and whether each image was told right."""
    data = fewer(config.tests, dataset(config.dataset, config.data_dir))
    cut = functools.partial(batches, size=config.batch_size)
    images, labels = cut(data.test_inputs), cut(data.test_labels)

    def apply(state: object, images: Array, train: bool) -> tuple[Array, dict]:
        variables = {"params": net.params, models.STATE: state}
        mutable = [models.STATE] if train else []
        return net.model.apply(variables, images, train=train, mutable=mutable)  # type: ignore

    def see(state: object, images: Array) -> tuple[object, None]:
        return apply(state, images, True)[1][models.STATE], None

    def right(state: object, *, train: bool = False) -> Array:
        told = lax.map(lambda b: apply(state, b[0], train)[0].argmax(-1) == b[1], (images, labels))
        return told.ravel()

    many = cut(data.train_inputs)[: config.batches]
    precise = nl.population.settle(lax.scan(see, nl.population.begin(net.norm_state), many)[0])
    each = {
        "with_average": right(net.norm_state),
        "with_precise": right(precise),
        "with_batch": right(net.norm_state, train=True),
    }
    return {k: v.mean(dtype=jnp.float32) for k, v in each.items()} | {
        f"{k}_each": v for k, v in each.items()
    }


def batches(values: np.ndarray, size: int) -> Array:
    """Whole batches `[batches, size, ...]`."""
    whole = len(values) // size
    return jnp.asarray(values[: whole * size].reshape(whole, size, *values.shape[1:]))


def gain(records: Records, first: float, last: float, **wanted: object) -> np.ndarray:
    """Points that PreciseBN is better, as `Records.accuracy`, the mean over a share of the run."""
    here = records.where(**wanted).trained()
    end = max(here.values("step"))
    steps = [step for step in here.values("step") if first * end <= step <= last * end]
    precise, average = (
        np.mean([here.accuracy(key=f"with_{key}", step=step) for step in steps], axis=0)
        for key in ("precise", "average")
    )
    return precise - average


def verdict(records: Records) -> Iterator[Verdict]:
    """Early, while the rate is high, and at the end, for each average."""
    points = functools.partial(decide, unit="points", source=SOURCE)
    for average, decay in records.values("average", "decay"):
        which = {"average": average, "decay": decay}
        name, id = f"{said(average, decay)} average: PreciseBN is ", f"{average}-{decay:g}"
        for lr in sorted(records.values("lr")):
            early = gain(records, 0, 1, rate="constant", lr=lr, **which)
            claim = name + f"better in the first steps at rate {lr:g}"
            yield points(f"{id}.first-{lr:g}", claim, early, at_least=0)
        high = gain(records, 0, 0.5, rate="falling", **which)
        yield points(f"{id}.high", name + "better while the rate is high", high, at_least=0)
        end = gain(records, 1, 1, rate="falling", **which)
        claim = name + "as good at the end of training"
        yield points(f"{id}.end", claim, end, at_least=-EQUAL, at_most=EQUAL)


def figure(records: Records) -> Figure:
    """The test error with each kind of statistics, in each run."""
    runs = records.values("rate", "lr")
    picture, grid = draw.canvas(len(runs))
    for axes, (rate, lr) in zip(grid, runs, strict=True):
        here = records.where(rate=rate, lr=lr).trained()
        names = here.values("average", "decay")
        # No statistics of inference change a step of training: the nets are the same.
        kinds = [("PreciseBN", "precise", names[0]), ("the test batch", "batch", names[0])]
        kinds += [(f"{said(*name)} average", "average", name) for name in names]
        lines = [
            r | {"with": kind, "error": 100 * (1 - r[f"with_{key}"])}
            for kind, key, (average, decay) in kinds
            for r in here.where(average=average, decay=decay)
        ]
        draw.over_steps(axes, lines, "error", by="with")
        falls = "falls from " if rate == "falling" else ""
        draw.frame(axes, log=True, ylabel="test error (%)", title=f"rate {falls}{lr:g}")
    return draw.finish(
        picture, "One net, tested with statistics of …; median and band of all seeds"
    )


def said(average: str, decay: float) -> str:
    """A moving average in words."""
    return f"{'plain' if average == 'ema' else average} {decay:g}"
