"""The norms of activations as `flax.nnx` modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab._flax.calls import Axes, Call, apply, check_features, make_call
from normlab._flax.measure import batch, example, group, groups_of, instance
from normlab._flax.state import check_whole, initial, is_training
from normlab._flax.words import check_mode, checked, read
from normlab.devices.topology import AxisName
from normlab.equation import Parts
from normlab.implementation import Implementation
from normlab.nnx.transactions import Stateful
from normlab.sharded import OVER, ExampleAxes

Init = Callable[..., Any]
Metadata = Mapping[str, Any]
zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()
promote: Any = dtypes.promote_dtype
NONE: Metadata = MappingProxyType({})


class _Norm(nnx.Module):
    """What all the norms have: their arguments as attributes, and the parameters."""

    num_features: int
    epsilon: float
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    use_bias: bool
    use_scale: bool
    axis_name: ExampleAxes | None
    axis_index_groups: Any
    use_fast_variance: bool
    promote_dtype: Any
    implementation: Implementation
    scale: Any
    bias: Any

    def _make(self, given: dict[str, Any]) -> None:
        """Keeps the arguments, and makes `scale` and `bias`; one that is absent is `None`.

        `given` are the `locals()` of `__init__`: its arguments by name.
        """
        for name in ("scale", "bias"):
            how = (f"use_{name}", f"{name}_init", f"{name}_metadata")
            use, init, metadata = (given.pop(argument, None) for argument in how)
            if use is None:
                continue  # RMSNorm knows no bias
            value = nnx.data(None)
            if use:
                key, shape = given["rngs"].params(), (given["num_features"],)
                value = nnx.Param(init(key, shape, given["param_dtype"]), **metadata)
            setattr(self, name, value)
            setattr(self, f"use_{name}", use)
        for name in given.keys() - {"self", "rngs", "population"}:
            setattr(self, name, given[name])

    def _begin(
        self, x: ArrayLike, features: Axes, mask: Any, *statistics: Any
    ) -> tuple[Call, Array | None, Array | None]:
        """The call, and the arrays in `scale` and `bias`; `statistics` are told `promote_dtype`."""
        params = [getattr(self, name) for name in ("scale", "bias") if hasattr(self, name)]
        params = [None if v is None else v[...] for v in params]
        dtype = self._result_dtype(x, *statistics, *params)
        call = make_call(self, layer(self), x, features, mask, dtype)
        check_features(call, "num_features", self.num_features)
        return call, params[0], params[1] if len(params) > 1 else None

    def _result_dtype(self, x: ArrayLike, *others: Any) -> Any:
        """The type of the result; of `others` the last two are scale and bias."""
        if self.dtype is not None:
            return self.dtype
        with jax.numpy_dtype_promotion("standard"):
            promoted = jax.eval_shape(
                lambda *arrays: self.promote_dtype(arrays, dtype=None),
                jnp.asarray(read(type(self).__name__, "x", x)),
                *others,
            )
            told = (promoted[0], *promoted[-2:])
            return jnp.result_type(*(v.dtype for v in told if v is not None))


def layer(module: Any) -> str:
    """What errors and warnings call a module, which does not know its path."""
    return f"{type(module).__name__} of {module.num_features} features"


class BatchNorm(Stateful, _Norm):
    """Batch normalization, `normlab.batch_norm`, with the interface of `flax.nnx.BatchNorm`.

    h = g · (a − μ) / √(var + ε) + b, with the gain `scale` and the bias `bias` of each of
    `num_features` channels. In training μ and var are those of the batch, which the averages `mean`
    and `var` take in; with `use_running_average=True` they are the averages.

    What is beside flax's arguments is as in `normlab.linen.BatchNorm`: `axis_name` may be a `Sync`,
    `population` says what is kept for inference, `implementation` whether a kernel is used.

    >>> layer = BatchNorm(2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0, 100.0], [3.0, 300.0]])).round(2).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> layer.mean[...].round(1).tolist()
    [0.0, 2.0]
    """

    axis: Axes

    @checked("BatchNorm")
    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Init = zeros,
        scale_init: Init = ones,
        axis_name: AxisName | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        population: str | Callable[[int], Any] = "ema",
        implementation: Implementation = "auto",
    ) -> None:
        """Makes the variables; arguments as those of `LayerNorm` and `normlab.linen.BatchNorm`.

        The mode, `use_running_average`, is set here, at call time, or by `train()` and `eval()`.
        Another population than `"ema"` is kept as `population`, a `BatchStat` for each of its
        arrays. What `promote_dtype` says, of the statistics too, rounds nothing that is measured.
        """
        self._make(locals())
        self.pending = nnx.data(None)
        if population == "ema":
            check_whole("BatchNorm", axis_name)
            self.mean = nnx.BatchStat(jnp.zeros((num_features,), jnp.float32))
            self.var = nnx.BatchStat(jnp.ones((num_features,), jnp.float32))
        else:
            options = {"decay": momentum, "eps": epsilon, "axis_name": axis_name}
            self._keep(initial(population, num_features, **options))

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`.

        Args:
          x: The input.
          use_running_average: Overrides the attribute.
          mask: What counts in the statistics, as booleans or weights: of the rank of `x`, or
            aligned with its first or with its last axes.
        """
        train = is_training("BatchNorm", use_running_average, self.use_running_average)
        state, write = self._kept(train)
        # What `promote_dtype` is told of mean and variance.
        pair = (getattr(self, name, None) for name in ("mean", "var"))
        kinds = [jnp.float32 if v is None else v.dtype for v in pair]
        told = [jax.ShapeDtypeStruct((self.num_features,), kind) for kind in kinds]
        call, scale, bias = self._begin(x, self.axis, mask, *told)
        parts, state = batch(call, state, train=train)
        if train:
            write(state)
        return apply(call, parts, scale, bias)


