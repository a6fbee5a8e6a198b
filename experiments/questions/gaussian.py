"""Is what enters an activation Gaussian, and does batch norm make it so?

Claim: A layer's pre-activation W·u + b is nearer to a Gaussian than its input u, without a norm and
with batch norm. With batch norm it is nearly Gaussian.

Source: Ioffe & Szegedy 2015, section 3.2, https://arxiv.org/abs/1502.03167, call W·u + b "more
Gaussian" than u, without a measurement. That it is nearly so, and more so than without a norm, is
ours. Batch norm itself cannot make it Gaussian, since a shift and a scale keep the shape of a
distribution; section 3.3 does not say that it does.

Protocol: MNIST, three hidden layers of 100 sigmoids or ReLUs, batches of 60, 1,000 steps of plain
SGD at rate 0.3, for all. Of each unit of the last hidden layer, and of each unit of the layer
below, over 256 training images: the distance of its standardized values from a Gaussian's (the root
mean square between sorted values and quantiles, which is the 2-Wasserstein distance), skewness and
excess kurtosis; the median unit's absolute value counts. Over so few images those of a Gaussian are
about 0.07, 0.15 and 0.3 by chance. The limits are usual rules of thumb: 0.5 for about symmetric
(Bulmer 1979, Principles of Statistics) and 1 for the kurtosis.

Command: normlab run gaussian
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import Array
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..engine import Condition, Config, Net, Records, Source, Verdict, decide, draw, learn

SKEWNESS = 0.5
"""Of the median unit, at most: a rule of thumb, chosen before the first run."""

KURTOSIS = 1.0
"""Its excess over a Gaussian's, in either direction, at most: as above."""

SAME = 1e-3
"""By how much a norm that only shifts and scales may change the skewness of any unit: rounding."""

SOURCE = Source("ioffe2015", "section 3.2", "more Gaussian")


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


QUICK = Gaussian()
SECONDS = 80
FULL = Gaussian(steps=50_000, evaluations=50)


def run(config: Gaussian) -> Iterator[Condition]:
    """Each activation and norm, all seeds side by side."""
    for activation in config.activations:
        for norm in config.norms:
            f = getattr(nn, activation)
            measure = learn(config, nl.get(norm), instrument=shape, activation=f)
            yield Condition({"norm": norm, "activation": activation}, measure)


def shape(net: Net) -> dict[str, Array]:
    """How far the last hidden layer's pre-activation is from a Gaussian, and its input, `_u`."""
    layers = list(net.activations(train=True).values())
    *_, u, _ = (net.images.reshape(len(net.images), -1), *(layer.h for layer in layers))
    found = {}
    for end, v in (("", layers[-1].a), ("_u", u)):
        unit = instruments.gaussianity(v)
        found[f"distance{end}"] = jnp.median(distance(v))
        found[f"skewness{end}"] = jnp.median(jnp.abs(unit.skewness))
        found[f"kurtosis{end}"] = jnp.median(jnp.abs(unit.excess_kurtosis))
    linear, entering = (instruments.gaussianity(v).skewness for v in (layers[-1].a, layers[-1].z))
    changed = jnp.abs(jnp.abs(entering) - jnp.abs(linear))  # g < 0 mirrors
    return {**found, "changed": changed.max()}


def distance(a: Array) -> Array:
    """The 2-Wasserstein distance of each column of `[N, C]`, standardized, from a Gaussian."""
    spread = a.std(0)
    values = jnp.sort((a - a.mean(0)) / jnp.where(spread > 0, spread, 1), axis=0)
    quantiles = scipy.special.ndtri((np.arange(len(a)) + 0.5) / len(a))[:, None]
    return jnp.sqrt(jnp.square(values - jnp.asarray(quantiles, a.dtype)).mean(0))


def verdict(records: Records) -> Iterator[Verdict]:
    """Nearer to a Gaussian than its input, near one, nearer than without; what the norm does."""
    changed = []
    for activation in records.values("activation"):
        none, batch = (records.where(activation=activation, norm=n) for n in ("none", "batch"))
        for norm, said, here in (("none", "no", none), ("batch", "batch", batch)):
            claim = f"{activation}, {said} norm: W·u + b is nearer to a Gaussian than u (distance)"
            gain = here.by_seed("distance_u") - here.by_seed("distance")
            yield decide(f"{activation}.{norm}.input", claim, gain, at_least=0, source=SOURCE)
        start = f"{activation}, batch norm: "
        claim = f"{start}the skewness of W·u + b is at most {SKEWNESS:g}"
        id = f"{activation}.batch.skewness"
        yield decide(id, claim, batch.by_seed("skewness"), at_most=SKEWNESS)
        claim = f"{start}its excess kurtosis is at most {KURTOSIS:g}"
        id = f"{activation}.batch.kurtosis"
        yield decide(id, claim, batch.by_seed("kurtosis"), at_most=KURTOSIS)
        gain = none.by_seed("distance") - batch.by_seed("distance")
        claim = f"{start}W·u + b is nearer to a Gaussian than without a norm (distance)"
        yield decide(f"{activation}.batch.nearer", claim, gain, at_least=0, untuned=True)
        changed.append(batch.by_seed("changed", of=max))
    claim = "batch norm itself changes no unit's skewness"
    yield decide("changed", claim, np.max(changed, axis=0), at_most=SAME, exact=True)


def figure(records: Records) -> Figure:
    """Distance, skewness and excess kurtosis over training, a row for each activation."""
    activations = records.values("activation")
    picture, grid = draw.canvas(3, max(2, len(activations)), width=3.6, height=2.9)
    limits = {"distance": (), "skewness": SKEWNESS, "kurtosis": KURTOSIS}
    said = {"distance": "distance from a Gaussian", "kurtosis": "|excess kurtosis|"}
    for row, activation in zip(grid, activations, strict=False):
        here = records.where(kind="evaluation", activation=activation)
        for axes, (key, limit) in zip(row, limits.items(), strict=True):
            draw.over_steps(axes, here, key)
            draw.over_steps(axes, here, f"{key}_u", ls="--", label="_")
            draw.frame(axes, threshold=limit, title=f"{activation}, the median unit")
            axes.set(ylabel=said.get(key, f"|{key}|"), yscale="log")
    return draw.finish(picture, "W·u + b (solid) and u (dashed) of the last hidden layer")
