"""Whitened data is white, whatever its scales, and every method says what it does to the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab import instruments
from tests.helpers import array, draw, gap

N, C = 64, 5
METHODS = ("zca", "pca", "zscore", "minmax")
whitening = jax.jit(instruments.whitening, static_argnames=("method", "eps"))
whiten, condition_number = map(jax.jit, (instruments.whiten, instruments.condition_number))


def data():
    """Correlated features, away from the origin."""
    return draw(0, N, C) @ draw(1, C, C) + draw(2, C, mean=3.0)


def scales():
    """A feature of 0–1 beside one of 0–1000, correlated."""
    u, v = np.random.default_rng(3).uniform(size=(2, N))
    return np.stack([u, 1000 * (0.3 * u + 0.7 * v)], 1)


def covariance(x):
    return np.cov(np.asarray(x, np.float64), rowvar=False, ddof=0)


def oracle(x, method):
    """W from the covariance, in float64."""
    if method == "minmax":
        return np.diag(1 / np.ptp(x, 0))
    if method == "zscore":
        return np.diag(1 / x.std(0))
    variances, axes = np.linalg.eigh(covariance(x))
    w = (axes / np.sqrt(variances))[:, ::-1]
    return w if method == "pca" else w @ axes[:, ::-1].T


@pytest.mark.parametrize("method", METHODS)
def test_the_map_is_the_oracles(x64, method):
    x = data()
    w = whitening(array(x, jnp.float64), method=method)
    expected = oracle(x, method)
    if method == "pca":  # each axis up to its sign
        expected = expected * np.sign((np.asarray(w.matrix) * expected).sum(0))
    assert gap(w.matrix, expected) < 1e-10
    assert gap(w.mean, x.min(0) if method == "minmax" else x.mean(0)) < 1e-14


@pytest.mark.parametrize("method", ["zca", "pca"])
@pytest.mark.parametrize("make", [data, scales])
def test_the_covariance_of_whitened_data_is_the_identity(x64, method, make):
    x = array(make(), jnp.float64)
    z = whiten(x, whitening(x, method=method))
    assert np.abs(covariance(z) - np.eye(z.shape[-1])).max() < 1e-10
    assert np.abs(np.mean(z, 0)).max() < 1e-12


def test_in_float32_the_axes_of_the_data_keep_what_those_of_the_covariance_lose():
    mixed = (draw(3, 500, 10) + 5) @ (np.eye(10) + 0.3 * draw(4, 10, 10))
    x = array(mixed * np.repeat([1, 1000], 5))
    for method in ("zca", "pca"):
        z = whiten(x, whitening(x, method=method))
        assert np.abs(covariance(z) - np.eye(10)).max() < 2e-3
    d = x - x.mean(0)
    variances, axes = jnp.linalg.eigh(d.T @ d / len(d))
    error = np.abs(covariance(d @ axes / jnp.sqrt(jnp.abs(variances))) - np.eye(10)).max()
    assert error > 0.1


def test_zca_is_symmetric_and_the_nearest_to_the_data(x64):
    x = array(data(), jnp.float64)
    zca, pca = (whitening(x, method=method) for method in ("zca", "pca"))
    assert gap(zca.matrix, zca.matrix.T) < 1e-14
    centred = x - x.mean(0)
    assert jnp.linalg.norm(whiten(x, zca) - centred) < jnp.linalg.norm(whiten(x, pca) - centred)


def test_the_principal_axes_fall_in_variance():
    x = array(data())
    w = whitening(x, method="pca").matrix
    variances = np.var((x - x.mean(0)) @ (w / jnp.linalg.norm(w, axis=0)), 0)
    assert np.all(np.diff(variances) < 0)


def test_minmax_maps_to_the_unit_interval_and_zscore_to_unit_variance():
    x = array(scales())
    z = whiten(x, whitening(x, method="minmax"))
    assert z.min(0).tolist() == [0, 0]
    assert gap(z.max(0), np.ones(2)) < 1e-6
    z = whiten(x, whitening(x, method="zscore"))
    assert gap(jnp.var(z, 0), np.ones(2)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_feature_becomes_zero_and_spoils_no_other(method):
    x = array(data())
    with_constant = jnp.concatenate([x, jnp.full((N, 1), 0.1)], 1)
    z = whiten(with_constant, whitening(with_constant, method=method))
    assert jnp.isfinite(z).all()
    if method == "pca":
        assert gap(covariance(z), np.diag([1.0] * C + [0.0])) < 1e-4
    else:
        assert jnp.abs(z[:, -1]).max() == 0
        assert gap(z[:, :C], whiten(x, whitening(x, method=method))) < 1e-4


@pytest.mark.parametrize("method", ["zca", "pca"])
def test_fewer_examples_than_features_whiten_the_dimensions_there_are(method):
    x = array(draw(4, 4, 6))
    z = whiten(x, whitening(x, method=method))
    kept = np.linalg.eigvalsh(covariance(z))
    assert gap(kept, np.array([0, 0, 0, 1, 1, 1.0])) < 1e-5


def test_a_copy_of_a_feature_adds_no_dimension():
    x = array(np.concatenate([data(), data()[:, :1]], 1))
    z = whiten(x, whitening(x, method="pca"))
    assert gap(np.linalg.eigvalsh(covariance(z)), np.array([0] + [1.0] * C)) < 1e-4


def test_whitened_data_has_unit_variance_at_every_scale():
    tiny_and_huge = array([1e-25, 1e-18, 1.0, 1e18, 1e25, 1e30])

    @jax.jit
    @jax.vmap
    def deviations(scale):
        x = jnp.concatenate([array(draw(6, N, 3)) * scale, jnp.full((N, 1), scale)], 1)
        return {
            method: instruments.whiten(x, instruments.whitening(x, method=method)).std(0)
            for method in ("zca", "pca", "zscore")
        }

    for method, found in deviations(tiny_and_huge).items():
        assert gap(found, np.tile([1.0, 1, 1, 0], (6, 1))) < 1e-5, method


def test_eps_is_added_to_the_variances_at_every_scale():
    for scale in (1e-18, 1e18):
        x = array(draw(6, N, 3) * scale)
        for method in ("zca", "pca", "zscore"):
            z = whiten(x, whitening(x, method=method, eps=scale**2))
            variances = np.asarray(x / scale, np.float64)
            left = np.linalg.eigvalsh(covariance(variances))
            if method == "zscore":
                left = variances.var(0)
                assert gap(jnp.var(z, 0), left / (left + 1)) < 1e-5
            else:
                assert gap(np.linalg.eigvalsh(covariance(z)), left / (left + 1)) < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_never_well_conditioned_nor_a_constant(bad):
    x = array(data()).at[3, 1].set(bad)
    assert jnp.isnan(condition_number(x))
    assert jnp.isnan(jax.jit(jax.vmap(instruments.condition_number))(jnp.stack([x, x]))).all()
    for method in METHODS:
        assert jnp.isnan(whitening(x, method=method).matrix[1, 1]), method


def test_the_derivative_of_the_zscore_passes_a_constant_feature():
    x = array(data()).at[:, 2].set(0.1)

    def size(x):
        return (instruments.whitening(x, method="zscore").matrix ** 2).sum()

    slope = jax.jit(jax.grad(size))(x)
    assert jnp.isfinite(slope).all()
    assert jnp.abs(slope[:, 2]).max() == 0
    expected = -4 / N * (x - x.mean(0)) / jnp.var(x, 0) ** 2 / 2
    assert gap(slope[:, :2], expected[:, :2]) < 1e-4


def test_eps_is_added_to_the_variances(x64):
    x = array(data(), jnp.float64)
    variances = np.linalg.eigvalsh(covariance(x))
    for method in ("zca", "pca"):
        z = whiten(x, whitening(x, method=method, eps=0.5))
        assert (
            gap(np.linalg.eigvalsh(covariance(z)), np.sort(variances / (variances + 0.5))) < 1e-10
        )
    z = whiten(x, whitening(x, method="zscore", eps=0.5))
    assert gap(jnp.var(z, 0), x.var(0) / (x.var(0) + 0.5)) < 1e-12


def test_the_condition_is_that_of_the_covariance_and_whitening_makes_it_one(x64):
    x = array(data(), jnp.float64)
    assert gap(condition_number(x), np.linalg.cond(covariance(x))) < 1e-9
    assert gap(condition_number(whiten(x, whitening(x))), 1.0) < 1e-9
    dead = jnp.concatenate([x, jnp.ones((N, 2))], 1)
    assert gap(condition_number(dead), condition_number(x)) < 1e-9
    assert condition_number(jnp.ones((N, 2))) == 1


def test_scaling_alone_cures_the_condition_of_scales_and_not_that_of_correlations(x64):
    x = array(scales(), jnp.float64)
    z = whiten(x, whitening(x, method="zscore"))
    assert condition_number(x) > 1e5
    assert gap(condition_number(z), np.linalg.cond(np.corrcoef(scales(), rowvar=False))) < 1e-9
    assert condition_number(z) > 1.5


@pytest.mark.parametrize("method", METHODS)
def test_eager_and_vmapped_are_the_same(method):
    x = array(draw(5, 3, N, C))

    def z(x):
        return instruments.whiten(x, instruments.whitening(x, method=method))

    each = jnp.stack([z(one) for one in x])
    assert gap(jax.jit(jax.vmap(z))(x), each) < 1e-4


def test_leading_axes_are_examples_and_half_precision_keeps_its_type():
    x = array(data())
    w = whitening(x.reshape(8, 8, C))
    assert gap(w.matrix, whitening(x).matrix) < 1e-6
    half = x.astype(jnp.bfloat16)
    assert whitening(half).matrix.dtype == jnp.float32
    assert whiten(half.reshape(8, 8, C), w).dtype == jnp.bfloat16
    assert whiten(half.reshape(8, 8, C), w).shape == (8, 8, C)


def test_batch_norm_is_the_zscore_of_its_batch(x64):
    x = array(data(), jnp.float64)
    h, _ = nl.batch_norm(x, None, nl.init_running(C), train=True, eps=1e-12)
    assert gap(whiten(x, whitening(x, method="zscore")), h) < 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: whitening(x, method="zac"), "did you mean 'zca'"),
        (lambda x: whitening(x, eps=-1.0), "eps=-1.0"),
        (lambda x: whitening(x, method="minmax", eps=0.1), "minmax"),
        (lambda x: whitening(x[0]), "at least one axis of examples"),
        (lambda x: whitening(x[0], method="minmax"), "at least one axis of examples"),
        (lambda x: condition_number(x[0]), "at least one axis of examples"),
        (lambda x: whiten(x[:, 1:], whitening(x)), "of 5 features"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(array(data()))
