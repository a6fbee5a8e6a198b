"""What the figures of questions are made of. A norm looks the same in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures import log_scale, styles
from ..rundir import Record
from .records import Records
from .verdict import interval

Value = str | Callable[[Record], float | None]
"""What of a record is drawn: a key, or a function of the record."""

Label = str | Callable[[Record], Any]
"""By what records are told apart or placed: a key, or a function of the record."""

Values = Sequence[float] | np.ndarray
"""A value of each seed."""


def canvas(columns: int = 1, rows: int = 1, *, width: float = 4.6, height: float = 3.6) -> Any:
    """A figure and its axes `[rows, columns]`, or `[columns]` if there is one row."""
    picture = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False)
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


AXES: dict[Value, str] = {accuracy: "test accuracy (%)", test_error: "test error (%)"}
"""What an axis of these values is called."""


def by_name(
    axes: Axes, records: Sequence[Record], key: Value, by: Label
) -> Iterator[tuple[dict[str, Any], list[Record]]]:
    """For each value of `by` its look and label, and its records with a finite value.

    The axis is named after the values, where they have a name.
    """
    if key in AXES:
        axes.set_ylabel(AXES[key])
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(label(record, by), []).append(record)
    for name, style in styles(groups).items():
        here = [r for r in groups[name] if math.isfinite(value(r, key))]
        if here:
            yield {**style, "label": str(name)}, here


def label(record: Record, by: Label) -> Any:
    """The value of a label."""
    return by(record) if callable(by) else record[by]


def along(records: Sequence[Record], x: Label, key: Value) -> tuple[list[Any], list[list[float]]]:
    """The places along an axis, in order, and the values of the seeds at each."""
    found: dict[Any, list[float]] = {}
    for record in records:
        found.setdefault(label(record, x), []).append(value(record, key))
    places = sorted(found)
    return places, [found[place] for place in places]


def over_steps(
    axes: Axes,
    records: Sequence[Record],
    key: Value,
    *,
    x: Label = "step",
    by: Label = "norm",
    marker: bool = False,
    **look: Any,
) -> None:
    """Values against steps: for each value of `by` the median seed, and the band of all seeds."""
    for style, here in by_name(axes, records, key, by):
        steps, values = along(here, x, key)
        style = {**style, **({} if marker else {"marker": ""}), **look}
        axes.plot(steps, [np.median(v) for v in values], **style)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
    axes.set_xlabel("optimizer step")


def against(
    axes: Axes, records: Sequence[Record], x: Label, key: Value, *, by: Label = "norm", **look: Any
) -> None:
    """Values against a label: for each value of `by` the means over seeds with 95% intervals."""
    for style, here in by_name(axes, records, key, by):
        spread(axes, *along(here, x, key), **{**style, **look})


def scatter(
    axes: Axes, records: Sequence[Record], x: Label, key: Value, *, by: Label = "norm", **look: Any
) -> None:
    """Values against a label, a point for each record."""
    for style, here in by_name(axes, records, key, by):
        points = [(label(r, x), value(r, key)) for r in here]
        axes.plot(*zip(*points, strict=True), **{**style, "ls": "", **look})


def spread(axes: Axes, x: Sequence[float], values: Sequence[Values], **style: Any) -> None:
    """Means over seeds, with their intervals; of one seed the mean alone."""
    found = [interval(v) for v in values]
    halves = [v.high - v.effect if math.isfinite(v.high) else 0.0 for v in found]
    axes.errorbar(x, [v.effect for v in found], halves, capsize=3, elinewidth=1, **style)


def columns(axes: Axes, groups: Mapping[str, Values], *, mean: bool = True, **look: Any) -> None:
    """A column of points for each group, a point for each seed, with mean and 95% interval."""
    for at, (name, style) in enumerate(styles(groups).items()):
        values = np.asarray(groups[name])
        values = values[:, 0] if values.ndim == 2 else values  # on all test images
        points = [v for v in values if math.isfinite(v)]
        if points:
            axes.plot([at] * len(points), points, **{**style, "ls": "", "alpha": 0.4, **look})
        if points and mean:
            spread(axes, [at + 0.2], [points], **{**style, **look})
    axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")


def frame(
    axes: Axes,
    *,
    threshold: float | Sequence[float] = (),
    ticks: Iterable[float] = (),
    doubling: bool = False,
    log: bool = False,
    legend: bool = False,
    **settings: Any,
) -> None:
    """What stands around what is drawn.

    Args:
      axes: Where it is drawn.
      threshold: Where verdicts turn, as dotted lines.
      ticks: The only places that are marked on the horizontal axis.
      doubling: The horizontal axis is logarithmic, and doubles from tick to tick.
      log: The vertical axis is logarithmic, with plain numbers.
      legend: The axes have a legend of their own.
      **settings: Any other of `Axes.set`.
    """
    for at in np.atleast_1d(threshold):
        dotted(axes, at)
    axes.set(**settings)
    if doubling:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    places = sorted(ticks)
    if places:
        axes.set_xticks(places, [f"{place:,g}" for place in places])
        axes.set_xticks([], minor=True)
    if log:
        log_scale(axes)
    if legend:
        axes.legend(frameon=False)


def dotted(axes: Axes, at: float, *, vertical: bool = False, **look: Any) -> None:
    """A dotted line across the axes."""
    (axes.axvline if vertical else axes.axhline)(at, color="grey", lw=1, ls=":", **look)


def finish(picture: Figure, title: str = "", *, key: Axes | None = None, **look: Any) -> Figure:
    """The figure with one legend for all axes, below them, and its title.

    The legend is that of the axes `key`, or of the first.
    """
    handles, labels = (key or picture.axes[0]).get_legend_handles_labels()
    ncols = min(6, len(labels))
    picture.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    if title:
        picture.suptitle(title, **look)
    return picture
