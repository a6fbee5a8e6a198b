"""The landscape around a point: along one step, and its sharpest direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from normlab._arguments import array, checked, integer, number, tree
from normlab._checks import promote
from normlab.errors import invalid
from normlab.instruments.vectors import as_vector, check_alike, norm


class AlongStep(NamedTuple):
    """The loss and its gradient along one direction.

    Attributes:
      losses: `[T]`, L(w_t).
      distances: `[T]`, ‖∇L(w_t) − ∇L(w)‖₂.
      beta: The effective β, the largest ‖∇L(w_t) − ∇L(w)‖/‖w_t − w‖.

    >>> found = along_step(lambda w: w**2, 1.0, 1.0, jnp.array([0.0, 0.5]))    # at w = 1 and 0.5
    >>> found.losses.tolist(), found.distances.tolist(), found.beta.item()
    ([1.0, 0.25], [0.0, 1.0], 2.0)
    """

    losses: Array
    distances: Array
    beta: Array


PARAMS = tree("a pytree of floating arrays", "pass the parameters of the model", jnp.floating)


@checked("along step", params=PARAMS, direction=PARAMS, rates=array("rates [T]", rank=1, most=1))
def along_step(
    loss: Callable[[Any], Array], params: Any, direction: Any, rates: ArrayLike
) -> AlongStep:
    """Walks along a step: w_t = w − t·d for several t.

    How far loss and gradient range along the gradient is figure 4 of Santurkar et al. 2018
    (https://arxiv.org/abs/1805.11604), who call the last the "effective" β-smoothness. It costs
    one gradient per rate and one at the start.

    Args:
      loss: The loss of one batch, a function of the parameters alone.
      params: w, a pytree.
      direction: d, of the same structure: the gradient, or what an optimizer makes of it.
      rates: `[T]`, the t. One at 0, or too small to change w, counts nothing in β.

    Returns:
      `AlongStep`. The range of the loss is `losses.max() - losses.min()`.

    >>> walk = along_step(lambda w: 1.5 * w**2, 2.0, 6.0, jnp.array([0.0, 0.5]))
    >>> walk.losses.tolist(), walk.distances.tolist(), walk.beta.item()
    ([6.0, 1.5], [0.0, 9.0], 3.0)
    """
    check_alike("along step", params, direction)
    params = jax.tree.map(jnp.asarray, params)
    gradient = as_vector(jax.grad(loss)(params))

    def move(w: Array, t: Array, d: ArrayLike) -> Array:
        return (promote(w) - t * promote(d)).astype(w.dtype)

    def measure(t: Array) -> tuple[Array, Array, Array]:
        moved = jax.tree.map(lambda w, d: move(w, t.astype(promote(w).dtype), d), params, direction)
        value, later = jax.value_and_grad(loss)(moved)
        distance = norm(as_vector(later) - gradient)
        length = norm(as_vector(moved) - as_vector(params))
        still = length == 0
        slope = distance / jnp.where(still, 1, length)
        return value, distance, jnp.where(still, 0 * distance, slope)

    losses, distances, slopes = lax.map(measure, promote(jnp.asarray(rates)))
    return AlongStep(losses, distances, slopes.max())


class HessianMax(NamedTuple):
    """The largest eigenvalue of a Hessian.

    Attributes:
      value: λ = v·Hv.
      vector: v, a pytree like the parameters, of length 1.
      steps: How many iterations it took.
      residual: ‖Hv − λv‖: an eigenvalue of H is at most this far from `value`.

    >>> found = hessian_max(lambda w: (w**2).sum(), jnp.ones(8), jax.random.key(0))
    >>> round(found.value.item(), 3), found.residual.item() < 1e-3, found.vector.shape
    (2.0, True, (8,))
    """

    value: Array
    vector: Any
    steps: Array
    residual: Array


@checked(
    "hessian max",
    params=PARAMS,
    steps=integer("a number of iterations, at least 1", "pass an int", 1),
    tol=number("a positive number", "pass for example tol=1e-3", lambda v: 0 < v < 1),
)
def hessian_max(
    loss: Callable[[Any], Array], params: Any, key: Array, *, steps: int = 100, tol: float = 1e-3
) -> HessianMax:
    """The largest eigenvalue of the loss's Hessian, its sharpness (Cohen et al. 2021).

    max v·Hv over ‖v‖ = 1. Gradient descent is stable while it is below 2/lr
    (https://arxiv.org/abs/2103.00065). H is never formed: LOBPCG (Knyazev 2001, in
    `jax.experimental.sparse.linalg`) takes four Hessian-vector products per iteration.

    The eigenvalue is the largest by sign, not by size: along it the loss curves up the most, also
    where a negative one is larger in size, and at a maximum it is negative. The least is
    minus that of `lambda w: -loss(w)`.

    Under `jit` it is compiled once; outside it compiles at every call.

    Args:
      loss: A function of the parameters alone, differentiable twice.
      params: A pytree of more than 5 numbers. Derivatives are taken in float32 at least.
      key: Draws the first direction.
      steps: The most iterations.
      tol: Stops when ‖Hv − λv‖ is below tol·(λ + c), c = 2‖Hv₀‖ for the first direction v₀: with
        many parameters c is about twice the root mean square of the eigenvalues.

    Returns:
      `HessianMax`; where `steps` were not enough, its residual says so.

    Raises:
      ValueError: If there are 5 parameters or fewer.

    >>> def loss(w):
    ...     return 0.5 * (jnp.array([1.0, -9.0, 2.0, 4.0, 0.0, 3.0]) * w**2).sum()
    >>> hessian_max(loss, jnp.ones(6), jax.random.key(0)).value.round(3).item()
    4.0
    """
    # Imported here: it loads parts of SciPy that nothing else in this library needs.
    from jax.experimental.sparse.linalg import lobpcg_standard

    w, unravel = ravel_pytree(jax.tree.map(promote, params))
    n = w.size
    if n <= 5:
        raise invalid(
            "hessian max",
            f"{n} parameters",
            "more than 5, as the iteration needs",
            "write out so small a Hessian: jnp.linalg.eigvalsh(jax.hessian(loss)(params))",
        )
    _, hvp = jax.linearize(jax.grad(lambda w: loss(unravel(w))), w)
    v = jax.random.normal(key, (n,), w.dtype)
    # H + c·I has a positive largest eigenvalue: for a negative definite H, ‖Hv‖ ≥ |λ_max|·‖v‖.
    # The library's test of convergence, and the zeros it pads its basis with, need that.
    c = 2 * norm(hvp(v / norm(v)))
    c = jnp.where(c == 0, 1, c)
    shifted = jax.vmap(lambda v: hvp(v) + c * v, in_axes=1, out_axes=1)
    # It stops below 10·n·tol·(θ + ‖Av‖), which is 20·n·tol·θ for an eigenvector.
    _, vectors, count = lobpcg_standard(shifted, v[:, None], steps, tol / (20 * n))
    v = vectors[:, 0]
    hv = hvp(v)
    value = (v * hv).sum()
    return HessianMax(value, unravel(v), count, norm(hv - value * v))
