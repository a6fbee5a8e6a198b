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
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

Kind = Literal["every", "gain", "statistic", "sum"]
"""Arrays of a kernel: [N, P, C]; [C]; [N, G]; and a [C] of a program, sums of what it has."""

VMEM = 56 * 2**20
"""Bytes of a TPU's vector memory that a kernel may take; from v5 on there are 64 MiB or more."""

PRODUCT = 2**12
"""Channels of a TPU's program in groups that are no whole rows of lanes: a product adds them up."""

REGISTERS = 2**14
"""Channels of a TPU's program in groups that are no whole rows of lanes: a product sums them up."""

L2 = 2**18
"""Bytes of a longer sample, which a GPU's program reads again: 50 MB for some 200 programs."""


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
      program: Which program it is: along the examples, and along the channels.
      index: Which step it is.
    """

    tile: Any
    refs: Mapping[str, Any]
    kinds: Mapping[str, Kind]
    program: tuple[Any, Any]
    index: Any = 0

    @property
    def start(self) -> Any:
        """The first example of the step."""
        return (self.program[0] * self.tile.steps + self.index) * self.tile.examples

    def once(self, f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Computes a chunk whenever it is asked for, or once where there is no other."""
        if self.tile.positions < self.tile.shape[1]:
            return f
        found: list[Any] = []

        def known(chunk: Any) -> Any:
            if not found:
                found.append(f(chunk))
            return found[0]

        return known


