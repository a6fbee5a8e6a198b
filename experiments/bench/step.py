"""What a training step costs: normlab in a scan beside an eager PyTorch loop, in one run.

    python -m experiments bench step    # needs torch: pip install -e '.[peers]'

Both train the network of figure 1 in Ioffe & Szegedy (2015), three layers of 100 sigmoids with
batch norm, by plain SGD on minibatches of random pixels, on the CPU. They take turns, so that both
meet the machine in the same moods, and medians are compared. The floor is what no arrangement of
the rest can undercut here: the step's matrix products and its update of the kernels alone, in a
scan of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import normlab as nl

from .. import models
from ..data import Dataset
from ..rundir import VARIABLES, RunError
from ..training.trainer import DeviceData, Trainer, minibatches


@dataclasses.dataclass(frozen=True)
class BenchStep:
    """Time one batch norm training step beside the same step in an eager PyTorch loop."""

    batch_size: int = 60
    """Examples per step; 60 is the paper's."""

    steps: int = 300
    """Steps per turn."""

    rounds: int = 7
    """Turns of each; the medians are reported."""

    lr: float = 0.1
    """Learning rate of plain SGD."""


def run(config: BenchStep) -> dict[str, Any]:
    """Returns milliseconds per step of both, their ratio, and the floor."""
    data = _random_pixels()
    indices = minibatches(0, len(data.train_images), config.batch_size, config.steps)
    contestants = {
        "normlab": _normlab(config, data, indices),
        "torch, eager": _torch(config, data, indices),
        "floor": _products(config, data),
    }
    for turn in contestants.values():
        turn()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(config.rounds):
        for name, turn in contestants.items():
            times[name].append(_seconds(turn) / config.steps * 1e3)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    return {
        "ms_per_step": medians,
        "range_ms": {name: (min(ms), max(ms)) for name, ms in times.items()},
        "normlab_over_torch": medians["normlab"] / medians["torch, eager"],
        "floor_over_torch": medians["floor"] / medians["torch, eager"],
        "cores": os.cpu_count(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


WIDTHS = (784, 100, 100, 100, 10)


def _random_pixels() -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6_000, 28, 28, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, 6_000, dtype=np.int32)
    return Dataset("random", images, labels, images[:8], labels[:8], 10, "random", "")


def _normlab(config: BenchStep, data: Dataset, indices: np.ndarray) -> Callable[[], None]:
    norm = nl.get("batch")
    device_data = DeviceData(data, 1)
    kernels = models.draw_kernels("mlp", 10, [0], device_data.probe)
    model = models.build("mlp", norm, 10)
    trainer = Trainer(model, optax.sgd(config.lr), device_data, kernels, synced=True)
    state = trainer.init()

    def turn() -> None:
        nonlocal state
        state, losses = trainer.train(state, indices[:, None])
        if not np.isfinite(losses).all():
            raise RunError("the loss is not finite: the times would mean nothing. Lower --lr.")

    return turn


def _torch(config: BenchStep, data: Dataset, indices: np.ndarray) -> Callable[[], None]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RunError(
            "bench step measures PyTorch beside normlab, and torch is not installed: "
            "pip install -c constraints.txt -e '.[peers]'"
        ) from None
    torch.manual_seed(0)
    layers: list[Any] = [torch.nn.Flatten()]
    for inputs, outputs in itertools.pairwise(WIDTHS[:-1]):
        layers += [torch.nn.Linear(inputs, outputs, bias=False), torch.nn.BatchNorm1d(outputs)]
        layers += [torch.nn.Sigmoid()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTHS[-2], WIDTHS[-1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    loss_of = torch.nn.CrossEntropyLoss()
    images = torch.from_numpy(data.train_images)
    labels = torch.from_numpy(data.train_labels.astype(np.int64))
    rows = torch.from_numpy(indices.astype(np.int64))
    mean, std = float(data.train_images.mean()), float(data.train_images.std())

    def turn() -> None:
        for chosen in rows:
            x = (images[chosen].float() - mean) / std
            optimizer.zero_grad()
            loss_of(model(x), labels[chosen]).backward()
            optimizer.step()

    return turn


def _products(config: BenchStep, data: Dataset) -> Callable[[], None]:
    """The floor: the step's eleven matrix products and its update of the kernels, in a scan."""
    rng = np.random.default_rng(0)
    kernels = [
        jnp.asarray(rng.normal(0, a**-0.5, (a, b)), jnp.float32)
        for a, b in itertools.pairwise(WIDTHS)
    ]
    pixels = (data.train_images[: 16 * config.batch_size] / 255).astype(np.float32)
    batches = jnp.asarray(pixels.reshape(16, config.batch_size, WIDTHS[0]))

    def step(kernels: list[Array], i: Array) -> tuple[list[Array], None]:
        inputs = [batches[i % 16]]
        for w in kernels:
            inputs.append(inputs[-1] @ w)
        error, changed = inputs.pop(), []
        for x, w in zip(reversed(inputs), reversed(kernels), strict=True):
            changed.append(w - 1e-9 * (x.T @ error))
            error = error @ w.T  # unused, and so not computed, for the first layer
        return changed[::-1], None

    scan = jax.jit(lambda kernels: lax.scan(step, kernels, jnp.arange(config.steps), unroll=2)[0])

    def turn() -> None:
        jax.block_until_ready(scan(kernels))

    return turn


def _seconds(f: Callable[[], None]) -> float:
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin
