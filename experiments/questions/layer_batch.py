"""Does layer norm stand a small batch better than batch norm?

Claim: On permutation-invariant MNIST, layer norm trains as well with 4 examples in a batch as with
128, while batch norm gets worse.

Source: Ba, Kiros & Hinton 2016, section 6.6 and figure 6, https://arxiv.org/abs/1607.06450: there
layer norm is in the hidden layers and batch norm in all; the text has no number, and of the figure
we know the axes. Batch norm in the hidden layers alone, and all points, are ours.

Protocol: MNIST, a perceptron with ReLUs (two layers of 128; in the full profile the paper's of
1000), Adam, half an epoch with batches of 128 and half an epoch with batches of 4, from the same
kernels. Each net has the best of four or more first rates at each batch, chosen on held-out
training images with other seeds; at the small batch they are those of the large one times the root
of the ratio (Malladi et al. 2022, https://arxiv.org/abs/2205.10287). The rate falls to zero (a
cosine), since a constant one leaves seeds and steps apart by as much as is asked for here. Batch
norm's running variance is the unbiased one, as in the paper, and remembers as many examples at
either batch.

Command: normlab run layer_batch
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Source, Verdict, decide, draw, tuned

STILL = 0.5
"""Points by which layer norm's error may move. Ours, after a pilot with one seed."""

WORSE = 1.5
"""Points by which batch norm's error rises, if it is by much. Ours, as above."""

SOURCE = Source("ba2016", "section 6.6, figure 6")
FIGURE = SOURCE._replace(read="second-hand")
"""What stands in the figure alone, of which we saw the axes."""


@dataclasses.dataclass(frozen=True)
class LayerBatch(Config):
    """The config; steps and rates are those of the large batch.

    Attributes:
      norms: What stands before each ReLU.
      everywhere: Those that stand at the output too, beside the others.
      small: The small batch, which divides the large one.
      rates: First learning rates, of which each net has its best.
      widths: The units of the hidden layers.
    """

    norms: tuple[str, ...] = ("batch", "layer")
    everywhere: tuple[str, ...] = ("batch",)
    small: int = 4
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    widths: tuple[int, ...] = (128, 128)
    batch_size: int = 128
    schedule: Schedule = "cosine"
    steps: int = 234
    evaluations: int = 3
    optimizer: str = "adam"


QUICK = LayerBatch()
SECONDS = 210
FULL = LayerBatch(norms=("none", "batch", "layer"), widths=(1000, 1000), steps=9360, evaluations=20)


def run(config: LayerBatch) -> Iterator[Condition]:
    """Each norm with large and with small batches."""
    whole = config.batch_size
    rows = [(name, "hidden") for name in config.norms]
    rows += [(name, "all") for name in config.everywhere]
    for name, where in rows:
        for size in (whole, config.small):
            steps = config.steps * whole // size
            here = dataclasses.replace(config, batch_size=size, steps=steps)
            memory = {"decay": 1 - 0.1 * size / whole, "ddof": 1} if name == "batch" else {}
            measure = tuned(
                here,
                nl.get(name, **memory),
                [float(f"{lr * math.sqrt(size / whole):.2g}") for lr in config.rates],
                activation=nn.relu,
                widths=config.widths,
                normed_output=where == "all",
            )
            yield Condition({"norm": name, "layers": where, "batch": size}, measure)


def rise(records: Records) -> np.ndarray:
    """Points by which the error at the small batch is above that at the large one."""
    small, whole = (f(records.values("batch")) for f in (min, max))
    return records.accuracy(batch=whole) - records.accuracy(batch=small)


def verdict(records: Records) -> Iterator[Verdict]:
    """How far the small batch moves each error, and which norm is better at it."""
    small, whole = (f(records.values("batch")) for f in (min, max))
    layer = records.where(norm="layer")
    claim = f"layer norm from batch {whole} to {small}: its error stays"
    how = {"unit": "points", "source": SOURCE}
    yield decide("layer.stays", claim, rise(layer), at_least=-STILL, at_most=STILL, **how)
    for where in records.where(norm="batch").values("layers"):
        batch = records.where(norm="batch", layers=where)
        theirs = where == "all"
        claim = f"batch norm in {where} layers, from batch {whole} to {small}: its error rises"
        how = {"at_least": 0, "unit": "points", "source": FIGURE if theirs else None}
        yield decide(f"batch-{where}.rises", claim, rise(batch), size=WORSE, **how)
        better = layer.accuracy(batch=small) - batch.accuracy(batch=small)
        claim = f"at batch {small} layer norm is more accurate than batch norm in {where} layers"
        yield decide(f"batch-{where}.layer-better", claim, better, **how)


def figure(records: Records) -> Figure:
    """The test error against the examples seen, with either batch."""
    picture, panels = draw.panels(records.where(kind="evaluation"), "batch")
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
