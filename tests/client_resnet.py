"""A client of the Flax skins: ResNet-50 for ImageNet, in plain Flax, with the norm as an argument.

He et al. 2015 (https://arxiv.org/abs/1512.03385), table 1, in the form known as v1.5: the stride of
a block that halves the image is in its 3×3 convolution. Nothing here knows of normlab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

ModuleDef = Any


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, the last with four times the filters, and a shortcut."""

    filters: int
    strides: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.act(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = self.conv(self.filters, (3, 3), (self.strides, self.strides))(y)
        y = self.act(self.norm()(y))
        y = self.conv(4 * self.filters, (1, 1))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)  # starts as the identity
        if x.shape != y.shape:
            strides = (self.strides, self.strides)
            x = self.conv(4 * self.filters, (1, 1), strides, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x)
        return self.act(x + y)


class ResNet(nn.Module):
    """A 7×7 convolution and a max pool, each of stride 2, four stages of blocks, one dense layer.

    Attributes:
      stages: The blocks of each stage.
      classes: The size of the output.
      filters: The channels of the first convolution; they double with each stage.
      batch_norm: The class of the norm, `nn.BatchNorm` or one with its interface.
      momentum: The weight of the old value in the running statistics.
      dtype: The type of the computation.
      act: The activation.
    """

    stages: tuple[int, ...]
    classes: int
    filters: int = 64
    batch_norm: ModuleDef = nn.BatchNorm
    momentum: float = 0.9
    dtype: Any = jnp.float32
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            self.batch_norm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        x = conv(self.filters, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="first_conv")(x)
        x = self.act(norm(name="first_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                x = Bottleneck(self.filters * 2**stage, strides, conv, norm, self.act)(x)
        x = x.mean((1, 2))
        return jnp.asarray(nn.Dense(self.classes, dtype=self.dtype)(x), self.dtype)


ResNet50 = functools.partial(ResNet, stages=(3, 4, 6, 3))
