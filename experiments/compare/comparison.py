"""The main job: train the same network under every norm on real data, side by side.

    normlab compare --dataset mnist --model conv

All norms see the same minibatches and start from the same kernels (per seed). They take turns, a
stretch of steps each, so their times are measured side by side, and stopping early leaves all of
them equally far. A comparison that was stopped goes on in its directory, to the same numbers.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from .. import models
from ..cluster import Cluster
from ..data import Dataset, hand, load
from ..engine.learn import held_out
from ..engine.records import Records
from ..rundir import Record, RunDirectory, RunError, environment, number
from ..training import syncs
from ..training.again import check_directory
from ..training.config import (
    require_fit,
    require_place,
    require_reading,
    takes,
)
from ..training.driver import Checkpoint, Progress, drive
from ..training.optimizers import at_rates, set_rates
from ..training.trainer import (
    QUANTILES,
    DeviceData,
    Trainer,
    TrainState,
    lengths,
    minibatches,
    set_devices,
    turns,
)
from ..writers import Writer, writers
from . import drawing, kept, remote, tuning
from .config import Compare
from .outcome import Outcome, Track


class Measured(NamedTuple):
    """What was measured of a norm at the beginning, or in a turn.

    Attributes:
      step: Steps done.
      loss: The training loss over the last turn, the mean over all.
      turn: Its steps.
      diverged: For each rate and seed the first step whose loss was not finite, or −1.
      step_seconds: Seconds for a step; `None` at the beginning.
      compile_seconds: What compiling took.
      records: A record of each rate and seed.
      parts: The percentiles of the four parts in every layer.
      at: Where it stands, while it does; `None` of another process.
    """

    step: int
    loss: float
    turn: int
    diverged: np.ndarray
    step_seconds: float | None
    compile_seconds: float
    records: list[Record]
    parts: list[Record]
    at: Progress | None = None


@dataclasses.dataclass
class Lane(Track):
    """One norm, with what trains it.

    Attributes:
      trainer: Trains it.
      build: Makes such a trainer, of a `DeviceData` and kernels.
      resume: Where it goes on, if it was stopped.
    """

    trainer: Trainer = dataclasses.field(kw_only=True)
    build: Callable[..., Trainer] = dataclasses.field(kw_only=True)
    resume: Checkpoint | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a listener hears after a norm's turn; the score is the seeds' mean at its best rate.

    The training loss is the mean over so many last `steps`, rates and seeds.
    """

    norm: str
    step: int
    loss: float
    steps: int
    score: float | None


