"""Do statistics of the test batch help on images of another kind, and from how many images on?

Claim: On corrupted images the statistics of the batch to be predicted are more accurate and better
calibrated than those of training if the batch is large. Over few images they are worse; mixed with
those of training, as with 16 images more, they help from a single image on. On clean images they
cost accuracy. A step on the gains and biases that lowers the entropy of the predictions (TENT) adds
to that.

Source: Schneider et al. 2020, https://arxiv.org/abs/2006.16971 (a ResNet-50 on ImageNet-C: mean
corruption error 76.7 → 62.2%; a prior for small batches, which helps from one image on); Nado et
al. 2020, https://arxiv.org/abs/2006.10963 (accuracy and calibration under shift); Wang et al. 2021
(TENT), https://arxiv.org/abs/2006.10726 (a WRN-28-10 on CIFAR-10-C: error 43.5%, with the test
batch's statistics 20.4%, with TENT 18.6%). That the mixture beats both statistics where the batch
is as large as the prior, and is never much worse than the better one, is ours.

Protocol: The net of `domain`: MNIST, three layers of 100 ReLUs with batch norm, batches of 128,
1,000 steps of SGD, whose rate falls linearly from 0.1 to 0. It predicts 4,992 test images, clean,
with noise and blurred, in shuffled batches of 1 to 64, with the running statistics of training
(those are worth ∞ images), those of the batch (0) and both (16). TENT lowers the mean entropy of
each batch of 64 by one step of Adam at 0.001 on gains and biases; a batch is predicted before its
step. In a perceptron a batch of one has no variance, where in a conv net its positions have.

Command: normlab run test_time
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    Schedule,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    learn,
)
from .domain import DOMAINS
from .precise import floats

PRIOR = 16
"""How many images the statistics of training are worth where both are mixed: the source's choice
for small batches."""

ONE_POINT = 1.0
"""Points by which the mixture beats either alone on a batch of `PRIOR`; chosen before any run."""

CLOSE = 0.5
"""Points by which the mixture may be worse than the better one; chosen before any run."""

TENT_RATE = 0.001
"""That of Adam in TENT's code for CIFAR-10-C."""

SCHNEIDER = Source("schneider2020", number="mCE 76.7 → 62.2%", read="abstract")
ONE = Source("schneider2020", number="one image is enough to improve", read="abstract")
NADO = Source("nado2020", number="mCE 60.28, better calibrated", read="abstract")
TENT = Source("wang2020", "the authors' repository", "error 20.4 → 18.6%")

BINS = 15
"""Of the confidence, in the calibration error."""


@dataclasses.dataclass(frozen=True)
class TestTime(Config):
    """The config.

    Attributes:
      domains: Names of `domain.DOMAINS`, beside clean images.
      sizes: Images predicted together; they divide the largest.
      images: Test images, at most.
    """

    __test__ = False  # what pytest collects has such a name

    domains: tuple[str, ...] = ("noise", "blur")
    sizes: tuple[int, ...] = (1, 4, 16, 64)
    images: int = 4992
    batch_size: int = 128
    schedule: Schedule = "linear"
    evaluations: int = 1


QUICK = TestTime()
SECONDS = 40
FULL = TestTime(domains=("contrast", "noise", "blur"), images=9984, steps=20_000)


def run(config: TestTime) -> Iterator[Condition]:
    """One net, tested in every domain with every statistics."""
    look = functools.partial(accuracies, config)
    measure = learn(
        config,
        nl.get("batch"),
        prepare=functools.partial(prepare, config),
        instrument=look,
        activation=nn.relu,
    )
    arms = ["source", "tent", *(f"{n}_{count}" for n in config.sizes for count in (0, PRIOR))]
    says = {f"{name}_{arm}": 0.5 for name in ("clean", *config.domains) for arm in arms}
    yield Condition({"norm": "batch"}, measure, [says])


def prepare(config: TestTime, data: Dataset) -> Dataset:
    """Pixels from −1 to 1, and shuffled test images of whole batches."""
    largest = max(config.sizes)
    count = min(config.images, len(data.test_labels)) // largest * largest
    order = np.random.default_rng(0).permutation(len(data.test_labels))[:count]
    images, labels = data.test_inputs[order], data.test_labels[order]
    return floats(data._replace(test_inputs=images, test_labels=labels))


