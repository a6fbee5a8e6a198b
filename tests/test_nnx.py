"""The skins of `flax.nnx`: flax's own modules are the oracle, where they are right."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normlab as nl
import normlab.nnx as nlx
from tests.helpers import array, draw, gap

X = array(draw(0, 4, 3, 6, mean=1.0))
WEIGHT = array(draw(1, 4, 3, 6))
NORMAL = {
    "scale_init": nnx.initializers.normal(1.0),
    "bias_init": nnx.initializers.normal(1.0),
}
CASES = {
    "batch": ("BatchNorm", 6, NORMAL),
    "batch, other axis": ("BatchNorm", 3, {"axis": 1, "momentum": 0.7}),
    "batch, inference": ("BatchNorm", 6, {"use_running_average": True}),
    "layer": ("LayerNorm", 6, NORMAL),
    "layer, axes": ("LayerNorm", 18, {"reduction_axes": (0, 2), "feature_axes": (1, 2)}),
    "rms": ("RMSNorm", 6, {"scale_init": NORMAL["scale_init"]}),
    "group": ("GroupNorm", 6, NORMAL | {"num_groups": 2}),
    "instance": ("InstanceNorm", 6, {"use_bias": False, "use_fast_variance": False}),
}
NORMS = {
    "BatchNorm": {},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 2},
    "InstanceNorm": {"use_fast_variance": False},
}


def both(name, features, options):
    """Flax's module and ours, from the same key."""
    return tuple(getattr(m, name)(features, **options, rngs=nnx.Rngs(0)) for m in (nnx, nlx))


def pure(module, *filters):
    return nnx.to_pure_dict(nnx.state(module, *filters))


@nnx.jit
def call(module, x, mask=None):
    """The output; the statistics move as they do without `jit`."""
    return module(x, mask=mask)


@nnx.jit
def train(module, x):
    """Output, and gradients by parameters and input."""

    def loss(module, x):
        h = module(x)
        return (h * WEIGHT.reshape(h.shape)).sum(), h

    grads, h = nnx.grad(loss, argnums=(0, 1), has_aux=True)(module, x)
    return h, grads


@pytest.mark.parametrize("case", CASES)
def test_variables_outputs_gradients_and_statistics_are_flaxs(case):
    theirs, ours = both(*CASES[case])
    kinds = [jax.tree.map(type, nnx.state(m), is_leaf=_is_variable) for m in (theirs, ours)]
    assert kinds[0] == kinds[1]
    assert gap(pure(ours), pure(theirs)) == 0
    (h, grads), (expected, reference) = train(ours, X), train(theirs, X)
    assert gap(h, expected) < 1e-6
    assert gap(jax.tree.leaves(grads), jax.tree.leaves(reference)) < 1e-5
    assert gap(pure(ours), pure(theirs)) < 1e-6


def _is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


@pytest.mark.parametrize("name", [*NORMS, "WeightNorm", "SpectralNorm"])
def test_arguments_are_flaxs_with_their_defaults_and_more_come_last(name):
    theirs, ours = (inspect.signature(getattr(m, name).__init__).parameters for m in (nnx, nlx))
    assert list(ours)[: len(theirs)] == list(theirs)
    loose = ("bias_init", "scale_init", "variable_filter")
    for word, other in theirs.items():
        if word not in loose:
            assert ours[word].default == other.default, word
            assert ours[word].kind == other.kind
    assert set(ours) - set(theirs) <= {"population", "implementation"}


@pytest.mark.parametrize("name", NORMS)
def test_types_of_results_are_flaxs(name):
    types = (jnp.float32, jnp.bfloat16)
    for x in (*types, jnp.int32):
        for dtype in (None, *types):
            options = NORMS[name] | {"dtype": dtype, "param_dtype": jnp.bfloat16}
            with jax.numpy_dtype_promotion("standard"):
                theirs, ours = (
                    nnx.eval_shape(lambda m, a: m(a), m, jax.ShapeDtypeStruct(X.shape, x))
                    for m in both(name, 6, options)
                )
            assert ours == theirs, (x, dtype)


