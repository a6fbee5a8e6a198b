"""What happens if gradient descent ignores that the mean depends on the bias it shifts?

Claim: If a step treats the mean as a constant, the bias before it grows without bound while the
output and the loss stay as they are. If the gradient passes through the mean, the bias rests.

Source: Ioffe & Szegedy 2015, section 2, https://arxiv.org/abs/1502.03167. That the growth is
linear, and that the bias rests otherwise, is ours, by algebra.

Protocol: One unit, x = u + b over 60 random examples u, normalized by the library's batch norm;
the loss is the squared distance of its output from random targets. Plain gradient descent on b
alone, at rate 0.1, in float64, with the gradient through the mean and with `stop_gradient` around
it. Exact: the step is the same each time, so that b grows tenfold between a tenth of the steps and
the last.

Command: normlab run ignored_gradient
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Record, Records, Source, Verdict, decide, draw, exact

GROWTH = (9.9, 10.1)
"""|b| at the end over |b| after a tenth of the steps, if the gradient of the mean is ignored."""

STILL = 1e-6
"""How far the loss moves at most; and the bias, if the gradient is whole."""

SOURCE = Source("ioffe2015", "section 2", "b grows indefinitely, the loss stays")


@dataclasses.dataclass(frozen=True)
class IgnoredGradient(Config):
    """The config: the data are drawn, a unit for each seed."""

    dataset: str = ""
    evaluations: int = 100


QUICK = IgnoredGradient()
SECONDS = 2
FULL = IgnoredGradient(steps=10_000)


def run(config: IgnoredGradient) -> Iterator[Condition]:
    """The gradient of the mean ignored, and the whole gradient."""
    for name in ("ignored", "whole"):
        yield Condition({"condition": name}, exact(descend, config, ignored=name == "ignored"))


def descend(config: IgnoredGradient, *, ignored: bool) -> Iterator[Record]:
    """The bias and the loss of each seed's unit over the steps."""
    draws = [np.random.default_rng(seed) for seed in config.each_seed]
    data = np.stack([rng.normal(size=(2, config.batch_size, 1)) for rng in draws], axis=1)
    with jax.enable_x64(True):
        each = jax.vmap(lambda u, t: path(u, t, config.lr, config.steps, ignored))
        biases, losses = map(np.asarray, each(*jnp.asarray(data)))  # [seeds, steps + 1]
    for i, seed in enumerate(config.each_seed):
        for step in range(0, config.steps + 1, config.steps // config.evaluations):
            found = {"b": float(biases[i, step]), "loss": float(losses[i, step])}
            yield {"kind": "step", "seed": seed, "step": step, **found}


def path(u: Array, t: Array, lr: float, steps: int, ignored: bool) -> tuple[Array, Array]:
    """The bias and the loss before each step and after the last, `[steps + 1]`."""

    def loss(b: Array) -> Array:
        x = u + b
        parts, _ = nl.batch_parts(x, None, None, train=True)
        if ignored:
            parts = parts._replace(mu=lax.stop_gradient(parts.mu))
        return jnp.square(nl.affine(parts, x) - t).mean() / 2

    def step(b: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        value, gradient = jax.value_and_grad(loss)(b)
        return b - lr * gradient, (b, value)

    return lax.scan(step, jnp.zeros(()), length=steps + 1)[1]


def verdict(records: Records) -> Iterator[Verdict]:
    """The growth, the loss, and the same with the whole gradient."""
    last = max(records.values("step"))
    early = min(step for step in records.values("step") if step >= max(1, last // 10))
    ignored, whole = (records.where(condition=name) for name in ("ignored", "whole"))
    growth = np.abs(ignored.by_seed("b", step=last) / ignored.by_seed("b", step=early)).round(9)
    start = "gradient of the mean ignored: "
    claim = start + f"the bias grows linearly (|b| after {last} steps over {early})"
    low, high = GROWTH
    how = {"exact": True, "source": SOURCE}
    yield decide("ignored.bias", claim, growth, at_least=low, at_most=high, **how)
    claim = start + "the loss stays as it is (its range)"
    yield decide("ignored.loss", claim, ignored.by_seed("loss", of=np.ptp), at_most=STILL, **how)
    rests = np.abs(whole.by_seed("b", step=last))
    claim = "whole gradient: the bias rests (|b|)"
    yield decide("whole.bias", claim, rests, at_most=STILL, exact=True)


def figure(records: Records) -> Figure:
    """|b| and the change of the loss over the steps."""
    picture, (left, right) = draw.canvas(2)
    draw.over_steps(left, records, lambda r: abs(r["b"]), by="condition")
    left.set(ylabel="|b| (units of the input)", title="the bias")
    mine = records.where(condition="ignored")
    first = {r["seed"]: r["loss"] for r in mine.where(step=0)}
    draw.over_steps(right, mine, lambda r: r["loss"] - first[r["seed"]], by="condition")
    right.set(ylabel="loss minus its start", ylim=(-1e-6, 1e-6))
    right.set_title("the loss, gradient of the mean ignored")
    title = "The gradient through the mean, ignored or whole: median seed and band"
    return draw.finish(picture, title)
