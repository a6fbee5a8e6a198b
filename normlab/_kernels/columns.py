"""Batch norm's passes over x as Pallas kernels: the sums of its columns, and what follows them.

x is `[N, C]`: examples and positions together, and channels. Each reads its arrays once, in tiles
of rows and columns:

    forward     sums         Σ (x − k), Σ (x − k)²
                apply        h = f(z) with z = (x − k)·r + c + residual
    backward    apply_sums   Σ u, Σ u·(x − k) with u = dh·f′(z)

The second pass backward, dx, is elementwise: XLA makes one pass of it (`channels`).

All arithmetic is in float32. A tile's sums are kept per row of a step, then added up; those of all
tiles are added up by XLA: as many roundings as sums by halves, about. Sizes are any: rows and
columns beyond x are masked. A kernel has no rule of derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from normlab._kernels.activations import operations_without

Platform = Literal["tpu", "cuda"]
Activation = Callable[[Array], Array]


def sums(platform: Platform, interpret: bool, x: Array, k: Array) -> tuple[Array, Array]:
    """Returns Σ (x − k) and Σ (x − k)² over the rows, `[C]` float32.

    Args:
      platform: What the kernel is for.
      interpret: Whether to run it in JAX's interpreter, on any platform.
      x: `[N, C]`, float32 or bfloat16.
      k: `[C]` float32, the pivot.
    """

    def tile(x: Array, k: Array) -> tuple[Any, Any]:
        d = x - k
        return (), (d, d * d)

    first, second = _over_tiles(tile, platform, interpret, [x], [k], [], 2)
    return first, second


def apply(
    platform: Platform,
    interpret: bool,
    x: Array,
    k: Array,
    r: Array,
    c: Array,
    residual: Array | None = None,
    activation: Activation | None = None,
) -> Array:
    """Returns h = f((x − k)·r + c + residual), in x's type.

    Args:
      platform: As in `sums`.
      interpret: As in `sums`.
      x: As in `sums`.
      k: As in `sums`.
      r: `[C]` float32, g/σ.
      c: `[C]` float32, what is added.
      residual: `[N, C]`, float32 or bfloat16.
      activation: f, elementwise, in float32 before h is rounded.
    """

    def tile(x: Array, *others: Array) -> tuple[Any, Any]:
        *more, k, r, c = others
        z = _linear(x, k, r, c, more)
        return (z if activation is None else activation(z),), ()

    (h,) = _over_tiles(tile, platform, interpret, _given(x, residual), [k, r, c], [x.dtype], 0)
    return h


def apply_sums(
    platform: Platform,
    interpret: bool,
    x: Array,
    dh: Array,
    k: Array,
    r: Array,
    c: Array,
    residual: Array | None = None,
    activation: Activation | None = None,
) -> tuple[Array, Array, Array]:
    """Returns Σ u and Σ u·(x − k) over the rows, `[C]` float32, and u = dh·f′(z).

    u is the residual's derivative, and is written here, in its type, if there are a residual and
    an activation: then who makes dx reads neither f nor the residual again. Else `dh` is returned.

    Args:
      platform: As in `sums`.
      interpret: As in `sums`.
      x: As in `sums`.
      dh: `[N, C]`, the derivative of h.
      k: As in `apply`.
      r: As in `apply`.
      c: As in `apply`.
      residual: As in `apply`.
      activation: As in `apply`.
    """
    if activation is None:
        residual = None  # z is not needed

    def tile(x: Array, dh: Array, *others: Array) -> tuple[Any, Any]:
        *more, k, r, c = others
        u = _pulled(activation, dh, lambda: _linear(x, k, r, c, more))
        return (u,) if more else (), (u, u * (x - k))

    kept = [] if residual is None else [residual.dtype]
    arrays = [x, *_given(dh, residual)]
    *u, first, second = _over_tiles(tile, platform, interpret, arrays, [k, r, c], kept, 2)
    return first, second, u[0] if u else dh


def problem(
    platform: str, shape: Sequence[int], dtype: DTypeLike, activation: Activation | None = None
) -> str | None:
    """Says why there are no kernels for x, and what would do; `None` if there are.

    Args:
      platform: What the kernels would be for.
      shape: `[N, C]`.
      dtype: That of x.
      activation: What would be applied.
    """
    rows, channels = shape
    if platform not in ("tpu", "cuda"):
        found = f"there is no kernel for {platform!r}, but for 'tpu' and 'cuda'"
    elif jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        found = f"kernels are for float32 and bfloat16, not for {jnp.dtype(dtype)}"
    elif not (isinstance(rows, int) and isinstance(channels, int)):
        found = f"a kernel's tiles need sizes that are known, not {tuple(shape)}"
    elif 0 in shape:
        found = f"an array of shape {tuple(shape)} has no values"
    elif max(shape) > 2**30:
        found = f"a kernel counts rows and channels up to 2**30, not {max(shape)}"
    elif platform == "tpu" and 2 * channels <= _LANES and rows * _LANES > 2**29:
        found = f"a TPU keeps rows of {_LANES} values: {rows} of {channels} would not fit"
    elif activation and (unknown := operations_without(activation, platform)):
        found = f"no kernel can have this activation ({', '.join(unknown)})"
    else:
        return None
    return f"{found}; use implementation='xla'"


def _linear(x: Array, k: Array, r: Array, c: Array, residual: Sequence[Array]) -> Array:
    """Z, with a residual or none."""
    return sum(residual, (x - k) * r + c)


def _pulled(activation: Activation | None, dh: Array, z: Callable[[], Array]) -> Array:
    """U = dh·f′(z)."""
    return dh if activation is None else jax.vjp(activation, z())[1](dh)[0]


def _given(*arrays: Array | None) -> list[Array]:
    return [v for v in arrays if v is not None]


# --- Tiles --------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """How [N, C] is cut: `rows` times `columns` for each run of a kernel, `step` rows at a time."""

    rows: int
    step: int
    columns: int


def _tiles(platform: Platform, n: int, channels: int, summed: bool) -> _Tiles:
    """A step is what registers hold; of sums, the larger a tile the fewer are written.

    A TPU's tile has up to 1 MiB in float32, so that several fit its vector memory twice. On a GPU
    all sizes are powers of two, and there are about eight tiles for each multiprocessor.
    """
    if platform == "tpu":
        columns = min(channels, 8 * _LANES)
        lanes = _LANES * pl.cdiv(columns, _LANES)
        step = max(16, 2**13 // lanes // 16 * 16)
        rows = 2**18 // lanes // step * step
    else:
        columns = min(pl.next_power_of_2(channels), 128)
        step = rows = 2**12 // columns
        if summed:
            share = pl.next_power_of_2(max(1, n * pl.cdiv(channels, columns) // 2**10))
            rows = max(step, min(share, 2**11))
    return _Tiles(min(rows, step * pl.cdiv(n, step)), step, columns)


_LANES = 128
"""How many neighbours a TPU keeps together; an array of fewer columns takes as much memory."""


def _over_tiles(
    tile: Callable[..., tuple[Sequence[Array], Sequence[Array]]],
    platform: Platform,
    interpret: bool,
    arrays: Sequence[Array],
    vectors: Sequence[Array],
    dtypes: Sequence[DTypeLike],
    terms: int,
) -> list[Array]:
    """Runs `tile` over all tiles.

    Args:
      tile: Takes a tile of each array and of each vector, in float32, and returns tiles, and
        terms.
      platform: As in `sums`.
      interpret: As in `sums`.
      arrays: `[N, C]`.
      vectors: `[C]`.
      dtypes: Those of the arrays of which `tile` returns tiles.
      terms: How many arrays of terms it returns, to be summed over the rows.

    Returns:
      The arrays, `[N, C]`, and the sums, `[C]` float32.
    """
    n, channels = arrays[0].shape
    tiles = _tiles(platform, n, channels, bool(terms))
    grid = pl.cdiv(n, tiles.rows), pl.cdiv(channels, tiles.columns)
    steps = tiles.rows // tiles.step

    def kernel(*refs: Any) -> None:
        inputs, outputs = refs[: len(arrays) + len(vectors)], refs[len(arrays) + len(vectors) :]
        row, column = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.columns
        inside = None
        if channels % tiles.columns:
            across = lax.broadcasted_iota(jnp.int32, (1, tiles.columns), 1)
            inside = across < channels - column
        values = [_read(platform, ref, slice(None), inside) for ref in inputs[len(arrays) :]]

        def step(i: Any, totals: Sequence[Array]) -> Sequence[Array]:
            start = pl.multiple_of(i * tiles.step, tiles.step) if steps > 1 else 0
            here = pl.ds(start, tiles.step)
            mask = inside
            if n % tiles.rows:
                down = lax.broadcasted_iota(jnp.int32, (tiles.step, 1), 0)
                mask = down < n - row - start
                mask = mask if inside is None else mask & inside
            if mask is not None:
                mask = jnp.broadcast_to(mask, (tiles.step, tiles.columns))
            found, parts = tile(
                *(_read(platform, ref, here, mask) for ref in inputs[: len(arrays)]), *values
            )
            for ref, value in zip(outputs, found, strict=False):
                _write(platform, ref, here, value, mask)
            parts = parts if mask is None else [jnp.where(mask, part, 0) for part in parts]
            return [total + part for total, part in zip(totals, parts, strict=True)]

        zeros = [jnp.zeros((tiles.step, tiles.columns), jnp.float32)] * terms
        totals = step(0, zeros) if steps == 1 else lax.fori_loop(0, steps, step, zeros)
        for ref, total in zip(outputs[len(dtypes) :], totals, strict=True):
            _write(platform, ref, slice(None), total.sum(0, keepdims=True), inside)

    whole = pl.BlockSpec((tiles.rows, tiles.columns), lambda i, j: (i, j))
    vector = pl.BlockSpec((1, tiles.columns), lambda i, j: (0, j))
    partial = pl.BlockSpec((None, 1, tiles.columns), lambda i, j: (i, 0, j))
    shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=_varying(arrays, vectors))
    run = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole] * len(arrays) + [vector] * len(vectors),
        out_specs=[whole] * len(dtypes) + [partial] * terms,
        out_shape=[
            *(shape((n, channels), dtype) for dtype in dtypes),
            *(shape((grid[0], 1, channels), jnp.float32) for _ in range(terms)),
        ],
        interpret=interpret,
        compiler_params=_parameters(platform),
        name="batch_norm",
    )
    with jax.enable_x64(False):  # A TPU has no indices of 64 bits.
        found = run(*arrays, *(v.reshape(1, channels) for v in vectors))
    return [*found[: len(dtypes)], *(v.sum((0, 1)) for v in found[len(dtypes) :])]


def _parameters(platform: Platform) -> Any:
    if platform == "tpu":
        return mosaic.CompilerParams(dimension_semantics=("parallel", "parallel"))
    return triton.CompilerParams(num_warps=4)


def _read(platform: Platform, ref: Any, rows: Any, mask: Array | None) -> Array:
    """A tile in float32; on a GPU, nothing is read where it is masked."""
    if platform == "cuda" and mask is not None:
        return triton.load(ref.at[rows, :], mask=mask, other=0).astype(jnp.float32)
    return ref[rows, :].astype(jnp.float32)


def _write(platform: Platform, ref: Any, rows: Any, value: Array, mask: Array | None) -> None:
    """Writes a tile in the type of what it is written to."""
    if platform == "cuda" and mask is not None:
        triton.store(ref.at[rows, :], value.astype(ref.dtype), mask=mask)
    else:
        ref[rows, :] = value.astype(ref.dtype)


def _varying(*arrays: Sequence[Array]) -> Any:
    """The type of what depends on all of them, over mapped axes."""
    types: list[Any] = [jax.typeof(v).manual_axis_type for some in arrays for v in some]  # pyright: ignore[reportAttributeAccessIssue]
    return types[0].update(varying=frozenset().union(*(t.varying for t in types)))
