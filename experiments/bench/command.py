"""The commands `bench step|ops|figure1|conv|sync`: their options, and what they print."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

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

from ..rundir import RunError, nearest, require_positive
from ..terminal import EXIT_INTERRUPTED, console, errors, print_paths, print_rows, report
from .turns import available_cores
from .worker import BYTES, KINDS_OF, PEERS, SHAPES, Case

EXAMPLES = 60_000
"""Of the data that a step is timed on: as many as MNIST has."""


@dataclasses.dataclass(frozen=True)
class BenchStep:
    """Time one batch norm training step beside the same step in an eager PyTorch loop."""

    batch_size: int = 60
    """Examples per step; 60 is the paper's."""

    steps: int = 300
    """Steps per turn."""

    rounds: int = 7
    """Turns of each; the medians are reported."""

    lr: float = 0.1
    """Learning rate of plain SGD."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        require_positive(self, "steps", "rounds")
        if not 1 <= self.batch_size <= EXAMPLES:
            raise RunError(f"--batch-size: got {self.batch_size}; choose 1 to {EXAMPLES}.")


@dataclasses.dataclass(frozen=True)
class BenchFigure1(BenchStep):
    """Time the runs of the BN paper's figure 1 beside an eager PyTorch loop."""

    seeds: int = 3
    """Seeds of each net."""

    whole: int = 50_000
    """Steps of the figure, to which the times are extrapolated."""

    sd: float = 0.1
    """Standard deviation of the initial kernels, which are Gaussian."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed, in the processes of all contestants."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        super().__post_init__()
        require_positive(self, "seeds", "whole")


@dataclasses.dataclass(frozen=True)
class BenchConv:
    """Time forms of a convolution on a CPU beside an eager PyTorch loop."""

    seeds: int = 3
    """Kernels, and batches, side by side under vmap."""

    batch_size: int = 64
    """Images per step and seed."""

    steps: int = 2
    """Steps per turn."""

    rounds: int = 5
    """Turns of each; the medians are reported."""

    cores: int = 1
    """Cores that the process is pinned to; 1 is what a worker of the questions has."""

    xla: bool = True
    """Whether XLA's own convolution takes part: it takes most of the time."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        require_positive(self, "seeds", "batch_size", "steps", "rounds", "cores")
        if self.cores > len(available_cores()):
            raise RunError(
                f"--cores: got {self.cores}, and there are {len(available_cores())}: ask for fewer."
            )


@dataclasses.dataclass(frozen=True)
class BenchSync:
    """Time synced batch norm beside flax's, with the error of its variance at a mean of 1000."""

    devices: int = 8
    """Devices of this host."""

    rounds: int = 15
    """Turns of each; the medians count."""

    turn_ms: float = 50.0
    """How long a turn lasts: the op is repeated to fill it."""

    markdown: bool = False
    """Print the table as Markdown."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        require_positive(self, "devices", "rounds", "turn_ms")


@dataclasses.dataclass(frozen=True)
class BenchOps:
    """Time each norm, forward and forward+backward, beside the same op of other libraries.

    Ends with a table of times in units of the floor (the bytes that must move, timed as a copy), a
    table of ratios and a figure. Every turn is kept in the run directory. Libraries that are not
    installed are named and left out.
    """

    ops: tuple[str, ...] = tuple(KINDS_OF)
    """batch, layer, rms, group (8 groups), instance."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Kinds of input: conv [N, H, W, C], dense [N, C], tokens [N, T, C]. An op runs on those it is
    used for."""

    dtypes: tuple[str, ...] = tuple(BYTES)
    """Types of x: float32, bfloat16. Parameters are float32."""

    peers: tuple[str, ...] = tuple(PEERS)
    """flax.linen, flax.nnx, haiku, equinox, torch."""

    rounds: int = 11
    """Turns of each; the medians are reported."""

    turn_ms: float = 20.0
    """How long a turn lasts: the op is repeated to fill it."""

    scale: int = 1
    """Multiplies the batch axis; a GPU wants more than 1."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed, as a long-running program comes to do.
    Otherwise it may return large arrays to the system, and every call pays for fresh pages."""

    run_dir: Path | None = None
    """Where the results go; must not exist. By default runs/bench-ops-TIME."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        choices = {"ops": KINDS_OF, "shapes": SHAPES, "dtypes": BYTES, "peers": PEERS}
        for option, known in choices.items():
            for name in getattr(self, option):
                if name not in known:
                    raise RunError(f"--{option}: unknown {name!r}: {nearest(name, known)}.")
        require_positive(self, "rounds", "scale", "turn_ms")
        if not self.cases():
            kinds = "; ".join(f"{op}: {', '.join(KINDS_OF[op])}" for op in self.ops or KINDS_OF)
            raise RunError(f"--ops and --shapes leave nothing to time. Ops run on ({kinds}).")

    def cases(self) -> list[Case]:
        """What is timed, in order."""
        return [
            Case(op, kind, (shape[0] * self.scale, *shape[1:]), dtype)
            for op, kinds in KINDS_OF.items()
            for kind in kinds
            for shape in SHAPES[kind]
            for dtype in BYTES
            if op in self.ops and kind in self.shapes and dtype in self.dtypes
        ]


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


