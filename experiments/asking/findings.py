"""The findings that open a report, each with its effects beside what was claimed.

Their words are `findings.toml`; every number is that of a claim. Where a claim came out otherwise
than the words rest on, they are not said: its question and its verdict stand in their place.
"""

from __future__ import annotations

import itertools
import math
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from ..engine.verdict import Decision, Verdict
from .numbers import SYMBOLS, estimate, number
from .section import Section

PATH = Path(__file__).with_name("findings.toml")
"""The file."""

COLOURS = {"holds": "#00623f", "fails": "#a13a00", "undecided": "#5f5b53"}
"""Of each verdict in the picture; the page has its own, for light and dark."""


class Evidence(NamedTuple):
    """A claim that a finding rests on.

    Attributes:
      id: Of the claim.
      told: The verdict that the finding's words rest on.
      name: What its effect is of, in words.
    """

    id: str
    told: Decision
    name: str


class Finding(NamedTuple):
    """What some claims come to.

    Attributes:
      title: A sentence.
      more: What was compared, and what else the claims say.
      claims: What both rest on.
    """

    title: str
    more: str
    claims: tuple[Evidence, ...]


class Strip(NamedTuple):
    """An effect on its axis, of which 0 is the left end and 1 the right.

    Attributes:
      name: What it is of.
      verdict: That of its claim.
      low, mean, high: Where its interval begins, its mean, and where the interval ends; NaN where
        one is not finite.
      seeds: Where the effect of each seed is.
      claimed: From where to where it was said to be.
    """

    name: str
    verdict: Verdict
    low: float
    mean: float
    high: float
    seeds: tuple[float, ...]
    claimed: tuple[float, float]


class Panel(NamedTuple):
    """Effects of one unit, on one axis.

    Attributes:
      strips: One for each.
      ticks: Where, and the number there.
      nothing: Where no effect would be: at 0, of a factor at 1.
    """

    strips: tuple[Strip, ...]
    ticks: tuple[tuple[float, str], ...]
    nothing: float


class Told(NamedTuple):
    """A finding as a report tells it.

    Attributes:
      title, more: Its words; the headline of its first question and nothing if `so` is false.
      so: Whether every verdict is the one that the words rest on.
      panels: Its effects.
      sections: The questions that its claims are of.
      sources: The keys of the sources that say them.
    """

    title: str
    more: str
    so: bool
    panels: tuple[Panel, ...]
    sections: tuple[Section, ...]
    sources: tuple[str, ...]


def read(path: Path = PATH) -> tuple[Finding, ...]:
    """The findings of a file, in its order."""
    listed = tomllib.loads(path.read_text(encoding="utf-8"))["finding"]
    return tuple(
        Finding(f["title"], f["more"], tuple(Evidence(**claim) for claim in f["claims"]))
        for f in listed
    )


def tell(findings: Iterable[Finding], sections: Sequence[Section]) -> tuple[Told, ...]:
    """The findings whose claims a report has.

    Args:
      findings: Those that there are.
      sections: The questions of the report.
    """
    places = {v.id: (section, v) for section in sections for v in section.verdicts}
    return tuple(
        _told(finding, places)
        for finding in findings
        if {e.id for e in finding.claims} <= {*places}
    )


def _told(finding: Finding, places: Mapping[str, tuple[Section, Verdict]]) -> Told:
    found = [(e, *places[e.id]) for e in finding.claims]
    so = all(verdict.decision == e.told for e, _, verdict in found)
    named = [(e.name if so else verdict.claim, verdict) for e, _, verdict in found]
    sections = {section.name: section for _, section, _ in found}
    panels = itertools.groupby(named, lambda one: (one[1].unit, one[1].scale))
    return Told(
        title=finding.title if so else found[0][1].text["question"],
        more=finding.more if so else "",
        so=so,
        panels=tuple(panel(list(group)) for _, group in panels),
        sections=tuple(sections.values()),
        sources=tuple(dict.fromkeys(v.source.key for _, _, v in found if v.source)),
    )


def bare(sections: Iterable[Section]) -> tuple[Told, ...]:
    """Each claim as a picture shows it where a report has no findings, in its own words."""
    return tuple(
        Told(v.claim.replace("`", ""), "", True, (panel([(v.claim, v)]),), (section,), ())
        for section in sections
        for v in section.verdicts
    )


