"""Topologies: each shard is normalized with those that the spec names, in every mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from tests.helpers import MAPPERS, array, draw, gap, mappers, mesh
from tests.test_devices import collectives

D, N, C = 8, 4, 3  # devices, examples on each, channels
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
GRIDS = {"jit": AxisType.Auto, "jit, explicit": AxisType.Explicit}
MODES = (*MAPPERS, *GRIDS)
MASK = np.arange(N) < np.array([4, 3, 2, 1, 0, 4, 3, 1])[:, None]
"""Which of each device's examples count."""

STRIDED = ((0, 4), (1, 5), (2, 6), (3, 7))
UNEVEN = ((0, 3, 5), (1,), (2, 4, 6, 7))
TOPOLOGIES = {
    "all": nl.Sync("d"),
    "pairs": nl.Sync("d", groups=2),
    "halves": nl.Sync("d", groups=4),
    "alone": nl.Sync("d", groups=1),
    "strided": nl.Sync("d", groups=STRIDED),
    "uneven": nl.Sync("d", groups=UNEVEN),
    "ring": nl.Sync("d", members=nl.devices.ring(D)),
    "ghosts": nl.Sync("d", shards=2, groups=1),
    "ghosts across devices": nl.Sync(
        "d", shards=2, groups=((*range(1, 16, 2),), (*range(0, 16, 2),))
    ),
    "virtual, within devices": nl.Sync("d", virtual_batch=2),
    "virtual, across devices": nl.Sync("d", virtual_batch=16),
}


def members(sync: nl.Sync) -> tuple[int, list]:
    """The number of shards, and for each the shards it is normalized with, spelt out."""
    count = D * sync.shards
    if sync.virtual_batch:
        count, block = D * N, sync.virtual_batch
        return count, [[*range(i - i % block, i - i % block + block)] for i in range(count)]
    if sync.members:
        return count, list(sync.members)
    groups = sync.groups or count
    if isinstance(groups, int):
        return count, [[*range(i - i % groups, i - i % groups + groups)] for i in range(count)]
    return count, [next(list(g) for g in groups if i in g) for i in range(count)]


def oracle(sync, a, params, weights=None):
    """`h` of the whole batch `[D·N, ..., C]` on one device: every shard among its members."""
    count, chosen = members(sync)
    together = np.array([[j in names for j in range(count)] for names in chosen], float)
    x = a.reshape(count, -1, C)
    w = np.ones(a.shape[:-1]) if weights is None else weights[:, None] * np.ones(a.shape[:-1])
    w = w.reshape(count, -1, 1)
    n = jnp.maximum(together @ w.sum(1), 1e-300)
    mean = together @ (w * x).sum(1) / n
    # Of a shard about its own mean, and of the means: no digit is lost.
    own = (w * x).sum(1) / jnp.maximum(w.sum(1), 1e-300)
    within = (w * jnp.square(x - own[:, None])).sum(1)
    between = jnp.square(own[None] - mean[:, None]) * w.sum(1)[None] * together[..., None]
    var = (together @ within + between.sum(1)) / n
    h = params.g * (x - mean[:, None]) / jnp.sqrt(var[:, None] + 1e-5) + params.b
    return h.reshape(a.shape)


@functools.cache
def expected(topology, precision="float32", *, masked=False):
    """What one device has, in float64: `(h, the gradients of Σ c·h by params and a)`."""
    params, a, c = problem(precision)
    with jax.enable_x64(True):
        params, a, c = jax.tree.map(lambda v: jnp.asarray(v, "float64"), (params, a, c))
        w = array(MASK.reshape(-1), "float64") if masked else None

        def f(params, a):
            h = oracle(TOPOLOGIES[topology], a, params, w)
            return (c * h).sum(), h

        grads, h = jax.jit(jax.grad(f, (0, 1), has_aux=True))(params, a)
        return jax.tree.map(np.asarray, (h, grads))


def run(mode, f, params, sharded):
    """`f(params, *sharded)` per device; of `[D·N, ...]` arrays, in and out."""
    if mode in GRIDS:
        put = jax.device_put(sharded, NamedSharding(mesh(GRIDS[mode], d=D), P("d")))
        return jax.jit(f)(params, *put)
    split = jax.tree.map(lambda v: v.reshape(D, -1, *v.shape[1:]), sharded)
    out = mappers(D)[mode](lambda params, sharded: f(params, *sharded))(params, split)
    return out


