"""The one form of an error: where, what was given, what was expected, and what to change.

Norms, populations and experiments of your own may say no in the same form.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def invalid(where: str, given: str, expected: str, change: str) -> ValueError:
    """Returns the one form of error this library raises for a bad value."""
    return ValueError(f"{where}: got {given}; expected {expected}. To fix it, {change}.")


def nearest(word: object, known: Iterable[str]) -> str:
    """Returns `did you mean 'x'? Known: ...` for a word that is not among `known`."""
    known = [name or repr(name) for name in known]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(known) or 'none'}"
