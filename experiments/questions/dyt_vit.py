"""Can DyT or RMS norm take the place of layer norm in a vision transformer?

Claim: A vision transformer with DyT, γ⊙tanh(αx) + β, which measures nothing, ends as accurate as
one with layer norm; so does one with RMS norm.

Source: Zhu et al. 2025, https://arxiv.org/abs/2503.10622, abstract: DyT matches or exceeds the
normalized counterparts; authors' repository: ViT-B on ImageNet 82.3% with layer norm and 82.5% with
DyT. RMS norm: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467, of other nets. Half a point
is ours.

Protocol: Fashion-MNIST, patches of 7×7 pixels, 3 blocks of width 32, pre-norm, batches of 32, 500
steps of AdamW with a warm-up and a cosine. DyT starts at α = 0.5. Each norm has the best of four or
more rates, chosen with other seeds on held-out training images. 5,000 test images.

Found: The model reads out a class token that starts near zero, which layer norm makes large and DyT
does not; the authors average over the patches. How much of the difference that makes, and the few
steps, was not looked into.

Command: normlab run dyt_vit
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import Condition, Config, Records, Source, Verdict, decide, draw, tuned

SAME = 0.5
"""Points of accuracy within which two nets are as good. Ours, before any run."""

SOURCES = {
    "dyt": Source("zhu2025", "abstract", "82.3 → 82.5% (ViT-B)", read="abstract"),
    "rms": Source("zhang2019", "abstract", "comparable", read="abstract"),
}


@dataclasses.dataclass(frozen=True)
class DytVit(Config):
    """The config.

    Attributes:
      norms: Which norms.
      rates: Learning rates to choose from.
      tests: How many test images are read.
      patch: The side of a patch.
      width: The width of the stream.
      depth: Blocks.
      heads: Heads of each attention.
    """

    dataset: str = "fashion_mnist"
    model: str = "vit"
    optimizer: str = "adamw"
    schedule: str = "cosine"  # pyright: ignore
    norms: tuple[str, ...] = ("layer", "rms", "dyt")
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    batch_size: int = 32
    steps: int = 500
    warmup: int = 50
    evaluations: int = 1
    tests: int = 5000
    patch: int = 7
    width: int = 32
    depth: int = 3
    heads: int = 2


QUICK = DytVit()
SECONDS = 250
FULL = DytVit(
    dataset="cifar10",
    steps=40_000,
    warmup=2000,
    batch_size=128,
    tests=10_000,
    patch=4,
    width=192,
    depth=9,
    heads=6,
)


def run(config: DytVit) -> Iterator[Condition]:
    """Each norm at its best rate."""

    def fewer(data: Dataset) -> Dataset:
        images, labels = data.test_inputs[: config.tests], data.test_labels[: config.tests]
        return data._replace(test_inputs=images, test_labels=labels)

    sizes = {name: getattr(config, name) for name in ("patch", "width", "depth", "heads")}
    for norm in config.norms:
        made = tuned(config, nl.get(norm), config.rates, prepare=fewer, **sizes)
        yield Condition({"norm": norm}, made)


def verdict(records: Records) -> Iterator[Verdict]:
    """Each against layer norm."""
    reference = records.accuracy(norm="layer")
    for norm, source in SOURCES.items():
        claim = f"a vision transformer with {norm} is as accurate as with layer norm (points more)"
        more = records.accuracy(norm=norm) - reference
        limits = {"at_least": -SAME, "at_most": SAME, "unit": "points"}
        yield decide(norm, claim, more, **limits, source=source)


def figure(records: Records) -> Figure:
    """The error of each seed at the chosen rate, and what was screened."""
    picture, (left, right) = draw.canvas(2)
    ends = records.where(kind="evaluation")
    errors = {norm: 100 - records.accuracy(norm=norm) for norm in ends.values("norm")}
    draw.columns(left, errors)
    left.set_ylabel("test error at the chosen rate (%)")
    screened = records.where(kind="screening")
    draw.against(right, screened, "lr", lambda r: draw.test_error(r))
    draw.frame(right, xscale="log", log=True, xlabel="learning rate")
    right.set(ylabel="error on held-out images (%)", title="screening, other seeds")
    return draw.finish(picture, key=right)
