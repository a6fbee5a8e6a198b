"""The largest stable learning rate of each seed: a planted one is found."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import numpy as np
import pytest

import normlab as nl
from normlab.experiments import models
from normlab.experiments.data import load
from normlab.experiments.engine import Checkpoint, Config, Records, largest_stable, rates
from normlab.experiments.engine.learn import held_out

TINY = Config(dataset="digits", model="tiny", batch_size=16, steps=4, evaluations=2, seeds=3)

GRID = (0.01, 0.1, 1.0, 10.0)

PLANTED = {100: 0.037, 101: 0.62, 102: 0.1}


@dataclasses.dataclass(frozen=True)
class Planted:
    """A training that diverges above a rate of each seed, and says which lanes each turn had."""

    rows: list
    turns: list
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def data(self):
        return load("digits", None)

    def among(self, nets, data, resume):
        assert nets.count >= len(self.rows)
        self.turns.append(self.rows)
        for row in self.rows:
            diverged = None if row["lr"] <= PLANTED[row["seed"]] else 2
            yield {"kind": "evaluation", **row, "step": TINY.steps, "diverged": diverged}


class Compiled:
    """In the place of `Nets`: it trains nothing."""

    made: ClassVar[list] = []

    def __init__(self, config, norm, data, rows, *, count):
        self.data, self.count = data, count
        self.made.append(self)

    def compile(self):
        return self


@pytest.fixture
def planted(monkeypatch):
    """Nets that diverge above a rate of each seed; returns the lanes of each turn."""
    turns = []
    monkeypatch.setattr(
        rates, "learn", lambda config, norm, *, side_by_side: Planted(side_by_side, turns)
    )
    monkeypatch.setattr(rates, "Nets", Compiled)
    monkeypatch.setattr(Compiled, "made", [])
    return turns


def finite(record):
    return record["diverged"] is None


def records(found):
    return Records(r for r in found if not isinstance(r, Checkpoint))


@pytest.mark.parametrize("fine", [1.05, 1.15, 2.0])
def test_the_rate_of_each_seed_is_found_up_to_a_factor(planted, fine):
    found = records(largest_stable(TINY, nl.get("none"), GRID, finite, fine=fine)(None))
    for record in found.where(kind="largest"):
        low, high, planted_rate = record["low"], record["high"], PLANTED[record["seed"]]
        assert low <= planted_rate < high <= fine * low
        assert record["lr"] == math.sqrt(low * high)
        assert record["edge"] == ""
    assert len(planted[0]) == 12  # a grid for every seed
    assert {len(rows) for rows in planted[1:]} == {3}
    assert len(planted) == 1 + math.ceil(math.log2(math.log(10) / math.log(fine)))


def test_an_end_of_the_grid_is_said_and_not_searched(planted):
    found = records(largest_stable(TINY, nl.get("none"), (0.05, 0.1, 0.2), finite)(None))
    low, high, inside = found.where(kind="largest")
    assert (low["lr"], low["low"], low["high"], low["edge"]) == (None, None, 0.05, "lowest")
    assert (high["lr"], high["low"], high["high"], high["edge"]) == (0.2, 0.2, None, "highest")
    assert inside["edge"] == ""
    assert {row["seed"] for rows in planted[1:] for row in rows} == {102}


def test_a_gap_below_the_largest_stable_rate_does_not_count(planted):
    tried = [{"seed": 1, "lr": lr, "stable": lr in (1.0, 4.0)} for lr in (1.0, 2.0, 4.0, 8.0)]
    low, high = rates.narrowed([1], np.zeros(1), np.full(1, np.inf), tried)
    assert (low, high) == (4, 8)


def test_it_goes_on_from_every_checkpoint_to_the_same_numbers(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", functools.partial(models.Mlp, widths=(8,)))
    stable = lambda r: r["diverged"] is None and r["train_loss"] < 2.5  # noqa: E731
    measure = largest_stable(TINY, nl.get("none"), (0.1, 30.0), stable, fine=8.0)
    found = [
        f._replace(leaves=jax.device_get(f.leaves)) if isinstance(f, Checkpoint) else f
        for f in measure(None)
    ]
    at = [i for i, f in enumerate(found) if isinstance(f, Checkpoint)]
    assert len(at) == 2 * 3  # within each turn, and after it
    assert {r["edge"] for r in records(found).where(kind="largest")} == {""}
    for i in at:
        checkpoint = found[i]
        assert isinstance(checkpoint, Checkpoint)
        assert records(measure(checkpoint)) == records(found[i + 1 :])


def test_nets_are_compiled_for_the_grid_and_once_for_all_other_turns(planted):
    list(largest_stable(TINY, nl.get("none"), GRID, finite)(None))
    assert [nets.count for nets in Compiled.made] == [12, 3]


def test_the_criterion_is_of_training_images_that_are_held_out(planted):
    prepare = lambda data: data._replace(train_labels=data.train_labels + 1)  # noqa: E731
    next(largest_stable(TINY, nl.get("none"), GRID, finite, prepare=prepare)(None))
    [nets] = Compiled.made
    expected = held_out(prepare(load("digits", None))).test_labels
    np.testing.assert_array_equal(nets.data.test_labels, expected)
