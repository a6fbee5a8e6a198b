"""The networks of the experiments: every norm in every network, and each network by hand."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import normlab as nl
from normlab.experiments import models
from normlab.experiments.data import Dataset
from normlab.experiments.models.block import LINEAR
from normlab.experiments.models.layers import choose, rescaled
from normlab.experiments.models.resnet import shortcut
from normlab.experiments.training.trainer import AXIS, FORMS, DeviceData, Trainer
from tests.cases import NAMES
from tests.helpers import draw, gap

CLASSES = 3
SIZES = {
    "mlp": {"widths": (4,)},
    "conv": {"widths": (4,)},
    "vgg": {"widths": (4,), "depth": 2},
    "nin": {"widths": ((4, 4),)},
    "resnet20": {"widths": (4,), "n": 1},
    "lstm": {"widths": (4,)},
    "gru": {"widths": (4,)},
    "vit": {"width": 8, "depth": 1, "heads": 2},
    "lm": {"width": 8, "depth": 1, "heads": 2, "kv_heads": 1},
}
"""Of every kind of network, one that is small enough to be compiled with each norm."""

MADE = nl.placement.scheme("pre", depth=1)
FLAT = ("mlp", "lstm", "gru", "vit", "lm")
"""Those whose activations have no positions, which instance norm needs."""

ON_W = ("weight", "weight_standardization", "cosine", "centred_cosine")
IMAGES = draw(0, 4, 8, 8, 1).astype(np.float32)
LABELS = np.array([0, 1, 2, 0])
TOKENS = np.random.default_rng(0).integers(0, CLASSES, (4, 7))


def norm(name: str, **options) -> nl.Norm:
    return nl.get(name, **{"group": {"groups": 2}}.get(name, {}), **options)


def make(model: str, name: str = "batch", **options):
    return models.build(model, norm(name), CLASSES, **{**SIZES.get(model, {}), **options})


def example(model: str) -> tuple[Any, Any]:
    """What a model reads, and what it is to say."""
    return (TOKENS[:, :-1], TOKENS[:, 1:]) if model == "lm" else (IMAGES, LABELS)


def random(network, x, scale: float = 1.0):
    """Random parameters, drawn without compiling anything."""
    made = jax.eval_shape(lambda: network.init(jax.random.key(0), x, train=False)["params"])
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: array(scale * rng.normal(size=v.shape)), made)


def variables(network, x: Any = IMAGES):
    """Random parameters, and the initial states of the norms."""
    made = jax.jit(lambda: models.split(network.init(jax.random.key(0), x, train=False))[1])
    return random(network, x), made()


def leaves(params) -> list[tuple[tuple[str, ...], Any]]:
    return list(flatten_dict(params).items())


def array(v):
    return jnp.asarray(v, jnp.float32)


def apply(network, params, state, x, *, train, mutable=(models.STATE,)):
    return network.apply(
        {"params": params, models.STATE: state}, x, train=train, mutable=list(mutable)
    )


@pytest.fixture(autouse=True)
def plain_convolutions(monkeypatch):
    """XLA's own convolution: slower to run, much faster to compile, the same numbers."""
    monkeypatch.setattr(models.MatmulConv, "__call__", nl.Conv.__call__)


class TestEveryNorm:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("model", SIZES)
    def test_two_steps_under_every_norm_bring_the_loss_down(self, model, name):
        x, labels = example(model)
        if name == "instance" and model in FLAT:
            with pytest.raises(ValueError, match="with positions between examples and channels"):
                jax.eval_shape(lambda: make(model, name).init(jax.random.key(0), x, train=True))
            return
        network = make(model, name)

        def loss(params, state):
            logits, changed = apply(network, params, state, x, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), changed.get(models.STATE, state)

        def step(carry, _):
            (value, state), grads = jax.value_and_grad(loss, has_aux=True)(*carry)
            length = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
            params = jax.tree.map(lambda v, g: v - 0.003 * g / length, carry[0], grads)
            return (params, state), value

        def train(kernels):
            start = models.split(models.complete(network, kernels, x))
            return start, *jax.lax.scan(step, start, length=2)

        start, end, losses = jax.jit(train)(random(network, x, scale=0.5))
        assert losses[1] < losses[0]
        moved = flatten_dict(jax.tree.map(lambda a, b: (a != b).any(), start[0], end[0]))
        assert [path for path in moved if path[-1] == "kernel" and not moved[path]] == []
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(end))
        assert jax.tree.structure(start) == jax.tree.structure(end)
        states = jax.tree.leaves(end[1], is_leaf=lambda v: isinstance(v, nl.Running))
        assert bool(states) == (name == "batch")
        assert all((state.updates == 2).all() for state in states)


