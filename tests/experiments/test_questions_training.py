"""What is said of training and depth: each question decides rightly, and its pieces are right."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab.experiments.data import load
from normlab.experiments.engine import Config, Nets, Records, lanes, pooled
from normlab.experiments.engine.learn import masked
from normlab.experiments.models import conv
from normlab.experiments.questions import (
    adversarial,
    affine_alone,
    angular_equilibrium,
    edge_of_stability,
    ghost_batches,
    last_layer_norm,
    leakage,
    noisy_batch_norm,
    rank_collapse,
    spectral_reshaped,
)
from normlab.experiments.training.optimizers import optimizer
from tests.experiments.test_questions_exact import decisions, measured, seeds

SEEDS = range(3)


@pytest.fixture
def standard():
    """Types as optax's Adam wants them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def ends(accuracies, *, key="accuracy", step=9, **labels):
    """An evaluation at the end of each seed, with these accuracies in percent."""
    return [
        {"kind": "evaluation", **labels, "seed": seed, "step": step, key: value / 100}
        for seed, value in enumerate(accuracies)
    ]


# --- rank_collapse ---


def test_the_rank_of_a_random_net_falls_without_a_norm_alone():
    config = dataclasses.replace(
        rank_collapse.QUICK, widths=(16,), middle=16, depth=128, seeds=2, first_seed=0
    )
    records = Records(measured(rank_collapse, config, activation="linear"))
    assert {r["depth"] for r in records} == {2**k for k in range(8)}
    deepest = records.where(depth=128, share=0.1)
    assert deepest.by_seed("rank", norm="none").tolist() == [1, 1]
    assert (deepest.by_seed("rank", norm="batch") >= 3).all()
    first = records.where(depth=1, share=0.01)
    assert (first.by_seed("rank", norm="none") > 10).all()


def ranks(exponent, none=1.0):
    """Records of ranks that grow by a power of the width with batch norm, to any depth."""
    labels = itertools.product(SEEDS, ("linear", "relu"), ("none", "batch", "layer"), (16, 32, 64))
    return [
        {"kind": "rank", "seed": seed, "activation": activation, "norm": norm, "width": width}
        | {"depth": depth, "share": share}
        | {"rank": 2 * width**exponent * (1 + seed / 100) if norm == "batch" else none}
        for seed, activation, norm, width in labels
        if activation == "linear" or width == 32
        for depth in (1, 16, 32, 64, 256)
        for share in rank_collapse.SHARES
    ]


def test_rank_collapse_decides_by_the_limit_and_the_exponent():
    assert decisions(rank_collapse, ranks(0.6)) == ["holds"] * 7
    flat = decisions(rank_collapse, ranks(0.1, none=8.0))
    assert flat == ["fails", "holds", "fails", "fails", "fails", "fails", "holds"]


# --- angular_equilibrium ---


def test_the_angle_of_a_step_is_that_of_the_weights():
    config = dataclasses.replace(
        angular_equilibrium.QUICK,
        dataset="digits",
        steps=4,
        evaluations=4,
        pool=2,
        width=4,
        seeds=2,
        settings=((0.1, 0.01), (0.1, 0.01, 0.0, 10.0)),
    )
    records = Records(measured(angular_equilibrium, config))
    first = records.where(norm="batch", layer="w0", step=1)
    plain, longer = (first.by_seed("ratio", scale=c) for c in (1.0, 10.0))
    np.testing.assert_allclose(plain / longer, 100, rtol=0.02)  # lr/‖w‖²
    assert {r["norm"] for r in records.where(scale=10.0)} == {"batch"}


