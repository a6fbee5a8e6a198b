"""A sweep: a question at every point of a grid, and one table of what they came to."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from .. import questions, terminal
from ..engine.verdict import Verdict
from ..rundir import RunDirectory, RunError
from ..terminal import counted, errors, print_paths, remark, saying
from . import kept
from .answers import about, answered, chosen, rehearsed, status
from .ask import Answer, Asking
from .config import Ask
from .fields import Point, grid, words
from .kept import verdict_json
from .numbers import duration, threshold
from .page import SYMBOLS
from .sources import version

MISSING = "not measured"
"""Of a point that was not measured to its end, because the sweep was stopped."""


class Row(NamedTuple):
    """A point and what it came to.

    Attributes:
      point: The point.
      run: The name of its directory.
      failed: Why it has no verdict, if it has none.
      seconds: What it cost, on its core.
      verdicts: What became of each claim, by its id.
      diverged: The lanes whose loss was not finite.
      checksum: Of its records.
    """

    point: Point
    run: str | None = None
    failed: str = MISSING
    seconds: float | None = None
    verdicts: Mapping[str, Verdict] = {}
    diverged: tuple[str, ...] = ()
    checksum: str = ""


def row(point: Point, answer: Answer) -> Row:
    """What a point came to; its records stay in their directory."""
    return Row(
        point=point,
        run=answer.path.name if answer.path else None,
        failed=answer.failed,
        seconds=answer.seconds,
        verdicts={verdict.id: verdict for verdict in answer.verdicts},
        diverged=answer.diverged,
        checksum=hashlib.sha256(json.dumps(answer.measured).encode()).hexdigest(),
    )


def sweep(command: Ask, options: Sequence[str], fields: Sequence[str]) -> int:
    """Asks every question at every point; prints and writes a table of each, however it ends.

    Args:
      command: Which questions, and how to ask.
      options: Of the config, at all points.
      fields: The grid, `lr=0.01,0.1`.

    Raises:
      RunError: As `fields.grid`, before anything is measured; for a field that is an option too;
        for points, all of them, at which a claim could not be judged.
    """
    asked, broken = chosen(command, command.names, options)
    grids = [(asking, grid(asking.name, asking.config, fields)) for asking in asked]
    given = {option.partition("=")[0].lstrip("-").replace("-", "_") for option in options}
    for field in grids[0][1][0].values if grids else ():
        if field in given:
            raise RunError(f"--sweep: {field} is given after -- as well. Give it in one place.")
    points: dict[str, Asking] = {}
    rows: dict[str, Row] = {}
    for asking, found in grids:
        for point in found:
            one = asking._replace(config=point.config, point=point.name)
            points[one.title], rows[one.title] = one, Row(point)
    with saying("trying whether the claims can be judged"):
        points = {one.title: one for one in rehearsed([*points.values()])}
    for asking, found in grids:
        announce(command, asking, found)
    answers = []
    try:
        for answer in answered(command, [*points.values()], broken):
            if answer.title in rows:
                rows[answer.title] = row(rows[answer.title].point, answer)
            answers.append(answer._replace(records=()))
    finally:
        told = []
        for asking, _ in grids:
            mine = [rows[title] for title, one in points.items() if one.name == asking.name]
            if any(one.failed != MISSING for one in mine):
                show(mine, asking.name, write(mine, asking, command.run_dir or kept.place()))
                told.append(as_json(mine, asking))
                terminal.outcome(sweeps=told)
    return status(answers)


def announce(command: Ask, asking: Asking, points: Sequence[Point]) -> None:
    """Says how many points there are and what they cost, and of seeds that decide nothing."""
    counts = {
        field: len({words(point.values[field]) for point in points}) for field in points[0].values
    }
    seconds = sum(about(asking._replace(config=point.config)) for point in points)
    cost = f"about {duration(seconds)} of one core" if command.profile == "quick" else "no estimate"
    count = counted(len(points), "point")
    sizes = " × ".join(f"{number} {field}" for field, number in counts.items())
    errors.print(
        f"{asking.name}: {count} ({sizes}), {cost}; what was measured before is kept.",
        highlight=False,
        soft_wrap=True,
    )
    if any(point.config.seeds < 2 for point in points):
        errors.print(
            "[yellow]one seed[/] has no interval, so that no claim can be decided: give 2 or more.",
            soft_wrap=True,
        )


def claims(rows: Sequence[Row]) -> dict[str, Verdict]:
    """Every claim of any of the points by its id, with its first verdict."""
    found: dict[str, Verdict] = {}
    for one in rows:
        found |= {id: v for id, v in one.verdicts.items() if id not in found}
    return found


def show(rows: Sequence[Row], name: str, path: Path) -> None:
    """Prints the table: a row for each point.

    Args:
      rows: The points.
      name: The question.
      path: Where it was written.
    """
    fields, told = list(rows[0].point.values), claims(rows)
    head = [(field, [words(one.point.values[field]) for one in rows]) for field in fields]
    rest = [(str(i), [_cell(one, id) for one in rows]) for i, id in enumerate(told, 1)]
    rest.append(("run", [one.run or "" for one in rows]))
    result = Table(title=name)
    for heading, _ in (*head, *rest):
        result.add_column(escape(heading), no_wrap=True)
    for cells in zip(*(cells for _, cells in (*head, *rest)), strict=True):
        result.add_row(*map(escape, cells))
    terminal.show(result, head=len(head))
    for i, verdict in enumerate(told.values(), 1):
        unit = f" {verdict.unit}" if verdict.unit else ""
        remark(f"{i:>12}  {verdict.id}: {verdict.claim}, {threshold(verdict)}{unit}")
    marks = ", ".join(f"{mark} {what}" for what, mark in SYMBOLS.items())
    remark(f"{marks}; the effect is the mean over the seeds.")
    for one in rows:
        for lane in one.diverged:
            remark(f"{'diverged':>12}  {one.point.name}: {lane}")
    for field in idle(rows):
        errors.print(f"[yellow]{field} changed nothing:[/] {name} does not read it.")
    print_paths({"table": path, "with it": path.with_suffix(".json")})


def _cell(one: Row, id: str) -> str:
    if one.failed:
        return SYMBOLS["missing"]
    verdict = one.verdicts.get(id)  # an id may name what is swept
    return f"{SYMBOLS[verdict.decision]} {verdict.effect:.3g}" if verdict else ""


def idle(rows: Sequence[Row]) -> Iterator[str]:
    """The swept fields of which no record depends; whatever they were, the numbers are the same."""
    for field in rows[0].point.values:
        alike: dict[str, list[Row]] = {}
        for one in rows:
            others = {k: words(v) for k, v in one.point.values.items() if k != field}
            alike.setdefault(str(others), []).append(one)
        same = all(len({one.checksum for one in found}) == 1 for found in alike.values())
        if same and len(alike) < len(rows) and not any(one.failed for one in rows):
            yield field


def write(rows: Sequence[Row], asking: Asking, root: Path) -> Path:
    """Writes the table as CSV, a line for each point, and whole as JSON; returns the CSV's place.

    The same sweep of the same code has the same name.
    """
    code = version(questions.module_of(asking.name))
    keys = [kept.key(one.point.config, code, ()) for one in rows]
    name = f"sweep-{asking.name}-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:12]}"
    directory = RunDirectory(root.expanduser().resolve(), name, again=True)
    directory.write_json(f"{name}.json", as_json(rows, asking))
    told = claims(rows)
    lines = [_line(one, told) for one in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return directory.write_bytes(f"{name}.csv", text.getvalue().encode())


def as_json(rows: Sequence[Row], asking: Asking) -> dict[str, Any]:
    """The sweep as JSON values: the common part of the config, and all that is said of a point."""
    swept = rows[0].point.values
    return {
        "question": asking.name,
        "config": {k: v for k, v in kept.as_json(asking.config).items() if k not in swept},
        "points": [
            {
                "values": {k: kept.as_json(one.point.config)[k] for k in swept},
                "run": one.run,
                "failed": one.failed,
                "seconds": one.seconds,
                "diverged": one.diverged,
                "verdicts": [verdict_json(verdict) for verdict in one.verdicts.values()],
            }
            for one in rows
        ],
    }


def _line(one: Row, told: Iterable[str]) -> dict[str, Any]:
    line: dict[str, Any] = {field: words(value) for field, value in one.point.values.items()}
    line |= {"run": one.run, "failed": one.failed, "diverged": "; ".join(one.diverged)}
    for id in told:
        found = verdict_json(one.verdicts[id]) if id in one.verdicts else {}
        line[id] = found.get("decision")
        for part in ("effect", "low", "high", "p"):
            line[f"{id}: {part}"] = found.get(part)
    return line
