"""What batch norm can keep, and what it does in training with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import normlab as nl
from tests.helpers import MAPPERS, array, draw, gap, mappers, mesh

N, C, D = 8, 3, 4
BATCHES = draw(0, 5, N, C, mean=2.0, scale=3.0) + draw(1, 5, 1, C)
POPULATIONS = ("debiased", "ema", "cumulative", "renorm", "domains", "frozen", "batch")
POPULATIONS += ("prior", "streaming", "window", "rms", "power", "mabn")
ABOUT_ZERO = ("rms", "power", "mabn")


def train(state, batches, **options):
    """The outputs and the state after some batches."""
    outputs = []
    for batch in batches:
        h, state = nl.batch_norm(array(batch), None, state, train=True, **options)
        outputs.append(h)
    return outputs, state


# One protocol.


@pytest.mark.parametrize("name", POPULATIONS)
def test_any_population_stands_behind_batch_norm_by_name(name):
    norm = nl.get("batch", population=name)
    site = nl.Site(array(BATCHES[0]))
    params, state = norm.init(site)
    step = jax.jit(functools.partial(norm.apply, train=True))
    _, after = step(params, state, site)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(*map(jax.tree.leaves, (after, state)), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    h, same = norm.apply(params, after, site, train=False)
    assert gap(jax.tree.leaves(same), jax.tree.leaves(after)) == 0
    assert h.shape == (N, C)
    assert np.isfinite(h).all()
    assert (name == "batch") == (state == ())
    assert (state == ()) or isinstance(state, nl.population.Population)


@pytest.mark.parametrize("name", [n for n in POPULATIONS if n not in ("batch", "prior")])
def test_inference_normalizes_by_what_is_read(name):
    _, state = train(nl.population.init_population(name, C), BATCHES[:3])
    mean, var = state.read()
    h, _ = nl.batch_norm(array(BATCHES[3]), None, state, train=False, eps=0.1)
    assert gap(h, (BATCHES[3] - mean) / np.sqrt(np.asarray(var) + 0.1)) < 2e-6


@pytest.mark.parametrize("name", [n for n in POPULATIONS if n != "batch"])
@pytest.mark.parametrize("mapper", ["vmap", "shard_map"])
def test_what_devices_kept_apart_is_pooled(name, mapper):
    """Equal batches on every device, so that every kind has one answer: the whole."""
    shards = array(np.stack([BATCHES[0] + 3 * i for i in range(8)]))
    state = nl.population.init_population(name, C)

    def run(state, a):
        _, own = nl.batch_norm(a, None, state, train=True)
        return nl.population.pool_running(own, "d")

    pooled = mappers()[mapper](run)(state, shards)
    whole = np.asarray(shards, np.float64).reshape(-1, C)
    pooled = jax.tree.map(lambda v: v[0], pooled)
    assert jax.tree.structure(pooled) == jax.tree.structure(state)
    mean, var = pooled.read()
    if name == "frozen":
        expected = np.zeros(C), np.ones(C)
    elif name == "ema":
        expected = 0.1 * whole.mean(0), 0.9 + 0.1 * whole.var(0)
    elif name in ABOUT_ZERO:
        expected = np.zeros(C), (whole**2).mean(0)
    else:
        expected = whole.mean(0), whole.var(0)
    assert gap((mean, var), expected) < (5e-6 if name != "streaming" else 5e-5)  # its 1e-4 values
    stacked = mappers()[mapper](lambda s, a: nl.batch_norm(a, None, s, train=True)[1])(
        state, shards
    )
    pooled = nl.population.share_running(pooled, 1)  # it lies on no other device
    assert gap(nl.population.merge_running(stacked), pooled) < 2e-6


@pytest.mark.parametrize("name", [n for n in POPULATIONS if n not in ("batch", "frozen")])
@pytest.mark.parametrize("transaction", [False, True])
def test_the_states_gradient_is_cut_unless_it_is_asked_for(name, transaction):
    exact = {"count": 0.0} if name == "streaming" else {}
    start = nl.population.init_population(name, C, **exact)

    def ours(a, **options):
        state = nl.population.begin(start) if transaction else start
        _, state = nl.batch_norm(a, None, state, train=True, **options)
        mean, var = (nl.population.commit(state) if transaction else state).read()
        return (mean**3 + var**2).sum()

    def plain(a):
        rate = 0.1 if name == "ema" else 1
        mean, var = rate * a.mean(0), 1 - rate + rate * a.var(0)
        mean, var = (0, (a**2).mean(0)) if name in ABOUT_ZERO else (mean, var)
        return (mean**3 + var**2).sum()

    a = array(BATCHES[0])
    assert gap(jax.grad(ours)(a), np.zeros((N, C))) == 0
    asked = jax.grad(functools.partial(ours, state_gradient=True))(a)
    assert gap(asked, jax.grad(plain)(a)) < 5e-6


@pytest.mark.parametrize("sync", ["d", nl.Sync("d", groups=2), nl.Sync("d", shards=2, groups=1)])
def test_the_states_gradient_reaches_the_batches_of_all_devices(sync):
    norm = nl.get("batch", axis_name=sync, state_gradient=True)
    a = array(draw(0, 4, N, C))

    def ours(a):
        def one(a):
            params, state = norm.init(nl.Site(a))
            return norm.parts(params, state, nl.Site(a), train=True)[1]

        state = jax.vmap(one, axis_name="d")(a)
        return (state.mean[0] ** 3 + state.var[0] ** 2).sum()

    def plain(a):
        whole = a.reshape(-1, C)
        return (whole.mean(0) ** 3 + whole.var(0) ** 2).sum()

    assert gap(jax.grad(ours)(a), jax.grad(plain)(a)) < 5e-6


def test_an_unknown_population_or_option_is_an_error_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown population 'cumulativ': did you mean 'cumu"):
        nl.population.init_population("cumulativ", C)
    with pytest.raises(ValueError, match=r"unknown population 'emma': did you mean 'ema'"):
        nl.get("batch", population="emma")
    with pytest.raises(ValueError, match=r"'cumulative': unknown option 'decay': Known: ddof, es"):
        nl.population.init_population("cumulative", C, decay=0.5)
    with pytest.raises(ValueError, match=r"'renorm': unknown option 'rmax': did you mean 'r_max'"):
        nl.population.init_population("renorm", C, rmax=0.5)
    with pytest.raises(ValueError, match=r"'debiased': unknown option 'dcay'"):
        nl.population.init_population("frozen", C, dcay=0.5)


@pytest.mark.parametrize(
    ("state", "remedy"),
    [
        (5, "init_r"),
        (jnp.zeros(3), "init_r"),
        ((jnp.zeros(3), jnp.ones(3)), "init_r"),
        ({"mean": 0}, r"restore_states\(states, restored\)"),
    ],
)
def test_a_state_of_the_wrong_kind_is_an_error(state, remedy):
    with pytest.raises(
        ValueError, match=rf"batch norm: got a state of type .* a Population.*{remedy}"
    ):
        nl.batch_norm(array(BATCHES[0]), None, state, train=True)


def test_a_population_of_ones_own_stands_behind_batch_norm():
    class Latest(nl.Moments):
        def update(self, m, *, decay=None, bad_batch="skip"):
            return Latest(*(jnp.broadcast_to(f, m.mean.shape).ravel() for f in m))

        def read(self):
            return self.mean, self.var()

        def pool(self, axis_name):
            return Latest(*nl.devices.all_reduce(self, axis_name))

    _, state = train(Latest(*nl.measure.empty((C,))), BATCHES)
    h, _ = nl.batch_norm(array(BATCHES[0]), None, state, train=False)
    expected = (BATCHES[0] - BATCHES[4].mean(0)) / np.sqrt(BATCHES[4].var(0) + 1e-5)
    assert gap(h, expected) < 2e-6


# Running: its settings are part of the state.


def test_decay_and_ddof_are_named_in_the_state_and_are_no_leaves():
    state = nl.init_running(C, decay=0.999, ddof=1)
    assert (state.decay, state.ddof) == (0.999, 1)
    assert len(jax.tree.leaves(state)) == 8
    _, state = train(state, BATCHES[:1])
    assert (state.decay, state.ddof) == (0.999, 1)
    with pytest.raises(ValueError, match=r"metadata"):
        jax.tree.map(jnp.add, state, nl.init_running(C))


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.9999])
def test_the_states_decay_is_as_exact_as_one_that_is_given(decay):
    """1 − decay is taken in Python: in float32 1 − 0.9999 would be off by 2e-4."""
    _, own = train(nl.init_running(C, decay=decay, debias=False), BATCHES)
    _, given = train(nl.init_running(C, debias=False), BATCHES, decay=decay)
    assert gap(jax.tree.leaves(own), jax.tree.leaves(given)) == 0
    mean = np.zeros(C)
    for batch in BATCHES:
        mean = decay * mean + (1 - decay) * batch.mean(0)
    assert gap(own.mean, mean) < 1e-6


def test_count_is_the_number_of_values_of_a_channel_in_a_batch():
    a = array(draw(0, 4, 5, 6, C))
    _, state = train(nl.init_running(C), [a, a])
    assert state.count == 4 * 5 * 6
    _, state = train(nl.init_running(C), [a], weights=jnp.array([1, 1, 0, 0]))
    assert state.count == 2 * 5 * 6


@pytest.mark.parametrize("ddof", [0, 1])
def test_changing_ddof_is_the_state_that_was_kept_so_from_the_start(ddof):
    _, state = train(nl.init_running(C, ddof=ddof), BATCHES)
    _, other = train(nl.init_running(C, ddof=1 - ddof), BATCHES)
    changed = nl.population.change_ddof(state, 1 - ddof)
    assert jax.tree.structure(changed) == jax.tree.structure(other)
    changed, other = (s._replace(before=None) for s in (changed, other))
    assert gap(changed, other) < 1e-6
    with pytest.raises(ValueError, match=r"change ddof: got 0 values.*pass count="):
        nl.population.change_ddof(nl.init_running(C), 1)
    with pytest.raises(ValueError, match=r"ddof=2; expected 0, the biased"):
        nl.population.change_ddof(state, 2)


# Cumulative.


@pytest.mark.parametrize("ddof", [0, 1])
def test_cumulative_is_all_batches_as_one(ddof):
    """Of different sizes, each weighted by its count; masked examples count for nothing."""
    sizes = (8, 3, 5, 1, 7)
    batches = [batch[:n] for batch, n in zip(BATCHES, sizes, strict=True)]
    state = nl.population.init_cumulative(C, ddof=ddof)
    for batch in batches:
        state = state.update(nl.moments(array(batch), 0))
    whole = np.concatenate(batches)
    assert gap(state.read(), (whole.mean(0), whole.var(0, ddof=ddof))) < 2e-6
    assert gap(state.count, np.full(C, sum(sizes))) == 0
    assert (state.updates, state.skipped) == (5, 0)


def test_within_is_the_papers_estimate_and_between_is_the_rest():
    """m/(m − 1)·E σ_B², algorithm 2 of Ioffe & Szegedy (2015); pooled, the variance of all."""
    state = nl.population.init_cumulative(C, ddof=1, estimator="within")
    _, state = train(state, BATCHES)
    assert gap(state.read()[1], BATCHES.var(1, ddof=1).mean(0)) < 2e-6
    whole = BATCHES.reshape(-1, C)
    pooled = state._replace(estimator="pooled")
    assert gap(pooled.read()[1], whole.var(0, ddof=1)) < 2e-6
    assert gap(state.between / state.count, BATCHES.mean(1).var(0)) < 2e-6


def test_cumulative_skips_a_bad_batch_and_refuses_a_decay():
    bad = BATCHES[1].copy()
    bad[0, 0] = np.nan
    _, state = train(nl.population.init_cumulative(C), [BATCHES[0], bad, BATCHES[2]])
    whole = BATCHES[[0, 2]].reshape(-1, C)
    assert gap(state.read(), (whole.mean(0), whole.var(0))) < 2e-6
    assert (state.updates, state.skipped) == (2, 1)
    with pytest.raises(ValueError, match=r"cumulative statistics: got decay=0.5.*weighs the same"):
        train(state, BATCHES[:1], decay=0.5)


# Frozen, and none.


def test_frozen_statistics_normalize_training_and_stay():
    _, state = train(nl.init_running(C), BATCHES[:2])
    frozen = nl.population.freeze(state)
    h, same = nl.batch_norm(array(BATCHES[2]), None, frozen, train=True)
    expected, _ = nl.batch_norm(array(BATCHES[2]), None, state, train=False)
    assert gap(h, expected) == 0
    assert gap(same, frozen) == 0
    assert gap(nl.population.thaw(same), state) == 0


def test_layers_are_frozen_by_path():
    states = {"stem": {"norm": nl.init_running(2)}, "head": {"norm": nl.init_running(2)}}
    frozen = nl.population.freeze(states, "stem/.*")
    assert isinstance(frozen["stem"]["norm"], nl.population.Frozen)
    assert isinstance(frozen["head"]["norm"], nl.Running)
    assert isinstance(
        nl.population.freeze(states, lambda path: "head" in path)["head"]["norm"],
        nl.population.Frozen,
    )
    assert jax.tree.structure(nl.population.thaw(frozen)) == jax.tree.structure(states)
    with pytest.raises(
        ValueError, match=r"freeze: got a rule for 'stm/norm'.*'stem/norm'.*head/norm"
    ):
        nl.population.freeze(states, "stm/norm")
    with pytest.raises(ValueError, match=r"thaw: got a rule that chooses none.*head/norm, stem/no"):
        nl.population.thaw(states, lambda path: False)


def test_without_a_population_inference_uses_its_own_batch():
    a = array(BATCHES[0])
    h, state = nl.batch_norm(a, None, (), train=False)
    assert state == ()
    assert gap(h, nl.batch_norm(a, None, None, train=True)[0]) == 0
    assert gap(h, nl.batch_norm(a, None, (), train=True)[0]) == 0


# Batch renormalization.


def renorm(**limits):
    return nl.population.init_renorm(C, begin=0, r_end=0, d_end=0, **limits)


@pytest.mark.parametrize("weighted", [False, True])
def test_renorm_with_r_1_and_d_0_is_batch_norm_to_the_bit(weighted):
    """Output, gradients and state, from a state that is far from the batch."""
    _, running = train(nl.init_running(C), BATCHES[:2] * 5)
    a, params = array(BATCHES[3]), nl.Affine(array(draw(5, C)), array(draw(6, C)))
    weights = jnp.arange(N, dtype=jnp.float32) if weighted else None

    def run(state):
        def loss(a, params):
            h, after = nl.batch_norm(a, params, state, train=True, weights=weights)
            return (h**3).sum(), (h, after)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(a, params)

    (loss, (h, state)), grads = run(renorm(r_max=1.0, d_max=0.0)._replace(inner=running))
    (loss_, (h_, state_)), grads_ = run(running)
    assert gap((loss, h, grads, state.inner), (loss_, h_, grads_, state_)) == 0


def test_renorm_without_limits_normalizes_as_inference_does():
    _, running = train(nl.init_running(C), BATCHES[:2])
    state = renorm(r_max=1e6, d_max=1e6)._replace(inner=running)
    a = array(BATCHES[3])
    h, _ = nl.batch_norm(a, None, state, train=True)
    assert gap(h, nl.batch_norm(a, None, running, train=False)[0]) < 2e-6


def test_renorm_is_the_papers_algorithm(x64):
    """Algorithm 1 with finite limits, and its gradient: r and d are constants."""
    running = nl.init_running(C, dtype="float64")
    _, running = train(running, [jnp.asarray(b) for b in BATCHES[:2]])
    state = renorm(r_max=1.1, d_max=0.2, dtype="float64")._replace(inner=running)
    a, c = jnp.asarray(BATCHES[3] * 2), jnp.asarray(draw(7, N, C))
    mean, sigma = np.asarray(a).mean(0), np.sqrt(np.asarray(a).var(0) + 1e-5)
    old = np.sqrt(np.asarray(running.var) + 1e-5)
    r = np.clip(sigma / old, 1 / 1.1, 1.1)
    d = np.clip((mean - np.asarray(running.mean)) / old, -0.2, 0.2)
    assert (r == 1.1).any()
    assert (np.abs(d) == 0.2).any()

    def ours(a):
        return nl.batch_norm(a, None, state, train=True)[0]

    def paper(a):
        return (a - a.mean(0)) / jnp.sqrt(a.var(0) + 1e-5) * r + d

    assert gap(ours(a), paper(a)) < 1e-12
    ours_, papers = (jax.grad(lambda a, f=f: (c * f(a) ** 2).sum())(a) for f in (ours, paper))
    assert gap(ours_, papers) < 1e-11


def test_renorm_averages_sigma_as_the_paper_does(x64):
    """σ ← σ + α(σ_B − σ), where the scale of the batches alternates; and so it is pooled."""
    state = nl.population.init_renorm(
        C, begin=0, r_end=0, d_end=0, r_max=1.5, d_max=0.5, dtype="float64"
    )
    a = BATCHES[0] * np.array([1.0, 1e-3, 10.0])
    mean, sigma, mass = 0.0, 0.0, 0.0
    for scale in (1.0, 10.0, 0.01, 3.0):
        mu, s = (scale * a).mean(0), np.sqrt((scale * a).var(0) + 1e-5)
        r = np.clip(s / sigma, 1 / 1.5, 1.5) if mass else 1
        d = np.clip((mu - mean) / sigma, -0.5, 0.5) if mass else 0
        h, state = nl.batch_norm(jnp.asarray(scale * a), None, state, train=True)
        assert gap(h, (scale * a - mu) / s * r + d) < 1e-9
        mass = 0.9 * mass + 0.1
        mean = mean + 0.1 / mass * (mu - mean)
        sigma = sigma + 0.1 / mass * (s - sigma)
        h, _ = nl.batch_norm(jnp.asarray(a), None, state, train=False)
        assert gap(h, (a - mean) / sigma) < 1e-9
    assert nl.population.conventions(state) == {
        "": "Renorm(inner=Running(decay=0.9, ddof=0, sigma_eps=1e-05))"
    }
    assert nl.get("batch", population="renorm", eps=0.1).init(nl.Site(array(a)))[
        1
    ].inner.sigma_eps == pytest.approx(0.1)


def test_renorms_limits_grow_with_the_updates():
    state = nl.population.init_renorm(C, r_max=3.0, d_max=5.0, begin=10, r_end=30, d_end=20)
    seen = [0, 10, 15, 20, 30, 99]
    limits = [
        state._replace(inner=state.inner._replace(updates=jnp.int32(n))).limits() for n in seen
    ]
    expected = np.array([[1, 1, 1.5, 2, 3, 3], [0, 0, 2.5, 5, 5, 5]])
    assert gap(np.array(limits).T, expected) < 1e-6
    with pytest.raises(ValueError, match=r"batch renorm: got r_max=0.5"):
        nl.population.init_renorm(C, r_max=0.5)
    with pytest.raises(ValueError, match=r"batch renorm: got begin=10, r_end=5"):
        nl.population.init_renorm(C, begin=10, r_end=5)


def test_renorm_of_a_masked_batch_is_the_bias():
    h, state = nl.batch_norm(array(BATCHES[0]), None, renorm(), train=True, weights=jnp.zeros(N))
    assert gap(h, np.zeros((N, C))) == 0
    assert state.inner.skipped == 1


# Domains.


def test_a_batch_of_one_domain_touches_that_domain_alone():
    state = nl.population.init_domains(C, domains=3)
    step = jax.jit(
        lambda state, d, a: nl.batch_norm(
            a, None, nl.population.select_domain(state, d), train=True
        )
    )
    alone = [nl.init_running(C) for _ in range(3)]
    for d, batch in zip([0, 2, 0, 2, 0], BATCHES, strict=True):
        h, state = step(state, d, array(batch))
        expected, alone[d] = nl.batch_norm(array(batch), None, alone[d], train=True)
        assert gap(h, expected) < 1e-6
    assert gap(state.inner, jax.tree.map(lambda *v: jnp.stack(v), *alone)) < 1e-6
    h, _ = nl.batch_norm(
        array(BATCHES[0]), None, nl.population.select_domain(state, 2), train=False
    )
    assert gap(h, nl.batch_norm(array(BATCHES[0]), None, alone[2], train=False)[0]) < 1e-6


@pytest.mark.parametrize("mapper", [None, *MAPPERS])
def test_a_batch_of_many_domains_is_many_batches(mapper):
    """Also over devices, each with other shares of the domains; none is as if it were not there."""
    devices = 1 if mapper is None else 8
    a = draw(3, devices, 6, 2, C, mean=1.0)
    domain = np.random.default_rng(0).integers(0, 2, (devices, 6)) * 2  # none of domain 1
    a = a + 5 * domain[..., None, None]
    state = nl.population.init_domains(C, domains=3, examples=6)

    def run(state, sharded, axis_name=None):
        a, domain = sharded
        state = nl.population.select_domain(state, domain)
        h, after = nl.batch_norm(a, None, state, train=True, axis_name=axis_name)
        return h, after.inner

    if mapper is None:
        h, of = jax.tree.map(lambda v: v[None], run(state, (array(a[0]), jnp.asarray(domain[0]))))
    else:
        mapped = mappers()[mapper](functools.partial(run, axis_name="d"))
        h, of = mapped(state, (array(a), jnp.asarray(domain)))
    for d in (0, 2):
        chosen = a[domain == d].reshape(-1, C)
        expected = (a[domain == d] - chosen.mean(0)) / np.sqrt(chosen.var(0) + 1e-5)
        assert gap(np.asarray(h)[domain == d], expected) < 5e-6
        assert (
            gap(
                (of.mean[:, d], of.var[:, d]),
                [np.tile(v, (devices, 1)) for v in (chosen.mean(0), chosen.var(0))],
            )
            < 5e-6
        )
        assert (np.asarray(of.updates[:, d]) == 1).all()
    assert (np.asarray(of.updates[:, 1]) == 0).all()
    assert (np.asarray(of.skipped) == 0).all()


def test_inference_takes_each_examples_domain():
    state = nl.population.init_domains(C, domains=2, examples=N)
    state = state._replace(inner=state.inner._replace(mean=array([[0.0] * C, [7.0] * C])))
    domain = jnp.arange(N) % 2
    a = array(draw(0, N, C, 2))
    h, _ = nl.batch_norm(
        a, None, nl.population.select_domain(state, domain), train=False, channel_axis=1, eps=1e-9
    )
    assert gap(h, np.asarray(a) - 7.0 * (np.arange(N) % 2)[:, None, None]) < 1e-6


def test_a_domain_that_is_not_there_is_an_error():
    state = nl.population.init_domains(C, domains=2)
    with pytest.raises(ValueError, match=r"select domain: got domain=2.*0 to 1"):
        nl.population.select_domain(state, 2)
    with pytest.raises(ValueError, match=r"select domain: got domains of shape \(4,\)"):
        nl.population.select_domain(state, jnp.zeros(4, int))
    with pytest.raises(ValueError, match=r"select domain: got a domain of type float32.*integers"):
        nl.population.select_domain(state, 1.5)
    with pytest.raises(ValueError, match=r"change ddof: got a state of type Domains"):
        nl.population.change_ddof(state, 1)
    with pytest.raises(ValueError, match=r"select domain: got a tree without domains"):
        nl.population.select_domain({"norm": nl.init_running(C)}, 0)


def test_a_domain_of_each_example_may_be_said_for_any_number_of_examples():
    state = nl.population.select_domain(
        nl.population.init_domains(C, domains=2, examples=N), jnp.zeros(4, jnp.int32)
    )
    h, _ = nl.batch_norm(array(BATCHES[0][:4]), None, state, train=False, eps=1e-9)
    assert gap(h, BATCHES[0][:4]) < 1e-6
    frozen = nl.population.freeze(state)
    assert gap(nl.batch_norm(array(BATCHES[0][:4]), None, frozen, train=True)[0], h) < 1e-4


@pytest.mark.parametrize("population", ["renorm", "frozen", "batch", "domains"])
def test_what_changes_training_is_not_held_by_another(population):
    with pytest.raises(ValueError, match=r"domains: got a population of type"):
        nl.population.init_domains(C, inner=population)
    if population != "frozen":
        norm = nl.get("batch", population=population, axis_name=nl.Sync("d", every=2))
        with pytest.raises(ValueError, match=r"delayed: got statistics of type"):
            norm.init(nl.Site(array(BATCHES[0])))


def test_a_function_of_the_channels_is_a_population():
    norm = nl.get("batch", population=lambda channels: nl.init_running(channels, decay=0.5))
    assert norm.init(nl.Site(array(BATCHES[0])))[1].decay == 0.5


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("gradient", ["forward", "backward", "none"])
def test_plain_jit_knows_every_gradient(gradient, kind):
    sync = nl.Sync("d", gradient=gradient)
    a, c = array(draw(0, 8, 4, C) + draw(1, 8, 1, C)), array(draw(2, 8, 4, C))

    def loss(a, c, state):
        h, state = nl.batch_norm(a, None, state, train=True, axis_name=sync)
        return (c * h**2).sum(), state

    def plain(a, c):
        (_, state), da = jax.value_and_grad(loss, has_aux=True)(a, c, nl.init_running(C))
        return da, state

    with jax.set_mesh(mesh(kind, d=8)):
        da, state = jax.jit(plain)(a.reshape(-1, C), c.reshape(-1, C))
    mapped = mappers()["vmap"](lambda _, v: plain(*v))
    expected, states = mapped((), (a, c))
    assert gap(da.reshape(a.shape), expected) < 5e-6
    assert gap(state, jax.tree.map(lambda v: v[0], states)) < 5e-6
