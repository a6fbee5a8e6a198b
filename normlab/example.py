"""Norms that measure each example by itself: layer, RMS, group and instance.

    h = g · (a − μ) / σ + b        σ = √(var + ε)

They differ in the axes over which the mean and the variance are measured, and in nothing else:

    layer      the channels, or all axes but the examples'
    rms        as layer, with μ = 0
    group      the positions and a group of channels
    instance   the positions, per channel

ε is always added to the variance under the root. Statistics are taken in float32 at least. Where
all weights are zero nothing is measured: σ is infinite and h is b, without a gradient to `a`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab.affine import Parts, affine
from normlab.checks import check_eps, gain_and_bias, invalid, normalize_axes, promote
from normlab.moments import (
    Algorithm,
    Moments,
    align_weights,
    average,
    check_algorithm,
    merge_axes,
    moments,
)

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
    check_eps("layer norm", eps)
    check_algorithm("layer norm", algorithm)
    (channel,) = normalize_axes("layer norm", channel_axis, a.ndim)
    axes = _example_axes("layer norm", axes, a.ndim, channel)
    weights = align_weights("layer norm", weights, a, channel)
    g, b = gain_and_bias("layer norm", params, a, channel)
    m = moments(a, axes, weights=weights, algorithm=algorithm)
    return Parts(m.mean, m.scale(eps), g, b)


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
    check_eps("RMS norm", eps)
    (channel,) = normalize_axes("RMS norm", channel_axis, a.ndim)
    axes = _example_axes("RMS norm", axes, a.ndim, channel)
    weights = align_weights("RMS norm", weights, a, channel)
    g, b = gain_and_bias("RMS norm", params, a, channel)
    valid = promote(a) if weights is None else jnp.where(weights > 0, promote(a), 0)
    square, count = average(jnp.square(valid), axes, weights=weights)
    sigma = jnp.where(count > 0, jnp.sqrt(square + eps), jnp.inf)
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
    check_eps(where, eps)
    check_algorithm(where, algorithm)
    channel = _channel_axis(where, channel_axis, a)
    g, b = gain_and_bias(where, params, a, channel)
    channels = a.shape[channel]
    if isinstance(groups, bool | str | float) or groups < 1 or channels % groups:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise invalid(
            where,
            f"groups={groups!r} for {channels} channels",
            f"a number of groups that divides {channels}",
            f"use one of {', '.join(map(str, divisors))}",
        )
    # Per channel over the positions, then merged into groups: a long, contiguous sum and a short
    # one, where a sum over a reshaped array would do neither.
    weights = align_weights(where, weights, a, channel)
    m = moments(
        a, [i for i in range(1, a.ndim) if i != channel], weights=weights, algorithm=algorithm
    )
    split = (*m.mean.shape[:channel], groups, channels // groups, *m.mean.shape[channel + 1 :])
    count = jnp.broadcast_to(m.count, m.mean.shape)
    m = merge_axes(Moments(*(v.reshape(split) for v in (count, m.mean, m.m2))), channel + 1)
    sigma = m.scale(eps)
    mu, sigma = (
        jnp.broadcast_to(v, split).reshape(*split[:channel], channels, *split[channel + 2 :])
        for v in (m.mean, sigma)
    )
    return Parts(mu, sigma, g, b)


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
    check_eps(where, eps)
    check_algorithm(where, algorithm)
    channel = _channel_axis(where, channel_axis, a)
    if a.ndim < 3:
        raise invalid(
            where,
            f"an input of shape {a.shape}, one value per example and channel",
            "an input [N, ..., C] with positions between examples and channels",
            "use layer norm or RMS norm in a dense layer",
        )
    g, b = gain_and_bias(where, params, a, channel)
    weights = align_weights(where, weights, a, channel)
    m = moments(
        a, [i for i in range(1, a.ndim) if i != channel], weights=weights, algorithm=algorithm
    )
    return Parts(m.mean, m.scale(eps), g, b)


def _example_axes(where: str, axes: Axes, ndim: int, channel: int) -> tuple[int, ...]:
    if axes == "channels":
        return (channel,)
    if axes == "all":
        return tuple(range(1, ndim))
    if isinstance(axes, str) or axes is None:
        raise invalid(where, f"axes={axes!r}", "'channels', 'all' or axes by number", "use one")
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
