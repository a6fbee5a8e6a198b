"""Is the learning rate of weights before batch norm nothing but lr/‖w‖²?

Claim: Weights before batch norm, made c times as long, go through the same functions if their
learning rate is c²·lr and their weight decay λ/c². At one rate, longer weights turn more slowly:
a step turns them in proportion to 1/‖w‖².

Source: van Laarhoven 2017, https://arxiv.org/abs/1706.05350, whose abstract says that with
normalization weight decay changes the scale of the weights and so the effective learning rate.
The equations follow from the norm's invariance: they are checks.

Protocol: Real images through two batch-normalized layers of 32 ReLUs and a dense output layer, in
float64 with ε = 1e-30 for the theorem's 0, trained by gradient descent with weight decay in batches
of 60, at rate 0.1 and λ = 1e-3. The kernels before the norms start c times as long, with the rate
and decay of the claim (adjusted) or with the same as all others (unchanged). Measured: the largest
difference of the logits of 256 training images from those at c = 1, relative; and how far the first
step turns a unit's weights, as the tangent of the angle: a step at a right angle to the weights
has the tangent lr·‖∇‖/‖w‖, however large it is.

Command: normlab run scale_invariance
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..engine import Condition, Config, Record, Records, Verdict, dataset, decide, draw, exact
from ..engine.devices import relative
from ..training.trainer import minibatches, stretches

SAME = 1e-6
"""How far the logits may be from those at c = 1, relative, at any time."""

OTHER = 1e-2
"""How far they are at the end, at least, if rate and decay are left unchanged."""

SLOPE = 1e-6
"""How far the slope of the first step's turn by c, both in logarithms, may be from −2."""


@dataclasses.dataclass(frozen=True)
class ScaleInvariance(Config):
    """The config.

    Attributes:
      scales: The factors c beside 1.
      decay: λ.
      width: The units of each layer.
    """

    steps: int = 200
    evaluations: int = 10
    scales: tuple[float, ...] = (0.3, 3.0, 10.0)
    decay: float = 1e-3
    width: int = 32


QUICK = ScaleInvariance()
SECONDS = 22
FULL = ScaleInvariance(steps=2000, width=100)

Params = dict[str, Array]


def run(config: ScaleInvariance) -> Iterator[Condition]:
    """Rate and decay as the claim says, and unchanged."""
    for name in ("adjusted", "unchanged"):
        says = [{"scale": c} for c in (1.0, *config.scales)]
        yield Condition({"condition": name}, exact(trajectories, config, name == "adjusted"), says)


def trajectories(config: ScaleInvariance, adjusted: bool) -> Iterator[Record]:
    """How the net at each c learns, beside the one at c = 1."""
    data = dataset(config.dataset, config.data_dir)
    images = data.train_inputs.reshape(len(data.train_inputs), -1)
    scales = (1.0, *config.scales)
    rates = np.array([c**2 if adjusted else 1.0 for c in scales])
    first, *rest = stretches(config.steps, config.evaluations)
    with jax.enable_x64(True):
        for seed in config.each_seed:
            rng = np.random.default_rng(seed)
            begin = kernels(rng, images.shape[1], config.width, data.classes)
            each = [{k: v if k == "v" else c * v for k, v in begin.items()} for c in scales]
            params = {k: np.stack([one[k] for one in each]) for k in begin}
            chosen = minibatches(seed, len(images), config.batch_size, config.steps)
            for start, stop in [(0, 1), (1, first[1]), *rest]:
                x, y = images[chosen[start:stop]] / 255.0, data.train_labels[chosen[start:stop]]
                after, losses = advance(params, rates, x, y, config.lr, config.decay)
                z = np.asarray(outputs(after, images[:256] / 255.0))
                angles = instruments.angular_update(params["w0"], after["w0"], axes=1)
                for i, c in enumerate(scales):
                    yield {
                        "kind": "step",
                        "seed": seed,
                        "scale": c,
                        "step": stop,
                        "gap": relative(z[i], z[0]),
                        "loss": float(losses[:, i].mean()),
                        "turn": float(jnp.tan(angles[i]).mean()) if stop == 1 else None,
                    }
                params = after


