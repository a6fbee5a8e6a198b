"""The collectives of a compiled program: how many, of what kind, how large, between whom.

They are read from the program's text, after the compiler has merged, split and moved what it
wanted to: what is counted is what will run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.stages import Compiled

from .hlo import Computation, Instruction, parse

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

Groups = tuple[tuple[int, ...], ...]


class Collective(NamedTuple):
    """One collective.

    Attributes:
      kind: One of `KINDS`.
      nbytes: What each device puts in.
      groups: The devices that work together, by number; of a permute, `(source, target)`.
      names: Where it came from, `jit(step)/…/psum`: of itself, or, where the compiler left it
        none or made one of several, of what went into it, the nearest first.
      algorithm: What the compiler says of how it is done; empty where it says nothing.
      times: How often it runs, if it stands in a loop.
      last: Whether no other collective needs its result.
    """

    kind: str
    nbytes: int
    groups: Groups
    names: tuple[str, ...]
    algorithm: str
    times: int
    last: bool


def collectives(compiled: Compiled | str, devices: int) -> list[Collective]:
    """Reads the collectives of a program, in the order of its text.

    The start and the end of an asynchronous one count once. A loop's body counts as often as it
    runs, where that is known; of a conditional, the branch with the most.

    Args:
      compiled: A compiled function, or its text.
      devices: How many devices it is for.
    """
    computations, entry = parse(compiled, "collectives")
    found: dict[str, list[Collective]] = {}

    def within(name: str) -> list[Collective]:
        if name not in found:
            c = computations[name]
            found[name] = [one for i in c.instructions.values() for one in of(c, i)]
        return found[name]

    def within_one(c: Computation, i: Instruction) -> bool:
        return i.opcode.removesuffix("-start") in KINDS or any(map(within, i.calls))

    def of(c: Computation, i: Instruction) -> Iterator[Collective]:
        kind = i.opcode.removesuffix("-start")
        if kind in KINDS:
            last = not any(within_one(c, user) for user in _needing(c, i))
            yield _collective(kind, c, i, devices)._replace(last=last)
        elif not i.opcode.endswith(("-done", "-update")):
            inner = [within(name) for name in i.calls]
            if i.opcode == "conditional":
                inner = [max(inner, key=len)]
            inner = [one for each in inner for one in each]
            last = inner and not any(within_one(c, user) for user in _needing(c, i))
            for one in inner:
                if i.opcode == "fusion" and "all-reduce-scatter" in i.calls[0]:
                    one = one._replace(kind="reduce-scatter")  # a TPU's way to write it
                names = one.names or _names(c, i)
                times = one.times * i.trips
                yield one._replace(names=names, times=times, last=one.last and bool(last))

    return within(entry)


def _collective(kind: str, c: Computation, i: Instruction, devices: int) -> Collective:
    arrays = [a for operand in i.operands for a in c.instructions[operand].arrays]
    nbytes = sum(a.nbytes for a in arrays)
    names = _names(c, i)
    if len(i.operands) > 1:  # several in one: the name is made of all of theirs
        inputs = [_names(c, c.instructions[operand]) for operand in i.operands]
        names = tuple(dict.fromkeys(name for each in inputs for name in each[:1])) or names
    return Collective(kind, nbytes, groups(i.text, devices), names, algorithm(i.text), 1, True)


def groups(text: str, devices: int) -> Groups:
    """The groups of devices in an instruction's attributes.

    Args:
      text: `…, replica_groups={{0,1},{2,3}}, …`; or the short forms for large machines,
        `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)`, and those of a mesh, `mesh['a'=2,'b'=2] {'b'}`.
      devices: How many there are, for `{}`, which is all of them.

    >>> groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> groups("replica_groups=mesh['a'=2,'b'=2] {'b'}", 4)
    ((0, 1), (2, 3))
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}(?:,? |$)", text):
        return _listed(pairs[1])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        return _listed(listed[1]) or (tuple(range(devices)),)
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\S*?\](?:T\([\d,]+\))?)(?:,? |,|$)", text):
        return _tuples(_iota(iota[1]))
    if mesh := re.search(r"replica_groups=@?mesh\[(.*?)\](?: \{(.*?)\})?(?:, |$)", text):
        return _of_mesh(mesh[1], mesh[2] or "")
    given = re.search(r"replica_groups=\S*", text)
    raise ValueError(
        f"collectives: got {given[0] if given else 'no replica_groups'}; expected {{{{0,1}},…}}, "
        "[2,2]<=[4], or mesh['a'=2] {'a'}. Teach `programs.collectives.groups` to read it."
    )