def test_promote_dtype_is_asked_for_the_type_of_the_result():
    def half(arrays, *, dtype=None):
        return tuple(None if a is None else a.astype(jnp.float16) for a in arrays)

    for name in NORMS:
        theirs, ours = both(name, 6, NORMS[name] | {"promote_dtype": half})
        for module in (theirs, ours):
            with jax.numpy_dtype_promotion("standard"):
                h = nnx.eval_shape(lambda m, x: m(x), module, X)
            assert h.dtype == jnp.float16


@pytest.mark.parametrize("name", NORMS)
def test_what_a_mask_leaves_out_counts_for_nothing_and_the_rest_is_flaxs(name):
    mask = np.random.default_rng(3).random(X.shape) < 0.6
    mask[..., :2, :] = True
    theirs, ours = both(name, 6, NORMS[name])
    expected, h = (
        call(m, np.where(mask, X, np.float32(v)), mask) for m, v in ((theirs, 7), (ours, np.nan))
    )
    assert gap(np.where(mask, h, 0), np.where(mask, expected, 0)) < 2e-6
    assert gap(pure(ours), pure(theirs)) < 1e-6


# Modes and graphs.


def test_modes_are_set_by_train_and_eval_by_views_and_by_the_call():
    ours = nlx.BatchNorm(6, rngs=nnx.Rngs(0))
    model = nnx.Sequential(ours, nlx.LayerNorm(6, rngs=nnx.Rngs(0)))
    model.eval()
    assert ours.use_running_average is True
    before = pure(model)
    frozen = model(X)
    assert gap(pure(model), before) == 0
    model.train()
    assert ours.use_running_average is False
    assert gap(ours(X, use_running_average=True), ours(X, True)) == 0
    view = nnx.view(model, use_running_average=True)
    assert gap(view(X), frozen) == 0
    assert ours.use_running_average is False
    unset = nlx.BatchNorm(6, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no use_running_average"):
        unset(X)


def test_split_and_merge_and_jit_give_the_same_module():
    ours = nlx.BatchNorm(6, momentum=0.5, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.clone(ours))
    copy = nnx.merge(graph, state)
    expected = ours(X)
    assert gap(nnx.jit(lambda m, x: m(x))(copy, X), expected) < 1e-6
    assert gap(pure(copy), pure(ours)) < 1e-6


def test_checkpoints_load_both_ways():
    theirs, ours = both("BatchNorm", 6, {"momentum": 0.5})
    theirs(X)
    nnx.update(ours, nnx.state(theirs))
    theirs.eval(), ours.eval()
    assert gap(ours(X), theirs(X)) < 1e-6
    ours.train()
    ours(2 * X)
    nnx.update(theirs, nnx.state(ours))
    assert gap(pure(theirs), pure(ours)) == 0


def stacked(norm, options):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return norm(6, **options, rngs=nnx.Rngs(key))

    return make(jax.random.split(jax.random.key(0), 2))


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def through(layer, x):
    return layer(x) + x


def test_scan_and_vmap_lift_as_in_flax_and_a_transaction_spans_the_layers():
    options = {"momentum": 0.9}
    theirs, ours = stacked(nnx.BatchNorm, options), stacked(nlx.BatchNorm, options)
    fresh = nnx.clone(ours)
    assert gap(through(ours, X), through(theirs, X)) < 1e-5
    assert gap(pure(ours), pure(theirs)) < 1e-5
    nlx.begin(fresh)
    through(fresh, X)
    nlx.commit(fresh)
    assert gap(pure(fresh), pure(ours)) < 1e-6


def test_remat_updates_once_in_a_transaction():
    class Block(nnx.Module):
        def __init__(self):
            self.norm = nlx.BatchNorm(6, momentum=0.9, rngs=nnx.Rngs(0))

        @nnx.remat
        def __call__(self, x):
            return self.norm(x)

    block, plain = Block(), nlx.BatchNorm(6, momentum=0.9, rngs=nnx.Rngs(0))
    nlx.begin(block)
    nnx.jit(nnx.grad(lambda m: (m(X) * WEIGHT).sum()))(block)
    nlx.commit(block)
    plain(X)
    assert gap(pure(block.norm), pure(plain)) < 1e-6


def test_devices_normalize_together():
    shards = array(draw(5, 4, 6, 3) + 2 * draw(6, 4, 1, 3))
    groups = [[0], [1, 2, 3]]
    options = {"axis_name": "d", "axis_index_groups": groups, "momentum": 0.0}
    ours = nlx.BatchNorm(3, **options, rngs=nnx.Rngs(0))
    graph, state = nnx.split(ours)

    def run(x):
        module = nnx.merge(graph, state, copy=True)
        return module(x), module.mean[...]

    h, mean = jax.jit(jax.vmap(run, axis_name="d"))(shards)
    for group in groups:
        z = np.asarray(shards[np.array(group)], np.float64)
        z = (z - z.mean((0, 1))) / np.sqrt(z.var((0, 1)) + 1e-5)
        assert gap(h[np.array(group)], z) < 1e-5
    assert gap(mean, np.tile(np.asarray(shards, np.float64).mean((0, 1)), (4, 1))) < 1e-6


# What flax gets wrong.


def test_statistics_are_of_the_input_where_flax_rounds_it_first():
    x = array(100 + draw(9, 256, 2))
    theirs, ours = both("BatchNorm", 2, {"dtype": jnp.bfloat16, "momentum": 0.0})
    right = np.asarray(x, np.float64)
    with jax.numpy_dtype_promotion("standard"):
        call(theirs, x), call(ours, x)
    assert gap(ours.var[...], right.var(0)) < 1e-5
    assert gap(theirs.var[...], right.var(0)) > 0.02
    theirs.mean[...] = ours.mean[...] = array([100.25, 99.75])
    expected = (right - [100.25, 99.75]) / np.sqrt(np.asarray(ours.var[...]) + 1e-5)
    theirs.eval(), ours.eval()
    assert gap(call(ours, x), expected) < 4e-3
    assert gap(call(theirs, x), expected) > 0.02


def test_group_norm_by_frame_is_right_where_flax_mixes_frames_up():
    x = array(draw(4, 2, 3, 2, 2, 6) + 5 * draw(5, 1, 3, 1, 1, 1))  # [N, frames, H, W, C]
    theirs, ours = both("GroupNorm", 6, {"num_groups": 2, "reduction_axes": (2, 3, 4)})
    z = np.asarray(x, np.float64).reshape(2, 3, 4, 2, 3)
    mean, var = z.mean((2, 4), keepdims=True), z.var((2, 4), keepdims=True)
    right = ((z - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    assert gap(call(ours, x), right) < 1e-5
    assert gap(call(theirs, x), right) > 0.3


def test_a_bad_batch_leaves_the_statistics_where_flaxs_are_lost():
    theirs, ours = both("BatchNorm", 6, {})
    before = pure(ours)
    bad = X.at[0, 0, 0].set(jnp.nan)
    theirs(bad), ours(bad)
    assert jnp.isnan(theirs.mean[...]).any()
    assert gap(pure(ours), before) == 0


def test_weight_norm_leaves_the_kernel_alone_where_flax_overwrites_it():
    def made(norm):
        layer = nnx.Linear(6, 4, rngs=nnx.Rngs(1))
        return norm(layer, rngs=nnx.Rngs(0))

    theirs, ours = made(nnx.WeightNorm), made(nlx.WeightNorm)
    assert jax.tree.structure(pure(ours)) == jax.tree.structure(pure(theirs))
    kernel = ours.layer_instance.kernel[...]
    assert gap(ours(X), theirs(X)) < 1e-6
    assert gap(ours.layer_instance.kernel[...], kernel) == 0
    assert gap(theirs.layer_instance.kernel[...], kernel) > 0.1


def test_weight_norms_scales_are_trained():  # flax 0.12.8 holds them constant
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(1))
    ours = nlx.WeightNorm(layer, feature_axes=None, rngs=nnx.Rngs(0))
    grads = nnx.jit(nnx.grad(lambda m: (m(X) * WEIGHT[..., :4]).sum()))(ours)
    (scale,) = jax.tree.leaves(grads["scales"])
    assert scale.shape == ()
    assert jnp.abs(scale) > 0
    kept = nlx.WeightNorm(layer, use_scale=False, rngs=nnx.Rngs(0))
    unit = np.asarray(layer.kernel[...], np.float64)
    unit = unit / np.linalg.norm(unit, axis=0)
    assert gap(kept(X), np.asarray(X) @ unit) < 1e-6


def test_spectral_norm_leaves_the_kernel_alone_where_flax_overwrites_it():
    def made(norm):
        return norm(nnx.Linear(6, 4, rngs=nnx.Rngs(1)), n_steps=2, rngs=nnx.Rngs(0))

    theirs, ours = made(nnx.SpectralNorm), made(nlx.SpectralNorm)
    kinds = [jax.tree.map(type, nnx.state(m), is_leaf=_is_variable) for m in (theirs, ours)]
    assert kinds[0] == kinds[1]
    nnx.update(ours, nnx.state(theirs))
    kernel = ours.layer_instance.kernel[...]
    assert gap(ours(X), theirs(X)) < 1e-6
    assert gap(pure(ours)["batch_stats"], pure(theirs)["batch_stats"]) < 1e-6
    assert gap(ours.layer_instance.kernel[...], kernel) == 0
    assert gap(theirs.layer_instance.kernel[...], kernel) > 0.1
    before = pure(ours)
    ours.eval()
    h = nnx.jit(lambda m: m(X))(ours)
    assert gap(pure(ours), before) == 0
    u = np.asarray(ours.batch_stats["kernel", "u"][0])
    assert gap(h, X @ kernel / np.linalg.norm(kernel @ u)) < 1e-6
    grads = nnx.grad(lambda m: (m(X) * WEIGHT[..., :4]).sum())(ours)
    assert jnp.abs(grads["layer_instance"]["kernel"][...]).max() > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("spectral", {"use_gain": True}),
        ("weight", {"bounded": True}),
        ("weight_standardization", {"form": "timm", "gain": "offset"}),
        ("centred_weight", {}),
    ],
)
def test_any_map_of_the_weights_goes_around_a_layer(name, options):
    layer = nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(1))
    norm, w = nl.get(name, **options), layer.kernel[...]
    params, state = norm.init_kernel(w)
    kernel, after = norm.kernel(params, state, w, train=True)
    module = nlx.RegistryWeights(layer, name, options)
    assert gap(nnx.jit(lambda m: m(X))(module), X @ kernel) < 1e-6
    assert gap(jax.tree.leaves(pure(module.batch_stats)), jax.tree.leaves(after)) < 1e-6
    assert gap(layer.kernel[...], w) == 0
    module.eval()
    still, _ = norm.kernel(params, after, w, train=False)
    assert gap(module(X), X @ still) < 1e-6
    learned = jax.tree.leaves(nnx.state(module.scales, nnx.Param))
    assert [v.shape for v in learned] == {
        "spectral": [()],
        "weight_standardization": [(4,)],
    }.get(name, [])


