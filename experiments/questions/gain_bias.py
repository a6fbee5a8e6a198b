"""Does batch norm need its gain and its bias?

Claim: Without a gain and a bias a normalized sigmoid stays in its nearly linear part, so that the
net represents less and is less accurate. Before a ReLU the gain can be left out, since the next
layer can take it over; here nor is the bias missed.

Source: Ioffe & Szegedy 2015, section 3, https://arxiv.org/abs/1502.03167, gives the reason for the
pair, and no experiment: the points are ours. That the gain may go before a ReLU is what the
libraries' manuals say (`use_scale` in Flax, `scale` in Keras).

Protocol: MNIST, three hidden layers of 100 sigmoids or ReLUs, batches of 60, 1,000 steps of plain
SGD, over which the learning rate falls linearly to 0. Batch norm has both, the gain alone, the bias
alone, or neither, each at the best of four or more first rates, chosen on held-out training images
with other seeds. Measured is what leaving out costs, in points of test accuracy.

Command: normlab run gain_bias
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Source, Verdict, decide, draw, tuned

COST = 0.3
"""Points of test accuracy: what is needed costs as much when it is left out, what is not needed
costs or wins no more. Ours: as many as we count in figure 1. That the bias is not missed before a
ReLU is worded after a run of seeds 0 to 3."""

MANUAL = Source("flax2026", "BatchNorm, use_scale")

VARIANTS = {
    "both": (True, True),
    "gain alone": (True, False),
    "bias alone": (False, True),
    "neither": (False, False),
}
"""Whether batch norm has a gain, and a bias."""


@dataclasses.dataclass(frozen=True)
class GainBias(Config):
    """The config.

    Attributes:
      activations: Names of functions of `flax.linen`.
      rates: First learning rates, of which each variant has its best; for sigmoids, whose
        gradients are smaller, ten times as large.
    """

    activations: tuple[str, ...] = ("sigmoid", "relu")
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    schedule: Schedule = "linear"
    evaluations: int = 1


QUICK = GainBias()
SECONDS = 200
FULL = GainBias(dataset="cifar10", model="vgg", batch_size=128, steps=30_000, evaluations=30)


def run(config: GainBias) -> Iterator[Condition]:
    """Each activation and variant."""
    for activation in config.activations:
        for variant, (gain, bias) in VARIANTS.items():
            norm = nl.get("batch", use_gain=gain, use_bias=bias)
            rates = [10 * lr if activation == "sigmoid" else lr for lr in config.rates]
            measure = tuned(config, norm, rates, activation=getattr(nn, activation))
            yield Condition({"activation": activation, "variant": variant}, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """What each variant costs with each activation."""
    for activation in records.values("activation"):
        both = records.accuracy(activation=activation, variant="both")
        for variant in ("neither", "gain alone", "bias alone"):
            cost = both - records.accuracy(activation=activation, variant=variant)
            id = f"{activation}.{variant.replace(' ', '-')}"
            has = variant.replace("neither", "no gain and bias")
            where = f"{activation}, batch norm with {has}"
            if activation == "relu":
                claim = f"{where}: the accuracy is the same within {COST:g} points"
                source = MANUAL if variant == "bias alone" else None
                how = {"at_least": -COST, "at_most": COST, "source": source}
            else:
                claim = f"{where}: less accurate"
                how = {"at_least": 0, "size": COST}
            yield decide(id, claim, cost, unit="points", **how)


def figure(records: Records) -> Figure:
    """The test error at the end of each variant, a panel for each activation."""
    picture, panels = draw.panels(records, "activation", width=4)
    for axes, activation, here in panels:
        draw.columns(axes, {v: 100 - here.accuracy(variant=v) for v in VARIANTS})
        axes.set(ylabel="test error (%)", title=activation)
    return picture
