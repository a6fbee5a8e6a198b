"""The reference: a page for each namespace, of its public names and their docstrings."""

import functools
import importlib
import inspect
import pkgutil
import re
import sys
import typing
from pathlib import Path

import normlab

# --- The pages --------------------------------------------------------------------------------


@functools.cache
def namespaces() -> dict[str, dict[str, object]]:
    """The public names by namespace: of the package, and of its packages without an underscore."""
    packages = [
        name
        for _, name, is_package in pkgutil.iter_modules(normlab.__path__, "normlab.")
        if is_package and "._" not in name
    ]
    names = ["normlab", "normlab.combine", "normlab.measure", *packages]
    modules = {name: importlib.import_module(name) for name in names}
    return {
        name: {public: getattr(module, public) for public in module.__all__}
        for name, module in modules.items()
    }


def page(namespace: str, public: dict[str, object]) -> str:
    """The page of a namespace, in reStructuredText."""
    doc = inspect.getdoc(importlib.import_module(namespace)) or ""
    kinds: dict[str, list[str]] = {"module": [], "class": [], "function": [], "data": []}
    elsewhere = []
    for name, value in public.items():
        if place(value, f"{namespace}.{name}") == f"{namespace}.{name}":
            kinds[kind(value)].append(name)
        else:
            elsewhere.append(name)
    text = f"{namespace}\n{'=' * len(namespace)}\n\n.. py:module:: {namespace}\n\n"
    text += "\n".join(rst(doc.splitlines())) + "\n\n"
    text += "The examples begin with\n\n.. code-block:: python\n\n"
    text += "".join(f"   {line}\n" for line in beginning(namespace)) + "\n"
    if elsewhere:
        text += "Here too: " + ", ".join(f":py:obj:`{name}`" for name in elsewhere) + ".\n\n"
    for title, directive, names in (
        ("Classes", "autoclass", kinds["class"]),
        ("Functions", "autofunction", kinds["function"]),
    ):
        if names:
            text += f"{title}\n{'-' * len(title)}\n\n.. autosummary::\n   :nosignatures:\n\n"
            text += "".join(f"   {name}\n" for name in names) + "\n"
        members = "   :members:\n   :special-members: __call__\n" * (directive == "autoclass")
        text += "".join(f".. {directive}:: {name}\n{members}\n" for name in names)
    if kinds["data"]:
        text += "Values and types\n----------------\n\n"
    for name in kinds["data"]:
        text += f".. py:data:: {name}\n\n   {held(public[name])}\n\n"
        text += "".join(f"   {line}\n" for line in rst(comment(name, public[name]))) + "\n"
    return text


def beginning(namespace: str) -> list[str]:
    """The lines of code with which the examples of a page begin."""
    flax = {"normlab.linen": ["import flax.linen as nn"], "normlab.nnx": ["from flax import nnx"]}
    own = {"normlab": "from normlab import *", namespace: f"from {namespace} import *"}
    return ["import jax", "import jax.numpy as jnp", *flax.get(namespace, []), *own.values()]


def kind(value: object) -> str:
    """Which directive documents a value."""
    kinds = {"module": inspect.ismodule, "class": inspect.isclass, "function": callable}
    if typing.get_origin(value) is not None:
        return "data"
    return next((name for name, holds in kinds.items() if holds(value)), "data")


def held(value: object) -> str:
    """The values that a type allows, or that a table holds."""
    values = typing.get_args(value) or value
    return ", ".join(f"``{getattr(v, '__name__', v)}``" for v in values)  # pyright: ignore


def comment(name: str, value: object) -> list[str]:
    """The string behind the assignment of a name, in the module where it is."""
    from sphinx.errors import PycodeError
    from sphinx.pycode import ModuleAnalyzer

    for module in [name for name in sys.modules if name.startswith("normlab.")]:
        if vars(sys.modules[module]).get(name) is value:
            try:
                found = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name))
            except PycodeError:
                continue
            if found:
                return inspect.cleandoc("\n".join(found)).splitlines()
    return []


def write(folder: Path) -> None:
    """Writes the pages that are not there as they should be."""
    folder.mkdir(parents=True, exist_ok=True)
    for namespace, public in namespaces().items():
        path, text = folder / f"{namespace}.rst", page(namespace, public)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# --- Docstrings, which are written in Markdown's way ------------------------------------------

SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
MARKUP = re.compile(
    r"(?<!^  )(?<!^  \*)[*|\\]|(?<=\w)_(?!\w)", re.MULTILINE
)  # napoleon's **kwargs:
SECTION = re.compile(r"(Args|Arguments|Attributes|Returns|Raises|Yields|Example|Examples|Note):$")


def rst(lines: list[str]) -> list[str]:
    """A docstring in reStructuredText: equations as they are laid out, spans of code, no markup."""
    text: list[str] = []
    prose: list[str] = []
    inside = literal = example = False  # of a section, of an indented block, of a doctest
    for before, line in zip(["", *lines], [*lines, ""], strict=True):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if line.strip() and not line.startswith(" "):
            inside, literal = bool(SECTION.match(line)), False
        indented = line.startswith("    ") and not (inside or literal or before.strip())
        if line.strip() and not (example or literal or indented):
            prose.append(line)
            continue
        text += inline("\n".join(prose)).split("\n") if prose else []
        text += ["::", "", line] if indented else [line]
        literal, prose = literal or indented, []
    return text


