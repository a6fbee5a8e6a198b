"""One update per step, whatever it is made of; and the population from many batches."""

import functools
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import normlab as nl
from tests.helpers import MAPPERS, array, draw, environment, gap, mappers

N, C = 6, 3
MICRO = draw(0, 4, N, C) + 3 * draw(1, 4, 1, C)  # four microbatches, of different means
WHOLE = MICRO.reshape(-1, C)


def run(state, batches):
    """The state after training on the batches."""
    for batch in batches:
        _, state = nl.batch_norm(array(batch), None, state, train=True)
    return state


# Microbatches: the case of FIELD, four times over.


def test_four_microbatches_are_one_update_with_the_variance_between_them():
    """Flax updates four times, and what lies between the microbatches is lost."""
    after = nl.population.commit(run(nl.population.begin(nl.init_running(C, debias=False)), MICRO))
    whole = run(nl.init_running(C, debias=False), [WHOLE])
    assert (after.updates, after.skipped) == (1, 0)
    assert gap(after, whole._replace(count=after.count)) < 1e-6
    assert after.count == 4 * N

    module = nn.BatchNorm(use_running_average=False, momentum=0.9, use_bias=False, use_scale=False)
    stats = {"batch_stats": {"mean": jnp.zeros(C), "var": jnp.ones(C)}}
    once = module.apply(stats, array(WHOLE), mutable="batch_stats")[1]["batch_stats"]
    for batch in MICRO:
        _, stats = module.apply(stats, array(batch), mutable="batch_stats")
    flax = stats["batch_stats"]
    assert gap((after.mean, after.var), (once["mean"], once["var"])) < 1e-6
    within = 0.9**4 + (1 - 0.9**4) * MICRO.var(1).max(0)  # the most that four updates can keep
    assert (np.asarray(flax["var"]) <= within * (1 + 1e-6)).all()
    assert gap(flax["mean"], once["mean"]) > 0.5


@pytest.mark.parametrize("population", ["debiased", "cumulative", "renorm", "domains"])
def test_a_transaction_is_the_whole_batch_in_every_population(population):
    start = nl.population.init_population(population, C)
    after = nl.population.commit(run(nl.population.begin(start), MICRO))
    whole = run(start, [WHOLE])
    assert jax.tree.structure(after) == jax.tree.structure(start)
    assert gap(after.read(), whole.read()) < 2e-6
    updates = after.inner if population == "renorm" else getattr(after, "inner", after)
    assert updates.updates.max() == 1


def test_statistics_stay_until_commit():
    start = run(nl.init_running(C), [WHOLE * 2])
    pending = run(nl.population.begin(start), MICRO)
    assert gap(pending.read(), start.read()) == 0
    assert gap(pending.inner, start) == 0
    assert nl.population.begin(pending) is pending


def test_a_scan_of_microbatches_under_remat_is_one_update():
    """The replay of `jax.checkpoint` for the gradient counts for nothing."""
    w = array(draw(2, C, C))

    def loss(w, state):
        @jax.checkpoint
        def micro(state, x):
            h, state = nl.batch_norm(jnp.tanh(x @ w), None, state, train=True)
            return state, (h**3).sum()

        state, losses = lax.scan(micro, nl.population.begin(state), array(MICRO))
        return losses.sum(), nl.population.commit(state)

    (_, after), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(w, nl.init_running(C))
    whole = np.tanh(WHOLE @ np.asarray(w, np.float64))
    assert after.updates == 1
    assert gap(after.read(), (whole.mean(0), whole.var(0))) < 5e-6


def test_a_shared_layer_that_is_called_twice_takes_one_update():
    a, b = MICRO[0], MICRO[1] * 2

    def step(state):
        _, state = nl.batch_norm(array(a), None, state, train=True)
        return nl.batch_norm(array(b), None, state, train=True)[1]

    after = nl.population.commit(step(nl.population.begin(nl.init_running(C))))
    both = np.concatenate([a, b])
    assert after.updates == 1
    assert gap(after.read(), (both.mean(0), both.var(0))) < 2e-6
    assert step(nl.init_running(C)).updates == 2


