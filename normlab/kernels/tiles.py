"""What a program of a kernel has in fast memory, on a TPU and on a GPU, and how it goes over it.

Both take `x [N, P, C]` (examples, positions, channels in groups of neighbours) in programs of so
many examples, one step after the other, and within a step in chunks of positions. A kernel is
written once, in the words of a step; what differs is how a chunk is read, added up and written:

    TPU   blocks of x are copied to vector memory, with channels along the lanes. Lanes are never
          reshaped: sums over positions come first, then a product adds up the channels of a group.
    GPU   x is seen as [N, P, G, K], K channels in each of G groups, and a program has some of the
          groups. All sizes are powers of two; what lies outside is masked.

The words of a step, all in float32:

    load, store       a chunk of an array
    keep              of something like x: zeros where x has no value
    fold              adds up what a function returns for each chunk
    by_channel        of something like x: the sum over positions
    sum               the same, and over channels as far as `average` does not
    average           the average of each group, a statistic, of what `sum` returned for all chunks
    spread            of a statistic, what broadcasts to x
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

Kind = Literal["every", "gain", "statistic", "sum"]
"""Arrays of a kernel: [N, P, C]; [C]; [N, G]; and a [C] of each program, sums over what it has."""

VMEM = 56 * 2**20
"""Bytes of a TPU's vector memory that a kernel may take; from v5 on there are 64 MiB or more."""


@dataclasses.dataclass(frozen=True)
class _Tile:
    """How the work is cut.

    Attributes:
      shape: N, P, C of x.
      groups: G.
      programs: How many there are along the examples.
      steps: How many a program takes.
      examples: Of one step.
      positions: Of one chunk.
    """

    shape: tuple[int, int, int]
    groups: int
    programs: int
    steps: int
    examples: int
    positions: int


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of a running program.

    Attributes:
      tile: How the work is cut.
      refs: The program's arrays.
      kinds: What they are.
      index: Which step it is.
    """

    tile: Any
    refs: Mapping[str, Any]
    kinds: Mapping[str, Kind]
    index: Any = 0

    @property
    def start(self) -> Any:
        """The first example of the step."""
        return (pl.program_id(0) * self.tile.steps + self.index) * self.tile.examples

    def once(self, f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Computes a chunk whenever it is asked for, or once where there is no other."""
        return functools.cache(f) if self.tile.positions >= self.tile.shape[1] else f


# --- TPU ----------------------------------------------------------------------------------------


class VectorTile(_Tile):
    """Of a TPU: [examples, C] where there is one position, else [examples, P, C]."""

    @property
    def flat(self) -> bool:
        """Whether examples lie along the sublanes, and not positions."""
        return self.shape[1] == 1

    def whole(self, kind: Kind) -> tuple[int, ...]:
        """The shape of an array as the kernel sees it."""
        n, p, c = self.shape
        if kind == "sum":
            return self.programs, 1, c
        if self.flat:
            return {"every": (n, c), "gain": (1, c), "statistic": (n, self.groups)}[kind]
        return {"every": (n, p, c), "gain": (1, 1, c), "statistic": (n, 1, self.groups)}[kind]

    @property
    def partial(self) -> tuple[int, ...]:
        """The shape of what `by_channel` returns."""
        rows, c = self.examples, self.shape[2]
        return (rows, c) if self.flat else (rows, 1, c)

    def spec(self, kind: Kind) -> pl.BlockSpec:
        """The part of an array that a program has."""
        whole = self.whole(kind)
        if kind == "gain":
            return pl.BlockSpec(whole, lambda i: (0,) * len(whole))
        rows = 1 if kind == "sum" else self.steps * self.examples
        return pl.BlockSpec((rows, *whole[1:]), lambda i: (i, *(0,) * (len(whole) - 1)))

    @property
    def options(self) -> dict[str, Any]:
        """Those of `pallas_call`."""
        params = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM)
        return {"grid": (self.programs,), "compiler_params": params}

    def step(self, refs: Mapping[str, Any], kinds: Mapping[str, Kind]) -> VectorStep:
        """The first step of the program that is running."""
        return VectorStep(self, refs, kinds)


