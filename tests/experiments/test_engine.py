"""The engine of the questions: verdicts, resuming, keeping, faults."""

import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import normlab as nl
from normlab import experiments
from normlab.experiments import console as cli
from normlab.experiments import models, questions, terminal
from normlab.experiments.asking import kept, pool, sources
from normlab.experiments.asking.ask import ask
from normlab.experiments.asking.kept import Kept
from normlab.experiments.engine import (
    Checkpoint,
    Condition,
    Config,
    Records,
    Source,
    decide,
    exact,
    lanes,
    learn,
    shuffled,
)
from normlab.experiments.engine import devices as on_devices
from normlab.experiments.engine.learn import optimizer
from normlab.experiments.rundir import RunError
from normlab.experiments.training.trainer import AXIS
from tests.helpers import CHECKOUT

TINY = Config(
    dataset="digits", model="tiny", batch_size=16, steps=6, evaluations=3, seeds=2, first_seed=0
)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    """One layer of eight sigmoids: what takes time here is compiling."""
    monkeypatch.setitem(models.MODELS, "tiny", functools.partial(models.Mlp, widths=(8,)))


@pytest.fixture
def make(monkeypatch):
    """Makes questions of conditions; returns what `ask` wants."""
    made = {}
    monkeypatch.setattr(questions, "require", made.__getitem__)

    def make(name, conditions, config=TINY):
        made[name] = types.SimpleNamespace(
            SECONDS=1,
            run=lambda config: iter(conditions),
            figure=lambda records: plt.figure(),
            verdict=lambda records: (decide("one", "", [r["value"] for r in records], at_least=0),),
        )
        return name, made[name], config

    return make


def values(*numbers):
    """A condition that measures these."""
    found = [{"kind": "value", "seed": i, "value": v} for i, v in enumerate(numbers)]
    return exact(lambda: iter(found))


class TestDecide:
    @pytest.mark.parametrize(
        ("effects", "bounds", "decision"),
        [
            ([1.0, 1.1, 0.9], {"at_least": 0.5}, "holds"),
            ([0.1, 0.2, 0.0], {"at_least": 0.5}, "fails"),
            ([0.1, 0.6, 0.9], {"at_least": 0.5}, "undecided"),
            ([0.1, 0.2, 0.0], {"at_most": 0.5}, "holds"),
            ([1.0, 1.1, 0.9], {"at_most": 0.5}, "fails"),
            ([0.1, 0.2, 0.0], {"at_least": -0.5, "at_most": 0.5}, "holds"),
            ([-1.0, -1.1, -0.9], {"at_least": -0.5, "at_most": 0.5}, "fails"),
            ([1.0], {"at_least": 0.5}, "undecided"),
            ([], {"at_least": 0.5}, "undecided"),
            ([1.0, math.nan, 1.0], {"at_least": 0.5}, "undecided"),
            ([0.0, 0.0, 0.0], {"at_most": 0.5}, "holds"),
        ],
    )
    def test_a_claim_holds_if_its_whole_interval_does(self, effects, bounds, decision):
        assert decide("one", "", effects, **bounds).decision == decision

    def test_the_interval_is_students(self):
        found = decide("one", "", [1.0, 2.0, 3.0])
        assert (found.effect, found.seeds) == (2, 3)
        half = 4.302652729911275 / math.sqrt(3)  # t of 2 degrees of freedom, times s/√n
        assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))

    def test_orders_of_magnitude_are_judged_by_their_logarithm(self):
        errors = [1e-8, 1e-7, 2e-8]
        assert decide("one", "", errors, at_most=1e-6).decision == "holds"
        found = decide("one", "", errors, at_most=1e-5, geometric=True)
        assert found.effect == pytest.approx(np.prod(errors) ** (1 / 3))
        assert 0 < found.low < 1e-8
        assert found.decision == "holds"

    def test_an_error_of_zero_counts_as_the_smallest_that_is_not(self):
        found = decide("one", "", [0.0, 1e-16, 1e-16], at_most=1e-12, geometric=True)
        assert (found.decision, found.effect) == ("holds", pytest.approx(1e-16))
        assert decide("one", "", [0.0, 0.0], at_most=1e-12, geometric=True).decision == "holds"
        assert (
            decide("one", "", [0.0, 0.0, 5.0], at_least=2, geometric=True).decision == "undecided"
        )

    @pytest.mark.parametrize("largest", [1e99, 1e200, 1.7e308])
    def test_effects_whose_squares_overflow_are_undecided_or_have_an_interval(self, largest):
        found = decide("one", "", [largest, -largest, 1.0], at_least=0)
        assert found.decision == "undecided"
        assert found.low < 0 < found.high

    def test_effects_that_agree_to_rounding_have_an_interval(self):
        found = decide("one", "", [1.0, 1.0 + 1e-16, 1.0 + 3e-16], at_least=0.5)
        assert found.decision == "holds"


