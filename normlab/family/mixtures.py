"""Norms that are mixtures and compositions of others: see `normlab.combine`.

    switchable        μ = Σ w·μ, σ² = Σ w·σ² of instance, layer and batch norm
    batch-instance    ρ·batch + (1 − ρ)·instance, by channel
    IBN               instance norm of some channels, batch norm of the rest
    batch-channel     group norm of batch norm
    mean-only batch   the μ of batch norm and σ = 1; or σ = ‖w‖
    extended batch    the μ of batch norm and one σ for all channels

Those with a batch norm take its `axis_name` and keep its population; `batch` is what else it is
told.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from normlab._arguments import (
    anything,
    checked,
    declare,
    mapping,
    number,
    one_of,
    sequence,
)
from normlab._checks import check_options, promote_dtype
from normlab._trees import node
from normlab.combine import MODULATED, blend, chain, mix, mixture, pair, split, tuple_of
from normlab.devices.topology import AxisName
from normlab.equation import Parts
from normlab.errors import invalid
from normlab.example import group_parts, instance_parts, layer_parts
from normlab.factories import batch as batch_factory
from normlab.factories import of_any_batch
from normlab.factories import weight as weight_factory
from normlab.making import made_of, stateless
from normlab.site import SHAPES, Norm, Site, State

_BARE: dict[str, Any] = {"use_gain": False, "use_bias": False}
_OPTIONS = inspect.signature(batch_factory).parameters
_BATCH = mapping(anything, "options of batch norm", 'pass a dict, such as {"decay": 0.9}')
declare(batch=_BATCH, ratio=number("a number in (0, 1)", "use 0.5", lambda v: 0 < v < 1))


def batch_of(options: Mapping[str, Any] | None, **own: Any) -> Norm:
    """Batch norm with some options of the mixture's own, and others."""
    others = {n: p for n, p in _OPTIONS.items() if n not in {**own, **_BARE}}
    check_options("batch", others, options or {})
    return batch_factory(**{**_BARE, **own, **(options or {})})


def _layer(**options: Any) -> Norm:
    return stateless(layer_parts)(axes="all", **options)


class Logits(NamedTuple):
    """How much each norm counts in switchable norm, before the softmax.

    Attributes:
      shift: `[k]`, of the means.
      scale: `[k]`, of the variances.
    """

    shift: Array
    scale: Array


node(Logits)


