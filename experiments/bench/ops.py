"""What each op costs: normlab beside Flax, Haiku, Equinox and PyTorch, in one run.

    python -m experiments bench ops    # the peers: pip install -e '.[peers]'

Each family of libraries has a process of its own (`worker`), and the contestants of a case
take turns across both, in rounds that start with another one each time, so that all meet the
machine in the same moods. Medians are compared. The floor is the traffic that no implementation
can avoid, timed as a copy in the same rounds: forward reads x and writes y; forward+backward does
that, then reads x and dy and writes dx, which is 2.5 copies.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from normlab._checks import nearest

from .. import figures
from ..rundir import RunDirectory, RunError, processor
from .worker import BOTH, COPY, DIRECTIONS, FORWARD, Case, Worker, WorkerError

SHAPES = {
    "conv": ((64, 28, 28, 64), (32, 56, 56, 32)),
    "dense": ((4096, 256), (128, 1024)),
    "tokens": ((16, 128, 768),),
}
KINDS_OF = {
    "batch": ("conv", "dense", "tokens"),
    "layer": ("conv", "dense", "tokens"),
    "rms": ("dense", "tokens"),
    "group": ("conv",),
    "instance": ("conv",),
}
DTYPES = ("float32", "bfloat16")
PEERS = {
    "flax.linen": ("flax", "flax"),
    "flax.nnx": ("flax", "flax"),
    "haiku": ("haiku", "dm-haiku"),
    "equinox": ("equinox", "equinox"),
    "torch": ("torch", "torch"),
}
"""For each peer the module to look for and the package it comes in."""

COPIES = {FORWARD: 1.0, BOTH: 2.5}
REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
INSTALL = "pip install -c constraints.txt -e '.[peers]'"


@dataclasses.dataclass(frozen=True)
class BenchOps:
    """Time each norm, forward and forward+backward, beside the same op of other libraries.

    Ends with a table of times in units of the floor (the bytes that must move, timed as a copy), a
    table of ratios and a figure. Every turn is kept in the run directory. Libraries that are not
    installed are named and left out.
    """

    ops: tuple[str, ...] = tuple(KINDS_OF)
    """batch, layer, rms, group (8 groups), instance."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Kinds of input: conv [N, H, W, C], dense [N, C], tokens [N, T, C]. An op runs on those it is
    used for."""

    dtypes: tuple[str, ...] = DTYPES
    """Types of x: float32, bfloat16. Parameters are float32."""

    peers: tuple[str, ...] = tuple(PEERS)
    """flax.linen, flax.nnx, haiku, equinox, torch."""

    rounds: int = 11
    """Turns of each; the medians are reported."""

    turn_ms: float = 20.0
    """How long a turn lasts: the op is repeated to fill it."""

    scale: int = 1
    """Multiplies the batch axis; a GPU wants more than 1."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed, as a long-running program comes to do.
    Otherwise it may return large arrays to the system, and every call pays for fresh pages."""

    run_dir: Path | None = None
    """Where the results go; must not exist. By default runs/bench-ops-TIME."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        for option, known in (
            ("ops", KINDS_OF),
            ("shapes", SHAPES),
            ("dtypes", DTYPES),
            ("peers", PEERS),
        ):
            for name in getattr(self, option):
                if name not in known:
                    raise RunError(f"--{option}: unknown {name!r}: {nearest(name, known)}.")
        for option in ("rounds", "scale"):
            if getattr(self, option) < 1:
                raise RunError(f"--{option}: got {getattr(self, option)}; it must be at least 1.")
        if not 0 < self.turn_ms < math.inf:
            raise RunError(f"--turn-ms: got {self.turn_ms}; it must be positive and finite.")
        if not self.cases():
            kinds = "; ".join(f"{op}: {', '.join(KINDS_OF[op])}" for op in self.ops or KINDS_OF)
            raise RunError(f"--ops and --shapes leave nothing to time. Ops run on ({kinds}).")

    def cases(self) -> list[Case]:
        """What is timed, in order."""
        return [
            Case(op, kind, (shape[0] * self.scale, *shape[1:]), dtype)
            for op, kinds in KINDS_OF.items()
            for kind in kinds
            for shape in SHAPES[kind]
            for dtype in DTYPES
            if op in self.ops and kind in self.shapes and dtype in self.dtypes
        ]


