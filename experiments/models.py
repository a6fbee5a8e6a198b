"""The networks of the experiments, in Flax, with the norm as an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

import normlab as nl
from normlab.checks import nearest

PARTS = "parts"
"""The variable collection into which every layer sows its four parts."""

STATE = "norm_state"
"""The variable collection of the norms' states."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class MatmulConv(nl.Conv):
    """`nl.Conv` over images [N, H, W, K], as one matrix product over gathered windows.

    The same numbers. XLA's own convolution is several times slower on a CPU, above all its
    gradient and under vmap, where each seed has a kernel of its own.
    """

    def __call__(self, x: Array, w: Array) -> Array:
        if self.dilation != 1 or self.groups != 1 or self.channel_axis != -1:
            return super().__call__(x, w)
        height, width, _, channels = w.shape
        strides = (self.strides, self.strides) if isinstance(self.strides, int) else self.strides
        pads = self.padding
        if isinstance(pads, str):
            pads = lax.padtype_to_pads(x.shape[1:3], (height, width), strides, pads)
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        rows, columns = (
            (size - window) // stride + 1
            for size, window, stride in zip(x.shape[1:3], (height, width), strides, strict=True)
        )
        windows = [
            x[:, i : i + strides[0] * rows : strides[0], j : j + strides[1] * columns : strides[1]]
            for i in range(height)
            for j in range(width)
        ]
        windows = [v[:, :rows, :columns] for v in windows]
        return jnp.concatenate(windows, -1) @ w.reshape(-1, channels)


def conv(**options: Any) -> nl.Conv:
    """The fastest convolution of the default backend."""
    return (MatmulConv if jax.default_backend() == "cpu" else nl.Conv)(**options)


class Normed(nn.Module):
    """A linear map followed by a norm: h = g · (a − μ) / σ + b. The bias is the norm's."""

    linear: nl.Linear
    norm: nl.Norm
    kernel_shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        w = self.param("kernel", nn.initializers.lecun_normal(), self.kernel_shape)
        site = nl.Site(self.linear(x, w), x, w, linear=self.linear)
        params = self.param("norm", lambda _: self.norm.init(site)[0])
        state = self.variable(STATE, "norm", lambda: self.norm.init(site)[1])
        if self.is_mutable_collection(PARTS):
            parts, _ = self.norm.parts(params, state.value, site, train=train)
            self.sow(PARTS, "norm", parts)
        h, after = self.norm.apply(params, state.value, site, train=train)
        if train and not self.is_initializing():
            state.value = after
        return h


class Mlp(nn.Module):
    """The network of figure 1 in Ioffe & Szegedy (2015): three layers of 100 sigmoids.

    The norm stands before each sigmoid; the output layer has none.
    """

    norm: nl.Norm
    classes: int
    widths: tuple[int, ...] = (100, 100, 100)
    activation: Callable[[Array], Array] = nn.sigmoid

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            layer = Normed(nl.Dense(), self.norm, (x.shape[-1], width))
            x = self.activation(layer(x, train))
        return nn.Dense(self.classes)(x)


class ConvNet(nn.Module):
    """A small ReLU conv net: three 3×3 convolutions of stride 2, then a dense output layer.

    The norm stands before each ReLU; the output layer has none.
    """

    norm: nl.Norm
    classes: int
    widths: tuple[int, ...] = (8, 16, 32)

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for width in self.widths:
            layer = Normed(conv(strides=2), self.norm, (3, 3, x.shape[-1], width))
            x = nn.relu(layer(x, train))
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


MODELS: dict[str, type[nn.Module]] = {"mlp": Mlp, "conv": ConvNet}


def require(name: str) -> type[nn.Module]:
    """Returns the model called `name`; raises ValueError, with the nearest name, for another."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: {nearest(name, MODELS)}")
    return MODELS[name]


def build(name: str, norm: nl.Norm, classes: int) -> nn.Module:
    """Returns the model called `name`, with `norm` in every hidden layer."""
    return require(name)(norm=norm, classes=classes)


def draw_kernels(name: str, classes: int, seeds: Iterable[int], example: ArrayLike) -> Any:
    """Draws the kernels and the output layer of a model, for all norms to start from.

    Args:
      name: The model.
      classes: The size of the output.
      seeds: One draw for each.
      example: A preprocessed batch, for its shape.

    Returns:
      A tree of parameters `[seeds, ...]`, to be completed by `complete`.
    """
    model = build(name, nl.get("none", reshift=False), classes)
    draw = jax.jit(lambda seed: model.init(jax.random.key(seed), example, train=False)["params"])
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(draw, seeds))


def complete(model: nn.Module, kernels: Any, example: ArrayLike) -> Any:
    """Returns the model's variables: these kernels, and the norms' initial params and states."""
    rngs = {"params": jax.random.key(0)}  # asked for by Flax; the norms draw nothing
    _, variables = model.apply(
        {"params": _without_norms(kernels)},
        example,
        train=False,
        rngs=rngs,
        mutable=["params", STATE],
    )
    return variables


def _without_norms(params: Any) -> Any:
    if not isinstance(params, dict):
        return params
    return {name: _without_norms(value) for name, value in params.items() if name != "norm"}


def split(variables: Any) -> tuple[Any, Any]:
    """Splits a model's variables into what the optimizer changes and the norms' states."""
    return variables["params"], variables.get(STATE, {})


def parts_by_layer(variables: Any) -> dict[str, nl.Parts]:
    """The parts that the last call sowed, by layer, in the order of the layers."""
    return {layer: sown["norm"][0] for layer, sown in variables[PARTS].items()}
