"""Conversions from and to torch and Keras, which are not installed everywhere."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab import convert
from normlab.convert import keras as keras_table
from normlab.convert import torch as torch_table
from tests.helpers import array, draw, gap
from tests.test_convert import defaults_of, lost, refused, same, use

pytestmark = pytest.mark.slow
os.environ.setdefault("KERAS_BACKEND", "jax")

X = array(draw(0, 4, 3, 2, 6, mean=0.5, scale=1.5))
C = X.shape[-1]
FIRST = np.array(jnp.moveaxis(X, -1, 1))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def keras():
    return pytest.importorskip("keras")


def torch_layers(torch):
    rng = torch.manual_seed(0)
    conv = torch.nn.Conv2d(C, 5, 3, padding="same")
    old = torch.nn.Linear(C, 3)
    layers = {
        "batch": torch.nn.BatchNorm2d(C, eps=1e-3, momentum=0.3),
        "batch without parameters": torch.nn.BatchNorm2d(C, affine=False),
        "batch without statistics": torch.nn.BatchNorm2d(C, track_running_stats=False),
        "batch without a bias": torch.nn.BatchNorm2d(C, bias=False),
        "layer": torch.nn.LayerNorm(C),
        "layer without a bias": torch.nn.LayerNorm((C,), bias=False),
        "rms": torch.nn.RMSNorm(C),
        "group": torch.nn.GroupNorm(3, C, eps=1e-4),
        "instance": torch.nn.InstanceNorm2d(C, affine=True),
        "weight": torch.nn.utils.parametrizations.weight_norm(conv),
        "weight, linear": torch.nn.utils.parametrizations.weight_norm(old),
    }
    for layer in layers.values():
        for p in layer.parameters():
            torch.nn.init.uniform_(p, 0.5, 2.0, generator=rng)
    layers["batch"].train()
    layers["batch"](torch.as_tensor(2 * FIRST + 1))
    layers["batch without parameters"](torch.as_tensor(2 * FIRST + 1))
    return layers


TORCH = (
    "batch",
    "batch without parameters",
    "batch without statistics",
    "batch without a bias",
    "layer",
    "layer without a bias",
    "rms",
    "group",
    "instance",
    "weight",
    "weight, linear",
)


def in_torch(torch, layer, kind, train):
    layer.train(train)
    first = kind not in ("layer", "rms", "weight, linear")
    with torch.no_grad():
        h = layer(torch.as_tensor(FIRST if first else np.array(X))).numpy()
    return np.moveaxis(h, 1, -1) if first else h


def test_the_defaults_are_those_of_the_installed_libraries(torch, keras):
    unequal = [n for n, ours, theirs in defaults_of(torch_table.LAYERS, torch.nn) if ours != theirs]
    assert set(unequal) == {"layer normalized_shape", "rms normalized_shape"}  # from the leaves
    assert all(ours == theirs for _, ours, theirs in defaults_of(keras_table.LAYERS, keras.layers))


@pytest.mark.parametrize("name", TORCH)
def test_torch_there_and_back_and_at_work(torch, name):
    layer = torch_layers(torch)[name]
    kind = name.partition(" without")[0].partition(",")[0]
    before = {key: v.numpy().copy() for key, v in layer.state_dict().items()}
    norm = convert.from_torch(layer, *["weight"] * (kind == "weight"))
    exported = convert.to_torch(norm)
    same(exported.variables, before)
    arguments = {} if kind == "weight" else exported.arguments
    again = convert.from_torch(exported.variables, kind, **arguments)
    same(again, norm)
    assert again.options == norm.options
    if kind == "batch":
        assert exported.arguments["momentum"] == layer.momentum if norm.state else True
    short = name.removesuffix(" without a bias") if kind in ("layer", "rms") else name
    for train, bound in ((False, 1e-6), (True, 1e-5)):
        expected = in_torch(torch, layer, short, train)
        h, state = use(norm, X, train=train)
        assert gap(h, expected) < bound
    if kind == "batch" and norm.state:
        after = convert.from_torch(layer).state
        assert gap(state.read(), after.read()) < 1e-5
        assert state.updates == after.updates


def test_torchs_layer_is_made_again_from_what_is_exported(torch):
    layer = torch_layers(torch)["batch"]
    leaves, arguments = convert.to_torch(convert.from_torch(layer))
    made = torch.nn.BatchNorm2d(C, **arguments)
    made.load_state_dict({name: torch.as_tensor(v) for name, v in leaves.items()})
    for train in (False, True):
        np.testing.assert_array_equal(
            in_torch(torch, made, "batch", train), in_torch(torch, layer, "batch", train)
        )


def test_torchs_old_names_of_weight_norm(torch):
    layer = torch.nn.Linear(C, 3)
    with pytest.warns(FutureWarning):
        layer = torch.nn.utils.weight_norm(layer)
    norm = convert.from_torch(layer, "weight")
    exported = convert.to_torch(norm, old_names=True)
    same(exported.variables, {key: v.numpy() for key, v in layer.state_dict().items()})
    assert gap(use(norm, X, train=False)[0], in_torch(torch, layer, "weight, linear", False)) < 1e-6


def test_torchs_equal_average_is_cumulative_if_batches_are_alike(torch):
    layer = torch.nn.BatchNorm2d(C, momentum=None)
    for step in range(3):
        layer(torch.as_tensor(FIRST * (step + 1) + step))
    values = X.size // C
    refused("momentum=None and count=None", lambda: convert.from_torch(layer))
    norm = convert.from_torch(layer, count=values)
    leaves, arguments = lost(lambda allow: convert.to_torch(norm, allow=allow), "count")
    assert arguments["momentum"] is None
    for name, v in layer.state_dict().items():
        ulps = 1 if name == "running_var" else 0  # times and by the number of values
        np.testing.assert_array_max_ulp(leaves[name], v.numpy(), ulps)
    for train, bound in ((False, 1e-6), (True, 1e-5)):
        expected = in_torch(torch, layer, "batch", train)
        h, state = use(norm, X, train=train)
        assert gap(h, expected) < bound
    assert gap(state.read(), convert.from_torch(layer, count=values).state.read()) < 1e-5
    on = convert.from_torch(layer, momentum=0.1)  # from here on an average that forgets
    same(on.state.mean, array(layer.running_mean.numpy()))


def test_torch_in_a_prefix_in_half_precision_and_with_gradients(torch):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, C, 1), torch.nn.LayerNorm(C).bfloat16())
    norm = convert.from_torch(dict(model.named_parameters()), "layer", path="1")
    assert norm.params.g.dtype == jnp.bfloat16
    refused("no leaf '2.weight'", lambda: convert.from_torch(model.state_dict(), "layer", path="2"))
    batch = torch.nn.BatchNorm2d(C)
    same(convert.from_torch(batch.state_dict(), batch), convert.from_torch(batch))
    refused("in float64", lambda: convert.from_torch(torch.nn.LayerNorm(C).double()))
    refused("units first", lambda: convert.from_torch(torch.nn.ConvTranspose2d(2, 3, 3), "weight"))
    refused("one value per channel", lambda: convert.from_torch(torch.nn.LayerNorm((2, C))))
    flat = convert.from_torch(torch.nn.LayerNorm((3, 2, C), elementwise_affine=False))
    assert flat.axes == (-3, -2, -1)
    tracked = torch.nn.InstanceNorm2d(C, track_running_stats=True)
    refused("track_running_stats", lambda: convert.from_torch(tracked))
    refused("the kind of norm", lambda: convert.from_torch(torch.nn.SyncBatchNorm(C)))


def test_a_torch_model_goes_to_flax_with_its_evaluation(torch):
    """The everyday case: the unbiased variance and the counter are lost knowingly."""
    nn = pytest.importorskip("flax.linen")
    layer = torch_layers(torch)["batch"]
    norm = convert.from_torch(layer)
    exported = lost(lambda allow: convert.to_linen(norm, allow=allow), "ddof", "updates")
    h = nn.BatchNorm(use_running_average=True, **exported.arguments).apply(exported.variables, X)
    assert gap(h, in_torch(torch, layer, "batch", False)) < 1e-6


# --- Keras

KERAS = {
    "batch": lambda layers: layers.BatchNormalization(momentum=0.7),
    "layer": lambda layers: layers.LayerNormalization(center=False),
    "layer over positions": lambda layers: layers.LayerNormalization(
        axis=(1, 2, 3), center=False, scale=False
    ),
    "rms": lambda layers: layers.RMSNormalization(epsilon=1e-4),
    "group": lambda layers: layers.GroupNormalization(groups=3),
    "instance": lambda layers: layers.GroupNormalization(groups=-1, scale=False),
}


def keras_layer(keras, name):
    layer = KERAS[name](keras.layers)
    layer.build(X.shape)
    for seed, v in enumerate(layer.variables):
        v.assign(np.random.default_rng(seed).uniform(0.5, 2, v.shape))
    return layer


@pytest.mark.parametrize("name", KERAS)
def test_keras_there_and_back_and_at_work(keras, name):
    layer = keras_layer(keras, name)
    kind = name.partition(" ")[0]
    flags = {"training": False} if kind == "batch" else {}
    norm = convert.from_keras(layer)
    assert norm.kind == kind
    exported = convert.to_keras(norm)
    same(exported.variables, {v.name: np.asarray(v) for v in layer.variables})
    same(
        convert.from_keras(
            exported.variables, "group" if kind == "instance" else kind, **exported.arguments
        ),
        norm,
    )
    assert gap(use(norm, X, train=False)[0], np.asarray(layer(X, **flags))) < 1e-6
    if kind == "batch":
        h, state = use(norm, X, train=True)
        assert gap(h, np.asarray(layer(X, training=True))) < 1e-5
        assert gap(state.read(), convert.from_keras(layer).state.read()) < 1e-5


def test_keras_refuses_what_normlab_cannot_say(keras):
    layer = keras_layer(keras, "batch")
    layer.trainable = False
    lost(lambda allow: convert.from_keras(layer, allow=allow), "trainable")
    renorm = keras.layers.BatchNormalization(renorm=True)
    renorm.build(X.shape)
    refused("renorm", lambda: convert.from_keras(renorm))
    model = keras.Sequential([keras.layers.LayerNormalization(name="ln")])
    model.build(X.shape)
    variables = {v.path: v for v in model.variables}
    (path,) = {name.rpartition("/")[0] for name in variables}
    assert convert.from_keras(variables, "layer", path=path).eps == 1e-3
    norm = convert.Converted("rms", nl.Affine(None, None), eps=1e-5)
    refused("always has one", lambda: convert.to_keras(norm))


def test_the_norms_of_a_torch_model_by_a_rule(torch):
    block = [torch.nn.Conv2d(C, C, 1), torch.nn.BatchNorm2d(C)]
    model = torch.nn.Sequential(*block, torch.nn.Sequential(*block), torch.nn.GroupNorm(2, C))
    leaves = model.state_dict()
    rule = {r"(2\.)?1": "batch", "3": ("group", {"num_groups": 2})}
    norms = convert.from_model(convert.from_torch, leaves, rule)
    assert list(norms) == ["1", "2.1", "3"]
    exported = convert.to_model(convert.to_torch, norms)
    expected = {n: v.numpy() for n, v in leaves.items() if n.rpartition(".")[0] in norms}
    same(exported.variables, expected)


def test_keras_in_half_precision_is_refused(keras):
    layer = keras.layers.LayerNormalization(dtype="mixed_bfloat16")
    layer.build(X.shape)
    lost(lambda allow: convert.from_keras(layer, allow=allow), "compute_dtype")


def test_a_module_of_a_live_model_says_its_own_arguments():
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6, 1e-3, 0.5))
    norm = convert.from_torch(net, "batch", path="1")
    assert (norm.eps, norm.state.decay) == (1e-3, 0.5)
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose2d(6, 6, 3))
    with pytest.raises(ValueError, match=r"ConvTranspose2d, whose kernel has its inputs first"):
        convert.from_torch(torch.nn.Sequential(conv), "weight", path="0")
