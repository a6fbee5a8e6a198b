"""Norms that look at the weights and at the input: weight norm, cosine, centred cosine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from tests import oracles
from tests.cases import NAMES
from tests.helpers import array, draw, gap

DENSE = (nl.Dense(), (40, 5), (5, 4))
CONV = (nl.Conv(), (6, 5, 4, 3), (3, 3, 3, 4))
FIRST = (nl.Conv(channel_axis=1), *CONV[1:])
layers = pytest.mark.parametrize(
    ("linear", "x", "w"), [DENSE, CONV, FIRST], ids=["dense", "conv", "conv-first"]
)
forms = pytest.mark.parametrize("centred", [False, True], ids=["cosine", "centred"])


cosine = jax.jit(nl.cosine_norm, static_argnames=("linear", "centred"))


def inputs(linear, x, w, dtype=jnp.float32):
    x, w = array(draw(0, *x, mean=0.5), dtype), array(draw(1, *w), dtype)
    return jnp.moveaxis(x, -1, linear.channel_axis), w


def channels_last(linear, h):
    return np.moveaxis(np.asarray(h), linear.channel_axis, -1)


# Weight norm.


@layers
@pytest.mark.parametrize("drift", [0.0, 100.0])
def test_data_dependent_init_gives_mean_zero_and_deviation_one(linear, x, w, drift):
    x, w = inputs(linear, x, w)
    site = nl.Site(linear(x + drift, w), x + drift, w, linear=linear)
    norm = nl.get("weight", data_init=True)
    params, state = norm.init(site)
    h, _ = norm.apply(params, state, site, train=True)
    h = channels_last(linear, h).astype(np.float64).reshape(-1, 4)
    bound = 1e-5 if drift == 0 else 2e-4  # |t| is 100 times larger, and so are its roundings
    assert np.abs(h.mean(0)).max() < bound
    assert np.abs(h.std(0) - 1).max() < 1e-4
    plain = nl.weight_norm_init(site)
    assert gap(params, plain) == 0


def test_data_dependent_init_is_the_papers(x64):
    x, w = inputs(*DENSE, jnp.float64)
    params = nl.weight_norm_init(nl.Site(x @ w, w=w))
    expected = oracles.weight_init(np.asarray(x) @ (w / np.linalg.norm(w, axis=0)))
    assert gap(params, nl.Affine(*expected)) < 1e-12


def test_data_dependent_init_weighs_the_examples():
    x, w = inputs(*DENSE)
    mask = np.arange(40) < 25
    masked = nl.weight_norm_init(nl.Site(x @ w, w=w, weights=jnp.asarray(mask)))
    assert gap(masked, nl.weight_norm_init(nl.Site(x[mask] @ w, w=w))) < 2e-6


def test_data_dependent_init_leaves_a_constant_unit_as_it_is():
    for value in (0.0, 0.1, 1000.3):
        for count in (3, 7, 100):
            a = jnp.full((count, 2), value)
            params = nl.weight_norm_init(nl.Site(a, w=array([[3.0, 0.3], [4.0, 0.7]])))
            assert gap(params.g, np.ones(2)) == 0


def test_weight_norm_gradients_are_the_papers(x64):
    """Equation 3: ∂g = ∂w·v/‖v‖ and ∂v = g/‖v‖ ∂w − g ∂g/‖v‖² v, which is orthogonal to v."""
    v, g, c = draw(0, 5, 4), draw(1, 4), draw(2, 5, 4)
    length = np.linalg.norm(v, axis=0)
    dg = (c * v).sum(0) / length
    dv = g / length * c - g * dg / length**2 * v
    by_jax = jax.grad(lambda v, g: (c * nl.weight_norm(v, nl.Affine(g, None))).sum(), (0, 1))(
        jnp.asarray(v), jnp.asarray(g)
    )
    assert gap(by_jax, (dv, dg)) < 1e-12
    assert np.abs((v * by_jax[0]).sum(0)).max() < 1e-12


@layers
def test_the_gradient_through_the_parts_is_orthogonal_to_the_weights(linear, x, w):
    x, w = inputs(linear, x, w)
    norm = nl.get("weight")
    params, _ = norm.init(nl.shapes(x, w, linear=linear))

    def loss(w):
        site = nl.Site(linear(x, w), x, w, linear=linear)
        return jnp.tanh(norm.apply(params, (), site, train=True)[0]).sum()

    grad = jax.jit(jax.grad(loss))(w)
    along = (w * grad).sum(tuple(range(w.ndim - 1)))
    assert np.abs(along).max() < 5e-6 * np.abs(w * grad).sum() / 4


def test_lengths_never_fall_under_plain_gradient_descent():
    """Every step is orthogonal to v and so can only lengthen it (the paper's section 2.1)."""
    x, v = inputs(*DENSE)
    y = array(draw(3, 40, 4))

    def step(v, _):
        grad = jax.grad(lambda v: ((x @ nl.weight_norm(v) - y) ** 2).mean())(v)
        v = v - 5.0 * grad
        return v, jnp.linalg.norm(v, axis=0)

    _, lengths = jax.lax.scan(step, v, length=100)
    lengths = np.concatenate([np.linalg.norm(v, axis=0)[None], lengths])
    assert (np.diff(lengths, axis=0) > -1e-6 * lengths[:-1]).all()
    assert (lengths[-1] > 1.01 * lengths[0]).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_weights_of_any_size_normalize_to_length_one(scale):
    """Where ‖v‖² alone would under- or overflow float32."""
    v = array(draw(0, 5, 4))
    w = nl.weight_norm(np.float32(scale) * v)
    assert np.abs(np.linalg.norm(np.asarray(w, np.float64), axis=0) - 1).max() < 1e-6
    assert gap(w, nl.weight_norm(v)) < 1e-6
    x = array(draw(1, 3, 5))
    site = nl.Site(x @ (np.float32(scale) * v), x, np.float32(scale) * v)
    assert gap(nl.affine(nl.weight_parts(site), site.a), x @ w) < 2e-6


def test_one_unit_of_another_size_does_not_disturb_the_others():
    v = array(draw(0, 5, 4) * np.array([1, 1e-20, 1e20, 0]))
    lengths = np.linalg.norm(np.asarray(nl.weight_norm(v), np.float64), axis=0)
    assert gap(lengths, np.array([1, 1, 1, 0])) < 1e-6


@pytest.mark.parametrize("name", ["weight", "weight_standardization", "cosine", "centred_cosine"])
def test_a_nan_in_a_unit_is_nan_in_its_output(name):
    x, w = array(draw(0, 6, 5)), array(draw(1, 5, 4)).at[2, 1].set(jnp.nan)
    norm, site = nl.get(name), nl.Site(x @ w, x, w)
    h, _ = norm.apply(*norm.init(site), site, train=True)
    assert np.isnan(h[:, 1]).all()
    assert np.isfinite(np.delete(h, 1, axis=1)).all()


def test_a_zero_weight_stays_zero_with_finite_derivatives():
    v = array(draw(0, 5, 4) * np.array([1, 0, 1, 0]))
    g, c = array(draw(1, 4)), array(draw(2, 5, 4))
    assert (nl.weight_norm(v, nl.Affine(g, None))[:, 1::2] == 0).all()
    dv, dg = jax.grad(lambda v, g: (c * nl.weight_norm(v, nl.Affine(g, None))).sum(), (0, 1))(v, g)
    assert np.isfinite(dv).all()
    assert gap(dv[:, 1::2], (g * c)[:, 1::2]) < 1e-6  # "with derivative g"
    assert (dg[1::2] == 0).all()
    hessian = jax.jit(jax.hessian(lambda v: (c * nl.weight_norm(v, nl.Affine(g, None))).sum()))(v)
    assert np.isfinite(hessian).all()


@pytest.mark.parametrize("name", ["weight", "cosine", "centred_cosine"])
def test_zero_weights_and_inputs_give_zero_with_finite_derivatives(name):
    norm = nl.get(name, use_gain=False, use_bias=False)

    @jax.jit
    def h(x, w):
        return norm.apply(None, (), nl.Site(x @ w, x, w), train=True)[0]

    w = array(draw(0, 5, 4) * np.array([1, 0, 1, 1]))
    x = array(draw(1, 3, 5) * np.array([[1], [1], [0]]))
    out = h(x, w)
    assert np.isfinite(out).all()
    assert (out[:, 1] == 0).all()
    assert (out[2] == 0).all()

    @jax.jit
    def derivatives(x, w):
        grad = jax.grad(lambda x, w: jnp.sin(h(x, w)).sum(), (0, 1))
        return grad(x, w), jax.jvp(grad, (x, w), (jnp.ones_like(x), jnp.ones_like(w)))

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(derivatives(x, w)))


