"""Which changes of the weights and the data does each norm not notice?

Claim: Batch, weight and layer normalization are invariant to different changes, as the table says;
so are the other norms of the library. What is not declared does change the output.

Source: Ba, Kiros & Hinton 2016, table 1 (batch, weight and layer norm, the first six columns),
https://arxiv.org/abs/1607.06450; the other rows are ours, by algebra, among them those of the
cosine norms of Luo et al. 2017, https://arxiv.org/abs/1702.05870

Protocol: Random data and weights in float64 with ε = 1e-30 for the paper's 0: 8 examples, 5
inputs, 6 units, two groups of three, since of two the output is ±1 (instance norm: a 3×3
convolution without padding of 6×6 images). Rescaling is by 2.7; recentring adds one random vector
to the weights of every unit, or to every example. Adding a constant to all weights of a unit, or to
all inputs of an example, is a column of its own. Measured: the largest change of the output.

Command: normlab run invariances
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Record, Records, Source, Verdict, decide, draw, exact
from ..numerics.invariances import COLUMNS, changed
from ..numerics.invariances import NORMS as NORMED

NORMS = ("none", *NORMED)

SAME, OTHER = 1e-8, 1e-3
"""The output changes by at most so much if it is invariant, and by at least so much if not."""

CONSTANTS = ("constant to a unit's weights", "constant to an example")
"""The columns that table 1 does not have."""

TABLE = ("batch", "weight", "layer")
"""The rows that table 1 has."""

SOURCE = Source("ba2016", "table 1")

CENTRED = {
    CONSTANTS[0]: ("weight_standardization", "centred_cosine"),
    CONSTANTS[1]: ("weight_standardization", "centred_cosine", "instance"),
}
"""The norms that do not notice them, as their formulas say: the first two subtract w̄ from w; for
instance norm a constant of an example is one of each unit at all its positions."""


@dataclasses.dataclass(frozen=True)
class Invariances(Config):
    """The config.

    Attributes:
      norms: The rows.
    """

    dataset: str = ""
    norms: tuple[str, ...] = NORMS


QUICK = Invariances()
SECONDS = 4
FULL = Invariances(seeds=20)


def run(config: Invariances) -> Iterator[Condition]:
    """Each norm."""
    for name in config.norms:
        yield Condition({"norm": name}, exact(changes, config, name))


def changes(config: Invariances, name: str) -> Iterator[Record]:
    """How far the output moves under each change, and whether it should."""
    linear = nl.Conv(padding="VALID") if name == "instance" else nl.Dense()
    options: dict[str, Any] = {"groups": 2} if name == "group" else {}
    if "a" in nl.row(name).needs:
        options["eps"] = 1e-30
    norm = nl.get(name, **options)

    @jax.jit
    def output(x: Array, w: Array) -> Array:
        site = nl.Site(linear(x, w), x, w, linear=linear)
        params, state = norm.init(site)
        return norm.apply(params, state, site, train=True)[0]

    with jax.enable_x64(True):
        for seed in config.each_seed:
            rng = np.random.default_rng(seed)
            x = rng.normal(size=(8, 6, 6, 5) if name == "instance" else (8, 5))
            w = rng.normal(size=(3, 3, 5, 6) if name == "instance" else (5, 6))
            before = np.asarray(output(jnp.asarray(x), jnp.asarray(w)))
            for column in (*COLUMNS, *CONSTANTS):
                after = np.asarray(output(*map(jnp.asarray, moved(column, x, w, seed))))
                yield {
                    "kind": "change",
                    "seed": seed,
                    "change": column,
                    "invariant": invariant(name, column),
                    "moved": float(np.abs(after - before).max()),
                }


def moved(column: str, x: np.ndarray, w: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`(x, w)` after a change."""
    rng = np.random.default_rng(1000 + seed)
    if column == CONSTANTS[0]:
        return x, w + rng.normal(size=w.shape[-1])
    if column == CONSTANTS[1]:
        return x + rng.normal(size=(len(x), *[1] * (x.ndim - 1))), w
    return changed(column, x, w, 1000 + seed)


def invariant(name: str, column: str) -> bool:
    """Whether the norm's output stays, as declared."""
    return column in nl.row(name).invariances or name in CENTRED.get(column, ())


def verdict(records: Records) -> Iterator[Verdict]:
    """The rows of table 1, then all else: the largest change not noticed, the smallest noticed."""

    def of_table(record: Record) -> bool:
        return record["norm"] in TABLE and record["change"] not in CONSTANTS

    rows = {name: records.where(of_table, norm=name) for name in TABLE}
    rows["others"] = records.where(lambda r: not of_table(r))
    for name, mine in rows.items():
        said = "all other norms and changes" if name == "others" else f"{name} norm"
        how = {"exact": True, "source": None if name == "others" else SOURCE}
        still, moving = (mine.where(invariant=blind) for blind in (True, False))
        if still:
            claim = f"{said}: blind to {len(pairs(still))} changes, as declared (largest effect)"
            found = still.by_seed("moved", of=max)
            yield decide(f"{name}.blind", claim, found, at_most=SAME, **how)
        if moving:
            claim = f"{said}: {len(pairs(moving))} other changes are seen (smallest effect)"
            found = moving.by_seed("moved", of=min)
            yield decide(f"{name}.sees", claim, found, at_least=OTHER, geometric=True, **how)


def pairs(records: Records) -> list[tuple[str, str]]:
    """The cells of the table that these records are of."""
    return records.values("norm", "change")


def figure(records: Records) -> Figure:
    """The table: the change of the output, its worst seed; grey where it is invariant."""
    norms, columns = records.values("norm"), records.values("change")
    picture, (axes,) = draw.canvas(width=9, height=4.6)
    axes.grid(False)
    for y, name in enumerate(norms):
        for x, column in enumerate(columns):
            mine = records.where(norm=name, change=column)
            still = mine[0]["invariant"]
            value = (max if still else min)(r["moved"] for r in mine)
            if still:
                axes.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, color="#CCCCCC", lw=0)
            axes.text(x, y, f"{value:.0e}" if value else "0", ha="center", va="center")
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="right")
    axes.set_yticks(range(len(norms)), norms)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(norms) - 0.5, -0.5))
    axes.set_title("Change of the output; grey: declared invariant (the worst of all seeds)")
    return picture
