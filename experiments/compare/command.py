"""The command `compare`: one network under several norms."""

from __future__ import annotations

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

from ..rundir import RunError
from ..terminal import (
    EXIT_INTERRUPTED,
    EXIT_MISSING,
    errors,
    log,
    outcome,
    print_paths,
    progress_bars,
    remark,
    report,
    saying,
    show,
)
from . import figures
from .comparison import Compare, Comparison
from .rates import Stable

__all__ = ["Compare", "run"]


def run(config: Compare) -> int:
    """Runs a comparison with progress bars, then prints the table and the paths."""
    with saying("starting") as say:
        comparison = Comparison(config, say=say)
    exit_status = 0
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
            whole = progress.add_task(
                "all norms", total=config.steps * len(comparison.lanes), result=" " * 34
            )
            bars = {
                lane.name: progress.add_task(lane.name, total=config.steps, result="")
                for lane in comparison.lanes
            }
            comparison.say = lambda text: progress.update(whole, description=text) or log(text)
            comparison.warn = lambda text: errors.print(f"[yellow]{escape(text)}[/]")
            for turn in comparison.run():
                score = comparison.task.score
                shown = "–" if turn.score is None else f"{score.factor * turn.score:.2f}"
                said = f"loss {turn.loss:7.4f}  {score.name} {shown}{score.unit}"
                progress.update(bars[turn.norm], completed=turn.step, result=said)
                log(f"{turn.norm}: step {turn.step}/{config.steps}  {said}")
                done = sum(progress.tasks[bar].completed for bar in bars.values())
                progress.update(whole, completed=done)
    except KeyboardInterrupt:
        exit_status = EXIT_INTERRUPTED
        errors.print("[yellow]interrupted:[/] what was done follows, and is kept.")
    except RunError as error:  # a disk that is full, say: the result is still worth a table
        exit_status = report(error)
    show(table(comparison))
    for said in remarks(comparison):
        remark(said)
    paths = comparison.finish()
    outcome(**json.loads(paths["summary"].read_text()))
    print_paths(paths)
    failed = [lane for lane in comparison.lanes if lane.failed]
    for lane in failed:
        text = f"[bold red]{lane.name} was not trained to its end:[/] {escape(lane.failed)}"
        errors.print(text, highlight=False, soft_wrap=True)
    return exit_status or (EXIT_MISSING if failed else 0)


def table(comparison: Comparison) -> Table:
    """The result, a row per norm."""
    config, score = comparison.config, comparison.task.score
    result = Table(title=f"{config.dataset}, {config.model}, {config.sync} statistics")
    result.add_column("norm")
    rates = ("best rate", "largest stable rate")
    for heading in (
        f"{score.name} {score.unit}".strip(),
        f"steps to {score.factor * comparison.target:g}{score.unit}",
        *(rates if config.rates else ("ms per step", "time in the norm")),
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in figures.named(comparison.summary()):
        mean, sd = (row[f"{score.key}_{of}"] for of in ("mean", "sd"))
        if config.rates:
            more = f"{row['lr']:g}", str(Stable(**row["largest_stable_rate"]))
        else:
            more = (
                "–" if row["step_seconds"] is None else f"{1e3 * row['step_seconds']:.2f}",
                "–" if row["norm_share"] is None else f"{row['norm_share']:.0%}",
            )
        reached = row["steps_to_target"]
        result.add_row(
            row["net"],
            _spread(score.factor, mean, sd),
            "–" if reached is None else f"{reached:g}",
            *more,
        )
    result.caption = (
        f"mean ± standard deviation over {config.seeds} seed{'s' * (config.seeds > 1)}, or those "
        "that did not diverge; medians. "
        f"Measured every {config.steps / config.evaluations:g} steps. "
    ) + (
        "From the best rate up to the largest stable one no run diverged; at the one in brackets "
        "one did."
        if config.rates
        else "A step trains all seeds. Time in the norm: 1 − (step without a norm / step with it)."
    )
    return result


def remarks(comparison: Comparison) -> list[str]:
    """What the table does not show: seeds that diverged, norms that were stopped early."""
    said = []
    for row in figures.named(comparison.summary()):
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
