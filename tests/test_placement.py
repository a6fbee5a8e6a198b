"""Where norms stand: every scheme beside the net written out by hand, and one connection by law."""

import copy
import dataclasses
import pickle
import threading
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from normlab.placement import Learned, Placement, init_residual, residual, scheme
from tests.helpers import array, draw, gap, mesh

N, T, C, H, D, M, BLOCKS = 2, 3, 8, 2, 4, 12, 2
LAYER = nl.get("layer")
OPTIONS = {
    "normformer": {"scale_skip": True},
    "mix": {"share": 0.5},
    "hybrid": {"star": True},
    "nfnet": {"stages": (0, 1)},
    "unit": {"tau": 0.5},
    "ngpt": {"width": C},
}


def made(name, depth=BLOCKS, **more):
    return scheme(name, depth=depth, norm=LAYER, **OPTIONS.get(name, {}), **more)


# Every scheme, written out in NumPy. a and m are the two branches of a block, which are called, and
# carry the parameters of the norms around them.


def layer(x, p):
    x = x - x.mean(-1, keepdims=True)
    return p.g * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) + p.b


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def post(i, x, a, m):
    x = layer(x + a(x), a.total)
    return layer(x + m(x), m.total)


def pre(i, x, a, m):
    x = x + a(layer(x, a.inner))
    return x + m(layer(x, m.inner))


def sandwich(i, x, a, m):
    x = x + layer(a(layer(x, a.inner)), a.outer)
    return x + layer(m(layer(x, m.inner)), m.outer)


def reordered(i, x, a, m):
    x = x + layer(a(x), a.outer)
    return x + layer(m(x), m.outer)


def deepnorm(i, x, a, m):
    alpha = (2 * 2) ** (1 / 4)
    x = layer(alpha * x + a(x), a.total)
    return layer(alpha * x + m(x), m.total)


def normformer(i, x, a, m):
    x = x + layer(a(layer(x, a.inner)), a.outer)
    return m.skip * x + m(layer(x, m.inner))


def mix(i, x, a, m):
    return post(i, x, a, m) if i < 1 else pre(i, x, a, m)


def hybrid(i, x, a, m):
    if i == 0:
        return pre(i, x, a, m)
    x = layer(x + a(x), a.total)
    return x + m(x)


def lns(i, x, a, m):
    x = x + a(layer(x, a.inner) / np.sqrt(i + 1))
    return x + m(layer(x, m.inner) / np.sqrt(i + 1))


def keel(i, x, a, m):
    x = layer(4 * x + a(layer(x, a.inner)), a.total)
    return layer(4 * x + m(layer(x, m.inner)), m.total)


def layerscale(i, x, a, m):
    x = x + a.branch * a(layer(x, a.inner))
    return x + m.branch * m(layer(x, m.inner))


def rezero(i, x, a, m):
    x = x + a.branch * a(x)
    return x + m.branch * m(x)


def fixup(i, x, a, m):
    x = x + a.outer.g * a(x + a.inner.b) + a.outer.b
    return x + m.outer.g * m(x + m.inner.b) + m.outer.b


def nfnet(i, x, a, m):
    """A stage of one block, behind which another begins: β² = 1, 1 + α², 1 + 2α²; 1 + α²."""
    first, second = [(1, 1.04), (1.08, 1.04)][i]
    shortcut = x / np.sqrt(1.08) if i == 1 else x
    x = shortcut + 0.2 * a.branch * a(x / np.sqrt(first))
    return x + 0.2 * m.branch * m(x / np.sqrt(second))


def unit_scaling(i, x, a, m):
    x = (x + 0.5 * a(layer(x, a.inner))) / np.sqrt(1.25)
    return (x + 0.5 * m(layer(x, m.inner))) / np.sqrt(1.25)


def ngpt(i, x, a, m):
    """As NVIDIA/ngpt: what is stored is √C/0.05 times smaller than the rate."""
    rate = np.abs(a.branch * 0.05 * np.sqrt(C))
    x = unit(x + rate * (unit(a(x)) - x))
    rate = np.abs(m.branch * 0.05 * np.sqrt(C))
    return unit(x + rate * (unit(m(x)) - x))


HAND = {
    **{f.__name__: f for f in (post, pre, sandwich, reordered, deepnorm, normformer, mix)},
    **{f.__name__: f for f in (hybrid, lns, keel, layerscale, rezero, fixup, nfnet, ngpt)},
    "peri": sandwich,
    "sub": pre,
    "skipinit": rezero,
    "unit": unit_scaling,
}
WITHIN = {
    "sub": {"out": layer, "down": layer},
    "normformer": {"heads": lambda x, p: p.g[:, None] * x, "down": layer},
    "hybrid": dict.fromkeys("qkv", layer),
    "fixup": dict.fromkeys(("out", "up", "down"), lambda x, p: x + p.b),
    "ngpt": dict.fromkeys("qk", lambda x, p: np.sqrt(C) * p[1].g * rms(x))
    | dict.fromkeys(("up", "gate"), lambda x, p: np.sqrt(C) * p.g * x),
}
FIRST = {"peri": layer, "ngpt": lambda x, p: unit(x)}
WITHOUT_LAST = {"post", "deepnorm", "keel", "rezero", "skipinit", "nfnet", "ngpt"}
LAST = {name: layer for name in HAND if name not in WITHOUT_LAST}
LAST["fixup"] = lambda x, p: x + p.b


