"""What devices, or clients of federated averaging, kept apart is merged by what each has seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from tests.helpers import array, draw, gap, mappers

C = 3
SIZES = (1000, 10, 0)  # the last has seen nothing
CLIENTS = [draw(i, n, C) + 10 * i for i, n in enumerate(SIZES)]
WHOLE = np.concatenate(CLIENTS)
STATES = {
    name: functools.partial(nl.population.init_population, name, C)
    for name in ("debiased", "ema", "cumulative", "renorm", "domains")
} | {
    "domains by example": functools.partial(nl.population.init_domains, C, examples=4),
    "delayed": functools.partial(nl.population.init_delayed, C),
    "pending": lambda: nl.population.begin(nl.init_running(C)),
    "float64": functools.partial(nl.init_running, C, dtype="float64"),
}


@pytest.fixture(params=STATES)
def kind(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def taken(state, *batches):
    """The state after batches of these values, of any sizes; one without values is not taken."""
    for a in batches:
        m = nl.moments(jnp.asarray(a, state.read()[0].dtype), 0)
        if isinstance(state, nl.population.Domains) and state.current.ndim:
            # All of it is of domain 0.
            first = jnp.arange(state.domains)[:, None, None] == 0
            m = jax.tree.map(lambda f: jnp.where(first, f, 0), m)  # noqa: B023
        state = state.update(m) if len(a) else state
    return state


def stack(*states):
    return jax.tree.map(lambda *v: jnp.stack(v), *states)


def read(state):
    """Mean and variance `[C]`, of a transaction those of what it saw."""
    state = nl.population.settle(state) if isinstance(state, nl.population.Pending) else state
    mean, var = state.read()
    return (mean[0], var[0]) if mean.ndim == 2 else (mean, var)


def whole(kind):
    rate = 0.1 if kind == "ema" else 1
    return rate * WHOLE.mean(0), 1 - rate + rate * WHOLE.var(0)


def without_history(state):
    """The statistics, less what tells how to merge them."""
    average = lambda v: isinstance(v, nl.Running)  # noqa: E731
    return jax.tree.map(
        lambda v: v._replace(fresh=jnp.zeros_like(v.fresh), before=None) if average(v) else v,
        state,
        is_leaf=average,
    )


def test_what_was_kept_apart_is_merged_by_what_was_counted(kind):
    start = STATES[kind]()
    states = stack(*(taken(start, a) for a in CLIENTS))
    merged = nl.population.merge_running(states)
    assert jax.tree.structure(merged) == jax.tree.structure(start)
    for new, old in zip(*map(jax.tree.leaves, (merged, start)), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert gap(read(merged), whole(kind)) < 5e-6
    # Also of stacked seeds, as many as channels.
    seeds = jax.tree.map(lambda v: jnp.stack([v] * C, 1), states)
    for new, old in zip(
        *map(jax.tree.leaves, (nl.population.merge_running(seeds), merged)), strict=True
    ):
        assert gap(new, np.stack([old] * C)) < 1e-6


def test_equal_states_are_merged_to_themselves(kind):
    """What is counted adds up, and is shared out again."""
    state = taken(STATES[kind](), *CLIENTS[:2], CLIENTS[0] + 3, CLIENTS[1] * np.nan)
    if kind == "delayed":
        state = nl.population.merge_running(stack(state))  # what others measured is asked for anew
    merged = nl.population.merge_running(stack(*[state] * 4))
    assert gap(merged.read(), state.read()) < 1e-6
    if kind not in ("cumulative", "pending"):
        assert gap(*map(without_history, (merged, state))) < 1e-6
    shared = nl.population.share_running(state, 4)
    merged = nl.population.merge_running(stack(*[shared] * 4))
    assert gap(*map(without_history, (merged, state))) < 1e-6


@pytest.mark.parametrize("devices", [1, 2, 3, 7])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("estimator", ["pooled", "within"])
def test_a_share_of_a_state_for_each_device_is_the_state(devices, ddof, estimator):
    state = nl.population.init_cumulative(C, ddof=ddof, estimator=estimator)
    state = taken(state, *CLIENTS[:2], CLIENTS[0][:5], CLIENTS[1] * np.nan)
    shared = nl.population.share_running(state, devices)
    if estimator == "within" or not ddof:  # pooled, each loses the one degree of freedom
        assert gap(shared.read(), state.read()) < 1e-6
    assert shared.updates.dtype == jnp.int32
    merged = nl.population.merge_running(stack(*[shared] * devices))
    assert gap(merged, state) < 1e-6
    assert (merged.updates, merged.skipped) == (3, 1)
    # A device that goes on counts its own batches whole.
    on = nl.population.merge_running(stack(*[taken(shared, CLIENTS[1])] * devices))
    assert on.updates == 3 + devices


@pytest.mark.parametrize("kind", ["debiased", "ema", "renorm", "domains"])
def test_a_merged_average_moves_on(kind):
    """At the rate of the devices, and that of one which has seen little is no hindrance."""
    start = STATES[kind]()
    much = taken(start, *[CLIENTS[0]] * 60)
    merged = nl.population.merge_running(stack(much, taken(start, CLIENTS[1]), start))
    before = read(merged)[0]
    moved = read(taken(merged, CLIENTS[0] + 7))[0] - before
    assert gap(moved, 0.1 * (CLIENTS[0].mean(0) + 7 - np.asarray(before))) < 2e-3


def test_uneven_masks_are_merged_as_they_are_synced():
    """Devices whose valid examples are few or many, the same ones in every step."""
    a = array(draw(0, 4, 8, 16, C) + draw(1, 8, 1, C))  # steps, devices
    mask = jnp.arange(16) < jnp.array([16, 2, 3, 0, 7, 16, 5, 4])[:, None]

    def train(state, sharded, axis_name=None):
        a, mask = sharded
        for x in a:
            kept = {"weights": mask, "axis_name": axis_name}
            _, state = nl.batch_norm(x, None, state, train=True, **kept)
        return nl.population.pool_running(state, "d") if axis_name is None else state

    shards = (a.swapaxes(0, 1), mask)
    run = mappers()["shard_map"]
    start = nl.init_running(C)
    pooled = run(train)(start, shards)
    synced = run(functools.partial(train, axis_name="d"))(start, shards)
    assert gap(pooled.mean, synced.mean) < 5e-6
    assert gap(pooled.mass, synced.mass) < 1e-6


def test_where_no_count_is_known_all_weigh_as_much_as_their_mass():
    """Averages from elsewhere: torch counts updates, Flax does not."""
    means = array([[0.0] * C, [3.0] * C])
    for updates in (0, 5):
        states = stack(*[nl.init_running(C, debias=False)] * 2)
        states = states._replace(mean=means, updates=jnp.full(2, updates))
        merged = nl.population.merge_running(states)
        assert gap(merged.mean, np.full(C, 1.5)) < 1e-6
        assert (merged.count, merged.mass) == (0, 1)
    # One that does not know its count is taken to have batches like the others'.
    states = states._replace(count=jnp.array([0.0, 30.0]))
    assert gap(nl.population.merge_running(states).mean, np.full(C, 1.5)) < 1e-6
    assert nl.population.merge_running(states).count == 30
