"""Norms made of norms: their parts composed, mixed and joined; norms in a chain and side by side.

The line h = g·(a − μ)/σ + b is closed under all of these:

    compose    a norm after a norm          σ = σ₁σ₂    g = g₁g₂    b = g₂(b₁ − μ₂)/σ₂ + b₂
    mix        the mean of outputs, Σ w·h   g/σ = Σ w·g/σ           b = Σ w·(b − g(μ − μ₀)/σ)
    blend      the mean of statistics       μ = Σ w·μ               σ² = Σ w·σ²
    join       the shift of one, the scale of another

μ stays near the mean of a (μ₁ in `compose`, μ₀ = Σ|w|μ/Σ|w| in `mix`), so that a large mean costs
no digits. `chain`, `mixture`, `split` and `pair` make norms of norms in these ways.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import (
    KINDS,
    Kind,
    a_function,
    array,
    checked,
    instance,
    integer,
    sequence,
)
from normlab._checks import gain_and_bias, promote
from normlab._trees import node
from normlab._xla import partitioned
from normlab.equation import Parts, affine
from normlab.errors import invalid
from normlab.making import initial_affine, made_of
from normlab.site import Norm, Site, State

__all__ = ["Mixed", "blend", "chain", "compose", "join", "mix", "mixture", "pair", "split"]

_PARTS = KINDS["parts"]
_SEVERAL = sequence(_PARTS, "a list of Parts", "pass those of at least one norm")
_NORM = instance(Norm, "make it with get(name), or Norm(init, parts)", arrays=False)
_SOME = sequence(_NORM, "norms, one at least", "pass a list of what get returned")


def _norms(value: Any) -> tuple[Norm, ...]:
    if not (norms := _SOME.read(value)):
        raise ValueError
    return norms


_NORMS = _SOME._replace(read=_norms, wrong=(*_SOME.wrong, ()))
_SHARES = array("[k], or [k, ...] that broadcasts to the input", "pass one number for each")


@checked("compose", inner=_PARTS, outer=_PARTS)
def compose(inner: Parts, outer: Parts) -> Parts:
    """Returns the parts of a norm after a norm: `affine(outer, affine(inner, a))` in one.

    Args:
      inner: The parts of the first.
      outer: Those of the second, measured on what the first returned.

    >>> inner, outer = (Parts(*map(jnp.float32, v)) for v in ((1, 2, 3, 4), (0, 2, 1, 1)))
    >>> [v.item() for v in compose(inner, outer)]
    [1.0, 4.0, 3.0, 3.0]
    """
    rate = outer.g / outer.sigma
    b = rate * (inner.b - outer.mu) + outer.b
    return Parts(inner.mu, inner.sigma * outer.sigma, inner.g * outer.g, b)


@checked("mix", parts=_SEVERAL, weights=_SHARES)
def mix(parts: Sequence[Parts], weights: ArrayLike) -> Parts:
    """Returns the parts whose output is the weighted sum of the outputs: h = Σ w·h.

    Args:
      parts: Those of k norms of the same values.
      weights: `[k]`, or `[k, ...]` where w varies by channel or example; any real numbers.

    >>> one, two = (Parts(*map(jnp.float32, (0, s, 1, 0))) for s in (1, 2))
    >>> affine(mix([one, two], jnp.array([0.5, 0.5])), jnp.array([4.0])).item()
    3.0
    """
    w = _each("mix", parts, weights)
    mu, sigma = _means([lax.stop_gradient(jnp.abs(v)) for v in w], parts)
    rates = [v * p.g / p.sigma for v, p in zip(w, parts, strict=True)]
    b = _sum(v * p.b + r * (mu - p.mu) for v, r, p in zip(w, rates, parts, strict=True))
    return Parts(mu, sigma, _sum(rates) * sigma, b)


def _means(w: list[Array], parts: Sequence[Parts]) -> tuple[Array, Array]:
    """μ₀ and a σ > 0 like those of the parts: what they are leaves h as it is."""
    total = _sum(w)
    some = total > 0
    shares = [jnp.where(some, v / jnp.where(some, total, 1), 1 / len(w)) for v in w]
    rate = _sum(v / p.sigma for v, p in zip(shares, parts, strict=True))
    mu = _sum(v * p.mu for v, p in zip(shares, parts, strict=True))
    return mu, jnp.where(rate > 0, 1 / jnp.where(rate > 0, rate, 1), 1)


@checked("blend", parts=_SEVERAL, weights=_SHARES, scale_weights=_SHARES)
def blend(
    parts: Sequence[Parts], weights: ArrayLike, scale_weights: ArrayLike | None = None
) -> Parts:
    """Returns the parts whose statistics are mixed: μ = Σ w·μ and σ² = Σ w·σ².

    With w that sums to 1 an ε under each root is the same ε under the one that is left. g and b are
    those of the first.

    Args:
      parts: Those of k norms of the same values.
      weights: `[k]`, or `[k, ...]`, of the shifts.
      scale_weights: Those of the scales, at least 0; `None` for the same.

    >>> one, two = (Parts(*map(jnp.float32, (m, s, 1, 0))) for m, s in ((0, 1), (2, 7)))
    >>> [v.item() for v in blend([one, two], jnp.array([0.5, 0.5]))[:2]]
    [1.0, 5.0]
    """
    w = _each("blend", parts, weights)
    v = w if scale_weights is None else _each("blend", parts, scale_weights)
    mu = _sum(each * p.mu for each, p in zip(w, parts, strict=True))
    # Where nothing was measured σ is the largest number, whose square is none.
    peak = lax.stop_gradient(functools.reduce(jnp.maximum, [p.sigma for p in parts]))
    square = _sum(each * jnp.square(p.sigma / peak) for each, p in zip(v, parts, strict=True))
    return Parts(mu, peak * jnp.sqrt(square), parts[0].g, parts[0].b)


def _each(where: str, parts: Sequence[Parts], weights: ArrayLike) -> list[Array]:
    w = promote(weights)
    if not parts or w.ndim == 0 or len(w) != len(parts):
        given = f"weights of shape {w.shape} for {len(parts)} norms"
        raise invalid(where, given, "one weight for each, [k]", "give each norm its weight")
    return [v.astype(parts[0].sigma.dtype) for v in w]


def _sum(values: Any) -> Any:
    return functools.reduce(operator.add, values)


@checked("join", shift=_PARTS, scale=_PARTS)
def join(shift: Parts, scale: Parts) -> Parts:
    """Returns the μ of one norm with the σ, g and b of another: they may look at different places.

    Args:
      shift: The parts whose μ counts.
      scale: Those whose σ, g and b do.

    >>> shift, scale = (Parts(*map(jnp.float32, p)) for p in ((1, 2, 1, 0), (9, 4, 1, 0)))
    >>> joined = join(shift, scale)
    >>> float(joined.mu), float(joined.sigma)
    (1.0, 4.0)
    """
    return scale._replace(mu=shift.mu)


MODULATED = (
    "pass what init returned; a condition changes those of one norm: "
    "(*params[:-1], nl.modulate(params[-1], scale, shift))"
)


def tuple_of(
    norms: Sequence[Any], change: str = "pass what init, or the last call, returned"
) -> Kind:
    """What `init` returns of so many norms."""

    def read(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(norms):
            raise TypeError
        return value

    expected = f"a tuple of {len(norms)}, one of each norm"
    return Kind(expected, change, read, (None, "x", 1, [], {}), saved=True)


@checked("chain", norms=_NORMS)
def chain(norms: Sequence[Norm]) -> Norm:
    """Returns the norm that applies one norm after another.

    Its params and its state are tuples of theirs. A norm that looks at the weights or the input of
    the layer can only be the first: behind it there is no such layer.

    Args:
      norms: In order.

    >>> from normlab import get
    >>> norm = chain([get("batch"), get("group", groups=2)])
    >>> site = Site(jnp.arange(8.0).reshape(2, 4))
    >>> norm.apply(*norm.init(site), site, train=True)[0].round(2).tolist()
    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """

    def init(site: Site) -> tuple[Any, State]:
        made = []
        for norm in norms:
            made.append(norm.init(site))
            site = site._replace(x=None, w=None)
        params, states = zip(*made, strict=True)
        return params, states

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        states, whole, a = [], None, site.a
        for norm, own, kept in zip(norms, params, state, strict=True):
            found, after = norm.parts(own, kept, site, train=train)
            states.append(after)
            whole = found if whole is None else compose(whole, found)
            axis = site.linear.channel_axis
            a = affine(found, site.a, weights=site.weights, channel_axis=axis)
            site = Site(a, weights=site.weights, linear=site.linear)
        assert whole is not None
        return whole, tuple(states)

    made = made_of("chain", init, parts, params=tuple_of(norms, MODULATED), state=tuple_of(norms))
    return made.known_as(None, fused=norms[-1].fused)


@node
class Mixed(NamedTuple):
    """The params of norms side by side.

    Attributes:
      g: `[C]`, the gain of what they make together, or `None`.
      b: `[C]`, the bias, or `None`.
      weights: What says how much each counts.
      of: The params of each.

    >>> from normlab import get
    >>> params, _ = get("switchable").init(Site(jnp.ones((2, 5, 3))))
    >>> params.g.shape, len(params.of), params.weights.scale.shape     # 3 norms, 3 channels
    ((3,), 3, (3,))
    """

    g: Array | None
    b: Array | None
    weights: Any
    of: tuple[Any, ...]


_MIXED = instance(
    Mixed, "pass what init returned, or nl.modulate(params, scale, shift) of it", arrays=False
)


@checked("mixture", norms=_NORMS, combine=a_function(of=2), weights=a_function(of=1))
def mixture(
    norms: Sequence[Norm],
    combine: Callable[[list[Parts], Any], Parts],
    weights: Callable[[Site], Any] = lambda site: (),
    *,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Returns the norm whose parts are made of those of others, side by side on the same values.

    Args:
      norms: The others; as a rule without gain and bias of their own.
      combine: `(parts, weights) -> Parts`, such as `mix` of what the weights mean.
      weights: `site -> weights`, how much each counts at first: learned, any pytree.
      use_gain: Whether there is a gain g after it.
      use_bias: Whether there is a bias b after it.

    Returns:
      A norm with `Mixed` params, whose state is a tuple of states.

    >>> from normlab import get
    >>> both = [get(name, use_gain=False, use_bias=False) for name in ("layer", "rms")]
    >>> norm = mixture(both, mix, lambda site: jnp.array([0.5, 0.5]))
    >>> norm.init(Site(jnp.ones((2, 4))))[0].weights.tolist()
    [0.5, 0.5]
    """

    def init(site: Site) -> tuple[Any, State]:
        params, states = zip(*(norm.init(site) for norm in norms), strict=True)
        made = initial_affine(site, use_gain=use_gain, use_bias=use_bias)
        return Mixed(made.g, made.b, weights(site), params), states

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        each = zip(norms, params.of, state, strict=True)
        found, states = zip(*(n.parts(p, s, site, train=train) for n, p, s in each), strict=True)
        g, b = gain_and_bias("mixture", params, site.a, site.linear.channel_axis)
        one = jnp.ones((), g.dtype)
        whole = combine([Parts(*map(promote, p)) for p in found], params.weights)
        return compose(whole, Parts(one * 0, one, g, b)), states

    return made_of("mixture", init, parts, params=_MIXED, state=tuple_of(norms))


