"""Synced batch norms of other libraries, as norms that the models here take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax import Array

import normlab as nl

Axes = str | tuple[str, ...] | None
"""Mapped axes: one, several or none."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Peer(nl.Norm):
    """A norm that is known as a whole, and not by its parts.

    Attributes:
      call: As `Norm.apply`.
    """

    call: Callable[..., tuple[Array, Any]]

    def apply(
        self,
        params: Any,
        state: Any,
        site: nl.Site,
        *,
        train: bool,
        residual: Any = None,
        activation: Any = None,
    ) -> tuple[Array, Any]:
        """What the other library makes of it."""
        h, state = self.call(params, state, site, train=train)
        h = h if residual is None else h + residual
        return h if activation is None else activation(h), state

    def _key(self) -> Any:
        return self.init, self.call


def flax_batch_norm(axis_name: Axes) -> Peer:
    """flax.linen.BatchNorm with its defaults: one pass, E[x²] − E[x]², one psum.

    Its parameters and running statistics are in the places of those of `nl.get("batch")`.

    Args:
      axis_name: The mapped axes over which it averages its statistics.
    """
    own = nl.get("batch")
    several: Any = axis_name  # which Flax takes, though it does not say so
    layer = nn.BatchNorm(axis_name=several, parent=None)  # of no model that is being called

    def call(params: Any, state: Any, site: nl.Site, *, train: bool) -> tuple[Array, Any]:
        variables = {
            "params": {"scale": params.g, "bias": params.b},
            "batch_stats": {"mean": state.mean, "var": state.var},
        }
        out: Any = layer.apply(
            variables, site.a, use_running_average=not train, mutable=["batch_stats"]
        )
        return out[0], state._replace(**out[1]["batch_stats"])

    return Peer(own.init, own.parts, call=call)


PEERS: dict[str, Callable[[Axes], Peer]] = {"flax": flax_batch_norm}
"""What makes each for the axes that it is synced over."""
