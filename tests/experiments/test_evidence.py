"""What stands behind a verdict: intervals, p-values, locked bounds, power, chosen rates."""

import dataclasses
import functools
import json
import math
import subprocess
import time
import types

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.power import TTestPower

import normlab as nl
from normlab.experiments import console as cli
from normlab.experiments import models, questions
from normlab.experiments.asking import thresholds
from normlab.experiments.asking.cost import count
from normlab.experiments.asking.kept import verdict_json
from normlab.experiments.asking.power import needed
from normlab.experiments.asking.verify import Effect, agree
from normlab.experiments.engine import (
    Checkpoint,
    Condition,
    Config,
    Records,
    Source,
    decide,
    decide_share,
    exact,
    learn,
    tuned,
)
from normlab.experiments.engine.learn import chosen
from normlab.experiments.engine.question import SCREENED
from normlab.experiments.engine.records import draws
from normlab.experiments.engine.verdict import adjusted
from normlab.experiments.rundir import RunError, packed, unpacked
from normlab.experiments.training.driver import Progress, drive
from normlab.experiments.training.tasks import Evaluation

EFFECTS = [0.9, 1.6, 0.4, 1.1, 0.7, 1.4]
TINY = Config(
    dataset="digits", model="tiny", batch_size=16, steps=6, evaluations=3, seeds=2, lr=0.5
)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", functools.partial(models.Mlp, widths=(8,)))


class TestP:
    @pytest.mark.parametrize("bound", [0.0, 0.5, 0.9, 1.4, 2.0])
    def test_it_is_that_of_students_test_on_two_sides(self, bound):
        found = decide("a", "", EFFECTS, at_least=bound)
        assert found.p == pytest.approx(scipy.stats.ttest_1samp(EFFECTS, bound).pvalue)

    @pytest.mark.parametrize("bounds", [(0.9, 1.2), (0.0, 2.0), (0.5, 1.5), (2, 3), (-1, 0.2)])
    def test_of_two_bounds_it_is_that_of_two_one_sided_tests(self, bounds):
        found = decide("a", "", EFFECTS, at_least=bounds[0], at_most=bounds[1])
        test = scipy.stats.ttest_1samp
        inside = max(
            test(EFFECTS, bounds[0], alternative="greater").pvalue,
            test(EFFECTS, bounds[1], alternative="less").pvalue,
        )
        outside = min(
            test(EFFECTS, bounds[0], alternative="less").pvalue,
            test(EFFECTS, bounds[1], alternative="greater").pvalue,
        )
        assert found.p == pytest.approx(min(1, 2 * min(inside, outside)))

    def test_it_agrees_with_the_decision(self):
        rng = np.random.default_rng(0)
        for _ in range(200):
            geometric = bool(rng.integers(2))
            effects = rng.lognormal(rng.normal(), 0.5, rng.integers(2, 12))
            bounds = dict(zip(("at_least", "at_most"), sorted(rng.lognormal(0, 1, 2)), strict=True))
            if rng.integers(2):
                del bounds[str(rng.choice(["at_least", "at_most"]))]
            found = decide("a", "", effects, geometric=geometric, **bounds)
            assert (found.p <= 0.05) == (found.decision != "undecided")

    def test_without_an_interval_there_is_none(self):
        assert math.isnan(decide("a", "", [1.0], at_least=0).p)
        assert math.isnan(decide("a", "", [1.0, math.nan], at_least=0).p)

    def test_families_are_adjusted_without_what_has_none(self):
        p = [0.01, math.nan, 0.04, 0.03]
        np.testing.assert_allclose(adjusted(p, "holm"), [0.03, math.nan, 0.06, 0.06])
        np.testing.assert_allclose(adjusted(p, "fdr_bh"), [0.03, math.nan, 0.04, 0.04])


