"""The command `compare`: one network under several norms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..rundir import Record, RunDirectory, RunError
from ..terminal import (
    EXIT_INTERRUPTED,
    EXIT_MISSING,
    EXIT_TERMINATED,
    counted,
    errors,
    log,
    outcome,
    print_paths,
    progress_bars,
    remark,
    report,
    saying,
    show,
    stopped,
    terminable,
)
from ..training.again import check_directory
from ..training.trainer import set_devices
from . import figures
from .comparison import Comparison, Outcome
from .config import Compare
from .rates import Stable
from .sweep import Sweep

__all__ = ["Compare", "run"]


def run(config: Compare | Sweep) -> int:
    """Runs a comparison with progress bars, or a grid of them; prints the table and the paths."""
    with terminable():
        return run_sweep(config) if isinstance(config, Sweep) else run_one(config)


def run_one(config: Compare) -> int:
    """Runs one comparison, then prints the table and the paths."""
    with saying("starting") as say:
        comparison = Comparison(config, say=say)
    exit_status = follow(comparison)
    show(table(comparison))
    for said in remarks(comparison):
        remark(said)
    paths = comparison.finish()
    outcome(**json.loads(paths["summary"].read_text()))
    print_paths(paths)
    return exit_status


def follow(comparison: Comparison) -> int:
    """Trains with progress bars; returns the exit status."""
    config, exit_status = comparison.config, 0
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[result]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with progress_bars(*columns) as progress:
            total = config.steps * len(comparison.lanes)
            whole = progress.add_task("all norms", total=total, result=" " * 34)
            bars = {}
            for lane in comparison.lanes:
                before = max(lane.step, 0) if lane.goes_on else config.steps
                bars[lane.name] = progress.add_task(
                    lane.name, total=config.steps, completed=before, result=""
                )
                if before:
                    where = "done before" if not lane.goes_on else f"goes on from step {before}"
                    log(f"{lane.name}: {where}")
            comparison.say = lambda text: progress.update(whole, description=text) or log(text)
            comparison.warn = lambda text: errors.print(f"[yellow]{escape(text)}[/]")
            for turn in comparison.run():
                score = comparison.task.score
                shown = "–" if turn.score is None else f"{score.factor * turn.score:.2f}"
                over = counted(turn.steps, "step")
                said = f"train loss {turn.loss:7.4f} ({over})  {score.name} {shown}{score.unit}"
                progress.update(bars[turn.norm], completed=turn.step, result=said)
                log(f"{turn.norm}: step {turn.step}/{config.steps}  {said}")
                done = sum(progress.tasks[bar].completed for bar in bars.values())
                progress.update(whole, completed=done)
    except KeyboardInterrupt as error:
        exit_status = stopped(error)
        where = escape(str(comparison.run_dir.path))
        errors.print(
            f"[yellow]{escape(str(error)) or 'interrupted'}:[/] what was done follows, and is "
            f"kept; the same command with --run-dir {where} goes on.",
            highlight=False,
            soft_wrap=True,
        )
    except RunError as error:  # a disk that is full, say: the result is still worth a table
        exit_status = report(error)
    failed = [lane for lane in comparison.lanes if lane.failed]
    for lane in failed:
        text = f"[bold red]{lane.name} was not trained to its end:[/] {escape(lane.failed)}"
        errors.print(text, highlight=False, soft_wrap=True)
    return exit_status or (EXIT_MISSING if failed else 0)


def run_sweep(sweep: Sweep) -> int:
    """Runs a comparison at every point, each in its directory; one table at the end."""
    first, exit_status = sweep.points[0].config, 0
    if first.ray is None:  # there is no changing it later
        set_devices(max(point.config.devices for point in sweep.points))
    check_directory(sweep)
    name = f"compare-sweep-{first.dataset}-{first.model}"
    directory = RunDirectory(sweep.run_dir, name, again=sweep.run_dir is not None)
    directory.write_json("config.json", sweep.as_json())
    rows: list[Record] = []
    told: list[Record] = []
    score = None
    for i, point in enumerate(sweep.points, 1):
        log(f"{point.name} ({i} of {len(sweep.points)})")
        config = dataclasses.replace(point.config, run_dir=directory.path / point.name)
        try:
            with saying(point.name) as say:
                comparison = Comparison(config, say=say)
            status = follow(comparison)
            comparison.finish()
        except KeyboardInterrupt as error:
            exit_status = stopped(error)
            break
        found = comparison.summary()
        complete = not any(lane.goes_on for lane in comparison.lanes)
        told.append({"values": point.values, "run": point.name, "complete": complete})
        told[-1]["norms"] = found
        score = comparison.task.score
        rows += [{"point": point, "score": score, **row} for row in figures.named(found)]
        exit_status = exit_status or status
        if status in (EXIT_INTERRUPTED, EXIT_TERMINATED):
            break
    complete = len(told) == len(sweep.points) and all(point["complete"] for point in told)
    done = {"complete": complete, "points": told}
    paths = {"summary": directory.write_json("summary.json", done)}
    if rows:
        show(sweep_table(sweep, rows), head=1 + len(sweep.points[0].values))
    outcome(**done)
    print_paths({"run": directory.path, **paths})
    return exit_status


def sweep_table(sweep: Sweep, rows: Sequence[Record]) -> Table:
    """A row for each norm at each point."""
    scores = dict.fromkeys(row["score"] for row in rows)  # a data set may be swept
    result = Table(title=f"{len(sweep.points)} points")
    for field in sweep.points[0].values:
        result.add_column(field)
    result.add_column("norm")
    result.add_column("rate", justify="right", no_wrap=True)
    for score in scores:
        result.add_column(f"{score.name} {score.unit}".strip(), justify="right", no_wrap=True)
    for row in rows:
        cells = [
            _spread(s.factor, row[f"{s.key}_mean"], row[f"{s.key}_sd"]) if s == row["score"] else ""
            for s in scores
        ]
        values = map(escape, row["point"].values.values())
        result.add_row(*values, row["net"], f"{row['lr']:g}", *cells)
    seeds = {point.config.seeds for point in sweep.points}
    many = counted(min(seeds), "seed") if len(seeds) == 1 else "the seeds"
    result.caption = f"mean ± standard deviation over {many}, or those that did not diverge."
    return result


def table(comparison: Outcome) -> Table:
    """The result, a row per norm."""
    config, score = comparison.config, comparison.task.score
    result = Table(title=f"{config.dataset}, {config.model}, {config.sync} statistics")
    result.add_column("norm")
    rates = ("best rate", "largest stable rate")
    own = config.tune or config.lr_of
    for heading in (
        f"{score.name} {score.unit}".strip(),
        f"steps to {score.factor * comparison.target:g}{score.unit}",
        *(("rate",) if own else ()),
        *(rates if config.tried else ("ms per step", "time in the norm")),
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in figures.named(comparison.summary()):
        mean, sd = (row[f"{score.key}_{of}"] for of in ("mean", "sd"))
        if config.tried:
            more = f"{row['lr']:g}", str(Stable(**row["largest_stable_rate"]))
        else:
            more = (
                "–" if row["step_seconds"] is None else f"{1e3 * row['step_seconds']:.2f}",
                "–" if (share := row["norm_share"]) is None or share < 0 else f"{share:.0%}",
            )
        reached = row["steps_to_target"]
        result.add_row(
            row["net"],
            _spread(score.factor, mean, sd),
            "–" if reached is None else f"{reached:g}",
            *((f"{row['lr']:g}",) if own else ()),
            *more,
        )
    result.caption = (
        f"mean ± standard deviation over {counted(config.seeds, 'seed')}, or those "
        "that did not diverge; medians. "
        f"Measured every {config.steps / config.evaluations:g} steps. "
    ) + (
        "From the best rate up to the largest stable one no run diverged; at the one in brackets "
        "one did."
        if config.tried
        else "A step trains all seeds. Time in the norm: 1 − (step without a norm / step with it)."
    )
    if not config.tried and any((row["norm_share"] or 0) < 0 for row in comparison.summary()):
        result.caption += " Where it is less than the noise of the times, – stands."
    return result


def remarks(comparison: Outcome) -> list[str]:
    """What the table does not show: seeds that diverged, norms that were stopped early."""
    said = []
    for row in figures.named(comparison.summary()):
        edge = row.get("tuning", {}).get("edge")
        if edge:
            tried = ", ".join(f"{lr:g}" for lr in sorted(row["tuning"]["rates"]))
            said.append(
                f"{row['net']}: the rate {row['lr']:g} is the {edge} that was tried ({tried})"
            )
        for seed, step in row["diverged"].items():
            said.append(f"{row['net']}: the loss of seed {seed} was not finite at step {step}")
        if row["step"] < comparison.config.steps:
            said.append(f"{row['net']}: stopped after {row['step']} steps")
            continue
        for seed in row["above_chance"]:
            if str(seed) not in row["diverged"]:
                chance = comparison.task.score.chance
                said.append(f"{row['net']}: the loss of seed {seed} ended above that of {chance}")
    return said


def _spread(factor: float, mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "–"
    digits = 2 if factor > 1 else 3 if mean < 100 else 0
    return f"{factor * mean:.{digits}f}" + ("" if sd is None else f" ± {factor * sd:.{digits}f}")
