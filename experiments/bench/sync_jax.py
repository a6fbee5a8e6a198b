"""The JAX contestants of `bench sync`: normlab, flax and haiku, synced in `shard_map`.

A contestant is a function `(x, g, b) -> (y, variance)` of what one device holds; the variance is
that which goes into the running statistics.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable
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
from normlab.instruments.collectives import Collective, collectives

from ..programs.machines import Machine, machine, missing
from ..training.config import Joining
from ..training.processes import form
from ..training.trainer import AXIS, abstract, on_devices, set_devices
from .turns import Repeated
from .worker import BOTH, COPY, DIRECTIONS, EPS, FORWARD

MEAN = 1e3
"""At which the error of the variance is measured."""

ELSEWHERE = {"tpu": "v5p:4x4x4", "cuda": "h100:1x8x8"}
"""Machines for which the programs are compiled too, where their compilers are installed."""


def _normlab(x: Array, g: Array, b: Array) -> tuple[Array, Array]:
    state = nl.init_running(x.shape[-1], decay=0.0, debias=False)
    y, after = nl.batch_norm(x, nl.Affine(g, b), state, train=True, axis_name=AXIS, eps=EPS)
    assert isinstance(after, nl.Running)
    return y, after.var


def _flax(fast: bool) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    def f(x: Array, g: Array, b: Array) -> tuple[Array, Array]:
        layer = flax.linen.BatchNorm(
            use_running_average=False,
            momentum=0.0,
            epsilon=EPS,
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


def _haiku(x: Array, g: Array, b: Array) -> tuple[Array, Array]:
    import haiku as hk  # pyright: ignore[reportMissingImports]

    options = {"create_scale": True, "create_offset": True, "decay_rate": 0.0, "eps": EPS}
    norm = hk.transform_with_state(
        lambda x: hk.BatchNorm(**options, cross_replica_axis=AXIS, name="n")(x, is_training=True)
    )
    wide = (1,) * (x.ndim - 1) + g.shape
    params = {"n": {"scale": g.reshape(wide), "offset": b.reshape(wide)}}
    averages = {
        "hidden": jnp.zeros(wide),
        "average": jnp.zeros(wide),
        "counter": jnp.zeros((), int),
    }
    state = {f"n/~/{name}_ema": dict(averages) for name in ("mean", "var")}
    y, after = norm.apply(params, state, None, x)
    return y, after["n/~/var_ema"]["average"].reshape(g.shape)


CONTESTANTS: dict[str, Callable[[Array, Array, Array], tuple[Array, Array]]] = {
    "normlab": _normlab,
    "flax": _flax(True),
    "flax, two-pass": _flax(False),
}
if importlib.util.find_spec("haiku") is not None:
    CONTESTANTS["haiku"] = _haiku


def build(name: str, direction: str, m: Machine, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The mapped function of a contestant, and its abstract arguments `(x, dy, g, b)`."""

    def forward(x: Array, dy: Array, g: Array, b: Array) -> Any:
        del dy
        return CONTESTANTS[name](x, g, b)

    def both(x: Array, dy: Array, g: Array, b: Array) -> Any:
        y, pull, var = jax.vjp(CONTESTANTS[name], x, g, b, has_aux=True)
        return y, pull(dy), var

    def copy(x: Array, dy: Array, g: Array, b: Array) -> Any:
        del dy, b
        # Bits flipped by a mask that the compiler does not know: nothing but traffic.
        return (x.view(jnp.uint32) ^ g[0].view(jnp.uint32)).view(x.dtype)

    of = copy if name == COPY else {FORWARD: forward, BOTH: both}[direction]

    def own(x: Array, dy: Array, g: Array, b: Array) -> Any:
        # Each device has its own gradients of g and b; summing them is not the norm's affair.
        return of(x, dy, *vary((g, b), (AXIS,)))

    mesh = Mesh(np.array(m.devices), (AXIS,), axis_types=(AxisType.Auto,))
    split, alike = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    x = abstract(jax.ShapeDtypeStruct(shape, jnp.float32), split, len(m.devices))
    g = abstract(jax.ShapeDtypeStruct(shape[-1:], jnp.float32), alike)
    return on_devices("shard_map", mesh, own, in_axes=(0, 0, None, None)), (x, x, g, g)


def drawn(shapes: Any, mean: float = 0.0) -> list[np.ndarray]:
    """The values of `(x, dy, g, b)`, the same in every process and library."""
    rng = np.random.default_rng(0)
    x, dy, g, b = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return [(mean + x).astype(np.float32), dy, 1 + np.float32(0.1) * g, np.float32(0.1) * b]


