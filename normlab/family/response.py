"""Norms of filter responses: FRN with its TLU, GRN, and SeeDNorm's gain, measured from the input.

FRN        h = max(g · a/√(ν² + ε) + b, τ)        ν²: mean a² over positions
GRN        h = a + g · N · a + b                  N: ‖a‖ over positions, beside the mean channel's
SeeDNorm   h = (g + tanh(a·β) · α) · a/√(mean a² + ε) + b
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import array, checked, declare, flag, real
from normlab._checks import gain_and_bias, no_mean, promote, promote_dtype, result_dtype
from normlab._sums import standard_deviation
from normlab._trees import node
from normlab._units import safe_sqrt
from normlab._weights import aligned, leave_out
from normlab.equation import Affine, Parts, init_affine
from normlab.errors import invalid
from normlab.example import mean_square, rms_parts
from normlab.making import applied, norm_of
from normlab.sharded import (
    OVER,
    ExampleAxes,
    Sharded,
    averaged,
    shared,
    sharers,
    summed,
    where_bound,
)
from normlab.site import SHAPES, Norm, Site

declare(learned_eps=flag())
TAU = array("a threshold for each channel, [C]", "pass an array, such as params.tau")


@node
class Response(NamedTuple):
    """The params of FRN, h = max(g · a/√(ν² + ε + |ε_l|) + b, τ): see `frn_norm`.

    Attributes:
      g: `[C]`, the gain, or `None`.
      b: `[C]`, the bias, or `None`.
      tau: `[C]`, TLU's threshold τ; `None` for no TLU.
      eps: `[]` or `[C]`, what |·| of is added to ε; `None` for nothing.

    >>> from normlab import Site, get
    >>> params, _ = get("frn").init(Site(jnp.ones((2, 4, 3))))
    >>> params.tau.tolist(), params.eps
    ([0.0, 0.0, 0.0], None)
    """

    g: Array | None
    b: Array | None
    tau: Array | None
    eps: Array | None = None


@checked("TLU", tau=TAU)
def tlu(h: ArrayLike, tau: ArrayLike, *, channel_axis: int = -1) -> Array:
    """The thresholded linear unit (Singh & Krishnan 2019, section 3.1.1): max(h, τ).

    A ReLU whose corner is learned: ReLU(h − τ) + τ.

    Args:
      h: `[N, ..., C]`.
      tau: `[C]` or `[]`, τ.
      channel_axis: The axis of the channels.

    Returns:
      max(h, τ), in the shape and floating type of `h`.

    Raises:
      ValueError: If τ does not fit `h`.

    >>> tlu(jnp.array([[-2.0, 3.0]]), jnp.array([-1.0, 0.0])).tolist()
    [[-1.0, 3.0]]
    """
    h, channel, _ = aligned("TLU", h, None, channel_axis)
    tau, _ = gain_and_bias("TLU", Affine(jnp.asarray(tau), None), h, channel)
    return jnp.maximum(promote(h), tau).astype(result_dtype(h))


@checked("FRN", axis_name=OVER)
def frn_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    eps: float = 1e-6,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `frn_norm`, which see: below τ the gain is 0 and the bias τ.

    >>> print(frn_parts(jnp.array([[[1.0], [7.0]]])).sigma.round(2))
    [[[5.]]]
    """
    where = "FRN"
    a, channel, weights = aligned(where, a, weights, channel_axis, by_example=True)
    g, b = gain_and_bias(where, params, a, channel)
    learned, tau = (getattr(params, name, None) for name in ("eps", "tau"))
    positions = [i for i in range(1, a.ndim) if i != channel]
    over = shared(where, axis_name, channels=False, positions=True)
    one = learned is None and all(a.shape[i] == 1 for i in positions)
    one = one and sharers(where, over) == 1
    change = "use learned_eps=True, as the paper does there, or RMS norm in a dense layer"
    if one:
        given = f"an input of shape {a.shape}, one value per example and channel"
        raise invalid(where, given, "several positions: of one value h is ±g + b", change)
    how: dict[str, Any] = {"axis_name": over, "weights": weights, "channel_axis": channel}
    square, count = mean_square(where, a, positions, **how)
    if learned is not None:
        square = square + jnp.abs(gain_and_bias(where, Affine(learned, None), a, channel)[0])
    sigma = standard_deviation(square, count, eps)
    if tau is not None:
        tau, _ = gain_and_bias(where, Affine(tau, None), a, channel)
        above = g * (promote(leave_out(a, weights)) / sigma) + b > tau
        g, b = jnp.where(above, g, 0), jnp.where(above, b, tau)
    return Parts(no_mean(g.dtype), sigma, g, b)


