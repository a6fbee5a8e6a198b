"""Modules that keep population statistics, and transactions of all those of a model.

begin(model)      from here on a call in training merges what it measured into `pending`
commit(model)     one update with all of it; or settle(model), which makes it the population
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from normlab._arguments import checked, instance
from normlab._flax.state import average, has_average
from normlab.errors import invalid
from normlab.population import transaction as transactions
from normlab.population.cumulative import Estimator
from normlab.population.transaction import OK


class Transaction(nnx.Variable):
    """The kind of variable that holds a transaction under way, by which a filter finds it.

    >>> from normlab.nnx import BatchNorm
    >>> model = BatchNorm(2, rngs=nnx.Rngs(0))
    >>> begin(model)
    >>> bool(jax.tree.leaves(nnx.state(model, Transaction)))
    True
    >>> commit(model)
    >>> bool(jax.tree.leaves(nnx.state(model, Transaction)))
    False
    """


def _named(state: Any) -> dict[str, Any]:
    """The fields of a tuple; those of one without names are `of_0`, `of_1`, ..."""
    names = getattr(state, "_fields", [f"of_{i}" for i in range(len(state))])
    return dict(zip(names, state, strict=True))


class Kept(nnx.Pytree):
    """A state of batch norm, with a `BatchStat` for each of its arrays, named as the field.

    So the pure dict of a model is of arrays alone, and goes through any checkpoint.
    """

    def __init__(self, state: Any) -> None:
        """Takes a tuple, named or not, apart; what it holds in turn likewise."""
        self._kind = type(state)
        self._names = tuple(_named(state))
        for name, value in _named(state).items():
            if isinstance(value, tuple):
                value = Kept(value)
            elif isinstance(value, jax.Array):
                value = nnx.BatchStat(value)
            setattr(self, name, value)  # or a setting

    def _get(self) -> Any:
        """Returns the state."""
        fields = [getattr(self, name) for name in self._names]
        values = [v.get_value() if isinstance(v, Kept | nnx.Variable) else v for v in fields]
        return tuple(values) if self._kind is tuple else self._kind(*values)

    def _set(self, state: Any) -> None:
        """Puts the arrays of a state of this kind in place of its own."""
        for name, value in _named(state).items():
            field = getattr(self, name)
            if isinstance(field, Kept | nnx.Variable):
                field.set_value(value)

    # A module uses those above: `nnx.tabulate` gives each call of a public method a row.
    get_value, set_value = _get, _set


class Stateful(nnx.Module):
    """A module with a state: Flax's pair `mean` and `var`, or `population`."""

    mean: Any
    var: Any
    population: Any
    pending: Any
    momentum: float
    use_running_average: bool | None

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Changes the mode, for `nnx.view`.

        Args:
          use_running_average: Whether to normalize with the running statistics; `None` leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _kept(self, train: bool) -> tuple[Any, Callable[[Any], None]]:
        """The state, and how to write it back: the transaction's, in training during one."""
        if self.pending is not None and train:
            return self.pending.get_value(), self.pending.set_value
        return self._statistics()

    def _keep(self, state: Any) -> None:
        """Makes `population`; none for a state that holds nothing."""
        self.population = Kept(state) if jax.tree.leaves(state) else nnx.data(None)

    def _statistics(self) -> tuple[Any, Callable[[Any], None]]:
        """The state, and how to write it back."""
        if hasattr(self, "population"):
            kept = self.population
            return (kept._get(), kept._set) if kept is not None else ((), lambda new: None)
        mean, var = self.mean, self.var

        def write(new: Any) -> None:
            for kept, value in ((mean, new.mean), (var, new.var)):
                # In float32, as half would stall; but a reference keeps its type.
                fixed = kept.get_metadata("ref", False)
                kept.set_value(value.astype(kept.dtype) if fixed else value)

        return average(mean.get_value(), var.get_value(), self.momentum), write


MODEL = instance(nnx.Module, "pass the model", arrays=False)


@checked("begin", model=MODEL)
def begin(model: nnx.Module) -> None:
    """Begins a transaction in every norm of a model that keeps running averages.

    Args:
      model: A model. What is under way already goes on.

    Raises:
      ValueError: If there is none.

    >>> import jax.numpy as jnp
    >>> from normlab.nnx import BatchNorm
    >>> model = BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
    >>> begin(model)
    >>> for a in (jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])):  # two microbatches
    ...     _ = model(a, use_running_average=False)
    ...
    >>> commit(model)
    >>> model.mean[...].tolist()
    [2.0]
    """
    modules = [m for m in _stateful(model) if has_average(m._statistics()[0])]
    if not modules:
        raise _nothing("begin", "running averages")
    for module in modules:
        if module.pending is None:
            module.pending = Transaction(transactions.begin(module._statistics()[0]))


@checked("commit", model=MODEL, ok=OK)
def commit(model: nnx.Module, ok: ArrayLike = True) -> None:
    """Ends a transaction: each running average takes one step with all that it saw.

    Whether the step is `ok`, and may count, is as in `normlab.population.commit`, and so are the
    errors.

    >>> import jax.numpy as jnp
    >>> from normlab.nnx import BatchNorm
    >>> model = BatchNorm(1, rngs=nnx.Rngs(0))
    >>> begin(model)
    >>> _ = model(jnp.array([[1.0], [3.0]]), use_running_average=False)
    >>> commit(model, ok=False)  # a step that was thrown away
    >>> model.mean[...].tolist()
    [0.0]
    """
    _end("commit", model, functools.partial(transactions.commit, ok=ok))


@checked("settle", model=MODEL)
def settle(model: nnx.Module, *, estimator: Estimator | None = None) -> None:
    """Ends a transaction: what it saw becomes the population, PreciseBN.

    The `estimator` and the errors are those of `normlab.population.settle`.

    >>> import jax.numpy as jnp
    >>> from normlab.nnx import BatchNorm
    >>> model = BatchNorm(1, rngs=nnx.Rngs(0))
    >>> begin(model)
    >>> _ = model(jnp.array([[1.0], [3.0]]), use_running_average=False)
    >>> settle(model)
    >>> model.mean[...].tolist()
    [2.0]
    """
    _end("settle", model, functools.partial(transactions.settle, estimator=estimator))


def _end(where: str, model: nnx.Module, end: Callable[[Any], Any]) -> None:
    modules = [m for m in _stateful(model) if m.pending is not None]
    if not modules:
        raise _nothing(where, "a transaction under way")
    # All at once: a step counts for every norm or for none.
    ended = end([module.pending.get_value() for module in modules])
    for module, state in zip(modules, ended, strict=True):
        module._statistics()[1](state)
        module.pending = nnx.data(None)


def _stateful(model: nnx.Module) -> list[Stateful]:
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, Stateful)]


def _nothing(where: str, missing: str) -> ValueError:
    return invalid(
        where,
        f"a model without {missing}",
        "normlab.nnx.BatchNorm in it",
        "exchange the norms of flax with swap" if where == "begin" else "call begin(model) first",
    )
