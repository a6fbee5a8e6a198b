"""What `list` prints."""

from __future__ import annotations

from rich.table import Column, Table

import normlab as nl

from .. import models, questions
from ..data import NAMES
from ..terminal import console
from .config import List


def run(config: List) -> int:
    """Prints the norms with what they measure, and the names of everything else."""
    del config
    norms = Table(
        Column("norm", no_wrap=True), "μ and σ look at", "shift μ", "scale σ", title="norms"
    )
    for name in nl.names():
        row = nl.row(name)
        norms.add_row(name, row.looks_at, row.mu, row.sigma)
    console.print(norms)
    schemes = nl.placement.names()
    others = {"models": models.MODELS, "schemes": schemes, "data sets": NAMES}
    for what, names in others.items():
        console.print(f"{what}: {', '.join(names)}", highlight=False)
    asked = Table("question", "asks", title="questions, for `run`")
    for name in questions.NAMES:
        asked.add_row(name, questions.describe(name)["question"])
    console.print(asked)
    return 0
