"""Several streams: hyper-connections, mHC and SiameseNorm, each written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import normlab as nl
from normlab.placement import (
    HyperConnection,
    Siamese,
    enter,
    init_residual,
    leave,
    residual,
    scheme,
    sinkhorn,
)
from tests.helpers import draw, gap, mesh

N, T, S, C = 2, 3, 4, 5
LAYER, PLAIN = nl.get("layer"), nl.get("rms", use_gain=False, use_bias=False)
W = draw(9, C, C) / C**0.5
KINDS = {
    "hyper": HyperConnection(inner=LAYER, total=LAYER, streams=S, reads=6),
    "static": HyperConnection(inner=LAYER, outer=PLAIN, streams=S, dynamic=False),
    "mhc": HyperConnection(inner=LAYER, total=PLAIN, streams=S, reads=1, sinkhorn=20),
    "siamese": Siamese(inner=LAYER, outer=PLAIN, total=LAYER, read=LAYER, branch=0.6),
}


def branch(x):
    return jnp.tanh(x @ jnp.asarray(W, x.dtype))


def streams(kind, dtype=np.float32):
    return jnp.asarray(draw(1, N, T, KINDS[kind].streams, C), dtype)


def params_of(kind, dtype=np.float32):
    """Params that are not those at first, of everything."""
    params, state = init_residual(KINDS[kind], streams(kind, dtype))
    leaves, tree = jax.tree.flatten(params)
    moved = [v + jnp.asarray(draw(i, *v.shape, scale=0.5), v.dtype) for i, v in enumerate(leaves)]
    return jax.tree.unflatten(tree, moved), state


def layer(x, p):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return p.g * (x - mean) / np.sqrt(var + 1e-5) + p.b


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def by_hand(kind, p, x):
    """What the papers say, in NumPy, token by token where it is of tokens."""
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), p)
    x, f = np.asarray(x, np.float64), lambda z: np.tanh(z @ W)
    if kind == "siamese":
        u, y = layer(x[..., 0, :], p.total), x[..., 1, :]
        r = rms(f(layer(u + layer(y, p.read), p.inner)))
        return np.stack([u + 0.6 * r, y + r], -2)
    out = np.empty_like(x)
    for at in np.ndindex(N, T):
        h = x[at]  # [S, C]: the hyper hidden matrix H
        if kind == "static":
            a_m, a_r, b = p.read, p.skip.T, p.branch
        elif kind == "hyper":
            seen = layer(h, p.total)
            a_m = p.read.static + p.read.scale * np.tanh(seen @ p.read.kernel)
            a_r = p.skip.static.T + p.skip.scale * np.tanh(seen @ p.skip.kernel)
            b = p.branch.static + p.branch.scale * np.tanh(seen @ p.branch.kernel)
        else:
            v = rms(h.reshape(-1))
            logit = [m.static + m.scale * np.tensordot(v, m.kernel, 1) for m in p[3:]]
            a_m, b = 1 / (1 + np.exp(-logit[2])), 2 / (1 + np.exp(-logit[1]))
            m = np.exp(logit[0])
            for _ in range(20):
                m = m / m.sum(0)
                m = m / m.sum(1, keepdims=True)
            a_r = m.T
        y = f(layer(a_m @ h, p.inner))
        y = rms(y) if kind == "static" else y
        out[at] = a_r.T @ h + np.outer(b, y)
    return out


def run(kind, p, state, x, **more):
    return residual(KINDS[kind], p, state, branch, x, train=True, **more)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_paper_says_in_both_layouts_and_in_bfloat16(kind):
    (p, state), x = params_of(kind), streams(kind)
    expected = by_hand(kind, p, x)
    h = jax.jit(lambda x: run(kind, p, state, x))(x)
    assert gap(h, expected) < 1e-5

    def turned(x):
        return jnp.swapaxes(branch(jnp.swapaxes(x, 1, -1)), 1, -1)

    first = jnp.moveaxis(x, (2, 3), (1, 2))  # [N, S, C, T]
    made, _ = init_residual(KINDS[kind], first, channel_axis=1)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, p)
    how = {"train": True, "channel_axis": 1}
    h = residual(KINDS[kind], p, state, turned, first, **how)[0]
    assert gap(jnp.moveaxis(h, (1, 2), (2, 3)), expected) < 1e-5

    half = run(kind, p, state, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert gap(half.astype(jnp.float32), expected) < 2e-2
    made, _ = init_residual(KINDS[kind], x.astype(jnp.bfloat16))
    assert {v.dtype for v in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_finite_differences(kind):
    with jax.enable_x64(True):
        (p, state), x = params_of(kind, np.float64), streams(kind, np.float64)
        f = jax.jit(lambda p, x: run(kind, p, state, x))
        check_grads(f, (p, x), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def pre(x, params):
    """A pre-norm net of one stream, by the line."""
    placement = nl.placement.Placement(inner=LAYER)
    for p in params:
        x = residual(placement, p, nl.placement.Residual(inner=()), branch, x, train=True)[0]
    return x


def net(plan, x):
    """The streams before each branch, after the last, and the params."""
    found, params = [plan.enter(x)], []
    for block in range(plan.depth):
        for name in ("attention", "mlp"):
            placement = plan.at(block, name)
            p, state = init_residual(placement, found[-1])
            found.append(residual(placement, p, state, branch, found[-1], train=True)[0])
            params.append(p)
    return found, params


def test_hyper_connections_begin_as_exactly_pre_norm():
    x = jnp.asarray(draw(1, N, T, C), jnp.float32)
    for options in ({}, {"dynamic": False}, {"streams": 1}, {"streams": 3}):
        plan = scheme("hyper", depth=2, **options)
        found, params = net(plan, x)
        assert found[0].shape == (N, T, plan.streams, C)
        expected = pre(x, [nl.placement.Residual(inner=p.inner) for p in params])
        assert (found[-1] == expected[:, :, None]).all()
        assert gap(plan.leave(found[-1]), plan.streams * expected) < 1e-6
        read = [p.read if options.get("dynamic") is False else p.read.static for p in params]
        assert [int(r.argmax()) for r in read] == [i % plan.streams for i in range(4)]


def test_mhc_begins_as_pre_norm_and_its_streams_do_not_stay_alike():
    x = jnp.asarray(draw(1, N, T, C), jnp.float32)
    plan = scheme("mhc", depth=2)
    found, params = net(plan, x)
    expected = pre(x, [nl.placement.Residual(inner=p.inner) for p in params])
    assert gap(found[-1], jnp.broadcast_to(expected[:, :, None], found[-1].shape)) < 1e-4

    (first, then), xs = [plan.at(0, name) for name in ("attention", "mlp")], found[0]
    (p, state), (q, _) = init_residual(first, xs), init_residual(then, xs)

    def loss(p):
        h = residual(first, p, state, branch, xs, train=True)[0]
        return (leave(residual(then, q, state, branch, h, train=True)[0]) ** 2).sum()

    # The next branch reads one stream more than the others: what they are given is to differ.
    grad = jax.grad(loss)(p).branch.static
    assert np.ptp(grad) > 1e-3 * abs(grad).max()


def test_one_stream_with_given_weights_is_pre_norm_and_post_norm():
    """Zhu et al. 2024, section 3: (0 1; 1 1), and with 1/σ of the sum in the lower row's place."""
    one = HyperConnection(inner=LAYER, streams=1, dynamic=False)
    x = jnp.asarray(draw(1, N, T, C), jnp.float32)
    p, state = init_residual(one, enter(x, 1))
    h = residual(one, p, state, branch, enter(x, 1), train=True)[0]
    assert (h[..., 0, :] == pre(x, [nl.placement.Residual(inner=p.inner)])).all()

    bare = HyperConnection(streams=1, dynamic=False)
    total = x + branch(x)
    rate = 1 / jnp.sqrt(jnp.square(total).mean(-1, keepdims=True) + 1e-5)
    p, state = init_residual(bare, enter(x, 1))
    p = p._replace(skip=rate[..., None], branch=rate)
    h = residual(bare, p, state, branch, enter(x, 1), train=True)[0]
    post = nl.placement.Placement(total=PLAIN)
    expected = residual(post, *init_residual(post, x), branch, x, train=True)[0]
    assert gap(h[..., 0, :], expected) < 1e-6


