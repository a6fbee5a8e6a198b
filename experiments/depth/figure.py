"""The picture of a net's depth."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..figures import log_scale, styles
from ..rundir import Record
from .profile import INSTRUMENTS

SPAN = 4
"""How far apart the ends of a logarithmic axis are at least, so that noise looks like noise."""

BEFORE = {"ls": "--", "lw": 1.0, "marker": "", "alpha": 0.7}
"""How a net looks before it is trained."""


def picture(records: Sequence[Record], title: str) -> Figure:
    """A panel for each instrument, a line for each net: dashed before training, full after it."""
    last = max(record["step"] for record in records)
    looks = styles(record["net"] for record in records)
    rows, columns = 2, -(-len(INSTRUMENTS) // 2)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2.7 * columns, 2.5 * rows), layout="constrained", sharex=True
    )
    for axes, (key, instrument) in zip(grid.flat, INSTRUMENTS.items(), strict=True):
        for record in records:
            values = np.array(record[key], float)
            full = record["step"] == last
            look = looks[record["net"]] | ({} if full else BEFORE)
            axes.plot(np.arange(len(values)), values, **look)
        axes.set_title(instrument.name, fontsize=9)
        axes.set_ylabel(instrument.unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, lw=0.5)
        if instrument.log:
            _widen(axes)
            log_scale(axes)
        else:
            axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    for axes in grid[-1]:
        axes.set_xlabel("block")
    times = {"before training": "--", f"after {last} steps": "-"} if last else {}
    looks |= {when: {"color": "grey", "ls": ls} for when, ls in times.items()}
    key = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    figure.legend(handles=key, loc="outside lower center", ncols=min(8, len(key)), frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _widen(axes: Axes) -> None:
    """Puts the ends of an axis, logarithmic soon, apart by the factor `SPAN` or more."""
    low, high = axes.dataLim.minposy, axes.dataLim.y1
    if 0 < low < high < SPAN * low:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / SPAN**0.5, middle * SPAN**0.5)