def _listed(text: str) -> Groups:
    found = re.findall(r"\{([\d,]+)\}", "{" + text.strip("{}") + "}") if text else []
    return tuple(tuple(int(i) for i in group.split(",")) for group in found)


def _iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`: numbered in one shape, transposed, cut in another."""
    shape, source, order = re.match(r"\[(.*?)\]<=\[(.*?)\](?:T\((.*?)\))?", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    numbers = np.arange(math.prod(_numbers(source))).reshape(_numbers(source))
    if order:
        numbers = numbers.transpose(_numbers(order))
    return numbers.reshape(_numbers(shape))


def _of_mesh(mesh: str, names: str) -> Groups:
    """`'a'=2,'b'=4` and `'b'`: those that differ in b alone; `'b':(2)2` is a part of b's 4."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = re.search(r"device_ids=\((.*)\)?$", mesh)
    count = math.prod(sizes.values())
    numbers = np.arange(count)
    if ids:
        numbers = _iota(ids[1]) if "<=" in ids[1] else np.array(_numbers(ids[1]))
    # Every axis is cut in up to three: before, within and after the part that is named.
    chosen = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", names):
        chosen[name] = (int(before or 1), int(size or sizes[name]))
    shape, inside = [], []
    for name, size in sizes.items():
        before, part = chosen.get(name, (size, 1))
        shape += [before, part, size // (before * part)]
        inside.append(len(shape) - 2)
    order = [k for k in range(len(shape)) if k not in inside] + inside
    each = math.prod(shape[k] for k in inside)
    return _tuples(numbers.reshape(shape).transpose(order).reshape(-1, each))


def _tuples(table: np.ndarray) -> Groups:
    return tuple(tuple(int(i) for i in row) for row in table)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _needing(c: Computation, i: Instruction) -> Iterator[Instruction]:
    """The instructions that need the result of `i`, near and far."""
    seen, ahead = {i.name}, [i]
    while ahead:
        for user in c.users.get(ahead.pop().name, ()):
            if user.name not in seen:
                seen.add(user.name)
                ahead.append(user)
                if not user.opcode.endswith("-done"):
                    yield user


def _names(c: Computation, i: Instruction, most: int = 64) -> tuple[str, ...]:
    """The name of an instruction, or, if it has none, of what went into it.

    That is one name, the nearest, or those of all the arrays that were laid side by side.
    """
    names: dict[str, None] = {}
    several = False
    seen, ahead = {i.name}, [i]
    while ahead and len(seen) < most:
        one = ahead.pop(0)
        several = several or "concatenate" in one.name
        if all(a.kind[0] in "sup" for a in one.arrays):
            continue  # a device's number, say, which belongs to nobody
        name = re.search(r'op_name="([^"]*)"', one.text)
        if name and name[1].rpartition("/")[2] not in ("", "shard_map"):
            names[name[1]] = None
            if one is i:
                break
            continue
        fresh = [name for name in one.operands if name not in seen and name in c.instructions]
        seen.update(fresh)
        ahead += [c.instructions[name] for name in fresh]
    return tuple(names) if several else tuple(names)[:1]


def algorithm(text: str) -> str:
    """What a TPU's compiler says of the algorithm, in an instruction's attributes.

    >>> algorithm('backend_config={"collective_algorithm_config":{"emitter":"RingEmitter"}}')
    'Ring'
    """
    said = re.search(r'"collective_algorithm_config":', text)
    if not said:
        return ""
    config, _ = json.JSONDecoder().raw_decode(text[said.end() :])
    emitter = config.get("emitter", "").removesuffix("Emitter")
    strategy = config.get("strategy", "").removeprefix("Strategy").removesuffix("Strategy")
    phases = re.search(r"\bphases:(\d+)", config.get("debug", ""))
    words = (emitter, strategy, phases and f"phases: {phases[1]}")
    return ", ".join(word for word in words if word)


def shape_of(groups: Sequence[Sequence[int]]) -> str:
    """Groups in a few words.

    >>> shape_of(((0, 1), (2, 3)))
    '2 of 2: {0,1}, …'
    """
    sizes = sorted({len(group) for group in groups})
    each = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    if len(groups) == 1:
        return f"all {each}"
    first = ",".join(map(str, groups[0][:4])) + (",…" if len(groups[0]) > 4 else "")
    return f"{len(groups)} of {each}: {{{first}}}, …"
