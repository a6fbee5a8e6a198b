"""White data, of mean 0, variance 1 and no correlation: how far from it, and what makes it.

    z = (x − μ)·W        with W chosen such that Cov(z) = I

In the equation of the norms σ is a number per channel. Here its place is taken by a matrix, W⁻¹,
so whitening lies outside the four parts; scaling each feature by itself is its diagonal case.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import checked, instance, not_negative, one_of
from normlab._checks import expand, floating, promote
from normlab._units import units_and_lengths
from normlab.errors import invalid
from normlab.instruments.vectors import norm, rms, scaled
from normlab.measure import moments

Method = Literal["zca", "pca", "zscore", "minmax"]
"""How features are put on one scale, with the covariance Σ = U·Λ·Uᵀ.

`"zca"`: W = U·Λ^(−½)·Uᵀ, symmetric: of all whitened data the nearest to the centred. `"pca"`:
W = U·Λ^(−½), the principal axes by falling variance, each of either sign. `"zscore"`: W = 1/std
on the diagonal, which leaves the correlations. `"minmax"`: W = 1/(max − min) on it and the minimum
for μ, which maps the data to [0, 1].
"""


class Whitening(NamedTuple):
    """An affine map of features, (x − mean)·matrix.

    Attributes:
      mean: `[C]`, what is subtracted: the mean; for `"minmax"` the minimum.
      matrix: `[C, C]`, W.

    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> w = whitening(x, method="zscore")
    >>> w.mean.tolist(), ((x - w.mean) @ w.matrix).round(2).tolist()
    ([2.0, 20.0], [[-1.0, -1.0], [1.0, 1.0]])
    """

    mean: Array
    matrix: Array


@checked("whitening", method=one_of(Method, "the name of a method"), eps=not_negative)
def whitening(x: ArrayLike, *, method: Method = "zca", eps: float = 0.0) -> Whitening:
    """Measures on `x` what `whiten` applies, to this data or to other.

    The forms are compared by Kessy, Lewin & Strimmer 2018 (https://arxiv.org/abs/1512.00809). The
    principal axes are those of the data and not of its covariance, whose entries are squares:
    a feature of 0–1 beside one of 0–1000 keeps its digits in float32.

    Args:
      x: `[..., C]`; all leading axes are examples. To whiten the pixels of images, flatten them.
      method: A `Method`.
      eps: Added to each variance under the root, against noise in directions of little variance;
        none in `"minmax"`, which has no variance.

    Returns:
      `Whitening`, in float32 at least. A feature that is constant on `x` becomes 0. So does a
      direction whose standard deviation is below C rounding errors of the largest: whitened data
      has as many dimensions as the data had. A value that is not finite makes W NaN.

    Raises:
      ValueError: If there is no axis of examples, the method is unknown, or `eps` is negative or
        given to `"minmax"`.

    >>> w = whitening(jnp.array([[0.0, 5.0], [4.0, 5.0]]), method="zscore")
    >>> w.mean.tolist(), w.matrix.tolist()
    ([2.0, 5.0], [[0.5, 0.0], [0.0, 0.0]])
    """
    mu, d = _centred("whitening", x)
    if method == "minmax" and eps:
        raise invalid(
            "whitening",
            f"eps={eps!r} with method={method!r}",
            "0 for 'minmax'",
            "leave eps out, or use a method that divides by a standard deviation",
        )
    if method == "minmax":
        low = promote(x).reshape(d.shape).min(0)
        return Whitening(low, jnp.diag(_inverse(d.max(0) - d.min(0))))
    if method == "zscore":
        return Whitening(mu, jnp.diag(_inverse(rms(d, 0), eps)))
    sigma, u = _principal_axes(d)
    matrix = u * _inverse(sigma, eps)[None]
    return Whitening(mu, _product(matrix, u.T) if method == "zca" else matrix)


@checked("whiten", w=instance(Whitening, "pass what whitening(x) returned"))
def whiten(x: ArrayLike, w: Whitening) -> Array:
    """(x − mean)·matrix, the data in the coordinates of `w`.

    Args:
      x: `[..., C]`.
      w: What `whitening` measured.

    Returns:
      The shape and the floating type of `x`.

    Raises:
      ValueError: If `x` does not have the C features of `w`.

    >>> x = jnp.array([[0.0, 0.0], [4.0, 100.0]])
    >>> whiten(x, whitening(x, method="minmax")).tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    if jnp.shape(x)[-1:] != w.mean.shape:
        raise invalid(
            "whiten",
            f"data of shape {jnp.shape(x)} for a whitening of {len(w.mean)} features",
            f"[..., {len(w.mean)}]",
            "shape the data as it was for whitening(...)",
        )
    d = promote(x).astype(w.mean.dtype) - expand(w.mean, jnp.ndim(x), -1)
    z = _product(d, w.matrix)
    return z.astype(floating(x).dtype)


@checked("condition number")
def condition_number(x: ArrayLike) -> Array:
    """The condition number of the data's covariance, λ_max/λ_min.

    The time gradient descent takes on a linear unit grows with it (LeCun, Bottou, Orr & Müller
    1998, "Efficient BackProp"). Directions without variance, which do not take part, are left out:
    constant features, and those `whitening` makes 0. So no more than 1/(C·ε)² can be seen, 7e13/C²
    in float32.

    Args:
      x: `[..., C]`; all leading axes are examples.

    Returns:
      One number from 1 on; 1 where nothing varies. NaN if a value is not finite.

    Raises:
      ValueError: If there is no axis of examples.

    >>> x = jnp.array([[10.0, 1.0, 3.0], [-10.0, 1.0, 3.0], [0.0, -2.0, 3.0]])
    >>> condition_number(x).round().item()
    33.0
    """
    sigma, _ = _principal_axes(_centred("condition_number", x)[1])
    least = jnp.where(sigma == 0, jnp.inf, sigma).min()
    return jnp.where(sigma[0] == 0, 1, jnp.square(sigma[0] / least))


@checked("correlations")
def correlations(h: ArrayLike) -> Array:
    """The correlation matrix of the channels (Pearson's r).

    r_ij = E[(h_i − μ_i)(h_j − μ_j)] / (σ_i σ_j). Of N independent examples, r between independent
    channels is about 1/√N and not 0.

    Args:
      h: `[N, ..., C]`; all leading axes are examples.

    Returns:
      `[C, C]`, in float32 at least. A channel that is constant has a row and a column of zeros,
      its diagonal included.

    Raises:
      ValueError: If `h` has no axis of examples.

    >>> correlations(jnp.array([[1.0, 2.0, 7.0], [3.0, -2.0, 7.0]])).round(3).tolist()
    [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    z, _ = units_and_lengths(_centred("correlations", h)[1])
    return _product(z.T, z)


@checked("distance to uncorrelated")
def distance_to_uncorrelated(h: ArrayLike) -> Array:
    """The root mean square of the correlations between two channels.

    √(Σ_{i≠j} r_ij² / D(D−1)) over the D channels that are not constant: what batch norm, which
    sets the diagonal of the covariance to 1, leaves off it.

    Args:
      h: `[N, ..., C]`; all leading axes are examples.

    Returns:
      One number, 0 to 1; 0 where fewer than two channels vary.

    Raises:
      ValueError: If `h` has no axis of examples.

    >>> distance_to_uncorrelated(jnp.array([[1.0, 2.0], [3.0, -2.0]])).round(3).item()
    1.0
    """
    r = correlations(h)
    off = r - jnp.diag(jnp.diag(r))
    live = (jnp.diag(r) != 0).astype(r.dtype).sum()
    pairs = live * (live - 1)
    return norm(off) / jnp.sqrt(jnp.where(pairs > 0, pairs, 1))


@checked("distance to white")
def distance_to_white(h: ArrayLike) -> Array:
    """‖Cov(h) − I‖_F / √C: 0 for white activations.

    White is what decorrelated batch norm (Huang et al. 2018, https://arxiv.org/abs/1804.08450)
    and, step by step, IterNorm (Huang et al. 2019, https://arxiv.org/abs/1904.03441) make of a
    batch. Measure it before gain and bias: either changes the covariance.

    Args:
      h: `[N, ..., C]`; all leading axes are examples. The covariance is that of the batch (ddof 0).

    Returns:
      One number. A constant channel counts as a variance of 0: all channels constant give 1.

    Raises:
      ValueError: If `h` has no axis of examples.

    >>> distance_to_white(jnp.array([[1.0, 1.0], [-1.0, -1.0]])).item()
    1.0
    """
    _, d = _centred("distance to white", h)
    cov = _product(d.T, d) / max(len(d), 1)
    peak, gap = scaled(cov - jnp.eye(len(cov), dtype=cov.dtype))
    return peak.squeeze() * jnp.sqrt(jnp.square(gap).sum() / len(cov))


def _centred(where: str, x: ArrayLike) -> tuple[Array, Array]:
    """Returns μ `[C]` and x − μ `[N, C]`, exactly zero where a feature is constant."""
    x = promote(x)
    if x.ndim < 2:
        raise invalid(
            where,
            f"an array of shape {x.shape}",
            "[..., C] with at least one axis of examples",
            "put the examples first and the features last",
        )
    x = x.reshape(-1, x.shape[-1])
    mu = moments(x, 0, algorithm="two_pass").mean[0]
    return mu, x - mu[None]


def _product(x: Array, y: Array) -> Array:
    """x·y in the full precision of their type, on accelerators too."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _principal_axes(d: Array) -> tuple[Array, Array]:
    """Returns the standard deviations `[C]`, falling, and the axes `[C, C]` of centred data."""
    n, channels = d.shape
    peak, d = scaled(d)
    r = jnp.linalg.qr(jnp.pad(d, ((0, max(channels - n, 0)), (0, 0))), mode="r")
    _, sigma, axes = jnp.linalg.svd(r)
    noise = channels * jnp.finfo(d.dtype).eps * sigma[0]
    # Not `sigma > noise`, which would turn NaN into 0.
    return jnp.where(sigma <= noise, 0, sigma) / max(n, 1) ** 0.5 * peak[0], axes.T


def _inverse(sigma: Array, eps: float = 0.0) -> Array:
    """1/√(σ² + ε), without the square of σ; 0 where σ = 0."""
    constant = sigma == 0
    return jnp.where(constant, 0, 1 / jnp.hypot(jnp.where(constant, 1, sigma), eps**0.5))
