"""Is RMS norm as good as layer norm in a language model?

Claim: A transformer with RMS norm ends with the bits per byte of one with layer norm: subtracting
the mean buys nothing. That a norm is there at all does.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467, abstract: RMS norm is comparable to
layer norm in several tasks, translation among them. What counts as comparable, and the comparison
with a net without norms, which shows that the test can tell nets apart, are ours.

Protocol: A pre-norm language model of 2 blocks of width 32 on bytes of 18 books, windows of 32,
batches of 8, 400 steps of AdamW with a warm-up and a cosine. Each norm has the best of four rates,
chosen with other seeds on the validation set. Bits per byte of 256 windows of the test set.

Command: python -m experiments run rms_layer_lm
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

    norms: tuple[str, ...] = ("none", "layer", "rms")
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    steps: int = 400


QUICK = RmsLayerLm()
SECONDS = 130
FULL = RmsLayerLm(steps=20_000, width=256, depth=8, heads=8, context=128, batch_size=64)


def run(config: RmsLayerLm) -> Iterator[Condition]:
    """Each norm."""
    for norm in config.norms:
        options = {"scheme": "pre", "prepare": config.prepare, **config.sizes}
        made = nl.get(norm, use_bias=False) if norm == "none" else nl.get(norm)
        yield Condition({"norm": norm}, tuned(config, made, config.rates, **options))


def verdict(records: Records) -> Iterator[Verdict]:
    """RMS norm against layer norm, and both against none."""
    bits = {norm: records.bits_per_byte(norm=norm) for norm in ("none", "layer", "rms")}
    source = Source("zhang2019", "abstract", "comparable", read="abstract")
    claim = "RMS norm is as good as layer norm (bits per byte, difference)"
    limits = {"at_least": -SAME, "at_most": SAME, "unit": "bits per byte"}
    yield decide("same", claim, bits["rms"] - bits["layer"], **limits, source=source)
    claim = "without a norm the model is worse than with RMS norm (bits per byte)"
    worse = bits["none"] - bits["rms"]
    yield decide("none", claim, worse, at_least=0, size=SAME, unit="bits per byte")


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
