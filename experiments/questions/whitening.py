"""Does whitening the data make a net learn faster, and does batch norm make that needless?

Claim: Features on one scale (min-max) or of mean 0 and variance 1 (z-score) are ill conditioned,
uncorrelated ones (PCA, ZCA) are not. A net learns faster from the z-score and from PCA; with batch
norm neither saves steps. Features of 0–1 beside features of 0–1000 make learning slow at any rate;
batch norm behind the first layer does not wholly repair that: it is blind to the scale of a unit's
weights, not to that of one input.

Source: LeCun, Bottou, Orr & Müller 1998, "Efficient BackProp", section 4.3,
https://doi.org/10.1007/3-540-49430-8_2: learning is faster with inputs of mean zero, of about equal
variances and uncorrelated. Min-max, ZCA and all that is said of batch norm are ours.

Protocol: MNIST, averaged to 14×14 pixels, each a feature, transformed by what is measured on the
training set; the condition number is that of the covariance of 2,000 images. A net of 100
sigmoids, batches of 60, 600 steps of SGD, without a norm and with batch norm, at the best of
several rates, measured every 10 steps on 2,000 test images. Before PCA and ZCA learn, the variances
get a floor of 0.01 (of pixels from 0 to 1), as is usual: without it, noise in pixels that hardly
vary is blown up. "Mixed" data are pixels from 0 to 1, a random half of them, the same for every
seed, times 1000.

Command: normlab run whitening
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np
from matplotlib.figure import Figure

import normlab as nl
from normlab.instruments import condition_number, whiten, whitening
from normlab.instruments.whiteness import Method

from ..data import Dataset
from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    tuned,
)

WHITE = 1.1
"""The condition number after PCA and ZCA, at most."""

COLOURED = 100.0
"""The condition number after min-max and z-score, at least; after a look at 470."""

SPEED = 0.75
"""Steps to the accuracy `TARGET` as a share of those from min-max data; chosen before any run."""

SAVES = (0.75, 1 / 0.75)
"""Between which that share is where whitening saves no steps."""

TARGET = 0.9

LOSS = 1.0
"""Points of accuracy that mixed features cost a net without a norm; chosen before any run."""

FLOOR = 0.01
"""What is added to each variance before PCA and ZCA learn."""

measure = jax.jit(whitening, static_argnames=("method", "eps"))
measure_condition = jax.jit(condition_number)

METHODS = ("minmax", "zscore", "pca", "zca")


@dataclasses.dataclass(frozen=True)
class Whiten(Config):
    """The config.

    Attributes:
      rates: Learning rates, of which each kind of data has its best.
      mixed_rates: Those of mixed data, in their place.
      measured: Images whose condition number is taken.
      tests: How many test images are read.
    """

    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    mixed_rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)
    measured: int = 2000
    tests: int = 2000
    steps: int = 600
    evaluations: int = 60


QUICK = Whiten()
SECONDS = 110
FULL = Whiten(measured=10_000, tests=10_000, steps=10_000, evaluations=100)


def run(config: Whiten) -> Iterator[Condition]:
    """The condition numbers, then each kind of data without a norm and with batch norm."""
    yield Condition({"data": "all", "norm": "none"}, exact(conditions, config))
    for norm in ("none", "batch"):
        for name in (*METHODS, "mixed"):
            rates = config.mixed_rates if name == "mixed" else config.rates
            how = {"prepare": prepared(config, name), "widths": (100,)}
            train = tuned(config, nl.get(norm), rates, **how)
            yield Condition({"data": name, "norm": norm}, train)


def prepared(config: Whiten, name: str) -> Callable[[Dataset], Dataset]:
    """Makes mixed data, or transforms the pixels by a method, with so many test images."""
    change = mixed if name == "mixed" else by_method(name, FLOOR)

    def prepare(data: Dataset) -> Dataset:
        images, labels = data.test_inputs[: config.tests], data.test_labels[: config.tests]
        return change(data._replace(test_inputs=images, test_labels=labels))

    return prepare


def by_method(method: str, floor: float) -> Callable[[Dataset], Dataset]:
    """Transforms the pixels by what is measured on the training images."""

    def prepare(data: Dataset) -> Dataset:
        train, test = flat(data)
        eps = floor if method in ("pca", "zca") else 0.0
        w = measure(train, method=cast(Method, method), eps=eps)
        train, test = (np.asarray(whiten(x, w)) for x in (train, test))
        return data._replace(train_inputs=train, test_inputs=test)

    return prepare


def mixed(data: Dataset) -> Dataset:
    """Pixels from 0 to 1, a random half of them times 1000."""
    train, test = flat(data)
    scale = np.ones(train.shape[1], np.float32)
    scale[np.random.default_rng(0).permutation(scale.size)[::2]] = 1000
    return data._replace(train_inputs=train * scale, test_inputs=test * scale)


def flat(data: Dataset) -> list[np.ndarray]:
    """Training and test images as rows of pixels from 0 to 1, each the mean of four."""
    found = []
    for v in (data.train_inputs, data.test_inputs):
        n, height, width, _ = v.shape
        pooled = v.reshape(n, height // 2, 2, width // 2, 2).mean((2, 4), dtype=np.float32)
        found.append(pooled.reshape(n, -1) / 255)
    return found


def conditions(config: Whiten) -> Iterator[Record]:
    """The condition number after each method, of a random part of the images for each seed."""
    data = dataset(config.dataset, config.data_dir)
    for seed in config.each_seed:
        rng = np.random.default_rng(seed)
        count = min(config.measured, len(data.train_inputs))
        chosen = rng.choice(len(data.train_inputs), count, replace=False)
        images = data.train_inputs[chosen]
        part = data._replace(train_inputs=images, test_inputs=images[:1])
        for name in (*METHODS, "mixed"):
            prepare = mixed if name == "mixed" else by_method(name, 0.0)
            number = float(measure_condition(prepare(part).train_inputs))
            yield {"kind": "condition", "method": name, "seed": seed, "number": number}


def verdict(records: Records) -> Iterator[Verdict]:
    """Conditioning, speed, and what mixed scales cost."""
    source = Source("lecun1998", "section 4.3")
    for name in METHODS:
        numbers = records.by_seed("number", method=name)
        how: dict[str, Any] = {"at_least": COLOURED}
        claim = f"{name} leaves the data ill conditioned (condition number)"
        if name in ("pca", "zca"):
            how = {"at_most": WHITE, "exact": True}
            claim = f"{name} whitens: no direction varies more than another (condition number)"
        yield decide(f"condition.{name}", claim, numbers, **how, geometric=True)

    def share(norm: str, name: str, than: str) -> np.ndarray:
        return records.share_of_steps(
            TARGET, {"data": name, "norm": norm}, {"data": than, "norm": norm}
        )

    for name in METHODS[1:]:
        claim = f"no norm: steps to {TARGET:.0%} from {name} data, as a share of those from min-max"
        how = {"at_most": 1, "size": SPEED, "source": None if name == "zca" else source}
        yield decide(f"none.{name}", claim, share("none", name, "minmax"), **how, geometric=True)
    claim = f"no norm: steps to {TARGET:.0%} from pca data, as a share of those from zscore"
    values = share("none", "pca", "zscore")
    yield decide("none.pca-zscore", claim, values, at_most=1, geometric=True, source=source)
    low, high = SAVES
    for name in METHODS[1:]:
        claim = f"batch norm: {name} data save no steps to {TARGET:.0%} (share of min-max's)"
        values = share("batch", name, "minmax")
        yield decide(f"batch.{name}", claim, values, at_least=low, at_most=high, geometric=True)

    def lost(norm: str) -> np.ndarray:
        return records.accuracy(data="minmax", norm=norm) - records.accuracy(
            data="mixed", norm=norm
        )

    points = functools.partial(decide, at_least=0, unit="points")
    claim = "no norm: features of 0–1 beside 0–1000 cost accuracy at the best of all rates"
    yield points("mixed.none", claim, lost("none"), size=LOSS, source=source)
    claim = "batch norm behind the first layer: they still cost accuracy"
    yield points("mixed.batch", claim, lost("batch"))
    claim = "batch norm behind the first layer: they cost less accuracy than without"
    yield points("mixed.repaired", claim, lost("none") - lost("batch"))


def figure(records: Records) -> Figure:
    """Condition numbers, and the error against steps at the best rate."""
    picture, (left, *rest) = draw.canvas(3, width=3.7)
    names = (*METHODS, "mixed")
    draw.columns(left, {name: records.by_seed("number", method=name) for name in names})
    draw.frame(left, ylabel="condition number of the covariance", log=True, title="the data")
    best = records.where(kind="evaluation").trained()
    for axes, norm in zip(rest, ("none", "batch"), strict=True):
        draw.over_steps(axes, best.where(norm=norm), draw.test_error, by="data")
        title = f"{norm}, at the best rate"
        draw.frame(axes, threshold=100 * (1 - TARGET), log=True, title=title)
    return draw.finish(picture, key=rest[0])
