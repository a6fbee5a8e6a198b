"""What training costs: normlab in a scan beside an eager PyTorch loop, in one run, on the CPU.

    normlab bench step       # needs torch: pip install 'normlab[peers]'
    normlab bench figure1

Figure 1 of Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167) compares two nets on MNIST's
pixels, black or white: three layers of 100 sigmoids, without a norm and with batch norm, trained by
plain SGD for 50,000 steps of 60 examples. Three seeds of both are six runs. normlab trains each net
in a process of its own on a core of its own, all seeds side by side in a scan. PyTorch runs an
eager loop over the nets and seeds, once in one process with its default threads, once in a process
of one thread per net. The times of a turn are extrapolated to the steps of the figure. Nothing is
evaluated on the way.

A step is one of the net with batch norm and one seed, of both libraries in this process. Its floor
is what no arrangement of the rest can undercut here: the step's matrix products and its update of
the kernels alone, in a scan of their own.

All start from the same kernels and see the same batches; of figure 1 the first losses are compared:
the times are worth nothing where the work differs. The pixels are random, which costs what MNIST's
cost.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable
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
from .config import EXAMPLES, BenchFigure1, BenchStep
from .turns import (
    REUSE,
    Process,
    ask_all,
    available_cores,
    medians,
    per_step,
    require_torch,
    take_turns,
)

NETS = ("none", "batch")
"""The norms of the figure's two nets."""

WIDTHS = (784, 100, 100, 100, 10)
GAP = 1e-3
"""How far the losses of a turn may be apart, relatively, for work that is the same."""

Turn = Callable[[], np.ndarray]
"""Takes the steps of a turn, and returns their losses: `[nets, steps, seeds]` of figure 1."""


