"""What each op costs: normlab beside Flax, Haiku, Equinox and PyTorch, in one run.

    normlab bench ops    # the peers: pip install 'normlab[peers]'

Each family of libraries has a process of its own (`worker`), and the contestants of a case take
turns across both. The floor is the traffic that no implementation can avoid, timed as a copy in the
same rounds: forward reads x and writes y; forward+backward does that, then reads x and dy and
writes dx, which is 2.5 copies.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..figures import encode
from ..rundir import RunDirectory, RunError, processor
from . import figure
from .config import BenchOps
from .turns import REUSE, Process, ProcessError, take_turns
from .worker import (
    BOTH,
    BYTES,
    COPIES,
    COPY,
    DIRECTIONS,
    FORWARD,
    OTHERS,
    PEERS,
    TORCH,
    Case,
    installed,
    serve,
)


class Ops:
    """A measurement in the making.

    Args:
      config: What to measure.
      say: Receives short messages about what is going on.
    """

    def __init__(self, config: BenchOps, say: Callable[[str], None] = lambda _: None) -> None:
        self.config = config
        self.absent = {peer: "not installed" for peer in config.peers if not installed(peer)}
        self.results: list[dict[str, Any]] = []
        self.workers: dict[str, Process] = {}
        self.run_dir = RunDirectory(config.run_dir, "bench-ops")
        try:
            say("starting the processes")
            variables = REUSE if config.reuse_memory else {}
            # JAX would take most of a GPU's memory, and leave torch without.
            own = {**variables, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            self.workers["jax"] = Process("jax", serve, "jax", variables=own)
            self.environment = {**_machine(), "jax": self._ask("jax", "environment")}
            if set(TORCH) & set(self._present()):
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
            turns = {
                lane: functools.partial(self._ask, lane[0], "turn", *lane[1:]) for lane in lanes
            }
            taken = {}
            for taken in take_turns(turns, self.config.rounds):  # noqa: B007
                yield case.label
            self._record(result, taken)

    def _ask(self, family: str, *request: Any) -> Any:
        try:
            return self.workers[family].ask(*request)
        except ProcessError as error:
            raise RunError(f"{error}. Cases that were done are kept.") from error

    def _start_torch(self, variables: dict[str, str]) -> None:
        """Starts torch where JAX computes; leaves it out, with the reason, where it cannot."""
        backend = self.environment["jax"]["backend"]
        where = {"cpu": "cpu", "gpu": "cuda"}.get(backend)
        if where is None:
            self._without_torch(f"JAX computes on {backend}, where torch is not measured")
            return
        worker = Process("torch", serve, "torch", where, variables=variables)
        self.workers["torch"] = worker
        try:
            self.environment["torch"] = worker.ask("environment")
        except ProcessError as error:
            worker.close()
            del self.workers["torch"]
            self._without_torch(str(error))

    def _without_torch(self, reason: str) -> None:
        self.absent |= {peer: reason for peer in TORCH if peer in self._present()}

    def _present(self) -> list[str]:
        known = (*PEERS, *OTHERS)
        return ["normlab", *(p for p in known if p in self.config.peers and p not in self.absent)]

    def _prepare(self, case: Case) -> dict[str, Any]:
        rows = []
        for family in self.workers:
            peers = [p for p in self._present() if (p in TORCH) == (family == "torch")]
            for row in self._ask(family, "prepare", case, peers, self.config.turn_ms):
                row["family"] = family
                row["turns"] = {} if row["reason"] else {d: [] for d in DIRECTIONS}
                rows.append(row)
        shape = {"label": case.label, **dataclasses.asdict(case)}
        x_bytes = math.prod(case.shape) * BYTES[case.dtype]
        floor = {family: {} for family in self.workers}
        return {**shape, "bytes": x_bytes, "floor": floor, "contestants": rows}

    def _record(self, result: dict[str, Any], taken: dict[Any, list[float]]) -> None:
        """Adds a case that was measured to the results, and keeps them."""
        for family, floor in result["floor"].items():
            floor.update(_statistics(taken[family, COPY, FORWARD]))
            floor["gb_per_s"] = 2 * result["bytes"] / floor["median_ms"] / 1e6
        copy_ms = result["floor"]["jax"]["median_ms"]
        for row in result["contestants"]:
            temp = row.pop("temp_bytes", None)
            row["temp_per_x"] = None if temp is None else temp / result["bytes"]
            for direction in row["turns"]:
                values = _statistics(taken[row["family"], row["name"], direction])
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
        drawn = figure.draw(self.results, self.machine())
        for kind in ("png", "svg"):
            name = f"ops.{kind}"
            paths[name] = self.run_dir.write_bytes(name, encode(drawn, kind))
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


def _machine() -> dict[str, Any]:
    versions = {}
    for peer, (_, package) in {**PEERS, **OTHERS}.items():
        if installed(peer):
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