def branches(np, softmax, w, inside):
    """An attention and a gated MLP, in NumPy or in jax; `inside(place, values)` is a norm's."""

    def attention(x):
        q, k, v = (inside(n, (x @ w[n]).reshape(N * T, H, D)) for n in "qkv")
        q, k, v = (y.reshape(N, T, H, D) for y in (q, k, v))
        share = softmax(np.einsum("nthd,nshd->nhts", q, k) / D**0.5)
        y = np.einsum("nhts,nshd->nthd", share, v)
        y = inside("heads", y.reshape(N * T, H, D)).reshape(N, T, C)
        return inside("out", y) @ w["out"]

    def mlp(x):
        h = inside("up", x @ w["up"]) * np.tanh(inside("gate", x @ w["gate"]))
        return inside("down", h) @ w["down"]

    return {"attention": attention, "mlp": mlp}


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


X = draw(0, N, T, C)
SIZES = {n: (C, C) for n in ("q", "k", "v", "out")} | {"up": (C, M), "gate": (C, M), "down": (M, C)}
KERNELS = [
    {n: draw(10 * i + j, *size) / size[0] ** 0.5 for j, (n, size) in enumerate(SIZES.items())}
    for i in range(BLOCKS)
]
SHAPES = {n: (N * T, H, D) for n in ("q", "k", "v", "heads")} | {"up": (N, T, M), "gate": (N, T, M)}
SHAPES |= {"out": (N, T, C), "down": (N, T, M)}


def moved(params):
    """Other values than the initial ones, which differ from place to place."""
    leaves, structure = jax.tree.flatten(params)
    to = [p + 0.3 * jnp.cos(jnp.arange(p.size) + i).reshape(p.shape) for i, p in enumerate(leaves)]
    return jax.tree.unflatten(structure, to)


def of_norm(norm, shape):
    return None if norm is None else norm.init(nl.Site(jax.ShapeDtypeStruct(shape, jnp.float32)))[0]


def all_params(given):
    blocks = [
        {
            **{b: init_residual(given.at(i, b), X)[0] for b in ("attention", "mlp")},
            **{place: of_norm(norm, SHAPES[place]) for place, norm in given.inside(i).items()},
        }
        for i in range(BLOCKS)
    ]
    ends = {n: of_norm(getattr(given, n), X.shape) for n in ("first", "last")}
    return {"blocks": blocks, **ends}


def normalize(norm, params, x):
    state = jax.eval_shape(norm.init, nl.Site(x))[1]
    return norm.apply(params, state, nl.Site(x), train=True)[0]


def net(given, params, x):
    """The net of a scheme with the library's functions."""
    x = x if given.first is None else normalize(given.first, params["first"], x)
    for i, own in enumerate(params["blocks"]):
        within = given.inside(i)

        def inside(place, y, within=within, own=own):
            return normalize(within[place], own[place], y) if place in within else y

        w = {n: array(k) for n, k in KERNELS[i].items()}
        for branch, f in branches(jnp, jax.nn.softmax, w, inside).items():
            placement = given.at(i, branch)
            state = init_residual(placement, x)[1]
            x, _ = residual(placement, own[branch], state, f, x, train=True)
    return x if given.last is None else normalize(given.last, params["last"], x)


def by_hand(name, params, x):
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = FIRST[name](x, params["first"]) if name in FIRST else x
    for i, own in enumerate(params["blocks"]):

        def inside(place, y, own=own):
            norms = WITHIN.get(name, {})
            return norms[place](y, own[place]) if place in norms else y

        both = branches(np, softmax, KERNELS[i], inside)
        a, m = (Called(f, own[branch]) for branch, f in both.items())
        x = HAND[name](i, x, a, m)
    return LAST[name](x, params["last"]) if name in LAST else x


class Called(SimpleNamespace):
    """A branch that is called, with the parameters of its connection."""

    def __init__(self, f, params):
        super().__init__(f=f, **params._asdict())

    def __call__(self, x):
        return self.f(x)


@pytest.fixture(scope="module")
def nets():
    """Parameters and output of every scheme, in one program."""
    params = {name: moved(all_params(made(name))) for name in HAND}
    compute = jax.jit(lambda params, x: {name: net(made(name), params[name], x) for name in params})
    return params, compute(params, array(X))


def test_every_scheme_is_written_out():
    streams = {"siamese", "hyper", "mhc"}  # tests/test_streams.py
    assert HAND.keys() == set(nl.placement.names()) - streams
    assert WITHIN.keys() == {n for n in HAND if made(n).inside(0)}
    assert FIRST.keys() == {n for n in HAND if made(n).first is not None}
    assert LAST.keys() == {n for n in HAND if made(n).last is not None}


@pytest.mark.parametrize("name", HAND)
def test_a_scheme_is_the_net_written_out_by_hand(name, nets):
    params, outputs = nets
    assert gap(outputs[name], by_hand(name, params[name], X)) < 2e-5


# The constants.


def test_how_kernels_begin():
    magneto = ("v", "out", "up", "gate", "down")
    alone = {"deepnorm": (8 * 24) ** (-1 / 4), "sub": np.log(48) ** 0.5}
    for name, factor in alone.items():
        given = scheme(name, depth=24)
        assert {p: given.init_scale(f"block1/{p}/kernel") for p in (*magneto, "q", "k")} == {
            **dict.fromkeys(magneto, pytest.approx(factor)),
            **dict.fromkeys("qk", 1.0),
        }
    # Wang et al. 2022, table of DeepNet; torchscale's encoder.py and decoder.py.
    encoder, decoder = ({"role": r, "other": o} for r, o in (("encoder", 6), ("decoder", 18)))
    deep = scheme("deepnorm", depth=18, **encoder)
    assert deep.at(0).skip == pytest.approx(0.81 * (18**4 * 6) ** (1 / 16))
    assert deep.starts["v"] == pytest.approx(0.87 * (18**4 * 6) ** (-1 / 16))
    assert deep.starts["v"] == pytest.approx(1.15**-1 * (18**4 * 6) ** (-1 / 16), rel=1e-3)
    deep = scheme("deepnorm", depth=6, **decoder)
    assert (deep.at(0).skip, deep.starts["v"]) == pytest.approx((18**0.25, 72**-0.25))
    sub = scheme("sub", depth=18, **encoder).starts["down"]
    assert sub == pytest.approx(np.sqrt(np.log(3 * 6) * np.log(2 * 18) / 3))
    assert scheme("sub", depth=6, **decoder).starts["down"] == pytest.approx(np.sqrt(np.log(18)))
    fixed = scheme("fixup", depth=6)  # 12 branches; m = 2 of the MLP, m = 4 of the attention
    expected = {"up": 12**-0.5, **dict.fromkeys("qkv", 12 ** (-1 / 6)), "out": 0, "down": 0}
    assert fixed.starts == pytest.approx(expected | {"head": 0})
    assert scheme("fixup", depth=9, branches=1).starts["up"] == pytest.approx(1 / 3)
    others = set(HAND) - {"deepnorm", "sub", "fixup"}
    assert not any(made(name).starts for name in others)


