"""Transactions: one update of the running statistics, however many batches it is made of.

An optimizer step may run a norm many times: over microbatches, in a layer that is shared, in a
replay. Between `begin` and `commit` a norm only merges what it measures; then the running average
takes one step, with the moments of all of it together:

    states = begin(states)        each call: seen ← seen + batch
    states = commit(states)       mean ← mean + rate·(mean of seen − mean), and so the variance

`settle` instead of `commit` makes what was seen the population: PreciseBN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from normlab._arguments import RESTORE, Kind, checked, is_array, only, read, tree
from normlab._trees import node
from normlab._xla import zeros_of
from normlab.devices.topology import AxisName, as_sync
from normlab.errors import invalid
from normlab.measure import Moments
from normlab.population._batches import BadBatch, arrays, finite
from normlab.population.cumulative import Cumulative, Estimator
from normlab.population.domains import Domains
from normlab.population.frozen import Frozen
from normlab.population.optional import (
    is_population,
    observe_inner,
    pool,
    read_inner,
    settled,
    updated,
)


@node
class Pending(NamedTuple):
    """Statistics with a transaction under way: they stay as they are until `commit`.

    Attributes:
      inner: The statistics, as they were at `begin`.
      seen: The batches since.
      broken: `[]` bool, whether one of them was not finite.

    >>> import jax.numpy as jnp
    >>> from normlab import init_running, moments
    >>> state = begin(init_running(1)).update(moments(jnp.array([[1.0], [3.0]]), 0))
    >>> state.read()[0].tolist(), state.seen.mean.tolist(), commit(state).read()[0].tolist()
    ([0.0], [2.0], [2.0])
    """

    inner: Any
    seen: Cumulative
    broken: Array

    @property
    def updates(self) -> Array:
        """Those of `inner`: the transaction is not one yet."""
        return self.inner.updates

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Pending:
        """Takes one batch into the transaction.

        Raises:
          ValueError: For a decay, which is the `commit`'s.
        """
        if decay is not None:
            raise invalid(
                "running statistics",
                f"decay={decay!r} within a transaction",
                "a decay with its commit: the average takes one step then",
                "call commit(states, decay=...)",
            )
        self = arrays(self)
        seen = self.seen.update(m, bad_batch="raise" if bad_batch == "raise" else "skip")
        return self._replace(seen=seen, broken=self.broken | ~finite(m))

    observe, read = observe_inner, read_inner

    def pool(self, axis_name: AxisName) -> Pending:
        """Merges what the devices saw, and `inner`."""
        self = arrays(self)
        broken = lax.pmax(self.broken.astype(jnp.int32), as_sync(axis_name).names) > 0
        return Pending(pool(self.inner, axis_name), pool(self.seen, axis_name), broken)


@checked("begin")
def begin(states: Any) -> Any:
    """Begins a transaction in every running average of a pytree of states.

    Args:
      states: A state, or a pytree of states. What is under way already goes on; norms without
        state, `()`, and `Frozen` ones have nothing to begin.

    Raises:
      ValueError: If there are arrays, and no running average.

    >>> import jax.numpy as jnp
    >>> from normlab import init_running, moments
    >>> state = begin(init_running(1))
    >>> for x in (1.0, 5.0):  # two microbatches
    ...     state = state.update(moments(jnp.array([[x], [x + 2]]), 0))
    ...
    >>> state = settle(state)
    >>> float(state.mean[0]), int(state.updates)
    (4.0, 2)
    """
    return _map("begin", states, _plain, _begin, "the states of batch norms")


def _begin(state: Any) -> Pending:
    if _is_pending(state):
        return state
    state = arrays(state)
    mean, var = state.read()
    # An array for each field, which may be donated.
    sums = (zeros_of(v) for v in (mean, mean, var, var))
    counters = (zeros_of(mean).any(-1).astype(jnp.int32) for _ in range(2))
    rest = zeros_of(jnp.stack([mean.sum(-1)] * 2, -1))
    among = zeros_of(mean).any(-1).astype(jnp.int32) + 1
    seen = Cumulative(*sums, *counters, rest=rest, among=among)
    return Pending(state, seen, zeros_of(mean).any(-1))


OK = Kind(
    "a bool, or an array of them",
    "reduce what is finite with jnp.isfinite(...).all()",
    only(lambda v: isinstance(v, bool) or (is_array(v) and v.dtype == jnp.bool_)),
    (None, "yes", 1, 1.0, [True], object(), np.ones(2), bool),
)


@checked("commit", ok=OK)
def commit(
    states: Any,
    ok: ArrayLike = True,
    *,
    decay: Any = None,
    bad_batch: BadBatch = "skip",
) -> Any:
    """Ends a transaction: each running average takes one step with all that it saw.

    The batches count as one: their values are pooled, and the variance between their means is part
    of the result. A step counts for all norms of the tree or for none: where a batch of any of them
    was not finite, or the step is not `ok`, the statistics stay as they were and `skipped` counts
    it; so does a norm that saw nothing but empty batches, for itself. A norm, or a domain, that was
    not called stays as it was.

    Stacked states are as many steps, each of which counts or not for itself: one for each place in
    the leading axes that all states of the tree share; domains are no such axis.

    Args:
      states: A state, or a pytree of states, in a transaction.
      ok: Whether the step may count, a bool or an array `[]`: that loss and gradients are finite.
        Of stacked states one for all, or one for each along their first axes.
      decay: The weight of the old value; `None` for the state's own.
      bad_batch: What becomes of batches that cannot be used, norm by norm: with `"skip"` as above;
        `"propagate"` makes mean and variance NaN, `"raise"` raises. A step that is not `ok` is
        skipped with each.

    Returns:
      The states with the structure they had at `begin`.

    Raises:
      ValueError: If there is no transaction, or `ok` does not fit the stack.
      FloatingPointError: With `"raise"`, for a batch that was not finite, or if all were empty.

    >>> from normlab import init_running, moments
    >>> state = begin(init_running(1))
    >>> for batch in ([[0.0], [2.0]], [[6.0], [8.0]]):
    ...     state = state.update(moments(jnp.array(batch), 0))
    >>> state = commit(state)
    >>> state.mean.tolist(), state.var.tolist(), state.updates.item()
    ([4.0], [10.0], 1)
    """
    whole = _whole_step(states, jnp.asarray(ok))
    ok = whole if bad_batch == "skip" else jnp.asarray(ok)  # the other policies look norm by norm
    choose = lambda ok, new, old: jax.tree.map(lambda v, w: jnp.where(ok, v, w), new, old)  # noqa: E731

    def one(state: Pending, ok: Array = ok) -> Any:
        state = arrays(state)
        if state.broken.ndim:  # stacked
            ok = ok.reshape(ok.shape + (1,) * (state.broken.ndim - ok.ndim))
            return jax.vmap(one)(state, jnp.broadcast_to(ok, state.broken.shape))
        m, of, broken = state.seen.moments(), state.inner, state.broken
        called = (state.seen.updates + state.seen.skipped > 0) | broken
        nothing = jax.tree.map(jnp.zeros_like, m)  # a bad batch, but no NaN for jax_debug_nans
        if bad_batch == "skip":
            return choose(called, updated(of, choose(ok, m, nothing), decay=decay), of)
        judged = called
        if bad_batch == "propagate":
            m = type(m)(m.count, *(jnp.where(broken, jnp.nan, v) for v in (m.mean, m.m2)))
        elif bad_batch == "raise":
            jax.debug.callback(_raise_if_broken, broken)
            judged = called & ~broken
            ok = ok & ~broken
        m = choose(judged, m, jax.tree.map(lambda v: jnp.full_like(v, 2), m))  # or nobody's fault
        new = updated(of, m, decay=decay, bad_batch=bad_batch)
        return choose(called, choose(ok, new, updated(of, nothing, decay=decay)), of)

    return _map("commit", states, _is_pending, one, "states from begin")


@checked("settle")
def settle(states: Any, *, estimator: Estimator | None = None) -> Any:
    """Ends a transaction: what it saw becomes the population, PreciseBN.

    Run a network over many batches with its weights fixed, in training mode, and settle: the
    statistics are those of all the batches, each weighted by its count (Wu & Johnson 2021,
    https://arxiv.org/abs/2105.07576). A batch that cannot be used is left out, and counted.

    Args:
      states: A state, or a pytree of states, in a transaction. Where devices kept theirs
        apart, `pool_running` or `merge_running` it first.
      estimator: Of which deviations the variance is made, an `Estimator`; `None` for `"pooled"`, or
        a `Cumulative`'s own.

    Returns:
      The states with the structure they had at `begin`. A norm that saw no batch stays as it was.

    Raises:
      ValueError: If there is no transaction, nothing was seen (where that can be known), or the
        state cannot be replaced.

    >>> import jax.numpy as jnp
    >>> from normlab import init_running, moments
    >>> state = begin(init_running(1)).update(moments(jnp.array([[1.0], [3.0]]), 0))
    >>> settle(state).mean.tolist()
    [2.0]
    """

    def one(state: Pending) -> Any:
        state = arrays(state)
        if state.broken.ndim:  # stacked
            return jax.vmap(one)(state)
        inner, seen = state.inner, state.seen
        new = settled(inner, seen, estimator)
        used = seen.updates > 0
        return jax.tree.map(lambda v, old: jnp.where(used, v, old), new, inner)

    pending = list(filter(_is_pending, jax.tree.leaves(states, is_leaf=_is_pending)))
    updates = [s.seen.updates for s in pending]
    if pending and not any(isinstance(n, Tracer) or np.asarray(n).any() for n in updates):
        raise invalid(
            "settle",
            f"a transaction of {max(int(s.seen.skipped.sum()) for s in pending)} batches that "
            "could not be used, and no other",
            "one batch at least",
            "run the network in training mode between begin and settle",
        )
    return _map("settle", states, _is_pending, one, "states from begin")


BATCH = tree("a pytree of arrays", "pass batches of arrays")


BATCHES = Kind(
    "an iterable of batches",
    "pass a list of them",
    only(lambda v: iter(v) is not None and not isinstance(v, str | bytes | Mapping)),
    (None, "x", 1, {}),
)


@checked("precise", batches=BATCHES)
def precise(
    step: Callable[[Any, Any], Any],
    states: Any,
    batches: Iterable[Any],
    *,
    estimator: Estimator | None = None,
) -> Any:
    """Recomputes the population statistics of a network for the weights it has: PreciseBN.

    On one device, or with norms that merge their statistics. Where each device keeps its own, call
    `begin`, the steps, `pool_running` and `settle` in turn inside the map.

    Args:
      step: `(states, batch) -> states`, a forward pass in training mode with these weights, such as
        averaged ones. It is compiled.
      states: The norms' states; the old statistics count for nothing.
      batches: Batches, of any sizes.
      estimator: As in `settle`.

    Raises:
      ValueError: If there is no running average, or no batch.

    >>> from normlab import batch_norm, init_running
    >>> def step(state, batch):
    ...     return batch_norm(batch, None, state, train=True)[1]
    >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0], [8.0]])]
    >>> [v.round(5).tolist() for v in precise(step, init_running(1), batches).read()]
    [[4.0], [8.0]]
    """
    states, run = begin(states), jax.jit(step)
    for batch in batches:
        read("precise", "batch", batch, BATCH)
        states = run(states, batch)
    return settle(states, estimator=estimator)


def _whole_step(states: Any, ok: Array) -> Array:
    """Whether each step may count: it is ok, and no norm of it saw a batch that was not finite.

    One for each place in the leading axes that all the states share.
    """
    broken = _broken(states)
    shapes = [b.shape for b in broken] or [ok.shape]
    sizes = zip(*shapes, strict=False)  # axis by axis, as far as the shortest goes
    stack = tuple(n[0] for n in itertools.takewhile(lambda n: len(set(n)) == 1, sizes))
    if stack[: ok.ndim] != ok.shape:
        raise invalid(
            "commit",
            f"ok of shape {ok.shape} for states that are stacked as {sorted(set(shapes))}",
            "one value, or one for each of the stack",
            "reduce it, for example with all()",
        )
    ok = jnp.broadcast_to(ok.reshape(ok.shape + (1,) * (len(stack) - ok.ndim)), stack)
    for b in broken:
        ok = ok & ~b.any(range(len(stack), b.ndim))
    return ok


def _broken(states: Any) -> list[Array]:
    """Whether each norm saw a batch that was not finite, in any of its domains."""
    at = lambda leaf: isinstance(leaf, Pending | Domains | Frozen)  # noqa: E731
    found = []
    for leaf in jax.tree.leaves(states, is_leaf=at):
        if isinstance(leaf, Pending):
            found.append(jnp.asarray(leaf.broken))
        elif isinstance(leaf, Domains):
            found.extend(b.any(-1) for b in _broken(leaf.inner))
    return found


def _raise_if_broken(broken: Any) -> None:
    if broken.any():
        given = "a step with a NaN or an Inf in a batch that this norm saw"
        change = 'give these examples the weight 0, or pass bad_batch="skip"'
        raise FloatingPointError(str(invalid("commit", given, "finite batches", change)))


def _is_pending(leaf: Any) -> bool:
    return isinstance(leaf, Pending)


def _plain(leaf: Any) -> bool:
    """Whether it is a population that holds no other, or a transaction."""
    if _is_pending(leaf):
        return True
    inner = jax.tree.leaves(list(leaf), is_leaf=is_population) if isinstance(leaf, tuple) else []
    return is_population(leaf) and not any(map(is_population, inner))


def _map(where: str, states: Any, chosen: Any, change: Any, expected: str) -> Any:
    """Changes what is chosen; what is frozen takes no part, and ends what was under way."""
    frozen = lambda leaf: isinstance(leaf, Frozen)  # noqa: E731
    leaves, structure = jax.tree.flatten(states, is_leaf=lambda v: chosen(v) or frozen(v))
    if not all(map(frozen, leaves)) and not any(map(chosen, leaves)):
        first = where == "begin"
        raise invalid(
            where,
            "a tree without " + ("running statistics" if first else "a transaction"),
            expected,
            f"pass the norms' states; {RESTORE}" if first else "call begin(states) first",
        )

    def ended(leaf: Any) -> Any:
        if chosen(leaf):
            return change(leaf)
        within = lambda v: v.inner if _is_pending(v) else v  # noqa: E731
        return jax.tree.map(within, leaf, is_leaf=_is_pending)

    return jax.tree.unflatten(structure, list(map(ended, leaves)))
