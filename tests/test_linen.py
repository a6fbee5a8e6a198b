"""The skins of `flax.linen`: flax's own modules are the oracle, where they are right."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax import flatten_util

import normlab as nl
import normlab.linen as nll
from tests.helpers import array, draw, gap

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default one
X = array(draw(0, 4, 3, 6, mean=1.0))
WEIGHT = array(draw(1, 4, 3, 6))
EPS = 0.1  # far from every default
AFFINE = {"scale_init": nn.initializers.normal(1.0), "bias_init": nn.initializers.normal(1.0)}
TRAIN = {"use_running_average": False}
CASES = {
    "batch": ("BatchNorm", TRAIN | AFFINE),
    "batch, other axis": ("BatchNorm", TRAIN | {"axis": 1, "momentum": 0.7, "use_bias": False}),
    "batch, two axes": ("BatchNorm", TRAIN | AFFINE | {"axis": (1, 2), "epsilon": 1e-3}),
    "batch, inference": ("BatchNorm", {"use_running_average": True} | AFFINE),
    "layer": ("LayerNorm", {"use_fast_variance": False}),
    "layer, axes": ("LayerNorm", AFFINE | {"reduction_axes": (0, 2), "feature_axes": (1, 2)}),
    "rms": ("RMSNorm", {}),
    "rms, axes": ("RMSNorm", {"reduction_axes": (1, 2), "feature_axes": 1, "epsilon": 1e-2}),
    "group": ("GroupNorm", {"num_groups": None, "group_size": 2}),
    "group, axes": ("GroupNorm", AFFINE | {"num_groups": 3, "reduction_axes": (0, -1)}),
    "instance": ("InstanceNorm", {"use_fast_variance": False}),
    "instance, other axis": ("InstanceNorm", {"feature_axes": 1}),
}
NORMS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
MASKED = {
    "BatchNorm": TRAIN,
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 2},
    "InstanceNorm": {"use_fast_variance": False},  # three values: flax's one pass is 1e-5 off
}


def init(module, x, *args, **kwargs):
    return jax.jit(lambda x: module.init(KEY, x, *args, **kwargs))(x)


def made(module, x):
    """Output and variables."""
    return jax.jit(lambda x: module.init_with_output(KEY, x))(x)


def call(module, variables, x, *args, mutable=False, **kwargs):
    def run(variables, x):
        return module.apply(variables, x, *args, mutable=mutable, **kwargs)

    return jax.jit(run)(variables, x)


def batch_norm(x, state, **options):
    return jax.jit(lambda x, state: nl.batch_norm(x, None, state, **options))(x, state)


def cosine_norm(x, params, **options):
    affine = nl.Affine(params["scale"], params["bias"])
    run = functools.partial(nl.cosine_norm, **options)
    return jax.jit(run)(x, params["kernel"], affine)


def both(name, options):
    return getattr(nn, name)(**options), getattr(nll, name)(**options)


def variables_of(module, x=X):
    """Fresh variables, the statistics moved away from 0 and 1."""
    variables = init(module, x)
    if "batch_stats" in variables:
        stats = jax.tree.map(lambda v: v + 0.3, variables["batch_stats"])
        variables = variables | {"batch_stats": stats}
    return variables


def train(module, variables, x, **options):
    """Output, gradients by parameters and input, and what the call changed."""
    params = variables.get("params", {})
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params, x):
        h, changed = module.apply({"params": params, **rest}, x, mutable=["batch_stats"], **options)
        return (h * WEIGHT.reshape(h.shape)).sum(), (h, changed)

    grads, (h, changed) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return h, changed, grads


@pytest.mark.parametrize("case", CASES)
def test_variables_outputs_gradients_and_statistics_are_flaxs(case):
    theirs, ours = both(*CASES[case])
    variables = variables_of(theirs)
    assert jax.tree.structure(variables) == jax.tree.structure(variables_of(ours))
    assert gap(variables_of(ours), variables) == 0
    run = jax.jit(lambda v, x: (train(ours, v, x), train(theirs, v, x)))
    (h, changed, grads), expected = run(variables, X)
    assert gap(h, expected[0]) < 1e-6
    assert gap(changed, expected[1]) < 1e-6
    assert gap(grads, expected[2]) < 1e-5


def test_a_skin_compiles_to_the_program_of_the_plain_function():
    module = nll.BatchNorm(**TRAIN)
    variables = init(module, X)

    def skin(params, stats, x):
        both = {"params": params, "batch_stats": stats}
        h, changed = module.apply(both, x, mutable=["batch_stats"])
        return (h**2).sum(), changed["batch_stats"]

    def plain(params, stats, x):
        state = nl.population.init_population("ema", 6, decay=0.99)._replace(**stats)
        affine = nl.Affine(params["scale"], params["bias"])
        h, state = nl.batch_norm(x, affine, state, train=True)
        return (h**2).sum(), {"mean": state.mean, "var": state.var}

    def operations(loss):
        grad = jax.jit(jax.grad(loss, (0, 2), has_aux=True))
        text = grad.lower(variables["params"], variables["batch_stats"], X).compile().as_text()
        return sorted(re.findall(r"= \S+ (\w+)\(", text))

    assert operations(skin) == operations(plain)


@pytest.mark.parametrize("name", [*NORMS, "WeightNorm", "SpectralNorm"])
def test_arguments_are_flaxs_in_order_and_defaults_and_more_come_last(name):
    def fields(module):
        skip = {"parent", "name"}
        return [f for f in dataclasses.fields(module) if f.name not in skip]

    theirs, ours = (fields(getattr(m, name)) for m in (nn, nll))
    assert [f.name for f in ours[: len(theirs)]] == [f.name for f in theirs]
    for mine, other in zip(ours, theirs, strict=False):
        if other.name not in ("bias_init", "scale_init", "variable_filter"):
            assert mine.default == other.default, mine.name
    assert {f.name for f in ours[len(theirs) :]} <= {"population", "implementation"}


@pytest.mark.parametrize("name", NORMS)
def test_what_a_mask_leaves_out_counts_for_nothing_and_the_rest_is_flaxs(name):
    mask = np.random.default_rng(3).random(X.shape) < 0.6
    mask[..., :2, :] = True
    theirs, ours = both(name, MASKED[name])
    variables = init(theirs, X)
    a = jnp.where(mask, X, 7.0)
    (expected, stats), (h, changed) = (
        call(m, variables, a, mask=mask, mutable=["batch_stats"]) for m in (theirs, ours)
    )
    assert gap(jnp.where(mask, h, 0), jnp.where(mask, expected, 0)) < 2e-6
    assert gap(changed, stats) < 1e-6
    h, changed = call(
        ours, variables, jnp.where(mask, X, jnp.nan), mask=mask, mutable=["batch_stats"]
    )
    assert gap(jnp.where(mask, h, 0), jnp.where(mask, expected, 0)) < 2e-6
    assert gap(changed, stats) < 1e-6


def test_a_mask_may_have_the_rank_of_the_input_or_its_first_or_its_last_axes():
    ours = nll.BatchNorm(**TRAIN)
    variables = init(ours, X)
    mask = np.array([1, 1, 0, 1], bool)
    run = functools.partial(call, ours, variables, X, mutable=["batch_stats"])
    _, expected = run(mask=mask[:, None, None])
    assert gap(run(mask=mask)[1], expected) == 0
    positions = np.array([[1], [0], [1]], bool)
    assert gap(run(mask=positions)[1], run(mask=positions[None])[1]) == 0
    halves = run(mask=mask * 0.5)[1]
    assert gap(halves, expected) < 1e-6
    with pytest.raises(ValueError, match="could mean its first axes or its last"):
        init(ours, X[:, 0, :4], mask=mask)
    with pytest.raises(ValueError, match="broadcasts to it"):
        run(mask=np.ones(5, bool))
    with pytest.raises(ValueError, match="rank 0"):
        run(mask=True)


@pytest.mark.parametrize("name", NORMS)
def test_types_of_results_and_variables_are_flaxs(name):
    types = (jnp.float32, jnp.bfloat16, jnp.float16)
    for x in (*types[:2], jnp.int32):
        for dtype in (None, *types[1:]):
            for param in types[:2]:
                options = MASKED[name] | {"dtype": dtype, "param_dtype": param}
                with jax.numpy_dtype_promotion("standard"):
                    theirs, ours = (
                        jax.eval_shape(
                            lambda a, m=m: m.init_with_output(KEY, a), jnp.ones(X.shape, x)
                        )
                        for m in both(name, options)
                    )
                assert ours == theirs, (x, dtype, param)


def test_half_precision_in_gives_what_the_rounded_input_gives_in_float32():
    x = X.astype(jnp.bfloat16)
    for name in NORMS:
        _, ours = both(name, MASKED[name] | {"dtype": jnp.float32})
        variables = init(ours, X)
        run = functools.partial(call, ours, variables, mutable=["batch_stats"])
        assert gap(run(x), run(x.astype(jnp.float32))) < 1e-6


@pytest.mark.parametrize("name", ["BatchNorm", "RMSNorm"])
def test_float64_is_float64_all_the_way(name, x64):
    x = draw(0, 4, 3, 6, mean=1.0)
    theirs, ours = both(name, MASKED[name] | {"dtype": jnp.float64})
    with jax.numpy_dtype_promotion("standard"):
        variables = init(theirs, x)
        expected, _ = call(theirs, variables, x, mutable=["batch_stats"])
    h, _ = call(ours, variables, x, mutable=["batch_stats"])
    assert h.dtype == jnp.float64
    assert gap(h, expected) < 1e-12
    h, _ = call(ours, variables, x.astype(np.float32), mutable=["batch_stats"])
    assert h.dtype == jnp.float64
    assert gap(h, expected) < 1e-6


def test_running_statistics_lie_in_param_dtype_without_forced_float32():
    options = TRAIN | {"force_float32_reductions": False, "param_dtype": jnp.float16}
    theirs, ours = both("BatchNorm", options)
    variables = init(ours, X)
    with jax.numpy_dtype_promotion("standard"):
        assert jax.eval_shape(ours.init, KEY, X) == jax.eval_shape(theirs.init, KEY, X)
    x = (X + 3).astype(jnp.float16)  # of a wider input they are as wide
    _, changed = call(ours, variables, x, mutable=["batch_stats"])
    exact = nll.BatchNorm(**TRAIN)
    _, expected = call(exact, init(exact, X), X + 3, mutable=["batch_stats"])
    assert changed["batch_stats"]["mean"].dtype == jnp.float16
    assert gap(changed, expected) < 2e-3


def test_use_running_average_is_given_once_at_either_place():
    x = X
    inside, outside = nll.BatchNorm(use_running_average=True), nll.BatchNorm()
    variables = variables_of(inside)
    assert gap(call(outside, variables, x, True), call(inside, variables, x)) == 0
    for module, args in ((inside, (x, True)), (outside, (x,))):
        with pytest.raises(ValueError, match="use_running_average"):
            call(module, variables, *args)


def test_training_with_immutable_statistics_is_an_error_as_in_flax():
    module = nll.BatchNorm(**TRAIN)
    with pytest.raises(Exception, match="batch_stats"):
        call(module, init(module, X), X)


def test_inference_leaves_the_statistics_alone():
    module = nll.BatchNorm(use_running_average=True)
    variables = variables_of(module)
    _, changed = call(module, variables, X, mutable=["batch_stats"])
    assert gap(changed["batch_stats"], variables["batch_stats"]) == 0


def test_sharding_metadata_of_initializers_stays():
    boxed = nn.with_partitioning(nn.initializers.ones, ("model",))
    theirs, ours = both("LayerNorm", {"scale_init": boxed})
    specs = [nn.get_partition_spec(init(m, X)) for m in (theirs, ours)]
    assert specs[0] == specs[1]
    variables = init(ours, X)
    assert gap(call(ours, variables, X), call(theirs, variables, X)) < 1e-6


# Devices.

SHARDS = array(draw(5, 4, 6, 3) + 2 * draw(6, 4, 1, 3))  # four devices of six examples, apart


def mapped(module, variables, x, axis="d", mapper=None, **kwargs):
    """Output and statistics of every device."""

    def run(v, x, kwargs):
        return module.apply(v, x, mutable=["batch_stats"], **kwargs)

    mapper = mapper or (lambda f: jax.jit(jax.vmap(f, in_axes=(None, 0, 0), axis_name=axis)))
    return mapper(run)(variables, x, kwargs)


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]], ids=["all", "equal groups"])
def test_devices_normalize_together_as_in_flax(groups):
    options = TRAIN | {"axis_name": "d"} | ({"axis_index_groups": groups} if groups else {})
    theirs, ours = both("BatchNorm", options)
    variables = init(theirs, SHARDS[0])

    def pmap(f):
        return jax.pmap(f, "d", in_axes=(None, 0, 0), devices=jax.devices()[:4])

    expected, stats = mapped(theirs, variables, SHARDS, mapper=pmap)
    h, changed = mapped(ours, variables, SHARDS)
    assert gap(h, expected) < 2e-6
    if groups:  # flax keeps each group's own, normlab those of all the examples
        _, stats = mapped(nn.BatchNorm(**TRAIN, axis_name="d"), variables, SHARDS)
    assert gap(changed, stats) < 2e-6
    h, _ = mapped(ours, variables, SHARDS, mapper=pmap)
    assert gap(h, expected) < 2e-6


def test_groups_of_any_sizes_are_right_where_flax_divides_by_the_first():
    groups = [[0], [1, 2, 3]]
    theirs, ours = both("BatchNorm", TRAIN | {"axis_name": "d", "axis_index_groups": groups})
    variables = init(theirs, SHARDS[0])
    h, _ = mapped(ours, variables, SHARDS)
    for group in groups:
        alone = np.asarray(SHARDS[np.array(group)], np.float64).reshape(-1, 3)
        z = (np.asarray(SHARDS[np.array(group)]) - alone.mean(0)) / np.sqrt(alone.var(0) + 1e-5)
        assert gap(h[np.array(group)], z) < 1e-5
    pmap = functools.partial(
        jax.pmap, axis_name="d", in_axes=(None, 0, 0), devices=jax.devices()[:4]
    )
    wrong, _ = mapped(theirs, variables, SHARDS, mapper=pmap)
    assert gap(wrong, h) > 0.3


def test_a_mask_over_devices_weighs_by_counts_where_flax_averages_means():
    counts = np.array([6, 3, 1, 2])
    mask = np.arange(6) < counts[:, None]
    theirs, ours = both("BatchNorm", TRAIN | {"axis_name": "d", "momentum": 0.0})
    variables = init(theirs, SHARDS[0])
    _, changed = mapped(ours, variables, SHARDS, mask=array(mask, bool))
    _, wrong = mapped(theirs, variables, SHARDS, mask=array(mask[..., None], bool))
    right = np.asarray(SHARDS, np.float64)[mask]
    stats = changed["batch_stats"]
    assert gap(stats["mean"], np.tile(right.mean(0), (4, 1))) < 1e-6
    assert gap(stats["var"], np.tile(right.var(0), (4, 1))) < 1e-5
    assert gap(wrong["batch_stats"]["mean"], stats["mean"]) > 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LayerNorm", {"reduction_axes": (1, 2)}),
        ("RMSNorm", {"reduction_axes": (1, 2)}),
        ("GroupNorm", {"num_groups": 2}),
    ],
)
def test_examples_that_are_split_over_devices_are_normalized_whole(name, options):
    x = array(draw(7, 2, 4, 3, 6))  # [N, devices, positions, C]
    mask = array(np.random.default_rng(8).random((2, 4, 3, 1)) < 0.7, bool)
    whole, split = (getattr(nll, name)(**options | more) for more in ({}, {"axis_name": "d"}))
    variables = init(whole, x[:, 0])
    expected = call(whole, variables, x.reshape(2, 12, 6), mask=mask.reshape(2, 12, 1))
    run = jax.vmap(
        lambda x, m: split.apply(variables, x, mask=m), in_axes=1, out_axes=1, axis_name="d"
    )
    assert gap(jax.jit(run)(x, mask).reshape(2, 12, 6), expected) < 2e-6


def test_groups_of_devices_that_split_examples_may_be_uneven():
    x = array(draw(7, 2, 4, 3, 6))
    groups = ((0,), (1, 2, 3))
    split = nll.LayerNorm(reduction_axes=(1, 2), axis_name="d", axis_index_groups=groups)
    variables = init(nll.LayerNorm(), x[:, 0])
    run = jax.vmap(lambda x: split.apply(variables, x), in_axes=1, out_axes=1, axis_name="d")
    h = jax.jit(run)(x)
    for group in groups:
        own = x[:, np.array(group)].reshape(2, -1, 6)
        expected = call(nll.LayerNorm(reduction_axes=(1, 2)), variables, own)
        assert gap(h[:, np.array(group)].reshape(2, -1, 6), expected) < 2e-6


def test_a_sync_takes_the_place_of_an_axis_name():
    ghost = nll.BatchNorm(**TRAIN, axis_name=nl.Sync(shards=2, groups=1))
    variables = init(ghost, X)
    h, _ = call(ghost, variables, X, mutable=["batch_stats"])
    half, _ = call(nll.BatchNorm(**TRAIN), variables, X[:2], mutable=["batch_stats"])
    assert gap(h[:2], half) < 1e-6


def test_initializing_needs_no_axis_and_no_second_example():
    module = nll.BatchNorm(**TRAIN, axis_name="nowhere")
    _, variables = made(module, jnp.ones((1, 6)))
    assert gap(variables["batch_stats"], {"mean": jnp.zeros(6), "var": jnp.ones(6)}) == 0


# What flax gets wrong.


def test_the_variance_is_right_at_a_large_mean_where_flaxs_cancels():
    x = array(1e4 + draw(9, 256, 2))
    right = np.asarray(x, np.float64).var(0)
    theirs, ours = both("BatchNorm", TRAIN | {"momentum": 0.0})
    variables = init(ours, x)
    (_, wrong), (_, changed) = (
        call(m, variables, x, mutable=["batch_stats"]) for m in (theirs, ours)
    )
    assert gap(changed["batch_stats"]["var"], right) < 1e-3
    assert gap(wrong["batch_stats"]["var"], right) > 0.5


def test_a_masked_nan_reaches_no_gradient_where_flaxs_is_nan():
    x = X.at[0].set(jnp.nan)
    mask = jnp.array([0, 1, 1, 1], bool)[:, None, None]
    theirs, ours = both("BatchNorm", TRAIN)
    variables = init(ours, X)

    def grad(module):
        def loss(params):
            h, _ = module.apply(
                variables | {"params": params}, x, mask=mask, mutable=["batch_stats"]
            )
            return jnp.where(mask, h * WEIGHT, 0).sum()

        return jax.jit(jax.grad(loss))(variables["params"])

    assert jnp.isnan(grad(theirs)["scale"]).all()
    clean = jax.tree.map(lambda v: v[1:], (X, WEIGHT))
    h, _ = call(ours, variables, clean[0], mutable=["batch_stats"])
    assert gap(grad(ours)["scale"], (h * clean[1]).sum((0, 1))) < 1e-5


@pytest.mark.parametrize("bad", ["nan", "masked"])
def test_a_bad_batch_leaves_the_statistics_where_flaxs_are_lost(bad):
    theirs, ours = both("BatchNorm", TRAIN)
    variables = variables_of(ours)
    x = X.at[0, 0, 0].set(jnp.nan) if bad == "nan" else X
    mask = None if bad == "nan" else jnp.zeros((4, 3, 1), bool)
    (_, lost), (_, changed) = (
        call(m, variables, x, mask=mask, mutable=["batch_stats"]) for m in (theirs, ours)
    )
    assert jnp.isnan(lost["batch_stats"]["mean"]).any()
    assert gap(changed["batch_stats"], variables["batch_stats"]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"epsilon": -1.0}, "eps=-1.0"),
        ({"axis_index_groups": [[0]]}, "axis_index_groups"),
        ({"axis_name": nl.Sync("d", every=2)}, 'population="debiased"'),
        ({"dtype": jnp.int32}, "dtype"),
        ({"axis": 5}, "axes 5"),
        ({"population": "debaised"}, "did you mean 'debiased'"),
    ],
)
def test_arguments_that_mean_nothing_are_errors(options, said):
    with pytest.raises(ValueError, match=said):
        init(nll.BatchNorm(**TRAIN | options), X)


def test_flax_accepts_them():
    for options in ({"momentum": 1.5}, {"epsilon": -1.0}, {"axis_index_groups": [[0]]}):
        jax.eval_shape(nn.BatchNorm(**TRAIN | options).init, KEY, X)
    with jax.numpy_dtype_promotion("standard"):
        jax.eval_shape(nn.LayerNorm().init, KEY, X.astype(jnp.complex64))


def test_complex_input_is_refused():
    with pytest.raises(ValueError, match="complex64"):
        init(nll.LayerNorm(), X.astype(jnp.complex64))


def test_group_norm_refuses_what_does_not_divide():
    for options, said in (
        ({"num_groups": 4}, "use one of 1, 2, 3, 6"),
        ({"group_size": 2}, "num_groups=None"),
        ({"num_groups": 2, "reduction_axes": (0, 1)}, "the last axis"),
    ):
        with pytest.raises(ValueError, match=said):
            init(nll.GroupNorm(**options), X)


# Populations and transactions.


def test_statistics_of_other_devices_may_come_late():
    late = nll.BatchNorm(**TRAIN, axis_name=nl.Sync("d", every=1), population="debiased")
    variables = init(late, SHARDS[0])
    assert isinstance(variables["batch_stats"]["population"], nl.population.Delayed)
    h, changed = mapped(late, variables, SHARDS)
    own = nll.BatchNorm(**TRAIN)
    assert gap(h, mapped(own, init(own, SHARDS[0]), SHARDS)[0]) < 1e-6
    assert changed["batch_stats"]["population"].own.mean.shape == (4, 3)


@pytest.mark.parametrize("name", ["debiased", "cumulative", "renorm", "frozen", "domains"])
def test_any_population_is_one_variable_and_does_what_batch_norm_does(name):
    module = nll.BatchNorm(population=name, momentum=0.9, epsilon=EPS)
    variables = init(module, X, True)
    (kept,) = variables["batch_stats"].values()
    options = {} if name == "cumulative" else {"decay": 0.9}
    options |= {"eps": EPS} if name == "renorm" else {}
    state = nl.population.init_population(name, 6, **options)
    assert jax.tree.structure(kept) == jax.tree.structure(state)
    expected, state = batch_norm(X, state, train=True, eps=EPS)
    h, changed = call(module, variables, X, False, mutable=["batch_stats"])
    assert gap(h, expected) < 1e-6
    assert gap(changed["batch_stats"]["population"], state) < 1e-6
    h = call(module, variables | changed, X, True)
    assert gap(h, batch_norm(X, state, train=False, eps=EPS)[0]) < 1e-6
    copy = serialization.from_bytes(variables, serialization.to_bytes(changed | variables))
    assert gap(copy, variables) == 0


def test_the_population_batch_keeps_nothing_and_evaluates_by_its_batch():
    module = nll.BatchNorm(population="batch")
    variables = init(module, X, True)
    assert set(variables) == {"params"}
    expected, _ = batch_norm(X, None, train=True)
    assert gap(call(module, variables, X, True), expected) < 1e-6


def test_statistics_of_another_layout_are_refused_by_name():
    flax = variables_of(nll.BatchNorm(**TRAIN))
    kept = nll.BatchNorm(**TRAIN, population="debiased")
    with pytest.raises(ValueError, match="population='debiased'"):
        call(kept, flax, X, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="population='ema'"):
        call(nll.BatchNorm(**TRAIN), init(kept, X), X, mutable=["batch_stats"])


class Shared(nn.Module):
    """A norm that is called twice, and one in a rematerialized block."""

    @nn.compact
    def __call__(self, x, train):
        norm = nll.BatchNorm(use_running_average=not train, momentum=0.9, name="shared")
        block = nn.remat(nll.BatchNorm)(not train, momentum=0.9, name="block")
        return block(norm(x) + x) + norm(2 * x)


def test_a_transaction_of_microbatches_is_one_update_with_the_whole_batch():
    module = nll.BatchNorm(**TRAIN, momentum=0.9)
    variables = variables_of(module)
    _, expected = call(module, variables, X, mutable=["batch_stats"])
    transaction = {}
    for part in jnp.split(X, 2):
        h, transaction = call(module, variables | transaction, part, mutable=["transaction"])
        assert gap(h, call(module, variables, part, mutable=["batch_stats"])[0]) < 1e-6
    transaction = transaction["transaction"]
    commit = jax.jit(nll.commit)
    assert gap(commit(variables, transaction, True), expected["batch_stats"]) < 1e-6
    assert gap(commit(variables, transaction, False), variables["batch_stats"]) == 0
    settled = nll.settle(variables, transaction)
    whole = np.asarray(X, np.float64).reshape(-1, 6)
    assert gap(settled, {"mean": whole.mean(0), "var": whole.var(0)}) < 1e-6


def test_a_shared_norm_and_a_replay_update_once():
    module = Shared()
    variables = init(module, X, True)

    @jax.jit
    def step(variables):
        def loss(params):
            h, changed = module.apply(
                variables | {"params": params}, X, True, mutable=["transaction"]
            )
            return (h * WEIGHT).sum(), changed["transaction"]

        _, transaction = jax.grad(loss, has_aux=True)(variables["params"])
        return nll.commit(variables, transaction)

    stats = step(variables)
    seen = np.concatenate([X, 2 * X]).astype(np.float64).reshape(-1, 6)
    expected = {"mean": 0.1 * seen.mean(0), "var": 0.9 + 0.1 * seen.var(0)}
    assert gap(stats["shared"], expected) < 1e-6
    once = nll.BatchNorm(**TRAIN, momentum=0.9)
    h = call(once, init(once, X), X, mutable=["batch_stats"])[0]
    _, block = call(once, init(once, X), h + X, mutable=["batch_stats"])
    assert gap(stats["block"], block["batch_stats"]) < 1e-5


def test_a_call_in_evaluation_begins_an_empty_transaction():
    module = nll.BatchNorm(momentum=0.9)
    variables = init(module, X, True)
    _, begun = call(module, variables, X, True, mutable=["transaction"])
    assert gap(nll.commit(variables, begun["transaction"]), variables["batch_stats"]) == 0

    def microbatch(transaction, x):
        _, changed = module.apply(
            variables | {"transaction": transaction}, x, False, mutable=["transaction"]
        )
        return changed["transaction"], None

    transaction, _ = jax.lax.scan(microbatch, begun["transaction"], X.reshape(2, 2, 3, 6))
    _, expected = call(module, variables, X, False, mutable=["batch_stats"])
    assert gap(nll.commit(variables, transaction), expected["batch_stats"]) < 1e-6


def test_devices_that_measured_apart_pool_their_transactions():
    module = nll.BatchNorm(**TRAIN, momentum=0.9)
    variables = init(module, SHARDS[0])

    def run(x):
        _, changed = module.apply(variables, x, mutable=["transaction"])
        return nll.commit(variables, nl.population.pool_running(changed["transaction"], "d"))

    stats = jax.jit(jax.vmap(run, axis_name="d"))(SHARDS)
    seen = np.asarray(SHARDS, np.float64).reshape(-1, 3)
    assert gap(stats["mean"], np.tile(0.1 * seen.mean(0), (4, 1))) < 1e-6
    assert gap(stats["var"], np.tile(0.9 + 0.1 * seen.var(0), (4, 1))) < 1e-6


def test_a_transaction_of_another_model_or_of_nothing_is_refused():
    module = Shared()
    variables = init(module, X, True)
    _, changed = call(module, variables, X, True, mutable=["transaction"])
    other = {"batch_stats": {"share": variables["batch_stats"]["shared"]}}
    with pytest.raises(ValueError, match="did you mean 'share'"):
        nll.commit(other, {"shared": changed["transaction"]["shared"]})
    with pytest.raises(ValueError, match="without any BatchNorm"):
        nll.commit(variables, {})


# Lifted transformations.


def stack(norm):
    """Three layers, by `nn.scan`."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return norm(name="norm")(x) + x, None

    return nn.scan(
        Layer,
        variable_axes={"params": 0, "batch_stats": 0, "transaction": 0},
        split_rngs={"params": True},
        length=3,
    )()


