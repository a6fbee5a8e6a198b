"""Does decorrelated batch norm whiten, and does it matter by which of all matrices?

Claim: Decorrelated batch norm with ZCA leaves a batch white. Five steps of Newton's iteration
(IterNorm) do not, where the covariance is ill conditioned: directions of small variance stay small.
More steps whiten better in the coupled form. In the form that was published rounding grows with
each step, so that more steps whiten better at first and then worse: in float32 sooner, in float64
later. PCA, whose axes change places from batch to batch, trains worse than ZCA; ZCA trains better
than batch norm.

Source: Huang et al. 2018, https://arxiv.org/abs/1804.08450 (ZCA, not PCA, whose axes swap; better
than batch norm); Huang et al. 2019, https://arxiv.org/abs/1904.03441 (five steps of Newton's
iteration, a better trade-off as they do not whiten fully; its convergence is asserted). In
circulation is that IterNorm whitens to 0.05, and that more steps of it whiten worse: the first is
false where the covariance is ill conditioned, the second true of one form, from some step on. The
threshold of 0.05 is ours.

Protocol: Exact: 512 examples of 16 channels in float32, whose covariance has eigenvalues from 0.01
to 1 (a condition number of 100), ε = 10⁻⁶; measured is ‖Cov − I‖_F/√16 of the output. The published
form, P ← (3P − P³Σ/tr Σ)/2, runs in both precisions. Trained: MNIST, two layers of 64 ReLUs,
batches of 64, groups of 16 channels, 200 steps of SGD, whose rate falls to zero as a cosine from
the best of a grid, chosen for each norm on held-out images; inference whitens by running
covariances.

Command: normlab run decorrelated
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Schedule,
    Source,
    Verdict,
    decide,
    draw,
    exact,
    tuned,
)

WHITE = 0.05
"""The distance to a white batch, at most; chosen before any run."""

DBN = Source("huang2018", "", "ZCA and not PCA; better than batch norm", "abstract")
ITERNORM = Source("huang2019", "", "five steps, not fully whitened", "abstract")

STEPS = (1, 2, 3, 5, 7, 10, 15, 20)
"""Of Newton's iteration."""

FIVE, TEN, TWENTY = 5, 10, 20
"""Steps as in the source, and more of them."""


@dataclasses.dataclass(frozen=True)
class Decorrelated(Config):
    """The config.

    Attributes:
      whiteners: What is trained with, beside batch norm.
      rates: The grid of first learning rates.
      widths: The units of the hidden layers.
      group_size: Channels that are whitened together.
      condition: The condition number of the exact part.
    """

    whiteners: tuple[str, ...] = ("zca", "pca")
    rates: tuple[float, ...] = (0.1, 0.3, 1.0)
    widths: tuple[int, ...] = (64, 64)
    group_size: int = 16
    condition: float = 100.0
    batch_size: int = 64
    schedule: Schedule = "cosine"
    steps: int = 200
    evaluations: int = 3


QUICK = Decorrelated()
SECONDS = 60
FULL = Decorrelated(widths=(100,) * 4, steps=20_000)


def run(config: Decorrelated) -> Iterator[Condition]:
    """How white each form leaves a batch; then training."""
    yield Condition({"norm": "all"}, exact(whiteness, config))
    for name in ("batch", *config.whiteners):
        how: dict[str, Any] = {"whitener": name, "group_size": config.group_size}
        norm = nl.get("batch") if name == "batch" else nl.get("whitening", **how)
        measure = tuned(config, norm, config.rates, widths=config.widths, activation=nn.relu)
        yield Condition({"norm": name}, measure)


def whiteness(config: Decorrelated) -> Iterator[Record]:
    """The distance to white after each whitener and number of steps."""
    for seed in config.each_seed:
        a = correlated(seed, config.condition)
        found: dict[tuple[str, int], np.ndarray] = {}
        for name in ("zca", "pca", "cholesky"):
            found[name, 0] = np.asarray(whitened(a, name, 1))
        for steps in STEPS:
            found["newton", steps] = np.asarray(whitened(a, "newton", steps))
            for dtype in (np.float32, np.float64):
                matrix = published(np.cov(a, rowvar=False, ddof=0).astype(dtype), steps)
                centred = (a - a.mean(0)).astype(np.float64)
                found[f"published, {dtype.__name__}", steps] = centred @ matrix.astype(np.float64)
        for (form, steps), h in found.items():
            least, off = spectrum(h)
            yield {"kind": "whiteness", "form": form, "newton_steps": steps, "seed": seed} | {
                "distance": off,
                "least": least,
            }


