"""Our modules where flax's stood: what Python sees of them, flax's tools, degenerate inputs."""

import copy
import dataclasses
import functools
import inspect
import pickle
import warnings
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab.linen as nll
import normlab.nnx as nlx
from tests.helpers import array, draw, gap

KEY = jax.random.key(0, impl="rbg")
X = array(draw(0, 4, 3, 6, mean=1.0))
NORMS = {
    "BatchNorm": {},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 2},
    "InstanceNorm": {},
    "WeightNorm": {},
}
LIBRARIES = {"linen": (nn, nll), "nnx": (nnx, nlx)}
names = pytest.mark.parametrize("name", NORMS)
libraries = pytest.mark.parametrize("library", LIBRARIES)


def linen(module, name, **options):
    if name == "WeightNorm":
        return module.WeightNorm(nn.Dense(6, kernel_init=nn.initializers.ones), **options)
    mode = {"use_running_average": False} if name == "BatchNorm" else {}
    return getattr(module, name)(**mode, **NORMS[name], **options)


def made(module, name, **options):
    """An nnx module."""
    rngs = nnx.Rngs(0)
    if name == "WeightNorm":
        return module.WeightNorm(nnx.Linear(6, 6, rngs=rngs), rngs=rngs, **options)
    return getattr(module, name)(6, **NORMS[name], rngs=rngs, **options)


# What Python sees.


@libraries
@names
@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_every_parameter_of_flaxs_is_ours_in_its_place_and_of_its_kind(library, name, method):
    theirs, ours = (
        inspect.signature(getattr(getattr(module, name), method)).parameters
        for module in LIBRARIES[library]
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    placed = [[p for p in ps if ps[p].kind != keyword] for ps in (theirs, ours)]
    if library == "linen" and method == "__init__":  # linen ends with parent and name
        placed = [[p for p in ps if p not in ("parent", "name")] for ps in placed]
    assert placed[1][: len(placed[0])] == placed[0]
    for word in theirs:
        assert ours[word].kind == theirs[word].kind, word
    more = {"population", "implementation"} if method == "__init__" else {"use_running_average"}
    assert set(ours) - set(theirs) <= more


@libraries
@names
def test_public_names_are_flaxs_and_the_documented_ones(library, name):
    classes = [getattr(module, name) for module in LIBRARIES[library]]
    theirs, ours = ({n for n in dir(c) if n[0] != "_"} for c in classes)
    assert theirs <= ours
    assert ours - theirs <= {"population", "implementation"}
    if library == "nnx":
        theirs, ours = (set(vars(made(m, name))) for m in LIBRARIES[library])
        assert theirs <= ours
        assert ours - theirs <= {"pending", "num_features", "implementation"}


MASKS = {
    "array": jnp.ones((4, 3, 1), bool),
    "numpy": np.ones(X.shape, bool),
    "weights": jnp.ones(4),
    "number": 1,
}


@pytest.mark.parametrize("mask", MASKS)
@libraries
@pytest.mark.parametrize("name", [n for n in NORMS if n != "WeightNorm"] + ["RegistryNorm"])
def test_a_mask_in_the_place_of_the_mode_is_an_error(library, name, mask):
    """The norms that look at no mode as well: the mask would be lost without a word."""
    if name == "RegistryNorm":
        module = nll.RegistryNorm("layer") if library == "linen" else nlx.RegistryNorm("layer", 6)
    else:
        options = {} if name != "BatchNorm" else {"use_running_average": None}
        make = getattr(LIBRARIES[library][1], name)
        options |= NORMS[name] if library == "linen" else NORMS[name] | {"rngs": nnx.Rngs(0)}
        module = make(**options) if library == "linen" else make(6, **options)
    call = functools.partial(module.init, KEY) if library == "linen" else module
    given = MASKS[mask]
    refused = pytest.raises(ValueError, match=r"use_running_average.*expected True or False.*mask=")
    if (library, name) == ("nnx", "RMSNorm"):  # where the mask comes second, as in flax's
        with refused:
            call(X, use_running_average=given)
        return
    with refused:
        call(X, given)
    with refused:
        jax.eval_shape(lambda x, given: call(x, given), X, given)


class Last(NamedTuple):
    """A population of a user's: the last batch."""

    mean: jax.Array
    var: jax.Array

    def update(self, m, *, decay=None, bad_batch="skip"):
        return Last(m.mean.ravel(), m.var().ravel())

    def read(self):
        return self.mean, self.var


def init_last(channels):
    return Last(jnp.zeros(channels), jnp.ones(channels))


@libraries
@pytest.mark.parametrize("population", [init_last, "tests.test_flax_places:init_last"])
def test_a_population_of_a_users_is_kept_and_ends_a_transaction(library, population):
    one, two = (Last(v.mean((0, 1)), v.var((0, 1))) for v in (X, jnp.concatenate([X, 3 * X])))
    expected = (X - one.mean) / jnp.sqrt(one.var + 1e-5)
    if library == "linen":
        module = nll.BatchNorm(population=population)
        variables = module.init(KEY, X, True)
        h, kept = module.apply(variables, X, False, mutable=["batch_stats"])
        assert gap(h, expected) < 1e-5
        assert gap(kept["batch_stats"]["population"], one) < 1e-5
        seen = {}
        for x in (X, 3 * X):
            _, seen = module.apply(variables | seen, x, False, mutable=["transaction"])
        kept = nll.commit(variables, seen["transaction"])["population"]
    else:
        module = nlx.BatchNorm(6, population=population, rngs=nnx.Rngs(0))
        assert gap(module(X), expected) < 1e-5
        assert gap(module.population.get_value(), one) < 1e-5
        nlx.begin(module)
        module(X), module(3 * X)
        nlx.commit(module)
        kept = module.population.get_value()
    assert gap(kept, two) < 1e-4


@names
def test_linen_modules_are_dataclasses_that_copy_and_pickle(name):
    module = linen(nll, name)
    again = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module), module.copy()]
    again += [dataclasses.replace(module, use_scale=True), module.clone(name="other")]
    made = jax.jit(lambda x: [m.init_with_output(KEY, x) for m in (module, *again)])(X)
    for other in made[1:]:
        assert gap(other, made[0]) == 0
    fewer = jax.eval_shape(dataclasses.replace(module, use_scale=False).init, KEY, X)
    assert "scale" not in str(fewer)
    assert hash(linen(nll, "LayerNorm")) == hash(linen(nll, "LayerNorm"))


