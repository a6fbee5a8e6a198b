"""The text of a compiled program, read: computations of instructions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jax.stages import Compiled


class Array(NamedTuple):
    """One array of a result."""

    size: int  # elements
    nbytes: int
    on_chip: bool
    kind: str = ""  # of its elements: f32, s32, pred


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]  # the leaves of the result
    opcode: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]  # the computations that it runs
    trips: int  # of a loop
    text: str  # what follows the operands: attributes, metadata, the backend's configuration


class Computation(NamedTuple):
    """The entry of a program, or what one of its instructions runs."""

    name: str
    instructions: Mapping[str, Instruction]
    users: Mapping[str, Sequence[Instruction]]
    parameters: Mapping[int, str]
    root: str

    def behind(self, name: str) -> Instruction:
        """The instruction of this name, or the one of which it is a bitcast."""
        i = self.instructions[name]
        return self.behind(i.operands[0]) if i.opcode == "bitcast" else i


def parse(compiled: Compiled | str, where: str) -> tuple[dict[str, Computation], str]:
    """Reads the text of a compiled function.

    Args:
      compiled: The function, or its text, `compiled.as_text()`.
      where: Who asks, for errors.

    Returns:
      `(computations, entry)`: the computations by name, and the name of the first to run.

    Raises:
      ValueError: For a program without a text, or a line that is none of HLO.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if not text:
        raise ValueError(f"{where}: the program has no text; expected a compiled function")
    computations: dict[str, Computation] = {}
    # Vector memory is S(1) where layouts have tiles; a GPU calls another thing by that number.
    tiled = re.search(r"\]\{[^}]*:T\(", text) is not None
    entry, name, lines = "", "", []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = _computation(name, lines, tiled)
        elif line.startswith("  "):
            lines.append(line)
    return computations, entry


_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,<=]*)\](\{[^}]*\})?")
_CALLS = re.compile(r"\b(?:calls|to_apply|condition|body|\w+_computations?)=(\{[^}]*\}|\S+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")


def _computation(name: str, lines: Iterable[str], tiled: bool) -> Computation:
    instructions: dict[str, Instruction] = {}
    users: dict[str, list[Instruction]] = {}
    parameters, root = {}, ""
    for line in lines:
        left, _, right = line.strip().partition(" = ")
        end = _closing(right) if right.startswith("(") else right.index(" ")
        opcode, _, tail = right[end:].strip().partition("(")
        stop = _closing("(" + tail) - 2
        own = _NAME.search(left)
        i = Instruction(
            own[1] if own else left,
            tuple(_array(found, tiled) for found in _ARRAY.finditer(right[:end])),
            opcode,
            tuple(_NAME.findall(tail[:stop])),
            tuple(_NAME.findall(" ".join(_CALLS.findall(tail[stop:])))),
            int(trips[1]) if (trips := _TRIPS.search(tail)) else 1,
            tail[stop + 1 :],
        )
        instructions[i.name] = i
        root = i.name if left.startswith("ROOT ") else root
        if opcode == "parameter":
            parameters[int(tail[:stop])] = i.name
        for operand in set(i.operands):
            users.setdefault(operand, []).append(i)
    return Computation(name, instructions, users, parameters, root)


def _array(found: re.Match[str], tiled: bool) -> Array:
    kind, sizes, layout = found.groups()
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind) or 0)
    size = math.prod(int(n.strip("<=")) for n in sizes.split(",") if n)
    return Array(size, size * bits // 8, tiled and "S(1)" in (layout or ""), kind)


def _closing(text: str) -> int:
    """The end of the brackets that `text` begins with."""
    depth = 0
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"hlo: unbalanced brackets in {text[:80]!r}")
