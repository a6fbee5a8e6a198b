"""Can batch norm represent the identity, and with which gain?

Claim: With γ = √(Var + ε) and β = E[x] batch norm is the identity. With the paper's γ = √Var it is
smaller by the factor √(Var / (Var + ε)): nothing for a variance of 1, and a half where the
variance is ε/3.

Source: Ioffe & Szegedy 2015, section 3 (the remark after the definition of γ and β),
https://arxiv.org/abs/1502.03167, where γ = √Var gives the identity: ε is neglected. The rest is
ours, by algebra.

Protocol: Random inputs of 64 examples and 16 channels with standard deviations from 1e-4 to 10,
means as large, and ε = 1e-5, in float64, through the library's batch norm, with the statistics of
the batch and with population statistics that have seen it. Measured: the largest difference
between output and input, relative to the largest deviation of the input from its mean.

Command: normlab run identity
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Record, Records, Verdict, decide, draw, exact

ROUNDING = 1e-12
"""The largest error of the identity, relative."""

AGREES = 1e-6
"""How far the loss of γ = √Var may be from 1 − √(Var / (Var + ε)), relative to it."""

GAINS = {"√(Var + ε)": 1.0, "√Var": 0.0}
"""How often ε stands beside the variance under the root of γ."""


@dataclasses.dataclass(frozen=True)
class Identity(Config):
    """The config.

    Attributes:
      eps: ε.
      spreads: The standard deviations of the input.
      channels: How many channels it has.
    """

    dataset: str = ""
    batch_size: int = 64
    eps: float = 1e-5
    spreads: tuple[float, ...] = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0)
    channels: int = 16


QUICK = Identity()
SECONDS = 3
FULL = Identity(channels=256)


def run(config: Identity) -> Iterator[Condition]:
    """Both gains, with either kind of statistics."""
    for name in GAINS:
        for statistics in ("batch", "population"):
            labels = {"condition": f"γ = {name}", "statistics": statistics}
            measure = exact(errors, config, share=GAINS[name], train=statistics == "batch")
            yield Condition(labels, measure)


def errors(config: Identity, *, share: float, train: bool) -> Iterator[Record]:
    """How far the output is from the input, beside what is expected of it."""

    def one(x: Array) -> tuple[Array, Array]:
        mean, var = x.mean(0), x.var(0)
        params = nl.Affine(jnp.sqrt(var + share * config.eps), mean)
        state = nl.population.init_cumulative(config.channels, dtype=x.dtype).update(
            nl.moments(x, 0)
        )
        h, _ = nl.batch_norm(x, params, state, train=train, eps=config.eps)
        error = jnp.abs(h - x).max(0) / jnp.abs(x - mean).max(0)
        factor = jnp.sqrt((var + share * config.eps) / (var + config.eps))
        return error.max(), (1 - factor).max()

    draws = [np.random.default_rng(seed) for seed in config.each_seed]
    z = np.stack([rng.normal(1.0, 1.0, (config.batch_size, config.channels)) for rng in draws])
    run = jax.jit(jax.vmap(one))
    with jax.enable_x64(True):
        for spread in config.spreads:
            each = zip(config.each_seed, *map(np.asarray, run(spread * z)), strict=True)
            for seed, error, expected in each:
                found = {"error": float(error), "expected": float(expected)}
                yield {"kind": "error", "seed": seed, "sd": spread, **found}


def verdict(records: Records) -> Iterator[Verdict]:
    """The identity, and what ε takes of it, with either kind of statistics."""
    exactly, paper = (records.where(condition=f"γ = {name}") for name in GAINS)
    claim = "γ = √(Var + ε) gives the identity (relative error)"
    found = exactly.by_seed("error", of=max)
    yield decide("with-epsilon", claim, found, at_most=ROUNDING, exact=True)
    apart = Records(r | {"error": abs(r["error"] / r["expected"] - 1)} for r in paper)
    claim = "γ = √Var shrinks the output by √(Var / (Var + ε)) (relative error of that)"
    found = apart.by_seed("error", of=max)
    yield decide("without-epsilon", claim, found, at_most=AGREES, exact=True)


def figure(records: Records) -> Figure:
    """The error of each gain against the spread of the input."""
    picture, (axes,) = draw.canvas(width=6.4, height=4.2)
    draw.against(axes, records.where(statistics="population"), "sd", "error", by="condition")
    paper = records.where(lambda r: r["expected"] > 0)
    spreads = sorted(paper.values("sd"))
    middle = [np.median([r["expected"] for r in paper.where(sd=spread)]) for spread in spreads]
    look = {"color": "grey", "lw": 1, "ls": "--", "zorder": 5}
    axes.plot(spreads, middle, label="1 − √(Var / (Var + ε))", **look)
    draw.frame(axes, threshold=ROUNDING, xscale="log", yscale="log")
    axes.set(xlabel="standard deviation of the input", ylabel="|output − input|, relative")
    axes.set_title("Batch norm set to be the identity")
    return draw.finish(picture)
