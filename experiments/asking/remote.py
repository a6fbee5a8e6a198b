"""The workers of a Ray cluster: conditions are its tasks, and what they measure is kept here."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..cluster import Call, Cluster, Ended
from ..data import Dataset, hand
from ..engine.learn import dataset
from . import kept, pool


def work(
    tasks: Sequence[pool.Task],
    tell: pool.Tell,
    *,
    address: str,
    jobs: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[pool.Done]:
    """Measures tasks on a Ray cluster and yields each that ends.

    A task whose worker was killed goes on from its last checkpoint, which is here, elsewhere.

    Args:
      tasks: The tasks.
      tell: Hears of progress.
      address: As `ray.init` takes it, or `cluster.LOCAL`.
      jobs: How many at a time, at most.
      say: Receives where the cluster stands.
      warn: Receives what went wrong and was mended.

    Raises:
      RunError: If the cluster does not answer, or its nodes have other versions.
    """
    with Cluster(address, jobs=jobs, say=say, warn=warn) as cluster:

        @functools.cache
        def shared(name: str, data_dir: Any) -> Any:
            return cluster.share(dataset(name, data_dir))

        def call(task: pool.Task) -> Call:
            def arguments() -> list[Any]:
                sets = [shared(name, task.config.data_dir) for name in task.config.datasets]
                partial = task.kept.partial(task.file)
                return [task.question, pickle.dumps(task), partial, kept.PAUSE, *sets]

            return Call(f"{__name__}:measure", arguments, task.devices)

        failed: dict[int, str] = {}
        for number, made in cluster.run([call(task) for task in tasks]):
            task = tasks[number]
            if isinstance(made, Ended):
                error = made.error and f"{made.error} (in {task.question}, {task.condition.name})"
                yield pool.Done(task, failed.get(number, error))
            elif error := pool.keep(task, made, functools.partial(tell, task)):
                failed[number] = error
                if not isinstance(made, pool.Failure):  # what is left would not be kept either
                    cluster.drop(number)
                    yield pool.Done(task, error)


def measure(
    question: str, packed: bytes, partial: bytes | None, pause: float, *sets: Dataset
) -> Iterator[pool.Made]:
    """What a worker does: measures a task and keeps nothing.

    Args:
      question: Its question.
      packed: The task.
      partial: What is kept of it, from where it goes on.
      pause: As in `kept.measure`.
      *sets: The data sets of its question.
    """
    hand(*sets)
    try:
        task = pickle.loads(packed)  # imports the question
    except Exception as error:
        yield pool.Failure(pool.explain(error, f"in {question}"))
        return
    yield from pool.measured(task, lambda: partial, pause)
