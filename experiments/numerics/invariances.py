"""Under which changes each norm's output stays the same, and the spread at which ε breaks that.

    normlab invariances              # half a minute
    normlab invariances --markdown   # the table of docs/numerics.md

A row per norm and declared invariance of scale: the relative change of the output (float64) when
the weights, one unit, the data or one case is rescaled, for pre-activations whose standard
deviation is 1e-2 … 1e-20. ε keeps a norm from dividing by a spread below √ε: there it scales by
1/√ε and no longer normalizes. The last column is the largest spread at which the output moves by
more than a thousandth.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import normlab as nl

from .config import Invariances

NORMS = (
    "batch",
    "layer",
    "rms",
    "group",
    "instance",
    "weight",
    "weight_standardization",
    "cosine",
    "centred_cosine",
)
COLUMNS = nl.INVARIANCES[:6]
"""The changes of weights and data: the others are none of a dense layer."""
SPREADS = tuple(10.0**-k for k in range(2, 21, 2))
BROKEN = 1e-3
_FACTOR = 2.7


HEADINGS = ("norm", "what changes", *(f"{spread:.0e}" for spread in SPREADS), "breaks at")


def changed(column: str, x: np.ndarray, w: np.ndarray, seed: int = 20) -> tuple:
    """`(x, w)` after the change that a column of `nl.INVARIANCES` names."""
    rng, c = np.random.default_rng(seed), _FACTOR
    return {
        "weights rescaled": lambda: (x, c * w),
        "weights recentred": lambda: (x, w + rng.normal(size=(*w.shape[:-1], 1))),
        "one unit rescaled": lambda: (x, np.concatenate([c * w[..., :1], w[..., 1:]], -1)),
        "data rescaled": lambda: (c * x, w),
        "data recentred": lambda: (x + rng.normal(size=x.shape[-1]), w),
        "one case rescaled": lambda: (np.concatenate([c * x[:1], x[1:]]), w),
    }[column]()


def rows(config: Invariances) -> Iterator[dict[str, Any]]:
    """What was measured, of each norm and declared invariance of scale.

    `moves` is the relative change of the output at each spread, `breaks_at` the largest spread at
    which it is more than a thousandth, or null.
    """
    with jax.enable_x64(True):
        for name in NORMS:
            for column in COLUMNS:
                if "rescaled" in column and column in nl.row(name).invariances:
                    moves = {f"{s:.0e}": change(name, column, s, config.eps) for s in SPREADS}
                    ends = breaks_at(name, column, config.eps)
                    yield {"norm": name, "change": column, "moves": moves, "breaks_at": ends}


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    moves = (f"{move:.0e}" for move in row["moves"].values())
    ends = row["breaks_at"]
    return row["norm"], row["change"], *moves, "never" if ends is None else f"{ends:.0e}"


def breaks_at(name: str, column: str, eps: float) -> float | None:
    """The largest spread, to half a decade, at which the output moves by a thousandth."""
    for halves in range(41):
        spread = 10 ** (-halves / 2)
        if change(name, column, spread, eps) > BROKEN:
            return spread
    return None


def change(name: str, column: str, spread: float, eps: float) -> float:
    """How far the output moves, relative to its largest value, for pre-activations this small."""
    rng = np.random.default_rng(0)
    linear = nl.Conv(padding="VALID") if name == "instance" else nl.Dense()
    x = rng.normal(size=(8, 6, 6, 5) if name == "instance" else (8, 5))
    w = rng.normal(size=(3, 3, 5, 4) if name == "instance" else (5, 4))
    # One factor, split between the two, so that neither is what makes the difference.
    small = np.sqrt(spread / float(np.std(linear(jnp.asarray(x), jnp.asarray(w)))))
    options: dict[str, Any] = {"groups": 2} if name == "group" else {}
    if "a" in nl.row(name).needs:
        options["eps"] = eps
    norm = nl.get(name, **options)

    def output(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        x, w = small * x, small * w
        site = nl.Site(linear(jnp.asarray(x), jnp.asarray(w)), jnp.asarray(x), jnp.asarray(w))
        site = site._replace(linear=linear)
        params, state = norm.init(site)
        return np.asarray(norm.apply(params, state, site, train=True)[0])

    before, after = output(x, w), output(*changed(column, x, w))
    return float(np.abs(after - before).max() / np.abs(before).max())
