"""What each norm of the registry does to one batch: a picture.

    normlab family --out docs/family.png

Four examples (colours) of 40 positions, drawn from correlated Gaussians that differ in mean and in
spread; of eight channels two are shown, the first across. A panel has the same scale on both axes;
its limit stands in the corner. Params are the initial ones, statistics those of the batch.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..figures import encode
from .config import Family

REQUIRED = {"groups": 2, "steps": 2}
"""The options that have no default."""

_COLUMNS = 8
_SMALL: dict[str, Any] = {"fontsize": 6, "bbox": {"color": "white", "pad": 0.5}}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def batch(seed: int = 0) -> nl.Site:
    """The batch: `a` `[4, 40, 8]` behind a dense layer."""
    rng = np.random.default_rng(seed)
    spread = np.array([0.4, 1.0, 1.6, 2.2])[:, None, None]
    centre = rng.normal(size=(4, 1, 5)) * 2 + 1
    x = jnp.asarray(centre + spread * rng.normal(size=(4, 40, 5)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    return nl.Site(x @ w, x, w)


def required(name: str) -> dict[str, Any]:
    """The options that the norm of this name must be given, for eight channels."""
    known = inspect.signature(nl.row(name).factory).parameters
    few = {"groups": 2} if getattr(known.get("groups"), "default", None) == 32 else {}
    few |= {"channel_window": 3} if name == "local" else {}
    return few | {n: REQUIRED[n] for n, p in known.items() if p.default is p.empty}


def picture(norms: tuple[str, ...]) -> Figure:
    """A panel for the batch, and one for what each norm makes of it."""
    site, shown = batch(), {"a": np.asarray(batch().a)}
    for name in norms:
        norm = nl.get(name, **required(name))
        params, state = norm.init(site)
        shown[name] = np.asarray(norm.apply(params, state, site, train=True)[0])
    rows = -(-len(shown) // _COLUMNS)
    figure, grid = plt.subplots(
        rows, _COLUMNS, figsize=(1.5 * _COLUMNS, 1.7 * rows), layout="constrained", squeeze=False
    )
    for axes, (name, h) in zip(grid.flat, shown.items(), strict=False):
        for example, colour in zip(h, _COLOURS, strict=True):
            axes.scatter(example[:, 0], example[:, 1], s=3, color=colour, lw=0)
        limit = 1.1 * np.abs(h[..., :2]).max()
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        axes.axhline(0, color="grey", lw=0.4)
        axes.axvline(0, color="grey", lw=0.4)
        axes.text(0.97, 0.03, f"±{limit:.2g}", transform=axes.transAxes, ha="right", **_SMALL)
        axes.set_title(name.replace("_", " "), fontsize=7)
    for axes in list(grid.flat)[len(shown) :]:
        axes.axis("off")
    return figure


def draw(config: Family) -> None:
    """Writes the picture."""
    figure = picture(config.norms or nl.names())
    config.out.write_bytes(encode(figure, config.out.suffix.removeprefix(".")))
