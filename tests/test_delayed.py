"""Delayed synchronization: other devices' statistics are those of an earlier step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from tests.helpers import MAPPERS, array, draw, gap, mappers
from tests.test_devices import collectives

D, N, C, STEPS = 8, 4, 3, 6
over_mappers = pytest.mark.parametrize("mapper", MAPPERS)


def batches():
    """`[STEPS, D, N, C]`; the devices' means differ, and move."""
    return draw(0, STEPS, D, N, C) + draw(1, STEPS, D, 1, 1) + np.arange(STEPS)[:, None, None, None]


def start(dtype=jnp.float32):
    return jax.tree.map(lambda v: jnp.stack([v] * D), nl.population.init_delayed(C, dtype=dtype))


def train(mapper, sync, a, exchanged=True):
    """`h [STEPS, D, N, C]` and the states after each step."""

    def step(_, sharded):
        a, state = sharded
        h, state = nl.batch_norm(a, None, state, train=True, axis_name=sync, decay=0.5)
        return h, nl.population.exchange(state, sync) if exchanged else state

    step, state, found = mappers()[mapper](step), start(), []
    for batch in a:
        h, state = step((), (array(batch), state))
        found.append((h, state))
    return found


def normalized(own, others):
    """The device's own batch, by the moments of its own and other batches together."""
    whole = np.concatenate([own, *others])
    return (own - whole.mean(0)) / np.sqrt(whole.var(0) + 1e-5)


@over_mappers
@pytest.mark.parametrize("every", [1, 3])
def test_the_others_are_as_old_as_the_state_says(mapper, every):
    a = batches()
    for t, (h, state) in enumerate(train(mapper, nl.Sync("d", every=every), a)):
        # Heard of after steps 0, every, 2·every, …; used from the step after on.
        heard = None if t == 0 else (t - 1) - (t - 1) % every
        for i in range(D):
            others = [] if heard is None else [a[heard][j] for j in range(D) if j != i]
            assert gap(h[i], normalized(a[t][i], others)) < 5e-6
        assert state.age.tolist() == [t % every] * D
        assert state.inner.updates.tolist() == [t + 1] * D


@over_mappers
@pytest.mark.parametrize(
    ("sync", "others"),
    [
        (nl.Sync("d", every=1, groups=2), lambda i: [i ^ 1]),
        (nl.Sync("d", every=1, groups=1), lambda i: []),
        (nl.Sync("d", every=1, members=nl.devices.ring(D)), lambda i: [(i - 1) % D, (i + 1) % D]),
    ],
)
def test_groups_hear_of_their_own_members(mapper, sync, others):
    a = batches()[:2]
    h, _ = train(mapper, sync, a)[1]
    for i in range(D):
        assert gap(h[i], normalized(a[1][i], [a[0][j] for j in others(i)])) < 5e-6


def test_the_gradient_sees_the_own_batch_alone():
    a, dy = array(batches()[0]), array(draw(5, D, N, C))
    sync = nl.Sync("d", every=1)
    (_, state), *_ = train("vmap", sync, batches()[:1])

    def h(a, state):
        return nl.batch_norm(a, None, state, train=True, axis_name=sync)[0]

    def fixed(a, others):
        own = nl.moments(a, 0)
        m = nl.measure.merge(own, jax.tree.map(lambda f: f[None], others))
        return (a - m.mean) / m.sigma(1e-5)

    f = jax.vmap(h, axis_name="d")
    (da,) = jax.vjp(lambda a: f(a, state), a)[1](dy)
    (expected,) = jax.vjp(lambda a: jax.vmap(fixed)(a, state.others), a)[1](dy)
    assert gap(da, expected) < 5e-6


@pytest.mark.parametrize("gradient", ["forward", "none"])
def test_the_own_batch_may_count_whole_in_the_gradient_or_not_at_all(gradient):
    a, dy = array(batches()[0]), array(draw(5, D, N, C))
    sync = nl.Sync("d", every=1, gradient=gradient)
    (_, state), *_ = train("vmap", sync, batches()[:1])

    def h(a):
        f = functools.partial(nl.batch_norm, train=True, axis_name=sync)
        return jax.vmap(lambda a, state: f(a, None, state)[0], axis_name="d")(a, state)

    (da,) = jax.vjp(h, a)[1](dy)
    for i in range(D):
        m = nl.measure.merge(
            nl.moments(a[i], 0), jax.tree.map(lambda f, i=i: f[i, None], state.others)
        )
        mu, sigma, x, d = m.mean, m.sigma(1e-5), a[i], dy[i] / m.sigma(1e-5)
        if gradient == "forward":  # as the docstring of `Gradient` has it
            seen = (d * (x - mu) / sigma**2).mean(0)
            d = d - d.mean(0) - (x - x.mean(0)) * seen
        assert gap(da[i], d) < 5e-6


