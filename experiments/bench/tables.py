"""The tables of `bench ops`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from .ops import Ops
from .worker import BOTH, COMMANDS, COPIES, DIRECTIONS, FORWARD

ONE_PASS = escape("E[x²] − E[x]²")
Cases = Sequence[dict[str, Any]]

RATIOS = (
    ("safe\nfwd", lambda r: r[f"fastest safe, {FORWARD}"]["ratio"]),
    ("safe\nboth", lambda r: r[f"fastest safe, {BOTH}"]["ratio"]),
    ("flax\nboth", lambda r: r[f"flax.linen, {BOTH}"]),
    ("torch\nfwd", lambda r: r[f"torch, {FORWARD}"]),
    ("torch\nboth", lambda r: r[f"torch, {BOTH}"]),
)


def times(cases: Cases, machine: str) -> Table:
    """The medians, a section per case that starts with the floor."""
    headings = ("fwd\nms", "×\nfloor", "both\nms", "×\nfloor", "temp\n/ x")
    result = _table(f"medians on {machine}", headings)
    for case in cases:
        copy = case["floor"]["jax"]
        floors = [COPIES[direction] * copy["median_ms"] for direction in DIRECTIONS]
        result.add_row(
            f"[bold]{case['label']}[/]", f"{floors[0]:.3f}", "1.00", f"{floors[1]:.3f}", "1.00", ""
        )
        for row in case["contestants"]:
            name = f"  {row['name']}{'' if row.get('safe', True) else ' *'}"
            if row["reason"]:
                result.add_row(name, *["–"] * 5)
                continue
            cells = []
            for direction in DIRECTIONS:
                values = row["turns"][direction]
                cells += [f"{values['median_ms']:.3f}", f"{values['floors']:.2f}"]
            temp = row["temp_per_x"]
            result.add_row(name, *cells, "–" if temp is None else f"{temp:.2f}")
        result.add_section()
    speeds = {
        family: [c["floor"][family]["gb_per_s"] for c in cases] for family in cases[0]["floor"]
    }
    rates = ", ".join(f"{name} {statistics.median(v):.1f} GB/s" for name, v in speeds.items())
    result.caption = (
        f"both: forward and backward. * {ONE_PASS}: loses digits to a large mean. Beside each case "
        f"its floor: 1 copy of x forward, 2.5 for both; the median copy ran at {rates}. temp: peak "
        "temporary memory of both."
    )
    return result


def comparison(cases: Cases) -> Table:
    """Time of normlab over that of the peers, and the temporary memory of both."""
    headings = [heading for heading, _ in RATIOS] + ["temp / x\nof each"]
    result = _table("normlab / peer (below 1: normlab is faster)", headings)
    cases = [case for case in cases if case["ratios"]]
    for case in cases:
        temps = {row["name"]: row.get("temp_per_x") for row in case["contestants"]}
        pair = (_ratio(temps.get(name)) for name in ("normlab", "flax.linen"))
        ratios = (_ratio(pick(case["ratios"])) for _, pick in RATIOS)
        result.add_row(case["label"], *ratios, ":".join(pair))
    result.add_section()
    columns = [[r for case in cases if (r := pick(case["ratios"]))] for _, pick in RATIOS]
    result.add_row(
        "geometric mean",
        *(_ratio(statistics.geometric_mean(c) if c else None) for c in columns),
        "",
    )
    result.add_row("worst", *(_ratio(max(c, default=None)) for c in columns), "")
    faster = (f"{sum(r <= 1 for r in c)}/{len(c)}" if c else "–" for c in columns)
    result.add_row("at most 1", *faster, "")
    result.caption = (
        f"safe: the fastest JAX peer whose variance is not {ONE_PASS}. flax: flax.linen's default. "
        "temp: normlab's and that one's."
    )
    return result


def remarks(ops: Ops) -> list[str]:
    """What the tables do not show: who is missing, who failed, how libraries were asked."""
    said, cases, absent = [], ops.results, ops.absent
    cores = ops.environment["jax"]["cores"]
    before, after = (ops.environment.get(key) or 0 for key in ("load_before", "load_after"))
    if before > cores / 2 or after > 1.5 * cores + 1:  # at most a load of `cores` is our own
        said.append(
            f"the machine was busy with other things (load {before:.1f} before, {after:.1f} after, "
            f"on {cores} cores): times mean little, above all torch's, whose threads wait for each "
            "other by spinning"
        )
    missing = [peer for peer, reason in absent.items() if reason == "not installed"]
    said += not_installed(missing)
    said += [f"{peer} left out: {reason}" for peer, reason in absent.items() if peer not in missing]
    reasons: dict[tuple[str, str], list[str]] = {}
    notes: dict[tuple[str, str, str], None] = {}
    for case in cases:
        for row in case["contestants"]:
            if row["reason"]:
                reasons.setdefault((row["name"], row["reason"]), []).append(case["label"])
            elif row["note"]:
                notes[row["name"], case["op"], row["note"]] = None
    for (name, reason), labels in reasons.items():
        said.append(f"{name} left out of {'; '.join(labels)}: {reason}")
    said += [f"{name}, {op}: {note}" for name, op, note in notes]
    return said


def not_installed(peers: Iterable[str]) -> list[str]:
    """Which peers are left out, and the command that installs them, a line for each command."""
    by_command: dict[str, list[str]] = {}
    for peer in peers:
        by_command.setdefault(COMMANDS[peer], []).append(peer)
    return [
        f"not installed, and left out: {', '.join(names)}. To add them: {command}"
        for command, names in by_command.items()
    ]


def _table(title: str, headings: Sequence[str]) -> Table:
    result = Table(title=title, show_edge=False, pad_edge=False)
    result.add_column("", no_wrap=True)
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    return result


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
