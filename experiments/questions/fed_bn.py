"""Should devices with images of their own kind keep their own batch norms?

Claim: Where devices hold images of different kinds and average their weights, it is better for the
mean device to keep its own batch norms, params and statistics, out of the average (FedBN) than to
average all (FedAvg). Statistics of its own already win part of that.

Source: Li et al. 2021, https://arxiv.org/abs/2102.07623 (Office-Caltech, accuracy by device, FedAvg
→ FedBN: 47.8–89.5% → 50.1–97.0%; digits: best on each of five sets). That statistics alone win
part, and that averaging beats training alone here, are ours; the source has a data set on which
training alone beats FedAvg.

Protocol: MNIST, averaged to 14×14 pixels; four devices, each with 500 images that the seed draws,
of four kinds: as they are, inverted, blurred and with noise. Three layers of 100 ReLUs with batch
norm, batches of 50, SGD at 0.1; ten steps on each device, then the average, thirty times. A device
is tested on 2,000 test images of its own kind, and counted is the mean of the devices. One rate for
all, which nobody chose for any.

Command: normlab run fed_bn
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

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
    plain,
)
from .standardized_weights import halved

ONE_POINT = 1.0
"""Points by which the mean device gains; chosen before any run, below the source's."""

LI = Source("li2021", "table 1", "Office-Caltech 47.8–89.5 → 50.1–97.0%")

KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda images: images,
    "inverted": lambda images: -images,
    "blurred": lambda images: scipy.ndimage.gaussian_filter(images, (0, 1, 1, 0)),
    "noisy": lambda images: (
        images + np.random.default_rng(len(images)).normal(0, 0.7, images.shape)
    ),
}
"""What each device's images are; pixels go from −1 to 1."""

METHODS = {"FedAvg": "all", "own statistics": "params", "FedBN": "others", "alone": "nothing"}
"""What is averaged: the params and the statistics, the params, those of no norm, or nothing."""


@dataclasses.dataclass(frozen=True)
class FedBn(Config):
    """The config.

    Attributes:
      images: Training images of each device.
      tests: Test images of each.
      local: Steps between two averages.
    """

    images: int = 500
    tests: int = 2000
    local: int = 10
    batch_size: int = 50
    steps: int = 300


QUICK = FedBn()
SECONDS = 50
FULL = FedBn(tests=10_000, steps=3000)


def run(config: FedBn) -> Iterator[Condition]:
    """Each method."""
    for name in METHODS:
        yield Condition({"condition": name}, exact(trained, config, METHODS[name]))


def trained(config: FedBn, averaged: str) -> Iterator[Record]:
    """The accuracy of each device and seed at the end, on images of the device's kind."""
    data = halved(dataset(config.dataset, config.data_dir), config.tests)
    inputs, tests = (
        jnp.asarray(np.stack([change(v) for change in KINDS.values()]), jnp.float32)
        for v in (data.train_inputs, data.test_inputs)
    )
    model, params, states = plain.begin(config, nl.get("batch"), data, activation=nn.relu)
    rule = optax.sgd(config.lr)
    step = plain.sgd(model, rule)

    @plain.each_seed
    def train(arrays: Any, params: Any, states: Any, drawn: Array) -> Array:
        inputs, labels, tests, test_labels = arrays

        def local(carry: Any, kind: Array, chosen: Array) -> Any:
            def one(carry: Any, rows: Array) -> tuple[Any, None]:
                return step(carry, (inputs[kind, rows], labels[rows])), None

            return lax.scan(one, carry, chosen)[0]

        def turn(carry: Any, chosen: Array) -> tuple[Any, None]:
            params, states, opt = jax.vmap(local)(carry, jnp.arange(len(KINDS)), chosen)
            params = average(params, averaged != "nothing", norms=averaged != "others")
            return (params, average(states, averaged == "all", norms=True), opt), None

        begin = (params, states, rule.init(params))
        copies = jax.tree.map(lambda v: jnp.broadcast_to(v, (len(KINDS), *v.shape)), begin)
        params, states, _ = lax.scan(turn, copies, drawn)[0]
        test = lambda p, s, x: plain.right(model, p, s, x, test_labels)  # noqa: E731
        return jax.vmap(test)(params, states, tests)

    examples = len(data.train_labels)
    drawn = np.stack([batches(config, examples, seed) for seed in config.each_seed])
    arrays = (inputs, data.train_labels, tests, data.test_labels)
    flags = train(arrays, params, states, drawn)
    for i, kind in enumerate(KINDS):
        yield from plain.evaluations(config, flags[:, i], device=kind)


def batches(config: FedBn, examples: int, seed: int) -> np.ndarray:
    """The examples of every step, `[averages, devices, local, batch]`; each device has its own."""
    rng = np.random.default_rng(seed)
    owned = min(config.images, examples // len(KINDS))
    own = rng.permutation(examples)[: len(KINDS) * owned].reshape(len(KINDS), owned)
    turns = -(-config.steps // config.local)
    size = (turns, len(KINDS), config.local, min(config.batch_size, owned))
    rows = rng.random((*size[:3], owned)).argsort(-1)[..., : size[3]]  # without replacement
    return np.take_along_axis(own[None, :, None], rows, axis=-1)


def average(tree: Any, whether: bool, *, norms: bool) -> Any:
    """The leaves `[devices, ...]` averaged over the devices, or those of no norm alone."""

    def one(path: Any, v: Array) -> Array:
        mine = any(getattr(key, "key", None) == "norm" for key in path)
        if not whether or (mine and not norms) or not jnp.issubdtype(v.dtype, jnp.floating):
            return v
        return jnp.broadcast_to(v.mean(0), v.shape)

    return jax.tree_util.tree_map_with_path(one, tree)


def mean_device(records: Records, name: str) -> np.ndarray:
    """The accuracy of the mean device, as `Records.accuracy` has it."""
    each = [records.accuracy(name, device=kind) for kind in records.values("device")]
    return np.mean(each, axis=0)


def verdict(records: Records) -> Iterator[Verdict]:
    """What the mean device gains by its own norms, and by the average."""
    own, bn, avg, alone = (
        mean_device(records, name) for name in ("own statistics", "FedBN", "FedAvg", "alone")
    )
    points = {"at_least": 0, "unit": "points", "untuned": True}
    claim = "the mean device: FedBN is more accurate than FedAvg"
    yield decide("fed-bn", claim, bn - avg, size=ONE_POINT, source=LI, **points)
    claim = "the mean device: statistics of its own are more accurate than averaged ones"
    yield decide("statistics", claim, own - avg, **points)
    claim = "the mean device: gains and biases of its own are more accurate than averaged ones"
    yield decide("params", claim, bn - own, **points)
    claim = "the mean device: FedBN is more accurate than each device alone"
    yield decide("alone", claim, bn - alone, **points)


def figure(records: Records) -> Figure:
    """The accuracy of each device with each method, a point for each seed."""
    kinds = records.values("device")
    picture, grid = draw.canvas(len(kinds), width=2.8)
    for kind, axes in zip(kinds, grid, strict=True):
        names = records.values("condition")
        draw.columns(axes, {name: records.accuracy(name, device=kind) for name in names})
        axes.set(title=kind, ylabel="test accuracy (%)")
    picture.suptitle("Accuracy of each device on images of its kind; a point is a seed")
    return picture
