"""The laws of the family, over the table of `tests/family.py`: few programs for each member."""

import functools
import inspect
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normlab as nl
import normlab.linen
import normlab.nnx
from tests import cases
from tests.family import MEMBERS, STRIDED, Member
from tests.helpers import draw, gap, mappers, mesh

over_members = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.label, scope="module")
FIRST = tuple({m.name: m for m in reversed(MEMBERS)}.values())
over_norms = pytest.mark.parametrize("member", FIRST, ids=lambda m: m.label, scope="module")


def test_every_norm_of_the_registry_is_in_a_table():
    assert {c.name for c in cases.CASES} | {m.name for m in MEMBERS} == set(nl.names())
    assert len({m.label for m in MEMBERS}) == len(MEMBERS)


def test_every_option_is_some_members():
    for name in nl.names():
        options = set(inspect.signature(nl.row(name).factory).parameters) - {"axis_name"}
        used = {option for m in (*MEMBERS, *cases.CASES) if m.name == name for option in m.options}
        elsewhere = {"use_gain", "use_bias", "gain", "algorithm", "channel_axis", "implementation"}
        assert options - elsewhere <= used, name


def directions(*trees):
    """A random tangent for every leaf."""
    leaves, tree = jax.tree.flatten(trees)
    moved = [jnp.asarray(draw(40 + i, *v.shape), v.dtype) for i, v in enumerate(leaves)]
    return jax.tree.unflatten(tree, moved)


def differences(f, *args, along, step=1e-4):
    """The derivative of f along a direction by central differences of the sixth order."""

    def at(t):
        return f(*jax.tree.map(lambda v, d: np.asarray(v) + t * np.asarray(d), args, along))

    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    return sum(c * (at(k * step) - at(-k * step)) for k, c in weights.items()) / step


@functools.cache
def _facts_of(label: str):
    """Everything of one problem in float64, in one program."""
    member = next(m for m in MEMBERS if m.label == label)
    with jax.enable_x64(True):
        x, w, params, state = member.values(jnp.float64)
        v = directions(params, x, w)

        def h_of(params, x, w, train=True):
            return member.norm.apply(params, state, member.site(x, w), train=train)

        a = member.linear(x, w)
        c = jnp.asarray(draw(9, *a.shape))

        def loss(params, x, w):
            return (c * jnp.tanh(h_of(params, x, w)[0])).sum()

        @jax.jit
        def everything(params, x, w):
            (h, after), (dh, _) = jax.jvp(h_of, (params, x, w), v)
            grads = jax.grad(loss, (0, 1, 2))(params, x, w)
            slope = jax.jvp(loss, (params, x, w), v)[1]
            over = jax.grad(loss, (0, 1, 2))
            forward = jax.jvp(over, (params, x, w), v)[1]

            def inner(*args):
                return sum(
                    jnp.vdot(g, d)
                    for g, d in zip(jax.tree.leaves(over(*args)), jax.tree.leaves(v), strict=True)
                )

            reverse = jax.grad(inner, (0, 1, 2))(params, x, w)
            parts, _ = member.norm.parts(params, state, member.site(x, w), train=True)
            return {
                "h": h,
                "after": after,
                "dh": dh,
                "grads": grads,
                "slope": slope,
                "forward": forward,
                "reverse": reverse,
                "parts": parts,
                "inference": member.norm.apply(params, after, member.site(x, w), train=False),
            }

        return (x, w, params, state, v), everything(params, x, w)


def _facts(member: Member):
    return _facts_of(member.label)


@over_members
def test_values_and_derivatives_equal_the_oracle(member, x64):
    (x, w, params, state, v), found = _facts(member)
    fixed = member.problem(x, w, params, state, train=True)
    assert gap(found["h"], member.oracle(fixed._replace(at=fixed))) < 1e-9

    def oracle(params, x, w):
        problem = member.problem(jnp.asarray(x), jnp.asarray(w), params, state, train=True)
        return member.oracle(problem._replace(at=fixed))

    assert gap(found["dh"], differences(oracle, params, x, w, along=v)) < 1e-6


@over_members
def test_inference_equals_the_oracle_and_leaves_the_state(member, x64):
    (x, w, params, state, _), found = _facts(member)
    h, after = found["inference"]
    problem = member.problem(x, w, params, found["after"], train=False)
    assert gap(h, member.oracle(problem._replace(at=problem))) < 1e-9
    assert gap(after, found["after"]) == 0
    assert jax.tree.structure(found["after"]) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(found["after"]), jax.tree.leaves(state), strict=True):
        assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, old.weak_type)


@over_members
def test_derivatives_of_both_orders_agree_both_ways(member):
    (_, _, _, _, v), found = _facts(member)
    pairs = zip(jax.tree.leaves(found["grads"]), jax.tree.leaves(v), strict=True)
    slope = sum(float(np.vdot(g, d)) for g, d in pairs)
    assert gap(slope, float(found["slope"])) < 1e-8
    assert gap(found["forward"], found["reverse"]) < 1e-8


@over_members
def test_parts_are_finite_and_fit(member, x64):
    (_x, _w, _params, _state, _), found = _facts(member)
    assert jnp.isfinite(found["h"]).all()
    if isinstance(found["parts"], nl.Parts):
        for part in found["parts"]:
            assert jnp.broadcast_shapes(part.shape, found["h"].shape) == found["h"].shape
        assert (found["parts"].sigma > 0).all()


@over_members
def test_single_and_half_precision(member):
    """float32 is float64 to its rounding; bfloat16 is float32 of the same numbers, rounded once."""
    found = _facts(member)[1]
    x, w, params, state = member.values(jnp.float32)

    @jax.jit
    def both(params, state, x, w):
        site = member.site(x, w)
        half = site._replace(**{k: getattr(site, k).astype(jnp.bfloat16) for k in "axw"})
        wide = half._replace(**{k: getattr(half, k).astype(jnp.float32) for k in "axw"})
        return [member.norm.apply(params, state, s, train=True)[0] for s in (site, half, wide)]

    h, half, wide = both(params, state, x, w)
    assert h.dtype == jnp.float32
    assert gap(h, found["h"]) < 2e-6 * member.slack
    assert half.dtype == jnp.bfloat16
    assert gap(half, wide) <= 2 * jnp.finfo(jnp.bfloat16).eps


