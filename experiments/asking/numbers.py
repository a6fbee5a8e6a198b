"""What a verdict says in numbers, as they are set in print."""

from __future__ import annotations

import math

from ..engine.verdict import Verdict

SYMBOLS = {"holds": "✓", "fails": "✗", "undecided": "?", "missing": "∅"}
"""Of each verdict: none is told by its colour alone."""

_EXPONENTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Three digits, as they are set in print: `1.5 × 10⁻⁸`, `−∞`."""
    if math.isnan(value):
        return "not finite"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    digits, _, exponent = text.partition("e")
    if exponent:
        digits += f" × 10{str(int(exponent)).translate(_EXPONENTS)}"
    return digits.replace("-", "−")


def estimate(verdict: Verdict) -> tuple[str, str]:
    """The effect, and its interval to two digits of its half width."""
    ends = [verdict.effect, verdict.low, verdict.high]
    half = (verdict.high - verdict.low) / 2
    if not math.isfinite(half):  # one seed, or one that is not finite
        return number(verdict.effect), "no interval"
    places = 1 - math.floor(math.log10(half)) if half else -1
    if 0 <= places <= 4 and max(map(abs, ends)) < 1000:
        effect, low, high = (f"{v:.{places}f}".replace("-", "−") for v in ends)
    else:
        effect, low, high = map(number, ends)
    return effect, f"[{low}, {high}]"


def threshold(verdict: Verdict) -> str:
    """In which range the effect was to be."""
    low, high = verdict.at_least, verdict.at_most
    if math.isfinite(low) and math.isfinite(high):
        if number(low) == number(high) and low < high:
            return f"{number((low + high) / 2)} ± {number((high - low) / 2)}"
        return f"{number(low)} to {number(high)}"
    if math.isfinite(low):
        return f"≥ {number(low)}"
    return f"≤ {number(high)}" if math.isfinite(high) else "none"


def asked_size(verdict: Verdict) -> str:
    """How large the effect was to be beside its direction."""
    assert verdict.size is not None
    return f"{'≥' if math.isfinite(verdict.at_least) else '≤'} {number(verdict.size)}"


def p_value(p: float) -> str:
    """A p-value to two digits; a dash where there is none.

    >>> [p_value(p) for p in (0.0004, 0.0312, 0.5, math.nan)]
    ['< 0.001', '0.031', '0.50', '–']
    """
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float) -> str:
    """Seconds, with minutes or hours where there are some."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