@names
def test_nnx_modules_copy_pickle_split_and_are_pytrees(name):
    module = made(nlx, name)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    leaves, structure = jax.tree.flatten(module)
    again = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module), nnx.clone(module)]
    again += [nnx.merge(graph, params, rest, copy=True), jax.tree.unflatten(structure, leaves)]
    hash(graph)
    h = nnx.clone(module)(X)
    for other in again:
        assert gap(nnx.clone(other)(X), h) == 0
    assert nnx.eval_shape(lambda m: m(X), module).shape == X.shape


@names
def test_nnx_transformations_of_a_module_are_those_of_flaxs(name):
    @nnx.jit
    def run(module):
        def loss(module, x):
            return (module(x) * x).sum()

        twice = jnp.stack([X, 2 * X])
        members = nnx.StateAxes({...: None})
        each = nnx.vmap(loss, in_axes=(members, 0)) if name != "BatchNorm" else lambda m, x: 0.0
        grads = nnx.grad(nnx.remat(loss), argnums=1)(module, X)
        steps = nnx.fori_loop(0, 2, lambda i, c: (c[0], c[0](c[1]) + X), (module, X))[1]
        chosen = nnx.cond(True, loss, lambda m, x: loss(m, 2 * x), module, X)
        return each(module, twice), grads, steps, chosen

    ours, theirs = (made(m, name) for m in (nlx, nnx))
    if name == "InstanceNorm":  # three values: flax's one pass is 1e-5 off
        theirs.use_fast_variance = False
    if name == "WeightNorm":  # flax's overwrites the kernel, so that it must not be called twice
        theirs = made(nlx, name)
    assert gap(run(ours), run(theirs)) < 2e-5


