"""Asking questions: what is finished is kept, the rest is measured, and each ends in verdicts."""

from __future__ import annotations

import datetime
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import figures, questions
from ..data import Dataset
from ..engine.learn import dataset
from ..engine.question import Condition, Config, Question, Record
from ..engine.records import Records
from ..engine.verdict import Bounds, Verdict, bounds
from ..rundir import RunError
from . import kept, pool, rehearsal, remote
from .fields import replaced
from .kept import Kept, verdict_json
from .sources import version

ID = re.compile(r"[a-z0-9_]+(?:[.-][a-z0-9_]+)*")
"""What names a claim: `figure1.sd-0.1.gain`."""

TOGETHER = 500
"""Questions that are begun at a time: each holds a file open."""


class Asking(NamedTuple):
    """What is asked.

    Attributes:
      name: The question.
      question: The module.
      config: Its config.
      point: What sets it apart, in words, where one question is asked with several configs.
      rehearsed: Whether its claims are known to be such as can be judged; else that is tried.
    """

    name: str
    question: Question
    config: Config
    point: str = ""
    rehearsed: bool = False

    @property
    def title(self) -> str:
        """What it is called among all that are asked."""
        return _title(self.name, self.point)


def _title(name: str, point: str) -> str:
    return f"{name}, {point}" if point else name


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
      point: That of `Asking`.
    """

    name: str
    question: Question
    config: Config
    conditions: list[Condition]
    kept: Kept
    files: list[str]
    version: str
    point: str = ""

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
      point: That of `Asking`.
      judged: By which bounds each claim was judged first, of these records: `thresholds.values`.
    """

    name: str
    config: Config
    path: Path | None
    verdicts: tuple[Verdict, ...] = ()
    records: tuple[Record, ...] = ()
    failed: str = ""
    point: str = ""
    judged: Mapping[str, Bounds] = {}

    @property
    def title(self) -> str:
        """What it is called among all that were asked."""
        return _title(self.name, self.point)

    @property
    def measured(self) -> Records:
        """The records without what they cost."""
        return Records(record for record in self.records if record["kind"] != "cost")

    @property
    def seconds(self) -> float:
        """What it cost, on its core."""
        return sum(r["seconds"] for r in self.records if r["kind"] == "cost")

    @property
    def diverged(self) -> tuple[str, ...]:
        """The lanes whose loss was not finite, in words."""
        first: dict[str, int] = {}
        for record in self.records:
            if record.get("diverged") is not None and record["kind"] != "screening":
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
    questions: Sequence[tuple[str, Question, Config] | Asking],
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
      questions: Names, modules and configs; with what sets them apart, where names are alike.
      root: Where their directories lie; by default `kept.place()`.
      jobs: Worker processes, by default one for each core; 0 works in this process.
      pinned: Whether a worker has one core to itself.
      ray: The Ray cluster that works in the place of this machine's processes, by its address; with
        `jobs` of its workers at most.
      again: Whether what is finished is measured again.
      say: Receives short messages.
      warn: Receives what went wrong on the way and was mended.
      tell: Hears which share of a question is done, by its `Asking.title`.

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
    askings = [q if isinstance(q, Asking) else Asking(*q) for q in questions]
    for first in range(0, len(askings), TOGETHER):
        asked: dict[str, Asked] = {}
        try:
            for asking in askings[first : first + TOGETHER]:
                name, config, point = asking.name, asking.config, asking.point
                say(f"reading the data of {asking.title}")
                try:
                    data = [dataset(d, config.data_dir) for d in config.datasets]
                    asked[asking.title] = _begin(asking, data, root or kept.place(), again)
                except Exception as error:  # the other questions go on
                    why = pool.explain(error, f"in {name}")
                    yield Answer(name, config, None, failed=why, point=point)
            yield from _answer(asked, work, say, tell)
        finally:
            for one in asked.values():
                one.kept.release()


def answer(
    name: str,
    /,
    *,
    profile: Literal["quick", "full"] = "quick",
    root: Path | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    **fields: Any,
) -> Answer:
    """What became of one question with some fields of its config changed.

    For a notebook, or for what searches: what `run NAME -- --lr 0.1` does, without its words. What
    was measured is kept, and for the same fields it is not measured again.

    Args:
      name: The question; one of your own by its file or module.
      profile: Which of its configs is changed.
      root: As in `ask`.
      jobs: As in `ask`; a script with worker processes starts under `if __name__ == "__main__":`.
      ray: As in `ask`.
      **fields: Fields of the config, `lr=0.1`.

    Raises:
      RunError: For an unknown question or field, with the nearest; for a config that is refused; if
        there is no answer, with the reason.

    >>> answer("identity", spread=1.0)
    Traceback (most recent call last):
      ...
    experiments.rundir.RunError: identity has no field 'spread': did you mean 'spreads'? Known: ...
    """
    name = questions.find(name)
    question = questions.require(name)
    config = replaced(name, question.QUICK if profile == "quick" else question.FULL, fields)
    pinned = profile == "quick"
    (found,) = ask([(name, question, config)], root=root, jobs=jobs, pinned=pinned, ray=ray)
    if found.failed:
        raise RunError(found.failed)
    return found