def spec(topology, mode):
    """The topology; in plain jit with the mesh."""
    sync = TOPOLOGIES[topology]
    return dataclasses.replace(sync, mesh=mesh(GRIDS[mode], d=D)) if mode in GRIDS else sync


def count(mode, f, params, sharded):
    """The collectives of what `run` runs, the sum of a loss over devices not among them."""
    if mode in GRIDS:
        put = jax.device_put(sharded, NamedSharding(mesh(GRIDS[mode], d=D), P("d")))
        return collectives(jax.jit(f), params, *put)
    split = jax.tree.map(lambda v: v.reshape(D, -1, *v.shape[1:]), sharded)
    return collectives(mappers(D)[mode](lambda p, s: f(p, *s)), params, split)


def whole(v):
    return np.asarray(v).reshape(-1, *v.shape[2:])


def problem(dtype):
    a = draw(0, D, N, 2, C) + draw(1, D, 1, 1, 1)
    params = nl.Affine(array(draw(2, C, mean=1.0), dtype), array(draw(3, C), dtype))
    return params, array(a.reshape(D * N, 2, C), dtype), array(draw(4, D * N, 2, C), dtype)


@pytest.mark.parametrize(
    ("mode", "precision"), [*((mode, "float32") for mode in MODES), ("shard_map", "float64")]
)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_each_shard_is_normalized_with_its_members(topology, mode, precision):
    """The outputs; the running statistics are those of all the devices."""
    with jax.enable_x64(precision == "float64"):
        check_forward(topology, mode, precision)


def check_forward(topology, mode, precision):
    params, a, _ = problem(precision)
    state = nl.init_running(C, dtype=precision)
    _, population = nl.batch_norm(a, params, state, train=True)

    def f(params, a):
        return nl.batch_norm(a, params, state, train=True, axis_name=spec(topology, mode))

    h, after = run(mode, f, params, (a,))
    if mode not in GRIDS:
        h, population = (
            whole(h),
            jax.tree.map(lambda v: np.broadcast_to(v, (D, *v.shape)), population),
        )
    assert gap(h, expected(topology, precision)[0]) < TOLERANCE[precision]
    assert gap(after, population) < TOLERANCE[precision]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_gradient_crosses_devices_as_the_statistics_do(topology, mode):
    """`grad` outside the map: of the sum of all devices' losses, in every mode."""
    params, a, c = problem("float32")
    axis_name = spec(topology, mode)

    def loss(params, a):
        def f(p, a):
            return nl.batch_norm(a, p, train=True, axis_name=axis_name)[0]

        h = run(mode, f, params, (a,))
        return (c.reshape(h.shape) * h).sum()

    # Eagerly `pmap` is what its users have; the others are faster in a jit.
    grad = jax.grad(loss, (0, 1)) if mode == "pmap" else jax.jit(jax.grad(loss, (0, 1)))
    assert gap(grad(params, a), expected(topology)[1]) < 5e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("topology", ["all", "uneven", "ring", "ghosts", "virtual, across devices"])
def test_masked_and_empty_shards_weigh_what_they_hold(topology, mode):
    params, a, _ = problem("float32")
    mask = MASK.reshape(-1)
    dirty = jnp.where(mask[:, None, None], a, jnp.nan)
    weights = array(mask)

    def f(params, a, w):
        return nl.batch_norm(a, params, train=True, axis_name=spec(topology, mode), weights=w)[0]

    h = run(mode, f, params, (dirty, weights))
    h = h if mode in GRIDS else whole(h)
    one = expected(topology, masked=True)[0]
    assert gap(np.asarray(h)[mask], one[mask]) < 5e-6


@pytest.mark.parametrize("kind", GRIDS.values(), ids=str)
def test_plain_jit_finds_the_axes_of_the_mesh_that_is_set(kind):
    """The string alone, as inside shard_map."""
    params, a, _ = problem("float32")
    grid = mesh(kind, d=D)
    with jax.set_mesh(grid):
        put = jax.device_put(a, NamedSharding(grid, P("d")))
        h = jax.jit(lambda a: nl.batch_norm(a, params, train=True, axis_name="d")[0])(put)
    assert gap(h, expected("all")[0]) < 5e-6
    assert h.sharding.is_equivalent_to(NamedSharding(grid, P("d")), h.ndim)


