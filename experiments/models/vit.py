"""A small vision transformer."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

import normlab as nl
from normlab.errors import invalid

from .layers import Activation, Network, needs_kernel

LINEAR = ("qkv", "out", "up", "down")
"""The linear layers of a block."""


class Vit(Network):
    """A vision transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929), small.

        embed               patches of 4×4 pixels, dense, 64
        first, positions    a learned class token before the patches; a learned vector for each
        block{i}_norm0      norm;   block{i}_qkv, _out    attention with 4 heads;  + shortcut
        block{i}_norm1      norm;   block{i}_up, _down    dense, 256, GELU; dense, 64;  + shortcut
        last_norm           norm
        Dense_0             the class token; dense, classes

    There are 6 blocks.

    By default the norm stands where the paper has its layer norms: `block{i}_norm0`,
    `block{i}_norm1` and `last_norm`. A norm that looks at w or x has nothing to look at there; it
    stands in the linear layers of the blocks instead: `block{i}_qkv`, `_out`, `_up` and `_down`.
    `where` may name any of these. A norm's place that does not carry it is the identity.

    `placement` "before" is this pre-norm form, x + f(norm(x)), and "after" is post-norm,
    norm(x + f(x)), without `last_norm`. A linear layer before its activation is as in
    `Normed`; of those only `_up` has one, so after it a linear layer cannot carry the norm.

    Attributes:
      patch: The side of a patch; divides the image's.
      width: The size of the residual stream.
      depth: The number of blocks.
      heads: The number of heads; divides the width.
    """

    activation: Callable[[Array], Array] = nn.gelu
    patch: int = 4
    width: int = 64
    depth: int = 6
    heads: int = 4

    @property
    def layers(self) -> tuple[str, ...]:
        """`block0_norm0`, `block0_qkv` and so on; `norm`."""
        names = ("norm0", "qkv", "out", "norm1", "up", "down")
        last = ("last_norm",) if self.placement == "before" else ()
        return (*(f"block{i}_{name}" for i in range(self.depth) for name in names), *last)

    def carriers(self) -> frozenset[str]:
        """The names of the layers that carry the norm."""
        chosen = super().carriers()
        if self.where is None:
            linear = needs_kernel(self.norm, jnp.zeros((2, 2, self.width)))
            chosen = frozenset(name for name in chosen if name.endswith(LINEAR) == linear)
        if self.placement == "after" and any(name.endswith(LINEAR) for name in chosen):
            raise invalid(
                type(self).__name__,
                'placement="after" for the norm of a linear layer',
                "post-norm, norm(x + f(x)), is for norms of activations",
                'use placement="before", or let `where` choose norm0 and norm1',
            )
        return chosen

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        carriers = self.carriers()

        def norm(name: str, x: Array) -> Array:
            return Activation(self.norm, name=name)(x, train) if name in carriers else x

        def dense(name: str, x: Array, units: int, **options: Callable[[Array], Array]) -> Array:
            return self.layer(name, nl.Dense(), (x.shape[-1], units), **options)(x, train)

        def attention(block: str, x: Array) -> Array:
            q, k, v = jnp.split(dense(f"{block}_qkv", x, 3 * self.width), 3, axis=-1)
            split = (*x.shape[:2], self.heads, self.width // self.heads)
            h = jax.nn.dot_product_attention(*(v.reshape(split) for v in (q, k, v)))
            return dense(f"{block}_out", h.reshape(x.shape), self.width)

        def mlp(block: str, x: Array) -> Array:
            h = dense(f"{block}_up", x, 4 * self.width, activation=self.activation)
            return dense(f"{block}_down", h, self.width)

        def residual(name: str, f: Callable[[Array], Array], x: Array) -> Array:
            return x + f(norm(name, x)) if self.placement == "before" else norm(name, x + f(x))

        x = nn.Dense(self.width, name="embed")(self.patches(x))
        first = self.param("first", nn.initializers.zeros, (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, self.width)), x], axis=1)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for i in range(self.depth):
            block = f"block{i}"
            x = residual(f"{block}_norm0", lambda x, block=block: attention(block, x), x)
            x = residual(f"{block}_norm1", lambda x, block=block: mlp(block, x), x)
        return nn.Dense(self.classes)(norm("last_norm", x)[:, 0])

    def patches(self, x: Array) -> Array:
        """Cuts images [N, H, W, K] into patches [N, T, patch²·K]."""
        n, height, width, channels = x.shape
        if height % self.patch or width % self.patch or self.width % self.heads:
            raise invalid(
                type(self).__name__,
                f"patch={self.patch}, heads={self.heads}, width={self.width}, images {x.shape}",
                "a patch that divides the image's sides, and heads that divide the width",
                "change one of them",
            )
        x = x.reshape(
            n, height // self.patch, self.patch, width // self.patch, self.patch, channels
        )
        return x.swapaxes(2, 3).reshape(n, -1, self.patch**2 * channels)