# Cosine.


@forms
@layers
def test_a_cosine_is_at_most_one(linear, x, w, centred):
    x, w = inputs(linear, x, w)
    h = cosine(x, w, linear=linear, centred=centred)
    assert np.abs(h).max() <= 1 + 1e-6
    assert np.abs(h).max() > 0.3


@forms
def test_a_vector_has_cosine_one_with_itself(centred):
    _, w = inputs(*DENSE)
    own = cosine(w.T, w, centred=centred)
    assert gap(np.diagonal(own), np.ones(4)) < 1e-6
    assert gap(cosine(-w.T, w, centred=centred), -own) < 1e-6


@forms
def test_a_convolution_is_the_cosine_of_every_patch(centred, precision):
    """Padding included: it is part of the patch."""
    for linear in (
        nl.Conv(),
        nl.Conv(strides=2, padding="VALID"),
        nl.Conv(padding=((2, 1), (0, 2)), dilation=2),
    ):
        x, w = draw(0, 2, 6, 7, 3, mean=3.0), draw(1, 3, 3, 3, 4)
        h = cosine(array(x, precision), array(w, precision), linear=linear, centred=centred)
        p, u = oracles.patches(x, w, linear), oracles.units(w, linear)
        expected = oracles.cosine(p, u, centred)
        assert gap(h, expected) < (3e-6 if precision == "float32" else 1e-10)


