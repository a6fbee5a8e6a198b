"""The residual networks of CIFAR."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from .feedforward import HE
from .layers import Network, conv


class ResNet(Network):
    """The CIFAR ResNet of He et al. 2015, section 4.2 (https://arxiv.org/abs/1512.03385).

        stem                         3×3, 16 channels, ReLU
        stage0_block{0…n−1}_conv0    3×3, 16, ReLU       _conv1    3×3, 16, + shortcut, ReLU
        stage1_block{0…n−1}_conv0    3×3, 32, ReLU       _conv1    3×3, 32, + shortcut, ReLU
        stage2_block{0…n−1}_conv0    3×3, 64, ReLU       _conv1    3×3, 64, + shortcut, ReLU
        Dense_0                      mean over all positions; dense, classes

    6n + 2 layers: n = 3, 5, 9, 18 are ResNet-20, 32, 56 and 110. The first convolution of stages 1
    and 2 has stride 2. The shortcut is the identity; where the size changes it takes every other
    position and pads the new channels with zeros (the paper's option A), so it has no parameters.

    The norm stands in every convolution. Before the activation, a block is the paper's:
    relu(norm(w·y) + x). After it, the norm moves behind the same ReLU: norm(relu(w·y + b + x));
    there instance norm leaves the last mean over all positions nothing but its bias.

    Attributes:
      n: The blocks of each stage.
      widths: The channels of each stage.
    """

    n: int = 3
    widths: tuple[int, ...] = (16, 32, 64)

    @property
    def layers(self) -> tuple[str, ...]:
        """`stem`, `stage0_block0_conv0` and so on."""
        blocks = (f"stage{s}_block{i}" for s in range(len(self.widths)) for i in range(self.n))
        return ("stem", *(f"{block}_conv{j}" for block in blocks for j in (0, 1)))

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def layer(name: str, x: Array, width: int, strides: int = 1, **added: Array) -> Array:
            shape = (3, 3, x.shape[-1], width)
            options = {"activation": self.activation, "kernel_init": HE}
            return self.layer(name, conv(strides=strides), shape, **options)(x, train, **added)

        x = layer("stem", x, self.widths[0])
        for s, width in enumerate(self.widths):
            for i in range(self.n):
                strides = 2 if s and not i else 1
                y = layer(f"stage{s}_block{i}_conv0", x, width, strides)
                x = layer(f"stage{s}_block{i}_conv1", y, width, added=shortcut(x, strides, width))
        return nn.Dense(self.classes)(x.mean((1, 2)))


def shortcut(x: Array, strides: int, width: int) -> Array:
    """Every so many positions of `x [N, H, W, K]`, padded with zeros to `width` channels."""
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])
