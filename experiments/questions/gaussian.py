"""Are the inputs of the activations Gaussian, and does batch norm make them so?

Claim: What enters the activations is nearly Gaussian, more so than what leaves them, and
most of all with batch norm.

Source: Ioffe & Szegedy 2015, section 3.2, https://arxiv.org/abs/1502.03167, call W·u + b "more
Gaussian" than u (after Hyvärinen & Oja 2000). That batch norm makes it Gaussian is said often: it
cannot, since a shift and a scale keep the shape of a distribution.

Protocol: MNIST, three hidden layers of 100 sigmoids or ReLUs, batches of 60, 1,000 steps of plain
SGD at rate 0.3. Skewness and excess kurtosis of each unit of the last hidden layer over 256
training images, both 0 for a Gaussian; the median unit's absolute value counts. Over so few images
those of a Gaussian are about 0.15 and 0.3 by chance. The limits are usual rules of thumb: 0.5 for
about symmetric (Bulmer 1979, Principles of Statistics) and 1 for the kurtosis.

Command: python -m experiments run gaussian
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..engine import Condition, Config, Net, Records, Verdict, decide, draw, learn

SKEWNESS = 0.5
"""Of the median unit, at most."""

KURTOSIS = 1.0
"""Its excess over a Gaussian's, in either direction, at most."""

SAME = 1e-3
"""By how much a norm that only shifts and scales may change the skewness of any unit: rounding."""


@dataclasses.dataclass(frozen=True)
class Gaussian(Config):
    """The config.

    Attributes:
      norms: What stands before each activation.
      activations: Names of functions of `flax.linen`.
    """

    norms: tuple[str, ...] = ("none", "batch")
    activations: tuple[str, ...] = ("sigmoid", "relu")
    lr: float = 0.3
    seeds: int = 5


QUICK = Gaussian()
SECONDS = 35
FULL = Gaussian(steps=50_000, evaluations=50, seeds=10)


def run(config: Gaussian) -> Iterator[Condition]:
    """Each activation and norm, all seeds side by side."""
    for activation in config.activations:
        for norm in config.norms:
            f = getattr(nn, activation)
            measure = learn(config, nl.get(norm), instrument=shape, activation=f)
            yield Condition({"norm": norm, "activation": activation}, measure)


def shape(net: Net) -> dict[str, Array]:
    """Skewness and excess kurtosis in the last hidden layer: of inputs and of outputs."""
    *_, flowing = net.activations(train=True).values()
    linear, entering, leaving = map(instruments.gaussianity, (flowing.a, flowing.z, flowing.h))
    changed = jnp.abs(jnp.abs(entering.skewness) - jnp.abs(linear.skewness))  # g < 0 mirrors
    return {
        "skewness": jnp.median(jnp.abs(entering.skewness)),
        "kurtosis": jnp.median(jnp.abs(entering.excess_kurtosis)),
        "skewness_out": jnp.median(jnp.abs(leaving.skewness)),
        "kurtosis_out": jnp.median(jnp.abs(leaving.excess_kurtosis)),
        "changed": changed.max(),
    }


def verdict(records: Records) -> Iterator[Verdict]:
    """Near a Gaussian, nearer than the outputs, nearer than without a norm; what the norm does."""
    changed = []
    for activation in records.values("activation"):
        none, batch = (records.where(activation=activation, norm=n) for n in ("none", "batch"))
        skewness, kurtosis = (batch.by_seed(key) for key in ("skewness", "kurtosis"))
        changed.append(batch.by_seed("changed"))
        start = f"{activation}, trained with batch norm: "
        claim = f"{start}the inputs' skewness is at most {SKEWNESS:g}"
        yield decide(claim, skewness, at_most=SKEWNESS)
        claim = f"{start}their excess kurtosis is at most {KURTOSIS:g}"
        yield decide(claim, kurtosis, at_most=KURTOSIS)
        factor = batch.by_seed("skewness_out") / skewness
        claim = f"{start}the inputs are less skewed than the outputs (factor)"
        yield decide(claim, factor, at_least=1, geometric=True)
        factor = none.by_seed("skewness") / skewness
        claim = f"{start}the inputs are less skewed than without a norm (factor)"
        yield decide(claim, factor, at_least=1, geometric=True)
    claim = "batch norm itself changes no unit's skewness"
    yield decide(claim, np.max(changed, axis=0), at_most=SAME)


def figure(records: Records) -> Figure:
    """Skewness and excess kurtosis of the inputs over training, a row for each activation."""
    activations = records.values("activation")
    picture, grid = draw.canvas(2, max(2, len(activations)), width=4, height=2.9)
    limits = {"skewness": SKEWNESS, "kurtosis": KURTOSIS}
    for row, activation in zip(grid, activations, strict=False):
        here = records.where(kind="evaluation", activation=activation)
        for axes, (key, limit) in zip(row, limits.items(), strict=True):
            draw.over_steps(axes, here, key, marker=True)
            draw.frame(axes, threshold=limit, title=f"{activation}, the median unit")
            axes.set(ylabel=f"|{key}|".replace("kurtosis", "excess kurtosis"), ylim=(0, None))
    return draw.finish(picture)
