"""The pictures of a comparison: learning curves, and the parts of every norm in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

import normlab as nl

from ..figures import log_scale, series, styles
from ..rundir import Record

Records = Sequence[Record]


def curves(records: Records, title: str, chance: float) -> Figure:
    """Training loss and test error against steps: the median seed, and the band of all seeds."""
    norms = len({r["norm"] for r in records})
    size = (10, max(4.2, 0.26 * norms + 0.5))  # as high as the legend
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    # What a net predicts whose loss is not finite is not drawn.
    records = [
        r | {"error": None if r["test_loss"] is None else 100 * (1 - r["accuracy"])}
        for r in records
        if r["step"] > 0
    ]
    for name, style in styles(r["norm"] for r in records).items():
        for axes, key in ((left, "train_loss"), (right, "error")):
            steps, values = series([r for r in records if r["norm"] == name], key)
            measured = np.isfinite(values).any(axis=1)  # a norm that diverged has none
            steps, values = steps[measured], values[measured]
            middle = np.nanmedian(values, axis=1)
            low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
            axes.plot(steps, middle, label=name, **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
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
    labels = dict(zip(nl.Parts._fields, ("shift μ", "scale σ", "gain g", "bias b"), strict=True))
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
            for name, style in styles(r["norm"] for r in records).items():
                chosen = [
                    r for r in records if (r["norm"], r["layer"], r["part"]) == (name, layer, part)
                ]
                steps, low = series(chosen, "p15")
                _, middle = series(chosen, "p50")
                _, high = series(chosen, "p85")
                with np.errstate(all="ignore"):
                    low, middle, high = (np.median(v, axis=1) for v in (low, middle, high))
                axes.plot(steps, middle, label=name, **style)
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, lw=0)
            if row == 1:
                log_scale(axes)
            if row == 2:  # a gain may be negative
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
