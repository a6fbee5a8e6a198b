"""The block of a transformer: an attention and an MLP, each with its residual connection.

Every token is an example: between the layers stands `[N·T, C]`, inside the attention `[N·T, H, D]`.
So a norm of activations never looks at another token, but for the statistics of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import normlab as nl

from .layers import DEPTH, NONE, Activation, Branch, Normed, scaled

BRANCHES = ("attention", "mlp")
"""The branches of a block."""

LINEAR = ("q", "k", "v", "out", "gate", "up", "down")
"""The linear layers of a block."""

Form = Literal["swiglu", "gelu"]
"""The MLP: down(silu(gate(x))·up(x)) (Shazeer 2020, https://arxiv.org/abs/2002.05202), or
down(gelu(up(x)))."""

NOTHING = nl.get("none", use_bias=False)
"""What stands in a linear layer without a norm where there are no biases."""


class Sizes(NamedTuple):
    """What a block is beside its norms; see `Transformer` and `Lm`.

    Attributes:
      length: T.
      causal: Whether a token sees none behind it.
      start: By what the initial kernel of a linear layer is multiplied.
    """

    width: int
    heads: int
    kv_heads: int
    hidden: int
    gated: bool
    activation: Callable[[Array], Array]
    use_bias: bool
    implementation: Literal["xla", "cudnn"] | None
    length: int
    causal: bool
    context: int | None
    rope: float | None
    start: Callable[[str], float]


class Block(nn.Module):
    """An attention and an MLP, each with its residual connection.

    Into `DEPTH` it sows `nl.instruments.stream_statistics` behind each, `after_attention` and
    `after_mlp`, of every sequence and, if there are several, stream; and `attention_statistics` of
    every sequence and head, `heads`. They are taken where somebody asks for that collection, and
    the streams themselves are not kept.

    Attributes:
      norms: The norms of the linear layers, and those inside the branches: `norm_q` and so on.
      sizes: All else.
    """

    norms: Mapping[str, nl.Norm]
    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: Array, placements: Mapping[str, nl.placement.Placement], train: bool
    ) -> Array:
        for name, branch in (("attention", self.attention), ("mlp", self.mlp)):
            x = Branch(name=name)(placements[name], lambda x, f=branch: f(x, train), x, train)
            stream = jnp.moveaxis(x.reshape(-1, self.sizes.length, *x.shape[1:]), 1, -2)
            self.show(f"after_{name}", nl.instruments.stream_statistics, stream)
        return x

    def show(self, name: str, measure: Callable[..., Any], *values: Array) -> None:
        """Sows into `DEPTH` what is measured of the values."""
        if self.is_mutable_collection(DEPTH) and not self.is_initializing():
            self.sow(DEPTH, name, measure(*map(lax.stop_gradient, values)))

    def attention(self, x: Array, train: bool) -> Array:
        """Of tokens [N·T, C]; q, k and v are normalized by head, and turned behind it."""
        s = self.sizes
        size = s.width // s.heads
        heads = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
        q, k, v = (
            self.norm(n, self.dense(n, x, h * size, train).reshape(-1, h, size), train)
            for n, h in heads.items()
        )
        q, k, v = (a.reshape(-1, s.length, *a.shape[1:]) for a in (q, k, v))
        if s.rope is not None:
            q, k = rotate(q, s.rope), rotate(k, s.rope)
        self.show("heads", self.attention_statistics, q, k)
        window = None if s.context is None else (s.context - 1, 0)
        h = jax.nn.dot_product_attention(
            q, k, v, is_causal=s.causal, local_window_size=window, implementation=s.implementation
        )
        h = self.norm("heads", h.reshape(-1, s.heads, size), train).reshape(-1, s.width)
        return self.dense("out", self.norm("out", h, train), s.width, train)

    def attention_statistics(self, q: Array, k: Array) -> nl.instruments.AttentionStatistics:
        """Of queries [N, T, H, D] and keys [N, T, K, D] as they enter the attention."""
        s, t = self.sizes, jnp.arange(self.sizes.length)
        near = None if s.context is None else t[:, None] - t < s.context
        return nl.instruments.attention_statistics(q, k, mask=near, is_causal=s.causal)

    def mlp(self, x: Array, train: bool) -> Array:
        """Of tokens [N·T, C]."""
        s = self.sizes
        h = self.dense("gate" if s.gated else "up", x, s.hidden, train, s.activation)
        h = h * self.dense("up", x, s.hidden, train) if s.gated else h
        return self.dense("down", self.norm("down", h, train), s.width, train)

    def dense(
        self,
        name: str,
        x: Array,
        units: int,
        train: bool,
        activation: Callable[[Array], Array] | None = None,
    ) -> Array:
        """The linear layer of that name; of the MLP's first ones with a norm behind it."""
        behind = name in ("up", "gate") and f"norm_{name}" in self.norms
        layer = Normed(
            nl.Dense(),
            self.norms.get(name, NONE if self.sizes.use_bias else NOTHING),
            (x.shape[-1], units),
            activation=None if behind else activation,
            kernel_init=scaled(Normed.kernel_init, self.sizes.start(name)),
            name=name,
        )
        h = layer(x, train)
        if not behind:
            return h
        h, f = self.norm(name, h, train), activation
        return h if f is None or self.norms[f"norm_{name}"].fused else f(h)

    def norm(self, place: str, x: Array, train: bool) -> Array:
        """The norm inside a branch, if one stands there."""
        name = f"norm_{place}"
        return Activation(self.norms[name], name=name)(x, train) if name in self.norms else x


def rotate(x: Array, base: float) -> Array:
    """RoPE: turns the pairs (x_i, x_{i+D/2}) of `x [N, T, H, D]` by t·base^(−2i/D), in float32.

    >>> np.asarray(rotate(jnp.ones((1, 2, 1, 2)), 10_000.0), float)[0, :, 0].round(3).tolist()
    [[1.0, 1.0], [-0.301, 1.382]]
    """
    half, dtype = x.shape[-1] // 2, jnp.promote_types(x.dtype, jnp.float32)
    # NumPy's, and so constants of the program: a scan over blocks would compile loops for them.
    angles = np.arange(x.shape[1])[:, None, None] * base ** (-np.arange(half) / half)
    cos, sin = (jnp.asarray(f(angles), dtype) for f in (np.cos, np.sin))
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
