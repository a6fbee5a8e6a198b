"""The monoid of moments: its laws, its accuracy, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import normlab as nl
from tests.helpers import array, draw, gap

values = hnp.arrays(np.float32, (5, 3), elements=st.floats(-100, 100, width=32))
counts = hnp.arrays(np.int32, 5, elements=st.integers(0, 3))


def measured(x, weights=None):
    return nl.moments(jnp.asarray(x), 0, weights=None if weights is None else jnp.asarray(weights))


def truth(x, axis=0, weights=None):
    """Count, mean and m2 in float64; those of no values are zero."""
    x = np.asarray(x, np.float64)
    w = np.ones(x.shape) if weights is None else np.broadcast_to(weights, x.shape)
    n = w.sum(axis, keepdims=True)
    safe = np.where(n > 0, n, 1)
    mean = np.where(w > 0, w * x, 0).sum(axis, keepdims=True) / safe
    return n, mean, np.where(w > 0, w * (x - mean) ** 2, 0).sum(axis, keepdims=True)


def spread(m):
    """The moments with a count for every mean."""
    return jax.tree.map(lambda v: jnp.broadcast_to(v, m.mean.shape), m)


def same(m, expected, size=100.0, terms=5):
    """Equality to a few roundings of values of the given size."""
    bounds = (0, 1e-6 * size, 1e-5 * size**2 * terms)
    return all(
        np.abs(np.broadcast_to(a, np.shape(e)) - np.asarray(e, np.float64)).max() <= bound
        for a, e, bound in zip(m, expected, bounds, strict=True)
    )


# The monoid.


@given(values, values, counts)
def test_merge_is_commutative(x, y, w):
    p, q = measured(x, w), measured(y)
    assert same(nl.measure.merge(p, q), nl.measure.merge(q, p))


@given(values, values, values, counts)
def test_merge_is_associative(x, y, z, w):
    p, q, r = measured(x), measured(y, w), measured(z)
    assert same(
        nl.measure.merge(nl.measure.merge(p, q), r),
        nl.measure.merge(p, nl.measure.merge(q, r)),
        terms=15,
    )


@given(values, counts)
def test_empty_is_the_exact_identity(x, w):
    m = measured(x, w)
    zero = nl.measure.empty(m.mean.shape)
    for merged in (nl.measure.merge(zero, m), nl.measure.merge(m, zero)):
        assert gap(spread(merged), spread(m)) == 0


def test_nothing_is_empty():
    for m in (
        measured(np.ones((0, 3), np.float32)),
        measured(np.full((5, 3), np.nan, np.float32), np.zeros(5)),
        nl.measure.merge(nl.measure.empty((1, 3)), nl.measure.empty((1, 3))),
    ):
        assert gap(spread(m), nl.measure.empty((1, 3))) == 0


@given(values, values)
def test_merge_is_the_moments_of_both_together(x, y):
    assert same(nl.measure.merge(measured(x), measured(y)), truth(np.concatenate([x, y])), terms=10)


@given(values, counts)
def test_integer_weights_are_repetition(x, w):
    assert same(measured(x, w), truth(np.repeat(x, w, 0)), terms=15)


@given(values, counts)
def test_weights_are_measured_up_to_their_scale(x, w):
    m, scaled = measured(x, w), measured(x, 0.25 * w.astype(np.float32))
    assert same(scaled, (0.25 * m.count, m.mean, 0.25 * m.m2))


@given(values, hnp.arrays(bool, 5), st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
def test_masked_is_the_subset(x, mask, junk):
    dirty = np.where(mask[:, None], x, np.float32(junk))
    assert same(measured(dirty, mask), truth(x[mask]))


@given(values)
def test_moments_are_those_of_numpy(x):
    m = measured(x)
    assert same(m, truth(x))
    assert (np.asarray(m.m2) >= 0).all()


@given(
    hnp.arrays(np.float32, (3, 4, 2), elements=st.floats(-100, 100, width=32)),
    hnp.arrays(np.int32, (3, 4), elements=st.integers(0, 2)),
)
def test_merging_axes_gives_the_moments_of_the_whole(x, w):
    """Whether one axis was measured first or the other, and however many values were in each."""
    whole = truth(x, (0, 1), w[..., None])
    for first, second in ((0, 1), (1, 0)):
        part = nl.moments(jnp.asarray(x), first, weights=jnp.asarray(w))
        assert same(nl.measure.merge_axes(part, second), whole, terms=24)
    part = nl.moments(jnp.asarray(x), (), weights=jnp.asarray(w))
    assert same(nl.measure.merge_axes(part, (0, 1)), whole, terms=24)


def test_no_axes_measure_every_value_alone():
    x = array(draw(0, 2, 3))
    m = nl.moments(x, ())
    assert gap(m.mean, x) == 0
    assert gap((m.count, m.m2), (jnp.ones((1, 1)), jnp.zeros((2, 3)))) == 0


def test_weights_are_aligned_with_the_leading_axes():
    """Shape (N,) weighs examples even where N == C; size 1 is for axes without a say."""
    x = draw(0, 3, 3, 3)
    for shape in ((3,), (3, 3), (3, 3, 3), (1, 3, 1), (3, 1, 1)):
        w = np.abs(draw(1, *shape))
        full = np.broadcast_to(w.reshape(w.shape + (1,) * (3 - w.ndim)), x.shape)
        m = nl.moments(array(x), (0, 1), weights=array(w))
        assert gap(spread(m), truth(x, (0, 1), full)) < 2e-6


@pytest.mark.parametrize("ddof", [0, 1, 2, 4, 7])
def test_ddof_divides_by_count_minus_ddof_and_gives_zero_without_freedom(ddof):
    x = draw(0, 4, 3)
    var = measured(x.astype(np.float32)).var(ddof)
    assert gap(var[0], x.var(0, ddof=ddof) if ddof < 4 else np.zeros(3)) < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool"])
def test_moments_are_at_least_float32(dtype):
    x = array(np.arange(-8, 8).reshape(8, 2), dtype)
    m = nl.moments(x, 0)
    assert {v.dtype for v in m} == {jnp.dtype("float32")}
    assert gap(spread(m), truth(x.astype("float32"))) < 1e-6


def test_float64_stays(x64):
    x = draw(0, 50, 3, mean=1e4)
    m = nl.moments(jnp.asarray(x), 0)
    assert {v.dtype for v in m} == {jnp.dtype("float64")}
    assert gap(m.var()[0], x.var(0)) < 1e-12


# Accuracy.


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("count", [10, 1_000, 1_000_000])
def test_the_variance_is_safe_at_any_mean(count, mean):
    """Against float64 on the float32 numbers; E[x²] − E[x]² is off by 10% at 1e3, by 17 at 1e4.

    The bounds: a long float32 sum in order is off by 1e-5 or so; at a mean of 1e4 the numbers
    themselves are 1e-3 apart, which is no error of the variance.
    """
    x = draw(0, count, 2, mean=mean).astype(np.float32)
    m = jax.jit(nl.moments, static_argnums=1)(x, 0)
    _, expected, m2 = truth(x)
    assert np.abs(m.mean - expected).max() < 1e-7 * max(mean, 10)
    assert gap(m.var(), m2 / count) < 2e-5
    assert m.count.item() == count


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_merging_a_thousand_samples_loses_no_digits(mean):
    x = draw(0, 1000, 64, mean=mean).astype(np.float32)
    m = nl.measure.merge_axes(nl.moments(x, 1), 0)
    assert gap(m.var().item(), x.astype(np.float64).var()) < 5e-6
    assert abs(m.mean.item() - x.astype(np.float64).mean()) < 1e-7 * max(mean, 10)


def test_the_weighted_variance_is_safe_at_a_large_mean():
    x, w = draw(0, 1000, 1, mean=1e4).astype(np.float32), np.abs(draw(1, 1000)).astype(np.float32)
    n, _, m2 = truth(x, 0, w[:, None].astype(np.float64))
    assert gap(measured(x, w).var(), m2 / n) < 2e-5


# Derivatives.


def test_gradients_are_the_textbook_ones(x64):
    """∂mean/∂x = w/Σw and ∂m2/∂x = 2w(x − mean), by x and by nothing hidden."""
    x, w = draw(0, 7), np.abs(draw(1, 7))
    dx = jax.grad(lambda x: nl.moments(x, 0, weights=w).mean.sum())(jnp.asarray(x))
    assert gap(dx, w / w.sum()) < 1e-12
    dx = jax.grad(lambda x: nl.moments(x, 0, weights=w).m2.sum())(jnp.asarray(x))
    assert gap(dx, 2 * w * (x - np.average(x, weights=w))) < 1e-12


def test_gradients_by_the_weights_are_right(x64):
    """∂mean/∂w = (x − mean)/Σw, ∂m2/∂w = (x − mean)²."""
    x, w = draw(0, 7), np.abs(draw(1, 7))
    mean = np.average(x, weights=w)
    dmean = jax.grad(lambda w: nl.moments(x, 0, weights=w).mean.sum())(jnp.asarray(w))
    dm2 = jax.grad(lambda w: nl.moments(x, 0, weights=w).m2.sum())(jnp.asarray(w))
    assert gap((dmean, dm2), ((x - mean) / w.sum(), (x - mean) ** 2)) < 1e-12


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.3])
@pytest.mark.parametrize("second", ["forward", "reverse"])
def test_second_derivatives_are_right_at_zero_variance(constant, second):
    """The Hessian of the variance is 2/N (I − 1/N) everywhere, also where the variance is zero."""
    outer = {"forward": jax.jacfwd, "reverse": jax.jacrev}[second]
    for n in (3, 7):
        hessian = outer(jax.grad(lambda x: nl.moments(x, 0).var().sum()))(jnp.full(n, constant))
        assert gap(hessian, 2 / n * (np.eye(n) - 1 / n)) < 1e-6


def test_second_derivatives_of_masked_values_are_zero():
    x = array([1.0, 1.0, 1.0, np.nan])
    hessian = jax.hessian(lambda x: nl.moments(x, 0, weights=array([1, 1, 1, 0])).var().sum())(x)
    expected = np.zeros((4, 4))
    expected[:3, :3] = 2 / 3 * (np.eye(3) - 1 / 3)
    assert gap(hessian, expected) < 1e-6


@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_a_masked_value_reaches_neither_moments_nor_gradients(junk):
    x, mask = draw(0, 6, 3).astype(np.float32), np.array([1, 1, 0, 1, 0, 1.0], np.float32)
    dirty = np.where(mask[:, None] > 0, x, junk)

    def f(x):
        m = nl.moments(x, 0, weights=jnp.asarray(mask))
        return (m.mean * m.m2).sum()

    clean_value, clean = jax.value_and_grad(f)(jnp.asarray(x))
    value, grad = jax.value_and_grad(f)(jnp.asarray(dirty))
    assert value == clean_value
    assert (grad == clean).all()
    assert (grad[mask == 0] == 0).all()


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "layer", "rms"])
def test_weights_pass_over_the_channels_wherever_they_are(norm):
    a, mask = array(draw(0, 4, 4, 4, 4)), array(draw(1, 4, 4, 4) > 0)
    mask = mask.at[:, 0].set(1)  # something is left everywhere
    options = {"batch": {"train": True}, "group": {"groups": 2}, "layer": {"axes": "all"}}
    function = getattr(nl, f"{norm}_norm")

    def run(a, channel_axis):
        h = function(a, weights=mask, channel_axis=channel_axis, **options.get(norm, {}))
        return h[0] if norm == "batch" else h

    first = run(jnp.moveaxis(a, -1, 1), 1)
    assert gap(jnp.moveaxis(first, 1, -1), run(a, -1)) < 1e-5