class TestSize:
    @pytest.mark.parametrize(
        ("options", "sized"),
        [
            ({"at_least": 0, "size": 0.4}, "holds"),
            ({"at_least": 0, "size": 3.0}, "fails"),
            ({"at_least": 0, "size": 1.0}, "undecided"),
            ({"at_most": 2, "size": 1.9}, "holds"),
            ({"at_most": 2, "size": 0.3}, "fails"),
            ({"at_least": 0}, None),
        ],
    )
    def test_it_is_judged_beside_the_direction(self, options, sized):
        found = decide("a", "", EFFECTS, **options)
        assert (found.decision, found.sized) == ("holds", sized)

    def test_kinds_follow_from_what_is_said(self):
        source = Source("ioffe2015", "section 3")
        kinds = [
            decide("a", "", EFFECTS, at_least=0, **more).kind
            for more in ({}, {"source": source}, {"source": source, "exact": True})
        ]
        assert kinds == ["ours", "literature", "identity"]


class TestTestImages:
    def test_flags_come_back_as_they_were(self):
        flags = np.random.default_rng(0).random(1003) < 0.3
        np.testing.assert_array_equal(unpacked(packed(flags)), flags)

    @pytest.mark.parametrize(
        ("seed", "image", "both"), [(0.02, 0.5, 0.2), (0.0, 0.5, 0.5), (0.02, 0.0, 0.5)]
    )
    def test_the_interval_covers_the_effect_on_other_seeds_and_images(self, seed, image, both):
        """Nets whose difference has a part of the seed, of the image, and of the two."""
        rng, images, weights = np.random.default_rng(1), 400, draws(400)
        hits = 0
        for _ in range(200):
            d = rng.normal(0, seed, (10, 1)) + rng.normal(0, image, images)
            d = d + rng.normal(0, both, (10, images))
            found = decide("a", "", np.concatenate([d.mean(1)[:, None], d @ weights.T], axis=1))
            hits += found.low <= 0 <= found.high
        assert 0.9 <= hits / 200 <= 0.99

    def test_nets_that_differ_on_few_images_are_told_apart_by_their_own_spread(self):
        """All seeds alike: only the images are a matter of chance."""
        right = np.ones((4, 1000), bool)
        wrong = right.copy()
        wrong[:, :30] = False
        rows = [
            {"kind": "evaluation", "norm": name, "seed": i, "step": 1}
            | {"accuracy": float(each.mean()), "accuracy_each": packed(each)}
            for name, flags in (("a", right), ("b", wrong))
            for i, each in enumerate(flags)
        ]
        records = Records(rows)
        found = decide("x", "", records.accuracy(norm="a") - records.accuracy(norm="b"))
        assert found.images
        assert found.effect == pytest.approx(3)
        assert found.error == pytest.approx(100 * math.sqrt(0.03 * 0.97 / 1000), rel=0.1)
        assert found.error_images == pytest.approx(found.error)
        np.testing.assert_allclose(found.effects, 3)

    def test_training_says_at_its_end_which_images_were_right(self):
        found = [*run_of(tuned(TINY, nl.get("batch"), (0.1,)))]
        ends = Records(r for r in found if r["kind"] == "evaluation" and r["step"] == TINY.steps)
        assert all("accuracy_each" not in r for r in found if r not in ends)
        for record in ends:
            assert unpacked(record["accuracy_each"]).mean() == record["accuracy"]
        assert ends.accuracy().shape == (2, 501)


class TestShares:
    def test_the_interval_is_that_of_clopper_and_pearson(self):
        found = decide_share("a", "", [True] * 9 + [False], at_least=0.5)
        assert (found.low, found.high) == pytest.approx((0.55498, 0.99747), abs=1e-4)
        assert found.decision == "holds"
        assert found.p == pytest.approx(2 * 11 / 1024)

    @pytest.mark.parametrize("count", range(11))
    def test_p_agrees_with_the_decision(self, count):
        outcomes = [True] * count + [False] * (10 - count)
        for bounds in ({"at_least": 0.5}, {"at_most": 0.5}, {"at_least": 0.3, "at_most": 0.9}):
            found = decide_share("a", "", outcomes, **bounds)
            assert (found.p <= 0.05) == (found.decision != "undecided")


def run_of(measure, resume=None):
    """The records of a measure."""
    for found in measure(resume):
        if not isinstance(found, Checkpoint):
            yield found


