"""Compiled programs: passes over x on the CPU, and ahead of time on a TPU and a GPU.

A target is compiled for in a process of its own, with one device and no hardware looked for:
`python -m tests.experiments.test_accelerators TARGET OP`.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import normlab as nl
from experiments.programs import machines
from experiments.programs.machines import Missing, missing
from experiments.programs.passes import Passes, lower, moves, passes, place

ROOT = Path(__file__).resolve().parents[2]
BARRIER = "optimization_barrier"
FORWARD, BOTH = "forward", "forward+backward"


def _batch(x, params):
    return nl.batch_norm(x, params, train=True)[0]


def _group(x, params):
    return nl.group_norm(x, params, groups=8)


OPS = {
    "batch": _batch,
    "layer": nl.layer_norm,
    "rms": nl.rms_norm,
    "group": _group,
    "instance": nl.instance_norm,
}


def programs(op: str, shape: tuple[int, ...], dtype=jnp.float32):
    """The op's two directions as `{name: (function, arguments)}`, of abstract arrays."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    g = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    params = nl.Affine(g, None if op == "rms" else g)

    def both(x, dy, params):
        y, pull = jax.vjp(OPS[op], x, params)
        return y, pull(dy)

    return {FORWARD: (OPS[op], (x, params)), BOTH: (both, (x, x, params))}


# --- Counting ---------------------------------------------------------------------------------

X = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
NBYTES = 4 * 256 * 1024


def _standardize(x):
    """Three passes, each in need of the one before, on values that are known to be different."""
    mean = x.mean(0)
    x, mean = lax.optimization_barrier((x, mean))
    var = jnp.square(x - mean).mean(0)
    x, mean, var = lax.optimization_barrier((x, mean, var))
    return (x - mean) / var


KNOWN = {
    "copy": (jnp.copy, Passes(1, 1)),
    "elementwise": (lambda x: jnp.sin(x) + x * x, Passes(1, 1)),
    "transposed": (lambda x: jnp.copy(x.T), Passes(1, 1)),
    "sum": (jnp.sum, Passes(1, 0)),
    "made of nothing": (jnp.zeros_like, Passes(0, 1)),
    "narrower": (lambda x: x.astype(jnp.bfloat16), Passes(1, 0)),
    "two sums, then elementwise": (_standardize, Passes(3, 1)),
    "a slice": (lambda x: x[::2].sum(), Passes(0, 0)),
    "slices in a loop": (
        lambda x: lax.scan(lambda c, r: (c + r.sum(), None), 0.0, x),
        Passes(0, 0),
    ),
    # The loop's first value is a copy.
    "a loop": (lambda x: lax.fori_loop(0, 5, lambda _, v: jnp.sin(v), x), Passes(6, 6)),
    "a product": (lambda x: x @ x.T, Passes(1, 0)),
}


class TestPasses:
    @pytest.mark.parametrize("name", KNOWN)
    def test_known_functions(self, name):
        f, expected = KNOWN[name]
        assert passes(lower(f, place("cpu"), X).compile(), NBYTES) == expected

    def test_of_a_conditional_the_longer_branch(self):
        def f(x, choice):
            return lax.cond(choice, lambda x: x * 2, _standardize, x)

        choice = jax.ShapeDtypeStruct((), jnp.bool_)
        assert passes(lower(f, place("cpu"), X, choice).compile(), NBYTES) == Passes(3, 1)

    def test_only_arrays_of_the_size_asked_for(self):
        compiled = lower(lambda x: jnp.exp(x.sum(0)) + x, place("cpu"), X).compile()
        assert passes(compiled, NBYTES) == Passes(2, 1)
        assert passes(compiled, NBYTES + 1) == Passes(0, 0)
        assert passes(compiled, 4 * 1024) == Passes(4, 3)  # the sum and its exponential, too

    def test_instructions_say_where_they_come_from_what_they_move_and_how_often(self):
        def f(x):
            def step(x, _):
                with jax.named_scope("inner"):
                    return jnp.sin(x) + 1, None

            return lax.scan(step, x, length=3)[0]

        found = moves(lower(f, place("cpu"), X).compile())
        (loop,) = (move for move in found if any("/inner/" in name for name in move.names))
        assert {name.split("/")[-1] for name in loop.names} == {"sin", "add"}
        assert (loop.opcode, loop.reads, loop.writes, loop.times) == (
            "fusion",
            (NBYTES,),
            (NBYTES,),
            3,
        )
        assert loop.nbytes == 6 * NBYTES

    def test_a_program_without_a_text_is_refused(self):
        with pytest.raises(ValueError, match="without a text"):
            passes("", 1)