# What may not count.


@pytest.mark.parametrize("ok", [False, jnp.array(False)])
def test_a_step_that_is_not_ok_changes_nothing_and_is_counted(ok):
    start = run(nl.init_running(C), [WHOLE * 2])
    after = nl.population.commit(run(nl.population.begin(start), MICRO), ok)
    assert gap(after, start._replace(skipped=jnp.int32(1))) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_one_microbatch_that_is_not_finite_spoils_the_step(value):
    start = run(nl.init_running(C), [WHOLE * 2])
    bad = MICRO.copy()
    bad[2, 1, 0] = value
    after = nl.population.commit(run(nl.population.begin(start), bad))
    assert gap(after, start._replace(skipped=jnp.int32(1))) == 0
    again = nl.population.commit(run(nl.population.begin(after), MICRO))
    assert gap(again.mean, nl.population.commit(run(nl.population.begin(start), MICRO)).mean) == 0


def test_a_masked_microbatch_counts_for_nothing():
    state = nl.population.begin(nl.init_running(C))
    state = run(state, MICRO[:2])
    _, state = nl.batch_norm(array(MICRO[2]), None, state, train=True, weights=jnp.zeros(N))
    after, rest = nl.population.commit(state), MICRO[:2].reshape(-1, C)
    assert (after.updates, after.skipped) == (1, 0)
    assert gap(after.read(), (rest.mean(0), rest.var(0))) < 2e-6


def test_a_step_counts_for_every_norm_or_for_none():
    pending = nl.population.begin({"a": nl.init_running(C), "b": nl.init_running(C)})
    pending["a"] = run(pending["a"], MICRO)
    pending["b"] = run(pending["b"], [MICRO[0] * np.nan])
    after = nl.population.commit(pending)
    assert [(s.updates, s.skipped) for s in after.values()] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("bad_batch", ["propagate", "raise"])
def test_a_step_that_is_not_ok_is_no_bad_batch(bad_batch):
    start = run(nl.init_running(C), [WHOLE * 2])
    pending = run(nl.population.begin(start), MICRO)
    after = nl.population.commit(pending, False, bad_batch=bad_batch)
    assert gap(after, start._replace(skipped=jnp.int32(1))) == 0
    good = nl.population.commit(pending, bad_batch=bad_batch)
    assert gap(good, nl.population.commit(pending)) < 1e-6
    broken = run(pending, [MICRO[0] * np.nan])
    if bad_batch == "propagate":
        assert np.isnan(nl.population.commit(broken, bad_batch=bad_batch).mean).all()
    else:

        def ended():
            jax.block_until_ready(nl.population.commit(broken, bad_batch=bad_batch))
            jax.effects_barrier()

        with pytest.raises((FloatingPointError, jax.errors.JaxRuntimeError), match="NaN"):
            ended()


@pytest.mark.parametrize("beside", ["nothing", "domains", "layers", "frozen"])
@pytest.mark.parametrize("where", ["norm", "beside"])
def test_a_step_that_is_spoiled_is_that_of_one_seed_whatever_else_is_in_the_tree(beside, where):
    """Seeds are stacked; a norm beside has domains too, or is stacked over layers."""
    others = {
        "domains": nl.population.init_domains(C),
        "layers": stacked(nl.init_running(C), 2),
        "frozen": nl.population.freeze(nl.init_running(C)),
    }
    start = {"norm": nl.init_running(C)}
    start |= {} if beside == "nothing" else {"beside": others[beside]}
    bad = {name: np.array([1, 1 if name != where else np.nan, 1])[:, None, None] for name in start}

    def one(states, factors):
        new = dict(states)
        for name, factor in factors.items():
            a = array(MICRO[0]) * factor
            call = lambda s, a=a: nl.batch_norm(a, None, s, train=True)[1]  # noqa: E731
            call = jax.vmap(call) if (beside, name) == ("layers", "beside") else call
            new[name] = call(states[name])
        return new

    start = stacked(start, 3)
    pending = jax.vmap(one)(nl.population.begin(start), jax.tree.map(array, bad))
    after = nl.population.commit(pending)
    assert jax.tree.structure(after) == jax.tree.structure(start)
    spoiled = [1] if where in start and not (beside == "frozen" and where == "beside") else []
    for seed in range(3):
        norm = jax.tree.map(lambda v, i=seed: v[i], after["norm"])
        expected = (0, 1) if seed in spoiled else (1, 0)
        assert (norm.updates, norm.skipped) == expected
        assert gap(norm.mean, 0 * MICRO[0].mean(0) if seed in spoiled else MICRO[0].mean(0)) < 1e-6
        if beside == "domains":
            of = jax.tree.map(lambda v, i=seed: v[i], after["beside"].inner)
            assert (of.updates.tolist(), of.skipped.tolist()) == (
                [expected[0], 0],
                [expected[1], 0],
            )
        if beside == "layers":
            assert after["beside"].updates[seed].tolist() == [expected[0]] * 2


