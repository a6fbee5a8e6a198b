"""Which blocks of a transformer have the large gradients at first: post-norm against pre-norm?

Claim: At initialization the gradient of the feed-forward weights grows with the block in post-norm,
so that the last blocks would move furthest, and is much the same in all blocks of pre-norm.

Source: Xiong et al. 2020, figure 3(c, d), https://arxiv.org/abs/2002.04745, with encoder and
decoder of 6 blocks. They prove it of the last block alone, which `last_gradient` measures against
the depth. What counts as the same is ours, chosen before any run.

Protocol: A language model of 12 blocks of width 64 at its initialization, layer norm, an MLP of
ReLUs as in the paper, a head of its own, an embedding of unit variance, and 8 sequences of 32
random tokens. Measured is the Frobenius norm of the gradient of the mean loss by the last kernel of
each block's MLP. The factor per block is that of the straight line through its logarithm. A seed
draws weights and tokens.

Command: normlab run pre_post_gradient
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
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

EVEN = (1 / 1.1, 1.1)
"""The factor from block to block where the gradient is much the same. Ours, before any run."""

XIONG = Source("xiong2020", "figure 3(c, d)")


@dataclasses.dataclass(frozen=True)
class PrePostGradient(Config):
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
    schemes: tuple[str, ...] = ("post", "pre")
    norm: str = "layer"
    depth: int = 12
    width: int = 64
    length: int = 32


QUICK = PrePostGradient()
SECONDS = 21
FULL = PrePostGradient(seeds=20, depth=24, width=512, length=256)


def run(config: PrePostGradient) -> Iterator[Condition]:
    """Each scheme."""
    for scheme in config.schemes:
        yield Condition({"scheme": scheme}, exact(measure, config, scheme))


def measure(config: PrePostGradient, scheme: str) -> Iterator[Record]:
    """The gradient of each block, and the factor from block to block."""
    sizes = {"batch_size": config.batch_size, "length": config.length, "width": config.width}
    options = {"depth": config.depth, "activation": nn.relu, **sizes}
    look = first_gradients(scheme, nl.get(config.norm), **options)
    for seed in config.each_seed:
        grads = look(seed)
        kernels = [grads[f"block{i}"]["down"]["kernel"] for i in range(config.depth)]
        norms = np.array([np.linalg.norm(kernel) for kernel in kernels])
        for block, norm in enumerate(norms.tolist()):
            yield {"kind": "gradient", "seed": seed, "block": block + 1, "gradient": norm}
        yield {"kind": "factor", "seed": seed, "factor": factor(norms)}


def factor(norms: np.ndarray) -> float:
    """By which they grow from one to the next.

    >>> round(factor(np.array([1.0, 2.0, 4.0])), 6)
    2.0
    """
    return float(np.exp(np.polyfit(np.arange(len(norms)), np.log(norms), 1)[0]))


def verdict(records: Records) -> Iterator[Verdict]:
    """Post-norm's gradient grows with the block, pre-norm's does not."""
    growth = {
        scheme: records.by_seed("factor", kind="factor", scheme=scheme)
        for scheme in ("post", "pre")
    }
    claim = "post-norm: the gradient grows with the block (factor from one to the next)"
    yield decide("post", claim, growth["post"], at_least=1, geometric=True, source=XIONG)
    claim = "pre-norm: the gradient is much the same in all blocks (factor from one to the next)"
    low, high = EVEN
    yield decide(
        *("pre", claim, growth["pre"]), at_least=low, at_most=high, geometric=True, source=XIONG
    )
    claim = "the gradient grows more from block to block in post-norm than in pre-norm (factor)"
    more = growth["post"] / growth["pre"]
    yield decide("more", claim, more, at_least=1, geometric=True, source=XIONG)


def figure(records: Records) -> Figure:
    """The gradient of each block."""
    picture, (axes,) = draw.canvas(width=5.4)
    here = records.where(kind="gradient")
    draw.over_steps(axes, here, "gradient", x="block", by="scheme", marker=True)
    blocks = here.values("block")
    draw.frame(axes, xlabel="block", log=True, legend=True, ticks=blocks)
    axes.set_ylabel("‖gradient of the kernel down‖ (nats)")
    axes.set_title("at initialization")
    return picture