@forms
def test_channels_first_is_transposed_channels_last(centred):
    x, w = inputs(*CONV)
    params = nl.Affine(array(draw(2, 4)), array(draw(3, 4)))
    last = cosine(x, w, params, centred=centred, linear=nl.Conv())
    first = cosine(
        jnp.moveaxis(x, -1, 1), w, params, centred=centred, linear=nl.Conv(channel_axis=1)
    )
    assert gap(jnp.moveaxis(first, 1, -1), last) < 2e-6


@forms
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
def test_inputs_and_weights_of_any_size_have_the_same_cosine(centred, scale):
    x, w = inputs(*DENSE)
    x = x[:3]
    expected = cosine(x, w, centred=centred)
    s = np.float32(scale)
    assert gap(cosine(s * x, w, centred=centred), expected) < 2e-6
    assert gap(cosine(x, s * w, centred=centred), expected) < 2e-6


def test_every_position_has_its_own_cosine_whatever_its_neighbours():
    """A token of 1e-25 beside one of 1."""
    x = array(draw(0, 2, 3, 5) * np.array([1, 1e-25, 1e25])[:, None])
    w = array(draw(1, 5, 4))
    flat = cosine(x.reshape(-1, 5), w)
    assert gap(cosine(x, w).reshape(-1, 4), flat) < 2e-6


@forms
@pytest.mark.parametrize("units", [4, 5], ids=["K != C", "K == C"])
def test_one_example_at_a_time_is_the_batch(centred, units):
    """Under vmap the input of a dense layer is a vector; with K == C nothing else would tell."""
    x, w = array(draw(0, 3, 5)), array(draw(1, 5, units))
    batch = cosine(x, w, centred=centred)
    assert gap(jax.vmap(lambda x: cosine(x, w, centred=centred))(x), batch) < 2e-6


@pytest.mark.parametrize("constant", [0.1, 1.0, 1000.3])
@pytest.mark.parametrize("size", [3, 10, 333])
def test_a_constant_has_no_correlation_and_finite_derivatives(constant, size):
    """Also where the mean of the constant is not the constant, to the last bit."""
    x, w = array(draw(0, 2, size)), array(draw(1, size, 4))
    x = x.at[1].set(constant)
    w = w.at[:, 2].set(constant)
    h = cosine(x, w, centred=True)
    assert np.abs(h[1]).max() < 2e-7 * size
    assert np.abs(h[:, 2]).max() < 2e-7 * size
    assert np.abs(h[0, :2]).max() > 1e-3
    dx, dw = jax.jit(jax.grad(lambda x, w: jnp.sin(cosine(x, w, centred=True)).sum(), (0, 1)))(x, w)
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()