@checked(
    "switchable norm",
    of=sequence(one_of(Literal["instance", "layer", "batch"], ""), "names of norms", "use these"),
)
def switchable(
    *,
    of: tuple[str, ...] = ("instance", "layer", "batch"),
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Switchable normalization (Luo et al. 2019, https://arxiv.org/abs/1806.10779).

    h = g · (a − Σ w·μ) / √(Σ w'·var + ε) + b for w and w', each the softmax of learned logits that
    start at 1. Layer norm is over all axes of an example. In a dense layer there is no instance
    norm: `of=("layer", "batch")`, as in the paper's code.

    The code's running average begins at 0 with a slow decay and is a mixture's part, so that its
    first inferences are far off; here it is batch norm's population, right from the first batch on.
    """
    make = {
        "instance": lambda: stateless(instance_parts)(eps=eps, **_BARE),
        "layer": lambda: _layer(eps=eps, **_BARE),
        "batch": lambda: batch_of(batch, eps=eps, axis_name=axis_name),
    }

    def logits(site: Site) -> Logits:
        one = jnp.ones(len(of), promote_dtype(site.a))
        return Logits(one, one)

    def combine(parts: list[Parts], weights: Logits) -> Parts:
        return blend(parts, jax.nn.softmax(weights.shift), jax.nn.softmax(weights.scale))

    how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias}
    made = mixture([make[name]() for name in of], combine, logits, **how)

    def init(site: Site) -> tuple[Any, State]:
        alone = all(n == 1 for n in _positions(site))
        if "instance" in of and alone:
            given = f"an input of shape {site.a.shape}, one value per example and channel"
            change = 'leave it out, of=("layer", "batch")'
            raise invalid("switchable norm", given, "positions, for its instance norm", change)
        return made.init(site)

    return Norm(checked("switchable norm", site=SHAPES)(init), made.parts)


def _positions(site: Site) -> list[int]:
    """The sizes of all axes but the examples' and the channels'."""
    channel = site.linear.channel_axis % site.a.ndim
    return [n for i, n in enumerate(site.a.shape) if i not in (0, channel)]


class Gates(NamedTuple):
    """The gate of batch-instance norm.

    Attributes:
      rho: `[C]` in [0, 1], the share of batch norm; starts at 1.
    """

    rho: Array


node(Gates)


@checked("batch-instance norm")
def batch_instance(
    *,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Batch-instance normalization (Nam & Kim 2018, https://arxiv.org/abs/1805.07925).

    h = g · (ρ·h_batch + (1 − ρ)·h_instance) + b. ρ starts at 1 and is to stay in [0, 1]: call
    `clip_gates` on the params after each step of the optimizer, as the paper does (which also gives
    ρ ten times the rate and no weight decay).
    """

    def gates(site: Site) -> Gates:
        return Gates(jnp.ones(site.channels, promote_dtype(site.a)))

    norms = [
        batch_of(batch, eps=eps, axis_name=axis_name),
        stateless(instance_parts)(eps=eps, **_BARE),
    ]

    def combine(parts: list[Parts], weights: Gates) -> Parts:
        shape = jnp.broadcast_shapes(*(p.mu.shape for p in parts))
        # Batch norm's μ varies by channel, and before that at most by example.
        axis = max(i for i, n in enumerate(parts[0].mu.shape) if n == weights.rho.size)
        rho = weights.rho.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return mix(parts, jnp.stack([rho, 1 - rho]))

    return mixture(norms, combine, gates, use_gain=use_gain, use_bias=use_bias)


@checked("clip_gates", params=anything)
def clip_gates(params: Any) -> Any:
    """Returns the params with every gate ρ of batch-instance norm clipped to [0, 1].

    Args:
      params: Those of a norm or of a whole model, as a tree of arrays or of nnx variables: every
        leaf that is called `rho` is a gate.

    >>> clip_gates({"rho": jnp.array([-0.5, 0.5, 2.0]), "scale": jnp.array([2.0])})["rho"].tolist()
    [0.0, 0.5, 1.0]
    """

    def one(path: Any, v: Any) -> Any:
        names = [getattr(key, "name", None) or getattr(key, "key", None) for key in path[-2:]]
        names = names[:-1] if names[-1:] == ["value"] else names  # of a variable of nnx
        return jnp.clip(v, 0, 1) if names[-1:] == ["rho"] else v

    return jax.tree_util.tree_map_with_path(one, params)


@checked("IBN")
def ibn(
    *,
    ratio: float = 0.5,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """IBN-a (Pan et al. 2018, https://arxiv.org/abs/1807.09441).

    Instance norm of the first ⌊ratio·C⌋ channels, batch norm of the rest; each with g and b of its
    own, and a population of the second part alone.
    """
    how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias}
    rest = batch_of(batch, eps=eps, axis_name=axis_name, **how)
    norms = [stateless(instance_parts)(eps=eps, **how), rest]

    def sized(site: Site) -> Norm:
        first = int(ratio * site.channels)
        if first == 0:
            given = f"ratio={ratio} of {site.channels} channels"
            raise invalid("IBN", given, "at least one of them", "use a larger ratio, or batch norm")
        return split(norms, (first, site.channels - first))

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        return sized(site).parts(params, state, site, train=train)

    two: Any = {"params": tuple_of(norms, MODULATED), "state": tuple_of(norms)}
    return made_of("IBN", lambda site: sized(site).init(site), parts, **two)


@checked("batch-channel norm")
def batch_channel(
    *,
    groups: int,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Batch-channel normalization (Qiao et al. 2019, https://arxiv.org/abs/1911.09738).

    Group norm of batch norm, each with g and b. In the paper's code those of the group norm are one
    for each group; here, as in its equations, one for each channel.
    """
    how: dict[str, Any] = {"eps": eps, "use_gain": use_gain, "use_bias": use_bias}
    first = batch_of(batch, axis_name=axis_name, **how)
    return chain([first, stateless(group_parts)(groups=groups, **how)])


def _centring(axis_name: AxisName | None, batch: Mapping[str, Any] | None, **own: bool) -> Norm:
    """Batch norm's μ and σ = 1; of one value too."""
    made = of_any_batch(batch_of(batch, axis_name=axis_name, **own))

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        found, state = made.parts(params, state, site, train=train)
        return found._replace(sigma=jnp.ones_like(found.sigma)), state

    return made_of("mean-only batch norm", made.init, parts)


@checked("mean-only batch norm")
def mean_only_batch(
    *,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = False,
    use_bias: bool = True,
) -> Norm:
    """Mean-only batch normalization (Salimans & Kingma 2016, section 4).

    h = a − μ + b: μ is the mean of each channel over the batch, in inference that of the
    population. σ is 1, not √(1 + ε).
    """
    return _centring(axis_name, batch, use_gain=use_gain, use_bias=use_bias)


@checked("weight and mean-only batch norm")
def weight_mean_only_batch(
    *,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Weight normalization with mean-only batch normalization (Salimans & Kingma 2016, section 4).

    h = g · (a − μ) / ‖w‖ + b, where μ is the batch's mean: the shift looks at the data, the scale
    at the weights.
    """
    shift, scale = _centring(axis_name, batch), weight_factory(**_BARE)
    return pair(shift, scale, use_gain=use_gain, use_bias=use_bias)


@checked("extended batch norm", about=one_of(Literal["channel", "all"], "a mean"))
def extended_batch(
    *,
    about: Literal["channel", "all"] = "channel",
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Extended batch normalization (Luo et al. 2020, https://arxiv.org/abs/2003.05569).

    h = g · (a − μ) / √(var + ε) + b: μ is that of each channel, var one number, the variance over
    examples, positions and channels. The abstract does not say about which mean: the `"channel"`'s
    own, or that of `"all"` values.

    In inference the variance is that of the population: with `"all"`, within the channels and
    between their means.
    """
    how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias}
    made = batch_of(batch, eps=eps, axis_name=axis_name, **how)
    made = made if about == "channel" else of_any_batch(made)

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        found, state = made.parts(params, state, site, train=train)
        axis = site.linear.channel_axis
        seen = found.sigma < jnp.finfo(found.sigma.dtype).max  # else nothing was measured
        square = jnp.square(jnp.where(seen, found.sigma, 1)).mean(axis, keepdims=True)
        if about == "all":
            square = square + found.mu.var(axis, keepdims=True)
        return found._replace(sigma=jnp.where(seen, jnp.sqrt(square), found.sigma)), state

    return made_of("extended batch norm", made.init, parts)
