"""The collectives of a compiled program: how many, of what kind, how large, between whom.

They are read from the program's text, after the compiler has merged, split and moved what it
wanted to: what is counted is what will run.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from normlab.instruments.hlo import Computation, Frame, Instruction, Program, parse

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


class Purpose(NamedTuple):
    """What a collective is for.

    Attributes:
      what: Where in the model, or what.
      direction: `"forward"` or `"backward"` in a gradient, else empty.
    """

    what: str
    direction: str = ""

    def __str__(self) -> str:
        """In words."""
        return f"{self.what} {self.direction}".strip()


class Collective(NamedTuple):
    """One collective.

    Attributes:
      kind: One of `KINDS`.
      nbytes: What each device puts in.
      groups: The devices that work together, by number; of a permute, `(source, target)`.
      names: Where it came from, `jit(step)/…/psum`: of itself, or, where the compiler left it
        none or made one of several, of what went into it, the nearest first.
      line: The line of the user's source, `step.py:12`, if the program tells it.
      algorithm: What the compiler says of how it is done; empty where it says nothing.
      times: How often it runs, if it stands in a loop.
      when_needed: Whether it runs only then: it stands in a branch of a conditional, or in a loop
        of which nobody knows how often it runs. What all branches have in common always runs.
      last: Whether no other collective needs its result.
      ends: Those of `names` of whose results that is true.

    >>> import jax
    >>> from jax.sharding import PartitionSpec as P
    >>> from normlab.instruments import ledger
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> def mean(x):
    ...     return jax.lax.pmean(x.mean(0), "data")
    >>> mean = jax.shard_map(mean, mesh=mesh, in_specs=P("data"), out_specs=P())
    >>> x = jax.device_put(jax.numpy.ones((16, 4)), jax.NamedSharding(mesh, P("data")))
    >>> [one] = ledger(mean, x).collectives
    >>> one.kind, one.nbytes, one.shape, one.when_needed
    ('all-reduce', 16, 'all 8', False)
    """

    kind: str
    nbytes: int
    groups: Groups
    names: tuple[str, ...]
    line: str
    algorithm: str
    times: int
    when_needed: bool
    last: bool
    ends: tuple[str, ...]

    @property
    def purposes(self) -> tuple[Purpose, ...]:
        """What it is for, from its names: `Net/BatchNorm_0`, forward; else the operation."""
        found = dict.fromkeys(map(purpose, self.names))
        named = tuple(p for p in found if p.what)
        plain = (Purpose(name.rpartition("/")[2], purpose(name).direction) for name in self.names)
        return named or (next(plain, Purpose(self.kind)),)

    @property
    def received(self) -> int:
        """Bytes of its result on each device: of a gather, what all in the largest group put in."""
        most = max(map(len, self.groups), default=1)
        if self.kind == "all-gather":
            return self.nbytes * most
        return self.nbytes // most if self.kind == "reduce-scatter" else self.nbytes

    @property
    def shape(self) -> str:
        """Who works together, in a few words."""
        return sends(self.groups) if self.kind == "collective-permute" else shape_of(self.groups)


def collectives(compiled: Any, devices: int | None = None) -> list[Collective]:
    """Reads the collectives of a program, in the order of its text.

    The start and the end of an asynchronous one count once, a loop's body as often as it runs.

    Args:
      compiled: A compiled function, or its text.
      devices: How many devices it is for; `None` for what the text says.
    """
    program = parse(compiled, "collectives")
    return of_program(program, program.devices if devices is None else devices)


def of_program(program: Program, devices: int) -> list[Collective]:
    """The collectives of a program that was read."""
    found: dict[str, list[Collective]] = {}

    def within(name: str) -> list[Collective]:
        if name not in found:
            c = program.computations[name]
            found[name] = [one for i in c.instructions.values() for one in of(c, i)]
        return found[name]

    def within_one(c: Computation, i: Instruction) -> bool:
        return i.opcode.removesuffix("-start") in KINDS or any(map(within, i.calls))

    def is_needed(c: Computation, i: Instruction) -> bool:
        return any(within_one(c, user) for user in _needing(c, i))

    def of(c: Computation, i: Instruction) -> Iterator[Collective]:
        kind = i.opcode.removesuffix("-start")
        if kind in KINDS:
            one = _collective(kind, c, i, devices, lambda v: is_needed(c, v))
            yield one._replace(line=users_line(program.stack(i)))
        elif not i.opcode.endswith(("-done", "-update")):
            each = [within(name) for name in i.calls]
            if not any(each):
                return
            last = not is_needed(c, i)
            if i.opcode == "conditional":
                inner = _branches(each)
            elif i.opcode == "while":
                condition, body = each
                inner = _loop(condition, body, program.trips(c, i))
            else:
                inner = [one for ones in each for one in ones]
            for one in inner:
                if i.opcode == "fusion" and "all-reduce-scatter" in i.calls[0]:
                    one = one._replace(kind="reduce-scatter")  # a TPU's way to write it
                names, line = one.names or _names(c, i), one.line or users_line(program.stack(i))
                ends = names if last and not one.names else one.ends if last else ()
                yield one._replace(names=names, line=line, last=one.last and last, ends=ends)

    return within(program.entry)


def _branches(each: Sequence[Sequence[Collective]]) -> Iterator[Collective]:
    """Of the branches of a conditional, what all have, once; the others' are for when needed."""

    def alike(one: Collective) -> Any:
        return one.kind, one.nbytes, one.groups, one.times, one.when_needed

    common = Counter(map(alike, each[0]))
    for branch in each[1:]:
        common &= Counter(map(alike, branch))
    for k, branch in enumerate(each):
        left = common.copy()
        for one in branch:
            if left[alike(one)]:
                left[alike(one)] -= 1
                if not k:
                    yield one
            else:
                yield one._replace(when_needed=True)


