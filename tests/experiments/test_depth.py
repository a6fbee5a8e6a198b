"""The command `depth`: scanned nets beside those written out, real steps, and what it refuses."""

import json

import jax
import numpy as np
import optax
import pytest

import normlab as nl
from normlab.experiments import console as cli
from normlab.experiments import models
from normlab.experiments.depth.command import table
from normlab.experiments.depth.config import Depth
from normlab.experiments.depth.figure import picture
from normlab.experiments.depth.profile import INSTRUMENTS, Profile, examples, measure
from normlab.experiments.rundir import RunError
from normlab.experiments.terminal import console
from normlab.experiments.training.trainer import DeviceData, Trainer, TrainState


def test_scanned_and_recomputed_blocks_are_measured_as_those_that_are_written_out():
    """In a scheme that changes with depth; and the update is what a step does to the weights."""
    config = Depth(schemes=("mix",), depth=4, width=16, context=8)
    data = DeviceData(examples(config, print), 1)
    options = config.options("mix") | {"scan": False}
    kernels = models.draw_kernels("lm", 256, [0], data.probe, **options)
    written = models.build("lm", nl.get("rms"), 256, **options)
    scanned = models.build("lm", nl.get("rms"), 256, **config.options("mix"), remat=True)
    assert len(scanned.runs()) == 2

    momentum = optax.sgd(0.01, momentum=0.9)
    by_hand = Trainer(written, momentum, data, kernels, synced=True)
    state = by_hand.init_one(jax.tree.map(lambda v: v[0], kernels))
    params = scanned.stack(state.params)
    stacked = TrainState(params, scanned.stack(state.norm_state), momentum.init(params))
    trainer = Trainer(scanned, momentum, data, params, synced=True)
    a = jax.jit(lambda state: measure(by_hand, state, 0.01))(state)
    b = jax.jit(lambda state: measure(trainer, state, 0.01))(stacked)
    assert a.keys() == b.keys() == {"loss", *INSTRUMENTS}
    for key in a:
        assert a[key].shape == (() if key == "loss" else (4,))
        np.testing.assert_allclose(a[key], b[key], rtol=2e-4, err_msg=key)

    lanes = jax.tree.map(lambda v: v[None, None], stacked)
    everything = np.arange(len(data.probe))[None, None]
    after, losses = trainer.train(lanes, everything)
    np.testing.assert_allclose(losses[0, 0], b["loss"], rtol=1e-5)
    before, after = (
        scanned.unstack(p) for p in (params, jax.tree.map(lambda v: v[0, 0], after.params))
    )
    for i in range(4):
        w, v = (
            np.concatenate([k.ravel() for k in jax.tree.leaves(p[f"block{i}"]) if k.ndim > 1])
            for p in (before, after)
        )
        ratio = np.linalg.norm(v - w) / np.linalg.norm(w)
        np.testing.assert_allclose(b["update"][i], ratio, rtol=1e-3)
        np.testing.assert_allclose(b["effective_rate"][i], 0.01 / np.square(w).sum(), rtol=1e-5)


def test_the_command_measures_before_and_after_training(tmp_path, capsys):
    arguments = (
        "--dataset markov --steps 2 --optimizer momentum --schemes peri --depth 12 --width 16"
    )
    where = ["--context", "8", "--run-dir", str(tmp_path / "run")]
    assert cli.main(["depth", *arguments.split(), *where]) == 0
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    before, after = (r for r in records if r["kind"] == "training")
    assert [(r["scheme"], r["step"]) for r in (before, after)] == [("peri", 0), ("peri", 2)]
    assert after["train_loss"] < before["train_loss"]
    halves = [[r for r in records if r["kind"] == "block" and r["step"] == at] for at in (0, 2)]
    for blocks in halves:
        assert [r["block"] for r in blocks] == list(range(12))
        assert all(r[key] is not None for r in blocks for key in INSTRUMENTS)
        variances = [r["variance"] for r in blocks]
        assert variances == sorted(variances)  # block10 is behind block9
        assert all(0 < r["entropy"] < 1 for r in blocks)
        assert all(1 < r["rank"] <= 8 for r in blocks)
    assert halves[0][0]["effective_rate"] != halves[1][0]["effective_rate"]
    for name in ("config.json", "environment.json", "depth.png", "depth.svg"):
        assert (tmp_path / "run" / name).stat().st_size
    assert "metrics.jsonl" in capsys.readouterr().out.replace("\n", "")


def test_the_table_and_the_picture_show_what_is_finite():
    values = {key: [1.0, None, 3.0] for key in INSTRUMENTS}
    records = [
        {"net": net, "step": step, "loss": None, **values}
        for net, step in (("pre", 0), ("pre", 5), ("post", 0))
    ]
    with console.capture() as said:
        console.print(table(records))
    rows = [line.split() for line in said.get().splitlines() if "variance" in line]
    assert rows == [["│", "stream", "variance", "│", "0", "│", "0", "│", "1", "│", "1", "│"]]
    figure = picture(records, "title")
    panels = figure.axes
    assert len(panels) == len(INSTRUMENTS)
    for axes in panels:
        assert [line.get_linestyle() for line in axes.get_lines()] == ["--", "-", "--"]
        assert all(np.isnan(np.asarray(line.get_ydata())[1]) for line in axes.get_lines())
    [legend] = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [
        "pre",
        "post",
        "before training",
        "after 5 steps",
    ]


def test_nets_are_named_by_what_tells_them_apart():
    assert list(Depth(schemes=("pre",)).nets) == ["pre"]
    assert list(Depth(schemes=("pre",), norms=("rms", "dyt")).nets) == ["rms", "dyt"]
    both = Depth(schemes=("pre", "post"), norms=("rms", "dyt")).nets
    assert both["post, rms"] == ("post", "rms")
    assert len(both) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 3}, "--steps: got 3; it must be 0 on random bytes"),
        ({"dataset": "mnist"}, "--dataset mnist: .* Change one of them"),
        ({"model": "vit"}, "--dataset random: .* vit images"),
        ({"schemes": ()}, "--schemes: got .* at least one, and distinct"),
        ({"norms": ("rms", "rms")}, "--norms: .* distinct"),
        ({"depth": 0}, "--depth: got 0; it must be at least 1"),
        ({"lr": float("nan")}, "--lr: .* positive and finite"),
    ],
)
def test_what_it_refuses(options, said):
    with pytest.raises(RunError, match=said):
        Depth(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schemes": ("per",)}, "peri"),
        ({"norms": ("rmss",)}, "rms"),
        ({"inside": ("z",)}, "z"),
        ({"width": 30}, "heads"),
        ({"schemes": ("rezero",), "norms": ("rms", "layer")}, "stands nowhere"),
        ({"schemes": ("rezero",), "norms": ("layer",)}, "stands nowhere"),
    ],
)
def test_nets_that_there_are_not(options, said, tmp_path):
    with pytest.raises(RunError, match=said):
        Profile(Depth(**options, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
