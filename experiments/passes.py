"""How often a compiled program goes over x, for the machine here or for one that is not.

A norm does little arithmetic: where x is larger than a cache its time is that of the memory it
reads and writes, in passes over x. The compiler decides how many there are, and its program says
so. Programs for a TPU and a GPU are compiled ahead of time, without the hardware, where their
compilers are installed: the extras `tpu` and `cuda`.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled, Lowered

TARGETS = {"cpu": "", "tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}
"""What can be compiled for, and the module that holds the compiler, if it is not jaxlib's."""


class Missing(RuntimeError):
    """The compiler of a target is not installed; the text says how to install it."""


_H100 = """
platform_name: "CUDA"
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
"""What the compiler asks of a GPU: an H100 SXM's properties, as CUDA reports them."""


def missing(target: str) -> str:
    """Returns the command that installs the compiler of a target; empty where it is installed."""
    module = TARGETS[target]
    try:
        installed = not module or importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that would hold it
        installed = False
    return "" if installed else f"pip install -c constraints.txt -e '.[{target}]'"


def place(target: str) -> SingleDeviceSharding:
    """Returns where to compile for: the CPU here, a TPU v5e or an H100 that need not be here.

    Call this in a process with JAX_PLATFORMS=cpu, so that JAX does not look for the hardware.

    Args:
      target: One of `TARGETS`.

    Raises:
      Missing: If its compiler is not installed.
    """
    if command := missing(target):
        raise Missing(f"there is no compiler for {target!r} here; to install it: {command}")
    if target == "cpu":
        devices = jax.devices("cpu")
    elif target == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no cloud to ask which TPU this is
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # processes share the compiler
        # The smallest machine there is: a host with four chips, of which one is compiled for.
        devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    else:
        options = {"target_config": _H100, "topology": "1x1x1"}  # slices x hosts x GPUs
        devices = topologies.get_topology_desc("h100", target, **options).devices
    return SingleDeviceSharding(devices[0])


def lower(f: Callable[..., Any], where: SingleDeviceSharding, *arguments: Any) -> Lowered:
    """Lowers `f` for one device; `.compile()` compiles it.

    Args:
      f: A function of pytrees of arrays.
      where: From `place`.
      *arguments: Those of `f`; of the arrays, only shape and dtype matter.
    """
    abstract = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where), arguments
    )
    return jax.jit(f).lower(*abstract)


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
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if not text:
        raise ValueError("passes: the program has no text; expected a compiled function")
    program = _Program(text, nbytes)
    return program.passes(program.entry)


class _Array(NamedTuple):
    size: int  # elements
    nbytes: int
    on_chip: bool


class _Instruction(NamedTuple):
    name: str
    arrays: tuple[_Array, ...]  # the leaves of the result
    opcode: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]  # the computations that it runs
    trips: int  # of a loop


class _Computation(NamedTuple):
    name: str
    instructions: Mapping[str, _Instruction]
    users: Mapping[str, Sequence[_Instruction]]
    parameters: Mapping[int, str]
    root: str

    def behind(self, name: str) -> _Instruction:
        """The instruction of this name, or the one of which it is a bitcast."""
        i = self.instructions[name]
        return self.behind(i.operands[0]) if i.opcode == "bitcast" else i


class _Program:
    """The computations of an HLO text, and what they read and write."""

    def __init__(self, text: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self.computations: dict[str, _Computation] = {}
        self.demands: dict[tuple[str, str], int] = {}
        # Vector memory is S(1) where layouts have tiles; a GPU calls another thing by that number.
        tiled = re.search(r"\]\{[^}]*:T\(", text) is not None
        self.entry, name, lines = "", "", []
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                name, lines = head[2], []
                self.entry = name if head[1] else self.entry
            elif line.startswith("}"):
                self.computations[name] = _computation(name, lines, tiled)
            elif line.startswith("  "):
                lines.append(line)

    def passes(self, name: str) -> Passes:
        """Those of one computation."""
        c = self.computations[name]
        return _total(self._instruction(c, i) for i in c.instructions.values())

    def _instruction(self, c: _Computation, i: _Instruction) -> Passes:
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

    def _counts(self, array: _Array) -> bool:
        return array.nbytes >= self.nbytes and not array.on_chip

    def _demand(self, c: _Computation, name: str) -> int:
        """How many elements of a value within a fusion the fusion needs."""
        if (c.name, name) not in self.demands:
            self.demands[c.name, name] = self._sum_of_demands(c, name)
        return self.demands[c.name, name]

    def _sum_of_demands(self, c: _Computation, name: str) -> int:
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


def _looked_at(opcode: str, index: int, size: int, results: Sequence[_Array], demand: int) -> int:
    """How many of the `size` elements of an operand go into `demand` elements of the result."""
    if opcode == "dynamic-update-slice" and index == 0:
        return 0  # in place
    if opcode in _SLICES and index == 0:
        return demand
    return demand if results and results[0].size == size else size


def _results(c: _Computation, i: _Instruction) -> list[_Array]:
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
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,<=]*)\](\{[^}]*\})?")
_CALLS = re.compile(r"\b(?:calls|to_apply|condition|body|\w+_computations?)=(\{[^}]*\}|\S+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")


def _computation(name: str, lines: Iterable[str], tiled: bool) -> _Computation:
    instructions: dict[str, _Instruction] = {}
    users: dict[str, list[_Instruction]] = {}
    parameters, root = {}, ""
    for line in lines:
        left, _, right = line.strip().partition(" = ")
        end = _closing(right) if right.startswith("(") else right.index(" ")
        opcode, _, tail = right[end:].strip().partition("(")
        stop = _closing("(" + tail) - 2
        own = _NAME.search(left)
        i = _Instruction(
            own[1] if own else left,
            tuple(_array(found, tiled) for found in _ARRAY.finditer(right[:end])),
            opcode,
            tuple(_NAME.findall(tail[:stop])),
            tuple(_NAME.findall(" ".join(_CALLS.findall(tail[stop:])))),
            int(trips[1]) if (trips := _TRIPS.search(tail)) else 1,
        )
        instructions[i.name] = i
        root = i.name if left.startswith("ROOT ") else root
        if opcode == "parameter":
            parameters[int(tail[:stop])] = i.name
        for operand in set(i.operands):
            users.setdefault(operand, []).append(i)
    return _Computation(name, instructions, users, parameters, root)


def _array(found: re.Match[str], tiled: bool) -> _Array:
    kind, sizes, layout = found.groups()
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind) or 0)
    size = math.prod(int(n.strip("<=")) for n in sizes.split(",") if n)
    return _Array(size, size * bits // 8, tiled and "S(1)" in (layout or ""))


def _closing(text: str) -> int:
    """The end of the brackets that `text` begins with."""
    depth = 0
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"passes: unbalanced brackets in {text[:80]!r}")
