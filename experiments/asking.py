"""The commands that ask the questions: `run`, `report` and `verify`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments import questions
from experiments.engine.ask import Answer, ask
from experiments.engine.devices import forms_gap
from experiments.engine.kept import as_json, verdict_json
from experiments.engine.question import Config, Question
from experiments.engine.verdict import Verdict
from experiments.report import Section, page
from experiments.rundir import CHECKOUT, RunError, environment

EXIT_INTERRUPTED = 130

EXIT_MISSING = 1
"""Of a run of which a question has no answer; what the verdicts say does not matter."""

COMMITTED = CHECKOUT / "docs" / "report.json"
"""The verdicts of the last report that was committed, beside its page."""

console = Console()
errors = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Ask:
    """What `run`, `report` and `verify` have in common."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which questions (`python -m experiments list`)."""

    profile: Literal["quick", "full"] = "quick"
    """Minutes on two cores, or the paper's protocol on a GPU."""

    jobs: int | None = None
    """Worker processes: by default one for each core, or one in the full profile. 0 works in this
    process."""

    again: bool = False
    """Measure again what is finished. Without it a question is measured once for a config, a
    version of the code and a checksum of the data."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""

    run_dir: Path | None = None
    """Where the results go, a directory for each question in it. By default runs/questions."""

    def __post_init__(self) -> None:
        """Raises RunError for an unknown question, before any is run."""
        for name in self.names:
            questions.require(name)
        if self.jobs is not None and self.jobs < 0:
            raise RunError(f"--jobs: got {self.jobs}; it must be 0 or more.")


@dataclasses.dataclass(frozen=True)
class Run(Ask):
    """Run questions: a figure, and for each claim a verdict with its interval over seeds.

    What was measured is kept: the same command goes on where a run was stopped, and shows again
    what is finished. After `--` follow fields of the config: run NAME -- --model vgg --seeds 5.
    """

    config: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """What followed `--`."""


@dataclasses.dataclass(frozen=True)
class Report(Ask):
    """Run questions, by default all of them, and write one page of all their answers."""

    out: Path = CHECKOUT / "runs" / "report.html"
    """The page; beside it the verdicts as JSON."""


@dataclasses.dataclass(frozen=True)
class Verify(Ask):
    """Run questions, by default those of the last report, and compare the verdicts with it."""

    against: Path = COMMITTED
    """The verdicts of a report."""


def run(command: Run) -> int:
    """Runs the questions and prints what each came to."""
    if not command.names:
        raise RunError(f"name a question: {', '.join(questions.NAMES)}.")
    return _exit([*_answers(command, command.names, command.config, show=True)])


def report(command: Report) -> int:
    """Runs the questions and writes the page."""
    names = command.names or questions.NAMES
    found = {a.name: a for a in _answers(command, names, show=False)}
    told = [found[name] for name in names]
    machine = environment()
    text = page([section(answer) for answer in told], machine)
    verdicts = {a.name: [verdict_json(v) for v in a.verdicts] for a in told}
    out = command.out.expanduser().resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        said = {"environment": machine, "verdicts": verdicts}
        whole = {out: text, out.with_suffix(".json"): json.dumps(said, indent=1) + "\n"}
        for path, content in whole.items():
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_text(content, encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write {out}: {error.strerror}. Choose another place with --out; what was "
            "measured is kept."
        ) from error
    counts = Table("question", "holds", "fails", "undecided", "seconds", title="report")
    for answer in told:
        decisions = [v.decision for v in answer.verdicts]
        cells = (str(decisions.count(d)) for d in ("holds", "fails", "undecided"))
        counts.add_row(answer.name, *cells, f"{answer.seconds:.0f}" if answer.path else "missing")
    console.print(counts)
    console.print(f"{'page':>12}  {out}", highlight=False, soft_wrap=True)
    return _exit(told)


def verify(command: Verify) -> int:
    """Runs the questions and compares their verdicts with those of a report."""
    try:
        told = json.loads(command.against.read_text())["verdicts"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"cannot read the verdicts of a report in {command.against}: {error!r}. Make one with "
            "`python -m experiments report`, or name another with --against."
        ) from error
    names = command.names or tuple(name for name in questions.NAMES if told.get(name))
    for name in names:
        if not told.get(name):
            raise RunError(f"{name} has no verdict in {command.against}.")
    table = Table("question", "claim", "the report", "here", "", title="verify")
    answers = [*_answers(command, names, show=False)]
    differ = False
    for answer in answers:
        before = {v["claim"]: v for v in told[answer.name]}
        for verdict in answer.verdicts:
            then = before.get(verdict.claim)
            same = then is not None and then["decision"] == verdict.decision
            differ |= not same
            said = "–" if then is None else f"{then['decision']}, {_number(then['effect'])}"
            here = f"{verdict.decision}, {_number(verdict.effect)}"
            table.add_row(
                answer.name, escape(verdict.claim), said, here, "same" if same else "differs"
            )
    console.print(table)
    return _exit(answers) or (EXIT_MISSING if differ else 0)


def section(answer: Answer) -> Section:
    """What the page says of a question."""
    svg, data = "", ()
    if answer.path is not None and not answer.failed:
        svg = (answer.path / "figure.svg").read_text(encoding="utf-8")
        data = tuple(json.loads((answer.path / "config.json").read_text())["data"])
    return Section(
        name=answer.name,
        text=questions.describe(answer.name),
        verdicts=answer.verdicts,
        svg=svg,
        config=as_json(answer.config),
        data=data,
        seconds=answer.seconds,
        diverged=answer.diverged,
        missing=answer.failed,
    )


def _answers(
    command: Ask, names: Sequence[str], rest: Sequence[str] = (), *, show: bool
) -> Iterator[Answer]:
    """Asks with a progress bar for each question and one for all."""
    chosen = [(name, questions.require(name), _config(command, name, rest)) for name in names]
    total = sum(question.SECONDS for _, question, _ in chosen)
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    jobs = command.jobs
    if jobs is None and command.profile == "full":
        jobs = 1
    with Progress(
        *columns, console=errors, speed_estimate_period=600, refresh_per_second=2
    ) as progress:
        whole = progress.add_task("all questions", total=total)
        bars = {
            name: progress.add_task(name, total=question.SECONDS, start=False)
            for name, question, _ in chosen
        }

        def tell(name: str, share: float) -> None:
            progress.start_task(bars[name])
            progress.update(bars[name], completed=share * questions.require(name).SECONDS)
            done = sum(progress.tasks[bar].completed for bar in bars.values())
            progress.update(whole, completed=done)

        answers = ask(
            chosen,
            root=command.run_dir,
            jobs=jobs,
            pinned=command.profile == "quick",
            again=command.again,
            say=lambda text: progress.update(whole, description=text),
            tell=tell,
        )
        try:
            for answer in answers:
                tell(answer.name, 1.0)
                progress.update(bars[answer.name], visible=False)
                if show:
                    print_answer(answer)
                elif answer.failed:
                    _print_failure(answer)
                yield answer
        except KeyboardInterrupt:
            errors.print(
                "[yellow]interrupted:[/] what was measured is kept; the same command goes on."
            )
            raise SystemExit(EXIT_INTERRUPTED) from None


def _config(command: Ask, name: str, rest: Sequence[str]) -> Config:
    question: Question = questions.require(name)
    config = question.QUICK if command.profile == "quick" else question.FULL
    config = dataclasses.replace(config, data_dir=command.data_dir)
    if not rest:
        return config
    return tyro.cli(
        type(config),
        default=config,
        args=list(rest),
        prog=f"python -m experiments run {name} --",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def print_answer(answer: Answer) -> None:
    """The verdicts of a question and where its figure and its records are."""
    if answer.failed:
        _print_failure(answer)
        return
    result = Table("claim", "effect [95% interval]", "threshold", "verdict", title=answer.name)
    for verdict in answer.verdicts:
        result.add_row(escape(verdict.claim), *_judged(verdict))
    seeds = {verdict.seeds for verdict in answer.verdicts}
    gap = forms_gap(answer.records)
    result.caption = f"mean and interval over {', '.join(map(str, sorted(seeds)))} seeds" + (
        "" if gap is None else f"; pmap and shard_map differ by {gap:.1e}"
    )
    console.print(result)
    for lane in answer.diverged:
        console.print(f"{'diverged':>12}  {lane}", highlight=False, markup=False)
    console.print(f"{'run':>12}  {answer.path}", highlight=False, soft_wrap=True)


def _print_failure(answer: Answer) -> None:
    text = f"[bold red]{answer.name} has no answer:[/] {escape(answer.failed)}"
    errors.print(text, highlight=False, soft_wrap=True)


def _judged(v: Verdict) -> tuple[str, str, str]:
    bounds = f"≥ {v.at_least:g}" if v.at_least > -math.inf else ""
    if v.at_most < math.inf:
        bounds += f"{', ' if bounds else ''}≤ {v.at_most:g}"
    unit = f" {v.unit}" if v.unit else ""
    return f"{v.effect:.3g}{unit} [{v.low:.3g}, {v.high:.3g}]", bounds, v.decision


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"


def _exit(answers: Sequence[Answer]) -> int:
    return EXIT_MISSING if any(answer.failed for answer in answers) else 0
