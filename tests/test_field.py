"""Answers that other libraries get wrong without a word, and the right ones.

Every test names a case. Where flax is a witness its wrong number is asserted too: when flax mends
it, the test fails, and that half of it is to be dropped. Two more cases are at home elsewhere: the
gradient recipes that differ by the number of devices, in `test_devices.py`, and the laws of
gradient accumulation, in `test_transforms.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normlab as nl
from tests import oracles
from tests.helpers import array, draw, gap


def linen(a, state=None, *, mask=None, jit=True, **options):
    """`(h, {"mean", "var"})` of linen's batch norm in training, without gain and bias."""
    channels = a.shape[-1]
    state = {"mean": jnp.zeros(channels), "var": jnp.ones(channels)} if state is None else state
    options = {"use_running_average": False, "use_scale": False, "use_bias": False} | options
    module = nn.BatchNorm(**options)

    def run(a, state, mask):
        h, after = module.apply({"batch_stats": state}, a, mask=mask, mutable=["batch_stats"])
        return h, after["batch_stats"]

    with jax.numpy_dtype_promotion("standard"):
        return (jax.jit(run) if jit else run)(a, state, mask)


def normlab(a, state=None, *, weights=None, **options):
    """`(h, state)` of normlab's, in training."""
    state = nl.init_running(a.shape[-1]) if state is None else state

    def run(a, state, weights):
        return nl.batch_norm(a, None, state, train=True, weights=weights, **options)

    return jax.jit(run)(a, state, weights)


# Devices.

SHARDS = draw(0, 4, 6, 3) + 2 * draw(1, 4, 1, 3)  # four devices of six examples, apart


def over_devices(f):
    return jax.jit(jax.vmap(f, axis_name="d"))


@pytest.mark.parametrize("counts", [(6, 3, 1, 2), (6, 3, 0, 2)], ids=["uneven", "one empty"])
def test_devices_weigh_by_what_they_have_seen(counts):
    """google/flax#2417: the mean of the devices' means, whatever each has left after its mask.

    A device with one valid example counts as much as one with six; one with none makes it all NaN.
    """
    mask = np.arange(6) < np.array(counts)[:, None]
    valid = SHARDS[mask]
    _, state = over_devices(
        lambda a, w: nl.batch_norm(
            a, None, nl.init_running(3), train=True, weights=w, axis_name="d"
        )
    )(array(SHARDS), jnp.asarray(mask))
    assert gap((state.mean[0], state.var[0]), (valid.mean(0), valid.var(0))) < 2e-6

    _, flax = over_devices(
        lambda a, w: linen(a, mask=w[:, None], axis_name="d", momentum=0.0, jit=False)
    )(array(SHARDS), jnp.asarray(mask))
    if 0 in counts:
        assert np.isnan(flax["mean"]).all()
    else:
        assert gap(flax["mean"][0], valid.mean(0)) > 0.1
        means = [shard[rows].mean(0) for shard, rows in zip(SHARDS, mask, strict=True)]
        assert gap(flax["mean"][0], np.mean(means, 0)) < 2e-6


def test_statistics_that_devices_kept_apart_are_pooled_with_the_variance_between_them():
    """google/flax#877: running statistics of devices that never spoke, averaged before inference.

    The average of the variances is the variance within the devices alone.
    """

    def own_then_pooled(a):
        _, state = nl.batch_norm(a, None, nl.init_running(3), train=True)
        return nl.population.pool_running(state, "d")

    pooled = over_devices(own_then_pooled)(array(SHARDS))
    whole = SHARDS.reshape(-1, 3)
    assert gap((pooled.mean[0], pooled.var[0]), (whole.mean(0), whole.var(0))) < 2e-6

    flax = over_devices(lambda a: linen(a, momentum=0.0, jit=False)[1]["var"])(array(SHARDS))
    assert (np.mean(flax, 0) < 0.7 * whole.var(0)).all()


# Precision.


@pytest.mark.parametrize(
    ("mean", "flax_off_by"), [(1e1, 1e-6), (1e2, 1e-4), (1e3, 1e-2), (1e4, 10)], ids=str
)
def test_a_large_mean_costs_no_digits_of_the_variance(mean, flax_off_by):
    """google/flax#1491, jax-ml/jax#37281: E[x²] − E[x]² in float32.

    Of a unit variance it leaves five digits at a mean of 10 and none at 10⁴. Where it comes out
    negative it is cut to 0, and the output is 1/√ε = 316 times too large.
    """
    a = draw(0, 256, 4, mean=mean).astype(np.float32)
    truth = a.astype(np.float64)
    h, state = normlab(jnp.asarray(a))
    assert gap(state.var, truth.var(0)) < 2e-6
    # The float32 numbers around μ are 6e-8·μ apart, and so is μ from the true mean.
    assert gap(h, oracles.batch(truth)) < 1e-7 * max(mean, 10)

    flax_h, flax = linen(jnp.asarray(a), momentum=0.0)
    assert gap(flax["var"], truth.var(0)) > flax_off_by
    assert mean < 1e4 or np.abs(flax_h).max() > 100


