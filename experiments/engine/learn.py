"""Training as a condition: one norm, many lanes side by side, with instruments on the way."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import normlab as nl

from .. import models
from ..data import Dataset, load
from ..rundir import Record, number
from ..training import optimizers
from ..training.config import require_fit
from ..training.driver import Checkpoint, Progress, drive
from ..training.optimizers import Make, at_rates, set_rates
from ..training.trainer import (
    DeviceData,
    Trainer,
    TrainState,
    lengths,
    minibatches,
    turns,
)
from .question import Config, Measure

Lane = Mapping[str, Any]
"""What sets one of the nets apart that are trained side by side: its `seed`, and perhaps its `lr`
and the `sd` of its initial kernels. Its records say so."""


class Net(NamedTuple):
    """A net on its way, as an instrument sees it.

    Attributes:
      model: The model.
      params: Its parameters.
      norm_state: Its norms' states.
      images, labels: A batch of training examples, preprocessed, the same at every evaluation.
      lr: The learning rate.
    """

    model: nn.Module
    params: Any
    norm_state: Any
    images: Array
    labels: Array
    lr: Array

    def loss(self, params: Any) -> Array:
        """The training loss on the batch, with its own statistics, as a function of the params."""
        variables = {"params": params, models.STATE: self.norm_state}
        logits, _ = self.model.apply(variables, self.images, train=True, mutable=[models.STATE])
        return optax.softmax_cross_entropy_with_integer_labels(logits, self.labels).mean()

    def activations(self, *, train: bool = False) -> dict[str, models.Activations]:
        """What flows through each layer that has a norm or could have one, on the batch."""
        variables = {"params": self.params, models.STATE: self.norm_state}
        mutable = [models.ACTIVATIONS, *([models.STATE] if train else [])]
        _, sown = self.model.apply(variables, self.images, train=train, mutable=mutable)
        return models.activations_by_layer(sown)


Instrument = Callable[[Net], Mapping[str, Array]]
"""Measures a net, under `jit` and `vmap`; what it returns is in the record of the evaluation."""


Draw = Callable[[int, Dataset, Config], np.ndarray]
"""Draws the examples of every step, `[steps, batch_size]`, for a seed."""


def shuffled(seed: int, data: Dataset, config: Config) -> np.ndarray:
    """Minibatches from epochs shuffled by the seed."""
    require_fit(config.batch_size, data)
    return minibatches(seed, len(data.train_inputs), config.batch_size, config.steps)


@functools.lru_cache(maxsize=3)
def dataset(name: str, data_dir: Path | None) -> Dataset:
    """The data set, read once."""
    return load(name, data_dir)


def lanes(config: Config, **values: Sequence[Any]) -> list[Lane]:
    """Every seed with every combination of values.

    >>> lanes(Config(seeds=2), lr=(0.1, 1.0))[1]
    {'lr': 0.1, 'seed': 1}
    """
    rows = itertools.product(*values.values(), range(config.seeds))
    return [dict(zip((*values, "seed"), row, strict=True)) for row in rows]


def learn(
    config: Config,
    norm: nl.Norm,
    *,
    side_by_side: Sequence[Lane] | None = None,
    prepare: Callable[[Dataset], Dataset] = lambda data: data,
    draw: Draw = shuffled,
    instrument: Instrument | None = None,
    **options: Any,
) -> Measure:
    """Trains nets with a norm and yields a record of each lane at each evaluation.

    The records are those of `Progress.records`, with the lane's values, and what the instrument
    measured.

    Args:
      config: What to train; another batch size or number of steps by `dataclasses.replace`.
      norm: The norm.
      side_by_side: The lanes; by default the seeds of the config.
      prepare: Changes the data set first. Images of a floating type are taken as they are; others
        are shifted and scaled by two numbers.
      draw: Draws the minibatches of a seed.
      instrument: What else to measure; with one, before the first step too.
      **options: Of the model, as in `models.build`.
    """
    rows = lanes(config) if side_by_side is None else side_by_side

    def run(resume: Checkpoint | None) -> Iterator[Record | Checkpoint]:
        data = prepare(dataset(config.dataset, config.data_dir))
        trainer, state = start(config, norm, rows, data, **options)
        look = _looking(trainer, instrument or (lambda net: {}), rows, config)
        steps = lengths(config.steps, config.evaluations)
        trainer.compile(state, steps, config.batch_size)
        drawn = {seed: draw(seed, data, config) for seed in {row["seed"] for row in rows}}
        begin = Progress.start(state, len(rows), resume)
        if resume is None and instrument is not None:
            yield from look(begin.evaluated(trainer))
        each = [drawn[row["seed"]] for row in rows]
        for at in drive(trainer, begin, turns(each, config.evaluations)):
            yield from look(at)
            yield at.checkpoint()

    return run


def start(
    config: Config,
    norm: nl.Norm,
    rows: Sequence[Lane],
    data: Dataset,
    **options: Any,
) -> tuple[Trainer, TrainState]:
    """A trainer of these lanes on one device, and their initial state; options as in `learn`."""
    device_data = DeviceData(data, 1)
    seeds = sorted({row["seed"] for row in rows})
    draws = models.draw_kernels(config.model, data.classes, seeds, device_data.probe, **options)
    by_seed = {
        seed: jax.tree.map(lambda v, i=i: np.asarray(v[i]), draws) for i, seed in enumerate(seeds)
    }
    each = [gaussian(by_seed[row["seed"]], row) for row in rows]
    kernels = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    rates = [row.get("lr", config.lr) for row in rows]
    made = at_rates(optimizer(config), rates)
    model = models.build(config.model, norm, data.classes, **options)
    trainer = Trainer(model, made, device_data, kernels, synced=True)
    state = trainer.init()
    opt_state = set_rates(state.opt_state, rates, 1, device_data.mapped)
    return trainer, state._replace(opt_state=opt_state)


def optimizer(config: Config) -> Make:
    """What makes the config's optimizer, with its schedule, of a learning rate."""
    return optimizers.optimizer(config.optimizer, config.steps, schedule=config.schedule)


