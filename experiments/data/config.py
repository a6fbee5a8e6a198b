"""The options of `data`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ..rundir import require_effect, words
from . import NAMES, is_kept, is_own


@dataclasses.dataclass(frozen=True)
class Data:
    """Fetch, verify and prepare data sets, and say where each came from."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("mnist",)
    """mnist, fashion_mnist, cifar10, digits; tiny_shakespeare, gutenberg, lm1b, markov."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""

    def __post_init__(self) -> None:
        """Raises RunError for a place where nothing would be kept."""
        kept = any(is_kept(n) or not (n in NAMES or is_own(n)) for n in self.names)
        require_effect(self, kept, "data_dir", f"on {words(self.names)}, of which no file is kept")