def stacked(tree, n):
    return jax.tree.map(lambda v: jnp.stack([v] * n), tree)


def test_a_domain_that_was_not_finite_spoils_the_step_of_all():
    pending = nl.population.begin({"a": nl.population.init_domains(C), "b": nl.init_running(C)})
    pending["a"] = run(nl.population.select_domain(pending["a"], 1), [MICRO[0] * np.nan])
    pending["b"] = run(pending["b"], MICRO)
    after = nl.population.commit(pending)
    assert after["a"].inner.skipped.tolist() == [0, 1]
    assert (after["b"].updates, after["b"].skipped) == (0, 1)


@pytest.mark.parametrize("name", ["debiased", "ema", "cumulative", "renorm", "domains"])
@pytest.mark.parametrize("how", ["NaN", "masked"])
def test_a_policy_holds_for_what_was_called_and_says_why(name, how):
    """`"propagate"` makes mean and variance NaN; what was not called is nobody's fault."""
    start = nl.population.init_population(name, C)
    factor, weights = (np.nan, None) if how == "NaN" else (1, jnp.zeros(N))
    state = {"called": nl.population.begin(start), "not": nl.population.begin(start)}
    a = array(MICRO[0] * factor)
    state["called"] = nl.batch_norm(a, None, state["called"], train=True, weights=weights)[1]
    lost = nl.population.commit(state, bad_batch="propagate")
    assert np.isnan(np.stack(lost["called"].read())).all()
    assert gap(lost["not"], start) == 0
    direct = nl.batch_norm(a, None, start, train=True, weights=weights, bad_batch="propagate")[1]
    assert np.isnan(np.stack(direct.read())).all()

    def commit(ok):
        jax.block_until_ready(nl.population.commit(state, ok, bad_batch="raise"))
        jax.effects_barrier()

    says = "a NaN or an Inf" if how == "NaN" else r"0 values \(or weight\) per channel"
    for ok in (True, False):
        with pytest.raises((FloatingPointError, jax.errors.JaxRuntimeError), match=says):
            commit(ok)
    state["called"] = run(nl.population.begin(start), MICRO)
    commit(True)


def test_what_is_frozen_in_a_transaction_leaves_it():
    start = nl.init_running(C)
    pending = {"a": run(nl.population.begin(start), MICRO), "b": nl.population.begin(start)}
    after = nl.population.commit(nl.population.freeze(pending, "a"))
    assert jax.tree.structure(after["a"]) == jax.tree.structure(nl.population.Frozen(start))
    assert gap(after["a"].inner, start) == 0


