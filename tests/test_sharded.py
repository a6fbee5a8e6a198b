"""Examples on several devices: every norm of examples is the norm of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
import normlab.linen
import normlab.nnx
from normlab import instruments
from tests.helpers import MAPPERS, draw, gap, mappers, mesh

D, N, T, C = 4, 2, 8, 16
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
CHANNELS, POSITIONS = nl.Sharded(channels="d"), nl.Sharded(positions="d")
BOTH = nl.Sharded(channels="d", positions="e")

# What is normalized, the axes of devices, and which axis of `a` lies along them.
CASES = {
    "layer": (nl.layer_norm, {}, "d", 2),
    "layer, by a spec of all": (nl.layer_norm, {}, CHANNELS, 2),
    "layer, of positions": (nl.layer_norm, {}, POSITIONS, 1),
    "layer, all": (nl.layer_norm, {"axes": "all"}, "d", 2),
    "layer, all, of positions": (nl.layer_norm, {"axes": "all"}, POSITIONS, 1),
    "rms": (nl.rms_norm, {}, "d", 2),
    "rms, all": (nl.rms_norm, {"axes": "all"}, "d", 1),
    "rms, a group on two": (nl.rms_norm, {"groups": 2}, "d", 2),
    "rms, two groups on each": (nl.rms_norm, {"groups": 8}, "d", 2),
    "rms, all, groups": (nl.rms_norm, {"axes": "all", "groups": 2}, CHANNELS, 2),
    "group, one": (nl.group_norm, {"groups": 1}, "d", 2),
    "group, on two": (nl.group_norm, {"groups": 2}, CHANNELS, 2),
    "group, one on each": (nl.group_norm, {"groups": 4}, CHANNELS, 2),
    "group, two on each": (nl.group_norm, {"groups": 8}, CHANNELS, 2),
    "group, of positions": (nl.group_norm, {"groups": 4}, POSITIONS, 1),
    "group, about zero": (nl.group_norm, {"groups": 2, "centred": False}, CHANNELS, 2),
    "instance": (nl.instance_norm, {}, "d", 1),
    "instance, of channels": (nl.instance_norm, {}, CHANNELS, 2),
    "scale": (nl.family.scale_norm, {}, "d", 2),
    "frn": (nl.family.frn_norm, {}, "d", 1),
    "grn, of channels": (nl.family.grn_norm, {}, CHANNELS, 2),
    "grn, of positions": (nl.family.grn_norm, {}, POSITIONS, 1),
    "seed": (nl.family.seed_norm, {}, "d", 2),
    "dyisru": (nl.family.dyisru_norm, {}, "d", 2),
    "evo_s0": (nl.family.evo_s0_norm, {"groups": 2}, CHANNELS, 2),
    "evo_s1": (nl.family.evo_s1_norm, {"groups": 4}, POSITIONS, 1),
    "evo_s2": (nl.family.evo_s2_norm, {"groups": 8}, CHANNELS, 2),
    "group_whitening": (nl.family.group_whitening_norm, {"groups": 2}, POSITIONS, 1),
}


def params_of(name, dtype):
    """Params by channel: g, b and what else the norm learns."""
    g, b, more, other = (jnp.asarray(draw(i, C), dtype) for i in range(4))
    kind = name.partition(",")[0]
    return {
        "seed": nl.family.Rescaled(g, b, more, other),
        "dyisru": nl.family.Dynamic(g, b, 0.5 + jnp.square(more)),
        "evo_s0": nl.family.Evolved(g, b, more),
        "frn": nl.family.Response(g, b, more),
    }.get(kind, nl.Affine(g, b))


ORDERS = ("layer", "rms", "group, on two", "group, of positions")
KINDS = tuple({name.partition(",")[0]: name for name in reversed(CASES)}.values())


def arrays(dtype, mean=1.0):
    """The input and the weights of a loss."""
    return (jnp.asarray(draw(i, N, T, C, mean=m), dtype) for i, m in ((8, mean), (9, 0.0)))


def cut(v, axis):
    """`[D, ...]`: what lies on each device."""
    return jnp.stack(jnp.split(v, D, axis))


def joined(v, axis):
    return jnp.concatenate(list(v), axis)


def everything(norm, options, params, a, c, **over):
    """h and the gradients of a loss by params and a."""

    def loss(params, a):
        h = norm(a, params, **options, **over)
        return (c * jnp.sin(h)).sum(), h

    grads, h = jax.grad(loss, (0, 1), has_aux=True)(params, a)
    return h, *grads


@pytest.mark.parametrize(
    ("mapper", "precision", "cases"),
    [
        ("vmap", "float64", tuple(CASES)),
        ("shard_map", "float64", tuple(CASES)),
        ("shard_map, check_vma=False", "float64", tuple(CASES)),
        ("pmap", "float64", ORDERS),
        ("shard_map", "float32", KINDS),
    ],
    indirect=["precision"],
    ids=["vmap", "typed", "untyped", "pmap", "float32"],
)
def test_an_example_on_several_devices_is_one(mapper, precision, cases):
    a, c = arrays(precision)
    params = {name: params_of(name, precision) for name in cases}

    @jax.jit
    def one(params):
        return {name: everything(*CASES[name][:2], params[name], a, c) for name in cases}

    def on_device(_, given):
        return {
            name: everything(CASES[name][0], CASES[name][1], *own, axis_name=CASES[name][2])
            for name, own in given.items()
        }

    given = {}
    for name in cases:
        axis = CASES[name][-1]
        own = params[name]  # of the device, where the channels are
        own = jax.tree.map(lambda v: jnp.stack(jnp.split(v, D)), own) if axis == 2 else own
        own = own if axis == 2 else jax.tree.map(lambda v: jnp.stack([v] * D), own)
        given[name] = (own, cut(a, axis), cut(c, axis))
    found = mappers(D)[mapper](on_device)((), given)
    for name, expected in one(params).items():
        axis, (h, dparams, da) = CASES[name][-1], found[name]
        together = (lambda v: v.reshape(-1)) if axis == 2 else (lambda v: v.sum(0))
        whole = joined(h, axis), jax.tree.map(together, dparams), joined(da, axis)
        assert gap(whole, expected) < TOLERANCE[precision], name


@pytest.mark.parametrize("mapper", [name for name in MAPPERS if name != "pmap"])
def test_derivatives_of_derivatives(mapper, x64):
    a, c = arrays("float64")
    v = jnp.asarray(draw(5, *a.shape))

    def second(name, a, c, v, **over):
        norm, options = CASES[name][:2]
        loss = lambda a: (c * jnp.sin(norm(a, None, **options, **over))).sum()  # noqa: E731
        slope = lambda a: (v * jax.grad(loss)(a)).sum()  # noqa: E731
        # Reverse over reverse, and forward over reverse.
        return jax.grad(slope)(a), jax.jvp(jax.grad(loss), (a,), (v,))[1]

    def on_device(_, given):
        return {n: second(n, *own, axis_name=CASES[n][2]) for n, own in given.items()}

    given = {n: tuple(cut(u, CASES[n][-1]) for u in (a, c, v)) for n in ORDERS}
    found = mappers(D)[mapper](on_device)((), given)
    for name in ORDERS:
        expected = jax.jit(functools.partial(second, name))(a, c, v)
        assert gap(tuple(joined(u, CASES[name][-1]) for u in found[name]), expected) < 1e-11, name


@pytest.mark.parametrize(("mean", "bound"), [(0.0, 1e-6), (1e3, 5e-6), (1e4, 4e-5)])
def test_a_large_mean_costs_no_more_digits_than_the_means_of_devices_have(mean, bound):
    a = jnp.asarray(draw(0, 3, 1024, mean=mean), jnp.float32)[None]
    exact = np.asarray(a, np.float64).var(-1)
    found = jax.jit(
        jax.vmap(lambda a: nl.layer_moments(a, axis_name="d").var(), axis_name="d", out_axes=None)
    )(cut(a, 2))
    assert gap(found[..., 0], exact) < bound


@pytest.mark.parametrize("mapper", ["vmap", "shard_map"])
def test_weights_of_positions_and_a_device_without_any(mapper):
    a, c = arrays("float32")
    a, w = a.at[:, 0, 0].set(jnp.nan), jnp.ones((N, T)).at[:, 0].set(0).at[:, 2:4].set(0)
    w = w.at[0, 6:].set(0).at[:, 5].set(3.0)  # none on the last device of the first example
    cases = ("layer, all, of positions", "rms, all", "instance", "group, of positions")

    def run(norm, options, a, w, c, **over):
        norm = functools.partial(norm, weights=w)
        return everything(norm, options, None, a, jnp.where(w[..., None] > 0, c, 0), **over)

    def on_device(_, given):
        return [run(*CASES[n][:2], *given, axis_name=CASES[n][2]) for n in cases]

    found = mappers(D)[mapper](on_device)((), tuple(cut(u, 1) for u in (a, w, c)))
    for name, (h, _, da) in zip(cases, found, strict=True):
        h_one, _, da_one = run(*CASES[name][:2], a, w, c)
        seen = w > 0
        assert gap((joined(h, 1)[seen], joined(da, 1)), (h_one[seen], da_one)) < 5e-6, name


def test_channels_and_positions_on_a_grid():
    """Of two axes of devices a norm merges over those that it measures over."""
    a, c = arrays("float32")
    grid = mesh(d=4, e=2)
    norms = {name: CASES[name][:2] for name in ("layer", "layer, all", "rms", "instance", "scale")}
    norms |= {f"group, {g}": (nl.group_norm, {"groups": g}) for g in (1, 2, 4, 8)}
    norms |= {"grn": (nl.family.grn_norm, {}), "rms, groups": (nl.rms_norm, {"groups": 2})}

    @functools.partial(
        jax.shard_map, mesh=grid, in_specs=P(None, "e", "d"), out_specs=P(None, "e", "d")
    )
    def run(a, c):
        return {n: everything(*norm, None, a, c, axis_name=BOTH)[::2] for n, norm in norms.items()}

    found = jax.jit(run)(a, c)
    for name, norm in norms.items():
        assert gap(found[name], everything(*norm, None, a, c)[::2]) < 5e-6, name


@pytest.mark.parametrize(
    ("sync", "members"),
    [
        (nl.Sync("d", groups=2), ((0, 1), (2, 3))),
        (nl.Sync("d", groups=((0,), (1, 2, 3))), ((0,), (1, 2, 3))),
        (nl.Sync("d", staged=True), ((0, 1, 2, 3),)),
        (nl.Sync("d", second="always"), ((0, 1, 2, 3),)),
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", [nl.layer_norm, nl.rms_norm, nl.family.scale_norm])
def test_a_sync_says_which_devices_share_an_example(norm, sync, members):
    a, _ = arrays("float32")
    parts = cut(a, 2)
    h = jax.jit(jax.vmap(lambda a: norm(a, axis_name=sync), axis_name="d"))(parts)
    for some in members:
        expected = norm(jnp.concatenate([parts[i] for i in some], 2))
        assert gap(jnp.concatenate([h[i] for i in some], 2), expected) < 2e-6


def test_devices_of_a_grid_share_an_example_along_one_axis():
    a, _ = arrays("float32")
    run = functools.partial(nl.layer_norm, axis_name=nl.Sync(("n", "d"), together="d"))
    specs = {"in_specs": P("n", None, "d"), "out_specs": P("n", None, "d")}
    h = jax.jit(jax.shard_map(run, mesh=mesh(n=2, d=4), **specs))(a)
    assert gap(h, nl.layer_norm(a)) < 2e-6


# Cosine norm: the inputs of a unit lie on several devices.


@pytest.mark.parametrize("mapper", MAPPERS)
@pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
def test_cosine_norm_of_a_row_parallel_layer(mapper, centred, x64):
    x, w = jnp.asarray(draw(0, N, T, C, mean=1.0)), jnp.asarray(draw(1, C, 6, mean=0.5))
    params, c = nl.Affine(*jnp.asarray(draw(2, 2, 6))), jnp.asarray(draw(3, N, T, 6))

    def loss(x, w, params, **over):
        h = nl.cosine_norm(x, w, params, centred=centred, **over)
        site = nl.Site(lax.psum(x @ w, "d") if over else x @ w, x, w)
        name = "centred_cosine" if centred else "cosine"
        named = nl.get(name, **over).apply(params, (), site, train=True)[0]
        return (c * jnp.sin(h)).sum(), (h, named)

    def on_device(replicated, given):
        def own(x, w, params):
            value, out = loss(x, w, params, axis_name="d")
            return nl.devices.global_mean(value, "d"), out  # h is the same on all devices

        grads, out = jax.grad(own, (0, 1, 2), has_aux=True)(*given, replicated)
        return out, grads[:2], nl.devices.global_gradient(grads[2], "d")

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, w, params)
    found = mappers(D)[mapper](on_device)(params, (cut(x, 2), cut(w, 0)))
    for i in range(D):
        assert gap(jax.tree.map(lambda v, i=i: v[i], found[0]), out) < 1e-12
    assert gap((joined(found[1][0], 2), joined(found[1][1], 0)), grads[:2]) < 1e-12
    assert gap(jax.tree.map(lambda v: v[0], found[2]), grads[2]) < 1e-12


@pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
def test_cosine_norm_of_channels_of_a_convolution(centred):
    conv = nl.Conv()
    x, w = (
        jnp.asarray(draw(i, *s), jnp.float32) for i, s in enumerate([(2, 5, 5, 8), (3, 3, 8, 6)])
    )
    run = functools.partial(nl.cosine_norm, linear=conv, centred=centred)
    over = jax.vmap(functools.partial(run, axis_name="d"), axis_name="d", out_axes=None)
    found = jax.jit(over)(cut(x, 3), cut(w, 2))
    assert gap(found, run(x, w)) < 5e-6
    tiny = jax.jit(over)(1e-25 * cut(x, 3), 1e25 * cut(w, 2))  # no square overflows
    assert gap(tiny, found) < 5e-6


# A tensor-parallel block of a transformer.

HEADS, WIDTH = 4, 32


def block_params(dtype):
    shapes = {
        "ln1": (2, C), "wq": (C, HEADS, 4), "wk": (C, HEADS, 4), "wv": (C, HEADS, 4),
        "qk": (2, 4), "wo": (HEADS, 4, C), "bo": (C,), "ln2": (1, C), "up": (C, WIDTH),
        "bup": (WIDTH,), "down": (WIDTH, C), "bdown": (C,),
    }  # fmt: skip
    return {
        name: jnp.asarray(draw(i, *shape, scale=0.5), dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def block(p, x, norms, gather, scatter):
    """Attention and a perceptron; `gather` is before what is column-parallel, `scatter` behind."""
    h = gather(nl.layer_norm(x, nl.Affine(*p["ln1"]), **norms))
    q, k, v = (jnp.einsum("ntc,chd->nthd", h, p[name]) for name in ("wq", "wk", "wv"))
    gains = {"q": nl.Affine(p["qk"][0], None), "k": nl.Affine(p["qk"][1], None)}
    qk, _ = nl.normalize_heads(
        {"q": q, "k": k}, nl.get("rms"), gains, {"q": (), "k": ()}, train=True
    )
    logits = jnp.einsum("nthd,nshd->nhts", qk["q"], qk["k"])
    logits = jnp.where(jnp.tri(T, dtype=bool), logits / 2, -1e9)
    seen = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(logits), v)
    x = x + scatter(jnp.einsum("nthd,hdc->ntc", seen, p["wo"])) + p["bo"]
    h = gather(nl.rms_norm(x, nl.Affine(p["ln2"][0], None), **norms))
    h = jax.nn.gelu(jnp.einsum("ntc,cf->ntf", h, p["up"]) + p["bup"])
    return x + scatter(jnp.einsum("ntf,fc->ntc", h, p["down"])) + p["bdown"]


HEADWISE = {name: P(None, "d") for name in ("wq", "wk", "wv")}
PARALLEL = {**HEADWISE, "wo": P("d"), "up": P(None, "d"), "bup": P("d"), "down": P("d")}
STREAMS = {  # where the stream lies, what the norms are told, and what else is cut with it
    "channels": (2, {"axis_name": "d"}, {"ln1": P(None, "d"), "ln2": P(None, "d"), "bo": P("d"),
                                         "bdown": P("d")}),
    "sequence": (1, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("check_vma", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize("precision", TOLERANCE, indirect=True)
def test_a_tensor_parallel_block_is_that_of_one_device(stream, check_vma, precision):
    """Two devices along the examples, four along heads and features, and along the stream."""
    x, c = arrays(precision)
    p = block_params(precision)
    axis, norms, more = STREAMS[stream]
    specs = {name: {**PARALLEL, **more}.get(name, P()) for name in p}
    spread = P(*[{0: "n", axis: "d"}.get(i) for i in range(3)])

    def loss(p, x, c, norms, *move):
        h = block(p, x, norms, *move)
        return (c * jnp.sin(h)).sum(), h

    def on_device(p, x, c):
        gather = functools.partial(lax.all_gather, axis_name="d", axis=axis, tiled=True)
        scatter = functools.partial(
            lax.psum_scatter, axis_name="d", scatter_dimension=axis, tiled=True
        )
        (dp, dx), h = jax.grad(
            lambda p, x: loss(p, x, c, norms, gather, scatter), (0, 1), has_aux=True
        )(p, x)
        for name, spec in specs.items():  # what is replicated is summed, what is local is right
            over = ("n",) if "d" in spec else ("n", "d")
            dp[name] = nl.devices.global_gradient(dp[name], over)
        return h, dp, dx

    run = jax.shard_map(
        on_device,
        mesh=mesh(n=2, d=4),
        in_specs=(specs, spread, spread),
        out_specs=(spread, specs, spread),
        check_vma=check_vma,
    )
    same = lambda v: v  # noqa: E731
    (dp, dx), h = jax.jit(
        jax.grad(lambda p, x: loss(p, x, c, {}, same, same), (0, 1), has_aux=True)
    )(p, x)
    assert gap(jax.jit(run)(p, x, c), (h, dp, dx)) < TOLERANCE[precision]


# What travels.


def collectives(f, *args, **specs):
    """The collectives of a compiled program: those of every call, and those inside of loops."""
    run = jax.jit(jax.shard_map(f, mesh=mesh(d=8), **specs))
    text = run.lower(*args).compile().as_text()
    bodies = set(re.findall(r"(?:body|condition|to_apply)=%?([\w.-]+)", text))
    bodies |= {b for some in re.findall(r"branch_computations=\{([^}]*)\}", text)
               for b in re.findall(r"%?([\w.-]+)", some)}  # fmt: skip
    found, inside = {True: [], False: []}, False
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            inside = head[1] in bodies
        kinds = r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
        if one := re.search(kinds + r"(?:-start)?\(", line):
            sizes = [np.prod([1, *map(int, filter(None, s.split(",")))])
                     for s in re.findall(r"\[([\d,]*)\]", one[1])]  # fmt: skip
            found[inside].append((one[2], int(sum(sizes))))
    return found[False], found[True]


@pytest.mark.parametrize("check_vma", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize(
    ("norm", "forward", "backward"),
    [
        (nl.layer_norm, 2 * N * T + 1, 2 * N * T + 1),
        (nl.rms_norm, N * T, N * T),
        (nl.family.scale_norm, N * T, N * T),
        (functools.partial(nl.rms_norm, groups=8), 0, 0),
    ],
    ids=["layer", "rms", "scale", "rms, a group on each"],
)
def test_one_collective_each_way_of_what_a_row_has(norm, forward, backward, check_vma):
    a, c = arrays("float32")
    params = nl.init_affine(C)
    specs = {"in_specs": (P("d"), P(None, None, "d"), P(None, None, "d")), "check_vma": check_vma}
    h = lambda p, a, c: norm(a, p, axis_name="d")  # noqa: E731
    grads = lambda p, a, c: jax.grad(lambda p, a: (c * h(p, a, c)).sum(), (0, 1))(p, a)  # noqa: E731
    usual, rare = collectives(h, params, a, c, out_specs=P(None, None, "d"), **specs)
    assert usual == [("all-reduce", forward)] * bool(forward)
    both, again = collectives(grads, params, a, c, out_specs=(P("d"), P(None, None, "d")), **specs)
    assert sorted(both) == sorted([("all-reduce", n) for n in (forward, backward) if n])
    # Layer norm takes its sums again where digits were lost to the mean; nothing else has a loop.
    assert rare == again == [("all-reduce", forward)] * (norm is nl.layer_norm)


# Plain jit: the whole example is one array, however it is sharded.


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_the_plain_call_in_plain_jit(kind):
    """The channels, or the positions, on four devices; sharded as the input was it comes out."""
    a, c = arrays("float32")
    params = {name: params_of(name, "float32") for name in KINDS}

    @jax.jit
    def run(params, a, c):
        return {n: everything(*CASES[n][:2], params[n], a, c)[::2] for n in KINDS}

    expected = run(params, a, c)
    grid = mesh(kind, d=4)
    for spec, of_params in ((P(None, None, "d"), P("d")), (P(None, "d"), P())):
        with jax.set_mesh(grid):
            given = jax.device_put((a, c), NamedSharding(grid, spec))
            found = run(jax.device_put(params, NamedSharding(grid, of_params)), *given)
            assert gap(found, expected) < 2e-5
            for name in KINDS if kind == AxisType.Explicit else ():
                assert found[name][0].sharding.is_equivalent_to(given[0].sharding, 3), name


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_one_axis_is_mapped_and_the_other_is_the_partitioners(kind):
    a, _ = arrays("float32")
    grid = mesh(kind, n=2, d=4)
    norms = {n: CASES[n] for n in ("layer", "rms", "group, on two", "group, two on each", "seed")}

    def body(a):
        return {n: norm(a, axis_name=name, **o) for n, (norm, o, name, _) in norms.items()}

    with jax.set_mesh(grid):
        given = jax.device_put(a, NamedSharding(grid, P("n", None, "d")))
        cut = P(None, None, "d")
        run = jax.shard_map(body, in_specs=cut, out_specs=cut, axis_names={"d"})
        found = jax.jit(run)(given)
        for name, (norm, options, *_) in norms.items():
            assert gap(found[name], norm(a, **options)) < 2e-6, name


# By name.


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("scale", {}, lambda p: p.g),
        ("dyisru", {}, lambda p: p.alpha),
        ("cosine", {}, lambda p: p.g[0]),
        ("centred_cosine", {}, lambda p: p.g[0]),
    ],
)
def test_what_begins_at_the_number_of_channels_counts_all_of_them(name, options, expected):
    x, w = jnp.ones((2, C)), jnp.ones((C, C))
    one = expected(nl.get(name, **options).init(nl.Site(x @ w, x, w))[0])
    over = nl.get(name, axis_name="d", **options)
    before = expected(over.init(nl.Site(x @ w, x, w))[0])  # before the map the example is whole
    rows = name.endswith("cosine")

    def init(x, w):
        a = x @ w
        return expected(over.init(nl.Site(a, x, w))[0])

    w = cut(w, 0 if rows else 1)
    x = cut(x, 1) if rows else jnp.stack([x] * D)
    inside = jax.vmap(init, axis_name="d")(x, w)
    assert gap((before, inside), (one, jnp.stack([one] * D))) < 1e-6


NAMED = {n: nl.row(n).axis_of for n in nl.names()}


def test_every_norm_says_what_lies_along_its_axes():
    examples = {n for n, what in NAMED.items() if what == "example"}
    assert examples == {
        "layer", "rms", "group", "instance", "cosine", "centred_cosine", "scale", "dyisru",
        "evo_s0", "evo_s1", "evo_s2", "frn", "grn", "seed", "group_whitening",
    }  # fmt: skip
    for name in nl.names():
        if "batch" in nl.row(name).needs:
            assert NAMED[name] == "batch", name


@pytest.mark.parametrize("name", sorted(n for n, what in NAMED.items() if what == "example"))
def test_a_norm_of_examples_by_name(name):
    """`init` before the map, and `apply` in it, are those of one device."""
    if "cosine" in name:
        pytest.skip("has inputs: above")
    options = {"groups": 2} if name in ("group", "group_whitening") or "evo" in name else {}
    positions = name in ("instance", "frn", "group_whitening")
    axis, spec = (1, POSITIONS) if positions else (2, CHANNELS)
    a, _ = arrays("float32")
    one, over = (nl.get(name, **options, **more) for more in ({}, {"axis_name": spec}))
    assert over == nl.get(name, **options, axis_name=spec)
    params, state = over.init(nl.Site(a))
    assert gap(params, one.init(nl.Site(a))[0]) == 0
    own = jax.tree.map(
        lambda v: jnp.stack(jnp.split(v, D)) if v.shape == (C,) and not positions
        else jnp.stack([v] * D),
        params,
    )  # fmt: skip
    run = jax.vmap(lambda p, a: over.apply(p, state, nl.Site(a), train=True)[0], axis_name="d")
    found = jax.jit(run)(own, cut(a, axis))
    assert gap(joined(found, axis), one.apply(params, state, nl.Site(a), train=True)[0]) < 5e-6


@pytest.mark.parametrize("name", ["layer", "rms", "instance", "grn"])
def test_the_axis_of_the_data_is_told_to_no_norm_of_examples(name):
    x = jnp.asarray(draw(0, 8, 3, 5), jnp.float32)
    found = instruments.equivalence(name, "data", 2, form="vmap", x=x, recipes=())
    assert found.worst < 5e-6


# Heads.


@pytest.mark.parametrize("after_rope", [False, True])
def test_statistics_of_all_heads_which_lie_on_several_devices(after_rope):
    q, k = (jnp.asarray(draw(i, N, T, 2 * (i + 1) * D, 4), jnp.float32) for i in range(2))
    how = {"train": True, "heads": "all", "after_rope": after_rope}
    one, over = (nl.get("rms", use_gain=not after_rope, use_bias=False, **more)
                 for more in ({}, {"axis_name": "d"}))  # fmt: skip
    expected, _ = nl.normalize_heads({"q": q, "k": k}, one, **how)
    run = jax.vmap(lambda q, k: nl.normalize_heads({"q": q, "k": k}, over, **how)[0], axis_name="d")
    found = jax.jit(run)(cut(q, 2), cut(k, 2))
    assert gap({n: joined(v, 2) for n, v in found.items()}, expected) < 2e-6


def test_what_must_not_follow_rope_is_refused_on_several_devices_too():
    q = {"q": jnp.ones((2, 3, 4, 8))}
    with pytest.raises(ValueError, match="after RoPE"):
        nl.init_heads(q, nl.get("layer", axis_name="d"), heads="all", after_rope=True)


# The skins.

MODULES = {
    "LayerNorm": ({}, CHANNELS), "RMSNorm": ({}, "d"), "GroupNorm": ({"num_groups": 2}, CHANNELS),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("home", ["linen", "nnx"])
def test_a_module_that_is_made_before_the_map(home, name):
    options, spec = MODULES[name]
    a, _ = arrays("float32")
    g = jnp.asarray(draw(1, C), jnp.float32)
    if home == "linen":
        over = getattr(nl.linen, name)(axis_name=spec, **options)
        one = getattr(nl.linen, name)(**options)
        params = over.init(jax.random.key(0), a)["params"] | {"scale": g}
        call = lambda scale, a, m=over: m.apply(  # noqa: E731
            {"params": {"scale": scale} | ({} if name == "RMSNorm" else {"bias": 0 * scale})}, a
        )
        expected = one.apply({"params": params}, a)
    else:
        from flax import nnx

        over, one = (getattr(nl.nnx, name)(C, rngs=nnx.Rngs(0), **options, **more)
                     for more in ({"axis_name": spec}, {}))  # fmt: skip
        graph, rest = nnx.split(over)

        def call(scale, a):
            module = nnx.merge(graph, rest)
            module.scale = nnx.Param(scale)
            module.bias = None if name == "RMSNorm" else nnx.Param(0 * scale)
            return module(a)

        one.scale[...] = g
        expected = one(a)
    specs = {"in_specs": (P("d"), P(None, None, "d")), "out_specs": P(None, None, "d")}
    found = jax.jit(jax.shard_map(call, mesh=mesh(d=D), **specs))(g, a)
    assert gap(found, expected) < 2e-6


def test_a_norm_of_the_registry_in_a_module():
    a, _ = arrays("float32")
    layer = nl.linen.RegistryNorm("layer", {"axis_name": "d"})
    variables = layer.init(jax.random.key(0), a)
    specs = {"in_specs": (P("d"), P(None, None, "d")), "out_specs": P(None, None, "d")}
    run = jax.jit(jax.shard_map(layer.apply, mesh=mesh(d=D), **specs))
    assert gap(run(variables, a), nl.layer_norm(a)) < 2e-6


@pytest.mark.parametrize("home", ["linen", "nnx"])
def test_swap_gives_the_axis_of_a_batch_to_no_norm_of_examples(home):
    import flax.linen as nn
    from flax import nnx

    x = jnp.asarray(draw(0, 4, 6), jnp.float32)
    if home == "linen":
        old = nn.Sequential([nn.BatchNorm(use_running_average=False, axis_name="data")])
        model = nl.linen.swap(old, {"layers_0": nl.linen.LayerNorm})
        variables = model.init(jax.random.key(0), x)
        found = jax.vmap(lambda x: model.apply(variables, x), axis_name="data")(x[:, None])
    else:
        old = nnx.Sequential(nnx.BatchNorm(6, axis_name="data", rngs=nnx.Rngs(0)))
        model = nl.nnx.swap(old, {"layers/0": nl.nnx.LayerNorm})
        found = jax.vmap(model, axis_name="data")(x[:, None])
    assert gap(found[:, 0], nl.layer_norm(x)) < 1e-4


@pytest.mark.parametrize(
    "new", ["rms", "batch", "dyt", ("group", {"groups": 2}), normlab.linen.BatchNorm]
)
def test_swap_loses_no_axis_along_which_an_example_lies(new):
    import flax.linen as nn

    model = nl.linen.swap(nn.Sequential([nn.LayerNorm(axis_name="d")]), {"layers_0": new})
    with pytest.raises(ValueError, match="axis_name='d'"):
        model.init(jax.random.key(0), jnp.ones((4, 6)))


# Refusals.

A = jnp.ones((N, T, 4))
REFUSED = [
    (nl.layer_norm, {"axis_name": "nowhere"}, "layer norm: got axis_name='nowhere'.*plain jit"),
    (nl.layer_norm, {"axis_name": nl.Sharded(channels="e")}, "Sharded.channels='e'.*mapped"),
    (nl.layer_norm, {"axis_name": nl.Sync("d", shards=2, groups=1)}, "parts of the same examples"),
    (nl.layer_norm, {"axis_name": nl.Sync("d", every=2)}, "parts of the same examples"),
    (nl.layer_norm, {"axis_name": nl.Sync("d", groups=3)}, "groups of 3 for 4 devices"),
    (nl.layer_norm, {"axis_name": 3}, "layer norm: got axis_name=3.*Sharded"),
    (nl.rms_norm, {"axis_name": "d", "part": 0.5}, "part=0.5.*the first are not on all"),
    (nl.rms_norm, {"axis_name": "d", "axes": "all", "groups": 2}, "channels or positions"),
    (nl.group_norm, {"axis_name": "d", "groups": 2}, "group norm.*channels or positions"),
    (nl.group_norm, {"axis_name": CHANNELS, "groups": 6}, "groups=6 of 16.*1, 2, 4, 8, 16"),
    (nl.group_norm, {"axis_name": CHANNELS, "groups": 0}, "groups=0 of 16"),
    (nl.group_norm, {"axis_name": POSITIONS, "groups": 3}, "groups=3"),
    (nl.family.grn_norm, {"axis_name": "d"}, "GRN.*channels or positions"),
    (nl.family.group_whitening_norm, {"axis_name": CHANNELS, "groups": 2}, "all channels on each"),
    (nl.family.group_whitening_norm, {"axis_name": "d", "groups": 2}, "all channels on each"),
    (nl.family.dyisru_norm, {"axis_name": "nowhere"}, "DyISRU: got axis_name"),
    (
        functools.partial(nl.family.whitening_norm, train=True),
        {"axis_name": CHANNELS},
        "whitening.*Sharded.*a group has its channels on one device",
    ),
    (
        functools.partial(nl.batch_norm, train=True),
        {"axis_name": CHANNELS},
        "batch norm.*Sharded.*expected the name of a mapped axis",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("norm", "options", "said"), REFUSED)
def test_what_cannot_be_is_an_error_that_says_what_can(norm, options, said):
    with pytest.raises(ValueError, match=said):
        jax.vmap(lambda a: norm(a, **options), axis_name="d")(jnp.stack([A] * D))


def test_the_axis_of_a_mesh_is_not_named_in_plain_jit():
    grid = mesh(d=4)
    with jax.set_mesh(grid), pytest.raises(ValueError, match="in plain jit pass axis_name=None"):
        jax.jit(functools.partial(nl.layer_norm, axis_name="d"))(A)


def test_one_value_on_each_device_is_a_statistic_and_one_on_all_is_none():
    a = jnp.asarray(draw(0, 3, D), jnp.float32)
    h = jax.vmap(functools.partial(nl.layer_norm, axis_name="d"), 1, 1, axis_name="d")(a[..., None])
    assert gap(h[..., 0], nl.layer_norm(a)) < 2e-6
    with pytest.raises(ValueError, match="one value per statistic"):
        jax.vmap(functools.partial(nl.layer_norm, axis_name="d"), axis_name="d")(a[None, :, :1])


@pytest.mark.parametrize("options", [{}, {"channels": "d", "positions": "d"}, {"channels": 3}])
def test_a_spec_that_means_nothing(options):
    with pytest.raises(ValueError, match="Sharded: got"):
        nl.Sharded(**options)


def test_groups_of_a_convolution_are_on_one_device():
    run = functools.partial(nl.cosine_norm, linear=nl.Conv(groups=2), axis_name="d")
    with pytest.raises(ValueError, match="units that see all the inputs"):
        jax.vmap(run, axis_name="d")(jnp.ones((D, 1, 4, 4, 4)), jnp.ones((D, 3, 3, 2, 6)))
