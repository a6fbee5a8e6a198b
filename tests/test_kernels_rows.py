"""Kernels of norms by example in JAX's interpreter, against float64 and against the norms.

Compiled for the hardware they are in `tests.experiments.test_kernels_ahead`.
"""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from normlab._kernels.partitioned import by_examples
from normlab._kernels.rows import Rows, backward, forward, problem
from normlab._kernels.tiles import thread_tile, vector_tile
from tests.helpers import array, draw, gap, mesh

PLATFORMS = ("tpu", "cuda")
silu = jax.nn.silu
BOUND = {jnp.float32: 3e-6, jnp.bfloat16: 2.0**-7}


def _silu(z):
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))


def expected(spec, x, dh, g, b, dtotal=None):
    """In float64: h, the mean, 1/σ; and dx, dg, db."""
    x, dh, g, b = (np.asarray(v, np.float64) for v in (x, dh, g, b))
    split = (*x.shape[:2], spec.groups, -1)

    def mean(v):
        return np.broadcast_to(v.reshape(split).mean((1, 3), keepdims=True), parts).reshape(x.shape)

    parts = x.reshape(split).shape
    mu = mean(x) if spec.centred else np.zeros_like(x)
    r = 1 / np.sqrt(mean(np.square(x - mu)) + spec.eps)
    d = (x - mu) * r
    z = d * g + b
    h, slope = _silu(z) if spec.activation else (z, 1)
    u = dh * slope
    t = u * g
    dx = (t - (mean(t) if spec.centred else 0) - d * mean(t * d)) * r
    dx = dx if dtotal is None else dx + np.asarray(dtotal, np.float64)

    def like(v, gain):
        return (
            v if gain.ndim == 3 else v.sum((0, 1)) if gain.size > 1 else v.sum(keepdims=True)[0, 0]
        )

    def of_groups(v):
        return v.reshape(split)[:, 0, :, 0]

    return (h, of_groups(mu), of_groups(r)), (dx, like(u * d, g), like(u, b))


def computed(spec, platform, x, dh, g, b, dtotal=None):
    """The same, by the kernels."""

    @jax.jit
    def both(x, dh, g, b, dtotal):
        h, mean, r, _ = forward(spec, platform, True, x, g, b)
        return (h, mean, r), backward(spec, platform, True, x, dh, g, b, mean, r, dtotal)

    return both(x, dh, g, b, dtotal)


def given(shape, dtype=jnp.float32, gain="channels", mean=0.0):
    """X, dh, g and b."""
    of = {"channels": shape[2:], "one": (1,), "every": shape}[gain]
    x, dh = array(draw(0, *shape, mean=mean), dtype), array(draw(1, *shape), dtype)
    return x, dh, array(draw(2, *of, mean=1.0)), array(draw(3, *of))


# One value; rows that no block divides; many steps; groups that are whole rows of lanes, that share
# one, and that divide nothing; several chunks of positions; blocks past the last channel.
SHAPES = [
    ((1, 1, 1), 1),
    ((13, 1, 127), 1),
    ((17, 1, 129), 1),
    ((1100, 1, 3), 1),
    ((7, 1, 384), 3),
    ((40, 1, 256), 8),
    ((9, 1, 130), 5),
    ((3, 5, 12), 4),
    ((3, 7, 200), 50),
    ((300, 3, 8), 2),
    ((2, 1009, 37), 1),
    ((2, 1009, 3), 3),
    ((1, 5003, 6), 2),
]


