"""Can a net with batch norm read the label off the other examples of a batch?

Claim: With batch norm a net learns a label that is a property of the other examples in its batch
and not of the example: it is right in training and with the statistics of such batches, and at
chance with population statistics. With layer norm it is at chance in all. On real images, examples
normalized together with their own class alone are fitted better in training and told worse at
inference; mixing the classes that are normalized together cures it.

Source: Wu & Johnson 2021, table 6 and figure 9, https://arxiv.org/abs/2105.07576, for batches of
one class, and for shuffling as the cure; He et al. 2020, https://arxiv.org/abs/1911.05722, shuffle
the batch among devices since statistics give their pretext task away. The synthetic label is ours.

Protocol: Synthetic: half of a batch of 64 Gaussian examples of 16 numbers have a first number
shifted by four times the batch's label, 1 or −1; the other half, of which alone loss and accuracy
are taken, have no shift. Who knows the mean of the batch can tell 98%. New examples at every step,
two layers of 32 ReLUs. Accuracy on 8,192 new examples, as many with each label: in batches like
those of training, with their own statistics; and with population statistics. Images: a conv net on
Fashion-MNIST at 14×14 pixels, batches of ten examples of each class, of which 10 are normalized
together: all of one class, or one of each. Both train on the same batches.

Command: normlab run leakage
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Source,
    Verdict,
    decide,
    draw,
    exact,
    learn,
    pooled,
)

READS = 95.0
"""Percent that are told right by a net that reads the label off the batch, at least."""

CHANCE = 2.0
"""Points from one half within which a net is at chance; of 8,192 examples two standard deviations
are 1.1. Both were chosen before any run."""

WU = Source("wu2021", "table 6, figure 9", "", "second-hand")


@dataclasses.dataclass(frozen=True)
class Leakage(Config):
    """The config; its steps and rate are those of the images.

    Attributes:
      norms: Of the synthetic task.
      synthetic_steps: Steps of the synthetic task.
      together: Examples of an image batch that are normalized together, of each class as many.
      pool: Pixels along each axis of an image whose mean makes one.
    """

    dataset: str = "fashion_mnist"
    model: str = "conv"
    norms: tuple[str, ...] = ("none", "batch", "layer")
    synthetic_steps: int = 500
    together: int = 10
    pool: int = 2
    optimizer: str = "momentum"
    lr: float = 0.03
    steps: int = 200
    evaluations: int = 3


QUICK = Leakage()
SECONDS = 100
FULL = Leakage(model="resnet20", dataset="cifar10", pool=1, steps=20_000, evaluations=20)


def run(config: Leakage) -> Iterator[Condition]:
    """The synthetic label with each norm; images normalized together with their class or mixed."""
    for norm in config.norms:
        says = [{"kind": "told", "statistics": kind} for kind in ("batch", "population")]
        yield Condition({"norm": norm}, exact(synthetic, config, norm), says)
    here = dataclasses.replace(config, batch_size=10 * config.together)
    norm = nl.get("batch", axis_name=nl.Sync(virtual_batch=config.together))
    for mixed in (False, True):
        how: dict[str, Any] = {"draw": by_class(mixed)}
        how["prepare"] = lambda data: pooled(data, config.pool)
        measure = learn(here, norm, **how)
        yield Condition({"together": "mixed" if mixed else "one class"}, measure)


def batch(key: Array, label: Array, size: int = 64, inputs: int = 16) -> Array:
    """Examples `[size, inputs]`, of which the second half tells the label of all, 1 or −1.

    >>> batch(jax.random.key(0), jnp.float32(1)).shape
    (64, 16)
    """
    x = jax.random.normal(key, (size, inputs))
    return x.at[size // 2 :, 0].add(4 * label)


def synthetic(config: Leakage, name: str) -> Iterator[Record]:
    """The share of new examples that is told right, with statistics of the batch and population."""
    norm = nl.get(name)
    widths = (16, 32, 32)

    def site(x: Array, w: Array) -> nl.Site:
        return nl.Site(x @ w, x, w)

    def apply(params: Any, states: Any, x: Array, train: bool) -> tuple[Array, Any]:
        after = []
        for (w, own), state in zip(params[:-1], states, strict=True):
            h, state = norm.apply(own, state, site(x, w), train=train)
            x = jax.nn.relu(h)
            after.append(state)
        return x @ params[-1], after

    def loss(params: Any, states: Any, key: Array) -> Any:
        normal, sign = jax.random.split(key)
        label = jax.random.rademacher(sign, (), jnp.float32)
        x = batch(normal, label)
        z, after = apply(params, states, x, True)
        mine = z[: len(x) // 2, 0] * label  # of those that carry nothing
        return jax.nn.softplus(-mine).mean(), after

    def begin(key: Array) -> Any:
        kernels = [
            jax.random.normal(jax.random.fold_in(key, i), shape) / shape[0] ** 0.5
            for i, shape in enumerate(zip(widths, (*widths[1:], 1), strict=True))
        ]
        made = [norm.init(site(jnp.zeros((64, len(w))), w)) for w in kernels[:-1]]
        params = [*zip(kernels[:-1], [own for own, _ in made], strict=True), kernels[-1]]
        return params, [state for _, state in made]

    optimizer = optax.adam(0.003)

    @jax.jit
    def learned(seed: Array) -> tuple[Array, Array]:
        first, steps, tests = jax.random.split(jax.random.key(seed), 3)
        params, states = begin(first)

        def step(at: Any, key: Array) -> Any:
            params, states, kept = at
            grads, states = jax.grad(loss, has_aux=True)(params, states, key)
            updates, kept = optimizer.update(grads, kept, params)
            return (optax.apply_updates(params, updates), states, kept), None

        keys = jax.random.split(steps, config.synthetic_steps)
        (params, states, _), _ = lax.scan(step, (params, states, optimizer.init(params)), keys)

        def right(key: Array, label: Array, train: bool) -> Array:
            x = batch(key, label)
            z, _ = apply(params, states, x, train)
            return (z[: len(x) // 2, 0] * label > 0).mean()

        keys, labels = jax.random.split(tests, 256), jnp.tile(jnp.array([1.0, -1.0]), 128)
        of_batch, of_population = (
            jax.vmap(lambda key, label, train=train: right(key, label, train))(keys, labels).mean()
            for train in (True, False)
        )
        return of_batch, of_population

    for seed in config.each_seed:
        for statistics, share in zip(("batch", "population"), learned(seed), strict=True):
            yield {"kind": "told", "seed": seed, "statistics": statistics, "share": float(share)}


def by_class(mixed: bool) -> Any:
    """Draws as many of every class for each batch, in order of the class or by turns."""

    def drawn(seed: int, data: Dataset, config: Config) -> np.ndarray:
        each, rng = config.batch_size // data.classes, np.random.default_rng(seed)
        count = config.steps * each
        rows = []
        for k in range(data.classes):
            mine = np.flatnonzero(data.train_labels == k)
            epochs = [rng.permutation(mine) for _ in range(-(-count // len(mine)))]
            rows.append(np.concatenate(epochs)[:count].reshape(config.steps, each))
        by = np.stack(rows, axis=2 if mixed else 1)  # the last axis varies fastest
        return by.reshape(config.steps, -1)

    return drawn


def verdict(records: Records) -> Iterator[Verdict]:
    """What nets read off their batches, and what it costs on images."""
    told = records.where(kind="told")

    def share(norm: str, statistics: str) -> np.ndarray:
        return 100 * told.by_seed("share", norm=norm, statistics=statistics)

    how: dict[str, Any] = {"unit": "%"}
    claim = "batch norm, statistics of such batches: the label is read off the others (accuracy)"
    yield decide("batch.batch", claim, share("batch", "batch"), at_least=READS, **how)
    near: dict[str, Any] = {"at_least": 50 - CHANCE, "at_most": 50 + CHANCE, **how}
    claim = "batch norm, population statistics: at chance (accuracy)"
    yield decide("batch.population", claim, share("batch", "population"), **near)
    claim = "layer norm, the same batches: at chance (accuracy)"
    yield decide("layer.batch", claim, share("layer", "batch"), **near)
    alone, mixed = (records.where(kind="evaluation", together=t) for t in ("one class", "mixed"))
    fitted = mixed.by_seed("train_loss") / alone.by_seed("train_loss")
    how = {"untuned": True, "source": WU}
    claim = "images, training loss with mixed classes over that with one class together"
    yield decide("images.training", claim, fitted, at_least=1, geometric=True, **how)
    lost = mixed.accuracy() - alone.accuracy()
    claim = "images, inference is more accurate if classes were mixed"
    yield decide("images.inference", claim, lost, at_least=0, unit="points", **how)


def figure(records: Records) -> Figure:
    """The accuracy on the synthetic label, and training loss and test error on images."""
    picture, (left, middle, right) = draw.canvas(3, width=3.7)
    told = records.where(kind="told")
    draw.columns(
        left,
        {
            f"{norm}, {statistics}": 100 * told.by_seed("share", norm=norm, statistics=statistics)
            for norm, statistics in told.values("norm", "statistics")
        },
    )
    draw.frame(left, threshold=(50, READS), ylim=(0, 102), title="a label of the batch")
    left.set_ylabel("told right (%), by norm and statistics")
    images = records.where(kind="evaluation")
    draw.over_steps(middle, images, "train_loss", by="together", marker=True)
    draw.frame(
        middle, log=True, ylabel="training loss (nats)", title="images, normalized together:"
    )
    draw.over_steps(right, images, draw.test_error, by="together", marker=True)
    right.set_title("the same at inference")
    return draw.finish(picture, key=middle)
