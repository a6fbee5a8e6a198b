"""Norms of existing flax models exchanged by path."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import normlab as nl
import normlab.linen as nll
import normlab.nnx as nlx
from normlab._flax import exchange as rules
from tests.helpers import array, draw, gap
from tests.test_docs import ROOT, python_blocks

KEY = jax.random.key(0)
X = array(draw(0, 5, 6, mean=1.0))
shapes = functools.partial(jax.tree.map, jnp.shape)


class Block(nn.Module):
    """A layer and its norm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))


class Net(nn.Module):
    """Norms of every kind of place: nested, shared, in setup, under remat and scan."""

    def setup(self):
        self.first = Block()
        self.replayed = nn.remat(Block, static_argnums=(2,))()
        self.shared = nn.LayerNorm()
        self.stack = nn.scan(
            nn.remat(Scanned),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )()

    def __call__(self, x, train=False):
        x = self.replayed(self.first(x, train), train)
        x = self.shared(self.shared(x) + x)
        return self.stack(x, None)[0]


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(use_running_average=True, name="norm")(x), None


NET = Net()
VARIABLES = NET.init(KEY, X)
PATHS = ("first/BatchNorm_0", "replayed/BatchNorm_0", "shared", "stack/norm")


def test_flaxs_norms_become_ours_with_their_variables_and_numbers():
    other = nll.swap(NET, {".*BatchNorm_0|stack/norm": nll.BatchNorm, "shared": nll.LayerNorm})
    fresh = other.init(KEY, X)
    assert jax.tree.structure(fresh) == jax.tree.structure(VARIABLES)
    assert gap(fresh, VARIABLES) == 0
    (h, stats), (expected, reference) = (
        m.apply(VARIABLES, X, True, mutable=["batch_stats"]) for m in (other, NET)
    )
    assert gap(h, expected) < 1e-5
    assert gap(stats, reference) < 1e-6


def test_the_arguments_of_the_old_norm_are_taken_over():
    seen = {}

    def look(path, module):
        seen[path] = type(module).__module__.partition(".")[0]
        return nll.BatchNorm if path == "first/BatchNorm_0" else None

    other = nll.swap(NET, look)
    _, stats = other.apply(VARIABLES, X, True, mutable=["batch_stats"])
    _, reference = NET.apply(VARIABLES, X, True, mutable=["batch_stats"])
    assert seen == dict.fromkeys(PATHS, "flax")
    name = ("batch_stats", "first", "BatchNorm_0")
    ours, theirs = (functools.reduce(lambda t, k: t[k], name, s) for s in (stats, reference))
    assert gap(ours, theirs) < 1e-6  # momentum 0.9 and not 0.99


def test_a_norm_may_become_a_module_a_class_or_a_name_with_options():
    rule = {
        "first/.*": ("group", {"groups": 2}),
        "replayed/.*": "batch",
        "shared": nll.GroupNorm(num_groups=3),
        ".*": nn.RMSNorm,
    }
    other = nll.swap(NET, rule)
    variables = other.init(KEY, X)
    params = variables["params"]
    assert set(params["stack"]["norm"]) == {"scale"}
    assert set(params["shared"]) == {"scale", "bias"}
    assert list(variables["batch_stats"]) == ["replayed"]
    h, changed = other.apply(variables, X, True, mutable=["batch_stats"])
    state = changed["batch_stats"]["replayed"]["BatchNorm_0"]["population"]
    assert state.updates == 1
    assert h.shape == X.shape


def test_a_swapped_model_is_a_module_like_any_other():
    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x) + self.inner(2 * x)

    plain = nn.Sequential([nn.Dense(4), nn.LayerNorm()])
    outer = Outer(nll.swap(plain, {"layers_1": nll.LayerNorm}))
    variables = outer.init(KEY, X)
    assert shapes(variables) == shapes(Outer(plain).init(KEY, X))
    expected = Outer(plain).apply(variables, X)
    assert gap(jax.jit(outer.apply)(variables, X), expected) < 1e-6

    class Inside(nn.Module):
        @nn.compact
        def __call__(self, x, parent):
            return nll.swap(Block(**parent), {".*": nll.BatchNorm})(x)

    assert list(Inside().init(KEY, X, {"parent": None})["params"]) == ["Swapped_0"]
    with pytest.raises(ValueError, match="parent=None"):
        Inside().init(KEY, X, {})


