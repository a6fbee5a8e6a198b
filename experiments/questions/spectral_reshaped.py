"""Does the spectral norm of a reshaped kernel bound a convolution?

Claim: The largest singular value of a kernel as a matrix [h·w·K, C] is no bound on the norm of its
convolution but from below: with stride 1 and circular padding the map's norm is between that and
√(h·w) times it. In trained nets it is more than the lower end in every layer, so that a net whose
kernels spectral norm divides by it has layers that lengthen some input, which the norm of the map
itself cures.

Source: Miyato et al. 2018, https://arxiv.org/abs/1802.05957, divide by the norm of the matrix. That
this bounds the layer is in circulation and false. Singla & Feizi 2019,
https://arxiv.org/abs/1911.10258, prove upper bounds, of which one is that norm times √(h·w); the
exact singular values are those of Sedghi et al. 2018, https://arxiv.org/abs/1805.10408. The lower
bound is ours: the mean over frequencies of the squared transfer matrix is the Gram matrix of the
kernel.

Protocol: The exact norm is the largest over all frequencies of the transfer matrix's, in float64,
for 3×3 kernels and circular padding on 16×16 pixels: of Gaussian kernels with 16 channels, of
kernels with one tap or nine equal ones, which reach the bounds, and of every layer behind the first
of a conv net of stride 1 trained on Fashion-MNIST, at 14×14 pixels, without a norm, with batch
norm, and with spectral norm of the matrix and of the map. The map of a trained layer has zero
padding and is measured as it is, by 500 steps of power iteration.

Command: normlab run spectral_reshaped
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

from ..data import Dataset
from ..engine import (
    Condition,
    Config,
    Net,
    Record,
    Records,
    Verdict,
    decide,
    draw,
    exact,
    learn,
    pooled,
)
from ..models import conv

ROUNDING = 1e-9
"""How far from a bound rounding in float64 may bring the norm, relative."""

SIZE = 1.5
"""The map's norm over the matrix's, if it is as large as in our first look."""

CONVERGED = 0.05
"""How far above 1 the power iteration of training, one step at a time, may leave the norm."""


@dataclasses.dataclass(frozen=True)
class SpectralReshaped(Config):
    """The config; its steps and rate are those of the trained nets.

    Attributes:
      nets: The trained nets: a norm, or `spectral` with what it bounds.
      pixels: Along each axis of the random kernels' images.
      channels: Of the random kernels.
      width: Channels of the trained nets.
      pool: Pixels along each axis of their images whose mean makes one.
    """

    dataset: str = "fashion_mnist"
    model: str = "vgg"
    nets: tuple[str, ...] = ("none", "batch", "spectral matrix", "spectral map")
    pixels: int = 16
    channels: int = 16
    width: int = 12
    pool: int = 2
    optimizer: str = "momentum"
    lr: float = 0.03
    steps: int = 150
    evaluations: int = 1


QUICK = SpectralReshaped()
SECONDS = 200
FULL = SpectralReshaped(dataset="cifar10", width=128, pool=1, steps=10_000, evaluations=5)


def run(config: SpectralReshaped) -> Iterator[Condition]:
    """Random kernels of three kinds, and the trained nets."""
    for taps in ("gaussian", "one", "equal"):
        yield Condition({"taps": taps}, exact(random, config, taps))
    for net in config.nets:
        name, _, of = net.partition(" ")
        norm = nl.get(name, of=of) if of else nl.get(name)
        how: dict[str, Any] = {"widths": (config.width,) * 2, "instrument": norms}
        how["prepare"] = lambda data: few(pooled(data, config.pool))
        says = {"map": np.ones(2), "matrix": np.ones(2)}
        yield Condition({"net": net}, learn(config, norm, **how), [says])


def few(data: Dataset) -> Dataset:
    """The data with a tenth of the test images, of which nothing is claimed."""
    count = len(data.test_labels) // 10
    return data._replace(test_inputs=data.test_inputs[:count], test_labels=data.test_labels[:count])


def circular(w: np.ndarray, pixels: int) -> float:
    """The norm of a circular convolution of stride 1: the largest over frequencies.

    >>> circular(np.ones((3, 3, 1, 1)), 8)
    9.0
    """
    transfer = np.fft.fft2(w, (pixels, pixels), axes=(0, 1))
    return float(np.linalg.norm(transfer, 2, axis=(2, 3)).max())


def matrix(w: np.ndarray) -> float:
    """The norm of the kernel as a matrix `[h·w·K, C]`."""
    return float(np.linalg.norm(w.reshape(-1, w.shape[-1]), 2))


def random(config: SpectralReshaped, taps: str) -> Iterator[Record]:
    """The norm of the map over that of the matrix, of random kernels."""
    for seed in config.each_seed:
        w = np.random.default_rng(seed).normal(size=(3, 3, config.channels, config.channels))
        if taps == "equal":
            w[:] = w[0, 0]
        elif taps == "one":
            w[[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        yield {"kind": "random", "seed": seed, "ratio": circular(w, config.pixels) / matrix(w)}


def norms(net: Net) -> dict[str, Array]:
    """Of each layer behind the first the norms of the map and of the matrix."""
    flowing, found = net.activations(), []
    model: Any = net.model
    for name in model.layers[1:]:
        w, a = net.params[name]["kernel"], flowing[name].a
        x = jnp.zeros((1, *a.shape[1:3], w.shape[2]))
        if isinstance(model.norm, nl.WeightMap):
            own, state = net.params[name]["norm"], net.norm_state[name]["norm"]
            w = model.norm.kernel(own, state, w, linear=conv(), x=x, train=False)[0]
        found.append((longest(w, x), jnp.linalg.norm(w.reshape(-1, w.shape[-1]), 2)))
    of_map, of_matrix = zip(*found, strict=True)
    return {"map": jnp.stack(of_map), "matrix": jnp.stack(of_matrix)}


def longest(w: Array, like: Array) -> Array:
    """The norm of the layer's map, by power iteration."""

    def f(x: Array) -> Array:
        return conv()(x, w)

    def step(_: Any, x: Array) -> Array:
        y, back = jax.vjp(f, x)
        (x,) = back(y)
        return x / jnp.linalg.norm(x.ravel())

    x = lax.fori_loop(0, 500, step, jax.random.normal(jax.random.key(0), like.shape))
    return jnp.linalg.norm(f(x / jnp.linalg.norm(x.ravel())).ravel())


