"""Every norm by name: one table for tests, documentation and experiments."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normlab._arguments import checked, flag, integer, norm_axes, real, settled_decay, text
from normlab._checks import gain_and_bias, invalid, nearest, promote_dtype
from normlab.batch import batch_parts
from normlab.cosine import cosine_parts
from normlab.devices.topology import AxisName, as_sync
from normlab.equation import Parts
from normlab.example import Axes, group_parts, instance_parts, layer_parts, rms_parts
from normlab.measure import Algorithm
from normlab.population.by_name import init_population, require
from normlab.population.cumulative import Estimator
from normlab.population.delayed import delay
from normlab.population.protocol import BadBatch
from normlab.site import SHAPES, Norm, Params, Site, State
from normlab.equation import init_affine
from normlab.weight import weight_norm_init, weight_parts, weight_standardization_parts

INVARIANCES = (
    "weights rescaled",
    "weights recentred",
    "one unit rescaled",
    "data rescaled",
    "data recentred",
    "one case rescaled",
)
"""The columns of table 1 of Ba, Kiros & Hinton (2016), for a dense layer (instance norm: for a
convolution without padding). Recentring adds one vector to the weights of every unit, or one vector
to every example."""


class Row(NamedTuple):
    """What the library declares about one norm.

    Attributes:
      name: The key for `get`.
      factory: Returns the `Norm` for keyword options.
      looks_at: What μ and σ are measured on: of the pre-activation a, the weights w, the input x.
      shift: μ, as a formula.
      scale: σ, as a formula.
      invariances: Those of `INVARIANCES` under which h does not change (as ε → 0).
      paper: Where the norm was proposed.
    """

    name: str
    factory: Callable[..., Norm]
    looks_at: str
    shift: str
    scale: str
    invariances: frozenset[str]
    paper: str


NAME = text("the name of a norm", "use one of names()")


@checked("get", name=NAME)
def get(name: str, **options: Any) -> Norm:
    """Returns the norm called `name`.

    Args:
      name: One of `names()`.
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
    return factory(**options)


@checked("row", name=NAME)
def row(name: str) -> Row:
    """Returns the registry's row for `name`; raises ValueError for an unknown one."""
    if name not in _ROWS:
        given = f"the unknown norm {name!r}: {nearest(name, _ROWS)}"
        raise invalid("registry", given, "the name of a norm", "use a known one")
    return _ROWS[name]


def names() -> tuple[str, ...]:
    """The names of all norms, in the registry's order."""
    return tuple(_ROWS)


def _factory(where: str, **special: Any) -> Callable[[Callable[..., Norm]], Callable[..., Norm]]:
    """A factory whose options, and the arguments of whose norms, are held against their kinds."""

    def decorate(f: Callable[..., Norm]) -> Callable[..., Norm]:
        make = checked(where, **special)(f)

        @functools.wraps(make)
        def factory(**options: Any) -> Norm:
            init, parts = make(**options)
            return Norm(checked(where, site=SHAPES)(init), checked(where)(parts))

        return factory

    return decorate


@_factory("no norm")
def none(*, use_bias: bool = True) -> Norm:
    """No normalization: μ = 0, σ = 1, and a bias."""

    def measure(params: Params, site: Site) -> Parts:
        _, b = gain_and_bias("no norm", params, site.a, site.linear.channel_axis)
        zero = jnp.zeros((), b.dtype)
        return Parts(zero, zero + 1, zero + 1, b)

    return _stateless(measure, use_gain=False, use_bias=use_bias)


