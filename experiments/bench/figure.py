"""The figures of `bench ops` and `bench bytes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..figures import plain_numbers
from .blocks import WITHOUT, floor
from .worker import DIRECTIONS

STYLE = {
    "normlab": ("#000000", "o"),
    "normlab, xla": ("#7F7F7F", "o"),
    "normlab, pallas": ("#009E73", "o"),
    "normlab, pallas, fused": ("#009E73", "p"),
    "flax.linen": ("#0072B2", "s"),
    "flax.nnx": ("#56B4E9", "D"),
    "haiku": ("#009E73", "^"),
    "equinox": ("#E69F00", "v"),
    "torch": ("#D55E00", "P"),
    "jax.numpy": ("#7F7F7F", "X"),
    "tokamax": ("#CC79A7", "*"),
    "torch.compile": ("#882255", "p"),
    "liger": ("#8C6D1F", "d"),
    "quack": ("#332288", "h"),
}
"""The colours of the norms, for the libraries and, where they have several, for their ways."""


def draw(cases: Sequence[dict[str, Any]], title: str) -> Figure:
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
                axes.plot(x, y, **_style(row["peer"], row["safe"]))
        axes.axvline(1, color="grey", lw=1)
        axes.set(xscale="log", title=f"{direction}, {dtype}", xlabel="time / floor")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        for i in range(1, len(labels), 2):
            axes.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.05, lw=0)
        plain_numbers(axes.xaxis, *axes.get_xlim())
        axes.grid(axis="x", alpha=0.3, lw=0.5)
    for name in names:
        rows = [r for c in cases for r in c["contestants"] if r["name"] == name and r["turns"]]
        if rows:
            safe = 2 * sum(row["safe"] for row in rows) >= len(rows)
            grid[0, 0].plot([], [], label=name, **_style(rows[0]["peer"], safe))
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False
    )
    figure.suptitle(
        f"{title}\nline at 1: the bytes that must move, timed as a copy. "
        "Hollow: E[x²] − E[x]², which loses digits to a large mean",
        fontsize=10,
    )
    return figure


def draw_bytes(results: Sequence[dict[str, Any]], targets: Mapping[str, str]) -> Figure:
    """What norms move, in units of what they normalize, a panel for each target and direction."""
    found = [
        (target, i, row)
        for target in targets
        for i, result in enumerate(results)
        for row in result["targets"][target]
        if not row["reason"] and row["peer"] != WITHOUT
    ]
    names = list(dict.fromkeys(row["name"] for *_, row in found))
    figure, grid = plt.subplots(
        2,
        len(targets),
        figsize=(4.2 * len(targets) + 3.6, 2 * max(0.05 * len(names), 0.3) * len(results) + 2.0),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for target, column in zip(targets, grid.T, strict=True):
        for axes, direction in zip(column, DIRECTIONS, strict=True):
            for i, result in enumerate(results):
                if passes := floor(result["block"], result["op"], direction):
                    axes.plot([sum(passes)] * 2, [i - 0.4, i + 0.4], color="grey", lw=1)
            for _, i, row in (one for one in found if one[0] == target):
                y = i + 0.8 * ((names.index(row["name"]) + 0.5) / len(names) - 0.5)
                x = moved_by_norms(results[i], target, row, direction)
                if x is not None:
                    axes.plot(x, y, **_look(row))
            axes.set(title=f"{targets[target]}, {direction}", xlabel="moved / normalized")
            labels = [result["label"].replace(", ", "\n") for result in results]
            axes.set_yticks(range(len(results)), labels, fontsize=8)
            axes.set_ylim(len(results) - 0.5, -0.5)
            for i in range(1, len(results), 2):
                axes.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.05, lw=0)
            axes.grid(axis="x", alpha=0.3, lw=0.5)
    for name in names:
        row = next(row for *_, row in found if row["name"] == name)
        grid[0, 0].plot([], [], label=name, **_look(row))
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False
    )
    figure.suptitle(
        "Bytes of compiled programs, of a block without those of the same block without norms, in "
        "units of the arrays that are normalized\nbars: the floor of a norm alone. Hollow: "
        "E[x²] − E[x]², which loses digits to a large mean. Small: not the default",
        fontsize=10,
    )
    return figure


def moved_by_norms(
    result: dict[str, Any], target: str, row: dict[str, Any], direction: str
) -> float | None:
    """The bytes that a program moves for its norms, over those that are normalized."""
    without = 0
    if result["block"] != "alone":
        rows = (one for one in result["targets"][target] if one["peer"] == WITHOUT)
        block = next((one for one in rows if not one["reason"]), None)
        if block is None:
            return None
        without = block[direction]["nbytes"]
    return (row[direction]["nbytes"] - without) / result["normed"]


def _shape_label(case: dict[str, Any]) -> str:
    return f"{case['op']} {'×'.join(map(str, case['shape']))}"


def _look(row: dict[str, Any]) -> dict[str, Any]:
    known = row["name"] if row["name"] in STYLE else row["peer"]
    return _style(known, row["safe"], row["default"])


def _style(peer: str, filled: bool, large: bool = True) -> dict[str, Any]:
    colour, marker = STYLE[peer]
    face, size = colour if filled else "white", 6 if large else 4
    mark = {"color": colour, "marker": marker, "markersize": size, "markerfacecolor": face}
    return {**mark, "linestyle": ""}
