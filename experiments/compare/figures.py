"""The pictures of a comparison: learning curves, and the parts of every norm in every layer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator, SymmetricalLogLocator

import normlab as nl

from ..figures import log_scale, series, styles
from ..rundir import Record
from ..training.tasks import Task
from .rates import diverged

Records = Sequence[Record]

MOST_LAYERS = 8
"""How many layers `parts` draws, spread evenly over those in which a norm stands."""


def named(records: Iterable[Record]) -> list[Record]:
    """The records with what a figure or a table calls their `net`: the norm, and its scheme.

    >>> named([{"norm": "rms", "scheme": None}])[0]["net"]
    'rms'
    """
    found = list(records)
    several = len({r["scheme"] for r in found}) > 1
    return [r | {"net": f"{r['norm']}, {r['scheme']}" if several else r["norm"]} for r in found]


IDENTITY = {"mu": 0.0, "sigma": 1.0, "g": 1.0, "b": 0.0}
"""The parts where nothing stands."""

LABELS = dict(zip(nl.Parts._fields, ("shift μ", "scale σ", "gain g", "bias b"), strict=True))
"""How each part is called in a picture."""


def curves(records: Records, title: str, task: Task, batch_size: int) -> Figure:
    """Training loss and the score against steps or tokens: the median seed, the band of all."""
    norms = len({r["net"] for r in records})
    size = (10, max(4.2, 0.26 * norms + 0.5))  # as high as the legend
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    records = [r | {"score": task.score.draw(r)} for r in records if r["step"] > 0]
    along, per_step = task.along(batch_size)
    for name, style in styles(r["net"] for r in records).items():
        for axes, key in ((left, "train_loss"), (right, "score")):
            steps, values = series([r for r in records if r["net"] == name], key)
            measured = np.isfinite(values).any(axis=1)  # a norm that diverged has none
            steps, values = per_step * steps[measured], values[measured]
            middle = np.nanmedian(values, axis=1)
            low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
            axes.plot(steps, middle, label=name, **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
    left.set(xlabel=along, ylabel="training loss (nats)")
    right.set(xlabel=along, ylabel=task.score.drawn)
    left.set_title("median seed, band of all seeds", fontsize=9, loc="left")
    _chance(right, task)
    for axes, known in ((left, task.uninformed), (right, task.chance)):
        log_scale(axes, 3 * known)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3, which="both", lw=0.5)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(title)
    return figure


def rates(last: Records, title: str, task: Task) -> Figure:
    """The score at the end against the learning rate: the median seed, and the band of all.

    Only runs that did not diverge; the others are crosses where one is who knows nothing.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, style in styles(r["net"] for r in last).items():
        found: dict[float, list[float]] = {}
        for r in last:
            drawn = task.score.draw(r)
            if r["net"] == name and drawn is not None and not diverged(r, task.uninformed):
                found.setdefault(r["lr"], []).append(drawn)
        at = sorted(found)
        axes.plot(at, [np.median(found[lr]) for lr in at], label=name, **style)
        low, high = ([f(found[lr]) for lr in at] for f in (min, max))
        axes.fill_between(at, low, high, color=style["color"], alpha=0.15, lw=0)
        lost = [r["lr"] for r in last if r["net"] == name and diverged(r, task.uninformed)]
        axes.plot(lost, [task.chance] * len(lost), "x", color=style["color"], alpha=0.7)
    axes.set(xscale="log", xlabel="learning rate", ylabel=task.score.drawn)
    tried = sorted({r["lr"] for r in last})
    axes.set_xticks(tried, [f"{lr:g}" for lr in tried])
    axes.xaxis.set_minor_locator(NullLocator())
    said = "median seed, band of all seeds\ncrosses: worse than the dotted line, or not finite"
    axes.set_title(said, fontsize=9, loc="left")
    _chance(axes, task)
    log_scale(axes)
    axes.grid(alpha=0.3, which="both", lw=0.5)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(title)
    return figure


def _chance(axes: Axes, task: Task) -> None:
    """A dotted line where one is who knows nothing, if that is near."""
    if axes.get_ylim()[1] > 0.5 * task.chance:
        axes.axhline(task.chance, color="grey", lw=0.8, ls=":")
        axes.set_title(f"dotted: {task.score.chance}", fontsize=9, loc="right")


def parts(records: Records, title: str) -> Figure:
    """The four parts of every norm, layer by layer: medians over values and seeds, 15–85% bands.

    Of a deep model `MOST_LAYERS` are drawn, of those layers in which a norm or a bias stands.
    """
    layers = _normed(records)
    count = min(len(layers), MOST_LAYERS)
    places = [round(i * (len(layers) - 1) / max(1, count - 1)) for i in range(count)]
    numbers = {layers[place]: place + 1 for place in places}
    layers = [layers[place] for place in places]
    paths = any("/" in layer for layer in layers)
    figure, grid = plt.subplots(
        4,
        len(layers),
        figsize=(3.2 * len(layers) + 1.6, 9),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for row, (part, label) in enumerate(LABELS.items()):
        for column, layer in enumerate(layers):
            axes = grid[row, column]
            _part(axes, records, layer, part)
            if column == 0:
                axes.set_ylabel(label)
            if row == 0:
                axes.set_title(layer if paths else f"layer {numbers[layer]}")
            if row == 3:
                axes.set_xlabel("optimizer step")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False
    )
    figure.suptitle(f"{title}\nmedian, and band from 15% to 85%, over channels and examples")
    return figure


def last_layer(records: Records, title: str) -> Figure:
    """The four parts in the last layer in which a norm stands, to be read on a phone too."""
    layer = _normed(records)[-1]
    figure, grid = plt.subplots(2, 2, figsize=(6.4, 6), layout="constrained", sharex=True)
    for axes, (part, label) in zip(grid.flat, LABELS.items(), strict=True):
        _part(axes, records, layer, part)
        axes.set_title(label, fontsize=13)
        axes.tick_params(labelsize=11)
    for axes in grid[1]:
        axes.set_xlabel("optimizer step", fontsize=12)
    handles, names = grid[0, 0].get_legend_handles_labels()
    columns = min(4, len(names))
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=12
    )
    figure.suptitle(textwrap.fill(title, 60), fontsize=11)
    return figure


def _normed(records: Records) -> list[str]:
    """The layers in which a norm or a bias stands; all of them where none does."""
    normed = dict.fromkeys(r["layer"] for r in records if r["p50"] != IDENTITY[r["part"]])
    return list(normed) or list(dict.fromkeys(r["layer"] for r in records))


def _part(axes: Axes, records: Records, layer: str, part: str) -> None:
    """One part of every norm in one layer: the median over values and seeds, the 15–85% band."""
    for name, style in styles(r["net"] for r in records).items():
        chosen = [r for r in records if (r["net"], r["layer"], r["part"]) == (name, layer, part)]
        steps, low = series(chosen, "p15")
        _, middle = series(chosen, "p50")
        _, high = series(chosen, "p85")
        with np.errstate(all="ignore"):
            low, middle, high = (np.median(v, axis=1) for v in (low, middle, high))
        axes.plot(steps, middle, label=name, **style)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, lw=0)
    if part == "sigma":
        log_scale(axes)
    low, high = axes.get_ylim()
    if part == "g" and not 0 < low < high < 5 * low:  # over decades, or negative
        axes.set_yscale("symlog", linthresh=0.1)
        ticks = SymmetricalLogLocator(base=10, linthresh=0.1, subs=(1, 2, 5))
        axes.yaxis.set_major_locator(ticks)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, lw=0.5)
