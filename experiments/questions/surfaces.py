"""Where do five optimizers end up from one start, and what lies between?

Claim: SGD, momentum, RMSprop, Adadelta and Adam come from one start to different points, with a
barrier on the straight line between them. With batch norm runs of one optimizer are more alike, in
their final loss and in the length of their weights, than without; optimizers differ by more than
the runs of one.

Source: Im, Tao & Branson 2016, https://arxiv.org/abs/1612.04010 (different final points from one
start; a weight norm characteristic of the algorithm; batch norm makes re-runs consistent); planes
as in Li et al. 2018, https://arxiv.org/abs/1712.09913. That barriers lie between is ours; in
circulation is that without batch norm one sees a plateau: drawn, and no claim.

Protocol: MNIST, a perceptron of five layers of 64 ReLUs (VGG and network in network are the
source's), batches of 64, 400 steps with each optimizer at a rate that falls to zero as a cosine;
for each seed all five have the same start and the same batches. The loss is that of 1,000 training
images with their own statistics, at every point anew. The barrier is the largest of the loss at 21
points of the line above the straight line between the losses at its ends, the mean over all pairs
of optimizers. "Alike" is the distance of a run's log loss from the median of the seeds, the mean
over optimizers. One rate for each optimizer, with and without the norm.

Command: normlab run surfaces
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
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
    Schedule,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    number,
    plain,
    shuffled,
)
from .precise import floats

BARRIER = 0.05
"""A barrier that counts, nats; chosen before any run."""

IM = Source("im2016", "", "consistent with batch norm alone, no number", "second-hand")

OPTIMIZERS = {
    "sgd": lambda rate: optax.sgd(rate(0.1)),
    "momentum": lambda rate: optax.sgd(rate(0.03), momentum=0.9),
    "rmsprop": lambda rate: optax.rmsprop(rate(0.001)),
    "adadelta": lambda rate: optax.adadelta(rate(1.0)),
    "adam": lambda rate: optax.adam(rate(0.001)),
}
"""Each with its usual rate, of which the schedule makes one for every step."""

LINE = np.linspace(0, 1, 21)
PLANE = np.linspace(-0.5, 1.5, 15)
"""Where the plane through the ends of `CORNERS` is drawn, in units of two of its sides."""

PAIRS = tuple(itertools.combinations(OPTIMIZERS, 2))
CORNERS = ("sgd", "momentum", "adam")


def _shares() -> np.ndarray:
    """How much of each end is at each point of all lines, then of the plane, `[points, ends]`."""
    one = dict(zip(OPTIMIZERS, np.eye(len(OPTIMIZERS)), strict=True))
    lines = [(1 - t) * one[a] + t * one[b] for a, b in PAIRS for t in LINE]
    o, u, v = (one[name] for name in CORNERS)
    return np.stack(lines + [o + x * (u - o) + y * (v - o) for x in PLANE for y in PLANE])


SHARES = _shares()


@dataclasses.dataclass(frozen=True)
class Surfaces(Config):
    """The config.

    Attributes:
      widths: The units of the hidden layers.
      images: Of which the loss is taken.
    """

    widths: tuple[int, ...] = (64,) * 5
    images: int = 1000
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 400


QUICK = Surfaces()
SECONDS = 70
FULL = Surfaces(widths=(256,) * 8, images=5000, steps=20_000)


def run(config: Surfaces) -> Iterator[Condition]:
    """Without a norm and with batch norm."""
    says: list[Record] = [{"kind": "end", "optimizer": name} for name in OPTIMIZERS]
    says += [{"kind": "line", "pair": ", ".join(pair)} for pair in PAIRS]
    plane = {"kind": "plane", "seed": config.first_seed, "step": config.steps}
    says.append({**plane, "losses": np.ones(len(PLANE) ** 2)})
    for name in ("none", "batch"):
        yield Condition({"norm": name}, exact(trained, config, nl.get(name)), says)


def trained(config: Surfaces, norm: nl.Norm) -> Iterator[Record]:
    """The ends of all optimizers of each seed, and what lies between."""
    data = floats(dataset(config.dataset, config.data_dir))
    options: dict[str, Any] = {"widths": config.widths, "activation": nn.relu}
    model, params, states = plain.begin(config, norm, data, **options)
    schedule = lambda lr: optax.cosine_decay_schedule(lr, config.steps)  # noqa: E731

    @plain.each_seed
    def train(arrays: Any, params: Any, states: Any, rows: Array) -> dict[str, Array]:
        inputs, labels = arrays
        images, told = inputs[: config.images], labels[: config.images]

        def loss(params: Any, states: Any) -> Array:
            return plain.loss(model, params, states, images, told)[0]

        ends, found = {}, {}
        for name, make in OPTIMIZERS.items():
            rule = make(schedule)
            step = plain.sgd(model, rule)
            turn = lambda c, r, step=step: (step(c, (inputs[r], labels[r])), None)  # noqa: E731
            ends[name] = lax.scan(turn, (params, states, rule.init(params)), rows)[0][0]
            found[f"loss_{name}"] = loss(ends[name], states)
            kernels = [v for v in jax.tree.leaves(ends[name]) if v.ndim > 1]
            found[f"length_{name}"] = jnp.sqrt(sum(jnp.square(v).sum() for v in kernels))

        def at(share: Array) -> Array:
            mean = lambda *v: jnp.tensordot(share, jnp.stack(v), 1)  # noqa: E731
            return loss(jax.tree.map(mean, *ends.values()), states)

        found["mixed"] = lax.map(at, jnp.asarray(SHARES, jnp.float32))
        return found

    rows = np.stack([shuffled(seed, data, config) for seed in config.each_seed])
    arrays = (data.train_inputs, data.train_labels)
    found = jax.tree.map(np.asarray, train(arrays, params, states, rows))
    for i, seed in enumerate(config.each_seed):
        for name in OPTIMIZERS:
            yield {"kind": "end", "seed": seed, "optimizer": name} | {
                "loss": number(found[f"loss_{name}"][i]),
                "length": number(found[f"length_{name}"][i]),
            }
        lines = found["mixed"][i, : len(PAIRS) * len(LINE)].reshape(len(PAIRS), len(LINE))
        for (a, b), line in zip(PAIRS, lines, strict=True):
            straight = (1 - LINE) * line[0] + LINE * line[-1]
            yield {"kind": "line", "seed": seed, "pair": f"{a}, {b}"} | {
                "barrier": number((line - straight).max()),
                "losses": [number(v) for v in line],
            }
        if i == 0:
            plane = [number(v) for v in found["mixed"][0, lines.size :]]
            yield {"kind": "plane", "seed": seed, "losses": plane}


def values(records: Records, key: str, norm: str) -> np.ndarray:
    """The logarithms of the ends' `key`, `[optimizers, seeds]`."""
    ends = records.where(kind="end", norm=norm)
    names = ends.values("optimizer")
    return np.log(np.stack([ends.by_seed(key, optimizer=name) for name in names]))


