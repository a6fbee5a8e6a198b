"""What is left of correlations after a norm: how far activations are from white."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import checked
from normlab.instruments.decorrelation import centred, product, scaled
from normlab.instruments.vectors import norm
from normlab.weight import units_and_lengths


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
    z, _ = units_and_lengths(centred("correlations", h)[1])
    return product(z.T, z)


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
    _, d = centred("distance to white", h)
    cov = product(d.T, d) / max(len(d), 1)
    peak, gap = scaled(cov - jnp.eye(len(cov), dtype=cov.dtype), (0, 1))
    return peak.squeeze() * jnp.sqrt(jnp.square(gap).sum() / len(cov))
