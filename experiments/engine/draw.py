"""What the figures of questions are made of. A norm looks the same in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import figures

Records = Sequence[dict[str, Any]]
Value = str | Callable[[dict[str, Any]], float | None]
"""What of a record is drawn: a key, or a function of the record."""


def canvas(columns: int = 1, rows: int = 1, *, width: float = 4.6, height: float = 3.6) -> Any:
    """A figure and its axes `[rows, columns]`, or `[columns]` if there is one row."""
    picture, grid = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat:
        axes.grid(alpha=0.3, lw=0.5)
    return picture, (grid if rows > 1 else grid[0])


def styles(names: Iterable[Any]) -> dict[Any, dict[str, Any]]:
    """The colour and the marker of each norm; what is not a norm gets those that no norm has."""
    names = list(names)
    others = figures.palette(name for name in names if name not in figures.STYLE)
    return {name: dict(figures.STYLE.get(name) or others[name]) for name in names}


def value(record: dict[str, Any], key: Value) -> float:
    """What is drawn of a record; NaN for null."""
    found = record.get(key) if isinstance(key, str) else key(record)
    return math.nan if found is None else float(found)


def test_error(record: dict[str, Any]) -> float | None:
    """The test error in percent."""
    return None if record["accuracy"] is None else 100 - record["accuracy"]


def over_steps(
    axes: Axes, records: Records, key: Value, *, by: str = "norm", marker: bool = False, **look: Any
) -> None:
    """Values against steps: for each value of `by` the median seed, and the band of all seeds."""
    for name, style in styles(dict.fromkeys(r[by] for r in records)).items():
        here = [r for r in records if r[by] == name and math.isfinite(value(r, key))]
        steps = sorted({r["step"] for r in here})
        values = [[value(r, key) for r in here if r["step"] == step] for step in steps]
        if not steps:
            continue
        style = {**style, **({} if marker else {"marker": ""}), "label": str(name), **look}
        axes.plot(steps, [np.median(v) for v in values], **style)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
    axes.set_xlabel("optimizer step")


def against(
    axes: Axes, records: Records, x: str, key: Value, *, by: str = "norm", **look: Any
) -> None:
    """Values against a label: for each value of `by` the means over seeds with 95% intervals."""
    for name, style in styles(dict.fromkeys(r[by] for r in records)).items():
        here = [r for r in records if r[by] == name and math.isfinite(value(r, key))]
        places = sorted({r[x] for r in here})
        values = [[value(r, key) for r in here if r[x] == place] for place in places]
        if places:
            figures.spread(axes, places, values, label=str(name), **{**style, **look})


def columns(axes: Axes, groups: Mapping[str, Sequence[float]], **look: Any) -> None:
    """A column of points for each group, a point for each seed, with mean and 95% interval."""
    for at, (name, style) in enumerate(styles(groups).items()):
        points = [v for v in groups[name] if math.isfinite(v)]
        if points:
            axes.plot([at] * len(points), points, **{**style, "ls": "", "alpha": 0.4, **look})
            figures.spread(axes, [at + 0.2], [points], **{**style, **look})
    axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")


def threshold(axes: Axes, at: float, *, vertical: bool = False) -> None:
    """A dotted line where a verdict turns."""
    (axes.axvline if vertical else axes.axhline)(at, color="grey", lw=1, ls=":")


def log_y(axes: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    figures.log_scale(axes)


def legend(picture: Figure, axes: Axes) -> None:
    """One legend for all axes, below them."""
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(
        handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False
    )
