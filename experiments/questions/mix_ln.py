"""Are gradients more even from block to block with Mix-LN than with pre-norm or post-norm?

Claim: Mix-LN, post-norm in the first quarter of the blocks and pre-norm behind, has gradients that
are more even over the blocks at initialization than pre-norm's, and more even than post-norm's.

Source: Li et al. 2024, https://arxiv.org/abs/2412.13795, abstract: pre-norm has smaller gradients
in its deep blocks, post-norm in its first ones; Mix-LN's are more uniform. A quarter of the blocks
is what their scripts use.

Protocol: A language model at its initialization, of 12 blocks of width 64, layer norm, a GELU MLP,
a head of its own, and 8 sequences of 32 random tokens. Measured is the norm of the gradient of the
mean loss by all kernels of a block; unevenness is the largest over the smallest of the blocks. A
seed draws weights and tokens.

Command: normlab run mix_ln
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Source,
    Verdict,
    decide,
    draw,
    exact,
    first_gradients,
)

SOURCE = Source("li2024", "abstract", read="abstract")


@dataclasses.dataclass(frozen=True)
class MixLn(Config):
    """The config.

    Attributes:
      schemes: Where the norms stand.
      norm: Which norm.
      depth: Blocks.
      width: The width of the stream.
      length: Tokens of a sequence.
    """

    dataset: str = ""
    batch_size: int = 8
    schemes: tuple[str, ...] = ("post", "pre", "mix")
    norm: str = "layer"
    depth: int = 12
    width: int = 64
    length: int = 32


QUICK = MixLn()
SECONDS = 40
FULL = MixLn(seeds=20, depth=24, width=512, length=256)


def run(config: MixLn) -> Iterator[Condition]:
    """Each scheme."""
    for scheme in config.schemes:
        yield Condition({"scheme": scheme}, exact(measure, config, scheme))


def measure(config: MixLn, scheme: str) -> Iterator[Record]:
    """The gradient by each block, and how uneven they are."""
    sizes = {"batch_size": config.batch_size, "length": config.length, "width": config.width}
    look = first_gradients(scheme, nl.get(config.norm), depth=config.depth, **sizes)
    for seed in config.each_seed:
        kernels = jax.tree.map(lambda v: v if v.ndim > 1 else v[:0], look(seed))
        norms = np.asarray(nl.instruments.block_norms(kernels).block, float)
        for block, norm in enumerate(norms.tolist()):
            yield {"kind": "gradient", "seed": seed, "block": block + 1, "gradient": norm}
        yield {"kind": "uneven", "seed": seed, "uneven": float(norms.max() / norms.min())}


def verdict(records: Records) -> Iterator[Verdict]:
    """Mix-LN against each."""
    uneven = {
        scheme: records.by_seed("uneven", kind="uneven", scheme=scheme)
        for scheme in records.values("scheme")
    }
    for scheme in ("pre", "post"):
        claim = f"gradients are less even over the blocks with {scheme}-norm than with Mix-LN"
        more = uneven[scheme] / uneven["mix"]
        limits = {"at_least": 1, "geometric": True, "unit": "times", "source": SOURCE}
        yield decide(scheme, f"{claim} (factor)", more, **limits)


def figure(records: Records) -> Figure:
    """The gradient by each block."""
    picture, (axes,) = draw.canvas(width=5.4)
    here = records.where(kind="gradient")
    draw.over_steps(axes, here, "gradient", x="block", by="scheme", marker=True)
    draw.frame(axes, xlabel="block", log=True, legend=True, ticks=here.values("block"))
    axes.set(ylabel="‖gradient by the block‖ (nats)", title="at initialization")
    return picture
