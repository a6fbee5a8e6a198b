"""Batch norm as a `flax.nnx` module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab import _flax as skin
from normlab.devices.topology import AxisName
from normlab.nnx.transactions import Stateful

Init = Callable[..., Any]
Metadata = Mapping[str, Any]
zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()
promote: Any = dtypes.promote_dtype
NONE: Metadata = MappingProxyType({})


class BatchNorm(Stateful):
    """Batch normalization, `normlab.batch_norm`, with the interface of `flax.nnx.BatchNorm`.

    >>> layer = BatchNorm(2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0, 100.0], [3.0, 300.0]])).round(2).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> layer.mean[...].round(1).tolist()
    [0.0, 2.0]
    """

    @skin.checked("BatchNorm")
    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: skin.Axes = -1,
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
    ) -> None:
        """Makes the variables.

        Args:
          num_features: Their number.
          use_running_average: Whether to normalize with the running statistics; here, at call
            time, or by `train()` and `eval()`.
          axis: The feature axis, or axes.
          momentum: The weight of the old value in the running statistics (the library's `decay`).
          epsilon: ε.
          dtype: The result's type; `None` for that of input, parameters and statistics.
          param_dtype: The parameters' type.
          use_bias: Whether there is a bias.
          use_scale: Whether there is a gain.
          bias_init: Its initializer.
          scale_init: Its initializer.
          axis_name: The axes over which the batch is one, or a `Sync`.
          axis_index_groups: Groups of devices along the axis, of any sizes.
          use_fast_variance: Whether to take the faster of two safe algorithms.
          promote_dtype: Asked for the result's type; what is measured is not rounded before.
          rngs: For the initializers.
          bias_metadata: Of the bias.
          scale_metadata: Of the gain.
          population: What is kept for inference. `"ema"` is Flax's own, `mean` and `var`. Any other
            name known to `normlab.population.init_population`, or a function of the features,
            keeps the state of that name as `population`, a `BatchStat` for each of its arrays.
        """
        decay = skin.check_momentum("BatchNorm", momentum)
        if population == "ema":
            skin.check_whole("BatchNorm", axis_name)
            self.mean = nnx.BatchStat(jnp.zeros((num_features,), jnp.float32))
            self.var = nnx.BatchStat(jnp.ones((num_features,), jnp.float32))
        else:
            state = skin.population(population, num_features, decay=decay, axis_name=axis_name)
            self._keep(state)
        self.pending = nnx.data(None)
        make_params(
            self,
            rngs,
            num_features,
            scale=(scale_init, scale_metadata) if use_scale else None,
            bias=(bias_init, bias_metadata) if use_bias else None,
            param_dtype=param_dtype,
        )
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
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
          use_running_average: Overrides the attribute.
          mask: What counts in the statistics, as booleans or weights: of the rank of `x`, or
            aligned with its first or with its last axes.
        """
        train = skin.is_training("BatchNorm", use_running_average, self.use_running_average)
        where = layer(self)
        state, write = self._kept(train)
        scale, bias = values(self)
        dtype = result_dtype(self, x, *_kept_types(self), scale, bias)
        call = skin.make_call(where, x, self.axis, mask, dtype)
        skin.check_features(call, "num_features", self.num_features)
        parts, state = skin.batch(
            call,
            state,
            train=train,
            over=skin.sync(where, self.axis_name, self.axis_index_groups),
            eps=self.epsilon,
            algorithm=skin.algorithm(self.use_fast_variance),
        )
        if train:
            write(state)
        return skin.apply(call, parts, scale, bias)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Changes the mode, for `nnx.view`.

        Args:
          use_running_average: Whether to normalize with the running statistics; `None` leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


def _kept_types(module: BatchNorm) -> list[jax.ShapeDtypeStruct]:
    """What `promote_dtype` is told of mean and variance."""
    pair = (getattr(module, name, None) for name in ("mean", "var"))
    kinds = [jnp.float32 if v is None else v.dtype for v in pair]
    return [jax.ShapeDtypeStruct((module.num_features,), kind) for kind in kinds]


def layer(module: Any) -> str:
    """What errors and warnings call a module, which does not know its path."""
    return f"{type(module).__name__} of {module.num_features} features"


def make_params(
    module: Any,
    rngs: nnx.Rngs,
    features: int,
    *,
    param_dtype: DTypeLike,
    **how: tuple[Init, Metadata] | None,
) -> None:
    """Sets `scale` and `bias`, from initializer and metadata; one that is absent is `None`."""
    for name, made in how.items():
        value = nnx.data(None)
        if made is not None:
            init, metadata = made
            value = nnx.Param(init(rngs.params(), (features,), param_dtype), **metadata)
        setattr(module, name, value)


def values(module: Any) -> tuple[Array | None, Array | None]:
    """The arrays in `scale` and `bias`; `None` for one that is absent."""
    scale, bias = module.scale, getattr(module, "bias", None)
    return (None if scale is None else scale[...], None if bias is None else bias[...])


def result_dtype(module: Any, x: ArrayLike, *others: Any) -> Any:
    """The type of the result; of `others` the last two are scale and bias."""
    if module.dtype is not None:
        return module.dtype
    with jax.numpy_dtype_promotion("standard"):
        promoted = jax.eval_shape(
            lambda *arrays: module.promote_dtype(arrays, dtype=None),
            jnp.asarray(skin.read(type(module).__name__, "x", x)),
            *others,
        )
        told = (promoted[0], *promoted[-2:])
        return jnp.result_type(*(v.dtype for v in told if v is not None))