def accuracies(config: TestTime, net: Net) -> dict[str, Array]:
    """In each domain, at each size and with each prior, which images are told right, and more.

    `noise_64_0` is the accuracy on noisy images in batches of 64 with a prior of 0, `…_each` the
    images, `…_ece` the calibration error; `noise_source` is the same with the statistics of
    training, `noise_tent` after TENT's steps.
    """
    data = prepare(config, dataset(config.dataset, config.data_dir))
    labels, largest = jnp.asarray(data.test_labels), max(config.sizes)
    changes = {"clean": lambda images: images} | {name: DOMAINS[name] for name in config.domains}
    arms: dict[str, Callable[[Array], Array]] = {
        "source": functools.partial(predict, net, math.inf, size=largest),
        "tent": functools.partial(tent, net, size=largest),
    }
    for size in config.sizes:
        for count in (0, PRIOR):
            arms[f"{size}_{count}"] = functools.partial(predict, net, count, size=size)

    def look(images: Array) -> dict[str, Array]:
        found = {}
        for arm, logits_of in arms.items():
            logits = logits_of(images)
            right = logits.argmax(-1) == labels
            found |= {arm: right.mean(), f"{arm}_each": right}
            found[f"{arm}_ece"] = calibration_error(logits, labels)
        return found

    changed = np.stack([change(data.test_inputs) for change in changes.values()])
    found = lax.map(look, jnp.asarray(changed, jnp.float32))
    return {f"{name}_{k}": v[i] for i, name in enumerate(changes) for k, v in found.items()}


def batches(images: Array, size: int) -> Array:
    """Whole batches `[batches, size, ...]`."""
    return images.reshape(-1, size, *images.shape[1:])


def apply(net: Net, params: Any, state: Any, images: Array) -> Array:
    """The logits in inference."""
    variables = {"params": params, models.STATE: state}
    return net.model.apply(variables, images, train=False)  # type: ignore[return-value]


def predict(net: Net, count: float, images: Array, *, size: int) -> Array:
    """The logits `[N, classes]`, with a prior worth `count` images, in batches of `size`."""
    state = nl.population.adapt(net.norm_state, count)
    logits = jax.vmap(functools.partial(apply, net, net.params, state))(batches(images, size))
    return logits.reshape(len(images), -1)


def tent(net: Net, images: Array, *, size: int) -> Array:
    """As `predict` without a prior, with a step on gains and biases after each batch."""
    state, rule = nl.population.adapt(net.norm_state, 0), optax.adam(TENT_RATE)

    def is_norm(path: Any, _: Any) -> bool:
        return any(getattr(key, "key", None) == "norm" for key in path)

    own = jax.tree_util.tree_map_with_path(is_norm, net.params)

    def entropy(params: Any, batch: Array) -> tuple[Array, Array]:
        logits = apply(net, params, state, batch)
        return -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean(), logits

    def step(carry: Any, batch: Array) -> tuple[Any, Array]:
        params, opt = carry
        (_, logits), grads = jax.value_and_grad(entropy, has_aux=True)(params, batch)
        updates, opt = rule.update(grads, opt)
        updates = jax.tree.map(lambda u, mine: u if mine else 0 * u, updates, own)
        return (optax.apply_updates(params, updates), opt), logits

    begin = (net.params, rule.init(net.params))
    return lax.scan(step, begin, batches(images, size))[1].reshape(len(images), -1)


def calibration_error(logits: Array, labels: Array) -> Array:
    """The mean gap between confidence and accuracy over bins of the confidence, each by its size.

    >>> float(calibration_error(jnp.array([[0.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])))
    0.0
    """
    confidence, right = jax.nn.softmax(logits).max(-1), logits.argmax(-1) == labels
    at = jnp.clip((confidence * BINS).astype(int), 0, BINS - 1)
    gaps = jax.ops.segment_sum(right.astype(confidence.dtype) - confidence, at, BINS)
    return abs(gaps).sum() / len(labels)