def test_a_state_inside_a_weight_normed_layer_is_updated():
    inner = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nlx.BatchNorm(6, rngs=nnx.Rngs(0)))
    nlx.WeightNorm(inner, rngs=nnx.Rngs(0))(X)
    assert jnp.abs(inner.layers[1].mean[...]).max() > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda r: nlx.BatchNorm(6, momentum=1.0, rngs=r), "momentum=1.0"),
        (lambda r: nlx.BatchNorm(5, rngs=r)(X), "num_features of 5"),
        (lambda r: nlx.LayerNorm(5, use_bias=False, use_scale=False, rngs=r)(X), "num_features"),
        (lambda r: nlx.GroupNorm(6, 4, rngs=r), "use one of 1, 2, 3, 6"),
        (lambda r: nlx.LayerNorm(6, rngs=r)(X, mask=False), "rank 0"),
        (lambda r: nlx.InstanceNorm(6, rngs=r)(X[0, 0]), "move the examples first"),
        (lambda r: nlx.WeightNorm(nnx.Linear(2, 2, rngs=r), epsilon=0.1, rngs=r), "epsilon"),
    ],
)
def test_arguments_that_mean_nothing_are_errors(make, said):
    with pytest.raises(ValueError, match=said):
        make(nnx.Rngs(0))