# Flax's tools.


@names
def test_nnx_tabulate_counts_operations_and_leaves_the_class_as_it_was(name):
    module = made(nlx, name)
    before = dict(vars(type(module)))
    wide = {"console_kwargs": {"width": 200}}
    table = nnx.tabulate(module, X, compute_flops=True, compute_vjp_flops=True, **wide)
    assert name in table
    assert "vjp_flops" in table
    after = vars(type(module))
    assert all(after[n] is value for n, value in before.items() if callable(value))
    assert nnx.jit(lambda m, x: m(x))(module, X).shape == X.shape


@pytest.mark.parametrize("flops", [False, True])
def test_tables_are_flaxs(flops):
    wide = {"console_kwargs": {"width": 200}}
    for name in ("BatchNorm", "GroupNorm"):
        theirs, ours = (nnx.tabulate(made(m, name), X, **wide) for m in (nnx, nlx))
        assert ours == theirs
        theirs, ours = (
            linen(m, name).tabulate(KEY, X, compute_flops=flops, **wide).splitlines()
            for m in (nn, nll)
        )
        assert flops or ours == theirs
        assert len(ours) == len(theirs)


def test_view_info_tells_the_argument():
    theirs, ours = (nnx.view_info(made(m, "BatchNorm")).splitlines() for m in (nnx, nlx))
    assert ours[:2] == theirs[:2]
    assert "running statistics" in ours[2]
    assert "use_running_average" in nnx.view_info(nlx.RegistryNorm("batch", 6))


@names
def test_modules_are_displayed(name, capsys):
    module = made(nlx, name)
    nnx.display(module)
    assert name in capsys.readouterr().out
    assert name in repr(module)


def test_bridges_carry_our_modules_as_flaxs():
    for name in ("BatchNorm", "GroupNorm"):
        hs = []
        for module, inner in ((nnx, nn), (nlx, nll)):
            wrapped = nnx.bridge.to_linen(getattr(module, name), 6, **NORMS[name])
            h, changed = wrapped.apply(wrapped.init(KEY, X), X, mutable=True)
            mode = {"use_running_average": True} if name == "BatchNorm" else {}
            other = getattr(inner, name)(**mode, **NORMS[name])
            other = nnx.bridge.ToNNX(other, rngs=nnx.Rngs(0))
            nnx.bridge.lazy_init(other, X)
            hs.append((h, changed["params"], other(X)))
        assert gap(hs[1], hs[0]) < 1e-6


# The same calls.


def test_rms_norm_takes_a_mask_in_the_second_place_or_the_mode_of_a_batch_norm():
    mask = np.arange(6) < 4
    mask = np.broadcast_to(mask, X.shape)
    theirs, ours = made(nnx, "RMSNorm"), made(nlx, "RMSNorm")
    assert gap(ours(X, mask), theirs(X, mask)) < 1e-6
    for mode in (True, False):
        assert gap(ours(X, mode), ours(X)) == 0


def test_group_norm_of_one_example_without_a_batch():
    module = linen(nll, "GroupNorm")
    theirs = linen(nn, "GroupNorm")
    variables = jax.jit(lambda x: theirs.init(KEY, x))(X[0, 0])
    run = jax.jit(lambda x: [m.apply(variables, x) for m in (module, theirs)])
    h, expected = run(X[0, 0])
    assert gap(h, expected) < 1e-6
    assert gap(made(nlx, "GroupNorm")(X[0, 0]), expected) < 1e-6


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]], [[0], [1, 2, 3]]])
@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 6)], ids=["[C]", "[1, C]"])
def test_a_device_may_hold_one_example(shape, groups):
    x = X[:, 0].reshape(shape)
    options = {"axis_name": "d"} | ({"axis_index_groups": groups} if groups else {})
    module = linen(nll, "BatchNorm", **options)
    variables = jax.jit(lambda x: module.init(KEY, x))(x[0])
    run = jax.jit(
        jax.vmap(lambda x: module.apply(variables, x, mutable=["batch_stats"]), axis_name="d")
    )
    if groups and len(groups[0]) == 1:
        with pytest.warns(UserWarning, match="BatchNorm: .* one value"):
            h, changed = run(x)
    else:
        h, changed = run(x)
    right = np.asarray(x, np.float64).reshape(4, 6)
    for group in groups or [range(4)]:
        own = right[list(group)]
        z = (own - own.mean(0)) / np.sqrt(own.var(0) + 1e-5)
        assert gap(h.reshape(4, 6)[np.array(group)], z) < 2e-5
    stats = {"mean": 0.01 * right.mean(0), "var": 0.99 + 0.01 * right.var(0)}
    assert gap(jax.tree.map(lambda v: v[0], changed["batch_stats"]), stats) < 1e-6


