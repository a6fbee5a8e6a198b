"""Statistics across devices: eight devices are one device with the whole batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from tests.helpers import MAPPERS, array, draw, gap, mappers, mesh

D, N, C = 8, 4, 3  # devices, examples on each, channels
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}

over_mappers = pytest.mark.parametrize("mapper", MAPPERS)


def problem(dtype, drift=1.0):
    """`(params, state), (a, cotangent)`, sharded; the means of the devices differ by `drift`."""
    a = draw(0, D, N, C) + drift * draw(1, D, 1, 1)
    params = nl.Affine(array(draw(2, C, mean=1.0), dtype), array(draw(3, C), dtype))
    return (params, nl.init_running(C, dtype=dtype)), (
        array(a, dtype),
        array(draw(4, D, N, C), dtype),
    )


def whole(v):
    """The global batch of sharded values."""
    return v.reshape(-1, *v.shape[2:])


def layer(params, state, a, axis_name=None, weights=None):
    return nl.batch_norm(a, params, state, train=True, axis_name=axis_name, weights=weights)


def local_loss(params, state, a, c, axis_name=None, weights=None):
    """The mean over this device's examples of Σ c·h, and what else there is to see."""
    h, state = layer(params, state, a, axis_name, weights)
    return (c * h).mean(), (h, state)


def answer(replicated, sharded):
    """Loss gradients, outputs and state of one device with everything."""
    (params, state), (a, c) = replicated, (whole(v) for v in sharded)
    grads, (h, state) = jax.grad(local_loss, (0, 2), has_aux=True)(params, state, a, c)
    return grads, h, state


def everywhere(v):
    """What all devices agree on."""
    return jax.tree.map(lambda v: np.broadcast_to(v, (D, *v.shape)), v)


@over_mappers
def test_synced_equals_the_whole_batch(mapper, precision):
    replicated, sharded = problem(precision)
    _, h, state = answer(replicated, sharded)

    def on_device(replicated, sharded):
        return layer(*replicated, sharded[0], "d")

    out, after = mappers()[mapper](on_device)(replicated, sharded)
    assert gap(whole(out), h) < TOLERANCE[precision]
    assert gap(after, everywhere(state)) < TOLERANCE[precision]


@over_mappers
def test_synced_at_a_large_mean_loses_no_digits(mapper):
    """At 1e4 the means themselves are 1e-3 apart; E[x²] − E[x]² would be off by 17, not 1e-3."""
    (params, state), (a, _) = problem("float32")
    a = a + 1e4
    expected = whole(np.asarray(a, np.float64)).var(0)
    _, after = mappers()[mapper](lambda r, a: layer(*r, a, "d"))((params, state), a)
    assert gap(after.var, everywhere(expected)) < 1e-3


RECIPES = {
    "local loss, then pmean(grads)": (False, True),
    "pmean(loss), grads untouched": (True, False),
    "pmean(loss) and pmean(grads)": (True, True),
}


def gradients(mapper, recipe, replicated, sharded, weights=None):
    """`(dparams, da)` on every device by the recipe."""
    inside, outside = RECIPES[recipe]

    def on_device(replicated, sharded):
        params, state = replicated
        a, c = sharded

        def loss(params, a):
            value, _ = local_loss(params, state, a, c, "d")
            return lax.pmean(value, "d") if inside else value

        dparams, da = jax.grad(loss, (0, 1))(params, a)
        return (lax.pmean(dparams, "d") if outside else dparams), da

    return mappers()[mapper](on_device)(replicated, sharded)


