"""Lengths, cosines and angles of vectors, and of pytrees taken as one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from normlab._checks import promote
from normlab.errors import invalid

Axes = int | Sequence[int] | None


def check_alike(where: str, tree: Any, other: Any) -> None:
    """Raises ValueError unless two pytrees have one structure and their arrays the same shapes."""
    shapes, others = (jax.tree.map(jnp.shape, t) for t in (tree, other))
    if shapes != others:
        raise invalid(
            where,
            f"pytrees of shapes {shapes} and {others}",
            "two of the same structure and shapes",
            "pass the parameters, and what was made of them",
        )


def as_vector(tree: Any) -> Array:
    """Returns all leaves, one after the other, in float32 at least."""
    leaves = [promote(leaf).ravel() for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros(0)


def scaled(v: Array, axes: Axes = None) -> tuple[Array, Array]:
    """Returns max|v|, its axes kept, and v/max|v|, whose squares neither overflow nor vanish.

    1 stands for a maximum that is 0 or not finite.
    """
    axes = tuple(axes) if isinstance(axes, Sequence) else axes
    peak = lax.stop_gradient(jnp.max(jnp.abs(v), axes, keepdims=True, initial=0))
    peak = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    return peak, v / peak


def norm(v: Array, axes: Axes = None, *, keepdims: bool = False) -> Array:
    """‖v‖₂: neither 1e-30 nor 1e30 is squared.

    NaN where v has one, and with derivative zero at zero. In this package zero is found by `== 0`:
    `not > 0` would take NaN for it.
    """
    return _root(jnp.sum, v, axes, keepdims)


def rms(v: Array, axes: Axes = None) -> Array:
    """√mean(v²), as carefully."""
    return _root(jnp.mean, v, axes, False)


def _root(of: Callable[..., Array], v: Array, axes: Axes, keepdims: bool) -> Array:
    axes = tuple(axes) if isinstance(axes, Sequence) else axes
    peak, v = scaled(v, axes)
    square = of(jnp.square(v), axes, keepdims=True)
    zero = square == 0
    length = jnp.where(zero, 0, peak * jnp.sqrt(jnp.where(zero, 1, square)))
    return length if keepdims else length.squeeze(axes)


def unit(v: Array, axes: Axes = None) -> Array:
    """v/‖v‖; zero stays zero."""
    length = norm(v, axes, keepdims=True)
    return v / jnp.where(length == 0, 1, length)


def cosine(v: Array, w: Array) -> Array:
    """v·w / ‖v‖‖w‖; 0 where one of them is zero."""
    return jnp.clip((unit(v) * unit(w)).sum(), -1, 1)


def angle(v: Array, w: Array, axes: Axes = None) -> Array:
    """The angle from v to w in radians, to rounding even where it is tiny.

    With d = w − v, split into d∥ along v and d⊥ across it, it is atan2(‖d⊥‖, ‖v‖ + d∥).
    """
    direction, length = unit(v, axes), norm(v, axes, keepdims=True)
    d = w - v
    along = (d * direction).sum(axes, keepdims=True)
    across = norm(d - along * direction, axes, keepdims=True)
    # The minimum of 0 and NaN is NaN.
    undefined = jnp.minimum(length, norm(w, axes, keepdims=True)) == 0
    theta = jnp.arctan2(across, jnp.where(undefined, 1, length + along))
    return jnp.where(undefined, 0, theta).squeeze(axes)