class TestEveryModel:
    @pytest.mark.parametrize(
        ("model", "millions"),
        [
            *(("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85), ("resnet110", 1.7)),
            *(("nin", 0.97), ("vgg", 4.66)),
        ],
    )
    def test_the_sizes_are_those_of_the_papers(self, model, millions):
        network = models.build(model, norm("batch"), 10)
        image = np.zeros((1, 32, 32, 3), np.float32)
        params = jax.eval_shape(lambda: network.init(jax.random.key(0), image, train=False))
        count = sum(v.size for v in jax.tree.leaves(params["params"]))
        assert f"{count / 1e6:.{len(str(millions)) - 2}f}" == str(millions)

    @pytest.mark.parametrize("model", models.MODELS)
    def test_the_layers_that_carry_a_norm_are_those_that_are_named(self, model):
        network = make(model, where=lambda name: True)
        made = jax.eval_shape(
            lambda: network.init(jax.random.key(0), example(model)[0], train=False)
        )
        carrying = set()
        for path, params in leaves(made["params"]):
            of = {"": params} if path[-1] == "norm" else {}
            if isinstance(params, nl.placement.Residual):
                of = {f"/{place}": v for place, v in params._asdict().items() if v is not None}
            carrying |= {"/".join(path[:-1]) + place for place, v in of.items() if v.g is not None}
        assert carrying == set(network.layers)

    def test_resnets_have_6n_plus_2_layers(self):
        for depth in (20, 32, 56, 110):
            network = models.build(f"resnet{depth}", norm("batch"), 10)
            assert len(network.layers) + 1 == depth

    def test_resnet50_has_53_norms_and_the_papers_weights(self):
        network = models.build("resnet50", norm("batch"), 1000)
        assert len(network.carriers()) == 53
        image = np.zeros((1, 224, 224, 3), np.float32)
        params = jax.eval_shape(lambda: network.init(jax.random.key(0), image, train=False))
        assert sum(v.size for v in jax.tree.leaves(params["params"])) == 25_557_032

    def test_a_shortcut_takes_every_other_position_and_pads_channels_with_zeros(self):
        x = array(draw(0, 2, 4, 5, 3))
        y = shortcut(x, 2, 5)
        assert y.shape == (2, 2, 3, 5)
        assert (y[..., :3] == x[:, ::2, ::2]).all()
        assert (y[..., 3:] == 0).all()


class TestPlacement:
    def batch(self, a, params):
        return nl.batch_norm(a, params, nl.init_running(a.shape[-1]), train=True)[0]

    @pytest.mark.parametrize("placement", ["before", "after"])
    def test_the_norm_stands_before_the_activation_or_after_it(self, placement):
        network = make("mlp", placement=placement)
        params, state = variables(network)
        layer, last = params["Normed_0"], params["Dense_0"]
        a = IMAGES.reshape(4, -1) @ layer["kernel"]
        if placement == "before":
            h = jax.nn.sigmoid(self.batch(a, layer["norm"]))
        else:
            h = self.batch(jax.nn.sigmoid(a + layer["bias"]), layer["norm"])
        got, _ = apply(network, params, state, IMAGES, train=True)
        assert gap(got, h @ last["kernel"] + last["bias"]) < 1e-6

    def test_a_perceptron_may_have_the_norm_at_its_output_too(self):
        network = make("mlp", normed_output=True)
        params, state = variables(network)
        assert set(params) == set(state) == set(network.layers)
        only = make("mlp", widths=(), normed_output=True)
        params, state = variables(only)
        a = IMAGES.reshape(4, -1) @ params["Normed_0"]["kernel"]
        got, _ = apply(only, params, state, IMAGES, train=True)
        assert gap(got, self.batch(a, params["Normed_0"]["norm"])) < 1e-6

    @pytest.mark.parametrize("placement", ["before", "after"])
    def test_a_residual_block_adds_its_shortcut_in_front_of_the_activation(self, placement):
        network = make("resnet20", placement=placement)
        params, state = variables(network)

        def layer(name, x, added: Any = 0.0):
            p = params[name]
            a = nl.Conv()(x, p["kernel"])
            if placement == "before":
                return jax.nn.relu(self.batch(a, p["norm"]) + added)
            return self.batch(jax.nn.relu(a + p["bias"] + added), p["norm"])

        x = layer("stem", IMAGES)
        x = layer("stage0_block0_conv1", layer("stage0_block0_conv0", x), x)
        got, _ = apply(network, params, state, IMAGES, train=True)
        want = x.mean((1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        assert gap(got, want) < 1e-5

    def test_a_bottleneck_is_that_of_the_paper(self):
        """The second block of the first stage has the identity beside it, the others a 1×1."""
        options = {"widths": (2, 3), "n": (2, 1)}
        network = make("resnet50", **options)
        params, state = variables(network)

        def layer(name, x, strides=1):
            p = params[name]
            return self.batch(nl.Conv(strides=strides)(x, p["kernel"]), p["norm"])

        x = jax.nn.relu(layer("stem", array(IMAGES), 2))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for name, strides in (("stage0_block0", 1), ("stage0_block1", 1), ("stage1_block0", 2)):
            y = jax.nn.relu(layer(f"{name}_conv0", x))
            y = jax.nn.relu(layer(f"{name}_conv1", y, strides))
            beside = x if name == "stage0_block1" else layer(f"{name}_shortcut", x, strides)
            x = jax.nn.relu(layer(f"{name}_conv2", y) + beside)
        assert x.shape == (4, 1, 1, 12)
        got, _ = apply(network, params, state, IMAGES, train=True)
        want = x.mean((1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        assert gap(got, want) < 1e-5

    @pytest.mark.parametrize("scheme", ["pre", "fixup", "nfnet"])
    def test_bottlenecks_stand_on_a_schemes_connections_too(self, scheme):
        network = make("resnet50", "none", widths=(2, 3), n=(2, 1), scheme=scheme)
        params, state = variables(network)
        got, _ = apply(network, params, state, IMAGES, train=True)
        assert got.shape == (4, CLASSES)
        assert jnp.isfinite(got).all()

    def test_with_a_scheme_a_residual_block_is_a_preactivation_one(self):
        """That of He et al. 2016, by hand; the second block has another shape than its input."""
        options = {"widths": (4, 6), "n": 1, "scheme": "pre", "where": "stem|.*conv0"}
        network = make("resnet20", **options)
        params, state = variables(network)

        def layer(name, x, strides=1):
            a = nl.Conv(strides=strides)(x, params[name]["kernel"])
            p = params[name]["norm"]
            return a + p.b if p.g is None else self.batch(a, p)

        x = layer("stem", array(IMAGES))
        for name, strides, width in (("stage0_block0", 1, 4), ("stage1_block0", 2, 6)):
            y = jax.nn.relu(self.batch(x, params[name]["norm"].inner))
            y = layer(f"{name}_conv1", jax.nn.relu(layer(f"{name}_conv0", y, strides)))
            x = shortcut(x, strides, width) + y
        x = jax.nn.relu(self.batch(x, params["norm_last"]["norm"])).mean((1, 2))
        got, _ = apply(network, params, state, IMAGES, train=True)
        assert gap(got, x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]) < 1e-5

    @pytest.mark.parametrize("scheme", ["skipinit", "rezero", "fixup", "nfnet", "keel"])
    def test_a_residual_net_begins_as_its_scheme_says(self, scheme):
        network = make("resnet20", "none", widths=(4, 6), n=2, scheme=scheme)
        begin = lambda: network.init(jax.random.key(0), IMAGES, train=False)["params"]  # noqa: E731
        found = {"scale": [p.scale for p in network.connections]}
        found["skip"] = [p.skip for p in network.connections]
        expected = {"scale": [1] * 4, "skip": [4 if scheme == "keel" else 1] * 4}
        if scheme == "nfnet":  # the variance before each block, with a new start at a new shape
            scale = [v**-0.5 for v in (1, 1.04, 1.08, 1.04)]
            expected = {"scale": scale, "skip": [1, 1, scale[2], 1]}
        assert {name: pytest.approx(v) for name, v in expected.items()} == found
        params = jax.eval_shape(begin)
        learned = [params[name]["norm"].branch is not None for name in network.blocks]
        assert learned == [scheme in ("skipinit", "rezero", "nfnet")] * 4
        if scheme == "fixup":
            kernels = jax.jit(begin)()
            zero = [name for name, p in kernels.items() if not jnp.any(p.get("kernel", 1))]
            assert zero == ["Dense_0", *(f"{name}_conv1" for name in network.blocks)]

    @pytest.mark.parametrize("name", ON_W)
    def test_a_norm_that_looks_at_w_has_no_place_after_the_activation(self, name):
        network = make("mlp", name, placement="after")
        with pytest.raises(ValueError, match=r"Normed_0.*use placement=\"before\""):
            jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, train=True))

    def test_norms_of_weights_stand_in_the_linear_layers_of_a_transformer(self):
        def carriers(name):
            return sorted(make("vit", name).carriers())

        assert carriers("layer") == ["block0/attention/inner", "block0/mlp/inner", "norm_last"]
        linear = [f"block0/{name}" for name in ("down", "k", "out", "q", "up", "v")]
        assert all(carriers(name) == linear for name in ON_W)

    def test_other_placements_are_refused(self):
        with pytest.raises(
            ValueError, match="got placement='behind'; expected 'before' or 'after'"
        ):
            make("mlp", placement="behind").carriers()
        with pytest.raises(ValueError, match="gate's sigmoid sees the sum of two"):
            make("lstm", placement="after").carriers()
        with pytest.raises(ValueError, match=r"use scheme=\"post\" for norm\(x \+ f\(x\)\)"):
            make("vit", placement="after").carriers()


class TestFused:
    @pytest.mark.parametrize("placement", ["before", "after"])
    def test_no_activation_follows_a_norm_that_has_its_own(self, placement):
        network = models.build("conv", nl.get("frn"), CLASSES, widths=(4,), placement=placement)
        params, state = variables(network)
        layer, last = params["Normed_0"], params["Dense_0"]
        a = nl.Conv(strides=2)(array(IMAGES), layer["kernel"])
        h = nl.family.frn_norm(a + layer.get("bias", 0.0), layer["norm"])
        got, _ = apply(network, params, state, IMAGES, train=True)
        expected = h.reshape(4, -1) @ last["kernel"] + last["bias"]
        assert gap(got, expected) < 1e-5

    @pytest.mark.parametrize("model", ["lstm", "gru"])
    def test_a_gate_refuses_one(self, model):
        network = models.build(model, nl.get("evo_s0", groups=2), CLASSES, widths=(4,))
        with pytest.raises(ValueError, match="of which an activation is part"):
            jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, train=True))

    @pytest.mark.parametrize("kept", ["plain", "offset", "log", "scalar"])
    def test_the_initial_gain_is_multiplied_however_it_is_kept(self, kept):
        params = rescaled(nl.get("batch", gain=kept).init(nl.Site(array(IMAGES)))[0], 0.25)
        assert gap(params.g, np.full(jnp.shape(params.g), 0.25)) < 1e-6


class TestWhere:
    def test_an_expression_names_or_a_predicate_choose_the_same_layers(self):
        layers = make("resnet20", n=2).layers
        names = ("stem", "stage0_block0_conv0", "stage0_block1_conv0")
        for where in ("stem|.*conv0", names, lambda name: name.endswith(("stem", "conv0"))):
            assert choose("resnet20", where, layers) == names

    def test_layers_that_are_not_chosen_have_a_bias_instead(self):
        network = make("mlp", widths=(4, 4), where="Normed_1")
        made = jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, train=False))
        params, state = models.split(made)
        assert params["Normed_0"]["norm"].g is None
        assert params["Normed_0"]["norm"].b.shape == (4,)
        assert state["Normed_0"]["norm"] == ()
        assert isinstance(state["Normed_1"]["norm"], nl.Running)

    @pytest.mark.parametrize(
        ("where", "message"),
        [
            (
                "conv_0",
                "'conv_0', which matches no layer.*did you mean 'conv0'. Known: conv0, conv1",
            ),
            ((), "matches no layer.*Known: conv0, conv1"),
            (("conv0", "cnv1"), "there is no layer 'cnv1'.*did you mean 'conv1'"),
            ("conv(", r"unterminated subpattern.*Known: conv0, conv1"),
            (lambda name: False, "matches no layer.*Known: conv0, conv1"),
        ],
    )
    def test_a_rule_that_matches_nothing_lists_the_nearest_names(self, where, message):
        with pytest.raises(ValueError, match=f"Vgg: got where=.*{message}"):
            make("vgg", where=where).carriers()

    def test_a_norm_of_weights_cannot_stand_where_there_are_none(self):
        for model, place, message in (
            ("lstm", "layer0/cell", "layer0/cell: got a norm that looks at w or x"),
            ("vit", "block0/norm_q", "block0/norm_q: got a norm that looks at w or x"),
            ("vit", "block0/mlp/outer", "outer=get.'weight'.*expected a norm of activations"),
        ):
            network = make(model, "weight", where=(place,))
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, train=True))  # noqa: B023


