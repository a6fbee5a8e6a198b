"""Many processes that train one model: how they find each other, and how they end.

What the engines do not have: short timeouts, a watchdog for a step that never ends, and an end of
one process that does not leave the others waiting.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
from rich.console import Console
from rich.markup import escape

from ..rundir import RunError
from .config import Joining

CLUSTERS = {
    "JAX_COORDINATOR_ADDRESS": "JAX's own variables",
    "SLURM_STEP_NODELIST": "Slurm (srun)",
    "OMPI_MCA_orte_hnp_uri": "Open MPI",
    "JOB_COMPLETION_INDEX": "Kubernetes (an indexed Job or a JobSet)",
    "TPU_WORKER_HOSTNAMES": "a TPU pod",
}
"""Variables that a process has only where something started it together with others."""

EXIT_FAILED = 1
"""Something outside the run failed; the same command goes on from the last checkpoint."""


def form(options: Joining) -> None:
    """Joins the other processes of this run with `jax.distributed`, if there are any.

    Raises:
      RunError: If the others are not there in time, or the cluster cannot be asked.
    """
    coordinator, cluster = options.coordinator, options.cluster
    found = [cluster for name, cluster in CLUSTERS.items() if os.environ.get(name)]
    if coordinator is None and (cluster == "no" or (cluster == "auto" and not found)):
        return
    who = {
        "cluster_detection_method": "deactivate",
        "coordinator_address": coordinator,
        "num_processes": options.processes,
        "process_id": options.process,
    }
    given = (
        f"--coordinator {coordinator}" if coordinator else f"found {', '.join(found) or 'nothing'}"
    )
    advice = (
        f"Start all of them within --start-timeout {options.start_timeout} s; --cluster no runs "
        "this one by itself."
    )
    text = f"the other processes did not come ({given}). {advice}"
    # JAX's own end to a wait is a crash; it comes later, if at all.
    patience = threading.Timer(options.start_timeout, leave, (EXIT_FAILED, text))
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **(who if coordinator else {}),
            initialization_timeout=options.start_timeout + 30,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
            shutdown_timeout_seconds=options.shutdown_timeout,
        )
    except Exception as error:  # of JAX, of the cluster's client, of the network
        failed = f"the processes did not come together ({given}): {gist(error)}. {advice}"
        raise RunError(failed) from error
    finally:
        patience.cancel()


def gist(error: BaseException) -> str:
    """The first line of an error, without the dot."""
    lines = str(error).strip().splitlines()
    return f"{lines[0].rstrip('.')[:300]}" if lines else type(error).__name__


class Stop:
    """Whether the processes were asked to stop, at a step that all agree on.

    SIGTERM to any process is heard by all. Ctrl-C is taken for a SIGTERM; a second one is itself.

    Args:
      file: A file that stands for a SIGTERM to process 0, once it exists.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.signal = file, 0
        self._asked, self._looked = False, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        """Listens to the signals where Python lets it: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            # JAX listens to SIGTERM where there are others, and tells them.
            alone = (signal.SIGTERM,) if jax.process_count() == 1 else ()
            for number in (signal.SIGINT, *alone):
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; every process asks after every step."""
        if jax.process_index() == 0 and time.monotonic() - self._looked > 0.5:
            self._looked = time.monotonic()
            if self.file.exists():
                self.file.unlink(missing_ok=True)
                self._ask()
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _hear(self, number: int, _: object) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._ask()

    def _ask(self) -> None:
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        self._asked = True


class Diary:
    """What befell one process, as lines of JSON that outlive it: `process-0.jsonl`.

    Args:
      directory: The run directory.
      process: Which process this is.
    """

    def __init__(self, directory: Path, process: int) -> None:
        self.path, self.process = directory / f"process-{process}.jsonl", process

    def write(self, event: str, **more: Any) -> None:
        """Appends what happened; a full disk is not worth a second error."""
        record = {
            "event": event,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "process": self.process,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **more,
        }
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"{self.path}: {error}", file=sys.stderr)


def read_diaries(directory: Path) -> list[dict[str, Any]]:
    """What all processes wrote, in the order of their clocks."""
    lines: list[str] = []
    for path in sorted(directory.glob("process-*.jsonl")):
        lines += path.read_text().splitlines()
    return sorted((json.loads(line) for line in lines if line), key=lambda r: r["time"])


class Watchdog:
    """Ends the process if no step is finished for too long.

    Heartbeats go on in a process that hangs in Python, and the others wait for it for ever. A
    thread of Python watches, and says where the process stands; `faulthandler`, which needs no
    interpreter, ends a process whose interpreter is locked.

    Args:
      seconds: How long a step may take.
      first: How long until the first one, which compiles.
      diary: Where the reason is written before the process ends.
    """

    LOCKED = 5.0  # seconds that the thread has before faulthandler takes over

    def __init__(self, seconds: float, first: float, diary: Diary) -> None:
        self.seconds, self.diary = seconds, diary
        self._allowed, self._last, self._doing = first, time.monotonic(), "the first step"
        self._watched = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        """Begins to watch."""
        self._thread.start()
        self.beat("the first step", self._allowed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Ends the watch."""
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()

    def beat(self, doing: str, allowed: float | None = None) -> None:
        """Says that the last thing is done, and what is next.

        Args:
          doing: What is next, for the message.
          allowed: Seconds for it, if not those of a step.
        """
        self._doing, self._last = doing, time.monotonic()
        self._allowed = self.seconds if allowed is None else allowed
        faulthandler.dump_traceback_later(self._allowed + self.LOCKED, exit=True, file=2)

    def _watch(self) -> None:
        while not self._done.wait(min(0.5, self.seconds / 4)):
            if time.monotonic() - self._last > self._allowed:
                self._end()

    def _end(self) -> None:
        frame = sys._current_frames().get(self._watched)
        where = traceback.extract_stack(frame)[-1] if frame else None
        at = f" Python stands in {where.name}, {where.filename}:{where.lineno}." if where else ""
        end_process(
            self.diary,
            f"{self._doing} did not finish within {self._allowed:g} s: this process hangs, or "
            f"waits for one that does.{at} --step-timeout says how long a step may take.",
        )


def end_process(diary: Diary, text: str) -> None:
    """Writes down why, and ends the process at once, without waiting for any other."""
    diary.write("failure", text=text, noticed=False)
    leave(EXIT_FAILED, text)


def together() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def leave(status: int, text: str = "") -> NoReturn:
    """Ends the process at once, for the reason given: the usual way out waits for the others."""
    console = Console(stderr=True)
    console.show_cursor()
    if text:
        who = f"process {jax.process_index()}: " if together() else ""
        line = f"[bold red]error:[/] {who}{escape(text)}"
        console.print(line, highlight=False, soft_wrap=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
