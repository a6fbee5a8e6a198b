"""Sweeps: the grid and what it refuses, one table of all points, and an answer in Python."""

import csv
import dataclasses
import functools
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from normlab.experiments import console as cli
from normlab.experiments import models, questions, terminal
from normlab.experiments.asking import ask as asking
from normlab.experiments.asking import reads, sweep
from normlab.experiments.asking.ask import answer
from normlab.experiments.asking.fields import grid, words
from normlab.experiments.asking.kept import Kept
from normlab.experiments.engine import Condition, Config, decide, exact
from normlab.experiments.rundir import RunError
from tests.helpers import CHECKOUT, environment

TINY = Config(dataset="", steps=4, evaluations=2, seeds=3)


class Question:
    """A question whose effect is the rate; it claims two things, and one of them at each rate.

    Attributes:
      calls: The rate and the number of seeds of everything that was measured.
      stop: The rate at which Ctrl-C comes, once.
      wrong: The rate at which an error comes.
    """

    SECONDS = 3
    QUICK = TINY
    FULL = dataclasses.replace(TINY, steps=400)

    def __init__(self):
        self.calls, self.stop, self.wrong = [], None, None

    def run(self, config):
        def measure():
            if config.lr == self.stop:
                self.stop = None
                raise KeyboardInterrupt
            if config.lr == self.wrong:
                raise ZeroDivisionError("of a kind")
            self.calls.append((config.lr, config.seeds))
            for seed in range(config.seeds):
                diverged = 7 if config.lr > 10 else None
                found = {"kind": "value", "seed": seed, "step": 4, "lr": config.lr}
                yield {**found, "value": config.lr * (1 + seed / 10), "diverged": diverged}

        yield Condition({"norm": "batch"}, exact(measure))

    def figure(self, records):
        return plt.figure()

    def verdict(self, records):
        effects = records.by_seed("value")
        yield decide("small", "it is small", effects, at_most=0.5, unit="nats")
        yield decide(f"lr-{records[0]['lr']:g}", f"it is {records[0]['lr']}", effects, at_least=0)


@pytest.fixture
def question(monkeypatch):
    made = Question()
    monkeypatch.setattr(questions, "require", {"has": made, "other": Question()}.__getitem__)
    monkeypatch.setattr(questions, "NAMES", ("has", "other"))
    return made


@pytest.fixture
def run(question, tmp_path, monkeypatch):
    """Runs the command in this process; returns its exit status."""
    monkeypatch.setattr(terminal.console, "_width", 200)

    def run(*arguments, names=("has",)):
        where = ["--jobs", "0", "--run-dir", str(tmp_path)]
        try:
            return cli.main(["run", *names, *where, *arguments])
        except SystemExit as stop:
            return stop.code

    return run


def written(where: Path, name: str = "has"):
    """The lines of the CSV, and the JSON."""
    (table,) = where.glob(f"sweep-{name}-*.csv")
    lines = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    return lines, json.loads(table.with_suffix(".json").read_text(encoding="utf-8"))


