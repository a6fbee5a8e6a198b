"""A residual connection as a module: `normlab.placement.residual` to the bit, in both skins."""

import copy
import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normlab as nl
import normlab.linen as nll
import normlab.nnx as nlx
from normlab._flax.layers import learned
from normlab.placement import (
    HyperConnection,
    Learned,
    Mixing,
    Placement,
    Residual,
    Siamese,
    init_residual,
    residual,
    scheme,
)
from tests.helpers import array, draw, gap

KEY = jax.random.key(0)
N, T, C = 4, 3, 6
LAYER, BATCH, RMS = nl.get("layer"), nl.get("batch"), nl.get("rms", use_bias=False)
PLACEMENTS = {
    "pre": Placement(inner=LAYER),
    "all": Placement(LAYER, BATCH, RMS, Learned(0.5), Learned(0.1, "channel"), 0.7),
    "ngpt": scheme("ngpt", depth=2, width=C).at(1),
    "unit": scheme("unit", depth=2, norm="rms").at(1),
    "fixup": scheme("fixup", depth=2).at(0),
    "hyper": HyperConnection(inner=BATCH, total=LAYER, streams=3, reads=1),
    "mhc": scheme("mhc", depth=2, norm="rms", streams=2).at(1),
    "siamese": Siamese(inner=LAYER, total=BATCH, read=RMS, branch=0.6),
}
WEIGHTS = jnp.array([1.0, 0.0, 1.0, 2.0])
W = array(draw(9, C, C)) / C**0.5


def branch(h):
    return jnp.tanh(h @ W)


def given(placement):
    """An input, and the variables of the linen module, moved from where they begin."""
    streams = () if placement.streams is None else (placement.streams,)
    x = array(draw(1, N, T, *streams, C, mean=0.5))
    variables = nll.Residual(placement, branch, True).init(KEY, x)
    leaves, tree = jax.tree.flatten(variables.get("params", {}))
    moved = [v + array(draw(i, *v.shape, scale=0.3)) for i, v in enumerate(leaves)]
    return x, {**variables, "params": jax.tree.unflatten(tree, moved)}


def as_residual(placement, x, variables):
    """The variables of the linen module as the function has them."""
    params, states = init_residual(placement, x)
    given, kept = variables.get("params", {}), variables.get("batch_stats", {})

    def of(name, value):
        if name in given and isinstance(getattr(placement, name, None), nl.Norm):
            return learned(value, lambda field, _: given[name][field])
        return Mixing(**given[name]) if isinstance(value, Mixing) else given.get(name, value)

    params = Residual(**{name: of(name, v) for name, v in params._asdict().items()})
    for name in kept:
        states = states._replace(**{name: kept[name]["population"]})
    return params, states


def filled(module, variables):
    """The nnx module with the variables of the linen module."""
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        value = functools.reduce(lambda tree, word: tree[word], path, variables["params"])
        assert variable.shape == value.shape
        variable[...] = value
    return module


@pytest.mark.parametrize("name", PLACEMENTS)
def test_both_skins_are_the_function_to_the_bit(name):
    placement = PLACEMENTS[name]
    x, variables = given(placement)
    params, states = as_residual(placement, x, variables)
    module = filled(nlx.Residual(placement, C, branch), variables)
    linen = nll.Residual(placement)
    for train, mask in ((True, WEIGHTS), (True, None), (False, None)):
        expected, after = residual(placement, params, states, branch, x, train=train, weights=mask)
        h, kept = linen.apply(variables, x, branch, not train, mask=mask, mutable=["batch_stats"])
        assert (h == expected).all()
        moved = as_residual(placement, x, {**variables, **kept})[1]
        assert gap(moved, after) == 0
        same = nnx.clone(module)
        assert (same(x, None, not train, mask=mask) == expected).all()
        for place in ("inner", "outer", "total", "read"):
            state = getattr(after, place)
            if state and jax.tree.leaves(state):
                assert gap(getattr(same, place).population.get_value(), state) == 0
    assert gap(nnx.jit(lambda m, x: m(x, None, True))(module, x), expected) < 1e-6


def test_variables_have_the_names_that_users_of_flax_expect():
    def names(tree):
        return sorted(jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in tree)

    _, variables = given(PLACEMENTS["all"])
    params = ["branch", "inner/bias", "inner/scale", "outer/bias", "outer/scale", "skip"]
    assert names(jax.tree.leaves_with_path(variables["params"])) == [*params, "total/scale"]
    assert list(variables["batch_stats"]) == ["outer"]
    module = nlx.Residual(PLACEMENTS["all"], C)
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert sorted("/".join(path) for path, _ in flat) == [*params, "total/scale"]
    _, variables = given(PLACEMENTS["hyper"])
    streams = [
        f"{n}/{f}" for n in ("branch", "read", "skip") for f in ("kernel", "scale", "static")
    ]
    found = names(jax.tree.leaves_with_path(variables["params"]))
    assert [n for n in found if not n.startswith(("inner", "total"))] == streams


