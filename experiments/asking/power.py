"""`power`: how many seeds would decide what is undecided, from its own spread."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
from rich.markup import escape
from rich.table import Table

from ..engine.verdict import CONFIDENCE, Verdict
from ..terminal import outcome, remark, show
from .answers import answers, status
from .config import Power
from .kept import verdict_json
from .numbers import estimate, threshold

MOST = 10_000
"""Seeds that are looked at, at most."""


class Needed(NamedTuple):
    """How many seeds would decide a claim.

    Attributes:
      seeds: Their number; `None` if none would.
      why: Why none would; empty if some do.
    """

    seeds: int | None
    why: str = ""


def power(command: Power) -> int:
    """Asks the questions and prints a row for each claim that is undecided."""
    command.require_names()
    found = [*answers(command, command.names, command.config)]
    columns = (
        "claim",
        "effect [95% interval]",
        "bound",
        "verdict",
        "seeds",
        "seeds for a decision",
    )
    table = Table(*columns, title=f"power {command.wanted:g}")
    told = []
    for answer in found:
        for verdict in answer.verdicts:
            if verdict.decision == "undecided" or command.all:
                need = needed(verdict, command.wanted)
                number = f"{need.seeds:,}" if need.seeds is not None else f"none: {need.why}"
                effect = " ".join(estimate(verdict))
                row = (verdict.id, effect, threshold(verdict), verdict.decision)
                table.add_row(*map(escape, (*row, str(verdict.seeds), number)))
                told.append({**verdict_json(verdict), "seeds_needed": need.seeds, "why": need.why})
    if not table.row_count:
        remark("no claim is undecided; --all shows how many seeds would have done.")
    else:
        show(table)
    outcome(power=command.wanted, claims=told)
    return status(found)


def needed(verdict: Verdict, wanted: float) -> Needed:
    """The fewest seeds that decide a claim with a power, if the true effect is the one found.

    >>> from experiments.engine.verdict import decide
    >>> needed(decide("a", "it is positive", [0.4, 1.6, -0.5, 0.9], at_least=0), 0.8)
    Needed(seeds=20, why='')
    """
    if verdict.scale == "share":
        chance = lambda n: _share(verdict, n)  # noqa: E731
    elif not math.isfinite(verdict.error):
        return Needed(None, "it has no spread: a seed is not finite, or there is one seed")
    else:
        edges = [_to_bound(verdict, bound) for bound in (verdict.at_least, verdict.at_most)]
        gaps = [abs(gap) for gap in edges if math.isfinite(gap)]
        gap = min(gaps, default=math.inf)
        spread = math.sqrt(verdict.seeds * (verdict.error**2 - verdict.error_images**2))
        if not gap:
            return Needed(None, "the effect found is the bound itself")
        chance = lambda n: _mean(gap, spread, verdict.error_images, n)  # noqa: E731
    if chance(MOST) < wanted:
        few = "test images too few" if verdict.error_images else f"more than {MOST:,}"
        return Needed(None, f"{few} for an effect so near the bound")
    low, high = 1, MOST  # `low` are too few, `high` do
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= wanted else (middle, high)
    return Needed(high)


def _to_bound(verdict: Verdict, bound: float) -> float:
    """The distance of the effect from a bound, on the scale of its error."""
    if verdict.scale == "linear":
        return verdict.effect - bound
    if not 0 < bound < math.inf or not verdict.effect > 0:
        return math.inf
    return math.log(verdict.effect / bound)


def _mean(gap: float, spread: float, images: float, seeds: int) -> float:
    """How likely an interval over so many seeds is to leave out a bound at this distance."""
    if seeds < 2:
        return 0.0
    of_seeds = spread**2 / seeds
    total = of_seeds + images**2
    if not total:
        return 1.0
    ratio = total / of_seeds if of_seeds else math.inf
    freedom = (seeds - 1) * ratio * ratio
    limit = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    if freedom > 1e6:
        return float(scipy.stats.norm.sf(limit - gap / math.sqrt(total)))
    return float(scipy.stats.nct.sf(limit, freedom, gap / math.sqrt(total)))


def _share(verdict: Verdict, seeds: int) -> float:
    """How likely so many seeds are to decide a claim, if the true share is the one found."""
    count = np.arange(seeds + 1)
    tail = (1 - CONFIDENCE) / 2
    low = np.where(count > 0, scipy.stats.beta.ppf(tail, count, seeds - count + 1), 0.0)
    high = np.where(count < seeds, scipy.stats.beta.isf(tail, count + 1, seeds - count), 1.0)
    holds = (verdict.at_least <= low) & (high <= verdict.at_most)
    fails = (high < verdict.at_least) | (low > verdict.at_most)
    return float(scipy.stats.binom.pmf(count, seeds, verdict.effect)[holds | fails].sum())
