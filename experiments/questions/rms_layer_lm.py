"""Is RMS norm as good as layer norm in a language model?

Claim: A transformer with RMS norm ends with the bits per byte of one with layer norm: subtracting
the mean buys nothing.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467, abstract: RMS norm is comparable to
layer norm in several tasks, translation among them. What counts as comparable is ours.

Protocol: A pre-norm language model of 2 blocks of width 32 on bytes of 18 books, windows of 32,
batches of 8, 400 steps of AdamW with a warm-up and a cosine. Each norm has the best of four or more
rates, chosen with other seeds on the validation set. Bits per byte of 256 windows of the test set.

Command: normlab run rms_layer_lm
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Language, Records, Source, Verdict, decide, draw, tuned

SAME = 0.02
"""Bits per byte within which two nets are as good. Ours, before any run."""


@dataclasses.dataclass(frozen=True)
class RmsLayerLm(Language):
    """The config.

    Attributes:
      norms: Which norms.
      rates: Learning rates to choose from.
    """

    norms: tuple[str, ...] = ("layer", "rms")
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    steps: int = 400


QUICK = RmsLayerLm()
SECONDS = 60
FULL = RmsLayerLm(steps=20_000, width=256, depth=8, heads=8, context=128, batch_size=64)


def run(config: RmsLayerLm) -> Iterator[Condition]:
    """Each norm."""
    for norm in config.norms:
        options = {"scheme": "pre", "prepare": config.prepare, **config.sizes}
        yield Condition({"norm": norm}, tuned(config, nl.get(norm), config.rates, **options))


def verdict(records: Records) -> Iterator[Verdict]:
    """RMS norm against layer norm."""
    bits = {norm: records.bits_per_byte(norm=norm) for norm in ("layer", "rms")}
    source = Source("zhang2019", "abstract", "comparable", read="abstract")
    claim = "RMS norm is as good as layer norm (bits per byte, difference)"
    limits = {"at_least": -SAME, "at_most": SAME, "unit": "bits per byte"}
    yield decide("same", claim, bits["rms"] - bits["layer"], **limits, source=source)


def figure(records: Records) -> Figure:
    """Bits per byte of each seed at the chosen rate, and what was screened."""
    picture, (left, right) = draw.canvas(2)
    norms = records.values("norm")
    draw.columns(left, {norm: records.bits_per_byte(norm=norm) for norm in norms})
    left.set_ylabel("test bits per byte at the chosen rate")
    draw.against(right, records.where(kind="screening"), "lr", "bits_per_byte")
    draw.frame(right, xscale="log", xlabel="learning rate", title="screening, other seeds")
    right.set_ylabel("test bits per byte")
    return draw.finish(picture, key=right)
