"""Runs of many processes: what ends one, what goes on, and that the numbers do not show it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

import normlab as nl
from normlab.experiments import console as cli
from normlab.experiments.data import load
from normlab.experiments.rundir import RunError
from normlab.experiments.training import processes
from normlab.experiments.training.checkpoints import Checkpoints
from normlab.experiments.training.config import Joining, Train
from normlab.experiments.training.train import Program, train
from tests.helpers import environment

ROOT = Path(__file__).parents[2]
STEPS = 600
TINY = ["--dataset", "digits", "--model", "mlp", "--batch-size", "32", "--steps", str(STEPS)]
TINY += ["--log-every", "1", "--sync", "local"]
OFTEN = ["--checkpoint-every", "10"]

FAULT = """
import os, sys, time
from normlab.experiments import console as cli
from normlab.experiments.training.train import Program

whole = Program.batches

def batches(self, start):
    for step, batch in enumerate(whole(self, start), start + 1):
        {fault}
        yield batch

Program.batches = batches
sys.exit(cli.main())
"""


class Gang:
    """Processes on this machine that believe Slurm has started them.

    Args:
      count: How many.
      options: Those of `train`.
      fault: Python that each runs before every step, which it knows as `step`.
    """

    def __init__(self, count: int, options: list[str], fault: str = "pass") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for process in range(count):
            slurm = {
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(process),
                "SLURM_LOCALID": str(process),
                "JAX_COORDINATOR_PORT": str(port),
            }
            command = [sys.executable, "-c", FAULT.format(fault=fault), "train", *options]
            self.processes.append(start(command, slurm if count > 1 else {}))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def end(self, *which: int, timeout: float = 60) -> list[tuple[int, str]]:
        """Exit status and errors of the processes, all of them by default."""
        ends = []
        for process in [self.processes[i] for i in which] or self.processes:
            _, errors = process.communicate(timeout=timeout)
            ends.append((process.returncode, errors))
        return ends


def start(command: list[str], more: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(COLUMNS="200", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def metrics(path: Path) -> list[dict]:
    file = path / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def summary(path: Path) -> tuple[float, float]:
    found = json.loads((path / "summary.json").read_text())
    assert found["step"] == STEPS
    return found["test_loss"], found["accuracy"]


def wait_for(holds, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def steps(path: Path) -> int:
    """The last step that is in the metrics."""
    with contextlib.suppress(json.JSONDecodeError):  # it is being written
        if lines := metrics(path):
            return lines[-1]["step"]
    return 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """One process with two devices, each with its own running statistics."""
    path = tmp_path_factory.mktemp("undisturbed")
    with Gang(1, [*TINY, "--devices", "2", "--run-dir", str(path)]) as alone:
        assert alone.end()[0][0] == 0
    return path


def test_a_run_that_failed_in_every_way_is_the_run_that_did_not(tmp_path, undisturbed):
    """Two processes under Slurm's variables, three times, then one, on one directory."""
    path = tmp_path / "run"
    options = [*TINY, *OFTEN, "--run-dir", str(path)]

    raising = "if step == 14 and os.environ['SLURM_PROCID'] == '1': raise ValueError('bad example')"
    with Gang(2, options, f"time.sleep(0.05)\n        {raising}") as gang:
        (other, noticed), (status, errors) = gang.end()
    assert (other, status) == (1, 1)
    assert re.search(r"\nerror: process 1: ValueError: bad example \(<string>:\d+\)\n$", errors)
    assert "\nerror: process 0: another process is gone" in noticed
    assert "Traceback" not in errors + noticed
    assert steps(path) == 13

    with Gang(2, [*options, "--step-timeout", "3"], "time.sleep(0.02)") as gang:
        wait_for(lambda: steps(path) >= 24)
        gang.processes[1].send_signal(signal.SIGSTOP)
        [(status, errors)] = gang.end(0)
        stopped_at = steps(path)
    assert status == 1
    assert f"error: process 0: step {stopped_at + 1} did not finish within 3 s" in errors

    with Gang(2, options, "time.sleep(0.1)") as gang:
        wait_for(lambda: steps(path) >= 34)
        gang.processes[1].send_signal(signal.SIGTERM)
        ends = gang.end()
    assert [status for status, _ in ends] == [143, 143]
    agreed = steps(path)
    assert f"stopped with a checkpoint of step {agreed}: the same command" in ends[0][1]
    assert (path / "checkpoints" / str(agreed)).is_dir()

    with Gang(1, [*options, "--devices", "2", "--checkpoint-every", "200"]) as gang:
        assert gang.end()[0][0] == 0
    assert metrics(path) == metrics(undisturbed)
    assert summary(path) == summary(undisturbed)
    starts = [r["step"] for r in processes.read_diaries(path) if r["event"] == "start"]
    assert starts[:6:2] == starts[1:6:2] == sorted(starts[:6:2])
    assert starts[4] >= 10  # of a checkpoint that was being written, the one before it
    assert starts[6:] == [agreed]