def correlated(seed: int, condition: float) -> np.ndarray:
    """`[512, 16]` whose covariance has eigenvalues from 1/condition to 1, in float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((512, 16))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(len(x))
    axes = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    return (x * np.geomspace(condition**-0.5, 1, 16) @ axes.T).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("whitener", "steps"))
def whitened(a: np.ndarray, whitener: str, steps: int) -> Array:
    """The output of the library's norm in training."""
    how: dict[str, Any] = {"whitener": whitener, "steps": steps, "groups": 1, "eps": 1e-6}
    return nl.family.whitening_norm(a, train=True, **how)[0]


def published(cov: np.ndarray, steps: int) -> np.ndarray:
    """Σ^(−½) by Newton's iteration as it was published, in the precision of Σ."""
    trace = np.trace(cov)
    normed, p = cov / trace, np.eye(len(cov), dtype=cov.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps):
            p = (3 * p - p @ p @ p @ normed) / 2
    return p / np.sqrt(trace)


def spectrum(h: np.ndarray) -> tuple[float, float]:
    """The least eigenvalue of the covariance, and its distance to I, ‖Cov − I‖_F/√C."""
    if not np.isfinite(h).all():
        return 0.0, float("inf")
    values = np.linalg.eigvalsh(np.cov(h.astype(np.float64), rowvar=False, ddof=0))
    return float(values.min()), float(np.sqrt(np.square(values - 1).mean()))


def verdict(records: Records) -> Iterator[Verdict]:
    """How white each form leaves a batch; which trains better."""

    def measured(key: str, form: str, steps: int = 0) -> np.ndarray:
        return records.by_seed(key, form=form, newton_steps=steps)

    claim = "ZCA leaves a batch white (‖Cov − I‖_F/√C)"
    yield decide("zca.white", claim, measured("distance", "zca"), at_most=WHITE, source=DBN)
    claim = "PCA leaves a batch white (‖Cov − I‖_F/√C)"
    yield decide("pca.white", claim, measured("distance", "pca"), at_most=WHITE)
    claim = f"{FIVE} steps of Newton's iteration do not leave it white (‖Cov − I‖_F/√C)"
    five = measured("distance", "newton", FIVE)
    yield decide("newton.not-white", claim, five, at_least=WHITE, source=ITERNORM)
    claim = f"{FIVE} steps leave the direction of the least variance below 1/2 of it"
    yield decide("newton.small", claim, measured("least", "newton", FIVE), at_most=0.5)
    for form, said, steps, better in (
        ("newton", "coupled, float32", TWENTY, True),
        ("published, float64", "as published, float64", TEN, True),
        ("published, float64", "as published, float64", TWENTY, False),
        ("published, float32", "as published, float32", TWENTY, False),
    ):
        few, many = (np.minimum(measured("distance", form, n), 1e30) for n in (FIVE, steps))
        word = "better" if better else "worse"
        claim = f"Newton's iteration {said}: {steps} steps whiten {word} than {FIVE} (factor)"
        factor = few / many if better else many / few
        id = f"newton.{form.replace(', ', '-')}.{steps}"
        yield decide(id, claim, factor, at_least=1, geometric=True)
    here = records.where(kind="evaluation")
    zca, pca, batch = (here.accuracy(norm=name) for name in ("zca", "pca", "batch"))
    points = {"at_least": 0, "unit": "points", "source": DBN}
    claim = "trained with ZCA a net is more accurate than with PCA"
    yield decide("zca.pca", claim, zca - pca, **points)
    claim = "trained with ZCA a net is more accurate than with batch norm"
    yield decide("zca.batch", claim, zca - batch, **points)
    losses = [here.by_seed("train_loss", norm=name) for name in ("pca", "zca")]
    claim = "with PCA the training loss at the end is larger than with ZCA (factor)"
    how = {"at_least": 1, "geometric": True, "source": DBN}
    yield decide("pca.loss", claim, losses[0] / losses[1], **how)


def figure(records: Records) -> Figure:
    """The distance to white against the steps, and the training loss and accuracy of each norm."""
    picture, (left, middle, right) = draw.canvas(3, width=3.7)
    exactly = records.where(kind="whiteness")
    newton = exactly.where(lambda r: r["newton_steps"] and np.isfinite(r["distance"] or np.inf))
    draw.against(left, newton, "newton_steps", "distance", by="form")
    (zca,) = {float(np.mean(exactly.by_seed("distance", form="zca")))}
    draw.frame(left, threshold=WHITE, xlabel="steps of Newton's iteration", log=True)
    left.set(ylabel="‖Cov − I‖_F/√C", title=f"dotted: {WHITE}; ZCA: {zca:.1g}", ylim=(1e-5, 1e3))
    left.legend(frameon=False, fontsize=8)
    here = records.where(kind="evaluation").trained()
    draw.over_steps(middle, here, "train_loss", marker=True)
    draw.frame(middle, ylabel="training loss (nats)", log=True)
    draw.over_steps(right, here, draw.accuracy, marker=True)
    return draw.finish(picture, "At the best rate; median and band of all seeds", key=middle)
