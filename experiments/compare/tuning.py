"""A learning rate for each norm, chosen on training images that are held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..data import Dataset
from ..engine.learn import beyond, chosen, held_out
from ..engine.question import SCREENED
from ..rundir import Record
from ..training.driver import Progress, drive
from ..training.optimizers import set_rates
from ..training.trainer import minibatches, turns

SEEDS = 2
"""Seeds at each rate, which nothing else has: from `SCREENED` on."""

STEPS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""The grid where none is given, as multiples of the learning rate."""


class Tuned(NamedTuple):
    """What became of the choice of a norm's rate.

    Attributes:
      records: Of `kind` "screening" of each trial, then one of `kind` "tuning" as `engine.tuned`
        has it: `lr`, the best; `rates`, all that were tried; their `accuracies` (of a text
        `losses`); and `edge`, "lowest" or "highest" if the best is an end of them.
      step: 0.
    """

    records: list[Record]
    step: int = 0

    @property
    def choice(self) -> Record:
        """The record of the choice."""
        return self.records[-1]


def grid(lr: float) -> tuple[float, ...]:
    """The rates that are tried around a rate.

    >>> grid(0.05)
    (0.005, 0.015, 0.05, 0.15, 0.5)
    """
    return tuple(float(f"{lr * step:.2g}") for step in STEPS)


def tune(lane: Any, data: Dataset, rates: Sequence[float]) -> Tuned:
    """Tries every rate, and two more where the best is an end, as `engine.tuned` does.

    Args:
      lane: The norm, a `comparison.Lane`.
      data: The data set, of which the last tenth of the training images is held out; of a text the
        validation part counts.
      rates: The grid.
    """
    tried = [*_trial(lane, data, rates)]
    choice = chosen(tried, rates)
    if choice["edge"]:
        more = beyond(rates, choice["edge"])
        tried += _trial(lane, data, more)
        choice = chosen(tried, (*rates, *more))
    screened = [{**r, "kind": "screening"} for r in tried]
    return Tuned([*screened, {"kind": "tuning", **lane.labels, **choice}])


def _trial(lane: Any, data: Dataset, rates: Sequence[float]) -> Iterator[Record]:
    """Trains at these rates; yields the record of each net at the end."""
    config, held = lane.config, held_out(data)
    seeds = range(SCREENED, SCREENED + SEEDS)
    rows = [{**lane.labels, "lr": lr, "seed": seed} for lr in rates for seed in seeds]
    probe = lane.trainer.data.probe
    drawn = config.draw_kernels(data.classes, seeds, probe)
    at_rows = np.array([row["seed"] - SCREENED for row in rows])
    kernels = jax.tree.map(lambda v: np.asarray(v)[at_rows], drawn)
    there = lane.trainer.data.testing(held.test_inputs, held.test_labels)
    trainer = lane.build(there if data.text is None else lane.trainer.data, kernels, parts=False)
    examples = {
        seed: minibatches(seed, len(held.train_inputs), config.batch_size, config.steps)
        for seed in seeds
    }
    state = trainer.init()
    each = [row["lr"] for row in rows]
    opt_state = set_rates(state.opt_state, each, there.devices, there.mapped)
    at = start = Progress.start(state._replace(opt_state=opt_state), len(rows))
    batches = turns([examples[row["seed"]] for row in rows], config.evaluations)
    for at in drive(trainer, start, batches, evaluate=lambda step: step == config.steps):  # noqa: B007
        pass
    yield from at.records(rows)
