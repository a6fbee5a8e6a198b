"""Weight norm and cosine layers as `flax.nnx` modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab import _flax as skin

Init = Callable[..., Any]
zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()
lecun = nnx.initializers.lecun_normal()


class WeightNorm(nnx.Module):
    """Weight normalization, `normlab.weight_norm`, with the interface of `flax.nnx.WeightNorm`.

    The layer's own kernels stay as they are, and `scales` holds an `nnx.Param` for each, by path.
    """

    @skin.checked("WeightNorm")
    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: skin.Axes | None = -1,
        use_scale: bool = True,
        scale_init: Init = ones,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: Any = nnx.PathContains("kernel"),  # noqa: B008
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the scales.

        Args:
          layer_instance: The layer whose kernels are normalized.
          feature_axes: The axes of the units; `None` if the kernel is one.
          use_scale: Whether there is a scale, g.
          scale_init: Its initializer.
          epsilon: Only Flax's own: the norm is exact here, and safe at zero without it.
          dtype: The normalized kernel's type; `None` for that of kernel and scale.
          param_dtype: The scale's type.
          variable_filter: Which parameters are normalized, a filter of nnx.
          promote_dtype: Kept for Flax, which does not use it either.
          rngs: For the initializer.
        """
        skin.check_weight_epsilon(epsilon)
        self.layer_instance = layer_instance
        self.feature_axes = feature_axes
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.promote_dtype = promote_dtype
        self.scales = nnx.data(None)
        if use_scale:
            kernels = nnx.to_flat_state(nnx.state(layer_instance, self._chosen()))
            self.scales = nnx.data(
                {path: nnx.Param(self._scale(rngs, kernel)) for path, kernel in kernels}
            )

    def _chosen(self) -> Any:
        return nnx.All(nnx.Param, self.variable_filter)

    def _scale(self, rngs: nnx.Rngs, kernel: Any) -> Array:
        axes = self.feature_axes
        shape = () if axes is None else skin.feature_shape("WeightNorm", kernel[...], axes)
        return self.scale_init(rngs.params(), shape, self.param_dtype)

    def __call__(self, x: ArrayLike, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with normalized kernels."""
        graph, kernels, rest = nnx.split(self.layer_instance, self._chosen(), ...)
        normalized = []
        for path, kernel in nnx.to_flat_state(kernels):
            scale = self.scales[path][...] if self.use_scale else None  # pyright: ignore[reportOptionalSubscript]
            w = skin.normalized_kernel(
                "WeightNorm", kernel[...], scale, self.feature_axes, self.dtype
            )
            normalized.append((path, kernel.replace(w)))
        layer = nnx.merge(graph, nnx.from_flat_state(normalized), rest)
        return layer(x, *args, **kwargs)


class CosineDense(nnx.Module):
    """A dense layer of cosines, `normlab.cosine_norm`: h = scale · w·x / (‖w‖‖x‖) + bias.

    >>> layer = CosineDense(2, 1, use_scale=False, rngs=nnx.Rngs(0))
    >>> layer(layer.kernel[...].T).round(3).tolist()
    [[1.0]]
    """

    @skin.checked("CosineDense")
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Init = lecun,
        bias_init: Init = zeros,
        use_scale: bool = True,
        scale_init: Init | None = None,
        centred: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the variables.

        Args:
          in_features: K.
          out_features: The number of units.
          use_bias: Whether there is a bias.
          dtype: The result's type; `None` for that of input and parameters.
          param_dtype: The parameters' type.
          kernel_init: Initializer of the kernel, `[K, out_features]`.
          bias_init: Initializer of the bias.
          use_scale: Whether there is a scale; without, |h| ≤ 1 before the bias.
          scale_init: Its initializer; `None` for √K, so that h varies as w·x does elsewhere.
          centred: Whether w and x lose their means first: Pearson's correlation.
          rngs: For the initializers.
        """
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.use_scale, self.centred = use_bias, use_scale, centred
        self.dtype, self.param_dtype = dtype, param_dtype
        shape = (in_features, out_features)
        _make_cosine(self, shape, kernel_init, bias_init, scale_init, rngs)

    def __call__(self, x: ArrayLike) -> Array:
        """Returns `[..., out_features]` for `x [..., K]`."""
        kernel, scale, bias = _cosine_values(self)
        return skin.cosine(
            "CosineDense", x, kernel, scale, bias, dtype=self.dtype, centred=self.centred
        )


class CosineConv(nnx.Module):
    """A convolution of cosines, `normlab.cosine_norm`: each patch x of the input meets w."""

    @skin.checked("CosineConv")
    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Any = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Init = lecun,
        bias_init: Init = zeros,
        use_scale: bool = True,
        scale_init: Init | None = None,
        centred: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the variables.

        Arguments as those of `CosineDense`; `kernel_size` is the window, a number for each spatial
        axis; `strides` and `kernel_dilation` are one for all of them, or one for each; `padding` is
        `"SAME"`, `"VALID"`, a number for all, or for each axis a number or (low, high);
        `feature_group_count` groups of channels meet apart.
        """
        window, self.linear = skin.convolution(
            kernel_size, strides, padding, kernel_dilation, feature_group_count
        )
        self.in_features, self.out_features = in_features, out_features
        self.kernel_size = window
        self.use_bias, self.use_scale, self.centred = use_bias, use_scale, centred
        self.dtype, self.param_dtype = dtype, param_dtype
        shape = (
            *window,
            skin.group_inputs("CosineConv", in_features, feature_group_count),
            out_features,
        )
        _make_cosine(self, shape, kernel_init, bias_init, scale_init, rngs)

    def __call__(self, x: ArrayLike) -> Array:
        """Returns `[N, ..., out_features]` for `x [N, ..., K]`; N may be no, or several axes."""
        kernel, scale, bias = _cosine_values(self)
        return skin.cosine(
            "CosineConv",
            x,
            kernel,
            scale,
            bias,
            linear=self.linear,
            dtype=self.dtype,
            centred=self.centred,
        )


def _make_cosine(
    module: Any,
    shape: tuple[int, ...],
    kernel_init: Init,
    bias_init: Init,
    scale_init: Init | None,
    rngs: nnx.Rngs,
) -> None:
    dtype, units = module.param_dtype, shape[-1:]
    module.kernel = nnx.Param(kernel_init(rngs.params(), shape, dtype))
    module.scale = module.bias = nnx.data(None)
    if module.use_scale:
        init = scale_init or nnx.initializers.constant(math.sqrt(math.prod(shape[:-1])))
        module.scale = nnx.Param(init(rngs.params(), units, dtype))
    if module.use_bias:
        module.bias = nnx.Param(bias_init(rngs.params(), units, dtype))


def _cosine_values(module: Any) -> tuple[Array, Array | None, Array | None]:
    scale, bias = (None if v is None else v[...] for v in (module.scale, module.bias))
    return module.kernel[...], scale, bias
