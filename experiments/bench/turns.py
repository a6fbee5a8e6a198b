"""Contestants that take turns, each in this process or in one of its own.

They take turns in rounds that start with another one each time, so that all meet the machine in
the same moods; medians are compared. The environment and the cores of a process are set before it
starts. The module imports neither jax nor torch: a process loads only what it needs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from ..rundir import RunError

REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""Environment of a process whose C library keeps memory that was freed."""

INSTALL = "pip install 'normlab[peers]'"

Key = TypeVar("Key")


def take_turns(
    turns: Mapping[Key, Callable[[], float]], rounds: int
) -> Iterator[dict[Key, list[float]]]:
    """Yields after each round what all turns so far have returned, by contestant."""
    taken: dict[Key, list[float]] = {key: [] for key in turns}
    order = list(turns)
    for i in range(rounds):
        start = i % len(order)
        for key in order[start:] + order[:start]:
            taken[key].append(turns[key]())
        yield taken


def milliseconds(f: Callable[[], Any]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    f()
    return 1e3 * (time.perf_counter() - begin)


def per_step(turn: Callable[[], Any], steps: int) -> Callable[[], float]:
    """`turn`, which takes `steps` steps, as one that returns milliseconds per step."""
    return lambda: milliseconds(turn) / steps


def medians(taken: Mapping[Key, list[float]]) -> dict[str, dict[Key, Any]]:
    """The medians of what turns returned, as `ms_per_step`, and `range_ms`, least and most."""
    return {
        "ms_per_step": {key: statistics.median(ms) for key, ms in taken.items()},
        "range_ms": {key: (min(ms), max(ms)) for key, ms in taken.items()},
    }


def paired(taken: Mapping[Key, list[float]], key: Key, base: Key) -> tuple[float, float, float]:
    """A contestant's time over another's in the same round: the median and the middle half.

    What else the machine does meets both.
    """
    ratios = [ours / theirs for ours, theirs in zip(taken[key], taken[base], strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, low, high


class Repeated:
    """A turn that repeats a call to last long enough, and returns milliseconds per call.

    Args:
      call: What is timed.
      turn_ms: How long a turn lasts.
      wait: Returns when what `call` returned is there.

    Attributes:
      repetitions: Calls per turn, beside the first, which finds cold caches and is not timed.
    """

    def __init__(
        self, call: Callable[[], Any], turn_ms: float, wait: Callable[[Any], Any] = lambda _: None
    ) -> None:
        self._call, self._wait = call, wait
        self.repetitions = 1
        once = min(self() for _ in range(2))
        self.repetitions = max(1, math.ceil(turn_ms / once))

    def __call__(self) -> float:
        """Takes the turn."""
        self._wait(self._call())
        return milliseconds(self._repeat) / self.repetitions

    def _repeat(self) -> None:
        out = None
        for _ in range(self.repetitions):
            out = self._call()
        self._wait(out)


class ProcessError(RunError):
    """A process that failed or died; the text says how."""


class Process:
    """A process that makes one object, and calls its methods when it is asked to.

    Args:
      name: What errors call it.
      make: Called there with `arguments` when the first request comes; both are sent by pickle.
      *arguments: See `make`.
      variables: Environment variables of the process, beside those of this one.
      cores: The cores it may run on; by default those of this process.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., Any],
        *arguments: Any,
        variables: Mapping[str, str],
        cores: Iterable[int] | None = None,
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, arguments), daemon=True, name=f"bench-{name}"
        )
        with _inherited(variables, available_cores() if cores is None else cores):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Process:
        """The process itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it."""
        self.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the process's object and waits for what it returns.

        Raises:
          ProcessError: If it raised there, or the process has ended.
        """
        return ask_all([self], method, *arguments)[0]

    def begin(self, method: str, *arguments: Any) -> None:
        """Asks for a call; `answer` waits for what it returns, and raises what `ask` does."""
        with contextlib.suppress(OSError):  # `answer` will say so
            self._connection.send((method, arguments))

    def answer(self) -> Any:
        """See `begin`."""
        try:
            good, reply = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            raise ProcessError(f"the {self.name} process ended with exit code {code}") from None
        if not good:
            raise ProcessError(f"the {self.name} process failed: {reply}")
        return reply

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(1)  # by itself, so that it puts away what it has opened
        self._process.terminate()
        self._process.join(10)


def ask_all(processes: Iterable[Process], method: str, *arguments: Any) -> list[Any]:
    """What `Process.ask` returns of each, all at the same time."""
    processes = list(processes)
    for process in processes:
        process.begin(method, *arguments)
    return [process.answer() for process in processes]


def _serve(connection: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answers requests until the other side closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator
    os.dup2(2, 1)  # what libraries print, gloo for one, is no part of a table
    made = None
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        try:
            made = make(*arguments) if made is None else made
            reply = True, getattr(made, method)(*given)
        except Exception as error:  # whatever it is, the other side says it
            reply = False, str(error) if isinstance(error, RunError) else first_line(error)
        connection.send(reply)


@contextlib.contextmanager
def _inherited(variables: Mapping[str, str], cores: Iterable[int]) -> Iterator[None]:
    """Processes that are started inside have these environment variables and cores."""
    environment, before = dict(os.environ), available_cores()
    pinned = hasattr(os, "sched_setaffinity")
    os.environ.update(variables)
    if pinned:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if pinned:
            os.sched_setaffinity(0, before)


def available_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def require_torch(command: str) -> None:
    """Raises RunError, with the line that installs it, where torch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise RunError(
            f"bench {command} measures PyTorch beside normlab, and torch is not installed: "
            f"{INSTALL}"
        )


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
