"""Parts written into the kernel and the bias of the linear layer before them."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from normlab._arguments import checked
from normlab._checks import expand, normalize_axes, promote_dtype
from normlab.equation import ANY_PARTS, Parts
from normlab.errors import invalid
from normlab.matrix import MatrixParts


@checked("fold", parts=ANY_PARTS)
def fold(
    parts: Parts | MatrixParts, kernel: Array, bias: Array | None = None, *, unit_axis: int = -1
) -> tuple[Array, Array]:
    """Writes the parts into the linear layer before them, so that they cost nothing at inference.

    With k = g/σ per channel, `affine(parts, linear(x, kernel) + bias)` equals
    `linear(x, kernel·k) + (bias − μ)·k + b` (Ioffe & Szegedy 2015, section 3.1). Where W stands for
    1/σ, the kernel's units are mixed by g·W.

    Args:
      parts: Parts that are numbers or vary along the channels alone, such as batch norm's with
        `train=False`. Parts that depend on the example cannot be folded: `fold_norm` finds them.
      kernel: `[..., K, C]`: of a dense layer or of any convolution, also grouped or transposed.
      bias: `[C]`, the layer's own bias; `None` for none.
      unit_axis: Where `kernel` has its `C` units, if not last: 0 in torch (1 in its
        transposed convolutions), -2 in a transposed convolution with a kernel `[..., C, K]`.

    Returns:
      `(kernel, bias)` of the folded layer, in the shape of `kernel` and `[C]`.

    Raises:
      ValueError: If a part varies along anything but `C` channels, or the bias is not `[C]`.

    >>> parts = Parts(*map(jnp.float32, (1.0, 2.0, 4.0, 10.0)))
    >>> kernel, bias = fold(parts, jnp.array([[3.0], [5.0]]))
    >>> kernel.tolist(), bias.tolist()
    ([[6.0], [10.0]], [8.0])
    """
    (unit_axis,) = normalize_axes("fold", unit_axis, kernel.ndim)
    channels = kernel.shape[unit_axis]
    vectors = {n: v for n, v in parts._asdict().items() if n in Parts._fields}
    if not isinstance(parts, Parts) and parts.matrix.shape[:-3] not in ((), (1,)):
        vectors["matrix"] = parts.matrix
    for name, part in vectors.items():
        shape = jnp.shape(part)
        by_example = len(shape) > 1 and shape[0] != 1
        if (
            jnp.size(part) not in (1, channels)
            or max(shape, default=1) != jnp.size(part)
            or by_example
        ):
            raise invalid(
                "fold",
                f"a {name} of shape {shape}",
                f"one value for each of the kernel's {channels} output channels",
                "take parts that do not depend on the examples, as batch norm's with train=False, "
                "and set unit_axis if the kernel does not have its units last",
            )
    if bias is not None and bias.shape != (channels,):
        raise invalid(
            "fold",
            f"a bias of shape {bias.shape} for a kernel of shape {kernel.shape}",
            f"shape ({channels},)",
            "pass the bias of the same layer, and set unit_axis if the units are not last",
        )
    vectors = {n: jnp.broadcast_to(jnp.ravel(v), channels) for n, v in vectors.items()}
    if not isinstance(parts, Parts):
        dtype = jnp.promote_types(promote_dtype(kernel), parts.matrix.dtype)
        rows = parts._replace(channel_axis=-1, **vectors)
        zero = jnp.zeros((1, channels), dtype)
        bias = rows.apply(zero if bias is None else bias.astype(dtype)[None])[0]
        units = jnp.moveaxis(kernel.astype(dtype), unit_axis, -1)
        units = rows._replace(mu=zero[0], b=zero[0]).apply(units)
        return jnp.moveaxis(units, -1, unit_axis).astype(kernel.dtype), bias
    mu, sigma, g, b = vectors.values()
    dtype = jnp.promote_types(promote_dtype(kernel), (g / sigma).dtype)
    k = (g / sigma).astype(dtype)
    bias = jnp.zeros(channels, dtype) if bias is None else bias.astype(dtype)
    scaled = kernel.astype(dtype) * expand(k, kernel.ndim, unit_axis)
    return scaled.astype(kernel.dtype), (bias - mu.astype(dtype)) * k + b.astype(dtype)


def rounding(
    shape: tuple[int, ...], stored: list[Any], unit_axis: int = -1, mixed: int = 0
) -> float:
    """How much of its Σ|w·x| + |b| rounding adds at most to a layer, before and after folding.

    2·(K + 16) units of roundoff for the sums, in float32 at least, and 8 for what is stored or
    handed on, in the coarsest type of `stored`; K is greater by the number of units that are mixed.
    """
    fan_in = math.prod(shape) // shape[unit_axis] + mixed
    fine, coarse = (pick(float(jnp.finfo(t).eps) / 2 for t in stored) for pick in (min, max))
    return 2 * (fan_in + 16) * min(fine, 2.0**-24) + 8 * coarse


def check_finite(where: str, kernel: Array, bias: Array) -> None:
    """Raises ValueError unless both are finite."""
    for name, value in (("kernel", kernel), ("bias", bias)):
        if not bool(jnp.isfinite(value).all()):
            raise invalid(
                where,
                f"a norm whose folded {name} is not finite in {value.dtype}",
                "finite statistics, and g/σ within the range of the type",
                f"check the norm's statistics and gain, or cast the layer's {name} to float32",
            )
