"""Maps of the weights around a layer, and cosine layers, as `flax.linen` modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab._flax.calls import Axes, feature_shape
from normlab._flax.layers import (
    check_weight_epsilon,
    convolution,
    cosine,
    first_u,
    is_spectral,
    learned,
    map_from_registry,
    normalized_kernel,
    spectral_kernel,
)
from normlab._flax.words import checked, read
from normlab.linear import Dense, Linear
from normlab.linen.norms import merged_mode
from normlab.maps import gain_alone, named, unnamed

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

    >>> import jax
    >>> layer = WeightNorm(nn.Dense(3))
    >>> variables = layer.init(jax.random.key(0), x := jnp.ones((2, 4)))
    >>> layer.apply(variables, x).shape
    (2, 3)
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
        return _called(self, self._normalized, args, kwargs)

    def _normalized(self, name: str, v: Array) -> Array:
        if not _is_named(self.variable_filter, name):
            return v
        scale = None
        if self.use_scale:
            shape = feature_shape("WeightNorm", v, self.feature_axes)
            scale = self.param(f"{name}/scale", self.scale_init, shape, self.param_dtype)
        return normalized_kernel("WeightNorm", v, scale, self.feature_axes, self.dtype)


@checked("SpectralNorm")
class SpectralNorm(nn.Module):
    """Spectral normalization, `normlab.family.spectral_norm`, with Flax's interface.

    A call without `update_stats` makes no step, and takes σ̂ = ‖Wᵀu‖ of the W that there is. u
    begins after 15 steps.

    Attributes:
      layer_instance: The layer whose parameters of two axes and more are normalized.
      n_steps: The steps of power iteration of a call with `update_stats`; below 1 nothing is
        normalized.
      epsilon: Only Flax's own: directions are exact here, and safe at zero without it.
      dtype: The normalized kernel's type; `None` for that of kernel and u.
      param_dtype: The type of u and σ̂.
      error_on_non_matrix: Whether parameters of more than two axes are errors.
      collection_name: Where u `[1, C]` and sigma `[]` are.

    >>> import jax
    >>> layer = SpectralNorm(nn.Dense(3))
    >>> variables = layer.init(jax.random.key(0), x := jnp.ones((2, 4)), update_stats=False)
    >>> h, updated = layer.apply(variables, x, update_stats=True, mutable=["batch_stats"])
    >>> h.shape
    (2, 3)
    """

    layer_instance: nn.Module
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Calls the layer with normalized kernels; `update_stats` is training."""
        check_weight_epsilon(self.epsilon, "SpectralNorm")
        update_stats = read("SpectralNorm", "update_stats", update_stats)

        def normalized(name: str, v: Array) -> Array:
            if not is_spectral(self, v):
                return v
            where, dtype = self.collection_name, self.param_dtype
            u = self.variable(where, f"{name}/u", first_u, v, dtype)
            sigma = self.variable(where, f"{name}/sigma", jnp.ones, (), dtype)
            kernel, new, found = spectral_kernel(self, v, u.value, update_stats=update_stats)
            if update_stats:
                u.value, sigma.value = new, found
            return kernel

        return _called(self, normalized, args, kwargs)


@checked("RegistryWeights")
class RegistryWeights(nn.Module):
    """Any map of the weights by its name in the registry, around a layer.

    The gain is a parameter of this module, a state is in `batch_stats`; both under the path of the
    kernel, as in `WeightNorm`.

    Attributes:
      layer_instance: The layer.
      norm: A name, `"weight_standardization"`, `"spectral"`, of `normlab.get`.
      options: Its options; a bias is the layer's own.
      linear: The linear map, for a norm that asks for it: `spectral` with `of="map"`.
      use_running_average: As in `BatchNorm`, for a norm with a state.
      variable_filter: Parts of the paths of the parameters that are mapped; `None` for all.

    >>> layer = RegistryWeights(nn.Dense(4), "spectral", use_running_average=True)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> jax.tree.map(jnp.shape, variables["batch_stats"])
    {'layer_instance/kernel/u': (4,), 'layer_instance/kernel/v': (3,)}
    """

    layer_instance: nn.Module
    norm: str
    options: Mapping[str, Any] = field(default_factory=core.FrozenDict)
    linear: Linear = Dense()
    use_running_average: bool | None = None
    variable_filter: Iterable[str] | None = field(default_factory=lambda: {"kernel"})

    @nn.compact
    def __call__(self, *args: Any, use_running_average: bool | None = None, **kwargs: Any) -> Any:
        """Calls the layer with mapped kernels."""
        norm = map_from_registry(self.norm, self.options)
        site: dict[str, Any] = {"linear": self.linear, "x": args[0] if args else None}

        def mapped(name: str, v: Array) -> Array:
            if not _is_named(self.variable_filter, name):
                return v
            params, fresh = norm.init_kernel(v, **site)
            train = bool(named(fresh)) and not merged_mode(self, self.norm, use_running_average)
            params = learned(
                gain_alone(params), lambda field, v: self.param(f"{name}/{field}", lambda key: v)
            )
            state = {
                leaf: self.variable("batch_stats", f"{name}/{leaf}", lambda value=value: value)
                for leaf, value in named(fresh).items()
            }
            now = unnamed(fresh, {leaf: variable.value for leaf, variable in state.items()})
            train = train and not self.is_initializing()
            kernel, after = norm.kernel(params, now, v, train=train, **site)
            for leaf, value in named(after).items() if train else ():
                state[leaf].value = value
            return kernel

        return _called(self, mapped, args, kwargs)


def _called(
    module: Any,
    mapped: Callable[[str, Array], Array],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Calls the layer that a module wraps, with `mapped(name, v)` in the place of its parameters.

    A name is the path from where the layer is. The parameters that are stored stay as they are.
    """

    def each(path: Any, v: Array) -> Array:
        inner = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        return mapped(f"{module.layer_instance.name}/{inner}", v)

    call = nn.map_variables(
        lambda layer: layer(*args, **kwargs),
        "params",
        trans_in_fn=lambda variables: jax.tree_util.tree_map_with_path(each, variables),
        init=module.is_initializing(),
    )
    return call(module.layer_instance)


def _is_named(wanted: Iterable[str] | None, name: str) -> bool:
    return not wanted or any(part in name for part in wanted)


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

    >>> import jax
    >>> layer = CosineDense(3)
    >>> variables = layer.init(jax.random.key(0), x := jnp.ones((2, 4)))
    >>> h = layer.apply(variables, x)
    >>> h.shape, bool((abs(h) <= 1.001).all())
    ((2, 3), True)
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

    >>> import jax
    >>> layer = CosineConv(3, (3, 3))
    >>> variables = layer.init(jax.random.key(0), x := jnp.ones((2, 8, 8, 4)))
    >>> layer.apply(variables, x).shape
    (2, 8, 8, 3)
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
