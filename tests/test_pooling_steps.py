"""Devices that measure for themselves and are pooled in between, beside one that saw everything."""

import functools

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

    One of the deviations within the batches sees them one after the other.
    """

    def step(state, given):
        if getattr(state, "estimator", None) != "within":
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


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_pooled_after_every_step_they_are_one_device_that_saw_everything(kind, counts):
    whole, each = ran(kind, counts, 1)
    bound = 1e-12 if kind == "float64" else 5e-6
    if kind in ("window", "mabn") and counts == "with empty ones":
        pytest.skip("a device that left a batch out still has the one before")
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
@pytest.mark.parametrize("kind", [*SUMS, "pooled"])
def test_what_keeps_the_variance_between_batches_is_exact_after_several_steps(kind, every):
    whole, each = ran(kind, "even", every)
    if kind == "mabn":
        pytest.skip("its average is of the variances alone")
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
