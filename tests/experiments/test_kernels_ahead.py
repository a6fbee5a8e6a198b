"""Kernels of norms by example, compiled ahead of time: what they move, and what compiles.

A target is compiled for in a process of its own:
`python -m tests.experiments.test_kernels_ahead TARGET moved|compiled`.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from normlab._kernels.examples import Forward, call
from normlab._kernels.rows import Rows, problem
from normlab.experiments.programs.machines import compile_for
from normlab.experiments.programs.passes import Passes, lower, passes, place
from tests.experiments.test_accelerators import BOTH, FORWARD, in_a_process

silu = jax.nn.silu
LAYER, RMS, SILU, ADD = Rows(), Rows(8, centred=False), Rows(activation=silu), Rows(add=True)
FLOOR = {FORWARD: Passes(1, 1), BOTH: Passes(3, 2)}
# g and b are read each way, and dg and db are written.
GATE = {FORWARD: Passes(3, 1), BOTH: Passes(6, 4)}
# y is read and the sum is written; dtotal is read.
ADDED = {FORWARD: Passes(2, 2), BOTH: Passes(4, 3)}
# Where it pads less, as of [8191, 1000], a TPU has an array that nothing but the kernel reads lie
# along the examples, and copies it.
CASES = {
    "layer": (LAYER, (8192, 1, 4096), "float32", False, FLOOR),
    "layer, bfloat16": (LAYER, (8192, 1, 4096), "bfloat16", False, FLOOR),
    "layer, long rows": (LAYER, (4096, 1, 8192), "float32", False, FLOOR),
    "layer, ragged": (LAYER, (8189, 1, 4095), "float32", False, FLOOR),
    "layer, silu": (SILU, (8192, 1, 4096), "float32", False, FLOOR),
    "layer, gate": (LAYER, (8192, 1, 4096), "float32", True, GATE),
    "add, layer": (ADD, (8192, 1, 4096), "float32", False, ADDED),
    "rms, groups": (RMS, (8192, 1, 4096), "float32", False, FLOOR),
    "rms, heads": (Rows(64, centred=False), (8192, 1, 4096), "float32", False, FLOOR),
    "group": (Rows(8), (128, 3136, 128), "float32", False, FLOOR),
    "group, silu": (Rows(32, activation=silu), (128, 3136, 128), "float32", False, FLOOR),
    "instance": (Rows(128), (128, 3136, 128), "float32", False, FLOOR),
}


def programs(spec: Rows, target: str, shape: tuple[int, ...], dtype: str, gate: bool):
    """Both directions and their arguments, of arrays as nets have them: without an axis of one."""
    own = (shape[0], shape[2]) if shape[1] == 1 else shape
    x = jax.ShapeDtypeStruct(own, dtype)
    g = jax.ShapeDtypeStruct(own if gate else shape[2:], jnp.float32)
    every = 2 if spec.add else 1

    def run(*arrays):
        x, g, b, *y = (v.reshape(shape) if v.ndim > 1 else v for v in arrays)
        h, _, _, *total = call(Forward(spec, "a norm", True, False), x, g, b, *y)
        return [v.reshape(own) for v in (h, *total)]

    def both(dh, *arrays):
        found, pull = jax.vjp(run, *arrays)
        return found, pull([dh] * len(found))[:3]  # dy is dx

    arguments = (x, g, g, *[x] * (every - 1))
    return {FORWARD: (run, arguments), BOTH: (both, (x, *arguments))}


def moved(target: str) -> dict[str, dict]:
    """What the programs move, and what they keep in sizes of x."""
    where, found = place(target), {}
    for name, (spec, shape, dtype, gate, _) in CASES.items():
        assert problem(spec, target, shape, dtype, shape if gate else shape[2:]) is None, name
        nbytes = math.prod(shape) * jnp.dtype(dtype).itemsize
        for direction, (f, arguments) in programs(spec, target, shape, dtype, gate).items():
            compiled = lower(f, where, *arguments).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes / nbytes
            found[f"{name}, {direction}"] = (passes(compiled, nbytes), temporary)
    return found


SIZES = [
    *((n, 1, c) for n in (1, 8, 13, 1100) for c in (1, 7, 128, 130, 4099)),
    *((2, 1, c) for c in (16_384, 40_000, 65_536)),
    *((3, p, c) for p in (2, 49, 1009, 12_544) for c in (1, 12, 64, 100, 384, 2048)),
    (2, 18_000, 128),
]


def compiled(target: str) -> list[int]:
    """How many were let pass, and how many not; what was let pass compiles, both ways."""
    where, count = place(target), [0, 0]
    for shape in SIZES:
        c = shape[2]
        for groups in sorted({1, math.gcd(c, 32), c}):
            for i, gate in enumerate((False, True)):
                # All kinds of each thing, but not all together: there would be thousands.
                kind = (sum(shape) + groups + i) % 3
                dtype = ("float32", "bfloat16", "float16")[(kind + i) % 3]
                spec = (Rows(groups), Rows(groups, add=True), Rows(groups, False, activation=silu))
                spec = spec[kind]
                fits = problem(spec, target, shape, dtype, shape if gate else shape[2:]) is None
                count[not fits] += 1
                if fits:
                    f, arguments = programs(spec, target, shape, dtype, gate)[BOTH]
                    lower(f, where, *arguments).compile()
    _over_devices(target)
    return count


def _over_devices(target: str) -> None:
    """Compiles both directions in a `shard_map` whose types say what varies, and in plain `jit`.

    A TPU's compiler knows of `custom_partitioning` only where JAX has started the plugin, on a host
    with the hardware.
    """
    name = {"tpu": "v5e:2x2", "cuda": "h100:1x1x2"}[target]
    mesh = Mesh(np.array(compile_for(target, name)), ("data",))

    def norm(x, g, b):
        return nl.layer_norm(x, nl.Affine(g, b), implementation="pallas")

    def both(x, dh, g, b):
        h, pull = jax.vjp(norm, x, g, b)
        return h, *pull(dh)

    specs = P("data"), P("data"), P(), P()
    typed = jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=True)
    x, g = (
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p))
        for s, p in (((256, 384), P("data")), ((384,), P()))
    )
    for f in (typed,) if target == "tpu" else (typed, both):
        text = jax.jit(f).lower(x, x, g, g).compile().as_text()
        assert "all-reduce" in text
        assert "all-gather" not in text


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_at_the_floor(target):
    found = in_a_process(target, "moved", module="test_kernels_ahead")
    for name, (*_, bounds) in CASES.items():
        for direction, bound in bounds.items():
            counted, temporary = found[f"{name}, {direction}"]
            assert Passes(*counted) == bound, (name, direction)
            # Of a GPU, sums for dg and db by program: of each 16 examples, in float32.
            assert temporary < (0.26 if target == "cuda" else 0.01), (name, direction)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_what_has_no_problem_compiles(target):
    found = in_a_process(target, "compiled", module="test_kernels_ahead")
    assert found == {"tpu": [141, 99], "cuda": [193, 47]}[target]


if __name__ == "__main__":
    target, what = sys.argv[1:]
    print(json.dumps({"moved": moved, "compiled": compiled}[what](target)))
