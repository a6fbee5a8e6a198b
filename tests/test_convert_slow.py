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
        "layer along two axes": torch.nn.LayerNorm((2, C)),
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
    "layer along two axes",
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
    unequal = [
        n for n, ours, theirs in defaults_of(torch_table.TORCH.layers, torch.nn) if ours != theirs
    ]
    assert set(unequal) == {"layer normalized_shape", "rms normalized_shape"}  # from the leaves
    assert all(
        ours == theirs for _, ours, theirs in defaults_of(keras_table.KERAS.layers, keras.layers)
    )


@pytest.mark.parametrize("name", TORCH)
def test_torch_there_and_back_and_at_work(torch, name):
    layer = torch_layers(torch)[name]
    kind = name.partition(" without")[0].partition(" along")[0].partition(",")[0]
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
    short = kind if kind in ("layer", "rms") else name
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
    assert convert.from_torch(torch.nn.LayerNorm((2, C))).feature_axes == (-2, -1)
    flat = convert.from_torch(torch.nn.LayerNorm((3, 2, C), elementwise_affine=False))
    assert flat.axes == (-3, -2, -1)
    tracked = torch.nn.InstanceNorm2d(C, track_running_stats=True)
    refused("track_running_stats", lambda: convert.from_torch(tracked))
    refused("the kind of norm", lambda: convert.from_torch(torch.nn.SyncBatchNorm(C)))


