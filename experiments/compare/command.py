"""The command `compare`: one network under several norms."""

from __future__ import annotations

import dataclasses
import json

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
from ..training.tasks import Score
from ..training.trainer import set_devices
from .comparison import Comparison
from .config import Compare
from .page import PAGE, sweep_page
from .sweep import Sweep
from .tables import Tabled, remarks, tabled, tabled_sweep

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
    show(table(tabled(comparison)))
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
    told: list[Record] = []
    scores: list[Score] = []
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
        scores.append(comparison.task.score)
        exit_status = exit_status or status
        if status in (EXIT_INTERRUPTED, EXIT_TERMINATED):
            break
    complete = len(told) == len(sweep.points) and all(point["complete"] for point in told)
    done = {"complete": complete, "points": told}
    paths = {"summary": directory.write_json("summary.json", done)}
    if told:
        seeds = [point.config.seeds for point in sweep.points]
        shown = tabled_sweep(told, scores, len(sweep.points), seeds)
        show(table(shown), head=shown.names)
    if any(point["norms"] for point in told):
        paths["page"] = directory.write_bytes(PAGE, sweep_page(directory.path).encode())
    outcome(**done)
    print_paths({"run": directory.path, **paths})
    return exit_status


def table(shown: Tabled) -> Table:
    """A table for the terminal."""
    result = Table(title=escape(shown.title), caption=escape(shown.caption))
    for place, heading in enumerate(shown.headings):
        number = place >= shown.names
        justify = "right" if number else "left"
        result.add_column(escape(heading), justify=justify, no_wrap=number)
    for row in shown.rows:
        result.add_row(*map(escape, row))
    return result
