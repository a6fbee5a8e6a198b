"""Norms of segments: graphs, sets and packed sequences, of any sizes in one array.

    segment   h = g · (a − mean) / √(var + ε) + b            of the values with one id
    graph     h = g · (a − α·mean) / √(mean (a − α·mean)² + ε) + b
    pair      h = g · (a − mean) / √(mean ‖a − mean‖² + ε) + b

An id says to which segment a value belongs: `[N]`, one for each example, as of the nodes of many
graphs; or `[N, ...]`, one for each position, as of sequences that are packed into an example, where
the ids of another example are others. An id that is not from 0 to `num_segments` − 1 is padding: it
counts in no segment, and its h is b. Without ids every example is a segment.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import array, checked, count, declare, flag, real
from normlab._checks import check_values, gain_and_bias, promote, promote_dtype
from normlab._segments import moments_of_segments, of_rows
from normlab._sums import standard_deviation
from normlab._trees import node
from normlab._weights import aligned, leave_out
from normlab._xla import partitioned
from normlab.equation import Affine, Parts, init_affine
from normlab.errors import invalid
from normlab.gains import Gain, init_gain
from normlab.making import applied
from normlab.measure import Moments, moments
from normlab.site import SHAPES, Site

declare(
    segments=array(
        "ids, integers from 0", "pass an int array [N], or [N, ...] by position", rank=1
    ),
    num_segments=count,
    channels_too=flag(),
    individually=flag(),
)


@checked("segments")
def segment_moments(
    a: ArrayLike,
    *,
    segments: ArrayLike | None = None,
    num_segments: int | None = None,
    channels_too: bool = False,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Moments:
    """The moments, broadcastable to `a`, of the segment that each value is in.

    Two sums over the segments, the second about what the first found. A segment without values has
    a count of 0, and so has padding.

    Args:
      a: `[N, ..., C]`.
      segments: `[N]`, or as many axes as `a` without its channels: the id of the segment.
      num_segments: How many there are, in the batch or, with an id for each position, at most in
        an example.
      channels_too: Whether all channels are measured together.
      weights: Importance of examples or positions; zero leaves out.
      channel_axis: The axis of the channels.

    Raises:
      ValueError: If the ids do not fit `a`, are no integers, or come without their number.

    >>> a, ids = jnp.arange(4.0)[:, None], jnp.array([0, 1, 1, 9])
    >>> m = segment_moments(a, segments=ids, num_segments=2)
    >>> m.mean.ravel().tolist(), m.count.ravel().tolist()
    ([0.0, 1.5, 1.5, 0.0], [1.0, 2.0, 2.0, 0.0])
    """
    where = "segments"
    a, channel, w = aligned(where, a, weights, channel_axis, by_example=True)
    if segments is None:
        axes = [i for i in range(1, a.ndim) if i != channel or channels_too]
        return moments(a, axes, weights=w)
    ids, shape = jnp.asarray(segments), tuple(n for i, n in enumerate(a.shape) if i != channel)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape not in (shape[:1], shape):
        given = f"ids of type {ids.dtype} and shape {ids.shape} for an input of shape {a.shape}"
        change = "number the segments, one for each example or for each position"
        raise invalid(where, given, f"integers of shape {shape[:1]} or {shape}", change)
    if num_segments is None:
        change = "pass num_segments=... in the call, or to nl.get"
        raise invalid(where, "ids without num_segments", "how many segments there are", change)
    by_position = ids.ndim > 1

    def measure(x: Array, w: Array, ids: Array) -> Moments:
        m = moments_of_segments(x, w, ids, num_segments, channels_too=channels_too)
        return Moments(*(of_rows(v, ids) for v in m))

    def run(a: Array, w: Array | None, ids: Array) -> Moments:
        x = jnp.moveaxis(promote(a), channel, -1)
        v = jnp.ones((), x.dtype) if w is None else jnp.moveaxis(w, channel, -1)
        size = math.prod(x.shape[1:-1])
        rows = (x.shape[0], size, 1) if by_position else (x.shape[0], size)
        x, v = (u.reshape(*rows, x.shape[-1]) for u in (x, jnp.broadcast_to(v, x.shape)))
        m = (jax.vmap(measure) if by_position else measure)(x, v, ids.reshape(rows[:-1]))
        whole = (*ids.shape, *(1,) * (a.ndim - 1 - ids.ndim))
        return Moments(*(jnp.moveaxis(u.reshape(*whole, u.shape[-1]), -1, channel) for u in m))

    return partitioned(run, a, w, ids)


def _measured(where: str, a: ArrayLike, segments: Any, channel_axis: int, **how: Any) -> Moments:
    m = segment_moments(a, segments=segments, channel_axis=channel_axis, **how)
    one = segments is None and m.mean.shape == jnp.shape(a) and 0 not in m.mean.shape
    change = "use ids, by which several examples are one: Site(a, segments=...)"
    check_values(where, jnp.shape(a), one, "segment and channel", change)
    return m


@checked("segment norm")
def segment_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    segments: ArrayLike | None = None,
    num_segments: int | None = None,
    channels_too: bool = False,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `segment_norm`, which see.

    >>> a = jnp.array([[1.0], [3.0], [10.0], [30.0]])
    >>> parts = segment_parts(a, segments=jnp.array([0, 0, 1, 1]), num_segments=2)
    >>> print(parts.mu[:, 0])
    [ 2.  2. 20. 20.]
    """
    how: dict[str, Any] = {"num_segments": num_segments, "weights": weights}
    m = _measured("segment norm", a, segments, channel_axis, channels_too=channels_too, **how)
    g, b = gain_and_bias("segment norm", params, a, channel_axis)
    return Parts(m.mean, m.sigma(eps), g, b)


