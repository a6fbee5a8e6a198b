"""Is batch norm better than layer norm and RMS norm in a conv net?

Claim: In a conv net layer norm, which takes all units of a layer alike, is less accurate than batch
norm, and RMS norm is so too.

Source: Ba, Kiros & Hinton 2016, the last experiment, https://arxiv.org/abs/1607.06450 (batch norm
does better in conv nets, where units at the border are seldom active); Zhang & Sennrich 2019,
https://arxiv.org/abs/1910.07467 (test error of a conv net on CIFAR-10: none 8.96%, batch 8.25%,
layer 10.49%, RMS 8.83%). Over which axes the second source takes its statistics was not seen.

Protocol: Fashion-MNIST, averaged to 14×14 pixels; three 3×3 convolutions of stride 2 with ReLUs, 64
images in each of 300 steps of SGD with momentum 0.9, whose rate falls to zero as a cosine from the
best of a grid, chosen for each norm on held-out images. Layer and RMS norm are over the channels
and positions of an image (in the full profile also over the channels of each position). Tested on
5,000 images.

Command: normlab run layer_conv
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Records, Schedule, Source, Verdict, decide, draw, tuned
from .standardized_weights import halved

BA = Source("ba2016", "the last experiment", "batch norm better, no number", "second-hand")
ZHANG = {
    "rms": Source("zhang2019", "CIFAR-10", "error BN 8.25%, RMS 8.83%", "second-hand"),
    "between": Source("zhang2019", "CIFAR-10", "error RMS 8.83%, LN 10.49%", "second-hand"),
    "none": Source("zhang2019", "CIFAR-10", "error none 8.96%, LN 10.49%", "second-hand"),
}


@dataclasses.dataclass(frozen=True)
class LayerConv(Config):
    """The config.

    Attributes:
      rates: The grid of first learning rates.
      samples: Of what layer and RMS norm measure: the channels and positions of an image ("all"),
        or the channels of each position ("channels").
    """

    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    samples: tuple[str, ...] = ("all",)
    dataset: str = "fashion_mnist"
    model: str = "conv"
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 300
    evaluations: int = 1
    optimizer: str = "momentum"


QUICK = LayerConv()
SECONDS = 80
FULL = LayerConv(model="vgg", samples=("all", "channels"), steps=20_000)

NORMS = {
    ("none", ""): nl.get("none"),
    ("batch", ""): nl.get("batch"),
    ("layer", "all"): nl.get("layer", axes="all"),
    ("rms", "all"): nl.get("rms", axes="all"),
    ("layer", "channels"): nl.get("layer"),
    ("rms", "channels"): nl.get("rms"),
}
"""By name, and by what of an image is one sample."""


def run(config: LayerConv) -> Iterator[Condition]:
    """Each norm at its best rate."""
    for (name, over), norm in NORMS.items():
        if over not in ("", *config.samples):
            continue
        measure = tuned(config, norm, config.rates, prepare=halved)
        yield Condition({"norm": name, "over": over}, measure)


def verdict(records: Records) -> Iterator[Verdict]:
    """How far each norm is behind batch norm, and layer norm behind RMS norm and none."""

    def points(id: str, claim: str, better: tuple, worse: tuple, source: Source) -> Verdict:
        of = [records.accuracy(norm=name, over=over) for name, over in (better, worse)]
        return decide(id, claim, of[0] - of[1], at_least=0, unit="points", source=source)

    batch = ("batch", "")
    words = {"all": "over an image", "channels": "over the channels of a position"}
    for over in records.where(norm="layer").values("over"):
        said = words[over]
        for name, word, source in (("layer", "layer", BA), ("rms", "RMS", ZHANG["rms"])):
            claim = f"{word} norm {said} is less accurate than batch norm"
            yield points(f"{name}-{over}.batch", claim, batch, (name, over), source)
        layer, rms = (("layer", over), ("rms", over))
        claim = f"layer norm {said} is less accurate than RMS norm"
        yield points(f"layer-{over}.rms", claim, rms, layer, ZHANG["between"])
        claim = f"layer norm {said} is less accurate than no norm"
        yield points(f"layer-{over}.none", claim, ("none", ""), layer, ZHANG["none"])


def figure(records: Records) -> Figure:
    """The test accuracy with each norm at its best rate, a point for each seed."""
    picture, (axes,) = draw.canvas(width=6)
    groups = {}
    for name, over in records.values("norm", "over"):
        where = {"norm": name, "over": over}
        said = f"{name}{over and f' ({over})'}, rate {records.best_rate(**where):g}"
        groups[said] = records.accuracy(**where)
    draw.columns(axes, groups)
    axes.set(ylabel="test accuracy (%)", title="at the best rate; a point is a seed")
    return picture