def test_which_kernel_a_path_names():
    deep = scheme("deepnorm", depth=2)
    scaled = ["a/v/kernel", "layers.0.self_attn.v_proj.weight", "h/0/attn/c_proj/kernel", "w1"]
    assert {deep.init_scale(path) for path in scaled} == {0.5}
    assert {deep.init_scale(p) for p in ("q/kernel", "h/mlp/c_attend", "embed/embedding")} == {1.0}
    with pytest.raises(ValueError, match=r"of q, k and v .qkv.*keep v in a kernel of its own"):
        deep.init_scale("blocks.1.attn.qkv.weight")
    assert scheme("fixup", depth=2).init_scale("blocks.1.attn.qkv.weight") == 4 ** (-1 / 6)
    assert scheme("pre", depth=2).init_scale("blocks.1.attn.qkv.weight") == 1.0
    params = {"v": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "q": {"kernel": jnp.ones(2)}}
    begun = nl.placement.scale_init(deep, params)
    assert jax.tree.map(lambda p: p[0].item(), begun) == {
        "v": {"kernel": 0.5, "bias": 1.0},
        "q": {"kernel": 1.0},
    }
    with pytest.raises(ValueError, match="params without a kernel of down, gate, out, up, v"):
        nl.placement.scale_init(deep, {"other": {"kernel": jnp.ones(2)}})


def test_constants_of_depth():
    first = {d: scheme("layerscale", depth=d).at(0).branch.init for d in (1, 18, 19, 24, 25, 48)}
    assert first == {1: 0.1, 18: 0.1, 19: 1e-5, 24: 1e-5, 25: 1e-6, 48: 1e-6}
    assert scheme("layerscale", depth=48, init=0.5).at(0).branch.init == 0.5
    of_resnet = scheme("keel", depth=8, branches=1)
    assert (of_resnet.at(0).skip, scheme("keel", depth=8).at(0).skip) == (8.0, 16.0)
    mixed = {(s, d): scheme("mix", depth=d, share=s) for s, d in [(0.25, 12), (0.29, 100), (1, 2)]}
    number = {
        key: sum(given.at(i).total is not None for i in range(key[1]))
        for key, given in mixed.items()
    }
    assert number == {(0.25, 12): 3, (0.29, 100): 29, (1, 2): 2}
    # nfnets/nfnet.py: the first block of a stage still sees what the stage before has added.
    expected, squares = 1.0, []
    for block in range(6):
        squares.append(expected)
        expected = (1.0 if block in (0, 3) else expected) + 0.2**2
    found = scheme("nfnet", depth=6, branches=1, stages=[0, 3])
    assert [found.at(i).scale ** -2 for i in range(6)] == pytest.approx(squares)
    assert [found.at(i).skip for i in range(6)] == pytest.approx([1, 1, 1, 1.12**-0.5, 1, 1])
    # What it predicts is what the line derives for γ = 1 and branches that keep the variance.
    of_transformer = scheme("nfnet", depth=6, stages=(0, 2, 3))
    for given, names in ((found, ["mlp"]), (of_transformer, ["attention", "mlp"])):
        placements = [given.at(i, name) for i in range(6) for name in names]
        opened = [dataclasses.replace(placement, branch=0.2) for placement in placements]
        derived = nl.placement.stream_variance(opened)[:-1]
        assert gap(derived, np.array([placement.scale**-2 for placement in placements])) < 1e-6


@pytest.mark.parametrize("name", HAND)
def test_one_block_and_any_norm(name):
    own = nl.Norm(LAYER.init, LAYER.parts)
    options = {k: v for k, v in OPTIONS.get(name, {}).items() if k != "stages"}
    given = scheme(name, depth=1, norm=own, inside={"q": own}, **options)
    assert given.inside(0)["q"] is own
    for branch in ("attention", "mlp"):
        placement = given.at(0, branch)
        norms = {placement.inner, placement.outer, placement.total} - {None}
        free = name in ("fixup", "ngpt", "rezero", "skipinit", "nfnet")
        assert not norms & {own} if free else norms <= {own}
        assert jax.tree.all(jax.tree.map(np.isfinite, placement))


