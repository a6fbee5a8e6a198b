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

from normlab._flax.calls import Axes, feature_shape
from normlab._flax.layers import check_weight_epsilon, convolution, cosine, normalized_kernel
from normlab._flax.words import checked
from normlab.linear import Dense, Linear

Init = Callable[..., Any]
zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()
lecun = nnx.initializers.lecun_normal()


class WeightNorm(nnx.Module):
    """Weight normalization, `normlab.weight_norm`, with the interface of `flax.nnx.WeightNorm`.

    The layer's own kernels stay as they are, and `scales` holds an `nnx.Param` for each, by path.
    """

    @checked("WeightNorm")
    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Init = ones,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: Any = nnx.PathContains("kernel"),  # noqa: B008
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the scales; arguments as those of `normlab.linen.WeightNorm`, and some of nnx.

        `variable_filter` is a filter of nnx, which parameters are normalized; `promote_dtype` is
        kept for Flax, which does not use it either; `rngs` is for the initializer.
        """
        check_weight_epsilon(epsilon)
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
        shape = feature_shape("WeightNorm", kernel[...], self.feature_axes)
        return self.scale_init(rngs.params(), shape, self.param_dtype)

    def __call__(self, x: ArrayLike, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with normalized kernels."""
        graph, kernels, rest = nnx.split(self.layer_instance, self._chosen(), ...)
        normalized = []
        for path, kernel in nnx.to_flat_state(kernels):
            scale = self.scales[path][...] if self.use_scale else None  # pyright: ignore[reportOptionalSubscript]
            w = normalized_kernel("WeightNorm", kernel[...], scale, self.feature_axes, self.dtype)
            normalized.append((path, kernel.replace(w)))
        layer = nnx.merge(graph, nnx.from_flat_state(normalized), rest)
        return layer(x, *args, **kwargs)


class _Cosine(nnx.Module):
    """A linear layer of cosines: its arguments as attributes, its variables, and its call."""

    in_features: int
    out_features: int
    use_bias: bool
    use_scale: bool
    centred: bool
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    def _make(self, unit: tuple[int, ...], linear: Linear, given: dict[str, Any]) -> None:
        """Keeps arguments, and makes the variables; one that is absent is `None`.

        `unit` is the shape of the kernel of one unit, `given` are the `locals()` of `__init__`: its
        arguments by name.
        """
        for name in ("in_features", "out_features", "use_bias", "use_scale", "centred"):
            setattr(self, name, given[name])
        self.dtype, self.param_dtype, self.linear = given["dtype"], given["param_dtype"], linear

        def param(init: Init, *shape: int) -> nnx.Param[Any]:
            return nnx.Param(init(given["rngs"].params(), shape, self.param_dtype))

        scale_init = given["scale_init"] or nnx.initializers.constant(math.sqrt(math.prod(unit)))
        units, none = self.out_features, nnx.data(None)
        self.kernel = param(given["kernel_init"], *unit, units)
        self.scale = param(scale_init, units) if self.use_scale else none
        self.bias = param(given["bias_init"], units) if self.use_bias else none

    def __call__(self, x: ArrayLike) -> Array:
        """Returns `[..., C]` for `x [..., K]`; of a convolution any axes may come before these."""
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        return cosine(self, x, self.kernel[...], scale, bias, self.linear)


class CosineDense(_Cosine):
    """A dense layer of cosines, `normlab.cosine_norm`: h = scale · w·x / (‖w‖‖x‖) + bias.

    >>> layer = CosineDense(2, 1, use_scale=False, rngs=nnx.Rngs(0))
    >>> layer(layer.kernel[...].T).round(3).tolist()
    [[1.0]]
    """

    @checked("CosineDense")
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
        """Makes the variables; arguments as those of `normlab.linen.CosineDense`.

        `in_features` is K, `out_features` the number of units, `rngs` is for the initializers.
        """
        self._make((in_features,), Dense(), locals())


class CosineConv(_Cosine):
    """A convolution of cosines, `normlab.cosine_norm`: each patch x of the input meets w."""

    @checked("CosineConv")
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
        """Makes the variables; arguments as those of `normlab.linen.CosineConv`.

        `in_features`, `out_features` and `rngs` are those of `CosineDense`.
        """
        how = (strides, padding, kernel_dilation, feature_group_count)
        unit, linear = convolution("CosineConv", in_features, kernel_size, *how)
        self._make(unit, linear, locals())
        self.kernel_size = unit[:-1]
