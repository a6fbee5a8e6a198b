"""Does batch norm reduce internal covariate shift?

Claim: Measured by what it should be about, how the gradient of a layer changes when the layers
before it take their step, internal covariate shift with batch norm is no smaller than without.

Source: Santurkar et al. 2018, section 2.2 and figure 2, https://arxiv.org/abs/1805.11604. They show
a VGG on CIFAR-10 and a deep linear net; the factor 0.8 is ours.

Protocol: Six layers of 100 ReLUs on MNIST, plain SGD at rate 0.1, batches of 60, 1,000 steps, with
batch norm and without, from the same kernels. On 256 training images: the length of G − G′ of each
layer, where G′ is its gradient after the layers before it took a step on these images, and the
cosine of the two. The verdict is of the geometric mean over layers and evaluations.

Command: python -m experiments run covariate_shift
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..engine import Condition, Config, Net, Record, Records, Verdict, decide, draw, learn

NO_SMALLER = 0.8
"""Covariate shift with batch norm over that without, at least."""


@dataclasses.dataclass(frozen=True)
class CovariateShift(Config):
    """The config.

    Attributes:
      norms: The nets.
      widths: The units of the hidden layers.
    """

    norms: tuple[str, ...] = ("none", "batch")
    widths: tuple[int, ...] = (100,) * 6


QUICK = CovariateShift()
SECONDS = 25
FULL = CovariateShift(
    dataset="cifar10", model="vgg", batch_size=128, steps=10_000, evaluations=50, seeds=10
)


def run(config: CovariateShift) -> Iterator[Condition]:
    """Each norm."""
    options: dict[str, Any] = {"activation": jax.nn.relu}
    if config.model == "mlp":
        options["widths"] = config.widths
    for name in config.norms:
        yield Condition({"norm": name}, learn(config, nl.get(name), instrument=shift, **options))


def shift(net: Net) -> dict[str, Array]:
    """‖G − G′‖ and the cosine of G and G′, of each layer but the first."""
    grads = jax.grad(net.loss)(net.params)
    after = jax.tree.map(lambda w, g: w - net.lr * g, net.params, grads)
    layers: Any = net.model
    found = instruments.covariate_shift(
        net.loss, net.params, after, layers=[*layers.layers, "Dense_0"]
    )
    return {"distance": found.distance[1:], "cosine": found.cosine[1:]}


def mean(record: Record) -> float:
    """The geometric mean of ‖G − G′‖ over the layers; NaN where one is not finite."""
    return float(np.exp(np.log(np.array(record["distance"], float)).mean()))


def verdict(records: Records) -> Iterator[Verdict]:
    """Covariate shift with batch norm over that without."""

    def log(mine: Records) -> float:
        return np.log([mean(r) for r in mine]).mean()

    none, batch = (records.trained().where(norm=n).each_seed(log) for n in ("none", "batch"))
    claim = "internal covariate shift with batch norm over that without (‖G − G′‖)"
    yield decide(claim, np.exp(batch - none), at_least=NO_SMALLER, geometric=True)


def figure(records: Records) -> Figure:
    """The test error, and ‖G − G′‖ and the cosine, over the steps."""
    picture, (left, middle, right) = draw.canvas(3, width=4)
    draw.over_steps(left, records.trained(), draw.test_error)
    left.set_title("learning")
    draw.over_steps(middle, records, mean)
    middle.set(ylabel="‖G − G′‖, mean over layers", yscale="log", title="covariate shift")
    draw.over_steps(right, records, lambda r: float(np.mean(np.array(r["cosine"], float))))
    right.set(ylabel="cosine of G and G′, mean over layers", title="1: no shift")
    return draw.finish(picture)
