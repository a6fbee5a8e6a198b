"""The sources of the claims: entries of `experiments/questions/sources.bib`, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bibtexparser import middlewares
from bibtexparser.entrypoint import parse_string
from pylatexenc.latex2text import LatexNodes2Text

from normlab.errors import nearest

from .. import questions
from ..engine.verdict import Verdict
from ..rundir import RunError

PATH = Path(questions.__file__).with_name("sources.bib")
"""The file."""

NEEDED = ("title", "year")
"""What every entry has, beside authors or editors."""

VENUES = ("journal", "booktitle", "publisher", "institution", "school", "howpublished")
"""Where something appeared: the first of these that an entry has."""

READ = {
    "read": "its text was read",
    "abstract": "its abstract alone was read",
    "second-hand": "quoted second-hand: its text was not read",
}
"""Of `Source.read`, in words."""

_ADDRESS = re.compile(r"https?://[^\s<>\"]+")


class Entry(NamedTuple):
    """A source in words.

    Attributes:
      key: In the file.
      label: As it stands in a sentence, `Ioffe & Szegedy 2015`.
      authors: All of them.
      title: The title.
      year: The year.
      venue: Where it appeared, with volume and pages; empty if that is not said.
      links: Names and addresses: arXiv, DOI, or the page.
      bibtex: The entry as it is in the file.
    """

    key: str
    label: str
    authors: str
    title: str
    year: str
    venue: str
    links: tuple[tuple[str, str], ...]
    bibtex: str


def read(path: Path | None = None) -> dict[str, Entry]:
    """The entries of a BibTeX file by their keys, in its order.

    Raises:
      RunError: If the file is not there, for what is no BibTeX, for a key that is there twice, or
        for an entry without authors, title or year; with the line.
    """
    path = path or PATH
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read the sources of the claims in {path}: {error}.") from error
    found = parse_string(
        text, append_middleware=[middlewares.SeparateCoAuthors(), middlewares.SplitNameParts()]
    )
    for block in found.failed_blocks:
        why = str(block.error).partition("\n")[0]
        raise RunError(f"{path}, line {(block.start_line or 0) + 1}: {why}")
    return {entry.key: _entry(path, entry) for entry in found.entries}


def known(names: Iterable[str]) -> dict[str, Entry]:
    """The entries that questions may cite, and those of a `sources.bib` beside one's own."""
    own = (questions.path_of(name) for name in names if questions.own_module(name))
    beside = {path.with_name(PATH.name) for path in own}
    found: dict[str, Entry] = {}
    for path in sorted(path for path in beside if path.is_file()):
        found |= read(path)
    return found | read()


def require(verdicts: Iterable[Verdict], known: Mapping[str, Entry]) -> None:
    """Raises RunError, naming all, for claims whose source is not in the file."""
    lost = [
        f"{v.id} cites {v.source.key!r} ({nearest(v.source.key, known)})"
        for v in verdicts
        if v.source and v.source.key not in known
    ]
    if lost:
        raise RunError(
            f"claims cite what is not in {PATH}: {'; '.join(lost)}. Add the entry, or mend the "
            f"key; what a question of your own cites is in a {PATH.name} beside its file."
        )


def _entry(path: Path, entry: Any) -> Entry:
    """An entry in words; addresses are taken as they are, for `%` and `~` are no LaTeX there."""
    fields = {key: field.value for key, field in entry.fields_dict.items()}
    people = fields.get("author") or fields.get("editor") or []
    lacks = [key for key in NEEDED if not fields.get(key)] + ([] if people else ["author"])
    if lacks:
        line = (entry.start_line or 0) + 1
        raise RunError(f"{path}, line {line}: {entry.key} has no {' and no '.join(lacks)}.")
    full = [_words(" ".join([*p.first, *p.von, *p.last, *p.jr])) for p in people]
    family = [_words(" ".join([*p.von, *p.last])) for p in people]
    year = re.search(r"\d{4}[a-z]?$", entry.key)
    return Entry(
        key=entry.key,
        label=f"{_people(family, '&', 2)} {year[0] if year else fields['year']}",
        authors=_people(full, "and", len(full)),
        title=_words(fields["title"]),
        year=fields["year"],
        venue=_venue({k: _words(v) for k, v in fields.items() if isinstance(v, str)}),
        links=tuple(_links(fields)),
        bibtex=entry.raw.strip(),
    )


def _words(text: str) -> str:
    """Text without its LaTeX."""
    return " ".join(LatexNodes2Text().latex_to_text(text).split())


def _people(names: list[str], between: str, most: int) -> str:
    """The names of authors; of more than `most`, or where others are not named, the first."""
    if len(names) > most or names[-1] == "others":
        return f"{names[0]} et al."
    return f" {between} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _venue(found: Mapping[str, str]) -> str:
    where = next((found[key] for key in VENUES if found.get(key)), "")
    volume = found.get("volume", "") + (f" ({found['number']})" if found.get("number") else "")
    parts = [" ".join(filter(None, [where, volume])), found.get("pages", "")]
    return ", ".join(filter(None, parts))


def _links(fields: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    url, arxiv = fields.get("url", ""), fields.get("eprint", "")
    if arxiv and fields.get("archiveprefix", "").lower() == "arxiv":
        yield f"arXiv:{arxiv}", f"https://arxiv.org/abs/{arxiv}"
    if fields.get("doi"):
        yield f"doi:{fields['doi']}", f"https://doi.org/{fields['doi']}"
    known = ("https://arxiv.org/abs/", "https://doi.org/")
    if _ADDRESS.fullmatch(url) and not url.startswith(known):
        yield re.sub(r"^https?://([^/]+).*", r"\1", url), url
    elif _ADDRESS.fullmatch(url) and not arxiv and not fields.get("doi"):
        yield url.removeprefix("https://"), url
