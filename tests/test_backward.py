"""Statistics of the backward pass: MABN and PowerNorm beside NumPy, step after step."""

import functools

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
BATCHES = draw(0, 7, N, P, C, mean=0.5) * draw(1, 7, 1, 1, C, mean=1.0, scale=0.3)
COTANGENTS = draw(2, 7, N, P, C) + BATCHES
GAIN = draw(3, C, mean=1.0, scale=0.2)
MASK = np.array([1.0, 1, 0, 2, 1, 1])


def step(state, a, c, *, params=None, axis_name=None, **options):
    """h, the gradient by `a`, the state, and what the tap has seen."""

    def loss(a, taps):
        states = nl.population.tapped(state, taps)
        run = functools.partial(nl.batch_norm, train=True, eps=EPS, axis_name=axis_name)
        h, after = run(a, params, states, **options)
        return (c * h).sum(), (h, after)

    taps = nl.population.taps(state)
    (da, seen), (h, after) = jax.grad(loss, (0, 1), has_aux=True)(a, taps)
    if axis_name is not None:
        seen = nl.devices.global_gradient(seen, axis_name)
    return h, da, nl.population.take_back(after, seen), seen


def over(m, axes=(0, 1), weights=None):
    w = np.ones(N) if weights is None else weights
    return (w[:, None, None] * m).sum(axes) / (w.sum() * P)


class PowerNorm:
    """Algorithm 2 of the paper."""

    def __init__(self, decay, begin):
        self.decay, self.begin, self.step = decay, begin, 0
        self.square, self.nu = np.ones(C), np.zeros(C)

    def __call__(self, a, c, weights=None):
        w = np.ones(N) if weights is None else weights
        square = over(a**2, weights=w)
        used = square if self.step < self.begin else self.square
        psi = np.sqrt(used + EPS)
        z, g = a / psi, c * GAIN
        nu = (g * z).sum((0, 1)) / (w.sum() * P) if self.step < self.begin else self.nu
        da = (g - w[:, None, None] * nu * z) / psi
        seen = (g * z).sum((0, 1)) / (w.sum() * P)
        gamma = over(z**2, weights=w)
        self.nu = self.nu * (1 - (1 - self.decay) * gamma) + (1 - self.decay) * seen
        self.square = self.decay * self.square + (1 - self.decay) * square
        self.step += 1
        return GAIN * z, da


class MovingAverage:
    """Yan et al. 2020, in the words of their code, without its warm-up."""

    def __init__(self, size, begin, r_max, decay):
        self.size, self.begin, self.r_max, self.decay = size, begin, r_max, decay
        self.squares, self.products, self.ema, self.mass = [], [], np.ones(C), 0.0

    def __call__(self, a, c, weights=None):
        assert weights is None
        self.squares = [*self.squares, over(a**2)][-self.size :]
        chi = np.sqrt(np.mean(self.squares, 0) + EPS)
        known = self.count() >= self.begin
        r = np.clip(chi / np.sqrt(self.ema + EPS), 1 / self.r_max, self.r_max) if known else 1.0
        z = a / chi
        g = c * GAIN * r
        self.products = [*self.products, over(g * z)][-self.size :]
        da = (g - z * np.mean(self.products, 0)) / chi
        self.mass = self.decay * self.mass + 1 - self.decay
        rate = (1 - self.decay) / self.mass
        self.ema = self.ema + rate * (np.mean(self.squares, 0) - self.ema)
        self.steps = self.count() + 1
        return GAIN * r * z, da

    def count(self):
        return getattr(self, "steps", 0)


KINDS = {
    "power": (
        nl.population.init_power(C, decay=0.8, begin=2, debias=False),
        lambda: PowerNorm(0.8, 2),
    ),
    "mabn": (
        nl.population.init_mabn(C, size=3, begin=4, r_max=1.05, decay=0.7),
        lambda: MovingAverage(3, 4, 1.05, 0.7),
    ),
}
each = pytest.mark.parametrize("name", KINDS)


@each
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_both_passes_are_the_papers(name, first):
    state, make = KINDS[name]
    oracle, params = make(), nl.Affine(array(GAIN), None)
    options = {"channel_axis": 1} if first else {}
    run = jax.jit(functools.partial(step, params=params, **options))
    place = (lambda v: np.moveaxis(v, -1, 1)) if first else (lambda v: v)
    for a, c in zip(BATCHES, COTANGENTS, strict=True):
        h, da, after, _ = run(state, array(place(a)), array(place(c)))
        expected = oracle(a, c)
        assert gap((h, da), [place(v) for v in expected]) < 1e-5
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
        state = after
    h, _ = nl.batch_norm(array(BATCHES[0]), None, state, train=False, eps=EPS)
    square = oracle.square if name == "power" else oracle.ema
    assert gap(h, BATCHES[0] / np.sqrt(square + EPS)) < 1e-5


