"""The loop under every training run: turns of some steps, what is measured after each, records."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ..rundir import Record, number, packed
from .tasks import Evaluation


class Checkpoint(NamedTuple):
    """Where a measurement stands, to go on from.

    Attributes:
      step: Steps done.
      leaves: The leaves of the state, as arrays.
    """

    step: int
    leaves: list[Any]


class Learner(Protocol):
    """What can be trained: several seeds side by side, or one."""

    def train(self, state: Any, batches: Any, /) -> tuple[Any, np.ndarray]:
        """Trains on these batches; returns the state and the losses `[steps, seeds]`."""
        ...

    def evaluate(self, state: Any, /) -> Evaluation:
        """Measures the test set."""
        ...


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where training stands.

    Attributes:
      step: Steps done.
      state: The state; the next turn may reuse its buffers.
      diverged: `[seeds]`, the first step whose training or test loss was not finite, or −1.
      losses: `[steps, seeds]`, the training losses of the last turn.
      evaluation: What was measured after it.
      step_seconds: Seconds for each of its steps.
    """

    step: int
    state: Any
    diverged: np.ndarray
    losses: np.ndarray | None = None
    evaluation: Evaluation | None = None
    step_seconds: float | None = None

    @classmethod
    def start(
        cls, state: Any, seeds: int, resume: Checkpoint | None = None, *, step: int = 0
    ) -> Progress:
        """At a step, the first by default, or where a checkpoint of such a state stands."""
        if resume is None:
            return cls(step, state, np.full(seeds, -1))
        diverged, *leaves = resume.leaves
        shardings = jax.tree.map(lambda v: v.sharding, state)
        kept = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return cls(resume.step, jax.device_put(kept, shardings), np.array(diverged))

    @property
    def loss(self) -> float:
        """The training loss over the last turn, the mean over the seeds, as in `records`."""
        return math.nan if self.losses is None else float(self.losses.mean())

    def evaluated(self, learner: Learner) -> Progress:
        """The same with the test set measured; a loss that is not finite there counts as well."""
        evaluation = learner.evaluate(self.state)
        bad = (self.diverged < 0) & ~np.isfinite(evaluation.loss)
        diverged = np.where(bad, self.step, self.diverged)
        return dataclasses.replace(self, evaluation=evaluation, diverged=diverged)

    def checkpoint(self) -> Checkpoint:
        """What a later run goes on from."""
        return Checkpoint(self.step, [self.diverged, *jax.tree.leaves(self.state)])

    def records(self, rows: Sequence[Mapping[str, Any]], *, each: bool = False) -> list[Record]:
        """A record of each seed; `rows` say what sets each apart.

        `kind` is "evaluation", or "training" where the test set was not measured. Then what sets it
        apart, `step`, `train_loss` (nats, the mean over the turn), and of an evaluation `test_loss`
        (nats), `accuracy` (a share of the test set's labels), `diverged` (a step, or null), and
        what else the task measures: `bits_per_byte` and `validation_loss` of a text. With `each`,
        `accuracy_each` says which examples of the test set were told right, as `rundir.packed` has
        it; of a text `bits_per_byte_each` how many bits each window takes.
        """
        losses = None if self.losses is None else self.losses.mean(axis=0)
        kind = "training" if self.evaluation is None else "evaluation"
        found: list[Record] = []
        for i, row in enumerate(rows):
            loss = None if losses is None else number(losses[i])
            found.append({"kind": kind, **row, "step": self.step, "train_loss": loss})
            if self.evaluation is not None:
                found[-1] |= {
                    "test_loss": number(self.evaluation.loss[i]),
                    "accuracy": number(self.evaluation.accuracy[i]),
                    "diverged": None if self.diverged[i] < 0 else int(self.diverged[i]),
                    **{name: number(v[i]) for name, v in self.evaluation.more.items()},
                }
                for name, values in self.evaluation.each.items() if each else ():
                    flags = values.dtype == bool
                    found[-1][name] = packed(values[i]) if flags else [*map(number, values[i])]
        return found


def drive(
    learner: Learner,
    at: Progress,
    turns: Iterable[tuple[int, Any]],
    *,
    evaluate: Callable[[int], bool] = lambda step: True,
) -> Iterator[Progress]:
    """Trains turn by turn; stopping after any of them is safe.

    Args:
      learner: What is trained.
      at: Where it stands.
      turns: For each turn the step after it, and its batches; one that is done is left out.
      evaluate: Whether to measure the test set after a step at which a turn ends.
    """
    for stop, batches in turns:
        if stop <= at.step:
            continue
        begin = time.perf_counter()
        state, losses = learner.train(at.state, batches)
        step_seconds = (time.perf_counter() - begin) / len(losses)
        bad = ~np.isfinite(losses)
        first = np.where(bad.any(axis=0), at.step + 1 + bad.argmax(axis=0), -1)
        diverged = np.where(at.diverged < 0, first, at.diverged)
        at = Progress(stop, state, diverged, losses, None, step_seconds)
        if evaluate(stop):
            at = at.evaluated(learner)
        yield at
