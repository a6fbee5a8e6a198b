"""How often a compiled program goes over x, for the machine here or for one that is not.

A norm does little arithmetic: where x is larger than a cache its time is that of the memory it
reads and writes, in passes over x. The compiler decides how many there are, and its program says
so. Programs for a TPU and a GPU are compiled ahead of time, without the hardware, where their
compilers are installed: the extras `tpu` and `cuda`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled, Lowered

from normlab.instruments.hlo import Array, Computation, Instruction, parse

from ..training.trainer import abstract
from .machines import compile_for


def place(target: str) -> SingleDeviceSharding:
    """Returns where to compile for: the CPU here, a TPU v5e or an H100 that need not be here.

    Call this in a process with JAX_PLATFORMS=cpu, so that JAX does not look for the hardware.

    Args:
      target: One of `TARGETS`.

    Raises:
      Missing: If its compiler is not installed.
    """
    # The smallest machine there is: of a TPU, a host with four chips, of which one is taken.
    smallest = {"cpu": "", "tpu": "v5e:2x2", "cuda": "h100:1x1x1"}[target]
    return SingleDeviceSharding(compile_for(target, smallest)[0])


def lower(f: Callable[..., Any], where: SingleDeviceSharding, *arguments: Any) -> Lowered:
    """Lowers `f` for one device; `.compile()` compiles it.

    Args:
      f: A function of pytrees of arrays.
      where: From `place`.
      *arguments: Those of `f`; of the arrays, only shape and dtype matter.
    """
    return jax.jit(f).lower(*abstract(arguments, where))


class Passes(NamedTuple):
    """How often arrays of at least a given size are read from memory, and written to it."""

    reads: int
    writes: int


class Move(NamedTuple):
    """What one instruction moves.

    Attributes:
      name: Of the instruction.
      opcode: What it is; "fusion" where it is several operations in one.
      names: Where the operations in it come from: `jit(f)/layer/mul`.
      reads: The bytes that it reads of each of its operands.
      writes: The bytes of each of its results.
      times: How often it runs.
      when_needed: Whether it stands in a loop of which nobody knows how often it runs.
    """

    name: str
    opcode: str
    names: tuple[str, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    times: int
    when_needed: bool

    @property
    def nbytes(self) -> int:
        """All that is moved, each time that it runs."""
        return self.times * (sum(self.reads) + sum(self.writes))


def passes(compiled: Compiled | str, nbytes: int) -> Passes:
    """Counts a program's reads and writes of arrays of at least `nbytes`, as `moves` has them.

    Two arrays of half the size count as none, and so does a loop that goes over x slice by slice.
    Nor is what runs only when needed, as where a norm measures again because digits were lost.

    Args:
      compiled: A compiled function, or the text of one (`compiled.as_text()`).
      nbytes: The size of x. For bfloat16, an array of the shape of x in float32 counts as one.

    >>> x = jax.ShapeDtypeStruct((512, 512), "float32")
    >>> passes(jax.jit(lambda x: x + 1).lower(x).compile(), 4 * 512 * 512)
    Passes(reads=1, writes=1)
    """
    reads = writes = 0
    for move in moves(compiled):
        if move.when_needed:
            continue
        reads += move.times * sum(n >= nbytes for n in move.reads)
        writes += move.times * sum(n >= nbytes for n in move.writes)
    return Passes(reads, writes)


def moves(compiled: Compiled | str) -> list[Move]:
    """What a program reads from memory and writes to it, instruction by instruction.

    Every instruction that runs reads its operands and writes its results, once each:

    - A fusion is one instruction, whatever is in it: an operand counts once however often the
      fused loops look at it, and if all they look at is a slice, it counts as that slice.
    - Bitcasts, tuples and parameters move nothing. Copies do.
    - The body of a loop counts as often as the loop runs, or once where that is not known; of a
      conditional, the branch that moves the most; a call, what it calls.
    - What a TPU keeps in its vector memory is not read from memory: the copy that brings it there
      is. It has 128 MiB of it on a v5e, so a smaller x may pass through memory less often than a
      larger one.

    Sizes are those of the shapes, without padding. XLA's CPU has fusions that look at all of x
    before they look at it again (`ynn_fusion`): for these the bytes are a lower bound. What a
    cache spares is not known.

    Args:
      compiled: As in `passes`.

    >>> x = jax.ShapeDtypeStruct((512, 512), "float32")
    >>> (move,) = moves(jax.jit(lambda x: x + 1).lower(x).compile())
    >>> move.opcode, move.reads, move.writes
    ('fusion', (1048576,), (1048576,))
    """
    program = _Program(compiled)
    return program.moves(program.entry)


class _Program:
    """The computations of a program, and what they read and write."""

    def __init__(self, compiled: Compiled | str) -> None:
        self.program = parse(compiled, "moves")
        self.computations, self.entry = self.program.computations, self.program.entry
        self.demands: dict[tuple[str, str], int] = {}

    def moves(self, name: str, times: int = 1, when_needed: bool = False) -> list[Move]:
        """Those of one computation."""
        c, found = self.computations[name], []
        for i in c.instructions.values():
            opcode = i.opcode.removesuffix("-start")
            if opcode in _FREE or opcode.endswith("-done"):
                continue
            if opcode in ("while", "call", "async", "conditional"):
                trips = self.program.trips(c, i) if opcode == "while" else 1
                runs = times * (1 if trips is None else trips)
                rare = when_needed or trips is None
                each = [self.moves(called, runs, rare) for called in i.calls]
                if opcode == "conditional":
                    each = [max(each, key=lambda branch: sum(move.nbytes for move in branch))]
                found += itertools.chain.from_iterable(each)
            else:
                moved = self._moved(c, i)
                found.append(Move(i.name, opcode, self._names(i), *moved, times, when_needed))
        return found

    def _names(self, i: Instruction) -> tuple[str, ...]:
        fused = [
            name
            for called in (i.calls if i.opcode == "fusion" else ())
            for inner in self.computations[called].instructions.values()
            for name in self._names(inner)
        ]
        own = [] if fused or i.opcode in _NAMELESS else _OP_NAME.findall(i.text)
        return tuple(dict.fromkeys(name for found in own + fused for name in found.split(";")))

    def _moved(self, c: Computation, i: Instruction) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The bytes that an instruction reads and writes."""
        opcode = i.opcode.removesuffix("-start")
        fused = self.computations[i.calls[0]] if opcode == "fusion" else None
        results = _results(c, i)
        reads: dict[str, int] = {}
        for index, operand in enumerate(i.operands):
            source = c.behind(operand)
            if len(source.arrays) != 1 or source.arrays[0].on_chip:
                continue
            (array,) = source.arrays
            if fused:
                needed = self._demand(fused, fused.parameters[index])
            else:
                demand = results[0].size if results else array.size
                needed = _looked_at(opcode, index, array.size, results, demand)
            nbytes = needed * array.nbytes // max(1, array.size)
            reads[source.name] = max(nbytes, reads.get(source.name, 0))
        # Of what is updated in place, only the update is written.
        where, root = (fused, fused.behind(fused.root)) if fused else (c, i)
        roots = [where.behind(v) for v in root.operands] if root.opcode == "tuple" else [root]
        writes = []
        for one, array in zip(itertools.cycle(roots), results, strict=False):
            if one.opcode == "dynamic-update-slice":
                array = array._replace(nbytes=where.instructions[one.operands[1]].arrays[0].nbytes)
            writes.append(0 if array.on_chip else array.nbytes)
        return tuple(reads.values()), tuple(writes)

    def _demand(self, c: Computation, name: str) -> int:
        """How many elements of a value within a fusion the fusion needs."""
        if (c.name, name) not in self.demands:
            self.demands[c.name, name] = self._sum_of_demands(c, name)
        return self.demands[c.name, name]

    def _sum_of_demands(self, c: Computation, name: str) -> int:
        size = max((a.size for a in c.instructions[name].arrays), default=0)
        needed = size if name == c.root else 0
        for user in c.users.get(name, ()):
            for index in (k for k, operand in enumerate(user.operands) if operand == name):
                if user.opcode in ("tuple", "get-tuple-element"):
                    needed += size
                elif user.opcode == "fusion":
                    inner = self.computations[user.calls[0]]
                    needed += self._demand(inner, inner.parameters[index])
                else:
                    demand = self._demand(c, user.name)
                    needed += _looked_at(user.opcode, index, size, user.arrays, demand)
        return min(size, needed)


def _looked_at(opcode: str, index: int, size: int, results: Sequence[Array], demand: int) -> int:
    """How many of the `size` elements of an operand go into `demand` elements of the result."""
    if opcode == "dynamic-update-slice" and index == 0:
        return 0  # in place
    if opcode in _SLICES and index == 0:
        return demand
    return demand if results and results[0].size == size else size


def _results(c: Computation, i: Instruction) -> list[Array]:
    """What an instruction writes; the tuple that starts one names its operands, too."""
    results = list(i.arrays)
    if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":
        for array in (a for operand in i.operands for a in c.instructions[operand].arrays):
            if array in results:
                results.remove(array)
    return results


_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_NAMELESS = {"bitcast", "broadcast", "constant", "iota", "parameter"}
"""What the compiler shares among users: it is called after any of them."""

_SLICES = {"slice", "dynamic-slice", "gather"}
