"""A comparison on disk: what is left of one that was stopped, from which it goes on.

metrics.jsonl                every measurement
checkpoints/batch.msgpack    where a norm that is not done stands
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from ..engine.records import Records
from ..rundir import Record, RunDirectory
from ..training.driver import Checkpoint, Progress

SHARE = 0.05
"""Of the time of a run that checkpoints take, at most."""


class Checkpoints:
    """The checkpoint of each norm that is on its way.

    Args:
      directory: Of the run.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._saved: dict[str, tuple[float, float]] = {}

    def save(self, name: str, at: Progress) -> None:
        """Saves, unless that would take too much of the time."""
        begin = time.monotonic()
        last, cost = self._saved.get(name, (-np.inf, 0.0))
        if begin - last < cost / SHARE:
            return
        path = self._path(name)
        path.parent.mkdir(exist_ok=True)
        self.directory.write_bytes(f"checkpoints/{path.name}", _pack(at.checkpoint()))
        self._saved[name] = begin, time.monotonic() - begin

    def load(self, name: str) -> Checkpoint | None:
        """The checkpoint, if there is one that can be read."""
        try:
            return _unpack(self._path(name).read_bytes())
        except (OSError, ValueError, KeyError):
            return None

    def drop(self, name: str) -> None:
        """Removes it."""
        path = self._path(name)
        path.unlink(missing_ok=True)
        if path.parent.exists() and not any(path.parent.iterdir()):
            path.parent.rmdir()

    def _path(self, name: str) -> Path:
        slug = re.sub(r"[^\w.]+", "-", name)
        return self.directory.path / "checkpoints" / f"{slug}.msgpack"


Key = tuple[str, str | None]
"""A norm and its scheme."""


def read_records(path: Path) -> dict[Key, Records]:
    """The records of `metrics.jsonl` by norm; a last line that was cut is left out."""
    found: dict[Key, Records] = {}
    file = path / "metrics.jsonl"
    for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
        if line.endswith("\n"):
            record: Record = json.loads(line)
            found.setdefault((record["norm"], record["scheme"]), Records()).append(record)
    return found


def write_records(directory: RunDirectory, records: Iterable[Record]) -> None:
    """Writes `metrics.jsonl` anew."""
    lines = (json.dumps(record) + "\n" for record in records)
    directory.write_bytes("metrics.jsonl", "".join(lines).encode())


def _pack(checkpoint: Checkpoint) -> bytes:
    """What is alike on all devices is there once."""
    first, *leaves = jax.device_get(checkpoint.leaves)
    packed: dict[str, Any] = {}
    for i, leaf in enumerate(map(np.asarray, leaves)):
        alike = all(row.tobytes() == leaf[0].tobytes() for row in leaf[1:])
        packed[str(i)] = {"devices": len(leaf), "rows": leaf[:1] if alike else leaf}
    return serialization.msgpack_serialize(
        {"step": checkpoint.step, "diverged": np.asarray(first), "leaves": packed}
    )


def _unpack(content: bytes) -> Checkpoint:
    stored: Any = serialization.msgpack_restore(content)
    leaves = [stored["leaves"][str(i)] for i in range(len(stored["leaves"]))]
    each = [np.broadcast_to(v["rows"], (v["devices"], *v["rows"].shape[1:])) for v in leaves]
    return Checkpoint(stored["step"], [stored["diverged"], *each])
