"""Population statistics by name: what batch norm keeps, and what it normalizes training with.

Beside the plain averages of `normlab.running` there are three that hold one of them:

    Frozen    training normalizes with the statistics, and leaves them alone
    Renorm    training normalizes as inference does, within limits: batch renormalization
    Domains   each domain has statistics of its own

All are a `Population`, so any of them can be the state of batch norm. The state `()` keeps nothing:
then inference normalizes with the statistics of its own batch too.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from normlab.checks import invalid, nearest
from normlab.moments import Moments
from normlab.running import (
    BadBatch,
    Population,
    init_cumulative,
    init_running,
)
from normlab.sync import AxisName


class Frozen(NamedTuple):
    """Statistics that no batch changes, with which training normalizes as well.

    Attributes:
      of: The statistics.
    """

    of: Any

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Frozen:
        """Returns itself."""
        del m, decay, bad_batch
        return self

    def read(self) -> tuple[Array, Array]:
        """Returns those of `of`."""
        return self.of.read()

    def pool(self, axis_name: AxisName) -> Frozen:
        """Merges `of`."""
        return Frozen(self.of.pool(axis_name))


class Renorm(NamedTuple):
    """Batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275).

    Training normalizes by the statistics of the batch, corrected towards the running ones:

        h = g · ((a − μ_B)/σ_B · r + d) + b      r = clip(σ_B/σ, 1/r_max, r_max)
                                                 d = clip((μ_B − μ)/σ, −d_max, d_max)

    r and d carry no gradient. With r = 1, d = 0, until `begin` and before the first update, this is
    batch norm. From there the limits grow linearly with the number of updates, r_max from 1 until
    `r_end`, d_max from 0 until `d_end`. Another schedule is `state._replace(r_max=...)`.

    Attributes:
      running: The running statistics, μ and σ² = var + ε.
      r_max: `[]`, the last limit of r, at least 1.
      d_max: `[]`, the last limit of d, at least 0.
      begin: `[]` int32, the number of updates up to which this is batch norm.
      r_end: `[]` int32, that from which on r_max holds.
      d_end: `[]` int32, that from which on d_max holds.
    """

    running: Any
    r_max: Array
    d_max: Array
    begin: Array
    r_end: Array
    d_end: Array

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Renorm:
        """Takes the batch into the running statistics."""
        return self._replace(running=self.running.update(m, decay=decay, bad_batch=bad_batch))

    def read(self) -> tuple[Array, Array]:
        """Returns those of `running`."""
        return self.running.read()

    def pool(self, axis_name: AxisName) -> Renorm:
        """Merges `running`."""
        return self._replace(running=self.running.pool(axis_name))

    def limits(self) -> tuple[Array, Array]:
        """The limits of r and of d that hold now."""
        r = 1 + (self.r_max - 1) * self._grown(self.r_end)
        return r, self.d_max * self._grown(self.d_end)

    def _grown(self, end: Array) -> Array:
        since = (self.running.updates - self.begin).astype(self.r_max.dtype)
        span = jnp.maximum(end - self.begin, 1).astype(self.r_max.dtype)
        return jnp.clip(since / span, 0, 1)

    def correct(self, mu: Array, sigma: Array, eps: float, like: Any) -> tuple[Array, Array]:
        """Returns the shift μ_B − d·σ_B/r and the scale σ_B/r.

        Args:
          mu: μ_B, broadcastable to the input.
          sigma: σ_B, the same.
          eps: ε.
          like: Puts `C` values along the channels of the input.
        """
        mean, var = (like(lax.stop_gradient(v)) for v in self.read())
        r_max, d_max = self.limits()
        known = self.running.updates > 0
        old = jnp.sqrt(var + eps)
        new_mu, new_sigma = lax.stop_gradient((mu, sigma))
        r = jnp.where(known, jnp.clip(new_sigma / old, 1 / r_max, r_max), 1)
        d = jnp.where(known, jnp.clip((new_mu - mean) / old, -d_max, d_max), 0)
        scale = sigma / r
        # Where nothing was measured σ is infinite, and there is nothing to correct.
        return mu - d * jnp.where(jnp.isfinite(scale), scale, 0), scale


def init_renorm(
    channels: int,
    *,
    r_max: ArrayLike = 3.0,
    d_max: ArrayLike = 5.0,
    begin: int = 5000,
    r_end: int = 40000,
    d_end: int = 25000,
    decay: float = 0.9,
    ddof: int = 0,
    debias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> Renorm:
    """Returns the state of batch renormalization; its defaults are the paper's limits.

    Args:
      channels: `C`.
      r_max: The last limit of r, at least 1.
      d_max: The last limit of d, at least 0.
      begin: The number of updates up to which this is batch norm.
      r_end: That from which on `r_max` holds.
      d_end: That from which on `d_max` holds.
      decay: As in `init_running`.
      ddof: As in `init_running`.
      debias: As in `init_running`.
      dtype: The statistics' type, float32 or float64.

    Raises:
      ValueError: If r_max < 1, d_max < 0, or a limit's end comes before `begin`.
    """
    where = "batch renorm"
    if not (jnp.asarray(r_max) >= 1).all() or not (jnp.asarray(d_max) >= 0).all():
        raise invalid(
            where,
            f"r_max={r_max} and d_max={d_max}",
            "r_max of at least 1 and d_max of at least 0",
            "use 1 and 0 for batch norm, 3 and 5 as in the paper",
        )
    if not 0 <= begin <= min(r_end, d_end):
        raise invalid(
            where,
            f"begin={begin}, r_end={r_end}, d_end={d_end}",
            "0 <= begin <= r_end and d_end, in updates",
            "let the limits grow after begin",
        )
    running = init_running(channels, decay=decay, ddof=ddof, debias=debias, dtype=dtype)
    limits = (jnp.asarray(v, dtype) for v in (r_max, d_max))
    return Renorm(running, *limits, *(jnp.int32(v) for v in (begin, r_end, d_end)))


class Domains(NamedTuple):
    """Statistics per domain: train on several data sets, or on clean and perturbed examples, apart.

    A batch is of one domain, or each of its examples says its own: then the examples of a domain
    are normalized together, whatever else is in the batch.

    Attributes:
      of: The statistics of all domains, stacked along a first axis.
      current: `[]` int32, the domain of the next batch, or `[N]`, of each of its examples;
        `select_domain` sets it.
    """

    of: Any
    current: Array

    @property
    def domains(self) -> int:
        """Their number."""
        return jax.tree.leaves(self.of)[0].shape[0]

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Domains:
        """Takes a batch of the current domain in; or moments `[domains, ...]`, if there are many.

        A domain of which the batch has no example stays as it was.
        """
        if not self.current.ndim:
            one = jax.tree.map(lambda v: v[self.current], self.of)
            new = one.update(m, decay=decay, bad_batch=bad_batch)
            of = jax.tree.map(lambda all_, v: all_.at[self.current].set(v), self.of, new)
            return self._replace(of=of)

        def each(old: Any, m: Moments) -> Any:
            new = old.update(m, decay=decay, bad_batch=bad_batch)
            seen = (m.count > 0).any()
            return jax.tree.map(lambda v, w: jnp.where(seen, v, w), new, old)

        return self._replace(of=jax.vmap(each)(self.of, m))

    def read(self) -> tuple[Array, Array]:
        """Returns those of the current domain, `[C]`, or of each example's, `[N, C]`."""
        mean, var = jax.vmap(lambda s: s.read())(self.of)
        return mean[self.current], var[self.current]

    def pool(self, axis_name: AxisName) -> Domains:
        """Merges each domain's."""
        return self._replace(of=jax.vmap(lambda s: s.pool(axis_name))(self.of))


