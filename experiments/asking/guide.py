"""The guide: which norm, where and when, said by the claims of a report.

Its words are `guide.md.j2`; every number in it is that of a claim, named by its id, and leads to
the claim's row.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markdown_it
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import figures
from .numbers import estimate
from .page import SYMBOLS, image

_HERE = Path(__file__).parent
_CITED = re.compile(r'"([a-z0-9_]+(?:[.-][a-z0-9_]+)+)"')


class Cell(NamedTuple):
    """A place in the figure.

    Attributes:
      situation, norm: Its row and its column.
      id: The claim that fills it.
      good: Whether the norm does well there if the claim holds.
    """

    situation: str
    norm: str
    id: str
    good: bool = True


CELLS: tuple[Cell, ...] = ()
"""The decision figure."""

COLOURS = {"well": "#bfe3d0", "badly": "#f6cdb5", "undecided": "#e4e1da"}
"""Of what the evidence says; each cell says it with a sign as well."""

SIGNS = {"well": "+", "badly": "−", "undecided": "?"}


def cited() -> list[str]:
    """The ids of the claims that the guide and its figure rest on, each once."""
    words = (_HERE / "guide.md.j2").read_text(encoding="utf-8")
    return [*dict.fromkeys([*_CITED.findall(words), *(cell.id for cell in CELLS)])]


def guide(claims: pd.DataFrame, page: str, picture: str) -> str:
    """The guide in Markdown.

    Args:
      claims: Those of a report, as in `tables.claims`, with all that are `cited`.
      page: The address of the report's page.
      picture: That of the figure.
    """
    known = {row.id: row for row in claims.itertuples()}
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return engine.get_template("guide.md.j2").render(
        evidence=functools.partial(_evidence, known, page),
        effect=lambda id: _effect(known[id]),
        page=page,
        picture=picture,
    )


def _evidence(known: Mapping[str, Any], page: str, *ids: str) -> str:
    """A table with a line for each claim."""
    lines = ["| claim | verdict | effect, 95 % interval |", "|---|---|---|"]
    for row in (known[id] for id in ids):
        mark = f"{SYMBOLS[row.decision]} {row.decision}"
        words = row.claim.replace("|", "\\|")
        lines.append(f"| {words} [`{row.id}`]({page}#{row.id}) | {mark} | {_effect(row)} |")
    return "\n".join(lines)


def _effect(row: Any) -> str:
    mean, interval = estimate(row)
    return f"{mean} {row.unit} {interval}".replace("  ", " ")


def says(cell: Cell, decision: str) -> str:
    """What a claim says of the norm of a cell: "well", "badly" or "undecided"."""
    if decision == "undecided":
        return decision
    return "well" if (decision == "holds") == cell.good else "badly"


def figure(claims: pd.DataFrame) -> Figure:
    """The situations by the norms: what the evidence says, and the effect it says it with."""
    known = {row.id: row for row in claims.itertuples()}
    rows, norms = (_each(getattr(c, key) for c in CELLS) for key in ("situation", "norm"))
    picture = Figure(figsize=(2.6 + 1.35 * len(norms), 0.9 + 0.42 * len(rows)))
    picture.subplots_adjust(left=2.5 / (2.6 + 1.35 * len(norms)), right=0.995, top=0.9, bottom=0.02)
    axes = picture.subplots()
    for cell in CELLS:
        x, y, row = norms.index(cell.norm), rows.index(cell.situation), known[cell.id]
        said = says(cell, row.decision)
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=COLOURS[said]))
        mean, _ = estimate(row)
        words = f"{SIGNS[said]}  {mean} {row.unit}".strip()
        axes.text(x, y, words, ha="center", va="center", fontsize=8)
    axes.set(xlim=(-0.5, len(norms) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(norms)), norms)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    return picture


def _each(names: Iterable[str]) -> list[str]:
    return [*dict.fromkeys(names)]


def as_page(words: str, picture: str, svg: str) -> str:
    """The guide in Markdown as a page of HTML that needs no other file.

    Args:
      words: The guide.
      picture: The figure's address in it.
      svg: The figure.
    """
    body = markdown_it.MarkdownIt("commonmark").enable("table").render(words)
    body = body.replace(f'src="{picture}"', f'src="{image(svg)}"')
    engine = jinja2.Environment(loader=jinja2.FileSystemLoader(_HERE), autoescape=True)
    return engine.get_template("guide.html.j2").render(body=body)


def files(claims: pd.DataFrame, page: str, name: str) -> dict[str, bytes]:
    """The guide beside a report, by the names of its files; nothing if a claim it cites lacks.

    Args:
      claims: Those of the report.
      page: The name of the report's page.
      name: That of the guide's files, without their ends.
    """
    if not {*cited()} <= {*claims.id}:
        return {}
    picture, drawn = f"{name}.png", figure(claims)
    words = guide(claims, page, picture)
    svg = figures.encode(drawn, "svg").decode()
    return {
        f"{name}.md": words.encode(),
        picture: figures.encode(drawn, "png"),
        f"{name}.html": as_page(words, picture, svg).encode(),
    }