def test_each_of_a_stack_may_be_ok_or_not():
    """As many seeds as channels."""
    start = jax.tree.map(lambda v: jnp.stack([v] * C), nl.init_running(C))
    train = jax.vmap(lambda a, s: nl.batch_norm(a, None, s, train=True)[1])
    pending = train(array(MICRO[:C]), nl.population.begin(start))
    after = nl.population.commit(pending, jnp.array([True, False, True]))
    assert after.updates.tolist() == [1, 0, 1]
    assert after.skipped.tolist() == [0, 1, 0]
    assert gap(after.mean[1], np.zeros(C)) == 0
    with pytest.raises(ValueError, match=r"commit: got ok of shape \(2,\)"):
        nl.population.commit(pending, jnp.array([True, False]))


@pytest.mark.parametrize(
    "make",
    [
        nl.population.init_cumulative,
        nl.population.init_delayed,
        nl.population.init_renorm,
        nl.init_running,
    ],
)
def test_a_state_can_be_donated_from_the_first_step_on(make):
    sync = nl.Sync("d", every=1) if make is nl.population.init_delayed else None
    state = nl.population.begin(make(C)) if make is nl.init_running else make(C)
    state = jax.tree.map(lambda v: v[None], state) if sync else state

    def step(state, a):
        return nl.batch_norm(a, None, state, train=True, axis_name=sync)[1]

    mapped = jax.vmap(step, axis_name="d") if sync else step
    a = array(WHOLE)[None] if sync else array(WHOLE)
    after = jax.jit(mapped, donate_argnums=0)(state, a)
    assert np.isfinite(jax.tree.leaves(after)[0]).all()


def test_a_norm_that_was_not_called_stays_as_it_was():
    states = {"used": nl.init_running(C), "not": run(nl.init_running(C), [WHOLE])}
    pending = nl.population.begin(states)
    pending["used"] = run(pending["used"], MICRO)
    after = nl.population.commit(pending)
    assert after["used"].updates == 1
    assert gap(after["not"], states["not"]) == 0
    pending = nl.population.begin(states)
    pending["used"] = run(pending["used"], MICRO)
    settled = nl.population.settle(pending)
    assert gap(settled["used"].mean, WHOLE.mean(0)) < 2e-6
    assert gap(settled["not"], states["not"]) == 0


def test_what_is_frozen_takes_no_part():
    frozen = nl.population.freeze(run(nl.init_running(C), [WHOLE]))
    states = {"frozen": frozen, "not": nl.init_running(C)}
    pending = nl.population.begin(states)
    assert isinstance(pending["frozen"], nl.population.Frozen)
    for end in (nl.population.commit, nl.population.settle):
        pending = nl.population.begin(states)
        after = end({name: run(state, MICRO) for name, state in pending.items()})
        assert gap(after["frozen"], frozen) == 0
        assert after["not"].updates > 0
    assert gap(nl.population.commit(run(nl.population.begin(frozen), MICRO)), frozen) == 0


def test_the_decay_is_the_commits():
    pending = run(nl.population.begin(nl.init_running(C, debias=False)), MICRO)
    after = nl.population.commit(pending, decay=0.5)
    assert gap(after.mean, 0.5 * WHOLE.mean(0)) < 1e-6
    with pytest.raises(ValueError, match=r"decay=0.5 within a transaction.*commit\(states, decay"):
        nl.batch_norm(
            array(WHOLE), None, nl.population.begin(nl.init_running(C)), train=True, decay=0.5
        )


def test_without_a_transaction_there_is_nothing_to_end():
    with pytest.raises(ValueError, match=r"commit: got a tree without a transaction.*begin"):
        nl.population.commit({"norm": nl.init_running(C)})
    with pytest.raises(ValueError, match=r"settle: got a tree without a transaction"):
        nl.population.settle(nl.init_running(C))
    with pytest.raises(ValueError, match=r"begin: got a tree without running statistics"):
        nl.population.begin({"norm": jnp.ones(C)})
    assert nl.population.commit(nl.population.begin({"layer norm": ()})) == {"layer norm": ()}
    with pytest.raises(ValueError, match=r"settle: got a transaction of 0 batches"):
        nl.population.settle(nl.population.begin(nl.init_running(C)))
    with pytest.raises(ValueError, match=r"estimator='pooed'.*did you mean 'pooled'"):
        nl.population.settle(nl.population.begin(nl.init_running(C)), estimator="pooed")


