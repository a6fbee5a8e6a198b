"""The figure of `bench ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..figures import plain_numbers

STYLE = {
    "normlab": ("#000000", "o"),
    "flax.linen": ("#0072B2", "s"),
    "flax.nnx": ("#56B4E9", "D"),
    "haiku": ("#009E73", "^"),
    "equinox": ("#E69F00", "v"),
    "torch": ("#D55E00", "P"),
}
"""The colours of the norms, for the libraries."""


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


def _shape_label(case: dict[str, Any]) -> str:
    return f"{case['op']} {'×'.join(map(str, case['shape']))}"


def _style(peer: str, filled: bool) -> dict[str, Any]:
    colour, marker = STYLE[peer]
    face = colour if filled else "white"
    mark = {"color": colour, "marker": marker, "markersize": 5, "markerfacecolor": face}
    return {**mark, "linestyle": ""}
