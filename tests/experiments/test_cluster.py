"""Questions and comparisons on a Ray cluster: the numbers of this machine, whatever is killed."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from normlab.experiments import cluster as clusters
from normlab.experiments import console as cli
from normlab.experiments import questions
from normlab.experiments.asking import kept
from normlab.experiments.asking.ask import ask
from normlab.experiments.asking.kept import Kept
from normlab.experiments.cluster import Call, Cluster, Ended
from normlab.experiments.compare.comparison import Comparison
from normlab.experiments.compare.config import Compare
from normlab.experiments.rundir import RunError
from tests.helpers import CHECKOUT, environment

from . import calls

pytestmark = pytest.mark.filterwarnings(
    *("ignore::ResourceWarning", "ignore::DeprecationWarning"),  # what Ray leaves open is its own
    "ignore:os.fork:RuntimeWarning",  # the nodes are started from here, which no command does
)


@pytest.fixture(scope="module")
def ray():
    """Two nodes with a core each, on this machine."""
    os.environ.update(clusters.QUIET)
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


def run(address, *given, **options):
    """What each call came to."""
    found = [[] for _ in given]
    with Cluster(address, **options) as cluster:
        for number, made in cluster.run(given):
            found[number].append(made)
    return found


def call(function, *arguments, **options):
    return Call(f"{calls.__name__}:{function}", lambda: arguments, **options)


def wait_for(holds, seconds=120):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


class TestFaults:
    def test_what_is_yielded_comes_as_it_is_made_and_a_worker_that_dies_costs_its_call_alone(
        self, ray, tmp_path
    ):
        told = []
        given = [
            *(call("squares", 3), call("dies", 1), call("raises")),
            call("variables", "OMP_NUM_THREADS", "NPROC", "JAX_ENABLE_X64", cores=7),
        ]
        squares, dies, raises, variables = run(ray.address, *given, warn=told.append)
        assert [s[0] for s in squares[:-1]] == [0, 1, 4]
        assert squares[-1] == Ended()
        assert squares[0][1] not in (os.getpid(), 0)
        assert dies[:-1] == [0] * (1 + clusters.RETRIES)
        assert dies[-1].error.startswith(f"it was begun {1 + clusters.RETRIES} times. At last: A ")
        assert len(told) == clusters.RETRIES
        assert all(re.match(r"A worker was killed.*process \d+\)\. Begun again\.", t) for t in told)
        assert raises == [1, Ended("LookupError: nothing there")]
        assert variables[0]["NPROC"] == "7"
        assert variables[0]["OMP_NUM_THREADS"] == "1"
        assert variables[1] == 1  # core

    def test_a_node_that_is_taken_away_costs_what_it_did_and_no_more(self, ray, tmp_path):
        told, ended = [], {}
        node = ray.add_node(num_cpus=1)
        given = [call("waits", str(tmp_path), i) for i in range(3)]  # one on each

        def warn(text):
            told.append(text)
            (tmp_path / "go").touch()

        with Cluster(ray.address, warn=warn) as cluster:
            for number, made in cluster.run(given):
                ended.setdefault(number, []).append(made)
                if sum(map(len, ended.values())) == 3:
                    ray.remove_node(node, allow_graceful=False)
        assert sorted(map(len, ended.values())) == [3, 3, 4]  # one began twice
        assert all(made[-2:] == [number, Ended()] for number, made in ended.items())
        assert len(told) == 1
        assert re.match(r"A node is gone \(.*\)\. Begun again\.", told[0])

    @pytest.mark.slow
    def test_without_its_head_it_ends_and_says_so(self, tmp_path):
        os.environ.update(clusters.QUIET)
        from ray.cluster_utils import Cluster as Nodes

        head = {"num_cpus": 1, "include_dashboard": False}
        nodes = Nodes(initialize_head=True, head_node_args=head)
        program = f"""
from normlab.experiments.cluster import Call, Cluster
from tests.experiments import calls
with Cluster({nodes.address!r}) as cluster:
    list(cluster.run([Call(calls.__name__ + ":waits", lambda: ({str(tmp_path)!r}, 0))]))
