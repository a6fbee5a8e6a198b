"""The questions: each says what it asks; those of devices decide rightly, and their forms agree."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normlab as nl
from normlab.experiments import models, questions
from normlab.experiments.asking.ask import Answer, ask
from normlab.experiments.asking.reads import unread
from normlab.experiments.data import load
from normlab.experiments.engine import Checkpoint, Config, Record, Records
from normlab.experiments.engine.devices import Lab, forms_gap, relative
from normlab.experiments.questions import (
    delay,
    gradient_sync,
    group_size,
    local_drift,
    synced_is_global,
)
from normlab.experiments.rundir import RunError
from normlab.experiments.training.trainer import FORMS, DeviceData, Trainer, TrainState, minibatches
from tests.experiments.reading import recording
from tests.helpers import judged

TINY = {
    "dataset": "digits",
    "model": "tiny",
    "devices": 4,
    "steps": 4,
    "evaluations": 2,
    "seeds": 2,
    "warmup": 0,
}
TEXT = {"dataset": "markov", "model": "lm", "context": 8, "tests": 8, "width": 8, "depth": 2}
AT_FIRST = {"dataset": "", "width": 16, "depth": 2, "length": 8, "batch_size": 2}
SMALL = {
    "batch_size_conv": {"model": "tiny_conv", "widths": (8,)},
    "delay": {"every": (1,)},
    "adversarial": {"sizes": (0.1, 0.3), "attacked": 20},
    "affine_alone": {"depths": (2,), "rates": (0.01,), "width": 8},
    "angular_equilibrium": {"pool": 2, "width": 4},
    "edge_of_stability": {"rates": (0.1,), "examples": 30, "pool": 2, "width": 4},
    "ghost_batches": {"small": 10, "large": 40, "examples": 80, "epochs": 2, "rates": (0.1,)},
    "gradient_sync": {"gradients": ("forward",)},
    "learning_rate": {"search": 4, "rates": (0.1, 0.2), "tests": 100},
    "fine_tuning": {"model": "tiny_conv"},
    "layer_conv": {"model": "tiny_conv"},
    "norm_share": {"depth": 2, "channels": 8, "side": 4},
    "recurrent": {"model": "lstm", "units": 4},
    "resolution": {"model": "nin", "channels": (4, 4), "side": 6, "larger": (8,)},
    "standardized_weights": {"model": "tiny_conv"},
    "surfaces": {"widths": (6, 6), "images": 50},
    "switchable": {"model": "tiny_conv"},
    "group_size": {"per_devices": (4,), "groups": (1, 4), "ghost": (2,)},
    **dict.fromkeys(("mix_ln", "pre_post_gradient"), AT_FIRST),
    **dict.fromkeys(("dyt_data", "ngpt_steps", "peri_variance", "qk_norm_rate"), TEXT),
    **dict.fromkeys(("rezero_depth", "rms_layer_lm", "warmup"), TEXT),
    "ln_scaling": {**TEXT, "depth": 4},
    "dyt_vit": {"model": "vit", "patch": 4, "width": 8, "depth": 1, "tests": 50},
    "last_layer_norm": {"model": "mlp", "depth": 2, "width": 8, "rates": (0.1,), "short": 4},
    "leakage": {"model": "tiny_conv", "synthetic_steps": 3},
    "noisy_batch_norm": {"strengths": (0.5,), "rates": (0.1,), "images": 50},
    "rank_collapse": {"widths": (8, 16), "middle": 8, "depth": 16},
    "spectral_reshaped": {"model": "vgg", "width": 4, "pool": 1},
}


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    """One layer of a few sigmoids or filters: what takes time here is compiling."""
    for name, model in (("tiny", models.Mlp), ("tiny_conv", models.ConvNet)):
        width = 8 if name == "tiny_conv" else 20
        monkeypatch.setitem(models.MODELS, name, functools.partial(model, widths=(width,)))


def tiny(name: str) -> Config:
    """The quick config with as little as it goes with."""
    quick = questions.require(name).QUICK
    fields = {field.name for field in dataclasses.fields(quick)}
    values = {k: v for k, v in {**TINY, **SMALL.get(name, {})}.items() if k in fields}
    return dataclasses.replace(quick, **values)


def ask_tiny(name: str, where: Path) -> Answer:
    (found,) = ask([(name, questions.require(name), tiny(name))], root=where, jobs=0)
    assert not found.failed
    return found


def test_a_study_of_devices_ends_in_a_figure_and_verdicts(tmp_path):
    found = ask_tiny("gradient_sync", tmp_path)
    gap = forms_gap(found.records)
    assert gap is not None
    assert gap < 1e-6
    written = json.loads((found.path / "verdict.json").read_text())
    assert [v["decision"] for v in written] == [v.decision for v in found.verdicts]
    assert {v.seeds for v in found.verdicts} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("name", questions.NAMES)
def test_every_question_ends_in_a_figure_and_verdicts(name, tmp_path):
    read: set[str] = set()
    config = recording(tiny(name), read)
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        (found,) = ask([(name, questions.require(name), config)], root=tmp_path, jobs=0)
    assert found.verdicts, found.failed
    assert not read & unread(name)  # what is refused as an option would have done something
    assert (found.path / "figure.svg").stat().st_size < 200_000
    (again,) = ask([(name, questions.require(name), tiny(name))], root=tmp_path, jobs=0)
    assert repr(again.verdicts) == repr(found.verdicts)  # NaN is not NaN


@pytest.mark.parametrize("name", questions.NAMES)
def test_every_question_says_what_it_asks(name):
    question = questions.require(name)
    told = questions.describe(name)
    assert told["question"].endswith("?")
    assert set(told) - {"Found"} == {"question", "Claim", "Source", "Protocol", "Command"}
    assert told["Command"] == f"normlab run {name}"
    assert "https://" in told["Source"]
    assert question.QUICK.seeds >= 3
    assert question.QUICK != question.FULL


def evaluations(final: dict, **labels) -> list[Record]:
    """Records of a run in which every condition ended with these accuracies."""
    return [
        {"kind": "evaluation", "condition": name, "seed": seed, "step": step, **labels}
        | {"accuracy": (value if step == 9 else 10.0) / 100}
        for name, values in final.items()
        for seed, value in enumerate(values)
        for step in (5, 9)
    ]


GOOD, SAME, MIXED, BAD = [90.0, 91, 92], [89.9, 91.1, 92], [85.0, 95, 91], [80.0, 81, 82.2]
BEST, MIDDLE = [93.0, 94.1, 95], [88.0, 91, 89.5]
CASES = [(SAME, "holds"), (MIXED, "undecided"), (BAD, "fails")]


@pytest.mark.parametrize(
    ("delayed", "decisions"),
    [
        (BAD, ["holds"] * 3 + ["fails"]),
        (MIXED, ["undecided"] * 4),
        (BEST, ["fails"] * 3 + ["holds"]),
    ],
)
def test_delay_decides_by_the_accuracy_lost(delayed, decisions):
    old = {"every 2": delayed, "every 2, forward": delayed}
    local = [v - 0.5 if delayed is BEST else v for v in MIDDLE]
    records = evaluations({"fresh": GOOD, "fresh, forward": GOOD, "local": local, **old})
    found = judged(delay, records)
    assert [v.decision for v in found] == decisions
    assert [v.id for v in found if v.source] == ["every-2.fresh"]


@pytest.mark.parametrize(("forward", "decision"), CASES)
def test_gradient_sync_decides_by_the_accuracy_lost(forward, decision):
    records = evaluations({"both": GOOD, "forward": forward, "none": BAD, "local": BAD})
    assert [v.decision for v in judged(gradient_sync, records)] == [decision, "holds"]


@pytest.mark.parametrize(("backward", "decision"), [(BAD, "holds"), (SAME, "undecided")])
def test_gradient_sync_holds_where_backward_alone_loses(backward, decision):
    (found,) = judged(gradient_sync, evaluations({"both": GOOD, "backward": backward}))
    assert (found.id, found.decision, found.untuned) == ("backward", decision, True)


BETTER = [93.0, 94.1, 95]


@pytest.mark.parametrize(
    ("alone", "decision", "sized"),
    [
        (BAD, "holds", "holds"),
        (MIXED, "undecided", "undecided"),
        (BETTER, "fails", "fails"),
        ([89.6, 90.8, 91.7], "holds", "fails"),
    ],
)
def test_group_size_decides_by_the_accuracy_gained(alone, decision, sized):
    records = [
        *evaluations({"alone": alone}, per_device=2, group=1, together=2),
        *evaluations({"together": SAME}, per_device=2, group=8, together=16),
    ]
    (found,) = judged(group_size, records)
    assert (found.decision, found.sized) == (decision, sized)
    assert found.source.number == "34.7 → 23.7% error from 2 to 16 together"


def test_group_size_has_no_number_where_its_source_has_none():
    assert group_size.source(8, 64).number == "24.8 → 23.6% error from 8 to 32 together"
    assert group_size.source(3, 24).number == ""


@pytest.mark.parametrize(
    ("share", "lost", "decisions"),
    [
        (0.2, -9.0, ["holds"] * 3 + ["fails"] * 2 + ["fails", "holds", "holds"]),
        (0.005, 0.1, ["fails", "holds", "fails"] + ["holds"] * 3 + ["fails", "holds"]),
    ],
)
def test_local_drift_decides_by_the_share_between_devices(share, lost, decisions):
    drifts = [
        {"kind": "drift", "condition": condition, "seed": seed, "step": step, "layer": layer}
        | {"batch": share, "running": share / part, "sampling": 0.2}
        for condition, part in (("shuffled", 100), ("sorted", 1))
        for seed in range(3)
        for step in (1, 9)
        for layer in "abc"
    ]
    averaging = [
        {"kind": "averaging", "condition": condition, "seed": seed, "step": 9}
        | {"merged": merged, "averaged": merged - lost / 100 + seed / 1e5}
        for condition, merged in (("shuffled", 0.8), ("sorted", 0.7))
        for seed in range(3)
    ]
    found = judged(local_drift, drifts + averaging)
    assert [v.decision for v in found] == decisions


def test_local_drift_evaluates_one_net_with_merged_and_with_averaged_statistics():
    _, by_class = local_drift.run(tiny("local_drift"))
    found = [r for r in by_class.measure(None) if not isinstance(r, Checkpoint)]
    ends = [r for r in found if r["kind"] == "averaging"]
    for key in ("merged", "averaged"):
        values = Records(ends).accuracy(key=key, kind="averaging")
        assert values.shape == (2, 1 + 500)
        np.testing.assert_allclose(values[:, 1:].mean(1), values[:, 0], atol=1)


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
    decisions = [v.decision for v in judged(synced_is_global, records)]
    assert decisions == [synced] * 4 + [averaged]


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
    assert relative(*found) < 1e-6
    if sync.every:
        (norm,) = jax.tree.leaves(found[0][0].norm_state, is_leaf=lambda s: hasattr(s, "age"))
        assert (np.asarray(norm.others.count) == 12).all()  # three other devices of four examples


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("group_size", {"per_devices": (4,), "groups": (2,), "ghost": ()}),
        pytest.param("delay", {}, marks=pytest.mark.slow),
        pytest.param("gradient_sync", {}, marks=pytest.mark.slow),
        pytest.param("synced_is_global", {}, marks=pytest.mark.slow),
    ],
)
def test_a_question_comes_to_the_same_on_a_mesh(name, options):
    config = dataclasses.replace(tiny(name), form="shard_map", **options)
    found = []
    for mesh in ((), (2, 2)):
        here = dataclasses.replace(config, mesh=mesh)
        conditions = list(questions.require(name).run(here))
        records = [r for one in conditions for r in one.measure(None) if isinstance(r, dict)]
        found.append([r for r in records if r["kind"] != "forms"])
        assert ("forms" in {r["kind"] for r in records}) == (not mesh)
    assert found[0]
    for flat, mesh in zip(*found, strict=True):
        assert flat.keys() == mesh.keys()
        for key, value in flat.items():
            close = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert mesh[key] == close


def test_on_a_mesh_hosts_drift_and_not_their_chips():
    config = dataclasses.replace(tiny("local_drift"), form="shard_map", mesh=(2, 2))
    lab = Lab(config)
    _, by_class = local_drift.run(config)
    found = [r for r in by_class.measure(None) if not isinstance(r, Checkpoint)]
    drifts = [r for r in found if r["kind"] == "drift"]
    assert {r["sampling"] for r in drifts} == {1 / 15}  # two hosts of eight examples
    assert all(0 < r["running"] < 1 for r in drifts)
    ends = [r for r in lab.learn(nl.Sync("axis1"), population=local_drift.remembered)][-1]
    own = [v for v in ends.leaves if v.shape == (4, 2, 20)]  # [devices, seeds, C]
    assert len(own) > 4
    for v in own:
        np.testing.assert_allclose(v[0::2], v[1::2], rtol=1e-5, atol=1e-6)
    assert any(np.abs(v[0] - v[2]).max() > 1e-3 for v in own)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mesh": (2, 2)}, "--mesh 2 2: pmap has one axis. Use --form shard_map"),
        ({"mesh": (3, 2), "form": "shard_map"}, "that is 6 devices, and there are 4"),
        ({"mesh": (-2, -2), "form": "shard_map"}, "sizes of at least 1"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(options, said):
    with pytest.raises(RunError, match=said):
        dataclasses.replace(tiny("local_drift"), **options)


def test_averaging_the_running_statistics_leaves_out_what_lies_between():
    running = nl.Running(
        jnp.array([[[0.0]], [[4.0]]]),
        jnp.array([[[1.0]], [[3.0]]]),
        *(jnp.ones((2, 1), dtype) for dtype in ("float32", "float32", "int32", "int32")),
        fresh=jnp.zeros((2, 1, 4)),
    )
    state = local_drift.averaged(TrainState((), {"layer": running}, ()))
    after = state.norm_state["layer"]
    assert after.mean.ravel().tolist() == [2.0, 2.0]
    assert after.var.ravel().tolist() == [2.0, 2.0]
    merged = nl.population.merge_running(jax.tree.map(lambda v: v[:, 0], running))
    assert merged.var.tolist() == [6.0]
    np.testing.assert_allclose(local_drift.shares(running), [4 / 6], rtol=1e-6)
