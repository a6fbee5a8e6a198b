"""Runs as data frames: what a run directory holds, a line for each measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from .. import questions
from ..rundir import Record, RunError
from ..terminal import PROGRAM
from . import benches


def load(run: str | Path, archive: str | Path | None = None) -> pd.DataFrame:
    """The records of a run; see `experiments.load`."""
    if archive is None and _is_directory(run):
        return read(Path(run).expanduser())
    from ..asking import archive as archives

    return archives.load(_question(run), archive)


def directory(run: str | Path) -> Path:
    """The directory of a run: itself, or that of the newest finished run of a question.

    Args:
      run: The directory; or a question by its name, its file or its module.

    Raises:
      RunError: If there is neither.
    """
    if _is_directory(run):
        return Path(run).expanduser()
    from ..asking import archive as archives

    return archives.newest(_question(run))


def _is_directory(run: str | Path) -> bool:
    return str(run) not in questions.NAMES and Path(run).expanduser().is_dir()


def _question(run: str | Path) -> str:
    """The name of a question, which is the last part of its file or module."""
    path = Path(run)
    if path.suffix == ".py":
        return path.stem
    return str(run) if len(path.parts) > 1 else path.name.rpartition(".")[2]


def read(path: Path) -> pd.DataFrame:
    """The records of a run directory: of a command, a question or a sweep.

    Those of a sweep of `compare` are as `lines` has them, of all its points.

    Args:
      path: The directory. `attrs` of the frame has the `run`, its `config` and its `environment`.

    Raises:
      RunError: If it is none, or is not whole.
    """
    several = runs(path)
    lone = several == [path]
    frame = pd.DataFrame(records(path) if lone else [r for run in several for r in lines(run)])
    names = ("config", "environment")
    frame.attrs = {"run": path.resolve().name, **{name: told(path, name) for name in names}}
    return frame


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
    """The records of a run directory, as they were written; raises as `read`."""
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
