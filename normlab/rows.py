"""The norms of the library, as rows of the registry, and the options they are made with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from normlab._arguments import checked, flag, real, settled_decay
from normlab._checks import gain_and_bias, promote_dtype
from normlab.batch import batch_parts
from normlab.cosine import cosine_parts
from normlab.devices.topology import AxisName, as_sync
from normlab.equation import Affine, Parts
from normlab.errors import invalid
from normlab.example import group_parts, instance_parts, layer_parts, rms_parts
from normlab.family.lengths import scale_params, scale_parts
from normlab.family.whitening import group_whitening_parts, switchable_whitening, whitening
from normlab.gains import Gain, init_gain, kept_as
from normlab.making import initial_affine, norm_of, stateless
from normlab.measure import Algorithm
from normlab.population._batches import BadBatch
from normlab.population.by_name import init_batch_state
from normlab.population.cumulative import Estimator
from normlab.registry import INVARIANCES, Row, register
from normlab.site import SHAPES, Norm, Site, State
from normlab.weight import weight_norm_init, weight_parts, weight_standardization_parts


@checked("no norm")
def none(*, use_bias: bool = True) -> Norm:
    """No normalization: μ = 0, σ = 1, and a bias."""

    def measure(site: Site, params: Any) -> Parts:
        _, b = gain_and_bias("no norm", params, site.a, site.linear.channel_axis)
        zero = jnp.zeros((), b.dtype)
        return Parts(zero, zero + 1, zero + 1, b)

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

    def fits(params: Any, state: State, site: Site) -> Any:
        """In inference, and on one device: where `init` is called there may be no axis yet."""
        alone = {**how, "axis_name": None, "channel_axis": site.linear.channel_axis}
        return batch_parts(site.a, params, state, train=False, **alone)

    def init(site: Site) -> tuple[Any, State]:
        params = initial_affine(site, use_gain=use_gain, use_bias=use_bias, gain=gain)
        state = state_of(site.channels, promote_dtype(site.a))
        jax.eval_shape(fits, params, state, site)
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
    gain: Gain = "plain",
) -> Norm:
    """Weight normalization; with `data_init` by `weight_norm_init`, from the values at init."""

    def params(site: Site) -> Any:
        if not data_init:
            return initial_affine(site, use_gain=use_gain, use_bias=use_bias, gain=gain)
        if isinstance(site.a, jax.ShapeDtypeStruct):
            raise invalid(
                "weight norm",
                "shapes at init with data_init=True",
                "a site with values",
                "pass Site(a=linear(x, w), x=x, w=w, linear=linear) to init, or data_init=False",
            )
        made = weight_norm_init(site, axis_name=axis_name)
        return kept_as(gain, Affine(made.g if use_gain else None, made.b if use_bias else None))

    return norm_of("weight norm", weight_parts, params)


@checked("cosine norm", g=real)
def cosine(
    *,
    g: float | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> Norm:
    """`cosine_norm`; the gain starts at `g`, by default √K for K inputs to a unit.

    With √K the h of random w and x has variance 1 at initialization, as in the other norms. The
    paper's own form, bounded by 1, is `use_gain=False`.
    """
    return _cosine(False, g, use_gain, use_bias, gain)


@checked("centred cosine norm", g=real)
def centred_cosine(
    *,
    g: float | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> Norm:
    """`cosine_norm(centred=True)`, Pearson's correlation; `g` as in `cosine`."""
    return _cosine(True, g, use_gain, use_bias, gain)


def _cosine(centred: bool, g: float | None, use_gain: bool, use_bias: bool, gain: Gain) -> Norm:
    def params(site: Site) -> Any:
        assert site.w is not None  # measured before
        size = math.sqrt(math.prod(site.w.shape[:-1])) if g is None else g
        how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
        return init_gain(site.channels, g=size, dtype=promote_dtype(site.a), **how)

    where = "centred cosine norm" if centred else "cosine norm"
    return norm_of(where, functools.partial(cosine_parts, centred=centred), params)


