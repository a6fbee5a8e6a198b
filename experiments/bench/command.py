"""The commands of `bench`: their options, and what they print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

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
    counted,
    errors,
    log,
    outcome,
    print_paths,
    progress_bars,
    remark,
    report,
    rows_table,
    saying,
    show,
)
from .config import (
    Bench,
    BenchBytes,
    BenchCompile,
    BenchConv,
    BenchFigure1,
    BenchLm,
    BenchOps,
    BenchStep,
    BenchSync,
)


def run(config: Bench) -> int:
    """Measures, and prints what came out; returns the exit status."""
    printers: dict[type, Any] = {
        BenchStep: _step,
        BenchOps: _ops,
        BenchBytes: _bytes,
        BenchFigure1: _figure1,
        BenchConv: _conv,
        BenchLm: _lm,
        BenchCompile: _compile,
        BenchSync: _sync,
    }
    return printers[type(config.bench)](config.bench)


def _step(config: BenchStep) -> int:
    """Times a step beside PyTorch and prints the ratio."""
    from . import training

    with saying("taking turns"):
        result = training.step(config)
    rows = [
        (name, f"{ms:.3f}", f"{low:.3f} – {high:.3f}") for (name, ms), (low, high) in _times(result)
    ]
    caption = (
        f"normlab / torch = {result['normlab_over_torch']:.2f}, floor / torch = "
        f"{result['floor_over_torch']:.2f}. Floor: the matrix products and the update alone. "
        + _machine(result)
    )
    outcome(**result)
    return _print("step of the 3×100 MLP with batch norm", ("median ms", "range ms"), rows, caption)


def _figure1(config: BenchFigure1) -> int:
    """Times the runs of figure 1 beside PyTorch and prints what all its steps would take."""
    from . import training

    with saying("starting") as say:
        result = training.figure1(config, say)
    rows = [
        (
            name,
            f"{ms:.2f}",
            f"{low:.2f} – {high:.2f}",
            f"{result['start_seconds'][name]:.1f}",
            f"{result['whole_seconds'][name]:.0f}",
            f"{result['ratios'][name]:.2f}",
        )
        for (name, ms), (low, high) in _times(result)
    ]
    title = f"figure 1: {len(training.NETS)} nets, {counted(config.seeds, 'seed')}"
    headings = ("ms per step", "range", "start s", f"{config.whole:,} steps s", "÷ normlab")
    caption = (
        f"A step of all nets and seeds, median of {config.rounds} turns of {config.steps} steps; "
        f"the seconds are extrapolated from it. Losses agree to {result['loss_gap']:.0e}. "
        + _machine(result)
    )
    outcome(**result)
    return _print(title, headings, rows, caption)


def _conv(config: BenchConv) -> int:
    """Times forms of a convolution beside PyTorch and prints the table."""
    from . import conv

    with saying("starting") as say:
        results = conv.run(config, say)
    rows = []
    for result in results:
        ms = result["ms_per_step"]
        cells = [f"{ms:.2f} [{low:.2f}, {high:.2f}]" for (_, ms), (low, high) in _times(result)]
        rows.append((result["label"], *cells, f"{ms['MatmulConv'] / ms['torch']:.2f}"))
    headings = (*results[0]["ms_per_step"], "MatmulConv / torch")
    caption = (
        f"forward and backward in a scan, batch {config.batch_size}, "
        f"{counted(config.seeds, 'seed')} side by side, {counted(config.cores, 'core')}, memory "
        + ("reused" if config.reuse_memory else "as the system has it")
    )
    outcome(cases=results)
    return _print("3×3 convolution, ms per step [range]", headings, rows, caption)


def _lm(config: BenchLm) -> int:
    """Times the language model beside PyTorch, and prints that and what XLA fuses."""
    from . import lm

    with saying("starting") as say:
        result = lm.run(config, say)
    floor = result["ms_per_step"]["floor"]
    rows = [
        (
            name,
            f"{ms:.1f}",
            f"{low:.1f} – {high:.1f}",
            f"{result['tokens_per_second'][name]:,.0f}",
            f"{ms / floor:.2f}",
            f"{result['start_seconds'][name]:.1f}",
        )
        for (name, ms), (low, high) in _times(result)
    ]
    rows += [(name, reason) for name, reason in result["left_out"].items()]
    share, low, high = result["norm_share"]
    caption = (
        f"medians of {config.rounds} turns of {config.steps} steps. Norms: {share:.0%} of a step "
        f"({low:.0%} – {high:.0%}). Losses agree to {result['loss_gap']:.0e}. Floor: the matrix "
        f"products and AdamW alone. {_machine(result)}"
    )
    title = (
        f"language model of {config.depth} blocks of {config.width}, {config.batch_size} sequences "
        f"of {config.context} tokens"
    )
    headings = ("ms per step", "range", "tokens/s", "÷ floor", "start s")
    _print(title, headings, rows, caption)
    _print(*_fused(result["fused"]))
    outcome(**result)
    return 0


def _fused(found: Any) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], str]:
    """The table of what the norms of a program are fused with."""
    large = [row for row in found.rows if row.nbytes > found.nbytes / 1000]
    rows = [
        (
            f"{row.direction}: {', '.join(row.operations)}",
            ", ".join(row.others) or "–",
            str(row.times),
            f"{row.nbytes / 1e6:.1f}",
        )
        for row in large
    ]
    held, moved = (sum(getattr(row, name) for row in found.rows) for name in ("times", "nbytes"))
    few = held - sum(row.times for row in large)
    caption = (
        f"{held} of the {found.instructions} instructions of a step hold norms, and move "
        f"{moved / 1e6:.0f} of its {found.nbytes / 1e6:.0f} MB, whether from memory or a cache; "
        f"{few} move less than a thousandth of it together with their like, and are left out. "
        f"Without norms a step moves {found.nbytes_without / 1e6:.0f} MB."
    )
    headings = ("in one with", "instructions", "MB a step")
    return "what XLA fuses the norms with", headings, rows, caption


def _compile(config: BenchCompile) -> int:
    """Times compiling the language model, and prints the table."""
    from . import lm

    with saying("starting") as say:
        results = list(lm.compiling(config, say))
    rows = []
    for result in results:
        seconds, (low, high) = result["seconds"], result["range"]
        cells = [f"{seconds[phase]:.2f}" for phase in (*lm.PHASES, "all")]
        cells += [f"{low:.1f} – {high:.1f}", f"{result['temp_bytes'] / 1e6:.0f}"]
        rows.append((f"{result['depth']} blocks, {result['form']}", *cells))
    caption = f"medians of {config.rounds} fresh processes each, without a cache of programs"
    headings = ("trace s", "lower s", "compile s", "all s", "range", "temporary MB")
    outcome(programs=results)
    return _print("compiling a training step of the language model", headings, rows, caption)


def _ops(config: BenchOps) -> int:
    """Times ops beside other libraries, then prints the tables and the paths."""
    from . import tables
    from .ops import Ops

    with saying("starting") as say:
        measured = Ops(config, say=say)
    total = len(config.cases()) * (config.rounds + 1)
    exit_status = _with_progress(measured.run(), total, "cases")
    if measured.results:
        show(tables.times(measured.results, measured.machine()))
        show(tables.comparison(measured.results))
        outcome(cases=measured.results)
    for said in tables.remarks(measured):
        remark(said)
    print_paths(measured.finish())
    return exit_status


def _bytes(config: BenchBytes) -> int:
    """Compiles blocks with each library's norm, then prints the tables and the paths."""
    from . import bytes as moved

    with saying("starting") as say:
        measured = moved.Bytes(config, say=say)
    exit_status = _with_progress(measured.run(), len(config.programs()), "programs")
    found, targets = measured.results, measured.targets
    paths = measured.finish()
    if found:
        show(rows_table(moved.headings(targets), moved.table(found, targets)))
        show(rows_table(moved.headings_compared(targets), moved.compared(found, targets)))
        outcome(programs=found)
    for said in measured.remarks():
        remark(said)
    print_paths(paths)
    return exit_status


def _with_progress(doing: Iterable[str], total: int, what: str) -> int:
    """Shows how far something is that yields labels; returns the exit status."""
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with progress_bars(*columns) as progress:
            bar = progress.add_task("", total=total)
            for label in doing:
                progress.update(bar, description=label, advance=1)
                log(label)
    except KeyboardInterrupt:
        errors.print(f"[yellow]interrupted:[/] the {what} that were done follow, and are kept.")
        return EXIT_INTERRUPTED
    except RunError as error:
        return report(error)
    return 0


def _sync(config: BenchSync) -> int:
    """Times synced batch norm beside others' and prints the tables."""
    from . import sync

    with saying("starting") as say:
        result = sync.run(config, say)
    show(rows_table(sync.TIMES, sync.times(result)))
    show(rows_table(sync.COUNTS, result.counts))
    for said in sync.remarks(config, result):
        remark(said)
    counts = [dict(zip(sync.COUNTS, row, strict=True)) for row in result.counts]
    outcome(times=sync.as_json(result), counts=counts)
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
    show(table)
    return 0
