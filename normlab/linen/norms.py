"""The norms of activations as `flax.linen` modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab._flax.calls import (
    Axes,
    Call,
    all_features,
    apply,
    feature_shape,
    make_call,
    together,
)
from normlab._flax.measure import batch, example, group, groups_of, instance
from normlab._flax.state import average, check_whole, initial
from normlab._flax.words import check_mode, checked, read
from normlab.devices.topology import AxisName
from normlab.equation import Parts
from normlab.errors import invalid
from normlab.implementation import Implementation
from normlab.population.transaction import begin
from normlab.sharded import OVER, ExampleAxes, where_bound

Init = Callable[..., Any]
zeros, ones = nn.initializers.zeros, nn.initializers.ones


@checked("BatchNorm")
class BatchNorm(nn.Module):
    """Batch normalization, `normlab.batch_norm`, with the interface of `flax.linen.BatchNorm`.

    h = g · (a − μ) / √(var + ε) + b, with the parameters `scale`, g, and `bias`, b. In training μ
    and var are those of the batch, which the averages `mean` and `var` of the collection
    `"batch_stats"` take in; with `use_running_average=True` they are the averages.

    With the collection `"transaction"` mutable instead of `"batch_stats"`, a call in training
    leaves the statistics alone and merges what it measured into the transaction; see `commit`.

    Attributes:
      use_running_average: Whether to normalize with the running statistics; here or at call time.
      axis: The feature axis, or axes.
      momentum: The weight of the old value in the running statistics (the `decay` of the library).
      epsilon: ε.
      dtype: The result's type; `None` for that of input and parameters.
      param_dtype: The parameters' type.
      use_bias: Whether there is a bias.
      use_scale: Whether there is a gain.
      bias_init: Its initializer.
      scale_init: Its initializer.
      axis_name: The axes over which the batch is one, or a `Sync`.
      axis_index_groups: Groups of devices along the axis, of any sizes.
      use_fast_variance: Whether to take the faster of two safe algorithms.
      force_float32_reductions: Without, the running statistics begin in `param_dtype` and stay
        there if the input is as narrow; sums are in float32 all the same.
      population: What is kept for inference. `"ema"` is Flax's own, `mean` and `var`. Any other
        name known to `normlab.population.init_population`, or a function of the features, keeps
        the state of that name as the one variable `population` of `batch_stats`. A name gets
        `momentum` as its decay and `epsilon` as its ε; a function says its own.
      implementation: By XLA or by a kernel, a `normlab.Implementation`.

    >>> layer = BatchNorm(use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 2)))
    >>> jax.tree.map(jnp.shape, variables["batch_stats"])
    {'mean': (2,), 'var': (2,)}
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Init = zeros
    scale_init: Init = ones
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    population: str | Callable[[int], Any] = "ema"
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          use_running_average: As the attribute; to be given once.
          mask: What counts in the statistics, as booleans or weights: of the rank of `x`, or
            aligned with its first or with its last axes.
        """
        where, init = layer(self), self.is_initializing()
        train = not merged_mode(self, where, use_running_average)
        shape = feature_shape(where, x, self.axis)
        state, write = _statistics(self, shape, train, jnp.result_type(x))
        scale, bias = scale_and_bias(self, shape)
        call = make_call(self, where, x, self.axis, mask, self.dtype, scale, bias)
        if init:  # one example, on no device in particular, is enough to make the variables with
            call = call._replace(over=None)
        known = None if init and train else state
        parts, state = batch(call, known, train=train, quiet=init, state_gradient=True)
        if train and not init:
            write(state)
        return apply(call, parts, scale, bias)


class _ExampleNorm(nn.Module):
    """A norm that measures each example by itself."""

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`; arguments as of `BatchNorm`; `use_running_average` has no effect."""
        norm: Any = self  # its fields are those of Flax's module
        where = layer(norm)
        check_mode(where, use_running_average)
        features = getattr(norm, "feature_axes", -1)
        scale, bias = scale_and_bias(norm, feature_shape(where, x, features))
        call = make_call(norm, where, x, features, mask, norm.dtype, scale, bias)
        if self.is_initializing():  # before the map, where the example is whole
            call = call._replace(over=where_bound(call.over))
        return apply(call, self._measure(call), scale, bias)

    @nn.nowrap
    def _measure(self, call: Call) -> Parts:
        """The parts of the norm."""
        raise NotImplementedError


