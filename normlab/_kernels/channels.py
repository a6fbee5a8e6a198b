"""Batch norm's passes over x `[N, C]` as operations made of the kernels in `columns`.

forward     `Sums` reads x; `Apply` reads x and writes h
backward    `ApplySums` reads x and dh; what is left, dx, is elementwise, and XLA's
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from normlab._apply import finished
from normlab._checks import promote
from normlab._kernels import columns
from normlab._kernels.primitive import Arrays, call
from normlab._sums import power_sums


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What they have in common: see `normlab._kernels.primitive.Kernel`."""

    divisible = True

    where: str
    strict: bool
    interpret: bool
    activation: Callable[[Array], Array] | None = None

    def problem(self, platform: str, x: Any, *others: Any) -> str | None:
        return columns.problem(platform, x.shape, x.dtype, self.activation)

    def _h(self, x: Array, k: Array, r: Array, c: Array, *residual: Array) -> Array:
        z = (promote(x) - k[None]) * r[None] + c[None]
        return finished(z, residual[0] if residual else None, self.activation).astype(x.dtype)

    def _as(self, kind: Any) -> Any:
        return kind(self.where, self.strict, self.interpret, self.activation)


class Sums(_Kernel):
    """`(x, k) -> (Σ (x − k), Σ (x − k)²)`."""

    def formula(self, x: Array, k: Array) -> Arrays:
        return tuple(v[0] for v in power_sums(x, k[None], (0,)))

    def run(self, platform: Any, x: Array, k: Array) -> Arrays:
        return columns.sums(platform, self.interpret, x, k)

    def jvp(self, primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Arrays, Arrays]:
        (x, k), (dx, dk) = primals, tangents
        d, dd = promote(x) - k[None], promote(dx) - dk[None]
        return call(self, x, k), (dd.sum(0), 2 * (d * dd).sum(0))


class Apply(_Kernel):
    """`(x, k, r, c[, residual]) -> (f((x − k)·r + c + residual),)`; k has no derivative."""

    def formula(self, *arrays: Array) -> Arrays:
        return (self._h(*arrays),)

    def run(self, platform: Any, *arrays: Array) -> Arrays:
        x, k, r, c, *residual = arrays
        how = {"residual": residual[0] if residual else None, "activation": self.activation}
        return (columns.apply(platform, self.interpret, x, k, r, c, **how),)

    def jvp(self, primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Arrays, Arrays]:
        (dx, _, *others) = tangents
        return call(self, *primals), call(self._as(ApplyTangent), *primals, dx, *others)


class ApplyTangent(_Kernel):
    """The derivative of `Apply`, linear in the last half: its transpose takes `ApplySums`."""

    divisible = False

    def formula(self, *arrays: Array) -> Arrays:
        half = (len(arrays) + 1) // 2
        (x, k, *others), tangents = arrays[:half], arrays[half:]
        h = lambda x, *others: self._h(x, k, *others)  # noqa: E731
        return (jax.jvp(h, (x, *others), tuple(tangents))[1],)

    def problem(self, platform: str, x: Any, *others: Any) -> str | None:
        return None

    def run(self, platform: str, *arrays: Array) -> Arrays:
        return self.formula(*arrays)

    def transpose(self, arrays: Sequence[Any], cotangents: Sequence[Array]) -> Sequence[Any]:
        x, k, r, c, *residual = known = arrays[: (len(arrays) + 1) // 2]
        (dh,) = cotangents
        first, second, *u = call(self._as(ApplySums), x, dh, *known[1:])
        if not u:
            u = [promote(dh)]
            if self.activation is not None:
                u = jax.vjp(self.activation, (promote(x) - k[None]) * r[None] + c[None])[1](u[0])
        dx = (promote(u[0]) * r[None]).astype(x.dtype)
        return [None] * len(known) + [dx, second, first, *(u[0].astype(v.dtype) for v in residual)]


class ApplySums(_Kernel):
    """`(x, dh, k, r, c[, residual]) -> (Σ u, Σ u·(x − k)[, u])`, where u = dh·f'.

    u is there where there are a residual and an activation.
    """

    def formula(self, x: Array, dh: Array, *arrays: Array) -> Arrays:
        k, r, c, *residual = arrays
        d, u, f = promote(x) - k[None], promote(dh), self.activation
        if f is not None:
            (u,) = jax.vjp(f, sum(map(promote, residual), d * r[None] + c[None]))[1](u)
        kept = (u.astype(residual[0].dtype),) if residual and f is not None else ()
        return u.sum(0), (u * d).sum(0), *kept

    def run(self, platform: Any, x: Array, dh: Array, *arrays: Array) -> Arrays:
        k, r, c, *residual = arrays
        how = {"residual": residual[0] if residual else None, "activation": self.activation}
        first, second, u = columns.apply_sums(platform, self.interpret, x, dh, k, r, c, **how)
        return (first, second, u) if residual and self.activation is not None else (first, second)
