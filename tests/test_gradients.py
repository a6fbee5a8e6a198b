"""The gradient conventions of the transforms, and the two functions that hide them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import normlab as nl
from tests.helpers import MAPPERS, array, draw, gap, mappers

D, N, C = 8, 4, 3
over_mappers = pytest.mark.parametrize("mapper", MAPPERS)


def problem(dtype="float32"):
    a = array(draw(0, D, N, C) + draw(1, D, 1, 1), dtype)
    params = nl.Affine(array(draw(2, C, mean=1.0), dtype), array(draw(3, C), dtype))
    mask = np.arange(N) < np.array([4, 3, 2, 1, 0, 4, 3, 1])[:, None]
    return params, (a, array(draw(4, D, N, C), dtype), array(mask, dtype))


def losses(params, a, c, axis_name=None, weights=None):
    h, _ = nl.batch_norm(a, params, train=True, axis_name=axis_name, weights=weights)
    return 1 + (c * jnp.tanh(h)).sum(-1)


def expected(params, sharded, masked):
    a, c, w = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), sharded)
    w = w if masked else jnp.ones_like(w)

    def loss(params, a):
        return (w * losses(params, a, c, weights=w)).sum() / w.sum()

    return jax.value_and_grad(loss, (0, 1))(params, a)


@over_mappers
@pytest.mark.parametrize("masked", [False, True])
def test_the_helpers_give_the_gradient_of_one_device_in_every_mode(mapper, masked, precision):
    """By parameters and by inputs, also where shards are uneven and one is empty."""
    params, sharded = problem(precision)
    value, (dparams, da) = expected(params, sharded, masked)

    def on_device(params, sharded):
        a, c, w = sharded
        w = w if masked else None

        def loss(params, a):
            return nl.devices.global_mean(losses(params, a, c, "d", w), "d", weights=w)

        value, (dparams, da) = jax.value_and_grad(loss, (0, 1))(params, a)
        return value, nl.devices.global_gradient(dparams, "d"), da

    found = mappers()[mapper](on_device)(params, sharded)
    tolerance = {"float32": 5e-6, "float64": 1e-12}[precision]
    everywhere = jax.tree.map(lambda v: np.broadcast_to(v, (D, *v.shape)), (value, dparams))
    assert gap(found[:2], everywhere) < tolerance
    assert gap(found[2].reshape(da.shape), da) < tolerance


def conventions(mapper, inside, outside, params, sharded):
    """`(dparams, da)` of device 0's view, by how the loss and the gradient are reduced."""

    def on_device(params, sharded):
        a, c, _ = sharded

        def loss(params, a):
            return inside(losses(params, a, c, "d").mean())

        dparams, da = jax.grad(loss, (0, 1))(params, a)
        return outside(dparams), da

    return mappers()[mapper](on_device)(params, sharded)


def pmean(tree):
    return lax.pmean(tree, "d")


def same(tree):
    return tree


# By (recipe, whether types say what varies): the factor of dparams and of da; None if it is wrong
# by no one factor.
FACTORS = {
    ("local loss, then pmean(grads)", False): (1, D),
    ("local loss, then pmean(grads)", True): (D, D),
    ("pmean(loss), grads untouched", False): (None, D),
    ("pmean(loss), grads untouched", True): (1, 1),
    ("pmean(loss) and pmean(grads)", False): (1, D),
    ("pmean(loss) and pmean(grads)", True): (1, 1),
    ("local loss, grads untouched", False): (None, D),
    ("local loss, grads untouched", True): (D, D),
}
RECIPES = {
    "local loss, then pmean(grads)": (same, pmean),
    "pmean(loss), grads untouched": (pmean, same),
    "pmean(loss) and pmean(grads)": (pmean, pmean),
    "local loss, grads untouched": (same, same),
}


@over_mappers
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_is_wrong_by_exactly_the_factor_of_the_table(recipe, mapper):
    params, sharded = problem()
    _, (dparams, da) = expected(params, sharded, masked=False)
    of_params, of_inputs = FACTORS[recipe, mapper == "shard_map"]
    found, found_da = conventions(mapper, *RECIPES[recipe], params, sharded)
    assert gap(found_da.reshape(da.shape), of_inputs * da) < 5e-6
    if of_params is None:
        assert np.ptp(np.asarray(found.g), 0).max() > 1e-3  # the replicas drift apart
    else:
        for one in range(D):
            device = jax.tree.map(lambda v, i=one: v[i], found)
            assert gap(device, jax.tree.map(lambda v: of_params * v, dparams)) < 5e-6


def test_an_average_of_uneven_devices_is_not_the_global_mean():
    """Each device's mean weighs the same in it, however few values it has."""
    _, (a, _, w) = problem()
    mean = jax.vmap(lambda v, w: nl.devices.global_mean(v[:, 0], "d", weights=w), axis_name="d")(
        a, w
    )
    valid = np.asarray(a)[..., 0][np.asarray(w) > 0]
    assert gap(mean, np.full(D, valid.mean())) < 1e-6
    by_device = [
        np.asarray(v)[m > 0, 0].mean() for v, m in zip(a, np.asarray(w), strict=True) if m.any()
    ]
    assert abs(np.mean(by_device) - valid.mean()) > 0.02


GRADIENTS = ("both", "forward", "backward", "none")


@over_mappers
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_the_gradient_sees_is_the_formula_of_the_docstring(gradient, mapper):
    params, (a, dy, _) = problem()
    x, dy64 = np.asarray(a, np.float64), np.asarray(dy, np.float64)
    g = np.asarray(params.g, np.float64)
    over = (0, 1) if gradient != "backward" else (1,)
    mu, var = x.mean(over, keepdims=True), x.var(over, keepdims=True)
    sigma = np.sqrt(var + 1e-5)
    hat = (x - mu) / sigma
    sees = {"both": (0, 1), "backward": (0, 1), "forward": (1,), "none": None}[gradient]

    def mean(v):
        return v.mean(sees, keepdims=True) if sees else 0

    dx = g * (dy64 / sigma - mean(dy64 / sigma) - (x - mean(x)) * mean(dy64 * hat / sigma**2))

    def on_device(params, sharded):
        a, dy, _ = sharded
        sync = nl.Sync("d", gradient=gradient)
        h, pull = jax.vjp(lambda a: nl.batch_norm(a, params, train=True, axis_name=sync)[0], a)
        return h, pull(dy)[0]

    h, found = mappers()[mapper](on_device)(params, (a, dy, dy))
    assert gap(h, g * hat + np.asarray(params.b)) < 5e-6
    assert gap(found, dx) < 5e-6


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
def test_the_helpers_are_the_same_in_plain_jit_where_arrays_are_of_all_devices(kind):
    params, (a, c, w) = problem()
    mesh = jax.make_mesh((D,), ("data",), axis_types=(kind,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def step(params, a, c, w):
        def loss(params):
            each = losses(params, a, c, "data", w)
            return nl.devices.global_mean(each, "data", weights=w)

        value, grads = jax.value_and_grad(loss)(params)
        return value, nl.devices.global_gradient(grads, "data")

    whole = [v.reshape(-1, *v.shape[2:]) for v in (a, c, w)]
    with jax.set_mesh(mesh):
        found = jax.jit(step)(params, *jax.device_put(whole, place))
    value, (grads, _) = expected(params, (a, c, w), True)
    assert gap(found, (value, grads)) < 1e-5
    alone = nl.devices.global_mean(whole[0], None), nl.devices.global_gradient(grads, None)
    assert gap(alone, (whole[0].mean(), grads)) < 1e-6
