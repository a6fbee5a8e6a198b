"""What a convolution costs on a CPU: the forms the experiments could use, beside PyTorch.

    normlab bench conv    # needs torch: pip install 'normlab[peers]'

A turn is a scan over training steps of one 3×3 convolution per seed, forward and backward by image
and kernel, on the cores that a worker of the questions has. PyTorch does the same in an eager loop
over the seeds, channels last. The forms take turns; medians are compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import normlab as nl

from .. import models
from .config import BenchConv
from .turns import (
    REUSE,
    Process,
    available_cores,
    medians,
    per_step,
    require_torch,
    take_turns,
)

CASES = (
    (28, 1, 8, 2),
    (14, 8, 16, 2),
    (7, 16, 32, 2),
    (28, 8, 16, 1),
    (32, 3, 32, 1),
    (32, 16, 16, 1),
)
"""Size of the image, channels in and out, stride: the small conv net's, then larger ones."""

FORMS: dict[str, Callable[[Array, Array, int], Array]] = {
    "XLA": lambda x, w, stride: nl.Conv(strides=stride)(x, w),
    "one product": lambda x, w, stride: models.MatmulConv(strides=stride).product(x, w),
    "MatmulConv": lambda x, w, stride: models.MatmulConv(strides=stride)(x, w),
}
"""`MatmulConv` is one product, or one for each block of images."""


def run(config: BenchConv, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Measures case after case, in a process of its own.

    Args:
      config: What to time.
      say: Receives short messages about what is going on.

    Returns:
      For each case its `label`, and by form the `ms_per_step` and its `range_ms`.

    Raises:
      RunError: If torch is missing.
    """
    require_torch("conv")
    variables = {"JAX_PLATFORMS": "cpu", **(REUSE if config.reuse_memory else {})}
    cores = available_cores()[: config.cores]
    results = []
    with Process(
        "conv", functools.partial, measure, config, variables=variables, cores=cores
    ) as process:
        for case in CASES:
            size, inputs, outputs, stride = case
            label = f"{size}×{size}, {inputs} → {outputs}, stride {stride}"
            say(label)
            results.append({"label": label, **medians(process.ask("__call__", case))})
    return results


def measure(config: BenchConv, case: tuple[int, int, int, int]) -> dict[str, list[float]]:
    """Returns milliseconds per step of every turn, by form."""
    size, inputs, outputs, stride = case
    rng = np.random.default_rng(0)
    shape = (config.seeds, config.batch_size, size, size, inputs)
    x = rng.standard_normal(shape, np.float32)
    w = 0.1 * rng.standard_normal((config.seeds, 3, 3, inputs, outputs), np.float32)
    turns: dict[str, Callable[[], Any]] = {
        name: _scan(form, stride, config.steps, x, w)
        for name, form in FORMS.items()
        if config.xla or name != "XLA"
    }
    turns["torch"] = _torch(stride, config, x, w)
    for turn in turns.values():
        turn()
    timed = {name: per_step(turn, config.steps) for name, turn in turns.items()}
    *_, taken = take_turns(timed, config.rounds)
    return taken


def training_step(form: Callable[[Array, Array, int], Array], stride: int) -> Callable[..., Any]:
    """A step that needs both gradients: `(x, w) -> (x, w)`, each moved by a little of its own."""

    def step(x: Array, w: Array) -> tuple[Array, Array]:
        y, pull_back = jax.vjp(lambda x, w: form(x, w, stride), x, w)
        dx, dw = pull_back(y)
        return x - 1e-9 * dx, w - 1e-9 * dw

    return step


def _scan(
    form: Callable[[Array, Array, int], Array], stride: int, steps: int, x: Any, w: Any
) -> Callable[[], Any]:
    step = jax.vmap(training_step(form, stride))
    scan = jax.jit(lambda x, w: lax.scan(lambda v, _: (step(*v), None), (x, w), length=steps)[0])
    x, w = jnp.asarray(x), jnp.asarray(w)
    return lambda: jax.block_until_ready(scan(x, w))


def _torch(stride: int, config: BenchConv, x: np.ndarray, w: np.ndarray) -> Callable[[], None]:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(config.cores)

    def leaf(v: np.ndarray, *axes: int) -> Any:
        tensor = torch.from_numpy(v.transpose(axes).copy())
        return tensor.contiguous(memory_format=torch.channels_last).requires_grad_()

    lanes = [(leaf(a, 0, 3, 1, 2), leaf(b, 3, 2, 0, 1)) for a, b in zip(x, w, strict=True)]

    def turn() -> None:
        for _ in range(config.steps):
            for x, w in lanes:
                y = torch.nn.functional.conv2d(x, w, stride=stride, padding=1)
                y.backward(y.detach())
                with torch.no_grad():
                    for v in (x, w):
                        v -= 1e-9 * v.grad
                        v.grad = None

    return turn