def test_flax_normalizes_features_that_it_was_not_made_for():
    theirs = nnx.LayerNorm(5, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))
    assert nnx.eval_shape(lambda m: m(X), theirs).shape == X.shape


# Populations, transactions, cosine layers.


@pytest.mark.parametrize("name", ["debiased", "cumulative", "renorm", "batch"])
def test_any_population_is_one_variable_and_does_what_batch_norm_does(name):
    eps = 0.1  # far from every default
    ours = nlx.BatchNorm(6, population=name, momentum=0.9, epsilon=eps, rngs=nnx.Rngs(0))
    assert set(pure(ours)) - {"population"} == {"scale", "bias"}
    options = {} if name in ("cumulative", "batch") else {"decay": 0.9}
    options |= {"eps": eps} if name == "renorm" else {}
    state = nl.population.init_population(name, 6, **options)
    expected, state = nl.batch_norm(X, None, state, train=True, eps=eps)
    assert gap(ours(X), expected) < 1e-6
    if name == "batch":
        assert "population" not in pure(ours)
    else:
        assert gap(ours.population.get_value(), state) < 1e-6
    ours.eval()
    assert gap(ours(X), nl.batch_norm(X, None, state, train=False, eps=eps)[0]) < 1e-6


@pytest.mark.parametrize("population", ["ema", "debiased"])
def test_a_transaction_of_microbatches_is_one_update_with_the_whole_batch(population):
    def fresh():
        return nlx.BatchNorm(6, momentum=0.9, population=population, rngs=nnx.Rngs(0))

    whole, parts, refused, settled = (fresh() for _ in range(4))
    whole(X)
    for module in (parts, refused, settled):
        nlx.begin(module)
        for part in jnp.split(X, 2):
            module(part)
        assert gap(pure(module, nnx.BatchStat), pure(fresh(), nnx.BatchStat)) == 0
    nlx.commit(parts)
    nlx.commit(refused, ok=False)
    nlx.settle(settled)
    assert gap(pure(parts), pure(whole)) < 1e-6
    seen = np.asarray(X, np.float64).reshape(-1, 6)
    if population == "ema":
        assert gap(pure(refused), pure(fresh())) == 0
        assert gap(pure(settled, nnx.BatchStat), {"mean": seen.mean(0), "var": seen.var(0)}) < 1e-6
    else:
        assert refused.population.get_value().skipped == 1
        assert gap(settled.population.get_value().read(), (seen.mean(0), seen.var(0))) < 1e-6