@pytest.mark.parametrize(
    ("dtype", "mean"), [("float16", 300.0), ("bfloat16", 10.0), ("bfloat16", 100.0)]
)
@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
def test_half_precision_is_measured_in_float32(dtype, mean, norm):
    """patrick-kidger/equinox#876, google/flax#612: statistics in the type of the input.

    300² is more than float16 holds, and at a mean of 10 bfloat16 keeps no digit of E[x²] − E[x]².
    Here the output is that of the same numbers in float64, rounded once.
    """
    a = array(draw(0, 8, 30, 6, mean=mean), dtype)
    wide = np.asarray(a, np.float64)
    options = {"batch": {"train": True}, "group": {"groups": 2}, "layer": {"axes": "all"}}[norm]
    oracle = {
        "batch": oracles.batch,
        "group": functools.partial(oracles.group, groups=2),
        "layer": functools.partial(oracles.layer, axes=None),
    }[norm]
    h = jax.jit(functools.partial(getattr(nl, f"{norm}_norm"), **options))(a)
    h = h[0] if norm == "batch" else h
    assert h.dtype == dtype
    assert gap(h, oracle(wide)) < jnp.finfo(dtype).eps


def test_what_comes_in_float32_is_measured_before_it_is_rounded():
    """nnx with dtype=bfloat16 rounds its float32 input first: at a mean of 100 to halves.

    With mixed precision here it is the output that is cast, by whoever wants it cast.
    """
    a = draw(0, 64, 4, mean=100.0)
    _, state = normlab(array(a))
    assert gap(state.var, a.astype(np.float32).astype(np.float64).var(0)) < 2e-6

    module = nnx.BatchNorm(
        4, momentum=0.0, dtype=jnp.bfloat16, use_running_average=False, rngs=nnx.Rngs(0)
    )
    with jax.numpy_dtype_promotion("standard"):
        module(array(a))
    assert gap(module.var[...], a.var(0)) > 0.03


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
def test_integers_have_a_mean_that_is_no_integer(dtype):
    """Elsewhere the mean is cut to the input's type, or the result is NaN."""
    a = array(np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, (16, 3)), dtype)
    wide = np.asarray(a, np.float64)
    h, state = normlab(a)
    assert h.dtype == jnp.float32
    assert gap(h, oracles.batch(wide)) < 2e-6
    assert gap((state.mean, state.var), (wide.mean(0), wide.var(0))) < 2e-6
    assert gap(jax.jit(nl.layer_norm)(a), oracles.layer(wide)) < 2e-6


# Running statistics.


def test_after_one_batch_the_statistics_are_those_of_the_batch():
    """patrick-kidger/equinox#955, google-deepmind/dm-haiku#361: an average that starts at 0 and 1.

    After one step it is 99% its start; dividing that by 1 − decay is as wrong, since the variance
    does not start at 0.
    """
    a = draw(0, 16, 3, scale=2.0)
    _, state = normlab(array(a), decay=0.99)
    assert gap((state.mean, state.var), (a.mean(0), a.var(0))) < 2e-6

    _, flax = linen(array(a))
    assert gap(flax["var"], 0.99 + 0.01 * a.var(0)) < 2e-6
    naive = np.asarray(flax["var"]) / (1 - 0.99)
    assert (naive > 10 * a.var(0)).all()


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.999999])
def test_a_slow_average_of_half_precision_batches_is_right_from_the_first_on(decay):
    """1 − 0.999 is 0 in bfloat16, and dividing by 1 − decay^t is 0/0. The mass is float32."""
    a = array(draw(0, 3, 64, 2, mean=2.0), "bfloat16")
    wide, state = np.asarray(a, np.float64), nl.init_running(2)
    for i, batch in enumerate(a):
        _, state = normlab(batch, state, decay=decay)
        weights = decay ** np.arange(i + 1)[::-1]
        mean = np.average(wide[: i + 1].mean(1), 0, weights)
        var = np.average(wide[: i + 1].var(1), 0, weights)
        assert gap((state.mean, state.var), (mean, var)) < 2e-6


def _batch_of(kind):
    a = draw(1, 6, 3)
    if kind == "NaN":
        a[2, 1] = np.nan
    return a[:0] if kind == "empty" else a, np.zeros(6) if kind == "masked" else None


