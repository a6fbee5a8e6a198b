"""Which activations a kernel can have: functions of each value alone, made of what lowers there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# fmt: off
_BOTH = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type", "cos", "div",
    "eq", "exp", "ge", "gt", "integer_pow", "le", "log1p", "logistic", "lt", "max", "min", "mul",
    "ne", "neg", "pow", "select_n", "sin", "sqrt", "square", "sub", "tanh",
}
# fmt: on
"""Elementwise operations that lower in float32 on both platforms."""

_CUDA = {"expm1", "atan", "cbrt"}


def operations_without(f: Callable[[Array], Array], platform: str) -> list[str]:
    """What an activation or its derivative does that there is no kernel for; nothing, as a rule."""
    z = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    closed = jax.make_jaxpr(lambda z, dz: jax.jvp(f, (z,), (dz,)))(z, z)
    known, found = _BOTH | (_CUDA if platform == "cuda" else set()), set()

    def look(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            inner = [v for v in equation.params.values() if hasattr(v, "eqns")]
            for program in inner:
                look(program)
            types = {str(v.aval.dtype) for v in (*equation.invars, *equation.outvars)}
            if types - {"float32", "bool"}:
                found.update(types - {"float32", "bool"})
            elif not inner and equation.primitive.name not in known:
                found.add(equation.primitive.name)

    look(closed)
    if closed.consts:
        found.add("an array that it closes over")
    if any(v.shape != z.shape for v in closed.out_avals):
        found.add("a result of another shape")
    return sorted(found)
