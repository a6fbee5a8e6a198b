"""The questions: each runs to its figure and verdicts; verdicts decide rightly; forms agree."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normlab as nl
from experiments import cli, models, questions
from experiments.data import load
from experiments.questions import (
    delay,
    engine,
    gradient_sync,
    group_size,
    local_drift,
    synced_is_global,
)
from experiments.questions.engine import answer, decide
from experiments.rundir import RunError
from experiments.trainer import FORMS, DeviceData, Trainer, TrainState, minibatches

TINY = {
    "dataset": "digits",
    "model": "tiny",
    "devices": 4,
    "steps": 4,
    "evaluations": 2,
    "seeds": 2,
}
SMALL = {
    "delay": {"every": (1,), "references": False},
    "gradient_sync": {"gradients": ("forward",)},
    "group_size": {"per_devices": (4,), "groups": (1, 4), "ghost": (2,)},
}


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    """One layer of eight sigmoids: what takes time here is compiling."""
    monkeypatch.setitem(models.MODELS, "tiny", functools.partial(models.Mlp, widths=(8,)))


def tiny(name: str) -> engine.Config:
    return dataclasses.replace(questions.require(name).QUICK, **TINY, **SMALL.get(name, {}))


# One trains, one compares types and forms; the others, which only train, take as long again.
QUICK = ("local_drift", "synced_is_global")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in questions.NAMES],
)
def test_every_question_ends_in_a_figure_and_verdicts(name, tmp_path, monkeypatch):
    monkeypatch.setattr(synced_is_global, "LAYER", {"float32": 1e-6})  # float64 takes as long again
    found = answer(questions.require(name), name, tiny(name), tmp_path / "run")
    assert found.complete
    assert found.forms is not None
    assert found.forms < 1e-6
    kept = {path.name for path in found.path.iterdir()}
    assert kept == {
        *("config.json", "environment.json", "records.jsonl"),
        *("verdict.json", "figure.png", "figure.svg"),
    }
    records = [json.loads(r) for r in (found.path / "records.jsonl").read_text().splitlines()]
    assert questions.require(name).verdict(records) == found.verdicts
    written = json.loads((found.path / "verdict.json").read_text())
    assert [v["decision"] for v in written] == [v.decision for v in found.verdicts]
    assert {v.seeds for v in found.verdicts} == {2}
    environment = json.loads((found.path / "environment.json").read_text())
    assert environment["dataset"]["name"] == "digits"


@pytest.mark.parametrize("name", questions.NAMES)
def test_every_question_says_what_it_asks(name):
    question = questions.require(name)
    assert questions.headline(name).endswith("?")
    for word in ("Claim: ", "Protocol: ", f"Command: python -m experiments run {name}"):
        assert word in question.__doc__
    assert question.QUICK.seeds >= 3
    assert question.QUICK != question.FULL


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
        assert decide("", effects, **bounds).decision == decision

    def test_the_interval_is_students(self):
        found = decide("", [1.0, 2.0, 3.0])
        assert (found.effect, found.seeds) == (2, 3)
        half = 4.302652729911275 / math.sqrt(3)  # t of 2 degrees of freedom, times s/√n
        assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))

    def test_orders_of_magnitude_are_judged_by_their_logarithm(self):
        errors = [1e-8, 1e-7, 2e-8]
        assert decide("", errors, at_most=1e-6).decision == "holds"
        found = decide("", errors, at_most=1e-5, geometric=True)
        assert found.effect == pytest.approx(np.prod(errors) ** (1 / 3))
        assert 0 < found.low < 1e-8
        assert found.decision == "holds"


def evaluations(final: dict, **labels) -> list[engine.Record]:
    """Records of a run in which every condition ended with these accuracies."""
    return [
        {"kind": "evaluation", "condition": name, "seed": seed, "step": step, **labels}
        | {"accuracy": value if step == 9 else 10.0}
        for name, values in final.items()
        for seed, value in enumerate(values)
        for step in (5, 9)
    ]


GOOD, SAME, MIXED, BAD = [90.0, 91, 92], [89.9, 91.1, 92], [85.0, 95, 91], [80.0, 81, 82.2]
CASES = [(SAME, "holds"), (MIXED, "undecided"), (BAD, "fails")]


@pytest.mark.parametrize(("delayed", "decision"), CASES)
def test_delay_decides_by_the_accuracy_lost(delayed, decision):
    records = evaluations({"fresh": GOOD, "every 2": delayed, "local": BAD})
    assert delay.verdict(records)[0].decision == decision


@pytest.mark.parametrize(("forward", "decision"), CASES)
def test_gradient_sync_decides_by_the_accuracy_lost(forward, decision):
    records = evaluations({"both": GOOD, "forward": forward, "none": BAD, "local": BAD})
    assert [v.decision for v in gradient_sync.verdict(records)] == [decision, "holds"]


@pytest.mark.parametrize(
    ("alone", "decision"), [(BAD, "holds"), (MIXED, "undecided"), (GOOD, "fails")]
)
def test_group_size_decides_by_the_accuracy_gained(alone, decision):
    records = [
        *evaluations({"2 per device, 1 together": alone}, per_device=2, group=1, together=2),
        *evaluations({"2 per device, 8 together": SAME}, per_device=2, group=8, together=16),
    ]
    assert [v.decision for v in group_size.verdict(records)] == [decision]


@pytest.mark.parametrize(
    ("share", "lost", "decisions"),
    [
        (0.2, 9.0, ["holds"] * 4 + ["fails", "holds"]),
        (0.05, 0.1, ["fails"] * 4 + ["holds", "fails"]),
    ],
)
def test_local_drift_decides_by_the_share_between_devices(share, lost, decisions):
    drifts = [
        {"kind": "drift", "condition": condition, "seed": seed, "step": step, "layer": layer}
        | {"batch": share, "running": share, "sampling": 0.2}
        for condition in ("shuffled", "sorted")
        for seed in range(3)
        for step in (1, 9)
        for layer in "ab"
    ]
    averaging = [
        {"kind": "averaging", "condition": condition, "seed": seed, "step": 9, "lost": lost}
        for condition in ("shuffled", "sorted")
        for seed in range(3)
    ]
    assert [v.decision for v in local_drift.verdict(drifts + averaging)] == decisions


@pytest.mark.parametrize(
    ("error", "synced", "averaged"), [(1e-16, "holds", "fails"), (0.1, "fails", "holds")]
)
def test_synced_is_global_decides_by_the_error(error, synced, averaged):
    records = [
        {"kind": "layer", "condition": name, "dtype": dtype, "form": form, "seed": seed}
        | {"pass": which, "error": error * (1 + seed / 10)}
        for name in synced_is_global.NORMS
        for dtype in synced_is_global.LAYER
        for form in FORMS
        for which in synced_is_global.PASSES
        for seed in range(3)
    ] + [
        {"kind": "training", "condition": name, "dtype": dtype, "seed": seed, "step": 9}
        | {"gap": error, "worst": error}
        for name in synced_is_global.NORMS
        for dtype in synced_is_global.LAYER
        for seed in range(3)
    ]
    decisions = [v.decision for v in synced_is_global.verdict(records)]
    assert decisions == [synced] * 6 + [averaged] * 6


@pytest.mark.parametrize(
    "sync",
    [nl.Sync("data"), nl.Sync("data", groups=2), nl.Sync("data", every=2)],
    ids=["all", "groups", "delayed"],
)
def test_the_forms_take_the_same_steps(sync):
    data = DeviceData(load("digits"), 4)
    kernels = models.draw_kernels("tiny", 10, range(2), data.probe)
    indices = np.stack([minibatches(s, data.examples, 16, 3) for s in range(2)], axis=1)
    model = models.build("tiny", nl.get("batch", axis_name=sync), 10)
    found = []
    for form in FORMS:
        trainer = Trainer(
            model,
            optax.sgd(0.1, momentum=0.9),
            data,
            kernels,
            synced=not sync.every,
            form=form,
            delayed=sync if sync.every else None,
        )
        state, losses = trainer.train(trainer.init(), indices)
        evaluation = trainer.evaluate(state)
        found.append((state, losses, evaluation.loss, evaluation.parts))
    assert engine.relative(*found) < 1e-6
    if sync.every:
        (norm,) = jax.tree.leaves(found[0][0].norm_state, is_leaf=lambda s: hasattr(s, "age"))
        assert (np.asarray(norm.others.count) == 12).all()  # three other devices of four examples


def test_averaging_the_running_statistics_leaves_out_what_lies_between():
    running = nl.Running(
        jnp.array([[[0.0]], [[4.0]]]),
        jnp.array([[[1.0]], [[3.0]]]),
        *(jnp.ones((2, 1), dtype) for dtype in ("float32", "float32", "int32", "int32")),
    )
    state = local_drift.averaged(TrainState((), {"layer": running}, ()))
    after = state.norm_state["layer"]
    assert after.mean.ravel().tolist() == [2.0, 2.0]
    assert after.var.ravel().tolist() == [2.0, 2.0]
    merged = nl.merge_running(jax.tree.map(lambda v: v[:, 0], running))
    assert merged.var.tolist() == [6.0]
    np.testing.assert_allclose(local_drift.shares(running), [4 / 6], rtol=1e-6)


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

    def test_it_prints_a_verdict_and_keeps_the_run(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr(gradient_sync, "QUICK", tiny("gradient_sync"))
        where = ["--run-dir", str(tmp_path / "runs"), "--form", "shard_map"]
        assert cli.main(["run", "gradient_sync", *where]) == 0
        out = capsys.readouterr().out
        assert "forward alone" in out
        assert "2 seeds" in out
        config = json.loads((tmp_path / "runs/gradient_sync/config.json").read_text())
        assert config["form"] == "shard_map"
        assert cli.main(["run", "gradient_sync", *where]) == cli.EXIT_USAGE
        assert "exists already" in capsys.readouterr().err


class _Stopped:
    """A question that is interrupted after `count` records."""

    def __init__(self, count: int) -> None:
        self.count = count

    def run(self, config):
        del config
        yield from evaluations({"fresh": GOOD})[: self.count]
        raise KeyboardInterrupt


def test_an_interrupted_question_keeps_what_it_measured(tmp_path):
    found = answer(_Stopped(3), "stopped", tiny("delay"), tmp_path / "run")
    assert not found.complete
    assert len((found.path / "records.jsonl").read_text().splitlines()) == 3


def test_interrupted_before_a_record_nothing_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        answer(_Stopped(0), "stopped", tiny("delay"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    config = dataclasses.replace(tiny("delay"), per_device=500)
    with pytest.raises(RunError, match="2000 examples"):
        answer(delay, "delay", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