@over_mappers
def test_the_portable_recipe_gives_the_gradient_of_the_whole_batch(mapper, precision):
    """pmean(loss) inside grad and pmean(grads) after it.

    Without the types of `check_vma=True` every device differentiates the sum of all devices'
    losses, so da is the number of devices times too large.
    """
    replicated, sharded = problem(precision)
    (dparams, da), *_ = answer(replicated, sharded)
    recipe = "pmean(loss) and pmean(grads)"
    synced, sharded_da = gradients(mapper, recipe, replicated, sharded)
    assert gap(synced, everywhere(dparams)) < TOLERANCE[precision]
    factor = 1 if mapper == "shard_map" else D
    assert gap(whole(sharded_da), factor * da) < TOLERANCE[precision]


@over_mappers
@pytest.mark.parametrize("recipe", [r for r in RECIPES if "and" not in r])
def test_the_other_recipes_are_right_in_one_mode_only(mapper, recipe):
    """The recipe of pmap is D times too large where shard_map knows what varies; and vice versa."""
    replicated, sharded = problem("float32")
    (dparams, _), *_ = answer(replicated, sharded)
    synced, _ = gradients(mapper, recipe, replicated, sharded)
    typed = mapper == "shard_map"
    if RECIPES[recipe] == (False, True):
        assert (
            gap(synced, everywhere(jax.tree.map(lambda v: (D if typed else 1) * v, dparams))) < 5e-6
        )
    elif typed:
        assert gap(synced, everywhere(dparams)) < 5e-6
    else:
        assert gap(synced, everywhere(dparams)) > 0.1
        assert np.ptp(np.asarray(synced.g), 0).max() > 1e-3  # the replicas drift apart


@over_mappers
def test_the_gradient_through_the_map_is_that_of_the_whole_batch(mapper, precision):
    """grad outside, the loss on the gathered output: right in every mode, da included."""
    replicated, sharded = problem(precision)
    (dparams, da), *_ = answer(replicated, sharded)
    (params, state), (a, c) = replicated, sharded
    synced = mappers()[mapper](lambda r, a: layer(*r, a, "d")[0])

    grads = jax.grad(lambda params, a: (c * synced((params, state), a)).mean(), (0, 1))(params, a)
    assert gap(grads[0], dparams) < TOLERANCE[precision]
    assert gap(whole(grads[1]), da) < TOLERANCE[precision]


@over_mappers
def test_uneven_shards_and_an_empty_one_are_the_subset(mapper, precision):
    """4, 3, 2, 1, 0, … valid examples on the devices, NaN in the others."""
    replicated, (a, _) = problem(precision)
    mask = np.arange(N) < np.array([4, 3, 2, 1, 0, 4, 0, 1])[:, None]
    dirty = array(np.where(mask[..., None], a, np.nan), precision)
    weights = array(mask, precision)
    params, state = replicated
    h, expected = layer(params, state, whole(a)[whole(mask)])

    out, after = mappers()[mapper](lambda r, s: layer(*r, s[0], "d", s[1]))(
        replicated, (dirty, weights)
    )
    assert gap(np.asarray(out)[mask], h) < TOLERANCE[precision]
    assert gap(after, everywhere(expected)) < TOLERANCE[precision]


@over_mappers
def test_fractional_weights_are_pooled_by_their_sum(mapper):
    replicated, (a, _) = problem("float32")
    weights = array(np.abs(draw(6, D, N)))
    h, expected = layer(*replicated, whole(a), None, whole(weights))
    out, after = mappers()[mapper](lambda r, s: layer(*r, s[0], "d", s[1]))(
        replicated, (a, weights)
    )
    assert gap((whole(out), after), (h, everywhere(expected))) < 5e-6


@over_mappers
def test_a_batch_masked_on_all_devices_is_skipped(mapper):
    replicated, (a, _) = problem("float32")
    out, after = mappers()[mapper](lambda r, a: layer(*r, a, "d", jnp.zeros(N)))(replicated, a)
    assert np.isfinite(out).all()
    assert gap(after, everywhere(replicated[1]._replace(skipped=np.int32(1)))) == 0