class VectorStep(_Step):
    """Of a TPU. A chunk is a slice of positions."""

    def _at(self, name: str, chunk: Any) -> tuple[Any, ...]:
        kind, tile = self.kinds[name], self.tile
        if kind in ("gain", "sum"):
            return (...,)
        row = self.index * tile.examples
        if tile.flat:
            row = row if isinstance(row, int) else pl.multiple_of(row, tile.examples)
            return pl.ds(row, tile.examples), slice(None)
        middle = chunk if kind == "every" else slice(None)
        return pl.ds(row, tile.examples), middle, slice(None)

    def load(self, name: str, chunk: Any = None) -> Array:
        return self.refs[name][self._at(name, chunk)].astype(jnp.float32)

    def store(self, name: str, value: Array, chunk: Any = None) -> None:
        ref = self.refs[name]
        if self.kinds[name] == "sum":
            value = value.reshape(ref.shape)
        ref[self._at(name, chunk)] = value.astype(ref.dtype)

    def keep(self, value: Array, chunk: Any) -> Array:
        # Blocks end where the array does, but for the last one along the examples.
        n, tile = self.tile.shape[0], self.tile
        if n == tile.programs * tile.steps * tile.examples:
            return value
        example = lax.broadcasted_iota(jnp.int32, value.shape, 0) + self.start
        return jnp.where(example < n, value, 0)

    def fold(self, f: Callable[[Any], Any], total: Any = None) -> Any:
        size = self.tile.positions
        whole, rest = divmod(self.tile.shape[1], size)
        if rest:
            total = _add(total, f(pl.ds(whole * size, rest)))
        elif total is None or whole == 1:
            whole -= 1
            total = _add(total, f(pl.ds(whole * size, size)))

        def body(i: Array, total: Any) -> Any:
            return _add(total, f(pl.ds(pl.multiple_of(i * size, size), size)))

        return lax.fori_loop(0, whole, body, total) if whole else total

    def by_channel(self, value: Array) -> Array:
        return value if self.tile.flat else value.sum(1, keepdims=True)

    def sum(self, value: Array) -> Array:
        value = self.by_channel(value)
        return value.sum(-1, keepdims=True) if self.tile.groups == 1 else value

    def average(self, total: Array) -> Array:
        _, p, c = self.tile.shape
        if 1 < self.tile.groups < c:
            total = _product(total, self._members(), 0)
        return total / (p * c // self.tile.groups)

    def spread(self, statistic: Array) -> Array:
        if 1 < self.tile.groups < self.tile.shape[2]:
            return _product(statistic, self._members(), 1)
        return statistic

    def _members(self) -> Array:
        """[C, G]: 1 for the channels of a group."""
        c, groups = self.tile.shape[2], self.tile.groups
        channel = lax.broadcasted_iota(jnp.int32, (c, groups), 0)
        begin = lax.broadcasted_iota(jnp.int32, (c, groups), 1) * (c // groups)
        return jnp.where((channel >= begin) & (channel < begin + c // groups), 1.0, 0.0)


def _add(total: Any, more: Any) -> Any:
    return more if total is None else jax.tree.map(jnp.add, total, more)


def _product(v: Array, members: Array, axis: int) -> Array:
    """Σ of v over the channels of a group (axis 0), or the v of a channel's group (axis 1).

    In a product, 0 · NaN would carry what overflowed in one group to all others.
    """
    flat = v.reshape(v.shape[0], v.shape[-1])
    finite = jnp.abs(flat) < jnp.inf

    def dot(u: Array) -> Array:
        dims = (((1,), (axis,)), ((), ()))
        precise = lax.Precision.HIGHEST
        return lax.dot_general(
            u, members, dims, precision=precise, preferred_element_type=jnp.float32
        )

    total = dot(jnp.where(finite, flat, 0.0))
    total = jnp.where(dot(jnp.where(finite, 0.0, 1.0)) > 0, jnp.nan, total)
    return total.reshape(*v.shape[:-1], total.shape[-1])


def vector_tile(shape: tuple[int, int, int], groups: int, itemsize: int) -> VectorTile:
    """The cut on a TPU: blocks of 2 MiB in float32 or of one example, in chunks of 128 KiB.

    A step of single positions has as many rows as a tile of the type has sublanes, or, before a
    product, as the matrix unit has.
    """
    n, p, c = shape
    sublanes, lanes = 32 // itemsize, _multiple(c, 128)
    if p == 1:
        examples = min(128 if 1 < groups < c else sublanes, _multiple(n, sublanes))
        steps = _clip(2**19 // (lanes * examples), 1, min(1024, n) // examples)
        positions = 1
    else:
        examples, steps = 1, _clip(2**19 // (lanes * _multiple(p, sublanes)), 1, min(64, n))
        positions = min(_multiple(2**15 // lanes, sublanes), p)
    return VectorTile(shape, groups, pl.cdiv(n, steps * examples), steps, examples, positions)


# --- GPU ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ThreadTile(_Tile):
    """Of a GPU: [examples, positions, some groups, K], all powers of two.

    Attributes:
      shape: N, P, C of x.
      groups: G.
      programs: How many there are along the examples.
      steps: How many a program takes.
      examples: Of one step.
      positions: Of one chunk.
      together: The groups that a program has.
    """

    together: int

    def whole(self, kind: Kind) -> tuple[int, ...]:
        """The shape of an array as the kernel sees it."""
        n, p, c = self.shape
        g, k = self.groups, c // self.groups
        return {
            "every": (n, p, g, k),
            "gain": (1, 1, g, k),
            "statistic": (n, 1, g, 1),
            "sum": (self.programs, 1, g, k),
        }[kind]

    @property
    def block(self) -> tuple[int, int, int, int]:
        """The shape of a chunk."""
        channels = pl.next_power_of_2(self.shape[2] // self.groups)
        return self.examples, self.positions, self.together, channels

    @property
    def partial(self) -> tuple[int, ...]:
        """The shape of what `by_channel` returns."""
        return self.examples, 1, *self.block[2:]

    def spec(self, kind: Kind) -> pl.BlockSpec:
        """The part of an array that a program has: it finds it itself."""
        return pl.BlockSpec(memory_space=pl.ANY)

    @property
    def options(self) -> dict[str, Any]:
        """Those of `pallas_call`."""
        e, p, g, k = self.block
        warps = _clip(e * p * g * k // 256, 1, 32)
        params = plgpu.CompilerParams(num_warps=warps, num_stages=1)
        return {"grid": (self.programs, pl.cdiv(self.groups, g)), "compiler_params": params}

    def step(self, refs: Mapping[str, Any], kinds: Mapping[str, Kind]) -> ThreadStep:
        """The first step of the program that is running."""
        return ThreadStep(self, refs, kinds)


class ThreadStep(_Step):
    """Of a GPU. A chunk is the number of its first position."""

    def _at(self, kind: Kind, chunk: Any) -> tuple[tuple[Any, ...], Array | None]:
        """Where a chunk is, and which of its values are in the array."""
        tile, (e, p, g, k) = self.tile, self.tile.block
        whole = tile.whole(kind)
        covered = (tile.programs * tile.steps * e, *map(_multiple, whole[1:3], (p, g)), k)
        starts = (self.start, chunk, pl.program_id(1) * g, 0)
        if kind == "sum":
            covered, starts = (whole[0], *covered[1:]), (pl.program_id(0), *starts[1:])
            e = 1
        block = tuple(1 if n == 1 else size for n, size in zip(whole, (e, p, g, k), strict=True))
        slices, inside = [], None
        for axis, (n, size) in enumerate(zip(whole, block, strict=True)):
            slices.append(pl.ds(0 if n == 1 else starts[axis], size))
            if n not in (1, covered[axis]):
                index = lax.broadcasted_iota(jnp.int32, block, axis) + starts[axis]
                inside = index < n if inside is None else inside & (index < n)
        return tuple(slices), inside

    def load(self, name: str, chunk: Any = 0) -> Array:
        slices, inside = self._at(self.kinds[name], chunk)
        ref = self.refs[name].at[slices]
        value = plgpu.load(ref, mask=inside, other=None if inside is None else 0)
        return value.astype(jnp.float32)

    def store(self, name: str, value: Array, chunk: Any = 0) -> None:
        slices, inside = self._at(self.kinds[name], chunk)
        ref = self.refs[name]
        plgpu.store(ref.at[slices], value.astype(ref.dtype), mask=inside)

    def keep(self, value: Array, chunk: Any) -> Array:
        _, inside = self._at("every", chunk)
        return value if inside is None else jnp.where(inside, value, 0)

    def fold(self, f: Callable[[Any], Any], total: Any = None) -> Any:
        p, size = self.tile.shape[1], self.tile.positions
        total = _add(total, f(0))

        def body(i: Array, total: Any) -> Any:
            return _add(total, f(i * size))

        return total if p <= size else lax.fori_loop(1, pl.cdiv(p, size), body, total)

    def by_channel(self, value: Array) -> Array:
        return value.sum(1, keepdims=True)

    def sum(self, value: Array) -> Array:
        return value.sum(3, keepdims=True).sum(1, keepdims=True)

    def average(self, total: Array) -> Array:
        _, p, c = self.tile.shape
        return total / (p * c // self.tile.groups)

    def spread(self, statistic: Array) -> Array:
        return statistic


def thread_tile(shape: tuple[int, int, int], groups: int, sums: bool) -> ThreadTile:
    """The cut on a GPU: chunks of 1,024 values or, of larger samples, of up to 8,192.

    Neighbours in memory come first: 32 channels at least, then positions, more groups, examples.
    With sums over examples there are about four programs on each multiprocessor of a large chip;
    without, as many as there are steps.
    """
    n, p, c = shape
    k = pl.next_power_of_2(c // groups)
    together = min(_power(32 // k), pl.next_power_of_2(groups))
    positions = min(_power(8192 // (together * k)), pl.next_power_of_2(p))
    if positions >= p:
        more = _power(1024 // (positions * together * k))
        together = min(together * more, pl.next_power_of_2(groups))
    examples = 1
    if positions >= p:
        examples = min(_power(1024 // (positions * together * k)), pl.next_power_of_2(n))
    steps = pl.cdiv(n, examples)
    programs = min(steps, max(512 // pl.cdiv(groups, together), 1)) if sums else steps
    steps = pl.cdiv(steps, programs)
    programs = pl.cdiv(n, steps * examples)
    return ThreadTile(shape, groups, programs, steps, examples, positions, together)


def _multiple(n: int, of: int) -> int:
    return pl.cdiv(n, of) * of


def _power(n: int) -> int:
    """The largest power of two that is not above n, and 1 for less."""
    return 1 << max(n, 1).bit_length() - 1


def _clip(n: int, low: int, high: int) -> int:
    return max(min(n, high), low)
