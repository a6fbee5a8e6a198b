"""What questions share: the config, the laboratory that trains, the verdict, and the run."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jax.typing import DTypeLike
from matplotlib.figure import Figure

import normlab as nl
from experiments import figures, models
from experiments.compare import set_devices, stretches
from experiments.data import Dataset, load
from experiments.rundir import RunDirectory, RunError, environment
from experiments.trainer import (
    FORMS,
    DeviceData,
    Form,
    Trainer,
    TrainState,
    minibatches,
)

Record = dict[str, Any]
Decision = Literal["holds", "fails", "undecided"]

CONFIDENCE = 0.95
"""Of every interval."""

FIRST_STEPS = 5
"""Steps over which `pmap` and `shard_map` are compared: later ones add up rounding."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One network with batch norm, data-parallel: what the studies of its devices share.

    Attributes:
      dataset: A name of `data.NAMES`.
      model: A name of `models.MODELS`.
      devices: How many share a batch.
      per_device: Examples of each batch on each device.
      steps: Optimizer steps.
      evaluations: How often to measure on the way.
      lr: Learning rate of SGD with momentum 0.9.
      decay: Weight of the old value in the running statistics.
      seeds: Seeds 0, 1, …, trained side by side.
      form: How the step runs on the devices; the other form is compared with it.
      data_dir: Where prepared data sets are kept.
    """

    dataset: str = "fashion_mnist"
    model: str = "mlp"
    devices: int = 8
    per_device: int = 4
    steps: int = 1000
    evaluations: int = 10
    lr: float = 0.05
    decay: float = 0.9
    seeds: int = 5
    form: Form = "pmap"
    data_dir: Path | None = None


class Question(Protocol):
    """What a file of this package is."""

    QUICK: Config
    FULL: Config

    def run(self, config: Any) -> Iterator[Record]:
        """Yields what is measured."""
        ...

    def figure(self, records: Sequence[Record]) -> Figure:
        """Draws it."""
        ...

    def verdict(self, records: Sequence[Record]) -> tuple[Verdict, ...]:
        """Decides each claim."""
        ...


class Verdict(NamedTuple):
    """What became of a claim.

    Attributes:
      claim: That the effect lies between `at_least` and `at_most`.
      decision: `holds` if the whole interval does, `fails` if none of it does, else `undecided`.
      effect: The mean over seeds.
      low, high: Its confidence interval, of Student's t over the seeds.
      at_least, at_most: The thresholds, which were written before the run.
      unit: Of the effect.
      seeds: How many there were.
    """

    claim: str
    decision: Decision
    effect: float
    low: float
    high: float
    at_least: float
    at_most: float
    unit: str
    seeds: int


def decide(
    claim: str,
    effects: Iterable[float],
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    unit: str = "",
    geometric: bool = False,
) -> Verdict:
    """Decides a claim by the effect in each seed.

    One seed, or an effect that is not finite, has no interval: the claim is undecided. With
    `geometric`, for positive effects of any order of magnitude, mean and interval are those of the
    logarithm.

    >>> decide("it is small", [0.1, 0.12, 0.11], at_most=0.5).decision
    'holds'
    """
    values = np.asarray(list(effects), float)
    if geometric:
        values = np.log(np.maximum(values, np.finfo(float).tiny))
    mean, low, high = float(values.mean()) if values.size else math.nan, -math.inf, math.inf
    if values.size > 1 and np.isfinite(values).all():
        half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, values.size - 1) * scipy.stats.sem(values)
        low, high = mean - float(half), mean + float(half)
    if geometric:
        with np.errstate(over="ignore"):
            mean, low, high = (float(np.exp(v)) for v in (mean, low, high))
    decision: Decision = "undecided"
    if at_least <= low and high <= at_most:
        decision = "holds"
    elif high < at_least or low > at_most:
        decision = "fails"
    return Verdict(claim, decision, mean, low, high, at_least, at_most, unit, values.size)


@functools.lru_cache(maxsize=1)
def dataset(name: str, data_dir: Path | None) -> Dataset:
    """The data set, read once."""
    return load(name, data_dir)


class Lab:
    """A data set on the devices, with kernels and minibatches that all conditions share.

    Args:
      config: What to train.
      dtype: In which type.
      devices: If not those of the config, how many.
    """

    def __init__(
        self, config: Config, dtype: DTypeLike = jnp.float32, devices: int | None = None
    ) -> None:
        self.config, self.dtype = config, dtype
        set_devices(config.devices)
        data = dataset(config.dataset, config.data_dir)
        self.classes, self.labels = data.classes, data.train_labels
        self.data = DeviceData(data, devices or config.devices, dtype)
        with jax.enable_x64(False):  # the same numbers in every type
            kernels = models.draw_kernels(
                config.model,
                data.classes,
                range(config.seeds),
                self.data.probe.astype(np.float32),
            )
        self.kernels = jax.tree.map(lambda v: np.asarray(v, self.data.probe.dtype), kernels)
        batch = config.devices * config.per_device
        each = [
            minibatches(seed, self.data.examples, batch, config.steps)
            for seed in range(config.seeds)
        ]
        self.indices = np.stack(each, axis=1)  # [steps, seeds, batch]

    def trainer(self, norm: nl.Norm, form: Form, *, synced: bool = True, **options: Any) -> Trainer:
        """A trainer of the config's model with this norm; the options are those of `Trainer`."""
        model = models.build(self.config.model, norm, self.classes)
        optimizer = optax.sgd(self.config.lr, momentum=0.9)
        return Trainer(
            model, optimizer, self.data, self.kernels, synced=synced, form=form, **options
        )

    def batch_norm(self, sync: nl.Sync) -> nl.Norm:
        """Batch norm over these devices and parts of their batches."""
        return nl.get("batch", axis_name=sync, decay=self.config.decay)

    def start(self, trainer: Trainer) -> TrainState:
        """The initial state, in the laboratory's type."""
        state = trainer.init()
        if self.dtype == jnp.float32:
            return state
        cast = jax.tree.map(
            lambda v: np.asarray(v, self.dtype if v.dtype == jnp.float32 else v.dtype), state
        )
        return jax.device_put(cast, self.data.mapped)

    def learn(
        self,
        condition: str,
        sync: nl.Sync,
        *,
        exchanged: bool = True,
        indices: np.ndarray | None = None,
        measure: Callable[[Trainer, TrainState], Iterable[Record]] = lambda *_: (),
        **labels: Any,
    ) -> Iterator[Record]:
        """Trains batch norm under a `Sync`; yields evaluations, and how far the forms differ.

        Args:
          condition: What the records are to call it.
          sync: Which examples are one batch.
          exchanged: Whether delayed statistics are exchanged after each step.
          indices: The minibatches, if not the laboratory's.
          measure: Yields further records at each evaluation.
          **labels: What else the records are to say.
        """
        config = self.config
        indices = self.indices if indices is None else indices
        base = {"condition": condition, **labels}
        norm = self.batch_norm(sync)
        options: dict[str, Any] = {"synced": bool(sync.names) and not sync.every}
        if sync.every and exchanged:
            options["delayed"] = sync
        (other_form,) = set(FORMS) - {config.form}
        trainer, other = (self.trainer(norm, f, **options) for f in (config.form, other_form))
        marks = stretches(config.steps, config.evaluations)
        state, first = self.start(trainer), indices[: marks[0][1]]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # both compile at once
            there = pool.submit(lambda: other.train(self.start(other), first)[1])
            trainer.compile(state, {stop - start for start, stop in marks}, indices.shape[-1])
        state, losses = trainer.train(state, first)
        yield {
            "kind": "forms",
            **base,
            "steps": min(FIRST_STEPS, len(first)),
            "loss_gap": relative(there.result()[:FIRST_STEPS], losses[:FIRST_STEPS]),
        }
        for start, stop in marks:
            if start:
                state, losses = trainer.train(state, indices[start:stop])
            evaluation = trainer.evaluate(state)
            for seed in range(config.seeds):
                yield {
                    "kind": "evaluation",
                    **base,
                    "seed": seed,
                    "step": stop,
                    "train_loss": number(losses[:, seed].mean()),
                    "test_loss": number(evaluation.loss[seed]),
                    "accuracy": number(100 * evaluation.accuracy[seed]),
                }
            for record in measure(trainer, state):
                yield {**record, **base, "step": stop}