@each
def test_what_weighs_nothing_is_in_neither_pass(name):
    state = KINDS[name][0]
    for a, c in zip(BATCHES[:3], COTANGENTS, strict=False):
        state = step(state, array(a), array(c))[2]
    a, c = array(BATCHES[3]), array(COTANGENTS[3]).at[2].set(0)
    weights = jnp.asarray(MASK > 0, jnp.float32)
    masked = step(state, a.at[2].set(jnp.nan), c, weights=weights)
    fewer = step(state, jnp.delete(a, 2, 0), jnp.delete(c, 2, 0))
    kept = np.delete(np.arange(N), 2)
    assert gap((masked[0][kept], masked[1][kept]), fewer[:2]) < 1e-5
    assert gap(masked[2:], fewer[2:]) < 1e-5
    assert jnp.isfinite(masked[1]).all()
    if name == "power":
        oracle = KINDS[name][1]()
        oracle.step, oracle.square, oracle.nu = (
            9,
            *(np.asarray(v, np.float64) for v in (state.inner.var, state.nu)),
        )
        found = step(state, a, c, params=nl.Affine(array(GAIN), None), weights=array(MASK))
        assert gap(found[:2], oracle(BATCHES[3], np.asarray(c), MASK)) < 1e-5
        assert gap(found[2].nu, oracle.nu) < 1e-5