def _loop(
    condition: Sequence[Collective], body: Sequence[Collective], trips: int | None
) -> Iterator[Collective]:
    """The condition runs once more than the body, which may not run at all."""
    if trips is not None:
        yield from (one._replace(times=one.times * (trips + 1)) for one in condition)
        yield from (one._replace(times=one.times * trips) for one in body if trips)
        return
    yield from condition
    yield from (one._replace(when_needed=True) for one in (*condition, *body))


def purpose(name: str) -> Purpose:
    """Where in the model a name of an instruction comes from, and in which direction.

    >>> purpose("jit(step)/shard_map/transpose(jvp(Net))/BatchNorm_0/while/body/psum")
    Purpose(what='Net/BatchNorm_0', direction='backward')
    """
    direction = "backward" if "transpose(" in name else "forward" if "jvp(" in name else ""
    words, depth = [""], 0
    for c in name:  # no slash within brackets is one between words
        depth += (c == "(") - (c == ")")
        if c == "/" and not depth:
            words.append("")
        else:
            words[-1] += c
    scopes: list[str] = []
    for word in words[:-1]:  # the last one is the operation
        scope = _unwrapped(word)
        if scopes and scope.partition(".")[0] == scopes[-1]:
            continue  # Flax's name for a method of that module
        if scope != word and scope in scopes:  # a derivative within one begins the path anew
            del scopes[scopes.index(scope) :]
        scopes += [scope] if scope else []
    return Purpose("/".join(scopes), direction)


def _unwrapped(word: str) -> str:
    """The name in `transpose(jvp(name))`; nothing of a word of JAX's own."""
    while wrapped := re.fullmatch(r"(\w+)\((.*)\)", word):
        if wrapped[1] in ("jit", "pjit", "pmap"):
            return ""
        word = wrapped[2]
    return "" if word in _OWN or re.fullmatch(r"branch_\d+_fun", word) else word


_OWN = (
    "body",
    "checkpoint",
    "closed_call",
    "cond",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "rematted_computation",
    "remat",
    "remat2",
    "scan",
    "shard_map",
    "vmap",
    "while",
)
"""What JAX calls the parts of a program."""


def users_line(stack: Iterable[Frame]) -> str:
    """The innermost line that is none of an installed package, nor of this one's."""
    own = str(Path(__file__).parents[1])
    for frame in stack:
        installed = "/site-packages/" in frame.file or "/dist-packages/" in frame.file
        if not installed and not frame.file.startswith((own, "<frozen")):
            return f"{Path(frame.file).name}:{frame.line}"
    return ""


class Entry(NamedTuple):
    """The collectives of one purpose; of several where the compiler made one of several."""

    purposes: tuple[Purpose, ...]
    when_needed: bool
    collectives: tuple[Collective, ...]

    def __str__(self) -> str:
        """In words; of more than three purposes the first in each direction."""
        names = list(map(str, self.purposes))
        if len(names) > 3:
            names = []
            for direction in dict.fromkeys(p.direction for p in self.purposes):
                first, *more = (p.what for p in self.purposes if p.direction == direction)
                if len(more) > 1:
                    more = [f"{len(more)} more"]
                first = (" and " if direction else ", ").join([first, *more])
                names.append(f"{first} {direction}".strip())
        said = ", ".join(names)
        return f"{said}, when needed" if self.when_needed else said

    @property
    def nbytes(self) -> int:
        """What each device puts in, of all of them."""
        return sum(one.nbytes * one.times for one in self.collectives)

    @property
    def received(self) -> int:
        """What each device gets, of all of them."""
        return sum(one.received * one.times for one in self.collectives)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """What, how many of which kind, bytes put in, and received where that differs."""
        more = f"{self.received:,}" if self.received != self.nbytes else ""
        return str(self), self.kinds, f"{self.nbytes:,}", more

    @property
    def kinds(self) -> str:
        """How many of what kind: `2 all-reduce`."""
        kinds = Counter()
        for one in self.collectives:
            kinds[one.kind] += one.times
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"

    def distinct(self, word: Callable[[Collective], str]) -> str:
        """What the collectives say, each thing once."""
        return "; ".join(dict.fromkeys(filter(None, map(word, self.collectives))))


