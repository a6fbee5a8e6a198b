"""What every norm asks of its input, and how it says no.

A message names the norm, the value given, what was expected and what to change.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def invalid(where: str, given: str, expected: str, change: str) -> ValueError:
    """Returns the one form of error this library raises for a bad value."""
    return ValueError(f"{where}: got {given}; expected {expected}. To fix it, {change}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `did you mean 'x'? Known: ...` for a word that is not among `known`."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(known)}"


def result_dtype(x: ArrayLike) -> Any:
    """The floating type of `x`; float32 for integers and booleans."""
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise invalid("normlab", f"a {dtype} array", "a real one", "normalize its parts apart")
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)


def promote_dtype(x: ArrayLike) -> Any:
    """The type in which the statistics of `x` are taken."""
    dtype = result_dtype(x)
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def promote(x: ArrayLike) -> Array:
    """Casts to the type in which statistics are taken: float32 at least; float64 stays."""
    return jnp.asarray(x).astype(promote_dtype(x))


def floating(x: ArrayLike) -> Array:
    """Returns `x` in its floating type; integers and booleans as float32."""
    return jnp.asarray(x).astype(result_dtype(x))


def normalize_axes(where: str, axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Returns `axes` as sorted, non-negative, distinct integers.

    Raises:
      ValueError: If one is out of range or repeated.
    """
    given = axes
    try:
        axes = tuple(map(operator.index, axes if isinstance(axes, Sequence) else (axes,)))
    except TypeError:
        axes = (ndim,)  # there is no such axis
    if not all(-ndim <= axis < ndim for axis in axes):
        raise invalid(
            where,
            f"axes {given!r} for an array of rank {ndim}",
            f"axes between {-ndim} and {ndim - 1}",
            "name only axes the array has",
        )
    axes = tuple(sorted(axis % ndim for axis in axes))
    if len(set(axes)) != len(axes):
        raise invalid(where, f"axes {given!r}", "distinct axes", "name each axis once")
    return axes


def expand(v: Array, ndim: int, channel_axis: int) -> Array:
    """Reshapes `C` values to broadcast along `channel_axis` of an array of rank `ndim`."""
    shape = [1] * ndim
    shape[channel_axis] = -1
    return v.reshape(shape)


def gain_and_bias(where: str, params: Any, a: ArrayLike, channel_axis: int) -> tuple[Array, Array]:
    """Returns `(g, b)` in the statistics' type, broadcastable to `a`; 1 and 0 where absent.

    Args:
      where: The norm's name, for the error.
      params: An `Affine`, or `None` for neither gain nor bias.
      a: `[N, ..., C]`.
      channel_axis: Where `a` has its channels.

    Raises:
      ValueError: If a field is not a floating `[C]`.
    """
    shape, dtype = jnp.shape(a), promote_dtype(a)
    if params is not None and not (hasattr(params, "g") and hasattr(params, "b")):
        raise invalid(
            where,
            f"params of type {type(params).__name__}",
            "an Affine(g, b), or None",
            "make them with init_affine(channels), or wrap yours: Affine(g=scale, b=bias)",
        )
    out = []
    for name, default in (("g", 1), ("b", 0)):
        value = None if params is None else getattr(params, name)
        if value is None:
            out.append(jnp.full((), default, dtype))
            continue
        channels = shape[channel_axis]
        if jnp.shape(value) != (channels,):
            raise invalid(
                where,
                f"{name} of shape {jnp.shape(value)} for an input of shape {shape} with its "
                f"channels on axis {channel_axis}",
                f"shape ({channels},)",
                f"make the parameters with init_affine({channels}), or set channel_axis",
            )
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise invalid(
                where,
                f"{name} of type {jnp.result_type(value)}",
                "a floating type",
                f"cast it, for example {name}.astype(jnp.float32)",
            )
        out.append(expand(value.astype(dtype), len(shape), channel_axis))
    return out[0], out[1]
