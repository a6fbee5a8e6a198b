"""The command `export`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pandas as pd

from ..rundir import RunError
from ..terminal import outcome, print_paths, rows_table, saying, show
from . import frames
from .config import Export
from .writers import writers


def run(config: Export) -> int:
    """Writes the table and says what is in it; with --json the table is printed."""
    paths = [path.expanduser() for path in config.runs]
    lines = [line for path in paths for line in frames.lines(path)]
    table = pd.DataFrame(lines)
    files = {"csv": config.csv, "parquet": config.parquet}
    files = {kind: path.expanduser() for kind, path in files.items() if path is not None}
    for kind, path in files.items():
        write(table, path, kind)
    with saying("reading") as say:
        for path in paths if config.log else ():
            say(f"{path} to {', '.join(config.log)}")
            replay(path, config)
    counts = table.groupby(["run", "kind"], sort=False, dropna=False).size()
    rows = [(str(run), str(kind), f"{count:,}") for (run, kind), count in counts.items()]
    show(rows_table(("run", "kind", "measurements"), rows))
    outcome(records=lines)
    print_paths(files)
    return 0


def write(table: pd.DataFrame, path: Path, kind: str) -> None:
    """Writes a table; raises RunError where it cannot."""
    try:
        if kind == "csv":
            table.to_csv(path, index=False, lineterminator="\n")
        else:
            table.to_parquet(path, index=False)
    except OSError as error:
        raise RunError(f"--{kind}: cannot write {path}: {error.strerror or error}.") from error


def replay(path: Path, config: Export) -> None:
    """Hands the records of a run to writers, as if it ran now."""
    with contextlib.ExitStack() as stack:
        for writer in writers(config.log, path, frames.told(path, "config")):
            stack.callback(writer.close)
            writer.write(frames.records(path))
