"""Every norm by name: one table for tests, documentation and experiments.

A new norm is a function that returns its parts and a row that says what it is:

    def half_parts(a, params=None, *, eps=1e-5, weights=None, channel_axis=-1): ...
    register(Row("half", stateless(half_parts)))

From then on `get("half", eps=1e-6)` is it, in the skins, the experiments and the laws too.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normlab._arguments import (
    a_function,
    anything,
    checked,
    flag,
    instance,
    real,
    settled_decay,
    text,
)
from normlab._checks import gain_and_bias, imported, invalid, nearest, promote_dtype
from normlab.batch import batch_parts
from normlab.cosine import cosine_parts
from normlab.devices.topology import AxisName, as_sync
from normlab.equation import Affine, Parts, init_affine
from normlab.example import group_parts, instance_parts, layer_parts, rms_parts
from normlab.measure import Algorithm
from normlab.population._batches import BadBatch
from normlab.population.by_name import init_batch_state
from normlab.population.cumulative import Estimator
from normlab.site import SHAPES, Made, Norm, Site, State
from normlab.weight import weight_norm_init, weight_parts, weight_standardization_parts

INVARIANCES = (
    "weights rescaled",
    "weights recentred",
    "one unit rescaled",
    "data rescaled",
    "data recentred",
    "one case rescaled",
)
"""Changes that may leave h as it is, with ε = 0, for a dense layer (Ba et al. 2016, table 1)."""


class Row(NamedTuple):
    """What a norm is, in one line.

    Attributes:
      name: The name it goes by.
      factory: Makes the norm of its options, which are keyword arguments: see `stateless`.
      needs: What μ and σ are measured on: `"a"`, the pre-activation, `"w"`, the weights, `"x"`, the
        input, and `"batch"` where an example's μ and σ depend on the others.
      looks_at: The same in words.
      mu: The shift μ.
      sigma: The scale σ.
      invariances: Which of `INVARIANCES` leave h unchanged.
      paper: Where it comes from.
    """

    name: str
    factory: Callable[..., Norm]
    needs: frozenset[str] = frozenset({"a"})
    looks_at: str = "a"
    mu: str = "?"
    sigma: str = "?"
    invariances: frozenset[str] = frozenset()
    paper: str = "–"


_ROWS: dict[str, Row] = {}
NAME = text("the name of a norm", "use one of names()")


@checked("register", row=instance(Row, "pass Row(name, factory, ...)", arrays=False))
def register(row: Row) -> Row:
    """Adds a norm, which then goes by its name everywhere: `get`, the skins, experiments, laws.

    Args:
      row: What it is. Its `factory` may be a function that returns parts, as `stateless` takes it.

    Returns:
      The row.

    Raises:
      ValueError: If another norm has the name, it has a ":" in it, or a field means nothing.

    >>> def centre_parts(a, params=None, *, channel_axis=-1):
    ...     mean = a.mean(channel_axis, keepdims=True)
    ...     return Parts(mean, jnp.ones(()), jnp.ones(()), jnp.zeros(()))
    >>> row = register(Row("centre", stateless(centre_parts), mu="mean a", sigma="1"))
    >>> get("centre").apply(None, (), Site(jnp.array([[1.0, 3.0]])), train=True)[0].tolist()
    [[-1.0, 1.0]]
    >>> unregister("centre")
    """
    if not isinstance(row.name, str) or not row.name or ":" in row.name or row.name in _ROWS:
        given = f"the name {row.name!r}" + ", which another norm has" * (row.name in _ROWS)
        raise invalid("register", given, "a name of its own, without ':'", "choose another")
    wrong = {*row.invariances} - {*INVARIANCES} | {*row.needs} - {"a", "w", "x", "batch"}
    if wrong:
        known = f"of {', '.join((*INVARIANCES, 'a', 'w', 'x', 'batch'))}"
        raise invalid("register", f"the marks {sorted(wrong)}", known, "use these words")
    row = row._replace(factory=_factory_of(row.factory))
    _ROWS[row.name] = row
    return row


@checked("unregister", name=NAME)
def unregister(name: str) -> None:
    """Takes a norm out of the table again, by its name; raises ValueError for an unknown one."""
    del _ROWS[row(name).name]


@checked("get", name=NAME)
def get(name: str, **options: Any) -> Norm:
    """Returns the norm called `name`; twice the same for the same options.

    Args:
      name: One of `names()`, or `"mypackage.module:factory"`, which is imported.
      **options: The options of its factory; `help(row(name).factory)` lists them.

    Raises:
      ValueError: For an unknown name or option, with the nearest known one.

    >>> get("bach")
    Traceback (most recent call last):
    ...
    ValueError: registry: got the unknown norm 'bach': did you mean 'batch'? Known: none, batch, \
