"""The main job: train the same network under every norm on real data, side by side.

    python -m experiments compare --dataset mnist --model conv

All norms see the same minibatches and start from the same kernels (per seed). They take turns, a
stretch of steps each, so their times are measured side by side, and stopping early leaves all of
them equally far.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax

from .. import models
from ..data import load
from ..engine.records import Records
from ..figures import encode
from ..rundir import Record, RunDirectory, RunError, environment, number
from ..training.config import (
    Command,
    require,
    require_division,
    require_evaluations,
    require_fit,
)
from ..training.driver import Progress, drive
from ..training.trainer import (
    AXIS,
    OPTIMIZERS,
    QUANTILES,
    DeviceData,
    Trainer,
    lengths,
    minibatches,
    set_devices,
    stretches,
    turns,
)
from . import figures

COMMON = ("none", "batch", "layer", "rms", "group", "instance", "weight", "cosine")
"""The norms that are compared by default."""


@dataclasses.dataclass(frozen=True)
class Compare(Command):
    """Train one network under several norms, data-parallel, on real images.

    Ends with a table, a figure of the learning curves and a figure of the four parts (μ, σ, g, b)
    of every norm in every layer. Everything measured is kept in the run directory.
    """

    norms: tuple[str, ...] = ()
    """Which norms (`python -m experiments list`, or module:factory for one of your own); by default
    the eight common ones, without instance norm where the model has no positions."""

    sync: Literal["global", "local"] = "global"
    """Batch statistics over all devices, or over each device's own share of the batch."""

    devices: int = 8
    """Devices that share each batch. On a CPU that many are made."""

    seeds: int = 3
    """Seeds 0, 1, …, trained side by side."""

    evaluations: int = 10
    """How often to measure on the way; the last time is after the last step."""

    target: float = 0.95
    """Test accuracy for the column "steps to"."""

    run_dir: Path | None = None
    """Where the results go; must not exist. By default runs/compare-DATASET-MODEL-TIME."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        super().__post_init__()
        self.require_counts("devices", "seeds", "evaluations")
        require(0 < self.target <= 1, "target", self.target, "a share in (0, 1]")
        require_evaluations(self.evaluations, self.steps)
        require(len(set(self.norms)) == len(self.norms), "norms", self.norms, "distinct")
        require_division(self.batch_size, self.devices, self.microbatches)

    def chosen(self) -> tuple[str, ...]:
        """The norms to compare: those asked for, or the default ones that fit the model."""
        return self.norms or tuple(
            name for name in COMMON if name != "instance" or self.model not in models.FLAT
        )

    @property
    def axis_name(self) -> str | None:
        """The devices over which a norm measures."""
        return AXIS if self.sync == "global" and self.devices > 1 else None


@dataclasses.dataclass
class Lane:
    """One norm on its way: where it stands and what was measured."""

    name: str
    trainer: Trainer
    at: Progress
    compile_seconds: float = 0.0
    step_ms: list[float] = dataclasses.field(default_factory=list)
    records: Records = dataclasses.field(default_factory=Records)
    parts: list[Record] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a listener hears after a norm's turn."""

    norm: str
    step: int
    loss: float
    accuracy: float


