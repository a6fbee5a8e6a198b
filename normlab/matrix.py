"""The equation with a matrix in the place of 1/σ: parts that mix channels.

    h = g · W(a − μ) + b

W is a matrix for each group of channels. Batch norm's parts are the case of a diagonal W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from normlab._apply import finished
from normlab._checks import floating, promote
from normlab._trees import register
from normlab._weights import leave_out
from normlab._xla import partitioned
from normlab.errors import invalid


class MatrixParts(NamedTuple):
    """Parts whose scale is a matrix; `affine`, `invert` and `fold` take them as they take `Parts`.

    Attributes:
      mu: μ, broadcastable to `a`.
      sigma: √(var + ε) of each channel, broadcastable to `a`: as in `Parts`, for whoever looks. W
        is what is applied.
      matrix: W, `[G, D, D]` for groups of D channels, or `[N, G, D, D]` by example; zero where
        nothing was measured.
      g: The gain, broadcastable to `a`.
      b: The bias, broadcastable to `a`.
      channel_axis: That of `a`; not a leaf.
      strided: Whether a group is each (C/D)-th channel, and one matrix, G = 1, is that of all
        groups; else it is D neighbours. Not a leaf.

    >>> import normlab as nl
    >>> swap = jnp.array([[[0.0, 1.0], [1.0, 0.0]]])
    >>> parts = MatrixParts(jnp.zeros(1), jnp.ones(1), swap, jnp.ones(1), jnp.zeros(1))
    >>> nl.affine(parts, jnp.array([[1.0, 2.0]])).tolist()
    [[2.0, 1.0]]
    """

    mu: Array
    sigma: Array
    matrix: Array
    g: Array
    b: Array
    channel_axis: int = -1
    strided: bool = False

    def apply(
        self,
        a: Array,
        weights: Array | None = None,
        *,
        residual: Array | None = None,
        activation: Callable[[Array], Array] | None = None,
    ) -> Array:
        """`affine(parts, a)`, which see."""

        def run(a: Array, parts: MatrixParts, weights: Array | None, more: Any) -> Array:
            a = floating(leave_out(a, weights))
            h = parts.mixed(promote(a) - parts.mu) * parts.g + parts.b
            return finished(h, more, activation).astype(a.dtype)

        self._check(a.shape)
        return partitioned(run, a, self, weights, residual)

    def invert(self, h: Array) -> Array:
        """`invert(parts, h)`, which see."""

        def run(h: Array, parts: MatrixParts) -> Array:
            back = parts._replace(matrix=jnp.linalg.inv(parts.matrix))
            return (back.mixed((promote(h) - parts.b) / parts.g) + parts.mu).astype(
                floating(h).dtype
            )

        self._check(h.shape)
        return partitioned(run, h, self)

    def mixed(self, v: Array) -> Array:
        """W·v for each position of `v`, in the layout of `a`."""
        v = jnp.moveaxis(v, self.channel_axis, -1)
        matrix = self.matrix.astype(v.dtype)
        size, shape = matrix.shape[-1], v.shape
        if self.strided:
            v = v.reshape(*shape[:-1], size, -1).mT[..., None, :]
        else:
            v = v.reshape(*shape[:-1], -1, size)
        if matrix.ndim > 3 and matrix.shape[0] == 1:
            matrix = matrix[0]
        if matrix.ndim > 3:
            rows = v.reshape(shape[0], -1, *v.shape[-2:])
            rows = jnp.einsum("ngij,nrgj->nrgi", matrix, rows, precision=lax.Precision.HIGHEST)
            v = rows.reshape(v.shape)
        else:
            v = jnp.einsum("gij,...gj->...gi", matrix, v, precision=lax.Precision.HIGHEST)
        v = (v[..., 0, :].mT if self.strided else v).reshape(shape)
        return jnp.moveaxis(v, -1, self.channel_axis)

    def _check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless the parts fit a pre-activation of that shape."""
        (*lead, groups, size, also), channel = (1, 1, 1, *self.matrix.shape), self.channel_axis
        lead = lead[3:]
        fits = self.matrix.ndim > 2 and size == also and -len(shape) <= channel < len(shape)
        if fits:
            examples = shape[0 if channel % len(shape) else min(1, len(shape) - 1)]
            rest = shape[channel] % size if self.strided else shape[channel] - groups * size
            fits = rest == 0 and tuple(lead) in ((), (1,), (examples,))
        for v in (self.mu, self.g, self.b):
            try:
                fits = fits and jnp.broadcast_shapes(v.shape, shape) == tuple(shape)
            except ValueError:
                fits = False
        if not fits:
            given = ", ".join(f"{n} {getattr(self, n).shape}" for n in ("mu", "matrix", "g", "b"))
            raise invalid(
                "affine",
                f"{given} for a pre-activation of shape {shape} with channels on axis {channel}",
                "a matrix [G, D, D] of G·D channels, and parts that broadcast",
                "measure the parts on the same layout, or check the channel axis",
            )


register(MatrixParts, "channel_axis", "strided")


def along(v: Array, ndim: int, channel: int) -> Array:
    """`[C]` along the channels of `a`; `[N, C]` along its examples as well."""
    if ndim == 1:
        return jnp.atleast_2d(v)[0]
    v = jnp.expand_dims(jnp.atleast_2d(v), range(2, ndim))
    return jnp.moveaxis(v, (0, 1), (0 if channel else 1, channel))