def step(params, a, c, axis_name):
    """The output, its gradient by `a`, and the running statistics after it."""
    state = nl.init_running(C)

    def loss(a):
        h, after = nl.batch_norm(a, params, state, train=True, axis_name=axis_name)
        return (c * h).sum(), (h, after)

    da, (h, after) = jax.grad(loss, has_aux=True)(a)
    return h, da, after


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_a_virtual_batch_gives_the_same_numbers_on_any_number_of_devices(devices):
    params, a, c = problem("float32")
    one = jax.jit(lambda *args: step(*args, nl.Sync(virtual_batch=8)))(params, a, c)
    split = jax.tree.map(lambda v: v.reshape(devices, -1, *v.shape[1:]), (a, c))
    sync = nl.Sync("d", virtual_batch=8)
    h, da, after = mappers(devices)["pmap"](lambda p, s: step(p, *s, sync))(params, split)
    assert gap((whole(h), whole(da)), one[:2]) < 5e-6
    for i in range(devices):
        assert gap(jax.tree.map(lambda v, i=i: v[i], after), one[2]) < 5e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"groups": 3},
            r"groups of 3 for 8 devices; expected a size that divides.*use groups of 2",
        ),
        ({"groups": ((0, 1), (2, 3))}, r"do not partition 8 devices \(missing: 4, 5, 6, 7\)"),
        ({"groups": ((*range(8),), ())}, r"empty groups at: 1"),
        ({"groups": ((*range(8),), (3,))}, r"in more than one place: 3.*members may overlap"),
        ({"groups": ((*range(7), 9),)}, r"missing: 7; not there: 9"),
        ({"members": nl.devices.ring(4)}, r"members for 4 shards where there are 8.*ring\(8\)"),
        ({"members": ((),) * 8}, r"the members \(\) of shard 0"),
        ({"members": ((8,),) * 8}, r"the members \(8,\) of shard 0.*0 to 7"),
        ({"shards": 3, "groups": 1}, r"3 shards of a device's batch of 4.*use 2 shards"),
        ({"virtual_batch": 5}, r"virtual batch of 5 examples for a batch of 32 \(8 x 4\).*of 4"),
        ({"virtual_batch": 64}, r"virtual batch of 64 .*use a virtual batch of 32"),
    ],
)
def test_a_batch_that_cannot_be_cut_so_is_an_error(options, says):
    def f(a):
        return nl.batch_norm(a, train=True, axis_name=nl.Sync("d", **options))[0]

    with pytest.raises(ValueError, match=f"batch norm: got .*{says}"):
        jax.vmap(f, axis_name="d")(jnp.ones((D, N, C)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shards": 0}, "shards=0; expected at least 1"),
        ({"groups": 0}, "groups=0"),
        ({"every": -1}, "every=-1"),
        ({"gradient": "forwards"}, "'forwards'.*did you mean 'forward'"),
        ({"groups": 2, "virtual_batch": 4}, "groups and virtual_batch; expected one way"),
        ({"groups": 2, "members": nl.devices.ring(8)}, "groups and members"),
        ({"groups": 2, "staged": True}, "groups and staged"),
        ({"virtual_batch": 4, "shards": 2}, "virtual_batch and shards"),
        ({"every": 1, "shards": 2}, "every with parts of a batch"),
        ({"every": 1, "gradient": "backward"}, "every and gradient='backward'"),
        ({"axes": (), "staged": True}, "staged without axes"),
        ({"axes": (), "every": 1}, "every without axes"),
    ],
)
def test_a_spec_that_means_nothing_is_an_error(options, says):
    with pytest.raises(ValueError, match=f"Sync: got .*{says}"):
        nl.Sync(**{"axes": "d"} | options)


def test_an_unbound_axis_is_an_error_that_names_the_bound_ones():
    def f(a):
        return nl.batch_norm(a, train=True, axis_name=nl.Sync("replica", groups=2))[0]

    with pytest.raises(ValueError, match=r"'replica'.*bound here: 'd'.*jax\.set_mesh"):
        jax.vmap(f, axis_name="d")(jnp.ones((D, N, C)))
    with pytest.raises(ValueError, match=r"'replica'.*bound here: none"):
        f(jnp.ones((N, C)))
    with jax.set_mesh(mesh(d=D)), pytest.raises(ValueError, match="'replica'"):
        f(jnp.ones((N, C)))


