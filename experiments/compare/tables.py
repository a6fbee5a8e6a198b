"""The tables of comparisons, as the terminal and the page show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..rundir import Record
from ..terminal import counted
from ..training.tasks import Score
from . import figures
from .outcome import Outcome
from .rates import Stable


class Tabled(NamedTuple):
    """A table in words.

    Attributes:
      title: What it is of.
      headings: One for each column.
      rows: The cells.
      seeds: Of each row, how many seeds its mean is over, and how many there are.
      caption: What the numbers are.
      names: How many columns are no numbers, from the left.
      scored: Up to which column the scores reach.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    seeds: tuple[tuple[int, int], ...]
    caption: str
    names: int = 1
    scored: int = 2


def tabled(outcome: Outcome) -> Tabled:
    """The result of a comparison, a row per norm."""
    config, score = outcome.config, outcome.task.score
    own = config.tune or config.lr_of
    headings = (
        "norm",
        heading(score),
        f"steps to {score.factor * outcome.target:g}{score.unit}",
        *(("rate",) if own else ()),
        *(
            ("best rate", "largest stable rate")
            if config.tried
            else ("ms per step", "time in the norm")
        ),
    )
    found, rows = figures.named(outcome.summary()), []
    for row in found:
        if config.tried:
            more = f"{row['lr']:g}", str(Stable(**row["largest_stable_rate"]))
        else:
            more = (
                "–" if row["step_seconds"] is None else f"{1e3 * row['step_seconds']:.2f}",
                "–" if (share := row["norm_share"]) is None or share < 0 else f"{share:.0%}",
            )
        reached = row["steps_to_target"]
        rows.append(
            (
                row["net"],
                spread(score, row),
                "–" if reached is None else f"{reached:g}",
                *((f"{row['lr']:g}",) if own else ()),
                *more,
            )
        )
    every = config.steps / config.evaluations
    caption = (
        f"Mean ± standard deviation over {counted(config.seeds, 'seed')}, or those "
        "that did not diverge; medians. "
        f"Measured every {every:g} step{'s' * (every != 1)}. "
    ) + (
        "From the best rate up to the largest stable one no run diverged; at the one in brackets "
        "one did."
        if config.tried
        else "A step trains all seeds. Time in the norm: 1 − (step without a norm / step with it)."
    )
    if not config.tried and any((row["norm_share"] or 0) < 0 for row in found):
        caption += " Where it is less than the noise of the times, – stands."
    title = f"{config.dataset}, {config.model}, sync {config.sync}"
    return Tabled(title, headings, tuple(rows), tuple(_seeds(score, r) for r in found), caption)


def tabled_sweep(
    points: Sequence[Record], scores: Sequence[Score], count: int, seeds: Sequence[int]
) -> Tabled:
    """A row for each norm at each point.

    Args:
      points: Those of summary.json that were begun.
      scores: By what the norms are compared at each of them; a data set may be swept.
      count: How many points there are.
      seeds: At each of them, how many there are.
    """
    each = tuple(dict.fromkeys(scores))
    rows, alive = [], []
    for point, score in zip(points, scores, strict=True):
        for row in figures.named(point["norms"]):
            cells = [spread(s, row) if s == score else "" for s in each]
            rows.append((*point["values"].values(), row["net"], f"{row['lr']:g}", *cells))
            alive.append(_seeds(score, row))
    many = counted(min(seeds), "seed") if len({*seeds}) == 1 else "the seeds"
    fields = tuple(points[0]["values"])
    headings = (*fields, "norm", "rate", *map(heading, each))
    return Tabled(
        title=counted(count, "point"),
        headings=headings,
        rows=tuple(rows),
        seeds=tuple(alive),
        caption=f"Mean ± standard deviation over {many}, or those that did not diverge.",
        names=len(fields) + 1,
        scored=len(headings),
    )


def remarks(outcome: Outcome) -> list[str]:
    """What the table does not show: seeds that diverged, norms that were stopped early."""
    said = []
    for row in figures.named(outcome.summary()):
        edge = row.get("tuning", {}).get("edge")
        if edge:
            tried = ", ".join(f"{lr:g}" for lr in sorted(row["tuning"]["rates"]))
            said.append(
                f"{row['net']}: the rate {row['lr']:g} is the {edge} that was tried ({tried})"
            )
        for seed, step in row["diverged"].items():
            said.append(f"{row['net']}: the loss of seed {seed} was not finite at step {step}")
        if row["step"] < outcome.config.steps:
            said.append(f"{row['net']}: stopped after {row['step']} steps")
            continue
        for seed in row["above_chance"]:
            if str(seed) not in row["diverged"]:
                chance = outcome.task.score.chance
                said.append(f"{row['net']}: the loss of seed {seed} ended above that of {chance}")
    return said


def heading(score: Score) -> str:
    """Of the column of a score, with its unit."""
    return f"{score.name} {score.unit}".strip()


def spread(score: Score, row: Mapping[str, Any]) -> str:
    """Mean and standard deviation of a score in a row of summary.json; a dash without a mean."""
    mean, sd = (row[f"{score.key}_{of}"] for of in ("mean", "sd"))
    if mean is None:
        return "–"
    digits = 2 if score.factor > 1 else 3 if mean < 100 else 0
    shown = f"{score.factor * mean:.{digits}f}"
    return shown + ("" if sd is None else f" ± {score.factor * sd:.{digits}f}")


def _seeds(score: Score, row: Mapping[str, Any]) -> tuple[int, int]:
    values = row[f"{score.key}_by_seed"]
    return sum(value is not None for value in values), len(values)
