"""The main job: train the same network under every norm on real data, side by side.

    normlab compare --dataset mnist --model conv

All norms see the same minibatches and start from the same kernels (per seed). They take turns, a
stretch of steps each, so their times are measured side by side, and stopping early leaves all of
them equally far.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import normlab as nl

from .. import models
from ..cluster import Cluster, require_address
from ..data import Dataset, hand, load
from ..engine.records import Records
from ..figures import encode
from ..rundir import Record, RunDirectory, RunError, environment, number
from ..training import syncs
from ..training.config import (
    Command,
    require,
    require_division,
    require_evaluations,
    require_fit,
    require_mesh,
    require_place,
    require_reading,
    takes,
)
from ..training.driver import Progress, drive
from ..training.optimizers import at_rates, set_rates
from ..training.trainer import (
    QUANTILES,
    DeviceData,
    Trainer,
    axes_of,
    lengths,
    minibatches,
    set_devices,
    turns,
)
from . import figures, remote
from .rates import best, diverged, largest_stable

COMMON = ("none", "batch", "layer", "rms", "group", "instance", "weight", "cosine")
"""The norms that are compared by default on images."""

ON_TEXT = ("none", "layer", "rms", "dyt")
"""Those on text: norms of one token."""


@dataclasses.dataclass(frozen=True)
class Compare(Command):
    """Train one network under several norms, data-parallel, on real data.

    Ends with a table, a figure of the learning curves, a figure of the four parts (μ, σ, g, b)
    of every norm in every layer, and with several rates one of what each came to. Everything
    measured is kept in the run directory.
    """

    norms: tuple[str, ...] = ()
    """Which norms (`normlab list`, or module:factory for one of your own); by default
    the eight common ones, without instance norm where the model has no positions; on text four."""

    schemes: tuple[str, ...] = ()
    """Schemes in the place of --scheme: every norm is trained under each of them."""

    rates: tuple[float, ...] = ()
    """Learning rates in the place of --lr, trained side by side: each norm is shown at its best,
    with its largest stable rate. The best is chosen on the validation set of a text, and of images
    on the test set, of all norms alike."""

    sync: str = "all"
    """Over which devices batch norm measures: all, local, groups=2, ring=1, virtual=64, ghost=4;
    of a --mesh inner (its last axis) or together=axis0; joined by + with every=2,
    gradient=forward, second=always and the like."""

    devices: int = 8
    """Devices that share each batch. On a CPU that many are made."""

    mesh: tuple[int, ...] = ()
    """Sizes of the axes along which they lie, as in 4 2: axis0 and axis1, neighbours along the
    last; by default one axis of all. A step over several axes is a shard_map, over one a pmap."""

    seeds: int = 3
    """Seeds 0, 1, …, trained side by side."""

    evaluations: int = 10
    """How often to measure on the way; the last time is after the last step."""

    target: float | None = None
    """For the column "steps to": a test accuracy, by default 0.95; of text bits per byte, by
    default 2.5."""

    run_dir: Path | None = None
    """Where the results go; must not exist. By default runs/compare-DATASET-MODEL-TIME."""

    ray: str | None = None
    """A Ray cluster to train on, each norm in a worker of its own, as ray.init(address=...) takes
    it, or auto; without an address one is started on this machine."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        super().__post_init__()
        self.require_counts("devices", "seeds", "evaluations")
        for value in self.rates:
            require(0 < value < math.inf, "rates", value, "positive and finite")
        require(len(set(self.rates)) == len(self.rates), "rates", self.rates, "distinct")
        positive = self.target is None or 0 < self.target < math.inf
        require(positive, "target", self.target, "positive and finite")
        require_evaluations(self.evaluations, self.steps)
        for name in ("norms", "schemes"):
            given = getattr(self, name)
            require(len(set(given)) == len(given), name, given, "distinct")
        alone = self.scheme is None or not self.schemes
        require(alone, "scheme", self.scheme, "left out beside --schemes")
        require_division(self.batch_size, self.devices, self.microbatches)
        require_mesh(self.mesh, self.devices)
        syncs.parse(self.sync, axes_of(self.mesh), self.devices)
        require_address(self.ray)

    def chosen(self) -> tuple[str, ...]:
        """The norms to compare: those asked for, or the default ones that fit the model."""
        if self.norms:
            return self.norms
        if models.reads_text(self.model):
            return ON_TEXT
        flat = models.is_flat(self.model)
        return tuple(name for name in COMMON if name != "instance" or not flat)

    @property
    def lanes(self) -> list[Record]:
        """What is trained side by side: the rate and the seed of each."""
        rates = self.rates or (self.lr,)
        return [{"lr": lr, "seed": seed} for lr in rates for seed in range(self.seeds)]

    @property
    def by_scheme(self) -> dict[str, Compare]:
        """The command under each of the schemes, by what is said of a norm there."""
        if not self.schemes:
            return {"": self}
        one = dataclasses.replace(self, schemes=())
        return {f", {name}": dataclasses.replace(one, scheme=name) for name in self.schemes}

    @property
    def axis_name(self) -> nl.devices.AxisName | None:
        """The devices over which a norm measures."""
        sync = syncs.parse(self.sync, axes_of(self.mesh), self.devices)
        return sync if self.devices > 1 or isinstance(sync, nl.Sync) else None


