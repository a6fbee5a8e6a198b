"""Norms that measure a neighbourhood of each value: windows of positions, of channels, or both.

    h = g · (a − μ) / (k + α · var)^power + b        μ and var: of the window about the value

Local response, divisive and local context normalization are such. The moments of a window are
merged of those of smaller ones, one axis after the other, so that no digit is lost to a mean, as in
differences of sums over the whole image; at the border a window has the values that are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import (
    SIZES,
    Kind,
    checked,
    count,
    declare,
    either,
    flag,
    number,
    one_of,
)
from normlab._checks import (
    check_groups,
    check_values,
    gain_and_bias,
    no_mean,
    promote,
    promote_dtype,
)
from normlab._sums import standard_deviation
from normlab._weights import aligned
from normlab._xla import partitioned
from normlab.equation import Affine, Parts, init_affine
from normlab.errors import invalid
from normlab.making import applied
from normlab.measure import Moments, merge, merge_axes
from normlab.site import SHAPES, Site

Centred = bool | Literal["each"]
"""About what squares are taken: the window's mean; 0; or for each value its own window's mean."""

Counts = Literal["values", "window"]
"""What is in a window at the border: the values there are, or zeros beside them."""

_AT_LEAST_0 = number(
    "a number of at least 0", "pass for example 1.0", lambda v: 0 <= v < math.inf, static=True
)
_CENTRED = either("True, False or 'each'", "use one", flag(), one_of(Literal["each"], ""))
declare(
    window=either(SIZES.expected, "pass an odd int, or one for each axis of positions", SIZES),
    channel_window=count,
    group_size=count,
    power=number("a finite number", "pass 0.5 for a standard deviation", static=True),
    k=_AT_LEAST_0,
    counts=one_of(Counts, "what is in a window at the border"),
)
_KINDS: dict[str, Kind] = {"alpha": _AT_LEAST_0}


class _Window(NamedTuple):
    """Which values are about a value: how many along each axis, in what block of channels."""

    sizes: dict[int, int]
    channel: int
    group: int | None
    outside: int

    def moments(self, m: Moments) -> Moments:
        """The moments of the window about every value, of those of each; about 0 if the means are.

        A window of n is merged of windows of powers of two: about 2·log n merges along an axis.
        """
        for axis, size in self.sizes.items():
            m = self._along(m, axis, size)
        if self.group is None:
            return m
        shape, i = m.mean.shape, self.channel
        cut = (*shape[:i], -1, self.group, *shape[i + 1 :])
        split = Moments(*(jnp.broadcast_to(v, shape).reshape(cut) for v in m))
        whole = merge_axes(split, i + 1)
        return Moments(*(jnp.broadcast_to(v, split.mean.shape).reshape(shape) for v in whole))

    def _along(self, m: Moments, axis: int, n: int) -> Moments:
        whole = m.mean.shape[axis]
        if isinstance(whole, int) and not self.outside:
            n = min(n, 2 * whole - 1)
        pads = [(0, 0)] * m.mean.ndim
        pads[axis] = (n // 2, (n - 1) // 2)
        shape = [whole if i == axis else k for i, k in enumerate(m.count.shape)]
        m = m._replace(count=jnp.broadcast_to(m.count, shape))
        fields = zip(m, (self.outside, 0, 0), strict=True)
        piece = Moments(*(jnp.pad(v, pads, constant_values=value) for v, value in fields))
        size, start, out = 1, 0, None
        while n >= size:
            if n & size:
                some = _cut(piece, axis, start, whole)
                out, start = some if out is None else merge(out, some), start + size
            if n >= 2 * size:
                rest = piece.mean.shape[axis] - size
                piece = merge(_cut(piece, axis, 0, rest), _cut(piece, axis, size, rest))
            size *= 2
        assert out is not None
        return out

    def one(self, shape: tuple[int, ...]) -> bool:
        """Whether no window has two values."""
        return self.group in (None, 1) and not any(
            n > 1 and (not isinstance(shape[axis], int) or shape[axis] > 1)  # it may be symbolic
            for axis, n in self.sizes.items()
        )


def _cut(m: Moments, axis: int, start: int, size: Any) -> Moments:
    return Moments(*(lax.slice_in_dim(v, start, start + size, axis=axis) for v in m))


def _window_of(
    where: str, shape: tuple[int, ...], channel: int, window: Any, channels: int | None, group: Any
) -> _Window:
    positions = [i for i in range(1, len(shape)) if i != channel]
    if isinstance(window, int):
        window = (window,) * len(positions)
    if window is not None and len(window) != len(positions):
        given = f"window={window} for an input of shape {shape}"
        expected = f"a number for each of its {len(positions)} axes of positions"
        change = "give as many, or one number for all of them"
        raise invalid(where, given, expected, change)
    if channels is not None and group is not None:
        given = f"channel_window={channels} and groups"
        raise invalid(where, given, "one of the two", "leave one out")
    sizes = dict(zip(positions, window or (), strict=False))
    sizes |= {} if channels is None else {channel: channels}
    return _Window({axis: n for axis, n in sizes.items() if n > 1}, channel, group, 0)


def _local(
    where: str,
    a: ArrayLike,
    params: Any,
    *,
    window: int | Sequence[int] | None = None,
    channel_window: int | None = None,
    group: int | None = None,
    power: float = 0.5,
    centred: Centred = True,
    k: Any = 0.0,
    alpha: float = 1.0,
    counts: Counts = "values",
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    a, channel, weights = aligned(where, a, weights, channel_axis, by_example=True)
    g, b = gain_and_bias(where, params, a, channel)
    near = _window_of(where, a.shape, channel, window, channel_window, group)
    near = near._replace(outside=int(counts == "window"))
    one = bool(centred) and near.one(a.shape)
    change = "use a larger window, channel_window or groups, or centred=False"
    check_values(where, a.shape, one, "window", change)

    def measure(a: Array, w: Array | None) -> Moments:
        x = promote(a) if w is None else jnp.where(w > 0, promote(a), 0)
        each = jnp.ones((1,) * a.ndim, x.dtype) if w is None else w
        zero = jnp.zeros_like(x)
        if centred is False:
            return near.moments(Moments(each, zero, each * jnp.square(x)))
        m = near.moments(Moments(each, x, zero))
        if centred != "each":
            return m
        square = near.moments(Moments(each, zero, each * jnp.square(x - m.mean)))
        return m._replace(m2=square.m2)

    m = partitioned(measure, a, weights)
    mean = m.mean if centred else no_mean(m.m2.dtype)
    var = alpha * m.var()
    if power == 0.5:
        sigma = standard_deviation(var, m.count, k)
    else:
        sigma = jnp.where(m.count > 0, (k + var) ** power, jnp.finfo(var.dtype).max)
    return Parts(mean, sigma, g, b)


@checked("local norm", centred=_CENTRED, **_KINDS)
def local_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    window: int | Sequence[int] | None = 3,
    channel_window: int | None = None,
    groups: int | None = None,
    power: float = 0.5,
    centred: Centred = True,
    k: float = 0.0,
    alpha: float = 1.0,
    counts: Counts = "values",
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `local_norm`, which see.

    >>> print(local_parts(jnp.arange(4.0).reshape(1, 4, 1), window=3).mu[0, :, 0])
    [0.5 1.  2.  2.5]
    """
    group = None
    if groups is not None:
        channels = jnp.shape(a)[aligned("local norm", a, None, channel_axis)[1]]
        check_groups("local norm", groups, channels)
        group = channels // groups
    near: dict[str, Any] = {"window": window, "channel_window": channel_window, "group": group}
    how: dict[str, Any] = {"power": power, "centred": centred, "alpha": alpha, "counts": counts}
    how |= {"weights": weights, "channel_axis": channel_axis}
    return _local("local norm", a, params, k=k + eps, **near, **how)