@over_norms
def test_numbers_are_the_same_under_every_map(member):
    """Two problems side by side on two devices, each as alone."""
    problems = [member.values(jnp.float32, seed) for seed in (0, 50)]
    state = problems[0][3]
    c = jnp.asarray(draw(9, *member.linear(*problems[0][:2]).shape), jnp.float32)

    def run(state, problem):
        x, w, params = problem

        def loss(params, x, w):
            h, after = member.norm.apply(params, state, member.site(x, w), train=True)
            return (c * h).sum(), (h, after)

        grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(params, x, w)
        return grads, out

    stacked = jax.tree.map(lambda *v: jnp.stack(v), *[(x, w, p) for x, w, p, _ in problems])
    alone = jax.jit(run)
    expected = [alone(state, problem[:3]) for problem in problems]
    expected = jax.tree.map(lambda *v: jnp.stack(v), *expected)
    for name, mapper in mappers(2).items():
        found = mapper(run)(state, stacked)
        assert gap(found, expected) < 1e-5 * member.slack, name


@over_norms
def test_an_explicit_mesh_and_an_automatic_one_change_nothing(member):
    """Examples on two devices, in plain jit."""
    x, w, params, state = member.values(jnp.float32)

    @jax.jit
    def run(params, state, x, w):
        return member.norm.apply(params, state, member.site(x, w), train=True)

    expected = jax.tree.map(np.asarray, run(params, state, x, w))
    for kind in (AxisType.Explicit, AxisType.Auto):
        grid = mesh(kind, d=2)
        with jax.set_mesh(grid):
            spread = jax.device_put(x, jax.NamedSharding(grid, P("d")))
            rest = jax.device_put((params, state, w), jax.NamedSharding(grid, P()))
            found = run(rest[0], rest[1], spread, rest[2])
        assert gap(found, expected) < 1e-5 * member.slack, kind


@over_norms
def test_a_batch_on_two_devices_is_one(member):
    """With `axis_name`, of the norms that look across examples; their gradient too."""
    if "batch" not in member.row.needs:
        pytest.skip("looks at no other example")
    x, w, params, state = member.values(jnp.float32)
    over = nl.get(member.name, **{**member.options, "axis_name": "d"})
    halves = x.reshape(2, -1, *x.shape[1:])
    c = jnp.asarray(draw(9, *member.linear(x, w).shape), jnp.float32)

    def loss(norm, x, c):
        h, after = norm.apply(params, state, member.site(x, w), train=True)
        return (c * h).sum(), (h, after)

    def on_device(_, shard):
        grad, out = jax.grad(lambda x, c: loss(over, x, c), has_aux=True)(*shard)
        return grad, out

    expected = jax.jit(jax.grad(lambda x, c: loss(member.norm, x, c), has_aux=True))(x, c)
    for name in ("vmap", "shard_map"):
        run = mappers(2)[name](on_device)
        dx, (h, after) = run((), (halves, c.reshape(2, -1, *c.shape[1:])))
        joined = dx.reshape(x.shape), (h.reshape(c.shape), jax.tree.map(lambda v: v[0], after))
        assert gap(joined, expected) < 1e-5 * member.slack, name


def _moved(column, x, w):
    """`(x, w)` after a change, and what to compare of h: back in its place."""
    rng, c = np.random.default_rng(20), 2.7
    order = rng.permutation(x.shape[1])
    others = np.concatenate([x[:1], rng.normal(size=x[1:].shape)])
    return {
        "weights rescaled": (x, c * w),
        "weights recentred": (x, w + rng.normal(size=(*w.shape[:-1], 1))),
        "one unit rescaled": (x, np.concatenate([c * w[..., :1], w[..., 1:]], -1)),
        "data rescaled": (c * x, w),
        "data recentred": (x + rng.normal(size=x.shape[-1]), w),
        "one case rescaled": (np.concatenate([c * x[:1], x[1:]]), w),
        "positions permuted": (x[:, order], w),
        "other examples changed": (others, w),
    }[column], {
        "positions permuted": lambda h, after: (h[:, order], after),
        "other examples changed": lambda h, after: (h[:1], after[:1]),
    }.get(column, lambda h, after: (h, after))


def _held(norm, x, w):
    """Which changes leave h as it is, in float64, with params as `init` returns them, moved."""
    linear = nl.Dense()

    @jax.jit
    def output(x, w):
        site = nl.Site(linear(x, w), x, w, linear=linear)
        params, state = norm.init(site)
        params = jax.tree.map(
            lambda v: v + 0.1 * jnp.cos(jnp.arange(v.size).reshape(v.shape)), params
        )
        return norm.apply(params, state, site, train=True)[0]

    h = np.asarray(output(jnp.asarray(x), jnp.asarray(w)))
    held = set()
    for column in nl.INVARIANCES:
        if column == "positions permuted" and x.ndim == 2:
            continue
        changed, compared = _moved(column, x, w)
        before, after = compared(h, np.asarray(output(*map(jnp.asarray, changed))))
        moved = np.abs(after - before).max()
        assert moved < 1e-8 or moved > 1e-4, (column, moved)
        if moved < 1e-8:
            held.add(column)
    return held


TINY = {"eps": 1e-30}
EVERY = {c.name: c for c in (*FIRST, *map(cases.first_of, cases.NAMES))}


@pytest.mark.parametrize("member", EVERY.values(), ids=EVERY)
def test_declared_invariances_hold_and_no_others(member, x64):
    """Behind a dense layer; and behind one with positions where they differ."""
    row = member.row
    known = inspect.signature(row.factory).parameters
    options = member.options | {k: v for k, v in TINY.items() if k in known}
    norm = nl.get(member.name, **options)
    w, units = draw(1, *member.w[-2:]), member.w[-2]
    positions = member.x[1:-1] if len(member.x) > 2 else (7,)
    try:
        dense = _held(norm, draw(0, 6, units, mean=0.3), w)
    except ValueError:  # it needs positions
        dense = None
    if dense is not None:
        assert dense == row.invariances - {"positions permuted"}
    held = row.invariances if row.with_positions is None else row.with_positions
    assert _held(norm, draw(0, 6, *positions, units, mean=0.3), w) == held