class TestGrid:
    def test_the_points_are_the_product_and_the_last_field_varies_fastest(self):
        found = grid("has", TINY, ["lr=0.01,0.1", "batch-size=8,16", "seeds=2"])
        assert [point.values for point in found] == [
            {"lr": lr, "batch_size": size, "seeds": 2} for lr in (0.01, 0.1) for size in (8, 16)
        ]
        assert found[1].name == "lr 0.01, batch_size 16, seeds 2"
        assert found[1].config == dataclasses.replace(TINY, lr=0.01, batch_size=16, seeds=2)

    def test_a_value_of_several_words_is_written_as_in_a_shell(self):
        figure1 = questions.require("figure1").QUICK
        found = grid("figure1", figure1, ["norms=none,none batch", "starts=0.1 0.1 1 0.5"])
        assert [point.values["norms"] for point in found] == [("none",), ("none", "batch")]
        assert found[0].values["starts"] == ((0.1, 0.1), (1.0, 0.5))
        assert found[1].name == "norms none batch, starts 0.1 0.1 1.0 0.5"

    @pytest.mark.parametrize("name", questions.NAMES)
    def test_every_field_of_every_question_is_read_as_it_is_written(self, name):
        question = questions.require(name)
        aside = {"data_dir", *reads.unread(name)}
        for config in (question.QUICK, question.FULL):
            fields = [f.name for f in dataclasses.fields(config) if f.name not in aside]
            values = {field: words(getattr(config, field)) for field in fields}
            given = [f"{field}={value or shlex.quote('')}" for field, value in values.items()]
            (point,) = grid(name, config, given)
            assert repr(point.config) == repr(config)

    def test_fields_are_judged_together_and_not_one_by_one(self):
        config = dataclasses.replace(TINY, evaluations=3)
        (point,) = grid("has", config, ["steps=2", "evaluations=2"])
        assert (point.config.steps, point.config.evaluations) == (2, 2)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ([], "got no field"),
            (["lr"], "got 'lr'; it must be FIELD=VALUE,VALUE"),
            (["lr="], "got 'lr='; it must be FIELD=VALUE"),
            (["lr=0.1,"], "it must be FIELD=VALUE"),
            (["=0.1"], "it must be FIELD=VALUE"),
            (["lr=0.1", "has"], "got 'has'.*Names of questions stand before it"),
            (["norms='a"], "No closing quotation"),
            (["rate=0.1"], "has has no field 'rate': did you mean .* Known: dataset, model"),
            (["seed=3"], "did you mean 'seeds'"),
            (["lr=0.1", "lr=0.2"], "lr is given twice"),
            (["batch_size=4", "batch-size=8"], "batch_size is given twice"),
            (["lr=0.1,0.10"], "lr is 0.1 twice"),
            (["lr=nan,nan"], "lr is nan twice"),
            (["data_dir=a,b"], "does not depend on data_dir. Give it once, as --data-dir"),
            (["lr=0.1", "seeds=3,0"], "at lr 0.1, seeds 0. --seeds: got 0; it must be 1 or more"),
            (["lr=0.1,-1"], "at lr -1.0. --lr: got -1.0; it must be positive and finite"),
            (["lr=inf"], "--lr: got inf; it must be positive and finite"),
            (["steps=4,1"], "at steps 1. --evaluations: got 2, but --steps is 1"),
            (["optimizer=sgd,adm"], "at optimizer adm. .* did you mean 'adam'"),
            (["dataset=mnits"], "did you mean 'mnist'"),
            (["model=mlpp"], "at model mlpp. unknown model 'mlpp': did you mean 'mlp'"),
            (
                [f"{f}={','.join(map(str, range(1, 401)))}" for f in ("lr", "seeds")],
                "160,000 point",
            ),
        ],
    )
    def test_what_is_no_grid_is_refused_by_name(self, given, said):
        with pytest.raises(RunError, match=f"^--sweep.*{said}"):
            grid("has", TINY, given)

    def test_a_norm_that_there_is_not_is_refused_before_anything_runs(self):
        config = questions.require("initialization").QUICK
        said = r"at norms \('none', 'bach'\)|at norms none bach"
        with pytest.raises(RunError, match=rf"({said}).*--norms: .*did you mean 'batch'"):
            grid("initialization", config, ["norms=none batch,none bach"])

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ("lr=0.1,x", "could not convert string to float: 'x'"),
            ("seeds=1.5", "invalid literal for int() with base 10: '1.5'"),
            ("seeds=1 2", "Unrecognized options: 2"),
        ],
    )
    def test_a_value_of_another_type_is_refused_as_the_option_would_be(self, given, said, capsys):
        with pytest.raises(SystemExit) as stop:
            grid("has", TINY, [given])
        assert stop.value.code == cli.EXIT_USAGE
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