class Comparison:
    """A comparison in the making.

    Args:
      config: What to compare.
      say: Receives short messages about what is going on.
    """

    def __init__(self, config: Compare, say: Callable[[str], None] = lambda _: None) -> None:
        self.config, self.say = config, say
        self.lanes: list[Lane] = []
        self.stopped_at: int | None = None
        norms = {name: config.norm_of(name, config.axis_name) for name in config.chosen()}
        set_devices(config.devices)
        self.data = load(config.dataset, config.data_dir, on_progress=say)
        require_fit(config.batch_size, self.data)
        device_data = DeviceData(self.data, config.devices)
        optimizer = OPTIMIZERS[config.optimizer](config.lr)
        say("drawing the initial kernels")
        kernels = models.draw_kernels(
            config.model, self.data.classes, range(config.seeds), device_data.probe
        )
        trainers = {}
        for name, norm in norms.items():
            model = models.build(config.model, norm, self.data.classes)
            trainers[name] = trainer = Trainer(
                model,
                optimizer,
                device_data,
                kernels,
                synced=config.sync == "global",
                microbatches=config.microbatches,
            )
            _check_shapes(name, trainer)  # says no before anything is compiled or written
        self.run_dir = RunDirectory(config.run_dir, f"compare-{config.dataset}-{config.model}")
        self.run_dir.write_json("config.json", config.as_json())
        origin = {"name": config.dataset, "origin": self.data.origin, "sha256": self.data.checksum}
        self.run_dir.write_json("environment.json", {**environment(), "dataset": origin})
        try:
            self._compile(trainers)
        except BaseException:  # Ctrl-C above all: nothing was measured, so nothing is left
            shutil.rmtree(self.run_dir.path)
            raise

    def run(self) -> Iterator[Turn]:
        """Trains all norms in turns; yields after each turn. Stopping between yields is safe."""
        config = self.config
        examples = len(self.data.train_images)
        drawn = [
            minibatches(seed, examples, config.batch_size, config.steps)
            for seed in range(config.seeds)
        ]
        each = []
        for lane in self.lanes:
            lane.at = lane.at.evaluated(lane.trainer)
            self._record(lane)
            each.append(drive(lane.trainer, lane.at, turns(drawn, config.evaluations)))
        for _, stop in stretches(config.steps, config.evaluations):
            for lane, progress in zip(self.lanes, each, strict=True):
                if (lane.at.diverged < 0).any():
                    lane.at = next(progress)
                    yield self._record(lane)
            self.stopped_at = stop

    def _record(self, lane: Lane) -> Turn:
        """Keeps what was measured; returns what a listener hears."""
        at = lane.at
        assert at.evaluation is not None
        if at.step_ms is not None:
            lane.step_ms.append(at.step_ms)
        rows = [{"norm": lane.name, "seed": seed} for seed in range(lane.trainer.seeds)]
        records = [record | {"step_ms": at.step_ms} for record in at.records(rows)]
        parts = [
            {"kind": "part", **row, "step": at.step, "layer": layer, "part": part}
            | {f"p{round(100 * q)}": number(v) for q, v in zip(QUANTILES, values[i], strict=True)}
            for i, row in enumerate(rows)
            for layer, four in at.evaluation.parts.items()
            for part, values in four._asdict().items()
        ]
        lane.records += records
        lane.parts += parts
        self.run_dir.append("metrics.jsonl", records + parts)
        return Turn(lane.name, at.step, at.loss, float(at.evaluation.accuracy.mean()))

    def _compile(self, trainers: dict[str, Trainer]) -> None:
        """Compiles for every length of stretch, two norms at a time."""
        config = self.config
        steps = lengths(config.steps, config.evaluations)

        def one(name: str) -> Lane:
            begin = time.perf_counter()
            trainer = trainers[name]
            state = trainer.init()
            trainer.compile(state, steps, config.batch_size)
            self.say(f"compiled {name}")
            at = Progress.start(state, config.seeds)
            return Lane(name, trainer, at, time.perf_counter() - begin)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            self.lanes = list(pool.map(one, trainers))

    def summary(self) -> list[dict[str, Any]]:
        """One row per norm: accuracy, its spread, steps to the target, time, share of the norm."""
        baseline = next((lane for lane in self.lanes if lane.name == "none"), None)
        rows = []
        for lane in self.lanes:
            if not lane.records:
                continue  # stopped before it was looked at
            final = [None if r["test_loss"] is None else r["accuracy"] for r in lane.records.last()]
            alive = [a for a in final if a is not None]
            reached = statistics.median(lane.records.steps_to(self.config.target))
            share = None
            if baseline is not None and baseline is not lane and baseline.step_ms and lane.step_ms:
                pairs = zip(lane.step_ms, baseline.step_ms, strict=False)
                share = statistics.median(1 - base / mine for mine, base in pairs)
            rows.append(
                {
                    "norm": lane.name,
                    "step": lane.at.step,
                    "accuracy_mean": statistics.fmean(alive) if alive else None,
                    "accuracy_sd": statistics.stdev(alive) if len(alive) > 1 else None,
                    "accuracy_by_seed": final,
                    "steps_to_target": number(reached),
                    "step_ms": statistics.median(lane.step_ms) if lane.step_ms else None,
                    "norm_share": share,
                    "compile_seconds": lane.compile_seconds,
                    "diverged": {
                        str(seed): int(step)
                        for seed, step in enumerate(lane.at.diverged)
                        if step > -1
                    },
                }
            )
        return rows

    def finish(self) -> dict[str, Path]:
        """Writes the summary and the figures of what was done; returns their paths."""
        config = self.config
        records = [r for lane in self.lanes for r in lane.records]
        parts = [r for lane in self.lanes for r in lane.parts]
        title = (
            f"{config.dataset}, {config.model}, batch {config.batch_size} over "
            f"{config.devices} device{'s' * (config.devices > 1)}, {config.sync} statistics, "
            f"{config.optimizer} lr {config.lr:g}, {config.seeds} seed{'s' * (config.seeds > 1)}"
        )
        done = {"complete": self.stopped_at == config.steps, "norms": self.summary()}
        paths = {"summary": self.run_dir.write_json("summary.json", done)}
        if not records:
            return paths
        for name, figure in (
            ("curves", figures.curves(records, title, 1 / self.data.classes)),
            ("parts", figures.parts(parts, title)),
        ):
            for kind in ("png", "svg"):
                file = f"{name}.{kind}"
                paths[file] = self.run_dir.write_bytes(file, encode(figure, kind))
        return paths


def _check_shapes(name: str, trainer: Trainer) -> None:
    try:
        jax.eval_shape(jax.vmap(trainer.init_one), trainer.kernels)
    except ValueError as error:
        raise RunError(
            f"norm {name!r} does not fit the model: {error} Or leave it out with --norms, or "
            "choose another --model."
        ) from error
