"""Does layer norm stand a small batch better than batch norm?

Claim: On permutation-invariant MNIST, layer norm trains as well with 4 examples in a batch as with
128, while batch norm gets worse.

Source: Ba, Kiros & Hinton 2016, section 6.6 and figure 6, https://arxiv.org/abs/1607.06450

Protocol: MNIST, a perceptron with ReLUs (three layers of 256; in the full profile the paper's two
of 1000), Adam, one epoch with batches of 128 and one with batches of 4, from the same kernels. The
rate begins with 0.001 at 128, goes with the root of the batch (Malladi et al. 2022,
https://arxiv.org/abs/2205.10287) and falls to zero (a cosine), since a constant one leaves seeds
and steps apart by as much as is asked for here. Batch norm's running statistics remember as many
examples at either batch. Layer norm stands in the hidden layers; batch norm stands there, and once
more in all layers, as in the paper.

Command: python -m experiments run layer_batch
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import flax.linen as nn
from matplotlib.figure import Figure

from ..engine import Condition, Config, Records, Schedule, Verdict, decide, draw, learn
from .batch_size import make, rise

STILL = 0.5
"""Points by which layer norm's error may move."""

WORSE = 1.5
"""Points by which batch norm's error rises, at least."""


@dataclasses.dataclass(frozen=True)
class LayerBatch(Config):
    """The config; steps and rate are those of the large batch.

    Attributes:
      norms: What stands before each ReLU.
      everywhere: Those that stand at the output too, beside the others.
      small: The small batch, which divides the large one.
      widths: The units of the hidden layers.
    """

    norms: tuple[str, ...] = ("batch", "layer")
    everywhere: tuple[str, ...] = ("batch",)
    small: int = 4
    widths: tuple[int, ...] = (256, 256, 256)
    batch_size: int = 128
    schedule: Schedule = "cosine"
    steps: int = 468
    evaluations: int = 6
    optimizer: str = "adam"
    lr: float = 0.001


QUICK = LayerBatch()
SECONDS = 130
FULL = LayerBatch(
    norms=("none", "batch", "layer"), widths=(1000, 1000), steps=9360, evaluations=20, seeds=10
)


def run(config: LayerBatch) -> Iterator[Condition]:
    """Each norm with large and with small batches."""
    whole = config.batch_size
    rows = [(name, "hidden") for name in config.norms]
    rows += [(name, "all") for name in config.everywhere]
    for name, where in rows:
        for size in (whole, config.small):
            here = dataclasses.replace(
                config,
                batch_size=size,
                steps=config.steps * whole // size,
                lr=config.lr * math.sqrt(size / whole),
            )
            measure = learn(
                here,
                make(name, size, size, whole),
                activation=nn.relu,
                widths=config.widths,
                normed_output=where == "all",
            )
            labels = {"norm": name, "layers": where, "batch": size, "together": size}
            yield Condition(labels, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """How far the small batch moves each error, and which norm is better at it."""
    small, whole = (f(records.values("batch")) for f in (min, max))
    layer = records.where(norm="layer")
    moved = rise(layer, "layer", batch=small, together=small)
    claim = f"layer norm from batch {whole} to {small}: its error stays"
    yield decide(claim, moved, at_least=-STILL, at_most=STILL, unit="points")
    for where in records.where(norm="batch").values("layers"):
        batch = records.where(norm="batch", layers=where)
        moved = rise(batch, "batch", batch=small, together=small)
        claim = f"batch norm in {where} layers, from batch {whole} to {small}: its error rises"
        yield decide(claim, moved, at_least=WORSE, unit="points")
        better = layer.accuracy(batch=small) - batch.accuracy(batch=small)
        claim = f"at batch {small} layer norm is more accurate than batch norm in {where} layers"
        yield decide(claim, better, at_least=0, unit="points")


def figure(records: Records) -> Figure:
    """The test error against the examples seen, with either batch."""
    picture, panels = draw.panels(records.trained(), "batch")
    for axes, size, here in panels:
        draw.over_steps(axes, here.where(layers="hidden"), draw.test_error, marker=True)
        for norm in here.where(layers="all").values("norm"):
            mine, label = here.where(layers="all", norm=norm), f"{norm}, in all layers"
            draw.over_steps(axes, mine, draw.test_error, ls="--", label=label)
        draw.frame(axes, log=True, title=f"batches of {size}")
    lows, highs = zip(*(axes.get_ylim() for axes in picture.axes), strict=True)
    for axes in picture.axes:
        axes.set_ylim(min(lows), max(highs))
    return draw.finish(picture, "Median and band of all seeds")
