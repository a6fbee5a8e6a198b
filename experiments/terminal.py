"""What the commands say: the two consoles, tables, errors, and the exit statuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PROGRAM = "normlab" if __package__ == "normlab.experiments" else f"python -m {__package__}"
"""How the commands are called, under whatever name this package is installed."""

console = Console()
errors = Console(stderr=True)

EXIT_MISSING = 1
"""Of questions of which one has no answer; what the verdicts say does not matter."""

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def report(error: Exception) -> int:
    """Prints an error the user can act on; returns the exit status for it."""
    errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return EXIT_USAGE


def print_rows(headings: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool) -> int:
    """Prints a table, for the terminal or as Markdown."""
    with errors.status("measuring …"):
        rows = list(rows)
    if markdown:
        for cells in (headings, ["---"] * len(headings), *rows):
            print(f"| {' | '.join(cells)} |")
        return 0
    result = Table(*headings)
    for row in rows:
        result.add_row(*row)
    console.print(result)
    return 0


def print_paths(paths: Mapping[str, Path | None]) -> None:
    """Prints where the results are, a line for each."""
    for name, path in paths.items():
        console.print(f"{name:>12}  {path}", highlight=False, soft_wrap=True)
