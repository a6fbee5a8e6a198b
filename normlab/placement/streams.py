"""Residual connections of several streams in the place of one x: `[N, ..., S, C]`.

The branch reads one mixture of the streams, and each of them gets its part of what the branch
makes of it. The streams stand in front of the channels, so that examples and positions are sharded
and scanned over as without them, and a stream is as contiguous as x was. `enter` makes them of x,
`leave` one x of them; between the two they go through `residual` as x does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from normlab._arguments import array, checked, flag, instance, integer
from normlab._checks import promote, promote_dtype, result_dtype
from normlab._trees import leaves, node
from normlab.equation import Parts
from normlab.errors import invalid
from normlab.placement.line import AXIS, Call, Connection, Residual, missing
from normlab.site import Norm, Site, State

STREAMS = integer("a number of streams, at least 1", "use 4", 1)
STEPS = integer("a number of steps, at least 1", "use 20", 1)
_NORM = instance(Norm, "make it with get(name), or Norm(init, parts)", arrays=False)
_NORMS = dict.fromkeys(("inner", "outer", "total"), _NORM)


@checked("enter", x=array(rank=2), streams=STREAMS, channel_axis=AXIS)
def enter(x: ArrayLike, streams: int, *, channel_axis: int = -1) -> Array:
    """Returns equal streams `[N, ..., S, C]` of x.

    Args:
      x: `[N, ..., C]`.
      streams: S, how many.
      channel_axis: -1, or 1 for `[N, C, ...]`, of which it makes `[N, S, C, ...]`.

    >>> enter(jnp.ones((2, 3)), 4).shape
    (2, 4, 3)
    """
    x = jnp.asarray(x)
    axis = x.ndim + channel_axis if channel_axis < 0 else channel_axis
    return jnp.repeat(jnp.expand_dims(x, axis), streams, axis)


@checked("leave", x=array(rank=3), channel_axis=AXIS)
def leave(x: ArrayLike, *, channel_axis: int = -1) -> Array:
    """Returns the sum `[N, ..., C]` of streams.

    Args:
      x: The streams, `[N, ..., S, C]`.
      channel_axis: -1, or 1 for streams `[N, S, C, ...]`.

    >>> leave(jnp.ones((2, 4, 3))).tolist()
    [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """
    return promote(x).sum(_stream_axis(channel_axis)).astype(result_dtype(x))


@checked("sinkhorn", logits=array(rank=2), steps=STEPS)
def sinkhorn(logits: ArrayLike, *, steps: int = 20) -> Array:
    """The matrix of Sinkhorn & Knopp, whose rows and columns sum to 1 in the end.

    From exp(logits) on each step divides the columns by their sums and then the rows by theirs
    (Xie et al. 2025, https://arxiv.org/abs/2512.24880, equation 9), here on the logarithms, so that
    no size of the logits over- or underflows. So the rows sum to 1 whatever the `steps`, the
    columns the better the more there are, and the worse the larger the logits: of a thousand
    matrices [4, 4] of normal logits of standard deviation 1 they are off by 1e-5 at most after 20
    steps, of 4 by 0.05 (`tests/test_streams.py -k sinkhorn`).

    Args:
      logits: `[..., S, S]`.
      steps: How many.

    >>> sinkhorn(jnp.array([[0.0, 1.0], [0.0, 0.0]])).sum(0).round(3).tolist()
    [1.0, 1.0]
    """
    logits = promote(logits)
    if logits.shape[-1] != logits.shape[-2]:
        given = f"logits of shape {logits.shape}"
        raise invalid("sinkhorn", given, "square matrices [..., S, S]", "check the last two axes")

    def step(_: int, m: Array) -> Array:
        return jax.nn.log_softmax(jax.nn.log_softmax(m, -2), -1)

    return jnp.exp(lax.fori_loop(0, steps, step, logits))


@node
class Mixing(NamedTuple):
    """The weights of streams that depend on the streams: static + scale · f(norm(x) · kernel).

    Attributes:
      static: What does not depend on x, `[S]` or `[S, S]`.
      kernel: The linear map, 0 at first.
      scale: One number, 0.01 at first.

    >>> from normlab.placement import init_residual
    >>> params, _ = init_residual(HyperConnection(streams=2), jnp.ones((1, 2, 3)))
    >>> params.skip.static.tolist(), params.skip.kernel.shape, round(params.skip.scale.item(), 4)
    ([[1.0, 0.0], [0.0, 1.0]], (3, 2), 0.01)
    """

    static: Array
    kernel: Array
    scale: Array


@checked(
    "HyperConnection",
    **_NORMS,
    streams=STREAMS,
    reads=array("a number of a stream", "pass the number of the branch", most=0),
    dynamic=flag(),
    sinkhorn=integer("a number of steps, at least 1, or None", "use 20", 1),
)
@leaves("reads")
@dataclass(frozen=True)
class HyperConnection(Connection):
    """Hyper-connections (Zhu et al. 2024, https://arxiv.org/abs/2409.19606), and mHC.

        z = Σ_s r_s·x_s,   x'_t = Σ_s A_ts·x_s + b_t·O(F(I(z)))

    The weights r, A and b of S streams are learned; with `dynamic` they are those of each position,
    a small part of them a function of the streams there. The paper calls them A_m, A_rᵀ and B.
    In its form each stream has its own say, with N `total` and kernels of [C] and [C, S]:

        r_s = static + scale·tanh(N(x_s)·kernel),   likewise A_·s and b_s

    With `sinkhorn` they are those of manifold-constrained hyper-connections (mHC, Xie et al. 2025,
    https://arxiv.org/abs/2512.24880), from all streams at once, v = N(vec x) of [S·C]:

        l = static + scale·(v·kernel),   r = σ(l_r),  b = 2σ(l_b),  A = sinkhorn(l_A)

    so that A neither lets the sum of the streams change nor any mixture of them grow.

    At first it is pre-norm: all streams are equal, A = 1 and b = 1, and the branch reads the stream
    `reads`. In mHC 0.9 and more of A is diagonal up to 300 streams, and the branch reads all, that
    one with σ(1) and the others with σ(−1), which I takes out. With one stream and params of one's
    own it is any line of two gains, such as the paper's pre-norm (1, 1, 1) and its post-norm, whose
    gains are 1 over the deviation of the sum.

    The algorithm in the paper's appendix has one scale for r and A; the equations of mHC's paper
    have one for each, as here. That paper gives the scales at first, 0.01, and not `static` and
    `kernel`, which are this library's choice.

    Attributes:
      inner: I; `None` for none.
      outer: O.
      total: N, a norm of what the weights look at: of each stream, of all of them with `sinkhorn`.
      streams: S.
      reads: Which stream the branch reads at first, modulo S: the paper's is the number of the
        branch. A leaf of the pytree, for the placements of many blocks to be stacked.
      dynamic: Whether the weights depend on the streams. Then a `Mixing` is the parameter of each,
        else an array; and an array of `[N, ..., S]`, or `[N, ..., S, S]`, may take its place.
      sinkhorn: How many steps `sinkhorn` makes; `None` for hyper-connections without constraints.

    >>> from normlab import get
    >>> from normlab.placement import init_residual, residual
    >>> hyper = HyperConnection(inner=get("layer"), total=get("layer"), streams=2)
    >>> x = enter(jnp.array([[1.0, 3.0]]), 2)
    >>> residual(hyper, *init_residual(hyper, x), jnp.square, x, train=True)[0].round(3).tolist()
    [[[2.0, 4.0], [2.0, 4.0]]]
    """

    inner: Norm | None = None
    outer: Norm | None = None
    total: Norm | None = None
    streams: int = 4
    reads: Any = 0
    dynamic: bool = True
    sinkhorn: int | None = None

    def init(self, x: Any, call: Call) -> dict[str, Any]:
        """The weights that are pre-norm, and kernels of 0."""
        _check(self, x, call)
        one = _one(x, call.channel_axis)
        call.norm("inner", one)
        call.norm("outer", one)
        dtype, size, channels = promote_dtype(x), self.streams, one.shape[call.channel_axis]
        eye, first = (
            jnp.eye(size, dtype=dtype),
            jax.nn.one_hot(self.reads % size, size, dtype=dtype),
        )
        if self.sinkhorn is None:
            static = {"read": first, "skip": eye, "branch": jnp.ones(size, dtype)}
        else:
            static = {
                "read": 2 * first - 1,
                "skip": 8 * (eye - 1),
                "branch": jnp.zeros(size, dtype),
            }
        if not self.dynamic:
            return static
        call.norm("total", jax.eval_shape(lambda x: self._seen(_last(x, call.channel_axis)), x), -1)

        def mixing(v: Array) -> Mixing:
            if self.sinkhorn is None:
                shape = (channels, *v.shape[1:])
            else:
                shape = (size * channels, *v.shape)
            return Mixing(v, jnp.zeros(shape, dtype), jnp.full((), 0.01, dtype))

        return {name: mixing(v) for name, v in static.items()}

    def apply(self, params: Residual, x: Array, call: Call) -> Array:
        """Reads the streams, and gives each its part."""
        _check(self, x, call)
        last = _last(x, call.channel_axis)
        wide, seen = promote(last), None
        if any(isinstance(own, Mixing) for own in (params.read, params.skip, params.branch)):
            seen = promote(call.norm("total", self._seen(last), -1))
        read, skip, write = (self._raw(params, name, seen) for name in ("read", "skip", "branch"))
        if self.sinkhorn is not None:
            read, write = jax.nn.sigmoid(read), 2 * jax.nn.sigmoid(write)
            skip = sinkhorn(skip, steps=self.sinkhorn)
        z = _product("...s,...sc->...c", read, wide)
        entering = jnp.moveaxis(z.astype(result_dtype(x)), -1, call.channel_axis)
        y = call.norm("outer", call.branch(call.norm("inner", entering), entering))
        y = jnp.moveaxis(promote(y), call.channel_axis, -1)
        total = _product("...ts,...sc->...tc", skip, wide) + write[..., None] * y[..., None, :]
        return _back(total.astype(result_dtype(x)), call.channel_axis)

    def _seen(self, x: Array) -> Array:
        """What the weights look at: with `sinkhorn` all channels of all streams, on each device."""
        if self.sinkhorn is None:
            return x
        spec = jax.typeof(x).sharding.spec
        if any(axis is not None for axis in spec[-2:]):  # of explicit axes, which a reshape minds
            x = jax.sharding.reshard(x, PartitionSpec(*spec[:-2], None, None))
        return x.reshape(*x.shape[:-2], math.prod(x.shape[-2:]))

    def _raw(self, params: Residual, name: str, seen: Array | None) -> Array:
        own = getattr(params, name)
        if own is None:
            raise missing(name, self)
        if not isinstance(own, Mixing):
            return promote(own)
        assert seen is not None
        rank = jnp.ndim(own.static)
        moving = jnp.tensordot(seen, promote(own.kernel), 1)
        if self.sinkhorn is None:
            moving = jnp.tanh(moving)
            moving = jnp.swapaxes(moving, -1, -2) if rank == 2 else moving
        return promote(own.static) + promote(own.scale) * moving


@checked("Siamese", **_NORMS, read=_NORM, branch=array("a number", "pass a float", most=0))
@leaves("branch")
@dataclass(frozen=True)
class Siamese(Connection):
    """SiameseNorm (Li et al. 2026, https://arxiv.org/abs/2602.08064): post- and pre-norm at once.

        û = S(u),   r = O(F(I(û + R(y)))),   u' = û + β·r,   y' = y + r

    Of the two streams u is normalized where it stands, as a post-norm stream is, and y only where
    it is read, as a pre-norm stream is; they share the branch. S stands at the beginning of the
    connection, where another's post-norm stands at the end of the one before: it is the same net,
    with a norm of the embedding. Each stream alone, the other's norm with gain 0, is a post-norm
    and a pre-norm net.

    The equations are those of the authors' code (https://github.com/Qwen-Applications/SiameseNorm,
    DeiT and DiT), where β = 1/√(2ℓ) in block ℓ = 1, 2, …, and the streams leave as N(S(u) + R(y)),
    with norms of their own. Its language model "hybrid-pre" has a gain in the place of S in the
    attention, and no I there but a norm of q, k and v: it is not among the schemes.

    Attributes:
      inner: I; `None` for none.
      outer: O.
      total: S, the norm of the stream u.
      read: R, the norm of the stream y where it is read.
      branch: β, the gain of the branch in u. A leaf of the pytree.

    >>> from normlab import get
    >>> from normlab.placement import init_residual, residual
    >>> norm = get("layer")
    >>> siamese = Siamese(inner=norm, total=norm, read=norm, branch=0.5)
    >>> x = enter(jnp.array([[1.0, 3.0]]), 2)
    >>> xs, _ = residual(siamese, *init_residual(siamese, x), jnp.square, x, train=True)
    >>> xs.round(2).tolist()
    [[[-0.5, 1.5], [2.0, 4.0]]]
    """

    inner: Norm | None = None
    outer: Norm | None = None
    total: Norm | None = None
    read: Norm | None = None
    branch: Any = 1.0

    streams = 2

    def init(self, x: Any, call: Call) -> dict[str, Any]:
        """No gains; the norms see one stream."""
        _check(self, x, call)
        for name in ("inner", "outer", "total", "read"):
            call.norm(name, _one(x, call.channel_axis))
        return {}

    def apply(self, params: Residual, x: Array, call: Call) -> Array:
        """The equations, in their order."""
        _check(self, x, call)
        axis, dtype = _stream_axis(call.channel_axis), result_dtype(x)
        post, pre = (lax.index_in_dim(x, i, axis % x.ndim, keepdims=False) for i in (0, 1))
        post = call.norm("total", post)
        entering = (promote(post) + promote(call.norm("read", pre))).astype(dtype)
        y = promote(call.norm("outer", call.branch(call.norm("inner", entering), entering)))
        after = jnp.stack([promote(post) + self.branch * y, promote(pre) + y], axis)
        return after.astype(dtype)


def by_stream(norm: Norm) -> Norm:
    """The same norm of every stream of `[N, ..., S, C]`, with parameters and a state for each."""

    def one(site: Site) -> Site:
        return site._replace(a=_one(site.a, site.linear.channel_axis))

    def init(site: Site) -> tuple[Any, State]:
        count = site.a.shape[_stream_axis(site.linear.channel_axis)]
        return jax.tree.map(lambda v: jnp.stack([v] * count), norm.init(one(site)))

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        axis = _stream_axis(site.linear.channel_axis)

        def of(params: Any, state: State, a: Array) -> tuple[Parts, State]:
            found, after = norm.parts(params, state, site._replace(a=a), train=train)
            if not isinstance(found, Parts):
                change = "take one of μ and σ"
                raise invalid("streams", f"{norm!r}", "a norm of each value by itself", change)
            full = (p.reshape((1,) * (a.ndim - p.ndim) + p.shape) for p in map(jnp.asarray, found))
            return Parts(*full), after

        return jax.vmap(of, (0, 0, axis), (axis, 0))(params, state, site.a)

    return Norm(init, parts, norm.fused)


def _stream_axis(channel_axis: int) -> int:
    """The axis in front of the channels of one stream."""
    return channel_axis - 1 if channel_axis < 0 else channel_axis


def _one(x: Any, channel_axis: int) -> Any:
    """The shape and type of one of the streams."""
    shape = list(x.shape)
    shape.pop(_stream_axis(channel_axis))
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _last(x: Array, channel_axis: int) -> Array:
    """The streams and their channels last."""
    axis = _stream_axis(channel_axis)
    return x if channel_axis == -1 else jnp.moveaxis(x, (axis, axis + 1), (-2, -1))


def _back(x: Array, channel_axis: int) -> Array:
    axis = _stream_axis(channel_axis)
    return x if channel_axis == -1 else jnp.moveaxis(x, (-2, -1), (axis, axis + 1))


def _product(equation: str, *arrays: Array) -> Array:
    return jnp.einsum(equation, *arrays, precision=lax.Precision.HIGHEST)


def _check(connection: Connection, x: Any, call: Call) -> None:
    channel_axis = call.channel_axis
    axis, shape = _stream_axis(channel_axis), jnp.shape(x)
    if call.shortcut is not None:
        change = "leave the streams before it, and enter again behind it"
        raise invalid(type(connection).__name__, "a shortcut beside streams", "none", change)
    if len(shape) < 3 or shape[axis] != connection.streams:
        where = type(connection).__name__
        layout = "[N, ..., S, C]" if channel_axis == -1 else "[N, S, C, ...]"
        expected = f"streams {layout} with S = {connection.streams}"
        raise invalid(where, f"an x of shape {shape}", expected, "make them of x: scheme.enter(x)")
