"""Verdicts: what a claim comes to, by its effect in each seed."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats

from ..rundir import Record

Decision = Literal["holds", "fails", "undecided"]

CONFIDENCE = 0.95
"""Of every interval."""


class Verdict(NamedTuple):
    """What became of a claim.

    Attributes:
      claim: That the effect lies between `at_least` and `at_most`.
      decision: `holds` if the whole interval does, `fails` if none of it does, else `undecided`.
      effect: The mean over seeds.
      low, high: Its confidence interval, of Student's t over the seeds.
      at_least, at_most: The thresholds, which were written before the run.
      unit: Of the effect.
      seeds: How many there were.
    """

    claim: str
    decision: Decision
    effect: float
    low: float
    high: float
    at_least: float
    at_most: float
    unit: str
    seeds: int


def decide(
    claim: str,
    effects: Iterable[float],
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    unit: str = "",
    geometric: bool = False,
) -> Verdict:
    """Decides a claim by the effect in each seed.

    One seed, or an effect that is not finite, has no interval: the claim is undecided. With
    `geometric`, for effects of any order of magnitude, none of them negative, mean and interval
    are those of the logarithm. A zero has none: it counts as the smallest effect that is not zero,
    but leaves a claim undecided that the effect is at least something.

    >>> decide("it is small", [0.1, 0.12, 0.11], at_most=0.5).decision
    'holds'
    """
    values = np.asarray(list(effects), float)
    if geometric:
        positive = values[values > 0]
        least = positive.min() if positive.size else np.finfo(float).tiny
        if at_least > 0:  # its logarithm is -inf
            least = 0.0
        with np.errstate(divide="ignore"):
            values = np.log(np.where(values == 0, least, values))
    mean, low, high = interval(values)
    if geometric:
        with np.errstate(over="ignore"):
            mean, low, high = (float(np.exp(v)) for v in (mean, low, high))
    decision: Decision = "undecided"
    if at_least <= low and high <= at_most:
        decision = "holds"
    elif high < at_least or low > at_most:
        decision = "fails"
    return Verdict(claim, decision, mean, low, high, at_least, at_most, unit, values.size)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """The mean, and its interval of Student's t: the whole line for one value or a NaN."""
    values = np.asarray(values, float)
    if not values.size:
        return math.nan, -math.inf, math.inf
    mean = float(values.mean())
    if values.size < 2 or not np.isfinite(values).all():
        return mean, -math.inf, math.inf
    if not np.ptp(values):  # Student's t has no interval where all seeds agree
        return mean, mean, mean
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # they agree to rounding
        found = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return mean, float(found.low), float(found.high)


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records that say what is wanted."""
    return [r for r in records if all(r.get(k) == v for k, v in wanted.items())]


def last(records: Iterable[Record]) -> list[Record]:
    """The record of the last evaluation of each net; a net is what stands before the `step`."""
    found: dict[tuple[Any, ...], Record] = {}
    for record in select(records, kind="evaluation"):
        labels = itertools.takewhile(lambda item: item[0] != "step", record.items())
        found[tuple(labels)] = record
    return list(found.values())


def tuned(records: Iterable[Record], *labels: str) -> list[Record]:
    """The last evaluations of each setting of the labels, at its best rate.

    The best is that of the largest test accuracy, the mean over the seeds: a net that is tuned at
    more rates has more to choose from.
    """
    ends, found = last(records), []
    for setting in dict.fromkeys(tuple(r[label] for label in labels) for r in ends):
        here = select(ends, **dict(zip(labels, setting, strict=True)))
        rates = sorted({r["lr"] for r in here})
        best = max(rates, key=lambda lr: accuracy(here, lr=lr).mean())
        found += select(here, lr=best)
    return found


def by_seed(records: Iterable[Record], key: str, **wanted: Any) -> np.ndarray:
    """The last value of `key` in each seed, of the records that say what is wanted."""
    last: dict[int, float] = {}
    for record in select(records, **wanted):
        if key in record:
            last[record["seed"]] = math.nan if record[key] is None else record[key]
    return np.array([last[seed] for seed in sorted(last)])


def accuracy(records: Iterable[Record], condition: Any = None, **wanted: Any) -> np.ndarray:
    """The test accuracy of each seed at the end, in percent: what claims in points are about."""
    if condition is not None:
        wanted["condition"] = condition
    return 100 * by_seed(records, "accuracy", kind="evaluation", **wanted)


def share_of_steps(
    records: Sequence[Record],
    target: float,
    mine: Mapping[str, Any],
    reference: Mapping[str, Any],
) -> np.ndarray:
    """The steps to the accuracy `target` over those of the reference, of each seed.

    One that does not come there counts with its last step, so that the share is a bound; where
    neither does it is NaN.
    """
    steps = [steps_to(records, target, **which) for which in (mine, reference)]
    last = max(r["step"] for r in select(records, kind="evaluation"))
    share = np.minimum(steps[0], last) / np.minimum(steps[1], last)
    return np.where(np.isinf(steps[0]) & np.isinf(steps[1]), np.nan, share)


def steps_to(records: Iterable[Record], target: float, **wanted: Any) -> np.ndarray:
    """The first evaluation of each seed with the accuracy `target`; inf if none."""
    first: dict[int, float] = {}
    for record in select(records, kind="evaluation", **wanted):
        seed, value = record["seed"], record["accuracy"]
        first.setdefault(seed, math.inf)
        if value is not None and value >= target:
            first[seed] = min(first[seed], record["step"])
    return np.array([first[seed] for seed in sorted(first)])
