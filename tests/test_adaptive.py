"""Populations that decide what batch norm normalizes with: beside NumPy, batch after batch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import normlab as nl
import normlab.linen as nll
import normlab.nnx as nlx
from tests.helpers import array, draw, gap, mappers, mesh

N, P, C, EPS = 6, 2, 3, 1e-5
BATCHES = draw(0, 5, N, P, C, mean=1.5, scale=2.0) * draw(1, 5, 1, 1, C, mean=1.0, scale=0.3)
MASK = np.array([1.0, 1, 0, 2, 1, 1])
init = nl.population.init_population


def moments(a, weights=None):
    """Count, mean and variance per channel in NumPy."""
    a = np.asarray(a, np.float64)
    w = np.ones(a.shape[:1]) if weights is None else weights
    w = np.broadcast_to(w.reshape(-1, *(1,) * (a.ndim - 1)), (*a.shape[:-1], 1))
    axes = tuple(range(a.ndim - 1))
    mean = (w * a).sum(axes) / w.sum()
    return w.sum(), mean, (w * (a - mean) ** 2).sum(axes) / w.sum()


def trained(state, batches=BATCHES, **options):
    """The outputs and the state, the batches in one scan."""

    def step(state, a):
        h, state = nl.batch_norm(a, None, state, train=True, eps=EPS, **options)
        return state, h

    state, h = jax.lax.scan(step, state, array(batches))
    return h, state


# Prior.


def mixed(a, source, count, estimator, weights=None):
    """(N·source + n·batch)/(N + n), n in examples; and the part between the means."""
    n, mean, var = moments(a, weights)
    share = 0 if np.isinf(count) else n / a[0, ..., 0].size / (count + n / a[0, ..., 0].size)
    mu = (1 - share) * source[0] + share * mean
    square = (1 - share) * source[1] + share * var
    if estimator == "pooled":
        square = square + share * (1 - share) * (mean - source[0]) ** 2
    return (a - mu) / np.sqrt(square + EPS)


SOURCE = trained(nl.init_running(C))[1]
KNOWN = tuple(np.asarray(v, np.float64) for v in SOURCE.read())


@pytest.mark.parametrize("count", [0.0, 4.0, np.inf])
@pytest.mark.parametrize("estimator", ["within", "pooled"])
@pytest.mark.parametrize("weights", [None, MASK], ids=["all", "weighted"])
def test_prior_mixes_source_and_batch(count, estimator, weights):
    state = nl.population.adapt(SOURCE, count, estimator=estimator)
    a = 3 * BATCHES[0] + 1
    given = {} if weights is None else {"weights": array(weights)}
    run = jax.jit(functools.partial(nl.batch_norm, train=False, eps=EPS, **given))
    h, after = run(array(a), None, state)
    assert gap(h, mixed(a, KNOWN, count, estimator, weights)) < 3e-6
    assert all(map(np.array_equal, jax.tree.leaves(after), jax.tree.leaves(state)))
    assert gap(state.read(), SOURCE.read()) == 0
    first, _ = nl.batch_norm(
        array(np.moveaxis(a, -1, 1)), None, state, train=False, eps=EPS, channel_axis=1, **given
    )
    assert gap(np.moveaxis(first, 1, -1), h) < 3e-6
    frozen, _ = nl.batch_norm(
        array(a), None, nl.population.freeze(state), train=True, eps=EPS, **given
    )
    assert gap(frozen, h) < 3e-6
    plain = nl.batch_norm(array(a), None, SOURCE, train=True, eps=EPS, **given)
    ours = nl.batch_norm(array(a), None, state, train=True, eps=EPS, **given)
    assert gap((ours[0], ours[1].inner), plain) == 0  # training is the source's, to the bit


@pytest.mark.parametrize("way", ["pmap", "shard_map", "vmap"])
@pytest.mark.parametrize("sync", ["d", nl.Sync("d", groups=2)], ids=["all", "groups"])
def test_priors_batch_is_that_of_its_devices(way, sync):
    state = nl.population.adapt(SOURCE, 4.0)
    shards = BATCHES[:4] + np.arange(4).reshape(-1, 1, 1, 1)

    def run(state, a):
        return nl.batch_norm(a, None, state, train=False, eps=EPS, axis_name=sync)[0]

    h = mappers(4)[way](run)(state, array(shards))
    size = 4 if sync == "d" else 2
    groups = shards.reshape(4 // size, size * N, P, C)
    expected = np.stack([mixed(a, KNOWN, 4.0, "within") for a in groups]).reshape(h.shape)
    assert gap(h, expected) < 3e-6


def test_prior_of_what_cannot_be_used_is_the_source():
    """A masked batch, a single value, and, for one that counts for nothing, a NaN."""
    state, a = nl.population.adapt(SOURCE, 4.0), array(BATCHES[0])
    expected = nl.batch_norm(a, None, SOURCE, train=False)[0]
    h, _ = nl.batch_norm(a, None, state, train=False, weights=jnp.zeros(N))
    assert gap(h, expected) < 1e-6
    whole = nl.population.adapt(state, np.inf)
    h, _ = nl.batch_norm(a.at[0, 0, 0].set(jnp.nan), None, whole, train=False)
    assert gap(h[1:], expected[1:]) < 1e-6
    h, _ = nl.batch_norm(a[:1, 0], None, state, train=False, eps=EPS)
    assert gap(h, mixed(BATCHES[0][:1, 0], KNOWN, 4.0, "within")) < 3e-6
    nothing = nl.population.adapt(state, 0.0)
    h, _ = nl.batch_norm(a, None, nothing, train=False, weights=jnp.zeros(N))
    assert gap(h, np.zeros(h.shape)) == 0


def test_what_holds_another_asks_it_how_the_batch_is_observed():
    """A prior counts examples, and domains measure their own, also about zero."""
    a = array(BATCHES[0])
    inside = nl.population.init_rms(C, inner="prior", count=4.0)
    outside = [nl.population.adapt(init(name, C), 4.0) for name in ("rms", "power", "mabn")]
    both = [nl.batch_norm(a, None, s, train=False, eps=EPS)[0] for s in (inside, *outside)]
    square = (4 * 1 + N * (BATCHES[0] ** 2).mean((0, 1))) / (4 + N)
    for h in both:
        assert gap(h, BATCHES[0] / np.sqrt(square + EPS)) < 2e-6
    alone = nl.population.adapt(nl.population.init_rms(C), 4.0, by_example=True)
    h, _ = nl.batch_norm(a, None, alone, train=False, eps=EPS)
    square = (4 + (BATCHES[0] ** 2).mean(1, keepdims=True)) / 5
    assert gap(h, BATCHES[0] / np.sqrt(square + EPS)) < 2e-6
    state = nl.population.init_rms(C, inner="domains", examples=N)
    state = nl.population.select_domain(state, jnp.arange(N) % 2)
    h, _ = nl.batch_norm(a, None, state, train=True, eps=EPS)
    for d in (0, 1):
        own = BATCHES[0][d::2]
        assert gap(h[d::2], own / np.sqrt((own**2).mean((0, 1)) + EPS)) < 2e-6


def test_networks_are_adapted_by_path_and_in_flax():
    def net(average):
        kinds = ("debiased", "cumulative")
        return nn.Sequential([nll.BatchNorm(average, population=kind) for kind in kinds])

    a = array(BATCHES[0])
    variables = net(True).init(jax.random.key(0), a)
    stats = nl.population.adapt(variables["batch_stats"], 0.0)
    h = net(True).apply({**variables, "batch_stats": stats}, a)
    assert gap(h, net(False).apply(variables, a, mutable="batch_stats")[0]) < 1e-5
    some = nl.population.adapt(variables["batch_stats"], 2, rule=lambda path: "layers_0" in path)
    kinds = [type(s).__name__ for s in jax.tree.leaves(some, is_leaf=lambda v: hasattr(v, "read"))]
    assert kinds == ["Prior", "Cumulative"]
    layer = nlx.BatchNorm(C, population="prior", rngs=nnx.Rngs(0))
    assert gap(layer(a), nl.batch_norm(a, None, (), train=True)[0]) < 1e-5
    expected = nl.batch_norm(a, None, layer.population.get_value(), train=False)[0]
    assert gap(layer(a, use_running_average=True), expected) < 1e-6
    with pytest.raises(ValueError, match=r"adapt: got count=-1.*use 0 for the batch's"):
        nl.population.adapt(SOURCE, -1)
    with pytest.raises(ValueError, match=r"adapt: got a rule for 'b'"):
        nl.population.adapt({"a": SOURCE}, rule="b")


def test_virtual_batch_norm_is_the_reference_batch_and_the_example():
    """Salimans et al. 2016: weights B/(B + 1) and 1/(B + 1), with the reference's gradient."""
    reference, a = BATCHES[0], BATCHES[1]
    state = nl.population.init_prior(C, count=N, estimator="pooled", by_example=True, decay=0.0)

    def ours(reference, a):
        h, kept = nl.batch_norm(reference, None, state, train=True, eps=EPS, state_gradient=True)
        return h, nl.batch_norm(a, None, kept, train=False, eps=EPS)[0]

    def paper(reference, a):
        mean, square = reference.mean((0, 1)), (reference**2).mean((0, 1))
        own = a.mean(1, keepdims=True), (a**2).mean(1, keepdims=True)
        mu, power = ((N * r + o) / (N + 1) for r, o in zip((mean, square), own, strict=True))
        h = (reference - mean) / jnp.sqrt(square - mean**2 + EPS)
        return h, (a - mu) / jnp.sqrt(power - mu**2 + EPS)

    both = array(reference), array(a)
    assert gap(ours(*both), paper(*both)) < 1e-5
    c = array(draw(3, N, P, C))
    grads = [
        jax.grad(lambda r, a, f=f: (c * f(r, a)[1]).sum(), (0, 1))(*both) for f in (ours, paper)
    ]
    assert gap(*grads) < 2e-5