def apart(found: np.ndarray) -> np.ndarray:
    """How far each seed is from the median of the seeds, the mean over the optimizers."""
    return abs(found - np.median(found, axis=1, keepdims=True)).mean(0)


def verdict(records: Records) -> Iterator[Verdict]:
    """How alike the runs are, and what lies between them."""
    for key, word in (("loss", "final loss"), ("length", "length of the weights")):
        spread = {norm: apart(values(records, key, norm)) for norm in ("none", "batch")}
        claim = f"runs differ more in the {word} without a norm than with batch norm (of its log)"
        how = {"at_least": 0, "untuned": True, "source": IM}
        yield decide(f"spread.{key}", claim, spread["none"] - spread["batch"], **how)
    for norm, said in (("none", "no norm"), ("batch", "batch norm")):
        lengths = values(records, "length", norm)
        claim = f"{said}: optimizers differ more in the length of the weights than runs of one do"
        effect, source = lengths.std(axis=0) - apart(lengths), IM if norm == "batch" else None
        yield decide(f"length.{norm}", claim, effect, at_least=0, untuned=True, source=source)
        lines = records.where(kind="line", norm=norm)
        claim = f"{said}: a barrier lies between the ends of two optimizers (nats)"
        barrier = lines.by_seed("barrier", of=np.mean)
        yield decide(f"barrier.{norm}", claim, barrier, at_least=BARRIER, untuned=True)


def figure(records: Records) -> Figure:
    """The ends of all optimizers, and the plane through three of them for the first seed."""
    picture, grid = draw.canvas(2, 2)
    for (left, right), norm in zip(grid, ("none", "batch"), strict=True):
        here = records.where(kind="end", norm=norm)
        draw.scatter(left, here, "length", "loss", by="optimizer")
        draw.frame(left, log=True, xlabel="length of the weights", title=f"{norm}: a point a run")
        left.set(ylabel="loss of 1,000 images (nats)")
        left.legend(frameon=False, fontsize=8)
        (plane,) = records.where(kind="plane", norm=norm)
        losses = np.array([np.nan if v is None else v for v in plane["losses"]], float)
        side = len(PLANE)
        levels = np.log10(losses.reshape(side, side).T)
        shown = right.contourf(PLANE, PLANE, levels, levels=12, cmap="viridis")
        right.plot([0, 1, 0], [0, 0, 1], "w^", ms=7)
        for at, name in (((0, 0), "sgd"), ((1, 0), "momentum"), ((0, 1), "adam")):
            right.annotate(name, at, color="white", xytext=(5, 5), textcoords="offset points")
        picture.colorbar(shown, ax=right, label="log₁₀ of the loss")
        right.set(title=f"{norm}: the plane through three ends", xticks=[0, 1], yticks=[0, 1])
    return picture
