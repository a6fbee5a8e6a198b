"""Synced batch norm beside flax's: its time, its variance, and its collectives.

    python -m experiments bench sync             # a minute
    python -m experiments bench sync --markdown  # the table of docs/ledger.md

All run in `shard_map` over the devices of this host and take turns. Forward computes the output and
the next running statistics; both is that, and the gradients by x, g and b. The variance is that
which goes into the running statistics, of x ~ N(1000, 1) in float32, beside that of the same
numbers in float64.
Collectives are counted in the compiled programs, here and, where their compilers are installed,
for a TPU and a GPU machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from normlab.devices.mapped import vary
from normlab.instruments.collectives import collectives

from ..programs.machines import Machine, abstract, machine, missing
from ..training.trainer import AXIS, on_devices, set_devices
from .config import BenchSync
from .turns import Repeated, medians, take_turns

MEAN = 1e3
SHAPES = ((32, 256), (8, 28, 28, 64))
"""Of x on each device."""

ELSEWHERE = {"tpu": "v5p:4x4x4", "cuda": "h100:1x8x8"}
DIRECTIONS = ("forward", "both")


HEADINGS = (
    "x on each device",
    "batch norm",
    "fwd ms",
    "÷ flax",
    "both ms",
    "÷ flax",
    "error of var",
    "collectives here, fwd + bwd",
    *(f"{topology}" for topology in ELSEWHERE.values()),
)


def rows(config: BenchSync) -> Iterator[tuple[str, ...]]:
    """The table, a row per shape and contestant."""
    set_devices(config.devices)
    here = machine(None, config.devices)
    there = [None if missing(t) else machine(name, 0) for t, name in ELSEWHERE.items()]
    for shape in SHAPES:
        times = _times(config, here, shape)
        for name in CONTESTANTS:
            cells = []
            for direction in DIRECTIONS:
                ms = times[name, direction]
                cells += [f"{ms:.2f}", f"{ms / times['flax', direction]:.2f}"]
            yield (
                "×".join(map(str, shape)),
                name,
                *cells,
                f"{error(name, here, shape):.0e}",
                *(counted(name, m, shape) if m else "–" for m in (here, *there)),
            )


def remarks(config: BenchSync) -> str:
    """What the table does not say of itself."""
    said = f"medians of {config.rounds} turns on {config.devices} devices of this host. "
    said += f"Error: the largest of var at mean {MEAN:g}, σ = 1, relative to float64."
    for target, topology in ELSEWHERE.items():
        if command := missing(target):
            said += f" To compile for {topology} too: {command}"
    return said


# --- Contestants: (x, g, b) -> (y, variance) ---------------------------------------------------


def _normlab(x: Array, g: Array, b: Array) -> tuple[Array, Array]:
    state = nl.init_running(x.shape[-1], decay=0.0, debias=False)
    y, after = nl.batch_norm(x, nl.Affine(g, b), state, train=True, axis_name=AXIS)
    assert isinstance(after, nl.Running)
    return y, after.var


def _flax(fast: bool) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    def f(x: Array, g: Array, b: Array) -> tuple[Array, Array]:
        layer = flax.linen.BatchNorm(
            use_running_average=False,
            momentum=0.0,
            epsilon=1e-5,
            axis_name=AXIS,
            use_fast_variance=fast,
        )
        zero, one = jnp.zeros_like(g), jnp.ones_like(g)
        variables = {
            "params": {"scale": g, "bias": b},
            "batch_stats": {"mean": zero, "var": one},
        }
        out: Any = layer.apply(variables, x, mutable=["batch_stats"])
        return out[0], out[1]["batch_stats"]["var"]

    return f


CONTESTANTS = {
    "normlab": _normlab,
    "flax": _flax(True),
    "flax, use_fast_variance=False": _flax(False),
}


def build(name: str, direction: str, m: Machine, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The mapped function of a contestant, and its abstract arguments `(x, dy, g, b)`."""
    f = CONTESTANTS[name]

    def forward(x: Array, dy: Array, g: Array, b: Array) -> Any:
        del dy
        return f(x, g, b)

    def both(x: Array, dy: Array, g: Array, b: Array) -> Any:
        y, pull, var = jax.vjp(f, x, g, b, has_aux=True)
        return y, pull(dy), var

    def own(x: Array, dy: Array, g: Array, b: Array) -> Any:
        # Each device has its own gradients of g and b; summing them is not the norm's affair.
        return {"forward": forward, "both": both}[direction](x, dy, *vary((g, b), (AXIS,)))

    mesh = Mesh(np.array(m.devices), (AXIS,), axis_types=(AxisType.Auto,))
    split, alike = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    x = abstract(jax.ShapeDtypeStruct(shape, jnp.float32), split, len(m.devices))
    g = abstract(jax.ShapeDtypeStruct(shape[-1:], jnp.float32), alike)
    return on_devices("shard_map", mesh, own, in_axes=(0, 0, None, None)), (x, x, g, g)


def _concrete(shapes: Any, mean: float) -> list[Array]:
    rng = np.random.default_rng(0)
    x, dy, g, b = (rng.normal(size=v.shape).astype(np.float32) for v in shapes)
    values = ((mean + x).astype(np.float32), dy, g, b)
    return [jax.device_put(v, a.sharding) for v, a in zip(values, shapes, strict=True)]


def _times(config: BenchSync, here: Machine, shape: tuple[int, ...]) -> dict[Any, float]:
    """Milliseconds of every contestant and direction."""
    turns = {}
    for name in CONTESTANTS:
        for direction in DIRECTIONS:
            f, shapes = build(name, direction, here, shape)
            compiled, arguments = f.lower(*shapes).compile(), _concrete(shapes, 0.0)
            call = lambda c=compiled, a=arguments: jax.block_until_ready(c(*a))  # noqa: E731
            turns[name, direction] = Repeated(call, config.turn_ms)
    *_, taken = take_turns(turns, config.rounds)
    return medians(taken)["ms_per_step"]


def error(name: str, here: Machine, shape: tuple[int, ...]) -> float:
    """The largest relative error of a contestant's variance at `MEAN`."""
    f, shapes = build(name, "forward", here, shape)
    arguments = _concrete(shapes, MEAN)
    _, var = f(*arguments)
    x = np.asarray(arguments[0], np.float64).reshape(-1, shape[-1])
    return float(np.abs(np.asarray(var[0], np.float64) / x.var(0) - 1).max())


def counted(name: str, m: Machine, shape: tuple[int, ...]) -> str:
    """A contestant's collectives, forward and backward: how many, and what a device puts in."""
    totals = []
    for direction in DIRECTIONS:
        f, shapes = build(name, direction, m, shape)
        found = collectives(f.lower(*shapes).compile(), len(m.devices))
        found = [c for c in found if not c.when_needed]
        totals.append((sum(c.times for c in found), sum(c.times * c.nbytes for c in found)))
    (count, nbytes), (all_count, all_nbytes) = totals
    return f"{count} ({nbytes:,} B) + {all_count - count} ({all_nbytes - nbytes:,} B)"