class TestBuild:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mlp": "relu"}, "Lm: got mlp='relu'; expected 'swiglu' or 'gelu'"),
            ({"heads": 3}, "width=8, heads=3, kv_heads=1; expected heads that divide the width"),
            ({"heads": 8}, "width=8, heads=8, kv_heads=1; expected heads that divide the width"),
            ({"kv_heads": 4}, "heads=2, kv_heads=4; expected heads that divide the width"),
            ({"scheme": "prae"}, "unknown scheme 'prae': did you mean 'pre'"),
            ({"inside": ("queries",)}, "the place 'queries'"),
            ({"inside": ("q",), "scheme": MADE}, "pass inside to nl.placement.scheme"),
        ],
    )
    def test_a_language_model_says_what_does_not_fit(self, options, message):
        with pytest.raises(ValueError, match=message):
            make("lm", "rms", **options).init(jax.random.key(0), TOKENS, train=False)

    def test_an_unknown_model_or_option_gets_the_nearest_name(self):
        with pytest.raises(ValueError, match="unknown model 'resnet21': did you mean 'resnet"):
            models.build("resnet21", norm("batch"), 10)
        with pytest.raises(ValueError, match="nin: unknown option 'width': did you mean 'widths'"):
            models.build("nin", norm("batch"), 10, width=3)