def test_the_last_value_of_each_seed_counts():
    records = Records(
        {"kind": "evaluation", "norm": norm, "seed": seed, "step": step, "accuracy": a}
        for norm, seed, step, a in [
            ("a", 0, 1, 0.5),
            ("a", 0, 2, 0.9),
            ("a", 1, 1, 0.92),
            ("a", 1, 2, None),
            ("b", 0, 2, 0.1),
        ]
    )
    np.testing.assert_equal(records.accuracy(norm="a"), [[90.0], [math.nan]])
    assert records.by_seed("accuracy", norm="b").tolist() == [0.1]
    assert records.steps_to(0.9, norm="a").tolist() == [2, 1]
    assert records.steps_to(0.95, norm="a").tolist() == [math.inf, math.inf]
    assert len(records.where(norm="a", seed=1)) == 2


def test_records_are_asked_by_value_by_seed_and_by_step():
    records = Records(
        {"kind": "loss", "norm": norm, "lr": lr, "seed": seed, "step": step, "loss": step + seed}
        for norm, lr in (("b", 1.0), ("a", 1.0), ("a", 0.5))
        for seed in (1, 0)
        for step in (0, 2, 4)
    )
    records.append({"kind": "exact", "seed": 0})
    assert records.values("norm") == ["b", "a"]
    assert records.values("norm", "lr") == [("b", 1.0), ("a", 1.0), ("a", 0.5)]
    assert records.trained().values("step") == [2, 4]
    assert len(records.where(lambda r: r["step"] > 2, norm="a", kind="loss")) == 4
    assert records.by_seed("loss", lr=1.0, of=min).tolist() == [0, 1]
    assert records.by_seed("loss", of=np.mean).tolist() == [2, 3]
    assert records.each_seed(len).tolist() == [10, 9]


def test_a_share_of_steps_is_nan_where_neither_net_comes_there():
    reached = {"a": (10, 40), "b": (20, None), "c": (None, None)}
    records = Records(
        {"kind": "evaluation", "norm": norm, "seed": seed, "step": step}
        | {"accuracy": 0.95 if there is not None and step >= there else 0.5}
        for norm, seeds in reached.items()
        for seed, there in enumerate(seeds)
        for step in (10, 20, 40)
    )

    def share(mine, reference):
        return records.share_of_steps(0.9, {"norm": mine}, {"norm": reference})

    np.testing.assert_equal(share("a", "b"), [0.5, 1.0])
    np.testing.assert_equal(share("a", "c"), [0.25, 1.0])
    np.testing.assert_equal(share("b", "c"), [0.5, math.nan])


def instrument(net):
    return {
        "z": net.activations()["Normed_0"].z.mean(),
        "loss": net.loss(net.params),
        "rate": net.lr,
    }


def two_rates():
    """Two rates side by side, of which one is far too large."""
    rows = lanes(TINY, lr=(0.1, 1e38), sd=(0.5,))
    return learn(TINY, nl.get("batch"), side_by_side=rows, instrument=instrument)


def keep(found):
    """A record, or a checkpoint whose buffers the next step does not take."""
    return (
        found._replace(leaves=jax.device_get(found.leaves))
        if isinstance(found, Checkpoint)
        else found
    )


@pytest.fixture(scope="module")
def trained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", functools.partial(models.Mlp, widths=(8,)))
        return list(map(keep, two_rates()(None)))


class TestLearn:
    def test_every_lane_is_evaluated_before_the_first_step_and_after_each_stretch(self, trained):
        records = [r for r in trained if not isinstance(r, Checkpoint)]
        assert len(records) == 4 * 4
        assert [r["step"] for r in records[::4]] == [0, 2, 4, 6]
        assert {(r["seed"], r["lr"], r["sd"]) for r in records} == {
            (seed, lr, 0.5) for seed, lr in itertools.product(TINY.each_seed, (0.1, 1e38))
        }
        assert json.loads(json.dumps(records)) == records
        assert {type(r["rate"]) for r in records if r["lr"] == 0.1} == {float}

    def test_a_seed_that_diverges_is_a_result(self, trained):
        records = [r for r in trained if not isinstance(r, Checkpoint) and r["step"] == 6]
        for record in records:
            if record["lr"] == 0.1:
                assert record["diverged"] is None
                assert record["accuracy"] > 0.1
            else:
                assert record["diverged"] == 2  # the first update is not finite
                assert record["test_loss"] is None
                assert 0 <= record["accuracy"] <= 0.3  # what it predicts is still counted

    def test_it_goes_on_from_a_checkpoint_to_the_same_numbers(self, trained, tmp_path):
        at = [i for i, r in enumerate(trained) if isinstance(r, Checkpoint)]
        # As the directory keeps it, and brings it back.
        directory = Kept(tmp_path, "test", "key")
        directory.keep("conditions/00.jsonl", kept.Partial(kept._pack([], 0.0, trained[at[0]])))
        _, _, checkpoint = kept._unpack(directory.partial("conditions/00.jsonl"))
        again = list(map(keep, two_rates()(checkpoint)))
        expected = trained[at[0] + 1 :]
        assert [r for r in again if not isinstance(r, Checkpoint)] == [
            r for r in expected if not isinstance(r, Checkpoint)
        ]
        np.testing.assert_equal(again[-1].leaves, expected[-1].leaves)


