"""The bytes that compiled programs move, with each library's norm in the same place.

    normlab bench bytes    # the compilers: pip install 'normlab[tpu,cuda]'

Each target has a process of its own, which compiles ahead of time (`compiled`), so no accelerator
need be here. What a program moves is read from it by `experiments.programs.passes.moves`, where it
says what that leaves out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..figures import encode
from ..programs.machines import missing
from ..rundir import RunDirectory, RunError
from . import figure
from .blocks import HERE, OURS, WITHOUT, Program, floor
from .compiled import Target
from .config import TARGETS, BenchBytes
from .tables import not_installed
from .turns import Process, ProcessError, ask_all, take_turns
from .worker import BOTH, COPY, DIRECTIONS, FORWARD, installed

AHEAD = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
"""Environment of a process that compiles ahead of time."""


class Bytes:
    """A measurement in the making.

    Args:
      config: What to compile.
      say: Receives short messages about what is going on.

    Raises:
      RunError: If nothing that was named can be compiled for.
    """

    def __init__(self, config: BenchBytes, say: Callable[[str], None] = lambda _: None) -> None:
        self.config = config
        self.no_compiler = {t: missing(t) for t in config.targets if t != HERE and missing(t)}
        self.absent = [peer for peer in config.peers if not installed(peer)]
        self.targets = [t for t in TARGETS if t in config.targets and t not in self.no_compiler]
        if not self.targets:
            raise RunError(f"--targets: nothing is left. {' '.join(self._no_compilers())}")
        self.results: list[dict[str, Any]] = []
        self.processes: dict[str, Process] = {}
        self.environment: dict[str, Any] = {}
        self.run_dir = RunDirectory(config.run_dir, "bench-bytes")
        try:
            say("starting the processes")
            for target in self.targets:
                variables = {} if target == HERE else AHEAD
                self.processes[target] = Process(target, Target, target, variables=variables)
            found = self._ask_all(self.targets, "environment")
            self.environment = dict(zip(self.targets, found, strict=True))
        except BaseException:  # Ctrl-C too: nothing was compiled, so nothing is left
            self.finish()
            raise

    def run(self) -> Iterator[str]:
        """Compiles one program after another; yields a label before each contestant's."""
        peers = [p for p in self.config.peers if p not in self.absent]
        for program in self.config.programs():
            alone = program.block == "alone"
            asked = [*OURS[:-1], *peers] if alone else [WITHOUT, *OURS, *peers]
            yield program.label
            rows = self._ask_all(self.targets, "prepare", program, asked)
            result = dict(zip(self.targets, rows, strict=True))
            ready = [[r for r in result[t] if not r["reason"]] for t in self.targets]
            for turn in itertools.zip_longest(*ready):
                there = [(t, r) for t, r in zip(self.targets, turn, strict=True) if r]
                yield f"{program.label}: {', '.join(dict.fromkeys(r['name'] for _, r in there))}"
                for direction in DIRECTIONS:
                    self._count(there, direction)
            if HERE in self.targets:
                self._time(result[HERE])
            self.results.append(_result(program, result))
            self._write()

    def _count(self, there: Sequence[tuple[str, dict[str, Any]]], direction: str) -> None:
        """Compiles one direction of a contestant for each target, all at the same time."""
        there = [(target, row) for target, row in there if not row["reason"]]
        for target, row in there:
            self.processes[target].begin("count", row["name"], direction)
        for target, row in there:
            try:
                row[direction] = self.processes[target].answer()
            except ProcessError as error:
                row["reason"] = str(error)

    def _time(self, rows: Sequence[dict[str, Any]]) -> None:
        """Lets the contestants take turns on the device that is here."""
        timed = [row for row in rows if not row["reason"]]
        lanes = [(row["name"], d) for row in timed for d in DIRECTIONS] + [(COPY, FORWARD)]
        process, taken = self.processes[HERE], {}
        turns = {lane: functools.partial(process.ask, "turn", *lane) for lane in lanes}
        for taken in take_turns(turns, self.config.rounds):  # noqa: B007
            pass
        copy_ms = statistics.median(taken[COPY, FORWARD])
        for row in timed:
            for direction in DIRECTIONS:
                turns_ms = taken[row["name"], direction]
                found = {"copy_ms": copy_ms, "turns_ms": turns_ms}
                row[direction] |= {"median_ms": statistics.median(turns_ms), **found}

    def _ask_all(self, targets: Sequence[str], method: str, *arguments: Any) -> list[Any]:
        return ask_all([self.processes[target] for target in targets], method, *arguments)

    def _write(self) -> Path:
        content = {
            "complete": len(self.results) == len(self.config.programs()),
            "config": dataclasses.asdict(self.config) | {"run_dir": str(self.run_dir.path)},
            "environment": self.environment,
            "absent": self.absent,
            "no_compiler": self.no_compiler,
            "programs": self.results,
        }
        return self.run_dir.write_json("bytes.json", content)

    def finish(self) -> dict[str, Path]:
        """Ends the processes and writes the figure of what was done; returns the paths."""
        for process in self.processes.values():
            process.close()
        if not self.results:
            shutil.rmtree(self.run_dir.path)
            return {}
        paths = {"bytes.json": self._write()}
        drawn = figure.draw_bytes(self.results, {t: TARGETS[t] for t in self.targets})
        for kind in ("png", "svg"):
            paths[f"bytes.{kind}"] = self.run_dir.write_bytes(f"bytes.{kind}", encode(drawn, kind))
        return paths

    def remarks(self) -> Iterator[str]:
        """How the tables are read, and what they do not show: who is missing, who failed."""
        versions = {e["packages"]["jax"] for e in self.environment.values()}
        yield (
            f"jax {', '.join(versions)}. Forward / forward and backward; temporaries are those of "
            "both. Passes: arrays of at least the size of x that are read, written. * E[x²] − E[x]²"
        )
        yield from self._no_compilers()
        yield from not_installed(self.absent)
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for result in self.results:
            for target, rows in result["targets"].items():
                for row in rows:
                    if row["reason"]:
                        key = row["name"], row["reason"], TARGETS[target]
                        reasons.setdefault(key, []).append(result["label"])
        for (name, reason, target), labels in reasons.items():
            of = "all" if len(labels) == len(self.results) else "; ".join(labels)
            yield f"{name} left out of {of} for {target}: {reason}"

    def _no_compilers(self) -> Iterator[str]:
        for target, command in self.no_compiler.items():
            yield f"no compiler for {target}, which is left out. To install it: {command}"