def dense(params, x):
    """A linear layer, with its own bias or its norm's."""
    b = params["bias"] if "bias" in params else getattr(params.get("norm"), "b", None)
    y = x @ np.asarray(params["kernel"])
    return y if b is None else y + np.asarray(b)


def turn(x, base=10_000.0):
    """RoPE by complex numbers."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None, None] * base ** -(np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def shares(q, k, seen):
    """What each head gives to every key, [H, N, T, S], with a head of k for several of q."""
    share, found = q.shape[2] // k.shape[2], []
    for h in range(q.shape[2]):
        logits = q[:, :, h] @ k[:, :, h // share].swapaxes(1, 2) / np.sqrt(q.shape[-1])
        weights = np.exp(np.where(seen, logits, -np.inf) - logits.max(-1, keepdims=True))
        found.append(weights / weights.sum(-1, keepdims=True))
    return found


def attend(q, k, v, seen):
    """Attention, head by head."""
    share = q.shape[2] // k.shape[2]
    heads = [a @ v[:, :, h // share] for h, a in enumerate(shares(q, k, seen))]
    return np.stack(heads, 2)


class TestTransformers:
    def norms(self, network, params):
        """Layer norms by the names of the network's places; identities elsewhere."""
        carriers = network.carriers()

        def norm(place, x):
            if place not in carriers:
                return x
            *path, last = place.split("/")
            tree = params
            for key in path:
                tree = tree[key]
            found = tree["norm"] if last in nl.placement.Residual._fields else tree[last]["norm"]
            found = getattr(found, last, found)
            return np.asarray(nl.layer_norm(x, found))

        return norm

    def block(self, norm, name, x, attention, mlp):
        for branch, f in (("attention", attention), ("mlp", mlp)):
            at = f"{name}/{branch}"
            x = norm(f"{at}/total", x + norm(f"{at}/outer", f(norm(f"{at}/inner", x))))
        return x

    @pytest.mark.parametrize("scheme", ["pre", "post"])
    def test_the_vision_transformer_by_hand(self, scheme):
        network = make("vit", "layer", scheme=scheme)
        params, state = variables(network)
        norm, p = self.norms(network, params), params["block0"]

        def attention(x):
            q, k, v = (dense(p[name], x).reshape(4, 5, 2, 4) for name in "qkv")
            return dense(p["out"], attend(q, k, v, True).reshape(4, 5, 8))

        def mlp(x):
            return dense(p["down"], np.asarray(jax.nn.gelu(dense(p["up"], x))))

        patches = [IMAGES[:, i : i + 4, j : j + 4].reshape(4, 16) for i in (0, 4) for j in (0, 4)]
        x = dense(params["embed"], np.stack(patches, 1))
        first = np.broadcast_to(params["class_token"], (4, 1, 8))
        x = np.concatenate([first, x], 1) + params["positions"]
        x = norm("norm_last", self.block(norm, "block0", x, attention, mlp))
        got, _ = jax.jit(functools.partial(apply, network, train=False))(params, state, IMAGES)
        assert gap(got, dense(params["head"], x[:, 0])) < 1e-5

    @pytest.mark.parametrize(
        "options",
        [
            {"scheme": "peri", "inside": ("q", "k"), "tied": False},
            {"scheme": "sub", "mlp": "gelu", "use_bias": True, "context": 3},
        ],
    )
    def test_the_language_model_by_hand(self, options):
        network = make("lm", "layer", **{"heads": 4, "kv_heads": 2, "width": 16}, **options)
        tokens, _ = example("lm")
        params, state = variables(network, tokens)
        norm, p = self.norms(network, params), params["block0"]
        back = np.arange(6)[:, None] - np.arange(6)
        seen = (back >= 0) & (back < options.get("context", 6))
        looks = []

        def attention(x):
            q, k, v = (dense(p[name], x).reshape(4, 6, -1, 4) for name in "qkv")
            q, k, v = (norm(f"block0/norm_{n}", a) for n, a in (("q", q), ("k", k), ("v", v)))
            looks.extend(shares(turn(q), turn(k), seen))
            h = attend(turn(q), turn(k), v, seen).reshape(4, 6, 16)
            return dense(p["out"], norm("block0/norm_out", h))

        def mlp(x):
            up = dense(p["up"], x)
            f = jax.nn.silu(dense(p["gate"], x)) if "gate" in p else jax.nn.gelu(up)
            h = np.asarray(f) * (up if "gate" in p else 1)
            return dense(p["down"], norm("block0/norm_down", h))

        embedding = np.asarray(params["embed"]["embedding"])
        x = norm("norm_first", 4 * embedding[tokens])
        stream = self.block(norm, "block0", x, attention, mlp)
        x = norm("norm_last", stream)
        head = embedding.T if "head" not in params else np.asarray(params["head"]["kernel"])
        look = functools.partial(apply, network, train=False, mutable=[models.DEPTH])
        got, sown = jax.jit(look)(params, state, tokens)
        assert ("head" in params) == (not options.get("tied", True))
        assert got.dtype == jnp.float32
        assert gap(got, x @ head) < 1e-5
        [after], [heads] = (sown[models.DEPTH]["block0"][n] for n in ("after_mlp", "heads"))
        assert gap(after.variance, stream.var(-1).mean(-1)) < 1e-5
        entropy = [-(a * np.log(np.where(a > 0, a, 1))).sum(-1).mean(-1) for a in looks]
        assert gap(heads.entropy, np.stack(entropy, -1)) < 1e-5

    @pytest.mark.parametrize("name", [n for n in NAMES if n not in ("batch", "instance")])
    def test_no_logit_sees_a_later_token(self, name):
        where = (
            None
            if name in ON_W
            else lambda place: not re.search(f"/({'|'.join(LINEAR)})$|logits", place)
        )
        network = make("lm", name, where=where)
        tokens = np.stack([TOKENS[0], np.append(TOKENS[0, :4], (TOKENS[0, 4:] + 1) % CLASSES)])
        params, state = variables(network, tokens)
        run = jax.jit(functools.partial(apply, network, train=True))
        a, b = run(params, state, tokens)[0]
        assert gap(a[:4], b[:4]) < 1e-6
        assert (jnp.abs(a[4:] - b[4:]).max(-1) > 1e-3).all()

    def test_the_program_does_not_grow_with_the_depth_of_scanned_blocks(self):
        def size(**options):
            network = make("lm", "layer", **options)
            made = jax.eval_shape(lambda: network.init(jax.random.key(0), TOKENS, train=False))
            loss = lambda p, state: apply(network, p, state, TOKENS, train=True)[0].sum()  # noqa: E731
            return len(jax.jit(jax.grad(loss)).lower(*models.split(made)).as_text().splitlines())

        scanned = size(scan=True, depth=48)
        assert scanned == size(scan=True, depth=4) < size(depth=4)

    @pytest.mark.parametrize("scan", [False, True])
    def test_the_rows_of_a_net_on_the_sphere_are_projected(self, scan):
        network = make("lm", "none", scheme="ngpt", depth=2, tied=False, scan=scan)
        params = random(network, TOKENS)
        projected = network.project(params)
        begun, _ = models.split(models.complete(network, params, TOKENS))
        for path, w in (*leaves(projected), *leaves(begun)):
            if path[-1] in ("kernel", "embedding"):
                axis = -1 if {*path} & {"embed", "out", "down"} else -2
                assert gap(jnp.square(w).sum(axis), jnp.ones(w.sum(axis).shape)) < 1e-6
        assert make("lm", "rms").project(params) is params

    @pytest.mark.parametrize("name", ["rms", "weight"])
    @pytest.mark.parametrize("where", [None, "block[01]/down"])
    def test_every_norm_starts_from_the_kernels_that_were_drawn_for_all(self, name, where):
        """Under `scan` too, where blocks are one only if they are for every norm."""
        options = {**SIZES["lm"], "depth": 3, "scheme": "mix", "scan": True, "where": where}
        drawn = jax.eval_shape(lambda: models.draw_kernels("lm", CLASSES, [0], TOKENS, **options))
        network = make("lm", name, **options)
        made = jax.eval_shape(
            lambda drawn: models.complete(network, jax.tree.map(lambda v: v[0], drawn), TOKENS),
            drawn,
        )
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(
            jnp.shape, jax.eval_shape(lambda: network.init(jax.random.key(0), TOKENS, train=False))
        )

    @pytest.mark.parametrize(
        ("name", "scheme", "runs"),
        [
            ("rms", {"name": "lns", "depth": 2}, ["blocks"]),
            ("rms", {"name": "siamese", "depth": 2}, ["blocks"]),
            ("rms", {"name": "mhc", "depth": 2, "steps": 3}, ["blocks"]),
            ("batch", {"name": "mix", "depth": 3, "share": 0.4}, ["blocks_from0", "blocks_from1"]),
        ],
    )
    def test_scanned_blocks_are_those_that_are_written_out(self, name, scheme, runs):
        """Values, gradients, states and all that is sown, with `remat` too."""
        scheme = nl.placement.scheme(norm=norm(name), **scheme)
        sizes = {"scheme": scheme, "depth": scheme.depth}
        written = make("lm", name, **sizes)
        scanned = make("lm", name, **sizes, scan=True, remat=True)
        tokens, _ = example("lm")
        params, state = variables(written, tokens)
        assert list(scanned.runs()) == runs

        def run(network):
            def loss(params, state):
                sown = (models.STATE, models.PARTS, models.ACTIVATIONS, models.DEPTH)
                y, changed = apply(network, params, state, tokens, train=True, mutable=sown)
                return jnp.square(y).sum(), (y, changed)

            return jax.jit(jax.grad(loss, has_aux=True))

        grads, (y, changed) = run(written)(params, state)
        stacked = scanned.stack(params), scanned.stack(state)
        made = jax.eval_shape(lambda: scanned.init(jax.random.key(0), tokens, train=False))
        assert jax.tree.map(jnp.shape, models.split(made)) == jax.tree.map(jnp.shape, stacked)
        own_grads, (own_y, own) = run(scanned)(*stacked)
        assert gap(own_y, y) < 1e-5
        found = {of: scanned.unstack(tree) for of, tree in own.items()}
        assert jax.tree.structure(found) == jax.tree.structure(changed)
        pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(changed), strict=True)
        for (path, a), b in pairs:
            # Where the largest activation stands, if two are as large, is a matter of rounding.
            if not jax.tree_util.keystr(path).endswith((".token", ".channel")):
                assert gap(a, b) < 1e-5
        largest = max(jnp.abs(g).max() for g in jax.tree.leaves(grads))
        for a, b in zip(*map(jax.tree.leaves, (scanned.unstack(own_grads), grads)), strict=True):
            assert jnp.abs(a - b).max() < 1e-5 * largest
        assert models.parts_by_layer(own).keys() == models.parts_by_layer(changed).keys()
        [stream], [heads] = (found[models.DEPTH]["block1"][name] for name in ("after_mlp", "heads"))
        streams = () if scheme.streams is None else (scheme.streams,)
        assert stream.variance.shape == stream.massive.largest.shape == (4, *streams)
        assert heads.entropy.shape == heads.largest.shape == (4, 2)


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


