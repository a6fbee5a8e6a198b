"""What was measured, to take away: the runs of a report in one file, and a run as a data frame."""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from normlab.errors import nearest

from .. import questions
from ..rundir import RunError
from ..terminal import PROGRAM
from . import kept

FILES = ("bounds.json", "config.json", "environment.json", "verdict.json", "conditions/*.jsonl")
"""What is packed of a run: all but its pictures."""

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in an archive, so that the same runs make the same bytes."""

_RUN = re.compile(r"(?P<question>\w+)-[0-9a-f]{12}")


class Run(NamedTuple):
    """The files of a run, in a directory or in an archive.

    Attributes:
      name: Of its directory.
      files: What reads each, by its name within the directory.
    """

    name: str
    files: Mapping[str, Callable[[], bytes]]

    def json(self, file: str) -> Any:
        """A file of JSON."""
        return json.loads(self.files[file]())

    def records(self) -> list[dict[str, Any]]:
        """What was measured, in the order of the conditions."""
        found = sorted(name for name in self.files if name.startswith("conditions/"))
        for index, name in enumerate(found):
            if not name.startswith(f"conditions/{index:02d}-"):
                raise ValueError(f"conditions/{index:02d} is gone")
        return [json.loads(line) for name in found for line in self.files[name]().splitlines()]


def pack(runs: Iterable[Path]) -> bytes:
    """The runs as a zip file; the same runs make the same bytes.

    Args:
      runs: Their directories.

    Raises:
      RunError: If a file cannot be read.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for run in sorted(runs):
            for path in sorted(path for pattern in FILES for path in run.glob(pattern)):
                name = zipfile.ZipInfo(f"{run.name}/{path.relative_to(run).as_posix()}", EPOCH)
                name.compress_type, name.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                name.create_system = 3  # that of POSIX, wherever it is packed
                try:
                    archive.writestr(name, path.read_bytes())
                except OSError as error:
                    raise RunError(f"cannot read {path}: {error.strerror}.") from error
    return content.getvalue()


def load(name: str, archive: str | Path | None = None, root: Path | None = None) -> pd.DataFrame:
    """The records of a question: a line for each measurement.

    Columns are the keys of the records: what sets a condition and a lane apart (`norm`, `lr`,
    `seed`, …), the `kind` and `step` of the measurement, and what was measured; what a record does
    not have is missing. `attrs` has the `run`, its `config` and its `environment`.

    Args:
      name: The question.
      archive: What `report --archive` wrote, in the place of the runs on this machine.
      root: Where these are; by default runs/questions. Of several the newest counts that is
        finished.

    Raises:
      RunError: For a question that there is not or that has no finished run there, and for an
        archive that cannot be read or is not whole.
    """
    with _packed(Path(archive)) if archive is not None else _here(root or kept.place()) as runs:
        where = archive if archive is not None else root or kept.place()
        try:
            run = _newest(name, runs, where)
            frame = pd.DataFrame(run.records())
            frame.attrs = {
                "run": run.name,
                "config": run.json("config.json"),
                "environment": run.json("environment.json"),
            }
        except RunError:
            raise
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            mend = "Fetch it again." if archive is not None else f"{PROGRAM} run {name} --again"
            raise RunError(f"{where} does not hold {name} whole: {error!r}. {mend}") from error
    return frame


def newest(name: str) -> Path:
    """The directory of the newest finished run of a question; raises RunError as `load`."""
    root = kept.place().expanduser()
    with _here(root) as runs:
        return root / _newest(name, runs, root).name


def _newest(name: str, runs: Sequence[Run], where: Any) -> Run:
    mine = [run for run in runs if run.name.rpartition("-")[0] == name]
    if not mine:
        raise _absent(name, sorted({run.name.rpartition("-")[0] for run in runs}), where)
    return max((run.json("environment.json")["time"], run.name, run) for run in mine)[-1]


def _absent(name: str, there: list[str], where: Any) -> RunError:
    if name not in questions.NAMES and name not in there:
        known = sorted({*there, *questions.NAMES})
        return RunError(f"unknown question {name!r}: {nearest(name, known)}.")
    held = f"; it has {', '.join(there)}" if there else ""
    return RunError(
        f"{where} has no finished run of {name}{held}. Make one: {PROGRAM} run {name}; or name an "
        f'archive of a report that has it: load("{name}", "records.zip").'
    )


@contextlib.contextmanager
def _here(root: Path) -> Iterator[list[Run]]:
    """The finished runs of a folder: those that have a verdict."""
    root = root.expanduser()
    yield [
        Run(
            path.parent.name,
            {
                file.relative_to(path.parent).as_posix(): file.read_bytes
                for pattern in FILES
                for file in path.parent.glob(pattern)
            },
        )
        for path in sorted(root.glob("*/verdict.json"))
        if _RUN.fullmatch(path.parent.name)
    ]


@contextlib.contextmanager
def _packed(path: Path) -> Iterator[list[Run]]:
    """The runs of an archive."""
    path = path.expanduser()
    try:
        opened = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise RunError(
            f"cannot read the archive {path}: {error}. It must be what `{PROGRAM} report "
            "--archive FILE.zip` writes, and whole."
        ) from error
    with opened as archive:
        found: dict[str, dict[str, Callable[[], bytes]]] = {}
        for name in archive.namelist():
            run, _, file = name.partition("/")
            if _RUN.fullmatch(run):
                found.setdefault(run, {})[file] = lambda name=name: archive.read(name)
        yield [Run(run, files) for run, files in found.items() if "verdict.json" in files]
