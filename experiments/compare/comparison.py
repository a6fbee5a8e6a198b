"""The main job: train the same network under every norm on real data, side by side.

    python -m experiments compare --dataset mnist --model conv

All norms see the same minibatches and start from the same kernels (per seed). They take turns, a
stretch of steps each, so their times are measured side by side, and stopping early leaves all of
them equally far.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import normlab as nl

from .. import figures, models
from ..data import load
from ..rundir import RunDirectory, RunError, environment
from ..training.trainer import (
    AXIS,
    OPTIMIZERS,
    QUANTILES,
    DeviceData,
    Evaluation,
    Trainer,
    TrainState,
    minibatches,
    set_devices,
    stretches,
)

COMMON = ("none", "batch", "layer", "rms", "group", "instance", "weight", "cosine")
"""The norms that are compared by default."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Train one network under several norms, data-parallel, on real images.

    Ends with a table, a figure of the learning curves and a figure of the four parts (μ, σ, g, b)
    of every norm in every layer. Everything measured is kept in the run directory.
    """

    dataset: str = "mnist"
    """mnist, fashion_mnist, cifar10 or digits (tiny, needs no download)."""

    model: str = "conv"
    """conv (three 3×3 convolutions, ReLU), mlp (three layers of 100 sigmoids), or another of
    `python -m experiments list`."""

    norms: tuple[str, ...] = ()
    """Which norms (`python -m experiments list`); by default the eight common ones, without
    instance norm where the model has no positions."""

    sync: Literal["global", "local"] = "global"
    """Batch statistics over all devices, or over each device's own share of the batch."""

    devices: int = 8
    """Devices that share each batch. On a CPU that many are made."""

    batch_size: int = 128
    """Examples per optimizer step, over all devices."""

    microbatches: int = 1
    """Parts, one after the other, into which a device cuts its share of a batch."""

    steps: int = 600
    """Optimizer steps."""

    optimizer: Literal["momentum", "sgd", "adam"] = "momentum"
    """Plain SGD, SGD with momentum 0.9, or Adam."""

    lr: float = 0.05
    """Learning rate, the same for every norm."""

    seeds: int = 3
    """Seeds 0, 1, …, trained side by side."""

    evaluations: int = 10
    """How often to measure on the way; the last time is after the last step."""

    target: float = 0.95
    """Test accuracy for the column "steps to"."""

    groups: int = 4
    """Groups of group norm; must divide the channels of every layer."""

    decay: float = 0.9
    """Weight of the old value in batch norm's running statistics."""

    eps: float = 1e-5
    """ε, added to the variance under the root."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""

    run_dir: Path | None = None
    """Where the results go; must not exist. By default runs/compare-DATASET-MODEL-TIME."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        for name in (
            "devices",
            "batch_size",
            "microbatches",
            "steps",
            "seeds",
            "evaluations",
            "groups",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0 < self.lr < math.inf, "lr", self.lr, "positive and finite")
        _require(0 < self.eps < math.inf, "eps", self.eps, "positive and finite")
        _require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        _require(0 < self.target <= 1, "target", self.target, "a share in (0, 1]")
        _require(self.evaluations <= self.steps, "evaluations", self.evaluations, "at most --steps")
        _require(len(set(self.norms)) == len(self.norms), "norms", self.norms, "distinct")
        parts = self.devices * self.microbatches
        if self.batch_size % parts:
            near = self.batch_size // parts * parts
            options = [str(b) for b in (near, near + parts) if b]
            cut = f" times --microbatches {self.microbatches}" if self.microbatches > 1 else ""
            raise RunError(
                f"--batch-size {self.batch_size} does not divide over --devices {self.devices}"
                f"{cut}. "
                f"Use a batch size of {' or '.join(options)}, or another number of devices."
            )

    def chosen(self) -> tuple[str, ...]:
        """The norms to compare: those asked for, or the default ones that fit the model."""
        return self.norms or tuple(
            name for name in COMMON if name != "instance" or self.model not in models.FLAT
        )

    def norm(self, name: str) -> nl.Norm:
        """The norm called `name`, with the options of this run."""
        axis_name = AXIS if self.sync == "global" and self.devices > 1 else None
        options: dict[str, dict[str, Any]] = {
            "batch": {"eps": self.eps, "decay": self.decay, "axis_name": axis_name},
            "layer": {"eps": self.eps, "axes": "all"},
            "rms": {"eps": self.eps, "axes": "all"},
            "group": {"eps": self.eps, "groups": self.groups},
            "instance": {"eps": self.eps},
            "weight": {"data_init": True},
        }
        return nl.get(name, **options.get(name, {}))