class Comparison(Outcome):
    """A comparison in the making.

    Args:
      config: What to compare.
      say: Receives short messages about what is going on.
    """

    lanes: list[Lane]

    def __init__(self, config: Compare, say: Callable[[str], None] = lambda _: None) -> None:
        self.say = say
        self.warn: Callable[[str], None] = lambda text: None
        self._writers: list[Writer] = []
        config.require_effects()
        again = check_directory(config)
        with contextlib.ExitStack() as leaving:
            cluster = None
            if config.ray is not None:  # before JAX starts, which does not like what Ray does then
                cluster = Cluster(config.ray, say=self._says, warn=lambda text: self.warn(text))
                leaving.enter_context(cluster)
            # On a cluster the devices are elsewhere; here one is enough to see what fits.
            self.lanes, self.data = lanes(config, 1 if cluster else config.devices, say)
            name = f"compare-{config.dataset}-{config.model}"
            directory = RunDirectory(config.run_dir, name, again=config.run_dir is not None)
            super().__init__(config, self.lanes[0].trainer.data.task, self.lanes, directory)
            directory.lock()
            leaving.callback(directory.release)
            self.checkpoints = kept.Checkpoints(directory)
            if again:
                self._restore()
            directory.write_json("config.json", config.as_json())
            told = {**environment(), "dataset": self.data.describe(), "task": self.task.as_json()}
            directory.write_json("environment.json", told)
            going = [lane for lane in self.lanes if lane.goes_on]
            try:
                if not going:
                    self._turns: Iterator[tuple[Lane, Measured | tuning.Tuned]] = iter(())
                elif cluster:
                    self._turns = remote.turns(cluster, going, self.data)
                else:
                    self._turns = in_turns(going, self.data, say)
            except BaseException:  # Ctrl-C above all: nothing was measured, so nothing is left
                if not again:
                    shutil.rmtree(directory.path)
                raise
            self._leaving = leaving.pop_all()

    def run(self) -> Iterator[Turn]:
        """Trains all norms; yields after each turn of one. Stopping between yields is safe."""
        config = self.config
        with self._leaving as leaving:
            for writer in writers(config.log, self.run_dir.path, config.as_json()):
                leaving.callback(writer.close)
                self._writers.append(writer)
            for lane, found in self._turns:
                if isinstance(found, tuning.Tuned):
                    if lane.tuning is None:
                        lane.tune(found.choice)
                        self.run_dir.append("metrics.jsonl", found.records)
                        for writer in self._writers:
                            writer.write(found.records)
                    continue
                turn = self._record(lane, found)
                if found.step:
                    yield turn

    def finish(self) -> dict[str, Path]:
        """Writes the summary, the figures and the page of what was done; returns their paths."""
        return drawing.finish(self)

    def _says(self, text: str) -> None:
        self.say(text)

    def _restore(self) -> None:
        """Takes over what the directory holds: norms that are done are not trained again."""
        records, stay = kept.read_records(self.run_dir.path), []
        for lane in self.lanes:
            found = records.get((*lane.labels.values(),), Records())
            # A worker of a cluster begins at the beginning.
            checkpoint = self.checkpoints.load(lane.name) if self.config.ray is None else None
            stay += lane.restore(found, checkpoint)
            lane.resume = checkpoint if lane.step > -1 and lane.goes_on else None
        if any(lane.goes_on for lane in self.lanes):  # the last line may be cut
            kept.write_records(self.run_dir, stay)

    def _record(self, lane: Lane, found: Measured) -> Turn:
        """Keeps what was measured; returns what a listener hears."""
        lane.step, lane.diverged = found.step, found.diverged
        lane.compile_seconds = found.compile_seconds
        if found.step_seconds is not None:
            lane.step_seconds.append(found.step_seconds)
        lane.records += found.records
        lane.parts += found.parts
        self.run_dir.append("metrics.jsonl", found.records + found.parts)
        for writer in self._writers:
            writer.write(found.records + found.parts)
        if not lane.goes_on:
            self.checkpoints.drop(lane.name)
        elif found.at is not None:
            self.checkpoints.save(lane.name, found.at)
        score = self.task.score
        alive: dict[float, list[float]] = {}
        for r in found.records:
            if r["test_loss"] is not None:
                alive.setdefault(r["lr"], []).append(r[score.key])
        means = [statistics.fmean(seeds) for seeds in alive.values()]
        scored = score.best(means, default=None)
        return Turn(lane.name, found.step, found.loss, found.turn, scored)


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
    room = 0
    if config.tune:
        held = held_out(data)
        room = len(held.test_labels)
        require_fit(config.batch_size, held)
    mesh = config.mesh if devices == config.devices else ()
    device_data = DeviceData(data, devices, mesh=mesh, room=room)
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
            build = functools.partial(
                Trainer,
                model,
                optimizer,
                synced=synced,
                form="pmap" if len(device_data.axes) == 1 else "shard_map",
                delayed=delayed if takes(name, "axis_name") else None,
                microbatches=config.microbatches,
                augment=config.augment,
            )
            trainer, alone = build(device_data, kernels), one.alone(name)
            _check_fit(name, trainer)
            diverged = np.full(len(config.lanes), -1)
            found.append(Lane(name + where, alone, diverged, trainer=trainer, build=build))
    return found, data


def minibatches_of(config: Compare, data: Dataset) -> list[np.ndarray]:
    """The examples of every step, for each rate and seed."""
    examples = len(data.train_inputs)
    return [_drawn(row["seed"], examples, config.batch_size, config.steps) for row in config.lanes]


@functools.lru_cache(maxsize=32)
def _drawn(seed: int, examples: int, batch_size: int, steps: int) -> np.ndarray:
    """Those of a seed, which all norms share."""
    return minibatches(seed, examples, batch_size, steps)