def test_sinkhorn_makes_rows_and_columns_of_sum_one_the_better_the_more_steps():
    """The numbers of the docstring: the largest error of a column's sum, of 1000 matrices."""
    with jax.enable_x64(True):
        worst = {}
        for scale in (1.0, 4.0):
            logits = draw(0, 1000, S, S, scale=scale)
            for steps in (1, 5, 20, 100):
                m = sinkhorn(logits, steps=steps)
                assert float(abs(m.sum(-1) - 1).max()) < 1e-14
                assert float(m.min()) >= 0
                worst[scale, steps] = float(abs(m.sum(-2) - 1).max())
    for scale in (1.0, 4.0):
        assert worst[scale, 1] > worst[scale, 5] > worst[scale, 20] > worst[scale, 100]
    assert 1e-6 < worst[1.0, 20] < 2e-5
    assert 0.02 < worst[4.0, 20] < 0.1
    huge = sinkhorn(jnp.array([[1e4, -1e4], [0.0, 3e4]]))
    assert gap(huge, jnp.eye(2)) < 1e-6
    with pytest.raises(ValueError, match="square"):
        sinkhorn(jnp.ones((2, 3)))


def test_mhc_keeps_the_mean_of_the_streams_and_lets_nothing_grow():
    mhc = HyperConnection(streams=S, dynamic=False, sinkhorn=20)
    p, state = init_residual(mhc, x := streams("mhc"))
    p = p._replace(skip=jnp.asarray(draw(2, N, T, S, S), jnp.float32))  # of each position its own
    h = residual(mhc, p, state, jnp.zeros_like, x, train=True)[0]
    assert gap(h.mean(-2), x.mean(-2)) < 1e-4
    assert gap(h, x) > 0.1
    assert (jnp.linalg.norm(h, axis=-2) <= jnp.linalg.norm(x, axis=-2) * (1 + 1e-4)).all()
    free, state = params_of("hyper")
    h = residual(KINDS["hyper"], free, state, jnp.zeros_like, x, train=True)[0]
    assert gap(h.mean(-2), x.mean(-2)) > 1e-2


