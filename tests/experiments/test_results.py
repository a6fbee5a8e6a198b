"""What runs write and what commands print: fields and units, tables, JSON, dashboards."""

import dataclasses
import importlib.util
import json
import math
import re
import struct
import sys
import types
from pathlib import Path

import pandas as pd
import pytest
from rich.cells import cell_len
from rich.table import Table

from normlab.experiments import console as cli
from normlab.experiments import load, terminal, writers
from normlab.experiments.asking.kept import verdict_json
from normlab.experiments.engine.verdict import decide
from normlab.experiments.rundir import RunError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "results.md"
IDS = ("norm", "scheme", "lr", "seed", "step")


@dataclasses.dataclass
class Ran:
    """A command that was run: where, and what it said."""

    path: Path
    out: str
    err: str

    def lines(self):
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def json(self, name):
        return json.loads((self.path / name).read_text())


COMMANDS = {
    "compare": "--dataset digits --model mlp --norms batch --devices 1 --seeds 2 --steps 2"
    " --evaluations 2 --batch-size 8 --log tensorboard",
    "train": "--dataset digits --model mlp --steps 4 --log-every 2 --batch-size 8"
    " --log tensorboard",
    "depth": "--depth 2 --width 8 --context 4 --schemes pre post --optimizer momentum",
}

