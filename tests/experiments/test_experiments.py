"""The experiments: the trainer's numbers, the main job end to end, and what it refuses."""

import ast
import importlib
import inspect
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

import normlab as nl
from normlab.experiments import console as cli
from normlab.experiments import figures, models
from normlab.experiments.compare.comparison import Comparison
from normlab.experiments.compare.config import COMMON, Compare
from normlab.experiments.compare.tables import remarks
from normlab.experiments.data import Dataset
from normlab.experiments.engine import Records
from normlab.experiments.numerics import family
from normlab.experiments.rundir import RunDirectory, RunError
from normlab.experiments.terminal import console
from normlab.experiments.training.config import Train, takes
from normlab.experiments.training.tasks import Classification
from normlab.experiments.training.trainer import (
    AXIS,
    QUANTILES,
    DeviceData,
    Trainer,
    minibatches,
    stretches,
)
from tests.helpers import environment

ROOT = Path(__file__).parents[2]
TINY = ["--dataset", "digits", "--steps", "6", "--evaluations", "2", "--batch-size", "16"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Random images with a pattern per class, in the shape of small MNIST."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500, dtype=np.int32)
    noise = rng.integers(0, 200, (500, 8, 8, 1))
    patterns = np.random.default_rng(1).integers(0, 56, (10, 8, 8, 1))
    images = (noise + patterns[labels]).astype(np.uint8)
    return Dataset(
        "patterns", images[:397], labels[:397], images[397:], labels[397:], 10, "made here", ""
    )


def make_trainer(
    data: Dataset,
    devices: int,
    model: str,
    name: str,
    *,
    seeds: int = 1,
    synced: bool = True,
    **more,
) -> Trainer:
    options = {
        "batch": {"axis_name": AXIS if synced and devices > 1 else None},
        "group": {"groups": 4},
        "layer": {"axes": "all"},
        "weight": {"data_init": True},
    }
    device_data = DeviceData(data, devices)
    kernels = models.draw_kernels(model, data.classes, range(seeds), device_data.probe)
    network = models.build(model, nl.get(name, **options.get(name, {})), data.classes)
    optimizer = optax.sgd(0.1, momentum=0.9)
    return Trainer(network, optimizer, device_data, kernels, synced=synced, **more)


def run_steps(trainer: Trainer, steps: int, batch: int = 32):
    indices = [minibatches(s, trainer.data.examples, batch, steps) for s in range(trainer.seeds)]
    return trainer.train(trainer.init(), np.stack(indices, axis=1))


def slow(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


class TestTrainer:
    @pytest.mark.parametrize(
        ("model", "name"),
        [
            *(("mlp", "batch"), ("mlp", "cosine")),
            *slow(("mlp", name) for name in COMMON if name not in ("instance", "batch", "cosine")),
            *slow(("conv", name) for name in ("batch", "instance", "cosine")),
        ],
    )
    def test_eight_devices_take_the_steps_of_one_with_the_whole_batch(self, data, model, name):
        many, losses = run_steps(make_trainer(data, 8, model, name), 3)
        one, expected = run_steps(make_trainer(data, 1, model, name), 3)
        np.testing.assert_allclose(losses, expected, rtol=2e-5)
        first, last = (jax.tree.map(lambda v, i=i: v[i], many) for i in (0, 7))
        chex.assert_trees_all_close(first, jax.tree.map(lambda v: v[0], one), rtol=2e-4, atol=2e-5)
        chex.assert_trees_all_equal(first, last)

    @pytest.mark.parametrize(("devices", "form"), [(1, "pmap"), (8, "shard_map")])
    def test_microbatches_have_the_gradient_of_the_batch(self, data, devices, form):
        options = {"form": form, "synced": True}
        whole, _ = run_steps(make_trainer(data, devices, "mlp", "none", **options), 2, 64)
        trainer = make_trainer(data, devices, "mlp", "none", **options, microbatches=4)
        chex.assert_trees_all_close(
            run_steps(trainer, 2, 64)[0].params, whole.params, rtol=1e-4, atol=1e-6
        )

    @pytest.mark.parametrize(("devices", "form"), [(1, "pmap"), (8, "shard_map")])
    def test_microbatches_are_one_update_of_the_statistics(self, data, devices, form):
        """Those of the first norm, whose input no norm has changed, are the whole batch's."""
        trainer = make_trainer(data, devices, "mlp", "batch", form=form, microbatches=4)
        state, _ = run_steps(trainer, 1, 64)
        norm = jax.tree.map(lambda v: v[:, 0], state.norm_state["Normed_0"]["norm"])
        assert (norm.updates == 1).all()
        np.testing.assert_allclose(norm.count, 64)
        chosen = data.train_inputs[minibatches(0, len(data.train_inputs), 64, 1)[0]]
        x = np.asarray(trainer.data.preprocess(chosen), np.float64).reshape(64, -1)
        a = x @ np.asarray(trainer.kernels["Normed_0"]["kernel"][0], np.float64)
        for device in range(devices):
            np.testing.assert_allclose(norm.mean[device], a.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(norm.var[device], a.var(0), rtol=1e-4)

    @pytest.mark.parametrize("microbatches", [1, 2])
    def test_statistics_of_a_step_that_is_not_finite_are_not_committed(self, data, microbatches):
        trainer = make_trainer(data, 1, "mlp", "batch", microbatches=microbatches)
        start = trainer.init()
        params = jax.tree.map(lambda v: v * np.nan, start.params["Dense_0"])
        spoiled = start._replace(params={**start.params, "Dense_0": params})
        before = jax.tree.map(np.asarray, start.norm_state)
        rows = minibatches(0, len(data.train_inputs), 32, 1)[:, None]
        after, losses = trainer.train(spoiled, rows)
        assert np.isnan(losses).all()
        for layer, norm in after.norm_state.items():
            expected = before[layer]["norm"]
            chex.assert_trees_all_equal(
                norm["norm"], expected._replace(skipped=norm["norm"].skipped)
            )
            assert (norm["norm"].skipped == 1).all()

    @pytest.mark.parametrize("devices", [1, 8])
    def test_a_step_follows_the_gradient_of_the_global_loss(self, data, devices):
        trainer = make_trainer(data, devices, "mlp", "batch")
        before = jax.tree.map(lambda v: np.asarray(v[0, 0]), trainer.init())
        chosen = minibatches(0, len(data.train_inputs), 32, 1)
        after, _ = trainer.train(trainer.init(), chosen[:, None])

        alone = make_trainer(data, 1, "mlp", "batch")
        batch = data.train_inputs[chosen[0]], data.train_labels[chosen[0]], jnp.array(chosen[0])
        expected = jax.grad(lambda p: alone.loss(p, before.norm_state, *batch)[0])(before.params)
        moved = jax.tree.map(lambda old, new: (old - new[0, 0]) / 0.1, before.params, after.params)
        chex.assert_trees_all_close(moved, expected, rtol=1e-3, atol=1e-5)

    def test_local_statistics_differ_between_devices_and_are_pooled_to_evaluate(self, data):
        trainer = make_trainer(data, 8, "mlp", "batch", synced=False)
        state, _ = run_steps(trainer, 3)
        mean = np.asarray(state.norm_state["Normed_0"]["norm"].mean)  # [devices, seeds, C]
        assert np.abs(mean - mean[:1]).max() > 1e-3
        shift = trainer.evaluate(state).parts["Normed_0"].mu
        pooled = np.quantile(mean[:, 0].mean(axis=0), QUANTILES)
        np.testing.assert_allclose(shift[0], pooled, rtol=1e-4, atol=1e-6)

    def test_a_seed_does_not_depend_on_its_neighbours(self, data):
        alone, _ = run_steps(make_trainer(data, 1, "mlp", "batch", seeds=1), 3)
        beside, _ = run_steps(make_trainer(data, 1, "mlp", "batch", seeds=3), 3)
        for got, want in zip(jax.tree.leaves(beside), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[:, :1], want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("devices", [1, 8])
    def test_evaluation_counts_every_test_example_once(self, data, devices, monkeypatch):
        monkeypatch.setattr(Classification, "batch", 5)  # 103 examples: padding in the last
        trainer = make_trainer(data, devices, "mlp", "layer")
        state = trainer.init()
        one = jax.tree.map(lambda v: v[0, 0], state)
        logits = trainer.model.apply(
            {"params": one.params, models.STATE: one.norm_state},
            trainer.data.preprocess(data.test_inputs),
            train=False,
        )
        evaluation = trainer.evaluate(state)
        right = np.mean(np.argmax(logits, -1) == data.test_labels)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, data.test_labels).mean()
        np.testing.assert_allclose(evaluation.accuracy[0], right, rtol=1e-6)
        np.testing.assert_allclose(evaluation.loss[0], loss, rtol=1e-5)

    def test_training_learns_the_patterns(self, data):
        trainer = make_trainer(data, 8, "conv", "batch")
        _, losses = run_steps(trainer, 40)
        assert losses[-1].mean() < 0.7 * losses[0].mean()

    def test_all_norms_start_from_the_same_kernels(self, data):
        kernels = [
            np.asarray(make_trainer(data, 1, "mlp", name).init().params["Normed_1"]["kernel"])
            for name in ("none", "weight", "batch")
        ]
        np.testing.assert_array_equal(kernels[0], kernels[1])
        np.testing.assert_array_equal(kernels[0], kernels[2])

    def test_data_dependent_init_normalizes_the_probe_batch(self, data):
        trainer = make_trainer(data, 1, "mlp", "weight")
        params = jax.tree.map(lambda v: v[0, 0], trainer.init().params)
        x = trainer.data.probe.reshape(len(trainer.data.probe), -1)
        layer = params["Normed_0"]
        h = nl.affine(
            nl.weight_parts(nl.Site(x @ layer["kernel"], x, layer["kernel"]), layer["norm"]),
            x @ layer["kernel"],
        )
        np.testing.assert_allclose(h.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(h.std(0), 1, atol=1e-4)

    def test_minibatches_are_shuffled_epochs_fixed_by_the_seed(self):
        first = minibatches(3, 100, 20, 10)
        np.testing.assert_array_equal(first, minibatches(3, 100, 20, 10))
        assert not np.array_equal(first, minibatches(4, 100, 20, 10))
        np.testing.assert_array_equal(np.sort(first[:5].ravel()), np.arange(100))
        np.testing.assert_array_equal(np.sort(first[5:].ravel()), np.arange(100))
        assert not np.array_equal(first[:5], first[5:])


class TestModels:
    @pytest.mark.parametrize("size", [7, *slow([(8,)])])
    @pytest.mark.parametrize("strides", [1, 2, (2, 1)])
    @pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 2), (1, 0))])
    def test_matmul_conv_is_conv_with_its_gradients(self, size, strides, padding):
        keys = jax.random.split(jax.random.key(0), 2)
        x = jax.random.normal(keys[0], (2, size, size, 3))
        w = jax.random.normal(keys[1], (3, 2, 3, 4))
        fast, plain = (c(strides=strides, padding=padding) for c in (models.MatmulConv, nl.Conv))
        for f in (fast, plain):
            assert f(x, w).shape == plain(x, w).shape
        np.testing.assert_allclose(fast(x, w), plain(x, w), rtol=1e-5, atol=1e-5)
        got, want = (
            jax.grad(lambda x, w, f=f: jnp.sin(f(x, w)).sum(), (0, 1))(x, w) for f in (fast, plain)
        )
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    def test_parts_are_sown_layer_by_layer(self, data):
        trainer = make_trainer(data, 1, "conv", "cosine")
        parts = trainer.evaluate(trainer.init()).parts
        assert list(parts) == ["Normed_0", "Normed_1", "Normed_2"]
        assert all(v.shape == (1, 3) for four in parts.values() for v in four)