@over_mappers
def test_without_an_axis_name_every_device_has_its_own_statistics(mapper):
    replicated, (a, _) = problem("float32")
    expected = [layer(*replicated, shard) for shard in a]
    out = mappers()[mapper](lambda r, a: layer(*r, a))(replicated, a)
    assert gap(out, jax.tree.map(lambda *v: np.stack(v), *expected)) < 5e-6


@over_mappers
def test_an_axis_of_size_one_is_no_axis(mapper):
    replicated, (a, _) = problem("float32")
    expected = layer(*replicated, a[0])
    out = mappers(1)[mapper](lambda r, a: layer(*r, a, "d"))(replicated, a[:1])
    assert gap(out, jax.tree.map(lambda v: v[None], expected)) < 1e-6


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("names", [("i", "j"), ("j", "i")])
def test_two_axes_are_one(check_vma, names):
    replicated, (a, _) = problem("float32")
    _, h, state = answer(*problem("float32"))

    @jax.jit
    @jax.shard_map(
        mesh=mesh(i=4, j=2),
        in_specs=(P(), P(("i", "j"))),
        out_specs=(P(("i", "j")), P()),
        check_vma=check_vma,
    )
    def synced(replicated, a):
        return layer(*replicated, a, names)

    assert gap(synced(replicated, whole(a)), (h, state)) < 5e-6


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_axis_of_two_syncs_groups_of_devices(check_vma):
    """Four groups of two: each normalizes by its own statistics."""
    replicated, (a, _) = problem("float32")
    groups = whole(a).reshape(4, -1, C)
    expected = [layer(*replicated, group) for group in groups]

    @jax.jit
    @jax.shard_map(
        mesh=mesh(i=4, j=2),
        in_specs=(P(), P(("i", "j"))),
        out_specs=(P(("i", "j")), P("i")),
        check_vma=check_vma,
    )
    def synced(replicated, a):
        h, state = layer(*replicated, a, "j")
        return h, jax.tree.map(lambda v: v[None], state)

    h, state = synced(replicated, whole(a))
    assert gap(h, np.concatenate([h for h, _ in expected])) < 5e-6
    assert gap(state, jax.tree.map(lambda *v: np.stack(v), *[s for _, s in expected])) < 5e-6


def test_two_axes_of_vmap_are_one():
    replicated, (a, _) = problem("float32")
    _, h, state = answer(*problem("float32"))
    inner = jax.vmap(lambda a: layer(*replicated, a, ("i", "j")), axis_name="j")
    out, after = jax.jit(jax.vmap(inner, axis_name="i"))(a.reshape(4, 2, N, C))
    assert gap(out.reshape(-1, C), h) < 5e-6
    assert gap(jax.tree.map(lambda v: v.reshape(D, *v.shape[2:]), after), everywhere(state)) < 5e-6


def test_plain_jit_on_a_sharded_batch_is_global():
    """No axis name: the compiler sees one array."""
    replicated, sharded = problem("float32")
    _, h, state = answer(replicated, sharded)
    a = jax.device_put(whole(sharded[0]), NamedSharding(mesh(d=D), P("d")))
    assert gap(jax.jit(layer)(*replicated, a), (h, state)) < 5e-6


def own_statistics(a, masks=None):
    """The running statistics of devices that never spoke to each other, `[D, ...]`."""
    states = [nl.init_running(C) for _ in a]
    for i, shard in enumerate(a):
        weights = None if masks is None else jnp.asarray(masks[i])
        _, states[i] = layer(None, states[i], shard, weights=weights)
    return jax.tree.map(lambda *v: jnp.stack(v), *states)


