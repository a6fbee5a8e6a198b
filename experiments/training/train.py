"""One training run on one process or many, that goes on where it was stopped.

Every process runs this same program on its share of the devices. The step is a `shard_map` over
the mesh of all devices; minibatches follow from the seed and the number of the step, so that a run
that was stopped and one that was not are the same numbers, bit for bit, on as many devices.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl

from .. import models
from ..data import Dataset, load
from ..rundir import Record, RunDirectory, RunError, environment
from ..writers import writers
from . import processes, syncs
from .again import check_directory
from .augment import augment
from .checkpoints import Checkpoints
from .config import (
    Train,
    require_division,
    require_fit,
    require_mesh,
    require_place,
    require_reading,
    takes,
)
from .driver import Progress, drive
from .tasks import Evaluation, Task
from .trainer import (
    TrainState,
    abstract,
    accumulate,
    axes_of,
    committed,
    key_of,
    mesh_of,
    minibatches,
)


class Result(NamedTuple):
    """How a run ended.

    Attributes:
      path: The run directory.
      step: The last step that is in a checkpoint.
      summary: What was measured at the end; `None` without an end.
      signal: The signal that asked for a stop, if this process got it, or 0.
      process: Which process this is.
      restarts: How often all processes were started again, of a launch.
      failure: Why it ended before the end, or an empty string.
      usage: Whether that is an error which another start would not mend.
    """

    path: Path
    step: int
    summary: dict[str, Any] | None
    signal: int
    process: int = 0
    restarts: int = 0
    failure: str = ""
    usage: bool = False


def before(record: Record, step: int) -> bool:
    """Whether a run in one piece has a record before it goes on from a step."""
    return record["step"] < step + (record["kind"] == "training")


class Resumed(RunDirectory):
    """The directory of a run that may be there already.

    Args:
      config: What is to be run; another run than the one that is there is an error.
      process: Which process this is; process 0 writes.
    """

    def __init__(self, config: Train, process: int) -> None:
        super().__init__(config.path, "", again=True)
        if process == 0:
            self.write_json("config.json", config.as_json())

    def rewind(self, step: int) -> None:
        """Takes out of the metrics what is to be measured again: all after the training `step`."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        kept = [line for line in whole if before(json.loads(line), step)]
        if kept != lines:
            self.write_bytes(path.name, b"".join(kept))
        (self.path / "summary.json").unlink(missing_ok=True)


@contextlib.contextmanager
def written(
    config: Train, directory: RunDirectory, process: int
) -> Iterator[Callable[[Record], None]]:
    """What keeps records, in the run directory and where --log says; process 0 writes."""
    others = writers(config.log, directory.path, config.as_json()) if process == 0 else []

    def keep(record: Record) -> None:
        directory.append("metrics.jsonl", [record])
        for writer in others:
            writer.write([record])

    try:
        yield keep
    finally:
        for writer in others:
            writer.close()


