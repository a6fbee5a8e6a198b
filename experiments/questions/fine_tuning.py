"""Should batch norm be frozen when a net is fine-tuned on tiny batches?

Claim: A trained net that is fine-tuned with two images in a batch becomes more accurate if its
batch norms keep the statistics of before (frozen) than if they take those of the batch (live); it
is not the statistics of inference that live batch norm lacks.

Source: Common practice in detection; Wu & Johnson 2021, https://arxiv.org/abs/2105.07576
(training the last fifth with frozen statistics lowers the error at small normalization batches).
That it holds for fine-tuning is ours.

Protocol: Fashion-MNIST, averaged to 14×14 pixels; three 3×3 convolutions of stride 2 with batch
norm and ReLUs. 300 steps of SGD with momentum 0.9 at 0.05, falling to zero, with 64 images; then
one epoch on 1,000 images of the same kind with noise of standard deviation 0.3 (pixels go from −1
to 1), which the seed draws, two in a batch, at 0.001, falling to zero. Gains and biases are trained
in both. Live batch norm is tested with its running statistics, and with those of the 1,000 images
with the last weights. Tested on 5,000 noisy images. One rate for all, which nobody chose for any.

Command: normlab run fine_tuning
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

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
from .standardized_weights import halved

WU = Source("wu2021", "", "lower error at small normalization batches", "second-hand")

NAMES = {"before": "before", "live": "live", "precise": "live, PreciseBN", "frozen": "frozen"}
"""What is tested, in words."""


@dataclasses.dataclass(frozen=True)
class FineTuning(Config):
    """The config; steps, rate and batch are those of the first training.

    Attributes:
      images: How many there are to fine-tune on.
      few: Images in a batch then.
      slow: The learning rate then.
      noise: The standard deviation of the noise on the images of then.
    """

    images: int = 1000
    few: int = 2
    slow: float = 0.001
    noise: float = 0.3
    dataset: str = "fashion_mnist"
    model: str = "conv"
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 300
    optimizer: str = "momentum"
    lr: float = 0.05


QUICK = FineTuning()
SECONDS = 40
FULL = FineTuning(images=10_000, steps=20_000)


def run(config: FineTuning) -> Iterator[Condition]:
    """One net, fine-tuned with live and with frozen statistics."""
    yield Condition({"norm": "batch"}, exact(trained, config))


def trained(config: FineTuning) -> Iterator[Record]:
    """The accuracy on noisy images before and after each way of fine-tuning."""
    data = halved(dataset(config.dataset, config.data_dir))
    model, params, states = plain.begin(config, nl.get("batch"), data)
    rng = np.random.default_rng(0)
    noisy, tests = (
        jnp.asarray(v + rng.normal(0, config.noise, v.shape), jnp.float32)
        for v in (data.train_inputs, data.test_inputs)
    )
    images = min(config.images, len(data.train_labels))
    later = dataclasses.replace(config, steps=images // config.few)

    @plain.each_seed
    def train(arrays: Any, params: Any, states: Any, first: Array, own: Array) -> dict[str, Array]:
        inputs, noisy, labels, tests, test_labels = arrays

        def fit(
            config: FineTuning, lr: float, x: Array, params: Any, states: Any, rows: Array
        ) -> Any:
            rule = optimizer(config)(lr)
            step = plain.sgd(model, rule)
            carry = (params, states, rule.init(params))
            return lax.scan(lambda c, r: (step(c, (x[r], labels[r])), None), carry, rows)[0][:2]

        params, states = fit(config, config.lr, inputs, params, states, first)
        begun = {"live": states, "frozen": nl.population.freeze(states)}
        ends = {
            name: fit(later, config.slow, noisy, params, state, own.reshape(-1, config.few))
            for name, state in begun.items()
        }
        weights, live = ends["live"]
        variables = {"params": weights, models.STATE: nl.population.begin(live)}
        _, seen = model.apply(variables, noisy[own], train=True, mutable=[models.STATE])
        ends["precise"] = (weights, nl.population.settle(seen[models.STATE]))
        ends["before"] = (params, states)
        return {k: plain.right(model, p, s, tests, test_labels) for k, (p, s) in ends.items()}

    first = np.stack([shuffled(seed, data, config) for seed in config.each_seed])
    own = [
        np.random.default_rng(s).permutation(len(data.train_labels))[:images]
        for s in config.each_seed
    ]
    own = np.stack(own)[:, : images // config.few * config.few]
    arrays = (data.train_inputs, noisy, data.train_labels, tests, data.test_labels)
    for name, flags in train(arrays, params, states, first, own).items():
        yield from plain.evaluations(config, flags, condition=name)


def verdict(records: Records) -> Iterator[Verdict]:
    """What freezing wins over live statistics, and over none of the training."""
    before, live, precise, frozen = (records.accuracy(name) for name in NAMES)
    points = {"at_least": 0, "unit": "points", "untuned": True}
    claim = "frozen batch norm is more accurate than live batch norm"
    yield decide("frozen", claim, frozen - live, source=WU, **points)
    claim = "frozen batch norm is more accurate than live batch norm with statistics of all images"
    yield decide("precise", claim, frozen - precise, **points)
    claim = "fine-tuning with frozen batch norm is worth it"
    yield decide("worth", claim, frozen - before, **points)


def figure(records: Records) -> Figure:
    """The accuracy before and after, a point for each seed."""
    picture, (axes,) = draw.canvas(width=4.6)
    draw.columns(axes, {said: records.accuracy(name) for name, said in NAMES.items()})
    axes.set(ylabel="test accuracy, noisy images (%)", title="fine-tuning; a point is a seed")
    return picture
