"""How far does a net of random weights get if only γ and β of batch norm are trained?

Claim: With all kernels frozen at random, training γ and β alone makes a net far more accurate than
training as many randomly chosen weights, and than training the output layer; and so in a deep net.

Source: Frankle et al. 2020, https://arxiv.org/abs/2003.00152: 82% on CIFAR-10 with a ResNet of 866
layers, "far more" than as many weights elsewhere. Five points are ours, from one seed; the output
layer as a baseline is ours.

Protocol: MNIST at 14×14 pixels, 4 and 12 layers of 64 ReLUs with batch norm before each, batches of
60, 600 steps of Adam with a rate that falls linearly to 0, each net at its best of four or more
rates. Trained are γ and β alone; as many weights alone, 128 of each hidden layer's kernel, drawn
anew for each seed; the output layer alone; or everything. What is not trained stays as it was
drawn, and γ at 1 and β at 0.

Command: normlab run affine_alone
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Config,
    Records,
    Schedule,
    Source,
    Verdict,
    decide,
    draw,
    pooled,
    tuned,
)

FAR = 5.0
"""Points by which γ and β are better than as many weights, if "far"."""

FRANKLE = Source("frankle2020", "", "82% on CIFAR-10 with γ, β alone", "abstract")


@dataclasses.dataclass(frozen=True)
class AffineAlone(Config):
    """The config.

    Attributes:
      depths: Hidden layers.
      width: Units of each.
      rates: Of which each net has its best.
      pool: Pixels along each axis whose mean makes one.
    """

    depths: tuple[int, ...] = (4, 12)
    width: int = 64
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    pool: int = 2
    optimizer: str = "adam"
    schedule: Schedule = "linear"
    steps: int = 600
    evaluations: int = 2


QUICK = AffineAlone()
SECONDS = 170
FULL = AffineAlone(pool=1, depths=(4, 8, 16, 32), width=256, steps=20_000, evaluations=20)


def run(config: AffineAlone) -> Iterator[Condition]:
    """Each depth, and what of it is trained."""
    for depth in config.depths:
        for trained, only in CHOICES.items():
            options: dict[str, Any] = {"widths": (config.width,) * depth, "activation": nn.relu}
            options["prepare"] = lambda data: pooled(data, config.pool)
            measure = tuned(config, nl.get("batch"), config.rates, only=only, **options)
            yield Condition({"trained": trained, "depth": depth}, measure)


def affine(params: Any) -> Any:
    """γ and β."""
    return by_place(params, norm=1, kernel=lambda w: 0, output=0)


def weights(params: Any) -> Any:
    """As many weights of each hidden layer, chosen by what the kernel is."""

    def chosen(w: Array) -> Array:
        seed = lax.bitcast_convert_type(w.sum(), jnp.uint32)
        drawn = jax.random.permutation(jax.random.fold_in(jax.random.key(0), seed), w.size)
        return (drawn < 2 * w.shape[-1]).reshape(w.shape).astype(w.dtype)

    return by_place(params, norm=0, kernel=chosen, output=0)


def output(params: Any) -> Any:
    """The output layer."""
    return by_place(params, norm=0, kernel=lambda w: 0, output=1)


def everything(params: Any) -> Any:
    """All kernels, γ, β, and the output layer."""
    return by_place(params, norm=1, kernel=lambda w: 1, output=1)


def by_place(params: Any, *, norm: int, kernel: Callable[[Array], Any], output: int) -> Any:
    """Masks for γ and β, for the kernels before a norm, and for the output layer."""
    found = {}
    for name, layer in params.items():
        if "norm" not in layer:
            found[name] = jax.tree.map(lambda v: jnp.full_like(v, output), layer)
            continue
        found[name] = {
            "kernel": jnp.broadcast_to(kernel(layer["kernel"]), layer["kernel"].shape),
            "norm": jax.tree.map(lambda v: jnp.full_like(v, norm), layer["norm"]),
        }
        found[name]["kernel"] = found[name]["kernel"].astype(layer["kernel"].dtype)
    return found


CHOICES: dict[str, Callable[[Any], Any]] = {
    "γ, β": affine,
    "as many weights": weights,
    "output layer": output,
    "everything": everything,
}
"""What is trained, and the masks that say so."""


def verdict(records: Records) -> Iterator[Verdict]:
    """γ and β against the others at each depth."""
    for depth in sorted(records.values("depth")):
        mine, weights, output = (
            records.accuracy(depth=depth, trained=t) for t in tuple(CHOICES)[:3]
        )
        how: dict[str, Any] = {"at_least": 0, "unit": "points"}
        claim = f"{depth} layers: γ and β alone are better than as many random weights"
        found = mine - weights
        yield decide(f"depth-{depth}.weights", claim, found, size=FAR, **how, source=FRANKLE)
        claim = f"{depth} layers: γ and β alone are better than the output layer alone"
        yield decide(f"depth-{depth}.output", claim, mine - output, **how)


def figure(records: Records) -> Figure:
    """The accuracy at the end by what is trained, a panel for each depth."""
    picture, panels = draw.panels(records.where(kind="evaluation"), "depth", width=4)
    for axes, depth, here in panels:
        groups = {t: here.accuracy(trained=t) for t in here.values("trained")}
        draw.columns(axes, groups)
        draw.frame(axes, ylim=(0, 100), title=f"{depth} hidden layers, trained alone:")
    panels[0][0].set_ylabel("test accuracy (%)")
    return picture