def test_each_stream_of_siamese_norm_alone_is_post_norm_and_pre_norm():
    kind = KINDS["siamese"]
    (p, state), x = params_of("siamese"), streams("siamese")
    off = nl.Affine(jnp.zeros(C), jnp.zeros(C))
    u, y = x[..., 0, :], x[..., 1, :]

    def alone(placement, x, **fields):
        params = nl.placement.Residual(**fields)
        states = jax.tree.map(lambda _: (), fields, is_leaf=lambda v: isinstance(v, nl.Affine))
        return residual(placement, params, nl.placement.Residual(**states), branch, x, train=True)[
            0
        ]

    h = residual(kind, p._replace(read=off), state, branch, x, train=True)[0]
    normed = layer(np.asarray(u), p.total)  # S of the connection before, in a post-norm net
    post = nl.placement.Placement(inner=LAYER, outer=PLAIN, branch=0.6)
    expected = alone(post, jnp.asarray(normed), inner=p.inner, outer=nl.Affine(None, None))
    assert gap(h[..., 0, :], expected) < 1e-5

    h = residual(kind, p._replace(total=off), state, branch, x, train=True)[0]
    inner = nl.combine.chain([LAYER, LAYER])
    expected = alone(
        nl.placement.Placement(inner=inner, outer=PLAIN),
        y,
        inner=type(inner.init(nl.Site(y))[0])((p.read, p.inner)),
        outer=nl.Affine(None, None),
    )
    assert gap(h[..., 1, :], expected) < 1e-5


