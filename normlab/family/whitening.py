"""Whitening norms: the channels of a group are decorrelated, where batch norm scales each alone.

    h = g · W(a − μ) + b        W·(Σ + εI)·Wᵀ = I

Σ is the covariance of D channels. What is measured are co-moments (`normlab.comoments`): of the
batch in whitening, of the groups of one example in group whitening, of both in switchable
whitening. A population keeps Σ and not W, so that it is exact under merging; W is made at each
call. Which W, of all that whiten, is the `Whitener`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import (
    KINDS,
    anything,
    checked,
    flag,
    integer,
    one_of,
    sequence,
    settled_decay,
    settled_eps,
)
from normlab._checks import check_groups, check_values, gain_and_bias, promote_dtype
from normlab._sums import standard_deviation
from normlab._trees import node
from normlab._weights import aligned
from normlab._xla import partitioned
from normlab.batch import after, by_member, examples_first
from normlab.comoments import CoMoments, alike, in_groups
from normlab.devices.merging import layout, measure, values_per_channel
from normlab.devices.topology import AxisName, Sync, as_sync, plan
from normlab.equation import affine
from normlab.errors import invalid
from normlab.gains import Gain
from normlab.making import applied, initial_affine
from normlab.matrix import MatrixParts, along
from normlab.measure import Moments
from normlab.population._batches import BadBatch, check_batch
from normlab.population.by_name import init_batch_state
from normlab.population.cumulative import Estimator
from normlab.population.optional import (
    check_state,
    covariance,
    measures,
    observe,
    per_example,
    pivot,
)
from normlab.population.protocol import Population
from normlab.sharded import OVER, ExampleAxes, Sharded, merged, names_of, shared, sharers
from normlab.site import SHAPES, Norm, Site, State

Whitener = Literal["cholesky", "zca", "pca", "newton"]
"""Which W, of all with W·Σ·Wᵀ = I (they differ by a rotation).

