"""Compiled programs: passes over x on the CPU, and ahead of time on a TPU and a GPU.

A target is compiled for in a process of its own, with one device and no hardware looked for:
`python -m tests.experiments.test_accelerators cuda layer 8192 4096 float32`.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

import normlab as nl
from normlab.experiments.programs import machines
from normlab.experiments.programs.machines import Missing, missing
from normlab.experiments.programs.machines import compile_for as compile_machine
from normlab.experiments.programs.passes import Passes, lower, moves, passes, place

ROOT = Path(__file__).resolve().parents[2]
BARRIER = "optimization_barrier"
FORWARD, BOTH, NET = "forward", "forward+backward", "in a net"


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


def programs(op: str, shape: tuple[int, ...], dtype: DTypeLike = "float32"):
    """The op alone, in both directions and in a net: `{name: (function, abstract arguments)}`."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    w = jax.ShapeDtypeStruct((shape[-1], shape[-1]), dtype)
    g = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    params = nl.Affine(g, None if op == "rms" else g)

    def both(x, dy, params):
        y, pull = jax.vjp(OPS[op], x, params)
        return y, pull(dy)

    def net(x, w1, w2, params):
        def loss(x, params):
            return (w2 * jnp.tanh(OPS[op](x, params) @ w1)).sum()

        return jax.grad(loss, (0, 1))(x, params)

    return {
        FORWARD: (OPS[op], (x, params)),
        BOTH: (both, (x, x, params)),
        NET: (net, (x, w, x, params)),
    }


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

# Larger than the vector memory of a v5e (128 MiB): a smaller x would be brought there once, as is
# one of ROWS in bfloat16, which has 64 MiB.
IMAGES, ROWS = (128, 56, 56, 128), (8192, 4096)
# Forward: the sums, both in one pass; y. Backward: the sums, of x and dy, in the pass that writes
# y; dx, of x and dy. That is 2 reads and 1 write, and 5 and 2. The pivot reads a sixteenth of x, or
# an eighth, which counts as nothing; but 128 channels are what a TPU reads at once, and there it is
# the mean of a first pass. A GPU makes one kernel of a norm over channels forward, and takes RMS
# norm's sums in one pass over x and dy, without another over x.
SUMS = {FORWARD: Passes(2, 1), BOTH: Passes(5, 2)}
SHORT = {FORWARD: Passes(2, 1), BOTH: Passes(4, 2)}
BOUNDS: dict[tuple[str, str, tuple[int, ...], str], dict[str, Passes]] = {
    **{
        (target, op, IMAGES, "float32"): SUMS
        for target in ("tpu", "cuda")
        for op in ("batch", "rms", "group", "instance")
    },
    ("tpu", "layer", IMAGES, "float32"): {FORWARD: Passes(3, 1), BOTH: Passes(6, 2)},
    ("cuda", "layer", IMAGES, "float32"): {FORWARD: Passes(1, 1), BOTH: Passes(5, 2)},
    # In a net the products read and write y, what comes of it, and both gradients.
    ("tpu", "layer", ROWS, "float32"): {**SUMS, NET: Passes(7, 3)},
    ("tpu", "layer", ROWS, "bfloat16"): {**SHORT, NET: Passes(5, 3)},
    ("tpu", "rms", ROWS, "float32"): {**SUMS, NET: Passes(7, 3)},
    ("tpu", "rms", ROWS, "bfloat16"): {**SHORT, NET: Passes(5, 3)},
    **{
        ("cuda", op, ROWS, dtype): {FORWARD: Passes(1, 1), **bounds}
        for dtype in ("float32", "bfloat16")
        for op, bounds in {
            "layer": {BOTH: Passes(5, 2), NET: Passes(11, 5)},
            "rms": {BOTH: Passes(4, 2), NET: Passes(10, 5)},
        }.items()
    },
}