@pytest.mark.parametrize("kind", ["NaN", "empty", "masked"])
def test_a_bad_batch_does_not_poison_the_statistics_for_good(kind):
    """One batch with a NaN, of no examples, or with all of them masked: NaN from then on.

    Here it is left out, and counted, and the next good batch is as if it had not been.
    """
    good, (bad, mask) = draw(0, 6, 3), _batch_of(kind)
    weights = None if mask is None else array(mask)
    _, state = normlab(array(bad), weights=weights)
    _, state = normlab(array(good), state)
    assert (state.updates, state.skipped) == (1, 1)
    assert gap((state.mean, state.var), (good.mean(0), good.var(0))) < 2e-6

    _, flax = linen(array(bad), mask=None if mask is None else jnp.zeros((6, 1), bool))
    _, flax = linen(array(good), flax)
    assert np.isnan(flax["var"]).any()


def test_a_batch_of_one_is_an_error_and_not_an_output_of_zeros():
    """Its variance is zero and its output the bias, whatever the input: nothing is learned."""
    one = array([[7.0, -3.0, 2.0]])
    with pytest.raises(ValueError, match="one value per channel"):
        nl.batch_norm(one, None, nl.init_running(3), train=True)
    h, _ = linen(one)
    assert (h == 0).all()


# Masks.


def test_a_masked_nan_reaches_no_gradient_of_the_valid():
    """jax-ml/jax#26328: the statistics are clean, and yet every gradient is NaN.

    0·NaN is NaN in the backward pass, where the masked value meets a cotangent of zero.
    """
    a, mask = draw(0, 6, 3), np.arange(6) != 2
    dirty = array(np.where(mask[:, None], a, np.nan))

    def gradient(norm):
        def loss(a):
            return (jnp.where(jnp.asarray(mask)[:, None], norm(a), 0) ** 3).sum()

        return jax.jit(jax.grad(loss))(dirty)

    ours = gradient(lambda a: nl.batch_norm(a, train=True, weights=jnp.asarray(mask))[0])
    (expected,) = oracles.gradient(lambda a: (oracles.batch(a) ** 3).sum(), a[mask])
    assert gap(ours[mask], expected) < 5e-5
    assert (ours[2] == 0).all()

    flax = gradient(lambda a: linen(a, mask=jnp.asarray(mask)[:, None], jit=False)[0])
    assert np.isnan(flax).all()


def test_a_mask_of_the_examples_is_never_one_of_the_channels():
    """Shape [N] broadcast from the right is [C] where N = C: it masks channels, in silence."""
    a, mask = draw(0, 3, 3), np.array([True, True, False])
    _, state = normlab(array(a), weights=jnp.asarray(mask))
    assert gap((state.mean, state.var), (a[:2].mean(0), a[:2].var(0))) < 2e-6

    _, flax = linen(array(a), mask=jnp.asarray(mask), momentum=0.0)
    assert gap(flax["mean"][:2], a.mean(0)[:2]) < 2e-6  # all examples of two channels,
    assert np.isnan(flax["mean"][2])  # and none of the third


def test_weights_are_weights_and_not_a_mask():
    """An example of weight 0.25 counts a quarter; cast to a mask it would count whole."""
    a, weights = draw(0, 6, 3), np.array([1, 0.5, 0, 2, 0.25, 1])
    _, state = normlab(array(a), weights=array(weights))
    mean = np.average(a, 0, weights)
    assert gap((state.mean, state.var), (mean, np.average((a - mean) ** 2, 0, weights))) < 2e-6

    _, flax = linen(array(a), mask=array(weights)[:, None], momentum=0.0)
    assert gap(flax["mean"], a[weights > 0].mean(0)) < 2e-6


# Lengths.


def linen_weight_norm(v):
    wrapped = nn.WeightNorm(nn.Dense(v.shape[-1], use_bias=False))
    params = {"layer_instance": {"kernel": v}, "layer_instance/kernel/scale": jnp.ones(v.shape[-1])}
    return wrapped.apply({"params": params}, jnp.eye(v.shape[0]))


def test_a_unit_of_zero_weights_has_a_gradient_of_its_gain():
    """google/flax#1671, pytorch/pytorch#19126: NaN, or 1e6 with ε in the root to avoid it."""
    v, c = draw(0, 5, 4), draw(1, 5, 4)
    v[:, 1] = 0

    def gradient(norm):
        return jax.jit(jax.grad(lambda v: (array(c) * norm(v)).sum()))(array(v))

    assert gap(gradient(nl.weight_norm)[:, 1], c[:, 1]) < 1e-6
    assert np.abs(gradient(linen_weight_norm)[:, 1]).max() > 1e5


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_weights_of_any_length_normalize_to_one(scale):
    """‖v‖² under- or overflows float32: to a norm of 1e-14, or of 0."""
    v = array(scale * draw(0, 5, 4))

    def lengths(w):
        return np.linalg.norm(np.asarray(w, np.float64), axis=0)

    assert gap(lengths(nl.weight_norm(v)), np.ones(4)) < 1e-6
    assert (lengths(linen_weight_norm(v)) < 1e-10).all()