@applied(local_parts)
def local_norm() -> None:
    """Normalization by the values around each value.

    h = g · (a − μ) / (k + ε + α·var)^power + b: μ and var are the mean and the variance of the
    window about the value, in the same example.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`.
      window: The number of positions, along every axis of them, if there are any, or along each;
        `None` for 1.
      channel_window: The number of neighbouring channels; `None` for the value's own alone.
      groups: In its place, the number of blocks of channels that are measured together: 1 for all.
      power: Of the variance; 0.5 makes a standard deviation of it.
      centred: About what the squares are taken, a `Centred`; with False μ is 0.
      k: What is added to the variance, at least 0.
      alpha: α, what the variance is multiplied by.
      counts: What is in a window at the border, a `Counts`.
      eps: ε > 0, which is added too.
      weights: Importance of positions, aligned with the leading axes of `a` other than the
        channels'. Zero leaves out.
      channel_axis: The axis of the channels.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: For a window that does not fit `a`, or has one value.

    >>> a = jnp.array([[[1.0], [2.0], [3.0], [30.0], [60.0]]])
    >>> (100 * local_norm(a, window=3)).round().ravel().tolist()
    [-100.0, 0.0, -67.0, -4.0, 100.0]
    """


@checked("local response norm", **_KINDS)
def local_response_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    channel_window: int = 5,
    alpha: float = 5e-4,
    k: float = 2.0,
    power: float = 0.75,
    counts: Counts = "window",
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `local_response_norm`, which see.

    >>> import numpy as np
    >>> print(np.asarray(local_response_parts(jnp.array([[1.0, 3.0, 5.0]])).sigma).round(3))
    [[1.684 1.684 1.684]]
    """
    how: dict[str, Any] = {"alpha": alpha, "k": k, "power": power, "counts": counts}
    how |= {"channel_window": channel_window, "weights": weights, "channel_axis": channel_axis}
    _check_k("local response norm", k)
    return _local("local response norm", a, params, centred=False, **how)


@applied(local_response_parts)
def local_response_norm() -> None:
    """Local response normalization (Krizhevsky, Sutskever & Hinton 2012, section 3.3).

    h = a / (k + α·mean a²)^power, https://papers.nips.cc/paper/4824: the mean is that of
    `channel_window` neighbouring channels at the position, divided by their number n at the border
    too. The paper has α·Σ a² with α = 1e-4 and n = 5: α here is n times that, as in torch. A window
    of even size is torch's, with one more channel before than after.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [C], b [C])`, or `None`; the paper has none.
      channel_window: n.
      alpha: α, of the mean; of the sum it is α/n.
      k: k > 0.
      power: The paper's β.
      counts: `"window"` divides by n always, `"values"` by the channels there are.
      weights: Changes nothing but what is not finite and weighs nothing.
      channel_axis: The axis of the channels.

    Returns:
      h, in the shape and floating type of `a`.

    Raises:
      ValueError: For k = 0, or parameters that do not fit `a`.

    >>> a = jnp.array([[1.0, 2.0, 2.0]])
    >>> h = local_response_norm(a, channel_window=3, alpha=3.0, k=4.0, power=0.5)
    >>> (100 * h).round().tolist()
    [[33.0, 55.0, 58.0]]
    """


@checked("divisive norm")
def divisive_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    window: int | Sequence[int] | None = 5,
    k: float = 1.0,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `divisive_norm`, which see.

    >>> print(divisive_parts(jnp.array([[1.0, 3.0, 5.0]])).mu.round())
    [[3. 3. 3.]]
    """
    _check_k("divisive norm", k)
    channels = jnp.shape(a)[aligned("divisive norm", a, None, channel_axis)[1]]
    how: dict[str, Any] = {"window": window, "group": channels, "k": k, "centred": "each"}
    how |= {"weights": weights, "channel_axis": channel_axis}
    return _local("divisive norm", a, params, **how)


