"""Does a conv net see better at another resolution than that of training, and what of its norm?

Claim: A net that is trained on random resized crops is more accurate on larger test images than
those of training, since crops make objects larger; without such crops it is not. At the larger
size its statistics are off, and those of that size are more accurate.

Source: Touvron et al. 2019, https://arxiv.org/abs/1906.06423 (a ResNet-50 trained at 224 pixels:
77.0% at 224, 79.0% when tested at 384 after its classifier and last batch norm were fine-tuned).
Here statistics are refreshed and nothing is trained.

Protocol: Fashion-MNIST; three convolutions with batch norm, ReLU and pooling, and a mean over all
positions at the end (a small network in network). 400 steps of SGD with momentum 0.9, whose rate
falls from 0.05 to zero as a cosine, with 64 images of 14×14 pixels: crops of half to all of the
side at random places, resized; or whole images resized. Tested on 2,000 whole images, resized to 14
and to 18 pixels, with running statistics and with those of 1,000 whole training images of that
size. One rate for both, which nobody chose.

Command: normlab run resolution
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Schedule,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    plain,
    shuffled,
)
from ..engine.learn import optimizer

ONE_POINT = 1.0
"""Points by which the larger size is better; chosen before any run, half of the source's."""

TOUVRON = Source("touvron2019", "", "trained at 224: 77.0% at 224, 79.0% at 384", "abstract")


@dataclasses.dataclass(frozen=True)
class Resolution(Config):
    """The config.

    Attributes:
      side: Pixels of a side in training.
      larger: In further tests; the claims are about the first of them.
      smallest: The least share of the side that a crop has.
      images: Training images, cropped once each.
      tests: Test images.
      channels: Of the model's blocks, of one layer each; those of its paper if there are none.
    """

    side: int = 14
    larger: tuple[int, ...] = (18,)
    smallest: float = 0.5
    images: int = 20_000
    tests: int = 2000
    channels: tuple[int, ...] = (16, 32, 32)
    dataset: str = "fashion_mnist"
    model: str = "nin"
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 400
    optimizer: str = "momentum"
    lr: float = 0.05


QUICK = Resolution()
SECONDS = 210
FULL = Resolution(images=60_000, tests=10_000, steps=20_000, channels=())


def run(config: Resolution) -> Iterator[Condition]:
    """Trained on crops and on whole images, by one program."""
    says = [
        {"images": images, "side": side, "statistics": statistics}
        for images in ("crops", "whole")
        for side in (config.side, *config.larger)
        for statistics in ("running", "own")
    ]
    yield Condition({"norm": "batch"}, exact(trained, config), says)


def resized(images: np.ndarray, side: int, corners: Array, shares: Array) -> Array:
    """Of each image a square of a share of its side, from its corner on, at side×side pixels."""
    pixels = images.shape[1]

    def one(given: tuple[Array, Array, Array]) -> Array:
        image, corner, share = given
        scale = jnp.full(2, side / pixels) / share
        moved = -corner * pixels * scale
        shape = (side, side, 1)
        return jax.image.scale_and_translate(image, shape, (0, 1), scale, moved, "linear")

    pixels_of = jnp.asarray(images / 127.5 - 1, jnp.float32)
    return lax.map(one, (pixels_of, corners, shares), batch_size=1000)


def whole(images: np.ndarray, side: int) -> Array:
    """Whole images, resized."""
    return resized(images, side, jnp.zeros((len(images), 2)), jnp.ones(len(images)))


def trained(config: Resolution) -> Iterator[Record]:
    """The accuracy at each size, with running statistics and with those of the size."""
    data = dataset(config.dataset, config.data_dir)
    raw = data.train_inputs[: config.images]
    rng = np.random.default_rng(0)
    shares = rng.uniform(config.smallest, 1, len(raw)).astype(np.float32)
    corners = rng.uniform(0, 1, (len(raw), 2)).astype(np.float32) * (1 - shares)[:, None]
    images = {
        "crops": resized(raw, config.side, jnp.asarray(corners), jnp.asarray(shares)),
        "whole": whole(raw, config.side),
    }
    labels = jnp.asarray(data.train_labels[: len(raw)])
    told = jnp.asarray(data.test_labels[: config.tests])
    small = data._replace(train_inputs=np.asarray(images["whole"]), train_labels=np.asarray(labels))
    options = {"widths": tuple((n,) for n in config.channels)} if config.channels else {}
    model, params, states = plain.begin(config, nl.get("batch"), small, **options)
    rule = optimizer(config)(config.lr)
    step = plain.sgd(model, rule)

    @plain.each_seed
    def fit(inputs: Array, params: Any, states: Any, rows: Array) -> Any:
        turn = lambda carry, r: (step(carry, (inputs[r], labels[r])), None)  # noqa: E731
        return lax.scan(turn, (params, states, rule.init(params)), rows)[0][:2]

    @jax.jit
    def test(ends: Any, seen: Array, images: Array) -> tuple[Array, ...]:
        def one(given: Any) -> tuple[Array, ...]:
            params, states = given
            variables = {"params": params, models.STATE: nl.population.begin(states)}
            _, after = model.apply(variables, seen, train=True, mutable=[models.STATE])
            own = nl.population.settle(after[models.STATE])
            return tuple(plain.right(model, params, s, images, told) for s in (states, own))

        return lax.map(one, ends)

    rows = jnp.asarray(np.stack([shuffled(seed, small, config) for seed in config.each_seed]))
    ends = {name: fit(inputs, params, states, rows) for name, inputs in images.items()}
    for side in (config.side, *config.larger):
        given = [whole(v, side) for v in (raw[:1000], data.test_inputs[: config.tests])]
        for name, trained in ends.items():
            for statistics, flags in zip(("running", "own"), test(trained, *given), strict=True):
                labels_of = {"images": name, "side": side, "statistics": statistics}
                yield from plain.evaluations(config, flags, **labels_of)


def verdict(records: Records) -> Iterator[Verdict]:
    """Which size is better, by how training images were made, and which statistics."""
    side, larger = sorted(records.values("side"))[:2]

    def accuracy(images: str, side: int, statistics: str) -> np.ndarray:
        return records.accuracy(images=images, side=side, statistics=statistics)

    points = {"at_least": 0, "unit": "points", "untuned": True}
    claim = f"trained on crops of {side} pixels, with statistics of the size: {larger} are better"
    gain = accuracy("crops", larger, "own") - accuracy("crops", side, "own")
    yield decide("crops.larger", claim, gain, size=ONE_POINT, source=TOUVRON, **points)
    claim = f"trained on whole images of {side} pixels: {side} are better than {larger}"
    lost = accuracy("whole", side, "own") - accuracy("whole", larger, "own")
    yield decide("whole.same", claim, lost, **points)
    claim = f"trained on crops, at {larger} pixels: statistics of that size are more accurate"
    gain = accuracy("crops", larger, "own") - accuracy("crops", larger, "running")
    yield decide("crops.statistics", claim, gain, source=TOUVRON, **points)


def figure(records: Records) -> Figure:
    """The error against the size of the test images, with either statistics."""
    picture, panels = draw.panels(records, "images")
    for axes, images, here in panels:
        draw.against(axes, here, "side", draw.test_error, by="statistics")
        draw.frame(axes, xlabel="pixels of a side in the test", ticks=here.values("side"))
        axes.set(title=f"trained on {images}" + (" images" if images == "whole" else ""))
    return draw.finish(picture, "Trained at the smallest size; mean and 95% interval")
