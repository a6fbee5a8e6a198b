"""The options of `figures`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ..rundir import RunError


@dataclasses.dataclass(frozen=True)
class Figures:
    """Draw the figures of runs again, from their directories, and the page of a comparison.

    Nothing is trained, and no data set is needed.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run directories of compare and depth, and those of sweeps."""

    def __post_init__(self) -> None:
        """Raises RunError for a run that there is not."""
        if not self.runs:
            raise RunError("name a run directory, or several: figures runs/compare-mnist-conv-…")
        for path in self.runs:
            if not (path.expanduser() / "config.json").is_file():
                raise RunError(
                    f"{path}: there is no config.json in it. Name the directory of a run."
                )
