"""Norms that measure each example by itself: layer, RMS, group and instance.

    h = g · (a − μ) / σ + b        σ = √(var + ε)

They differ in the axes over which the mean and the variance are measured, and in nothing else:

    layer      the channels, or all axes but the examples'
    rms        as layer, with μ = 0
    group      the positions and a group of channels
    instance   the positions, per channel

Each comes in three steps: `layer_moments` measures, of one value too, and stays broadcastable to
`a`; `layer_parts` makes μ, σ, g and b of it, and `layer_norm` applies them. Statistics are taken in
float32 at least. Where all weights are zero nothing is measured: σ is the largest number and h is
b, without a gradient to `a`. Where a square overflows, beyond 1e19 in float32, h is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import checked, declare, norm_axes, number
from normlab._checks import check_groups, check_values, gain_and_bias, normalize_axes, promote
from normlab._sums import average, standard_deviation
from normlab._weights import aligned
from normlab._xla import partitioned
from normlab.equation import Affine, Parts
from normlab.errors import invalid
from normlab.making import applied
from normlab.measure import Algorithm, Moments, merge_axes, moments

Axes = int | Sequence[int] | Literal["channels", "all"]
"""What layer and RMS norm measure over."""

declare(part=number("a number in (0, 1]", "pass 1.0 for all channels", lambda v: 0 < v <= 1))


@checked("layer norm", axes=norm_axes)
def layer_moments(
    a: ArrayLike,
    *,
    axes: Axes = "channels",
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments that `layer_norm`, which see, normalizes with."""
    a, channel, weights = aligned("layer norm", a, weights, channel_axis)
    axes = _example_axes("layer norm", axes, a.ndim, channel)
    return moments(a, axes, weights=weights, algorithm=algorithm)


@checked("layer norm", axes=norm_axes)
def layer_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    axes: Axes = "channels",
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    feature_axes: Sequence[int] | None = None,
    algorithm: Algorithm = "auto",
) -> Parts:
    """The parts of `layer_norm`, which see."""
    m = layer_moments(a, axes=axes, weights=weights, channel_axis=channel_axis, algorithm=algorithm)
    g, b = gain_and_bias("layer norm", params, a, channel_axis, feature_axes)
    change = "use RMS norm, which has no mean, or measure over more axes"
    one = m.mean.shape == jnp.shape(a) and 0 not in m.mean.shape
    check_values("layer norm", jnp.shape(a), one, "statistic", change)
    return Parts(m.mean, m.sigma(eps), g, b)


@applied(layer_parts)
def layer_norm() -> None:
    """Layer normalization (Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450).

    h = g · (a − μ) / √(var + ε) + b: μ and var are the mean and the variance of each example over
    `axes`.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`; or anything else that `learned` reads, such as an
        `Offset` or a gain by example.
      axes: What to measure over: `"channels"`, those of each position (transformers); `"all"`, all
        axes but the first (the paper's layer; in a conv net positions and channels); or axes by
        number.
      eps: ε > 0, in squared units of `a`.
      weights: Importance of positions, aligned with the leading axes of `a` other than the
        channels'. Zero leaves out.
      channel_axis: The axis of `params`.
      feature_axes: The axes of `params` if they lie along several: with `(-2, -1)` and those axes
        this is torch's `LayerNorm([H, W])`.
      algorithm: How the variance is taken, an `Algorithm`.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: For parameters that do not fit `a`, axes out of range or repeated, or ε ≤ 0.

    >>> layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]])).round(3).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """


@checked("RMS norm", axes=norm_axes)
def rms_moments(
    a: ArrayLike,
    *,
    axes: Axes = "channels",
    groups: int = 1,
    part: float = 1.0,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Moments:
    """The moments about zero that `rms_norm`, which see, normalizes with: m2 = Σ w·a²."""
    square, count = _mean_square(a, axes, groups, part, weights, channel_axis)
    return Moments(count, jnp.zeros_like(square), square * count)


@checked("RMS norm", axes=norm_axes)
def rms_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    axes: Axes = "channels",
    groups: int = 1,
    part: float = 1.0,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    feature_axes: Sequence[int] | None = None,
) -> Parts:
    """The parts of `rms_norm`, which see."""
    square, count = _mean_square(a, axes, groups, part, weights, channel_axis)
    g, b = gain_and_bias("RMS norm", params, a, channel_axis, feature_axes)
    return Parts(jnp.zeros((), square.dtype), standard_deviation(square, count, eps), g, b)


@applied(rms_parts)
def rms_norm() -> None:
    """Root mean square normalization (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    h = g · a / √(mean a² + ε) + b: μ = 0, and the mean square is that of each example over `axes`.

    The other arguments are those of `layer_norm`, which see. The paper has no bias: `Affine(g,
    None)`; a gain about 1, as in Gemma, is an `Offset`, and a gate is `modulate(params, gate=z)`.

    Args:
      groups: Into how many groups of neighbouring channels each sample is cut, as in Mamba-2; they
        divide `C`.
      part: Which part of the channels, the first of them, the mean square is taken from (the
        paper's partial RMS norm, section 3.2).

    >>> rms_norm(jnp.array([[1.0, -1.0], [10.0, 10.0]])).round(3).tolist()
    [[1.0, -1.0], [1.0, 1.0]]
    """


