"""What happens in every block of a net: the instruments of depth, before and after training.

    normlab depth --schemes post pre peri --dataset gutenberg --steps 300

All nets start from draws of one seed and are trained on the same minibatches. They are measured
on one batch of the training set, with the gradient of its loss and the step that it would make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import normlab as nl

from .. import models
from ..data import Dataset, Reading, load
from ..data.text import SPLITS, windows
from ..rundir import Record, RunDirectory, environment, number
from ..training import optimizers
from ..training.config import require_fit, require_reading
from ..training.trainer import DeviceData, Trainer, TrainState, minibatches
from .config import RANDOM, Depth


class Instrument(NamedTuple):
    """What is measured of each block.

    Attributes:
      name: In words.
      unit: What its axis is called.
      log: Whether its axis is logarithmic.
    """

    name: str
    unit: str
    log: bool = True


INSTRUMENTS = {
    "variance": Instrument("stream variance", "variance over channels"),
    "gradient": Instrument("gradient of the block", "‖∂loss/∂w‖ (nats)"),
    "update": Instrument("update beside weights", "‖Δw‖ / ‖w‖"),
    "effective_rate": Instrument("effective rate", "lr / ‖w‖²"),
    "entropy": Instrument("attention entropy", "entropy / ln(keys)", log=False),
    "logit": Instrument("largest attention logit", "max |q·k|/√D (nats)"),
    "rank": Instrument("effective rank", "dimensions of a sequence", log=False),
    "massive": Instrument("massive activations", "max |x| / median |x|"),
}
"""By its key in a record: means over sequences and heads, the logit and the last a maximum."""


class Profile:
    """Nets on their way.

    Args:
      config: Which, and how they are trained.
      say: Receives short messages about what is going on.
    """

    def __init__(self, config: Depth, say: Callable[[str], None] = lambda _: None) -> None:
        self.config, self.say = config, say
        data = examples(config, say)
        require_reading(config.model, data)
        require_fit(config.batch_size, data)
        self.data = DeviceData(data, 1)
        self.models = {name: config.build(*net, self.data) for name, net in config.nets.items()}
        self.run_dir = RunDirectory(config.run_dir, f"depth-{config.dataset}-{config.model}")
        self.run_dir.write_json("config.json", config.as_json())
        told = {**environment(), "dataset": data.describe()}
        self.run_dir.write_json("environment.json", told)

    def run(self) -> Iterator[Record]:
        """A record of each net before the first step, and one after the last if there are steps."""
        config, data = self.config, self.data
        make = optimizers.optimizer(
            config.optimizer, config.steps, weight_decay=config.weight_decay
        )
        for name, model in self.models.items():
            scheme, norm = config.nets[name]
            self.say(f"{name}: drawing")
            options = config.options(scheme)
            kernels = models.draw_kernels(
                config.model, data.task.classes, [config.seed], data.probe, **options
            )
            trainer = Trainer(model, make(config.lr), data, kernels, synced=True)
            state = trainer.init()
            look = jax.jit(lambda state, t=trainer: measure(t, state, config.lr))
            for step in dict.fromkeys((0, config.steps)):
                if step:
                    self.say(f"{name}: training")
                    drawn = minibatches(config.seed, data.examples, config.batch_size, step)
                    state, _ = trainer.train(state, drawn[:, None])
                self.say(f"{name}: measuring")
                found = look(jax.tree.map(lambda v: v[0, 0], state))
                values = jax.tree.map(lambda v: [number(x) for x in np.atleast_1d(v)], found)
                record = {"net": name, "scheme": scheme, "norm": norm, "step": step, **values}
                record["loss"] = values["loss"][0]
                self.run_dir.append("metrics.jsonl", lines(record, config))
                yield record


def lines(record: Record, config: Depth) -> list[Record]:
    """A net's record as the lines of metrics.jsonl: one of the net, and one of each block."""
    labels = {"norm": record["norm"], "scheme": record["scheme"], "lr": config.lr}
    labels |= {"seed": config.seed, "step": record["step"]}
    return [
        {"kind": "training", **labels, "train_loss": record["loss"]},
        *(
            {"kind": "block", **labels, "block": i, **{key: record[key][i] for key in INSTRUMENTS}}
            for i in range(config.depth)
        ),
    ]


def examples(config: Depth, say: Callable[[str], None]) -> Dataset:
    """The data set, or as much of random bytes as is looked at."""
    reading = Reading(config.context, measured=1)
    if config.dataset != RANDOM:
        return load(config.dataset, config.data_dir, reading=reading, on_progress=say)
    rng = np.random.default_rng(config.seed)
    size = config.context * max(config.batch_size, 32) + 1
    texts = {name: np.append(rng.integers(1, 256, size, np.uint8), np.uint8(0)) for name in SPLITS}
    halves, classes, text = windows(texts, reading)
    return Dataset(RANDOM, **halves, classes=classes, origin="a seed", checksum="", text=text)


def measure(trainer: Trainer, state: TrainState, lr: float) -> dict[str, Array]:
    """All of `INSTRUMENTS` by block, `[L]`, and the loss, on the probe batch.

    Args:
      trainer: Of a `models.Transformer`.
      state: Of one seed, without the axes of devices and seeds.
      lr: The learning rate.
    """
    model: Any = trainer.model
    params, norm_state, opt_state = state

    def loss(params: Any) -> tuple[Array, Any]:
        variables = {"params": params, models.STATE: norm_state}
        sown = [models.STATE, models.DEPTH]
        logits, found = model.apply(variables, trainer.data.probe, train=True, mutable=sown)
        labels = jnp.asarray(trainer.data.probe_labels, jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), model.unstack(found[models.DEPTH])

    (value, sown), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, _ = trainer.optimizer.update(grads, opt_state, params)
    # What the step does to them, where a scheme projects, too.
    change = jax.tree.map(jnp.subtract, model.project(optax.apply_updates(params, updates)), params)
    blocks = [sown[f"block{i}"] for i in range(model.depth)]
    stream, heads = (
        jax.tree.map(lambda *v: jnp.stack(v).reshape(len(v), -1), *(b[name][0] for b in blocks))
        for name in ("after_mlp", "heads")
    )
    return {
        "loss": value,
        "variance": stream.variance.mean(-1),
        "gradient": nl.instruments.block_norms(grads).block,
        "update": nl.instruments.update_ratio(params, change).block,
        "effective_rate": nl.instruments.block_lr(params, lr).block,
        "entropy": heads.normalized_entropy.mean(-1),
        "logit": heads.largest.max(-1),
        "rank": stream.effective_rank.mean(-1),
        "massive": stream.massive.ratio.max(-1),
    }
