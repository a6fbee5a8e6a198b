"""Where norms are used: measures give known answers, verdicts find what was planted."""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab.experiments.data import load
from normlab.experiments.engine import Records, plain
from normlab.experiments.questions import (
    decorrelated,
    fed_bn,
    fine_tuning,
    layer_conv,
    moving_batch,
    norm_share,
    online,
    recurrent,
    resolution,
    standardized_weights,
    surfaces,
    switchable,
    test_time,
    weight_norm_deep,
)
from tests.helpers import judged

SEEDS = range(3)


def ends(accuracy, *, key="accuracy", **labels):
    """The last evaluation of three seeds, which differ by hundredths of a point."""
    rng = np.random.default_rng(zlib.crc32(repr(labels).encode()))
    return [
        {"kind": "evaluation", **labels, "seed": seed, "step": 9}
        | {key: (accuracy + 0.01 * rng.uniform()) / 100}
        for seed in SEEDS
    ]


def decisions(question, records):
    """What became of each claim, by its id."""
    return {v.id: v.decision for v in judged(question, records)}


# --- test_time ---


def statistics(source, own, mixed, *, tent, error):
    """Records of one domain; `own` and `mixed` at each size."""
    values = {"clean_source": 97.0, "clean_64_0": 96.0, "noise_source": source, "noise_tent": tent}
    for size, batch, both in zip((1, 4, 16, 64), own, mixed, strict=True):
        values |= {f"noise_{size}_0": batch, f"noise_{size}_{test_time.PRIOR}": both}
        values |= {f"clean_{size}_0": 96.0}
    return [
        {"kind": "evaluation", "seed": seed, "step": 9}
        | {k: (v + 0.01 * seed) / 100 for k, v in values.items()}
        | {"noise_source_ece": 0.3 + 0.001 * seed, "noise_64_0_ece": error + 0.001 * seed}
        for seed in SEEDS
    ]


def test_statistics_of_the_test_batch_help_where_it_is_large():
    good = statistics(60, [10, 40, 75, 82], [62, 70, 79, 83], tent=83, error=0.1)
    assert set(decisions(test_time, good).values()) == {"holds"}
    bad = statistics(60, [10, 70, 55, 52], [58, 58, 54, 51], tent=50, error=0.4)
    found = decisions(test_time, bad)
    assert found.pop("clean.statistics") == "holds"
    assert set(found.values()) == {"fails"}


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    sure = jnp.log(jnp.array([[0.8, 0.2]] * 10))
    labels = jnp.array([0] * 6 + [1] * 4)
    assert test_time.calibration_error(sure, labels) == pytest.approx(0.2, abs=1e-6)
    assert test_time.calibration_error(sure, jnp.zeros(10, int)) == pytest.approx(0.2, abs=1e-6)


def tiny_net():
    from normlab.experiments.engine import Net

    config = dataclasses.replace(test_time.QUICK, dataset="digits", seeds=1, sizes=(4, 8))
    data = test_time.prepare(config, load("digits"))
    model, params, states = plain.begin(config, nl.get("batch"), data, widths=(8,))
    params, states = jax.tree.map(lambda v: v[0], (params, states))
    images = jnp.asarray(data.test_inputs[:16])
    return Net(model, params, states, images, jnp.asarray(data.test_labels[:16]), jnp.float32(0.1))


def test_a_prior_without_end_is_inference_and_none_is_the_batch():
    net = tiny_net()
    plainly = test_time.apply(net, net.params, net.norm_state, net.images)
    for size in (4, 8):
        found = test_time.predict(net, math.inf, net.images, size=size)
        np.testing.assert_allclose(found, plainly, rtol=1e-5, atol=1e-6)
    own = test_time.predict(net, 0, net.images, size=8)
    first = test_time.predict(net, 0, net.images[:8], size=8)
    np.testing.assert_allclose(own[:8], first, rtol=1e-5, atol=1e-6)
    assert abs(own - plainly).max() > 1e-2


def test_tent_predicts_before_it_learns():
    net = tiny_net()
    own = test_time.predict(net, 0, net.images, size=8)
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        found = test_time.tent(net, net.images, size=8)
    np.testing.assert_allclose(found[:8], own[:8], rtol=1e-5, atol=1e-6)
    assert 1e-4 < abs(found[8:] - own[8:]).max() < 0.1


# --- switchable ---