def init_domains(
    channels: int,
    *,
    domains: int = 2,
    examples: int | None = None,
    population: str | Callable[..., Any] = "debiased",
    dtype: DTypeLike = jnp.float32,
    **options: Any,
) -> Domains:
    """Returns the initial statistics of every domain; domain 0 is current.

    Args:
      channels: `C`.
      domains: Their number.
      examples: N, if each example of a batch says its own domain; `None` for one per batch.
      population: What is kept of each, as in `init_population`.
      dtype: The statistics' type, float32 or float64.
      **options: Those of that population.
    """
    if domains < 1:
        raise invalid("domains", f"domains={domains}", "at least 1", "count the domains")
    one = init_population(population, channels, dtype=dtype, **options)
    of = jax.tree.map(lambda v: jnp.broadcast_to(v, (domains, *v.shape)), one)
    return Domains(of, jnp.zeros(() if examples is None else (examples,), jnp.int32))


def select_domain(states: Any, domain: ArrayLike) -> Any:
    """Says of which domain the next batch is, in every `Domains` of a pytree.

    Args:
      states: A state, or a pytree of them.
      domain: `[]` or `[N]`, as `current` has it.

    Raises:
      ValueError: If there is no `Domains`, the shape is another, or a domain is not there.
    """
    found = [leaf for leaf in jax.tree.leaves(states, is_leaf=_is_domains) if _is_domains(leaf)]
    if not found:
        raise invalid(
            "select domain",
            "a tree without domains",
            "states made with init_domains",
            'make the norm with population="domains"',
        )
    index = jnp.asarray(domain, jnp.int32)
    for state in found:
        traced = isinstance(index, Tracer)
        inside = traced or ((index >= 0) & (index < state.domains)).all()
        if index.shape != state.current.shape[-index.ndim or state.current.ndim :] or not inside:
            raise invalid(
                "select domain",
                f"domain={domain!r}" if index.ndim == 0 else f"domains of shape {index.shape}",
                f"shape {state.current.shape}, each from 0 to {state.domains - 1}",
                "give one number per batch, or with init_domains(..., examples=N) N of them",
            )

    def one(leaf: Any) -> Any:
        if not _is_domains(leaf):
            return leaf
        return leaf._replace(current=jnp.broadcast_to(index, leaf.current.shape))

    return jax.tree.map(one, states, is_leaf=_is_domains)


