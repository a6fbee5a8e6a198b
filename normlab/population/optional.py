"""What a population may decide beside what it must: defaults, unless it has a method of the name.

    measures      whether batch norm is to measure the batch              in training
    alone         whether a batch that is measured stands for itself      in training
    updated_first whether `normalizer` is that of the new state           no
    delays        whether it remembers what other devices measured        no
    observe       what normalizes the batch, and what is taken in         the batch's moments
    normalizer    μ and σ                                                 of the batch; else `read`
    backward      what the gradient is to have beside                     nothing
    covariance    μ and Σ of groups of channels                           of the batch; else `read`
    per_example   whether `read` returns values of each example           no
    moments       the moments that `read` is about                        of a count of 1
    options       the options of `get("batch")` it begins with            none
    pool          the same, merged with those of other devices            averages
    share         what a device keeps of merged statistics             its share of what it holds
    settled       the same, of what a transaction saw                     cannot be

One that holds another, such as `Frozen`, has it in a field `inner`, which answers `measures`,
`alone`, `updated_first`, `delays`, `normalizer`, `backward`, `covariance`, `per_example` and
`moments` in its place; `observe_inner`, `update_inner`, `read_inner` and `pool_inner` are the
methods of one that says nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from normlab._arguments import Kind, declare, instance, tree
from normlab.comoments import sample, second_shape
from normlab.devices.topology import AxisName, Sync, as_sync
from normlab.errors import invalid
from normlab.measure import Moments
from normlab.population._batches import BadBatch, arrays, finite
from normlab.population.protocol import Population

F = TypeVar("F", bound=Callable[..., Any])


class Run(NamedTuple):
    """`run(sync)` measures the batch, `run(sync, ids, number)` each of some parts of it.

    Attributes:
      measure: `(sync, ids, number) -> (m, population)`: the moments that normalize the batch and
        those to take in; or, if there are ids `[N]`, those of the examples of each of so many ids
        alone, with fields `[number, ...]`.
      each: Measures each example by itself.
      positions: The number of values of a channel in an example.
      train: Whether this is training.
    """

    measure: Callable[..., tuple[Moments, Moments]]
    each: Callable[[], Moments]
    positions: Any
    train: bool

    def __call__(
        self, sync: Sync, ids: Array | None = None, number: int = 1
    ) -> tuple[Moments, Moments]:
        """Measures the batch."""
        return self.measure(sync, ids, number)


def is_population(value: Any) -> bool:
    """Whether it is a `Population`: for `is_leaf`, where a pytree is taken apart."""
    return isinstance(value, Population)


def _state(value: Any) -> Any:
    return value if value is None or value == () else POPULATION.read(value)


POPULATION = instance(Population, "make it with init_running(channels)")._replace(saved=True)
STATE = POPULATION._replace(
    expected="a Population, (), or None", read=_state, wrong=POPULATION.wrong[1:]
)
TREE = tree("a state of batch norm, or a pytree of states", "pass what the norms returned")


def _states(value: Any) -> Any:
    for leaf in jax.tree.leaves(value, is_leaf=is_population):
        (POPULATION if is_population(leaf) else TREE).read(leaf)
    return value


declare(state=STATE, states=Kind(TREE.expected, TREE.change, _states, (*TREE.wrong, Population)))


def _asks(*, inner: bool) -> Callable[[F], F]:
    """Asks the state's own method of that name; then that of the state `inner`; else this."""

    def decorate(default: F) -> F:
        @functools.wraps(default)
        def ask(state: Any, /, *args: Any, **kwargs: Any) -> Any:
            asked = state
            while isinstance(asked, Population):
                own = getattr(asked, default.__name__, None)
                if own is not None:
                    return own(*args, **kwargs)
                asked = getattr(asked, "inner", None) if inner else None
            return default(state, *args, **kwargs)

        return ask  # pyright: ignore[reportReturnType]

    return decorate