def test_siamese_norm_as_the_authors_write_it():
    """The order of their DiT: norms at the beginning of a branch, and three at the end."""
    plan = scheme("siamese", depth=2)
    x = jnp.asarray(draw(1, N, T, C), jnp.float32)
    found, _ = net(plan, x)
    p, state = plan.merge.init(nl.Site(found[-1]))
    assert jax.tree.map(jnp.shape, p) == nl.Affine((2, C), (2, C))
    p = jax.tree.map(lambda v: v + jnp.asarray(draw(3, *v.shape), v.dtype), p)
    merged, _ = plan.merge.apply(p, state, nl.Site(found[-1]), train=True)
    one, f = nl.Affine(1.0, 0.0), lambda z: np.tanh(z @ W)
    post = before = np.asarray(x, np.float64)
    for block in range(2):
        for _ in range(2):
            post = layer(post, one)
            r = f(layer(post + layer(before, one), one))
            post, before = post + r / (2 * (block + 1)) ** 0.5, before + r
    assert gap(found[-1], np.stack([post, before], -2)) < 1e-5
    of = [jax.tree.map(lambda v, i=i: np.asarray(v[i]), p) for i in (0, 1)]
    assert gap(plan.leave(merged), layer(post, of[0]) + layer(before, of[1])) < 1e-5
    assert plan.last == LAYER


@pytest.mark.parametrize("name", ["siamese", "hyper", "mhc"])
def test_blocks_are_stacked_and_scanned_over(name):
    plan = scheme(name, depth=3)
    x = jnp.asarray(draw(1, N, T, C), jnp.float32)
    placements = [plan.at(block) for block in range(3)]
    made = [init_residual(placement, plan.enter(x)) for placement in placements]
    made = jax.tree.map(lambda v: v + 0.1, made)
    stacked = jax.tree.map(
        lambda *v: jnp.stack(jnp.broadcast_arrays(*v)), *zip(placements, strict=True)
    )
    params = jax.tree.map(lambda *v: jnp.stack(v), *made)

    @jax.checkpoint
    def step(x, block):
        (placement,), (p, state) = block
        return residual(placement, p, state, branch, x, train=True)[0], None

    xs = plan.enter(x)
    for placement, (p, state) in zip(placements, made, strict=True):
        xs = residual(placement, p, state, branch, xs, train=True)[0]
    scanned, _ = jax.lax.scan(step, plan.enter(x), (stacked, params))
    assert gap(scanned, xs) < 1e-6


def test_other_schemes_enter_and_leave_as_they_are():
    x = jnp.ones((2, C))
    for name in nl.placement.names():
        options = {"width": C} if name == "ngpt" else {}
        plan = scheme(name, depth=2, **options)
        if plan.streams is None:
            assert plan.merge is None
            assert (plan.enter(x) == x).all()
            assert (plan.leave(x) == x).all()
        else:
            assert plan.enter(x).shape == (2, plan.streams, C)
            assert plan.leave(plan.enter(x)).shape == x.shape
    assert enter(jnp.ones((2, 3, 4, 4)), 5, channel_axis=1).shape == (2, 5, 3, 4, 4)
    assert leave(jnp.ones((2, 5, 3, 4, 4)), channel_axis=1).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("kind", ["hyper", "mhc", "siamese"])
