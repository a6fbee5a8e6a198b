"""What a comparison came to: what was measured of each norm, and its row of the table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.records import Records
from ..rundir import Record, RunDirectory, number
from ..training.driver import Checkpoint
from ..training.tasks import Task
from . import kept
from .config import Compare
from .rates import best, diverged, largest_stable


@dataclasses.dataclass
class Track:
    """What was measured of one norm, and how far it came."""

    name: str
    config: Compare
    diverged: np.ndarray
    step: int = -1
    compile_seconds: float = 0.0
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    records: Records = dataclasses.field(default_factory=Records)
    parts: list[Record] = dataclasses.field(default_factory=list)
    tuning: Record | None = None
    failed: str = ""

    @property
    def labels(self) -> Record:
        """What its records are known by: the norm, without its scheme, and the scheme."""
        return {"norm": self.config.norms[0], "scheme": self.config.scheme}

    @property
    def goes_on(self) -> bool:
        """Whether there is a run that did not diverge and has steps to do."""
        return self.step < self.config.steps and bool((self.diverged < 0).any())

    def restore(self, found: Records, checkpoint: Checkpoint | None) -> Records:
        """Takes over what was measured before; returns the records that stay.

        What was measured after the checkpoint of one that is not done is measured again.
        """
        choice = found.where(kind="tuning")
        if choice:
            self.tune(choice[-1])
        if found.where(kind="evaluation"):
            whole = self.take(found)
            if whole and not self.goes_on and checkpoint is None:
                return found
            until = -1 if checkpoint is None else checkpoint.step
            found = found.where(lambda r: r["kind"] in CHOICE or r["step"] <= until)
            self.take(found)
        return found

    def tune(self, choice: Record) -> None:
        """Goes on at the rate that was chosen."""
        self.tuning, self.config = choice, self.config.at(choice["lr"])

    def take(self, found: Records) -> bool:
        """Takes over what was measured; returns whether that of the last step is whole."""
        self.records, self.parts = found.where(kind="evaluation"), found.where(kind="part")
        self.step = max((r["step"] for r in self.records), default=-1)
        last = self.records.where(step=self.step)
        ended = [r["diverged"] for r in last]
        count = len(self.config.lanes)
        whole = len(ended) == count
        self.diverged = np.array([-1 if at is None or not whole else at for at in ended])
        self.diverged = self.diverged if whole else np.full(count, -1)
        times = self.records.where(seed=0, lr=self.config.lanes[0]["lr"])
        measured = (r["step_seconds"] for r in times)
        self.step_seconds = [value for value in measured if value is not None]
        return whole


CHOICE = ("screening", "tuning")
"""The kinds of records of the choice of a rate."""


class Outcome:
    """What a comparison came to, or has so far.

    Args:
      config: What was compared.
      task: What was asked of the nets.
      tracks: The norms.
      directory: The run directory.
    """

    def __init__(
        self, config: Compare, task: Task, tracks: Sequence[Track], directory: RunDirectory
    ) -> None:
        self.config, self.task, self.tracks, self.run_dir = config, task, tracks, directory

    @classmethod
    def read(cls, config: Compare, path: Path, task: Task) -> Outcome:
        """That of a run directory."""
        directory = RunDirectory(path, "", again=True)
        tracks = []
        records = kept.read_records(path)
        for where, one in config.by_scheme.items():
            for name in config.chosen():
                alone = one.alone(name)
                track = Track(name + where, alone, np.full(len(alone.lanes), -1))
                found = records.get((*track.labels.values(),), Records())
                for choice in found.where(kind="tuning")[-1:]:
                    track.tune(choice)
                if found.where(kind="evaluation"):
                    track.take(found)
                tracks.append(track)
        return cls(config, task, tracks, directory)

    @property
    def target(self) -> float:
        """What the column "steps to" is about."""
        return self.config.target or self.task.score.target

    def at_best_rates(self) -> list[tuple[Track, float]]:
        """Every norm that was measured, with its best rate."""
        measured = [lane for lane in self.tracks if lane.records]
        return [(lane, best(lane.records.last(), self.task)) for lane in measured]

    def summary(self) -> list[dict[str, Any]]:
        """One row per norm: its score, the spread, steps to the target, time, share of the norm."""
        score, rows, by_name = self.task.score, [], {lane.name: lane for lane in self.tracks}
        for lane, lr in self.at_best_rates():
            _, *scheme = lane.name.partition(", ")
            baseline = by_name.get("".join(("none", *scheme)))
            records, last = lane.records.where(lr=lr), lane.records.last()
            reached = statistics.median(
                records.steps_to(self.target, score.key, higher=score.higher)
            )
            share = None  # nor is there one where the two were not measured side by side
            others = baseline is not None and baseline is not lane and self.config.ray is None
            if baseline is not None and others and baseline.step_seconds and lane.step_seconds:
                pairs = zip(lane.step_seconds, baseline.step_seconds, strict=False)
                share = statistics.median(1 - base / mine for mine, base in pairs)
            row = {
                **lane.labels,
                "lr": lr,
                "step": lane.step,
                **self._spread(records.last()),
                "steps_to_target": number(reached),
                "step_seconds": statistics.median(lane.step_seconds) if lane.step_seconds else None,
                "norm_share": share,
                "compile_seconds": lane.compile_seconds,
                "diverged": {
                    str(at["seed"]): int(step)
                    for at, step in zip(lane.config.lanes, lane.diverged, strict=True)
                    if step > -1 and at["lr"] == lr
                },
                "above_chance": self._diverged(records.last()),
            }
            if lane.tuning:
                told = ("kind", *lane.labels, "lr")
                row["tuning"] = {k: v for k, v in lane.tuning.items() if k not in told}
            if self.config.tried:
                row["largest_stable_rate"] = largest_stable(last, self.task)._asdict()
                row["rates"] = [
                    {"lr": rate, **self._spread(at), "above_chance": self._diverged(at)}
                    for rate in self.config.tried
                    for at in [last.where(lr=rate)]
                ]
            rows.append(row)
        return rows

    def _spread(self, last: Records) -> dict[str, Any]:
        """The score of the seeds whose losses are finite."""
        key = self.task.score.key
        final = [None if r["test_loss"] is None else r[key] for r in last]
        alive = [value for value in final if value is not None]
        return {
            f"{key}_mean": statistics.fmean(alive) if alive else None,
            f"{key}_sd": statistics.stdev(alive) if len(alive) > 1 else None,
            f"{key}_by_seed": final,
        }

    def _diverged(self, last: Records) -> list[int]:
        """The seeds that diverged."""
        return [r["seed"] for r in last if diverged(r, self.task.uninformed)]
