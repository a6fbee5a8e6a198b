"""Spectral norm: μ = 0, σ = uᵀWv, the largest singular value of W as power iteration has it.

W is the kernel as a matrix `[K, C]`, or the linear map itself: its window, strides and padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import RESTORE, checked, declare, flag, instance, integer, number, one_of
from normlab._checks import kernel, promote, promote_dtype
from normlab._trees import node
from normlab._xla import zeros_of
from normlab.equation import Affine, Parts
from normlab.errors import invalid
from normlab.gains import Gain
from normlab.linear import Dense, Linear
from normlab.making import initial_affine
from normlab.maps import (
    INPUT,
    SHAPED_KERNEL,
    Mapped,
    WeightMap,
    mapped_kernel,
    mapped_parts,
    weight_map,
)
from normlab.site import Site, State

Of = Literal["matrix", "map"]
"""What spectral norm bounds: the kernel as a matrix, or the linear map of one example."""

First = Literal["v", "u"]
"""Which vector a step of power iteration renews first, from the other."""

S = TypeVar("S")


@node
class Spectral(NamedTuple):
    """The singular vectors of the largest singular value, as far as power iteration has come.

    Attributes:
      u: On the side of the outputs: `[C]`; of a map, one example of its output `[1, ..., C]`.
      v: On the side of the inputs: `[..., K]`, the kernel's shape without its units; of a map, one
        example of its input. Zero before the first step.

    >>> w = jnp.diag(jnp.array([3.0, 1.0]))
    >>> h, state = spectral_norm(w, None, init_spectral(w), train=True)
    >>> (state.v @ w @ state.u).round(2).item(), state.u.shape
    (3.0, (2,))
    """

    u: Array
    v: Array


declare(
    of=one_of(Of, "'matrix' or 'map'"),
    first=one_of(First, "'v' or 'u'"),
    warm=integer("a number of steps, at least 0", "pass 15, or 0 for none", 0),
    bound=number("a positive number", "pass for example bound=0.95", lambda v: 0 < v < math.inf),
    through=flag(),
)
STEPS = integer("a number of steps, at least 1", "pass 1", 1)
_STATE = instance(Spectral, "take it from init_spectral or from the last call")
_MAPPED = {"steps": STEPS, "state": _STATE}
_WHERE = "spectral norm"


@checked(_WHERE, w=SHAPED_KERNEL, x=INPUT)
def init_spectral(
    w: Any,
    *,
    warm: int = 15,
    of: Of = "matrix",
    linear: Linear = Dense(),  # noqa: B008
    x: Any = None,
) -> Spectral:
    """Returns the state of `spectral_norm`: random numbers of a fixed key, and `warm` steps.

    Where w has only a shape, or is zero, no step can be made: then v = 0, and the first training
    call makes the `warm` steps, as does inference before it, which keeps nothing.

    Args:
      w: `[..., K, C]`, the kernel; `x` and the others as in `spectral_norm`.
      warm: The number of steps.
      of: What is bounded.
      linear: The layer.
      x: Its input.

    >>> jnp.abs(init_spectral(jnp.diag(jnp.array([3.0, 1.0]))).u).round(3).tolist()
    [1.0, 0.0]
    """
    dtype, shapes = promote_dtype(w), _shapes(w, linear, x, of)
    u = jax.random.normal(jax.random.key(0), shapes.u, jnp.float32).astype(dtype)
    state = Spectral(_direction(u, u), jnp.zeros(shapes.v, dtype))
    if isinstance(w, jax.ShapeDtypeStruct) or warm == 0:
        return state
    forward, back = _operator(lax.stop_gradient(promote(w)), linear, x, of)
    return _iterated(forward, back, _alike(state, forward, back), warm)


@checked(_WHERE, **_MAPPED, x=INPUT)
def spectral_norm(
    w: ArrayLike,
    params: Affine | None = None,
    state: S = None,
    *,
    train: bool,
    steps: int = 1,
    warm: int = 15,
    bound: float | None = None,
    through: bool = True,
    first: First = "v",
    of: Of = "matrix",
    linear: Linear = Dense(),  # noqa: B008
    x: Any = None,
) -> tuple[Array, S]:
    """Spectral normalization (Miyato et al. 2018, https://arxiv.org/abs/1802.05957).

    w' = g · w / σ̂ with σ̂ = uᵀWv ≤ σ, the largest singular value of W. Each training call makes
    steps of power iteration before, v ← Wᵀu/‖Wᵀu‖ and u ← Wv/‖Wv‖, without a gradient. Inference
    makes none: it takes u and v as they are, and the W of the call.

    With `of="map"` W is the linear map of one example at the size of x, with its strides and its
    padding (Gouk et al. 2018, https://arxiv.org/abs/1804.04368). It is that map that has norm 1
    then; the matrix `[K, C]` of a convolution's kernel does not bound it: the map's norm can be
    the root of the window's size larger.

    w = 0 stays 0. A NaN in w leaves u and v as they were.

    Args:
      w: `[..., K, C]`, a kernel with its units last.
      params: `Affine(g, None)`; `None` for 1. A bias is the layer's.
      state: `Spectral` from `init_spectral`; `None` for a new one in each call, which is not kept.
      train: Whether to make steps and take them into the state.
      steps: Their number.
      warm: The number in the first training call where the state has made none: see
        `init_spectral`.
      bound: c, for w / max(1, σ̂/c), which leaves a shorter w as it is (Liu et al. 2020, SNGP,
        https://arxiv.org/abs/2006.10108).
      first: What a step renews first: the paper's v, or u, as torch's parametrization does.
      through: Whether the gradient flows through σ̂, as in the paper, u and v being constant.
        Without, σ̂ is a number.
      of: What is bounded, `"matrix"` or `"map"`.
      linear: The layer, for the map.
      x: Its input, for the map; the shape will do.

    Returns:
      `(w', state)`: w' in the shape and floating type of `w`; u and v are float32 at least.

    Raises:
      ValueError: For a state of another shape (a map has one size of input), or a map without x.

    >>> w, state = jnp.diag(jnp.array([3.0, 1.0])), None
    >>> spectral_norm(w, train=False)[0].round(3).tolist()
    [[1.0, 0.0], [0.0, 0.3330000042915344]]
    """
    wide = promote(w)
    begun = init_spectral(wide, warm=warm, of=of, linear=linear, x=x) if state is None else state
    how: dict[str, Any] = {"steps": steps, "warm": warm, "bound": bound, "through": through}
    how["first"] = first
    mapped, after = measure_spectral(wide, begun, linear=linear, x=x, train=train, of=of, **how)
    return mapped_kernel(_WHERE, mapped, w, params), None if state is None else after  # pyright: ignore


@checked(_WHERE, **_MAPPED)
def spectral_parts(
    site: Site,
    params: Affine | None = None,
    state: S = None,
    *,
    train: bool,
    steps: int = 1,
    warm: int = 15,
    bound: float | None = None,
    through: bool = True,
    first: First = "v",
    of: Of = "matrix",
) -> tuple[Parts, S]:
    """The parts of `spectral_norm`, which see, and the next state: μ = 0, σ = σ̂, one number.

    The kernel, the layer and its input are those of the site.

    >>> from normlab.site import Site
    >>> x, w = jnp.ones((1, 2)), jnp.diag(jnp.array([3.0, 1.0]))
    >>> state = init_spectral(w)
    >>> parts, state = spectral_parts(Site(x @ w, x, w), None, state, train=True)
    >>> print(parts.sigma.round(2))
    3.0
    """
    w = promote(kernel(_WHERE, site, of_x=False))
    at: dict[str, Any] = {"of": of, "linear": site.linear, "x": site.x}
    begun = init_spectral(w, warm=warm, **at) if state is None else state
    how: dict[str, Any] = {"steps": steps, "warm": warm, "bound": bound, "through": through}
    how["first"] = first
    mapped, after = measure_spectral(w, begun, train=train, **at, **how)
    return mapped_parts(_WHERE, mapped, site, params), None if state is None else after  # pyright: ignore


@checked(_WHERE, steps=STEPS)
def spectral(
    *,
    steps: int = 1,
    warm: int = 15,
    bound: float | None = None,
    through: bool = True,
    first: First = "v",
    of: Of = "matrix",
    use_gain: bool = False,
    use_bias: bool = True,
    gain: Gain = "scalar",
) -> WeightMap:
    """`spectral_norm`, by default without a gain: one that is learned bounds nothing."""
    how: dict[str, Any] = {"steps": steps, "warm": warm, "bound": bound, "through": through}
    how["first"] = first
    begin: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}

    def state(w: Any, linear: Any, x: Any) -> State:
        return init_spectral(w, warm=warm, of=of, linear=linear, x=x)

    params = functools.partial(initial_affine, **begin)
    measure = functools.partial(measure_spectral, of=of, **how)
    return weight_map(measure, params, state, name=_WHERE)


def of_u(u: Array, w: Array) -> Spectral:
    """The state of which only u `[C]` was kept, of any length: v is the direction of Wᵀu."""
    u = _direction(u.astype(w.dtype), u.astype(w.dtype))
    image = _operator(lax.stop_gradient(w), Dense(), None, "matrix")[1](u)
    return Spectral(u, _direction(image, jnp.zeros_like(image)))


def measure_spectral(
    w: Array,
    state: Any,
    *,
    linear: Linear,
    x: Any,
    train: bool,
    steps: int,
    warm: int,
    bound: float | None,
    through: bool,
    of: Of,
    first: First = "v",
) -> tuple[Mapped, Spectral]:
    """What spectral norm measures of a kernel, and the next state."""
    _check_state(state, _shapes(w, linear, x, of), of)
    forward, back = _operator(lax.stop_gradient(w), linear, x, of)
    old = Spectral(*(lax.stop_gradient(v).astype(w.dtype) for v in state))
    now = _alike(old, forward, back)
    if train:
        fresh = jnp.all(old.v == 0)
        now = _iterated(forward, back, now, steps, first)
        if warm > steps:
            now = _iterated(forward, back, now, jnp.where(fresh, warm - steps, 0), first)
        after = Spectral(*(_like(v.astype(s.dtype), s) for v, s in zip(now, state, strict=True)))
    else:  # a pair that says nothing of this kernel is replaced, and not kept
        useless = ~((now.u * forward(now.v)).sum() > 0)
        now = _iterated(forward, back, now, jnp.where(useless, max(warm, 1), 0))
        after = state
    measured = w if through else lax.stop_gradient(w)
    sigma = (now.u * _operator(measured, linear, x, of)[0](now.v)).sum()
    zero = sigma == 0
    if bound is not None:
        sigma = jnp.maximum(sigma / bound, 1)
    unit = w / jnp.where(zero, 1, sigma)
    return Mapped(unit, None, jnp.where(zero, 0, sigma)), after


class _Shapes(NamedTuple):
    u: tuple[int, ...]
    v: tuple[int, ...]


def _shapes(w: Any, linear: Linear, x: Any, of: Of) -> _Shapes:
    """Those of u and v: of a map, one example of its output and of its input."""
    shape = jnp.shape(w)
    if of == "matrix" or isinstance(linear, Dense):
        return _Shapes(shape[-1:], shape[:-1])
    if x is None:
        raise invalid(
            _WHERE,
            "of='map' and no x",
            "the input of the layer, of which the map is measured at its size",
            "pass Site(..., x=x), or x=jax.ShapeDtypeStruct(x.shape, x.dtype), or of='matrix'",
        )
    along = {axis % len(x.shape) for axis in linear.patch_axes(x)}
    v = tuple(n if i in along else 1 for i, n in enumerate(x.shape))
    arrays = (jax.ShapeDtypeStruct(s, promote_dtype(w)) for s in (v, shape))
    return _Shapes(jax.eval_shape(linear, *arrays).shape, v)


def _operator(
    w: Array, linear: Linear, x: Any, of: Of
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """V ↦ Wv and u ↦ Wᵀu.

    Of a matrix by sums of products: some accelerators round what a product of matrices is made of
    to half precision.
    """
    if of == "matrix" or isinstance(linear, Dense):
        axes = tuple(range(w.ndim - 1))
        return lambda v: (w * v[..., None]).sum(axes), lambda u: (w * u).sum(-1)

    def image(v: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return linear(v, w)

    def back(u: Array) -> Array:
        # All of the type of w, or the transpose would add up what varies over a mapped axis.
        zero = jnp.zeros(_shapes(w, linear, x, of).v, w.dtype) + zeros_of(w).sum()
        with jax.default_matmul_precision("highest"):
            return jax.linear_transpose(image, zero)(_like(u, image(zero)))[0]

    return image, back


def _check_state(state: Any, shapes: _Shapes, of: Of) -> None:
    if not isinstance(state, Spectral):
        change = "make it with init_spectral, or take what norm.init returned"
        change = RESTORE if isinstance(state, dict | list) else change
        raise invalid(_WHERE, f"a state of type {type(state).__name__}", "a Spectral", change)
    given = tuple(map(jnp.shape, state))
    if given != tuple(shapes):
        change = "make it with init_spectral for this kernel"
        if of == "map":
            change += " and this size of input, or use of='matrix', which has no size of input"
        said = (f"u of shape {u} and v of shape {v}" for u, v in (given, shapes))
        raise invalid(_WHERE, next(said), next(said), change)


def _iterated(
    forward: Callable[[Array], Array],
    back: Callable[[Array], Array],
    state: Spectral,
    steps: int | Array,
    first: First = "v",
) -> Spectral:
    """The pair after so many steps of power iteration."""

    def step(_: Any, pair: Spectral) -> Spectral:
        u, v = pair
        for side in ("u", "v", "u")[first == "v" :][:2]:
            u = _direction(forward(v), u) if side == "u" else u
            v = _direction(back(u), v) if side == "v" else v
        return Spectral(u, v)

    if isinstance(steps, int) and steps <= 2:
        for i in range(steps):
            state = step(i, state)
        return state
    return lax.fori_loop(0, steps, step, state)


def _direction(y: Array, old: Array) -> Array:
    """y/‖y‖, without over- or underflow; `old` where y is zero or not finite."""
    peak = jnp.abs(y).max()
    known = (peak > 0) & jnp.isfinite(peak)
    y = jnp.where(known, y, 1) / jnp.where(known, peak, 1)
    return jnp.where(known, y * lax.rsqrt(jnp.square(y).sum()), old)


def _alike(
    pair: Spectral, forward: Callable[[Array], Array], back: Callable[[Array], Array]
) -> Spectral:
    """The pair as the kernel is sharded and mapped: the values of a loop keep one type."""
    return Spectral(_like(pair.u, forward(pair.v)), _like(pair.v, back(pair.u)))


def _like(v: Array, y: Array) -> Array:
    """v, sharded as y is where types say so, and varying over the same mapped axes."""
    sharding = jax.typeof(y).sharding
    if sharding.mesh.explicit_axes:
        v = jax.sharding.reshard(v, sharding)
    return v + zeros_of(y)
