"""Devices that measure for themselves and are pooled in between, beside one that saw everything."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import normlab as nl
from normlab.comoments import comoments
from tests.helpers import array, draw, gap, mesh

population = nl.population
D, N, C, STEPS = 4, 6, 4, 6
BATCHES = draw(0, STEPS, D, N, C, mean=3.0) + 2 * draw(1, D, 1, C) + draw(2, STEPS, 1, 1, C)
# Valid examples of each device: alike, uneven, and none at all on some device of every step.
COUNTS = {
    "even": np.full((STEPS, D), N),
    "uneven": np.random.default_rng(3).integers(2, N + 1, (STEPS, D)),
}
COUNTS["with empty ones"] = np.where(
    np.arange(D) == np.arange(STEPS)[:, None] % D, 0, COUNTS["uneven"]
)
named = population.init_population
running = functools.partial(nl.init_running, C)

AVERAGES = {
    "debiased": running,
    "from mass 1": functools.partial(running, debias=False),
    "decay 0": functools.partial(running, decay=0.0),
    "ddof 1": functools.partial(running, ddof=1),
    "from mass 1, ddof 1": functools.partial(running, debias=False, ddof=1),
    "pooled": functools.partial(running, estimator="pooled"),
    "pooled, ddof 1": functools.partial(running, estimator="pooled", ddof=1, debias=False),
    "groups": functools.partial(running, groups=2),
    "groups, ddof 1": functools.partial(running, groups=2, ddof=1),
    "groups, pooled, ddof 1": functools.partial(running, groups=2, ddof=1, estimator="pooled"),
    "float64": functools.partial(running, dtype="float64", ddof=1),
    "renorm": functools.partial(named, "renorm", C),
    "renorm, ddof 1": functools.partial(population.init_renorm, C, ddof=1, debias=False, eps=0.3),
    "frozen": functools.partial(named, "frozen", C),
    "prior": functools.partial(named, "prior", C),
    "rms": functools.partial(named, "rms", C),
    "power": functools.partial(named, "power", C),
    "domains": functools.partial(named, "domains", C),
    "streaming average": functools.partial(population.init_streaming, C, inner="ema"),
}
SUMS = {
    "cumulative": functools.partial(named, "cumulative", C),
    "cumulative, ddof 1": functools.partial(named, "cumulative", C, ddof=1),
    "within": functools.partial(named, "cumulative", C, estimator="within", ddof=1),
    "cumulative groups": functools.partial(population.init_cumulative, C, groups=2, ddof=1),
    "streaming": functools.partial(population.init_streaming, C, count=0.0),
    "domains of sums": functools.partial(population.init_domains, C, inner="cumulative"),
    "rms of sums": functools.partial(population.init_rms, C, inner="cumulative"),
    "window": functools.partial(population.init_window, C, size=3),
    "mabn": functools.partial(population.init_mabn, C, size=3),
}
KINDS = AVERAGES | SUMS


def measured(state, a, mask):
    """The moments of the valid examples of a batch `[N, C]`, as the state takes them in."""
    second = state.read()[1]
    if second.ndim > 1:
        return comoments(a, 0, groups=2, weights=mask)
    return nl.moments(a, 0, weights=mask[:, None])


def alone(start, a, mask):
    """The states of one device that sees the batches of all as one, `[STEPS, ...]`.

    One that looks at the deviations within a batch sees them one after the other.
    """
    within = isinstance(start, population.Cumulative) and start.estimator == "within"

    def step(state, given):
        if not within:
            given = (v.reshape(1, -1, *v.shape[2:]) for v in given)
        for a, mask in zip(*given, strict=True):
            state = state.update(measured(state, a, mask))
        return state, state

    return jax.lax.scan(step, start, (a, mask))[1]


def apart(start, a, mask, every, pool=population.pool_running):
    """The states of devices that are pooled every so many steps, `[STEPS, D, ...]`."""

    def device(a, mask):
        def step(carry, given):
            state, i = carry
            a, mask = given
            state = state.update(measured(state, a, mask))
            merged = pool(state, "d")
            state = jax.tree.map(lambda v, w: jnp.where(i % every == 0, v, w), merged, state)
            return (state, i + 1), state

        return jax.lax.scan(step, (start, jnp.int32(1)), (a, mask))[1]

    return jax.vmap(device, axis_name="d", in_axes=1, out_axes=1)(a, mask)


@functools.cache
def ran(kind, counts, every):
    """Both, in one program."""
    with jax.enable_x64(kind == "float64"):
        start = KINDS[kind]()
        a = array(BATCHES, start.read()[0].dtype)
        mask = (jnp.arange(N) < jnp.asarray(COUNTS[counts])[..., None]).astype(a.dtype)
        f = jax.jit(lambda start: (alone(start, a, mask), apart(start, a, mask, every)))
        return jax.tree.map(np.asarray, f(start))


def averages(state):
    """The outermost average that a state holds."""
    while hasattr(state, "inner"):
        state = state.inner
    return state


def at(states, i):
    return jax.tree.map(lambda v: v[i], states)


# A device that left a batch out still has the one before in its window.
CASES = [
    (k, c)
    for k in KINDS
    for c in COUNTS
    if (k, c[:4]) not in (("window", "with"), ("mabn", "with"))
]


@pytest.mark.parametrize(("kind", "counts"), CASES)
def test_pooled_after_every_step_they_are_one_device_that_saw_everything(kind, counts):
    whole, each = ran(kind, counts, 1)
    bound = 1e-12 if kind == "float64" else 5e-6
    for i in range(STEPS):
        for device in range(D):
            found, expected = at(at(each, i), device), at(whole, i)
            assert gap(found.read(), expected.read()) < bound, (i, device)
            found, expected = averages(found), averages(expected)
            if isinstance(expected, nl.Running):
                same = ("mass", "count", "updates")
            elif isinstance(expected, population.Cumulative):
                same = ("count",)
            else:
                same = ("updates",)
            for name in same:
                assert gap(getattr(found, name), getattr(expected, name)) < bound, (i, name)


@pytest.mark.parametrize("every", [2, 3, 6])
@pytest.mark.parametrize("kind", [*(kind for kind in SUMS if kind != "mabn"), "pooled"])
def test_what_keeps_the_variance_between_batches_is_exact_after_several_steps(kind, every):
    whole, each = ran(kind, "even", every)
    for i in range(every - 1, STEPS, every):
        for device in range(D):
            assert gap(at(at(each, i), device).read(), at(whole, i).read()) < 5e-6


@pytest.mark.parametrize("every", [2, 3, 6])
@pytest.mark.parametrize("debias", [True, False])
def test_an_average_of_variances_has_what_lies_between_the_devices_averages(debias, every):
    kind = "debiased" if debias else "from mass 1"
    whole, each = ran(kind, "even", every)
    mean, var, mass = np.zeros(C), np.ones(C), float(not debias)
    for first in range(0, STEPS, every):
        weights = 0.1 * 0.9 ** np.arange(every)[::-1]
        kept = mass * 0.9**every
        mass = kept + weights.sum()
        steps = BATCHES[first : first + every]
        own = np.tensordot(weights, steps.mean(2), 1) / weights.sum()
        within = np.tensordot(weights, steps.var(2).mean(1), 1) + weights.sum() * own.var(0)
        mean = (kept * mean + weights.sum() * own.mean(0)) / mass
        var = (kept * var + within) / mass
        found = at(at(each, first + every - 1), 1)
        assert gap(found.read(), (mean, var)) < 5e-6
        assert gap(found.mean, at(whole, first + every - 1).mean) < 5e-6
        assert gap(found.mass, mass) < 5e-6


# Two axes: the norm merges over one of them.


def over_both(f, state, a):
    """`f(state, a)` on each device of two hosts of two chips; the result of each, `[2, 2, ...]`."""
    one = jax.vmap(f, axis_name="chip", in_axes=(None, 0))
    return jax.vmap(one, axis_name="host", in_axes=(None, 0))(state, a)


def steps(a, state, axis_name, pool):
    for x in a:
        _, state = nl.batch_norm(x, None, state, train=True, axis_name=axis_name)
        state = pool(state)
    return state


HOSTS = array(BATCHES.reshape(STEPS, 2, 2, N, C)).transpose(1, 2, 0, 3, 4)


@pytest.mark.parametrize("axes", ["host", ("host", "chip")])
@pytest.mark.parametrize(
    "kind", ["debiased", "ddof 1", "from mass 1, ddof 1", "renorm", "cumulative"]
)
def test_a_norm_over_one_axis_whose_population_is_that_of_all(kind, axes):
    """Statistics of each host, and a pool every step: the population is that of all the chips."""
    start = KINDS[kind]()
    pool = functools.partial(population.pool_running, axis_name=axes)

    @jax.jit
    def both(start):
        found = over_both(lambda s, a: steps(a, s, "chip", pool), start, HOSTS)
        whole = ("host", "chip")
        return found, over_both(lambda s, a: steps(a, s, whole, lambda s: s), start, HOSTS)

    found, expected = both(start)
    assert gap(found.read(), expected.read()) < 5e-6
    if kind != "cumulative":
        assert gap(averages(found).count, averages(expected).count) < 5e-6
        assert gap(averages(found).mass, averages(expected).mass) < 5e-6


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", ["debiased", "renorm, ddof 1", "cumulative", "window", "power"])
def test_pooled_states_are_alike_in_their_types(kind, check_vma):
    """They leave shard_map as what is the same on all devices, and come in again."""
    start = KINDS[kind]()
    a = array(BATCHES).swapaxes(0, 1)

    @jax.jit
    @jax.shard_map(mesh=mesh(d=D), in_specs=(P(), P("d")), out_specs=P(), check_vma=check_vma)
    def run(state, a):
        return steps(a[0], state, None, lambda s: population.pool_running(s, "d"))

    found = run(start, a)
    mask = jnp.ones((STEPS, D, N))
    expected = at(jax.jit(lambda s: alone(s, array(BATCHES), mask))(start), -1)
    assert gap(found.read(), expected.read()) < 5e-6


def pooled(states, axes="d"):
    """The states of devices `[D, ...]`, or on two axes `[2, 2, ...]`, pooled."""
    f = functools.partial(population.pool_running, axis_name=axes)
    if axes == "d":
        return jax.vmap(f, axis_name="d")(states)
    return jax.vmap(jax.vmap(f, axis_name="chip"), axis_name="host")(states)


def everywhere(state, *sizes):
    return jax.tree.map(lambda v: jnp.broadcast_to(v, (*sizes, *jnp.shape(v))), state)


@jax.jit
def one_step(states, a):
    """The states of devices that stand in front after a batch `[..., N, C]` of each."""

    def one(state, a):
        return state.update(nl.moments(a, 0))

    for _ in a.shape[:-2]:
        one = jax.vmap(one)
    return one(states, a)


BOTH = ("host", "chip")


def test_averages_that_never_were_alike_keep_what_lies_between_them_once():
    """Chips are pooled every step, hosts at the end alone: it is not multiplied by 1/ρ."""
    states = everywhere(nl.init_running(C), 2, 2)
    for i in range(3):
        states = pooled(one_step(states, HOSTS[:, :, i]), "chip")
    expected = states.mean[:, 0].mean(0), states.var[:, 0].mean(0) + states.mean[:, 0].var(0)
    for after in (pooled(states, BOTH), pooled(states, "host")):
        assert gap(at(at(after, 0), 1).read(), expected) < 5e-6
    # And a step later, when every device has seen something that is new.
    later = pooled(one_step(states, HOSTS[:, :, 3]), BOTH)
    mean, var = one_step(states, HOSTS[:, :, 3]).read()
    expected = mean.mean((0, 1)), var.mean((0, 1)) + mean.var((0, 1))
    assert gap(at(at(later, 0), 0).read(), expected) < 5e-6


@pytest.mark.parametrize("kind", ["cumulative", "cumulative, ddof 1", "window"])
@pytest.mark.parametrize("ways", [("chip", "host"), ("host", "chip"), (BOTH, BOTH), ("chip", BOTH)])
def test_sums_are_pooled_along_one_axis_after_the_other_or_twice(kind, ways):
    states, whole = everywhere(KINDS[kind](), 2, 2), KINDS[kind]()
    for i in range(3):
        states = one_step(states, HOSTS[:, :, i])
        for axes in ways:
            states = pooled(states, axes)
        whole = whole.update(nl.moments(HOSTS[:, :, i].reshape(-1, C), 0))
        found = at(at(states, 1), 0)
        assert gap(found.read(), whole.read()) < 5e-6
        if kind != "window":
            assert gap(found.count, whole.count) < 5e-6
            assert found.updates == 4 * (i + 1)


@pytest.mark.parametrize("kind", ["cumulative", "debiased", "window", "mabn"])
def test_what_took_no_batch_in_is_pooled_to_itself(kind):
    """A layer that was left out of some steps, a domain without a batch."""
    states = pooled(one_step(everywhere(KINDS[kind](), D), array(BATCHES[0])))
    again = pooled(pooled(states))
    assert gap(again.read(), states.read()) < 1e-6
    for name in {"count", "updates", "mass"} & {*states._fields}:
        assert gap(getattr(again, name), getattr(states, name)) < 1e-6
    # Where some devices took a batch in and others none.
    some = one_step(again, array(BATCHES[1]))
    some = jax.tree.map(lambda v, w: jnp.concatenate([v[:2], w[2:]]), some, again)
    found, batch = at(pooled(some), 0), nl.moments(array(BATCHES[1][:2].reshape(-1, C)), 0)
    if kind in ("cumulative", "debiased"):
        one = KINDS[kind]().update(nl.moments(array(BATCHES[0].reshape(-1, C)), 0)).update(batch)
        assert gap(found.read(), one.read()) < 5e-6


@pytest.mark.parametrize("kind", ["debiased", "from mass 1, ddof 1", "renorm, ddof 1"])
@pytest.mark.parametrize("decays", [(0.5, 0.9, 0.0, 0.99), (0.9, 1.0, 1.0, 0.5)])
def test_with_a_decay_that_changes(kind, decays):
    def taken(state, m, decay):
        held = averages(state)
        new = held.update(m, decay=decay)
        return state._replace(inner=new) if hasattr(state, "inner") else new

    @jax.jit
    def run(start, a, decays):
        def device(a):
            state = start
            for x, decay in zip(a, decays, strict=True):
                state = population.pool_running(taken(state, nl.moments(x, 0), decay), "d")
            return state

        whole = start
        for x, decay in zip(a, decays, strict=True):
            whole = taken(whole, nl.moments(x.reshape(-1, C), 0), decay)
        return jax.vmap(device, axis_name="d", in_axes=1)(a), whole

    found, whole = run(KINDS[kind](), array(BATCHES[: len(decays)]), array(decays))
    assert gap(at(found, 2).read(), whole.read()) < 5e-6
    assert gap(averages(at(found, 2)).mass, averages(whole).mass) < 5e-6


@pytest.mark.parametrize(
    "kind", ["debiased", "ddof 1", "cumulative", "within", "streaming", "window"]
)
def test_stacked_states_are_pooled_each_for_itself(kind):
    """Seeds in front, as in a trainer."""
    start = everywhere(KINDS[kind](), D, 3)
    a = array(BATCHES[:3])  # steps, devices
    seeds = jnp.stack([a, 2 * a + 1, -a], 2)
    states = start
    for x in seeds:
        states = pooled(one_step(states, x))
    for i in range(3):
        alone_ = everywhere(KINDS[kind](), D)
        for x in seeds[:, :, i]:
            alone_ = pooled(one_step(alone_, x))
        assert gap(at(jax.tree.map(lambda v: v[:, i], states), 1), at(alone_, 1)) < 1e-6  # noqa: B023


def test_each_domain_is_pooled_for_itself_where_devices_see_others():
    """Device 0 sees domain 0, all others domain 1."""
    for inner in ("debiased", "cumulative"):
        start = everywhere(population.init_domains(C, inner=inner), D)
        states = start._replace(current=jnp.minimum(jnp.arange(D), 1))
        for x in array(BATCHES):
            states = pooled(one_step(states, x))._replace(current=states.current)
        for domain, rows in enumerate((slice(0, 1), slice(1, None))):
            whole = population.init_population(inner, C)
            for x in BATCHES[:, rows]:
                whole = whole.update(nl.moments(array(x.reshape(-1, C)), 0))
            found = at(at(states, 0).inner, domain)
            assert gap(found.read(), whole.read()) < 5e-6
            assert gap(found.count, whole.count) < 5e-6


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("kind", ["debiased", "ddof 1", "renorm", "cumulative, ddof 1", "rms"])
def test_a_transaction_that_is_pooled_before_it_is_committed(kind, twice):
    """Also after each of its microbatches."""

    @jax.jit
    def run(start):
        def device(a):
            state = start
            for step in a.reshape(3, 2, N, C):
                state = population.begin(state)
                for x in step:
                    state = jax.tree.map(
                        lambda s, x=x: s.update(nl.moments(x, 0)) if is_pending(s) else s,
                        state,
                        is_leaf=is_pending,
                    )
                    state = population.pool_running(state, "d") if twice else state
                state = population.commit(population.pool_running(state, "d"))
            return state

        def is_pending(leaf):
            return isinstance(leaf, population.Pending)

        whole = start
        for step in array(BATCHES).reshape(3, 2 * D * N, C):
            whole = population.begin(whole)
            whole = jax.tree.map(
                lambda s, x=step: s.update(nl.moments(x, 0)) if is_pending(s) else s,
                whole,
                is_leaf=is_pending,
            )
            whole = population.commit(whole)
        return jax.vmap(device, axis_name="d")(array(BATCHES).swapaxes(0, 1)), whole

    found, whole = run(KINDS[kind]() if kind != "rms" else nl.init_running(C, decay=0.5))
    assert gap(at(found, 3).read(), whole.read()) < 5e-6
    assert gap(averages(at(found, 3)).count, averages(whole).count) < 5e-6


@pytest.mark.parametrize("kind", ["debiased", "ddof 1", "renorm", "cumulative", "window"])
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_merged_states_go_on_on_another_number_of_devices(kind, devices):
    states = pooled(one_step(everywhere(KINDS[kind](), D), array(BATCHES[0])))
    merged = population.merge_running(one_step(states, array(BATCHES[1])))
    own = everywhere(population.share_running(merged, devices), devices)
    found = pooled(one_step(own, array(BATCHES[2, :devices])))
    whole = KINDS[kind]()
    for batch in (BATCHES[0], BATCHES[1], BATCHES[2, :devices]):
        whole = whole.update(nl.moments(array(batch.reshape(-1, C)), 0))
    if kind != "window":  # which knows the mean count alone
        assert gap(at(found, 0).read(), whole.read()) < 5e-6
    assert gap(merged.read(), at(pooled(one_step(states, array(BATCHES[1]))), 0).read()) < 5e-6


def test_a_device_that_holds_nan_spoils_the_others_unless_it_weighs_nothing():
    states = one_step(everywhere(nl.init_running(C), D), array(BATCHES[0]))
    bad = nl.init_running(C).update(nl.moments(jnp.full((N, C), jnp.nan), 0), bad_batch="propagate")
    spoiled = jax.tree.map(lambda v, w: v.at[1].set(w), states, bad)
    assert np.isnan(pooled(spoiled).mean).all()
    nothing = bad._replace(mass=jnp.zeros(()), fresh=jnp.zeros(4), updates=jnp.int32(0))
    found = pooled(jax.tree.map(lambda v, w: v.at[1].set(w), states, nothing))
    rows = BATCHES[0][[0, 2, 3]].reshape(-1, C)
    assert gap(at(found, 0).read(), (rows.mean(0), rows.var(0))) < 5e-6


# What it costs.


COLLECTIVE = re.compile(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(")
ARRAY = re.compile(r"[fs]32\[([\d,]*)\]")


def collectives(f, *args):
    """The kind and the number of numbers of each collective of the compiled program."""
    found = COLLECTIVE.findall(f.lower(*args).compile().as_text())
    return [
        (kind, sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in ARRAY.findall(v)))
        for v, kind in found
    ]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layers", [1, 6])
def test_all_averages_of_a_net_are_pooled_in_three_sums_and_a_maximum(layers, check_vma):
    kinds = [
        lambda c: nl.init_running(c),
        lambda c: nl.init_running(c, ddof=1, estimator="pooled"),
        lambda c: population.Frozen(nl.init_running(c)),
        lambda c: population.init_renorm(c),
        lambda c: population.init_rms(c),
        lambda c: nl.init_running(c, groups=2),
    ]
    states = {str(i): kinds[i](4 * (i + 1)) for i in range(layers)}

    @jax.jit
    @jax.shard_map(mesh=mesh(d=8), in_specs=P(), out_specs=P(), check_vma=check_vma)
    def pool(states):
        return population.pool_running(states, "d")

    found = collectives(pool, states)
    assert [kind for kind, _ in found] == ["all-reduce"] * 4
    floats = sum(
        sum(v.size for v in (s.mean, s.var)) + (s.var.size if s.sigma_eps is not None else 0)
        for s in map(averages, states.values())
    )
    assert sum(size for _, size in found) == floats + (8 + 3 + 6) * layers