@checked("LayerNorm", axis_name=OVER)
class LayerNorm(_ExampleNorm):
    """Layer normalization, `normlab.layer_norm`, with the interface of `flax.linen.LayerNorm`.

    Other attributes as those of `BatchNorm`.

    Attributes:
      reduction_axes: What is measured over.
      feature_axes: Along which gain and bias vary.
      axis_name: The axes of devices along which each example lies: what is reduced is merged over
        them. Or a `normlab.Sharded`, of which those count that are reduced over.
      force_float32_reductions: Without effect: reductions are in float32 at least.
      implementation: By XLA or by a kernel, a `normlab.Implementation`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> layer = LayerNorm()
    >>> a = jnp.array([[1.0, 3.0]])
    >>> variables = layer.init(jax.random.key(0), a)
    >>> print(layer.apply(variables, a).round(2))
    [[-1.  1.]]
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Init = zeros
    scale_init: Init = ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: ExampleAxes | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    implementation: Implementation = "auto"

    @nn.nowrap
    def _measure(self, call: Call) -> Parts:
        return example(call, self.reduction_axes)


@checked("RMSNorm", axis_name=OVER)
class RMSNorm(_ExampleNorm):
    """Root mean square normalization, `normlab.rms_norm`, as `flax.linen.RMSNorm`.

    Attributes as those of `LayerNorm`, without a bias; `use_fast_variance` is without effect, as
    there is no mean to subtract.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> layer = RMSNorm()
    >>> a = jnp.array([[1.0, 3.0]])
    >>> variables = layer.init(jax.random.key(0), a)
    >>> import numpy as np
    >>> print(np.asarray(layer.apply(variables, a)).round(2))
    [[0.45 1.34]]
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    scale_init: Init = ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: ExampleAxes | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    implementation: Implementation = "auto"

    @nn.nowrap
    def _measure(self, call: Call) -> Parts:
        return example(call, self.reduction_axes, centre=False)


@checked("GroupNorm", axis_name=OVER)
class GroupNorm(_ExampleNorm):
    """Group normalization, `normlab.group_norm`, with the interface of `flax.linen.GroupNorm`.

    Other attributes as those of `LayerNorm`.

    Attributes:
      num_groups: The number of groups of neighbouring channels; or `None`, with
      group_size: the number of channels in a group.
      axis_name: As in `LayerNorm`; a plain name merges each group with the same one of other
        devices, as Flax does: the positions lie along it. Where the channels do, say
        `Sharded(channels=...)`, and in `num_groups` the number of all.
      reduction_axes: What is measured over, the last axis included; `None` for all but the first.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> layer = GroupNorm(num_groups=1)
    >>> a = jnp.array([[1.0, 3.0]])
    >>> variables = layer.init(jax.random.key(0), a)
    >>> print(layer.apply(variables, a).round(2))
    [[-1.  1.]]
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
    reduction_axes: Axes | None = None
    axis_name: ExampleAxes | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    implementation: Implementation = "auto"

    @nn.nowrap
    def _measure(self, call: Call) -> Parts:
        channels = all_features(call)
        groups = groups_of(call.where, channels, self.num_groups, self.group_size)
        return group(call, groups, self.reduction_axes)


@checked("InstanceNorm", axis_name=OVER)
class InstanceNorm(_ExampleNorm):
    """Instance normalization, `normlab.instance_norm`, as `flax.linen.InstanceNorm`.

    Attributes as those of `LayerNorm`; measured is over all axes but the first and the feature
    axes, and with `axis_name` the positions are split.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> layer = InstanceNorm()
    >>> a = jnp.array([[[1.0], [3.0]]])
    >>> variables = layer.init(jax.random.key(0), a)
    >>> print(layer.apply(variables, a).round(2))
    [[[-1.]
      [ 1.]]]
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Init = zeros
    scale_init: Init = ones
    feature_axes: Axes = -1
    axis_name: ExampleAxes | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    implementation: Implementation = "auto"

    @nn.nowrap
    def _measure(self, call: Call) -> Parts:
        return instance(call)


