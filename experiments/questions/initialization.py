"""Does batch norm make the size of the initial weights matter less?

Claim: With batch norm the accuracy depends less on the size of the initial weights: a net without
has to start from the right size.

Source: Ioffe & Szegedy 2015, sections 1 and 3.3, https://arxiv.org/abs/1502.03167, where the reason
is BN((aW)u) = BN(Wu), and the gradient by aW the smaller the larger a is. That is exact for the
layers with a norm, and not for the last one. The paper has no number.

Protocol: MNIST, three hidden layers of 100 sigmoids or ReLUs, Gaussian initial kernels of standard
deviation 0.01 to 1 in all layers, batches of 60, 1,000 steps of plain SGD at rate 0.1, the same for
all: a net without a norm might do better from some of them at a rate of its own. Measured are the
final test accuracies and their range over these standard deviations. The points are ours.

Command: normlab run initialization
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Source, Verdict, decide, draw, lanes, learn

GAIN = 0.3
"""Points of test accuracy by which batch norm is better from the smallest weights and from the
largest, if they are as many as we count in figure 1. Ours, set before the first run."""

SOURCE = Source("ioffe2015", "sections 1 and 3.3")


@dataclasses.dataclass(frozen=True)
class Initialization(Config):
    """The config.

    Attributes:
      norms: What stands before each activation.
      activations: Names of functions of `flax.linen`.
      sds: Standard deviations of the initial kernels.
    """

    norms: tuple[str, ...] = ("none", "batch")
    activations: tuple[str, ...] = ("sigmoid", "relu")
    sds: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    steps: int = 1000
    evaluations: int = 2


QUICK = Initialization()
SECONDS = 200
FULL = Initialization(sds=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), steps=50_000, evaluations=20)


def run(config: Initialization) -> Iterator[Condition]:
    """Each activation and norm, with all standard deviations and seeds side by side."""
    rows = lanes(config, sd=config.sds)
    for activation in config.activations:
        for norm in config.norms:
            f = getattr(nn, activation)
            measure = learn(config, nl.get(norm), side_by_side=rows, activation=f)
            yield Condition({"norm": norm, "activation": activation}, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """The ranges over the standard deviations, and the gain at both ends."""
    least, *_, most = sds = sorted(records.values("sd"))
    how = {"unit": "points", "untuned": True}
    for activation in records.values("activation"):
        none, batch = (records.where(activation=activation, norm=n) for n in ("none", "batch"))
        ranges = [np.ptp([of.accuracy(sd=sd) for sd in sds], axis=0) for of in (none, batch)]
        claim = f"{activation}, initial sd {least:g} to {most:g}: "
        claim += "batch norm narrows the range of accuracies (difference of the ranges)"
        narrower = ranges[0] - ranges[1]
        yield decide(f"{activation}.range", claim, narrower, at_least=0, source=SOURCE, **how)
        for name, sd in (("smallest", least), ("largest", most)):
            gain = batch.accuracy(sd=sd) - none.accuracy(sd=sd)
            claim = f"{activation}, initial sd {sd:g}: batch norm is more accurate"
            yield decide(f"{activation}.{name}", claim, gain, at_least=0, size=GAIN, **how)


def figure(records: Records) -> Figure:
    """The test error at the end against the standard deviation, a panel for each activation."""
    picture, panels = draw.panels(records.last(), "activation", width=4)
    for axes, activation, here in panels:
        draw.against(axes, here, "sd", draw.test_error)
        draw.frame(axes, xscale="log", log=True, title=activation)
        axes.set_xlabel("standard deviation of the initial weights")
    return draw.finish(picture)
