"""How far devices are apart, and how their statistics become one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab import instruments
from tests.helpers import MAPPERS, array, draw, gap, mappers

D, N, C = 8, 4, 3


def values():
    return draw(0, D, N, C, scale=2.0) + 3 * draw(1, D, 1, C)


def expected(x):
    whole, parts = x.reshape(-1, C), x
    var = whole.var(0)
    return instruments.Drift(
        mean=whole.mean(0),
        within=parts.var(1).mean(0),
        between=parts.mean(1).var(0),
        shift=(parts.mean(1) - whole.mean(0)) / np.sqrt(var),
        ratio=parts.var(1) / var,
    )


def test_the_variance_splits_in_within_and_between():
    x = values()
    found = instruments.drift(jax.vmap(lambda v: nl.moments(v, 0))(array(x)))
    assert gap(found, expected(x)) < 5e-6
    assert gap(found.within + found.between, x.reshape(-1, C).var(0)) < 5e-6
    assert gap(found.share, found.between / (found.within + found.between)) < 1e-6


@pytest.mark.parametrize("mapper", MAPPERS)
def test_devices_report_what_the_stack_of_them_does(mapper):
    x = values()
    found = mappers()[mapper](lambda _, v: instruments.drift(nl.moments(v, 0), "d"))((), array(x))
    for one in range(D):
        assert gap(jax.tree.map(lambda v, i=one: v[i], found), expected(x)) < 5e-6


def states(x):
    """The running statistics of devices that saw one batch each, on their own."""

    def one(v):
        return nl.batch_norm(v, None, nl.init_running(C), train=True)[1]

    return jax.vmap(one)(array(x))


def test_running_statistics_drift_as_the_batches_they_saw():
    x = values()
    assert gap(instruments.drift(states(x)), expected(x)) < 5e-6


def test_any_population_drifts_as_what_it_reads():
    x = values()
    frozen = nl.population.freeze(states(x))
    assert gap(instruments.drift(frozen), expected(x)) < 5e-6
    found = mappers()["pmap"](lambda _, state: instruments.drift(state, "d"))((), frozen)
    assert gap(jax.tree.map(lambda v: v[0], found), expected(x)) < 5e-6


def test_a_device_that_saw_nothing_weighs_nothing():
    x = values()
    seen = states(x)
    stack = jax.tree.map(lambda v, new: jnp.stack([*v, new]), seen, nl.init_running(C))
    found = instruments.drift(stack)
    assert gap(found[:3], expected(x)[:3]) < 5e-6


def test_merged_statistics_are_those_of_one_device_and_averages_are_not():
    x = values()
    merged = nl.population.merge_running(states(x))
    whole = x.reshape(-1, C)
    assert gap((merged.mean, merged.var), (whole.mean(0), whole.var(0))) < 5e-6
    assert gap(np.asarray(states(x).var).mean(0), whole.var(0)) > 0.3
    assert jax.tree.structure(merged) == jax.tree.structure(nl.init_running(C))
    for new, old in zip(*map(jax.tree.leaves, (merged, nl.init_running(C))), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_checkpoint_of_eight_devices_restores_on_another_number(devices):
    """Nothing is dropped: merged, spread over the new devices, and merged again, it is the same."""
    merged = nl.population.merge_running(states(values()))
    spread = jax.tree.map(lambda v: jnp.stack([v] * devices), merged)
    assert gap(nl.population.merge_running(spread), merged) < 1e-6


def test_statistics_without_devices_are_an_error():
    with pytest.raises(ValueError, match=r"drift: got statistics of shape \(3,\)"):
        instruments.drift(nl.init_running(C))
    with pytest.raises(ValueError, match=r"merge running: got an array of shape \(\).*stack"):
        nl.population.merge_running(nl.init_running(C))
    with pytest.raises(ValueError, match="drift: got axis_name='d'"):
        instruments.drift(nl.init_running(C), "d")
