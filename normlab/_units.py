"""The weights of a unit: their direction, their length, and what they are without their mean."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._checks import promote
from normlab.measure import moments


def units_and_lengths(w: ArrayLike, axes: Sequence[int] | None = None) -> tuple[Array, Array]:
    """Returns w/‖w‖ and ‖w‖ of each unit, `[..., K, C]` and `[1, ..., 1, C]`.

    A unit lies along all axes but the last, or along those given. Neither overflows nor
    underflows; where w is zero both are, with finite derivatives.
    """
    w = promote(w)
    axes = tuple(range(w.ndim - 1) if axes is None else axes)
    peak = lax.stop_gradient(jnp.max(jnp.abs(w), axes, keepdims=True, initial=0))
    peak = jnp.where(peak == 0, 1, peak)
    length = safe_sqrt(jnp.square(w / peak).sum(axes, keepdims=True))
    return w / peak / jnp.where(length == 0, 1, length), length * peak


def deviations(w: ArrayLike) -> tuple[Array, Array]:
    """Returns w − w̄ and w̄ of each unit, `[..., K, C]` and `[1, ..., 1, C]`.

    What rounding leaves of a constant vector is no direction: there w − w̄ is zero.
    """
    w = promote(w)
    m = moments(w, range(w.ndim - 1))
    deviation = w - m.mean
    noise = 8 * jnp.finfo(w.dtype).eps * jnp.abs(lax.stop_gradient(m.mean))
    largest = lax.stop_gradient(jnp.abs(deviation).max(range(w.ndim - 1), keepdims=True))
    return jnp.where(largest <= noise, 0, deviation), m.mean


def safe_sqrt(q: Array) -> Array:
    """√q for q ≥ 0, with derivative zero at zero."""
    return jnp.where(q == 0, 0, jnp.sqrt(jnp.where(q == 0, 1, q)))
