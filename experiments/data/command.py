"""The command `data`: fetch, verify and prepare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from ..terminal import console, errors
from . import load


@dataclasses.dataclass(frozen=True)
class Data:
    """Fetch, verify and prepare data sets, and say where each came from."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("mnist",)
    """mnist, fashion_mnist, cifar10, digits."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""


def run(config: Data) -> int:
    """Prepares data sets and prints what they hold."""
    result = Table("set", "training", "test", "image", "classes", "origin", "sha256")
    for name in config.names:
        with errors.status(f"{name} …") as status:
            loaded = load(name, config.data_dir, on_progress=lambda text: status.update(text))
        result.add_row(
            name,
            str(len(loaded.train_images)),
            str(len(loaded.test_images)),
            "×".join(map(str, loaded.train_images.shape[1:])),
            str(loaded.classes),
            loaded.origin,
            loaded.checksum[:16] + "…",
        )
    console.print(result)
    return 0