class TestTable:
    def test_every_point_has_a_row_here_in_csv_and_in_json(self, run, tmp_path, capsys):
        assert run("--sweep", "lr=0.1,0.45", "seeds=2,3", "--", "--batch-size", "8") == 0
        said = capsys.readouterr()
        assert "has: 4 points (2 lr × 2 seeds), about 10 s of one core" in said.err
        assert "│ 0.1  │ 2     │ ✓ 0.105 │ ✓ 0.105 │         │ has-" in said.out
        assert "│ 0.45 │ 3     │ ? 0.495 │         │ ✓ 0.495 │ has-" in said.out
        assert "1  has.small: it is small, ≤ 0.5 nats\n" in said.out
        lines, table = written(tmp_path)
        assert [(line["lr"], line["seeds"]) for line in lines] == [
            *(("0.1", "2"), ("0.1", "3"), ("0.45", "2"), ("0.45", "3"))
        ]
        assert lines[3]["has.small"] == "undecided"
        assert float(lines[3]["has.small: effect"]) == pytest.approx(0.495)
        assert float(lines[3]["has.small: p"]) > 0.05
        assert lines[3]["has.lr-0.1"] == ""
        assert table["config"]["batch_size"] == 8
        assert not {"lr", "seeds"} & table["config"].keys()
        for line, point in zip(lines, table["points"], strict=True):
            assert point["run"] == line["run"]
            directory = tmp_path / point["run"]
            assert json.loads((directory / "verdict.json").read_text()) == point["verdicts"]
            assert (directory / "figure.svg").exists()
            config = json.loads((directory / "config.json").read_text())
            assert {k: config[k] for k in point["values"]} == point["values"]

    def test_what_is_finished_is_not_measured_again(self, run, question, tmp_path, capsys):
        assert run("--sweep", "lr=0.1,0.3") == 0
        assert run("--sweep", "lr=0.1", "--sweep", "seeds=2,3") == 0
        assert question.calls == [(0.1, 3), (0.3, 3), (0.1, 2)]
        assert run("--", "--lr", "0.3") == 0  # a point is a run as any other
        assert len(question.calls) == 3
        capsys.readouterr()
        before = sorted(tmp_path.glob("sweep-*"))
        assert run("--sweep", "lr=0.1,0.3") == 0
        assert sorted(tmp_path.glob("sweep-*")) == before
        assert len(before) == 4

    def test_interrupted_it_shows_what_there_is_and_goes_on(self, run, question, tmp_path, capsys):
        question.stop = 0.2
        assert run("--sweep", "lr=0.1,0.2,0.3") == cli.EXIT_INTERRUPTED
        assert "the same command goes on" in capsys.readouterr().err
        lines, _ = written(tmp_path)
        assert [line["failed"] for line in lines] == ["", sweep.MISSING, sweep.MISSING]
        assert run("--sweep", "lr=0.1,0.2,0.3") == 0
        assert [rate for rate, _ in question.calls] == [0.1, 0.2, 0.3]
        lines, _ = written(tmp_path)
        assert [line["failed"] for line in lines] == ["", "", ""]

    def test_a_point_without_an_answer_stops_no_other(self, run, question, tmp_path, capsys):
        question.wrong = 0.2
        assert run("--sweep", "lr=0.1,0.2,0.3") == terminal.EXIT_MISSING
        said = capsys.readouterr()
        assert "has, lr 0.2 has no answer: ZeroDivisionError: of a kind" in said.err
        assert "│ 0.2 │ ∅ " in said.out
        lines, table = written(tmp_path)
        assert "of a kind" in lines[1]["failed"]
        assert [bool(point["verdicts"]) for point in table["points"]] == [True, False, True]

    def test_seeds_that_diverged_are_named_with_their_point(self, run, tmp_path, capsys):
        assert run("--sweep", "lr=0.1,30") == 0
        lane = "batch, seed 0: not finite from step 7"
        assert f"diverged  lr 30.0: {lane}\n" in capsys.readouterr().out
        lines, table = written(tmp_path)
        assert lines[0]["diverged"] == ""
        assert lane in lines[1]["diverged"]
        assert len(table["points"][1]["diverged"]) == 3

    def test_one_seed_is_told_to_decide_nothing(self, run, tmp_path, capsys):
        assert run("--sweep", "lr=0.1", "seeds=1") == 0
        assert "one seed has no interval" in capsys.readouterr().err
        _, table = written(tmp_path)
        assert {v["decision"] for v in table["points"][0]["verdicts"]} == {"undecided"}

    def test_a_field_that_changes_nothing_is_named(self, run, capsys):
        assert run("--sweep", "lr=0.1,0.3", "batch_size=4,8") == 0
        said = capsys.readouterr().err
        assert "batch_size changed nothing: has does not read it." in said
        assert "lr changed nothing" not in said

    def test_each_question_has_a_table_of_its_own(self, run, tmp_path, capsys):
        assert run("--sweep", "lr=0.1,0.3", names=("has", "other")) == 0
        assert capsys.readouterr().err.count("2 points (2 lr)") == 2
        for name in ("has", "other"):
            lines, _ = written(tmp_path, name)
            assert [line[f"{name}.small"] for line in lines] == ["holds", "holds"]

    def test_nothing_is_measured_if_one_question_lacks_the_field(
        self, run, question, tmp_path, capsys
    ):
        questions.require("other").QUICK = dataclasses.make_dataclass(
            "Other", [("width", int, 3)], bases=(Config,), frozen=True
        )(dataset="")
        assert run("--sweep", "width=1,2", names=("other", "has")) == cli.EXIT_USAGE
        assert "has has no field 'width'" in capsys.readouterr().err
        assert not question.calls
        assert not list(tmp_path.iterdir())

    def test_a_field_that_is_an_option_too_is_refused(self, run, tmp_path, capsys):
        for option in (["--batch-size", "8"], ["--batch_size=8"]):
            assert run("--sweep", "batch_size=4,8", "--", *option) == cli.EXIT_USAGE
            assert "batch_size is given after -- as well" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_more_points_than_may_be_begun_at_a_time(self, run, tmp_path, monkeypatch):
        """Each holds a file open while it is asked, and a process may have 1,024 of them."""
        held, most = set(), []
        lock, release = Kept.lock, Kept.release
        monkeypatch.setattr(Kept, "lock", lambda self: lock(self) or held.add(self.path))

        def released(self):
            most.append(len(held))
            held.discard(self.path)
            release(self)

        monkeypatch.setattr(Kept, "release", released)
        monkeypatch.setattr(asking, "TOGETHER", 2)
        assert run("--sweep", "lr=0.1,0.2,0.3,0.4,0.5") == 0
        assert max(most) == 2
        assert not held
        lines, _ = written(tmp_path)
        assert [line["failed"] for line in lines] == [""] * 5

    def test_the_full_profile_is_asked_with_its_own_config(self, run, tmp_path, capsys):
        assert run("--sweep", "lr=0.1", "--profile", "full") == 0
        assert "1 point (1 lr), no estimate" in capsys.readouterr().err
        _, table = written(tmp_path)
        assert table["config"]["steps"] == 400

    @pytest.mark.parametrize("width", [40, 60, 200])
    def test_a_narrow_terminal_has_the_table_in_parts_that_fit(
        self, run, capsys, monkeypatch, width
    ):
        monkeypatch.setattr(terminal.console, "_width", width)
        assert run("--sweep", "lr=0.1,0.2,0.3,0.4", "seeds=3") == 0
        table = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "┃│"]
        assert all(len(line) <= width for line in table)
        cells = [cell.strip() for line in table for cell in re.split("[┃│]", line)]
        assert [cell for cell in cells if re.fullmatch(r"\d", cell) and cell != "3"] == [
            *(cell for cell in "1245")
        ]
        assert len([cell for cell in cells if re.fullmatch("has-[0-9a-f]{12}", cell)]) == 4


