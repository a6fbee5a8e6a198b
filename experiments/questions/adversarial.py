"""Is a net with batch norm easier to fool, at equal accuracy on clean images?

Claim: Stopped at the same accuracy, a net with batch norm is right about fewer images under a small
adversarial perturbation than one without, and about fewer with Gaussian noise.

Source: Galloway et al. 2019, https://arxiv.org/abs/1905.02161: double-digit percentages on five
data sets, for perturbations and for noise; contested, since their attacks left much accuracy. The
five points are ours, from one seed.

Protocol: Fashion-MNIST at 14×14 pixels, three layers of 100 ReLUs, batches of 60, 1,200 steps of
SGD with momentum 0.9, one rate for both, no decay. Each net is taken at the evaluation, of ten, at
which its accuracy is next to 80%. The attack: projected gradient descent on the margin (the right
logit less the largest other), within ε = 0.05 of each pixel of 0 to 1 and within that range, 20
steps of ε/5 from two random starts, with population statistics, on 300 test images; at ε = 0.3 it
must leave nothing, or it is too weak. Noise is Gaussian with a standard deviation of 0.2 and 0.4.

Command: normlab run adversarial
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..data import Dataset
from ..engine import (
    Condition,
    Config,
    Net,
    Records,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    learn,
    pooled,
)

FEWER = 5.0
"""Points by which accuracy under attack is lower with batch norm."""

TARGET = 0.8
"""The clean accuracy at which nets are compared: both reach it, in a pilot of seeds 0 and 1."""

EQUAL = 2.0
"""Points by which clean accuracies may differ there, at most."""

BROKEN = 5.0
"""Percent that the widest attack may leave; chosen before any run."""

GALLOWAY = Source("galloway2019", "", "double-digit percentages", "abstract")


@dataclasses.dataclass(frozen=True)
class Adversarial(Config):
    """The config.

    Attributes:
      norms: The nets.
      sizes: ε of the attacks; of the last nothing may be left.
      noises: Standard deviations of the noise.
      attacked: Test images.
      pool: Pixels along each axis whose mean makes one.
      width: Units of each of three layers.
    """

    dataset: str = "fashion_mnist"
    norms: tuple[str, ...] = ("none", "batch")
    sizes: tuple[float, ...] = (0.05, 0.3)
    noises: tuple[float, ...] = (0.2, 0.4)
    attacked: int = 300
    pool: int = 2
    width: int = 100
    optimizer: str = "momentum"
    lr: float = 0.01
    steps: int = 1200
    evaluations: int = 10


QUICK = Adversarial()
SECONDS = 60
FULL = Adversarial(dataset="cifar10", model="resnet20", pool=1, steps=20_000, attacked=2000)


def run(config: Adversarial) -> Iterator[Condition]:
    """Without a norm and with batch norm."""
    options: dict[str, Any] = {"activation": nn.relu, "instrument": attacking(config)}
    if config.model == "mlp":
        options["widths"] = (config.width,) * 3
    options["prepare"] = lambda data: unit(data, config.pool)
    told = ["clean", *(f"attack {v:g}" for v in config.sizes)]
    says = dict.fromkeys([*told, *(f"noise {v:g}" for v in config.noises)], 0.5)
    for name in config.norms:
        yield Condition({"norm": name}, learn(config, nl.get(name), **options), [says])


def unit(data: Dataset, pool: int) -> Dataset:
    """Pooled images as float32 from 0 to 1, which nobody scales again."""
    data = pooled(data, pool)
    inputs = (np.float32(v / 255) for v in (data.train_inputs, data.test_inputs))
    return data._replace(**dict(zip(("train_inputs", "test_inputs"), inputs, strict=True)))


def attacking(config: Adversarial) -> Any:
    """An instrument: which test images are told right clean, attacked, and with noise."""
    data = dataset(config.dataset, config.data_dir)
    few = data._replace(train_inputs=data.train_inputs[:0])  # the others take seconds
    few = few._replace(test_inputs=data.test_inputs[: config.attacked])
    x = jnp.asarray(unit(few, config.pool).test_inputs)
    y = jnp.asarray(data.test_labels[: config.attacked])

    def look(net: Net) -> dict[str, Array]:
        variables = {"params": net.params, models.STATE: net.norm_state}

        def margin(x: Array) -> Array:
            z: Any = net.model.apply(variables, x, train=False)
            return margins(z, y)

        flags = {"clean": margin(x) > 0}
        for size in config.sizes:
            flags[f"attack {size:g}"] = attack(margin, x, size) > 0
        for sd in config.noises:
            noise = sd * jax.random.normal(jax.random.key(1), x.shape)
            flags[f"noise {sd:g}"] = margin(x + noise) > 0
        return {k: v.mean() for k, v in flags.items()} | {f"{k}_each": v for k, v in flags.items()}

    return look


def margins(z: Array, y: Array) -> Array:
    """The right logit less the largest other, `[N]`: above 0 where a net is right."""
    mine = jax.nn.one_hot(y, z.shape[-1], dtype=bool)
    return jnp.where(mine, z, 0).sum(-1) - jnp.where(mine, -jnp.inf, z).max(-1)


def attack(margin: Any, x: Array, size: float, *, steps: int = 20, starts: int = 2) -> Array:
    """The least margin that projected gradient descent finds, `[N]`."""
    low, high = jnp.maximum(x - size, 0), jnp.minimum(x + size, 1)
    slope = jax.grad(lambda x: margin(x).sum())

    def start(key: Array) -> Array:
        def step(_: Any, at: tuple[Array, Array]) -> tuple[Array, Array]:
            x, least = at
            x = jnp.clip(x - size / 5 * jnp.sign(slope(x)), low, high)
            return x, jnp.minimum(least, margin(x))

        first = jax.random.uniform(key, x.shape, minval=low, maxval=high)
        return lax.fori_loop(0, steps, step, (first, margin(x)))[1]

    return lax.map(start, jax.random.split(jax.random.key(0), starts)).min(0)


def near(records: Records) -> Records:
    """Of each net the evaluation at which its accuracy is next to the one of comparison."""
    found: dict[tuple, Any] = {}
    for record in records.where(kind="evaluation").trained():
        key = (record["norm"], record["seed"])
        apart = abs(record["accuracy"] - TARGET)
        if key not in found or apart < abs(found[key]["accuracy"] - TARGET):
            found[key] = record
    return Records(found.values())


def sizes(records: Records, what: str) -> list[float]:
    """How large attacks or noises were, in order."""
    keys = [k for k in records[0] if k.startswith(f"{what} ") and not k.endswith("_each")]
    return sorted(float(k.removeprefix(what)) for k in keys)


def verdict(records: Records) -> Iterator[Verdict]:
    """Batch norm against none under attack and noise."""
    here = near(records)
    *attacks, widest = sizes(here, "attack")

    def right(norm: str, key: str) -> np.ndarray:
        return here.accuracy(key=key, norm=norm)

    claim = "where nets are compared, clean accuracies are equal (none less batch norm)"
    apart = 100 * (here.by_seed("accuracy", norm="none") - here.by_seed("accuracy", norm="batch"))
    yield decide("clean", claim, apart, at_least=-EQUAL, at_most=EQUAL, unit="points")
    how: dict[str, Any] = {"at_least": 0, "size": FEWER, "unit": "points", "source": GALLOWAY}
    for what, values in (("attack", attacks), ("noise", sizes(here, "noise"))):
        for size in values:
            lost = right("none", f"{what} {size:g}") - right("batch", f"{what} {size:g}")
            claim = f"under {what} of {size:g}, no norm is more accurate than batch norm"
            yield decide(f"{what}-{size:g}", claim, lost, untuned=True, **how)
    for norm in here.values("norm"):
        claim = f"{norm}: the attack by {widest:g} leaves nothing (accuracy)"
        left = right(norm, f"attack {widest:g}")
        yield decide(f"{norm}.broken", claim, left, at_most=BROKEN, unit="%")


def figure(records: Records) -> Figure:
    """The accuracy on the way, and under attack and noise where nets are compared."""
    here = near(records)
    picture, (first, *grid) = draw.canvas(3, width=4)
    draw.over_steps(first, records.where(kind="evaluation").trained(), draw.accuracy)
    draw.frame(first, threshold=100 * TARGET, title="clean; dotted: where nets are compared")
    for axes, what in zip(grid, ("attack", "noise"), strict=True):
        every = sizes(here, what)
        points = [
            r | {"size": size, "right": 100 * r[f"{what} {size:g}" if size else "clean"]}
            for r in here
            for size in (0.0, *every)
        ]
        draw.against(axes, points, "size", "right")
        draw.frame(axes, ylim=(0, 100), ticks=(0, *every), title=f"under {what}")
    grid[0].set(xlabel="ε", ylabel="test accuracy (%)")
    grid[1].set(xlabel="standard deviation")
    return draw.finish(picture)
