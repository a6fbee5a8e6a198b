"""A whole Flax model is the same function after folding, in its own code or without its norms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normlab as nl
import normlab.linen
from normlab import folding
from normlab.folding import fold_model, plain_weights
from tests.helpers import array, draw, gap
from tests.test_docs import python_blocks

BEFORE = {r"(.*)BatchNorm_(\d+)": r"\1Conv_\2"}


class Block(nn.Module):
    """conv-bn-relu three times with a way around; `norm=None` leaves the norms out."""

    bias: bool = False
    eps: float = 1e-5
    norm: bool = True
    shift: bool = True
    dtype: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.5,
            epsilon=self.eps,
            use_bias=self.shift,
            dtype=self.dtype,
        )
        way_around = x
        for groups, dilation in ((1, 1), (2, 1), (1, 2)):
            x = nn.Conv(
                4,
                (3,),
                use_bias=self.bias,
                feature_group_count=groups,
                kernel_dilation=dilation,
                dtype=self.dtype,
            )(x)
            x = nn.relu(norm()(x) if self.norm else x)
        return nn.Dense(3, dtype=self.dtype)(x + way_around)


def filled(model, x, seed=0):
    """Variables for the model: random numbers, those of the norms positive."""

    def fill(path, v):
        numbers = draw(seed, *v.shape)
        kernel = path[-1].key == "kernel"
        return array(0.4 * numbers if kernel else 0.5 + np.abs(numbers), v.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def trained(model, x, seed=0, steps=2):
    """Variables with statistics of a few batches and parameters that are not those of the start."""
    variables = filled(model, x, seed)
    params = variables["params"]
    train = jax.jit(functools.partial(model.apply, train=True, mutable="batch_stats"))
    for step in range(steps):
        batch = x + array(draw(9 + step, *x.shape), x.dtype)
        variables = {"params": params, **train({**variables, "params": params}, batch)[1]}
    return variables


def outputs(model, x):
    return jax.jit(lambda variables: model.apply(variables, x))


X = array(draw(0, 4, 6, 4))


@functools.cache
def example(**options):
    model = Block(**options)
    return model, trained(model, X), outputs(model, X)


def flat(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"shift": False}])
def test_the_same_model_code_runs_folded_variables(options):
    _, variables, apply = example(**options)
    folded, report = fold_model(variables, BEFORE, apply=apply)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), folded) == jax.tree.map(
        lambda v: (v.shape, v.dtype), variables
    )
    assert report.error == gap(apply(folded), apply(variables)) < 2e-6
    assert report.rounding < 2e-6
    assert [(layer.norm, layer.linear) for layer in report.layers] == [
        (f"BatchNorm_{i}", f"Conv_{i}") for i in range(3)
    ]
    assert report.left == ()
    # It did something: every kernel has changed, and a second folding changes nothing.
    changed = {k for k, v in flat(folded).items() if (v != flat(variables)[k]).any()}
    assert {f"['params']['Conv_{i}']['kernel']" for i in range(3)} <= changed
    assert not any("Dense" in k for k in changed)
    assert gap(fold_model(folded, BEFORE)[0], folded) == 0


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_without_the_norms_runs_what_is_left(bias):
    _, variables, apply = example(bias=bias)
    plain = Block(bias=True, norm=False)
    folded, report = fold_model(
        variables, BEFORE, remove=True, apply=apply, folded_apply=outputs(plain, X)
    )
    assert jax.tree.structure(folded) == jax.tree.structure(
        jax.eval_shape(plain.init, jax.random.key(0), X)
    )
    assert report.error < 2e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folded_norm_is_the_identity_to_the_bit(dtype):
    x = array(draw(0, 8, 3, scale=1e3))
    one, zero = jnp.ones(3, dtype), jnp.zeros(3, dtype)
    for eps in (1e-8, 1e-6, 1e-5, 3e-5, 1e-3, 0.1, 0.7, 3.0):
        variables = {
            "params": {
                "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
                "norm": {"scale": 3 * one, "bias": one},
            },
            "batch_stats": {"norm": {"mean": zero + 2, "var": 5 * one}},
        }
        folded, _ = fold_model(variables, {"norm": "dense"}, eps=eps)
        identity = {name: folded[name]["norm"] for name in folded}
        norm = nn.BatchNorm(use_running_average=True, epsilon=eps, param_dtype=dtype)
        with jax.numpy_dtype_promotion("standard"):
            assert (jax.jit(norm.apply)(identity, x) == x).all(), eps


def test_each_layers_bound_holds_on_the_inputs_it_meets():
    _, variables, apply = example(bias=True)
    folded, report = fold_model(variables, BEFORE, apply=apply)
    for layer in report.layers:
        i = int(layer.linear[-1])
        conv = nn.Conv(4, (3,), feature_group_count=1 + (i == 1), kernel_dilation=1 + (i == 2))
        norm = nn.BatchNorm(use_running_average=True)

        def both(variables, x, conv=conv, norm=norm, layer=layer):
            a = conv.apply({"params": variables["params"][layer.linear]}, x)
            own = {name: variables[name][layer.norm] for name in variables}
            return norm.apply(own, a)

        for size in (1e-3, 1.0, 1e3):
            moved = jnp.abs(both(folded, size * X) - both(variables, size * X)).max()
            assert moved <= layer.slope * size * jnp.abs(X).max() + layer.offset
        assert layer.slope < 1e-3
        assert layer.offset < 1e-3


def pair(layer):
    """The variables and the outputs of a layer and a norm after it."""
    model = nn.Sequential([layer, nn.BatchNorm(use_running_average=True)])
    return filled(model, X), outputs(model, X)


@pytest.mark.parametrize(
    ("layer", "unit_axis"),
    [
        (nn.Dense(3), -1),
        (nn.Conv(8, (3,), strides=2, feature_group_count=4), -1),
        (nn.Conv(3, (3,), padding="CIRCULAR", use_bias=False), -1),
        (nn.ConvTranspose(3, (3,), strides=(2,)), -1),
        (nn.ConvTranspose(3, (3,), strides=(2,), transpose_kernel=True), -2),
        (nn.ConvTranspose(4, (2,), transpose_kernel=True, use_bias=False), -2),
    ],
    ids=["dense", "depthwise", "circular", "transposed", "units second", "square"],
)
def test_every_linear_layer_of_flax_folds(layer, unit_axis):
    variables, apply = pair(layer)
    rule = {"layers_1": "layers_0"}
    folded, report = fold_model(variables, rule, unit_axis=unit_axis, apply=apply)
    assert gap(apply(folded), apply(variables)) < 2e-6
    assert report.error <= 2e-6
    if unit_axis == -2:
        with pytest.raises(ValueError, match=r"unit_axis|moves by"):
            fold_model(variables, rule, apply=apply)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_half_precision_is_measured_in_its_own_units(stored):
    with jax.numpy_dtype_promotion("standard"):
        variables, apply = pair(nn.Dense(3, param_dtype=stored, dtype="bfloat16"))
        rule = {"layers_1": "layers_0"}
        folded, report = fold_model(variables, rule, dtype="bfloat16", apply=apply)
        assert folded["params"]["layers_0"]["kernel"].dtype == stored
        assert 1e-4 < report.error < 0.03
        assert report.layers[0].slope > 0.01
        if stored == "float32":
            with pytest.raises(ValueError, match="pass dtype"):
                fold_model(variables, rule, apply=apply)


def test_nnx_models_fold():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Conv(4, 3, (3,), rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
            self.norms = nnx.List([nnx.BatchNorm(3, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = nnx.relu(norm(layer(x)))
            return x

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    variables = jax.tree.map(
        lambda v: v + array(np.abs(draw(1, *v.shape))), nnx.to_pure_dict(state)
    )

    def apply(variables):
        nnx.replace_by_pure_dict(state, variables)
        model = nnx.merge(graph, state)
        model.eval()
        return model(X)

    rule = {r"norms/(\d)": r"layers/\1"}
    folded, report = fold_model(variables, rule, apply=apply)
    assert report.error < 2e-6
    assert [layer.linear for layer in report.layers] == ["layers/0", "layers/1"]
    assert jax.tree.structure(folded) == jax.tree.structure(variables)


class Wrong(nn.Module):
    """Models that look as if they could be folded by their variables."""

    kind: str

    @nn.compact
    def __call__(self, x):
        conv, norm = nn.Conv(4, (3,)), nn.BatchNorm(use_running_average=True)
        if self.kind == "activation between":
            return norm(nn.relu(conv(x)))
        if self.kind == "norm before":
            return conv(norm(x))
        if self.kind == "second reader":
            a = conv(x)
            return norm(a) + a
        return norm(conv(x))


@pytest.mark.parametrize(
    "kind", ["activation between", "norm before", "second reader", "wrong eps"]
)
def test_what_is_not_the_same_function_is_refused(kind):
    model = Wrong(kind)
    variables = filled(model, X)
    eps = 1e-3 if kind == "wrong eps" else 1e-5
    rule = {"BatchNorm_0": "Conv_0"}
    before = jax.tree.map(jnp.copy, variables)
    with pytest.raises(ValueError, match=r"outputs that folding moves by .*rounding explains"):
        fold_model(variables, rule, eps=eps, apply=outputs(model, X))
    assert gap(variables, before) == 0


def small(**more):
    """Variables of two layers, a batch norm and a layer norm."""
    ones = jnp.ones(3)
    return {
        "params": {
            "dense": {"kernel": jnp.ones((2, 3))},
            "head": {"kernel": jnp.ones((3, 4))},
            "norm": {"scale": ones, "bias": ones},
            "layer_norm": {"scale": ones, "bias": ones},
            **more,
        },
        "batch_stats": {"norm": {"mean": ones, "var": ones}},
    }


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ({"nrom": "dense"}, {}, ["'nrom', which fits no layer", "did you mean 'norm'"]),
        ({"norm": "dence"}, {}, ["'dence'", "no kernel", "did you mean 'dense'"]),
        ({"norm": "layer_norm"}, {}, ["'layer_norm' as the layer before 'norm'", "dense, head"]),
        ({"layer_norm": "dense"}, {}, ["'layer_norm', which holds bias, scale", "layer, RMS"]),
        ({"n(orm": "dense"}, {}, ["'n(orm': missing ), unterminated subpattern", "correct it"]),
        ({"n(.*)": "dense", "norm": "dense"}, {}, ["names 'norm' twice"]),
        ({"n(.*)": r"\2"}, {}, ["'norm': invalid group reference 2", "correct it"]),
        ({"norm": "head"}, {}, ["norm after head", "(3, 4)", "unit_axis"]),
        ({"norm": "dense"}, {"unit_axis": 2}, ["axis 2", "(2, 3)"]),
        ({"norm": "dense"}, {"eps": 0.0}, ["eps=0.0"]),
        ({"norm": "dense"}, {"remove": True, "apply": len}, ["both", "folded_apply"]),
        ({"norm": "dense"}, {"folded_apply": len}, ["both", "pass apply"]),
    ],
)
def test_a_rule_that_does_not_fit_says_what_would(rule, options, words):
    with pytest.raises(ValueError, match="fold_model") as error:
        fold_model(small(), rule, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_a_layer_before_two_norms_and_a_number_that_is_not_finite_are_refused():
    variables = small()
    variables["batch_stats"]["layer_norm"] = variables["batch_stats"]["norm"]
    with pytest.raises(
        ValueError, match="'dense' as the layer before both 'norm' and 'layer_norm'"
    ):
        fold_model(variables, {r"(layer_)?norm": "dense"})
    _, report = fold_model(variables, {"norm": "dense"})
    assert report.left == ("layer_norm",)
    variables["batch_stats"]["norm"]["var"] = jnp.array([1.0, jnp.nan, 1.0])
    with pytest.raises(ValueError, match="norm after dense: got a norm whose folded kernel is not"):
        fold_model(variables, {"norm": "dense"})
    half = small(dense={"kernel": jnp.full((2, 3), 6e4, "float16")})
    half["batch_stats"]["norm"]["var"] = jnp.full(3, 1e-4)
    with pytest.raises(ValueError, match=r"not finite in float16.*cast the layer's kernel"):
        fold_model(half, {"norm": "dense"})


def test_a_boxed_variable_says_how_to_unbox_it():
    boxed = small(dense={"kernel": nn.Partitioned(jnp.ones((2, 3)), (None, "units"))})
    with pytest.raises(ValueError, match=r"a Partitioned at 'params/dense/kernel'.*linen.unbox"):
        fold_model(boxed, {"norm": "dense"})
    unboxed, _ = fold_model(nn.unbox(boxed), {"norm": "dense"})
    assert gap(unboxed, fold_model(small(), {"norm": "dense"})[0]) == 0
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"a Param at '(kernel|bias)'.*nnx.to_pure_dict"):
        plain_weights(state, {"": nl.weight_norm})


class Standardized(nn.Conv):
    """A convolution whose kernel is standardized where it is used."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return nl.weight_standardization(value) if name == "kernel" else value