class Reference:
    """Recurrent networks in NumPy, a loop over time, with batch norm wherever there is a place.

    Keeps, of every place and step, the mean and the variance it normalized with: the batch's, or
    those of `states` at evaluation.
    """

    def __init__(self, params, states=None):
        double = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
        self.params, self.states, self.seen = double["layer0"], states, {}
        self.last = double["Dense_0"]

    def norm(self, place, a):
        seen = self.seen.setdefault(place, [])
        if self.states is None:
            mean, var = a.mean(0), a.var(0)
        else:
            state = self.states["layer0"][place]["norm"]
            t = min(len(seen), len(state.mean) - 1)
            mean, var = (np.asarray(v[t], np.float64) for v in state.read())
        seen.append((mean, var))
        g, b = self.params[place]["norm"]
        return g * (a - mean) / np.sqrt(var + 1e-5) + b

    def linear(self, place, x):
        return self.norm(place, x @ self.params[place]["kernel"])

    def lstm(self, x):
        c = h = np.zeros((len(x), 4))
        for t in range(x.shape[1]):
            gates = self.linear("vertical", x[:, t]) + self.linear("recurrent", h)
            f, i, o, g = np.split(gates, 4, -1)
            c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(self.norm("cell", c))
        return h @ self.last["kernel"] + self.last["bias"]

    def gru(self, x):
        h = np.zeros((len(x), 4))
        for t in range(x.shape[1]):
            gates = self.linear("vertical_gates", x[:, t]) + self.linear("recurrent_gates", h)
            z, r = np.split(sigmoid(gates), 2, -1)
            up, on = self.linear("vertical", x[:, t]), self.linear("recurrent", h)
            h = (1 - z) * h + z * np.tanh(up + r * on)
        return h @ self.last["kernel"] + self.last["bias"]


