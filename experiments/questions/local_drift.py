"""Do the statistics of devices that do not speak to each other drift apart?

Claim: Where every device draws from all data, the statistics of its batches differ from the others'
by sampling and by no more, all through training; averaging the devices' running variances then
costs nothing at evaluation. Where the devices' data differ in their classes they drift apart, and
an average of variances, which leaves out the variance between devices, costs accuracy; merging
(`nl.population.pool_running`) keeps it.

Source: Hsieh et al. 2020, https://arxiv.org/abs/1910.00189

Protocol: Fashion-MNIST, an MLP (three layers of 100 sigmoids), 1,000 steps of SGD with momentum 0.9
at rate 0.05 on 8 devices, 4 examples per device, every device normalized on its own, gradients
averaged. "shuffled": minibatches of all data; "sorted": the data sorted by class
and cut into one piece for each device. `instruments.drift` splits the variance into that within and
that between devices, for the moments of the last batch and for the running statistics. Of D devices
with b examples each, sampling alone puts (D − 1)/(bD − 1) of the variance between devices (the mean
of a beta distribution, for normal values), and less behind a layer that was normalized locally,
which makes the devices' means alike. At the end the same nets are evaluated with merged and
with averaged statistics.

Command: python -m experiments run local_drift
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from .. import figures
from ..engine import Checkpoint, Condition, Record, Verdict, by_seed, decide, draw, number
from ..engine.devices import Config, Lab
from ..training.trainer import AXIS, Trainer, TrainState

SAMPLING = 1.25
"""The share between devices over what sampling makes of it, at most, if there is no drift."""

LOSS = 0.5
"""Points of test accuracy that averaging variances may cost where it does not matter, and must cost
where it does."""

APART = 0.1
"""The least share of variance between running statistics that have drifted apart."""

SECONDS = 95

QUICK = Config(evaluations=20)
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
    expected = (config.devices - 1) / (config.devices * config.per_device - 1)

    def measure(trainer: Trainer, state: TrainState) -> Iterator[Record]:
        for layer, norm in state.norm_state.items():
            delayed: nl.population.Delayed = norm["norm"]  # [devices, seeds, C]
            batch, running = shares(delayed.own), shares(delayed.inner)
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
        apart = trainer.evaluate(averaged(state)).accuracy
        for seed in range(config.seeds):
            lost = 100 * (merged[seed] - apart[seed])
            yield {"kind": "averaging", "seed": seed, "lost": number(lost)}

    # Delayed statistics that are never exchanged are local, and remember the last batch.
    own = nl.Sync(AXIS, every=1)
    pieces = sort_by_class(lab, config) if by_class else None
    yield from lab.learn(own, resume, exchanged=False, measure=measure, indices=pieces)


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


def verdict(records: Sequence[Record]) -> tuple[Verdict, ...]:
    """Drift beyond sampling, and what averaging loses, on either kind of data."""
    half = max(r["step"] for r in records if "step" in r) / 2
    late = [r for r in records if r["kind"] == "drift" and r["step"] > half]

    def shares_of(key: str, condition: str, layer: str) -> list[float]:
        chosen = [r for r in late if (r["condition"], r["layer"]) == (condition, layer)]
        return [
            float(np.mean([r[key] for r in chosen if r["seed"] == seed]))
            for seed in sorted({r["seed"] for r in chosen})
        ]

    (sampling,) = {r["sampling"] for r in late}
    lost = {
        name: by_seed(records, "lost", kind="averaging", condition=name)
        for name in ("shuffled", "sorted")
    }
    found = []
    for at, layer in enumerate(sorted({r["layer"] for r in late}), 1):
        over = [share / sampling for share in shares_of("batch", "shuffled", layer)]
        claim = f"shuffled, norm {at}: batches differ as samples do or less (share ÷ sampling's)"
        found.append(decide(claim, over, at_most=SAMPLING))
        claim = f"sorted, norm {at}: running statistics drift apart (share between devices)"
        found.append(decide(claim, shares_of("running", "sorted", layer), at_least=APART))
    claim = "shuffled: averaging the running variances costs nothing (accuracy lost)"
    found.append(decide(claim, lost["shuffled"], at_least=-LOSS, at_most=LOSS, unit="points"))
    claim = "sorted: averaging the running variances loses accuracy"
    found.append(decide(claim, lost["sorted"], at_least=LOSS, unit="points"))
    return tuple(found)


def figure(records: Sequence[Record]) -> Figure:
    """The share of variance between devices, and the test error, over training."""
    drifts = [r for r in records if r["kind"] == "drift"]
    conditions = list(dict.fromkeys(r["condition"] for r in drifts))
    picture, grid = plt.subplots(1, 3, figsize=(12, 4.8), layout="constrained")
    layers = sorted({r["layer"] for r in drifts})
    styles = figures.palette(layers)
    for axes, condition in zip(grid, conditions, strict=False):
        here = [r for r in drifts if r["condition"] == condition]
        for at, layer in enumerate(layers, 1):
            of_layer = [r for r in here if r["layer"] == layer]
            for key, line, label in (("batch", "-", "a batch"), ("running", "--", "running")):
                steps, values = figures.series(of_layer, key)
                style = {**styles[layer], "ls": line, "label": f"norm {at}, {label}"}
                axes.plot(steps, np.median(values, axis=1), **style)
                low, high = values.min(axis=1), values.max(axis=1)
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
        axes.axhline(here[0]["sampling"], color="grey", lw=1, ls=":", label="a batch, by sampling")
        axes.set(xlabel="optimizer step", title=condition, yscale="log", ylim=(1e-5, 1))
        axes.grid(alpha=0.3, lw=0.5)
    grid[0].set_ylabel("share of the variance between devices")
    averaging = [r for r in records if r["kind"] == "averaging"]
    marks = figures.palette(conditions)
    for condition in conditions:
        here = [r for r in averaging if r["condition"] == condition]
        steps = sorted({r["step"] for r in here})
        values = [[r["lost"] for r in here if r["step"] == step] for step in steps]
        draw.spread(grid[2], steps, values, label=condition, **marks[condition])
    grid[2].set(xlabel="optimizer step", ylabel="accuracy lost by averaging (points)")
    grid[2].grid(alpha=0.3, lw=0.5)
    grid[2].legend(frameon=False)
    picture.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    picture.suptitle(
        "Local statistics. Left: median and band of all seeds; right: mean and 95% interval",
        fontsize=10,
    )
    return picture
