"""Training as a condition: one norm, many lanes side by side, with instruments on the way."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
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
from ..rundir import Record, number, packed
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
    stretches,
    turns,
)
from .question import SCREENED, Config

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
    {'lr': 0.1, 'seed': 101}
    """
    rows = itertools.product(*values.values(), config.each_seed)
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
) -> Learning:
    """Trains nets with a norm and yields a record of each lane at each evaluation.

    The records are those of `Progress.records`, with the lane's values, and what the instrument
    measured; the last ones say which test images were told right.

    Args:
      config: What to train; another batch size or number of steps by `dataclasses.replace`.
      norm: The norm.
      side_by_side: The lanes; by default the seeds of the config.
      prepare: Changes the data set first. Images of a floating type are taken as they are; others
        are shifted and scaled by two numbers.
      draw: Draws the minibatches of a seed.
      instrument: What else to measure; with one, before the first step too.
      **options: Of the model, as in `models.build`; and `only` of `masked`.
    """
    rows = lanes(config) if side_by_side is None else side_by_side
    return Learning(config, norm, rows, prepare, draw, instrument, options)


@dataclasses.dataclass(frozen=True)
class Learning:
    """What `learn` returns: a measure, which says what it trains.

    Attributes:
      config, norm, rows, prepare, draw, instrument, options: As in `learn`.
    """

    config: Config
    norm: nl.Norm
    rows: Sequence[Lane]
    prepare: Callable[[Dataset], Dataset]
    draw: Draw
    instrument: Instrument | None
    options: Mapping[str, Any]

    def __call__(self, resume: Checkpoint | None) -> Iterator[Record | Checkpoint]:
        """Yields records, and checkpoints."""
        data = self.data
        nets = Nets(self.config, self.norm, data, self.rows, **self.options)
        yield from self.among(nets.compile(), data, resume)

    @property
    def data(self) -> Dataset:
        """The data set, prepared."""
        return self.prepare(dataset(self.config.dataset, self.config.data_dir))

    def among(
        self, nets: Nets, data: Dataset, resume: Checkpoint | None
    ) -> Iterator[Record | Checkpoint]:
        """The same with nets that are compiled for at least as many lanes, and their turns.

        Args:
          nets: The nets.
          data: The images that are trained on and tested, of those of the nets.
          resume: Where to go on.
        """
        config, rows = self.config, [*self.rows]
        trainer = nets.trainer.testing(data.test_inputs, data.test_labels)
        side_by_side = rows + rows[:1] * (nets.count - len(rows))
        look = _looking(trainer, self.instrument or (lambda net: {}), side_by_side, config)
        batches = {seed: self.draw(seed, data, config) for seed in {row["seed"] for row in rows}}
        begin = Progress.start(nets.start(side_by_side), nets.count, resume)
        if resume is None and self.instrument is not None:
            yield from look(begin.evaluated(trainer))[: len(rows)]
        each = [batches[row["seed"]] for row in side_by_side]
        stops = {stop for _, stop in stretches(config.steps, config.evaluations)}
        for at in drive(trainer, begin, turns(each, nets.turns), evaluate=stops.__contains__):
            if at.evaluation is not None:
                yield from look(at)[: len(rows)]
            yield at.checkpoint()

    @property
    def stages(self) -> tuple[Learning, ...]:
        """What is trained one after the other."""
        return (self,)