def test_an_example_without_weight_is_left_out_and_states_move(kind):
    batch = nl.get("batch")
    fields = {"inner": batch, "outer": batch, "total": batch}
    fields |= {"read": batch} if kind == "siamese" else {"streams": 2}
    placement = type(KINDS[kind])(**fields)
    if kind == "mhc":
        placement = HyperConnection(**fields, sinkhorn=3)
    x = jnp.asarray(draw(1, 3, 4, 2, C), jnp.float32)
    p, state = init_residual(placement, x)
    weights = jnp.array([1.0, 1.0, 0.0])
    h, after = residual(placement, p, state, branch, x, train=True, weights=weights)
    expected, kept = residual(placement, p, state, branch, x[:2], train=True)
    assert gap(h[:2], expected) < 1e-5
    near = [
        np.allclose(*v, atol=1e-6) for v in zip(*map(jax.tree.leaves, (after, kept)), strict=True)
    ]
    assert near
    assert all(near)
    assert gap(after, state) > 1e-3
    _, same = residual(placement, p, state, branch, x, train=False)
    assert gap(same, state) == 0


def test_a_norm_by_stream_is_that_norm_of_each():
    x = jnp.asarray(draw(1, 6, 2, C), jnp.float32)
    for norm in (LAYER, nl.get("batch"), nl.get("dyt")):
        both = scheme("siamese", depth=2, norm=norm).merge
        assert both == scheme("siamese", depth=3, norm=norm).merge
        p, state = both.init(nl.Site(x))
        p = jax.tree.map(lambda v: v + jnp.asarray(draw(2, *v.shape), v.dtype), p)
        h, after = both.apply(p, state, nl.Site(x), train=True)
        for i in (0, 1):
            of = jax.tree.map(lambda v, i=i: v[i], (p, state, after))
            expected, then = norm.apply(of[0], of[1], nl.Site(x[:, i]), train=True)
            assert gap(h[:, i], expected) < 1e-6
            assert gap(of[2], then) < 1e-6
    white = scheme("siamese", depth=2, norm=nl.get("whitening")).merge
    p, state = white.init(nl.Site(x))
    with pytest.raises(ValueError, match="each value by itself"):
        white.apply(p, state, nl.Site(x), train=True)


@pytest.mark.parametrize("name", ["siamese", "hyper", "mhc"])
def test_examples_positions_and_channels_may_be_sharded(name):
    x, plan = jnp.asarray(draw(1, 4, 4, 8), jnp.float32), scheme(name, depth=2)
    p, state = init_residual(plan.at(1), plan.enter(x))

    def f(x):
        return plan.leave(residual(plan.at(1), p, state, jnp.tanh, plan.enter(x), train=True)[0])

    for kind in (AxisType.Auto, AxisType.Explicit):
        spread = mesh(kind, i=2, j=2)
        with jax.set_mesh(spread):
            for spec in (P("i", "j"), P("i", None, "j")):
                h = jax.jit(f)(jax.device_put(x, NamedSharding(spread, spec)))
                assert gap(h, f(x)) < 1e-5
                assert h.sharding.spec[0] == "i"


@pytest.mark.parametrize("kind", KINDS)
def test_no_examples_make_none(kind):
    xs = streams(kind)[:0]
    assert run(kind, *params_of(kind), xs).shape == xs.shape


def test_errors_say_what_to_do():
    hyper, x = KINDS["hyper"], jnp.ones((N, T, C))
    with pytest.raises(ValueError, match=r"S = 4.*scheme\.enter"):
        init_residual(hyper, x)
    (p, state), xs = params_of("hyper"), streams("hyper")
    with pytest.raises(ValueError, match="S = 4"):
        run("hyper", p, state, xs[:, :, :3])
    with pytest.raises(ValueError, match="params without skip"):
        run("hyper", p._replace(skip=None), state, xs)
    with pytest.raises(ValueError, match="shortcut beside streams"):
        run("hyper", p, state, xs, shortcut=jnp.tanh)
    with pytest.raises(ValueError, match="a branch that makes"):
        residual(hyper, p, state, lambda x: x[..., :1], xs, train=True)
    with pytest.raises(ValueError, match="norm of activations"):
        init_residual(Siamese(read=nl.get("weight")), streams("siamese"))
    with pytest.raises(ValueError, match="streams=0"):
        scheme("hyper", depth=2, streams=0)