def compiled(
    lane: Lane, data: Dataset, say: Callable[[str], None] = lambda _: None
) -> Iterator[Measured | tuning.Tuned]:
    """Compiles for every length of stretch; returns what trains the norm.

    It yields what was measured at the beginning and after each turn, until all diverged; before
    that the choice of a rate, if there is one to make.

    Args:
      lane: The norm.
      data: The data set.
      say: Hears that it is compiled.
    """
    config, trainer = lane.config, lane.trainer
    begin = time.perf_counter()
    state, device_data = trainer.init(), trainer.data
    where = device_data.devices, device_data.mapped

    def at_its_rates() -> TrainState:
        rates = [row["lr"] for row in lane.config.lanes]
        return state._replace(opt_state=set_rates(state.opt_state, rates, *where))

    try:
        steps = lengths(config.steps, config.evaluations)
        trainer.compile(at_its_rates(), steps, config.batch_size)
    except ValueError as error:  # groups that do not fit the devices, found in tracing
        raise RunError(f"--norms {lane.name} --sync {config.sync}: {error}") from error
    say(f"compiled {lane.name}")
    seconds = time.perf_counter() - begin

    def train() -> Iterator[Measured | tuning.Tuned]:
        if lane.config.tune:
            found = tuning.tune(lane, data, config.rates or tuning.grid(config.lr))
            yield found
            if lane.tuning is None:  # nobody else did
                lane.tune(found.choice)
        start = Progress.start(at_its_rates(), len(lane.config.lanes), lane.resume)
        first = [] if lane.resume else [start.evaluated(trainer)]
        drawn = minibatches_of(lane.config, data)
        after = drive(trainer, (first or [start])[0], turns(drawn, config.evaluations))
        for at in itertools.chain(first, after):
            yield _measured(lane, at, seconds)
            if (at.diverged >= 0).all():
                return

    return train()


def _measured(lane: Lane, at: Progress, seconds: float) -> Measured:
    assert at.evaluation is not None
    rows = [{**lane.labels, **row} for row in lane.config.lanes]
    records = [record | {"step_seconds": at.step_seconds} for record in at.records(rows)]
    parts = [
        {"kind": "part", **row, "step": at.step, "layer": layer, "part": part}
        | {f"p{round(100 * q)}": number(v) for q, v in zip(QUANTILES, values[i], strict=True)}
        for i, row in enumerate(rows)
        for layer, four in at.evaluation.parts.items()
        for part, values in four._asdict().items()
    ]
    turn, took = 0 if at.losses is None else len(at.losses), at.step_seconds
    return Measured(at.step, at.loss, turn, at.diverged, took, seconds, records, parts, at)


def in_turns(
    lanes: Sequence[Lane], data: Dataset, say: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[Lane, Measured | tuning.Tuned]]:
    """Compiles, two norms at a time; returns what trains them in this process, in turns."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        trainings = list(pool.map(lambda lane: compiled(lane, data, say), lanes))

    def train() -> Iterator[tuple[Lane, Measured | tuning.Tuned]]:
        going = list(zip(lanes, trainings, strict=True))
        while going:
            for pair in list(going):
                if (found := next(pair[1], None)) is None:
                    going.remove(pair)
                else:
                    yield pair[0], found

    return train()


def measure(config: Compare, name: str, data: Dataset) -> Iterator[Measured | tuning.Tuned]:
    """What a worker of a cluster does: trains one norm.

    Args:
      config: What to train, of one norm.
      name: What it is called among the others.
      data: The data set.
    """
    hand(data)
    (lane,), _ = lanes(config, config.devices)
    lane.name = name
    for found in compiled(lane, data):
        yield found._replace(at=None) if isinstance(found, Measured) else found


def _check_fit(name: str, trainer: Trainer) -> None:
    try:
        jax.eval_shape(jax.vmap(trainer.init_one), trainer.kernels)
    except ValueError as error:
        raise RunError(
            f"norm {name!r} does not fit the model: {error} Or leave it out with --norms, or "
            "choose another --model."
        ) from error
    require_place(name, trainer.model)
