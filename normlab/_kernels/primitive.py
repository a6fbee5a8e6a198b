"""A kernel as an operation of JAX: with derivatives of every order, `vmap`, and no silent fallback.

A compiler can neither differentiate a kernel nor batch it. So each comes with the formula that says
what it computes, in operations of XLA: forward mode, derivatives beyond the first, and `vmap` over
what the kernel has no axis for, are the formula's. Reverse mode is another kernel, the transpose of
a linear operation that stands for the derivative.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from normlab._kernels.partitioned import by_examples
from normlab.errors import invalid

PLATFORMS = ("tpu", "cuda")
"""Those that there are kernels for."""

Arrays = tuple[Array, ...]


class Kernel(Protocol):
    """What is computed; hashable, and equal to what computes the same."""

    @property
    def where(self) -> str:
        """The layer, for errors."""
        ...

    @property
    def strict(self) -> bool:
        """Whether a platform without a kernel for it is an error; else the formula is taken."""
        ...

    @property
    def interpret(self) -> bool:
        """Whether an interpreter runs the kernel, on any platform."""
        ...

    @property
    def divisible(self) -> bool:
        """Whether devices that share the examples can each run it on theirs: `by_examples`."""
        ...

    @property
    def formula(self) -> Callable[..., Arrays]:
        """The same in operations of XLA."""
        ...

    @property
    def problem(self) -> Callable[..., str | None]:
        """`(platform, *arrays)`: why there is no kernel for such arrays, and what would do."""
        ...

    @property
    def run(self) -> Callable[..., Arrays]:
        """`(platform, *arrays)`: the kernel."""
        ...


def call(kernel: Kernel, *arrays: Array) -> Arrays:
    """What a kernel computes.

    It may have methods of its own in the place of the formula's: `jvp(primals, tangents)`, which
    returns results and their tangents; `transpose(arrays, cotangents)`, where those among the
    arrays that it is linear in are `None`, and which returns theirs; `batch(arrays, dims)`, as the
    formula's under `vmap`, or `None`.
    """
    return tuple(_kernel.bind(*arrays, kernel=kernel))


_kernel = Primitive("normlab_kernel")
_kernel.multiple_results = True


@_kernel.def_abstract_eval
def _(*avals: Any, kernel: Kernel) -> Any:
    return jax.make_jaxpr(kernel.formula)(*avals).out_avals


@functools.lru_cache(maxsize=256)
def _compiled(kernel: Kernel) -> Any:
    return jax.jit(lambda *arrays: _kernel.bind(*arrays, kernel=kernel))


@_kernel.def_impl
def _(*arrays: Array, kernel: Kernel) -> Any:
    with jax.disable_jit(False):
        return _compiled(kernel)(*arrays)


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], *, kernel: Any) -> Any:
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    if hasattr(kernel, "jvp"):
        return kernel.jvp(primals, tangents)
    return jax.jvp(kernel.formula, tuple(primals), tuple(tangents))


def _transpose(cotangents: Sequence[Any], *arrays: Any, kernel: Any) -> Any:
    known = [None if ad.is_undefined_primal(v) else v for v in arrays]
    found = kernel.transpose(known, [ad.instantiate_zeros(ct) for ct in cotangents])
    return [None if v is not None else ct for v, ct in zip(known, found, strict=True)]


def _batch(arrays: Sequence[Array], dims: Sequence[Any], *, kernel: Any) -> Any:
    found = kernel.batch(arrays, dims) if hasattr(kernel, "batch") else None
    if found is None:
        found = jax.vmap(kernel.formula, in_axes=tuple(dims))(*arrays)
    return found, [0] * len(found)


ad.primitive_jvps[_kernel] = _jvp
ad.primitive_transposes[_kernel] = _transpose
batching.primitive_batchers[_kernel] = _batch


def _lower(context: Any, *arrays: Any, kernel: Kernel, platform: str) -> Any:
    problem = _unsuitable(context, platform, kernel)
    if problem and kernel.strict:
        shapes = ", ".join(f"{v.dtype}{list(v.shape)}" for v in context.avals_in)
        asked = "interpret" if kernel.interpret else "pallas"
        given = f"implementation={asked!r} on {platform} for {shapes}: {problem}"
        change = "use implementation='auto', or 'xla'"
        raise invalid(kernel.where, given, "what a kernel takes (docs/kernels.md)", change)
    platform = PLATFORMS[0] if kernel.interpret else platform
    run = kernel.formula if problem else functools.partial(kernel.run, platform)
    if not problem and kernel.divisible and _shared(context):
        run = by_examples(run)
    # Here the types that say over which devices an array varies have done their work, and what
    # runs a kernel would have to keep to them.
    like = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in context.avals_in]
    untyped = jax.make_jaxpr(lambda *arrays: arrays)(*like).in_avals
    context = context.replace(avals_in=untyped)
    return mlir.lower_fun(run, multiple_results=True)(context, *arrays)


def _unsuitable(context: Any, platform: str, kernel: Kernel) -> str | None:
    if kernel.interpret:  # it takes what a TPU does, or proofs by it would prove less
        return kernel.problem(PLATFORMS[0], *context.avals_in)
    if platform not in PLATFORMS:
        return f"there are kernels for {' and '.join(PLATFORMS)}; 'interpret' runs them anywhere"
    # A compiled kernel cannot be cut: XLA would gather what it takes on every device.
    place = context.module_context.axis_context
    axes = getattr(getattr(place, "mesh", None), "shape", {})
    manual = getattr(place, "manual_axes", None)
    if _shared(context) and not getattr(place, "device_assignment", None):
        return "a program over devices that are not known; it can be called within shard_map"
    if manual is not None and any(n > 1 and name not in manual for name, n in axes.items()):
        return "a shard_map that leaves axes to XLA; it can be called within one over all of them"
    return kernel.problem(platform, *context.avals_in)


with contextlib.suppress(ImportError, AttributeError):
    # JAX tells the lowering of these which devices there are, as `by_examples` asks.
    from jax._src.dispatch import prim_requires_devices_during_lowering

    prim_requires_devices_during_lowering.add(_kernel)


def _shared(context: Any) -> bool:
    """Whether the program is one over several devices, as in plain `jit`."""
    place = context.module_context.axis_context
    several = (getattr(place, "num_devices", 1) or 1) > 1
    return several and getattr(place, "manual_axes", None) is None


for _platform in (*PLATFORMS, "cpu", "rocm"):
    mlir.register_lowering(
        _kernel, functools.partial(_lower, platform=_platform), platform=_platform
    )


def zeros(*arrays: Array) -> Arrays:
    """Tangents of what is looked at by no formula."""
    return tuple(map(jnp.zeros_like, arrays))
