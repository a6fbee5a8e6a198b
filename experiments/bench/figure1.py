"""What figure 1 costs: normlab as the questions train it, beside an eager PyTorch loop.

    python -m experiments bench figure1    # needs torch: pip install -e '.[peers]'

Figure 1 of Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167) compares two nets on MNIST's
pixels, black or white: three layers of 100 sigmoids, without a norm and with batch norm, trained by
plain SGD for 50,000 steps of 60 examples. Three seeds of both are six runs. normlab trains each net
in a process of its own on a core of its own, all seeds side by side in a scan. PyTorch runs an
eager loop over the nets and seeds, once in one process with its default threads, once in a process
of one thread per net.

All start from the same kernels and see the same batches, and their first losses are compared: the
times are worth nothing where the work differs. The pixels are random, which costs what MNIST's
cost. Contestants take turns; medians are compared and extrapolated from the steps of a turn to
those of the figure. Nothing is evaluated on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import optax

import normlab as nl

from .. import models
from ..data import Dataset
from ..rundir import RunError
from ..training.trainer import DeviceData, Trainer, minibatches
from .ops import REUSE
from .step import WIDTHS

NETS = ("none", "batch")
"""The norms of the figure's two nets."""

EXAMPLES = 60_000
GAP = 1e-3
"""How far the losses of a turn may be apart, relatively, for work that is the same."""


@dataclasses.dataclass(frozen=True)
class BenchFigure1:
    """Time the runs of the BN paper's figure 1 beside an eager PyTorch loop."""

    seeds: int = 3
    """Seeds of each net."""

    batch_size: int = 60
    """Examples per step; 60 is the paper's."""

    steps: int = 300
    """Steps per turn."""

    rounds: int = 7
    """Turns of each; the medians are reported."""

    whole: int = 50_000
    """Steps of the figure, to which the times are extrapolated."""

    lr: float = 0.1
    """Learning rate of plain SGD."""

    sd: float = 0.1
    """Standard deviation of the initial kernels, which are Gaussian."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed, in the processes of all contestants."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        for option in ("seeds", "steps", "rounds", "whole"):
            if getattr(self, option) < 1:
                raise RunError(f"--{option}: got {getattr(self, option)}; it must be at least 1.")
        if not 1 <= self.batch_size <= EXAMPLES:
            raise RunError(f"--batch-size: got {self.batch_size}; choose 1 to {EXAMPLES}.")


class Part(NamedTuple):
    """What one process does of a contestant's work: these nets, on these cores."""

    build: Callable[[BenchFigure1, tuple[str, ...]], Callable[[], np.ndarray]]
    nets: tuple[str, ...]
    cores: set[int]