def turns(ratio=1.0, control=0.3, late=1.0):
    """Records of angles that settle at a share of the claimed ones, as the equations say."""
    steps = np.arange(100, 8001, 100)
    found = []
    for norm, settings in (("batch", angular_equilibrium.QUICK.settings), ("none", ())):
        rows = settings or angular_equilibrium.QUICK.settings[:1]
        for s in map(lambda s: angular_equilibrium.Setting(*s), rows):
            for seed, layer, step in itertools.product(SEEDS, angular_equilibrium.LAYERS, steps):
                free = layer == "v" or norm == "none"
                c, rate = 5 * s.scale, 4 * s.lr * s.decay
                course = 1 + (c**4 - 1) * np.exp(-rate * (step - 50) / late)
                value = control if free else ratio * course**-0.5
                found.append(
                    {"kind": "turn", "norm": norm, "seed": seed, **s._asdict(), "layer": layer}
                    | {"step": int(step), "ratio": value * (1 + seed / 1000)}
                    | {"length": course**0.25}
                )
    layer = [r | {"norm": "layer"} for r in found if r["norm"] == "batch" and r["scale"] == 1]
    return found + layer


def test_angular_equilibrium_decides_by_the_angle_and_the_course():
    assert set(decisions(angular_equilibrium, turns())) == {"holds"}
    off = decisions(angular_equilibrium, turns(ratio=1.5, control=1.2))
    assert off[:10] == ["fails"] * 10
    assert decisions(angular_equilibrium, turns(late=0.7))[-1] == "fails"


# --- leakage ---


def test_the_examples_of_the_loss_do_not_tell_their_label():
    keys, labels = jax.random.split(jax.random.key(0), 500), jnp.tile(jnp.array([1.0, -1.0]), 250)
    x = jax.vmap(leakage.batch)(keys, labels)
    carriers, others = (x[:, half, 0].mean(1) * labels for half in (slice(32, 64), slice(32)))
    assert abs(carriers.mean() - 4) < 0.05
    assert abs(others.mean()) < 0.05


def test_a_label_of_the_batch_is_told_with_its_statistics_alone(standard):
    config = dataclasses.replace(leakage.QUICK, synthetic_steps=100, seeds=2, norms=("batch",))
    records = Records(measured(leakage, config, norm="batch"))
    assert (records.by_seed("share", statistics="batch") > 0.9).all()
    np.testing.assert_allclose(records.by_seed("share", statistics="population"), 0.5, atol=0.05)


def test_both_orders_have_the_same_examples_in_each_batch():
    data = load("digits")
    config = dataclasses.replace(leakage.QUICK, batch_size=20, steps=5)
    alone, mixed = (leakage.by_class(m)(0, data, config) for m in (False, True))
    assert (np.sort(alone) == np.sort(mixed)).all()
    labels = data.train_labels[alone[0]].reshape(10, 2)
    assert (labels[:, 0] == labels[:, 1]).all()
    assert set(data.train_labels[mixed[0]][:10]) == set(range(10))


@pytest.mark.parametrize(("leaks", "expected"), [(True, "holds"), (False, "fails")])
def test_leakage_decides_by_what_is_told_with_which_statistics(leaks, expected):
    right = {("batch", "batch"): 0.99 if leaks else 0.5}
    told = [
        {"kind": "told", "norm": norm, "statistics": s, "seed": seed}
        | {"share": right.get((norm, s), 0.5 if leaks else 0.7) + v}
        for norm in ("batch", "layer")
        for s in ("batch", "population")
        for seed, v in enumerate(seeds(0.001))
    ]
    better, worse = ("mixed", "one class") if leaks else ("one class", "mixed")
    images = [*ends([80, 81, 82], together=better), *ends([70, 71, 72.5], together=worse)]
    losses = {better: 0.5, worse: 0.2}
    images = [r | {"train_loss": losses[r["together"]] + r["seed"] / 100} for r in images]
    assert set(decisions(leakage, told + images)) == {expected}


# --- spectral_reshaped ---