def relative(actual: Any, expected: Any) -> float:
    """The largest difference of any leaf, relative to the largest value of that leaf."""
    worst = 0.0
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        gap = np.abs(a - e).max(initial=0) / (np.abs(e).max(initial=0) or 1)
        worst = float(np.maximum(worst, gap))
    return worst


def number(value: Any) -> float | None:
    """A JSON number; null where it is not finite."""
    return float(value) if math.isfinite(value) else None


def by_seed(records: Iterable[Record], key: str, **wanted: Any) -> np.ndarray:
    """The last value of `key` in each seed, of the records that say what is wanted."""
    last: dict[int, float] = {}
    for record in records:
        if key in record and all(record.get(k) == v for k, v in wanted.items()):
            last[record["seed"]] = math.nan if record[key] is None else record[key]
    return np.array([last[seed] for seed in sorted(last)])


def accuracy(records: Iterable[Record], condition: str, **wanted: Any) -> np.ndarray:
    """The test accuracy of each seed at the end, in percent."""
    return by_seed(records, "accuracy", kind="evaluation", condition=condition, **wanted)


# --- A run ------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a run left.

    Attributes:
      path: The run directory.
      verdicts: One for each claim; empty if the run was interrupted.
      forms: The largest difference between `pmap` and `shard_map`; `None` if not compared.
      complete: Whether it came to its end.
    """

    path: Path
    verdicts: tuple[Verdict, ...]
    forms: float | None
    complete: bool


def answer(
    question: Question,
    name: str,
    config: Config,
    run_dir: Path | None,
    say: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Runs a question and keeps what it measures.

    The directory gets `config.json`, `environment.json`, `records.jsonl` as it grows, and at the
    end `figure.png`, `figure.svg` and `verdict.json`. Ctrl-C keeps what was measured; if nothing
    was, nothing is left.

    Args:
      question: A module of this package.
      name: Its name.
      config: Usually its `QUICK` or `FULL`.
      run_dir: A new directory; by default `runs/NAME-TIME`.
      say: Receives short messages on the way.

    Raises:
      RunError: If the directory cannot be made or written, or the devices are too few.
      DataError: If the data cannot be had.
    """
    set_devices(config.devices)
    say(f"{name}: reading {config.dataset}")
    data = dataset(config.dataset, config.data_dir)
    batch = config.devices * config.per_device
    if batch > len(data.train_images):
        raise RunError(
            f"{name}: a batch of {batch} examples, but {config.dataset} has "
            f"{len(data.train_images)}. Lower per_device."
        )
    directory = RunDirectory(run_dir, name)
    records: list[Record] = []
    try:
        values = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
        directory.write_json("config.json", {"question": name, **values})
        origin = {"name": data.name, "origin": data.origin, "sha256": data.checksum}
        directory.write_json("environment.json", {**environment(), "dataset": origin})
        say(f"{name}: compiling")
        for record in question.run(config):
            directory.append("records.jsonl", [record])
            records.append(record)
            step = f", step {record['step']} of {config.steps}" if "step" in record else ""
            say(f"{name}: {record['condition']}{step}")
    except BaseException as error:
        if not records:
            shutil.rmtree(directory.path, ignore_errors=True)
        if records and isinstance(error, KeyboardInterrupt):
            return Answer(directory.path, (), _forms(records), False)
        raise
    verdicts = question.verdict(records)
    directory.write_json("verdict.json", [_as_json(v) for v in verdicts])
    picture = question.figure(records)
    for kind in ("png", "svg"):
        directory.write_bytes(f"figure.{kind}", figures.encode(picture, kind))
    return Answer(directory.path, verdicts, _forms(records), True)


def _forms(records: Iterable[Record]) -> float | None:
    gaps = [record["loss_gap"] for record in records if record["kind"] == "forms"]
    return max(gaps, default=None)


def _as_json(verdict: Verdict) -> dict[str, Any]:
    values = verdict._asdict()
    return {k: number(v) if isinstance(v, float) else v for k, v in values.items()}