def run(config: BenchFigure1, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Takes turns.

    Args:
      config: What to time.
      say: Receives short messages about what is going on.

    Returns:
      By contestant, `ms_per_step` (a step of all seeds of both nets), its `range_ms`, `start_s` to
      build and compile, and `whole_s`, the extrapolation; `ratios` of each contestant's `whole_s`
      to normlab's; and the largest relative gap of their losses.

    Raises:
      RunError: If torch is missing, a process dies or the losses disagree.
    """
    require_torch("figure1")
    variables = {"JAX_PLATFORMS": "cpu", **(REUSE if config.reuse_memory else {})}
    cores = available_cores()
    one_each = [{cores[i % len(cores)]} for i in range(len(NETS))]
    contestants = {
        "normlab": [
            Part(build_normlab, (net,), core) for net, core in zip(NETS, one_each, strict=True)
        ],
        "torch": [Part(build_torch, NETS, set(cores))],
        "torch, a process per net": [
            Part(build_torch, (net,), core) for net, core in zip(NETS, one_each, strict=True)
        ],
    }
    start_s: dict[str, float] = {}
    losses: dict[str, np.ndarray] = {}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    with contextlib.ExitStack() as stack:
        pools: dict[str, list[ProcessPoolExecutor]] = {}
        for name, parts in contestants.items():
            say(f"starting {name}")
            pools[name] = [stack.enter_context(process()) for _ in parts]
            begun = [
                _submit(pool, part, variables, config)
                for pool, part in zip(pools[name], parts, strict=True)
            ]
            start_s[name] = max(future.result() for future in begun)
            _, losses[name] = _turn(pools[name])
        gap = max(_gap(losses["normlab"], v) for v in losses.values())
        if not gap < GAP:
            raise RunError(
                f"the losses of normlab and torch are {gap:.1e} apart, relatively, where {GAP} is "
                "allowed: they do not do the same work. Lower --lr or --steps."
            )
        for i in range(config.rounds):
            say(f"round {i + 1} of {config.rounds}")
            start = i % len(contestants)
            for name in [*contestants, *contestants][start : start + len(contestants)]:
                seconds, _ = _turn(pools[name])
                times[name].append(seconds / config.steps * 1e3)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    whole_s = {name: start_s[name] + config.whole * ms / 1e3 for name, ms in medians.items()}
    return {
        "ms_per_step": medians,
        "range_ms": {name: (min(ms), max(ms)) for name, ms in times.items()},
        "start_s": start_s,
        "whole_s": whole_s,
        "ratios": {name: s / whole_s["normlab"] for name, s in whole_s.items()},
        "loss_gap": gap,
        "cores": len(cores),
        "variables": {name: variables.get(name, os.environ.get(name)) for name in REUSE},
    }


def build_normlab(config: BenchFigure1, nets: tuple[str, ...]) -> Callable[[], np.ndarray]:
    """Compiles the training of some nets; returns a turn, which returns `[nets, steps, seeds]`."""
    images, labels = _pixels()
    data = DeviceData(Dataset("", images, labels, images[:8], labels[:8], 10, "", ""), 1)
    batches = _batches(config)
    *hidden, last = _kernels(config)
    kernels: dict[str, Any] = {f"Normed_{i}": {"kernel": w} for i, w in enumerate(hidden)}
    bias = np.zeros((config.seeds, WIDTHS[-1]), np.float32)
    kernels["Dense_0"] = {"kernel": last, "bias": bias}
    lanes = []
    for net in nets:
        model = models.build("mlp", nl.get(net), WIDTHS[-1])
        trainer = Trainer(model, optax.sgd(config.lr), data, kernels, synced=True)
        state = trainer.init()
        trainer.compile(state, [config.steps], config.batch_size)
        lanes.append([trainer, state])

    def turn() -> np.ndarray:
        losses = []
        for lane in lanes:
            trainer, state = lane
            lane[1], found = trainer.train(state, batches)
            losses.append(found)
        return np.stack(losses)

    return turn


def build_torch(config: BenchFigure1, nets: tuple[str, ...]) -> Callable[[], np.ndarray]:
    """The same of an eager PyTorch loop over the nets and seeds."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(available_cores()))
    images, labels = map(torch.from_numpy, _pixels())
    some = images[:10_000].float()
    mean, std = float(some.mean()), float(some.std(correction=0))
    labels = labels.long()
    rows = torch.from_numpy(_batches(config).astype(np.int64))
    loss_of = torch.nn.CrossEntropyLoss()
    lanes = []
    for net in nets:
        for seed in range(config.seeds):
            layers: list[Any] = [torch.nn.Flatten()]
            for inputs, outputs in itertools.pairwise(WIDTHS):
                hidden = outputs != WIDTHS[-1]
                normed = hidden and net == "batch"
                layers.append(torch.nn.Linear(inputs, outputs, bias=not normed))
                layers += [torch.nn.BatchNorm1d(outputs)] if normed else []
                layers += [torch.nn.Sigmoid()] if hidden else []
            model = torch.nn.Sequential(*layers)
            kernels = iter(_kernels(config))
            for layer in model:
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.data = torch.from_numpy(next(kernels)[seed].T.copy())
                    if layer.bias is not None:
                        torch.nn.init.zeros_(layer.bias)
            lanes.append((model, torch.optim.SGD(model.parameters(), lr=config.lr), rows[:, seed]))

    def turn() -> np.ndarray:
        losses = []
        for model, optimizer, batches in lanes:
            for chosen in batches:
                x = (images[chosen].float() - mean) / std
                optimizer.zero_grad()
                loss = loss_of(model(x), labels[chosen])
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        found = torch.stack(losses).numpy().reshape(len(nets), config.seeds, config.steps)
        return found.transpose(0, 2, 1)

    return turn


def require_torch(command: str) -> None:
    """Raises RunError, with the line that installs it, where torch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise RunError(
            f"bench {command} measures PyTorch beside normlab, and torch is not installed: "
            "pip install -c constraints.txt -e '.[peers]'"
        )


def available_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _pixels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = 255 * rng.integers(0, 2, (EXAMPLES, 28, 28, 1), dtype=np.uint8)
    return images, rng.integers(0, 10, EXAMPLES, dtype=np.int32)


def _kernels(config: BenchFigure1) -> list[np.ndarray]:
    """The initial kernels of every layer, `[seeds, inputs, outputs]`."""
    rng = np.random.default_rng(0)
    return [
        rng.normal(0, config.sd, (config.seeds, *shape)).astype(np.float32)
        for shape in itertools.pairwise(WIDTHS)
    ]


def _batches(config: BenchFigure1) -> np.ndarray:
    """The examples of every minibatch, `[steps, seeds, batch]`."""
    each = [
        minibatches(seed, EXAMPLES, config.batch_size, config.steps) for seed in range(config.seeds)
    ]
    return np.stack(each, 1)


def process() -> ProcessPoolExecutor:
    """One process to be, which leaves Ctrl-C to this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def _submit(
    pool: ProcessPoolExecutor, part: Part, variables: Mapping[str, str], config: BenchFigure1
) -> Future[float]:
    """Starts the process where the part is to run, so that its first import finds it so."""
    with inherited(part.cores, variables):
        return pool.submit(_start, part, config)


@contextlib.contextmanager
def inherited(cores: set[int], variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started inside have these cores and environment variables."""
    environment = dict(os.environ)
    pinned = hasattr(os, "sched_setaffinity")
    before = set(available_cores())
    os.environ.update(variables)
    if pinned:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if pinned:
            os.sched_setaffinity(0, before)


_turns: list[Callable[[], np.ndarray]] = []
"""What a turn of this process is, once it was started."""


def _start(part: Part, config: BenchFigure1) -> float:
    begin = time.perf_counter()
    _turns.append(part.build(config, part.nets))
    return time.perf_counter() - begin


def _take_turn() -> np.ndarray:
    return _turns[0]()


def _turn(pools: list[ProcessPoolExecutor]) -> tuple[float, np.ndarray]:
    """One turn of all processes at once: its seconds and the losses, `[nets, steps, seeds]`."""
    begin = time.perf_counter()
    futures = [pool.submit(_take_turn) for pool in pools]
    losses = [future.result() for future in futures]
    return time.perf_counter() - begin, np.concatenate(losses)


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b) / np.abs(a)))
