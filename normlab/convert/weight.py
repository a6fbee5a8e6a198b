"""Weight norm, whose kernels lie in two ways.

Units last, `[..., K, C]`, in normlab and in Flax; units first, `[C, K, ...]` with gains
`[C, 1, ...]`, in equinox and torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from normlab.convert.leaves import given, take, vector
from normlab.convert.library import refuse
from normlab.convert.value import Converted, check
from normlab.equation import Affine
from normlab.errors import invalid

EPSILON = 1e-12
"""Flax's default ε."""

Wanted = Mapping[str, str]
"""normlab's `kernel`, `g` and `b` -> the library's leaves; the bias is read if it is there."""


def from_units_last(
    where: str,
    leaves: Mapping[str, Any],
    wanted: Wanted,
    within: Sequence[str],
    values: Mapping[str, Any],
    allow: Sequence[str],
) -> Converted:
    """Returns weight norm of Flax, whose arguments are `values`; `within` as in `take`."""
    names = {n: v for n, v in wanted.items() if n != "g" or values["use_scale"]}
    kernel, g, b = _take(where, leaves, names, within)
    refuse(where, _lost_epsilon(kernel, values["epsilon"]), allow)
    return check(where, Converted("weight", Affine(g, b), kernel=kernel))


def to_units_last(
    where: str, norm: Converted, allow: Sequence[str]
) -> tuple[dict[str, Array], Array | None, dict[str, Any]]:
    """Returns the leaves of Flax's wrapped layer, the gain, and the wrapper's arguments."""
    refuse(where, _lost_epsilon(norm.kernel, EPSILON), allow)
    g, b = norm.params
    arguments = {"epsilon": EPSILON, "use_scale": g is not None}
    return given({"kernel": norm.kernel, "bias": b}), g, arguments


def from_units_first(
    where: str, leaves: Mapping[str, Any], wanted: Wanted, within: Sequence[str]
) -> Converted:
    """Returns weight norm of a library that has the units first.

    Raises:
      ValueError: If the gain is not one per unit.
    """
    kernel, g, b = _take(where, leaves, wanted, within)
    assert g is not None  # it is wanted
    if kernel.ndim < 2 or g.shape != (kernel.shape[0], *[1] * (kernel.ndim - 1)):
        raise invalid(
            where,
            f"a gain of shape {g.shape} for a kernel of shape {kernel.shape}",
            "one gain for each entry of the kernel's first axis, the units",
            "convert a layer with weight norm over all axes but the first (dim=0, axis=0)",
        )
    if b is not None and b.size != kernel.shape[0]:
        raise invalid(
            where,
            f"a bias of shape {b.shape} for a kernel of shape {kernel.shape}",
            "one value for each entry of the kernel's first axis, the units",
            "convert the kernel that it computes, if it is of a transposed convolution, which has "
            "its inputs first",
        )
    params = Affine(vector(where, "the gain", g), b if b is None else vector(where, "the bias", b))
    last = kernel.transpose(*range(2, kernel.ndim), 1, 0)
    return check(where, Converted("weight", params, kernel=last))


def to_units_first(norm: Converted, lost: dict[str, str]) -> dict[str, Any]:
    """Returns `kernel`, `g` and `b` `[C]`; these libraries always have a gain: `lost`."""
    kernel = norm.kernel
    assert kernel is not None  # checked before
    g, b = norm.params
    if g is None:
        lost["gain"] = "none: the other library always has one, which would be 1"
        g = jnp.ones(kernel.shape[-1:], kernel.dtype)
    first = kernel.transpose(-1, -2, *range(kernel.ndim - 2))
    return {"kernel": first, "g": g.reshape(-1, *[1] * (kernel.ndim - 1)), "b": b}


def _take(
    where: str, leaves: Mapping[str, Any], wanted: Wanted, within: Sequence[str]
) -> tuple[Array, Array | None, Array | None]:
    names = {ours: name for ours, name in wanted.items() if ours != "b" or name in leaves}
    found = take(where, leaves, names, within)
    return found["kernel"], found.get("g"), found.get("b")


def _lost_epsilon(kernel: Any, eps: float) -> dict[str, str]:
    """What is lost with Flax's ε in σ = √(‖v‖² + ε): nothing, if it is below rounding."""
    square = np.square(np.asarray(kernel, np.float64)).sum(axis=tuple(range(kernel.ndim - 1)))
    smallest = square[square > 0].min(initial=np.inf)
    if eps <= smallest * 2.0**-24:
        return {}
    text = f"{eps:g} under the root, where a unit has ‖v‖² = {smallest:.3g}: normlab has no ε there"
    return {"epsilon": text}
