"""Synced batch norm beside flax's, haiku's and PyTorch's: its time, its variance, its collectives.

    normlab bench sync             # the peers: pip install 'normlab[peers]'
    normlab bench sync --markdown  # the tables of docs/speed.md and docs/ledger.md

The JAX libraries run in `shard_map`, over the devices of one process and over processes of one
device each, which `jax.distributed` joins; PyTorch has a process for each device. Collectives of
processes are gloo's, on 127.0.0.1. All take turns. Forward computes the output and the next running
statistics; both is that, and the gradients by x, g and b. Outputs and gradients are compared first:
the times are worth nothing where the work differs.

The floor is the traffic that no implementation can avoid, as in `bench ops`: a copy of x on every
device, in the same rounds; forward+backward 2.5 copies. A time over flax's is that of the two in
the same round; its median and the middle half are given. The variance is that which goes into the
running statistics, of x ~ N(1000, 1) in float32, beside that of the same numbers in float64.
Collectives are counted in the compiled programs, here and, where their compilers are installed, for
a TPU and a GPU machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import socket
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..programs.machines import missing
from ..rundir import RunError, processor
from .config import BenchSync
from .sync_jax import ELSEWHERE, MEAN, Part
from .turns import INSTALL, REUSE, Process, ask_all, available_cores, paired, take_turns
from .worker import COPIES, COPY, DIRECTIONS, FORWARD, PEERS

SHAPES = ((32, 256), (8, 28, 28, 64))
"""Of x on each device."""

TIMES = (
    "x on each device",
    "over",
    "batch norm",
    *("fwd ms", "× floor", "÷ flax", "both ms", "× floor", "÷ flax"),
)
COUNTS = (
    "x on each device",
    "batch norm",
    "error of var",
    "collectives here, fwd + bwd",
    *ELSEWHERE.values(),
)

GAP = 1e-4
"""How far outputs and gradients may be apart, relative to the largest."""

Lane = tuple[str, str, str]
"""Over what, which contestant, which direction."""


@dataclasses.dataclass
class Result:
    """What was measured.

    Attributes:
      taken: For each shape the turns of every lane, in milliseconds.
      counts: The rows of the second table.
      gap: The largest relative gap of outputs and gradients.
      torch: Its version, and why its module is not timed; `None` where it took no part.
    """

    taken: dict[tuple[int, ...], dict[Lane, list[float]]]
    counts: list[tuple[str, ...]]
    gap: float = 0.0
    torch: tuple[str, str] | None = None


class Side:
    """Processes that do the same at the same time.

    Args:
      over: What the batch is spread over.
      make: What each makes, of `arguments` and, where there are several, their number, its own
        and the address at which they meet.
      *arguments: See `make`.
      number: How many processes there are.
      variables: Their environment variables.
    """

    def __init__(
        self,
        over: str,
        make: Callable[..., Any],
        *arguments: Any,
        number: int,
        variables: dict[str, str],
    ) -> None:
        self.over = over
        cores, address = available_cores(), _address()
        self.processes = [
            Process(
                f"{over}, {i + 1}",
                make,
                *(arguments if number == 1 else (*arguments, number, i, address)),
                variables=variables,
                cores=cores[i::number] or cores,
            )
            for i in range(number)
        ]

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of all; returns what they return."""
        return ask_all(self.processes, method, *arguments)

    def turns(self, shape: tuple[int, ...], turn_ms: float) -> dict[Lane, Callable[[], float]]:
        """Compiles all for a shape; returns turns that last so long, by the slowest process."""

        def turn(key: Any, repetitions: int) -> float:
            return max(self.ask("turn", key, repetitions))

        found = {}
        for key in self.ask("prepare", shape)[0]:
            repetitions = math.ceil(turn_ms / min(turn(key, 3) for _ in range(2)))
            found[self.over, *key] = functools.partial(turn, key, repetitions)
        return found

    def outputs(self, shape: tuple[int, ...]) -> dict[str, list[np.ndarray]]:
        """By contestant, what the first device has."""
        return self.ask("outputs", shape)[0]


