"""What does a small batch cost a conv net with batch norm, and can it train at batch 1?

Claim: A convolution's statistics come from N·H·W values, so that a conv net loses little where a
perceptron loses much; over 2 images group norm is the better, over many batch norm is. Over a
single image conv batch norm still trains: it is instance norm. (In circulation is that it cannot.)

Source: Wu & He 2018, figure 1 and table 2, https://arxiv.org/abs/1803.08494 (from 32 to 2 images
the error of ResNet-50 rises from 23.6% to 34.7%); Ioffe & Szegedy 2015, section 3.2 (m' = N·H·W),
https://arxiv.org/abs/1502.03167; Ulyanov et al. 2016 (instance norm),
https://arxiv.org/abs/1607.08022

Protocol: Fashion-MNIST, three 3×3 convolutions of stride 2 with ReLU (down to 4×4 positions), SGD
with momentum 0.9 and a rate that falls from 0.05 to zero, 64 images in each of 300 steps, of which
64, 4, 2 or 1 are normalized together on one device. Inference uses running statistics of all 64.
Group, layer and instance norm beside it look at single images, whatever the batch. A net this
shallow gains little from any norm.

Command: python -m experiments run batch_size_conv
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Schedule,
    Verdict,
    decide,
    draw,
    exact,
    learn,
    number,
)

FOUR = 1.5
"""Points by which batch norm's error may rise over 4 images; a perceptron's rises by more."""

TWO = 5.0
"""Points by which it may rise over 2 images; a perceptron's rises by four times as much."""

TRAINS = 0.5
"""The training loss over single images at the end, as a share of that of guessing, at most."""

SAME = 1e-5
"""How far batch norm over single images may be from instance norm, output and gradient."""


@dataclasses.dataclass(frozen=True)
class BatchSizeConv(Config):
    """The config.

    Attributes:
      together: How many images of a batch batch norm normalizes together, below all of them.
    """

    together: tuple[int, ...] = (4, 2, 1)
    dataset: str = "fashion_mnist"
    model: str = "conv"
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 300
    evaluations: int = 3
    optimizer: str = "momentum"
    lr: float = 0.05


QUICK = BatchSizeConv()
SECONDS = 145
FULL = BatchSizeConv(together=(32, 16, 8, 4, 2, 1), steps=20_000, evaluations=20, seeds=10)

ALONE = {
    "layer": nl.get("layer", axes="all"),
    "group": nl.get("group", groups=4),
    "instance": nl.get("instance"),
}
"""The norms that look at single images."""


def run(config: BatchSizeConv) -> Iterator[Condition]:
    """Batch norm over each part of a batch, the norms of single images, and one layer of each."""
    for together in (config.batch_size, *config.together):
        norm = nl.get("batch", axis_name=nl.Sync(virtual_batch=together))
        yield Condition({"norm": "batch", "together": together}, learn(config, norm))
    for name, norm in ALONE.items():
        yield Condition({"norm": name, "together": 1}, learn(config, norm))
    yield Condition({"norm": "both", "together": 1}, exact(compare, config.seeds))


def compare(seeds: int) -> Iterator[Record]:
    """The largest relative gap between batch norm over each image and instance norm."""
    for seed in range(seeds):
        drawn = np.random.default_rng(seed).normal(1, 2, (2, 8, 7, 7, 5)).astype(np.float32)
        yield {"kind": "layer", "seed": seed, "gap": number(gap(*drawn))}


@jax.jit
def gap(a: Array, cotangent: Array) -> Array:
    """How far the two are apart, in the output and in its gradient by the input."""
    single, state = nl.Sync(virtual_batch=1), nl.init_running(a.shape[-1])

    def over_one(a: Array) -> Array:
        return nl.batch_norm(a, None, state, train=True, axis_name=single)[0]

    (h, back), (instance, instance_back) = jax.vjp(over_one, a), jax.vjp(nl.instance_norm, a)
    pairs = ((h, instance), (back(cotangent)[0], instance_back(cotangent)[0]))
    return jnp.stack([abs(v - w).max() / abs(w).max() for v, w in pairs]).max()


def verdict(records: Records) -> Iterator[Verdict]:
    """The cost of small statistics, group norm beside them, and what a single image does."""
    whole = max(records.values("together"))
    most, four, two = (records.accuracy(norm="batch", together=n) for n in (whole, 4, 2))
    group = records.accuracy(norm="group")
    claim = "conv batch norm over 4 images: its error hardly rises"
    yield decide(claim, most - four, at_most=FOUR, unit="points")
    claim = "conv batch norm over 2 images: its error rises a little"
    yield decide(claim, most - two, at_least=0, at_most=TWO, unit="points")
    claim = "conv, 2 images: group norm is better than batch norm"
    yield decide(claim, group - two, at_least=0, unit="points")
    claim = f"conv, {whole} images: batch norm is better than group norm"
    yield decide(claim, most - group, at_least=0, unit="points")
    claim = "conv batch norm over 1 image trains (its loss, as a share of guessing's)"
    loss = records.by_seed("train_loss", norm="batch", together=1)
    yield decide(claim, loss / math.log(10), at_most=TRAINS)
    claim = "conv batch norm over 1 image is instance norm, forth and back (relative gap)"
    yield decide(claim, records.by_seed("gap"), at_most=SAME, geometric=True)


def figure(records: Records) -> Figure:
    """The error at the end against the images normalized together; the training loss."""
    records = records.where(kind="evaluation")
    final, batch = records.last(), records.where(norm="batch")
    sizes = sorted(batch.values("together"))
    picture, (left, right) = draw.canvas(2)
    draw.against(left, final.where(norm="batch"), "together", draw.test_error)
    for name, style in draw.styles(ALONE).items():
        error = 100 - final.accuracy(norm=name)
        draw.spread(left, [sizes[0], sizes[-1]], [error, error], label=name, **style)
    draw.frame(left, xlabel="images normalized together", doubling=True, ticks=sizes)
    lines = {f"over {n}": batch.where(together=n) for n in sizes}
    lines["instance norm"] = records.where(norm="instance")
    named = [{**r, "line": name} for name, rows in lines.items() for r in rows if r["step"] > 0]
    draw.over_steps(right, named, "train_loss", by="line", marker=True)
    right.set(ylabel="training loss (nats)", title="batch norm over so many images")
    right.legend(frameon=False, fontsize=8)
    title = "Left: running statistics at inference. Mean and 95% interval over seeds"
    return draw.finish(picture, title)