def run(config: Bench) -> int:
    """Measures, and prints what came out; returns the exit status."""
    printers: dict[type, Any] = {
        BenchStep: _step,
        BenchOps: _ops,
        BenchFigure1: _figure1,
        BenchConv: _conv,
        BenchSync: _sync,
    }
    return printers[type(config.bench)](config.bench)


def _step(config: BenchStep) -> int:
    """Times a step beside PyTorch and prints the ratio."""
    from . import training

    with errors.status("taking turns …"):
        result = training.step(config)
    rows = [
        (name, f"{ms:.3f}", f"{low:.3f} – {high:.3f}") for (name, ms), (low, high) in _times(result)
    ]
    caption = (
        f"normlab / torch = {result['normlab_over_torch']:.2f}, floor / torch = "
        f"{result['floor_over_torch']:.2f}. Floor: the matrix products and the update alone. "
        + _machine(result)
    )
    return _print("step of the 3×100 MLP with batch norm", ("median ms", "range ms"), rows, caption)


def _figure1(config: BenchFigure1) -> int:
    """Times the runs of figure 1 beside PyTorch and prints what all its steps would take."""
    from . import training

    with errors.status("starting") as status:
        result = training.figure1(config, lambda text: status.update(f"{text} …"))
    rows = [
        (
            name,
            f"{ms:.2f}",
            f"{low:.2f} – {high:.2f}",
            f"{result['start_s'][name]:.1f}",
            f"{result['whole_s'][name]:.0f}",
            f"{result['ratios'][name]:.2f}",
        )
        for (name, ms), (low, high) in _times(result)
    ]
    title = f"figure 1: {len(training.NETS)} nets, {config.seeds} seeds"
    headings = ("ms per step", "range", "start s", f"{config.whole:,} steps s", "÷ normlab")
    caption = (
        f"A step of all nets and seeds, median of {config.rounds} turns of {config.steps} steps; "
        f"the seconds are extrapolated from it. Losses agree to {result['loss_gap']:.0e}. "
        + _machine(result)
    )
    return _print(title, headings, rows, caption)


def _conv(config: BenchConv) -> int:
    """Times forms of a convolution beside PyTorch and prints the table."""
    from . import conv

    with errors.status("starting") as status:
        results = conv.run(config, lambda text: status.update(f"{text} …"))
    rows = []
    for result in results:
        ms = result["ms_per_step"]
        cells = [f"{ms:.2f} [{low:.2f}, {high:.2f}]" for (_, ms), (low, high) in _times(result)]
        rows.append((result["label"], *cells, f"{ms['MatmulConv'] / ms['torch']:.2f}"))
    headings = (*results[0]["ms_per_step"], "MatmulConv / torch")
    caption = (
        f"forward and backward in a scan, batch {config.batch_size}, {config.seeds} seeds side by "
        f"side, {config.cores} cores, memory "
        + ("reused" if config.reuse_memory else "as the system has it")
    )
    return _print("3×3 convolution, ms per step [range]", headings, rows, caption)


def _ops(config: BenchOps) -> int:
    """Times ops beside other libraries, then prints the tables and the paths."""
    from . import tables
    from .ops import Ops

    with errors.status("starting") as status:
        measured = Ops(config, say=lambda text: status.update(f"{text} …"))
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
            for doing in measured.run():
                progress.update(bar, description=doing, advance=1)
    except KeyboardInterrupt:
        exit_status = EXIT_INTERRUPTED
        errors.print("[yellow]interrupted:[/] the cases that were done follow, and are kept.")
    except RunError as error:
        exit_status = report(error)
    if measured.results:
        console.print(tables.times(measured.results, measured.machine()))
        console.print(tables.comparison(measured.results))
    for remark in tables.remarks(measured):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    print_paths(measured.finish())
    return exit_status


def _sync(config: BenchSync) -> int:
    """Times synced batch norm beside flax's and prints the table."""
    from . import sync

    print_rows(sync.HEADINGS, sync.rows(config), config.markdown)
    console.print(sync.remarks(config), highlight=False, markup=False)
    return 0


def _times(result: Mapping[str, Any]) -> Iterable[tuple[tuple[str, float], tuple[float, float]]]:
    return zip(result["ms_per_step"].items(), result["range_ms"].values(), strict=True)


def _machine(result: Mapping[str, Any]) -> str:
    variables = ", ".join(f"{name}={value}" for name, value in result["variables"].items())
    return f"{result['cores']} cores; {variables}"


def _print(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]], caption: str) -> int:
    table = Table("", title=title, caption=caption)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return 0