def test_a_test_loss_that_is_not_finite_on_the_way_is_remembered():
    def evaluate(state):
        return Evaluation(np.array([np.nan if state == 2 else 1.0]), np.array([0.5]), {}, {}, {})

    def train(state, batches):
        return state + 1, np.zeros((1, 1))

    learner = types.SimpleNamespace(train=train, evaluate=evaluate)
    turns = [(step, None) for step in range(1, 5)]
    ends = [*drive(learner, Progress.start(0, 1), turns, evaluate=(2, 4).__contains__)]
    assert [at.evaluation is not None for at in ends] == [False, True, False, True]
    assert [at.diverged.item() for at in ends] == [-1, 2, 2, 2]
    assert ends[-1].records([{}])[0]["diverged"] == 2


class TestTuned:
    def test_rates_are_chosen_on_other_seeds_and_held_out_images(self):
        found = Records(run_of(tuned(TINY, nl.get("none"), (1e-6, 0.5, 1e-5))))
        screened = found.where(kind="screening")
        assert screened.values("seed") == [SCREENED, SCREENED + 1]
        assert screened.values("lr") == [1e-6, 0.5, 1e-5, 25_000.0, 1.2e9]  # 0.5 was an end
        [choice] = found.where(kind="tuning")
        assert (choice["lr"], choice["edge"]) == (0.5, "")
        assert choice["rates"] == screened.values("lr")
        assert len(choice["accuracies"]) == 5
        ends = found.where(kind="evaluation")
        assert (ends.values("lr"), ends.values("seed")) == ([0.5], [100, 101])
        assert found.best_rate() == 0.5

    def test_a_best_rate_that_is_still_an_end_is_told(self):
        found = Records(run_of(tuned(TINY, nl.get("batch"), (1e-4, 1e-3))))
        [choice] = found.where(kind="tuning")
        first, second = choice["accuracies"][:2]
        more = [1e-2, 0.1] if second > first else [1e-5, 1e-6]
        assert choice["rates"] == [1e-4, 1e-3, *more]
        end = {1e-6: "lowest", 0.1: "highest"}
        assert choice["edge"] == end.get(choice["lr"], "")

    def test_where_every_rate_diverges_lower_ones_are_tried(self):
        none = nl.get("none")
        found = Records(run_of(tuned(TINY, none, (1e8, 1e12), activation=jax.nn.relu)))
        [choice] = found.where(kind="tuning")
        assert choice["rates"] == [1e8, 1e12, 1e4, 1.0]
        assert choice["accuracies"][:2] == [None, None]
        assert choice["lr"] == 1.0

    def test_what_is_compared_has_no_part_in_the_choice(self):
        """The test labels are all wrong; the same rate is chosen."""

        def spoilt(data):
            return data._replace(test_labels=(data.test_labels + 1) % 10)

        rates = (0.01, 0.5)
        plain, other = (
            Records(run_of(tuned(TINY, nl.get("batch"), rates, **how))).where(kind="tuning")
            for how in ({}, {"prepare": spoilt})
        )
        assert plain == other

    def test_it_goes_on_at_the_rate_that_was_chosen(self):
        measure = tuned(TINY, nl.get("batch"), (0.01, 0.5))
        whole = [*run_of(measure)]
        made = (c for c in measure(None) if isinstance(c, Checkpoint))
        first = jax.device_get(next(made))  # the next step reuses its buffers
        rest = [*run_of(measure, first)]
        assert rest == whole[-len(rest) :]
        assert {r["kind"] for r in rest} == {"evaluation"}

    @pytest.mark.parametrize("first", [-1, SCREENED - 1, SCREENED, 2 * SCREENED])
    def test_seeds_that_rates_are_chosen_on_are_not_compared(self, first):
        with pytest.raises(RunError, match=f"--first-seed: got {first}; it must be 0 to 9998"):
            dataclasses.replace(TINY, first_seed=first)
        assert dataclasses.replace(TINY, first_seed=SCREENED - 2).each_seed[-1] == SCREENED - 1

    def test_a_rate_that_diverges_is_not_chosen(self):
        rows = [
            {"lr": lr, "seed": s, "accuracy": a, "diverged": 3 if (lr, s) == (1.0, 1) else None}
            for lr, a in ((0.1, 0.5), (0.3, 0.6), (1.0, 0.9))
            for s in (0, 1)
        ]
        found = chosen(rows, (0.1, 0.3, 1.0))
        assert (found["lr"], found["edge"]) == (0.3, "")
        assert found["accuracies"] == [0.5, 0.6, None]

    def test_where_every_rate_diverges_the_lowest_is_taken_and_is_an_end(self):
        rows = [
            {"lr": lr, "seed": 0, "accuracy": 0.1, "diverged": 1} for lr in (1.0, 10.0, 0.1, 0.01)
        ]
        found = chosen(rows, (1.0, 10.0, 0.1, 0.01))
        assert (found["lr"], found["edge"], found["accuracies"]) == (0.01, "lowest", [None] * 4)

    def test_a_text_is_tuned_on_its_validation_part(self):
        rows = [
            {"lr": lr, "seed": 0, "accuracy": 0.9, "validation_loss": v, "diverged": None}
            for lr, v in ((0.1, 2.0), (0.3, 1.5))
        ]
        found = chosen(rows, (0.1, 0.3))
        assert (found["lr"], found["edge"], found["losses"]) == (0.3, "highest", [2.0, 1.5])


