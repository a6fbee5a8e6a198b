"""The options of `data`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Data:
    """Fetch, verify and prepare data sets, and say where each came from."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("mnist",)
    """mnist, fashion_mnist, cifar10, digits; tiny_shakespeare, gutenberg, lm1b, markov."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""
