"""Co-moments: count, mean and covariance of groups of channels, under the rules of `Moments`.

    c2 = Σ w·(x − mean)(x − mean)ᵀ

The mean is a column, so that what is an elementwise product in `Moments` is an outer one here, and
nothing else differs: `merge`, `all_reduce`, every `Sync` and every population do with co-moments
what they do with moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import checked
from normlab._checks import check_groups, floating, normalize_axes, promote
from normlab._sums import count_values, pivot_of
from normlab._trees import node
from normlab._weights import align_weights
from normlab.errors import invalid
from normlab.measure import Algorithm, Moments


@node
class CoMoments(Moments):
    """Moments of groups of D channels, whose second one is a matrix.

    Attributes:
      count: Σ w, `[..., 1, 1, 1]`, or one for each channel, all alike.
      mean: `[..., G, D, 1]`, a column for each group.
      m2: `[..., G, D, D]`, Σ w·(x − mean)(x − mean)ᵀ; `var()` is the covariance.
    """

    __slots__ = ()

    @staticmethod
    def product(u: Array, v: Array) -> Array:
        """The outer product u·vᵀ of columns."""
        return u * jnp.swapaxes(v, -1, -2)

    @staticmethod
    def measured(
        x: Array,
        axes: Sequence[int],
        *,
        weights: Array | None = None,
        algorithm: Algorithm = "auto",
    ) -> CoMoments:
        """Those of columns `[..., G, D, 1]` over some of the axes before."""
        w = align_weights("comoments", weights, x)
        count = count_values(x, axes, w)
        if w is not None:
            x = jnp.where(w > 0, x, jnp.zeros((), x.dtype))
        pivot = lax.stop_gradient(pivot_of(x, tuple(axes), w, algorithm))
        d = promote(x) - pivot
        d = d if w is None else jnp.where(w > 0, d, 0)
        weighed = d if w is None else w * d
        offset = weighed.sum(axes, keepdims=True) / jnp.where(count > 0, count, 1)
        kept = [i for i in range(x.ndim - 3) if i not in axes]

        def rows(v: Array) -> Array:
            """`[*kept, G, values, D]`."""
            v = v[..., 0].transpose(*kept, x.ndim - 3, *axes, x.ndim - 2)
            return v.reshape(*(x.shape[i] for i in kept), x.shape[-3], -1, x.shape[-2])

        within = jnp.matmul(rows(weighed).mT, rows(d), precision=lax.Precision.HIGHEST)
        within = within.reshape(*offset.shape[:-1], x.shape[-2])
        c2 = within - count * CoMoments.product(offset, offset)
        return CoMoments(count, pivot + offset, (c2 + c2.mT) / 2)

    @property
    def squares(self) -> Array:
        """The squared deviations of each channel, in the shape of the mean."""
        return jnp.diagonal(self.m2, axis1=-2, axis2=-1)[..., None]

    def one(self) -> Array:
        """The covariance that stands for none: I."""
        return jnp.eye(self.m2.shape[-1], dtype=self.m2.dtype)


@checked("comoments")
def comoments(
    x: ArrayLike,
    axes: int | Sequence[int],
    *,
    groups: int = 1,
    weights: ArrayLike | None = None,
) -> CoMoments:
    """Measures the co-moments of the channels of `x`, which are last, in groups of neighbours.

    Arguments and weights as those of `moments`, which see; a value of weight zero is left out,
    whatever it is.

    Args:
      x: `[..., C]`.
      axes: The axes to measure over, the channels' not among them. They stay, with size 1.
      groups: G, which divides `C`; D is C/G.
      weights: Aligned with the leading axes of `x`, and the same for all channels.

    Returns:
      `CoMoments` with a mean `[..., G, D, 1]` and an m2 `[..., G, D, D]`.

    Raises:
      ValueError: If the axes, the groups or the weights do not fit.

    >>> m = comoments(jnp.array([[1.0, 5.0], [3.0, 1.0]]), 0)
    >>> m.mean.ravel().tolist(), m.var()[0, 0].tolist()
    ([2.0, 3.0], [[1.0, -2.0], [-2.0, 4.0]])
    """
    where = "comoments"
    x = floating(x)
    axes = normalize_axes(where, axes, x.ndim)
    if not x.ndim or x.ndim - 1 in axes:
        given = f"axes {axes} of an array of rank {x.ndim}"
        raise invalid(where, given, "some before the last, the channels'", "leave the last out")
    check_groups(where, groups, x.shape[-1])
    w = align_weights(where, weights, x, x.ndim - 1)
    return in_groups(where, x, axes, w, groups)


def in_groups(where: str, x: Array, axes: Sequence[int], w: Array | None, groups: int) -> CoMoments:
    """`comoments` of checked arguments."""
    columns = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups, 1)
    return CoMoments.measured(columns, axes, weights=alike(where, w, 2))


def alike(where: str, w: Array | None, more: int) -> Array | None:
    """Weights `[..., 1]` with so many axes more; raises ValueError if they differ by channel."""
    if w is not None and w.shape[-1] != 1:
        raise invalid(
            where,
            f"weights of shape {w.shape}, which differ between channels",
            "one weight for all channels of a value: they are measured together",
            "weigh examples and positions, or use batch norm",
        )
    return w if w is None else w.reshape(*w.shape, *(1,) * more)


def sample(count: Array, mean: Array, m2: Array) -> Moments:
    """The moments that the fields of a state mean: co-moments if m2 is a matrix.

    Args:
      count: `[..., C]` or `[..., 1]`.
      mean: `[..., C]`.
      m2: `[..., C]`; or `[..., G, D, D]`.
    """
    if m2.ndim == mean.ndim:
        return Moments(count, mean, m2)
    size = m2.shape[-3:-1]

    def column(v: Array) -> Array:
        return v.reshape(*v.shape[:-1], *(size if v.shape[-1] != 1 else (1, 1)), 1)

    return CoMoments(column(count), column(mean), m2)


def shaped_as(like: Moments, m: Moments) -> Moments:
    """`m` with a count for each channel, in the shapes of the mean and the m2 of `like`."""
    count = jnp.broadcast_to(m.count, m.mean.shape)
    mean = like.mean.shape
    return type(m)(count.reshape(mean), m.mean.reshape(mean), m.m2.reshape(like.m2.shape))


def second_shape(where: str, channels: int, groups: int | None) -> tuple[int, ...]:
    """The shape of a state's variance, `[C]`, or of its covariance, `[G, D, D]`."""
    if groups is None:
        return (channels,)
    check_groups(where, groups, channels)
    return (groups, channels // groups, channels // groups)
