"""The guide: which norm, where and when, said by the claims of a report.

Its words are `guide.md.j2`; every number in it is that of a claim, named by its id, and leads to
the claim's row.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markdown_it
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import figures, pages
from .numbers import SYMBOLS, estimate

_HERE = Path(__file__).parent
_DOCUMENT = re.compile(r'<a href="([a-z-]+\.md)">[^<]*</a>')
_CITED = re.compile(r'"([a-z0-9_]+(?:[.-][a-z0-9_]+)+)"')


class Cell(NamedTuple):
    """A place in the figure.

    Attributes:
      situation, norm: Its row and its column.
      id: The claim that fills it.
      name: What of the column it is.
      good: Whether that does well there if the claim holds.
    """

    situation: str
    norm: str
    id: str
    name: str = ""
    good: bool = True


NORMS = ("no norm", "batch", "batch, changed", "one example", "weights", "no statistics")
"""The columns."""

CELLS = (
    Cell("small initial weights", "no norm", "figure1.sd-0.01.gain", good=False),
    Cell("small initial weights", "batch", "figure1.sd-0.01.gain"),
    Cell("rates chosen, Adam", "batch", "optimizers.adam.gain"),
    Cell("rates chosen, momentum", "batch", "optimizers.momentum.gain"),
    Cell("rates chosen, SGD, sigmoids", "weights", "cosine.mnist.cosine.before", "cosine"),
    Cell("a conv net", "one example", "layer_conv.layer-all.batch", "layer", good=False),
    Cell("a conv net", "weights", "cosine.cifar10.cosine.before", "cosine"),
    Cell("a perceptron of 10 layers", "weights", "weight_norm_deep.deep", "weight", good=False),
    Cell("batch of 4", "batch", "batch_size.batch.at-batch-4", good=False),
    Cell("batch of 4", "batch, changed", "renorm.few.constant", "renorm"),
    Cell("batch of 4", "one example", "batch_size.layer.at-batch-4", "layer"),
    Cell("batch of 4", "no norm", "batch_size.none.at-batch-4"),
    Cell("batch of 2, conv net", "batch", "batch_size_conv.over-2.rise", good=False),
    Cell("batch of 2, conv net", "batch, changed", "switchable.few", "switchable"),
    Cell("batch of 2, conv net", "one example", "batch_size_conv.over-2.group", "group"),
    Cell("batch of 2, conv net", "weights", "standardized_weights.few", "WS and group"),
    Cell("few classes in a batch", "batch", "renorm.classes.constant.batch", good=False),
    Cell("few classes in a batch", "batch, changed", "renorm.classes.constant.renorm", "renorm"),
    Cell("one example at inference", "batch", "batch_one.population-1.error"),
    Cell("a stream that drifts", "batch, changed", "online.drifting.renorm", "renorm"),
    Cell("a stream that drifts", "one example", "online.drifting.layer", "layer"),
    Cell("a stream that stands still", "one example", "online.still.group", "group"),
    Cell("a recurrent net", "batch, changed", "recurrent.lstm.none", "each step’s"),
    Cell("fine-tuning, tiny batches", "batch, changed", "fine_tuning.frozen", "frozen"),
    Cell("2 images on each device", "batch, changed", "group_size.per-device-2.all", "synced"),
    Cell("devices with data of their own", "batch, changed", "fed_bn.fed-bn", "FedBN"),
    Cell("a small language model", "one example", "rms_layer_lm.same", "RMS"),
    Cell("a language model, little data", "no statistics", "dyt_data.little", "DyT"),
    Cell("a language model, much data", "no statistics", "dyt_data.much", "DyT", good=False),
    Cell("a small vision transformer", "no statistics", "dyt_vit.dyt", "DyT"),
    Cell("8 layers of sigmoids", "no norm", "deep_sigmoid.depth-8.none", good=False),
    Cell("8 layers of sigmoids", "batch", "deep_sigmoid.depth-8.batch"),
    Cell("32 blocks, no warm-up", "no norm", "rezero_depth.plain", good=False),
    Cell("32 blocks, no warm-up", "no statistics", "rezero_depth.rezero", "ReZero"),
    Cell("32 blocks, no warm-up", "one example", "rezero_depth.post", "post", good=False),
    Cell("64 blurred test images", "batch, changed", "test_time.blur.statistics", "their own"),
    Cell("4 blurred test images", "batch, changed", "test_time.blur.few", "their own", good=False),
    Cell("an attack", "batch", "adversarial.attack-0.05", good=False),
)
"""The decision figure."""

COLOURS = {"well": "#bfe3d0", "badly": "#f6cdb5", "undecided": "#e4e1da"}
"""Of what the evidence says; each cell says it with a sign as well."""

SIGNS = {"well": "▲", "badly": "▼", "undecided": "?"}


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
    known = _by_id(claims)
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return engine.get_template("guide.md.j2").render(
        evidence=functools.partial(_evidence, known, page),
        page=page,
        picture=picture,
    )


def _by_id(claims: pd.DataFrame) -> dict[str, Any]:
    return dict(zip(claims.id, claims.itertuples(), strict=True))


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
    known = _by_id(claims)
    rows = [*dict.fromkeys(cell.situation for cell in CELLS)]
    width, height = 2.4 + 1.65 * len(NORMS), 0.5 + 0.3 * len(rows)
    picture = Figure(figsize=(width, height))
    axes = picture.add_axes((2.4 / width, 0.02, 1 - 2.45 / width, 1 - 0.47 / height))
    for cell in CELLS:
        x, y, row = NORMS.index(cell.norm), rows.index(cell.situation), known[cell.id]
        said = says(cell, row.decision)
        axes.add_patch(Rectangle((x - 0.48, y - 0.44), 0.96, 0.88, color=COLOURS[said]))
        words = " ".join(f"{SIGNS[said]} {cell.name} {estimate(row)[0]} {row.unit}".split())
        axes.text(x, y, words, ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(-0.5, len(NORMS) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(NORMS)), NORMS)
    axes.set_yticks(range(len(rows)), rows)
    axes.hlines([y + 0.5 for y in range(len(rows) - 1)], *axes.get_xlim(), color="#d9d5ca", lw=0.5)
    axes.tick_params(
        length=0, top=True, labeltop=True, bottom=False, labelbottom=False, labelsize=8
    )
    axes.spines[:].set_visible(False)
    return picture


def as_page(words: str, picture: str, svg: str) -> str:
    """The guide in Markdown as a page of HTML that needs no other file.

    Args:
      words: The guide.
      picture: The figure's address in it.
      svg: The figure.
    """
    body = markdown_it.MarkdownIt("commonmark").enable("table").render(words)
    body = body.replace(f'src="{picture}"', f'src="{pages.image(svg)}"')
    body = _DOCUMENT.sub(r"<code>docs/\1</code>", body)  # which lies elsewhere
    return pages.engine(_HERE).get_template("guide.html.j2").render(body=body)


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
