"""What the modules need that hold a kernel, or any norm of the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normlab._arguments import either, instance, text
from normlab._checks import floating, normalize_axes, promote, promote_dtype
from normlab._flax.calls import Axes, operand, output_dtype
from normlab._flax.words import read
from normlab.cosine import cosine_norm
from normlab.equation import Affine
from normlab.errors import invalid
from normlab.family.spectral import init_spectral, measure_spectral, of_u
from normlab.linear import Conv, Dense, Linear
from normlab.maps import WeightMap
from normlab.placement.line import PLACEMENT as placement_kind
from normlab.placement.line import Call, Connection, Residual
from normlab.placement.streams import Mixing
from normlab.registry import get, names, row
from normlab.sharded import where_bound
from normlab.site import Norm
from normlab.weight import weight_norm


def normalized_kernel(
    where: str, v: Array, scale: Array | None, features: Axes | None, dtype: DTypeLike | None
) -> Array:
    """`weight_norm` of the kernel `v` for units along any axes; `None` if it is one unit.

    The scale is g, a size for each of these axes, or `None` for 1. The result is of the type
    `dtype`; of the one to which kernel and scale promote for `None`.
    """
    out = output_dtype(where, v, dtype, (scale,))
    axes = () if features is None else normalize_axes(where, features, v.ndim)
    order = (*(i for i in range(v.ndim) if i not in axes), *axes)
    moved = operand(floating(v), out).transpose(order)
    units = int(np.prod([v.shape[i] for i in axes]))
    w = weight_norm(
        moved.reshape(-1, units), None if scale is None else Affine(scale.reshape(units), None)
    )
    return w.reshape(moved.shape).transpose(np.argsort(order)).astype(out)


def check_weight_epsilon(epsilon: float, where: str = "WeightNorm") -> None:
    """Raises ValueError unless it is Flax's default, which no float32 kernel of length 1 feels."""
    if epsilon != 1e-12:
        raise invalid(
            where,
            f"epsilon={epsilon!r}",
            "Flax's 1e-12: the norm is taken without any, and is safe at zero",
            "leave it out",
        )


def cosine(
    layer: Any,
    x: ArrayLike,
    kernel: Array,
    scale: Array | None,
    bias: Array | None,
    linear: Linear = Dense(),  # noqa: B008
) -> Array:
    """`cosine_norm`, with no or several axes of examples: x is `[..., *positions, K]`.

    The kernel is `[*window, K, C]`, scale and bias are `[C]` or `None`; `layer`, the module, says
    `dtype` and `centred`.
    """
    where = type(layer).__name__
    x = jnp.asarray(read(where, "x", x))
    out = output_dtype(where, x, layer.dtype, (kernel, scale, bias))
    x = operand(floating(x), out)
    lead = x.shape[: x.ndim - (kernel.ndim - 1)]
    params = Affine(*(v if v is None else v.astype(promote_dtype(x)) for v in (scale, bias)))
    w = kernel.astype(promote_dtype(x))
    x = x.reshape(-1, *x.shape[len(lead) :])
    h = cosine_norm(x, w, params, linear=linear, centred=layer.centred)
    return h.reshape(*lead, *h.shape[1:]).astype(out)


