"""What the compiler has to be told."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array, lax


@jax.custom_jvp
def apart(*arrays: Array) -> tuple[Array, ...]:
    """Returns the arrays, as values that XLA on a CPU does not know to be the same.

    Two sums over the same elementwise expression of one array would share that expression, and so
    keep it in memory: slower than computing it twice. Written on arrays taken apart, each sum reads
    its input once and keeps nothing. On accelerators, where XLA fuses such sums into one pass, this
    is the identity; to derivatives it is everywhere.
    """
    return lax.platform_dependent(*arrays, cpu=_barrier, default=_identity)


@apart.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return apart(*primals), tangents


def _barrier(*arrays: Array) -> tuple[Array, ...]:
    return tuple(lax.optimization_barrier(x) for x in arrays)


def _identity(*arrays: Array) -> tuple[Array, ...]:
    return arrays
