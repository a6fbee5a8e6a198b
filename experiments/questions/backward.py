"""Is the paper's hand-derived backward pass of batch norm right, and what does it say of the scale?

Claim: The backward pass that the paper derives equals automatic differentiation and central
differences. For c > 0 BN((cW)u) = BN(Wu), and the gradient by cW is 1/c of the gradient by W: the
larger the weights, the smaller their gradients.

Source: Ioffe & Szegedy 2015, sections 3 and 3.3, https://arxiv.org/abs/1502.03167. The letter for
the factor is a there. That the gradient by W is orthogonal to W follows from the last two by
Euler's theorem, and is not asked again.

Protocol: Random inputs and weights of 8 examples, 5 features and 3 channels in float64, the sum of
the output times a random cotangent for a loss. The six equations of the paper in NumPy beside
`jax.grad` of the library's batch norm and central differences of it. The scale c runs from 0.01 to
100, with ε = 1e-30 for the theorem's 0, and with 1e-5 to see what an ε does to it.

Command: normlab run backward
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Record, Records, Source, Verdict, decide, draw, exact
from ..engine.devices import relative

RIGHT = 1e-8
"""The error, relative to the largest value, of every statement, at most: between the rounding of
float64 and that of differences."""

STEP = 1e-5
"""Of the central differences."""


@dataclasses.dataclass(frozen=True)
class Backward(Config):
    """The config.

    Attributes:
      channels: How many channels.
      inputs: How many features each has as its input.
      scales: The factors c.
      epsilons: ε of the statements about the scale; the verdicts are of the smallest.
    """

    dataset: str = ""
    batch_size: int = 8
    channels: int = 3
    inputs: int = 5
    scales: tuple[float, ...] = (0.01, 0.1, 10.0, 100.0)
    epsilons: tuple[float, ...] = (1e-30, 1e-5)


QUICK = Backward()
SECONDS = 1
FULL = Backward(batch_size=60, channels=10, inputs=20)


def run(config: Backward) -> Iterator[Condition]:
    """The derivatives, and the scale of the weights."""
    says = [{"statement": name} for name in ("autodiff", "differences")]
    yield Condition({"measured": "derivatives"}, exact(derivatives, config), says)
    for eps in config.epsilons:
        says = [{"statement": name} for name in ("output", "gradient")]
        yield Condition({"measured": "scale", "eps": eps}, exact(scaled, config, eps), says)


def by_hand(x: np.ndarray, dy: np.ndarray, g: np.ndarray, eps: float) -> tuple[np.ndarray, ...]:
    """The paper's gradients by x, γ and β, step by step; `x` and `dy` are `[m, C]`."""
    m, mu = len(x), x.mean(0)
    var = ((x - mu) ** 2).mean(0)
    x_hat = (x - mu) / np.sqrt(var + eps)
    dx_hat = dy * g
    dvar = (dx_hat * (x - mu)).sum(0) * -0.5 * (var + eps) ** -1.5
    dmu = -dx_hat.sum(0) / np.sqrt(var + eps) + dvar * (-2 * (x - mu)).mean(0)
    dx = dx_hat / np.sqrt(var + eps) + dvar * 2 * (x - mu) / m + dmu / m
    return dx, (dy * x_hat).sum(0), dy.sum(0)