@applied(frn_parts)
def frn_norm() -> None:
    """Filter response normalization with TLU (Singh & Krishnan 2019).

    h = max(g · a/√(ν² + ε + |ε_l|) + b, τ), https://arxiv.org/abs/1911.09737: ν² is the mean of the
    squares of a channel of an example over its positions. The activation is part of it: above τ h
    is a norm like any other, below it g is 0 and b is τ.

    timm's squares are taken in the input's own type, which in float16 overflows beyond 255; it has
    no ε_l. Here they are taken in float32 at least.

    Args:
      a: `[N, ..., C]`, with positions between examples and channels.
      params: `Response(g [C], b [C], tau [C], eps [])`, or `None`. Without `tau` there is no TLU;
        without `eps` no ε_l.
      eps: ε > 0, in squared units of `a`.
      axis_name: Mapped axes along which the positions lie, as in `layer_norm`.
      weights: Importance of examples or positions, aligned with the leading axes of `a` other than
        the channels'. Zero leaves out.
      channel_axis: The axis of the channels.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: For one position per example without ε_l, parameters that do not fit `a`, or
        ε ≤ 0.

    >>> h = frn_norm(jnp.array([[[3.0], [-4.0]]]), Response(None, None, jnp.zeros(1)))
    >>> (100 * h).round().ravel().tolist()
    [85.0, 0.0]
    """


@checked("FRN", site=SHAPES, learned_eps=flag())
def frn_params(
    site: Site, *, learned_eps: bool = False, use_gain: bool = True, use_bias: bool = True
) -> Response:
    """`Response` of gains 1, biases 0, thresholds 0 and, if it is learned, ε_l = 1e-4."""
    dtype, channels = promote_dtype(site.a), site.channels
    made = init_affine(channels, use_gain=use_gain, use_bias=use_bias, dtype=dtype)
    eps = jnp.full((), 1e-4, dtype) if learned_eps else None
    return Response(made.g, made.b, jnp.zeros(channels, dtype), eps)