@forms
def test_constant_regions_of_an_image_give_finite_values_and_gradients(centred):
    """Black borders and flat regions: most patches of MNIST."""
    x = np.zeros((2, 9, 9, 1))
    x[0, 3:6, 3:6, 0] = draw(0, 3, 3)
    x[1, :, 5:, 0] = 1000.0
    w = array(draw(1, 3, 3, 1, 4))
    linear = nl.Conv(padding="VALID")
    f = functools.partial(cosine, linear=linear, centred=centred)
    h = f(array(x), w)
    assert np.abs(h).max() <= 1 + 1e-6
    assert np.abs(h[1, :, :3]).max() < 1e-5
    assert not centred or np.abs(h[1, :, 5:]).max() < 1e-5
    grads = jax.jit(jax.grad(lambda x, w: jnp.sin(f(x, w)).sum(), (0, 1)))(array(x), w)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", ["plain", "registry"])
def test_a_large_constant_has_no_correlation_either(name):
    """w·x and K·w̄·x̄ differ by roundings of 1e5·‖w‖; divided by 1 they would not be small."""
    x, w = array(np.full((2, 333), 1e5)), array(draw(0, 333, 4))
    if name == "plain":
        h = cosine(x, w, centred=True)
    else:
        norm = nl.get("centred_cosine", use_gain=False, use_bias=False)
        h, _ = norm.apply(None, (), nl.Site(x @ w, x, w), train=True)
    assert np.abs(h).max() < 1e-5


def test_a_small_contrast_on_a_large_mean_keeps_its_correlation():
    """Pearson's r of 0.1 around 1000, where float32 numbers are 6e-5 apart."""
    x = draw(0, 4, 8, 8, 3, mean=1000.0, scale=0.1).astype(np.float32)
    w = draw(1, 3, 3, 3, 4).astype(np.float32)
    linear = nl.Conv(padding="VALID")
    h = cosine(jnp.asarray(x), jnp.asarray(w), linear=linear, centred=True)
    p, u = oracles.patches(x.astype(float), w, linear), oracles.units(w.astype(float), linear)
    assert np.abs(h - oracles.cosine(p, u, centred=True)).max() < 0.01


@pytest.mark.parametrize("name", ["cosine", "centred_cosine"])
def test_the_initial_gain_gives_unit_variance(name):
    """√K for independent x and w."""
    x, w = array(draw(0, 500, 64)), array(draw(1, 64, 200))
    norm = nl.get(name)
    params, state = norm.init(nl.shapes(x, w))
    assert gap(params.g, np.full(200, 8.0)) == 0
    h, _ = norm.apply(params, state, nl.Site(x @ w, x, w), train=True)
    assert abs(np.std(h) - 1) < 0.02


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("darkness", [1e-2, 1e-4, 1e-8])
def test_a_dark_patch_beside_a_bright_one_keeps_its_cosine(centred, darkness):
    x, w = np.abs(draw(0, 1, 12, 12, 1)), draw(1, 3, 3, 1, 4)
    x[:, :, :6] *= darkness
    windows = np.lib.stride_tricks.sliding_window_view(x[0, :, :, 0], (3, 3)).reshape(10, 10, 9)
    units = w.reshape(9, 4)
    if centred:
        windows = windows - windows.mean(-1, keepdims=True)
        units = units - units.mean(0)
    lengths = np.linalg.norm(windows, axis=-1, keepdims=True) * np.linalg.norm(units, axis=0)
    h = nl.cosine_norm(array(x), array(w), linear=nl.Conv(padding="VALID"), centred=centred)
    assert gap(h[0], windows @ units / lengths) < 2e-6


def test_data_dependent_init_weighs_positions_wherever_the_channels_are():
    x, w = array(draw(0, 4, 5, 5, 2)), array(draw(1, 3, 3, 2, 5))
    weights = array(draw(2, 4, 5, 5) > 0)
    last, first = nl.Conv(), nl.Conv(channel_axis=1)
    expected = nl.weight_norm_init(nl.Site(last(x, w), x, w, weights, last))
    moved = jnp.moveaxis(x, -1, 1)
    got = nl.weight_norm_init(nl.Site(first(moved, w), moved, w, weights, first))
    assert gap(got, expected) < 1e-5