def test_scan_lifts_as_in_flax_and_a_transaction_spans_the_layers():
    theirs, ours = (stack(functools.partial(m, **TRAIN)) for m in (nn.BatchNorm, nll.BatchNorm))
    variables = init(theirs, X, None)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, init(ours, X, None))
    ((h, _), changed), ((expected, _), stats) = jax.jit(
        lambda v, x: tuple(m.apply(v, x, None, mutable=["batch_stats"]) for m in (ours, theirs))
    )(variables, X)
    assert gap(h, expected) < 1e-5
    assert gap(changed, stats) < 1e-5
    _, pending = call(ours, variables, X, None, mutable=["transaction"])
    assert gap(nll.commit(variables, pending["transaction"]), stats["batch_stats"]) < 1e-5


class Cell(nn.Module):
    """A step of a recurrent network whose norm is the same at all times."""

    @nn.compact
    def __call__(self, carry, x, train=True):
        norm = nll.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")
        carry = norm(x + 0.5 * carry)
        return carry, carry


def test_the_steps_of_a_recurrent_network_are_one_update():
    start, x = jnp.zeros((4, 6)), array(draw(4, 5, 4, 6))
    variables = Cell().init(KEY, start, x[0])
    _, begun = Cell().apply(variables, start, x[0], False, mutable=["transaction"])
    steps = nn.scan(
        Cell,
        variable_broadcast=["params", "batch_stats"],
        variable_carry="transaction",
        split_rngs={"params": False},
    )()
    (_, h), changed = call(steps, variables | begun, start, x, mutable=["transaction"])
    stats = nll.commit(variables, changed["transaction"])["norm"]
    seen = np.asarray(x, np.float64)
    seen[1:] += 0.5 * np.asarray(h[:-1])
    seen = seen.reshape(-1, 6)
    assert gap(stats["mean"], 0.1 * seen.mean(0)) < 1e-5
    assert gap(stats["var"], 0.9 + 0.1 * seen.var(0)) < 1e-6


