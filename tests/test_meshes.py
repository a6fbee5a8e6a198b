"""Meshes in plain `jit`: axes whose sharding is part of the types, and those that XLA places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from tests.helpers import array, draw, gap, mesh

KINDS = (AxisType.Explicit, AxisType.Auto)
C = 8


def _domains(a, **options):
    state = nl.population.select_domain(
        nl.population.init_domains(C, examples=len(a)), jnp.arange(len(a)) % 2
    )
    return nl.batch_norm(a, None, state, train=True, **options)


def _batch(state, **fixed):
    params = nl.init_affine(C)
    return lambda a, **options: nl.batch_norm(a, params, state(), **fixed, **options)


NORMS = {
    "batch": _batch(lambda: nl.init_running(C), train=True),
    "inference": _batch(lambda: nl.init_running(C), train=False),
    "ghost": _batch(lambda: nl.init_running(C), train=True, axis_name=nl.Sync(shards=4, groups=1)),
    "renorm": _batch(lambda: nl.population.init_renorm(C), train=True),
    "cumulative": _batch(lambda: nl.population.init_cumulative(C), train=True),
    "domains": _domains,
    "layer": lambda a, **options: nl.layer_norm(a, nl.init_affine(C), **options),
    "layer, all": lambda a, **options: nl.layer_norm(a, axes="all", **options),
    "rms": lambda a, **options: nl.rms_norm(a, nl.init_affine(C), **options),
    "group": lambda a, **options: nl.group_norm(a, nl.init_affine(C), groups=2, **options),
    "instance": lambda a, **options: nl.instance_norm(a, nl.init_affine(C), **options),
}
PLACES = {
    "examples of [16, 8]": ((16, C), P("i")),
    "channels of [16, 8]": ((16, C), P(None, "i")),
    "examples and channels": ((8, 4, 4, C), P("i", None, None, "j")),
    "positions": ((4, 4, 4, C), P(None, "i", "j")),
}


def everything(norm):
    """`f(a, weights) -> (what the norm returns, the gradient of a function of h)`."""

    def f(a, weights):
        def loss(a):
            out = norm(a, **({} if weights is None else {"weights": weights}))
            h = out[0] if isinstance(out, tuple) else out
            return jnp.sin(h).sum(), out

        grad, out = jax.grad(loss, has_aux=True)(a)
        return out, grad

    return f


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NORMS)
def test_a_sharded_input_gives_the_numbers_and_the_sharding_of_one_device(name, place):
    shape, spec = PLACES[place]
    if name == "instance" and len(shape) < 3:
        pytest.skip("has no positions")
    f, a = everything(NORMS[name]), array(draw(0, *shape, mean=3.0))
    weights = jnp.arange(float(shape[0])) % 3.0 if spec[0] else None
    expected = jax.jit(f)(a, weights)
    grid = mesh(AxisType.Explicit, i=4, j=2)
    with jax.set_mesh(grid):
        sharded = jax.device_put(a, NamedSharding(grid, spec))
        found = jax.jit(f)(sharded, weights)
        assert gap(found, expected) < 2e-5
        (out, grad) = found
        h = out[0] if isinstance(out, tuple) else out
        for v in (h, grad):
            assert jax.typeof(v).sharding.spec == jax.typeof(sharded).sharding.spec
        if isinstance(out, tuple):  # so that a state can be the carry of a scan
            assert all(not any(jax.typeof(v).sharding.spec) for v in jax.tree.leaves(out[1]))


@pytest.mark.parametrize("name", ["batch", "layer, all", "group"])
def test_operation_by_operation_and_without_a_mesh_in_context(name):
    a = array(draw(0, 16, 2, 2, C))
    f = everything(NORMS[name])
    expected = f(a, None)
    sharded = jax.device_put(a, NamedSharding(mesh(AxisType.Explicit, i=8), P("i")))
    assert gap(jax.jit(f)(sharded, None), expected) < 2e-5
    with jax.set_mesh(mesh(AxisType.Explicit, i=8)):
        assert gap(f(sharded, None), expected) < 2e-5


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "sync",
    ["i", ("i", "j"), nl.Sync("i", groups=2), nl.Sync("i", virtual_batch=8), nl.Sync("j")],
    ids=str,
)
def test_a_sync_of_the_mesh_on_either_kind_of_axes(sync, kind):
    a = array(draw(1, 16, 2, C, mean=3.0))
    weights = jnp.arange(16.0) % 3.0
    state = nl.init_running(C)

    def f(a, weights):
        return nl.batch_norm(a, None, state, train=True, axis_name=sync, weights=weights)

    # What the axes of each kind are told of the batch may differ, the numbers may not.
    auto, grid = mesh(AxisType.Auto, i=4, j=2), mesh(kind, i=4, j=2)
    with jax.set_mesh(auto):
        expected = jax.jit(everything(f))(a, weights)
    for spec in (P("i"), P(None, None, "i"), P(("i", "j")), P()):
        with jax.set_mesh(grid):
            sharded = jax.device_put(a, NamedSharding(grid, spec))
            assert gap(jax.jit(everything(f))(sharded, weights), expected) < 2e-5


def test_a_mesh_of_which_one_axis_is_mapped_and_the_other_explicit():
    a, grid = array(draw(2, 16, C, mean=3.0)), mesh(AxisType.Explicit, i=4, j=2)
    expected = nl.batch_norm(a, None, nl.init_running(C), train=True)

    def body(a):
        return nl.batch_norm(a, None, nl.init_running(C), train=True, axis_name="i")

    with jax.set_mesh(grid):
        sharded = jax.device_put(a, NamedSharding(grid, P("i", "j")))
        mapped = jax.shard_map(body, in_specs=P("i"), out_specs=(P("i"), P()), axis_names={"i"})
        assert gap(jax.jit(mapped)(sharded), expected) < 2e-5


def test_weights_and_parameters_that_are_sharded():
    a, grid = array(draw(3, 16, C)), mesh(AxisType.Explicit, i=4, j=2)
    params = nl.Affine(array(draw(4, C)), array(draw(5, C)))
    f = lambda a, params: nl.layer_norm(a, params)  # noqa: E731
    expected = f(a, params)
    with jax.set_mesh(grid):
        split = jax.device_put(params, NamedSharding(grid, P("j")))
        assert gap(jax.jit(f)(jax.device_put(a, NamedSharding(grid, P("i"))), split), expected) < (
            2e-5
        )
        w = jax.device_put(array(draw(6, 16, C)), NamedSharding(grid, P("i", "j")))
        for norm in (nl.weight_norm, nl.weight_standardization):
            assert gap(jax.jit(norm)(w), norm(np.asarray(w))) < 2e-5
        x = jax.device_put(a, NamedSharding(grid, P("i")))
        kernel = array(draw(7, C, 4))
        for centred in (False, True):
            cosine = jax.jit(lambda x, c=centred: nl.cosine_norm(x, kernel, centred=c))
            assert gap(cosine(x), nl.cosine_norm(a, kernel, centred=centred)) < 2e-5
