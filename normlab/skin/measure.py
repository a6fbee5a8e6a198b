"""Where a Flax norm measures: any axes, several feature axes, and devices that share them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from normlab.affine import Parts
from normlab.arguments import check_added, read
from normlab.batch import batch_parts
from normlab.checks import invalid, normalize_axes, promote_dtype
from normlab.collective import measure
from normlab.example import group_parts, layer_parts, rms_parts
from normlab.moments import Algorithm, Moments
from normlab.skin.calls import Axes, Call, algorithm
from normlab.sync import AxisName, Sync, as_sync


def batch(call: Call, state: Any, **options: Any) -> tuple[Parts, Any]:
    """`batch_parts`, with several feature axes as one.

    Args:
      call: The call.
      state: Statistics of the features as one axis.
      **options: As in `batch_parts`.
    """
    if len(call.features) == 1:
        return batch_parts(
            call.x, None, state, weights=call.weights, channel_axis=call.features[0], **options
        )
    order = (*call.others, *call.features)
    lead = [call.x.shape[i] for i in call.others]
    merge = lambda v: v.transpose(order).reshape(*lead, -1)  # noqa: E731
    weights = call.weights
    weights = None if weights is None else merge(jnp.broadcast_to(weights, call.x.shape))
    parts, state = batch_parts(merge(call.x), None, state, weights=weights, **options)

    def split(part: Array) -> Array:
        shape = (1,) * (len(lead) + 1 - part.ndim) + part.shape
        tail = call.shape if shape[-1] > 1 else (1,) * len(call.features)
        return part.reshape(*shape[:-1], *tail).transpose(np.argsort(order))

    return Parts(*map(split, parts)), state


def example(
    call: Call, axes: Axes, eps: float, over: AxisName | None, fast: bool, *, centre: bool = True
) -> Parts:
    """The parts of layer norm, or of RMS norm, over any axes, and over devices that share them.

    Args:
      call: The call.
      axes: The reduction axes.
      eps: ε > 0.
      over: The named axes along which the examples themselves are split.
      fast: Flax's `use_fast_variance`.
      centre: Whether to subtract the mean; without, this is RMS norm.
    """
    check_added(call.where, read(call.where, "eps", eps), call.x)
    axes = normalize_axes(call.where, axes, call.x.ndim)
    if over is None and not centre:
        return rms_parts(call.x, None, axes=axes, eps=eps, weights=call.weights)
    if over is None:
        kind = algorithm(fast)
        return layer_parts(call.x, None, axes=axes, eps=eps, weights=call.weights, algorithm=kind)
    m = _merged(call, axes, as_sync(over), algorithm(fast))
    one, zero = jnp.ones((), m.mean.dtype), jnp.zeros((), m.mean.dtype)
    if centre:
        return Parts(m.mean, m.scale(eps), one, zero)
    about_zero = m._replace(m2=m.m2 + m.count * jnp.square(m.mean))
    return Parts(zero, about_zero.scale(eps), one, zero)


def _merged(call: Call, axes: tuple[int, ...], over: Sync, kind: Algorithm) -> Moments:
    """The moments over `axes` and devices: what is reduced stands where a batch has examples."""
    if over.shards > 1 or over.virtual_batch or over.every:
        raise invalid(
            call.where,
            f"{over}",
            "devices that hold parts of the same examples",
            "name the axes, and groups of devices, alone",
        )
    kept = [i for i in range(call.x.ndim) if i not in axes]
    lead = [call.x.shape[i] for i in kept]

    def rows(v: Array) -> Array:
        return jnp.broadcast_to(v, call.x.shape).transpose(*axes, *kept).reshape(-1, *lead)

    w = None if call.weights is None else rows(call.weights).astype(promote_dtype(call.x))
    m, _ = measure(call.where, rows(call.x), (0,), over, weights=w, algorithm=kind)
    shape = [1 if i in axes else n for i, n in enumerate(call.x.shape)]
    return Moments(*(jnp.broadcast_to(f[:1], (1, *lead)).reshape(shape) for f in m))


def groups_of(where: str, channels: int, num_groups: int | None, group_size: int | None) -> int:
    """The number of groups that `num_groups` or `group_size` means.

    Raises:
      ValueError: If not one of them is given, or it does not divide the channels.
    """
    if (num_groups is None) == (group_size is None):
        raise invalid(
            where,
            f"num_groups={num_groups} and group_size={group_size}",
            "one of the two",
            "pass num_groups=None with a group_size",
        )
    divisor = group_size if num_groups is None else num_groups
    if not isinstance(divisor, int) or divisor < 1 or channels % divisor:
        name = "group_size" if num_groups is None else "num_groups"
        possible = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        raise invalid(
            where,
            f"{name}={divisor!r} for {channels} channels",
            f"a number that divides {channels}",
            f"use one of {possible}",
        )
    return channels // divisor if num_groups is None else divisor


def group(
    call: Call, groups: int, axes: Axes | None, eps: float, over: AxisName | None, fast: bool
) -> Parts:
    """The parts of group norm over any axes, the channels' among them.

    Args:
      call: The call; its features are on the last axis.
      groups: The number of groups.
      axes: The reduction axes; `None` for all but the first.
      eps: ε > 0.
      over: The named axes along which the examples themselves are split.
      fast: Flax's `use_fast_variance`.
    """
    check_added(call.where, read(call.where, "eps", eps), call.x)
    x, weights = call.x, call.weights
    if axes is None and over is None and x.ndim > 1:
        return group_parts(
            x, None, groups=groups, eps=eps, weights=weights, algorithm=algorithm(fast)
        )
    axes = range(1, x.ndim) if axes is None else normalize_axes(call.where, axes, x.ndim)
    if x.ndim - 1 not in axes:
        raise invalid(
            call.where,
            f"reduction_axes={tuple(axes)} for an input of rank {x.ndim}",
            "the last axis, the channels', among them",
            f"add {x.ndim - 1}, or -1",
        )
    split = (*x.shape[:-1], groups, x.shape[-1] // groups)
    if weights is not None:
        weights = jnp.broadcast_to(weights, (*weights.shape[:-1], x.shape[-1]))
        weights = weights.reshape(*weights.shape[:-1], *split[-2:])
    grouped = call._replace(x=x.reshape(split), weights=weights)
    parts = example(grouped, (*(i for i in axes if i < x.ndim - 1), x.ndim), eps, over, fast)

    def join(part: Array) -> Array:
        if not part.ndim:
            return part
        whole = jnp.broadcast_to(part, (*part.shape[:-2], *split[-2:]))
        return whole.reshape(*part.shape[:-2], x.shape[-1])

    return Parts(*map(join, parts))


def instance(call: Call, eps: float, over: AxisName | None, fast: bool) -> Parts:
    """The parts of instance norm: over all axes but the first and the features'."""
    positions = [i for i in call.others if i]
    if 0 in call.features or not positions:
        raise invalid(
            call.where,
            f"an input of shape {call.x.shape} with feature axes {call.features}",
            "examples on the first axis, and positions beside the features",
            "use LayerNorm or RMSNorm where an example has one value of each feature",
        )
    return example(call, positions, eps, over, fast)