def test_vmap_lifts_as_in_flax():
    def lifted(norm):
        return nn.vmap(
            norm,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            axis_name="members",
        )(**TRAIN | AFFINE | {"use_fast_variance": False})

    theirs, ours = lifted(nn.BatchNorm), lifted(nll.BatchNorm)
    variables = init(theirs, X)
    assert gap(init(ours, X), variables) == 0
    h, stats = (call(m, variables, X, mutable=["batch_stats"]) for m in (ours, theirs))
    assert gap(h, stats) < 2e-6


# Weight norm and cosine layers.


@pytest.mark.parametrize(("axes", "wanted"), [(-1, {"kernel"}), (None, None), ((0, 1), ["kernel"])])
def test_weight_norm_has_flaxs_variables_and_numbers(axes, wanted):
    class Model(nn.Module):
        norm: type

        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, bias_init=nn.initializers.normal(1.0))
            options = {"feature_axes": axes, "variable_filter": wanted}
            return self.norm(layer, scale_init=nn.initializers.normal(1.0), **options)(x)

    theirs, ours = Model(nn.WeightNorm), Model(nll.WeightNorm)
    variables = init(theirs, X)
    assert gap(init(ours, X), variables) < 1e-6  # flax normalizes the kernel it makes
    assert jax.tree.structure(init(ours, X)) == jax.tree.structure(variables)

    def run(module):
        loss = lambda v: (module.apply(v, X) * WEIGHT[..., :4]).sum()  # noqa: E731
        # As one vector: what is normalized alone has a gradient of zero, up to rounding.
        return flatten_util.ravel_pytree(jax.jit(jax.value_and_grad(loss))(variables))[0]

    assert gap(run(ours), run(theirs)) < 1e-5


