"""The questions about transformers: verdicts decide rightly, measures measure, texts are recut."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab.experiments import models
from normlab.experiments.data import load
from normlab.experiments.engine import Net, Records, learn
from normlab.experiments.engine.texts import Language, first_gradients, recut
from normlab.experiments.questions import (
    dyt_data,
    dyt_vit,
    ln_scaling,
    mix_ln,
    ngpt_steps,
    peri_variance,
    pre_post_gradient,
    qk_norm_rate,
    rezero_depth,
    rms_layer_lm,
    warmup,
)
from normlab.experiments.rundir import RunError, packed
from tests.experiments.test_questions_exact import measured
from tests.helpers import judged

SMALL = Language(
    dataset="markov", context=8, tests=16, width=8, steps=4, warmup=0, seeds=2, batch_size=4
)
SEEDS = (0, 1, 2)


@pytest.fixture(autouse=True)
def promotion():
    """What optax wants."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def ends(key, *, step=10, **groups):
    """The record of an evaluation for each seed: `label=value: a number`, a little apart."""
    return [
        {"kind": "evaluation", "seed": seed, "step": step, **labels} | {key: value + 1e-3 * seed}
        for labels, value in groups["each"]
        for seed in SEEDS
    ]


def by_id(question, records) -> dict[str, str]:
    picture = question.figure(Records(records))
    drawn = [bool(axes.lines or axes.collections) for axes in picture.axes]
    picture.clear()
    assert all(drawn)
    return {v.id: v.decision for v in judged(question, records)}


# --- how a text is read ---


def test_a_text_is_recut_without_losing_or_moving_a_token():
    data = load("markov")
    short = recut(data, context=16, tests=40)
    assert short.text is not None
    assert short.classes == 8
    letters = np.array(sorted(set(data.train_inputs.ravel().tolist())))
    np.testing.assert_array_equal(letters[short.train_inputs].ravel(), data.train_inputs.ravel())
    np.testing.assert_array_equal(short.train_inputs[:, 1:], short.train_labels[:, :-1])
    assert len(short.test_inputs) == len(short.text.validation_labels) == 40
    assert short.text.reading.context == 16
    assert short.train_inputs.shape[1] == 16


def test_a_context_that_does_not_divide_a_window_is_refused():
    with pytest.raises(RunError, match="--context: got 24; it must be a divisor of 128"):
        Language(context=24)
    with pytest.raises(RunError, match="--warmup: got 300"):
        Language(steps=300, warmup=300)


def test_bits_per_byte_count_the_windows():
    options = {"prepare": SMALL.prepare, **SMALL.sizes}
    config = dataclasses.replace(SMALL, evaluations=2)
    found = learn(config, nl.get("rms"), **options)(None)
    records = Records(r for r in found if isinstance(r, dict))
    last = records.where(step=4)
    each = np.array([r["bits_per_byte_each"] for r in last])
    assert each.shape == (2, 16)
    np.testing.assert_allclose(each.mean(1), last.by_seed("bits_per_byte"), rtol=1e-5)
    drawn = records.bits_per_byte()
    np.testing.assert_array_equal(drawn[:, 0], last.by_seed("bits_per_byte"))
    assert drawn.shape == (2, 501)
    expected = each.std() / 4  # of a mean of 16
    assert 0.5 * expected < drawn[:, 1:].std(1).mean() < 2 * expected
    assert not any("bits_per_byte_each" in r for r in records.where(step=2))


def test_the_chance_of_a_text_is_the_entropy_of_its_letters():
    assert SMALL.chance == pytest.approx(2.98, abs=0.01)
    [record] = SMALL.frequencies()
    assert record == {"kind": "frequencies", "bits_per_byte": SMALL.chance}


