"""What does a small batch cost a conv net with batch norm, and can it train at batch 1?

Claim: Over 2 images batch norm loses, to its own accuracy over many and to group norm; over many it
is better than group norm. A shallow conv net loses little over 4, where a perceptron loses much: a
convolution's statistics come from N·H·W values. Over a single image conv batch norm still trains:
it is instance norm.

Source: Wu & He 2018, section 4.1 and tables 1 and 2, https://arxiv.org/abs/1803.08494: of ResNet-50
on ImageNet batch norm's error rises from 23.6% (32 images) to 27.3% (4) and 34.7% (2), group norm's
is 24.1%, and instance norm's, which batch norm over one image becomes, 28.4%. So a deep conv net
does lose over 4; that a shallow one loses little is ours, with m' = N·H·W of Ioffe & Szegedy 2015,
section 3.2, https://arxiv.org/abs/1502.03167, as a reason. Instance norm is of Ulyanov et al. 2016,
https://arxiv.org/abs/1607.08022. That batch norm could not train on one image has no known source.

Protocol: Fashion-MNIST (5,000 test images), three 3×3 convolutions of stride 2 with ReLU and 4, 8
and 16 channels (down to 4×4 positions), SGD with momentum 0.9 and a rate that falls to zero from
the best of three or more, 64 images in each of 200 steps, of which 64, 4, 2 or 1 are normalized
together on one device. Inference uses running statistics of all 64. Group, instance and in the full
profile layer norm beside it look at single images, whatever the batch. A net this shallow gains
little from any norm.

Command: normlab run batch_size_conv
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import (
    Condition,
    Config,
    Measure,
    Record,
    Records,
    Schedule,
    Source,
    Verdict,
    decide,
    draw,
    exact,
    number,
    tuned,
)

FOUR = 1.5
"""Points by which batch norm's error may rise over 4 images: less than a perceptron's in
`batch_size`."""

TWO = 11.1
"""Points by which it rises over 2 images in the source; group norm is better there by 10.6 of them,
and instance norm by 6.3."""

TWO_GROUP, TWO_INSTANCE = 10.6, 6.3

WHOLE = 0.5
"""Points by which batch norm over many is better than group norm in the source."""

TRAINS = 0.5
"""The training loss over single images at the end, as a share of that of guessing, at most. Ours,
chosen before any run."""

SAME = 1e-5
"""How far batch norm over single images may be from instance norm, output and gradient."""


@dataclasses.dataclass(frozen=True)
class BatchSizeConv(Config):
    """The config.

    Attributes:
      together: How many images of a batch batch norm normalizes together, below all of them.
      alone: Names of `ALONE`.
      rates: First learning rates, of which each net has its best.
      widths: The channels of the convolutions.
      images: Test images.
    """

    together: tuple[int, ...] = (4, 2, 1)
    alone: tuple[str, ...] = ("group", "instance")
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    widths: tuple[int, ...] = (4, 8, 16)
    images: int = 5000
    dataset: str = "fashion_mnist"
    model: str = "conv"
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 200
    evaluations: int = 2
    optimizer: str = "momentum"


QUICK = BatchSizeConv()
SECONDS = 200
FULL = BatchSizeConv(
    together=(32, 16, 8, 4, 2, 1),
    alone=("layer", "group", "instance"),
    rates=(0.01, 0.03, 0.1, 0.3),
    widths=(8, 16, 32),
    images=10_000,
    steps=20_000,
    evaluations=20,
)

ALONE = {
    "layer": nl.get("layer", axes="all"),
    "group": nl.get("group", groups=2),
    "instance": nl.get("instance"),
}
"""The norms that look at single images."""


def run(config: BatchSizeConv) -> Iterator[Condition]:
    """Batch norm over each part of a batch, the norms of single images, and one layer of each."""

    def net(norm: nl.Norm) -> Measure:
        prepare = functools.partial(tested, images=config.images)
        return tuned(config, norm, config.rates, prepare=prepare, widths=config.widths)

    for together in (config.batch_size, *config.together):
        norm = nl.get("batch", axis_name=nl.Sync(virtual_batch=together))
        yield Condition({"norm": "batch", "together": together}, net(norm))
    for name in config.alone:
        yield Condition({"norm": name, "together": 1}, net(ALONE[name]))
    yield Condition({"norm": "both", "together": 1}, exact(compare, config.each_seed))


def tested(data: Dataset, images: int) -> Dataset:
    """The data with the first images of the test set."""
    return data._replace(
        test_inputs=data.test_inputs[:images], test_labels=data.test_labels[:images]
    )


def compare(seeds: Iterable[int]) -> Iterator[Record]:
    """The largest relative gap between batch norm over each image and instance norm."""
    for seed in seeds:
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
    group, instance = (records.accuracy(norm=name) for name in ("group", "instance"))
    points = functools.partial(decide, unit="points")
    claim = f"conv batch norm over 4 images: its error rises by at most {FOUR:g} points"
    yield points("over-4.rise", claim, most - four, at_most=FOUR)
    claim = "conv batch norm over 2 images: its error rises"
    source = Source("wu2018", "table 2", "23.6 → 34.7% error")
    yield points("over-2.rise", claim, most - two, at_least=0, size=TWO, source=source)
    claim = "conv, 2 images: group norm is better than batch norm"
    source = Source("wu2018", "section 4.1, table 2", "24.1 against 34.7% error")
    yield points("over-2.group", claim, group - two, at_least=0, size=TWO_GROUP, source=source)
    claim = "conv, 2 images: instance norm is better than batch norm"
    source = Source("wu2018", "section 4.1", "28.4 against 34.7% error")
    how = {"at_least": 0, "size": TWO_INSTANCE, "source": source}
    yield points("over-2.instance", claim, instance - two, **how)
    claim = f"conv, {whole} images: batch norm is better than group norm"
    source = Source("wu2018", "table 1", "23.6 against 24.1% error")
    yield points("whole.group", claim, most - group, at_least=0, size=WHOLE, source=source)
    claim = "conv batch norm over 1 image trains (its loss, as a share of guessing's)"
    loss = records.by_seed("train_loss", kind="evaluation", norm="batch", together=1)
    source = Source("wu2018", "section 4.1", "28.4% error")
    yield decide("over-1.trains", claim, loss / math.log(10), at_most=TRAINS, source=source)
    claim = "conv batch norm over 1 image is instance norm, forth and back (relative gap)"
    same = {"at_most": SAME, "geometric": True, "exact": True}
    yield decide("over-1.instance", claim, records.by_seed("gap"), **same)


def figure(records: Records) -> Figure:
    """The error at the end against the images normalized together; the training loss."""
    records = records.where(kind="evaluation")
    final, batch = records.last(), records.where(norm="batch")
    sizes = sorted(batch.values("together"))
    picture, (left, right) = draw.canvas(2)
    draw.against(left, final.where(norm="batch"), "together", draw.test_error)
    alone = [name for name in records.values("norm") if name in ALONE]
    for name, style in draw.styles(alone).items():
        error = 100 - final.accuracy(norm=name)[:, 0]
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