def compile_for(target: str, op: str, shape: tuple[int, ...], dtype: str) -> dict[str, dict]:
    """What the programs of an op are like on a target."""
    where, cpu = place(target), place("cpu")
    # As on a machine that has the target: what is good for XLA's CPU is left to it.
    jax.default_backend = lambda: {"cuda": "gpu"}.get(target, target)
    nbytes, found = math.prod(shape) * jnp.dtype(dtype).itemsize, {}
    for direction, (f, arguments) in programs(op, shape, dtype).items():
        if direction not in BOUNDS[target, op, shape, dtype]:
            continue
        lowered = lower(f, where, *arguments)
        compiled = lowered.compile()
        found[direction] = {
            "passes": passes(compiled, nbytes),
            "moved": sum(m.nbytes for m in moves(compiled) if not m.when_needed) / nbytes,
            "temporary": compiled.memory_analysis().temp_size_in_bytes / nbytes,
            "apart": kept_apart(lowered.as_text(), shape),
            "apart on a CPU": kept_apart(lower(f, cpu, *arguments).as_text(), shape),
        }
    return found


def kept_apart(text: str, shape: tuple[int, ...]) -> bool:
    """Whether a barrier stands around an array of the whole shape."""
    whole = f"tensor<{'x'.join(map(str, shape))}x"
    return any(BARRIER in line and whole in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("target", "op", "shape", "dtype"),
    [pytest.param(*k, id=f"{k[0]}-{k[1]}-{'x'.join(map(str, k[2]))}-{k[3]}") for k in BOUNDS],
)
def test_compiles_ahead_of_time(target, op, shape, dtype):
    found = in_a_process(target, op, *shape, dtype)
    for direction, bound in BOUNDS[target, op, shape, dtype].items():
        program, counted = found[direction], Passes(*found[direction]["passes"])
        assert 1 <= counted.reads <= bound.reads, direction
        assert counted.writes == bound.writes, direction
        # In a net y and its gradient are there, too.
        assert program["temporary"] < (1.1 if direction == NET else 0.15), direction
        assert not program["apart"], direction
    assert found[BOTH]["apart on a CPU"]


def collectives_of_channels() -> dict[str, list[tuple[str, int]]]:
    """What layer norm sends in plain `jit`, of channels on four TPU chips: kinds and bytes."""
    mesh = Mesh(np.array(compile_machine("tpu", "v5e:2x2")).ravel(), ("model",))
    jax.default_backend = lambda: "tpu"
    found = {}
    for direction, (f, arguments) in programs("layer", ROWS).items():
        if direction != NET:
            sharded = [
                jax.ShapeDtypeStruct(
                    v.shape,
                    v.dtype,
                    sharding=NamedSharding(mesh, P(*[None] * (v.ndim - 1), "model")),
                )
                for v in jax.tree.leaves(arguments)
            ]
            given = jax.tree.unflatten(jax.tree.structure(arguments), sharded)
            compiled = jax.jit(f).lower(*given).compile()
            sent = nl.instruments.ledger(compiled).collectives
            found[direction] = [(c.kind, c.nbytes) for c in sent]
    return found


def test_of_channels_on_several_devices_plain_jit_sends_numbers_of_rows():
    """The pivot's sum, both sums about it, and two backward; nothing is gathered."""
    found = in_a_process("tpu", "channels")
    for direction, most in {FORWARD: 2, BOTH: 3}.items():
        assert 1 <= len(found[direction]) <= most
        for kind, nbytes in found[direction]:
            assert kind == "all-reduce"
            assert nbytes <= 4 * 2 * ROWS[0]


def in_a_process(target: str, *arguments, module: str = "test_accelerators"):
    """What a module prints of the arguments; skipped where there is no compiler for the target."""
    if command := missing(target):
        pytest.skip(f"no compiler for {target}; to install it: {command}")
    run = subprocess.run(
        [sys.executable, "-m", f"tests.experiments.{module}", target, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(machines.TARGETS, "tpu", "no_such.module")
    with pytest.raises(Missing, match=r"pip install 'normlab\[tpu\]'"):
        place("tpu")


if __name__ == "__main__":
    if sys.argv[1:] == ["tpu", "channels"]:
        print(json.dumps(collectives_of_channels()))
    else:
        target, op, *shape, dtype = sys.argv[1:]
        print(json.dumps(compile_for(target, op, tuple(map(int, shape)), dtype)))