@checked("pair", shift=_NORM, scale=_NORM)
def pair(shift: Norm, scale: Norm, *, use_gain: bool = True, use_bias: bool = True) -> Norm:
    """Returns the norm with the μ of one norm and the σ of another, as `join`; see `mixture`.

    Args:
      shift: The norm whose μ counts.
      scale: The norm whose σ does.
      use_gain: Whether there is a gain.
      use_bias: Whether there is a bias.

    >>> from normlab import Site, get
    >>> norm = pair(get("batch"), get("rms"))
    >>> site = Site(jnp.array([[1.0, 3.0], [5.0, 9.0]]))
    >>> parts, _ = norm.parts(*norm.init(site), site, train=True)
    >>> parts.mu.shape, parts.sigma.shape
    ((1, 2), (2, 1))
    """

    def combine(parts: list[Parts], weights: Any) -> Parts:
        del weights
        return join(parts[0], parts[1])

    return mixture([shift, scale], combine, use_gain=use_gain, use_bias=use_bias)


@checked("split", norms=_NORMS, sizes=sequence(integer("a size", "", 1), "numbers of channels", ""))
def split(norms: Sequence[Norm], sizes: Sequence[int]) -> Norm:
    """Returns the norm that normalizes the first channels with one norm, the next with another.

    Its params and its state are tuples of theirs.

    Args:
      norms: In the order of the channels.
      sizes: How many channels each has; together `C`.

    Raises:
      ValueError: When used, if the sizes are not those of the channels.

    >>> from normlab import get
    >>> norm = split([get("layer"), get("none")], [2, 1])
    >>> site = Site(jnp.array([[1.0, 3.0, 5.0]]))
    >>> norm.apply(*norm.init(site), site, train=True)[0].round(2).tolist()
    [[-1.0, 1.0, 5.0]]
    """

    def cut(site: Site) -> list[Site]:
        if sum(sizes) != site.channels or len(sizes) != len(norms):
            given = f"sizes {tuple(sizes)} of {len(norms)} norms for {site.channels} channels"
            raise invalid("split", given, "a size for each, together C", "change the sizes")
        places = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        return [_channels(site, place) for place in places]

    def init(site: Site) -> tuple[Any, State]:
        each = zip(norms, cut(site), strict=True)
        params, states = zip(*(norm.init(part) for norm, part in each), strict=True)
        return params, states

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        each = zip(norms, params, state, cut(site), strict=True)
        found, states = zip(*(n.parts(p, s, of, train=train) for n, p, s, of in each), strict=True)
        axis = site.linear.channel_axis % site.a.ndim

        def beside(a: Array, *found: Parts) -> Parts:
            each = zip(*found, strict=True)
            return Parts(*(_beside(fields, sizes, a.ndim, axis) for fields in each))

        return partitioned(beside, site.a, *found), states

    made = made_of("split", init, parts, params=tuple_of(norms, MODULATED), state=tuple_of(norms))
    return made.known_as(None, fused=all(norm.fused for norm in norms))


