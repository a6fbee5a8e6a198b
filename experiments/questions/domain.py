"""Which statistics fit images of another kind than those of training?

Claim: On images from another domain the statistics of the training domain cost accuracy, and those
of the new domain, for which no labels are needed, win a large part of it back, with the weights as
they are.

Source: Wu & Johnson 2021, section 5, https://arxiv.org/abs/2105.07576; Li et al. 2016,
https://arxiv.org/abs/1603.04779; the domains and the threshold are ours.

Protocol: MNIST, three layers of 100 ReLUs with batch norm, batches of 128, 1,000 steps of SGD,
whose rate falls linearly from 0.1 to 0. Each net is tested as it is, on the test images and on
changed ones: a third of the contrast on grey, added Gaussian noise of half the range, and a
Gaussian blur of 1.5 pixels. The statistics are those of 4,096 training images, plain ones and ones
that are changed in the same way (PreciseBN: one batch). Contrast is an affine map of the pixels,
which the first norm takes back but for ε: it shows that the rest is right.

Command: python -m experiments run domain
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import numpy as np
import scipy.ndimage
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..engine import (
    Condition,
    Config,
    Net,
    Records,
    Schedule,
    Verdict,
    dataset,
    decide,
    draw,
    learn,
)
from .precise import floats

LOST = 5.0
"""Points of test accuracy that another domain costs with the statistics of training, at least."""

WON = 0.5
"""The share of it that the domain's own statistics win back, at least."""


def contrast(images: np.ndarray) -> np.ndarray:
    """A third of the contrast, on grey."""
    return images / 3


def noise(images: np.ndarray) -> np.ndarray:
    """Gaussian noise of half the range, the same at every call."""
    return images + np.random.default_rng(len(images)).normal(0, 1, images.shape)


def blur(images: np.ndarray) -> np.ndarray:
    """A Gaussian blur of 1.5 pixels."""
    return scipy.ndimage.gaussian_filter(images, (0, 1.5, 1.5, 0))


DOMAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contrast": contrast,
    "noise": noise,
    "blur": blur,
}
"""What changes images `[N, H, W, C]` of pixels from −1 to 1."""


@dataclasses.dataclass(frozen=True)
class Domain(Config):
    """The config.

    Attributes:
      domains: Names of `DOMAINS`.
      examples: Training images of which the statistics are made.
    """

    domains: tuple[str, ...] = ("contrast", "noise", "blur")
    examples: int = 4096
    batch_size: int = 128
    schedule: Schedule = "linear"
    evaluations: int = 1
    seeds: int = 5


QUICK = Domain()
SECONDS = 16
FULL = Domain(examples=60_000, steps=20_000, seeds=10)


def run(config: Domain) -> Iterator[Condition]:
    """One net, tested in every domain."""
    look = functools.partial(accuracies, config)
    measure = learn(config, nl.get("batch"), prepare=floats, instrument=look, activation=nn.relu)
    yield Condition({"norm": "batch"}, measure)


def accuracies(config: Domain, net: Net) -> dict[str, Array]:
    """The test accuracy in percent in each domain, with statistics of training and its own."""
    data = floats(dataset(config.dataset, config.data_dir))
    seen, test = data.train_inputs[: config.examples], data.test_inputs

    def accuracy(state: object, images: np.ndarray) -> Array:
        variables = {"params": net.params, models.STATE: state}
        logits: Array = net.model.apply(variables, images.astype(np.float32), train=False)  # type: ignore[assignment]
        return 100 * (logits.argmax(-1) == data.test_labels).mean()

    def settled(images: np.ndarray) -> object:
        variables = {"params": net.params, models.STATE: nl.population.begin(net.norm_state)}
        images = images.astype(np.float32)
        _, after = net.model.apply(variables, images, train=True, mutable=[models.STATE])
        return nl.population.settle(after[models.STATE])

    plain = settled(seen)
    found = {"clean": accuracy(plain, test)}
    for name in config.domains:
        change = DOMAINS[name]
        found[f"{name}_training"] = accuracy(plain, change(test))
        found[f"{name}_own"] = accuracy(settled(change(seen)), change(test))
    return found


def verdict(records: Records) -> Iterator[Verdict]:
    """What each domain costs, and what its own statistics win back."""
    ends = records.last()
    clean = ends.by_seed("clean")
    for name in domains(ends):
        training, own = (ends.by_seed(f"{name}_{which}") for which in ("training", "own"))
        claim = f"{name}: with the statistics of training it costs"
        yield decide(claim, clean - training, at_least=LOST, unit="points")
        claim = f"{name}: its own statistics win back a share of that"
        yield decide(claim, (own - training) / (clean - training), at_least=WON)


def domains(records: Records) -> list[str]:
    """The domains that were measured."""
    return [key.removesuffix("_own") for key in records[0] if key.endswith("_own")]


def figure(records: Records) -> Figure:
    """The test accuracy in each domain, with either statistics, a point for each seed."""
    ends = records.last()
    names = domains(ends)
    picture, grid = draw.canvas(len(names), width=3)
    for name, axes in zip(names, grid, strict=True):
        keys = {"clean": "clean", "of training": f"{name}_training", "its own": f"{name}_own"}
        draw.columns(axes, {said: ends.by_seed(key) for said, key in keys.items()})
        axes.set(title=name, ylim=(0, 100), ylabel="test accuracy (%)")
    picture.suptitle("Test accuracy by the statistics of inference; a point is a seed")
    return picture
