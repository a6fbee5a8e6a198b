"""As JAX is run: exported with symbolic sizes, with its debug flags, without promotion of ranks."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

import normlab as nl
from tests.cases import CASES, KINDS
from tests.helpers import array, draw, gap

C = 4
POPULATIONS = ("debiased", "ema", "cumulative", "renorm", "domains", "frozen", "batch")


def populations():
    """Every kind of state of batch norm, in and out of a transaction."""
    states = {name: nl.population.init_population(name, C) for name in POPULATIONS}
    examples = nl.population.init_domains(C, examples=4)
    states["domain of each"] = nl.population.select_domain(examples, jnp.array([0, 1, 1, 0]))
    states["delayed"] = nl.population.init_delayed(C)
    return states | {
        f"{name}, pending": nl.population.begin(states[name])
        for name in ("debiased", "renorm", "domains")
    }


# Symbolic sizes.


def exported(f, *shapes):
    """`f` exported for shapes of symbols, through bytes and back."""
    # What a convolution without padding asks.
    scope = export.SymbolicScope([f"{n} >= 2" for n in "hw" if any(n in s for s in shapes)])
    arguments = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), jnp.float32)
        for shape in shapes
    ]
    there = export.export(jax.jit(f))(*arguments)
    return export.deserialize(there.serialize()).call


# Data-dependent initialization needs values, and JAX exports no host callback.
SYMBOLIC = [case for case in KINDS if not {"data_init", "bad_batch"} & case.options.keys()]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", SYMBOLIC, ids=lambda case: case.label)
def test_a_norm_is_exported_with_batch_and_positions_symbolic(case, train):
    case = case._replace(weights=None)
    x, w, params = case.values()
    _, state = case.init(x, w)
    channel = case.linear.channel_axis % x.ndim
    symbols = iter(("b", "2*h", "w"))
    shape = ", ".join(str(n) if i == channel else next(symbols) for i, n in enumerate(x.shape))
    x = jnp.concatenate([x, x], 1) if x.ndim > 2 and channel != 1 else x
    x = jnp.concatenate([x, x], 2) if channel == 1 and x.ndim > 2 else x

    def f(x):
        def loss(x):
            site = nl.Site(case.linear(x, w), x, w, None, case.linear)
            h, after = case.norm.apply(params, state, site, train=train)
            return jnp.sin(h).sum(), (h, after)

        return jax.grad(loss, has_aux=True)(x)

    assert gap(jax.tree.leaves(exported(f, shape)(x)), jax.tree.leaves(f(x))) < 2e-5


@pytest.mark.parametrize("name", populations())
def test_a_state_is_exported_with_the_batch_symbolic(name):
    state = populations()[name]
    shape = "4, t, 4" if name == "domain of each" else "b, t, 4"
    x = array(draw(0, 4, 3, C))

    @jax.jit
    def f(x, state):
        sync = nl.Sync("d", every=1) if name == "delayed" else None
        run = lambda x: nl.batch_norm(x, None, state, train=True, axis_name=sync)  # noqa: E731
        return jax.vmap(run, axis_name="d")(x[None]) if sync else run(x)

    spec = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
    there = export.deserialize(export.export(f)(spec, state).serialize())
    h, after = there.call(x, state)
    assert jax.tree.structure(after) == jax.tree.structure(f(x, state)[1])
    assert gap((h, after), f(x, state)) < 2e-5


@pytest.mark.parametrize(
    "tree",
    [
        nl.Parts(*map(jnp.float32, (0, 1, 1, 0))),
        nl.moments(jnp.arange(4.0), 0),
        nl.Site(jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((4, 3))),
        nl.Site(jnp.ones((2, 3)), linear=nl.Conv(strides=(2,), padding=((1, 0),), channel_axis=1)),
        nl.Sync(("i", "j"), groups=((0, 2), (1,)), gradient="forward"),
        nl.init_running(2, decay=0.99, ddof=1),
        nl.population.init_cumulative(2, estimator="within"),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_a_spec_comes_back_from_bytes(tree):
    there = export.export(jax.jit(lambda tree: (tree, jnp.zeros(()))))(tree)
    back, _ = export.deserialize(there.serialize()).call(tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)


# Debug flags: what is no fault raises nothing.

MASKED = [c for c in CASES if c.name in ("batch", "layer", "rms", "group", "instance")]


@contextlib.contextmanager
def flags():
    """Both debug flags, and no promotion of ranks."""
    with jax.debug_nans(True), jax.debug_infs(True), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("mode", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(
    "case", {c.name: c for c in reversed(MASKED) if c.weights is None}.values(), ids=lambda c: c[0]
)
def test_a_fully_masked_layer_is_no_fault(case, mode):
    """Nor is an example of it, nor a constant one; under grad too. A NaN that counts is one."""
    x, w, params = case.values()
    a = case.linear(x, w)
    _, state = case.init(x, w)

    def f(a, weights):
        site = nl.Site(a, weights=weights, linear=case.linear)
        h, _ = case.norm.apply(params, state, site, train=True)
        return jnp.square(h).sum()

    some = jnp.ones(len(a)).at[0].set(0)
    with flags():
        assert (mode(jax.grad(f))(a, 0 * some) == 0).all()
        assert jnp.isfinite(mode(jax.grad(f))(a.at[1].set(1.0), some)).all()
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        mode(f)(a.at[1].set(jnp.nan), some)


@pytest.mark.parametrize("name", populations())
def test_a_state_of_what_is_masked_is_no_fault(name):
    x, state = array(draw(1, 4, 3, C)), populations()[name]
    sync = nl.Sync("d", every=1) if name == "delayed" else None

    def f(x, state, weights):
        _, state = nl.batch_norm(x, None, state, train=True, weights=weights, axis_name=sync)
        return state

    run = jax.vmap(f, (0, None, None), axis_name="d") if sync else f
    x = x[None] if sync else x
    with flags():
        for weights in (jnp.zeros(4), jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.ones(4)):
            after = run(x, state, weights)
            if name.endswith("pending"):
                for ok in (True, False):
                    nl.population.commit(after, ok)
                if "renorm" not in name and "domains" not in name and weights[1]:
                    nl.population.settle(after)


def test_what_is_beside_the_norms_promotes_no_ranks():
    x = array(draw(2, 6, C))
    with flags():
        for method in ("zca", "pca", "zscore", "minmax"):
            nl.instruments.whiten(x, nl.instruments.whitening(x, method=method))
        state = nl.batch_norm(x, None, nl.init_running(C), train=True)[1]
        stacked = jax.tree.map(lambda v: jnp.stack([v, v]), state)
        nl.instruments.drift(stacked)
        nl.population.merge_running(stacked)
        norm = nl.get("batch")
        params, _ = norm.init(nl.Site(x))
        folded = functools.partial(nl.folding.fold, kernel=array(draw(3, 5, C)), bias=jnp.zeros(C))
        folded(norm.parts(params, state, nl.Site(x), train=False)[0])
