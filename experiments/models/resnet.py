"""The residual networks of CIFAR and ImageNet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

import normlab as nl

from .feedforward import HE
from .layers import Activation, Branch, Network, Normed, conv, scaled


class ResNet(Network):
    """The ResNets of He et al. 2015 (https://arxiv.org/abs/1512.03385): CIFAR's, and ImageNet's.

        stem                         3×3, 16 channels, ReLU
        stage0_block{0…n−1}_conv0    3×3, 16, ReLU       _conv1    3×3, 16, + shortcut, ReLU
        stage1_block{0…n−1}_conv0    3×3, 32, ReLU       _conv1    3×3, 32, + shortcut, ReLU
        stage2_block{0…n−1}_conv0    3×3, 64, ReLU       _conv1    3×3, 64, + shortcut, ReLU
        Dense_0                      mean over all positions; dense, classes

    6n + 2 layers: n = 3, 5, 9, 18 are ResNet-20, 32, 56 and 110. The first convolution of stages 1
    and 2 has stride 2. The shortcut is the identity; where the size changes it takes every other
    position and pads the new channels with zeros (the paper's option A), so it has no parameters.

    With `bottleneck` it is that of section 4.1, for images of 224×224; n = (3, 4, 6, 3) and widths
    (64, 128, 256, 512) are ResNet-50, of 53 norms:

        stem                         7×7, stride 2, 64 channels, ReLU; maxima of 3×3, stride 2
        stage0_block{i}_conv0        1×1, 64, ReLU       _conv1    3×3, 64, ReLU
        stage0_block{i}_conv2        1×1, 256, + shortcut, ReLU

    The stride is that of the 3×3 convolution, as in most codes (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677); where the size changes the shortcut is a 1×1 convolution,
    `stage{s}_block0_shortcut` (option B).

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
        stage{s}_block{i}/norm_up, /norm_down   behind the first and before the last convolution
        norm_first, norm_last                   behind the stem, before the last ReLU

    Attributes:
      n: The blocks of each stage, one number or one for each.
      widths: The channels of each stage; of a bottleneck those of its 3×3 convolution.
      bottleneck: Whether the net is ImageNet's.
      scheme: Where norms stand on the residual connections; `None` for the paper's x + F(x).
    """

    n: int | tuple[int, ...] = 3
    widths: tuple[int, ...] = (16, 32, 64)
    bottleneck: bool = False
    scheme: str | nl.placement.Scheme | None = None

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Of each block its stage, and its number in it."""
        counts = (self.n,) * len(self.widths) if isinstance(self.n, int) else self.n
        stages = zip(self.widths, counts, strict=True)
        return tuple((s, i) for s, (_, count) in enumerate(stages) for i in range(count))

    @property
    def blocks(self) -> tuple[str, ...]:
        """`stage0_block0` and so on."""
        return tuple(f"stage{s}_block{i}" for s, i in self.places)

    @property
    def layers(self) -> tuple[str, ...]:
        """`stem`, `stage0_block0_conv0` and so on."""
        convs = [f"conv{j}" for j in range(3 if self.bottleneck else 2)]
        first = [*convs, "shortcut"] if self.bottleneck else convs
        of = {name: convs if i else first for name, (_, i) in self._named()}
        return ("stem", *(f"{block}_{layer}" for block in self.blocks for layer in of[block]))

    def _named(self) -> Iterator[tuple[str, tuple[int, int]]]:
        return zip(self.blocks, self.places, strict=True)

    @property
    def plan(self) -> nl.placement.Scheme | None:
        """The scheme, of blocks of one branch each."""
        if not isinstance(self.scheme, str):
            return self.scheme
        stages = tuple(k for k, (_, i) in enumerate(self.places) if i == 0)
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

        def layer(name: str, x: Array, size: Size, connect: Any = None, **options: Any) -> Array:
            options = {"kernel_init": HE, **options}
            shape = (size.window, size.window, x.shape[-1], size.width)
            made = self.layer(name, conv(strides=size.strides), shape, **options)
            return made(x, train, connect=connect)

        def beside(name: str, x: Array, sizes: Sequence[Size]) -> Callable[[Array], Array]:
            width, strides = sizes[-1].width, max(size.strides for size in sizes)
            if f"{name}_shortcut" not in self.layers:
                return functools.partial(shortcut, strides=strides, width=width)
            y = layer(f"{name}_shortcut", x, Size(1, width, strides))
            return lambda _: y

        def paper(name: str, x: Array, sizes: Sequence[Size]) -> Array:
            y, last = x, len(sizes) - 1
            for j, size in enumerate(sizes[:-1]):
                y = layer(f"{name}_conv{j}", y, size, activation=f)
            side = beside(name, x, sizes)
            plain, branch = self.connections[0], Branch(name=name)
            connect = lambda y: branch(plain, lambda _: y, x, train, side)  # noqa: E731
            return layer(f"{name}_conv{last}", y, sizes[-1], activation=f, connect=connect)

        def preactivated(
            plan: nl.placement.Scheme, i: int, x: Array, sizes: Sequence[Size]
        ) -> Array:
            name, within, last = self.blocks[i], plan.inside(i), len(sizes) - 1
            init = {n: scaled(HE, plan.init_scale(n)) for n in ("up", "down")}

            def branch(x: Array) -> Array:
                x, up = f(x), within.get("up")
                options = {"activation": None if up else f, "kernel_init": init["up"]}
                y = layer(f"{name}_conv0", x, sizes[0], **options)
                y = f(normed("norm_up", up, y, train)) if up else y
                for j in range(1, last):
                    y = layer(f"{name}_conv{j}", y, sizes[j], activation=f, kernel_init=init["up"])
                y = normed("norm_down", within.get("down"), y, train)
                return layer(f"{name}_conv{last}", y, sizes[-1], kernel_init=init["down"])

            side = beside(name, x, sizes)
            return Branch(name=name)(self.connections[i], branch, x, train, side)

        stem = Size(7, self.widths[0], 2) if self.bottleneck else Size(3, self.widths[0], 1)
        x = layer("stem", x, stem, activation=None if plan else f)
        x = normed("norm_first", plan and plan.first, x, train)
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME") if self.bottleneck else x
        for i, (name, (stage, of_stage)) in enumerate(self._named()):
            width, strides = self.widths[stage], 1 if of_stage or not stage else 2
            sizes = [Size(3, width, strides), Size(3, width, 1)]
            if self.bottleneck:
                sizes = [Size(1, width, 1), Size(3, width, strides), Size(1, 4 * width, 1)]
            x = preactivated(plan, i, x, sizes) if plan else paper(name, x, sizes)
        x = f(normed("norm_last", plan.last, x, train)) if plan else x
        init = scaled(Normed.kernel_init, plan.init_scale("head") if plan else 1.0)
        return nn.Dense(self.classes, kernel_init=init)(x.mean((1, 2)))


class Size(NamedTuple):
    """Of a convolution: the sides of its window, its channels, and its stride."""

    window: int
    width: int
    strides: int


def normed(name: str, norm: nl.Norm | None, x: Array, train: bool) -> Array:
    """The norm of an activation, if there is one."""
    return x if norm is None else Activation(norm, name=name)(x, train)


def shortcut(x: Array, strides: int, width: int) -> Array:
    """Every so many positions of `x [N, H, W, K]`, padded with zeros to `width` channels."""
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])
