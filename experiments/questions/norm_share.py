"""How much of a training step is normalization?

Claim: In a conv net norms are a small share of a step's arithmetic and a large one of its memory
traffic: they wait for memory. Neither share depends on the batch. Norms of an example cost as much
as batch norm; RMS norm is cheaper than layer norm.

Source: Gitman & Ginsburg 2017, https://arxiv.org/abs/1709.08145 (batch norm took 24% of the time of
a ResNet-50 on a Pascal GPU, convolutions 60%); Zhang & Sennrich 2019,
https://arxiv.org/abs/1910.07467 (RMS norm 7–64% faster than layer norm in their frameworks). That
traffic is a larger share than arithmetic, and that the batch does not matter, are ours.

Protocol: Eight layers of a 3×3 convolution of 32 channels, a norm and a ReLU on images of 16×16,
forward and backward, compiled by XLA for this machine and not run: a clock would measure what else
the machine does. Arithmetic (FLOPs) and traffic (bytes accessed) are those that the compiler states
for its program, fusions counted once; the norm's share is what the program has more than the one
without a norm. A program has no spread: all seeds are one number.

Command: normlab run norm_share
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Record, Records, Source, Verdict, decide, draw, exact

ALIKE = 0.02
"""By which the share of the bytes may differ between two batches; chosen before any run."""

TIME = 0.24
"""The share of the time that the source measured."""

GITMAN = Source("gitman2017", "", "24% of the time of a ResNet-50 on a Pascal GPU", "second-hand")
ZHANG = Source("zhang2019", "", "RMS norm 7–64% faster than layer norm", "abstract")


@dataclasses.dataclass(frozen=True)
class NormShare(Config):
    """The config.

    Attributes:
      norms: Whose share is measured.
      batches: Images in a batch.
      depth, channels, side: Of the net and its images.
    """

    norms: tuple[str, ...] = ("batch", "layer", "rms", "group")
    batches: tuple[int, ...] = (8, 32)
    depth: int = 8
    channels: int = 32
    side: int = 16
    dataset: str = ""


QUICK = NormShare()
SECONDS = 21
FULL = NormShare(batches=(8, 32, 128), depth=16, channels=64, side=32)


def run(config: NormShare) -> Iterator[Condition]:
    """Each norm, and none."""
    for name in ("none", *config.norms):
        says = [{"batch": batch} for batch in config.batches]
        yield Condition({"norm": name}, exact(compiled, config, name), says)


def compiled(config: NormShare, name: str) -> Iterator[Record]:
    """What the compiler states of a step at each batch."""
    norm = nl.get(name, groups=8) if name == "group" else nl.get(name)
    for batch in config.batches:
        x = jax.ShapeDtypeStruct((batch, config.side, config.side, config.channels), jnp.float32)
        params, states = jax.eval_shape(lambda norm=norm, x=x: init(config, norm, x.shape))
        step = jax.jit(jax.grad(lambda p, s, x: loss(norm, p, s, x), (0, 2), has_aux=True))
        stated: Any = step.lower(params, states, x).compile().cost_analysis()
        found = {"flops": float(stated["flops"]), "bytes": float(stated["bytes accessed"])}
        for seed in config.each_seed:
            yield {"kind": "program", "batch": batch, "seed": seed, **found}


def init(config: NormShare, norm: nl.Norm, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Kernels with their norms' params, and the norms' states."""
    w = jnp.zeros((3, 3, config.channels, config.channels))
    one, state = norm.init(nl.Site(jnp.zeros(shape), jnp.zeros(shape), w, linear=nl.Conv()))
    return [(w, one)] * config.depth, [state] * config.depth


def loss(norm: nl.Norm, params: Any, states: Any, x: Array) -> tuple[Array, Any]:
    """The mean square of the output, and the next states."""
    after = []
    for (w, one), state in zip(params, states, strict=True):
        site = nl.Site(nl.Conv()(x, w), x, w, linear=nl.Conv())
        x, state = norm.apply(one, state, site, train=True)
        x = jax.nn.relu(x)
        after.append(state)
    return jnp.square(x).mean(), after


def share(records: Records, key: str, norm: str, batch: int) -> np.ndarray:
    """The share of the program that is the norm's, of its flops or its bytes."""
    mine, none = (records.by_seed(key, norm=n, batch=batch) for n in (norm, "none"))
    return (mine - none) / mine


def verdict(records: Records) -> Iterator[Verdict]:
    """The shares of batch norm, and of the others beside it."""
    few, many = sorted(records.values("batch"))[:: len(records.values("batch")) - 1]
    of = {key: share(records, key, "batch", many) for key in ("flops", "bytes")}
    claim = "batch norm is a larger share of a conv net's bytes than of its FLOPs"
    yield decide("bytes.flops", claim, of["bytes"] - of["flops"], at_least=0)
    claim = "batch norm is part of a conv net's traffic (a share of the bytes)"
    how = {"at_least": 0, "size": TIME, "source": GITMAN}
    yield decide("bytes.share", claim, of["bytes"], **how)
    moved = of["bytes"] - share(records, "bytes", "batch", few)
    claim = f"its share of the bytes is about the same with {few} images as with {many}"
    yield decide("bytes.batch", claim, moved, at_least=-ALIKE, at_most=ALIKE)
    rms, layer = (share(records, "bytes", name, many) for name in ("rms", "layer"))
    claim = "RMS norm is a smaller share of the bytes than layer norm"
    yield decide("rms.layer", claim, layer - rms, at_least=0, source=ZHANG)


def figure(records: Records) -> Figure:
    """The share of the FLOPs and of the bytes of each norm."""
    picture, grid = draw.canvas(2)
    rows = [
        {"norm": name, "batch": batch, "seed": 0, key: share(records, key, name, batch)[0]}
        for name in records.values("norm")
        for batch in records.values("batch")
        for key in ("flops", "bytes")
        if name != "none"
    ]
    for axes, key, word in zip(grid, ("flops", "bytes"), ("FLOPs", "bytes accessed"), strict=True):
        draw.against(axes, [r for r in rows if key in r], "batch", lambda r, key=key: 100 * r[key])
        ticks = records.values("batch")
        draw.frame(axes, xlabel="images in a batch", doubling=True, ticks=ticks)
        axes.set(ylabel="share of the step (%)", title=word, ylim=(0, None))
    return draw.finish(picture, "What a compiled training step has more with a norm")