def _add(
    factory: Callable[..., Any],
    needs: str,
    looks_at: str,
    mu: str,
    sigma: str,
    marks: str,
    paper: str,
    **more: Any,
) -> None:
    """Registers a norm of the library.

    `marks` has an `I` for each of `INVARIANCES` that holds, behind a dense layer; where others hold
    behind one with positions, those follow behind a space.
    """
    name = getattr(factory, "__name__").removesuffix("_parts")  # noqa: B009
    held = [
        frozenset(change for change, mark in zip(INVARIANCES, each, strict=True) if mark == "I")
        for each in marks.split()
    ]
    if held[1:]:
        more["with_positions"] = held[1]
    about = (looks_at, mu, sigma, held[0], paper)
    register(Row(name, factory, frozenset(needs.split()), *about, **more))


_OF_A = ("mean a", "√(var a + ε)")
_BATCH = "a: all examples and positions (and devices), per channel"
_LAYER = "a: the channels of a position, or all of an example"
_GROUP = "a: the positions of an example and a group of channels"
_INSTANCE = "a: the positions of an example, per channel"
_UNIT = "w: the weights of a unit"
_SUMS = "w, and the sum of x: the weights of a unit"
_BOTH = "w and x: the weights of a unit and the inputs they meet"
_QIAO = "Qiao et al. 2019, Brock et al. 2021"

_add(none, "", "nothing", "0", "1", "------II", "–")
_add(batch, "a batch", _BATCH, *_OF_A, "I-III-I-", "Ioffe & Szegedy 2015")
_add(layer_parts, "a", _LAYER, *_OF_A, "II-I-III", "Ba, Kiros & Hinton 2016")
_add(rms_parts, "a", "a: as layer", "0", "√(mean a² + ε)", "I--I-III", "Zhang & Sennrich 2019")
_add(group_parts, "a", _GROUP, *_OF_A, "II-I-III I--I-III", "Wu & He 2018")
_add(instance_parts, "a", _INSTANCE, *_OF_A, "I-IIIIII", "Ulyanov, Vedaldi & Lempitsky 2016")
_add(weight, "w", _UNIT, "0", "‖w‖", "I-I---II", "Salimans & Kingma 2016")
_add(weight_standardization_parts, "w x", _SUMS, "w̄·Σx", "‖w − w̄‖", "I-I---II", _QIAO)
_add(cosine, "w x", _BOTH, "0", "‖w‖·‖x‖", "I-II-III", "Luo et al. 2017")
_add(
    centred_cosine,
    "w x",
    "w and x: as cosine",
    "K·w̄·x̄",
    "‖w − w̄‖·‖x − x̄‖",
    "I-II-III",
    "Luo et al. 2017",
)

# Lengths.
_LENGTH = "a: the channels of a position"
_add(
    stateless(scale_parts, scale_params),
    "a",
    _LENGTH,
    "0",
    "max(‖a‖, ε)",
    "I--I-III",
    "Nguyen & Salazar 2019",
)

# The value itself; with the activation; measured gains.

# Mixtures and compositions.

# Windows and segments.

# Maps of the weights.

# Whitening.
_add(
    whitening,
    "a batch",
    "a: all examples and positions (and devices), groups of channels together",
    "mean a",
    "Σ^½, Σ = cov a + εI",
    "I-III-I-",
    "Huang et al. 2018, 2019, Siarohin et al. 2019",
)
_add(
    stateless(group_whitening_parts),
    "a",
    "a: of an example, its groups of channels together",
    "mean a",
    "Σ^½, Σ = cov a + εI",
    "II-I-III I--I-III",
    "Huang et al. 2021",
)
_add(
    switchable_whitening,
    "a batch",
    "a: mixed, of the batch, of the positions of an example",
    "Σ w·μ",
    "(Σ w·cov a + εI)^½",
    "I--II-I-",
    "Pan et al. 2019",
)
