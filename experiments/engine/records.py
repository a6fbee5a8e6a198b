"""Records: what was measured, and what verdicts and figures ask of it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..rundir import Record, unpacked

DRAWS = 500
"""How often test images are drawn with replacement."""


class Records(list[Record]):
    """What was measured, in the order of the measurements.

    >>> records = Records({"lr": lr, "seed": s, "loss": lr + s} for s in (0, 1) for lr in (1, 0.2))
    >>> records.where(lr=0.2).by_seed("loss").tolist()
    [0.2, 1.2]
    """

    def where(self, so: Callable[[Record], bool] | None = None, /, **wanted: Any) -> Records:
        """The records that say what is wanted, and of which `so` is true."""
        found = Records(r for r in self if all(r.get(k) == v for k, v in wanted.items()))
        return found if so is None else Records(filter(so, found))

    def values(self, *keys: str) -> list[Any]:
        """The different values of a key, or of several keys at once, as they come.

        Records that lack one of them do not count.
        """
        found = dict.fromkeys(tuple(r[k] for k in keys) for r in self if r.keys() >= {*keys})
        return list(found) if len(keys) > 1 else [value for (value,) in found]

    def each_seed(self, f: Callable[[Records], Any]) -> np.ndarray:
        """What `f` makes of the records of each seed."""
        return np.array([f(self.where(seed=seed)) for seed in sorted(self.values("seed"))])

    def trained(self) -> Records:
        """The records of a net that has made a step, without those of its initialization."""
        return Records(r for r in self if r.get("step", 0) > 0)

    def last(self) -> Records:
        """The record of the last evaluation of each net; a net is what stands before the `step`."""
        found = {}
        for record in self.where(kind="evaluation"):
            labels = itertools.takewhile(lambda item: item[0] != "step", record.items())
            found[tuple(labels)] = record
        return Records(found.values())

    def by_seed(
        self, key: str, of: Callable[[list[Any]], float] = lambda found: found[-1], **wanted: Any
    ) -> np.ndarray:
        """The last value of `key` in each seed, of the records that say what is wanted.

        Args:
          key: Which value; null is NaN, and records without it do not count.
          of: What is made of the values of a seed in the place of the last: `max`, `np.mean`, ….
          **wanted: What the records say.
        """
        found: dict[int, list[Any]] = {}
        for record in self.where(**wanted):
            if key in record:
                value = record[key]
                found.setdefault(record["seed"], []).append(math.nan if value is None else value)
        return np.array([of(found[seed]) for seed in sorted(found)])

    def accuracy(
        self, condition: Any = None, *, key: str = "accuracy", **wanted: Any
    ) -> np.ndarray:
        """The test accuracy at the end in percent, on the test images and on draws of them.

        Claims in points are about it: `decide` takes what is computed of it by elementwise NumPy.

        Args:
          condition: The `condition` that the records are to have.
          key: Another share of the test images than the accuracy.
          **wanted: What else they are to say.

        Returns:
          `[seeds, 1 + DRAWS]`: of all test images, then of `DRAWS` draws of as many of them with
          replacement, the same for every net. `[seeds, 1]` of records without `<key>_each`.
        """
        wanted.setdefault("kind", "evaluation")
        if condition is not None:
            wanted["condition"] = condition
        here = self.where(**wanted)
        return 100 * here._drawn(key, unpacked)

    def bits_per_byte(self, **wanted: Any) -> np.ndarray:
        """The bits per byte of a text at the end, on the test windows and on draws of them.

        `[seeds, 1 + DRAWS]`, as `accuracy` has it.
        """
        return self.where(**{"kind": "evaluation", **wanted})._drawn("bits_per_byte", np.asarray)

    def _drawn(self, key: str, read: Callable[[Any], np.ndarray]) -> np.ndarray:
        """The last value of `key` in each seed, and on draws of what there is of each example."""
        found = self.by_seed(key)[:, None]
        last = self.where(lambda r: f"{key}_each" in r)
        if last:
            each = {r["seed"]: read(r[f"{key}_each"]) for r in last}
            values = np.stack([each[seed] for seed in sorted(each)]).astype(np.float32)
            found = np.concatenate([found, values @ draws(values.shape[1]).T], axis=1)
        return found

    def best_rate(self, **wanted: Any) -> float:
        """The learning rate that `tuned` chose, on held-out training images with other seeds."""
        [rate] = self.where(kind="tuning", **wanted).values("lr")
        return rate

    def steps_to(
        self, target: float, key: str = "accuracy", *, higher: bool = True, **wanted: Any
    ) -> np.ndarray:
        """The first evaluation of each seed with the accuracy `target`; inf if none.

        Or of another key of the records, of which less may be better.
        """
        first: dict[int, float] = {}
        for record in self.where(kind="evaluation", **wanted):
            seed, value = record["seed"], record[key]
            first.setdefault(seed, math.inf)
            if value is not None and (value >= target if higher else value <= target):
                first[seed] = min(first[seed], record["step"])
        return np.array([first[seed] for seed in sorted(first)])

    def share_of_steps(
        self, target: float, mine: Mapping[str, Any], reference: Mapping[str, Any]
    ) -> np.ndarray:
        """The steps to the accuracy `target` over those of the reference, of each seed.

        One that does not come there counts with its last step, so that the share is a bound; where
        neither does it is NaN.
        """
        steps = [self.steps_to(target, **which) for which in (mine, reference)]
        last = max(self.where(kind="evaluation").values("step"))
        share = np.minimum(steps[0], last) / np.minimum(steps[1], last)
        return np.where(np.isinf(steps[0]) & np.isinf(steps[1]), np.nan, share)


@functools.lru_cache(maxsize=4)
def draws(images: int) -> np.ndarray:
    """The share of each image in each draw of as many with replacement, `[DRAWS, images]`."""
    counts = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), DRAWS)
    return (counts / images).astype(np.float32)