def test_weight_norm_of_a_zero_kernel_has_a_bounded_gradient_where_flaxs_is_a_million():
    def grad(norm):
        module = norm(nn.Dense(4, use_bias=False, name="dense"))
        variables = init(module, X)
        zero = jax.tree_util.tree_map_with_path(
            lambda path, v: 0 * v if "kernel" in str(path) and "scale" not in str(path) else v,
            variables,
        )
        grads = jax.jit(jax.grad(lambda v: module.apply(v, X).sum()))(zero)
        return max(float(jnp.abs(v).max()) for v in jax.tree.leaves(grads))

    assert grad(nll.WeightNorm) < 100
    assert grad(nn.WeightNorm) > 1e5


def test_weight_norm_normalizes_a_tiny_kernel_where_flaxs_epsilon_hides_it():
    layer = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.constant(1e-9), name="dense")
    x = jnp.ones((1, 4))
    ours, theirs = (made(n(layer), x)[0] for n in (nll.WeightNorm, nn.WeightNorm))
    assert float(ours[0, 0]) == pytest.approx(2.0, rel=1e-6)
    assert float(theirs[0, 0]) < 0.01
    with pytest.raises(ValueError, match=r"epsilon=0\.001"):
        init(nll.WeightNorm(layer, epsilon=1e-3), x)


