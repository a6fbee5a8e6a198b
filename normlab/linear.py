"""Dense and convolution, as the linear maps a norm can look into.

Weight norm looks at `w`, cosine norm also at the length of the input patch that meets `w`. A
linear map therefore offers, beside itself, the moments of its input patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array, lax

from normlab._arguments import PADDING, STEPS, array, checked, declare, instance, integer
from normlab._checks import check_conv, check_dense, each_axis, promote
from normlab._trees import static
from normlab.measure import Moments, moments


@runtime_checkable
class Linear(Protocol):
    """A linear map `a = linear(x, w)` with the output channels of `w` last.

    >>> isinstance(Dense(), Linear)
    True
    >>> Dense()(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)
    """

    @property
    def channel_axis(self) -> int:
        """The axis of the channels, in `x` and in `a`."""
        ...

    def __call__(self, x: Array, w: Array) -> Array:
        """Returns a = w·x."""
        ...

    def patch_axes(self, x: Array) -> tuple[int, ...]:
        """The axes of `x` along which the inputs of one output lie."""
        ...

    def patch_sum(self, x: Array, w: Array) -> Array:
        """Σ x of the K inputs that meet each output, broadcastable to `a`."""
        ...

    def patch_moments(self, x: Array, w: Array) -> Moments:
        """The moments of the K inputs that meet each output, broadcastable to `a`."""
        ...


declare(linear=instance(Linear, "make one: Dense() or Conv()", arrays=False))


@static
@dataclass(frozen=True)
class Dense:
    """The matrix product over the last axis: `x [..., K]`, `w [K, C]`, `a [..., C]`.

    >>> Dense()(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)
    """

    channel_axis = -1

    @checked("Dense", w=array())
    def __call__(self, x: Array, w: Array) -> Array:
        """Returns `x @ w`."""
        check_dense(x, w)
        return x @ w

    def patch_axes(self, x: Array) -> tuple[int, ...]:
        """The last."""
        return (x.ndim - 1,)

    def patch_sum(self, x: Array, w: Array) -> Array:
        """Σ x over the last axis, shape `[..., 1]`."""
        return promote(x).sum(-1, keepdims=True)

    def patch_moments(self, x: Array, w: Array) -> Moments:
        """The moments over the last axis of `x`, shape `[..., 1]`."""
        return moments(x, -1)


_WORDS = {
    "strides": STEPS,
    "padding": PADDING,
    "dilation": STEPS,
    "groups": integer("a number of groups, at least 1", "use 1 for none", 1),
    "channel_axis": integer(
        "-1 (channels last) or 1 (channels first)",
        "move the channels to one of the two",
        among=(-1, 1),
    ),
}


@static
@checked("Conv", **_WORDS)
@dataclass(frozen=True)
class Conv:
    """Convolution of any spatial rank: `w` is `[*window, K/groups, C]`.

    Attributes:
      strides: One per spatial axis, or one for all.
      padding: `"SAME"`, `"VALID"`, or `(low, high)` per spatial axis.
      dilation: The kernel's dilation, one per spatial axis or one for all.
      groups: Feature groups (`groups = K` is a depthwise convolution).
      channel_axis: `-1` for `[N, ..., C]`, `1` for `[N, C, ...]`.

    >>> Conv(strides=2)(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5))).shape
    (1, 4, 4, 5)
    """

    strides: int | tuple[int, ...] = 1
    padding: str | tuple[tuple[int, int], ...] = "SAME"
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    channel_axis: int = -1

    @checked("Conv", w=array())
    def __call__(self, x: Array, w: Array) -> Array:
        """Returns the convolution of `x` with `w`, in the layout of `x`."""
        check_conv(self, x, w)
        how = self._geometry(w)
        return lax.conv_general_dilated(x, w, feature_group_count=self.groups, **how)

    def patch_axes(self, x: Array) -> tuple[int, ...]:
        """All but the first, the examples'."""
        return tuple(range(1, x.ndim))

    def patch_sum(self, x: Array, w: Array) -> Array:
        """Σ x of each patch, shape `[N, ..., C or 1]`: over its channels, then over the window."""
        x = promote(x)
        ones = jnp.ones((*w.shape[:-2], 1, self.groups), x.dtype)
        return self._per_unit(self(self._by_group(x).sum(-1), ones), w)

    def patch_moments(self, x: Array, w: Array) -> Moments:
        """The moments of each patch, padding included, shape `[N, ..., C or 1]`.

        The patches are laid out in memory, so that each is measured about its own mean.
        """
        patches = lax.conv_general_dilated_patches(promote(x), w.shape[:-2], **self._geometry(w))
        m = moments(self._by_group(patches), -1)
        return Moments(m.count[..., 0], *(self._per_unit(v[..., 0], w) for v in m[1:]))

    def _by_group(self, v: Array) -> Array:
        """Splits the channels into groups, which keep their place, and members, which go last."""
        channel = self.channel_axis % v.ndim
        split = (*v.shape[:channel], self.groups, -1, *v.shape[channel + 1 :])
        return jnp.moveaxis(v.reshape(split), channel + 1, -1)

    def _per_unit(self, v: Array, w: Array) -> Array:
        """Repeats what was measured per group for each unit of the group."""
        if self.groups == 1:
            return v
        return jnp.repeat(v, w.shape[-1] // self.groups, self.channel_axis)

    def _geometry(self, w: Array) -> dict[str, Any]:
        """What JAX is told: images in their layout, kernels `[*window, K/groups, C]`."""
        n, spatial = w.ndim, w.ndim - 2
        image = (0, n - 1, *range(1, n - 1)) if self.channel_axis == -1 else tuple(range(n))
        return {
            "window_strides": each_axis("strides", self.strides, spatial),
            "padding": self.padding,
            "rhs_dilation": each_axis("dilation", self.dilation, spatial),
            "dimension_numbers": lax.ConvDimensionNumbers(
                image, (n - 1, n - 2, *range(spatial)), image
            ),
        }


@static
@checked("ConvTranspose", **_WORDS)
@dataclass(frozen=True)
class ConvTranspose(Conv):
    """Transposed convolution, that of `jax.lax.conv_transpose` and Flax: `w` is `[*window, K, C]`.

    It is the convolution, with a step of one, of the input with zeros between its positions. To a
    norm these zeros are inputs, as the padding is.

    Attributes:
      strides: By how much it enlarges each spatial axis, or one for all.
      padding: `"SAME"`, `"VALID"`, or what `(low, high)` adds to the input with its zeros.

    >>> ConvTranspose(strides=2)(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 5))).shape
    (1, 8, 8, 5)
    """

    def _geometry(self, w: Array) -> dict[str, Any]:
        how = super()._geometry(w)
        strides, dilation = how["window_strides"], how["rhs_dilation"]
        if isinstance(self.padding, str):
            sides = zip(w.shape, strides, dilation, strict=False)
            how["padding"] = [self._edges((k - 1) * d, s - 1) for k, s, d in sides]
        return how | {"window_strides": (1,) * len(strides), "lhs_dilation": strides}

    def _edges(self, reach: int, gap: int) -> tuple[int, int]:
        """What a window that reaches so far past its first input adds, with that many zeros."""
        whole = reach + gap if self.padding != "VALID" else reach + max(reach, gap)
        low = reach if self.padding == "VALID" or gap >= reach else -(-whole // 2)
        return low, whole - low
