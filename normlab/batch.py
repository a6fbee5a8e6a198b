"""Batch norm: each channel measured over the examples, the positions, and the devices.

h = g · (a − μ) / σ + b        σ = √(var + ε)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab.affine import Parts, affine
from normlab.checks import (
    check_decay,
    check_eps,
    check_train,
    expand,
    gain_and_bias,
    invalid,
    normalize_axes,
)
from normlab.collective import differentiated, measure, values_per_channel
from normlab.delayed import Delayed, check_delayed
from normlab.moments import Algorithm, align_weights, check_algorithm, merge, moments
from normlab.running import BadBatch, Running, check_batch, update_running
from normlab.sync import AxisName, as_sync

BatchState = Running | Delayed
"""What batch norm keeps: `Delayed` with `Sync(every=...)`, otherwise `Running`."""


def batch_norm(
    a: Array,
    params: Any = None,
    state: BatchState | None = None,
    *,
    train: bool,
    decay: float = 0.9,
    eps: float = 1e-5,
    ddof: int = 0,
    axis_name: AxisName | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
    bad_batch: BadBatch = "skip",
) -> tuple[Array, BatchState | None]:
    """Batch normalization (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167).

    In training μ and σ² are the mean and the biased variance of each channel over the batch and
    all positions; otherwise those of `state`.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`.
      state: `Running`, from `init_running(C)`; `None` in training keeps no statistics. With
        `Sync(every=...)`, `Delayed` from `init_delayed(C)`.
      train: Whether to use, and take into the state, the statistics of this batch.
      decay: The weight of the old value in the running statistics, in [0, 1).
      eps: ε > 0, in squared units of `a`.
      ddof: 0 keeps the biased variance in the state, 1 the unbiased one. The batch itself is
        always normalized by the biased one.
      axis_name: Axes over which the batch is one: mapped ones, or those of the mesh in plain `jit`;
        or a `Sync`, that is, groups of devices or of parts of their batches.
      weights: Importance of examples or positions, aligned with the leading axes of `a` other than
        the channels': `[N]`, `[N, H, W]`. Zero leaves out.
      channel_axis: The axis of the channels.
      algorithm: How the variance is taken, an `Algorithm`.
      bad_batch: What a batch that is empty, fully masked, or holds a NaN or an Inf does to `state`:
        a `BadBatch`. The output is NaN where the input is; of a fully masked batch it is b, without
        a gradient to `a` (NaN with `"propagate"`).

    Returns:
      `(h, state)`: h in the shape and floating type of `a`, the state with its structure and
      types unchanged.

    Raises:
      ValueError: For parameters or a state that do not fit `a`, ε ≤ 0, a decay outside [0, 1),
        an unbound axis, a missing state in inference, or one value per channel in training (which
        `bad_batch="propagate"` lets pass).
      FloatingPointError: For a bad batch, with `bad_batch="raise"`.

    >>> from normlab import init_affine, init_running
    >>> a = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> h, state = batch_norm(a, init_affine(2), init_running(2), train=True)
    >>> h.round(2).tolist(), state.mean.tolist()
    ([[-1.0, -1.0], [1.0, 1.0]], [2.0, 20.0])
    """
    parts, state = batch_parts(
        a,
        params,
        state,
        train=train,
        decay=decay,
        eps=eps,
        ddof=ddof,
        axis_name=axis_name,
        weights=weights,
        channel_axis=channel_axis,
        algorithm=algorithm,
        bad_batch=bad_batch,
    )
    return affine(parts, a, weights=weights, channel_axis=channel_axis), state


def batch_parts(
    a: Array,
    params: Any,
    state: BatchState | None,
    *,
    train: bool,
    decay: float = 0.9,
    eps: float = 1e-5,
    ddof: int = 0,
    axis_name: AxisName | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
    bad_batch: BadBatch = "skip",
) -> tuple[Parts, BatchState | None]:
    """The parts and the next state of `batch_norm`, which see."""
    a = jnp.asarray(a)
    where = "batch norm"
    check_eps(where, eps)
    check_decay(where, decay)
    check_algorithm(where, algorithm)
    check_train(where, train)
    (channel,) = normalize_axes(where, channel_axis, a.ndim)
    g, b = gain_and_bias(where, params, a, channel)
    channels = a.shape[channel]
    sync = as_sync(axis_name)
    if train:
        check_delayed(where, sync.every, state, channels)
    running = state.running if isinstance(state, Delayed) else state
    if running is not None and running.mean.shape != (channels,):
        raise invalid(
            where,
            f"running statistics of shape {running.mean.shape} for an input of shape "
            f"{a.shape} with its channels on axis {channel}",
            f"shape ({channels},)",
            f"make the state with init_running({channels}), or set channel_axis",
        )
    if not train:
        if running is None:
            raise invalid(
                where,
                "train=False without a state",
                "running statistics to normalize with",
                "pass the state that training returned, or train=True for batch statistics",
            )
        mean, var = (
            expand(v.astype(g.dtype), a.ndim, channel) for v in (running.mean, running.var)
        )
        return Parts(mean, jnp.sqrt(var + eps), g, b), state
    if values_per_channel(where, sync, a.shape, channel) == 1 and bad_batch != "propagate":
        raise invalid(
            where,
            f"an input of shape {a.shape} in training, one value per channel",
            "at least two values per channel: the variance of one is zero and the output would be "
            "the bias alone",
            "use a larger batch, train=False, a norm that does not look across examples, or, for "
            'that output, bad_batch="propagate"',
        )
    weights = align_weights(where, weights, a, channel)
    axes = [i for i in range(a.ndim) if i != channel]
    if isinstance(state, Delayed):
        own = moments(a, axes, weights=weights, algorithm=algorithm)
        population = merge(own, state.others_like(own))
        m, state = differentiated(sync, own, population), state.after(own)
    else:
        m, population = measure(where, a, axes, sync, weights=weights, algorithm=algorithm)
    m = check_batch(where, m, bad_batch)
    if running is not None:
        policy = "propagate" if bad_batch == "propagate" else "skip"  # "raise" has been seen to
        running = update_running(running, population, decay=decay, ddof=ddof, bad_batch=policy)
    state = state._replace(running=running) if isinstance(state, Delayed) else running
    return Parts(m.mean, m.scale(eps), g, b), state
