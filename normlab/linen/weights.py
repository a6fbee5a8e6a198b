"""Weight norm and cosine layers as `flax.linen` modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab._flax.calls import Axes, feature_shape
from normlab._flax.layers import check_weight_epsilon, convolution, cosine, normalized_kernel
from normlab._flax.words import checked

Init = Callable[..., Any]


@checked("WeightNorm")
class WeightNorm(nn.Module):
    """Weight normalization, `normlab.weight_norm`, with the interface of `flax.linen.WeightNorm`.

    Attributes:
      layer_instance: The layer whose kernels are normalized.
      epsilon: Only Flax's own: the norm is exact here, and safe at zero without it.
      dtype: The normalized kernel's type; `None` for that of kernel and scale.
      param_dtype: The scale's type.
      use_scale: Whether there is a scale, g.
      scale_init: Its initializer.
      feature_axes: The axes of the units; `None` if the kernel is one.
      variable_filter: Parts of the paths of the parameters that are normalized; `None` for all.
    """

    layer_instance: nn.Module
    epsilon: float = 1e-12
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    scale_init: Init = nn.initializers.ones
    feature_axes: Axes | None = -1
    variable_filter: Iterable[str] | None = field(default_factory=lambda: {"kernel"})

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with normalized kernels."""
        check_weight_epsilon(self.epsilon)

        def normalized(variables: Any) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, v: _normalized(self, path, v), variables
            )

        call = nn.map_variables(
            lambda layer: layer(*args, **kwargs),
            "params",
            trans_in_fn=normalized,
            init=self.is_initializing(),
        )
        return call(self.layer_instance)


def _normalized(module: WeightNorm, path: Any, v: Array) -> Array:
    inner = jax.tree_util.keystr(path[1:], simple=True, separator="/")
    name = f"{module.layer_instance.name}/{inner}"
    wanted = module.variable_filter
    if wanted and not any(part in name for part in wanted):
        return v
    scale = None
    if module.use_scale:
        shape = feature_shape("WeightNorm", v, module.feature_axes)
        scale = module.param(f"{name}/scale", module.scale_init, shape, module.param_dtype)
    return normalized_kernel("WeightNorm", v, scale, module.feature_axes, module.dtype)


@checked("CosineDense")
class CosineDense(nn.Module):
    """A dense layer of cosines, `normlab.cosine_norm`: h = scale · w·x / (‖w‖‖x‖) + bias.

    The arguments are those of `flax.linen.Dense` and a scale.

    Attributes:
      features: The number of units.
      use_bias: Whether there is a bias.
      dtype: The result's type; `None` for that of input and parameters.
      param_dtype: The parameters' type.
      kernel_init: Initializer of the kernel, `[K, features]`.
      bias_init: Initializer of the bias.
      use_scale: Whether there is a scale; without, |h| ≤ 1 before the bias.
      scale_init: Its initializer; `None` for √K, so that h varies as w·x does in other layers.
      centred: Whether w and x lose their means first: Pearson's correlation.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Init = nn.initializers.lecun_normal()
    bias_init: Init = nn.initializers.zeros
    use_scale: bool = True
    scale_init: Init | None = None
    centred: bool = False

    @nn.compact
    def __call__(self, x: ArrayLike) -> Array:
        """Returns `[..., features]` for `x [..., K]`."""
        shape = feature_shape("CosineDense", x, -1)
        return cosine(self, x, *_cosine_params(self, (*shape, self.features)))


@checked("CosineConv")
class CosineConv(nn.Module):
    """A convolution of cosines, `normlab.cosine_norm`: each patch x of the input meets w.

    The arguments are those of `flax.linen.Conv`, as far as they apply, and a scale; those that are
    not listed as in `CosineDense`.

    Attributes:
      kernel_size: The window, a number for each spatial axis.
      strides: One for all spatial axes, or one for each.
      padding: `"SAME"`, `"VALID"`, or a number or (low, high) for all, or for each axis.
      kernel_dilation: One for all spatial axes, or one for each.
      feature_group_count: The number of groups of channels that meet apart.
      kernel_init: Initializer of the kernel, `[*kernel_size, K / groups, features]`.
      scale_init: Its initializer; `None` for the root of the number of inputs of a unit.
      centred: Whether w and each patch lose their means first: Pearson's correlation.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Init = nn.initializers.lecun_normal()
    bias_init: Init = nn.initializers.zeros
    use_scale: bool = True
    scale_init: Init | None = None
    centred: bool = False

    @nn.compact
    def __call__(self, x: ArrayLike) -> Array:
        """Returns `[N, ..., features]` for `x [N, ..., K]`; N may be no, or several axes."""
        (channels,) = feature_shape("CosineConv", x, -1)
        how = (self.strides, self.padding, self.kernel_dilation, self.feature_group_count)
        shape, linear = convolution("CosineConv", channels, self.kernel_size, *how)
        return cosine(self, x, *_cosine_params(self, (*shape, self.features)), linear)


def _cosine_params(module: Any, shape: tuple[int, ...]) -> tuple[Array, Array | None, Array | None]:
    kernel = module.param("kernel", module.kernel_init, shape, module.param_dtype)
    scale = bias = None
    if module.use_scale:
        length = math.sqrt(math.prod(shape[:-1]))
        init = module.scale_init or nn.initializers.constant(length)
        scale = module.param("scale", init, shape[-1:], module.param_dtype)
    if module.use_bias:
        bias = module.param("bias", module.bias_init, shape[-1:], module.param_dtype)
    return kernel, scale, bias