@pytest.mark.parametrize("platform", PLATFORMS)
class TestNumbers:
    @pytest.mark.parametrize(("shape", "groups"), SHAPES)
    @pytest.mark.parametrize("centred", [True, False])
    def test_sizes(self, platform, shape, groups, centred):
        spec, arrays = Rows(groups, centred, eps=0.1), given(shape, mean=0.5)
        assert problem(spec, platform, shape, "float32", shape[2:]) is None
        found, wanted = computed(spec, platform, *arrays), expected(spec, *arrays)
        assert gap(found, wanted) < BOUND[jnp.float32]

    @hypothesis.settings(max_examples=4, deadline=None)
    @hypothesis.given(
        n=st.integers(1, 40), p=st.integers(1, 20), k=st.integers(1, 40), groups=st.integers(1, 9)
    )
    def test_any_size(self, platform, n, p, k, groups):
        spec, arrays = Rows(groups, eps=0.1), given((n, p, k * groups))
        assert gap(computed(spec, platform, *arrays), expected(spec, *arrays)) < 1e-5

    @pytest.mark.parametrize("gain", ["channels", "one", "every"])
    @pytest.mark.parametrize("shape", [(13, 1, 96), (5, 9, 96)])
    def test_gains_of_channels_of_all_and_of_each_value(self, platform, shape, gain):
        spec, arrays = Rows(3, activation=silu), given(shape, gain=gain)
        assert gap(computed(spec, platform, *arrays), expected(spec, *arrays)) < BOUND[jnp.float32]

    def test_a_gate_without_a_bias(self, platform):
        x, dh, g, _ = given((13, 1, 96), gain="every")
        spec, arrays = Rows(centred=False), (x, dh, g, jnp.zeros(1))
        assert gap(computed(spec, platform, *arrays), expected(spec, *arrays)) < BOUND[jnp.float32]

    @pytest.mark.parametrize("shape", [(37, 1, 130), (3, 40, 40)])
    def test_bfloat16(self, platform, shape):
        """Statistics are those of float32; h and dx are rounded once."""
        spec, arrays = Rows(2 if shape[1] > 1 else 1), given(shape, jnp.bfloat16, mean=3.0)
        (h, *statistics), (dx, *sums) = computed(spec, platform, *arrays)
        (h0, *statistics0), (dx0, *sums0) = expected(spec, *arrays)
        assert h.dtype == dx.dtype == jnp.bfloat16
        assert gap((h, dx), (h0, dx0)) < BOUND[jnp.bfloat16]
        assert gap((statistics, sums), (statistics0, sums0)) < BOUND[jnp.float32]

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_what_is_added_first_is_rounded_as_x_is(self, platform, dtype):
        x, dh, g, b = given((13, 1, 130), dtype)
        y, dtotal = array(draw(4, *x.shape), dtype), array(draw(5, *x.shape), dtype)
        spec = Rows(add=True)
        h, mean, r, total = forward(spec, platform, True, x, g, b, y)
        assert jnp.array_equal(total, x + y)
        found = backward(spec, platform, True, total, dh, g, b, mean, r, dtotal)
        (h0, mean0, r0), wanted = expected(spec, total, dh, g, b, dtotal)
        assert gap((h, *found), (h0, *wanted)) < BOUND[dtype]
        assert gap((mean, r), (mean0, r0)) < BOUND[jnp.float32]

    def test_with_numbers_of_64_bits_too(self, platform):
        with jax.enable_x64(True):
            spec, arrays = Rows(), given((13, 1, 130))
            found = computed(spec, platform, *arrays)
        assert gap(found, expected(spec, *arrays)) < BOUND[jnp.float32]


