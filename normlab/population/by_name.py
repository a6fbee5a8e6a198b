"""Populations by name: what batch norm can keep."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normlab._arguments import KINDS, checked, flag, integer, number
from normlab._checks import imported
from normlab.devices.topology import Sync
from normlab.errors import invalid, nearest
from normlab.population._batches import statistics_dtype
from normlab.population.cumulative import Cumulative, Estimator, init_cumulative
from normlab.population.delayed import delay
from normlab.population.digits import Digits
from normlab.population.domains import Domains
from normlab.population.frozen import Frozen
from normlab.population.mabn import init_mabn
from normlab.population.optional import plain
from normlab.population.power import init_power
from normlab.population.prior import WORTH, Prior, around
from normlab.population.protocol import Population
from normlab.population.renorm import init_renorm
from normlab.population.rms import Rms
from normlab.population.running import init_running
from normlab.population.streaming import Streaming
from normlab.population.window import init_window


@checked(
    "domains",
    domains=integer("a number of domains, at least 1", "count the domains", 1),
    examples=integer("a number of examples, at least 1", "pass None for one domain per batch", 1),
    inner=KINDS["population"],
)
def init_domains(
    channels: int,
    *,
    domains: int = 2,
    examples: int | None = None,
    inner: str | Callable[..., Any] = "debiased",
    dtype: DTypeLike | None = None,
    **options: Any,
) -> Domains:
    """Returns the initial statistics of every domain; domain 0 is current.

    Args:
      channels: `C`.
      domains: Their number.
      examples: N, if each example of a batch says its own domain; `None` for one per batch.
      inner: What is kept of each: a population, as in `init_population`.
      dtype: As in `init_running`.
      **options: Those of that population.

    >>> state = init_domains(4, domains=3)
    >>> state.inner.mean.shape, int(state.current)
    ((3, 4), 0)
    """
    dtype = statistics_dtype(dtype)
    one = init_population(inner, channels, dtype=dtype, **options)
    if not plain(one) or one == ():
        raise invalid(
            "domains",
            f"a population of type {type(one).__name__}",
            "one that does not change how training normalizes",
            "keep an average of each domain; freeze all of them together",
        )
    stacked = jax.tree.map(lambda v: jnp.broadcast_to(v, (domains, *v.shape)), one)
    return Domains(stacked, jnp.zeros(() if examples is None else (examples,), jnp.int32))


@checked("prior", count=WORTH, by_example=flag(), inner=KINDS["population"])
def init_prior(
    channels: int,
    *,
    count: ArrayLike = 16.0,
    estimator: Estimator = "within",
    by_example: bool = False,
    inner: str | Callable[..., Any] = "debiased",
    dtype: DTypeLike | None = None,
    **options: Any,
) -> Prior:
    """Returns the state of test-time adaptation before training; `adapt` makes it of a trained one.

    Args:
      channels: `C`.
      count: N, `Prior.count`.
      estimator: `Prior.estimator`.
      by_example: `Prior.by_example`. With it, `estimator="pooled"`, `decay=0.0`, and the size of
        the last batch as the count, this is virtual batch normalization (Salimans et al. 2016,
        https://arxiv.org/abs/1606.03498): training normalizes the reference batch, and takes it in;
        inference each example by the reference batch and itself, which weighs 1/(N + 1).
      inner: What is kept of the source: a population, as in `init_population`.
      dtype: As in `init_running`.
      **options: The options of `inner`.

    >>> state = init_prior(3, count=0.0)
    >>> state.read()[1].tolist()
    [1.0, 1.0, 1.0]
    """
    return around(
        init_population(inner, channels, dtype=dtype, **options), count, estimator, by_example
    )


@checked(
    "streaming",
    after=flag(),
    count=number("a number of values, at least 0", "pass 1e-4, or 0", lambda v: 0 <= v < 1e30),
    inner=KINDS["population"],
)
def init_streaming(
    channels: int,
    *,
    after: bool = True,
    count: float | None = None,
    inner: str | Callable[..., Any] = "cumulative",
    dtype: DTypeLike | None = None,
    **options: Any,
) -> Streaming:
    """Returns statistics by which training normalizes too.

    Args:
      channels: `C`.
      after: Whether a batch is taken in before it is normalized. Without, and with
        `inner="ema"`, `estimator="pooled"`, an example at a time, this is the forward pass of
        online normalization (Chiley et al. 2019, https://arxiv.org/abs/1905.05894).
      count: Of how many values, of mean 0 and variance 1, the statistics begin, if `inner` is
        `"cumulative"`; 1e-4 by default, as in the `RunningMeanStd` of reinforcement learning. A
        float32 counts to 16 million values: for longer streams `dtype="float64"`.
      inner: What is kept: a population, as in `init_population`.
      dtype: As in `init_running`.
      **options: The options of `inner`.

    Raises:
      ValueError: For a count, if `inner` does not count.

    >>> from normlab import batch_norm
    >>> h, state = batch_norm(jnp.array([[1.0], [3.0]]), None, init_streaming(1), train=True)
    >>> h, state = batch_norm(jnp.array([[5.0]]), None, state, train=True)    # 1, 3 and 5
    >>> h.round(3).tolist()
    [[1.225000023841858]]
    """
    state = init_population(inner, channels, dtype=dtype, **options)
    if isinstance(state, Cumulative):
        begin = jnp.full_like(state.count, 1e-4 if count is None else count)
        state = state._replace(count=begin, within=+begin)
    elif count is not None:
        given = f"count={count!r} with statistics of type {type(state).__name__}"
        change = 'leave it out, or keep all batches with inner="cumulative"'
        raise invalid("streaming", given, "a count for statistics that count", change)
    return Streaming(state, after)


@checked("rms population", inner=KINDS["population"])
def init_rms(
    channels: int,
    *,
    inner: str | Callable[..., Any] = "debiased",
    dtype: DTypeLike | None = None,
    **options: Any,
) -> Rms:
    """Returns statistics about zero.

    With `inner="window"` this is the forward pass of MABN, with `inner="streaming"` that of
    PowerNorm after its warm-up; `"mabn"` and `"power"` have their backward passes too.

    Args:
      channels: `C`.
      inner: What is kept of the mean squares: a population, as in `init_population`.
      dtype: As in `init_running`.
      **options: The options of `inner`.

    >>> from normlab import batch_norm
    >>> h, state = batch_norm(jnp.array([[1.0], [7.0]]), None, init_rms(1), train=True)
    >>> h.round(3).tolist(), [v.tolist() for v in state.read()]
    ([[0.20000000298023224], [1.4000000953674316]], [[0.0], [25.0]])
    """
    return Rms(init_population(inner, channels, dtype=dtype, **options))


@checked("digits", inner=KINDS["population"])
def init_digits(
    channels: int,
    *,
    inner: str | Callable[..., Any] = "debiased",
    dtype: DTypeLike | None = None,
    **options: Any,
) -> Digits:
    """Returns statistics that keep how many digits their merging over devices lost.

    Args:
      channels: `C`.
      inner: What is kept: a population, as in `init_population`.
      dtype: As in `init_running`.
      **options: The options of `inner`.

    >>> from normlab import Sync, batch_norm
    >>> a = 100 + jnp.array([[[-1.0], [1.0]], [[-1.0], [1.0]]])             # two devices
    >>> def f(a):
    ...     return batch_norm(a, None, init_digits(1), train=True, axis_name=Sync("d"))[1]
    >>> jax.vmap(f, axis_name="d")(a).last.round(2)[0].tolist()            # log10(1 + 100²/1)
    [4.0]
    """
    nothing = (jnp.zeros(channels, statistics_dtype(dtype)) for _ in range(2))
    return Digits(init_population(inner, channels, dtype=dtype, **options), *nothing)


@checked("frozen statistics", inner=KINDS["population"])
def _frozen(
    channels: int, *, inner: str | Callable[..., Any] = "debiased", **options: Any
) -> Frozen:
    return Frozen(init_population(inner, channels, **options))


@checked("no statistics")
def _batch(
    channels: int, *, groups: int | None = None, dtype: DTypeLike | None = None
) -> tuple[()]:
    del channels, groups
    return ()


POPULATIONS: dict[str, Callable[..., Any]] = {
    "debiased": init_running,
    "ema": functools.partial(init_running, debias=False),
    "cumulative": init_cumulative,
    "renorm": init_renorm,
    "domains": init_domains,
    "prior": init_prior,
    "streaming": init_streaming,
    "window": init_window,
    "rms": init_rms,
    "power": init_power,
    "mabn": init_mabn,
    "digits": init_digits,
    "frozen": _frozen,
    "batch": _batch,
}
"""What batch norm can keep, by name, each with the function that makes it for `C` channels."""


@checked("population")
def init_population(population: str | Callable[..., Any], channels: int, **options: Any) -> Any:
    """Returns the initial state of batch norm for a name.

    Args:
      population: `"debiased"` and `"ema"` (`init_running`, without and with a bias towards 0 and
        1), `"cumulative"` (`init_cumulative`), `"renorm"` (`init_renorm`), `"domains"`
        (`init_domains`), `"prior"` (`init_prior`), `"streaming"` (`init_streaming`), `"window"`
        (`init_window`), `"rms"` (`init_rms`), `"power"` (`init_power`), `"mabn"` (`init_mabn`),
        `"digits"` (`init_digits`), `"frozen"` (`Frozen`), `"batch"` (nothing is kept: inference
        normalizes with its own batch); or a function of the channels (and of the options
        that are given, and of `dtype` if it has one).
      channels: `C`.
      **options: Those of the function it stands for.

    Raises:
      ValueError: For an unknown name or option, with the nearest.

    >>> init_population("cumulative", 3).read()[1].tolist()
    [1.0, 1.0, 1.0]
    """
    if not callable(population):
        make = require(population)
        if ":" in population:  # a function of the user's, which may have no dtype
            return init_population(make, channels, **options)
        known = inspect.signature(make).parameters
        for option in options:
            if {option, "options"}.isdisjoint(known):
                names = [name for name in known if name != "channels"]
                given = f"{population!r}: unknown option {option!r}: {nearest(option, names)}"
                raise invalid("population", given, "options it has", "use a known one")
        return make(channels, **options)
    known = inspect.signature(population).parameters
    if "dtype" not in known:
        options.pop("dtype", None)
    try:
        inspect.signature(population).bind(channels, **options)
    except TypeError as error:
        given, change = f"a function that says: {error}", "take them as it is given them"
        expected = f"a function of the channels and of {', '.join(options) or 'nothing else'}"
        raise invalid("population", given, expected, change) from error
    state = population(channels, **options)
    if state != () and (isinstance(state, type) or not isinstance(state, Population)):
        given = f"a function that returns {state!r}"
        raise invalid("population", given, "one that returns a Population or ()", "see Population")
    return state


def init_batch_state(
    population: str | Callable[..., Any], eps: float, sync: Sync, **settings: Any
) -> Callable[[int, Any], Any]:
    """Returns `(channels, dtype) -> state` for batch norm; with `sync.every` it is a `Delayed`.

    The `population` is as in `init_population`; of its `settings` `None` is its own default. `eps`
    is the norm's ε, for a population that asks for one.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if not callable(population) and "eps" in inspect.signature(require(population)).parameters:
        settings["eps"] = eps

    def state_of(channels: int, dtype: Any) -> Any:
        state = init_population(population, channels, dtype=dtype, **settings)
        return delay(state) if sync.every else state

    return state_of


def takes(name: str, option: str) -> bool:
    """Whether the population of that name has an option, or the one that it holds by default."""
    known = inspect.signature(require(name)).parameters
    return option in known or ("options" in known and takes(known["inner"].default, option))


def require(name: str) -> Callable[..., Any]:
    """Returns what makes the population of that name; raises ValueError for an unknown one."""
    if ":" in name:
        return imported("population", "population", name)
    if name not in POPULATIONS:
        given = f"the unknown population {name!r}: {nearest(name, POPULATIONS)}"
        raise invalid("population", given, "the name of a population", "use a known one")
    return POPULATIONS[name]