@contextlib.contextmanager
def launched(path: Path, *options: str):
    """The driver of two workers, which is stopped, with all that it started, at the end."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "normlab.experiments", "launch", "--workers", "2", *options]
    driver = start(
        [*command, "--", "train", *TINY, "--checkpoint-every", "20", "--run-dir", str(path)], {}
    )
    try:
        yield driver
    finally:
        family = (
            psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        )
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        driver.kill()
        driver.communicate()


def pid(path: Path, process: int) -> int:
    records = processes.read_diaries(path)
    return [r["pid"] for r in records if r["process"] == process][-1]


def strays() -> list[str]:
    """Processes of Ray that a run left."""
    names = (" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    return [name for name in names if "normlab-ray-" in name]


def test_a_run_under_ray_with_a_worker_killed_is_the_run_without(tmp_path, undisturbed):
    path = tmp_path / "run"
    with launched(path) as driver:
        wait_for(lambda: (path / "checkpoints" / "20").is_dir())
        os.kill(pid(path, 1), signal.SIGKILL)
        out, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    assert metrics(path) == metrics(undisturbed)
    assert summary(path) == summary(undisturbed)
    restarted = [line for line in errors.splitlines() if line.startswith("restarted")]
    assert len(restarted) == 1
    assert re.fullmatch(r"restarted: .*process 1 .* Started again from step \d+0\.", restarted[0])
    assert re.match(rf"step {STEPS}: test loss .* on 2 devices in 2 processes\n", out)
    assert not strays()


@pytest.mark.slow
def test_a_run_under_ray_with_a_worker_stopped_is_the_run_without(tmp_path, undisturbed):
    path = tmp_path / "run"
    with launched(path) as driver:
        wait_for(lambda: steps(path) >= 25)
        os.kill(pid(path, 1), signal.SIGSTOP)
        _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 0, errors
    assert metrics(path) == metrics(undisturbed)
    assert summary(path) == summary(undisturbed)
    assert not strays()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launch_that_is_asked_to_stop_leaves_a_checkpoint_and_no_process(
    tmp_path, undisturbed, number
):
    path = tmp_path / "run"
    with launched(path) as driver:
        wait_for(lambda: steps(path) >= 25)
        driver.send_signal(number)
        _, errors = driver.communicate(timeout=60)
        assert driver.returncode == 128 + number
    agreed = steps(path)
    assert f"stopped with a checkpoint of step {agreed}" in errors
    assert not strays()
    with launched(path) as driver:
        assert driver.communicate(timeout=120)[0]
    assert metrics(path) == metrics(undisturbed)


@pytest.mark.slow
def test_a_launch_that_failed_too_often_says_why(tmp_path):
    path = tmp_path / "run"
    with launched(path, "--max-failures", "0") as driver:
        wait_for(lambda: steps(path) >= 25)
        os.kill(pid(path, 1), signal.SIGKILL)
        _, errors = driver.communicate(timeout=60)
    assert driver.returncode == cli.EXIT_FAILED
    assert re.match(r"error: the run failed: .*process 1 .*\nstopped with a checkpoint", errors)
    assert len(errors.splitlines()) == 2


@pytest.mark.slow
def test_the_death_of_process_0_ends_the_others(tmp_path, undisturbed):
    path = tmp_path / "run"
    options = [*TINY, *OFTEN, "--run-dir", str(path)]
    with Gang(2, options, "time.sleep(0.05)") as gang:
        wait_for(lambda: steps(path) >= 25)
        gang.processes[0].kill()
        [(status, _)] = gang.end(1)
    assert status != 0
    with Gang(2, options) as gang:
        assert [status for status, _ in gang.end()] == [0, 0]
    assert metrics(path) == metrics(undisturbed)


WATCHED = """
import ctypes, sys, time
from pathlib import Path
from normlab.experiments.training.processes import Diary, Watchdog
Watchdog.LOCKED = 1.0
with Watchdog(0.5, 60, Diary(Path(sys.argv[1]), 0)) as watchdog:
    for step in range(5):
        time.sleep(0.2)
        watchdog.beat(f"step {{step + 2}}")
    {hang}
