"""A residual connection as a module of `flax.linen`: where its norms stand is one attribute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._checks import result_dtype
from normlab._flax.layers import PLACEMENT, as_gains, branch_of, gains_of, same_kind
from normlab._flax.words import check_mode, checked, read
from normlab.linen.norms import layer, merged_mode
from normlab.linen.replace import RegistryNorm
from normlab.placement.line import Connection, connect


@checked("Residual", placement=PLACEMENT)
class Residual(nn.Module):
    """A residual connection, `normlab.placement.residual`: x' = S(α·x + β·O(F(s·I(x)))).

    The norms are the modules `inner`, `outer`, `total` (and `read`, of two streams), each a
    `RegistryNorm`; a learned gain is the parameter `skip` or `branch`; of streams `read`, `skip`
    and `branch` hold `static`, `kernel` and `scale`. The branch F keeps its own variables where it
    has them. Channels are last.

    Attributes:
      placement: Where the norms stand: a `Placement`, a `HyperConnection` or a `Siamese`.
      layer_instance: F, a module or a function; here or at call time.
      use_running_average: As in `BatchNorm`, for norms with a state; here or at call time.

    >>> from normlab.placement import scheme
    >>> class Block(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         mlp = nn.Sequential([nn.Dense(32), nn.gelu, nn.Dense(x.shape[-1])])
    ...         return Residual(scheme("peri", depth=12).at(3, "mlp"))(x, mlp)
    >>> params = Block().init(jax.random.key(0), jnp.ones((2, 8)))["params"]
    >>> jax.tree.map(jnp.shape, params["Residual_0"])
    {'inner': {'bias': (8,), 'scale': (8,)}, 'outer': {'bias': (8,), 'scale': (8,)}}
    """

    placement: Connection
    layer_instance: Callable[..., Any] | None = None
    use_running_average: bool | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        layer_instance: Callable[..., Any] | None = None,
        use_running_average: bool | None = None,
        *,
        shortcut: Callable[[Array], Array] | None = None,
        mask: Any = None,
        placement: Connection | None = None,
        **kwargs: Any,
    ) -> Array:
        """Returns x'.

        Args:
          x: `[N, ..., C]`, or streams `[N, ..., S, C]`.
          layer_instance: As the attribute.
          use_running_average: As the attribute.
          shortcut: What x goes through beside the branch, where that changes the shape.
          mask: What counts in the norms' statistics: see `BatchNorm`. Of streams it is aligned with
            the first axes.
          placement: One of the same norms and gains in the place of the attribute: that of this
            block in a scan over blocks.
          **kwargs: For F.
        """
        where = layer(self)
        of = same_kind(where, self.placement, placement)
        x = jnp.asarray(read(where, "x", x))
        F = branch_of(where, self.layer_instance, layer_instance, **kwargs)
        check_mode(where, use_running_average)
        mode = self.use_running_average
        if use_running_average is not None:
            mode = merged_mode(self, where, use_running_average)

        def norm(name: str, a: Array, channel_axis: int = -1) -> Array:
            del channel_axis
            made = getattr(of, name)
            return a if made is None else RegistryNorm(made, name=name)(a, mode, mask=mask)

        known: Any = None
        if shortcut is not None:  # once: it may be a module, which no abstract call may reach
            beside = jnp.asarray(shortcut(x))
            known = lambda _: beside  # noqa: E731
        some = jax.ShapeDtypeStruct(x.shape, result_dtype(x))
        gains = gains_of(of, some, known)
        gains = {n: self.param(n, lambda _, v=v: v) for n, v in gains.items()}
        return connect(of, as_gains(gains), x, norm, F, known)
