"""The questions of the other norms and of depth: verdicts decide rightly, measures measure."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab.experiments.data import load
from normlab.experiments.engine import Condition, Records
from normlab.experiments.questions import (
    cosine,
    landscape,
    reparametrization,
    vanishing,
    weight_norm,
    weight_norm_accuracy,
    whitening,
)
from tests.helpers import judged

SEEDS = range(3)
TINY = {"dataset": "digits", "seeds": 2}


def evaluations(accuracies, *, step=10, lr=0.1, **labels):
    """A final record for each accuracy in percent, one seed after the other."""
    return [
        {"kind": "evaluation", **labels, "lr": lr, "seed": seed, "step": step}
        | {"accuracy": accuracy / 100}
        for seed, accuracy in enumerate(accuracies)
    ]


def decisions(verdicts):
    return [v.decision for v in verdicts]


def measured(condition: Condition):
    """The records of a condition, with its labels."""
    found = condition.measure(None)
    return [{**condition.labels, **record} for record in found if isinstance(record, dict)]


def drawn(question, records):
    """Whether the figure has something in every panel."""
    picture = question.figure(Records(records))
    panels = [bool(axes.lines or axes.collections) for axes in picture.axes]
    picture.clear()
    return all(panels)


# --- weight_norm ---


def exact_weight(**values):
    right = {
        "gradients": 1e-15,
        "cosine": 1e-15,
        "length": 1e-15,
        "mean": 1e-7,
        "spread": 1e-7,
    }
    return [{"kind": "exact", "seed": seed, **right, **values} for seed in SEEDS]


def test_the_equations_of_weight_norm_hold_if_they_are_right_to_rounding():
    assert decisions(judged(weight_norm, exact_weight())) == ["holds"] * 5


@pytest.mark.parametrize(
    ("index", "key"), [*enumerate(("gradients", "cosine", "length", "mean", "spread"))]
)
def test_an_equation_of_weight_norm_that_is_off_fails_alone(index, key):
    found = decisions(judged(weight_norm, exact_weight(**{key: 1e-3})))
    assert found[index] == "fails"
    assert found.count("holds") == 4


def test_weight_norm_has_the_gradients_of_its_paper(x64):
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.standard_normal((8, 5))), jnp.asarray(rng.integers(0, 10, 8))
    params = {
        name: {
            "kernel": jnp.asarray(rng.standard_normal((k, 100))),
            "norm": nl.Affine(*(jnp.asarray(rng.uniform(0.5, 2, 100)) for _ in range(2))),
        }
        for name, k in zip(weight_norm.LAYERS, (5, 100, 100), strict=True)
    }
    last = jnp.asarray(rng.standard_normal((100, 10)))
    params["Dense_0"] = {"kernel": last, "bias": jnp.zeros(10)}
    wrong, cosine = jax.jit(weight_norm.gradients)(params, images, labels)
    assert float(wrong) < weight_norm.ROUNDING
    assert float(cosine) < weight_norm.ROUNDING


@pytest.mark.slow
def test_weight_norm_starts_and_grows_as_in_its_paper():
    config = dataclasses.replace(weight_norm.QUICK, **TINY, steps=4, evaluations=2)
    (condition,) = weight_norm.run(config)
    records = measured(condition)
    assert decisions(judged(weight_norm, records)) == ["holds"] * 5
    assert {r["layer"] for r in records if r["kind"] == "length"} == {
        "layer 1",
        "layer 2",
        "layer 3",
    }
    assert drawn(weight_norm, records)


# --- weight_norm_accuracy ---


def order(none, weight, batch, both):
    """Records of norms that end at these accuracies, and of the choice of their rate."""
    records = []
    names = ("none", "weight", "batch", "mean-only batch")
    for norm, value in zip(names, (none, weight, batch, both), strict=True):
        records += evaluations([value, value + 0.1, value - 0.1], norm=norm, lr=0.01)
        tried = evaluations([value - 1, value - 2], norm=norm, lr=0.1)
        records += [{**r, "kind": "screening"} for r in tried]
    return records


def test_the_papers_order_holds_and_the_opposite_fails():
    assert decisions(judged(weight_norm_accuracy, order(60, 60, 61, 62))) == ["holds"] * 3
    assert decisions(judged(weight_norm_accuracy, order(60, 62, 59, 58))) == ["fails"] * 3
    assert judged(weight_norm_accuracy, order(60, 60, 61, 62))[1].effect == pytest.approx(1.0)


def test_what_chose_the_rate_is_drawn_and_does_not_count():
    assert judged(weight_norm_accuracy, order(60, 60, 61, 62))[2].effect == pytest.approx(1.0)
    assert drawn(weight_norm_accuracy, order(60, 60, 61, 62))


def test_images_are_halved_by_the_mean_of_four_pixels():
    data = load("digits")
    images = weight_norm_accuracy.halved(data).train_inputs
    assert images.shape[1:] == (*(v // 2 for v in data.train_inputs.shape[1:3]), 1)
    assert images.mean() == pytest.approx(0, abs=1e-5)
    first, last = data.train_inputs[0, :2, :2].mean(), data.train_inputs[0, -2:, -2:].mean()
    assert images[0, 0, 0, 0] - images[0, -1, -1, 0] == pytest.approx((first - last) / 255)


def test_mean_only_batch_norm_takes_its_mean_from_the_batch_and_its_scale_from_the_weights():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((16, 5), (5, 3)))
    site = nl.Site(x @ w, x, w)
    norm = weight_norm_accuracy.mean_only()
    params, state = norm.init(site)
    h, after = norm.apply(params, state, site, train=True)
    own = params.g * (site.a - site.a.mean(0)) / jnp.linalg.norm(w, axis=0) + params.b
    np.testing.assert_allclose(h, own, atol=1e-6)
    np.testing.assert_allclose(h.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(h.std(0), 1, atol=1e-5)
    later, _ = norm.apply(params, after, site._replace(a=site.a[:1]), train=False)
    np.testing.assert_allclose(later, h[:1], atol=1e-6)  # the running mean is that batch's


# --- cosine ---


def compared(ours, data="mnist", after=None):
    """Records in which the rival that is best on held-out images ends at 98.0, and behind f so."""
    both = {"cosine": ours, "centred_cosine": ours}
    before = {"batch": 98.0, "layer": 98.5, "weight": 96.0} | both
    held_out = {"batch": 0.98, "layer": 0.97, "weight": 0.96, "cosine": 0.9, "centred_cosine": 0.9}
    rows = [("before", norm, v) for norm, v in before.items()]
    if after is not None:
        rows += [("after", "batch", after), ("after", "layer", after - 1)]
    found = []
    for place, norm, v in rows:
        labels = {"norm": norm, "data": data, "placement": place, "part": "training"}
        accuracies = [None, held_out[norm]]
        found += [{"kind": "tuning", **labels, "lr": 0.1, "accuracies": accuracies}]
        found += evaluations([v, v, v + 0.01], **labels)
    return found


def test_cosine_norm_is_measured_against_the_best_of_the_others():
    bounds = [{"kind": "exact", "seed": s, "largest": 1.0, "off_pearson": 1e-15} for s in SEEDS]
    records = bounds + compared(99.0, after=99.5) + compared(97.5, "cifar10")
    found = judged(cosine, records)
    assert decisions(found) == ["holds"] * 6 + ["fails"] * 2 + ["undecided"] * 2  # three seeds
    kinds = ["identity"] * 2 + ["literature"] * 2 + ["ours"] * 2 + ["literature"] * 2 + ["ours"] * 2
    assert [v.kind for v in found] == kinds
    assert [v.effect for v in found[8:]] == [1.0, 1.0]
    assert found[2].effect == pytest.approx(1.0)  # against batch norm, whatever layer norm's test
    assert found[4].effect == pytest.approx(-0.5)
    assert found[6].effect == pytest.approx(-0.5)
    assert not any(norm in v.id for v in found for norm in cosine.RIVALS["before"])
    assert drawn(cosine, records)
    better = judged(cosine, compared(99.0, after=98.5))[2:]
    assert decisions(better) == ["holds"] * 2 + ["fails"] * 2


def test_a_bound_that_is_passed_fails():
    off = [{"kind": "exact", "seed": s, "largest": 1.1, "off_pearson": 0.1} for s in SEEDS]
    assert decisions(judged(cosine, off)) == ["fails", "fails"]


def test_the_cosine_is_bounded_and_centred_it_is_pearsons_r():
    condition = next(cosine.run(dataclasses.replace(cosine.QUICK, **TINY)))
    records = measured(condition)
    assert max(r["largest"] for r in records) <= 1 + cosine.BOUND
    assert min(r["largest"] for r in records) > 0.9999  # the bound is reached
    assert max(r["off_pearson"] for r in records) < cosine.PEARSON


def test_both_data_sets_are_asked_for():
    assert cosine.QUICK.datasets == ("mnist", "cifar10")
    assert len({c.name for c in cosine.run(cosine.QUICK)}) == 1 + 7 + 5


# --- reparametrization ---


def shares(bare, both, *, white=1.0, start=0.0, slower=1.0):
    """Records of the four nets, with what the verdicts read."""
    records = [
        {"kind": "exact", "norm": norm, "seed": seed, "off": 1e-13}
        for norm in ("batch", "layer")
        for seed in SEEDS
    ]
    nets = {
        "none": (both, 0.2 * slower, 0.0),
        "batch": (both, 0.2, 0.0),
        "batch, no gain or bias": (bare, 0.2, 0.0),
        "batch, from the identity": (both, 0.2, start),
    }
    for (name, (linear, loss, off)), seed, step in itertools.product(nets.items(), SEEDS, (0, 10)):
        records.append(
            {
                "kind": "evaluation",
                "condition": name,
                "seed": seed,
                "step": step,
                "first_loss": 2.3 + off,
                "train_loss": loss,
                "linear": linear,
                "from_white": white,
            }
        )
    return records


def test_what_gain_and_bias_give_back():
    right = shares(0.68, 0.4)
    assert decisions(judged(reparametrization, right)) == ["holds"] * 6
    wrong = shares(0.5, 0.6, white=0.1, start=0.1, slower=2.0)
    assert decisions(judged(reparametrization, wrong)) == ["holds"] * 2 + ["fails"] * 4
    assert drawn(reparametrization, right)


def test_after_a_norm_the_mean_is_the_bias_and_the_variance_the_squared_gain():
    condition = next(reparametrization.run(dataclasses.replace(reparametrization.QUICK, **TINY)))
    records = measured(condition)
    assert {r["norm"] for r in records} == {"batch", "layer"}
    assert max(r["off"] for r in records) < reparametrization.OFF


def test_batch_norm_from_the_identity_is_the_identity_in_training_and_after():
    a = jnp.asarray(np.random.default_rng(0).normal(3, 2, (32, 4)), jnp.float32)
    norm = reparametrization.from_identity()
    params, state = norm.init(nl.Site(a))
    for train in (True, False):
        h, _ = norm.apply(params, state, nl.Site(a), train=train)
        np.testing.assert_allclose(h, a, atol=1e-5)


# --- vanishing ---


def factors(*, small=0.2, kept=1.0, grown=1.3, slope=0.2, weight=1.0):
    """Records with these factors per layer."""
    where = {("sigmoid", "none", "1"), ("sigmoid", "layer", "1"), ("tanh", "none", "old")}
    grows = {("tanh", "batch", "1"), ("ReLU", "batch", "1"), ("tanh", "none", "large")}
    records = []
    for labels in itertools.product(vanishing.F, vanishing.QUICK.norms, vanishing.GAINS):
        activation, norm, gain = labels
        as_batch = (activation, "batch" if norm == "weight" else norm, gain)
        factor = small if labels in where else grown if as_batch in grows else kept
        factor *= weight if norm == "weight" else 1
        records += [
            {"kind": "gradients", "activation": activation, "norm": norm, "gain": gain}
            | {"seed": seed, "factor": factor, "activation_factor": slope}
            | {"norms": [factor**2, factor, 1.0]}
            for seed in SEEDS
        ]
    return records


def test_gradients_shrink_stay_or_grow_by_their_factor_per_layer():
    found = judged(vanishing, factors())
    assert decisions(found) == ["holds"] * 14
    assert {v.kind for v in found} == {"identity", "literature", "ours"}
    wrong = judged(vanishing, factors(small=1.1, kept=1.5, grown=0.9, slope=1.1, weight=1.1))
    assert decisions(wrong) == ["fails"] * 14
    assert drawn(vanishing, factors())


def test_a_saturating_activation_only_shrinks_the_gradient():
    config = dataclasses.replace(
        vanishing.QUICK, **TINY, depth=4, width=16, batch_size=32, norms=("none",)
    )
    sigmoid, tanh, _ = (measured(c) for c in vanishing.run(config))
    assert max(r["activation_factor"] for r in sigmoid) <= 0.25
    assert max(r["activation_factor"] for r in tanh) <= 1
    first = sigmoid[0]
    assert first["factor"] == pytest.approx((first["norms"][0] / first["norms"][-1]) ** (1 / 3))
    assert first["factor"] < 0.5


# --- whitening ---


def learned(*, steps, zscore, batch, mixed, condition):
    """Records in which PCA and ZCA reach the target after `steps`, min-max data after 100."""
    records = []
    for seed in SEEDS:
        records += [
            {"kind": "condition", "method": m, "seed": seed, "number": n}
            for m, n in zip(whitening.METHODS, condition, strict=True)
        ]
    for norm, data in itertools.product(("none", "batch"), (*whitening.METHODS, "mixed")):
        there = {"minmax": 100, "mixed": 100, "zscore": zscore}.get(data, steps)
        there = batch if norm == "batch" and data in whitening.METHODS[1:] else there
        end = mixed[norm] if data == "mixed" else 95.0
        for step in (0, 10, 20, 50, 100, 200):
            value = end if step >= there else 50.0
            records += evaluations([value] * 3, data=data, norm=norm, step=step)
    return records


def test_whitening_is_judged_by_condition_steps_and_accuracy():
    condition = (1e5, 1e5, 1.0, 1.0)
    mixed = {"none": 60.0, "batch": 90.0}
    right = learned(steps=20, zscore=50, batch=100, mixed=mixed, condition=condition)
    assert decisions(judged(whitening, right)) == ["holds"] * 14
    mixed = {"none": 96.0, "batch": 97.0}
    wrong = learned(steps=200, zscore=10, batch=10, mixed=mixed, condition=condition[::-1])
    expected = ["fails"] * 4 + ["holds"] + ["fails"] * 8 + ["holds"]
    assert decisions(judged(whitening, wrong)) == expected
    assert drawn(whitening, right)


def test_zca_makes_the_condition_number_1_and_z_scores_do_not():
    condition = next(whitening.run(dataclasses.replace(whitening.QUICK, **TINY)))
    numbers = {r["method"]: r["number"] for r in measured(condition)}
    assert numbers["zca"] == pytest.approx(1, abs=0.01)
    assert numbers["pca"] == pytest.approx(1, abs=0.01)
    assert numbers["mixed"] > 100 * numbers["minmax"]
    assert numbers["zscore"] > 2


def test_mixed_features_are_pixels_and_thousands():
    data = load("digits")
    images = whitening.mixed(data).train_inputs
    plain = whitening.flat(data)[0]
    large = images.max(0) > 1
    assert large.sum() <= images.shape[1] // 2
    np.testing.assert_array_equal(images[:, ~large], plain[:, ~large])
    np.testing.assert_allclose(images[:, large], 1000 * plain[:, large])


# --- landscape ---


def along(width, beta):
    """Records of a net without a norm that is this much rougher."""
    return [
        {
            "kind": "evaluation",
            "norm": norm,
            "seed": seed,
            "step": step,
            "accuracy": 0.9,
            "lowest": 0.1,
            "highest": 0.1 + w,
            "width": w * (1000 if step == 0 else 1),
            "change": w,
            "beta": b,
        }
        for norm, w, b in (("none", width, beta), ("batch", 1.0, 1.0))
        for seed in SEEDS
        for step in (0, 5, 10)
    ]


def test_the_landscape_is_judged_by_width_and_beta_after_the_start():
    smooth, rough = (judged(landscape, along(*v)) for v in ((4.0, 2.0), (0.9, 0.5)))
    assert decisions(smooth) == ["holds"] * 3
    assert [v.sized for v in smooth] == ["holds", "holds", "fails"]
    assert decisions(rough) == ["fails"] * 3
    assert landscape.over_training(Records(along(4.0, 5.0)), "width", "none").tolist() == [4.0] * 3
    assert drawn(landscape, along(4.0, 5.0))