@pytest.mark.parametrize("mapper", MAPPERS)
def test_synced_microbatches_are_the_batch_of_all_devices(mapper):
    shards = array(draw(5, 8, 4, N, C) + 2 * draw(6, 8, 4, 1, C))

    def step(state, shard):
        def micro(state, x):
            return nl.batch_norm(x, None, state, train=True, axis_name="d")[1], None

        state, _ = lax.scan(micro, nl.population.begin(state), shard)
        return nl.population.commit(state)

    after = mappers()[mapper](step)(nl.init_running(C), shards)
    whole = np.asarray(shards, np.float64).reshape(-1, C)
    assert (np.asarray(after.updates) == 1).all()
    for d in range(8):
        assert gap((after.mean[d], after.var[d]), (whole.mean(0), whole.var(0))) < 5e-6


def test_a_transaction_of_stacked_states_commits_each():
    """States `[seeds, ...]` outside their vmap."""
    start = jax.tree.map(lambda v: jnp.stack([v, v]), nl.init_running(C))
    train = jax.vmap(lambda a, s: nl.batch_norm(a, None, s, train=True)[1])
    pending = nl.population.begin(start)
    for i in (0, 2):
        pending = train(array(MICRO[i : i + 2]), pending)
    after = nl.population.commit(pending)
    assert jax.tree.structure(after) == jax.tree.structure(start)
    for i in range(2):
        seen = MICRO[[i, i + 2]].reshape(-1, C)
        assert gap((after.mean[i], after.var[i]), (seen.mean(0), seen.var(0))) < 2e-6


# PreciseBN.


def forward(params, states, x):
    """Two layers with batch norm."""
    h, first = nl.batch_norm(x @ params[0], None, states["first"], train=True)
    _, second = nl.batch_norm(jnp.tanh(h) @ params[1], None, states["second"], train=True)
    return {"first": first, "second": second}


@pytest.mark.parametrize("averaged", [False, True])
def test_precise_statistics_weigh_batches_by_their_count(averaged):
    """facebookresearch/fvcore#152 weighs batches of 6, 6 and 2 alike. Also on averaged weights."""
    params = [array(draw(3, C, C)), array(draw(4, C, C))]
    if averaged:
        params = optax.incremental_update([p * 3 for p in params], params, 0.25)
    states = {"first": run(nl.init_running(C), [WHOLE * 9]), "second": nl.init_running(C)}
    batches = [MICRO[0], MICRO[1], MICRO[2, :2]]
    after = nl.population.precise(functools.partial(forward, params), states, map(array, batches))
    a = np.concatenate([b @ np.asarray(params[0], np.float64) for b in batches])
    assert gap(after["first"].read(), (a.mean(0), a.var(0))) < 5e-6
    assert after["first"].mass == 1
    assert after["first"].updates == 3
    assert jax.tree.structure(after) == jax.tree.structure(states)
    means = np.stack([(b @ np.asarray(params[0])).mean(0) for b in batches])
    assert gap(means.mean(0), a.mean(0)) > 0.02  # what equal weights would give


@pytest.mark.parametrize("ddof", [0, 1])
def test_precise_has_both_published_estimators(ddof):
    state = run(nl.population.begin(nl.init_running(C, ddof=ddof)), MICRO)
    pooled, within = nl.population.settle(state), nl.population.settle(state, estimator="within")
    assert gap(pooled.var, WHOLE.var(0, ddof=ddof)) < 2e-6
    assert gap(within.var, MICRO.var(1, ddof=ddof).mean(0)) < 2e-6
    assert gap(within.mean, WHOLE.mean(0)) < 2e-6


def test_what_is_cumulative_names_its_estimator():
    state = run(
        nl.population.begin(nl.population.init_cumulative(C, ddof=1, estimator="within")), MICRO
    )
    assert gap(nl.population.settle(state).read()[1], MICRO.var(1, ddof=1).mean(0)) < 2e-6
    with pytest.raises(ValueError, match=r"estimator='pooled' for statistics with 'within'"):
        nl.population.settle(state, estimator="pooled")


