"""Norms that measure each example by itself, as kernels: layer, RMS, group and instance norm.

    h = f(g · (x − μ) / σ + b)        σ = √(var + ε)        x [N, P, C]

Forward, x is read once and h written once: an example, or the groups of it that a program has, stay
in fast memory until it is normalized. Backward, x and dh are read once and dx is written once, and
sums for dg and db are kept by program; XLA adds these up.

Statistics are taken in float32, in two passes over fast memory: the mean, corrected by the mean of
x − k, so that of a constant sample it is that constant; and the variance about it. Where the
variance overflows, r = 1/σ is NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from normlab._kernels.activations import operations_without
from normlab._kernels.tiles import Kind, thread_tile, vector_tile


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which norm it is.

    Attributes:
      groups: G, of neighbouring channels; each is measured over all positions.
      centred: Whether there is a mean.
      eps: ε.
      activation: f, elementwise; applied in float32.
      add: Whether a second array is added first: x is then the sum, in the type of x.
    """

    groups: int = 1
    centred: bool = True
    eps: float = 1e-5
    activation: Callable[[Array], Array] | None = None
    add: bool = False


def forward(
    spec: Rows,
    platform: str,
    interpret: bool,
    x: Array,
    g: Array,
    b: Array,
    y: Array | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """The norm of each example.

    Args:
      spec: Which norm.
      platform: `"tpu"` or `"cuda"`.
      interpret: Whether to run it as a program of XLA, on any platform.
      x: `[N, P, C]`.
      g: `[C]`, `[1]` or `[N, P, C]`.
      b: As `g`.
      y: What is added to `x`, in its shape and type.

    Returns:
      h, in the shape and type of `x`; the mean and 1/σ, `[N, G]` in float32; and x + y, or `None`.
    """
    arrays = {"x": x, "y": y} if spec.add else {"x": x}
    arrays |= {"g": _by_channel(g, x), "b": _by_channel(b, x)}
    types: dict[str, tuple[Kind, Any]] = {"h": ("every", x.dtype)}
    types |= {"mean": ("statistic", jnp.float32)} if spec.centred else {}
    types |= {"r": ("statistic", jnp.float32)}
    types |= {"total": ("every", x.dtype)} if spec.add else {}
    out = _call(_forward, spec, platform, interpret, arrays, types)
    mean = out["mean"] if spec.centred else jnp.zeros_like(out["r"])
    return out["h"], mean, out["r"], out["total"] if spec.add else None


def backward(
    spec: Rows,
    platform: str,
    interpret: bool,
    x: Array,
    dh: Array,
    g: Array,
    b: Array,
    mean: Array,
    r: Array,
    dtotal: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The derivatives of `forward`, of which the other arguments are.

    Args:
      spec: Which norm.
      platform: `"tpu"` or `"cuda"`.
      interpret: Whether to run it as a program of XLA, on any platform.
      x: `[N, P, C]`; the sum where something was added.
      dh: The cotangent of h.
      g: `[C]`, `[1]` or `[N, P, C]`.
      b: As `g`.
      mean: `[N, G]`, from `forward`.
      r: 1/σ, as `mean`.
      dtotal: The cotangent of the sum.

    Returns:
      dx, in the shape and type of `x`, which is dy, too; dg and db, in float32.
    """
    arrays = {"x": x, "dh": dh, "g": _by_channel(g, x)}
    arrays |= {"b": _by_channel(b, x)} if spec.activation else {}
    arrays |= {"mean": mean} if spec.centred else {}
    arrays |= {"r": r}
    arrays |= {"dtotal": dtotal} if dtotal is not None else {}
    types: dict[str, tuple[Kind, Any]] = {"dx": ("every", x.dtype)}
    for name, v in (("dg", g), ("db", b)):
        types[name] = ("every" if v.ndim == 3 else "sum", jnp.float32)
    out = _call(_backward, spec, platform, interpret, arrays, types)

    def gradient(v: Array, like: Array) -> Array:
        if like.ndim == 3:
            return v
        v = v.sum(0)
        return v if like.shape == v.shape else v.sum(keepdims=True)

    return out["dx"], gradient(out["dg"], g), gradient(out["db"], b)


def problem(
    spec: Rows,
    platform: str,
    shape: tuple[int, ...],
    dtype: Any,
    gain_shape: tuple[int, ...],
) -> str | None:
    """Why there is no kernel, and what would do; `None` if there is one.

    Args:
      spec: Which norm.
      platform: `"tpu"` or `"cuda"`.
      shape: `[N, P, C]` of x.
      dtype: Of x.
      gain_shape: Of g; b is taken to be alike.
    """
    dtype, otherwise = jnp.dtype(dtype), "; use implementation='xla'"
    if platform not in _TYPES:
        return f"there are kernels for {' and '.join(_TYPES)}, not for {platform}{otherwise}"
    if str(dtype) not in _TYPES[platform]:
        types = ", ".join(_TYPES[platform])
        return f"on {platform} there are kernels for {types}, not for {dtype}{otherwise}"
    if not all(isinstance(n, int) for n in shape):
        return f"a shape {shape} that is not known when the program is compiled{otherwise}"
    if 0 in shape:
        return f"an array {shape} without a value{otherwise}"
    _, p, c = shape
    if c % spec.groups:
        return f"{c} channels in {spec.groups} groups; use a number of groups that divides them"
    if spec.activation and (unknown := operations_without(spec.activation, platform)):
        return f"an activation with {', '.join(unknown)}; apply it to h{otherwise}"
    every = 2 if len(gain_shape) == 3 else 0  # g and b; backward, their derivatives too
    more = 2 if spec.add else 0
    for sums, sizes in (
        (False, [dtype.itemsize] * (2 + more) + [4] * every),
        (True, [dtype.itemsize] * (3 + more) + [4] * 2 * every),
    ):
        tile = _tile(spec, platform, shape, dtype.itemsize, sums)
        if excess := tile.excess(sizes):
            what = f"{p:,} positions with {c:,} channels" if p > 1 else f"rows of {c:,} channels"
            return f"{what} in {spec.groups} groups of {dtype} take {excess}{otherwise}"
    return None


_TYPES = {"tpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


def _by_channel(v: Array, x: Array) -> Array:
    """A gain of one number as one of each channel."""
    return v if v.ndim == 3 else jnp.broadcast_to(v, x.shape[2:]).astype(jnp.float32)


def _tile(spec: Rows, platform: str, shape: Any, itemsize: int, sums: bool) -> Any:
    if platform == "tpu":
        return vector_tile(shape, spec.groups, itemsize)
    return thread_tile(shape, spec.groups, itemsize, sums)


def _call(
    body: Callable[[Rows, Any, Any], Any],
    spec: Rows,
    platform: str,
    interpret: bool,
    arrays: dict[str, Any],
    types: dict[str, tuple[Kind, Any]],
) -> dict[str, Array]:
    """Runs `body` for each step; returns the arrays that it writes, of these kinds and types."""
    x = arrays["x"]
    kinds: dict[str, Kind] = {name: _kind(v) for name, v in arrays.items()}
    kinds |= {name: kind for name, (kind, _) in types.items()}
    sums = [name for name, kind in kinds.items() if kind == "sum"]
    tile = _tile(spec, platform, x.shape, x.dtype.itemsize, bool(sums))

    def kernel(*refs: Any) -> None:
        tile.run(kinds, types, refs, program)

    def program(step: Any) -> None:
        total = {name: jnp.zeros(tile.partial, jnp.float32) for name in sums}

        def run(i: Any, total: Any) -> Any:
            more = body(spec, dataclasses.replace(step, index=i), x.dtype)
            return {name: total[name] + more[name] for name in sums}

        total = run(0, total) if tile.steps == 1 else jax.lax.fori_loop(0, tile.steps, run, total)
        for name in sums:
            step.store(name, total[name].sum(0, keepdims=True))

    varying = jax.typeof(x).manual_axis_type
    run = pl.pallas_call(
        kernel,
        in_specs=[tile.spec(kinds[name]) for name in arrays],
        out_specs=[tile.spec(kind) for kind, _ in types.values()],
        out_shape=[
            jax.ShapeDtypeStruct(tile.whole(kind), dtype, manual_axis_type=varying)
            for kind, dtype in types.values()
        ],
        interpret=interpret,
        name=f"normlab{body.__name__}",
        **tile.options(kinds),
    )
    with jax.enable_x64(False):  # A TPU has no indices of 64 bits.
        out = run(*(tile.view(kinds[name], v) for name, v in arrays.items()))
    return {name: tile.back(types[name][0], v) for name, v in zip(types, out, strict=True)}


def _kind(v: Array) -> Kind:
    kinds: dict[int, Kind] = {1: "gain", 2: "statistic", 3: "every"}
    return kinds[v.ndim]


def _forward(spec: Rows, step: Any, dtype: Any) -> dict[str, Array]:
    def read(chunk: Any) -> Array:
        x = step.load("x", chunk)
        if spec.add:
            x = (x + step.load("y", chunk)).astype(dtype).astype(jnp.float32)
        return x

    x = step.once(read)
    mean, r = _measure(spec, step, x)
    step.store("r", r)
    if spec.centred:
        step.store("mean", mean)
    mean, r = step.spread(mean) if spec.centred else 0.0, step.spread(r)

    def write(chunk: Any) -> None:
        z = (x(chunk) - mean) * r * step.load("g", chunk) + step.load("b", chunk)
        step.store("h", spec.activation(z) if spec.activation else z, chunk)
        if spec.add:
            step.store("total", x(chunk), chunk)

    step.fold(write)
    return {}


def _measure(spec: Rows, step: Any, x: Callable[[Any], Array]) -> tuple[Any, Array]:
    """The mean and 1/σ of each group."""
    if spec.centred:
        k = step.average(step.fold(lambda chunk: step.sum(x(chunk))))
        pivot = step.spread(k)

        def sums(chunk: Any) -> tuple[Array, Array]:
            d = step.keep(x(chunk) - pivot, chunk)
            return step.sum(d), step.sum(d * d)

        first, second = map(step.average, step.fold(sums))
        mean, var = k + first, second - first * first
        var = jnp.where(var < 0, 0, var)
    else:
        mean, var = None, step.average(step.fold(lambda chunk: step.sum(x(chunk) * x(chunk))))
    return mean, jnp.where(var < jnp.inf, jax.lax.rsqrt(var + spec.eps), jnp.nan)


def _backward(spec: Rows, step: Any, dtype: Any) -> dict[str, Array]:
    mean = step.spread(step.load("mean")) if spec.centred else 0.0
    r = step.spread(step.load("r"))

    def read(chunk: Any) -> tuple[Array, Array]:
        """(x − μ)/σ, and the cotangent of what the activation is given."""
        d = step.keep((step.load("x", chunk) - mean) * r, chunk)
        u = step.keep(step.load("dh", chunk), chunk)
        if spec.activation:
            z = d * step.load("g", chunk) + step.load("b", chunk)
            _, u = jax.jvp(spec.activation, (z,), (u,))
        return d, u

    parts = step.once(read)

    def sums(chunk: Any) -> tuple[Array, ...]:
        d, u = parts(chunk)
        t = u * step.load("g", chunk)
        return (step.sum(t * d), step.sum(t)) if spec.centred else (step.sum(t * d),)

    along, *level = (step.spread(step.average(total)) for total in step.fold(sums))

    def write(chunk: Any) -> dict[str, Array]:
        d, u = parts(chunk)
        t = u * step.load("g", chunk) - d * along
        dx = ((t - level[0]) if spec.centred else t) * r
        if "dtotal" in step.refs:
            dx = dx + step.load("dtotal", chunk)
        step.store("dx", dx, chunk)
        found = {}
        for name, v in (("dg", u * d), ("db", u)):
            if step.kinds[name] == "sum":
                found[name] = step.by_channel(v)
            else:
                step.store(name, v, chunk)
        return found

    return step.fold(write)