def by_purpose(
    found: Iterable[Collective],
    purposes: Callable[[Collective], tuple[Purpose, ...]],
    line: Callable[[Collective], str] = lambda one: "",
) -> list[Entry]:
    """The collectives in entries: those that always run first, forward before backward.

    Args:
      found: The collectives.
      purposes: What one of them is for.
      line: What sets those of one purpose apart.
    """
    entries: dict[tuple[tuple[Purpose, ...], bool, str], list[Collective]] = {}
    for one in found:
        entries.setdefault((purposes(one), one.when_needed, line(one)), []).append(one)
    order = {"forward": 0, "backward": 1, "": 2}
    made = [Entry(of, rare, tuple(each)) for (of, rare, _), each in entries.items()]
    return sorted(made, key=lambda e: (e.when_needed, order[e.purposes[0].direction]))


def _collective(
    kind: str, c: Computation, i: Instruction, devices: int, needed: Callable[[Instruction], bool]
) -> Collective:
    """One collective; `needed` says whether another one needs what an instruction makes."""
    arrays = [a for operand in i.operands for a in c.instructions[operand].arrays]
    # Of several in one the name is that of one of them; the others' are of what went in, where the
    # direction may be that of what was kept for the backward pass.
    several = len(i.operands) > 1
    sources = [c.instructions[operand] for operand in i.operands] if several else [i]
    own = {purpose(name).what: name for name in _names(c, i)[:1]}
    asked: dict[str, bool] = {}
    last = True
    for source, results in zip(sources, _results(c, i), strict=True):
        more = any(map(needed, results))
        last = last and not more
        for name in _names(c, source)[: 1 if several else None]:
            name = own.get(purpose(name).what, name)
            asked[name] = more or asked.get(name, False)
    asked = asked or dict.fromkeys(_names(c, i), not last)
    return Collective(
        kind=kind,
        nbytes=sum(a.nbytes for a in arrays),
        groups=groups(i.text, devices),
        names=tuple(asked),
        line="",
        algorithm=algorithm(i.text),
        times=1,
        when_needed=False,
        last=last,
        ends=tuple(name for name, more in asked.items() if not more),
    )


def _results(c: Computation, i: Instruction) -> list[list[Instruction]]:
    """Of each array that a collective sends, the instructions that are its result."""
    if len(i.operands) == 1:
        return [[i]]
    found: list[list[Instruction]] = [[] for _ in i.operands]
    users = list(c.users.get(i.name, ()))
    users += [v for done in users if done.opcode.endswith("-done") for v in c.users[done.name]]
    for user in users:
        index = re.search(r"\bindex=(\d+)", user.text)
        if user.opcode == "get-tuple-element" and index and int(index[1]) < len(found):
            found[int(index[1])].append(user)
        elif not user.opcode.endswith("-done"):
            return [[i]] * len(i.operands)  # all of them at once
    return found


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
        "[2,2]<=[4], or mesh['a'=2] {'a'}. Teach `instruments.collectives.groups` to read it."
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


def sends(pairs: Sequence[Sequence[int]]) -> str:
    """The sources and targets of a permute in a few words.

    >>> sends(((0, 1), (1, 0), (2, 3), (3, 2)))
    '2 pairs: 0↔1, …'
    >>> sends(((0, 1), (1, 2), (2, 3), (3, 0)))
    '4 sends: 0→1, 1→2, …'
    """
    known = {tuple(pair) for pair in pairs}
    if all((target, source) in known and source != target for source, target in known):
        said = [f"{source}↔{target}" for source, target in pairs if source < target]
        word, most = "pair", 1
    else:
        said, word, most = [f"{source}→{target}" for source, target in pairs], "send", 2
    shown = ", ".join(said[:most]) + (", …" if len(said) > most else "")
    return f"{len(said)} {word}{'s' * (len(said) != 1)}: {shown}"