layer, rms, group, instance, weight, weight_standardization, cosine, centred_cosine; expected the \
name of a norm. To fix it, use a known one.
    """
    where, factory = f"{name} norm", row(name).factory
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            given = f"the unknown option {option!r}: {nearest(option, known)}"
            raise invalid(where, given, "one of its options", "use a known one")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            change = f"say get({name!r}, {option}=...)"
            raise invalid(where, f"no {option}", "this option, which has no default", change)
    made = sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items())
    try:
        return _get(Made(name, factory, tuple(made)), tuple(type(v) for _, v in made))
    except TypeError:  # an option that cannot be hashed
        return factory(**options)


@functools.lru_cache(maxsize=1024)
def _get(made: Made, types: tuple[type, ...]) -> Norm:
    del types  # True is no 1
    norm = made.factory(**dict(made.options))
    return Norm(norm.init, norm.parts, made)


@checked("row", name=NAME)
def row(name: str) -> Row:
    """Returns the registry's row for `name`; raises ValueError for an unknown one."""
    if ":" in name:
        found = imported("registry", "norm", name)
        return found if isinstance(found, Row) else Row(name, _factory_of(found))
    if name not in _ROWS:
        given = f"the unknown norm {name!r}: {nearest(name, _ROWS)}"
        raise invalid("registry", given, "the name of a norm", "use a known one")
    return _ROWS[name]


def names() -> tuple[str, ...]:
    """The names of all norms, in the registry's order."""
    return tuple(_ROWS)


def _factory_of(made: Any) -> Callable[..., Norm]:
    """A factory as it is, or that of the norms whose parts a function returns."""
    parameters = list(inspect.signature(made).parameters.values())
    positional = parameters and parameters[0].kind is not parameters[0].KEYWORD_ONLY
    return stateless(made) if positional else made


