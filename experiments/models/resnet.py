"""The residual networks of CIFAR."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

import normlab as nl

from .feedforward import HE
from .layers import Activation, Branch, Network, Normed, conv, scaled


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

    With a `scheme` the blocks are pre-activation ones (He et al. 2016,
    https://arxiv.org/abs/1603.05027): x' = S(αx + βO(F(s·I(x)))) with the branch F =
    conv1(relu(conv0(relu(·)))), no ReLU behind the sum, and one before the mean. The scheme's norms
    stand beside that of the convolutions, which `where` chooses: `scheme="pre",
    where="stem|.*conv0"` is the paper's. Without norms, `norm="none"` leaves the convolutions a
    bias: `"skipinit"`, `"rezero"`, `"fixup"`; `"nfnet"` goes with `norm="weight_standardization"`.

        stage{s}_block{i}                       I, O, S, α and β
        stage{s}_block{i}/norm_up, /norm_down   behind conv0 and before conv1, where it has them
        norm_first, norm_last                   behind the stem, before the last ReLU

    Attributes:
      n: The blocks of each stage.
      widths: The channels of each stage.
      scheme: Where norms stand on the residual connections; `None` for the paper's x + F(x).
    """

    n: int = 3
    widths: tuple[int, ...] = (16, 32, 64)
    scheme: str | nl.placement.Scheme | None = None

    @property
    def blocks(self) -> tuple[str, ...]:
        """`stage0_block0` and so on."""
        return tuple(f"stage{s}_block{i}" for s in range(len(self.widths)) for i in range(self.n))

    @property
    def layers(self) -> tuple[str, ...]:
        """`stem`, `stage0_block0_conv0` and so on."""
        return ("stem", *(f"{block}_conv{j}" for block in self.blocks for j in (0, 1)))

    @property
    def plan(self) -> nl.placement.Scheme | None:
        """The scheme, of blocks of one branch each."""
        if not isinstance(self.scheme, str):
            return self.scheme
        stages = tuple(range(0, len(self.blocks), self.n))
        more: dict[str, dict[str, Any]] = {
            "fixup": {"branches": 1},
            "keel": {"branches": 1},
            "nfnet": {"branches": 1, "stages": stages},
        }
        options = more.get(self.scheme, {})
        return nl.placement.scheme(self.scheme, norm=self.norm, depth=len(self.blocks), **options)

    @property
    def connections(self) -> list[nl.placement.Placement]:
        """That of each block."""
        plan = self.plan
        if plan is None:
            return [nl.placement.Placement()] * len(self.blocks)
        return [plan.at(i) for i in range(len(self.blocks))]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        plan, f = self.plan, self.activation

        def layer(name: str, x: Array, width: int, strides: int = 1, **options: Any) -> Normed:
            options = {"kernel_init": HE, **options}
            return self.layer(name, conv(strides=strides), (3, 3, x.shape[-1], width), **options)

        def paper(name: str, x: Array, width: int, strides: int) -> Array:
            y = layer(f"{name}_conv0", x, width, strides, activation=f)(x, train)
            beside = functools.partial(shortcut, strides=strides, width=width)
            plain, branch = self.connections[0], Branch(name=name)
            connect = lambda y: branch(plain, lambda _: y, x, train, beside)  # noqa: E731
            return layer(f"{name}_conv1", y, width, activation=f)(y, train, connect=connect)

        def preactivated(
            plan: nl.placement.Scheme, i: int, x: Array, width: int, strides: int
        ) -> Array:
            name, within = self.blocks[i], plan.inside(i)
            init = {n: scaled(HE, plan.init_scale(n)) for n in ("up", "down")}

            def branch(x: Array) -> Array:
                x, up = f(x), within.get("up")
                options = {"activation": None if up else f, "kernel_init": init["up"]}
                y = layer(f"{name}_conv0", x, width, strides, **options)(x, train)
                y = f(normed("norm_up", up, y, train)) if up else y
                y = normed("norm_down", within.get("down"), y, train)
                return layer(f"{name}_conv1", y, width, kernel_init=init["down"])(y, train)

            beside = functools.partial(shortcut, strides=strides, width=width)
            return Branch(name=name)(self.connections[i], branch, x, train, beside)

        x = layer("stem", x, self.widths[0], activation=None if plan else f)(x, train)
        x = normed("norm_first", plan and plan.first, x, train)
        for i, name in enumerate(self.blocks):
            stage, of_stage = divmod(i, self.n)
            size = (self.widths[stage], 1 if of_stage or not stage else 2)
            x = preactivated(plan, i, x, *size) if plan else paper(name, x, *size)
        x = f(normed("norm_last", plan.last, x, train)) if plan else x
        init = scaled(Normed.kernel_init, plan.init_scale("head") if plan else 1.0)
        return nn.Dense(self.classes, kernel_init=init)(x.mean((1, 2)))


def normed(name: str, norm: nl.Norm | None, x: Array, train: bool) -> Array:
    """The norm of an activation, if there is one."""
    return x if norm is None else Activation(norm, name=name)(x, train)


def shortcut(x: Array, strides: int, width: int) -> Array:
    """Every so many positions of `x [N, H, W, K]`, padded with zeros to `width` channels."""
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])