class TestCompare:
    def test_the_main_job_leaves_a_table_figures_and_every_measurement(self, tmp_path, capsys):
        out = tmp_path / "run"
        arguments = ["compare", *TINY, "--seeds", "2", "--devices", "2", "--run-dir", str(out)]
        assert cli.main(arguments) == 0
        printed = capsys.readouterr().out
        summary = json.loads((out / "summary.json").read_text())
        assert summary["complete"]
        assert [row["norm"] for row in summary["norms"]] == list(COMMON)
        assert all(name in printed for name in COMMON)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        evaluations = [r for r in records if r["kind"] == "evaluation"]
        assert len(evaluations) == len(COMMON) * 2 * 3  # norms, seeds, steps 0, 3, 6
        assert {r["step"] for r in evaluations} == {0, 3, 6}
        parts = [r for r in records if r["kind"] == "part"]
        assert len(parts) == len(evaluations) * 3 * 4  # layers, parts
        for row in summary["norms"]:
            final = [
                r["accuracy"] for r in evaluations if r["norm"] == row["norm"] and r["step"] == 6
            ]
            assert row["accuracy_mean"] == pytest.approx(np.mean(final))
            assert row["accuracy_sd"] == pytest.approx(np.std(final, ddof=1))
        config = json.loads((out / "config.json").read_text())
        assert config["steps"] == 6
        found = json.loads((out / "environment.json").read_text())
        assert found["packages"]["jax"] == jax.__version__
        assert found["dataset"]["origin"].startswith("scikit-learn")
        for name in ("curves", "parts"):
            assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert b"<svg" in (out / f"{name}.svg").read_bytes()

    @pytest.mark.parametrize(
        ("axes", "numbers", "norms"),
        [
            ("inner", "groups=2", ("batch",)),
            *slow(
                [
                    ("inner+every=2", "groups=2+every=2", ("batch", "weight")),
                    ("local", "local", ("batch",)),
                ]
            ),
        ],
    )
    def test_groups_of_a_mesh_are_groups_by_number(self, tmp_path, axes, numbers, norms):
        """A shard_map over two axes beside a pmap over one."""
        ends = []
        for name, sync, mesh in (("mesh", axes, (4, 2)), ("flat", numbers, ())):
            config = Compare(
                dataset="digits", model="mlp", norms=norms, sync=sync, mesh=mesh, batch_size=32,
                steps=4, evaluations=1, seeds=2, run_dir=tmp_path / name,
            )  # fmt: skip
            comparison = Comparison(config)
            list(comparison.run())
            ends.append([r for lane in comparison.lanes for r in lane.records])
            assert json.loads((tmp_path / name / "config.json").read_text())["mesh"] == [*mesh]
        losses = [[(r["test_loss"], r["train_loss"] or 0) for r in end] for end in ends]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        assert {r["step"] for r in ends[0]} == {0, 4}

    def test_a_norm_that_diverges_is_a_result_and_the_others_go_on(self, tmp_path):
        config = Compare(
            dataset="digits", model="mlp", norms=("none", "batch"), optimizer="sgd", lr=1e38,
            steps=4, evaluations=2, seeds=2, devices=1, run_dir=tmp_path / "run",
        )  # fmt: skip
        comparison = Comparison(config)
        turns = [turn.norm for turn in comparison.run()]
        assert turns.count("batch") >= 1
        rows = {row["norm"]: row for row in comparison.summary()}
        assert set(rows["none"]["diverged"]) == {"0", "1"}
        assert rows["none"]["accuracy_mean"] is None
        comparison.finish()
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        assert any("none: the loss of seed 1 was not finite" in r for r in remarks(comparison))

    def test_steps_to_the_target_and_the_share_of_the_norm_follow_from_the_records(self, tmp_path):
        config = Compare(
            dataset="digits", model="mlp", norms=("none", "layer"), steps=4, evaluations=2,
            seeds=2, devices=1, target=0.5, run_dir=tmp_path / "run",
        )  # fmt: skip
        comparison = Comparison(config)
        for lane, ms in zip(comparison.lanes, ([1.0, 2.0], [4.0, 4.0]), strict=True):
            lane.step_seconds = ms
            lane.records = Records(
                {"kind": "evaluation", "lr": config.lr, "seed": seed, "step": step}
                | {"accuracy": accuracy, "test_loss": 1.0, "diverged": None}
                for seed, accuracies in enumerate(([0.1, 0.6, 0.9], [0.1, 0.2, 0.7]))
                for step, accuracy in zip((0, 2, 4), accuracies, strict=True)
            )
        layer = comparison.summary()[1]
        assert layer["steps_to_target"] == 3  # the median of 2 and 4
        assert layer["norm_share"] == pytest.approx(0.625)  # the median of 3/4 and 1/2
        assert layer["accuracy_mean"] == pytest.approx(0.8)

    def test_a_seed_that_diverges_in_the_last_step_is_told(self, tmp_path):
        config = Compare(
            dataset="digits", model="mlp", norms=("layer",), optimizer="sgd", lr=3e38,
            steps=1, evaluations=1, seeds=2, devices=1, run_dir=tmp_path / "run",
        )  # fmt: skip
        comparison = Comparison(config)
        list(comparison.run())  # the loss of the only step is that of the initial weights
        assert comparison.summary()[0]["diverged"] == {"0": 1, "1": 1}
        assert len(remarks(comparison)) == 2

    def test_stopping_at_any_time_leaves_a_summary(self, tmp_path):
        config = Compare(
            dataset="digits", model="mlp", norms=("none", "layer"), steps=4, evaluations=2,
            seeds=1, devices=1, run_dir=tmp_path / "run",
        )  # fmt: skip
        comparison = Comparison(config)
        comparison.finish()  # before anything was measured
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["norms"] == []
        run = comparison.run()
        next(run)  # one turn of the first norm alone
        assert "curves.png" in comparison.finish()
        rows = json.loads((tmp_path / "run" / "summary.json").read_text())["norms"]
        assert [(row["norm"], row["step"]) for row in rows] == [("none", 2), ("layer", 0)]

    def test_stretches_cover_all_steps_once(self):
        for steps, count in ((600, 10), (7, 3), (5, 5), (1, 1)):
            cut = stretches(steps, count)
            assert [i for start, stop in cut for i in range(start, stop)] == list(range(steps))
            assert len(cut) == count

    def test_every_norm_has_a_colour_and_a_marker_of_its_own(self):
        own = [f"package.module:norm{i}" for i in range(30)]
        styles = figures.styles([*nl.names(), *own, "Adam", "local"])
        looks = [(style["color"], style["marker"]) for style in styles.values()]
        assert set(styles) == {*nl.names(), *own, "Adam", "local"}
        assert len(set(looks)) == len(looks)
        few = figures.styles([own[3], *own])
        assert all(few[name] == styles[name] for name in own)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of one's own, with a norm in it."""
    (tmp_path / "own_norms.py").write_text(
        "import normlab as nl\n\n\n"
        "def whole(*, eps=1e-5):\n    return nl.get('layer', axes='all', eps=eps)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_norms:whole"
    sys.modules.pop("own_norms", None)


class TestNormsOfOnesOwn:
    def test_a_norm_named_by_its_place_is_compared(self, mine, tmp_path, capsys, monkeypatch):
        out = tmp_path / "run"
        monkeypatch.setattr(console, "width", 120)
        own = ["--model", "mlp", "--norms", mine, "layer", "--devices", "1", "--seeds", "1"]
        assert cli.main(["compare", *TINY, *own, "--eps", "0.1", "--run-dir", str(out)]) == 0
        assert mine in capsys.readouterr().out
        found = {mine: [], "layer": []}
        for line in (out / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "evaluation":
                found[record["norm"]].append((record["test_loss"], record["accuracy"]))
        assert found[mine] == found["layer"]  # with the same ε
        assert mine in (out / "curves.svg").read_text()

    def test_a_norm_named_by_its_place_is_trained(self, mine, tmp_path):
        config = Train(norm=mine, model="mlp", dataset="digits", eps=0.5)
        assert config.norm_of(mine).init(nl.Site(jnp.ones((2, 3))))[0].g.shape == (3,)
        assert json.loads(json.dumps(config.as_json()))["norm"] == mine

    def test_a_norm_keeps_what_it_has_by_itself(self):
        run, own = Train(groups=4), Train(groups=4, eps=0.1)
        for name in ("rms", "frn", "whitening", "evo_b0", "weight_standardization"):
            options = dict(run.norm_of(name).made.options)
            assert "eps" not in options
            assert dict(own.norm_of(name).made.options)["eps"] == 0.1
            assert options.get("groups") == (4 if name == "whitening" else None)
        assert dict(run.norm_of("group").made.options)["groups"] == 4

    def test_the_axis_of_the_data_is_told_to_what_measures_the_batch_alone(self):
        for name in nl.names():
            measures = nl.row(name).axis_of == "batch" and name != "weight"
            assert takes(name, "axis_name") == measures, name
        assert Train().norm_of("layer", "data") == Train().norm_of("layer")
        assert dict(Train().norm_of("batch", "data").made.options)["axis_name"] == "data"

    @pytest.mark.parametrize(
        ("norm", "words"),
        [
            ("nowhere_at_all:norm", ["nowhere_at_all"]),
            ("own_norms:hole", ["own_norms", "'hole'", "did you mean 'whole'"]),
        ],
    )
    def test_what_is_missing_of_a_place_is_named(self, mine, norm, words, tmp_path, capsys):
        out = tmp_path / "run"
        for command in (["compare", "--norms"], ["train", "--norm"]):
            arguments = [*command, norm, "--run-dir", str(out)]
            try:
                status = cli.main(arguments)
            except SystemExit as stop:
                status = stop.code
            captured = capsys.readouterr()
            assert status == cli.EXIT_USAGE
            text = " ".join((captured.out + captured.err).replace("│", " ").split())
            assert all(word in text for word in words), text
            assert not out.exists()

    def test_a_registered_norm_has_a_look_of_its_own_and_leaves_the_others_theirs(self, mine):
        before = figures.styles(nl.names())
        row = nl.row(mine)._replace(name="whole")
        nl.register(row)
        try:
            after = figures.styles([*nl.names(), "Adam"])
            assert Train(norm="whole").norm == "whole"
        finally:
            nl.unregister("whole")
        looks = [(style["color"], style["marker"]) for style in after.values()]
        assert len(set(looks)) == len(looks) == len(before) + 2
        assert {name: after[name] for name in before} == before


def test_a_figure_is_closed_when_it_is_encoded_and_can_be_encoded_again():
    first = plt.figure()
    first.gca().plot([1, 2], [3, 4])
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        assert figures.encode(first, kind).startswith(start)
        assert first.number not in plt.get_fignums()


REFUSED = {
    "norm": (["--norms", "bach"], ["did you mean 'batch'", "centred_cosine"]),
    "data set": (["--dataset", "mnits"], ["did you mean 'mnist'", "cifar10"]),
    "model": (["--model", "cnov"], ["did you mean 'conv'", "mlp"]),
    "option": (["--stepz", "3"], ["--stepz", "--steps"]),
    "choice": (["--optimizer", "adm"], ["adm", "adam"]),
    "sync": (["--sync", "locale"], ["--sync locale", "did you mean 'local'"]),
    "inner": (["--sync", "inner"], ["inner needs a mesh of several axes", "--mesh 4 2"]),
    "axis": (["--mesh", "4", "2", "--sync", "together=chip"], ["no axis 'chip'", "axis0, axis1"]),
    "mesh": (["--mesh", "4", "4"], ["--mesh 4 4", "16 devices", "there are 8"]),
    "no mesh": (["--mesh", "8", "0"], ["--mesh: got 8 0", "at least 1"]),
    "sync of devices": (
        ["--dataset", "digits", "--norms", "batch", "--sync", "groups=3"],
        ["--norms batch --sync groups=3", "groups of 3 for 8 devices", "groups of 2"],
    ),
    "batch": (["--batch-size", "100"], ["100", "8", "96", "104"]),
    "large batch": (["--dataset", "digits", "--batch-size", "8000"], ["8000", "1437"]),
    "groups": (["--dataset", "digits", "--groups", "5"], ["groups=5", "8 channels", "1, 2, 4, 8"]),
    "instance": (
        ["--dataset", "digits", "--model", "mlp", "--norms", "instance"],
        ["instance", "positions", "--norms"],
    ),
    "devices": (["--dataset", "digits", "--devices", "16"], ["--devices 16", "there are 8"]),
    "twice": (["--norms", "batch", "batch"], ["distinct"]),
    "lr": (["--lr", "0"], ["--lr", "positive"]),
    "eps": (["--eps", "-1"], ["--eps", "positive"]),
    "decay": (["--decay", "1"], ["--decay", "[0, 1)"]),
    "evaluations": (["--steps", "5", "--evaluations", "6"], ["--evaluations", "--steps"]),
}


class TestBadInput:
    @pytest.mark.parametrize("case", REFUSED)
    def test_refused_with_what_to_change_and_nothing_written(self, case, tmp_path, capsys):
        arguments, words = REFUSED[case]
        out = tmp_path / "run"
        try:
            status = cli.main(["compare", *arguments, "--run-dir", str(out)])
        except SystemExit as stop:  # the parser's own refusals
            status = stop.code
        captured = capsys.readouterr()
        text = " ".join((captured.out + captured.err).replace("│", " ").split())
        assert status == cli.EXIT_USAGE, text
        for word in words:
            assert word in text
        assert "Traceback" not in text
        assert not out.exists()

    def test_an_existing_run_directory_is_never_written_into(self, tmp_path, capsys):
        (tmp_path / "precious").write_text("mine")
        assert cli.main(["compare", *TINY, "--run-dir", str(tmp_path)]) == cli.EXIT_USAGE
        assert "exists already" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["precious"]

    def test_a_write_that_fails_names_the_file_and_keeps_what_was_whole(self, tmp_path):
        run = RunDirectory(tmp_path / "run", "test")
        run.write_json("config.json", {"a": 1})
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
        try:
            with pytest.raises(RunError, match=r"config\.json.*before is whole.*--run-dir"):
                run.write_json("config.json", {"a": "long " * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, handler)
        assert json.loads((run.path / "config.json").read_text()) == {"a": 1}
        assert [p.name for p in run.path.iterdir()] == ["config.json"]

    def test_a_disk_that_fills_up_during_a_run_still_ends_in_the_table(self, tmp_path):
        out = tmp_path / "run"
        command = (
            "ulimit -f 24; exec "  # no file beyond 24 KiB
            f"{sys.executable} -m normlab.experiments compare --dataset digits --model mlp --norms "
            f"none layer --steps 400 --evaluations 40 --devices 1 --run-dir {out}"
        )
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == cli.EXIT_USAGE, done.stderr
        assert f"cannot write {out / 'checkpoints'}" in done.stderr
        assert "Traceback" not in done.stderr
        assert "none" in done.stdout
        assert "stopped after" in " ".join(done.stdout.split())
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert len(lines) > 10
        assert all(json.loads(line) for line in lines)

    def test_an_interrupted_compilation_leaves_no_directory(self, tmp_path, monkeypatch, capsys):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "compile", interrupt)
        out = tmp_path / "run"
        assert cli.main(["compare", *TINY, "--run-dir", str(out)]) == cli.EXIT_INTERRUPTED
        assert "interrupted" in capsys.readouterr().err
        assert not out.exists()

    def test_ctrl_c_leaves_what_was_done(self, tmp_path):
        out = tmp_path / "run"
        command = [
            *(sys.executable, "-m", "normlab.experiments", "compare", "--dataset", "digits"),
            *("--model", "mlp", "--norms", "none", "batch", "--steps", "200000"),
            *("--evaluations", "2000", "--devices", "1", "--run-dir", str(out)),
        ]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            metrics = out / "metrics.jsonl"
            deadline = time.monotonic() + 120
            while not (metrics.exists() and '"step": 300' in metrics.read_text()):
                assert time.monotonic() < deadline, "no progress"
                assert process.poll() is None, process.communicate()[0].decode()
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            printed = process.communicate(timeout=60)[0].decode()
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == cli.EXIT_INTERRUPTED, printed
        assert "interrupted" in printed
        assert "Traceback" not in printed
        summary = json.loads((out / "summary.json").read_text())
        assert not summary["complete"]
        steps = [row["step"] for row in summary["norms"]]
        assert min(steps) >= 200
        assert max(steps) >= 300
        assert (out / "curves.png").exists()


class TestCommandLine:
    def test_list_names_everything_there_is(self, capsys):
        assert cli.main(["list"]) == 0
        printed = capsys.readouterr().out
        for name in (*nl.names(), *models.MODELS, "mnist", "digits", "delay"):
            assert name in printed

    def test_data_says_where_a_set_came_from(self, capsys):
        assert cli.main(["data", "digits"]) == 0
        printed = capsys.readouterr().out
        assert "1437" in printed
        assert "360" in printed

    @pytest.mark.parametrize("command", [[], ["compare"], ["data"], ["list"]])
    def test_help_teaches(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0
        assert "usage:" in capsys.readouterr().out

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_the_list_of_commands_says_what_each_is_for(self, name):
        where, sentence = cli.COMMANDS[name]
        folder, _, options = where.partition(":")
        config = importlib.import_module(f".{folder}.config", cli.__package__)
        command = importlib.import_module(f".{folder}.command", cli.__package__)
        told = inspect.getdoc(getattr(config, options))
        assert " ".join(told.split("\n\n")[0].split()) == sentence
        assert len(inspect.signature(command.run).parameters) == 1

    def test_the_list_of_commands_loads_none_of_them(self):
        code = "import sys; from normlab.experiments.console import main\n"
        code += "try: main(['--help'])\n"
        code += "except SystemExit: print(*{name.partition('.')[0] for name in sys.modules})"
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "invariances" in run.stdout
        loaded = set(run.stdout.splitlines()[-1].split())
        assert "tyro" in loaded
        assert loaded.isdisjoint({"jax", "flax", "matplotlib", "numpy", "scipy"})

    def test_it_runs_under_another_name(self, tmp_path):
        """As `elsewhere.experiments`, where to import `experiments` is an error."""
        here = Path(cli.__file__).parent
        shutil.copytree(
            here, tmp_path / "elsewhere" / here.name, ignore=shutil.ignore_patterns("__pycache__")
        )
        (tmp_path / "normlab").symlink_to(here.parent / "normlab")
        (tmp_path / "experiments.py").write_text("raise ImportError\n")

        def run(*arguments):
            command = [sys.executable, *arguments]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        name, small = "ignored_gradient", ("--seeds", "2", "--steps", "100")
        program = ("-m", "elsewhere.experiments")
        assert f"usage: python {' '.join(program)}" in run(*program, "--help")
        run(*program, "run", name, "--jobs", "1", "--", *small)
        (verdicts,) = tmp_path.glob("runs/questions/*/verdict.json")
        assert len(json.loads(verdicts.read_text())) == 3
        code = "from elsewhere.experiments.asking import sources\n"
        code += f"print(*sources._closure('elsewhere.experiments.questions.{name}'))"
        counted = run("-c", code).split()
        assert {"elsewhere.experiments.engine.question", "normlab.equation"} <= set(counted)

    def test_no_message_names_the_package(self):
        for path in Path(cli.__file__).parent.rglob("*.py"):
            tree = ast.parse(path.read_text())
            words = [n for n in ast.walk(tree) if isinstance(n, ast.Expr | ast.Constant)]
            told = {id(n.value) for n in words if isinstance(n, ast.Expr)}  # documentation
            for node in words:
                if isinstance(node, ast.Constant) and id(node) not in told:
                    assert not re.search(
                        r"-m experiments|(?<!normlab\.)experiments\.", str(node.value)
                    ), path


# The tables.


def markdown(capsys, *arguments: str) -> list[list[str]]:
    assert cli.main([*arguments, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_algorithms_shows_which_are_safe(capsys):
    headings, _, *rows = markdown(capsys, "numerics", "--examples", "1024", "--rounds", "1")
    at = headings.index("mean 10000")
    error = {name: float(cells[at - 1]) for name, *cells in rows if cells[0] == "float32"}
    assert error["one_pass"] > 0.1
    assert error["flax.linen"] > 0.1
    for name in ("shifted", "two_pass", "Chan's merge of 8 shards"):
        assert error["floor"] <= error[name] < 1e-3
    document = (Path(__file__).parents[2] / "docs/numerics.md").read_text()
    assert f"| {' | '.join(headings)} |" in document
    assert all(f"| {name} | {dtype} |" in document for name, dtype, *_ in rows)


@pytest.mark.slow
def test_the_table_of_invariances_shows_where_eps_breaks_them(capsys):
    """√ε is the spread at which a norm starts to scale by ε; where there is no ε nothing breaks."""
    _, _, *rows = markdown(capsys, "invariances", "--eps", "1e-9")
    breaks = {(name, column): at for name, column, *_, at in rows}
    for (name, column), at in breaks.items():
        assert column in nl.row(name).invariances
        if "a" in nl.row(name).needs:
            assert 1e-5 < float(at) < 1e-1
        else:
            assert at == "never"
    assert ("batch", "data rescaled") in breaks


def test_the_picture_of_the_family_has_a_panel_for_every_norm(tmp_path):
    names = ("batch", "group", "evo_s0", "local", "recurrent_batch", "whitening")
    figure = family.picture(names)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["a", *(name.replace("_", " ") for name in names)]
    points = [axes.collections[0].get_offsets() for axes in figure.axes[: len(titles)]]
    assert not any(np.allclose(points[0], other) for other in points[1:])
    out = tmp_path / "family.svg"
    assert cli.main(["family", "--norms", "rms", "--out", str(out)]) == 0
    assert "±" in out.read_text()
