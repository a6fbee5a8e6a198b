"""Do the statistics of devices that do not speak to each other drift apart?

Claim: Where every device draws from all data, the statistics of its batches differ from the others'
by sampling and by no more, all through training; averaging the devices' running variances then
costs nothing at evaluation. Where the devices' data differ in their classes the statistics of the
first norm drift apart, and the net loses accuracy; behind a layer that was normalized locally there
is no drift.

Source: Hsieh et al. 2020, https://arxiv.org/abs/1910.00189, for the loss of accuracy where labels
differ, and for the drift as its cause. The rest is ours.

Protocol: Fashion-MNIST, an MLP (three layers of 100 sigmoids), 1,000 steps of SGD with momentum 0.9
at rate 0.05 on 8 devices, 4 examples per device, every device normalized on its own (with `mesh`
those along its last axis together, as the chips of a host are, and hosts drift), gradients
averaged. "shuffled": minibatches of all data; "sorted": the data sorted by class and cut into one
piece for each device. `instruments.drift` splits the variance into that within and that between
devices, for the moments of the last batch and for the running statistics. Of D devices (or hosts)
with b examples each, sampling alone puts (D − 1)/(bD − 1) of the variance between devices (the mean
of a beta distribution, for normal values), and less behind a layer that was normalized locally,
which makes the devices' means alike. At the end the same nets are evaluated with merged and with
averaged statistics.

Command: normlab run local_drift
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..engine import (
    Checkpoint,
    Condition,
    Record,
    Records,
    Source,
    Verdict,
    decide,
    draw,
    number,
    packed,
)
from ..engine.devices import Config, Lab
from ..training.trainer import Trainer, TrainState

SAMPLING = (0.8, 1.25)
"""The share between devices over what sampling makes of it, if there is no drift; the upper one was
set after a look at some of the results."""

LOSS = 0.5
"""Points of test accuracy that averaging variances may cost where it does not matter."""

APART = 0.1
"""The share of variance between running statistics that have drifted far apart; set after a look at
some of the results."""

TOGETHER = 0.01
"""That of statistics that have not, at most; set after a pilot."""

QUICK = Config(evaluations=10)
SECONDS = 150
FULL = Config(dataset="cifar10", steps=20_000, evaluations=40)


def run(config: Config) -> Iterator[Condition]:
    """Trains on shuffled and on sorted data, and measures the drift on the way."""
    for condition in ("shuffled", "sorted"):
        labels = {"condition": condition}
        says = [{"kind": "drift", "layer": n, "sampling": 0.1} for n in ("Normed_0", "Normed_1")]
        measure = functools.partial(train, config, condition == "sorted")
        yield Condition(labels, measure, [*says, {"kind": "averaging"}])


def train(
    config: Config, by_class: bool, resume: Checkpoint | None
) -> Iterator[Record | Checkpoint]:
    """Trains each device on its own, and measures how far they drift apart."""
    lab = Lab(config)
    apart = config.devices // (config.mesh[-1] if len(config.mesh) > 1 else 1)
    expected = (apart - 1) / (config.devices * config.per_device - 1)

    def measure(trainer: Trainer, state: TrainState) -> Iterator[Record]:
        for layer, norm in state.norm_state.items():
            kept: Remembered = norm["norm"]  # [devices, seeds, C]
            batch, running = shares(kept.last), shares(kept.inner)
            for i, seed in enumerate(config.each_seed):
                yield {
                    "kind": "drift",
                    "seed": seed,
                    "layer": layer,
                    "batch": number(batch[i]),
                    "running": number(running[i]),
                    "sampling": expected,
                }
        found = {"merged": trainer.evaluate(state), "averaged": trainer.evaluate(averaged(state))}
        for i, seed in enumerate(config.each_seed):
            record: Record = {"kind": "averaging", "seed": seed}
            for name, evaluation in found.items():
                record[name] = number(evaluation.accuracy[i])
                record[f"{name}_each"] = packed(evaluation.each["accuracy_each"][i])
            yield record

    own = nl.Sync(config.axes[-1]) if len(config.mesh) > 1 else nl.Sync()
    pieces = sort_by_class(lab, config) if by_class else None
    yield from lab.learn(own, resume, measure=measure, indices=pieces, population=remembered)


class Remembered(NamedTuple):
    """Running statistics, and the moments of the last batch: a `Population`."""

    inner: nl.Running
    last: nl.Moments

    def update(self, m: nl.Moments, **options: Any) -> Remembered:
        """Takes one batch in."""
        last = nl.Moments(*(jnp.broadcast_to(v, m.mean.shape).ravel() for v in m))
        return Remembered(self.inner.update(m, **options), last)

    def read(self) -> tuple[Array, Array]:
        """Those of the running statistics."""
        return self.inner.read()

    def pool(self, axis_name: nl.devices.AxisName) -> Remembered:
        """Merges the running statistics."""
        return self._replace(inner=nl.population.pool_running(self.inner, axis_name))


def remembered(channels: int, *, decay: float, dtype: DTypeLike) -> Remembered:
    """The state before the first batch."""
    zeros = jnp.zeros(channels, dtype)
    inner = nl.init_running(channels, decay=decay, dtype=dtype)
    return Remembered(inner, nl.Moments(zeros, zeros, zeros))


def shares(stats: nl.Moments | nl.Running) -> np.ndarray:
    """The share of variance between devices, `[seeds]`, the mean over the channels."""
    report = jax.vmap(instruments.drift, in_axes=1)(stats)
    return np.asarray(report.share).mean(axis=-1)


def averaged(state: TrainState) -> TrainState:
    """The state with each device's mean and variance replaced by their averages."""

    def one(running: nl.Running) -> nl.Running:
        mean, var = (
            jax.device_put(np.broadcast_to(np.mean(v, axis=0), v.shape), v.sharding)
            for v in (running.mean, running.var)
        )
        return running._replace(mean=mean, var=var)

    norm_state = jax.tree.map(
        lambda s: one(s) if isinstance(s, nl.Running) else s,
        state.norm_state,
        is_leaf=lambda s: isinstance(s, nl.Running),
    )
    return state._replace(norm_state=norm_state)