@over_norms
def test_what_weighs_nothing_is_left_out_or_weights_are_refused(member):
    """Examples of a norm that looks across them, else the last position of every example."""
    x, w, params, state = member.values(jnp.float32)
    across = "batch" in member.row.needs
    weights = np.ones(x.shape[: 1 if across else 2], np.float32)
    weights[..., -1] = 0
    kept = np.s_[:-1] if across else np.s_[:, :-1]
    bad = x.at[np.s_[-1:] if across else np.s_[:, -1:]].set(jnp.nan)

    def run(x, weights):
        return member.norm.apply(params, state, member.site(x, w, weights), train=True)

    if not member.weights:
        with pytest.raises(ValueError, match="weights"):
            run(x, jnp.asarray(weights))
        return
    found, fewer = jax.jit(run)(bad, jnp.asarray(weights)), jax.jit(run)(x[kept], None)
    assert gap(found[0][kept], fewer[0]) < 1e-5 * member.slack
    grad = jax.jit(jax.grad(lambda x: jnp.square(run(x, jnp.asarray(weights))[0][kept]).sum()))(bad)
    assert jnp.isfinite(grad).all()


@over_norms
def test_channels_may_lie_on_another_axis(member):
    """Of norms that look at activations alone, with weights too where they take any."""
    if {"w", "x"} & member.row.needs:
        pytest.skip("looks at the kernel")
    x, w, params, state = member.values(jnp.float32)
    a, moved = member.linear(x, w), functools.partial(jnp.moveaxis, source=-1, destination=1)
    weights = jnp.asarray(np.arange(a[..., 0].size).reshape(a.shape[:-1]) % 3, jnp.float32)
    weights = weights if member.weights else None

    @jax.jit
    def run(site, params, state):
        return member.norm.apply(params, state, site, train=True)

    expected, after = run(nl.Site(a, weights=weights), params, state)
    h, same = run(nl.Site(moved(a), weights=weights, linear=nl.Conv(channel_axis=1)), params, state)
    assert gap(h, moved(expected)) < 1e-5 * member.slack
    assert gap(same, after) < 1e-5 * member.slack


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.one], ids=lambda m: m.label)
def test_one_value_per_statistic_is_refused(member):
    site = nl.Site(jnp.ones(member.one))

    def run():
        params, state = member.norm.init(site)
        return member.norm.apply(params, state, site, train=True)

    with pytest.raises(ValueError, match="To fix it, use"):
        run()


@over_norms
def test_folding_is_right_or_refused(member):
    x, w, params, state = member.values(jnp.float32)
    _, state = member.norm.apply(params, state, member.site(x, w), train=True)
    fold = functools.partial(nl.folding.fold_norm, member.norm, params, state, w)
    if not member.folds:
        with pytest.raises(ValueError, match="fold_norm"):
            fold(x=x, linear=member.linear)
        return
    folded = fold(x=x, linear=member.linear)
    assert (folded.error <= folded.bound).all()


@over_norms
def test_either_skin_has_it(member):
    """As a module of Flax it is the same norm, or it says that it needs the kernel."""
    x, w, _, _ = member.values(jnp.float32)
    a = member.linear(x, w)
    layer = normlab.linen.RegistryNorm(member.name, member.options, use_running_average=False)
    if {"w", "x"} & member.row.needs:
        with pytest.raises(ValueError, match=r"kernel|weights|site"):
            layer.init(jax.random.key(0), a)
        return
    params, state = member.norm.init(nl.Site(a))
    expected, after = member.norm.apply(params, state, nl.Site(a), train=True)
    variables = layer.init(jax.random.key(0), a)
    assert isinstance(layer, nn.Module)
    h, changed = layer.apply(variables, a, mutable=["batch_stats"])
    assert gap(h, expected) < 1e-6
    assert gap(jax.tree.leaves(changed), jax.tree.leaves(after)) < 1e-6
    same = normlab.nnx.RegistryNorm(member.name, a.shape[-1], member.options)
    assert gap(same(a), expected) < 1e-6


def test_either_skin_takes_the_ids_of_a_graph():
    a, ids = jnp.asarray(draw(0, 5, 3), jnp.float32), jnp.array([0, 1, 0, 1, 9])
    expected = nl.family.graph_norm(a, segments=ids, num_segments=2)
    layer = normlab.linen.RegistryNorm("graph", {"num_segments": 2})
    variables = layer.init(jax.random.key(0), a, segments=ids)
    assert gap(layer.apply(variables, a, segments=ids), expected) < 1e-6
    same = normlab.nnx.RegistryNorm("graph", 3, {"num_segments": 2})
    assert gap(same(a, segments=ids), expected) < 1e-6


def test_gates_are_clipped_in_either_skin():
    layer = normlab.linen.RegistryNorm("batch_instance", use_running_average=False)
    params = layer.init(jax.random.key(0), jnp.ones((2, 3, 4)))["params"]
    for tree in (params, nnx.state(normlab.nnx.RegistryNorm("batch_instance", 4), nnx.Param)):
        clipped = nl.family.clip_gates(jax.tree.map(lambda v: v + 1, tree))
        found = {jax.tree_util.keystr(path): v for path, v in jax.tree.leaves_with_path(clipped)}
        assert {
            "rho" in path: v.max().item() for path, v in found.items() if "bias" not in path
        } == {True: 1, False: 2}


# Norms of norms.

A = draw(0, 4, 3, 6, mean=0.5)


@pytest.fixture
def parts(x64):
    a = jnp.asarray(A)
    made = [nl.Affine(*jnp.asarray(draw(seed, 2, 6))) for seed in (1, 2)]
    return a, nl.layer_parts(a, made[0]), nl.instance_parts(a, made[1])


