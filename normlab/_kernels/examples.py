"""Norms that measure each example by itself, as operations made of the kernels in `rows`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from normlab._kernels import formula, rows
from normlab._kernels.primitive import Arrays, call, zeros
from normlab._kernels.rows import Rows


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What the three have in common: see `normlab._kernels.primitive.Kernel`."""

    divisible, gain = True, 0  # gain: where g and b stand behind x

    spec: Rows
    where: str
    strict: bool
    interpret: bool

    def problem(self, platform: str, x: Any, *others: Any) -> str | None:
        gain = max((v.shape for v in others[self.gain : self.gain + 2]), key=len)
        return rows.problem(self.spec, platform, x.shape, x.dtype, gain)

    def _h(self, x: Array, g: Array, b: Array) -> tuple[Array, Array, Array]:
        s = self.spec
        how: Any = {"groups": s.groups, "centred": s.centred, "eps": s.eps}
        return formula.normalized(x, g, b, activation=s.activation, **how)

    def _as(self, kind: Any) -> Any:
        return kind(self.spec, self.where, self.strict, self.interpret)


class Forward(_Kernel):
    """`(x, g, b[, y]) -> (h, mean, 1/σ[, x + y])`; of mean and 1/σ no tangents."""

    def formula(self, x: Array, g: Array, b: Array, y: Array | None = None) -> Arrays:
        total = x if y is None else _added(x, y)
        return (*self._h(total, g, b), *(() if y is None else (total,)))

    def run(self, platform: str, *arrays: Array) -> Arrays:
        found = rows.forward(self.spec, platform, self.interpret, *arrays)
        return tuple(v for v in found if v is not None)

    def jvp(self, primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Arrays, Arrays]:
        _, mean, r, *total = found = call(self, *primals)
        (_, g, b, *_), (t, dg, db, *ty) = primals, tangents
        at = (total or primals)[0], g, b, mean, r
        dh, *dtotal = call(self._as(Tangent), *at, t + ty[0] if ty else t, dg, db)
        return found, (dh, *zeros(mean, r), *dtotal)

    def batch(self, arrays: Sequence[Array], dims: Sequence[Any]) -> Arrays | None:
        """More examples, where gains are the same for all."""
        if dims[1] is not None or dims[2] is not None or arrays[1].ndim + arrays[2].ndim > 2:
            return None
        size = next(v.shape[d] for v, d in zip(arrays, dims, strict=True) if d is not None)

        def examples(v: Array, d: int | None) -> Array:
            v = jnp.broadcast_to(v, (size, *v.shape)) if d is None else jnp.moveaxis(v, d, 0)
            return v.reshape(-1, *v.shape[2:])

        x, *y = (examples(arrays[i], dims[i]) for i in (0, 3) if i < len(arrays))
        found = call(self, x, arrays[1], arrays[2], *y)
        return tuple(v.reshape(size, -1, *v.shape[1:]) for v in found)


class Tangent(_Kernel):
    """The derivative of `Forward`, linear in the last three: its transpose is `Backward`."""

    divisible = False

    def formula(
        self,
        x: Array,
        g: Array,
        b: Array,
        mean: Array,
        r: Array,
        dx: Array,
        dg: Array,
        db: Array,
    ) -> Arrays:
        del mean, r  # which depend on x
        dh = jax.jvp(lambda *v: self._h(*v)[0], (x, g, b), (dx, dg, db))[1]
        return (dh, dx) if self.spec.add else (dh,)

    def problem(self, platform: str, x: Any, *others: Any) -> str | None:
        return None

    def run(self, platform: str, *arrays: Array) -> Arrays:
        return self.formula(*arrays)

    def transpose(self, arrays: Sequence[Any], cotangents: Sequence[Array]) -> Sequence[Any]:
        x, g, b, mean, r, *_ = arrays
        dh, *dtotal = cotangents
        return [None] * 5 + [*call(self._as(Backward), x, dh, g, b, mean, r, *dtotal)]


class Backward(_Kernel):
    """`(x, dh, g, b, mean, 1/σ[, dtotal]) -> (dx, dg, db)`."""

    gain = 1

    def formula(
        self,
        x: Array,
        dh: Array,
        g: Array,
        b: Array,
        mean: Array,
        r: Array,
        dtotal: Array | None = None,
    ) -> Arrays:
        del mean, r
        dx, dg, db = jax.vjp(lambda *v: self._h(*v)[0], x, g, b)[1](dh)
        return dx if dtotal is None else _added(dx, dtotal), dg, db

    def run(self, platform: str, *arrays: Array) -> Arrays:
        return rows.backward(self.spec, platform, self.interpret, *arrays)


def _added(x: Array, y: Array) -> Array:
    """X + y in float32, rounded once."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)
