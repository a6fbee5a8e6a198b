"""Batch norm's kernels, compiled ahead of time: what they move, beside XLA, and what compiles.

A target is compiled for in a process of its own:
`python -m tests.experiments.test_kernels_ahead_columns TARGET moved|compiled`.
"""

import json
import math
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import normlab as nl
from experiments.programs.machines import missing
from experiments.programs.passes import Passes, lower, moves, passes, place
from normlab._kernels import columns
from tests.batch_norm_kernels import batch_norm, batch_norm_and_pull
from tests.experiments.test_accelerators import BOTH, FORWARD, ROOT

# Of the same size, larger than the vector memory of a v5e.
SHAPES = {"float32": (128, 56, 56, 128), "bfloat16": (256, 56, 56, 128)}
XLA, TWO_RULES, ONE_RULE = "XLA", "kernels", "kernels, apply_dx too"
ALONE, BLOCK = "alone", "with residual and relu"

# Forward: the sums of x; x and y. Backward: the sums, of x and dh; dx, of both. A residual is read
# to be added and to know where relu is flat; u is written by the sums, which read it for that, so
# that dx is of x and u.
KERNELS = {
    ALONE: {FORWARD: Passes(2, 1), BOTH: Passes(6, 2)},
    BLOCK: {FORWARD: Passes(3, 1), BOTH: Passes(8, 3)},
}
# XLA leaves u to two readers, and on a GPU each reads x, dh and the residual for it.
PLAIN = {
    "tpu": KERNELS,
    "cuda": {ALONE: KERNELS[ALONE], BLOCK: {FORWARD: Passes(3, 1), BOTH: Passes(10, 3)}},
}


def _rows(v):
    return v.reshape(-1, v.shape[-1])


def programs(target: columns.Platform, how: str, activation):
    """The norm's two directions. In a net dh comes after h, and is in no pass that writes it."""

    def norm(x, g, b, *residual):
        if how == XLA:
            h = nl.batch_norm(x, nl.Affine(g, b), train=True)[0]
            h = h + residual[0] if residual else h
            return h if activation is None else activation(h)
        more = _rows(residual[0]) if residual else None
        return batch_norm(target, False, _rows(x), g, b, more, activation).reshape(x.shape)

    def both(dh, x, g, b, *residual):
        if how == ONE_RULE:
            more = _rows(residual[0]) if residual else None
            given = _rows(x), g, b, more, activation
            h, pull = batch_norm_and_pull(target, False, *given)
        else:
            h, pull = jax.vjp(norm, x, g, b, *residual)
        h, dh = lax.optimization_barrier((h, dh))
        found = h, *pull(_rows(dh) if how == ONE_RULE else dh)
        return [v.reshape(x.shape) if v.ndim > 1 else v for v in found]

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
            for how in (XLA, TWO_RULES, ONE_RULE):
                each = programs(target, how, jax.nn.relu if more else None)
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
        dx = columns.apply_dx(*how, x, x, v, v, v, v, v, silu)
        return columns.sums(*how, x, v), of_apply, of_sums, dx

    sizes = [1, 127, 2049]
    shapes = [(n, c) for n in sizes for c in sizes] + [(1_000_003, 64), (2, 100_003)]
    for shape in [*shapes, (2**22, 1), (2**23, 2), (300_017, 1031), (0, 3)]:
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            if columns.problem(target, shape, dtype, silu) is None:
                x, v = (jax.ShapeDtypeStruct(s, t) for s, t in ((shape, dtype), (shape[1:], "f4")))
                lower(kernels, where, x, v).compile()
                count += 1
    return count


def _asked(target: str, what: str):
    if command := missing(target):
        pytest.skip(f"no compiler for {target}; to install it: {command}")
    run = subprocess.run(
        [sys.executable, "-m", "tests.experiments.test_kernels_ahead_columns", target, what],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_two_passes_each_way(target):
    found = _asked(target, "moved")
    for dtype in SHAPES:
        for case, directions in KERNELS.items():
            for direction, bound in directions.items():
                plain = found[f"{dtype}, {case}, {XLA}, {direction}"]
                assert Passes(*plain["passes"]) == PLAIN[target][case][direction]
                for how in (TWO_RULES, ONE_RULE):
                    name = f"{dtype}, {case}, {how}, {direction}"
                    assert Passes(*found[name]["passes"]) == bound, name
                    assert found[name]["bytes"] < sum(bound) + 0.15, name
                    assert found[name]["temporary"] < 0.05, name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_what_has_no_problem_compiles(target):
    assert _asked(target, "compiled") == {"tpu": 26, "cuda": 28}[target]


if __name__ == "__main__":
    asked: Any = {"moved": moved, "compiled": compiled}[sys.argv[2]]
    print(json.dumps(asked(sys.argv[1])))