def test_compose_is_a_norm_after_a_norm_and_a_gain_of_zero_is_fine(parts):
    a, inner, outer = parts
    for g in (inner.g, 0 * inner.g):
        inner = inner._replace(g=g)
        both = nl.combine.compose(inner, outer)
        assert gap(nl.affine(both, a), nl.affine(outer, nl.affine(inner, a))) < 1e-12


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 0.0), (-0.5, 2.0), (0.0, 0.0)])
def test_mix_is_the_sum_of_the_outputs_and_its_gradient(parts, weights):
    a, one, two = parts

    def mixed(w):
        return nl.affine(nl.combine.mix([one, two], w), a)

    def summed(w):
        return w[0] * nl.affine(one, a) + w[1] * nl.affine(two, a)

    w, c = jnp.asarray(weights), jnp.asarray(draw(3, *a.shape))
    assert gap(mixed(w), summed(w)) < 1e-12
    slopes = [jax.grad(lambda w, f=f: (c * f(w)).sum())(w) for f in (mixed, summed)]
    assert gap(*slopes) < 1e-12
    assert gap(mixed(w[:, None] * jnp.ones(6)), summed(w)) < 1e-12  # by channel


def test_blend_of_equal_statistics_is_themselves_and_join_takes_the_shift(parts):
    a, one, two = parts
    half = jnp.array([0.5, 0.5])
    assert gap(nl.affine(nl.combine.blend([one, one], half), a), nl.affine(one, a)) < 1e-12
    blended = nl.combine.blend([one, two], half, jnp.array([0.25, 0.75]))
    assert gap(blended.sigma**2, 0.25 * one.sigma**2 + 0.75 * two.sigma**2) < 1e-12
    assert nl.combine.join(one, two) == two._replace(mu=one.mu)


def test_nothing_measured_stays_nothing_measured():
    """Of an example that weighs nothing h is b, and no gradient reaches it."""
    a, weights = jnp.asarray(A, jnp.float32), jnp.array([1.0, 0.0, 1.0, 1.0])

    def h_of(a):
        one, two = (nl.layer_parts(a, weights=weights), nl.instance_parts(a, weights=weights))
        both = nl.combine.compose(nl.combine.mix([one, two], jnp.ones(2)), two)
        both = nl.combine.compose(both, nl.combine.blend([one, two], jnp.array([0.5, 0.5])))
        return nl.affine(both, a, weights=weights, channel_axis=-1)

    assert jnp.isfinite(h_of(a)).all()
    grad = jax.grad(lambda a: jnp.square(h_of(a)).sum())(a)
    assert jnp.isfinite(grad).all()
    assert (grad[1] == 0).all()


def test_split_and_chain_in_either_layout():
    layer, rms = nl.get("layer"), nl.get("rms", gain="offset")
    norm = nl.combine.split([nl.combine.chain([layer, rms]), nl.get("none")], (4, 2))
    a = jnp.asarray(A, jnp.float32)
    last, first = nl.Site(a), nl.Site(jnp.moveaxis(a, -1, 1), linear=nl.Conv(channel_axis=1))
    params, state = norm.init(last)
    h, _ = norm.apply(params, state, last, train=True)
    expected = nl.rms_norm(nl.layer_norm(a[..., :4]))
    assert gap(h, jnp.concatenate([expected, a[..., 4:]], -1)) < 1e-6
    other, _ = norm.apply(params, state, first, train=True)
    assert gap(jnp.moveaxis(other, 1, -1), h) < 1e-6
    with pytest.raises(ValueError, match="a size for each, together C"):
        norm.init(nl.Site(a[..., :5]))


def test_a_norm_of_the_weights_can_only_be_the_first():
    x, w = jnp.ones((3, 4)), jnp.asarray(draw(0, 4, 6), jnp.float32)
    site = nl.Site(x @ w, x, w)
    first = nl.combine.chain([nl.get("weight"), nl.get("layer")])
    assert first.apply(*first.init(site), site, train=True)[0].shape == (3, 6)
    with pytest.raises(ValueError, match="a site without w"):
        nl.combine.chain([nl.get("layer"), nl.get("weight")]).init(site)


def test_each_example_has_the_gain_and_statistics_of_its_domain():
    norm = nl.get("auxiliary_batch", examples=4)
    a, domain = jnp.asarray(A, jnp.float32), jnp.array([1, 0, 1, 1])
    params, state = norm.init(nl.Site(a))
    params = nl.Affine(params.g * jnp.array([[1.0], [3.0]]), params.b)
    state = nl.population.select_domain(state, domain)
    h, after = norm.apply(params, state, nl.Site(a), train=True)
    apart = [nl.batch_norm(a[domain == d], train=True)[0] for d in (0, 1)]
    assert gap(h[domain == 0], apart[0]) < 1e-6
    assert gap(h[domain == 1], 3 * apart[1]) < 1e-6
    assert gap(after.inner.mean[1], a[domain == 1].mean((0, 1))) < 1e-6
    frozen = nl.population.freeze(after)
    h, same = norm.apply(params, frozen, nl.Site(a), train=True)
    assert gap(h, norm.apply(params, after, nl.Site(a), train=False)[0]) < 1e-6
    assert gap(same, frozen) == 0


# The value itself; with the activation; measured gains.

PHI = {"tanh": np.tanh, "isru": lambda u: u / np.sqrt(1 + u * u), jnp.arctan: np.arctan}
SLOPES = {
    "tanh": (lambda u: 1 - np.tanh(u) ** 2, lambda u: -2 * np.tanh(u) * (1 - np.tanh(u) ** 2)),
    "isru": (lambda u: (1 + u * u) ** -1.5, lambda u: -3 * u * (1 + u * u) ** -2.5),
    jnp.arctan: (lambda u: 1 / (1 + u * u), lambda u: -2 * u / (1 + u * u) ** 2),
}


