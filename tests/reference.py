"""The registry at the end of docs/family.md: `make registry` writes it."""

from pathlib import Path

import normlab

FAMILY = Path(__file__).parent.parent / "docs/family.md"
ROWS = "\n## The registry\n"


def registry() -> str:
    """The last section of docs/family.md: every norm, by what it is invariant to."""
    text = f"""{ROWS}
What each norm is invariant to. `I` where h after a dense layer stays the same, in this order:
{" · ".join(normlab.INVARIANCES)}.
A second code is that of a layer with positions, where it differs.
`pytest tests/test_family.py` checks that these hold, and no others.

| invariances | norms |
|---|---|
"""
    alike: dict[str, list[str]] = {}
    for row in map(normlab.row, normlab.names()):
        held = [row.invariances, *([] if row.with_positions is None else [row.with_positions])]
        marks = " ".join("".join("I" if c in h else "–" for c in normlab.INVARIANCES) for h in held)
        alike.setdefault(marks, []).append(f"`{row.name}`")
    return text + "".join(f"| `{marks}` | {', '.join(norms)} |\n" for marks, norms in alike.items())


def family() -> str:
    """The page of the family, with its registry as it is."""
    return FAMILY.read_text().partition(ROWS)[0] + registry()


if __name__ == "__main__":
    FAMILY.write_text(family())
