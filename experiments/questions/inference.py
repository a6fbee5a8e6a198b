"""Are the statistics of inference unbiased, and does batch norm vanish into the layer before it?

Claim: E[x] is the mean of the batches' means and Var[x] is m/(m − 1) times the mean of their
variances, an unbiased estimate; a convolution counts m' = m·p·q values. With both fixed, batch
norm is one affine map, which the layer before it can hold.

Source: Ioffe & Szegedy 2015, section 3.1, algorithm 2 and section 3.2,
https://arxiv.org/abs/1502.03167. The estimate is unbiased for independent values. That a
convolution takes m' in its factor too follows from the paper and does not stand in it; that it is
too small there is ours.

Protocol: One epoch of 4,000 real images, drawn by the seed, through a random dense layer and a
random 5×5 convolution of stride 2 (12 × 12 positions), 16 channels each, in float64, in batches of
2 to 64. Measured: the estimated variance over the true one of all values, with the factor and
without, the mean over the channels (unbiased is what is off by a tenth of the correction at most);
whether the library's population statistics (`cumulative`, `within`, `ddof=1`) are that estimate;
and the largest difference between batch norm and the layer that it was folded into.

Found: For the convolution the factor is too small: positions of one image are alike, so that m·p·q
values know less of the variance than as many independent ones.

Command: normlab run inference
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl
from normlab import folding

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

UNBIASED = 0.1
"""How far the estimated variance over the true one may be from 1, as a share of the correction. Set
after runs of seeds 0 to 4, as is the direction in which it is off for a convolution."""

EXACT = 1e-10
"""The largest error of an identity, relative, in float64."""

SMALL = 4
"""The batch at which the verdicts on the variance are taken: m/(m − 1) is 4/3."""

SOURCE = Source("ioffe2015", "section 3.1, algorithm 2", "m/(m − 1)")


@dataclasses.dataclass(frozen=True)
class Inference(Config):
    """The config.

    Attributes:
      batches: The batch sizes.
      examples: How many training images.
      channels: Of either layer.
    """

    batches: tuple[int, ...] = (2, 4, 16, 64)
    examples: int = 4000
    channels: int = 16


QUICK = Inference()
SECONDS = 19
FULL = Inference(examples=60_000, channels=64)

LINEAR = {"dense": nl.Dense(), "conv": nl.Conv(strides=2, padding="VALID")}
NORM = nl.get("batch", population="cumulative")


def run(config: Inference) -> Iterator[Condition]:
    """A dense layer and a convolution."""
    for name in LINEAR:
        says = [{"kind": "variance", "m": m} for m in config.batches]
        yield Condition({"layer": name}, exact(measured, config, name), [*says, {"kind": "fold"}])


def measured(config: Inference, name: str) -> Iterator[Record]:
    """The estimates at each batch size, and the error of folding."""
    images = dataset(config.dataset, config.data_dir).train_inputs
    with jax.enable_x64(True):
        for seed in config.each_seed:
            rng = np.random.default_rng(seed)
            drawn = images[rng.permutation(len(images))[: config.examples]] / 255.0
            x = jnp.asarray(drawn.reshape(len(drawn), -1) if name == "dense" else drawn)
            w = jnp.asarray(kernel(name, x, config.channels, rng))
            a = LINEAR[name](x, w)
            for m in config.batches:
                found = {key: float(v) for key, v in estimates(a, m).items()}
                positions = math.prod(a.shape[1:-1])
                yield {"kind": "variance", "seed": seed, "m": m, "positions": positions, **found}
            yield {"kind": "fold", "seed": seed, "error": folded(name, x[:64], w, a, rng)}


def kernel(name: str, x: Array, channels: int, rng: np.random.Generator) -> np.ndarray:
    """A random kernel for the inputs."""
    window = () if name == "dense" else (5, 5)
    shape = (*window, x.shape[-1], channels)
    return rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))


@functools.partial(jax.jit, static_argnums=1)
def estimates(a: Array, m: int) -> dict[str, Array]:
    """What an epoch of batches of `m` says of the mean and the variance of the pre-activations."""
    batches = a[: len(a) // m * m].reshape(-1, m, *a.shape[1:])
    values = batches.reshape(len(batches), -1, a.shape[-1])
    count, flat = values.shape[1], values.reshape(-1, a.shape[-1])
    mean, var = flat.mean(0), flat.var(0)
    within = values.var(1).mean(0)
    state = nl.population.init_cumulative(
        a.shape[-1], ddof=1, estimator="within", dtype=jnp.float64
    )

    def update(
        state: nl.population.Cumulative, batch: Array
    ) -> tuple[nl.population.Cumulative, None]:
        return state.update(nl.moments(batch, range(batch.ndim - 1))), None

    state, _ = jax.lax.scan(update, state, batches)
    corrected = count / (count - 1) * within
    return {
        "corrected": (corrected / var).mean(),
        "plain": (within / var).mean(),
        "mean_error": (jnp.abs(values.mean(1).mean(0) - mean) / jnp.sqrt(var)).max(),
        "library_error": jnp.abs(state.read()[1] / corrected - 1).max(),
    }


def folded(name: str, x: Array, w: Array, a: Array, rng: np.random.Generator) -> float:
    """The largest difference between batch norm and the layer that holds it, relative."""
    channels = w.shape[-1]
    state = nl.population.init_cumulative(channels, ddof=1, dtype=jnp.float64)
    state = state.update(nl.moments(a, range(a.ndim - 1)))
    params = nl.Affine(*(jnp.asarray(rng.normal(size=channels)) for _ in range(2)))
    return float(folding.fold_norm(NORM, params, state, w, x=x, linear=LINEAR[name]).error.max())


def verdict(records: Records) -> Iterator[Verdict]:
    """The variance of each layer; mean, library and fold of both."""
    ratio = records.by_seed("corrected", kind="variance", layer="dense", m=SMALL)
    off = UNBIASED / (SMALL - 1)
    claim = f"dense: the variance with m − 1 is unbiased at m = {SMALL} (over the true one)"
    how = {"at_least": 1 - off, "at_most": 1 + off, "source": SOURCE}
    yield decide("dense.variance", claim, ratio, **how)
    ratio = records.by_seed("corrected", kind="variance", layer="conv", m=SMALL)
    claim = f"conv: with m·p·q − 1 it stays too small at m = {SMALL}, as positions are alike "
    yield decide("conv.variance", claim + "(over the true one)", ratio, at_most=1)
    for id, key, claim in (
        ("mean", "mean_error", "the mean of the batches' means is that of all (error in sd)"),
        ("library", "library_error", "the library's ddof=1 is this estimate (relative error)"),
        ("folded", "error", "folded into the layer it is the same function (relative error)"),
    ):
        found = records.by_seed(key, of=max)
        source = SOURCE._replace(number="") if id != "library" else None
        yield decide(id, claim, found, at_most=EXACT, exact=True, source=source)


def figure(records: Records) -> Figure:
    """The estimated variance over the true one, by batch size."""
    picture, panels = draw.panels(records.where(kind="variance"), "layer")
    words = {"with the factor": "corrected", "without": "plain"}
    for axes, name, here in panels:
        both = [r | {"estimate": said, "ratio": r[words[said]]} for said in words for r in here]
        draw.against(axes, both, "m", "ratio", by="estimate")
        axes.set_xscale("log", base=2)
        draw.frame(axes, threshold=1, xlabel="batch size m (images)", title=name)
        axes.set_ylabel("estimated variance / true variance")
    title = "The factor: m/(m − 1), and m'/(m' − 1) with m' = m·p·q positions"
    return draw.finish(picture, title)
