"""The commands `numerics`, `invariances` and `family`: tables and a picture of the docs."""

from __future__ import annotations

from ..terminal import print_rows
from . import family, invariances, variance
from .config import Family, Invariances, Numerics


def run(config: Numerics | Invariances | Family) -> int:
    """Measures and prints the table, or writes the picture."""
    if isinstance(config, Family):
        return family.draw(config)
    if isinstance(config, Numerics):
        return print_rows(variance.HEADINGS, variance.rows(config), config.markdown)
    return print_rows(invariances.HEADINGS, invariances.rows(config), config.markdown)
