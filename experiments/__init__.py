"""The experiments: comparisons and questions on real data, `normlab --help`.

`normlab.experiments.load("figure1")` is what a question measured, as a data frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

__all__ = ["load"]


def load(name: str, archive: str | Path | None = None) -> pd.DataFrame:
    """The records of a question as a pandas data frame: a line for each measurement.

    `load("figure1")` is its newest finished run in runs/questions, and
    `load("figure1", "records.zip")` that of a report whose records are packed in a file
    (`normlab report --archive`). The frame's `attrs` say which run it is, with its config and
    environment.

    Args:
      name: The question.
      archive: The file.

    Raises:
      RunError: If there is no such question or no finished run of it, with what to do.
    """
    from .asking import archive as archives

    return archives.load(name, archive)
