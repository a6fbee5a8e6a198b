"""The text of a compiled program, read: computations of instructions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from normlab.errors import invalid


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
    calls: tuple[str, ...]  # the computations that it runs; of a loop the condition, then the body
    literal: str  # of a constant, its value; of a parameter, its number
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


class Frame(NamedTuple):
    """One call on the way to an instruction, in the source."""

    file: str
    line: int
    function: str


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      computations: By name.
      entry: The name of the first to run.
      devices: How many it is for.
      stacks: By number, the calls that led to an instruction, the innermost first.
    """

    computations: Mapping[str, Computation]
    entry: str
    devices: int
    stacks: Mapping[int, tuple[Frame, ...]]

    def stack(self, i: Instruction) -> tuple[Frame, ...]:
        """Where in the source an instruction came from; empty where that is not known."""
        number = re.search(r"\bstack_frame_id=(\d+)", i.text)
        return self.stacks.get(int(number[1]), ()) if number else ()

    def trips(self, c: Computation, i: Instruction) -> int | None:
        """How often the body of a loop runs; `None` where that depends on what is computed.

        The compilers of CPUs and GPUs say so. That of TPUs does not: there it is read from a
        counter with constant ends and steps, as `scan` and `fori_loop` have it.

        Args:
          c: The computation that the loop stands in.
          i: The loop.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.text):
            return int(known[1])
        condition, body = (self.computations[name] for name in i.calls)
        start = c.instructions[i.operands[0]]
        compare = self._compare(condition)
        if compare is None or start.opcode != "tuple":
            return None
        counter, end, below = compare
        step = self._step(body, counter)
        end = end if isinstance(end, int) else self._kept(c, start, body, end[0])
        begin = _constant(c, start.operands[counter])
        if step is None or end is None or begin is None or step < 1:
            return None
        return max(0, -(-(end + (below == "LE") - begin) // step))

    def _compare(self, condition: Computation) -> tuple[int, int | tuple[int], str] | None:
        """`counter < end`: the counter's place in what the loop carries, the end or its place."""
        root, where, names = self._unfused(condition, condition.behind(condition.root))
        direction = re.search(r"\bdirection=(\w+)", root.text)
        if root.opcode != "compare" or not direction or len(names) != 2:
            return None
        found: list[Any] = []
        for name in names:
            within = where if name in where.instructions else condition
            place = _place(within, name)
            found.append(_constant(within, name) if place is None else (place,))
        flipped = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
        word = direction[1]
        if word in ("GT", "GE"):
            found, word = found[::-1], flipped[word]
        counter, end = found
        if word not in ("LT", "LE") or not isinstance(counter, tuple) or end is None:
            return None
        return counter[0], end, word

    def _step(self, body: Computation, place: int) -> int | None:
        """By how much the body raises what stands at a place of what the loop carries."""
        root = body.behind(body.root)
        if root.opcode != "tuple":
            return None
        i, where, names = self._unfused(body, body.behind(root.operands[place]))
        if i.opcode != "add":
            return None
        steps = []
        for name in names:
            within = where if name in where.instructions else body
            if _place(within, name) != place:
                steps.append(_constant(within, name))
        return steps[0] if len(steps) == 1 else None

    def _unfused(
        self, c: Computation, i: Instruction
    ) -> tuple[Instruction, Computation, list[str]]:
        """What an instruction comes to, within a fusion, if it is one: where, and of what."""
        names = list(i.operands)
        if i.opcode != "fusion":
            return i, c, names
        where = self.computations[i.calls[0]]
        outer = {where.parameters[k]: v for k, v in enumerate(names)}
        i = where.behind(where.root)
        return i, where, [outer.get(name, name) for name in i.operands]

    def _kept(self, c: Computation, start: Instruction, body: Computation, at: int) -> int | None:
        """The constant at a place of what the loop carries, if the body leaves it alone."""
        root = body.behind(body.root)
        if root.opcode != "tuple" or _place(body, root.operands[at]) != at:
            return None
        return _constant(c, start.operands[at])


def _constant(c: Computation, name: str) -> int | None:
    """The value of an integer that is known."""
    i = c.instructions[name]
    if i.opcode in _COPIES and i.operands:
        return _constant(c, i.operands[0])
    whole = i.opcode == "constant" and re.fullmatch(r"-?\d+", i.literal)
    return int(i.literal) if whole else None


def _place(c: Computation, name: str) -> int | None:
    """Where in what the loop carries a value comes from, if it is that value."""
    i = c.instructions[name]
    if i.opcode in _COPIES and i.operands:
        return _place(c, i.operands[0])
    index = re.search(r"\bindex=(\d+)", i.text)
    if i.opcode != "get-tuple-element" or not index:
        return None
    return int(index[1]) if c.instructions[i.operands[0]].opcode == "parameter" else None


_COPIES = ("bitcast", "copy", "copy-start", "copy-done", "convert")


def parse(compiled: Any, where: str) -> Program:
    """Reads the text of a compiled function.

    Args:
      compiled: The function, or its text, `compiled.as_text()`.
      where: Who asks, for errors.

    Raises:
      ValueError: For a program without a text, or a line that is none of HLO.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if not text:
        raise invalid(
            where,
            "a program without a text",
            "one that tells its instructions",
            "pass what `.lower(...).compile()` returns, of a backend that keeps the text",
        )
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {}
    # Vector memory is S(1) where layouts have tiles; a GPU calls another thing by that number.
    tiled = re.search(r"\]\{[^}]*:T\(", text) is not None
    entry, name, lines, sizes = "", "", [], {}
    table: dict[int, str] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = _computation(name, lines, tiled)
        elif line.startswith("  "):
            lines.append(line)
        elif line.startswith("HloModule"):
            sizes = dict(re.findall(r"\b(replica_count|num_partitions)=(\d+)", line))
        elif line in _TABLES:
            table = tables.setdefault(line, {})
        elif row := re.match(r"(\d+) (.*)$", line):
            table[int(row[1])] = row[2]
    devices = math.prod(map(int, sizes.values()))
    return Program(computations, entry, devices, _stacks(tables))


_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def _stacks(tables: Mapping[str, Mapping[int, str]]) -> dict[int, tuple[Frame, ...]]:
    """The calls behind every number of a frame; a caller is named by its number plus one."""
    files, functions, places, frames = (tables.get(name, {}) for name in _TABLES)
    stacks: dict[int, tuple[Frame, ...]] = {}

    def numbers(text: str) -> dict[str, int]:
        return {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", text)}

    for key in sorted(frames):
        frame = numbers(frames[key])
        place = numbers(places[frame["file_location_id"]])
        one = Frame(
            files[place["file_name_id"]].strip('"'),
            place["line"],
            functions[place["function_name_id"]].strip('"'),
        )
        stacks[key] = (one, *stacks.get(frame.get("parent_frame_id", 0) - 1, ()))
    return stacks


_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,<=]*)\](\{[^}]*\})?")
_CALLS = re.compile(r"\b(?:calls|to_apply|condition|body|\w+_computations?)=(\{[^}]*\}|\S+)")
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
            tail[:stop] if opcode in ("constant", "parameter") else "",
            tail[stop + 1 :],
        )
        instructions[i.name] = i
        root = i.name if left.startswith("ROOT ") else root
        if opcode == "parameter":
            parameters[int(i.literal)] = i.name
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