# Streaming.


def test_streaming_is_the_normalization_of_observations():
    """As Stable-Baselines3's VecNormalize: RunningMeanStd, taken in before it is normalized by."""
    mean, var, count = np.zeros(C), np.ones(C), 1e-4
    expected = []
    for a in BATCHES:
        n, m, v = moments(a)
        delta, total = m - mean, count + n
        var = (var * count + v * n + delta**2 * count * n / total) / total
        mean, count = mean + delta * n / total, total
        expected.append((a - mean) / np.sqrt(var + EPS))
    h, state = trained(nl.population.init_streaming(C))
    assert gap(h, np.stack(expected)) < 5e-6
    assert gap(state.read(), (mean, var)) < 2e-6
    one = array(BATCHES[0][:1, 0])  # a single environment
    h, _ = nl.batch_norm(one, None, nl.population.init_streaming(C), train=True)
    assert gap(h, np.zeros(one.shape)) < 0.1
    grad = jax.grad(lambda a: nl.batch_norm(a, None, state, train=True, eps=EPS)[0].sum())
    after = nl.batch_norm(array(BATCHES[0]), None, state, train=True)[1]
    assert (
        gap(
            grad(array(BATCHES[0])),
            np.broadcast_to(1 / np.sqrt(np.asarray(after.read()[1]) + EPS), (N, P, C)),
        )
        < 1e-6
    )


