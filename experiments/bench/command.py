"""The command `bench`: speed beside other libraries."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..rundir import RunError
from ..terminal import EXIT_INTERRUPTED, console, errors, print_paths, print_rows, report
from . import conv, figure1, step, sync, tables
from .conv import BenchConv
from .figure1 import BenchFigure1
from .ops import BenchOps, Ops
from .step import BenchStep
from .sync import BenchSync


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


def benchmark_step(command: BenchStep) -> int:
    """Times a step beside PyTorch and prints the ratio."""
    with errors.status("taking turns …"):
        result = step.run(command)
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
        result = figure1.run(config, lambda text: status.update(f"{text} …"))
    rows = Table(title=f"figure 1: {len(figure1.NETS)} nets, {config.seeds} seeds")
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
        results = conv.run(config, lambda text: status.update(f"{text} …"))
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
        console.print(tables.times(ops.results, ops.machine()))
        console.print(tables.comparison(ops.results))
    for remark in tables.remarks(ops):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    print_paths(ops.finish())
    return exit_status


def benchmark_sync(command: BenchSync) -> int:
    """Times synced batch norm beside flax's and prints the table."""
    print_rows(sync.HEADINGS, sync.rows(command), command.markdown)
    console.print(sync.remarks(command), highlight=False, markup=False)
    return 0


HANDLERS = {
    BenchStep: benchmark_step,
    BenchOps: benchmark_ops,
    BenchFigure1: benchmark_figure1,
    BenchConv: benchmark_conv,
    BenchSync: benchmark_sync,
}


def run(config: Bench) -> int:
    """Runs the benchmark that was chosen."""
    return HANDLERS[type(config.bench)](config.bench)
