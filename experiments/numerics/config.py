"""The options of `numerics`, `invariances` and `family`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import normlab as nl

from ..rundir import RunError, require, require_positive, words


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Measure the error and the cost of each variance algorithm."""

    examples: int = 16_384
    """Rows of the measured array; it has 64 channels."""

    shards: int = 8
    """Shards whose moments are merged by Chan's rule."""

    rounds: int = 15
    """Turns of each algorithm when its cost is measured; the medians count."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be measured."""
        require_positive(self, "examples", "shards", "rounds")
        if self.examples % self.shards:
            raise RunError(
                f"--shards {self.shards}: --examples {self.examples} does not divide into so many. "
                "Change one of them."
            )


@dataclasses.dataclass(frozen=True)
class Invariances:
    """Show at which spread of the pre-activation ε breaks each invariance."""

    eps: float = 1e-5
    """ε of the norms that have one."""

    def __post_init__(self) -> None:
        """Raises RunError for an ε that is none."""
        require(0 < self.eps < math.inf, "eps", self.eps, "positive and finite")


@dataclasses.dataclass(frozen=True)
class Family:
    """Draw what every norm does to the same batch."""

    out: Path = Path("family.png")
    """Where the picture goes, a .png or an .svg."""

    norms: tuple[str, ...] = ()
    """Which norms; by default all of the registry."""

    def __post_init__(self) -> None:
        """Raises RunError for a norm that there is not, or a picture of another kind."""
        for name in self.norms:
            require(self.norms.count(name) == 1, "norms", words(self.norms), "distinct")
            try:
                nl.row(name)
            except ValueError as error:
                raise RunError(f"--norms: {error}") from None
        known = self.out.suffix in (".png", ".svg")
        require(known, "out", self.out, "a file that ends in .png or .svg")
