"""Right at every scale: means, spreads, types, algorithms, and what is bad in a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import normlab as nl
from tests import oracles
from tests.helpers import array, draw, gap, optimized

SAFE = ("auto", "shifted", "two_pass")
SHAPE = (16, 12, 9, 8)  # two and more slices of every axis in "shifted", several rows in `widen`
NORMS = {
    "batch": (lambda a, **k: nl.batch_norm(a, train=True, **k)[0], (0, 1, 2)),
    "layer": (nl.layer_norm, (3,)),
    "layer of all": (functools.partial(nl.layer_norm, axes="all"), (1, 2, 3)),
    "group": (functools.partial(nl.group_norm, groups=4), None),
    "instance": (nl.instance_norm, (1, 2)),
}


def expected(norm: str, a):
    """The norm in float64."""
    a = np.asarray(a, np.float64)
    return oracles.group(a, 4) if norm == "group" else oracles.standardized(a, NORMS[norm][1], 1e-5)


def error(h, reference) -> float:
    """The relative error in the root mean square."""
    h = np.asarray(h, np.float64)
    return float(np.sqrt(np.square(h - reference).mean() / np.square(reference).mean()))


@pytest.mark.parametrize("algorithm", SAFE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("mean", "bound"), [(0, 1e-6), (1e2, 1e-5), (1e4, 1e-3)])
def test_the_output_is_right_at_any_mean(norm, mean, bound, algorithm):
    """At 1e4 half a unit in the last place of the mean is 5e-4 of a standard deviation."""
    a = draw(0, *SHAPE, mean=mean).astype(np.float32)
    h = optimized(functools.partial(NORMS[norm][0], algorithm=algorithm))(a)
    assert error(h, expected(norm, a)) < bound


@pytest.mark.parametrize("norm", NORMS)
def test_one_pass_is_wrong_at_a_large_mean_and_right_at_zero(norm):
    """The algorithm is passed on: its error is that of E[x²] − E[x]²."""
    one_pass = optimized(functools.partial(NORMS[norm][0], algorithm="one_pass"))
    a = draw(0, *SHAPE).astype(np.float32)
    assert error(one_pass(a), expected(norm, a)) < 2e-6
    a = draw(0, *SHAPE, mean=1e4).astype(np.float32)
    assert error(one_pass(a), expected(norm, a)) > 0.1


@pytest.mark.parametrize("algorithm", ["shifted", "two_pass", "one_pass"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_the_textbook_one_by_every_algorithm(norm, algorithm, x64):
    """Also over shapes large enough to be summed in rows and about a part of the values."""
    if norm == "group":
        pytest.skip("its chain rule is that of a reshaped layer norm")
    a, dh = draw(0, *SHAPE, mean=0.5), draw(1, *SHAPE)
    function, axes = NORMS[norm]
    _, pull = jax.vjp(functools.partial(function, algorithm=algorithm), jnp.asarray(a))
    assert gap(pull(jnp.asarray(dh))[0], oracles.standardized_backward(dh, a, axes, 1e-5)) < 1e-10


@given(
    st.integers(1, 70),
    st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    st.sampled_from([0.0, 1.0, -1e4]),
    st.integers(0, 1000),
)
def test_a_pivot_of_a_sixteenth_is_safe_against_any_outlier(count, outlier, mean, seed):
    """The pivot's own values are part of the variance: at most log10(17) digits are lost."""
    x = draw(seed, count, 3, mean=mean).astype(np.float32)
    x[0] += outlier  # the first value is always in the pivot's sixteenth
    m = nl.moments(jnp.asarray(x), 0, algorithm="shifted")
    var = x.astype(np.float64).var(0)
    assert np.abs(m.var()[0] - var).max() <= 5e-6 * var.max() + 1e-6 * (mean != 0)


# Sums about 0, on a CPU, where they tell that they lost nothing: of channels over many examples,
# and over the innermost axis.

