"""A small vision transformer: blocks of a transformer over the patches of an image."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from normlab.errors import invalid

from .block import Form
from .layers import Normed, scaled
from .transformer import Transformer


class Vit(Transformer):
    """A vision transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929), small.

        embed                    patches of 4×4 pixels, dense, 64
        class_token, positions   a learned token before the patches; a learned vector for each
        norm_first               where the scheme has one
        block{i}/q, k, v         dense, 64; attention with 4 heads;   block{i}/out    dense, 64
        block{i}/up              dense, 256, GELU;                    block{i}/down   dense, 64
        norm_last                where the scheme has one
        head                     the class token; dense, classes;     norm_logits

    There are 6 blocks. Around q … out and around up … down are residual connections,
    `block{i}/attention` and `block{i}/mlp`: where the norms stand is the scheme (`Transformer`),
    by default the paper's pre-norm.

    Attributes:
      patch: The side of a patch; divides the image's.
    """

    width: int = 64
    depth: int = 6
    mlp: Form = "gelu"
    use_bias: bool = True
    patch: int = 4

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Dense(self.width, name="embed")(self.patches(x))
        token = self.param("class_token", nn.initializers.zeros, (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        h = self.through(x, train).reshape(x.shape)[:, 0]
        init = scaled(Normed.kernel_init, self.plan.init_scale("head"))
        h = nn.Dense(self.classes, kernel_init=init, name="head")(h)
        return self.outside("norm_logits", h, train)

    def patches(self, x: Array) -> Array:
        """Cuts images [N, H, W, K] into patches [N, T, patch²·K]."""
        n, height, width, channels = x.shape
        if height % self.patch or width % self.patch:
            raise invalid(
                type(self).__name__,
                f"patch={self.patch}, images {x.shape}",
                "a patch that divides the image's sides",
                "change one of them",
            )
        x = x.reshape(
            n, height // self.patch, self.patch, width // self.patch, self.patch, channels
        )
        return x.swapaxes(2, 3).reshape(n, -1, self.patch**2 * channels)