class Ops:
    """A measurement in the making.

    Args:
      config: What to measure.
      say: Receives short messages about what is going on.
    """

    def __init__(self, config: BenchOps, say: Callable[[str], None] = lambda _: None) -> None:
        self.config = config
        self.absent = {peer: "not installed" for peer in config.peers if not _installed(peer)}
        self.results: list[dict[str, Any]] = []
        self.workers: dict[str, Worker] = {}
        self.run_dir = RunDirectory(config.run_dir, "bench-ops")
        try:
            say("starting the processes")
            variables = REUSE if config.reuse_memory else {}
            # JAX would take most of a GPU's memory, and leave torch without.
            own = {**variables, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            self.workers["jax"] = Worker("jax", own)
            self.environment = {**_machine(), "jax": self._ask("jax", "environment")}
            if "torch" in self._present():
                self._start_torch(variables)
        except BaseException:  # Ctrl-C too: nothing was measured, so nothing is left
            self.finish()
            raise

    def run(self) -> Iterator[str]:
        """Measures case after case; yields a label before compiling a case and after each round."""
        for case in self.config.cases():
            yield f"{case.label}: compiling"
            result = self._prepare(case)
            lanes = [(r["family"], r["name"], d) for r in result["contestants"] for d in r["turns"]]
            lanes += [(family, COPY, FORWARD) for family in result["floor"]]
            turns: dict[tuple[str, str, str], list[float]] = {lane: [] for lane in lanes}
            for i in range(self.config.rounds):
                start = i % len(lanes)
                for family, name, direction in lanes[start:] + lanes[:start]:
                    ms = self._ask(family, "turn", name, direction)
                    turns[family, name, direction].append(ms)
                yield case.label
            self._record(result, turns)

    def _ask(self, family: str, *request: Any) -> Any:
        try:
            return self.workers[family].ask(*request)
        except WorkerError as error:
            raise RunError(f"{error}. Cases that were done are kept.") from error

    def _start_torch(self, variables: dict[str, str]) -> None:
        """Starts torch where JAX computes; leaves it out, with the reason, where it cannot."""
        backend = self.environment["jax"]["backend"]
        where = {"cpu": "cpu", "gpu": "cuda"}.get(backend)
        if where is None:
            self.absent["torch"] = f"JAX computes on {backend}, where torch is not measured"
            return
        self.workers["torch"] = worker = Worker("torch", variables, where)
        try:
            self.environment["torch"] = worker.ask("environment")
        except WorkerError as error:
            worker.close()
            del self.workers["torch"]
            self.absent["torch"] = str(error)

    def _present(self) -> list[str]:
        return ["normlab", *(p for p in PEERS if p in self.config.peers and p not in self.absent)]

    def _prepare(self, case: Case) -> dict[str, Any]:
        rows = []
        for family in self.workers:
            peers = [p for p in self._present() if (p == "torch") == (family == "torch")]
            for row in self._ask(family, "prepare", case, peers, self.config.turn_ms):
                row["family"] = family
                row["turns"] = {} if row["reason"] else {d: [] for d in DIRECTIONS}
                rows.append(row)
        shape = {"label": case.label, **dataclasses.asdict(case)}
        x_bytes = math.prod(case.shape) * {"float32": 4, "bfloat16": 2}[case.dtype]
        floor = {family: {} for family in self.workers}
        return {**shape, "bytes": x_bytes, "floor": floor, "contestants": rows}

    def _record(self, result: dict[str, Any], turns: dict[Any, list[float]]) -> None:
        """Adds a case that was measured to the results, and keeps them."""
        for family, floor in result["floor"].items():
            floor.update(_statistics(turns[family, COPY, FORWARD]))
            floor["gb_per_s"] = 2 * result["bytes"] / floor["median_ms"] / 1e6
        copy_ms = result["floor"]["jax"]["median_ms"]
        for row in result["contestants"]:
            temp = row.pop("temp_bytes", None)
            row["temp_per_x"] = None if temp is None else temp / result["bytes"]
            for direction in row["turns"]:
                values = _statistics(turns[row["family"], row["name"], direction])
                row["turns"][direction] = values
                values["floors"] = values["median_ms"] / (COPIES[direction] * copy_ms)
        result["ratios"] = ratios(result["contestants"])
        self.results.append(result)
        self.environment["load_after"] = _load()
        self._write()

    def _write(self) -> Path:
        config = dataclasses.asdict(self.config)
        config["run_dir"] = str(self.run_dir.path)
        content = {
            "complete": len(self.results) == len(self.config.cases()),
            "config": config,
            "environment": self.environment,
            "absent": self.absent,
            "cases": self.results,
        }
        return self.run_dir.write_json("ops.json", content)

    def finish(self) -> dict[str, Path]:
        """Ends the processes and writes the figure of what was done; returns the paths."""
        self.close()
        if not self.results:
            shutil.rmtree(self.run_dir.path)
            return {}
        paths = {"ops.json": self._write()}
        figure = figures.ops(self.results, self.machine())
        for kind in ("png", "svg"):
            name = f"ops.{kind}"
            paths[name] = self.run_dir.write_bytes(name, figures.encode(figure, kind))
        return paths

    def close(self) -> None:
        """Ends the processes."""
        for worker in self.workers.values():
            worker.close()

    def machine(self) -> str:
        """The device and how memory was allocated, in words."""
        found = self.environment["jax"]["variables"]
        values = [f"{name}={found[name]}" for name in REUSE if name in found]
        memory = "memory reused" if self.config.reuse_memory else "memory as the system has it"
        device = self.environment["jax"]["devices"][0]
        if device == "cpu: cpu":
            device = f"{self.environment['jax']['cores']} cores of {self.environment['processor']}"
        return f"{device}; {memory}" + (f" ({', '.join(values)})" if values else "")


def ratios(contestants: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How normlab's medians compare: below 1 is faster, or needs less memory, than the peer."""
    rows = {row["name"]: row for row in contestants if row["turns"]}
    ours = rows.pop("normlab", None)
    if ours is None:
        return {}

    def over(row: dict[str, Any] | None, direction: str) -> float | None:
        if row is None:
            return None
        return ours["turns"][direction]["median_ms"] / row["turns"][direction]["median_ms"]

    result: dict[str, Any] = {}
    safe = [row for row in rows.values() if row["family"] == "jax" and row["safe"]]
    for direction in DIRECTIONS:
        best = min(safe, key=lambda row: row["turns"][direction]["median_ms"], default=None)
        name = None if best is None else best["name"]
        result[f"fastest safe, {direction}"] = {"peer": name, "ratio": over(best, direction)}
    flax, torch = rows.get("flax.linen"), rows.get("torch")
    result[f"flax.linen, {BOTH}"] = over(flax, BOTH)
    for direction in DIRECTIONS:
        result[f"torch, {direction}"] = over(torch, direction)
    mine, its = ours["temp_per_x"], flax and flax["temp_per_x"]
    result["temp, flax.linen"] = mine / its if mine is not None and its else None
    return result


def _statistics(turns: list[float]) -> dict[str, Any]:
    return {"median_ms": statistics.median(turns), "min_ms": min(turns), "turns_ms": turns}


def _installed(peer: str) -> bool:
    return importlib.util.find_spec(PEERS[peer][0]) is not None


def _machine() -> dict[str, Any]:
    versions = {}
    for peer, (_, package) in PEERS.items():
        if _installed(peer):
            versions[package] = importlib.metadata.version(package)
    threads = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "MKL_"))}
    return {
        "processor": processor(),
        "load_before": _load(),
        "packages": versions,
        "variables": threads,
    }


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
