"""Can a net with batch norm predict a single example?

Claim: With population statistics a prediction is the same alone as in any batch, and as good. What
fails is to take the statistics of a small batch at inference: alone, all examples are then alike.
So "batch norm cannot predict a single example", of which no source is known, is wrong.

Source: Ioffe & Szegedy 2015, section 3.1, https://arxiv.org/abs/1502.03167, for inference with
population statistics, by which the output depends on its input alone; it gives no number. The
claims about statistics of the batch are ours. Wu & Johnson 2021, https://arxiv.org/abs/2105.07576,
take such statistics where training took those of few examples, too.

Protocol: Three layers of 100 ReLUs with batch norm on MNIST, 1,500 steps of SGD with momentum 0.9,
rate 0.1, batches of 100. Then the test set in batches of n = 100, 16, 4, 2
and 1, normalized by the running statistics and by those of each batch. In batches of one the
variance is 0, and the output of the norm is its bias, whatever the example.

Command: normlab run batch_one
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..engine import (
    Condition,
    Config,
    Nets,
    Record,
    Records,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    lanes,
    packed,
)
from ..engine.devices import relative
from ..training.trainer import minibatches

GOOD = 3.0
"""Test error (%) of a single example with population statistics, at most."""

SAME = 1e-5
"""How far its logits are from those in a batch of 100, relative to the largest, at most; and with
the statistics of its batch how far from those of another example."""

WORSE, CLOSE = 10.0, 1.5
"""Points of error that batch statistics cost at n = 4, and at n = 100 at most. All four are from a
first run with seeds 0 to 2."""


@dataclasses.dataclass(frozen=True)
class BatchOne(Config):
    """The config.

    Attributes:
      sizes: The batch sizes n of inference.
    """

    batch_size: int = 100
    steps: int = 1500
    optimizer: str = "momentum"
    sizes: tuple[int, ...] = (100, 16, 4, 2, 1)


QUICK = BatchOne()
SECONDS = 70
FULL = BatchOne(steps=20_000)

RELU: dict[str, Any] = {"activation": jax.nn.relu}


def run(config: BatchOne) -> Iterator[Condition]:
    """One training, all ways to predict."""
    kinds = ("population", "batch")
    says = [{"statistics": kind, "n": n} for kind in kinds for n in config.sizes]
    yield Condition({"norm": "batch"}, exact(predicted, config), says)


def predicted(config: BatchOne) -> Iterator[Record]:
    """Trains, and predicts the test set in batches of each size with either statistics."""
    rows = lanes(config)
    mnist = dataset(config.dataset, config.data_dir)
    nets = Nets(config, nl.get("batch"), mnist, rows, **RELU)
    trainer, state = nets.trainer, nets.start(rows)
    data = trainer.data
    epochs = [
        minibatches(row["seed"], data.examples, config.batch_size, config.steps) for row in rows
    ]
    state, _ = trainer.train(state, np.stack(epochs, axis=1))
    variables = {"params": state.params, models.STATE: state.norm_state}
    variables = jax.tree.map(lambda v: v[0], variables)
    images, labels, weights = (v.reshape(-1, *v.shape[3:]) for v in data.test)
    images, labels = (np.asarray(v)[np.asarray(weights) > 0] for v in (images, labels))
    # Without it a norm refuses a batch of one, and says why.
    loose = models.build(
        config.model, nl.get("batch", bad_batch="propagate"), mnist.classes, **RELU
    )

    def population(variables: Any, x: Array) -> Any:
        return trainer.model.apply(variables, data.preprocess(x), train=False)

    def batch(variables: Any, x: Array) -> Array:
        x = data.preprocess(x)
        logits, _ = loose.apply(variables, x, train=True, mutable=[models.STATE])
        return logits

    for model in (population, batch):
        whole = None
        for n in config.sizes:
            z = in_batches(model, variables, images, n)  # [seeds, examples, classes]
            whole = z if whole is None else whole
            for i, logits in enumerate(z):
                right = logits.argmax(-1) == labels[: len(logits)]
                yield {
                    "kind": "prediction",
                    "seed": rows[i]["seed"],
                    "statistics": model.__name__,
                    "n": n,
                    "accuracy": float(right.mean()),
                    "accuracy_each": packed(right),
                    "moved": relative(logits[: whole.shape[1]], whole[i, : len(logits)]),
                    "apart": relative(logits, np.broadcast_to(logits[0], logits.shape)),
                }


def in_batches(
    model: Callable[[Any, Array], Array], variables: Any, images: np.ndarray, n: int
) -> np.ndarray:
    """The logits of every seed's net, of batches of `n` one after the other; the rest is left."""
    batches = images[: len(images) // n * n].reshape(-1, n, *images.shape[1:])

    @jax.jit
    @jax.vmap
    def all_of(variables: Any) -> Array:
        return lax.map(lambda x: model(variables, x), jnp.asarray(batches))

    z = np.asarray(all_of(variables))
    return z.reshape(len(z), -1, z.shape[-1])


def verdict(records: Records) -> Iterator[Verdict]:
    """What a single example gets from either statistics, and from small batches."""
    own, batch = (records.where(statistics=name) for name in ("population", "batch"))
    alone, best = (own.accuracy(kind="prediction", n=n) for n in (1, 100))
    claim = "population statistics: a single example is predicted well (test error)"
    yield decide("population-1.error", claim, 100 - alone, at_most=GOOD, unit="%")
    claim = "population statistics: its logits are those it has in a batch of 100 "
    claim += "(relative difference)"
    same = {"at_most": SAME, "geometric": True, "exact": True}
    moved = own.by_seed("moved", n=1)
    source = Source("ioffe2015", "section 3.1")
    yield decide("population-1.same", claim, moved, source=source, **same)
    claim = "statistics of the batch: all examples alone have the same logits (relative difference)"
    yield decide("batch-1.constant", claim, batch.by_seed("apart", n=1), **same)
    four, hundred = (best - batch.accuracy(kind="prediction", n=n) for n in (4, 100))
    claim = "statistics of the batch: error rises in batches of 4"
    yield decide("batch-4.rise", claim, four, at_least=0, size=WORSE, unit="points")
    claim = f"statistics of the batch: 100 are as good within {CLOSE:g} points"
    both = {"at_least": -CLOSE, "at_most": CLOSE, "unit": "points"}
    yield decide("batch-100.rise", claim, hundred, **both)


def figure(records: Records) -> Figure:
    """The test error against the batch size of inference."""
    picture, (axes,) = draw.canvas(width=6.4, height=4.2)
    draw.against(axes, records, "n", draw.test_error, by=lambda r: f"{r['statistics']} statistics")
    draw.frame(axes, threshold=90, xscale="log", ticks=records.values("n"), ylim=(0, 100))
    axes.set(xlabel="examples predicted together", ylabel="test error (%)")
    axes.set_title("One net, predicting in batches; dotted: chance")
    return draw.finish(picture)
