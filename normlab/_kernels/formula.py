"""What the kernels compute, in operations of XLA."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from normlab._apply import apply_parts
from normlab._checks import promote
from normlab._sums import average, standard_deviation
from normlab.measure import moments


def normalized(
    x: Array,
    g: Array,
    b: Array,
    *,
    groups: int,
    centred: bool,
    eps: float,
    activation: Callable[[Array], Array] | None,
) -> tuple[Array, Array, Array]:
    """Returns h of `x [N, P, C]`, and the mean and 1/σ of each example and group, `[N, G]`."""
    n, p, c = x.shape
    axes = (2,) if p == groups == 1 else (1, 3)
    cut = x if p == groups == 1 else x.reshape(n, p, groups, c // groups)
    if centred:
        m = moments(cut, axes)
        mean, sigma = m.mean, m.sigma(eps)
    else:
        sigma = standard_deviation(*average(jnp.square(promote(cut)), axes), eps)
        mean = jnp.zeros_like(sigma)
    mean, sigma = (v.reshape(n, groups) for v in (mean, sigma))

    def spread(v: Array) -> Array:
        return v[:, None] if groups in (1, c) else jnp.repeat(v, c // groups, 1)[:, None]

    g, b = (jnp.broadcast_to(v, (1, 1, *v.shape)) if v.ndim == 1 else v for v in (g, b))
    mu, others = spread(mean) if centred else None, (spread(sigma), g, b)
    h = apply_parts(x, mu, others, None, activation=activation)
    return h, mean, 1 / sigma
