"""One training run on one process or many, that goes on where it was stopped.

Every process runs this same program on its share of the devices. The step is a `shard_map` over
the mesh of all devices; minibatches follow from the seed and the number of the step, so that a run
that was stopped and one that was not are the same numbers, bit for bit, on as many devices.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from normlab.population.by_name import require as require_population
from normlab.population.by_name import takes

from .. import models
from ..compare.comparison import Compare
from ..data import NAMES, Dataset, load
from ..rundir import CHECKOUT, RunDirectory, RunError, environment
from . import processes, syncs
from .checkpoints import Checkpoints
from .trainer import AXIS, OPTIMIZERS, TrainState, accumulate, minibatches

PROBE = 256
"""Training images on which a data-dependent init looks."""

FREE = (
    *("steps", "checkpoint_every", "keep", "log_every", "data_dir", "run_dir", "devices"),
    *("coordinator", "processes", "process", "cluster", "start_timeout", "heartbeat_timeout"),
    *("shutdown_timeout", "step_timeout", "grace"),
)
"""Options that may change when a run goes on: they change no number up to a given step."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one network, data-parallel, in one process or many; go on where it was stopped.

    The same command with the same --run-dir goes on from the last checkpoint. Under Slurm,
    Kubernetes and on TPU pods the processes find each other; `launch` starts them elsewhere.
    """

    norm: str = "batch"
    """Which norm (`python -m experiments list`)."""

    sync: str = "all"
    """Over which devices batch norm measures: all, local, groups=2, ring=1, virtual=64, ghost=4."""

    model: str = "conv"
    """conv (three 3×3 convolutions, ReLU), mlp (three layers of 100 sigmoids), or another of
    `python -m experiments list`."""

    dataset: str = "mnist"
    """mnist, fashion_mnist, cifar10 or digits (tiny, needs no download)."""

    batch_size: int = 128
    """Examples per optimizer step, over all devices."""

    steps: int = 200
    """Optimizer steps; more than before lets a run that is done go on."""

    optimizer: Literal["momentum", "sgd", "adam"] = "momentum"
    """Plain SGD, SGD with momentum 0.9, or Adam."""

    lr: float = 0.05
    """Learning rate."""

    seed: int = 0
    """Draws the kernels and the minibatches."""

    decay: float = 0.9
    """Weight of the old value in batch norm's running statistics."""

    population: str = "debiased"
    """What batch norm keeps: debiased, ema, cumulative, renorm, frozen, or batch (nothing)."""

    microbatches: int = 1
    """Parts, one after the other, into which a device cuts its share of a batch."""

    checkpoint_every: int = 50
    """Steps between checkpoints; there is one at the end and one at a stop as well."""

    keep: int = 2
    """How many checkpoints to keep."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    devices: int = 0
    """On a CPU, devices that each process makes; 0 takes those that there are."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""

    run_dir: Path | None = None
    """Where the results go; the place of a run of the same options lets that run go on. By default
    runs/train-DATASET-MODEL-TIME, for one process; several must share a directory."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where no cluster says it; with --processes and --process."""

    processes: int = 1
    """With --coordinator: how many processes there are."""

    process: int = 0
    """With --coordinator: which of them this is."""

    cluster: Literal["auto", "yes", "no"] = "auto"
    """Whether to ask the cluster for the other processes: if its variables are there, or always
    (TPU VMs have none), or never."""

    start_timeout: int = 120
    """Seconds in which all processes must have started."""

    heartbeat_timeout: int = 10
    """Seconds after which a process that is not heard of is dead, and the others end."""

    shutdown_timeout: int = 8
    """Seconds that a process that is done waits for the others."""

    step_timeout: float = 60.0
    """Seconds for a step; the watchdog ends a process that is over it."""

    grace: float = 600.0
    """Seconds for the first step, which compiles, for a checkpoint and for the evaluation."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        for name in (
            *("batch_size", "steps", "keep", "log_every", "checkpoint_every", "processes"),
            "microbatches",
            *("start_timeout", "heartbeat_timeout", "shutdown_timeout"),
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "step_timeout", "grace"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, value, "positive and finite")
        _require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        _require(self.devices >= 0, "devices", self.devices, "0 or more")
        last = f"one of 0 to {self.processes - 1}"
        _require(0 <= self.process < self.processes, "process", self.process, last)
        _require(self.dataset in NAMES, "dataset", self.dataset, f"one of {', '.join(NAMES)}")
        together = self.processes == 1 or self.coordinator is not None
        _require(together, "processes", self.processes, "beside a --coordinator HOST:PORT")
        try:
            models.require(self.model)
            nl.row(self.norm)
            require_population(self.population)
        except ValueError as error:  # an unknown name
            raise RunError(str(error)) from None
        syncs.parse(self.sync, AXIS)

    def build_norm(self, sync: nl.devices.AxisName | None) -> nl.Norm:
        """The norm, with the options of this run."""
        if self.norm == "batch":
            options = {"decay": self.decay} if takes(self.population, "decay") else {}
            return nl.get("batch", population=self.population, axis_name=sync, **options)
        return Compare(devices=1, batch_size=1).norm(self.norm)

    def as_json(self) -> dict[str, Any]:
        """The options that the numbers depend on."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE}


