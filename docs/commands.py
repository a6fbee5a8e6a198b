"""The page of the command line: what every command says of itself with `--help`."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from normlab.experiments.console import COMMANDS

SOURCES = Path(__file__).parent.parent / "experiments"
HEAD = """# The command line

`normlab COMMAND` is installed with `pip install 'normlab[experiments]'`. This is what each command
says of itself with `--help`.

| command | what it does |
|---|---|
"""


def page(helps: dict[str, str]) -> str:
    """The document, of the help of each command."""
    rows = "".join(f"| [`{name}`](#{name}) | {COMMANDS[name][1]} |\n" for name in helps)
    parts = (f"\n## {name}\n\n```text\n{text.strip()}\n```\n" for name, text in helps.items())
    return HEAD + rows + "".join(parts)


def help_of(name: str) -> str:
    """What `normlab NAME --help` prints, 80 columns wide."""
    done = subprocess.run(
        [sys.executable, "-m", "normlab.experiments", name, "--help"],
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "JAX_PLATFORMS": "cpu"},
        cwd=SOURCES.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def write(path: Path) -> None:
    """Writes the page, unless it is newer than the commands."""
    changed = max(source.stat().st_mtime for source in SOURCES.rglob("*.py"))
    if path.exists() and path.stat().st_mtime > changed:
        return
    with ThreadPoolExecutor(2) as pool:
        helps = dict(zip(COMMANDS, pool.map(help_of, COMMANDS), strict=True))
    path.write_text(page(helps), encoding="utf-8")