class Measured(NamedTuple):
    """What was measured of a norm at the beginning, or in a turn.

    Attributes:
      step: Steps done.
      loss: The training loss of the last step, the mean over all.
      diverged: For each rate and seed the first step whose loss was not finite, or −1.
      step_ms: Milliseconds for a step; `None` at the beginning.
      compile_seconds: What compiling took.
      records: A record of each rate and seed.
      parts: The percentiles of the four parts in every layer.
    """

    step: int
    loss: float
    diverged: np.ndarray
    step_ms: float | None
    compile_seconds: float
    records: list[Record]
    parts: list[Record]


@dataclasses.dataclass
class Lane:
    """One norm: how it is trained, where it stands and what was measured."""

    name: str
    config: Compare
    trainer: Trainer
    diverged: np.ndarray
    step: int = -1
    compile_seconds: float = 0.0
    step_ms: list[float] = dataclasses.field(default_factory=list)
    records: Records = dataclasses.field(default_factory=Records)
    parts: list[Record] = dataclasses.field(default_factory=list)
    failed: str = ""

    @property
    def goes_on(self) -> bool:
        """Whether there is a run that did not diverge and has steps to do."""
        return self.step < self.config.steps and bool((self.diverged < 0).any())


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a listener hears after a norm's turn; the score is that of its best rate and seed."""

    norm: str
    step: int
    loss: float
    score: float | None


