"""Does batch norm reduce internal covariate shift, as the change of each layer's gradient?

Claim: Measured by how the gradient G of a layer changes to G′ when the layers before it take their
step, internal covariate shift with batch norm is no smaller than without: ‖G − G′‖ is no smaller,
and the cosine of G and G′ no larger.

Source: Santurkar et al. 2018, section 2.2, definition 2.1 and figure 3,
https://arxiv.org/abs/1805.11604, of which we know summaries and the abstract. They show curves of a
VGG on CIFAR-10 and of a linear net of 25 layers, and no number. That this is what covariate shift
should mean is theirs: Ioffe & Szegedy 2015, section 2, https://arxiv.org/abs/1502.03167, mean the
distribution of a layer's inputs. What is said of the first step, and of ‖G − G′‖ / ‖G‖, is ours,
after a pilot of seeds 0 and 1: batch norm changes the length of the gradients, and ‖G − G′‖ with
it.

Protocol: Six layers of 100 ReLUs on MNIST, plain SGD at rate 0.1, batches of 60, 500 steps, with
batch norm and without, from the same kernels. On 256 training images: the length of G − G′ of each
layer, where G′ is its gradient after the layers before it took a step on these images, that of G,
and the cosine of G and G′. The first step is judged apart from all that follow, of which the mean
over layers and evaluations counts (of lengths the geometric one).

Command: normlab run covariate_shift
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..engine import Condition, Config, Net, Record, Records, Source, Verdict, decide, draw, learn

FIRST = 10.0
"""How many times as long G − G′ is with batch norm at the first step: after a run of three seeds,
in which it was 14 to 28 times as long."""

SOURCE = Source("santurkar2018", "section 2.2, figure 3", read="second-hand")


@dataclasses.dataclass(frozen=True)
class CovariateShift(Config):
    """The config.

    Attributes:
      norms: The nets.
      widths: The units of the hidden layers.
    """

    norms: tuple[str, ...] = ("none", "batch")
    widths: tuple[int, ...] = (100,) * 6
    steps: int = 500


QUICK = CovariateShift()
SECONDS = 60
FULL = CovariateShift(dataset="cifar10", model="vgg", batch_size=128, steps=10_000, evaluations=50)


def run(config: CovariateShift) -> Iterator[Condition]:
    """Each norm."""
    options: dict[str, Any] = {"activation": jax.nn.relu}
    if config.model == "mlp":
        options["widths"] = config.widths
    for name in config.norms:
        yield Condition({"norm": name}, learn(config, nl.get(name), instrument=shift, **options))


def shift(net: Net) -> dict[str, Array]:
    """‖G − G′‖, the cosine of G and G′, and ‖G‖, of each layer but the first."""
    grads = jax.grad(net.loss)(net.params)
    after = jax.tree.map(lambda w, g: w - net.lr * g, net.params, grads)
    layers: Any = net.model
    found = instruments.covariate_shift(
        net.loss, net.params, after, layers=[*layers.layers, "Dense_0"]
    )
    return {"distance": found.distance[1:], "cosine": found.cosine[1:], "length": found.norm[1:]}


def distance(record: Record) -> float:
    """The geometric mean of ‖G − G′‖ over the layers; NaN where one is not finite."""
    return float(np.exp(np.log(np.array(record["distance"], float)).mean()))


def relative(record: Record) -> float:
    """The same of ‖G − G′‖ / ‖G‖."""
    return distance(record) / float(np.exp(np.log(np.array(record["length"], float)).mean()))


def alike(record: Record) -> float:
    """The mean of the cosines of G and G′ over the layers."""
    return float(np.array(record["cosine"], float).mean())


def verdict(records: Records) -> Iterator[Verdict]:
    """The change of the gradients with batch norm beside that without, then and at first."""

    def each(of: Callable[[Record], float], here: Records) -> list[np.ndarray]:
        return [
            here.where(norm=norm).each_seed(lambda mine: np.mean([of(r) for r in mine]))
            for norm in ("none", "batch")
        ]

    def factor(of: Callable[[Record], float], here: Records) -> np.ndarray:
        none, batch = each(lambda r: np.log(of(r)), here)
        return np.exp(batch - none)

    at = functools.partial(decide, untuned=True)
    first, later = records.where(step=0), records.trained()
    claim = "first step: ‖G − G′‖ is larger with batch norm (factor)"
    effect = factor(distance, first)
    yield at("first.distance", claim, effect, at_least=1, size=FIRST, geometric=True)
    claim = "later steps: ‖G − G′‖ is no smaller with batch norm (factor)"
    effect = factor(distance, later)
    yield at("later.distance", claim, effect, at_least=1, geometric=True, source=SOURCE)
    claim = "later steps: the cosine of G and G′ is no larger with batch norm (difference)"
    none, batch = each(alike, later)
    yield at("later.cosine", claim, batch - none, at_most=0, source=SOURCE)
    claim = "later steps: ‖G − G′‖ / ‖G‖ is smaller with batch norm (factor)"
    yield at("later.relative", claim, factor(relative, later), at_most=1, geometric=True)


def figure(records: Records) -> Figure:
    """The test error, and ‖G − G′‖ and the cosine, over the steps."""
    picture, (left, middle, right) = draw.canvas(3, width=4)
    draw.over_steps(left, records.trained(), draw.test_error)
    left.set_title("learning")
    draw.over_steps(middle, records, distance)
    middle.set(ylabel="‖G − G′‖, mean over layers", yscale="log", title="covariate shift")
    draw.over_steps(right, records, alike)
    right.set(ylabel="cosine of G and G′, mean over layers", title="1: no shift")
    return draw.finish(picture)
