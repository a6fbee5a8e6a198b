"""Norms that measure each example by itself: layer, RMS, group and instance.

    h = g · (a − μ) / σ + b        σ = √(var + ε)

They differ in the axes over which the mean and the variance are measured, and in nothing else:

    layer      the channels, or all axes but the examples'
    rms        as layer, with μ = 0
    group      the positions and a group of channels
    instance   the positions, per channel

ε is always added to the variance under the root. Statistics are taken in float32 at least. Where
all weights are zero nothing is measured: σ is the largest number and h is b, without a gradient to
`a`. Where a square overflows, beyond 1e19 in float32, h is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import checked, norm_axes
from normlab._checks import gain_and_bias, invalid, normalize_axes, promote
from normlab._xla import partitioned
from normlab.equation import Parts, affine
from normlab.measure import Algorithm, Moments, merge_axes, moments, standard_deviation
from normlab._weights import align_weights
from normlab._sums import average

Axes = int | Sequence[int] | Literal["channels", "all"]
"""What layer and RMS norm measure over."""


def layer_norm(
    a: Array,
    params: Any = None,
    *,
    axes: Axes = "channels",
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Array:
    """Layer normalization (Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450).

    μ and σ² are the mean and the variance of each example over `axes`.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`.
      axes: What to measure over: `"channels"`, those of each position (transformers); `"all"`, all
        axes but the first (the paper's layer; in a conv net positions and channels); or axes by
        number.
      eps: ε > 0, in squared units of `a`.
      weights: Importance of positions, aligned with the leading axes of `a` other than the
        channels'. Zero leaves out.
      channel_axis: The axis of `params`.
      algorithm: How the variance is taken, an `Algorithm`.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: For parameters that do not fit `a`, axes out of range or repeated, or ε ≤ 0.
    """
    parts = layer_parts(
        a,
        params,
        axes=axes,
        eps=eps,
        weights=weights,
        channel_axis=channel_axis,
        algorithm=algorithm,
    )
    return affine(parts, a, weights=weights, channel_axis=channel_axis)


@checked("layer norm", axes=norm_axes)
def layer_parts(
    a: Array,
    params: Any,
    *,
    axes: Axes = "channels",
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Parts:
    """The parts of `layer_norm`, which see."""
    a = jnp.asarray(a)
    where = "layer norm"
    m = layer_moments(a, axes=axes, weights=weights, channel_axis=channel_axis, algorithm=algorithm)
    g, b = gain_and_bias(where, params, a, channel_axis)
    _check_values(
        where, a, m, "statistic", "use RMS norm, which has no mean, or measure over more axes"
    )
    return Parts(m.mean, m.sigma(eps), g, b)


def layer_moments(
    a: ArrayLike,
    *,
    axes: Axes = "channels",
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments that layer norm normalizes with, broadcastable to `a`; of one value too."""
    a, where = jnp.asarray(a), "layer norm"
    (channel,) = normalize_axes(where, channel_axis, a.ndim)
    weights = align_weights(where, weights, a, channel)
    axes = _example_axes(where, axes, a.ndim, channel)
    return moments(a, axes, weights=weights, algorithm=algorithm)


def rms_norm(
    a: Array,
    params: Any = None,
    *,
    axes: Axes = "channels",
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Array:
    """Root mean square normalization (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    μ = 0 and σ = √(E a² + ε), over the `axes` of each example.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`. The paper has no bias: `Affine(g, None)`.
      axes: As in `layer_norm`.
      eps: ε > 0, in squared units of `a`.
      weights: Importance of positions, aligned with the leading axes of `a` other than the
        channels'. Zero leaves out.
      channel_axis: The axis of `params`.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: As `layer_norm`.
    """
    parts = rms_parts(a, params, axes=axes, eps=eps, weights=weights, channel_axis=channel_axis)
    return affine(parts, a, weights=weights, channel_axis=channel_axis)


@checked("RMS norm", axes=norm_axes)
def rms_parts(
    a: Array,
    params: Any,
    *,
    axes: Axes = "channels",
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `rms_norm`, which see."""
    a = jnp.asarray(a)
    (channel,) = normalize_axes("RMS norm", channel_axis, a.ndim)
    axes = _example_axes("RMS norm", axes, a.ndim, channel)
    weights = align_weights("RMS norm", weights, a, channel)
    g, b = gain_and_bias("RMS norm", params, a, channel)
    valid = promote(a) if weights is None else jnp.where(weights > 0, promote(a), 0)
    square, count = average(jnp.square(valid), axes, weights=weights)
    sigma = standard_deviation(square, count, eps)
    return Parts(jnp.zeros((), square.dtype), sigma, g, b)


