"""Comparisons at every point of a grid: `--sweep batch_size=8,32 lr=0.1,0.3`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from normlab.errors import nearest

from ..grids import split
from ..rundir import RunError
from ..terminal import errors
from ..training.again import parsed

LARGEST = 1000
"""Points of a grid: a comparison each."""


class Point(NamedTuple):
    """A point of a grid.

    Attributes:
      values: The fields that are swept, as they were given.
      config: The `comparison.Compare` there.
    """

    values: Mapping[str, str]
    config: Any

    @property
    def name(self) -> str:
        """`batch_size=8,lr=0.1`, which is its directory too."""
        return ",".join(
            f"{field}={value}".replace("/", "-") for field, value in self.values.items()
        )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Comparisons at the points of a grid, of which the last field varies fastest.

    Attributes:
      points: The points.
      run_dir: Where their directories lie.
    """

    points: tuple[Point, ...]
    run_dir: Path | None

    def as_json(self) -> dict[str, Any]:
        """What is swept, and what all points have in common."""
        values: dict[str, list[str]] = {}
        for point in self.points:
            for field, value in point.values.items():
                values.setdefault(field, []).append(value)
        common = self.points[0].config.as_json()
        for point in self.points:
            here = point.config.as_json()
            common = {k: v for k, v in common.items() if here[k] == v and k not in values}
        return {"sweep": {k: list(dict.fromkeys(v)) for k, v in values.items()}, **common}


def sweep(
    cls: Any,
    read: Callable[..., Any],
    arguments: Sequence[str],
    words: Sequence[str],
    aside: Sequence[str],
) -> tuple[Sweep, Any]:
    """The sweep that words of a grid ask for; what they say is read as options are.

    Args:
      cls: The dataclass of the command.
      read: Reads arguments; returns a config and the form of the output.
      arguments: Those that all points have in common.
      words: The grid, `lr=0.01,0.1`.
      aside: Fields on which no number depends.

    Raises:
      RunError: For an unknown field, one that is given twice, or values that cannot be run.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    names = [name for name in names if name not in (*aside, "config")]
    given = {w.partition("=")[0].lstrip("-").replace("-", "_") for w in arguments if w[:2] == "--"}
    values: dict[str, list[list[str]]] = {}
    for word in words:
        field, texts = split(word)
        if field not in names:
            raise RunError(f"--sweep: there is no field {field!r}: {nearest(field, names)}.")
        if field in values or field in given:
            raise RunError(f"--sweep: {field} is given twice. Give all its values at once.")
        if len({*map(tuple, texts)}) < len(texts):
            raise RunError(f"--sweep {word}: a value is there twice. Give each once.")
        values[field] = texts
    count = math.prod(map(len, values.values()))
    if not values or count > LARGEST:
        said = f"{count:,} points" if values else "no field"
        raise RunError(f"--sweep: got {said}; it must be 1 to {LARGEST:,} points.")
    common, form = parsed(read, cls, arguments)
    points = []
    for row in itertools.product(*values.values()):
        at = {name: " ".join(text) for name, text in zip(values, row, strict=True)}
        options = itertools.chain(*(_option(k, v) for k, v in zip(values, row, strict=True)))
        where = ", ".join(f"{name} {value}" for name, value in at.items())
        try:
            config, _ = parsed(read, cls, [*arguments, *options])
            config.require_effects()
        except RunError as error:
            raise RunError(f"--sweep: at {where}: {error}") from None
        except SystemExit:  # it was told what is wrong, and not where
            errors.print(f"--sweep: that is at {where}.", markup=False, soft_wrap=True)
            raise
        points.append(Point(at, config))
    return Sweep(tuple(points), common.run_dir), form


def _option(field: str, text: Sequence[str]) -> list[str]:
    """A value as an option."""
    option = field.replace("_", "-")
    if list(text) in (["true"], ["false"]):
        return [f"--{option}" if text[0] == "true" else f"--no-{option}"]
    return [f"--{option}", *(word for word in text if word)]
