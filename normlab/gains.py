"""Gains and biases beside `Affine`: about 1, as a logarithm, and from the call itself.

A norm asks its params for two things, g and b. Anything that has them will do, such as these:

    Offset     g = 1 + d         decays towards 1; the sum is formed in float32 at least
    Log        g = e^s           stays positive
    modulate   gate·(1 + scale)·g + shift    a condition of the call, by example or by position
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab._arguments import KINDS, SIZES, array, checked, declare, one_of, real
from normlab._checks import expand, promote
from normlab._trees import node
from normlab.equation import Affine, init_affine
from normlab.errors import invalid

Gain = Literal["plain", "offset", "log", "scalar"]
"""How a gain is kept: as g in `Affine`, as g − 1 in `Offset`, as ln g in `Log`, as one number."""

declare(gain=one_of(Gain, "the name of a gain"))


@node
class Offset(NamedTuple):
    """A gain kept as its distance from 1, as in Gemma and Qwen3-Next: g = 1 + d.

    The sum is formed in float32 at least, where a bfloat16 d of 2⁻⁹ still counts. Weight decay
    draws such a gain to 1.

    Attributes:
      d: `[C]`, or any shape that g may have; `None` for a gain of 1.
      b: The bias, or `None`.

    >>> Offset(jnp.bfloat16([2**-9]), None).g.tolist()
    [1.001953125]
    """

    d: Array | None
    b: Array | None

    @property
    def g(self) -> Array | None:
        """1 + d."""
        return None if self.d is None else 1 + promote(self.d)


@node
class Log(NamedTuple):
    """A gain kept as its logarithm, as in Salimans & Kingma 2016, section 2.1: g = e^s.

    Attributes:
      s: `[C]`, or any shape that g may have; `None` for a gain of 1.
      b: The bias, or `None`.

    >>> Log(jnp.zeros(1), None).g.tolist()
    [1.0]
    """

    s: Array | None
    b: Array | None

    @property
    def g(self) -> Array | None:
        """e^s."""
        return None if self.s is None else jnp.exp(promote(self.s))


_KEPT: dict[str, Callable[[Affine], Any]] = {
    "plain": lambda made: made,
    "offset": lambda made: Offset(None if made.g is None else made.g - 1, made.b),
    "log": lambda made: Log(None if made.g is None else jnp.log(made.g), made.b),
    "scalar": lambda made: made._replace(g=None if made.g is None else made.g.ravel()[0]),
}
assert _KEPT.keys() == set(get_args(Gain))


@checked("init_gain", g=real, channels=SIZES)
def init_gain(
    channels: int | Sequence[int],
    *,
    gain: Gain = "plain",
    use_gain: bool = True,
    use_bias: bool = True,
    g: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Any:
    """`init_affine`, which see, with the gain kept as `gain` says.

    Args:
      channels: `C`, or the sizes of several feature axes.
      gain: How it is kept, a `Gain`.
      use_gain: Whether there is one.
      use_bias: Whether there is a bias.
      g: The initial gain, a number.
      dtype: A floating type for both.

    >>> init_gain(2, gain="offset").d.tolist()
    [0.0, 0.0]
    """
    made = init_affine(channels, use_gain=use_gain, use_bias=use_bias, g=g, dtype=dtype)
    return kept_as(gain, made)


def kept_as(gain: Gain, made: Affine) -> Any:
    """The same params with the gain kept as `gain` says."""
    return _KEPT[gain](made)


_CONDITION = array("an array that broadcasts to the input, such as [N, C]", "pass what a net made")


_NORMS = KINDS["params"]._replace(
    change="pass those of the norm first, or None: modulate(None, scale, shift)"
)


@checked("modulate", params=_NORMS, **dict.fromkeys(("scale", "shift", "gate"), _CONDITION))
def modulate(
    params: Any = None,
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    *,
    gate: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Any:
    """The params of a norm that a condition changes.

        h = gate·(1 + scale)·norm(a) + shift

    So are conditional batch norm, AdaLN and SPADE written, with scale and shift, and FiLM, AdaIN
    and the gated RMS norm of Mamba-2 and Qwen3-Next, with a gate: γ, the style's σ, silu(z). The
    nets that make them of a class, a style or a map stay the user's. With scale and shift zero it
    is the norm itself, to the bit.

    Args:
      params: Those of the norm, or `None`.
      scale: `[N, C]`, by example; or with as many axes as the input, by position; or `[C]`, `[]`.
        `None` for 0.
      shift: The same, added afterwards.
      gate: The same, multiplied as it is.
      channel_axis: The axis of the channels where scale and shift have as many axes as the input.

    Returns:
      `Affine`, of which a norm takes g and b, in float32 at least; where the params have g and b
      beside other fields, such as the α of DyT, the same with these in place.

    Raises:
      ValueError: If the params do not lie along the channels of scale and shift.

    >>> modulate(Affine(jnp.ones(2), None), jnp.array([[1.0, 2.0]])).g.tolist()
    [[2.0, 3.0]]
    """
    g, b = (None, None) if params is None else (params.g, params.b)
    factors = {"scale": None if scale is None else 1 + promote(scale)}
    factors["gate"] = None if gate is None else promote(gate)
    for name, factor in factors.items():
        if factor is not None:
            g = factor if g is None else _met(jnp.multiply, name, factor, g, channel_axis)
            b = None if b is None else _met(jnp.multiply, name, factor, b, channel_axis)
    if shift is not None:
        b = promote(shift) if b is None else _met(jnp.add, "shift", promote(shift), b, channel_axis)
    if params is not None and {"g", "b"} <= {*getattr(params, "_fields", ())}:
        return params._replace(g=g, b=b)
    return Affine(g, b)


def _met(f: Callable[..., Array], name: str, condition: Array, own: Any, axis: int) -> Array:
    """`f` of a condition and a param of `[C]`, which is laid along the condition's channels."""
    own = promote(own)
    if own.ndim == 1 and condition.ndim > 2 and -condition.ndim <= axis < condition.ndim:
        own = expand(own, condition.ndim, axis)
    elif own.ndim > 2 and condition.ndim == 2:
        condition = jnp.expand_dims(condition, tuple(range(1, own.ndim - 1)))
        condition = jnp.moveaxis(condition, -1, axis)
    try:
        jnp.broadcast_shapes(own.shape, condition.shape)
    except ValueError as error:
        given = f"a {name} of shape {condition.shape} for params of shape {own.shape}"
        change = "let the condition end in the channels of the norm (scale and shift of one net: "
        change += "jnp.split(..., 2, axis=-1)), or set channel_axis"
        raise invalid("modulate", given, "shapes that broadcast", change) from error
    dtype = jnp.promote_types(own.dtype, condition.dtype)
    return f(own.astype(dtype), condition.astype(dtype))
