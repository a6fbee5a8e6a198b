"""Asking questions: what is finished is kept, the rest is measured, and each ends in verdicts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import figures
from ..data import Dataset
from ..engine.learn import dataset
from ..engine.question import Condition, Config, Question, Record
from ..engine.records import Records
from ..engine.verdict import Verdict
from ..rundir import RunError
from . import kept, pool, remote
from .kept import Kept, verdict_json
from .sources import HERE, version


class Asked(NamedTuple):
    """A question with all that decides its numbers.

    Attributes:
      name: Its name.
      question: The module.
      config: Its config.
      conditions: What is to be measured.
      kept: Its directory.
      files: The conditions' files.
      version: That of the code.
    """

    name: str
    question: Question
    config: Config
    conditions: list[Condition]
    kept: Kept
    files: list[str]
    version: str

    def left(self) -> list[int]:
        """The conditions that are not finished."""
        return [i for i, file in enumerate(self.files) if self.kept.records(file) is None]

    def records(self) -> list[Record]:
        """What was measured, of the conditions that are finished."""
        found = (self.kept.records(file) for file in self.files)
        return [record for records in found for record in records or []]


class Answer(NamedTuple):
    """What became of a question.

    Attributes:
      name: The question.
      config: Its config.
      path: Its directory; `None` if it was not run.
      verdicts: One for each claim.
      records: Everything that was measured.
      failed: Why it has no verdict, if it has none.
    """

    name: str
    config: Config
    path: Path | None
    verdicts: tuple[Verdict, ...] = ()
    records: tuple[Record, ...] = ()
    failed: str = ""

    @property
    def seconds(self) -> float:
        """What it cost, on its core."""
        return sum(r["seconds"] for r in self.records if r["kind"] == "cost")

    @property
    def diverged(self) -> tuple[str, ...]:
        """The lanes whose loss was not finite, in words."""
        first: dict[str, int] = {}
        for record in self.records:
            if record.get("diverged") is not None:
                first.setdefault(_lane(record), record["diverged"])
        return tuple(f"{lane}: not finite from step {step}" for lane, step in first.items())


def _lane(record: Record) -> str:
    spoken = [k for k, v in record.items() if isinstance(v, str | int | float) and k != "kind"]
    named = spoken[: spoken.index("step")]  # what is measured comes after
    return ", ".join(
        str(record[k]) if k in ("norm", "condition") else f"{k} {record[k]}" for k in named
    )


Say = Callable[[str], None]


def ask(
    questions: Sequence[tuple[str, Question, Config]],
    *,
    root: Path | None = None,
    jobs: int | None = None,
    pinned: bool = True,
    ray: str | None = None,
    again: bool = False,
    say: Say = lambda text: None,
    warn: Say = lambda text: None,
    tell: Callable[[str, float], None] = lambda name, share: None,
) -> Iterator[Answer]:
    """Runs questions and yields an answer for each, as they come to their ends.

    What was measured before with the same config, code and data is not measured again. A question
    that cannot be run is answered with the reason, and the others go on.

    Args:
      questions: Names, modules and configs.
      root: Where their directories lie; by default `kept.ROOT`.
      jobs: Worker processes, by default one for each core; 0 works in this process.
      pinned: Whether a worker has one core to itself.
      ray: The Ray cluster that works in the place of this machine's processes, by its address; with
        `jobs` of its workers at most.
      again: Whether what is finished is measured again.
      say: Receives short messages.
      warn: Receives what went wrong on the way and was mended.
      tell: Hears which share of a question is done.

    Raises:
      RunError: If a worker of this machine was killed, or the cluster does not answer.
    """
    work: pool.Work
    if ray is not None:
        work = functools.partial(remote.work, address=ray, jobs=jobs, say=say, warn=warn)
    else:
        cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
        number = len(cores) if jobs is None else jobs
        work = functools.partial(pool.work, jobs=number, pinned=pinned)
    asked: dict[str, Asked] = {}
    try:
        for name, question, config in questions:
            say(f"reading the data of {name}")
            try:
                data = [dataset(d, config.data_dir) for d in config.datasets]
                asked[name] = _begin(name, question, config, data, root or kept.ROOT, again)
            except Exception as error:  # the other questions go on
                yield Answer(name, config, None, failed=pool.explain(error, f"in {name}"))
        yield from _answer(asked, work, say, tell)
    finally:
        for one in asked.values():
            one.kept.release()


def _begin(
    name: str,
    question: Question,
    config: Config,
    data: Sequence[Dataset],
    root: Path,
    again: bool,
) -> Asked:
    code = version(f"{HERE}.questions.{name}")
    conditions = list(question.run(config))
    if len({c.name for c in conditions}) < len(conditions):
        raise RunError(f"{name}: two of its conditions have the same labels. Tell them apart.")
    directory = Kept(
        root.expanduser().resolve(), name, kept.key(config, code, [d.checksum for d in data])
    )
    files = [directory.file(i, condition) for i, condition in enumerate(conditions)]
    asked = Asked(name, question, config, conditions, directory, files, code)
    directory.lock()
    try:
        _prepare(asked, data, again)
    except BaseException:
        directory.release()
        raise
    return asked


def _prepare(asked: Asked, data: Sequence[Dataset], again: bool) -> None:
    directory = asked.kept
    if again:
        for file in asked.files:
            (directory.path / file).unlink(missing_ok=True)
            (directory.path / file).with_suffix(".partial").unlink(missing_ok=True)
    if asked.left():
        for old in ("verdict.json", "error.txt"):
            (directory.path / old).unlink(missing_ok=True)
        sets = [{"name": d.name, "origin": d.origin, "sha256": d.checksum} for d in data]
        origin = {"code": asked.version, "data": sets, "jax": kept.settings()}
        config = {"question": asked.name, **kept.as_json(asked.config)}
        directory.write_json("config.json", {**config, **origin})


def _answer(
    asked: dict[str, Asked],
    work: pool.Work,
    say: Say,
    tell: Callable[[str, float], None],
) -> Iterator[Answer]:
    left = {name: one.left() for name, one in asked.items()}
    for name, one in asked.items():
        if not left[name]:
            yield finish(one)
    tasks = []
    for name in sorted(left, key=lambda name: -asked[name].question.SECONDS):  # the longest first
        one = asked[name]
        share = 1 / len(one.files)
        tasks += [pool.Task(name, one.config, i, one.kept, share, one.version) for i in left[name]]
        tell(name, 1 - len(left[name]) * share)
    done: dict[str, dict[int, float]] = {name: {} for name in left}

    def hear(task: pool.Task, share: float) -> None:
        done[task.question][task.index] = share
        rest = len(left[task.question]) - sum(done[task.question].values())
        tell(task.question, 1 - rest * task.weight)

    if not tasks:
        return
    say("starting")
    waiting = {name: len(indices) for name, indices in left.items() if indices}
    failures: dict[str, str] = {}
    for ended in work(tasks, hear):
        name = ended.task.question
        waiting[name] -= 1
        if ended.error:
            failures.setdefault(name, ended.error)
        if not waiting[name]:
            yield finish(asked[name], failures.get(name, ""))


def finish(one: Asked, failed: str = "") -> Answer:
    """The verdicts and the figure of a question that was measured, kept beside its records.

    Args:
      one: The question.
      failed: Why not all of it was measured, if so: then there is no verdict.
    """
    answer = Answer(one.name, one.config, one.kept.path, failed=failed)
    try:
        answer = answer._replace(records=tuple(one.records()))
        if failed:
            return answer
        if left := one.left():
            raise RunError(f"{one.kept.path / one.files[left[0]]} is gone; run {one.name} again.")
        measured = Records(record for record in answer.records if record["kind"] != "cost")
        verdicts = tuple(one.question.verdict(measured))
        one.kept.write_json("verdict.json", [verdict_json(v) for v in verdicts])
        picture = one.question.figure(measured)
        for kind in ("png", "svg"):
            one.kept.write_bytes(f"figure.{kind}", figures.encode(picture, kind))
    except Exception as error:  # the other questions go on
        where = f"in the verdict or the figure of {one.name}"
        return answer._replace(failed=failed or pool.explain(error, where))
    return answer._replace(verdicts=verdicts)
