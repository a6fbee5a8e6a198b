"""How fast weights turn whose length does not matter.

Before a norm, the length of the weights leaves the output as it is: what learns is their direction.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import array, checked, number
from normlab._checks import normalize_axes, promote
from normlab.errors import invalid
from normlab.instruments.vectors import Axes, angle, norm


@checked("effective lr", w=array(), lr=number("a number", "pass a float", lambda v: True))
def effective_lr(w: ArrayLike, lr: ArrayLike, *, axes: Axes = None) -> Array:
    """The learning rate that scale-invariant weights feel: lr/‖w‖².

    If L(c·w) = L(w), the gradient shrinks as 1/‖w‖ and its effect on the direction by another
    1/‖w‖: SGD at rate lr turns w as it would turn w/‖w‖ at this rate (van Laarhoven 2017,
    https://arxiv.org/abs/1706.05350).

    Args:
      w: The weights of one layer, `[..., K, C]` with units last.
      lr: The learning rate, one number.
      axes: Which axes make one vector: `None` for the layer (after layer norm), all but the last
        for each unit (after batch norm).

    Returns:
      The shape of `w` without `axes`; infinite where w = 0.

    >>> effective_lr(jnp.array([[3.0, 0.0], [4.0, 2.0]]), 0.5, axes=0).tolist()
    [0.019999999552965164, 0.125]
    """
    if axes is not None:
        axes = normalize_axes("effective lr", axes, jnp.ndim(w))
    length = norm(promote(w), axes)
    lr, zero = jnp.asarray(lr, length.dtype), length == 0
    length = jnp.where(zero, 1, length)
    return jnp.where(zero & ~jnp.isnan(lr), jnp.inf, lr / length / length)


@checked("angular update", before=array(), after=array())
def angular_update(before: ArrayLike, after: ArrayLike, *, axes: Axes = None) -> Array:
    """The angle in radians by which a step turns the weights.

    ∠(w_t, w_{t+1}) of Wan et al. 2021 (https://arxiv.org/abs/2006.08419), who show that it settles
    near √(2·lr·λ) under SGD with weight decay λ. Not by arccos, for which an angle below 3e-4 is 0
    in float32: here the smallest step keeps its digits.

    Args:
      before: The weights of one layer, `[..., K, C]` with units last. For a tree of them use
        `jax.tree.map(angular_update, before, after)`.
      after: The same after the step.
      axes: Which axes make one vector, as in `effective_lr`.

    Returns:
      The shape of `before` without `axes`, 0 to π. 0 where either is zero: it has no direction.

    Raises:
      ValueError: If the shapes differ.

    >>> jnp.degrees(angular_update(jnp.array([1.0, 0.0]), jnp.array([2.0, 2.0]))).round().item()
    45.0
    """
    if jnp.shape(before) != jnp.shape(after):
        raise invalid(
            "angular update",
            f"weights of shapes {jnp.shape(before)} and {jnp.shape(after)}",
            "the same weights before and after a step",
            "compare layer by layer: jax.tree.map(angular_update, before, after)",
        )
    if axes is not None:
        axes = normalize_axes("angular update", axes, jnp.ndim(before))
    return angle(promote(before), promote(after), axes)
