"""A residual connection as a module of `flax.nnx`: where its norms stand is one attribute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import is_array
from normlab._flax.layers import PLACEMENT, as_gains, branch_of, gains_of, same_kind
from normlab._flax.words import check_mode, checked, read
from normlab.errors import invalid
from normlab.nnx.replace import RegistryNorm
from normlab.placement.line import Call, Connection, connect
from normlab.placement.line import Residual as Fields


class Residual(nnx.Module):
    """A residual connection, `normlab.placement.residual`: x' = S(α·x + β·O(F(s·I(x)))).

    The norms are the attributes `inner`, `outer`, `total` (and `read`, of two streams), each a
    `RegistryNorm`; a learned gain is `skip` or `branch`, an `nnx.Param`; of streams `read`, `skip`
    and `branch` hold `static`, `kernel` and `scale`. What is absent is `None`.

    >>> from normlab.placement import scheme
    >>> class Block(nnx.Module):
    ...     def __init__(self, rngs):
    ...         mlp = nnx.Sequential(
    ...             nnx.Linear(8, 32, rngs=rngs), nnx.gelu, nnx.Linear(32, 8, rngs=rngs)
    ...         )
    ...         self.mlp = Residual(scheme("peri", depth=12).at(3, "mlp"), 8, mlp)
    ...
    ...     def __call__(self, x):
    ...         return self.mlp(x)
    >>> block = Block(nnx.Rngs(0))
    >>> block(jnp.ones((2, 8))).shape, block.mlp.outer.scale.shape, block.mlp.total
    ((2, 8), (8,), None)
    """

    @checked("Residual", placement=PLACEMENT)
    def __init__(
        self,
        placement: Connection,
        num_features: int,
        layer_instance: Callable[..., Any] | None = None,
        *,
        out_features: int | None = None,
        use_running_average: bool | None = False,
    ) -> None:
        """Makes the variables.

        Args:
          placement: Where the norms stand: a `Placement`, a `HyperConnection` or a `Siamese`.
          num_features: The number of channels, of one stream.
          layer_instance: F, a module or a function; here or at call time.
          out_features: The number of channels behind a shortcut; `None` for `num_features`.
          use_running_average: As in `BatchNorm`, of the norms with a state.
        """
        arrays = any(map(is_array, jax.tree.leaves(placement)))
        self.placement = nnx.data(placement) if arrays else placement
        self.num_features = num_features
        self.out_features = num_features if out_features is None else out_features
        self.layer_instance = layer_instance
        for name in Fields._fields:
            setattr(self, name, nnx.data(None))

        def norm(name: str, a: Any, channel_axis: int = -1) -> None:
            del channel_axis
            if (made := getattr(placement, name)) is not None:
                mode = use_running_average
                setattr(self, name, RegistryNorm(made, a.shape[-1], use_running_average=mode))

        streams = () if placement.streams is None else (placement.streams,)
        some: Any = jax.ShapeDtypeStruct((2, *streams, num_features), jnp.float32)
        wider = None
        if out_features is not None:
            wider = lambda h: jnp.zeros((*h.shape[:-1], out_features), h.dtype)  # noqa: E731
        placement.init(some, Call(norm, shortcut=wider))
        for name, gain in gains_of(placement, some, wider).items():
            setattr(self, name, nnx.data(jax.tree.map(nnx.Param, gain)))

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
        """Returns x'; arguments as those of `normlab.linen.Residual`."""
        where = f"Residual of {self.num_features} features"
        of = same_kind(where, self.placement, placement)
        x = jnp.asarray(read(where, "x", x))
        if x.shape[-1:] != (self.num_features,):
            change = "set num_features to the number of channels"
            raise invalid(where, f"an input of shape {x.shape}", "as many channels", change)
        F = branch_of(where, self.layer_instance, layer_instance, **kwargs)
        check_mode(where, use_running_average)

        def norm(name: str, a: Array, channel_axis: int = -1) -> Array:
            del channel_axis
            made = getattr(self, name)
            return a if made is None else made(a, use_running_average, mask=mask)

        fields = {name: getattr(self, name) for name in ("skip", "branch", "read")}
        kept = {n: v for n, v in fields.items() if not isinstance(v, RegistryNorm | None)}
        is_one = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
        gains = jax.tree.map(lambda v: v[...], kept, is_leaf=is_one)
        beside = None if shortcut is None else self._beside(where, shortcut)
        return connect(of, as_gains(gains), x, norm, F, beside)

    def _beside(self, where: str, shortcut: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """A shortcut that raises ValueError where it makes other channels than were promised."""

        def checked_shortcut(x: Array) -> Array:
            beside = jnp.asarray(shortcut(x))
            if beside.shape[-1:] != (self.out_features,):
                given = f"a shortcut that makes {beside.shape}"
                change = f"set out_features={beside.shape[-1]}"
                raise invalid(where, given, f"{self.out_features} channels", change)
            return beside

        return checked_shortcut
