"""Statistics that no batch changes, with which training normalizes as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from normlab._arguments import a_function, checked, either, text
from normlab._paths import matches, named
from normlab._trees import node
from normlab.devices.topology import Sync
from normlab.errors import invalid
from normlab.measure import Moments
from normlab.population._batches import BadBatch
from normlab.population.optional import (
    Run,
    alone,
    covariance,
    is_population,
    measures,
    normalizer,
    observe,
    options_of,
    pool_inner,
    read_inner,
)


@node
class Frozen(NamedTuple):
    """Statistics that no batch changes, with which training normalizes as well.

    Attributes:
      inner: The statistics.

    >>> import jax.numpy as jnp
    >>> from normlab import batch_norm, init_running
    >>> a, state = jnp.array([[5.0], [7.0]]), freeze(init_running(1))
    >>> h, state = batch_norm(a, None, state, train=True)
    >>> h.round(2).tolist(), [v.tolist() for v in state.read()]
    ([[5.0], [7.0]], [[0.0], [1.0]])
    """

    inner: Any

    def measures(self, train: bool) -> bool:
        """As `inner` in inference, for training normalizes so as well."""
        del train
        return measures(self.inner, False)

    def alone(self, train: bool) -> bool:
        """As `inner` in inference."""
        del train
        return alone(self.inner, False)

    def observe(self, run: Run, sync: Sync) -> tuple[Moments, Moments, Frozen]:
        """As `inner` in inference."""
        m, population, _ = observe(self.inner, run._replace(train=False), sync)
        return m, population, self

    def normalizer(self, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
        """Those of `inner` in inference."""
        del train
        return normalizer(self.inner, m, eps, train=False)

    def covariance(self, m: Moments | None) -> tuple[Array, Array]:
        """Those of `inner` in inference."""
        del m
        return covariance(self.inner, None)

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Frozen:
        """Returns itself."""
        del m, decay, bad_batch
        return self

    read, pool = read_inner, pool_inner

    def options(self) -> dict[str, Any]:
        """Those of frozen statistics, with the decay and the ddof that `inner` names."""
        return options_of("frozen", self.inner)


RULE = either(
    "a path, a regular expression, or a function of a path",
    "pass for example 'encoder/.*'",
    text("", ""),
    a_function(of=1),
)


@checked("freeze", rule=RULE)
def freeze(states: Any, rule: str | Callable[[str], bool] | None = None) -> Any:
    """Freezes the statistics of a network, or of some of its layers.

    Args:
      states: A state, or a pytree of states.
      rule: Which layers: a path, such as `"encoder/block_1/norm"`, a regular expression for the
        whole of one, or a function of it; `None` for all.

    Raises:
      ValueError: If nothing matches, with the paths there are.

    >>> from normlab import init_running
    >>> states = {"stem": init_running(1), "head": init_running(1)}
    >>> [type(state).__name__ for state in freeze(states, "stem").values()]
    ['Running', 'Frozen']
    """
    return where_chosen("freeze", states, rule, lambda s: s if isinstance(s, Frozen) else Frozen(s))


@checked("thaw", rule=RULE)
def thaw(states: Any, rule: str | Callable[[str], bool] | None = None) -> Any:
    """Undoes `freeze`, which see.

    >>> from normlab import init_running
    >>> type(thaw(freeze(init_running(2)))).__name__
    'Running'
    """
    return where_chosen("thaw", states, rule, lambda s: s.inner if isinstance(s, Frozen) else s)


def where_chosen(where: str, states: Any, rule: Any, change: Callable[[Any], Any]) -> Any:
    """`states` with a `change` of those that the rule names."""
    leaves, structure = named(states, is_population)
    known = [path for path, leaf in leaves if is_population(leaf)]
    if isinstance(rule, str):
        chosen = {path for path, _, _ in matches(where, {rule: None}, known)}
    else:
        chosen = {path for path in known if rule is None or rule(path)}
    if not chosen:
        raise invalid(
            where,
            "a rule that chooses none" if known else "a tree without running statistics",
            "running statistics to choose",
            f"choose some of {', '.join(known)}" if known else "pass what batch norm returned",
        )
    new = [change(leaf) if path in chosen else leaf for path, leaf in leaves]
    return jax.tree.unflatten(structure, new)
