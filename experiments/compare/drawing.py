"""What a comparison leaves in its run directory: a summary, figures and a page."""

from __future__ import annotations

from pathlib import Path

from ..figures import encode
from ..terminal import counted
from . import figures
from .outcome import Outcome
from .page import PAGE, page


def finish(outcome: Outcome) -> dict[str, Path]:
    """Writes the summary and the figures of what was done; returns their paths."""
    complete = not any(track.goes_on for track in outcome.tracks)
    done = {"complete": complete, "norms": outcome.summary()}
    return {"summary": outcome.run_dir.write_json("summary.json", done), **draw(outcome)}


def draw(outcome: Outcome) -> dict[str, Path]:
    """Writes the figures and the page that has them; returns their paths."""
    config = outcome.config
    title = (
        f"{config.dataset}, {config.model}, batch {config.batch_size} over "
        f"{counted(config.devices, 'device')}, sync {config.sync}, "
        f"{config.optimizer}, {counted(config.seeds, 'seed')}"
    )
    own = config.tried or config.tune or config.lr_of
    rate = "each at its own rate" if own else f"lr {config.lr:g}"
    rate = "each at its best rate" if config.tried else rate
    paths: dict[str, Path] = {}
    at_best = outcome.at_best_rates()
    if not at_best:
        return paths
    records = figures.named(r for lane, lr in at_best for r in lane.records.where(lr=lr))
    parts = figures.named(r for lane, lr in at_best for r in lane.parts if r["lr"] == lr)
    title_at = f"{title}, {rate}"
    drawn = {"curves": figures.curves(records, title_at, outcome.task, config.batch_size)}
    if parts:  # a model without norms has none
        drawn["parts"] = figures.parts(parts, title_at)
        drawn["last_layer"] = figures.last_layer(parts, title_at)
    if config.tried:
        last = figures.named(r for lane, _ in at_best for r in lane.records.last())
        drawn["rates"] = figures.rates(last, title, outcome.task)
    for name, figure in drawn.items():
        for kind in ("png", "svg"):
            file = f"{name}.{kind}"
            paths[file] = outcome.run_dir.write_bytes(file, encode(figure, kind))
    return {**paths, "page": outcome.run_dir.write_bytes(PAGE, page(outcome, [*drawn]).encode())}
