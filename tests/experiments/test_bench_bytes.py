"""`bench bytes`: all contestants stand in the same block, what is counted, and what is said."""

import json
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.experiments import console as cli
from normlab.experiments.bench import blocks_jax, figure, worker
from normlab.experiments.bench import bytes as moved
from normlab.experiments.bench.blocks import BLOCKS, HERE, OURS, WITHOUT, Program, floor
from normlab.experiments.bench.compiled import Target
from normlab.experiments.bench.config import PEERS_OF_BYTES, TARGETS, BenchBytes
from normlab.experiments.bench.turns import Process
from normlab.experiments.bench.worker import BOTH, COPY, DIRECTIONS, FORWARD
from normlab.experiments.programs import machines
from normlab.experiments.programs.machines import missing
from normlab.experiments.programs.passes import lower, moves, place
from normlab.experiments.rundir import RunError
from tests.helpers import gap

SHAPES = {"transformer": (2, 4, 16), "bottleneck": (4, 3, 3, 32)}
TINY = ("--tokens", "2", "4", "16", "--dtypes", "float32")


@pytest.fixture(autouse=True)
def _as_peers_are_used():
    """Peers warn, and promote types, as they please."""
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        yield


def drawn(program: Program):
    """Arrays for a program."""
    leaves, tree = jax.tree.flatten(blocks_jax.arguments(program))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = zip(keys, leaves, strict=True)
    return tree.unflatten([0.3 * jax.random.normal(k, v.shape, v.dtype) for k, v in draw])


def made(program: Program, *peers: str):
    """What each contestant makes of the same arrays, by name."""
    values = drawn(program)
    ways = [one for peer in peers for one in blocks_jax.contestants(peer, program)]
    return {one.name: jax.jit(one.f)(*values)[0] for one in ways}


class TestBlocks:
    @pytest.mark.parametrize("block", SHAPES)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_nothing_but_the_norm_differs(self, block, dtype):
        for op in BLOCKS[block].ops:
            program = Program(block, op, dtype, SHAPES[block])
            found = made(program, WITHOUT, "normlab", "flax.linen", "jax.numpy")
            without, expected = found.pop(WITHOUT), found.pop("jax.numpy")
            assert len(found) == 3 - (op == "rms")
            assert expected.shape == without.shape == program.shape
            assert gap(without, expected) > 0.1
            for name, y in found.items():
                assert y.dtype == expected.dtype == jnp.dtype(dtype)
                assert gap(y, expected) < {"float32": 1e-4, "bfloat16": 0.1}[dtype], name

    @pytest.mark.parametrize("block", SHAPES)
    def test_a_norm_in_one_with_its_neighbours_stands_for_them(self, block, monkeypatch):
        program, called = Program(block, BLOCKS[block].ops[0], "float32", SHAPES[block]), []
        expected = made(program, "jax.numpy")["jax.numpy"]

        def fused(case):
            (one,) = blocks_jax.BUILDERS["jax.numpy"](case)

            def add(x, y, *params):
                called.append("add")
                return one.f(x + y, *params)[0], x + y, ()

            def relu(x, residual, *params):
                called.append("relu")
                h = one.f(x, *params)[0]
                return jnp.maximum(h if residual is None else h + residual, 0), ()

            return {"add": add, "relu": relu}

        monkeypatch.setitem(blocks_jax.FUSED, "jax.numpy", fused)
        assert gap(made(program, "jax.numpy")["jax.numpy"], expected) < 1e-6
        assert called == {"transformer": ["add"], "bottleneck": ["relu"] * 3}[block]

    def test_what_is_normalized_is_counted(self):
        assert Program("alone", "rms", "bfloat16", (8, 16)).normed == 2 * 8 * 16
        assert Program("transformer", "rms", "float32", (2, 4, 16)).normed == 2 * 4 * 2 * 4 * 16
        wide = Program("bottleneck", "batch", "float32", (2, 2, 2, 32))
        assert wide.normed == 1.5 * wide.nbytes == 4 * 2 * 2 * 2 * (8 + 8 + 32)
        assert wide.label == "bottleneck, batch 2×2×2×32 f32"

    @pytest.mark.parametrize(
        ("backend", "module"),
        [
            ("tpu", "jax.experimental.pallas.ops.tpu.flash_attention:flash_attention"),
            ("gpu", "jax.experimental.pallas.ops.gpu.attention:mha"),
        ],
    )
    def test_attention_is_a_kernel_where_there_is_one(self, backend, module, monkeypatch):
        path, _, name = module.partition(":")
        kernel = pytest.importorskip(path)
        asked = []
        monkeypatch.setattr(kernel, name, lambda q, *_, **options: asked.append(options) or q)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        for shape in ((1, 128, 2, 128), (1, 128, 2, 64), (1, 100, 2, 128)):
            q = jnp.ones(shape)
            assert blocks_jax.attention(q, q, q).shape == shape
        (options,) = asked
        assert options["causal"]
        assert options["sm_scale"] == pytest.approx(128**-0.5)