"""


@pytest.mark.parametrize(
    ("hang", "says"),
    [
        ("time.sleep(60)", r"error: step 6 did not finish within 0.5 s.*<string>:10"),
        ("ctypes.PyDLL(None).sleep(60)", r"Timeout.*<string>\", line 10"),  # holds the interpreter
    ],
    ids=["python", "locked"],
)
def test_the_watchdog_ends_a_process_that_hangs_and_says_where(tmp_path, hang, says):
    process = start([sys.executable, "-c", WATCHED.format(hang=hang), str(tmp_path)], {})
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.search(says, errors, re.DOTALL), errors


def tiny(path: Path, **options) -> Train:
    given = {"dataset": "digits", "model": "mlp", "batch_size": 32, "log_every": 1}
    return Train(**{**given, "steps": 4, "checkpoint_every": 2, "run_dir": path, **options})


def slow(*values: str) -> list:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(
    ("sync", "mesh"),
    [
        ("every=2", ()),
        ("inner+every=2", (4, 2)),
        *(pytest.param(sync, (), marks=pytest.mark.slow) for sync in ("all", "local", "ghost=2")),
        pytest.param("inner", (4, 2), marks=pytest.mark.slow),
        pytest.param("groups=2", (), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_goes_on_is_the_run_in_one_piece(tmp_path, sync, mesh):
    train(tiny(tmp_path / "pieces", sync=sync, mesh=mesh, steps=2))
    pieces = train(tiny(tmp_path / "pieces", sync=sync, mesh=mesh)).summary
    whole = train(tiny(tmp_path / "whole", sync=sync, mesh=mesh)).summary
    assert pieces is not None
    assert whole is not None
    assert all(pieces[name] == whole[name] for name in ("test_loss", "accuracy"))
    assert metrics(tmp_path / "pieces") == metrics(tmp_path / "whole")
    found = [(record["kind"], record["step"]) for record in metrics(tmp_path / "whole")]
    assert found == [*(("training", step) for step in (1, 2, 3, 4)), ("evaluation", 4)]


@pytest.mark.parametrize("norm", ["weight", "layer", "cosine"])
def test_devices_for_a_norm_that_measures_no_batch_are_refused(tmp_path, norm):
    with pytest.raises(RunError, match=f"--sync every=2: it has no effect on norm {norm}"):
        train(tiny(tmp_path / "run", norm=norm, sync="every=2", steps=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sync", ["every=2", *slow("local")])
def test_running_statistics_of_other_devices_are_merged(tmp_path, sync, monkeypatch):
    """Eight devices' checkpoint on four: every row is taken in, none dropped."""
    config = tiny(tmp_path / "run", sync=sync)
    train(config)
    eight = restored(config)
    on_devices(4, monkeypatch)
    four = restored(config)
    for before, after in zip(running(eight), running(four), strict=True):
        assert np.ptp(before.mean, axis=0).max() > 1e-3  # the devices had their own
        assert after.mean.shape == (4, *before.mean.shape[1:])
        variance = before.var.mean(0) + before.mean.var(0)  # within and between
        for mean, var in zip(after.mean, after.var, strict=True):
            np.testing.assert_allclose(mean, before.mean.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(var, variance, rtol=1e-5)


def on_devices(count: int, monkeypatch) -> None:
    """As if this process had no more than the first `count` devices."""
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: count)