class TestRecurrent:
    SHORT = draw(2, 5, 3, 2).astype(np.float32)
    LONG = draw(3, 5, 6, 2).astype(np.float32)

    @staticmethod
    @functools.cache
    def trained(model):
        """A network that has seen `SHORT`: with its parameters, states and logits."""
        network = make(model, where=".*")
        params, state = variables(network, TestRecurrent.SHORT)
        run = functools.partial(apply, network, train=True)
        logits, changed = jax.jit(run)(params, state, TestRecurrent.SHORT)
        return network, params, changed[models.STATE], logits

    @pytest.mark.parametrize("model", ["lstm", "gru"])
    def test_training_is_the_loop_over_time(self, model):
        _, params, states, logits = self.trained(model)
        reference = Reference(params)
        assert gap(logits, getattr(reference, model)(self.SHORT)) < 1e-4
        for place, seen in reference.seen.items():
            mean, var = states["layer0"][place]["norm"].read()
            assert gap((mean, var), tuple(map(np.stack, zip(*seen, strict=True)))) < 1e-4
            assert not np.allclose(mean[0], mean[1], atol=1e-2) or place.startswith("recurrent")

    @pytest.mark.parametrize("model", ["lstm", "gru"])
    def test_evaluation_has_statistics_for_each_step_and_the_last_for_all_after(self, model):
        network, params, states, _ = self.trained(model)
        got, _ = jax.jit(functools.partial(apply, network, train=False))(params, states, self.LONG)
        assert gap(got, getattr(Reference(params, states), model)(self.LONG)) < 1e-4

    def test_within_a_transaction_the_steps_that_share_a_state_are_pooled(self):
        network = make("lstm", max_steps=2)
        params, state = variables(network, self.LONG)

        def step(params, state):
            _, changed = apply(network, params, nl.population.begin(state), self.LONG, train=True)
            return nl.population.commit(changed[models.STATE])

        states = jax.jit(step)(params, state)["layer0"]["vertical"]["norm"]
        a = self.LONG @ np.asarray(params["layer0"]["vertical"]["kernel"])
        assert gap(states.mean, np.stack([a[:, 0].mean(0), a[:, 1:].mean((0, 1))])) < 1e-5
        assert gap(states.var, np.stack([a[:, 0].var(0), a[:, 1:].var((0, 1))])) < 1e-5
        assert states.updates.tolist() == [1, 1]

    def test_the_program_does_not_grow_with_the_sequence(self):
        def size(length):
            network, x = make("lstm", max_steps=2), np.zeros((2, length, 1), np.float32)
            made = jax.eval_shape(lambda: network.init(jax.random.key(0), x, train=False))
            traced = jax.jit(functools.partial(apply, network, train=True)).trace(
                *models.split(made), x
            )
            return len(str(traced.jaxpr).splitlines())

        assert size(784) == size(3)

    def test_inputs_are_read_by_rows_or_by_pixels(self):
        rows = IMAGES[..., 0]
        for read, x in (("rows", rows), ("pixels", rows.reshape(4, 64, 1))):
            network = make("gru", "none", read=read)
            params, state = variables(network)
            image, sequence = (
                apply(network, params, state, v, train=False)[0] for v in (IMAGES, x)
            )
            assert (image == sequence).all()
        with pytest.raises(ValueError, match="read='columns'; expected 'rows' or 'pixels'"):
            make("gru", read="columns").init(jax.random.key(0), IMAGES, train=False)
        with pytest.raises(ValueError, match=r"shape \(4, 64\); expected a sequence"):
            make("gru").init(jax.random.key(0), IMAGES.reshape(4, 64), train=False)

    def test_gates_can_start_small(self):
        def gains():
            params = make("gru", gain=0.1).init(jax.random.key(0), IMAGES, train=False)["params"]
            return [affine.g for path, affine in leaves(params) if path[-1] == "norm"]

        drawn = jax.jit(gains)()
        assert len(drawn) == 4
        assert all((g == jnp.float32(0.1)).all() for g in drawn)

    def test_the_parts_of_all_steps_are_sown(self):
        network, params, states, _ = self.trained("lstm")
        _, sown = apply(network, params, states, self.LONG, train=False, mutable=[models.PARTS])
        parts = models.parts_by_layer(sown)
        assert sorted(parts) == sorted(network.layers)
        shift = parts["layer0/vertical"].mu
        mean = states["layer0"]["vertical"]["norm"].mean
        assert gap(shift.reshape(6, -1), mean[jnp.array([0, 1, 2, 2, 2, 2])]) == 0