def test_the_norm_of_a_circular_convolution_is_that_of_its_matrix():
    w = np.random.default_rng(0).normal(size=(3, 3, 2, 3))
    eye = np.eye(2 * 25).reshape(-1, 5, 5, 2)
    padded = jnp.asarray(np.pad(eye, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap"))
    images = conv(padding="VALID")(padded, jnp.asarray(w))
    whole = np.asarray(images).reshape(len(eye), -1)
    expected = np.linalg.norm(whole, 2)
    assert spectral_reshaped.circular(w, 5) == pytest.approx(expected, rel=1e-5)
    assert spectral_reshaped.matrix(w) <= expected <= 3 * spectral_reshaped.matrix(w)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_power_iteration_finds_the_norm_of_a_layer(seed):
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 3, 2, 3)), jnp.float32)
    eye = jnp.eye(32).reshape(32, 4, 4, 2)
    values = np.linalg.svd(np.asarray(conv()(eye, w)).reshape(32, -1), compute_uv=False)
    found = float(spectral_reshaped.longest(w, jnp.zeros((1, 4, 4, 2))))
    nearly = values[values > 0.99 * values[0]]  # equal ones it cannot tell apart
    assert nearly.min() * (1 - 1e-5) < found < values[0] * (1 + 1e-5)


@pytest.mark.parametrize(("ratio", "expected"), [(2.0, "holds"), (0.5, "fails")])
def test_spectral_reshaped_decides_by_the_ratio(ratio, expected):
    wide = ratio > 1
    random = [
        {"kind": "random", "taps": taps, "seed": seed, "ratio": value * (1 + v)}
        for taps, value, spread in (
            ("gaussian", ratio, 1e-3),
            ("one", 1.0 if wide else 1.1, 1e-12),
            ("equal", 3.0 if wide else 2.9, 1e-12),
        )
        for seed, v in enumerate(seeds(spread))
    ]
    trained = [
        r | {"map": [m * (1 + r["seed"] / 1000)] * 2, "matrix": [1.0, 1.0]}
        for net, m in (
            *(("none", ratio), ("batch", ratio), ("spectral matrix", ratio)),
            ("spectral map", 1 / ratio),
        )
        for r in ends([80, 81, 82], net=net)
    ]
    assert set(decisions(spectral_reshaped, random + trained)) == {expected}


# --- noisy_batch_norm ---


def test_noise_is_new_at_every_step_and_nothing_at_inference():
    norm, rng = noisy_batch_norm.noisy(0.5), np.random.default_rng(0)
    a = [jnp.asarray(rng.normal(size=(512, 3)), jnp.float32) for _ in range(2)]
    params, state = norm.init(nl.Site(a[0]))
    drawn = []
    for x in a:
        h, after = norm.apply(params, state, nl.Site(x), train=True)
        still, same = nl.get("batch").apply(params, state, nl.Site(x), train=True)
        assert jax.tree.all(jax.tree.map(lambda u, v: (u == v).all(), after, same))
        drawn.append((h - still).mean(0))
    assert (jnp.abs(drawn[0] - drawn[1]) > 1e-3).all()
    calm = norm.apply(params, state, nl.Site(a[0]), train=False)[0]
    assert (calm == nl.get("batch").apply(params, state, nl.Site(a[0]), train=False)[0]).all()


@pytest.mark.parametrize(("helps", "expected"), [(True, "holds"), (False, "fails")])
def test_noisy_batch_norm_decides_by_stillness_and_accuracy(helps, expected):
    accuracy = {"none": [90, 91, 92], "batch": [95, 96, 97.5], "noise 0.5": [95.2, 95.9, 97.4]}
    if not helps:
        accuracy = {"none": [98, 99, 99.5], "batch": [95, 96, 97], "noise 0.5": [80, 81, 82]}
    moves = {"none": 0.1, "batch": 0.2, "noise 0.5": 0.4 if helps else 0.05}
    records = [
        r | {"moved": moves[norm] * (1 + r["seed"] / 100), "shift": moves[norm]}
        for norm, values in accuracy.items()
        for r in ends(values, key="still", norm=norm)
    ]
    assert set(decisions(noisy_batch_norm, records)) == {expected}


# --- last_layer_norm ---


@pytest.mark.parametrize(("loss", "right"), [(0.4, True), (2.3, False), (None, False)])
def test_a_rate_is_stable_if_the_net_learns(loss, right):
    assert last_layer_norm.stable({"train_loss": loss, "diverged": None}) == right
    assert not last_layer_norm.stable({"train_loss": loss, "diverged": 3})