class Inner(nn.Module):
    """Two layers in a module."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(3)(x)))


class Weights(nn.Module):
    """Weight norm around layers and around a module, and weight standardization."""

    plain: bool = False

    @nn.compact
    def __call__(self, x):
        def wrap(layer, **options):
            return layer if self.plain else nn.WeightNorm(layer, **options)

        x = wrap(nn.Conv(4, (3,), feature_group_count=2))(x)
        x = wrap(Inner())(x)
        x = (nn.Conv if self.plain else Standardized)(4, (3,), name="standardized")(x)
        return wrap(nn.ConvTranspose(3, (2,)))(x)


def test_norms_of_the_weights_become_plain_weights():
    model, plain = Weights(), Weights(plain=True)
    variables = filled(model, X)
    rule = {
        r"WeightNorm_\d": jax.jit(nl.weight_norm),
        "standardized": jax.jit(nl.weight_standardization),
    }
    apply = outputs(model, X)
    folded, report = plain_weights(variables, rule, apply=apply, folded_apply=outputs(plain, X))
    assert jax.tree.structure(folded) == jax.tree.structure(
        jax.eval_shape(plain.init, jax.random.key(0), X)
    )
    assert gap(outputs(plain, X)(folded), apply(variables)) == report.error < 2e-6
    linears = "Conv_0 Inner_0/Dense_0 Inner_0/Dense_1 standardized ConvTranspose_0"
    assert {layer.linear for layer in report.layers} == set(linears.split())
    with pytest.raises(ValueError, match="outputs that folding moves by"):
        plain_weights(
            variables,
            {**rule, "standardized": lambda v: v},
            apply=apply,
            folded_apply=outputs(plain, X),
        )


class Wrapped(nn.Module):
    """Maps of the weights around layers."""

    plain: bool = False

    @nn.compact
    def __call__(self, x):
        def wrap(layer, norm, **options):
            if self.plain:
                return layer
            return normlab.linen.RegistryWeights(layer, norm, options, use_running_average=True)

        x = wrap(nn.Conv(4, (3,)), "spectral", use_gain=True)(x)
        x = wrap(nn.Conv(4, (3,)), "weight_standardization", form="timm", gain="offset")(x)
        x = wrap(nn.Dense(4), "weight", bounded=True)(x)
        if self.plain:
            return nn.Dense(3)(x)
        return normlab.linen.SpectralNorm(nn.Dense(3))(x, update_stats=False)


def test_maps_of_the_weights_become_plain_weights():
    model, plain = Wrapped(), Wrapped(plain=True)
    variables = filled(model, X)
    rule = {
        "RegistryWeights_0": nl.get("spectral", use_gain=True),
        "RegistryWeights_1": nl.get("weight_standardization", form="timm", gain="offset"),
        "RegistryWeights_2": nl.get("weight", bounded=True),
        "SpectralNorm_0": nl.get("spectral"),
    }
    applies = {"apply": outputs(model, X), "folded_apply": outputs(plain, X)}
    folded, report = plain_weights(variables, rule, **applies)
    assert jax.tree.structure(folded["params"]) == jax.tree.structure(
        jax.eval_shape(plain.init, jax.random.key(0), X)["params"]
    )
    assert report.error < 2e-6
    with pytest.raises(ValueError, match=r"Dense_1: got no [uv], [uv] of get"):
        plain_weights(variables, {"Dense_1": nl.get("spectral")})


def test_a_wrapper_made_in_setup_keeps_its_level_of_names():
    variables = nn.WeightNorm(nn.Dense(3)).init(jax.random.key(0), X)
    plain, _ = plain_weights(variables, {"": nl.weight_norm})
    assert flat(plain).keys() == {
        "['params']['layer_instance']['bias']",
        "['params']['layer_instance']['kernel']",
    }
    kernel = plain["params"]["layer_instance"]["kernel"]
    assert gap(jnp.linalg.norm(kernel, axis=0), np.ones(3)) < 1e-6


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"dens": nl.weight_norm}, ["'dens', which fits no layer", "did you mean 'dense'"]),
        ({"norm": nl.weight_norm}, ["'norm', which holds bias, mean, scale, var", "WeightNorm"]),
        ({"dense": lambda v: v[0]}, ["(3,) made of (2, 3)"]),
        ({"dense": nl.weight_norm, "wrapper": nl.weight_norm}, ["a kernel named twice"]),
        ({"dense": lambda v: v / 0}, ["dense: got a norm whose folded kernel is not finite"]),
    ],
)
def test_weights_that_cannot_be_written_out_are_refused(rule, words):
    with pytest.raises(ValueError, match="plain_weights") as error:
        plain_weights(small(wrapper={"dense/kernel/scale": jnp.ones(3)}), rule)
    assert all(word in str(error.value) for word in words), error.value


def test_the_examples_in_the_documentation_run(capsys):
    names = {"nl": nl}
    for block in python_blocks("docs/folding.md"):
        exec(block, names)
    assert "BatchNorm_1 in Conv_1: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_rounding_explains_every_right_fold_and_no_wrong_eps(bias, dtype, mean):
    """The numbers of docs/folding.md: the largest error / rounding of 160 nets, and of wrong ε."""
    model = Block(bias=bias, dtype=dtype)
    apply = outputs(model, X)
    with jax.numpy_dtype_promotion("standard"):
        for seed in range(20):
            variables = trained(model, X, seed=seed)
            for norm in variables["batch_stats"].values():
                norm["mean"] = norm["mean"] + mean
            _, report = fold_model(variables, BEFORE, dtype=dtype, apply=apply)
            assert report.error <= 2 * report.rounding
            if dtype is None and not mean:
                with pytest.raises(ValueError, match="outputs that folding moves by"):
                    fold_model(variables, BEFORE, eps=1e-3, apply=apply)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_torch_folds_the_same(transposed):
    torch = pytest.importorskip("torch")
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    layer = torch.nn.ConvTranspose1d(4, 3, 3) if transposed else torch.nn.Conv1d(4, 6, 3, groups=2)
    channels, unit_axis = (3, 1) if transposed else (6, 0)
    norm = torch.nn.BatchNorm1d(channels).eval()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.add_(torch.rand(channels))
    fused = fuse_conv_bn_eval(layer.eval(), norm, transpose=transposed)

    def ours(v):
        return array(v.detach().numpy())

    params = nl.Affine(ours(norm.weight), ours(norm.bias))
    mean, var = ours(norm.running_mean), ours(norm.running_var)
    parts = nl.Parts(mean, jnp.sqrt(var + norm.eps), *params)
    kernel, bias = folding.fold(parts, ours(layer.weight), ours(layer.bias), unit_axis=unit_axis)
    assert gap((kernel, bias), (ours(fused.weight), ours(fused.bias))) < 1e-6


def test_an_apply_that_does_not_look_at_its_argument_is_refused():
    variables = {
        "Dense_0": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([1.0])},
        "BatchNorm_0": {"mean": jnp.array([3.0]), "var": jnp.array([0.75])},
    }
    with pytest.raises(ValueError, match=r"fold_model: got an apply whose outputs do not depend"):
        fold_model(variables, {"BatchNorm_0": "Dense_0"}, apply=lambda _: jnp.ones(3))