@pytest.mark.parametrize("shift", [None, 0.3])
@pytest.mark.parametrize("phi", PHI, ids=lambda phi: getattr(phi, "__name__", phi))
def test_pointwise_derivatives_are_right_at_zero_around_it_and_far_out(phi, shift):
    """In float32, both orders, by a and by α; u = 1e4, too, and what would overflow squared."""
    sizes = [0, 1e-30, 1e-6, 1e-3, 0.1, 0.27, 0.28, 1, 4, 2e4, 1e20, 1e30]
    a = np.float32([sign * v - (0.6 if shift else 0) for v in sizes for sign in (1, -1)])
    alpha = jnp.float32(0.5)

    def h(a, alpha):
        kept = None if shift is None else jnp.float32(shift)
        params = nl.family.Dynamic(None, None, alpha, kept)
        return nl.family.pointwise_norm(a[None], params, phi=phi)[0]

    def both(a):
        slope = jax.grad(h, (0, 1))
        return h(a, alpha), slope(a, alpha), jax.grad(lambda a: slope(a, alpha)[0])(a)

    value, (by_a, by_alpha), second = jax.jit(jax.vmap(both))(jnp.asarray(a))
    u = a.astype(np.float64) / 2 + (np.float32(shift) if shift else 0)
    first, curve = (f(np.clip(u, -1e15, 1e15)) for f in SLOPES[phi])
    assert np.abs(value - PHI[phi](np.clip(u, -1e15, 1e15))).max() < 3e-7
    assert np.abs(by_a - first / 2).max() < 3e-7
    assert np.abs(second - curve / 4).max() < 1e-6
    near = np.abs(a) < 10
    assert np.abs(by_alpha - a * first)[near].max() < 2e-6
    assert jnp.isfinite(by_alpha).all()


def test_an_alpha_of_zero_and_a_negative_one():
    a = jnp.asarray(A, jnp.float32)

    def h(alpha):
        return nl.family.dyt_norm(a, nl.family.Dynamic(None, None, alpha))

    assert (h(jnp.float32(0.0)) == 0).all()
    assert gap(jax.jacfwd(h)(jnp.float32(0.0)), a) < 1e-6
    assert gap(h(jnp.float32(-0.5)), -h(jnp.float32(0.5))) < 1e-6


def test_params_without_what_a_norm_learns_are_refused_and_a_condition_keeps_it():
    a = jnp.asarray(A, jnp.float32)
    for name, field in (("dyt", "alpha"), ("evo_b0", "v"), ("seed", "alpha")):
        norm = nl.get(name)
        params, state = norm.init(nl.Site(a))
        with pytest.raises(ValueError, match=f"field.* {field}"):
            norm.apply(nl.init_affine(6), state, nl.Site(a), train=True)
        plain, _ = norm.apply(params, state, nl.Site(a), train=True)
        twice, _ = norm.apply(nl.modulate(params, gate=2.0), state, nl.Site(a), train=True)
        assert gap(twice, 2 * plain) < 1e-6


def test_a_silent_channel_has_a_derivative():
    a = jnp.asarray(A, jnp.float32).at[..., 2].set(0.0)
    params = nl.init_affine(6)
    for order in (jax.grad, lambda f: jax.grad(lambda a: jnp.square(jax.grad(f)(a)).sum())):
        for norm in (nl.family.grn_norm, nl.family.frn_norm):
            loss = lambda a, norm=norm: jnp.square(norm(a, params)).sum()  # noqa: E731
            assert jnp.isfinite(order(loss)(a)).all()
    assert jnp.isfinite(jax.grad(lambda a: nl.family.grn_norm(a, params).sum())(0 * a)).all()


def test_frn_with_its_tlu_is_the_two_one_after_the_other():
    a, tau = jnp.asarray(A, jnp.float32), jnp.linspace(-1, 1, 6)
    params = nl.family.Response(*jnp.asarray(draw(1, 2, 6), jnp.float32), None)
    apart = nl.family.tlu(nl.family.frn_norm(a, params), tau)
    assert gap(nl.family.frn_norm(a, params._replace(tau=tau)), apart) < 1e-6
    half = nl.family.frn_norm(1000 * a.astype(jnp.float16))
    assert gap(half, nl.family.frn_norm(a)) < 2e-3


def test_a_norm_says_whether_the_activation_is_part_of_it():
    fused = {name for name in nl.names() if nl.row(name).fused}
    assert fused == {"evo_b0", "evo_s0", "evo_s1", "evo_s2", "frn"}
    assert all(nl.get(name).fused for name in ("evo_b0", "frn"))
    assert not any(nl.get(name).fused for name in ("batch", "dyt", "scale"))
    norm = nl.get("frn")
    own = nl.Norm(norm.init, norm.parts, fused=True)
    assert own.fused
    assert own != nl.Norm(norm.init, norm.parts)
    assert pickle.loads(pickle.dumps(norm)).fused
    batch, evo = nl.get("batch"), nl.get("evo_b0")
    assert nl.combine.chain([batch, evo]).fused
    assert nl.combine.split([evo, norm], [2, 4]).fused
    assert not nl.combine.split([evo, batch], [2, 4]).fused


@pytest.mark.parametrize("spread", ["max", "top"])
def test_the_largest_deviations_of_a_batch_on_two_devices_are_those_of_one(spread):
    norm = nl.get("lp_batch", spread=spread, k=5)
    over = nl.get("lp_batch", spread=spread, k=5, axis_name="d")
    a, weights = jnp.asarray(A, jnp.float32), jnp.array([1.0, 1.0, 0.0, 1.0])
    params, state = norm.init(nl.Site(a))

    def loss(norm, a, weights):
        site = nl.Site(a, weights=weights)
        h, after = norm.apply(params, state, site, train=True)
        return (h**3).sum(), (h, after)

    expected = jax.grad(lambda a: loss(norm, a, weights), has_aux=True)(a)
    for name, mapper in mappers(2).items():

        def on_device(_, shard):
            return jax.grad(lambda a: loss(over, a, shard[1]), has_aux=True)(shard[0])

        da, (h, after) = mapper(on_device)(params, (a.reshape(2, 2, 3, 6), weights.reshape(2, 2)))
        first = jax.tree.map(lambda v: v[0], after)
        assert gap((da.reshape(a.shape), (h.reshape(a.shape), first)), expected) < 1e-5, name
    spec = {"mesh": mesh(d=2), "in_specs": P("d"), "out_specs": P()}
    alike = jax.shard_map(lambda a: over.apply(params, state, nl.Site(a), train=True)[1], **spec)
    assert gap(alike(a), norm.apply(params, state, nl.Site(a), train=True)[1]) < 1e-5
    with pytest.raises(ValueError, match="whole axes"):
        nl.get("lp_batch", spread=spread, axis_name=nl.Sync("d", groups=2))