@pytest.mark.parametrize(
    ("batch", "last", "expected"), [(10.0, 9.0, "holds"), (0.1, 0.05, "fails")]
)
def test_last_layer_norm_decides_by_the_rates(batch, last, expected):
    near = [0, 0.1, -0.1] if batch > 1 else [3, 3.1, 3.3]
    records = [
        *ends([95, 96, 97], part="accuracy", norm="none"),
        *ends(np.add([95, 96, 97], near), part="accuracy", norm="batch"),
        *(
            {"kind": "largest", "norm": norm, "seed": seed, "lr": lr * (1 + seed / 100)}
            for norm, lr in (("none", 1.0), ("last layer", last), ("batch", batch))
            for seed in SEEDS
        ),
    ]
    assert set(decisions(last_layer_norm, records)) == {expected}


# --- affine_alone ---


@pytest.mark.parametrize(
    ("trained", "most"), [("γ, β", (0, 0, 12)), ("as many weights", (0, 12, 0))]
)
def test_what_is_not_chosen_stays_as_it_was_drawn(trained, most, standard):
    config = Config(dataset="digits", seeds=2, optimizer="adam", batch_size=16)
    options = {"widths": (6,), "activation": jax.nn.relu, "only": affine_alone.CHOICES[trained]}
    rows = lanes(config)
    nets = Nets(config, nl.get("batch"), load("digits"), rows, **options)
    trainer, state = nets.trainer, nets.start(rows)
    before = jax.device_get(state.params)
    after, _ = trainer.train(state, np.arange(3 * 2 * 16).reshape(3, 2, 16))
    moved = jax.tree.map(lambda a, b: (a != b).sum() / 2, before, jax.device_get(after.params))
    hidden = moved["Normed_0"]
    found = [sum(map(float, jax.tree.leaves(v))) for v in (moved["Dense_0"], hidden["kernel"])]
    found.append(sum(map(float, jax.tree.leaves(hidden["norm"]))))
    assert all(n <= m for n, m in zip(found, most, strict=True))
    assert sum(found) > 4  # the weights of dark pixels have no gradient


def test_as_many_weights_are_chosen_as_there_are_gains_and_biases():
    rng = np.random.default_rng(0)
    layer = {"norm": nl.Affine(jnp.ones(5), jnp.zeros(5))}
    one, two = (
        affine_alone.weights(
            {"a": layer | {"kernel": jnp.asarray(rng.normal(size=(8, 5)))}, "b": {"kernel": w}}
        )
        for w in jnp.ones((2, 5, 3))
    )
    assert one["a"]["kernel"].sum() == two["a"]["kernel"].sum() == 10
    assert (one["a"]["kernel"] != two["a"]["kernel"]).any()  # each draw of kernels its own
    assert one["b"]["kernel"].sum() == 0
    assert not any(v.any() for v in jax.tree.leaves(one["a"]["norm"]))


def test_a_masked_optimizer_changes_what_it_may():
    make = masked(optimizer("momentum", 10), lambda params: {"a": 1.0, "b": jnp.array([0.0, 1.0])})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = make(0.1).init(params)
    updates, _ = make(0.1).update(params, state, params)
    np.testing.assert_allclose(updates["a"], -0.1)
    np.testing.assert_allclose(updates["b"], [0, -0.1])


@pytest.mark.parametrize(("mine", "expected"), [([80, 81, 82], "holds"), ([30, 31, 32], "fails")])
def test_affine_alone_decides_by_the_accuracy(mine, expected):
    accuracy = {"γ, β": mine, "as many weights": [50, 51, 52.5], "output layer": [60, 61, 62.5]}
    records = [
        r
        for depth in (4, 12)
        for trained, values in accuracy.items()
        for r in ends(values, trained=trained, depth=depth)
    ]
    assert set(decisions(affine_alone, records)) == {expected}


# --- edge_of_stability ---


