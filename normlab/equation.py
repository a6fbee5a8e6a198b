"""The one equation and its inverse.

    h = g · (a − μ) / σ + b

μ and σ are measured, g and b are learned. `Parts` holds the four, `affine` applies them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab._apply import apply_parts, finished
from normlab._arguments import SIZES, a_function, array, checked, declare, instance, real
from normlab._checks import (
    check_parts,
    gain_and_bias,
    is_zero,
    normalize_axes,
    promote,
    promote_dtype,
    result_dtype,
)
from normlab._trees import node
from normlab._weights import align_weights
from normlab._xla import partitioned
from normlab.errors import invalid


@node
class Parts(NamedTuple):
    """The four parts of a normalization, each broadcastable to the pre-activation `a`.

    `mu, sigma, g, b = parts`.

    Attributes:
      mu: μ, the shift, in the units of `a`; NumPy's zero where a norm has none.
      sigma: σ > 0, the scale, in the units of `a`; the largest number of its type where nothing
        was measured.
      g: The gain, learned.
      b: The bias, learned.

    >>> parts = Parts(mu=jnp.array(3.0), sigma=jnp.array(2.0), g=jnp.array(1.0), b=jnp.array(0.5))
    >>> affine(parts, jnp.array([1.0, 5.0])).tolist()
    [-0.5, 1.5]
    """

    mu: Array
    sigma: Array
    g: Array
    b: Array


@node
class Affine(NamedTuple):
    """The learned half of a norm; either field may be `None`, which stands for 1 and 0.

    Attributes:
      g: `[C]`, the gain (the papers' γ).
      b: `[C]`, the bias (the papers' β).

    >>> Affine(g=jnp.ones(2), b=None)  # a gain and no bias
    Affine(g=Array([1., 1.], dtype=float32), b=None)
    """

    g: Array | None
    b: Array | None


@checked("init_affine", g=real, channels=SIZES)
def init_affine(
    channels: int | Sequence[int],
    *,
    use_gain: bool = True,
    use_bias: bool = True,
    g: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Affine:
    """Returns `Affine(g, b)` with every gain equal to `g` and every bias zero.

    Args:
      channels: `C`, the number of channels; or the sizes of several feature axes.
      use_gain: Whether there is a gain; without one the field is `None`.
      use_bias: Whether there is a bias; without one the field is `None`.
      g: The initial gain, a number.
      dtype: A floating type for both.

    Raises:
      ValueError: For no channel, a `g` that is not finite, or a type that is not floating.

    >>> init_affine(2).g.tolist()
    [1.0, 1.0]
    """
    return Affine(
        g=jnp.full(channels, g, dtype) if use_gain else None,
        b=jnp.zeros(channels, dtype) if use_bias else None,
    )


PARTS = instance(Parts, "take them from a *_parts, or make Parts(mu, sigma, g, b)")
declare(
    parts=PARTS,
    residual=array("an array of the shape of the input", "pass the shortcut of the block"),
    activation=a_function("a function of an array", "pass for example jax.nn.relu", of=1),
)


@runtime_checkable
class Applied(Protocol):
    """Parts of another kind than `Parts`, which know how they are applied: `MatrixParts`.

    Their μ, σ, g and b are there for whoever looks at them.
    """

    def apply(
        self,
        a: Array,
        weights: Array | None = None,
        *,
        residual: Array | None = None,
        activation: Callable[[Array], Array] | None = None,
    ) -> Array:
        """h, as `affine` returns it."""
        ...

    def invert(self, h: Array) -> Array:
        """a, as `invert` returns it."""
        ...


def _any_parts(value: Any) -> Any:
    plain = isinstance(value, Parts | type) or not isinstance(value, Applied)
    return PARTS.read(value) if plain else value


ANY_PARTS = PARTS._replace(read=_any_parts)


@checked("learned")
def learned(
    a: ArrayLike,
    params: Any = None,
    *,
    channel_axis: int = -1,
    feature_axes: Sequence[int] | None = None,
) -> tuple[Array, Array]:
    """Returns g and b as they stand in `Parts`: broadcastable to `a`, 1 and 0 where there are none.

    Args:
      a: `[N, ..., C]`.
      params: Anything with fields, or properties, g and b, each `None` or of the shape `[C]`; `[]`,
        one number; `[N, C]`, by example; or with as many axes as `a`, each of its size or 1, as
        of a gain that varies by position.
      channel_axis: The axis of the channels.
      feature_axes: The axes of `a` along which g and b lie instead, in order: `(-2, -1)` for those
        of `[H, D]`.

    >>> g, b = learned(jnp.ones((2, 3, 4)), init_affine(3, use_bias=False), channel_axis=1)
    >>> g.shape, b.item()
    ((1, 3, 1), 0.0)
    """
    return gain_and_bias("learned", params, a, channel_axis, feature_axes)


@checked("affine", parts=ANY_PARTS)
def affine(
    parts: Parts | Applied,
    a: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    channel_axis: int | None = None,
    residual: ArrayLike | None = None,
    activation: Callable[[Array], Array] | None = None,
) -> Array:
    """Applies the four parts: h = f(g · (a − μ) / σ + b), as a rule without the activation f.

    The arithmetic is done in float32 at least, whatever the type of `a`, and rounded at the end.
    The subtraction comes first, so nothing is lost when |μ| is much larger than σ.

    Args:
      parts: μ, σ, g and b, each broadcastable to `a`; or parts that apply themselves.
      a: `[N, ..., C]`, the pre-activation.
      weights: The weights that the parts were measured with, if any. A value that is not finite
        and weighs nothing counts as zero, so that it reaches no gradient.
      channel_axis: The axis of the channels, which the weights pass over; `None` if they have none.
      residual: Added before the activation, as the shortcut in a block of a ResNet; of the shape of
        `a`.
      activation: f, a function of each value, such as `jax.nn.relu`; `None` for none.

    Returns:
      h, in the shape of `a` and in its floating type (float32 for integers).

    Raises:
      ValueError: If a part does not broadcast to the shape of `a`, or the weights do not fit.

    >>> parts = Parts(*map(jnp.float32, (1.0, 2.0, 3.0, 10.0)))
    >>> affine(parts, jnp.array([1.0, 5.0])).tolist()
    [10.0, 16.0]
    """
    if channel_axis is not None:
        (channel_axis,) = normalize_axes("affine", channel_axis, jnp.ndim(a))
    a, weights = jnp.asarray(a), align_weights("affine", weights, a, channel_axis)
    if residual is not None and jnp.shape(residual) != a.shape:
        given = f"a residual of shape {jnp.shape(residual)} for a pre-activation of {a.shape}"
        raise invalid("affine", given, "the shape of the pre-activation", "broadcast it")
    if isinstance(parts, Applied):
        after: Any = {"residual": residual, "activation": activation}
        after = {name: value for name, value in after.items() if value is not None}
        if not after or after.keys() <= inspect.signature(parts.apply).parameters.keys():
            return parts.apply(a, weights, **after)
        h, more = parts.apply(a, weights), None if residual is None else jnp.asarray(residual)
        return finished(promote(h), more, activation).astype(h.dtype)
    mu, *others = check_parts(parts, a.shape, promote_dtype(a))
    mu = None if is_zero(mu) else mu
    apply = functools.partial(apply_parts, activation=activation)
    return partitioned(apply, a, mu, tuple(others), weights, residual)


@checked("invert", parts=ANY_PARTS)
def invert(parts: Parts | Applied, h: ArrayLike) -> Array:
    """Undoes `affine`, which see: a = (h − b) · σ / g + μ, in the shape and floating type of `h`.

    Where g is zero the information is gone and the result is not finite.

    >>> parts = Parts(*map(jnp.float32, (3.0, 2.0, 1.0, 0.5)))
    >>> invert(parts, affine(parts, jnp.array([1.0, 5.0]))).tolist()
    [1.0, 5.0]
    """
    if isinstance(parts, Applied):
        return parts.invert(jnp.asarray(h))
    mu, sigma, g, b = check_parts(parts, jnp.shape(h), promote_dtype(h))
    return ((promote(h) - b) * sigma / g + mu).astype(result_dtype(h))
