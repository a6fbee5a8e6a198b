"""EvoNorms: norms that an evolution found, each with its activation (Liu et al. 2020).

    B0   h = g · a / max(√(var_B + ε), v·a + √(var_I + ε)) + b      var_B: batch, var_I: instance
    S0   h = g · sigmoid(v·a) · a / √(var_G + ε) + b                var_G: group
    S1   h = g · sigmoid(a) · a / √(var_G + ε) + b
    S2   h = g · sigmoid(a) · a / √(mean_G a² + ε) + b

Of B0 σ is measured on the value itself too; in the S series the gain is. No other activation
follows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import checked
from normlab._checks import check_values, gain_and_bias, no_mean, promote, promote_dtype
from normlab._sums import standard_deviation
from normlab._trees import node
from normlab._weights import aligned, leave_out
from normlab.batch import S, batch_parts
from normlab.devices.topology import AxisName
from normlab.equation import Affine, Parts, affine, init_affine
from normlab.errors import invalid
from normlab.example import instance_moments, one_in_each, spread_group_moments
from normlab.family.mixtures import batch_of
from normlab.making import applied, made_of
from normlab.measure import Algorithm, Moments
from normlab.sharded import OVER, ExampleAxes
from normlab.site import SHAPES, Norm, Site, State


@node
class Evolved(NamedTuple):
    """The params of EvoNorm B0 and S0: see `evo_b0_norm` and `evo_s0_norm`.

    Attributes:
      g: `[C]`, the gain, or `None`.
      b: `[C]`, the bias, or `None`.
      v: `[C]`, how steep the activation is.

    >>> from normlab import Site, get
    >>> params, _ = get("evo_b0").init(Site(jnp.ones((2, 4, 3))))
    >>> params.g.tolist(), params.b.tolist(), params.v.tolist()
    ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    """

    g: Array | None
    b: Array | None
    v: Array


@checked("EvoNorm", site=SHAPES)
def evolved_params(site: Site, *, use_gain: bool = True, use_bias: bool = True) -> Evolved:
    """`Evolved` of gains 1, biases 0 and v = 1."""
    dtype = promote_dtype(site.a)
    made = init_affine(site.channels, use_gain=use_gain, use_bias=use_bias, dtype=dtype)
    return Evolved(made.g, made.b, jnp.ones(site.channels, dtype))


def _steepness(where: str, params: Any, a: Array, channel: int) -> Array:
    if params is not None and not hasattr(params, "v"):
        given = f"params of type {type(params).__name__}"
        change = "take those of norm.init, modulated or not, or wrap yours: Evolved(g, b, v)"
        raise invalid(where, given, "params with a field v, or None", change)
    v = None if params is None else Affine(params.v, None)
    return gain_and_bias(where, v, a, channel)[0]


@checked("EvoNorm B0")
def evo_b0_parts(
    a: ArrayLike,
    params: Any = None,
    state: S = None,
    *,
    train: bool,
    eps: float = 1e-3,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
    **batch: Any,
) -> tuple[Parts, S]:
    """The parts and the next state of `evo_b0_norm`, which see.

    >>> a = jnp.arange(8.0).reshape(2, 2, 2)
    >>> parts, _ = evo_b0_parts(a, train=True)
    >>> parts.sigma.shape
    (2, 2, 2)
    """
    layout: dict[str, Any] = {"weights": weights, "channel_axis": channel_axis}
    how: dict[str, Any] = {"eps": eps, "algorithm": algorithm, **layout}
    check_positions(a, channel_axis)
    parts, state = batch_parts(a, None, state, train=train, **how, **batch)
    return _beside(parts.sigma, a, params, **how), state


@checked("EvoNorm B0")
def evo_b0_norm(
    a: ArrayLike,
    params: Any = None,
    state: S = None,
    *,
    train: bool,
    eps: float = 1e-3,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
    **batch: Any,
) -> tuple[Array, S]:
    """EvoNorm B0 (Liu et al. 2020, https://arxiv.org/abs/2004.02967), with its activation.

    h = g · a / max(√(var_B + ε), v·a + √(var_I + ε)) + b. var_B is that of the channel over the
    batch in training, and over the population in inference; var_I that of the channel of the
    example over its positions, always.

    The state and what is returned are those of `batch_norm`, which see. A population keeps the mean
    too: without it neither devices nor batches can be pooled exactly. timm's running variance is
    the unbiased one, `init_running(C, ddof=1)`; without its activation timm's norm does not
    normalize at all.

    Args:
      a: `[N, ..., C]`, with positions between examples and channels.
      params: `Evolved(g [C], b [C], v [C])`, or `None`: v = 1.
      state: As in `batch_norm`.
      train: As in `batch_norm`.
      eps: ε > 0, of both variances, in squared units of `a`.
      weights: As in `batch_norm`.
      channel_axis: The axis of the channels.
      algorithm: How the variances are taken, an `Algorithm`.
      **batch: `decay`, `axis_name`, `bad_batch` and `state_gradient` of `batch_norm`.

    Raises:
      ValueError: If `a` has no positions between examples and channels, or as `batch_norm`.

    >>> h, _ = evo_b0_norm(jnp.array([[[1.0], [3.0]], [[-3.0], [-1.0]]]), train=True)
    >>> (100 * h).round().ravel().tolist()
    [45.0, 75.0, -134.0, -45.0]
    """
    layout: dict[str, Any] = {"weights": weights, "channel_axis": channel_axis}
    options: dict[str, Any] = {"eps": eps, "algorithm": algorithm, **layout, **batch}
    parts, state = evo_b0_parts(a, params, state, train=train, **options)
    return affine(parts, a, **layout), state


def check_positions(a: ArrayLike, channel_axis: int) -> None:
    """Raises ValueError for one value per example and channel."""
    a, channel, _ = aligned("EvoNorm B0", a, None, channel_axis, by_example=True)
    one = all(n == 1 for i, n in enumerate(a.shape) if i not in (0, channel))
    change = "use batch norm and an activation, or EvoNorm S0, in a dense layer"
    check_values("EvoNorm B0", a.shape, one, "example and channel", change)


def _beside(
    sigma: Array,
    a: ArrayLike,
    params: Any,
    *,
    eps: float,
    weights: ArrayLike | None,
    channel_axis: int,
    algorithm: Algorithm = "auto",
) -> Parts:
    """B0's parts, of batch norm's σ."""
    where = "EvoNorm B0"
    m = instance_moments(a, weights=weights, channel_axis=channel_axis, algorithm=algorithm)
    a, channel, w = aligned(where, a, weights, channel_axis)
    g, b = gain_and_bias(where, params, a, channel)
    own = _steepness(where, params, a, channel) * promote(leave_out(a, w)) + m.sigma(eps)
    return Parts(no_mean(g.dtype), jnp.maximum(sigma, own), g, b)


@checked("EvoNorm B0")
def evo_b0(
    *,
    eps: float = 1e-3,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """`evo_b0_norm`; `batch` has the options of `get("batch")` that say what is kept, and how."""
    inner = batch_of(batch, eps=eps, axis_name=axis_name)

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        layout = {"weights": site.weights, "channel_axis": site.linear.channel_axis}
        check_positions(site.a, site.linear.channel_axis)
        found, state = inner.parts(None, state, site, train=train)
        return _beside(found.sigma, site.a, params, eps=eps, **layout), state

    def init(site: Site) -> tuple[Any, State]:
        jax.eval_shape(lambda a: check_positions(a, site.linear.channel_axis), site.a)
        params = evolved_params(site, use_gain=use_gain, use_bias=use_bias)
        return params, inner.init(site)[1]

    return made_of("EvoNorm B0", init, parts)


def _grouped(
    where: str,
    a: ArrayLike,
    groups: int,
    axis_name: ExampleAxes | None,
    weights: Any,
    channel_axis: int,
    algorithm: Any,
) -> tuple[Array, int, Array, Moments]:
    """`a`, its channels' axis, sigmoid's argument before v, and the moments of the groups."""
    how: Any = {"axis_name": axis_name, "weights": weights, "algorithm": algorithm}
    m = spread_group_moments(where, a, groups, channel_axis=channel_axis, **how)
    a, channel, weights = aligned(where, a, weights, channel_axis)
    one = one_in_each(where, a.shape, groups, axis_name)
    check_values(where, a.shape, one, "example and group", "use fewer groups, or batch norm")
    return a, channel, promote(leave_out(a, weights)), m


@checked("EvoNorm S0", axis_name=OVER)
def evo_s0_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    groups: int,
    eps: float = 1e-5,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Parts:
    """The parts of `evo_s0_norm`, which see.

    >>> print(evo_s0_parts(jnp.array([[1.0, 3.0], [5.0, 9.0]]), groups=1).sigma.round(2))
    [[1. 1.]
     [2. 2.]]
    """
    where = "EvoNorm S0"
    a, channel, x, m = _grouped(where, a, groups, axis_name, weights, channel_axis, algorithm)
    g, b = gain_and_bias(where, params, a, channel)
    gate = jax.nn.sigmoid(_steepness(where, params, a, channel) * x)
    return Parts(no_mean(g.dtype), m.sigma(eps), g * gate, b)


@applied(evo_s0_parts)
def evo_s0_norm() -> None:
    """EvoNorm S0 (Liu et al. 2020, https://arxiv.org/abs/2004.02967), with its activation.

    h = g · sigmoid(v·a) · a / √(var_G + ε) + b: var_G is the variance that group norm divides by,
    whose mean is not taken off.

    The other arguments are those of `group_norm`, which see.

    Args:
      params: `Evolved(g [C], b [C], v [C])`, or `None`: v = 1.
      groups: The number of groups; divides `C`. The paper has 32.

    >>> (100 * evo_s0_norm(jnp.array([[1.0, -1.0]]), groups=1)).round().tolist()
    [[73.0, -27.0]]
    """


@checked("EvoNorm S1", axis_name=OVER)
def evo_s1_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Parts:
    """The parts of `evo_s1_norm`, which see.

    >>> print(evo_s1_parts(jnp.array([[1.0, 3.0], [5.0, 9.0]]), groups=1).sigma.round(2))
    [[1. 1.]
     [2. 2.]]
    """
    where = "EvoNorm S1"
    a, channel, x, m = _grouped(where, a, groups, axis_name, weights, channel_axis, algorithm)
    g, b = gain_and_bias(where, params, a, channel)
    return Parts(no_mean(g.dtype), m.sigma(eps), g * jax.nn.sigmoid(x), b)


@applied(evo_s1_parts)
def evo_s1_norm() -> None:
    """EvoNorm S1 (Liu et al. 2020): `evo_s0_norm`, which see, with v = 1 for good; so is timm's.

    h = g · silu(a) / √(var_G + ε) + b.

    >>> (100 * evo_s1_norm(jnp.array([[1.0, -1.0]]), groups=1)).round().tolist()
    [[73.0, -27.0]]
    """


@checked("EvoNorm S2", axis_name=OVER)
def evo_s2_parts(
    a: ArrayLike,
    params: Affine | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    algorithm: Algorithm = "auto",
) -> Parts:
    """The parts of `evo_s2_norm`, which see.

    >>> import numpy as np
    >>> a = jnp.array([[1.0, 3.0], [5.0, 9.0]])
    >>> print(np.asarray(evo_s2_parts(a, groups=1).sigma).round(2))
    [[2.24 2.24]
     [7.28 7.28]]
    """
    where = "EvoNorm S2"
    a, channel, x, m = _grouped(where, a, groups, axis_name, weights, channel_axis, algorithm)
    g, b = gain_and_bias(where, params, a, channel)
    sigma = standard_deviation(m.var() + jnp.square(m.mean), m.count, eps)
    return Parts(no_mean(g.dtype), sigma, g * jax.nn.sigmoid(x), b)


@applied(evo_s2_parts)
def evo_s2_norm() -> None:
    """EvoNorm S2 (Liu et al. 2020): as `evo_s1_norm`, which see, about zero.

    h = g · silu(a) / √(mean_G a² + ε) + b.

    >>> (100 * evo_s2_norm(jnp.array([[3.0, 4.0]]), groups=1)).round().tolist()
    [[81.0, 111.0]]
    """
