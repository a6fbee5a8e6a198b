"""What a question is: a config, conditions that are measured apart, a figure and verdicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from matplotlib.figure import Figure

import normlab as nl
from normlab.errors import nearest

from ..data import NAMES
from ..rundir import Record, RunError, require
from ..training import optimizers
from ..training.config import Training, require_evaluations
from ..training.driver import Checkpoint
from ..training.optimizers import Schedule
from .records import Records
from .verdict import Verdict

SCREENED = 10_000
"""The first of the seeds on which learning rates are chosen; what is compared has others."""


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """What all questions have in common; a question adds its own fields.

    Attributes:
      dataset: A name of `data.NAMES`, or "" for a question that needs none.
      batch_size: Examples in each batch.
      evaluations: How often to measure on the way.
      optimizer: Any of optax, as in `normlab compare --help`.
      schedule: How the rate falls over the steps: constant, linear, cosine and the like.
      warmup: Steps in which it first rises to its value.
      seeds: How many seeds, each with kernels and minibatches of its own.
      first_seed: The first of them. What was looked at before thresholds were set had seeds below
        100; verdicts are of seeds that nobody has seen.
      screening: With how many further seeds a learning rate is chosen.
    """

    INSTEAD: ClassVar[Mapping[str, str]] = {}
    """Fields that a question sets itself for each of its conditions, and the options by which."""

    model: str = "mlp"
    batch_size: int = 60
    steps: int = 1000
    optimizer: str = "sgd"
    lr: float = 0.1
    evaluations: int = 10
    schedule: Schedule = "constant"
    warmup: int = 0
    seeds: int = 10
    first_seed: int = 100
    screening: int = 2

    def __post_init__(self) -> None:
        """Raises RunError for a number that nothing could be measured with, or an unknown name."""
        counts = ("steps", "evaluations", "seeds", "batch_size", "screening")
        self.require_counts(*counts, expected="1 or more")
        require_evaluations(self.evaluations, self.steps)
        require(0 < self.lr < math.inf, "lr", self.lr, "positive and finite")
        room = f"0 to {SCREENED - self.seeds}, below the seeds on which rates are chosen"
        require(0 <= self.first_seed <= SCREENED - self.seeds, "first_seed", self.first_seed, room)
        require(0 <= self.warmup < max(self.steps, 1), "warmup", self.warmup, "0 to steps - 1")
        there = not self.dataset or self.dataset in NAMES
        known = f"a known name; {nearest(self.dataset, NAMES)}"
        require(there, "dataset", repr(self.dataset), known)
        optimizers.require(self.optimizer)
        optimizers.require_schedule(self.schedule)
        for name in getattr(self, "norms", ()):
            try:
                nl.row(name)
            except ValueError as error:
                raise RunError(f"--norms: {error}") from None

    @property
    def each_seed(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Every data set that the question reads."""
        return (self.dataset,) if self.dataset else ()


class Measure(Protocol):
    """Measures one condition."""

    def __call__(self, resume: Checkpoint | None) -> Iterator[Record | Checkpoint]:
        """Yields records, and checkpoints from which another call can go on."""
        ...


class Condition(NamedTuple):
    """What is measured under one setting, apart from the others and perhaps beside them.

    Attributes:
      labels: What sets it apart; every record gets them.
      measure: Measures it.
      says: What else its records say that is no number: an example of each kind of record, with
        what it is told by and with arrays of the right rank. By these a config is refused before
        anything runs that lacks what a claim compares; the values are not looked at.
    """

    labels: Mapping[str, Any]
    measure: Measure
    says: Sequence[Mapping[str, Any]] = ({},)

    @property
    def name(self) -> str:
        """The labels in words."""
        return ", ".join(
            str(v) if k in ("norm", "condition") else f"{k} {v}" for k, v in self.labels.items()
        )


def exact(measure: Callable[..., Iterator[Record]], *args: Any, **kwargs: Any) -> Measure:
    """A measurement of seconds, which has no checkpoints: `measure(*args, **kwargs)`."""

    def run(resume: Checkpoint | None) -> Iterator[Record | Checkpoint]:
        del resume
        yield from measure(*args, **kwargs)

    return run


class Question(Protocol):
    """What a file of `experiments.questions` is."""

    QUICK: Config
    FULL: Config
    SECONDS: float
    """What `QUICK` costs on one core, about: for the order of the work and the time left."""

    def run(self, config: Any) -> Iterator[Condition]:
        """Yields the conditions; nothing is computed yet, and each time they are the same."""
        ...

    def figure(self, records: Records) -> Figure:
        """Draws the records."""
        ...

    def verdict(self, records: Records) -> Iterator[Verdict]:
        """Yields what became of each claim."""
        ...
