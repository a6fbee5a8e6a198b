"""The words of a grid: `lr=0.01,0.1`."""

from __future__ import annotations

import shlex

from .rundir import RunError


def split(word: str) -> tuple[str, list[list[str]]]:
    """A field and its values, each in words; those of one value are quoted as in a shell.

    >>> split("norms=none batch,none layer")
    ('norms', [['none', 'batch'], ['none', 'layer']])

    Raises:
      RunError: For what is no FIELD=VALUE,VALUE,….
    """
    field, equals, text = word.partition("=")
    try:
        texts = [shlex.split(part) for part in text.split(",")]
    except ValueError as error:  # a quotation mark that is not closed
        raise RunError(f"--sweep {word}: {error}.") from None
    if not equals or not field or not all(texts):
        raise RunError(
            f"--sweep: got {word!r}; it must be FIELD=VALUE,VALUE,…, as in lr=0.01,0.1. Names of "
            "questions stand before it."
        )
    return field.removeprefix("--").replace("-", "_"), texts
