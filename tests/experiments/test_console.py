"""The command line: it starts fast, says what is wrong before anything runs, and stops quietly."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normlab.experiments import console as cli
from normlab.experiments.bench.config import Bench
from normlab.experiments.compare.config import Compare

HEAVY = ("jax", "flax", "matplotlib", "pandas", "scipy")


@pytest.fixture
def said(capsys):
    """Runs a command in this process; returns its status and all that it says on one line."""

    def run(*words: str) -> tuple[int, str]:
        try:
            status = cli.main([*words])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, " ".join(re.sub("[│╭╰╮╯─]", " ", printed.out + printed.err).split())

    return run


def test_no_help_and_no_usage_error_loads_jax():
    code = f"""
import contextlib, io, sys
from normlab.experiments.console import COMMANDS, main
said = {{}}
for words in [*([name, "--help"] for name in COMMANDS), *([name, "--nothing"] for name in COMMANDS),
              *(["bench", part, "--help"] for part in {list(Bench.SUBCOMMANDS)!r}),
              ["verify", "identity", "--", "--seeds", "3"], ["run", "identitty"], ["nothing"]]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try: status = main(words)
        except SystemExit as stop: status = stop.code
    assert status == (0 if "--help" in words else 2), (words, status)
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (words, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("run figure1 --seeds 3", "run figure1 -- --seeds 3"),
        ("run figure1 --seeds=3 --jobs 1", "run figure1 --jobs 1 -- --seeds=3"),
        ("power figure1 --lr 0.1 -- --seeds 3", "power figure1 -- --lr 0.1 --seeds 3"),
    ],
)
def test_what_lacks_the_dashes_is_told_with_the_whole_command(words, expected, said):
    status, text = said(*words.split())
    assert status == cli.EXIT_USAGE
    assert "Options of the question come after --" in text
    assert text.endswith(f"normlab {expected}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("run figure1 --job 3", "--jobs"),
        ("comapre", "there is no command 'comapre': did you mean 'compare'?"),
        ("bench step --foo", "normlab bench step --help"),
        ("bench", "normlab bench --help"),
        ("compare --foo", "normlab compare --help"),
        ("verify identity -- --seeds 3", "has no options of the questions"),
        ("run my_net.py", "no question in my_net.py"),
        ("run no.such", "no module 'no.such'"),
        ("lock identity", "--reason"),
    ],
)
def test_an_error_is_that_of_the_command(words, expected, said):
    status, text = said(*words.split())
    assert status == cli.EXIT_USAGE
    assert expected in text


IDLE = [
    ("bench bytes --rounds 3", "--rounds 3", "without --targets here"),
    ("bench bytes --blocks bottleneck --tokens 1 2 32", "--tokens 1 2 32", "--blocks bottleneck"),
    ("bench bytes --norms rms --images 1 4 4 32", "--images 1 4 4 32", "--norms rms"),
    ("bench bytes --blocks transformer --norms rms batch", "--norms batch", "--blocks transformer"),
    ("bench bytes --blocks alone bottleneck --norms rms", "--blocks bottleneck", "--norms rms"),
    ("bench bytes --targets cpu cpu", "--targets", "cpu twice"),
    ("bench ops --norms rms group --shapes dense", "--norms group", "--shapes dense"),
    ("bench ops --norms group --shapes conv dense", "--shapes dense", "--norms group"),
    ("bench compile --depths 4 8 --deepest 10", "--deepest 10", "--depths 4 8"),
    ("depth --data-dir nowhere", "--data-dir nowhere", "--dataset random"),
    ("depth --batch-size 8", "--batch-size 8", "without --steps"),
    ("data digits markov --data-dir nowhere", "--data-dir nowhere", "digits markov"),
    ("compare --dataset digits --data-dir nowhere", "--data-dir nowhere", "--dataset digits"),
    ("train --dataset markov --data-dir nowhere", "--data-dir nowhere", "--dataset markov"),
    ("compare --sweep dataset=digits,own:x --data-dir no", "--data-dir no", "digits own:x"),
    ("run identity --data-dir nowhere", "--data-dir nowhere", "identity"),
    ("run identity -- --data-dir nowhere", "--data-dir nowhere", "identity"),
    ("run figure1 --data-dir here -- --data-dir there", "--data-dir here", "--data-dir there"),
    ("cost identity --jobs 3", "--jobs", "cost, only on run"),
    ("cost identity --run-dir there", "--run-dir", "cost, only on run"),
    ("launch -- train --coordinator a:1", "--coordinator a:1", "launch"),
    ("launch -- train --cluster no", "--cluster no", "launch"),
    ("launch --gpus 1 -- train --devices 2", "--devices 2", "--gpus 1"),
    ("export . --csv a.csv --parquet a.csv", "--csv a.csv", "--parquet a.csv"),
    ("list --json --markdown", "--markdown", "--json"),
]
"""A command, the option that would do nothing, and what it stands beside."""


@pytest.mark.parametrize(("words", "option", "beside"), IDLE)
def test_an_option_without_an_effect_is_refused(words, option, beside, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = said(*words.split())
    assert status == cli.EXIT_USAGE
    assert f": {option}" in text
    assert beside in text
    assert not [*tmp_path.iterdir()]


def test_a_place_of_data_has_an_effect_where_one_point_of_a_sweep_reads_it():
    words = [
        "--sweep",
        "dataset=digits,mnist",
        "--data-dir",
        "there",
        "--norms",
        "none",
        "--model",
        "mlp",
    ]
    found, _ = Compare.parse(lambda given: cli._parse(Compare, "compare", given), words)
    assert [str(point.config.data_dir) for point in found.points] == ["there", "there"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("numerics --rounds 0", "--rounds: got 0"),
        ("numerics --shards 3", "--shards 3: --examples 16384 does not divide"),
        ("invariances --eps 0", "--eps: got 0.0; it must be positive"),
        ("family --norms bacth", "--norms:"),
        ("family --out a.pdf", "--out: got a.pdf; it must be a file that ends in .png or .svg"),
    ],
)
def test_a_value_that_cannot_be_is_refused(words, expected, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = said(*words.split())
    assert status == cli.EXIT_USAGE
    assert expected in text
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("after", [0.0, 0.05, 0.15, 0.4, 1.0, 2.0])
def test_an_early_ctrl_c_is_quiet(after, tmp_path):
    """Once the command is there; before that Python itself starts."""
    ready = tmp_path / "ready"
    code = (
        "import pathlib, sys; from normlab.experiments.__main__ import main\n"
        f"pathlib.Path({str(ready)!r}).touch(); sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "run", "identity", "--run-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not ready.exists():
            time.sleep(0.005)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0].decode()
    if after:  # or the signal came between two lines of the test
        assert "Traceback" not in printed
        assert process.returncode in (0, cli.EXIT_INTERRUPTED), printed


def test_the_page_goes_where_the_runs_go(monkeypatch):
    from normlab.experiments.asking.config import Report

    monkeypatch.setenv("NORMLAB_RUNS_DIR", "there")
    assert Report().page == Path("there/report.html")
    assert Report(run_dir=Path("here")).page == Path("here/report.html")
    assert Report(run_dir=Path("here"), out=Path("a.html")).page == Path("a.html")


def test_a_signal_that_is_ignored_stays_ignored():
    """As under `nohup … &`."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from normlab.experiments.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    command = [sys.executable, "-c", code, "list", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.stdout.splitlines()[-1] == "True"