# Over the lanes; over positions, and groups of lanes; over chunks.
KINDS = [((5, 1, 130), 1), ((5, 1, 256), 16), ((3, 50, 24), 3), ((2, 5003, 4), 1)]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("shape", "groups"), KINDS)
class TestExtremes:
    def test_a_mean_of_ten_thousand_sigmas(self, platform, shape, groups):
        spec, arrays = Rows(groups), given(shape, mean=1e4)
        (h, mean, r), (dx, dg, db) = computed(spec, platform, *arrays)
        (h0, mean0, r0), (dx0, dg0, db0) = expected(spec, *arrays)
        assert gap(mean, mean0) < 2e-7
        assert gap(r, r0) < 1e-5
        # The mean has a unit of the last place of 1e-3 σ.
        assert gap((h, dx, dg, db), (h0, dx0, dg0, db0)) < 1e-3

    @pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e18])
    def test_a_constant_sample_is_the_bias(self, platform, shape, groups, value):
        _, dh, g, b = given(shape)
        x = jnp.full(shape, value, jnp.float32)
        (h, mean, r), _ = computed(Rows(groups), platform, x, dh, g, b)
        assert jnp.array_equal(h, jnp.broadcast_to(b, shape))
        assert jnp.array_equal(mean, jnp.full_like(mean, value))
        if value < 1e18:  # where the square of a rounding is nothing beside ε
            assert gap(r, np.full(r.shape, 1e-5**-0.5)) < 1e-6

    @pytest.mark.parametrize("centred", [True, False])
    @pytest.mark.parametrize("value", [1e20, np.inf, np.nan])
    def test_what_overflows_is_nan_where_it_does(self, platform, shape, groups, centred, value):
        x, dh, g, b = given(shape)
        x = x.at[0, 0, 0].set(value)
        (h, _, r), (dx, *_) = computed(Rows(groups, centred), platform, x, dh, g, b)
        bad = np.zeros((shape[0], groups), bool)
        bad[0, 0] = True
        each = np.broadcast_to(np.repeat(bad, shape[2] // groups, 1)[:, None], shape)
        assert np.array_equal(np.isnan(r), bad)
        assert np.array_equal(np.isnan(h), each)
        assert np.array_equal(np.isnan(dx), each)


NORMS = {
    "layer": (nl.layer_norm, (6, 33), Rows()),
    "layer, all": (functools.partial(nl.layer_norm, axes="all"), (3, 5, 4), Rows()),
    "rms": (functools.partial(nl.rms_norm, groups=3), (6, 33), Rows(3, centred=False)),
    "group": (functools.partial(nl.group_norm, groups=2), (3, 4, 5, 6), Rows(2)),
    "instance": (nl.instance_norm, (3, 4, 5, 6), Rows(6)),
}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", NORMS)
def test_they_are_the_norms(platform, name):
    norm, shape, spec = NORMS[name]
    x, dh, g, b = (array(draw(i, *s)) for i, s in enumerate((shape, shape, shape[-1:], shape[-1:])))
    h, pull = jax.vjp(lambda x, g, b: norm(x, nl.Affine(g, b)), x, g, b)
    seen = (shape[0], int(np.prod(shape[1:-1])), shape[-1])
    (found, *_), (dx, dg, db) = computed(spec, platform, x.reshape(seen), dh.reshape(seen), g, b)
    assert gap((found.reshape(shape), dx.reshape(shape), dg, db), (h, *pull(dh))) < 3e-6


@pytest.mark.parametrize("platform", PLATFORMS)
class TestOverDevices:
    """Plain `jit`: x stays where it is, and dg and db are one all-reduce."""

    @pytest.mark.parametrize(
        ("spec", "n"), [(P("i"), 16), (P(("i", "j")), 16), (P(), 16), (P(), 7)], ids=str
    )
    @pytest.mark.parametrize("gain", ["channels", "every"])
    def test_examples_stay(self, platform, spec, n, gain):
        norm, arrays = Rows(3, activation=silu), given((n, 5, 12), gain=gain)

        def both(x, dh, g, b):
            first = by_examples(lambda *v: forward(norm, platform, True, *v)[:3])
            second = by_examples(lambda *v: backward(norm, platform, True, *v))
            h, mean, r = first(x, g, b)
            return (h, mean, r), second(x, dh, g, b, mean, r)

        own, everywhere = (NamedSharding(mesh(i=4, j=2), s) for s in (spec, P()))
        places = [own if v.ndim > 1 else everywhere for v in arrays]
        compiled = jax.jit(both, in_shardings=places).lower(*arrays).compile()
        text = compiled.as_text()
        assert "all-gather" not in text
        assert ("all-reduce" in text) == (spec != P() and gain == "channels")
        found = compiled(*map(jax.device_put, arrays, places))
        assert gap(found, expected(norm, *arrays)) < BOUND[jnp.float32]


class TestProblems:
    @pytest.mark.parametrize(
        ("spec", "platform", "shape", "dtype", "text"),
        [
            (Rows(), "rocm", (8, 1, 8), "float32", "not for rocm"),
            (Rows(), "tpu", (8, 1, 8), "float16", "not for float16"),
            (Rows(), "cuda", (8, 1, 8), "float64", "not for float64"),
            (Rows(), "tpu", (0, 1, 8), "float32", "without a value"),
            (Rows(3), "tpu", (8, 1, 8), "float32", "a number of groups that divides"),
            (Rows(), "tpu", (8, 1, 200_000), "float32", "rows of 200,000 channels.*vector memory"),
            (Rows(), "tpu", (8, 50_000, 128), "float32", "50,000 positions.*vector memory"),
            (Rows(32), "tpu", (8, 1, 40_000), "float32", "a product over 40,000 channels"),
            (Rows(), "cuda", (8, 1, 20_000), "bfloat16", "rows of 20,000 channels.*registers"),
            (Rows(), "cuda", (8, 3136, 256), "float32", "3,136 positions.*L2 cache"),
            (Rows(activation=jax.nn.softmax), "cuda", (8, 1, 8), "float32", "reduce_sum"),
            (Rows(activation=jax.nn.elu), "tpu", (8, 1, 8), "float32", "expm1"),
            (Rows(activation=lambda z: z * np.ones(3)), "tpu", (8, 1, 8), "float32", "an array"),
        ],
    )
    def test_say_what_would_do(self, spec, platform, shape, dtype, text):
        found = problem(spec, platform, shape, dtype, shape[2:])
        assert found is not None
        assert "; use " in found
        assert re.search(text, found), found

    @pytest.mark.parametrize("platform", PLATFORMS)
    @pytest.mark.parametrize("f", [silu, jax.nn.relu, jax.nn.gelu, jnp.tanh, jax.nn.softplus])
    def test_activations_of_nets_have_none(self, platform, f):
        assert problem(Rows(activation=f), platform, (8, 1, 8), "bfloat16", (8,)) is None


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    n=st.integers(1, 10**6),
    p=st.integers(1, 10**4),
    k=st.integers(1, 5000),
    groups=st.integers(1, 300),
    itemsize=st.sampled_from([2, 4]),
    sums=st.booleans(),
)
def test_programs_have_every_example_and_every_group_once(n, p, k, groups, itemsize, sums):
    shape = (n, p, k * groups)
    for tile in (
        vector_tile(shape, groups, itemsize),
        thread_tile(shape, groups, itemsize, sums),
    ):
        rows = tile.steps * tile.examples
        assert (tile.programs - 1) * rows < n <= tile.programs * rows
        assert (tile.spans - 1) * tile.together < groups <= tile.spans * tile.together
        assert tile.positions >= 1
