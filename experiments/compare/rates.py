"""Learning rates: the best of each norm, and the largest at which its training is stable."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..engine.records import Records
from ..rundir import Record
from ..training.tasks import Task


class Stable(NamedTuple):
    """The largest stable rate of a grid.

    Attributes:
      rate: The rate; `None` if the best rate is not stable.
      bound: The next one of the grid, at which a run diverged; `None` at the end of the grid, where
        the largest stable rate may be any larger one.
    """

    rate: float | None
    bound: float | None

    def __str__(self) -> str:
        if self.rate is None:
            return "none"
        return f"≥ {self.rate:g}" if self.bound is None else f"{self.rate:g} (not {self.bound:g})"


def diverged(last: Record, uninformed: float) -> bool:
    """Whether a run diverged, by the record of its last evaluation.

    It did if a loss on the way was not finite, or if in the end its test loss is above that of one
    who knows how frequent each label is and nothing else: it has learned less than nothing.
    """
    loss = last["test_loss"]
    return last["diverged"] is not None or loss is None or loss > uninformed


def best(last: Records, task: Task) -> float:
    """The best rate by the mean over seeds of `Score.choice`, among those with finite losses.

    Where no rate has them it is the smallest one.
    """
    rates = sorted(last.values("lr"))
    finite = [lr for lr in rates if all(r["test_loss"] is not None for r in last.where(lr=lr))]
    means = {lr: last.by_seed(task.score.choice, lr=lr).mean() for lr in finite}
    means = {lr: mean for lr, mean in means.items() if math.isfinite(mean)}
    return task.score.best(means, key=lambda lr: means[lr]) if means else rates[0]


def largest_stable(last: Records, task: Task) -> Stable:
    """The largest rate such that from the best one up to it no run diverged.

    Rates below the best are not asked: a run that is too slow ends where one that diverged does.

    Args:
      last: The records of the last evaluations of a norm, of all rates and seeds.
      task: What was trained.
    """
    start, found = best(last, task), None
    for lr in sorted(lr for lr in last.values("lr") if lr >= start):
        if any(diverged(record, task.uninformed) for record in last.where(lr=lr)):
            return Stable(found, lr)
        found = lr
    return Stable(found, None)