class Spectral(nn.Module):
    """Spectral norm around a convolution and a dense layer."""

    norm: type

    @nn.compact
    def __call__(self, x, update_stats):
        x = self.norm(nn.Conv(5, (3,)))(x, update_stats=update_stats)
        return self.norm(nn.Dense(4), n_steps=3)(x, update_stats=update_stats)


def test_spectral_norm_trains_as_flaxs_from_its_checkpoint():
    theirs, ours = Spectral(nn.SpectralNorm), Spectral(nll.SpectralNorm)
    variables = init(theirs, X, False)
    assert jax.tree.map(jnp.shape, init(ours, X, False)) == jax.tree.map(jnp.shape, variables)

    def run(module):
        def loss(params):
            both = {**variables, "params": params}
            h, changed = module.apply(both, X, True, mutable=["batch_stats"])
            return (h * WEIGHT[..., :4]).sum(), changed

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    assert gap(run(ours), run(theirs)) < 1e-5


def test_spectral_norm_makes_no_step_at_inference_where_flaxs_does():
    layer = nn.Dense(4, use_bias=False)
    variables = jax.jit(lambda: nn.SpectralNorm(layer).init(KEY, X, update_stats=False))()
    w = variables["params"]["layer_instance"]["kernel"]
    u = variables["batch_stats"]["layer_instance/kernel/u"][0]
    sigma = np.linalg.norm(np.asarray(w, np.float64) @ u) / np.linalg.norm(u)
    for steps in (1, 9):
        ours, theirs = (
            module(layer, n_steps=steps).apply(variables, X, update_stats=False)
            for module in (nll.SpectralNorm, nn.SpectralNorm)
        )
        assert gap(ours, X @ w / sigma) < 1e-6
        assert gap(theirs, X @ w / sigma) > 1e-3
    warm = jax.jit(lambda: nll.SpectralNorm(layer).init(KEY, X, update_stats=False))()
    h = nll.SpectralNorm(layer).apply(warm, X, update_stats=False)
    assert gap(h, X @ w / np.linalg.norm(w, 2)) < 1e-2


