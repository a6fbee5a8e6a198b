"""Batch norm's kernels in JAX's interpreter: against sums in float64, and as a norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import linear_call
from jax.sharding import PartitionSpec

import normlab as nl
from normlab._apply import _reciprocal, _shift
from normlab._sums import pivot_of
from normlab.kernels import columns

PLATFORMS = ["tpu", "cuda"]
# One value; fewer than a tile has; primes, that no tile divides; several tiles of columns.
SHAPES = [(1, 1), (7, 3), (4099, 1), (131, 1031)]


# --- As a norm ----------------------------------------------------------------------------------


def batch_norm(platform, interpret, x, g, b, residual=None, activation=None, eps=1e-5):
    """f(g·(x − μ)/σ + b + residual) of x [N, C], by the kernels."""
    k = lax.stop_gradient(pivot_of(x, (0,), None, "auto"))[0]
    first, second = _sums(platform, interpret, x, k)
    n = x.shape[0]
    mean, var = k + first / n, second / n - jnp.square(first / n)
    r = _reciprocal(jnp.sqrt(var + eps), False) * g
    c = _shift(mean, r) + b
    static = platform, interpret, activation
    return _apply(static, x, lax.stop_gradient(mean), r, c, residual)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sums(platform, interpret, x, k):
    return columns.sums(platform, interpret, x, k)


@_sums.defjvp
def _(platform, interpret, primals, tangents):
    (x, k), (dx, dk) = primals, tangents
    d, dd = x.astype(jnp.float32) - k, dx.astype(jnp.float32) - dk
    return _sums(platform, interpret, x, k), (dd.sum(0), 2 * (d * dd).sum(0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply(static, x, k, r, c, residual):
    platform, interpret, activation = static
    return columns.apply(platform, interpret, x, k, r, c, residual, activation)


@_apply.defjvp
def _(static, primals, tangents):
    """The derivative by all is that by an array that is added to z, and by r and c."""
    x, _, r, *_ = primals
    dx, dk, dr, dc, dresidual = tangents
    added = (dx.astype(jnp.float32) - dk) * r
    if dresidual is not None:
        added += dresidual.astype(jnp.float32)
    tangent = linear_call(
        functools.partial(_push, static),
        functools.partial(_pull, static),
        primals,
        (added, dr, dc),
    )
    return _apply(static, *primals), tangent.astype(x.dtype)


def _push(static, primals, tangents):
    x, k, r, c, residual = primals
    added, dr, dc = tangents
    d = x.astype(jnp.float32) - k
    dz = added + d * dr + dc
    if static[-1] is None:
        return dz
    z = d * r + c + (0 if residual is None else residual.astype(jnp.float32))
    return jax.jvp(static[-1], (z,), (dz,))[1]


def _pull(static, primals, dh):
    """One pass of sums; u is what it wrote, or elementwise, for what needs it to read it in."""
    x, k, r, c, residual = primals
    platform, interpret, activation = static
    vectors = k, r, c
    dh = dh.astype(x.dtype)
    of_c, of_r, u = columns.apply_sums(
        platform, interpret, x, dh, *vectors, residual, activation
    )
    u = u.astype(jnp.float32)
    if residual is None and activation is not None:
        u = jax.vjp(activation, (x.astype(jnp.float32) - k) * r + c)[1](u)[0]
    return u, of_r, of_c


def batch_norm_and_derivatives(platform, interpret, x, g, b, dh, residual=None, activation=None):
    """H, and the derivatives by x, g, b and the residual, with `apply_dx` for the last pass."""
    n = x.shape[0]
    k = pivot_of(x, (0,), None, "auto")[0]

    def statistics(first, second, g, b):
        mean, var = k + first / n, second / n - jnp.square(first / n)
        r = _reciprocal(jnp.sqrt(var + 1e-5), False) * g
        return lax.stop_gradient(mean), r, _shift(mean, r) + b

    of_x = columns.sums(platform, interpret, x, k)
    vectors, pull, = jax.vjp(statistics, *of_x, g, b)
    h = columns.apply(platform, interpret, x, *vectors, residual, activation)
    of_c, of_r, u = columns.apply_sums(platform, interpret, x, dh, *vectors, residual, activation)
    of_first, of_second, dg, db = pull((jnp.zeros_like(k), of_r, of_c))
    # The sums are about k, d is about the mean.
    p = 2 * of_second
    q = of_first + p * (vectors[0] - k)
    left = None if residual is not None else activation
    dx = columns.apply_dx(platform, interpret, x, u, *vectors, p, q, left)
    return h, dx, dg, db, u
