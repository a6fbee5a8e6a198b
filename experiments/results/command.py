"""The command `export`."""

from __future__ import annotations

import collections
import contextlib
from pathlib import Path

import pandas as pd

from .. import contents
from ..rundir import RunError
from ..terminal import outcome, print_paths, rows_table, saying, show
from ..writers import writers
from . import frames
from .config import Export


def run(config: Export) -> int:
    """Writes the table and says what is in it; with --json the table is printed."""
    paths = [run for path in config.runs for run in contents.runs(frames.directory(path))]
    lines = [line for path in paths for line in contents.lines(path)]
    table = pd.DataFrame(lines)
    files = {"csv": config.csv, "parquet": config.parquet}
    files = {kind: path.expanduser() for kind, path in files.items() if path is not None}
    for kind, path in files.items():
        write(table, path, kind)
    with saying("reading") as say:
        for path in paths if config.log else ():
            say(f"{path} to {', '.join(config.log)}")
            replay(path, config)
    counts = collections.Counter((line["run"], str(line.get("kind"))) for line in lines)
    rows = [(run, kind, f"{count:,}") for (run, kind), count in counts.items()]
    show(rows_table(("run", "kind", "measurements"), rows))
    outcome(records=lines)
    print_paths(files)
    return 0


def write(table: pd.DataFrame, path: Path, kind: str) -> None:
    """Writes a table; raises RunError where it cannot.

    Parquet has one type to a column: one that two questions fill with words and with numbers is of
    words.
    """
    try:
        if kind == "csv":
            table.to_csv(path, index=False, lineterminator="\n")
        else:
            mixed = [name for name, column in table.items() if _mixed(column)]
            table.astype(dict.fromkeys(mixed, "string")).to_parquet(path, index=False)
    except OSError as error:
        raise RunError(f"--{kind}: cannot write {path}: {error.strerror or error}.") from error


def _mixed(column: pd.Series) -> bool:
    kinds = {float if isinstance(v, int | float) else type(v) for v in column.dropna()}
    return column.dtype == object and len(kinds) > 1


def replay(path: Path, config: Export) -> None:
    """Hands the records of a run to writers, as if it ran now."""
    with contextlib.ExitStack() as stack:
        for writer in writers(config.log, path, contents.told(path, "config")):
            stack.callback(writer.close)
            writer.write(contents.records(path))
