"""The directory of a question: everything that was measured, kept so that a run can go on.

config.json, environment.json    what was asked, of which code and data, on what machine
error.txt                        where a condition failed, if the reason alone does not say it
conditions/00-none.jsonl         the records of a condition that is finished; the last says what
it cost
conditions/01-batch.partial      a condition on its way: its records and its last checkpoint
verdict.json, figure.svg, .png   at the end
bounds.json                      by which bounds each claim was judged when it was judged first
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from ..engine.question import Checkpoint, Condition, Config, Record
from ..engine.verdict import Bounds, Verdict
from ..rundir import RunDirectory, RunError, environment, number, runs

PAUSE = 20.0
"""Seconds between two checkpoints of a condition, at least."""

SETTINGS = ("jax_platforms", "jax_enable_x64", "jax_default_matmul_precision")
"""Those of JAX that numbers depend on."""


def place() -> Path:
    """Where questions are kept by default."""
    return runs() / "questions"


def key(config: Config, version: str, checksums: Sequence[str]) -> str:
    """Names a run by its config, its code's version, its data's checksums and `settings`."""
    parts = [as_json(config), version, list(checksums), settings()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def settings() -> dict[str, Any]:
    """JAX's settings that numbers depend on, as they are now; no device is touched."""
    return {name: getattr(jax.config, name) for name in SETTINGS}


def as_json(config: Config) -> dict[str, Any]:
    """The config as JSON values, without the place of the data."""
    values = dataclasses.asdict(config)
    del values["data_dir"]
    return json.loads(json.dumps(values))


class Kept(RunDirectory):
    """The directory of one run of a question; of two programs one at a time may have it.

    Args:
      root: Where the directories of questions lie.
      name: The question.
      key: Of the run.

    Raises:
      RunError: If it cannot be made.
    """

    def __init__(self, root: Path, name: str, key: str) -> None:
        self.path = root / f"{name}-{key}"
        try:
            (self.path / "conditions").mkdir(parents=True, exist_ok=True)
            (self.path / ".lock").touch()
        except OSError as error:
            raise RunError(
                f"cannot make the run directory {self.path}: {error.strerror}. Choose another "
                "place with --run-dir."
            ) from error
        self._lock: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """What a worker gets: the lock stays with the program that took it."""
        return {"path": self.path, "_lock": None}

    def file(self, index: int, condition: Condition) -> str:
        """The name of a condition's file."""
        slug = re.sub(r"[^a-z0-9.]+", "-", condition.name.lower()).strip("-")
        return f"conditions/{index:02d}-{slug[:60]}.jsonl"

    def records(self, file: str) -> list[Record] | None:
        """The records of a condition, or `None` if it is not finished."""
        try:
            return [json.loads(line) for line in (self.path / file).read_text().splitlines()]
        except FileNotFoundError:
            return None

    def partial(self, file: str) -> bytes | None:
        """What is kept of a condition that is on its way."""
        try:
            return self._on_its_way(file).read_bytes()
        except FileNotFoundError:
            return None

    def keep(self, file: str, made: Partial | Whole) -> None:
        """Keeps what was made of a condition."""
        partial = self._on_its_way(file)
        if isinstance(made, Partial):
            self.write_bytes(partial.relative_to(self.path).as_posix(), made.content)
            return
        self.write_json("environment.json", made.machine)
        self.write_bytes(file, made.content)
        partial.unlink(missing_ok=True)

    def begun(self) -> str | None:
        """When the first measurement began, in UTC; `None` if none did."""
        try:
            return json.loads((self.path / "config.json").read_text()).get("begun")
        except FileNotFoundError:
            return None

    def judged(self, now: dict[str, Bounds]) -> dict[str, Bounds]:
        """By which bounds each claim was judged first; those of new claims are kept from now on."""
        path = self.path / "bounds.json"
        try:
            before = {id: Bounds(*found) for id, found in json.loads(path.read_text()).items()}
        except FileNotFoundError:
            before = {}
        if now.keys() - before.keys():
            self.write_json("bounds.json", {**now, **before})
        return {**now, **before}

    def _on_its_way(self, file: str) -> Path:
        return (self.path / file).with_suffix(".partial")


class Partial(NamedTuple):
    """A condition on its way.

    Attributes:
      content: Its records, what they cost and its last checkpoint.
    """

    content: bytes


class Whole(NamedTuple):
    """A condition that is finished.

    Attributes:
      content: Its records; the last says what it cost.
      machine: Where it was measured.
    """

    content: bytes
    machine: dict[str, Any]


def measure(
    condition: Condition, partial: bytes | None = None, pause: float | None = None
) -> Iterator[float | Partial | Whole]:
    """Measures a condition; yields each step that a record names, and what is to be kept.

    Its cost is the time that this process had on its core, or the time that passed where an
    accelerator works: beside others it costs what it costs alone.

    Args:
      condition: The condition.
      partial: Where it goes on, if not at the beginning.
      pause: Seconds between two checkpoints, if not `PAUSE`.
    """
    records, spent, resume = ([], 0.0, None) if partial is None else _unpack(partial)
    pause = PAUSE if pause is None else pause
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    begin, saved = clock(), time.perf_counter()
    for found in condition.measure(resume):
        if not isinstance(found, Checkpoint):
            records.append({**condition.labels, **found})
            yield found.get("step", 0)
        elif time.perf_counter() - saved > pause:
            yield Partial(_pack(records, spent + clock() - begin, found))
            saved = time.perf_counter()
    seconds = spent + clock() - begin
    records.append({"kind": "cost", **condition.labels, "seconds": round(seconds, 3)})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    yield Whole(lines.encode(), environment())


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values; what is not finite is null."""
    values = verdict._asdict()
    values["effects"] = [number(v) for v in verdict.effects]
    values["source"] = verdict.source and verdict.source._asdict()
    return {k: number(v) if isinstance(v, float) else v for k, v in values.items()}


def _unpack(partial: bytes) -> tuple[list[Record], float, Checkpoint]:
    stored: Any = serialization.msgpack_restore(partial)
    leaves = [stored["leaves"][str(i)] for i in range(len(stored["leaves"]))]
    return json.loads(stored["records"]), stored["seconds"], Checkpoint(stored["step"], leaves)


def _pack(records: list[Record], seconds: float, checkpoint: Checkpoint) -> bytes:
    leaves = {str(i): np.asarray(v) for i, v in enumerate(jax.device_get(checkpoint.leaves))}
    return serialization.msgpack_serialize(
        {
            "records": json.dumps(records),
            "seconds": seconds,
            "step": checkpoint.step,
            "leaves": leaves,
        }
    )
