"""The options of `numerics`, `invariances` and `family`."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Measure the error and the cost of each variance algorithm."""

    examples: int = 16_384
    """Rows of the measured array; it has 64 channels."""

    shards: int = 8
    """Shards whose moments are merged by Chan's rule."""

    rounds: int = 15
    """Turns of each algorithm when its cost is measured; the medians count."""


@dataclasses.dataclass(frozen=True)
class Invariances:
    """Show at which spread of the pre-activation ε breaks each invariance."""

    eps: float = 1e-5
    """ε of the norms that have one."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Draw what every norm does to the same batch."""

    out: Path = Path("family.png")
    """Where the picture goes, a .png or an .svg."""

    norms: tuple[str, ...] = ()
    """Which norms; by default all of the registry."""
