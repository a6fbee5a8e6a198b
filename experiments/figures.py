"""The pictures of comparisons, `bench ops` and questions. A norm looks the same everywhere."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, SymmetricalLogLocator

import normlab as nl

# Okabe & Ito's palette, legible to the colour-blind, then wine and two greys, told apart by their
# markers.
_COLOURS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#8C6D1F",
    "#7F7F7F",
)
_MARKERS = "osD^vP*pXd"
STYLE = {
    name: {"color": colour, "marker": marker, "markersize": 4}
    for name, colour, marker in zip(nl.names(), _COLOURS, _MARKERS, strict=True)
}

# For what is not a norm: Tol's muted palette, without its wine.
_OTHER_COLOURS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#88CCEE",
    "#AA4499",
    "#999933",
    "#44AA99",
    "#DDCC77",
)
_OTHER_MARKERS = "<>hv8HpX"

# The first palette for the libraries of `bench ops`.
_PEER_STYLE = {
    "normlab": ("#000000", "o"),
    "flax.linen": ("#0072B2", "s"),
    "flax.nnx": ("#56B4E9", "D"),
    "haiku": ("#009E73", "^"),
    "equinox": ("#E69F00", "v"),
    "torch": ("#D55E00", "P"),
}

# Of an SVG: its unit is 1/72 inch, so that a hundredth of it cannot be seen.
_COORDINATES = re.compile(rb' (?:d|x|y)="[^"]+"')
_DIGITS = re.compile(rb"(\.\d\d)\d+")

Records = Sequence[dict[str, Any]]


def curves(records: Records, title: str, chance: float) -> Figure:
    """Training loss and test error against steps: the median seed, and the band of all seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    records = [r for r in records if r["step"] > 0]
    for name in _norms(records):
        for axes, key in ((left, "train_loss"), (right, "test_error")):
            steps, values = series([r for r in records if r["norm"] == name], key)
            measured = np.isfinite(values).any(axis=1)  # a norm that diverged has none
            steps, values = steps[measured], values[measured]
            middle = np.nanmedian(values, axis=1)
            low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
            axes.plot(steps, middle, label=name, **STYLE[name])
            axes.fill_between(steps, low, high, color=STYLE[name]["color"], alpha=0.15, lw=0)
    left.set(xlabel="optimizer step", ylabel="training loss (nats)")
    right.set(xlabel="optimizer step", ylabel="test error (%)")
    left.set_title("median seed, band of all seeds", fontsize=9, loc="left")
    if right.get_ylim()[1] > 50 * (1 - chance):
        right.axhline(100 * (1 - chance), color="grey", lw=0.8, ls=":")
        right.set_title("dotted: chance", fontsize=9, loc="right")
    for axes in (left, right):
        log_scale(axes)
        axes.grid(alpha=0.3, which="both", lw=0.5)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(title)
    return figure


def parts(records: Records, title: str) -> Figure:
    """The four parts of every norm, layer by layer: medians over values and seeds, 15–85% bands."""
    layers = list(dict.fromkeys(r["layer"] for r in records))
    labels = {
        "mu": "shift μ",
        "sigma": "scale σ",
        "g": "gain g",
        "b": "bias b",
    }
    figure, grid = plt.subplots(
        4,
        len(layers),
        figsize=(3.2 * len(layers) + 1.6, 9),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for row, (part, label) in enumerate(labels.items()):
        for column, layer in enumerate(layers):
            axes = grid[row, column]
            for name in _norms(records):
                chosen = [
                    r for r in records if (r["norm"], r["layer"], r["part"]) == (name, layer, part)
                ]
                steps, low = series(chosen, "p15")
                _, middle = series(chosen, "p50")
                _, high = series(chosen, "p85")
                with np.errstate(all="ignore"):
                    low, middle, high = (np.median(v, axis=1) for v in (low, middle, high))
                axes.plot(steps, middle, label=name, **STYLE[name])
                axes.fill_between(steps, low, high, color=STYLE[name]["color"], alpha=0.12, lw=0)
            if part == "sigma":
                log_scale(axes)
            if part == "g":  # a gain may be negative
                axes.set_yscale("symlog", linthresh=0.1)
                ticks = SymmetricalLogLocator(base=10, linthresh=0.1, subs=(1, 2, 5))
                axes.yaxis.set_major_locator(ticks)
                axes.yaxis.set_major_formatter("{x:g}")
            if column == 0:
                axes.set_ylabel(label)
            if row == 0:
                axes.set_title(f"layer {column + 1}")
            if row == 3:
                axes.set_xlabel("optimizer step")
            axes.grid(alpha=0.3, lw=0.5)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False
    )
    figure.suptitle(f"{title}\nmedian, and band from 15% to 85%, over channels and examples")
    return figure