@pytest.mark.parametrize("mapper", ["pmap", "shard_map", "shard_map, check_vma=False"])
def test_a_net_of_many_norms_exchanges_once_and_its_norms_not_at_all(mapper):
    sync = nl.Sync("d", every=2)
    states = {f"layer {i}": start() for i in range(3)}

    def step(_, sharded):
        a, states = sharded
        new = {}
        for name, state in states.items():
            a, new[name] = nl.batch_norm(a, None, state, train=True, axis_name=sync)
        return jnp.tanh(a), new

    def and_exchange(_, sharded):
        h, states = step(_, sharded)
        return h, nl.population.exchange({"norms": states, "else": jnp.ones(2)}, sync)

    run = mappers()[mapper]
    arguments = (), (array(batches()[0]), states)
    assert collectives(run(step), *arguments) == []
    assert collectives(run(and_exchange), *arguments) == ["all-reduce"]


def test_the_state_keeps_its_structure_and_evaluates_by_its_running_statistics():
    norm = nl.get("batch", axis_name=nl.Sync("d", every=1))
    params, state = norm.init(nl.shapes(jnp.ones((N, 2)), jnp.ones((2, C))))
    assert isinstance(state, nl.population.Delayed)
    a = array(batches()[0, 0])

    def step(a, state):
        return norm.apply(params, state, nl.Site(a), train=True)

    h, after = jax.vmap(step, axis_name="d", in_axes=(0, None))(a[None], state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (new.shape[1:], new.dtype) == (old.shape, old.dtype)
    one = jax.tree.map(lambda v: v[0], after)
    evaluated, same = norm.apply(params, one, nl.Site(a), train=False)
    expected, _ = nl.batch_norm(a, params, one.inner, train=False)
    assert gap((evaluated, same), (expected, one)) == 0
    assert gap(h[0], normalized(np.asarray(a), [])) < 5e-6


@pytest.mark.parametrize(
    ("sync", "state", "says"),
    [
        (nl.Sync("d", every=1), nl.init_running(C), r"Running with every=1.*init_delayed\(3\)"),
        (nl.Sync("d", every=1), None, r"NoneType with every=1.*init_delayed\(3\)"),
        ("d", nl.population.init_delayed(C), r"Delayed with every=0.*every=1"),
        (None, nl.population.init_delayed(2), r"Delayed with every=0"),
    ],
)
def test_a_state_of_the_wrong_kind_is_an_error(sync, state, says):
    with pytest.raises(ValueError, match=f"batch norm: got a state of type {says}"):
        nl.batch_norm(jnp.ones((N, C)), None, state, train=True, axis_name=sync)


def test_an_exchange_of_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"without a Delayed state.*Sync\(\.\.\., every=k\)"):
        jax.vmap(lambda s: nl.population.exchange({"a": s}, nl.Sync("d", every=1)), axis_name="d")(
            jnp.ones(2)
        )
    with pytest.raises(ValueError, match="exchange: got axis_name='d'"):
        nl.population.exchange(nl.population.init_delayed(C), nl.Sync("d", every=1))


def test_a_frozen_layer_does_not_stop_the_exchange_of_the_others():
    """It has no age of its own that could stand for theirs."""
    sync = nl.Sync("d", every=2)
    states = {"frozen": nl.population.freeze(start()), "layer": start()}

    def step(states, a):
        new = {
            name: nl.batch_norm(a, None, state, train=True, axis_name=sync)[1]
            for name, state in states.items()
        }
        return nl.population.exchange(new, sync)

    run, ages = jax.jit(jax.vmap(step, axis_name="d")), []
    for batch in batches():
        states = run(states, array(batch))
        ages.append(int(states["layer"].age[0]))
    assert ages == [0, 1, 0, 1, 0, 1]
    assert gap(states["frozen"], nl.population.freeze(start())) == 0


def test_a_batch_that_is_not_finite_says_nothing_to_the_other_devices():
    a = batches()
    a[2, 0, 1, 1] = np.nan
    found = train("vmap", nl.Sync("d", every=1), a)
    for t, (h, state) in enumerate(found):
        finite = np.isfinite(h).all(axis=(1, 2))
        assert finite.tolist() == [t != 2] + [True] * (D - 1)
        assert np.isfinite(state.inner.mean).all()
    assert found[2][1].own.count[0].max() == 0