@applied(segment_parts)
def segment_norm() -> None:
    """Instance or layer normalization of segments: h = g · (a − μ) / √(var + ε) + b.

    μ and var are those of the channel over the segment, as instance norm's of a graph; or, with
    `channels_too`, of all channels together, as PyG's layer norm of graphs has them (which adds ε
    to σ where there is one graph, and to σ² where there are more; here always to σ²).

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`.
      segments: The ids, `[N]` or by position; without, every example is a segment.
      num_segments: How many segments there are.
      channels_too: Whether all channels are measured together.
      eps: ε > 0, in squared units of `a`.
      weights: Importance of examples or positions; zero leaves out.
      channel_axis: The axis of the channels.

    Returns:
      h, in the shape and floating type of `a`; of padding it is b.

    Raises:
      ValueError: As `segment_moments`, or for one value per segment where that can be seen.

    >>> a = jnp.array([[1.0], [3.0], [10.0], [30.0], [0.0]])
    >>> h = segment_norm(a, segments=jnp.array([0, 0, 1, 1, 2]), num_segments=2)
    >>> h.round(3).ravel().tolist()
    [-1.0, 1.0, -1.0, 1.0, 0.0]
    """


@node
class Graph(NamedTuple):
    """The params of GraphNorm, which takes α·mean off: see `graph_norm`.

    Attributes:
      g: `[C]`, the gain, or `None`.
      b: `[C]`, the bias, or `None`.
      alpha: `[C]`, how much of the mean is taken off.

    >>> from normlab import Site, get
    >>> site = Site(jnp.ones((4, 3)), segments=jnp.array([0, 0, 1, 1]))
    >>> params, _ = get("graph", num_segments=2).init(site)
    >>> params.alpha.tolist()                              # at first the whole mean
    [1.0, 1.0, 1.0]
    """

    g: Array | None
    b: Array | None
    alpha: Array


