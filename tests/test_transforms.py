"""The same numbers under every transformation, and one update of the statistics under any."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import normlab as nl
from tests import oracles
from tests.cases import NAMES, first_of
from tests.helpers import MAPPERS, array, draw, gap, mappers

# As in the laws: a few dozen roundings forward, twice as many backward.
FORWARD, BACKWARD = 2e-6, 5e-6

over_names = pytest.mark.parametrize(
    "case", [pytest.param(first_of(n), id=n) for n in NAMES], scope="module"
)
alone = pytest.mark.parametrize(
    "case", [pytest.param(first_of(n), id=n) for n in NAMES if n != "batch"], scope="module"
)


def layer(case, state):
    """`(x, w, params) -> h` of a case."""
    return lambda x, w, params: case.apply(params, state, x, w)[0]


def problem(case, seed=0):
    """`(x, w, params), state`."""
    point = case.values(seed=seed)
    return point, case.init(*point[:2])[1]


# 1. One norm under jax's transformations.


@over_names
def test_columns_and_rows_of_the_jacobian_agree(case):
    """jacfwd is vmap of jvp, jacrev is vmap of vjp, and both are what complex steps give."""
    (x, w, params), state = problem(case)
    h = layer(case, state)
    seen = draw(3, *case.linear(x, w).shape)

    def seen_through(x):
        """Three numbers, so that a Jacobian by x stays small."""
        out = h(x, w, params)
        return jnp.stack([(array(seen) * out).sum(), out.ravel()[0], out.ravel()[-1]])

    forward, reverse = jax.jit(
        lambda x: (jax.jacfwd(seen_through)(x), jax.jacrev(seen_through)(x))
    )(x)
    numbers = case.numbers()
    seen = case.channels_last(seen)
    (expected,) = oracles.gradient(
        lambda x: (seen * case.oracle(x, *numbers[1:])).sum(), numbers[0]
    )
    assert gap(case.channels_last(reverse[0]), expected) < BACKWARD
    assert gap(forward, reverse) < BACKWARD


@over_names
def test_many_parameters_on_one_input_are_one_after_the_other(case):
    """An ensemble: vmap over the parameters alone, with their axis at any place."""
    (x, w, _), state = problem(case)
    params = [case.values(seed=seed)[2] for seed in (0, 50, 100)]
    h = jax.jit(layer(case, state))
    one_by_one = [h(x, w, p) for p in params]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, -1), *params)
    side_by_side = jax.jit(jax.vmap(layer(case, state), (None, None, -1), 1))(x, w, stacked)
    assert gap(side_by_side, np.stack(one_by_one, 1)) < FORWARD


@alone
def test_gradients_of_each_example_add_up_to_that_of_all(case):
    """vmap of grad on one example at a time: no example looks at another."""
    (x, w, params), state = problem(case)
    case = case._replace(weights=None)
    c = array(draw(9, *case.linear(x, w).shape))

    def loss(w, params, x, c):
        return (c * jnp.tanh(layer(case, state)(x, w, params))).sum()

    @jax.jit
    def both(x, w, params, c):
        each = jax.vmap(jax.grad(loss, (0, 1, 2)), (None, None, 0, 0))
        dw, dparams, dx = each(w, params, x[:, None], c[:, None])
        total = jax.tree.map(lambda v: v.sum(0), (dw, dparams))
        return (*total, dx[:, 0]), jax.grad(loss, (0, 1, 2))(w, params, x, c)

    assert gap(*both(x, w, params, c)) < BACKWARD


def test_the_examples_of_a_batch_norm_do_look_at_each_other():
    """Mapped over examples without an axis name there is one value to measure, and an error."""
    with pytest.raises(ValueError, match="at least two values per channel"):
        jax.vmap(lambda a: nl.batch_norm(a[None], train=True)[0][0])(jnp.ones((4, 3)))


def test_one_example_at_a_time_with_an_axis_name_is_the_batch(precision):
    """The whole batch spread over a mapped axis, an example per place: value, state, gradient."""
    a, c = (array(draw(i, 6, 5, 3, mean=2.0), precision) for i in range(2))
    state = nl.init_running(3, dtype=precision)
    one = functools.partial(nl.batch_norm, params=None, state=state, train=True, axis_name="n")

    def loss(a, of):
        h, after = of(a)
        return (c * jnp.tanh(h)).sum(), (h, after)

    def spread(a):
        h, after = jax.vmap(lambda a: one(a[None]), axis_name="n")(a)
        return h[:, 0], jax.tree.map(lambda v: v[0], after)

    def whole(a):
        return nl.batch_norm(a, None, state, train=True)

    grad = jax.grad(loss, has_aux=True)
    one_by_one = jax.jit(lambda a: grad(a, spread))(a)
    together = jax.jit(lambda a: grad(a, whole))(a)
    assert gap(one_by_one, together) < (BACKWARD if precision == "float32" else 1e-12)
    values = np.asarray(a, np.float64)
    assert gap(one_by_one[1][0], oracles.batch(values)) < FORWARD


@over_names
def test_a_forward_derivative_inside_a_scan_is_the_one_outside(case):
    """jvp of scan, scan of jvp, and linearize."""
    (x, w, params), state = problem(case)
    h = layer(case, state)
    tangents = array(draw(5, 3, *x.shape))

    @jax.jit
    def everything(x, w, params, tangents):
        def f(x):
            return h(x, w, params)

        _, scanned = lax.scan(lambda _, t: (None, jax.jvp(f, (x,), (t,))[1]), None, tangents)
        _, through = jax.jvp(
            lambda x: lax.scan(lambda _, s: (None, f(s * x)), None, jnp.ones(3))[1],
            (x,),
            (tangents[0],),
        )
        linear = jax.linearize(f, x)[1]
        return scanned, jnp.stack([linear(t) for t in tangents]), through

    scanned, linearized, through = everything(x, w, params, tangents)
    assert gap(scanned, linearized) < BACKWARD
    assert gap(through, np.stack([scanned[0]] * 3)) < BACKWARD
    shift = [1e-40j * case.channels_last(t).astype(np.float64) for t in tangents]
    x, w, g, b = case.numbers()
    expected = [case.oracle(x + t, w, g, b).imag / 1e-40 for t in shift]
    assert gap([case.channels_last(t) for t in scanned], expected) < BACKWARD


@over_names
def test_float32_stays_float32_when_x64_is_on(case):
    """The same numbers and types whether float64 is there to be slipped into or not."""
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            (x, w, params), state = problem(case)
            results.append(jax.jit(case.apply)(params, state, x, w))
    expected, got = results
    assert gap(got, expected) < FORWARD
    for have, want in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert have.dtype == want.dtype


@over_names
def test_gradients_lower_for_every_platform(case):
    """Also where there is no such device: nothing is written for one platform alone.

    Barriers against sharing what is as large as h are for the CPU; elsewhere they would hinder
    fusion.
    """
    (x, w, params), state = problem(case)
    run = layer(case, state)
    traced = jax.jit(jax.grad(lambda x: jnp.tanh(run(x, w, params)).sum())).trace(x)
    large = f"tensor<{'x'.join(map(str, jax.eval_shape(run, x, w, params).shape))}x"
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        apart = [line for line in text.splitlines() if "optimization_barrier" in line]
        assert platform == "cpu" or not [line for line in apart if large in line]


@pytest.mark.parametrize("kind", ["bool", "int32", "float32", "numpy"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_weights_may_be_constants_of_what_is_compiled(norm, kind):
    """A mask that a compiled function closes over is as good as one it is given."""
    a, mask = array(draw(0, 4, 5, 6)), draw(1, 4, 5) > -0.5
    options = {"batch": {"train": True}, "layer": {"axes": "all"}}[norm]
    run = functools.partial(getattr(nl, f"{norm}_norm"), **options)
    constant = mask if kind == "numpy" else array(mask, kind)
    given = jax.jit(lambda a, weights: run(a, weights=weights))(a, array(mask))
    assert gap(jax.jit(lambda a: run(a, weights=constant))(a), given) < FORWARD


# 2. Statistics are updated once.

N, C = 8, 3
POLICIES = {
    "default": None,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
}


def deep(params, state, x, remat=lambda f: f):
    """Three layers of x ← tanh(batch norm(x·w)) and the states after them."""

    def block(x, layer):
        w, affine, state = layer
        h, state = nl.batch_norm(x @ w, affine, state, train=True, decay=0.5)
        return jnp.tanh(h), state

    states = []
    for layer in zip(*params, state, strict=True):
        x, after = remat(block)(x, layer)
        states.append(after)
    return x, states


def deep_problem():
    params = (
        [array(draw(i, C, C)) for i in range(3)],
        [nl.Affine(array(draw(10 + i, C, mean=1.0)), array(draw(20 + i, C))) for i in range(3)],
    )
    return params, [nl.init_running(C)] * 3, array(draw(30, N, C, mean=1.0))


@functools.cache
def deep_answer():
    """The gradients and states without any checkpoint."""
    return _deep_gradient(lambda f: f)


def _deep_gradient(remat):
    params, state, x = deep_problem()

    def loss(params):
        h, states = deep(params, state, x, remat)
        return (array(draw(31, *h.shape)) * h).sum(), states

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_that_runs_twice_updates_its_statistics_once(policy):
    """Rematerialization runs the forward pass again for the backward pass."""
    remat = functools.partial(jax.checkpoint, policy=POLICIES[policy])
    (value, states), grads = _deep_gradient(remat)
    (_, expected), _ = deep_answer()
    for state, want in zip(states, expected, strict=True):
        assert (state.updates, state.skipped) == (1, 0)
        assert gap(state, want) < FORWARD
    assert gap(((value, states), grads), deep_answer()) < BACKWARD


def test_checkpoints_within_checkpoints_update_once():
    params, state, x = deep_problem()

    def loss(params):
        h, states = jax.checkpoint(functools.partial(deep, remat=jax.checkpoint))(params, state, x)
        return (array(draw(31, *h.shape)) * h).sum(), states

    got = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert [int(s.updates) for s in got[0][1]] == [1, 1, 1]
    assert gap(got, deep_answer()) < BACKWARD


def test_layers_in_a_scan_of_checkpoints_update_once_each():
    """The layers as the steps of a loop, which differ in their parameters and states."""
    params, state, x = deep_problem()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(*params, state, strict=True))

    def loss(layers):
        @jax.checkpoint
        def block(x, layer):
            w, affine, state = layer
            h, state = nl.batch_norm(x @ w, affine, state, train=True, decay=0.5)
            return jnp.tanh(h), state

        h, states = lax.scan(block, x, layers)
        return (array(draw(31, *h.shape)) * h).sum(), states

    grad = jax.jit(jax.value_and_grad(lambda p: loss((*p, stacked[2])), has_aux=True))
    (value, states), grads = grad(stacked[:2])
    assert states.updates.tolist() == [1, 1, 1]
    (want, want_states), want_grads = deep_answer()
    stack = lambda trees: jax.tree.map(lambda *v: np.stack(v), *trees)  # noqa: E731
    assert gap((value, states), (want, stack(want_states))) < BACKWARD
    assert gap(grads, tuple(stack(v) for v in want_grads)) < BACKWARD


@pytest.mark.parametrize("outer", ["grad", "hessian", "linearize", "vjp twice"])
def test_differentiating_does_not_update(outer):
    """However often the derivative runs the layer, the state is that of one batch."""
    a, state = array(draw(0, N, C)), nl.init_running(C)

    def f(a):
        h, after = nl.batch_norm(a, None, state, train=True)
        return jnp.tanh(h).sum(), after

    if outer == "grad":
        after = jax.jit(jax.grad(f, has_aux=True))(a)[1]
    elif outer == "hessian":
        after = jax.jit(jax.jacfwd(jax.grad(f, has_aux=True), has_aux=True))(a)[1]
    elif outer == "linearize":
        _, push, after = jax.linearize(jax.jit(f), a, has_aux=True)
        push(a), push(a)
    else:
        _, pull, after = jax.vjp(jax.jit(f), a, has_aux=True)
        pull(jnp.ones(())), pull(jnp.ones(()))
    assert (after.updates, after.skipped) == (1, 0)
    values = np.asarray(a, np.float64)
    assert gap((after.mean, after.var), (values.mean(0), values.var(0))) < FORWARD


# 3. Training loops.

STEPS, RATE = 4, 0.1


def step(axis_name, carry, batch):
    """One step of gradient descent on a layer with batch norm; the recipe that fits every map."""
    params, state = carry
    x, y = batch

    def loss(params):
        w, affine = params
        h, after = nl.batch_norm(x @ w, affine, state, train=True, decay=0.8, axis_name=axis_name)
        value = ((jnp.tanh(h) - y) ** 2).mean()
        return (value if axis_name is None else lax.pmean(value, axis_name)), after

    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
    grads = grads if axis_name is None else lax.pmean(grads, axis_name)
    return (jax.tree.map(lambda p, g: p - RATE * g, params, grads), state), value


def training():
    """`(params, state)` and four batches of 16, `[STEPS, 16, …]`."""
    params = array(draw(0, 5, C)), nl.Affine(jnp.ones(C), jnp.zeros(C))
    batches = array(draw(1, STEPS, 16, 5, mean=0.5)), array(draw(2, STEPS, 16, C))
    return (params, nl.init_running(C)), batches


@functools.cache
def trained():
    """The answer: a Python loop on one device with the whole batch."""
    carry, (x, y) = training()
    one_step, losses = jax.jit(functools.partial(step, None)), []
    for batch in zip(x, y, strict=True):
        carry, value = one_step(carry, batch)
        losses.append(value)
    return carry, np.stack(losses)


@pytest.mark.parametrize("mapper", MAPPERS)
def test_a_training_loop_over_devices_is_the_loop_on_one(mapper):
    """scan of steps inside the map: the state is the carry, so its types must not change.

    Under `check_vma=True` also the type of what varies over devices: the synced state does not.
    """
    carry, batches = training()

    def on_device(carry, batches):
        return lax.scan(functools.partial(step, "d"), carry, batches)

    shards = jax.tree.map(lambda v: v.reshape(STEPS, 8, 2, -1).swapaxes(0, 1), batches)
    run = mappers()[mapper](on_device)
    got = (run if mapper == "pmap" else jax.jit(run))(carry, shards)
    assert gap(got, jax.tree.map(lambda v: np.stack([v] * 8), trained())) < 2e-5
    assert (got[0][1].updates == STEPS).all()


@pytest.mark.parametrize("mapper", MAPPERS)
def test_derivatives_through_uneven_devices_are_those_of_the_subset(mapper):
    """First and second order; on one device nothing is valid, and what is invalid is NaN."""
    a, c, v = (draw(i, 8, 4, 3) for i in range(3))
    mask = np.arange(4) < np.array([4, 3, 2, 1, 0, 4, 0, 1])[:, None]
    weights, tangent = array(mask), array(np.where(mask[..., None], v, 1.0))

    def on_device(weights_and_c, a):
        index = lax.axis_index("d")
        w, c = (lax.dynamic_index_in_dim(v, index, keepdims=False) for v in weights_and_c)
        h, _ = nl.batch_norm(a, train=True, weights=w, axis_name="d")
        return (w[:, None] * c * jnp.tanh(h)).sum()

    synced = mappers()[mapper](on_device)
    grad = jax.grad(lambda a: synced((weights, array(c)), a).sum())
    dirty = array(np.where(mask[..., None], a, np.nan))
    first, second = jax.jit(lambda a, da: jax.jvp(grad, (a,), (da,)))(dirty, tangent)

    def exact(a):
        return oracles.gradient(lambda a: (c[mask] * np.tanh(oracles.batch(a))).sum(), a)[0]

    step = 1e-5
    difference = exact(a[mask] + step * v[mask]) - exact(a[mask] - step * v[mask])
    assert gap(np.asarray(first)[mask], exact(a[mask])) < BACKWARD
    assert gap(np.asarray(second)[mask], difference / (2 * step)) < 2 * BACKWARD
    assert (np.asarray(first)[~mask] == 0).all()
    assert (np.asarray(second)[~mask] == 0).all()


@pytest.mark.parametrize("loop", ["scan", "unrolled", "fori_loop", "while_loop"])
def test_a_training_loop_is_the_same_however_it_is_written(loop):
    carry, batches = training()

    def indexed(i, carry):
        return step(None, carry, jax.tree.map(lambda v: v[i], batches))[0]

    @jax.jit
    def run(carry):
        if loop == "fori_loop":
            return lax.fori_loop(0, STEPS, indexed, carry)
        if loop == "while_loop":
            _, carry = lax.while_loop(
                lambda s: s[0] < STEPS, lambda s: (s[0] + 1, indexed(s[0], s[1])), (0, carry)
            )
            return carry
        unroll = STEPS if loop == "unrolled" else 1
        return lax.scan(functools.partial(step, None), carry, batches, unroll=unroll)[0]

    assert gap(run(carry), trained()[0]) < 2e-5


def test_training_or_not_may_be_chosen_by_a_traced_switch():
    """lax.cond needs both branches to return the same structure, shapes and types."""
    a = array(draw(0, N, C))
    state = nl.Running(array(draw(1, C)), array(draw(2, C) ** 2), *nl.init_running(C)[2:])

    def branch(train):
        return lambda a, state: nl.batch_norm(a, None, state, train=train)

    both = jax.jit(lambda on, a, state: lax.cond(on, branch(True), branch(False), a, state))
    for train in (True, False):
        expected = jax.jit(branch(train))(a, state)
        assert gap(both(train, a, state), expected) < FORWARD


# 4. Gradient accumulation: many microbatches are one batch.

MICRO = draw(0, 4, 6, C) + 3 * draw(1, 4, 1, C)  # four microbatches of six, of different means


def commit(moments, state=None):
    """One update of the running statistics."""
    return (nl.init_running(C) if state is None else state).update(moments)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("debias", [True, False])
def test_merged_microbatches_committed_once_are_the_whole_batch(ddof, debias, precision):
    """In a scan, from `empty` on: one update, and the variance between microbatches is in it."""
    start = nl.init_running(C, ddof=ddof, debias=debias, dtype=precision)
    micro = array(MICRO, precision)

    @jax.jit
    def accumulated(micro, state):
        def add(m, batch):
            return nl.measure.merge(m, nl.moments(batch, 0)), None

        m, _ = lax.scan(add, nl.measure.empty((1, C), precision), micro)
        return commit(m, state)

    state = accumulated(micro, start)
    whole = MICRO.reshape(-1, C)
    bound = 1e-6 if precision == "float32" else 1e-12
    rate = 1 if debias else 0.1
    assert state.updates == 1
    assert gap(state.mean, rate * whole.mean(0)) < bound
    assert gap(state.var, rate * whole.var(0, ddof=ddof) + (1 - rate)) < bound
    assert gap(state.mass, 0.1 if debias else 1) < bound


def test_an_update_for_each_microbatch_loses_the_variance_between_them():
    """What happens without `merge`: four updates, and the variance within microbatches alone."""
    state = nl.init_running(C)
    update = jax.jit(lambda a, state: nl.batch_norm(a, None, state, train=True, decay=0.9)[1])
    for batch in MICRO:
        state = update(array(batch), state)
    assert state.updates == 4
    within, total = MICRO.var(1), MICRO.reshape(-1, C).var(0)
    assert (np.asarray(state.var) <= within.max(0) * (1 + 1e-6)).all()
    assert gap(state.var, total) > 0.5


def test_microbatches_of_any_size_in_any_order_weigh_by_their_count():
    """Also an empty one, and one that is masked as a whole."""
    sizes = (5, 0, 1, 9)
    batches = [draw(i, n, C, mean=i) for i, n in enumerate(sizes)]
    masked = nl.moments(array(draw(9, 4, C, mean=1e6)), 0, weights=jnp.zeros(4))
    whole = np.concatenate(batches)
    for order in itertools.islice(itertools.permutations(batches), 0, 24, 5):
        m = functools.reduce(nl.measure.merge, (nl.moments(array(b), 0) for b in order), masked)
        state = commit(m)
        assert state.updates == 1
        assert gap((state.mean, state.var), (whole.mean(0), whole.var(0))) < 2e-6


def test_the_gradient_of_the_whole_batch_comes_from_microbatches(precision):
    """Two scans over microbatches: one measures, one normalizes. No microbatch sees the others.

    The forward pass is run again for the gradient, and memory holds one microbatch at a time.
    """
    dtype = jnp.dtype(precision)
    x, w = array(draw(0, 4, 6, 5, mean=1.0), dtype), array(draw(1, 5, C), dtype)
    params = nl.Affine(array(draw(2, C), dtype), array(draw(3, C), dtype))
    c, start = array(draw(4, 4, 6, C), dtype), nl.init_running(C, dtype=dtype)

    def in_microbatches(w, params):
        @jax.checkpoint
        def measure(m, x):
            return nl.measure.merge(m, nl.moments(x @ w, 0)), None

        m, _ = lax.scan(measure, nl.measure.empty((1, C), dtype), x)
        parts = nl.Parts(m.mean, jnp.sqrt(m.var() + 1e-5), params.g, params.b)

        @jax.checkpoint
        def normalize(total, batch):
            x, c = batch
            return total + (c * jnp.tanh(nl.affine(parts, x @ w))).sum(), None

        total, _ = lax.scan(normalize, jnp.zeros((), dtype), (x, c))
        return total, start.update(m)

    def at_once(w, params):
        h, state = nl.batch_norm(x.reshape(-1, 5) @ w, params, start, train=True, decay=0.9)
        return (c.reshape(-1, C) * jnp.tanh(h)).sum(), state

    micro, whole = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(w, params)
        for f in (in_microbatches, at_once)
    )
    assert micro[0][1].updates == 1
    assert gap(micro, whole) < (BACKWARD if precision == "float32" else 1e-12)


@pytest.mark.parametrize("mapper", MAPPERS)
def test_microbatches_on_devices_are_the_whole_batch(mapper):
    """Merged on each device, then across devices: one collective for all microbatches."""
    shards = array(draw(0, 8, 4, 6, C) + 3 * draw(1, 8, 4, 1, C))

    def on_device(state, micro):
        within = nl.measure.merge_axes(nl.moments(micro, 1), 0)
        m = nl.Moments(*(jnp.broadcast_to(v, within.mean.shape)[0] for v in within))
        return commit(nl.devices.all_reduce(m, "d"), state)

    run = mappers()[mapper](on_device)
    state = (run if mapper == "pmap" else jax.jit(run))(nl.init_running(C), shards)
    whole = np.asarray(shards, np.float64).reshape(-1, C)
    assert gap((state.mean[3], state.var[3]), (whole.mean(0), whole.var(0))) < 2e-6
    assert (state.updates == 1).all()


# 5. One structure, one trace.


@pytest.mark.parametrize("state_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8"])
def test_the_state_keeps_its_types_whatever_the_input(dtype, state_dtype, x64):
    """With float64 at hand, and a state in another type than the batch: scan takes no other carry.

    Also `updates`, a strong int32 where x64 would make int64 of a Python number.
    """
    state = nl.init_running(C, dtype=state_dtype)
    batches = array(np.round(draw(0, 3, N, C, scale=5.0)), dtype)

    def body(state, a):
        h, state = nl.batch_norm(a, None, state, train=True, decay=0.5)
        return nl.batch_norm(h, None, state, train=False)[1], h

    after, h = jax.jit(lambda state, a: lax.scan(body, state, a))(state, batches)
    assert h.dtype == ("float32" if dtype == "int8" else dtype)
    assert [v.dtype for v in jax.tree.leaves(after)] == [state_dtype] * 4 + ["int32"] * 2 + [
        state_dtype
    ]
    expected = np.asarray(batches, np.float64)
    weights = np.array([1, 2, 4]) / 7
    statistics = (
        np.einsum("i,ic", weights, expected.mean(1)),
        np.einsum("i,ic", weights, expected.var(1)),
    )
    assert gap((after.mean, after.var), statistics) < 2e-6


@over_names
def test_a_trace_serves_all_values_and_another_shape_needs_another(case):
    """Whether the state is new or returned, and the norm was made once or again."""
    traces = []

    @jax.jit
    def run(params, state, site):
        traces.append(site.a.shape)
        return case.norm.apply(params, state, site, train=True)

    (x, w, params), state = problem(case)
    for seed in (0, 50, 100):
        (x, w, params), _ = problem(case, seed)
        _, state = run(params, state, case.site(x, w))
    assert len(traces) == 1

    longer = case._replace(x=(case.x[0] + 2, *case.x[1:]), weights=None)
    (x, w, params), _ = problem(longer)
    run(params, state, longer.site(x, w))
    run(params, state, longer.site(x, w))
    assert len(traces) == 2


def test_the_linear_map_is_a_static_part_of_the_site():
    """A `Site` goes through jit: an equal map is the same trace, another map another."""
    traces = []

    @jax.jit
    def measure(site):
        traces.append(site.linear)
        return nl.get("cosine").parts(None, (), site, train=True)[0].sigma

    x, w = array(draw(0, 2, 5, 5, 3)), array(draw(1, 3, 3, 3, 4))
    for linear in (nl.Conv(), nl.Conv(), nl.Conv(padding="VALID"), nl.Conv(strides=1)):
        measure(nl.Site(linear(x, w), x, w, linear=linear))
    assert traces == [nl.Conv(), nl.Conv(padding="VALID")]


def test_schedules_are_values_and_need_no_trace_of_their_own():
    """decay and ε as traced numbers: one trace for every value, and the right numbers."""
    a, traces = array(draw(0, N, C)), []

    @jax.jit
    def run(a, state, decay, eps):
        traces.append(decay)
        return nl.batch_norm(a, None, state, train=True, decay=decay, eps=eps)

    state = nl.Running(array(draw(1, C)), array(draw(2, C) ** 2), *nl.init_running(C)[2:])
    state = state._replace(mass=jnp.ones(()))
    mean, var = np.asarray(a, np.float64).mean(0), np.asarray(a, np.float64).var(0)
    for decay, eps in ((0.9, 1e-5), (0.5, 1e-3), (0.0, 0.1)):
        h, after = run(a, state, decay, eps)
        assert gap(h, oracles.batch(np.asarray(a, np.float64), eps)) < FORWARD
        assert gap(after.mean, decay * np.asarray(state.mean) + (1 - decay) * mean) < FORWARD
        assert gap(after.var, decay * np.asarray(state.var) + (1 - decay) * var) < FORWARD
    assert len(traces) == 1


def test_the_state_can_be_donated():
    """Every buffer of the old state is taken over by the new one: none is left, and none unused.

    jax warns of a donated buffer that fits no result, and a warning is an error here.
    """
    step = jax.jit(lambda state, a: nl.batch_norm(a, None, state, train=True)[1], donate_argnums=0)
    state = jax.tree.map(jnp.array, nl.init_running(C))
    old, state = state, step(state, array(draw(0, N, C)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert state.updates == 1


def test_batch_norm_alone_has_a_state():
    """So that the tests of states above cover all there is; a new one must be added to them."""
    stateful = {name for name in NAMES if problem(first_of(name))[1] != ()}
    assert stateful == {"batch"}
