"""Questions asked at the terminal: a bar for each, and what it came to."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .. import questions
from ..data import is_kept
from ..engine.devices import forms_gap
from ..engine.question import Config, Question
from ..engine.verdict import Verdict
from ..rundir import RunError
from ..terminal import (
    EXIT_INTERRUPTED,
    EXIT_MISSING,
    counted,
    errors,
    log,
    progress_bars,
    remark,
    show,
)
from . import rehearsal
from .ask import Answer, Asking, ask
from .config import Ask, Choose
from .fields import parsed
from .kept import verdict_json
from .numbers import asked_size, estimate, p_value, threshold
from .pool import explain


def answers(command: Ask, names: Sequence[str], rest: Sequence[str] = ()) -> Iterator[Answer]:
    """Asks with a progress bar for each question and one for all.

    Args:
      command: How to ask.
      names: Which questions.
      rest: Options of their configs.

    Raises:
      RunError: For options with which a claim could not be judged.
    """
    asked, broken = chosen(command, names, rest)
    return answered(command, rehearsed(asked) if rest else asked, broken)


def rehearsed(asked: Sequence[Asking]) -> list[Asking]:
    """The same, of all of which the claims could be judged.

    Raises:
      RunError: If some could not, with all of these, before anything is measured.
    """
    refused: dict[str, list[str]] = {}
    for asking in asked:
        try:
            rehearsal.require(asking.question, asking.config)
        except RunError as error:
            refused.setdefault(str(error), []).append(asking.point)
    if refused:
        told = {
            why: f"--sweep: at {'; '.join(at)}: " if any(at) else "" for why, at in refused.items()
        }
        raise RunError("\n".join(f"{where}{why}" for why, where in told.items()))
    return [asking._replace(rehearsed=True) for asking in asked]


def chosen(
    command: Choose, names: Sequence[str], rest: Sequence[str]
) -> tuple[list[Asking], list[Answer]]:
    """The questions with their configs, and an answer for each that cannot be imported.

    Raises:
      RunError: For options that are refused, or a place of data where none are read.
    """
    found, broken = [], []
    for name in dict.fromkeys(names):
        try:
            question = questions.require(name)
        except Exception as error:  # of the file; the other questions go on
            why = explain(error, f"in the import of {name}")
            broken.append(Answer(name, Config(dataset=""), None, failed=why))
        else:
            found.append(Asking(name, question, _config(command, question, name, rest)))
    read = broken or any(is_kept(data) for asking in found for data in asking.config.datasets)
    told = [asking.config.data_dir for asking in found if asking.config.data_dir is not None]
    if told and not read:
        asked = ", ".join(asking.name for asking in found)
        raise RunError(
            f"--data-dir {told[0]}: it has no effect on {asked}, of whose data no file is "
            "kept. Leave it out."
        )
    return found, broken


def answered(
    command: Ask, chosen: Sequence[Asking], broken: Sequence[Answer] = ()
) -> Iterator[Answer]:
    """Asks what was chosen; bars of the points of a grid are there while they are measured."""
    seconds = {asking.title: about(asking) for asking in chosen}
    points = {asking.title for asking in chosen if asking.point}
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    jobs = command.jobs
    if jobs is None and command.profile == "full" and command.ray is None:
        jobs = 1
    with progress_bars(*columns, speed_estimate_period=600, refresh_per_second=2) as progress:
        whole = progress.add_task("all questions", total=sum(seconds.values()))
        bars = {
            title: progress.add_task(escape(title), start=False, total=total, visible=not points)
            for title, total in seconds.items()
        }

        tenths = dict.fromkeys(seconds, 0)

        def tell(title: str, share: float) -> None:
            if int(10 * share) > tenths[title]:
                tenths[title] = int(10 * share)
                log(f"{title}: {10 * tenths[title]}%")
            progress.start_task(bars[title])
            progress.update(bars[title], completed=share * seconds[title])
            if points:
                progress.update(bars[title], visible=0 < share < 1)
            done = sum(progress.tasks[bar].completed for bar in bars.values())
            progress.update(whole, completed=done)

        measured = ask(
            chosen,
            root=command.run_dir,
            jobs=jobs,
            pinned=command.profile == "quick",
            ray=command.ray,
            again=command.again,
            say=lambda text: progress.update(whole, description=text),
            warn=lambda text: errors.print(f"[yellow]{escape(text)}[/]", soft_wrap=True),
            tell=tell,
        )
        alarm = threading.Timer(60 * (command.minutes or 0), os.kill, [os.getpid(), signal.SIGINT])
        if command.minutes is not None:
            alarm.daemon = True
            alarm.start()
        try:
            for answer in itertools.chain(broken, measured):
                if answer.title in bars:
                    tell(answer.title, 1.0)
                    progress.update(bars[answer.title], visible=False)
                if answer.failed:
                    title = escape(answer.title)
                    text = f"[bold red]{title} has no answer:[/] {escape(answer.failed)}"
                    errors.print(text, highlight=False, soft_wrap=True)
                yield answer
        except KeyboardInterrupt:
            same = "the same command without --again" if command.again else "the same command"
            text = f"[yellow]interrupted:[/] what was measured is kept; {same} goes on."
            errors.print(text, soft_wrap=True)
            raise SystemExit(EXIT_INTERRUPTED) from None
        finally:
            alarm.cancel()


def _config(command: Choose, question: Question, name: str, rest: Sequence[str]) -> Config:
    config = question.QUICK if command.profile == "quick" else question.FULL
    config = dataclasses.replace(config, data_dir=command.data_dir)
    found = parsed(name, config, rest) if rest else config
    if command.data_dir not in (None, found.data_dir):
        raise RunError(
            f"--data-dir {command.data_dir}: it has no effect beside --data-dir {found.data_dir} "
            "after --. Leave one of them out."
        )
    return found


def about(asking: Asking) -> float:
    """What a question costs on one core, in seconds, if its quick config costs `SECONDS`."""
    quick, config = asking.question.QUICK, asking.config
    more = config.steps / quick.steps * config.seeds / quick.seeds
    return asking.question.SECONDS * more


def print_answer(answer: Answer) -> None:
    """The verdicts of a question and where its figure and its records are."""
    columns = ("claim", "effect [95% interval]", "bound", "size", "p", "verdict")
    result = Table(*columns, title=answer.name)
    for verdict in answer.verdicts:
        named = f"{verdict.id.removeprefix(f'{answer.name}.')}\n  {verdict.claim}"
        result.add_row(escape(named), *map(escape, _judged(verdict)))
    seeds = {verdict.seeds for verdict in answer.verdicts}
    *few, most = sorted(seeds) or [0]
    over = ", ".join([*map(str, few), counted(most, "seed")])
    gap = forms_gap(answer.records)
    result.caption = f"mean and interval over {over}" + (
        "" if gap is None else f"; pmap and shard_map differ by {gap:.1e}"
    )
    show(result)
    for lane in answer.diverged:
        remark(f"{'diverged':>12}  {lane}")
    remark(f"{'run':>12}  {answer.path}")


def answer_json(answer: Answer) -> dict[str, Any]:
    """What became of a question as JSON values."""
    return {
        "question": answer.name,
        "run": None if answer.path is None else str(answer.path),
        "failed": answer.failed,
        "seconds": answer.seconds,
        "diverged": list(answer.diverged),
        "verdicts": [verdict_json(verdict) for verdict in answer.verdicts],
    }


def _judged(v: Verdict) -> tuple[str, ...]:
    effect, interval = estimate(v)
    size = f"{asked_size(v)}: {v.sized}" if v.sized else ""
    decision = f"{v.decision} (untuned)" if v.untuned else v.decision
    return (
        f"{effect} {v.unit} {interval}".replace("  ", " "),
        threshold(v),
        size,
        p_value(v.p),
        decision,
    )


def status(answers: Sequence[Answer]) -> int:
    """The exit status: whether every question has an answer."""
    return EXIT_MISSING if any(answer.failed for answer in answers) else 0
