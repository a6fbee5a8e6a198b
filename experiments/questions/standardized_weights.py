"""Do standardized weights make group norm as good as batch norm of large batches?

Claim: Group norm, which looks at each image alone, gets better if the weights of the convolution
before it are standardized, and then is as good as batch norm of a large batch, and better than
batch norm over two images.

Source: Qiao et al. 2019, https://arxiv.org/abs/1903.10520 (a ResNet-50 on ImageNet with one image
for each device: with standardized weights group norm is as good as batch norm of large batches, or
better). "As good", within half a point, is ours.

Protocol: Fashion-MNIST, averaged to 14×14 pixels; three 3×3 convolutions of stride 2 with ReLUs, 64
images in each of 300 steps of SGD with momentum 0.9, whose rate falls to zero as a cosine from the
best of three or more, chosen for each norm on held-out images. Of the 64 images, batch norm takes
all or two together; the others look at one, so a batch is no part of them. Tested on 5,000 images.

Command: normlab run standardized_weights
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import Condition, Config, Records, Schedule, Source, Verdict, decide, draw, tuned

AS_GOOD = 0.5
"""Points by which it may be worse than batch norm of all images; chosen before any run."""

QIAO = Source("qiao2019", "the authors' repository, results", "as good as large-batch BN or better")


@dataclasses.dataclass(frozen=True)
class StandardizedWeights(Config):
    """The config.

    Attributes:
      rates: The grid of first learning rates.
      groups: Of group norm.
      together: Images that batch norm takes together, below all.
    """

    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    groups: int = 4
    together: int = 2
    dataset: str = "fashion_mnist"
    model: str = "conv"
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 300
    evaluations: int = 1
    optimizer: str = "momentum"


QUICK = StandardizedWeights()
SECONDS = 100
FULL = StandardizedWeights(model="vgg", groups=32, steps=20_000)


def run(config: StandardizedWeights) -> Iterator[Condition]:
    """Each norm at its best rate."""
    group = nl.get("group", groups=config.groups)
    norms = {
        "batch": nl.get("batch"),
        f"batch over {config.together}": nl.get(
            "batch", axis_name=nl.Sync(virtual_batch=config.together)
        ),
        "group": group,
        "group, standardized weights": nl.combine.chain(
            [nl.get("weight_standardization", use_gain=False, use_bias=False), group]
        ),
    }
    for name, norm in norms.items():
        measure = tuned(config, norm, config.rates, prepare=halved)
        yield Condition({"norm": name}, measure)


def halved(data: Dataset, tests: int = 5000) -> Dataset:
    """Images of half the height and width, each pixel the mean of four, and the first tests."""
    train, test = (
        (
            v.reshape(len(v), v.shape[1] // 2, 2, v.shape[2] // 2, 2, -1).mean((2, 4)) / 127.5 - 1
        ).astype(np.float32)
        for v in (data.train_inputs, data.test_inputs[:tests])
    )
    return data._replace(train_inputs=train, test_inputs=test, test_labels=data.test_labels[:tests])


def verdict(records: Records) -> Iterator[Verdict]:
    """What standardized weights win, and how they stand beside batch norm."""
    all_images, few, group, both = (records.accuracy(norm=n) for n in records.values("norm"))
    claim = "group norm is more accurate with standardized weights"
    yield decide("gain", claim, both - group, at_least=0, unit="points", source=QIAO)
    claim = "group norm with standardized weights is as good as batch norm of all images"
    effect = both - all_images
    yield decide("as-good", claim, effect, at_least=-AS_GOOD, unit="points", source=QIAO)
    claim = "group norm with standardized weights is more accurate than batch norm over few images"
    yield decide("few", claim, both - few, at_least=0, unit="points")


def figure(records: Records) -> Figure:
    """The test accuracy with each norm at its best rate, a point for each seed."""
    picture, (axes,) = draw.canvas(width=5)
    names = records.values("norm")
    rates = {name: f"{name}, rate {records.best_rate(norm=name):g}" for name in names}
    draw.columns(axes, {said: records.accuracy(norm=name) for name, said in rates.items()})
    axes.set(ylabel="test accuracy (%)", title="at the best rate; a point is a seed")
    return picture