def panel(named: Sequence[tuple[str, Verdict]]) -> Panel:
    """Effects of one unit and scale on one axis, which has all of them and their bounds on it.

    Args:
      named: What each is of, and its verdict.
    """
    verdicts = [verdict for _, verdict in named]
    geometric = verdicts[0].scale == "geometric"
    nothing = 1.0 if geometric else 0.0
    each = [
        *(x for v in verdicts for x in (v.effect, v.low, v.high, *v.effects)),
        *(x for v in verdicts for x in (v.at_least, v.at_most)),
        *([0.0, 1.0] if verdicts[0].scale == "share" else [nothing]),
    ]
    shown = [x for x in each if math.isfinite(x) and (x > 0 or not geometric)]
    low, high = min(shown), max(shown)
    if geometric:
        low, high = math.log(low), math.log(high)
    room = 0.04 * (high - low) or 1.0
    low, high = low - room, high + room

    def place(x: float) -> float:
        if geometric:
            x = math.log(x) if x > 0 else -math.inf
        return (x - low) / (high - low)

    def within(x: float) -> float:
        return min(max(place(x), 0.0), 1.0)

    return Panel(
        strips=tuple(
            Strip(
                name=name,
                verdict=v,
                low=within(v.low),
                mean=place(v.effect),
                high=within(v.high),
                seeds=tuple(place(x) for x in v.effects if math.isfinite(place(x))),
                claimed=(within(v.at_least), within(v.at_most)),
            )
            for name, v in named
        ),
        ticks=tuple(
            (place(x), number(x)) for x in _ticks(low, high, geometric) if 0.02 < place(x) < 0.98
        ),
        nothing=place(nothing),
    )


def _ticks(low: float, high: float, geometric: bool) -> list[float]:
    """Some four numbers between the ends, of which a geometric axis has the logarithms."""
    if not geometric:
        return [float(x) for x in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)]
    ends = math.exp(low), math.exp(high)
    if high - low < math.log(1.5):
        return [x for x in _ticks(*ends, False) if x > 0]
    subs = (1.0, 2.0, 5.0) if high - low < math.log(50) else (1.0,)
    return [float(x) for x in LogLocator(subs=subs, numticks=20).tick_values(*ends)]


def picture(title: str, counts: str, told: Sequence[Told], *, intervals: bool = False) -> Figure:
    """The first findings as a picture to share, which a phone shows at a third of its size.

    Args:
      title: That of the page.
      counts: How the claims came out, in words.
      told: The findings, or claims; three are drawn, each with its first effect.
      intervals: Whether the interval of the effect is there in numbers too.
    """
    figure = Figure(figsize=(8, 4.2), facecolor="#fffefb")  # 1200 × 630 pixels
    head: dict[str, Any] = {"va": "top", "parse_math": False}
    titled = textwrap.wrap(title, 56, max_lines=2, placeholder=" …")
    large = len(title) < 45
    words = title if large else "\n".join(titled)
    size = 23 if large else 16
    bold: dict[str, Any] = {"fontsize": size, "weight": "bold", "color": "#1c1b19", **head}
    figure.text(0.04, 0.945 if large else 0.97, words, **bold)
    figure.text(0.04, 0.83, counts, fontsize=15.5, color="#5f5b53", **head)
    for at, finding in enumerate(told[:3]):
        top = 0.725 - 0.235 * at
        lines = textwrap.wrap(finding.title, 60, max_lines=2, placeholder=" …")
        words = "\n".join(lines)
        figure.text(0.04, top, words, fontsize=15, color="#1c1b19", linespacing=1.15, **head)
        strip, nothing = finding.panels[0].strips[0], finding.panels[0].nothing
        axes = figure.add_axes((0.04, top - 0.195, 0.40, 0.055))
        _draw(axes, strip, nothing)
        v = strip.verdict
        effect, interval = estimate(v)
        parts = (effect, v.unit, interval if intervals else "", SYMBOLS[v.decision])
        said = " ".join([*filter(None, parts), v.decision])
        figure.text(
            0.47,
            top - 0.167,
            said,
            fontsize=min(15.0, 15.0 * 31 / len(said)),
            va="center",
            weight="bold",
            color=COLOURS[v.decision],
            parse_math=False,
        )
    return figure


def _draw(axes: Axes, strip: Strip, nothing: float) -> None:
    axes.set(xlim=(0, 1), ylim=(-1, 1))
    axes.set_axis_off()
    axes.axvspan(*strip.claimed, color="#e7e3d8", lw=0)
    axes.axvline(nothing, color="#5f5b53", lw=1.5)
    colour = COLOURS[strip.verdict.decision]
    if np.isfinite(strip.low) and np.isfinite(strip.high):
        axes.plot([strip.low, strip.high], [0, 0], color=colour, lw=5)
    axes.plot([strip.mean], [0], "o", color=colour, ms=11, clip_on=False)
