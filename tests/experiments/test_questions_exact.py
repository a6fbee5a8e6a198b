"""What is exact about normalization: each question decides rightly, and its pieces are right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab.experiments.engine import Checkpoint, Config, Record, Records
from normlab.experiments.engine.records import DRAWS
from normlab.experiments.questions import (
    backward,
    batch_one,
    covariate_shift,
    gradient_bound,
    identity,
    ignored_gradient,
    inference,
    invariances,
    mean_field,
    scale_invariance,
)
from tests.cases import NAMES
from tests.helpers import judged


def measured(question, config: Config, **chosen) -> list[Record]:
    """The records of the conditions with these labels, of one process."""
    return [
        {**condition.labels, **record}
        for condition in question.run(config)
        if chosen.items() <= condition.labels.items()
        for record in condition.measure(None)
        if not isinstance(record, Checkpoint)
    ]


def decisions(question, records) -> list[str]:
    return [v.decision for v in judged(question, records)]


def tiny(question, **fields) -> Config:
    fields = {"seeds": 2, **fields}
    return dataclasses.replace(question.QUICK, **fields)


def seeds(value: float, count: int = 3) -> list[float]:
    """A value for each seed, a little apart."""
    return [value * (1 + 1e-3 * seed) for seed in range(count)]


# The gradient of the mean.


def test_a_bias_whose_gradient_ignores_the_mean_grows_linearly_at_constant_loss():
    records = measured(ignored_gradient, tiny(ignored_gradient, steps=100, evaluations=10))
    assert decisions(ignored_gradient, records) == ["holds"] * 3


@pytest.mark.parametrize(
    ("growth", "loss", "rest", "expected"),
    [
        (10.0, 0.0, 0.0, ["holds"] * 3),
        (3.2, 0.1, 1.0, ["fails"] * 3),
    ],
)
def test_ignored_gradient_decides_by_growth_and_loss(growth, loss, rest, expected):
    records = [
        {"condition": name, "kind": "step", "seed": seed, "step": step}
        | {"b": b * (growth if step == 100 else 1.0), "loss": 1 + loss * (step == 100)}
        for name, b in (("ignored", -2.0), ("whole", rest))
        for seed, b in enumerate(seeds(b))
        for step in (0, 10, 100)
    ]
    assert decisions(ignored_gradient, records) == expected


# The backward pass.


def test_the_papers_backward_pass_is_autodiff_and_differences():
    assert decisions(backward, measured(backward, tiny(backward, scales=(100.0,)))) == ["holds"] * 4


def test_the_papers_equations_know_the_gain():
    """The gradient by x is proportional to γ, those by γ and β do not see it."""
    rng = np.random.default_rng(0)
    x, dy, g = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)), rng.normal(size=3)
    one, other = (backward.by_hand(x, dy, v, 1e-5) for v in (np.ones(3), g))
    np.testing.assert_allclose(other[0], g * one[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(other[1:], one[1:])


def test_central_differences_of_a_quadratic_are_exact():
    x, y = np.array([1.0, -2.0]), np.array([[3.0]])
    by_x, by_y = backward.central(lambda x, y: float((x**2).sum() * y[0, 0]), (x, y))
    np.testing.assert_allclose(by_x, 6 * x, rtol=1e-9)
    np.testing.assert_allclose(by_y, [[5.0]], rtol=1e-9)


@pytest.mark.parametrize(("error", "expected"), [(1e-12, "holds"), (1e-3, "fails")])
def test_backward_decides_by_the_error_at_the_smallest_epsilon(error, expected):
    records = [
        {"kind": "error", "statement": name, "seed": seed, "error": e}
        | ({} if name in ("autodiff", "differences") else {"eps": 1e-30})
        for name in backward.STATEMENTS
        for seed, e in enumerate(seeds(error))
    ]
    records += [r | {"eps": 1e-5, "error": 1.0} for r in records if "eps" in r]
    assert decisions(backward, records) == [expected] * 4


# Inference.


@pytest.mark.parametrize("layer", list(inference.LINEAR))
def test_the_library_keeps_the_papers_variance_and_folds(layer):
    config = tiny(inference, dataset="digits", batches=(4,), examples=400, channels=3, seeds=1)
    variance, fold = measured(inference, config, layer=layer)
    assert max(variance["library_error"], variance["mean_error"], fold["error"]) < 1e-12
    assert variance["plain"] < variance["corrected"]


def test_the_plain_variance_of_batches_of_m_is_short_by_one_mth(x64):
    a = jnp.asarray(np.random.default_rng(0).normal(size=(20_000, 1)))
    for m in (2, 5):
        found = {key: float(v) for key, v in inference.estimates(a, m).items()}
        assert abs(found["corrected"] - 1) < 0.02
        assert found["plain"] == pytest.approx(found["corrected"] * (m - 1) / m, rel=1e-12)


@pytest.mark.parametrize(
    ("dense", "conv", "error", "expected"),
    [(1.001, 0.99, 1e-14, "holds"), (0.75, 1.01, 1e-3, "fails")],
)
def test_inference_decides_by_ratios_and_errors(dense, conv, error, expected):
    records = [
        {"kind": "variance", "layer": layer, "seed": seed, "m": 4, "positions": 1}
        | {"corrected": (dense if layer == "dense" else conv) + seed * 1e-4}
        | {"mean_error": e, "library_error": e}
        for layer in inference.LINEAR
        for seed, e in enumerate(seeds(error))
    ] + [
        {"kind": "fold", "layer": layer, "seed": seed, "error": e}
        for layer in inference.LINEAR
        for seed, e in enumerate(seeds(error))
    ]
    found = judged(inference, records)
    assert [v.id for v in found] == ["dense.variance", "conv.variance", "mean", "library", "folded"]
    assert [v.decision for v in found] == [expected] * 5


def test_every_seed_draws_its_own_images(monkeypatch):
    seen = []
    monkeypatch.setattr(inference, "estimates", lambda a, m: seen.append(np.asarray(a)) or {})
    monkeypatch.setattr(inference, "folded", lambda *_: 0.0)
    monkeypatch.setattr(inference, "kernel", lambda *_: np.ones((64, 1)))
    config = tiny(inference, dataset="digits", batches=(4,), examples=20)
    measured(inference, config, layer="dense")
    assert len(seen) == 2
    assert set(seen[0].ravel()) != set(seen[1].ravel())


# A single example.


@pytest.mark.parametrize(
    ("alone", "moved", "batch", "expected"),
    [
        (2.0, 1e-7, {100: 2.5, 4: 25.0, 1: 90.0}, "holds"),
        (60.0, 0.5, {100: 30.0, 4: 1.0, 1: 2.0}, "fails"),
    ],
)
def test_batch_one_decides_by_the_error_alone_and_in_batches(alone, moved, batch, expected):
    population = {100: 2.0, 4: 2.0, 1: alone}
    records = [
        {"kind": "prediction", "statistics": name, "n": n, "seed": seed}
        | {"accuracy": 1 - e / 100, "moved": m, "apart": m}
        for name, errors in (("population", population), ("batch", batch))
        for n, error in errors.items()
        for seed, (e, m) in enumerate(zip(seeds(error), seeds(moved), strict=True))
    ]
    assert decisions(batch_one, records) == [expected] * 5


def test_examples_are_predicted_in_their_order_and_the_rest_is_left():
    images = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1)
    shifts = jnp.array([0.0, 10.0])
    z = batch_one.in_batches(lambda b, x: x.reshape(len(x), 1) + b, shifts, images, 3)
    assert z[..., 0].tolist() == [[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]]


@pytest.mark.slow
def test_a_trained_net_predicts_a_single_example():
    config = tiny(batch_one, dataset="digits", steps=300)
    records = Records(measured(batch_one, config))
    found = {(r["statistics"], r["n"]): r for r in records.where(seed=config.first_seed)}
    assert found["population", 1]["accuracy"] > 0.9
    assert found["population", 1]["moved"] < batch_one.SAME
    assert found["batch", 1]["apart"] == 0 < found["population", 1]["apart"]
    each = records.accuracy(kind="prediction", statistics="population", n=1)
    np.testing.assert_allclose(each[0, 0], 100 * found["population", 1]["accuracy"])
    assert each.shape == (config.seeds, 1 + DRAWS)
    identities = [v for v in judged(batch_one, records) if v.kind == "identity"]
    assert [v.decision for v in identities] == ["holds"] * 2


# The identity.


def test_a_gain_with_epsilon_is_the_identity_and_one_without_is_not():
    records = Records(measured(identity, tiny(identity, spreads=(1e-2,), channels=4)))
    assert decisions(identity, records) == ["holds"] * 2
    without = records.where(condition="γ = √Var").by_seed("error", statistics="batch")
    assert (without > 0.01).all()  # ε is a tenth of the variance


@pytest.mark.parametrize(
    ("exactly", "paper", "expected"), [(1e-15, 0.05, "holds"), (1e-3, 0.005, "fails")]
)
def test_identity_decides_by_both_gains(exactly, paper, expected):
    records = [
        {"kind": "error", "condition": f"γ = {name}", "statistics": statistics, "seed": seed}
        | {"sd": 1e-2, "error": e, "expected": 0.05 * e / exactly if name != "√Var" else 0.05}
        for name, error in zip(identity.GAINS, (exactly, paper), strict=True)
        for statistics in ("batch", "population")
        for seed, e in enumerate([error] * 3)
    ]
    assert decisions(identity, records) == [expected] * 2


# Invariances.


def test_norms_are_blind_to_what_they_declare_and_to_nothing_else():
    config = tiny(invariances, norms=("batch", "group", "centred_cosine"), seeds=3)
    found = judged(invariances, measured(invariances, config))
    assert [v.id for v in found] == ["batch.blind", "batch.sees", "others.blind", "others.sees"]
    assert [v.decision for v in found] == ["holds"] * 4
    assert [v.source is not None for v in found] == [True, True, False, False]
    assert "4 changes" in found[0].claim
    assert "2 other changes" in found[1].claim  # of the six of table 1
    assert "10 changes" in found[2].claim


def test_a_constant_is_added_to_each_units_weights_or_to_each_example():
    x, w = np.zeros((8, 5)), np.zeros((5, 6))
    same, moved = invariances.moved(invariances.CONSTANTS[0], x, w, 0)
    assert same is x
    assert np.ptp(moved, axis=0).max() == 0 < np.ptp(moved, axis=1).min()
    moved, same = invariances.moved(invariances.CONSTANTS[1], x, w, 0)
    assert same is w
    assert np.ptp(moved, axis=1).max() == 0 < np.ptp(moved, axis=0).min()


def test_every_row_of_the_registry_is_asked():
    assert invariances.QUICK.norms == NAMES
    for norms in invariances.CENTRED.values():
        assert set(norms) <= set(nl.names())


@pytest.mark.parametrize(
    ("blind", "sees", "expected"),
    [(1e-15, 0.5, ["holds"] * 2), (0.1, 1e-12, ["fails"] * 2)],
)
def test_invariances_decides_by_the_worst_change(blind, sees, expected):
    records = [
        {"kind": "change", "norm": "layer", "seed": seed, "change": column}
        | {"invariant": invariant, "moved": m}
        for invariant, columns in ((True, "ab"), (False, "cd"))
        for column in columns
        for seed, m in enumerate(seeds(blind if invariant else sees))
    ]
    assert decisions(invariances, records) == expected


# Scale.


def test_longer_weights_at_an_adjusted_rate_are_the_same_function():
    config = tiny(
        scale_invariance, dataset="digits", steps=7, evaluations=2, scales=(0.5, 3.0), width=5
    )
    records = measured(scale_invariance, config)
    assert decisions(scale_invariance, records)[::2] == ["holds", "holds"]
    unchanged = [r for r in records if r["condition"] == "unchanged"]
    np.testing.assert_allclose(Records(unchanged).each_seed(scale_invariance.slope), -2, atol=1e-3)


@pytest.mark.parametrize(
    ("adjusted", "unchanged", "slope", "expected"),
    [
        (1e-13, 0.3, 2.0, ["holds"] * 3),
        (1e-3, 1e-4, 1.0, ["fails"] * 3),
    ],
)
def test_scale_invariance_decides_by_gaps_and_slopes(adjusted, unchanged, slope, expected):
    records = [
        {"kind": "step", "condition": name, "seed": seed, "scale": c, "step": step}
        | {"gap": gap if c != 1 else 0.0, "loss": 1.0}
        | {"turn": 0.1 * c**-power * (1 + seed) if step == 1 else None}
        for name, gap, power in (("adjusted", adjusted, 0.0), ("unchanged", unchanged, slope))
        for seed, gap in enumerate(seeds(gap))
        for c in (1.0, 0.3, 10.0)
        for step in (1, 200)
    ]
    assert decisions(scale_invariance, records) == expected


# Depth.


def test_the_gradient_explodes_with_batch_norm_and_not_with_layer_norm():
    config = tiny(mean_field, width=64, depth=16, norms=("layer",), batches=(32,), batch_size=32)
    grown = [r for r in measured(mean_field, config, activation="relu") if r["kind"] == "growth"]
    rates = {norm: [r["growth"] for r in grown if r["norm"] == norm] for norm in ("layer", "batch")}
    assert max(rates["layer"]) < 1.2 < 1.35 < min(rates["batch"])


def test_the_theory_of_batch_norm_alone_tends_to_no_growth():
    assert mean_field.theory("linear", 8) == pytest.approx(6 / 5)
    assert mean_field.theory("linear", 10**6) == pytest.approx(1, abs=1e-5)
    assert mean_field.theory("relu", 8) == pytest.approx(1.4669, abs=1e-4)


@pytest.mark.parametrize(
    ("relu", "linear", "layer", "expected"),
    [(1.46, 1.21, 1.0, "holds"), (1.2, 1.01, 1.3, "fails")],
)
def test_mean_field_decides_by_the_growth(relu, linear, layer, expected):
    cells = [
        ("batch", "relu", 128, relu),
        ("batch", "linear", 8, linear),
        ("batch", "linear", 128, 7.0),  # not judged
        ("layer", "relu", 128, layer),
    ]
    records = [
        {"kind": "growth", "norm": norm, "activation": activation, "batch": batch, "seed": seed}
        | {"growth": v}
        for norm, activation, batch, growth in cells
        for seed, v in enumerate(seeds(growth))
    ]
    assert decisions(mean_field, records) == [expected] * 3


# The bound on the gradient.


def test_the_gradient_bound_is_an_equality_at_one_layer():
    config = tiny(gradient_bound, dataset="digits", batch_size=16, width=4)
    records = measured(gradient_bound, config, condition="one layer")
    assert len(records) == 2 * 4
    for r in records:
        assert r["left"] == pytest.approx(r["right"], rel=1e-9, abs=1e-15)
        assert r["right"] <= r["whole"]


def test_what_batch_norm_takes_from_a_gradient_is_its_mean_and_its_part_along_the_output():
    with jax.enable_x64(True):
        y = jnp.asarray([[-1.0], [1.0], [-1.0], [1.0]])
        for v, left in ((jnp.ones((4, 1)), 0.0), (y, 0.0), (y[::-1] * y[:, :1] + 1, 0.0)):
            assert float(gradient_bound.reduced(v, y)[0]) == left
        v = jnp.asarray([[1.0], [1.0], [-1.0], [-1.0]])
        assert float(gradient_bound.reduced(v, y)[0]) == 4.0


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [(1.0, 2.0, ["holds", "holds"]), (1.1, 0.5, ["fails", "fails"])],
)
def test_gradient_bound_decides_by_both_sides(one, two, expected):
    records = [
        {"kind": "unit", "condition": name, "seed": seed, "unit": unit}
        | {"left": factor * (1 + 1e-3 * seed * (factor == 1.1)), "right": 1.0, "whole": 2.0}
        for name, factor in (("one layer", one), ("two nets", two))
        for seed in range(3)
        for unit in range(4)
    ]
    assert decisions(gradient_bound, records) == expected


# Covariate shift.


@pytest.mark.parametrize(
    ("first", "later", "length", "expected"),
    [
        (20.0, 1.2, 1.0, ["holds", "holds", "holds", "fails"]),
        (0.5, 0.4, 0.5, ["fails", "fails", "fails", "holds"]),
        (20.0, 0.4, 0.1, ["holds", "fails", "fails", "fails"]),  # the gradients are shorter, too
    ],
)
def test_covariate_shift_tells_the_first_step_from_the_others(first, later, length, expected):
    sizes = {("none", 0): 1.0, ("none", 5): 1.0, ("batch", 0): first, ("batch", 5): later}
    records = [
        {"kind": "evaluation", "norm": norm, "seed": seed, "step": step, "accuracy": 0.9}
        | {
            "distance": [size * v * 1e-3, size * v * 10.0],
            "length": [length if norm == "batch" else 1.0] * 2,
        }
        | {"cosine": [1.0, 0.5 + (norm == "batch") * (0.1 * v if size < 1 else -0.1 * v)]}
        for (norm, step), size in sizes.items()
        for seed, v in enumerate(seeds(1.0) if norm == "batch" else [1.0] * 3)
    ]
    assert decisions(covariate_shift, records) == expected


def test_a_net_that_diverged_has_no_covariate_shift():
    assert np.isnan(covariate_shift.distance({"distance": [1.0, None]}))
    assert covariate_shift.distance({"distance": [1.0, 100.0]}) == pytest.approx(10)


@pytest.mark.slow
def test_covariate_shift_is_measured_in_every_layer_but_the_first():
    config = tiny(covariate_shift, dataset="digits", steps=4, evaluations=1, widths=(8, 8))
    for r in measured(covariate_shift, config):
        assert len(r["distance"]) == len(r["cosine"]) == len(r["length"]) == 2
        assert r["norm"] in config.norms
        assert min(r["distance"]) > 0