# --- TPU ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VectorTile(_Tile):
    """Of a TPU: [examples, span] where there is one position, else [examples, P, span].

    Attributes:
      shape: N, P, C of x.
      groups: G.
      programs: How many there are along the examples.
      steps: How many a program takes.
      examples: Of one step.
      positions: Of one chunk.
      span: The channels of a program, whole groups in whole rows of lanes.
    """

    span: int

    @property
    def flat(self) -> bool:
        """Whether examples lie along the sublanes, and not positions."""
        return self.shape[1] == 1

    @property
    def together(self) -> int:
        """The groups of a program."""
        return self.span * self.groups // self.shape[2]

    @property
    def rows(self) -> int:
        """The examples of a program."""
        return self.steps * self.examples

    @property
    def spans(self) -> int:
        """The programs along the channels."""
        return pl.cdiv(self.shape[2], self.span)

    @property
    def partial(self) -> tuple[int, ...]:
        """The shape of what `by_channel` returns."""
        return (self.examples, self.span) if self.flat else (self.examples, 1, self.span)

    def whole(self, kind: Kind) -> tuple[int, ...]:
        """The shape of an array as the kernel sees it.

        Statistics of rows lie along the lanes: in memory, one number in a row takes 512 bytes.
        """
        n, p, c = self.shape
        one = () if self.flat else (1,)
        statistic = (self.programs, self.rows) if self.flat else (n, 1)
        return {
            "every": (n, c) if self.flat else (n, p, c),
            "gain": (*one, 1, c),
            "statistic": (self.spans, statistic[0], self.together, statistic[1]),
            "sum": (self.programs, 1, c),
        }[kind]

    def spec(self, kind: Kind) -> pl.BlockSpec:
        """The part of an array that a program has."""
        *_, along = whole = self.whole(kind)
        if kind == "statistic":
            block = (1, 1 if self.flat else self.rows, self.together, along)
            return pl.BlockSpec(block, lambda i, j: (j, i, 0, 0))
        middle = (0,) * (len(whole) - 2)
        if kind == "gain":
            return pl.BlockSpec((*whole[:-1], self.span), lambda i, j: (0, *middle, j))
        rows = 1 if kind == "sum" else self.rows
        return pl.BlockSpec((rows, *whole[1:-1], self.span), lambda i, j: (i, *middle, j))

    def view(self, kind: Kind, v: Array) -> Array:
        """An array as the kernel sees it."""
        if kind != "statistic":
            return v.reshape(self.whole(kind))
        spans, first, together, rows = self.whole(kind)
        more = [(0, first * rows - v.shape[0]), (0, spans * together - v.shape[1])]
        return jnp.pad(v, more).reshape(first, rows, spans, together).transpose(2, 0, 3, 1)

    def back(self, kind: Kind, v: Array) -> Array:
        """An array from what the kernel sees: [N, P, C], [N, G], or for sums [programs, C]."""
        n, p, c = self.shape
        if kind != "statistic":
            return v.reshape((n, p, c) if kind == "every" else (-1, c))
        spans, first, together, rows = v.shape
        v = v.transpose(1, 3, 0, 2).reshape(first * rows, spans * together)
        return v[:n, : self.groups]

    def options(self, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """Those of `pallas_call`; in flat kernels there is room for statistics in columns."""
        columns = [kind for kind in kinds.values() if kind == "statistic" and self.flat]
        return {
            "grid": (self.programs, self.spans),
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM
            ),
            "scratch_shapes": [pltpu.VMEM((self.rows, self.together), jnp.float32)] * len(columns),
        }

    def excess(self, sizes: Sequence[int]) -> str | None:
        """What does not fit, of a kernel with arrays of the size of x of so many bytes a value.

        Blocks are there twice, as the next one is copied while one is computed; and what a chunk is
        computed with is in float32.
        """
        p = self.shape[1]
        if 1 < self.together < self.span > PRODUCT:
            return f"a product over {self.span:,} channels, of which a kernel has {PRODUCT:,}"
        lanes = _multiple(self.span, 128)
        rows = self.rows if self.flat else self.steps * _multiple(p, 16)
        chunk = self.examples if self.flat else _multiple(self.positions, 16)
        more = rows if self.flat else 32 * self.steps
        need = 2 * sum(sizes) * rows * lanes + 16 * 4 * chunk * lanes + 4 * 4 * more * 128
        if need <= VMEM:
            return None
        return f"{need / 2**20:,.0f} MiB of vector memory, of which a kernel has {VMEM >> 20}"

    def run(
        self, kinds: Mapping[str, Kind], results: Collection[str], refs: Any, body: Any
    ) -> None:
        """Runs `body`, which is given the first step, on the arrays of a program."""
        arrays, program = dict(zip(kinds, refs, strict=False)), (pl.program_id(0), pl.program_id(1))
        if not self.flat:
            return body(VectorStep(self, arrays, kinds, program))
        lying = {name: arrays[name] for name in kinds if kinds[name] == "statistic"}
        columns = dict(zip(lying, refs[len(kinds) :], strict=True))
        for name, ref in lying.items():
            if name not in results:
                columns[name][...] = ref[0, 0].T
        body(VectorStep(self, arrays | columns, kinds, program))
        for name, ref in lying.items():
            if name in results:
                ref[0, 0] = columns[name][...].T
        return None


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
        if kind == "statistic":
            return 0, pl.ds(row, tile.examples), slice(None), slice(None)
        return pl.ds(row, tile.examples), chunk, slice(None)

    def load(self, name: str, chunk: Any = None) -> Array:
        value = self.refs[name][self._at(name, chunk)].astype(jnp.float32)
        if self.kinds[name] == "statistic" and not self.tile.flat:
            value = value.reshape(self.tile.examples, 1, self.tile.together)
        return value

    def store(self, name: str, value: Array, chunk: Any = None) -> None:
        ref, kind = self.refs[name], self.kinds[name]
        if kind == "sum":
            value = value.reshape(ref.shape)
        if kind == "statistic" and not self.tile.flat:
            value = value.reshape(self.tile.examples, self.tile.together, 1)
        ref[self._at(name, chunk)] = value.astype(ref.dtype)

    def keep(self, value: Array, chunk: Any) -> Array:
        # Blocks end where the array does, but for the last one along the examples.
        n, tile = self.tile.shape[0], self.tile
        if n == tile.programs * tile.rows:
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
        return value.sum(-1, keepdims=True) if self.tile.together == 1 else value

    def average(self, total: Array) -> Array:
        tile = self.tile
        if 1 < tile.together < tile.span:
            total = _product(total, self._members(), 0)
        return total / (tile.shape[1] * tile.span // tile.together)

    def spread(self, statistic: Array) -> Array:
        if 1 < self.tile.together < self.tile.span:
            return _product(statistic, self._members(), 1)
        return statistic

    def _members(self) -> Array:
        """[span, groups of the program]: 1 for the channels of a group."""
        span, together = self.tile.span, self.tile.together
        channel = lax.broadcasted_iota(jnp.int32, (span, together), 0)
        begin = lax.broadcasted_iota(jnp.int32, (span, together), 1) * (span // together)
        return jnp.where((channel >= begin) & (channel < begin + span // together), 1.0, 0.0)


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

    A program has the fewest channels that are whole groups and whole rows of 128 lanes. A step of
    single positions has as many rows as a tile of the type has sublanes or, before a product, up
    to those of the matrix unit.
    """
    n, p, c = shape
    each = c // groups
    span = c if groups == 1 else min(math.lcm(each, 128), c)
    sublanes, lanes = 32 // itemsize, _multiple(span, 128)
    if p == 1:
        examples = sublanes
        if each < span:
            examples = min(_clip(2**15 // lanes, sublanes, 128), _multiple(n, sublanes))
        steps = _clip(2**19 // (lanes * examples), 1, min(1024, n) // examples)
        positions = 1
    else:
        examples, steps = 1, _clip(2**19 // (lanes * _multiple(p, sublanes)), 1, min(64, n))
        positions = min(_multiple(max(2**15 // lanes, 1), sublanes), p)
    programs = pl.cdiv(n, steps * examples)
    return VectorTile(shape, groups, programs, steps, examples, positions, span)


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
    def spans(self) -> int:
        """The programs along the groups."""
        return pl.cdiv(self.groups, self.together)

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

    def view(self, kind: Kind, v: Array) -> Array:
        """An array as the kernel sees it."""
        return v.reshape(self.whole(kind))

    def back(self, kind: Kind, v: Array) -> Array:
        """An array from what the kernel sees: [N, P, C], [N, G], or for sums [programs, C]."""
        n, _, c = self.shape
        own = {"every": self.shape, "statistic": (n, self.groups), "sum": (self.programs, c)}
        return v.reshape(own[kind])

    def options(self, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """Those of `pallas_call`."""
        e, p, g, k = self.block
        warps = _clip(e * p * g * k // 256, 1, 32)
        params = plgpu.CompilerParams(num_warps=warps, num_stages=1)
        return {"grid": (self.programs * self.spans,), "compiler_params": params}

    def excess(self, sizes: Sequence[int]) -> str | None:
        """What does not fit, of a kernel with arrays of the size of x of so many bytes a value."""
        _, p, c = self.shape
        chunk, groups = math.prod(self.block), min(self.together, self.groups)
        if chunk > REGISTERS:
            return f"registers for {chunk:,} values, of which a program has those for {REGISTERS:,}"
        sample = p * groups * (c // self.groups) * max(sizes)
        if p > self.positions and sample > L2:
            return f"{sample >> 10:,} KiB of the L2 cache, of which a program has {L2 >> 10}"
        return None

    def run(
        self, kinds: Mapping[str, Kind], results: Collection[str], refs: Any, body: Any
    ) -> None:
        """Runs `body`, which is given the first step, on the arrays of a program."""
        # Those that share lines of memory follow each other.
        program = pl.program_id(0) // self.spans, pl.program_id(0) % self.spans
        body(ThreadStep(self, dict(zip(kinds, refs, strict=True)), kinds, program))


class ThreadStep(_Step):
    """Of a GPU. A chunk is the number of its first position."""

    def _at(self, kind: Kind, chunk: Any) -> tuple[tuple[Any, ...], Array | None]:
        """Where a chunk is, and which of its values are in the array."""
        tile, (e, p, g, k) = self.tile, self.tile.block
        whole = tile.whole(kind)
        covered = (tile.programs * tile.steps * e, *map(_multiple, whole[1:3], (p, g)), k)
        starts = (self.start, chunk, self.program[1] * g, 0)
        if kind == "sum":
            covered, starts = (whole[0], *covered[1:]), (self.program[0], *starts[1:])
            e = 1
        block = tuple(1 if n == 1 else size for n, size in zip(whole, (e, p, g, k), strict=True))
        slices, inside = [], None
        for axis, (n, size) in enumerate(zip(whole, block, strict=True)):
            slices.append(pl.ds(jnp.int32(0 if n == 1 else starts[axis]), size))
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


def thread_tile(shape: tuple[int, int, int], groups: int, itemsize: int, sums: bool) -> ThreadTile:
    """The cut on a GPU: chunks of 1,024 values or, of larger samples, of up to 8,192.

    Neighbours in memory come first: 64 bytes at least, then positions, more groups, examples.
    With sums over examples there are about four programs on each multiprocessor of a large chip;
    without, as many as there are steps. A program of many examples writes few sums.
    """
    n, p, c = shape
    k = pl.next_power_of_2(c // groups)
    together = min(_power(64 // (k * itemsize)), pl.next_power_of_2(groups))
    positions = min(_power(8192 // (together * k)), pl.next_power_of_2(p))
    if positions >= p:
        more = _power(1024 // (positions * together * k))
        together = min(together * more, pl.next_power_of_2(groups))
    examples = 1
    if positions >= p:
        examples = min(_power(1024 // (positions * together * k)), pl.next_power_of_2(n))
    steps = pl.cdiv(n, examples)
    spans = pl.cdiv(groups, together)
    if sums:
        programs = _clip(steps // 16, 128, 512) // spans
        programs = _clip(programs, 1, steps)
    else:
        programs = steps
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
