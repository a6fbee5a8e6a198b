"""What is said of a question on the page and in the tables: its answer with all that backs it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import questions
from ..engine.question import Condition, Config, Record
from ..engine.verdict import CONFIDENCE, Verdict, adjusted
from ..rundir import RunError
from .ask import Answer
from .kept import as_json
from .thresholds import Line, order, since

UNSEEN = Config(dataset="").first_seed
"""The first of the seeds that no pilot has: what a bound may rest on had seeds below."""


class Row(NamedTuple):
    """What is said of a claim beside its verdict.

    Attributes:
      verdict: The verdict.
      seeds: The seed of each effect; `None` where the effects are not one for each seed.
      locked: When its bound was set, in words.
      history: Every bound it has had, the newest last, each with its `thresholds.order`.
    """

    verdict: Verdict
    seeds: tuple[int | None, ...]
    locked: str
    history: tuple[tuple[Line, str], ...]


class Tuning(NamedTuple):
    """How a learning rate was chosen.

    Attributes:
      condition: For what, in words.
      rates: Each rate with what it came to on the held-out images: an accuracy, of a text a loss;
        `None` if it diverged.
      measure: What that is.
      best: The rate that was chosen.
      edge: The end of the grid that it is, "lowest" or "highest"; else empty.
    """

    condition: str
    rates: tuple[tuple[float, float | None], ...]
    measure: Literal["accuracy", "loss"]
    best: float
    edge: str


class Section(NamedTuple):
    """What is said of a question.

    Attributes:
      name: The name of its file.
      text: The parts of its docstring by their first words: "question" for the headline, "Claim",
        "Source", "Protocol", "Command", "Found"; each is optional but the first.
      config: What was run.
      rows: One for each claim.
      tunings: How each learning rate was chosen.
      svg: The figure; empty if there is none.
      profile: "quick" or "full", or "changed" if it is neither.
      run: The name of its run directory; empty if it was not run.
      begun: When that began, in UTC.
      data: The "name", "origin" and "sha256" of each data set, the name alone of one that was not
        read; empty if none is needed.
      seconds: The cost, in seconds of one core.
      diverged: What became NaN, and where.
      missing: Why it could not be run; empty if it was.
    """

    name: str
    text: dict[str, str]
    config: dict[str, Any]
    rows: tuple[Row, ...] = ()
    tunings: tuple[Tuning, ...] = ()
    svg: str = ""
    profile: str = "quick"
    run: str = ""
    begun: str = ""
    data: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0
    diverged: tuple[str, ...] = ()
    missing: str = ""

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """That of each claim."""
        return tuple(row.verdict for row in self.rows)


class Adjusted(NamedTuple):
    """The p-value of a claim adjusted for how many there are; NaN where it has none.

    Attributes:
      holm: Holm's, among the claims of its question that are no identities.
      bh: That of Benjamini and Hochberg, among all such claims.
    """

    holm: float
    bh: float

    def survives(self, verdict: Verdict) -> tuple[bool, bool]:
        """Whether the claim is still decided by each of them."""
        decided, level = verdict.decision != "undecided", 1 - CONFIDENCE
        return decided and self.holm <= level, decided and self.bh <= level


def families(sections: Sequence[Section]) -> dict[str, Adjusted]:
    """The adjusted p-values of every claim that is no identity, by id."""
    each = [[v for v in s.verdicts if v.kind != "identity"] for s in sections]
    holm = [p for own in each for p in adjusted([v.p for v in own], "holm")]
    together = [v for own in each for v in own]
    bh = adjusted([v.p for v in together], "fdr_bh")
    return {v.id: Adjusted(*found) for v, *found in zip(together, holm, bh, strict=True)}


def section(answer: Answer, locked: Mapping[str, Sequence[Line]]) -> Section:
    """What is said of an answer.

    Args:
      answer: The answer.
      locked: The history of every bound.
    """
    try:
        text = questions.describe(answer.name)
    except Exception:  # its file cannot be imported, which is why it has no answer
        text = {"question": answer.name}
    found = Section(
        name=answer.name,
        text=text,
        config=as_json(answer.config),
        profile=_profile(answer),
        data=tuple({"name": name} for name in answer.config.datasets),
        seconds=answer.seconds,
        diverged=answer.diverged,
        missing=answer.failed,
    )
    if answer.path is None:
        return found
    config = json.loads(_text(answer.path / "config.json"))
    found = found._replace(run=answer.path.name, data=tuple(config["data"]))
    if answer.failed:
        return found
    begun = config["begun"]
    rows = (row(v, answer.config, locked.get(v.id, ()), begun) for v in answer.verdicts)
    return found._replace(
        begun=begun,
        rows=tuple(rows),
        tunings=tuple(tunings(answer.records)),
        svg=_text(answer.path / "figure.svg"),
    )


def row(verdict: Verdict, config: Config, lines: Sequence[Line], begun: str) -> Row:
    """What is said of a claim whose run began at a time, in UTC."""
    each = len(verdict.effects) == config.seeds
    return Row(
        verdict=verdict,
        seeds=tuple(config.each_seed) if each else (None,) * len(verdict.effects),
        locked=since(lines, begun),
        history=tuple((line, order(line, begun)) for line in lines),
    )


def tunings(records: Iterable[Record]) -> Iterable[Tuning]:
    """How each learning rate was chosen, of records of `kind` "tuning"."""
    for record in records:
        if record["kind"] == "tuning":
            labels = dict(itertools.takewhile(lambda item: item[0] != "kind", record.items()))
            key = "losses" if "losses" in record else "accuracies"
            yield Tuning(
                condition=Condition(labels, lambda resume: iter(())).name,
                rates=tuple(zip(record["rates"], record[key], strict=True)),
                measure="loss" if key == "losses" else "accuracy",
                best=record["lr"],
                edge=record["edge"],
            )


def _profile(answer: Answer) -> str:
    try:
        question = questions.require(answer.name)
        known = {"quick": question.QUICK, "full": question.FULL}
    except Exception:  # as above
        return "changed"
    mine = as_json(answer.config)
    return next((name for name, config in known.items() if as_json(config) == mine), "changed")


def _text(path: Path) -> str:
    """A file of a run; raises RunError if it is gone."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}. Run it with --again.") from error