class Result(NamedTuple):
    """How a run ended.

    Attributes:
      path: The run directory.
      step: The steps that are done, all of them in a checkpoint.
      summary: What was measured at the end; `None` if the run was asked to stop before.
      signal: The signal that asked, if this process got it.
      process: Which process this is.
    """

    path: Path
    step: int
    summary: dict[str, Any] | None
    signal: int
    process: int


class Resumed(RunDirectory):
    """The directory of a run that may be there already.

    Args:
      config: What is to be run; another run than the one that is there is an error.
      process: Which process this is; process 0 writes.
    """

    def __init__(self, config: Train, process: int) -> None:
        self.path = (config.run_dir or default_path(config)).expanduser().resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the run directory {self.path}: {error}.") from error
        if process == 0:
            self.write_json("config.json", config.as_json())

    def rewind(self, step: int) -> None:
        """Takes out of the metrics what is to be measured again: everything after `step`."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        if kept != lines:
            self.write_bytes(path.name, b"".join(kept))
        (self.path / "summary.json").unlink(missing_ok=True)


def default_path(config: Train) -> Path:
    """Where a run goes that is not told."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return CHECKOUT / "runs" / f"train-{config.dataset}-{config.model}-{now}"


def check_batch(config: Train, devices: int) -> None:
    """Raises RunError if the batch does not divide over the devices."""
    parts = devices * config.microbatches
    if config.batch_size % parts:
        near = max(config.batch_size // parts, 1) * parts
        cut = f" times --microbatches {config.microbatches}" if config.microbatches > 1 else ""
        raise RunError(
            f"--batch-size {config.batch_size} does not divide over {devices} devices{cut}. Use a "
            f"batch size of {near}, say."
        )


def check_directory(config: Train) -> None:
    """Raises RunError if the run directory holds something other than this run."""
    path = config.run_dir
    if path is None or not path.exists():
        return
    try:
        there = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        if path.is_dir() and not any(path.iterdir()):
            return
        raise RunError(
            f"{path} exists and is not the directory of a run. Choose another --run-dir."
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path / 'config.json'}: {error}.") from None
    here = json.loads(json.dumps(config.as_json()))
    differ = [
        f"--{name.replace('_', '-')} {there.get(name, '?')} and not {value}"
        for name, value in here.items()
        if there.get(name, "?") != value
    ]
    if differ or set(there) != set(here):
        raise RunError(
            f"the run directory {path} is that of another run: "
            f"{', '.join(differ) or 'of another command'}. Choose another --run-dir, or give the "
            "same options to go on with that run."
        )


class Program:
    """The compiled functions of a run, over all devices of all processes.

    Args:
      config: What is to be run.
      data: The data set.
    """

    def __init__(self, config: Train, data: Dataset) -> None:
        self.config, self.data, self.devices = config, data, jax.device_count()
        check_batch(config, self.devices)
        if config.batch_size > len(data.train_images):
            raise RunError(
                f"--batch-size {config.batch_size} is larger than {config.dataset}, which has "
                f"{len(data.train_images)} training examples. Use a smaller batch."
            )
        mesh = Mesh(np.array(jax.devices()), (AXIS,), axis_types=(AxisType.Auto,))
        self.copied, self.split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
        pixels = data.train_images[:10_000].astype(np.float32)
        self._mean, self._std = float(pixels.mean()), float(pixels.std())
        self.sync = syncs.parse(config.sync, AXIS, self.devices) if config.norm == "batch" else None
        self.model = models.build(config.model, config.build_norm(self.sync), data.classes)
        self.optimizer = OPTIMIZERS[config.optimizer](config.lr)
        mapped = functools.partial(jax.shard_map, mesh=mesh)
        states = TrainState(P(), P(AXIS), P())  # type: ignore[arg-type]
        self.step = jax.jit(
            mapped(self._step, in_specs=(states, P(AXIS), P(AXIS)), out_specs=(states, P()))
        )
        self._evaluate = jax.jit(
            mapped(self._evaluate_shard, in_specs=(states, *[P(AXIS)] * 3), out_specs=P())
        )

    def preprocess(self, images: Any) -> Array:
        """Pixels as float32, shifted and scaled by two numbers taken from the training set."""
        return (jnp.asarray(images).astype(jnp.float32) - self._mean) / self._std

    def init(self) -> TrainState:
        """The initial state: norm states `[devices, ...]`, each on its device, the rest copied."""
        probe = np.asarray(self.preprocess(self.data.train_images[:PROBE]))
        config = self.config

        @jax.jit
        def draw() -> TrainState:
            kernels = models.draw_kernels(config.model, self.data.classes, [config.seed], probe)
            kernels = jax.tree.map(lambda v: v[0], kernels)
            params, norm_state = models.split(models.complete(self.model, kernels, probe))
            return TrainState(params, norm_state, self.optimizer.init(params))

        try:
            new = draw()
        except ValueError as error:
            raise RunError(f"norm {config.norm!r} does not fit the model: {error}") from error
        (params, opt_state), norm_state = self.spread((new.params, new.opt_state), new.norm_state)
        return TrainState(params, norm_state, opt_state)

    def spread(self, copied: Any, split: Any) -> tuple[Any, Any]:
        """Puts what one device has on all of them: copied, or stacked with one row for each."""

        def stack(v: np.ndarray) -> Array:
            return _array(np.broadcast_to(v, (self.devices, *v.shape)), self.split)

        copied, split = jax.tree.map(np.asarray, (copied, split))
        return jax.tree.map(lambda v: _array(v, self.copied), copied), jax.tree.map(stack, split)

    def batches(self, start: int) -> Iterator[tuple[Array, Array]]:
        """The minibatches from step `start` on; each process reads its own examples."""
        config, data = self.config, self.data
        rows = minibatches(config.seed, len(data.train_images), config.batch_size, config.steps)
        for row in rows[start:]:
            yield (
                _array(data.train_images, self.split, row),
                _array(data.train_labels, self.split, row),
            )

    def evaluate(self, state: TrainState) -> tuple[float, float]:
        """Loss and accuracy on the test set, by running statistics merged over the devices."""
        images, labels = self.data.test_images, self.data.test_labels
        padded = -(-len(labels) // self.devices) * self.devices
        rows = np.arange(padded) % len(labels)
        weights = (np.arange(padded) < len(labels)).astype(np.float32)
        shards = (_array(images, self.split, rows), _array(labels, self.split, rows))
        loss, accuracy = self._evaluate(state, *shards, _array(weights, self.split))
        return float(loss), float(accuracy)

    def _step(self, state: TrainState, images: Array, labels: Array) -> tuple[TrainState, Array]:
        own = jax.tree.map(lambda v: v[0], state.norm_state)
        flat, unravel = ravel_pytree(state.params)  # one collective for all gradients

        def loss(flat: Array, own: Any, images: Array, labels: Array) -> tuple[Array, Any]:
            logits, changed = self.model.apply(
                {"params": unravel(flat), models.STATE: own},
                self.preprocess(images),
                train=True,
                mutable=[models.STATE],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return nl.devices.global_mean(losses, AXIS), changed.get(models.STATE, own)

        parts = self.config.microbatches
        value, after, grads = accumulate(loss, flat, own, (images, labels), parts)
        if parts > 1:  # typed as if it varied over the devices
            value = lax.pmean(value, AXIS)
        grads = unravel(nl.devices.global_gradient(grads, AXIS))
        after = nl.population.commit(after, jnp.isfinite(value))
        if isinstance(self.sync, nl.Sync) and self.sync.every:
            after = nl.population.exchange(after, self.sync)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, jax.tree.map(lambda v: v[None], after), opt_state), value

    def _evaluate_shard(
        self, state: TrainState, images: Array, labels: Array, weights: Array
    ) -> tuple[Array, Array]:
        merged = nl.population.pool_running(jax.tree.map(lambda v: v[0], state.norm_state), AXIS)
        variables = {"params": state.params, models.STATE: merged}
        logits: Any = self.model.apply(variables, self.preprocess(images), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = (logits.argmax(-1) == labels).astype(weights.dtype)
        sums = lax.psum(((weights * losses).sum(), (weights * right).sum(), weights.sum()), AXIS)
        return sums[0] / sums[2], sums[1] / sums[2]


def train(config: Train, say: Callable[[str], None] = lambda _: None) -> Result:
    """Trains, from the last checkpoint on if there is one.

    Args:
      config: What to run.
      say: Receives short messages about what is going on, on process 0.

    Raises:
      RunError: If the run cannot start or go on.
    """
    if config.devices:
        try:
            jax.config.update("jax_num_cpu_devices", config.devices)
        except RuntimeError as error:  # the devices are there already
            raise RunError(f"--devices {config.devices}: {error}") from error
    say("waiting for the other processes")
    processes.form(
        **{
            name: getattr(config, name)
            for name in (
                *("coordinator", "processes", "process", "cluster", "start_timeout"),
                *("heartbeat_timeout", "shutdown_timeout"),
            )
        }
    )
    process, count = jax.process_index(), jax.process_count()
    say = say if process == 0 else lambda _: None
    if config.run_dir is None and count > 1:
        raise RunError(f"{count} processes need a --run-dir that all of them see.")
    check_directory(config)
    program = Program(config, load(config.dataset, config.data_dir, on_progress=say))
    directory = Resumed(config, process)
    diary = processes.Diary(directory.path, process)
    diary.write("join", devices=program.devices, processes=count)
    with (
        processes.Watchdog(config.step_timeout, config.grace, diary) as watchdog,
        processes.Stop(directory.path / "stop") as stop,
    ):
        try:
            result = _train(config, program, directory, diary, watchdog, stop, say)
            watchdog.beat("the end of the other processes", config.grace)
            if count > 1:
                jax.distributed.shutdown()
            return result
        except BaseException as error:
            noticed = isinstance(error, jax.errors.JaxRuntimeError) and count > 1
            text, trace = explain(error), traceback.format_exc()
            usage = isinstance(error, RunError)
            diary.write("failure", text=text, usage=usage, noticed=noticed, traceback=trace)
            raise


def explain(error: BaseException) -> str:
    """One line about an error: what it is and where it comes from."""
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        return f"another process is gone, or the network ({processes.gist(error)})."
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {processes.gist(error)}{at}"


def _train(
    config: Train,
    program: Program,
    directory: Resumed,
    diary: processes.Diary,
    watchdog: processes.Watchdog,
    stop: processes.Stop,
    say: Callable[[str], None],
) -> Result:
    say("looking for a checkpoint")
    first = jax.process_index() == 0
    checkpoints = Checkpoints(directory.path, config.keep)
    start, state = checkpoints.restore(program, program.init())
    if start > config.steps:
        raise RunError(
            f"the checkpoint in {directory.path} is of step {start}, after the last of --steps "
            f"{config.steps}. Ask for at least as many steps."
        )
    devices = {"devices": program.devices, "processes": jax.process_count()}
    diary.write("start", step=start)
    if first:
        directory.rewind(start)
        directory.write_json("environment.json", environment())
    say("compiling")
    begin, loss, done = time.perf_counter(), math.nan, start
    for batch in program.batches(start):
        try:
            state, value = program.step(state, *batch)
        except ValueError as error:  # groups that do not fit the devices, found in tracing
            if done > start:
                raise
            raise RunError(f"--norm {config.norm} --sync {config.sync}: {error}") from error
        loss, done = float(value), done + 1
        watchdog.beat(f"step {done + 1}")
        if first and (done % config.log_every == 0 or done == config.steps):
            record = {"step": done, "loss": loss if math.isfinite(loss) else None}
            directory.append("metrics.jsonl", [record])
            say(f"step {done}/{config.steps}, loss {loss:.4f}")
        stopping = stop.reached(done)
        if stopping or done == config.steps or done % config.checkpoint_every == 0:
            watchdog.beat(f"the checkpoint of step {done}", config.grace)
            checkpoints.save(done, state)
            watchdog.beat(f"step {done + 1}")
        if stopping and done < config.steps:
            break
    watchdog.beat(f"the checkpoint of step {done}", config.grace)
    checkpoints.manager.wait_until_finished()
    if done < config.steps:
        diary.write("stop", step=done)
        return Result(directory.path, done, None, stop.signal, jax.process_index())
    watchdog.beat("the evaluation", config.grace)
    say("evaluating")
    test_loss, accuracy = program.evaluate(state)
    seconds = time.perf_counter() - begin
    summary = {"step": done, "loss": test_loss, "accuracy": accuracy}
    summary |= {**devices, "start": start, "seconds": round(seconds, 3)}
    if first:
        directory.write_json("summary.json", summary)
    diary.write("end", step=done)
    return Result(directory.path, done, summary, 0, jax.process_index())


def _array(values: np.ndarray, sharding: NamedSharding, rows: np.ndarray | None = None) -> Array:
    """A global array of `values`, or of their `rows`; each process reads what its devices hold."""
    if rows is None:
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    def own(index: Any) -> np.ndarray:
        return values[rows[index[0]]]

    return jax.make_array_from_callback((len(rows), *values.shape[1:]), sharding, own)


def _require(holds: bool, option: str, given: Any, expected: str) -> None:
    if not holds:
        raise RunError(f"--{option.replace('_', '-')}: got {given}; it must be {expected}.")
