"""What the commands say: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.markup import escape
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

PROGRAM = "normlab" if __package__ == "normlab.experiments" else f"python -m {__package__}"
"""How the commands are called, under whatever name this package is installed."""

Form = Literal["table", "markdown", "json"]
"""What results are printed as."""


class Screen(Console):
    """A stream as wide as the terminal, or, in a pipe or a file, as what is written to it.

    `COLUMNS` in the environment sets a width everywhere.
    """

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines."""
        found = super().size
        if self.is_terminal or self._width is not None or "COLUMNS" in os.environ:
            return found
        return ConsoleDimensions(10_000, found.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


console = Screen()
errors = Screen(stderr=True)

EXIT_MISSING = 1
"""Of questions of which one has no answer; what the verdicts say does not matter."""

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is taken as Ctrl-C is."""

    def __str__(self) -> str:
        return "terminated"


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises `Terminated`; a second one ends the program."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets the main thread alone listen
        return

    def stop(number: int, frame: object) -> None:
        del number, frame
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.getsignal(signal.SIGTERM)
    if before != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped(error: KeyboardInterrupt) -> int:
    """The exit status of a program that was stopped."""
    return EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED


class _Printing:
    """How results are printed, and those of the command that runs."""

    form: Form = "table"
    result: dict[str, Any]


@contextlib.contextmanager
def printing(form: Form) -> Iterator[None]:
    """Within it results are printed in one form; what `outcome` was told, as JSON at the end."""
    before = _Printing.form, console.quiet
    _Printing.form, _Printing.result = form, {}
    console.quiet = form == "json"
    try:
        yield
    finally:
        _Printing.form, console.quiet = before
        if form == "json" and _Printing.result:
            console.out(json.dumps(_plain(_Printing.result), indent=2), highlight=False)


def outcome(**values: Any) -> None:
    """Says the result of a command by name, for `--json`; what is said later is added."""
    if _Printing.form == "json":
        _Printing.result.update(values)


def _plain(value: Any) -> Any:
    """JSON values: null for a number that is not finite, a string for a path."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # of NumPy
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def counted(number: int, what: str) -> str:
    """A number of things in words.

    >>> counted(1, "seed"), counted(3, "process"), counted(1200, "point")
    ('1 seed', '3 processes', '1,200 points')
    """
    ending = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{ending}"


def report(error: Exception) -> int:
    """Prints an error the user can act on; returns the exit status for it."""
    errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return EXIT_USAGE


@contextlib.contextmanager
def saying(first: str) -> Iterator[Callable[[str], None]]:
    """What says what is going on: beside a spinner, or a line each where there is no terminal.

    Args:
      first: What is going on at the beginning.
    """
    if not errors.is_terminal:
        said = [""]

        def say(text: str) -> None:
            if text != said[-1]:
                said.append(text)
                log(text)

        say(first)
        yield say
        return
    with errors.status(f"{escape(first)} …") as status:
        yield lambda text: status.update(f"{escape(text)} …")


def progress_bars(*columns: ProgressColumn, **options: Any) -> Progress:
    """Progress bars; without a terminal there are none, and `log` says what is done."""
    return Progress(*columns, console=errors, disable=not errors.is_terminal, **options)


def log(text: str) -> None:
    """Prints a line on standard error where there is no terminal, which has bars instead."""
    if not errors.is_terminal:
        errors.print(text, markup=False, highlight=False, soft_wrap=True)


def remark(text: str) -> None:
    """Prints a line beside the tables."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_paths(paths: Mapping[str, Path | None]) -> None:
    """Prints where the results are, a line for each; `paths` of the JSON."""
    outcome(paths=dict(paths))
    width = max(map(len, paths), default=0)
    for name, path in paths.items():
        console.print(f"{name:>{width}}  {path}", highlight=False, soft_wrap=True, markup=False)


def rows_table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of plain text."""
    made = Table(*map(escape, headings))
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def show(table: Table, head: int = 1) -> None:
    """Prints a table, whatever the width of the terminal: no word and no number is cut.

    Cells break at spaces. Of a table that is too wide the columns are printed in parts, each with
    the first ones; where these are too wide beside any other, each row in lines of its own.

    Args:
      table: The table; columns that are right-justified or `no_wrap` do not break.
      head: How many of the first columns say what a row is.
    """
    columns = [[_text(v) for v in (c.header, *c.cells)] for c in table.columns]
    if _Printing.form == "markdown":
        _print_markdown(columns, table)
        return
    if table.title:
        console.print(table.title, style="table.title", highlight=False)
    longest = [max(map(_longest_line, column)) for column in columns]
    least = [
        full if c.no_wrap or c.justify == "right" else max(map(_longest_word, column))
        for c, column, full in zip(table.columns, columns, longest, strict=True)
    ]
    parts = _parts(least, head, console.width)
    if parts is None:
        for row in zip(*(column[1:] for column in columns), strict=True):
            for (heading, *_), cell in zip(columns, row, strict=True):
                said = f"{_in_a_line(heading)}: {_in_a_line(cell)}".removeprefix(": ")
                console.print(said, highlight=False, markup=False, soft_wrap=True)
            console.print()
    for part in parts or ():
        sizes = _sizes([least[c] for c in part], [longest[c] for c in part], console.width)
        console.print(_part(table, dict(zip(part, sizes, strict=True))))
    if table.caption:
        console.print(table.caption, style="table.caption", highlight=False)


def _text(cell: Any) -> Text:
    return Text.from_markup(cell) if isinstance(cell, str) else Text(str(cell))


def _in_a_line(cell: Text) -> str:
    return " ".join(cell.plain.split())


def _longest_line(cell: Text) -> int:
    return max(map(cell_len, cell.plain.splitlines()), default=0)


def _longest_word(cell: Text) -> int:
    return max(map(cell_len, cell.plain.split()), default=0)


def _around(count: int) -> int:
    """What stands around the cells of so many columns."""
    return 3 * count + 1


def _parts(least: Sequence[int], head: int, width: int) -> list[list[int]] | None:
    """The columns of each part, or `None` if the first ones leave no place for another."""

    def fits(columns: Sequence[int]) -> bool:
        return sum(least[c] for c in columns) + _around(len(columns)) <= width

    first = list(range(min(head, len(least))))
    parts = [first]
    for column in range(len(first), len(least)):
        if not fits([*parts[-1], column]):
            if not fits([*first, column]):
                return None
            parts.append(first)
        parts[-1] = [*parts[-1], column]
    return parts if fits(parts[0]) else None


def _sizes(least: Sequence[int], longest: Sequence[int], width: int) -> list[int]:
    """The width of each column: what it wants, if there is room for it, and at least its words."""
    room = width - _around(len(least)) - sum(least)
    found = list(least)
    wanting = sorted(range(len(least)), key=lambda c: longest[c] - least[c])
    for place, column in enumerate(wanting):
        more = min(longest[column] - least[column], room // (len(wanting) - place))
        found[column] += more
        room -= more
    return found


def _part(table: Table, sizes: Mapping[int, int]) -> Table:
    """The columns of a table that have a size."""
    part = Table(box=table.box, show_edge=table.show_edge, pad_edge=table.pad_edge)
    for column, size in sizes.items():
        told = table.columns[column]
        part.add_column(told.header, justify=told.justify, width=size, overflow="fold")
    cells = zip(*([*table.columns[column].cells] for column in sizes), strict=True)
    for row, of in zip(cells, table.rows, strict=True):
        part.add_row(*row, end_section=of.end_section)
    return part


def _print_markdown(columns: Sequence[Sequence[Text]], table: Table) -> None:
    lines = [[_in_a_line(cell) for cell in row] for row in zip(*columns, strict=True)]
    for cells in (lines[0], ["---"] * len(columns), *lines[1:]):
        console.out(f"| {' | '.join(cells)} |", highlight=False)
    if table.caption:
        console.out(f"\n{_in_a_line(_text(table.caption))}", highlight=False)
