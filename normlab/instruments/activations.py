"""What activations look like: percentiles, saturation, shape, and what their variance costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import checked, number, sequence
from normlab._checks import normalize_axes, promote
from normlab.errors import invalid
from normlab.instruments.vectors import rms, unit
from normlab.measure import moments

SHARE = number("", "", lambda share: 0 <= share <= 1, static=True)
END = number("an end, which may be infinite", "pass a float", lambda end: end == end, static=True)


@checked("percentiles", q=sequence(SHARE, "shares between 0 and 1", "write 0.15 for 15%"))
def percentiles(
    a: ArrayLike, q: Sequence[float] = (0.15, 0.5, 0.85), *, axes: int | Sequence[int] = 0
) -> Array:
    """The values below which shares `q` of the activations lie.

    Followed over training they show how the distribution of a unit's input moves: figure 1 (b, c)
    of Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167) draws 15, 50 and 85% of one unit.

    Args:
      a: `[N, ..., C]`; quantiles are taken in float32 at least, linear between two values.
      q: Q shares between 0 and 1.
      axes: What is pooled: 0 for the examples, `(0, 1, 2)` for those of images.

    Returns:
      `[Q, ...]`, the shape of `a` without `axes`. NaN where a value is NaN.

    Raises:
      ValueError: If a share is not between 0 and 1, or an axis is out of range.

    >>> percentiles(jnp.arange(101.0)[:, None]).round().tolist()
    [[15.0], [50.0], [85.0]]
    """
    a = promote(a)
    axes = normalize_axes("percentiles", axes, a.ndim)
    return jnp.quantile(a, jnp.asarray(q, a.dtype), axis=axes)


@checked(
    "saturation",
    low=END,
    high=END,
    margin=number("a number of at least 0", "pass a float", lambda v: 0 <= v < np.inf, static=True),
)
def saturation(
    h: ArrayLike, *, low: float, high: float, margin: float, axes: int | Sequence[int] = 0
) -> Array:
    """The share of activations within `margin` of an end of a bounded activation function.

    mean[h ≤ low + margin or h ≥ high − margin]. Saturated units pass little gradient; their
    shares by layer are the subject of Glorot & Bengio 2010
    (https://proceedings.mlr.press/v9/glorot10a.html).

    Args:
      h: `[N, ..., C]`, after the nonlinearity.
      low: Its lower end: 0 for a sigmoid, −1 for tanh. `-math.inf` counts the upper end alone.
      high: Its upper end: 1 for both. `math.inf` counts the lower end alone.
      margin: How near an end is saturated, in units of `h`: 0.05, for example.
      axes: What is pooled.

    Returns:
      The shape of `h` without `axes`, 0 to 1. NaN where a value is NaN.

    Raises:
      ValueError: If the margins overlap, or an axis is out of range.

    >>> saturation(jnp.array([[0.01], [0.5], [0.7], [0.99]]), low=0, high=1, margin=0.05).tolist()
    [0.5]
    """
    h = promote(h)
    if not 0 <= 2 * margin < high - low:
        raise invalid(
            "saturation",
            f"margin={margin!r} between low={low!r} and high={high!r}",
            "low < high, and a margin from 0 to below half their distance",
            "pass for example low=0, high=1, margin=0.05 for a sigmoid",
        )
    axes = normalize_axes("saturation", axes, h.ndim)
    near = ((h <= low + margin) | (h >= high - margin)).astype(h.dtype)
    return jnp.where(jnp.isnan(h), jnp.nan, near).mean(axes)


@checked("dead units")
def dead_units(h: ArrayLike, *, axes: int | Sequence[int] = 0) -> Array:
    """The share of rectified units that are zero on the whole batch.

    Such a unit passes no gradient for this batch. One that is zero for every input has died (Lu et
    al. 2019, https://arxiv.org/abs/1903.06733); a batch bounds the share of those from above.

    Args:
      h: `[N, ..., C]`, after the ReLU.
      axes: What is pooled for one unit: 0, or `(0, 1, 2)` for the channels of images.

    Returns:
      One number, 0 to 1; NaN if any value is NaN.

    Raises:
      ValueError: If an axis is out of range.

    >>> dead_units(jnp.array([[0.0, 2.0], [0.0, 0.0]])).item()
    0.5
    """
    h = promote(h)
    dead = (h <= 0).all(normalize_axes("dead units", axes, h.ndim))
    return jnp.where(jnp.isnan(h).any(), jnp.nan, dead.astype(h.dtype).mean())


class Gaussianity(NamedTuple):
    """Two numbers per channel that are 0 for a Gaussian.

    Attributes:
      skewness: E z³ for z = (a − μ)/σ.
      excess_kurtosis: E z⁴ − 3; −2 for two equal peaks, positive for heavy tails. Exactly −3,
        which no other distribution has, where the channel is constant.

    >>> found = gaussianity(jnp.array([[0.0], [0.0], [0.0], [4.0]]))   # μ = 1, σ² = 3
    >>> round(found.skewness.item(), 3), round(found.excess_kurtosis.item(), 3)
    (1.155, -0.667)
    """

    skewness: Array
    excess_kurtosis: Array


@checked("gaussianity")
def gaussianity(a: ArrayLike, *, axes: int | Sequence[int] = 0) -> Gaussianity:
    """Skewness and excess kurtosis: how far a distribution is from a Gaussian.

    The standardized third and fourth moments, of which Jarque & Bera (1980) make their test of
    normality, n/6·(skewness² + kurtosis²/4). With n values of a Gaussian their standard deviations
    are about √(6/n) and √(24/n): less is no evidence.

    Args:
      a: `[N, ..., C]`.
      axes: What is pooled.

    Returns:
      `Gaussianity`, with fields of the shape of `a` without `axes`.

    Raises:
      ValueError: If an axis is out of range.

    >>> result = gaussianity(jnp.array([[-1.0, 5.0], [1.0, 5.0]]))
    >>> result.skewness.tolist(), result.excess_kurtosis.round().tolist()
    ([0.0, 0.0], [-2.0, -3.0])
    """
    a = promote(a)
    axes = normalize_axes("gaussianity", axes, a.ndim)
    count = np.prod([a.shape[i] for i in axes], dtype=int).item()
    z = unit(a - moments(a, axes, algorithm="two_pass").mean, axes) * count**0.5
    return Gaussianity((z**3).mean(axes), (z**4).mean(axes) - 3)


@checked("cancellation")
def cancellation(a: ArrayLike, *, axes: int | Sequence[int] = 0) -> Array:
    """mean²/var: log10 of 1 + this is how many digits of the variance E[a²] − E[a]² loses.

    The square of the condition number that Chan, Golub & LeVeque 1983 give for the variance, less
    1; `Moments.cancellation` of a batch.

    Args:
      a: `[N, ..., C]`.
      axes: What is pooled.

    Returns:
      The shape of `a` without `axes`; infinite where `a` is constant and not zero.

    Raises:
      ValueError: If an axis is out of range.

    >>> cancellation(jnp.array([[999.0, 0.0], [1001.0, 2.0]])).tolist()
    [1000000.0, 1.0]
    """
    a = promote(a)
    axes = normalize_axes("cancellation", axes, a.ndim)
    mean = moments(a, axes, algorithm="two_pass").mean
    sigma = rms(a - mean, axes)
    mean, constant = mean.squeeze(axes), sigma == 0
    ratio = jnp.square(mean / jnp.where(constant, 1, sigma))
    return jnp.where(constant & (mean != 0), jnp.inf, ratio)
