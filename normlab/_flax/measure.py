"""Where a Flax norm measures: any axes, several feature axes, and devices that share them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from normlab._checks import no_mean, normalize_axes
from normlab._flax.calls import Axes, Call
from normlab._sums import standard_deviation
from normlab.batch import batch_parts
from normlab.devices.merging import values_per_channel
from normlab.devices.topology import Sync, as_sync
from normlab.equation import Parts
from normlab.errors import invalid
from normlab.example import group_moments, mean_square, moments_over, no_kernel
from normlab.implementation import by_kernel
from normlab.measure import Moments
from normlab.population.optional import alone, measures
from normlab.sharded import Sharded, in_groups, shared


def batch(
    call: Call,
    state: Any,
    *,
    train: bool,
    quiet: bool = False,
    state_gradient: bool = False,
) -> tuple[Parts, Any]:
    """`batch_parts` with several feature axes as one, as in the state, and a warning for one value.

    With `quiet`, one value per channel is nothing to warn of.
    """
    x, weights, channel, back = _one_feature_axis(call)
    moved = x is not call.x
    if moved and call.implementation not in ("auto", "xla"):
        given = f"implementation={call.implementation!r} with features on axes {call.features}"
        change = "move the channels last, or use implementation='auto'"
        raise invalid(call.where, given, "channels that are one axis, the last", change)
    over: Any = call.over  # never a Sharded: see the modules
    if measures(state, train) and alone(state, train) and not quiet:
        axes = [i for i in range(x.ndim) if i != channel]
        values = values_per_channel(call.where, as_sync(over), x.shape, axes)
        _warn_of_one(call, values, "a larger batch, use_running_average=True")
    parts, state = batch_parts(
        x,
        None,
        state,
        train=train,
        eps=call.eps,
        axis_name=over,
        weights=weights,
        channel_axis=channel,
        algorithm=call.algorithm,
        state_gradient=state_gradient,
        implementation="xla" if moved else call.implementation,
        _one_value=True,
    )
    return Parts(*map(back, parts)) if moved else parts, state


def _one_feature_axis(
    call: Call,
) -> tuple[Array, Array | None, int, Callable[[Array], Array]]:
    """Input and weights with the features on one axis, which axis, and the way back for a part."""
    if len(call.features) == 1 and call.features[0]:
        return call.x, call.weights, call.features[0], lambda part: part
    # The features last, after the examples; an input of features alone is one example.
    order = (*call.others, *call.features)
    lead = [call.x.shape[i] for i in call.others] or [1]

    def merge(v: Array) -> Array:
        return jnp.broadcast_to(v, call.x.shape).transpose(order).reshape(*lead, -1)

    def back(part: Array) -> Array:
        shape = (1,) * (len(lead) + 1 - part.ndim) + part.shape
        tail = call.shape if shape[-1] > 1 else (1,) * len(call.features)
        return part.reshape(*shape[: len(call.others)], *tail).transpose(np.argsort(order))

    spec = jax.typeof(call.x).sharding.spec  # of explicit axes, which a reshape must be told of
    out = PartitionSpec(*[spec[i] for i in call.others] or [None], None)
    known = any(axis is not None for axis in spec)
    run: Any = jax.sharding.auto_axes(merge, out_sharding=out) if known else merge
    weights = None if call.weights is None else run(call.weights)
    return run(call.x), weights, len(lead), back


def _warn_of_one(call: Call, values: Any, instead: str) -> None:
    """Warns if a statistic is of one of the `values`: Flax's norms give the bias in silence."""
    if values == 1:
        message = (
            f"{call.where}: each statistic of an input of shape {call.x.shape} is of one value, "
            f"so its variance is 0 and the output is the bias alone, as in Flax. Use {instead}, or "
            "a norm that measures over more"
        )
        warnings.warn(message, UserWarning, stacklevel=2)


def example(call: Call, axes: Axes, *, centre: bool = True) -> Parts:
    """The parts of layer norm, or of RMS norm, over any axes, and over devices that share them.

    Without `centre` no mean is subtracted, and this is RMS norm.
    """
    axes = normalize_axes(call.where, axes, call.x.ndim)
    over = _sharing(call, axes)
    if centre:
        _warn_of_one(call, _values(call, axes, over), "more than one value of each example")
        return _computed(call, _parts(_over(call, axes, over), call.eps), axes, over)
    square, count = mean_square(call.where, call.x, axes, axis_name=over, weights=call.weights)
    zero, one = jnp.zeros((), square.dtype), jnp.ones((), square.dtype)
    mu, sigma = no_mean(square.dtype), standard_deviation(square, count, call.eps)
    parts = Parts(mu, sigma, one, zero)
    return _computed(call, parts, axes, over, centred=False)


