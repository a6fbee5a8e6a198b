"""Do ghost batches narrow the gap between large batches and small ones?

Claim: After as many epochs a net with batch norm is less accurate on new images if it was trained
in large batches. Normalizing parts of them apart, as small as a small batch, narrows that gap.

Source: Hoffer et al. 2017, https://arxiv.org/abs/1705.08741: ghost batches lower the gap
significantly without more steps; more steps close it. A quarter of it is ours.

Protocol: 4,000 images of Fashion-MNIST at 14×14 pixels, drawn with the seed, three layers of 100
ReLUs, 15 epochs of SGD with momentum 0.9 whose rate falls linearly to 0: batches of 50; of 1,000;
of 1,000 of which 50 are normalized together. Each has the best rate of its grid, chosen on held-out
images. Running statistics remember ten of the largest batches. Measured is the test accuracy at the
end, with the running statistics.

Command: normlab run ghost_batches
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import (
    Condition,
    Config,
    Records,
    Schedule,
    Source,
    Verdict,
    decide,
    draw,
    pooled,
    tuned,
)
from ..training.trainer import minibatches

QUARTER = 0.25
"""Of the gap, that ghost batches close at least, if it is as much as our first look had."""

HOFFER = Source("hoffer2017", read="abstract")


@dataclasses.dataclass(frozen=True)
class GhostBatches(Config):
    """The config.

    Attributes:
      small: Examples of a small batch, and of those of a large one that are normalized together.
      large: Examples of a large batch.
      examples: Training images.
      epochs: How often each is seen.
      rates: That small batches try; large ones try them times √(large/small).
      pool: Pixels along each axis whose mean makes one.
      width: Units of each of three layers.
    """

    INSTEAD: ClassVar = {"batch_size": "--small and --large", "steps": "--epochs"}

    dataset: str = "fashion_mnist"
    small: int = 50
    large: int = 1000
    examples: int = 4000
    epochs: int = 15
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    pool: int = 2
    width: int = 100
    optimizer: str = "momentum"
    schedule: Schedule = "linear"
    evaluations: int = 3


QUICK = GhostBatches()
SECONDS = 50
FULL = GhostBatches(
    dataset="cifar10", model="resnet20", examples=50_000, pool=1, small=128, large=2048, epochs=100
)


def run(config: GhostBatches) -> Iterator[Condition]:
    """Small batches, large ones, and large ones with ghosts."""
    options: dict[str, Any] = {"activation": nn.relu, "draw": some}
    if config.model == "mlp":
        options["widths"] = (config.width,) * 3
    options["prepare"] = lambda data: pooled(data, config.pool)
    for name, size in (("small", config.small), ("large", config.large), ("ghosts", config.large)):
        steps = config.epochs * config.examples // size
        here = dataclasses.replace(config, batch_size=size, steps=steps)
        parts = nl.Sync(virtual_batch=config.small) if name == "ghosts" else None
        decay = 1 - 0.1 * size / config.large
        rates = [round(lr * (size / config.small) ** 0.5, 6) for lr in config.rates]
        norm = nl.get("batch", axis_name=parts, decay=decay)
        yield Condition({"batches": name}, tuned(here, norm, rates, **options))


def some(seed: int, data: Dataset, config: GhostBatches) -> np.ndarray:
    """Minibatches of some images alone, drawn with the seed."""
    rng = np.random.default_rng(seed)
    there = len(data.train_inputs)
    chosen = rng.choice(there, min(config.examples, there), replace=False)
    return chosen[minibatches(seed, len(chosen), config.batch_size, config.steps)]


def verdict(records: Records) -> Iterator[Verdict]:
    """The gap, and what ghosts win of it."""
    small, large, ghosts = (records.accuracy(batches=b) for b in ("small", "large", "ghosts"))
    how: dict[str, Any] = {"at_least": 0, "unit": "points"}
    claim = "small batches end more accurate than large ones"
    yield decide("gap", claim, small - large, **how, source=HOFFER)
    claim = "large batches end more accurate with ghosts"
    yield decide("ghosts", claim, ghosts - large, **how, source=HOFFER)
    claim = "ghosts win more than a quarter of the gap (points beyond that)"
    yield decide("quarter", claim, ghosts - large - QUARTER * (small - large), **how)


def figure(records: Records) -> Figure:
    """The test error by epochs, and at the end."""
    picture, (left, right) = draw.canvas(2)
    here = records.where(kind="evaluation")
    steps = {b: max(here.where(batches=b).values("step")) for b in here.values("batches")}
    share = [r | {"share": 100 * r["step"] / steps[r["batches"]]} for r in here]
    draw.over_steps(left, share, draw.test_error, x="share", by="batches", marker=True)
    draw.frame(left, xlabel="share of the epochs (%)", log=True, title="each at its best rate")
    groups = {b: 100 - here.accuracy(batches=b) for b in here.values("batches")}
    draw.columns(right, groups)
    draw.frame(right, ylabel="test error (%)", title="at the end")
    return draw.finish(picture)
