"""The experiments: comparisons and questions on real data, `normlab --help`.

`normlab.experiments.load("figure1")` is what a question measured, as a data frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

__all__ = ["load"]


def load(run: str | Path, archive: str | Path | None = None) -> pd.DataFrame:
    """What a run measured as a pandas data frame: a line for each measurement.

    `load("runs/compare-digits-mlp-…")` is a run of `compare`, `train`, `depth` or `bench`, of a
    question or of its sweep; `load("figure1")` the newest finished run of a question in
    runs/questions, and `load("figure1", "records.zip")` that of a report whose records are packed
    in a file (`normlab report --archive`). Columns and their units are in
    docs/reference/results.md. The frame's `attrs` say which run it is, with its config and
    environment.

    Args:
      run: The directory of a run, or the name of a question.
      archive: The file.

    Raises:
      RunError: If there is no such run or question, with what to do.

    >>> frame = load("runs/compare-digits-mlp-20260101-120000")  # doctest: +SKIP
    >>> frame[frame["kind"] == "evaluation"].groupby("norm")["accuracy"].mean()  # doctest: +SKIP
    """
    from .results import frames

    return frames.load(run, archive)
