"""What batch norm promises: each verdict holds and fails where it must, on records made by hand."""

import dataclasses
import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import normlab as nl
from normlab.experiments import models, questions
from normlab.experiments.data import load
from normlab.experiments.engine import Checkpoint, Net, Records
from normlab.experiments.questions import (
    data_size,
    deep_sigmoid,
    dropout,
    figure1,
    gain_bias,
    gaussian,
    initialization,
    learning_rate,
    optimizers,
    placement,
)
from tests.helpers import judged

NAMES = (
    *("learning_rate", "deep_sigmoid", "gain_bias", "placement", "dropout", "figure1"),
    *("initialization", "data_size", "optimizers", "gaussian"),
)


def ends(accuracy: float, *, step: int = 100, diverged=None, **labels) -> list:
    """The last evaluation of three seeds, which differ by hundredths of a point."""
    rng = np.random.default_rng(zlib.crc32(repr(labels).encode()))
    return [
        {"kind": "evaluation", **labels, "seed": seed, "step": step, "diverged": diverged}
        | {"accuracy": (accuracy + 0.01 * rng.uniform()) / 100}
        for seed in range(3)
    ]


def decisions(question, records) -> list[str]:
    return [verdict.decision for verdict in judged(question, records)]


# Figure 1


def flowing(wander: float, grow: float, **labels) -> list:
    """A unit whose median wanders, and whose width of about 2 grows, over ten evaluations."""
    return [
        {"kind": "evaluation", **labels, "seed": seed, "step": step, "accuracy": top / 100}
        | {"percentiles": [[middle - width / 2], [middle], [middle + width / 2]]}
        for seed in range(3)
        for step in range(0, 11)
        for top in [min(90 + step * (2 if labels["norm"] == "batch" else 1), 96 + seed / 100)]
        for middle, width in [
            (wander * step / 10 * (1 + seed / 100), 2 + grow * (step / 10 - 0.55) * (1 + seed / 99))
        ]
    ]


def test_a_unit_wanders_by_the_range_of_its_median_in_units_of_its_width():
    percentiles = [[[m - w], [m], [m + w]] for m, w in ((0.0, 1.0), (3.0, 2.0), (-1.0, 3.0))]
    assert figure1.wandered(percentiles) == pytest.approx([4 / 4])
    assert figure1.ranged(percentiles) == pytest.approx([4 / 4])


def test_figure_1_holds_and_fails():
    at = {"sd": 0.1, "lr": 0.1}
    moving, still = {"wander": 3.0, "grow": 1.0}, {"wander": 0.5, "grow": 0.1}
    none, batch = {"norm": "none", **at}, {"norm": "batch", **at}
    better = [r | {"accuracy": r["accuracy"] + 0.01} for r in flowing(**still, **batch)]
    found = judged(figure1, flowing(**moving, **none) + better)
    assert [v.decision for v in found] == ["holds"] * 4
    assert [v.id for v in found] == [f"sd-0.1.{k}" for k in ("gain", "steps", "median", "width")]
    assert {v.kind for v in found} == {"literature"}
    assert found[2].effect == pytest.approx(6, rel=0.01)
    assert found[3].effect == pytest.approx(10, rel=0.01)
    worse = [r | {"accuracy": r["accuracy"] - 0.01} for r in flowing(**moving, **batch)]
    early = [r | {"accuracy": r["accuracy"] + 0.045} for r in flowing(**still, **none)]
    assert decisions(figure1, early + worse) == ["fails"] * 4


def test_a_start_that_is_not_the_papers_is_ours():
    rows = [
        r
        for norm in ("none", "batch")
        for sd, lr in ((1.0, 0.1), (0.1, 0.5))
        for r in flowing(1.0, 1.0, norm=norm, sd=sd, lr=lr)
    ]
    found = judged(figure1, rows)
    assert {v.kind for v in found} == {"ours"}
    assert {v.id.removesuffix(".gain") for v in found if "gain" in v.id} == {
        "sd-1",
        "sd-0.1.rate-0.5",
    }


# A2: rates and steps


def stable(**rates: float) -> list:
    """The largest stable rate of each norm, in three seeds."""
    return [
        {"kind": "largest", "measured": "largest rate", "norm": norm, "seed": seed}
        | {"lr": lr * (1 + 0.01 * seed), "edge": ""}
        for norm, lr in rates.items()
        for seed in range(3)
    ]