# Windows and segments.

IDS = np.array([2, 0, 2, 9, 0, 4, 2, 4, -1])  # 1 and 3 are empty; 9 and −1 are padding


@pytest.mark.parametrize("name", ["segment", "graph", "pair"])
@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("channel_axis", [-1, 1])
def test_segments_are_a_loop_over_graphs(name, positions, channel_axis, x64):
    """Their derivative too; empty segments count nothing; padding is b, and has no gradient."""
    a = jnp.asarray(draw(0, len(IDS), *positions, 6, mean=3.0)).at[3].set(1e6)
    norm = getattr(nl.family, f"{name}_norm")
    params = nl.get(name, num_segments=5).init(nl.Site(a, segments=jnp.asarray(IDS)))[0]
    params = jax.tree.map(lambda v: v + 0.3 * jnp.asarray(draw(1, *v.shape)), params)
    params = params._replace(b=jnp.arange(6.0))
    weights, c = jnp.asarray(np.arange(1.0, 1 + len(IDS)) % 4), jnp.asarray(draw(2, *a.shape))

    def at_once(a, params):
        how = {"segments": IDS, "num_segments": 5, "weights": weights}
        h = norm(jnp.moveaxis(a, -1, channel_axis), params, channel_axis=channel_axis, **how)
        h = jnp.moveaxis(h, channel_axis, -1)
        return (c * h).sum(), h

    def looped(a, params):
        h = jnp.broadcast_to(params.b, a.shape)
        for s in np.unique(IDS[(IDS >= 0) & (IDS < 5)]):
            nodes = np.flatnonzero(s == IDS)
            w = weights[nodes].reshape(1, -1, *[1] * len(positions))
            w = jnp.broadcast_to(w, (1, *a[nodes].shape[:-1]))
            h = h.at[nodes].set(norm(a[nodes][None], params, weights=w)[0])
        return (c * h).sum(), h

    for f in (at_once, jax.jit(at_once)):
        found = jax.value_and_grad(f, (0, 1), has_aux=True)(a, params)
        assert gap(found, jax.value_and_grad(looped, (0, 1), has_aux=True)(a, params)) < 1e-11


@pytest.mark.parametrize("channels_too", [False, True])
def test_packed_sequences_are_normalized_apart_in_every_example(channels_too):
    """Ids by position: the second example has others of the same numbers."""
    a = jnp.asarray(draw(0, 2, 7, 6, mean=100.0), jnp.float32)
    ids = np.array([[0, 0, 0, 1, 1, 1, 2], [1, 1, 0, 0, 0, 2, 2]])
    site = nl.Site(a, segments=jnp.asarray(ids))
    norm = nl.get("segment", num_segments=2, channels_too=channels_too)
    h, _ = jax.jit(lambda site: norm.apply(None, (), site, train=True))(site)
    one = nl.get("segment", channels_too=channels_too)
    for n, s in np.ndindex(2, 2):
        alone, _ = one.apply(None, (), nl.Site(a[n, ids[n] == s][None]), train=True)
        assert gap(h[n, ids[n] == s], alone[0]) < 1e-5
    assert (h[ids == 2] == 0).all()


def test_ids_that_fit_nothing_are_refused():
    a = jnp.ones((4, 3, 6))
    for ids in (jnp.zeros(3, int), jnp.zeros((4, 2), int), jnp.zeros(4)):
        with pytest.raises(ValueError, match=r"expected integers of shape \(4,\) or \(4, 3\)"):
            nl.family.segment_norm(a, segments=ids, num_segments=2)
    with pytest.raises(ValueError, match="pass num_segments"):
        nl.family.segment_norm(a, segments=jnp.zeros(4, int))


def test_a_window_that_takes_in_everything_is_group_norm_and_a_large_mean_costs_no_digit():
    a = jnp.asarray(A, jnp.float32)
    whole = nl.family.local_context_norm(a, group_size=3)
    assert gap(whole, nl.group_norm(a, groups=2)) < 1e-5
    assert gap(nl.family.local_norm(a + 2**12, window=3), nl.family.local_norm(a, window=3)) < 5e-3
    assert (nl.family.local_norm(jnp.full((2, 9, 9, 3), 1.1), window=4) == 0).all()
    with pytest.raises(ValueError, match="a number for each of its 0 axes of positions"):
        nl.family.local_norm(jnp.ones((4, 6)), window=(3,))


def test_switchable_norm_of_a_dense_layer_says_what_to_leave_out():
    with pytest.raises(ValueError, match=r"leave it out, of=\("):
        nl.get("switchable").init(nl.Site(jnp.ones((4, 6))))


STATEFUL = [m for m in FIRST if "batch" in m.row.needs]


@pytest.mark.parametrize("member", STATEFUL, ids=lambda m: m.name)
def test_inference_before_the_first_batch_leaves_the_scale_alone(member):
    """A population begins with mean 0 and scale 1."""
    x, w, _, _ = member.values(jnp.float32)
    site = member.site(x, w)
    params, state = member.norm.init(site)
    h, _ = member.norm.apply(params, state, site, train=False)
    assert 0.05 < float(h.std() / site.a.std()) < 20


# Gains.


def test_a_condition_of_nothing_is_the_norm_itself_to_the_bit():
    a = jnp.asarray(A, jnp.float32)
    params = nl.Affine(*jnp.asarray(draw(1, 2, 6), jnp.float32))
    plain = nl.layer_norm(a, params)
    for shape in ((6,), (4, 6), (4, 1, 6), (4, 3, 6)):
        zero = jnp.zeros(shape)
        assert (nl.layer_norm(a, nl.modulate(params, zero, zero)) == plain).all(), shape
        assert (nl.layer_norm(a, nl.modulate(params, gate=zero + 1)) == plain).all(), shape


