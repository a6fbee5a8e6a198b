"""What each variance algorithm costs, and how wrong it is at a large mean.

    normlab numerics              # half a minute
    normlab numerics --markdown   # the table of docs/numerics.md

Batch norm of x ~ N(mean, 1), against the same in float64 on the same rounded numbers. The error is
that of the output before it is rounded to the input's type, in the root mean square; 1 is the size
of the output itself. Nothing can beat the floor: the exact statistics, with the mean rounded to
float32 as a shift has to be. The cost is that of a step of batch norm with each algorithm, forward
and backward, in copies of x, all measured in turns.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import normlab as nl

from .config import Numerics

MEANS = (0.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
ALGORITHMS = tuple(name for name in get_args(nl.measure.Algorithm) if name != "auto")
EPS = 1e-5


HEADINGS = ("statistics", "input", *(f"mean {mean:g}" for mean in MEANS), "cost in copies")


def rows(config: Numerics) -> Iterator[dict[str, Any]]:
    """What was measured, of each algorithm and input type.

    `errors` is the relative error at each mean, `cost_copies` that of a step, or null.
    """
    copies = costs(config.rounds)
    for dtype in ("float32", "bfloat16"):
        by_algorithm: dict[str, dict[str, float]] = {}
        for mean in MEANS:
            for name, error in errors(config, mean, dtype).items():
                by_algorithm.setdefault(name, {})[f"{mean:g}"] = error
        for name, by_mean in by_algorithm.items():
            cost = copies.get(name) if dtype == "float32" else None
            yield {"algorithm": name, "dtype": dtype, "errors": by_mean, "cost_copies": cost}


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    cost = row["cost_copies"]
    errors = (f"{error:.0e}" for error in row["errors"].values())
    return row["algorithm"], row["dtype"], *errors, "–" if cost is None else f"{cost:.1f}"


def errors(config: Numerics, mean: float, dtype: str) -> dict[str, float]:
    """The error of each algorithm at one mean."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(mean, 1, (config.examples, 64)), dtype)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    mu, sigma = exact.mean(0), np.sqrt(exact.var(0) + EPS)
    truth = (exact - mu) / sigma
    shards = x.reshape(config.shards, -1, 64)

    def output(parts: nl.Parts, x: Array) -> Array:
        return nl.affine(parts, x.astype(jnp.float32))

    @functools.partial(jax.jit, static_argnames="algorithm")
    def normlab(x: Array, algorithm: nl.measure.Algorithm) -> Array:
        parts, _ = nl.batch_parts(x, None, None, train=True, eps=EPS, algorithm=algorithm)
        return output(parts, x)

    @jax.jit
    @functools.partial(jax.vmap, axis_name="shards")
    def chan(x: Array) -> Array:
        parts, _ = nl.batch_parts(x, None, None, train=True, eps=EPS, axis_name="shards")
        return output(parts, x)

    layer = flax.linen.BatchNorm(use_running_average=False, epsilon=EPS, dtype=jnp.float32)
    variables = layer.init(jax.random.key(0), x.astype(jnp.float32))
    outputs = {
        "floor": (exact - mu.astype(np.float32).astype(np.float64)) / sigma,
        **{name: normlab(x, name) for name in ALGORITHMS},
        f"Chan's merge of {config.shards} shards": chan(shards).reshape(x.shape),
        "flax.linen": layer.apply(variables, x.astype(jnp.float32), mutable=["batch_stats"])[0],
    }
    size = np.sqrt(np.square(truth).mean()) or 1.0
    return {
        name: float(np.sqrt(np.square(np.asarray(h, np.float64) - truth).mean()) / size)
        for name, h in outputs.items()
    }


def costs(rounds: int) -> dict[str, float]:
    """A step of batch norm on `[64, 28, 28, 64]`, forward and backward, in copies."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(64, 28, 28, 64)), jnp.float32) for _ in range(2))
    params = nl.init_affine(64)

    def step(algorithm: nl.measure.Algorithm) -> Callable[[], Any]:
        def f(x: Array, params: nl.Affine) -> Array:
            return nl.batch_norm(x, params, train=True, algorithm=algorithm)[0]

        @jax.jit
        def both(x: Array, params: nl.Affine, dy: Array) -> Any:
            y, pull = jax.vjp(f, x, params)
            return y, pull(dy)

        return lambda: both(x, params, dy)

    copy = jax.jit(lambda x: 2 * x)
    turns = {"copy": lambda: copy(x), **{name: step(name) for name in ALGORITHMS}}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 1):
        for name, turn in turns.items():
            jax.block_until_ready(turn())
            begin = time.perf_counter()
            jax.block_until_ready([turn() for _ in range(3)])
            times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    return {name: seconds / medians["copy"] for name, seconds in medians.items()}
