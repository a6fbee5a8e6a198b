"""Are the statistics of inference unbiased, and does batch norm vanish into the layer before it?

Claim: E[x] is the mean of the batches' means and Var[x] is m/(m − 1) times the mean of their
variances, an unbiased estimate; a convolution counts m' = m·p·q values. With both fixed, batch
norm is one affine map, which the layer before it can hold.

Source: Ioffe & Szegedy 2015, section 3.1, algorithm 2 and section 3.2,
https://arxiv.org/abs/1502.03167

Protocol: One epoch of 4,000 real images through a random dense layer and a random 5×5 convolution
of stride 2 (12 × 12 positions), 16 channels each, in float64, in batches of 2 to 64. Measured: the
estimated variance over the true one of all values, with the factor and without, the mean over the
channels (unbiased is what is off by a tenth of the correction at most); whether the library's
population statistics (`cumulative`, `within`, `ddof=1`) are that estimate; and the largest
difference between batch norm and the layer that it was folded into.

Found: For the convolution the factor is too small: positions of one image are alike, so that m·p·q
values know less of the variance than as many independent ones.

Command: python -m experiments run inference
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

from ..engine import Condition, Config, Record, Records, Verdict, dataset, decide, draw, exact

UNBIASED = 0.1
"""How far the estimated variance over the true one may be from 1, as a share of the correction."""

EXACT = 1e-10
"""The largest error of an identity, relative, in float64."""

SMALL = 4
"""The batch at which the verdicts on the variance are taken: m/(m − 1) is 4/3."""


@dataclasses.dataclass(frozen=True)
class Inference(Config):
    """The config.

    Attributes:
      batches: The batch sizes.
      examples: How many training images.
      channels: Of either layer.
    """

    seeds: int = 5
    batches: tuple[int, ...] = (2, 4, 16, 64)
    examples: int = 4000
    channels: int = 16


QUICK = Inference()
SECONDS = 11
FULL = Inference(seeds=10, examples=60_000, channels=64)

LINEAR = {"dense": nl.Dense(), "conv": nl.Conv(strides=2, padding="VALID")}
NORM = nl.get("batch", population="cumulative")


def run(config: Inference) -> Iterator[Condition]:
    """A dense layer and a convolution."""
    for name in LINEAR:
        yield Condition({"layer": name}, exact(measured, config, name))


def measured(config: Inference, name: str) -> Iterator[Record]:
    """The estimates at each batch size, and the error of folding."""
    images = dataset(config.dataset, config.data_dir).train_inputs[: config.examples]
    with jax.enable_x64(True):
        for seed in range(config.seeds):
            rng = np.random.default_rng(seed)
            shuffled = rng.permutation(images) / 255.0
            x = jnp.asarray(shuffled.reshape(len(images), -1) if name == "dense" else shuffled)
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
    """Mean, variance and fold, of each layer."""
    for name in records.values("layer"):
        here = records.where(kind="variance", layer=name)
        values = SMALL * here.values("positions").pop()
        off, truth = UNBIASED / (values - 1), 1 - 1 / values
        count = "m − 1" if name == "dense" else "m·p·q − 1"
        claim = f"{name}: the variance with {count} is unbiased at m = {SMALL} (over the true one)"
        ratio = here.by_seed("corrected", m=SMALL)
        yield decide(claim, ratio, at_least=1 - off, at_most=1 + off)
        if name == "dense":
            claim = f"{name}: without the factor it is (m − 1)/m of the truth at m = {SMALL}"
            plain = here.by_seed("plain", m=SMALL)
            yield decide(claim, plain, at_least=truth - off, at_most=truth + off)
        claim = f"{name}: the mean of the batches' means is that of all "
        claim += "(error in standard deviations)"
        yield decide(claim, here.by_seed("mean_error", of=max), at_most=EXACT)
        claim = f"{name}: the library's ddof=1 is the paper's estimate (relative error)"
        yield decide(claim, here.by_seed("library_error", of=max), at_most=EXACT)
        claim = f"{name}: folded into the layer it is the same function (relative error)"
        yield decide(claim, records.by_seed("error", kind="fold", layer=name), at_most=EXACT)


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