def test_groups_of_a_mesh_keep_the_population_of_all_devices(tmp_path, monkeypatch):
    """Beside one device, which normalizes quarters of its batch and counts all of it."""
    config = tiny(tmp_path / "mesh", sync="inner", mesh=(4, 2), steps=1)
    train(config)
    program, mesh = Program(config, load("digits")), restored(config)
    on_devices(1, monkeypatch)
    alone = tiny(tmp_path / "one", sync="ghost=4", steps=1)
    train(alone)
    one = restored(alone)
    for many, expected in zip(running(mesh), running(one), strict=True):
        assert many.mean.shape[0] == 8  # a row for each device, all alike
        for row in range(8):
            np.testing.assert_allclose(many.mean[row], expected.mean[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(many.var[row], expected.var[0], rtol=1e-5)
    for leaf, expected in zip(*map(jax.tree.leaves, (mesh.params, one.params)), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)
    # The first layer's input does not depend on how anything was normalized.
    start = Program(alone, program.data)
    kernel = np.asarray(jax.tree.leaves(start.init().params["Normed_0"]["kernel"])[0], np.float64)
    (_, (inputs, *_)) = next(iter(start.batches(0)))
    a = np.asarray(start.task.preprocess(np.asarray(inputs)), np.float64).reshape(32, -1) @ kernel
    first = running(mesh)[0]
    np.testing.assert_allclose(first.mean[0], a.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first.var[0], a.var(0), rtol=1e-4)
    groups = a.reshape(4, 8, -1).var(1).mean(0)  # what a group knows by itself
    assert np.abs(first.var[0] / groups - 1).max() > 0.05


@pytest.mark.parametrize(
    ("axes", "numbers", "more"),
    [
        ("inner", "groups=2", {}),
        ("together=axis0", "groups=0,2,4,6|1,3,5,7", {"microbatches": 2}),
        *(
            pytest.param(f"inner+{word}", f"groups=2+{word}", {}, marks=pytest.mark.slow)
            for word in ("every=2", "gradient=forward", "gradient=none", "second=always")
        ),
        pytest.param("inner", "groups=2", {"population": "renorm"}, marks=pytest.mark.slow),
        pytest.param("all+staged", "all", {}, marks=pytest.mark.slow),
    ],
)
def test_groups_of_a_mesh_are_groups_by_number(tmp_path, axes, numbers, more):
    mesh = train(tiny(tmp_path / "mesh", sync=axes, mesh=(4, 2), **more)).summary
    flat = train(tiny(tmp_path / "flat", sync=numbers, **more)).summary
    assert mesh is not None
    assert flat is not None
    assert mesh["test_loss"] == pytest.approx(flat["test_loss"], rel=1e-5)
    assert mesh["accuracy"] == flat["accuracy"]
    losses = [[r["train_loss"] for r in metrics(tmp_path / name)] for name in ("mesh", "flat")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_with_a_mesh_are_one(tmp_path, monkeypatch):
    """The axes go over the devices of all processes, the last over those of one."""
    options = ["--dataset", "digits", "--model", "mlp", "--batch-size", "32", "--steps", "4"]
    options += ["--log-every", "1", "--sync", "inner", "--mesh", "2", "2", "--devices", "2"]
    with Gang(2, [*options, "--run-dir", str(tmp_path / "two")]) as gang:
        ends = gang.end()
    assert [status for status, _ in ends] == [0, 0], ends
    on_devices(4, monkeypatch)
    train(tiny(tmp_path / "one", sync="inner", mesh=(2, 2)))
    two, one = ([r["train_loss"] for r in metrics(tmp_path / name)] for name in ("two", "one"))
    np.testing.assert_allclose(two, one, rtol=1e-6)  # four are added in another order
    assert len(one) == 4


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_groups_that_change_when_a_run_goes_on_are_refused_and_nothing_is_lost(
    tmp_path, monkeypatch
):
    meshed, by_number = tmp_path / "mesh", tmp_path / "numbers"
    train(tiny(meshed, sync="inner", mesh=(4, 2), steps=2))
    train(tiny(by_number, sync="groups=0,1,2,3|4,5,6,7", steps=2))
    before = files(meshed), files(by_number)
    with pytest.raises(RunError, match="of another run: --mesh 4 2 and not 2 4"):
        train(tiny(meshed, sync="inner", mesh=(2, 4)))
    with pytest.raises(
        RunError, match=r"--sync inner and not groups=2, --mesh 4 2 and not nothing"
    ):
        train(tiny(meshed, sync="groups=2"))
    with pytest.raises(RunError, match="--mesh nothing and not 8"):
        train(tiny(by_number, sync="groups=0,1,2,3|4,5,6,7", mesh=(8,)))
    on_devices(4, monkeypatch)
    with pytest.raises(RunError, match="--mesh 4 2: that is 8 devices, and there are 4"):
        train(tiny(meshed, sync="inner", mesh=(4, 2)))
    with pytest.raises(RunError, match=r"--sync groups=0,1,2,3\|4,5,6,7: .* 4 devices"):
        train(tiny(by_number, sync="groups=0,1,2,3|4,5,6,7"))
    assert (files(meshed), files(by_number)) == before


def restored(config: Train):
    data = load("digits")
    program = Program(config, data)
    assert config.run_dir is not None
    step, state = Checkpoints(config.run_dir, 2).restore(program, program.init())
    assert step == config.steps
    return state


def running(state) -> list[nl.Running]:
    leaves = jax.tree.leaves(state.norm_state, is_leaf=lambda s: isinstance(s, nl.Running))
    return [jax.tree.map(np.asarray, s) for s in leaves if isinstance(s, nl.Running)]


@pytest.mark.parametrize("norm", ["none", *slow("layer", "weight", "cosine")])
def test_norms_without_running_statistics_go_on_as_well(tmp_path, norm):
    config = tiny(tmp_path / "run", norm=norm, steps=2)
    train(config)
    assert train(tiny(tmp_path / "run", norm=norm, steps=3)).step == 3


def said(capsys, *arguments: str) -> str:
    """What a wrong command prints: one line, or what the parser makes of it."""
    try:
        status = cli.main([*arguments])
    except SystemExit as stop:  # the parser's own refusals, in a box
        status = stop.code
    out, errors = capsys.readouterr()
    assert status == cli.EXIT_USAGE, errors
    assert not out
    assert "Traceback" not in errors
    if "Value error" in errors:
        return " ".join(errors.split())
    *_, line = errors.splitlines()  # what was being done stands before it
    assert line.startswith("error: ")
    assert errors.count("error") == line.count("error")
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["launch", "--workers", "0", "--", "train"], "--workers: got 0; it must be at least 1"),
        (["launch", "--workers", "2"], "there is nothing to launch; for example: launch --workers"),
        (["launch", "--", "compare"], "cannot launch 'compare', only train; for example"),
        (["launch", "--", "train", "--model", "mpl"], "unknown model 'mpl': did you mean 'mlp'"),
        (["launch", "--workers", "3", "--", "train"], "--batch-size 128 does not divide over 3"),
        (["train", "--norm", "bach"], "unknown norm 'bach': did you mean 'batch'"),
        (["train", "--sync", "rings=1"], "--sync rings=1: unknown word 'rings'"),
        (["train", "--dataset", "mnits"], "--dataset: got mnits; it must be one of mnist"),
        (["train", "--steps", "0"], "--steps: got 0; it must be at least 1"),
        (["train", "--process", "1"], "--process: got 1; it must be one of 0 to 0"),
        (["train", "--processes", "2"], "--processes: got 2; it must be beside a --coordinator"),
        (["train", "--devices", "3"], "--devices 3: "),
        (["train", "--dataset", "digits", "--batch-size", "12"], "does not divide over 8 devices"),
        (["train", "--dataset", "digits", "--microbatches", "3"], "8 devices times --microbatch"),
        (["train", "--sync", "inner"], "inner needs a mesh of several axes; give one, as --mesh 4"),
        (["train", "--sync", "inner", "--mesh", "8"], "inner needs a mesh of several axes"),
        (
            ["train", "--mesh", "4", "2", "--sync", "together=chip"],
            "the mesh has no axis 'chip': Known: axis0, axis1",
        ),
        (["train", "--mesh", "0", "8"], "--mesh: got 0 8; it must be sizes of at least 1"),
        (
            ["train", "--dataset", "digits", "--mesh", "4", "4", "--sync", "inner"],
            "--mesh 4 4: that is 16 devices, and there are 8. Give sizes whose product",
        ),
        (
            ["launch", "--workers", "4", "--", "train", "--mesh", "4", "2"],
            "--mesh 4 2: that is 8 devices, and there are 4",
        ),
        (["train", "--population", "renrm"], "unknown population 'renrm': did you mean 'renorm'"),
        (
            ["train", "--dataset", "digits", "--sync", "groups=3", "--model", "mlp"],
            "--sync groups=3: .*groups of 3 for 8 devices",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_use_is_one_clear_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr("normlab.experiments.rundir.CHECKOUT", tmp_path)
    assert re.search(says, said(capsys, *arguments))


def test_a_directory_of_another_run_is_left_alone(tmp_path, capsys):
    path = tmp_path / "run"
    train(tiny(path, steps=2))
    before = sorted(p.name for p in path.iterdir())
    options = [*TINY, "--sync", "all"]
    text = said(capsys, "train", *options, "--lr", "0.1", "--run-dir", str(path))
    assert "is that of another run: --lr 0.05 and not 0.1" in text
    text = said(capsys, "launch", "--", "train", *options, "--lr", "0.1", "--run-dir", str(path))
    assert "is that of another run: --lr 0.05 and not 0.1" in text
    assert sorted(p.name for p in path.iterdir()) == before
    assert "is of step 2, after the last of --steps 1" in said(
        capsys, "train", *options, "--steps", "1", "--run-dir", str(path)
    )
    assert "not the directory of a run" in said(
        capsys, "train", *options, "--run-dir", str(path / "checkpoints")
    )


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    path = tmp_path / "run"
    train(tiny(path, steps=2, norm="none"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "norm": "batch"}))
    text = said(capsys, "train", *TINY, "--sync", "all", "--run-dir", str(path))
    assert re.search(r"of step 2 in .* is not of this model: \S+ is not there in it and", text)


def test_without_ray_the_error_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    text = said(capsys, "launch", "--", "train", *TINY, "--run-dir", str(tmp_path / "run"))
    assert "pip install 'normlab[launch]'" in text
    assert not (tmp_path / "run").exists()


def test_no_cluster_is_asked_where_there_is_none(monkeypatch):
    """On a laptop nothing is waited for; where the others do not come, the error says so."""

    def refuse(**given):
        raise RuntimeError(f"asked with {given}")

    waits = {"start_timeout": 1, "heartbeat_timeout": 10, "shutdown_timeout": 8}
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    for name in processes.CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    processes.form(Joining(cluster="auto", **waits))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-4]")
    processes.form(Joining(cluster="no", **waits))
    with pytest.raises(RunError, match=r"found Slurm \(srun\).*asked with.*--cluster no"):
        processes.form(Joining(cluster="auto", **waits))
    with pytest.raises(RunError, match=r"--coordinator a:1.*'deactivate'"):
        processes.form(Joining("a:1", 2, 1, cluster="auto", **waits))