def course(there: int, height: float, **labels) -> list:
    """A net that is at `height` percent from step `there` on, measured every ten of 300 steps."""
    return [
        record
        for step in range(0, 310, 10)
        for record in ends(height if step >= there else 50, step=step, **labels)
    ]


def learned(batch: dict[int, int], height: float) -> list:
    """The baseline is at 95% after 280 steps; batch norm higher, after those of its factor."""
    return [
        *course(280, 95, measured="steps", norm="none", factor=0, lr=0.03),
        *(
            r
            for factor, there in batch.items()
            for r in course(there, height, measured="steps", norm="batch", factor=factor, lr=factor)
        ),
    ]


def test_speed_is_the_baselines_steps_over_those_of_batch_norm_to_the_same_accuracy():
    records = Records(learned({1: 140, 5: 20, 30: 310}, 96))
    assert learning_rate.speed(records, 1) == pytest.approx([2.0] * 3)
    assert learning_rate.speed(records, 5) == pytest.approx([14.0] * 3)
    assert learning_rate.speed(records, 30) == pytest.approx([280 / 300] * 3)  # never there


def test_higher_rates_hold_and_fail():
    fast = stable(none=0.1, batch=1.0, layer=0.3) + learned({1: 100, 5: 10, 30: 20}, 98)
    assert decisions(learning_rate, fast) == ["holds"] * 6
    assert [v.sized for v in judged(learning_rate, fast)] == ["holds", None, *["holds"] * 4]
    slow = stable(none=0.1, batch=0.09, layer=0.05) + learned({1: 310, 5: 310, 30: 310}, 94.9)
    assert decisions(learning_rate, slow) == ["fails"] * 6


def test_multiples_of_a_rate_are_found_again():
    multiples = {learning_rate.multiple(0.01, 30), learning_rate.multiple(0.1, 3), 0.3}
    assert multiples == {0.3}