class Block(nn.Module):
    """A block of one branch, a layer of its own."""

    placement: Placement

    @nn.compact
    def __call__(self, x, placement):
        layer = nn.Dense(x.shape[-1], name="down")
        return nll.Residual(self.placement, name="mlp")(x, layer, False, placement=placement), None


def test_linen_blocks_are_scanned_over_and_computed_anew_in_a_transaction():
    plan = scheme("lns", depth=3, norm="batch")
    placements = [plan.at(i) for i in range(3)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *placements)
    x = array(draw(1, N, T, C))
    axes = {"params": 0, "batch_stats": 0, "transaction": 0}
    scanned = nn.scan(nn.remat(Block), axes, split_rngs={"params": True}, length=3)(placements[0])
    variables = scanned.init(KEY, x, stacked)
    assert jax.tree.map(jnp.shape, variables["params"]["mlp"]) == {
        "inner": {"bias": (3, C), "scale": (3, C)}
    }

    def by_hand(params):
        h = x
        for i, placement in enumerate(placements):
            p = jax.tree.map(lambda v, i=i: v[i], params)
            f = lambda h, p=p: h @ p["down"]["kernel"] + p["down"]["bias"]  # noqa: E731
            inner = nl.Affine(p["mlp"]["inner"]["scale"], p["mlp"]["inner"]["bias"])
            state = init_residual(placement, x)[1]
            h, _ = residual(placement, Residual(inner=inner), state, f, h, train=True)
        return (h**3).sum()

    def loss(params):
        h, kept = scanned.apply({**variables, "params": params}, x, stacked, mutable=[*axes][1:2])
        return (h[0] ** 3).sum(), kept["batch_stats"]

    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    expected, reference = jax.jit(jax.value_and_grad(by_hand))(variables["params"])
    assert gap(value, expected) < 1e-5
    assert gap(grads, reference) < 1e-4

    pending = {}
    for part in (x[:2], x[2:]):
        _, pending = scanned.apply(variables | pending, part, stacked, mutable=["transaction"])
    stats = nll.commit(variables, pending["transaction"])
    first = jax.tree.map(lambda v: v[0], stats["mlp"]["inner"]["population"])
    _, once = residual(placements[0], *init_residual(placements[0], x), branch, x, train=True)
    # The first block sees x itself, so that two halves of it are the whole.
    assert gap(first.mean, once.inner.mean) < 1e-5
    assert gap(first.var, once.inner.var) < 1e-5


def test_nnx_blocks_are_made_by_vmap_and_scanned_over_and_are_part_of_a_transaction():
    placement = Placement(inner=BATCH, branch=Learned(0.2))
    x = array(draw(1, N, T, C))

    class Block(nnx.Module):
        def __init__(self, rngs):
            layer = nnx.Linear(C, C, rngs=rngs)
            self.mlp = nlx.Residual(placement, C, layer)

        def __call__(self, x):
            return self.mlp(x)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return Block(rngs)

    blocks = make(nnx.Rngs(0))
    assert blocks.mlp.inner.scale.shape == (3, C)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def through(x, block):
        return nnx.remat(lambda block, x: block(x))(block, x)

    expected = x
    graph, state = nnx.split(blocks)
    for i in range(3):
        expected = nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i], state), copy=True)(expected)
    assert gap(through(x, blocks), expected) < 1e-6

    one, halves = nlx.Residual(placement, C, branch), nlx.Residual(placement, C, branch)
    one(x)
    nlx.begin(halves)
    for part in (x[:2], x[2:]):
        halves(part)
    assert halves.inner.pending is not None
    nlx.commit(halves)
    for field in ("mean", "var"):
        values = (getattr(m.inner.population.get_value(), field) for m in (halves, one))
        assert gap(*values) < 1e-5
    halves.eval()
    still = halves.inner.population.get_value()
    halves(3 * x)
    assert gap(halves.inner.population.get_value(), still) == 0


@pytest.mark.parametrize("name", ["all", "hyper", "siamese"])
def test_modules_copy_pickle_and_split(name):
    placement = PLACEMENTS[name]
    x, variables = given(placement)
    linen = nll.Residual(placement, branch, True)
    expected = linen.apply(variables, x)
    for other in (pickle.loads(pickle.dumps(linen)), copy.deepcopy(linen), linen.clone(name="b")):
        assert (other.apply(variables, x) == expected).all()
    assert hash(linen) == hash(nll.Residual(placement, branch, True))
    module = filled(nlx.Residual(placement, C, branch, use_running_average=True), variables)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    hash(graph)
    again = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module), nnx.clone(module)]
    for other in (*again, nnx.merge(graph, params, rest, copy=True)):
        assert (other(x) == expected).all()


def test_the_numbers_of_a_placement_may_be_arrays():
    x = array(draw(1, N, C))
    numbers = Placement(inner=LAYER, skip=0.3, branch=0.5)
    arrays = Placement(inner=LAYER, skip=np.float32(0.3), branch=jnp.float32(0.5))
    expected = nll.Residual(numbers, branch).init_with_output(KEY, x)[0]
    assert gap(nll.Residual(arrays, branch).init_with_output(KEY, x)[0], expected) < 1e-6
    module = nlx.Residual(arrays, C, branch)
    assert gap(nnx.jit(lambda module, x: module(x))(module, x), expected) < 1e-6
    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == 2
    hash(nnx.graphdef(nlx.Residual(numbers, C, branch)))


