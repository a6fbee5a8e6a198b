"""The registry at the end of docs/family.md: `make registry` writes it."""

from pathlib import Path

import normlab

FAMILY = Path(__file__).parent.parent / "docs/family.md"
ROWS = "\n## The registry\n"


def registry() -> str:
    """The last section of docs/family.md: every row, and what it is invariant to."""
    changes = " · ".join(normlab.INVARIANCES)
    text = f"""{ROWS}
`I` where h stays as it is, of the changes {changes}: behind a dense layer; then behind one with
positions where that differs. Tested, and that no other holds: `pytest tests/test_family.py`.

| norm | μ and σ look at | μ | σ | invariances | proposed by |
|---|---|---|---|---|---|
"""
    for row in map(normlab.row, normlab.names()):
        held = [row.invariances, *([] if row.with_positions is None else [row.with_positions])]
        marks = " ".join("".join("I" if c in h else "–" for c in normlab.INVARIANCES) for h in held)
        cells = (f"`{row.name}`", row.looks_at, row.mu, row.sigma, f"`{marks}`", row.paper)
        text += f"| {' | '.join(cells)} |\n"
    return text.replace("|a − μ|", "\\|a − μ\\|")


def family() -> str:
    """The page of the family, with its registry as it is."""
    return FAMILY.read_text().partition(ROWS)[0] + registry()


if __name__ == "__main__":
    FAMILY.write_text(family())
