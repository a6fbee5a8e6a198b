"""Layer, RMS, group and instance norm as `flax.linen` modules."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab import _flax as skin
from normlab.devices.topology import AxisName
from normlab.linen.batch import Init, layer, ones, scale_and_bias, zeros


@skin.checked("LayerNorm")
class LayerNorm(nn.Module):
    """Layer normalization, `normlab.layer_norm`, with the interface of `flax.linen.LayerNorm`.

    Attributes:
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
      force_float32_reductions: Without effect: reductions are in float32 at least.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Init = zeros
    scale_init: Init = ones
    reduction_axes: skin.Axes = -1
    feature_axes: skin.Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          use_running_average: Not looked at.
          mask: As in `BatchNorm`.
        """
        return _example_norm(self, x, mask, centre=True)


@skin.checked("RMSNorm")
class RMSNorm(nn.Module):
    """Root mean square normalization, `normlab.rms_norm`, as `flax.linen.RMSNorm`.

    Attributes:
      epsilon: ε.
      dtype: The result's type; `None` for that of input and parameters.
      param_dtype: The parameters' type.
      use_scale: Whether there is a gain.
      scale_init: Its initializer.
      reduction_axes: What is measured over.
      feature_axes: Along which the gain varies.
      axis_name: The axes of devices along which the reduction axes are split.
      axis_index_groups: Groups of devices along the axis, of any sizes.
      use_fast_variance: Without effect: there is no mean to subtract.
      force_float32_reductions: Without effect: reductions are in float32 at least.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    scale_init: Init = ones
    reduction_axes: skin.Axes = -1
    feature_axes: skin.Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          use_running_average: Not looked at.
          mask: As in `BatchNorm`.
        """
        return _example_norm(self, x, mask, centre=False)


def _example_norm(module: Any, x: ArrayLike, mask: Any, *, centre: bool) -> Array:
    where = layer(module)
    shape = skin.feature_shape(where, x, module.feature_axes)
    scale, bias = scale_and_bias(module, shape)
    call = skin.make_call(where, x, module.feature_axes, mask, module.dtype, scale, bias)
    over = skin.sync(where, module.axis_name, module.axis_index_groups)
    parts = skin.example(
        call,
        module.reduction_axes,
        module.epsilon,
        over,
        module.use_fast_variance,
        centre=centre,
    )
    return skin.apply(call, parts, scale, bias)


@skin.checked("GroupNorm")
class GroupNorm(nn.Module):
    """Group normalization, `normlab.group_norm`, with the interface of `flax.linen.GroupNorm`.

    Attributes:
      num_groups: The number of groups of neighbouring channels; or `None`, with
      group_size: the number of channels in a group.
      epsilon: ε.
      dtype: The result's type; `None` for that of input and parameters.
      param_dtype: The parameters' type.
      use_bias: Whether there is a bias.
      use_scale: Whether there is a gain.
      bias_init: Its initializer.
      scale_init: Its initializer.
      reduction_axes: What is measured over, the last axis included; `None` for all but the first.
      axis_name: The axes of devices along which the reduction axes are split.
      axis_index_groups: Groups of devices along the axis, of any sizes.
      use_fast_variance: Whether to take the faster of two safe algorithms.
      force_float32_reductions: Without effect: reductions are in float32 at least.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Init = zeros
    scale_init: Init = ones
    reduction_axes: skin.Axes | None = None
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          use_running_average: Not looked at.
          mask: As in `BatchNorm`.
        """
        where = layer(self)
        shape = skin.feature_shape(where, x, -1)
        groups = skin.groups_of(where, shape[0], self.num_groups, self.group_size)
        scale, bias = scale_and_bias(self, shape)
        call = skin.make_call(where, x, -1, mask, self.dtype, scale, bias)
        over = skin.sync(where, self.axis_name, self.axis_index_groups)
        parts = skin.group(
            call, groups, self.reduction_axes, self.epsilon, over, self.use_fast_variance
        )
        return skin.apply(call, parts, scale, bias)


@skin.checked("InstanceNorm")
class InstanceNorm(nn.Module):
    """Instance normalization, `normlab.instance_norm`, as `flax.linen.InstanceNorm`.

    Attributes:
      epsilon: ε.
      dtype: The result's type; `None` for that of input and parameters.
      param_dtype: The parameters' type.
      use_bias: Whether there is a bias.
      use_scale: Whether there is a gain.
      bias_init: Its initializer.
      scale_init: Its initializer.
      feature_axes: Along which gain and bias vary; measured is over all others but the first.
      axis_name: The axes of devices along which the positions are split.
      axis_index_groups: Groups of devices along the axis, of any sizes.
      use_fast_variance: Whether to take the faster of two safe algorithms.
      force_float32_reductions: Without effect: reductions are in float32 at least.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Init = zeros
    scale_init: Init = ones
    feature_axes: skin.Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          use_running_average: Not looked at.
          mask: As in `BatchNorm`.
        """
        where = layer(self)
        shape = skin.feature_shape(where, x, self.feature_axes)
        scale, bias = scale_and_bias(self, shape)
        call = skin.make_call(where, x, self.feature_axes, mask, self.dtype, scale, bias)
        over = skin.sync(where, self.axis_name, self.axis_index_groups)
        parts = skin.instance(call, self.epsilon, over, self.use_fast_variance)
        return skin.apply(call, parts, scale, bias)