MAPS = {
    "spectral": {"use_gain": True},
    "weight": {"bounded": True},
    "weight_standardization": {"form": "timm", "gain": "offset"},
    "centred_weight": {},
}


@pytest.mark.parametrize("name", MAPS)
def test_any_map_of_the_weights_goes_around_a_layer(name):
    norm, x = nl.get(name, **MAPS[name]), X.transpose(0, 2, 1)
    module = nll.RegistryWeights(nn.Conv(4, (2,)), name, MAPS[name], use_running_average=False)
    variables = init(module, x)
    w = variables["params"]["layer_instance"]["kernel"]
    params, state = norm.init_kernel(w)
    kernel, after = norm.kernel(params, state, w, train=True)
    h, changed = call(module, variables, x, mutable=["batch_stats"])
    assert gap(h, nl.Conv()(x, kernel)) < 1e-6
    assert gap(jax.tree.leaves(changed), jax.tree.leaves(after)) < 1e-6
    learned = {k for k in variables["params"] if k != "layer_instance"}
    expected = {"spectral": {"scale"}, "weight_standardization": {"d"}}.get(name, set())
    assert learned == {f"layer_instance/kernel/{leaf}" for leaf in expected}


def test_the_spectral_norm_of_a_map_asks_the_layer_where_its_kernel_stands():
    linear = nl.Conv(strides=2, padding="VALID")
    conv = nn.Conv(4, (2,), strides=2, padding="VALID")
    how = {"linear": linear, "use_running_average": False}
    module = nll.RegistryWeights(conv, "spectral", {"of": "map", "steps": 50}, **how)
    variables = init(module, X)
    h, _ = call(module, variables, X, mutable=["batch_stats"])
    w = variables["params"]["layer_instance"]["kernel"]
    operator = jax.jacobian(lambda x: linear(x, w))(X[:1]).reshape(-1, X[:1].size)
    assert gap(h, linear(X, w) / np.linalg.norm(operator, 2)) < 1e-5
    with pytest.raises(ValueError, match="RegistryNorm for a norm of activations"):
        init(nll.RegistryWeights(conv, "layer"), X)


