"""Does switchable norm count on the batch less if the batch is small?

Claim: Switchable norm learns by how much each of instance, layer and batch norm counts; over few
images batch norm counts for less than over many, and the net is more accurate than with batch norm
alone.

Source: Luo et al. 2019, https://arxiv.org/abs/1806.10779 (a ResNet-50, 8 devices with 32, 4 and 2
images each: batch norm 76.4, 72.7 and 65.3%, switchable norm 76.9, 75.9 and 75.6%; that batch
norm's weights fall is in its analysis). That they fall in order, and by how much, is ours.

Protocol: Fashion-MNIST, averaged to 14×14 pixels; two 3×3 convolutions of stride 2 with ReLUs,
300 steps with 64 images each, of which 64, 8 or 2 are normalized together: the statistics differ,
and the gradients are of as many images. SGD with momentum 0.9, a rate that falls from 0.1 to zero
as a cosine. The weights are the softmax of logits that are learned at the same rate; shown is their
mean over the layers, those of the means and of the variances apart. Inference uses running
statistics of all 64. Tested on 5,000 images.

Command: normlab run switchable
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl
from normlab.family.mixtures import Logits

from ..engine import Condition, Config, Net, Records, Schedule, Source, Verdict, decide, draw, learn
from .standardized_weights import halved

FALL = 0.1
"""By which batch norm's weight falls from the largest to the smallest batch; chosen before any
run."""

SAVED = 3.0
"""Points by which switchable norm is better than batch norm at the smallest batch: the source has
10.3."""

LUO = Source("luo2018", "analysis of the learned weights", "", "second-hand")
LUO_ACCURACY = Source("luo2018", "table of ResNet-50", "8 × 2 images: 65.3 → 75.6%")

OF = ("instance", "layer", "batch")


@dataclasses.dataclass(frozen=True)
class Switchable(Config):
    """The config.

    Attributes:
      together: How many images of a batch are normalized together, below all of them.
      widths: The channels of the model's convolutions.
    """

    together: tuple[int, ...] = (8, 2)
    widths: tuple[int, ...] = (8, 16)
    dataset: str = "fashion_mnist"
    model: str = "conv"
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 300
    evaluations: int = 1
    optimizer: str = "momentum"


QUICK = Switchable()
SECONDS = 100
FULL = Switchable(together=(32, 16, 8, 4, 2), widths=(8, 16, 32), steps=20_000, evaluations=20)


def run(config: Switchable) -> Iterator[Condition]:
    """Switchable norm over each part of a batch, batch norm over the smallest."""
    whole = config.batch_size
    rows = [("switchable", n) for n in (whole, *config.together)]
    rows += [("batch", min(config.together))]
    for name, together in rows:
        norm = nl.get(name, axis_name=nl.Sync(virtual_batch=together))
        look = weights if name == "switchable" else None
        measure = learn(config, norm, prepare=halved, instrument=look, widths=config.widths)
        yield Condition({"norm": name, "together": together}, measure)


def weights(net: Net) -> dict[str, Array]:
    """How much each norm counts in the means and in the variances, the mean over the layers."""
    is_one = lambda leaf: isinstance(leaf, Logits)  # noqa: E731
    found = [v for v in jax.tree.leaves(net.params, is_leaf=is_one) if is_one(v)]
    means = {
        key: jnp.stack([jax.nn.softmax(getattr(v, key)) for v in found]).mean(0)
        for key in ("shift", "scale")
    }
    return {f"{key}_{name}": v[i] for key, v in means.items() for i, name in enumerate(OF)}


def verdict(records: Records) -> Iterator[Verdict]:
    """How the weight of batch norm goes with the batch, and what that saves."""
    sizes = sorted(records.where(norm="switchable").values("together"))
    few, whole = sizes[0], sizes[-1]
    for key, word in (("shift", "means"), ("scale", "variances")):
        ends = records.where(kind="evaluation", norm="switchable")
        each = [ends.by_seed(f"{key}_batch", together=n) for n in sizes]
        claim = f"batch norm counts for less in the {word} over {few} images than over {whole}"
        yield decide(f"{key}.falls", claim, each[-1] - each[0], at_least=0, size=FALL, source=LUO)
        claim = f"batch norm's weight in the {word} falls at every step from {whole} to {few}"
        yield decide(f"{key}.in-order", claim, np.diff(each, axis=0).min(0), at_least=0)
    claim = f"over {few} images switchable norm is more accurate than batch norm"
    saved = records.accuracy(norm="switchable", together=few)
    saved = saved - records.accuracy(norm="batch", together=few)
    how = {"at_least": 0, "size": SAVED, "unit": "points", "untuned": True}
    yield decide("few", claim, saved, source=LUO_ACCURACY, **how)


def figure(records: Records) -> Figure:
    """How much batch norm counts against steps and at the end, and the test error."""
    picture, (left, middle, right) = draw.canvas(3, width=3.7)
    ends = records.last()
    mine = ends.where(norm="switchable")
    sizes = sorted(mine.values("together"))
    for axes, key in ((left, "shift"), (middle, "scale")):
        rows = [{**r, "of": name, "weight": r[f"{key}_{name}"]} for r in mine for name in OF]
        draw.against(axes, rows, "together", "weight", by="of")
        title = {"shift": "in the means", "scale": "in the variances"}[key]
        draw.frame(axes, xlabel="images together", ylabel="weight", doubling=True, ticks=sizes)
        draw.frame(axes, threshold=1 / len(OF), title=title, legend=True)
    draw.against(right, ends, "together", draw.test_error)
    draw.frame(right, xlabel="images together", doubling=True, ticks=sizes, legend=True)
    picture.suptitle("How much each norm counts in switchable norm; mean and 95% interval")
    return picture
