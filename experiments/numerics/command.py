"""The commands `numerics` and `invariances`: the tables of docs/numerics.md."""

from __future__ import annotations

from ..terminal import print_rows
from . import invariances, variance
from .invariances import Invariances
from .variance import Numerics


def run(config: Numerics | Invariances) -> int:
    """Measures and prints the table."""
    if isinstance(config, Numerics):
        return print_rows(variance.HEADINGS, variance.rows(config), config.markdown)
    return print_rows(invariances.HEADINGS, invariances.rows(config), config.markdown)
