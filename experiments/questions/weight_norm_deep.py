"""Does weight norm generalize worse than batch norm in deep nets?

Claim: A deep net with weight norm is less accurate on test data than one with batch norm, though
its training loss is no higher; in a shallow net less so.

Source: Gitman & Ginsburg 2017, https://arxiv.org/abs/1709.08145 (a ResNet-50 on ImageNet: about 6%
less accurate in test with weight norm, at better training accuracy). That the gap grows from a
shallow net to a deep one is ours.

Protocol: Fashion-MNIST, 2,000 training images that the seed draws; perceptrons of 2 and of 10
layers of 64 ReLUs, batches of 50, 600 steps of SGD with momentum 0.9, whose rate falls to zero as a
cosine from the best of a grid, chosen for each norm and depth on held-out images. Weight norm
starts from the data (Salimans & Kingma 2016). The training loss is the mean over the last fifth of
the steps.

Command: normlab run weight_norm_deep
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import Condition, Config, Records, Schedule, Source, Verdict, decide, draw, tuned

WORSE = 1.0
"""Points by which weight norm is less accurate in the deep net, at least; chosen before any run, a
sixth of the source's."""

GITMAN = Source(
    "gitman2017", "", "ResNet-50: about 6% worse in test, better in training", "abstract"
)


@dataclasses.dataclass(frozen=True)
class WeightNormDeep(Config):
    """The config.

    Attributes:
      rates: The grid of first learning rates.
      depths: Hidden layers, of the shallow net and of the deep one.
      width: Their units.
      images: Training images of each seed.
    """

    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    depths: tuple[int, ...] = (2, 10)
    width: int = 64
    images: int = 2000
    dataset: str = "fashion_mnist"
    batch_size: int = 50
    schedule: Schedule = "cosine"
    steps: int = 600
    evaluations: int = 5
    optimizer: str = "momentum"


QUICK = WeightNormDeep()
SECONDS = 60
FULL = WeightNormDeep(depths=(2, 10, 30), width=256, images=60_000, steps=20_000)


def run(config: WeightNormDeep) -> Iterator[Condition]:
    """Each norm at its best rate at each depth."""
    for depth in config.depths:
        for name in ("weight", "batch"):
            measure = tuned(
                config,
                nl.get(name, data_init=True) if name == "weight" else nl.get(name),
                config.rates,
                draw=few,
                widths=(config.width,) * depth,
                activation=nn.relu,
            )
            yield Condition({"norm": name, "depth": depth}, measure)


def few(seed: int, data: Dataset, config: WeightNormDeep) -> np.ndarray:
    """Minibatches from epochs over the images that the seed draws."""
    rng = np.random.default_rng(seed)
    count = min(config.images, len(data.train_labels))
    own = rng.permutation(len(data.train_labels))[:count]
    epochs = -(-config.steps // (count // config.batch_size))
    rows = [
        rng.permutation(own)[: count // config.batch_size * config.batch_size]
        for _ in range(epochs)
    ]
    return np.concatenate(rows).reshape(-1, config.batch_size)[: config.steps].astype(np.int32)


def verdict(records: Records) -> Iterator[Verdict]:
    """The gap at each depth, and the training loss of the deep net."""
    depths = sorted(records.where(kind="evaluation").values("depth"))
    gaps = {
        depth: records.accuracy(norm="batch", depth=depth)
        - records.accuracy(norm="weight", depth=depth)
        for depth in depths
    }
    shallow, deep = depths[0], depths[-1]
    points = {"at_least": 0, "unit": "points"}
    claim = f"{deep} layers: weight norm is less accurate than batch norm"
    yield decide("deep", claim, gaps[deep], size=WORSE, source=GITMAN, **points)
    claim = f"weight norm loses more on batch norm with {deep} layers than with {shallow}"
    yield decide("grows", claim, gaps[deep] - gaps[shallow], **points)
    loss = [
        records.by_seed("train_loss", kind="evaluation", norm=name, depth=deep)
        for name in ("batch", "weight")
    ]
    claim = f"{deep} layers: the training loss of weight norm is lower (nats)"
    yield decide("training", claim, loss[0] - loss[1], at_least=0, source=GITMAN)


def figure(records: Records) -> Figure:
    """The test accuracy and the training loss at each depth, a point for each seed."""
    ends = records.last()
    picture, (left, right) = draw.canvas(2)
    groups = {
        f"{name}, {depth} layers, rate {records.best_rate(norm=name, depth=depth):g}": {
            "norm": name,
            "depth": depth,
        }
        for name, depth in ends.values("norm", "depth")
    }
    draw.columns(left, {said: records.accuracy(**where) for said, where in groups.items()})
    left.set(ylabel="test accuracy (%)")
    draw.columns(
        right, {said: ends.by_seed("train_loss", **where) for said, where in groups.items()}
    )
    draw.frame(right, ylabel="training loss at the end (nats)", log=True)
    picture.suptitle("At the best rate; a point is a seed")
    return picture