def step(config: BenchStep) -> dict[str, Any]:
    """Takes turns in this process.

    Returns:
      By contestant, `ms_per_step` and its `range_ms`; the ratios of normlab and of the floor to
      torch; the cores and the environment variables that matter.

    Raises:
      RunError: If torch is missing or a loss is not finite.
    """
    require_torch("step")
    shared = {k: getattr(config, k) for k in ("batch_size", "steps", "rounds", "lr")}
    one = BenchFigure1(**shared, seeds=1)
    contestants: dict[str, Callable[[], Any]] = {
        "normlab": build_normlab(one, ("batch",)),
        "torch, eager": build_torch(one, ("batch",)),
        "floor": _products(config),
    }
    for turn in contestants.values():
        turn()
    turns = {name: per_step(turn, config.steps) for name, turn in contestants.items()}
    *_, taken = take_turns(turns, config.rounds)
    result = medians(taken)
    ms = result["ms_per_step"]
    return result | {
        "normlab_over_torch": ms["normlab"] / ms["torch, eager"],
        "floor_over_torch": ms["floor"] / ms["torch, eager"],
        "cores": os.cpu_count(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def figure1(config: BenchFigure1, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Takes turns in processes, of which those of a contestant work at the same time.

    Args:
      config: What to time.
      say: Receives short messages about what is going on.

    Returns:
      By contestant, `ms_per_step` (a step of all seeds of both nets), its `range_ms`,
      `start_seconds` to build and compile, and `whole_seconds`, the extrapolation; `ratios` of
      each contestant's `whole_seconds` to normlab's; and the largest relative gap of their losses.

    Raises:
      RunError: If torch is missing, a process dies or the losses disagree.
    """
    require_torch("figure1")
    variables = {"JAX_PLATFORMS": "cpu", **(REUSE if config.reuse_memory else {})}
    cores = available_cores()
    one_each = [((net,), [cores[i % len(cores)]]) for i, net in enumerate(NETS)]
    contestants = {
        "normlab": (build_normlab, one_each),
        "torch": (build_torch, [(NETS, cores)]),
        "torch, a process per net": (build_torch, one_each),
    }
    start_seconds: dict[str, float] = {}
    losses: dict[str, np.ndarray] = {}
    turns: dict[str, Callable[[], float]] = {}
    taken = {}
    with contextlib.ExitStack() as stack:
        for name, (build, parts) in contestants.items():
            say(f"starting {name}")
            processes = [
                stack.enter_context(
                    Process(name, Part, build, config, nets, variables=variables, cores=where)
                )
                for nets, where in parts
            ]
            start_seconds[name] = max(ask_all(processes, "start_seconds"))
            turn = functools.partial(ask_all, processes, "turn")
            losses[name] = np.concatenate(turn())
            turns[name] = per_step(turn, config.steps)
        ours = losses["normlab"]
        gap = max(float(np.max(np.abs(ours - v) / np.abs(ours))) for v in losses.values())
        if not gap < GAP:
            raise RunError(
                f"the losses of normlab and torch are {gap:.1e} apart, relatively, where {GAP} is "
                "allowed: they do not do the same work. Lower --lr or --steps."
            )
        for taken in take_turns(turns, config.rounds):
            say(f"{len(taken['normlab'])} of {config.rounds} rounds")
    result = medians(taken)
    ms = result["ms_per_step"]
    whole_seconds = {name: start_seconds[name] + config.whole * ms[name] / 1e3 for name in ms}
    return result | {
        "start_seconds": start_seconds,
        "whole_seconds": whole_seconds,
        "ratios": {name: s / whole_seconds["normlab"] for name, s in whole_seconds.items()},
        "loss_gap": gap,
        "cores": len(cores),
        "variables": {name: variables.get(name, os.environ.get(name)) for name in REUSE},
    }


class Part:
    """What one process does of a contestant's work: all of it, or some of the nets.

    Args:
      build: Makes a turn, such as `build_normlab` and `build_torch` do.
      *arguments: Its own: what is timed, and which of the nets.
    """

    def __init__(self, build: Callable[..., Turn], *arguments: Any) -> None:
        begin = time.perf_counter()
        self.turn = build(*arguments)
        self._start_seconds = time.perf_counter() - begin

    def start_seconds(self) -> float:
        """Seconds that it took to build and compile."""
        return self._start_seconds


def build_normlab(config: BenchFigure1, nets: Iterable[str]) -> Turn:
    """Compiles the training of some nets; returns a turn."""
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
        if not np.isfinite(losses).all():
            raise RunError("the loss is not finite: the times would mean nothing. Lower --lr.")
        return np.stack(losses)

    return turn


def build_torch(config: BenchFigure1, nets: Iterable[str]) -> Turn:
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
    for net, seed in itertools.product(nets, range(config.seeds)):
        layers: list[Any] = [torch.nn.Flatten()]
        for (inputs, outputs), w in zip(itertools.pairwise(WIDTHS), _kernels(config), strict=True):
            hidden = outputs != WIDTHS[-1]
            normed = hidden and net == "batch"
            linear = torch.nn.Linear(inputs, outputs, bias=not normed)
            linear.weight.data = torch.from_numpy(w[seed].T.copy())
            if not normed:
                torch.nn.init.zeros_(linear.bias)
            layers += [linear, *([torch.nn.BatchNorm1d(outputs)] if normed else [])]
            layers += [torch.nn.Sigmoid()] if hidden else []
        model = torch.nn.Sequential(*layers)
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
        found = torch.stack(losses).numpy().reshape(-1, config.seeds, config.steps)
        return found.transpose(0, 2, 1)

    return turn


def _products(config: BenchStep) -> Callable[[], Any]:
    """The floor: the step's eleven matrix products and its update of the kernels, in a scan."""
    rng = np.random.default_rng(0)
    kernels = [
        jnp.asarray(rng.normal(0, a**-0.5, (a, b)), jnp.float32)
        for a, b in itertools.pairwise(WIDTHS)
    ]
    batches = jnp.asarray(rng.random((16, config.batch_size, WIDTHS[0]), np.float32))

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
    return lambda: jax.block_until_ready(scan(kernels))


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