def test_a_cosine_with_nothing_is_zero_and_has_finite_gradients():
    """w·x/(‖w‖‖x‖), as one would write it, is 0/0 for a zero vector."""
    x, w = draw(0, 3, 5), draw(1, 5, 4)
    x[1], w[:, 2] = 0, 0

    def naive(x, w):
        return x @ w / (jnp.linalg.norm(x, axis=1)[:, None] * jnp.linalg.norm(w, axis=0))

    def both(norm):
        return jax.jit(jax.value_and_grad(lambda x, w: norm(x, w).sum(), (0, 1)))(
            array(x), array(w)
        )

    h = nl.cosine_norm(array(x), array(w))
    assert (h[1] == 0).all()
    assert (h[:, 2] == 0).all()
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(both(nl.cosine_norm)))
    assert all(np.isnan(v).any() for v in jax.tree.leaves(both(naive)))


# Input that does not fit.


def test_what_does_not_fit_is_said():
    """The statistics of another layer broadcast in silence where there is no gain; so do options.

    ε = −1 gives the root of a negative number, a momentum of 1.5 an average that runs away.
    """
    a, one = array(draw(0, 8, 3)), {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    for state, options, words in (
        (nl.init_running(1), {}, r"running statistics of shape \(1,\)"),
        (None, {"eps": -1.0}, "eps=-1.0"),
        (None, {"decay": 1.5}, "decay=1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            normlab(a, state, **options)

    assert linen(a, one)[0].shape == (8, 3)
    h, state = linen(a, epsilon=-1.0, momentum=1.5)
    assert np.isnan(h).any()
    assert np.isfinite(state["mean"]).all()


# Gradient accumulation and rematerialization.


def test_four_microbatches_are_one_batch():
    """Updated once for each, the statistics move four times and miss the variance between them."""
    micro = draw(0, 4, 6, 3) + 2 * draw(1, 4, 1, 3)
    whole = micro.reshape(-1, 3)

    @jax.jit
    def accumulated(micro):
        m = functools.reduce(nl.measure.merge, (nl.moments(batch, 0) for batch in micro))
        return nl.init_running(3).update(m)

    state = accumulated(array(micro))
    assert state.updates == 1
    assert gap((state.mean, state.var), (whole.mean(0), whole.var(0))) < 2e-6

    flax = None
    for batch in micro:
        _, flax = linen(array(batch), flax, momentum=0.0)
    assert gap(flax["var"], whole.var(0)) > 0.3


def test_a_forward_pass_that_is_run_again_updates_once():
    """pytorch/pytorch#96136: with checkpointing the statistics are updated twice a step."""
    a = draw(0, 8, 3, mean=2.0)

    def loss(a):
        h, state = jax.checkpoint(
            lambda a: nl.batch_norm(a, None, nl.init_running(3, ddof=1), train=True)
        )(a)
        return jnp.tanh(h).sum(), state

    _, state = jax.jit(jax.grad(loss, has_aux=True))(array(a))
    assert state.updates == 1
    assert gap(state.mean, a.mean(0)) < 2e-6

    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm1d(3)
    x = torch.tensor(a.astype(np.float32), requires_grad=True)
    again = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    torch.tanh(again).sum().backward()
    assert module.num_batches_tracked.item() == 2


# Tiny inputs.


@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-5, 1e-12])
def test_epsilon_is_a_variance_and_scales_with_the_data(scale):
    """With ε = 1e-5 data of standard deviation s come out with s/√(s² + ε): 0.30 at 1e-3.

    That is the definition, in every library, and easily missed. ε is in squared units of the
    data: ε·s² for data s times as large gives the same output and statistics, to float32's last
    digit, and 1/s times the gradient.
    """
    a, c = draw(0, 64, 3), array(draw(1, 64, 3))
    s = float(np.float32(scale))

    @functools.partial(jax.jit, static_argnames="eps")
    def run(a, eps):
        def loss(a):
            h, state = nl.batch_norm(a, None, nl.init_running(3), train=True, eps=eps)
            return (c * jnp.tanh(h)).sum(), (h, state)

        grad, (h, state) = jax.grad(loss, has_aux=True)(a)
        return h, grad, state.mean, state.var

    h, *_ = run(array(s * a), 1e-5)
    deviation = s * a.std(0)
    assert gap(h.std(0), deviation / np.sqrt(deviation**2 + 1e-5)) < 2e-6

    h, grad, mean, var = run(array(a), 1e-5)
    got = run(array(s * a), 1e-5 * s**2)
    units = (1, s, 1 / s, 1 / s**2)
    scaled = [np.asarray(v, np.float64) * unit for v, unit in zip(got, units, strict=True)]
    assert gap(scaled, (h, grad, mean, var)) < 5e-6
    assert gap(h.std(0), np.ones(3)) < 1e-4
