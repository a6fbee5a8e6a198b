"""Does whitening the data make a net learn faster, and does batch norm make that needless?

Claim: Features on one scale (min-max), of mean 0 and variance 1 (z-score), and uncorrelated (PCA,
ZCA) are better and better conditioned, and a net learns faster from them. Features of 0–1 beside
features of 0–1000 make learning slow at any rate; batch norm on the first layer repairs that.

Source: LeCun, Bottou, Orr & Müller 1998, "Efficient BackProp", section 4.3,
https://doi.org/10.1007/3-540-49430-8_2; Ioffe & Szegedy 2015, section 2,
https://arxiv.org/abs/1502.03167

Protocol: MNIST, averaged to 14×14 pixels, each a feature, transformed by what is measured on the
training set; the condition number is that of the covariance of 2,000 images. A net of 100
sigmoids, batches of 60, SGD, without a norm and with batch norm, at the best of several rates.
Before PCA and ZCA learn, the variances get a floor of 0.01 (of pixels from 0 to 1), as is usual:
without it, noise in pixels that hardly vary is blown up. "Mixed" data are pixels from 0 to 1, a
random half of them times 1000.

Command: python -m experiments run whitening
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import cast

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
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    lanes,
    learn,
)

WHITE = 1.1
"""The condition number after PCA and ZCA, at most."""

COLOURED = 1000.0
"""The condition number after min-max and z-score, at least."""

SPEED = 0.75
"""Steps to the accuracy `TARGET` as a share of those from min-max data, at most."""

TARGET = 0.9

LOSS = 1.0
"""Points of accuracy that mixed features cost a net without a norm, at least."""

REPAIRED = 0.5
"""Points that they cost a net with batch norm, at most."""

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
      measured: Images whose condition number is taken.
    """

    rates: tuple[float, ...] = (1e-6, 1e-4, 0.01, 0.3, 2.0, 10.0)
    measured: int = 2000
    steps: int = 600
    evaluations: int = 60


QUICK = Whiten()
SECONDS = 120
FULL = Whiten(
    rates=(1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0, 2.0, 10.0),
    measured=10_000,
    steps=10_000,
    evaluations=100,
    seeds=10,
)


def run(config: Whiten) -> Iterator[Condition]:
    """The condition numbers, then each kind of data without a norm and with batch norm."""
    yield Condition({"data": "all", "norm": "none"}, exact(conditions, config))
    for norm in ("none", "batch"):
        for name in (*METHODS, "mixed"):
            train = learn(
                config,
                nl.get(norm),
                side_by_side=lanes(config, lr=config.rates),
                prepare=mixed if name == "mixed" else by_method(name, FLOOR),
                widths=(100,),
            )
            yield Condition({"data": name, "norm": norm}, train)


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
    for seed in range(config.seeds):
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
    for name in METHODS:
        numbers = records.by_seed("number", method=name)
        if name in ("minmax", "zscore"):
            claim = f"{name} leaves the data ill conditioned (condition number)"
            yield decide(claim, numbers, at_least=COLOURED, geometric=True)
        else:
            claim = f"{name} whitens: no direction varies more than another (condition number)"
            yield decide(claim, numbers, at_most=WHITE, geometric=True)
    best = records.at_best_rate("data", "norm")
    for norm, words in (("none", "no norm"), ("batch", "batch norm")):
        for name in METHODS[1:]:
            claim = f"{words}: from {name} data {TARGET:.0%} takes fewer steps than from min-max "
            here, minmax = ({"data": d, "norm": norm} for d in (name, "minmax"))
            share = best.share_of_steps(TARGET, here, minmax)
            yield decide(claim + "data (as a share)", share, at_most=SPEED)
    minmax, mixed = (best.where(data=data) for data in ("minmax", "mixed"))
    lost = minmax.accuracy(norm="none") - mixed.accuracy(norm="none")
    claim = "no norm: features of 0–1 beside 0–1000 cost accuracy at the best of all rates"
    yield decide(claim, lost, at_least=LOSS, unit="points")
    lost = minmax.accuracy(norm="batch") - mixed.accuracy(norm="batch")
    claim = "batch norm on the first layer repairs features of 0–1 beside 0–1000 (what they cost)"
    yield decide(claim, lost, at_most=REPAIRED, unit="points")


def figure(records: Records) -> Figure:
    """Condition numbers, and the error against steps at the best rate."""
    picture, (left, *rest) = draw.canvas(3, width=3.7)
    names = (*METHODS, "mixed")
    draw.columns(left, {name: records.by_seed("number", method=name) for name in names})
    draw.frame(left, ylabel="condition number of the covariance", log=True, title="the data")
    best = records.at_best_rate("data", "norm").trained()
    for axes, norm in zip(rest, ("none", "batch"), strict=True):
        draw.over_steps(axes, best.where(norm=norm), draw.test_error, by="data")
        title = f"{norm}, at the best rate"
        draw.frame(axes, threshold=100 * (1 - TARGET), log=True, title=title)
    return draw.finish(picture, key=rest[0])