@checked("stateless", parts=a_function(), params=a_function())
def stateless(
    parts: Callable[..., Parts], params: Callable[..., Any] | None = None
) -> Callable[..., Norm]:
    """Returns the factory of the norms without state that a function returns the parts of.

    Args:
      parts: `(a, params, *, weights, channel_axis, ...) -> Parts`; or `(site, params, ...)`, of a
        norm that looks at more than `a`. The other keyword arguments are options of the norm,
        beside `use_gain` and `use_bias`.
      params: `(site, use_gain=, use_bias=) -> params`, the initial parameters; by default an
        `Affine` of gains 1 and biases 0.

    Returns:
      `(**options) -> Norm`.
    """
    known = inspect.signature(parts).parameters
    of_a = next(iter(known)) != "site"
    own = [p for p in known.values() if p.kind is p.KEYWORD_ONLY and p.name not in _OF_SITE]
    where = getattr(parts, "where", f"{parts.__name__.removesuffix('_parts')} norm")
    kinds = {"use_gain": flag(), "use_bias": flag()} | getattr(parts, "kinds", {})

    def make(*, use_gain: bool = True, use_bias: bool = True, **options: Any) -> Norm:
        def measure(site: Site, given: Any) -> Parts:
            if not of_a:
                return parts(site, given, **options)
            of_site = {"weights": site.weights, "channel_axis": site.linear.channel_axis}
            if site.weights is not None and "weights" not in known:
                raise invalid(where, "weights", "none", "give its parts an argument weights")
            of_site = {name: value for name, value in of_site.items() if name in known}
            return parts(site.a, given, **of_site, **options)

        start = functools.partial(params or _affine, use_gain=use_gain, use_bias=use_bias)
        return _norm(where, measure, start)

    switches = [p for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    make.__name__ = make.__qualname__ = parts.__name__.removesuffix("_parts")
    make.__doc__ = f"The norm of `{parts.__name__}`; its options are arguments of that."
    vars(make)["__signature__"] = inspect.Signature([*own, *switches], return_annotation="Norm")
    return checked(where, **{p.name: kinds.get(p.name, anything) for p in [*own, *switches]})(make)


_OF_SITE = ("weights", "channel_axis")


def _affine(site: Site, *, use_gain: bool, use_bias: bool, g: Any = 1.0) -> Affine:
    dtype = promote_dtype(site.a)
    return init_affine(site.channels, use_gain=use_gain, use_bias=use_bias, g=g, dtype=dtype)


def _norm(where: str, measure: Callable[[Site, Any], Parts], params: Callable[[Site], Any]) -> Norm:
    """A norm without state."""

    def init(site: Site) -> tuple[Any, State]:
        jax.eval_shape(lambda site: measure(site, None), site)  # say no before training starts
        return params(site), ()

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        del train
        return measure(site, params), state

    return Norm(checked(where, site=SHAPES)(init), checked(where)(parts))


@checked("no norm")
def none(*, use_bias: bool = True) -> Norm:
    """No normalization: μ = 0, σ = 1, and a bias."""

    def measure(site: Site, params: Any) -> Parts:
        _, b = gain_and_bias("no norm", params, site.a, site.linear.channel_axis)
        zero = jnp.zeros((), b.dtype)
        return Parts(zero, zero + 1, zero + 1, b)

    return _norm("no norm", measure, functools.partial(_affine, use_gain=False, use_bias=use_bias))


@checked("batch norm", decay=settled_decay)
def batch(
    *,
    decay: float | None = None,
    eps: float = 1e-5,
    ddof: int | None = None,
    estimator: Estimator | None = None,
    axis_name: AxisName | None = None,
    population: str | Callable[..., Any] = "debiased",
    algorithm: Algorithm = "auto",
    bad_batch: BadBatch = "skip",
    state_gradient: bool = False,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """`batch_norm`, with the state of `normlab.population.init_population(population, C)`.

    `decay`, `ddof` and `estimator` are the population's, as far as it has them; `None` is its own
    default, 0.9, 0 and `"pooled"`.
    """
    how: dict[str, Any] = {"eps": eps, "axis_name": axis_name, "algorithm": algorithm}
    how |= {"bad_batch": bad_batch, "state_gradient": state_gradient}
    kept = {"decay": decay, "ddof": ddof, "estimator": estimator}
    state_of = init_batch_state(population, eps, as_sync(axis_name), **kept)

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        layout = {"weights": site.weights, "channel_axis": site.linear.channel_axis}
        return batch_parts(site.a, params, state, train=train, **how, **layout)

    def init(site: Site) -> tuple[Any, State]:
        params = _affine(site, use_gain=use_gain, use_bias=use_bias)
        state = state_of(site.channels, promote_dtype(site.a))
        jax.eval_shape(lambda site: parts(params, state, site, train=False), site)
        return params, state

    where = "batch norm"
    return Norm(checked(where, site=SHAPES)(init), checked(where)(parts))


@checked("weight norm", data_init=flag())
def weight(
    *,
    data_init: bool = False,
    axis_name: AxisName | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Weight normalization; with `data_init` by `weight_norm_init`, from the values at init."""

    def params(site: Site) -> Affine:
        if not data_init:
            return _affine(site, use_gain=use_gain, use_bias=use_bias)
        if isinstance(site.a, jax.ShapeDtypeStruct):
            raise invalid(
                "weight norm",
                "shapes at init with data_init=True",
                "a site with values",
                "pass Site(a=linear(x, w), x=x, w=w, linear=linear) to init, or data_init=False",
            )
        made = weight_norm_init(site, axis_name=axis_name)
        return Affine(made.g if use_gain else None, made.b if use_bias else None)

    return _norm("weight norm", weight_parts, params)


@checked("cosine norm", g=real)
def cosine(*, g: float | None = None, use_gain: bool = True, use_bias: bool = True) -> Norm:
    """`cosine_norm`; the gain starts at `g`, by default √K for K inputs to a unit.

    With √K the h of random w and x has variance 1 at initialization, as in the other norms. The
    paper's own form, bounded by 1, is `use_gain=False`.
    """
    return _cosine(False, g, use_gain, use_bias)


@checked("centred cosine norm", g=real)
def centred_cosine(*, g: float | None = None, use_gain: bool = True, use_bias: bool = True) -> Norm:
    """`cosine_norm(centred=True)`, Pearson's correlation; `g` as in `cosine`."""
    return _cosine(True, g, use_gain, use_bias)


def _cosine(centred: bool, g: float | None, use_gain: bool, use_bias: bool) -> Norm:
    def params(site: Site) -> Affine:
        assert site.w is not None  # measured before
        gain = math.sqrt(math.prod(site.w.shape[:-1])) if g is None else g
        return _affine(site, use_gain=use_gain, use_bias=use_bias, g=gain)

    where = "centred cosine norm" if centred else "cosine norm"
    return _norm(where, functools.partial(cosine_parts, centred=centred), params)


def _add(
    factory: Callable[..., Any],
    needs: str,
    looks_at: str,
    mu: str,
    sigma: str,
    marks: str,
    paper: str,
) -> None:
    """Registers a norm of the library; `marks` has an `I` for each of `INVARIANCES` that holds."""
    name = getattr(factory, "__name__").removesuffix("_parts")  # noqa: B009
    held = (change for change, mark in zip(INVARIANCES, marks, strict=True) if mark == "I")
    register(
        Row(name, factory, frozenset(needs.split()), looks_at, mu, sigma, frozenset(held), paper)
    )


_OF_A = ("mean a", "√(var a + ε)")
_BATCH = "a: all examples and positions (and devices), per channel"
_LAYER = "a: the channels of a position, or all of an example"
_GROUP = "a: the positions of an example and a group of channels"
_INSTANCE = "a: the positions of an example, per channel"
_UNIT = "w: the weights of a unit"
_SUMS = "w, and the sum of x: the weights of a unit"
_BOTH = "w and x: the weights of a unit and the inputs they meet"
_QIAO = "Qiao et al. 2019, Brock et al. 2021"

_add(none, "", "nothing", "0", "1", "------", "–")
_add(batch, "a batch", _BATCH, *_OF_A, "I-III-", "Ioffe & Szegedy 2015")
_add(layer_parts, "a", _LAYER, *_OF_A, "II-I-I", "Ba, Kiros & Hinton 2016")
_add(rms_parts, "a", "a: as layer", "0", "√(mean a² + ε)", "I--I-I", "Zhang & Sennrich 2019")
_add(group_parts, "a", _GROUP, *_OF_A, "II-I-I", "Wu & He 2018")
_add(instance_parts, "a", _INSTANCE, *_OF_A, "I-IIII", "Ulyanov, Vedaldi & Lempitsky 2016")
_add(weight, "w", _UNIT, "0", "‖w‖", "I-I---", "Salimans & Kingma 2016")
_add(weight_standardization_parts, "w x", _SUMS, "w̄·Σx", "‖w − w̄‖", "I-I---", _QIAO)
_add(cosine, "w x", _BOTH, "0", "‖w‖·‖x‖", "I-II-I", "Luo et al. 2017")
_add(
    centred_cosine,
    "w x",
    "w and x: as cosine",
    "K·w̄·x̄",
    "‖w − w̄‖·‖x − x̄‖",
    "I-II-I",
    "Luo et al. 2017",
)
