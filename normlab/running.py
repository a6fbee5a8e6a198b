"""Running statistics: what batch norm keeps of its batches, for inference.

`Running` is an exponential moving average that knows its own mass, which makes it exact from
the first update on (no bias towards its initial value):

    mass  ← decay·mass + (1 − decay)          rate = (1 − decay) / mass
    mean  ← mean + rate·(batch mean − mean)   var ← var + rate·(batch var − var)

From mass 0 this is the debiased average of Adam; from mass 1 the rate stays 1 − decay, which is
the plain average that starts at mean 0 and variance 1.

`Cumulative` pools all batches into one: N = Σ n, μ = Σ n·mean / N, and the squared deviations
within the batches and between their means, each of which the variance may count.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, Protocol, Self, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import DTypeLike

from normlab.checks import check_ddof, check_decay, invalid, nearest
from normlab.collective import all_reduce
from normlab.moments import Moments, merge
from normlab.sync import AxisName

BadBatch = Literal["skip", "propagate", "raise"]
"""What becomes of a batch that is empty, fully masked, or holds a NaN or an Inf.

`"skip"`: the running statistics stay as they were, and `skipped` counts it. `"propagate"`: the
batch is taken in as it is, and an empty one as NaN. `"raise"`: as skip, with an error; under `jit`
JAX raises it, as a `JaxRuntimeError`, once the batch has been computed.
"""

Estimator = Literal["pooled", "within"]
"""Of which deviations a variance over many batches is made.

