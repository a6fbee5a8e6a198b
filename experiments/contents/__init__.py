"""What a run directory holds: a record for each measurement, its config and its environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..rundir import Record, RunError
from ..terminal import PROGRAM
from . import benches


def runs(path: Path) -> list[Path]:
    """The run of a directory, or, of a sweep of `compare`, those of its points."""
    return sorted(file.parent for file in path.glob("*/metrics.jsonl")) or [path]


def told(path: Path, name: str) -> dict[str, Any]:
    """What a run says of its `config` or its `environment`; empty where it says nothing."""
    try:
        file = path / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else benches.told(path, name)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot read the {name} of this run: {error}.") from error


def records(path: Path) -> list[Record]:
    """The records of a run directory, as they were written.

    Raises:
      RunError: If there are none, or it is not whole.
    """
    try:
        found = _records(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} does not hold a run whole: {error!r}.") from error
    if found is None:
        raise RunError(
            f"{path}: there are no records in it. It must be the directory of a run, which has "
            "metrics.jsonl (compare, train, depth), ops.json or bytes.json (bench), conditions/ "
            "(a question) or sweep-….json. Other parts of bench keep none: with --json they print "
            "their numbers. "
            f"{PROGRAM} compare, for example, says at its end where its results are."
        )
    return found


def lines(path: Path) -> list[Record]:
    """The records of a run, each with its `run` and the options that the records do not say.

    Options are those of one value; what is measured of each example (`accuracy_each`) is left out.
    """
    found = records(path)
    known = {name for record in found for name in record}
    options = {
        name: value
        for name, value in told(path, "config").items()
        if isinstance(value, str | int | float) and name not in (*known, "data_dir", "run_dir")
    }
    return [
        {"run": path.resolve().name, **options}
        | {name: value for name, value in record.items() if not name.endswith("_each")}
        for record in found
    ]


def _records(path: Path) -> list[Record] | None:
    if (metrics := path / "metrics.jsonl").exists():
        return _lines(metrics)
    if (timed := benches.records(path)) is not None:
        return timed
    if conditions := sorted(path.glob("conditions/*.jsonl")):
        return [record for file in conditions for record in _lines(file)]
    if sweeps := sorted(path.glob("sweep-*.json")):
        return [record for file in sweeps for record in _points(json.loads(file.read_text()))]
    return None


def _lines(path: Path) -> list[Record]:
    """The lines of a file of which the last may be on its way."""
    whole = (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
    return [json.loads(line) for line in whole]


def _points(sweep: dict[str, Any]) -> list[Record]:
    """The claims of a sweep at each of its points."""
    apart = ("effects", "source")
    return [
        {
            "question": sweep["question"],
            **point["values"],
            "run": point["run"],
            **{name: value for name, value in verdict.items() if name not in apart},
        }
        for point in sweep["points"]
        for verdict in point["verdicts"]
    ]
