"""The command `data`: fetch, verify and prepare."""

from __future__ import annotations

from ..terminal import outcome, rows_table, saying, show
from . import load
from .config import Data


def run(config: Data) -> int:
    """Prepares data sets and prints what they hold."""
    sets = {}
    for name in config.names:
        with saying(name) as say:
            loaded = load(name, config.data_dir, on_progress=say)
        sets[name] = {
            "training": len(loaded.train_inputs),
            "test": len(loaded.test_inputs),
            "example": list(loaded.train_inputs.shape[1:]),
            "classes": loaded.classes,
            "origin": loaded.origin,
            "sha256": loaded.checksum,
        }
    headings = ("set", "training", "test", "example", "classes", "origin", "sha256")
    rows = [
        [name, *("×".join(map(str, v)) if isinstance(v, list) else str(v) for v in told.values())]
        for name, told in sets.items()
    ]
    show(rows_table(headings, rows))
    outcome(datasets=sets)
    return 0