def _result(program: Program, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    what = {**dataclasses.asdict(program), "label": program.label}
    return what | {"nbytes": program.nbytes, "normed": program.normed, "targets": rows}


# --- The tables --------------------------------------------------------------------------------


def headings(targets: Sequence[str]) -> list[str]:
    """Those of `table`."""
    what = ("MB", "temp MB", "kernels", "passes")
    timed = [f"{TARGETS[HERE]}: ms", "÷ copy"] if HERE in targets else []
    return ["program", "norm by", *(f"{TARGETS[t]}: {w}" for t in targets for w in what), *timed]


def table(results: Sequence[dict[str, Any]], targets: Sequence[str]) -> Iterator[list[str]]:
    """Forward / forward and backward, of each contestant; temporaries are those of both.

    ÷ copy is the time over that of a copy of as many bytes as the program moves.
    """
    for result in results:
        floors = [found for d in DIRECTIONS if (found := floor(result["block"], result["op"], d))]
        lines = [["floor", *_floor_cells(floors, result["nbytes"], targets)]] if floors else []
        for name in dict.fromkeys(row["name"] for t in targets for row in result["targets"][t]):
            rows = {t: _row(result, t, name) for t in targets}
            if any(rows.values()):
                safe = all(row["safe"] for row in rows.values() if row)
                cells = itertools.chain(*(_cells(rows[t]) for t in targets))
                times = _times(result, rows[HERE]) if HERE in targets else []
                lines.append([name if safe else f"{name} *", *cells, *times])
        for i, line in enumerate(lines):
            yield ["" if i else result["label"], *line]


def _row(result: dict[str, Any], target: str, name: str) -> dict[str, Any] | None:
    found = (row for row in result["targets"][target] if row["name"] == name)
    return next((row for row in found if not row["reason"]), None)


def _floor_cells(
    floors: Sequence[tuple[int, int]], nbytes: int, targets: Sequence[str]
) -> list[str]:
    moved = " / ".join(_mb(sum(passes) * nbytes) for passes in floors)
    cells = [moved, "", "", " / ".join("{}, {}".format(*passes) for passes in floors)]
    return cells * len(targets) + (["", ""] if HERE in targets else [])


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["–"] * 4
    found = [row[direction] for direction in DIRECTIONS]
    return [
        " / ".join(_mb(one["nbytes"]) for one in found),
        _mb(row[BOTH]["temp_bytes"]),
        " / ".join(str(one["kernels"]) for one in found),
        " / ".join("{}, {}".format(*one["passes"]) for one in found),
    ]


def _times(result: dict[str, Any], row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["–"] * 2
    found = [row[direction] for direction in DIRECTIONS]
    ratios = []
    for one in found:
        per_byte = one["copy_ms"] / (2 * result["nbytes"])
        ratios.append(f"{one['median_ms'] / (one['nbytes'] * per_byte):.2f}")
    return [" / ".join(f"{one['median_ms']:.3f}" for one in found), " / ".join(ratios)]


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f}" if nbytes >= 10e6 or not nbytes else f"{nbytes / 1e6:.2f}"


def compared(results: Sequence[dict[str, Any]], targets: Sequence[str]) -> Iterator[list[str]]:
    """The bytes of normlab's default over the fewest of the others, whose name is beside."""
    for result in results:
        cells = (_compared(result["targets"][t], d) for t in targets for d in DIRECTIONS)
        yield [result["label"], *cells]


def headings_compared(targets: Sequence[str]) -> list[str]:
    """Those of `compared`."""
    return ["normlab ÷ the fewest", *(f"{TARGETS[t]}: {d}" for t in targets for d in DIRECTIONS)]


def _compared(rows: Sequence[dict[str, Any]], direction: str) -> str:
    ready = {row["name"]: row for row in rows if not row["reason"] and row["peer"] != WITHOUT}
    nbytes = {name: row[direction]["nbytes"] for name, row in ready.items()}
    ours = [nbytes[n] for n, row in ready.items() if row["peer"] == "normlab" and row["default"]]
    others = {name: n for name, n in nbytes.items() if ready[name]["peer"] != "normlab"}
    if not ours or not others:
        return "–"
    least = min(others, key=others.__getitem__)
    return f"{ours[0] / others[least]:.3f} ({least})"
