"""Norms that measure on the value itself: dynamic tanh, Derf, DyISRU, and any φ.

h = g · φ(u) + b, where u = α·a + s. With σ = u/φ(u), a scale that each value measures for itself,
this is the equation of every norm: h = (g·α) · a/σ + (b + g·s/σ). σ is 1/φ'(0) at 0 and grows with
|u| where φ saturates. α is learned with g and b, and so is the shift s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import a_function, checked, declare, either, number, one_of, real
from normlab._checks import gain_and_bias, no_mean, promote, promote_dtype
from normlab._trees import node
from normlab._weights import aligned, leave_out
from normlab.equation import Affine, Parts, init_affine
from normlab.errors import invalid
from normlab.making import applied, stateless
from normlab.sharded import OVER, ExampleAxes, channels_in_all, shared
from normlab.site import SHAPES, Norm, Site

Phi = Literal["tanh", "erf", "isru", "hardtanh", "softsign"]
"""What a value goes through. `"isru"` is u/√(1 + u²), `"softsign"` u/(1 + |u|)."""

declare(
    phi=either(
        "'tanh', 'erf', 'isru', 'hardtanh', 'softsign', or a function of one value",
        "use one of these, or an elementwise function of jax.numpy that keeps the sign, as arctan",
        one_of(Phi, ""),
        a_function(of=1),
    ),
)
_KINDS: dict[str, Any] = {"alpha": real, "shift": real}
_POSITIVE = number("a positive number", "pass for example beta=64.0", lambda v: 0 < v < math.inf)


@node
class Dynamic(NamedTuple):
    """The params of a norm of single values, h = g · φ(α·a + s) + b: see `pointwise_norm`.

    Attributes:
      g: `[C]`, the gain, or `None`.
      b: `[C]`, the bias, or `None`.
      alpha: `[]` or `[C]`, the factor of a, in units of 1/a.
      shift: `[]` or `[C]`, what is added to α·a; `None` for 0.

    >>> from normlab import Site, get
    >>> params, _ = get("dyt").init(Site(jnp.ones((2, 3))))
    >>> params.g.tolist(), params.alpha.item(), params.shift
    ([1.0, 1.0, 1.0], 0.5, None)
    """

    g: Array | None
    b: Array | None
    alpha: Array
    shift: Array | None = None


def _series(phi: Callable[[Array], Array], *series: float) -> Callable[[Array], Array]:
    """u/φ(u) of an odd φ, of which the first terms of the power series in u² are given."""

    def ratio(u: Array) -> Array:
        near, large = _near_zero(u)
        square = jnp.square(jnp.where(near, u, 0))
        powers = functools.reduce(lambda total, c: total * square + c, reversed(series))
        return jnp.where(near, powers, large / phi(large))

    return ratio


def _quadrature(phi: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """u/φ(u) of any φ: 1 over the mean of φ' between 0 and u, near 0 by Gauss's three places."""

    def ratio(u: Array) -> Array:
        near, large = _near_zero(u)
        small, ones = jnp.where(near, u, 0), jnp.ones_like(u)
        slope = [
            jax.jvp(phi, (place * small,), (ones,))[1] for place in (0.5 - far, 0.5, 0.5 + far)
        ]
        return jnp.where(
            near, 18 / (5 * slope[0] + 8 * slope[1] + 5 * slope[2]), large / phi(large)
        )

    far = math.sqrt(0.15)
    return ratio


def _near_zero(u: Array) -> tuple[Array, Array]:
    """Where u²'s fourth power is nothing beside 1; and u elsewhere."""
    near = jnp.abs(u) < jnp.finfo(u.dtype).eps ** (1 / 8)
    return near, jnp.where(near, 1, u)


def _isru(u: Array) -> Array:
    """√(1 + u²), of which no square overflows."""
    size = jnp.abs(u)
    return jnp.where(size > 1e9, size, jnp.sqrt(1 + jnp.square(jnp.where(size > 1e9, 0, u))))