def test_a_transaction_may_span_a_jitted_step_and_must_be_begun():
    model = nnx.Sequential(nlx.BatchNorm(6, momentum=0.9, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="begin"):
        nlx.commit(model)
    with pytest.raises(ValueError, match="swap"):
        nlx.begin(nnx.BatchNorm(6, rngs=nnx.Rngs(0)))

    @nnx.jit
    def step(model, x):
        nlx.begin(model)
        for part in jnp.split(x, 2):
            model(part)
        nlx.commit(model)

    step(model, X)
    expected = nlx.BatchNorm(6, momentum=0.9, rngs=nnx.Rngs(0))
    expected(X)
    assert gap(pure(model.layers[0]), pure(expected)) < 1e-6
    assert model.layers[0].pending is None


def test_cosine_layers_are_cosine_norm():
    @nnx.jit
    def differences(dense, conv):
        affine = nl.Affine(dense.scale[...], dense.bias[...])
        linear = nl.Conv(strides=2, padding=((1, 1),))
        expected = nl.cosine_norm(X, conv.kernel[...], None, linear=linear)
        return (
            dense(X) - nl.cosine_norm(X, dense.kernel[...], affine, centred=True),
            conv(X) - expected,
        )

    dense = nlx.CosineDense(6, 5, centred=True, rngs=nnx.Rngs(0))
    conv = nlx.CosineConv(6, 4, 3, 2, padding=1, use_scale=False, rngs=nnx.Rngs(0))
    for difference in differences(dense, conv):
        assert jnp.abs(difference).max() < 1e-6
    assert dense.scale[...].tolist() == pytest.approx([6**0.5] * 5)
    like = nnx.Conv(6, 4, 3, 2, padding=1, rngs=nnx.Rngs(0))
    shapes = [nnx.eval_shape(lambda m: m(X), m).shape for m in (conv, like)]
    assert shapes[0] == shapes[1]


def test_metadata_reaches_the_parameters():
    make = functools.partial(nlx.LayerNorm, 6, rngs=nnx.Rngs(0))
    module = make(scale_metadata={"note": "gain"})
    assert module.scale.get_metadata("note") == "gain"


def test_a_model_can_be_tabulated():
    model = nlx.BatchNorm(4, rngs=nnx.Rngs(0))
    assert "BatchNorm" in nnx.tabulate(model, jnp.ones((2, 4)))
    assert model(jnp.arange(8.0).reshape(2, 4)).shape == (2, 4)
