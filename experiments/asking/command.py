"""The commands that ask the questions: `run`, `report`, `verify` and others."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from .. import questions
from ..rundir import CHECKOUT, RunError, environment
from ..terminal import console, print_paths
from .answers import Ask, answers, print_answer, status
from .ask import Answer
from .cost import Cost, cost
from .kept import as_json, verdict_json
from .page import Section, page
from .power import Power, power
from .sweep import sweep
from .thresholds import Lock, history, lock, require
from .verify import Verify, verify


@dataclasses.dataclass(frozen=True)
class Run(Ask):
    """Run questions: a figure, and for each claim a verdict with its interval over seeds.

    What was measured is kept: the same command goes on where a run was stopped, and shows again
    what is finished. After `--` follow fields of the config: run NAME -- --model vgg --seeds 5.
    """

    sweep: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """A grid over fields of the config, --sweep lr=0.01,0.1 seeds=3: the question is asked at every
    point, and one table says what they came to, here and as CSV and JSON beside the runs. Values
    are read as the options after -- are; several words of one are quoted, "norms=none,none batch".
    """

    config: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """What followed `--`."""


@dataclasses.dataclass(frozen=True)
class Report(Ask):
    """Run questions, by default all of them, and write one page of all their answers."""

    out: Path = CHECKOUT / "runs" / "report.html"
    """The page; beside it the verdicts as JSON."""

    def __post_init__(self) -> None:
        """Raises RunError for a page in the place of its verdicts, as well."""
        super().__post_init__()
        if self.out.suffix.lower() == ".json":
            raise RunError(
                f"--out: got {self.out}, but the verdicts go into that file. Name the page, "
                f"{self.out.with_suffix('.html').name} for example."
            )


def run(config: Run | Report | Verify | Power | Lock | Cost) -> int:
    """Runs the questions; then prints what each came to, writes the page, or compares."""
    if isinstance(config, Report):
        return report(config)
    if isinstance(config, Verify):
        return verify(config)
    if isinstance(config, Power):
        return power(config)
    if isinstance(config, Lock):
        return lock(config)
    if isinstance(config, Cost):
        return cost(config)
    return show(config)


def show(command: Run) -> int:
    """Runs the questions and prints what each came to."""
    if not command.names:
        raise RunError(f"name a question: {', '.join(questions.NAMES)}.")
    if command.sweep:
        return sweep(command, command.config, [*itertools.chain(*command.sweep)])
    found = []
    for answer in answers(command, command.names, command.config):
        found.append(answer)
        if not answer.failed:
            print_answer(answer)
    return status(found)


def report(command: Report) -> int:
    """Runs the questions and writes the page."""
    names = tuple(dict.fromkeys(command.names or questions.NAMES))
    found = {a.name: a for a in answers(command, names)}
    told = [found[name] for name in names]
    locked = history()
    require(told, locked)
    machine = environment()
    text = page([section(answer) for answer in told], machine)
    verdicts = {a.name: [verdict_json(v) for v in a.verdicts] for a in told}
    out = command.out.expanduser().resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        configs = {a.name: as_json(a.config) for a in told}
        said = {"environment": machine, "configs": configs, "verdicts": verdicts}
        whole = {out: text, out.with_suffix(".json"): json.dumps(said, indent=1) + "\n"}
        for path, content in whole.items():
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_text(content, encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write {out}: {error.strerror}. Choose another place with --out; what was "
            "measured is kept."
        ) from error
    counts = Table("question", "holds", "fails", "undecided", "seconds", title="report")
    for answer in told:
        decisions = [v.decision for v in answer.verdicts]
        cells = (str(decisions.count(d)) for d in ("holds", "fails", "undecided"))
        counts.add_row(answer.name, *cells, f"{answer.seconds:.0f}" if answer.path else "missing")
    console.print(counts)
    print_paths({"page": out})
    return status(told)


def section(answer: Answer) -> Section:
    """What the page says of a question."""
    svg, data = "", tuple({"name": name} for name in answer.config.datasets)
    if answer.path is not None:
        data = tuple(json.loads((answer.path / "config.json").read_text())["data"])
    if answer.path is not None and not answer.failed:
        svg = (answer.path / "figure.svg").read_text(encoding="utf-8")
    try:
        text = questions.describe(answer.name)
    except Exception:  # its file cannot be imported, which is why it has no answer
        text = {"question": answer.name}
    return Section(
        name=answer.name,
        text=text,
        verdicts=answer.verdicts,
        svg=svg,
        config=as_json(answer.config),
        data=data,
        seconds=answer.seconds,
        diverged=answer.diverged,
        missing=answer.failed,
    )
