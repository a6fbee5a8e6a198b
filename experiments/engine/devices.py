"""Training over several devices as a condition: what the studies of synchronization share."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import normlab as nl

from .. import models
from ..rundir import Record, number
from ..training import syncs
from ..training.config import require_fit, require_mesh
from ..training.driver import Checkpoint, Progress, drive
from ..training.trainer import (
    FORMS,
    DeviceData,
    Form,
    Trainer,
    TrainState,
    axes_of,
    minibatches,
    require_form,
    set_devices,
    turns,
)
from . import question
from .learn import dataset, optimizer
from .question import Measure

FIRST_STEPS = 5
"""Steps over which `pmap` and `shard_map` are compared: later ones add up rounding."""


@dataclasses.dataclass(frozen=True)
class Config(question.Config):
    """One network with batch norm, data-parallel.

    Attributes:
      devices: How many share a batch.
      per_device: Examples of each batch on each device, in the place of `batch_size`.
      optimizer: SGD with momentum 0.9.
      decay: Weight of the old value in the running statistics.
      form: How the step runs on the devices; the other form is compared with it.
      mesh: The sizes of the axes along which they lie, as in 4 2, neighbours along the last; by
        default one axis of all. `pmap` has no more than one, so nothing is compared then.
    """

    dataset: str = "fashion_mnist"
    optimizer: str = "momentum"
    lr: float = 0.05
    devices: int = 8
    per_device: int = 4
    decay: float = 0.9
    form: Form = "pmap"
    mesh: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises RunError for devices that cannot lie so."""
        super().__post_init__()
        require_mesh(self.mesh, self.devices)
        require_form(self.form, self.mesh)

    @property
    def axes(self) -> str | tuple[str, ...]:
        """The names of the axes."""
        return axes_of(self.mesh)

    def grouped(self, size: int) -> nl.Sync:
        """Groups of `size` neighbours: the last axes of the mesh where those make up one."""
        for i in range(1, len(self.mesh)):
            if math.prod(self.mesh[i:]) == size:
                return nl.Sync(self.axes, together=tuple(self.axes[i:]))
        return nl.Sync(self.axes, groups=size)


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
        batch = config.devices * config.per_device
        given = f"--devices {config.devices} with --per-device {config.per_device}"
        require_fit(batch, data, f"{given}: a batch of {batch} examples", "Give fewer.")
        self.classes, self.labels = data.classes, data.train_labels
        mesh = () if devices else config.mesh
        self.data = DeviceData(data, devices or config.devices, dtype, mesh)
        with jax.enable_x64(False):  # the same numbers in every type
            kernels = models.draw_kernels(
                config.model,
                data.classes,
                config.each_seed,
                self.data.probe.astype(np.float32),
            )
        self.kernels = jax.tree.map(lambda v: np.asarray(v, self.data.probe.dtype), kernels)
        each = [
            minibatches(seed, self.data.examples, batch, config.steps) for seed in config.each_seed
        ]
        self.indices = np.stack(each, axis=1)  # [steps, seeds, batch]

    def trainer(self, norm: nl.Norm, form: Form, *, synced: bool = True, **options: Any) -> Trainer:
        """A trainer of the config's model with this norm; the options are those of `Trainer`."""
        model = models.build(self.config.model, norm, self.classes)
        made = optimizer(self.config)(self.config.lr)
        return Trainer(model, made, self.data, self.kernels, synced=synced, form=form, **options)

    def batch_norm(self, sync: nl.Sync, **options: Any) -> nl.Norm:
        """Batch norm over these devices and parts of their batches."""
        return nl.get("batch", axis_name=sync, decay=self.config.decay, **options)

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
        sync: nl.Sync,
        resume: Checkpoint | None = None,
        *,
        indices: np.ndarray | None = None,
        measure: Callable[[Trainer, TrainState], Iterable[Record]] = lambda *_: (),
        **options: Any,
    ) -> Iterator[Record | Checkpoint]:
        """Trains batch norm under a `Sync`; yields evaluations, and how far the forms differ.

        Args:
          sync: Which examples are one batch.
          resume: Where to go on.
          indices: The minibatches, if not the laboratory's.
          measure: Yields further records at each evaluation.
          **options: Further ones of batch norm.
        """
        config = self.config
        indices = self.indices if indices is None else indices
        norm = self.batch_norm(sync, **options)
        how: dict[str, Any] = {
            "synced": syncs.alike(sync, self.data.axes),
            "delayed": syncs.delayed(sync),
        }
        trainer = self.trainer(norm, config.form, **how)
        state = self.start(trainer)
        cut = list(turns([*indices.swapaxes(0, 1)], config.evaluations))
        rows = [{"seed": seed} for seed in config.each_seed]
        begin = Progress.start(state, config.seeds, resume)
        there = None
        if resume is None and len(self.data.axes) == 1:
            (form,) = set(FORMS) - {config.form}
            other = self.trainer(norm, form, **how)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:  # both compile at once
                there = pool.submit(
                    lambda: other.train(self.start(other), cut[0][1][:FIRST_STEPS])[1]
                )
                trainer.compile(state, {len(each) for _, each in cut}, indices.shape[-1])
        for at in drive(trainer, begin, cut):
            if there is not None and at.losses is not None:
                gap = relative(there.result(), at.losses[:FIRST_STEPS])
                yield {"kind": "forms", "steps": min(FIRST_STEPS, at.step), "loss_gap": number(gap)}
                there = None
            yield from at.records(rows, each=at.step == config.steps)
            for record in measure(trainer, at.state):
                yield {**record, "step": at.step}
            yield at.checkpoint()


def learn(config: Config, sync: nl.Sync) -> Measure:
    """Trains batch norm under a `Sync`, as `Lab.learn` does."""
    return lambda resume: Lab(config).learn(sync, resume)


def forms_gap(records: Iterable[Record]) -> float | None:
    """The largest difference between `pmap` and `shard_map`; `None` if they were not compared."""
    gaps = [record["loss_gap"] for record in records if record["kind"] == "forms"]
    return max((gap for gap in gaps if gap is not None), default=None)


def relative(actual: Any, expected: Any) -> float:
    """The largest difference of any leaf, relative to the largest value of that leaf."""
    worst = 0.0
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        gap = np.abs(a - e).max(initial=0) / (np.abs(e).max(initial=0) or 1)
        worst = float(np.maximum(worst, gap))
    return worst
