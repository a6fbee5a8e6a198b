"""The claims of a report and their effects as tables, for other programs: CSV and Parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..rundir import number
from .section import Section, families

CLAIMS = {
    **dict.fromkeys(("id", "question", "claim", "kind", "decision"), "string"),
    **dict.fromkeys(("effect", "low", "high"), "float64"),
    **dict.fromkeys(("unit", "scale"), "string"),
    **dict.fromkeys(("at_least", "at_most", "size"), "float64"),
    "sized": "string",
    **dict.fromkeys(("p", "p_holm", "p_bh", "error", "error_images", "freedom"), "float64"),
    "seeds": "Int64",
    **dict.fromkeys(("images", "untuned"), "boolean"),
    **dict.fromkeys(("source", "where", "number", "read", "locked", "profile", "run"), "string"),
}
"""The columns of the claims and their types, which have room for what is missing."""

EFFECTS = {"question": "string", "id": "string", "seed": "Int64", "effect": "float64"}
"""Those of the effects."""


def claims(sections: Sequence[Section]) -> pd.DataFrame:
    """A line for each claim; what each column is stands in docs/reference/results.md."""
    family = families(sections)
    lines = []
    for section in sections:
        for row in section.rows:
            v, adjusted = row.verdict, family.get(row.verdict.id)
            lines.append(
                {
                    "id": v.id,
                    "question": section.name,
                    "claim": v.claim,
                    "kind": v.kind,
                    "decision": v.decision,
                    "effect": number(v.effect),
                    "low": number(v.low),
                    "high": number(v.high),
                    "unit": v.unit,
                    "scale": v.scale,
                    "at_least": number(v.at_least),
                    "at_most": number(v.at_most),
                    "size": v.size,
                    "sized": v.sized,
                    "p": number(v.p),
                    "p_holm": adjusted and number(adjusted.holm),
                    "p_bh": adjusted and number(adjusted.bh),
                    "error": number(v.error),
                    "error_images": number(v.error_images),
                    "freedom": number(v.freedom),
                    "seeds": v.seeds,
                    "images": v.images,
                    "untuned": v.untuned,
                    "source": v.source and v.source.key,
                    "where": v.source and v.source.where,
                    "number": v.source and v.source.number,
                    "read": v.source and v.source.read,
                    "locked": row.locked,
                    "profile": section.profile,
                    "run": section.run,
                }
            )
    return _frame(lines, CLAIMS)


def effects(sections: Sequence[Section]) -> pd.DataFrame:
    """A line for each claim and seed."""
    lines = [
        {"question": s.name, "id": row.verdict.id, "seed": seed, "effect": number(effect)}
        for s in sections
        for row in s.rows
        for seed, effect in zip(row.seeds, row.verdict.effects, strict=True)
    ]
    return _frame(lines, EFFECTS)


def files(sections: Sequence[Section]) -> dict[str, bytes]:
    """Both tables, each as CSV and as Parquet, by the ends of their files' names."""
    found = {}
    for name, frame in (("claims", claims(sections)), ("effects", effects(sections))):
        found[f"{name}.csv"] = frame.to_csv(index=False, lineterminator="\n").encode()
        parquet = io.BytesIO()
        frame.to_parquet(parquet, index=False)
        found[f"{name}.parquet"] = parquet.getvalue()
    return found


def _frame(lines: list[dict[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame(lines, columns=[*columns]).astype(dict(columns))
