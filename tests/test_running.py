"""Running statistics, inference, and what the batch norm paper claims exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import normlab as nl
from tests.helpers import array, draw, gap

N, C = 8, 3
BATCHES = draw(0, 6, N, C, mean=2.0, scale=3.0) + draw(1, 6, 1, C)


def after(batches, state=None, *, decay=0.9, ddof=0, weights=None):
    """The state after some batches."""
    state = nl.init_running(C, ddof=ddof) if state is None else state
    for batch in batches:
        _, state = nl.batch_norm(
            array(batch), None, state, train=True, decay=decay, weights=weights
        )
    return state


def averaged(batches, statistic, decay):
    """The exponentially weighted average of a statistic of the batches, weights normalized."""
    weights = decay ** np.arange(len(batches))[::-1]
    return np.average([statistic(b) for b in batches], 0, weights)


# The average.


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_debiased_is_the_weighted_average_of_the_batches_from_the_first_on(decay, steps):
    batches = BATCHES[:steps]
    state = after(batches, decay=decay)
    assert gap(state.mean, averaged(batches, lambda b: b.mean(0), decay)) < 2e-6
    assert gap(state.var, averaged(batches, lambda b: b.var(0), decay)) < 2e-6
    assert state.updates == steps
    assert state.skipped == 0
    assert abs(state.mass - (1 - decay**steps)) < 1e-6


def test_the_first_update_is_the_batch_to_the_last_digit():
    x = 1e-3 * np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    m = nl.moments(jnp.asarray(x), 0)
    mean, var = nl.init_running(5).update(m).read()
    assert (mean == m.mean.ravel()).all()
    assert (var == m.var().ravel()).all()


def test_biased_is_the_plain_average_that_starts_at_mean_0_and_variance_1():
    mean, var = np.zeros(C), np.ones(C)
    state = nl.init_running(C, debias=False)
    assert gap((state.mean, state.var), (mean, var)) == 0
    for batch in BATCHES:
        mean = 0.8 * mean + 0.2 * batch.mean(0)
        var = 0.8 * var + 0.2 * batch.var(0)
        state = after([batch], state, decay=0.8)
        assert gap((state.mean, state.var), (mean, var)) < 2e-6


def test_registry_passes_decay_ddof_and_population_on():
    norm = nl.get("batch", decay=0.5, ddof=1, population="ema")
    site = nl.Site(array(BATCHES[0]))
    params, state = norm.init(site)
    _, state = norm.apply(params, state, site, train=True)
    start = nl.init_running(C, decay=0.5, ddof=1, debias=False)
    expected = after(BATCHES[:1], start, decay=None)
    assert gap(state, expected) == 0


@pytest.mark.parametrize("decay", [-0.1, 1, 1.0, 1.5, float("nan")])
def test_decay_is_the_weight_of_the_old_value_and_below_one(decay):
    with pytest.raises(ValueError, match=r"decay=.*\[0, 1\).*weight of the old value"):
        after(BATCHES[:1], decay=decay)


def test_decay_zero_is_the_last_batch():
    assert gap(after(BATCHES, decay=0).var, BATCHES[-1].var(0)) < 2e-6


def test_ddof_changes_the_running_variance_and_not_the_output():
    """Var = m/(m − 1) · E σ² (algorithm 2); the batch itself is normalized by σ."""
    h, biased = nl.batch_norm(array(BATCHES[0]), None, nl.init_running(C), train=True)
    same, unbiased = nl.batch_norm(array(BATCHES[0]), None, nl.init_running(C, ddof=1), train=True)
    assert gap(same, h) == 0
    assert gap(unbiased.mean, biased.mean) == 0
    assert gap(unbiased.var, BATCHES[0].var(0, ddof=1)) < 2e-6
    assert gap(biased.var, BATCHES[0].var(0)) < 2e-6


def test_ddof_counts_the_positions_of_a_convolution():
    """m' = m·p·q."""
    a = draw(0, 2, 3, 4, C)
    _, state = nl.batch_norm(array(a), None, nl.init_running(C, ddof=1), train=True)
    assert gap(state.var, a.reshape(-1, C).var(0, ddof=1)) < 2e-6


def test_ddof_counts_the_valid_examples():
    mask = np.arange(N) < 5
    state = after(BATCHES[:1], ddof=1, weights=jnp.asarray(mask))
    assert gap(state.var, BATCHES[0][mask].var(0, ddof=1)) < 2e-6


# Bad data.


def _spoiled(value):
    batch = BATCHES[1].copy()
    batch[3, 1] = value
    return batch


