"""Is a net with weight normalization as good as a plain one, and with mean-only batch norm better?

Claim: On CIFAR-10 weight normalization ends where the plain parametrization does, batch norm ends
better, and weight normalization with mean-only batch norm, whose μ is the batch's mean and whose σ
is ‖w‖, ends best.

Source: Salimans & Kingma 2016, section 5.1, https://arxiv.org/abs/1602.07868: errors of 8.43% for
the plain net, 8.46% with weight normalization, 8.05% with batch norm, 7.31% with both.

Protocol: CIFAR-10 without augmentation, averaged to 16×16 pixels, a small ReLU conv net (8, 16, 32
channels), batches of 60, 600 steps of Adam, no weight decay, each norm at the best of four or more
rates. Weight normalization starts from the statistics of a batch, as in the paper. The paper's net
has nine convolutions with hundreds of channels, dropout and 200 epochs: here the verdict is about a
small net early in its training.

Command: normlab run weight_norm_accuracy
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import normlab as nl
from normlab.site import Params, State

from ..data import Dataset
from ..engine import Condition, Config, Records, Source, Verdict, decide, draw, tuned

EQUAL = 0.5
"""Points of test accuracy that weight norm may be off the plain net, either way."""

PAPER = {"batch": 0.38, "both": 0.74}
"""Points that batch norm is better than the plain net in the paper, and mean-only batch norm with
weight norm than batch norm."""

WHERE = ("salimans2016", "section 5.1")

READ = "second-hand"


@dataclasses.dataclass(frozen=True)
class WeightNormAccuracy(Config):
    """The config.

    Attributes:
      rates: Learning rates, of which each norm has its best.
      pooled: Whether images are averaged to half their height and width.
    """

    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    dataset: str = "cifar10"
    model: str = "conv"
    optimizer: str = "adam"
    steps: int = 600
    evaluations: int = 1
    pooled: bool = True


QUICK = WeightNormAccuracy()
SECONDS = 150
FULL = WeightNormAccuracy(
    rates=(0.0003, 0.001, 0.003), model="vgg", steps=50_000, evaluations=50, pooled=False
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
        prepare = halved if config.pooled else lambda data: data
        yield Condition({"norm": name}, tuned(config, norm, config.rates, prepare=prepare))


def halved(data: Dataset) -> Dataset:
    """Images of half the height and width, each pixel the mean of four, as float32 from 0 to 1."""
    found = []
    for v in (data.train_inputs, data.test_inputs):
        n, height, width, channels = v.shape
        cut = v.reshape(n, height // 2, 2, width // 2, 2, channels)
        found.append(cut.mean((2, 4), dtype=np.float32) / np.float32(255))
    train, test = (v - found[0].mean() for v in found)
    return data._replace(train_inputs=train, test_inputs=test)


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


def verdict(records: Records) -> Iterator[Verdict]:
    """The paper's order."""
    norms = ("none", "weight", "batch", "mean-only batch")
    none, weight, batch, both = (records.accuracy(norm=norm) for norm in norms)
    points = functools.partial(decide, unit="points")
    claim = "weight norm ends as accurate as no norm"
    source = Source(*WHERE, "8.43 → 8.46% error", READ)
    yield points("weight", claim, weight - none, at_least=-EQUAL, at_most=EQUAL, source=source)
    claim = "batch norm ends more accurate than no norm"
    source = Source(*WHERE, "8.43 → 8.05% error", READ)
    yield points("batch", claim, batch - none, at_least=0, size=PAPER["batch"], source=source)
    claim = "weight norm with mean-only batch norm ends more accurate than batch norm"
    source = Source(*WHERE, "8.05 → 7.31% error", READ)
    yield points("both", claim, both - batch, at_least=0, size=PAPER["both"], source=source)


def figure(records: Records) -> Figure:
    """The error at the end at each norm's best rate, and on held-out images against the rate."""
    picture, (left, right) = draw.canvas(2)
    norms = records.values("norm")
    draw.columns(left, {norm: 100 - records.accuracy(norm=norm) for norm in norms})
    left.set(ylabel="test error (%)", title="at the best rate: seeds, mean, 95% interval")
    tried = records.where(kind="screening")
    draw.scatter(right, tried, "lr", lambda r: 100 * (1 - r["accuracy"]))
    draw.frame(right, xscale="log", xlabel="learning rate", ticks=tried.values("lr"))
    right.set(ylabel="error on held-out images (%)", title="the choice of the rate")
    return draw.finish(picture, key=right)
