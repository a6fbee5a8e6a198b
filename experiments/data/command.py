"""The command `data`: fetch, verify and prepare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ..terminal import outcome, rows_table, saying, show
from . import load


@dataclasses.dataclass(frozen=True)
class Data:
    """Fetch, verify and prepare data sets, and say where each came from."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("mnist",)
    """mnist, fashion_mnist, cifar10, digits; tiny_shakespeare, gutenberg, lm1b, markov."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""


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
