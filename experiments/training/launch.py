"""Many processes on one machine or a Ray cluster: Ray Train starts them, and starts them again.

Ray's `JaxTrainer` holds the gang of workers together: if one dies, all are started again, and go on
from the last checkpoint. The workers form `jax.distributed` themselves, by the address that Ray
hands around, because Ray's own way to do it leaves the timeouts at minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import normlab

from ..cluster import LOCAL, connect, imported
from ..rundir import Record, RunError, require_effect
from .again import check_directory
from .config import Launch, Train, require_division, require_mesh
from .processes import gist, read_diaries
from .train import Result, train


def launch(
    config: Launch,
    run: Train,
    say: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
    hear: Callable[[Record], None] = lambda _: None,
) -> Result:
    """Trains on Ray's workers until it is done, was stopped, or has failed too often.

    Args:
      config: How to launch.
      run: What to launch.
      say: Receives where the run stands.
      tell: Receives what went wrong on the way and was mended.
      hear: Receives each record as it is measured.

    Raises:
      RunError: If the run cannot start, or has options that nothing would come of.
    """
    for option in ("coordinator", "processes", "process", "cluster"):
        require_effect(run, False, option, "beside launch, which says where each process is")
    require_effect(run, not config.gpus, "devices", f"beside --gpus {config.gpus}")
    path = run.path
    run = dataclasses.replace(run, run_dir=path)
    check_directory(run)
    if not config.gpus:
        devices = config.workers * max(run.devices, 1)
        require_mesh(run.mesh, devices)
        require_division(run.batch_size, devices, run.microbatches)
    ray = imported("ray")
    imported("ray.train")
    temporary = Path(tempfile.mkdtemp(prefix="normlab-ray-"))
    story = Story(path, tell, hear)
    stop = path / "stop"
    errors: list[BaseException] = []
    try:
        say("starting Ray")
        _start_ray(config, temporary)
        trainer = _trainer(config, run, temporary)
        with _signals(stop, say) as heard:
            stop.unlink(missing_ok=True)
            thread = threading.Thread(target=_fit, args=(trainer, errors), daemon=True)
            thread.start()
            say("waiting for the workers")
            while thread.is_alive():
                thread.join(0.2)
                story.follow()
    finally:
        ray.shutdown()
        stop.unlink(missing_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(path / ".ray", ignore_errors=True)
    story.follow()
    return story.outcome(errors[0] if errors else None, heard[0] if heard else 0)


class Story:
    """What the workers write into the run directory, as they write it.

    Args:
      path: The run directory.
      tell: Receives each new start after a failure.
      hear: Receives each record.
    """

    def __init__(
        self, path: Path, tell: Callable[[str], None], hear: Callable[[Record], None]
    ) -> None:
        self.path, self.tell, self.hear = path, tell, hear
        self.before = len(read_diaries(path))
        self.told = 0
        self.heard = (0, False)

    def gangs(self) -> list[list[dict[str, Any]]]:
        """What happened since the launch, for each time that all were started."""
        gangs: list[list[dict[str, Any]]] = [[]]
        joined: Counter[int] = Counter()
        for record in read_diaries(self.path)[self.before :]:
            joined[record["process"]] += record["event"] == "join"
            if joined[record["process"]] > len(gangs):
                gangs.append([])
            gangs[joined[record["process"]] - 1].append(record)
        return gangs

    def follow(self) -> None:
        """Says and tells what is new."""
        gangs = self.gangs()
        for failed, gang in list(itertools.pairwise(gangs))[self.told :]:
            for start in (r for r in gang if r["event"] == "start" and r["process"] == 0):
                self.tell(f"{failure(failed)} Started again from step {start['step']}.")
                self.told += 1
        starts = [r["step"] for r in gangs[-1] if r["event"] == "start"]
        if not starts:
            return
        self.heard = max(self.heard, (starts[0], True))
        with contextlib.suppress(OSError, ValueError):
            for line in (self.path / "metrics.jsonl").read_text().splitlines():
                record = json.loads(line)
                place = record["step"], record["kind"] == "evaluation"
                if place > self.heard:
                    self.heard = place
                    self.hear(record)

    def outcome(self, error: BaseException | None, number: int) -> Result:
        """How it ended.

        Args:
          error: What Ray raised, if it did.
          number: The signal that was heard, or 0.
        """
        gangs, summary, reason = self.gangs(), None, ""
        ended = [r for r in gangs[-1] if r["event"] in ("end", "stop") and r["process"] == 0]
        if error is not None or not ended:
            own = [gist(e) for e in getattr(error, "worker_failures", {}).values()]
            ray = next(iter(own), gist(error) if error else "no process began")
            reason = failure(gangs[-1]) or ray
        elif ended[-1]["event"] == "end":
            summary = json.loads((self.path / "summary.json").read_text())
        steps = [int(p.name) for p in (self.path / "checkpoints").glob("*") if p.name.isdecimal()]
        usage, restarts = error is None and bool(reason), len(gangs) - 1
        return Result(self.path, max(steps, default=0), summary, number, 0, restarts, reason, usage)


def failure(records: list[dict[str, Any]]) -> str:
    """Who failed and why: rather one who failed, or was killed, than one who noticed."""
    failed = [r for r in records if r["event"] == "failure"]
    silent = {r["process"]: r for r in records}
    silent = {p: r for p, r in silent.items() if r["event"] in ("join", "start")}
    for record in failed:
        if not record["noticed"]:
            return f"process {record['process']}: {record['text']}"
    if silent:
        who = " or ".join(f"process {p} ({r['host']}, pid {r['pid']})" for p, r in silent.items())
        return f"{who} was killed, or died without a word."
    return f"process {failed[0]['process']}: {failed[0]['text']}" if failed else ""


def _start_ray(config: Launch, temporary: Path) -> None:
    library = str(Path(normlab.__file__).resolve().parents[1])
    here = (library, os.getcwd(), os.environ.get("PYTHONPATH", ""))  # a norm of one's own
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, here))} | (
        {} if config.gpus else {"JAX_PLATFORMS": "cpu"}
    )
    connect(
        config.ray,
        "--ray",
        {"env_vars": variables},
        num_cpus=max(config.workers, os.cpu_count() or 1),
        object_store_memory=100 * 2**20,  # nothing is passed through it
        _temp_dir=str(temporary),
    )


def _trainer(config: Launch, run: Train, temporary: Path) -> Any:
    import ray.train  # pyright: ignore[reportMissingImports]
    from ray.train.v2.jax import JaxConfig, JaxTrainer  # pyright: ignore[reportMissingImports]

    assert run.run_dir is not None
    storage = run.run_dir / ".ray" if config.ray not in (None, LOCAL) else temporary / "storage"
    return JaxTrainer(
        _work,
        train_loop_config={"run": dataclasses.asdict(run)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus > 0,
            resources_per_worker={"CPU": 1} | ({"GPU": config.gpus} if config.gpus else {}),
        ),
        jax_config=JaxConfig(use_tpu=False, use_gpu=False),  # the workers form jax.distributed
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """What each of Ray's workers does."""
    import ray.train  # pyright: ignore[reportMissingImports]
    import ray.train.collective  # pyright: ignore[reportMissingImports]
    import ray.util  # pyright: ignore[reportMissingImports]

    context = ray.train.get_context()
    process = context.get_world_rank()
    address = None
    if process == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    address = ray.train.collective.broadcast_from_rank_zero(address)
    processes = context.get_world_size()
    mine = {"coordinator": address, "processes": processes, "process": process}
    # An error that another start would not mend is in the diary; for Ray the work is done.
    with contextlib.suppress(RunError):
        train(Train(**{**config["run"], **mine}))


def _fit(trainer: Any, errors: list[BaseException]) -> None:
    try:
        trainer.fit()
    except BaseException as error:
        errors.append(error)


@contextlib.contextmanager
def _signals(stop: Path, say: Callable[[str], None]) -> Iterator[list[int]]:
    """SIGTERM and the first Ctrl-C ask the workers to stop; the second interrupts."""
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        say("stopping at the next step that all processes agree on")
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()

    heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heeded}  # nohup's stay ignored
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
