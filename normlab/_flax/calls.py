"""A call of a Flax norm: its axes, mask and types, and what is done with what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab._arguments import check_added
from normlab._checks import normalize_axes, promote, promote_dtype, result_dtype
from normlab._flax.words import read
from normlab.devices.topology import Sync
from normlab.equation import Parts, affine
from normlab.errors import invalid
from normlab.implementation import Implementation
from normlab.measure import Algorithm
from normlab.sharded import ExampleAxes, Sharded, channels_in_all

Axes = int | Sequence[int]


class Call(NamedTuple):
    """A call of a Flax norm.

    Attributes:
      where: The module's name, for errors.
      x: The input, in the type in which it is to be normalized: never narrower than it came.
      features: The axes along which scale and bias vary.
      weights: Of the rank of `x`, or `None`.
      dtype: The type of the result.
      eps: ε > 0.
      over: The named axes along which the batch lies, or each example.
      algorithm: How a variance is taken.
      implementation: By XLA or by a kernel.
    """

    where: str
    x: Array
    features: tuple[int, ...]
    weights: Array | None
    dtype: Any
    eps: float
    over: ExampleAxes | None
    algorithm: Algorithm
    implementation: Implementation

    @property
    def shape(self) -> tuple[int, ...]:
        """That of scale and bias: a size for each of the feature axes."""
        return tuple(self.x.shape[i] for i in self.features)

    @property
    def others(self) -> tuple[int, ...]:
        """All the axes that are not the features'."""
        return tuple(i for i in range(self.x.ndim) if i not in self.features)


def feature_shape(where: str, x: ArrayLike, features: Axes | None) -> tuple[int, ...]:
    """The shape of scale and bias: a size for each of the feature axes, if there are any."""
    features = () if features is None else features
    shape = jnp.shape(read(where, "x", x))
    return tuple(shape[i] for i in normalize_axes(where, features, len(shape)))


def make_call(
    norm: Any, where: str, x: ArrayLike, features: Axes, mask: Any, dtype: Any, *params: Any
) -> Call:
    """Returns the call of the module `norm` with features on these axes, and this mask or `None`.

    The result is of the type `dtype`; of the one to which `x` and `params`, scale and bias, promote
    for `None`. Raises ValueError if an axis is not there, the mask does not fit, a type is not a
    real one, or ε is too small.
    """
    x = jnp.asarray(read(where, "x", x))
    out = output_dtype(where, x, dtype, params)
    features = normalize_axes(where, features, x.ndim)
    x = operand(x, out)
    eps = read(where, "eps", norm.epsilon)
    check_added(where, eps, x)
    return Call(
        where,
        x,
        features,
        weights(where, mask, x.shape),
        out,
        eps,
        sync(where, norm.axis_name, norm.axis_index_groups),
        # Both are safe at any mean; `use_fast_variance=False` is the exact one.
        "auto" if norm.use_fast_variance else "two_pass",
        read(where, "implementation", norm.implementation),
    )


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

    Raises ValueError if it fits in neither way, or in both.
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


def sync(where: str, axis_name: ExampleAxes | None, groups: Any) -> ExampleAxes | None:
    """Returns what `axis_name` and `axis_index_groups` mean together.

    Raises ValueError for groups without a name, or with a `Sync`, which says its own.
    """
    if groups is None:
        return axis_name
    if axis_name is None or isinstance(axis_name, Sync | Sharded):
        raise invalid(
            where,
            f"axis_index_groups with axis_name={axis_name!r}",
            "the name of the axis whose devices are grouped",
            "pass axis_name as well, or axis_name=Sync(axis, groups=...) alone",
        )
    return Sync(axis_name, groups=groups)


def apply(call: Call, parts: Parts, scale: Array | None, bias: Array | None) -> Array:
    """Returns h = scale · (x − μ) / σ + bias; raises ValueError unless they fit the features."""
    shape = [n if i in call.features else 1 for i, n in enumerate(call.x.shape)]

    def along(name: str, v: Array | None, absent: Array) -> Array:
        if v is None:
            return absent
        check_features(call, name, v.size)
        return v.astype(promote_dtype(call.x)).reshape(shape)

    g, b = along("scale", scale, parts.g), along("bias", bias, parts.b)
    parts = parts._replace(g=g, b=b)
    return affine(parts, call.x, weights=call.weights).astype(call.dtype)


CONDITION = (
    "make the module with use_scale=False, use_bias=False, and apply to its result what a "
    "condition made: h * (1 + scale) + shift"
)
"""What to do about a gain that is no variable of the module."""


def check_features(call: Call, name: str, given: int) -> None:
    """Raises ValueError unless there are as many features as `given`.

    A module that was made before the map counts the features of all devices.
    """
    size = int(np.prod(call.shape))
    if given != size and not (name == "num_features" and given == channels_in_all(call.over, size)):
        raise invalid(
            call.where,
            f"{name} of {given} for an input of shape {call.x.shape}",
            f"{size}, its features on axes {call.features}",
            CONDITION
            if name != "num_features" and given > size and given % size == 0
            else "make the module for the features of its input, or change the axes",
        )


def all_features(call: Call) -> int:
    """The features of `call` on all devices, where it is said that they lie along an axis."""
    size = int(np.prod(call.shape))
    return channels_in_all(call.over, size) if isinstance(call.over, Sharded) else size