def test_precise_leaves_a_bad_batch_out_and_counts_it():
    bad = MICRO[1] * np.nan
    state = nl.population.settle(
        run(nl.population.begin(nl.init_running(C)), [MICRO[0], bad, MICRO[2]])
    )
    rest = MICRO[[0, 2]].reshape(-1, C)
    assert gap(state.read(), (rest.mean(0), rest.var(0))) < 2e-6
    assert (state.updates, state.skipped) == (2, 1)


@pytest.mark.parametrize("mapper", MAPPERS)
def test_precise_over_devices_is_all_their_batches(mapper):
    shards = array(draw(5, 8, 2, N, C) + 2 * draw(6, 8, 2, 1, C))
    masks = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 2, N)), jnp.float32)

    def measure(state, sharded):
        state = nl.population.begin(state)
        for x, mask in zip(*sharded, strict=True):
            _, state = nl.batch_norm(x, None, state, train=True, weights=mask)
        return nl.population.settle(nl.population.pool_running(state, "d"))

    after = mappers()[mapper](measure)(nl.init_running(C), (shards, masks))
    whole = np.asarray(shards, np.float64)[np.asarray(masks) > 0]
    for d in range(8):
        assert gap((after.mean[d], after.var[d]), (whole.mean(0), whole.var(0))) < 5e-6


WORKER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import normlab as nl

process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, initialization_timeout=60)
a = np.random.default_rng(0).normal(size=(4, 3, 5, 2)).astype(np.float32)
a += np.arange(4)[:, None, None, None]
mesh = Mesh(jax.devices(), ("d",))
rows = jax.make_array_from_callback(a.shape, NamedSharding(mesh, P("d")), a.__getitem__)

@jax.jit
@jax.shard_map(mesh=mesh, in_specs=P("d"), out_specs=P())
def measure(rows):
    state = nl.population.begin(nl.init_running(2))
    for batch in rows[0]:
        _, state = nl.batch_norm(batch, None, state, train=True)
    return nl.population.settle(nl.population.pool_running(state, "d"))

state = jax.tree.map(np.asarray, measure(rows))
whole = a.astype(np.float64).reshape(-1, 2)
np.testing.assert_allclose(state.mean, whole.mean(0), rtol=1e-5)
np.testing.assert_allclose(state.var, whole.var(0), rtol=1e-5)
assert state.updates == 12
"""


@pytest.mark.parametrize("kind", ["debiased", "ema", "cumulative", "renorm", "pending", "delayed"])
def test_stacked_states_are_pooled_each_by_itself(kind):
    """As many in the stack as channels, so that a wrong alignment would not show as an error."""
    inits = {
        "pending": lambda: nl.population.begin(nl.init_running(C)),
        "delayed": lambda: nl.population.init_delayed(C),
    }
    start = inits.get(kind, functools.partial(nl.population.init_population, kind, C))()
    sync = nl.Sync("d", every=1) if kind == "delayed" else None
    a = array(draw(0, 4, C, N, C) + 2 * draw(1, 4, C, 1, C))  # four devices, C states on each

    def own(a):
        return nl.batch_norm(a, None, start, train=True, axis_name=sync)[1]

    states = jax.vmap(jax.vmap(own), axis_name="d")(a)
    stacked = nl.population.merge_running(states)
    for t in range(C):
        alone = nl.population.merge_running(jax.tree.map(lambda v, t=t: v[:, t], states))
        assert gap(jax.tree.map(lambda v, t=t: v[t], stacked), alone) < 1e-6


def test_precise_over_processes_is_all_their_batches():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(process), port],
            env=environment(PYTHONPATH=str(Path(nl.__file__).parents[1])),
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors


def test_precise_without_batches_is_an_error():
    with pytest.raises(ValueError, match=r"settle: got a transaction of 0 batches"):
        nl.population.precise(lambda states, _: states, {"norm": nl.init_running(C)}, [])
