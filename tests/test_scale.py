"""Merging over devices costs the same on any number of them, and keeps its digits."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from normlab.devices.routes import Circles, Matchings, matched, of_devices, route
from normlab.devices.topology import plan
from tests.helpers import MAPPERS, array, draw, gap, mappers, mesh
from tests.test_devices import collectives

D, N, C = 8, 4, 3
GRID = {"host": 2, "chip": 4}
TOGETHER = nl.Sync(("host", "chip"), together="chip")
GROUPS = nl.Sync(("host", "chip"), groups=4)  # the same by number
FORMS = ("shard_map", "shard_map, check_vma=False", "vmap", "jit", "jit, explicit")


# --- Whole axes --------------------------------------------------------------------------------


def states(means):
    """A running state of each device with that mean, which the next batch replaces."""
    state = nl.init_running(C, decay=0.0)
    return jax.vmap(lambda mean: state._replace(mean=jnp.full(C, mean), mass=jnp.ones(())))(
        jnp.asarray(means, jnp.float32)
    )


@pytest.mark.parametrize("mapper", MAPPERS)
@pytest.mark.parametrize("pivot", ["none", "zero", "near", "exact", "differs", "nan", "far"])
@pytest.mark.parametrize(
    ("mean", "tolerance"), [(0.0, 2e-6), (5.0, 5e-6), (30.0, 5e-6), (1e3, 1e-5), (1e4, 2e-4)]
)
def test_no_digit_depends_on_the_mean_or_on_the_pivot(mean, tolerance, pivot, mapper):
    """Whatever the running means say, also where devices have different ones."""
    x = jnp.asarray(draw(0, D, 16, C) + draw(1, D, 1, 1) + mean, jnp.float32)
    true = np.asarray(x, np.float64).reshape(-1, C)
    means = {
        "zero": np.zeros(D),
        "near": np.full(D, 0.99 * mean),
        "exact": np.full(D, mean),
        "differs": mean + np.arange(D) * 1e-3,
        "nan": np.full(D, np.nan),
        "far": np.full(D, 1e25),
    }

    def f(_, given):
        x, *state = given
        return nl.batch_norm(x, None, *state, train=True, axis_name="d")[0]

    given = (x,) if pivot == "none" else (x, states(means[pivot]))
    h = np.asarray(mappers()[mapper](f)((), given), np.float64).reshape(-1, C)
    expected = (true - true.mean(0)) / np.sqrt(true.var(0) + 1e-5)
    assert np.abs(h - expected).max() / np.abs(expected).max() < tolerance


@pytest.mark.parametrize("second", ["when_needed", "always", "never"])
@pytest.mark.parametrize("mapper", ["pmap", "shard_map", "shard_map, check_vma=False"])
def test_what_a_second_sum_costs(second, mapper):
    """`when_needed` has it in a loop that need not run."""
    a = array(draw(0, D, N, C))
    f = mappers()[mapper](
        lambda state, a: nl.batch_norm(
            a, None, state, train=True, axis_name=nl.Sync("d", second=second)
        )
    )
    text = f.lower(nl.init_running(C), a).compile().as_text()
    assert collectives(f, nl.init_running(C), a) == ["all-reduce"] * (1 + (second == "always"))
    assert ("/while/body" in text) == (second == "when_needed")


def test_devices_whose_pivots_differ_are_told_from_those_with_one():
    a = array(draw(0, D, N, C))

    @functools.partial(jax.jit, static_argnums=1)
    def normalized(means, second):
        def f(a, state):
            sync = nl.Sync("d", second=second)
            return nl.batch_norm(a, None, state, train=True, axis_name=sync)[0]

        return jax.vmap(f, axis_name="d")(a, states(means))

    alike = np.ones(D, np.float32)
    expected = normalized(alike, "never")
    assert np.isfinite(expected).all()
    for k in range(D):  # one device, and the last bit of a number
        means = alike.copy()
        means[k] = np.nextafter(means[k], np.float32(2))
        assert np.isnan(normalized(means, "never")).all()
        assert gap(normalized(means, "when_needed"), expected) < 2e-6


def test_the_lost_digits_are_kept():
    a = array(draw(0, D, 64, C) + 300.0)

    def f(sync, a):
        state = nl.population.init_digits(C)
        for _ in range(2):
            _, state = nl.batch_norm(a, None, state, train=True, axis_name=sync)
        return state

    for second, least, most in (("when_needed", 4.8, 5.1), ("never", 3, math.inf)):
        sync = nl.Sync("d", second=second)
        after = jax.vmap(functools.partial(f, sync), axis_name="d")(a)
        assert (after.last < 0.5).all()  # the running mean is the pivot by then
        assert (after.most > least).all()
        assert (after.most < most).all()
    constant = a.at[..., 0].set(7.3)  # which has no digit to lose
    for second, least, most in (("when_needed", 0, 0), ("never", 6, math.inf)):
        sync = nl.Sync("d", second=second)
        after = jax.vmap(functools.partial(f, sync), axis_name="d")(constant)
        assert (after.most[:, 0] >= least).all()
        assert (after.most[:, 0] <= most).all()
    far = jax.vmap(functools.partial(f, nl.Sync("d")), axis_name="d")(a * 1e17 + 1e20)
    assert np.isfinite(far.most).all()
    assert (far.most > 4).all()
    alone = nl.batch_norm(a[0], None, nl.population.init_digits(C), train=True)[1]
    assert not alone.most.any()


def test_constant_samples_are_exact():
    for value in (0.1, 1e3 + 1 / 3, 1e20, -7e-9):
        a = jnp.full((D, 3, C), value, jnp.float32)
        h = jax.vmap(lambda a: nl.batch_norm(a, train=True, axis_name="d")[0], axis_name="d")(a)
        assert not h.any()


def test_many_moments_are_merged_at_once():
    a, b = array(draw(0, D, N, 2)), array(draw(1, D, N, 5, 3))

    def f(_, given):
        a, b = given
        m = {"a": nl.moments(a, 0), "b": nl.moments(b, (0, 1))}
        return nl.devices.all_reduce(m, "d")

    run = mappers()["shard_map"](f)
    merged = run((), (a, b))
    assert collectives(run, (), (a, b)) == ["all-reduce"]
    assert gap(merged["a"].mean[0], nl.moments(a.reshape(-1, 2), 0).mean) < 1e-6
    assert gap(merged["b"].m2[0], nl.moments(b.reshape(-1, 5, 3), (0, 1)).m2) < 1e-6
    assert (
        jax.vmap(lambda a: nl.devices.all_reduce({}, "d") or a, axis_name="d")(a).shape == a.shape
    )


# --- Groups by number --------------------------------------------------------------------------


def heard(way, members, shards):
    """What each shard has heard of when all rounds are over: sets of shards."""
    count = len(members) // shards
    own = [[{i * shards + k} for k in range(shards)] for i in range(count)]
    if isinstance(way, Matchings):
        rows = [[set(s) for s in own[i]] for i in range(count)]
        for pairs in way.rounds:
            assert len({s for s, _ in pairs}) == len({t for _, t in pairs}) == len(pairs)
            told = [[set()] * shards for _ in range(count)]
            for source, target in pairs:
                told[target] = own[source]
            rows = [row + more for row, more in zip(rows, told, strict=True)]
        return [
            set().union(*(s for s, yes in zip(rows[i], way.chosen[i, k], strict=True) if yes))
            for i in range(count)
            for k in range(shards)
        ]
    return None


SPECS = st.integers(1, 9).flatmap(
    lambda count: st.lists(
        st.lists(st.integers(0, count - 1), min_size=1, max_size=count),
        min_size=count,
        max_size=count,
    )
)


@settings(max_examples=200, deadline=None)
@given(SPECS)
def test_everyone_hears_of_its_members_in_as_few_rounds_as_there_can_be(members):
    members = tuple(map(tuple, members))
    way = route(members, 1)
    if isinstance(way, Matchings):
        assert heard(way, members, 1) == [set(row) for row in members]
        senders = [
            sum(j in row for i, row in enumerate(members) if i != j) for j in range(len(members))
        ]
        receivers = [len({*row} - {i}) for i, row in enumerate(members)]
        assert len(way.rounds) == max(senders + receivers)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_spec_gives_the_moments_of_the_members(data):
    """Partitions, windows and whatever else, with parts of a batch, against sums over the rows."""
    devices, shards = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([1, 1, 2, 3]))
    count = devices * shards
    kind = data.draw(st.sampled_from(["groups", "window", "any"]))
    if kind == "groups":
        order = data.draw(st.permutations(range(count)))
        cuts = sorted(data.draw(st.sets(st.integers(1, count), max_size=3)) | {0, count})
        groups = [order[a:b] for a, b in itertools.pairwise(cuts)]
        members = tuple(tuple(next(g for g in groups if i in g)) for i in range(count))
    elif kind == "window":
        low, width = data.draw(st.integers(-4, 4)), data.draw(st.integers(1, count))
        members = tuple(tuple((i + low + k) % count for k in range(width)) for i in range(count))
    else:
        rows = st.lists(st.integers(0, count - 1), min_size=1, max_size=4)
        members = tuple(tuple(data.draw(rows)) for _ in range(count))
    x = jnp.asarray(draw(3, devices, shards * 2, C) + 50, jnp.float32)
    sync = nl.Sync("d", members=members, shards=shards)
    h = jax.vmap(lambda x: nl.batch_norm(x, train=True, axis_name=sync)[0], axis_name="d")(x)
    parts = np.asarray(x, np.float64).reshape(count, 2, C)
    for i, row in enumerate(members):
        among = parts[sorted({*row})].reshape(-1, C)
        expected = (parts[i] - among.mean(0)) / np.sqrt(among.var(0) + 1e-5)
        assert np.abs(h.reshape(parts.shape)[i] - expected).max() < 2e-4 * (
            1 + np.abs(expected).max()
        )


def sent(way):
    """How many times 2C + 1 numbers a device sends at the most."""
    if isinstance(way, Matchings):
        return len(way.rounds)
    number = int(way.ends != 0)
    for j in range(max(way.lengths).bit_length()):
        more = any(n >= 2 << j for n in way.lengths)
        rest = any(n >> j & 1 and n % (1 << j) for n in way.lengths)
        number += more + rest
    return number


@pytest.mark.parametrize("g", [1, 2, 3, 5, 8, 16])
def test_what_is_sent_does_not_grow_with_the_number_of_devices(g):
    """Blocks, strides, uneven groups and rings, over 48 to 768 devices."""
    found = set()
    for devices in (48, 240, 768):
        blocks = plan("", nl.Sync("d", groups=g), (devices - devices % g,), 1).members
        stride = devices // g if devices % g == 0 else None
        strided = tuple(tuple(range(i, devices, stride)) for i in range(stride)) if stride else ()
        cut = plan("", nl.Sync("d", groups=strided), (devices,), 1).members if stride else None
        ring = nl.devices.ring(devices, g)
        ways = [route(m, 1) if m else None for m in (blocks, cut, ring)]
        found.add(tuple(w and sent(w) for w in ways))
        for way, size in zip(ways, (g, g, 2 * g + 1), strict=True):
            if isinstance(way, Circles):
                assert way.rounds <= math.ceil(math.log2(max(size, 2))) + 1
                assert sent(way) <= 2 * math.ceil(math.log2(max(size, 2))) + 1
    assert len({f[2] for f in found}) == len({f[0] for f in found}) == 1


def test_a_ring_asks_both_neighbours_and_a_wide_one_goes_round():
    assert isinstance(route(nl.devices.ring(64), 1), Matchings)
    assert len(route(nl.devices.ring(64), 1).rounds) == 2
    assert isinstance(route(nl.devices.ring(64, 8), 1), Circles)
    assert route(nl.devices.ring(64, 8), 1).rounds == 6


def test_parts_of_a_batch_that_have_the_same_members_are_one():
    assert of_devices(((0, 1, 2, 3),) * 4, 2) == ((0, 1), (0, 1))
    assert of_devices(((0, 1), (0, 1), (2,), (3,)), 2) is None
    assert matched([], 3) == ()


# --- Groups that are an axis of a mesh ----------------------------------------------------------


def over(form, f, sharded, kinds=AxisType):
    """`f(*sharded)` of `[D·N, ...]` on the grid, in and out."""
    grid = mesh(kinds.Explicit if "explicit" in form else kinds.Auto, **GRID)
    names = tuple(GRID)
    if form.startswith("jit"):
        put = jax.device_put(sharded, NamedSharding(grid, P(names)))
        with jax.set_mesh(grid):
            return jax.jit(f)(*put)
    if form == "vmap":
        split = [v.reshape(*GRID.values(), -1, *v.shape[1:]) for v in sharded]
        run = jax.vmap(jax.vmap(f, axis_name="chip"), axis_name="host")
        return jax.tree.map(lambda v: v.reshape(D, *v.shape[2:]), run(*split))
    mapped = jax.shard_map(
        lambda *given: jax.tree.map(lambda v: v[None], f(*given)),
        mesh=grid,
        in_specs=P(names),
        out_specs=P(names),
        check_vma="check_vma" not in form,
    )
    return jax.jit(mapped)(*sharded)


def flat(form, v):
    return np.asarray(v if form.startswith("jit") else v.reshape(-1, *v.shape[2:]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradient", ["both", "forward", "backward", "none"])
def test_groups_along_an_axis_are_those_by_number(form, gradient):
    """Outputs, gradients and the population, which is that of all."""
    x, c = (array(draw(i, D * N, C) + draw(i, D, 1).repeat(N, 0)) for i in range(2))

    def step(sync):
        def f(x, c):
            state = nl.init_running(C)

            def loss(x):
                h, after = nl.batch_norm(x, None, state, train=True, axis_name=sync)
                return (c * h).sum(), (h, after)

            return jax.grad(loss, has_aux=True)(x)

        return f

    spec = {"axes": tuple(GRID), "gradient": gradient}
    one = over(form, step(nl.Sync(**spec, together="chip")), (x, c))
    two = over(form, step(nl.Sync(**spec, groups=4)), (x, c))
    assert gap(one, two) < 5e-6
    everyone = nl.batch_norm(x, None, nl.init_running(C), train=True)[1]
    for state in (one[1][1], two[1][1]):
        var = state.var if form.startswith("jit") else state.var[0]
        assert gap(var, everyone.var) < 5e-6


def test_the_population_of_groups_along_an_axis_costs_one_more_sum():
    a = array(draw(0, D * N, C))
    grid = mesh(**GRID)

    def program(sync, state):
        f = lambda a: nl.batch_norm(a, None, state, train=True, axis_name=sync)  # noqa: E731
        out = (P(tuple(GRID)), jax.tree.map(lambda _: P(), state))
        return jax.jit(jax.shard_map(f, mesh=grid, in_specs=P(tuple(GRID)), out_specs=out))

    for state, number in ((nl.init_running(C), 2), (None, 1)):
        assert collectives(program(TOGETHER, state), a) == ["all-reduce"] * number


@pytest.mark.parametrize("form", FORMS[:3])
def test_delayed_statistics_are_exchanged_along_an_axis(form):
    x = array(draw(0, D * N, C) + draw(1, D, 1).repeat(N, 0))

    def step(sync):
        def f(x):
            state = nl.population.init_delayed(C)
            for _ in range(2):
                h, state = nl.batch_norm(x, None, state, train=True, axis_name=sync)
                state = nl.population.exchange(state, sync)
            return h

        return f

    one = over(form, step(nl.Sync(tuple(GRID), together="chip", every=1)), (x,))
    two = over(form, step(nl.Sync(tuple(GRID), groups=4, every=1)), (x,))
    assert gap(one, two) < 5e-6
    split = np.asarray(x, np.float64).reshape(2, 4 * N, C)
    expected = (split - split.mean(1, keepdims=True)) / np.sqrt(split.var(1, keepdims=True) + 1e-5)
    assert gap(flat(form, one).reshape(split.shape), expected) < 5e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"together": "rack"}, r"together='rack' of the axes \('host', 'chip'\).*some of the axes"),
        ({"together": ("host", "chip")}, "not all"),
        ({"together": ()}, "not all"),
        ({"together": ("chip", "chip")}, "not all"),
        ({"together": "chip", "groups": 2}, "together and groups"),
        ({"together": "chip", "staged": True}, "together and staged"),
        ({"second": "sometimes"}, "'sometimes'"),
        ({"together": 3}, "together=3"),
    ],
)
def test_what_means_nothing_is_an_error(options, says):
    with pytest.raises(ValueError, match=f"Sync: got .*{says}"):
        nl.Sync(**{"axes": ("host", "chip")} | options)
