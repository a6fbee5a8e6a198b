"""The blocks of `bench bytes`, as the textbook has them, around the norm of each contestant.

Nothing but the norm differs. Attention is causal, with heads of 128, by a kernel that keeps no
scores wherever JAX brings one, for a TPU and a GPU: else scores would be most of what is moved.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .blocks import BLOCKS, WITHOUT, Program
from .peers_jax import BUILDERS, F, fused
from .worker import Case, Contestant

HEAD = 128
"""Channels of a head, where they divide the width."""


class Norm(NamedTuple):
    """A contestant's norm at one place, and what it does in one with its neighbours.

    Attributes:
      f: `(x, *parameters) -> (h, aux)`.
      add: `(x, y, *parameters) -> (h, x + y, aux)`, with h the norm of the sum.
      relu: `(x, residual, *parameters) -> (relu(norm + residual), aux)`; `None` adds nothing.
    """

    f: F
    add: Callable[..., tuple[Array, Array, Any]] | None = None
    relu: Callable[..., tuple[Array, Any]] | None = None

    def of_sum(self, x: Array, y: Array, *params: Array) -> tuple[Array, Array, Any]:
        """The norm of x + y, and the sum."""
        if self.add is not None:
            return self.add(x, y, *params)
        total = x + y
        h, aux = self.f(total, *params)
        return h, total, aux

    def activated(self, x: Array, residual: Array | None, *params: Array) -> tuple[Array, Any]:
        """ReLU of the norm, or of its sum with the residual."""
        if self.relu is not None:
            return self.relu(x, residual, *params)
        h, aux = self.f(x, *params)
        return jax.nn.relu(h if residual is None else h + residual), aux


FUSED: dict[str, Callable[[Case], Mapping[str, Any]]] = {"normlab, pallas, fused": fused}
"""Of contestants that have them, by name: what makes `add` and `relu` of `Norm`."""


def contestants(peer: str, program: Program) -> list[Contestant]:
    """The ways in which a peer, or `WITHOUT`, does a program; `f` is `(x, norms, kernels)`.

    Raises:
      ValueError: If it has no such norm; the text says so.
    """
    if peer == WITHOUT:
        ways = [(Contestant(peer, peer, _identity, safe=True),) * len(program.cases)]
    else:
        ways = list(zip(*(BUILDERS[peer](case) for case in program.cases), strict=True))
    found = []
    for way in ways:
        more = FUSED.get(way[0].name, lambda _: {})
        norms = [Norm(w.f, **more(case)) for w, case in zip(way, program.cases, strict=True)]
        found.append(dataclasses.replace(way[0], f=functools.partial(_F[program.block], norms)))
    return found


def arguments(program: Program) -> tuple[Any, ...]:
    """Shapes and types of x, of the parameters of each norm, and of the kernels."""
    shaped, dtype = jax.ShapeDtypeStruct, jnp.dtype(program.dtype)
    norms = tuple(
        (shaped(case.shape[-1:], jnp.float32),) * (1 if case.op == "rms" else 2)
        for case in program.cases
    )
    kernels = BLOCKS[program.block].kernels(program.shape[-1])
    return shaped(program.shape, dtype), norms, {k: shaped(s, dtype) for k, s in kernels.items()}


def _identity(x: Array, *params: Array) -> tuple[Array, tuple[()]]:
    del params
    return x, ()


def _alone(norms: Sequence[Norm], x: Array, params: Any, kernels: Any) -> tuple[Array, Any]:
    del kernels
    return norms[0].f(x, *params[0])


def _transformer(norms: Sequence[Norm], x: Array, params: Any, kernels: Any) -> tuple[Array, Any]:
    (first, second), width = norms, x.shape[-1]
    size = HEAD if width % HEAD == 0 else width
    h, one = first.f(x, *params[0])
    q, k, v = ((h @ kernels[name]).reshape(*x.shape[:-1], -1, size) for name in "qkv")
    h = attention(q, k, v).reshape(x.shape) @ kernels["out"]
    h, x, other = second.of_sum(x, h, *params[1])
    return x + jax.nn.gelu(h @ kernels["up"]) @ kernels["down"], (one, other)


def _bottleneck(norms: Sequence[Norm], x: Array, params: Any, kernels: Any) -> tuple[Array, Any]:
    h, auxiliary = x, []
    for i, (norm, own) in enumerate(zip(norms, params, strict=True)):
        h = lax.conv_general_dilated(
            h, kernels[f"conv{i}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h, aux = norm.activated(h, x if i == len(norms) - 1 else None, *own)
        auxiliary.append(aux)
    return h, auxiliary


_F = {"alone": _alone, "transformer": _transformer, "bottleneck": _bottleneck}


def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal, of `[N, T, H, D]`: by the kernel that JAX brings for the backend, if it has one."""
    backend, size = jax.default_backend(), q.shape[-1]
    if backend not in ("tpu", "gpu") or size != HEAD or q.shape[1] % HEAD:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    if backend == "tpu":
        from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
        return flash_attention(q, k, v, causal=True, sm_scale=size**-0.5).swapaxes(1, 2)
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    # Its default, but for float32, of which that does not fit the shared memory.
    sizes = (
        BlockSizes(64, 64, 32, 32, 32, 32) if q.dtype == jnp.float32 else BlockSizes.get_default()
    )
    return mha(q, k, v, None, sm_scale=size**-0.5, causal=True, block_sizes=sizes)
