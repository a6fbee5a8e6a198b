"""Is a net with weight normalization as good as a plain one, and with mean-only batch norm better?

Claim: On CIFAR-10 weight normalization ends where the plain parametrization does, batch norm ends
better, and weight normalization with mean-only batch norm, whose μ is the batch's mean and whose σ
is ‖w‖, ends best.

Source: Salimans & Kingma 2016, section 5.1 and figure 1, https://arxiv.org/abs/1602.07868

Protocol: CIFAR-10 without augmentation, a small ReLU conv net (8, 16, 32 channels), batches of 60,
600 steps of Adam, no weight decay. Each norm is trained at several rates and counts at its best.
Weight normalization starts from the statistics of a batch, as in the paper. The paper's net has
nine convolutions with hundreds of channels, dropout and 200 epochs: here the verdict is about a
small net early in its training.

Command: python -m experiments run weight_norm_accuracy
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import normlab as nl
from normlab.site import Params, State

from ..engine import Condition, Config, Records, Verdict, decide, draw, lanes, learn

EQUAL = 0.5
"""Points of test accuracy that weight norm may be off the plain net, either way."""

BETTER = 0.3
"""Points that batch norm must be better than the plain net, and mean-only batch norm with weight
norm than batch norm. In the paper they are 0.38 and 0.74."""


@dataclasses.dataclass(frozen=True)
class WeightNormAccuracy(Config):
    """The config.

    Attributes:
      rates: Learning rates, of which each norm has its best.
    """

    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    dataset: str = "cifar10"
    model: str = "conv"
    optimizer: str = "adam"
    steps: int = 600
    evaluations: int = 1
    seeds: int = 4


QUICK = WeightNormAccuracy()
SECONDS = 350
FULL = WeightNormAccuracy(
    rates=(0.0003, 0.001, 0.003), model="vgg", steps=50_000, evaluations=50, seeds=10
)


def run(config: WeightNormAccuracy) -> Iterator[Condition]:
    """Each norm, with all rates and seeds side by side."""
    norms = {
        "none": nl.get("none"),
        "weight": nl.get("weight", data_init=True),
        "batch": nl.get("batch"),
        "mean-only batch": mean_only(),
    }
    for name, norm in norms.items():
        measure = learn(config, norm, side_by_side=lanes(config, lr=config.rates))
        yield Condition({"norm": name}, measure)


def mean_only() -> nl.Norm:
    """Weight norm with mean-only batch norm: μ of the batch, σ = ‖w‖."""
    batch, weight = nl.get("batch"), nl.get("weight", data_init=True)

    def init(site: nl.Site) -> tuple[Params, State]:
        params = weight.init(site)[0]
        params = params._replace(b=jnp.zeros_like(params.b))  # the batch's mean is taken off
        return params, batch.parts(params, batch.init(site)[1], site, train=True)[1]

    def parts(
        params: Params, state: State, site: nl.Site, *, train: bool
    ) -> tuple[nl.Parts, State]:
        measured, state = batch.parts(params, state, site, train=train)
        own, _ = weight.parts(params, (), site, train=train)
        return own._replace(mu=measured.mu), state

    return nl.Norm(init, parts)


def best(records: Records, norm: str) -> np.ndarray:
    """The accuracy of each seed at the norm's best rate."""
    return records.where(norm=norm).tuned().accuracy()


def verdict(records: Records) -> Iterator[Verdict]:
    """The paper's order."""
    norms = ("none", "weight", "batch", "mean-only batch")
    none, weight, batch, both = (best(records, norm) for norm in norms)
    claim = "weight norm ends as accurate as no norm"
    yield decide(claim, weight - none, at_least=-EQUAL, at_most=EQUAL, unit="points")
    claim = "batch norm ends more accurate than no norm"
    yield decide(claim, batch - none, at_least=BETTER, unit="points")
    claim = "weight norm with mean-only batch norm ends more accurate than batch norm"
    yield decide(claim, both - batch, at_least=BETTER, unit="points")


def figure(records: Records) -> Figure:
    """The error at the end: at each norm's best rate, and against the rate."""
    picture, (left, right) = draw.canvas(2)
    draw.columns(left, {norm: 100 - best(records, norm) for norm in records.values("norm")})
    left.set(ylabel="test error (%)", title="at the best rate: seeds, mean, 95% interval")
    draw.against(right, records.last(), "lr", draw.test_error)
    draw.frame(right, xscale="log", xlabel="learning rate", ticks=records.values("lr"))
    right.set_title("by rate")
    return draw.finish(picture, key=right)