def test_batch_norm_runs_at_multiples_of_the_chosen_rate_and_goes_on_after_a_stop(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", functools.partial(models.Mlp, widths=(8,)))
    small = {
        "dataset": "digits",
        "model": "tiny",
        "batch_size": 16,
        "steps": 4,
        "evaluations": 2,
        "seeds": 2,
    }
    config = dataclasses.replace(learning_rate.QUICK, **small, starts=(0.01, 0.1), tests=100)
    found = [
        f._replace(leaves=jax.device_get(f.leaves)) if isinstance(f, Checkpoint) else f
        for f in learning_rate.race(config)(None)
    ]
    records = Records(f for f in found if isinstance(f, dict))
    best = records.best_rate()
    rates = records.where(kind="evaluation").values("norm", "factor", "lr")
    expected = [("batch", factor, pytest.approx(best * factor)) for factor in (1, 5, 30)]
    assert rates == [("none", 0, best), *expected]
    at = [i for i, f in enumerate(found) if isinstance(f, Checkpoint)]
    assert len(at) == 2 * 2
    for i in at[::2]:  # within each net
        again = [f for f in learning_rate.race(config)(found[i]) if isinstance(f, dict)]
        assert again == [f for f in found[i + 1 :] if isinstance(f, dict)]


# A2: depth


@pytest.mark.parametrize(
    ("none", "batch", "expected"),
    [
        ([11] * 10, [96] * 10, ["holds", "holds"]),
        ([96] * 10, [97] * 10, ["fails", "holds"]),
        ([11] * 10, [80] * 10, ["holds", "fails"]),
        ([11] * 5 + [96] * 5, [96] * 10, ["undecided", "holds"]),  # of no use is their mean
    ],
)
def test_deep_sigmoids_hold_and_fail(none, batch, expected):
    records = [
        {"kind": "evaluation", "norm": norm, "depth": 5, "lr": 0.1, "seed": seed}
        | {"step": 100, "accuracy": accuracy / 100}
        for norm, each in (("none", none), ("batch", batch))
        for seed, accuracy in enumerate(each)
    ]
    screened = [{**r, "kind": "screening", "accuracy": 0.5} for r in records]
    assert decisions(deep_sigmoid, screened + records) == expected


# A8


def ablation(activation: str, neither: float, gain: float, bias: float) -> list:
    costs = {"both": 0.0, "neither": neither, "gain alone": gain, "bias alone": bias}
    return [
        r
        for variant, cost in costs.items()
        for r in ends(97 - cost, activation=activation, variant=variant, lr=0.1)
    ]


def test_gain_and_bias_hold_and_fail():
    needed = ablation("sigmoid", 1.0, 0.5, 0.1) + ablation("relu", 0.1, -0.1, 0.1)
    found = judged(gain_bias, needed)
    assert [v.decision for v in found] == ["holds"] * 6
    assert [v.sized for v in found] == ["holds", "holds", "fails", None, None, None]
    assert [v.kind for v in found] == ["ours"] * 5 + ["literature"]
    reverse = ablation("sigmoid", -0.1, -0.1, -1.0) + ablation("relu", 0.5, 0.5, 1.0)
    assert decisions(gain_bias, reverse) == ["fails"] * 6


def test_a_variant_has_the_parameters_that_its_name_says():
    for variant, (gain, bias) in gain_bias.VARIANTS.items():
        norm = nl.get("batch", use_gain=gain, use_bias=bias)
        params, _ = norm.init(nl.Site(jnp.ones((4, 3))))
        assert ((params.g is not None), (params.b is not None)) == (gain, bias), variant


# A9


@pytest.mark.parametrize(("after", "expected"), [(96, "holds"), (98, "fails")])
def test_placement_holds_and_fails(after, expected):
    records = [
        *ends(97, activation="relu", placement="before", lr=0.1),
        *ends(after, activation="relu", placement="after", lr=0.1),
        *ends(97, activation="sigmoid", placement="after", lr=0.1),
        *ends(after, activation="sigmoid", placement="before", lr=0.1),
    ]
    assert decisions(placement, records) == [expected] * 2


def dropped(none: dict[float, float], batch: dict[float, float]) -> list:
    return [
        r
        for norm, values in (("none", none), ("batch", batch))
        for share, accuracy in values.items()
        for labels in [{"norm": norm, "dropout": share}]
        for r in [tried(accuracy / 100, **labels), *ends(accuracy, **labels, lr=0.1)]
    ]


def tried(accuracy: float, **labels) -> dict:
    """The choice of a rate, with the accuracy on held-out images at the best."""
    return {
        "kind": "tuning",
        **labels,
        "lr": 0.1,
        "rates": [0.1, 1.0],
        "accuracies": [accuracy, None],
    }


def test_dropout_holds_and_fails():
    needless = dropped({0.0: 92, 0.2: 93, 0.5: 90}, {0.0: 94, 0.2: 93.9, 0.5: 90})
    assert decisions(dropout, needless) == ["holds"] * 3
    needed = dropped({0.0: 92, 0.2: 93, 0.5: 90}, {0.0: 92, 0.2: 93, 0.5: 94})
    assert decisions(dropout, needed) == ["fails"] * 3


def test_the_share_of_dropout_is_chosen_on_held_out_images():
    records = Records(dropped({0.0: 92, 0.2: 93, 0.5: 90}, {0.0: 94, 0.2: 90, 0.5: 93}))
    assert [dropout.best_share(records, norm) for norm in ("none", "batch")] == [0.2, 0.5]
    flattered = [r | {"accuracy": 0.99} if r.get("dropout") == 0.5 else r for r in records]
    assert dropout.best_share(Records(flattered), "none") == 0.2


def test_dropout_leaves_out_in_training_alone_and_keeps_the_mean():
    model = models.build("mlp", nl.get("none"), 3, widths=(64,), dropout=0.5)
    x = jnp.ones((5, 4))
    variables = model.init(jax.random.key(0), x, train=False)
    plain = models.build("mlp", nl.get("none"), 3, widths=(64,))
    assert jax.tree.structure(plain.init(jax.random.key(0), x, train=False)) == jax.tree.structure(
        variables
    )
    evaluated = model.apply(variables, x, train=False)
    np.testing.assert_array_equal(evaluated, plain.apply(variables, x, train=False))

    @jax.jit
    @jax.vmap
    def trained(key):
        rngs = {"dropout": key}
        return model.apply(variables, x, train=True, mutable=[models.STATE], rngs=rngs)[0]

    draws = trained(jax.random.split(jax.random.key(1), 1000))
    spread = draws.std(0) / 1000**0.5
    assert (spread > 0).all()
    assert (abs(draws.mean(0) - evaluated) < 5 * spread).all()


def started(none: dict[float, float], batch: dict[float, float]) -> list:
    return [
        r
        for norm, values in (("none", none), ("batch", batch))
        for sd, accuracy in values.items()
        for r in ends(accuracy, norm=norm, sd=sd, activation="relu")
    ]


def test_initialization_holds_and_fails():
    robust = started({0.01: 11, 0.1: 96, 1.0: 90}, {0.01: 96, 0.1: 97, 1.0: 94})
    found = judged(initialization, robust)
    assert [v.decision for v in found] == ["holds"] * 3
    assert found[0].effect == pytest.approx(82, abs=0.1)
    assert all(v.untuned for v in found)
    fragile = started({0.01: 96, 0.1: 97, 1.0: 95}, {0.01: 95, 0.1: 97, 1.0: 90})
    assert decisions(initialization, fragile) == ["fails"] * 3


@pytest.mark.parametrize(
    ("accuracies", "target", "expected"),
    [
        ([80, 90], 90, 400),
        ([80, 90], 95, 400),  # more than there are: taken for all
        ([80, 90], 70, 100),
        ([80, 79, 90], 85, 400),
    ],
)
def test_the_examples_needed_are_read_off_in_the_logarithm(accuracies, target, expected):
    sizes = [100, 400] if len(accuracies) == 2 else [100, 200, 800]
    column = np.array(accuracies, float)[:, None]
    assert data_size.needed(column, sizes, np.array([target])) == pytest.approx([expected])


def sized(none: dict[int, float], batch: dict[int, float]) -> list:
    return [
        r
        for norm, values in (("none", none), ("batch", batch))
        for size, accuracy in values.items()
        for r in ends(accuracy, norm=norm, examples=size, lr=0.1)
    ]


def test_data_size_holds_and_fails():
    less = sized({500: 85, 1000: 90, 2000: 93}, {500: 90, 1000: 94, 2000: 95})
    assert decisions(data_size, less) == ["holds"] * 3
    more = sized({500: 85, 1000: 90, 2000: 93}, {500: 84, 1000: 89, 2000: 92.5})
    assert decisions(data_size, more) == ["fails"] * 3


def test_each_seed_has_examples_of_its_own_and_no_others():
    data = load("digits")
    config = dataclasses.replace(data_size.QUICK, batch_size=20, steps=9)
    rows = [data_size.few(seed, data, config, 60) for seed in (0, 0, 1)]
    assert [(row.shape, row.dtype) for row in rows] == [((9, 20), np.int32)] * 3
    assert [len(np.unique(row)) for row in rows] == [60] * 3  # three epochs of the same 60
    np.testing.assert_array_equal(rows[0], rows[1])
    assert len(np.intersect1d(rows[0], rows[2])) < 30
    assert max(row.max() for row in rows) > len(data.train_inputs) / 2


def test_optimizers_hold_and_fail():
    records = [
        r
        for optimizer, none, batch in (("sgd", 95, 96), ("adam", 90, 89))
        for norm, accuracy in (("none", none), ("batch", batch))
        for r in ends(accuracy, norm=norm, optimizer=optimizer, lr=0.1)
    ]
    assert decisions(optimizers, records) == ["holds", "holds", "fails", "fails"]


def shaped(norm: str, size: float, of_u: float, changed: float) -> list:
    """Records of a net whose pre-activation is so far from a Gaussian, and its input."""
    keys = ("distance", "skewness", "kurtosis")
    values = {k: size for k in keys} | {f"{k}_u": of_u for k in keys} | {"changed": changed}
    return [
        {**r, **{k: v * (1 + 0.01 * r["seed"]) for k, v in values.items()}}
        for r in ends(90, norm=norm, activation="relu")
    ]


def test_gaussian_holds_and_fails():
    near = shaped("batch", 0.2, 2.0, 1e-6) + shaped("none", 0.6, 2.0, 0.0)
    found = judged(gaussian, near)
    assert [v.decision for v in found] == ["holds"] * 6
    assert [v.source is not None for v in found] == [True, True, *[False] * 4]
    assert len({v.id for v in found}) == 6
    far = shaped("batch", 1.8, 0.4, 0.1) + shaped("none", 0.6, 0.3, 0.0)
    assert decisions(gaussian, far) == ["fails"] * 6


def test_the_shape_is_that_of_the_last_hidden_layer_and_a_norm_does_not_change_it():
    model = models.build("mlp", nl.get("batch"), 3, widths=(4, 5), activation=nn.relu)
    x = jnp.asarray(np.random.default_rng(0).standard_exponential((200, 6)), jnp.float32)
    params, state = models.split(model.init(jax.random.key(0), x, train=False))
    net = Net(model, params, state, x, jnp.zeros(200, jnp.int32), jnp.float32(0.1))
    found = gaussian.shape(net)
    z = np.asarray(net.activations(train=True)["Normed_1"].z, np.float64)
    u = (z - z.mean(0)) / z.std(0)
    assert found["skewness"] == pytest.approx(np.median(abs((u**3).mean(0))), rel=1e-3)
    assert found["kurtosis"] == pytest.approx(np.median(abs((u**4).mean(0) - 3)), rel=1e-3)
    assert found["changed"] < 1e-4
    below = np.asarray(net.activations(train=True)["Normed_0"].h, np.float64)
    below = (below - below.mean(0)) / below.std(0)
    assert found["skewness_u"] == pytest.approx(np.median(abs((below**3).mean(0))), rel=1e-3)
    assert found["distance_u"] > found["distance"]  # half of a distribution is cut off


def test_the_distance_from_a_gaussian_is_that_of_wasserstein():
    rng = np.random.default_rng(0)
    n = 20_000
    columns = [rng.normal(3, 7, n), rng.uniform(size=n), np.ones(n), rng.normal(size=n) > 0]
    found = gaussian.distance(jnp.asarray(np.stack(columns, 1), jnp.float32))
    # ‖F⁻¹ − Φ⁻¹‖² = 2 − 2·∫ F⁻¹ Φ⁻¹ of two of mean 0 and variance 1; of a constant it is 1.
    uniform = 2 - 2 * np.sqrt(12) / (2 * np.sqrt(np.pi))
    signs = 2 - 2 * np.sqrt(2 / np.pi)
    expected = [0, uniform**0.5, 1, signs**0.5]
    np.testing.assert_allclose(found, expected, atol=0.02)


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_conditions_are_cheap_and_have_labels_of_their_own(name):
    question = questions.require(name)
    for config in (question.QUICK, question.FULL):
        labels = [tuple(condition.labels.items()) for condition in question.run(config)]
        assert len(set(labels)) == len(labels) >= 2
    assert question.QUICK.seeds == question.FULL.seeds == 10


def example(name: str) -> list:
    """Records by hand of a question, of the last evaluation or of several."""
    both = ("none", "batch")
    return {
        "learning_rate": lambda: stable(none=0.1, batch=1.0) + learned({1: 100, 5: 10, 30: 20}, 98),
        "deep_sigmoid": lambda: [r for n in both for r in course(100, 95, norm=n, depth=5, lr=0.1)],
        "gain_bias": lambda: ablation("sigmoid", 1.0, 0.5, 0.5) + ablation("relu", 1.0, 0.5, 0.1),
        "placement": lambda: [
            r
            for place in ("before", "after")
            for r in course(100, 97, activation="relu", placement=place, lr=0.1)
        ],
        "figure1": lambda: [r for n in both for r in flowing(1.0, 1.0, norm=n, sd=0.1, lr=0.1)],
        "dropout": lambda: dropped({0.0: 92, 0.2: 93, 0.5: 90}, {0.0: 94, 0.2: 93.9, 0.5: 90}),
        "initialization": lambda: started({0.01: 11, 1.0: 90}, {0.01: 96, 1.0: 94}),
        "data_size": lambda: sized({500: 85, 1000: 90}, {500: 90, 1000: 94}),
        "optimizers": lambda: [r for n in both for r in ends(96, norm=n, optimizer="sgd", lr=0.1)],
        "gaussian": lambda: [r for n in both for r in shaped(n, 0.2, 2.0, 1e-6)],
    }[name]()


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_has_units_on_every_axis_that_shows_something(name):
    picture = questions.require(name).figure(Records(example(name)))
    shown = [axes for axes in picture.axes if axes.has_data()]
    assert shown
    assert all(axes.get_ylabel() for axes in shown)
    plt.close(picture)