"""
        with subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=CHECKOUT,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        ) as driver:
            wait_for(lambda: list(tmp_path.glob("begun-*")))
            nodes.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
            _, errors = driver.communicate(timeout=55)  # Ray itself ends it after a minute
        assert "the head of the Ray cluster is gone" in errors.splitlines()[-1]

    def test_nodes_with_other_versions_are_refused_by_name(self, ray, tmp_path):
        for package, version in (("jax", "0.9.9"), ("flax", "0.1.0")):
            info = tmp_path / f"{package}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
        node = ray.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path)})
        name = next(
            n for n in clusters_nodes(ray) if n["NodeManagerPort"] == node.node_manager_port
        )["NodeID"]
        try:
            with pytest.raises(RunError) as refused:
                run(ray.address, call("squares", 1))
        finally:
            ray.remove_node(node)
        assert f"({name[:8]}) has jax 0.9.9 (here " in str(refused.value)
        assert "and flax 0.1.0 (here " in str(refused.value)
        assert str(refused.value).count("node ") == 1
        assert "nothing was measured" in str(refused.value)

    def test_where_there_are_gpus_each_call_has_one(self, ray, monkeypatch):
        monkeypatch.delenv("JAX_PLATFORMS")
        node = ray.add_node(num_cpus=1, num_gpus=2)
        given = [
            call("variables", "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", devices=d) for d in (1, 2)
        ]
        try:
            (one, _, _), (two, _, _) = run(ray.address, *given)
        finally:
            ray.remove_node(node)
        assert one["CUDA_VISIBLE_DEVICES"] in ("0", "1")
        assert sorted(two["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "1"]
        assert one["JAX_PLATFORMS"] is None

    @pytest.mark.parametrize(
        ("address", "says"),
        [
            ("ray://head:10001", "the Ray Client behind it hears of nothing"),
            ("http://head:8265", "the Ray Client behind it hears of nothing"),
            ("head:", "it must be HOST:PORT"),
            ("head:port", "it must be HOST:PORT"),
        ],
    )
    def test_what_is_no_address_is_refused(self, address, says, capsys):
        with pytest.raises(RunError, match=says):
            clusters.require_address(address)
        for command in ("run identity", "report", "compare"):
            with pytest.raises(SystemExit) as stop:
                cli.main([*command.split(), "--ray", address])
            assert stop.value.code == cli.EXIT_USAGE
            assert f"--ray: got {address};" in capsys.readouterr().err

    def test_an_address_where_nobody_answers_says_what_to_do(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(clusters, "PATIENCE", 1.0)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # without a cluster of this machine
        with socket.socket() as dumb:
            dumb.bind(("127.0.0.1", 0))
            refuses = f"127.0.0.1:{dumb.getsockname()[1]}"
            given = ["identity", "--run-dir", str(tmp_path / "runs"), "--ray"]
            assert cli.main(["run", *given, refuses]) == cli.EXIT_USAGE
            said = capsys.readouterr().err
            assert f"no Ray cluster answers at --ray {refuses}: [Errno 111]" in said
            assert "`ray start --head` starts one" in said
            dumb.listen()
            assert cli.main(["run", *given, refuses]) == cli.EXIT_USAGE
            assert "nothing came within 1 s" in capsys.readouterr().err
        out = tmp_path / "compare"
        tiny = ["--dataset", "digits", "--model", "mlp", "--run-dir", str(out)]
        assert cli.main(["compare", *tiny, "--ray", refuses]) == cli.EXIT_USAGE
        assert not out.exists()

    def test_without_ray_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(RunError, match=r"Ray is not installed .*'normlab\[launch\]'"):
            run(clusters.LOCAL, call("squares", 1))


def clusters_nodes(ray):
    return [n for n in ray.global_state.node_table() if n["Alive"]]


def test_an_address_may_be_left_out():
    assert clusters.spelled(["--ray"]) == ["--ray", "local"]
    for address in ("auto", "local", "10.0.0.1:6379", "ray://x"):
        assert clusters.spelled(["a", "--ray", address, "b"]) == ["a", "--ray", address, "b"]
    assert clusters.spelled(["--ray=auto", "a"]) == ["--ray=auto", "a"]


def test_nothing_of_ray_is_loaded_without_the_option(tmp_path):
    program = f"""
