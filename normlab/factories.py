"""Factories of norms that have a state or params of their own; `stateless` makes the others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normlab._arguments import checked, flag, real, settled_decay
from normlab._checks import gain_and_bias, no_mean, promote_dtype
from normlab.batch import batch_parts
from normlab.cosine import cosine_parts
from normlab.devices.topology import AxisName, as_sync
from normlab.equation import Affine, Parts
from normlab.errors import invalid
from normlab.gains import Gain, init_gain, kept_as
from normlab.implementation import Implementation
from normlab.making import initial_affine, made_of, norm_of
from normlab.maps import Mapped, WeightMap, weight_map
from normlab.measure import Algorithm
from normlab.population._batches import BadBatch
from normlab.population.by_name import init_batch_state
from normlab.population.cumulative import Estimator
from normlab.sharded import OVER, ExampleAxes, channels_in_all, where_bound
from normlab.site import Norm, Site, State
from normlab.weight import (
    FORM_EPS,
    OF,
    Form,
    Of,
    centred,
    of_deviations,
    of_lengths,
    weight_norm_init,
)


@checked("no norm")
def none(*, use_bias: bool = True) -> Norm:
    """No normalization: μ = 0, σ = 1, and a bias."""

    def measure(site: Site, params: Any) -> Parts:
        _, b = gain_and_bias("no norm", params, site.a, site.linear.channel_axis)
        one = jnp.ones((), b.dtype)
        return Parts(no_mean(b.dtype), one, one, b)

    return norm_of(
        "no norm", measure, functools.partial(initial_affine, use_gain=False, use_bias=use_bias)
    )


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
    gain: Gain = "plain",
    implementation: Implementation = "auto",
) -> Norm:
    """`batch_norm`, with the state of `normlab.population.init_population(population, C)`.

    `decay`, `ddof` and `estimator` are the population's, as far as it has them; `None` is its own
    default, 0.9, 0 and `"pooled"`.
    """
    how: dict[str, Any] = {"eps": eps, "axis_name": axis_name, "algorithm": algorithm}
    how |= {"bad_batch": bad_batch, "state_gradient": state_gradient}
    how["implementation"] = implementation
    kept = {"decay": decay, "ddof": ddof, "estimator": estimator}
    state_of = init_batch_state(population, eps, as_sync(axis_name), **kept)
    params = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
    return _of_batch(how, state_of, params)


def of_any_batch(norm: Norm) -> Norm:
    """The same batch norm, for those who need no variance: a batch of one value will do."""
    how, state_of, params = vars(norm.parts)["made"]
    return _of_batch(how | {"_one_value": True}, state_of, params)


def _of_batch(how: dict[str, Any], state_of: Callable[..., Any], given: dict[str, Any]) -> Norm:

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        layout = {"weights": site.weights, "channel_axis": site.linear.channel_axis}
        return batch_parts(site.a, params, state, train=train, **how, **layout)

    def fits(params: Any, state: State, site: Site) -> Any:
        """In inference, and on one device: where `init` is called there may be no axis yet."""
        alone = {**how, "axis_name": None, "channel_axis": site.linear.channel_axis}
        return batch_parts(site.a, params, state, train=False, **alone)

    def init(site: Site) -> tuple[Any, State]:
        params = initial_affine(site, **given)
        state = state_of(site.channels, promote_dtype(site.a))
        jax.eval_shape(fits, params, state, site)
        return params, state

    vars(parts)["made"] = how, state_of, given
    return made_of("batch norm", init, parts)


@checked("weight norm", of=OF, **dict.fromkeys(("data_init", "bounded"), flag()))
def weight(
    *,
    of: Of = "unit",
    data_init: bool = False,
    bounded: bool = False,
    axis_name: AxisName | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> WeightMap:
    """Weight normalization; with `data_init` by `weight_norm_init`, from the values at init.

    `bounded` (Hoffer et al. 2018, https://arxiv.org/abs/1803.01814) learns no gain: the lengths
    that w has at init, of each unit or of the whole kernel, stay, and are the state. Where init has
    but shapes they are those of the first training call.
    """
    where = "weight norm"
    if bounded and data_init:
        change = "choose one: either says what the lengths are"
        raise invalid(where, "bounded=True and data_init=True", "at most one of them", change)

    def params(site: Site) -> Any:
        if not data_init:
            learned = use_gain and not bounded
            return initial_affine(site, use_gain=learned, use_bias=use_bias, gain=gain)
        if isinstance(site.a, jax.ShapeDtypeStruct):
            raise invalid(
                where,
                "shapes at init with data_init=True",
                "a site with values",
                "pass Site(a=linear(x, w), x=x, w=w, linear=linear) to init, or data_init=False",
            )
        made = weight_norm_init(site, axis_name=axis_name, of=of)
        return kept_as(gain, Affine(made.g if use_gain else None, made.b if use_bias else None))

    def lengths(w: Any, *_: Any) -> State:
        if not bounded:
            return ()
        if isinstance(w, jax.ShapeDtypeStruct):
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(lengths, w))
        return of_lengths(w, of).sigma

    def measure(w: Any, state: State, *, train: bool, **_: Any) -> tuple[Mapped, State]:
        mapped = of_lengths(w, of)
        if not bounded:
            return mapped, state
        now = lax.stop_gradient(mapped.sigma)
        kept = jnp.where(state == 0, now, state.astype(now.dtype))
        sigma = mapped.sigma / jnp.where(kept == 0, 1, kept)
        bound = Mapped(mapped.unit * kept, None, sigma)
        return bound, kept.astype(state.dtype) if train else state

    return weight_map(measure, params, lengths, name=where)


@checked("weight standardization", eps=FORM_EPS)
def weight_standardization(
    *,
    form: Form = "exact",
    eps: float | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> WeightMap:
    """`weight_standardization`; the gain starts at 1."""
    where = "weight standardization"

    def measure(w: Any, state: State, **_: Any) -> tuple[Mapped, State]:
        return of_deviations(w, form, eps), state

    how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
    return weight_map(measure, functools.partial(initial_affine, **how), name=where)


@checked("centred weights")
def centred_weight(
    *, use_gain: bool = False, use_bias: bool = True, gain: Gain = "plain"
) -> WeightMap:
    """`centred_weight`, by default without a gain."""

    def measure(w: Any, state: State, **_: Any) -> tuple[Mapped, State]:
        return centred(w), state

    how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
    return weight_map(measure, functools.partial(initial_affine, **how), name="centred weights")


@checked("cosine norm", g=real, axis_name=OVER)
def cosine(
    *,
    g: float | None = None,
    axis_name: ExampleAxes | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> Norm:
    """`cosine_norm`; the gain starts at `g`, by default √K for K inputs to a unit, on all devices.

    With √K the h of random w and x has variance 1 at initialization, as in the other norms. The
    paper's own form, bounded by 1, is `use_gain=False`.
    """
    return _cosine(False, g, axis_name, use_gain, use_bias, gain)


@checked("centred cosine norm", g=real, axis_name=OVER)
def centred_cosine(
    *,
    g: float | None = None,
    axis_name: ExampleAxes | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> Norm:
    """`cosine_norm(centred=True)`, Pearson's correlation; `g` as in `cosine`."""
    return _cosine(True, g, axis_name, use_gain, use_bias, gain)


def _cosine(
    centred: bool,
    g: float | None,
    axis_name: ExampleAxes | None,
    use_gain: bool,
    use_bias: bool,
    gain: Gain,
) -> Norm:
    def params(site: Site) -> Any:
        assert site.w is not None  # measured before
        inputs = channels_in_all(axis_name, math.prod(site.w.shape[:-1]))
        size = math.sqrt(inputs) if g is None else g
        how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
        return init_gain(site.channels, g=size, dtype=promote_dtype(site.a), **how)

    where = "centred cosine norm" if centred else "cosine norm"

    def measure(site: Site, params: Any) -> Parts:
        return cosine_parts(site, params, centred=centred, axis_name=axis_name)

    def first(site: Site, params: Any) -> Parts:
        return cosine_parts(site, params, centred=centred, axis_name=where_bound(axis_name))

    return norm_of(where, measure, params, first)
