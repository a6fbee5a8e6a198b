"""Do gradients vanish or explode with depth, and which norms keep them in range?

Claim: An unsaturated sigmoid divides the gradient by about 4 at each layer; tanh with weights of
variance 1/K keeps it, with the smaller ones of old shrinks it, and ReLU keeps it with He's. Batch
norm cures the sigmoid, but makes the gradient of ReLU and tanh grow with depth. What is said now
and then (no source is known), that an activation's small derivatives make the gradient explode, is
wrong: sigmoid′ ≤ 1/4 and tanh′ ≤ 1, so such an activation can only shrink it. Where it grows, the
weights make it grow.

Source: Glorot & Bengio 2010, section 4.2, https://proceedings.mlr.press/v9/glorot10a.html, for
tanh; He et al. 2015, section 2.2, https://arxiv.org/abs/1502.01852; Ioffe & Szegedy 2015, section
3.3, https://arxiv.org/abs/1502.03167, who conjecture that batch norm makes the singular values of a
layer nearly 1; Yang et al. 2019, https://arxiv.org/abs/1902.08129: it makes gradients explode. The
rest is ours; layer norm is in none of them.

Protocol: 20 layers of 100 units at their initialization, and one batch of 128 MNIST images. The
weights are Gaussian with variance gain²/K for K inputs: gain 1, √2 ("He"), 1/√3 ("old": what was
usual before Glorot), and 4 ("large"), where units saturate; a norm is blind to it. The gradient of
the loss by what leaves each layer: the factor per layer by which it grows backwards from the last
layer to the first, as a geometric mean; and that factor split in two, the part of the activation
alone and that of norm and weights. Weight norm starts from the statistics of the batch, so that it
is batch norm on that batch. A seed draws weights and batch.

Command: normlab run vanishing
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
)
from ..training.trainer import DeviceData

QUARTER = 0.25
"""The factor per layer of an unsaturated sigmoid: its derivative at 0."""

RANGE = (0.8, 1.25)
"""The factor per layer where it stays in range: a hundredth to a hundred times over 20 layers. It
was set after a look at some of the results."""

OLD = 0.6
"""The factor per layer of tanh with the old weights: 1/√3 by derivation, and about 0.5 in the
source."""

GROWS = {"tanh": None, "ReLU": math.sqrt(math.pi / (math.pi - 1))}
"""The activations whose gradient grows behind batch norm, and the theory's factor per layer, where
there is one."""

ROUNDING = 1e-6
"""Of a factor in float32."""

SAME = 1e-3
"""How far apart, relative, the factors of weight and batch norm may be: what ε makes of them."""

SLOPES = {"sigmoid": 0.25, "tanh": 1.0}
"""The largest derivative of each: the factor of the activation alone, at most, in any layer."""

F = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "ReLU": jax.nn.relu}

GAINS = {"1": 1.0, "He": math.sqrt(2), "old": 1 / math.sqrt(3), "large": 4.0}


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


QUICK = Vanishing()
SECONDS = 30
FULL = Vanishing(depth=50, width=400)


def run(config: Vanishing) -> Iterator[Condition]:
    """Each norm with each activation; the gains and seeds are measured side by side."""
    for activation in F:
        for norm in config.norms:
            labels = {"activation": activation, "norm": norm}
            says = [{"gain": gain, "norms": np.ones(config.depth)} for gain in GAINS]
            yield Condition(labels, exact(measure, config, **labels), says)


def measure(config: Vanishing, activation: str, norm: str) -> Iterator[Record]:
    """The norms of the gradients by layer, of each gain and seed."""
    data = dataset(config.dataset, config.data_dir)
    options = {"data_init": True} if norm == "weight" else {}
    made = nl.get(norm, **options)
    look = jax.jit(lambda *args: gradients(made, F[activation], config, *args))
    for seed in config.each_seed:
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
    """What shrinks, keeps and grows the gradient, and that an activation only shrinks it."""
    low, high = RANGE
    keeps = {"at_least": low, "at_most": high}

    def factor(activation: str, norm: str, gain: str = "1") -> np.ndarray:
        return records.by_seed("factor", activation=activation, norm=norm, gain=gain)

    def grows(id: str, claim: str, values: np.ndarray, **how: Any) -> Verdict:
        return decide(id, f"{claim} (factor per layer)", values, geometric=True, **how)

    claim = "sigmoid without a norm: the gradient shrinks with every layer"
    yield grows("sigmoid.none", claim, factor("sigmoid", "none"), at_most=1, size=QUARTER)
    source = Source("glorot2010", "section 4.2", "singular values of about 0.8")
    claim = "tanh without a norm, variance 1/K: the gradient stays in range"
    yield grows("tanh.none", claim, factor("tanh", "none"), **keeps, source=source)
    source = Source("glorot2010", "section 4.2", "singular values of about 0.5")
    claim = "tanh without a norm, variance 1/(3K): the gradient shrinks"
    old = factor("tanh", "none", "old")
    yield grows("tanh.none.old", claim, old, at_most=1, size=OLD, source=source)
    source = Source("he2015", "section 2.2", "1 for each layer", "second-hand")
    claim = "ReLU without a norm, He's start: the gradient stays in range"
    yield grows("relu.none.he", claim, factor("ReLU", "none", "He"), **keeps, source=source)
    claim = "tanh without a norm, large weights: the gradient grows, saturated"
    yield grows("tanh.none.large", claim, factor("tanh", "none", "large"), at_least=1, size=high)
    source = Source("ioffe2015", "section 3.3", "conjectured: singular values near 1")
    claim = "sigmoid with batch norm: the gradient stays in range"
    yield grows("sigmoid.batch", claim, factor("sigmoid", "batch"), **keeps, source=source)
    for activation, expected in GROWS.items():
        number = "√(π/(π − 1)) = 1.211, second-hand" if expected else ""
        source = Source("yang2019", "abstract", number, "abstract")
        claim = f"{activation} with batch norm: the gradient grows with every layer down"
        values = factor(activation, "batch")
        how = {"at_least": 1, "size": expected, "source": source}
        yield grows(f"{activation.lower()}.batch", claim, values, **how)
    claim = "sigmoid with layer norm: the gradient shrinks all the same"
    yield grows("sigmoid.layer", claim, factor("sigmoid", "layer"), at_most=1, size=0.5)
    for activation in GROWS:
        claim = f"{activation} with layer norm: the gradient stays in range"
        id = f"{activation.lower()}.layer"
        yield grows(id, claim, factor(activation, "layer"), **keeps)
    apart = [factor(a, "weight") / factor(a, "batch") - 1 for a in F]
    claim = "weight norm started from a batch is batch norm on it (relative difference of factors)"
    yield decide("weight", claim, np.abs(apart).max(axis=0), at_most=SAME, exact=True)
    for activation, slope in SLOPES.items():
        largest = records.by_seed("activation_factor", of=max, activation=activation)
        claim = f"{activation} by itself never makes a gradient grow (largest factor in a layer)"
        most = slope * (1 + ROUNDING)
        yield decide(f"{activation}.itself", claim, largest, at_most=most, exact=True)


def figure(records: Records) -> Figure:
    """The gradient of each layer, relative to the last one's, by activation."""
    picture, panels = draw.panels(records, "activation", width=3.6)
    lines = {"1": "-", "He": "--", "old": "-.", "large": ":"}
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