LAYOUTS = {
    "channels": (lambda x: x, (0, 1, 2), lambda x: x[0, 0, 0]),
    "rows": (lambda x: x.reshape(-1, x.shape[-1]).T, (1,), lambda x: x[:, 0]),
}
near_zero = pytest.mark.parametrize("layout", LAYOUTS)


@near_zero
@pytest.mark.parametrize("mean", [0.0, 1.0, 3.9, 4.1, 1e3, -1e6])
def test_sums_about_zero_lose_no_more_than_a_pivot_of_a_sixteenth_would(layout, mean):
    """Below 4σ the sums are about 0 on a CPU, from there on about a pivot."""
    lay, axes, flat = LAYOUTS[layout]
    x = draw(0, *SHAPE, mean=mean).astype(np.float32)
    m = optimized(lambda x: nl.moments(lay(x), axes))(x)
    x64 = x.astype(np.float64)
    assert gap(flat(m.var()), x64.var((0, 1, 2))) < 17 * 5e-7
    unit = np.spacing(np.abs(x64.mean((0, 1, 2))).astype(np.float32))
    error = np.abs(flat(m.mean) - x64.mean((0, 1, 2)))
    assert (error <= np.maximum(2 * unit, 2e-7)).all()


@near_zero
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-20, 0.1, -1 / 3, 1e4 + 0.3, 1e19, 3e38])
def test_a_constant_sample_beside_others_has_its_value_for_a_mean(layout, value):
    """Also where its square over- or underflows."""
    lay, axes, flat = LAYOUTS[layout]
    x = draw(0, *SHAPE).astype(np.float32)
    x[..., ::2] = value
    m = optimized(lambda x: nl.moments(lay(x), axes))(x)
    assert (flat(m.mean)[::2] == np.float32(value)).all()
    assert (flat(m.m2)[::2] == 0).all()
    assert gap(flat(m.var())[1::2], x.astype(np.float64).var((0, 1, 2))[1::2]) < 1e-6


@near_zero
def test_a_sample_does_not_depend_on_one_that_is_summed_again(layout):
    """To the last bit, in value and gradient."""
    lay, axes, flat = LAYOUTS[layout]

    def f(x):
        m = nl.moments(lay(x), axes)
        return jnp.stack([flat(v) for v in (m.mean, m.m2)])

    run = optimized(lambda x: (f(x), jax.grad(lambda x: f(x)[:, 1:].sum())(x)))
    x = draw(0, *SHAPE).astype(np.float32)
    far = np.r_[1e3, np.zeros(SHAPE[-1] - 1)].astype(np.float32)
    (alone, slope), (beside, its) = run(x), run(x + far)
    assert (alone[:, 1:] == beside[:, 1:]).all()
    assert (slope == its).all()


@near_zero
def test_lanes_are_measured_as_each_alone(layout):
    lay, axes, flat = LAYOUTS[layout]
    x = np.stack([draw(i, *SHAPE, mean=mean) for i, mean in enumerate((0, 1e4, 2))])
    x[2, ..., 0] = 7.0
    lanes = jax.vmap(lambda x: nl.moments(lay(x), axes))(array(x))
    each = [nl.moments(lay(array(lane)), axes) for lane in x]
    assert gap(lanes, jax.tree.map(lambda *f: jnp.stack(f), *each)) < 1e-6
    assert flat(lanes.m2[2])[0] == 0


def _layer(x, **options):
    return nl.layer_norm(LAYOUTS["rows"][0](x), **options), ()


@near_zero
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
def test_derivatives_by_sums_about_zero_are_those_about_any_pivot(layout, mean, x64):
    """First and second ones, forward over reverse and reverse over reverse."""
    x, v = draw(0, *SHAPE, mean=mean), draw(1, *SHAPE)
    norm = functools.partial(nl.batch_norm, train=True) if layout == "channels" else _layer

    def found(algorithm):
        def f(x):
            return (norm(x, algorithm=algorithm)[0] ** 3).sum()

        g = jax.grad(f)
        twice = jax.grad(lambda x: (g(x) * v).sum())
        return g(x), jax.jvp(g, (x,), (v,))[1], twice(x)

    assert gap(found("auto"), found("two_pass")) < 1e-9


