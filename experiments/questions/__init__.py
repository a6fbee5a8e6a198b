"""The questions: a file for each, which tests what is said of normalization.

A file is a question by being here. It holds

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
from pathlib import Path
from typing import cast

from normlab.errors import nearest

from ..engine.question import Question
from ..rundir import RunError

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The names of the files."""


def require(name: str) -> Question:
    """Returns the question of that name; raises RunError, with the nearest, for another."""
    if name not in NAMES:
        raise RunError(f"unknown question {name!r}: {nearest(name, NAMES)}.")
    return cast(Question, importlib.import_module(f"{__name__}.{name}"))


def describe(name: str) -> dict[str, str]:
    """The paragraphs of a question's docstring by their headings; the first is its `question`.

    The file is read and not imported, which another may have to mend first.
    """
    spec = importlib.util.find_spec(f"{__name__}.{name}")
    assert spec is not None, name
    assert spec.origin is not None, name
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or name
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