def weighed(weight_at, accuracy_at, batch_at):
    return [
        {**r, "norm": "switchable", "together": n, "shift_batch": w, "scale_batch": w}
        for n, w in weight_at.items()
        for r in ends(accuracy_at[n], norm="switchable", together=n)
    ] + [r for n, value in batch_at.items() for r in ends(value, norm="batch", together=n)]


def test_the_weight_of_batch_norm_falls_with_the_batch():
    falling = weighed({64: 0.5, 8: 0.4, 2: 0.3}, {64: 88, 8: 88, 2: 87}, {2: 80})
    assert set(decisions(switchable, falling).values()) == {"holds"}
    rising = weighed({64: 0.3, 8: 0.4, 2: 0.5}, {64: 88, 8: 88, 2: 79}, {2: 80})
    assert set(decisions(switchable, rising).values()) == {"fails"}


def test_switchable_norm_begins_with_all_alike():
    config = dataclasses.replace(switchable.QUICK, dataset="digits", seeds=1)
    data = standardized_weights.halved(load("digits"))
    model, params, states = plain.begin(config, nl.get("switchable"), data)
    net = tiny_net()._replace(model=model, params=jax.tree.map(lambda v: v[0], params))
    found = switchable.weights(net)
    assert len(found) == 6
    np.testing.assert_allclose(list(found.values()), 1 / 3, rtol=1e-6)
    assert states


# --- moving_batch ---


def test_what_moving_averages_win_back_is_a_share_of_what_was_lost():
    names = ("all", "few", "renorm", "forward", "mabn")

    def records(*values):
        return [
            {**r, "together": 32 if name == "all" else 2}
            for name, value in zip(names, values, strict=True)
            for r in ends(value, condition=name)
        ]

    good = decisions(moving_batch, records(97, 57, 80, 85, 92))
    assert set(good.values()) == {"holds"}
    less = decisions(moving_batch, records(97, 57, 80, 85, 88))  # 31 of 40
    assert less.pop("won-back") == "fails"
    assert set(less.values()) == {"holds"}


# --- standardized_weights, layer_conv ---


def test_halved_images_are_means_of_four_pixels():
    digits = load("digits")
    found = standardized_weights.halved(digits, tests=7)
    assert found.train_inputs.shape == (1437, 4, 4, 1)
    assert len(found.test_inputs) == len(found.test_labels) == 7
    four = digits.train_inputs[5, 2:4, 4:6].astype(float).mean() / 127.5 - 1
    assert found.train_inputs[5, 1, 2, 0] == pytest.approx(four, abs=1e-6)


def test_standardized_weights_are_decided_by_accuracy():
    def records(*values):
        names = ("batch", "batch over 2", "group", "group, standardized weights")
        pairs = zip(names, values, strict=True)
        return [r for name, value in pairs for r in ends(value, norm=name)]

    assert set(decisions(standardized_weights, records(90, 80, 88, 90)).values()) == {"holds"}
    assert set(decisions(standardized_weights, records(90, 89, 88, 87)).values()) == {"fails"}


@pytest.mark.parametrize(("layer", "rms", "decision"), [(85, 87, "holds"), (93, 92, "fails")])
def test_layer_norm_is_behind_batch_norm_in_a_conv_net(layer, rms, decision):
    values = {"none": 89, "batch": 90, "layer": layer, "rms": rms}
    records = [
        r for name, over in layer_conv.NORMS for r in ends(values[name], norm=name, over=over)
    ]
    assert set(decisions(layer_conv, records).values()) == {decision}


# --- decorrelated ---


def test_rounding_grows_in_the_published_iteration():
    a = decorrelated.correlated(0, 100.0).astype(np.float64)
    cov, centred = np.cov(a, rowvar=False, ddof=0), a - a.mean(0)
    assert np.linalg.cond(cov) == pytest.approx(100, rel=1e-3)

    def distance(dtype, steps):
        root = decorrelated.published(cov.astype(dtype), steps).astype(float)
        return decorrelated.spectrum(centred @ root)[1]

    assert distance(np.float64, 10) < 1e-3
    assert distance(np.float64, 20) > 1
    assert distance(np.float32, 15) > 1
    assert decorrelated.spectrum(centred @ np.linalg.inv(np.linalg.cholesky(cov)).T)[1] < 1e-9
    assert decorrelated.spectrum(np.full((4, 2), np.nan)) == (0.0, math.inf)


