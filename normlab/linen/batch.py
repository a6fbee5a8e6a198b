"""Batch norm as a `flax.linen` module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab import _flax as skin
from normlab._checks import invalid
from normlab.devices.topology import AxisName
from normlab.population.transaction import begin

Init = Callable[..., Any]
zeros, ones = nn.initializers.zeros, nn.initializers.ones


@skin.checked("BatchNorm")
class BatchNorm(nn.Module):
    """Batch normalization, `normlab.batch_norm`, with the interface of `flax.linen.BatchNorm`.

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
        the state of that name as the one variable `population` of `batch_stats`.

    >>> layer = BatchNorm(use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 2)))
    >>> jax.tree.map(jnp.shape, variables["batch_stats"])
    {'mean': (2,), 'var': (2,)}
    """

    use_running_average: bool | None = None
    axis: skin.Axes = -1
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
        where, mode = layer(self), "use_running_average"
        train = not skin.read(
            where, mode, nn.merge_param(mode, self.use_running_average, use_running_average)
        )
        axis_name = skin.sync(where, self.axis_name, self.axis_index_groups)
        shape = skin.feature_shape(where, x, self.axis)
        state, write = _statistics(self, shape, train, jnp.result_type(x))
        scale, bias = scale_and_bias(self, shape)
        call = skin.make_call(where, x, self.axis, mask, self.dtype, scale, bias)
        init = self.is_initializing()
        # One example, on no device in particular, is enough to make the variables with.
        parts, state = skin.batch(
            call,
            None if init and train else state,
            train=train,
            over=None if init else axis_name,
            quiet=init,
            eps=self.epsilon,
            algorithm=skin.algorithm(self.use_fast_variance),
            state_gradient=True,
        )
        if train and not init:
            write(state)
        return skin.apply(call, parts, scale, bias)


def _statistics(
    module: BatchNorm, shape: tuple[int, ...], train: bool, x_dtype: Any
) -> tuple[Any, Callable[[Any], None]]:
    """The state of the module, and how to write it back: in no narrower type than is measured."""
    decay = skin.check_momentum(layer(module), module.momentum)
    if module.population != "ema":
        _check_layout(module, "population", "mean")
        fresh = skin.population(
            module.population, math.prod(shape), decay=decay, axis_name=module.axis_name
        )
        return stored(module, fresh, train)
    skin.check_whole(layer(module), module.axis_name)
    _check_layout(module, "mean", "population")
    dtype = jnp.float32 if module.force_float32_reductions else module.param_dtype
    mean = module.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
    var = module.variable("batch_stats", "var", jnp.ones, shape, dtype)

    seen = module.dtype or x_dtype
    if module.force_float32_reductions or not jnp.issubdtype(seen, jnp.floating):
        seen = skin.together(seen, jnp.float32)

    def write(new: Any) -> None:
        for kept, value in ((mean, new.mean), (var, new.var)):
            kept.value = value.reshape(shape).astype(skin.together(kept.value, seen))

    state = skin.average(mean.value.reshape(-1), var.value.reshape(-1), decay, seen)
    return in_transaction(module, state, write, train)


def stored(module: nn.Module, fresh: Any, train: bool) -> tuple[Any, Callable[[Any], None]]:
    """The state in the variable `population`, and how to write it back.

    Args:
      module: Whose state it is.
      fresh: The initial state.
      train: Whether it is to be written.
    """
    if not jax.tree.leaves(fresh):
        return fresh, lambda new: None
    kept = module.variable("batch_stats", "population", lambda: fresh)

    def write(new: Any) -> None:
        kept.value = new

    return in_transaction(module, kept.value, write, train)


def in_transaction(
    module: nn.Module, state: Any, write: Callable[[Any], None], train: bool
) -> tuple[Any, Callable[[Any], None]]:
    """The same, or the transaction's, if one is under way: its collection alone is mutable."""
    mutable = module.is_mutable_collection
    if module.is_initializing() or not mutable("transaction") or mutable("batch_stats"):
        return state, write
    pending = module.variable("transaction", "pending", begin, state)

    def merge(new: Any) -> None:
        pending.value = new

    return (pending.value if train else state), merge


def _check_layout(module: BatchNorm, wanted: str, other: str) -> None:
    has = module.has_variable
    if has("batch_stats", other) and not has("batch_stats", wanted):
        raise invalid(
            layer(module),
            f"batch_stats with {other!r}",
            f"{wanted!r}, which population={module.population!r} keeps",
            "make the module with the population of the checkpoint, or convert the checkpoint",
        )


def layer(module: nn.Module) -> str:
    """What errors and warnings call a module: its class, and its path in the model."""
    return " ".join([type(module).__name__, "/".join(module.path)]).rstrip()


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
