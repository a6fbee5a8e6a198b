"""The lock on thresholds: every bound, the commit that set it, every change and its reason.

`experiments/questions/thresholds.csv` has a line for each bound that a claim has had, the newest
last. Lines are appended by `normlab lock` and never changed.
"""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from .. import questions
from ..engine.verdict import Bounds, bounds
from ..rundir import RunError
from ..terminal import PROGRAM, outcome, remark, rows_table, show
from .answers import answers, status
from .ask import Answer
from .config import Lock

PATH = Path(questions.__file__).resolve().with_name("thresholds.csv")
"""The file."""


class Line(NamedTuple):
    """A line of the file.

    Attributes:
      id: The claim.
      at_least, at_most, size: As in `Verdict`, as text; empty where there is none.
      date: When that was, in UTC: `2026-11-29T13:26:05+00:00`.
      commit: The commit that set it: the last one that changed the question's file.
      reason: Where it comes from; of a change, why.
    """

    id: str
    at_least: str
    at_most: str
    size: str
    date: str
    commit: str
    reason: str

    @property
    def bounds(self) -> Bounds:
        """What the claim is judged by."""
        return Bounds(self.at_least, self.at_most, self.size)


def history(path: Path | None = None) -> dict[str, list[Line]]:
    """Every bound that each claim has had, the newest last; raises RunError for a bad line."""
    path = path or PATH
    found: dict[str, list[Line]] = {}
    if not path.exists():
        return found
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if tuple(next(lines, ())) != Line._fields:
            raise RunError(f"{path}: the first line must be {','.join(Line._fields)}.")
        for number, line in enumerate(lines, 2):
            if len(line) != len(Line._fields):
                raise RunError(
                    f"{path}, line {number}: got {len(line)} values, expected "
                    f"{len(Line._fields)} ({', '.join(Line._fields)})."
                )
            found.setdefault(line[0], []).append(Line(*line))
    return found


def require(answers: Iterable[Answer], locked: Mapping[str, Sequence[Line]]) -> None:
    """Raises RunError, naming all, for claims whose bound is not the one that is locked.

    Of a claim that was never locked, such as one of a question of yours, the bound must be the one
    that it had when its records were first judged.
    """
    changed = []
    for answer in answers:
        for verdict in answer.verdicts:
            now, lines = bounds(verdict), locked.get(verdict.id, ())
            if lines and lines[-1].bounds != now:
                last = lines[-1]
                was = f"{last.bounds} since {last.date[:10]} (commit {last.commit})"
                changed.append(f"{verdict.id}: {now}, but locked is {was}")
            elif not lines and answer.judged.get(verdict.id, now) != now:
                was = answer.judged[verdict.id]
                changed.append(f"{verdict.id}: {now}, but its records were judged by {was}")
    if changed:
        names = " ".join(dict.fromkeys(line.partition(".")[0] for line in changed))
        raise RunError(
            "bounds have changed after they were set: "
            + "; ".join(changed)
            + f". Take them back, or say why: {PROGRAM} lock {names} --reason TEXT."
        )


def lock(command: Lock) -> int:
    """Appends a line for each bound that is new or has changed."""
    command.require_names()
    if not command.reason.strip():
        raise RunError("--reason: say where the bounds come from, or why they were changed.")
    commits = {name: _commit(name) for name in command.names}
    found = [*answers(command, command.names, command.config)]
    locked = history()
    lines = [
        Line(verdict.id, *bounds(verdict), *commits[answer.name], command.reason.strip())
        for answer in found
        for verdict in answer.verdicts
        if [line.bounds for line in locked.get(verdict.id, ())][-1:] != [bounds(verdict)]
    ]
    append(lines)
    table = rows_table(("claim", "bounds"), [(line.id, str(line.bounds)) for line in lines])
    table.title = "locked"
    show(table)
    outcome(locked=[line._asdict() for line in lines])
    there = {verdict.id for answer in found for verdict in answer.verdicts}
    asked = {answer.name for answer in found if not answer.failed}
    for id in sorted(id for id in locked if id.partition(".")[0] in asked and id not in there):
        remark(f"{'gone':>12}  {id}: no claim has this id")
    return status(found)


def append(lines: Sequence[Line], path: Path | None = None) -> None:
    """Appends lines to the file, whose order is that of time."""
    path = path or PATH
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Line._fields] if new else [])
        writer.writerows(lines)


def _commit(name: str) -> tuple[str, str]:
    """When the question's file became what it is, and the commit that made it so."""
    file = str(PATH.with_name(f"{name}.py"))
    git = ["git", "-C", str(PATH.parent)]
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            [*git, *a], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        if run("status", "--porcelain", "--", file):
            raise RunError(
                f"{name}: its file differs from the last commit, which is to have the bounds that "
                "are locked. Commit it first."
            )
        seconds, commit = run("log", "-1", "--abbrev=12", "--format=%ct %h", "--", file).split()
        date = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
        return date.isoformat(), commit
    except (OSError, subprocess.SubprocessError):
        raise RunError(
            f"{PATH.parent} is in no checkout that git can read, so that no commit can be named: "
            "lock bounds in one."
        ) from None


def order(line: Line, begun: str) -> Literal["before", "after"]:
    """Whether a bound was set before or after a run began, which is in UTC as its date."""
    return "after" if line.date > begun else "before"


def since(lines: Sequence[Line], begun: str) -> str:
    """When the bound of a claim was set, in words for its row.

    Args:
      lines: The history of the claim.
      begun: When the run began, in UTC.
    """
    if not lines:
        return "not locked"
    last = lines[-1]
    changes = len(lines) - 1
    often = f", changed {'once' if changes == 1 else f'{changes} times'}" if changes else ""
    return f"set {order(last, begun)} the run, {last.date[:10]}{often}"