@pytest.mark.parametrize("way", ["pmap", "shard_map", "vmap"])
def test_streaming_over_devices_is_one_stream(way):
    def run(state, a):
        return nl.batch_norm(a, None, state, train=True, eps=EPS, axis_name="d")

    shards = array(BATCHES[:4])
    h, states = mappers(4)[way](run)(nl.population.init_streaming(C), shards)
    one = nl.batch_norm(shards.reshape(-1, P, C), None, nl.population.init_streaming(C), train=True)
    assert gap(h.reshape(one[0].shape), one[0]) < 5e-6
    assert gap(jax.tree.map(lambda v: v[0], states).read(), one[1].read()) < 5e-6


def test_streaming_may_look_before_it_takes_in():
    """An example at a time, with a forgetting average: online normalization's forward pass."""
    online = {"after": False, "inner": "ema", "decay": 0.8, "estimator": "pooled"}
    h, state = trained(nl.population.init_streaming(C, **online), BATCHES[:, :1])
    mean, var = np.zeros(C), np.ones(C)
    for a, ours in zip(BATCHES[:, 0], h, strict=True):
        assert gap(ours[0], (a - mean) / np.sqrt(var + EPS)) < 2e-6
        between = 0.2 * 0.8 * (a.mean(0) - mean) ** 2
        mean, var = 0.8 * mean + 0.2 * a.mean(0), 0.8 * var + 0.2 * a.var(0) + between
    assert gap(state.read(), (mean, var)) < 2e-6
    with pytest.raises(ValueError, match=r"streaming: got count=1.0 with statistics of type Runn"):
        nl.population.init_streaming(C, count=1.0, inner="ema")


# Window.


