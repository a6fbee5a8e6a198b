"""By how much does batch norm shrink the gradient of the layer before it?

Claim: The gradient by a batch-normalized pre-activation y loses its mean and its projection on the
normalized output, and is scaled by γ/σ: ‖∇y‖² ≤ γ²/σ² · (‖∇z‖² − ⟨1, ∇z⟩²/m − ⟨∇z, ŷ⟩²/m), where
z = γŷ + β and ∇z is the gradient that arrives there. For one layer it is an equality.

Source: Santurkar et al. 2018, theorem 4.1, https://arxiv.org/abs/1805.11604, which we know from
summaries. The theorem writes the gradient of a net without batch norm for ∇z, which is the same
where the layers above get the same input z. Nets with the same weights do not give them that: the
last verdict takes the theorem at its word, with the gradient by y of the net without batch norm on
the right. Then it is no bound.

Protocol: Batches of real images through random kernels: a batch-normalized layer of 32 ReLUs with
random γ and β, a second layer of 32 ReLUs, ten classes, cross-entropy; float64 and ε = 1e-30 for
the theorem's 0. Both sides for each unit. In the last verdict γ = 1 and β = 0.

Command: normlab run gradient_bound
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
)

EQUAL = 1e-8
"""How far the two sides are apart at most, relative."""

SOURCE = Source("santurkar2018", "theorem 4.1", "", "second-hand")


@dataclasses.dataclass(frozen=True)
class GradientBound(Config):
    """The config.

    Attributes:
      width: The units of each layer.
    """

    batch_size: int = 128
    width: int = 32


QUICK = GradientBound()
SECONDS = 3
FULL = GradientBound(width=256)


def run(config: GradientBound) -> Iterator[Condition]:
    """The theorem at one layer, and read for two nets."""
    for name in ("one layer", "two nets"):
        yield Condition({"condition": name}, exact(sides, config, two=name == "two nets"))


def sides(config: GradientBound, *, two: bool) -> Iterator[Record]:
    """Both sides of the inequality, `left` and `right`, and ‖∇z‖², of every unit."""

    @jax.jit
    def measure(x: Array, labels: Array, w: Sequence[Array], g: Array, b: Array) -> Sequence[Array]:
        y = x @ w[0]
        parts, _ = nl.batch_parts(y, None, None, train=True, eps=1e-30)
        y_hat = nl.affine(parts, y)

        def above(z: Array) -> Array:
            logits = nn(z, w)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        left = squares(jax.grad(lambda y: above(norm(y, g, b)))(y))
        arriving = jax.grad(above)(y if two else g * y_hat + b)
        factor = jnp.square(g / parts.sigma).ravel()
        return left, factor * reduced(arriving, y_hat), factor * squares(arriving)

    with jax.enable_x64(True):
        for seed in config.each_seed:
            found = measure(*drawn(config, seed, affine=not two))
            for unit, (left, right, whole) in enumerate(zip(*map(np.asarray, found), strict=True)):
                values = {"left": float(left), "right": float(right), "whole": float(whole)}
                yield {"kind": "unit", "seed": seed, "unit": unit, **values}


def nn(z: Array, w: Sequence[Array]) -> Array:
    """The layers above the first pre-activation."""
    return jax.nn.relu(jax.nn.relu(z) @ w[1]) @ w[2]


def norm(y: Array, g: Array, b: Array) -> Array:
    """Batch norm with the theorem's ε, which is nothing."""
    return nl.batch_norm(y, nl.Affine(g, b), train=True, eps=1e-30)[0]


def squares(v: Array) -> Array:
    """‖v‖² of each unit."""
    return jnp.square(v).sum(0)


def reduced(v: Array, y_hat: Array) -> Array:
    """‖v‖² − ⟨1, v⟩²/m − ⟨v, ŷ⟩²/m of each unit."""
    return squares(v) - (jnp.square(v.sum(0)) + jnp.square((v * y_hat).sum(0))) / len(v)


def drawn(config: GradientBound, seed: int, *, affine: bool) -> tuple:
    """A batch of images with labels, kernels, and γ and β, which are 1 and 0 unless `affine`."""
    data, rng = dataset(config.dataset, config.data_dir), np.random.default_rng(seed)
    chosen = rng.choice(len(data.train_inputs), config.batch_size, replace=False)
    x = data.train_inputs[chosen].reshape(config.batch_size, -1) / 255
    sizes = [(x.shape[1], config.width), (config.width, config.width), (config.width, 10)]
    w = [rng.normal(size=size) * np.sqrt(2 / size[0]) for size in sizes]
    g, b = rng.normal(1, 0.5, config.width), rng.normal(0, 0.5, config.width)
    if not affine:
        g, b = np.ones_like(g), np.zeros_like(b)
    return x, data.train_labels[chosen], w, g, b


def units(records: Records) -> np.ndarray:
    """Both sides of every unit, `[2, units]`."""
    return np.array([[r[side] for r in records] for side in ("left", "right")])


def verdict(records: Records) -> Iterator[Verdict]:
    """The equality at one layer, and the other reading."""
    one, two = (records.where(condition=name) for name in ("one layer", "two nets"))

    def apart(records: Records) -> float:
        left, right = units(records)
        return np.abs(left - right).max() / right.max()

    def beyond(records: Records) -> float:
        left, right = units(records)
        return (left - right).max() / right.max()

    claim = "one layer: batch norm's gradient bound is an equality (relative difference)"
    found = one.each_seed(apart)
    yield decide("one-layer", claim, found, at_most=EQUAL, exact=True, source=SOURCE)
    claim = "nets of the same weights with and without batch norm do not obey it (the most that a "
    claim += "unit is beyond the bound, over the largest bound)"
    yield decide("two-nets", claim, two.each_seed(beyond), at_least=0)


def figure(records: Records) -> Figure:
    """Both sides of the inequality, each unit a point."""
    picture, grid = draw.canvas(2)
    theirs = ("where the gradient arrives", "of the net without batch norm")
    for axes, name, whose in zip(grid, ("one layer", "two nets"), theirs, strict=True):
        mine = records.where(condition=name)
        some = sorted(mine.values("seed"))[:3]
        few = mine.where(lambda r, some=some: r["seed"] in some and r["unit"] < 20)
        draw.scatter(axes, few, "right", "left", by="seed", alpha=0.5)
        ends = [f(min(r["left"], r["right"]) for r in mine) for f in (min, max)]
        axes.plot(ends, ends, color="grey", lw=1, ls=":")
        axes.set(xscale="log", yscale="log", title=f"∇z {whose}", ylabel="‖∇y‖² with batch norm")
        axes.set_xlabel("γ²/σ² · (‖∇z‖² − ⟨1, ∇z⟩²/m − ⟨∇z, ŷ⟩²/m)")
        axes.minorticks_off()
    picture.suptitle("Both sides of theorem 4.1 for 20 units of each of three seeds")
    return picture
