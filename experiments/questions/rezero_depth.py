"""Do 32 blocks train with ReZero and without any norm or warm-up?

Claim: A transformer of 32 blocks whose branches begin at zero, x + αF(x) with α = 0, learns without
a norm and without a warm-up. A post-norm transformer does not, nor does one without norm and gate.

Source: Bachlechner et al. 2020, https://arxiv.org/abs/2003.04887, abstract: transformers of more
than 100 layers can be trained, and 12 layers reach 1.2 bits per byte of enwik8 56% faster. The net
without a gate is ours, and shows that the gate does it.

Protocol: A language model of 32 blocks of width 16 on bytes of 18 books, windows of 16, batches of
8, 200 steps of Adam at a rate of 0.003, which stays and is the same for all. A net learns if it
needs 0.3 bits per byte less than one that knows how frequent each byte is, on 256 windows of the
test set: so it uses what stands before.

Command: normlab run rezero_depth
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Language,
    Records,
    Source,
    Verdict,
    decide_share,
    draw,
    exact,
    learn,
)

LEARNED = 0.3
"""Bits per byte that a net that has learned needs less than one that knows the frequencies. Ours,
before any run."""

HALF = 0.5
"""The share of the seeds above or below which most learn or do not."""

SOURCE = Source("bachlechner2020", "abstract", "over 100 layers", read="abstract")


@dataclasses.dataclass(frozen=True)
class RezeroDepth(Language):
    """The config.

    Attributes:
      schemes: Where the norms stand; "plain" is x + F(x) without a norm.
      norm: Which norm.
    """

    schemes: tuple[str, ...] = ("rezero", "plain", "post")
    norm: str = "layer"
    optimizer: str = "adam"
    schedule: str = "constant"
    warmup: int = 0
    depth: int = 32
    width: int = 16
    context: int = 16
    steps: int = 200
    evaluations: int = 5


QUICK = RezeroDepth()
SECONDS = 100
FULL = RezeroDepth(
    steps=20_000,
    width=256,
    depth=64,
    heads=8,
    context=128,
    batch_size=32,
    lr=3e-4,
)


def run(config: RezeroDepth) -> Iterator[Condition]:
    """Each scheme."""
    for name in config.schemes:
        scheme = plain(config.depth) if name == "plain" else name
        options = {"scheme": scheme, "scan": True, "prepare": config.prepare, **config.sizes}
        yield Condition({"scheme": name}, learn(config, nl.get(config.norm), **options))
    says = {"kind": "frequencies", "seed": config.first_seed, "step": config.steps}
    yield Condition({"condition": "frequencies"}, exact(config.frequencies), [says])


def plain(depth: int) -> nl.placement.Scheme:
    """Branches without a norm: x + F(x)."""
    return nl.placement.Scheme("plain", depth, lambda block, branch: nl.placement.Placement())


def learned(records: Records, scheme: str) -> np.ndarray:
    """Of each seed, whether the net has learned."""
    bits = records.by_seed("bits_per_byte", kind="evaluation", scheme=scheme)
    return bits <= enough(records)  # NaN is not


def enough(records: Records) -> float:
    """Bits per byte of a net that has learned, at most."""
    [frequent] = records.where(kind="frequencies").values("bits_per_byte")
    return frequent - LEARNED


def verdict(records: Records) -> Iterator[Verdict]:
    """Who learns, and whether the gate is better than post-norm."""
    claim = "32 blocks learn with ReZero"
    rezero = learned(records, "rezero")
    yield decide_share("rezero", claim, rezero, at_least=HALF, untuned=True, source=SOURCE)
    claim = "32 blocks of post-norm do not learn without a warm-up"
    post = learned(records, "post")
    yield decide_share("post", claim, post, at_most=HALF, untuned=True, source=SOURCE)
    claim = "32 blocks without a norm and without a gate do not learn"
    yield decide_share("plain", claim, learned(records, "plain"), at_most=HALF, untuned=True)
    claim = "ReZero ends better than post-norm (share of the seeds)"
    bits = [
        records.by_seed("bits_per_byte", kind="evaluation", scheme=scheme)
        for scheme in ("post", "rezero")
    ]
    limits = {"at_least": HALF, "untuned": True, "source": SOURCE}
    yield decide_share("better", claim, bits[1] < bits[0], **limits)


def figure(records: Records) -> Figure:
    """Bits per byte on the way, by scheme."""
    picture, (axes,) = draw.canvas(width=5.4)
    here = records.where(kind="evaluation").trained()
    draw.over_steps(axes, here, "bits_per_byte", by="scheme", marker=True)
    most = 2 * enough(records)  # above it a net whose test loss exploded
    look = {"ylim": (0, most), "ylabel": "test bits per byte", "legend": True}
    draw.frame(axes, threshold=enough(records), **look)
    return picture
