"""Does batch norm need its gain and its bias?

Claim: Without a gain and a bias a normalized sigmoid stays in its nearly linear part, so that the
net represents less. Before a ReLU the gain can be left out, since the next layer can take it over,
and the bias cannot.

Source: Ioffe & Szegedy 2015, section 3, https://arxiv.org/abs/1502.03167, gives the reason for the
pair; the paper has no experiment on it. That the gain may go before a ReLU is what the libraries'
manuals say (`scale=False` in Flax and in Keras).

Protocol: MNIST, three hidden layers of 100 sigmoids or ReLUs, batches of 60, 1,000 steps of plain
SGD, over which the learning rate falls linearly to 0. Batch norm has both, the gain alone, the bias
alone, or neither, each at the best of four first rates. Measured is what leaving out costs, in
points of test accuracy. What counts as a cost is ours: as many points as batch norm has to win in
figure 1.

Command: python -m experiments run gain_bias
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Verdict, decide, draw, lanes, learn

COST = 0.3
"""Points of test accuracy: what is needed costs at least as much when it is left out, what is not
needed costs or wins no more."""

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
      rates: First learning rates, of which each net has its best.
    """

    activations: tuple[str, ...] = ("sigmoid", "relu")
    rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    schedule: Schedule = "linear"
    evaluations: int = 2
    seeds: int = 4


QUICK = GainBias()
SECONDS = 105
FULL = GainBias(dataset="cifar10", model="vgg", batch_size=128, steps=30_000, seeds=10)


def run(config: GainBias) -> Iterator[Condition]:
    """Each activation and variant, with all rates and seeds side by side."""
    rows = lanes(config, lr=config.rates)
    for activation in config.activations:
        for variant, (gain, bias) in VARIANTS.items():
            norm = nl.get("batch", use_gain=gain, use_bias=bias)
            f = getattr(nn, activation)
            measure = learn(config, norm, side_by_side=rows, activation=f)
            yield Condition({"activation": activation, "variant": variant}, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """What each variant costs with each activation."""
    best = records.tuned("activation", "variant")
    for activation in best.values("activation"):
        both = best.accuracy(activation=activation, variant="both")
        for variant in ("neither", "gain alone", "bias alone"):
            cost = both - best.accuracy(activation=activation, variant=variant)
            has = variant.replace("neither", "no gain and bias")
            where = f"{activation}, batch norm with {has}"
            if (activation, variant) == ("relu", "bias alone"):
                claim = f"{where}: the accuracy is the same within {COST:g} points"
                yield decide(claim, cost, at_least=-COST, at_most=COST, unit="points")
            else:
                claim = f"{where}: costs at least {COST:g} points"
                yield decide(claim, cost, at_least=COST, unit="points")


def figure(records: Records) -> Figure:
    """The test error at the end of each variant, a panel for each activation."""
    best = records.tuned("activation", "variant")
    picture, panels = draw.panels(best, "activation", width=4)
    for axes, activation, here in panels:
        draw.columns(axes, {v: 100 - here.accuracy(variant=v) for v in VARIANTS})
        axes.set(ylabel="test error (%)", title=activation)
    return picture