@pytest.fixture(scope="module")
def others(torch):
    """Norms of classes that are not torch's own, of which the kind has to be said."""

    class Act(torch.nn.BatchNorm2d):
        """As timm's BatchNormAct2d."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.drop, self.act = torch.nn.Identity(), torch.nn.PReLU()

    class FrozenBatchNorm2d(torch.nn.Module):
        """As torchvision's and detectron2's."""

        def __init__(self, channels, eps=1e-5):
            super().__init__()
            self.eps = eps
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(channels) + 0.5)

        def forward(self, x):
            leaves = self.running_mean, self.running_var, self.weight, self.bias
            return torch.nn.functional.batch_norm(x, *leaves, training=False, eps=self.eps)

    class Rms(torch.nn.Module):
        """As those of many language models, with another name for ε."""

        def __init__(self, channels):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(channels)), 1e-6

    act = Act(C, eps=1e-3, momentum=0.3)
    act(torch.as_tensor(2 * FIRST + 1))
    return {
        "sync": torch.nn.SyncBatchNorm(C, eps=1e-3, momentum=0.3),
        "act": act,
        "frozen": FrozenBatchNorm2d(C, eps=1e-3),
        "tracked": torch.nn.InstanceNorm2d(C, 1e-3, 0.3, affine=True, track_running_stats=True),
        "rms": Rms(C),
    }


@pytest.mark.parametrize("name", ["sync", "act", "frozen", "tracked"])
def test_a_kind_wins_over_the_class_of_a_torch_module(torch, others, name):
    layer = others[name]
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(layer))
    refused(
        "track_running_stats" if name == "tracked" else "kind of norm",
        lambda: convert.from_torch(layer),
    )
    norm = convert.from_torch(layer, "batch")
    same(convert.from_torch(model, "batch", path="1.0"), norm)
    assert norm.eps == 1e-3
    assert norm.options["decay"] == (0.9 if name == "frozen" else 0.7)
    with torch.no_grad():
        x = torch.as_tensor(FIRST)
        h = torch.nn.functional.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
        )
        if name in ("frozen", "tracked"):
            np.testing.assert_array_equal(layer.eval()(x), h)
    assert gap(use(norm, X, train=False)[0], np.moveaxis(h.numpy(), 1, -1)) < 1e-6
    if name == "frozen":
        trained, state = use(norm, X, train=True)
        same(state, norm.state)
        assert gap(trained, np.moveaxis(h.numpy(), 1, -1)) < 1e-6


def test_what_a_torch_module_does_not_say_is_asked_for(torch, others):
    refused("Rms does not say it", lambda: convert.from_torch(others["rms"], "rms"))
    assert convert.from_torch(others["rms"], "rms", eps=1e-6).eps == 1e-6
    lazy = torch.nn.LazyBatchNorm2d()
    refused("no values yet", lambda: convert.from_torch(lazy, "batch"))
    refused("no values yet", lambda: convert.from_torch(torch.nn.LayerNorm(C, device="meta")))
    model = torch.nn.Sequential(torch.nn.LayerNorm(C))
    refused("as '0'", lambda: convert.from_torch(model, "layer", path="1"))
    refused("no kind of norm", lambda: convert.from_torch(model.state_dict(), path="0"))
    tracked = lost(
        lambda allow: convert.from_torch(others["tracked"], allow=allow), "track_running_stats"
    )
    assert tracked.state == ()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_options_begin_as_torchs_layer_does(torch, affine, track, momentum):
    """From the first batch on: the outputs, and what is kept after each."""
    options = {"affine": affine, "track_running_stats": track, "momentum": momentum}
    layer = torch.nn.BatchNorm2d(C, **options)
    norm = convert.from_torch(layer, count=X.size // C)
    made = nl.get("batch", **norm.options)
    params, state = made.init(nl.Site(X))
    same(params, norm.params)
    for step in range(3):
        x = X * (1.0 + step) + step
        h, state = made.apply(params, state, nl.Site(x), train=True)
        with torch.no_grad():
            expected = layer(torch.as_tensor(np.array(jnp.moveaxis(x, -1, 1)))).numpy()
        assert gap(h, np.moveaxis(expected, 1, -1)) < 1e-5
        if track:
            kept = [v.numpy() for v in (layer.running_mean, layer.running_var)]
            assert gap(state.read(), tuple(kept)) < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1, None, "old"])
def test_weight_norm_of_a_transposed_convolution_is_refused(torch, rank, dim):
    class Up(getattr(torch.nn, f"ConvTranspose{rank}d")):
        """A class of another name."""

    layer = Up(3, 3, 2)
    if dim == "old":
        with pytest.warns(FutureWarning):
            layer = torch.nn.utils.weight_norm(layer)
    else:
        layer = torch.nn.utils.parametrizations.weight_norm(layer, dim=dim)
    model = torch.nn.Sequential(layer)
    refused("inputs first", lambda: convert.from_torch(layer, "weight"))
    refused("inputs first", lambda: convert.from_torch(model, "weight", path="0"))


@pytest.mark.parametrize("make", ["Linear", "Conv1d", "Conv2d", "Conv3d"])
@pytest.mark.parametrize("dim", [1, None, -1])
def test_weight_norm_over_other_axes_is_refused(torch, make, dim):
    layer = getattr(torch.nn, make)(*(3, 4, 2)[: 2 + (make != "Linear")])
    layer = torch.nn.utils.parametrizations.weight_norm(layer, dim=dim)
    refused("all axes but the first", lambda: convert.from_torch(layer, "weight"))
    spectral = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 4))
    refused("spectral norm", lambda: convert.from_torch(spectral, "weight"))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("make", ["Linear", "Conv2d"])
def test_torchs_spectral_norm_there_and_back_and_at_work(torch, make, old):
    """After a step of the kernel that u and v have not seen; and many steps later, at σ itself."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(C, 5) if make == "Linear" else torch.nn.Conv2d(C, 5, 3, padding="same")
    utils = torch.nn.utils if old else torch.nn.utils.parametrizations
    layer = utils.spectral_norm(layer, n_power_iterations=2)
    x = np.array(X) if make == "Linear" else FIRST
    linear = nl.Dense() if make == "Linear" else nl.Conv(channel_axis=1)
    with torch.no_grad():
        layer(torch.as_tensor(x))
        kernel = layer.weight_orig if old else layer.parametrizations.weight.original
        kernel += 0.3 * torch.randn(kernel.shape)
    before = {key: v.numpy().copy() for key, v in layer.state_dict().items()}
    norm = convert.from_torch(layer, "spectral")
    exported = convert.to_torch(norm, old_names=old)
    same(exported.variables, before)
    assert exported.arguments == {"n_power_iterations": 2, "eps": 1e-12, "dim": 0}
    spectral, state = nl.get("spectral", **norm.options), norm.state
    bias = norm.params.b if make == "Linear" else norm.params.b[:, None, None]
    for train in (False, *[True] * 300, False):
        layer.train(train)
        with torch.no_grad():
            theirs = layer(torch.as_tensor(x)).numpy()
        ours, state = spectral.kernel(norm.params, state, norm.kernel, train=train)
        assert gap(linear(jnp.asarray(x), ours) + bias, theirs) < 1e-5
    matrix = np.asarray(ours).reshape(-1, 5)
    assert gap(np.linalg.norm(matrix, 2), 1.0) < 1e-5
    refused("spectral norm", lambda: convert.from_torch(layer, "weight"))
    model = torch.nn.Sequential(layer)
    again = convert.from_model(convert.from_torch, model.state_dict(), {"0": ("spectral", {})})
    assert again["0"].kind == "spectral"


