"""The questions: a file for each, which tests what is said of normalization.

A file is a question by being here. It holds

    QUICK, FULL             frozen configs: minutes on two cores; hours on eight devices
    run(config)             yields records, dictionaries of JSON values, as they are measured
    figure(records)         the picture of them
    verdict(records)        what each claim comes to, against thresholds that stand in the file

and a docstring that says the claim, its source, the command, its cost and what was found. To ask
another, copy a file.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro

from experiments.questions.engine import Config, Question
from experiments.rundir import RunError
from experiments.trainer import Form
from normlab.checks import nearest

NAMES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "engine"))
"""The names of the files."""


def require(name: str) -> Question:
    """Returns the question of that name; raises RunError, with the nearest, for another."""
    if name not in NAMES:
        raise RunError(f"unknown question {name!r}: {nearest(name, NAMES)}.")
    return cast(Question, importlib.import_module(f"{__name__}.{name}"))


def headline(name: str) -> str:
    """The first line of a question's docstring."""
    return (inspect.getdoc(require(name)) or name).splitlines()[0]


@dataclasses.dataclass(frozen=True)
class Ask:
    """Run questions: a figure and a verdict for each claim, with its interval over seeds."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Which (`python -m experiments list`)."""

    profile: Literal["quick", "full"] = "quick"
    """Minutes on two cores, or hours on eight devices."""

    form: Form = "pmap"
    """How the step runs on the devices; the first steps are compared with the other form."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""

    run_dir: Path | None = None
    """Where the results go, a directory for each question in it, which must not exist. By default
    runs/NAME-TIME."""

    def __post_init__(self) -> None:
        """Raises RunError for an unknown question, before any is run."""
        if not self.names:
            raise RunError(f"name a question: {', '.join(NAMES)}.")
        for name in self.names:
            require(name)

    def questions(self) -> Iterator[tuple[str, Question, Config, Path | None]]:
        """Each question with its name, its config and its directory."""
        for name in self.names:
            question = require(name)
            config = question.QUICK if self.profile == "quick" else question.FULL
            config = dataclasses.replace(config, form=self.form, data_dir=self.data_dir)
            yield name, question, config, self.run_dir and self.run_dir / name
