"""The largest stable learning rate of each seed: a planted one is found."""

import functools
import math

import jax
import numpy as np
import pytest

import normlab as nl
from experiments import models
from experiments.data import load
from experiments.engine import Checkpoint, Config, Records, largest_stable, rates
from experiments.engine.learn import held_out

TINY = Config(dataset="digits", model="tiny", batch_size=16, steps=4, evaluations=2, seeds=3)

GRID = (0.01, 0.1, 1.0, 10.0)

PLANTED = {100: 0.037, 101: 0.62, 102: 0.1}


@pytest.fixture
def planted(monkeypatch):
    """Nets that diverge above a rate of each seed; returns the lanes of each turn."""
    turns = []

    def learn(config, norm, *, side_by_side, prepare):
        turns.append(side_by_side)

        def run(resume):
            for row in side_by_side:
                diverged = None if row["lr"] <= PLANTED[row["seed"]] else 2
                yield {"kind": "evaluation", **row, "step": config.steps, "diverged": diverged}

        return run

    monkeypatch.setattr(rates, "learn", learn)
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


def test_the_criterion_is_of_training_images_that_are_held_out(monkeypatch):
    asked = []

    def learn(config, norm, *, side_by_side, prepare):
        asked.append(prepare)
        return lambda resume: iter([])

    monkeypatch.setattr(rates, "learn", learn)
    prepare = lambda data: data._replace(train_labels=data.train_labels + 1)  # noqa: E731
    next(largest_stable(TINY, nl.get("none"), GRID, finite, prepare=prepare)(None))
    data = load("digits", None)
    expected = held_out(prepare(data)).test_labels
    np.testing.assert_array_equal(asked[0](data).test_labels, expected)