@pytest.mark.parametrize("tied", [False, True])
def test_the_kernels_that_ngpt_projects(tied):
    """Along the axis of the stream, as NVIDIA/ngpt: its dim 1 of q, k, v, up, head and the
    embedding [V, C], dim 0 of out and down, of torch's kernels [out, in]."""
    block = {n: {"kernel": array(draw(3, *size)), "bias": jnp.ones(2)} for n, size in SIZES.items()}
    block["inside"] = all_params(made("ngpt"))["blocks"][0]
    params = {"embed": {"embedding": array(draw(4, 5, C))}, "block1": block}
    params |= {} if tied else {"head": {"kernel": array(draw(5, C, 5))}}
    done = nl.project(params, made("ngpt").project)
    for name in SIZES:
        axis = -1 if name in ("out", "down") else -2
        expected = block[name]["kernel"] / jnp.linalg.norm(
            block[name]["kernel"], axis=axis, keepdims=True
        )
        assert block[name]["kernel"].shape[axis] == C
        assert gap(done["block1"][name], {"kernel": expected, "bias": jnp.ones(2)}) < 1e-6
    assert gap(jnp.square(done["embed"]["embedding"]).sum(1), np.ones(5)) < 1e-6
    assert tied or gap(jnp.square(done["head"]["kernel"]).sum(0), np.ones(5)) < 1e-6
    assert gap(done["block1"]["inside"], block["inside"]) == 0
    assert all(made(name).project is None for name in HAND if name != "ngpt")


# A scheme as a value.


@pytest.mark.parametrize("name", HAND)
def test_a_scheme_is_its_arguments(name):
    given, other = made(name), made(name, inside={"q": nl.get("rms")})
    assert given is made(name)
    assert given != other
    for again in (pickle.loads(pickle.dumps(given)), copy.deepcopy(given)):
        assert (again, hash(again)) == (given, hash(given))
    assert pickle.loads(pickle.dumps(other)) == other
    nl.placement.schemes._scheme.cache_clear()
    found = []
    thread = threading.Thread(target=lambda: found.append(made(name)))
    thread.start()
    thread.join()
    assert found[0] is not given
    assert found[0] == given
    assert {given: "kept"}[found[0]] == "kept"
    for i in range(BLOCKS):
        for branch in ("attention", "mlp"):
            placement = given.at(i, branch)
            same = (pickle.loads(pickle.dumps(placement)), copy.deepcopy(placement))
            assert {placement, found[0].at(i, branch), *same} == {placement}
            assert jax.tree.structure(placement) == jax.tree.structure(found[0].at(i, branch))


def by_turns(block, branch):
    return Placement(inner=LAYER) if block % 2 else Placement(total=LAYER)


def test_a_scheme_of_ones_own_is_pickled_by_its_functions():
    own = nl.placement.Scheme("by turns", depth=4, places=by_turns, last=LAYER)
    again = pickle.loads(pickle.dumps(own))
    assert (own == own, own == again, again.at(1) == own.at(1)) == (True, False, True)


def test_options_are_what_they_mean():
    unit = scheme("unit", depth=2, tau=1)
    others = (1.0, np.float32(1), np.int64(1), jnp.float32(1))
    assert all(scheme("unit", depth=np.int64(2), tau=tau) is unit for tau in others)
    assert scheme("nfnet", depth=4, stages=[0, 2]) is scheme("nfnet", depth=4, stages=(0, 2))
    assert scheme("hybrid", depth=2, star=np.True_) is scheme("hybrid", depth=2, star=True)
    wrong = [
        ("hybrid", {"star": 1}, "got star=1 of type int; expected True or False"),
        ("unit", {"tau": True}, "got tau=True of type bool; expected a number above 0"),
        ("unit", {"tau": [1.0]}, "got a tau of type list"),
        ("unit", {"tau": -1.0}, "got tau=-1.0; expected a number above 0"),
        ("unit", {"tua": 1.0}, "the unknown option 'tua': did you mean 'tau'"),
        ("ngpt", {}, "no width; .* say scheme.'ngpt', width="),
        ("mix", {"share": 1.5}, "a share from 0 to 1"),
        ("nfnet", {"stages": 3}, "blocks by number"),
        ("nfnet", {"alpha": 0.0}, "a finite number that is not 0"),
        ("pre", {"inside": {"que": LAYER}}, "the place 'que'"),
        ("pre", {"norm": "layre"}, "did you mean 'layer'"),
        ("pre", {"depth": 0}, "a number of blocks, at least 1"),
        ("prenorm", {}, "the unknown scheme 'prenorm'"),
    ]
    for name, options, said in wrong:
        with pytest.raises(ValueError, match=said):
            scheme(name, **{"depth": 2, **options})
    with pytest.raises(ValueError, match=r"traced tau .*known when the function is traced"):
        jax.eval_shape(lambda tau: scheme("unit", depth=2, tau=tau).at(0), 1.0)
    pre = scheme("pre", depth=2)
    for where in ((2,), (-1,), (1.0,), (True,), (0, "ffn")):
        with pytest.raises(ValueError, match="scheme"):
            pre.at(*where)


def test_a_scheme_and_a_placement_are_attributes_of_a_module():
    class Block(nn.Module):
        given: nl.placement.Scheme
        placement: Placement

        @nn.compact
        def __call__(self, x):
            params = self.param("params", lambda key: init_residual(self.placement, x)[0])
            state = init_residual(self.placement, x)[1]
            return residual(self.placement, params, state, nn.Dense(C), x, train=True)[0]

    class Other(nnx.Module):
        def __init__(self, placement):
            params, self.state = init_residual(placement, X)
            self.placement, self.params = placement, nnx.data(jax.tree.map(nnx.Param, params))

        def __call__(self, x):
            params = jax.tree.map(lambda p: p[...], self.params, is_leaf=_is_param)
            return residual(self.placement, params, self.state, jnp.tanh, x, train=True)[0]

    def _is_param(p):
        return isinstance(p, nnx.Param)

    given = made("layerscale")
    block = Block(given, given.at(0))
    assert hash(block) == hash(Block(made("layerscale"), given.at(0)))
    params = block.init(jax.random.key(0), array(X))["params"]["params"]
    assert params.branch.shape == (C,)
    module = Other(given.at(0))
    assert nnx.jit(lambda module, x: module(x))(module, array(X)).shape == X.shape


# One connection.

