"""A process per family of libraries, which times one contestant at a time when it is asked to.

The environment of a process is set before it starts, and the families do not share threads or an
allocator. The module itself imports neither jax nor torch: a worker loads only its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import math
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

EPS, DECAY, GROUPS = 1e-5, 0.9, 8
FORWARD, BOTH = DIRECTIONS = ("forward", "forward+backward")
COPY = "copy"
"""The contestant that only reads x and writes it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape and type."""

    op: str
    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def label(self) -> str:
        """Such as `batch 64×28×28×64 f32`."""
        dtype = {"float32": "f32", "bfloat16": "bf16"}[self.dtype]
        return f"{self.op} {'×'.join(map(str, self.shape))} {dtype}"

    def inputs(self) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
        """Returns `(x, dy, parameters)` in float32; RMS norm has a gain only."""
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal(self.shape, np.float32) for _ in range(2))
        g, b = (0.1 * rng.standard_normal(self.shape[-1], np.float32) for _ in range(2))
        return x, dy, (1 + g,) if self.op == "rms" else (1 + g, b)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A library's way to do the op of a case.

    Attributes:
      peer: The library.
      name: The library and, where it has several ways, which.
      f: `(x, *parameters) -> (y, aux)`, all arrays of the family; aux are new running statistics.
      safe: Whether a large mean costs no digits: the variance is not E[x²] − E[x]².
      default: Whether the library does it this way unless told otherwise.
      note: What a reader should know of how it was asked.
    """

    peer: str
    name: str
    f: Callable[..., tuple[Any, Any]]
    safe: bool
    default: bool = True
    note: str = ""


class Built(NamedTuple):
    """A contestant ready to run: a call per direction, and the peak of temporary memory."""

    calls: Mapping[str, Callable[[], Any]]
    temp_bytes: int | None


class Family(Protocol):
    """What a family of libraries must know."""

    def environment(self) -> dict[str, Any]:
        """Device, threads, versions."""
        ...

    def contestants(self, peer: str, case: Case) -> list[Contestant]:
        """The ways in which a library does the op."""
        ...

    def load(self, case: Case) -> None:
        """Puts the inputs of a case on the device."""
        ...

    def copy(self) -> Callable[[], Any]:
        """A call that reads x once and writes it once."""
        ...

    def build(self, contestant: Contestant) -> Built:
        """Compiles a contestant for the inputs that are loaded."""
        ...

    def wait(self, out: Any) -> None:
        """Returns when `out` is there."""
        ...


class WorkerError(RuntimeError):
    """A worker that failed or died; the text says how."""


class Worker:
    """A process that serves one family.

    Args:
      family: `"jax"` or `"torch"`.
      variables: Environment variables of the process, beside those of this one.
      platform: Where the family is to compute: `"cpu"`, `"cuda"`; `""` leaves it the choice.
    """

    def __init__(self, family: str, variables: Mapping[str, str], platform: str = "") -> None:
        self.family = family
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, family, platform), daemon=True, name=f"bench-{family}"
        )
        with _environment(variables):
            self._process.start()
        theirs.close()

    def ask(self, request: str, *arguments: Any) -> Any:
        """Calls a method of the worker's `Server` and waits for what it returns.

        Raises:
          WorkerError: If it raised there, or the process has ended.
        """
        try:
            self._connection.send((request, arguments))
            good, reply = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            raise WorkerError(f"the {self.family} process ended with exit code {code}") from None
        if not good:
            raise WorkerError(f"the {self.family} process failed: {reply}")
        return reply

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.terminate()
        self._process.join(10)


class Server:
    """The worker's side: holds the contestants of one case."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._lanes: dict[tuple[str, str], tuple[Callable[[], Any], int]] = {}

    def environment(self) -> dict[str, Any]:
        """What the family says of itself."""
        return self.family.environment()

    def prepare(self, case: Case, peers: Sequence[str], turn_ms: float) -> list[dict[str, Any]]:
        """Compiles and calibrates the contestants of a case; returns what is known of each.

        One that cannot run has a `reason`, and no turns.
        """
        self._lanes.clear()
        gc.collect()
        self.family.load(case)
        self._calibrate(COPY, FORWARD, self.family.copy(), turn_ms)
        contestants, rows = [], []
        for peer in peers:
            try:
                contestants += self.family.contestants(peer, case)
            except Exception as error:  # whatever a library raises: it is left out, and said
                rows.append({"peer": peer, "name": peer, "reason": _first_line(error)})
        with ThreadPoolExecutor(2) as pool:
            built = [pool.submit(self.family.build, contestant) for contestant in contestants]
        for contestant, future in zip(contestants, built, strict=True):
            row: dict[str, Any] = dataclasses.asdict(contestant)
            del row["f"]
            row |= {"reason": None, "temp_bytes": None, "repetitions": {}}
            rows.append(row)
            try:
                calls, row["temp_bytes"] = future.result()
                for direction, call in calls.items():
                    repetitions = self._calibrate(contestant.name, direction, call, turn_ms)
                    row["repetitions"][direction] = repetitions
            except Exception as error:
                row["reason"] = _first_line(error)
        return rows

    def turn(self, name: str, direction: str) -> float:
        """Returns milliseconds per call. The first call, which finds cold caches, is not timed."""
        call, repetitions = self._lanes[name, direction]
        self.family.wait(call())
        return self._milliseconds(call, repetitions)

    def _calibrate(self, name: str, direction: str, call: Callable[[], Any], turn_ms: float) -> int:
        self.family.wait(call())
        ms = min(self._milliseconds(call, 1) for _ in range(2))
        repetitions = max(1, math.ceil(turn_ms / ms))
        self._lanes[name, direction] = call, repetitions
        return repetitions

    def _milliseconds(self, call: Callable[[], Any], repetitions: int) -> float:
        begin = time.perf_counter()
        out = None
        for _ in range(repetitions):
            out = call()
        self.family.wait(out)
        return (time.perf_counter() - begin) / repetitions * 1e3


def serve(connection: Any, family: str, platform: str) -> None:
    """Answers requests until the other side closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator
    warnings.simplefilter("ignore")
    gc.disable()  # a collection in the middle of a turn would be timed
    server: Server | None = None
    while True:
        try:
            request, arguments = connection.recv()
        except EOFError:
            return
        try:
            if server is None:
                module = importlib.import_module(f".peers_{family}", __package__)
                server = Server(module.family(platform))
            reply = True, getattr(server, request)(*arguments)
        except Exception as error:
            reply = False, _first_line(error)
        connection.send(reply)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