@libraries
@pytest.mark.parametrize("axes", [0, -3, (0, 2), (2, -3)])
def test_instance_norm_needs_examples_first_and_says_so_in_flaxs_words(library, axes):
    words = "The channel axes cannot include the leading dimension as this is assumed to be the"
    for module in LIBRARIES[library]:
        if library == "linen":
            norm = module.InstanceNorm(feature_axes=axes)
            run = lambda: norm.init(KEY, X)  # noqa: B023, E731
        else:
            size = int(np.prod([X.shape[i] for i in np.atleast_1d(axes)]))
            norm = module.InstanceNorm(size, feature_axes=axes, rngs=nnx.Rngs(0))
            run = lambda: norm(X)  # noqa: B023, E731
        with pytest.raises(ValueError, match=f"{words} batch axis."):
            run()


LAYOUTS = {
    "batch": ("BatchNorm", {"use_running_average": False}),
    "batch, two axes": ("BatchNorm", {"use_running_average": False, "axis": (1, -1)}),
    "layer": ("LayerNorm", {"reduction_axes": (1, 2)}),
    "rms": ("RMSNorm", {}),
    "group": ("GroupNorm", {"num_groups": 2}),
    "group, axes": ("GroupNorm", {"num_groups": 2, "reduction_axes": (0, -1)}),
    "instance": ("InstanceNorm", {"use_fast_variance": False}),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_inputs_may_have_an_explicit_sharding_or_a_symbolic_size(case):
    name, options = LAYOUTS[case]
    module = getattr(nll, name)(**options)
    x, mask = array(draw(2, 8, 3, 6)), np.arange(8) < 7
    start = jax.jit(lambda x: module.init(KEY, x))(x)
    if name == "BatchNorm":
        start = start | {"batch_stats": jax.tree.map(lambda v: v + 0.5, start["batch_stats"])}

    def run(x, mask):
        return module.apply(start, x, mask=mask[:, None, None], mutable=["batch_stats"])

    expected = jax.jit(run)(x, mask)
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Explicit,) * 2)
    for spec in (P("i"), P("i", None, "j")):
        with jax.set_mesh(mesh):
            h = jax.jit(run)(jax.device_put(x, NamedSharding(mesh, spec)), mask)
        assert gap(h, expected) < 1e-5
    (n,) = export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, 3, 6), x.dtype), jax.ShapeDtypeStruct((n,), bool)
    assert gap(export.export(jax.jit(run))(*shapes).call(x, mask), expected) < 1e-5


# One value for a statistic.

ONE = {
    "batch": ("BatchNorm", (1, 6), {}),
    "batch, no example axis": ("BatchNorm", (6,), {}),
    "batch, one position": ("BatchNorm", (1, 1, 1, 6), {}),
    "batch, channels first": ("BatchNorm", (6, 1), {"axis": 0}),
    "layer, one channel": ("LayerNorm", (4, 1), {}),
    "layer, an axis of one": ("LayerNorm", (4, 1, 6), {"reduction_axes": 1}),
    "group": ("GroupNorm", (4, 6), {"num_groups": 6}),
    "group, one position": ("GroupNorm", (4, 1, 1, 6), {"num_groups": None, "group_size": 1}),
    "group, axes": ("GroupNorm", (4, 2, 6), {"num_groups": 6, "reduction_axes": -1}),
    "instance": ("InstanceNorm", (4, 6), {}),
    "instance, one position": ("InstanceNorm", (4, 1, 6), {}),
    "instance, all features": ("InstanceNorm", (4, 2, 3), {"feature_axes": (1, 2)}),
}


