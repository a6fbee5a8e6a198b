"""A small decoder-only language model."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from .layers import Normed, scaled
from .transformer import Transformer


class Lm(Transformer):
    """A decoder-only language model, small: with the defaults a Llama of 0.8 million weights.

        embed              √C times one of V vectors [C] (Vaswani et al. 2017, section 3.4)
        norm_first         where the scheme has one
        block{i}/q, k, v   dense; turned by position (RoPE); causal attention;   block{i}/out
        block{i}/gate, up  dense, silu(gate)·up;                                 block{i}/down
        norm_last          where the scheme has one
        head               dense, V; the embedding itself where they are tied;   norm_logits

    There are 4 blocks of width 128 with 4 heads. Around q … out and around gate … down are residual
    connections, `block{i}/attention` and `block{i}/mlp`: where the norms stand on them, and inside,
    is the scheme (`Transformer`), pre-norm by default. The rotation is that of Su et al. 2021
    (https://arxiv.org/abs/2104.09864) on the two halves of a head, as in the weights of Llama on
    the Hugging Face hub; k and v may have fewer heads (Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245). Inputs are tokens `[N, T]`, outputs logits `[N, T, V]` in
    float32; `classes` is V.

    Attributes:
      tied: Whether the head is the embedding.
      context: How many tokens a token sees, itself included; `None` for all before it.
      rope: The base of the rotation's periods; `None` for no positions.
    """

    causal = text = True
    tied: bool = True
    context: int | None = None
    rope: float | None = 10_000.0

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        start = self.plan.init_scale
        init = scaled(nn.initializers.normal(self.width**-0.5), start("embed"))
        embed = nn.Embed(self.classes, self.width, embedding_init=init, name="embed")
        h = self.through(self.width**0.5 * embed(x), train)
        if self.tied:
            h = embed.attend(h)
        else:
            init = scaled(Normed.kernel_init, start("head"))
            h = nn.Dense(self.classes, use_bias=False, kernel_init=init, name="head")(h)
        h = self.outside("norm_logits", h.astype(jnp.promote_types(h.dtype, jnp.float32)), train)
        return h.reshape(*x.shape, self.classes)
