"""The report: one self-contained page of HTML over all questions."""

from __future__ import annotations

import base64
import collections
import hashlib
import re
import typing
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from .. import pages, questions
from ..engine.verdict import CONFIDENCE, Kind, Verdict
from ..pages import PROJECT, Shared
from ..rundir import RunError
from ..terminal import PROGRAM, counted
from .findings import Told
from .numbers import SYMBOLS, asked_size, duration, estimate, number, p_value, threshold
from .references import READ, Entry
from .section import UNSEEN, Adjusted, Section, families

TITLE = "Normalization: the claims, tested"

KINDS: dict[Kind, str] = {
    "identity": "is so exactly or up to rounding",
    "literature": "a source says it",
    "ours": "no source says it",
}
"""What each kind of claim is."""

INTERVALS = {
    "linear": "Student’s t over the seeds",
    "geometric": "Student’s t over the seeds, of the logarithm",
    "share": "Clopper and Pearson’s, of the share of the seeds",
}
"""By the scale of a verdict."""

_HERE = Path(__file__).parent
_TEMPLATE = "page.html.j2"
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


class Count(NamedTuple):
    """How the claims of a kind came out.

    Attributes:
      kind: The kind.
      what: What it is, in words.
      decided: How many hold, fail and are undecided.
      holm, bh: Of those that hold and that fail, how many are decided still, with the p-values of
        `Adjusted`.
    """

    kind: Kind
    what: str
    decided: dict[str, int]
    holm: dict[str, int]
    bh: dict[str, int]


def page(
    sections: Sequence[Section],
    environment: dict[str, Any],
    references: Mapping[str, Entry],
    files: Mapping[str, str],
    guide: str = "",
    *,
    told: Sequence[Told] = (),
    picture: str = "",
    url: str = "",
) -> str:
    """The page: the findings, then each question, folded, then the sources and what was run.

    It needs no other file and no network, and the same arguments make the same bytes.

    Args:
      sections: The questions, in the order of the page.
      environment: That of `rundir.environment`.
      references: The sources by their keys; those that no claim cites are left out.
      files: What lies beside the page, in words, and the name of its file.
      guide: The name of the guide's page, if there is one.
      told: The findings.
      picture: The name of a picture beside the page, which is shown where the page is shared.
      url: The address of the page, if it is known: what shares a page asks for that of the picture.

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
    family = families(sections)
    cited: dict[str, list[Verdict]] = {}
    for verdict in (v for section in sections for v in section.verdicts):
        if verdict.source:
            cited.setdefault(verdict.source.key, []).append(verdict)
    locks = collections.Counter(
        row.history[-1][1] if row.history else "" for s in sections for row in s.rows
    )
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    commit = environment["commit"] or ""
    said = summary(sections)
    return (
        _engine()
        .get_template(_TEMPLATE)
        .render(
            title=title(sections),
            told=told,
            shared=Shared(
                description=f"{said}. What the literature says of normalization, judged by "
                "effects over random seeds.",
                short=f"{said}.",
                image=picture and urllib.parse.urljoin(url, picture),
                image_alt=f"{said}; the first findings, each with an effect",
                url=url,
            ),
            own={
                s.name: questions.path_of(s.name).name
                for s in sections
                if questions.own_module(s.name)
            },
            code_at=f"{PROJECT}/blob/{commit if _COMMIT.fullmatch(commit) else 'main'}",
            project=PROJECT,
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            sections=sections,
            environment=environment,
            devices=collections.Counter(environment["devices"]),
            counts={name: counts[name] for name in SYMBOLS},
            kinds=[*_by_kind(sections, family)],
            family=family,
            locks=locks,
            references={key: references[key] for key in sorted(cited)},
            cited=cited,
            files=files,
            guide=guide,
            symbols=SYMBOLS,
            intervals=INTERVALS,
            read=READ,
            program=PROGRAM,
            unseen=UNSEEN,
            seen=[s.name for s in sections if s.config.get("first_seed", UNSEEN) < UNSEEN],
            level=f"{CONFIDENCE:.0%}",
            tail=f"{(1 - CONFIDENCE) / 2:.1%}",
        )
    )


def title(sections: Sequence[Section]) -> str:
    """That of the page: of one question of one's own the question."""
    if len(sections) == 1 and questions.own_module(sections[0].name):
        return sections[0].text["question"]
    return TITLE


def summary(sections: Sequence[Section]) -> str:
    """How the claims came out, in a line.

    >>> summary([])
    '0 claims of 0 questions: 0 hold, 0 fail, 0 undecided'
    """
    found = collections.Counter(v.decision for s in sections for v in s.verdicts)
    return (
        f"{counted(found.total(), 'claim')} of {counted(len(sections), 'question')}: "
        f"{found['holds']} hold, {found['fails']} fail, {found['undecided']} undecided"
    )


def _by_kind(sections: Sequence[Section], family: Mapping[str, Adjusted]) -> Iterable[Count]:
    verdicts = [v for section in sections for v in section.verdicts]
    for kind in typing.get_args(Kind):
        mine = [v for v in verdicts if v.kind == kind]
        still = [(v.decision, family[v.id].survives(v)) for v in mine if v.id in family]
        yield Count(
            kind,
            KINDS[kind],
            {d: sum(v.decision == d for v in mine) for d in ("holds", "fails", "undecided")},
            *(
                {d: sum(said == d and so[i] for said, so in still) for d in ("holds", "fails")}
                for i in (0, 1)
            ),
        )


def _engine() -> jinja2.Environment:
    engine = pages.engine(_HERE)
    engine.filters |= {
        "estimate": estimate,
        "threshold": threshold,
        "asked_size": asked_size,
        "p_value": p_value,
        "number": number,
        "duration": duration,
        "percent": lambda share: f"{100 * share:.2f}%",
    }
    return engine