def test_a_seed_that_diverges_on_several_devices_is_a_result_and_stays_one_when_resumed():
    config = on_devices.Config(
        dataset="digits", model="tiny", devices=2, lr=1e38, steps=4, evaluations=2, seeds=2
    )
    found = list(map(keep, on_devices.learn(config, nl.Sync(AXIS))(None)))
    at = next(i for i, r in enumerate(found) if isinstance(r, Checkpoint))
    assert [r["diverged"] for r in found if not isinstance(r, Checkpoint) and "seed" in r] == [
        2
    ] * 4
    again = list(map(keep, on_devices.learn(config, nl.Sync(AXIS))(found[at])))
    assert again[:-1] == found[at + 1 : -1]
    np.testing.assert_equal(again[-1].leaves, found[-1].leaves)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]),
    ],
)
def test_a_schedule_takes_the_rate_to_zero_at_the_last_step(schedule, shares):
    made = optimizer(dataclasses.replace(TINY, steps=4, schedule=schedule))(0.1)
    state, taken = made.init(jnp.zeros(())), []
    for _ in range(5):
        step, state = made.update(jnp.ones(()), state)
        taken.append(float(step))
    np.testing.assert_allclose(taken, -0.1 * np.array(shares), atol=1e-8)


class _Stops:
    """A measurement of six steps with a checkpoint after each, stopped once after some."""

    def __init__(self, after=None):
        self.after, self.calls = after, []

    def __call__(self, resume):
        start = 0 if resume is None else resume.step
        self.calls.append(start)
        total = 0.0 if resume is None else float(resume.leaves[0])
        for step in range(start + 1, 7):
            if self.after == step:
                self.after = None
                raise KeyboardInterrupt
            total += 1 / step
            yield {"kind": "value", "seed": step, "step": step, "value": total}
            yield Checkpoint(step, [np.float64(total)])


