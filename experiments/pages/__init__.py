"""What all pages of HTML have in common: `base.html.j2`, `page.css`, figures and prose in them."""

from __future__ import annotations

import json
import re
import urllib.parse
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape

from ..rundir import RunError
from ..terminal import counted

PROJECT = "https://github.com/normlab/normlab"
"""Where the code is."""

_HERE = Path(__file__).parent
_LINK = re.compile(r"https?://[^\s<>()]*[^\s<>().,;:]")
_CODE = re.compile(r"`([^`]+)`")
_AS_THEY_ARE = " !$()*,/:;=?@[]^{|}+"
"""What a data URI may hold besides letters and digits."""


class Shared(NamedTuple):
    """What is shown where a page is shared.

    Attributes:
      description: What it says, in a line or two.
      short: The same in fewer words.
      image: The address of a picture; empty without one.
      image_alt: What is seen in it.
      url: The address of the page, if it is known.
    """

    description: str
    short: str
    image: str = ""
    image_alt: str = ""
    url: str = ""


def engine(folder: Path) -> jinja2.Environment:
    """What renders the templates of a folder, which may extend `base.html.j2`."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "counted": counted,
        "prose": prose,
        "code": code,
        "image": image,
        "size": size,
        "json": lambda value: json.dumps(value, ensure_ascii=False, default=str),
    }
    return made


def prose(text: str) -> Markup:
    """The text with its links to be followed (arXiv by its number) and `code` set as such."""
    return Markup(_LINK.sub(_anchor, code(text)))


def code(text: str) -> Markup:
    """The text with `code` set as such."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def _anchor(match: re.Match[str]) -> str:
    address = match[0]
    label = re.sub(r"^https?://arxiv\.org/abs/", "arXiv:", address)
    return f'<a href="{address}">{label}</a>'


def image(svg: str) -> str:
    """The figure as an address: an image of its own, whose ids meet no other figure's."""
    content = " ".join(svg[svg.index("<svg") :].split())
    return "data:image/svg+xml," + urllib.parse.quote(content, _AS_THEY_ARE)


def table(csv: str) -> str:
    """A table as an address, from which a browser saves it."""
    return "data:text/csv;charset=utf-8," + urllib.parse.quote(csv, _AS_THEY_ARE)


def size(svg: str) -> tuple[int, int]:
    """Width and height in pixels of CSS, which has 96 to the inch and matplotlib 72."""
    found = re.search(r'viewBox="0 0 (\S+) (\S+)"', svg)
    if found is None:
        raise RunError("a figure of the report has no viewBox; give an SVG that matplotlib wrote.")
    return round(float(found[1]) * 4 / 3), round(float(found[2]) * 4 / 3)