def test_keras_spectral_norm_is_written_as_it_keeps_it(keras):
    layer = keras.layers.SpectralNormalization(keras.layers.Conv2D(5, 3, padding="same"))
    layer.build(X.shape)
    refused("projection .*sigma", lambda: convert.from_keras(layer))
    for _ in range(300):
        layer(np.array(X), training=True)
    norm = convert.from_keras(layer, allow=("projection",))
    theirs = np.asarray(layer(np.array(X), training=False))
    ours, _ = nl.get("spectral", **norm.options).kernel(
        norm.params, norm.state, norm.kernel, train=False
    )
    assert gap(nl.Conv()(X, ours) + norm.params.b, theirs) < 1e-5
    larger = norm._replace(kernel=3 * norm.kernel)
    variables, arguments = convert.to_keras(larger, allow=("projection",))
    expected = {v.name: np.asarray(v.value) for v in layer.variables}
    assert gap(variables.pop("kernel"), expected.pop("kernel")) < 1e-6
    same(variables, expected)
    assert arguments == {"power_iterations": 1}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torchs_rms_norm_without_a_number_for_eps_has_that_of_float32(torch, dtype):
    dtype = getattr(torch, dtype)
    layer = torch.nn.RMSNorm(C, dtype=dtype)
    x = torch.full((1, C), 2.0**-12, dtype=dtype)  # whose square is half of ε
    norm = convert.from_torch(layer)
    square = np.float64(2.0**-24)
    expected = np.sqrt(square / (square + norm.eps))
    assert abs(layer(x).double()[0, 0].item() / expected - 1) < 1e-2


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
    "layer along two axes": lambda layers: layers.LayerNormalization(axis=(-2, -1)),
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


def test_a_kind_wins_over_the_class_of_a_keras_layer(keras):
    class Mine(keras.layers.BatchNormalization):
        """Another class."""

    refused("not built", lambda: convert.from_keras(Mine(), "batch"))
    inner = keras.Sequential([Mine(momentum=0.6, epsilon=1e-4, name="bn")], name="inner")
    model = keras.Sequential([keras.layers.Dense(C), inner], name="outer")
    model.build((2, 3))
    layer = inner.layers[0]
    refused("the kind of norm", lambda: convert.from_keras(layer))
    for norm in (
        convert.from_keras(layer, "batch"),
        convert.from_keras(model, "batch", path="outer/inner/bn"),
    ):
        assert (norm.eps, norm.state.decay) == (1e-4, 0.6)
        assert norm.options["population"] == "ema"
    refused("as 'outer/inner/bn'", lambda: convert.from_keras(model, "batch", path="inner/bn"))


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
