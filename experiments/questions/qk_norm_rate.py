"""Does a norm of queries and keys widen the range of rates at which a transformer is stable?

Claim: With QK norm a language model trains at larger rates than without. It keeps the attention
logits small at rates at which they grow without it.

Source: Wortsman et al. 2023, https://arxiv.org/abs/2309.14322, abstract: small models at high rates
show the instability of large ones, growing attention logits among them, and the mitigations of
large models, of which QK norm is one, cure it. The factor of 3 is ours.

Protocol: A pre-norm language model of 2 blocks of width 32 with RMS norm on bytes of 18 books,
windows of 32, batches of 8, 200 steps of Adam with a warm-up of 20 steps and a rate that then
stays; nothing is clipped. A rate is stable if the loss at the end is finite and below that of one
who knows how frequent each byte is. The largest stable rate of each seed is bracketed on a grid and
bisected to a factor of 1.4. The logit is the largest |q·k|/√D on a batch, at the end of training at
a rate of the grid.

Command: normlab run qk_norm_rate
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..engine import (
    Condition,
    Language,
    Net,
    Record,
    Records,
    Source,
    Verdict,
    decide,
    draw,
    exact,
    largest_stable,
    searched,
)

WIDER = 3.0
"""The largest stable rate with QK norm over that without. Ours, before any run."""

HIGH = 0.03
"""The rate of the grid at which the logits are compared."""

SOURCE = Source("wortsman2023", "abstract", read="abstract")


@dataclasses.dataclass(frozen=True)
class QkNormRate(Language):
    """The config.

    Attributes:
      norm: Which norm, in front of the branches and of queries and keys.
      rates: The grid.
    """

    norm: str = "rms"
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    optimizer: str = "adam"
    schedule: str = "constant"
    warmup: int = 20
    steps: int = 200


QUICK = QkNormRate()
SECONDS = 140
FULL = QkNormRate(
    steps=5000,
    width=256,
    depth=6,
    heads=8,
    context=128,
    batch_size=32,
    warmup=500,
)


def run(config: QkNormRate) -> Iterator[Condition]:
    """Without and with the norm of queries and keys."""

    def stable(record: Record) -> bool:
        bits = record["bits_per_byte"]
        return record["diverged"] is None and bits is not None and bits < config.chance

    for name, inside in (("none", ()), ("QK norm", ("q", "k"))):
        options = {"inside": inside, "prepare": config.prepare, **config.sizes}
        made = largest_stable(
            *(config, nl.get(config.norm, use_bias=False), config.rates, stable),
            **{"fine": 1.4, "instrument": logits, **options},
        )
        yield Condition({"inside": name}, made, searched(config.rates))
    says = {"kind": "frequencies", "seed": config.first_seed, "step": config.steps}
    yield Condition({"condition": "frequencies"}, exact(config.frequencies), [says])


def logits(net: Net) -> dict[str, Array]:
    """The largest logit of any attention."""
    variables = {"params": net.params, models.STATE: net.norm_state}
    _, sown = net.model.apply(variables, net.images, train=False, mutable=[models.DEPTH])
    largest = [block["heads"][0].largest.max() for block in sown[models.DEPTH].values()]
    return {"logit": jnp.stack(largest).max()}


def verdict(records: Records) -> Iterator[Verdict]:
    """The largest stable rates, and the logits at a high rate."""
    rate = {
        name: records.by_seed("lr", kind="largest", inside=name) for name in ("none", "QK norm")
    }
    claim = "the largest stable rate is larger with QK norm (factor)"
    factor = rate["QK norm"] / rate["none"]
    yield decide("rate", claim, factor, at_least=1, size=WIDER, geometric=True, source=SOURCE)
    trials = records.where(kind="trial", lr=HIGH)
    claim = "at a high rate the largest attention logit is smaller with QK norm (factor)"
    logit = {name: trials.by_seed("logit", inside=name) for name in rate}
    smaller = logit["QK norm"] / logit["none"]
    yield decide("logit", claim, smaller, at_most=1, geometric=True, untuned=True, source=SOURCE)


def figure(records: Records) -> Figure:
    """Bits per byte and the largest logit against the rate, and the rates that were found."""
    picture, (left, middle, right) = draw.canvas(3, width=3.9)
    trials = records.where(kind="trial")
    draw.scatter(left, trials, "lr", "bits_per_byte", by="inside", alpha=0.5)
    frequent = records.where(kind="frequencies").values("bits_per_byte")
    draw.frame(left, threshold=frequent, xscale="log", log=True, xlabel="learning rate")
    left.set_ylabel("test bits per byte at the end")
    draw.scatter(middle, trials, "lr", "logit", by="inside", alpha=0.5)
    draw.frame(middle, xscale="log", yscale="log", xlabel="learning rate")
    middle.set_ylabel("largest |q·k|/√D")
    ends = records.where(kind="largest")
    names = ends.values("inside")
    draw.columns(right, {name: ends.by_seed("lr", inside=name) for name in names}, mean=False)
    draw.frame(right, log=True, ylabel="largest stable rate")
    return draw.finish(picture)