@checked("GraphNorm")
def graph_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    segments: ArrayLike | None = None,
    num_segments: int | None = None,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `graph_norm`, which see.

    >>> a = jnp.array([[1.0], [3.0], [10.0], [30.0]])
    >>> parts = graph_parts(a, segments=jnp.array([0, 0, 1, 1]), num_segments=2)
    >>> print(parts.mu[:, 0])
    [ 2.  2. 20. 20.]
    """
    where = "GraphNorm"
    how: dict[str, Any] = {"num_segments": num_segments, "weights": weights}
    m = _measured(where, a, segments, channel_axis, **how)
    g, b = gain_and_bias(where, params, a, channel_axis)
    if params is not None and not hasattr(params, "alpha"):
        given = f"params of type {type(params).__name__}"
        change = "take those of norm.init, modulated or not, or wrap yours: Graph(g, b, alpha)"
        raise invalid(where, given, "params with a field alpha, or None", change)
    kept = None if params is None else Affine(params.alpha, None)
    alpha, _ = gain_and_bias(where, kept, a, channel_axis)
    square = m.var() + jnp.square((1 - alpha) * m.mean)
    return Parts(alpha * m.mean, standard_deviation(square, m.count, eps), g, b)


@applied(graph_parts)
def graph_norm() -> None:
    """GraphNorm (Cai et al. 2021, https://arxiv.org/abs/2009.03294).

    h = g · (a − α·mean) / √(mean (a − α·mean)² + ε) + b: the means are those of the channel over
    the nodes of a graph; α is learned. The square is var + ((1 − α)·mean)².

    The other arguments are those of `segment_norm`, which see.

    Args:
      params: `Graph(g [C], b [C], alpha [C])`, or `None`: α = 1.

    >>> a = jnp.array([[1.0], [3.0], [5.0], [5.0]])
    >>> params = Graph(None, None, jnp.zeros(1))
    >>> h = graph_norm(a, params, segments=jnp.array([0, 0, 1, 1]), num_segments=2)
    >>> (100 * h).round().ravel().tolist()
    [45.0, 134.0, 100.0, 100.0]
    """


@checked("GraphNorm", site=SHAPES, alpha=real)
def graph_params(
    site: Site, *, alpha: float = 1.0, use_gain: bool = True, use_bias: bool = True
) -> Graph:
    """`Graph` of gains 1, biases 0 and one α for all channels."""
    dtype, channels = promote_dtype(site.a), site.channels
    made = init_affine(channels, use_gain=use_gain, use_bias=use_bias, dtype=dtype)
    return Graph(made.g, made.b, jnp.full(channels, alpha, dtype))


@checked("PairNorm")
def pair_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    segments: ArrayLike | None = None,
    num_segments: int | None = None,
    individually: bool = False,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `pair_norm`, which see.

    >>> a = jnp.array([[1.0], [3.0], [10.0], [30.0]])
    >>> parts = pair_parts(a, segments=jnp.array([0, 0, 1, 1]), num_segments=2)
    >>> print(parts.mu[:, 0])
    [ 2.  2. 20. 20.]
    """
    where = "PairNorm"
    how: dict[str, Any] = {"num_segments": num_segments, "weights": weights}
    m = _measured(where, a, segments, channel_axis, **how)
    g, b = gain_and_bias(where, params, a, channel_axis)
    a, channel, w = aligned(where, a, weights, channel_axis)
    square = m.var()
    if individually:
        square = jnp.square(promote(leave_out(a, w)) - m.mean)
    square = square.sum(channel, keepdims=True)
    number = m.count.max(channel, keepdims=True)
    return Parts(m.mean, standard_deviation(square, number, eps), g, b)


@applied(pair_parts)
def pair_norm() -> None:
    """PairNorm (Zhao & Akoglu 2020, https://arxiv.org/abs/1909.12223).

    h = s · (a − mean) / √(mean ‖a − mean‖² + ε): the mean is that of the channel over the nodes of
    a graph, the mean square that of the nodes' lengths. So the sum of the distances of all pairs of
    nodes stays as it is. `individually` divides each node by its own length, as PairNorm-SI.

    The other arguments are those of `segment_norm`, which see.

    Args:
      params: `Affine(g [], None)`: g is the paper's s; or `None`, for 1.
      individually: Whether each node has a scale of its own.

    >>> a = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, 7.0]])
    >>> h = pair_norm(a, segments=jnp.array([0, 0, 1, 1]), num_segments=2)
    >>> h.round(3).tolist()
    [[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]
    """


@checked("PairNorm", site=SHAPES)
def pair_params(
    site: Site, *, use_gain: bool = True, use_bias: bool = False, gain: Gain = "scalar"
) -> Any:
    """One gain of 1, and no bias, by default."""
    how: Any = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
    return init_gain(site.channels, dtype=promote_dtype(site.a), **how)
