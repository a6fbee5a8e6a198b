"""Does nGPT need fewer steps than a pre-norm transformer?

Claim: nGPT, whose streams and kernels lie on a sphere, is after a part of the steps where a
pre-norm transformer ends.

Source: Loshchilov et al. 2024, https://arxiv.org/abs/2410.01131, abstract: 4 to 20 times fewer
steps, more for longer contexts, of 1,000 to 8,000 tokens, and models of 0.5 and 1 billion weights.
At 32 tokens and 400 steps no such factor is to be expected; whether it is fewer is tested.

Protocol: Language models of 3 blocks of width 32 in float32 on bytes of 18 books, windows of 32,
batches of 8, 400 steps of AdamW, whose rate falls as a cosine: behind a warm-up with pre-norm (RMS
norm), without one in nGPT, as there. The head is no embedding, and nGPT's α starts at one over the
blocks, as there. Each has the best of four rates or two more beyond, chosen with other seeds on the
validation set. Measured 20 times on the way are the bits per byte of 256 test windows: whether nGPT
is where the pre-norm net of the same seed ends, at fewer steps than that net. Seeds are those from
200 on: a run of those from 100 on had the embedding for its head and α from 0.05 on.

Command: normlab run ngpt_steps
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Language,
    Records,
    Source,
    Verdict,
    decide,
    decide_share,
    draw,
    tuned,
)

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


QUICK = NgptSteps(first_seed=200)
SECONDS = 110
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
        norm = nl.get("rms", use_bias=False)
        more: dict[str, Any] = {}
        if scheme == "ngpt":
            more = {"width": config.width, "init": 1 / config.depth}
        made = nl.placement.scheme(scheme, norm=norm, depth=config.depth, **more)
        options = {"scheme": made, "tied": False, "prepare": config.prepare, **config.sizes}
        yield Condition({"scheme": scheme}, tuned(mine, norm, config.rates, **options))


def sooner(records: Records) -> np.ndarray:
    """Whether nGPT is where the baseline ends at fewer steps, in each seed."""

    def one(mine: Records) -> bool:
        way = mine.where(kind="evaluation", scheme="pre")
        steps = max(way.values("step"))
        target = way.where(step=steps).values("bits_per_byte")[0]
        [found] = mine.where(scheme="ngpt").steps_to(target, "bits_per_byte", higher=False)
        return found < steps

    return records.where(kind="evaluation").each_seed(one)


def verdict(records: Records) -> Iterator[Verdict]:
    """Whether fewer steps do, and what is gained in the end."""
    claim = "nGPT is where pre-norm ends at fewer steps (share of the seeds)"
    yield decide_share("steps", claim, sooner(records), at_least=0.5, source=SOURCE)
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
