"""The options of `export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from .. import writers
from ..rundir import RunError


@dataclasses.dataclass(frozen=True)
class Export:
    """Write what runs measured as one table, or to a dashboard.

    A line is a measurement; docs/reference/results.md says what its columns are.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run directories: of compare, train, depth, bench ops, bench bytes, of questions and of their
    sweeps; or the name of a question, for its newest finished run."""

    csv: Path | None = None
    """A file for the table as CSV."""

    parquet: Path | None = None
    """A file for the table as Parquet, which keeps the types."""

    log: tuple[writers.Name, ...] = ()
    """Where the measurements of each run go as well: tensorboard (event files in the run directory)
    or wandb (the project of $WANDB_PROJECT, or normlab)."""

    def __post_init__(self) -> None:
        """Raises RunError for a run that there is not, or a library."""
        if not self.runs:
            raise RunError("name a run directory, or several: export runs/compare-mnist-conv-…")
        for path in self.runs:
            lone = len(path.parts) == 1 or path.suffix == ".py"  # which a question is named by
            if not lone and not path.expanduser().is_dir():
                raise RunError(f"{path}: there is no such directory. Name that of a run.")
        if self.csv is not None and self.csv == self.parquet:
            raise RunError(
                f"--csv {self.csv}: it has no effect beside --parquet {self.parquet}, which is the "
                "same file. Name two, or leave one out."
            )
        writers.require(self.log)