class Comparison:
    """A comparison in the making.

    Args:
      config: What to compare.
      say: Receives short messages about what is going on.
    """

    def __init__(self, config: Compare, say: Callable[[str], None] = lambda _: None) -> None:
        self.config, self.say = config, say
        self.warn: Callable[[str], None] = lambda text: None
        with contextlib.ExitStack() as leaving:
            cluster = None
            if config.ray is not None:  # before JAX starts, which does not like what Ray does then
                cluster = Cluster(config.ray, say=self._says, warn=lambda text: self.warn(text))
                leaving.enter_context(cluster)
            # On a cluster the devices are elsewhere; here one is enough to see what fits.
            self.lanes, self.data = lanes(config, 1 if cluster else config.devices, say)
            self.task = self.lanes[0].trainer.data.task
            self.run_dir = RunDirectory(config.run_dir, f"compare-{config.dataset}-{config.model}")
            self.run_dir.write_json("config.json", config.as_json())
            told = {**environment(), "dataset": self.data.describe()}
            self.run_dir.write_json("environment.json", told)
            try:
                if cluster:
                    self._turns = remote.turns(cluster, self.lanes, self.data)
                else:
                    self._turns = in_turns(self.lanes, self.data, say)
            except BaseException:  # Ctrl-C above all: nothing was measured, so nothing is left
                shutil.rmtree(self.run_dir.path)
                raise
            self._leaving = leaving.pop_all()

    def run(self) -> Iterator[Turn]:
        """Trains all norms; yields after each turn of one. Stopping between yields is safe."""
        with self._leaving:
            for lane, found in self._turns:
                turn = self._record(lane, found)
                if found.step:
                    yield turn

    def _says(self, text: str) -> None:
        self.say(text)

    def _record(self, lane: Lane, found: Measured) -> Turn:
        """Keeps what was measured; returns what a listener hears."""
        lane.step, lane.diverged = found.step, found.diverged
        lane.compile_seconds = found.compile_seconds
        if found.step_ms is not None:
            lane.step_ms.append(found.step_ms)
        lane.records += found.records
        lane.parts += found.parts
        self.run_dir.append("metrics.jsonl", found.records + found.parts)
        score = self.task.score
        alive = [r[score.key] for r in found.records if r["test_loss"] is not None]
        return Turn(lane.name, found.step, found.loss, score.best(alive, default=None))

    @property
    def target(self) -> float:
        """What the column "steps to" is about."""
        return self.config.target or self.task.score.target

    def at_best_rates(self) -> list[tuple[Lane, float]]:
        """Every norm that was measured, with its best rate."""
        measured = [lane for lane in self.lanes if lane.records]
        return [(lane, best(lane.records.last(), self.task)) for lane in measured]

    def summary(self) -> list[dict[str, Any]]:
        """One row per norm: its score, the spread, steps to the target, time, share of the norm."""
        score, rows, by_name = self.task.score, [], {lane.name: lane for lane in self.lanes}
        for lane, lr in self.at_best_rates():
            _, *scheme = lane.name.partition(", ")
            baseline = by_name.get("".join(("none", *scheme)))
            records, last = lane.records.where(lr=lr), lane.records.last()
            reached = statistics.median(
                records.steps_to(self.target, score.key, higher=score.higher)
            )
            share = None  # nor is there one where the two were not measured side by side
            others = baseline is not None and baseline is not lane and self.config.ray is None
            if baseline is not None and others and baseline.step_ms and lane.step_ms:
                pairs = zip(lane.step_ms, baseline.step_ms, strict=False)
                share = statistics.median(1 - base / mine for mine, base in pairs)
            row = {
                "norm": lane.name,
                "lr": lr,
                "step": lane.step,
                **self._spread(records.last()),
                "steps_to_target": number(reached),
                "step_ms": statistics.median(lane.step_ms) if lane.step_ms else None,
                "norm_share": share,
                "compile_seconds": lane.compile_seconds,
                "diverged": {
                    str(at["seed"]): int(step)
                    for at, step in zip(self.config.lanes, lane.diverged, strict=True)
                    if step > -1 and at["lr"] == lr
                },
                "above_chance": self._diverged(records.last()),
            }
            if self.config.rates:
                row["largest_stable_rate"] = largest_stable(last, self.task)._asdict()
                row["rates"] = [
                    {"lr": rate, **self._spread(at), "diverged": self._diverged(at)}
                    for rate in self.config.rates
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

    def finish(self) -> dict[str, Path]:
        """Writes the summary and the figures of what was done; returns their paths."""
        config = self.config
        title = (
            f"{config.dataset}, {config.model}, batch {config.batch_size} over "
            f"{config.devices} device{'s' * (config.devices > 1)}, sync {config.sync}, "
            f"{config.optimizer}, {config.seeds} seed{'s' * (config.seeds > 1)}"
        )
        rate = "each at its best rate" if config.rates else f"lr {config.lr:g}"
        complete = not any(lane.goes_on for lane in self.lanes)
        done = {"complete": complete, "norms": self.summary()}
        paths = {"summary": self.run_dir.write_json("summary.json", done)}
        at_best = self.at_best_rates()
        if not at_best:
            return paths
        records = [r for lane, lr in at_best for r in lane.records.where(lr=lr)]
        parts = [r for lane, lr in at_best for r in lane.parts if r["lr"] == lr]
        title_at = f"{title}, {rate}"
        drawn = {"curves": figures.curves(records, title_at, self.task, config.batch_size)}
        if parts:  # a model without norms has none
            drawn["parts"] = figures.parts(parts, title_at)
        if config.rates:
            last = [r for lane, _ in at_best for r in lane.records.last()]
            drawn["rates"] = figures.rates(last, title, self.task)
        for name, figure in drawn.items():
            for kind in ("png", "svg"):
                file = f"{name}.{kind}"
                paths[file] = self.run_dir.write_bytes(file, encode(figure, kind))
        return paths


def lanes(
    config: Compare, devices: int, say: Callable[[str], None] = lambda _: None
) -> tuple[list[Lane], Dataset]:
    """The norms to compare, none of which has begun, and the data.

    Args:
      config: What to compare.
      devices: On how many devices.
      say: Receives short messages about what is going on.

    Raises:
      RunError: For what does not fit, before anything is compiled or written.
    """
    norms = {name: config.norm_of(name, config.axis_name) for name in config.chosen()}
    set_devices(devices)
    data = load(config.dataset, config.data_dir, reading=config.reading, on_progress=say)
    require_reading(config.model, data)
    require_fit(config.batch_size, data)
    device_data = DeviceData(data, devices, mesh=config.mesh if devices == config.devices else ())
    optimizer = at_rates(config.make_optimizer)
    say("drawing the initial kernels")
    seeds = np.array([row["seed"] for row in config.lanes])
    synced = syncs.alike(config.axis_name, device_data.axes)
    delayed = syncs.delayed(config.axis_name)
    found = []
    for where, one in config.by_scheme.items():
        kernels = one.draw_kernels(data.classes, range(config.seeds), device_data.probe)
        kernels = jax.tree.map(lambda v: np.asarray(v)[seeds], kernels)
        for name, norm in norms.items():
            model = models.build(config.model, norm, data.classes, **one.model_options)
            trainer = Trainer(
                model,
                optimizer,
                device_data,
                kernels,
                synced=synced,
                form="pmap" if len(device_data.axes) == 1 else "shard_map",
                delayed=delayed if takes(name, "axis_name") else None,
                microbatches=config.microbatches,
            )
            _check_fit(name, trainer)
            alone = dataclasses.replace(one, norms=(name,), ray=None)
            found.append(Lane(name + where, alone, trainer, np.full(len(config.lanes), -1)))
    return found, data


def minibatches_of(config: Compare, data: Dataset) -> list[np.ndarray]:
    """The examples of every step, for each rate and seed."""
    examples = len(data.train_inputs)
    return [
        minibatches(row["seed"], examples, config.batch_size, config.steps) for row in config.lanes
    ]


def compiled(
    lane: Lane, drawn: Sequence[np.ndarray], say: Callable[[str], None] = lambda _: None
) -> Iterator[Measured]:
    """Compiles for every length of stretch; returns what trains the norm.

    It yields what was measured at the beginning and after each turn, until all diverged.

    Args:
      lane: The norm.
      drawn: The examples of every step, for each rate and seed.
      say: Hears that it is compiled.
    """
    config, trainer = lane.config, lane.trainer
    begin = time.perf_counter()
    state, data = trainer.init(), trainer.data
    rates = [row["lr"] for row in config.lanes]
    opt_state = set_rates(state.opt_state, rates, data.devices, data.mapped)
    start = Progress.start(state._replace(opt_state=opt_state), len(rates))
    steps = lengths(config.steps, config.evaluations)
    try:
        trainer.compile(start.state, steps, config.batch_size)
    except ValueError as error:  # groups that do not fit the devices, found in tracing
        raise RunError(f"--norms {lane.name} --sync {config.sync}: {error}") from error
    say(f"compiled {lane.name}")
    seconds = time.perf_counter() - begin

    def train() -> Iterator[Measured]:
        first = start.evaluated(trainer)
        after = drive(trainer, first, turns(drawn, config.evaluations))
        for at in itertools.chain([first], after):
            yield _measured(lane, at, seconds)
            if (at.diverged >= 0).all():
                return

    return train()


def _measured(lane: Lane, at: Progress, seconds: float) -> Measured:
    assert at.evaluation is not None
    rows = [{"norm": lane.name, **row} for row in lane.config.lanes]
    records = [record | {"step_ms": at.step_ms} for record in at.records(rows)]
    parts = [
        {"kind": "part", **row, "step": at.step, "layer": layer, "part": part}
        | {f"p{round(100 * q)}": number(v) for q, v in zip(QUANTILES, values[i], strict=True)}
        for i, row in enumerate(rows)
        for layer, four in at.evaluation.parts.items()
        for part, values in four._asdict().items()
    ]
    return Measured(at.step, at.loss, at.diverged, at.step_ms, seconds, records, parts)


def in_turns(
    lanes: Sequence[Lane], data: Dataset, say: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[Lane, Measured]]:
    """Compiles, two norms at a time; returns what trains them in this process, in turns."""
    drawn = minibatches_of(lanes[0].config, data)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        trainings = list(pool.map(lambda lane: compiled(lane, drawn, say), lanes))

    def train() -> Iterator[tuple[Lane, Measured]]:
        going = list(zip(lanes, trainings, strict=True))
        while going:
            for pair in list(going):
                if (found := next(pair[1], None)) is None:
                    going.remove(pair)
                else:
                    yield pair[0], found

    return train()


def measure(config: Compare, name: str, data: Dataset) -> Iterator[Measured]:
    """What a worker of a cluster does: trains one norm.

    Args:
      config: What to train, of one norm.
      name: What it is called among the others.
      data: The data set.
    """
    hand(data)
    (lane,), _ = lanes(config, config.devices)
    lane.name = name
    yield from compiled(lane, minibatches_of(config, data))


def _check_fit(name: str, trainer: Trainer) -> None:
    try:
        jax.eval_shape(jax.vmap(trainer.init_one), trainer.kernels)
    except ValueError as error:
        raise RunError(
            f"norm {name!r} does not fit the model: {error} Or leave it out with --norms, or "
            "choose another --model."
        ) from error
    require_place(name, trainer.model)
