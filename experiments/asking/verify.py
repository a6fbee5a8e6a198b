"""`verify`: are the verdicts of a report those of this machine?

Two runs differ by rounding at least, and rounding decides a claim whose interval ends near its
bound. So effects are compared, by the interval of their difference: a claim is the same where it
holds 0. Where there is none, as for an identity, the decisions are compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from .. import questions
from ..engine.verdict import CONFIDENCE
from ..rundir import RunError
from ..terminal import EXIT_MISSING, PROGRAM, outcome, rows_table, show
from .answers import answers, status
from .config import Verify
from .kept import as_json, verdict_json


def verify(command: Verify) -> int:
    """Runs the questions and compares their verdicts and configs with those of a report."""
    told, configs = _told(command.against)
    for name in command.names:
        if name not in told:
            raise RunError(f"{name} has no verdict in {command.against}.")
    gone = {} if command.names else {n: told[n] for n in told if n not in questions.NAMES}
    names = command.names or tuple(name for name in questions.NAMES if name in told)
    if not names:
        raise RunError(
            f"{command.against} has no verdict of a question that is here. Name another report "
            "with --against."
        )
    found = [*answers(command, names)]
    rows = [row for name, before in gone.items() for row in _compared(name, before, {})]
    for answer in found:
        here = as_json(answer.config)
        then = here if answer.failed else configs.get(answer.name, here)
        for field in sorted(k for k in {*then, *here} if then.get(k) != here.get(k)):
            values = (json.dumps(config.get(field)) for config in (then, here))
            rows.append((answer.name, f"(config) {field}", *values, "differs"))
        now = {v.id: Effect.of(verdict_json(v)) for v in answer.verdicts}
        rows += _compared(answer.name, told[answer.name], now)
    columns = ("question", "claim", "the report", "here", "")
    table = rows_table(columns, rows)
    table.title = "verify"
    show(table, head=2)
    names_of = ("question", "claim", "then", "now", "agreement")
    outcome(claims=[dict(zip(names_of, row, strict=True)) for row in rows])
    return status(found) or (EXIT_MISSING if any(row[-1] == "differs" for row in rows) else 0)


class Effect(NamedTuple):
    """What a report says of a claim, as `kept.verdict_json` writes it."""

    decision: str
    effect: float | None
    error: float | None
    freedom: float | None
    scale: str
    seeds: int

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Effect:
        """Of the JSON of a verdict."""
        effect, error, freedom = (_finite(said[key]) for key in ("effect", "error", "freedom"))
        how = str(said["scale"]), int(said["seeds"])
        return cls(str(said["decision"]), effect, error, freedom, *how)

    def __str__(self) -> str:
        """Decision and effect."""
        return f"{self.decision}, {'–' if self.effect is None else f'{self.effect:.3g}'}"


Told = dict[str, Effect]
"""By the id of the claim."""


def agree(then: Effect, now: Effect) -> str:
    """Whether two effects of one claim agree: "same", "within the interval" or "differs".

    Theirs is the interval of Welch's t, of the logarithms of a factor; of shares of the seeds, the
    test of Fisher.
    """
    same = "same" if then.decision == now.decision else "differs"
    if then.scale != now.scale or None in (then.effect, now.effect):
        return same
    a, b = float(then.effect or 0.0), float(now.effect or 0.0)
    if then.scale == "share":
        counts = [[round(v * n), round((1 - v) * n)] for v, n in ((a, then.seeds), (b, now.seeds))]
        near = float(np.asarray(scipy.stats.fisher_exact(counts))[1]) > 1 - CONFIDENCE
    elif then.error is None or now.error is None or not then.error + now.error:
        return same
    else:
        if then.scale == "geometric":
            if min(a, b) <= 0:
                return same
            a, b = math.log(a), math.log(b)
        squares = then.error**2, now.error**2
        parts = (
            v**2 / (f if f is not None else math.inf)
            for v, f in zip(squares, (then.freedom, now.freedom), strict=True)
        )
        spread = sum(parts)
        freedom = sum(squares) ** 2 / spread if spread else math.inf
        limit = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(sum(squares))
        near = abs(a - b) <= limit
    return ("same" if same == "same" else "within the interval") if near else "differs"


def _told(path: Path) -> tuple[dict[str, Told], dict[str, dict[str, Any]]]:
    """The verdicts of a report and the configs of its questions; those without one are left out."""
    try:
        said = json.loads(path.read_text())
        told = {
            name: {str(v["id"]): Effect.of(v) for v in found}
            for name, found in said["verdicts"].items()
            if found
        }
        configs = {name: dict(config) for name, config in said.get("configs", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"cannot read the verdicts of a report in {path}: {error!r}. Make one with "
            f"`{PROGRAM} report`, or name another with --against."
        ) from error
    return told, configs


def _finite(value: Any) -> float | None:
    return None if value is None else float(value)


def _compared(name: str, before: Told, here: Told) -> Iterator[tuple[str, ...]]:
    """A row for each claim that is in the report or here."""
    for claim in dict.fromkeys((*before, *here)):
        then, now = before.get(claim), here.get(claim)
        what = agree(then, now) if then is not None and now is not None else "differs"
        yield name, claim, *("–" if v is None else str(v) for v in (then, now)), what