@_factory("batch norm", decay=settled_decay)
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
    """`batch_norm`, with the state of `init_population(population, C)`.

    `decay`, `ddof` and `estimator` are the population's, as far as it has them; `None` is its own
    default, 0.9, 0 and `"pooled"`.
    """
    given = {"decay": decay, "ddof": ddof, "estimator": estimator}
    settings = {name: value for name, value in given.items() if value is not None}
    if not callable(population):
        require(population)
    if population == "renorm":
        settings["eps"] = eps

    def parts(params: Params, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        return batch_parts(
            site.a,
            params,
            state,
            train=train,
            eps=eps,
            axis_name=axis_name,
            weights=site.weights,
            channel_axis=site.linear.channel_axis,
            algorithm=algorithm,
            bad_batch=bad_batch,
            state_gradient=state_gradient,
        )

    def init(site: Site) -> tuple[Params, State]:
        dtype = promote_dtype(site.a)
        params = init_affine(site.channels, use_gain=use_gain, use_bias=use_bias, dtype=dtype)
        state = init_population(population, site.channels, dtype=dtype, **settings)
        state = delay(state) if as_sync(axis_name).every else state
        jax.eval_shape(lambda site: parts(params, state, site, train=False), site)
        return params, state

    return Norm(init, parts)


@_factory("layer norm", axes=norm_axes)
def layer(
    *,
    axes: Axes = "channels",
    eps: float = 1e-5,
    algorithm: Algorithm = "auto",
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """`layer_norm`."""
    return _example(layer_parts, use_gain, use_bias, axes=axes, eps=eps, algorithm=algorithm)


@_factory("RMS norm", axes=norm_axes)
def rms(
    *,
    axes: Axes = "channels",
    eps: float = 1e-5,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """`rms_norm`."""
    return _example(rms_parts, use_gain, use_bias, axes=axes, eps=eps)


@_factory("group norm", groups=integer("a number of groups, at least 1", "pass an int", 1))
def group(
    *,
    groups: int,
    eps: float = 1e-5,
    algorithm: Algorithm = "auto",
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """`group_norm`."""
    return _example(group_parts, use_gain, use_bias, groups=groups, eps=eps, algorithm=algorithm)


@_factory("instance norm")
def instance(
    *,
    eps: float = 1e-5,
    algorithm: Algorithm = "auto",
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """`instance_norm`."""
    return _example(instance_parts, use_gain, use_bias, eps=eps, algorithm=algorithm)


@_factory("weight norm", data_init=flag())
def weight(
    *,
    data_init: bool = False,
    axis_name: AxisName | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Weight normalization; with `data_init` by `weight_norm_init`, from the values at init."""

    def data_dependent(site: Site) -> Params:
        if isinstance(site.a, jax.ShapeDtypeStruct):
            raise invalid(
                "weight norm",
                "shapes at init with data_init=True",
                "a site with values",
                "pass Site(a=linear(x, w), x=x, w=w, linear=linear) to init, or data_init=False",
            )
        params = weight_norm_init(site, axis_name=axis_name)
        return params._replace(g=params.g if use_gain else None, b=params.b if use_bias else None)

    return _stateless(
        weight_parts, use_gain=use_gain, use_bias=use_bias, params=data_dependent if data_init else None
    )


@_factory("weight standardization")
def weight_standardization(*, use_gain: bool = True, use_bias: bool = True) -> Norm:
    """`weight_standardization`."""
    return _stateless(weight_standardization_parts, use_gain=use_gain, use_bias=use_bias)


@_factory("cosine norm", g=real)
def cosine(*, g: float | None = None, use_gain: bool = True, use_bias: bool = True) -> Norm:
    """`cosine_norm`. The gain starts at `g`; `None` stands for √K.

    At √K the pre-activation of independent x and w has variance 1, as in the other norms. The
    paper's own form, bounded by 1, is `rescale=False`.
    """
    return _cosine(False, g, use_gain, use_bias)


@_factory("centred cosine norm", g=real)
def centred_cosine(*, g: float | None = None, use_gain: bool = True, use_bias: bool = True) -> Norm:
    """`cosine_norm(centred=True)`, Pearson's correlation; `g` as in `cosine`."""
    return _cosine(True, g, use_gain, use_bias)


def _cosine(centred: bool, g: float | None, use_gain: bool, use_bias: bool) -> Norm:
    def measure(params: Params, site: Site) -> Parts:
        return cosine_parts(params, site, centred=centred)

    def params(site: Site) -> Params:
        assert site.w is not None  # measured before
        gain = math.sqrt(math.prod(site.w.shape[:-1])) if g is None else g
        dtype = promote_dtype(site.a)
        return init_affine(site.channels, use_gain=use_gain, use_bias=use_bias, g=gain, dtype=dtype)

    return _stateless(measure, use_gain=use_gain, use_bias=use_bias, params=params)


def _example(measure: Callable[..., Parts], use_gain: bool, use_bias: bool, **options: Any) -> Norm:
    def at_site(params: Params, site: Site) -> Parts:
        return measure(
            site.a,
            params,
            weights=site.weights,
            channel_axis=site.linear.channel_axis,
            **options,
        )

    return _stateless(at_site, use_gain=use_gain, use_bias=use_bias)


def _stateless(
    measure: Callable[[Params, Site], Parts],
    *,
    use_gain: bool,
    use_bias: bool,
    params: Callable[[Site], Params] | None = None,
) -> Norm:
    """A norm without state; `params` overrides the initial gain 1 and bias 0."""

    def init(site: Site) -> tuple[Params, State]:
        jax.eval_shape(lambda site: measure(None, site), site)  # say no before training starts
        if params is not None:
            return params(site), ()
        dtype = promote_dtype(site.a)
        return init_affine(site.channels, use_gain=use_gain, use_bias=use_bias, dtype=dtype), ()

    def parts(params: Params, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        del train
        return measure(params, site), state

    return Norm(init, parts)


def _row(
    factory: Callable[..., Norm], looks_at: str, shift: str, scale: str, marks: str, paper: str
) -> Row:
    """`marks` has a character per column of `INVARIANCES`: `I` for invariant, `-` for not."""
    held = (name for name, mark in zip(INVARIANCES, marks, strict=True) if mark == "I")
    return Row(factory.__name__, factory, looks_at, shift, scale, frozenset(held), paper)


_VARIANCE = "√(var a + ε)"
_ROWS = {
    row.name: row
    for row in (
        _row(none, "nothing", "0", "1", "------", "–"),
        _row(
            batch,
            "a: all examples and positions (and devices), per channel",
            "mean a",
            _VARIANCE,
            "I-III-",
            "Ioffe & Szegedy 2015",
        ),
        _row(
            layer,
            "a: the channels of a position, or all of an example",
            "mean a",
            _VARIANCE,
            "II-I-I",
            "Ba, Kiros & Hinton 2016",
        ),
        _row(rms, "a: as layer", "0", "√(mean a² + ε)", "I--I-I", "Zhang & Sennrich 2019"),
        _row(
            group,
            "a: the positions of an example and a group of channels",
            "mean a",
            _VARIANCE,
            "II-I-I",
            "Wu & He 2018",
        ),
        _row(
            instance,
            "a: the positions of an example, per channel",
            "mean a",
            _VARIANCE,
            "I-IIII",
            "Ulyanov, Vedaldi & Lempitsky 2016",
        ),
        _row(weight, "w: the weights of a unit", "0", "‖w‖", "I-I---", "Salimans & Kingma 2016"),
        _row(
            weight_standardization,
            "w, and the sum of x: the weights of a unit",
            "w̄·Σx",
            "‖w − w̄‖",
            "I-I---",
            "Qiao et al. 2019, Brock et al. 2021",
        ),
        _row(
            cosine,
            "w and x: the weights of a unit and the inputs they meet",
            "0",
            "‖w‖·‖x‖",
            "I-II-I",
            "Luo et al. 2017",
        ),
        _row(
            centred_cosine,
            "w and x: as cosine",
            "K·w̄·x̄",
            "‖w − w̄‖·‖x − x̄‖",
            "I-II-I",
            "Luo et al. 2017",
        ),
    )
}
