"""Does the gradient explode with depth in a net with batch norm, at the rate that theory says?

Claim: At initialization the squared norm of the gradient grows by a factor for each layer that it
passes on the way down: π/(π − 1) = 1.467 behind batch norm and ReLU for large batches, and
(B − 2)/(B − 3) behind batch norm alone at batch B. Layer norm hardly makes it grow.

Source: Yang et al. 2019, https://arxiv.org/abs/1902.08129, for batch norm: its abstract says that
the gradient explodes, whatever the activation; both rates are quoted from others who derive them.
The bound on layer norm is ours.

Protocol: A dense net of 40 layers of 400 units with random Gaussian kernels (variance 2/400), the
norm before the activation, ε = 1e-12, float32. A random batch goes in, a random vector is the
gradient at the top. The growth is the mean over the inner layers (5 to 35) of the logarithm of
‖∇‖² at a layer's input over that at its output, exponentiated. Means over the seeds are geometric.

Command: normlab run mean_field
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Record, Records, Source, Verdict, decide, draw, exact

NEAR = 0.05
"""How far the measured growth of a layer may be from the theory's, which is of infinite width."""

CALM = 1.05
"""The growth of a layer with layer norm, at most."""

RELU = np.pi / (np.pi - 1)
"""The theory's growth with batch norm and ReLU, as the batch grows."""

SMALL = 8
"""The batch at which batch norm alone is judged: 6/5. At 128 it is 1.008."""

NUMBERS = {"relu": "π/(π − 1) = 1.467", "linear": "(B − 2)/(B − 3)"}


@dataclasses.dataclass(frozen=True)
class MeanField(Config):
    """The config.

    Attributes:
      width: The units of each layer.
      depth: How many layers.
      norms: Those that stand before the ReLUs, at `batch_size`.
      batches: The batch sizes of batch norm, with and without ReLUs.
    """

    dataset: str = ""
    batch_size: int = 128
    width: int = 400
    depth: int = 40
    norms: tuple[str, ...] = ("none", "layer", "rms")
    batches: tuple[int, ...] = (5, 8, 32, 128)


QUICK = MeanField()
SECONDS = 24
FULL = MeanField(width=2000, depth=100)


def run(config: MeanField) -> Iterator[Condition]:
    """Each norm with ReLUs, and batch norm at each batch size."""
    for name in config.norms:
        labels = {"norm": name, "activation": "relu", "batch": config.batch_size}
        yield Condition(labels, exact(growth, config, **labels))
    for activation in ("relu", "linear"):
        for batch in config.batches:
            labels = {"norm": "batch", "activation": activation, "batch": batch}
            yield Condition(labels, exact(growth, config, **labels))


def growth(config: MeanField, *, norm: str, activation: str, batch: int) -> Iterator[Record]:
    """The squared norm of the gradient at each layer, and its mean growth."""
    options: dict[str, Any] = {"eps": 1e-12} if "a" in nl.row(norm).needs else {}
    layer = nl.get(norm, **options)
    f = jax.nn.relu if activation == "relu" else lambda z: z

    @jax.jit
    def gradients(x: Array, kernels: Array, top: Array) -> Array:
        def loss(nudges: Array) -> Array:
            def step(h: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
                w, nudge = at
                h = h + nudge  # zero, to differentiate by what enters the layer
                site = nl.Site(h @ w, h, w)
                params, state = layer.init(site)
                return f(layer.apply(params, state, site, train=True)[0]), None

            return (top * lax.scan(step, x, (kernels, nudges))[0]).sum()

        found = jax.grad(loss)(jnp.zeros((len(kernels), *x.shape)))
        return jnp.square(found).sum((1, 2))

    for seed in config.each_seed:
        rng = np.random.default_rng(seed)
        n, scale = config.width, np.sqrt(2 / config.width)
        shapes = ((batch, n), (config.depth, n, n), (batch, n))
        x, kernels, top = (rng.standard_normal(shape, np.float32) for shape in shapes)
        squares = np.asarray(gradients(x, np.float32(scale) * kernels, top), np.float64)
        skip = config.depth // 8
        inner = np.log(squares)[skip : config.depth - skip + 1]
        rate = float(np.exp(-np.diff(inner).mean()))
        for depth, square in enumerate(squares):
            yield {"kind": "layer", "seed": seed, "depth": depth, "square": float(square)}
        yield {"kind": "growth", "seed": seed, "growth": rate}


def theory(activation: str, batch: int) -> float:
    """The growth that the theory says of a layer with batch norm (for ReLU, of a large batch)."""
    return RELU if activation == "relu" else (batch - 2) / (batch - 3)


def verdict(records: Records) -> Iterator[Verdict]:
    """Batch norm with and without ReLU against the theory, and layer norm."""
    grown = records.where(kind="growth")
    large = max(grown.values("batch"))
    for activation, batch in (("relu", large), ("linear", SMALL)):
        expected = theory(activation, batch)
        rates = grown.by_seed("growth", norm="batch", activation=activation, batch=batch)
        claim = f"batch norm, {activation}, batch {batch}: a layer grows the squared gradient by "
        claim += f"{expected:.3f} (measured minus that)"
        source = Source("yang2019", "", NUMBERS[activation], "second-hand")
        off = rates - expected
        yield decide(f"batch.{activation}", claim, off, at_least=-NEAR, at_most=NEAR, source=source)
    rates = grown.by_seed("growth", norm="layer")
    claim = "layer norm, relu: a layer grows the squared gradient by less than 5% (factor)"
    yield decide("layer.relu", claim, rates, at_most=CALM, geometric=True)


def figure(records: Records) -> Figure:
    """The gradient at each depth by norm, and its growth against the batch."""
    picture, (left, right) = draw.canvas(2)
    large = max(records.values("batch"))
    mine = records.where(kind="layer", activation="relu", batch=large)
    top = {(r["norm"], r["seed"]): r["square"] for r in mine}  # the last is the deepest
    share = Records(r | {"share": r["square"] / top[r["norm"], r["seed"]]} for r in mine)
    draw.over_steps(left, share, "share", x="depth")
    draw.frame(left, xlabel="layer", yscale="log", title=f"ReLU, batch {large}", legend=True)
    left.set_ylabel("‖∇‖² at its input, over the last layer's")
    grown = records.where(kind="growth", norm="batch")
    draw.against(right, grown, "batch", "growth", by="activation", ls="")
    batches = np.geomspace(min(grown.values("batch")), large, 50)
    for activation, style in draw.styles(["relu", "linear"]).items():
        expected = [theory(activation, batch) for batch in batches]
        right.plot(batches, expected, color=style["color"], lw=1, ls="--")
    right.set_xscale("log", base=2)
    draw.frame(right, xlabel="batch size", ylabel="growth of ‖∇‖² per layer", legend=True)
    right.set_title("batch norm; dashed: theory")
    return picture
