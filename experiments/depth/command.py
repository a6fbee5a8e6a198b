"""The command `depth`: what it prints, and the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from ..figures import encode
from ..rundir import Record
from ..terminal import EXIT_INTERRUPTED, errors, outcome, print_paths, saying, show
from .config import Depth
from .figure import picture
from .profile import INSTRUMENTS, Profile, lines

__all__ = ["Depth", "run"]


def run(config: Depth) -> int:
    """Measures the nets one after the other, then prints the table and the paths."""
    records: list[Record] = []
    exit_status = 0
    with saying("starting") as say:
        profile = Profile(config, say=say)
        try:
            records.extend(profile.run())
        except KeyboardInterrupt:
            exit_status = EXIT_INTERRUPTED
    if exit_status:
        errors.print("[yellow]interrupted:[/] what was done follows, and is kept.")
    if records:
        show(table(records), head=3)
        outcome(records=[line for record in records for line in lines(record, config)])
        files = {
            f"depth.{kind}": encode(picture(records, title(config)), kind)
            for kind in ("png", "svg")
        }
        paths = {name: profile.run_dir.write_bytes(name, file) for name, file in files.items()}
        print_paths({"metrics": profile.run_dir.path / "metrics.jsonl", **paths})
    return exit_status


def title(config: Depth) -> str:
    """What the nets have in common."""
    places = f" with norms of {', '.join(config.inside)}" if config.inside else ""
    trained = f", {config.optimizer} lr {config.lr:g}, {config.steps} steps" if config.steps else ""
    same = [each[0] for each in (config.schemes, config.norms) if len(each) == 1]
    return (
        f"{', '.join((config.dataset, config.model, *same))}{places}, {config.depth} blocks of "
        f"width {config.width}{trained}, seed {config.seed}"
    )


def table(records: Sequence[Record]) -> Table:
    """A column for each net: every instrument at the first and at the last block."""
    nets = list(dict.fromkeys(record["net"] for record in records))
    result = Table("", "step", "block")
    for net in nets:
        result.add_column(net, justify="right")
    for key, name in {"loss": "loss (nats)", **{k: i.name for k, i in INSTRUMENTS.items()}}.items():
        for step in sorted({record["step"] for record in records}):
            found = {r["net"]: np.atleast_1d(r[key]) for r in records if r["step"] == step}
            last = len(next(iter(found.values()))) - 1
            for block in dict.fromkeys((0, last)):
                cells = [_cell(found[net][block]) if net in found else "" for net in nets]
                result.add_row(name, str(step), str(block) if key in INSTRUMENTS else "", *cells)
                name = ""
        result.add_section()
    return result


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
