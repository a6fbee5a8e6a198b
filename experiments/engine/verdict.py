"""Verdicts: what a claim comes to, by its effect in each seed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.stats

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
