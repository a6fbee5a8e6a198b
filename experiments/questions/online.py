"""Which norm stands a stream whose batches vary and whose scale drifts?

Claim: On a stream of batches of 2 to 32 examples, whose scale drifts, layer norm, group norm and
batch renormalization predict the next batch better than batch norm does.

Source: None makes this claim as such. Ioffe 2017, https://arxiv.org/abs/1702.03275 (batch
renormalization for small batches); Chiley et al. 2019, https://arxiv.org/abs/1905.05894 (norms for
online learning). The stream, and the order, are ours.

Protocol: MNIST, three layers of 100 ReLUs, SGD at 0.05; batches of 2, 8 and 32 examples in turn,
900 in all, each example once. Pixels from −1 to 1 are multiplied by a scale that goes from a
quarter to four and back, once in 180 batches, or by one. Each batch is predicted before it is
learned from; counted is the accuracy in the second half of the stream. One rate for all, which
nobody chose for any.

Command: normlab run online
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    plain,
)
from .precise import floats


@dataclasses.dataclass(frozen=True)
class Online(Config):
    """The config; the steps are batches.

    Attributes:
      kinds: What stands before each ReLU, as `make` knows it.
      sizes: How many examples the batches have, in turn.
      period: Batches in which the scale goes forth and back.
      factor: By which it grows and shrinks.
    """

    kinds: tuple[str, ...] = ("batch", "layer", "group", "renorm")
    sizes: tuple[int, ...] = (2, 8, 32)
    period: int = 180
    factor: float = 4.0
    steps: int = 900
    evaluations: int = 10
    lr: float = 0.05


QUICK = Online()
SECONDS = 70
FULL = Online(kinds=("none", "batch", "layer", "group", "renorm"), steps=4200)

SAID = {"layer": "layer norm", "group": "group norm", "renorm": "batch renormalization"}
"""The norms that are compared with batch norm, in words."""


def run(config: Online) -> Iterator[Condition]:
    """Each norm."""
    for name in config.kinds:
        yield Condition({"norm": name}, exact(streamed, config, make(name)))


def make(name: str) -> nl.Norm:
    """The norm."""
    if name == "renorm":
        return nl.get("batch", population="renorm")
    return nl.get("group", groups=10) if name == "group" else nl.get(name)


def streamed(config: Online, norm: nl.Norm) -> Iterator[Record]:
    """The accuracy in each part of either stream; each batch is predicted, then learned from."""
    data = floats(dataset(config.dataset, config.data_dir))
    model, params, states = plain.begin(config, norm, data, activation=nn.relu)
    rule = optax.sgd(config.lr)
    step = plain.sgd(model, rule)
    turns, whole = -(-config.steps // len(config.sizes)), sum(config.sizes)
    cuts = np.cumsum(config.sizes)[:-1]

    @plain.each_seed
    def along(arrays: Any, params: Any, states: Any, rows: Array) -> Array:
        inputs, labels, scales = arrays

        def turn(carry: Any, given: Any) -> tuple[Any, Array]:
            rows, scales = given
            found = []
            for part, scale in zip(jnp.split(rows, cuts), scales, strict=True):
                x, y = scale * inputs[part], labels[part]
                found.append(plain.right(model, carry[0], carry[1], x, y))
                carry = step(carry, (x, y))
            return carry, jnp.concatenate(found)

        return lax.scan(turn, (params, states, rule.init(params)), (rows, scales))[1]

    shuffle = functools.partial(drawn, len(data.train_labels), turns * whole)
    rows = np.stack([shuffle(seed) for seed in config.each_seed]).reshape(-1, turns, whole)
    drift = scales_of(config)
    for stream, scales in (("drifting", drift), ("still", np.ones_like(drift))):
        given = scales.reshape(turns, -1).astype(np.float32)
        arrays = (data.train_inputs, data.train_labels, given)
        right = np.asarray(along(arrays, params, states, rows))
        parts = min(config.evaluations, turns)
        for seed, each in zip(config.each_seed, right, strict=True):
            for i, part in enumerate(np.array_split(each, parts)):
                end = round((i + 1) * config.steps / parts)
                found = {"accuracy": float(part.mean()), "second_half": 2 * (i + 1) > parts}
                labels_of = {"stream": stream, "seed": seed, "step": end}
                yield {"kind": "evaluation", **labels_of, **found}


def drawn(examples: int, count: int, seed: int) -> np.ndarray:
    """The examples of a stream; none comes twice before all have come."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(examples) for _ in range(-(-count // examples))])[:count]


def scales_of(config: Online) -> np.ndarray:
    """The scale of each batch, which begins with 1."""
    count = -(-config.steps // len(config.sizes)) * len(config.sizes)
    return config.factor ** np.sin(2 * np.pi * np.arange(count) / config.period)


def verdict(records: Records) -> Iterator[Verdict]:
    """How each norm stands beside batch norm, and what the drift costs it."""
    half = records.where(second_half=True)

    def accuracy(norm: str, stream: str) -> np.ndarray:
        return 100 * half.by_seed("accuracy", of=np.mean, norm=norm, stream=stream)

    points = {"at_least": 0, "unit": "points", "untuned": True}
    compared = [name for name in half.values("norm") if name in SAID]
    for stream in half.values("stream"):
        for name in compared:
            claim = f"{stream} stream: {SAID[name]} is more accurate than batch norm"
            gain = accuracy(name, stream) - accuracy("batch", stream)
            yield decide(f"{stream}.{name}", claim, gain, **points)
    for name in compared:
        lost = {n: accuracy(n, "still") - accuracy(n, "drifting") for n in ("batch", name)}
        claim = f"the drift costs {SAID[name]} less than batch norm"
        yield decide(f"drift.{name}", claim, lost["batch"] - lost[name], **points)


def figure(records: Records) -> Figure:
    """The error on the next batch along either stream."""
    picture, panels = draw.panels(records, "stream")
    for axes, stream, here in panels:
        draw.over_steps(axes, here, draw.test_error, marker=True)
        title = f"{stream} stream"
        draw.frame(axes, log=True, xlabel="batch", ylabel="error on the next batches (%)")
        axes.set_title(title)
    return draw.finish(picture, "Median and band of all seeds")
