"""Do the deep blocks of a pre-norm transformer do little, and more with scaled norms or Mix-LN?

Claim: In a trained pre-norm transformer taking a block out of the second half costs less than one
out of the first half. With LayerNorm Scaling, whose norms are divided by the root of the block's
number, deep blocks are worth more than with pre-norm; so they are with Mix-LN, post-norm in its
first quarter.

Source: Sun et al. 2025, https://arxiv.org/abs/2502.05795, abstract, of models of 130 million to 7
billion weights: nearly half of the blocks of pre-norm models do less than expected, and deep ones
contribute more with LayerNorm Scaling. Li et al. 2024, https://arxiv.org/abs/2412.13795, abstract,
for Mix-LN. What is compared, the mean loss without a block of the second half, is ours.

Protocol: A language model of 8 blocks of width 32, RMS norm, on bytes of 18 books, windows of 32,
batches of 8, 500 steps of AdamW at a rate of 0.01 with a warm-up and a cosine, the same for all.
Then each block in turn returns nothing, its last kernels zero, and the rise of the loss is taken on
32 windows of the training set. The first block is left out: it is no deep one, and embeds.

Found: With pre-norm deep blocks do not do less here than early ones, so there is nothing to mend,
and what is said of LayerNorm Scaling and Mix-LN is tested where its premise does not hold. The
embedding has RMS 1 and there are 8 blocks; the authors' has 0.02, and far more.

Command: normlab run ln_scaling
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import path_aware_map
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Language, Net, Records, Source, Verdict, decide, draw, learn

SOURCES = {
    "lns": Source("sun2025", "abstract", read="abstract"),
    "mix": Source("li2024", "abstract", read="abstract"),
}

NAMES = {"lns": "LayerNorm Scaling", "mix": "Mix-LN"}


@dataclasses.dataclass(frozen=True)
class LnScaling(Language):
    """The config.

    Attributes:
      schemes: Where the norms stand.
      norm: Which norm.
    """

    schemes: tuple[str, ...] = ("pre", "lns", "mix")
    norm: str = "rms"
    depth: int = 8
    steps: int = 500
    lr: float = 1e-2


QUICK = LnScaling()
SECONDS = 220
FULL = LnScaling(
    steps=10_000,
    width=256,
    depth=16,
    heads=8,
    context=128,
    batch_size=32,
    lr=2e-3,
    warmup=500,
)


def run(config: LnScaling) -> Iterator[Condition]:
    """Each scheme."""
    for scheme in config.schemes:
        options = {"scheme": scheme, "prepare": config.prepare, **config.sizes}
        norm = nl.get(config.norm, use_bias=False)
        yield Condition({"scheme": scheme}, learn(config, norm, instrument=worth, **options))


def worth(net: Net) -> dict[str, Array]:
    """By how much the loss rises where each block returns nothing, `[L]`."""

    def without(block: int) -> Array:
        last = [(f"block{block}", name, "kernel") for name in ("out", "down")]
        kept = path_aware_map(lambda path, v: 0 * v if path in last else v, net.params)
        return net.loss(kept)

    whole = net.loss(net.params)
    return {"worth": jnp.stack([without(i) - whole for i in range(net.model.depth)])}


def deep(records: Records, scheme: str) -> np.ndarray:
    """The mean worth of the blocks of the second half, of each seed."""
    half = lambda worth: np.mean(worth[len(worth) // 2 :])  # noqa: E731
    return records.where(kind="evaluation", scheme=scheme).each_seed(lambda r: half(r[-1]["worth"]))


def early(records: Records, scheme: str) -> np.ndarray:
    """That of the blocks of the first half, but for the first."""
    half = lambda worth: np.mean(worth[1 : len(worth) // 2])  # noqa: E731
    return records.where(kind="evaluation", scheme=scheme).each_seed(lambda r: half(r[-1]["worth"]))


def verdict(records: Records) -> Iterator[Verdict]:
    """The deep blocks of pre-norm against its early ones, and against those of the others."""
    how = {"at_least": 0, "unit": "nats", "untuned": True}
    claim = "pre-norm: taking out an early block costs more than a deep one (loss)"
    more = early(records, "pre") - deep(records, "pre")
    yield decide("pre", claim, more, source=SOURCES["lns"], **how)
    for scheme, source in SOURCES.items():
        claim = f"taking out a deep block costs more with {NAMES[scheme]} than with pre-norm (loss)"
        more = deep(records, scheme) - deep(records, "pre")
        yield decide(scheme, claim, more, source=source, **how)


def figure(records: Records) -> Figure:
    """The worth of each block after training."""
    picture, (axes,) = draw.canvas(width=5.4)
    ends = records.where(kind="evaluation").trained()
    each = Records({**r, "block": i + 1, "nats": v} for r in ends for i, v in enumerate(r["worth"]))
    draw.over_steps(axes, each, "nats", x="block", by="scheme", marker=True)
    draw.frame(axes, xlabel="block", yscale="log", legend=True, ticks=each.values("block"))
    axes.set(ylabel="rise of the loss without it (nats)", title="after training")
    return picture