FULL = Placement(inner=LAYER, outer=LAYER, total=LAYER, skip=2.0, branch=Learned(0.5), scale=0.7)
W = draw(5, C, C) / C**0.5


def connect(placement, F=jnp.tanh, x=None, params=None, **options):
    x = array(X) if x is None else x
    start, state = init_residual(placement, x)
    own = start if params is None else params
    return residual(placement, own, state, F, x, **{"train": True, **options})[0]


def test_derivatives_are_those_of_the_line_written_out(x64):
    def plain(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)

    def ours(x, beta):
        params = init_residual(FULL, x)[0]._replace(branch=beta)
        return jnp.sin(connect(FULL, x=x, params=params)).sum()

    def hand(x, beta):
        return jnp.sin(plain(2 * x + beta * plain(jnp.tanh(0.7 * plain(x))))).sum()

    def everything(f):
        def product(x, v):
            return jax.jvp(lambda x: jax.grad(f)(x, beta), (x,), (v,))[1]

        beta = jnp.float64(0.8)
        x, v = array(X, jnp.float64), array(draw(6, N, T, C), jnp.float64)
        return (
            jax.value_and_grad(f, (0, 1))(x, beta),
            jax.jvp(f, (x, beta), (v, beta)),
            product(x, v),
        )

    found, expected = jax.jit(lambda: (everything(ours), everything(hand)))()
    assert jax.tree.leaves(found)[0].dtype == jnp.float64
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: gap(a, b) < 1e-12, found, expected)))


def test_a_delayed_branch_has_gradients_of_its_own_and_the_true_one_of_x():
    """Unit scaling's rule: `residual_split` scales the branch's gradient, `residual_add` does not.

    Two connections, so that the gradient of the first goes through the second.
    """
    later = made("unit").at(0)
    plain = Placement(inner=LAYER, skip=later.skip, branch=later.branch)

    def loss(placement, ws, params, x):
        for w, own in zip(ws, params, strict=True):
            x = connect(placement, lambda h, w=w: jnp.tanh(h @ w), x, own)
        return jnp.sin(x).sum()

    ws = [array(W), array(W.T)]
    params = [init_residual(later, X)[0]] * 2
    grads = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    (ws_, params_, x_), (ws0, params0, x0) = (
        grads(placement, ws, params, array(X)) for placement in (later, plain)
    )
    assert loss(later, ws, params, array(X)) == pytest.approx(loss(plain, ws, params, array(X)))
    assert gap(x_, x0) < 1e-5
    of_branch = jax.tree.map(
        lambda g, g0: gap(later.branch * g, g0), (ws_, params_), (ws0, params0)
    )
    assert max(jax.tree.leaves(of_branch)) < 1e-5


def test_lerp_takes_the_size_of_the_rate():
    placement = Placement(branch=Learned(-0.25, "channel"), lerp=True)
    h = np.tanh(X)
    assert gap(connect(placement), X + 0.25 * (h - X)) < 1e-6
    fixed = Placement(branch=-0.25, lerp=True)
    assert gap(connect(fixed), X + 0.25 * (h - X)) < 1e-6


def test_a_factor_gives_adam_the_steps_of_the_stored_parameter():
    """NVIDIA/ngpt keeps α as 1/√C and multiplies it by 0.05 √C."""
    placement = made("ngpt").at(0)

    def ours(stored):
        params = init_residual(placement, X)[0]._replace(branch=stored)
        return jnp.square(connect(placement, params=params) - 1).sum()

    def hand(stored):
        rate, sphere = jnp.abs(stored * (0.05 / C**-0.5)), nl.family.scale_norm
        h = sphere(x + rate * (sphere(jnp.tanh(x)) - x))
        return jnp.square(h - 1).sum()

    def trained(loss, stored):
        adam = optax.adam(1e-2)

        def step(carry, _):
            stored, state = carry
            updates, state = adam.update(jax.grad(loss)(stored), state)
            stored = optax.apply_updates(stored, updates)
            return (stored, state), stored

        return jax.lax.scan(step, (stored, adam.init(stored)), length=5)[1]

    x = array(X)
    start = init_residual(placement, X)[0].branch
    assert gap(start, np.full(C, C**-0.5)) < 1e-7
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        both = jax.jit(lambda p: (trained(ours, p), trained(hand, p)))(start)
    assert gap(*both) < 1e-6
    assert gap(both[0][-1], start) > 0.01


def test_adaln_zero_is_the_identity_until_its_gates_open():
    free = nl.get("layer", use_gain=False, use_bias=False)
    block = Placement(inner=free, branch=Learned(0.0, "channel"))
    params, _ = init_residual(block, X)
    shift, scale, gate = draw(7, 3, N, C)

    def conditioned(gate):
        inner = nl.modulate(params.inner, array(scale), array(shift))
        return connect(block, params=params._replace(inner=inner, branch=gate))

    assert (conditioned(jnp.zeros((N, C))) == array(X)).all()
    one = SimpleNamespace(g=1 + scale[:, None], b=shift[:, None])
    expected = X + gate[:, None] * np.tanh(layer(X, one))
    assert gap(conditioned(array(gate)), expected) < 1e-5
    by_position = array(np.broadcast_to(gate[:, None], X.shape))
    assert gap(conditioned(by_position), expected) < 1e-5