@pytest.mark.parametrize(
    ("norm", "algorithm"),
    [(n, a) for n in NORMS for a in SAFE if a != "auto" or not n.startswith("layer")],
)
def test_a_constant_is_exactly_zero_at_any_mean(norm, algorithm):
    """No rounding of the mean is left for 1/√ε to blow up."""
    a = jnp.full(SHAPE, 1e4 + 0.3)
    assert (NORMS[norm][0](a, algorithm=algorithm) == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "int32", "bool"])
@pytest.mark.parametrize("norm", NORMS)
def test_statistics_are_float32_whatever_comes_in(norm, dtype):
    """Large values of a short type, whose squares it cannot hold; the output in a floating type."""
    values = 300 + 30 * draw(0, *SHAPE) if "float" in dtype else 20 * draw(0, *SHAPE)
    a = jnp.asarray(values > 0 if dtype == "bool" else values).astype(dtype)
    h = NORMS[norm][0](a)
    floating = jnp.issubdtype(a.dtype, jnp.floating)
    assert h.dtype == (a.dtype if floating else jnp.float32)
    bound = 4 * float(jnp.finfo(h.dtype).eps) if floating else 2e-6
    reference = np.asarray(a.astype(jnp.float32))
    assert error(h.astype(jnp.float32), expected(norm, reference)) < bound


@pytest.mark.parametrize("algorithm", SAFE)
def test_float64_is_as_exact_at_a_mean_of_1e10(algorithm, x64):
    a = draw(0, *SHAPE, mean=1e10)
    assert (
        error(NORMS["batch"][0](jnp.asarray(a), algorithm=algorithm), expected("batch", a)) < 1e-5
    )


# What can be read.


def test_cancellation_is_the_squared_mean_over_the_variance():
    x = array([[1.0, 5.0, 0.0, 1e4], [1.0, 7.0, 0.0, 1e4 + 2]])
    m = nl.moments(x, 0)
    assert np.isinf(m.cancellation()[0, 0])
    assert gap(m.cancellation()[0, 1:], array([36.0, 0.0, 10001.0**2])) < 1e-6


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_effective_sample_size_is_kish(weights):
    w = np.asarray(weights, np.float64)
    size = nl.measure.effective_sample_size(array(w))
    assert gap(size, w.sum() ** 2 / max((w**2).sum(), 1e-30)) < 1e-6
    assert (
        gap(nl.measure.effective_sample_size(array(1e25 * w)), size) < 1e-6
    )  # whatever their unit


def test_effective_sample_size_of_a_mask_counts_it_by_axis():
    mask = array([[1, 1, 0, 0], [1, 1, 1, 1]], jnp.int32)
    assert nl.measure.effective_sample_size(mask, 1).tolist() == [2, 4]
    assert nl.measure.effective_sample_size(mask).item() == 6
    assert nl.measure.effective_sample_size(array(np.zeros((0,)))).item() == 0


# Where nothing is measured.


