"""Statistics of the backward pass: what the gradient finds, and what it is given beside.

With z = a/σ and g = ∂L/∂z batch norm about zero has the gradient

    ∂L/∂a = (g − ⟨g·z⟩·z)/σ

of which ⟨g·z⟩, over the batch, is a statistic as noisy as σ. MABN and PowerNorm take averages over
many batches in its place. What they need is a *tap*: zeros in the state, whose gradient is ⟨g·z⟩.

    taps = nl.population.taps(states)
    loss = lambda params, taps: ... nl.population.tapped(states, taps) ...
    grads, seen = jax.grad(loss, (0, 1))(params, taps)
    states = nl.population.take_back(states, seen)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from normlab._arguments import checked, tree
from normlab._trees import node
from normlab._weights import leave_out
from normlab.devices.mapped import vary, varying_axes
from normlab.errors import invalid
from normlab.population.optional import is_population


@node
class Tap(NamedTuple):
    """Zeros, whose gradient says what the backward pass has met.

    Over devices each has its share: their sum is the mean over all the examples.

    Attributes:
      gz: `[C]`, the mean of g·z, where g is the gradient by z.
      zz: `[C]`, the mean of z².

    >>> from normlab import batch_norm
    >>> from normlab.population import init_power
    >>> a, state = jnp.array([[1.0], [3.0]]), init_power(1)
    >>> def loss(taps):
    ...     return batch_norm(a, None, tapped(state, taps), train=True)[0].sum()
    >>> seen = jax.grad(loss)(taps(state))                       # g = 1, z = a
    >>> seen.gz.round(3).tolist(), seen.zz.round(3).tolist()
    ([2.0], [5.0])
    """

    gz: Array
    zz: Array


def no_tap(like: Array) -> Tap:
    """A tap for statistics `[C]`."""
    return Tap(jnp.zeros_like(like), jnp.zeros_like(like))


def watched(
    sigma: Array, a: Array, weights: Array | None, back: tuple[Array, Array, Tap], count: Array
) -> Array:
    """σ as it is, with a gradient by `a` of −ν·a/scale² beside its own, and one by the tap.

    No function has this derivative, so there is none forward.

    Args:
      sigma: σ, broadcastable to `a`.
      a: The pre-activation.
      weights: Of the rank of `a`, or `None`.
      back: ν, scale and the tap, with the channels on their axis of `a`.
      count: Of how many values, with all devices, the means of the tap are.
    """
    a = leave_out(a, weights)
    weights = None if weights is None else weights.astype(sigma.dtype)
    names = tuple(sorted(varying_axes(a)))  # or JAX would add the devices' cotangents up itself
    sigma, *others = vary((sigma, weights, *back, count.astype(sigma.dtype)), names)
    return _watched(sigma, a, *others)


@jax.custom_vjp
def _watched(
    sigma: Array,
    a: Array,
    weights: Array | None,
    nu: Array,
    scale: Array,
    tap: Tap,
    count: Array,
) -> Array:
    del a, weights, nu, scale, tap, count
    return sigma


def _forward(sigma: Array, *others: Any) -> tuple[Array, Any]:
    return sigma, (sigma, *others)


def _backward(kept: Any, ds: Array) -> Any:
    sigma, a, weights, nu, scale, tap, count = kept
    a1 = a.astype(sigma.dtype)
    weighed = a1 if weights is None else weights * a1
    others = [i for i, n in enumerate(tap.gz.shape) if n == 1]
    n = jnp.where(count > 0, count, 1)
    gz = -(sigma * ds).sum(others, keepdims=True) / n  # dL/dσ = −Σ g·z/σ
    zz = (weighed / sigma * (a1 / sigma)).sum(others, keepdims=True) / n
    da = -(weighed / scale) * (nu / scale)
    rest = jax.tree.map(jnp.zeros_like, (weights, nu, scale, tap, count))
    gz, zz = jnp.broadcast_to(gz, tap.gz.shape), jnp.broadcast_to(zz, tap.zz.shape)
    return ds, da.astype(a.dtype), *rest[:3], Tap(gz, zz), rest[4]


_watched.defvjp(_forward, _backward)


def _is_tapped(leaf: Any) -> bool:
    return is_population(leaf) and hasattr(leaf, "take_back")


def _each(where: str, f: Any, states: Any, *others: Any) -> Any:
    found = jax.tree.leaves(states, is_leaf=_is_tapped)
    if not any(map(_is_tapped, found)):
        given, change = "a tree without backward statistics", 'make them by population="mabn"'
        raise invalid(where, given, "states that have a tap, of MABN or PowerNorm", change)
    return jax.tree.map(f, states, *others, is_leaf=_is_tapped)


def _tap(where: str, tap: Any) -> Tap:
    if not isinstance(tap, Tap):
        given = f"{type(tap).__name__} for a state with a tap"
        raise invalid(where, given, "a Tap for each", "pass taps(states), or the gradient by it")
    return tap


TAPS = tree("what taps(states) returned, or its gradient", "pass that")


@checked("taps")
def taps(states: Any) -> Any:
    """The taps of all states that have one: a pytree of zeros, to be differentiated by.

    Args:
      states: A state, or a pytree of states.

    Returns:
      The same pytree, with a `Tap` in place of each state that has one, and `None` of all else.

    Raises:
      ValueError: If none has one.

    >>> from normlab import init_running
    >>> from normlab.population import init_power
    >>> found = taps({"first": init_running(1), "second": init_power(1)})
    >>> found["second"].gz.tolist()
    [0.0]
    """
    return _each("taps", lambda s: s.tap if _is_tapped(s) else None, states)


@checked("tapped", taps=TAPS)
def tapped(states: Any, taps: Any) -> Any:
    """The states with these taps, for use in the function that is differentiated by them.

    Args:
      states: A state, or a pytree of states.
      taps: Of `taps(states)`.

    >>> from normlab.population import init_power
    >>> state = init_power(1)
    >>> tapped(state, taps(state)).tap.gz.tolist()
    [0.0]
    """

    def put(state: Any, tap: Any) -> Any:
        return state._replace(tap=_tap("tapped", tap)) if _is_tapped(state) else state

    return _each("tapped", put, states, taps)


@checked("take back", seen=TAPS)
def take_back(states: Any, seen: Any) -> Any:
    """Takes in what the backward pass has met.

    What is not finite is left out, norm by norm.

    Args:
      states: The states that the forward pass returned.
      seen: The gradient by the taps; over devices their sum (`normlab.devices.global_gradient`).

    >>> import jax
    >>> from normlab import batch_norm
    >>> from normlab.population import init_power
    >>> a, state = jnp.array([[1.0], [3.0]]), init_power(1)
    >>> def loss(taps):
    ...     h, new = batch_norm(a, None, tapped(state, taps), train=True)
    ...     return (h**2).sum(), new
    ...
    >>> seen, state = jax.grad(loss, has_aux=True)(taps(state))
    >>> state = take_back(state, seen)
    >>> state.tap.gz.tolist()  # zero again, for the next step
    [0.0]
    """

    def one(state: Any, seen: Any) -> Any:
        if not _is_tapped(state):
            return state
        seen = _tap("take back", seen)
        good = jnp.isfinite(jnp.stack(seen)).all()
        seen = jax.tree.map(lambda v: jnp.where(good, v, 0), seen)
        new = state.take_back(seen)._replace(tap=jax.tree.map(jnp.zeros_like, state.tap))
        old = state._replace(tap=new.tap)
        return jax.tree.map(lambda v, w: jnp.where(good, v, w), new, old)

    return _each("take back", one, states, seen)
