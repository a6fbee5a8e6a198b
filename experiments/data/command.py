"""The command `data`: fetch, verify and prepare."""

from __future__ import annotations

from rich.table import Table

from ..terminal import console, errors
from . import load
from .config import Data


def run(config: Data) -> int:
    """Prepares data sets and prints what they hold."""
    result = Table("set", "training", "test", "example", "classes", "origin", "sha256")
    for name in config.names:
        with errors.status(f"{name} …") as status:
            loaded = load(name, config.data_dir, on_progress=lambda text: status.update(text))
        result.add_row(
            name,
            str(len(loaded.train_inputs)),
            str(len(loaded.test_inputs)),
            "×".join(map(str, loaded.train_inputs.shape[1:])),
            str(loaded.classes),
            loaded.origin,
            loaded.checksum[:16] + "…",
        )
    console.print(result)
    return 0