class TestKept:
    def test_an_interrupted_condition_goes_on_to_the_same_numbers(
        self, make, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(kept, "PAUSE", 0)
        whole, stopped = _Stops(), _Stops(after=4)
        (expected,) = ask([make("whole", [Condition({"a": 1}, whole)])], root=tmp_path, jobs=0)
        question = make("stopped", [Condition({"a": 1}, stopped)])
        with pytest.raises(KeyboardInterrupt):
            list(ask([question], root=tmp_path, jobs=0))
        assert list(tmp_path.glob("stopped-*/conditions/*.partial"))
        (found,) = ask([question], root=tmp_path, jobs=0)
        assert stopped.calls == [0, 3]
        assert [r for r in found.records if r["kind"] == "value"] == [
            r for r in expected.records if r["kind"] == "value"
        ]
        assert not list(tmp_path.glob("stopped-*/conditions/*.partial"))

    def test_what_is_finished_is_not_measured_again_unless_asked(self, make, tmp_path):
        measure = _Stops()
        question = make("finished", [Condition({"a": 1}, measure)])
        for again, calls in ((False, 1), (False, 1), (True, 2)):
            (found,) = ask([question], root=tmp_path, jobs=0, again=again)
            assert len(measure.calls) == calls
            assert found.verdicts[0].decision == "holds"
        name, module, config = question
        longer = dataclasses.replace(config, steps=7)
        list(ask([(name, module, longer)], root=tmp_path, jobs=0))
        assert len(measure.calls) == 3  # another config is another run
        moved = dataclasses.replace(config, data_dir=tmp_path)
        list(ask([(name, module, moved)], root=tmp_path, jobs=0))
        assert len(measure.calls) == 3  # the place of the data is not

    def test_the_directory_holds_all_that_was_asked_and_measured(self, make, tmp_path):
        labels = {"norm": "batch", "lr": 0.5}
        (found,) = ask([make("all", [Condition(labels, values(1, 2))])], root=tmp_path, jobs=0)
        assert {str(p.relative_to(found.path)) for p in found.path.rglob("*") if p.is_file()} == {
            *("config.json", "environment.json", "verdict.json", "bounds.json", ".lock"),
            *("figure.png", "figure.svg", "conditions/00-batch-lr-0.5.jsonl"),
        }
        config = json.loads((found.path / "config.json").read_text())
        assert config["steps"] == TINY.steps
        assert [d["name"] for d in config["data"]] == ["digits"]
        assert all({**r, **labels} == r for r in found.records)
        assert found.seconds == found.records[-1]["seconds"]

    def test_two_runs_do_not_write_into_one_directory(self, make, tmp_path):
        question = make("twice", [Condition({"a": 1}, values(1))])
        first = ask([question], root=tmp_path, jobs=0)
        next(first)
        other = make("other", [Condition({"a": 1}, values(1))])
        locked, free = ask([question, other], root=tmp_path, jobs=0)
        assert "another run is writing" in locked.failed
        assert not free.failed
        first.close()
        assert len(list(ask([question], root=tmp_path, jobs=0))) == 1

    def test_a_full_disk_is_said_and_nothing_measured_before_is_lost(
        self, make, tmp_path, monkeypatch
    ):
        write = Kept.write_bytes

        def full(self, name, content):
            if name.startswith("conditions/01"):
                raise self._failed(name, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            return write(self, name, content)

        conditions = [Condition({"a": i}, values(i)) for i in range(3)]
        question = make("full", conditions)
        with monkeypatch.context() as patch:
            patch.setattr(Kept, "write_bytes", full)
            (found,) = ask([question], root=tmp_path, jobs=0)
        assert "No space left on device" in found.failed
        assert "Free some space" in found.failed
        assert not found.verdicts
        assert len(list(found.path.glob("conditions/*.jsonl"))) == 2
        (found,) = ask([question], root=tmp_path, jobs=0)
        assert [r["value"] for r in found.records if r["kind"] == "value"] == [0, 1, 2]

    def test_conditions_of_the_same_name_are_refused(self, make, tmp_path):
        conditions = [Condition({"a": 1}, values(1))] * 2
        (found,) = ask([make("same", conditions)], root=tmp_path, jobs=0)
        assert "the same labels" in found.failed

    def test_the_settings_of_jax_that_decide_numbers_are_in_the_key(self):
        first = kept.key(TINY, "code", [])
        assert kept.key(TINY, "code", []) == first
        with jax.enable_x64(True):
            assert kept.key(TINY, "code", []) != first
        with jax.default_matmul_precision("bfloat16"):
            assert kept.key(TINY, "code", []) != first

    def test_records_that_are_gone_decide_no_verdict(self, make, tmp_path):
        def second():
            next(tmp_path.rglob("00-*.jsonl")).unlink()
            yield {"kind": "value", "seed": 1, "value": 1.0}

        conditions = [Condition({"a": 0}, values(1, 2)), Condition({"a": 1}, exact(second))]
        (found,) = ask([make("gone", conditions)], root=tmp_path, jobs=0)
        assert "00-a-0.jsonl is gone" in found.failed
        assert not found.verdicts


class TestFaults:
    def test_without_a_data_set_the_other_questions_go_on(self, make, tmp_path):
        nowhere = dataclasses.replace(TINY, dataset="mnist", data_dir=tmp_path / "none")
        (tmp_path / "none").write_text("")  # not a folder: nothing can be prepared in it
        asked = [
            make("without", [Condition({"a": 1}, values(1))], nowhere),
            make("with", [Condition({"a": 1}, values(1))]),
        ]
        without, with_ = ask(asked, root=tmp_path / "runs", jobs=0)
        assert (without.name, with_.name) == ("without", "with")
        assert "mnist" in without.failed
        assert without.path is None
        assert with_.verdicts

    def test_an_error_in_one_question_does_not_stop_the_others(self, make, tmp_path):
        def wrong():
            yield {"kind": "value", "seed": 0, "value": 1.0}
            raise ZeroDivisionError("of a kind")

        conditions = {"none": values(1), "batch": exact(wrong)}
        asked = [
            make("wrong", [Condition({"norm": n}, m) for n, m in conditions.items()]),
            make("right", [Condition({"a": 1}, values(1, 1))]),
        ]
        wrong, right = ask(asked, root=tmp_path, jobs=0)
        assert wrong.failed == "ZeroDivisionError: of a kind (in wrong, batch)"
        assert [r["norm"] for r in wrong.records] == ["none", "none"]  # a value and its cost
        assert "line" in (wrong.path / "error.txt").read_text()
        assert right.verdicts[0].decision == "holds"

    def test_an_error_in_a_verdict_or_a_figure_does_not_stop_the_others(self, make, tmp_path):
        asked = [
            make(name, [Condition({"a": 1}, values(1, 1))])
            for name in ("verdict", "figure", "right")
        ]
        for name, module, _ in asked[:2]:
            setattr(module, name, lambda records: records[99])
        *wrong, right = ask(asked, root=tmp_path, jobs=0)
        for answer in wrong:
            assert "list index out of range" in answer.failed
            assert f"in the verdict or the figure of {answer.name}" in answer.failed
            assert not answer.verdicts
            assert answer.seconds >= 0  # what was measured is kept
        assert right.verdicts[0].decision == "holds"

    def test_a_question_that_cannot_begin_does_not_stop_the_others(self, make, tmp_path):
        def run(config):
            raise ValueError("no such width")

        name, module, config = make("wrong", [])
        module.run = run
        right = make("right", [Condition({"a": 1}, values(1, 1))])
        wrong, right = ask([(name, module, config), right], root=tmp_path, jobs=0)
        assert wrong.failed == "ValueError: no such width (in wrong)"
        assert right.verdicts

    def test_what_a_worker_sends_of_an_error_is_text(self, make, tmp_path, monkeypatch):
        class Two(Exception):  # cannot be unpickled, nor pickled
            def __init__(self, one, other):
                super().__init__(f"{one} and {other}")

        def wrong():
            yield {"kind": "value", "seed": 0, "value": 1.0}
            raise Two(1, 2)

        make("wrong", [Condition({"a": 1}, exact(wrong))])
        monkeypatch.setattr(pool, "_heard", types.SimpleNamespace(put=lambda told: None))
        code = sources.version("normlab.experiments.questions.wrong")
        task = pool.Task("wrong", TINY, 0, Kept(tmp_path, "wrong", "key"), 1.0, code)
        sent = pool._measure(0, "wrong", pickle.dumps(task))
        assert sent == "Two: 1 and 2 (in wrong, a 1)"
        assert "UnpicklingError" in pool._measure(0, "wrong", b"x")

    def test_a_worker_goes_on_after_an_error_and_measures_no_code_but_that_of_the_key(
        self, tmp_path
    ):
        name = "figure1"
        wrong = dataclasses.replace(questions.require(name).QUICK, dataset="digits", model="none")
        code = sources.version(f"normlab.experiments.questions.{name}")
        at = Kept(tmp_path, name, "key")
        tasks = [pool.Task(name, wrong, 0, at, 0.5, version) for version in (code, "another")]
        ended = pool.work(tasks, lambda task, share: None, jobs=1, pinned=False)
        said = {done.task.version: done.error for done in ended}
        assert said["another"] == "the sources of figure1 changed while it ran; run it again."
        assert "(in figure1, " in said[code]

    def test_devices_that_are_not_there_leave_one_question_without_an_answer(
        self, make, tmp_path, monkeypatch
    ):
        asked, counts = [make("one", [Condition({"a": 1}, values(1, 1))])], []
        there = jax.device_count()
        for count in (there, there + 1):
            config = on_devices.Config(dataset="digits", devices=count)
            asked.append(make(f"of_{count}", [Condition({"a": 1}, values(1, 1))], config))
        set_devices = pool.set_devices
        monkeypatch.setattr(pool, "set_devices", lambda n: counts.append(n) or set_devices(n))
        found = {answer.name: answer for answer in ask(asked, root=tmp_path, jobs=0)}
        lacks = found.pop(f"of_{there + 1}")
        assert f"needs {there + 1} devices, but there are {there} (cpu)" in lacks.failed
        assert all(answer.verdicts for answer in found.values())
        assert counts[0] == there + 1  # before JAX starts: it makes them once

    def test_a_lane_that_diverged_is_named(self, make, tmp_path):
        found = [
            {"kind": "value", "seed": seed, "lr": 3.0, "step": step, "value": 1.0}
            | {"diverged": 7 if seed else None}
            for seed in (0, 1)
            for step in (5, 10)
        ]
        condition = Condition({"norm": "none"}, exact(lambda: iter(found)))
        (answer,) = ask([make("nan", [condition])], root=tmp_path, jobs=0)
        assert answer.diverged == ("none, seed 1, lr 3.0: not finite from step 7",)


class TestVersion:
    @pytest.fixture
    def files(self, tmp_path, monkeypatch):
        roots = {
            "normlab.experiments": tmp_path / "experiments",
            "normlab": tmp_path / "normlab",
        }
        monkeypatch.setattr(sources, "ROOTS", roots)

        def write(name, text):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return sources.version("normlab.experiments.questions.asked")

        write("normlab/__init__.py", "from normlab.sums import mean\n")
        write("normlab/sums.py", "def mean(x):\n    return sum(x) / len(x)\n")
        write("experiments/other.py", "A = 1\n")
        write("experiments/questions/asked.py", "import normlab\ndef figure(r): return 1\n")
        return write

    def test_it_changes_with_every_source_that_is_imported(self, files):
        first = files("normlab/sums.py", "def mean(x):\n    return sum(x) / len(x)\n")
        assert files("experiments/other.py", "A = 2\n") == first
        second = files("normlab/sums.py", "def mean(x):\n    return sum(x) / (len(x) + 1)\n")
        assert second != first
        asked = "import normlab\nA = 3\ndef run(c): return A\ndef figure(r): return 1\n"
        third = files("experiments/questions/asked.py", asked)
        assert third != second
        assert files("experiments/questions/asked.py", asked.replace("3", "4")) != third

    def test_what_judges_the_records_does_not_count(self, files):
        asked = "import normlab\nA, B = 3, 4\nM = 1\ndef run(c): return inner(c)\n"
        asked += "def inner(c): return M\ndef verdict(r): return help(r)\ndef help(r): return A\n"
        first = files("experiments/questions/asked.py", asked)
        judged = asked.replace("A, B = 3, 4", "A, B = 5, 4").replace("return A", "return A + 1")
        assert files("experiments/questions/asked.py", judged) == first
        for part in ("M = 1", "return M"):
            changed = asked.replace(part, part.replace("M", "N"))
            assert files("experiments/questions/asked.py", changed) != first

    def test_it_does_not_change_with_what_is_imported_for_types_alone(self, files):
        package = "import typing\nif typing.TYPE_CHECKING:\n    from normlab import sums\n"
        first = files("normlab/__init__.py", package)
        assert files("normlab/sums.py", "def mean(x):\n    return 0\n") == first
        asked = "from normlab import sums\ndef figure(r): return 1\n"
        second = files("experiments/questions/asked.py", asked)
        assert files("normlab/sums.py", "def mean(x):\n    return 1\n") != second

    @pytest.mark.parametrize(
        "package", ["experiments", "experiments/questions", "normlab", "normlab/devices"]
    )
    def test_it_changes_with_the_packages_that_a_module_is_in(self, files, package):
        files("normlab/devices/merging.py", "A = 1\n")
        asked = "from normlab.devices.merging import A\ndef figure(r): return 1\n"
        first = files("experiments/questions/asked.py", asked)
        init = f"{package}/__init__.py"
        assert files(init, '"""Words."""\n') != first  # that it is one
        assert files(init, '"""Words."""\nfrom jax import config\n') != first
        assert files(init, '"""Other words."""\n') == files(init, '"""Words."""  # a\n')

    def test_code_that_changes_during_a_run_is_not_measured(self, files, make, tmp_path):
        def edits():
            yield {"kind": "value", "seed": 0, "value": 1.0}
            files("normlab/sums.py", "def mean(x):\n    return 0\n")

        conditions = [Condition({"a": 0}, exact(edits)), Condition({"a": 1}, values(1))]
        (found,) = ask([make("asked", conditions)], root=tmp_path / "runs", jobs=0)
        assert found.failed == "the sources of asked changed while it ran; run it again."
        assert [r["a"] for r in found.records if r["kind"] == "value"] == [0]

    def test_words_and_pictures_do_not_count(self, files):
        first = files("experiments/other.py", "A = 1\n")
        sums = '"""Sums."""\n\n\ndef mean(x):  # the\n    """Mean."""\n    return sum(x) / len(x)\n'
        assert files("normlab/sums.py", sums) == first
        asked = '"""Asked?"""\nimport normlab\nSECONDS = 9\ndef figure(r): return 2\n'
        asked += "def verdict(r): return 3\n"
        assert files("experiments/questions/asked.py", asked) == first

    def test_a_question_depends_on_the_norms_and_the_trainer_and_not_on_the_page(self):
        modules = sources._closure("normlab.experiments.questions.figure1")
        used = {
            "normlab.batch",
            "normlab.experiments.training.trainer",
            "normlab.experiments.engine.learn",
        }
        assert used <= set(modules)
        shown = {
            "normlab.experiments.asking.page",
            "normlab.experiments.console",
            "normlab.experiments.figures",
        }
        assert not shown & set(modules)


class TestConfig:
    @pytest.mark.parametrize("field", ["steps", "evaluations", "seeds", "batch_size"])
    def test_a_number_below_one_is_refused(self, field):
        text = f"--{field.replace('_', '-')}: got 0; it must be 1 or more"
        with pytest.raises(RunError, match=text):
            dataclasses.replace(TINY, **{field: 0})

    def test_more_evaluations_than_steps_are_refused(self):
        with pytest.raises(RunError, match="--evaluations: got 7, but --steps is 6"):
            dataclasses.replace(TINY, evaluations=7)

    @pytest.mark.parametrize("rate", [0.0, -0.1, math.inf, math.nan])
    def test_a_rate_that_trains_nothing_is_refused(self, rate):
        with pytest.raises(RunError, match=f"--lr: got {rate}; it must be positive and finite"):
            dataclasses.replace(TINY, lr=rate)

    @pytest.mark.parametrize(("field", "near"), [("dataset", "digits"), ("optimizer", "adam")])
    def test_an_unknown_name_is_refused_with_the_nearest(self, field, near):
        with pytest.raises(RunError, match=f"--{field}.*'{near}s'.*did you mean '{near}'"):
            dataclasses.replace(TINY, **{field: f"{near}s"})

    def test_a_batch_larger_than_the_data_is_refused(self):
        images = np.zeros((15, 8, 8, 1), np.uint8)
        data = types.SimpleNamespace(name="digits", train_inputs=images)
        with pytest.raises(RunError, match="--batch-size: got 16, but digits has 15"):
            shuffled(0, data, TINY)


class TestCommand:
    def test_an_unknown_question_names_the_nearest(self, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", "group_sise"])
        assert stop.value.code == cli.EXIT_USAGE
        assert "did you mean 'group_size'" in capsys.readouterr().err

    def test_the_questions_are_listed(self, capsys):
        assert cli.main(["list"]) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in questions.NAMES)

    def test_an_unknown_field_of_the_config_is_refused(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["run", "group_size", "--", "--speed", "3"])
        assert "--speed" in capsys.readouterr().err

    def test_a_config_that_measures_nothing_is_refused(self, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", "figure1", "--", "--seeds", "0"])
        assert stop.value.code == cli.EXIT_USAGE
        said = capsys.readouterr().err
        assert "--seeds: got 0; it must be 1 or more" in said
        assert "Traceback" not in said

    def test_a_page_in_the_place_of_its_verdicts_is_refused(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", "--out", str(tmp_path / "x.json")])
        assert stop.value.code == cli.EXIT_USAGE
        assert "x.html" in capsys.readouterr().err

    def test_an_archive_that_is_no_zip_file_is_refused(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", "--archive", str(tmp_path / "records.tar")])
        assert stop.value.code == cli.EXIT_USAGE
        assert "records.zip" in capsys.readouterr().err


class TestReport:
    """`report` and `verify` over two questions, of which one lacks its data."""

    @pytest.fixture
    def asked(self, make, tmp_path, monkeypatch):
        text = {"question": "Is it so?", "Claim": "It is.", "Source": "A paper."}
        monkeypatch.setattr(questions, "describe", lambda name: text)
        monkeypatch.setattr(questions, "NAMES", ("has", "lacks"))
        (tmp_path / "none").write_text("")

        def asked(*found, lacks=True):
            _, module, _ = make("has", [Condition({"norm": "batch"}, values(*found))])
            module.QUICK = TINY
            _, module, _ = make("lacks", [Condition({"norm": "batch"}, values(1, 2))])
            module.QUICK = dataclasses.replace(TINY, dataset="mnist" if lacks else "digits")
            monkeypatch.setenv("NORMLAB_DATA_DIR", str(tmp_path / "none"))

        return asked

    def command(self, name, tmp_path, *more):
        where = ["--run-dir", str(tmp_path / "runs")]
        return cli.main([name, "--jobs", "0", *where, *map(str, more)])

    def test_the_page_says_what_is_missing(self, asked, tmp_path, capsys):
        asked(1.0, 1.1)
        out = tmp_path / "out" / "page.html"
        assert self.command("report", tmp_path, "--out", out) == terminal.EXIT_MISSING
        said = capsys.readouterr()
        assert "lacks has no answer" in said.err
        assert str(out) in said.out.replace("\n", "")
        page = out.read_text()
        assert "Is it so?" in page
        assert "mnist, of which nothing was measured" in page
        assert "none needed" not in page
        verdicts = json.loads(out.with_suffix(".json").read_text())["verdicts"]
        assert [v["decision"] for v in verdicts["has"]] == ["holds"]
        assert verdicts["lacks"] == []
        assert 'id="has.one"' in page
        assert "threshold (not locked)" in page
        assert f'property="og:image" content="{out.stem}.png"' in page
        beside = {file.name for file in out.parent.iterdir()} - {out.name, f"{out.stem}.png"}
        assert beside == {"page.json", "page-sources.bib"} | {
            f"page-{name}.{kind}" for name in ("claims", "effects") for kind in ("csv", "parquet")
        }
        assert all(f'href="{name}"' in page for name in beside)
        effects = pd.read_csv(out.with_name("page-effects.csv"))
        assert list(effects.id) == ["has.one"] * 2
        assert list(effects.seed) == list(TINY.each_seed)
        assert list(effects.effect) == [1.0, 1.1]

    def test_the_archive_holds_what_was_answered(self, asked, tmp_path, capsys):
        asked(1.0, 1.1)
        packed = tmp_path / "out" / "records.zip"
        out = ("--out", tmp_path / "out" / "page.html", "--archive", packed)
        assert self.command("report", tmp_path, *out) == terminal.EXIT_MISSING
        assert "records.zip" in capsys.readouterr().out.replace("\n", "")
        frame = experiments.load("has", packed)
        assert list(frame[frame.kind == "value"].value) == [1.0, 1.1]
        with pytest.raises(RunError, match="no finished run of lacks; it has has"):
            experiments.load("lacks", packed)
        first = packed.read_bytes()
        assert self.command("report", tmp_path, *out) == terminal.EXIT_MISSING
        assert packed.read_bytes() == first

    def test_a_source_that_is_not_in_the_file_is_refused_with_the_nearest(
        self, asked, tmp_path, capsys
    ):
        asked(1.0, lacks=False)
        cites = decide("two", "it is so", [1.0, 1.1], at_least=0, source=Source("iofe2015"))
        questions.require("has").verdict = lambda records: (cites,)
        out = tmp_path / "out" / "page.html"
        assert self.command("report", tmp_path, "--out", out) == cli.EXIT_USAGE
        said = " ".join(capsys.readouterr().err.split())
        assert "has.two cites 'iofe2015' (did you mean 'ioffe2015'" in said
        assert not out.exists()

    def test_the_terminal_shows_what_a_claim_was_asked_and_comes_to(
        self, asked, tmp_path, capsys, monkeypatch
    ):
        asked(1.0, lacks=False)
        found = decide("two", "it is so", [1.0, 1.1], at_least=0, size=5, untuned=True, unit="nats")
        questions.require("has").verdict = lambda records: (found,)
        monkeypatch.setattr(terminal.console, "_width", 200)
        assert self.command("run", tmp_path, "has") == 0
        (line,) = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("│ two")
        ]
        assert [cell.strip() for cell in line.split("│")[1:-1]] == [
            *("two", "1.05 nats [0.41, 1.69]", "≥ 0", "≥ 5: fails", "0.030", "holds (untuned)"),
        ]

    def test_verify_tells_a_verdict_that_differs(self, asked, tmp_path, capsys):
        asked(1.0, 1.1, lacks=False)
        out = tmp_path / "page.html"
        assert self.command("report", tmp_path, "--out", out) == 0
        against = ("--against", out.with_suffix(".json"))
        assert self.command("verify", tmp_path, *against) == 0
        asked(-1.0, -1.1, lacks=False)
        capsys.readouterr()
        assert self.command("verify", tmp_path, "--again", *against) == terminal.EXIT_MISSING
        said = capsys.readouterr().out
        assert "holds, 1.05" in said
        assert "fails, -1.05" in said
        assert self.command("verify", tmp_path, "--against", tmp_path / "no.json") == cli.EXIT_USAGE

    @pytest.mark.parametrize(
        "text",
        [
            *("[]", "{}", '{"verdicts": []}', '{"verdicts": {}}', '{"verdicts": {"has": [1]}}'),
            '{"verdicts": {"has": [{"id": "one", "decision": "holds", "effect": "much"}]}}',
        ],
    )
    def test_verify_refuses_a_report_that_says_nothing(self, asked, tmp_path, capsys, text):
        asked(1.0, 1.1)
        (tmp_path / "no.json").write_text(text)
        assert self.command("verify", tmp_path, "--against", tmp_path / "no.json") == cli.EXIT_USAGE
        assert "no.json" in capsys.readouterr().err.replace("\n", "")

    @pytest.mark.parametrize("where", ["a claim", "a question", "a config"])
    def test_verify_tells_what_is_not_here_any_more(self, asked, tmp_path, capsys, where):
        asked(1.0, 1.1, lacks=False)
        out = tmp_path / "page.html"
        assert self.command("report", tmp_path, "--out", out) == 0
        said = json.loads(out.with_suffix(".json").read_text())
        (verdict,) = said["verdicts"]["has"]
        if where == "a claim":
            said["verdicts"]["has"].append({**verdict, "id": "has.two"})
        elif where == "a question":
            said["verdicts"]["was"] = [verdict]
        else:
            said["configs"]["has"]["steps"] = 99
        out.with_suffix(".json").write_text(json.dumps(said))
        capsys.readouterr()
        against = ("--against", out.with_suffix(".json"))
        assert self.command("verify", tmp_path, *against) == terminal.EXIT_MISSING
        table = capsys.readouterr().out
        assert table.count("differs") == 1
        told = {"a claim": "has.two", "a question": "was", "a config": "(config) steps"}
        assert told[where] in table

    def test_a_file_that_cannot_be_imported_does_not_stop_the_others(
        self, asked, tmp_path, monkeypatch, capsys
    ):
        asked(1.0, 1.1)
        require = questions.require

        def broken(name):
            if name == "lacks":
                raise ImportError("no module named so")
            return require(name)

        monkeypatch.setattr(questions, "require", broken)
        out = tmp_path / "page.html"
        assert self.command("report", tmp_path, "--out", out) == terminal.EXIT_MISSING
        assert "ImportError: no module named so" in capsys.readouterr().err
        assert "ImportError: no module named so" in out.read_text()
        assert json.loads(out.with_suffix(".json").read_text())["verdicts"]["has"]

    def test_a_question_named_twice_is_asked_once(self, asked, tmp_path, capsys):
        asked(1.0, 1.1)
        assert self.command("run", tmp_path, "has", "has") == 0
        assert capsys.readouterr().out.count("holds") == 1
        assert self.command("report", tmp_path, "has", "has", "--out", tmp_path / "x.html") == 0

    def test_interrupted_it_says_that_all_is_kept(self, asked, make, tmp_path, monkeypatch, capsys):
        asked(1.0, lacks=False)
        _, module, _ = make("has", [Condition({"norm": "batch"}, _Stops(after=3))])
        module.QUICK = TINY
        with pytest.raises(SystemExit) as stop:
            self.command("run", tmp_path, "has")
        assert stop.value.code == terminal.EXIT_INTERRUPTED
        assert "what was measured is kept; the same command goes on" in capsys.readouterr().err
        _, module, _ = make("has", [Condition({"norm": "batch"}, _Stops(after=3))])
        module.QUICK = TINY
        with pytest.raises(SystemExit):
            self.command("run", tmp_path, "has", "--again")
        assert "the same command without --again goes on" in capsys.readouterr().err
        assert self.command("run", tmp_path, "has") == 0

    def test_a_failing_verdict_does_not_fail_the_command(self, asked, tmp_path, capsys):
        asked(-1.0, -1.1, lacks=False)
        assert self.command("run", tmp_path, "has") == 0
        assert "fails" in capsys.readouterr().out

    def test_a_page_that_cannot_be_written_is_said(self, asked, tmp_path, capsys):
        asked(1.0, lacks=False)
        assert self.command("report", tmp_path, "--out", tmp_path / "none" / "x.html") == 2
        assert "Choose another place with --out" in capsys.readouterr().err


@pytest.mark.slow
class TestProcesses:
    COMMAND = (
        *(sys.executable, "-m", "normlab.experiments", "run", "figure1", "--jobs", "2"),
        *("--run-dir",),
    )
    CONFIG = ("--", "--steps", "4000", "--evaluations", "40", "--seeds", "2")

    def start(self, where: Path) -> subprocess.Popen:
        command = [*self.COMMAND, str(where), *self.CONFIG]
        return subprocess.Popen(
            command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def records(self, where: Path) -> dict[str, list]:
        return {
            path.name: [r for r in map(json.loads, path.read_text().splitlines())][:-1]
            for path in sorted(where.glob("figure1-*/conditions/*.jsonl"))
        }

    def test_killed_in_the_middle_it_goes_on_to_the_same_numbers(self, tmp_path, monkeypatch):
        """kill -9 of everything while a checkpoint is there, and then of one worker."""
        whole = self.start(tmp_path / "whole")
        whole.communicate()
        assert whole.returncode == 0
        killed = self.start(tmp_path / "killed")
        until = time.monotonic() + 300
        while not list((tmp_path / "killed").glob("*/conditions/*.partial")):
            assert time.monotonic() < until
            assert killed.poll() is None, killed.communicate()[0]
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        again = self.start(tmp_path / "killed")
        text, _ = again.communicate()
        assert again.returncode == 0, text
        expected = self.records(tmp_path / "whole")
        assert len(expected) == 2
        assert self.records(tmp_path / "killed") == expected
