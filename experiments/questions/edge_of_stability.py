"""Does full-batch gradient descent end at the edge of stability, with batch norm too?

Claim: Under full-batch gradient descent the largest eigenvalue of the Hessian rises until it is at
2/lr, and stays at or just above that, without a norm and with batch norm.

Source: Cohen et al. 2021, https://arxiv.org/abs/2103.00065, figure 1, for nets without a norm; what
they say of batch norm was not seen, and that claim is ours. "Just above" is between 0.8 and 1.3
times 2/lr here, ours; that it starts below is there to show the rise. The rates are those of a
pilot at which it gets there in time.

Protocol: 300 images of MNIST at 7×7 pixels, drawn with the seed and centred, two layers of 32 tanh
units, half the squared distance to the one-hot label as the loss, all images in every step, at two
rates for each net. The output layer starts at a tenth of the usual size: then the eigenvalue starts
low. Batch norm has the statistics of these images, and the Hessian goes through them. The
eigenvalue is that of LOBPCG, with its residual. The verdict is of its median over the last half of
the training.

Command: normlab run edge_of_stability
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

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
    number,
    pooled,
)
from ..training.trainer import stretches

LOW, HIGH = 0.8, 1.3
"""λ·lr/2 at the edge."""

BELOW = 0.5
"""λ·lr/2 at the start, if there is much of a rise; 1 is the edge."""

COHEN = Source("cohen2021", "figure 1", "at or just above 2/lr")


@dataclasses.dataclass(frozen=True)
class EdgeOfStability(Config):
    """The config.

    Attributes:
      norms: The nets.
      rates: Of each net, one after the other.
      examples: All images of a step.
      pool: Pixels along each axis whose mean makes one.
      width: Units of each layer.
    """

    norms: tuple[str, ...] = ("none", "batch")
    rates: tuple[float, ...] = (0.3, 0.5)
    examples: int = 300
    pool: int = 4
    width: int = 32
    steps: int = 1500
    evaluations: int = 10


QUICK = EdgeOfStability()
SECONDS = 60
FULL = EdgeOfStability(
    dataset="cifar10", examples=5000, pool=1, width=200, steps=20_000, evaluations=100
)


def run(config: EdgeOfStability) -> Iterator[Condition]:
    """Each norm at each rate."""
    for norm in config.norms:
        for lr in config.rates:
            yield Condition({"norm": norm, "lr": lr}, exact(descent, config, norm, lr))


Params = list[dict[str, Any]]


def descent(config: EdgeOfStability, name: str, lr: float) -> Iterator[Record]:
    """The loss and the largest eigenvalue over training, of all seeds side by side."""
    data = pooled(dataset(config.dataset, config.data_dir), config.pool)
    images = data.train_inputs.reshape(len(data.train_inputs), -1) / 255
    norm, targets = nl.get(name), np.eye(data.classes)
    each = []
    for seed in config.each_seed:
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(images), config.examples, replace=False)
        x, y = images[chosen], targets[data.train_labels[chosen]]
        x = x - x.mean(0)
        sizes = (x.shape[1], config.width, config.width, data.classes)
        each.append((begun(norm, rng, sizes), jnp.float32(x), jnp.float32(y)))
    params, x, y = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    train, look = descending(norm, lr)
    for start, stop in [(0, 0), *stretches(config.steps, config.evaluations)]:
        if stop:
            params = train(params, x, y, stop - start)
        found = {k: np.asarray(v) for k, v in look(params, x, y, keys).items()}
        for i, seed in enumerate(config.each_seed):
            values = {k: number(v[i]) for k, v in found.items()}
            yield {"kind": "edge", "seed": seed, "step": stop, **values}


def begun(norm: nl.Norm, rng: np.random.Generator, sizes: tuple[int, ...]) -> Params:
    """Gaussian kernels, with the parameters of the norm; of the output, a tenth as large."""
    params: Params = []
    for k, n in itertools.pairwise(sizes):
        w = jnp.asarray(rng.normal(size=(k, n)) / np.sqrt(k), jnp.float32)
        params.append({"w": w, "norm": norm.init(nl.Site(jnp.zeros((2, n)), w=w))[0]})
    return [*params[:-1], {"w": 0.1 * params[-1]["w"]}]


def descending(norm: nl.Norm, lr: float) -> tuple[Any, Any]:
    """What makes steps of all nets, and what looks at them."""

    def outputs(params: Params, x: Array) -> Array:
        for layer in params[:-1]:
            site = nl.Site(x @ layer["w"], x, layer["w"])
            x = jnp.tanh(norm.apply(layer["norm"], norm.init(site)[1], site, train=True)[0])
        return x @ params[-1]["w"]

    def loss(params: Params, x: Array, y: Array) -> Array:
        return jnp.square(outputs(params, x) - y).sum(1).mean() / 2

    @functools.partial(jax.jit, static_argnums=3)
    def train(params: Params, x: Array, y: Array, steps: int) -> Params:
        def step(_: Any, params: Params) -> Params:
            grads = jax.vmap(jax.grad(loss))(params, x, y)
            return jax.tree.map(lambda w, g: w - lr * g, params, grads)

        return lax.fori_loop(0, steps, step, params)

    @jax.jit
    @jax.vmap
    def look(params: Params, x: Array, y: Array, key: Array) -> dict[str, Array]:
        found = instruments.hessian_max(lambda w: loss(w, x, y), params, key, steps=40, tol=1e-2)
        right = (outputs(params, x).argmax(1) == y.argmax(1)).mean()
        half = lr / 2
        return {
            "edge": half * found.value,
            "residual": half * found.residual,
            "loss": loss(params, x, y),
            "right": right,
        }

    return train, look


def late(records: Records) -> float:
    """The median of λ·lr/2 over the last half of the training."""
    last = max(records.values("step"))
    return float(np.median([r["edge"] for r in records if r["step"] > last / 2]))


def verdict(records: Records) -> Iterator[Verdict]:
    """Where each net starts, and where it stays."""
    for norm, lr in records.values("norm", "lr"):
        here, where = records.where(norm=norm, lr=lr), f"{norm}, rate {lr:g}: λ·lr/2 "
        first = here.where(step=0).by_seed("edge")
        name = f"{norm}.rate-{lr:g}"
        claim = f"{where}at the start is below the edge"
        yield decide(f"{name}.start", claim, first, at_most=1, size=BELOW, geometric=True)
        claim = f"{where}over the last half of the training is at the edge"
        near: dict[str, Any] = {"at_least": LOW, "at_most": HIGH, "geometric": True}
        yield decide(
            f"{name}.edge",
            claim,
            here.each_seed(late),
            **near,
            source=COHEN if norm == "none" else None,
        )


def figure(records: Records) -> Figure:
    """The eigenvalue and the loss over training, a panel for each net."""
    norms = records.values("norm")
    picture, grid = draw.canvas(len(norms), 2, width=4.6, height=3)
    for column, norm in enumerate(norms):
        here = records.where(norm=norm)
        draw.over_steps(grid[0][column], here, "edge", by="lr", marker=True)
        draw.frame(grid[0][column], threshold=(LOW, HIGH), ylim=(0, 1.6), title=f"{norm}, by rate")
        draw.over_steps(grid[1][column], here, "loss", by="lr", marker=True)
        draw.frame(grid[1][column], log=True)
    grid[0][0].set_ylabel("λ·lr/2")
    grid[1][0].set_ylabel("loss")
    return draw.finish(picture)