def central(f: Callable[..., float], values: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """The gradient of `f(*values)` by central differences, one entry after the other."""
    found = []
    for i, value in enumerate(values):
        slope = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            up, down = value.copy(), value.copy()
            up[place] += STEP
            down[place] -= STEP
            high, low = (f(*values[:i], moved, *values[i + 1 :]) for moved in (up, down))
            slope[place] = (high - low) / (2 * STEP)
        found.append(slope)
    return tuple(found)


def derivatives(config: Backward) -> Iterator[Record]:
    """How far the hand-derived gradients are from those of JAX and from differences."""
    shape = (config.batch_size, config.channels)

    @jax.jit
    def loss(x: Array, g: Array, b: Array, dy: Array) -> Array:
        return (dy * nl.batch_norm(x, nl.Affine(g, b), train=True)[0]).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    with jax.enable_x64(True):
        for seed in config.each_seed:
            rng = np.random.default_rng(seed)
            x, dy, g, b = (rng.normal(size=s) for s in (shape, shape, shape[1:], shape[1:]))
            hand = by_hand(x, dy, g, 1e-5)
            others = {
                "autodiff": gradient(x, g, b, dy),
                "differences": central(lambda *v, dy=dy: float(loss(*v, dy)), (x, g, b)),
            }
            for name, other in others.items():
                error = relative(hand, other)
                yield {"kind": "error", "seed": seed, "statement": name, "error": error}


def scaled(config: Backward, eps: float) -> Iterator[Record]:
    """What a factor of the weights does to the output and to the gradient."""
    n, c, k = config.batch_size, config.channels, config.inputs

    def loss(w: Array, u: Array, dh: Array) -> tuple[Array, Array]:
        h, _ = nl.batch_norm(u @ w, train=True, eps=eps)
        return (dh * h).sum(), h

    run = jax.jit(jax.grad(loss, has_aux=True))
    with jax.enable_x64(True):
        for seed in config.each_seed:
            rng = np.random.default_rng(seed)
            w, u, dh = (rng.normal(size=s) for s in ((k, c), (n, k), (n, c)))
            gradient, h = map(np.asarray, run(w, u, dh))
            base = {"kind": "error", "seed": seed}
            for scale in config.scales:
                other, h_other = map(np.asarray, run(scale * w, u, dh))
                errors = {"output": relative(h_other, h)}
                errors["gradient"] = relative(scale * other, gradient)
                for name, error in errors.items():
                    yield {**base, "statement": name, "scale": scale, "error": error}


STATEMENTS = {
    "autodiff": "the hand-derived backward pass equals automatic differentiation",
    "differences": "the hand-derived backward pass equals central differences",
    "output": "BN((cW)u) = BN(Wu)",
    "gradient": "the gradient by cW is 1/c of that by W",
}

SECTIONS = {"autodiff": "section 3", "differences": "section 3"}
"""Of the paper, where the statement is not of section 3.3."""


def worst(records: Records, statement: str) -> np.ndarray:
    """The error of each seed with the smallest ε, at the worst scale."""
    smallest = min(records.values("eps"))
    mine = records.where(lambda r: r.get("eps", smallest) == smallest, statement=statement)
    return mine.by_seed("error", of=max)


def verdict(records: Records) -> Iterator[Verdict]:
    """Each statement, the worst scale of each seed."""
    for name, words in STATEMENTS.items():
        source = Source("ioffe2015", SECTIONS.get(name, "section 3.3"))
        how = {"at_most": RIGHT, "geometric": True, "exact": True, "source": source}
        yield decide(name, f"{words} (relative error)", worst(records, name), **how)


def figure(records: Records) -> Figure:
    """The error of each statement; and what ε makes of the invariance."""
    picture, (left, right) = draw.canvas(2)
    smallest, largest = (f(records.values("eps")) for f in (min, max))
    errors = {name: np.maximum(worst(records, name), 1e-17) for name in STATEMENTS}
    draw.columns(left, errors, mean=False, color="black", marker="o")
    title = f"ε = {smallest:g}, dotted: threshold"
    draw.frame(left, threshold=RIGHT, yscale="log", ylabel="relative error", title=title)
    output = records.where(statement="output")
    draw.scatter(right, output, "scale", "error", by=lambda r: f"ε = {r['eps']:g}", alpha=0.6)
    draw.frame(right, threshold=RIGHT, xscale="log", yscale="log", legend=True)
    right.set(xlabel="factor c of the weights", ylabel="change of the output, relative")
    right.set_title(f"what ε = {largest:g} does to it")
    for axes in (left, right):
        axes.minorticks_off()
    return picture