@pytest.mark.parametrize("norm", ["layer", "rms", "group", "instance", "batch"])
@pytest.mark.parametrize("junk", [3.0, np.nan])
def test_where_all_weights_are_zero_the_output_is_the_bias_and_no_gradient_passes(norm, junk):
    a = array(draw(0, 3, 4, 6)).at[1].set(junk)
    weights = jnp.ones((3, 4)).at[1].set(0)
    if norm == "batch":
        a, weights = a[1:2], weights[1:2]
    options = {"batch": {"train": True}, "group": {"groups": 2}, "layer": {"axes": "all"}}
    g, b = array(draw(1, 6)), array(draw(2, 6))
    params = nl.Affine(g, b)

    def f(a, params):
        h = getattr(nl, f"{norm}_norm")(a, params, weights=weights, **options.get(norm, {}))
        h = h[0] if norm == "batch" else h
        return jnp.square(h).sum(), h

    (_, h), (da, dparams) = jax.value_and_grad(f, (0, 1), has_aux=True)(a, params)
    row = 0 if norm == "batch" else 1
    assert gap(h[row], jnp.broadcast_to(b, (4, 6))) == 0
    assert (da[row] == 0).all()
    assert jnp.isfinite(jnp.stack(dparams)).all()


def finish(result):
    """Waits for the result, and for what the host is told of it."""
    jax.block_until_ready(result)
    jax.effects_barrier()


BAD = {
    "empty": (np.zeros((0, 3)), None, "0 values"),
    "fully masked": (np.ones((4, 3)), np.zeros(4), "0 values"),
    "NaN": (np.array([[1.0, np.nan, 2.0], [3.0, 4.0, 5.0]]), None, "1 of 3 channels, the first"),
    "Inf": (np.array([[1.0, np.inf, 2.0], [3.0, 4.0, np.inf]]), None, "2 of 3 channels"),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_skipped_taken_in_or_refused(case, compiled):
    a, weights, words = BAD[case]
    a = array(a)
    weights = None if weights is None else array(weights)
    state = nl.init_running(3).update(nl.moments(array(draw(0, 5, 3)), 0))

    def step(policy):
        def f(a, state):
            return nl.batch_norm(a, None, state, train=True, weights=weights, bad_batch=policy)

        return (optimized(f) if compiled else f)(a, state)

    h, skipped = step("skip")
    assert h.shape == a.shape
    assert gap(skipped, state._replace(skipped=state.skipped + 1)) == 0
    assert np.isnan(h).any() == (case in ("NaN", "Inf"))

    h, taken = step("propagate")
    assert taken is not None
    assert np.isnan(h).any() or h.size == 0
    assert np.isnan(taken.mean).any() or np.isnan(taken.var).any()
    assert (taken.updates, taken.skipped) == (2, 0)

    with pytest.raises((FloatingPointError, jax.errors.JaxRuntimeError), match=words) as refused:
        finish(step("raise"))
    assert "batch norm: got a batch with" in str(refused.value)
    assert 'pass bad_batch="skip"' in str(refused.value)


@pytest.mark.parametrize("wrap", ["grad", "vmap", "remat", "scan"])
def test_a_bad_batch_is_refused_in_every_transform(wrap):
    def f(a):
        return nl.batch_norm(a, train=True, bad_batch="raise")[0].sum()

    run = {
        "grad": jax.grad(f),
        "vmap": lambda a: jax.vmap(f)(jnp.stack([jnp.ones_like(a), a])),
        "remat": jax.grad(jax.checkpoint(f)),
        "scan": lambda a: jax.lax.scan(lambda c, a: (c + f(a), None), 0.0, a[None]),
    }[wrap]
    finish(jax.jit(run)(array(draw(0, 4, 3))))
    bad = array(draw(0, 4, 3)).at[0, 0].set(jnp.nan)
    with pytest.raises(jax.errors.JaxRuntimeError, match="batch norm: got a batch with a NaN"):
        finish(jax.jit(run)(bad))


def test_one_value_per_channel_passes_when_asked_to():
    h, _ = nl.batch_norm(jnp.ones((1, 3)), None, None, train=True, bad_batch="propagate")
    assert (h == 0).all()


def test_one_value_per_channel_is_refused_on_an_axis_of_one_device():
    with pytest.raises(ValueError, match="one value per channel"):
        jax.vmap(lambda a: nl.batch_norm(a, train=True, axis_name="d")[0], axis_name="d")(
            jnp.ones((1, 1, 3))
        )