_ROOT = math.sqrt(math.pi) / 2
_RATIO: dict[str, Callable[[Array], Array]] = {
    "tanh": _series(jnp.tanh, 1, 1 / 3, -1 / 45, 2 / 945, -1 / 4725),
    "erf": _series(lax.erf, _ROOT, _ROOT / 3, _ROOT / 90, -11 * _ROOT / 1890, 29 * _ROOT / 113400),
    "isru": _isru,
    "hardtanh": lambda u: jnp.maximum(1, jnp.abs(u)),
    "softsign": lambda u: 1 + jnp.abs(u),
}
"""σ = u/φ(u), with derivatives that lose no digit near 0."""


@checked("pointwise norm")
def pointwise_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    phi: Phi | Callable[[Array], Array] = "tanh",
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `pointwise_norm`, which see.

    >>> a = jnp.array([[0.5, 2.0]])
    >>> import numpy as np
    >>> print(np.asarray(a / pointwise_parts(a, phi="tanh").sigma).round(3))
    [[0.462 0.964]]
    """
    where = "pointwise norm"
    a, channel, weights = aligned(where, a, weights, channel_axis)
    if params is not None and not hasattr(params, "alpha"):
        given = f"params of type {type(params).__name__}"
        change = "take those of norm.init, modulated or not, or wrap yours: Dynamic(g, b, alpha)"
        raise invalid(where, given, "params with a field alpha, or None", change)
    g, b = gain_and_bias(where, params, a, channel)
    scales = None if params is None else Affine(params.alpha, getattr(params, "shift", None))
    alpha, shift = gain_and_bias(where, scales, a, channel)
    u = alpha * promote(leave_out(a, weights)) + shift
    sigma = (_RATIO[phi] if isinstance(phi, str) else _quadrature(phi))(u)
    if scales is not None and scales.b is not None:
        b = b + g * shift / sigma
    return Parts(no_mean(g.dtype), sigma, g * alpha, b)


@applied(pointwise_parts)
def pointwise_norm() -> None:
    """A norm of each value by itself: h = g · φ(α·a + s) + b.

    Its scale is σ = u/φ(u) with u = α·a + s: nothing is measured across values, and a large value
    is divided by its own size. All derivatives are right at 0 and where φ is saturated.

    Args:
      a: `[N, ..., C]`.
      params: `Dynamic(g [C], b [C], alpha [], shift [])`, or `None`: φ(a).
      phi: φ, a `Phi`, or a function of one value that jax can differentiate, applied to each; it
        keeps the sign of u: φ(0) = 0 and φ'(0) > 0.
      weights: Changes nothing; a value that weighs nothing and is not finite reaches no gradient.
      channel_axis: The axis of the channels.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: For parameters that do not fit `a` or have no alpha.

    >>> pointwise_norm(jnp.array([0.0, 1.0, 1e6]), phi="softsign").round(3).tolist()
    [0.0, 0.5, 1.0]
    """


@checked("DyT")
def dyt_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `dyt_norm`, which see.

    >>> a = jnp.array([[0.5, 2.0]])
    >>> import numpy as np
    >>> print(np.asarray(a / dyt_parts(a).sigma).round(3))  # tanh(a), before α is learned
    [[0.462 0.964]]
    """
    return pointwise_parts(a, params, phi="tanh", weights=weights, channel_axis=channel_axis)


@applied(dyt_parts)
def dyt_norm() -> None:
    """Dynamic tanh (Zhu et al. 2025, https://arxiv.org/abs/2503.10622): h = g · tanh(α·a) + b.

    σ = αa/tanh(αa). α is one number, which starts at 0.5; in language models the paper has another
    start for attention and for the rest, by width.

    The arguments are those of `pointwise_norm`, which see.

    >>> dyt_norm(jnp.array([0.0, 100.0]), Dynamic(None, None, jnp.float32(0.5))).tolist()
    [0.0, 1.0]
    """