def test_full_batch_descent_is_followed_to_the_sharpness(monkeypatch):
    config = dataclasses.replace(
        edge_of_stability.QUICK,
        dataset="digits",
        steps=6,
        evaluations=2,
        examples=50,
        pool=2,
        width=4,
        seeds=2,
    )
    records = Records(measured(edge_of_stability, config, lr=config.rates[0]))
    assert records.values("step") == [0, 3, 6]
    for norm in ("none", "batch"):
        here = records.where(norm=norm)
        assert (here.by_seed("loss", step=6) < here.by_seed("loss", step=0)).all()
        assert (here.by_seed("edge", step=0) > 0).all()
        assert (here.by_seed("residual") < 0.1 * here.by_seed("edge")).all()


@pytest.mark.parametrize(("edge", "expected"), [(1.05, "holds"), (2.0, "fails")])
def test_edge_of_stability_decides_by_the_median_of_the_last_half(edge, expected):
    records = [
        {"kind": "edge", "norm": norm, "lr": 0.1, "seed": seed, "step": step}
        | {"edge": (edge if step else edge / 4 + (edge > 1.5)) * (1 + seed / 100)}
        for norm in ("none", "batch")
        for seed in SEEDS
        for step in (0, 10, 20)
    ]
    assert set(decisions(edge_of_stability, records)) == {expected}


# --- ghost_batches ---


def test_a_seed_has_images_of_its_own():
    data = load("digits")
    config = dataclasses.replace(ghost_batches.QUICK, examples=100, batch_size=20, steps=10)
    one, two = (ghost_batches.some(seed, data, config) for seed in (0, 1))
    assert one.shape == (10, 20)
    assert len(np.unique(one)) == 100
    assert set(np.unique(one)) != set(np.unique(two))


def test_ghost_batches_decides_by_the_share_of_the_gap():
    small, large = ends([90, 91, 92], batches="small"), ends([80, 81, 82.1], batches="large")
    for ghosts, expected in ((85, ["holds"] * 3), (81, ["holds", "holds", "fails"])):
        here = ends([ghosts, ghosts + 1, ghosts + 2.05], batches="ghosts")
        assert decisions(ghost_batches, [*small, *large, *here]) == expected


# --- adversarial ---


def test_the_attack_finds_the_worst_of_a_linear_net():
    w = jnp.array([[1.0, -1.0], [2.0, -2.0], [-0.5, 0.5]])
    x, y = jnp.full((4, 3), 0.5), jnp.array([0, 0, 1, 1])

    def margin(x):
        return adversarial.margins(x @ w, y)

    expected = margin(x) - 0.1 * jnp.abs(w[:, 0] - w[:, 1]).sum()
    np.testing.assert_allclose(adversarial.attack(margin, x, 0.1), expected, rtol=1e-5)
    assert (margin(x) > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("fooled", "expected"), [(True, "holds"), (False, "fails")])
def test_adversarial_decides_where_nets_are_next_to_the_accuracy(fooled, expected):
    records = []
    for norm, lost in (("none", 0), ("batch", 20 if fooled else -20)):
        there = 80.5 if norm == "none" or fooled else 84.0
        for step, accuracy in ((3, 70.0), (5, there), (9, 90.0)):
            keys = (f"{what} {size:g}" for what in ("attack", "noise") for size in (0.1, 0.2))
            values = {key: 0.5 - lost / 100 for key in keys}
            values["attack 0.3"] = 0.01 if fooled else 0.2
            found = ends([accuracy] * 3, norm=norm, step=step)
            records += [
                r | {k: v + r["seed"] / 1000 + (step != 5) for k, v in values.items()}
                for r in found
            ]
    assert set(decisions(adversarial, records)) == {expected}


def test_pooled_images_are_means():
    data = load("digits")
    half = pooled(data, 2)
    assert half.train_inputs.shape[1:] == (4, 4, 1)
    assert half.train_inputs.dtype == data.train_inputs.dtype
    expected = data.train_inputs[3, 2:4, 4:6, 0].astype(float).mean().round()
    assert half.train_inputs[3, 1, 2, 0] == expected
    assert pooled(data, 3).test_inputs.shape[1:] == (2, 2, 1)
