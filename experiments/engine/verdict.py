"""Verdicts: what a claim comes to, by its effect in each seed and on each test image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats

Decision = Literal["holds", "fails", "undecided"]

Kind = Literal["identity", "literature", "ours"]
"""Exact or up to rounding; of a source; of ours."""

CONFIDENCE = 0.95
"""Of every interval."""


class Source(NamedTuple):
    """What says a claim.

    Attributes:
      key: Of the entry in `experiments/questions/sources.bib`.
      where: The section, figure, table or theorem; empty if it is not known.
      number: The source's own number for the effect, with its unit; empty if it has none.
      read: Whether its text was read, its abstract alone, or neither: quoted second-hand.
    """

    key: str
    where: str = ""
    number: str = ""
    read: Literal["read", "abstract", "second-hand"] = "read"


class Bounds(NamedTuple):
    """What a claim is judged by, as it is written down: digits, or nothing.

    Attributes:
      at_least, at_most, size: As in `Verdict`.
    """

    at_least: str
    at_most: str
    size: str

    def __str__(self) -> str:
        """In words."""
        return ", ".join(f"{k} {v}" for k, v in self._asdict().items() if v) or "no bound"


class Interval(NamedTuple):
    """What is known of an effect.

    Attributes:
      effect: The mean over the seeds.
      low, high: Its confidence interval.
      error: Its standard error, of the logarithm for a factor; NaN where there is none.
      freedom: The degrees of freedom of Student's t.
      error_images: The part of `error` that the choice of the test images makes; 0 where the effect
        is not measured on images.
    """

    effect: float
    low: float
    high: float
    error: float = math.nan
    freedom: float = math.nan
    error_images: float = 0.0


class Verdict(NamedTuple):
    """What became of a claim.

    Attributes:
      id: Names the claim for good, `sd0.1.gain`; in an answer after the question, with a dot.
      claim: In words.
      kind: Whose it is.
      decision: On the direction: `holds` if the whole interval is between `at_least` and `at_most`,
        `fails` if none of it is, else `undecided`.
      effect, low, high: The mean over seeds, and its confidence interval.
      p: Of the decision: twice the smaller of the p-values against "it is not so" and "it is so".
      at_least, at_most: The bounds of the direction.
      size: How large an effect was asked for beside its direction; `None` if that was not asked.
      sized: Whether it is: as `decision`.
      unit: Of the effect.
      seeds: How many there were.
      images: Whether the interval counts the choice of the test images beside that of the seeds.
      scale: Whether mean and interval are those of the effect, of its logarithm ("geometric"), or
        of a share of the seeds.
      untuned: Whether what is compared has one learning rate, which nobody chose for it.
      source: Who says so, if not we.
      error, freedom, error_images: As in `Interval`.
      effects: That of each seed.
    """

    id: str
    claim: str
    kind: Kind
    decision: Decision
    effect: float
    low: float
    high: float
    p: float
    at_least: float
    at_most: float
    size: float | None
    sized: Decision | None
    unit: str
    seeds: int
    images: bool
    scale: Literal["linear", "geometric", "share"]
    untuned: bool
    source: Source | None
    error: float
    freedom: float
    error_images: float
    effects: tuple[float, ...]


def decide(
    id: str,
    claim: str,
    effects: Iterable[float] | np.ndarray,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    size: float | None = None,
    unit: str = "",
    geometric: bool = False,
    exact: bool = False,
    untuned: bool = False,
    source: Source | None = None,
) -> Verdict:
    """Decides a claim by the effect in each seed.

    The bounds say in which direction the effect is to be, `at_least=0` of a difference and
    `at_least=1` of a factor; `size` how large it was said to be. Both bounds together ask for
    equivalence: two one-sided tests. One seed, or an effect that is not finite, has no interval:
    the claim is undecided. With `geometric`, for effects of any order of magnitude, none of them
    negative, mean and interval are those of the logarithm. A zero has none: it counts as the
    smallest effect that is not zero, but leaves a claim undecided that the effect is at least
    something.

    Args:
      id: Names the claim for good among those of its question: lower-case words, with dots.
      claim: In words.
      effects: `[seeds]`; or as `Records.accuracy` has it, `[seeds, 1 + B]`: on the test images, and
        on B draws of as many of them with replacement.
      at_least: The lower bound.
      at_most: The upper bound.
      size: How large the effect is to be beside its direction, on the side of the bound.
      unit: Of the effect.
      geometric: Whether mean and interval are those of the logarithm.
      exact: Whether it is an identity, which holds exactly or up to rounding.
      untuned: Whether learning rates were not chosen for what is compared.
      source: Who says so, if not we.

    >>> decide("small", "it is small", [0.1, 0.12, 0.11], at_most=0.5).decision
    'holds'
    """
    values = np.asarray(effects if isinstance(effects, np.ndarray) else list(effects), float)
    plain = values[:, 0] if values.ndim == 2 else values
    if geometric:
        positive = values[values > 0]
        least = positive.min() if positive.size else np.finfo(float).tiny
        if at_least > 0:  # its logarithm is -inf
            least = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log(np.where(values == 0, least, values))
    found = interval(values)
    p = _p(found, *(_log(v) if geometric else v for v in (at_least, at_most)))
    if geometric:
        with np.errstate(over="ignore"):
            effect, low, high = (float(np.exp(v)) for v in found[:3])
        found = found._replace(effect=effect, low=low, high=high)
    sided = size is not None and (size, math.inf)
    if sided and at_least == -math.inf:
        sided = (-math.inf, sided[0])
    return Verdict(
        id=id,
        claim=claim,
        kind="identity" if exact else "literature" if source else "ours",
        decision=_decision(found, at_least, at_most),
        effect=found.effect,
        low=found.low,
        high=found.high,
        p=p,
        at_least=at_least,
        at_most=at_most,
        size=size,
        sized=_decision(found, *sided) if sided else None,
        unit=unit,
        seeds=len(values),
        images=values.ndim == 2 and values.shape[1] > 1,
        scale="geometric" if geometric else "linear",
        untuned=untuned,
        source=source,
        error=found.error,
        freedom=found.freedom,
        error_images=found.error_images,
        effects=tuple(map(float, plain)),
    )


def decide_share(
    id: str,
    claim: str,
    outcomes: Sequence[bool] | np.ndarray,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    **options: Any,
) -> Verdict:
    """Decides a claim on the share of the seeds of which something is true.

    For outcomes of two kinds, such as nets that learn and nets that do not, of which no mean is
    typical. The interval is that of Clopper and Pearson.

    Args:
      id: As in `decide`.
      claim: As in `decide`.
      outcomes: Whether it is true, of each seed.
      at_least: The lower bound of the share.
      at_most: The upper bound of the share.
      **options: `exact`, `untuned` and `source` of `decide`.

    >>> decide_share("learns", "most learn", [True] * 10, at_least=0.5).decision
    'holds'
    """
    found = decide(id, claim, np.asarray(outcomes, float), at_least=at_least, at_most=at_most)
    n, k = len(found.effects), int(sum(found.effects))
    test = scipy.stats.binomtest
    ends = test(k, n).proportion_ci(CONFIDENCE)
    known = Interval(k / n, float(ends.low), float(ends.high))
    against = [
        *([test(k, n, at_least, alternative="greater").pvalue] if at_least > 0 else []),
        *([test(k, n, at_most, alternative="less").pvalue] if at_most < 1 else []),
    ]
    for_it = [
        *([test(k, n, at_least, alternative="less").pvalue] if at_least > 0 else []),
        *([test(k, n, at_most, alternative="greater").pvalue] if at_most < 1 else []),
    ]
    p = min(1.0, 2 * min(max(against, default=1.0), min(for_it, default=1.0)))
    return found._replace(
        decision=_decision(known, at_least, at_most),
        effect=known.effect,
        low=known.low,
        high=known.high,
        p=float(p),
        scale="share",
        unit="of the seeds",
        error=math.nan,
        freedom=math.nan,
        kind="identity"
        if options.get("exact")
        else "literature"
        if options.get("source")
        else "ours",
        untuned=options.get("untuned", False),
        source=options.get("source"),
    )


def bounds(verdict: Verdict) -> Bounds:
    """What a claim is judged by, as it is written down."""
    found = (verdict.at_least, verdict.at_most, verdict.size)
    return Bounds(*("" if v is None or math.isinf(v) else f"{v:.12g}" for v in found))


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean, and its interval of Student's t: the whole line for one value or a NaN.

    Of `[seeds, 1 + B]` the variances of seeds and of test images are added, with Satterthwaite's
    degrees of freedom. That of the images is what all seeds have in common over the draws: what
    one seed makes of an image is in the spread of the seeds already.
    """
    values = np.asarray(values, float)
    draws = values[:, 1:] if values.ndim == 2 else np.empty((len(values), 0))
    values = values[:, 0] if values.ndim == 2 else values
    if not values.size:
        return Interval(math.nan, -math.inf, math.inf)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows has no interval
        mean = float(values.mean())
        seeds = float(values.var(ddof=1)) / values.size if np.ptp(values) else 0.0
    finite = np.isfinite(values).all() and np.isfinite(draws).all() and math.isfinite(seeds)
    if values.size < 2 or not finite:
        return Interval(mean, -math.inf, math.inf)
    images = 0.0
    if draws.size:  # S·Var(mean) − mean(Var), by draws, is (S − 1) times what they share
        shared = values.size * draws.mean(axis=0).var(ddof=1) - draws.var(axis=1, ddof=1).mean()
        images = max(0.0, float(shared) / (values.size - 1))
    total = seeds + images
    if not total:  # Student's t has no interval where all seeds agree
        return Interval(mean, mean, mean, 0.0, math.inf)
    ratio = total / seeds if seeds > 0 else math.inf
    freedom = (values.size - 1) * ratio * ratio
    error = math.sqrt(total)
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Interval(mean, mean - half, mean + half, error, freedom, math.sqrt(images))


