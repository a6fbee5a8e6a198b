"""How the variance of the residual stream grows with depth, derived from where the norms stand."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import array, checked, instance, sequence
from normlab._checks import promote
from normlab.errors import invalid
from normlab.placement.line import Learned, Placement

_PLACEMENTS = sequence(
    instance(Placement, "make one: Placement(inner=norm)", arrays=False),
    "placements, in the order of the branches",
    "pass [scheme.at(i, branch) for i in range(depth) for branch in ('attention', 'mlp')]",
)


@checked(
    "stream variance",
    placements=_PLACEMENTS,
    gain=array("a number, or one for each branch", most=1),
    start=array("a number", most=0),
)
def stream_variance(
    placements: Sequence[Placement], *, gain: ArrayLike = 1.0, start: ArrayLike = 1.0
) -> Array:
    """The variance of the stream before the first branch and after each, at initialization.

    It follows the line with three assumptions: a norm leaves variance 1, a branch multiplies the
    variance of what enters it by `gain`, and what it returns is not correlated with x:

        e = s²·(1 with I, or v)    o = 1 with O, or gain·e    v' = 1 with S, or α²v + β²o

    So a post-norm stream keeps 1, a pre-norm stream grows by `gain` with each branch, and one with
    outer norms by exactly 1. Where branches return what is not independent of x, as an attention
    that averages alike tokens does, what is measured grows otherwise.

    Args:
      placements: Those of all branches, in their order.
      gain: The variance gain of a branch, [] or one for each.
      start: The variance of the stream before the first.

    Returns:
      `[len(placements) + 1]`.

    >>> from normlab import get
    >>> from normlab.placement import Placement
    >>> stream_variance([Placement(inner=get("layer"))] * 3, gain=0.5).tolist()
    [1.0, 1.5, 2.0, 2.5]
    """
    gains = promote(gain)
    if gains.ndim and len(gains) != len(placements):
        given = f"{len(gains)} gains for {len(placements)} placements"
        raise invalid("stream variance", given, "one for each, or one number", "pass as many")
    gains = jnp.broadcast_to(gains, (len(placements),))
    found = [jnp.asarray(start, gains.dtype)]
    for placement, own in zip(placements, gains, strict=True):
        v = found[-1]
        skip, branch = (_value(g) for g in (placement.skip, placement.branch))
        if any(jnp.ndim(g) for g in (skip, branch, placement.scale)):
            change = (
                "pass the placements of stacked blocks one by one, jax.tree.map(lambda v: v[i])"
            )
            raise invalid("stream variance", f"{placement!r}", "gains of one number", change)
        entering = placement.scale**2 * (1 if placement.inner is not None else v)
        out = 1 if placement.outer is not None else own * entering
        skip = 1 - abs(branch) if placement.lerp else skip
        total = skip**2 * v + branch**2 * out
        found.append(jnp.ones_like(v) if placement.total is not None else total)
    return jnp.stack(found)


def _value(gain: Learned | float) -> float:
    return gain.init if isinstance(gain, Learned) else gain