def sort_by_class(lab: Lab, config: Config) -> np.ndarray:
    """Minibatches in which each device sees its own piece of the data sorted by class."""
    pieces = np.array_split(np.argsort(lab.labels, kind="stable"), config.devices)
    columns = []
    for seed in config.each_seed:
        rng = np.random.default_rng(seed)
        drawn = [rng.choice(piece, (config.steps, config.per_device)) for piece in pieces]
        columns.append(np.concatenate(drawn, axis=1))
    return np.stack(columns, axis=1).astype(np.int32)


def verdict(records: Records) -> Iterator[Verdict]:
    """Drift beyond sampling, and what averaging and sorted data cost."""
    half = max(records.values("step")) / 2
    late = records.where(lambda r: r["step"] > half, kind="drift")
    (sampling,) = late.values("sampling")
    first, *others = sorted(late.values("layer"))
    low, high = SAMPLING
    shuffled, by_class = (late.where(condition=c) for c in ("shuffled", "sorted"))

    def mean(here: Records, key: str, layer: str) -> np.ndarray:
        return here.where(layer=layer).by_seed(key, of=np.mean)

    claim = "shuffled, norm 1: batches differ as samples do (share of variance over sampling's)"
    share = mean(shuffled, "batch", first) / sampling
    yield decide("shuffled.norm-1", claim, share, at_least=low, at_most=high, geometric=True)
    claim = "sorted, norm 1: running statistics differ more than shuffled (ratio of the shares)"
    ratio = mean(by_class, "running", first) / mean(shuffled, "running", first)
    source = Source("hsieh2020", "", "", "second-hand")
    yield decide("sorted.norm-1", claim, ratio, at_least=1, geometric=True, source=source)
    claim = f"sorted, norm 1: more than {APART:.0%} of the variance is between the devices"
    yield decide("sorted.norm-1.share", claim, mean(by_class, "running", first), at_least=APART)
    for at, layer in enumerate(others, 2):
        claim = f"sorted, norm {at}, behind a local norm: statistics stay together (share)"
        share = mean(by_class, "running", layer)
        yield decide(f"sorted.norm-{at}", claim, share, at_most=TOGETHER)

    def accuracy(condition: str, key: str) -> np.ndarray:
        return records.accuracy(condition, key=key, kind="averaging")

    points = functools.partial(decide, unit="points")
    same, apart = (accuracy(c, "merged") - accuracy(c, "averaged") for c in ("shuffled", "sorted"))
    claim = "shuffled: averaging the running variances costs nothing (accuracy lost)"
    yield points("shuffled.averaged", claim, same, at_least=-LOSS, at_most=LOSS)
    claim = "sorted: averaging the running variances costs no accuracy, it gains some (lost)"
    yield points("sorted.averaged", claim, apart, at_most=0)
    lost = accuracy("shuffled", "merged") - accuracy("sorted", "merged")
    claim = "where the devices' classes differ, local batch norm ends less accurate (accuracy lost)"
    source = Source("hsieh2020", "abstract", "", "abstract")
    yield points("sorted.lost", claim, lost, at_least=0, untuned=True, source=source)


def figure(records: Records) -> Figure:
    """The share of variance between devices, and the test error, over training."""
    drifts = records.where(kind="drift")
    picture, grid = draw.canvas(3, width=4, height=4.8)
    for axes, condition in zip(grid, drifts.values("condition"), strict=False):
        here = drifts.where(condition=condition)
        for at, (layer, style) in enumerate(draw.styles(sorted(here.values("layer"))).items(), 1):
            mine = here.where(layer=layer)
            for key, line, label in (("batch", "-", "a batch"), ("running", "--", "running")):
                look = {**style, "ls": line, "label": f"norm {at}, {label}"}
                draw.over_steps(axes, mine, key, by="layer", **look)
        draw.dotted(axes, here[0]["sampling"], label="a batch, by sampling")
        axes.set(title=condition, yscale="log", ylim=(1e-5, 1))
    grid[0].set_ylabel("share of the variance between devices")
    lost = lambda r: 100 * (r["merged"] - r["averaged"])  # noqa: E731
    draw.against(grid[2], records.where(kind="averaging"), "step", lost, by="condition")
    grid[2].set_xlabel("optimizer step")
    draw.frame(grid[2], ylabel="accuracy lost by averaging (points)", legend=True)
    title = "Local statistics. Left: median and band of all seeds; right: mean and 95% interval"
    return draw.finish(picture, title, fontsize=10)