@pytest.mark.parametrize(
    ("batch", "mask"),
    [
        pytest.param(_spoiled(np.nan), None, id="NaN"),
        pytest.param(_spoiled(np.inf), None, id="inf"),
        pytest.param(_spoiled(3e38), None, id="overflow"),
        pytest.param(np.ones((0, C)), None, id="empty"),
        pytest.param(BATCHES[1], np.zeros(N), id="masked"),
        pytest.param(_spoiled(np.nan), np.zeros(N), id="masked NaN"),
    ],
)
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_batch_is_skipped_and_counted(batch, mask, debias, first):
    """First or later, the next good batch is taken in as if the bad one had not been."""
    state = nl.init_running(C, debias=debias)
    state = state if first else after(BATCHES[:1], state)
    weights = None if mask is None else array(mask)
    spoiled = after([batch], state, weights=weights)
    assert gap(spoiled, state._replace(skipped=jnp.int32(1))) == 0
    recovered = after([BATCHES[2]], spoiled)
    assert gap(recovered, after([BATCHES[2]], state)._replace(skipped=jnp.int32(1))) == 0


def test_a_masked_nan_spoils_nothing():
    batch, mask = _spoiled(np.nan), np.arange(N) != 3
    state = after([batch], weights=jnp.asarray(mask))
    assert gap(state.mean, batch[mask].mean(0)) < 2e-6
    assert gap(state.var, batch[mask].var(0)) < 2e-6
    assert state.skipped == 0


# Gradients.


def test_no_gradient_flows_into_the_state():
    def through_state(a, params, old):
        _, state = nl.batch_norm(a, params, nl.init_running(C)._replace(mean=old), train=True)
        return (state.mean + state.var).sum() + state.mass

    args = array(BATCHES[0]), nl.init_affine(C), jnp.ones(C)
    da, dparams, dold = jax.grad(through_state, (0, 1, 2))(*args)
    assert gap((da, dparams), jax.tree.map(np.zeros_like, (da, dparams))) == 0
    assert np.isfinite(dold).all()


def test_keeping_statistics_does_not_change_the_gradient():
    def loss(a, state):
        h, _ = nl.batch_norm(a, None, state, train=True)
        return (h**3).sum()

    a = array(BATCHES[0])
    grad = jax.jit(jax.grad(loss))
    assert gap(grad(a, nl.init_running(C)), grad(a, None)) < 1e-6


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "group", "instance"])
@pytest.mark.parametrize("form", ["plain", "registry"])
def test_a_masked_nan_reaches_no_gradient_of_the_valid(norm, form):
    """The output of a masked position is nobody's business; the gradients of the others are."""
    a, mask = draw(0, 4, 5, 6), np.ones((4, 5), np.float32)
    mask[:, 3:] = 0
    dirty = np.where(mask[..., None] > 0, a, np.nan)
    options = {"layer": {"axes": "all"}, "rms": {"axes": "all"}, "group": {"groups": 2}}.get(
        norm, {}
    )
    params = nl.Affine(array(draw(1, 6)), array(draw(2, 6)))

    def apply(a, params, w):
        if form == "registry":
            state = nl.init_running(6) if norm == "batch" else ()
            site = nl.Site(a, weights=w)
            return nl.get(norm, **options).apply(params, state, site, train=True)[0]
        if norm == "batch":
            return nl.batch_norm(a, params, train=True, weights=w)[0]
        return getattr(nl, f"{norm}_norm")(a, params, weights=w, **options)

    def loss(a, params, w):
        h = apply(a, params, w)
        return (jnp.where(w[..., None] > 0, h, 0) ** 3).sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))
    da, dparams = grads(array(dirty), params, array(mask))
    da_subset, dparams_subset = grads(array(a[:, :3]), params, jnp.ones((4, 3)))
    assert gap(dparams, dparams_subset) < 5e-6
    assert gap(da[:, :3], da_subset) < 5e-5
    assert (da[:, 3:] == 0).all()


# Inference.


def test_inference_normalizes_by_the_state():
    state = after(BATCHES)
    params = nl.Affine(array(draw(5, C)), array(draw(6, C)))
    h, same = nl.batch_norm(array(BATCHES[0]), params, state, train=False, eps=0.1)
    expected = (BATCHES[0] - state.mean) / np.sqrt(np.asarray(state.var) + 0.1)
    assert gap(h, expected * params.g + params.b) < 2e-6
    assert gap(same, state) == 0


def test_a_prediction_is_the_same_alone_and_in_a_batch():
    state = after(BATCHES)
    a = array(BATCHES[3])
    together, _ = nl.batch_norm(a, None, state, train=False)
    alone = jnp.concatenate([nl.batch_norm(row, None, state, train=False)[0] for row in a[:, None]])
    assert gap(alone, together) == 0


def _fold_cases():
    dense = nl.Dense(), (5, 4), (4, C)
    conv = (2, 5, 6, 4), (3, 3, 4, C)
    return [
        pytest.param(*dense, id="dense"),
        pytest.param(nl.Conv(strides=2), *conv, id="conv"),
        pytest.param(nl.Conv(padding="VALID"), *conv, id="conv-valid"),
        pytest.param(nl.Conv(channel_axis=1), *conv, id="conv-first"),
    ]