# What a site must be, and constants.

ON_W = tuple(name for name in NAMES if "w" in nl.row(name).needs)
"""The norms that look at the weights."""


def test_the_norms_of_the_weights_are_found():
    assert ON_W == ("weight", "weight_standardization", "cosine", "centred_cosine")


SIDES, KERNEL = (2, 5, 6, 4), (3, 3, 4, 4)
MISFITS = {  # the map that made a, that of the site, and the shapes of its x and w
    "no linear": (nl.Conv(), nl.Dense(), SIDES, KERNEL),
    "strides": (nl.Conv(), nl.Conv(strides=2), SIDES, KERNEL),
    "padding": (nl.Conv(), nl.Conv(padding="VALID"), SIDES, KERNEL),
    "padding of one axis": (nl.Conv(), nl.Conv(padding=((1, 1),)), SIDES, KERNEL),
    "groups": (nl.Conv(), nl.Conv(groups=2), SIDES, KERNEL),
    "channel axis": (nl.Conv(strides=2), nl.Conv(strides=2, channel_axis=1), (2, 4, 6, 4), KERNEL),
    "another batch": (nl.Conv(), nl.Conv(), (3, *SIDES[1:]), KERNEL),
    "one example": (nl.Conv(), nl.Conv(), (1, *SIDES[1:]), KERNEL),
    "another layer": (nl.Conv(), nl.Conv(), SIDES, (3, 3, 4, 7)),
    "another fan-in": (nl.Conv(), nl.Conv(), SIDES, (3, 3, 5, 4)),
    "a vector for w": (nl.Dense(), nl.Dense(), (6, 5), (5,)),
    "a number for x": (nl.Dense(), nl.Dense(), (), (5, 4)),
    "tokens": (nl.Dense(), nl.Dense(), (6, 2, 5), (5, 4)),
}


@pytest.mark.parametrize("name", ON_W)
@pytest.mark.parametrize("misfit", MISFITS)
def test_x_w_and_the_linear_map_have_to_fit(name, misfit):
    if name == "weight" and misfit in ("another batch", "one example"):
        pytest.skip("does not look at x")
    made, linear, x, w = MISFITS[misfit]
    own = ((6, 5), (5, 4)) if made == nl.Dense() else (SIDES, KERNEL)
    own, x, w = [jnp.ones(shape) for shape in own], jnp.ones(x), jnp.ones(w)
    site = nl.Site(made(*own), x, w, linear=linear)
    norm = nl.get(name)
    abstract = jax.eval_shape(lambda: site)
    params = nl.Affine(None, None)
    for call in (
        lambda: norm.init(site),
        lambda: norm.init(abstract),
        lambda: norm.apply(params, (), site, train=True),
        lambda: jax.eval_shape(lambda s: norm.apply(params, (), s, train=True), site),
    ):
        with pytest.raises(
            ValueError, match=r"To fix it, pass .*Site\(\.\.\., linear=Conv\("
        ) as error:
            call()
        assert str(error.value).startswith(nl.row(name).name.replace("_", " ").split()[0])


@pytest.mark.parametrize("name", ON_W)
def test_sites_fit_under_vmap_and_of_symbolic_sizes(name):
    """Whatever the types and the shardings: it is the shapes that are compared."""
    norm, params = nl.get(name), nl.Affine(None, None)

    def h(x, w, linear=nl.Conv(strides=2)):  # noqa: B008
        site = nl.Site(linear(x.astype(w.dtype), w), x, w, linear=linear)
        return norm.apply(params, (), site, train=True)[0]

    x, w = array(draw(0, 3, *SIDES), jnp.bfloat16), array(draw(1, *KERNEL))
    assert jax.eval_shape(jax.vmap(h, in_axes=(0, None)), x, w).shape == (3, 2, 3, 3, 4)
    dense = functools.partial(h, linear=nl.Dense())
    assert jax.eval_shape(jax.vmap(dense, in_axes=(0, None)), x[0, 0, 0], w[0, 0]).shape == (6, 4)
    b, height = jax.export.symbolic_shape("b, h")
    symbolic = jax.ShapeDtypeStruct((b, height, 6, 4), jnp.float32)
    assert jax.eval_shape(h, symbolic, w).shape[0] == b
    longer = jax.ShapeDtypeStruct((b, height + 1, 6, 4), jnp.float32)
    site = nl.Site(jax.eval_shape(nl.Conv(), longer, w), symbolic, w, linear=nl.Conv())
    with pytest.raises(ValueError, match=r"of which Conv\("):
        norm.init(site)


