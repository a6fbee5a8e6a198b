"""Norms that divide by a length: scale norm.

h = g · a / max(‖a‖, ε)
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from normlab._arguments import checked
from normlab._checks import gain_and_bias, no_mean, promote, promote_dtype
from normlab._units import safe_sqrt
from normlab._weights import aligned, leave_out
from normlab.equation import Parts
from normlab.gains import Gain, init_gain
from normlab.making import applied
from normlab.sharded import OVER, ExampleAxes, channels_in_all, shared, summed
from normlab.site import SHAPES, Site


@checked("scale norm", axis_name=OVER)
def scale_parts(
    a: ArrayLike,
    params: Any = None,
    *,
    eps: float = 1e-5,
    axis_name: ExampleAxes | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
) -> Parts:
    """The parts of `scale_norm`, which see.

    >>> print(scale_parts(jnp.array([[3.0, 4.0]])).sigma.round(3))
    [[5.]]
    """
    a, channel, weights = aligned("scale norm", a, weights, channel_axis)
    g, b = gain_and_bias("scale norm", params, a, channel_axis)
    square = jnp.square(promote(leave_out(a, weights))).sum(channel, keepdims=True)
    over = shared("scale norm", axis_name, channels=True, positions=False)
    (square,) = summed("scale norm", over, square)
    return Parts(no_mean(g.dtype), jnp.maximum(safe_sqrt(square), eps), g, b)


@applied(scale_parts)
def scale_norm() -> None:
    """Scale normalization (Nguyen & Salazar 2019, https://arxiv.org/abs/1910.05895).

    h = g · a / max(‖a‖, ε) + b: the length is that of the channels of a position. The paper's g is
    one number, which starts at √C; without g this is the L2 normalization of cosine attention.

    Args:
      a: `[N, ..., C]`.
      params: `Affine(g [] or [C], None)`, or `None`.
      eps: The least length, in units of `a`.
      axis_name: As in `layer_norm`.
      weights: Changes nothing but what is not finite and weighs nothing.
      channel_axis: The axis of the channels.

    Returns:
      h, in the shape and floating type of `a`; a zero vector stays zero.

    Raises:
      ValueError: For parameters that do not fit `a`, or ε ≤ 0.

    >>> scale_norm(jnp.array([[3.0, 4.0]])).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """


@checked("scale norm", site=SHAPES, axis_name=OVER)
def scale_params(
    site: Site,
    *,
    axis_name: ExampleAxes | None = None,
    use_gain: bool = True,
    use_bias: bool = False,
    gain: Gain = "scalar",
) -> Any:
    """One gain of √C, and no bias, by default; the channels of all devices count."""
    how: Any = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
    g = math.sqrt(channels_in_all(axis_name, site.channels))
    return init_gain(site.channels, g=g, dtype=promote_dtype(site.a), **how)
