"""What a training step costs: normlab in a scan beside an eager PyTorch loop, in one run.

    python -m experiments bench        # needs torch: pip install -e '.[peers]'

Both train the network of figure 1 in Ioffe & Szegedy (2015), three layers of 100 sigmoids with
batch norm, by plain SGD on minibatches of random pixels, on the CPU. They take turns, so that both
meet the machine in the same moods, and medians are compared.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

import normlab as nl
from experiments import models
from experiments.data import Dataset
from experiments.rundir import VARIABLES, RunError
from experiments.train import DeviceData, Trainer, minibatches


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time one batch norm training step beside the same step in an eager PyTorch loop."""

    batch_size: int = 60
    """Examples per step; 60 is the paper's."""

    steps: int = 300
    """Steps per turn."""

    rounds: int = 7
    """Turns of each; the medians are reported."""

    lr: float = 0.1
    """Learning rate of plain SGD."""


def run(config: Bench) -> dict[str, Any]:
    """Returns milliseconds per step of both, their ratio, and the floor."""
    data = _random_pixels()
    indices = minibatches(0, len(data.train_images), config.batch_size, config.steps)
    contestants = {
        "normlab": _normlab(config, data, indices),
        "torch": _torch(config, data, indices),
    }
    for turn in contestants.values():
        turn()
    times: dict[str, list[float]] = {name: [] for name in (*contestants, "floor")}
    for _ in range(config.rounds):
        for name, turn in contestants.items():
            times[name].append(_seconds(turn) / config.steps * 1e3)
        times["floor"].append(_floor_ms(config.batch_size))
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    return {
        "ms_per_step": medians,
        "range_ms": {name: (min(ms), max(ms)) for name, ms in times.items()},
        "normlab_over_torch": medians["normlab"] / medians["torch"],
        "floor_bytes": _floor_bytes(config.batch_size),
        "cores": os.cpu_count(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


WIDTHS = (784, 100, 100, 100, 10)


def _random_pixels() -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6_000, 28, 28, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, 6_000, dtype=np.int32)
    return Dataset("random", images, labels, images[:8], labels[:8], 10, "random", "")


def _normlab(config: Bench, data: Dataset, indices: np.ndarray) -> Callable[[], None]:
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


def _torch(config: Bench, data: Dataset, indices: np.ndarray) -> Callable[[], None]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RunError(
            "bench measures PyTorch beside normlab, and torch is not installed: "
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


def _floor_bytes(batch_size: int) -> int:
    """What any step must move: the pixels once, each kernel read twice and written once."""
    kernels = sum(a * b for a, b in itertools.pairwise(WIDTHS))
    return batch_size * WIDTHS[0] + 3 * 4 * kernels


def _floor_ms(batch_size: int) -> float:
    """The time to copy half of those bytes (a copy reads and writes), in milliseconds."""
    source = np.ones(_floor_bytes(batch_size) // 2, np.uint8)
    target = np.empty_like(source)
    return min(_seconds(lambda: np.copyto(target, source)) for _ in range(20)) * 1e3


def _seconds(f: Callable[[], None]) -> float:
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin
