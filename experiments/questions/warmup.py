"""Does a post-norm transformer need a warm-up, and does a pre-norm one do without?

Claim: With Adam and no warm-up a post-norm transformer ends worse, at a rate at which it learns
well with one. A pre-norm transformer ends where it would with a warm-up.

Source: Xiong et al. 2020, sections 3.2 and 4.2, figures 2 and 4, https://arxiv.org/abs/2002.04745:
IWSLT14 German to English, post-norm with Adam 8.45 BLEU without warm-up against about 34 with;
pre-norm about 34 without. What counts as the same is ours.

Protocol: A language model of 6 blocks of width 32 with layer norm, on bytes of 18 books, windows of
32, batches of 8, 300 steps of Adam at one rate, which falls as a cosine, with no warm-up or with
one over a quarter of the steps before it. The rate was chosen in a pilot of seeds 0 and 1, as one
at which post-norm learns with a warm-up, as the claim says. Bits per byte of 256 windows of the
test set at the end.

Command: normlab run warmup
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Language, Records, Source, Verdict, decide, draw, learn

WORSE = 0.1
"""Bits per byte by which post-norm is worse without a warm-up. Ours, before any run."""

SAME = 0.05
"""Bits per byte within which pre-norm is the same. Ours, before any run."""


@dataclasses.dataclass(frozen=True)
class Warmup(Language):
    """The config.

    Attributes:
      schemes: Where the norms stand.
      norm: Which norm.
      share: The steps of the warm-up, as a share of all.
    """

    INSTEAD: ClassVar = {"warmup": "--share"}

    schemes: tuple[str, ...] = ("post", "pre")
    norm: str = "layer"
    share: float = 0.25
    optimizer: str = "adam"
    warmup: int = 0
    depth: int = 6
    lr: float = 1e-2
    evaluations: int = 6


QUICK = Warmup()
SECONDS = 170
FULL = Warmup(steps=20_000, width=256, depth=12, heads=8, context=128, batch_size=64, lr=1e-3)


def run(config: Warmup) -> Iterator[Condition]:
    """Each scheme without and with a warm-up."""
    for scheme in config.schemes:
        for share in (0.0, config.share):
            options = {"scheme": scheme, "scan": True, "prepare": config.prepare, **config.sizes}
            warmed = dataclasses.replace(config, warmup=round(share * config.steps))
            labels = {"scheme": scheme, "warmup": "with" if share else "without"}
            yield Condition(labels, learn(warmed, nl.get(config.norm), **options))


def verdict(records: Records) -> Iterator[Verdict]:
    """What a warm-up is worth in each scheme."""

    def without(scheme: str):
        bits = [records.bits_per_byte(scheme=scheme, warmup=w) for w in ("without", "with")]
        return bits[0] - bits[1]

    source = Source("xiong2020", "section 3.2, figure 2", "8.45 against about 34 BLEU")
    claim = "post-norm ends worse without a warm-up (bits per byte)"
    limits = {"at_least": 0, "size": WORSE, "unit": "bits per byte"}
    yield decide("post", claim, without("post"), **limits, untuned=True, source=source)
    source = Source("xiong2020", "section 4.2, figure 4", "about 34 BLEU in both")
    claim = "pre-norm ends where it does with a warm-up (bits per byte)"
    limits = {"at_least": -SAME, "at_most": SAME, "unit": "bits per byte"}
    yield decide("pre", claim, without("pre"), **limits, untuned=True, source=source)


def figure(records: Records) -> Figure:
    """Bits per byte on the way, by scheme."""
    picture, panels = draw.panels(records.where(kind="evaluation"), "scheme")
    for axes, scheme, here in panels:
        draw.over_steps(axes, here.trained(), "bits_per_byte", by="warmup", marker=True)
        draw.frame(axes, title=f"{scheme}-norm", ylabel="test bits per byte")
    return draw.finish(picture, "a warm-up or none")
