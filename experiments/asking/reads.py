"""Which fields of its config a question never reads, by its sources.

An option that nothing reads would be accepted and change nothing. Followed are the names from the
question's `run` through this package; a field counts as read if any code that is reached so has an
attribute of its name. So none is called unread that is read.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

from .. import questions
from ..engine.question import Config
from .sources import HERE, _file, _own

TUNED = frozenset({"tuned", "largest_stable"})
"""What trains at rates of its own in the place of the config's."""

TRAINS = TUNED | {"learn", "Nets", "Lab", "optimizer"}


class Module(NamedTuple):
    """A source.

    Attributes:
      parts: Its definitions by their names.
      imports: What its other names are: a module, and a name in it.
    """

    parts: dict[str, ast.AST]
    imports: dict[str, tuple[str, str]]


@functools.cache
def unread(name: str) -> frozenset[str]:
    """The fields of its config that a question does not read.

    Args:
      name: The question.
    """
    start = questions.module_of(name)
    if _file(start, _own(start)) is None:
        return frozenset()
    question: Any = questions.require(name)
    kinds = [kind for kind in type(question.QUICK).__mro__ if issubclass(kind, Config.__mro__[1])]
    found, own = _reached(start, "run", {kind.__name__ for kind in kinds})
    for kind in kinds:  # what its properties and methods read, where they are used
        for method in _methods(kind):
            if method.name in found and not method.name.startswith("__"):
                found |= {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
    fields = {field.name for field in dataclasses.fields(question.QUICK)}
    result = fields - found - {"data_dir"}
    if own.calls & TRAINS and own.calls & TRAINS <= TUNED and "lr" not in own.attributes:
        result.add("lr")
    return frozenset(result | {*question.QUICK.INSTEAD})


class Own(NamedTuple):
    """What a question's own file says.

    Attributes:
      attributes: The attributes it asks for.
      calls: The names that it uses of others.
    """

    attributes: set[str]
    calls: set[str]


def _reached(module: str, name: str, configs: set[str]) -> tuple[set[str], Own]:
    """The attributes in all code that a definition uses."""
    waiting, seen = [(module, name)], set()
    attributes: set[str] = set()
    own = Own(set(), set())
    beside = _own(module)
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        file = _file(at[0], beside)
        if file is None or not (at[0].startswith(f"{HERE}.") or beside):
            continue
        here = _parsed(at[0], file.read_text(encoding="utf-8"), file.name == "__init__.py")
        if at[1] in here.imports:
            waiting.append(here.imports[at[1]])
            continue
        part = here.parts.get(at[1])
        if part is None or at[1] in configs:
            continue
        for node in _code(part):
            if isinstance(node, ast.Attribute):
                attributes.add(node.attr)
                if at[0] == module:
                    own.attributes.add(node.attr)
                of = node.value
                if isinstance(of, ast.Name) and of.id in here.imports:
                    package, inside = here.imports[of.id]
                    waiting.append((f"{package}.{inside}".rstrip("."), node.attr))
            elif isinstance(node, ast.Name) and (node.id in here.parts or node.id in here.imports):
                waiting.append((at[0], node.id))
                if at[0] == module and node.id in here.imports:
                    own.calls.add(node.id)
    return attributes, own


def _code(part: ast.AST) -> Iterator[ast.AST]:
    """What is in a definition, without annotations and without the checks of a dataclass."""
    waiting = [part]
    while waiting:
        node = waiting.pop()
        yield node
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                each = value if isinstance(value, list) else [value]
                waiting += [
                    one
                    for one in each
                    if isinstance(one, ast.AST) and getattr(one, "name", "") != "__post_init__"
                ]


@functools.cache
def _parsed(name: str, text: str, package: bool) -> Module:
    tree = ast.parse(text)
    within = name if package else name.rpartition(".")[0]
    parts: dict[str, ast.AST] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            of = importlib.util.resolve_name("." * node.level + (node.module or ""), within)
            imports |= {alias.asname or alias.name: (of, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            imports |= {alias.asname: (alias.name, "") for alias in node.names if alias.asname}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts |= {t.id: node for t in targets if isinstance(t, ast.Name)}
    return Module(parts, imports)


def _methods(kind: type) -> Iterator[ast.FunctionDef]:
    """The definitions in a class."""
    file = _file(kind.__module__, _own(kind.__module__))
    tree = ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            yield from (part for part in node.body if isinstance(part, ast.FunctionDef))
