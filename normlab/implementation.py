"""How a norm is computed: by XLA from its parts, or by a kernel that goes over memory once.

    xla         μ and σ are measured, then applied; XLA fuses that with what stands beside it
    pallas      a kernel, on a TPU or a GPU; what there is no kernel for is an error
    interpret   the kernel, run by an interpreter on any platform: slow, for tests
    auto        the kernel where `normlab._kernels.table` says that it is faster there, or else XLA

A kernel measures and applies at once, so that an example is read once. It belongs to parts that
know of it: `affine(parts, a)` runs it where `a` is the very array that they were measured on, and
else applies them as any others. Their μ and σ are there for whoever looks; in a compiled program
nobody pays for what is not looked at.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from normlab._apply import finished, reciprocal, shift
from normlab._arguments import KINDS, anything, checked, declare, instance, one_of
from normlab._checks import check_parts, is_zero, promote, promote_dtype
from normlab._sums import count_values, pivot_of
from normlab._trees import node
from normlab._xla import alike
from normlab.equation import Parts, affine, invert
from normlab.errors import invalid
from normlab.measure import Moments, from_sums
from normlab.site import Norm, Site, State

Implementation = Literal["auto", "xla", "pallas", "interpret"]
"""How a norm is computed: see `normlab.implementation`."""

declare(implementation=one_of(Implementation, "the name of an implementation"))

Activation = Callable[[Array], Array]


@node
class KernelParts(Parts):
    """Parts with a kernel that measures and applies them at once.

    Where they go through a function that knows arrays alone, as `jit` and `jax.tree.map` do, the
    kernel is left behind, and they are `Parts`.
    """

    measured: Any = None
    kernel: Any = None

    def _replace(self, **fields: Any) -> KernelParts:  # pyright: ignore
        made = super()._replace(**fields)
        return _with(made, self.measured, self.kernel) if fields.keys() <= {"g", "b"} else made

    def apply(
        self,
        a: Array,
        weights: Array | None = None,
        *,
        residual: Array | None = None,
        activation: Activation | None = None,
    ) -> Array:
        """`affine(parts, a)`, which see."""
        if self.kernel is None or a is not self.measured or weights is not None:
            more: Any = {"residual": residual, "activation": activation}
            return affine(Parts(*self), a, weights=weights, **more)
        _, _, g, b = check_parts(Parts(*self), a.shape, promote_dtype(a))
        return self.kernel(g, b, activation, residual=residual)[0]

    def invert(self, h: Array) -> Array:
        """`invert(parts, h)`, which see."""
        return invert(Parts(*self), h)


def _with(parts: KernelParts, measured: Any, kernel: Any) -> KernelParts:
    parts.measured, parts.kernel = measured, kernel
    return parts


def by_kernel(
    where: str,
    implementation: Implementation,
    parts: Parts,
    a: Array,
    axes: Sequence[int],
    *,
    eps: float,
    groups: int | None = None,
    centred: bool = True,
    without: Mapping[str, bool],
) -> Parts:
    """The parts of a norm that measures an example, with their kernel if one is to be had.

    Args:
      where: The layer, for errors.
      implementation: What was asked for.
      parts: As XLA measures them.
      a: What they were measured on.
      axes: Over which axes.
      eps: ε.
      groups: Of the channels; `None` for as many as there are, or one, as the axes have it.
      centred: Whether a mean is subtracted.
      without: Of what no kernel does, whether it was asked for.
    """
    if implementation == "xla":
        return parts
    axes, last = tuple(sorted(axes)), a.ndim - 1
    first = axes[0] if axes else last
    trailing = axes in (tuple(range(first, last)), tuple(range(first, a.ndim)))
    without = {**without, f"axes {axes}, which are not the last: positions, channels": not trailing}
    if groups is None:
        groups = 1 if last in axes else a.shape[-1]
    lacks = _lacks(where, implementation, a, eps, without)
    if lacks or (implementation == "auto" and not _faster(a, first, groups, centred)):
        return parts
    kernel = functools.partial(_run, where, implementation, a, first, groups, centred, float(eps))
    return _with(KernelParts(*parts), a, kernel)


def _lacks(
    where: str, implementation: Implementation, a: Array, eps: Any, without: Mapping[str, bool]
) -> bool:
    """Whether there is no kernel for arrays like `a`; an error unless `"auto"` was asked."""
    floating = jnp.issubdtype(a.dtype, jnp.floating)
    asked = {
        **without,
        "an ε that is traced": isinstance(eps, Tracer),
        str(a.dtype): not floating or jnp.finfo(a.dtype).bits > 32,
        "an explicit sharding, outside of shard_map": jax.typeof(a).sharding.mesh.explicit_axes,
        f"the shape {a.shape}": 0 in a.shape or not all(isinstance(n, int) for n in a.shape),
    }
    found = next((said for said, so in asked.items() if so), "")
    if found and implementation != "auto":
        raise _refused(where, implementation, found)
    return bool(found)


def _refused(where: str, implementation: Implementation, asked: str) -> ValueError:
    given = f"implementation={implementation!r} with {asked}"
    change = "use implementation='auto', or 'xla'"
    return invalid(where, given, "what a kernel takes (docs/kernels.md)", change)


def _no_activation(activation: Activation | None) -> str:
    """What an activation has that no kernel can have, if anything."""
    from normlab._kernels.activations import operations_without

    found = operations_without(activation, "cuda") if activation else []
    return f"an activation with {', '.join(found)}; apply that to h" if found else ""


def _faster(a: Array, first: int, groups: int, centred: bool) -> bool:
    """Whether the table has a kernel for examples of those axes, where programs here are to run."""
    if jax.default_backend() == "cpu":
        return False
    from normlab._kernels import table

    return table.faster(a.dtype, math.prod(a.shape[first:]), groups, centred)


def _run(
    where: str,
    implementation: Implementation,
    a: Array,
    first: int,
    groups: int,
    centred: bool,
    eps: float,
    g: Array,
    b: Array,
    activation: Activation | None = None,
    *,
    residual: Array | None = None,
    added: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """(h, a): of `a`, or of the sum of the two that are `added` and a is."""
    from normlab._kernels import examples

    asked = _no_activation(activation) if residual is None else "a residual; add that to h"
    if asked and implementation != "auto":
        raise _refused(where, implementation, asked)
    # What follows is then XLA's.
    after, activation = (activation, None) if asked else (None, activation)

    n, p, c = math.prod(a.shape[:first]), math.prod(a.shape[first:-1]), a.shape[-1]
    g, b = (v.reshape((1,) * (a.ndim - v.ndim) + v.shape) for v in (g, b))
    # Gains that vary by position, of samples of all positions and channels: all are channels then.
    flat = groups == 1 and any(math.prod(v.shape[first:-1]) > 1 for v in (g, b))
    p, c = (1, p * c) if flat else (p, c)

    def laid_out(v: Array) -> Array:
        v = jnp.broadcast_to(v, (*v.shape[:first], *a.shape[first:])) if flat else v
        rest = v.shape[:first] if flat else v.shape[:-1]
        if math.prod(rest) == 1:
            return jnp.broadcast_to(v.reshape(-1), (c,))
        return jnp.broadcast_to(v, a.shape).reshape(n, p, c)

    x, *y = (v.reshape(n, p, c) for v in added or (a,))
    spec = examples.Rows(groups, centred, eps, activation, bool(y))
    strict, interpret = implementation != "auto", implementation == "interpret"
    arrays = alike(x, laid_out(g), laid_out(b), *y)
    h, _, _, *total = examples.call(examples.Forward(spec, where, strict, interpret), *arrays)
    h = h.reshape(a.shape)
    if asked:
        h = finished(promote(h), residual, after).astype(h.dtype)
    return h, total[0].reshape(a.shape) if total else a


class Columns(NamedTuple):
    """Batch norm by kernels: one that sums over the examples, and one that applies.

    Both read the same `rows` of `a`, so that the two halves of its gradient meet there, and are
    one pass: behind a reshape of its own each would be written.
    """

    where: str
    implementation: Implementation
    a: Array
    rows: Array

    def _like(self, kind: Any, activation: Activation | None = None) -> Any:
        strict, interpret = self.implementation != "auto", self.implementation == "interpret"
        return kind(self.where, strict, interpret, activation)

    def moments(self, x: Array, axes: Sequence[int], *, weights: Any = None) -> Moments:
        """`moments` over all axes but the last."""
        from normlab._kernels import channels

        assert weights is None
        pivot = lax.stop_gradient(pivot_of(x, tuple(axes), None, "auto"))
        rows = self.rows if x is self.a else x.reshape(-1, x.shape[-1])
        given = alike(rows, pivot.reshape(-1))
        first, second = channels.call(self._like(channels.Sums), *given)
        sums = (v.reshape(pivot.shape) for v in (first, second))
        return from_sums(count_values(x, axes, None), pivot, *sums)

    def parts(self, parts: Parts) -> Parts:
        """The parts, with a kernel that applies them; g and b are one number for each channel."""
        return _with(KernelParts(*parts), self.a, functools.partial(self._apply, parts))

    def _apply(
        self,
        parts: Parts,
        g: Array,
        b: Array,
        activation: Activation | None = None,
        *,
        residual: Array | None = None,
        added: Any = None,
    ) -> tuple[Array, Array]:
        from normlab._kernels import channels

        del added  # who sums reads it again
        mu, sigma, a = parts.mu, parts.sigma, self.a
        shape = (1,) * (a.ndim - 1) + a.shape[-1:]
        r = reciprocal(sigma, False) * g
        c = (0 if is_zero(mu) else shift(mu, r)) + b
        if jnp.broadcast_shapes(jnp.shape(mu), r.shape, c.shape, shape) != shape:
            raise _refused(self.where, self.implementation, "statistics or gains by example")
        if asked := _no_activation(activation):
            raise _refused(self.where, self.implementation, asked)
        columns = (jnp.broadcast_to(v, shape).reshape(-1) for v in (lax.stop_gradient(mu), r, c))
        more = () if residual is None else (residual.reshape(-1, a.shape[-1]),)
        given = alike(self.rows, *columns, *more)
        (h,) = channels.call(self._like(channels.Apply, activation), *given)
        return h.reshape(a.shape), a


def by_columns(
    where: str,
    implementation: Implementation,
    a: Array,
    channel: int,
    without: Mapping[str, bool],
) -> Columns | None:
    """Batch norm's kernels, if they are to be had: as `by_kernel`."""
    if implementation == "xla":
        return None
    if a.ndim < 2:
        return None  # which XLA's path says what is wrong with
    without = {**without, "channels that are not last": channel != a.ndim - 1}
    if _lacks(where, implementation, a, 0.0, without) or implementation == "auto":
        return None
    return Columns(where, implementation, a, a.reshape(-1, a.shape[-1]))


