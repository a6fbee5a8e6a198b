"""The options of `compare`, and a comparison that goes on where it was stopped."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normlab as nl
from normlab.experiments import console as cli
from normlab.experiments.compare import tuning
from normlab.experiments.compare.comparison import Comparison
from normlab.experiments.compare.config import Compare
from normlab.experiments.engine.learn import held_out
from normlab.experiments.rundir import RunError
from normlab.experiments.terminal import EXIT_TERMINATED
from normlab.experiments.training import optimizers
from normlab.experiments.training.augment import augment
from normlab.experiments.training.config import Train
from normlab.experiments.training.trainer import Trainer
from tests.helpers import environment

ROOT = Path(__file__).parents[2]
TINY = Compare(
    dataset="digits", model="mlp", norms=("none", "batch"), batch_size=32, steps=6, evaluations=3,
    seeds=2, devices=2,
)  # fmt: skip
ARGUMENTS = [
    *("--dataset", "digits", "--model", "mlp", "--norms", "none", "batch", "--batch-size", "32"),
    *("--steps", "6", "--evaluations", "3", "--seeds", "2", "--devices", "2"),
]


def run(config: Compare, stop: int | None = None) -> tuple[Comparison, list[tuple[str, int]]]:
    """Runs a comparison, up to a number of turns; returns it with the turns."""
    comparison, turns = Comparison(config), []
    for turn in comparison.run():
        turns.append((turn.norm, turn.step))
        if len(turns) == stop:
            break
    comparison.finish()
    comparison.run_dir.release()  # as the end of the process does
    return comparison, turns


def measured(path: Path) -> list[str]:
    """The records of a run but for times, sorted."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    kept = [{k: v for k, v in json.loads(line).items() if k != "step_seconds"} for line in lines]
    return sorted(map(json.dumps, kept))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run from the first step to the last."""
    path = tmp_path_factory.mktemp("compare") / "whole"
    run(dataclasses.replace(TINY, run_dir=path))
    return path


class TestOptimizers:
    @pytest.fixture(autouse=True)
    def promotion(self):
        """That of a user: optax does not go without."""
        with jax.numpy_dtype_promotion("standard"):
            yield

    @pytest.mark.parametrize("name", ["lion", "nadamw", "sgd:momentum=0.9,nesterov=true", "yogi"])
    def test_rates_that_are_set_later_are_those_of_optax(self, name):
        params = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}
        grads = jax.tree.map(
            lambda v: jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape), params
        )
        make = optimizers.optimizer(name, 3)
        found = []
        for made, lr in ((make(0.1), None), (optimizers.at_rates(make), 0.1)):
            state, at = made.init(params), params
            if lr is not None:
                state = state._replace(hyperparams={"lr": jnp.float32(lr)})
            for _ in range(3):
                updates, state = made.update(grads, state, at)
                at = optax.apply_updates(at, updates)
            found.append(at)
        for got, want in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)

    @pytest.mark.parametrize("name", ["sgd", "adam", "lion", "contrib.muon"])
    def test_weight_decay_leaves_gains_and_biases(self, name):
        params = {"layer": {"kernel": jnp.ones((3, 4))}, "norm": nl.init_affine(4)}
        made = optimizers.optimizer(name, 1, weight_decay=0.1)(0.1)
        updates, _ = made.update(jax.tree.map(jnp.zeros_like, params), made.init(params), params)
        assert (updates["layer"]["kernel"] < 0).all()
        assert all((v == 0).all() for v in jax.tree.leaves(updates["norm"]))

    def test_an_l2_penalty_is_a_part_of_the_gradient_and_is_not_in_adamw(self):
        kernel = {"kernel": jnp.array([[2.0]])}
        zero = {"kernel": jnp.zeros((1, 1))}
        steps = {}
        for name in ("sgd", "adamw"):
            made = optimizers.optimizer(name, 1, weight_decay=0.1)(0.5)
            steps[name] = made.update(zero, made.init(kernel), kernel)[0]["kernel"].item()
        assert steps == {name: pytest.approx(-0.5 * 0.1 * 2) for name in steps}

    @pytest.mark.parametrize(
        ("schedule", "rates"),
        [
            ("cosine", [1, 0.8536, 0.5, 0.1464]),
            ("cosine:alpha=0.5", [1, 0.9268, 0.75, 0.5732]),
            ("linear:end=0.5", [1, 0.875, 0.75, 0.625]),
            ("piecewise:0.5=0.1,0.75=0.1", [1, 1, 0.1, 0.01]),
            ("exponential:rate=0.0001", [1, 0.1, 0.01, 0.001]),
        ],
    )
    def test_a_schedule_multiplies_the_rate_after_the_warm_up(self, schedule, rates):
        made = optimizers.optimizer("sgd", 6, schedule=schedule, warmup=2)(1.0)
        state, found = made.init(jnp.zeros(())), []
        for _ in range(6):
            update, state = made.update(jnp.ones(()), state)
            found.append(-update.item())
        np.testing.assert_allclose(found, [0.5, 1, *rates], rtol=1e-3)


class TestAugment:
    def test_it_mirrors_and_moves_each_image_by_itself(self):
        images = jnp.arange(64 * 8 * 8, dtype=jnp.uint8).reshape(64, 8, 8, 1) | 1
        key = jax.random.key(0)
        flipped = augment(("flip",), key, images)
        mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
        assert 0.2 < mirrored.mean() < 0.8
        assert (mirrored | (flipped == images).all(axis=(1, 2, 3))).all()
        moved = augment(("crop",), key, images)
        assert moved.dtype == images.dtype
        empty = (moved == 0).all(axis=(2, 3)).sum(axis=1)  # rows that came in
        assert {*np.unique(empty).tolist()} == {0, 1}
        np.testing.assert_array_equal(augment((), key, images), images)

    def test_all_norms_and_every_repetition_see_the_same_images(self, tmp_path):
        config = dataclasses.replace(
            TINY, norms=("none",), augment=("flip", "crop"), steps=2, evaluations=1
        )
        losses = []
        for name, more in (("a", {}), ("b", {}), ("c", {"augment": ()})):
            done, _ = run(dataclasses.replace(config, run_dir=tmp_path / name, **more))
            losses.append([r["train_loss"] for r in done.lanes[0].records])
        assert losses[0] == losses[1] != losses[2]


class TestRates:
    def test_a_norm_has_a_rate_of_its_own(self, tmp_path, whole):
        config = dataclasses.replace(TINY, lr_of=("batch=0.3",), run_dir=tmp_path / "own")
        done, _ = run(config)
        rates = {row["norm"]: row["lr"] for row in done.summary()}
        assert rates == {"none": 0.05, "batch": 0.3}
        same = [line for line in measured(whole) if '"norm": "none"' in line]
        assert same == [line for line in measured(tmp_path / "own") if '"norm": "none"' in line]

    def test_rates_are_chosen_on_images_held_out_and_kept_when_a_run_goes_on(
        self, tmp_path, monkeypatch
    ):
        seen = []
        monkeypatch.setattr(
            tuning, "held_out", lambda data: seen.append(held_out(data)) or seen[-1]
        )
        config = dataclasses.replace(
            TINY,
            norms=("batch",),
            devices=1,
            tune=True,
            rates=(0.01, 0.1),
            run_dir=tmp_path / "run",
        )
        _, turns = run(config, 1)
        assert turns == [("batch", 2)]
        lines = [
            json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        ]
        [choice] = [r for r in lines if r["kind"] == "tuning"]
        assert len(choice["rates"]) == 4  # with two is one of them an end
        trials = [r for r in lines if r["kind"] == "screening"]
        assert {r["seed"] for r in trials} == {10_000, 10_001}
        assert {r["step"] for r in trials} == {6}
        assert {r["lr"] for r in lines if r["kind"] == "evaluation"} == {choice["lr"]}
        examples = len(seen[0].test_labels)
        assert all(
            (r["accuracy"] * examples) == pytest.approx(round(r["accuracy"] * examples))
            for r in trials
        )
        done, turns = run(config)
        assert turns[-1] == ("batch", 6)
        assert len(seen) == 1 or done.summary()[0]["tuning"]["rates"] == choice["rates"]
        assert done.summary()[0]["lr"] == choice["lr"]


class TestGoingOn:
    @pytest.mark.parametrize("turns", [1, 3, 5])
    def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(self, tmp_path, whole, turns):
        config = dataclasses.replace(TINY, run_dir=tmp_path / "run")
        _, before = run(config, turns)
        with (tmp_path / "run/metrics.jsonl").open("a") as file:
            file.write('{"kind": "evalu')  # a line that a kill cut
        done, after = run(config)
        assert measured(tmp_path / "run") == measured(whole)
        assert after[-1] == ("batch", 6)
        assert len(after) < 6 or turns < 5
        assert json.loads((tmp_path / "run/summary.json").read_text())["complete"]
        assert not (tmp_path / "run/checkpoints").exists()
        assert len(done.lanes[1].step_seconds) == 3
        assert before

    def test_what_is_done_is_not_trained_again(self, whole, monkeypatch):
        monkeypatch.setattr(Trainer, "compile", lambda *_: pytest.fail("compiled"))
        before = measured(whole)
        done, turns = run(dataclasses.replace(TINY, run_dir=whole))
        assert turns == []
        assert [row["step"] for row in done.summary()] == [6, 6]
        assert measured(whole) == before

    def test_a_directory_of_other_options_is_refused_with_what_differs(self, whole):
        with pytest.raises(RunError, match="--steps 6 and not 12"):
            Comparison(dataclasses.replace(TINY, steps=12, run_dir=whole))

    def test_two_programs_do_not_write_into_one_directory(self, whole):
        first = Comparison(dataclasses.replace(TINY, run_dir=whole))
        try:
            with pytest.raises(RunError, match="another run is writing"):
                Comparison(dataclasses.replace(TINY, run_dir=whole))
        finally:
            first.run_dir.release()

    def test_sigterm_is_taken_as_ctrl_c_and_the_same_command_goes_on(self, tmp_path):
        out = tmp_path / "run"
        command = [
            *(sys.executable, "-m", "normlab.experiments", "compare", *ARGUMENTS),
            *(
                "--devices",
                "1",
                "--steps",
                "200000",
                "--evaluations",
                "2000",
                "--run-dir",
                str(out),
            ),
        ]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 240
            while not (
                (out / "metrics.jsonl").exists()
                and '"step": 200' in (out / "metrics.jsonl").read_text()
            ):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            printed = process.communicate(timeout=120)[0].decode()
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == EXIT_TERMINATED, printed
        assert "terminated: what was done follows" in printed
        assert "Traceback" not in printed
        assert not json.loads((out / "summary.json").read_text())["complete"]
        assert len(os.listdir(out / "checkpoints")) == 2


class TestCommandLine:
    def test_a_config_runs_again_with_other_options(self, whole, tmp_path):
        again = ["compare", "--config", str(whole / "config.json"), "--seeds", "1"]
        assert cli.main([*again, "--run-dir", str(tmp_path / "run")]) == 0
        old, new = (json.loads((p / "config.json").read_text()) for p in (whole, tmp_path / "run"))
        assert {k for k in old if old[k] != new[k]} == {"seeds"}

    def test_a_sweep_has_a_part_for_each_point_and_one_table(self, whole, tmp_path, capsys):
        out = tmp_path / "sweep"
        grid = ["--sweep", "batch_size=16,32", "lr=0.1", "--run-dir", str(out)]
        common = [v for v in ARGUMENTS if v not in ("--batch-size", "32")]
        assert cli.main(["compare", *common, *grid]) == 0
        printed = capsys.readouterr().out
        assert "2 points" in printed
        assert printed.count("batch ") >= 2
        points = json.loads((out / "summary.json").read_text())["points"]
        assert [point["values"] for point in points] == [
            {"batch_size": "16", "lr": "0.1"},
            {"batch_size": "32", "lr": "0.1"},
        ]
        for point in points:
            config = json.loads((out / point["run"] / "config.json").read_text())
            assert str(config["batch_size"]) == point["values"]["batch_size"]

    def test_figures_are_drawn_again_without_the_data(self, whole, monkeypatch, capsys):
        pictures = {file: (whole / file).read_bytes() for file in ("curves.svg", "report.html")}
        for file in pictures:
            (whole / file).unlink()
        monkeypatch.setattr("normlab.experiments.data.load", lambda *_, **__: pytest.fail("loaded"))
        assert cli.main(["figures", str(whole)]) == 0
        assert {file: (whole / file).read_bytes() for file in pictures} == pictures

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--optimizer", "adm"], ["did you mean 'adam'"]),
            (["--optimizer", "sgd:momentm=0.9"], ["did you mean 'momentum'"]),
            (["--optimizer", "adam:weight_decay=0.1"], ["--weight-decay"]),
            (["--optimizer", "lbfgs"], ["it needs the loss"]),
            (["--schedule", "cosin"], ["did you mean 'cosine'"]),
            (["--schedule", "piecewise:2=0.1"], ["SHARE=FACTOR"]),
            (["--lr-of", "layer=0.1"], ["layer is not compared"]),
            (["--lr-of", "batch"], ["NORM=RATE"]),
            (["--lr-of", "batch=0.1", "--tune"], ["no effect beside --tune"]),
            (["--lr", "0.1", "--rates", "0.2", "0.3"], ["--lr 0.1", "no effect beside --rates"]),
            (["--norms", "layer", "--sync", "local"], ["--sync local", "no effect"]),
            (["--devices", "1", "--sync", "local"], ["no effect on one device"]),
            (["--groups", "8"], ["--groups 8", "no effect"]),
            (["--norms", "none", "--decay", "0.5"], ["--decay 0.5", "no effect"]),
            (["--context", "64"], ["--context 64", "no effect on images"]),
            (
                ["--dataset", "markov", "--model", "lm", "--norms", "rms", "--augment", "flip"],
                ["on text"],
            ),
            (["--sweep", "lr=0.1", "lr=0.2"], ["twice"]),
            (["--sweep", "batch=8,16"], ["did you mean 'batch_size'"]),
            (["--sweep", "batch_size=8,16"], ["batch_size is given twice"]),
            (["--sweep", "optimizer=sgd,adm"], ["at optimizer adm", "did you mean 'adam'"]),
            (["--config", "nowhere.json"], ["cannot read it"]),
        ],
    )
    def test_what_has_no_effect_or_is_unknown_is_refused_and_nothing_is_written(
        self, arguments, words, tmp_path, capsys
    ):
        out = tmp_path / "run"
        given = ["compare", *ARGUMENTS, *arguments, "--run-dir", str(out)]
        try:
            status = cli.main(given)
        except SystemExit as stop:  # the parser's own refusals
            status = stop.code
        assert status == cli.EXIT_USAGE
        text = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert all(word in text for word in words), text
        assert not out.exists()

    def test_train_refuses_what_its_norm_is_not_told(self):
        for options, words in (
            ({"norm": "layer", "sync": "local"}, "--sync local: it has no effect on norm layer"),
            ({"norm": "layer", "population": "ema"}, "--population ema: it has no effect"),
            ({"groups": 8}, "--groups 8: it has no effect on norm batch"),
        ):
            with pytest.raises(RunError, match=words):
                Train(dataset="digits", model="mlp", **options)


def test_figures_of_a_question_are_drawn_by_its_command(tmp_path, capsys):
    config = {"question": "figure1", "seeds": 2, "evaluations": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["figures", str(tmp_path)]) == cli.EXIT_USAGE
    assert "Of a question run the same command again" in capsys.readouterr().err