def adjusted(p: Sequence[float], method: Literal["holm", "fdr_bh"]) -> list[float]:
    """The p-values of a family adjusted for their number, by Holm or by Benjamini and Hochberg.

    >>> adjusted([0.01, 0.04], "holm")
    [0.02, 0.04]
    """
    from statsmodels.stats.multitest import multipletests  # seconds to import

    values = np.asarray(p, float)
    known = np.isfinite(values)
    found = np.full(values.shape, math.nan)
    if known.any():
        found[known] = multipletests(values[known], method=method)[1]
    return found.tolist()


def _decision(found: Interval, at_least: float, at_most: float) -> Decision:
    if at_least <= found.low and found.high <= at_most:
        return "holds"
    return "fails" if found.high < at_least or found.low > at_most else "undecided"


def _p(found: Interval, at_least: float, at_most: float) -> float:
    """The p-value of a decision; NaN without an interval."""
    if not math.isfinite(found.error):
        return math.nan
    if not found.error:
        return 0.0
    t = scipy.stats.t(found.freedom)
    # How far inside each bound the effect is, in standard errors.
    above, below = (found.effect - at_least) / found.error, (at_most - found.effect) / found.error
    against = max(t.sf(above), t.sf(below))
    return float(min(1.0, 2 * min(against, t.cdf(above), t.cdf(below))))


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf
