"""Ends of a transaction: the collection that `BatchNorm` filled becomes new statistics.

A call with `mutable=["transaction"]` in training merges what it measures into that collection and
leaves `batch_stats` as they are; in evaluation it begins one that has seen nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import core, traverse_util
from jax.typing import ArrayLike

from normlab._arguments import anything, checked, mapping
from normlab.errors import invalid, nearest
from normlab.population import transaction as transactions
from normlab.population.cumulative import Estimator
from normlab.population.transaction import OK

TREE = mapping(anything, "nested dicts of arrays", "pass what the model was applied to")


@checked("commit", variables=TREE, transaction=TREE, ok=OK)
def commit(variables: Mapping[str, Any], transaction: Any, ok: ArrayLike = True) -> Any:
    """Returns the `batch_stats` after one update with all that the transaction saw.

    Args:
      variables: The variables, of which `batch_stats` is looked at.
      transaction: The collection `"transaction"` that the calls returned.
      ok: Whether the step may count, a bool or an array `[]`; see `normlab.population.commit`.

    Raises:
      ValueError: If the transaction is empty, or is not one of these variables.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from normlab.linen import BatchNorm
    >>> layer, a = BatchNorm(momentum=0.0), jnp.array([[1.0], [3.0]])
    >>> variables = layer.init(jax.random.key(0), a, use_running_average=True)
    >>> _, seen = layer.apply(variables, a, use_running_average=False, mutable=["transaction"])
    >>> print(commit(variables, seen["transaction"])["mean"])
    [2.]
    """
    return _end(variables, transaction, functools.partial(transactions.commit, ok=ok))


@checked("settle", variables=TREE, transaction=TREE)
def settle(
    variables: Mapping[str, Any], transaction: Any, *, estimator: Estimator | None = None
) -> Any:
    """Returns the `batch_stats` that are what the transaction saw: PreciseBN.

    Arguments and errors are those of `commit`, and `normlab.population.settle`'s `estimator`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from normlab.linen import BatchNorm
    >>> layer, a = BatchNorm(momentum=0.0), jnp.array([[1.0], [3.0]])
    >>> variables = layer.init(jax.random.key(0), a, use_running_average=True)
    >>> _, seen = layer.apply(variables, a, use_running_average=False, mutable=["transaction"])
    >>> print(settle(variables, seen["transaction"])["mean"])
    [2.]
    """
    end = functools.partial(transactions.settle, estimator=estimator)
    return _end(variables, transaction, end)


def _end(variables: Mapping[str, Any], transaction: Any, end: Callable[[Any], Any]) -> Any:
    if "batch_stats" not in variables:
        raise invalid(
            "transaction",
            f"variables with {', '.join(map(str, variables)) or 'nothing'}",
            "all of the model's, batch_stats among them",
            "pass what the model was applied to",
        )
    frozen = isinstance(variables["batch_stats"], core.FrozenDict)
    stats: dict[Any, Any] = traverse_util.flatten_dict(core.unfreeze(variables["batch_stats"]))
    pending = traverse_util.flatten_dict(core.unfreeze(transaction))
    if not pending:
        raise invalid(
            "transaction",
            "one without any BatchNorm",
            "the collection that a call with mutable=['transaction'] returned",
            "call the model in training with batch_stats immutable",
        )
    ended = end(list(pending.values()))  # all at once: a step counts for every norm or for none
    for path, new in zip(pending, ended, strict=True):
        layer = path[:-1]
        if (*layer, "population") in stats:
            stats[*layer, "population"] = new
        elif (*layer, "mean") in stats:
            for name, value in (("mean", new.mean), ("var", new.var)):
                old = stats[*layer, name]
                stats[*layer, name] = value.reshape(old.shape)  # in float32: half would stall
        else:
            known = sorted({"/".join(p[:-1]) for p in stats})
            name = "/".join(layer)
            raise invalid(
                "transaction",
                f"a transaction of {name!r}, which has no batch_stats",
                "a transaction of these variables",
                f"pass the variables of its model: {nearest(name, known)}",
            )
    stats = traverse_util.unflatten_dict(stats)
    return core.freeze(stats) if frozen else stats