@each
@pytest.mark.parametrize("way", ["pmap", "shard_map", "shard_map, check_vma=False", "vmap"])
def test_devices_are_one_batch(name, way):
    state = KINDS[name][0]
    for a, c in zip(BATCHES[:3], COTANGENTS, strict=False):
        state = step(state, array(a), array(c))[2]
    a, c = (array(v[3]).reshape(2, N // 2, P, C) for v in (BATCHES, COTANGENTS))

    def run(state, shard):
        return step(state, *shard, axis_name="d")

    h, da, after, seen = mappers(2)[way](run)(state, (a, c))
    whole = step(state, a.reshape(N, P, C), c.reshape(N, P, C))
    assert gap((h.reshape(N, P, C), da.reshape(N, P, C)), whole[:2]) < 1e-5
    assert gap(jax.tree.map(lambda v: v[0], (after, seen)), whole[2:]) < 1e-5


@each
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_plain_jit_on_a_mesh(name, kind):
    state = step(KINDS[name][0], array(BATCHES[0]), array(COTANGENTS[0]))[2]
    a, c = array(BATCHES[1]), array(COTANGENTS[1])
    expected = step(state, a, c)
    with jax.set_mesh(mesh(kind, d=2)):
        split = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("d"))
        found = jax.jit(step)(state, jax.device_put(a, split), jax.device_put(c, split))
    assert gap(found, expected) < 1e-5


@each
def test_a_step_that_is_bad_and_one_that_is_not_taken_back(name):
    state = step(KINDS[name][0], array(BATCHES[0]), array(COTANGENTS[0]))[2]
    bad = array(BATCHES[1]).at[0, 0, 0].set(jnp.nan)
    _, _, after, _ = step(state, bad, array(COTANGENTS[1]))
    skipped = after.inner if name == "power" else after
    assert int(skipped.skipped) == 1
    assert gap(after.read(), state.read()) == 0
    assert (
        gap(after.nu if name == "power" else after.gz, state.nu if name == "power" else state.gz)
        == 0
    )
    tree = {"norm": state, "other": (nl.init_running(C), ())}
    taps = nl.population.taps(tree)
    assert [v.shape for v in jax.tree.leaves(taps)] == [(C,), (C,)]
    same = nl.population.take_back(nl.population.tapped(tree, taps), taps)
    assert jax.tree.structure(same) == jax.tree.structure(tree)
    with pytest.raises(ValueError, match=r'taps: got a tree without backward.*population="mabn"'):
        nl.population.taps(tree["other"])
    # Derivatives of the gradient are those of what was computed.
    a, c, v = array(BATCHES[2]), array(COTANGENTS[2]), array(draw(9, N, P, C))
    grad = jax.jit(
        jax.grad(
            lambda a: jnp.tanh(c * nl.batch_norm(a, None, state, train=True, eps=EPS)[0]).sum()
        )
    )
    forward = jax.jvp(grad, (a,), (v,))[1]
    reverse = jax.vjp(lambda a: (grad(a) * v).sum(), a)
    differences = (grad(a + 1e-2 * v) - grad(a - 1e-2 * v)) / 2e-2
    assert gap(forward, differences) < 2e-3
    assert jnp.isfinite(reverse[1](jnp.ones(()))[0]).all()


def test_steps_in_a_scan_with_an_update_in_a_transaction():
    def one(state, batch):
        _, da, state, _ = step(state, *batch)
        return state, da

    for state, _ in KINDS.values():
        batches = array(BATCHES), array(COTANGENTS)
        after, _ = jax.lax.scan(one, state, batches)
        expected = state
        for a, c in zip(*batches, strict=True):
            expected, _ = one(expected, (a, c))
        assert gap(after, expected) < 1e-5
        pending = nl.population.begin(after)
        _, _, pending, _ = step(pending, batches[0][0], batches[1][0])
        done = nl.population.commit(pending)
        assert jax.tree.structure(done) == jax.tree.structure(after)
        assert gap(done.read()[1], after.read()[1]) > 1e-4


@pytest.mark.parametrize("name", ["batch", "layer", "scale"])
def test_a_tap_is_an_instrument_in_any_norm(name):
    """The means of ∂L/∂z and of ∂L/∂z · z, and nothing changes."""
    norm, a, c = nl.get(name), array(BATCHES[0]), array(COTANGENTS[0])
    params, state = norm.init(nl.Site(a))
    params = params._replace(g=2 * params.g)

    def loss(seen, a):
        parts, _ = norm.parts(params, state, nl.Site(a), train=True)
        seen = nl.instruments.tap(parts) if seen is None else seen
        h = nl.affine(nl.instruments.tapped(parts, seen, a), a)
        return (c * h).sum(), (parts, h)

    parts, _ = norm.parts(params, state, nl.Site(a), train=True)
    seen, (parts, h) = jax.grad(loss, has_aux=True)(nl.instruments.tap(parts), a)
    plain = norm.apply(params, state, nl.Site(a), train=True)[0]
    assert gap(h, plain) == 0
    mu, sigma, g, _ = (np.asarray(v, np.float64) for v in parts)
    axes = tuple(i for i, n in enumerate(seen.g.shape) if n == 1)
    z, given = (BATCHES[0] - mu) / sigma, COTANGENTS[0] * g
    expected = given.mean(axes, keepdims=True), (given * z).mean(axes, keepdims=True)
    assert gap(seen, expected) < 1e-5


@each
def test_either_skin_takes_back(name):
    """linen's collection is a tree of states; in nnx a filter finds the taps."""
    a, c = array(BATCHES[0]), array(COTANGENTS[0])
    params, options = nl.init_affine(C), {"momentum": 0.8, "epsilon": EPS, "population": name}
    expected = nl.population.init_population(name, C, decay=0.8)
    layer = nll.BatchNorm(use_running_average=False, **options)
    variables = layer.init(jax.random.key(0), a)
    stats, module = variables["batch_stats"], nlx.BatchNorm(C, **options, rngs=nnx.Rngs(0))

    def in_linen(taps, stats):
        given = {**variables, "batch_stats": nl.population.tapped(stats, taps)}
        h, after = layer.apply(given, a, mutable="batch_stats")
        return (c * h).sum(), after["batch_stats"]

    taps = nnx.DiffState(0, lambda path, _: "tap" in path)
    in_nnx = nnx.grad(lambda module: (c * module(a)).sum(), argnums=taps)
    for _ in range(3):
        _, _, expected, _ = step(expected, a, c, params=params)
        seen, stats = jax.grad(in_linen, has_aux=True)(nl.population.taps(stats), stats)
        stats = nl.population.take_back(stats, seen)
        seen, kept = in_nnx(module)["population"]["tap"], module.population
        seen = nl.population.Tap(*(seen[field].get_value() for field in ("gz", "zz")))
        kept.set_value(nl.population.take_back(kept.get_value(), seen))
    assert gap(jax.tree.leaves(stats), jax.tree.leaves(expected)) < 1e-5
    assert gap(module.population.get_value(), expected) < 1e-5