def gaussian(kernels: Any, lane: Lane) -> Any:
    """The kernels, or if the lane has an `sd`, Gaussian ones of it; biases stay."""
    if "sd" not in lane:
        return kernels
    rng = np.random.default_rng(lane["seed"])
    return jax.tree.map(
        lambda v: (lane["sd"] * rng.standard_normal(v.shape)).astype(v.dtype) if v.ndim > 1 else v,
        kernels,
    )


def _looking(
    trainer: Trainer, instrument: Instrument, rows: Sequence[Lane], config: Config
) -> Callable[[Progress], list[Record]]:
    """What makes the records of an evaluation, with what the instrument measures."""
    labels = jnp.asarray(trainer.data.probe_labels)
    images = jnp.asarray(trainer.data.probe)
    rates = jnp.array([row.get("lr", config.lr) for row in rows], jnp.float32)

    @jax.jit
    @jax.vmap
    def one(params: Any, norm_state: Any, lr: Array) -> Any:
        return instrument(Net(trainer.model, params, norm_state, images, labels, lr))

    def look(at: Progress) -> list[Record]:
        state = at.state
        params, norm_state = jax.tree.map(lambda v: v[0], (state.params, state.norm_state))
        measured = {k: np.asarray(v) for k, v in one(params, norm_state, rates).items()}
        return [
            record | {name: as_json(v[i]) for name, v in measured.items()}
            for i, record in enumerate(at.records(rows))
        ]

    return look


def as_json(value: Any) -> Any:
    """An array as nested lists of JSON numbers."""
    array = np.asarray(value)
    return number(array) if array.ndim == 0 else [as_json(v) for v in array]
