"""A norm folded into the layer before it is the same function, and what cannot be is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import normlab as nl
from normlab import folding
from normlab.folding import fold_norm
from tests.cases import NAMES
from tests.helpers import array, draw, gap

LINEAR = {
    "dense": (nl.Dense(), (5, 4), (4, 3)),
    "conv": (nl.Conv(strides=2), (2, 5, 4, 4), (3, 2, 4, 3)),
    "dilated, first": (nl.Conv(dilation=(2, 1), channel_axis=1), (2, 4, 5, 4), (3, 2, 4, 3)),
    "grouped": (nl.Conv(groups=2, padding="VALID"), (2, 5, 4, 4), (3, 2, 2, 6)),
    "depthwise": (nl.Conv(groups=4), (2, 5, 4, 4), (3, 2, 1, 8)),
}
BY_EXAMPLE = {
    "layer": "mu and sigma depend",
    "rms": "whose sigma depends",
    "group": "mu and sigma depend",
    "instance": "mu and sigma depend",
    "cosine": "whose sigma depends",
    "centred_cosine": "mu and sigma depend",
}


def norm_at(name, x, w, linear, seed=0):
    """The norm with parameters and statistics that are not those of the start."""
    norm = nl.get(name, **({"groups": 3} if name == "group" else {}))
    params, state = norm.init(nl.shapes(x, w, linear=linear))
    params = jax.tree.map(lambda v: v + array(draw(seed, *v.shape)), params)
    if name == "batch":
        mean, spread = (array(draw(i, *state.mean.shape)) for i in (7, 8))
        state = state._replace(mean=mean, var=spread**2)
    return norm, params, state


CASES = [
    *(("batch", layer) for layer in LINEAR),
    ("none", "grouped"),
    ("weight", "grouped"),
    *(("weight_standardization", layer) for layer in ("dense", "dilated, first", "grouped")),
]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_folded_norm_is_the_same_function(name, layer):
    linear, x, w = LINEAR[layer]
    x, w = array(draw(0, *x)), array(draw(1, *w, mean=0.3))
    c = array(draw(2, w.shape[-1]))
    norm, params, state = norm_at(name, x, w, linear)
    spread = (-1, *[1] * (x.ndim - 2)) if linear.channel_axis == 1 else (-1,)

    @jax.jit
    def both(kernel, bias):
        site = nl.Site(linear(x, w) + c.reshape(spread), x, w, linear=linear)
        h, _ = norm.apply(params, state, site, train=False)
        return linear(x, kernel) + bias.reshape(spread), h

    folded = fold_norm(norm, params, state, w, c, x=x, linear=linear)
    assert (folded.kernel.shape, folded.kernel.dtype) == (w.shape, w.dtype)
    assert gap(*both(folded.kernel, folded.bias)) < 2e-6
    assert folded.error.shape == folded.bound.shape == folded.bias.shape == (w.shape[-1],)
    assert (folded.error <= folded.bound).all()
    assert folded.bound.max() < 1e-4


@pytest.mark.parametrize("name", BY_EXAMPLE)
def test_a_norm_that_measures_its_input_is_refused(name):
    linear, x, w = LINEAR["conv"]
    x, w = array(draw(0, *x)), array(draw(1, *w))
    norm, params, state = norm_at(name, x, w, linear)
    with pytest.raises(ValueError, match=BY_EXAMPLE[name]):
        fold_norm(norm, params, state, w, x=x, linear=linear)


def test_no_norm_of_the_registry_is_left_out():
    assert {*dict(CASES), *BY_EXAMPLE} == set(NAMES)


def test_batch_norm_in_training_is_refused():
    _, x, w = LINEAR["dense"]
    x, w = array(draw(0, *x)), array(draw(1, *w))
    norm, params, state = norm_at("batch", x, w, nl.Dense())

    def parts(params, state, site, *, train):
        return norm.parts(params, state, site, train=True)

    with pytest.raises(ValueError, match="mu and sigma depend on the input"):
        fold_norm(nl.Norm(norm.init, parts), params, state, w, x=x)


@pytest.mark.parametrize("population", ["ema", "cumulative", "frozen", "renorm", "domains"])
def test_batch_norm_folds_whatever_its_population(population):
    _, x, w = LINEAR["dense"]
    x, w = array(draw(0, *x)), array(draw(1, *w))
    norm = nl.get("batch", population=population)
    site = nl.Site(x @ w, x, w)
    params, state = norm.init(site)
    _, state = jax.jit(functools.partial(norm.parts, train=True))(params, state, site)
    folded = fold_norm(norm, params, state, w, x=x)
    h, _ = norm.apply(params, state, site, train=False)
    assert gap(x @ folded.kernel + folded.bias, h) < 2e-6


def test_batch_norm_without_a_population_is_refused():
    norm = nl.get("batch", population="batch")
    with pytest.raises(ValueError, match="mu and sigma depend on the input"):
        fold_norm(norm, nl.init_affine(3), (), jnp.ones((4, 3)), x=array(draw(0, 5, 4)))


def test_the_kernel_forms_are_the_plain_functions():
    linear, x, w = LINEAR["grouped"]
    x, w = array(draw(0, *x)), array(draw(1, *w, mean=0.3))
    for name, plain in (("weight", nl.weight_norm), ("weight_standardization", None)):
        norm, params, state = norm_at(name, x, w, linear)
        folded = fold_norm(norm, params, state, w, x=x, linear=linear)
        plain = plain or nl.weight_standardization
        assert gap(folded.kernel, plain(w, params)) < 1e-6
        assert gap(folded.bias, params.b) < 1e-6


def of_user(mu, sigma):
    """A norm of a user's, from its μ and σ as functions of the site."""

    def parts(params, state, site, *, train):
        return nl.Parts(mu(site), sigma(site), jnp.ones(()), jnp.zeros(())), state

    return nl.Norm(lambda site: (None, ()), parts)