def kernels(
    rng: np.random.Generator, inputs: int, width: int, classes: int
) -> dict[str, np.ndarray]:
    """Gaussian kernels: `w0`, `w1` before a norm, `v` behind the last."""
    sizes = {"w0": (inputs, width), "w1": (width, width), "v": (width, classes)}
    return {k: rng.normal(size=s) / np.sqrt(s[0]) for k, s in sizes.items()}


def logits(params: Params, x: Array) -> Array:
    """The net, with the statistics of the batch."""
    for name in ("w0", "w1"):
        x = jax.nn.relu(nl.batch_norm(x @ params[name], train=True, eps=1e-30)[0])
    return x @ params["v"]


outputs = jax.jit(jax.vmap(logits, (0, None)))
"""Of all nets on the same images."""


@jax.jit
def advance(
    params: Params, rates: Array, x: Array, y: Array, lr: float, decay: float
) -> tuple[Params, Array]:
    """A step of all nets for each batch of `x`, `[steps, N, ...]`; and the losses.

    Before a norm the learning rate is `rates`·lr and the weight decay λ/`rates`.
    """

    def loss(params: Params, x: Array, y: Array) -> Array:
        z = logits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    def one(params: Params, rate: Array, x: Array, y: Array) -> tuple[Params, Array]:
        value, grads = jax.value_and_grad(loss)(params, x, y)
        new = {}
        for k, v in params.items():
            scale = 1.0 if k == "v" else rate
            new[k] = v - lr * scale * (grads[k] + decay / scale * v)
        return new, value

    def step(params: Params, batch: Any) -> tuple[Params, Array]:
        return jax.vmap(one, (0, 0, None, None))(params, rates, *batch)

    return lax.scan(step, params, (x, y))


def slope(records: Records) -> float:
    """The slope of the logarithm of the first step's turn by that of c."""
    first = records.where(lambda r: r["turn"] is not None)
    c, turns = (np.log([r[key] for r in first]) for key in ("scale", "turn"))
    return round(float(np.polyfit(c, turns, 1)[0]), 9)


def verdict(records: Records) -> Iterator[Verdict]:
    """The trajectory in function space, and how far a step turns the weights."""
    adjusted, unchanged = (records.where(condition=c) for c in ("adjusted", "unchanged"))
    last = max(records.values("step"))
    claim = f"(c·w, c²·lr, λ/c²): the same function through {last} steps (relative difference)"
    gaps = adjusted.by_seed("gap", of=max)
    yield decide("adjusted", claim, gaps, at_most=SAME, geometric=True, exact=True)
    ends = unchanged.where(lambda r: r["scale"] != 1, step=last).by_seed("gap", of=min)
    claim = f"(c·w, lr, λ): another function after {last} steps (relative difference)"
    yield decide("unchanged", claim, ends, at_least=OTHER, geometric=True)
    claim = "(c·w, lr, λ): a step turns the weights 1/c² as far (slope of the logarithms)"
    found = unchanged.each_seed(slope)
    yield decide(
        "unchanged.turn", claim, found, at_least=-2 - SLOPE, at_most=-2 + SLOPE, exact=True
    )


def figure(records: Records) -> Figure:
    """The loss and the distance from c = 1 over the steps, and the turn against c."""
    picture, (left, middle, right) = draw.canvas(3, width=4)
    scales = sorted(records.values("scale"))
    # The lines of all adjusted nets are one.
    lines = {"adjusted": ("-", {1.0, scales[-1]}), "unchanged": ("--", {*scales} - {1.0})}
    for name, (ls, shown) in lines.items():
        mine = records.where(condition=name)
        for c, style in draw.styles(scales).items():
            if c in shown:
                look = {"ls": ls, "color": style["color"], "label": f"c = {c:g}, {name}"}
                here = mine.where(lambda r: r["step"] > 1, scale=c)
                draw.over_steps(left, here, "loss", by="scale", **look)
                apart = here.where(lambda r: r["gap"] > 0)
                draw.over_steps(middle, apart, "gap", by="scale", **look)
        draw.against(right, mine, "scale", "turn", by="condition", ls=ls)
    left.set(ylabel="training loss (nats)", title="the loss")
    draw.frame(middle, threshold=SAME, yscale="log", title="from c = 1")
    middle.set_ylabel("difference of the logits, relative")
    draw.frame(right, xscale="log", yscale="log", title="the effective rate", legend=True)
    right.set(xlabel="c", ylabel="tangent of the first step's angle")
    return draw.finish(picture)
