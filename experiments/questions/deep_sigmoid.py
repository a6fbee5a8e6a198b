"""Does a deep net of sigmoids learn with batch norm only?

Claim: A net with five or more hidden layers of sigmoids stays near chance without a norm, and
learns with batch norm before each sigmoid.

Source: Ioffe & Szegedy 2015, section 4.2.2, https://arxiv.org/abs/1502.03167: Inception with
sigmoids reaches 69.8% on ImageNet with batch norm, and never more than chance without. Glorot &
Bengio 2010, section 3.1, https://proceedings.mlr.press/v9/glorot10a.html: sigmoids of five hidden
layers never left saturation, from kernels uniform within ±1/√inputs. The accuracies are ours.

Protocol: MNIST, five and eight hidden layers of 100 sigmoids, kernels of variance 1/inputs, batches
of 60, 2,000 steps of SGD with momentum 0.9, each net at the best of four or more learning rates.
Measured is the test accuracy at the end. A net learns or does not, so the share of the nets is
judged. The accuracies are those of our first look at the paper's figure 1 with small initial
weights: 30% and 94%.

Command: normlab run deep_sigmoid
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Source, Verdict, decide_share, draw, tuned

STUCK = 30.0
"""Percent of the test set that a net which does not learn gets right, at most."""

LEARNS = 94.0
"""Percent of the test set that a net which learns gets right, at least."""

HALF = 0.5
"""The share of the nets that "few" are at most, and "most" at least."""

SOURCES = {
    "none": Source("glorot2010", "section 3.1", "five layers: never left saturation"),
    "batch": Source(
        "ioffe2015", "section 4.2.2", "69.8% with batch norm, without never above chance"
    ),
}


@dataclasses.dataclass(frozen=True)
class DeepSigmoid(Config):
    """The config.

    Attributes:
      norms: What stands before each sigmoid.
      depths: Numbers of hidden layers.
      rates: Learning rates, of which each net has its best.
      width: Units in each hidden layer.
    """

    norms: tuple[str, ...] = ("none", "batch")
    depths: tuple[int, ...] = (5, 8)
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    width: int = 100
    optimizer: str = "momentum"
    steps: int = 2000


QUICK = DeepSigmoid()
SECONDS = 300
FULL = DeepSigmoid(depths=(3, 5, 8, 12), steps=50_000, evaluations=50)


def run(config: DeepSigmoid) -> Iterator[Condition]:
    """Each depth and norm."""
    for depth in config.depths:
        for norm in config.norms:
            widths = (config.width,) * depth
            measure = tuned(config, nl.get(norm), config.rates, widths=widths)
            yield Condition({"norm": norm, "depth": depth}, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """The share of the seeds that learn at each depth, without and with batch norm."""
    for depth in sorted(records.values("depth")):
        where = f"{depth} hidden layers of sigmoids: "
        here = records.where(kind="evaluation", depth=depth)
        none, batch = (100 * here.by_seed("accuracy", norm=n) for n in ("none", "batch"))
        claim = f"{where}without a norm few nets get past {STUCK:g}% accuracy"
        id, source = f"depth-{depth}.none", SOURCES["none"]
        yield decide_share(id, claim, none > STUCK, at_most=HALF, source=source)
        claim = f"{where}with batch norm most are at {LEARNS:g}% accuracy"
        id, source = f"depth-{depth}.batch", SOURCES["batch"]
        yield decide_share(id, claim, batch >= LEARNS, at_least=HALF, source=source)


def figure(records: Records) -> Figure:
    """The accuracy on the way, at each net's best rate, a panel for each depth."""
    picture, panels = draw.panels(records.where(kind="evaluation"), "depth", width=4)
    for axes, depth, here in panels:
        draw.over_steps(axes, here, draw.accuracy)
        title = f"{depth} hidden layers"
        draw.frame(axes, threshold=(STUCK, LEARNS), ylim=(0, 100), title=title)
    return draw.finish(picture)
