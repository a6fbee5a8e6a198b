"""Statistics per domain."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from normlab._arguments import array, checked, instance
from normlab._trees import node
from normlab.devices.topology import AxisName, Sync
from normlab.errors import invalid
from normlab.measure import Moments
from normlab.population._batches import BadBatch, arrays
from normlab.population.optional import Run, pool, updated


@node
class Domains(NamedTuple):
    """Statistics per domain: train on several data sets, or on clean and perturbed examples, apart.

    A batch is of one domain, or each of its examples says its own: then the examples of a domain
    are normalized together, whatever else is in the batch.

    Attributes:
      inner: The statistics of all domains, stacked along a first axis.
      current: `[]` int32, the domain of the next batch, or `[N]`, of each of its examples;
        `select_domain` sets it.

    >>> from normlab import batch_norm
    >>> from normlab.population import init_domains
    >>> state = select_domain(init_domains(1, domains=3), 1)
    >>> _, state = batch_norm(jnp.array([[1.0], [3.0]]), None, state, train=True)
    >>> state.inner.mean.ravel().tolist(), state.read()[0].tolist()
    ([0.0, 2.0, 0.0], [2.0])
    """

    inner: Any
    current: Array

    @property
    def domains(self) -> int:
        """Their number."""
        return jax.tree.leaves(self.inner)[0].shape[0]

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Domains:
        """Takes a batch of the current domain in; or moments `[domains, ...]`, if there are many.

        A domain of which the batch has no example stays as it was.
        """
        self = arrays(self)
        if not self.current.ndim:
            one = jax.tree.map(lambda v: v[self.current], self.inner)
            new = updated(one, m, decay=decay, bad_batch=bad_batch)
            put = lambda all_, v: all_.at[self.current].set(v)  # noqa: E731
            return self._replace(inner=jax.tree.map(put, self.inner, new))

        def each(old: Any, m: Moments) -> Any:
            seen = (m.count > 0).any()
            m = jax.tree.map(lambda v: jnp.where(seen, v, 2), m)  # no domain's fault
            new = updated(old, m, decay=decay, bad_batch=bad_batch)
            return jax.tree.map(lambda v, w: jnp.where(seen, v, w), new, old)

        return self._replace(inner=jax.vmap(each)(self.inner, m))

    def per_example(self) -> bool:
        """Whether each example says its own domain."""
        return jnp.ndim(self.current) > 0

    def observe(self, run: Run, sync: Sync) -> tuple[Moments, Moments, Domains]:
        """Measures the examples of each domain; what is taken in has fields `[domains, ...]`."""
        if not self.per_example():
            return *run(sync), self
        m, population = run(sync, self.current, self.domains)
        examples = jnp.arange(self.current.size, dtype=jnp.int32)

        def own(field: Array) -> Array:
            return field[self.current, examples if field.shape[1] > 1 else 0]

        return jax.tree.map(own, m), population, self

    def read(self) -> tuple[Array, Array]:
        """Returns those of the current domain, `[C]`, or of each example's, `[N, C]`."""
        self = arrays(self)
        mean, var = jax.vmap(lambda s: s.read())(self.inner)
        return mean[self.current], var[self.current]

    def pool(self, axis_name: AxisName) -> Domains:
        """Merges each domain's."""
        self = arrays(self)
        return self._replace(inner=jax.vmap(lambda s: pool(s, axis_name))(self.inner))


@checked(
    "select domain",
    domain=array("the number of a domain, or an array of them, all of them integers", most=1),
)
def select_domain(states: Any, domain: ArrayLike) -> Any:
    """Says of which domain the next batch is, in every `Domains` of a pytree.

    Args:
      states: A state, or a pytree of them.
      domain: `[]` or, if `current` is of each example, `[N]`, with any N. Where it is traced, it
        is taken to be one of the domains.

    Raises:
      ValueError: If there is no `Domains`, the shape is another, or a domain is not there.

    >>> from normlab.population import init_domains
    >>> state = select_domain(init_domains(4, domains=3), 2)
    >>> int(state.current)
    2
    """
    found = list(filter(_is_domains, jax.tree.leaves(states, is_leaf=_is_domains)))
    if not found:
        raise invalid(
            "select domain",
            "a tree without domains",
            "states made with init_domains",
            'make the norm with population="domains"',
        )
    index = jnp.asarray(domain)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        given = f"a domain of type {index.dtype}"
        raise invalid("select domain", given, "integers", "number the domains")
    index = index.astype(jnp.int32)
    for state in found:
        inside = isinstance(index, Tracer) or ((index >= 0) & (index < state.domains)).all()
        if index.ndim > state.current.ndim or not inside:
            raise invalid(
                "select domain",
                f"domain={domain!r}" if index.ndim == 0 else f"domains of shape {index.shape}",
                f"{'one' if not state.current.ndim else 'one for each example'}, each from 0 to "
                f"{state.domains - 1}",
                "give one number per batch, or with init_domains(..., examples=N) one per example",
            )

    def one(leaf: Any) -> Any:
        if not _is_domains(leaf):
            return leaf
        shape = leaf.current.shape
        shape = (*shape[:-1], *index.shape) if index.ndim else shape  # of any number of examples
        return leaf._replace(current=jnp.broadcast_to(index, shape))

    return jax.tree.map(one, states, is_leaf=_is_domains)


def domains_of(state: Any) -> Domains:
    """The `Domains` that a population is, or holds; raises TypeError if there is none."""
    while not _is_domains(state):
        if not hasattr(state, "inner"):
            raise TypeError
        state = state.inner
    return state


def _holds_domains(state: Any) -> Any:
    domains_of(state)
    return state


BY_DOMAIN = instance(Domains, "pass what init, or the last call, returned")
BY_DOMAIN = BY_DOMAIN._replace(expected="Domains, frozen or not", read=_holds_domains, saved=True)
"""What the state of a norm that looks at the domain must be."""


@checked("select step", step=array("the number of a time step, an integer from 0", most=1))
def select_step(states: Any, step: ArrayLike) -> Any:
    """Says which time step is next, in every `Domains` of a pytree, one for each step.

    Args:
      states: A state, or a pytree of them.
      step: `[]`, from 0, may be traced; beyond the last step that has statistics its own are used.

    Raises:
      ValueError: If the step is no integer.

    >>> from normlab import get, Site
    >>> _, state = get("recurrent_batch", steps=3).init(Site(jnp.ones((4, 2))))
    >>> select_step(state, 7).current.item()
    2
    """
    if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        given = f"a step of type {jnp.result_type(step)}"
        raise invalid("select step", given, "an integer", "count the steps from 0")
    index = jnp.asarray(step).astype(jnp.int32)

    def one(leaf: Any) -> Any:
        if not _is_domains(leaf):
            return leaf
        return leaf._replace(current=jnp.minimum(index, leaf.domains - 1))

    return jax.tree.map(one, states, is_leaf=_is_domains)


def _is_domains(leaf: Any) -> bool:
    return isinstance(leaf, Domains)
