"""Are statistics of many batches better than a moving average, and when?

Claim: While the weights change fast, early in training and at a high learning rate, a moving
average lags behind, and the statistics of many batches with the weights as they are ("PreciseBN")
are more accurate. Where the rate falls to zero both are equal at the end.

Source: Wu & Johnson 2021, section 3, https://arxiv.org/abs/2105.07576

Protocol: MNIST, three layers of 100 ReLUs, batches of 100, plain SGD. At each evaluation one and
the same net is tested with its moving average, with the statistics of 32 training batches, and with
those of the test batch itself (100 examples). Two runs: 60 steps at a constant rate, low or high;
and 900 steps at the high rate, which falls to zero as a cosine. The average is the plain one, which
starts at mean 0 and variance 1, at two decays, and the debiased one, which does not.

Command: python -m experiments run precise
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..data import Dataset
from ..engine import Condition, Config, Net, Records, Verdict, dataset, decide, draw, lanes, learn

GAIN = 0.5
"""Points of test accuracy that PreciseBN is better while the weights change fast, at least."""

EQUAL = 0.2
"""Points by which both may differ at the end of a run whose rate falls to zero."""


@dataclasses.dataclass(frozen=True)
class Precise(Config):
    """The config; the steps are those of the run whose rate falls.

    Attributes:
      averages: Pairs of the moving average, a population's name, and its decay.
      rates: The low and the high learning rate, in the place of `lr`.
      early: Steps of the run at a constant rate.
      batches: Training batches of which the precise statistics are made.
    """

    averages: tuple[tuple[str, float], ...] = (("ema", 0.9), ("ema", 0.99), ("debiased", 0.99))
    rates: tuple[float, float] = (0.1, 3.0)
    early: int = 60
    batches: int = 32
    batch_size: int = 100
    steps: int = 900
    seeds: int = 5


QUICK = Precise()
SECONDS = 115
FULL = Precise(steps=12_000, evaluations=20, batches=100, seeds=10)


def run(config: Precise) -> Iterator[Condition]:
    """Each average, at constant rates and at one that falls."""
    low, high = config.rates
    early = dataclasses.replace(config, steps=config.early)
    falling = dataclasses.replace(config, schedule="cosine")
    for population, decay in config.averages:
        norm = nl.get("batch", population=population, decay=decay)
        options = {
            "prepare": floats,
            "instrument": functools.partial(accuracies, config),
            "activation": nn.relu,
        }
        labels = {"average": population, "decay": decay}
        rows = lanes(config, lr=(low, high))
        measure = learn(early, norm, side_by_side=rows, **options)
        yield Condition({**labels, "rate": "constant"}, measure)
        rows = lanes(config, lr=(high,))
        measure = learn(falling, norm, side_by_side=rows, **options)
        yield Condition({**labels, "rate": "falling"}, measure)


def floats(data: Dataset) -> Dataset:
    """Pixels from −1 to 1."""
    train, test = (
        (v / np.float32(127.5) - 1).astype(np.float32)
        for v in (data.train_inputs, data.test_inputs)
    )
    return data._replace(train_inputs=train, test_inputs=test)


def accuracies(config: Precise, net: Net) -> dict[str, Array]:
    """The test accuracy in percent with the moving average, many batches and the test batch."""
    data = floats(dataset(config.dataset, config.data_dir))
    cut = functools.partial(batches, size=config.batch_size)
    images, labels = cut(data.test_inputs), cut(data.test_labels)

    def apply(state: object, images: Array, train: bool) -> tuple[Array, dict]:
        variables = {"params": net.params, models.STATE: state}
        mutable = [models.STATE] if train else []
        return net.model.apply(variables, images, train=train, mutable=mutable)  # type: ignore

    def see(state: object, images: Array) -> tuple[object, None]:
        return apply(state, images, True)[1][models.STATE], None

    def accuracy(state: object, *, train: bool = False) -> Array:
        right = lax.map(lambda b: apply(state, b[0], train)[0].argmax(-1) == b[1], (images, labels))
        return 100 * right.mean(dtype=jnp.float32)

    many = cut(data.train_inputs)[: config.batches]
    precise = nl.population.settle(lax.scan(see, nl.population.begin(net.norm_state), many)[0])
    return {
        "with_average": accuracy(net.norm_state),
        "with_precise": accuracy(precise),
        "with_batch": accuracy(net.norm_state, train=True),
    }


def batches(values: np.ndarray, size: int) -> Array:
    """Whole batches `[batches, size, ...]`."""
    whole = len(values) // size
    return jnp.asarray(values[: whole * size].reshape(whole, size, *values.shape[1:]))


def gain(records: Records, first: float, last: float, **wanted: object) -> np.ndarray:
    """Points that PreciseBN is better, of each seed, the mean over a share of the run."""
    here = records.where(**wanted).trained()
    end = max(here.values("step"))
    here = here.where(lambda r: first * end <= r["step"] <= last * end)
    gains = Records(r | {"gain": r["with_precise"] - r["with_average"]} for r in here)
    return gains.by_seed("gain", of=np.mean)


def verdict(records: Records) -> Iterator[Verdict]:
    """Early, while the rate is high, and at the end, for each average."""
    points = functools.partial(decide, unit="points")
    for average, decay in records.values("average", "decay"):
        which = {"average": average, "decay": decay}
        name = f"{said(average, decay)} average: PreciseBN is "
        for lr in sorted(records.values("lr")):
            early = gain(records, 0, 1, rate="constant", lr=lr, **which)
            claim = name + f"better in the first steps at rate {lr:g}"
            yield points(claim, early, at_least=GAIN)
        high = gain(records, 0, 0.5, rate="falling", **which)
        yield points(name + "better while the rate is high", high, at_least=GAIN)
        end = gain(records, 1, 1, rate="falling", **which)
        claim = name + "as good when the rate has fallen to zero"
        yield points(claim, end, at_least=-EQUAL, at_most=EQUAL)


def figure(records: Records) -> Figure:
    """The test error with each kind of statistics, in each run."""
    runs = records.values("rate", "lr")
    picture, grid = draw.canvas(len(runs))
    for axes, (rate, lr) in zip(grid, runs, strict=True):
        here = records.where(rate=rate, lr=lr).trained()
        names = here.values("average", "decay")
        # No statistics of inference change a step of training: the nets are the same.
        kinds = [("PreciseBN", "precise", names[0]), ("the test batch", "batch", names[0])]
        kinds += [(f"{said(*name)} average", "average", name) for name in names]
        lines = [
            r | {"with": kind, "error": 100 - r[f"with_{key}"]}
            for kind, key, (average, decay) in kinds
            for r in here.where(average=average, decay=decay)
        ]
        draw.over_steps(axes, lines, "error", by="with")
        falls = "falls from " if rate == "falling" else ""
        draw.frame(axes, log=True, ylabel="test error (%)", title=f"rate {falls}{lr:g}")
    return draw.finish(
        picture, "One net, tested with statistics of …; median and band of all seeds"
    )


def said(average: str, decay: float) -> str:
    """A moving average in words."""
    return f"{'plain' if average == 'ema' else average} {decay:g}"
