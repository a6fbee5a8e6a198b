"""What all pictures are made of. A norm looks the same everywhere."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib

if "ipykernel" not in sys.modules:  # a notebook shows its own figures
    matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

import normlab as nl

# Okabe & Ito's palette, legible to the colour-blind, then wine and two greys, told apart by their
# markers.
_COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#CC79A7", "#009E73"),
    *("#E69F00", "#56B4E9", "#882255", "#8C6D1F", "#7F7F7F"),
)
_MARKERS = "osD^vP*pXd"
_DASHES = ("--", ":", "-.")
_FIRST = (
    *("none", "batch", "layer", "rms", "group", "instance", "weight", "weight_standardization"),
    *("cosine", "centred_cosine"),
)
"""The norms whose looks are fixed, whatever is registered beside them."""

# For what is not a norm: Tol's muted palette, without its wine.
_OTHER_COLOURS = (
    *("#332288", "#CC6677", "#117733", "#88CCEE"),
    *("#AA4499", "#999933", "#44AA99", "#DDCC77"),
)
_OTHER_MARKERS = "<>hv8HpX"

# Of an SVG: its unit is 1/72 inch, so that a hundredth of it cannot be seen.
_COORDINATES = re.compile(rb' (?:d|x|y)="[^"]+"')
_DIGITS = re.compile(rb"(\.\d\d)\d+")

Records = Sequence[dict[str, Any]]


def styles(names: Iterable[Any]) -> dict[Any, dict[str, Any]]:
    """A colour and a marker for each name, each its own.

    A norm of the registry looks the same in every figure, and one that is named by its place
    (`module:factory`) the same in every figure of the same norms. What is not a norm gets looks
    that no norm has, in the order of the names.

    >>> styles(["batch", "Adam"])["batch"]["marker"]
    's'
    """
    names = list(dict.fromkeys(names))
    registered = [*_FIRST, *(name for name in nl.names() if name not in _FIRST)]
    named = (name for name in names if ":" in str(name) and name not in registered)
    norms = dict(zip([*registered, *sorted(named)], _looks(_COLOURS, _MARKERS)))  # noqa: B905
    others = palette(name for name in names if name not in norms)
    return {name: dict(norms.get(name) or others[name]) for name in names}


def palette(names: Iterable[Any]) -> dict[Any, dict[str, Any]]:
    """A colour and a marker for each name, for what is not a norm: none that a norm has."""
    return dict(zip(names, _looks(_OTHER_COLOURS, _OTHER_MARKERS), strict=False))


def _looks(colours: Sequence[str], markers: str) -> Iterator[dict[str, Any]]:
    """Every colour with a marker of its own; then dashed, with the next marker, and so on."""
    for turn in range(len(markers) * len(_DASHES)):
        for i, colour in enumerate(colours):
            look = _look(colour, markers[(i + turn) % len(markers)])
            yield look | {"ls": _DASHES[turn // len(markers)]} if turn else look


def _look(colour: str, marker: str) -> dict[str, Any]:
    return {"color": colour, "marker": marker, "markersize": 4}


def encode(figure: Figure, kind: str) -> bytes:
    """The figure as a file of type `png` or `svg`, which closes it; it can be encoded again.

    A PNG has a palette of 256 colours, which takes a third of the room. An SVG has its text as
    text, and the same bytes for the same figure.
    """
    buffer = io.BytesIO()
    options: dict[str, Any] = {"dpi": 150}
    if kind == "svg":
        options = {"metadata": dict.fromkeys(("Date", "Creator", "Format", "Type"))}
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "normlab"}):
            figure.savefig(buffer, format=kind, **options)
    finally:
        plt.close(figure)
    if kind == "png":
        picture, buffer = Image.open(buffer).convert("RGB"), io.BytesIO()
        picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    if kind != "svg":
        return buffer.getvalue()
    return _COORDINATES.sub(lambda found: _DIGITS.sub(rb"\1", found[0]), buffer.getvalue())


def log_scale(axes: Axes, most: float = math.inf) -> None:
    """A logarithmic axis with plain numbers: at 1, 2 and 5 where it spans few decades.

    Values above `most` are left out, if there are others.
    """
    if not any((np.asarray(line.get_ydata()) > 0).any() for line in axes.get_lines()):
        return  # nothing finite to show
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 1.001:  # all the same but for rounding, which no axis can tell apart
        axes.set_ylim(0.9 * low, 1.1 * high)
    elif low < most < high:
        axes.set_ylim(top=most)
    plain_numbers(axes.yaxis, *axes.get_ylim())


def plain_numbers(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis with plain numbers: at 1, 2 and 5 where it spans few decades."""
    if high / low < 5:  # where those are too few
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 50 else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(steps [T], values [T, seeds])`; a missing or null value is NaN."""
    seeds = sorted({r["seed"] for r in records})
    steps = sorted({r["step"] for r in records})
    values = np.full((len(steps), len(seeds)), np.nan)
    for r in records:
        if r[key] is not None:
            values[steps.index(r["step"]), seeds.index(r["seed"])] = r[key]
    return np.array(steps), values
