"""The command `ledger`: its options, and what it prints."""

from __future__ import annotations

from ..terminal import console, errors, print_rows
from .config import Ledger


def run(config: Ledger) -> int:
    """Prints the collectives of a step, and what the table leaves out."""
    from . import ledger

    with errors.status("compiling") as status:
        found = ledger.compile_all(config, say=lambda text: status.update(f"{text} …"))
    headings, *rows = ledger.table(found)
    print_rows(headings, rows, config.markdown)
    for remark in ledger.remarks(found):
        console.print(remark, highlight=False, markup=False)
    return 0