@pytest.mark.parametrize("channel_axis", [-1, 1])
def test_a_condition_by_example_and_by_position(channel_axis, x64):
    a = jnp.moveaxis(jnp.asarray(A), -1, channel_axis)
    g, b, scale, shift, gate = (
        jnp.asarray(draw(i, *s)) for i, s in enumerate([(6,)] * 2 + [(4, 6)] * 3)
    )
    maps = [
        jnp.moveaxis(jnp.broadcast_to(v[:, None], A.shape), -1, channel_axis)
        for v in (scale, shift, gate)
    ]
    z = nl.layer_norm(jnp.asarray(A))
    expected = gate[:, None] * (1 + scale[:, None]) * (g * z + b) + shift[:, None]
    how = {"channel_axis": channel_axis}
    for s, t, u in ((scale, shift, gate), maps):
        params = nl.modulate(nl.Affine(g, b), s, t, gate=u, **how)
        h = nl.layer_norm(a, params, **how)
        assert gap(jnp.moveaxis(h, channel_axis, -1), expected) < 1e-12


def test_a_small_offset_counts_in_half_precision():
    """1 + 2⁻⁹ is 1 in bfloat16: the sum is formed in float32 (Gemma, Qwen3-Next)."""
    a = jnp.full((2, 8), 300.0, jnp.bfloat16) * jnp.arange(1, 9).astype(jnp.bfloat16)
    delta = jnp.full(8, 2**-9, jnp.bfloat16)
    assert (1 + delta == 1).all()
    plain = nl.rms_norm(a.astype(jnp.float32))
    h = nl.rms_norm(a.astype(jnp.float32), nl.Offset(delta, None))
    assert gap(h, plain * (1 + 2**-9)) < 1e-6
    assert (nl.rms_norm(a, nl.Offset(delta, None)) != nl.rms_norm(a)).any()


def test_a_gain_that_fits_nothing_says_what_does():
    with pytest.raises(ValueError, match=r"expected shape \(6,\); \(\) for one number; by example"):
        nl.layer_norm(jnp.asarray(A), nl.Affine(jnp.ones((3, 6)), None))
    with pytest.raises(ValueError, match="shapes that broadcast"):
        nl.modulate(nl.init_affine(6), jnp.ones((4, 5)))


# Maps of the weights.


def _site(linear, x, w):
    return nl.Site(linear(x, w), x, w, linear=linear)


def _operator(linear, x, w):
    """The matrix that the layer is on one example."""
    jacobian = jax.jacobian(lambda x: linear(x, w))(x[:1])
    return np.asarray(jacobian).reshape(-1, x[:1].size)


LAYERS = {
    "dense": (nl.Dense(), (3, 6, 5), (5, 4)),
    "conv": (nl.Conv(), (2, 5, 4, 3), (3, 3, 3, 4)),
    "strided": (STRIDED, (2, 4, 5, 4), (3, 2, 2, 6)),
    "first": (nl.Conv(strides=2, padding="VALID", channel_axis=1), (2, 3, 7, 6), (3, 2, 3, 4)),
    "line": (nl.Conv(groups=4), (2, 7, 4), (3, 1, 8)),
    "transposed": (nl.ConvTranspose(strides=(2, 1)), (2, 3, 4, 5), (3, 3, 5, 4)),
    "transposed, first": (
        nl.ConvTranspose(strides=2, padding="VALID", dilation=2, groups=2, channel_axis=1),
        (2, 4, 3, 2),
        (3, 2, 2, 6),
    ),
}
over_layers = pytest.mark.parametrize("layer", LAYERS)


@over_layers
@pytest.mark.parametrize("of", ["matrix", "map"])
def test_spectral_norm_comes_to_the_largest_singular_value_from_below(layer, of, x64):
    """σ̂ ≤ σ at every step; then what is left is a matrix, or a layer, of norm 1."""
    linear, x, w = LAYERS[layer]
    x, w = jnp.asarray(draw(0, *x)), jnp.asarray(draw(1, *w))
    norm, site = nl.get("spectral", of=of, warm=0, steps=2), _site(linear, x, w)
    params, state = norm.init(site)
    step = jax.jit(lambda state: norm.parts(params, state, site, train=True))
    whole = _operator(linear, x, w) if of == "map" else w.reshape(-1, w.shape[-1])
    sigmas = []
    for _ in range(400):
        parts, state = step(state)
        sigmas.append(float(parts.sigma))
    largest = np.linalg.norm(whole, 2)
    assert max(sigmas) <= largest * (1 + 1e-12)
    assert (np.diff(sigmas) >= -1e-12 * largest).all()
    kernel, _ = norm.kernel(params, state, w, linear=linear, x=x, train=False)
    made = _operator(linear, x, kernel) if of == "map" else kernel.reshape(-1, kernel.shape[-1])
    assert gap(np.linalg.norm(made, 2), 1.0) < 1e-6


def test_the_matrix_does_not_bound_the_convolution(x64):
    """All taps alike: the map's norm is nearly the root of the window's size larger."""
    linear, x = nl.Conv(), jnp.zeros((1, 16, 16, 2))
    w = jnp.broadcast_to(jnp.asarray(draw(1, 1, 1, 2, 2)), (3, 3, 2, 2))
    kernel, _ = nl.family.spectral_norm(w, train=False, warm=100)
    assert np.linalg.norm(_operator(linear, x, kernel), 2) > 2.8
    kernel, _ = nl.family.spectral_norm(w, train=False, warm=100, of="map", linear=linear, x=x)
    assert gap(np.linalg.norm(_operator(linear, x, kernel), 2), 1.0) < 1e-3


@pytest.mark.parametrize("of", ["matrix", "map"])
def test_spectral_norm_warms_up_where_init_had_no_values(of):
    """From shapes, and from zeros, it is as from values: before the first step too."""
    linear, x, w = LAYERS["strided"]
    x, w = jnp.asarray(draw(0, *x), jnp.float32), jnp.asarray(draw(1, *w), jnp.float32)
    norm, zero = nl.get("spectral", of=of), jnp.zeros_like(w)
    params, warm = norm.init(_site(linear, x, w))

    @functools.partial(jax.jit, static_argnames="train")
    def run(state, w, train):
        return norm.apply(params, state, _site(linear, x, w), train=train)

    cold = norm.init(nl.shapes(x, w, linear=linear))[1]
    assert gap(norm.init(_site(linear, x, zero))[1], cold) == 0
    h, after = run(cold, zero, train=True)
    assert (np.asarray(h) == 0).all()
    assert gap(after, cold) == 0
    h, same = run(cold, w, train=False)
    assert gap(same, cold) == 0
    assert gap(h, run(warm, w, train=False)[0]) < 1e-5
    expected = nl.get("spectral", of=of, warm=14).init(_site(linear, x, w))[1]
    assert gap(run(cold, w, train=True)[1], run(expected, w, train=True)[1]) < 1e-5