class TestAnswer:
    def test_it_is_the_run_of_the_terminal(self, run, question, tmp_path):
        found = answer("has", root=tmp_path, jobs=0, lr=0.3)
        assert found.config.lr == 0.3
        np.testing.assert_allclose(found.measured.by_seed("value"), [0.3, 0.33, 0.36])
        assert run("--", "--lr", "0.3") == 0
        assert question.calls == [(0.3, 3)]

    def test_it_raises_what_went_wrong(self, question, tmp_path):
        question.wrong = 0.2
        for fields, said in {
            (("lr", 0.2),): "of a kind",
            (("rate", 1.0),): "has has no field 'rate'",
            (("seeds", 0),): "--seeds: got 0",
        }.items():
            with pytest.raises(RunError, match=said):
                answer("has", root=tmp_path, jobs=0, **dict(fields))

    def test_the_search_of_the_docs_runs(self, tmp_path, monkeypatch):
        """Optuna is not installed here: a trial that suggests the least stands in its place."""
        text = (CHECKOUT / "docs/questions.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"```python\n(import optuna\n.*?)```", text, re.DOTALL)
        optuna = types.ModuleType("optuna")
        optuna.Trial = types.SimpleNamespace(
            suggest_float=lambda name, low, high, log: low,
            suggest_int=lambda name, low, high, step: low,
        )
        monkeypatch.setitem(sys.modules, "optuna", optuna)
        names = {"__name__": "search"}
        exec(block, names)
        monkeypatch.setitem(models.MODELS, "tiny", functools.partial(models.Mlp, widths=(8,)))
        small = {"model": "tiny", "steps": 10, "seeds": 2, "sds": (0.1, 0.3)}
        small |= {"root": tmp_path, "jobs": 0}
        names["answer"] = lambda name, **fields: answer(name, **(fields | small))
        assert 0 < names["accuracy"](optuna.Trial) <= 100


@pytest.mark.slow
def test_killed_in_the_middle_a_sweep_goes_on_to_the_same_numbers(tmp_path):
    """kill -9 when the first point is there; the rest is measured, and no point twice."""

    def start(where):
        command = [sys.executable, "-m", "normlab.experiments", "run", "identity", "--jobs", "1"]
        command += ["--run-dir", str(where), "--sweep", "eps=1e-5,1e-4,1e-3"]
        return subprocess.Popen(command, cwd=CHECKOUT, env=environment(), stdout=subprocess.DEVNULL)

    def conditions(where):
        return {str(p.relative_to(where)): p for p in where.glob("*/conditions/*.jsonl")}

    def verdicts(where):
        return [point["verdicts"] for point in written(where, "identity")[1]["points"]]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    process = start(killed)
    until = time.monotonic() + 200
    while not conditions(killed):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: path.stat().st_mtime_ns for name, path in conditions(killed).items()}
    assert 0 < len(before) < len(conditions(whole))
    assert start(killed).wait() == 0
    after = {name: path.stat().st_mtime_ns for name, path in conditions(killed).items()}
    assert {name: after[name] for name in before} == before
    assert verdicts(killed) == verdicts(whole)
    assert all(not math.isnan(v["effect"]) for found in verdicts(whole) for v in found)