@pytest.mark.parametrize("centred", [False, True])
def test_cosine_dense_is_cosine_norm_with_the_names_of_dense(centred):
    module = nll.CosineDense(5, centred=centred, bias_init=nn.initializers.normal(1.0))
    h, variables = made(module, X)
    params = variables["params"]
    assert {k: v.shape for k, v in params.items()} == {
        "kernel": (6, 5),
        "scale": (5,),
        "bias": (5,),
    }
    assert params["scale"].tolist() == pytest.approx([6**0.5] * 5)
    assert gap(h, cosine_norm(X, params, centred=centred)) < 1e-6
    plain = nll.CosineDense(5, use_scale=False, use_bias=False, dtype=jnp.bfloat16)
    h, variables = made(plain, X)
    assert h.dtype == jnp.bfloat16
    assert jnp.abs(h).max() <= 1


@pytest.mark.parametrize(
    ("options", "linear"),
    [
        ({"strides": 2, "padding": 1}, nl.Conv(strides=2, padding=((1, 1),))),
        (
            {"feature_group_count": 2, "kernel_dilation": (2,), "padding": [(2, 0)]},
            nl.Conv(groups=2, dilation=2, padding=((2, 0),)),
        ),
    ],
)
def test_cosine_conv_is_cosine_norm_with_the_arguments_of_conv(options, linear):
    x = array(draw(2, 2, 7, 4))
    module = nll.CosineConv(6, 3, **options)
    h, variables = made(module, x)
    params = variables["params"]
    like = made(nn.Conv(6, 3, **options), x)
    assert params["kernel"].shape == like[1]["params"]["kernel"].shape
    assert h.shape == like[0].shape
    assert gap(h, cosine_norm(x, params, linear=linear)) < 1e-6
    assert gap(call(module, variables, x[0]), h[0]) < 1e-6
    assert gap(call(module, variables, x[None]), h[None]) < 1e-6


