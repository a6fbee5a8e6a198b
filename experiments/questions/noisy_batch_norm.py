"""Does batch norm still help if fresh noise moves what it made still?

Claim: Noise behind every batch norm, of a mean and a variance that are drawn anew at every step for
every unit, makes what enters a layer less still than without a norm. The net trains about as well
as with batch norm, and better than without: stillness is not what helps.

Source: Santurkar et al. 2018, section 2.1 and figure 2, https://arxiv.org/abs/1805.11604: a VGG on
CIFAR-10. The strength of their noise was not at hand: ours has three, set before any run. "About
as well" is within a point, and the factor 1.5 ours.

Protocol: Ten layers of 64 ReLUs on MNIST at 14×14 pixels, batches of 60, SGD with momentum 0.9,
each net at its best of four or more rates. Behind batch norm each activation is multiplied by s and
m is added: for each unit and step E s is drawn between 1 and 1 + strength/2, E m between −strength
and strength, and for each example s and m around them with standard deviation and half-width 0.1.
Measured over training, on 256 training images and two draws of noise: by how much a step on them
moves the mean and the standard deviation of a unit's input, as a share of its standard deviation
(root mean square over units and layers), and ‖G − G′‖/‖G‖ (covariate shift, definition 2.1 there).
Measured at the end without noise: the accuracy on 4,000 test images, with their own statistics,
since population statistics are those of noisy activations.

Command: normlab run noisy_batch_norm
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

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
    pooled,
    tuned,
)

MORE = 1.5
"""How much less still layers are with noise than without a norm, if as in our first look."""

WITHIN = 1.0
"""Points between noisy batch norm and batch norm, at most; chosen before any run."""

MIDDLE = 0.5
"""The strength of the noise on which the claims are decided."""

SOURCE = Source("santurkar2018", "section 2.1, figure 2", "", "second-hand")


@dataclasses.dataclass(frozen=True)
class NoisyBatchNorm(Config):
    """The config.

    Attributes:
      strengths: Of the noise behind batch norm.
      rates: Of which each net has its best.
      depth: Hidden layers.
      width: Units of each.
      pool: Pixels along each axis whose mean makes one.
      images: Test images on which nets are compared.
    """

    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    depth: int = 10
    width: int = 64
    pool: int = 2
    images: int = 4000
    optimizer: str = "momentum"
    steps: int = 500
    evaluations: int = 10


QUICK = NoisyBatchNorm()
SECONDS = 310
FULL = NoisyBatchNorm(
    dataset="cifar10", model="vgg", pool=1, batch_size=128, steps=10_000, evaluations=50
)


def run(config: NoisyBatchNorm) -> Iterator[Condition]:
    """Without a norm, with batch norm, and with noise of each strength behind it."""
    options: dict[str, Any] = {"activation": nn.relu}
    options["prepare"] = lambda data: scaled(data, config.pool)
    if config.model == "mlp":
        options["widths"] = (config.width,) * config.depth
    norms = {"none": nl.get("none"), "batch": nl.get("batch")}
    norms |= {f"noise {s:g}": noisy(s) for s in config.strengths}
    test = held_out(config)
    for name, norm in norms.items():
        look = measuring(*test, norms["none" if name == "none" else "batch"])
        yield Condition(
            {"norm": name}, tuned(config, norm, config.rates, instrument=look, **options)
        )


def scaled(data: Dataset, pool: int) -> Dataset:
    """Pooled images as float32 of about mean 0 and variance 1, which nobody scales again."""

    def scale(images: np.ndarray) -> np.ndarray:
        return ((images / 255 - 0.3) / 0.3).astype(np.float32)

    data = pooled(data, pool)
    return data._replace(train_inputs=scale(data.train_inputs), test_inputs=scale(data.test_inputs))


def noisy(strength: float) -> nl.Norm:
    """Batch norm, in training with noise that is new whenever the activations are.

    >>> norm, site = noisy(0.5), nl.Site(jnp.arange(8.0).reshape(4, 2))
    >>> params, state = norm.init(site)
    >>> still = nl.batch_norm(site.a, train=True)[0]
    >>> bool((norm.apply(params, state, site, train=True)[0] != still).all())
    True
    """
    base = nl.get("batch")

    def parts(params: Any, state: Any, site: nl.Site, *, train: bool) -> Any:
        found, after = base.parts(params, state, site, train=train)
        if not train:
            return found, after
        # What the batch is decides what is drawn, so that no state is needed to repeat a step.
        seed = lax.bitcast_convert_type(lax.stop_gradient(site.a).sum(), jnp.uint32)
        s, m = noise(jax.random.fold_in(jax.random.key(0), seed), site.a, strength)
        return found._replace(g=s * found.g, b=s * found.b + m), after

    return dataclasses.replace(base, parts=parts)


def noise(key: Array, a: Array, strength: float) -> tuple[Array, Array]:
    """What activations `[N, ..., C]` are multiplied by, and what is added to them."""
    keys, unit = jax.random.split(key, 4), (1,) * (a.ndim - 1) + a.shape[-1:]
    factor = 1 + strength / 2 * jax.random.uniform(keys[0], unit)
    shift = strength * jax.random.uniform(keys[1], unit, minval=-1)
    s = factor + 0.1 * jax.random.normal(keys[2], a.shape)
    return s, shift + 0.1 * jax.random.uniform(keys[3], a.shape, minval=-1)


def held_out(config: NoisyBatchNorm) -> tuple[Array, Array]:
    """The test images on which nets are compared, and their labels."""
    data = dataset(config.dataset, config.data_dir)
    few = data._replace(train_inputs=data.train_inputs[:0])  # the others take seconds
    few = few._replace(test_inputs=data.test_inputs[: config.images])
    images = scaled(few, config.pool).test_inputs
    return jnp.asarray(images), jnp.asarray(data.test_labels[: config.images])


def measuring(images: Array, labels: Array, still: nl.Norm) -> Any:
    """An instrument: how much a step moves, and the test images told right without noise."""

    def look(net: Net) -> dict[str, Array]:
        grads = jax.grad(net.loss)(net.params)
        after = jax.tree.map(lambda w, g: w - net.lr * g, net.params, grads)
        model: Any = net.model
        shift = instruments.covariate_shift(
            net.loss, net.params, after, layers=[*model.layers, "Dense_0"]
        )
        before, moved = (
            net._replace(params=p).activations(train=True) for p in (net.params, after)
        )
        moves = [_moved(before[k].h, moved[k].h) for k in model.layers]
        calm = model.clone(norm=still)
        variables = {"params": net.params, models.STATE: net.norm_state}
        z, _ = calm.apply(variables, images, train=True, mutable=[models.STATE])
        right = z.argmax(-1) == labels
        return {
            "moved": jnp.sqrt(jnp.stack(moves).mean()),
            "shift": (shift.distance[1:] / shift.norm[1:]).mean(),
            "still": right.mean(),
            "still_each": right,
        }

    return look


def _moved(before: Array, after: Array) -> Array:
    """The mean square of the moves of mean and standard deviation, over the latter."""
    axes = tuple(range(before.ndim - 1))
    (m, s), (n, t) = ((h.mean(axes), h.std(axes)) for h in (before, after))
    known = s > 1e-6  # a unit that is dead on the batch has no scale
    moves = (jnp.square(n - m) + jnp.square(t - s)) / jnp.where(known, s, 1) ** 2
    return jnp.where(known, moves, 0).sum() / jnp.maximum(known.sum(), 1)


def over_training(records: Records, key: str, norm: str) -> np.ndarray:
    """The geometric mean over training, of each seed."""
    here = records.trained().where(kind="evaluation", norm=norm)
    return here.by_seed(key, of=lambda values: float(np.exp(np.log(values).mean())))


def verdict(records: Records) -> Iterator[Verdict]:
    """How still layers are, and how well nets do."""
    noise = f"noise {MIDDLE:g}"
    more: dict[str, Any] = {"at_least": 1, "size": MORE, "geometric": True}
    factor = over_training(records, "moved", noise) / over_training(records, "moved", "none")
    claim = (
        f"a step moves what enters layers more with noise {MIDDLE:g} than without a norm (factor)"
    )
    yield decide("moved", claim, factor, **more, source=SOURCE)
    factor = over_training(records, "shift", noise) / over_training(records, "shift", "batch")
    claim = f"covariate shift ‖G − G′‖/‖G‖ with noise {MIDDLE:g} over that of batch norm"
    yield decide("shift", claim, factor, **more)
    none, batch, noised = (records.accuracy(key="still", norm=n) for n in ("none", "batch", noise))
    points: dict[str, Any] = {"unit": "points"}
    claim = "batch norm ends more accurate than no norm"
    yield decide("batch", claim, batch - none, at_least=0, **points)
    claim = f"noise {MIDDLE:g}: as accurate as batch norm, within a point (difference)"
    near = {"at_least": -WITHIN, "at_most": WITHIN}
    yield decide("noise.batch", claim, noised - batch, **near, **points, source=SOURCE)
    claim = f"noise {MIDDLE:g}: more accurate than no norm"
    yield decide("noise.none", claim, noised - none, at_least=0, **points, source=SOURCE)


def figure(records: Records) -> Figure:
    """How far a step moves, the covariate shift, and the error without noise, over training."""
    picture, (left, middle, right) = draw.canvas(3, width=4)
    here = records.where(kind="evaluation").trained()
    draw.over_steps(left, here, "moved")
    draw.frame(
        left, log=True, ylabel="move by a step / standard deviation", title="what enters layers"
    )
    draw.over_steps(middle, here, "shift")
    draw.frame(middle, log=True, ylabel="‖G − G′‖/‖G‖, mean over layers", title="covariate shift")
    draw.over_steps(right, here, lambda r: 100 * (1 - r["still"]))
    draw.frame(
        right, log=True, ylabel="test error (%)", title="without noise, statistics of the batch"
    )
    return draw.finish(picture)
