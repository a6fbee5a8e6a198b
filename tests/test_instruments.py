"""Each instrument measures what its definition says."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree

import normlab as nl
from normlab import instruments
from normlab.instruments import whiten, whitening
from tests.helpers import array, draw, gap

N, C = 40, 4
LAYERS = ("Dense_2", "Dense_10", "out")  # a dict sorts Dense_10 before Dense_2


def activations():
    return draw(0, N, C) @ draw(1, C, C) + 3


def params(seed=0, dtype=jnp.float64):
    shapes = ((3, 4), (4, 3), (3, 2))
    return {
        name: {"kernel": array(draw(seed + k, *shape), dtype), "bias": jnp.zeros(shape[1], dtype)}
        for k, (name, shape) in enumerate(zip(LAYERS, shapes, strict=True))
    }


def loss(p):
    h = array(draw(9, 5, 3), p["out"]["bias"].dtype)
    for name in LAYERS:
        h = jnp.tanh(h @ p[name]["kernel"] + p[name]["bias"])
    return jnp.square(h - 0.3).mean()


@jax.jit
def step(p, lr=0.5):
    return jax.tree.map(lambda w, g: w - lr * g, p, jax.grad(loss)(p))


def compiled(instrument):
    """The instrument in one program, which compiles faster than its many operations."""
    options = inspect.signature(instrument).parameters.values()
    return jax.jit(
        instrument, static_argnames=[o.name for o in options if o.kind == o.KEYWORD_ONLY]
    )


percentiles = compiled(instruments.percentiles)
saturation = compiled(instruments.saturation)
dead_units = compiled(instruments.dead_units)
gaussianity = compiled(instruments.gaussianity)
cancellation = compiled(instruments.cancellation)
correlations = compiled(instruments.correlations)
distance_to_uncorrelated = compiled(instruments.distance_to_uncorrelated)
distance_to_white = compiled(instruments.distance_to_white)
gradient_norms = compiled(instruments.gradient_norms)
effective_lr = compiled(instruments.effective_lr)
angular_update = compiled(instruments.angular_update)
shift = compiled(functools.partial(instruments.covariate_shift, loss))


# Activations


def test_percentiles_are_numpys(precision):
    a = draw(2, 3, 5, 2, C)
    for axes in (0, (0, 1, 2), -1):
        measured = percentiles(array(a, precision), axes=axes)
        assert gap(measured, np.quantile(a, (0.15, 0.5, 0.85), axis=axes)) < 1e-6
    assert measured.dtype == precision


def test_saturation_counts_both_ends_or_one():
    h = array([[0.0, 0.5], [0.04, 0.5], [0.97, 0.06], [0.5, 1.0]])
    ends = {"low": 0, "high": 1, "margin": 0.05}
    assert saturation(h, **ends).tolist() == [0.75, 0.25]
    assert saturation(h, **(ends | {"high": np.inf})).tolist() == [0.5, 0]
    assert saturation(h, **(ends | {"low": -np.inf})).tolist() == [0.25, 0.25]
    assert saturation(h, **ends, axes=(0, 1)) == 0.5
    assert jnp.isnan(saturation(h.at[0, 0].set(jnp.nan), **ends)).tolist() == [True, 0]


def test_dead_units_are_those_that_no_example_wakes():
    h = jax.nn.relu(array([[-1.0, 1, -1, 0], [-2, -1, 3, 0]]))
    assert dead_units(h) == 0.5
    assert dead_units(h[:, None, None], axes=(0, 1, 2)) == 0.5
    assert jnp.isnan(dead_units(h.at[0, 0].set(jnp.nan)))


def test_gaussianity_is_scipys_skewness_and_kurtosis(x64):
    a = np.random.default_rng(0).gamma(2, size=(200, 3)) + 1e4
    measured = gaussianity(array(a, jnp.float64))
    assert gap(measured, (scipy.stats.skew(a), scipy.stats.kurtosis(a))) < 1e-9


def test_gaussianity_does_not_depend_on_mean_and_scale():
    a = array(activations())
    for scale in (1e-30, 1e30):
        assert gap(gaussianity(a * scale), gaussianity(a)) < 1e-5
    two_peaks = gaussianity(array([[-1.0], [1.0]]) + 100)
    assert gap(two_peaks, (np.zeros(1), np.full(1, -2.0))) < 1e-6


def test_a_constant_channel_has_the_kurtosis_no_other_has():
    skewness, kurtosis = gaussianity(jnp.full((7, 2), 0.1))
    assert skewness.tolist() == [0, 0]
    assert kurtosis.tolist() == [-3, -3]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_cancellation_does_not_depend_on_scale(scale):
    a = array(activations())
    assert gap(cancellation(a * scale), cancellation(a)) < 1e-5


def test_cancellation_is_that_of_the_moments():
    a = activations()
    assert gap(cancellation(array(a)), a.mean(0) ** 2 / a.var(0)) < 1e-5
    assert cancellation(jnp.full((3, 1), 0.1)).tolist() == [np.inf]


# Correlations


def test_correlations_are_numpys(x64):
    h = activations()
    measured = correlations(array(h, jnp.float64).reshape(8, 5, C))
    assert gap(measured, np.corrcoef(h, rowvar=False)) < 1e-12


def test_correlations_do_not_depend_on_mean_and_scale():
    h = array(draw(3, N, C))
    for scale in (1e-30, 1e30):
        assert gap(correlations(h * scale), correlations(h)) < 1e-5
    assert gap(correlations(h + 1000), correlations(h)) < 1e-3


def test_the_distance_to_white_is_known_where_its_square_is_not():
    h = array(activations() * 1e12)
    assert gap(distance_to_white(h), np.linalg.norm(np.cov(h, rowvar=False, ddof=0)) / 2) < 1e-5


def test_a_dead_channel_correlates_with_nothing_and_hides_nothing():
    h = array(activations())
    dead = jnp.concatenate([h, jnp.full((N, 3), 0.1)], 1)
    r = correlations(dead)
    assert jnp.abs(r[C:]).max() == 0
    assert jnp.abs(r[:, C:]).max() == 0
    alone = distance_to_uncorrelated(h)
    assert gap(distance_to_uncorrelated(dead), alone) < 1e-6
    assert distance_to_uncorrelated(dead[:, C - 1 :]) == 0
    assert distance_to_white(dead[:, C:]) == 1


def test_whitened_is_white_and_copies_are_as_correlated_as_can_be(x64):
    h = array(activations(), jnp.float64)
    white = whiten(h, whitening(h))
    assert distance_to_white(white) < 1e-12
    assert distance_to_uncorrelated(white) < 1e-12
    copies = jnp.stack([h[:, 0], -2 * h[:, 0], h[:, 0] + 5], 1)
    assert gap(distance_to_uncorrelated(copies), 1.0) < 1e-12


def test_after_batch_norm_what_is_left_to_white_is_the_correlations(x64):
    h = array(activations(), jnp.float64)
    normed, _ = nl.batch_norm(h, None, nl.init_running(C), train=True, eps=1e-12)
    left = np.sqrt(C - 1) * distance_to_uncorrelated(h)
    assert gap(distance_to_white(normed), left) < 1e-9


# Gradients


def test_gradient_norms_are_those_of_each_layer_by_path():
    grads = {"Normed_0": {"kernel": array([3.0]), "norm": {"g": array([0.0]), "b": array([4.0])}}}
    assert gap(gradient_norms(grads), {"Normed_0": 5.0}) < 1e-6
    by_part = gradient_norms(grads, depth=2)
    assert by_part == {"Normed_0/kernel": 3, "Normed_0/norm": 4}
    assert list(gradient_norms([grads, grads])) == ["0", "1"]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_that_vanish_or_explode_keep_their_norm(scale):
    measured = gradient_norms({"w": array([3.0, 4.0]) * scale})
    assert gap(measured["w"], 5 * scale) < 1e-6


def test_a_gradient_that_is_not_finite_has_no_finite_norm():
    norms = gradient_norms({"a": array([1, np.inf]), "b": array([1, np.nan])})
    assert norms["a"] == np.inf
    assert jnp.isnan(norms["b"])


def test_covariate_shift_is_definition_2_1(x64):
    before, after = params(), step(params())
    measured = shift(before, after, layers=LAYERS)
    gradient = jax.jit(jax.grad(loss))
    for i, name in enumerate(LAYERS):
        mixed = {k: (after if k in LAYERS[:i] else before)[k] for k in LAYERS}
        g, g2 = (
            np.concatenate([v.ravel() for v in jax.tree.leaves(gradient(p)[name])])
            for p in (before, mixed)
        )
        lengths = np.linalg.norm(g), np.linalg.norm(g2)
        cosine = g @ g2 / np.prod(lengths)
        row = jax.tree.map(lambda v, i=i: v[i], measured)
        assert gap(row, (np.linalg.norm(g - g2), cosine, *lengths)) < 1e-12
    assert measured.distance[0] == 0
    assert measured.distance[1] > 1e-3


def test_covariate_shift_goes_by_the_order_given(x64):
    before, after = params(), step(params())
    plain, turned = (shift(before, after, layers=names) for names in (LAYERS, LAYERS[::-1]))
    assert turned.distance[0] == 0
    assert turned.distance[2] > 1e-3
    assert gap(turned.norm, plain.norm[::-1]) < 1e-12


# Weights


def test_scale_invariant_weights_turn_as_those_of_length_one_at_the_effective_rate(x64):
    w, lr = array(draw(4, 5), jnp.float64) * 3, 0.7
    target = array(draw(5, 5), jnp.float64)

    def invariant(w):
        return w @ target / jnp.linalg.norm(w)

    unit = w / jnp.linalg.norm(w)
    step = w - lr * jax.grad(invariant)(w)
    unit_step = unit - effective_lr(w, lr) * jax.grad(invariant)(unit)
    assert angular_update(step, unit_step) < 1e-14
    assert angular_update(w, step) > 0.01


def test_the_effective_rate_is_per_layer_or_per_unit():
    w = draw(6, 3, 2, C)
    assert gap(effective_lr(array(w), 0.1), 0.1 / np.square(w).sum()) < 1e-6
    per_unit = effective_lr(array(w), 0.1, axes=(0, 1))
    assert gap(per_unit, 0.1 / np.square(w).sum((0, 1))) < 1e-6
    assert effective_lr(jnp.zeros(3), 0.1) == np.inf


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0])
def test_an_angle_is_right_to_rounding_however_small(size):
    w = jnp.zeros(100).at[0].set(3.0)
    after = w.at[1].set(3.0 * size)
    assert gap(angular_update(w, after), np.arctan(size)) < 1e-6
    if size < 1e-4:  # what arccos makes of it
        cosine = w @ after / (jnp.linalg.norm(w) * jnp.linalg.norm(after))
        assert jnp.arccos(jnp.minimum(cosine, 1)) == 0


def test_an_angle_is_that_of_float64_and_blind_to_length():
    w, after = draw(7, 6, C), draw(8, 6, C)
    cosine = (w * after).sum(0) / np.linalg.norm(w, axis=0) / np.linalg.norm(after, axis=0)
    measured = angular_update(array(w), array(after * 1e5), axes=0)
    assert gap(measured, np.arccos(cosine)) < 1e-6
    assert angular_update(array(w), array(w * 3)) < 1e-6
    assert gap(angular_update(array(w), array(w * -3)), np.pi) < 1e-6
    assert angular_update(array(w), jnp.zeros((6, C))) == 0
    assert angular_update(jnp.zeros((6, C)), array(w)) == 0


def test_under_weight_decay_the_angular_update_settles_at_the_root_of_two_lr_decay():
    lr, decay, steps = 0.1, 0.05, 4000

    def turn(w, key):
        g = jax.random.normal(key, w.shape)
        w_hat = w / jnp.linalg.norm(w)
        g = (g - (g @ w_hat) * w_hat) / jnp.linalg.norm(w)  # as the loss does not see ‖w‖
        after = w - lr * (g + decay * w)
        return after, angular_update(w, after)

    keys = jax.random.split(jax.random.key(0), steps)
    _, angles = jax.lax.scan(turn, jnp.ones(50), keys)
    assert gap(angles[steps // 2 :].mean(), np.sqrt(2 * lr * decay)) < 0.02


# Curvature


def quadratic(h):
    """½·w·Hw + Σw of parameters in two leaves."""

    def value(p):
        w = jnp.concatenate([p["a"], p["b"]])
        return 0.5 * w @ h @ w + w.sum()

    return value, {"a": jnp.ones(2), "b": jnp.ones(len(h) - 2)}


def rotated(eigenvalues):
    """A symmetric matrix with this spectrum."""
    n = len(eigenvalues)
    q, _ = np.linalg.qr(draw(11, n, n))
    return array((q * np.asarray(eigenvalues)) @ q.T, jnp.float64)


SPECTRA = {
    "one dominates": [0, 1, 2, 3, 4, 5, 6, 7, 8, 50],
    "a negative one dominates": [-500, -1, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 1, 3],
    "all negative": [-9, -8, -7, -6, -5, -4.5, -4, -3.5, -3, -2],
    "minus the identity": [-1] * 10,
    "the identity": [1] * 10,
    "flat": [0] * 10,
}


def test_the_largest_eigenvalue_is_the_largest_by_sign(x64):
    @jax.jit
    @jax.vmap
    def measure(h):
        return instruments.hessian_max(*quadratic(h), jax.random.key(0), tol=1e-6)

    found = measure(jnp.stack([rotated(spectrum) for spectrum in SPECTRA.values()]))
    for i, (name, spectrum) in enumerate(SPECTRA.items()):
        bound = 1e-5 * max(1, np.abs(spectrum).max())
        assert abs(found.value[i] - max(spectrum)) < bound, name
        assert found.residual[i] < bound, name
        vector = np.concatenate([found.vector["a"][i], found.vector["b"][i]])
        assert gap(np.linalg.norm(vector), 1.0) < 1e-12, name


def test_it_is_the_eigenvalue_of_a_networks_hessian(x64):
    w, unravel = ravel_pytree(params())
    hessian = jax.jit(jax.hessian(lambda w: loss(unravel(w))))(w)
    values, vectors = np.linalg.eigh(hessian)

    @jax.jit
    @jax.vmap
    def measure(sign):
        return instruments.hessian_max(
            lambda p: sign * loss(p), params(), jax.random.key(0), tol=1e-6
        )

    found = measure(jnp.array([1.0, -1.0]))
    assert gap(found.value, np.array([values[-1], -values[0]])) < 1e-6
    vector = ravel_pytree(jax.tree.map(lambda v: v[0], found.vector))[0]
    assert gap(abs(vector @ vectors[:, -1]), 1.0) < 1e-4


def test_too_few_iterations_show_in_the_residual(x64):
    value, start = quadratic(rotated(np.linspace(0, 10, 40)))
    found = jax.jit(lambda p: instruments.hessian_max(value, p, jax.random.key(0), steps=2))(start)
    assert found.steps == 2
    assert found.residual > 0.1
    assert 10 - found.residual <= found.value <= 10


def test_along_a_step_a_quadratic_has_the_curvature_of_the_direction(x64):
    value, start = quadratic(h := rotated(np.linspace(-3, 5, 10)))
    direction = jax.grad(value)(start)
    d = ravel_pytree(direction)[0]
    length, change = np.linalg.norm(d), np.linalg.norm(h @ d)
    rates = jnp.array([0.0, 0.1, 0.4])
    walk = instruments.along_step(value, start, direction, rates)
    assert gap(walk.distances, rates * change) < 1e-12
    assert gap(walk.beta, change / length) < 1e-12
    for t, there_loss in zip(rates, walk.losses, strict=True):
        there = jax.tree.map(lambda w, d, t=t: w - t * d, start, direction)
        assert gap(there_loss, value(there)) < 1e-12


# All of them


def over_seeds():
    """The instruments as functions of one array; the eigenvalue is mapped over spectra above."""

    def net(v):
        p = params(dtype=jnp.float32)
        return p | {"out": {"kernel": v[:3, :2], "bias": v[0, 2:4]}}

    return {
        "percentiles": instruments.percentiles,
        "saturation": lambda v: instruments.saturation(v, low=-1, high=1, margin=0.1),
        "dead units": instruments.dead_units,
        "gaussianity": instruments.gaussianity,
        "cancellation": instruments.cancellation,
        "correlations": instruments.correlations,
        "distances": lambda v: (
            instruments.distance_to_white(v),
            instruments.distance_to_uncorrelated(v),
        ),
        "gradient norms": lambda v: instruments.gradient_norms({"a": v, "b": v[0]}),
        "covariate shift": lambda v: instruments.covariate_shift(
            loss, net(v), step(net(v)), layers=LAYERS
        ),
        "effective rate": lambda v: instruments.effective_lr(v, 0.1, axes=0),
        "angular update": lambda v: instruments.angular_update(v, v**2, axes=0),
        "along step": lambda v: instruments.along_step(loss, net(v), net(v), jnp.array([0.1, 0.2])),
    }


def every_instrument(v):
    return {name: instrument(v) for name, instrument in over_seeds().items()}


each_seed = jax.jit(jax.vmap(every_instrument))


def test_seeds_side_by_side_under_jit_give_what_each_gives():
    v = array(draw(12, 2, 6, C))
    together, one = each_seed(v), jax.jit(every_instrument)
    each = jax.tree.map(lambda *rows: jnp.stack(rows), *(one(row) for row in v))
    for name in over_seeds():
        assert gap(together[name], each[name]) < 1e-4, name


def test_nan_in_is_nan_out_and_stays_with_its_seed():
    v = array(draw(12, 2, 6, C)).at[1, 0, 0].set(jnp.nan)
    for name, found in each_seed(v).items():
        for leaf in jax.tree.leaves(found):
            assert jnp.isnan(leaf[0]).sum() == 0, name
            assert jnp.isnan(leaf[1]).sum() > 0, name


def test_nan_is_neither_zero_nor_infinite():
    w, spoiled, zero = array([1.0, 2.0]), array([np.nan, 1.0]), jnp.zeros(2)
    for before in (w, zero):
        assert jnp.isnan(angular_update(before, spoiled))
        assert jnp.isnan(angular_update(spoiled, before))
    assert jnp.isnan(effective_lr(spoiled, 0.1))
    assert jnp.isnan(effective_lr(zero, np.nan))
    value, start = quadratic(jnp.eye(6))
    direction = start | {"a": spoiled}
    assert jnp.isnan(instruments.along_step(value, start, direction, jnp.array([0.1])).beta)
    value, start = quadratic(jnp.eye(6).at[0, 0].set(jnp.nan))
    found = jax.jit(lambda p: instruments.hessian_max(value, p, jax.random.key(0), steps=3))(start)
    assert jnp.isnan(found.value)


def test_where_nothing_turns_or_varies_the_derivatives_are_finite():
    def measures(w):
        return (
            instruments.angular_update(w[0], w[1]),
            instruments.angular_update(0 * w[0], w[2]),
            instruments.effective_lr(0 * w, 0.1),
            instruments.gaussianity(w).excess_kurtosis.sum(),
            instruments.cancellation(w[:2]).sum(),
            instruments.distance_to_uncorrelated(w),
        )

    w = array([[1.0, 2.0], [1.0, 2.0], [4.0, 2.0]])
    assert jnp.isfinite(jax.jit(jax.jacrev(lambda w: jnp.stack(measures(w))))(w)).all()


@pytest.mark.parametrize(
    "measure",
    [
        instruments.percentiles,
        instruments.gaussianity,
        instruments.cancellation,
        instruments.correlations,
        instruments.distance_to_white,
        lambda v: instruments.effective_lr(v, 0.1),
        lambda v: instruments.gradient_norms({"a": v}),
    ],
)
def test_half_precision_is_measured_in_float32(measure):
    leaves = jax.tree.leaves(jax.jit(measure)(array(activations(), jnp.bfloat16)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: instruments.percentiles(a, q=(15, 50)), "shares between 0 and 1"),
        (lambda a: instruments.percentiles(a, axes=2), "array of rank 2"),
        (lambda a: instruments.saturation(a, low=0, high=1, margin=0.5), "margin=0.5"),
        (lambda a: instruments.saturation(a, low=1, high=0, margin=0.1), "low < high"),
        (lambda a: instruments.correlations(a[0]), "at least one axis of examples"),
        (lambda a: instruments.gradient_norms({"a": a}, depth=0), "depth=0"),
        (lambda a: instruments.angular_update(a, a[0]), "before and after"),
        (
            lambda a: instruments.hessian_max(jnp.sum, a[0], jax.random.key(0)),
            "got 4 parameters; expected more than 5",
        ),
        (
            lambda a: instruments.covariate_shift(jnp.sum, {"ab": a}, {"ab": a}, layers=["abc"]),
            "did you mean 'ab'",
        ),
        (
            lambda a: instruments.covariate_shift(jnp.sum, {"a": a}, {"a": a}, layers=["a", "a"]),
            "each once",
        ),
        (
            lambda a: instruments.covariate_shift(jnp.sum, {"a": a}, {"a": a}, layers=[]),
            "each once",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(array(activations()))