@libraries
@pytest.mark.parametrize("case", ONE)
def test_one_value_for_a_statistic_is_a_warning_and_flaxs_result(library, case):
    name, shape, options = ONE[case]
    options = options | {"bias_init": nn.initializers.normal(1.0)}
    x = array(draw(3, *shape, mean=2.0))
    results = []
    for module in LIBRARIES[library]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if library == "linen":
                mode = {"use_running_average": False} if name == "BatchNorm" else {}
                norm = getattr(module, name)(**mode, **options)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    start = jax.jit(lambda x: norm.init(KEY, x))(x)  # noqa: B023
                run = jax.jit(lambda x: norm.apply(start, x, mutable=["batch_stats"]))  # noqa: B023
                results.append(run(x))
            else:
                features = 1 if case == "layer, one channel" else 6
                norm = getattr(module, name)(features, **options, rngs=nnx.Rngs(0))
                results.append((norm(x), nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))))
    assert [w.category for w in said] == [UserWarning]
    (message,) = (str(w.message) for w in said)
    assert message.startswith(name)
    assert str(shape) in message
    assert "one value" in message
    assert "Use " in message
    assert gap(results[1], results[0]) < 1e-6


def test_the_warning_comes_once_a_trace_and_names_the_path_and_not_for_initializing():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nll.BatchNorm(use_running_average=False, name="norm")(nn.Dense(6)(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="encoder")(x)

    variables = Net().init(KEY, X[:1, 0])
    run = jax.jit(lambda x: Net().apply(variables, x, mutable=["batch_stats"])[0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(X[:1, 0]), run(X[1:2, 0])
    assert len(said) == 1
    assert str(said[0].message).startswith("BatchNorm encoder/norm: ")
    run(X[:2, 0])
    evaluated = nll.BatchNorm(use_running_average=True)
    evaluated.apply(evaluated.init(KEY, X), X[:1, 0])


def test_one_example_that_is_not_finite_leaves_the_statistics():
    x = X[:1, 0].at[0, 2].set(jnp.nan)
    module = linen(nll, "BatchNorm")
    variables = module.init(KEY, x)
    with pytest.warns(UserWarning, match="one value"):
        h, changed = module.apply(variables, x, mutable=["batch_stats"])
    assert jnp.isnan(h[0, 2])
    assert gap(changed["batch_stats"], variables["batch_stats"]) == 0
    norm = made(nlx, "BatchNorm")
    with pytest.warns(UserWarning, match="BatchNorm of 6 features: .* one value"):
        norm(x)
    assert gap(norm.mean[...], jnp.zeros(6)) == 0


def test_instance_norm_is_nearer_at_a_large_mean_than_flaxs():
    x = array(1e4 + draw(5, 2, 3, 4, 5))
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((1, 2), keepdims=True), exact.var((1, 2), keepdims=True)
    right = (exact - mean) / np.sqrt(var + 1e-6)
    theirs, ours = (m.InstanceNorm(use_fast_variance=False) for m in (nn, nll))
    run = jax.jit(lambda x: [m.init_with_output(KEY, x)[0] for m in (theirs, ours)])
    wrong, h = run(x)
    assert gap(h, right) < gap(wrong, right) < 1e-3


# The types of running statistics, and their gradient.


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("cast", [None, jnp.bfloat16])
@pytest.mark.parametrize("param", [jnp.float32, jnp.bfloat16])
def test_linen_statistics_are_kept_in_flaxs_type(forced, cast, param):
    def types(module, x, dtype):
        norm = module.BatchNorm(
            use_running_average=False,
            force_float32_reductions=forced,
            param_dtype=param,
            dtype=dtype,
        )

        def run(x):
            variables = norm.init(KEY, x)
            if cast is not None:
                variables = jax.tree.map(lambda v: v.astype(cast), variables)
            h, changed = norm.apply(variables, x, mutable=["batch_stats"])
            return h, changed, norm.clone(use_running_average=True).apply(variables, x)

        return jax.eval_shape(run, jnp.ones((4, 6), x))

    with jax.numpy_dtype_promotion("standard"):
        for x in (jnp.float32, jnp.bfloat16, jnp.int32):
            for dtype in (None, jnp.float32, jnp.bfloat16):
                assert types(nll, x, dtype) == types(nn, x, dtype), (x, dtype)


def test_statistics_of_float64_are_kept_in_flaxs_type(x64):
    x = draw(0, 4, 6)
    with jax.numpy_dtype_promotion("standard"):
        changed = []
        for module in (nn, nll):
            norm = linen(module, "BatchNorm")
            start = norm.init(KEY, x.astype(np.float32))
            run = jax.jit(lambda x: norm.apply(start, x, mutable=["batch_stats"])[1])  # noqa: B023
            changed.append(run(x)["batch_stats"])
    assert [v.dtype for v in changed[1].values()] == [v.dtype for v in changed[0].values()]
    assert gap(changed[1], {"mean": 0.01 * x.mean(0), "var": 0.99 + 0.01 * x.var(0)}) < 1e-12


def test_statistics_cast_to_half_do_not_stall():
    """Where bfloat16 has a step of 1/32, a hundredth of what is missing is often less."""
    x = array(5 + draw(1, 64, 2))
    half = {"mean": jnp.full(2, 4.0, jnp.bfloat16), "var": jnp.ones(2, jnp.bfloat16)}

    def linen_norm(steps):
        norm, stats = nll.BatchNorm(use_running_average=False), {"batch_stats": half}
        norm = norm.clone(use_scale=False, use_bias=False)
        step = jax.jit(lambda stats: norm.apply(stats, x, mutable=["batch_stats"])[1])
        for _ in range(steps):
            stats = step(stats)
        return stats["batch_stats"]["mean"]

    def nnx_norm(steps):
        norm = nlx.BatchNorm(2, rngs=nnx.Rngs(0))
        nnx.update(norm, nnx.State({k: nnx.BatchStat(v) for k, v in half.items()}))
        step = nnx.jit(lambda norm: norm(x))
        for _ in range(steps):
            step(norm)
        return norm.mean[...]

    expected = 4 + (1 - 0.99**20) * (np.asarray(x, np.float64).mean(0) - 4)
    assert gap(linen_norm(20), expected) < 1e-6
    assert gap(nnx_norm(20), expected) < 1e-6


def test_a_transaction_of_statistics_in_half_ends_in_float32():
    norm = linen(nll, "BatchNorm")
    variables = jax.jit(lambda x: norm.init(KEY, x))(X)
    stats = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables["batch_stats"])
    _, seen = norm.apply(variables | {"batch_stats": stats}, X, mutable=["transaction"])
    new = nll.commit({"batch_stats": stats}, seen["transaction"])
    assert gap(new, norm.apply(variables, X, mutable=["batch_stats"])[1]["batch_stats"]) < 1e-6
    assert {v.dtype for v in new.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("population", ["ema", "debiased"])
def test_the_gradient_through_linen_statistics_is_flaxs(population):
    def gradient(norm):
        variables = jax.jit(lambda x: norm.init(KEY, x))(X)

        def loss(x):
            _, changed = norm.apply(variables, x, mutable=["batch_stats"])
            evaluated = norm.clone(use_running_average=True)
            return (evaluated.apply(variables | changed, X) * X).sum()

        return jax.jit(jax.grad(loss))(X)

    ours = gradient(linen(nll, "BatchNorm", population=population))
    if population == "ema":
        assert gap(ours, gradient(linen(nn, "BatchNorm"))) < 1e-5
    assert jnp.abs(ours).max() > 1e-3


def test_the_gradient_through_nnx_statistics_is_cut_as_in_flax():
    def loss(module, x):
        module(x)
        return (module(X, use_running_average=True) * X).sum()

    for module in (nnx, nlx):
        grads = nnx.jit(nnx.grad(loss, argnums=1))(made(module, "BatchNorm"), X)
        assert not grads.any()