def ops(cases: Records, title: str) -> Figure:
    """Medians of every case in units of the floor; a hollow marker is a one-pass variance."""
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    labels = list(dict.fromkeys(_shape_label(case) for case in cases))
    names = list(dict.fromkeys(row["name"] for case in cases for row in case["contestants"]))
    figure, grid = plt.subplots(
        1,
        2 * len(dtypes),
        figsize=(6.8 * len(dtypes) + 2.6, max(0.075 * len(names), 0.3) * len(labels) + 1.8),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    panels = [(t, d) for t in dtypes for d in ("forward", "forward+backward")]
    for axes, (dtype, direction) in zip(grid[0], panels, strict=True):
        for case in (case for case in cases if case["dtype"] == dtype):
            for row in (row for row in case["contestants"] if row["turns"]):
                lane = (names.index(row["name"]) + 0.5) / len(names) - 0.5
                y = labels.index(_shape_label(case)) + 0.8 * lane
                x = row["turns"][direction]["floors"]
                axes.plot(x, y, **_peer_style(row["peer"], row["safe"]))
        axes.axvline(1, color="grey", lw=1)
        axes.set(xscale="log", title=f"{direction}, {dtype}", xlabel="time / floor")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        for i in range(1, len(labels), 2):
            axes.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.05, lw=0)
        _plain_numbers(axes.xaxis, *axes.get_xlim())
        axes.grid(axis="x", alpha=0.3, lw=0.5)
    for name in names:
        rows = [r for c in cases for r in c["contestants"] if r["name"] == name and r["turns"]]
        if rows:
            safe = 2 * sum(row["safe"] for row in rows) >= len(rows)
            grid[0, 0].plot([], [], label=name, **_peer_style(rows[0]["peer"], safe))
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False
    )
    figure.suptitle(
        f"{title}\nline at 1: the bytes that must move, timed as a copy. "
        "Hollow: E[x²] − E[x]², which loses digits to a large mean",
        fontsize=10,
    )
    return figure


def palette(names: Iterable[Any]) -> dict[Any, dict[str, Any]]:
    """A colour and a marker for each name, for what is not a norm: none that a norm has."""
    marks = itertools.cycle(zip(_OTHER_COLOURS, _OTHER_MARKERS, strict=True))
    return {
        name: {"color": colour, "marker": marker, "markersize": 4}
        for name, (colour, marker) in zip(names, marks, strict=False)
    }


def spread(axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], **style: Any) -> None:
    """Means over seeds, with their 95% intervals of Student's t."""
    means = [np.mean(v) for v in values]
    halves = [scipy.stats.t.ppf(0.975, max(1, len(v) - 1)) * _sem(v) for v in values]
    axes.errorbar(x, means, halves, capsize=3, elinewidth=1, **style)


def _sem(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def conditions(records: Records, title: str) -> Figure:
    """The test error of each condition against steps, and at the end by seed."""
    records = [r for r in records if r["kind"] == "evaluation"]
    names = list(dict.fromkeys(r["condition"] for r in records))
    styles = palette(names)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    steps = sorted({r["step"] for r in records})
    for at, name in enumerate(names):
        here = [r for r in records if r["condition"] == name]
        errors = [[100 - r["accuracy"] for r in here if r["step"] == step] for step in steps]
        middle = [np.median(e) for e in errors]
        left.plot(steps, middle, label=name, **styles[name])
        low, high = ([f(e) for e in errors] for f in (min, max))
        left.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.12, lw=0)
        right.plot([at] * len(errors[-1]), errors[-1], alpha=0.4, ls="", **styles[name])
        spread(right, [at + 0.2], [errors[-1]], **styles[name])
    left.set(xlabel="optimizer step", ylabel="test error (%)")
    left.set_title("median seed, band of all seeds", fontsize=9, loc="left")
    log_scale(left)
    right.set_xticks(range(len(names)), names, rotation=30, ha="right")
    right.set_title(
        f"after {steps[-1]} steps: seeds, mean and 95% interval", fontsize=9, loc="left"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both", lw=0.5)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


def encode(figure: Figure, kind: str) -> bytes:
    """The figure as a file of type `png` or `svg`, which closes it.

    An SVG has its text as text, and the same bytes for the same figure.
    """
    buffer = io.BytesIO()
    if kind != "svg":
        figure.savefig(buffer, format=kind, dpi=150)
        return buffer.getvalue()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "normlab"}):
        figure.savefig(buffer, format=kind, metadata=metadata)
    plt.close(figure)
    return _COORDINATES.sub(lambda found: _DIGITS.sub(rb"\1", found[0]), buffer.getvalue())


def log_scale(axes: Axes) -> None:
    """A logarithmic axis with plain numbers: at 1, 2 and 5 where it spans few decades."""
    if not any((np.asarray(line.get_ydata()) > 0).any() for line in axes.get_lines()):
        return  # nothing finite to show
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis, *axes.get_ylim())


def _plain_numbers(axis: Axis, low: float, high: float) -> None:
    near = high / low < 50
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if near else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _shape_label(case: dict[str, Any]) -> str:
    return f"{case['op']} {'×'.join(map(str, case['shape']))}"


def _peer_style(peer: str, filled: bool) -> dict[str, Any]:
    colour, marker = _PEER_STYLE[peer]
    face = colour if filled else "white"
    return {
        "linestyle": "",
        "color": colour,
        "marker": marker,
        "markersize": 5,
        "markerfacecolor": face,
    }


def _norms(records: Records) -> list[str]:
    return list(dict.fromkeys(r["norm"] for r in records))


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(steps [T], values [T, seeds])`; a missing or null value is NaN."""
    seeds = sorted({r["seed"] for r in records})
    steps = sorted({r["step"] for r in records})
    values = np.full((len(steps), len(seeds)), np.nan)
    for r in records:
        if r[key] is not None:
            values[steps.index(r["step"]), seeds.index(r["seed"])] = r[key]
    return np.array(steps), values