@checked("Derf")
def derf_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `derf_norm`, which see.

    >>> a = jnp.array([[0.5, 2.0]])
    >>> import numpy as np
    >>> print(np.asarray(a / derf_parts(a).sigma).round(3))
    [[0.52  0.995]]
    """
    return pointwise_parts(a, params, phi="erf", weights=weights, channel_axis=channel_axis)


@applied(derf_parts)
def derf_norm() -> None:
    """Dynamic erf (Chen et al. 2025, https://arxiv.org/abs/2512.10938): h = g · erf(α·a + s) + b.

    σ = u/erf(u) with u = α·a + s. α and s are numbers, which start at 0.5 and 0.

    The arguments are those of `pointwise_norm`, which see.

    >>> derf_norm(jnp.array([0.0, 100.0]), Dynamic(None, None, jnp.float32(0.5))).tolist()
    [0.0, 1.0]
    """


@checked("DyISRU", axis_name=OVER)
def dyisru_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `dyisru_norm`, which see.

    >>> print(dyisru_parts(jnp.array([[0.5, 2.0]])).sigma.round(3))
    [[1.118 2.236]]
    """
    parts = pointwise_parts(a, params, phi="isru", weights=weights, channel_axis=channel_axis)
    shared("DyISRU", axis_name, channels=True, positions=False)  # says no where it is not mapped
    channels = channels_in_all(axis_name, jnp.shape(a)[channel_axis])
    return parts._replace(g=parts.g * math.sqrt(channels))


@applied(dyisru_parts)
def dyisru_norm() -> None:
    """Dynamic inverse square root unit (Stollenwerk 2025, https://arxiv.org/abs/2503.21708).

    h = g · √C · a / √(β + a²) + b: RMS norm with a learned β for the energy of the other channels.
    Kept is α with β = 1/α², so that β stays positive: √C · αa/√(1 + (αa)²).

    The other arguments are those of `pointwise_norm`, which see.

    Args:
      axis_name: As in `layer_norm`: nothing is measured, but C counts the channels of all devices.

    >>> h = dyisru_norm(jnp.array([[3.0, 0.0]]), Dynamic(None, None, jnp.float32(0.25)))
    >>> (100 * h).round().tolist()
    [[85.0, 0.0]]
    """


@checked("params", site=SHAPES, **_KINDS)
def dynamic_params(
    site: Site,
    *,
    alpha: float = 0.5,
    shift: float | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Dynamic:
    """`Dynamic` of gains 1, biases 0, one α and, unless it is `None`, one shift."""
    dtype = promote_dtype(site.a)
    made = init_affine(site.channels, use_gain=use_gain, use_bias=use_bias, dtype=dtype)
    kept = None if shift is None else jnp.full((), shift, dtype)
    return Dynamic(made.g, made.b, jnp.full((), alpha, dtype), kept)


pointwise = stateless(pointwise_parts, dynamic_params)
"""`pointwise_norm`, with `Dynamic` params."""


@checked("DyT", alpha=real)
def dyt(*, alpha: float = 0.5, use_gain: bool = True, use_bias: bool = True) -> Norm:
    """`dyt_norm`; `alpha` is where α starts."""
    return pointwise(phi="tanh", alpha=alpha, use_gain=use_gain, use_bias=use_bias)


@checked("Derf", **_KINDS)
def derf(
    *, alpha: float = 0.5, shift: float = 0.0, use_gain: bool = True, use_bias: bool = True
) -> Norm:
    """`derf_norm`; `alpha` and `shift` are where α and s start."""
    how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias}
    return pointwise(phi="erf", alpha=alpha, shift=shift, **how)


@checked("DyISRU", beta=_POSITIVE, axis_name=OVER)
def dyisru(
    *,
    beta: float | None = None,
    axis_name: ExampleAxes | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """`dyisru_norm`; `beta` is where β starts, by default at C: that of channels of variance 1."""

    def params(site: Site) -> Dynamic:
        channels = channels_in_all(axis_name, site.channels)
        alpha = 1 / math.sqrt(channels if beta is None else beta)
        return dynamic_params(site, alpha=alpha, use_gain=use_gain, use_bias=use_bias)

    return stateless(dyisru_parts, params)(axis_name=axis_name)