`"pooled"`: from the mean of all, as if they had been one batch (Wu & Johnson 2021,
https://arxiv.org/abs/2105.07576). `"within"`: from the mean of their own batch, which is the
average of the batches' variances (Ioffe & Szegedy 2015, algorithm 2).
"""


@runtime_checkable
class Population(Protocol):
    """A state of batch norm: a pytree that takes batches in and says what inference uses.

    Any NamedTuple with these methods is one. What it keeps keeps its structure, shapes and types.
    """

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Self:
        """Takes one batch in. Carries no gradient.

        Args:
          m: The batch's moments, `C` values in each of mean and m2, in any shape.
          decay: The weight of the old value, if it is not the state's own.
          bad_batch: What becomes of a bad batch: one that is empty (or has no more than `ddof`
            values), or whose statistics are not finite.
        """
        ...

    def read(self) -> tuple[Array, Array]:
        """Returns the mean and the variance that inference normalizes with, `[C]`."""
        ...

    def pool(self, axis_name: AxisName) -> Self:
        """Merges with those of the other devices along a named axis."""
        ...


def register(cls: type, *settings: str) -> None:
    """Makes the `settings` of a NamedTuple static, the other fields its pytree's leaves."""
    fields: tuple[str, ...] = getattr(cls, "_fields")  # noqa: B009
    arrays = [name for name in fields if name not in settings]

    def flatten(state: Any) -> tuple[Any, Any]:
        return [getattr(state, name) for name in arrays], tuple(
            getattr(state, name) for name in settings
        )

    def flatten_with_keys(state: Any) -> tuple[Any, Any]:
        leaves, static = flatten(state)
        return list(zip(map(jax.tree_util.GetAttrKey, arrays), leaves, strict=True)), static

    def unflatten(static: Any, leaves: Any) -> Any:
        return cls(**dict(zip((*arrays, *settings), (*leaves, *static), strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


class Running(NamedTuple):
    """The exponential moving average of the batches' means and variances, float32 at least.

    Attributes:
      mean: `[C]`, the running mean.
      var: `[C]`, the running variance, of which `ddof` is that of the updates.
      mass: `[]`, the sum of the weights of all updates: 0 before the first, towards 1.
      count: `[]`, the number of values (or weight) of a channel in a batch, averaged as the mean
        is, from the first update on; 0 if it is not known.
      updates: `[]` int32, the number of batches taken in.
      skipped: `[]` int32, the number of batches left out: empty, or not finite.
      decay: The weight of the old value in an update that names no other; not a leaf.
      ddof: 0 for the variance that normalized the batch, 1 for the unbiased one; not a leaf.
    """

    mean: Array
    var: Array
    mass: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    updates: Array
    skipped: Array
    decay: float = 0.9
    ddof: int = 0

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Running:
        """Takes one batch in. Carries no gradient.

        Args:
          m: The batch's moments, `C` values in each of mean and m2, in any shape.
          decay: The weight of the old value, in [0, 1], may be traced; `None` for the state's.
          bad_batch: What becomes of a bad batch.

        Raises:
          ValueError: If `decay` is outside [0, 1), or the policy is unknown.
          FloatingPointError: For a bad batch with the policy `"raise"`.
        """
        decay = self.decay if decay is None else decay
        check_decay("running statistics", decay)
        m = check_batch("running statistics", lax.stop_gradient(m), bad_batch, self.ddof)
        mean = m.mean.reshape(self.mean.shape).astype(self.mean.dtype)
        var = m.var(self.ddof).reshape(self.var.shape).astype(self.var.dtype)
        mass = decay * self.mass + (1 - decay)
        rate = (1 - decay) / jnp.where(mass > 0, mass, 1)
        count = m.count.mean().astype(self.count.dtype)
        known = jnp.where(self.count > 0, rate, 1)
        good = usable(m, self.ddof) | (bad_batch == "propagate")

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(good, new, old).astype(old.dtype)

        return self._replace(
            mean=keep(self.mean + rate * (mean - self.mean), self.mean),
            var=keep(self.var + rate * (var - self.var), self.var),
            mass=keep(mass, self.mass),
            count=keep(self.count + known * (count - self.count), self.count),
            updates=self.updates + good.astype(jnp.int32),
            skipped=self.skipped + (~good).astype(jnp.int32),
        )

    def read(self) -> tuple[Array, Array]:
        """Returns `(mean, var)`, `[C]`."""
        return self.mean, self.var

    def pool(self, axis_name: AxisName) -> Running:
        """Merges with those of the other devices, each of which weighs as much as its mass.

        The variance between the devices' means is part of the result; averaging the variances
        would lose it. `updates` and `skipped` are the largest of any device.
        """
        m = all_reduce(Moments(self.mass, self.mean, self.mass * self.var), axis_name)
        seen = m.count > 0
        return self._replace(
            mean=jnp.where(seen, m.mean, lax.pmean(self.mean, axis_name)),
            var=jnp.where(seen, m.var(), lax.pmean(self.var, axis_name)),
            mass=lax.pmean(self.mass, axis_name),
            count=lax.pmean(self.count, axis_name),
            updates=lax.pmax(self.updates, axis_name),
            skipped=lax.pmax(self.skipped, axis_name),
        )


register(Running, "decay", "ddof")


def init_running(
    channels: int,
    *,
    decay: float = 0.9,
    ddof: int = 0,
    debias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> Running:
    """Returns running statistics with mean 0 and variance 1.

    Args:
      channels: `C`.
      decay: The weight of the old value in an update, in [0, 1).
      ddof: 0 averages the variance that normalized the batch, 1 the unbiased one, for which
        weights are counts.
      debias: Whether the initial values are to weigh nothing (the default) or as much as a batch
        seen forever ago, as in most libraries.
      dtype: The statistics' type, float32 or float64.

    Raises:
      ValueError: If `decay` is outside [0, 1), or `ddof` neither 0 nor 1.
    """
    check_decay("running statistics", decay)
    check_ddof("running statistics", ddof)
    return Running(
        mean=jnp.zeros(channels, dtype),
        var=jnp.ones(channels, dtype),
        mass=jnp.full((), 0 if debias else 1, dtype),
        count=jnp.zeros((), dtype),
        updates=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        decay=decay,
        ddof=ddof,
    )


def change_ddof(state: Running, ddof: int, *, count: float | None = None) -> Running:
    """Returns the state with its variance biased (`ddof=0`) or unbiased (`ddof=1`).

    var ← var · (n − old ddof) / (n − ddof) with n values of a channel in a batch; exact if all
    batches had as many.

    Args:
      state: The state.
      ddof: 0 or 1.
      count: n; `None` for the average of the state's own updates.

    Raises:
      ValueError: If n is not known, or not above 1.

    >>> state = init_running(1)._replace(var=jnp.array([3.0]))
    >>> change_ddof(state, 1, count=4).var.tolist()
    [4.0]
    """
    check_ddof("change ddof", ddof)
    n = jnp.asarray(state.count if count is None else count, state.var.dtype)
    if not isinstance(n, Tracer) and not n > 1:
        raise invalid(
            "change ddof",
            f"{n:g} values of a channel in a batch",
            "more than 1: the variances differ by the factor n / (n - 1)",
            "pass count=, the examples of a batch times the positions of each",
        )
    return state._replace(var=state.var * (n - state.ddof) / (n - ddof), ddof=ddof)


class Cumulative(NamedTuple):
    """All batches pooled into one, each weighted by its count; float32 at least.

    Attributes:
      count: `[C]`, N, the number of values (or weight) of a channel in all batches.
      mean: `[C]`, their mean.
      within: `[C]`, the sum of the squared deviations from the mean of the batch.
      between: `[C]`, the sum of the squared deviations of the batches' means, times their counts.
      updates: `[]` int32, the number of batches taken in.
      skipped: `[]` int32, the number of batches left out: empty, or not finite.
      ddof: 0 for the variance of the values seen, 1 for the unbiased one; not a leaf.
      estimator: The `Estimator` of the variance; not a leaf.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array
    within: Array
    between: Array
    updates: Array
    skipped: Array
    ddof: int = 0
    estimator: Estimator = "pooled"

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Cumulative:
        """Takes one batch in. Carries no gradient.

        Args:
          m: The batch's moments, `C` values in each of mean and m2, in any shape.
          decay: Must be `None`: every value weighs the same.
          bad_batch: What becomes of a bad batch.

        Raises:
          ValueError: For a decay, or an unknown policy.
          FloatingPointError: For a bad batch with the policy `"raise"`.
        """
        if decay is not None:
            raise invalid(
                "cumulative statistics",
                f"decay={decay!r}",
                "no decay: every value weighs the same",
                "leave it out, or keep an average that forgets, from init_running",
            )
        m = check_batch("cumulative statistics", lax.stop_gradient(m), bad_batch)
        good = usable(m) | (bad_batch == "propagate")
        m = Moments(*(jnp.broadcast_to(f, m.mean.shape).reshape(self.mean.shape) for f in m))
        m = jax.tree.map(lambda f: f.astype(self.mean.dtype), m)
        means = Moments(self.count, self.mean, self.between)
        merged = merge(means, m._replace(m2=jnp.zeros_like(m.m2)))

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(good, new, old).astype(old.dtype)

        return self._replace(
            count=keep(merged.count, self.count),
            mean=keep(merged.mean, self.mean),
            within=keep(self.within + m.m2, self.within),
            between=keep(merged.m2, self.between),
            updates=self.updates + good.astype(jnp.int32),
            skipped=self.skipped + (~good).astype(jnp.int32),
        )

    def moments(self) -> Moments:
        """The moments of all values together, fields `[C]`."""
        return Moments(self.count, self.mean, self.within + self.between)

    def read(self) -> tuple[Array, Array]:
        """Returns the mean and the variance, `[C]`; 0 and 1 before the first batch.

        The variance is (within + between) / (N − ddof), or with the estimator `"within"`
        within / (N − ddof·batches).
        """
        if self.estimator == "pooled":
            var = self.moments().var(self.ddof)
        else:
            lost = self.ddof * self.updates.astype(self.mean.dtype)
            var = Moments(self.count - lost, self.mean, self.within).var()
        return self.mean, jnp.where(self.count > self.ddof, var, 1)

    def pool(self, axis_name: AxisName) -> Cumulative:
        """Merges with those of the other devices, each weighted by its count."""
        means = all_reduce(Moments(self.count, self.mean, self.between), axis_name)
        within, updates, skipped = lax.psum((self.within, self.updates, self.skipped), axis_name)
        return self._replace(
            count=means.count.reshape(self.count.shape),
            mean=means.mean,
            within=within,
            between=means.m2,
            updates=updates,
            skipped=skipped,
        )


register(Cumulative, "ddof", "estimator")


def init_cumulative(
    channels: int,
    *,
    ddof: int = 0,
    estimator: Estimator = "pooled",
    dtype: DTypeLike = jnp.float32,
) -> Cumulative:
    """Returns the statistics of no batch at all.

    Args:
      channels: `C`.
      ddof: 0 for the variance of the values seen, 1 for the unbiased one.
      estimator: Of which deviations the variance is made, an `Estimator`.
      dtype: The statistics' type, float32 or float64.

    Raises:
      ValueError: If `ddof` is neither 0 nor 1, or the estimator is unknown.

    >>> from normlab import moments
    >>> state = init_cumulative(1)
    >>> for batch in ([[1.0], [3.0]], [[8.0]]):
    ...     state = state.update(moments(jnp.array(batch), 0))
    >>> [v.round(3).tolist() for v in state.read()]
    [[4.0], [8.667000770568848]]
    """
    check_ddof("cumulative statistics", ddof)
    check_estimator("cumulative statistics", estimator)
    zeros, zero = jnp.zeros(channels, dtype), jnp.zeros((), jnp.int32)
    return Cumulative(zeros, zeros, zeros, zeros, zero, zero, ddof, estimator)


def check_estimator(where: str, estimator: str) -> None:
    """Raises ValueError unless `estimator` is an `Estimator`."""
    if estimator not in get_args(Estimator):
        raise invalid(
            where,
            f"estimator={estimator!r}",
            "the name of an estimator",
            f"use a known one: {nearest(str(estimator), get_args(Estimator))}",
        )


def usable(m: Moments, ddof: int = 0) -> Array:
    """Whether there is a value (more than `ddof`) in every channel, and all are finite."""
    finite = jnp.isfinite(m.mean).all() & jnp.isfinite(m.var(ddof)).all()
    return (m.count > ddof).all() & finite


def check_batch(where: str, m: Moments, bad_batch: BadBatch, ddof: int = 0) -> Moments:
    """Returns the moments of a batch as the policy has them, or says that they are bad.

    Args:
      where: The caller, for the error.
      m: The batch's moments.
      bad_batch: `"propagate"` makes the moments of an empty batch NaN, `"raise"` raises.
      ddof: A batch of no more than this many values has no variance.
    """
    if bad_batch not in get_args(BadBatch):
        raise invalid(
            where,
            f"bad_batch={bad_batch!r}",
            "the name of a policy",
            f"use a known one: {nearest(str(bad_batch), get_args(BadBatch))}",
        )
    if bad_batch == "propagate":
        seen = m.count > ddof
        return m._replace(mean=jnp.where(seen, m.mean, jnp.nan), m2=jnp.where(seen, m.m2, jnp.nan))
    if bad_batch == "raise":
        check = functools.partial(_raise_if_bad, where, ddof)
        jax.debug.callback(check, *lax.stop_gradient(m))
    return m


def _raise_if_bad(where: str, ddof: int, *m: Array) -> None:
    count, mean, m2 = map(np.asarray, m)
    if not (count > ddof).all():
        given = f"a batch with {count.min():g} values (or weight) per channel"
        expected = f"more than {ddof}"
    elif not (np.isfinite(mean).all() and np.isfinite(m2).all()):
        bad = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(m2)))
        given = f"a batch with a NaN or an Inf in {bad.size} of {mean.size} channels, "
        given += f"the first of them {bad[0]}"
        expected = "finite values"
    else:
        return
    change = 'give these examples the weight 0, or pass bad_batch="skip"'
    raise FloatingPointError(str(invalid(where, given, expected, change)))


def pool_running(states: Any, axis_name: AxisName) -> Any:
    """Merges the running statistics of devices that kept their own, along a named axis.

    Args:
      states: A state, or a pytree of states: each `Population` in it is merged by its `pool`,
        whatever else it holds is returned as it is.
      axis_name: One mapped axis or several.

    Raises:
      ValueError: If an axis name is not bound where this is called.
    """
    return map_populations(lambda state: state.pool(axis_name), states)


def merge_running(states: Any) -> Any:
    """As `pool_running`, of the statistics of all devices in one place, stacked as `[D, ...]`.

    So does a checkpoint of D devices come to another number of them: `merge_running`, then the
    result for each.

    Args:
      states: A state, or a pytree of states, whose arrays have a leading axis of the devices.

    Raises:
      ValueError: If they have none, or it is empty, or the numbers differ.

    >>> states = jax.tree.map(lambda v: jnp.stack([v, v]), init_running(3))
    >>> merge_running(states).mean.shape
    (3,)
    """
    leaves = jax.tree.leaves(states)
    devices = {v.shape[0] if v.ndim else 0 for v in leaves}
    if len(devices) > 1 or 0 in devices:
        some = next((v.shape for v in leaves if not v.ndim or not v.shape[0]), None)
        given = (
            f"arrays of {sorted(devices)} devices" if some is None else f"an array of shape {some}"
        )
        raise invalid(
            "merge running",
            given,
            "a leading axis of the devices, of one length, in every array",
            "stack the devices' statistics along a new first axis",
        )
    pooled = jax.vmap(lambda s: pool_running(s, "_"), axis_name="_")(states)
    return jax.tree.map(lambda v: v[0], pooled)


def conventions(states: Any) -> dict[str, str]:
    """Says what each running statistic of a pytree is, in words to be kept with a checkpoint.

    Args:
      states: A state, or a pytree of states.

    Returns:
      By path, the kind of each outermost `Population` and its settings.

    >>> conventions({"stem": init_running(2, decay=0.99)})
    {'stem': 'Running(decay=0.99, ddof=0)'}
    """
    is_leaf = lambda leaf: isinstance(leaf, Population)  # noqa: E731
    leaves, _ = jax.tree_util.tree_flatten_with_path(states, is_leaf=is_leaf)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _describe(leaf)
        for path, leaf in leaves
        if is_leaf(leaf)
    }


def _describe(state: Any) -> str:
    fields = {name: getattr(state, name) for name in getattr(state, "_fields", ())}
    said = [
        f"{name}={_describe(value) if isinstance(value, Population) else repr(value)}"
        for name, value in fields.items()
        if isinstance(value, Population | int | float | str)
    ]
    return f"{type(state).__name__}({', '.join(said)})"


def map_populations(f: Any, states: Any) -> Any:
    """Applies `f` to every outermost `Population` of a pytree."""
    return jax.tree.map(
        lambda leaf: f(leaf) if isinstance(leaf, Population) else leaf,
        states,
        is_leaf=lambda leaf: isinstance(leaf, Population),
    )