def verdict(records: Records) -> Iterator[Verdict]:
    """What each statistics win in each domain, by the size of the batch."""
    ends = records.last()
    sizes, names = arms(ends)
    largest = max(sizes)

    def accuracy(name: str, arm: str) -> np.ndarray:
        return ends.accuracy(key=f"{name}_{arm}")

    lost = accuracy("clean", "source") - accuracy("clean", f"{largest}_0")
    claim = f"clean, {largest} images: the batch's statistics are less accurate than training's"
    yield decide("clean.statistics", claim, lost, at_least=0, unit="points")
    for name in names[1:]:
        source, tented = (accuracy(name, arm) for arm in ("source", "tent"))
        own, mixed = ([accuracy(name, f"{n}_{c}") for n in sizes] for c in (0, PRIOR))

        def points(id: str, claim: str, effects: np.ndarray, name: str = name, **how: Any):
            how = {"at_least": 0, "unit": "points", **how}
            return decide(f"{name}.{id}", f"{name}, {claim}", effects, **how)

        claim = f"{largest} images: the batch's statistics are more accurate than training's"
        yield points("statistics", claim, own[-1] - source, source=SCHNEIDER)
        few = sizes[1]
        claim = f"{few} images: the batch's statistics are less accurate than training's"
        yield points("few", claim, source - own[1])
        claim = f"1 image: mixed with {PRIOR} of training its statistics are more accurate"
        yield points("one", claim, mixed[0] - source, source=ONE)
        at = sizes.index(min(sizes, key=lambda n: abs(n - PRIOR)))
        claim = f"{sizes[at]} images: the mixture is more accurate than the better of both alone"
        gain = mixed[at] - np.maximum(own[at], source)
        yield points("mixture", claim, gain, size=ONE_POINT)
        worst = np.minimum.reduce(
            [m - np.maximum(o, source) for m, o in zip(mixed, own, strict=True)]
        )
        claim = "at the worst size: the mixture is about as accurate as the better of both alone"
        yield points("never-worse", claim, worst, at_least=-CLOSE)
        claim = f"{largest} images: the batch's statistics are better calibrated than training's"
        better = [100 * ends.by_seed(f"{name}_{arm}_ece") for arm in ("source", f"{largest}_0")]
        yield points("calibration", claim, better[0] - better[1], source=NADO)
        claim = f"{largest} images: TENT is more accurate than the batch's statistics alone"
        yield points("tent", claim, tented - own[-1], source=TENT)


def arms(records: Records) -> tuple[list[int], list[str]]:
    """The sizes of batches and the domains that were measured; clean images are the first."""
    names = [key.removesuffix("_source") for key in records[0] if key.endswith("_source")]
    sizes = [key.split("_")[1] for key in records[0] if key.startswith("clean_")]
    return sorted({int(n) for n in sizes if n.isdigit()}), sorted(names, key=lambda n: n != "clean")


def figure(records: Records) -> Figure:
    """The test accuracy in each domain against the size of the batch, by the statistics."""
    ends = records.last()
    sizes, names = arms(ends)
    picture, grid = draw.canvas(len(names), width=3.4)
    told = {"of training (∞)": None, f"of both ({PRIOR})": PRIOR, "of the batch (0)": 0}
    for name, axes in zip(names, grid, strict=True):
        rows = [
            {**r, "line": line, "size": size, "value": 100 * r[f"{name}_{arm}"]}
            for r in ends
            for line, count in told.items()
            for size in sizes
            for arm in ["source" if count is None else f"{size}_{count}"]
        ]
        rows += [
            {**r, "line": "TENT", "size": max(sizes), "value": 100 * r[f"{name}_tent"]}
            for r in ends
        ]
        draw.against(axes, rows, "size", "value", by="line")
        draw.frame(
            axes, xlabel="images in a batch", ylabel="test accuracy (%)", doubling=True, ticks=sizes
        )
        axes.set(title=name, ylim=(0, 100))
    return draw.finish(picture, "Statistics at test time; mean and 95% interval over seeds")
