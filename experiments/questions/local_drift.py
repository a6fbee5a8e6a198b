"""Do the statistics of devices that do not speak to each other drift apart?

Claim: Where every device draws from all data, the statistics of its batches differ from the others'
by sampling and by no more, all through training; averaging the devices' running variances then
costs nothing at evaluation. Where the devices' data differ in their classes they drift apart, and
an average of variances, which leaves out the variance between devices, costs accuracy; merging
(`nl.population.pool_running`) keeps it.

Source: Hsieh et al. 2020, https://arxiv.org/abs/1910.00189

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

Command: python -m experiments run local_drift
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

from ..engine import Checkpoint, Condition, Record, Records, Verdict, decide, draw, number
from ..engine.devices import Config, Lab
from ..training.trainer import Trainer, TrainState

SAMPLING = 1.25
"""The share between devices over what sampling makes of it, at most, if there is no drift."""

LOSS = 0.5
"""Points of test accuracy that averaging variances may cost where it does not matter, and must cost
where it does."""

APART = 0.1
"""The least share of variance between running statistics that have drifted apart."""

QUICK = Config(evaluations=20)
SECONDS = 95
FULL = Config(dataset="cifar10", steps=20_000, evaluations=40, seeds=10)


def run(config: Config) -> Iterator[Condition]:
    """Trains on shuffled and on sorted data, and measures the drift on the way."""
    for condition in ("shuffled", "sorted"):
        labels = {"condition": condition}
        yield Condition(labels, functools.partial(train, config, condition == "sorted"))


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
            for seed in range(config.seeds):
                yield {
                    "kind": "drift",
                    "seed": seed,
                    "layer": layer,
                    "batch": number(batch[seed]),
                    "running": number(running[seed]),
                    "sampling": expected,
                }
        merged = trainer.evaluate(state).accuracy
        mean = trainer.evaluate(averaged(state)).accuracy
        for seed in range(config.seeds):
            lost = 100 * (merged[seed] - mean[seed])
            yield {"kind": "averaging", "seed": seed, "lost": number(lost)}

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
    for seed in range(config.seeds):
        rng = np.random.default_rng(seed)
        drawn = [rng.choice(piece, (config.steps, config.per_device)) for piece in pieces]
        columns.append(np.concatenate(drawn, axis=1))
    return np.stack(columns, axis=1).astype(np.int32)


def verdict(records: Records) -> Iterator[Verdict]:
    """Drift beyond sampling, and what averaging loses, on either kind of data."""
    half = max(records.values("step")) / 2
    late = records.where(lambda r: r["step"] > half, kind="drift")
    (sampling,) = late.values("sampling")
    for at, layer in enumerate(sorted(late.values("layer")), 1):
        here = late.where(layer=layer)
        share = here.by_seed("batch", of=np.mean, condition="shuffled")
        claim = f"shuffled, norm {at}: batches differ as samples do or less (share ÷ sampling's)"
        yield decide(claim, share / sampling, at_most=SAMPLING)
        share = here.by_seed("running", of=np.mean, condition="sorted")
        claim = f"sorted, norm {at}: running statistics drift apart (share between devices)"
        yield decide(claim, share, at_least=APART)
    shuffled, by_class = (records.by_seed("lost", condition=c) for c in ("shuffled", "sorted"))
    claim = "shuffled: averaging the running variances costs nothing (accuracy lost)"
    yield decide(claim, shuffled, at_least=-LOSS, at_most=LOSS, unit="points")
    claim = "sorted: averaging the running variances loses accuracy"
    yield decide(claim, by_class, at_least=LOSS, unit="points")


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
    draw.against(grid[2], records.where(kind="averaging"), "step", "lost", by="condition")
    grid[2].set_xlabel("optimizer step")
    draw.frame(grid[2], ylabel="accuracy lost by averaging (points)", legend=True)
    title = "Local statistics. Left: median and band of all seeds; right: mean and 95% interval"
    return draw.finish(picture, title, fontsize=10)
