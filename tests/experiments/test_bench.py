"""The benchmarks: that all time the same thing, what they write, and what they refuse."""

import dataclasses
import importlib
import json
import os
import sys
import time
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from normlab.experiments import console as cli
from normlab.experiments import models
from normlab.experiments.bench import conv as bench_conv
from normlab.experiments.bench import lm as bench_lm
from normlab.experiments.bench import ops as bench_ops
from normlab.experiments.bench import peers_jax as bench_jax
from normlab.experiments.bench import sync as bench_sync
from normlab.experiments.bench import tables as bench_report
from normlab.experiments.bench import training as bench_training
from normlab.experiments.bench.config import (
    BenchCompile,
    BenchConv,
    BenchFigure1,
    BenchLm,
    BenchOps,
    BenchStep,
    BenchSync,
)
from normlab.experiments.bench.turns import Process, Repeated, ask_all, paired, take_turns
from normlab.experiments.bench.worker import (
    BOTH,
    COPY,
    DIRECTIONS,
    EPS,
    FORWARD,
    GROUPS,
    KINDS_OF,
    OTHERS,
    PEERS,
    TORCH,
    Case,
    Server,
)
from normlab.experiments.programs.passes import Move
from normlab.experiments.rundir import RunError
from tests import oracles
from tests.helpers import gap

SMALL = {"conv": (2, 3, 4, 16), "dense": (6, 16), "tokens": (2, 3, 16)}
WAYS = [(op, kinds[0], "float32") for op, kinds in KINDS_OF.items()]
WAYS += [(op, kinds[-1], "bfloat16") for op, kinds in KINDS_OF.items()]
ORACLES = {
    "batch": oracles.batch,
    "layer": oracles.layer,
    "rms": oracles.rms,
    "group": lambda a, eps: oracles.group(a, GROUPS, eps),
    "instance": oracles.instance,
}


def run(out, *arguments: str) -> int:
    tiny = ("--rounds", "1", "--turn-ms", "0.1", "--run-dir", str(out))
    return cli.main(["bench", "ops", *arguments, *tiny])


@pytest.fixture(scope="module", autouse=True)
def _tyro_has_looked_for_torch():
    """At its first call it imports what `sys.modules` names, also where a test says None."""
    tyro.cli(int, args=["1"])


@pytest.fixture(autouse=True)
def _as_peers_are_used():
    """Peers warn, and promote types, as they please."""
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        yield


def family(peer: str):
    """The family that holds a peer, here in this process; skips where it is not installed."""
    pytest.importorskip({**PEERS, **OTHERS}.get(peer, ("jax", "jax"))[0])
    name = "torch" if peer in TORCH else "jax"
    return importlib.import_module(f"normlab.experiments.bench.peers_{name}").family("cpu")


def measure(peer: str, case: Case):
    """For every way of the peer: `(contestant, y, y without gradients, gradients...)`."""
    found = family(peer)
    found.load(case)
    for contestant in found.contestants(peer, case):
        calls = found.build(contestant).calls
        y, *rest = calls[BOTH]()
        gradients = [v.grad for v in (found.x, *found.params)] if peer in TORCH else rest[0]
        again, _ = calls[FORWARD]()
        arrays = (y, again, *gradients)
        types = [str(v.dtype).removeprefix("torch.") for v in arrays]
        assert types[:3] == [case.dtype] * 3
        assert set(types[3:]) == {"float32"}
        yield contestant, *((v.float().numpy() if peer in TORCH else v) for v in arrays)


class Told:
    """What a process of the tests makes."""

    def __init__(self, name: str) -> None:
        if name == "refused":
            raise RunError("no such thing")
        self.name = name

    def here(self) -> tuple[str, int, str | None]:
        return self.name, os.getpid(), os.environ.get("NORMLAB_TEST")

    def cores(self) -> set[int]:
        return os.sched_getaffinity(0)

    def fail(self) -> None:
        raise ValueError("too much\nof it")

    def end(self) -> None:
        os._exit(7)


