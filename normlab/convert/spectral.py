"""Spectral norm, which six libraries have, and of which each means something else.

    torch, equinox    keep u and v, make no step at evaluation, and take σ̂ = uᵀWv; a step
                      renews u first (`order`), but for torch's elder form
    linen, haiku      keep u, and make steps at evaluation too: `update_stats`
    nnx, Keras        write W/σ̂ back to the kernel: `projection`; Keras divides by no σ̂ else

haiku and Flax add ε to the square of a length, the others take the larger of the two. normlab keeps
u and v, makes no step at evaluation, has no ε, and never writes the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from normlab._checks import promote
from normlab.convert.library import refuse
from normlab.convert.value import Converted, check
from normlab.equation import Affine
from normlab.family.spectral import First, Spectral, measure_spectral, of_u
from normlab.linear import Dense

EPSILON = 1e-12
"""The ε of most."""

SEEN = 2.0**-20
"""What shows in σ̂, relative to it."""

Losses = Mapping[str, str]


def from_vectors(
    where: str,
    found: Mapping[str, Array],
    steps: int,
    eps: float,
    allow: Sequence[str],
    *,
    first: First = "v",
    squared: bool = False,
    moves: bool = False,
    writes: bool = False,
    divides: bool = True,
) -> Converted:
    """Returns the norm of a kernel `[..., K, C]`, of u, and of v if there is one.

    Args:
      where: The converter.
      found: `kernel`, `u`, and `v` and `b` if there are any; u and v in any shape.
      steps: The steps of a training call.
      eps: The library's ε.
      allow: The conventions that may be lost.
      first: Which vector its steps renew first.
      squared: Whether ε is added to the square of a length.
      moves: Whether the library makes steps at evaluation too.
      writes: Whether it writes the kernel.
      divides: Whether it divides by σ̂ at evaluation.
    """
    w = promote(found["kernel"])
    u = found["u"].reshape(-1)
    state = of_u(u, w)
    if abs(float(jnp.linalg.norm(promote(u))) - 1) < 1e-5:  # as it is, to the bit
        state = state._replace(u=u)
    if "v" in found:
        state = state._replace(v=found["v"].reshape(w.shape[:-1]))
    state = Spectral(*(v.astype(found["u"].dtype) for v in state))
    params, kernel = Affine(None, found.get("b")), found["kernel"]
    norm = Converted("spectral", params, state, kernel, steps=steps, first=first)
    lost = {**_lost(norm, eps, squared=squared, moves=moves), **_written(norm, writes, divides)}
    if "v" in found and float(_sigma_of(norm)) != float(_product(norm)):
        lost["v"] = "uᵀWv is not positive: u and v are of another kernel"
    refuse(where, lost, allow)
    return check(where, norm)


def to_vectors(
    where: str,
    norm: Converted,
    allow: Sequence[str],
    *,
    first: First = "v",
    squared: bool = False,
    moves: bool = False,
    writes: bool = False,
) -> dict[str, Array]:
    """Returns `kernel`, `u`, `v`, `sigma`, and `b` if there is one; arguments as `from_vectors`."""
    check(where, norm)
    lost = {**_lost(norm, EPSILON, squared=squared, moves=moves), **_written(norm, writes, True)}
    one, other = (float(_sigma_of(norm._replace(first=f), moved=True)) for f in (norm.first, first))
    if abs(one - other) > SEEN * one:
        text = f"a step renews {first} before the other, normlab's {norm.first}"
        lost["order"] = f"{text}: the next σ̂ in training is {other:.6g} and not {one:.6g}"
    if norm.params.g is not None:
        lost["gain"] = "the other library's spectral norm has none"
    if not np.any(norm.state.v):
        lost["v"] = "no step has been made, and the other library makes none at first: train it"
    refuse(where, lost, allow)
    assert norm.kernel is not None  # checked before
    leaves = {"kernel": norm.kernel, "u": norm.state.u, "v": norm.state.v, "b": norm.params.b}
    leaves["sigma"] = _sigma_of(norm).astype(norm.state.u.dtype)
    return {name: v for name, v in leaves.items() if v is not None}


def units_last(v: Array) -> Array:
    """A kernel `[C, K, *window]` as `[*window, K, C]`."""
    return v.transpose(*range(2, v.ndim), 1, 0)


def units_first(v: Array) -> Array:
    """Undoes `units_last`."""
    return v.transpose(-1, -2, *range(v.ndim - 2))


def window_last(v: Array) -> Array:
    """The v `[*window, K]` of a kernel, flat in the order of `[K, *window]`."""
    return jnp.moveaxis(v, -1, 0).reshape(-1)


def window_first(v: Array, kernel: Array) -> Array:
    """Undoes `window_last`, for a kernel `[*window, K, C]`."""
    *window, channels, _ = kernel.shape
    return jnp.moveaxis(v.reshape(channels, *window), 0, -1)


def _sigma_of(norm: Converted, *, moved: bool = False) -> Array:
    """σ̂ at evaluation; `moved` by as many steps as in a training call."""
    how: Any = {"linear": Dense(), "x": None, "of": "matrix", "bound": None, "through": True}
    how |= {"steps": norm.steps, "warm": 0, "train": moved, "first": norm.first}
    return measure_spectral(promote(norm.kernel), norm.state, **how)[0].sigma  # pyright: ignore


def _product(norm: Converted) -> Array:
    """uᵀWv, as the norm's own inference has it."""
    w = promote(norm.kernel)  # pyright: ignore[reportArgumentType]
    u, v = (side.astype(w.dtype) for side in norm.state)
    return (u * (w * v[..., None]).sum(range(w.ndim - 1))).sum()


def _lost(norm: Converted, eps: float, *, squared: bool, moves: bool) -> Losses:
    sigma, lost = float(_sigma_of(norm)), {}
    if moves:
        moved = float(_sigma_of(norm, moved=True))
        if abs(moved - sigma) > SEEN * abs(sigma):
            text = f"it makes {norm.steps} steps at evaluation too, to σ̂ = {moved:.6g} from "
            lost["update_stats"] = f"{text}{sigma:.6g}; train on until they agree"
    if eps > (sigma**2 * SEEN if squared else sigma):
        place = "to the square of a length" if squared else "as the least length"
        lost["eps"] = f"{eps:g} {place}, where σ̂ = {sigma:.3g}: normlab has no ε there"
    return lost


def _written(norm: Converted, writes: bool, divides: bool) -> Losses:
    sigma, lost = float(_sigma_of(norm)), {}
    if writes:
        text = "it writes W/σ̂ to the kernel in training, whose gradients are of another point"
        lost["projection"] = f"{text}: normlab's kernel stays"
    if not divides and abs(sigma - 1) > SEEN:
        lost["sigma"] = f"{sigma:.6g}, by which it does not divide at evaluation"
    return lost
