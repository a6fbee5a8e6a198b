"""Batch norm's kernels, compiled ahead of time: what they move, beside XLA, and what compiles.

A target is compiled for in a process of its own:
`python -m tests.experiments.test_kernels_ahead_columns TARGET moved|compiled`.
"""

import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import normlab as nl
from normlab._kernels import columns
from normlab.experiments.programs.passes import Passes, lower, moves, passes, place
from tests.experiments.test_accelerators import BOTH, FORWARD, in_a_process

# Of the same size, larger than the vector memory of a v5e.
SHAPES = {"float32": (128, 56, 56, 128), "bfloat16": (256, 56, 56, 128)}
XLA, PALLAS = "xla", "pallas"
ALONE, BLOCK = "alone", "with residual and relu"

# Forward: the sums of x; x and y. Backward: the sums, of x and dh; dx, of both. A residual is read
# to be added and to know where relu is flat; u is written by the sums, which read it for that, so
# that dx is of x and u.
KERNELS = {
    ALONE: {FORWARD: Passes(2, 1), BOTH: Passes(6, 2)},
    BLOCK: {FORWARD: Passes(3, 1), BOTH: Passes(8, 3)},
}
# XLA writes u where one rounding of it does for both of its readers; else each reads x, dh and the
# residual for it. On a GPU it keeps of bfloat16 where relu is flat, half a copy.
PLAIN = {
    ("tpu", "float32"): Passes(8, 3),
    ("tpu", "bfloat16"): Passes(10, 3),
    ("cuda", "float32"): Passes(10, 3),
    ("cuda", "bfloat16"): Passes(7, 3),
}


def programs(implementation: nl.Implementation, activation):
    """The norm's two directions. In a net dh comes after h, and is in no pass that writes it."""

    def norm(x, g, b, *residual):
        params = nl.Affine(g, b)
        parts, _ = nl.batch_parts(x, params, train=True, implementation=implementation)
        more = residual[0] if residual else None
        return nl.affine(parts, x, residual=more, activation=activation)

    def both(dh, *given):
        h, pull = jax.vjp(norm, *given)
        h, dh = lax.optimization_barrier((h, dh))
        return h, *pull(dh)

    return {FORWARD: lambda _, *given: norm(*given), BOTH: both}


def moved(target: columns.Platform) -> dict[str, dict]:
    """What the programs move, in passes and in sizes of x."""
    where, found = place(target), {}
    jax.default_backend = lambda: {"cuda": "gpu"}.get(target, target)
    for dtype, shape in SHAPES.items():
        nbytes = math.prod(shape) * jnp.dtype(dtype).itemsize
        x = jax.ShapeDtypeStruct(shape, dtype)
        g = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
        for case, more in ((ALONE, ()), (BLOCK, (x,))):
            for how in (XLA, PALLAS):
                each = programs(how, jax.nn.relu if more else None)
                for direction, f in each.items():
                    compiled = lower(f, where, x, x, g, g, *more).compile()
                    memory: Any = compiled.memory_analysis()
                    found[f"{dtype}, {case}, {how}, {direction}"] = {
                        "passes": passes(compiled, nbytes),
                        "bytes": sum(move.nbytes for move in moves(compiled)) / nbytes,
                        "temporary": memory.temp_size_in_bytes / nbytes,
                    }
    return found


def compiled(target: columns.Platform) -> int:
    """How many of these arrays were let pass; for each of them all kernels compile."""
    where, count, silu = place(target), 0, jax.nn.silu

    def kernels(x, v):
        how = target, False
        of_apply = columns.apply(*how, x, v, v, v, x, silu)
        of_sums = columns.apply_sums(*how, x, x, v, v, v, x, silu)
        return columns.sums(*how, x, v), of_apply, of_sums

    sizes = [1, 127, 2049]
    shapes = [(n, c) for n in sizes for c in sizes] + [(1_000_003, 64), (2, 100_003)]
    for shape in [*shapes, (2**22, 1), (2**23, 2), (300_017, 1031), (0, 3)]:
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            if columns.problem(target, shape, dtype, silu) is None:
                x, v = (jax.ShapeDtypeStruct(s, t) for s, t in ((shape, dtype), (shape[1:], "f4")))
                lower(kernels, where, x, v).compile()
                count += 1
    return count


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_two_passes_each_way(target):
    found = in_a_process(target, "moved", module="test_kernels_ahead_columns")
    for dtype in SHAPES:
        for case, directions in KERNELS.items():
            for direction, bound in directions.items():
                plain = found[f"{dtype}, {case}, {XLA}, {direction}"]
                both = (case, direction) == (BLOCK, BOTH)
                expected = PLAIN[target, dtype] if both else bound
                assert Passes(*plain["passes"]) == expected
                name = f"{dtype}, {case}, {PALLAS}, {direction}"
                assert Passes(*found[name]["passes"]) == bound, name
                assert found[name]["bytes"] < sum(bound) + 0.15, name
                assert found[name]["temporary"] < 0.05, name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_what_has_no_problem_compiles(target):
    assert (
        in_a_process(target, "compiled", module="test_kernels_ahead_columns")
        == {"tpu": 26, "cuda": 28}[target]
    )


if __name__ == "__main__":
    asked: Any = {"moved": moved, "compiled": compiled}[sys.argv[2]]
    print(json.dumps(asked(sys.argv[1])))