class TestTurns:
    def test_every_round_starts_with_another_one_and_all_turns_are_kept(self):
        order = []
        turns = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
        seen = [{name: list(ms) for name, ms in taken.items()} for taken in take_turns(turns, 4)]
        assert "".join(order) == "abcbcacababc"
        assert seen[0] == {"a": [1], "b": [2], "c": [3]}
        assert seen[-1] == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}

    def test_a_call_is_repeated_to_fill_a_turn_and_waited_for(self):
        calls, waited = [], []

        def call():
            time.sleep(2e-3)
            calls.append(None)
            return len(calls)

        turn = Repeated(call, 10.0, waited.append)
        assert 1 <= turn.repetitions <= 5
        before = len(calls)
        assert turn() >= 2.0
        assert len(calls) - before == 1 + turn.repetitions
        assert waited[-2:] == [before + 1, len(calls)]
        assert Repeated(call, 1e-3).repetitions == 1

    def test_a_ratio_is_that_of_the_same_round(self):
        taken = {"a": [1.0, 10.0, 4.0, 9.0, 5.0], "b": [2.0, 10.0, 2.0, 3.0, 10.0]}
        assert paired(taken, "a", "b") == (1.0, 0.5, 2.0)
        assert paired({"a": [1.0], "b": [4.0]}, "a", "b") == (0.25, 0.25, 0.25)


class TestProcess:
    def test_it_starts_with_its_cores_and_variables_and_leaves_ours(self, monkeypatch):
        if not hasattr(os, "sched_getaffinity"):
            pytest.skip("this system cannot pin a process")
        before = os.sched_getaffinity(0)
        monkeypatch.delenv("NORMLAB_TEST", raising=False)
        variables = {"NORMLAB_TEST": "7"}
        with Process("a", Told, "b", variables=variables, cores={min(before)}) as process:
            assert os.sched_getaffinity(0) == before
            assert "NORMLAB_TEST" not in os.environ
            assert process.ask("cores") == {min(before)}
            name, pid, variable = process.ask("here")
        assert (name, variable) == ("b", "7")
        assert pid != os.getpid()

    def test_one_that_fails_is_asked_again_and_one_that_ends_is_told(self):
        with (
            Process("good", Told, "a", variables={}) as good,
            Process("bad", Told, "refused", variables={}) as bad,
        ):
            with pytest.raises(RunError, match=r"^the good process failed: ValueError: too much$"):
                good.ask("fail")
            assert [name for name, *_ in ask_all([good, good], "here")] == ["a", "a"]
            with pytest.raises(RunError, match=r"^the bad process failed: no such thing$"):
                bad.ask("here")
            for _ in range(2):
                with pytest.raises(RunError, match="the good process ended with exit code 7"):
                    good.ask("end")


class TestContestants:
    @pytest.mark.parametrize("peer", ["normlab", *PEERS, "jax.numpy", "tokamax", "torch.compile"])
    @pytest.mark.parametrize(("op", "kind", "dtype"), WAYS)
    def test_all_time_the_norm_and_its_gradients(self, op, kind, dtype, peer):
        if peer == "tokamax" and op not in ("layer", "rms"):
            pytest.skip("tokamax has no such norm")
        case = Case(op, kind, SMALL[kind], dtype)
        x, dy, params = case.inputs()
        x, dy = (np.asarray(jnp.asarray(v, dtype), np.float64) for v in (x, dy))
        params = [v.astype(np.float64) for v in params]

        def norm(x, g, b=0.0):
            return ORACLES[op](x, eps=EPS) * g + b

        y = norm(x, *params)
        gradients = oracles.gradient(lambda *args: (dy * norm(*args)).sum(), x, *params)
        names = []
        for contestant, *arrays in measure(peer, case):
            tolerance = 2e-5 if dtype == "float32" else 2e-2
            assert gap(tuple(arrays), (y, y, *gradients)) < tolerance, contestant.name
            names.append(contestant.name)
        assert len(names) == 1 + any("two-pass" in name for name in names)

    @pytest.mark.parametrize("peer", ["normlab", *PEERS, "jax.numpy"])
    @pytest.mark.parametrize("op", [op for op in KINDS_OF if op != "rms"])
    def test_safe_is_what_loses_no_digits_to_a_large_mean(self, op, peer, monkeypatch):
        case = Case(op, "conv", (4, 8, 8, 64), "float32")
        x, dy, (g, b) = case.inputs()
        x += np.float32(4e3)
        monkeypatch.setattr(Case, "inputs", lambda _: (x, dy, (g, b)))
        expected = ORACLES[op](x.astype(np.float64), eps=EPS) * g + b
        for contestant, y, *_ in measure(peer, case):
            assert (gap(y, expected) < 1e-3) == contestant.safe, contestant.name

    @pytest.mark.parametrize("peer", PEERS)
    def test_every_peer_has_one_default_and_ways_of_different_names(self, peer):
        for op, kind, dtype in WAYS:
            found = family(peer).contestants(peer, Case(op, kind, SMALL[kind], dtype))
            assert [c.default for c in found].count(True) == 1
            assert len({c.name for c in found}) == len(found)

    @pytest.mark.parametrize("peer", ["normlab", "torch"])
    def test_the_floor_copies_x(self, peer):
        found = family(peer)
        found.load(Case("rms", "dense", (6, 16), "bfloat16"))
        both = found.x, found.copy()()
        x, y = (v.detach().float().numpy() if peer == "torch" else v for v in both)
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