TPU = """
HloModule jit_f, is_scheduled=true

%fused (p: f32[8,4], q: f32[4]) -> (f32[4], f32[8,4]) {
  %p = f32[8,4]{1,0:T(8)} parameter(0)
  %q = f32[4]{0:T(8)} parameter(1)
  %r = f32[4]{0:T(8)} reduce(%p, %q), dimensions={0}, to_apply=%add
  ROOT %t = (f32[4]{0:T(8)}, f32[8,4]{1,0:T(8)}) tuple(%r, %p)
}

ENTRY %main (x: f32[8,4], w: f32[4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8)} parameter(0), sharding={replicated}
  %w = f32[4]{0:T(8)} parameter(1)
  %all = (f32[8,4]{1,0:T(8)S(1)}, f32[8,4]{1,0:T(8)}, u32[]{:S(2)}) copy-start(%x)
  %half = ((f32[8,4]{1,0:T(8)}), f32[4,4]{1,0:T(8)S(1)}, s32[]) slice-start(%x), slice={[0:4]}
  %copy-done = f32[8,4]{1,0:T(8)S(1)} copy-done(%all)
  %slice-done = f32[4,4]{1,0:T(8)S(1)} slice-done(%half)
  %fusion = (f32[4]{0:T(8)}, f32[8,4]{1,0:T(8)}) fusion(%copy-done, %w), kind=kLoop, calls=%fused
  ROOT %y = f32[8,4]{1,0:T(8)} get-tuple-element(%fusion), index=1
}
"""

GPU = """
HloModule jit_f

%sliced (a: bf16[16,64]) -> f32[64] {
  %a = bf16[16,64]{1,0} parameter(0)
  %b = f32[16,64]{1,0} convert(%a)
  %c = f32[2,8,64]{2,1,0} bitcast(%b)
  %d = f32[2,1,64]{2,1,0} slice(%c), slice={[0:2], [0:1], [0:64]}
  %zero = f32[] constant(0)
  ROOT %e = f32[64]{0} reduce(%d, %zero), dimensions={0,1}, to_apply=%add
}

%two_sums (a.1: bf16[16,64], k: f32[64]) -> (f32[64], f32[64]) {
  %a.1 = bf16[16,64]{1,0} parameter(0)
  %k = f32[64]{0} parameter(1)
  %b.1 = f32[16,64]{1,0} convert(%a.1)
  %zero.1 = f32[] constant(0)
  %s1 = f32[64]{0} reduce(%b.1, %zero.1), dimensions={0}, to_apply=%add
  %s2 = f32[64]{0} reduce(%b.1, %k), dimensions={0}, to_apply=%add
  ROOT %t.1 = (f32[64]{0}, f32[64]{0}) tuple(%s1, %s2)
}

%in_place (o: bf16[16,64], u: bf16[1,64], i: s32[]) -> bf16[16,64] {
  %o = bf16[16,64]{1,0} parameter(0)
  %u = bf16[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = bf16[16,64]{1,0} dynamic-update-slice(%o, %u, %i, %i)
}

%cmd (x.1: bf16[16,64], row: bf16[1,64], n: s32[]) -> (f32[64], f32[64], bf16[16,64]) {
  %x.1 = bf16[16,64]{1,0} parameter(0)
  %row = bf16[1,64]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %pivot = f32[64]{0} fusion(%x.1), kind=kInput, calls=%sliced
  %sums = (f32[64]{0}, f32[64]{0}) fusion(%x.1, %pivot), kind=kInput, calls=%two_sums
  %first = f32[64]{0} get-tuple-element(%sums), index=0
  %updated = bf16[16,64]{1,0} fusion(%x.1, %row, %n), kind=kLoop, calls=%in_place
  ROOT %t.2 = (f32[64]{0}, f32[64]{0}, bf16[16,64]{1,0}) tuple(%pivot, %first, %updated)
}

ENTRY %main (x: bf16[16,64], row.1: bf16[1,64], n.1: s32[]) -> bf16[16,64] {
  %x = bf16[16,64]{1,0} parameter(0)
  %row.1 = bf16[1,64]{1,0} parameter(1)
  %n.1 = s32[] parameter(2)
  %c = (f32[64]{0}, f32[64]{0}, /*index=2*/bf16[16,64]{1,0}) call(%x, %row.1, %n.1), to_apply=%cmd
  ROOT %out = bf16[16,64]{1,0} get-tuple-element(%c), index=2
}
"""


class TestTexts:
    def test_what_a_tpu_holds_in_vector_memory_is_not_read_again(self):
        """x is read by the copy alone; y is written to memory."""
        assert passes(TPU, 4 * 8 * 4) == Passes(1, 1)

    def test_the_start_of_a_slice_reads_the_slice(self):
        assert passes(TPU, 4 * 4 * 4) == Passes(2, 1)

    def test_without_tiles_there_is_no_vector_memory(self):
        """Where S(1) is a GPU's name for memory that devices share, x is copied, then read."""
        assert passes(TPU.replace(":T(8)", ":"), 4 * 8 * 4) == Passes(2, 2)

    def test_two_sums_in_one_fusion_are_one_pass_and_a_slice_is_none(self):
        assert passes(GPU, 2 * 16 * 64) == Passes(1, 0)

    def test_an_update_in_place_writes_the_update(self):
        # Read: the pivot's slices of x; x and the pivot for the sums; the row. Each writes, too:
        # the pivot, two sums, and the row.
        assert passes(GPU, 2 * 64) == Passes(4, 4)


