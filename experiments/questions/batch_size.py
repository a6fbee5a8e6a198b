"""What does a small batch cost a perceptron with batch norm, and what without?

Claim: Batch norm's error rises steeply when its statistics come from a few examples; group norm and
layer norm, which look at each example alone, do not depend on the batch. (That the error of batch
norm falls with a smaller batch is said in places, and is wrong.)

Source: Wu & He 2018, section 4.1 and table 2, https://arxiv.org/abs/1803.08494: of ResNet-50 on
ImageNet batch norm's error rises from 23.6% (32 images on each of 8 GPUs) to 27.3% (4) and 34.7%
(2), and group norm's is 24.0 to 24.2% throughout. There the statistics' batch, the step's batch and
the rate change together, which is "at batch 4" here; "over 4" and "over 2" change the statistics
alone. Ba et al. 2016, section 6.6, https://arxiv.org/abs/1607.06450, say that layer norm is robust
to the batch, at 128 and 4. The net without a norm, and within how many points an error stays, are
ours.

Protocol: MNIST, three layers of 100 ReLUs, SGD with a rate that falls to zero. Two batches are
varied apart. The normalization batch: every step sees 128 examples, of which 128, 16, 4 or 2 are
normalized together on one device, and only batch norm's statistics differ. The true batch: 128 or 4
examples in a step, the rate in proportion (from 0.1 at 128), and as many examples in all; without a
norm this shows what the batch costs the optimizer. The running statistics remember as many examples
at every batch. Half an epoch; in the full profile twenty, and every size. All norms have the one
rate.

Command: normlab run batch_size
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Source, Verdict, decide, draw, learn

FOUR, TWO = 3.7, 11.1
"""Points by which batch norm's error rises over 4 examples and over 2: those of the source."""

STILL = 0.5
"""Points by which the error of a norm of single examples may move with the true batch: after a run
of seeds 0 to 4, and more than the source's 0.2."""

WU = {4: "23.6 → 27.3% error", 2: "23.6 → 34.7% error"}
"""What the source finds with so few examples."""

SINGLE = {
    "none": ("no norm", None),
    "layer": ("layer norm", Source("ba2016", "section 6.6")),
    "group": ("group norm", Source("wu2018", "table 2", "24.0 to 24.2% error")),
}
"""The norms of single examples in words, and who says that their error stays."""


@dataclasses.dataclass(frozen=True)
class BatchSize(Config):
    """The config; steps and rate are those of the largest batch.

    Attributes:
      norms: What stands before each ReLU when the true batch is varied.
      together: How many examples of a batch are normalized together.
      batches: The true batches below `batch_size`; they divide it.
    """

    norms: tuple[str, ...] = ("none", "batch", "layer", "group")
    together: tuple[int, ...] = (16, 4, 2)
    batches: tuple[int, ...] = (4,)
    batch_size: int = 128
    schedule: Schedule = "cosine"
    steps: int = 234
    evaluations: int = 1


QUICK = BatchSize()
SECONDS = 120
FULL = BatchSize(together=(32, 16, 8, 4, 2), batches=(32, 16, 8, 4, 2), steps=9360, evaluations=20)


def run(config: BatchSize) -> Iterator[Condition]:
    """Batch norm over each part of a batch, and each norm at each true batch."""
    whole = config.batch_size
    rows = [("batch", whole, together) for together in config.together]
    rows += [(name, size, size) for name in config.norms for size in (whole, *config.batches)]
    for name, size, together in rows:
        here = dataclasses.replace(
            config,
            batch_size=size,
            steps=config.steps * whole // size,
            lr=config.lr * size / whole,
        )
        measure = learn(here, make(name, size, together, whole), activation=nn.relu)
        yield Condition({"norm": name, "batch": size, "together": together}, measure)


def make(name: str, batch: int, together: int, whole: int) -> nl.Norm:
    """The norm; batch norm's running statistics remember ten of the largest batches."""
    if name == "group":
        return nl.get("group", groups=10)
    if name != "batch":
        return nl.get(name)
    parts = nl.Sync(virtual_batch=together)
    return nl.get("batch", axis_name=parts, decay=1 - 0.1 * batch / whole, ddof=1)


def rise(records: Records, norm: str, *, batch: int, together: int) -> np.ndarray:
    """Points by which each seed's error is above that at the largest batch."""
    whole = max(records.values("batch"))
    best = records.accuracy(norm=norm, batch=whole, together=whole)
    return best - records.accuracy(norm=norm, batch=batch, together=together)


def verdict(records: Records) -> Iterator[Verdict]:
    """How far the error moves from the largest batch to batches of 4 and of 2."""
    whole = max(records.values("batch"))
    for words, batch, together, size in (
        ("over 4", whole, 4, FOUR),
        ("over 2", whole, 2, TWO),
        ("at batch 4", 4, 4, FOUR),
    ):
        rises = rise(records, "batch", batch=batch, together=together)
        source = Source("wu2018", "section 4.1, table 2", WU[together])
        how = {"at_least": 0, "size": size, "unit": "points", "untuned": True, "source": source}
        id = f"batch.{words.replace(' ', '-')}"
        yield decide(id, f"batch norm {words}: its error rises", rises, **how)
    for name in records.where(lambda r: r["norm"] != "batch").values("norm"):
        moved = rise(records, name, batch=4, together=4)
        words, source = SINGLE[name]
        claim = f"{words} at batch 4: its error stays within {STILL:g} points"
        how = {"at_least": -STILL, "at_most": STILL, "unit": "points", "untuned": True}
        yield decide(f"{name}.at-batch-4", claim, moved, source=source, **how)


def figure(records: Records) -> Figure:
    """The error at the end against either batch."""
    final, whole = records.last(), max(records.values("batch"))
    picture, (left, right) = draw.canvas(2)
    draw.against(left, final.where(norm="batch", batch=whole), "together", draw.test_error)
    draw.frame(left, xlabel=f"examples normalized together, of {whole}", doubling=True, log=True)
    true = final.where(lambda r: r["batch"] == r["together"])
    draw.against(right, true, "batch", draw.test_error)
    draw.frame(right, xlabel="examples in a batch", doubling=True, log=True)
    title = "Left: only statistics differ. Right: the step's batch. Mean, 95% interval"
    return draw.finish(picture, title, key=right)