@forms
def test_the_cosine_of_a_convolution_asks_for_its_map(centred):
    for x, w, linear in (
        (SIDES, KERNEL, nl.Dense()),
        (SIDES, KERNEL, nl.Conv(groups=2)),
        (SIDES, (4, 4), nl.Conv()),
        (SIDES, KERNEL[1:], nl.Conv()),
        ((), (4, 4), nl.Dense()),
    ):
        with pytest.raises(ValueError, match=r"cosine norm: .*cosine_norm\(\.\.\., linear=Conv\("):
            nl.cosine_norm(jnp.ones(x), jnp.ones(w), linear=linear, centred=centred)


def constants(dtype, fan_in):
    """Of three sizes each: a random unit, two constant ones, and one but for a rounding."""
    w = draw(0, fan_in, 4)
    w[:, 1], w[:, 2] = 0.1, 0
    w[:, 3] = 0.7 * (1 + float(jnp.finfo(dtype).eps) * (np.arange(fan_in) % 3))
    return array(draw(1, 3, fan_in), dtype), array(np.hstack([1e-20 * w, w, 1e20 * w]), dtype)


@pytest.mark.parametrize("name", ["weight_standardization", "centred_cosine"])
@pytest.mark.parametrize("fan_in", [1, 5])
@pytest.mark.parametrize("half", [False, True], ids=["", "half"])
def test_a_constant_unit_is_its_bias_exactly(name, fan_in, half, precision):
    """As the kernel of the plain function is zero, where a − μ is only rounded to nothing."""
    norm = nl.get(name)
    dtype = jnp.bfloat16 if half else precision
    x, w = constants(dtype, fan_in)
    params = nl.Affine(None, jnp.full(12, 0.3, dtype))
    flat = np.arange(12) % 4 % 3 != 0 if fan_in > 1 else slice(None)

    def h(x, w):
        return norm.apply(params, (), nl.Site(x @ w, x, w), train=True)[0]

    def loss(x, w):
        return jnp.sin(h(x, w).astype(jnp.float32)).sum()

    for out in (h(x, w), jax.jit(h)(x, w)):
        assert (out[:, flat] == params.b[flat]).all()
        assert np.isfinite(out).all()
    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    assert (dw[:, flat] == 0).all()
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()
    plain = x @ nl.weight_standardization(w)
    assert (plain[:, flat] == 0).all()


# Transposed convolutions.


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (3, 1))])
def test_a_transposed_convolution_is_that_of_jax(window, strides, padding):
    x, w = array(draw(0, 2, 4, 5, 3)), array(draw(1, window, 2, 3, 4))
    for dilation in (1, 2):
        how = {"rhs_dilation": (dilation,) * 2, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        expected = jax.lax.conv_transpose(x, w, (strides,) * 2, padding, **how)
        for axis in (-1, 1):
            linear = nl.ConvTranspose(strides, padding, dilation, channel_axis=axis)
            a = linear(jnp.moveaxis(x, -1, axis), w)
            assert gap(channels_last(linear, a), expected) < 1e-6


@pytest.mark.parametrize("name", ["cosine", "centred_cosine", "weight", "weight_standardization"])
def test_a_norm_behind_a_transposed_convolution_is_that_behind_the_convolution_it_is(name):
    """Of the input with zeros between its positions."""
    x, w = array(draw(0, 2, 4, 5, 3, mean=0.5)), array(draw(1, 3, 3, 3, 4))
    up, plain = (
        nl.ConvTranspose(strides=2, padding=((2, 1), (2, 2))),
        nl.Conv(padding=((2, 1), (2, 2))),
    )
    apart = jnp.zeros((2, 7, 9, 3)).at[:, ::2, ::2].set(x)
    norm = nl.get(name)

    def run(linear, x):
        site = nl.Site(linear(x, w), x, w, linear=linear)
        return norm.apply(norm.init(site)[0], (), site, train=True)[0]

    assert gap(run(up, x), run(plain, apart)) < 1e-5