class TestDevices:
    @pytest.mark.slow
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("model", ["lstm", "gru", "resnet20", "vit", "scanned vit"])
    def test_devices_take_the_steps_of_one_with_the_whole_batch(self, model, form):
        model, more = model.split()[-1], {"scan": True, "remat": True} if " " in model else {}
        options = {**SIZES[model], **more}
        rng = np.random.default_rng(0)
        images = rng.integers(0, 255, (32, 8, 8, 1)).astype(np.uint8)
        labels = rng.integers(0, CLASSES, 32, dtype=np.int32)
        data = Dataset("noise", images, labels, images, labels, CLASSES, "made here", "")
        ends = []
        for devices in (1, 2):
            held = DeviceData(data, devices)
            drawn = models.draw_kernels(model, CLASSES, [0], held.probe, **options)
            network = models.build(
                model,
                nl.get("batch", axis_name=AXIS if devices > 1 else None),
                CLASSES,
                **options,
            )
            trainer = Trainer(network, optax.sgd(0.1), held, drawn, synced=True, form=form)
            state, losses = trainer.train(trainer.init(), np.arange(32).reshape(2, 1, 16))
            evaluation = trainer.evaluate(state)
            ends.append((losses, jax.tree.map(lambda v: v[0], state), evaluation.loss))
        for got, expected in zip(*map(jax.tree.leaves, reversed(ends)), strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