class _ExampleNorm(_Norm):
    """A norm that measures each example by itself."""

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalizes `x`; arguments as of `BatchNorm`; `use_running_average` has no effect."""
        check_mode(layer(self), use_running_average)
        call, scale, bias = self._begin(x, getattr(self, "feature_axes", -1), mask)
        return apply(call, self._measure(call), scale, bias)

    def _measure(self, call: Call) -> Parts:
        """The parts of the norm."""
        raise NotImplementedError


class LayerNorm(_ExampleNorm):
    """Layer normalization, `normlab.layer_norm`, with the interface of `flax.nnx.LayerNorm`.

    >>> import jax.numpy as jnp
    >>> layer = LayerNorm(2, rngs=nnx.Rngs(0))
    >>> print(layer(jnp.array([[1.0, 3.0]])).round(2))
    [[-1.  1.]]
    """

    reduction_axes: Axes
    feature_axes: Axes

    @checked("LayerNorm", axis_name=OVER)
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
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: ExampleAxes | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        implementation: Implementation = "auto",
    ) -> None:
        """Makes the variables; arguments as those of `normlab.linen.LayerNorm`, and some of nnx.

        `num_features` is the product of the sizes of the feature axes, `rngs` is for the
        initializers, `promote_dtype` is asked for the type of the result where `dtype` is `None`,
        `bias_metadata` and `scale_metadata` are those of the parameters, and `implementation` is as
        in `normlab.linen.LayerNorm`.
        """
        self._make(locals())

    def _measure(self, call: Call) -> Parts:
        return example(call, self.reduction_axes)


class RMSNorm(_Norm):
    """Root mean square normalization, `normlab.rms_norm`, as `flax.nnx.RMSNorm`.

    >>> import jax.numpy as jnp
    >>> layer = RMSNorm(2, rngs=nnx.Rngs(0))
    >>> import numpy as np
    >>> print(np.asarray(layer(jnp.array([[1.0, 3.0]]))).round(2))
    [[0.45 1.34]]
    """

    reduction_axes: Axes
    feature_axes: Axes

    @checked("RMSNorm", axis_name=OVER)
    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Init = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: ExampleAxes | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = promote,
        rngs: nnx.Rngs,
        scale_metadata: Metadata = NONE,
        implementation: Implementation = "auto",
    ) -> None:
        """Makes the variables; arguments as those of `LayerNorm`."""
        self._make(locals())

    def __call__(
        self, x: ArrayLike, mask: Any = None, *, use_running_average: bool | None = None
    ) -> Array:
        """Normalizes `x`; arguments as of `BatchNorm`; `use_running_average` has no effect.

        A bool as the mask, the second as in Flax, is the mode of a module that stood here before.
        """
        check_mode(layer(self), use_running_average)
        mask = None if isinstance(mask, bool | np.bool_) else mask
        call, scale, bias = self._begin(x, self.feature_axes, mask)
        return apply(call, example(call, self.reduction_axes, centre=False), scale, bias)


class GroupNorm(_ExampleNorm):
    """Group normalization, `normlab.group_norm`, with the interface of `flax.nnx.GroupNorm`.

    >>> import jax.numpy as jnp
    >>> layer = GroupNorm(2, num_groups=1, rngs=nnx.Rngs(0))
    >>> print(layer(jnp.array([[1.0, 3.0]])).round(2))
    [[-1.  1.]]
    """

    num_groups: int
    group_size: int
    reduction_axes: Axes | None

    @checked("GroupNorm", axis_name=OVER)
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
        reduction_axes: Axes | None = None,
        axis_name: ExampleAxes | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        implementation: Implementation = "auto",
    ) -> None:
        """Makes the variables.

        Arguments as those of `LayerNorm`; `num_groups` is the number of groups of neighbouring
        channels, or `None` with a `group_size`; `reduction_axes` must include the last axis, and
        `None` stands for all but the first.
        """
        num_groups = groups_of("GroupNorm", num_features, num_groups, group_size)
        group_size = num_features // num_groups
        self._make(locals())
        self.feature_axis = -1

    def _measure(self, call: Call) -> Parts:
        return group(call, self.num_groups, self.reduction_axes)


class InstanceNorm(_ExampleNorm):
    """Instance normalization, `normlab.instance_norm`, as `flax.nnx.InstanceNorm`.

    >>> import jax.numpy as jnp
    >>> layer = InstanceNorm(1, rngs=nnx.Rngs(0))
    >>> print(layer(jnp.array([[[1.0], [3.0]]])).round(2))
    [[[-1.]
      [ 1.]]]
    """

    feature_axes: Axes

    @checked("InstanceNorm", axis_name=OVER)
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
        feature_axes: Axes = -1,
        axis_name: ExampleAxes | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = promote,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        implementation: Implementation = "auto",
    ) -> None:
        """Makes the variables; arguments as those of `LayerNorm`.

        Measured is over all axes but the first and the feature axes.
        """
        self._make(locals())

    def _measure(self, call: Call) -> Parts:
        return instance(call)
