"""Samples at the edge: constant ones, of one value, that overflow; weights of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from tests.cases import CASES
from tests.helpers import array, draw, gap, optimized

ALGORITHMS = ("auto", "shifted", "two_pass", "one_pass")
C = 6
MEASURED = {  # the norms that subtract a mean
    "batch": lambda a, params=None, **options: nl.batch_norm(a, params, train=True, **options)[0],
    "layer": nl.layer_norm,
    "layer, all": lambda a, **options: nl.layer_norm(a, axes="all", **options),
    "group": lambda a, **options: nl.group_norm(a, groups=2, **options),
    "instance": nl.instance_norm,
}
modes = pytest.mark.parametrize("mode", [optimized, lambda f: f], ids=["jit", "eager"])


# Constant samples.


@modes
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MEASURED)
def test_a_constant_sample_comes_out_as_the_bias(name, algorithm, mode):
    """Exactly, at 12 constants at once: one of a sample, whatever the layout and the weights."""
    constants = array(np.r_[12345.678, 777.777, 1e-20, 0.1, -3e15, draw(0, 7, scale=1e4)])
    bias = jnp.float32(0.3)

    def f(a, weights, axis):
        params = nl.Affine(jnp.full(C, 1.7), jnp.full(C, bias))
        options = {"algorithm": algorithm, "channel_axis": axis, "weights": weights}
        return MEASURED[name](a, params=params, **options)

    def over_constants(constants, shape, axis, weighted):
        weights = jnp.linspace(0, 1.3, shape[0]) if weighted else None
        return jax.vmap(lambda v: f(jnp.full(shape, v), weights, axis))(constants)

    layouts = [
        (shape, axis, weighted)
        for shape, axis in (((5, 7, 3, C), -1), ((5, C, 7, 3), 1), ((3, 11, C), -1))
        for weighted in ([False, True] if name == "batch" else [False])
    ]
    run = mode(lambda constants: [over_constants(constants, *layout) for layout in layouts])
    for layout, h in zip(layouts, run(constants), strict=True):
        assert (h == bias).all(), layout


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((4, 768), 1), ((3000, 4), 0), ((4096, 3, 2), (0, 2)), ((2, 6001), 1), ((7, 5, 3), (0, 1, 2))],
    ids=str,
)
def test_the_mean_of_a_constant_is_that_constant(shape, axes, dtype, algorithm):
    keep = [1 if i in np.atleast_1d(axes) else n for i, n in enumerate(shape)]
    value = array(draw(1, *keep, mean=900.0, scale=300.0), dtype)
    for f in (optimized, lambda f: f):
        m = f(lambda x: nl.moments(x, axes, algorithm=algorithm))(jnp.broadcast_to(value, shape))
        assert (m.mean == value.astype(jnp.float32)).all()
        assert (m.m2 >= 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("shape", "axes"), [((4, 768), 1), ((4096, 3, 2), (0, 2)), ((500, 4), 0)], ids=str
)
def test_the_mean_is_right_to_two_units_in_the_last_place(shape, axes, algorithm, weighted):
    x = array(draw(2, *shape, mean=1000.0))
    w = array(np.random.default_rng(3).uniform(size=shape[0])) if weighted else None
    found = optimized(lambda x: nl.moments(x, axes, algorithm=algorithm, weights=w))(x).mean
    exact, w = np.float64(x), 1.0 if w is None else np.float64(w)
    w = np.broadcast_to(np.reshape(w, (-1,) + (1,) * (len(shape) - 1)), shape)
    expected = (w * exact).sum(axes, keepdims=True) / w.sum(axes, keepdims=True)
    assert (abs(found - expected) <= 2 * np.spacing(np.float32(expected))).all()


def test_channels_first_keep_the_digits_of_the_variance():
    x = draw(4, 4096, 3, 2, mean=1000.0)
    h = nl.batch_norm(array(x), train=True, channel_axis=1, eps=1e-12)[0]
    x = np.float64(np.float32(x))
    d = x - x.mean((0, 2), keepdims=True)
    expected = d / np.sqrt(np.square(d).mean((0, 2), keepdims=True))
    assert abs(h - expected).max() < 1e-4  # a value near 1000 has 6e-5


# Second derivatives where the variance is zero: rounding leaves an m2 of either sign.

AT_ZERO = [
    case for case in CASES if not case.row.name.startswith(("none", "weight", "cosine", "centred"))
]


@pytest.mark.parametrize("case", AT_ZERO, ids=lambda case: case.label)
def test_hessian_vector_products_at_constant_samples_and_channels(case):
    """In float32 as in float64: one derivative that is cut off would be off by its own size."""
    x, w, params = case.values()
    a = np.asarray(case.linear(x, w))
    channel = case.linear.channel_axis % a.ndim
    samples, channels = np.moveaxis(a, channel, -1).copy(), np.moveaxis(a, channel, -1).copy()
    samples[0], channels[..., 0] = 0.7, 0.7
    points = [np.moveaxis(one, -1, channel) for one in (samples, channels)]
    v, c = draw(5, *a.shape), draw(6, *a.shape)

    def products(dtype):
        _, state = case.init(x.astype(dtype), w.astype(dtype))
        p = jax.tree.map(lambda q: q.astype(dtype), params)

        def loss(b):
            site = nl.Site(b, weights=case.site(x, w).weights, linear=case.linear)
            h, _ = case.norm.apply(p, state, site, train=True)
            return (array(c, dtype) * jnp.square(h)).sum()

        @jax.jit
        def both_orders(b, v):
            forward = jax.jvp(jax.grad(loss), (b,), (v,))[1]
            return forward, jax.grad(lambda b: jnp.vdot(jax.grad(loss)(b), v))(b)

        return [both_orders(array(point, dtype), array(v, dtype)) for point in points]

    found = products(jnp.float32)
    with jax.enable_x64(True):
        expected = products(jnp.float64)
    for kind, one, other in zip(("samples", "channels"), found, expected, strict=True):
        assert gap(one, other) < 2e-3, kind


def test_no_derivative_is_cut_where_rounding_left_less_than_nothing():
    """Twenty products of a group norm of which one channel is constant over the positions."""
    a, v = draw(7, 20, 2, 7, 7, 4), draw(8, 20, 2, 7, 7, 4)
    a[..., 0] = draw(9, 20, 1, 1, 1)

    def product(a, v):
        loss = lambda a: jnp.sin(nl.group_norm(a, groups=2)).sum()  # noqa: E731
        return jax.jvp(jax.grad(loss), (a,), (v,))[1]

    found = jax.jit(jax.vmap(product))(array(a), array(v))
    with jax.enable_x64(True):
        expected = jax.jit(jax.vmap(product))(
            array(np.float32(a), jnp.float64), array(np.float32(v), jnp.float64)
        )
    for one, other in zip(found, expected, strict=True):
        assert gap(one, other) < 1e-4


# Overflow, and one value.


@pytest.mark.parametrize("size", [4e19, 1e30, 3e38])
@pytest.mark.parametrize("name", [*MEASURED, "rms"])
def test_what_overflows_is_no_constant(name, size):
    a = jnp.float32(size) * (-1.0) ** jnp.indices((4, 3, C), jnp.float32).sum(0)
    f = nl.rms_norm if name == "rms" else MEASURED[name]
    h = jax.jit(f)(a)
    assert jnp.isnan(h).all()
    good = np.asarray(jax.jit(f)(a.at[1:].set(array(draw(11, 3, 3, C)))))
    assert name == "batch" or np.isfinite(good[1:]).all()  # of each example by itself


def test_an_overflow_is_a_bad_batch():
    state = nl.init_running(2)
    a = array([[1e25, 0.0], [-1e25, 1.0]])
    _, after = nl.batch_norm(a, None, state, train=True)
    assert after.skipped == 1
    assert gap(after.read(), state.read()) == 0


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: nl.layer_norm(jnp.ones((4, 1))), "layer norm"),
        (lambda: nl.layer_norm(jnp.ones((4, 1, 1)), axes="all"), "layer norm"),
        (lambda: nl.layer_norm(jnp.ones((4, 1, 3)), axes=1), "layer norm"),
        (lambda: nl.group_norm(jnp.ones((4, 6)), groups=6), "group norm"),
        (lambda: nl.group_norm(jnp.ones((4, 1, 6)), groups=6), "group norm"),
        (lambda: nl.group_norm(jnp.ones((4, 6, 1)), groups=6, channel_axis=1), "group norm"),
        (lambda: nl.instance_norm(jnp.ones((4, 1, 6))), "instance norm"),
        (lambda: nl.instance_norm(jnp.ones((4, 6, 1, 1)), channel_axis=1), "instance norm"),
        (lambda: nl.batch_norm(jnp.ones((1, 6)), train=True), "batch norm"),
        (lambda: nl.batch_norm(jnp.ones((6, 1)), train=True, channel_axis=0), "batch norm"),
        (lambda: nl.batch_norm(jnp.ones((6, 1)), None, (), train=False, channel_axis=0), "batch"),
        (
            lambda: nl.get("group", groups=4).init(nl.shapes(jnp.ones((2, 3)), jnp.ones((3, 4)))),
            "group norm",
        ),
    ],
)
def test_a_variance_of_one_value_is_an_error_everywhere(call, word):
    with pytest.raises(ValueError, match=rf"^{word}.*one value per .*the bias alone.*To fix it"):
        call()


def test_the_root_mean_square_of_one_value_is_a_number():
    assert gap(nl.rms_norm(array([[2.0], [-3.0]])), array([[1.0], [-1.0]])) < 1e-4


@pytest.mark.parametrize("name", [*MEASURED, "rms"])
def test_the_gradient_keeps_its_digits_at_any_size(name):
    """Of what does not see the scale it is that of scale 1, divided by the scale."""
    norm = nl.rms_norm if name == "rms" else MEASURED[name]
    a, c = array(draw(20, 3, 4, C)), array(draw(21, 3, 4, C))
    grad = jax.jit(
        jax.vmap(lambda s: s * jax.grad(lambda a: (c * norm(a, eps=1e-12)).sum())(s * a))
    )
    found = grad(jnp.float32([1.0, 1e3, 1e5, 1e10, 1e15]))
    assert gap(found, jnp.broadcast_to(found[0], found.shape)) < 1e-5


# Weights.


@pytest.mark.parametrize("size", [1e-40, 1e-33, 1e-20, 1e20, 3e38])
def test_weights_of_any_size_are_relative(size):
    a, mask = array(draw(12, 5, 3, C, mean=2.0)), np.float32([1.0, 0.0, 1.0, 1.0, 0.5])

    def wide(w):  # without arithmetic, which would flush a denormal number
        return jnp.broadcast_to(w[:, None], (5, 3))

    functions = {
        "batch": lambda w: nl.batch_norm(a, None, nl.init_running(C), train=True, weights=w),
        "layer": lambda w: nl.layer_norm(a, axes="all", weights=wide(w)),
        "rms": lambda w: nl.rms_norm(a, axes="all", weights=wide(w)),
        "group": lambda w: nl.group_norm(a, groups=2, weights=wide(w)),
        "instance": lambda w: nl.instance_norm(a, weights=wide(w)),
    }
    for name, f in functions.items():
        for mode in (jax.jit, lambda f: f):
            found, expected = mode(f)(mask * np.float32(size)), mode(f)(mask)
            if name == "batch":  # the count is in units of the weights
                assert found[1].updates == 1
                found, expected = ((h, *state.read()) for h, state in (found, expected))
            # A variance of three values near 2 keeps few digits, and products round otherwise.
            assert gap(found, expected) < 1e-4, name


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0, 1j])
@pytest.mark.parametrize("name", [*MEASURED, "rms"])
def test_what_is_no_weight_is_an_error(name, wrong):
    w = np.r_[1.0, 1.0, wrong, 1.0]
    f = nl.rms_norm if name == "rms" else MEASURED[name]
    with pytest.raises(ValueError, match=r"got .*weight.*expected.*To fix it"):
        f(array(draw(13, 4, 3, C)), weights=w)


@pytest.mark.parametrize("population", ["debiased", "ema", "cumulative", "renorm"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("size", [1.0, 0.3, 7.0])
def test_a_mask_that_leaves_one_value_is_a_bad_batch(population, ddof, size):
    """Whatever it weighs; two that weigh no more together are a batch."""
    a = array(draw(14, 4, C))
    state = nl.population.init_population(population, C, ddof=ddof)
    one, two = array([0.0, size, 0.0, 0.0]), array([0.0, 0.5, 0.5, 0.0]) * (1 + 3 * ddof)
    h, after = nl.batch_norm(a, None, state, train=True, weights=one)
    average = getattr(after, "inner", after)
    assert average.skipped == 1
    assert average.updates == 0
    assert gap(after.read(), state.read()) == 0
    assert (np.asarray(h)[1] == 0).all()
    _, after = nl.batch_norm(a, None, state, train=True, weights=two)
    assert getattr(after, "inner", after).updates == 1


def test_one_value_on_each_device_is_a_batch_and_one_in_all_is_none():
    a = array(draw(15, 4, 2, C))
    state = nl.init_running(C)

    def f(a, w, sync):
        return nl.batch_norm(a, None, state, train=True, weights=w, axis_name=sync)[1]

    for sync in ("d", nl.Sync("d", groups=((0, 1), (2, 3))), nl.Sync("d", shards=2, groups=2)):
        run = jax.vmap(lambda a, w, s=sync: f(a, w, s), axis_name="d")
        assert (run(a, array([[1, 0]] * 4)).updates == 1).all(), sync
        alone = run(a, array([[1, 0], [0, 0], [0, 0], [0, 0]]))
        assert (alone.updates == 0).all()
        assert (alone.skipped == 1).all()


def test_one_value_can_be_taken_in_as_it_is():
    a, mask = array(draw(16, 4, C)), array([0.0, 1.0, 0.0, 0.0])
    _, after = nl.batch_norm(
        a, None, nl.init_running(C), train=True, weights=mask, bad_batch="propagate"
    )
    assert after.updates == 1
    assert gap(after.mean, a[1]) < 1e-6


# Channels on the first axis.


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "population", ["debiased", "cumulative", "renorm", "domains", "domain of each", "batch"]
)
def test_channels_may_be_first(population, train):
    a = array(draw(17, 4, 3, C, mean=2.0))
    if population == "domain of each":
        state = nl.population.select_domain(
            nl.population.init_domains(C, examples=4), jnp.array([0, 1, 1, 0])
        )
    else:
        state = nl.population.init_population(population, C)
    params = nl.Affine(array(draw(18, C)), array(draw(19, C)))
    for weights in (None, array([1.0, 2.0, 0.5, 1.0])):
        h, after = nl.batch_norm(a, params, state, train=train, weights=weights)
        first, again = nl.batch_norm(
            jnp.moveaxis(a, -1, 0), params, state, train=train, weights=weights, channel_axis=0
        )
        assert gap(jnp.moveaxis(first, 0, -1), h) < 1e-5
        assert gap(again, after) < 1e-5
