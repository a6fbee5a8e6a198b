"""A call of a Flax norm: its axes, mask and types, and what is done with what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab._checks import invalid, normalize_axes, promote, promote_dtype, result_dtype
from normlab._flax.words import read
from normlab.devices.topology import AxisName, Sync
from normlab.equation import Parts, affine
from normlab.measure import Algorithm

Axes = int | Sequence[int]


class Call(NamedTuple):
    """A call of a Flax norm.

    Attributes:
      where: The module's name, for errors.
      x: The input, in the type in which it is to be normalized: never narrower than it came.
      features: The axes along which scale and bias vary.
      weights: Of the rank of `x`, or `None`.
      dtype: The type of the result.
    """

    where: str
    x: Array
    features: tuple[int, ...]
    weights: Array | None
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of scale and bias: a size for each of the feature axes."""
        return tuple(self.x.shape[i] for i in self.features)

    @property
    def others(self) -> tuple[int, ...]:
        """All the axes that are not the features'."""
        return tuple(i for i in range(self.x.ndim) if i not in self.features)


def feature_shape(where: str, x: ArrayLike, features: Axes) -> tuple[int, ...]:
    """The shape of scale and bias: a size for each of the feature axes."""
    shape = jnp.shape(read(where, "x", x))
    return tuple(shape[i] for i in normalize_axes(where, features, len(shape)))


def make_call(
    where: str, x: ArrayLike, features: Axes, mask: Any, dtype: Any, *params: Any
) -> Call:
    """Returns the call of a module.

    Args:
      where: The module's name.
      x: The input.
      features: The feature axes.
      mask: What is to count, or `None`.
      dtype: That of the result; `None` for the one to which `x` and `params` promote.
      *params: Scale and bias, `None` for one that is absent.

    Raises:
      ValueError: If an axis is not there, the mask does not fit, or a type is not a real one.
    """
    x = jnp.asarray(read(where, "x", x))
    out = output_dtype(where, x, dtype, params)
    features = normalize_axes(where, features, x.ndim)
    return Call(where, operand(x, out), features, weights(where, mask, x.shape), out)


def output_dtype(where: str, x: Array, dtype: DTypeLike | None, params: Sequence[Any]) -> Any:
    result_dtype(x)  # refuses what is not real
    if dtype is None:
        found = together(x, *(p for p in params if p is not None))
        return found if jnp.issubdtype(found, jnp.floating) else jnp.dtype(jnp.float32)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise invalid(where, f"dtype={dtype!r}", "a real floating type", "use jnp.float32")
    return jnp.dtype(dtype)


def together(*arrays_or_types: Any) -> Any:
    """The type to which all promote, as Flax's modules let them."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays_or_types)


def operand(x: Array, out: Any) -> Array:
    """`x` as it is measured: rounded to no narrower type before it is normalized."""
    if x.dtype == out:
        return x
    x = promote(x)
    return x.astype(out) if jnp.finfo(out).bits > jnp.finfo(x.dtype).bits else x


def weights(where: str, mask: Any, shape: tuple[int, ...]) -> Array | None:
    """The mask in the rank of the input: as NumPy broadcasts it, or aligned with the first axes.

    Raises:
      ValueError: If it fits in neither way, or in both.
    """
    if mask is None:
        return None
    mask = jnp.asarray(read(where, "mask", mask))
    lead = mask.shape == shape[: mask.ndim]
    try:
        trail = jnp.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        trail = False
    if lead == trail and mask.ndim < len(shape):
        given = f"a mask of shape {mask.shape} for an input of shape {shape}"
        if lead:
            raise invalid(
                where,
                f"{given}, which could mean its first axes or its last",
                "a mask that can be read in one way",
                f"give it the rank {len(shape)}, such as mask[..., None] for the first axes",
            )
        raise invalid(where, given, "one that broadcasts to it", "give it the rank of the input")
    if trail:
        return mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))


def sync(where: str, axis_name: AxisName | None, groups: Any) -> AxisName | None:
    """Returns what `axis_name` and `axis_index_groups` mean together.

    Raises:
      ValueError: For groups without a name, or with a `Sync`, which says its own.
    """
    if groups is None:
        return axis_name
    if axis_name is None or isinstance(axis_name, Sync):
        raise invalid(
            where,
            f"axis_index_groups with axis_name={axis_name!r}",
            "the name of the axis whose devices are grouped",
            "pass axis_name as well, or axis_name=Sync(axis, groups=...) alone",
        )
    return Sync(axis_name, groups=groups)


def algorithm(use_fast_variance: bool) -> Algorithm:
    """Both are safe at any mean; `use_fast_variance=False` is the exact one."""
    return "auto" if use_fast_variance else "two_pass"


def apply(call: Call, parts: Parts, scale: Array | None, bias: Array | None) -> Array:
    """Returns h = scale · (x − μ) / σ + bias, in the type of the result.

    Raises:
      ValueError: If scale or bias do not fit the features.
    """
    shape = [n if i in call.features else 1 for i, n in enumerate(call.x.shape)]

    def along(name: str, v: Array | None, absent: Array) -> Array:
        if v is None:
            return absent
        check_features(call, name, v.size)
        return v.astype(promote_dtype(call.x)).reshape(shape)

    g, b = along("scale", scale, parts.g), along("bias", bias, parts.b)
    parts = parts._replace(g=g, b=b)
    return affine(parts, call.x, weights=call.weights).astype(call.dtype)


def check_features(call: Call, name: str, given: int) -> None:
    """Raises ValueError unless there are as many features as `given`."""
    size = int(np.prod(call.shape))
    if given != size:
        raise invalid(
            call.where,
            f"{name} of {given} for an input of shape {call.x.shape}",
            f"{size}, its features on axes {call.features}",
            "make the module for the features of its input, or change the axes",
        )
