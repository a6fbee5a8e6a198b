"""Could a question's claims be judged? Its verdict and its figure are tried on made-up records.

The records have the labels of the conditions that are to be measured, and of all else whatever is
asked of them. A question that can be rehearsed with its own configs and not with one that somebody
gave it would train for hours, and then miss what its claims compare.
"""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from ..engine.question import Condition, Config, Question
from ..engine.records import Records
from ..rundir import RunError
from .kept import as_json

SEEDS = 2
"""Of the made-up records."""


class _Value(float):
    """A number that was never measured: equal to whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = float.__hash__


class _Everything(frozenset):
    """The keys of a made-up record."""

    def __ge__(self, other: object) -> bool:
        return True


class _Record(dict[str, Any]):
    """A made-up record: its labels, and a number for every other key."""

    def __missing__(self, key: str) -> Any:
        if key == "lr":  # of the best of several there is one
            return _Value(0.1)
        return _Value((1 + zlib.crc32(key.encode()) % 7 + self["number"] % 3) / 10)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def __contains__(self, key: object) -> bool:
        return not str(key).endswith("_each")

    def keys(self) -> Any:
        return _Everything(super().keys())

    def __or__(self, other: Mapping[str, Any]) -> _Record:  # type: ignore[override]
        return _Record({**dict(self.items()), **other})


class _Made(Records):
    """Made-up records, which note what was looked for among them and is not there."""

    def __init__(self, records: Iterable[Any] = (), missed: list[str] | None = None) -> None:
        super().__init__(records)
        self.missed: list[str] = [] if missed is None else missed

    def where(self, so: Any = None, /, **wanted: Any) -> Records:
        found = super().where(so, **wanted)
        absent = [
            f"{key} {value} (there is {', '.join(map(str, here)) or 'none'})"
            for key, value in wanted.items()
            if value not in (here := self.values(key))
        ]
        if self and not found and absent:
            self.missed.append(" with ".join(absent))
        return _Made(found, self.missed)

    def trained(self) -> Records:
        return _Made(super().trained(), self.missed)

    def last(self) -> Records:
        return _Made(super().last(), self.missed)


def made_up(conditions: Iterable[Condition], config: Config) -> _Made:
    """Records of conditions that were not measured."""
    made = _Made()
    for condition in conditions:
        rows = [row for row in getattr(condition.measure, "rows", ()) if row["seed"]]
        seeds = list(config.each_seed)[:SEEDS]
        lanes = [row for row in rows if row["seed"] in seeds] or [{"seed": s} for s in seeds]
        for lane in lanes:
            for step in dict.fromkeys((0, config.steps)):
                known = {**condition.labels, **lane, "step": step, "diverged": None, "edge": ""}
                made.append(_Record(known, number=len(made)))
    return made


class Rehearsed(NamedTuple):
    """How a rehearsal went.

    Attributes:
      why: Why the claims could not be judged; empty if they could.
      missed: What was looked for among the records and is not there.
    """

    why: str
    missed: list[str]


def rehearse(question: Question, config: Config) -> Rehearsed:
    """Judges a question's claims on made-up records, and draws its figure of them.

    Args:
      question: The question.
      config: Its config.
    """
    made, why = made_up(question.run(config), config), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that mean nothing
            claims = list(question.verdict(made))
            empty = [claim.id for claim in claims if not claim.effects]
            why = (
                f"{empty[0]} has nothing to compare" if empty else "" if claims else "none is left"
            )
            plt.close(question.figure(made))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    return Rehearsed(why, made.missed)


def require(question: Question, config: Config) -> None:
    """Raises RunError for a config with which the claims of a question could not be judged."""
    known = [getattr(question, profile, config) for profile in ("QUICK", "FULL")]
    apart = [_changed(config, other) for other in known]
    near, changed = min(zip(known, apart, strict=True), key=lambda pair: len(pair[1]))
    if not changed:
        return
    try:  # its own config, with the data that are there
        usual = dataclasses.replace(near, dataset=config.dataset, data_dir=config.data_dir)
        before = rehearse(question, usual)
    except Exception:
        return
    now = rehearse(question, config)
    if before.why or not now.why:
        return

    def without(field: str) -> bool:
        try:
            mended = dataclasses.replace(config, **{field: getattr(near, field)})
        except RunError:
            return False
        return not rehearse(question, mended).why

    blamed = [field for field in changed if without(field)] or changed
    options = ", ".join(f"--{field.replace('_', '-')}" for field in blamed)
    missed = [what for what in now.missed if what not in before.missed]
    why = f"they compare {missed[0]}" if missed else now.why
    raise RunError(
        f"with this {options} its claims could not be judged: {why}. Give what they compare; "
        "nothing was run."
    )


def _changed(config: Config, other: Config) -> list[str]:
    """The fields in which two configs differ."""
    mine, theirs = as_json(config), as_json(other)
    return [field for field in mine if mine[field] != theirs.get(field)]