def run(config: BenchSync, say: Callable[[str], None] = lambda _: None) -> Result:
    """Measures shape after shape, then reads the programs.

    Args:
      config: What to measure.
      say: Receives short messages about what is going on.

    Raises:
      RunError: If a process ends, or a contestant does other work than normlab does.
    """
    result = Result({}, [])
    variables = REUSE if config.reuse_memory else {}
    with contextlib.ExitStack() as stack:

        def start(*arguments: Any, number: int = 1) -> Side:
            own = {"JAX_PLATFORMS": "cpu"} if number > 1 else {}  # gloo joins CPUs
            side = Side(*arguments, number=number, variables={**variables, **own})
            for process in side.processes:
                stack.enter_context(process)
            return side

        alone = start(f"{config.devices} devices", Part, config.devices)
        sides = [alone]
        if config.processes > 1:
            over, number = f"{config.processes} processes", config.processes
            sides.append(start(over, Part, 1, number=number))
            if importlib.util.find_spec(PEERS["torch"][0]):
                sides.append(start(over, torch_part, number=number))
                result.torch = sides[-1].ask("refused")[0]
        for shape in SHAPES:
            say(f"{_times(shape)}: compiling")
            turns = {k: v for side in sides for k, v in side.turns(shape, config.turn_ms).items()}
            for over in {side.over: None for side in sides}:
                found = [side.outputs(shape) for side in sides if side.over == over]
                result.gap = max(result.gap, gap({k: v for one in found for k, v in one.items()}))
            for taken in take_turns(turns, config.rounds):
                say(f"{_times(shape)}: {len(taken[alone.over, COPY, FORWARD])} of {config.rounds}")
                result.taken[shape] = taken
        for side in sides:
            side.ask("leave")
    say("reading the programs")
    here = {"JAX_PLATFORMS": "cpu"}  # or JAX would look for the machines it is to compile for
    with Process("programs", Part, config.devices, variables=here) as process:
        for shape in SHAPES:
            result.counts += [(_times(shape), *row) for row in process.ask("counts", shape)]
    return result


def torch_part(*arguments: Any) -> Any:
    """What a process of PyTorch makes."""
    from .sync_torch import Part

    return Part(*arguments)


def gap(outputs: dict[str, list[np.ndarray]]) -> float:
    """The largest relative gap between normlab's arrays and another's; RunError past `GAP`."""
    largest, ours = 0.0, outputs["normlab"]
    for name, theirs in outputs.items():
        for a, b in zip(ours, theirs, strict=True):
            found = float(np.abs(a - b).max() / np.abs(a).max())
            if not found < GAP:
                raise RunError(
                    f"{name} and normlab are {found:.1e} apart, relatively, where {GAP} is "
                    "allowed: they do not do the same work."
                )
            largest = max(largest, found)
    return largest


def times(result: Result) -> Iterator[tuple[str, ...]]:
    """The first table, a row for each shape, arrangement and contestant."""
    for shape, taken in result.taken.items():
        ms = {lane: statistics.median(turns) for lane, turns in taken.items()}
        for over, name in dict.fromkeys((over, name) for over, name, _ in taken):
            cells = []
            for direction in DIRECTIONS:
                floor = COPIES[direction] * ms[over, COPY, FORWARD]
                if name == COPY:
                    cells += [f"{floor:.3f}", "1.0", "–"]
                    continue
                ratio, low, high = paired(taken, (over, name, direction), (over, "flax", direction))
                took = ms[over, name, direction]
                cells += [f"{took:.3f}", f"{took / floor:.1f}"]
                cells += ["1" if name == "flax" else f"{ratio:.2f} ({low:.2f}–{high:.2f})"]
            yield _times(shape), over, "floor" if name == COPY else name, *cells


def as_json(result: Result) -> list[dict[str, Any]]:
    """The medians, of each shape, arrangement, contestant and direction."""
    return [
        {
            "shape": list(shape),
            "over": over,
            "name": name,
            "direction": direction,
            "median_ms": statistics.median(turns),
        }
        for shape, taken in result.taken.items()
        for (over, name, direction), turns in taken.items()
    ]


def remarks(config: BenchSync, result: Result) -> Iterator[str]:
    """What the tables do not say of themselves."""
    cores = len(available_cores())
    reused = ", ".join(f"{name}={value}" for name, value in REUSE.items())
    memory = f"reused ({reused})" if config.reuse_memory else "as the system has it"
    yield (
        f"medians of {config.rounds} turns; {cores} cores of {processor()}, shared out to the "
        f"processes; memory {memory}. ÷ flax: of the same round, with the middle half. Outputs and "
        f"gradients agree to {result.gap:.0e}. Error: the largest of var at mean {MEAN:g}, σ = 1, "
        "relative to float64."
    )
    if result.torch and result.torch[1]:
        yield (
            f"torch.nn.SyncBatchNorm is not timed (torch {result.torch[0]}): {result.torch[1]}. In "
            "its place its algorithm, made of what PyTorch has on a CPU."
        )
    wanted = ("haiku", "torch") if config.processes > 1 else ("haiku",)
    if absent := [peer for peer in wanted if not importlib.util.find_spec(PEERS[peer][0])]:
        yield f"not installed, and left out: {', '.join(absent)}. To add them: {INSTALL}"
    for target, topology in ELSEWHERE.items():
        if command := missing(target):
            yield f"To compile for {topology} too: {command}"


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
