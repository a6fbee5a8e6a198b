"""The command `figures`: what a run left is drawn again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..compare.config import Compare
from ..compare.drawing import draw
from ..compare.outcome import Outcome
from ..compare.page import PAGE, sweep_page
from ..depth.command import title
from ..depth.config import Depth
from ..depth.figure import picture
from ..depth.profile import INSTRUMENTS
from ..figures import encode
from ..rundir import Record, RunDirectory, RunError
from ..terminal import outcome, print_paths
from ..training.again import read_config
from ..training.tasks import Task
from .config import Figures


def run(config: Figures) -> int:
    """Draws, and prints where the figures are."""
    drawn: dict[str, Path] = {}
    for path in map(Path.expanduser, config.runs):
        for run in runs_in(path):
            for name, file in of(run)(run).items():
                drawn[f"{run.name}/{name}"] = file
        if "sweep" in _read(path / "config.json") and (path / "summary.json").is_file():
            content = sweep_page(path).encode()
            drawn[f"{path.name}/page"] = RunDirectory(path, "", again=True).write_bytes(
                PAGE, content
            )
    outcome(figures=drawn)
    print_paths(drawn)
    return 0


def runs_in(path: Path) -> Iterator[Path]:
    """The run of a directory, or those of a sweep."""
    if "sweep" not in _read(path / "config.json"):
        yield path
        return
    points = sorted(each for each in path.iterdir() if (each / "config.json").is_file())
    if not points:
        raise RunError(f"{path}: no point of this sweep was begun, so there is nothing to draw.")
    yield from points


def of(path: Path) -> Callable[[Path], dict[str, Path]]:
    """What draws a run."""
    options = _read(path / "config.json")
    if "question" not in options and {"seeds", "evaluations"} <= {*options}:
        return comparison
    if "depth" in options and "schemes" in options:
        return depth
    raise RunError(
        f"{path}: it is no run of compare or depth, which have figures of their own. Of a question "
        "run the same command again: what was measured is kept."
    )


def comparison(path: Path) -> dict[str, Path]:
    """Draws those of `compare`, and writes its page."""
    config = read_config(Compare, path)
    told = _read(path / "environment.json").get("task")
    if told is None:
        raise RunError(f"{path}: its environment.json does not say what was asked of the nets.")
    found = draw(Outcome.read(config, path, Task.from_json(told)))
    if not found:
        raise RunError(f"{path}: nothing was measured, so there is nothing to draw.")
    return found


def depth(path: Path) -> dict[str, Path]:
    """Draws that of `depth`."""
    config = read_config(Depth, path)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    records: list[Record] = []
    for name, (scheme, norm) in config.nets.items():
        mine = [r for r in lines if (r["scheme"], r["norm"], r["kind"]) == (scheme, norm, "block")]
        for step in dict.fromkeys(r["step"] for r in mine):
            here = [r for r in mine if r["step"] == step]
            values = {key: [r[key] for r in here] for key in INSTRUMENTS}
            records.append({"net": name, "step": step, **values})
    if not records:
        raise RunError(f"{path}: nothing was measured, so there is nothing to draw.")
    directory = RunDirectory(path, "", again=True)
    return {
        file: directory.write_bytes(file, encode(picture(records, title(config)), kind))
        for kind in ("png", "svg")
        for file in [f"depth.{kind}"]
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}.") from None