class TestPower:
    @pytest.mark.parametrize(("mean", "sd"), [(0.5, 1.0), (0.2, 0.5), (-1.0, 1.2)])
    def test_it_is_that_of_the_t_test(self, mean, sd):
        noise = np.random.default_rng(0).normal(size=8)
        effects = mean + sd * (noise - noise.mean()) / noise.std(ddof=1)
        found = needed(decide("a", "", effects, at_least=0), 0.8)
        theirs = TTestPower().solve_power(abs(mean) / sd, alpha=0.05, power=0.8)
        assert found.seeds == math.ceil(theirs)

    def test_of_a_factor_it_is_that_of_the_logarithm(self):
        effects = np.exp(np.array(EFFECTS))
        geometric = needed(decide("a", "", effects, at_least=1, geometric=True), 0.8)
        assert geometric == needed(decide("a", "", EFFECTS, at_least=0), 0.8)

    def test_seeds_do_not_make_up_for_test_images(self):
        verdict = decide("a", "", EFFECTS, at_least=0)._replace(error_images=0.0)
        spread = verdict.error
        few = verdict._replace(error=math.hypot(spread, 0.9), error_images=0.9)
        assert needed(few, 0.8).seeds is None
        assert "test images" in needed(few, 0.8).why

    def test_of_shares_it_is_that_of_the_binomial(self):
        verdict = decide_share("a", "", [True] * 8 + [False] * 2, at_least=0.5)
        found = needed(verdict, 0.8).seeds
        rng = np.random.default_rng(0)
        decided = [
            decide_share("a", "", rng.random(found) < 0.8, at_least=0.5).decision != "undecided"
            for _ in range(300)
        ]
        assert 0.72 <= np.mean(decided) <= 0.9

    def test_without_a_spread_it_says_so(self):
        assert "no spread" in needed(decide("a", "", [1.0], at_least=0), 0.8).why


class TestCost:
    def test_the_operations_of_a_training_are_those_of_its_products(self, monkeypatch):
        widths = (64, 64)
        monkeypatch.setitem(models.MODELS, "tiny", functools.partial(models.Mlp, widths=widths))
        config = dataclasses.replace(TINY, batch_size=100, steps=50, evaluations=1)
        condition = Condition({"norm": "none"}, learn(config, nl.get("none")))
        found = count(condition)
        first, others = 64 * 64, 64 * 64 + 64 * 10
        step = 100 * (2 * first + 3 * others)  # by the inputs there is no gradient
        evaluation = 512 * (first + others)  # the test set in whole batches
        products = 2 * config.seeds * (50 * step + evaluation)
        assert found.steps == 50
        assert products < found.operations < 1.2 * products

    def test_of_a_tuned_training_it_is_that_of_the_trials_as_well(self):
        one = count(Condition({}, learn(TINY, nl.get("none"))))
        both = count(Condition({}, tuned(TINY, nl.get("none"), (0.1, 0.3))))
        assert both.steps == 2 * one.steps
        assert 1.3 * one.operations < both.operations < 3 * one.operations  # one evaluation

    def test_what_is_no_training_is_not_counted(self):
        assert count(Condition({}, exact(lambda: iter(())))).operations is None