def test_a_users_norm_is_judged_by_what_it_looks_at():
    _, x, w = LINEAR["dense"]
    x, w = array(draw(0, *x)), array(draw(1, *w))

    def fold(mu, sigma):
        return fold_norm(of_user(mu, sigma), None, (), w, x=x)

    def one(site):
        return jnp.ones(())

    assert fold(lambda s: 0 * one(s), lambda s: jnp.abs(s.w).max(0)).error.max() < 1e-6
    # Linear in x, with a kernel of its own: a fixed reference is taken away.
    reference = array(draw(5, *w.shape))
    folded = fold(lambda s: s.x @ reference + 7, one)
    assert gap(folded.kernel, w - reference) < 1e-6
    assert gap(folded.bias, -7 * np.ones(3)) < 1e-6
    for mu in (lambda s: jnp.square(s.x).sum(-1, keepdims=True), lambda s: s.a.mean()):
        with pytest.raises(ValueError, match=r"mu depends|differs from its folded form"):
            fold(mu, one)
    # A mu without a derivative looks constant, and is found by its values.
    with pytest.raises(ValueError, match="differs from its folded form by"):
        fold(lambda s: jax.lax.stop_gradient(s.a), one)


def test_examples_may_be_shapes():
    _, x, w = LINEAR["dense"]
    w = array(draw(1, *w))
    norm, params, state = norm_at("batch", jnp.ones(x), w, nl.Dense())
    folded = fold_norm(norm, params, state, w, x=jax.ShapeDtypeStruct(x, jnp.float32))
    assert 0 < folded.error.max() <= folded.bound.max()


GIVEN = nl.Norm(lambda site: (None, ()), lambda params, state, site, *, train: (params, state))
"""A norm whose parameters are its parts."""

SCALES = st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6])


@given(
    seed=st.integers(0, 99),
    sigma=SCALES,
    mean=SCALES,
    size=SCALES,
    weight=SCALES,
    kind=st.sampled_from(["float32", "bfloat16"]),
)
def test_the_bound_holds_against_float64(seed, sigma, mean, size, weight, kind):
    """For any scale of statistics, inputs and weights: float32 beside a float64 oracle."""
    rng = np.random.default_rng(seed)
    x, w = array(size * rng.normal(size=(6, 5))), array(weight * rng.normal(size=(5, 3)), kind)
    mu, c, b, g = (array(by * rng.normal(size=3)) for by in (mean, mean, mean, 1))
    parts = nl.Parts(mu, array(sigma * np.exp(rng.normal(size=3))), g, b)
    folded = fold_norm(GIVEN, parts, (), w, c, x=x)
    assert (folded.error <= folded.bound).all()
    x, w, c, mu, scale, g, b = (np.asarray(v, np.float64) for v in (x, w, c, *parts))
    exact = (x @ w + c - mu) / scale * g + b
    h = x.astype(np.float32) @ np.asarray(folded.kernel, np.float32) + np.asarray(folded.bias)
    assert (np.abs(h - exact).max(0) <= np.asarray(folded.bound) * np.abs(exact).max(0)).all()


@pytest.mark.usefixtures("x64")
def test_float64_folds_in_float64():
    x, w = array(draw(0, 5, 4), "float64"), array(draw(1, 4, 3), "float64")
    parts = nl.Parts(*(array(draw(i, 3, mean=3), "float64") for i in range(4)))
    folded = fold_norm(GIVEN, parts, (), w, x=x)
    assert folded.bias.dtype == folded.kernel.dtype == "float64"
    assert (folded.error <= folded.bound).all()
    assert folded.error.max() < 1e-15 * 100


@pytest.mark.parametrize("unit_axis", [0, 1, -2])
def test_units_may_lie_on_any_axis(unit_axis):
    w, c = array(draw(0, 3, 3, 3)), array(draw(1, 3))
    parts = nl.Parts(*(array(draw(i, 3, mean=3)) for i in range(4)))
    kernel, bias = folding.fold(parts, jnp.moveaxis(w, -1, unit_axis), c, unit_axis=unit_axis)
    assert gap((jnp.moveaxis(kernel, unit_axis, -1), bias), folding.fold(parts, w, c)) == 0


def test_a_bias_of_another_layer_is_refused():
    parts = nl.Parts(*map(jnp.ones, 4 * [()]))
    with pytest.raises(ValueError, match=r"fold: got a bias of shape \(4,\)"):
        folding.fold(parts, jnp.ones((4, 3)), jnp.ones(4))


def test_a_kernel_that_overflows_its_type_is_refused():
    parts = nl.Parts(jnp.zeros(()), jnp.float32(1e-9), jnp.ones(()), jnp.zeros(()))
    with pytest.raises(ValueError, match="a norm whose folded kernel is not finite in float16"):
        fold_norm(GIVEN, parts, (), jnp.ones((4, 3), "float16"), x=jnp.ones((2, 4)))
