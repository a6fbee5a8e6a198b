"""Delayed synchronization: other devices' statistics from the state, one collective for a net.

With `Sync("data", every=k)` a norm merges what it measures now with what the other devices
measured when `exchange` was last asked for it:

    M = merge(mᵢ(t), others)        others = merge of mⱼ(t − age), j ≠ i

The norm itself has no collective. `exchange`, once after each step, sends the moments of all norms
of the net in one. The gradient sees mᵢ alone: with its share nᵢ/N of M or, with
`gradient="forward"`, as if mᵢ were M.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from normlab._arguments import checked, settled_decay
from normlab._trees import node
from normlab.comoments import sample, shaped_as
from normlab.devices.groups import merge_others
from normlab.devices.mapped import axis_sizes, check_bound, vary
from normlab.devices.merging import differentiated
from normlab.devices.topology import AxisName, Sync, as_sync, plan
from normlab.devices.whole import merge_whole, without
from normlab.errors import invalid
from normlab.measure import Moments, merge
from normlab.population._batches import arrays, finite
from normlab.population.frozen import Frozen
from normlab.population.optional import Run, plain, pool, read_inner, update_inner
from normlab.population.running import init_running


@node
class Delayed(NamedTuple):
    """The state of a norm with delayed synchronization. It differs between devices.

    Attributes:
      inner: The running statistics, a `Population`.
      own: What this device measured last, fields `[C]`.
      others: What the other devices of its group had measured when it last heard of them, fields
        `[C]`; empty before the first exchange.
      age: `[]` int32, how many batches ago that was; -1 before the first exchange.

    >>> from normlab import Sync, batch_norm
    >>> def step(state, a):
    ...     return batch_norm(a, None, state, train=True, axis_name=Sync("data", every=2))[1]
    >>> state = jax.tree.map(lambda v: jnp.stack([v, v]), init_delayed(1))   # of two devices
    >>> state = jax.vmap(step, axis_name="data")(state, jnp.arange(4.0).reshape(2, 2, 1))
    >>> state.read()[0].ravel().tolist(), state.age.tolist()                 # before `exchange`
    ([0.5, 2.5], [-1, -1])
    """

    inner: Any
    own: Moments
    others: Moments
    age: Array

    update, read = update_inner, read_inner

    def pool(self, axis_name: AxisName) -> Delayed:
        """Merges `inner`; what the others measured is to be asked for anew."""
        return delay(pool(self.inner, axis_name))

    def delays(self) -> bool:
        """Yes."""
        return True

    def observe(self, run: Run, sync: Sync) -> tuple[Moments, Moments, Delayed]:
        """Merges what this device measures with what the others had measured: no collective."""
        own, _ = run(Sync())
        others = lax.stop_gradient(arrays(self.others))
        population = merge(own, shaped_as(own, others))
        return differentiated(sync, own, population), population, self.after(own)

    def after(self, m: Moments) -> Delayed:
        """The state after a batch with the moments `m`."""
        self, m = arrays(self), lax.stop_gradient(m)
        good = finite(m)  # or it says nothing to others
        m = jax.tree.map(lambda f: jnp.where(good, f, 0), m)
        age = jnp.where(self.age < 0, self.age, self.age + 1)
        return self._replace(own=shaped_as(self.own, m), age=age)


@checked("delayed statistics", decay=settled_decay)
def init_delayed(
    channels: int,
    *,
    decay: float = 0.9,
    ddof: int = 0,
    debias: bool = True,
    dtype: DTypeLike | None = None,
) -> Delayed:
    """The state before the first batch; arguments as those of `init_running`, which see.

    >>> state = init_delayed(2)
    >>> type(state.inner).__name__, int(state.age)
    ('Running', -1)
    """
    return delay(init_running(channels, decay=decay, ddof=ddof, debias=debias, dtype=dtype))


def delay(running: Any) -> Delayed:
    """The state before the first batch, around a `Population` that leaves training as it is."""
    if not isinstance(running, Frozen) and not plain(running):
        raise invalid(
            "delayed",
            f"statistics of type {type(running).__name__}",
            "those that do not change how training normalizes",
            "use an average, or a Sync without every",
        )
    running = arrays(running)
    mean, var = running.read()
    own, others = (sample(*(jnp.zeros_like(v) for v in (mean, mean, var))) for _ in range(2))
    return Delayed(running, own, others, jnp.full(mean.shape[:-1], -1, jnp.int32))


@checked("exchange")
def exchange(states: Any, axis_name: AxisName) -> Any:
    """Tells every device what the others measured last: one collective for all norms together.

    Call it after each training step, inside the map. Nothing is sent while the statistics are
    younger than the `every` of the `Sync`, in batches; the ages are those of the first state.

    Args:
      states: A pytree with the `Delayed` states of all norms; whatever else it holds is returned
        as it is.
      axis_name: The `Sync` of the norms, whose `groups` or `members` are devices; a name stands for
        one that exchanges on every call.

    Raises:
      ValueError: If an axis is not bound, or there is no `Delayed` state.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from normlab import Sync, batch_norm
    >>> sync = Sync("data", every=1)
    >>> def step(state, a):
    ...     h, state = batch_norm(a, None, state, train=True, axis_name=sync)
    ...     return exchange(state, sync)
    ...
    >>> states = jax.tree.map(lambda v: jnp.stack([v, v]), init_delayed(1))
    >>> states = jax.vmap(step, axis_name="data")(states, jnp.arange(4.0).reshape(2, 2, 1))
    >>> states.others.mean.ravel().tolist()
    [2.5, 0.5]
    """
    sync = as_sync(axis_name)
    check_bound("exchange", sync.names)
    leaves, structure = jax.tree.flatten(states, is_leaf=lambda v: isinstance(v, Delayed | Frozen))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Delayed)]
    if not at and any(isinstance(leaf, Frozen) for leaf in leaves):
        return states
    if not at:
        raise invalid(
            "exchange",
            "a tree without a Delayed state",
            "the states of norms with Sync(..., every=k)",
            "pass what batch_norm returned",
        )
    delayed = [arrays(leaves[i]) for i in at]
    own = _together([s.own for s in delayed])  # by kind
    members = plan("exchange", sync, axis_sizes(sync.names), 1).members

    def ask(own: list[Moments], old: Any) -> tuple[list[Moments], Array]:
        return heard(own), old[1] - old[1]

    def heard(own: list[Moments]) -> list[Moments]:
        if sync.along:
            merged, _ = merge_whole(own, sync.stages, second=sync.second)
            return [without(m, o) for m, o in zip(merged, own, strict=True)]
        if members is None:  # each device on its own
            return jax.tree.map(jnp.zeros_like, own)
        return merge_others(own, members, sync.names)

    age = delayed[0].age
    due = (age < 0) | (age >= sync.every)
    own, old = vary((own, (_together([s.others for s in delayed]), age)), sync.names)
    others, age = lax.cond(due, ask, lambda own, old: old, own, old)
    for i, state, told in zip(at, delayed, _apart(others, [s.own for s in delayed]), strict=True):
        leaves[i] = state._replace(others=told, age=age)
    return jax.tree.unflatten(structure, leaves)


def _together(each: list[Moments]) -> list[Moments]:
    """All moments as those of one norm; co-moments, whose matrices differ in size, one by one."""
    plain = [m for m in each if type(m) is Moments]
    joined = [jax.tree.map(lambda *fields: jnp.concatenate(fields), *plain)] if plain else []
    return joined + [m for m in each if type(m) is not Moments]


def _apart(joined: list[Moments], each: list[Moments]) -> Iterator[Moments]:
    """Undoes `_together`."""
    plain = [m.mean.shape[0] for m in each if type(m) is Moments]
    fields = [jnp.split(field, np.cumsum(plain)[:-1]) for field in (joined[0] if plain else ())]
    split = map(Moments, *fields) if plain else iter(())
    rest = iter(joined[1:] if plain else joined)
    return (next(split if type(m) is Moments else rest) for m in each)