@pytest.mark.parametrize("name", ["window", "rms"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_window_is_batch_norm_on_the_last_batches_together(name, size):
    """The output, and the gradient by the last batch, the others held."""
    options = {"size": size} if name == "window" else {"inner": "window", "size": size}
    h, state = trained(init(name, C, **options))

    def oracle(a, before):
        whole = jnp.concatenate([*before, a])
        mean = whole.mean((0, 1)) if name == "window" else 0
        return (a - mean) / jnp.sqrt(((whole - mean) ** 2).mean((0, 1)) + EPS)

    for i, ours in enumerate(h):
        before = array(BATCHES[max(0, i - size + 1) : i]).reshape(-1, N, P, C)
        assert gap(ours, oracle(array(BATCHES[i]), before)) < 5e-6
    whole = BATCHES[-size:].reshape(-1, C)
    expected = (
        (whole.mean(0), whole.var(0)) if name == "window" else (0 * whole[0], (whole**2).mean(0))
    )
    assert gap(state.read(), expected) < 2e-6
    c, before = array(draw(4, N, P, C)), array(BATCHES[5 - size + 1 :]).reshape(-1, N, P, C)
    new = array(draw(5, N, P, C, mean=1.0))
    ours = jax.grad(lambda a: (c * nl.batch_norm(a, None, state, train=True, eps=EPS)[0]).sum())
    assert gap(ours(new), jax.grad(lambda a: (c * oracle(a, before)).sum())(new)) < 5e-6


def test_a_window_weighs_its_batches_and_leaves_bad_ones_out():
    bad = BATCHES[1].copy()
    bad[0, 0, 0] = np.nan
    _, state = trained(nl.population.init_window(C, size=3), [BATCHES[0], bad])
    h, state = nl.batch_norm(
        array(BATCHES[2]), None, state, train=True, eps=EPS, weights=array(MASK)
    )
    weights = np.concatenate([np.ones(N), MASK])
    _, mean, var = moments(np.concatenate([BATCHES[0], BATCHES[2]]), weights)
    assert gap(h, (BATCHES[2] - mean) / np.sqrt(var + EPS)) < 3e-6
    assert (int(state.updates), int(state.skipped)) == (2, 1)
    one = array(BATCHES[0][:1, 0])
    h, _ = nl.batch_norm(one, None, state, train=True)  # one value, among others
    assert np.abs(h).max() > 0.1
    with pytest.raises(ValueError, match="one value per channel"):
        nl.batch_norm(one, None, nl.population.init_window(C, size=1), train=True)
    with pytest.raises(ValueError, match=r"window: got decay=0.5.*init_running"):
        nl.batch_norm(one, None, state, train=True, decay=0.5)


@pytest.mark.parametrize("name", ["prior", "virtual", "streaming", "window", "rms"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_plain_jit_on_a_mesh_changes_nothing(name, kind):
    virtual = name == "virtual"
    state = nl.population.init_prior(C, by_example=True) if virtual else init(name, C)
    a = array(draw(0, 8, P, C, mean=1.0))

    @jax.jit
    def run(a, state):
        h, state = nl.batch_norm(a, None, state, train=True, axis_name="d")
        return h, state, nl.batch_norm(a, None, state, train=False, axis_name="d")[0]

    expected = jax.tree.map(np.asarray, jax.vmap(run, (0, None), axis_name="d")(a[None], state))
    with jax.set_mesh(mesh(kind, d=2)):
        spread = jax.device_put(a, jax.NamedSharding(jax.sharding.get_mesh(), jax.P("d")))
        found = run(spread, state)
    assert gap(found, jax.tree.map(lambda v: v[0], expected)) < 5e-6


@pytest.mark.parametrize("name", ["prior", "streaming", "window", "rms"])
def test_wide_statistics_stay_wide(name, x64):
    state = init(name, C, dtype="float64")
    for dtype in (jnp.float64, jnp.float32):
        h, after = nl.batch_norm(jnp.asarray(BATCHES[0], dtype), None, state, train=True)
        nl.batch_norm(jnp.asarray(BATCHES[0], dtype), None, after, train=False)
        assert h.dtype == dtype
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    narrow = init(name, C)
    nl.batch_norm(jnp.asarray(BATCHES[0]), None, narrow, train=False)
    nl.batch_norm(jnp.asarray(BATCHES[0]), None, narrow, train=True)


# Cross-iteration.

LAYERS = {
    "dense": (nl.Dense(), (6, 2, 4), (4, C)),
    "groups": (nl.Conv(strides=2, groups=3), (3, 5, 5, 6), (3, 2, 2, C)),
    "first": (nl.Conv(padding="VALID", channel_axis=1), (4, 2, 5, 4), (2, 3, 2, C)),
}


def steps(layer, weights=None, moves=0.3):
    """Each step's site in float64, with weights that move."""
    linear, x, w = LAYERS[layer]
    for i in range(5):
        inputs = jnp.asarray(draw(i, *x, mean=0.5))
        kernel = jnp.asarray(draw(20, *w) + moves * draw(30 + i, *w))
        yield nl.Site(linear(inputs, kernel), inputs, kernel, weights, linear)


def paper(sites, size, weights=None):
    """Yao et al. 2021, equations 6 to 11: ν is the mean of a², Δ by the derivatives by w."""
    site, w = sites[-1], None if weights is None else jnp.asarray(weights)
    channel = site.linear.channel_axis % site.a.ndim

    def mean(a):
        a = jnp.moveaxis(a, channel, -1)
        share = jnp.ones(len(a)) if w is None else w
        share = share.reshape(-1, *(1,) * (a.ndim - 1)) / share.sum()
        return (share * a).sum(0).reshape(-1, C).mean(0)

    def compensated(old, power):
        f = lambda w: mean(old.linear(old.x, w) ** power)  # noqa: E731
        return f(old.w) + (jax.jacobian(f)(old.w) * (site.w - old.w)).sum(range(1, old.w.ndim + 1))

    held = sites[-size:]
    mu = jnp.stack([compensated(s, 1) for s in held])
    nu = jnp.maximum(jnp.stack([compensated(s, 2) for s in held]), mu**2)
    middle, var = mu.mean(0), nu.mean(0) - mu.mean(0) ** 2
    shape = [-1 if i == channel else 1 for i in range(site.a.ndim)]
    return (site.a - middle.reshape(shape)) / jnp.sqrt(var.reshape(shape) + EPS)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_iteration_is_the_papers(layer, weighted, x64):
    count = LAYERS[layer][1][0]
    weights = jnp.asarray([*range(1, count), 0], jnp.float64) if weighted else None
    norm, sites, state = nl.get("cross_iteration", size=3, use_gain=False, use_bias=False), [], None
    run = jax.jit(functools.partial(norm.apply, None, train=True))
    for site in steps(layer, weights):
        state = norm.init(site)[1] if state is None else state
        sites.append(site)
        h, after = run(state, site)
        assert gap(h, paper(sites, 3, weights)) < 1e-10
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        state = after
    assert state.patch.shape == (2, *site.w.shape)


def test_cross_iteration_where_the_weights_rest_is_a_window(x64):
    """To the same gradient; a batch that is bad, or empty, is left out."""
    norm = nl.get("cross_iteration", size=3, use_gain=False, use_bias=False)
    state, window = None, nl.population.init_window(C, size=3, dtype="float64")

    def slope(run, state):
        return jax.grad(lambda a: jnp.tanh(run(a, state)[0]).sum())

    for i, site in enumerate(steps("dense", moves=0.0)):
        state = norm.init(site)[1] if state is None else state
        if i == 3:
            bad = site._replace(a=site.a.at[0, 0, 0].set(jnp.nan), x=site.x.at[0].set(jnp.nan))
            for other in (bad, site._replace(weights=jnp.zeros(6))):
                after = norm.apply(None, state, other, train=True)[1]
                assert gap(after[1:], state[1:]) == 0
        ours = slope(lambda a, s: norm.apply(None, s, site._replace(a=a), train=True), state)  # noqa: B023
        plain = slope(lambda a, s: nl.batch_norm(a, None, s, train=True), window)
        assert gap(ours(site.a), plain(site.a)) < 1e-8
        h, state = norm.apply(None, state, site, train=True)
        expected, window = nl.batch_norm(site.a, None, window, train=True)
        assert gap(h, expected) < 1e-10
    frozen = nl.population.freeze(state)
    h, after = norm.apply(None, frozen, site, train=True)
    assert gap((h, after), (norm.apply(None, state, site, train=False)[0], frozen)) < 1e-10


@pytest.mark.parametrize("way", ["pmap", "shard_map", "shard_map, check_vma=False", "vmap"])
def test_cross_iteration_over_devices_is_one_batch(way):
    one, over = (nl.get("cross_iteration", size=2, axis_name=name) for name in (None, "d"))
    sites = [jax.tree.map(lambda v: array(v), site) for site in steps("dense")][:3]
    params, state = one.init(sites[0])
    mapper, other = mappers(2)[way], state
    for site in sites:
        expected, state = one.apply(params, state, site, train=True)

        def run(given, x, w=site.w):
            params, state = given
            h, after = over.apply(params, state, nl.Site(x @ w, x, w), train=True)
            return h, after

        h, others = mapper(run)((params, other), site.x.reshape(2, 3, *site.x.shape[1:]))
        other = jax.tree.map(lambda v: v[0], others)
        assert gap((h.reshape(expected.shape), other), (expected, state)) < 1e-5
    with pytest.raises(ValueError, match="cross-iteration batch norm: got axis_name=Sync"):
        nl.get("cross_iteration", axis_name=nl.Sync("d", groups=2))
    with pytest.raises(ValueError, match="a site without w"):
        one.init(nl.Site(sites[0].a))
