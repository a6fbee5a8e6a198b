"""Batch norm: each channel measured over the examples, the positions, and the devices.

    h = g · (a − μ) / σ + b        σ = √(var + ε)

In training μ and var are those of the batch; in inference those of a *population*, the state that
took the batches in. What a population may decide beside that is in `normlab.population.optional`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import KINDS, checked
from normlab._checks import check_values, gain_and_bias, one_array, promote_dtype
from normlab._weights import aligned
from normlab._xla import sharded_as
from normlab.devices.mapped import is_bound
from normlab.devices.merging import measure, measure_segments, values_per_channel
from normlab.devices.topology import AxisName, Sync, as_sync
from normlab.equation import Affine, Parts, affine
from normlab.implementation import Implementation, by_columns
from normlab.matrix import along
from normlab.measure import Algorithm, Moments, moments
from normlab.population._batches import BadBatch, check_batch
from normlab.population.backward import watched
from normlab.population.optional import (
    Run,
    alone,
    backward,
    check_state,
    measures,
    normalizer,
    observe,
    pivot,
    updated,
    updated_first,
)
from normlab.population.protocol import Population

BatchState = Population | tuple[()] | None
"""What batch norm keeps: a `Population`; or `()`, nothing, and inference uses its own batch."""

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    S = TypeVar("S", bound=BatchState, default=None)
else:
    from typing import TypeVar

    S = TypeVar("S")


def batch_norm(
    a: ArrayLike,
    params: Affine | None = None,
    state: S = None,
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
    implementation: Implementation = "auto",
) -> tuple[Array, S]:
    """Batch normalization (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167).

    h = g · (a − μ) / √(var + ε) + b: in training μ and var are the mean and the biased variance of
    each channel over the batch and all positions; otherwise those of `state`.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`.
      state: A `Population`, such as `Running` from `init_running(C)`, or another of
        `normlab.population`; it says how the statistics are kept. With `Sync(every=...)`, `Delayed`
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
      implementation: By XLA, `"xla"`, or by kernels, an `Implementation`; as in `layer_norm`.

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
    options: dict[str, Any] = {"decay": decay, "eps": eps, "axis_name": axis_name}
    options |= {"algorithm": algorithm, "bad_batch": bad_batch, "state_gradient": state_gradient}
    options |= {"weights": weights, "channel_axis": channel_axis}
    options["implementation"] = implementation
    a = one_array(a)
    parts, state = batch_parts(a, params, state, train=train, **options)
    return affine(parts, a, weights=weights, channel_axis=channel_axis), state


@checked("batch norm", _one_value=KINDS["state_gradient"])
def batch_parts(
    a: ArrayLike,
    params: Affine | None = None,
    state: S = None,
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
    implementation: Implementation = "auto",
    _one_value: bool = False,
) -> tuple[Parts, S]:
    """The parts and the next state of `batch_norm`, which see.

    Flax's modules, which warn themselves, let `_one_value` per channel pass.

    >>> parts, _ = batch_parts(jnp.array([[1.0, 3.0], [5.0, 9.0]]), train=True)
    >>> print(parts.mu, parts.sigma.round())
    [[3. 6.]] [[2. 3.]]
    """
    where = "batch norm"
    a, channel, weights = aligned(where, a, weights, channel_axis)
    g, b = gain_and_bias(where, params, a, channel)
    sync = as_sync(axis_name)
    check_state(where, state, sync, train, a.shape, channel)
    without = {
        "weights": weights is not None,
        "parts of batches": not sync.along,
        "algorithm='one_pass'": algorithm == "one_pass",
    }
    kernel = by_columns(where, implementation, a, channel, without)
    m, population, kept = None, None, 0
    if measures(state, train):
        x, w, axes, kept = examples_first(a, weights, channel)
        one = values_per_channel(where, sync, x.shape, axes) == 1
        itself = alone(state, train)
        refused = one and itself and not _one_value and bad_batch != "propagate"
        change = "use a larger batch, train=False, a norm that does not look across examples, "
        change += 'or, for that output, bad_batch="propagate"'
        check_values(where, f"{a.shape} in training", refused, "channel", change)
        how: Any = {"least": 1 if one or not itself or bad_batch == "propagate" else 2}
        how |= {"pivot": pivot(state, sync)}

        def measured(sync: Sync, w: Array | None) -> tuple[Moments, Moments]:
            of = kernel.moments if kernel and w is None else moments
            return measure(where, x, axes, sync, weights=w, algorithm=algorithm, of=of, **how)

        def apart(sync: Sync, ids: Array, number: int) -> tuple[Moments, Moments]:
            return measure_segments(x, axes, sync, ids, number, weights=w, **how)

        each = functools.partial(moments, algorithm=algorithm)
        run = by_member(measured, each, x, w, axes, train, apart)
        m, population, state = observe(state, run, sync)
        m = _per_channel(check_batch(where, m, bad_batch), kept)
    before = state
    if train and population is not None and isinstance(state, Population):
        population = sharded_as(population, kept - a.ndim, state.read()[0])
        state = after(state, population, decay, bad_batch, state_gradient)
    asked = state if updated_first(state) else before
    mu, sigma = normalizer(asked, m, eps, train=train and m is not None)
    mu, sigma = (along(v.astype(g.dtype), a.ndim, channel) for v in (mu, sigma))
    back = backward(before, m, eps) if train and m is not None else None
    if back is not None and population is not None:
        back = jax.tree.map(lambda v: along(v.astype(g.dtype), a.ndim, channel), back)
        sigma = watched(sigma, a, weights, back, population.count.mean())
    parts = Parts(mu, sigma, g, b)
    return kernel.parts(parts) if kernel else parts, state


def by_member(
    measured: Callable[[Sync, Array | None], tuple[Moments, Moments]],
    each: Callable[..., Moments],
    x: Array,
    w: Array | None,
    axes: Sequence[int],
    train: bool,
    apart: Callable[[Sync, Array, int], tuple[Moments, Moments]] | None = None,
) -> Run:
    """What `observe` runs: `measured(sync, weights)`, also of the examples of each id alone.

    `each(x, axes, weights=)` measures every example by itself; `apart(sync, ids, number)` those of
    each id at once, where all of the batch is one; without it every id takes a pass.
    """
    inside = [i for i in axes if i]

    def measure(sync: Sync, ids: Array | None = None, number: int = 1) -> tuple[Moments, Moments]:
        if ids is None:
            return measured(sync, w)
        if apart is not None and sync.whole and (not sync.names or is_bound(sync.names)):
            return apart(sync, ids, number)

        def of_one(member: Array) -> tuple[Moments, Moments]:
            among = member.reshape(-1, *(1,) * (x.ndim - 1)).astype(promote_dtype(x))
            return measured(sync, among if w is None else among * w)

        return jax.vmap(of_one)(ids == jnp.arange(number, dtype=ids.dtype)[:, None])

    alone = functools.partial(each, x, inside, weights=w)
    return Run(measure, alone, math.prod(x.shape[i] for i in inside), train)


def after(
    state: Any, population: Moments, decay: Any, bad_batch: BadBatch, state_gradient: bool
) -> Any:
    """The state that has taken in what a batch, whose bad values were seen to, was measured to."""
    policy = "propagate" if bad_batch == "propagate" else "skip"  # "raise" has been seen to
    population = population if state_gradient else lax.stop_gradient(population)
    return updated(state, population, decay=decay, bad_batch=policy)


@checked("batch norm")
def batch_moments(
    a: ArrayLike,
    *,
    axis_name: AxisName | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Moments:
    """The moments, broadcastable to `a`, that `batch_norm`, which see, normalizes training with.

    >>> m = batch_moments(jnp.array([[1.0, 3.0], [5.0, 9.0]]))
    >>> print(m.mean, m.var())
    [[3. 6.]] [[4. 9.]]
    """
    a, channel, weights = aligned("batch norm", a, weights, channel_axis)
    x, w, axes, kept = examples_first(a, weights, channel)
    m, _ = measure("batch norm", x, axes, as_sync(axis_name), weights=w, algorithm=algorithm)
    return Moments(*(along(v, a.ndim, channel) for v in _per_channel(m, kept)))


def examples_first(
    a: Array, weights: Array | None, channel: int
) -> tuple[Array, Array | None, list[int], int]:
    """`a` and the weights with the examples on axis 0; the axes to measure over; the channels'."""
    if channel == 0 and a.ndim > 1:
        a = jnp.swapaxes(a, 0, 1)
        weights = None if weights is None else jnp.swapaxes(weights, 0, 1)
    kept = channel or min(1, a.ndim - 1)
    axes = [i for i in range(a.ndim) if i != kept]
    return a, weights, axes, kept


def _per_channel(m: Moments, kept: int) -> Moments:
    """Fields `[1, C]`, or `[N, C]` where the examples have moments of their own."""
    others = [i for i in range(1, m.mean.ndim) if i != kept]
    return Moments(*(jnp.atleast_2d(jnp.squeeze(field, others)) for field in m))
