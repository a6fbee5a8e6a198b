"""Does a norm behind each branch keep the residual stream and the gradient even in training?

Claim: In training the variance of the stream of a pre-norm transformer grows far more from block to
block than that of Peri-LN, which has norms in front of each branch and behind it; and Peri-LN's
gradients are more even from block to block.

Source: Kim et al. 2025, https://arxiv.org/abs/2502.02732, abstract: Peri-LN has a more balanced
growth of variance, steadier gradients and stabler training, in models to 3.2 billion weights.
Factors of 2 are ours; at initialization `stream_variance` measures the growth.

Protocol: A language model of 8 blocks of width 32, RMS norm, on bytes of 18 books, windows of 32,
batches of 8, 400 steps of AdamW at a rate of 0.01 with a warm-up and a cosine, the same for both.
On a batch of training windows: the variance of the stream over channels behind each block, the mean
over tokens, and the norm of the gradient of the loss by each block. Evenness is the largest over
the smallest of the blocks.

Command: normlab run peri_variance
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..engine import Condition, Language, Net, Record, Records, Source, Verdict, decide, draw, learn

MORE = 2.0
"""Pre-norm's growth and unevenness over Peri-LN's. Ours, before any run."""

SOURCE = Source("kim2025", "abstract", read="abstract")


@dataclasses.dataclass(frozen=True)
class PeriVariance(Language):
    """The config.

    Attributes:
      schemes: Where the norms stand.
      norm: Which norm.
    """

    schemes: tuple[str, ...] = ("pre", "peri")
    norm: str = "rms"
    depth: int = 8
    steps: int = 400
    lr: float = 1e-2


QUICK = PeriVariance()
SECONDS = 130
FULL = PeriVariance(
    steps=10_000,
    width=256,
    depth=16,
    heads=8,
    context=128,
    batch_size=32,
    lr=2e-3,
    warmup=500,
)


def run(config: PeriVariance) -> Iterator[Condition]:
    """Each scheme."""
    for scheme in config.schemes:
        options = {"scheme": scheme, "scan": True, "prepare": config.prepare, **config.sizes}
        norm = nl.get(config.norm, use_bias=False)
        yield Condition({"scheme": scheme}, learn(config, norm, instrument=by_block, **options))


def by_block(net: Net) -> dict[str, Array]:
    """The variance of the stream behind each block, and the gradient by each."""
    variables = {"params": net.params, models.STATE: net.norm_state}
    kinds = [models.STATE, models.DEPTH]
    _, sown = net.model.apply(variables, net.images, train=True, mutable=kinds)
    variance = nl.instruments.by_block(
        sown[models.DEPTH], lambda block: block["after_mlp/0/variance"].mean()
    )
    gradient = nl.instruments.block_norms(jax.grad(net.loss)(net.params)).block
    return {"variance": variance, "gradient": gradient}


def growth(record: Record) -> float:
    """The variance behind the last block over that behind the first."""
    return record["variance"][-1] / record["variance"][0]


def unevenness(record: Record) -> float:
    """The largest gradient of a block over the smallest."""
    return max(record["gradient"]) / min(record["gradient"])


def of_seeds(records: Records, measure: Callable[[Record], float], **wanted: Any) -> np.ndarray:
    """What is measured of the record of each seed."""
    return records.where(**wanted).each_seed(lambda mine: measure(mine[-1]))


def verdict(records: Records) -> Iterator[Verdict]:
    """Pre-norm over Peri-LN, after training; and pre-norm's variance over what it was at first."""
    way = records.where(kind="evaluation")
    last = max(way.values("step"))
    how = {"at_least": 1, "geometric": True, "unit": "times", "untuned": True}
    for id, measure, what in (
        ("variance", growth, "the variance grows more over the blocks with pre-norm than"),
        ("gradient", unevenness, "the gradient is less even over the blocks with pre-norm than"),
    ):
        pre, peri = (of_seeds(way, measure, step=last, scheme=s) for s in ("pre", "peri"))
        claim = f"after training {what} with Peri-LN (factor)"
        yield decide(id, claim, pre / peri, size=MORE, source=SOURCE, **how)
    at = [of_seeds(way, growth, step=step, scheme="pre") for step in (0, last)]
    claim = "pre-norm: training makes the variance grow more over the blocks (factor)"
    yield decide("training", claim, at[1] / at[0], source=SOURCE, **how)


def figure(records: Records) -> Figure:
    """Variance and gradient of each block, dashed at initialization."""
    picture, (left, right) = draw.canvas(2)
    way = records.where(kind="evaluation")
    last = max(way.values("step"))
    for axes, key, name in (
        (left, "variance", "variance of the stream behind it"),
        (right, "gradient", "‖gradient by the block‖ (nats)"),
    ):
        for record_step, look in ((0, {"ls": "--", "label": "_"}), (last, {})):
            here = way.where(step=record_step)
            each = Records(
                {**r, "block": i + 1, "value": v} for r in here for i, v in enumerate(r[key])
            )
            draw.over_steps(axes, each, "value", x="block", by="scheme", marker=True, **look)
        draw.frame(axes, xlabel="block", yscale="log", ylabel=name)
    return draw.finish(picture, "dashed: at initialization")
