"""Do gradients vanish or explode with depth, and which norms keep them in range?

Claim: In a deep net of saturating activations the gradient vanishes on its way to the first layers;
normalization keeps it in range, and so does ReLU with He's initial weights. What is said in places,
that an activation's small derivatives make the gradient explode, is wrong: sigmoid′ ≤ 1/4 and
tanh′ ≤ 1, so such an activation can only shrink it. Where it grows, the weights make it grow.

Source: Glorot & Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html; He et al. 2015,
section 2.2, https://arxiv.org/abs/1502.01852; Ioffe & Szegedy 2015, section 3.3,
https://arxiv.org/abs/1502.03167

Protocol: 20 layers of 100 units at their initialization, and one batch of 128 MNIST images. The
weights are Gaussian with variance gain²/K for K inputs: gain 1, gain √2 ("He"), and gain 4
("large"), where units saturate. The gradient of the loss by what leaves each layer: the factor per
layer by which it grows backwards from the last layer to the first, as a geometric mean; and that
factor split in two, the part of the activation alone and that of norm and weights. Weight norm
starts from the statistics of the batch; from g = ‖w‖ it would be no norm at all. A seed draws
weights and batch.

Command: python -m experiments run vanishing
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Record, Records, Verdict, dataset, decide, draw, exact
from ..training.trainer import DeviceData

VANISHES = 0.5
"""The factor per layer at most, where the gradient vanishes: a millionth after 20 layers."""

RANGE = (0.8, 1.25)
"""The factor per layer where it stays in range: a hundredth to a hundred times over 20 layers."""

SLOPES = {"sigmoid": 0.25, "tanh": 1.0}
"""The largest derivative of each: the factor of the activation alone, at most, in any layer."""

F = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "ReLU": jax.nn.relu}

GAINS = {"1": 1.0, "He": math.sqrt(2), "large": 4.0}


@dataclasses.dataclass(frozen=True)
class Vanishing(Config):
    """The config.

    Attributes:
      depth: Hidden layers.
      width: Their units.
      norms: What stands before each activation.
    """

    depth: int = 20
    width: int = 100
    norms: tuple[str, ...] = ("none", "batch", "layer", "weight")
    batch_size: int = 128
    steps: int = 1
    evaluations: int = 1
    seeds: int = 5


QUICK = Vanishing()
SECONDS = 18
FULL = Vanishing(depth=50, width=400, seeds=10)


def run(config: Vanishing) -> Iterator[Condition]:
    """Each norm with each activation; the gains and seeds are measured side by side."""
    for activation in F:
        for norm in config.norms:
            labels = {"activation": activation, "norm": norm}
            yield Condition(labels, exact(measure, config, **labels))


def measure(config: Vanishing, activation: str, norm: str) -> Iterator[Record]:
    """The norms of the gradients by layer, of each gain and seed."""
    data = dataset(config.dataset, config.data_dir)
    options = {"data_init": True} if norm == "weight" else {}
    made = nl.get(norm, **options)
    look = jax.jit(lambda *args: gradients(made, F[activation], config, *args))
    for seed in range(config.seeds):
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(data.train_labels), config.batch_size, replace=False)
        images = DeviceData(data, 1).preprocess(data.train_inputs[chosen])
        images = images.reshape(config.batch_size, -1)
        sizes = [images.shape[1], *[config.width] * config.depth, data.classes]
        kernels = [
            (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)
            for shape in itertools.pairwise(sizes)
        ]
        for gain, scale in GAINS.items():
            scaled = [scale * w for w in kernels[:-1]]
            args = scaled[0], np.stack(scaled[1:]), kernels[-1]
            by_h, by_z = look(args, images, data.train_labels[chosen])
            by_h, by_z = np.asarray(by_h, float), np.asarray(by_z, float)
            yield {
                "kind": "gradients",
                "gain": gain,
                "seed": seed,
                "norms": by_h.tolist(),
                "factor": float((by_h[0] / by_h[-1]) ** (1 / (config.depth - 1))),
                "activation_factor": float((by_z / by_h).max()),
            }


def gradients(
    norm: nl.Norm, f: Any, config: Vanishing, kernels: Any, images: Array, labels: Array
) -> tuple[Array, Array]:
    """‖gradient‖ by what leaves and by what enters the activation of each layer, `[depth]` each.

    They are the gradients by zeros that are added there.
    """
    first, hidden, last = kernels

    def layer(x: Array, w: Array, dz: Array, dh: Array) -> Array:
        site = nl.Site(x @ w, x, w)
        z, _ = norm.apply(*norm.init(site), site, train=True)
        return f(z + dz) + dh

    def loss(dz: Array, dh: Array) -> Array:
        x = layer(images, first, dz[0], dh[0])
        x, _ = lax.scan(lambda x, args: (layer(x, *args), None), x, (hidden, dz[1:], dh[1:]))
        return optax.softmax_cross_entropy_with_integer_labels(x @ last, labels).mean()

    zeros = jnp.zeros((config.depth, config.batch_size, config.width))
    by_z, by_h = jax.grad(loss, (0, 1))(zeros, zeros)
    peak = jnp.abs(by_h).max((1, 2))  # squares of 1e-30 would underflow
    peak = jnp.where(peak > 0, peak, 1)[:, None, None]
    return tuple(
        peak.ravel() * jnp.linalg.norm((v / peak).reshape(len(v), -1), axis=1) for v in (by_h, by_z)
    )


def verdict(records: Records) -> Iterator[Verdict]:
    """What vanishes, what keeps it in range, and that an activation only shrinks it."""
    low, high = RANGE

    def grows(claim: str, activation: str, norm: str, gain: str, **limits: Any) -> Verdict:
        factor = records.by_seed("factor", activation=activation, norm=norm, gain=gain)
        return decide(f"{claim} (factor per layer)", factor, **limits, geometric=True)

    for activation in SLOPES:
        claim = f"{activation} without a norm: the gradient vanishes with depth"
        yield grows(claim, activation, "none", "1", at_most=VANISHES)
    settings = [(activation, "1", "") for activation in F]
    for activation, gain, said in (*settings, ("tanh", "large", ", large weights")):
        for norm in records.where(lambda r: r["norm"] != "none").values("norm"):
            claim = f"{activation} with {norm} norm{said}: the gradient stays in range"
            yield grows(claim, activation, norm, gain, at_least=low, at_most=high)
    claim = "ReLU without a norm, He's start: the gradient stays in range"
    yield grows(claim, "ReLU", "none", "He", at_least=low, at_most=high)
    for activation, slope in SLOPES.items():
        largest = records.by_seed("activation_factor", of=max, activation=activation)
        claim = f"{activation} by itself never makes a gradient grow (largest factor in a layer)"
        yield decide(claim, largest, at_most=slope)
    claim = "tanh without a norm, large weights: the gradient grows, saturated"
    yield grows(claim, "tanh", "none", "large", at_least=high)


def figure(records: Records) -> Figure:
    """The gradient of each layer, relative to the last one's, by activation."""
    picture, panels = draw.panels(records, "activation", width=3.6)
    lines = {"1": "-", "He": "--", "large": ":"}
    for axes, activation, here in panels:
        for norm, style in draw.styles(here.values("norm")).items():
            for gain in lines if norm == "none" else ("1",):
                mine = here.where(norm=norm, gain=gain)
                values = np.median([np.array(r["norms"]) / r["norms"][-1] for r in mine], axis=0)
                label = norm if gain == "1" else f"{norm}, gain {gain}"
                look = {**style, "ls": lines[gain], "markevery": 5, "label": label}
                axes.plot(range(1, len(values) + 1), values, **look)
        draw.frame(axes, log=True, title=activation, xlabel="layer")
        axes.set_ylabel("‖gradient‖ / the last layer's")
    return draw.finish(picture)
