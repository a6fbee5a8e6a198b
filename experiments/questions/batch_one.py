"""Can a net with batch norm predict a single example?

Claim: With population statistics a prediction is the same alone as in any batch, and as good. What
fails is to take the statistics of a small batch at inference: alone, an example is then a guess.
So "batch norm cannot predict a single example", which is often said, is wrong.

Source: Ioffe & Szegedy 2015, section 3.1, https://arxiv.org/abs/1502.03167, for inference with
population statistics; the numbers for batch statistics are ours.

Protocol: Three layers of 100 ReLUs with batch norm on MNIST, 3,000 steps of SGD with momentum 0.9,
rate 0.1, batches of 100. Then the test set in batches of n = 100, 16, 4, 2
and 1, normalized by the running statistics and by those of each batch. In batches of one the
variance is 0, and the output of the norm is its bias.

Command: python -m experiments run batch_one
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
    Record,
    Records,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    lanes,
    start,
)
from ..engine.devices import relative
from ..training.trainer import minibatches

GOOD = 3.0
"""Test error (%) of a single example with population statistics, at most."""

SAME = 1e-5
"""How far its logits are from those in a batch of 100, relative to the largest, at most."""

GUESS = 80.0
"""Test error (%) of a single example with the statistics of its batch, at least."""

WORSE, CLOSE = 10.0, 1.5
"""Points of error that batch statistics cost: at least at n = 4, and at most at n = 100."""


@dataclasses.dataclass(frozen=True)
class BatchOne(Config):
    """The config.

    Attributes:
      sizes: The batch sizes n of inference.
    """

    batch_size: int = 100
    steps: int = 3000
    optimizer: str = "momentum"
    sizes: tuple[int, ...] = (100, 16, 4, 2, 1)


QUICK = BatchOne(seeds=3)
SECONDS = 25
FULL = BatchOne(seeds=10, steps=20_000)

RELU = {"activation": jax.nn.relu}


def run(config: BatchOne) -> Iterator[Condition]:
    """One training, all ways to predict."""
    yield Condition({"norm": "batch"}, exact(predicted, config))


def predicted(config: BatchOne) -> Iterator[Record]:
    """Trains, and predicts the test set in batches of each size with either statistics."""
    rows = lanes(config)
    mnist = dataset(config.dataset, config.data_dir)
    trainer, state = start(config, nl.get("batch"), rows, mnist, **RELU)
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
            for seed, logits in enumerate(z):
                right = logits.argmax(-1) == labels[: len(logits)]
                yield {
                    "kind": "prediction",
                    "seed": seed,
                    "statistics": model.__name__,
                    "n": n,
                    "error": float(100 * (1 - right.mean())),
                    "moved": relative(logits[: whole.shape[1]], whole[seed, : len(logits)]),
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
    best = own.by_seed("error", n=100)
    claim = "population statistics: a single example is predicted well (test error)"
    yield decide(claim, own.by_seed("error", n=1), at_most=GOOD, unit="%")
    claim = "population statistics: its logits are those it has in a batch of 100 "
    yield decide(f"{claim}(relative difference)", own.by_seed("moved", n=1), at_most=SAME)
    claim = "statistics of the batch: a single example is a guess (test error)"
    yield decide(claim, batch.by_seed("error", n=1), at_least=GUESS, unit="%")
    claim = "statistics of the batch: error rises in batches of 4"
    yield decide(claim, batch.by_seed("error", n=4) - best, at_least=WORSE, unit="points")
    claim = "statistics of the batch: 100 are nearly enough"
    yield decide(claim, batch.by_seed("error", n=100) - best, at_most=CLOSE, unit="points")


def figure(records: Records) -> Figure:
    """The test error against the batch size of inference."""
    picture, (axes,) = draw.canvas(width=6.4, height=4.2)
    draw.against(axes, records, "n", "error", by=lambda r: f"{r['statistics']} statistics")
    draw.frame(axes, threshold=90, xscale="log", ticks=records.values("n"), ylim=(0, 100))
    axes.set(xlabel="examples predicted together", ylabel="test error (%)")
    axes.set_title("One net, predicting in batches; dotted: chance")
    return draw.finish(picture)