def updated(state: Any, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Any:
    """`state.update`, which a bad batch does not reach if the state does not count such itself.

    A population that has a field `skipped`, or holds another, sees to it by itself.
    """
    if bad_batch != "skip" or hasattr(state, "skipped") or hasattr(state, "inner"):
        return state.update(m, decay=decay, bad_batch=bad_batch)
    good = (m.count > 0).all() & finite(m)
    m = jax.tree.map(lambda v: jnp.where(good, v, 1), m)  # no NaN, for jax_debug_nans
    new = state.update(m, decay=decay, bad_batch=bad_batch)
    return jax.tree.map(lambda v, old: jnp.where(good, v, old), new, state)


@_asks(inner=True)
def measures(state: Any, train: bool) -> bool:
    """Whether batch norm is to measure the batch: in training, and where there is no population."""
    return train or not isinstance(state, Population)


@_asks(inner=True)
def alone(state: Any, train: bool) -> bool:
    """Whether a batch that is measured stands for itself: one value of a channel is too few."""
    return train or not isinstance(state, Population)


@_asks(inner=True)
def updated_first(state: Any) -> bool:
    """Whether `normalizer` is to be asked of the state that has taken the batch in."""
    return False


@_asks(inner=True)
def delays(state: Any) -> bool:
    """Whether it remembers what other devices measured, as `Sync(every=...)` wants."""
    return False


@_asks(inner=False)
def observe(state: Any, run: Run, sync: Sync) -> tuple[Moments, Moments, Any]:
    """Returns the moments that normalize the batch, those to take in, and the state."""
    return *run(sync), state


@_asks(inner=True)
def normalizer(state: Any, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
    """Returns μ and σ: those of the batch if it was measured, else those of `read`.

    Args:
      state: A population, or `()` or `None`.
      m: What was measured, fields `[1, C]`, or `[N, C]` of the examples; `None` if nothing was.
      eps: ε.
      train: Whether this is training, in which `m` was measured.

    Returns:
      Each `[C]`, or as the fields of `m`.
    """
    if m is not None:
        return m.mean, m.sigma(eps)
    mean, var = state.read()
    return mean, jnp.sqrt(var + eps)


@_asks(inner=True)
def backward(state: Any, m: Moments, eps: Any) -> tuple[Array, Array, Any] | None:
    """What the gradient is to have beside, in training; see `normlab.population.backward`.

    Returns:
      ν, σ and the tap: the gradient by `a` gets −ν·a/σ². `None` for nothing.
    """
    return None


@_asks(inner=True)
def covariance(state: Any, m: Moments | None) -> tuple[Array, Array]:
    """Returns μ and Σ for whitening: those of the batch if it was measured, else those of `read`.

    Args:
      state: A population, or `()` or `None`.
      m: Co-moments, or `None`.

    Returns:
      As the fields of `m`; or `[C]` and `[G, D, D]`.

    Raises:
      ValueError: If it says which μ and σ normalize a batch, and not which Σ.
    """
    held = state
    while m is not None and isinstance(held, Population):
        if hasattr(held, "normalizer"):
            given = f"statistics of type {type(held).__name__}, which change σ in training"
            change = "use an average, or give the class a method covariance(m)"
            raise invalid("whitening", given, "some that say which covariance they use", change)
        held = getattr(held, "inner", None)
    return state.read() if m is None else (m.mean, m.var())


@_asks(inner=True)
def per_example(state: Any) -> bool:
    """Whether `read` returns values of each example of the next batch, `[N, C]`."""
    return False


@_asks(inner=True)
def moments(state: Any) -> Moments:
    """The moments that `read` is about, each of a count of 1 if the state knows no other."""
    mean, var = state.read()
    return sample(jnp.ones_like(mean), mean, var)


@_asks(inner=False)
def options(state: Any) -> dict[str, Any]:
    """The options of `get("batch")` with which such a state begins, as far as it says them."""
    return {"population": "batch"} if state == () else {}


def options_of(name: str, inner: Any) -> dict[str, Any]:
    """The options of the population of that name around `inner`: its decay and ddof, if it says."""
    kept = options(inner)
    return {"population": name} | {n: kept[n] for n in ("decay", "ddof") if n in kept}


@_asks(inner=False)
def pool(state: Any, axis_name: AxisName) -> Any:
    """Merges with the states of other devices: averages, and of whole numbers the largest."""
    return averaged(state, axis_name)


@_asks(inner=False)
def share(state: Any, devices: int) -> Any:
    """What each of so many devices keeps of merged statistics, so that pooling gives them back."""
    fields = ((name, getattr(state, name)) for name in getattr(state, "_fields", ()))
    held = {name: share(v, devices) for name, v in fields if isinstance(v, Population)}
    return state._replace(**held) if held else state


@_asks(inner=False)
def settled(state: Any, seen: Any, estimator: str | None) -> Any:
    """The state of the same kind whose statistics are those that a transaction saw.

    Args:
      state: As it was when the transaction began.
      seen: A `Cumulative` of what it saw.
      estimator: The variance's, an `Estimator`, or `None`.
    """
    del seen, estimator
    raise invalid(
        "settle",
        f"statistics of type {type(state).__name__}",
        "Running or Cumulative",
        "read what was seen from Pending.seen, or give the class a method settled(seen, estimator)",
    )


def pivot(state: Any, sync: Sync) -> Array | None:
    """The mean about which devices sum, `[C]`: the one that `state` has; `None` if none is asked.

    Without a gradient, and the same numbers whatever it is.
    """
    if not sync.names or not isinstance(state, Population) or per_example(state):
        return None
    return lax.stop_gradient(jnp.asarray(state.read()[0]))


def observe_inner(self: Any, run: Run, sync: Sync) -> tuple[Moments, Moments, Any]:
    """As `inner` does."""
    m, population, inner = observe(self.inner, run, sync)
    return m, population, self._replace(inner=inner)


def update_inner(self: Any, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Any:
    """Takes one batch into `inner`."""
    return self._replace(inner=updated(self.inner, m, decay=decay, bad_batch=bad_batch))


def read_inner(self: Any) -> tuple[Array, Array]:
    """Returns those of `inner`."""
    return self.inner.read()


def averaged(tree: Any, axis_name: AxisName) -> Any:
    """The averages of floating arrays over the devices, and the largest of whole numbers."""
    names = as_sync(axis_name).names

    def one(v: Any) -> Array:
        v = jnp.asarray(v)
        return (lax.pmean if jnp.issubdtype(v.dtype, jnp.inexact) else lax.pmax)(v, names)

    return jax.tree.map(one, arrays(tree))


def pool_inner(self: Any, axis_name: AxisName) -> Any:
    """Merges `inner`."""
    return self._replace(inner=pool(self.inner, axis_name))


def plain(state: Any) -> bool:
    """Whether it is a population that leaves training as it is."""
    changes = ("measures", "observe", "normalizer")
    return isinstance(state, Population) and not any(hasattr(state, name) for name in changes)


def check_state(
    where: str,
    state: Any,
    sync: Sync,
    train: bool,
    shape: tuple[int, ...],
    channel: int,
    groups: int | None = None,
) -> None:
    """Raises ValueError unless batch norm, or whitening in groups, can use the state."""
    channels = shape[channel]
    if train and measures(state, train) and bool(sync.every) != delays(state):
        raise invalid(
            where,
            f"a state of type {type(state).__name__} with every={sync.every}",
            "a Delayed state if, and only if, every is positive",
            f"make the state with init_delayed({channels})"
            if sync.every
            else "use Sync(..., every=1), or the state's inner",
        )
    if state is None and not train:
        raise invalid(
            where,
            "train=False without a state",
            "running statistics to normalize with",
            "pass the state that training returned; for the batch's own statistics train=True, or "
            "the state ()",
        )
    if not isinstance(state, Population):
        return
    found, second = (v.shape for v in state.read())
    examples = shape[0 if channel or len(shape) == 1 else 1]
    wanted = (examples, channels) if per_example(state) and len(shape) > 1 else (channels,)
    of_pairs = (*wanted[:-1], *second_shape(where, channels, groups))
    unfit = len(second) > len(wanted) if groups is None else second != of_pairs
    if found != wanted or unfit:
        told = "" if groups is None else f", groups={groups}"
        said = f"shape {found}" if groups is None and not unfit else f"shapes {found} and {second}"
        raise invalid(
            where,
            f"running statistics of {said} for an input of shape "
            f"{shape} with its channels on axis {channel}",
            f"shape {wanted}" if groups is None else f"shapes {wanted} and {of_pairs}",
            f"make the state with init_running({channels}{told}), or set channel_axis",
        )