@pytest.mark.parametrize("lerp", [False, True])
def test_where_a_branch_changes_the_shape_x_has_a_shortcut(lerp):
    place = Placement(inner=LAYER, outer=LAYER, branch=Learned(0.5, "channel"), lerp=lerp)
    x, w = draw(0, N, T, C), draw(1, C, M)
    every = {"shortcut": lambda x: jnp.pad(x[:, ::2], [(0, 0), (0, 0), (0, M - C)])}
    params, state = init_residual(place, jax.ShapeDtypeStruct(x.shape, x.dtype), **every)
    assert (params.inner.g.shape, params.outer.g.shape, params.branch.shape) == ((C,), (M,), (M,))
    branch = lambda h: h[:, ::2] @ w  # noqa: E731
    got, _ = residual(place, params, state, branch, array(x), train=True, **every)
    y = layer(layer(x, params.inner)[:, ::2] @ w, params.outer)
    beside = np.pad(x[:, ::2], [(0, 0), (0, 0), (0, M - C)])
    assert gap(got, beside + 0.5 * (y - beside if lerp else y)) < 1e-5
    with pytest.raises(ValueError, match="project inside the branch, or give x a shortcut"):
        residual(place, params, state, branch, array(x), train=True)


def test_batch_norm_at_a_place_has_a_state_and_takes_weights():
    placement = Placement(inner=nl.get("batch"), total=nl.get("batch"))
    params, state = init_residual(placement, X)
    weights = array([1.0, 0.0])

    def run(train, x):
        how = {"train": train, "weights": weights, "has_aux": True}
        return residual(placement, params, state, lambda h: (jnp.tanh(h), h.sum()), x, **how)

    h, after, aux = run(True, array(X))
    assert type(after) is type(state)
    assert after.outer is None
    assert aux.shape == ()
    other = array(X).at[1].set(100.0)  # an example that weighs nothing
    assert gap(run(True, other)[0][0], h[0]) < 1e-6
    same = jax.tree.map(lambda a, b: bool((a == b).all()), run(True, other)[1], after)
    assert all(jax.tree.leaves(same))
    assert not jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, state))
    kept = run(False, array(X))[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), kept, state))


def test_channels_may_come_first():
    x = draw(8, 2, 3, 4, C)
    placement = Placement(inner=LAYER, outer=LAYER, skip=Learned(0.5, "channel"), branch=1.0)
    params = moved(init_residual(placement, x)[0])
    gate = array(draw(9, 2, C))
    first = jnp.moveaxis(array(x), -1, 1)
    for own in (params, params._replace(branch=gate)):
        last = connect(placement, x=array(x), params=own)
        found = connect(placement, x=first, params=own, channel_axis=1)
        assert gap(jnp.moveaxis(found, 1, -1), last) < 1e-6
    start = init_residual(placement, first, channel_axis=1)[0]
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_is_rounded_once(dtype):
    x = array(X).astype(dtype)
    for placement, hand in {
        Placement(): lambda x, y: x + y,
        Placement(skip=1.7, branch=0.3): lambda x, y: jnp.float32(1.7) * x + jnp.float32(0.3) * y,
        Placement(branch=Learned(0.3, "channel")): lambda x, y: x + jnp.float32(0.3) * y,
        Placement(branch=0.3, lerp=True): lambda x, y: x + jnp.float32(0.3) * (y - x),
        Placement(skip=0.8, branch=0.6, delayed=True): (
            lambda x, y: jnp.float32(0.8) * x + jnp.float32(0.6) * y
        ),
    }.items():
        found = connect(placement, x=x)
        wide = hand(x.astype(jnp.float32), jnp.tanh(x).astype(jnp.float32))
        assert found.dtype == x.dtype
        assert (found == wide.astype(dtype)).all(), placement
        # A branch may be wider than the stream.
        assert connect(placement, lambda h: h.astype(jnp.float32), x=x).dtype == x.dtype
    assert connect(FULL, x=x).dtype == x.dtype
    assert {p.dtype.name for p in jax.tree.leaves(init_residual(FULL, x)[0])} == {"float32"}


def test_integers_are_read_as_floats():
    x = jnp.arange(6).reshape(2, 3)
    assert (
        connect(Placement(skip=2, scale=0.5), lambda h: h, x).tolist()
        == (2.5 * np.asarray(x)).tolist()
    )


def test_blocks_in_a_scan_are_the_blocks_in_a_loop():
    """Stacked numbers, learned gains, rematerialized, over examples, static or traced."""
    schemes = [made("lns"), made("unit"), made("ngpt")]

    def loop(placements, params, x):
        for i, placement in enumerate(placements):
            own = jax.tree.map(lambda p, i=i: p[i], params)
            x = connect(placement, lambda h: jnp.tanh(h @ array(W)), x, own)
        return jnp.sin(x).sum()

    def scanned(stacked, params, x):
        @jax.checkpoint
        def body(x, both):
            placement, own = both
            return connect(placement, lambda h: jnp.tanh(h @ array(W)), x, own), None

        return jnp.sin(jax.lax.scan(body, x, (stacked, params))[0]).sum()

    def both(stacked, params, x):
        found, expected = [], []
        for i, given in enumerate(schemes):
            placements = [given.at(b) for b in range(BLOCKS)]
            expected.append(jax.value_and_grad(loop, (1, 2))(placements, params[i], x))
            found.append(jax.value_and_grad(scanned, (1, 2))(stacked[i], params[i], x))
            many = jax.vmap(lambda s, p, x: connect(s, jnp.tanh, x, p), (0, 0, None))
            found.append(many(stacked[i], params[i], x))
            one = [jax.tree.map(lambda p, b=b: p[b], params[i]) for b in range(BLOCKS)]
            rows = [connect(s, x=x, params=p) for s, p in zip(placements, one, strict=True)]
            expected.append(jnp.stack(rows))
        return found, expected

    stacked = [
        jax.tree.map(lambda *v: jnp.stack(v), *[given.at(b) for b in range(BLOCKS)])
        for given in schemes
    ]
    params = [
        moved(jax.vmap(lambda s: init_residual(s, X)[0])(placements)) for placements in stacked
    ]
    found, expected = jax.jit(both)(stacked, params, array(X))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: gap(a, b) < 1e-5, found, expected)))
    static = jax.jit(connect, static_argnums=(0, 1))
    assert gap(static(FULL), jax.jit(lambda p: connect(p))(FULL)) < 1e-6
    assert static._cache_size() == 1
    static(copy.deepcopy(FULL))
    assert static._cache_size() == 1


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [P("i"), P(None, "i")])
def test_a_sharded_stream_keeps_its_sharding(kind, spec):
    x = draw(11, 8, 8)
    placement = Placement(
        inner=LAYER, outer=nl.get("batch"), branch=Learned(0.5, "channel"), delayed=False
    )
    gate = array(draw(12, 8, 8))

    def loss(x, gate):
        params, state = init_residual(placement, jax.ShapeDtypeStruct(x.shape, x.dtype))
        own = params._replace(branch=gate)
        h, after = residual(placement, own, state, jnp.tanh, x, train=True)
        unit = connect(Placement(inner=LAYER, skip=0.8, branch=0.6, delayed=True), x=h)
        return jnp.sin(unit).sum(), (unit, after)

    expected = jax.jit(jax.grad(loss, has_aux=True))(array(x), gate)
    with jax.set_mesh(mesh(kind, i=8)) as devices:
        place = NamedSharding(devices or jax.sharding.get_mesh(), spec)
        found = jax.jit(jax.grad(loss, has_aux=True))(
            jax.device_put(array(x), place), jax.device_put(gate, place)
        )
    if kind == AxisType.Explicit:
        assert jax.typeof(found[0]).sharding.spec == P(*spec, *(None,) * (2 - len(spec)))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: gap(a, b) < 1e-5, found, expected)))


