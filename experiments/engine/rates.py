"""The largest learning rate at which a net is stable, of each seed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import normlab as nl

from ..rundir import Record, number
from ..training.driver import Checkpoint
from .learn import Lane, Nets, held_out, lanes, learn
from .question import Config, Measure


def largest_stable(
    config: Config,
    norm: nl.Norm,
    rates: Sequence[float],
    stable: Callable[[Record], bool],
    *,
    fine: float = 1.15,
    **options: Any,
) -> Measure:
    """Searches the largest stable learning rate of each seed.

    All seeds are trained at all `rates`; then each seed at the geometric mean of its largest stable
    rate and the next that is not, until these two are `fine` apart. What is measured on images is
    measured on training images that are held out for it, as in `tuned`: the test set is not read.

    The records are of `kind` "trial", one for each net, as an evaluation's, with whether it was
    `stable`; and at the end one of `kind` "largest" for each seed: `low`, the largest rate found
    stable, `high`, the smallest above it found not to be, `lr`, their geometric mean, and `edge`.
    That is "highest" if the highest of `rates` is stable: `lr` is that rate, a lower bound. It is
    "lowest" if none of them is: `lr` is null.

    Args:
      config: What to train, and for how long.
      norm: The norm.
      rates: The grid, with any factors between neighbours.
      stable: Whether a net is, by its record at the end: by its `train_loss`, the mean over the
        last of `config.evaluations` parts of training, or on held-out images by `test_loss` or
        `accuracy`; `diverged` is a step or null.
      fine: The factor up to which the rate is found, at most.
      **options: Of `learn`, but `side_by_side`.
    """
    prepare = options.pop("prepare", lambda data: data)
    seeds = list(config.each_seed)

    def run(resume: Checkpoint | None) -> Iterator[Record | Checkpoint]:
        first = learn(config, norm, side_by_side=lanes(config, lr=rates), **options)
        data = held_out(prepare(first.data))

        @functools.cache
        def compiled(count: int) -> Nets:
            nets = Nets(config, norm, data, first.rows, count=count, **first.options)
            return nets.compile()

        turn, low, high, inside = 0, np.zeros(len(seeds)), np.full(len(seeds), math.inf), None
        if resume is not None:
            turn, low, high = int(resume.leaves[0]), *map(np.array, resume.leaves[1:3])
            inside = resume._replace(leaves=resume.leaves[3:]) if resume.leaves[3:] else None
        while rows := between(seeds, low, high, fine) if turn else first.rows:
            trials = []
            nets = compiled(len(seeds) if turn else len(rows))
            trained = dataclasses.replace(first, rows=rows)
            for found in trained.among(nets, data, inside):
                if not isinstance(found, Checkpoint):
                    trials.append(found)
                elif found.step < config.steps:
                    yield found._replace(leaves=[np.int64(turn), low, high, *found.leaves])
            ends = [r for r in trials if r["step"] == config.steps]
            tried = [{**r, "kind": "trial", "stable": bool(stable(r))} for r in ends]
            yield from ({k: v for k, v in r.items() if not k.endswith("_each")} for r in tried)
            low, high = narrowed(seeds, low, high, tried)
            turn, inside = turn + 1, None
            yield Checkpoint(config.steps, [np.int64(turn), low, high])
        for seed, below, above in zip(seeds, low, high, strict=True):
            edge, lr = "", math.sqrt(below * above)
            if not below:
                edge, lr = "lowest", math.nan
            elif above == math.inf:
                edge, lr = "highest", below
            ends = {"low": number(below or math.nan), "high": number(above)}
            yield {"kind": "largest", "seed": seed, "lr": number(lr), **ends, "edge": edge}

    return run


def searched(rates: Sequence[float]) -> list[Record]:
    """What `largest_stable` says, for `Condition.says`."""
    return [*({"kind": "trial", "lr": lr} for lr in rates), {"kind": "largest", "edge": ""}]


def between(seeds: Sequence[int], low: np.ndarray, high: np.ndarray, fine: float) -> list[Lane]:
    """The next trial of each seed whose two rates are further apart than `fine`."""
    return [
        {"lr": math.sqrt(below * above), "seed": seed}
        for seed, below, above in zip(seeds, low, high, strict=True)
        if below > 0 and above < math.inf and above / below > fine
    ]


def narrowed(
    seeds: Sequence[int], low: np.ndarray, high: np.ndarray, tried: Sequence[Record]
) -> tuple[np.ndarray, np.ndarray]:
    """The largest stable rate of each seed so far, and the smallest above it that is not."""
    low, high = low.copy(), high.copy()
    for i, seed in enumerate(seeds):
        mine = [r for r in tried if r["seed"] == seed]
        low[i] = max([low[i], *(r["lr"] for r in mine if r["stable"])])
        above = [r["lr"] for r in mine if not r["stable"] and r["lr"] > low[i]]
        high[i] = min([high[i], *above])
    return low, high
