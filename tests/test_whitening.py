"""Co-moments are merged as moments are, and whitening is right where a matrix may go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab.comoments import CoMoments, comoments
from normlab.family import (
    group_whitening_norm,
    switchable_whitening_norm,
    whitening_norm,
    whitening_parts,
)
from normlab.matrix import MatrixParts
from normlab.measure import merge, merge_axes
from tests.helpers import array, draw, gap, mappers
from tests.test_sync import GRIDS, MASK, TOPOLOGIES, C, members, problem, run, spec, whole

WHITENERS = ("cholesky", "zca", "pca", "newton")
over_whiteners = pytest.mark.parametrize("whitener", WHITENERS)


def data(n=64, channels=6, condition=100.0, seed=0):
    """Correlated channels, away from the origin, with a covariance of that condition."""
    turn = np.linalg.qr(draw(seed, channels, channels))[0]
    x = np.linalg.qr(draw(seed + 1, n, channels) - draw(seed + 1, n, channels).mean(0))[0]
    x = x * np.sqrt(n) * np.sqrt(np.geomspace(1, 1 / condition, channels))
    return x @ turn + 3


def covariance(h, groups=1):
    h = np.asarray(h, np.float64).reshape(-1, h.shape[-1])
    return np.stack([np.cov(v.T, ddof=0) for v in np.split(h, groups, -1)])


# Which W.


@over_whiteners
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_what_is_whitened_is_white(whitener, groups, x64):
    h, _ = whitening_norm(
        array(data(), "float64"),
        train=True,
        groups=groups,
        whitener=whitener,
        eps=1e-14,
        steps=40,
    )
    expected = np.broadcast_to(np.eye(6 // groups), (groups, 6 // groups, 6 // groups))
    assert np.abs(covariance(h, groups).reshape(expected.shape) - expected).max() < 1e-9
    assert np.abs(np.mean(h, 0)).max() < 1e-12


def test_groups_of_one_channel_are_batch_norm(x64):
    a = array(data(), "float64")
    for whitener in WHITENERS:
        h, _ = whitening_norm(a, train=True, groups=6, whitener=whitener, eps=1e-5, steps=30)
        assert gap(h, nl.batch_norm(a, train=True)[0]) < 1e-12, whitener


def test_zca_turns_with_the_data_and_is_the_nearest_to_it(x64):
    a, turn = array(data(), "float64"), np.linalg.qr(draw(9, 6, 6))[0]
    h = {w: whitening_norm(a, train=True, whitener=w)[0] for w in WHITENERS}
    turned = whitening_norm(a @ turn, train=True, whitener="zca")[0]
    assert gap(turned, h["zca"] @ turn) < 1e-11
    centred = a - a.mean(0)
    far = {w: jnp.linalg.norm(v - centred) for w, v in h.items()}
    assert far["zca"] < min(far["cholesky"], far["pca"])


def test_the_axes_of_pca_fall_in_variance_and_have_one_sign(x64):
    a = array(data(), "float64")
    parts, _ = whitening_parts(a, train=True, whitener="pca")
    matrix = parts.matrix[0, 0]
    assert (jnp.diff(jnp.linalg.norm(matrix, axis=-1)) > 0).all()
    assert (matrix[jnp.arange(6), jnp.abs(matrix).argmax(-1)] > 0).all()


def test_newton_in_its_coupled_form_converges_where_the_published_form_does_not():
    for condition in (10.0, 1e2, 1e3):
        a = array(data(condition=condition))
        sigma = jnp.asarray(covariance(a)[0], jnp.float32)
        s, p = sigma / jnp.trace(sigma), jnp.eye(6)
        for steps in range(1, 31):
            p = (3 * p - p @ p @ p @ s) / 2
            if steps in (5, 30):
                h, _ = whitening_norm(a, train=True, whitener="newton", eps=1e-9, steps=steps)
                error = np.abs(covariance(h)[0] - np.eye(6)).max()
            if steps == 5:
                w = p / jnp.sqrt(jnp.trace(sigma))
                assert gap(covariance(h)[0], w @ sigma @ w.T) < 1e-3
        assert error < 2e-3, condition
        w = np.asarray(p @ s @ p.T)
        assert condition < 100 or not np.abs(w - np.eye(6)).max() < 0.1


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@over_whiteners
def test_single_precision_beside_double(whitener, condition):
    """What rounding of Σ makes of h, which grows with the condition number."""
    options = {"train": True, "whitener": whitener, "eps": 1e-9, "steps": 60}
    a = data(condition=condition)
    if whitener == "pca":  # variances that are equal have no axes
        a = data(condition=max(condition, 4.0))
    found = whitening_norm(array(a), **options)[0]
    with jax.enable_x64(True):
        expected = whitening_norm(array(a, "float64"), **options)[0]
    assert gap(found, expected) < 3e-6 + 6e-6 * condition**0.5 + 2e-7 * condition


# Derivatives.


def loss_of(whitener, **options):
    def loss(a):
        h, _ = whitening_norm(a, train=True, whitener=whitener, **options)
        return (jnp.sin(h) * jnp.cos(jnp.arange(h.size).reshape(h.shape))).sum()

    return loss


@pytest.mark.parametrize("whitener", ["cholesky", "zca", "newton"])
@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-7])
def test_derivatives_are_right_where_variances_are_equal(whitener, spread, x64):
    a = np.concatenate([np.eye(4), -np.eye(4)]) * (2 + spread * np.arange(4))
    a, v = array(a, "float64"), array(draw(1, 8, 4), "float64")
    loss = loss_of(whitener, eps=1e-3)
    grad = jax.jit(jax.grad(loss))
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}

    def difference(f):
        step = 1e-2
        terms = [c * (f(a + k * step * v) - f(a - k * step * v)) for k, c in weights.items()]
        return sum(terms) / step

    assert gap(jnp.vdot(grad(a), v), difference(jax.jit(loss))) < 1e-7
    assert gap(jax.jvp(grad, (a,), (v,))[1], difference(grad)) < 1e-6


@over_whiteners
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_derivatives_of_both_orders_are_finite_at_every_degenerate_batch(whitener, dtype):
    with jax.enable_x64(dtype == "float64"):
        degenerate = {
            "zeros": np.zeros((8, 4)),
            "constant": np.full((8, 4), 0.1),
            "one constant channel": np.concatenate([draw(0, 8, 3), np.full((8, 1), 3.3)], 1),
            "a copy": np.repeat(draw(0, 8, 2), 2, 1),
            "a copy, large": 1e4 * np.repeat(draw(0, 8, 2), 2, 1),
            "equal variances": np.concatenate([np.eye(4), -np.eye(4)]),
        }
        for relative in (False, True):
            loss = loss_of(whitener, relative=relative)
            both = jax.jit(
                lambda a, loss=loss: (loss(a), *jax.jvp(jax.grad(loss), (a,), (jnp.cos(a),)))
            )
            for name, a in degenerate.items():
                for v in both(array(a, dtype)):
                    assert jnp.isfinite(v).all(), (name, relative)


@over_whiteners
def test_a_constant_channel_is_the_bias(whitener):
    a = np.concatenate([data()[:, :3], np.full((64, 1), 0.1)], 1)
    params = nl.Affine(jnp.ones(4), jnp.arange(4.0))
    h, _ = whitening_norm(array(a), params, train=True, whitener=whitener)
    column = np.asarray(h) - np.arange(4.0)
    constant = 3
    if whitener == "pca":  # the last axis is that channel's
        constant = int(np.abs(column).max(0).argmin())
    assert np.abs(column[:, constant]).max() < 1e-4
    h, _ = whitening_norm(jnp.full((8, 4), 0.1), params, train=True, whitener=whitener)
    assert gap(h, np.broadcast_to(np.arange(4.0), (8, 4))) < 1e-6


# Weights.


@over_whiteners
def test_a_weight_is_so_many_examples_and_weighs_no_more_than_its_ratio(whitener, x64):
    a, counts = array(data(20), "float64"), np.random.default_rng(0).integers(0, 4, 20)
    options = {"train": True, "whitener": whitener, "groups": 2}
    bad = a.at[counts == 0].set(jnp.nan)
    h, state = whitening_norm(bad, None, nl.init_running(6, groups=2), weights=counts, **options)
    many, expected = whitening_norm(
        jnp.repeat(a, counts, 0), None, nl.init_running(6, groups=2), **options
    )
    assert gap(jnp.repeat(h[counts > 0], counts[counts > 0], 0), many) < 1e-11
    assert gap(state, expected) < 1e-12
    scaled, _ = whitening_norm(bad, weights=1e-30 * counts, **options)
    assert gap(scaled[counts > 0], h[counts > 0]) < 1e-11


@over_whiteners
def test_a_batch_that_weighs_nothing_is_the_bias_and_leaves_the_state(whitener):
    a, state = array(data(20)), nl.init_running(6, groups=2)
    params = nl.Affine(jnp.ones(6), jnp.arange(6.0))

    def run(a, weights):
        return whitening_norm(
            a, params, state, train=True, whitener=whitener, weights=weights, groups=2
        )

    h, after = run(a, jnp.zeros(20))
    assert gap(h, np.broadcast_to(np.arange(6.0), h.shape)) == 0
    assert after.skipped == 1
    assert gap(after[:2], state[:2]) == 0
    grad = jax.grad(lambda a: run(a, jnp.zeros(20))[0].sum())(a)
    assert jnp.abs(grad).max() == 0
    few, after = run(a, (jnp.arange(20) < 3).astype(jnp.float32))  # values, of 3 channels
    assert jnp.isfinite(few).all()
    assert after.skipped == 1


# Devices.


def sharded_oracle(sync, a, params, weights):
    """Each shard whitened with the mean and the covariance of its members, in float64."""
    count, chosen = members(sync)
    together = np.array([[j in names for j in range(count)] for names in chosen], float)
    x = a.reshape(count, -1, C)
    w = (weights[:, None] * np.ones(a.shape[:-1])).reshape(count, -1)
    n = jnp.maximum(together @ w.sum(1), 1e-300)
    mean = together @ (w[..., None] * x).sum(1) / n[:, None]
    d = x[None] - mean[:, None, None]
    cov = jnp.einsum("ij,jr,ijrc,ijrd->icd", together, w, d, d) / n[:, None, None]
    matrix = jnp.linalg.inv(jnp.linalg.cholesky(cov + 1e-3 * np.eye(C)))
    h = jnp.einsum("icd,ird->irc", matrix, x - mean[:, None])
    return (params.g * h + params.b).reshape(a.shape)


@functools.cache
def expected(topology, *, masked):
    params, a, c = problem("float32")
    with jax.enable_x64(True):
        params, a, c = jax.tree.map(lambda v: jnp.asarray(v, "float64"), (params, a, c))
        w = array(MASK.reshape(-1) if masked else np.ones(len(a)), "float64")

        def loss(a):
            h = sharded_oracle(TOPOLOGIES[topology], a, params, w)
            return (c * jnp.where(w[:, None, None] > 0, h, 0)).sum(), h

        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss, has_aux=True))(a))


CUTS = ("all", "uneven", "ring", "ghosts", "ghosts across devices", "virtual, across devices")
IN_EVERY = [(cut, mode) for cut in ("all", "ghosts") for mode in ("pmap", "jit")]
IN_SOME = [(cut, mode) for cut in CUTS for mode in ("vmap", "shard_map", "jit, explicit")]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("topology", "mode"), IN_EVERY + IN_SOME)
def test_each_shard_is_whitened_with_its_members(topology, mode, masked):
    """Outputs and gradients; the population is that of all the devices."""
    params, a, c = problem("float32")
    mask = MASK.reshape(-1) if masked else np.ones(len(a), bool)
    dirty = jnp.where(mask[:, None, None], a, jnp.nan)
    weights, c = array(mask), jnp.where(mask[:, None, None], c, 0)
    state = nl.init_running(C, groups=1)

    def f(params, a, w):
        w = w if masked else None
        return whitening_norm(
            a, params, state, train=True, weights=w, axis_name=spec(topology, mode)
        )

    def loss(a):
        h, after = run(mode, f, params, (a, weights))
        return (c.reshape(h.shape) * jnp.where(c.reshape(h.shape) == 0, 0, h)).sum(), (h, after)

    grad = jax.grad(loss, has_aux=True)
    da, (h, after) = (grad if mode == "pmap" else jax.jit(grad))(dirty)
    h = h if mode in GRIDS else whole(h)
    after = after if mode in GRIDS else jax.tree.map(lambda v: v[0], after)
    slope, one = expected(topology, masked=masked)
    assert gap(np.asarray(h)[mask], one[mask]) < 3e-5
    assert gap(np.asarray(da)[mask], slope[mask]) < 1e-4
    rows = np.asarray(a, np.float64)[mask].reshape(-1, C)
    assert gap(after.mean, rows.mean(0)) < 1e-5
    assert gap(after.var, covariance(rows)) < 1e-5


def test_a_staged_merge_is_the_whole_one_and_the_gradient_is_what_the_sync_says():
    a, c = array(draw(0, 4, 2, 8, C)), array(draw(1, 4, 2, 8, C))

    def under(**how):
        sync = nl.Sync(("i", "j"), **how)

        def loss(a):
            f = lambda a: whitening_norm(a, train=True, axis_name=sync)[0]  # noqa: E731
            h = jax.vmap(jax.vmap(f, axis_name="j"), axis_name="i")(a)
            return (c * h).sum(), h

        return jax.jit(jax.grad(loss, has_aux=True))(a)

    both = under()
    assert gap(under(staged=True), both) < 1e-5
    parts, _ = whitening_parts(a.reshape(-1, C), train=True)
    constant = jnp.einsum("...i,ij->...j", c, parts.matrix[0, 0])
    none, h = under(gradient="none")
    assert gap((none, h), (constant, both[1])) < 1e-5
    forward, h = under(gradient="forward")
    assert gap(h, both[1]) < 1e-5
    assert gap(forward, both[0]) > 1e-2
    backward, h = under(gradient="backward")
    assert gap(h, both[1]) > 1e-2
    assert jnp.isfinite(backward).all()


def test_delayed_covariances_are_merged_and_exchanged_with_moments():
    """Whitening and batch norm of one net, in one exchange."""
    sync = nl.Sync("d", every=1)
    a = array(draw(0, 3, 8, 12, C))
    norms = [nl.get("whitening", axis_name=sync), nl.get("batch", axis_name=sync)]
    states = [norm.init(nl.Site(a[0, 0]))[1] for norm in norms]

    def step(states, a):
        def one(norm, state):
            params = norm.init(nl.Site(a))[0]
            return norm.apply(params, state, nl.Site(a), train=True)

        h, states = zip(*map(one, norms, states), strict=True)
        return h, nl.population.exchange(list(states), sync)

    states = jax.tree.map(lambda v: jnp.broadcast_to(v, (8, *v.shape)), states)
    for batch in a[:2]:
        (h, _), states = jax.vmap(step, axis_name="d")(states, batch)
    others = [np.asarray(a[0, j]) for j in range(1, 8)]
    rows = np.concatenate([np.asarray(a[1, 0]), *others])
    w = np.linalg.inv(np.linalg.cholesky(covariance(rows)[0] + 1e-3 * np.eye(C)))
    assert gap(h[0], (np.asarray(a[1, 0]) - rows.mean(0)) @ w.T) < 1e-4
    told = jax.tree.map(lambda v: v[0], states[0].others)
    rows = np.concatenate([np.asarray(a[1, j]) for j in range(1, 8)])
    assert type(told) is CoMoments
    assert gap(told.var(), covariance(rows)) < 1e-5
    assert gap(states[1].others.var()[0], rows.var(0)) < 1e-5


# Populations.


def taken(state, batches):
    for batch in batches:
        _, state = whitening_norm(batch, None, state, train=True, groups=2, weights=None)
    return state


def test_what_populations_keep_of_covariances(x64):
    batches = [array(draw(i, 12 + 4 * i, 6) @ draw(9, 6, 6), "float64") for i in range(3)]
    rows = np.concatenate(batches)
    each = [covariance(b, 2) for b in batches]
    counts = [len(b) for b in batches]
    cumulative = taken(nl.population.init_cumulative(6, groups=2, dtype="float64"), batches)
    assert gap(cumulative.read(), (rows.mean(0), covariance(rows, 2))) < 1e-12
    within = taken(
        nl.population.init_cumulative(6, groups=2, estimator="within", ddof=1, dtype="float64"),
        batches,
    )
    expected = sum(n * c for n, c in zip(counts, each, strict=True)) / (sum(counts) - 3)
    assert gap(within.read()[1], expected) < 1e-12
    running = nl.init_running(6, groups=2, decay=0.5, dtype="float64")
    average = taken(running, batches)
    weights = np.array([0.25, 0.5, 1.0]) / 1.75
    assert gap(average.var, sum(w * c for w, c in zip(weights, each, strict=True))) < 1e-12
    # A transaction is one batch; what it saw can become the population.
    seen = taken(nl.population.begin(running), batches)
    assert gap(nl.population.commit(seen).var, covariance(rows, 2)) < 1e-12
    assert gap(nl.population.settle(seen).var, covariance(rows, 2)) < 1e-12
    stacked = jax.tree.map(lambda v: jnp.stack([v, v]), seen)
    committed = nl.population.commit(stacked)
    assert gap(committed.var[1], covariance(rows, 2)) < 1e-12
    # Domains, of each batch and of each example.
    domains = nl.population.init_domains(6, groups=2, domains=2, dtype="float64")
    for i, batch in enumerate(batches[:2]):
        domains = taken(nl.population.select_domain(domains, i), [batch])
    assert gap(domains.inner.var, np.stack(each[:2])) < 1e-12
    mixed = nl.population.init_domains(6, groups=2, domains=2, examples=28, dtype="float64")
    mixed = nl.population.select_domain(mixed, np.repeat([0, 1], counts[:2]))
    h, after = whitening_norm(np.concatenate(batches[:2]), None, mixed, train=True, groups=2)
    assert gap(after.inner.var, np.stack(each[:2])) < 1e-12
    alone, _ = whitening_norm(batches[1], train=True, groups=2)
    assert gap(h[12:], alone) < 1e-11
    h, _ = whitening_norm(np.concatenate(batches[:2]), None, after, train=False, groups=2)
    assert gap(h[12:], alone) < 1e-11
    frozen = nl.population.freeze(average)
    h, after = whitening_norm(batches[0], None, frozen, train=True, groups=2)
    assert gap(after, frozen) == 0
    assert gap(h, whitening_norm(batches[0], None, average, train=False, groups=2)[0]) == 0
    # On devices that keep their own.
    apart = jax.tree.map(lambda *v: jnp.stack(v), *[taken(running, [b]) for b in batches])
    assert gap(nl.population.merge_running(apart).var, covariance(rows, 2)) < 1e-12
    apart = [
        taken(nl.population.init_cumulative(6, groups=2, dtype="float64"), [b]) for b in batches
    ]
    apart = jax.tree.map(lambda *v: jnp.stack(v), *apart)
    pooled = nl.population.merge_running(apart)
    assert gap(pooled.read(), cumulative.read()) < 1e-12
    halves = jax.tree.map(lambda v: jnp.stack([v, v]), nl.population.share_running(cumulative, 2))
    assert gap(nl.population.merge_running(halves).read(), cumulative.read()) < 1e-12


def test_co_moments_are_a_monoid(x64):
    x = array(data(30), "float64")
    parts = [comoments(v, 0, groups=2) for v in jnp.split(x, [7, 20])]
    whole = comoments(x, 0, groups=2)
    assert gap(functools.reduce(merge, parts), whole) < 1e-12
    assert gap(merge(parts[0], jax.tree.map(jnp.zeros_like, parts[0])), parts[0]) == 0
    stacked = jax.tree.map(lambda *v: jnp.concatenate(v), *parts)
    merged = merge_axes(stacked, 0)
    assert gap((merged.mean, merged.m2), (whole.mean, whole.m2)) < 1e-12
    assert gap(whole.var(), covariance(x, 2)[None]) < 1e-12
    assert gap(whole.squares, nl.moments(x, 0).m2.reshape(1, 2, 3, 1)) < 1e-12
    reduced = mappers(2)["vmap"](
        lambda _, x: nl.devices.all_reduce(comoments(x, 0, groups=2), "d")
    )((), x.reshape(2, 15, 6))
    assert gap(jax.tree.map(lambda v: v[:1], reduced.m2), whole.m2[None]) < 1e-12
    with pytest.raises(ValueError, match="CoMoments and Moments"):
        merge(whole, nl.moments(x, 0))


@pytest.mark.parametrize("policy", ["skip", "propagate", "raise"])
def test_a_bad_batch_is_what_the_policy_says(policy):
    state = nl.init_running(6, groups=2)
    bad = array(data()).at[3, 1].set(jnp.nan)

    def run():
        return whitening_norm(bad, None, state, train=True, groups=2, bad_batch=policy)[1]

    if policy == "raise":
        with pytest.raises((FloatingPointError, RuntimeError), match="the first of them 1"):
            jax.block_until_ready(run())
        return
    after = run()
    assert jnp.isfinite(after.var).all() == (policy == "skip")
    assert jnp.isfinite(after.var[1]).all()
    assert int(after.skipped) == (policy == "skip")


# The other norms, the parts and what is refused.


@pytest.mark.parametrize("channel_axis", [1, 2, -1])
def test_every_layout_is_the_same(channel_axis, x64):
    a = array(draw(0, 4, 5, 3, 6), "float64")
    moved = jnp.moveaxis(a, -1, channel_axis)
    weights = array(np.random.default_rng(0).integers(0, 3, (4, 5)), "float64")
    for norm, options in (
        (whitening_norm, {"groups": 2}),
        (switchable_whitening_norm, {"of": ("bw", "iw", "bn", "in", "ln"), "groups": 2}),
        (group_whitening_norm, {"groups": 3}),
    ):
        train = {} if norm is group_whitening_norm else {"train": True}
        run = functools.partial(norm, **options, **train)
        for w in (None, weights):
            spread = w if w is None else w[:, :, None, None]
            placed = (
                None
                if w is None
                else jnp.moveaxis(jnp.broadcast_to(spread, (4, 5, 3, 1)), -1, channel_axis)
            )
            h, found = run(a, weights=w), run(moved, weights=placed, channel_axis=channel_axis)
            h, found = (v[0] if train else v for v in (h, found))
            assert gap(jnp.moveaxis(found, channel_axis, -1), h) < 1e-11


@pytest.mark.parametrize("name", ["whitening", "group_whitening", "switchable_whitening"])
def test_parts_are_undone_and_show_the_standard_deviations(name, x64):
    a = array(draw(0, 5, 7, 6) @ draw(1, 6, 6) + 2, "float64")
    options = {"groups": 2, "whitener": "zca", "eps": 1e-12}
    norm = nl.get(name, **options)
    params, state = norm.init(nl.Site(a))
    parts, _ = norm.parts(params, state, nl.Site(a), train=True)
    h, _ = norm.apply(params, state, nl.Site(a), train=True)
    assert gap(nl.invert(parts, h), a) < 1e-9
    rows = a.reshape(5, 7, 2, 3)
    if name == "whitening":
        assert gap(parts.sigma.ravel(), rows.std((0, 1)).ravel()) < 1e-9
    if name == "group_whitening":
        assert gap(parts.sigma.ravel(), np.repeat(rows.std((1, 3)), 3)) < 1e-9
    assert parts.sigma.shape == parts.mu.shape


def test_parts_fold_into_grouped_and_transposed_kernels(x64):
    x, w = draw(0, 4, 6, 6, 4), draw(1, 3, 3, 2, 6)
    conv = nl.Conv(groups=2)
    for groups, folds in ((2, True), (1, False)):
        norm = nl.get("whitening", groups=groups)
        site = nl.Site(conv(x, w), array(x, "float64"), array(w, "float64"), linear=conv)
        params, state = norm.init(site)
        _, state = norm.apply(params, state, site, train=True)
        fold = functools.partial(
            nl.folding.fold_norm, norm, params, state, site.w, x=site.x, linear=conv
        )
        if folds:
            assert fold().error.max() < 1e-10
        else:  # its units would have to see the other half of the input
            with pytest.raises(ValueError, match="differs from its folded form"):
                fold()
    parts = MatrixParts(
        jnp.ones(6), jnp.ones(6), array(draw(2, 1, 6, 6), "float64"), jnp.full(6, 2.0), jnp.ones(6)
    )
    kernel, bias = array(draw(3, 5, 6), "float64"), array(draw(4, 6), "float64")
    for axis in (-1, 0):
        new, b = nl.folding.fold(parts, jnp.moveaxis(kernel, -1, axis), bias, unit_axis=axis)
        v = array(draw(5, 3, 5), "float64")
        expected = nl.affine(parts, v @ kernel + bias)
        assert gap(v @ jnp.moveaxis(new, axis, -1) + b, expected) < 1e-12


def test_fewer_values_than_channels_are_refused_where_nothing_else_normalizes():
    a, state = array(data(6)), nl.init_running(6, groups=1)
    with pytest.raises(ValueError, match=r"6 values per channel for groups of 6.*use more groups"):
        whitening_norm(a, None, state, train=True)
    h, _ = whitening_norm(a, None, state, train=True, bad_batch="propagate")
    assert jnp.isfinite(h).all()
    assert gap(whitening_norm(a, None, state, train=False, eps=1e-7)[0], a) < 1e-5
    assert jnp.isfinite(whitening_norm(a, train=True, groups=2)[0]).all()
    ghosts = nl.Sync(shards=8, groups=1)
    with pytest.raises(ValueError, match="8 values per channel for groups of 12"):
        whitening_norm(array(data(64, 12)), train=True, axis_name=ghosts)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a: whitening_norm(a, train=True, groups=4), "groups=4 for 6 channels"),
        (lambda a: whitening_norm(a, train=True, whitener="zac"), "did you mean 'zca'"),
        (lambda a: whitening_norm(a, train=True, steps=0), "steps=0"),
        (lambda a: whitening_norm(a[:, :5], train=True, group_size=4), "groups=1, or batch norm"),
        (lambda a: whitening_norm(a, None, nl.init_running(6), train=True), r"groups=1\)"),
        (
            lambda a: whitening_norm(a, None, nl.init_running(6, groups=2), train=True),
            r"groups=1\)",
        ),
        (
            lambda a: nl.batch_norm(a, None, nl.init_running(6, groups=2), train=True),
            "running stat",
        ),
        (lambda a: whitening_norm(a, train=False), "train=False without a state"),
        (
            lambda a: whitening_norm(a, train=True, weights=jnp.ones_like(a)),
            "differ between channels",
        ),
        (lambda a: nl.get("whitening", population="renorm").init(nl.Site(a)), "option 'groups'"),
        (lambda a: group_whitening_norm(a, groups=3), "2 values in each of 3 groups.*group norm"),
        (lambda a: group_whitening_norm(a, groups=4), "groups=4"),
        (lambda a: switchable_whitening_norm(a, train=True), r'of=\("bw", "ln"\) in a dense layer'),
        (lambda a: switchable_whitening_norm(a, train=True, of=("bw", "gn")), "'bw', 'iw'"),
        (lambda a: comoments(a, (0, 1)), "leave the last out"),
        (lambda a: comoments(a, 0, groups=4), "groups=4"),
        (lambda a: nl.affine(whitening_parts(a, train=True)[0], a[:, :4]), "matrix"),
        (lambda a: nl.affine(MatrixParts(*[jnp.ones(2)] * 5), a), "matrix"),
    ],
)
def test_what_does_not_fit_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(array(data()))


@pytest.mark.parametrize("name", ["whitening", "group_whitening", "switchable_whitening"])
def test_a_batch_of_any_size_is_exported(name):
    norm, a = nl.get(name, groups=2), array(draw(0, 8, 7, 6))
    params, state = norm.init(nl.Site(a))

    @functools.partial(jax.jit, static_argnames="train")
    def run(params, state, a, train):
        return norm.apply(params, state, nl.Site(a), train=train)

    (n,) = jax.export.symbolic_shape("n")
    for train in (True, False):
        shapes = (params, state, jax.ShapeDtypeStruct((n, 7, 6), jnp.float32))
        made = jax.export.export(jax.jit(functools.partial(run, train=train)))(*shapes)
        found = jax.export.deserialize(made.serialize()).call(params, state, a)
        assert gap(found, run(params, state, a, train)) < 2e-6