# A model.


def network(norms):
    """A small convolutional net; only where the norms come from differs."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(4, (3,), use_bias=False)(x)
            x = nn.relu(norms.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = norms.GroupNorm(num_groups=2)(nn.Conv(4, (3,))(x))
            x = norms.InstanceNorm()(x) + norms.LayerNorm()(x)
            return norms.WeightNorm(nn.Dense(3))(norms.RMSNorm()(x).mean(1))

    return Net()


def test_changing_the_import_keeps_the_losses_and_the_checkpoints():
    labels = jnp.array([0, 1, 2, 0])
    optimizer = optax.sgd(0.1)

    def trained(module, variables):
        @jax.jit
        def step(variables, moments):
            def loss(params):
                h, changed = module.apply(
                    variables | {"params": params}, X, True, mutable=["batch_stats"]
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(h, labels)
                return losses.mean(), changed

            (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            updates, moments = optimizer.update(grads, moments)
            params = optax.apply_updates(variables["params"], updates)
            return {"params": params} | changed, moments, value

        moments, values = optimizer.init(variables["params"]), []
        for _ in range(3):
            variables, moments, value = step(variables, moments)
            values.append(value)
        return variables, jnp.stack(values)

    theirs, ours = network(nn), network(nll)
    start = init(theirs, X, False)
    assert gap(init(ours, X, False), start) < 1e-6
    (after, losses), (expected, reference) = trained(ours, start), trained(theirs, start)
    assert gap(losses, reference) < 1e-5
    # The checkpoint of one loads in the other.
    for module, saved in ((ours, expected), (theirs, after)):
        template = init(module, X, False)
        loaded = serialization.from_bytes(template, serialization.to_bytes(saved))
        other = theirs if module is ours else ours
        assert gap(call(module, loaded, X, False), call(other, saved, X, False)) < 1e-5


def test_a_step_counts_for_every_norm_of_a_model_or_for_none():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            first = nll.BatchNorm(use_running_average=False)(x)
            return first, nll.BatchNorm(use_running_average=False)(y)

    x = jnp.arange(8.0).reshape(4, 2)
    variables = Two().init(jax.random.key(0), x, x)
    _, seen = Two().apply(variables, x, x * jnp.nan, mutable=["transaction"])
    stats = nll.commit(variables, seen["transaction"])
    assert gap(stats, variables["batch_stats"]) == 0
    with pytest.raises(ValueError, match=r"transaction: got variables with BatchNorm_0"):
        nll.commit(variables["batch_stats"], seen["transaction"])