import sys
from normlab.experiments import console
assert console.main(["run", "identity", "--jobs", "0", "--run-dir", {str(tmp_path)!r}]) == 0
assert not [name for name in sys.modules if name.partition(".")[0] == "ray"]
"""
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=CHECKOUT, env=environment(), check=True, capture_output=True)


def figure1(**fields):
    """Two conditions on small digits."""
    question = questions.require("figure1")
    given = {"dataset": "digits", "steps": 40, "evaluations": 20, "seeds": 2, **fields}
    return "figure1", question, dataclasses.replace(question.QUICK, **given)


def measured(answer):
    assert not answer.failed, answer.failed
    return [r for r in answer.records if r["kind"] != "cost"]


class TestQuestions:
    def test_a_condition_whose_worker_is_killed_goes_on_to_the_numbers_of_this_machine(
        self, ray, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(kept, "PAUSE", 0.0)
        told, killed = [], []

        def tell(name, share):
            if not killed and list(tmp_path.glob("there/*/conditions/*.partial")):
                workers = [p for p in psutil.process_iter(["cmdline"]) if working(p)]
                workers[0].kill()
                killed.append(workers[0].pid)

        (here,) = ask([figure1()], root=tmp_path / "here", jobs=1)
        options = {"ray": ray.address, "tell": tell, "warn": told.append}
        (there,) = ask([figure1()], root=tmp_path / "there", **options)
        assert len(killed) == len(told) == 1
        assert f"process {killed[0]}" in told[0]
        assert measured(there) == measured(here)
        assert {p.name for p in there.path.iterdir()} == {p.name for p in here.path.iterdir()}
        assert not list(there.path.glob("conditions/*.partial"))

    def test_a_full_disk_here_costs_its_condition_and_the_second_run_goes_on(
        self, ray, tmp_path, monkeypatch
    ):
        write = Kept.write_bytes

        def full(self, name, content):
            if name.startswith("conditions/01"):
                raise self._failed(name, OSError(28, os.strerror(28)))
            return write(self, name, content)

        small = figure1(steps=4, evaluations=2)
        with monkeypatch.context() as patch:
            patch.setattr(Kept, "write_bytes", full)
            (found,) = ask([small], root=tmp_path, ray=ray.address)
        assert "No space left on device" in found.failed
        assert len(list(found.path.glob("conditions/*.jsonl"))) == 1
        (found,) = ask([small], root=tmp_path, jobs=0)
        assert found.verdicts

    def test_a_report_is_made_on_it(self, ray, tmp_path, capsys):
        out = tmp_path / "page.html"
        given = ["identity", "--run-dir", str(tmp_path / "runs"), "--out", str(out)]
        assert cli.main(["report", *given, "--ray", ray.address]) == 0
        verdicts = json.loads(out.with_suffix(".json").read_text())["verdicts"]["identity"]
        assert {v["decision"] for v in verdicts} == {"holds"}

    @pytest.mark.slow
    def test_interrupted_it_goes_on_where_it_stood(self, ray, tmp_path):
        fields = ("--dataset", "digits", "--steps", "1000", "--evaluations", "20", "--seeds", "2")

        def start(where, *options):
            command = [sys.executable, "-m", "normlab.experiments", "run", "figure1"]
            return subprocess.Popen(
                [*command, "--run-dir", str(where), *options, "--", *fields],
                cwd=CHECKOUT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

        def records(where):
            files = sorted(where.glob("*/conditions/*.jsonl"))
            return [path.read_text().splitlines()[:-1] for path in files]

        stopped = start(tmp_path / "there", "--ray", ray.address)
        wait_for(lambda: [p for p in psutil.process_iter(["cmdline"]) if working(p)])
        time.sleep(2)
        os.killpg(stopped.pid, signal.SIGINT)
        text, _ = stopped.communicate(timeout=60)
        assert stopped.returncode == 130, text
        assert "what was measured is kept; the same command goes on" in text
        assert "Traceback" not in text
        wait_for(lambda: not [p for p in psutil.process_iter(["cmdline"]) if working(p)])
        for where, options in (("there", ("--ray", ray.address)), ("here", ("--jobs", "1"))):
            whole = start(tmp_path / where, *options)
            text, _ = whole.communicate(timeout=600)
            assert whole.returncode == 0, text
        assert len(records(tmp_path / "here")) == 2
        assert records(tmp_path / "there") == records(tmp_path / "here")

    @pytest.mark.slow
    def test_without_an_address_a_ray_is_started_and_leaves_nothing(self, tmp_path):
        command = [
            sys.executable,
            "-m",
            "normlab.experiments",
            "run",
            "--ray",
            "identity",
            "--run-dir",
        ]
        found = subprocess.run(
            [*command, str(tmp_path / "runs")],
            cwd=CHECKOUT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr
        assert "holds" in found.stdout
        assert "raylet" not in found.stderr + found.stdout
        assert not list(Path("/tmp").glob(f"{clusters.PREFIX}*"))


def working(process):
    """Whether this is a worker of Ray that runs a call."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[:1] == ["ray::_run"]
    return False


def test_a_comparison_has_the_numbers_of_this_machine_and_fails_by_norm(ray, tmp_path):
    options = {
        "dataset": "digits", "model": "mlp", "norms": ("none", "batch"), "steps": 4,
        "evaluations": 2, "seeds": 2, "devices": 2,
    }  # fmt: skip
    found = {}
    for name, address in (("here", None), ("there", ray.address)):
        config = Compare(**options, run_dir=tmp_path / name, ray=address)
        comparison = Comparison(config)
        turns = [turn.norm for turn in comparison.run()]
        assert sorted(turns) == ["batch", "batch", "none", "none"]
        comparison.finish()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        found[name] = sorted(
            json.dumps({k: v for k, v in r.items() if k != "step_seconds"}) for r in records
        )
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["complete"]
        shares = [row["norm_share"] for row in summary["norms"]]
        assert shares[0] is None
        assert (shares[1] is None) == (address is not None)  # not measured side by side
    assert found["there"] == found["here"]
    assert all(np.isfinite(lane.step_seconds).all() for lane in comparison.lanes)