def each_layer(records: Records, key: str = "") -> np.ndarray:
    """Of each seed and layer at the end: a norm, or the map's over the matrix's, `[seeds, L]`."""
    last = max(records.values("step"))
    rows = sorted(records.where(step=last), key=lambda r: r["seed"])
    if key:
        return np.array([r[key] for r in rows])
    return np.array([np.divide(r["map"], r["matrix"]) for r in rows])


def verdict(records: Records) -> Iterator[Verdict]:
    """Both bounds, and the ratio in trained nets, with and without spectral norm."""
    gaussian, one, equal = (
        records.where(taps=t).by_seed("ratio") for t in ("gaussian", "one", "equal")
    )
    same: dict[str, Any] = {"at_least": -ROUNDING, "at_most": ROUNDING, "exact": True}
    claim = "circular, stride 1: with one tap both norms are equal (ratio − 1)"
    yield decide("lower", claim, one - 1, **same)
    claim = (
        "circular, stride 1: with equal taps the map's is √(h·w) = 3 times as large (ratio/3 − 1)"
    )
    yield decide("upper", claim, equal / 3 - 1, **same)
    more: dict[str, Any] = {"at_least": 1, "size": SIZE, "geometric": True}
    claim = "Gaussian kernels: the map's norm over the matrix's"
    yield decide("gaussian", claim, gaussian, **more)
    trained = records.where(kind="evaluation")
    for net in trained.values("net"):
        here = trained.where(net=net)
        if net in ("none", "batch"):
            claim = f"trained net, {net}: the map's norm over the matrix's, the least of any layer"
            yield decide(f"trained.{net}", claim, each_layer(here).min(1), **more)
    matrix, whole = (trained.where(net=f"spectral {of}") for of in ("matrix", "map"))
    claim = (
        "spectral norm of the matrix: the largest map norm of a layer, which it should bound by 1"
    )
    yield decide("spectral.matrix", claim, each_layer(matrix, "map").max(1), **more)
    claim = "spectral norm of the map: the largest map norm of a layer"
    largest = each_layer(whole, "map").max(1)
    yield decide("spectral.map", claim, largest, at_most=1 + CONVERGED, geometric=True)


def figure(records: Records) -> Figure:
    """The ratio of random kernels and in trained nets; the norms under spectral norm."""
    picture, (left, right) = draw.canvas(2, width=5)
    groups = {
        f"{t}, random": records.where(taps=t).by_seed("ratio") for t in records.values("taps")
    }
    trained, under = records.where(kind="evaluation"), {}
    for net in trained.values("net"):
        here = trained.where(net=net)
        groups[net] = each_layer(here).min(1)
        if net.startswith("spectral"):
            under[f"{net}: matrix"] = each_layer(here, "matrix").max(1)
            under[f"{net}: map"] = each_layer(here, "map").max(1)
    draw.columns(left, groups)
    draw.frame(
        left, threshold=(1, 3), ylim=(0.9, 3.1), title="random kernels, and the least of any layer"
    )
    left.set_ylabel("norm of the map / norm of the matrix")
    draw.columns(right, under)
    draw.frame(right, threshold=1, title="trained with spectral norm of …")
    right.set_ylabel("largest norm of a layer")
    return picture