def _is_domains(leaf: Any) -> bool:
    return isinstance(leaf, Domains)


def freeze(states: Any, rule: str | Callable[[str], bool] | None = None) -> Any:
    """Freezes the statistics of a network, or of some of its layers.

    Args:
      states: A state, or a pytree of states.
      rule: Which layers, by path, such as `"encoder/block_1/norm"`: a regular expression that
        matches a part of it, or a function; `None` for all.

    Raises:
      ValueError: If nothing matches, with the paths there are.

    >>> states = {"stem": init_running(1), "head": init_running(1)}
    >>> [type(state).__name__ for state in freeze(states, "stem").values()]
    ['Running', 'Frozen']
    """
    return _where("freeze", states, rule, lambda s: s if isinstance(s, Frozen) else Frozen(s))


def thaw(states: Any, rule: str | Callable[[str], bool] | None = None) -> Any:
    """Undoes `freeze`.

    Args:
      states: A state, or a pytree of states.
      rule: Which layers, as in `freeze`.

    Raises:
      ValueError: If nothing matches, with the paths there are.
    """
    return _where("thaw", states, rule, lambda s: s.of if isinstance(s, Frozen) else s)


def _where(where: str, states: Any, rule: Any, change: Callable[[Any], Any]) -> Any:
    is_leaf = lambda leaf: isinstance(leaf, Population)  # noqa: E731
    leaves, structure = jax.tree_util.tree_flatten_with_path(states, is_leaf=is_leaf)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if rule is None:
        chosen = [True] * len(paths)
    else:
        matches = (lambda p: re.search(rule, p) is not None) if isinstance(rule, str) else rule
        chosen = [bool(matches(path)) for path in paths]
    chosen = [c and is_leaf(leaf) for c, (_, leaf) in zip(chosen, leaves, strict=True)]
    if not any(chosen):
        known = [path for path, (_, leaf) in zip(paths, leaves, strict=True) if is_leaf(leaf)]
        raise invalid(
            where,
            f"the rule {rule!r}, which matches no running statistics",
            "a rule for the path of some",
            nearest(str(rule), known) if known else "pass the states that batch norm returned",
        )
    new = [change(leaf) if c else leaf for c, (_, leaf) in zip(chosen, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def _frozen(channels: int, *, population: str = "debiased", **options: Any) -> Frozen:
    return Frozen(init_population(population, channels, **options))


def _batch(channels: int, *, dtype: DTypeLike = jnp.float32) -> tuple[()]:
    del channels, dtype
    return ()


POPULATIONS: dict[str, Callable[..., Any]] = {
    "debiased": init_running,
    "ema": functools.partial(init_running, debias=False),
    "cumulative": init_cumulative,
    "renorm": init_renorm,
    "domains": init_domains,
    "frozen": _frozen,
    "batch": _batch,
}
"""What batch norm can keep, by name, each with the function that makes it for `C` channels."""


def init_population(population: str | Callable[..., Any], channels: int, **options: Any) -> Any:
    """Returns the initial state of batch norm for a name.

    Args:
      population: `"debiased"` and `"ema"` (`init_running`, without and with a bias towards 0 and
        1), `"cumulative"` (`init_cumulative`), `"renorm"` (`init_renorm`), `"domains"`
        (`init_domains`), `"frozen"` (`Frozen`), `"batch"` (nothing is kept: inference
        normalizes with its own batch); or a function of the channels.
      channels: `C`.
      **options: Those of the function it stands for.

    Raises:
      ValueError: For an unknown name or option, with the nearest.

    >>> init_population("cumulative", 3).read()[1].tolist()
    [1.0, 1.0, 1.0]
    """
    if not callable(population):
        make = require(population)
        known = inspect.signature(make).parameters
        for option in options:
            if option not in known and "options" not in known:  # those that hold another pass it on
                raise ValueError(
                    f"population {population!r}: unknown option {option!r}: "
                    f"{nearest(option, [name for name in known if name != 'channels'])}"
                )
        population = make
    return population(channels, **options)


def require(name: str) -> Callable[..., Any]:
    """Returns what makes the population of that name; raises ValueError for an unknown one."""
    if name not in POPULATIONS:
        raise ValueError(f"unknown population {name!r}: {nearest(str(name), POPULATIONS)}")
    return POPULATIONS[name]
