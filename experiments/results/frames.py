"""Runs as data frames: what a run directory holds, a line for each measurement."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .. import contents, questions


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
    several = contents.runs(path)
    lone = several == [path]
    frame = pd.DataFrame(
        contents.records(path) if lone else [r for run in several for r in contents.lines(run)]
    )
    names = ("config", "environment")
    frame.attrs = {
        "run": path.resolve().name,
        **{name: contents.told(path, name) for name in names},
    }
    return frame