_NORM = instance(Norm, "make it with get(name), or Norm(init, parts)", arrays=False)


@checked("add_norm", norm=_NORM, params=anything, state=anything, y=KINDS["x"])
def add_norm(
    norm: Norm, params: Any, state: State, x: ArrayLike, y: ArrayLike, *, train: bool
) -> tuple[Array, Array, State]:
    """The sum of a residual connection and the norm behind it: (x + y, norm(x + y), state).

    As between two blocks: the stream with what the branch made, and the input of the next branch. A
    kernel reads x and y and writes both results, where XLA writes the sum and reads it again. The
    sum is taken in float32 at least and rounded once.

    Args:
      norm: Any, such as `get("rms", implementation="auto")`, that looks at `a` alone.
      params: Its params.
      state: Its state.
      x: `[N, ..., C]`.
      y: The same shape and type.
      train: Whether this is training.

    Returns:
      (x + y, h, state).

    Raises:
      ValueError: If x and y are not alike, or what the norm says.

    >>> from normlab import get
    >>> x = jnp.array([[1.0, 2.0]])
    >>> total, h, _ = add_norm(get("layer"), None, (), x, x, train=True)
    >>> total.tolist(), h.round(2).tolist()
    ([[2.0, 4.0]], [[-1.0, 1.0]])
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        given = f"{x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
        raise invalid("add_norm", given, "two arrays of one shape and type", "cast or broadcast y")
    total = (promote(x) + promote(y)).astype(x.dtype)
    site = Site(total)
    parts, state = norm.parts(params, state, site, train=train)
    if isinstance(parts, KernelParts) and parts.measured is total:
        h, total = parts.kernel(parts.g, parts.b, added=(x, y))
        return total, h, state
    return total, affine(parts, total, channel_axis=-1), state