class Program:
    """The compiled functions of a run, over all devices of all processes.

    Args:
      config: What is to be run.
      data: The data set.
    """

    def __init__(self, config: Train, data: Dataset) -> None:
        self.config, self.data, self.devices = config, data, jax.device_count()
        require_mesh(config.mesh, self.devices)
        require_division(config.batch_size, self.devices, config.microbatches)
        require_reading(config.model, data)
        require_fit(config.batch_size, data)
        mesh = mesh_of(jax.devices(), config.mesh)
        self.axes, each = mesh.axis_names, P(mesh.axis_names)
        self.copied, self.split = NamedSharding(mesh, P()), NamedSharding(mesh, each)
        sync = syncs.parse(config.sync, axes_of(config.mesh), self.devices)
        self.sync = sync if takes(config.norm, "axis_name") else None
        norm = config.norm_of(config.norm, self.sync, population=config.population)
        self.model = models.build(config.model, norm, data.classes, **config.model_options)
        self.task = Task.of(data)
        self.optimizer = config.make_optimizer(config.lr)
        mapped = functools.partial(jax.shard_map, mesh=mesh)
        states = TrainState(P(), each, P())  # type: ignore[arg-type]
        self._step = jax.jit(
            mapped(self._step_shard, in_specs=(states, *[each] * 3), out_specs=(states, P()))
        )
        self._evaluate = jax.jit(
            mapped(self._evaluate_shard, in_specs=(states, *[each] * 3), out_specs=P())
        )
        self._draw = jax.jit(self._drawn)
        self._check()

    def _check(self) -> None:
        """Says no before anything is written: to a norm, to groups that do not fit the devices."""
        config = self.config
        try:
            drawn = jax.eval_shape(self._draw, self._probe())
        except ValueError as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"norm {config.norm!r} does not fit the model: {error}") from error
        require_place(config.norm, self.model)
        params, opt_state = abstract((drawn.params, drawn.opt_state), self.copied)
        norm_state = abstract(drawn.norm_state, self.split, self.devices)
        example = (self.data.train_inputs[0], self.data.train_labels[0], np.int32(0))
        batch = abstract(example, self.split, config.batch_size)
        try:  # the first step is not traced again
            jax.eval_shape(self._step, TrainState(params, norm_state, opt_state), *batch)
        except ValueError as error:
            raise RunError(f"--norm {config.norm} --sync {config.sync}: {error}") from error

    def init(self) -> TrainState:
        """The initial state: norm states `[devices, ...]`, each on its device, the rest copied."""
        new = self._draw(self._probe())
        (params, opt_state), norm_state = self.spread((new.params, new.opt_state), new.norm_state)
        return TrainState(params, norm_state, opt_state)

    def _probe(self) -> np.ndarray:
        """The examples that a data-dependent init sees."""
        return np.asarray(self.task.preprocess(self.data.train_inputs[: self.task.probe]))

    def _drawn(self, probe: Array) -> TrainState:
        """The initial state of one device."""
        config = self.config
        kernels = config.draw_kernels(self.data.classes, [config.seed], probe)
        kernels = jax.tree.map(lambda v: v[0], kernels)
        params, norm_state = models.split(models.complete(self.model, kernels, probe))
        return TrainState(params, norm_state, self.optimizer.init(params))

    def spread(self, copied: Any, split: Any) -> tuple[Any, Any]:
        """Puts what one device has on all of them: copied, or stacked with one row for each."""

        def stack(v: np.ndarray) -> Array:
            return _array(np.broadcast_to(v, (self.devices, *v.shape)), self.split)

        copied, split = jax.tree.map(np.asarray, (copied, split))
        return jax.tree.map(lambda v: _array(v, self.copied), copied), jax.tree.map(stack, split)

    def batches(self, start: int) -> Iterator[tuple[int, tuple[Array, Array, Array]]]:
        """The steps after `start`, and their minibatches; each process reads its own examples.

        Inputs, labels, and the places of the examples in the data set.
        """
        config, data = self.config, self.data
        rows = minibatches(config.seed, len(data.train_inputs), config.batch_size, config.steps)
        for step, row in enumerate(rows[start:], start + 1):
            arrays = (data.train_inputs, data.train_labels)
            inputs, labels = (_array(v, self.split, row) for v in arrays)
            yield step, (inputs, labels, _array(row, self.split))

    def train(
        self, state: TrainState, batch: tuple[Array, Array, Array]
    ) -> tuple[TrainState, np.ndarray]:
        """Takes one step; the loss is `[1, 1]`."""
        state, loss = self._step(state, *batch)
        return state, np.asarray(loss)[None, None]

    def evaluate(self, state: TrainState) -> Evaluation:
        """Measures what is held out, by running statistics merged over the devices."""

        def measure(inputs: np.ndarray, labels: np.ndarray) -> Array:
            padded = -(-len(labels) // self.devices) * self.devices
            rows = np.arange(padded) % len(labels)
            weights = (np.arange(padded) < len(labels)).astype(np.float32)
            shards = (_array(inputs, self.split, rows), _array(labels, self.split, rows))
            return self._evaluate(state, *shards, _array(weights, self.split))[None]

        data, text = self.data, self.data.text
        held = text and measure(text.validation_inputs, text.validation_labels)
        return self.task.evaluation(measure(data.test_inputs, data.test_labels), {}, held)

    def _step_shard(
        self, state: TrainState, inputs: Array, labels: Array, chosen: Array
    ) -> tuple[TrainState, Array]:
        own = jax.tree.map(lambda v: v[0], state.norm_state)
        flat, unravel = ravel_pytree(state.params)  # one collective for all gradients

        def loss(
            flat: Array, own: Any, inputs: Array, labels: Array, chosen: Array
        ) -> tuple[Array, Any]:
            if self.config.augment:
                inputs = augment(self.config.augment, key_of(chosen), inputs)
            losses, after = self.task.losses(self.model, unravel(flat), own, inputs, labels)
            return nl.devices.global_mean(losses, self.axes), after

        parts = self.config.microbatches
        batch = (inputs, labels, chosen)
        value, after, grads = accumulate(loss, flat, own, batch, parts, self.axes)
        if parts > 1:  # typed as if it varied over the devices
            value = lax.pmean(value, self.axes)
        grads = unravel(nl.devices.global_gradient(grads, self.axes))
        after = committed(after, jnp.isfinite(value))
        if (sync := syncs.delayed(self.sync)) is not None:
            after = nl.population.exchange(after, sync)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = self.model.project(optax.apply_updates(state.params, updates))
        return TrainState(params, jax.tree.map(lambda v: v[None], after), opt_state), value

    def _evaluate_shard(
        self, state: TrainState, inputs: Array, labels: Array, weights: Array
    ) -> Array:
        own = jax.tree.map(lambda v: v[0], state.norm_state)
        merged = nl.population.pool_running(own, self.axes)
        variables = {"params": state.params, models.STATE: merged}
        sums, _ = self.task.sums(self.model, variables, inputs, labels, weights)
        return lax.psum(sums, self.axes)


def train(
    config: Train,
    say: Callable[[str], None] = lambda _: None,
    hear: Callable[[Record], None] = lambda _: None,
) -> Result:
    """Trains, from the last checkpoint on if there is one.

    Args:
      config: What to run.
      say: Receives short messages about what is going on, on process 0.
      hear: Receives each record as it is measured, on process 0.

    Raises:
      RunError: If the run cannot start or go on.
    """
    if config.devices:
        try:
            jax.config.update("jax_num_cpu_devices", config.devices)
        except RuntimeError as error:  # the devices are there already
            raise RunError(f"--devices {config.devices}: {error}") from error
    say("waiting for the other processes")
    processes.form(config)
    process, count = jax.process_index(), jax.process_count()
    say = say if process == 0 else lambda _: None
    if config.run_dir is None and count > 1:
        raise RunError(f"{count} processes need a --run-dir that all of them see.")
    check_directory(config)
    data = load(config.dataset, config.data_dir, reading=config.reading, on_progress=say)
    program = Program(config, data)
    directory = Resumed(config, process)
    diary = processes.Diary(directory.path, process)
    diary.write("join", devices=program.devices, processes=count)
    with (
        processes.Watchdog(config.step_timeout, config.grace, diary) as watchdog,
        processes.Stop(directory.path / "stop") as stop,
    ):
        try:
            with written(config, directory, process) as keep:
                told = lambda record: (keep(record), hear(record))  # noqa: E731
                result = _train(config, program, directory, diary, watchdog, stop, say, told)
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
    hear: Callable[[Record], Any],
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
        told = {**environment(), "dataset": program.data.describe()}
        directory.write_json("environment.json", told)
    say("compiling")
    begin = time.perf_counter()
    at = there = Progress.start(state, 1, step=start)
    labels = {"norm": config.norm, "scheme": config.scheme, "lr": config.lr, "seed": config.seed}
    for at in drive(program, there, program.batches(start), evaluate=lambda step: False):
        done = at.step
        watchdog.beat(f"step {done + 1}")
        if first and (done % config.log_every == 0 or done == config.steps):
            hear(*at.records([labels]))
        stopping = stop.reached(done)
        if stopping or done == config.steps or done % config.checkpoint_every == 0:
            watchdog.beat(f"the checkpoint of step {done}", config.grace)
            checkpoints.save(done, at.state)
            watchdog.beat(f"step {done + 1}")
        if stopping and done < config.steps:
            break
    done = at.step
    watchdog.beat(f"the checkpoint of step {done}", config.grace)
    checkpoints.manager.wait_until_finished()
    if done < config.steps:
        diary.write("stop", step=done)
        return Result(directory.path, done, None, stop.signal, jax.process_index())
    watchdog.beat("the evaluation", config.grace)
    say("evaluating")
    at = at.evaluated(program)
    (record,) = at.records([labels])
    summary = {k: v for k, v in record.items() if k != "kind"}
    seconds = time.perf_counter() - begin
    summary |= {**devices, "start_step": start, "seconds": round(seconds, 3)}
    if first:
        hear(record)
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
