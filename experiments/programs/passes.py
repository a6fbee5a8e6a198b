"""How often a compiled program goes over x, for the machine here or for one that is not.

A norm does little arithmetic: where x is larger than a cache its time is that of the memory it
reads and writes, in passes over x. The compiler decides how many there are, and its program says
so. Programs for a TPU and a GPU are compiled ahead of time, without the hardware, where their
compilers are installed: the extras `tpu` and `cuda`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled, Lowered

from .hlo import Array, Computation, Instruction, parse
from .machines import abstract, compile_for


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


def passes(compiled: Compiled | str, nbytes: int) -> Passes:
    """Counts a program's reads and writes of arrays of at least `nbytes`.

    Every instruction that runs reads its operands and writes its results, once each:

    - A fusion is one instruction, whatever is in it: an operand counts once however often the
      fused loops look at it, and if all they look at is a slice, it counts as that slice.
    - Bitcasts, tuples and parameters move nothing. Copies do.
    - The body of a loop counts as often as the loop runs, or once where that is not known; of a
      conditional, the branch with the most passes; a call, what it calls.
    - What a TPU keeps in its vector memory is not read from memory: the copy that brings it there
      is. It has 128 MiB of it on a v5e, so a smaller x may pass through memory less often than a
      larger one.

    Sizes are those of the shapes, without padding. Two arrays of half the size count as none, and
    so does a loop that goes over x slice by slice. XLA's CPU has fusions that look at all of x
    before they look at it again (`ynn_fusion`): for these the count is a lower bound.

    Args:
      compiled: A compiled function, or the text of one (`compiled.as_text()`).
      nbytes: The size of x. For bfloat16, an array of the shape of x in float32 counts as one.

    >>> x = jax.ShapeDtypeStruct((512, 512), "float32")
    >>> passes(jax.jit(lambda x: x + 1).lower(x).compile(), 4 * 512 * 512)
    Passes(reads=1, writes=1)
    """
    program = _Program(compiled, nbytes)
    return program.passes(program.entry)


class _Program:
    """The computations of a program, and what they read and write."""

    def __init__(self, compiled: Compiled | str, nbytes: int) -> None:
        self.nbytes = nbytes
        self.computations, self.entry = parse(compiled, "passes")
        self.demands: dict[tuple[str, str], int] = {}

    def passes(self, name: str) -> Passes:
        """Those of one computation."""
        c = self.computations[name]
        return _total(self._instruction(c, i) for i in c.instructions.values())

    def _instruction(self, c: Computation, i: Instruction) -> Passes:
        opcode = i.opcode.removesuffix("-start")
        if opcode in _FREE or opcode.endswith("-done"):
            return Passes(0, 0)
        if opcode in ("while", "call", "async", "conditional"):
            each = [self.passes(name) for name in i.calls]
            if opcode == "conditional":
                return max(each, key=sum)
            return _total(each * (i.trips if opcode == "while" else 1))
        fused = self.computations[i.calls[0]] if opcode == "fusion" else None
        results = _results(c, i)
        reads = set()
        for index, operand in enumerate(i.operands):
            source = c.behind(operand)
            if len(source.arrays) != 1 or not self._counts(source.arrays[0]):
                continue
            (array,) = source.arrays
            if fused:
                needed = self._demand(fused, fused.parameters[index])
            else:
                demand = results[0].size if results else array.size
                needed = _looked_at(opcode, index, array.size, results, demand)
            if needed * array.nbytes >= self.nbytes * array.size:
                reads.add(source.name)
        # Of what is updated in place, only the update is written.
        where, root = (fused, fused.behind(fused.root)) if fused else (c, i)
        roots = [where.behind(v) for v in root.operands] if root.opcode == "tuple" else [root]
        writes = 0
        for one, array in zip(itertools.cycle(roots), results, strict=False):
            if one.opcode == "dynamic-update-slice":
                array = array._replace(nbytes=where.instructions[one.operands[1]].arrays[0].nbytes)
            writes += self._counts(array)
        return Passes(len(reads), writes)

    def _counts(self, array: Array) -> bool:
        return array.nbytes >= self.nbytes and not array.on_chip

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


def _total(each: Iterable[Passes]) -> Passes:
    each = list(each)
    return Passes(sum(p.reads for p in each), sum(p.writes for p in each))


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
_SLICES = {"slice", "dynamic-slice", "gather"}
