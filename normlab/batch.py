"""Batch norm: each channel measured over the examples, the positions, and the devices.

h = g · (a − μ) / σ + b        σ = √(var + ε)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import KINDS, checked
from normlab._checks import gain_and_bias, invalid, normalize_axes, promote_dtype
from normlab._xla import sharded_as
from normlab.devices.merging import differentiated, measure, values_per_channel
from normlab.devices.topology import AxisName, Sync, as_sync
from normlab.equation import Parts, affine
from normlab.measure import Algorithm, Moments, merge, moments
from normlab._weights import align_weights
from normlab.population.delayed import Delayed, check_delayed
from normlab.population.domains import Domains
from normlab.population.frozen import Frozen
from normlab.population.protocol import BadBatch, Population, check_batch
from normlab.population.renorm import Renorm

BatchState = Population | tuple[()]
"""What batch norm keeps: a `Population`; or `()`, nothing, and inference uses its own batch."""


def batch_norm(
    a: Array,
    params: Any = None,
    state: BatchState | None = None,
    *,
    train: bool,
    decay: ArrayLike | None = None,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
    bad_batch: BadBatch = "skip",
    state_gradient: bool = False,
) -> tuple[Array, BatchState | None]:
    """Batch normalization (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167).

    In training μ and σ² are the mean and the biased variance of each channel over the batch and
    all positions; otherwise those of `state`.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`.
      state: A `Population`, such as `Running` from `init_running(C)`, or another of
        `init_population`; it says how the statistics are kept. With `Sync(every=...)`, `Delayed`
        from `init_delayed(C)`. `()` uses the batch's own statistics in inference too; `None`, in
        training, keeps none.
      train: Whether to use, and take into the state, the statistics of this batch.
      decay: The weight of the old value in the running statistics, in [0, 1), may be traced (a
        schedule); `None` for the state's own.
      eps: ε > 0, in squared units of `a`.
      axis_name: Axes over which the batch is one: mapped ones, or those of the mesh in plain `jit`;
        or a `Sync`, that is, groups of devices or of parts of their batches.
      weights: Importance of examples or positions, aligned with the leading axes of `a` other than
        the channels': `[N]`, `[N, H, W]`. Zero leaves out.
      channel_axis: The axis of the channels.
      algorithm: How the variance is taken, an `Algorithm`.
      bad_batch: What a batch that is empty, fully masked, or holds a NaN or an Inf does to `state`:
        a `BadBatch`. The output is NaN where the input is; of a fully masked batch it is b, without
        a gradient to `a` (NaN with `"propagate"`).
      state_gradient: Whether the new state has a gradient by `a` and by what `a` is made of, as
        learning to learn asks for. By the old state it has one in any case.

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
        axis_name=axis_name,
        weights=weights,
        channel_axis=channel_axis,
        algorithm=algorithm,
        bad_batch=bad_batch,
        state_gradient=state_gradient,
    )
    return affine(parts, a, weights=weights, channel_axis=channel_axis), state


@checked("batch norm", _one_value=KINDS["state_gradient"])
def batch_parts(
    a: Array,
    params: Any,
    state: BatchState | None,
    *,
    train: bool,
    decay: ArrayLike | None = None,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
    bad_batch: BadBatch = "skip",
    state_gradient: bool = False,
    _one_value: bool = False,
) -> tuple[Parts, BatchState | None]:
    """The parts and the next state of `batch_norm`, which see.

    Flax's modules, which warn themselves, let `_one_value` per channel pass.
    """
    a = jnp.asarray(a)
    where = "batch norm"
    (channel,) = normalize_axes(where, channel_axis, a.ndim)
    g, b = gain_and_bias(where, params, a, channel)
    sync = as_sync(axis_name)
    _check_state(where, state, sync if train else None, a.shape, channel)

    def like(v: Array) -> Array:
        """`[C]` along the channels of `a`; `[N, C]` along its examples as well."""
        others = [i for i in range(a.ndim) if i not in (0 if channel else 1, channel)]
        v = jnp.expand_dims(jnp.atleast_2d(v.astype(g.dtype)), [i + 2 for i in range(len(others))])
        return jnp.moveaxis(v, (0, 1), (0 if channel else 1, channel)) if a.ndim > 1 else v[0]

    if isinstance(state, Population) and (not train or isinstance(state, Frozen)):
        mean, var = map(like, state.read())
        return Parts(mean, jnp.sqrt(var + eps), g, b), state
    weights = align_weights(where, weights, a, channel)
    turn = functools.partial(jnp.swapaxes, axis1=0, axis2=int(channel == 0 and a.ndim > 1))
    x, weights = turn(a), None if weights is None else turn(weights)  # the examples first
    kept = channel or min(1, a.ndim - 1)
    axes = [i for i in range(a.ndim) if i != kept]
    one = values_per_channel(where, sync, x.shape, axes) == 1
    if one and not _one_value and bad_batch != "propagate":
        raise invalid(
            where,
            f"an input of shape {a.shape} in training, one value per channel",
            "at least two values per channel: the variance of one is zero and the output would be "
            "the bias alone",
            "use a larger batch, train=False, a norm that does not look across examples, or, for "
            'that output, bad_batch="propagate"',
        )
    least = 1 if one or bad_batch == "propagate" else 2
    if isinstance(state, Delayed):
        own = moments(x, axes, weights=weights, algorithm=algorithm)
        population = merge(own, state.others_like(own))
        m, state = differentiated(sync, own, population), state.after(own)
    elif isinstance(state, Domains) and state.current.ndim:
        m, population = _by_domain(where, x, axes, sync, weights, algorithm, least, state)
    else:
        m, population = measure(
            where, x, axes, sync, weights=weights, algorithm=algorithm, least=least
        )
    m = Moments(*map(turn, check_batch(where, m, bad_batch)))
    mu, sigma = m.mean, m.sigma(eps)
    if isinstance(state, Renorm):
        mu, sigma = state.correct(mu, sigma, eps, like)
    if isinstance(state, Population) and train:
        population = sharded_as(population, kept - x.ndim, state.read()[0])
        policy = "propagate" if bad_batch == "propagate" else "skip"  # "raise" has been seen to
        population = population if state_gradient else lax.stop_gradient(population)
        state = state.update(population, decay=decay, bad_batch=policy)
    return Parts(mu, sigma, g, b), state


def _check_state(
    where: str, state: Any, sync: Sync | None, shape: tuple[int, ...], channel: int
) -> None:
    """Raises ValueError unless batch norm can use the state; without a `sync` for inference."""
    channels = shape[channel]
    if sync and not isinstance(state, Frozen):
        check_delayed(where, sync.every, state, channels)
    elif state is None and not sync:
        raise invalid(
            where,
            "train=False without a state",
            "running statistics to normalize with",
            "pass the state that training returned; for the batch's own statistics train=True, or "
            "the state ()",
        )
    if not isinstance(state, Population):
        return
    found = state.read()[0].shape
    inner = state.of if isinstance(state, Frozen) else state
    by_example = isinstance(inner, Domains) and inner.current.ndim and len(shape) > 1
    examples = shape[0 if channel or len(shape) == 1 else 1]
    if found != ((examples, channels) if by_example else (channels,)):
        raise invalid(
            where,
            f"running statistics of shape {found} for an input of shape "
            f"{shape} with its channels on axis {channel}",
            f"shape ({examples}, {channels})" if by_example else f"shape ({channels},)",
            f"make the state with init_running({channels}), or set channel_axis",
        )


def _by_domain(
    where: str,
    a: Array,
    axes: list[int],
    sync: Sync,
    weights: Array | None,
    algorithm: Algorithm,
    least: int,
    state: Domains,
) -> tuple[Moments, Moments]:
    """As `measure`, of the examples of each domain: `m` of each example's, the rest `[D, ...]`."""
    one = jnp.ones((), promote_dtype(a)) if weights is None else weights
    numbers = jnp.arange(state.domains, dtype=jnp.int32)
    member = state.current[None] == numbers[:, None]
    member = member.reshape(*member.shape, *(1,) * (a.ndim - 1)).astype(one.dtype)
    run = functools.partial(measure, where, a, axes, sync, algorithm=algorithm, least=least)
    m, population = jax.vmap(lambda member: run(weights=member * one))(member)
    examples = jnp.arange(a.shape[0], dtype=jnp.int32)

    def own(field: Array) -> Array:
        return field[state.current, examples if field.shape[1] > 1 else 0]

    return Moments(*map(own, m)), population