BENCHES = {
    "ops": "--norms rms --shapes dense --dtypes float32 --peers jax.numpy --rounds 1 --turn-ms 1",
    "bytes": "--blocks alone --norms rms --dtypes float32 --peers jax.numpy --rounds 1"
    " --tokens 1 8 16 --targets here",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs a command once, with --json."""
    found = {}

    def run(name):
        if name not in found:
            path = tmp_path_factory.mktemp("runs") / name
            with pytest.MonkeyPatch.context() as patch:
                out, err = (tmp_path_factory.mktemp("said") / n for n in ("out", "err"))
                with out.open("w") as a, err.open("w") as b:
                    patch.setattr(sys, "stdout", a)
                    patch.setattr(sys, "stderr", b)
                    words = [name, *COMMANDS[name].split(), "--run-dir", str(path), "--json"]
                    assert cli.main(words) == 0
            found[name] = Ran(path, out.read_text(), err.read_text())
        return found[name]

    return run


def documented(heading):
    """The fields that docs/reference/results.md has under a heading, and where each is."""
    text = DOCS.read_text().split(f"\n### {heading}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: cells.split("|")[-1].strip() for name, cells in rows}


def assert_documented(record, heading, *where):
    fields = documented(heading)
    assert set(record) == {name for name, of in fields.items() if of in ("", *where)}


def assert_record_documented(record, *where):
    assert list(record)[:6] == ["kind", *IDS]
    own = {name: value for name, value in record.items() if name not in ("kind", *IDS)}
    assert_documented(own, f"`{record['kind']}`", *where)


class TestFields:
    def test_those_of_compare(self, ran):
        run = ran("compare")
        kinds = {record["kind"] for record in run.lines()}
        assert kinds == {"evaluation", "part"}
        for record in run.lines():
            assert_record_documented(record, "compare")
        summary = run.json("summary.json")
        assert set(summary) == {"complete", "norms"}
        (row,) = summary["norms"]
        assert_documented(row, "`summary.json` of compare", "images")

    def test_those_of_train(self, ran):
        run = ran("train")
        assert [(r["kind"], r["step"]) for r in run.lines()] == [
            ("training", 2),
            ("training", 4),
            ("evaluation", 4),
        ]
        for record in run.lines():
            assert_record_documented(record)
        summary = run.json("summary.json")
        evaluation = [name for name, of in documented("`evaluation`").items() if of == ""]
        shared = {name: summary.pop(name) for name in (*IDS, *evaluation)}
        assert shared["test_loss"] == run.lines()[-1]["test_loss"]
        assert_documented(summary, "`summary.json` of train")

    def test_those_of_depth(self, ran):
        for record in ran("depth").lines():
            assert_record_documented(record)

    def test_those_of_a_verdict(self):
        found = verdict_json(decide("a", "it is so", [0.1, 0.2], at_least=0))
        assert_documented(found, "`verdict.json`")

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_record_says_which_net_before_its_step(self, ran, name):
        for record in ran(name).lines():
            assert list(record)[:6] == ["kind", *IDS]

    def test_shares_are_fractions_and_times_are_seconds(self, ran):
        evaluations = [r for r in ran("compare").lines() if r["kind"] == "evaluation"]
        assert all(0 <= r["accuracy"] <= 1 for r in evaluations)
        last = [r for r in evaluations if r["step"] == 2]
        (row,) = ran("compare").json("summary.json")["norms"]
        assert row["accuracy_by_seed"] == [r["accuracy"] for r in last]
        steps = {r["step_seconds"] for r in evaluations if r["step"]}
        assert min(steps) <= row["step_seconds"] <= max(steps)
        assert 0 <= ran("train").json("summary.json")["accuracy"] <= 1


class TestFrames:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_a_run_directory_is_a_frame(self, ran, name):
        frame = load(ran(name).path)
        assert len(frame) == len(ran(name).lines())
        assert frame.attrs["run"] == name
        assert frame.attrs["config"]["batch_size"]
        assert frame.attrs["environment"]["packages"]["jax"]

    def test_a_frame_answers_in_a_line(self, ran):
        frame = load(str(ran("compare").path))
        last = frame[(frame["kind"] == "evaluation") & (frame["step"] == frame["step"].max())]
        (row,) = ran("compare").json("summary.json")["norms"]
        assert last.groupby("norm")["accuracy"].mean()["batch"] == row["accuracy_mean"]

    def test_what_is_no_run_is_refused(self, tmp_path):
        with pytest.raises(RunError, match="no records in it"):
            load(tmp_path)
        (tmp_path / "metrics.jsonl").write_text('{"kind"\n')
        with pytest.raises(RunError, match="whole"):
            load(tmp_path)
        with pytest.raises(RunError, match="unknown question"):
            load(tmp_path / "nothing")

    def test_the_records_of_a_question_and_of_its_sweep(self, tmp_path):
        run = tmp_path / "has-0123456789ab"
        (run / "conditions").mkdir(parents=True)
        record = {"kind": "evaluation", "norm": "rms", "seed": 0, "step": 3, "accuracy": 0.5}
        (run / "conditions/00-rms.jsonl").write_text(json.dumps(record) + "\n")
        assert load(run).to_dict("records") == [record]
        verdict = verdict_json(decide("a", "it is so", [0.1, 0.2], at_least=0, unit="nats"))
        point = {"values": {"lr": 0.1}, "run": run.name, "verdicts": [verdict]}
        sweep = tmp_path / "sweep-has-0123456789ab"
        sweep.mkdir()
        content = {"question": "has", "config": {}, "points": [point]}
        (sweep / "sweep-has-0123456789ab.json").write_text(json.dumps(content))
        (line,) = load(sweep).to_dict("records")
        assert (line["lr"], line["unit"], line["run"]) == (0.1, "nats", run.name)

    def test_a_sweep_of_compare_is_one_frame(self, tmp_path):
        for size in (8, 16):
            run = tmp_path / f"batch_size-{size}"
            run.mkdir()
            record = {"kind": "evaluation", "norm": "rms", "lr": 0.1, "accuracy": size / 100}
            (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
            (run / "config.json").write_text(json.dumps({"batch_size": size, "lr": 0.5}))
        frame = load(tmp_path)
        assert list(frame["batch_size"] / 100) == list(frame["accuracy"])
        assert list(frame["run"]) == ["batch_size-16", "batch_size-8"]
        assert (frame["lr"] == 0.1).all()


class TestExport:
    def test_one_table_of_several_runs(self, ran, tmp_path, capsys):
        runs = [str(ran(name).path) for name in COMMANDS]
        files = [str(tmp_path / name) for name in ("x.csv", "x.parquet")]
        assert cli.main(["export", *runs, "--csv", files[0], "--parquet", files[1], "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        csv, parquet = pd.read_csv(files[0]), pd.read_parquet(files[1])
        assert len(csv) == len(parquet) == len(said["records"])
        assert list(csv) == list(parquet)
        assert list(csv["run"].unique()) == list(COMMANDS)
        assert (csv[csv["run"] == "depth"]["dataset"] == "random").all()
        one = csv[(csv["run"] == "train") & (csv["kind"] == "evaluation")]
        assert one["accuracy"].item() == ran("train").json("summary.json")["accuracy"]
        assert csv["lr"].notna().all()  # what a record says, not the option of the run

    @pytest.mark.parametrize("kind", ["ops", "bytes"])
    def test_a_bench_is_a_frame_in_seconds_and_bytes(self, kind, tmp_path, capsys):
        words = [*BENCHES[kind].split(), "--run-dir", str(tmp_path / "b")]
        assert cli.main(["bench", kind, *words]) == 0
        assert cli.main(["export", str(tmp_path / "b"), "--csv", str(tmp_path / "x.csv")]) == 0
        capsys.readouterr()
        frame = load(tmp_path / "b")
        assert list(pd.read_csv(tmp_path / "x.csv")["seconds"]) == pytest.approx(
            list(frame["seconds"])
        )
        for line in frame.to_dict("records"):
            assert_documented(line, "`program`", kind)
        assert {"normlab", "jax.numpy"} == {*frame["library"]}
        assert (frame["norm"] == "rms").all()
        whole = json.loads((tmp_path / "b" / f"{kind}.json").read_text())
        assert frame.attrs["config"] == whole["config"]
        assert frame.attrs["config"]["norms"] == ["rms"]
        assert frame.attrs["environment"] == whole["environment"] != {}
        if kind == "ops":
            turns = whole["cases"][0]["contestants"][0]["turns"]["forward"]
            assert frame["x_bytes"][0] == 4096 * 256 * 4
        else:
            turns = whole["programs"][0]["targets"]["here"][0]["forward"]
            assert frame["x_bytes"].eq(8 * 16 * 4).all()
        assert frame["seconds"][0] == turns["median_ms"] / 1e3

    @pytest.mark.parametrize("word", ["my_net", "my_net.py", "of/mine/my_net.py", "mine.my_net"])
    def test_a_question_is_found_by_its_name(self, word, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("NORMLAB_RUNS_DIR", str(tmp_path))
        for at, accuracy in ((0, 0.25), (1, 0.5)):  # the newest counts
            run = tmp_path / "questions" / f"my_net-00000000000{at}"
            (run / "conditions").mkdir(parents=True)
            record = {"kind": "evaluation", "norm": "rms", "seed": 0, "accuracy": accuracy}
            (run / "conditions/00-rms.jsonl").write_text(json.dumps(record) + "\n")
            (run / "environment.json").write_text(json.dumps({"time": f"2026-01-0{at + 1}"}))
            (run / "verdict.json").write_text("[]")
        assert cli.main(["export", word, "--json"]) == 0
        (line,) = json.loads(capsys.readouterr().out)["records"]
        assert (line["run"], line["accuracy"]) == ("my_net-000000000001", 0.5)

    def test_a_column_of_words_and_numbers_is_of_words_in_parquet(self, tmp_path):
        for i, norm in enumerate(("rms", 0.5)):
            run = tmp_path / f"run{i}"
            run.mkdir()
            (run / "metrics.jsonl").write_text(json.dumps({"kind": "a", "norm": norm}) + "\n")
        runs = [str(tmp_path / f"run{i}") for i in (0, 1)]
        assert cli.main(["export", *runs, "--parquet", str(tmp_path / "x.parquet")]) == 0
        assert list(pd.read_parquet(tmp_path / "x.parquet")["norm"]) == ["rms", "0.5"]

    def test_what_it_refuses(self, ran, capsys):
        for words, said in (([], "name a run directory"), (["no/where"], "no such directory")):
            with pytest.raises(SystemExit):
                cli.main(["export", *words])
            assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert cli.main(["export", "figur1"]) == terminal.EXIT_USAGE
        assert "unknown question 'figur1': did you mean 'figure1'?" in capsys.readouterr().err
        path = ran("depth").path
        words = ["export", str(path), "--csv", str(path / "no" / "x.csv")]
        assert cli.main(words) == terminal.EXIT_USAGE
        assert "--csv: cannot write" in capsys.readouterr().err


def events(folder):
    """The scalars of event files: a record is its length, a checksum, the event, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events*")):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    return found


class TestWriters:
    def test_tensorboard_has_every_number(self, ran):
        run = ran("compare")
        folder = run.path / "tensorboard"
        assert sorted(f.name for f in folder.iterdir()) == [
            "batch-lr0.05-seed0",
            "batch-lr0.05-seed1",
        ]
        found = events(folder / "batch-lr0.05-seed1")
        for record in run.lines():
            if record["seed"] == 1:
                for tag, value in writers.scalars(record).items():
                    assert found[tag, record["step"]] == pytest.approx(value)
        assert {"accuracy", "step_seconds"} <= {tag for tag, _ in found}
        assert any(tag.endswith("/mu/p50") for tag, _ in found)
        losses = events(ran("train").path / "tensorboard/batch-lr0.05-seed0")
        assert ("train_loss", 2) in losses
        assert ("accuracy", 4) in losses

    def test_wandb_has_a_run_for_each_net(self, ran, monkeypatch, capsys):
        started = []

        class Run:
            def __init__(self, **options):
                self.options, self.logged, self.finished = options, [], False
                started.append(self)

            def log(self, values, step):
                self.logged.append((step, values))

            def finish(self):
                self.finished = True

        fake = types.SimpleNamespace(init=Run)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setenv("WANDB_PROJECT", "mine")
        assert cli.main(["export", str(ran("compare").path), "--log", "wandb"]) == 0
        assert [run.options["name"] for run in started] == [
            "compare/batch-lr0.05-seed0",
            "compare/batch-lr0.05-seed1",
        ]
        assert len({run.options["id"] for run in started}) == 2
        for seed, run in enumerate(started):
            assert run.finished
            assert run.options["project"] == "mine"
            assert run.options["config"]["seed"] == seed
            assert run.options["config"]["dataset"] == "digits"
            steps = [step for step, _ in run.logged]
            assert steps == sorted(steps)  # W&B leaves out a step that lies back
            assert any("accuracy" in values for _, values in run.logged)

    def test_a_missing_library_is_named(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RunError, match=r"wandb is not installed. pip install 'normlab\[wandb"):
            writers.require(["wandb"])


class TestProgress:
    def test_a_pipe_has_a_line_for_each_evaluation(self, ran):
        lines = ran("compare").err.splitlines()
        said = [line for line in lines if line.startswith("batch: step")]
        assert [re.findall(r"step (\d/\d)", line) for line in said] == [["1/2"], ["2/2"]]
        assert all("test accuracy" in line for line in said)
        told = [float(re.search(r"train loss +(\S+) \(1 step\)", line)[1]) for line in said]
        rows = [r for r in ran("compare").lines() if r["kind"] == "evaluation" and r["step"]]
        for loss, step in zip(told, (1, 2), strict=True):  # as it is recorded, of both seeds
            mean = math.fsum(r["train_loss"] for r in rows if r["step"] == step) / 2
            assert loss == pytest.approx(mean, abs=1e-4)
        said = [line for line in ran("train").err.splitlines() if line.startswith("step ")]
        assert [line.split()[1] for line in said] == ["2/4", "4/4", "4/4"]
        assert "accuracy" in said[-1]

    def test_what_is_said_twice_is_one_line(self, capsys):
        with terminal.saying("starting") as say:
            for text in ("one", "one", "two"):
                say(text)
        assert capsys.readouterr().err.split() == ["starting", "one", "two"]


class TestJson:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_there_is_nothing_else_on_standard_output(self, ran, name):
        said = json.loads(ran(name).out)
        assert said["paths"]
        if name == "depth":
            assert said["records"] == ran(name).lines()
        else:
            assert said == {**ran(name).json("summary.json"), "paths": said["paths"]}

    def test_list_and_data(self, capsys):
        assert cli.main(["list", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert "batch" in said["norms"]
        assert "figure1" in said["questions"]
        assert cli.main(["data", "digits", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["datasets"]["digits"]["test"] == 360

    def test_what_is_not_finite_is_null(self, capsys):
        with terminal.printing("json"):
            terminal.outcome(values=[math.nan, -math.inf, 1.5], path=Path("a"))
        assert json.loads(capsys.readouterr().out) == {"values": [None, None, 1.5], "path": "a"}

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_every_command_has_it(self, name, capsys):
        words = [name, "step"] if name == "bench" else [name]
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--help"])
        assert not ended.value.code
        assert "--json" in capsys.readouterr().out


def words_of(text):
    return re.sub("[│┃|]", " ", text).split()


class TestTables:
    @pytest.mark.parametrize(
        "command", ["list", "data digits", "invariances", "ledger", "export", "run"]
    )
    def test_no_word_and_no_number_is_cut(self, ran, capsys, monkeypatch, command):
        words = {
            "export": ["export", str(ran("compare").path)],
            "ledger": ["ledger", "--model", "mlp", "--widths", "6", "--devices", "2"],
            "run": ["run", "identity", "--jobs", "0", "--run-dir", str(ran("depth").path.parent)],
        }.get(command, command.split())
        monkeypatch.setattr("normlab.experiments.numerics.invariances.rows", moves)
        tables = []
        monkeypatch.setattr(terminal, "_print_markdown", lambda *told: tables.append(told))
        assert cli.main([*words, "--markdown"]) == 0
        capsys.readouterr()
        assert tables
        for columns, table in tables:
            wanted = {
                word for column in columns for cell in column for word in words_of(cell.plain)
            }
            for width in (40, 80, 200, None):
                monkeypatch.setattr(terminal.console, "_width", width)
                terminal.show(table)
                text = capsys.readouterr().out
                found = words_of(text)
                assert wanted <= {*found, *(word.removesuffix(":") for word in found)}
                lines = [line for line in text.splitlines() if line[:1] in tuple("┏┃┡│├└")]
                assert [line for line in lines if cell_len(line) > (width or 10_000)] == []
                assert width or len(lines) >= 4 + table.row_count  # as wide as it needs

    def test_markdown_has_the_rows(self, capsys):
        assert cli.main(["data", "digits", "--markdown"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(" | ")[:3] for line in lines] == [
            ["| set", "training", "test"],
            ["| ---", "---", "---"],
            ["| digits", "1437", "360"],
        ]

    def test_a_wide_table_is_in_parts_with_the_first_columns(self, capsys, monkeypatch):
        monkeypatch.setattr(terminal.console, "_width", 30)
        table = terminal.rows_table(["name", *"abcdef"], [["first", *["0.12345"] * 6]])
        terminal.show(table)
        out = capsys.readouterr().out
        assert out.count("0.12345") == 6
        assert out.count("first") == 3

    def test_a_table_wider_than_any_part_is_in_lines(self, capsys, monkeypatch):
        monkeypatch.setattr(terminal.console, "_width", 12)
        terminal.show(terminal.rows_table(["name", "value"], [["batch_renorm", "0.123456789"]]))
        assert capsys.readouterr().out == "name: batch_renorm\nvalue: 0.123456789\n\n"

    def test_markup_and_sections_stay(self, capsys, monkeypatch):
        monkeypatch.setattr(terminal.console, "_width", 40)
        table = Table("a", "b", title="said", caption="below")
        table.add_row("[bold]x[/]", "1", end_section=True)
        table.add_row("y", "2")
        terminal.show(table)
        lines = capsys.readouterr().out.splitlines()
        assert (lines[0], lines[-1]) == ("said", "below")
        assert "│ x │ 1 │" in lines
        assert any(line.startswith("├") for line in lines)


def moves(config):
    from normlab.experiments.numerics.invariances import SPREADS

    moved = {f"{spread:.0e}": 1e-7 / spread for spread in SPREADS}
    yield {"norm": "batch", "change": "weights rescaled", "moves": moved, "breaks_at": 1e-3}
    yield {"norm": "rms", "change": "data rescaled", "moves": moved, "breaks_at": None}