def test_in_shard_map_batch_norm_sees_all_examples():
    x = draw(13, 8, C)
    placement = Placement(inner=nl.get("batch", axis_name="i"), branch=0.5)
    alone = Placement(inner=nl.get("batch"), branch=0.5)
    devices = mesh(i=8)
    shared = jax.shard_map(
        lambda x: connect(placement, x=x), mesh=devices, in_specs=P("i"), out_specs=P("i")
    )
    assert gap(jax.jit(shared)(array(x)), connect(alone, x=array(x))) < 1e-5


def test_errors_name_what_to_change():
    x = array(X)
    learned = Placement(branch=Learned(0.1))
    none = nl.placement.Residual()
    cases = [
        (lambda: connect(FULL, lambda h: h[..., :2]), "a branch that makes .2, 3, 2. of .2, 3, 8."),
        (lambda: residual(learned, none, none, jnp.tanh, x, train=True), "params without branch"),
        (
            lambda: connect(learned, params=none._replace(branch=jnp.ones(3))),
            "residual branch: got",
        ),
        (lambda: connect(learned, 3.0), "a function"),
        (lambda: connect(learned, lambda h: (h, h)), "a branch that returns a tuple"),
        (lambda: connect(learned, lambda h: None), "a branch that returns a NoneType"),
        (lambda: connect(learned, has_aux=True), r"a tuple \(y, aux\)"),
        (
            lambda: connect(Placement(), params=init_residual(FULL, x)[0]),
            "params of inner, where there is no norm",
        ),
        (lambda: init_residual(learned, x, channel_axis=2), "channel_axis=2"),
        (lambda: init_residual(learned, x[0, 0], channel_axis=1), "an array of rank 1"),
        (lambda: made("pre").inside(BLOCKS), "a block from 0 to"),
        (lambda: scheme("nfnet", depth=2, stages=(0, 2)), "blocks from 0 to"),
        (lambda: made("pre", inside={1: nl.get("rms")}), "a place inside a branch"),
        (lambda: made("pre", width=3), "leave it out"),
        (lambda: made("mhc", steps=0), "use 20"),
        (lambda: nl.placement.enter(x[0, 0], 2), "of 2 or more axes"),
        (
            lambda: nl.placement.stream_variance([Placement(scale=jnp.ones(3))]),
            "gains of one number",
        ),
        (lambda: connect(made("unit").at(0), params=none._replace(branch=jnp.ones(()))), "delayed"),
        (lambda: Placement(lerp=True, skip=0.5), "skip=1, which lerp replaces"),
        (lambda: Placement(delayed=True, branch=Learned(1.0)), "set branch to a number"),
        (lambda: Placement(delayed=True, lerp=True), "and no lerp"),
        (lambda: Placement(inner="layer"), "make it with get"),
        (lambda: Placement(skip=True), "a number, or Learned"),
        (lambda: Learned(0.0, factor=0.0), "a finite number that is not 0"),
        (lambda: Learned(0.0, "position"), "'scalar' or 'channel'"),
        (lambda: init_residual(Placement(inner=nl.get("weight")), x), "a norm of activations"),
        (lambda: nl.placement.stream_variance([FULL], gain=[1.0]), "a number, or one for each"),
        (
            lambda: nl.placement.stream_variance([FULL], gain=jnp.ones(2)),
            "2 gains for 1 placements",
        ),
    ]
    for call, said in cases:
        with pytest.raises(ValueError, match=said):
            call()


# The law: how the variance of the stream grows.

SEEDS, WIDTH, DEPTH, TOKENS = 128, 16, 24, 4
RMS = nl.get("rms", use_bias=False, eps=1e-12)
PRE = Placement(inner=RMS)


def linear(w, h):
    """Kernels of variance 1/K, as lecun_normal draws them: it keeps the variance."""
    return h @ w[0]


def relu(w, h):
    """Half the values of the second moment are lost."""
    return jax.nn.relu(h @ w[0]) @ w[1]


def attention(w, h):
    return jax.nn.softmax(h @ w[0] @ (h @ w[1]).T / WIDTH**0.5) @ h @ w[2]


def kernels(seed, many):
    return array(draw(seed, SEEDS, 2 * DEPTH, many, WIDTH, WIDTH) / WIDTH**0.5)


