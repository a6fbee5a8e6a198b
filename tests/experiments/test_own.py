"""Models and data sets of one's own, by their place, where those of the experiments go by name."""

import json
import textwrap

import numpy as np
import pytest

from normlab.experiments import console as cli
from normlab.experiments import models
from normlab.experiments.compare.comparison import Compare
from normlab.experiments.data import DataError, Reading, load
from normlab.experiments.depth.profile import Depth
from normlab.experiments.rundir import RunError
from normlab.experiments.training.train import Train

MODULE = """
import functools

import flax.linen as nn
import numpy as np

import normlab as nl
from normlab.experiments import models
from normlab.experiments.models import Network


class Net(Network):
    flat = True
    width: int = 8

    @property
    def layers(self):
        return ("hidden", "last")

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        shape = (x.shape[-1], self.width)
        x = self.layer("hidden", nl.Dense(), shape, activation=nn.relu)(x, train)
        x = self.layer("last", nl.Dense(), (self.width, self.width))(x, train)
        return nn.Dense(self.classes)(x)


class Nameless(Network):
    @nn.compact
    def __call__(self, x, train):
        return self.layer("hidden", nl.Dense(), (x.shape[-1], 8))(x, train)


class Other(Nameless):
    layers = ("hiden",)


narrow = functools.partial(Net, width=4)
small_lm = functools.partial(models.Lm, width=16, heads=2)
number = 3


def rings():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    angle = rng.uniform(0, 2 * np.pi, 200)
    x = (1 + labels[:, None]) * np.stack([np.cos(angle), np.sin(angle)], 1)
    return x[:160], labels[:160], x[160:], labels[160:]


def text():
    return "to be or not to be, that is the question. " * 200


def three():
    return rings()[:3]


def floats():
    return (x := rings())[0], x[1] / 2, x[2], x[3]


def holes():
    return (x := rings())[0] * np.nan, *x[1:]


def short():
    return (x := rings())[0][:, :1], *x[1:]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of one's own; what returns its name."""
    (tmp_path / "own_things.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    return "own_things"


def test_a_data_set_of_ones_own_is_loaded(mine):
    data = load(f"{mine}:rings")
    assert data.train_inputs.dtype == np.float32
    assert data.train_inputs.shape == (160, 2)
    assert data.train_labels.dtype == np.int32
    assert (data.name, data.classes) == ("own_things:rings", 3)
    assert data.checksum == load(f"{mine}:rings").checksum
    written = load(f"{mine}:text", reading=Reading(context=16))
    assert written.text is not None
    assert bytes(written.train_inputs[0].tolist()).startswith(b"to be or not")
    assert len(written.test_inputs) < len(written.train_inputs)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "no 'nothing'"),
        ("number", "got int; expected a function"),
        ("three", "returns 3 values; expected .train_inputs, train_labels"),
        ("floats", "train_labels of float64 .160. beside .*expected whole numbers .160."),
        ("holes", "not finite"),
        ("short", r"float32 \[1\] to train on, and of float32 \[2\] to test"),
        ("Net", "missing 2 required|returns"),
    ],
)
def test_what_is_no_data_set_is_said(mine, name, said):
    with pytest.raises((DataError, TypeError), match=said):
        load(f"{mine}:{name}")


def test_a_model_of_ones_own_has_the_options_of_its_class(mine):
    assert models.is_flat(f"{mine}:narrow")
    assert not models.reads_text(f"{mine}:Net")
    assert models.reads_text(f"{mine}:small_lm")
    with pytest.raises(ValueError, match=r"unknown option 'depth': .*Known: .*width"):
        models.require(f"{mine}:Net", depth=3)
    for name in ("rings", "number"):
        with pytest.raises(ValueError, match=r"expected a subclass of .*Network"):
            models.require(f"{mine}:{name}")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("Nameless", "Nameless: got no property `layers`"),
        ("Other", "a layer 'hidden'; did you mean 'hiden'.*let `layers` name it"),
    ],
)
def test_a_model_that_does_not_name_its_layers_is_told_so(mine, model, said):
    command = Compare(model=f"{mine}:{model}", dataset=f"{mine}:rings")
    with pytest.raises(RunError, match=said):
        command.draw_kernels(3, [0], np.zeros((2, 2), np.float32))


def test_both_are_compared_by_their_places(mine, tmp_path, capsys):
    options = "--norms none batch --steps 4 --evaluations 1 --batch-size 16 --devices 1 --seeds 1"
    where = ["--model", f"{mine}:Net", "--dataset", f"{mine}:rings"]
    out = tmp_path / "run"
    assert cli.main(["compare", *where, *options.split(), "--run-dir", str(out)]) == 0
    assert "accuracy" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    layers = {row["layer"] for row in rows if row.get("kind") == "part"}
    assert layers == {"hidden", "last"}
    assert json.loads((out / "environment.json").read_text())["dataset"]["name"] == where[-1]


def test_the_commands_take_a_text_of_ones_own_where_the_model_reads_text(mine):
    text, rings, lm = f"{mine}:text", f"{mine}:rings", f"{mine}:small_lm"
    for command in (Compare, Train):
        assert command(dataset=text, model=lm).optimizer == "adamw"
        assert command(dataset=rings).optimizer == "momentum"
        with pytest.raises(RunError, match="no 'Nothing'"):
            command(dataset=rings, model=f"{mine}:Nothing")
        with pytest.raises(RunError, match="reads text, and --dataset digits is none"):
            command(dataset="digits", model=lm)
    assert Depth(dataset=text, model=lm, steps=2).depth == 12
    with pytest.raises(RunError, match="unknown option 'scheme'"):
        Depth(dataset=rings, model=f"{mine}:Net")


@pytest.mark.parametrize(
    ("dataset", "model", "said"),
    [
        ("text", "conv", "a text, which conv does not read. Give --model lm"),
        ("rings", "lm", "arrays"),
        ("rings", "conv", "inputs [N, 2], and conv reads images [N, H, W, C]. Take --model mlp"),
    ],
)
def test_data_that_the_model_does_not_read_are_refused(
    mine, dataset, model, said, tmp_path, capsys
):
    out = tmp_path / "run"
    given = ["--dataset", f"{mine}:{dataset}", "--model", model, "--run-dir", str(out)]
    assert cli.main(["compare", *given, "--devices", "1"]) == cli.EXIT_USAGE
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
