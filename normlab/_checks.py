"""What every norm asks of its input, and how it says no.

A message names the norm, the value given, what was expected and what to change.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from normlab.errors import invalid, nearest


def imported(where: str, what: str, path: str) -> Any:
    """Returns what the path `"mypackage.module:name"` names; `where` and `what` are for the error.

    Raises ValueError if there is no such module, or nothing of that name in it.
    """
    module, _, name = path.partition(":")
    expected = "'mypackage.module:name' of something that can be imported"
    try:
        home = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        change = "name a module on the path of Python"
        raise invalid(where, f"the {what} {path!r}: {error}", expected, change) from error
    if not hasattr(home, name):
        public = [known for known in vars(home) if not known.startswith("_")]
        given = f"the {what} {path!r}: {module} has no {name!r}; {nearest(name, public)}"
        raise invalid(where, given, expected, "name one that the module has")
    return getattr(home, name)


def result_dtype(x: ArrayLike) -> Any:
    """The floating type of `x`; float32 for integers and booleans."""
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise invalid("normlab", f"a {dtype} array", "a real one", "normalize its parts apart")
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)


def promote_dtype(x: ArrayLike) -> Any:
    """The type in which the statistics of `x` are taken."""
    dtype = result_dtype(x)
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def promote(x: ArrayLike) -> Array:
    """Casts to the type in which statistics are taken: float32 at least; float64 stays."""
    return jnp.asarray(x).astype(promote_dtype(x))


def one_array(a: Any) -> Any:
    """What is measured and then applied, if it is NumPy's: one array of JAX for both."""
    numbers = isinstance(a, np.ndarray) and jnp.issubdtype(a.dtype, jnp.floating)
    return jnp.asarray(a) if numbers else a


def floating(x: ArrayLike) -> Array:
    """Returns `x` in its floating type; integers and booleans as float32."""
    return jnp.asarray(x).astype(result_dtype(x))