@pytest.mark.parametrize("check_vma", [True, False])
def test_pooled_statistics_keep_the_variance_between_devices(check_vma):
    """After one step they are those of the whole batch; averaged variances are not."""
    _, (a, _) = problem("float32")
    states = own_statistics(a)

    @jax.jit
    @jax.shard_map(mesh=mesh(d=D), in_specs=P("d"), out_specs=P(), check_vma=check_vma)
    def pool(states):
        return nl.population.pool_running(jax.tree.map(lambda v: v[0], states), "d")

    pooled = pool(states)
    x = np.asarray(whole(a), np.float64)
    assert gap((pooled.mean, pooled.var), (x.mean(0), x.var(0))) < 5e-6
    assert gap(np.asarray(states.var).mean(0), x.var(0)) > 0.1
    for new, old in zip(*map(jax.tree.leaves, (pooled, states)), strict=True):
        assert (new.shape, new.dtype) == (old.shape[1:], old.dtype)


def test_pooling_leaves_out_a_device_that_saw_nothing():
    _, (a, _) = problem("float32")
    masks = np.ones((D, N), np.float32)
    masks[[2, 5]] = 0
    states = own_statistics(a, masks)
    pooled = mappers()["vmap"](lambda _, state: nl.population.pool_running(state, "d"))((), states)
    x = np.asarray(a, np.float64)[masks[:, 0] > 0].reshape(-1, C)
    assert gap((pooled.mean, pooled.var), everywhere((x.mean(0), x.var(0)))) < 5e-6


def test_pooling_devices_that_all_saw_nothing_keeps_the_initial_values():
    states = own_statistics(jnp.ones((D, N, C)), np.zeros((D, N), np.float32))
    pooled = mappers()["vmap"](lambda _, state: nl.population.pool_running(state, "d"))((), states)
    assert gap((pooled.mean, pooled.var), everywhere((np.zeros(C), np.ones(C)))) == 0


COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(f, *args) -> list[str]:
    """The kinds of the collectives of the compiled program, but those that run when needed."""
    lines = f.lower(*args).compile().as_text().splitlines()
    return sorted(COLLECTIVE.findall("\n".join(v for v in lines if "/while/body" not in v)))


@pytest.mark.parametrize("mapper", ["pmap", "shard_map", "shard_map, check_vma=False"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_layer_costs_one_collective_each_way(mapper, layers):
    (params, state), (a, c) = problem("float32")

    def forward(params, a):
        for _ in range(layers):
            a = jnp.tanh(layer(params, state, a, "d")[0])
        return a

    def backward(params, sharded):
        a, c = sharded
        return jax.grad(lambda a: (c * forward(params, a)).sum())(a)

    run = mappers()[mapper]
    assert collectives(run(forward), params, a) == ["all-reduce"] * layers
    assert collectives(run(backward), params, (a, c)) == ["all-reduce"] * 2 * layers


@over_mappers
def test_weight_norm_is_initialized_on_the_global_batch(mapper):
    x, w = draw(0, D, N, 5) + draw(1, D, 1, 1), array(draw(2, 5, C))
    x = array(x)
    expected = nl.weight_norm_init(nl.Site(whole(x) @ w, w=w))
    params = mappers()[mapper](
        lambda w, x: nl.weight_norm_init(nl.Site(x @ w, w=w), axis_name="d")
    )(w, x)
    assert gap(params, everywhere(expected)) < 5e-6


@pytest.mark.parametrize("bound", ["nothing", "another"])
def test_an_unbound_axis_name_is_an_error_that_names_it(bound):
    a = jnp.ones((2, N, C))
    calls = (
        lambda a: layer(None, None, a, "replica")[0],
        lambda a: nl.weight_norm_init(nl.Site(a, w=jnp.ones((2, C))), axis_name="replica").g,
        lambda a: nl.population.pool_running(nl.init_running(C), ("replica",)).mean,
        lambda a: nl.get("batch", axis_name="replica").apply(
            None, nl.init_running(C), nl.Site(a), train=True
        )[0],
    )
    for call in calls:
        f = jax.vmap(call, axis_name="d") if bound == "another" else lambda a, f=call: f(a[0])
        with pytest.raises(ValueError, match=r"axis_name=.*replica.*mapped axis.*axis_name=None"):
            f(a)