def layer(module: nn.Module) -> str:
    """What errors and warnings call a module: its class, and its path in the model."""
    return " ".join([type(module).__name__, "/".join(module.path)]).rstrip()


def merged_mode(module: Any, where: str, use_running_average: bool | None) -> bool:
    """The mode that is given to the module or to the call, once."""
    name = "use_running_average"
    return read(where, name, nn.merge_param(name, module.use_running_average, use_running_average))


def scale_and_bias(module: Any, shape: Sequence[int]) -> tuple[Array | None, Array | None]:
    """The parameters of a norm; `None` for one that is absent."""
    scale = bias = None
    if module.use_scale:
        scale = module.param("scale", module.scale_init, shape, module.param_dtype)
    if getattr(module, "use_bias", False):
        bias = module.param("bias", module.bias_init, shape, module.param_dtype)
    if not module.force_float32_reductions:  # then Flax casts those that came in another type
        scale, bias = (v if v is None else v.astype(module.param_dtype) for v in (scale, bias))
    return scale, bias


def _statistics(
    module: BatchNorm, shape: tuple[int, ...], train: bool, x_dtype: Any
) -> tuple[Any, Callable[[Any], None]]:
    """The state of the module, and how to write it back: in no narrower type than is measured."""
    if module.population != "ema":
        _check_layout(module, "population", "mean")
        options = {"decay": module.momentum, "eps": module.epsilon, "axis_name": module.axis_name}
        return stored(module, initial(module.population, math.prod(shape), **options), train)
    check_whole(layer(module), module.axis_name)
    _check_layout(module, "mean", "population")
    dtype = jnp.float32 if module.force_float32_reductions else module.param_dtype
    mean = module.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
    var = module.variable("batch_stats", "var", jnp.ones, shape, dtype)

    seen = module.dtype or x_dtype
    if module.force_float32_reductions or not jnp.issubdtype(seen, jnp.floating):
        seen = together(seen, jnp.float32)

    def write(new: Any) -> None:
        for kept, value in ((mean, new.mean), (var, new.var)):
            kept.value = value.reshape(shape).astype(together(kept.value, seen))

    flat = (mean.value.reshape(-1), var.value.reshape(-1))
    state = average(*flat, module.momentum, seen)
    return _in_transaction(module, state, write, train)


def stored(module: nn.Module, fresh: Any, train: bool) -> tuple[Any, Callable[[Any], None]]:
    """The state in the variable `population`, `fresh` at first, and how to write it back."""
    if not jax.tree.leaves(fresh):
        return fresh, lambda new: None
    kept = module.variable("batch_stats", "population", lambda: fresh)
    return _in_transaction(module, kept.value, partial(setattr, kept, "value"), train)


def _in_transaction(
    module: nn.Module, state: Any, write: Callable[[Any], None], train: bool
) -> tuple[Any, Callable[[Any], None]]:
    """The same, or the transaction's, if one is under way: its collection alone is mutable."""
    mutable = module.is_mutable_collection
    if module.is_initializing() or not mutable("transaction") or mutable("batch_stats"):
        return state, write
    pending = module.variable("transaction", "pending", begin, state)
    return (pending.value if train else state), partial(setattr, pending, "value")


def _check_layout(module: BatchNorm, wanted: str, other: str) -> None:
    has = module.has_variable
    if has("batch_stats", other) and not has("batch_stats", wanted):
        raise invalid(
            layer(module),
            f"batch_stats with {other!r}",
            f"{wanted!r}, which population={module.population!r} keeps",
            "make the module with the population of the checkpoint, or convert the checkpoint",
        )
