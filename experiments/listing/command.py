"""What `list` prints."""

from __future__ import annotations

from rich.table import Column, Table

import normlab as nl

from .. import models, questions
from ..data import NAMES
from ..terminal import outcome, remark, rows_table, show
from .config import List


def run(config: List) -> int:
    """Prints the norms with what they measure, and the names of everything else."""
    del config
    norms = Table(
        Column("norm", no_wrap=True), "μ and σ look at", "shift μ", "scale σ", title="norms"
    )
    rows = {name: nl.row(name) for name in nl.names()}
    for name, row in rows.items():
        norms.add_row(name, row.looks_at, row.mu, row.sigma)
    show(norms)
    schemes = nl.placement.names()
    others = {"models": models.MODELS, "schemes": schemes, "data sets": NAMES}
    for what, names in others.items():
        remark(f"{what}: {', '.join(names)}")
    asked = {name: questions.describe(name)["question"] for name in questions.NAMES}
    described = rows_table(("question", "asks"), [*asked.items()])
    described.title = "questions, for `run`"
    show(described)
    outcome(
        norms={
            name: {"looks_at": row.looks_at, "mu": row.mu, "sigma": row.sigma}
            for name, row in rows.items()
        },
        models=list(models.MODELS),
        schemes=list(schemes),
        datasets=list(NAMES),
        questions=asked,
    )
    return 0