class TestMinutes:
    def test_a_run_stops_after_them_and_says_that_it_goes_on(self, tmp_path, monkeypatch, capsys):
        def slow():
            for i in range(1000):
                time.sleep(0.02)
                yield {"kind": "value", "seed": 0, "step": i, "value": 1.0}

        module = types.SimpleNamespace(
            SECONDS=1,
            QUICK=dataclasses.replace(TINY, dataset=""),
            run=lambda config: iter([Condition({"a": 1}, exact(slow))]),
        )
        monkeypatch.setattr(questions, "NAMES", ("asked",))
        monkeypatch.setattr(questions, "require", lambda name: module)
        begin = time.monotonic()
        with pytest.raises(SystemExit) as stopped:
            cli.main(
                ["run", "asked", "--jobs", "0", "--minutes", "0.01", "--run-dir", str(tmp_path)]
            )
        assert stopped.value.code == cli.EXIT_INTERRUPTED
        assert time.monotonic() - begin < 15
        assert "the same command goes on" in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
    def test_a_time_that_is_none_is_refused(self, minutes, capsys):
        with pytest.raises(SystemExit) as refused:
            cli.main(["run", "identity", "--minutes", minutes])
        assert refused.value.code == cli.EXIT_USAGE
        assert "--minutes: got" in " ".join(capsys.readouterr().err.split())


class TestAgree:
    def effect(self, effects, **options):
        return Effect.of(verdict_json(decide("a", "", effects, **options)))

    def test_effects_near_a_bound_agree_within_their_interval(self):
        then = self.effect([0.1, 0.3, 0.2, 0.25], at_least=0.05)
        now = self.effect([0.0, 0.3, 0.2, 0.25], at_least=0.05)
        assert (then.decision, now.decision) == ("holds", "undecided")
        assert agree(then, now) == "within the interval"

    def test_one_decision_on_two_effects_is_no_agreement(self):
        then = self.effect([5.0, 5.1, 4.9], at_least=0)
        now = self.effect([1.0, 1.1, 0.9], at_least=0)
        assert agree(then, then) == "same"
        assert agree(then, now) == "differs"

    def test_identities_agree_by_their_decision(self):
        then, now = (self.effect([v, v], at_most=1e-6, exact=True) for v in (0.0, 1e-9))
        assert agree(then, now) == "same"

    def test_shares_agree_by_fishers_test(self):
        def share(count):
            outcomes = [True] * count + [False] * (10 - count)
            return Effect.of(verdict_json(decide_share("a", "", outcomes, at_least=0.5)))

        assert agree(share(9), share(8)) == "within the interval"
        assert agree(share(9), share(1)) == "differs"


