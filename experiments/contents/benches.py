"""Runs of `bench` as records: a line for each contestant and direction, in seconds and bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..rundir import Record

DIRECTIONS = ("forward", "forward+backward")


def records(path: Path) -> list[Record] | None:
    """The records of a run directory of `bench ops` or `bench bytes`; `None` if it is neither."""
    found = _read(path)
    if found is None:
        return None
    return list(_ops(found) if "cases" in found else _bytes(found))


def told(path: Path, name: str) -> dict[str, Any]:
    """Its `config` or `environment`, which stand beside the numbers; empty if it is neither."""
    return (_read(path) or {}).get(name, {})


def _read(path: Path) -> dict[str, Any] | None:
    for name in ("ops.json", "bytes.json"):
        if (path / name).exists():
            return json.loads((path / name).read_text())
    return None


def _ops(found: dict[str, Any]) -> Iterator[Record]:
    for case in found["cases"]:
        copies = {name: floor["median_ms"] / 1e3 for name, floor in case["floor"].items()}
        for row in case["contestants"]:
            temp = row["temp_per_x"]
            for direction, turns in row["turns"].items():
                yield {
                    **_what(case, "alone", row, direction),
                    "target": "here",
                    "seconds": turns["median_ms"] / 1e3,
                    "copy_seconds": copies[row["family"]],
                    "temp_bytes": None if temp is None else round(temp * case["bytes"]),
                    "x_bytes": case["bytes"],
                }


def _bytes(found: dict[str, Any]) -> Iterator[Record]:
    for program in found["programs"]:
        for target, rows in program["targets"].items():
            for row in rows:
                for direction in DIRECTIONS if not row["reason"] else ():
                    told = row[direction]
                    timed = "median_ms" in told
                    yield {
                        **_what(program, program["block"], row, direction),
                        "target": target,
                        "seconds": told["median_ms"] / 1e3 if timed else None,
                        "copy_seconds": told["copy_ms"] / 1e3 if timed else None,
                        "temp_bytes": told["temp_bytes"],
                        "x_bytes": program["nbytes"],
                        "moved_bytes": told["nbytes"],
                        "kernels": told["kernels"],
                    }


def _what(case: dict[str, Any], block: str, row: dict[str, Any], direction: str) -> Record:
    """What says which program, in the same words for all."""
    return {
        "kind": "program",
        "norm": case["op"],
        "block": block,
        "shape": "x".join(map(str, case["shape"])),
        "dtype": case["dtype"],
        "library": row["peer"],
        "name": row["name"],
        "direction": direction,
    }
