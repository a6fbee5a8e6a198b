"""Which version of the code a question ran: a checksum over the sources that decide its numbers."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

import normlab

from ..cluster import installed

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
"""Those whose versions count."""

MEASURES = ("run", "QUICK", "FULL")
"""What of a question measures, with all that it uses: the rest looks at the records, judges them or
says what they cost."""

HERE = __name__.rsplit(".", 2)[0]
"""The package of the experiments, by the name it is installed under."""

ROOTS = {HERE: Path(__file__).parent.parent, "normlab": Path(normlab.__file__).parent}
"""Where the sources are that count; of two that hold a module, the first."""

ASIDE = (
    f"{HERE}.asking.archive",
    f"{HERE}.figures",
    f"{HERE}.engine.draw",
    f"{HERE}.engine.records",
    f"{HERE}.engine.verdict",
    f"{HERE}.rundir",
)
"""Modules that numbers do not depend on."""


def version(module: str) -> str:
    """The checksum over a module and all of this repository that it imports, and over `PACKAGES`.

    What it imports are also the packages that a module is in, whose `__init__` runs before it.
    Comments, docstrings and layout do not count, nor does how a question judges and shows its
    records and what it says that they cost.
    """
    total = hashlib.sha256()
    for package in PACKAGES:
        total.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    found = _closure(module).items()  # under whatever name this package goes:
    for name, code in sorted((name.replace(HERE, "experiments", 1), code) for name, code in found):
        total.update(f"{name}\n{code}\n".encode())
    return total.hexdigest()


def _measuring(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a question that count: what `MEASURES` reach."""
    named = [(part, _defines(part)) for part in body]
    uses = {name: _names(part) for part, defined in named for name in defined}
    reached = {name for part, defined in named if not defined for name in _names(part)}
    waiting = [*MEASURES, *reached]
    reached |= {*MEASURES}
    while waiting:
        found = uses.get(waiting.pop(), set()) - reached
        reached |= found
        waiting += found
    return [part for part, defined in named if not defined or reached.intersection(defined)]


def _defines(part: ast.stmt) -> list[str]:
    """The names that a definition or an assignment gives; none of any other statement."""
    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [part.name]
    targets = part.targets if isinstance(part, ast.Assign) else []
    targets = [part.target] if isinstance(part, ast.AnnAssign) else targets
    flat = [one for t in targets for one in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [t.id for t in flat if isinstance(t, ast.Name)] if flat else []


def _names(part: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}


def _closure(module: str) -> dict[str, str]:
    """The code of each module that counts, by its name."""
    found: dict[str, str] = {}
    waiting, own = [module], _own(module)
    while waiting:
        name = waiting.pop()
        path = _file(name, own)
        if path is None or name in found or name in ASIDE:
            continue
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        asks = name == module or name.startswith(f"{HERE}.questions.")
        found[name], imported = _read(package, path.read_text(encoding="utf-8"), asks)
        within = itertools.accumulate(name.split("."), "{}.{}".format)
        waiting += [*imported, *within]
    return found


@functools.cache
def _read(package: str, text: str, asks: bool) -> tuple[str, tuple[str, ...]]:
    """The code of a source, perhaps a question, without what does not count; what it imports."""
    tree = ast.parse(text)
    tree.body = [p for part in tree.body for p in (part.orelse if _for_types(part) else [part])]
    imported = tuple(_imports(tree, package))
    body = ast.Module(_measuring(tree.body) if asks else tree.body, [])
    return ast.dump(_without_docstrings(body)), imported


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(name, package)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _own(module: str) -> dict[str, Path]:
    """Where more sources are that count for a question of the user's own.

    They are its package, or its file, and where that is not installed, what lies beside it.
    """
    top = module.partition(".")[0]
    if f"{module}.".startswith(tuple(f"{package}." for package in ROOTS)):
        return {}
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return {}
    file = Path(spec.origin)
    place = file.parent.parent if file.name == "__init__.py" else file.parent
    names = {top}
    if not installed(file.resolve()):
        files = [*place.glob("*.py"), *(path.parent for path in place.glob("*/__init__.py"))]
        names |= {path.stem for path in files}
    return {name: place / name for name in sorted(names - ROOTS.keys())}


def _file(module: str, own: Mapping[str, Path]) -> Path | None:
    for package, root in {**ROOTS, **own}.items():
        if f"{module}.".startswith(f"{package}."):
            path = root.joinpath(*module.removeprefix(package).split("."))
            files = (path / "__init__.py", path.with_suffix(".py"))
            return next((file for file in files if file.is_file()), None)
    return None


def _for_types(part: ast.stmt) -> TypeGuard[ast.If]:
    return isinstance(part, ast.If) and ast.unparse(part.test).endswith("TYPE_CHECKING")


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return tree


def _is_text(part: ast.stmt) -> bool:
    return (
        isinstance(part, ast.Expr)
        and isinstance(part.value, ast.Constant)
        and isinstance(part.value.value, str)
    )