def test_a_warm_up_makes_the_first_steps_small():
    options = {"prepare": SMALL.prepare, **SMALL.sizes}
    config = dataclasses.replace(SMALL, steps=1, seeds=1, schedule="constant", optimizer="sgd")

    def moved(warmup: int) -> float:
        def kernel(net: Net):
            return {"kernel": net.params["block0"]["up"]["kernel"]}

        mine = dataclasses.replace(config, steps=8, warmup=warmup, evaluations=8)
        found = learn(mine, nl.get("rms"), instrument=kernel, **options)(None)
        first = [np.array(r["kernel"]) for r in found if isinstance(r, dict)][:2]
        return float(np.linalg.norm(first[1] - first[0]))

    assert moved(5) == pytest.approx(moved(0) / 5, rel=1e-3)


# --- gradients at initialization ---


def test_the_first_gradients_are_those_of_the_loss():
    sizes = {"batch_size": 2, "length": 8, "width": 16, "depth": 2}
    grads = first_gradients("post", nl.get("layer"), **sizes)(3)
    shapes = {name: v["kernel"].shape for name, v in grads["block1"].items() if "kernel" in v}
    assert shapes == {
        **dict.fromkeys(("q", "k", "v", "out"), (16, 16)),
        **{"up": (16, 64), "down": (64, 16)},
    }
    assert float(jnp.linalg.norm(grads["block0"]["down"]["kernel"])) > 0


@pytest.mark.parametrize(
    ("post", "pre", "expected"),
    [
        (1.2, 1.0, {"post": "holds", "pre": "holds", "more": "holds"}),
        (0.8, 1.2, {"post": "fails", "pre": "fails", "more": "fails"}),
    ],
)
def test_pre_post_gradient_decides_by_the_factor(post, pre, expected):
    records = [
        record
        for scheme, factor in (("post", post), ("pre", pre))
        for seed in SEEDS
        for norms in [(factor + 1e-3 * seed) ** np.arange(4.0)]
        for record in (
            *(
                {"kind": "gradient", "block": block, "gradient": value}
                for block, value in enumerate(norms.tolist(), 1)
            ),
            {"kind": "factor", "factor": pre_post_gradient.factor(norms)},
        )
        for record in [{**record, "scheme": scheme, "seed": seed}]
    ]
    assert by_id(pre_post_gradient, records) == expected


def test_mix_ln_decides_by_how_uneven_the_gradients_are():
    config = dataclasses.replace(mix_ln.QUICK, depth=4, width=16, length=8, batch_size=2, seeds=2)
    records = Records(measured(mix_ln, config))
    here = records.where(kind="gradient", scheme="pre", seed=101).values("gradient")
    assert len(here) == 4
    [uneven] = records.where(kind="uneven", scheme="pre", seed=101).values("uneven")
    assert uneven == pytest.approx(max(here) / min(here))
    planted = {"pre": 4.0, "post": 2.0, "mix": 3.0}
    records = [
        {**r, "uneven": planted[r["scheme"]]} if r["kind"] == "uneven" else r for r in records
    ]
    assert by_id(mix_ln, records) == {"pre": "holds", "post": "fails"}


# --- what is compared by bits per byte or accuracy ---


@pytest.mark.parametrize(
    ("off", "expected"),
    [
        ((0.2, 0.0), {"post": "holds", "pre": "holds"}),
        ((-0.2, 0.1), {"post": "fails", "pre": "fails"}),
    ],
)
def test_warmup_decides_by_what_is_lost_without_it(off, expected):
    each = [
        ({"scheme": scheme, "warmup": name}, 3 + (lost if name == "without" else 0))
        for scheme, lost in zip(("post", "pre"), off, strict=True)
        for name in ("without", "with")
    ]
    assert by_id(warmup, ends("bits_per_byte", each=each)) == expected


@pytest.mark.parametrize(
    ("rms", "expected"), [(3.005, {"same": "holds"}), (2.9, {"same": "fails"})]
)
def test_rms_layer_lm_decides_by_the_difference(rms, expected):
    each = [({"norm": n}, v) for n, v in (("layer", 3.0), ("rms", rms))]
    records = ends("bits_per_byte", each=each)
    records += [{**r, "kind": "screening", "lr": 0.1} for r in records]
    assert by_id(rms_layer_lm, records) == expected