CompiledBlock = nn.jit(Block)


def test_what_nn_jit_has_compiled_is_an_error_and_not_the_old_norm():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return CompiledBlock(name="block")(x)

    variables = Model().init(KEY, X)
    Model().apply(variables, X)
    with pytest.raises(ValueError, match=r"nn\.jit"):
        nll.swap(Model(), {"block/.*": nll.BatchNorm}).apply(variables, X)


def test_the_swapped_method_is_the_one_that_is_named():
    class Coder(nn.Module):
        def setup(self):
            self.norm = nn.LayerNorm()

        def __call__(self, x):
            return x

        def encode(self, x):
            return self.norm(x)

    other = nll.swap(Coder(), {"norm": "layer"}, method="encode")
    assert gap(other.init_with_output(KEY, X)[0], nl.layer_norm(X)) < 1e-6
    with pytest.raises(ValueError, match="norm"):
        nll.swap(Coder(), {"norm": "layer"}).init(KEY, X)


def model():
    """An nnx model with norms in attributes, lists and dicts, one of them shared."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)])
            self.table = nnx.data({"norm": nnx.LayerNorm(6, rngs=rngs)})
            self.head = nnx.Dict(norm=nnx.GroupNorm(6, 2, rngs=rngs))
            self.again = self.layers[1]

        def __call__(self, x):
            for layer in (*self.layers, self.table["norm"], self.head["norm"], self.again):
                x = layer(x)
            return x

    return Model(nnx.Rngs(0))


def test_nnx_norms_become_ours_with_their_variables_and_numbers():
    theirs, ours = model(), model()
    old = ours.layers[1]
    kept = nnx.to_pure_dict(nnx.state(ours))
    rule = {
        "layers/1": nlx.BatchNorm,
        "table/norm": nlx.LayerNorm,
        "head/norm": nlx.GroupNorm,
    }
    assert nlx.swap(ours, rule) is ours
    assert ours.again is ours.layers[1]
    assert isinstance(ours.again, nlx.BatchNorm)
    assert ours.again.mean is old.mean
    assert gap(nnx.to_pure_dict(nnx.state(ours)), kept) == 0
    assert gap(nnx.jit(lambda m, x: m(x))(ours, X), theirs(X)) < 1e-5
    states = [nnx.to_pure_dict(nnx.state(m)) for m in (ours, theirs)]
    assert gap(*states) < 1e-6


def test_nnx_norms_do_not_come_to_share_and_a_tuple_is_refused_before_anything_changes():
    ours, mine = model(), nlx.RMSNorm(6, rngs=nnx.Rngs(0))
    nlx.swap(ours, {"table/norm|head/norm": mine})
    assert len({id(m) for m in (ours.table["norm"], ours.head["norm"], mine)}) == 3
    other = model()
    other.pair = nnx.data((other.table["norm"],))
    with pytest.raises(ValueError, match=r"nnx\.List"):
        nlx.swap(other, {".*": nlx.RMSNorm})
    assert isinstance(other.layers[1], nnx.BatchNorm)


def test_nnx_norms_may_become_modules_and_names_with_options():
    ours = model()
    rule = {
        "layers/1": ("batch", {"decay": 0.5}),
        "head/norm": nlx.RMSNorm(6, rngs=nnx.Rngs(0)),
    }
    with pytest.raises(ValueError, match="32"):  # flax's default does not divide 6
        nlx.swap(model(), {"table/norm": nlx.GroupNorm})
    nlx.swap(ours, rule)
    assert ours(X).shape == X.shape
    assert ours.again.population.get_value().updates == 2
    ours.eval()
    ours(X)
    assert ours.again.population.get_value().updates == 2
    nlx.begin(ours)
    norm = nlx.swap(nnx.LayerNorm(6, rngs=nnx.Rngs(0)), lambda path, old: "layer")
    assert gap(norm(X), nl.layer_norm(X)) < 1e-6


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"first/BatchNorm": "layer"}, "did you mean 'first/BatchNorm_0'"),
        ({"*": "layer"}, "nothing to repeat"),
        ({".*": "weight"}, "looks at the weights"),
        ({".*": "lyer"}, "did you mean 'layer'"),
        ({".*": 3}, "a module, a class of modules"),
        (lambda path, module: None, "replaces no norm"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_an_error_that_names_the_nearest(rule, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(nll.swap(NET, rule).apply, VARIABLES, X)
    near = {"layers/2": "layer"} if isinstance(rule, dict) and "first/BatchNorm" in rule else rule
    said = "did you mean 'layers/1'" if near is not rule else said
    other = model()
    with pytest.raises(ValueError, match=said):
        nlx.swap(other, near)
    assert isinstance(other.layers[1], nnx.BatchNorm)


def test_patterns_are_paths_or_expressions_for_the_whole_of_one():
    assert rules.matches("a/b", "a/b")
    assert rules.matches("a/.*", "a/b/c")
    assert not rules.matches("a", "a/b")


def test_the_docs_examples_run():
    names: dict = {}
    for block in python_blocks("docs/flax.md"):
        exec(block, names)
    assert gap(names["same"], names["theirs"].apply(names["saved"], names["x"])) < 1e-6
    assert isinstance(names["model"].layers[1], nlx.BatchNorm)
    seen = jnp.concatenate([names["x"], names["x"] + 1, names["x"][:4]])
    layer = names["variables"]["params"]["Dense_0"]
    a = seen @ layer["kernel"] + layer["bias"]
    settled = names["batch_stats"]["BatchNorm_0"]
    assert gap(settled, {"mean": a.mean(0), "var": a.var(0)}) < 1e-5


FILES = ("linen", "nnx", "flax_places")


def test_the_docs_name_tests_that_are_there():
    text = (ROOT / "docs/flax.md").read_text()
    tests = "".join((ROOT / f"tests/test_{name}.py").read_text() for name in FILES)
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 15
    for name in named:
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("home", ["linen", "nnx"])
def test_what_a_replacement_cannot_take_over_is_an_error(home):
    """An axis, a type or a bias that is left out would be lost without a word."""
    x = jnp.ones((4, 3, 6))
    for options, new, lost in [
        ({"axis": 1}, ("group", {"groups": 3}), "axis=1"),
        ({"use_bias": False}, "layer", "use_bias=False"),
        ({"axis_name": "d"}, "batch", "axis_name='d'"),
    ]:
        if home == "linen":
            model = nn.Sequential([nn.BatchNorm(use_running_average=True, **options)])
            other = nll.swap(model, {"layers_0": new})
            run = lambda other=other: other.init(jax.random.key(0), x)  # noqa: E731
        else:
            size = 3 if "axis" in options else 6
            model = nnx.Sequential(nnx.BatchNorm(size, rngs=nnx.Rngs(0), **options))
            run = lambda model=model, new=new: nlx.swap(model, {"layers/0": new})  # noqa: E731
        with pytest.raises(ValueError, match=rf"swap: got a BatchNorm with {lost}"):
            run()


def test_a_partial_is_a_class_with_arguments():
    model = nn.Sequential([nn.LayerNorm(epsilon=0.5)])
    rule = {"layers_0": functools.partial(nll.RMSNorm, epsilon=1e-3)}
    x = jnp.arange(6.0).reshape(2, 3) + 1
    h, _ = nll.swap(model, rule).init_with_output(jax.random.key(0), x)
    assert gap(h, x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-3)) < 1e-6
    assert isinstance(hash(nll.RegistryNorm("rms")), int)
