"""Maps of the weights around a layer, and cosine layers, as `flax.nnx` modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
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
from normlab._flax.state import is_training
from normlab._flax.words import checked, read
from normlab.linear import Dense, Linear
from normlab.maps import INPUT, gain_alone, named, unnamed

Init = Callable[..., Any]
zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()
lecun = nnx.initializers.lecun_normal()


class WeightNorm(nnx.Module):
    """Weight normalization, `normlab.weight_norm`, with the interface of `flax.nnx.WeightNorm`.

    The layer's own kernels stay as they are, and `scales` holds an `nnx.Param` for each, by path.

    >>> layer = WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 4))).shape
    (2, 3)
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

        def normalized(path: Any, v: Array) -> Array:
            scale = self.scales[path][...] if self.use_scale else None  # pyright: ignore[reportOptionalSubscript]
            return normalized_kernel("WeightNorm", v, scale, self.feature_axes, self.dtype)

        return _called(self.layer_instance, self._chosen(), normalized)(x, *args, **kwargs)


class SpectralNorm(nnx.Module):
    """Spectral normalization, `normlab.family.spectral_norm`, with Flax's interface.

    The layer's own kernels stay as they are. `batch_stats` holds a u `[1, C]` and a sigma `[]` for
    each, by path, which calls with `update_stats` write.

    >>> layer = SpectralNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 4))).shape
    (2, 3)
    """

    @checked("SpectralNorm")
    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the u's, after 15 steps; arguments as those of `normlab.linen.SpectralNorm`.

        `update_stats` is the mode where the call says none, which `train()` and `eval()` set;
        `rngs` is kept for Flax: u comes from a fixed key.
        """
        del rngs
        check_weight_epsilon(epsilon, "SpectralNorm")
        self.layer_instance = layer_instance
        self.n_steps = n_steps
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        self.use_running_average = not update_stats
        stats = {}
        for path, param in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param)):
            if is_spectral(self, param[...]):
                stats[*path, "u"] = nnx.BatchStat(first_u(param[...], param_dtype))
                stats[*path, "sigma"] = nnx.BatchStat(jnp.ones((), param_dtype))
        self.batch_stats = nnx.data(stats)

    def __call__(self, x: ArrayLike, update_stats: bool | None = None) -> Any:
        """Calls the layer with normalized kernels."""
        mode = (
            None if update_stats is None else not read("SpectralNorm", "update_stats", update_stats)
        )
        train = is_training("SpectralNorm", mode, self.use_running_average)

        def normalized(path: Any, v: Array) -> Array:
            if not is_spectral(self, v):
                return v
            u, sigma = (self.batch_stats[*path, name] for name in ("u", "sigma"))
            kernel, new, found = spectral_kernel(self, v, u[...], update_stats=train)
            if train:
                u[...], sigma[...] = new, found
            return kernel

        return _called(self.layer_instance, nnx.Param, normalized)(x)


class RegistryWeights(nnx.Module):
    """Any map of the weights by its name in the registry, around a layer.

    `scales` holds the params of each kernel, by path, and `batch_stats` the arrays of its state.

    >>> layer = RegistryWeights(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), "spectral")
    >>> {key: v.shape for key, v in layer.batch_stats.items()}
    {('kernel', 'u'): (4,), ('kernel', 'v'): (3,)}
    """

    @checked("RegistryWeights", x=INPUT)
    def __init__(
        self,
        layer_instance: nnx.Module,
        norm: str,
        options: Mapping[str, Any] | None = None,
        *,
        linear: Linear = Dense(),  # noqa: B008
        x: Any = None,
        use_running_average: bool | None = False,
        variable_filter: Any = nnx.PathContains("kernel"),  # noqa: B008
    ) -> None:
        """Makes the variables; arguments as those of `normlab.linen.RegistryWeights`.

        `x` is the input or its shape, for a norm that asks for it: `spectral` with `of="map"`;
        `variable_filter` is a filter of nnx.
        """
        self.layer_instance = layer_instance
        self.norm = norm
        self.options = tuple(sorted((options or {}).items()))
        self.linear = linear
        self.use_running_average = use_running_average
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        made = map_from_registry(norm, dict(self.options))
        scales, stats = {}, {}
        for path, param in nnx.to_flat_state(nnx.state(layer_instance, self._chosen())):
            params, state = made.init_kernel(param[...], linear=linear, x=x)
            scales[path] = learned(gain_alone(params), lambda _, v: nnx.Param(v))
            stats |= {(*path, name): nnx.BatchStat(v) for name, v in named(state).items()}
        self.scales, self.batch_stats = nnx.data(scales), nnx.data(stats)

    def _chosen(self) -> Any:
        return nnx.All(nnx.Param, self.variable_filter)

    def __call__(
        self, x: ArrayLike, *args: Any, use_running_average: bool | None = None, **kwargs: Any
    ) -> Any:
        """Calls the layer with mapped kernels."""
        norm = map_from_registry(self.norm, dict(self.options))
        site: dict[str, Any] = {"linear": self.linear, "x": x}
        train = bool(self.batch_stats) and is_training(
            self.norm, use_running_average, self.use_running_average
        )

        def mapped(path: Any, v: Array) -> Array:
            shape: Any = jax.ShapeDtypeStruct(v.shape, v.dtype)
            like = jax.eval_shape(lambda: norm.init_kernel(shape, **site)[1])
            kept = {name: self.batch_stats[*path, name] for name in named(like)}
            state = unnamed(like, {name: variable[...] for name, variable in kept.items()})
            params = jax.tree.map(
                lambda p: p[...], self.scales[path], is_leaf=lambda p: isinstance(p, nnx.Variable)
            )
            kernel, after = norm.kernel(params, state, v, train=train, **site)
            for name, value in named(after).items() if train else ():
                kept[name][...] = value
            return kernel

        return _called(self.layer_instance, self._chosen(), mapped)(x, *args, **kwargs)


def _called(layer: Any, chosen: Any, mapped: Callable[[Any, Array], Array]) -> Any:
    """A copy of a layer with `mapped(path, v)` in the place of the chosen parameters."""
    graph, kernels, rest = nnx.split(layer, chosen, ...)
    new = [(path, v.replace(mapped(path, v[...]))) for path, v in nnx.to_flat_state(kernels)]
    return nnx.merge(graph, nnx.from_flat_state(new), rest)


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
    """A convolution of cosines, `normlab.cosine_norm`: each patch x of the input meets w.

    >>> layer = CosineConv(4, 3, (3, 3), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 8, 8, 4))).shape
    (2, 8, 8, 3)
    """

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
