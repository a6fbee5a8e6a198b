"""The report: one self-contained page of HTML over all questions."""

from __future__ import annotations

import collections
import json
import math
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from ..engine.verdict import CONFIDENCE, Verdict
from ..rundir import RunError

SYMBOLS = {"holds": "✓", "fails": "✗", "undecided": "?", "missing": "∅"}
"""Of each verdict: none is told by its colour alone."""

_TEMPLATE = "page.html.j2"
_LINK = re.compile(r"https?://[^\s<>()]*[^\s<>().,;:]")
_CODE = re.compile(r"`([^`]+)`")
_EXPONENTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_AS_THEY_ARE = " !$()*,/:;=?@[]^{|}+"
"""What a data URI may hold besides letters and digits."""


class Section(NamedTuple):
    """What the page says of a question.

    Attributes:
      name: The name of its file.
      text: The parts of its docstring by their first words: "question" for the headline, "Claim",
        "Source", "Protocol", "Command", "Found"; each is optional but the first.
      verdicts: One for each claim.
      svg: The figure; empty if there is none.
      config: What was run.
      data: The "name", "origin" and "sha256" of each data set, the name alone of one that was not
        read; empty if none is needed.
      seconds: The cost, in seconds of one core.
      diverged: What became NaN, and where.
      missing: Why it could not be run; empty if it was.
    """

    name: str
    text: dict[str, str]
    verdicts: tuple[Verdict, ...]
    svg: str
    config: dict[str, Any]
    data: tuple[dict[str, Any], ...]
    seconds: float
    diverged: tuple[str, ...]
    missing: str


def page(sections: Sequence[Section], environment: dict[str, Any]) -> str:
    """The page: an overview of every claim, then each question.

    It needs no other file and no network, and the same arguments make the same bytes.

    Args:
      sections: The questions, in the order of the page.
      environment: That of `rundir.environment`.

    Returns:
      HTML that is also well-formed XML.

    Raises:
      RunError: If two questions have one name.
    """
    names = collections.Counter(section.name for section in sections)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise RunError(f"the report got {twice[0]!r} twice; give each question once.")
    counts = collections.Counter(v.decision for s in sections for v in s.verdicts)
    counts["missing"] = sum(bool(s.missing) for s in sections)
    return (
        _engine()
        .get_template(_TEMPLATE)
        .render(
            sections=sections,
            environment=environment,
            devices=collections.Counter(environment["devices"]),
            counts={name: counts[name] for name in SYMBOLS},
            symbols=SYMBOLS,
            level=f"{CONFIDENCE:.0%}",
        )
    )


def _engine() -> jinja2.Environment:
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {
        "prose": prose,
        "estimate": estimate,
        "threshold": threshold,
        "duration": duration,
        "image": image,
        "size": size,
        "json": lambda value: json.dumps(value, ensure_ascii=False, default=str),
    }
    return engine


def prose(text: str) -> Markup:
    """The text with its links to be followed (arXiv by its number) and `code` set as such."""
    text = str(escape(text))
    text = _CODE.sub(r"<code>\1</code>", text)
    return Markup(_LINK.sub(_anchor, text))


def _anchor(match: re.Match[str]) -> str:
    address = match[0]
    label = re.sub(r"^https?://arxiv\.org/abs/", "arXiv:", address)
    return f'<a href="{address}">{label}</a>'


def number(value: float) -> str:
    """Three digits, as they are set in print: `1.5 × 10⁻⁸`, `−∞`."""
    if math.isnan(value):
        return "not finite"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    digits, _, exponent = text.partition("e")
    if exponent:
        digits += f" × 10{str(int(exponent)).translate(_EXPONENTS)}"
    return digits.replace("-", "−")


def estimate(verdict: Verdict) -> tuple[str, str]:
    """The effect, and its interval to two digits of its half width."""
    ends = [verdict.effect, verdict.low, verdict.high]
    half = (verdict.high - verdict.low) / 2
    if not math.isfinite(half):  # one seed, or one that is not finite
        return number(verdict.effect), "no interval"
    places = 1 - math.floor(math.log10(half)) if half else -1
    if 0 <= places <= 4 and max(map(abs, ends)) < 1000:
        effect, low, high = (f"{v:.{places}f}".replace("-", "−") for v in ends)
    else:
        effect, low, high = map(number, ends)
    return effect, f"[{low}, {high}]"


def threshold(verdict: Verdict) -> str:
    """What the effect was to be, written before the run."""
    low, high = verdict.at_least, verdict.at_most
    if math.isfinite(low) and math.isfinite(high):
        return f"{number(low)} to {number(high)}"
    if math.isfinite(low):
        return f"≥ {number(low)}"
    return f"≤ {number(high)}" if math.isfinite(high) else "none"


def duration(seconds: float) -> str:
    """Seconds, with minutes or hours where there are some."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def image(svg: str) -> str:
    """The figure as an address: an image of its own, whose ids meet no other figure's."""
    content = " ".join(svg[svg.index("<svg") :].split())
    return "data:image/svg+xml," + urllib.parse.quote(content, _AS_THEY_ARE)


def size(svg: str) -> tuple[int, int]:
    """Width and height in pixels of CSS, which has 96 to the inch and matplotlib 72."""
    found = re.search(r'viewBox="0 0 (\S+) (\S+)"', svg)
    if found is None:
        raise RunError("a figure of the report has no viewBox; give an SVG that matplotlib wrote.")
    return round(float(found[1]) * 4 / 3), round(float(found[2]) * 4 / 3)
