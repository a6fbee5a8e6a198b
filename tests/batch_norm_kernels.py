"""Batch norm by its kernels: under which rules of derivative two passes each way are all it takes.

Forward, `sums` reads x, and `apply` reads x (and the residual) and writes h. Backward, the
derivatives by r and c are one pass of sums, `apply_sums`. What remains is elementwise,

    dx = u·r + p·(x − k) + q

of which u·r comes from the rule of `apply` and p·(x − k) + q from that of `sums`. Written as
arithmetic, XLA makes one pass of both (`batch_norm`). A kernel for it, `apply_dx`, needs a rule
that has the whole norm in it, and so the statistics' own derivative (`batch_norm_and_pull`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import linear_call

from normlab._apply import reciprocal, shift
from normlab._kernels import columns
from normlab._sums import pivot_of


def _wide(x):
    return x.astype(jnp.float32)


def _statistics(n, k, sums, g, b, eps=1e-5):
    """The pivot of `apply`, r and c, from sums about k."""
    first, second = sums
    mean, var = k + first / n, second / n - jnp.square(first / n)
    r = reciprocal(jnp.sqrt(var + eps), False) * g
    return lax.stop_gradient(mean), r, shift(mean, r) + b


# --- A rule for the sums, and one for what is applied -------------------------------------------


def batch_norm(platform, interpret, x, g, b, residual=None, activation=None):
    """f(g·(x − μ)/σ + b + residual) of x [N, C]."""
    k = lax.stop_gradient(pivot_of(x, (0,), None, "auto"))[0]
    vectors = _statistics(len(x), k, _sums(platform, interpret, x, k), g, b)
    return _apply((platform, interpret, activation), x, *vectors, residual)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sums(platform, interpret, x, k):
    return columns.sums(platform, interpret, x, k)


@_sums.defjvp
def _(platform, interpret, primals, tangents):
    """As `normlab._sums.power_sums`: of the transpose nothing but arithmetic is left."""
    (x, k), (dx, dk) = primals, tangents
    d, dd = _wide(x) - k, _wide(dx) - dk
    return _sums(platform, interpret, x, k), (dd.sum(0), 2 * (d * dd).sum(0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply(static, x, k, r, c, residual):
    platform, interpret, activation = static
    return columns.apply(platform, interpret, x, k, r, c, residual, activation)


@_apply.defjvp
def _(static, primals, tangents):
    """All that is added to z, by r and by c: a linear function whose transpose is a kernel."""
    x, _, r, *_ = primals
    dx, dk, dr, dc, dresidual = tangents
    added = (_wide(dx) - dk) * r
    if dresidual is not None:
        added += _wide(dresidual)
    push, pull = functools.partial(_push, static), functools.partial(_pull, static)
    dh = linear_call(push, pull, primals, (added, dr, dc))
    return _apply(static, *primals), dh.astype(x.dtype)


def _push(static, primals, tangents):
    x, k, r, c, residual = primals
    added, dr, dc = tangents
    d, activation = _wide(x) - k, static[-1]
    dz = added + d * dr + dc
    if activation is None:
        return dz
    z = d * r + c if residual is None else d * r + c + _wide(residual)
    return jax.jvp(activation, (z,), (dz,))[1]


def _pull(static, primals, dh):
    """Of u only what the kernel did not write is computed, by those who read it."""
    x, k, r, c, residual = primals
    platform, interpret, activation = static
    dh = dh.astype(x.dtype)
    given = x, dh, k, r, c, residual, activation
    of_c, of_r, u = columns.apply_sums(platform, interpret, *given)
    u = _wide(u)
    if residual is None and activation is not None:
        (u,) = jax.vjp(activation, (_wide(x) - k) * r + c)[1](u)
    return u, of_r, of_c


# --- One rule for all of it ---------------------------------------------------------------------


def batch_norm_and_pull(platform, interpret, x, g, b, residual=None, activation=None):
    """H, and the function that takes dh to the derivatives by x, g, b and the residual."""
    run = functools.partial
    k = pivot_of(x, (0,), None, "auto")[0]
    sums = columns.sums(platform, interpret, x, k)
    vectors, back = jax.vjp(run(_statistics, len(x), k), sums, g, b)
    h = columns.apply(platform, interpret, x, *vectors, residual, activation)

    def pull(dh):
        given = x, dh, *vectors, residual, activation
        of_c, of_r, u = columns.apply_sums(platform, interpret, *given)
        (of_first, of_second), dg, db = back((jnp.zeros_like(k), of_r, of_c))
        p = 2 * of_second  # times x − k, which is (x − mean) + (mean − k)
        q = of_first + p * (vectors[0] - k)
        left = activation if residual is None else None
        dx = columns.apply_dx(platform, interpret, x, u, *vectors, p, q, left)
        return (dx, dg, db) if residual is None else (dx, dg, db, u)

    return h, pull