def group_norm(
    a: Array,
    params: Any = None,
    *,
    groups: int,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Array:
    """Group normalization (Wu & He 2018, https://arxiv.org/abs/1803.08494).

    μ and σ² are the mean and the variance of each example over all positions and the C/groups
    neighbouring channels of a group.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`.
      groups: The number of groups; divides `C`. 1 is layer norm over all axes but the first, `C`
        is instance norm.
      eps: ε > 0, in squared units of `a`.
      weights: Importance of positions, aligned with the leading axes of `a` other than the
        channels'. Zero leaves out.
      channel_axis: The axis of the channels.
      algorithm: How the variance is taken, an `Algorithm`.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: If `groups` does not divide `C`, for parameters that do not fit `a`, or ε ≤ 0.
    """
    parts = group_parts(
        a,
        params,
        groups=groups,
        eps=eps,
        weights=weights,
        channel_axis=channel_axis,
        algorithm=algorithm,
    )
    return affine(parts, a, weights=weights, channel_axis=channel_axis)


@checked("group norm")
def group_parts(
    a: Array,
    params: Any,
    *,
    groups: int,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Parts:
    """The parts of `group_norm`, which see."""
    a = jnp.asarray(a)
    where = "group norm"
    m = group_moments(
        a, groups=groups, weights=weights, channel_axis=channel_axis, algorithm=algorithm
    )
    g, b = gain_and_bias(where, params, a, channel_axis)
    if math.prod(a.shape[1:]) == groups:
        change = "use fewer groups, or RMS norm, which has no mean"
        raise _one_value(where, a.shape, "example and group", change)
    return Parts(m.mean, m.sigma(eps), g, b)


def group_moments(
    a: ArrayLike,
    *,
    groups: int,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments that group norm normalizes with, broadcastable to `a`; of one value too."""
    a, where = jnp.asarray(a), "group norm"
    channel = _channel_axis(where, channel_axis, a)
    channels = a.shape[channel]
    if groups < 1 or channels % groups:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise invalid(
            where,
            f"groups={groups!r} for {channels} channels",
            f"a number of groups that divides {channels}",
            f"use one of {', '.join(map(str, divisors))}",
        )
    weights = align_weights(where, weights, a, channel)
    split = (*a.shape[:channel], groups, channels // groups, *a.shape[channel + 1 :])
    axes = [i for i in range(1, a.ndim) if i != channel]

    def measure(a: Array, weights: Array | None) -> Moments:
        # Per channel over the positions, then merged into groups: a long, contiguous sum and a
        # short one, where a sum over a reshaped array would do neither.
        m = moments(a, axes, weights=weights, algorithm=algorithm)
        each = [n if i in (0, channel, channel + 1) else 1 for i, n in enumerate(split)]
        m = Moments(*(jnp.broadcast_to(v, m.mean.shape).reshape(each) for v in m))
        m = merge_axes(m, channel + 1)
        return Moments(*(jnp.broadcast_to(v, each).reshape(whole) for v in m))

    whole = [n if i in (0, channel) else 1 for i, n in enumerate(a.shape)]
    return partitioned(measure, a, weights)


def instance_norm(
    a: Array,
    params: Any = None,
    *,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Array:
    """Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016, https://arxiv.org/abs/1607.08022).

    μ and σ² are the mean and the variance of each channel of each example over its positions.

    Args:
      a: `[N, ..., C]`, with at least one axis of positions.
      params: `Affine(g [C], b [C])`, or `None`.
      eps: ε > 0, in squared units of `a`.
      weights: Importance of positions, aligned with the leading axes of `a` other than the
        channels'. Zero leaves out.
      channel_axis: The axis of the channels.
      algorithm: How the variance is taken, an `Algorithm`.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: If `a` has no positions, for parameters that do not fit `a`, or ε ≤ 0.
    """
    parts = instance_parts(
        a, params, eps=eps, weights=weights, channel_axis=channel_axis, algorithm=algorithm
    )
    return affine(parts, a, weights=weights, channel_axis=channel_axis)


@checked("instance norm")
def instance_parts(
    a: Array,
    params: Any,
    *,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Parts:
    """The parts of `instance_norm`, which see."""
    a = jnp.asarray(a)
    where = "instance norm"
    m = instance_moments(a, weights=weights, channel_axis=channel_axis, algorithm=algorithm)
    positions = "an input [N, ..., C] with positions between examples and channels, "
    change = "use layer norm or RMS norm in a dense layer"
    _check_values(where, a, m, "example and channel", change, positions)
    g, b = gain_and_bias(where, params, a, channel_axis)
    return Parts(m.mean, m.sigma(eps), g, b)


def instance_moments(
    a: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments that instance norm normalizes with, broadcastable to `a`; of one value too."""
    a, where = jnp.asarray(a), "instance norm"
    channel = _channel_axis(where, channel_axis, a)
    weights = align_weights(where, weights, a, channel)
    axes = [i for i in range(1, a.ndim) if i != channel]
    return moments(a, axes, weights=weights, algorithm=algorithm)


def _check_values(where: str, a: Array, m: Moments, each: str, change: str, also: str = "") -> None:
    """Raises ValueError if each of the moments is that of one value."""
    if m.mean.shape == a.shape and 0 not in a.shape:
        raise _one_value(where, a.shape, each, change, also)


def _one_value(
    where: str, shape: tuple[int, ...], each: str, change: str, also: str = ""
) -> ValueError:
    return invalid(
        where,
        f"an input of shape {shape}, one value per {each}",
        f"{also}at least two: the variance of one is zero and the output would be the bias alone",
        change,
    )


def _example_axes(where: str, axes: Axes, ndim: int, channel: int) -> tuple[int, ...]:
    if axes == "channels":
        return (channel,)
    if axes == "all":
        return tuple(range(1, ndim))
    return normalize_axes(where, axes, ndim)


def _channel_axis(where: str, channel_axis: int, a: Array) -> int:
    (channel,) = normalize_axes(where, channel_axis, a.ndim)
    if channel == 0:
        raise invalid(
            where,
            f"channel_axis={channel_axis} for an input of shape {a.shape}",
            "examples on axis 0 and channels on another",
            "move the examples first, or add an axis for the one example",
        )
    return channel
