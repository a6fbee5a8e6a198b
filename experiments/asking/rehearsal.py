"""Could a question's claims be judged? Its verdict and its figure are tried on made-up records.

The records have the labels of the conditions that are to be measured, and of all else whatever is
asked of them. A question that can be rehearsed with its own configs and not with one that somebody
gave it would train for hours, and then miss what its claims compare.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from ..engine.learn import Learning, Tuning
from ..engine.question import Condition, Config, Question
from ..engine.records import Records
from ..rundir import RunError
from .kept import as_json

SEEDS = 2
"""Of the made-up records."""

ALL_SAY = {"kind", "seed", "step", "diverged", "lr", "edge"}
"""What tells no record from those that do not say it."""

MANY = 4
"""Numbers in a made-up list."""


class _Value(float):
    """A number that was never measured: equal to whatever it is compared with.

    And a list of numbers, to what takes it for one.
    """

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = float.__hash__

    def __len__(self) -> int:
        return MANY

    def __getitem__(self, at: int | slice) -> Any:
        return [_Value(self + i / 10) for i in range(MANY)][at]

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])


class _Keys(frozenset):
    """The keys of a made-up record: all but those that only others have."""

    def __ge__(self, other: Any) -> bool:
        return not self & {*other}


class _Record(dict[str, Any]):
    """A made-up record: what it says, and a number for every key that none is told by.

    Attributes:
      absent: Keys that other records are told by.
    """

    def __init__(self, known: Mapping[str, Any], number: int, absent: frozenset[str]) -> None:
        super().__init__(known)
        self.number, self.absent = number, absent

    def __missing__(self, key: str) -> Any:
        if key in self.absent:
            raise KeyError(key)
        if key == "lr":  # of the best of several there is one
            return _Value(0.1)
        return _Value((1 + zlib.crc32(key.encode()) % 7 + self.number % 3) / 10)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def __contains__(self, key: object) -> bool:
        return key not in self.absent and not str(key).endswith("_each")

    def keys(self) -> Any:
        return _Keys(self.absent)

    def __or__(self, other: Mapping[str, Any]) -> _Record:  # type: ignore[override]
        return _Record({**dict(self.items()), **other}, self.number, self.absent - {*other})


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
    known = [known for condition in conditions for known in _known(condition, config)]
    told = {key for one in known for key in one} - ALL_SAY
    return _Made(_Record(one, i, frozenset(told - {*one})) for i, one in enumerate(known))


def _known(condition: Condition, config: Config) -> Iterator[dict[str, Any]]:
    """What is known of each record of a condition before it is measured."""
    measure, labels = condition.measure, condition.labels
    seeds = list(config.each_seed)[:SEEDS]
    if isinstance(measure, Tuning):
        yield {**labels, "kind": "tuning", "seed": seeds[0], "step": 0, "lr": 0.1, "edge": ""}
    rows = measure.rows if isinstance(measure, Learning) else ()
    lanes = [row for row in rows if row["seed"] in seeds] or [{"seed": seed} for seed in seeds]
    kind = {"kind": "evaluation"} if isinstance(measure, Learning | Tuning) else {}
    last = getattr(measure, "config", config).steps
    for said, lane, step in itertools.product(
        condition.says, lanes, dict.fromkeys((0, last // 2, last))
    ):
        known = {"diverged": None, **labels, **kind, **lane, "step": step}
        if all(said.get(key, known[key]) == known[key] for key in ("seed", "step")):
            yield {**known, **said}


class Rehearsed(NamedTuple):
    """How a rehearsal went.

    Attributes:
      why: Why the claims could not be judged; empty if they could.
      missed: What was looked for among the records and is not there.
      claims: The claims that could be judged.
    """

    why: str
    missed: list[str]
    claims: list[str]


def rehearse(question: Question, config: Config) -> Rehearsed:
    """Judges a question's claims on made-up records, and draws its figure of them.

    Raises RunError of a config that the question itself refuses.

    Args:
      question: The question.
      config: Its config.
    """
    try:
        made, why = made_up(question.run(config), config), ""
    except RunError:
        raise
    except Exception as error:  # of a config that its run does not expect
        return Rehearsed(f"{type(error).__name__}: {error}", [], [])
    judged: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that mean nothing
            for claim in question.verdict(made):
                if not claim.effects:
                    return Rehearsed("it has nothing to compare", made.missed, judged)
                judged.append(claim.id)
            if not judged:
                why = "no claim is left"
            plt.close(question.figure(made))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    return Rehearsed(why, made.missed, judged)


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
            return not rehearse(question, mended).why
        except RunError:
            return False

    blamed = [field for field in changed if without(field)] or changed
    options = ", ".join(f"--{field.replace('_', '-')}" for field in blamed)
    missed = [what for what in now.missed if what not in before.missed]
    why = f"it compares {missed[0]}" if missed else now.why
    left = [claim for claim in before.claims if claim not in now.claims]
    what = f"claim {left[0]} could not be judged" if left else "figure could not be drawn"
    name = question.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    raise RunError(
        f"{name}: with this {options} its {what}: {why}. Add what it compares to {options}; "
        "nothing was run."
    )


def _changed(config: Config, other: Config) -> list[str]:
    """The fields in which two configs differ."""
    mine, theirs = as_json(config), as_json(other)
    return [field for field in mine if mine[field] != theirs.get(field)]