class TestServer:
    def test_a_contestant_that_fails_is_left_out_with_its_reason(self, monkeypatch):
        def broken(case):
            raise TypeError("no such norm\nand more")

        def fails(x, g):
            raise ValueError("not for this shape")

        contestant = bench_jax.Contestant("haiku", "haiku", fails, safe=True)
        monkeypatch.setitem(bench_jax.BUILDERS, "equinox", broken)
        monkeypatch.setitem(bench_jax.BUILDERS, "haiku", lambda case: [contestant])
        server = Server(bench_jax.family(""))
        peers = ["normlab", "haiku", "equinox"]
        rows = server.prepare(Case("rms", "dense", (6, 16), "float32"), peers, turn_ms=0.1)
        assert {row["name"]: row["reason"] for row in rows} == {
            "normlab": None,
            "haiku": "ValueError: not for this shape",
            "equinox": "TypeError: no such norm",
        }
        assert all(server.turn("normlab", direction) > 0 for direction in DIRECTIONS)
        assert server.turn(COPY, FORWARD) > 0


class TestOps:
    def test_a_run_leaves_tables_every_turn_and_a_figure(self, tmp_path, capsys):
        out = tmp_path / "run"
        chosen = ("--norms", "rms", "--shapes", "dense", "--dtypes", "float32")
        assert run(out, *chosen, "--peers", "flax.linen") == 0
        printed = capsys.readouterr().out
        for text in ("rms 4096×256 f32", "flax.linen", "floor", "normlab / peer", "GB/s"):
            assert text in printed
        result = json.loads((out / "ops.json").read_text())
        assert result["complete"]
        assert result["config"]["norms"] == ["rms"]
        assert result["environment"]["jax"]["variables"]["MALLOC_MMAP_MAX_"] == "0"
        assert result["environment"]["jax"]["backend"] == "cpu"  # where torch would compute, too
        assert result["environment"]["packages"]["flax"]
        assert result["absent"] == {}
        assert [case["label"] for case in result["cases"]] == [
            "rms 4096×256 f32",
            "rms 128×1024 f32",
        ]
        for case in result["cases"]:
            assert case["bytes"] == 4 * np.prod(case["shape"])
            assert case["floor"]["jax"]["gb_per_s"] > 0
            assert [row["name"] for row in case["contestants"]] == ["normlab", "flax.linen"]
            for row in case["contestants"]:
                assert row["temp_per_x"] >= 0
                for direction in DIRECTIONS:
                    turns = row["turns"][direction]["turns_ms"]
                    assert turns == [row["turns"][direction]["median_ms"]]
            ours, theirs = (row["turns"][BOTH]["median_ms"] for row in case["contestants"])
            assert case["ratios"][f"flax.linen, {BOTH}"] == pytest.approx(ours / theirs)
            assert case["ratios"][f"fastest safe, {BOTH}"]["peer"] == "flax.linen"
            assert case["ratios"][f"torch, {BOTH}"] is None
        assert (out / "ops.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (out / "ops.svg").read_bytes()

    def test_an_absent_peer_is_named_with_the_line_that_installs_it(
        self, tmp_path, monkeypatch, capsys
    ):
        for module in ("haiku", "equinox", "torch"):
            monkeypatch.setitem(sys.modules, module, None)
        chosen = ("--norms", "rms", "--shapes", "tokens", "--dtypes", "float32")
        out = tmp_path / "run"
        assert run(out, *chosen, "--peers", "haiku", "torch", "--no-reuse-memory") == 0
        printed = capsys.readouterr().out
        assert (
            "not installed, and left out: haiku, torch. To add them: pip install 'normlab[peers]'\n"
        ) in printed
        result = json.loads((out / "ops.json").read_text())
        assert result["absent"] == {"haiku": "not installed", "torch": "not installed"}
        (case,) = result["cases"]
        assert [row["name"] for row in case["contestants"]] == ["normlab"]

    def test_stopping_keeps_the_cases_that_were_done(self, tmp_path):
        config = BenchOps(
            norms=("rms",), shapes=("dense",), dtypes=("float32",), peers=(), rounds=1,
            turn_ms=0.1, run_dir=tmp_path / "run",
        )  # fmt: skip
        ops = bench_ops.Ops(config)
        doing = ops.run()
        assert next(doing) == "rms 4096×256 f32: compiling"
        assert next(doing) == "rms 4096×256 f32"
        assert next(doing) == "rms 128×1024 f32: compiling"
        ops.workers["jax"].close()
        with pytest.raises(RunError, match=r"jax process ended.*are kept"):
            next(doing)
        assert set(ops.finish()) == {"ops.json", "ops.png", "ops.svg"}
        result = json.loads((tmp_path / "run" / "ops.json").read_text())
        assert not result["complete"]
        assert [case["label"] for case in result["cases"]] == ["rms 4096×256 f32"]

    def test_stopping_before_a_case_is_done_leaves_no_directory(self, tmp_path):
        ops = bench_ops.Ops(BenchOps(peers=(), run_dir=tmp_path / "run"))
        assert ops.finish() == {}
        assert not (tmp_path / "run").exists()

    def test_reasons_and_notes_are_said_once(self):
        def row(name, **known):
            return {"name": name, "reason": None, "note": "", **known}

        rows = [row("a", reason="too large"), row("b", note="asked kindly")]
        done = SimpleNamespace(
            results=[
                {"op": "batch", "label": label, "contestants": rows}
                for label in ("batch 1", "batch 2")
            ],
            absent={"torch": "this torch has no CUDA"},
            environment={"load_before": 0.5, "load_after": 6.0, "jax": {"cores": 2}},
        )
        busy, *rest = bench_report.remarks(done)
        assert "load 0.5 before, 6.0 after, on 2 cores" in busy
        assert rest == [
            "torch left out: this torch has no CUDA",
            "a left out of batch 1; batch 2: too large",
            "b, batch: asked kindly",
        ]

    def test_the_fastest_safe_peer_may_differ_between_directions(self):
        def row(name, forward, both, safe=True, family="jax"):
            turns = {FORWARD: {"median_ms": forward}, BOTH: {"median_ms": both}}
            return {
                "name": name, "family": family, "safe": safe, "turns": turns, "temp_per_x": 2.0,
            }  # fmt: skip

        rows = [
            row("normlab", 2, 6),
            row("flax.linen", 1, 1, safe=False),
            row("haiku", 4, 3),
            row("equinox", 2, 4),
            row("torch", 1, 12, family="torch"),
        ]
        found = bench_ops.ratios(rows)
        assert found[f"fastest safe, {FORWARD}"] == {"peer": "equinox", "ratio": 1}
        assert found[f"fastest safe, {BOTH}"] == {"peer": "haiku", "ratio": 2}
        assert found[f"flax.linen, {BOTH}"] == 6
        assert (found[f"torch, {FORWARD}"], found[f"torch, {BOTH}"]) == (2, 0.5)
        assert found["temp, flax.linen"] == 1
        assert bench_ops.ratios([{"name": "normlab", "turns": {}}]) == {}


REFUSED = {
    "op": (["--norms", "bach"], ["--norms", "did you mean 'batch'", "instance"]),
    "shape": (["--shapes", "conf"], ["--shapes", "did you mean 'conv'", "tokens"]),
    "dtype": (["--dtypes", "float23"], ["did you mean 'float32'"]),
    "peer": (["--peers", "flax.line"], ["did you mean 'flax.linen'", "equinox"]),
    "nothing": (["--norms", "group", "--shapes", "dense"], ["leave nothing", "group: conv"]),
    "rounds": (["--rounds", "0"], ["--rounds", "at least 1"]),
    "scale": (["--scale", "0"], ["--scale", "at least 1"]),
    "turn": (["--turn-ms", "0"], ["--turn-ms", "positive"]),
}


class TestCommandLine:
    @pytest.mark.parametrize("case", REFUSED)
    def test_refused_with_what_to_change_and_nothing_written(self, case, tmp_path, capsys):
        arguments, words = REFUSED[case]
        out = tmp_path / "run"
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "ops", *arguments, "--run-dir", str(out)])
        assert stop.value.code == cli.EXIT_USAGE
        error = " ".join(capsys.readouterr().err.replace("│", " ").split())
        for word in words:
            assert word in error
        assert not out.exists()

    @pytest.mark.parametrize("command", [["bench"], ["bench", "step"], ["bench", "ops"]])
    def test_help_teaches(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert "usage:" in printed
        if command == ["bench"]:
            assert "step" in printed
            assert "ops" in printed

    def test_step_without_torch_is_one_clear_line(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "torch", None)
        assert cli.main(["bench", "step", "--steps", "2"]) == cli.EXIT_USAGE
        assert "pip install 'normlab[peers]'" in capsys.readouterr().err


class TestFigure1:
    def test_both_libraries_do_the_same_work(self, monkeypatch):
        pytest.importorskip("torch")
        monkeypatch.setattr(bench_training, "EXAMPLES", 100)
        monkeypatch.setattr(
            bench_training.Trainer, "compile", lambda *_: None
        )  # the first turn does
        config = BenchFigure1(seeds=2, batch_size=6, steps=4)
        ours, theirs = (
            np.concatenate([turn(), turn()], 1)
            for turn in (
                bench_training.build_normlab(config, bench_training.NETS),
                bench_training.build_torch(config, bench_training.NETS),
            )
        )
        assert ours.shape == (2, 8, 2)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
        assert not np.allclose(ours[0], ours[1], rtol=1e-2)

    @pytest.mark.parametrize(
        ("given", "words"),
        [({"seeds": 0}, "--seeds: got 0"), ({"batch_size": 10**6}, "--batch-size: got 1000000")],
    )
    def test_refuses_with_the_option_and_the_value(self, given, words):
        with pytest.raises(RunError, match=words):
            BenchFigure1(**given)


class TestConv:
    def test_every_form_takes_the_same_step(self):
        x = np.random.default_rng(0).standard_normal((4, 7, 7, 3), np.float32)
        w = np.random.default_rng(1).standard_normal((3, 3, 3, 5), np.float32)

        def gradients(form):
            x_, w_ = bench_conv.training_step(form, 2)(jnp.zeros_like(x), jnp.asarray(w))
            assert (x_.shape, w_.shape) == (x.shape, w.shape)
            y, pull_back = jax.vjp(lambda x, w: form(x, w, 2), x, w)
            return y, *pull_back(y)

        expected = gradients(bench_conv.FORMS["XLA"])
        for name, form in bench_conv.FORMS.items():
            assert gap(gradients(form), expected) < 1e-5, name

    def test_blocks_of_images_are_one_product_with_derivatives_of_both_modes(self, monkeypatch):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((6, 5, 5, 2), np.float32))
        w = jnp.asarray(rng.standard_normal((3, 3, 2, 3), np.float32))
        conv = models.MatmulConv()
        assert conv.images_per_block(x, w) == 6
        monkeypatch.setattr(models.MatmulConv, "BLOCK", 4 * 25 * 18 * 4)
        assert conv.images_per_block(x, w) == 6  # four blocks' worth is not cut
        monkeypatch.setattr(models.MatmulConv, "BLOCK", 4 * 25 * 18)
        assert conv.images_per_block(x, w) == 1
        monkeypatch.setattr(models.MatmulConv, "BLOCK", 1)
        assert conv.images_per_block(x, w) == 1

        def second(f):
            grad = jax.grad(lambda w: jnp.sin(f(x, w)).sum())
            return f(x, w), grad(w), jax.jvp(grad, (w,), (jnp.ones_like(w),))[1]

        assert gap(second(conv), second(conv.product)) < 1e-5

    def test_refuses_with_the_option_and_the_value(self):
        with pytest.raises(RunError, match="--batch-size: got 0"):
            BenchConv(batch_size=0)
        with pytest.raises(RunError, match=r"--cores: got 999, and there are \d+"):
            BenchConv(cores=999)