@applied(divisive_parts)
def divisive_norm() -> None:
    """Divisive normalization (Ren et al. 2017, https://arxiv.org/abs/1611.04520).

    h = g · v / √(k + mean v²) + b with v = a − mean a: both means are over all channels of a window
    of positions, and every value in the second has the mean of its own window taken off, so that it
    is no variance. The paper's σ² is k; its penalty on |v| belongs to the loss.

    In the paper's code windows at the border are divided by their size, as if zeros were around,
    and with two windows of different sizes the second by that of the first; here both have one
    size, and are divided by the number of their values.

    The other arguments are those of `local_norm`, which see.

    Args:
      window: The number of positions, along every axis of them, if there are any, or along each;
        `None` for 1.
      k: k > 0.

    Raises:
      ValueError: For k = 0, or as `local_norm`.

    >>> divisive_norm(jnp.array([[1.0, 3.0]]), window=None, k=3.0).tolist()
    [[-0.5, 0.5]]
    """


@checked("local context norm")
def local_context_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    window: int | Sequence[int] = 227,
    group_size: int = 2,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `local_context_norm`, which see.

    >>> parts = local_context_parts(jnp.arange(4.0).reshape(1, 4, 1), window=3, group_size=1)
    >>> print(parts.mu[0, :, 0])
    [0.5 1.  2.  2.5]
    """
    where = "local context norm"
    channels = jnp.shape(a)[aligned(where, a, None, channel_axis)[1]]
    if channels % group_size:
        given = f"group_size={group_size} for {channels} channels"
        raise invalid(where, given, "a size that divides them", "change it")
    how: dict[str, Any] = {"window": window, "group": group_size, "k": eps}
    return _local(where, a, params, weights=weights, channel_axis=channel_axis, **how)


@applied(local_context_parts)
def local_context_norm() -> None:
    """Local context normalization (Ortiz et al. 2020, https://arxiv.org/abs/1912.05845).

    h = g · (a − μ) / √(var + ε) + b: μ and var are those of a window of positions and a block of
    `group_size` channels. Where the window takes in the image it is group norm.

    The paper's code takes windows as differences of integral images, of which float32 keeps few
    digits, passes no gradient through them, and at the border has the statistics of the nearest
    whole window; here a window at the border has the values that are there.

    The other arguments are those of `local_norm`, which see.

    Args:
      window: The number of positions, along every axis of them or along each.
      group_size: The number of channels in a block; divides `C`.
      eps: ε > 0, in squared units of `a`.

    >>> a = jnp.array([[[1.0], [3.0], [5.0]]])
    >>> (100 * local_context_norm(a, window=3, group_size=1)).round().ravel().tolist()
    [-100.0, 0.0, 100.0]
    """


def _check_k(where: str, k: float) -> None:
    if k <= 0:
        raise invalid(where, f"k={k}", "k > 0: there is no other ε", "pass for example k=1e-5")


@checked("params", site=SHAPES)
def bare_params(site: Site, *, use_gain: bool = False, use_bias: bool = False) -> Affine:
    """An `Affine` that is empty, by default."""
    dtype = promote_dtype(site.a)
    return init_affine(site.channels, use_gain=use_gain, use_bias=use_bias, dtype=dtype)
