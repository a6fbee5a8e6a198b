"""Layer, RMS, group and instance norm as `flax.nnx` modules."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab import _flax as skin
from normlab.devices.topology import AxisName
from normlab.nnx.batch import (
    NONE,
    Init,
    Metadata,
    layer,
    make_params,
    ones,
    promote,
    result_dtype,
    values,
    zeros,
)


class LayerNorm(nnx.Module):
    """Layer normalization, `normlab.layer_norm`, with the interface of `flax.nnx.LayerNorm`."""

    @skin.checked("LayerNorm")
    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Init = zeros,
        scale_init: Init = ones,
        reduction_axes: skin.Axes = -1,
        feature_axes: skin.Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
    ) -> None:
        """Makes the variables.

        Args:
          num_features: The product of the sizes of the feature axes.
          epsilon: ε.
          dtype: The result's type; `None` for that of input and parameters.
          param_dtype: The parameters' type.
          use_bias: Whether there is a bias.
          use_scale: Whether there is a gain.
          bias_init: Its initializer.
          scale_init: Its initializer.
          reduction_axes: What is measured over.
          feature_axes: Along which gain and bias vary.
          axis_name: The axes of devices along which the reduction axes are split.
          axis_index_groups: Groups of devices along the axis, of any sizes.
          use_fast_variance: Whether to take the faster of two safe algorithms.
          promote_dtype: Asked for the result's type.
          rngs: For the initializers.
          bias_metadata: Of the bias.
          scale_metadata: Of the gain.
        """
        make_params(
            self,
            rngs,
            num_features,
            scale=(scale_init, scale_metadata) if use_scale else None,
            bias=(bias_init, bias_metadata) if use_bias else None,
            param_dtype=param_dtype,
        )
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          use_running_average: Not looked at.
          mask: As in `BatchNorm`.
        """
        scale, bias = values(self)
        dtype = result_dtype(self, x, scale, bias)
        call = skin.make_call(layer(self), x, self.feature_axes, mask, dtype)
        skin.check_features(call, "num_features", self.num_features)
        over = skin.sync(layer(self), self.axis_name, self.axis_index_groups)
        parts = skin.example(call, self.reduction_axes, self.epsilon, over, self.use_fast_variance)
        return skin.apply(call, parts, scale, bias)


class RMSNorm(nnx.Module):
    """Root mean square normalization, `normlab.rms_norm`, as `flax.nnx.RMSNorm`."""

    @skin.checked("RMSNorm")
    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Init = ones,
        reduction_axes: skin.Axes = -1,
        feature_axes: skin.Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = promote,
        rngs: nnx.Rngs,
        scale_metadata: Metadata = NONE,
    ) -> None:
        """Makes the variables; arguments as those of `LayerNorm`."""
        make_params(
            self,
            rngs,
            num_features,
            scale=(scale_init, scale_metadata) if use_scale else None,
            param_dtype=param_dtype,
        )
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(
        self, x: ArrayLike, mask: Any = None, *, use_running_average: bool | None = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          mask: As in `BatchNorm`; a bool in its place, the second as in Flax, is the
            `use_running_average` of a module that stood here before.
          use_running_average: Not looked at.
        """
        mask = None if isinstance(mask, bool) else mask
        scale, _ = values(self)
        dtype = result_dtype(self, x, scale)
        call = skin.make_call(layer(self), x, self.feature_axes, mask, dtype)
        skin.check_features(call, "num_features", self.num_features)
        over = skin.sync(layer(self), self.axis_name, self.axis_index_groups)
        parts = skin.example(
            call,
            self.reduction_axes,
            self.epsilon,
            over,
            self.use_fast_variance,
            centre=False,
        )
        return skin.apply(call, parts, scale, None)


class GroupNorm(nnx.Module):
    """Group normalization, `normlab.group_norm`, with the interface of `flax.nnx.GroupNorm`."""

    @skin.checked("GroupNorm")
    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Init = zeros,
        scale_init: Init = ones,
        reduction_axes: skin.Axes | None = None,
        axis_name: AxisName | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
    ) -> None:
        """Makes the variables.

        Arguments as those of `LayerNorm`; `num_groups` is the number of groups of neighbouring
        channels, or `None` with a `group_size`; `reduction_axes` must include the last axis, and
        `None` stands for all but the first.
        """
        self.feature_axis = -1
        self.num_groups = skin.groups_of("GroupNorm", num_features, num_groups, group_size)
        self.group_size = num_features // self.num_groups
        make_params(
            self,
            rngs,
            num_features,
            scale=(scale_init, scale_metadata) if use_scale else None,
            bias=(bias_init, bias_metadata) if use_bias else None,
            param_dtype=param_dtype,
        )
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          use_running_average: Not looked at.
          mask: As in `BatchNorm`.
        """
        scale, bias = values(self)
        dtype = result_dtype(self, x, scale, bias)
        call = skin.make_call(layer(self), x, -1, mask, dtype)
        skin.check_features(call, "num_features", self.num_features)
        over = skin.sync(layer(self), self.axis_name, self.axis_index_groups)
        parts = skin.group(
            call, self.num_groups, self.reduction_axes, self.epsilon, over, self.use_fast_variance
        )
        return skin.apply(call, parts, scale, bias)


class InstanceNorm(nnx.Module):
    """Instance normalization, `normlab.instance_norm`, as `flax.nnx.InstanceNorm`."""

    @skin.checked("InstanceNorm")
    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Init = zeros,
        scale_init: Init = ones,
        feature_axes: skin.Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
    ) -> None:
        """Makes the variables; arguments as those of `LayerNorm`.

        Measured is over all axes but the first and the feature axes.
        """
        make_params(
            self,
            rngs,
            num_features,
            scale=(scale_init, scale_metadata) if use_scale else None,
            bias=(bias_init, bias_metadata) if use_bias else None,
            param_dtype=param_dtype,
        )
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.feature_axes = feature_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          use_running_average: Not looked at.
          mask: As in `BatchNorm`.
        """
        scale, bias = values(self)
        dtype = result_dtype(self, x, scale, bias)
        call = skin.make_call(layer(self), x, self.feature_axes, mask, dtype)
        skin.check_features(call, "num_features", self.num_features)
        over = skin.sync(layer(self), self.axis_name, self.axis_index_groups)
        parts = skin.instance(call, self.epsilon, over, self.use_fast_variance)
        return skin.apply(call, parts, scale, bias)
