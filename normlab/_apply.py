"""How the equation is computed: (a − k)·r + c about a pivot; a derivative reads `a` once a sum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from normlab._checks import floating, promote, promote_dtype
from normlab._weights import leave_out
from normlab._xla import apart, derivative_of, renamed, widen, zeros_of


def apply_parts(
    a: Array,
    mu: Array | None,
    others: tuple[Array, Array, Array],
    weights: Array | None,
    residual: Array | None = None,
    activation: Callable[[Array], Array] | None = None,
) -> Array:
    """H = f(g · (a − μ)/σ + b + residual) for arrays that broadcast to `a`.

    μ, or `None` for 0; then σ, g and b.
    """
    sigma, g, b = others
    a = floating(leave_out(a, weights))
    if promote_dtype(a) != a.dtype:
        a, sigma = apart(a, sigma)
    # (a − μ)/σ about a pivot, the value of μ: (a − k)·r + c with r = 1/σ and c = (k − μ)/σ. c is
    # zero, and carries the derivative of μ: so that the gradient of μ is that of c, a small array,
    # and needs no sum over a of its own. Where μ is 0 there is neither.
    pivot = None if mu is None else lax.stop_gradient(mu)
    r = reciprocal(sigma, weights is not None)
    small = jnp.broadcast_shapes(r.shape, g.shape, b.shape, (1,) * a.ndim)
    if small != a.shape:
        r = r * g
        c = b if mu is None else shift(mu, r) + b
        g, b = jnp.ones((), r.dtype), jnp.zeros((), r.dtype)
        small = jnp.broadcast_shapes(r.shape, c.shape, (1,) * a.ndim)
        axes = [i for i, n in enumerate(a.shape) if n != small[i]]
        wide = widen(a.shape, axes)
        if wide:
            shape = a.shape
            statistics = jax.tree.map(lambda v: jnp.broadcast_to(v, small), (pivot, r, c))
            pivot, r, c = jax.tree.map(wide.statistic, statistics)
            h = _apply(wide.array(a), pivot, r, c, g, b).reshape(shape)
            return finished(h, residual, activation).astype(a.dtype)
    else:
        c = jnp.zeros((), r.dtype) if mu is None else shift(mu, r)
    h = _apply(a, pivot, r, c, g, b)
    return finished(h, residual, activation).astype(a.dtype)


def finished(
    h: Array, residual: Array | None, activation: Callable[[Array], Array] | None
) -> Array:
    """f(h + residual), in the type of the statistics."""
    h = h if residual is None else h + promote(residual)
    return h if activation is None else activation(h)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def reciprocal(sigma: Array, weighted: bool) -> Array:
    """1/σ, with the derivative −(dσ/σ)/σ: 1/σ² would overflow from 1e-19 on.

    Where there are weights, the largest σ there is stands for none that was measured: 0.
    """
    r = 1 / sigma
    return jnp.where(sigma >= jnp.finfo(sigma.dtype).max, 0, r) if weighted else r


@reciprocal.defjvp
def _(weighted: bool, primals: Any, tangents: Any) -> Any:
    r = reciprocal(*primals, weighted)
    return r, -(tangents[0] * r) * r


@jax.custom_jvp
def shift(mu: Array, r: Array) -> Array:
    """(k − μ)·r where k is the value of μ: zero, with all the derivatives."""
    return zeros_of(mu * r)


@shift.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (mu, r), (dmu, dr) = primals, tangents
    return shift(mu, r), -dmu * r - derivative_of(mu) * dr


@jax.custom_jvp
def _apply(a: Array, pivot: Array | None, r: Array, c: Array, g: Array, b: Array) -> Array:
    """((a − k)·r + c)·g + b, with a derivative that reads `a` once for each of its sums."""
    return (_from(a, pivot) * r + c) * g + b


def _from(a: Array, pivot: Array | None = None) -> Array:
    """Returns a − k in the statistics' type; of no pivot, a."""
    return promote(a) if pivot is None else promote(a) - pivot


@_apply.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (a, pivot, r, c, g, b), (da, dk, dr, dc, dg, db) = primals, tangents
    pivots = () if pivot is None else (pivot,)

    def smaller(*statistics: Array) -> list[Array]:
        return [renamed(v)[0] if v.shape != a.shape else v for v in statistics]

    r1, g1, *k1 = smaller(r, g, *pivots)
    a1, r1, g1, *k1 = apart(a, r1, g1, *k1)
    a2, r2, g2, *k2 = apart(a1, r1, g1, *k1)
    r3, g3 = apart(r2, g2)
    r2, *k2 = smaller(r2, *k2)
    by_a = _from(da, dk) * r3 * g3
    by_r = _from(a1, *k1) * g1 * dr
    by_g = (_from(a2, *k2) * r2 + c) * dg
    return _apply(a, pivot, r, c, g, b), by_a + by_r + dc * g2 + by_g + db
