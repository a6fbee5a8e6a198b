"""What the figures of questions are made of. A norm looks the same in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures import log_scale, styles
from ..rundir import Record
from .records import Records
from .verdict import interval

Value = str | Callable[[Record], float | None]
"""What of a record is drawn: a key, or a function of the record."""


Values = Sequence[float] | np.ndarray
"""A value of each seed."""


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


def panels(records: Records, key: str, **size: float) -> tuple[Figure, list[tuple]]:
    """A figure with a panel for each value of `key`: its axes, the value, and its records."""
    values = records.values(key)
    picture, grid = canvas(len(values), 1, **size)
    places = zip(grid, values, strict=True)
    return picture, [(axes, v, records.where(**{key: v})) for axes, v in places]


def value(record: Record, key: Value) -> float:
    """What is drawn of a record; NaN for null."""
    found = record.get(key) if isinstance(key, str) else key(record)
    return math.nan if found is None else float(found)


def accuracy(record: Record) -> float | None:
    """The test accuracy in percent."""
    return None if record["accuracy"] is None else 100 * record["accuracy"]


def test_error(record: Record) -> float | None:
    """The test error in percent."""
    return None if record["accuracy"] is None else 100 * (1 - record["accuracy"])


def over_steps(
    axes: Axes,
    records: Sequence[Record],
    key: Value,
    *,
    by: str = "norm",
    marker: bool = False,
    **look: Any,
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
    axes: Axes, records: Sequence[Record], x: str, key: Value, *, by: str = "norm", **look: Any
) -> None:
    """Values against a label: for each value of `by` the means over seeds with 95% intervals."""
    for name, style in styles(dict.fromkeys(r[by] for r in records)).items():
        here = [r for r in records if r[by] == name and math.isfinite(value(r, key))]
        places = sorted({r[x] for r in here})
        values = [[value(r, key) for r in here if r[x] == place] for place in places]
        if places:
            spread(axes, places, values, label=str(name), **{**style, **look})


def spread(axes: Axes, x: Sequence[float], values: Sequence[Values], **style: Any) -> None:
    """Means over seeds, with their intervals; of one seed the mean alone."""
    found = [interval(v) for v in values]
    halves = [high - mean if math.isfinite(high) else 0.0 for mean, _, high in found]
    means = [mean for mean, _, _ in found]
    axes.errorbar(x, means, halves, capsize=3, elinewidth=1, **style)


def columns(axes: Axes, groups: Mapping[str, Values], **look: Any) -> None:
    """A column of points for each group, a point for each seed, with mean and 95% interval."""
    for at, (name, style) in enumerate(styles(groups).items()):
        points = [v for v in groups[name] if math.isfinite(v)]
        if points:
            axes.plot([at] * len(points), points, **{**style, "ls": "", "alpha": 0.4, **look})
            spread(axes, [at + 0.2], [points], **{**style, **look})
    axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")


def ticks(axes: Axes, places: Iterable[float]) -> None:
    """Marks these places of the horizontal axis, and no others."""
    places = sorted(places)
    axes.set_xticks(places, [f"{place:,g}" for place in places])
    axes.set_xticks([], minor=True)


def threshold(axes: Axes, at: float, *, vertical: bool = False) -> None:
    """A dotted line where a verdict turns."""
    (axes.axvline if vertical else axes.axhline)(at, color="grey", lw=1, ls=":")


def log_y(axes: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    log_scale(axes)


def legend(picture: Figure, axes: Axes | None = None) -> None:
    """One legend for all axes, below them; that of the first, if no other is named."""
    handles, labels = (axes or picture.axes[0]).get_legend_handles_labels()
    picture.legend(
        handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False
    )