def grown(placements, ws, F, x):
    """The mean squares of the stream before the first branch and behind each, and of the F."""

    def body(x, both):
        placement, w = both
        params, state = init_residual(placement, x)
        run = lambda h: 2 * (F(w, h),)  # noqa: E731
        x, _, y = residual(placement, params, state, run, x, train=True, has_aux=True)
        return x, (jnp.square(x).mean(), jnp.square(y).mean())

    found, at = [], 0
    start = jnp.square(x).mean()
    for run in placements:
        many = len(jax.tree.leaves(run)[0])
        x, squares = jax.lax.scan(body, x, (run, ws[at : at + many]))
        found, at = [*found, squares], at + many
    stream, branches = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    return jnp.append(start, stream), branches


LAWS = {
    "post": lambda n, gain: np.ones_like(n),
    "pre": lambda n, gain: 1 + gain * n,
    "sandwich": lambda n, gain: 1 + n,
    "peri": lambda n, gain: 1 + n,
    "reordered": lambda n, gain: 1 + n,
    "lns": lambda n, gain: np.append(
        1, 1 + gain * np.cumsum(1 / ((np.arange(DEPTH * 2)) // 2 + 1))
    ),
    "mix": lambda n, gain: np.where(n <= DEPTH / 2, 1, 1 + gain * (n - DEPTH / 2)),
    "unit": lambda n, gain: gain + (1 - gain) * 0.5**n,
    "keel": lambda n, gain: np.ones_like(n),
    "deepnorm": lambda n, gain: np.ones_like(n),
}


def both_branches(given):
    return [given.at(i, b) for i in range(DEPTH) for b in ("attention", "mlp")]


def runs(placements):
    """Placements that follow one another with the same structure, stacked."""
    groups = []
    for placement in placements:
        same = groups and jax.tree.structure(groups[-1][0]) == jax.tree.structure(placement)
        groups[-1].append(placement) if same else groups.append([placement])
    return [jax.tree.map(lambda *v: jnp.stack(v), *group) for group in groups]


@pytest.fixture(scope="module")
def growth():
    """Of every scheme and both branches: the mean and its standard error, over seeds."""
    everywhere = {name: runs(both_branches(scheme(name, depth=DEPTH, norm=RMS))) for name in LAWS}

    def measured(is_relu, ws, x):
        def F(w, h):
            return jnp.where(is_relu, relu(w, h), linear(w, h))

        return {name: grown(placements, ws, F, x)[0] for name, placements in everywhere.items()}

    over = jax.vmap(jax.vmap(measured, (None, 0, 0)), (0, None, None))
    x = array(draw(21, SEEDS, TOKENS, WIDTH))
    squares = jax.jit(over)(jnp.array([False, True]), kernels(20, 2), x)
    error = jax.tree.map(lambda s: s.std(1, ddof=1) / SEEDS**0.5, squares)
    return jax.tree.map(lambda s: s.mean(1), squares), error


@pytest.mark.parametrize(("F", "gain"), [(linear, 1.0), (relu, 0.5)])
@pytest.mark.parametrize("name", LAWS)
def test_the_stream_grows_as_the_line_says(name, F, gain, growth):
    """Within four standard errors of the seeds, of which there are 48 in each of 20 cases."""
    found, error = (np.asarray(values[name][int(F is relu)]) for values in growth)
    n = np.arange(2 * DEPTH + 1.0)
    law = LAWS[name](n, gain)
    placements = both_branches(scheme(name, depth=DEPTH, norm=RMS))
    derived = nl.placement.stream_variance(placements, gain=gain)
    assert gap(derived, law) < 1e-5
    assert (np.abs(found - law) <= 4 * error + 1e-5).all()
    if name == "pre":
        assert found[-1] > 1.5 * found[DEPTH]  # it does grow


def test_the_share_of_a_branch_under_deepnorm():
    """Before S the sum has α² + 1 parts of variance, of which the branch's is one."""
    given = scheme("deepnorm", depth=DEPTH, norm=RMS)
    alpha = given.at(0).skip
    assert alpha == (2 * DEPTH) ** 0.25
    open_sum = Placement(skip=alpha)
    assert gap(nl.placement.stream_variance([open_sum])[1], alpha**2 + 1) < 1e-5
    x = array(draw(14, SEEDS, WIDTH))
    x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))
    y = jax.vmap(linear)(kernels(15, 1)[:, 0], x)
    total = jax.vmap(lambda x, y: connect(open_sum, lambda h: y[None], x[None])[0])(x, y)
    shares = jnp.square(y).mean(-1) / jnp.square(total).mean(-1).mean()
    error = shares.std(ddof=1) / SEEDS**0.5
    assert abs(shares.mean() - 1 / (1 + alpha**2)) < 4 * error


def test_attention_adds_what_it_keeps_of_the_tokens():
    """Its gain is no constant: tokens become alike, so their averages lose less and less.

    With the gains that are measured on some seeds the line gives the stream of others.
    """
    F, placements = attention, runs([PRE] * 2 * DEPTH)
    ws, x = kernels(22, 3), array(draw(23, SEEDS, 8, WIDTH))
    squares, gains = jax.jit(jax.vmap(lambda w, x: grown(placements, w, F, x)))(ws, x)
    half = SEEDS // 2
    law = nl.placement.stream_variance([PRE] * 2 * DEPTH, gain=gains[:half].mean(0))
    kept = squares[half:]
    # The standard errors of both: of the sums of gains, and of the stream.
    error = kept.std(0, ddof=1) + jnp.append(0, jnp.cumsum(gains[:half], 1).std(0, ddof=1))
    assert (jnp.abs(kept.mean(0) - law) <= 4 * error / half**0.5).all()
    assert gains[:, 0].mean() < 0.5 < 0.8 < gains[:, -1].mean()
