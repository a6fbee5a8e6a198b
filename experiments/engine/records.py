"""Records: what was measured, and what verdicts and figures ask of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]
"""A measurement: JSON values by name; `None` where one is not finite."""


class Records(list[Record]):
    """What was measured, in the order of the measurements.

    >>> records = Records({"seed": s, "lr": lr, "loss": lr + s} for lr in (0.1, 0.2) for s in (0, 1))
    >>> records.where(lr=0.2).by_seed("loss").tolist()
    [0.2, 1.2]
    """

    def where(self, **wanted: Any) -> Records:
        """The records that say what is wanted."""
        return Records(r for r in self if all(r.get(k) == v for k, v in wanted.items()))

    def values(self, key: str) -> list[Any]:
        """The different values of `key`, as they come; records without it do not count."""
        return list(dict.fromkeys(r[key] for r in self if key in r))

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

    def tuned(self, *labels: str) -> Records:
        """The last evaluations of each setting of the labels, at its best rate.

        The best is that of the largest test accuracy, the mean over the seeds: a net that is tuned
        at more rates has more to choose from.
        """
        ends, found = self.last(), Records()
        for setting in dict.fromkeys(tuple(r[label] for label in labels) for r in ends):
            here = ends.where(**dict(zip(labels, setting, strict=True)))
            best = max(sorted(here.values("lr")), key=lambda lr: here.accuracy(lr=lr).mean())
            found += here.where(lr=best)
        return found

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

    def accuracy(self, condition: Any = None, **wanted: Any) -> np.ndarray:
        """The test accuracy of each seed at the end, in percent."""
        if condition is not None:
            wanted["condition"] = condition
        return self.by_seed("accuracy", kind="evaluation", **wanted)

    def steps_to(self, target: float, **wanted: Any) -> np.ndarray:
        """The first evaluation of each seed where the accuracy is `target` percent; inf if none."""
        first: dict[int, float] = {}
        for record in self.where(kind="evaluation", **wanted):
            seed, value = record["seed"], record["accuracy"]
            first.setdefault(seed, math.inf)
            if value is not None and value >= target:
                first[seed] = min(first[seed], record["step"])
        return np.array([first[seed] for seed in sorted(first)])

    def share_of_steps(
        self, target: float, mine: Mapping[str, Any], reference: Mapping[str, Any]
    ) -> np.ndarray:
        """The steps to `target` percent over those of the reference, of each seed.

        One that does not come there counts with its last step, so that the share is a bound; where
        neither does it is NaN.
        """
        steps = [self.steps_to(target, **which) for which in (mine, reference)]
        last = max(self.where(kind="evaluation").values("step"))
        share = np.minimum(steps[0], last) / np.minimum(steps[1], last)
        return np.where(np.isinf(steps[0]) & np.isinf(steps[1]), np.nan, share)