def _concrete(given: Any, mean: float = 0.0) -> list[Array]:
    """Drawn values on the devices, those of other processes included."""
    values = zip(drawn([v.shape for v in given], mean), given, strict=True)
    return [jax.make_array_from_callback(v.shape, a.sharding, v.__getitem__) for v, a in values]


def error(name: str, here: Machine, shape: tuple[int, ...]) -> float:
    """The largest relative error of a contestant's variance at `MEAN`."""
    f, shapes = build(name, FORWARD, here, shape)
    arguments = _concrete(shapes, MEAN)
    _, var = f(*arguments)
    x = np.asarray(arguments[0], np.float64).reshape(-1, shape[-1])
    return float(np.abs(np.asarray(var[0], np.float64) / x.var(0) - 1).max())


def counted(name: str, m: Machine, shape: tuple[int, ...]) -> str:
    """A contestant's collectives, forward and backward: how many, and what a device puts in.

    Those of a loop that does not always run are counted by themselves.
    """
    found = []
    for direction in DIRECTIONS:
        f, shapes = build(name, direction, m, shape)
        found.append(collectives(f.lower(*shapes).compile(), len(m.devices)))
    forward, both = (Counter(_total(c for c in each if not c.when_needed)) for each in found)
    rare = _total(c for c in found[0] if c.when_needed)
    both.subtract(forward)
    said = " + ".join(f"{v['count']} ({v['nbytes']:,} B)" for v in (forward, both))
    return said + (f"; when needed {rare['count']} ({rare['nbytes']:,} B)" if rare["count"] else "")


def _total(found: Iterable[Collective]) -> dict[str, int]:
    found = list(found)
    return {
        "count": sum(c.times for c in found),
        "nbytes": sum(c.times * c.nbytes for c in found),
    }


class Part:
    """What one process does: all of the work on its devices, or its share of it on one.

    Args:
      devices: How many devices this process has where there is no other.
      processes: How many processes there are.
      process: Which of them this is.
      address: HOST:PORT at which they meet.
    """

    def __init__(
        self, devices: int, processes: int = 1, process: int = 0, address: str = ""
    ) -> None:
        if processes > 1:
            form(Joining(coordinator=address, processes=processes, process=process))
            each = [jax.local_devices(process_index=i)[0] for i in range(processes)]
            self.machine = Machine(f"{processes} processes", "cpu", each, (), None)
        else:
            set_devices(devices)
            self.machine = machine(None, devices)
        self._turns: dict[tuple[str, str], Repeated] = {}
        self._last: Any = None

    def prepare(self, shape: tuple[int, ...]) -> list[tuple[str, str]]:
        """Compiles all contestants and the copy; returns their names and directions."""
        self._turns.clear()
        keys = [(name, direction) for name in CONTESTANTS for direction in DIRECTIONS]
        for key in [(COPY, FORWARD), *keys]:
            f, shapes = build(*key, self.machine, shape)
            compiled, arguments = f.lower(*shapes).compile(), _concrete(shapes)
            self._turns[key] = Repeated(
                lambda c=compiled, a=arguments: jax.block_until_ready(c(*a)), 0.0
            )
        return list(self._turns)

    def turn(self, key: tuple[str, str], repetitions: int) -> float:
        """Milliseconds per call; the call before them, which is not timed, joins the processes."""
        self._turns[key].repetitions = repetitions
        return self._turns[key]()

    def outputs(self, shape: tuple[int, ...]) -> dict[str, list[np.ndarray]]:
        """What the first device has, by contestant: y, the variance, the gradients by x, g, b."""
        first, found = jax.local_devices()[0], {}
        for name in CONTESTANTS:
            f, shapes = build(name, BOTH, self.machine, shape)
            y, gradients, var = f(*_concrete(shapes))
            held = [{s.device: s.data for s in v.addressable_shards} for v in (y, var, *gradients)]
            found[name] = [np.asarray(pieces[first])[0] for pieces in held]
        return found

    def counts(self, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
        """For each contestant its error, and its collectives here and elsewhere."""
        there = [None if missing(t) else machine(name, 0) for t, name in ELSEWHERE.items()]
        return [
            (
                name,
                f"{error(name, self.machine, shape):.0e}",
                *(counted(name, m, shape) if m else "–" for m in (self.machine, *there)),
            )
            for name in CONTESTANTS
        ]

    def leave(self) -> None:
        """Parts from the other processes, which do so at the same time."""
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
