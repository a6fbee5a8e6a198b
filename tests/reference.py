"""Writes docs/reference.md: every public name with the first line of its docstring."""

import importlib
import inspect
import pkgutil
import typing
from pathlib import Path

import normlab

PAGE = Path(__file__).parent.parent / "docs/reference.md"
MEASURE = (
    "Algorithm",
    "Moments",
    "effective_sample_size",
    "empty",
    "merge",
    "merge_axes",
    "moments",
)
HEAD = """# Reference

Every public name, with the first line of its docstring; `help(nl.batch_norm)` shows the whole.
This page is written by `make reference`, and a test fails where it is not what that writes.
"""


def namespaces() -> dict[str, dict[str, object]]:
    """The public names by namespace: of the package, and of its packages without an underscore."""
    packages = [
        name
        for _, name, is_package in pkgutil.iter_modules(normlab.__path__, "normlab.")
        if is_package and "._" not in name and name != "normlab.experiments"
    ]
    names = ["normlab", "normlab.combine", "normlab.measure", *packages]
    modules = {name: importlib.import_module(name) for name in names}
    return {
        name: {public: getattr(module, public) for public in getattr(module, "__all__", MEASURE)}
        for name, module in modules.items()
    }


def sentence(value: object) -> str:
    """What a name is: the first line of its docstring, or the values that a type allows."""
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
        return (inspect.getdoc(value) or "").partition("\n")[0].replace("|", "\\|")
    values = typing.get_args(value) or value
    return ", ".join(f"`{getattr(v, '__name__', v)}`" for v in values)


def page() -> str:
    """The document."""
    parts = [HEAD]
    for namespace, public in namespaces().items():
        rows = (f"| `{name}` | {sentence(value)} |\n" for name, value in public.items())
        parts.append(f"\n## {namespace}\n\n| name | what it is |\n|---|---|\n" + "".join(rows))
    return "".join(parts)


FAMILY = PAGE.parent / "family.md"
ROWS = "\n## The registry\n"


def registry() -> str:
    """The last section of docs/family.md: every row, and what it is invariant to."""
    changes = " · ".join(normlab.INVARIANCES)
    text = f"""{ROWS}
`I` where h stays as it is, of the changes {changes}: behind a dense layer; then behind one with
positions where that differs. Tested, and that no other holds: `pytest tests/test_family.py`.

| norm | μ and σ look at | μ | σ | invariances | proposed by |
|---|---|---|---|---|---|
"""
    for row in map(normlab.row, normlab.names()):
        held = [row.invariances, *([] if row.with_positions is None else [row.with_positions])]
        marks = " ".join("".join("I" if c in h else "–" for c in normlab.INVARIANCES) for h in held)
        cells = (f"`{row.name}`", row.looks_at, row.mu, row.sigma, f"`{marks}`", row.paper)
        text += f"| {' | '.join(cells)} |\n"
    return text.replace("|a − μ|", "\\|a − μ\\|")


def family() -> str:
    """The page of the family, with its registry as it is."""
    return FAMILY.read_text().partition(ROWS)[0] + registry()


if __name__ == "__main__":
    PAGE.write_text(page())
    FAMILY.write_text(family())