@checked("GRN", axis_name=OVER)
def grn_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    eps: float = 1e-6,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `grn_norm`, which see.

    >>> a = jnp.array([[[3.0, 1.0], [4.0, 0.0]]])
    >>> parts = grn_parts(a)
    >>> parts.sigma.shape, parts.g.shape
    ((), (1, 1, 2))
    """
    where = "GRN"
    a, channel, weights = aligned(where, a, weights, channel_axis, by_example=True)
    g, b = gain_and_bias(where, params, a, channel)
    x = promote(a) if weights is None else jnp.where(weights > 0, promote(a), 0)
    square = jnp.square(x) if weights is None else weights * jnp.square(x)
    square = square.sum([i for i in range(1, a.ndim) if i != channel], keepdims=True)
    if axis_name is not None and not isinstance(axis_name, Sharded):
        expected = "whether channels or positions lie along it"
        change = "pass axis_name=Sharded(channels=...) or axis_name=Sharded(positions=...)"
        raise invalid(where, f"axis_name={axis_name!r}", expected, change)
    by_position, by_channel = (
        shared(where, axis_name, channels=not of_positions, positions=of_positions)
        for of_positions in (True, False)
    )
    (square,) = summed(where, by_position, square)
    length = safe_sqrt(square)
    mean, number = length.mean(channel, keepdims=True), jnp.ones((), length.dtype)
    mean, *_ = averaged(where, by_channel, mean, number, weighted=False)
    ratio = length / (mean + eps)
    return Parts(no_mean(g.dtype), jnp.ones((), g.dtype), 1 + g * ratio, b)


@applied(grn_parts)
def grn_norm() -> None:
    """Global response normalization (Woo et al. 2023, https://arxiv.org/abs/2301.00808).

    h = a + g · N·a + b, with N = G/(mean of G over the channels + ε) and G_c = √(Σ a_c²) over the
    positions of an example. Nothing is divided by a scale: N tells how loud a channel is beside the
    others, and is measured into the gain 1 + g·N. With g = b = 0, where the paper starts, h is a.

    In the paper's code the sparse form, for masked pre-training, sums over the positions of all
    examples in the batch; here as in its dense form and in the paper over those of each.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`: 1 and 0.
      eps: ε > 0, in units of `a`.
      axis_name: A `Sharded`, that says along which mapped axes channels and positions lie. Lengths
        are added up over those of the positions, their mean is taken over those of the channels.
      weights: Importance of positions, aligned with the leading axes of `a` other than the
        channels'. Zero leaves out.
      channel_axis: The axis of the channels.

    Returns:
      h, in the shape and floating type of `a`. A channel of zeros has a derivative.

    Raises:
      ValueError: For parameters that do not fit `a`, or ε ≤ 0.

    >>> (100 * grn_norm(jnp.array([[[3.0, 1.0]]]))).round().tolist()
    [[[750.0, 150.0]]]
    """


@checked("GRN", site=SHAPES)
def grn_params(site: Site, *, use_gain: bool = True, use_bias: bool = True) -> Affine:
    """`Affine` of zeros: the identity."""
    dtype = promote_dtype(site.a)
    return init_affine(site.channels, g=0, use_gain=use_gain, use_bias=use_bias, dtype=dtype)


@node
class Rescaled(NamedTuple):
    """The params of SeeDNorm, whose gain is g + tanh(a·β)·α: see `seed_norm`.

    Attributes:
      g: `[C]`, the paper's γ, or `None` for 1.
      b: `[C]`, a bias, or `None`.
      alpha: `[C]`, α, how much of the gain the input makes.
      beta: `[C]`, β, in units of 1/a.

    >>> from normlab import Site, get
    >>> params, _ = get("seed").init(Site(jnp.ones((2, 3))))
    >>> params.alpha.tolist(), params.beta.tolist()        # β = 0: RMS norm at first
    ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    """

    g: Array | None
    b: Array | None
    alpha: Array
    beta: Array


@checked("SeeDNorm", axis_name=OVER)
def seed_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    eps: float = 1e-5,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `seed_norm`, which see.

    >>> print(seed_parts(jnp.array([[[3.0, 4.0], [0.0, 0.0]]])).sigma.round(2))
    [[[3.54]
      [0.  ]]]
    """
    where = "SeeDNorm"
    if params is None:
        how: dict[str, Any] = {"weights": weights, "channel_axis": channel_axis}
        return rms_parts(a, None, eps=eps, axis_name=axis_name, **how)
    if not (hasattr(params, "alpha") and hasattr(params, "beta")):
        given = f"params of type {type(params).__name__}"
        change = "take those of norm.init, modulated or not, or make Rescaled(g, b, alpha, beta)"
        raise invalid(where, given, "params with the fields alpha and beta, or None", change)
    a, channel, weights = aligned(where, a, weights, channel_axis)
    alpha, _ = gain_and_bias(where, Affine(params.alpha, None), a, channel)
    beta, _ = gain_and_bias(where, Affine(params.beta, None), a, channel)
    g, b = gain_and_bias(where, params, a, channel)
    over = shared(where, axis_name, channels=True, positions=False)
    seen = (promote(leave_out(a, weights)) * beta).sum(channel, keepdims=True)
    square = mean_square(where, a, (channel,), weights=weights, channel_axis=channel)
    more: dict[str, Any] = {"weighted": weights is not None}
    square, count, seen = averaged(where, over, *square, seen, **more)
    sigma = standard_deviation(square, count, eps)
    return Parts(no_mean(g.dtype), sigma, g + jnp.tanh(seen) * alpha, b)


@applied(seed_parts)
def seed_norm() -> None:
    """Self-rescaled dynamic normalization, SeeDNorm (Cai et al. 2026).

    h = (g + tanh(Σ_c a_c·β_c) · α) · a/√(mean a² + ε) + b, https://arxiv.org/abs/2510.22777: RMS
    norm over the channels of a position, whose gain sees the size that the norm takes away.

    Args:
      a: `[N, ..., C]`.
      params: `Rescaled(g [C], b, alpha [C], beta [C])`, or `None`: RMS norm.
      eps: ε > 0, in squared units of `a`.
      axis_name: As in `layer_norm`.
      weights: As in `rms_norm`.
      channel_axis: The axis of the channels.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: For parameters that do not fit `a` or have no alpha and beta, or ε ≤ 0.

    >>> one = jnp.ones(2)
    >>> h = seed_norm(jnp.array([[3.0, 4.0]]), Rescaled(one, None, one, one))
    >>> (100 * h).round().tolist()
    [[170.0, 226.0]]
    """


@checked("SeeDNorm", site=SHAPES, alpha=real)
def seed_params(
    site: Site, *, alpha: float = 1.0, use_gain: bool = True, use_bias: bool = False
) -> Rescaled:
    """`Rescaled` of gains 1, β = 0, with which it starts as RMS norm, and one α for all."""
    dtype, channels = promote_dtype(site.a), site.channels
    made = init_affine(channels, use_gain=use_gain, use_bias=use_bias, dtype=dtype)
    return Rescaled(made.g, made.b, jnp.full(channels, alpha, dtype), jnp.zeros(channels, dtype))


@checked("FRN", axis_name=OVER)
def frn(
    *,
    eps: float = 1e-6,
    axis_name: ExampleAxes | None = None,
    learned_eps: bool = False,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """`frn_norm` with TLU; `learned_eps` adds an |ε_l| that starts at 1e-4."""
    how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias}
    made = functools.partial(frn_params, learned_eps=learned_eps, **how)

    def measure(site: Site, params: Any, over: ExampleAxes | None = axis_name) -> Parts:
        params = made(site) if params is None else params
        layout = {"weights": site.weights, "channel_axis": site.linear.channel_axis}
        return frn_parts(site.a, params, eps=eps, axis_name=over, **layout)

    def first(site: Site, params: Any) -> Parts:
        return measure(site, params, where_bound(axis_name))

    return norm_of("FRN", measure, made, first)