def convolution(
    where: str,
    channels: int,
    kernel_size: Axes,
    strides: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> tuple[tuple[int, ...], Conv]:
    """The shape of a unit's kernel and the linear map that Flax's arguments of a convolution mean.

    Raises ValueError if the groups do not divide the channels.
    """

    def each(steps: Any) -> int | tuple[int, ...]:
        return steps if isinstance(steps, int) else 1 if steps is None else tuple(steps)

    window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
    if isinstance(padding, int):
        padding = (padding,) * len(window)
    if not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    if channels % groups:
        raise invalid(
            where,
            f"feature_group_count={groups} for an input of {channels} channels",
            "a number of groups that divides them",
            "change the groups or the input",
        )
    return (*window, channels // groups), Conv(each(strides), padding, each(dilation), groups)


def learned(params: Any, each: Callable[[str, Any], Any]) -> Any:
    """The params of a norm with each field replaced by `each(name, value)`, but `None` kept.

    The names are Flax's `scale` and `bias` for g and b, and a norm's own for the rest; params that
    have no fields are one, `of`.
    """
    if params is None:
        return None
    if not hasattr(params, "_fields"):
        return each("of", params)
    named: dict[str, str] = {"g": "scale", "b": "bias"}
    fields = zip(params._fields, params, strict=True)
    return type(params)(*(None if v is None else each(str(named.get(f, f)), v) for f, v in fields))


def spectral_kernel(
    layer: Any, v: Array, u: Array, *, update_stats: bool
) -> tuple[Array, Array, Array]:
    """Flax's spectral norm of a parameter, of `layer`, the module: the kernel, u `[1, C]` and σ̂.

    With `update_stats` u is that after `n_steps` steps of power iteration.
    """
    where = type(layer).__name__
    w = promote(floating(v))
    how: dict[str, Any] = {"linear": Dense(), "x": None, "of": "matrix", "warm": 0}
    how |= {"steps": layer.n_steps, "bound": None, "through": True}
    mapped, state = measure_spectral(w, of_u(u[0], w), train=update_stats, **how)
    out = output_dtype(where, v, layer.dtype, (u,))
    sigma = lax.stop_gradient(mapped.sigma).astype(layer.param_dtype)
    return mapped.unit.astype(out), state.u.astype(u.dtype)[None], sigma


def first_u(v: Array, dtype: DTypeLike) -> Array:
    """The u `[1, C]` that a module of spectral norm begins with, after 15 steps."""
    return init_spectral(v).u.astype(dtype)[None]


def is_spectral(layer: Any, v: Array) -> bool:
    """Whether Flax's spectral norm, of `layer`, the module, normalizes a parameter.

    Raises ValueError for one that is no matrix where that is to be an error.
    """
    if v.ndim <= 1 or layer.n_steps < 1:
        return False
    if v.ndim > 2 and layer.error_on_non_matrix:
        given = f"a parameter of shape {v.shape} with error_on_non_matrix=True"
        raise invalid("SpectralNorm", given, "matrices only", "leave error_on_non_matrix out")
    return True


def map_from_registry(name: str, options: Mapping[str, Any]) -> WeightMap:
    """`normlab.get`, of a map of the weights; raises ValueError for another norm."""
    norm = get(name, **options)
    if not isinstance(norm, WeightMap):
        known = [n for n in names() if isinstance(_made(n), WeightMap)]
        change = f"use one of {', '.join(known)}, or RegistryNorm for a norm of activations"
        raise invalid("RegistryWeights", repr(name), "a norm that is a map of the weights", change)
    return norm


def _made(name: str) -> Any:
    try:
        return get(name)
    except ValueError:  # an option is required
        return None


NORM = either(
    "the name of a norm, or a Norm",
    "use one of normlab.names(), or get(name, option=...)",
    text("", ""),
    instance(Norm, "", arrays=False),
)


def from_registry(norm: str | Norm, options: Mapping[str, Any]) -> Norm:
    """`normlab.get`, of a norm that needs no kernel; raises ValueError for another."""
    if isinstance(norm, Norm):
        if options:
            change = "pass get(name, **options), and no options"
            given = f"options={dict(options)} beside {norm!r}"
            raise invalid("RegistryNorm", given, "the options of a name", change)
        made, name = norm, None if norm.made is None else norm.made.name
    else:
        made, name = get(norm, **options), norm
    if name is not None and "w" in row(name).needs:
        raise invalid(
            "RegistryNorm",
            f"{name!r}, which looks at the weights",
            "a norm of activations",
            "use RegistryWeights around the layer, or CosineDense or CosineConv in its place",
        )
    return made


def before_the_map(norm: Norm) -> Norm:
    """The same norm of examples, which are whole where its axes of devices are not mapped."""
    options = dict(norm.made.options) if norm.made is not None else {}
    named = options.get("axis_name")
    if norm.made is None or row(norm.made.name).axis_of != "example" or where_bound(named) == named:
        return norm
    return get(norm.made.name, **{**options, "axis_name": None})


PLACEMENT = placement_kind._replace(expected="a placement")


def same_kind(where: str, made: Connection, given: Connection | None) -> Connection:
    """The placement of a call, or the module's; ValueError for one of other norms or gains."""
    if given is None or jax.tree.structure(given) == jax.tree.structure(made):
        return made if given is None else given
    change = "make a module of it; only numbers may change from call to call"
    raise invalid(where, f"{given!r} in the call", f"one as {made!r}", change)


def branch_of(where: str, *given: Any, **more: Any) -> Callable[[Array], Any]:
    """The one that is given of a branch of the module and of the call, with the arguments `more`.

    Raises ValueError unless it is one.
    """
    found = [branch for branch in given if branch is not None]
    if len(found) != 1:
        change = "pass it to the module, or to each call, Residual(placement)(x, branch)"
        raise invalid(where, f"{len(found)} branches", "one, as layer_instance", change)
    (branch,) = found
    return lambda h: branch(h, **more)


def gains_of(placement: Connection, x: Any, shortcut: Any) -> dict[str, Any]:
    """The initial gains of a placement by their names; those of a `Mixing` are a dict."""
    made = placement.init(x, Call(lambda *_: None, shortcut=shortcut))
    return {n: v._asdict() if isinstance(v, Mixing) else v for n, v in made.items()}


def as_gains(given: Mapping[str, Any]) -> Residual:
    """What `gains_of` made as the params of a connection."""
    named = {n: Mixing(**v) if isinstance(v, Mapping) else v for n, v in given.items()}
    return Residual(**named)