def _computed(call: Call, parts: Parts, axes: Sequence[int], over: Sync, **how: Any) -> Parts:
    """The parts, with the kernel that the module asks for."""
    lacks = no_kernel(call.weights, over.names)
    how |= {"eps": call.eps, "without": lacks}
    return by_kernel(call.where, call.implementation, parts, call.x, axes, **how)


def _parts(m: Moments, eps: float) -> Parts:
    dtype = m.mean.dtype
    return Parts(m.mean, m.sigma(eps), jnp.ones((), dtype), jnp.zeros((), dtype))


def _sharing(call: Call, axes: Sequence[int]) -> Sync:
    """Over which devices a sample is merged that is measured over these axes."""
    channels = bool({*axes} & {*call.features})
    positions = bool({*axes} - {*call.features})
    return shared(call.where, call.over, channels=channels, positions=positions)


def _values(call: Call, axes: Sequence[int], over: Sync) -> Any:
    """How many values a statistic over `axes` and devices is of."""
    values = math.prod(call.x.shape[i] for i in axes)
    return values_per_channel(call.where, over, (values,), (0,))


def _over(call: Call, axes: Sequence[int], over: Sync) -> Moments:
    """The moments over any axes and devices."""
    how: Any = {"weights": call.weights, "algorithm": call.algorithm}
    return moments_over(call.where, call.x, axes, over, spread=True, **how)


def groups_of(where: str, channels: int, num_groups: int | None, group_size: int | None) -> int:
    """The number of groups of so many channels that `num_groups` or `group_size` means.

    Raises ValueError unless one of them is given, and divides the channels.
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


def group(call: Call, groups: int, axes: Axes | None) -> Parts:
    """The parts of group norm over any axes, the last, the channels', among them.

    `None` stands for all axes but the first. With the plain name of an axis each group is merged
    with the same one of the other devices, as Flax does: it is positions that lie along it.
    """
    x, weights = call.x, call.weights
    plain = axes is None and call.over is None and x.ndim > 1
    axes = (*range(1, x.ndim - 1), -1) if axes is None else axes
    axes = normalize_axes(call.where, axes, x.ndim)
    if x.ndim - 1 not in axes:
        raise invalid(
            call.where,
            f"reduction_axes={axes} for an input of rank {x.ndim}",
            "the last axis, the channels', among them",
            f"add {x.ndim - 1}, or -1",
        )
    rest = any(i != x.ndim - 1 for i in axes)
    if isinstance(call.over, Sharded):
        groups, over = in_groups(call.where, call.over, groups, x.shape[-1], positions=rest)
    else:
        over = _sharing(call, axes)
    _warn_of_one(call, _values(call, axes, over) // groups, "fewer groups, more positions")
    if plain:
        m = group_moments(x, groups=groups, weights=weights, algorithm=call.algorithm)
        return _computed(call, _parts(m, call.eps), axes, over, groups=groups)
    split = (*x.shape[:-1], groups, x.shape[-1] // groups)
    if weights is not None:
        weights = jnp.broadcast_to(weights, (*weights.shape[:-1], x.shape[-1]))
        weights = weights.reshape(*weights.shape[:-1], *split[-2:])
    grouped = call._replace(x=x.reshape(split), weights=weights)
    parts = _parts(_over(grouped, (*axes[:-1], x.ndim), over), call.eps)

    def join(part: Array) -> Array:
        if not part.ndim:
            return part
        whole = jnp.broadcast_to(part, (*part.shape[:-2], *split[-2:]))
        return whole.reshape(*part.shape[:-2], x.shape[-1])

    return _computed(call, Parts(*map(join, parts)), axes, over, groups=groups)


def instance(call: Call) -> Parts:
    """The parts of instance norm: over all axes but the first and the features'."""
    if 0 in call.features:
        raise invalid(
            call.where,
            # Flax's own sentence, for those who look for it.
            f"feature axes {call.features} for an input of shape {call.x.shape} (The channel axes "
            "cannot include the leading dimension as this is assumed to be the batch axis.)",
            "examples on axis 0",
            "move the examples first, or add an axis for the one example",
        )
    axes = tuple(i for i in call.others if i)
    over = _sharing(call, axes)
    _warn_of_one(call, _values(call, axes, over), "LayerNorm or RMSNorm")
    return _computed(call, _parts(_over(call, axes, over), call.eps), axes, over)