`"cholesky"`: L⁻¹ of Σ = L·Lᵀ, lower triangular (Siarohin et al. 2019,
https://arxiv.org/abs/1806.00420): the one that a rescaled channel does not change, and the
cheapest. `"zca"`: Σ^(−½), symmetric (decorrelated batch norm, Huang et al. 2018,
https://arxiv.org/abs/1804.08450), of all h the nearest to a. `"pca"`: the principal axes by
falling variance, each with its largest entry positive; where two variances cross, the axes change
places. `"newton"`: `steps` of Newton's iteration for Σ^(−½) (IterNorm, Huang et al. 2019,
https://arxiv.org/abs/1904.03441), which leaves directions of small variance unwhitened.
"""

_WHITENER: dict[str, Any] = {
    "whitener": one_of(Whitener, "the name of a whitener"),
    "steps": integer("a number of steps, at least 1", "use 5, as the paper", 1),
    "relative": flag(),
}
_BATCH_AXES: dict[str, Any] = {
    "axis_name": KINDS["axis_name"]._replace(
        expected="the axes along which the batch lies: a group has its channels on one device",
        change="whiten the channels of each device, in groups of those, and name the axis of the "
        "batch alone, or none",
    )
}
_GROUPS: dict[str, Any] = {
    "groups": KINDS["groups"]._replace(expected="a number of groups, or None for group_size"),
    "group_size": integer("a number of channels, at least 1", "use 16 or 64", 1),
}


@checked("whitening", group_size=_GROUPS["group_size"], **_WHITENER, **_BATCH_AXES)
def whitening_parts(
    a: ArrayLike,
    params: Any = None,
    state: Any = None,
    *,
    train: bool,
    groups: int | None = None,
    group_size: int = 16,
    whitener: Whitener = "cholesky",
    steps: int = 5,
    eps: float = 1e-3,
    relative: bool = False,
    decay: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    bad_batch: BadBatch = "skip",
    state_gradient: bool = False,
) -> tuple[MatrixParts, Any]:
    """The parts and the next state of `whitening_norm`, which see.

    >>> import jax
    >>> a = jax.random.normal(jax.random.key(0), (64, 2)) @ jnp.array([[1.0, 2.0], [0.0, 1.0]])
    >>> parts, _ = whitening_parts(a, train=True)
    >>> h = parts.apply(a)
    >>> bool((abs(h.T @ h / 64 - jnp.eye(2)) < 0.01).all())
    True
    """
    where = "whitening"
    a, channel, w = aligned(where, a, weights, channel_axis)
    g, b = gain_and_bias(where, params, a, channel)
    groups = number_of_groups(where, a.shape[channel], groups, group_size)
    how: dict[str, Any] = {"decay": decay, "bad_batch": bad_batch, "state_gradient": state_gradient}
    found = _batch(where, a, w, channel, groups, state, as_sync(axis_name), train=train, **how)
    how = {"whitener": whitener, "steps": steps, "eps": eps, "relative": relative}
    matrix = _distinct(found.block, lambda c, n: whitening_matrix(c, n, **how), found[1:3])
    mu, sigma, matrix = (v.astype(g.dtype) for v in (found.mean, _sigma(*found[1:3], eps), matrix))
    mu, sigma = (along(v, a.ndim, channel) for v in (mu, sigma))
    return MatrixParts(mu, sigma, matrix, g, b, channel), found.state


@checked("whitening", group_size=_GROUPS["group_size"], **_WHITENER, **_BATCH_AXES)
def whitening_norm(
    a: ArrayLike,
    params: Any = None,
    state: Any = None,
    *,
    train: bool,
    groups: int | None = None,
    group_size: int = 16,
    whitener: Whitener = "cholesky",
    steps: int = 5,
    eps: float = 1e-3,
    relative: bool = False,
    decay: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    bad_batch: BadBatch = "skip",
    state_gradient: bool = False,
) -> tuple[Array, Any]:
    """Batch whitening: batch norm that decorrelates the channels of a group as well.

    h = g · W(a − μ) + b with W·(Σ + εI)·Wᵀ = I: in training μ and Σ are the mean and the biased
    covariance of D channels over the batch and all positions; otherwise those of `state`.

    The papers' codes keep an average of W, whose inverse is no average of Σ; here the population
    keeps Σ. Newton's iteration is in its coupled form: the published one diverges from about 10
    steps and a condition number of 100 on.

    Devices send C·D + C + 1 numbers. What a step costs: docs/family.md. On a CPU many factors of
    matrices are faster with one thread in BLAS, `OPENBLAS_NUM_THREADS=1`.

    Other arguments as those of `batch_norm`, which see.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`.
      state: A `Population` of co-moments, such as `init_running(C, groups=G)`; `()` or `None`.
      train: As in `batch_norm`.
      groups: G, a number of groups of neighbouring channels that divides `C`; `None` for as few as
        `group_size` allows.
      group_size: The most channels in a group.
      whitener: A `Whitener`.
      steps: Those of `"newton"`.
      eps: ε, added to the variances, in squared units of `a`.
      relative: Whether ε is in units of the mean variance of a group instead.
      decay: As in `batch_norm`.
      axis_name: As in `batch_norm`. Channels that lie on several devices need no name: a group has
        its channels on one, and `groups` are those of the device.
      weights: As in `batch_norm`, the same for all channels of a value.
      channel_axis: The axis of the channels.
      bad_batch: As in `batch_norm`.
      state_gradient: As in `batch_norm`.

    Returns:
      `(h, state)`.

    Raises:
      ValueError: As `batch_norm`; also in training if a channel has no more values than its group
        has channels: then every batch would become the same set of points.

    >>> a = jnp.array([[3.0, 1.0], [1.0, 3.0], [-3.0, -1.0], [-1.0, -3.0]])
    >>> h, _ = whitening_norm(a, train=True, eps=1e-9)
    >>> (h.T @ h / 4).round(4).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    how: dict[str, Any] = {"groups": groups, "group_size": group_size, "whitener": whitener}
    how |= {"steps": steps, "eps": eps, "relative": relative, "decay": decay}
    how |= {"axis_name": axis_name, "bad_batch": bad_batch, "state_gradient": state_gradient}
    layout: dict[str, Any] = {"weights": weights, "channel_axis": channel_axis}
    parts, state = whitening_parts(a, params, state, train=train, **how, **layout)
    return affine(parts, a, **layout), state


class _Measured(NamedTuple):
    """What whitens a batch.

    Attributes:
      mean: `[C]`, `[1, C]` or `[N, C]`.
      covariance: `[G, D, D]`, with the same axis before.
      values: Their number, broadcastable to the covariance; zero where nothing was measured.
      block: How many consecutive examples share theirs.
      state: The next state.
    """

    mean: Array
    covariance: Array
    values: Array
    block: int
    state: Any


def _batch(
    where: str,
    a: Array,
    weights: Array | None,
    channel: int,
    groups: int,
    state: Any,
    sync: Sync,
    *,
    train: bool,
    decay: Any,
    bad_batch: BadBatch,
    state_gradient: bool,
) -> _Measured:
    """The co-moments of the batch, or those of the state, and the next state."""
    check_state(where, state, sync, train, a.shape, channel, groups)
    m, population, block = None, None, 1
    if measures(state, train):
        x, w, axes, kept = examples_first(a, weights, channel)
        size = a.shape[channel] // groups
        values = values_per_channel(where, sync, x.shape, axes)
        few = isinstance(values, int) and 0 < values <= size
        alone = train or not isinstance(state, Population)
        if few and alone and bad_batch != "propagate":
            raise invalid(
                where,
                f"an input of shape {a.shape} in training, {values} values per channel for groups "
                f"of {size} channels",
                "more values than channels in a group: as many whiten to the same points, whatever "
                "they are",
                "use more groups, a larger batch, train=False, batch norm, which whitens groups of "
                'one, or, for that output, bad_batch="propagate"',
            )
        least = 1 if few or bad_batch == "propagate" else size + 1

        def of(x: Array, axes: Sequence[int], weights: Array | None) -> CoMoments:
            last = x.ndim - a.ndim + kept  # the shards of a batch are an axis before
            axes = [i - (i > last) for i in axes]
            w = None if weights is None else jnp.moveaxis(weights, last, -1)
            return in_groups(where, jnp.moveaxis(x, last, -1), axes, w, groups)

        def measured(sync: Sync, w: Array | None) -> tuple[Moments, Moments]:
            how: Any = {"least": least, "of": of, "pivot": pivot(state, sync)}
            return measure(where, x, axes, sync, weights=w, **how)

        run = by_member(measured, of, x, w, axes, train)
        m, population, state = observe(state, run, sync)
        m = jax.tree.map(
            lambda f: f.reshape(f.shape[0], *f.shape[-3:]), check_batch(where, m, bad_batch)
        )
        if not sync.whole and not per_example(state):
            sizes, examples = layout(where, sync, x.shape[0])
            block = examples // plan(where, sync, sizes, examples).shards
    mean, cov = covariance(state, m)
    count = jnp.ones((1, 1, 1), cov.dtype) if m is None else m.count
    mean = mean.reshape(*mean.shape[:-3], -1) if m is not None else mean
    if train and population is not None and isinstance(state, Population):
        state = after(state, population, decay, bad_batch, state_gradient)
    return _Measured(mean, cov, count, block, state)


def _sigma(cov: Array, count: Array, eps: float) -> Array:
    """√(var + ε) `[..., C]` of each channel, of covariances `[..., G, D, D]`."""
    var = jnp.diagonal(cov, axis1=-2, axis2=-1)
    sigma = standard_deviation(var, count.astype(var.dtype)[..., 0], eps)
    return sigma.reshape(*sigma.shape[:-2], -1)


def _distinct(block: int, f: Callable[..., Array], fields: Sequence[Array]) -> Array:
    """`f` of fields of each example, of which each block has the same."""
    if block == 1:
        return partitioned(f, *fields)
    made = partitioned(f, *(v[::block] if v.shape[:1] != (1,) else v for v in fields))
    return jnp.repeat(made, block, axis=0)


def number_of_groups(where: str, channels: int, groups: int | None, group_size: int) -> int:
    """G; raises ValueError unless it divides the channels, or none does."""
    if groups is not None:
        check_groups(where, groups, channels)
        return groups
    size = max(d for d in range(1, min(channels, group_size) + 1) if channels % d == 0)
    if size == 1 < min(channels, group_size):
        raise invalid(
            where,
            f"group_size={group_size} for {channels} channels",
            "a size up to which a number divides the channels",
            f"use group_size={channels}, groups=1, or batch norm, which whitens groups of one",
        )
    return channels // size


@checked("group whitening", axis_name=OVER, **_WHITENER)
def group_whitening_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    groups: int,
    whitener: Whitener = "newton",
    steps: int = 5,
    eps: float = 1e-5,
    relative: bool = False,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Any:
    """The `MatrixParts` of `group_whitening_norm`, which see.

    >>> import jax
    >>> a = jax.random.normal(jax.random.key(0), (2, 16, 4))
    >>> parts = group_whitening_parts(a, groups=2)
    >>> parts.apply(a).shape
    (2, 16, 4)
    """
    where = "group whitening"
    a, channel, w = aligned(where, a, weights, channel_axis, by_example=True)
    channels = a.shape[channel]
    check_groups(where, groups, channels)
    g, b = gain_and_bias(where, params, a, channel)
    over = shared(where, axis_name, channels=False, positions=True)
    if len(over.names) < len(names_of(axis_name)) or (
        over.names and groups > 1 and not isinstance(axis_name, Sharded)
    ):
        expected = "positions along it: the covariances of groups want all channels on each device"
        change = "pass axis_name=Sharded(positions=...), gather the channels, or use group norm"
        raise invalid(where, f"groups={groups} with axis_name={axis_name!r}", expected, change)
    values = math.prod(a.shape[1:]) * sharers(where, over) // groups
    if isinstance(values, int) and 0 < values <= groups:
        given = f"an input of shape {a.shape}, {values} values in each of {groups} groups"
        change = "use fewer groups, or group norm, which does not decorrelate them"
        raise invalid(where, given, "more values in a group than groups", change)
    how: Any = {"whitener": whitener, "steps": steps, "eps": eps, "relative": relative}

    def measured(a: Array, w: Array | None) -> tuple[Array, Array, Array]:
        a = jnp.moveaxis(a, channel, -1)
        w = alike(where, w if w is None else jnp.moveaxis(w, channel, -1), 3)
        columns = a.reshape(*a.shape[:-1], groups, -1).mT[..., None, :, None]
        m = CoMoments.measured(columns, range(1, a.ndim), weights=w)
        m = merged(where, m, over, spread=True)
        sigma = standard_deviation(m.squares / jnp.where(m.count > 0, m.count, 1), m.count, eps)
        return m.mean, sigma, whitening_matrix(m.var(), m.count, **how)

    *two, matrix = (v.astype(g.dtype) for v in partitioned(measured, a, w))
    mu, sigma = (
        along(jnp.repeat(v.reshape(-1, groups), channels // groups, -1), a.ndim, channel)
        for v in two
    )
    matrix = matrix.reshape(-1, 1, groups, groups)
    return MatrixParts(mu, sigma, matrix, g, b, channel, strided=True)


@applied(group_whitening_parts)
def group_whitening_norm() -> None:
    """Group whitening (Huang et al. 2021, https://arxiv.org/abs/2009.13333).

    h = g · W(a − μ) + b: of each example, μ and Σ `[groups, groups]` are the means and the
    covariance of the groups of neighbouring channels; a value of a group is one of its channels
    at one position. Group norm is the same without the covariances. The paper's code has no ε and
    the published form of Newton's iteration.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`.
      groups: The number of groups; divides `C`.
      whitener: A `Whitener`, `"zca"` or its approximation `"newton"` in the paper.
      steps: Those of `"newton"`.
      eps: ε, added to the variances, in squared units of `a`.
      relative: Whether ε is in units of the mean variance instead.
      axis_name: `Sharded(positions=...)`, mapped axes along which the positions lie. Channels on
        several devices are refused: Σ has covariances between all groups.
      weights: Importance of positions, as in `group_norm`, the same for all channels.
      channel_axis: The axis of the channels.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: If a group has no more values than there are groups, or as `group_norm`.

    >>> a = jnp.array([[3.0, 1.0, -3.0, -1.0, 1.0, 3.0, -1.0, -3.0]])
    >>> h = group_whitening_norm(a, groups=2, whitener="zca").reshape(2, 4)
    >>> (h @ h.T / 4).round(2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """


Statistic = Literal["bw", "iw", "bn", "in", "ln"]
"""What switchable whitening mixes: batch and instance whitening, batch, instance and layer norm."""


@node
class Switch(NamedTuple):
    """The params of switchable whitening.

    Attributes:
      g: `[C]`, the gain, or `None`.
      b: `[C]`, the bias, or `None`.
      of_mean: `[k]`, how much each mean counts, before the softmax.
      of_covariance: `[k]`, how much each covariance counts, before the softmax.
    """

    g: Array | None
    b: Array | None
    of_mean: Array
    of_covariance: Array


_OF = sequence(one_of(Statistic, ""), "some of 'bw', 'iw', 'bn', 'in', 'ln'", "use these names")


@checked(
    "switchable whitening",
    of=_OF,
    group_size=_GROUPS["group_size"],
    **_WHITENER,
    **_BATCH_AXES,
)
def switchable_whitening_parts(
    a: ArrayLike,
    params: Any = None,
    state: Any = None,
    *,
    train: bool,
    of: tuple[Statistic, ...] = ("bw", "iw"),
    groups: int | None = None,
    group_size: int = 16,
    whitener: Whitener = "newton",
    steps: int = 5,
    eps: float = 1e-5,
    relative: bool = False,
    decay: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    bad_batch: BadBatch = "skip",
    state_gradient: bool = False,
) -> tuple[MatrixParts, Any]:
    """The parts and the next state of `switchable_whitening_norm`, which see.

    >>> import jax
    >>> a = jax.random.normal(jax.random.key(0), (4, 16, 4))
    >>> parts, _ = switchable_whitening_parts(a, train=True, of=("bw",))
    >>> parts.apply(a).shape
    (4, 16, 4)
    """
    where = "switchable whitening"
    a, channel, w = aligned(where, a, weights, channel_axis, by_example=True)
    g, b = gain_and_bias(where, params, a, channel)
    groups = number_of_groups(where, a.shape[channel], groups, group_size)
    if not of:
        raise invalid(where, "of=()", "one statistic at least", 'use of=("bw", "iw")')
    positions = math.prod(a.shape[1:]) // a.shape[channel]
    change = 'use of=("bw", "ln") in a dense layer, or whitening'
    also = "an input [N, ..., C] with positions between examples and channels, "
    one = positions == 1 and bool({"iw", "in"} & {*of})
    check_values(where, a.shape, one, "example and channel", change, also)
    found: dict[str, tuple[Array, Array]] = {}
    count = jnp.ones((1, 1, 1), g.dtype)
    if {"bw", "bn"} & {*of}:
        how: dict[str, Any] = {"decay": decay, "bad_batch": bad_batch}
        how |= {"state_gradient": state_gradient, "train": train}
        batch = _batch(where, a, w, channel, groups, state, as_sync(axis_name), **how)
        state, count = batch.state, batch.values
        found["bw"] = batch.mean, batch.covariance
    if {"iw", "in", "ln"} & {*of}:

        def measured(a: Array, w: Array | None) -> CoMoments:
            a = jnp.moveaxis(a, channel, -1)
            w = w if w is None else jnp.moveaxis(w, channel, -1)
            return in_groups(where, a, range(1, a.ndim - 1), w, groups)

        m = partitioned(measured, a, w)
        m = jax.tree.map(lambda f: f.reshape(f.shape[0], *f.shape[-3:]), m)
        count = jnp.minimum(count, m.count)
        found["iw"] = m.mean.reshape(m.mean.shape[0], -1), m.var()
        mean = m.mean.mean((-3, -2), keepdims=True)
        square = (m.squares / jnp.where(m.count > 0, m.count, 1)) + jnp.square(m.mean - mean)
        eye = jnp.eye(m.m2.shape[-1], dtype=m.m2.dtype)
        found["ln"] = mean[..., 0, 0], square.mean((-3, -2), keepdims=True) * eye
    for whole, alone in (("bw", "bn"), ("iw", "in")):
        if whole in found:
            mean, cov = found[whole]
            found[alone] = mean, cov * jnp.eye(cov.shape[-1], dtype=cov.dtype)
    one = jnp.ones(len(of), g.dtype)
    logits = (one, one) if params is None else (params.of_mean, params.of_covariance)

    def mixed(i: int, logits: Array) -> Array:
        weights = jax.nn.softmax(logits.astype(g.dtype))
        each = (w * found[name][i].astype(g.dtype) for name, w in zip(of, weights, strict=True))
        return functools.reduce(jnp.add, each)

    mean, cov = map(mixed, (0, 1), logits)
    how = {"whitener": whitener, "steps": steps, "eps": eps, "relative": relative}
    matrix = partitioned(lambda c, n: whitening_matrix(c, n, **how), cov, count.astype(g.dtype))
    mean = jnp.broadcast_to(mean, (*mean.shape[:-1], a.shape[channel]))
    mu, sigma = (along(v, a.ndim, channel) for v in (mean, _sigma(cov, count, eps)))
    return MatrixParts(mu, sigma, matrix, g, b, channel), state


@checked(
    "switchable whitening",
    of=_OF,
    group_size=_GROUPS["group_size"],
    **_WHITENER,
    **_BATCH_AXES,
)
def switchable_whitening_norm(
    a: ArrayLike,
    params: Any = None,
    state: Any = None,
    *,
    train: bool,
    of: tuple[Statistic, ...] = ("bw", "iw"),
    groups: int | None = None,
    group_size: int = 16,
    whitener: Whitener = "newton",
    steps: int = 5,
    eps: float = 1e-5,
    relative: bool = False,
    decay: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    bad_batch: BadBatch = "skip",
    state_gradient: bool = False,
) -> tuple[Array, Any]:
    """Switchable whitening (Pan et al. 2019, https://arxiv.org/abs/1904.09739).

    h = g · W(a − Σ w·μ) + b with W·(Σ w'·Σ_k + εI)·Wᵀ = I for w and w', each the softmax of learned
    logits that start at 1. The statistics are those `of` batch and instance whitening (`"bw"`,
    `"iw"`), the diagonals of these (`"bn"`, `"in"`), and the mean and the variance of all values of
    an example (`"ln"`).

    The paper's code gives the two diagonals the weights of the whole matrices, takes the unbiased
    variance of a layer, and begins its averages at 0; here it is as in the paper's equations.

    Args:
      a: `[N, ..., C]`.
      params: `Switch`, or `None`.
      state: As in `whitening_norm`; without a statistic of the batch nothing is kept.
      train: As in `batch_norm`.
      of: What is mixed, some `Statistic`s.
      groups: As in `whitening_norm`.
      group_size: As in `whitening_norm`.
      whitener: A `Whitener`, `"newton"` in the paper's code.
      steps: Those of `"newton"`.
      eps: ε, added to the variances, in squared units of `a`.
      relative: As in `whitening_norm`.
      decay: As in `batch_norm`.
      axis_name: As in `batch_norm`.
      weights: As in `batch_norm`, the same for all channels of a value.
      channel_axis: The axis of the channels.
      bad_batch: As in `batch_norm`.
      state_gradient: As in `batch_norm`.

    Returns:
      `(h, state)`.

    Raises:
      ValueError: As `whitening_norm`, and without positions for a statistic of an instance.

    >>> a = jnp.array([[[3.0, 1.0], [1.0, 3.0]], [[-3.0, -1.0], [-1.0, -3.0]]])
    >>> h, _ = switchable_whitening_norm(a, train=True, of=("bw",), whitener="zca")
    >>> (h.reshape(4, 2).T @ h.reshape(4, 2) / 4).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    how: dict[str, Any] = {"groups": groups, "group_size": group_size, "whitener": whitener}
    how |= {"steps": steps, "eps": eps, "relative": relative, "decay": decay}
    how |= {"axis_name": axis_name, "bad_batch": bad_batch, "state_gradient": state_gradient}
    layout: dict[str, Any] = {"weights": weights, "channel_axis": channel_axis}
    how["of"] = of
    parts, state = switchable_whitening_parts(a, params, state, train=train, **how, **layout)
    return affine(parts, a, **layout), state


# W of Σ.


def whitening_matrix(
    cov: Array,
    count: Array | float = 1.0,
    *,
    whitener: Whitener = "cholesky",
    steps: int = 5,
    eps: float = 1e-3,
    relative: bool = False,
) -> Array:
    """W `[..., D, D]` with W·(Σ + εI)·Wᵀ = I; zero where the count is."""
    eye = jnp.eye(cov.shape[-1], dtype=cov.dtype)
    scale = jnp.trace(cov, axis1=-2, axis2=-1)[..., None, None] / len(eye)
    added = eps * jnp.where(scale > 0, scale, 1) if relative else eps
    cov = jnp.where(count > 0, cov, eye) + added * eye
    if whitener == "newton":
        matrix = _newton(cov, steps)
    else:
        matrix = {"cholesky": _cholesky, "zca": _zca, "pca": _pca}[whitener](cov)
    return jnp.where(count > 0, matrix, 0)


def _cholesky(cov: Array) -> Array:
    """L⁻¹.

    Where rounding has left no positive definite matrix, 16·D units of roundoff are added to the
    variances.
    """
    eye = jnp.eye(cov.shape[-1], dtype=cov.dtype)
    fixed = lax.stop_gradient(cov)
    fails = jnp.isnan(jnp.linalg.cholesky(fixed)).any((-1, -2), keepdims=True)
    more = 16 * len(eye) * jnp.finfo(cov.dtype).eps * fixed * eye
    root = jnp.linalg.cholesky(cov + jnp.where(fails, more, 0))
    return lax.linalg.triangular_solve(
        root, jnp.broadcast_to(eye, root.shape), left_side=True, lower=True
    )


def _newton(cov: Array, steps: int) -> Array:
    """Z/√tr of the coupled iteration for Y → S^½, Z → S^(−½), with S = Σ/tr Σ.

    IterNorm's P ← (3P − P³S)/2 has the same iterates, but feeds rounding back until it diverges.
    """
    eye = jnp.eye(cov.shape[-1], dtype=cov.dtype)
    trace = jnp.trace(cov, axis1=-2, axis2=-1)[..., None, None]

    def step(_: Any, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        y, z = pair
        t = (3 * eye - _dot(z, y)) / 2
        return _dot(y, t), _dot(t, z)

    s = cov / trace
    _, z = lax.fori_loop(0, steps, step, (s, jnp.zeros_like(s) + eye))
    return z / jnp.sqrt(trace)


def _zca(cov: Array) -> Array:
    """Σ^(−½)."""
    return _inverse_root(cov)[0]


@jax.custom_jvp
def _inverse_root(cov: Array) -> tuple[Array, Array, Array]:
    """W = Σ^(−½); and, as constants, the axes U and the roots of the variances.

    S·dW + dW·S = −W·dΣ·W with S = W⁻¹ = Σ·W: no difference of eigenvalues is divided by, and the
    derivatives of every order are right where they are equal.
    """
    roots, axes = _axes(cov)
    return _dot(axes / roots[..., None, :], axes.mT), axes, roots


@_inverse_root.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (cov,), (dcov,) = primals, tangents
    w, axes, roots = _inverse_root(cov)
    s = _dot(cov, w)
    total = roots[..., :, None] + roots[..., None, :]

    def solve(_: Any, y: Array) -> Array:
        return _dot(_dot(axes, _dot(_dot(axes.mT, y), axes) / total), axes.mT)

    def matvec(v: Array) -> Array:
        return (_dot(s, v) + _dot(v, s) + _dot(s.mT, v) + _dot(v, s.mT)) / 2

    right = -_dot(_dot(w, (dcov + dcov.mT) / 2), w)
    dw = lax.custom_linear_solve(matvec, right, solve, symmetric=True)
    return (w, axes, roots), (dw, jnp.zeros_like(axes), jnp.zeros_like(roots))


def _pca(cov: Array) -> Array:
    """Λ^(−½)·Uᵀ, by falling variance."""
    variances, axes = _eigh(cov)
    largest = jnp.argmax(jnp.abs(axes), -2, keepdims=True)
    sign = jnp.sign(lax.stop_gradient(jnp.take_along_axis(axes, largest, -2)))
    return ((axes * sign) / jnp.sqrt(variances)[..., None, :]).mT[..., ::-1, :]


@jax.custom_jvp
def _eigh(cov: Array) -> tuple[Array, Array]:
    """Variances, rising, and axes; axes of variances that are equal to rounding do not turn."""
    roots, axes = _axes(cov)
    return jnp.square(roots), axes


@_eigh.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (cov,), (dcov,) = primals, tangents
    variances, axes = _eigh(cov)
    inside = _dot(_dot(axes.mT, (dcov + dcov.mT) / 2), axes)
    gaps = variances[..., None, :] - variances[..., :, None]
    noise = variances.shape[-1] * jnp.finfo(gaps.dtype).eps * variances[..., -1, None, None]
    apart = jnp.abs(gaps) > noise
    turn = jnp.where(apart, inside / jnp.where(apart, gaps, 1), 0)
    return (variances, axes), (jnp.diagonal(inside, axis1=-2, axis2=-1), _dot(axes, turn))


def _axes(cov: Array) -> tuple[Array, Array]:
    """The roots of the variances, rising, of which rounding leaves none at zero, and the axes."""
    variances, axes = jnp.linalg.eigh(cov)
    least = jnp.finfo(variances.dtype).eps * variances[..., -1:]
    return jnp.sqrt(jnp.maximum(variances, least)), axes


def _dot(x: Array, y: Array) -> Array:
    """x·y in the full precision of their type, on accelerators too."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


_BATCH: dict[str, Any] = {"decay": settled_decay, "eps": settled_eps, **_GROUPS, **_WHITENER}
_BATCH |= _BATCH_AXES


@checked("whitening", **_BATCH)
def whitening(
    *,
    groups: int | None = None,
    group_size: int = 16,
    whitener: Whitener = "cholesky",
    steps: int = 5,
    eps: float = 1e-3,
    relative: bool = False,
    decay: float | None = None,
    ddof: int | None = None,
    estimator: Estimator | None = None,
    axis_name: AxisName | None = None,
    population: str | Callable[..., Any] = "debiased",
    bad_batch: BadBatch = "skip",
    state_gradient: bool = False,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> Norm:
    """`whitening_norm`, with a population as of `batch`, which see, that keeps co-moments."""
    given = locals()
    return _stateful("whitening", whitening_parts, lambda params: params, given)


@checked("switchable whitening", of=_OF, **_BATCH)
def switchable_whitening(
    *,
    of: tuple[Statistic, ...] = ("bw", "iw"),
    groups: int | None = None,
    group_size: int = 16,
    whitener: Whitener = "newton",
    steps: int = 5,
    eps: float = 1e-5,
    relative: bool = False,
    decay: float | None = None,
    ddof: int | None = None,
    estimator: Estimator | None = None,
    axis_name: AxisName | None = None,
    population: str | Callable[..., Any] = "debiased",
    bad_batch: BadBatch = "skip",
    state_gradient: bool = False,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> Norm:
    """`switchable_whitening_norm`, with a population as of `batch`, which see."""
    given = locals()

    def params(learned: Any) -> Switch:
        one = jnp.ones(len(of), jnp.float32)
        return Switch(learned.g, learned.b, one, one)

    return _stateful("switchable whitening", switchable_whitening_parts, params, given)


def _stateful(
    where: str,
    parts: Callable[..., tuple[MatrixParts, State]],
    params_of: Callable[[Any], Any],
    given: dict[str, Any],
) -> Norm:
    """A norm with a population of co-moments, of the options of its factory."""
    learned = {name: given.pop(name) for name in ("use_gain", "use_bias", "gain")}
    kept = {name: given.pop(name) for name in ("decay", "ddof", "estimator")}
    population, sync = given.pop("population"), as_sync(given["axis_name"])
    keeps = bool({"bw", "bn"} & {*given.get("of", ("bw",))})

    def run(params: Any, state: State, site: Site, **more: Any) -> tuple[Any, State]:
        axes = {"weights": site.weights, "channel_axis": site.linear.channel_axis}
        return parts(site.a, params, state, **{**given, **axes, **more})

    def init(site: Site) -> tuple[Any, State]:
        dtype = promote_dtype(site.a)
        groups = number_of_groups(where, site.channels, given["groups"], given["group_size"])
        state_of = init_batch_state(population, given["eps"], sync, groups=groups, **kept)
        state = state_of(site.channels, dtype) if keeps else ()
        params = params_of(initial_affine(site, **learned))
        params = jax.tree.map(lambda v: v.astype(dtype), params)
        # In inference, and on one device: where `init` is called there may be no axis yet.
        alone: Any = {"train": False, "axis_name": None, "weights": None}
        jax.eval_shape(lambda site: run(params, state, site, **alone), site)
        return params, state

    def measured(params: Any, state: State, site: Site, *, train: bool) -> tuple[Any, State]:
        return run(params, state, site, train=train)

    anyhow: Any = {"params": anything, "state": anything}
    return Norm(checked(where, site=SHAPES)(init), checked(where, **anyhow)(measured))
