"""The workers: conditions are measured in processes of their own, one for each core.

A worker of the quick profile has one core to itself. So the two cores of a laptop train two
conditions side by side, and the numbers do not depend on how many cores there are. The workers of a
cluster (`remote`) are others that do the same work.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from typing import Any, NamedTuple, Protocol

import jax

from .. import questions
from ..cluster import ALLOCATION, ALONE, pin
from ..data import DataError
from ..engine.question import Condition, Config
from ..rundir import RunError
from ..training.trainer import set_devices
from .kept import Kept, Partial, Whole, measure
from .sources import version


@dataclasses.dataclass(frozen=True)
class Task:
    """A condition to measure.

    Attributes:
      question: The question's name.
      config: Its config.
      index: Which of its conditions.
      kept: Where its records go.
      weight: What it costs, as a share of all that is to be done.
      version: That of the code it is to be measured with.
      own: Its module, if it is one of the user's own.
    """

    question: str
    config: Config
    index: int
    kept: Kept
    weight: float
    version: str
    own: str = ""

    @property
    def devices(self) -> int:
        """How many devices its process needs."""
        return getattr(self.config, "devices", 1)

    @property
    def condition(self) -> Condition:
        """The condition."""
        return list(questions.require(self.question).run(self.config))[self.index]

    @property
    def module(self) -> str:
        """Where the question is, which this process may not know yet."""
        if self.own:
            questions.learn(self.own)
        return questions.module_of(self.question)

    @property
    def file(self) -> str:
        """Where its records are kept."""
        return self.kept.file(self.index, self.condition)


@dataclasses.dataclass
class Done:
    """A task that came to its end.

    Attributes:
      task: Which.
      error: What went wrong, in words; empty if nothing did. No exception leaves its process:
        some of them cannot be sent.
    """

    task: Task
    error: str = ""


Tell = Callable[[Task, float], None]
"""Hears which share of a task is done."""


class Work(Protocol):
    """What measures tasks, here or elsewhere, keeps what was measured, and yields each that ends.

    Some that are left over when the caller stops are on their way: what they kept stays.
    """

    def __call__(self, tasks: Sequence[Task], tell: Tell) -> Iterator[Done]:
        """Measures tasks; tells which share of each is done."""
        ...


class Failure(NamedTuple):
    """What went wrong.

    Attributes:
      text: In words.
      trace: Where, if the words do not say it.
    """

    text: str
    trace: str = ""


Made = float | Partial | Whole | Failure
"""What comes of a task: the share that is done, what is to be kept, what went wrong."""


def work(tasks: Sequence[Task], tell: Tell, *, jobs: int, pinned: bool) -> Iterator[Done]:
    """Measures tasks on this machine and yields each that ends.

    Those that need as many devices are measured together, in this order: a process with eight
    devices on its core takes twice as long for what one device does.

    Args:
      tasks: The tasks.
      tell: Hears of progress.
      jobs: How many processes; 0 works in this one.
      pinned: Whether each process has a core of its own.

    Raises:
      RunError: If a process was killed.
    """
    if not jobs:
        with contextlib.suppress(RunError, RuntimeError):  # a task that lacks some will say so
            set_devices(max(task.devices for task in tasks))
        for task in tasks:
            yield Done(task, attempt(task, lambda share, task=task: tell(task, share)))
        return
    for devices in sorted({task.devices for task in tasks}):
        alike = [task for task in tasks if task.devices == devices]
        yield from _side_by_side(alike, min(jobs, len(alike)), tell, pinned)


def _side_by_side(tasks: Sequence[Task], jobs: int, tell: Tell, pinned: bool) -> Iterator[Done]:
    context = multiprocessing.get_context("spawn")
    heard = context.SimpleQueue()
    for name, value in (ALLOCATION | (ALONE if pinned else {})).items():
        os.environ.setdefault(name, value)
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin, initargs=(pinned, heard)
    )
    threading.Thread(target=_listen, args=(heard, tasks, tell), daemon=True).start()
    futures = {
        pool.submit(_measure, i, task.question, pickle.dumps(task)): task
        for i, task in enumerate(tasks)
    }
    try:
        for future in concurrent.futures.as_completed(futures):
            try:
                yield Done(futures[future], future.result())
            except BrokenProcessPool:
                raise RunError(
                    "a worker was killed: by hand, or because the memory ran out. What was "
                    "measured is kept, and the same command goes on from there; --jobs 1 needs "
                    "less memory."
                ) from None
    finally:
        if not all(future.done() for future in futures):  # there are tasks nobody waits for
            for process in list((pool._processes or {}).values()):
                process.terminate()
        pool.shutdown(cancel_futures=True)


_heard: Any = None


def _begin(pinned: bool, heard: SimpleQueue[Any]) -> None:
    """What a worker does first."""
    global _heard
    _heard = heard
    if pinned:
        pin()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a worker whose parent was killed would measure for nobody
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _measure(number: int, question: str, packed: bytes) -> str:
    try:
        task = pickle.loads(packed)  # imports the question
    except Exception as error:
        return explain(error, f"in {question}")
    return attempt(task, lambda share: _heard.put((number, share)))


def attempt(task: Task, tell: Callable[[float], None]) -> str:
    """Measures a task and keeps what comes of it; returns what went wrong, or nothing."""
    made = measured(task, lambda: task.kept.partial(task.file))
    return next(filter(None, (keep(task, one, tell) for one in made)), "")


def measured(
    task: Task, partial: Callable[[], bytes | None], pause: float | None = None
) -> Iterator[Made]:
    """Measures a task; what is to be kept is for others to keep.

    Args:
      task: The task.
      partial: Returns what is kept of it.
      pause: As in `kept.measure`.
    """
    where = f"in {task.question}"
    try:
        _have(task.devices, task.question)
        module, condition = task.module, task.condition
        where += f", {condition.name}"
        if version(module) != task.version:
            raise RunError(f"the sources of {task.question} changed while it ran; run it again.")
        for made in measure(condition, partial(), pause):
            yield made if isinstance(made, Partial | Whole) else made / max(1, task.config.steps)
        yield 1.0
    except Exception as error:
        known = isinstance(error, RunError | DataError)
        yield Failure(explain(error, where), "" if known else traceback.format_exc())
    finally:
        jax.clear_caches()


def keep(task: Task, made: Made, tell: Callable[[float], None]) -> str:
    """Keeps what came of a task; returns what went wrong, there or here, or nothing."""
    try:
        if isinstance(made, Partial | Whole):
            task.kept.keep(task.file, made)
        elif not isinstance(made, Failure):
            tell(made)
        elif made.trace:
            task.kept.write_bytes("error.txt", made.trace.encode())
    except RunError as error:  # a full disk; what went wrong there is told all the same
        return made.text if isinstance(made, Failure) else str(error)
    return made.text if isinstance(made, Failure) else ""


def _have(devices: int, question: str) -> None:
    try:
        set_devices(devices)
    except RunError:
        raise RunError(
            f"{question} needs {devices} devices, but there are {jax.device_count()} "
            f"({jax.default_backend()}). Ask for at most that many: run {question} -- --devices "
            f"{jax.device_count()}; JAX_PLATFORMS=cpu makes as many as are needed."
        ) from None


def explain(error: Exception, where: str) -> str:
    """What went wrong, in words, and where, unless the words say it."""
    if isinstance(error, RunError | DataError):
        return str(error)
    return f"{type(error).__name__}: {error}".rstrip(": ") + f" ({where})"


def _listen(heard: SimpleQueue[Any], tasks: Sequence[Task], tell: Tell) -> None:
    while True:  # a daemon: it ends with the program
        number, share = heard.get()
        tell(tasks[number], min(share, 1.0))
