"""Weight norm in libraries that have the units first: kernels `[C, K, ...]`, gains `[C, 1, ...]`.

normlab, like Flax, has the units last and the positions first: `[..., K, C]`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from normlab._checks import invalid
from normlab.convert.leaves import vector
from normlab.convert.value import Converted, check
from normlab.equation import Affine


def from_units_first(where: str, kernel: Array, g: Array, b: Array | None) -> Converted:
    """Returns weight norm from a kernel, a gain and a bias of such a library.

    Raises:
      ValueError: If the gain is not one per unit.
    """
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


def to_units_first(norm: Converted, lost: dict[str, str]) -> tuple[Array, Array, Array | None]:
    """Returns the kernel, the gain and the bias `[C]`; the inverse of `from_units_first`.

    Adds to `lost` that these libraries always have a gain.
    """
    kernel = norm.kernel
    assert kernel is not None  # checked before
    first = kernel.transpose(-1, -2, *range(kernel.ndim - 2))
    g, b = norm.params
    if g is None:
        lost["gain"] = "none: the other library always has one, which would be 1"
        g = jnp.ones(kernel.shape[-1:], kernel.dtype)
    return first, g.reshape(-1, *[1] * (kernel.ndim - 1)), b
