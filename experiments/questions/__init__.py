"""The questions: a file for each, which tests what is said of normalization.

A file is a question by being here, and anywhere else by being named: `normlab run my_net.py`, or
`normlab run mypackage.my_net`. It holds

    QUICK, FULL             frozen configs: minutes on two cores; the paper's protocol on a GPU
    SECONDS                 what QUICK costs on one core, about
    run(config)             yields conditions, each of which yields records as they are measured
    figure(records)         the picture of them
    verdict(records)        what each claim comes to, against thresholds that stand in the file

and a docstring that says the claim, its source, the protocol and the command. To ask another, copy
a file.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normlab.errors import nearest

from ..rundir import RunError

if TYPE_CHECKING:
    from ..engine.question import Question

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The names of the files."""

PARTS = ("QUICK", "FULL", "SECONDS", "run", "figure", "verdict")
"""What a file holds."""

_OWN: dict[str, str] = {}
"""The modules of the user's own questions, by their names."""


def find(word: str) -> str:
    """The name of a question that is given by its name, its module, or its file.

    A module or a file of the user's own is a question under the last part of its name. The folder
    of a file is then one that modules are found in, as that of a script is.

    Raises:
      RunError: For an unknown name, with the nearest; for a module or a file that is not there, or
        whose name another question or module has.
    """
    path = Path(word).expanduser()
    if word in NAMES or word in _OWN:
        return word
    if path.suffix == ".py" or len(path.parts) > 1:
        module = _of_file(path)
    elif "." in word:
        module = word
        if not _is_there(module):
            raise RunError(
                f"there is no module {word!r} that Python finds. Install its package, or name the "
                "file: path/to/my_net.py."
            )
    else:
        beside = (
            f" The file here is named with its ending: {word}.py."
            * path.with_suffix(".py").is_file()
        )
        raise RunError(f"unknown question {word!r}: {nearest(word, NAMES)}.{beside}")
    return learn(module, word)


def learn(module: str, word: str = "") -> str:
    """The name of the question in a module, which is known by it from now on."""
    if module.startswith(f"{__name__}."):
        return module.removeprefix(f"{__name__}.")
    name, word = module.rpartition(".")[2], word or module
    if name in NAMES or _OWN.get(name, module) != module:
        other = "one of normlab's" if name in NAMES else _OWN[name]
        raise RunError(f"{word}: {name!r} is the name of another question, {other}. Rename yours.")
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise RunError(
            f"{word}: {name!r} must be words of a–z, digits and _, as claims and directories are "
            "named after it. Rename it."
        )
    _OWN[name] = module
    return name


def _of_file(path: Path) -> str:
    """The module in a file, whose folder is then one that modules are found in."""
    file = path.resolve()
    if not file.is_file() or file.suffix != ".py":
        raise RunError(f"there is no question in {path}: it must be a Python file that is there.")
    if file.parent == Path(__file__).resolve().parent:
        return f"{__name__}.{file.stem}"
    root, parts = file.parent, [file.stem]
    while (root / "__init__.py").is_file():  # a module of a package
        root, parts = root.parent, [root.name, *parts]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = ".".join(parts)
    spec = importlib.util.find_spec(module) if _is_there(module) else None
    if spec is None or Path(spec.origin or "").resolve() != file:
        where = f" ({spec.origin})" if spec else ""
        raise RunError(f"{path}: another module is called {module!r}{where}. Rename the file.")
    return module


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a package that it is in
        return False


def own_module(name: str) -> str:
    """The module of a question of the user's own; empty for another."""
    return _OWN.get(name, "")


def module_of(name: str) -> str:
    """The module of a question."""
    return own_module(name) or f"{__name__}.{name}"


def require(name: str) -> Question:
    """Returns the question of that name; raises RunError, with the nearest, for another."""
    found: Any = importlib.import_module(module_of(name := find(name)))
    lacks = [part for part in PARTS if not hasattr(found, part)]
    if lacks:
        raise RunError(
            f"{found.__file__} is no question: it has no {' and no '.join(lacks)}. A question has "
            f"{', '.join(PARTS)}."
        )
    if own_module(name):
        from ..engine.question import Config

        if not isinstance(found.QUICK, Config) or not isinstance(found.FULL, Config):
            engine = Config.__module__.rpartition(".")[0]
            raise RunError(
                f"{found.__file__}: QUICK and FULL must be configs of {engine}, as in "
                f"`from {engine} import Config`."
            )
    return found


def path_of(name: str) -> Path:
    """The file of a question, which is not imported."""
    spec = importlib.util.find_spec(module_of(name))
    if spec is None or spec.origin is None:
        raise RunError(f"the file of {name} is gone.")
    return Path(spec.origin)


def describe(name: str) -> dict[str, str]:
    """The paragraphs of a question's docstring by their headings; the first is its `question`.

    The file is read and not imported, which another may have to mend first.
    """
    text = ast.get_docstring(ast.parse(path_of(name).read_text(encoding="utf-8"))) or name
    head, *paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    found = {"question": head}
    last = "question"
    for paragraph in paragraphs:
        heading = re.match(r"(Claim|Source|Protocol|Command|Found): ", paragraph)
        if heading:
            last = heading[1]
            found[last] = paragraph[heading.end() :]
        else:
            found[last] += f" {paragraph}"
    return found