def test_white_is_found_white():
    config = dataclasses.replace(decorrelated.QUICK, seeds=2)
    found = Records(decorrelated.whiteness(config))
    assert (found.by_seed("distance", form="zca") < 1e-2).all()
    steps = [found.by_seed("distance", form="newton", newton_steps=n) for n in decorrelated.STEPS]
    assert (np.diff(steps, axis=0)[:5] < 0).all()


# --- recurrent ---


def test_training_and_test_pixels_are_in_one_order():
    digits = load("digits")
    found = recurrent.permuted(digits, 5)
    for before, after in ((digits.train_inputs, found.train_inputs), (digits.test_inputs[:5],) * 2):
        if after is before:
            after = found.test_inputs
        order = np.random.default_rng(0).permutation(64)
        flat = before.reshape(len(before), -1)[:, order] / 127.5 - 1
        np.testing.assert_allclose(after.reshape(len(after), -1), flat, atol=1e-6)


def test_the_gradient_at_the_last_step_is_that_of_the_readout():
    rng = np.random.default_rng(0)
    x, h0 = rng.normal(size=(3, 8)), rng.normal(size=(8, 4))
    w, readout = rng.normal(size=4), np.zeros((4, 10))
    readout[:, 0] = 1
    given = (jnp.asarray(v, jnp.float32) for v in (x, h0, w, np.eye(4), readout))
    labels = jnp.zeros(8, int)
    lengths = recurrent.through_time(*given, labels, 1.0)
    assert lengths.shape == (3,)
    h = jnp.asarray(h0, jnp.float32)
    for row in x:
        a = jnp.asarray(row[:, None] * w, jnp.float32) + h
        h = jnp.tanh(nl.batch_norm(a, train=True)[0])
    readout = jnp.asarray(readout, jnp.float32)
    wrong = jax.nn.softmax(h @ readout) - jax.nn.one_hot(labels, 10)
    expected = jnp.linalg.norm(wrong @ readout.T / 8)
    np.testing.assert_allclose(lengths[-1], expected, rtol=1e-4)


# --- fed_bn ---


def test_norms_stay_out_of_the_average():
    tree = {"layer": {"kernel": jnp.array([[0.0], [2.0]]), "norm": jnp.array([[1.0], [3.0]])}}
    found = fed_bn.average(tree, True, norms=False)["layer"]
    assert found["kernel"].tolist() == [[1.0], [1.0]]
    assert found["norm"].tolist() == [[1.0], [3.0]]
    assert fed_bn.average(tree, True, norms=True)["layer"]["norm"].tolist() == [[2.0], [2.0]]
    assert fed_bn.average(tree, False, norms=True)["layer"]["kernel"].tolist() == [[0.0], [2.0]]


def test_devices_have_images_of_their_own():
    config = dataclasses.replace(fed_bn.QUICK, images=20, batch_size=8, local=3, steps=10)
    rows = fed_bn.batches(config, 1000, 1)
    assert rows.shape == (4, 4, 3, 8)
    own = [set(rows[:, i].ravel()) for i in range(4)]
    assert all(len(one) <= 20 for one in own)
    assert len(set().union(*own)) == sum(map(len, own))
    assert all(len(set(batch)) == 8 for batch in rows.reshape(-1, 8))


def test_fed_bn_is_decided_by_the_mean_device():
    def records(**values):
        return [
            r
            for name, each in values.items()
            for kind, value in zip("ab", each, strict=True)
            for r in ends(value, condition=name.replace("_", " "), device=kind)
        ]

    good = {"own_statistics": (91, 91), "FedBN": (89, 95), "FedAvg": (90, 88), "alone": (85, 88)}
    assert set(decisions(fed_bn, records(**good)).values()) == {"holds"}
    bad = {"own_statistics": (89, 88), "FedBN": (85, 90), "FedAvg": (90, 88), "alone": (90, 89)}
    assert set(decisions(fed_bn, records(**bad)).values()) == {"fails"}


# --- online ---


def test_a_stream_has_each_example_once_and_a_scale_that_comes_back():
    assert sorted(online.drawn(10, 10, 0)) == list(range(10))
    config = dataclasses.replace(online.QUICK, period=20, steps=40)
    scales = online.scales_of(config)
    assert scales[[0, 20]] == pytest.approx([1, 1])
    assert scales.max() == pytest.approx(4)
    assert scales.min() == pytest.approx(1 / 4)