TINY = BenchLm(
    width=16, depth=3, heads=2, context=8, batch_size=2, vocabulary=11, steps=3, rounds=2
)


class TestLm:
    def test_the_floor_stays_where_it_is(self):
        turn = bench_lm.build_floor(dataclasses.replace(TINY, depth=6))
        first = turn()
        assert (first > 0).all()
        np.testing.assert_allclose(turn(), first, rtol=1e-5)

    def test_losses_that_differ_or_are_not_finite_are_refused(self):
        ours = np.array([2.0, 1.0])
        assert bench_lm.loss_gap({"normlab": ours, "torch, eager": ours * 1.0001}) < 2e-4
        with pytest.raises(RunError, match=r"are 1\.0e-02 apart.*not do the same work"):
            bench_lm.loss_gap({"normlab": ours, "torch, eager": ours * [1, 1.01]})
        with pytest.raises(RunError, match="not finite"):
            bench_lm.loss_gap({"normlab": ours * np.nan})

    def test_what_is_fused_is_counted_by_operations_and_layers(self):
        def move(reads, times, *names):
            return Move("", "fusion", names, (reads,), (10,), times, False)

        forward = "jit(f)/jvp(Lm)/Lm.through/block{}/mlp/norm/{}"
        back = "jit(f)/transpose(jvp(Lm))/Lm.through/block{0}/mlp/norm/{1}"
        found = [
            move(10, 1, forward.format(0, "mul")),
            move(10, 2, forward.format(1, "mul")),
            move(
                90, 1, back.format(0, "mul"), forward.format(0, "sub"), "jit(f)/jvp(Lm)/embed/add"
            ),
            move(50, 1, "jit(f)/jvp(Lm)/Lm.through/Lm.outside/norm_last/add", "x"),
        ]
        assert bench_lm.fused(found) == [
            ("forward and backward", ("mul", "sub"), ("embed",), 1, 100),
            ("forward", ("mul",), (), 3, 60),
        ]

    def test_the_tables_name_who_was_left_out(self, monkeypatch, capsys):
        times = {"normlab": 2.0, "floor": 1.0}
        rows = [
            bench_lm.Fused("forward", ("square",), (), 9, 9_000_000),
            bench_lm.Fused("backward", ("neg",), (), 4, 400),
        ]
        result = {
            "ms_per_step": times,
            "range_ms": {name: (ms / 2, 3 * ms) for name, ms in times.items()},
            "tokens_per_second": {name: 1e6 / ms for name, ms in times.items()},
            "start_seconds": times,
            "left_out": {"torch, compiled": "no compiler"},
            "norm_share": (0.25, 0.1, 0.5),
            "loss_gap": 1e-6,
            "fused": bench_lm.Fusions(rows, 20, 90_000_000, 80_000_000),
            "cores": 2,
            "variables": {"MALLOC_MMAP_MAX_": "0"},
        }
        monkeypatch.setattr(bench_lm, "run", lambda *_: result)
        assert cli.main(["bench", "lm"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        for text in ("500,000", "no compiler", "25% of a step (10% – 50%)", "MALLOC_MMAP_MAX_=0"):
            assert text in printed
        for text in ("13 of the 20", "move 9 of its 90 MB", "4 move less", "moves 80 MB"):
            assert text in printed

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: BenchLm(heads=3), "--heads: got 3 for --width 128"),
            (lambda: BenchLm(lr=0.0), "--lr: got 0.0"),
            (lambda: BenchCompile(depths=(4, 0)), r"--depths: got \(4, 0\)"),
        ],
    )
    def test_refuses_with_the_option_and_the_value(self, make, words):
        with pytest.raises(RunError, match=words):
            make()

    @pytest.mark.slow
    def test_scanned_and_written_out_it_is_the_same_work(self):
        scanned = dataclasses.replace(TINY, scan=True, remat=True)
        ours, theirs = (bench_lm.build_normlab(c, "rms") for c in (TINY, scanned))
        first = ours()
        np.testing.assert_allclose(first, theirs(), rtol=1e-5)
        assert first.shape == (3,)
        assert (ours() < first).all()  # the next turn goes on

    @pytest.mark.slow
    def test_pytorch_does_the_same_work(self):
        pytest.importorskip("torch")
        ours, theirs = bench_lm.build_normlab(TINY, "rms"), bench_lm.build_torch(TINY, False)
        for _ in range(3):
            np.testing.assert_allclose(ours(), theirs(), rtol=1e-4)

    @pytest.mark.slow
    def test_norms_are_found_in_the_program_forward_and_backward(self):
        found = bench_lm.fusions(TINY)
        words = " ".join(row.direction for row in found.rows)
        assert "forward" in words
        assert "backward" in words
        # At least once forward and once backward for two norms a block and the last one.
        assert sum(row.times for row in found.rows) >= 2 * (2 * TINY.depth + 1)
        assert 0 < sum(row.nbytes for row in found.rows) < found.nbytes
        assert found.nbytes_without < found.nbytes

    @pytest.mark.slow
    @pytest.mark.parametrize("scheme", ["pre", "post"])
    def test_all_take_turns_in_one_run(self, scheme):
        result = bench_lm.run(dataclasses.replace(TINY, scheme=scheme))
        assert {"normlab", "normlab, no norms", "floor"} <= result["tokens_per_second"].keys()
        assert result["tokens_per_second"].keys() | result["left_out"].keys() >= {*bench_lm.TORCH}
        assert result["ms_per_step"].keys() == result["start_seconds"].keys()
        tokens = TINY.batch_size * TINY.context
        for name, speed in result["tokens_per_second"].items():
            assert speed * result["ms_per_step"][name] == pytest.approx(1e3 * tokens)
        if scheme == "post":
            assert result["left_out"]["torch, eager"] == "its model is pre-norm, not post"

    @pytest.mark.slow
    def test_compiling_is_timed_by_phase(self):
        config = BenchCompile(depths=(1, 2), deepest=1, rounds=1)
        found = {(r["depth"], r["form"]): r for r in bench_lm.compiling(config)}
        forms = [(1, form) for form in bench_lm.FORMS] + [(2, "scan"), (2, "scan, remat")]
        assert list(found) == forms
        for result in found.values():
            *phases, whole = (result["seconds"][p] for p in (*bench_lm.PHASES, "all"))
            assert min(phases) > 0
            assert whole == pytest.approx(sum(phases))
            assert result["range"] == pytest.approx((whole, whole))
            assert result["temp_bytes"] > 0