def inline(text: str) -> str:
    """Lines of prose: `names` stay, other spans are literal, and stars and bars are themselves."""
    parts = SPAN.split(text)
    for i, part in enumerate(parts):
        if i % 2:
            around = (parts[i - 1][-1:], parts[i + 1][:1])
            code = f"`{part}`" if re.fullmatch(r"[\w.]+", part) else f"``{part}``"
            parts[i] = "\\ " * around[0].isalnum() + code + "\\ " * around[1].isalnum()
        elif "``" not in part:
            parts[i] = MARKUP.sub(r"\\\g<0>", part)
    return "".join(parts)


# --- What autodoc is told ---------------------------------------------------------------------


def signature(value: object) -> str | None:
    """The arguments of a callable and what it returns, with the types as the source has them."""
    makers = inspect.getmro(type(value)) if inspect.isclass(value) else ()
    of_init = any("__call__" in vars(maker) for maker in makers if maker not in (type, object))
    try:
        found = inspect.signature(value.__init__ if of_init else value)  # pyright: ignore
    except (TypeError, ValueError):
        return None
    empty = inspect.Parameter.empty
    shown = [
        p.replace(
            annotation=empty if p.annotation is empty else Shown(annotated(p.annotation)),
            default=empty if p.default is empty else Shown(default(p.default)),
        )
        for p in found.parameters.values()
        if not p.name.startswith("_") and p.name not in HIDDEN
    ]
    if inspect.isclass(value) or found.return_annotation is empty:
        return str(found.replace(parameters=shown, return_annotation=empty))
    returned = Shown(annotated(found.return_annotation))
    return str(found.replace(parameters=shown, return_annotation=returned))


HIDDEN = ("self", "parent")  # the second is Flax's own, of every module of linen


class Shown(str):
    """A type or a default in the words of the source."""

    __repr__ = str.__str__


def annotated(value: object) -> str:
    """A type, which most modules have as text."""
    text = getattr(value, "__forward_arg__", value)
    if isinstance(text, str):
        return text
    return inspect.formatannotation(value).replace("typing.", "").replace("jaxlib._jax.", "")


def default(value: object) -> str:
    """A default; an array is longer than it is worth."""
    if hasattr(value, "shape"):
        return "..."
    return getattr(value, "__name__", None) or repr(value)


@functools.cache
def places() -> dict[str, list[str]]:
    """Where each public name is, in the order of the namespaces: `Sync` in two of them."""
    found: dict[str, list[str]] = {}
    for namespace, public in namespaces().items():
        for name in public:
            found.setdefault(name, []).append(f"{namespace}.{name}")
    return found


def place(value: object, full: str) -> str:
    """The full name under which a value is documented: of several the first."""
    _, _, name = full.rpartition(".")
    for other in places().get(name, []):
        if namespaces()[other.rpartition(".")[0]][name] is value:
            return other
    return full


FOREIGN = {"Array": "jax.Array", "ArrayLike": "jax.typing.ArrayLike", "NDArray": "numpy.ndarray"}
SHORT = {"nl": "normlab", "jnp": "jax.numpy", "np": "numpy", "pd": "pandas", "nn": "flax.linen"}


def connect(app) -> None:
    """Has autodoc show the library so."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    app.connect("doctree-read", _fields)
    app.connect("missing-reference", _resolve, priority=400)  # before intersphinx


def _docstring(app, what, name, value, options, lines):
    # An empty comment first: of "The variance: of all." napoleon would make a type and a text.
    lines[:] = ["..", ""] * (what == "property") + rst(lines)


def _signature(app, what, name, value, options, given, returns):
    if what in ("function", "class", "method"):
        shown = signature(value)
        if shown is not None:
            arguments, _, returned = shown.partition(" -> ")
            return arguments, returned or None
    return None


def _skip(app, what, name, value, skip, options):
    """Fields stand under the attributes of their class."""
    return True if type(value).__name__ in ("_tuplegetter", "member_descriptor") else None


def _fields(app, doctree):
    """What a class holds goes by the name that its docstring has for it."""
    from docutils import nodes

    for field in doctree.findall(nodes.field_name):
        if field.astext() == "Variables":
            field.children = [nodes.Text("Attributes")]


def _resolve(app, env, node, contnode):
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    head, _, rest = target.partition(".")
    target = FOREIGN.get(target, f"{SHORT[head]}.{rest}" if head in SHORT and rest else target)
    domain = env.domains.python_domain
    # Of a name in several namespaces, that of the page itself before the others.
    names = [f"{node.get('py:module')}.{target}", target, *places().get(target, [])]
    for name in names + places().get(target.rpartition(".")[2], []) * target.startswith("normlab."):
        if name in domain.objects:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, node["reftype"], name, node, contnode
            )
    node["reftarget"] = target  # for intersphinx
    return None
