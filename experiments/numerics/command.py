"""The commands `numerics`, `invariances` and `family`: tables and a picture of the docs."""

from __future__ import annotations

from ..terminal import outcome, print_paths, rows_table, saying, show
from . import family, invariances, variance
from .config import Family, Invariances, Numerics


def run(config: Numerics | Invariances | Family) -> int:
    """Measures and prints the table, or draws the picture."""
    if isinstance(config, Family):
        family.draw(config)
        print_paths({"picture": config.out})
        return 0
    measure = variance if isinstance(config, Numerics) else invariances
    with saying("measuring"):
        rows = list(measure.rows(config))  # type: ignore[arg-type]
    show(rows_table(measure.HEADINGS, [measure.shown(row) for row in rows]), head=2)
    outcome(rows=rows)
    return 0
