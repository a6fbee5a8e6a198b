"""What the tests share: how far apart two pytrees are, and how to run things on many devices."""

import functools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

CHECKOUT = Path(__file__).resolve().parents[1]


def gap(actual, expected) -> float:
    """The largest |actual − expected| of any leaf, relative to the largest |expected| of that leaf.

    Absolute where `expected` is zero. NaN if there is one, which no bound lets through.
    """
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, (a.shape, e.shape)
        if e.size:
            worst = np.maximum(worst, np.abs(a - e).max() / (np.abs(e).max() or 1.0))
    return float(worst)


# As users compile, where the tests compile without optimization: for what is a matter of rounding.
optimized = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})


def array(value, dtype=jnp.float32):
    """A jax array of the given type from anything."""
    return jnp.asarray(np.asarray(value), dtype)


def draw(seed: int, *shape: int, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Normal float64 numbers."""
    return mean + scale * np.random.default_rng(seed).normal(size=shape)


def environment(**more: str) -> dict[str, str]:
    """For a process that a test starts: as here, but with one device."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, **more}


def mesh(kind: AxisType = AxisType.Auto, **axes: int):
    """A mesh of the first devices with axes of a kind, `mesh(i=4, j=2)`."""
    sizes = tuple(axes.values())
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))


def _per_device(f, shard_map):
    """Gives `f` the slice a device holds, without the axis of devices, and puts that axis back."""

    def body(replicated, sharded):
        out = f(replicated, jax.tree.map(lambda v: v[0], sharded))
        return jax.tree.map(lambda v: v[None], out)

    return jax.jit(shard_map(body, in_specs=(P(), P("d")), out_specs=P("d")))


def mappers(devices: int = 8):
    """Every way to run `f(replicated, sharded)` on axis "d"; the sharded come as `[D, ...]`.

    All of them return the results of all devices, `[D, ...]`.
    """
    grid = mesh(d=devices)
    return {
        "pmap": lambda f: jax.pmap(f, "d", in_axes=(None, 0), devices=grid.devices.tolist()),
        "shard_map": lambda f: _per_device(f, functools.partial(jax.shard_map, mesh=grid)),
        "shard_map, check_vma=False": lambda f: _per_device(
            f, functools.partial(jax.shard_map, mesh=grid, check_vma=False)
        ),
        "vmap": lambda f: jax.jit(jax.vmap(f, in_axes=(None, 0), axis_name="d")),
    }


MAPPERS = ("pmap", "shard_map", "shard_map, check_vma=False", "vmap")


def judged(question, records):
    """The verdicts of a question on these records."""
    from normlab.experiments.engine import Records

    return [*question.verdict(Records(records))]
