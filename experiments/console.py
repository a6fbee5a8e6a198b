"""The command line: `python -m experiments COMMAND`."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import normlab as nl

from . import invariances, models, numerics, questions
from .asking import command as asking
from .asking import verify as verifying
from .bench import (
    conv as bench_conv,
)
from .bench import (
    figure1 as bench_figure1,
)
from .bench import (
    step as bench_step,
)
from .bench import (
    sync as bench_sync,
)
from .bench import (
    tables as bench_report,
)
from .bench.conv import BenchConv
from .bench.figure1 import BenchFigure1
from .bench.ops import BenchOps, Ops
from .bench.step import BenchStep
from .bench.sync import BenchSync
from .compare.comparison import Compare, Comparison
from .data import NAMES, DataError, load
from .invariances import Invariances
from .numerics import Numerics
from .programs import ledger
from .programs.ledger import Ledger
from .rundir import RunError, shown
from .training.launch import Launch, launch
from .training.processes import EXIT_FAILED, leave, together
from .training.train import Train, explain, train

console = Console()
errors = Console(stderr=True)

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


@dataclasses.dataclass(frozen=True)
class List:
    """Describe the norms, models, data sets and questions that there are."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Fetch, verify and prepare data sets, and say where each came from."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("mnist",)
    """mnist, fashion_mnist, cifar10, digits."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed beside other libraries."""

    bench: (
        Annotated[BenchStep, tyro.conf.subcommand("step")]
        | Annotated[BenchOps, tyro.conf.subcommand("ops")]
        | Annotated[BenchFigure1, tyro.conf.subcommand("figure1")]
        | Annotated[BenchConv, tyro.conf.subcommand("conv")]
        | Annotated[BenchSync, tyro.conf.subcommand("sync")]
    )


Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Numerics, tyro.conf.subcommand("numerics")]
    | Annotated[Invariances, tyro.conf.subcommand("invariances")]
    | Annotated[asking.Run, tyro.conf.subcommand("run")]
    | Annotated[asking.Report, tyro.conf.subcommand("report")]
    | Annotated[verifying.Verify, tyro.conf.subcommand("verify")]
    | Annotated[Ledger, tyro.conf.subcommand("ledger")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Launch, tyro.conf.subcommand("launch")]
    | Annotated[List, tyro.conf.subcommand("list")]
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    own, rest = given, []
    if given[:1] == ["run"] and "--" in given:
        own, rest = given[: given.index("--")], given[given.index("--") + 1 :]
    try:
        command = tyro.cli(
            Command,
            prog="python -m experiments",
            description="Compare normalizations on real data. Each command has its own --help.",
            args=own,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        if rest:
            command = dataclasses.replace(command, config=tuple(rest))
        return HANDLERS[type(command)](command)
    except (RunError, DataError) as error:
        return report(error)
    except KeyboardInterrupt:
        errors.print("[yellow]interrupted[/] before there was anything to keep.")
        return EXIT_INTERRUPTED


def report(error: Exception) -> int:
    """Prints an error the user can act on; returns the exit status for it."""
    errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return EXIT_USAGE


def compare(config: Compare) -> int:
    """Runs a comparison with progress bars, then prints the table and the paths."""
    with errors.status("starting") as status:
        comparison = Comparison(config, say=lambda text: status.update(f"{text} …"))
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
        with Progress(*columns, console=errors) as progress:
            whole = progress.add_task(
                "all norms", total=config.steps * len(comparison.lanes), result=" " * 28
            )
            bars = {
                lane.name: progress.add_task(lane.name, total=config.steps, result="")
                for lane in comparison.lanes
            }
            for turn in comparison.run():
                result = f"loss {turn.loss:7.4f}  accuracy {turn.accuracy:6.2%}"
                progress.update(bars[turn.norm], completed=turn.step, result=result)
                done = sum(progress.tasks[bar].completed for bar in bars.values())
                progress.update(whole, completed=done)
    except KeyboardInterrupt:
        exit_status = EXIT_INTERRUPTED
        errors.print("[yellow]interrupted:[/] what was done follows, and is kept.")
    except RunError as error:  # a disk that is full, say: the result is still worth a table
        exit_status = report(error)
    console.print(table(comparison))
    for remark in remarks(comparison):
        console.print(remark, highlight=False)
    for name, path in comparison.finish().items():
        console.print(f"{name:>12}  {path}", highlight=False, soft_wrap=True)
    return exit_status


def table(comparison: Comparison) -> Table:
    """The result, a row per norm."""
    config = comparison.config
    result = Table(title=f"{config.dataset}, {config.model}, {config.sync} statistics")
    result.add_column("norm", overflow="fold")
    for heading in (
        "test accuracy %",
        f"steps to {100 * config.target:g}%",
        "ms per step",
        "time in the norm",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.summary():
        result.add_row(
            row["norm"],
            _spread(row["accuracy_mean"], row["accuracy_sd"]),
            "–" if row["steps_to_target"] is None else f"{row['steps_to_target']:g}",
            "–" if row["step_ms"] is None else f"{row['step_ms']:.2f}",
            "–" if row["norm_share"] is None else f"{row['norm_share']:.0%}",
        )
    result.caption = (
        f"mean ± standard deviation over {config.seeds} seeds, or those that did not diverge; "
        f"median steps and times. Measured every {config.steps / config.evaluations:g} steps. A "
        "step trains all seeds. Time in the norm: 1 − (step without a norm / step with it)."
    )
    return result


def remarks(comparison: Comparison) -> list[str]:
    """What the table does not show: seeds that diverged, norms that were stopped early."""
    said = []
    for row in comparison.summary():
        for seed, step in row["diverged"].items():
            said.append(f"{row['norm']}: the loss of seed {seed} was not finite at step {step}")
        if row["step"] < comparison.config.steps:
            said.append(f"{row['norm']}: stopped after {row['step']} steps")
    return said


def data(command: Data) -> int:
    """Prepares data sets and prints what they hold."""
    result = Table("set", "training", "test", "image", "classes", "origin", "sha256")
    for name in command.names:
        with errors.status(f"{name} …") as status:
            loaded = load(name, command.data_dir, on_progress=lambda text: status.update(text))
        result.add_row(
            name,
            str(len(loaded.train_images)),
            str(len(loaded.test_images)),
            "×".join(map(str, loaded.train_images.shape[1:])),
            str(loaded.classes),
            loaded.origin,
            loaded.checksum[:16] + "…",
        )
    console.print(result)
    return 0


def benchmark_step(command: BenchStep) -> int:
    """Times a step beside PyTorch and prints the ratio."""
    with errors.status("taking turns …"):
        result = bench_step.run(command)
    rows = Table("step of the 3×100 MLP with batch norm", "median ms", "range ms")
    for name, ms in result["ms_per_step"].items():
        low, high = result["range_ms"][name]
        rows.add_row(name, f"{ms:.3f}", f"{low:.3f} – {high:.3f}")
    rows.caption = (
        f"normlab / torch = {result['normlab_over_torch']:.2f}, floor / torch = "
        f"{result['floor_over_torch']:.2f}. Floor: the matrix products and the update alone. "
        f"{result['cores']} cores; "
        + ", ".join(f"{name}={value}" for name, value in result["variables"].items())
    )
    console.print(rows)
    return 0


def benchmark_figure1(config: BenchFigure1) -> int:
    """Times the runs of figure 1 beside PyTorch and prints what all its steps would take."""
    with errors.status("starting") as status:
        result = bench_figure1.run(config, lambda text: status.update(f"{text} …"))
    rows = Table(title=f"figure 1: {len(bench_figure1.NETS)} nets, {config.seeds} seeds")
    rows.add_column("")
    for heading in ("ms per step", "range", "start s", f"{config.whole:,} steps s", "÷ normlab"):
        rows.add_column(heading, justify="right")
    for name, ms in result["ms_per_step"].items():
        low, high = result["range_ms"][name]
        rows.add_row(
            name,
            f"{ms:.2f}",
            f"{low:.2f} – {high:.2f}",
            f"{result['start_s'][name]:.1f}",
            f"{result['whole_s'][name]:.0f}",
            f"{result['ratios'][name]:.2f}",
        )
    rows.caption = (
        f"A step of all nets and seeds, median of {config.rounds} turns of {config.steps} steps; "
        f"the seconds are extrapolated from it. Losses agree to {result['loss_gap']:.0e}. "
        f"{result['cores']} cores; "
        + ", ".join(f"{name}={value}" for name, value in result["variables"].items())
    )
    console.print(rows)
    return 0


def benchmark_conv(config: BenchConv) -> int:
    """Times forms of a convolution beside PyTorch and prints the table."""
    with errors.status("starting") as status:
        results = bench_conv.run(config, lambda text: status.update(f"{text} …"))
    forms = list(results[0]["ms_per_step"])
    rows = Table("3×3 convolution", *forms, "MatmulConv / torch", title="ms per step [range]")
    for result in results:
        ms = result["ms_per_step"]
        cells = [
            f"{ms[form]:.2f} [{low:.2f}, {high:.2f}]"
            for form, (low, high) in result["range_ms"].items()
        ]
        rows.add_row(result["label"], *cells, f"{ms['MatmulConv'] / ms['torch']:.2f}")
    rows.caption = (
        f"forward and backward in a scan, batch {config.batch_size}, {config.seeds} seeds side by "
        f"side, {config.cores} cores, memory "
        + ("reused" if config.reuse_memory else "as the system has it")
    )
    console.print(rows)
    return 0


def benchmark_ops(config: BenchOps) -> int:
    """Times ops beside other libraries, then prints the tables and the paths."""
    with errors.status("starting") as status:
        ops = Ops(config, say=lambda text: status.update(f"{text} …"))
    exit_status = 0
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=errors) as progress:
            bar = progress.add_task("", total=len(config.cases()) * (config.rounds + 1))
            for doing in ops.run():
                progress.update(bar, description=doing, advance=1)
    except KeyboardInterrupt:
        exit_status = EXIT_INTERRUPTED
        errors.print("[yellow]interrupted:[/] the cases that were done follow, and are kept.")
    except RunError as error:
        exit_status = report(error)
    if ops.results:
        console.print(bench_report.times(ops.results, ops.machine()))
        console.print(bench_report.comparison(ops.results))
    for remark in bench_report.remarks(ops):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    for name, path in ops.finish().items():
        console.print(f"{name:>12}  {path}", highlight=False, soft_wrap=True)
    return exit_status


def train_here(config: Train) -> int:
    """Trains in this process, alone or with others, and prints what came out."""
    try:
        with errors.status("starting") as status:
            result = train(config, say=lambda text: status.update(f"{text} …"))
    except KeyboardInterrupt:
        errors.print("[yellow]interrupted:[/] the same command goes on from the last checkpoint.")
        return leave(EXIT_INTERRUPTED) if together() else EXIT_INTERRUPTED
    except Exception as error:
        usage = isinstance(error, RunError | DataError)
        if not together():
            raise
        return leave(EXIT_USAGE if usage else EXIT_FAILED, explain(error))
    if result.process == 0:
        conclude(result.path, result.step, result.summary)
    if result.summary is None:
        return EXIT_INTERRUPTED if result.signal == signal.SIGINT else EXIT_TERMINATED
    return 0


def launch_run(config: Launch) -> int:
    """Trains in processes that Ray holds together, and prints what came out."""
    options = (tyro.conf.OmitArgPrefixes,)
    config_of_run = tyro.cli(
        Train, prog="python -m experiments launch -- train", args=config.command[1:], config=options
    )

    def tell(text: str) -> None:
        errors.print(f"[yellow]restarted:[/] {escape(text)}", highlight=False, soft_wrap=True)

    with errors.status("starting") as status:
        outcome = launch(config, config_of_run, lambda text: status.update(f"{text} …"), tell)
    if outcome.failure:
        failed = f"failed {outcome.restarts + 1} times, " if outcome.restarts else "failed: "
        report(RunError(f"the run {failed}{outcome.failure}"))
    conclude(outcome.path, outcome.step, outcome.summary)
    if outcome.failure:
        return EXIT_USAGE if outcome.usage else EXIT_FAILED
    if outcome.summary is None:
        return EXIT_INTERRUPTED if outcome.signal == signal.SIGINT else EXIT_TERMINATED
    return 0


def conclude(path: Path, step: int, summary: dict[str, Any] | None) -> None:
    """Prints the result of a run, or how to go on with it."""
    if summary is None:
        errors.print(
            f"[yellow]stopped[/] with a checkpoint of step {step}: the same command with "
            f"--run-dir {escape(str(path))} goes on from it.",
            highlight=False,
            soft_wrap=True,
        )
        return
    loss = shown(summary["test_loss"])
    console.print(
        f"step {step}: test loss {loss}, accuracy {summary['accuracy']:.2%}, on "
        f"{summary['devices']} devices in {summary['processes']} processes",
        highlight=False,
    )
    console.print(f"{'summary':>12}  {path / 'summary.json'}", highlight=False, soft_wrap=True)


def benchmark_sync(command: BenchSync) -> int:
    """Times synced batch norm beside flax's and prints the table."""
    print_rows(bench_sync.HEADINGS, bench_sync.rows(command), command.markdown)
    console.print(bench_sync.remarks(command), highlight=False, markup=False)
    return 0


def account(config: Ledger) -> int:
    """Prints the collectives of a step, and what the table leaves out."""
    with errors.status("compiling") as status:
        found = ledger.compile_all(config, say=lambda text: status.update(f"{text} …"))
    headings, *rows = ledger.table(found)
    print_rows(headings, rows, config.markdown)
    for remark in ledger.remarks(found):
        console.print(remark, highlight=False, markup=False)
    return 0


def print_numerics(config: Numerics) -> int:
    """Measures numerical errors beside other libraries and prints the table."""
    return print_rows(numerics.HEADINGS, numerics.rows(config), config.markdown)


def print_invariances(config: Invariances) -> int:
    """Measures what each norm is invariant to and prints the table."""
    return print_rows(invariances.HEADINGS, invariances.rows(config), config.markdown)


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


def describe(command: List) -> int:
    """Prints the norms with what they measure, the models, the data sets and the questions."""
    del command
    norms = Table("norm", "μ and σ look at", "shift μ", "scale σ", title="norms")
    for name in nl.names():
        row = nl.row(name)
        norms.add_row(name, row.looks_at, row.mu, row.sigma)
    console.print(norms)
    others: dict[str, Any] = {"models": models.MODELS, "data sets": NAMES}
    for what, names in others.items():
        console.print(f"{what}: {', '.join(names)}", highlight=False)
    asked = Table("question", "asks", title="questions, for `run`")
    for name in questions.NAMES:
        asked.add_row(name, questions.describe(name)["question"])
    console.print(asked)
    return 0


HANDLERS: dict[type, Callable[[Any], int]] = {
    Compare: compare,
    Data: data,
    Bench: lambda command: HANDLERS[type(command.bench)](command.bench),
    BenchStep: benchmark_step,
    BenchOps: benchmark_ops,
    BenchFigure1: benchmark_figure1,
    BenchConv: benchmark_conv,
    BenchSync: benchmark_sync,
    Numerics: print_numerics,
    Invariances: print_invariances,
    asking.Run: asking.run,
    asking.Report: asking.report,
    verifying.Verify: verifying.verify,
    Ledger: account,
    Train: train_here,
    Launch: launch_run,
    List: describe,
}
"""What runs each command."""


def _spread(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "–"
    return f"{100 * mean:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")


if __name__ == "__main__":
    sys.exit(main())
