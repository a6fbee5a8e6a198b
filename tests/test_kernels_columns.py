"""Batch norm's kernels in JAX's interpreter, against float64; what they lower for.

The norm that is made of them is in `tests.test_implementation`.

Compiled for the hardware they are in `tests.experiments.test_kernels_ahead_columns`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from normlab._kernels import columns
from tests.helpers import array, draw, gap, mesh

PLATFORMS = ("tpu", "cuda")
relu, silu = jax.nn.relu, jax.nn.silu


def _relu(z):
    return np.maximum(z, 0), z > 0


def _silu(z):
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))


def _none(z):
    return z, np.ones_like(z)


ORACLES = {relu: _relu, silu: _silu, None: _none}


def _given(n, c, dtype=jnp.float32):
    """X, dh and a residual; k, r and c."""
    arrays = [array(draw(i, n, c), dtype) for i in range(3)]
    return arrays, [array(draw(i, c)) for i in range(3, 6)]


def _passes(platform, arrays, vectors, added, activation, interpret=True):
    """All that the three kernels return."""
    x, dh, residual = arrays
    k, r, c = vectors
    more = residual if added else None
    how = platform, interpret
    of_c, of_r, u = columns.apply_sums(*how, x, dh, k, r, c, more, activation)
    return {
        "sums": columns.sums(*how, x, k),
        "h": columns.apply(*how, x, k, r, c, more, activation),
        "apply_sums": (of_c, of_r),
        "u": u,
    }


def _expected(arrays, vectors, added, activation):
    """The same in float64."""
    x, dh, residual = (np.asarray(v, np.float64) for v in arrays)
    k, r, c = (np.asarray(v, np.float64) for v in vectors)
    d = x - k
    h, slope = ORACLES[activation](d * r + c + residual * added)
    u = dh * slope
    return {
        "sums": (d.sum(0), np.square(d).sum(0)),
        "h": h,
        "apply_sums": (u.sum(0), (u * d).sum(0)),
        "u": u if added else dh,
    }


@pytest.mark.parametrize("platform", PLATFORMS)
class TestPasses:
    # One value; less than a tile; several tiles of rows and of columns, which divide neither.
    @pytest.mark.parametrize(
        ("shape", "added", "activation"),
        [
            ((1, 1), True, relu),
            ((7, 3), False, None),
            ((4099, 1), False, relu),
            ((131, 1031), True, silu),
            ((1500, 257), False, silu),
            ((2048, 128), True, None),
        ],
    )
    def test_against_float64(self, platform, shape, added, activation):
        arrays, vectors = _given(*shape)
        f = jax.jit(lambda a, v: _passes(platform, a, v, added, activation))
        found, expected = f(arrays, vectors), _expected(arrays, vectors, added, activation)
        for name, value in expected.items():
            assert gap(found[name], value) < 2e-6, name

    @pytest.mark.parametrize(("added", "activation"), [(False, silu), (True, relu)])
    def test_of_bfloat16_only_what_is_written_is_rounded(self, platform, added, activation):
        arrays, vectors = _given(131, 259, jnp.bfloat16)
        f = jax.jit(lambda a, v: _passes(platform, a, v, added, activation))
        found, expected = f(arrays, vectors), _expected(arrays, vectors, added, activation)
        for name, value in expected.items():
            bound = 2e-6 if "sums" in name else 2**-8
            assert gap(found[name], value) < bound, name
        assert {found[name].dtype for name in ("h", "u")} == {jnp.dtype(jnp.bfloat16)}

    def test_a_value_that_is_not_finite_stays_in_its_column(self, platform):
        (x, *others), vectors = _given(1031, 131)
        x = x.at[1030, 7].set(jnp.nan).at[5, 130].set(jnp.inf)
        found = jax.jit(lambda a, v: _passes(platform, a, v, True, relu))([x, *others], vectors)
        found = [*found["sums"], *found["apply_sums"]]
        bad = {int(i) for v in found for i in np.flatnonzero(~np.isfinite(v))}
        assert bad == {7, 130}

    def test_a_million_rows_are_summed_to_the_last_digits(self, platform):
        """As well as XLA does: a running sum in float32 would have lost three digits."""
        n = 1_000_003
        x = 1 + 0.1 * np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
        expected = x.sum(0, dtype=np.float64), np.square(x, dtype=np.float64).sum(0)
        run = jax.jit(functools.partial(columns.sums, platform, True))
        error = gap(run(jnp.asarray(x), jnp.zeros(2)), expected)
        by_xla = jax.jit(lambda x: (x.sum(0), jnp.square(x).sum(0)))(jnp.asarray(x))
        assert error < 2**-22
        assert error < max(gap(by_xla, expected), 2**-23)

    def test_with_x64_on(self, platform, x64):
        arrays, vectors = _given(300, 130)
        found = jax.jit(lambda a, v: _passes(platform, a, v, True, relu))(arrays, vectors)
        assert gap(found, _expected(arrays, vectors, True, relu)) < 2e-6
        assert {v.dtype for v in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}

    def test_each_device_has_its_own(self, platform):
        """JAX's interpreter knows no types that vary: these are in `TestLowering`."""
        arrays, vectors = _given(2 * 37, 5)
        found = jax.jit(_per_device(platform, check_vma=False))(arrays, vectors)
        for device in range(2):
            own = [v[37 * device : 37 * (device + 1)] for v in arrays]
            mine = jax.tree.map(lambda v, device=device: v[device], found)
            assert gap(mine, _expected(own, vectors, True, relu)) < 2e-6