@pytest.mark.parametrize(("linear", "x", "w"), _fold_cases())
@pytest.mark.parametrize("bias", [True, False])
def test_inference_folds_into_the_layer_before(linear, x, w, bias):
    x, w = array(draw(0, *x)), array(draw(1, *w))
    x = jnp.moveaxis(x, -1, linear.channel_axis)
    bias = array(draw(2, C)) if bias else None
    spread = (C, *[1] * (x.ndim - 2)) if linear.channel_axis == 1 else (C,)
    a = linear(x, w) + (0.0 if bias is None else bias.reshape(spread))
    params = nl.Affine(array(draw(3, C)), array(draw(4, C)))
    state = nl.Running(array(draw(5, C)), array(draw(6, C) ** 2), *nl.init_running(C)[2:])
    parts, _ = nl.batch_parts(a, params, state, train=False, channel_axis=linear.channel_axis)
    kernel, folded_bias = nl.folding.fold(parts, w, bias)
    assert (kernel.shape, kernel.dtype) == (w.shape, w.dtype)
    assert folded_bias.shape == (C,)
    assert gap(linear(x, kernel) + folded_bias.reshape(spread), nl.affine(parts, a)) < 5e-6


def test_numbers_fold_as_parts():
    parts = nl.Parts(*map(jnp.float32, (1.0, 2.0, 3.0, 10.0)))
    kernel, bias = nl.folding.fold(parts, jnp.ones((2, C)), jnp.ones(C))
    assert gap((kernel, bias), (np.full((2, C), 1.5), np.full(C, 10.0))) == 0


def test_folding_keeps_a_half_precision_kernel():
    parts, _ = nl.batch_parts(jnp.ones((N, C)), None, nl.init_running(C), train=False)
    kernel, _ = nl.folding.fold(parts, jnp.ones((2, C), "bfloat16"), jnp.ones(C, "bfloat16"))
    assert kernel.dtype == "bfloat16"


# The paper's exact statements.


@pytest.mark.parametrize("train", [True, False])
def test_gain_and_bias_can_restore_the_identity(train):
    """γ = √(Var + ε), β = E. The paper's γ = √Var is off by ε."""
    a, eps = array(BATCHES[0]), 0.01
    state = after([BATCHES[0]])
    g, b = jnp.sqrt(state.var + eps), state.mean
    h, _ = nl.batch_norm(a, nl.Affine(g, b), state, train=train, eps=eps)
    assert gap(h, a) < 2e-6
    h, _ = nl.batch_norm(a, nl.Affine(jnp.sqrt(state.var), b), state, train=train, eps=eps)
    assert gap(h, a) > 1e-4


def test_a_larger_weight_has_the_same_output_and_a_smaller_gradient(x64):
    """BN((sW)u) = BN(Wu), ∂/∂(sW) = 1/s ∂/∂W, and the gradient is orthogonal to W."""
    u, w, c = (jnp.asarray(draw(i, *s)) for i, s in enumerate([(N, 4), (4, C), (N, C)]))

    def loss(w):
        h, _ = nl.batch_norm(u @ w, None, train=True, eps=1e-30)
        return (c * h).sum(), h

    for s in (0.01, 7.0):
        big, h_big = jax.grad(loss, has_aux=True)(s * w)
        grad, h = jax.grad(loss, has_aux=True)(w)
        assert gap(h_big, h) < 1e-10
        assert gap(s * big, grad) < 1e-10
        assert np.abs((w * grad).sum(0)).max() < 1e-10 * np.abs(grad).max()


@pytest.mark.parametrize("ignored", [True, False])
def test_ignoring_the_gradient_of_the_mean_lets_the_bias_grow_at_constant_loss(ignored, x64):
    """Section 2: x = u + b; the step b ← b − η ∂ℓ/∂b, if it ignores E[x], changes nothing but b."""
    u, c = jnp.asarray(draw(0, N, 1)), jnp.asarray(draw(1, N, 1))

    def loss(b):
        a = u + b
        parts, _ = nl.batch_parts(a, None, None, train=True)
        if ignored:
            parts = parts._replace(mu=lax.stop_gradient(parts.mu))
        return (c * nl.affine(parts, a)).sum()

    def step(b, _):
        value, grad = jax.value_and_grad(loss)(b)
        return b - 0.1 * grad, (b - 0.1 * grad, value)

    _, (b, losses) = lax.scan(step, jnp.zeros(()), length=1000)
    assert np.ptp(losses) < 1e-6
    if ignored:
        assert abs(abs(b[999]) / abs(b[99]) - 10) < 0.1
        assert abs(b[999]) > 10
    else:
        assert np.abs(b).max() < 1e-6


def test_a_schedule_that_starts_at_decay_one_waits_for_the_first_update():
    a = array(draw(0, 8, 3))
    step = jax.jit(lambda state, decay: nl.batch_norm(a, None, state, train=True, decay=decay)[1])
    state = step(nl.init_running(3), 1.0)
    assert state.mass == 0
    assert gap(state.mean, np.zeros(3)) == 0
    assert gap(step(state, 0.9).mean, a.mean(0)) < 1e-6