def test_dyt_vit_decides_by_points_on_the_test_images():
    flags = np.arange(1000) % 10 > 0  # 90%
    right = {"layer": flags, "rms": flags, "dyt": flags & (np.arange(1000) > 50)}
    records = [
        {"kind": "evaluation", "norm": norm, "seed": seed, "step": 9, "accuracy": float(f.mean())}
        | {"accuracy_each": packed(f)}
        for norm, f in right.items()
        for seed in SEEDS
    ]
    records += [{**r, "kind": "screening", "lr": 0.1} for r in records]
    assert by_id(dyt_vit, records) == {"dyt": "fails", "rms": "holds"}
    assert all(v.images for v in judged(dyt_vit, records))


@pytest.mark.parametrize(
    ("little", "much", "lowest", "expected"),
    [
        (4.0, 3.2, 3.3, {"little": "holds", "much": "holds", "little.lowest": "holds"}),
        (6.0, 2.8, 2.9, {"little": "fails", "much": "fails", "little.lowest": "fails"}),
    ],
)
def test_dyt_data_decides_by_the_sign(little, much, lowest, expected):
    final = {("layer", "little"): 5, ("layer", "much"): 3, ("dyt", "little"): little}
    final["dyt", "much"] = much
    each = [({"norm": norm, "data": data}, v) for (norm, data), v in final.items()]
    before = [
        ({"norm": norm, "data": "little"}, v) for norm, v in (("layer", 3.1), ("dyt", lowest))
    ]
    records = [*ends("bits_per_byte", step=5, each=before), *ends("bits_per_byte", each=each)]
    assert by_id(dyt_data, records) == expected