class TestTarget:
    def test_counts_what_the_program_moves_but_for_what_is_seldom_needed(self):
        program = Program("alone", "batch", "float32", (4096, 16))
        target = Target("cpu")
        (row,) = target.prepare(program, ["normlab"])
        assert (row["name"], row["reason"], row["safe"]) == ("normlab", None, True)
        found = target.count("normlab", FORWARD)
        (one,) = blocks_jax.contestants("normlab", program)
        every = moves(lower(one.f, place("cpu"), *blocks_jax.arguments(program)).compile())
        always = [move for move in every if not move.when_needed]
        assert len(always) < len(every)
        assert found["nbytes"] == sum(move.nbytes for move in always)
        assert found["kernels"] == len(always)
        assert found["passes"].writes == 1
        both = target.count("normlab", BOTH)
        assert both["nbytes"] > found["nbytes"] > 2 * program.nbytes

    def test_who_has_no_such_norm_or_fails_is_left_out_with_the_reason(self, monkeypatch):
        def broken(case):
            raise KeyError("too old")

        monkeypatch.setitem(blocks_jax.BUILDERS, "haiku", broken)
        monkeypatch.setitem(sys.modules, "tokamax", types.ModuleType("tokamax"))
        program = Program("alone", "group", "float32", (2, 3, 3, 16))
        rows = Target("cpu").prepare(program, ["haiku", "tokamax"])
        reasons = {row["name"]: row["reason"] for row in rows}
        assert reasons["haiku"] == "KeyError: 'too old'"
        assert reasons["tokamax"] == "it has layer and RMS norm alone"

    def test_one_that_cannot_be_imported_says_which_can(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokamax", None)
        rows = Target("cpu").prepare(Program("alone", "rms", "float32", (8, 16)), ["tokamax"])
        assert "cannot be imported" in rows[0]["reason"]
        assert "pip install 'normlab[tokamax]', with Python 3.12" in rows[0]["reason"]

    def test_here_programs_run(self, monkeypatch):
        monkeypatch.setattr("normlab.experiments.bench.compiled.TURN_MS", 0.1)
        target = Target(HERE)
        target.prepare(Program("transformer", "rms", "bfloat16", (1, 4, 16)), ["jax.numpy"])
        for direction in DIRECTIONS:
            assert target.count("jax.numpy", direction)["nbytes"] > 0
            assert target.turn("jax.numpy", direction) > 0
        assert target.turn(COPY, FORWARD) > 0

    @pytest.mark.parametrize("name", ["tpu", "cuda"])
    def test_ahead_of_time(self, name):
        if command := missing(name):
            pytest.skip(f"no compiler for {name}; to install it: {command}")
        program = Program("transformer", "layer", "float32", (1, 128, 128))
        with Process(name, Target, name, variables=moved.AHEAD) as process:
            peers = [WITHOUT, *OURS, "flax.linen", "jax.numpy"]
            rows = process.ask("prepare", program, peers)
            assert [row["reason"] for row in rows] == [None] * 8
            found = {row["name"]: process.ask("count", row["name"], BOTH) for row in rows}
        assert min(one["nbytes"] for one in found.values()) > program.nbytes
        assert found[WITHOUT]["kernels"] < min(found[n]["kernels"] for n in found if n != WITHOUT)


def row(name: str, peer: str, nbytes: int, **more):
    """A contestant whose program moves so much forward, and three times that both ways."""
    one = {"temp_bytes": 0, "kernels": 2, "passes": (2, 1)}
    counts = {FORWARD: {**one, "nbytes": nbytes}, BOTH: {**one, "nbytes": 3 * nbytes}}
    known = {"peer": peer, "name": name, "safe": True, "default": True, "reason": None}
    return {**known, **counts, **more}


ROWS = [
    row(WITHOUT, WITHOUT, 10),
    row("normlab", "normlab", 40),
    row("normlab, other", "normlab", 20, default=False),
    row("flax.linen", "flax.linen", 80, safe=False),
    row("tokamax", "tokamax", 0, reason="too old"),
]
RESULT = {"block": "transformer", "op": "rms", "label": "a block", "nbytes": 16, "normed": 10}
RESULT["targets"] = {"tpu": ROWS, "cuda": [r for r in ROWS if r["name"] != "normlab"]}


class TestTables:
    def test_who_is_missing_on_one_target_has_a_dash_and_who_failed_no_line(self):
        lines = list(moved.table([RESULT], ["tpu", "cuda"]))
        assert len({len(line) for line in (moved.headings(["tpu", "cuda"]), *lines)}) == 1
        assert [line[:2] for line in lines] == [
            ["a block", WITHOUT],
            ["", "normlab"],
            ["", "normlab, other"],
            ["", "flax.linen *"],
        ]
        assert lines[1][2:6] == ["0.00 / 0.00", "0", "2 / 2", "2, 1 / 2, 1"]
        assert lines[1][6:] == ["–"] * 4

    def test_a_norm_alone_stands_below_its_floor(self):
        alone = {**RESULT, "block": "alone", "nbytes": 10**8}
        first, *_ = moved.table([alone], ["tpu"])
        assert first == ["a block", "floor", "200 / 500", "", "", "1, 1 / 3, 2"]
        assert floor("alone", "batch", BOTH) == (5, 2)
        assert floor("transformer", "rms", BOTH) is None

    def test_the_default_is_compared_with_the_fewest_of_the_others(self):
        (line,) = moved.compared([RESULT], ["tpu", "cuda"])
        assert line == ["a block", *["0.500 (flax.linen)"] * 2, "–", "–"]
        assert len(moved.headings_compared(["tpu", "cuda"])) == 5

    def test_a_time_is_over_that_of_a_copy_of_as_many_bytes(self):
        times = {"copy_ms": 2.0, "median_ms": 10.0}
        here = row("normlab", "normlab", 64)
        for direction in DIRECTIONS:
            here[direction] |= times
        (line,) = moved.table([{**RESULT, "targets": {HERE: [here]}}], [HERE])
        assert line[-2:] == ["10.000 / 10.000", "2.50 / 0.83"]

    def test_the_figure_shows_what_the_norms_move(self):
        assert figure.moved_by_norms(RESULT, "tpu", ROWS[1], FORWARD) == 3
        alone = {**RESULT, "block": "alone"}
        assert figure.moved_by_norms(alone, "tpu", ROWS[1], BOTH) == 12
        lonely = {**RESULT, "targets": {"tpu": ROWS[1:]}}
        assert figure.moved_by_norms(lonely, "tpu", ROWS[1], FORWARD) is None
        drawn = figure.draw_bytes([RESULT, alone], {t: TARGETS[t] for t in ("tpu", "cuda")})
        assert len(drawn.axes) == 4
        assert {name.get_text() for name in drawn.legends[0].texts} == {
            "normlab",
            "normlab, other",
            "flax.linen",
        }


class TestCommand:
    def test_one_command_compiles_prints_and_keeps(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(machines.TARGETS, "tpu", "no_such.module")
        monkeypatch.setitem(worker.OTHERS, "tokamax", ("no_such_module", "tokamax"))
        out = tmp_path / "run"
        chosen = ("--norms", "rms", "--targets", "cpu", "tpu", "--peers", "jax.numpy", "tokamax")
        arguments = ["bench", "bytes", *chosen, *TINY, "--markdown", "--run-dir", str(out)]
        assert cli.main(arguments) == 0
        printed = capsys.readouterr().out
        assert "| rms 8×16 f32 | floor |" in printed
        assert "| transformer, rms 2×4×16 f32 | no norm |" in printed
        assert printed.count("|  | normlab, xla |") == printed.count("|  | jax.numpy |") == 2
        assert "normlab, pallas left out of all for CPU" in printed
        assert "TPU" not in printed
        assert "no compiler for tpu" in printed
        assert "pip install 'normlab[tpu]'" in printed
        assert "left out: tokamax. To add them: pip install" in printed
        found = json.loads((out / "bytes.json").read_text())
        assert found["complete"]
        assert found["environment"]["cpu"]["variables"]["JAX_PLATFORMS"] == "cpu"
        counted = found["programs"][1]["targets"]["cpu"]
        assert [one["name"] for one in counted] == [WITHOUT, *OURS, "jax.numpy"]
        there = [one for one in counted if not one["reason"]]
        assert [one["name"] for one in there] == [WITHOUT, *OURS[:2], "jax.numpy"]
        assert all(one[BOTH]["nbytes"] > one[FORWARD]["nbytes"] > 0 for one in there)
        assert (out / "bytes.png").read_bytes().startswith(b"\x89PNG")

    def test_nothing_to_compile_for_is_an_error_that_says_what_would_do(
        self, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setitem(machines.TARGETS, "cuda", "no_such.module")
        out = tmp_path / "run"
        assert cli.main(["bench", "bytes", "--targets", "cuda", "--run-dir", str(out)]) == 2
        assert "pip install 'normlab[cuda]'" in capsys.readouterr().err
        assert not out.exists()

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"blocks": ("block",)}, "--blocks: unknown 'block'"),
            ({"norms": ("layr",)}, "--norms: unknown 'layr'.*layer"),
            ({"targets": ("gpu",)}, "--targets: unknown 'gpu'"),
            ({"targets": ()}, "--targets: name one at least"),
            ({"dtypes": ()}, "--dtypes: name one at least"),
            ({"peers": ("torch",)}, "--peers: unknown 'torch'"),
            ({"blocks": ("transformer",), "norms": ("batch",)}, "leave nothing.*transformer:"),
            ({"tokens": (0, 4, 8)}, "--tokens: got"),
            ({"images": (2, 4, 4, 48)}, "--images: got .*multiple of 32"),
            ({"rounds": 0}, "--rounds: got 0"),
        ],
    )
    def test_refuses_with_the_option_and_the_value(self, given, words):
        with pytest.raises(RunError, match=words):
            BenchBytes(**given)

    def test_a_norm_alone_is_that_of_the_issue(self):
        shapes = {(p.block, p.op): p.shape for p in BenchBytes().programs()}
        assert shapes["alone", "layer"] == (8192, 4096)
        assert shapes["alone", "group"] == (128, 56, 56, 128)
        assert set(PEERS_OF_BYTES) <= set(blocks_jax.BUILDERS)
        assert np.all([len(s) == 4 for (b, _), s in shapes.items() if b == "bottleneck"])
