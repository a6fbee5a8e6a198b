"""A question of one's own, and what is refused before anything is measured."""

import dataclasses
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from normlab.experiments import console, questions
from normlab.experiments.asking import ask as asking
from normlab.experiments.asking import references, rehearsal, sources
from normlab.experiments.asking.ask import ask
from normlab.experiments.asking.fields import parsed, replaced
from normlab.experiments.asking.reads import unread
from normlab.experiments.engine import Condition, Config, decide, exact
from normlab.experiments.rundir import RunError

ROOT = Path(__file__).parents[2]

MINE = '''"""Is the square of a number positive?

Claim: It is.

Source: Ours.

Protocol: Numbers.

Command: normlab run
"""

import dataclasses

import matplotlib.pyplot as plt

from normlab.experiments.engine import Condition, Config, Source, decide, exact
{imports}


@dataclasses.dataclass(frozen=True)
class Mine(Config):
    """The config."""

    dataset: str = ""
    sizes: tuple[int, ...] = (1, 2)


QUICK = Mine(seeds=3)
SECONDS = 1
FULL = Mine(seeds=4)


def run(config):
    for size in config.sizes:
        yield Condition({{"size": size}}, exact(measure, config, size))


def measure(config, size):
    for seed in config.each_seed:
        yield {{"kind": "square", "seed": seed, "square": square(size) + seed / 1000}}


def verdict(records):
    gain = records.by_seed("square", size=2) - records.by_seed("square", size=1)
    yield decide("grows", "it grows", gain, at_least=0, source=Source("mine2026", "page 1"))


def figure(records):
    return plt.figure()
'''
BIB = """@misc{mine2026,
  author = {Noether, Emmy},
  title = {Squares},
  year = {2026},
}
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What the tests import is forgotten after each."""
    monkeypatch.setattr(questions, "_OWN", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        if not name.startswith("normlab"):
            del sys.modules[name]


def package(where: Path) -> Path:
    """A package with a question, which imports a module beside it; returns the question's file."""
    home = where / "mypackage"
    home.mkdir()
    (home / "__init__.py").touch()
    (home / "maths.py").write_text("def square(x):\n    return x * x\n")
    (home / "sources.bib").write_text(BIB)
    (home / "my_net.py").write_text(MINE.format(imports="from .maths import square"))
    return home / "my_net.py"


def alone(where: Path, name: str = "my_net") -> Path:
    """A question in a file, which imports a module beside it."""
    (where / "maths_of_mine.py").write_text("def square(x):\n    return x * x\n")
    file = where / f"{name}.py"
    file.write_text(MINE.format(imports="from maths_of_mine import square"))
    return file


class TestFind:
    def test_a_file_is_a_question_under_its_name(self, tmp_path):
        name = questions.find(str(alone(tmp_path)))
        assert (name, questions.module_of(name)) == ("my_net", "my_net")
        (found,) = ask(
            [(name, questions.require(name), questions.require(name).QUICK)], jobs=0, root=tmp_path
        )
        assert not found.failed
        assert found.verdicts[0].id == "my_net.grows"
        assert found.path.name.startswith("my_net-")
        assert questions.describe(name)["question"] == "Is the square of a number positive?"

    def test_a_module_of_a_package_is_one_by_either_name(self, tmp_path, monkeypatch):
        file = package(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        assert questions.find("mypackage.my_net") == "my_net" == questions.find(str(file))
        assert questions.module_of("my_net") == "mypackage.my_net"

    def test_the_file_of_one_of_ours_is_ours(self):
        assert questions.find(str(ROOT / "experiments/questions/figure1.py")) == "figure1"

    @pytest.mark.parametrize(
        ("name", "said"),
        [("figure1", "is the name of another question"), ("json", "another module is called")],
    )
    def test_a_name_that_is_taken_is_refused(self, name, said, tmp_path):
        with pytest.raises(RunError, match=said):
            questions.find(str(alone(tmp_path, name)))

    def test_a_file_without_its_ending_is_hinted_at(self, tmp_path, monkeypatch):
        alone(tmp_path)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(RunError, match=r"named with its ending: my_net\.py"):
            questions.find("my_net")

    def test_what_is_no_question_says_what_it_lacks(self, tmp_path):
        (tmp_path / "empty_one.py").write_text("QUICK = 1\n")
        name = questions.find(str(tmp_path / "empty_one.py"))
        with pytest.raises(RunError, match=r"is no question: it has no FULL and no SECONDS"):
            questions.require(name)


class TestKept:
    @pytest.mark.parametrize("make", [alone, package])
    def test_its_version_is_that_of_its_file_and_of_what_it_imports_of_yours(self, make, tmp_path):
        file = make(tmp_path)
        module = questions.module_of(questions.find(str(file)))
        first = sources.version(module)
        file.write_text(file.read_text().replace("it grows", "it is larger"))  # judges
        assert sources.version(module) == first
        file.write_text(file.read_text().replace("seed / 1000", "seed / 100"))
        second = sources.version(module)
        assert second != first
        (beside,) = file.parent.glob("maths*.py")
        beside.write_text("def square(x):\n    return x ** 2\n")
        assert sources.version(module) != second

    def test_its_sources_lie_beside_it(self, tmp_path):
        name = questions.find(str(package(tmp_path)))
        assert references.known([name])["mine2026"].label == "Noether 2026"
        assert "mine2026" not in references.known(["figure1"])

    def test_workers_and_another_directory_know_it(self, tmp_path):
        """Both by its module and by its file; the second time nothing is measured."""
        package(tmp_path)
        code = (
            "import sys; from normlab.experiments.console import main\n"
            "if __name__ == '__main__':\n"
            f"    sys.path.insert(0, {str(tmp_path)!r})\n"
            "    sys.exit(main(sys.argv[1:]))"
        )
        script = tmp_path / "script.py"
        script.write_text(code)
        for word in ("mypackage.my_net", str(tmp_path / "mypackage/my_net.py")):
            command = [sys.executable, str(script), "run", word, "--jobs", "1"]
            done = subprocess.run(
                [*command, "--run-dir", str(tmp_path / "runs")], capture_output=True, text=True
            )
            assert not done.returncode, done.stderr
        (run,) = (tmp_path / "runs").iterdir()
        assert re.fullmatch(r"my_net-\w{12}", run.name)
        (verdict,) = json.loads((run / "verdict.json").read_text())
        assert verdict["decision"] == "holds"

    def test_the_page_shows_it_as_it_runs(self, tmp_path):
        text = (ROOT / "docs/howto/own-question.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        (tmp_path / "my_net.py").write_text(code)
        name = questions.find(str(tmp_path / "my_net.py"))
        question = questions.require(name)
        tiny = {"steps": 4, "evaluations": 1, "seeds": 2, "sds": (0.1, 0.3)}
        config = dataclasses.replace(question.QUICK, **tiny)
        (found,) = ask([(name, question, config)], root=tmp_path, jobs=0)
        assert not found.failed
        assert [v.id for v in found.verdicts] == ["my_net.range"]


class TestUnread:
    @pytest.mark.parametrize(
        ("name", "fields"),
        [
            ("group_size", {"batch_size", "per_device", "screening"}),
            ("optimizers", {"lr", "optimizer"}),
            ("affine_alone", {"lr"}),
            ("initialization", {"screening"}),
            (
                "identity",
                {"dataset", "model", "steps", "optimizer", "lr", "evaluations", "schedule"}
                | {"warmup", "screening"},
            ),
        ],
    )
    def test_it_is_what_no_code_asks_for(self, name, fields):
        assert unread(name) == fields

    def test_of_ones_own_too(self, tmp_path):
        name = questions.find(str(alone(tmp_path)))
        assert {"lr", "steps", "batch_size"} <= unread(name)
        assert not {"sizes", "seeds", "data_dir"} & unread(name)

    @pytest.mark.parametrize(
        ("option", "said"),
        [("--batch-size", "does not read batch_size"), ("--per-device", "by --per-devices")],
    )
    def test_an_option_that_changes_nothing_is_refused(self, option, said):
        config = questions.require("group_size").QUICK
        with pytest.raises(RunError, match=said):
            parsed("group_size", config, [option, "9"])
        with pytest.raises(RunError, match=said):
            replaced("group_size", config, {option[2:].replace("-", "_"): 9})

    @pytest.mark.parametrize("name", questions.NAMES)
    def test_the_options_of_every_question_are_read_as_they_are(self, name, capsys):
        config = questions.require(name).QUICK
        assert parsed(name, config, ["--seeds", "7"]) == dataclasses.replace(config, seeds=7)
        with pytest.raises(SystemExit):
            parsed(name, config, ["--help"])
        said = capsys.readouterr().out
        for field in dataclasses.fields(config):
            offered = re.search(rf"--{field.name.replace('_', '-')}\b(?!-)", said)
            assert bool(offered) is (field.name not in unread(name)), field.name


class TestRehearsal:
    def test_what_could_not_be_judged_is_refused_with_what_it_lacks(self, tmp_path):
        question = questions.require("group_size")
        config = dataclasses.replace(question.QUICK, dataset="digits", groups=(2, 4), seeds=2)
        said = r"with this --groups its claim .* could not be judged: it compares group 1 .*2, 4"
        with pytest.raises(RunError, match=said):
            rehearsal.require(question, config)
        (found,) = ask([("group_size", question, config)], root=tmp_path, jobs=0)
        assert "could not be judged" in found.failed
        assert not [*tmp_path.iterdir()]

    def test_what_can_be_is_not(self):
        question = questions.require("group_size")
        for groups in ((1, 8), (1, 4), (1, 2, 4, 8)):
            config = dataclasses.replace(question.QUICK, dataset="digits", groups=groups)
            rehearsal.require(question, config)
        rehearsal.require(question, dataclasses.replace(question.QUICK, ghost=()))

    @pytest.mark.parametrize(
        ("name", "options", "lacks"),
        [
            ("group_size", ["--groups", "2", "4"], "group 1"),
            ("initialization", ["--norms", "batch"], "norm none"),
            ("recurrent", ["--gains", "0.3", "1.0"], "gain 0.1"),
            ("qk_norm_rate", ["--rates", "0.1", "0.3"], "lr 0.03"),
            ("ln_scaling", ["--schemes", "pre", "mix"], "scheme lns"),
            ("vanishing", ["--norms", "none", "batch"], "norm layer"),
            ("batch_one", ["--sizes", "16", "4"], "n 1"),
        ],
    )
    def test_the_command_refuses_it_before_anything_runs(
        self, name, options, lacks, tmp_path, capsys
    ):
        status = console.main(["run", name, "--run-dir", str(tmp_path / "runs"), "--", *options])
        said = " ".join(capsys.readouterr().err.split())
        assert f"{options[0]} its claim" in said
        assert f"it compares {lacks} (there is" in said
        assert status == console.EXIT_USAGE
        assert not (tmp_path / "runs").exists()

    def test_a_sweep_is_refused_with_all_points_that_lack_something(self, tmp_path, capsys):
        words = ["--sweep", "groups=1 4,2 4,1 8,2 8", "--", "--dataset", "digits"]
        status = console.main(["run", "group_size", "--run-dir", str(tmp_path / "runs"), *words])
        said = capsys.readouterr()
        assert status == console.EXIT_USAGE
        lacks = "--sweep: at groups 2 {}: group_size: with this --groups .*it compares group 1 "
        found = re.sub(r"\s+", " ", said.err)
        assert re.search(".*".join((lacks.format(4), lacks.format(8))), found)
        assert "groups 1" not in found
        assert not said.out
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(
        ("words", "count"), [(["--", "--spreads", "1"], 1), (["--sweep", "spreads=1,2"], 2)]
    )
    def test_each_question_is_tried_once(self, words, count, tmp_path, monkeypatch):
        tried: list[object] = []
        monkeypatch.setattr(rehearsal, "require", lambda _, config: tried.append(config))

        def begin(*_):
            raise RunError("it would begin")

        monkeypatch.setattr(asking, "_prepare", begin)
        console.main(["run", "identity", "--jobs", "0", "--run-dir", str(tmp_path), *words])
        assert len(tried) == count
        with pytest.raises(RunError, match="it would begin"):
            asking.answer("identity", spreads=(1.0,), root=tmp_path)
        assert len(tried) == count + 1

    def test_what_its_conditions_do_not_expect_is_refused_too(self):
        @dataclasses.dataclass(frozen=True)
        class Two(Config):
            pair: tuple[float, ...] = (0.1, 0.2)

        class Question:
            __name__ = "two"
            QUICK = FULL = Two()
            SECONDS = 1

            def run(self, config):
                low, high = config.pair
                yield Condition({"norm": "a", "pair": high - low}, exact(lambda: iter(())))

            def verdict(self, records):
                yield decide("x", "it is", records.by_seed("x", norm="a"), at_least=0)

            def figure(self, records):
                return plt.figure()

        with pytest.raises(RunError, match=r"--pair its claim x could not .*: ValueError: not eno"):
            rehearsal.require(typing.cast(typing.Any, Question()), Two(pair=(0.1,)))

    @pytest.mark.parametrize("name", questions.NAMES)
    def test_every_question_can_be_rehearsed(self, name):
        question = questions.require(name)
        usual = question.QUICK
        if usual.dataset:  # a small one, which is there
            usual = dataclasses.replace(usual, dataset="digits")
        assert not rehearsal.rehearse(question, usual).why