def _channels(site: Site, place: slice) -> Site:
    """The site of some of the channels; of a grouped convolution, without its kernel."""

    def take(v: Any, axis: int) -> Any:
        start, stop = place.start, place.stop
        if isinstance(v, jax.ShapeDtypeStruct):
            return jax.eval_shape(lambda v: take(v, axis), v)
        return lax.slice_in_dim(v, start, stop, axis=axis)

    axis = site.linear.channel_axis
    whole = getattr(site.linear, "groups", 1) == 1 and site.w is not None
    weights = site.weights
    if weights is not None and weights.ndim == site.a.ndim and weights.shape[axis] > 1:
        weights = take(weights, axis)
    kernel = {"w": take(site.w, -1)} if whole else {"x": None, "w": None}
    return site._replace(a=take(site.a, axis), weights=weights, **kernel)


def _beside(fields: Sequence[Array], sizes: Sequence[int], ndim: int, axis: int) -> Array:
    """Parts of neighbouring channels as one."""
    fields = [v.reshape((1,) * (ndim - v.ndim) + v.shape) for v in fields]
    others = [(*v.shape[:axis], 1, *v.shape[axis + 1 :]) for v in fields]
    shape = list(jnp.broadcast_shapes(*others))
    wide = []
    for v, size in zip(fields, sizes, strict=True):
        shape[axis] = size
        wide.append(jnp.broadcast_to(v, shape))
    return jnp.concatenate(wide, axis)