def _per_device(platform, check_vma):
    """All passes on two devices: x varies over them, k and c do not; returned as `[2, ...]`."""

    def each(arrays, vectors):
        found = _passes(platform, arrays, vectors, True, relu, interpret=not check_vma)
        return jax.tree.map(lambda v: v[None], found)

    specs = {"in_specs": (P("d"), P()), "out_specs": P("d")}
    return jax.shard_map(each, mesh=mesh(d=2), check_vma=check_vma, **specs)


# A convolution's, a prime number of channels, one, and more than a tile has.
CALLS = {"tpu": "@tpu_custom_call", "cuda": "@__gpu$xla.gpu.triton"}
LOWERED = [((6272, 512), jnp.bfloat16), ((4099, 257), jnp.float32), ((5, 1), jnp.float32)]


# JAX 0.12 warns that Pallas will do without Triton, and lowers it only where there is a GPU.
TRITON = pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="needs a GPU")


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=TRITON)])
class TestLowering:
    """Pallas lowers here, too; what it makes of a kernel is compiled elsewhere."""

    @pytest.mark.parametrize(("shape", "dtype"), LOWERED)
    @pytest.mark.parametrize("wide", [False, True])
    def test_lowers(self, platform, shape, dtype, wide):
        assert columns.problem(platform, shape, dtype, silu) is None
        x, v = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[1:], jnp.float32)
        with jax.enable_x64(wide):
            run = jax.jit(lambda a, v: _passes(platform, a, v, True, silu, interpret=False))
            text = run.trace([x] * 3, [v] * 3).lower(lowering_platforms=(platform,)).as_text()
        assert text.count(CALLS[platform]) == 3

    @pytest.mark.parametrize(
        ("shape", "dtype", "activation", "word"),
        [
            ((0, 3), jnp.float32, None, "no values"),
            ((3, 3), jnp.float64, None, "float64"),
            ((3, 3), jnp.int32, None, "int32"),
            ((2**31, 1), jnp.float32, None, "2147483648"),
            ((3, 3), jnp.float32, jax.nn.softmax, "reduce_max"),
            ((3, 3), jnp.float32, functools.partial(jax.nn.gelu, approximate=False), "erfc"),
        ],
    )
    def test_what_has_no_kernel_is_told_what_would_do(
        self, platform, shape, dtype, activation, word
    ):
        found = columns.problem(platform, shape, dtype, activation)
        assert found is not None
        assert word in found
        assert found.endswith("use implementation='xla'")

    def test_a_mesh_does_not_matter_to_what_an_activation_needs(self, platform):
        def activation(z):
            return jax.nn.relu(z) * 2

        with jax.set_mesh(mesh(d=2)):
            assert columns.problem(platform, (3, 3), jnp.float32, activation) is None


def test_there_is_no_kernel_for_other_platforms():
    for platform in ("cpu", "rocm"):
        assert repr(platform) in str(columns.problem(platform, (3, 3), jnp.float32))


def test_a_tpu_would_not_hold_few_channels_of_many_rows():
    assert "2 would not fit" in str(columns.problem("tpu", (2**23, 2), jnp.float32))
    assert columns.problem("tpu", (2**23, 128), jnp.float32) is None
    assert columns.problem("cuda", (2**23, 2), jnp.float32) is None