def test_a_batch_that_does_not_divide_over_the_mesh_is_an_error():
    sync = nl.Sync("d", mesh=mesh(d=D))
    with pytest.raises(
        ValueError, match=r"a batch of 12 examples over the 8 devices.*multiple of 8"
    ):
        jax.jit(lambda a: nl.batch_norm(a, train=True, axis_name=sync)[0])(jnp.ones((12, C)))


def test_groups_of_one_value_are_refused():
    """The variance of one value is zero: the output would be the bias."""
    for options in ({"groups": 1, "shards": 4}, {"virtual_batch": 1}, {"members": ((0,),) * D}):
        shape = (D, 1, C) if "members" in options else (D, N, C)

        def f(a, options=options):
            return nl.batch_norm(a, train=True, axis_name=nl.Sync("d", **options))[0]

        with pytest.raises(ValueError, match="one value per channel"):
            jax.vmap(f, axis_name="d")(jnp.ones(shape))


@pytest.mark.parametrize("options", [{"groups": 2, "shards": 2}, {"virtual_batch": 2}])
def test_the_examples_are_cut_wherever_the_channels_are(options):
    a = array(draw(8, N, C))
    sync = nl.Sync(**options)
    last = nl.batch_norm(a, train=True, axis_name=sync)[0]
    first = nl.batch_norm(a.T, train=True, axis_name=sync, channel_axis=0)[0]
    assert gap(first.T, last) < 1e-6


def test_a_spec_of_lists_is_one_of_tuples():
    assert nl.Sync("d", groups=[[0, 1], [2, 3]]) == nl.Sync("d", groups=((0, 1), (2, 3)))
    assert hash(nl.Sync("d", members=[[0], [1]])) == hash(nl.Sync("d", members=((0,), (1,))))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_staged_merge_is_the_whole_one(check_vma):
    """One sum of 4 and one of 2 devices, in place of one of 8."""
    params, a, c = problem("float32")
    mapped = jax.jit(
        jax.shard_map(
            lambda p, a, c: step(p, a, c, nl.Sync(("i", "j"), staged=True)),
            mesh=mesh(i=2, j=4),
            in_specs=(P(), P(("i", "j")), P(("i", "j"))),
            out_specs=(P(("i", "j")), P(("i", "j")), P()),
            check_vma=check_vma,
        )
    )
    assert gap(mapped(params, a, c), step(params, a, c, None)) < 5e-6
    # Where types say what varies, the cotangents are added up over both axes at once.
    backward = ["all-reduce"] * (1 if check_vma else 2)
    assert collectives(mapped, params, a, c) == ["all-reduce"] * 2 + backward


@pytest.mark.parametrize("mode", ["pmap", "shard_map", "shard_map, check_vma=False", *GRIDS])
@pytest.mark.parametrize(
    ("topology", "forward", "backward"),
    [
        ("all", ["all-reduce"], ["all-reduce"]),
        ("pairs", ["collective-permute"], ["collective-permute"]),
        ("halves", ["collective-permute"] * 2, ["collective-permute"] * 2),
        ("uneven", ["collective-permute"] * 2, ["collective-permute"] * 2),
        ("ring", ["collective-permute"] * 2, ["collective-permute"] * 2),
        ("virtual, across devices", ["collective-permute"] * 2, ["collective-permute"] * 2),
        ("virtual, within devices", [], []),
        ("ghosts", [], []),
    ],
)
def test_a_layer_costs_few_collectives_each_way(topology, forward, backward, mode):
    """Without a state: one for all devices, ⌈log₂ g⌉ for groups, and none within a device."""
    params, a, c = problem("float32")
    axis_name = spec(topology, mode)

    def h(params, a):
        return nl.batch_norm(a, params, train=True, axis_name=axis_name)[0]

    def both(params, a, c):
        return jax.grad(lambda a: (c * h(params, a)).sum())(a)

    assert count(mode, h, params, (a,)) == forward
    found = count(mode, both, params, (a, c))
    assert found == sorted(forward + backward)
