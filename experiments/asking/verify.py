"""`verify`: are the verdicts of a report those of this machine?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from .. import questions
from ..rundir import CHECKOUT, RunError
from ..terminal import EXIT_MISSING, PROGRAM, console
from .answers import Ask, answers, status
from .kept import as_json


@dataclasses.dataclass(frozen=True)
class Verify(Ask):
    """Run questions, by default those of the last report, and compare the verdicts with it."""

    against: Path = CHECKOUT / "docs" / "report.json"
    """The verdicts of a report."""


def verify(command: Verify) -> int:
    """Runs the questions and compares their verdicts and configs with those of a report."""
    told, configs = _told(command.against)
    for name in command.names:
        if name not in told:
            raise RunError(f"{name} has no verdict in {command.against}.")
    gone = {} if command.names else {n: told[n] for n in told if n not in questions.NAMES}
    names = command.names or tuple(name for name in questions.NAMES if name in told)
    if not names:
        raise RunError(
            f"{command.against} has no verdict of a question that is here. Name another report "
            "with --against."
        )
    found = [*answers(command, names)]
    rows = [row for name, before in gone.items() for row in _compared(name, before, {})]
    for answer in found:
        here = as_json(answer.config)
        then = here if answer.failed else configs.get(answer.name, here)
        for field in sorted(k for k in {*then, *here} if then.get(k) != here.get(k)):
            values = (json.dumps(config.get(field)) for config in (then, here))
            rows.append((answer.name, f"(config) {field}", *values, "differs"))
        now: Told = {v.claim: (v.decision, v.effect) for v in answer.verdicts}
        rows += _compared(answer.name, told[answer.name], now)
    table = Table("question", "claim", "the report", "here", "", title="verify")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    return status(found) or (EXIT_MISSING if any(row[-1] == "differs" for row in rows) else 0)


Told = dict[str, tuple[str, float | None]]
"""Decision and effect of each claim."""


def _told(path: Path) -> tuple[dict[str, Told], dict[str, dict[str, Any]]]:
    """The verdicts of a report and the configs of its questions; those without one are left out."""
    try:
        said = json.loads(path.read_text())
        told = {
            name: {str(v["claim"]): (str(v["decision"]), _finite(v["effect"])) for v in found}
            for name, found in said["verdicts"].items()
            if found
        }
        configs = {name: dict(config) for name, config in said.get("configs", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"cannot read the verdicts of a report in {path}: {error!r}. Make one with "
            f"`{PROGRAM} report`, or name another with --against."
        ) from error
    return told, configs


def _finite(value: Any) -> float | None:
    return None if value is None else float(value)


def _compared(name: str, before: Told, here: Told) -> Iterator[tuple[str, ...]]:
    """A row for each claim that is in the report or here."""
    for claim in dict.fromkeys((*before, *here)):
        then, now = before.get(claim), here.get(claim)
        same = then is not None and now is not None and then[0] == now[0]
        said = ("–" if v is None else f"{v[0]}, {_number(v[1])}" for v in (then, now))
        yield name, claim, *said, "same" if same else "differs"


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"