# --- The CPU ----------------------------------------------------------------------------------


class TestCPU:
    @pytest.mark.parametrize(
        ("direction", "bound"),
        [
            # Σx, Σx², and y.
            (FORWARD, Passes(3, 1)),
            # and Σdy, Σdy·(x − k) of two arrays, and dx of two. XLA's CPU merges no two sums.
            (BOTH, Passes(8, 2)),
        ],
    )
    def test_batch_norm_reads_x_once_per_sum_and_keeps_nothing(self, direction, bound):
        """No temporary has the size of x: the point of `normlab._xla.apart`."""
        compiled, nbytes = on_cpu("batch", (32, 16, 16, 64), direction)
        counted = passes(compiled, nbytes)
        assert counted.reads <= bound.reads
        assert counted.writes == bound.writes
        assert compiled.memory_analysis().temp_size_in_bytes < nbytes / 100

    @pytest.mark.parametrize("shape", [(8192, 256), (256, 1024)], ids=str)
    @pytest.mark.parametrize("op", ["batch", "layer", "rms"])
    def test_of_bfloat16_no_copy_is_kept_but_one_of_the_gradient(self, op, shape):
        """In units of x. Backward one float32 copy of dy is, for it has several readers."""
        for direction, bound in {FORWARD: 0.1, BOTH: 2.2}.items():
            compiled, nbytes = on_cpu(op, shape, direction, jnp.bfloat16)
            assert compiled.memory_analysis().temp_size_in_bytes < bound * nbytes, direction


def on_cpu(op: str, shape: tuple[int, ...], direction: str, dtype=jnp.float32):
    """The compiled program and the bytes of x."""
    f, arguments = programs(op, shape, dtype)[direction]
    compiled = lower(f, place("cpu"), *arguments).compile()
    return compiled, jnp.dtype(dtype).itemsize * math.prod(shape)


# --- Ahead of time ----------------------------------------------------------------------------

# Larger than the vector memory of a v5e (128 MiB): a smaller x would be brought there once.
LARGE = (128, 56, 56, 128)
# Forward: the sums, both in one pass; y. Backward: the sums, of x and dy, in the pass that writes
# y; dx, of x and dy. That is 2 reads and 1 write, and 5 and 2. The pivot reads a sixteenth of x,
# which counts as nothing; layer norm's is the mean of a first pass. A GPU makes one kernel of layer
# norm forward, and with it does not share the sums with the backward pass.
SUMS = {FORWARD: Passes(2, 1), BOTH: Passes(5, 2)}
LAYER = {
    "tpu": {FORWARD: Passes(3, 1), BOTH: Passes(6, 2)},
    "cuda": {FORWARD: Passes(1, 1), BOTH: Passes(7, 3)},
}


def compile_for(target: str, op: str) -> dict[str, dict]:
    """What the programs of an op are like on a target."""
    where, cpu = place(target), place("cpu")
    # As on a machine that has the target: what is good for XLA's CPU is left to it.
    jax.default_backend = lambda: {"cuda": "gpu"}.get(target, target)
    found = {}
    for direction, (f, arguments) in programs(op, LARGE).items():
        lowered = lower(f, where, *arguments)
        compiled = lowered.compile()
        found[direction] = {
            "passes": passes(compiled, 4 * math.prod(LARGE)),
            "temporary": compiled.memory_analysis().temp_size_in_bytes / (4 * math.prod(LARGE)),
            "apart": BARRIER in lowered.as_text(),
            "apart on a CPU": BARRIER in lower(f, cpu, *arguments).as_text(),
        }
    return found


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_compiles_ahead_of_time(target, op):
    if command := missing(target):
        pytest.skip(f"no compiler for {target}; to install it: {command}")
    run = subprocess.run(
        [sys.executable, "-m", "tests.experiments.test_accelerators", target, op],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    for direction, bound in (LAYER[target] if op == "layer" else SUMS).items():
        program, counted = found[direction], Passes(*found[direction]["passes"])
        assert 1 <= counted.reads <= bound.reads, direction
        assert counted.writes == bound.writes, direction
        assert program["temporary"] < 0.1, direction
        assert not program["apart"], direction
    assert found[BOTH]["apart on a CPU"]


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(machines.TARGETS, "tpu", "no_such.module")
    with pytest.raises(Missing, match=r"pip install -c constraints\.txt -e '\.\[tpu\]'"):
        place("tpu")


if __name__ == "__main__":
    print(json.dumps(compile_for(*sys.argv[1:])))
