"""How is batch norm to stand in a recurrent net?

Claim: A recurrent net with batch norm passes the gradient back through many steps if the gain
starts with 0.1, and not if it starts with 1, where its units saturate. An LSTM with batch norm of
its own statistics at each time step is more accurate than without a norm, and than with statistics
that all steps share.

Source: Cooijmans et al. 2016, https://arxiv.org/abs/1603.09025, of which a draft and the authors'
code were read (small gains, statistics of each step, permuted MNIST 90.2 → 95.4%). How much the
gains matter depends on how the net is built, and the claim names it: identity recurrent weights and
one batch norm of the sum, as in that code. With random orthogonal weights the units mix, and
mean-field theory has a gradient that does not vanish at gain 1: there it is the other way (ours).

Protocol: Exact: h_t = tanh(BN(W·x_t + U·h_{t−1})) of 100 units over 49 steps, 64 examples, as at
initialization: U the identity, W a random row of length 1, noise of 0.1 in h_0 (where a pixel is
constant, nothing else would vary), a linear readout at the end; measured is the least length of the
gradient by any h_t over that by h_49. (Not by h_1: the first norms divide by the small noise, which
lengthens it, as a pilot showed.) Trained: MNIST averaged to 7×7 pixels, read pixel by pixel in one
random order; an LSTM of 32 units, 64 images in each of 400 steps of Adam at 0.003, whose rate falls
to zero as a cosine; gains start with 0.1. Tested on 2,000 images. One rate for all, which nobody
chose for any.

Command: normlab run recurrent
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
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
    learn,
    number,
)

LARGER = 10.0
"""The factor by which more of the gradient arrives with the small gain, at least; chosen before any
run, the source has a figure and no number."""

GAINS = Source("cooijmans2016", "the draft of February 2016", "vanishes at γ = 1, hardly at 0.1")
TABLE = Source("cooijmans2016", "the draft of February 2016", "permuted MNIST 90.2 → 95.4%")
STEPWISE = Source("cooijmans2016", "the draft of February 2016", "shared ones hurt, no number")

UNITS = 100
SMALL, ONE = 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Recurrent(Config):
    """The config.

    Attributes:
      gains: With which batch norm starts in the exact part.
      units: Of the LSTM.
      tests: Test images.
    """

    gains: tuple[float, ...] = (0.1, 0.3, 1.0)
    units: int = 32
    tests: int = 2000
    model: str = "lstm"
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 400
    evaluations: int = 4
    optimizer: str = "adam"
    lr: float = 0.003


QUICK = Recurrent()
SECONDS = 120
FULL = Recurrent(units=100, tests=10_000, steps=20_000)


def run(config: Recurrent) -> Iterator[Condition]:
    """The gradient through time at initialization; then training."""
    says = [
        {"kind": "gradient", "weights": weights, "gain": gain, "lengths": [1.0, 1.0]}
        for weights in ("identity", "orthogonal")
        for gain in config.gains
    ]
    yield Condition({"norm": "all"}, exact(gradients, config), says)
    for label, norm, kept in (
        ("none", "none", None),
        ("each step", "batch", None),
        ("shared", "batch", 1),
    ):
        options: dict[str, Any] = {"widths": (config.units,), "read": "pixels", "max_steps": kept}
        options |= {} if norm == "none" else {"gain": SMALL}
        prepare = functools.partial(permuted, tests=config.tests)
        measure = learn(config, nl.get(norm), prepare=prepare, **options)
        yield Condition({"norm": norm, "statistics": label}, measure)


def permuted(data: Dataset, tests: int) -> Dataset:
    """Images averaged to a quarter of their height and width, in one random order of the pixels."""
    found = []
    for v in (data.train_inputs, data.test_inputs[:tests]):
        n, height, width, _ = v.shape
        side = height // 7 if height >= 28 else 1
        v = v[:, : height // side * side, : width // side * side]
        v = v.reshape(n, height // side, side, width // side, side).mean((2, 4)) / 127.5 - 1
        order = np.random.default_rng(0).permutation(v[0].size)
        found.append(v.reshape(n, -1)[:, order].reshape(*v.shape, 1).astype(np.float32))
    train, test = found
    return data._replace(train_inputs=train, test_inputs=test, test_labels=data.test_labels[:tests])


def gradients(config: Recurrent) -> Iterator[Record]:
    """How long the gradient by the state of each time step is, at initialization."""
    data = permuted(dataset(config.dataset, config.data_dir), config.tests)
    for seed in config.each_seed:
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(data.train_labels), config.batch_size)
        x = data.train_inputs[chosen].reshape(config.batch_size, -1).T
        labels = data.train_labels[chosen]
        h0 = rng.normal(0, 0.1, (config.batch_size, UNITS))
        w = rng.standard_normal(UNITS)
        w /= np.linalg.norm(w)
        readout = rng.normal(0, UNITS**-0.5, (UNITS, data.classes))
        drawn = np.linalg.qr(rng.standard_normal((UNITS, UNITS)))[0]
        for weights, u in (("identity", np.eye(UNITS)), ("orthogonal", drawn)):
            for gain in config.gains:
                given = (jnp.asarray(v, jnp.float32) for v in (x, h0, w, u, readout))
                each = np.asarray(through_time(*given, jnp.asarray(labels), gain))
                yield {
                    "kind": "gradient",
                    "weights": weights,
                    "gain": gain,
                    "seed": seed,
                    "lengths": [number(v) for v in each],
                    "least": number(each.min() / each[-1]),
                }


@jax.jit
def through_time(
    x: Array, h0: Array, w: Array, u: Array, readout: Array, labels: Array, gain: float
) -> Array:
    """‖∂L/∂h_t‖ for each t of `x [T, N]`, for tanh(BN(W·x + U·h)) with the batch's statistics."""
    params = nl.Affine(jnp.full(w.shape, gain), jnp.zeros(w.shape))

    def loss(taps: Array) -> Array:
        def step(h: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
            x, tap = given
            a = x[:, None] * w + h @ u
            h = jnp.tanh(nl.batch_norm(a, params, train=True)[0]) + tap
            return h, None

        h, _ = lax.scan(step, h0, (x, taps))
        return optax.softmax_cross_entropy_with_integer_labels(h @ readout, labels).mean()

    grads = jax.grad(loss)(jnp.zeros((len(x), *h0.shape)))
    return jnp.sqrt(jnp.square(grads).sum((1, 2)))


def verdict(records: Records) -> Iterator[Verdict]:
    """Which gain lets the gradient through, and which statistics train better."""
    exactly = records.where(kind="gradient")
    for weights, more, less, how in (
        ("identity", SMALL, ONE, {"size": LARGER, "source": GAINS}),
        ("orthogonal", ONE, SMALL, {}),
    ):
        here = exactly.where(weights=weights)
        first, second = (np.maximum(here.by_seed("least", gain=g), 1e-30) for g in (more, less))
        claim = (
            f"{weights} weights, one norm of the sum: more of the gradient passes every step with "
            f"gain {more:g} than with {less:g} (factor)"
        )
        how = {"at_least": 1, "geometric": True, **how}
        yield decide(f"gain.{weights}", claim, first / second, **how)
    trained = records.where(kind="evaluation")
    none, each, shared = (
        trained.accuracy(statistics=name) for name in ("none", "each step", "shared")
    )
    points = {"at_least": 0, "unit": "points", "untuned": True}
    claim = "LSTM, permuted pixels: batch norm with statistics of each step is more accurate than "
    yield decide("lstm.none", claim + "no norm", each - none, source=TABLE, **points)
    yield decide(
        "lstm.shared", claim + "with shared ones", each - shared, source=STEPWISE, **points
    )


def figure(records: Records) -> Figure:
    """The gradient through time, by gain and weights; the error of the LSTMs."""
    picture, (left, middle, right) = draw.canvas(3, width=3.7)
    exactly = records.where(kind="gradient")
    for axes, weights in zip((left, middle), exactly.values("weights"), strict=True):
        rows = [
            {"seed": r["seed"], "gain": r["gain"], "step": t + 1, "length": v or float("nan")}
            for r in exactly.where(weights=weights)
            for t, v in enumerate(r["lengths"])
        ]
        draw.over_steps(axes, rows, "length", by=lambda r: f"gain {r['gain']:g}")
        draw.frame(axes, xlabel="time step t", ylabel="‖∂L/∂h_t‖", title=f"{weights} weights")
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    trained = records.where(kind="evaluation").trained()
    draw.over_steps(right, trained, draw.test_error, by="statistics", marker=True)
    draw.frame(right, title="LSTM, by the statistics", legend=True)
    picture.suptitle("Median and band of all seeds")
    return picture
