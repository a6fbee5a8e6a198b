"""Networks without shortcuts: a perceptron, a small conv net, VGG-small and network in network."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
from jax import Array

import normlab as nl

from .layers import Network, conv

HE = nn.initializers.he_normal()


class Mlp(Network):
    """The network of figure 1 in Ioffe & Szegedy (2015): three layers of 100 sigmoids.

        Normed_0 … Normed_2    dense, 100, sigmoid
        Dense_0                dense, classes

    The norm stands in the hidden layers, before each sigmoid by default.

    Attributes:
      widths: The units of the hidden layers.
      dropout: The share of each hidden layer's outputs that training leaves out.
      normed_output: Whether the output layer may carry the norm too, as the last `Normed_i`.
    """

    flat = True
    widths: tuple[int, ...] = (100, 100, 100)
    activation: Callable[[Array], Array] = nn.sigmoid
    dropout: float = 0.0
    normed_output: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """`Normed_0` and so on."""
        return tuple(f"Normed_{i}" for i in range(len(self.widths) + self.normed_output))

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = x.reshape(x.shape[0], -1)
        for name, width in zip(self.layers, self.widths, strict=False):
            shape = (x.shape[-1], width)
            x = self.layer(name, nl.Dense(), shape, activation=self.activation)(x, train)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if self.normed_output:
            return self.layer(self.layers[-1], nl.Dense(), (x.shape[-1], self.classes))(x, train)
        return nn.Dense(self.classes)(x)


class ConvNet(Network):
    """A small ReLU conv net: three 3×3 convolutions of stride 2, then a dense output layer.

        Normed_0 … Normed_2    3×3 convolution, stride 2 (1 on 2×2 pixels), 8 · 2^i channels, ReLU
        Dense_0                dense, classes

    The norm stands in the convolutions, before each ReLU by default.

    Attributes:
      widths: The channels of the convolutions.
    """

    widths: tuple[int, ...] = (8, 16, 32)

    @property
    def layers(self) -> tuple[str, ...]:
        """`Normed_0` and so on."""
        return tuple(f"Normed_{i}" for i in range(len(self.widths)))

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for name, width in zip(self.layers, self.widths, strict=True):
            shape = (3, 3, x.shape[-1], width)
            strides = 2 if x.shape[1] > 2 else 1  # one pixel is no sample for instance norm
            x = self.layer(name, conv(strides=strides), shape, activation=self.activation)(x, train)
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


class Vgg(Network):
    """VGG-small: the VGG of CIFAR-10, with six convolutions and one dense layer.

        conv0, conv1    3×3, 128 channels, ReLU; 2×2 max pool
        conv2, conv3    3×3, 256 channels, ReLU; 2×2 max pool
        conv4, conv5    3×3, 512 channels, ReLU; 2×2 max pool
        Dense_0         dense, classes

    The blocks are those of Simonyan & Zisserman 2015 (https://arxiv.org/abs/1409.1556); the size is
    that of Cai et al. 2017 (https://arxiv.org/abs/1702.00953): 4.6 million weights. The norm stands
    in every convolution.

    Attributes:
      widths: The channels of each block.
      depth: Convolutions in each block.
    """

    widths: tuple[int, ...] = (128, 256, 512)
    depth: int = 2

    @property
    def layers(self) -> tuple[str, ...]:
        """`conv0` and so on."""
        return tuple(f"conv{i}" for i in range(self.depth * len(self.widths)))

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for i, name in enumerate(self.layers):
            shape = (3, 3, x.shape[-1], self.widths[i // self.depth])
            layer = self.layer(name, conv(), shape, activation=self.activation, kernel_init=HE)
            x = layer(x, train)
            if (i + 1) % self.depth == 0:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


class Nin(Network):
    """Network in network (Lin, Chen & Yan 2014, https://arxiv.org/abs/1312.4400), for CIFAR-10.

        block0_conv, _mlp0, _mlp1    5×5, 192; 1×1, 160; 1×1, 96; 3×3 max pool, stride 2
        block1_conv, _mlp0, _mlp1    5×5, 192; 1×1, 192; 1×1, 192; 3×3 max pool, stride 2
        block2_conv, _mlp0           3×3, 192; 1×1, 192
        Dense_0                      1×1, classes; mean over all positions

    A ReLU follows every layer but the last: 0.97 million parameters. The paper's dropout between
    the blocks is left out: what is compared here is the norm, which stands in every layer but the
    last.

    Attributes:
      widths: The channels of each block's layers; the first of each is the convolution.
    """

    widths: tuple[tuple[int, ...], ...] = ((192, 160, 96), (192, 192, 192), (192, 192))

    @property
    def layers(self) -> tuple[str, ...]:
        """`block0_conv`, `block0_mlp0` and so on."""
        return tuple(
            f"block{i}_mlp{j - 1}" if j else f"block{i}_conv"
            for i, block in enumerate(self.widths)
            for j in range(len(block))
        )

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        names = iter(self.layers)
        last = len(self.widths) - 1
        for i, block in enumerate(self.widths):
            window = 3 if i == last else 5
            for j, width in enumerate(block):
                linear, size = (nl.Dense(), ()) if j else (conv(), (window, window))
                shape = (*size, x.shape[-1], width)
                x = self.layer(
                    next(names), linear, shape, activation=self.activation, kernel_init=HE
                )(x, train)
            if i < last:
                x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        return nn.Dense(self.classes)(x).mean((1, 2))