def tuned(config: Config, norm: nl.Norm, rates: Sequence[float], **options: Any) -> Tuning:
    """Chooses a learning rate, then trains at it, as `learn` does.

    Every rate is tried, and two more where the best is an end of the grid, on `config.screening`
    seeds that nothing else has (from `SCREENED` on). They are measured on training images that are
    held out for it (of a text, on its validation part): what is compared in the end has no part in
    the choice. Beside the records of `learn`, of `kind` "screening" those of the trials, and one of
    `kind` "tuning": the best `lr`, all `rates` that were tried with their mean `accuracies` on the
    held-out images (of a text `losses`), and `edge`, which is "lowest" or "highest" if the best is
    still an end, so that a better one may lie beyond.

    Args:
      config: As in `learn`.
      norm: As in `learn`.
      rates: The grid.
      **options: Of `learn`, but `side_by_side`.
    """
    return Tuning(config, norm, tuple(rates), options)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tuned` returns: a measure, which says what it trains.

    Attributes:
      config, norm, rates, options: As in `tuned`.
    """

    config: Config
    norm: nl.Norm
    rates: tuple[float, ...]
    options: Mapping[str, Any]

    def __call__(self, resume: Checkpoint | None) -> Iterator[Record | Checkpoint]:
        """Yields records, and checkpoints of the training at the rate that was chosen."""
        trial, final = self.stages
        data = final.data
        held = held_out(data)
        nets = Nets(
            self.config,
            self.norm,
            data,
            [*trial.rows, *final.rows],
            count=max(len(trial.rows), len(final.rows)),
            room=len(held.test_labels),
            **final.options,
        ).compile()
        if resume is None:
            tried = screened(trial.among(nets, held, None))
            choice = chosen(tried, self.rates)
            if choice["edge"]:
                more = beyond(self.rates, choice["edge"])
                tried += screened(self.trial(more).among(nets, held, None))
                choice = chosen(tried, (*self.rates, *more))
            yield from tried
            yield choice
            best = choice["lr"]
        else:
            best = float(resume.leaves[0])
            resume = resume._replace(leaves=resume.leaves[1:])
        for found in self.final(best).among(nets, data, resume):
            if isinstance(found, Checkpoint):
                found = found._replace(leaves=[np.float64(best), *found.leaves])
            yield found

    def trial(self, rates: Sequence[float]) -> Learning:
        """The training at every rate."""
        config = dataclasses.replace(self.config, evaluations=1)
        seeds = range(SCREENED, SCREENED + config.screening)
        rows = [{"lr": lr, "seed": seed} for lr in rates for seed in seeds]
        prepare = self.options.get("prepare", lambda data: data)
        changed = {"instrument": None, "prepare": lambda data: held_out(prepare(data))}
        return learn(config, self.norm, side_by_side=rows, **{**self.options, **changed})

    def final(self, lr: float) -> Learning:
        """The training at one rate."""
        rows = lanes(self.config, lr=[lr])
        return learn(self.config, self.norm, side_by_side=rows, **self.options)

    @property
    def stages(self) -> tuple[Learning, ...]:
        """What is trained one after the other."""
        return self.trial(self.rates), self.final(self.rates[0])


def screened(found: Iterator[Record | Checkpoint]) -> list[Record]:
    """The records of a trial, without what they say of each image."""
    records = [r for r in found if not isinstance(r, Checkpoint)]
    return [
        {**{k: v for k, v in r.items() if not k.endswith("_each")}, "kind": "screening"}
        for r in records
    ]


def chosen(tried: Sequence[Record], rates: Sequence[float]) -> Record:
    """The record of `kind` "tuning" of the records of the trials."""
    text = "validation_loss" in tried[0]
    key, what = ("validation_loss", "losses") if text else ("accuracy", "accuracies")
    means = []
    for lr in rates:
        values = [r[key] for r in tried if r["lr"] == lr and r["diverged"] is None]
        whole = len(values) == sum(r["lr"] == lr for r in tried) and None not in values
        means.append(float(np.mean(values)) if whole else None)
    worst = math.inf if text else -math.inf
    known = any(mean is not None for mean in means)
    best = (min if text else max)(rates, key=lambda lr: _or(means[rates.index(lr)], worst))
    best = best if known else min(rates)  # all diverged: lower ones are worth a trial
    ends = {min(rates): "lowest", max(rates): "highest"} if len(rates) > 1 else {}
    return {
        "kind": "tuning",
        "lr": best,
        "rates": list(rates),
        what: means,
        "edge": ends.get(best, ""),
    }


def beyond(rates: Sequence[float], edge: str) -> tuple[float, float]:
    """Two more rates beyond the "lowest" or "highest", each as far as that is from the next.

    >>> beyond((0.1, 0.3, 1.0), "highest")
    (3.3, 11.0)
    """
    low, *_ = ordered = sorted(rates, reverse=edge == "highest")
    factor = low / ordered[1]
    return float(f"{low * factor:.2g}"), float(f"{low * factor**2:.2g}")


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def held_out(data: Dataset) -> Dataset:
    """The data with the last tenth of the training images for a test set; a text as it is."""
    if data.text is not None:
        return data
    count = len(data.train_labels) // 10
    return data._replace(
        train_inputs=data.train_inputs[:-count],
        train_labels=data.train_labels[:-count],
        test_inputs=data.train_inputs[-count:],
        test_labels=data.train_labels[-count:],
    )


def pooled(data: Dataset, pixels: int) -> Dataset:
    """The data with the mean of `pixels` by `pixels` for a pixel, rounded: smaller images.

    What is over at the right and lower edges is left out.
    """

    def pool(images: np.ndarray) -> np.ndarray:
        n, h, w, k = images.shape
        h, w = h // pixels, w // pixels
        cut = images[:, : h * pixels, : w * pixels].reshape(n, h, pixels, w, pixels, k)
        return cut.mean((2, 4)).round().astype(images.dtype)

    return data._replace(train_inputs=pool(data.train_inputs), test_inputs=pool(data.test_inputs))


class Nets:
    """Nets with one norm, compiled once and trained as often as one likes, some side by side.

    Args:
      config: What to train, for how many steps, in as many calls as it has evaluations.
      norm: The norm.
      data: All images.
      rows: All lanes that there will be: their seeds and rates.
      count: How many are trained side by side; by default all.
      room: Images that will be tested, at most, where they are more than those of the data.
      only: As in `masked`.
      **options: Of the model.

    Attributes:
      trainer, count: Those.
      turns: Into how many calls the steps are cut.
    """

    def __init__(
        self,
        config: Config,
        norm: nl.Norm,
        data: Dataset,
        rows: Sequence[Lane],
        *,
        count: int | None = None,
        room: int = 0,
        only: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self.config, self.turns = config, config.evaluations
        self.count = len(rows) if count is None else count
        held = DeviceData(data, 1, room=room)
        self.seeds = sorted({row["seed"] for row in rows})
        self.drawn = drawn(config.model, data.classes, self.seeds, held.probe, **options)
        make = optimizer(config) if only is None else masked(optimizer(config), only)
        made = at_rates(make)
        self.rows = list(itertools.islice(itertools.cycle(rows), self.count))
        model = models.build(config.model, norm, data.classes, **options)
        kernels = self._kernels(self.rows)
        self.trainer = Trainer(model, made, held, kernels, synced=True, parts=False)

    def compile(self) -> Nets:
        """The same, compiled."""
        steps = lengths(self.config.steps, self.turns)
        self.trainer.compile(self.start(self.rows), steps, self.config.batch_size)
        return self

    def start(self, rows: Sequence[Lane]) -> TrainState:
        """The initial state of `count` lanes."""
        state = self.trainer.init(self._kernels(rows))
        where = self.trainer.data.mapped
        return state._replace(opt_state=set_rates(state.opt_state, self._rates(rows), 1, where))

    def _rates(self, rows: Sequence[Lane]) -> list[float]:
        return rates_of(rows, self.config)

    def _kernels(self, rows: Sequence[Lane]) -> Any:
        at = [self.seeds.index(row["seed"]) for row in rows]
        trees = [jax.tree.map(lambda v, i=i: np.asarray(v[i]), self.drawn) for i in at]
        each = [gaussian(tree, row) for tree, row in zip(trees, rows, strict=True)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each)


def rates_of(rows: Sequence[Lane], config: Config) -> list[float]:
    """The learning rate of each lane: its own, or that of the config."""
    return [row["lr"] if "lr" in row else config.lr for row in rows]  # noqa: SIM401


def optimizer(config: Config) -> Make:
    """What makes the config's optimizer, with its schedule, of a learning rate."""
    how: Any = {"schedule": config.schedule, "warmup": config.warmup}
    return optimizers.optimizer(config.optimizer, config.steps, **how)


def drawn(
    name: str, classes: int, seeds: Sequence[int], example: np.ndarray, **options: Any
) -> Any:
    """What `models.draw_kernels` draws, in memory: all norms of a question begin with the same."""
    key = (
        name,
        classes,
        tuple(seeds),
        example.shape,
        example.dtype.str,
        jnp.result_type(float).name,
    )
    try:
        return _drawn(*key, **options)
    except TypeError:  # an option that is no key
        return models.draw_kernels(name, classes, seeds, example, **options)


@functools.lru_cache(maxsize=4)
def _drawn(
    name: str,
    classes: int,
    seeds: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: str,
    float_type: str,
    **options: Any,
) -> Any:
    del float_type  # a part of the key alone
    return jax.device_get(
        models.draw_kernels(name, classes, seeds, np.zeros(shape, dtype), **options)
    )


def masked(make: Make, only: Callable[[Any], Any]) -> Make:
    """What makes an optimizer that changes some parameters alone.

    Args:
      make: Makes one that changes all.
      only: Of the initial parameters, a tree like them of what each update is multiplied by: 1 or
        0, or an array of these.
    """

    def make_masked(lr: float) -> optax.GradientTransformation:
        def init(params: Any) -> Any:
            return only(params)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            del params  # the state is what each update is multiplied by
            return jax.tree.map(lambda u, m: u * m, updates, state), state

        return optax.chain(make(lr), optax.GradientTransformation(init, update))

    return make_masked


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
    rates = jnp.array(rates_of(rows, config), jnp.float32)

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
            for i, record in enumerate(at.records(rows, each=at.step == config.steps))
        ]

    return look


def as_json(value: Any) -> Any:
    """An array as nested lists of JSON numbers; flags `[N]`, of test images, as a string."""
    array = np.asarray(value)
    if array.dtype == bool and array.ndim == 1:
        return packed(array)
    return number(array) if array.ndim == 0 else [as_json(v) for v in array]