class TestLock:
    """`lock`, and `report` over a question whose bounds change."""

    @pytest.fixture
    def question(self, tmp_path, monkeypatch):
        path = tmp_path / "thresholds.csv"
        monkeypatch.setattr(thresholds, "PATH", path)
        now = ("2026-11-29T12:00:00+00:00", "0123456789ab")
        monkeypatch.setattr(thresholds, "_commit", lambda name: now)
        monkeypatch.setattr(questions, "NAMES", ("asked",))
        monkeypatch.setattr(questions, "describe", lambda name: {"question": "Is it so?"})
        rows = [{"kind": "value", "seed": i, "value": v} for i, v in enumerate(EFFECTS)]
        module = types.SimpleNamespace(
            SECONDS=1,
            QUICK=dataclasses.replace(TINY, dataset=""),
            run=lambda config: iter([Condition({"a": 1}, exact(lambda: iter(rows)))]),
            figure=lambda records: plt.figure(),
            bounds={"at_least": 0, "size": 0.5},
        )
        module.verdict = lambda records: [
            decide("one", "it is", records.by_seed("value"), **module.bounds)
        ]
        monkeypatch.setattr(questions, "require", lambda name: module)
        return module

    def command(self, name, tmp_path, *more):
        where = ["--run-dir", str(tmp_path / "runs")]
        where += ["--out", str(tmp_path / "page.html")] if name == "report" else []
        return cli.main([name, "asked", "--jobs", "0", *where, *more])

    def test_a_bound_is_written_once_with_its_commit_and_reason(self, question, tmp_path):
        for _ in range(2):
            assert self.command("lock", tmp_path, "--reason", "the source's, of course") == 0
        [line] = thresholds.history()["asked.one"]
        assert (line.at_least, line.at_most, line.size) == ("0", "", "0.5")
        assert (line.commit, line.reason) == ("0123456789ab", "the source's, of course")

    def test_report_refuses_a_bound_that_is_not_the_locked_one(self, question, tmp_path, capsys):
        self.command("lock", tmp_path, "--reason", "a pilot")
        assert self.command("report", tmp_path) == 0
        question.bounds = {"at_least": 0.1, "size": 0.5}
        assert self.command("report", tmp_path) == cli.EXIT_USAGE
        said = " ".join(capsys.readouterr().err.split())
        assert "asked.one: at_least 0.1, size 0.5, but locked is at_least 0, size 0.5" in said
        assert "lock asked --reason" in said
        self.command("lock", tmp_path, "--reason", "it was a slip")
        assert self.command("report", tmp_path) == 0
        assert [v.reason for v in thresholds.history()["asked.one"]] == ["a pilot", "it was a slip"]

    def test_and_one_that_changed_after_its_records_were_judged(self, question, tmp_path, capsys):
        assert self.command("report", tmp_path) == 0
        question.bounds = {"at_least": 0}
        assert self.command("report", tmp_path) == cli.EXIT_USAGE
        assert "its records were judged by" in " ".join(capsys.readouterr().err.split())

    def test_a_reason_and_a_name_are_asked_for(self, question, tmp_path, capsys):
        assert self.command("lock", tmp_path) == cli.EXIT_USAGE
        assert "--reason" in capsys.readouterr().err
        assert cli.main(["lock", "--reason", "so"]) == cli.EXIT_USAGE

    def test_a_bad_line_is_named(self, tmp_path):
        path = tmp_path / "t.csv"
        path.write_text(",".join(thresholds.Line._fields) + "\nasked.one,0\n")
        with pytest.raises(RunError, match="line 2: got 2 values, expected 7"):
            thresholds.history(path)
        path.write_text("a,b\n")
        with pytest.raises(RunError, match="the first line must be id,at_least"):
            thresholds.history(path)

    def test_a_file_that_is_not_committed_cannot_be_locked(self, monkeypatch):
        done = types.SimpleNamespace(stdout=" M experiments/questions/figure1.py\n")
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
        with pytest.raises(RunError, match="Commit it first"):
            thresholds._commit("figure1")

    def test_whether_a_bound_was_there_before_the_run_is_said(self):
        line = thresholds.Line("a.b", "0", "", "", "2026-11-29T12:00:00+00:00", "abc", "so")
        assert (
            thresholds.since([line], "2026-11-29T12:00:01+00:00")
            == "set before the run, 2026-11-29"
        )
        assert thresholds.since([line], "2026-11-20T00:00:00").startswith("set after the run")
        assert "changed once" in thresholds.since([line, line], "2026-11-30T00:00:00")
        assert thresholds.since([], "2026-11-30T00:00:00") == "not locked"


def test_ids_name_a_claim_once(tmp_path):
    from normlab.experiments.asking.ask import named

    with pytest.raises(RunError, match="two claims have the id"):
        named("q", [decide("a", "", EFFECTS), decide("a", "", EFFECTS)])
    for bad in ("", "A", "a b", "a..b", "ä", "a/"):
        with pytest.raises(RunError, match="is not words"):
            named("q", [decide(bad, "", EFFECTS)])
    [found] = named("q", [decide("sd-0.1.gain", "", EFFECTS)])
    assert found.id == "q.sd-0.1.gain"
    json.dumps(verdict_json(found))