@pytest.mark.parametrize("bench", ["step", "figure1", "conv"])
def test_a_bench_without_torch_says_how_to_install_it(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    measure, config = {
        "step": (bench_training.step, BenchStep()),
        "figure1": (bench_training.figure1, BenchFigure1()),
        "conv": (bench_conv.run, BenchConv()),
    }[bench]
    with pytest.raises(RunError, match=rf"bench {bench}.*pip install"):
        measure(config)


@pytest.mark.slow
def test_figure1_extrapolates_the_median_turn():
    pytest.importorskip("torch")
    config = BenchFigure1(seeds=2, steps=5, rounds=2, whole=1000)
    result = bench_training.figure1(config)
    assert list(result["whole_seconds"]) == ["normlab", "torch", "torch, a process per net"]
    for name, seconds in result["whole_seconds"].items():
        assert seconds == pytest.approx(result["start_seconds"][name] + result["ms_per_step"][name])
    assert result["ratios"]["normlab"] == 1
    assert result["loss_gap"] < 1e-5


@pytest.mark.slow
def test_conv_measures_every_form_of_every_case(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(bench_conv, "CASES", ((5, 1, 2, 1),))
    (row,) = bench_conv.run(BenchConv(batch_size=2, rounds=1))
    assert list(row["ms_per_step"]) == ["XLA", "one product", "MatmulConv", "torch"]
    assert all(ms > 0 for ms in row["ms_per_step"].values())


@pytest.mark.slow
def test_step_measures_both_in_one_run():
    pytest.importorskip("torch")
    result = bench_training.step(BenchStep(steps=20, rounds=2))
    assert set(result["ms_per_step"]) == {"normlab", "torch, eager", "floor"}
    assert result["normlab_over_torch"] > 0


@pytest.mark.slow
def test_every_peer_takes_turns_in_one_run(tmp_path):
    for module, _ in PEERS.values():
        pytest.importorskip(module)
    assert run(tmp_path / "run", "--shapes", "conv", "tokens") == 0
    result = json.loads((tmp_path / "run" / "ops.json").read_text())
    assert result["absent"] == {}
    for case in result["cases"]:
        assert {row["peer"] for row in case["contestants"]} == {"normlab", *PEERS}
        assert [row["reason"] for row in case["contestants"]] == [None] * len(case["contestants"])


class TestSync:
    def test_the_table_is_over_the_floor_and_over_flax_in_the_same_round(self):
        turns = {
            ("copy", "forward"): [2.0, 2.0, 2.0],
            ("normlab", "forward"): [3.0, 4.0, 50.0],
            ("normlab", "forward+backward"): [5.0, 10.0, 20.0],
            ("flax", "forward"): [3.0, 4.0, 100.0],
            ("flax", "forward+backward"): [10.0, 20.0, 20.0],
        }
        taken = {("2 devices", *key): ms for key, ms in turns.items()}
        floor, ours, flax = bench_sync.times(bench_sync.Result({(4, 16): taken}, []))
        assert floor == ("4×16", "2 devices", "floor", "2.000", "1.0", "–", "5.000", "1.0", "–")
        cells = ("4.000", "2.0", "1.00 (0.75–1.00)", "10.000", "2.0", "0.50 (0.50–0.75)")
        assert ours == ("4×16", "2 devices", "normlab", *cells)
        assert flax[2:] == ("flax", "4.000", "2.0", "1", "20.000", "4.0", "1")

    def test_contestants_that_do_other_work_are_refused(self):
        ours = [np.array([1.0, -2.0]), np.array([3.0])]
        close = [ours[0] * (1 + 1e-6), ours[1]]
        assert 0 < bench_sync.gap({"normlab": ours, "flax": close}) < 2e-6
        for wrong in (1.01, np.nan):
            with pytest.raises(RunError, match=r"haiku and normlab are .* same work"):
                bench_sync.gap({"normlab": ours, "haiku": [ours[0], ours[1] * wrong]})

    def test_what_was_left_out_is_said_with_the_reason(self, monkeypatch):
        refused = bench_sync.Result({}, [], 2e-7, ("2.15", "ValueError: wants a GPU"))
        first, *rest = bench_sync.remarks(BenchSync(), refused)
        assert "medians of 31 turns" in first
        assert "MALLOC_MMAP_MAX_=0" in first
        assert "2e-07" in first
        assert any("SyncBatchNorm is not timed (torch 2.15): ValueError: wants" in s for s in rest)
        for module in ("haiku", "torch"):
            monkeypatch.setitem(sys.modules, module, None)
        said = list(bench_sync.remarks(BenchSync(reuse_memory=False), bench_sync.Result({}, [])))
        assert "memory as the system has it" in said[0]
        assert any("left out: haiku, torch" in s and "pip install" in s for s in said)
        alone = bench_sync.remarks(BenchSync(processes=1), bench_sync.Result({}, []))
        assert not any("torch" in s for s in alone)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [1, 2])
    def test_all_take_turns_and_do_the_same(self, processes, monkeypatch, capsys):
        monkeypatch.setattr(bench_sync, "SHAPES", ((4, 16), (2, 3, 3, 8)))
        few = ("--rounds", "2", "--turn-ms", "0.1", "--processes", str(processes))
        assert cli.main(["bench", "sync", "--markdown", *few]) == 0
        printed = capsys.readouterr().out
        for shape in ("4×16", "2×3×3×8"):
            for over in ("2 devices", "2 processes"):
                for name in ("floor", "normlab", "flax", "flax, two-pass"):
                    row = f"| {shape} | {over} | {name} |"
                    assert (row in printed) == (over == "2 devices" or processes == 2)
        with_torch = importlib.util.find_spec("torch") is not None and processes == 2
        assert ("| 2 processes | torch" in printed) == with_torch
        assert "| 4×16 | normlab |" in printed
        assert "agree to" in printed