def normalize_axes(where: str, axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Returns `axes` as sorted, non-negative, distinct integers.

    Raises:
      ValueError: If one is out of range or repeated.
    """
    given = axes
    try:
        axes = tuple(map(operator.index, axes if isinstance(axes, Sequence) else (axes,)))
    except TypeError:
        axes = (ndim,)  # there is no such axis
    if not all(-ndim <= axis < ndim for axis in axes):
        raise invalid(
            where,
            f"axes {given!r} for an array of rank {ndim}",
            f"axes between {-ndim} and {ndim - 1}" if ndim else "an array that has axes",
            "name only axes the array has",
        )
    axes = tuple(sorted(axis % ndim for axis in axes))
    if len(set(axes)) != len(axes):
        raise invalid(where, f"axes {given!r}", "distinct axes", "name each axis once")
    return axes


def expand(v: Array, ndim: int, channel_axis: int) -> Array:
    """Reshapes `C` values to broadcast along `channel_axis` of an array of rank `ndim`."""
    shape = [1] * ndim
    shape[channel_axis] = -1
    return v.reshape(shape)


def check_parts(parts: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The parts as arrays, Python's numbers of the type; ValueError unless they fit the shape."""
    for name, part in zip(parts._fields, parts, strict=True):
        try:
            fits = jnp.broadcast_shapes(jnp.shape(part), shape) == tuple(shape)
        except ValueError:
            fits = False
        if not fits:
            raise invalid(
                "affine",
                f"a {name} of shape {jnp.shape(part)} for a pre-activation of shape {shape}",
                "a part that broadcasts to the pre-activation",
                "measure the parts on the same layout, or check the channel axis",
            )

    def array(part: Any) -> Any:
        if is_zero(part):
            return part
        return jnp.asarray(part, None if hasattr(part, "dtype") else dtype)

    return type(parts)(*map(array, parts))


def no_mean(dtype: Any) -> Any:
    """μ of a norm that has none: a zero that `affine` knows, so that no sum is taken for it.

    NumPy's, whose value shows while a program is traced, and of which no derivative can be asked.
    """
    return np.dtype(dtype).type(0)


def is_zero(part: Any) -> bool:
    """Whether a part is `no_mean`."""
    return isinstance(part, np.generic) and part == 0


def check_groups(where: str, groups: int, channels: int) -> None:
    """Raises ValueError unless the groups divide the channels."""
    if groups < 1 or channels % groups:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise invalid(
            where,
            f"groups={groups!r} for {channels} channels",
            f"a number of groups that divides {channels}",
            f"use one of {', '.join(map(str, divisors))}",
        )


def gain_and_bias(
    where: str, params: Any, a: ArrayLike, channel_axis: int, feature_axes: Any = None
) -> tuple[Array, Array]:
    """Returns `(g, b)` in the statistics' type, broadcastable to `a`; 1 and 0 where absent.

    Raises ValueError if `params` has no fields g and b, or one of them has no floating type or no
    shape that says along which axes of `a` it lies: see `learned`.
    """
    shape, dtype = jnp.shape(a), promote_dtype(a)
    if params is not None and not (hasattr(params, "g") and hasattr(params, "b")):
        raise invalid(
            where,
            f"params of type {type(params).__name__}",
            "an Affine(g, b), or None",
            "make them with init_affine(channels), or wrap yours: Affine(g=scale, b=bias)",
        )
    out = []
    for name, default in (("g", 1), ("b", 0)):
        value = None if params is None else getattr(params, name)
        if value is None:
            out.append(jnp.full((), default, dtype))
            continue
        along = _along(jnp.shape(value), shape, channel_axis, feature_axes)
        if along is None:
            channels = shape[channel_axis]
            raise invalid(
                where,
                f"{name} of shape {jnp.shape(value)} for an input of shape {shape} with its "
                f"channels on axis {channel_axis}",
                f"shape ({channels},); () for one number; by example ({shape[0]}, {channels}); or "
                "as many axes as the input, each of its size or 1",
                _gain_that_fits(name, jnp.shape(value), shape, channel_axis % len(shape)),
            )
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise invalid(
                where,
                f"{name} of type {jnp.result_type(value)}",
                "a floating type",
                f"cast it, for example {name}.astype(jnp.float32)",
            )
        out.append(jnp.asarray(value).astype(dtype).reshape(along))
    return out[0], out[1]


def _gain_that_fits(name: str, of: tuple[int, ...], shape: tuple[int, ...], channel: int) -> str:
    """What to do about a gain of the shape `of`, which may be one that a condition made."""
    n, c = shape[0], shape[channel]
    if len(of) < 2:
        change, ones = f"make the parameters with init_affine({c})", ", 1" * (len(shape) - 1)
        each = f", or say one number for each example as {name}.reshape(-1{ones})"
        return f"{change}, or set channel_axis{each if of == (n,) else ''}"
    sizes = [m for m in of if m != 1]
    if sizes == [c]:
        change = f"say one for all examples as {name}.reshape({c})"
    elif sizes == [n, c]:
        change = f"reshape it to one by example, ({n}, {c}), or set channel_axis"
    elif of == (c, n):
        change = f"transpose it to one by example, ({n}, {c})"
    elif of[0] == n and of[-1] != c and of[-1] % c == 0:
        parts = of[-1] // c
        change = f"split what the net made: jnp.split(..., {parts}, axis=-1), each ({n}, {c})"
    elif of[1:] == (c,):
        change = f"take its row for each example, {name}[labels], of shape ({n}, {c})"
    elif of == shape[1:]:
        change = f"give it an axis for the examples, {name}[None]"
    else:
        change = f"make it one by example, ({n}, {c})"
    return f"{change}; for a condition pass nl.modulate(params, scale, shift) as the params"


def _along(
    of: tuple[int, ...], shape: tuple[int, ...], channel_axis: int, feature_axes: Any
) -> tuple[int, ...] | None:
    """The shape, broadcastable to `shape`, that a gain of the shape `of` has; `None` if none."""
    ndim, channel = len(shape), channel_axis % len(shape)
    if of == ():
        return ()
    if feature_axes is not None:
        axes = [axis % ndim for axis in feature_axes]
        if of == tuple(shape[i] for i in axes) and axes == sorted(axes):
            return tuple(n if i in axes else 1 for i, n in enumerate(shape))
    elif of == (shape[channel],):
        return tuple(n if i == channel else 1 for i, n in enumerate(shape))
    if len(of) == ndim and all(m in (1, n) for m, n in zip(of, shape, strict=True)):
        return of
    if channel and of == (shape[0], shape[channel]):
        return tuple(n if i in (0, channel) else 1 for i, n in enumerate(shape))
    return None


def check_options(
    name: str, known: Mapping[str, Any], options: Mapping[str, Any], *, of: str = "norm"
) -> None:
    """Raises ValueError for an option that a norm or a scheme does not have, or one missing.

    `known` are the parameters of its factory, `options` what was given, `of` the kind of thing.
    """
    where, make = f"{name} {of}", "get" if of == "norm" else of
    for option in options:
        if option not in known:
            given = f"the unknown option {option!r}: {nearest(option, known)}"
            change = "use a known one" if known else "leave it out"
            raise invalid(where, given, "one of its options", change)
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            change = f"say {make}({name!r}, {option}=...)"
            raise invalid(where, f"no {option}", "this option, which has no default", change)


def check_dense(x: Array, w: Array) -> None:
    """Raises ValueError unless a dense layer takes the input and the kernel."""
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise invalid(
            "Dense",
            f"an input of shape {x.shape} and a kernel of shape {w.shape}",
            "shapes [..., K] and [K, C]",
            "give the kernel as many rows as the input has features; for the kernel of a "
            "convolution pass linear=Conv(...)",
        )


def check_conv(conv: Any, x: Array, w: Array) -> None:
    """Raises ValueError unless a `Conv` takes the input and the kernel."""
    spatial = w.ndim - 2
    if spatial < 0:
        raise invalid(
            "Conv",
            f"a kernel of shape {w.shape}",
            "[*window, K/groups, C]",
            "pass a convolution's kernel, or linear=Dense() for a dense layer",
        )
    if x.ndim != w.ndim or x.shape[conv.channel_axis] != w.shape[-2] * conv.groups:
        raise invalid(
            "Conv",
            f"an input of shape {x.shape} and a kernel of shape {w.shape}",
            f"{w.shape[-2] * conv.groups} input channels on axis {conv.channel_axis} of an "
            f"input of rank {w.ndim}",
            "give the kernel the shape [*window, K/groups, C], or set channel_axis",
        )
    if w.shape[-1] % conv.groups:
        raise invalid(
            "Conv",
            f"groups={conv.groups} for {w.shape[-1]} output channels",
            "groups that divide the output channels",
            "change the groups or the kernel",
        )


def each_axis(name: str, value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    """A setting of a `Conv` for each of its spatial axes."""
    values = (value,) * spatial if isinstance(value, int) else tuple(value)
    if len(values) != spatial:
        raise invalid(
            "Conv", f"{name}={value}", f"one number, or {spatial}", "give one per spatial axis"
        )
    return values


def check_values(
    where: str, shape: tuple[int, ...] | str, one: bool, each: str, change: str, also: str = ""
) -> None:
    """Raises ValueError for a norm that would measure the variance of `one` value per `each`."""
    if one:
        raise invalid(
            where,
            f"an input of shape {shape}, one value per {each}",
            f"{also}at least two values per {each}: the variance of one is zero and the output "
            "would be the bias alone",
            change,
        )


def output_shape(where: str, call: str, linear: Any, x: ArrayLike, w: ArrayLike) -> Any:
    """Returns the shape of `linear(x, w)`, from the shapes of `x` and `w` alone.

    Raises ValueError, with the `call` that is to be given another `linear`, if it takes them not.
    """
    # Neither types nor shardings: x and w may have had others where a was computed.
    shapes = [jax.ShapeDtypeStruct(jnp.shape(v), jnp.float32) for v in (x, w)]
    try:
        return jax.eval_shape(linear, *shapes).shape
    except (IndexError, TypeError, ValueError) as error:
        raise invalid(
            where,
            f"x of shape {jnp.shape(x)} and w of shape {jnp.shape(w)}, to which {linear} cannot be "
            "applied",
            "the input and the kernel of one linear map",
            f"pass that map, {call}(..., linear=Conv(...)) or linear=Dense(), and its own x and w",
        ) from error


def inputs(where: str, site: Any) -> Array:
    """Returns `site.x`, or says that it is missing."""
    return _present(where, "x", site.x, "the input of the layer")


def _present(where: str, name: str, value: Any, expected: str) -> Array:
    if value is None:
        change = "pass Site(a=linear(x, w), x=x, w=w, linear=linear)"
        raise invalid(where, f"a site without {name}", expected, change)
    return value


def kernel(where: str, site: Any, *, of_x: bool = True) -> Array:
    """Returns `site.w`, or says what is missing or does not fit.

    That `a` has the shape of `linear(x, w)` is seen by the shapes alone, and of symbolic sizes
    those that are known to differ are refused. Whoever does not look `of_x` asks for no more than
    the layer: `a` may be that of other examples.
    """
    a, w = jnp.shape(site.a), jnp.shape(_present(where, "w", site.w, "the kernel of the layer"))
    if site.x is not None:
        made = output_shape(where, "Site", site.linear, site.x, site.w)
        first = 0 if of_x else 1
        if len(made) != len(a) or any(map(_unequal, made[first:], a[first:])):
            raise invalid(
                where,
                f"a of shape {a} for x of shape {jnp.shape(site.x)} and w of shape {w}, of which "
                f"{site.linear} makes {made}",
                "a = linear(x, w)",
                "pass Site(..., linear=Conv(...)) with the strides, padding, groups and "
                "channel_axis of the layer that made a, and its own x and w",
            )
    elif w[-1] != site.channels:
        raise invalid(
            where,
            f"a kernel of shape {w} for a pre-activation of shape {a} with {site.linear}",
            f"a kernel with {site.channels} units, on its last axis",
            "pass the w of the same layer, units last, and the layer: Site(..., linear=Conv(...))",
        )
    return site.w


def _unequal(m: Any, n: Any) -> bool:
    """Whether two sizes are known to differ; those that are symbolic may be equal."""
    difference = m - n
    return isinstance(difference, int) and difference != 0
