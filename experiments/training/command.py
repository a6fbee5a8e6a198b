"""The commands `train` and `launch`: one network, in one process or in many."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import Any

import tyro
from rich.markup import escape

from ..data import DataError
from ..rundir import Record, RunError, shown
from ..terminal import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    PROGRAM,
    counted,
    errors,
    outcome,
    print_paths,
    remark,
    report,
    saying,
)
from . import again
from .config import Launch, Train
from .launch import launch
from .processes import EXIT_FAILED, leave, together
from .train import explain, train


def run(config: Train | Launch) -> int:
    """Trains, here or in processes that it starts."""
    return train_here(config) if isinstance(config, Train) else launch_run(config)


def train_here(config: Train) -> int:
    """Trains in this process, alone or with others, and prints what came out."""
    try:
        with saying("starting") as say:
            result = train(config, say=say, hear=lambda record: line(record, config.steps))
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


def line(record: Record, steps: int) -> None:
    """Prints where the run stands; the line stays."""
    said = f"step {record['step']}/{steps}  train loss {shown(record['train_loss'])}"
    if "accuracy" in record:
        said += f"  test loss {shown(record['test_loss'])}  accuracy {record['accuracy']:.2%}"
    errors.print(said, highlight=False)


def launch_run(config: Launch) -> int:
    """Trains in processes that Ray holds together, and prints what came out."""
    read = functools.partial(
        tyro.cli,
        Train,
        prog=f"{PROGRAM} launch -- train",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config_of_run = again.parsed(
        lambda args, **more: read(args=args, **more), Train, config.command[1:]
    )

    def tell(text: str) -> None:
        errors.print(f"[yellow]restarted:[/] {escape(text)}", highlight=False, soft_wrap=True)

    with saying("starting") as say:
        hear = lambda record: line(record, config_of_run.steps)  # noqa: E731
        result = launch(config, config_of_run, say, tell, hear)
    if result.failure:
        failed = f"failed {result.restarts + 1} times, " if result.restarts else "failed: "
        report(RunError(f"the run {failed}{result.failure}"))
    conclude(result.path, result.step, result.summary)
    if result.failure:
        return EXIT_USAGE if result.usage else EXIT_FAILED
    if result.summary is None:
        return EXIT_INTERRUPTED if result.signal == signal.SIGINT else EXIT_TERMINATED
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
    loss, bits = (shown(summary.get(name)) for name in ("test_loss", "bits_per_byte"))
    bits = f", {bits} bits per byte" if "bits_per_byte" in summary else ""
    devices, processes = summary["devices"], summary["processes"]
    remark(
        f"step {step}: test loss {loss}{bits}, accuracy {summary['accuracy']:.2%}, on "
        f"{counted(devices, 'device')} in {counted(processes, 'process')}"
    )
    outcome(**summary)
    print_paths({"summary": path / "summary.json"})
