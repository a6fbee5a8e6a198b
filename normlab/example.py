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

An example may lie on several devices, its channels or its positions: `axis_name` says along which
axes (`normlab.sharded`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import checked, declare, norm_axes, number
from normlab._checks import check_values, gain_and_bias, no_mean, normalize_axes
from normlab._sums import average, squared, standard_deviation
from normlab._weights import aligned
from normlab._xla import partitioned
from normlab.devices.topology import Sync
from normlab.equation import Affine, Parts
from normlab.errors import invalid
from normlab.implementation import Implementation, by_kernel
from normlab.making import applied
from normlab.measure import Algorithm, Moments, merge_axes, moments
from normlab.sharded import (
    OVER,
    ExampleAxes,
    averaged,
    in_groups,
    merged,
    shared,
    sharers,
)

Axes = int | Sequence[int] | Literal["channels", "all"]
"""What layer and RMS norm measure over."""

declare(part=number("a number in (0, 1]", "pass 1.0 for all channels", lambda v: 0 < v <= 1))


@checked("layer norm", axes=norm_axes, axis_name=OVER)
def layer_moments(
    a: ArrayLike,
    *,
    axes: Axes = "channels",
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments that `layer_norm`, which see, normalizes with.

    >>> layer_moments(jnp.array([[1.0, 3.0]])).mean.tolist()
    [[2.0]]
    """
    a, channel, weights = aligned("layer norm", a, weights, channel_axis)
    axes = _example_axes("layer norm", axes, a.ndim, channel)
    over = _sharing("layer norm", axis_name, axes, channel)
    return moments_over("layer norm", a, axes, over, weights=weights, algorithm=algorithm)


@checked("layer norm", axes=norm_axes, axis_name=OVER)
def layer_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    axes: Axes = "channels",
    eps: float = 1e-5,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    feature_axes: Sequence[int] | None = None,
    algorithm: Algorithm = "auto",
    implementation: Implementation = "auto",
) -> Parts:
    """The parts of `layer_norm`, which see.

    >>> parts = layer_parts(jnp.array([[1.0, 3.0]]))
    >>> print(parts.mu, parts.sigma.round(3))
    [[2.]] [[1.]]
    """
    where = "layer norm"
    a, channel, weights = aligned(where, a, weights, channel_axis)
    axes = _example_axes(where, axes, a.ndim, channel)
    over = _sharing(where, axis_name, axes, channel)
    how: Any = {"weights": weights, "algorithm": algorithm}
    m = moments_over(where, a, axes, over, spread=True, **how)
    g, b = gain_and_bias(where, params, a, channel_axis, feature_axes)
    change = "use RMS norm, which has no mean, or measure over more axes"
    one = _alone(where, m, a.shape, over)
    check_values(where, a.shape, one, "statistic", change)
    parts, without = Parts(m.mean, m.sigma(eps), g, b), no_kernel(weights, over.names, algorithm)
    return by_kernel(where, implementation, parts, a, axes, eps=eps, without=without)


def moments_over(
    where: str,
    a: Array,
    axes: Sequence[int],
    over: Sync,
    *,
    weights: Array | None = None,
    algorithm: Algorithm = "auto",
    spread: bool = False,
) -> Moments:
    """The moments over axes of the array and axes of devices; `spread` as in `merged`."""
    whole = spread and not over.names
    m = moments(a, axes, weights=weights, algorithm=algorithm, _whole=whole)
    return merged(where, m, over, spread=spread)


def no_kernel(weights: Any, over: Any, algorithm: Algorithm = "auto") -> dict[str, bool]:
    """Of what no kernel does, whether it was asked for."""
    return {
        "weights": weights is not None,
        "an example that lies on several devices": bool(over),
        "algorithm='one_pass'": algorithm == "one_pass",
    }


_NOT_LAST = "groups of channels that are not last"


def _sharing(where: str, axis_name: ExampleAxes | None, axes: Sequence[int], channel: int) -> Sync:
    """Over which devices a sample is merged that is measured over these axes of the array."""
    rest = any(i != channel for i in axes)
    return shared(where, axis_name, channels=channel in axes, positions=rest)


def _alone(where: str, m: Moments, shape: tuple[int, ...], over: Sync) -> bool:
    """Whether every sample has one value."""
    return m.mean.shape == shape and 0 not in shape and sharers(where, over) == 1


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
      axis_name: Mapped axes along which each example lies, as the channels do in tensor parallel
        nets: what is measured over is merged over them. A name, several, or a `Sharded`; not the
        axis of the batch. `a`, and g and b, are then those of the device, `[N, ..., C/D]` and
        `[C/D]`. In plain `jit` it is `None`, however `a` is sharded.
      weights: Importance of positions, aligned with the leading axes of `a` other than the
        channels'. Zero leaves out.
      channel_axis: The axis of `params`.
      feature_axes: The axes of `params` if they lie along several: with `(-2, -1)` and those axes
        this is torch's `LayerNorm([H, W])`.
      algorithm: How the variance is taken, an `Algorithm`.
      implementation: By XLA, `"xla"`, or by a kernel, an `Implementation`: `"pallas"` where there
        is one or an error, `"auto"` where it is known to be faster. Derivatives beyond the first
        and forward mode are XLA's.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: For parameters that do not fit `a`, axes out of range or repeated, ε ≤ 0, an axis
        of devices that is not mapped, or a kernel that there is not.

    >>> layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]])).round(3).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """


@checked("RMS norm", axes=norm_axes, axis_name=OVER)
def rms_moments(
    a: ArrayLike,
    *,
    axes: Axes = "channels",
    groups: int = 1,
    part: float = 1.0,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Moments:
    """The moments about zero that `rms_norm`, which see, normalizes with: m2 = Σ w·a².

    >>> rms_moments(jnp.array([[3.0, 4.0]])).m2.tolist()
    [[25.0]]
    """
    square, count = mean_square(
        "RMS norm",
        a,
        axes,
        groups=groups,
        part=part,
        axis_name=axis_name,
        weights=weights,
        channel_axis=channel_axis,
        spread=False,
    )
    return Moments(count, jnp.zeros_like(square), square * count)


@checked("RMS norm", axes=norm_axes, axis_name=OVER)
def rms_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    axes: Axes = "channels",
    groups: int = 1,
    part: float = 1.0,
    eps: float = 1e-5,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    feature_axes: Sequence[int] | None = None,
    implementation: Implementation = "auto",
) -> Parts:
    """The parts of `rms_norm`, which see.

    >>> print(rms_parts(jnp.array([[1.0, 7.0]])).sigma.round(3))
    [[5.]]
    """
    where = "RMS norm"
    how: Any = {"groups": groups, "part": part, "axis_name": axis_name, "weights": weights}
    square, count = mean_square(where, a, axes, channel_axis=channel_axis, **how)
    g, b = gain_and_bias(where, params, a, channel_axis, feature_axes)
    parts = Parts(no_mean(square.dtype), standard_deviation(square, count, eps), g, b)
    ndim = jnp.ndim(a)
    channel = channel_axis % ndim
    without = no_kernel(weights, axis_name) | {f"part={part}": part != 1}
    without |= {_NOT_LAST: groups > 1 and channel != ndim - 1}
    axes = _example_axes(where, axes, ndim, channel)
    how = {"eps": eps, "groups": None if groups == 1 else groups, "centred": False}
    return by_kernel(where, implementation, parts, jnp.asarray(a), axes, without=without, **how)


@applied(rms_parts)
def rms_norm() -> None:
    """Root mean square normalization (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    h = g · a / √(mean a² + ε) + b: μ = 0, and the mean square is that of each example over `axes`.

    The other arguments are those of `layer_norm`, which see. The paper has no bias: `Affine(g,
    None)`; a gain about 1, as in Gemma, is an `Offset`, and a gate is `modulate(params, gate=z)`.

    Over devices there is no mean to merge: they add up one number for each sample.

    Args:
      groups: Into how many groups of neighbouring channels each sample is cut, as in Mamba-2; they
        divide `C`. Over devices as in `group_norm`.
      part: Which part of the channels, the first of them, the mean square is taken from (the
        paper's partial RMS norm, section 3.2); 1 where the channels lie on several devices.

    Raises:
      ValueError: If `groups` does not divide `C`, `part` is outside (0, 1], or as `layer_norm`.

    >>> rms_norm(jnp.array([[1.0, -1.0], [10.0, 10.0]])).round(3).tolist()
    [[1.0, -1.0], [1.0, 1.0]]
    """


@checked("group norm", axis_name=OVER)
def group_moments(
    a: ArrayLike,
    *,
    groups: int,
    centred: bool = True,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments that `group_norm`, which see, normalizes with; not `centred`, those about 0.

    >>> group_moments(jnp.array([[1.0, 3.0, 10.0, 30.0]]), groups=2).mean.tolist()
    [[2.0, 2.0, 20.0, 20.0]]
    """
    how: Any = {"axis_name": axis_name, "weights": weights, "channel_axis": channel_axis}
    how |= {"centred": centred, "algorithm": algorithm}
    return spread_group_moments("group norm", a, groups, spread=False, **how)


def spread_group_moments(
    where: str,
    a: ArrayLike,
    groups: int,
    *,
    centred: bool = True,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
    spread: bool = True,
) -> Moments:
    """`group_moments`; `spread` as in `merged`."""
    a, channel, weights = aligned(where, a, weights, channel_axis, by_example=True)
    axes = [i for i in range(1, a.ndim) if i != channel]
    if not centred:
        how: Any = {"groups": groups, "axis_name": axis_name, "weights": weights}
        how |= {"channel_axis": channel, "spread": spread}
        square, count = mean_square(where, a, (*axes, channel), **how)
        return Moments(count, jnp.zeros_like(square), square * count)
    channels = a.shape[channel]
    groups, over = in_groups(where, axis_name, groups, channels)
    split = (*a.shape[:channel], groups, channels // groups, *a.shape[channel + 1 :])

    def measure(a: Array, weights: Array | None) -> Moments:
        # Per channel over the positions, then merged into groups: a long, contiguous sum and a
        # short one, where a sum over a reshaped array would do neither.
        m = moments(a, axes, weights=weights, algorithm=algorithm)
        each = [n if i in (0, channel, channel + 1) else 1 for i, n in enumerate(split)]
        m = Moments(*(jnp.broadcast_to(v, m.mean.shape).reshape(each) for v in m))
        m = merged(where, merge_axes(m, channel + 1), over, spread=spread)
        return Moments(*(jnp.broadcast_to(v, each).reshape(whole) for v in m))

    whole = [n if i in (0, channel) else 1 for i, n in enumerate(a.shape)]
    return partitioned(measure, a, weights)


@checked("group norm", axis_name=OVER)
def group_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    groups: int,
    centred: bool = True,
    eps: float = 1e-5,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
    implementation: Implementation = "auto",
) -> Parts:
    """The parts of `group_norm`, which see.

    >>> print(group_parts(jnp.array([[1.0, 3.0, 10.0, 30.0]]), groups=2).sigma.round(3))
    [[ 1.  1. 10. 10.]]
    """
    where = "group norm"
    how: Any = {"axis_name": axis_name, "weights": weights, "channel_axis": channel_axis}
    how |= {"centred": centred, "algorithm": algorithm}
    m = spread_group_moments(where, a, groups, **how)
    g, b = gain_and_bias(where, params, a, channel_axis)
    one = centred and one_in_each(where, jnp.shape(a), groups, axis_name)
    change = "use fewer groups, or centred=False, which has no mean"
    check_values(where, jnp.shape(a), one, "example and group", change)
    parts = Parts(m.mean if centred else no_mean(m.mean.dtype), m.sigma(eps), g, b)
    ndim = jnp.ndim(a)
    without = no_kernel(weights, axis_name, algorithm)
    without |= {_NOT_LAST: groups > 1 and channel_axis % ndim != ndim - 1}
    how = {"eps": eps, "groups": groups, "centred": centred, "without": without}
    return by_kernel(where, implementation, parts, jnp.asarray(a), range(1, ndim), **how)


def one_in_each(
    where: str, shape: tuple[int, ...], groups: int, axis_name: ExampleAxes | None
) -> bool:
    """Whether each group of an example, on all its devices, has one value."""
    return math.prod(shape[1:]) * sharers(where, axis_name) == groups


@applied(group_parts)
def group_norm() -> None:
    """Group normalization (Wu & He 2018, https://arxiv.org/abs/1803.08494).

    h = g · (a − μ) / √(var + ε) + b: μ and var are the mean and the variance of each example over
    all positions and the C/groups neighbouring channels of a group.

    The other arguments are those of `layer_norm`, which see.

    Where the channels lie on D devices, `axis_name=Sharded(channels="model")`, a device has several
    groups whole, of which it asks nobody, or one that it shares with its neighbours. With positions
    on several devices, `Sharded(positions="seq")`, these merge all groups.

    Args:
      groups: The number of groups; divides `C`. 1 is layer norm over all axes but the first, `C`
        is instance norm. Of channels on D devices it is the number of all, and divides D or is a
        multiple of it.
      centred: Whether to subtract the mean. Without, μ = 0 and σ² is the mean square: RMS norm of
        each group.

    Raises:
      ValueError: If `groups` does not divide `C`, or would be cut by the end of a device; if it is
        not said what lies along an axis; or as `layer_norm`.

    >>> group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), groups=2).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """


@checked("instance norm", axis_name=OVER)
def instance_moments(
    a: ArrayLike,
    *,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments that `instance_norm`, which see, normalizes with.

    >>> instance_moments(jnp.array([[[1.0], [3.0]]])).mean.tolist()
    [[[2.0]]]
    """
    a, channel, weights = aligned("instance norm", a, weights, channel_axis, by_example=True)
    axes = [i for i in range(1, a.ndim) if i != channel]
    over = shared("instance norm", axis_name, channels=False, positions=True)
    return moments_over("instance norm", a, axes, over, weights=weights, algorithm=algorithm)


@checked("instance norm", axis_name=OVER)
def instance_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    eps: float = 1e-5,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
    implementation: Implementation = "auto",
) -> Parts:
    """The parts of `instance_norm`, which see.

    >>> print(instance_parts(jnp.array([[[1.0], [3.0]]])).sigma.round(3))
    [[[1.]]]
    """
    where = "instance norm"
    a, channel, weights = aligned(where, a, weights, channel_axis, by_example=True)
    axes = [i for i in range(1, a.ndim) if i != channel]
    over = shared(where, axis_name, channels=False, positions=True)
    how: Any = {"weights": weights, "algorithm": algorithm}
    m = moments_over(where, a, axes, over, spread=True, **how)
    positions = "an input [N, ..., C] with positions between examples and channels, "
    change = "use layer norm or RMS norm in a dense layer"
    one = _alone(where, m, a.shape, over)
    check_values(where, a.shape, one, "example and channel", change, positions)
    g, b = gain_and_bias(where, params, a, channel_axis)
    parts, without = Parts(m.mean, m.sigma(eps), g, b), no_kernel(weights, over.names, algorithm)
    return by_kernel(where, implementation, parts, a, axes, eps=eps, without=without)


@applied(instance_parts)
def instance_norm() -> None:
    """Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016, https://arxiv.org/abs/1607.08022).

    h = g · (a − μ) / √(var + ε) + b: μ and var are the mean and the variance of each channel of
    each example over its positions, which may lie along an `axis_name`.

    The arguments are those of `layer_norm`, which see.

    Raises:
      ValueError: If `a` has no positions between examples and channels, or as `layer_norm`.

    >>> instance_norm(jnp.array([[[1.0], [3.0]]])).round(3).tolist()
    [[[-1.0], [1.0]]]
    """


def mean_square(
    where: str,
    a: ArrayLike,
    axes: Axes,
    *,
    groups: int = 1,
    part: float = 1.0,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    spread: bool = True,
) -> tuple[Array, Array]:
    """The mean of a² and the count of each sample; `spread` is as in `merged`."""
    a, channel, w = aligned(where, a, weights, channel_axis)
    axes = _example_axes(where, axes, a.ndim, channel)
    over = _sharing(where, axis_name, axes, channel)
    if part != 1 and over.names:
        given = f"part={part} with axis_name={axis_name!r}"
        change = "use part=1.0, or gather the channels"
        raise invalid(where, given, "channels on one device: the first are not on all", change)
    how: Any = {"weighted": w is not None, "spread": spread}
    if groups == 1 and part == 1:
        return _pair(averaged(where, over, *_square(a, w, axes), **how))
    if channel not in axes:
        given = f"groups={groups}, part={part} and axes {axes} without the channels' {channel}"
        raise invalid(where, given, "axes with the channels among them", 'use axes="channels"')
    rest = any(i != channel for i in axes)
    groups, over = in_groups(where, axis_name, groups, a.shape[channel], positions=rest)

    def measure(a: Array, w: Array | None) -> tuple[Array, Array]:
        size = a.shape[channel] // groups
        cut = (*a.shape[:channel], groups, size, *a.shape[channel + 1 :])
        used = max(1, int(size * part))
        a = lax.slice_in_dim(a.reshape(cut), 0, used, axis=channel + 1)
        if w is not None:  # which has size 1 along the channels, or theirs
            each = groups if w.shape[channel] > 1 else 1
            w = w.reshape(*w.shape[:channel], each, -1, *w.shape[channel + 1 :])
            w = lax.slice_in_dim(w, 0, min(used, w.shape[channel + 1]), axis=channel + 1)
        found = _square(a, w, [i if i < channel else i + 1 for i in axes])
        square, count = _pair(averaged(where, over, *found, **how))
        return repeated(square), repeated(count)

    def repeated(v: Array) -> Array:
        """Each group's value at all of its channels."""
        v = jnp.squeeze(v, channel + 1)
        return v if v.shape[channel] == 1 else jnp.repeat(v, a.shape[channel] // groups, channel)

    return partitioned(measure, a, w)


def _pair(values: tuple[Array, ...]) -> tuple[Array, Array]:
    square, count = values
    return square, count


def _square(a: Array, w: Array | None, axes: Sequence[int]) -> tuple[Array, Array]:
    valid = a if w is None else jnp.where(w > 0, a, jnp.zeros((), a.dtype))
    return average(squared(valid), axes, weights=w)


def _example_axes(where: str, axes: Axes, ndim: int, channel: int) -> tuple[int, ...]:
    if axes == "channels":
        return (channel,)
    if axes == "all":
        return tuple(range(1, ndim))
    return normalize_axes(where, axes, ndim)