def test_a_shortcut_may_change_the_shape():
    placement = Placement(LAYER, BATCH, RMS, Learned(0.5), Learned(0.1, "channel"))
    x, wide = array(draw(1, N, C)), array(draw(2, C, 8))
    f, shortcut = (lambda h: jnp.tanh(h @ wide)), (lambda x: x @ wide)
    made = init_residual(placement, x, shortcut=shortcut)
    expected = residual(placement, *made, f, x, train=True, shortcut=shortcut)[0]
    linen = nll.Residual(placement, f, False)
    h = linen.init_with_output(KEY, x, shortcut=shortcut)
    h = linen.apply(h[1], x, shortcut=shortcut, mutable=["batch_stats"])[0]
    assert (h == expected).all()
    module = nlx.Residual(placement, C, f, out_features=8)
    assert (module(x, shortcut=shortcut) == expected).all()


def test_a_wrapped_module_keeps_its_variables_and_gets_its_arguments():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, h, *, train):
            return nn.Dense(C)(h) + float(train)

    x = array(draw(1, N, C))
    module = nll.Residual(PLACEMENTS["pre"], Noisy())
    variables = module.init(KEY, x, train=False)
    assert sorted(variables["params"]) == ["inner", "layer_instance"]
    gained = module.apply(variables, x, train=True) - module.apply(variables, x, train=False)
    assert gap(gained, jnp.ones_like(x)) < 1e-6
    dense = nnx.Linear(C, C, rngs=nnx.Rngs(0))
    wrapped = nlx.Residual(PLACEMENTS["pre"], C, dense)
    assert (wrapped(x) == nlx.Residual(PLACEMENTS["pre"], C)(x, dense)).all()
    assert len(jax.tree.leaves(nnx.state(wrapped, nnx.Param))) == 4


def test_the_norms_of_a_connection_can_be_exchanged():
    module = nll.Residual(PLACEMENTS["pre"], branch)
    x = array(draw(1, N, C))
    other = nll.swap(module, {"inner": "rms"})
    expected = nll.Residual(Placement(inner=nl.get("rms")), branch)
    assert (other.init_with_output(KEY, x)[0] == expected.init_with_output(KEY, x)[0]).all()
    swapped = nlx.swap(nlx.Residual(PLACEMENTS["pre"], C, branch), {"inner": "rms"})
    assert (swapped(x) == expected.init_with_output(KEY, x)[0]).all()


LIBRARIES = ["linen", "nnx"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_wrong_is_said(library):
    x = jnp.ones((N, C))

    def call(placement, /, *args, layer=branch, mode=False, **more):
        if library == "linen":
            return nll.Residual(placement, layer, mode).init_with_output(KEY, x, *args, **more)[0]
        return nlx.Residual(placement, C, layer, use_running_average=mode)(x, *args, **more)

    pre, batch = PLACEMENTS["pre"], Placement(outer=BATCH)
    cases = [
        (lambda: call(pre, layer=None), "0 branches"),
        (lambda: call(pre, branch), "2 branches"),
        (lambda: call(pre, None, jnp.ones(N, bool), mode=None), r"use_running_average.*mask="),
        (lambda: call("pre"), "a placement"),
        (lambda: call(pre, layer=lambda h: h[:, :2]), "a branch that makes"),
        (lambda: call(Placement(inner=nl.get("weight"))), "norm of activations"),
        (lambda: call(PLACEMENTS["hyper"]), "S = 3"),
        (lambda: call(batch, mode=None), "use_running_average"),
        (lambda: call(pre, mask=jnp.ones(3)), "mask of shape"),
        (lambda: call(pre, placement=batch), "make a module of it"),
    ]
    if library == "nnx":
        narrow = lambda h: h[:, :2]  # noqa: E731
        rezero = nlx.Residual(Placement(branch=Learned(0.0)), C + 1, branch)
        cases += [
            (lambda: rezero(x), "set num_features"),
            (lambda: call(pre, layer=narrow, shortcut=narrow), "set out_features=2"),
        ]
    for run, said in cases:
        with pytest.raises(ValueError, match=said):
            run()


def test_a_norm_itself_may_stand_in_the_place_of_its_name():
    x = array(draw(1, N, C))
    norm = nl.get("group", groups=2)
    for module in (nll.RegistryNorm(norm), nll.RegistryNorm("group", {"groups": 2})):
        assert gap(module.init_with_output(KEY, x)[0], nl.group_norm(x, groups=2)) < 1e-6
    assert gap(nlx.RegistryNorm(norm, C)(x), nl.group_norm(x, groups=2)) < 1e-6
    for make in (lambda: nll.RegistryNorm(norm, {"groups": 3}).init(KEY, x),
                 lambda: nlx.RegistryNorm(norm, C, {"groups": 3})):  # fmt: skip
        with pytest.raises(ValueError, match="options of a name"):
            make()