@checked("group norm")
def group_moments(
    a: ArrayLike,
    *,
    groups: int,
    centred: bool = True,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments that `group_norm`, which see, normalizes with; not `centred`, those about 0."""
    if not centred:
        axes = [i for i in range(1, jnp.ndim(a)) if i != channel_axis % jnp.ndim(a)]
        return rms_moments(
            a,
            axes=(*axes, channel_axis),
            groups=groups,
            weights=weights,
            channel_axis=channel_axis,
        )
    a, channel, weights = aligned("group norm", a, weights, channel_axis, by_example=True)
    channels = a.shape[channel]
    check_groups("group norm", groups, channels)
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


@checked("group norm")
def group_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    groups: int,
    centred: bool = True,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Parts:
    """The parts of `group_norm`, which see."""
    how: Any = {"weights": weights, "channel_axis": channel_axis, "algorithm": algorithm}
    m = group_moments(a, groups=groups, centred=centred, **how)
    g, b = gain_and_bias("group norm", params, a, channel_axis)
    one = centred and math.prod(jnp.shape(a)[1:]) == groups
    change = "use fewer groups, or centred=False, which has no mean"
    check_values("group norm", jnp.shape(a), one, "example and group", change)
    return Parts(m.mean, m.sigma(eps), g, b)


@applied(group_parts)
def group_norm() -> None:
    """Group normalization (Wu & He 2018, https://arxiv.org/abs/1803.08494).

    h = g · (a − μ) / √(var + ε) + b: μ and var are the mean and the variance of each example over
    all positions and the C/groups neighbouring channels of a group.

    The other arguments are those of `layer_norm`, which see.

    Args:
      groups: The number of groups; divides `C`. 1 is layer norm over all axes but the first, `C`
        is instance norm.
      centred: Whether to subtract the mean. Without, μ = 0 and σ² is the mean square: RMS norm of
        each group.

    Raises:
      ValueError: If `groups` does not divide `C`, or as `layer_norm`.

    >>> group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), groups=2).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """


@checked("instance norm")
def instance_moments(
    a: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments that `instance_norm`, which see, normalizes with."""
    a, channel, weights = aligned("instance norm", a, weights, channel_axis, by_example=True)
    axes = [i for i in range(1, a.ndim) if i != channel]
    return moments(a, axes, weights=weights, algorithm=algorithm)


@checked("instance norm")
def instance_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Parts:
    """The parts of `instance_norm`, which see."""
    m = instance_moments(a, weights=weights, channel_axis=channel_axis, algorithm=algorithm)
    positions = "an input [N, ..., C] with positions between examples and channels, "
    change = "use layer norm or RMS norm in a dense layer"
    one = m.mean.shape == jnp.shape(a) and 0 not in m.mean.shape
    check_values("instance norm", jnp.shape(a), one, "example and channel", change, positions)
    g, b = gain_and_bias("instance norm", params, a, channel_axis)
    return Parts(m.mean, m.sigma(eps), g, b)


@applied(instance_parts)
def instance_norm() -> None:
    """Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016, https://arxiv.org/abs/1607.08022).

    h = g · (a − μ) / √(var + ε) + b: μ and var are the mean and the variance of each channel of
    each example over its positions.

    The arguments are those of `layer_norm`, which see.

    Raises:
      ValueError: If `a` has no positions between examples and channels, or as `layer_norm`.

    >>> instance_norm(jnp.array([[[1.0], [3.0]]])).round(3).tolist()
    [[[-1.0], [1.0]]]
    """


def _mean_square(
    a: ArrayLike,
    axes: Axes,
    groups: int,
    part: float,
    weights: ArrayLike | None,
    channel_axis: int,
) -> tuple[Array, Array]:
    """The mean of a² and the count of each sample, broadcastable to `a`."""
    where = "RMS norm"
    a, channel, w = aligned(where, a, weights, channel_axis)
    axes = _example_axes(where, axes, a.ndim, channel)
    if groups == 1 and part == 1:
        return _square(a, w, axes)
    if channel not in axes:
        given = f"groups={groups}, part={part} and axes {axes} without the channels' {channel}"
        raise invalid(where, given, "axes with the channels among them", 'use axes="channels"')
    check_groups(where, groups, a.shape[channel])

    def measure(a: Array, w: Array | None) -> tuple[Array, Array]:
        size = a.shape[channel] // groups
        cut = (*a.shape[:channel], groups, size, *a.shape[channel + 1 :])
        used = max(1, int(size * part))
        a = lax.slice_in_dim(a.reshape(cut), 0, used, axis=channel + 1)
        if w is not None:  # which has size 1 along the channels, or theirs
            each = groups if w.shape[channel] > 1 else 1
            w = w.reshape(*w.shape[:channel], each, -1, *w.shape[channel + 1 :])
            w = lax.slice_in_dim(w, 0, min(used, w.shape[channel + 1]), axis=channel + 1)
        square, count = _square(a, w, [i if i < channel else i + 1 for i in axes])
        return spread(square), spread(count)

    def spread(v: Array) -> Array:
        """Each group's value at all of its channels."""
        v = jnp.squeeze(v, channel + 1)
        return v if v.shape[channel] == 1 else jnp.repeat(v, a.shape[channel] // groups, channel)

    return partitioned(measure, a, w)


def _square(a: Array, w: Array | None, axes: Sequence[int]) -> tuple[Array, Array]:
    valid = promote(a) if w is None else jnp.where(w > 0, promote(a), 0)
    return average(jnp.square(valid), axes, weights=w)


def _example_axes(where: str, axes: Axes, ndim: int, channel: int) -> tuple[int, ...]:
    if axes == "channels":
        return (channel,)
    if axes == "all":
        return tuple(range(1, ndim))
    return normalize_axes(where, axes, ndim)