@dataclasses.dataclass
class Lane:
    """One norm on its way: where it stands and what was measured."""

    name: str
    trainer: Trainer
    state: TrainState
    compile_seconds: float = 0.0
    step_ms: list[float] = dataclasses.field(default_factory=list)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    diverged: dict[int, int] = dataclasses.field(default_factory=dict)
    """For each seed whose training or test loss was not finite, the first such step."""

    @property
    def dead(self) -> bool:
        """Whether every seed has diverged."""
        return len(self.diverged) == self.trainer.seeds


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
        try:
            norms = {name: config.norm(name) for name in config.chosen()}
            models.require(config.model)
        except ValueError as error:  # an unknown name
            raise RunError(str(error)) from None
        set_devices(config.devices)
        self.data = load(config.dataset, config.data_dir, on_progress=say)
        if config.batch_size > len(self.data.train_images):
            raise RunError(
                f"--batch-size {config.batch_size} is larger than {config.dataset}, which has "
                f"{len(self.data.train_images)} training examples. Use a smaller batch."
            )
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
        self.run_dir.write_json("config.json", _as_json(config))
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
        seeds = range(config.seeds)
        indices = np.stack(
            [
                minibatches(seed, len(self.data.train_images), config.batch_size, config.steps)
                for seed in seeds
            ],
            axis=1,
        )
        for lane in self.lanes:
            self._record(lane, 0, lane.trainer.evaluate(lane.state), [math.nan] * config.seeds)
        for start, stop in stretches(config.steps, config.evaluations):
            for lane in self.lanes:
                if not lane.dead:
                    yield self._turn(lane, start, indices[start:stop])
            self.stopped_at = stop

    def _turn(self, lane: Lane, start: int, indices: np.ndarray) -> Turn:
        begin = time.perf_counter()
        lane.state, losses = lane.trainer.train(lane.state, indices)
        lane.step_ms.append((time.perf_counter() - begin) / len(indices) * 1e3)
        for seed in np.flatnonzero(~np.isfinite(losses).all(axis=0)):
            first = start + int(np.argmin(np.isfinite(losses[:, seed]))) + 1
            lane.diverged.setdefault(int(seed), first)
        stop = start + len(indices)
        evaluation = lane.trainer.evaluate(lane.state)
        for seed in np.flatnonzero(~np.isfinite(evaluation.loss)):
            lane.diverged.setdefault(int(seed), stop)
        self._record(lane, stop, evaluation, losses.mean(axis=0))
        return Turn(lane.name, stop, float(losses[-1].mean()), float(evaluation.accuracy.mean()))

    def _record(self, lane: Lane, step: int, evaluation: Evaluation, train_loss: Any) -> None:
        records, parts = [], []
        for i in range(lane.trainer.seeds):
            base = {"norm": lane.name, "seed": i, "step": step}
            finite = bool(np.isfinite(evaluation.loss[i]))
            records.append(
                {
                    "kind": "evaluation",
                    **base,
                    "train_loss": _number(train_loss[i]),
                    "test_loss": _number(evaluation.loss[i]),
                    "test_accuracy": _number(evaluation.accuracy[i]) if finite else None,
                    "test_error": _number(100 * (1 - evaluation.accuracy[i])) if finite else None,
                    "step_ms": lane.step_ms[-1] if lane.step_ms else None,
                }
            )
            for layer, four in evaluation.parts.items():
                for part, values in four._asdict().items():
                    marks = {
                        f"p{round(100 * q)}": _number(v)
                        for q, v in zip(QUANTILES, values[i], strict=True)
                    }
                    parts.append({"kind": "part", **base, "layer": layer, "part": part, **marks})
        lane.records += records
        lane.parts += parts
        self.run_dir.append("metrics.jsonl", records + parts)

    def _compile(self, trainers: dict[str, Trainer]) -> None:
        """Compiles for every length of stretch, two norms at a time."""
        config = self.config
        lengths = {stop - start for start, stop in stretches(config.steps, config.evaluations)}

        def one(name: str) -> Lane:
            begin = time.perf_counter()
            trainer = trainers[name]
            state = trainer.init()
            trainer.compile(state, lengths, config.batch_size)
            self.say(f"compiled {name}")
            return Lane(name, trainer, state, time.perf_counter() - begin)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            self.lanes = list(pool.map(one, trainers))

    def summary(self) -> list[dict[str, Any]]:
        """One row per norm: accuracy, its spread, steps to the target, time, share of the norm."""
        baseline = next((lane for lane in self.lanes if lane.name == "none"), None)
        rows = []
        for lane in self.lanes:
            if not lane.records:
                continue  # stopped before it was looked at
            by_seed = [
                [r for r in lane.records if r["seed"] == seed] for seed in range(lane.trainer.seeds)
            ]
            final = [rs[-1]["test_accuracy"] for rs in by_seed]
            alive = [a for a in final if a is not None]
            reached = sorted(_steps_to(rs, self.config.target) for rs in by_seed)
            step_ms = statistics.median(lane.step_ms) if lane.step_ms else None
            share = None
            if baseline is not None and baseline is not lane and baseline.step_ms and step_ms:
                pairs = zip(lane.step_ms, baseline.step_ms, strict=False)
                share = statistics.median(1 - base / mine for mine, base in pairs)
            steps_to = statistics.median(reached)
            rows.append(
                {
                    "norm": lane.name,
                    "step": lane.records[-1]["step"],
                    "accuracy_mean": statistics.fmean(alive) if alive else None,
                    "accuracy_sd": statistics.stdev(alive) if len(alive) > 1 else None,
                    "accuracy_by_seed": final,
                    "steps_to_target": steps_to if math.isfinite(steps_to) else None,
                    "step_ms": step_ms,
                    "norm_share": share,
                    "compile_seconds": lane.compile_seconds,
                    "diverged": {str(seed): step for seed, step in sorted(lane.diverged.items())},
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
                content = figures.encode(figure, kind)
                paths[f"{name}.{kind}"] = self.run_dir.write_bytes(f"{name}.{kind}", content)
        return paths


def _check_shapes(name: str, trainer: Trainer) -> None:
    try:
        jax.eval_shape(jax.vmap(trainer.init_one), trainer.kernels)
    except ValueError as error:
        raise RunError(
            f"norm {name!r} does not fit the model: {error} Or leave it out with --norms, or "
            "choose another --model."
        ) from error


def _require(holds: bool, option: str, given: Any, expected: str) -> None:
    if not holds:
        raise RunError(f"--{option.replace('_', '-')}: got {given}; it must be {expected}.")


def _as_json(config: Compare) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def _number(value: Any) -> float | None:
    """A JSON number; null where it is not finite."""
    return float(value) if math.isfinite(value) else None


def _steps_to(records: list[dict[str, Any]], target: float) -> float:
    reached = (r["step"] for r in records if (r["test_accuracy"] or 0) >= target)
    return min(reached, default=math.inf)
