"""The questions of the batch: each verdict decides by what it says it does."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab.experiments import models
from normlab.experiments.data import load
from normlab.experiments.engine import Net, Records
from normlab.experiments.questions import (
    batch_size,
    batch_size_conv,
    domain,
    frozen,
    layer_batch,
    precise,
    renorm,
)
from tests.helpers import judged

SEEDS = range(3)


def evaluation(seed: int, accuracy: float, step: int = 1, **values: object) -> dict:
    """Of an accuracy in percent."""
    return {"kind": "evaluation", "seed": seed, "step": step, "accuracy": accuracy / 100, **values}


def decisions(verdicts) -> list[str]:
    return [v.decision for v in verdicts]


def by_batch(errors: dict[tuple[str, int, int], float]) -> list[dict]:
    """Records that end with these errors by norm, true batch and examples together."""
    return [
        evaluation(seed, 100 - error * (1 + seed / 100), norm=norm, batch=batch, together=together)
        for (norm, batch, together), error in errors.items()
        for seed in SEEDS
    ]


class TestBatchSize:
    def errors(self, four: float, two: float, layer: float) -> list[dict]:
        return by_batch(
            {
                ("batch", 128, 128): 2.0,
                ("batch", 128, 4): four,
                ("batch", 128, 2): two,
                ("batch", 4, 4): four,
                ("layer", 128, 128): 2.2,
                ("layer", 4, 4): layer,
            }
        )

    def test_it_holds_where_batch_norm_alone_gets_worse(self):
        found = judged(batch_size, self.errors(4.1, 45.0, 2.3))
        assert decisions(found) == ["holds"] * 4
        assert [v.sized for v in found] == ["fails", "holds", "fails", None]

    def test_it_fails_where_the_batch_does_not_matter(self):
        found = judged(batch_size, self.errors(1.9, 1.95, 3.0))
        assert decisions(found) == ["fails"] * 4

    def test_the_effect_is_the_rise_in_points(self):
        records = self.errors(4.1, 45.0, 2.3)
        rise = batch_size.rise(Records(records), "batch", batch=128, together=2)
        np.testing.assert_allclose(rise[:, 0], [43, 43.43, 43.86])

    def test_running_statistics_remember_as_many_examples_at_every_batch(self):
        site = nl.shapes(jnp.zeros((8, 3)), jnp.zeros((3, 5)))
        for batch in (128, 16, 4):
            state = batch_size.make("batch", batch, batch, 128).init(site)[1]
            assert batch / (1 - state.decay) == pytest.approx(1280)
            assert state.ddof == 1

    def test_every_condition_sees_as_many_examples(self):
        config = batch_size.QUICK
        assert all(config.batch_size % size == 0 for size in config.batches)


class TestBatchSizeConv:
    def records(self, four: float, two: float, loss: float, gap: float) -> list[dict]:
        rows = [("batch", 64, 11.0), ("batch", 4, four), ("batch", 2, two), ("batch", 1, 30.0)]
        return [
            evaluation(
                seed, 100 - error * (1 + seed / 100), norm=norm, together=together, train_loss=loss
            )
            for norm, together, error in [*rows, ("group", 1, 12.0), ("instance", 1, 12.5)]
            for seed in SEEDS
        ] + [{"kind": "layer", "norm": "both", "together": 1, "seed": s, "gap": gap} for s in SEEDS]

    def test_it_holds_where_two_images_are_too_few_and_four_are_enough(self):
        found = judged(batch_size_conv, self.records(11.4, 22.9, 0.4, 1e-7))
        assert decisions(found) == ["holds"] * 7

    def test_it_fails_where_four_are_too_few_and_two_are_enough(self):
        found = judged(batch_size_conv, self.records(15.0, 10.5, 2.3, 1e-3))
        assert decisions(found) == ["fails"] * 4 + ["holds"] + ["fails"] * 2

    def test_rates_that_were_tried_are_no_part_of_it(self):
        records = self.records(11.4, 22.9, 0.4, 1e-7)
        tried = [{**r, "kind": "screening", "train_loss": 9.0, "accuracy": 0.0} for r in records]
        assert repr(judged(batch_size_conv, tried[:-3] + records)) == repr(
            judged(batch_size_conv, records)
        )

    def test_batch_norm_over_one_image_is_instance_norm(self):
        found = list(batch_size_conv.compare(range(5, 7)))
        assert [r["seed"] for r in found] == [5, 6]
        assert all(0 <= r["gap"] < 1e-6 for r in found)

    def test_the_first_test_images_keep_their_labels(self):
        data = load("digits")
        fewer = batch_size_conv.tested(data, 50)
        np.testing.assert_array_equal(fewer.test_inputs, data.test_inputs[:50])
        np.testing.assert_array_equal(fewer.test_labels, data.test_labels[:50])
        assert fewer.train_inputs is data.train_inputs


class TestLayerBatch:
    @pytest.mark.parametrize(
        ("batch", "layer", "expected"),
        [(4.7, 2.3, ["holds"] * 5), (1.5, 3.5, ["fails"] * 5)],
    )
    def test_it_decides_by_the_rise_at_the_small_batch(self, batch, layer, expected):
        batch_norm = by_batch({("batch", 128, 128): 2.0, ("batch", 4, 4): batch})
        layer_norm = by_batch({("layer", 128, 128): 2.1, ("layer", 4, 4): layer})
        records = [r | {"layers": where} for where in ("hidden", "all") for r in batch_norm]
        records += [r | {"layers": "hidden"} for r in layer_norm]
        found = judged(layer_batch, records)
        assert decisions(found) == expected
        assert [v.kind for v in found] == ["literature", "ours", "ours", *["literature"] * 2]

    def test_the_running_statistics_remember_as_many_examples_at_either_batch(self, monkeypatch):
        made = []
        monkeypatch.setattr(layer_batch, "tuned", lambda *args, **options: made.append(args))
        labels = [condition.labels for condition in layer_batch.run(layer_batch.QUICK)]
        assert len(labels) == len(made) == 6
        site = nl.shapes(jnp.zeros((8, 3)), jnp.zeros((3, 5)))
        for told, (config, norm, rates) in zip(labels, made, strict=True):
            assert config.batch_size * config.steps == 128 * 234
            assert len(set(rates)) == 4
            if told["norm"] == "batch":
                state = norm.init(site)[1]
                assert config.batch_size / (1 - state.decay) == pytest.approx(1280)
                assert state.ddof == 1


class TestPrecise:
    def records(self, early: float, end: float) -> list[dict]:
        """Runs in which PreciseBN wins so many points, but at the last evaluation."""
        rows = [("constant", 0.1), ("constant", 3.0), ("falling", 3.0)]
        return [
            evaluation(seed, 90.0, step, average="debiased", decay=0.9, rate=rate, lr=lr)
            | {
                "with_average": 0.9,
                "with_precise": (90 + won + seed / 100) / 100,
                "with_batch": 0.89,
            }
            for rate, lr in rows
            for seed in SEEDS
            for step in (0, 30, 60)
            for won in [end if rate == "falling" and step == 60 else early]
        ]

    def test_it_holds_where_the_average_lags_and_then_does_not(self):
        assert decisions(judged(precise, self.records(2.0, 0.0))) == ["holds"] * 4

    def test_it_fails_where_the_average_never_lags_but_at_the_end(self):
        assert decisions(judged(precise, self.records(-1.0, 2.0))) == ["fails"] * 4

    def test_the_gain_is_a_mean_over_a_share_of_the_run(self):
        records = Records(self.records(2.0, 1.0))
        for first, expected in ((1, [1, 1.01, 1.02]), (0, [1.5, 1.51, 1.52])):
            found = precise.gain(records, first, 1, rate="falling", lr=3.0)
            np.testing.assert_allclose(found[:, 0], expected)

    def test_pixels_lie_between_minus_one_and_one(self):
        images = precise.floats(load("digits")).train_inputs
        assert (images.min(), images.max(), images.dtype) == (-1, 1, np.float32)

    def test_batches_are_whole(self):
        assert precise.batches(np.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


class TestFrozen:
    @pytest.mark.parametrize(
        ("few", "many", "expected"), [(1.0, 0.0, ["holds"] * 2), (-1.0, 1.0, ["fails"] * 2)]
    )
    def test_it_decides_by_the_points_won_at_the_end(self, few, many, expected):
        records = [
            evaluation(seed, 90 + seed / 100 + won * (then == "frozen"), together=together)
            | {"then": then}
            for together, won in ((2, few), (16, many))
            for then in ("both", "batch", "frozen")
            for seed in SEEDS
        ]
        records = [{k: r[k] for k in ("together", "then", *r)} for r in records]
        assert decisions(judged(frozen, records)) == expected

    def test_both_ends_go_on_from_the_same_net_and_part(self):
        config = dataclasses.replace(
            frozen.QUICK, dataset="digits", batch_size=8, steps=10, evaluations=5, seeds=2
        )
        found = list(frozen.measured(config, 2))
        steps = {
            then: [r["step"] for r in found if r["then"] == then]
            for then in ("both", "batch", "frozen")
        }
        assert steps == {"both": [2, 2, 4, 4, 6, 6, 8, 8], "batch": [10] * 2, "frozen": [10] * 2}
        batch, still = (
            [r["train_loss"] for r in found if r["then"] == t] for t in ("batch", "frozen")
        )
        assert batch != still
        ends = Records({"kind": "evaluation", **r} for r in found)
        assert ends.accuracy(then="frozen").shape[1] > 1  # the test images are counted


class TestDomain:
    @pytest.mark.parametrize(
        ("training", "own", "expected"),
        [
            (50.0, 85.0, ["holds", "holds", "holds"]),
            (50.0, 60.0, ["holds", "holds", "fails"]),
            (98.5, 97.6, ["fails", "fails", "fails"]),
        ],
    )
    def test_it_decides_by_what_is_lost_and_won_back(self, training, own, expected):
        def records(name: str) -> list[dict]:
            values = {"clean": 97.0, f"{name}_training": training, f"{name}_own": own}
            return [
                evaluation(seed, 97.0, **{k: (v + seed / 10) / 100 for k, v in values.items()})
                for seed in SEEDS
            ]

        assert decisions(judged(domain, records("blur"))) == expected
        other = {"holds": "fails", "fails": "holds"}  # of the noise half is more than is claimed
        assert decisions(judged(domain, records("noise"))) == [*expected[:2], other[expected[2]]]

    def test_an_affine_change_is_taken_back_or_not(self):
        for own, expected in ((97.0, "holds"), (90.0, "fails")):
            values = {"clean": 0.97, "contrast_training": 0.2, "contrast_own": own / 100}
            found = judged(domain, [evaluation(seed, 97.0, **values) for seed in SEEDS])
            assert decisions(found) == ["holds", expected]
            assert found[1].kind == "identity"

    @pytest.mark.parametrize("name", domain.DOMAINS)
    def test_a_domain_keeps_shapes_and_repeats(self, name):
        images = precise.floats(load("digits")).test_inputs
        changed = domain.DOMAINS[name](images)
        assert changed.shape == images.shape
        np.testing.assert_array_equal(changed, domain.DOMAINS[name](images))
        assert not np.allclose(changed, images)

    def test_statistics_of_the_domain_take_back_an_affine_change(self):
        config = dataclasses.replace(domain.QUICK, dataset="digits", domains=("contrast",))
        data = precise.floats(load("digits"))
        model = models.build("mlp", nl.get("batch"), data.classes)
        kernels = models.draw_kernels("mlp", data.classes, [0], data.train_inputs[:8])
        kernels = jax.tree.map(lambda v: v[0], kernels)
        variables = models.complete(model, kernels, data.train_inputs[:8])
        net = Net(model, *models.split(variables), None, None, None)
        found = domain.accuracies(config, net)
        assert abs(found["contrast_own"] - found["clean"]) < 0.01
        keys = {"clean", "contrast_training", "contrast_own"}
        assert set(found) == keys | {f"{key}_each" for key in keys}
        assert found["clean_each"].shape == data.test_labels.shape
        assert found["clean_each"].mean() == found["clean"]


class TestRenorm:
    def records(self, few: float, two: float) -> list[dict]:
        """Records by the accuracies of batch renorm over few examples and on two classes."""
        rows = [
            ("shuffled", "batch", 128, 98.0),
            ("shuffled", "batch", 4, 94.0),
            ("shuffled", "renorm", 4, few),
            ("two classes", "none", 128, 97.0),
            ("two classes", "batch", 128, 60.0),
            ("two classes", "renorm", 128, two),
        ]
        return [
            evaluation(
                seed,
                value + seed / 10 * (norm == "renorm"),
                rate="constant",
                drawn=drawn,
                norm=norm,
                together=together,
            )
            for drawn, norm, together, value in rows
            for seed in SEEDS
        ] + [{"kind": "layer", "seed": seed, "gap": 0.0} for seed in SEEDS]

    def test_it_holds_where_renormalization_mends(self):
        assert decisions(judged(renorm, self.records(97.0, 96.0))) == ["holds"] * 5

    def test_it_fails_where_it_does_not(self):
        found = decisions(judged(renorm, self.records(93.0, 50.0)))
        assert found == ["fails", "fails", "holds", "fails", "holds"]

    def test_a_part_is_won_back_where_it_is_more_than_a_quarter_of_the_loss(self):
        found = [judged(renorm, self.records(few, 96.0))[1] for few in (94.5, 95.3)]
        assert decisions(found) == ["fails", "holds"]
        assert found[1].effect == pytest.approx(1.4 - 4 / 3.7)

    def test_with_r_1_and_d_0_it_is_batch_norm(self):
        config = dataclasses.replace(renorm.QUICK, seeds=2)
        assert [r["gap"] for r in renorm.compare(config)] == [0.0] * 2

    def test_minibatches_hold_half_of_each_of_two_classes(self):
        data = load("digits")
        config = dataclasses.replace(renorm.QUICK, batch_size=20, steps=30)
        indices = renorm.two_classes(0, data, config)
        assert (indices.shape, indices.dtype) == ((30, 20), np.int32)
        for row in data.train_labels[indices]:
            assert sorted(np.unique(row, return_counts=True)[1]) == [10, 10]
        assert not np.array_equal(indices, renorm.two_classes(1, data, config))

    def test_the_limits_grow_over_the_papers_share_of_the_run(self):
        config = dataclasses.replace(renorm.QUICK, steps=160_000)
        site = nl.shapes(jnp.zeros((8, 3)), jnp.zeros((3, 5)))
        state = renorm.make(config, "renorm", 4).init(site)[1]
        assert [int(v) for v in (state.begin, state.d_end, state.r_end)] == [5000, 25000, 40000]
        assert (float(state.r_max), float(state.d_max), state.inner.decay) == (3, 5, 0.99)


@pytest.mark.parametrize("profile", ["QUICK", "FULL"])
@pytest.mark.parametrize(
    "question",
    [batch_size, batch_size_conv, frozen, layer_batch, precise, renorm],
    ids=lambda q: q.__name__,
)
def test_the_conditions_differ_and_need_no_data(question, profile):
    config = dataclasses.replace(getattr(question, profile), data_dir=Path("nowhere"))
    names = [condition.name for condition in question.run(config)]
    assert len(set(names)) == len(names) >= 3


def test_thresholds_are_those_of_the_claims():
    assert (batch_size.FOUR, batch_size.TWO, batch_size.STILL) == (3.7, 11.1, 0.5)
    assert (layer_batch.WORSE, layer_batch.STILL) == (1.5, 0.5)
    assert (batch_size_conv.FOUR, batch_size_conv.TWO) == (1.5, batch_size.TWO)