def test_a_kernel_that_is_not_finite_leaves_the_state():
    norm, w = nl.get("spectral"), jnp.asarray(draw(1, 5, 4), jnp.float32)
    x = jnp.ones((2, 5))
    params, state = norm.init(_site(nl.Dense(), x, w))
    for bad in (jnp.nan, jnp.inf):
        h, after = norm.apply(params, state, _site(nl.Dense(), x, w.at[0, 0].set(bad)), train=True)
        assert not jnp.isfinite(h).all()
        assert all(jnp.isfinite(v).all() for v in after)
    for size in (1e-30, 1e30):
        kernel, _ = nl.family.spectral_norm(size * w, None, state, train=True)
        assert gap(kernel, nl.family.spectral_norm(w, None, state, train=True)[0]) < 1e-6


def test_a_state_of_another_layer_is_refused():
    linear, x, w = LAYERS["conv"]
    x, w = jnp.ones(x), jnp.ones(w)
    norm = nl.get("spectral", of="map")
    params, state = norm.init(_site(linear, x, w))
    with pytest.raises(ValueError, match="size of input"):
        norm.apply(params, state, _site(linear, x[:, 1:], w), train=True)
    with pytest.raises(ValueError, match="of='map' and no x"):
        norm.init(nl.Site(linear(x, w), w=w, linear=linear))
    with pytest.raises(ValueError, match="a state of type tuple"):
        norm.apply(params, (), _site(linear, x, w), train=True)


def test_the_map_of_each_device_is_its_own():
    """Under every mapper, where a sum over devices would slip into the transpose."""
    linear, x, w = LAYERS["conv"]
    x = jnp.asarray(draw(0, *x), jnp.float32)
    kernels = jnp.asarray(draw(1, 2, *w), jnp.float32)
    norm = nl.get("spectral", of="map")
    params, state = norm.init(_site(linear, x, kernels[0]))

    def run(state, w):
        def loss(w):
            h, after = norm.apply(params, state, _site(linear, x, w), train=True)
            return jnp.square(h).sum(), after

        return jax.grad(loss, has_aux=True)(w)

    expected = jax.tree.map(lambda *v: jnp.stack(v), *[jax.jit(run)(state, w) for w in kernels])
    for name, mapper in mappers(2).items():
        assert gap(mapper(run)(state, kernels), expected) < 1e-5, name


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_sharded_kernel_has_the_same_singular_vectors(kind):
    x, w = (jnp.asarray(draw(i, 4, 4), jnp.float32) for i in range(2))
    norm = nl.get("spectral")

    @jax.jit
    def run(x, w):
        site = _site(nl.Dense(), x, w)
        params, state = norm.init(site)
        return norm.apply(params, state, site, train=True)

    expected = jax.tree.map(np.asarray, run(x, w))
    grid = mesh(kind, d=2)
    for spec in (P("d", None), P(None, "d")):
        with jax.set_mesh(grid):
            placed = jax.device_put(w, jax.NamedSharding(grid, spec))
            whole = jax.device_put(x, jax.NamedSharding(grid, P()))
            if kind == AxisType.Explicit and spec[0] is not None:
                continue  # JAX asks how x @ w itself is to be sharded
            assert gap(run(whole, placed), expected) < 1e-5


def _orthogonal(w, state, *, linear, x, train):
    """A map of one's own: all singular values are 1."""
    del linear, x, train
    left, _, right = jnp.linalg.svd(w.reshape(-1, w.shape[-1]), full_matrices=False)
    q = (left @ right).reshape(w.shape)
    return nl.Mapped(q, w - q, jnp.ones(())), state


WEIGHT_MAPS = {
    "weight": nl.get("weight"),
    "whole": nl.get("weight", of="kernel"),
    "bounded": nl.get("weight", bounded=True),
    "standard": nl.get("weight_standardization"),
    **{f: nl.get("weight_standardization", form=f) for f in ("qiao", "timm", "brock")},
    "spectral": nl.get("spectral"),
    "soft": nl.get("spectral", of="map", bound=0.9, use_gain=True),
    "centred": nl.get("centred_weight", use_gain=True),
    "own": nl.weight_map(_orthogonal),
}


@over_layers
@pytest.mark.parametrize("name", WEIGHT_MAPS)
def test_a_map_of_the_weights_is_a_kernel_and_a_norm_and_folds(name, layer):
    linear, x, w = LAYERS[layer]
    norm = WEIGHT_MAPS[name]
    assert isinstance(norm, nl.WeightMap)
    x, w = jnp.asarray(draw(0, *x), jnp.float32), jnp.asarray(draw(1, *w), jnp.float32)
    params, state = norm.init(_site(linear, x, w))
    params = jax.tree.map(lambda v: v + 0.3 * jnp.cos(jnp.arange(v.size).reshape(v.shape)), params)
    for train in (True, False):
        h, after = norm.apply(params, state, _site(linear, x, w), train=train)
        kernel, same = norm.kernel(params, state, w, linear=linear, x=x, train=train)
        assert gap(after, same) == 0
        assert gap(h, _layer(linear, x, kernel, params.b)) < 1e-5
    folded = nl.folding.fold_norm(norm, params, state, w, x=x, linear=linear)
    assert gap(folded.kernel, kernel) < 1e-5
    half, _ = norm.kernel(params, state, w.astype(jnp.bfloat16), linear=linear, x=x, train=False)
    assert half.dtype == jnp.bfloat16
    if norm.made:
        assert pickle.loads(pickle.dumps(norm)) == norm


def _layer(linear, x, w, b):
    return linear(x, w) + jnp.moveaxis(
        jnp.broadcast_to(b, (*[1] * (x.ndim - 1), b.size)), -1, linear.channel_axis
    )