def test_the_first_half_of_a_stream_does_not_count():
    records = [
        {**r, "second_half": half}
        for stream, batch in (("drifting", 80), ("still", 88))
        for name, value in (("batch", batch), ("layer", 90))
        for half, counted in ((False, 10), (True, value))
        for r in ends(counted, norm=name, stream=stream)
    ]
    assert set(decisions(online, records).values()) == {"holds"}


# --- fine_tuning ---


@pytest.mark.parametrize(("frozen", "decision"), [(88, "holds"), (70, "fails")])
def test_frozen_norms_are_compared_with_live_ones(frozen, decision):
    values = {"before": 80, "live": 75, "precise": 78, "frozen": frozen}
    records = [r for name, value in values.items() for r in ends(value, condition=name)]
    assert set(decisions(fine_tuning, records).values()) == {decision}


# --- surfaces ---


def runs(norm, loss, length, barrier):
    """Ends of which seed `i` has `loss[i]` and `length[i]`, whatever the optimizer but its name."""
    return [
        {"kind": "end", "norm": norm, "seed": seed, "optimizer": name}
        | {"loss": loss[seed], "length": length[seed] * factor}
        for name, factor in (("sgd", 1.0), ("adam", 3.0))
        for seed in SEEDS
    ] + [
        {"kind": "line", "norm": norm, "seed": seed, "pair": "sgd, adam"}
        | {"barrier": barrier + 0.001 * seed}
        for seed in SEEDS
    ]


def test_runs_are_apart_by_their_distance_from_the_median():
    assert surfaces.apart(np.array([[0.0, 1.0, 3.0]])).tolist() == [1.0, 0.0, 2.0]
    wide, narrow = [1.0, 8.0, 1.0], [1.0, 1.0, 1.0]
    records = runs("none", wide, wide, 0.5) + runs("batch", narrow, narrow, 0.5)
    found = {v.id: v.effect for v in judged(surfaces, records)}
    assert found["spread.loss"] == pytest.approx(math.log(8) / 3)
    assert found["length.batch"] == pytest.approx(math.log(3) / 2)
    assert decisions(surfaces, records)["barrier.none"] == "holds"


# --- weight_norm_deep ---


def test_a_seed_trains_on_the_images_that_it_draws():
    config = dataclasses.replace(weight_norm_deep.QUICK, images=100, batch_size=20, steps=12)
    digits = load("digits")
    first, second = (weight_norm_deep.few(seed, digits, config) for seed in (0, 1))
    assert first.shape == (12, 20)
    assert len(set(first.ravel())) == 100
    assert sorted(first[:5].ravel()) == sorted(first[5:10].ravel())  # an epoch
    assert set(first.ravel()) != set(second.ravel())


def test_weight_norm_is_behind_in_the_deep_net():
    records = [
        {**r, "train_loss": 0.2 if norm == "batch" else 0.1}
        for norm, depth, value in (
            ("weight", 2, 85),
            ("batch", 2, 85),
            ("weight", 10, 80),
            ("batch", 10, 84),
        )
        for r in ends(value, norm=norm, depth=depth)
    ]
    assert set(decisions(weight_norm_deep, records).values()) == {"holds"}


# --- resolution ---


def test_images_are_cropped_and_resized():
    images = np.arange(2 * 8 * 8).reshape(2, 8, 8, 1).astype(np.uint8)
    same = resolution.whole(images, 8)
    np.testing.assert_allclose(same, images / 127.5 - 1, atol=1e-5)
    crop = resolution.resized(images, 4, jnp.array([[0.5, 0.0]] * 2), jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(crop, images[:, 4:, :4] / 127.5 - 1, atol=1e-5)


# --- norm_share ---


def test_the_share_of_a_norm_is_what_the_program_has_more():
    config = dataclasses.replace(norm_share.QUICK, depth=2, channels=8, side=4, batches=(2, 4))
    records = Records(
        {**r, "norm": name} for name in ("none", "batch") for r in norm_share.compiled(config, name)
    )
    assert (norm_share.share(records, "bytes", "none", 4) == 0).all()
    assert (norm_share.share(records, "bytes", "batch", 4) > 0).all()
    assert (norm_share.share(records, "bytes", "batch", 4) < 1).all()
