"""Does nGPT need fewer steps than a pre-norm transformer?

Claim: nGPT, whose streams and kernels lie on a sphere, is after a part of the steps where a
pre-norm transformer ends.

Source: Loshchilov et al. 2024, https://arxiv.org/abs/2410.01131, abstract: 4 to 20 times fewer
steps, more for longer contexts, of 1,000 to 8,000 tokens, and models of 0.5 and 1 billion weights.
At 32 tokens the factor of 4 is not to be expected; the direction is tested.

Protocol: Language models of 3 blocks of width 32 in float32 on bytes of 18 books, windows of 32,
batches of 8, 400 steps of AdamW, whose rate falls as a cosine: behind a warm-up with pre-norm (RMS
norm), without one in nGPT, as there. Each has the best of four rates, chosen with other seeds on
the validation set. Measured 20 times on the way are the bits per byte of 256 test windows. The part
is the steps of nGPT to where the pre-norm net of the same seed ends, over those of that net; if
nGPT never comes there it counts as all of them.

Command: python -m experiments run ngpt_steps
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Language, Records, Source, Verdict, decide, draw, tuned

FEWER = 0.25
"""The steps of nGPT over those of the baseline: the paper's factor of 4, its smallest."""

SOURCE = Source("loshchilov2024", "abstract", "4 to 20 times fewer", read="abstract")


@dataclasses.dataclass(frozen=True)
class NgptSteps(Language):
    """The config.

    Attributes:
      rates: Learning rates to choose from, by scheme.
    """

    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    depth: int = 3
    steps: int = 400
    evaluations: int = 20


QUICK = NgptSteps()
SECONDS = 150
FULL = NgptSteps(
    steps=20_000,
    width=256,
    depth=6,
    heads=8,
    context=128,
    batch_size=64,
    warmup=1000,
    evaluations=50,
)


def run(config: NgptSteps) -> Iterator[Condition]:
    """Pre-norm and nGPT, each at its best rate."""
    for scheme in ("pre", "ngpt"):
        mine = dataclasses.replace(config, warmup=0) if scheme == "ngpt" else config
        options = {"scheme": scheme, "prepare": config.prepare, **config.sizes}
        norm = nl.get("rms", use_bias=False)
        yield Condition({"scheme": scheme}, tuned(mine, norm, config.rates, **options))


def share(records: Records) -> np.ndarray:
    """The steps of nGPT to where the baseline ends, over all of them, of each seed."""

    def one(mine: Records) -> float:
        way = mine.where(kind="evaluation", scheme="pre")
        steps = max(way.values("step"))
        target = way.where(step=steps).values("bits_per_byte")[0]
        [found] = mine.where(scheme="ngpt").steps_to(target, "bits_per_byte", higher=False)
        return min(found, steps) / steps

    return records.where(kind="evaluation").each_seed(one)


def verdict(records: Records) -> Iterator[Verdict]:
    """The part of the steps, and what is gained in the end."""
    claim = "nGPT is after a part of the steps where pre-norm ends (part)"
    limits = {"at_most": 1, "size": FEWER, "geometric": True}
    yield decide("steps", claim, share(records), **limits, source=SOURCE)
    claim = "after as many steps nGPT is better (bits per byte less)"
    bits = [records.bits_per_byte(scheme=scheme) for scheme in ("pre", "ngpt")]
    yield decide("end", claim, bits[0] - bits[1], at_least=0, unit="bits per byte", source=SOURCE)


def figure(records: Records) -> Figure:
    """Bits per byte on the way, and what was screened."""
    picture, (left, right) = draw.canvas(2)
    way = records.where(kind="evaluation")
    draw.over_steps(left, way, "bits_per_byte", by="scheme")
    draw.frame(left, ylabel="test bits per byte", title="at the chosen rates")
    draw.against(right, records.where(kind="screening"), "lr", "bits_per_byte", by="scheme")
    draw.frame(right, xscale="log", xlabel="learning rate", title="screening, other seeds")
    right.set_ylabel("test bits per byte")
    return draw.finish(picture)