def _begin(asking: Asking, data: Sequence[Dataset], root: Path, again: bool) -> Asked:
    name, question, config, point, rehearsed = asking
    code = version(questions.module_of(name))
    conditions = list(question.run(config))
    if len({c.name for c in conditions}) < len(conditions):
        raise RunError(f"{name}: two of its conditions have the same labels. Tell them apart.")
    if not rehearsed:
        rehearsal.require(question, config)
    directory = Kept(
        root.expanduser().resolve(), name, kept.key(config, code, [d.checksum for d in data])
    )
    files = [directory.file(i, condition) for i, condition in enumerate(conditions)]
    asked = Asked(name, question, config, conditions, directory, files, code, point)
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
        begun = directory.begun() if not again else None
        origin = {"code": asked.version, "data": sets, "jax": kept.settings()}
        origin["begun"] = begun or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        config = {"question": asked.name, **kept.as_json(asked.config)}
        directory.write_json("config.json", {**config, **origin})


def _answer(
    asked: dict[str, Asked],
    work: pool.Work,
    say: Say,
    tell: Callable[[str, float], None],
) -> Iterator[Answer]:
    left = {title: one.left() for title, one in asked.items()}
    for title, one in asked.items():
        if not left[title]:
            yield finish(one)
    tasks = []
    at = {one.kept.path: title for title, one in asked.items()}
    for title in sorted(left, key=lambda title: -asked[title].question.SECONDS):  # longest first
        one = asked[title]
        share = 1 / len(one.files)
        own = questions.own_module(one.name)
        tasks += [
            pool.Task(one.name, one.config, i, one.kept, share, one.version, own)
            for i in left[title]
        ]
        tell(title, 1 - len(left[title]) * share)
    done: dict[str, dict[int, float]] = {title: {} for title in left}

    def hear(task: pool.Task, share: float) -> None:
        title = at[task.kept.path]
        done[title][task.index] = share
        rest = len(left[title]) - sum(done[title].values())
        tell(title, 1 - rest * task.weight)

    if not tasks:
        return
    say("starting")
    waiting = {title: len(indices) for title, indices in left.items() if indices}
    failures: dict[str, str] = {}
    for ended in work(tasks, hear):
        title = at[ended.task.kept.path]
        waiting[title] -= 1
        if ended.error:
            failures.setdefault(title, ended.error)
        if not waiting[title]:
            yield finish(asked[title], failures.get(title, ""))


def named(question: str, verdicts: Iterable[Verdict]) -> tuple[Verdict, ...]:
    """The verdicts with their question's name before their ids; raises RunError for bad ids."""
    found = tuple(v._replace(id=f"{question}.{v.id}") for v in verdicts)
    ids = [v.id for v in found]
    for one in ids:
        if not ID.fullmatch(one):
            raise RunError(
                f"{question}: the id {one!r} is not words of a–z and digits, with - between their "
                "parts and dots between them. Name the claim otherwise."
            )
        if ids.count(one) > 1:
            raise RunError(f"{question}: two claims have the id {one!r}. Name one otherwise.")
    return found


def finish(one: Asked, failed: str = "") -> Answer:
    """The verdicts and the figure of a question that was measured, kept beside its records.

    Args:
      one: The question.
      failed: Why not all of it was measured, if so: then there is no verdict.
    """
    answer = Answer(one.name, one.config, one.kept.path, failed=failed, point=one.point)
    try:
        answer = answer._replace(records=tuple(one.records()))
        if failed:
            return answer
        if left := one.left():
            raise RunError(f"{one.kept.path / one.files[left[0]]} is gone; run {one.name} again.")
        measured = answer.measured
        verdicts = named(one.name, one.question.verdict(measured))
        judged = one.kept.judged({v.id: bounds(v) for v in verdicts})
        one.kept.write_json("verdict.json", [verdict_json(v) for v in verdicts])
        picture = one.question.figure(measured)
        for kind in ("png", "svg"):
            one.kept.write_bytes(f"figure.{kind}", figures.encode(picture, kind))
    except Exception as error:  # the other questions go on
        where = f"in the verdict or the figure of {one.name}"
        return answer._replace(failed=failed or pool.explain(error, where))
    return answer._replace(verdicts=verdicts, judged=judged)
