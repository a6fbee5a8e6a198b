"""How large is the gradient of the last block at initialization, with post-norm and with pre-norm?

Claim: At initialization the gradient of the kernels of the last block's MLP is as large with
post-norm however many blocks there are, and falls as 1/√L with pre-norm.

Source: Xiong et al. 2020, theorem 1 and figure 3(c, d), https://arxiv.org/abs/2002.04745: an upper
bound for one head of uniform attention, d·√(ln d) and d·√(ln d / L), and measurements of 6 to 14
layers. The paper goes on that a large rate at the first steps therefore moves the last blocks of a
post-norm net too far, and that pre-norm needs no warm-up: that is not asked here.

Protocol: A language model of L = 4 … 64 blocks of width 128 at its initialization, layer norm, an
MLP of ReLUs as in the paper, a head of its own, and 8 sequences of 64 random tokens. Measured is
the Frobenius norm of the gradient of the loss by the last kernel of the last block, and by that of
the first block; the slope is that of its logarithm against ln L. A seed draws weights and tokens.
The bounds are ours, and were written before a pilot of L = 2 … 32, which had the slope −0.37 with
pre-norm: the embedding's own variance counts as much as that of the first blocks. By the paper's
lemma 2 the gradient falls as 1/√(1 + cL), c from 1/2 to 3/2: nearly 1/√L from L = 4 on.

Command: normlab run last_gradient

Found: With pre-norm the slope is that of the theory. With post-norm the gradient still rises a
little from 4 to 16 blocks, and is level from there on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..engine import Condition, Config, Record, Records, Source, Verdict, decide, draw, exact

SLOPES = {"post": 0.0, "pre": -0.5}
"""The theory's exponents of L."""

SOURCES = {
    "post": Source("xiong2020", "theorem 1, figure 3(c)", "L^0: about 1.6 at 6 to 14 layers"),
    "pre": Source("xiong2020", "theorem 1, figure 3(d)", "L^−½"),
}

NEAR = 0.1
"""How far the measured exponent may be from the theory's."""


@dataclasses.dataclass(frozen=True)
class LastGradient(Config):
    """The config.

    Attributes:
      schemes: Where the norms stand.
      norm: Which norm.
      depths: The numbers of blocks.
      width: The width of the stream.
      length: Tokens of a sequence.
    """

    dataset: str = ""
    batch_size: int = 8
    schemes: tuple[str, ...] = ("post", "pre")
    norm: str = "layer"
    depths: tuple[int, ...] = (4, 8, 16, 32, 64)
    width: int = 128
    length: int = 64


QUICK = LastGradient()
SECONDS = 130
FULL = LastGradient(seeds=20, depths=(4, 8, 16, 32, 64, 128), width=512, length=256)


def run(config: LastGradient) -> Iterator[Condition]:
    """Each scheme at all depths."""
    for scheme in config.schemes:
        yield Condition({"scheme": scheme}, exact(measure, config, scheme))


def measure(config: LastGradient, scheme: str) -> Iterator[Record]:
    """The norm of the gradient at each depth, and the slope over the depths."""
    found: dict[tuple[int, str], list[float]] = {}
    for depth in config.depths:
        look = gradients(config, scheme, depth)
        for seed in config.each_seed:
            rng = np.random.default_rng(seed)
            tokens = rng.integers(0, 256, (config.batch_size, config.length + 1))
            for block, norm in zip(
                ("first", "last"), look(jax.random.key(seed), tokens), strict=True
            ):
                found.setdefault((seed, block), []).append(float(norm))
                labels = {"seed": seed, "block": block}
                yield {"kind": "gradient", **labels, "depth": depth, "gradient": float(norm)}
    for (seed, block), norms in found.items():
        slope = nl.instruments.depth_slope(np.array(norms), np.array(config.depths)).slope
        yield {"kind": "slope", "seed": seed, "block": block, "slope": float(slope)}


def gradients(config: LastGradient, scheme: str, depth: int) -> Any:
    """A function of a key and tokens: ‖gradient‖ by `down` of the first and of the last block."""
    sizes = {"width": config.width, "depth": depth, "mlp": "gelu", "scan": True, "tied": False}
    model = models.build("lm", nl.get(config.norm), 256, scheme=scheme, activation=nn.relu, **sizes)

    @jax.jit
    def look(key: Array, tokens: Array) -> Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        variables = model.init(key, inputs, train=False)

        def loss(params: Any) -> Array:
            logits: Any = model.apply({**variables, "params": params}, inputs, train=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        grads = model.unstack(jax.grad(loss)(variables["params"]))
        kernels = [grads[f"block{i}"]["down"]["kernel"] for i in (0, depth - 1)]
        return jnp.stack([jnp.linalg.norm(kernel) for kernel in kernels])

    return look


def verdict(records: Records) -> Iterator[Verdict]:
    """The exponents of L against the theory's."""
    slopes = records.where(kind="slope", block="last")
    for scheme in slopes.values("scheme"):
        expected = SLOPES[scheme]
        claim = (
            f"{scheme}: the gradient of the last block grows as L to the {expected:g} (exponent)"
        )
        found = slopes.by_seed("slope", scheme=scheme)
        low, high, source = expected - NEAR, expected + NEAR, SOURCES[scheme]
        yield decide(scheme, claim, found, at_least=low, at_most=high, source=source)


def figure(records: Records) -> Figure:
    """The gradient of the last and of the first block against the number of blocks."""
    picture, panels = draw.panels(records.where(kind="gradient"), "block")
    for axes, block, here in panels:
        draw.against(axes, here, "depth", "gradient", by="scheme")
        draw.frame(axes, xlabel="blocks", yscale="log", title=f"{block} block")
        axes.set_xscale("log", base=2)
        axes.set_ylabel("‖gradient of the kernel down‖")
    return draw.finish(picture)
