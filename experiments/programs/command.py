"""The command `ledger`: its options, and what it prints."""

from __future__ import annotations

from ..terminal import outcome, remark, rows_table, saying, show
from .config import Ledger


def run(config: Ledger) -> int:
    """Prints the collectives of a step, and what the table leaves out."""
    from . import ledger

    with saying("compiling") as say:
        found = ledger.compile_all(config, say=say)
    headings, *rows = ledger.table(found)
    show(rows_table(headings, rows))
    for said in ledger.remarks(found):
        remark(said)
    outcome(programs=[ledger.as_json(config, account) for account in found.accounts])
    return 0