def test_little_data_are_the_same_few_windows_for_both_norms():
    config = dataclasses.replace(
        dyt_data.QUICK, **{f: getattr(SMALL, f) for f in ("dataset", "context", "batch_size")}
    )
    data = config.prepare(load("markov"))
    one, again, other = (dyt_data.drawn(seed, data, config) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert len(np.unique(one)) == config.little
    assert set(one.ravel()) != set(other.ravel())
    assert one.shape == (config.steps, config.batch_size)


@pytest.mark.parametrize(("good", "decision"), [("rezero", "holds"), ("post", "fails")])
def test_rezero_depth_decides_by_who_learns(good, decision):
    bits = {name: 3.0 if name == good else 4.6 for name in ("rezero", "plain", "post")}
    records = ends("bits_per_byte", each=[({"scheme": s}, v) for s, v in bits.items()])
    records = [{**r, "seed": seed} for r in records[::3] for seed in range(10)]
    records += [{"kind": "frequencies", "bits_per_byte": 4.5}]
    found = by_id(rezero_depth, records)
    wanted = {"rezero": decision, "post": decision, "plain": "holds", "better": decision}
    assert found == wanted


def test_a_net_without_norm_and_gate_is_the_sum_of_its_branches():
    scheme = rezero_depth.plain(2)
    options = {"scheme": scheme, "width": 8, "depth": 2, "heads": 2}
    model = models.build("lm", nl.get("layer"), 8, **options)
    assert not model.norms()
    rezero = models.build("lm", nl.get("layer"), 8, **{**options, "scheme": "rezero"})
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables: Any = rezero.init(jax.random.key(0), tokens, train=False)
    embedded = variables["params"]["embed"]["embedding"]
    expected = 8**0.5 * embedded[tokens] @ embedded.T  # all branches are shut
    found: Any = rezero.apply(variables, tokens, train=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- rates and steps ---


@pytest.mark.parametrize(("factor", "decision"), [(4.0, "holds"), (0.25, "fails")])
def test_qk_norm_rate_decides_by_rate_and_logit(factor, decision):
    records: list = [{"kind": "frequencies", "bits_per_byte": 4.5}]
    for inside, rate in (("none", 0.1), ("QK norm", 0.1 * factor)):
        for seed in SEEDS:
            labels = {"inside": inside, "seed": seed}
            records += [
                {"kind": "largest", **labels, "lr": rate * (1 + 1e-3 * seed)},
                {"kind": "trial", **labels, "lr": qk_norm_rate.HIGH, "bits_per_byte": 3.0}
                | {"logit": (1 + 1e-3 * seed) / rate},
            ]
    assert by_id(qk_norm_rate, records) == {"rate": decision, "logit": decision}


def test_the_logit_is_the_largest_of_all_attentions():
    options = {**SMALL.sizes, "inside": ("q", "k")}
    model = models.build("lm", nl.get("rms", use_bias=False), 8, **options)
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8) % 8
    params, state = models.split(model.init(jax.random.key(0), tokens, train=False))
    zero = jnp.zeros(())
    logit = qk_norm_rate.logits(Net(model, params, state, tokens, tokens, zero))["logit"]
    assert 0 < logit <= (8 / 2) ** 0.5  # √D where gains are 1


@pytest.mark.parametrize(("there", "decision"), [(3, "holds"), (10, "fails"), (99, "fails")])
def test_fewer_steps_are_those_to_where_the_baseline_ends(there, decision):
    records = [
        {"kind": "evaluation", "scheme": scheme, "seed": seed, "step": step}
        | {
            "bits_per_byte": 4.0 - 0.1 * step
            if scheme == "pre"
            else (2.0 if step >= there else 5.0)
        }
        for scheme in ("pre", "ngpt")
        for seed in range(10)
        for step in range(1, 11)
    ]
    assert ngpt_steps.sooner(Records(records)).all() == (there == 3)
    records += [{**r, "kind": "screening", "lr": 0.1} for r in records]
    assert by_id(ngpt_steps, records) == {
        "steps": decision,
        "end": "holds" if there <= 10 else "fails",
    }


# --- blocks of trained nets ---


def test_peri_variance_decides_by_growth_and_evenness():
    values = {("pre", 0): (2.0, 2.0), ("pre", 10): (9.0, 4.0), ("peri", 0): (2.0, 1.5)}
    values["peri", 10] = (3.0, 2.0)
    records = [
        {"kind": "evaluation", "scheme": scheme, "seed": seed, "step": step}
        | {"variance": [1.0, v + 1e-3 * seed], "gradient": [g, 1.0]}
        for (scheme, step), (v, g) in values.items()
        for seed in SEEDS
    ]
    assert set(by_id(peri_variance, records).values()) == {"holds"}
    for r in records:
        r["variance"] = r["variance"][::-1]
        r["gradient"] = [1.0 / g for g in r["gradient"]] if r["scheme"] == "peri" else [1.0, 1.0]
    assert by_id(peri_variance, records)["variance"] == "fails"


def test_blocks_are_measured_from_the_first_to_the_last():
    model = models.build("lm", nl.get("rms", use_bias=False), 8, scheme="pre", **SMALL.sizes)
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8) % 8
    params, state = models.split(model.init(jax.random.key(0), tokens, train=False))
    net = Net(model, params, state, tokens, tokens, jnp.zeros(()))
    found = peri_variance.by_block(net)
    assert found["variance"].shape == found["gradient"].shape == (2,)
    assert found["variance"][1] > found["variance"][0]  # a branch adds to it
    idle = jax.tree_util.tree_map_with_path(
        lambda path, v: 0 * v if jax.tree_util.keystr(path).count("block1") else v, params
    )
    worth = ln_scaling.worth(net._replace(params=idle))["worth"]
    assert worth[1] == 0  # it returned nothing before
    assert worth[0] != 0


def test_ln_scaling_decides_by_the_worth_of_deep_blocks():
    worth = {"pre": [9, 0.4, 0.1, 0.1], "lns": [9, 0.4, 0.3, 0.3], "mix": [9, 0.4, 0.05, 0.05]}
    records = [
        {"kind": "evaluation", "scheme": scheme, "seed": seed, "step": 9}
        | {"worth": [v * (1 + 1e-3 * seed) for v in values]}
        for scheme, values in worth.items()
        for seed in SEEDS
    ]
    assert by_id(ln_scaling, records) == {"pre": "holds", "lns": "holds", "mix": "fails"}
