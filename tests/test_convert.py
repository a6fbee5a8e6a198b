"""Conversions: nothing is lost on the way there and back, and both sides compute the same."""

import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normlab as nl
import normlab.linen
import normlab.nnx
from normlab import convert
from normlab.convert import equinox as equinox_table
from normlab.convert import flax as flax_table
from normlab.convert import haiku as haiku_table
from normlab.convert.library import REQUIRED
from tests.helpers import array, draw, gap

X = array(draw(0, 4, 3, 2, 6, mean=0.5, scale=1.5))
C = X.shape[-1]
KINDS = ("batch", "layer", "rms", "group", "instance", "weight")


class Case(NamedTuple):
    """A layer of another library, with values far from the initial ones."""

    library: str
    variables: Any
    norm: convert.Converted
    back: Any  # norm -> Exported
    call: Any  # (variables, train) -> (h [N, H, W, C], variables)
    read: Any  # variables -> norm


def scramble(tree, seed=1):
    """Every floating leaf replaced by values in [0.5, 2], which suit a variance too."""
    rng = np.random.default_rng(seed)

    def fill(v):
        if not (hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.floating)):
            return v
        return jnp.asarray(rng.uniform(0.5, 2, v.shape), v.dtype)

    return jax.tree.map(fill, tree)


def use(norm, x, train):
    """The converted norm by name, with the options it names. Returns h and its next state."""

    def compute(norm, x):
        if norm.kind == "weight":
            linear = nl.Dense() if norm.kernel.ndim == 2 else nl.Conv()
            return linear(x, nl.weight_norm(norm.kernel, norm.params)) + norm.params.b, ()
        apply = nl.get(norm.kind, **norm.options).apply
        return apply(norm.params, norm.state, nl.Site(x), train=train)

    return jax.jit(compute)(norm, x)


def without_history(tree):
    def one(state):
        return state._replace(fresh=jnp.zeros(4), before=None) if average(state) else state

    average = lambda leaf: isinstance(leaf, nl.Running)  # noqa: E731
    known = lambda leaf: average(leaf) or isinstance(leaf, convert.Converted)  # noqa: E731

    def each(leaf):
        return leaf._replace(state=one(leaf.state)) if hasattr(leaf, "state") else one(leaf)

    return jax.tree.map(each, tree, is_leaf=known)


def same(actual, expected, but=()):
    """Bit for bit, with names, shapes and types; the leaves under the names `but` to one ulp.

    Whether an average was merged with those of other devices no other library tells.
    """
    actual, expected = without_history(actual), without_history(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        assert a.dtype == e.dtype
        if any(name in jax.tree_util.keystr(path) for name in but):
            np.testing.assert_array_max_ulp(a, e, 1)
        else:
            np.testing.assert_array_equal(a, e)


# --- flax.linen

LINEN = {
    "batch": nn.BatchNorm(momentum=0.8, epsilon=1e-3, use_running_average=True),
    "layer": nn.LayerNorm(use_bias=False),
    "rms": nn.RMSNorm(reduction_axes=(1, 2, 3)),
    "group": nn.GroupNorm(num_groups=None, group_size=2, epsilon=1e-4),
    "instance": nn.InstanceNorm(use_scale=False),
    "weight": nn.WeightNorm(nn.Conv(5, (3, 3))),
}


def linen(kind) -> Case:
    module = LINEN[kind]
    variables = scramble(jax.eval_shape(module.init, jax.random.key(0), X))

    def call(variables, train):
        used = module.clone(use_running_average=False) if train else module
        apply = jax.jit(functools.partial(used.apply, mutable=["batch_stats"]))
        h, new = apply(variables, X)
        return h, {**variables, **new}

    def read(variables):
        return convert.from_linen(variables, module)

    return Case("linen", variables, read(variables), convert.to_linen, call, read)


# --- flax.nnx


def nnx_module(kind):
    options = {"rngs": nnx.Rngs(0)}
    if kind == "weight":
        return nnx.WeightNorm(nnx.Conv(C, 5, (3, 3), **options), **options)
    made = {
        "batch": lambda: nnx.BatchNorm(C, momentum=0.8, use_running_average=True, **options),
        "layer": lambda: nnx.LayerNorm(C, epsilon=1e-3, **options),
        "rms": lambda: nnx.RMSNorm(C, **options),
        "group": lambda: nnx.GroupNorm(C, num_groups=3, use_bias=False, **options),
        "instance": lambda: nnx.InstanceNorm(C, **options),
    }
    return made[kind]()


def nnx_(kind) -> Case:
    module = nnx_module(kind)
    variables = scramble(nnx.to_pure_dict(nnx.state(module)))

    def filled(variables):
        module = nnx_module(kind)
        nnx.update(module, variables)
        return module

    def call(variables, train):
        module = filled(variables)
        if train:
            module.use_running_average = False
        h = nnx.jit(lambda module: module(X))(module)
        return h, nnx.to_pure_dict(nnx.state(module))

    def read(variables):
        return convert.from_nnx(filled(variables))

    return Case("nnx", variables, read(variables), convert.to_nnx, call, read)


# --- dm-haiku

BOTH = {"create_scale": True, "create_offset": True}
HAIKU = {
    "batch": (hk.BatchNorm, {**BOTH, "decay_rate": 0.8}),
    "layer": (hk.LayerNorm, {**BOTH, "axis": -1, "param_axis": -1}),
    "rms": (hk.RMSNorm, {"axis": slice(1, None), "eps": 1e-3}),
    "group": (hk.GroupNorm, {"groups": 2, "create_offset": False}),
    "instance": (hk.InstanceNorm, {"create_scale": False, "create_offset": True}),
}


def haiku(kind) -> Case:
    make, options = HAIKU[kind]
    flags = {"is_training": True} if kind == "batch" else {}

    def forward(x, **flags):
        return make(**options, name="norm")(x, **flags)

    init, apply = hk.transform_with_state(forward)
    apply = jax.jit(apply, static_argnames="is_training")
    params, state = init(None, X, **flags)
    for step in range(3 * (kind == "batch")):
        _, state = apply(params, state, None, X * (step + 1.0) + step, is_training=True)

    def call(variables, train):
        flags = {"is_training": train} if kind == "batch" else {}
        h, state = apply(*variables, None, X, **flags)
        return h, (variables[0], state)

    def read(variables):
        return convert.from_haiku(variables, kind, path="norm", **options)

    def back(norm):
        return convert.to_haiku(norm, path="norm", ndim=4)

    variables = (scramble(params), dict(state))
    return Case("haiku", variables, read(variables), back, call, read)


# --- equinox


def equinox_module(kind):
    key = jax.random.key(0)
    made = {
        "batch": lambda: eqx.nn.BatchNorm(C, "batch", momentum=0.8, mode="batch"),
        "layer": lambda: eqx.nn.LayerNorm(C, use_bias=False),
        "rms": lambda: eqx.nn.RMSNorm(C, eps=1e-3),
        "group": lambda: eqx.nn.GroupNorm(2, C),
        "weight": lambda: eqx.nn.WeightNorm(eqx.nn.Conv2d(C, 5, 3, padding="SAME", key=key)),
    }
    return eqx.nn.make_with_state(made[kind])()


def equinox(kind) -> Case:
    module, state = equinox_module(kind)
    module = scramble(module)
    first = jnp.moveaxis(X, -1, 1)
    if kind == "batch":
        train = eqx.filter_jit(mapped(module))
        for step in range(3):
            _, state = train(first * (step + 1.0) + step, state)
    names = {"weight": ("weight", "bias", "g")}.get(kind, ("weight", "bias"))
    held = module.layer if kind == "weight" else module
    variables = {n: getattr(held, n, getattr(module, n, None)) for n in names}
    variables = {name: v for name, v in variables.items() if v is not None}
    if kind == "batch":
        variables |= {n: state.get(getattr(module, n)) for n in EQUINOX_STATE}

    def fill(variables):
        """The module and the state with these values."""
        if kind != "batch":
            return module, state
        full = state
        for name in EQUINOX_STATE:
            full = clone(full).set(getattr(module, name), variables[name])
        return module, full

    def call(variables, train):
        module, full = fill(variables)
        if kind == "batch":
            module = eqx.nn.inference_mode(module, not train)
            h, full = eqx.filter_jit(mapped(module))(first, full)
            new = {name: clone(full).get(getattr(module, name)) for name in EQUINOX_STATE}
            return jnp.moveaxis(h, 1, -1), {**variables, **new}
        if kind in ("layer", "rms"):
            return jax.jit(jax.vmap(jax.vmap(jax.vmap(module))))(X), variables
        return jnp.moveaxis(jax.jit(jax.vmap(module))(first), 1, -1), variables

    def read(variables):
        module, full = fill(variables)
        return convert.from_equinox(module, state=full)

    return Case("equinox", variables, read(variables), convert.to_equinox, call, read)


EQUINOX_STATE = ("batch_counter", "batch_state_index")


def mapped(module):
    return jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))


def clone(state):
    """A State says no to being read twice."""
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, leaves)


CASES = {
    f"{library.__name__.rstrip('_')}-{kind}": (library, kind)
    for library in (linen, nnx_, haiku, equinox)
    for kind in KINDS
    if (library, kind) not in ((haiku, "weight"), (equinox, "instance"))
}


PRODUCTS = {"haiku": (("mass",), ("hidden",)), "equinox": (("mean", "var"), ("batch_state_index",))}
"""The leaves of ours and of theirs of which one is the other times, or by, the mass.

Neither side has all three, and a float has no room for the factors of a product.
"""


@functools.cache
def make(name):
    library, kind = CASES[name]
    with jax.numpy_dtype_promotion("standard"):
        return library(kind)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_the_identity_to_the_bit(name):
    case = make(name)
    exported = case.back(case.norm)
    ours, theirs = PRODUCTS.get(case.library, ((), ()))
    same(exported.variables, case.variables, but=theirs)
    same(case.read(exported.variables), case.norm, but=ours)


@pytest.mark.parametrize("name", CASES)
def test_at_evaluation_both_compute_the_same(name):
    case = make(name)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = case.call(case.variables, train=False)
    h, _ = use(case.norm, X, train=False)
    assert gap(h, expected) < 1e-6


@pytest.mark.parametrize("name", [name for name in CASES if "batch" in name])
def test_in_training_both_compute_and_keep_the_same(name):
    case = make(name)
    with jax.numpy_dtype_promotion("standard"):
        expected, variables = case.call(case.variables, train=True)
        after = case.read(variables)
    h, state = use(case.norm, X, train=True)
    assert gap(h, expected) < 1e-5
    assert gap(state.read(), after.state.read()) < 1e-5


def numbers_of(state):
    """The mean and the variance of a state, or of the one that is frozen; nothing of none."""
    return () if state == () else state.read()


@pytest.mark.parametrize("name", CASES)
def test_the_options_are_those_of_a_norm_of_the_same_parameters_and_conventions(name):
    norm = make(name).norm
    linear = nl.Conv() if norm.kind == "weight" else nl.Dense()
    site = nl.shapes(X, norm.kernel, linear=linear) if norm.kernel is not None else nl.Site(X)
    init = nl.get(norm.kind, **norm.options).init
    assert jax.tree.structure(init(site)) == jax.tree.structure((norm.params, norm.state))
    if norm.kind == "weight":
        site = nl.Site(linear(X, norm.kernel), X, norm.kernel, linear=linear)
        h, _ = nl.get("weight", **norm.options).apply(norm.params, (), site, train=True)
        assert gap(h, use(norm, X, train=True)[0]) < 1e-6


# --- from normlab and back


def trained(debias, *, decay=0.9, ddof=0):
    """A batch norm of normlab after four steps of its own."""
    state = nl.init_running(C, decay=decay, ddof=ddof, debias=debias)
    for step in range(4):
        _, state = nl.batch_norm(X * (1.0 + step), None, state, train=True)
    return convert.Converted("batch", nl.Affine(jnp.ones(C), jnp.zeros(C)), state, eps=1e-5)


def forget_counters(norm, *names):
    """As if the state had never counted."""
    state = norm.state
    for name in names or ("updates", "skipped", "count"):
        state = state._replace(**{name: jnp.zeros_like(getattr(state, name))})
    return norm._replace(state=state)


LOOPS = {
    "linen": (
        convert.to_linen,
        lambda v, a: convert.from_linen(v, "batch", **a),
    ),
    "nnx": (convert.to_nnx, lambda v, a: convert.from_nnx(v, "batch", **a)),
    "keras": (convert.to_keras, lambda v, a: convert.from_keras(v, "batch", **a)),
    "torch": (convert.to_torch, lambda v, a: convert.from_torch(v, "batch", **a)),
    "haiku": (
        lambda norm, **options: convert.to_haiku(norm, path="n", ndim=4, **options),
        lambda v, a: convert.from_haiku(v, "batch", path="n", **a),
    ),
    "equinox": (convert.to_equinox, lambda v, a: convert.from_equinox(v, "batch", **a)),
}
PLAIN = ("linen", "nnx", "keras")


@pytest.mark.parametrize("library", LOOPS)
def test_a_state_of_normlab_that_is_not_refused_comes_back(library):
    to, back = LOOPS[library]
    counts = library in ("torch", "haiku", "equinox")
    norm = trained(debias=library in ("haiku", "equinox"), ddof=int(library == "torch"))
    norm = forget_counters(norm, "count" if counts else "updates", "count")
    exported = to(norm)
    ours, _ = PRODUCTS.get(library, ((), ()))
    again = back(*exported)
    assert (again.state.decay, again.state.ddof, again.eps) == (0.9, norm.state.ddof, norm.eps)
    if library == "equinox":  # whose mass is 1 - decay ** updates in its own arithmetic
        assert gap(again.state.mass, norm.state.mass) < 1e-6
        again = again._replace(state=again.state._replace(mass=norm.state.mass))
    same(again, norm, but=ours)


def lost(call, *names):
    """Asserts that the call is refused for just these conventions, and succeeds without them."""
    with pytest.raises(ValueError, match="cannot be carried over") as error:
        call(allow=())
    assert f"allow={names!r}" in str(error.value)
    for name in names:
        rest = tuple(other for other in names if other != name)
        with pytest.raises(ValueError, match=name):
            call(allow=rest)
    return call(allow=names)


@pytest.mark.parametrize("library", PLAIN)
def test_a_plain_average_refuses_what_it_cannot_say(library):
    norm = trained(debias=True, ddof=1)
    norm = norm._replace(state=norm.state._replace(skipped=jnp.ones((), jnp.int32)))
    to, back = LOOPS[library]
    names = ("debias", "ddof", "updates", "skipped", "count")
    exported = lost(lambda allow: to(norm, allow=allow), *names)
    again = back(*exported)
    same(again.state.read(), norm.state.read())
    assert (again.state.mass, again.state.ddof) == (1, 0)


def test_haiku_and_equinox_hold_a_plain_average_as_one_of_very_many_updates():
    norm = forget_counters(trained(debias=False))
    for library in ("haiku", "equinox"):
        to, back = LOOPS[library]
        again = back(*lost(lambda allow, to=to: to(norm, allow=allow), "updates"))
        assert again.state.mass == 1
        assert again.state.updates > 100
        same(again.state.read(), norm.state.read())


def test_the_variance_of_another_ddof_goes_over_by_change_ddof():
    norm = forget_counters(trained(debias=False, ddof=1), "updates")
    fixed = norm._replace(
        state=nl.population.change_ddof(norm.state, 0)
    )  # by the count of its own batches
    values = X.size / C
    fixed = forget_counters(fixed)
    var = convert.to_linen(fixed).variables["batch_stats"]["var"]
    assert gap(var, norm.state.var * (values - 1) / values) < 1e-6


def test_a_mass_within_rounding_of_one_is_one():
    norm = forget_counters(trained(debias=True, decay=0.5))
    state = norm.state._replace(mass=jnp.float32(1 - 6e-8))
    assert convert.to_linen(norm._replace(state=state)).arguments["momentum"] == 0.5


def test_equinox_keeps_its_too_large_variance_but_not_at_the_start():
    module, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(C, "batch", mode="batch")
    norm = lost(
        lambda allow: convert.from_equinox(module, state=state, allow=allow), "batch_counter"
    )
    assert norm.state.read()[1].tolist() == [1] * C
    _, state = eqx.filter_jit(mapped(module))(jnp.moveaxis(X, -1, 1), state)
    norm = convert.from_equinox(module, state=state)
    true = np.asarray(X, np.float64).var((0, 1, 2))
    assert gap(norm.state.var, true + 99) < 1e-5  # 0.99 / (1 - 0.99), the start divided by the mass


@pytest.mark.filterwarnings("ignore:When `eqx.nn.BatchNorm")
def test_equinoxs_moving_mode_is_refused_and_then_evaluates_the_same():
    module, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(C, "batch", mode="ema")
    with pytest.raises(ValueError, match="has seen no batch"):
        convert.from_equinox(module, state=state, allow=("mode",))
    first = jnp.moveaxis(X, -1, 1)
    _, state = eqx.filter_jit(mapped(module))(first, state)
    norm = lost(lambda allow: convert.from_equinox(module, state=state, allow=allow), "mode")
    evaluate = eqx.filter_jit(mapped(eqx.nn.inference_mode(module)))
    expected, _ = evaluate(first, state)
    h, _ = use(norm, X, train=False)
    assert gap(h, jnp.moveaxis(expected, 1, -1)) < 1e-6


# --- paths, names and shapes


def test_a_layer_is_found_in_a_models_variables_and_put_back():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="bn")(x)
            return nn.WeightNorm(nn.Dense(3))(x)

    variables = scramble(Model().init(jax.random.key(0), X[:, 0, 0]))
    bn = convert.from_linen(variables, "batch", path="bn")
    dense = convert.from_linen(variables, "weight", path="Dense_0")
    parts = [
        convert.to_linen(bn, path="bn").variables["params"],
        convert.to_linen(dense, path="Dense_0").variables["params"],
    ]
    same({**parts[0], **parts[1]}, variables["params"])
    same(convert.to_linen(bn, path="bn").variables["batch_stats"], variables["batch_stats"])


def test_a_path_goes_there_and_back_in_every_library():
    norm = convert.Converted("layer", nl.Affine(jnp.ones(C), jnp.zeros(C)), eps=1e-5)
    for to, back in (
        (convert.to_nnx, convert.from_nnx),
        (convert.to_torch, convert.from_torch),
        (convert.to_keras, convert.from_keras),
        (convert.to_linen, convert.from_linen),
    ):
        variables, arguments = to(norm, path="deep")
        same(back(variables, "layer", path="deep", **arguments), norm)


def refused(match, call, **leaves):
    with pytest.raises(ValueError, match=match) as error:
        call(**leaves)
    assert "To fix it" in str(error.value)


LEAVES = {"scale": jnp.ones(C), "bias": jnp.zeros(C)}
STATS = {"mean": jnp.zeros(C), "var": jnp.ones(C)}


@pytest.mark.parametrize(
    ("match", "variables", "layer", "options"),
    [
        ("no leaf 'scale' .*nearest are 'scales'", {"scales": jnp.ones(C)}, "rms", {}),
        ("further leaves 'mean', 'var'", {**LEAVES, **STATS}, "layer", {}),
        ("further leaves 'bias'", LEAVES, "rms", {}),
        ("no leaf 'a/scale'", {"b": LEAVES}, "layer", {"path": "a"}),
        ("there are no leaves at all", {}, "layer", {}),
        ("one value per channel", {**LEAVES, "bias": jnp.ones(5)}, "layer", {}),
        ("one value per channel", {"scale": jnp.ones((2, C))}, "rms", {}),
        ("epsilom=1.*did you mean 'epsilon'", LEAVES, "layer", {"epsilom": 1}),
        ("the kind 'layr'.*did you mean 'layer'", LEAVES, "layr", {}),
        ("axis_name \\('i' and not None", LEAVES, "layer", {"axis_name": "i"}),
        ("a positive number", LEAVES, "layer", {"epsilon": -1.0}),
        ("a number in \\[0, 1\\)", {**LEAVES, **STATS}, "batch", {"momentum": 1.5}),
        ("scale of type str", {**LEAVES, "scale": "one"}, "layer", {}),
        ("num_groups=3, group_size=4", LEAVES, "group", {"num_groups": 3, "group_size": 4}),
        ("in float64", {"scale": np.ones(C)}, "rms", {}),
        (
            "in bfloat16",
            {**LEAVES, "mean": jnp.ones(C, jnp.bfloat16), "var": STATS["var"]},
            "batch",
            {},
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(match, variables, layer, options):
    refused(match, lambda: convert.from_nnx(variables, layer, **options))


def haiku_statistics(**leaves):
    """The two averages after three updates, of which some leaves are others: `mean_counter=2`."""
    mass = np.float32(1 - 0.9**3)
    state = {
        f"n/~/{name}_ema": {"hidden": mass * v, "average": v, "counter": jnp.array(3)}
        for name, v in STATS.items()
    }
    for name, value in leaves.items():
        average, leaf = name.split("_")
        state[f"n/~/{average}_ema"][leaf] = value
    return state


TORCH = {
    "weight": np.ones(C, np.float32),
    "bias": np.zeros(C, np.float32),
    "running_mean": np.zeros(C, np.float32),
    "running_var": np.ones(C, np.float32),
    "num_batches_tracked": np.array(3),
}
KERAS = {
    "gamma": jnp.ones(C),
    "beta": jnp.ones(C),
    "moving_mean": jnp.zeros(C),
    "moving_variance": jnp.ones(C),
}
EQUINOX = {
    "weight": jnp.ones(C),
    "bias": jnp.ones(C),
    "batch_counter": jnp.array(3),
    "batch_state_index": (jnp.zeros(C), jnp.ones(C)),
}


def from_haiku_leaves(**leaves):
    params = {"n": {"scale": jnp.ones(C), "offset": jnp.ones(C)}}
    variables = (params, haiku_statistics(**leaves))
    return convert.from_haiku(variables, "batch", path="n", decay_rate=0.9, **BOTH)


def from_linen_leaves(**leaves):
    variables = {"params": LEAVES, "batch_stats": {**STATS, **leaves}}
    return convert.from_linen(variables, "batch")


STATISTICS = {  # the library -> how to read it with other leaves, and the names of three of them
    "linen": (from_linen_leaves, "mean", "var", None),
    "nnx": (lambda **v: convert.from_nnx({**LEAVES, **STATS, **v}, "batch"), "mean", "var", None),
    "torch": (
        lambda **v: convert.from_torch({**TORCH, **v}, "batch"),
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ),
    "keras": (
        lambda **v: convert.from_keras({**KERAS, **v}, "batch"),
        "moving_mean",
        "moving_variance",
        None,
    ),
    "haiku": (from_haiku_leaves, "mean_average", "var_average", "var_counter"),
    "haiku, hidden": (from_haiku_leaves, "mean_hidden", "var_hidden", "mean_counter"),
}


@pytest.mark.parametrize("library", STATISTICS)
def test_numbers_that_are_no_statistics_are_errors_that_name_their_leaf(library):
    read, mean, var, count = STATISTICS[library]
    for leaf, values in ((mean, (np.nan, np.inf)), (var, (-1e-9, np.nan, np.inf))):
        for value in values:
            bad = np.ones(C, np.float32)
            bad[2] = value
            refused(f"{leaf.rpartition('_')[2]} with .* in 1 of 6", read, **{leaf: bad})
        for value in (np.ones(C, np.int32), np.ones(C, bool), np.ones(C, np.complex64)):
            refused("a floating type", read, **{leaf: value})
        refused("as many", read, **{leaf: jnp.ones(5)})
    if count is not None:
        for value in (2.5, -1, np.nan, np.array([3, 3]), 2.0**40, "3"):
            refused(count.rpartition("_")[2], read, **{count: value})
        for value in (3.0, np.array([3]), np.float64(3), jnp.array(3)):
            assert read(**{count: value}).state.updates == 3
    assert read().state.updates == (3 if count else 0)


def test_those_of_equinox_too():
    def read(**leaves):
        return convert.from_equinox({**EQUINOX, **leaves}, "batch")

    for mean, var in (((0, np.nan), 1), (0, (1, -1.0)), (0, (np.inf, 1))):
        pair = tuple(jnp.broadcast_to(jnp.float32(v), (2,)) for v in (mean, var))
        refused(r"batch_state_index\[[01]\] with", read, batch_state_index=pair)
    refused(r"no leaf 'batch_state_index\[0\]'", lambda: read(batch_state_index=3))
    refused(
        "a mean .*6.* a variance .*5", lambda: read(batch_state_index=(X[0, 0, 0], jnp.ones(5)))
    )
    for value in (2.5, -1, np.array([3, 3])):
        refused("batch_counter of", read, batch_counter=value)
    assert read(batch_counter=3.0).state.updates == 3


def test_a_kind_that_is_given_wins_over_the_class_and_the_module_says_its_arguments():
    class Nnx(nnx.BatchNorm):
        """Another class."""

    class Equinox(eqx.nn.LayerNorm):
        """Another class."""

    module = Nnx(C, momentum=0.8, epsilon=1e-3, rngs=nnx.Rngs(0))
    refused("the kind of norm", lambda: convert.from_nnx(module))
    net = nnx.Module()
    net.blocks = nnx.List([module])
    for norm in (
        convert.from_nnx(module, "batch"),
        convert.from_nnx(net, "batch", path="blocks/0"),
        convert.from_nnx(nnx.state(net), "batch", path="blocks/0", momentum=0.8, epsilon=1e-3),
    ):
        assert (norm.eps, norm.state.decay) == (1e-3, 0.8)
    assert convert.from_nnx(module, "batch", momentum=0.5).state.decay == 0.5
    refused("no '1' in a List", lambda: convert.from_nnx(net, "batch", path="blocks/1"))
    refused("no 'b' in a Module", lambda: convert.from_nnx(net, "batch", path="b"))
    assert convert.from_equinox(Equinox(C, eps=1e-3), "layer").eps == 1e-3
    refused("the kind of norm", lambda: convert.from_equinox(Equinox(C)))

    class Own(nnx.Module):
        """A norm that has its ε under another name."""

        def __init__(self):
            self.scale = nnx.Param(jnp.ones(C))

    refused("no epsilon.* Own does not say", lambda: convert.from_nnx(Own(), "rms"))
    assert convert.from_nnx(Own(), "rms", epsilon=1e-4).eps == 1e-4


LAST = (-2, -1)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_parameters_along_several_axes_are_carried_over_and_back(library, kind):
    a, g, b = array(draw(0, 2, 3, 4)), array(draw(1, 3, 4)), array(draw(2, 3, 4))
    b = b if kind == "layer" else None
    axes = {"reduction_axes": LAST, "feature_axes": LAST}
    if library == "linen":
        layer = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind](**axes)
        leaves = {"params": {k: v for k, v in (("scale", g), ("bias", b)) if v is not None}}
        theirs, norm = layer.apply(leaves, a), convert.from_linen(leaves, layer)
        back = convert.to_linen(norm)
    elif library == "nnx":
        layer = {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm}[kind](4, **axes, rngs=nnx.Rngs(0))
        layer.scale = nnx.Param(g)
        if b is not None:
            layer.bias = nnx.Param(b)
        theirs, norm = layer(a), convert.from_nnx(layer)
        back = convert.to_nnx(norm)
    else:
        make = {"layer": eqx.nn.LayerNorm, "rms": eqx.nn.RMSNorm}[kind]
        layer = make((3, 4), use_bias=b is not None)
        layer = eqx.tree_at(lambda m: m.weight, layer, g)
        layer = layer if b is None else eqx.tree_at(lambda m: m.bias, layer, b)
        theirs, norm = jax.vmap(layer)(a), convert.from_equinox(layer)
        back = convert.to_equinox(norm)
        assert back.arguments["shape"] == (3, 4)
    ours, _ = nl.get(kind, **norm.options).apply(norm.params, (), nl.Site(a), train=False)
    assert gap(ours, theirs) < 1e-6
    assert norm.options["feature_axes"] == LAST
    if library != "equinox":
        assert {name: back.arguments[name] for name in axes} == axes
    assert gap(jax.tree.leaves(back.variables), [v for v in (b, g) if v is not None]) == 0
    refused("along the channels", lambda: convert.to_haiku(norm, path="n"))


def test_a_parameter_with_axes_of_length_one_is_to_be_reshaped():
    leaves = {"scale": jnp.ones((1, 1, 1, 64)), "bias": jnp.ones((1, 1, 1, 64))}
    match = r"reshape the gain to \(64,\)"
    refused(match, lambda: convert.from_linen({"params": leaves}, "group"))
    refused(match, lambda: convert.from_nnx(leaves, "layer"))
    named = dict(zip(("gamma", "beta"), leaves.values(), strict=True))
    refused(match, lambda: convert.from_keras(named, "group"))
    named = {"weight": np.ones((1, 64, 1, 1), "f"), "bias": np.ones(64, "f")}
    refused(match, lambda: convert.from_torch(named, "group", num_groups=4))
    refused("merge_running", lambda: from_linen_leaves(mean=jnp.ones((8, C)), var=jnp.ones((8, C))))
    refused("groups that divide", lambda: convert.from_nnx(LEAVES, "group", num_groups=4))


# --- spectral norm

W, B = array(draw(5, 3, 3, C, 5)), array(draw(6, 5))
U = nl.family.init_spectral(W, warm=2000)
CONV = {"kernel": W, "bias": B}


def spectral_linen(u):
    layer = nn.SpectralNorm(nn.Conv(5, (3, 3)), n_steps=2)
    held = {"layer_instance/kernel/u": u.u[None], "layer_instance/kernel/sigma": jnp.ones(())}
    variables = {"params": {"layer_instance": CONV}, "batch_stats": held}

    def call(variables, train):
        return layer.apply(variables, X, update_stats=train, mutable=["batch_stats"])[0]

    return variables, lambda v, **how: convert.from_linen(v, layer, **how), convert.to_linen, call


def spectral_nnx(u):
    rngs = nnx.Rngs(0)
    layer = nnx.SpectralNorm(nnx.Conv(C, 5, (3, 3), rngs=rngs), n_steps=2, rngs=rngs)
    held = {("kernel", "u"): u.u[None], ("kernel", "sigma"): jnp.ones(())}
    variables = {"layer_instance": CONV, "batch_stats": held}

    def filled(variables):
        nnx.update(layer, variables)
        return layer

    def read(variables, **how):
        return convert.from_nnx(filled(variables), **how)

    def call(variables, train):
        return nnx.jit(lambda m: m(X, update_stats=train))(filled(variables))

    return variables, read, convert.to_nnx, call


def spectral_haiku(u):
    def forward(x, update):
        w = hk.get_parameter("w", W.shape, init=jnp.zeros)
        b = hk.get_parameter("b", B.shape, init=jnp.zeros)
        return nl.Conv()(x, hk.SpectralNorm(1e-12, 2, name="sn")(w, update)) + b

    apply = hk.transform_with_state(lambda x, update: Own(name="conv")(x, update)).apply

    class Own(hk.Module):
        def __call__(self, x, update):
            return forward(x, update)

    where = {"path": "conv/sn", "kernel": "conv/w"}
    state = {"conv/sn": {"u0": u.u[None], "sigma": jnp.ones(())}}

    def read(variables, **how):
        return convert.from_haiku(variables, "spectral", **where, n_steps=2, eps=1e-12, **how)

    def back(norm, **how):
        return convert.to_haiku(norm, **where, **how)

    def call(variables, train):
        return apply(*variables, None, X, train)[0]

    return ({"conv": {"w": W, "b": B}}, state), read, back, call


def spectral_equinox(u):
    key = jax.random.key(0)
    conv = eqx.nn.Conv2d(C, 5, 3, padding="SAME", key=key)
    make = eqx.nn.make_with_state(eqx.nn.SpectralNorm)
    module, state = make(conv, "weight", num_power_iterations=2, key=key)
    v = jnp.moveaxis(u.v, -1, 0).reshape(-1)
    variables = {"weight": W.transpose(3, 2, 0, 1), "bias": B[:, None, None], "uv_index": (u.u, v)}

    def filled(variables):
        names = ("weight", "bias")
        at = lambda m: [getattr(m.layer, name) for name in names]  # noqa: E731
        full = eqx.tree_at(at, module, [variables[name] for name in names])
        return full, clone(state).set(module.uv_index, variables["uv_index"])

    def read(variables, **how):
        full, state = filled(variables)
        return convert.from_equinox(full, state=state, **how)

    def call(variables, train):
        full, state = filled(variables)
        run = jax.vmap(lambda x: full(x, state, inference=not train)[0], axis_name="batch")
        return jnp.moveaxis(jax.jit(run)(jnp.moveaxis(X, -1, 1)), 1, -1)

    return variables, read, convert.to_equinox, call


SPECTRAL = {
    f.__name__.removeprefix("spectral_"): f
    for f in (spectral_linen, spectral_nnx, spectral_haiku, spectral_equinox)
}


@pytest.mark.parametrize("library", SPECTRAL)
def test_spectral_norm_goes_there_and_back_and_is_the_same_at_work(library):
    how = {"allow": ("projection",)} if library == "nnx" else {}
    variables, read, back, call = SPECTRAL[library](U)
    norm = read(variables, **how)
    exported = back(norm, **how)
    kept = lambda tree: [  # noqa: E731
        v for path, v in jax.tree.leaves_with_path(tree) if "sigma" not in str(path)
    ]
    same(kept(exported.variables), kept(variables))
    same(read(exported.variables, **how), norm)
    assert set(exported.arguments.values()) == {2, 1e-12}
    for train in (False, True):
        spectral = nl.get(norm.kind, **norm.options)
        kernel, _ = spectral.kernel(norm.params, norm.state, norm.kernel, train=train)
        with jax.numpy_dtype_promotion("standard"):
            theirs = call(exported.variables, train)
        assert gap(nl.Conv()(X, kernel) + norm.params.b, theirs) < 1e-5


def test_what_spectral_norm_means_elsewhere_is_named():
    fresh = nl.family.init_spectral(W, warm=1)
    for library in ("linen", "nnx", "haiku"):
        variables, read, back, _ = SPECTRAL[library](fresh)
        refused(
            r"update_stats \(it makes 2 steps at evaluation too", functools.partial(read, variables)
        )
        norm = read(variables, allow=("update_stats", "projection"))
        refused("update_stats", functools.partial(back, norm))
    variables, read, back, _ = spectral_nnx(U)
    refused(r"projection \(it writes W/σ̂ to the kernel", lambda: read(variables))
    variables, _, _, _ = spectral_haiku(U)
    where = {"path": "conv/sn", "n_steps": 2}
    refused(
        r"eps \(0\.0001 to the square of a length",
        lambda: convert.from_haiku(variables, "spectral", kernel="conv/w", **where),
    )
    refused("kernel=None", lambda: convert.from_haiku(variables, "spectral", **where))
    variables, read, back, _ = spectral_equinox(U._replace(v=-U.v))
    refused(r"v \(uᵀWv is not positive", lambda: read(variables))
    norm = spectral_equinox(fresh)[1](spectral_equinox(fresh)[0])
    refused(r"order \(a step renews v", lambda: convert.to_torch(norm, old_names=True))
    refused("gain", lambda: back(norm._replace(params=nl.Affine(jnp.ones(5), B))))
    cold = nl.family.init_spectral(W, warm=0)
    refused("no step has been made", lambda: back(norm._replace(state=cold)))
    refused("a Spectral of its u and v", lambda: back(norm._replace(state=())))
    refused("steps", lambda: back(norm._replace(steps=None)))
    refused("a kernel with weight and spectral norm", lambda: back(norm._replace(kernel=None)))


def test_our_own_modules_of_spectral_norm_lose_nothing():
    """By the same names as Flax's they make no step at evaluation, and leave the kernel."""
    fresh = nl.family.init_spectral(W, warm=1)
    variables = spectral_linen(fresh)[0]
    norm = convert.from_linen(variables, normlab.linen.SpectralNorm(nn.Conv(5, (3, 3))))
    rngs = nnx.Rngs(0)
    module = normlab.nnx.SpectralNorm(nnx.Conv(C, 5, (3, 3), rngs=rngs), rngs=rngs)
    nnx.update(module, spectral_nnx(fresh)[0])
    same(convert.from_nnx(module), norm)
    assert norm.steps == 1


def test_spectral_norm_is_not_read_as_weight_norm():
    module = nnx.SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    layer = nn.SpectralNorm(nn.Dense(4))
    variables = layer.init(jax.random.key(0), jnp.ones((2, 3)), update_stats=False)
    linear = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    other, _ = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(linear, "weight", key=jax.random.key(1))
    v = np.ones((4, 3), "f")
    for read in (
        lambda kind: convert.from_nnx(module, kind),
        lambda kind: convert.from_nnx(nnx.state(module), kind, use_scale=False),
        lambda kind: convert.from_linen(variables, kind),
        lambda kind: convert.from_equinox(other, kind),
        lambda kind: convert.from_torch(
            {"parametrizations.weight.original": v, "parametrizations.weight.0._u": v[:, 0]},
            kind,
        ),
        lambda kind: convert.from_torch({"weight_orig": v, "weight_u": v[:, 0]}, kind),
    ):
        refused("spectral norm", lambda read=read: read("weight"))


def test_a_bias_of_the_outputs_gives_a_transposed_convolution_away():
    leaves = {"weight_g": np.ones((3, 1, 1), "f"), "weight_v": np.ones((3, 4, 5), "f")}
    refused("transposed", lambda: convert.from_torch({**leaves, "bias": np.ones(4, "f")}, "weight"))


def test_a_state_dict_without_a_counter_is_that_of_no_counted_batch():
    """Of torch before 0.4.1, or of FrozenBatchNorm2d."""
    leaves = {name: v for name, v in TORCH.items() if name != "num_batches_tracked"}
    leaves["running_var"] = 2 * leaves["running_var"]
    norm = convert.from_torch(leaves, "batch")
    assert norm.state.updates == 0
    assert norm.state.read()[1].tolist() == [2] * C
    options = {"momentum": None, "count": 8}
    refused("statistics of no batch", lambda: convert.from_torch(leaves, "batch", **options))
    frozen = norm._replace(state=nl.population.freeze(norm.state))
    assert frozen.options["population"] == "frozen"
    _, state = use(frozen, X, train=True)
    same(state, frozen.state)


def test_what_a_layer_without_leaves_measures_over_has_to_be_said():
    refused("normalized_shape", lambda: convert.from_torch({}, "layer", elementwise_affine=False))
    options = {"use_weight": False, "use_bias": False}
    refused("shape=None", lambda: convert.from_equinox({}, "layer", **options))
    assert convert.from_equinox({}, "layer", shape=(2, C), **options).axes == (-2, -1)
    leaves = {"weight": np.ones(C, "f")}
    refused(
        "parameters of shape",
        lambda: convert.from_torch(leaves, "rms", eps=1.0, normalized_shape=5),
    )


FRESH = {  # batch norm as a library begins, and the options of the library
    "linen": lambda: from_linen_leaves(),
    "torch": lambda: convert.from_torch({**TORCH, "num_batches_tracked": 0}, "batch"),
    "torch, equal": lambda: convert.from_torch(
        {**TORCH, "num_batches_tracked": 0}, "batch", momentum=None, count=X.size // C
    ),
    "torch, none": lambda: convert.from_torch(
        {name: TORCH[name] for name in ("weight", "bias")}, "batch", track_running_stats=False
    ),
    "haiku": lambda: from_haiku_leaves(
        **{f"{name}_{leaf}": jnp.zeros(C) for name in STATS for leaf in ("hidden", "average")},
        **{f"{name}_counter": 0 for name in STATS},
    ),
}


@pytest.mark.parametrize("library", FRESH)
def test_a_norm_of_the_options_trains_as_the_converted_one_from_the_start(library):
    norm = FRESH[library]()
    made = nl.get("batch", **norm.options)
    _, state = made.init(nl.Site(X))
    assert jax.tree.structure(state) == jax.tree.structure(norm.state)
    train = jax.jit(functools.partial(made.apply, train=True))
    old = norm.state
    for step in range(2):
        x = X * (1.0 + step) + step
        h, state = train(norm.params, state, nl.Site(x))
        expected, old = train(norm.params, old, nl.Site(x))
        assert gap(h, expected) == 0
        assert gap(numbers_of(state), numbers_of(old)) == 0


def test_a_module_of_another_kind_is_an_error_that_lists_the_kinds():
    refused("flax.linen.linear.Dense", lambda: convert.from_linen({}, nn.Dense(3)))
    refused("a norm of flax.nnx", lambda: convert.from_nnx(nn.LayerNorm()))
    refused("no decay_rate", lambda: convert.from_haiku(({}, {}), "batch", path="n", **BOTH))
    refused("no state", lambda: convert.from_equinox(equinox_module("batch")[0]))


def test_what_a_library_does_not_have_is_an_error_that_says_what_to_do():
    gain = nl.Affine(jnp.ones(C), None)
    norm = convert.Converted("weight", gain, kernel=jnp.ones((2, C)))
    refused("a weight norm", lambda: convert.to_haiku(norm, path="n"))
    refused("a weight norm", lambda: convert.to_keras(norm))
    instance = convert.Converted("instance", gain, eps=1e-5)
    refused("kind='group', groups=C", lambda: convert.to_equinox(instance))
    everything = convert.Converted("layer", gain, eps=1e-5, axes="all")
    refused("axes='all'", lambda: convert.to_linen(everything))
    assert convert.to_haiku(everything, path="n").arguments["axis"] == slice(1, None)
    rms = convert.Converted("rms", nl.Affine(jnp.ones(C), jnp.ones(C)), eps=1e-5)
    for to in (convert.to_linen, convert.to_nnx, convert.to_torch, convert.to_keras):
        refused("RMS norm has none", lambda to=to: to(rms))
    assert convert.to_equinox(rms).arguments["use_bias"]
    refused("no eps", lambda: convert.to_linen(convert.Converted("layer", gain)))
    batch = convert.Converted("batch", gain, (), eps=1e-5)
    refused("a state without statistics, of type tuple", lambda: convert.to_linen(batch))
    half = lost(lambda allow: convert.to_equinox(norm_of_group(gain), allow=allow), "affine")
    assert half.variables["bias"].tolist() == [0] * C


def norm_of_group(params):
    return convert.Converted("group", params, eps=1e-5, groups=2)


def test_flaxs_epsilon_under_the_root_is_refused_where_it_shows():
    variables = {
        "layer_instance": {"kernel": 1e-5 * jnp.ones((2, 3))},
        "scales": {"kernel": jnp.ones(3)},
    }
    refused("epsilon", lambda: convert.from_nnx(variables, "weight"))
    norm = convert.from_nnx(variables, "weight", allow=("epsilon",))
    lengths = jnp.linalg.norm(nl.weight_norm(norm.kernel, norm.params), axis=0)
    assert gap(lengths, np.ones(3)) < 1e-6  # with the ε of Flax it would be 0.999998


def test_another_population_is_refused_and_then_written_as_it_reads():
    cumulative = nl.population.init_cumulative(C)
    _, cumulative = nl.batch_norm(X, None, cumulative, train=True)
    norm = trained(debias=True)._replace(state=cumulative)
    variables, arguments = lost(lambda allow: convert.to_linen(norm, allow=allow), "population")
    assert "momentum" not in arguments
    same(variables["batch_stats"]["var"], cumulative.read()[1])


def test_converted_is_a_pytree_of_its_arrays():
    norm = trained(debias=True)
    doubled = jax.tree.map(lambda v: v * 2, norm)
    assert (doubled.kind, doubled.eps, doubled.state.decay) == (norm.kind, norm.eps, 0.9)
    same(doubled.params.g, 2 * norm.params.g)


def defaults_of(layers, home):
    """By kind and argument, the default in our table and the one in the class of the library."""
    for kind, layer in layers.items():
        for cls in layer.classes:
            signature = inspect.signature(getattr(home, cls).__init__).parameters
            for name, ours in {**layer.arguments, **layer.fixed}.items():
                if name in signature:
                    theirs = signature[name].default
                    required = theirs is inspect.Parameter.empty
                    yield f"{kind} {name}", ours, REQUIRED if required else theirs


@pytest.mark.parametrize(
    ("layers", "home", "but"),
    [
        (flax_table.LINEN.layers, nn, ()),
        (flax_table.NNX.layers, nnx, ()),
        # None stands for -1
        (haiku_table.HAIKU.layers, hk, ("layer param_axis", "rms param_axis")),
        # a dict of leaves may leave them out; "legacy" stands for "ema", with a warning
        (
            equinox_table.EQUINOX.layers,
            eqx.nn,
            ("layer shape", "rms shape", "batch mode", "spectral weight_name"),
        ),
    ],
    ids=("linen", "nnx", "haiku", "equinox"),
)
def test_the_defaults_are_those_of_the_installed_library(layers, home, but):
    found = list(defaults_of(layers, home))
    assert len(found) > 10
    assert {name for name, ours, theirs in found if ours != theirs} == set(but)


# --- whole models


def test_the_norms_of_a_model_go_there_and_back_by_a_rule():
    module = nn.BatchNorm(momentum=0.8, use_running_average=True)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = nn.BatchNorm(True, momentum=0.8, name=f"bn_{i}")(nn.Dense(C)(x))
            return nn.LayerNorm(epsilon=1e-4)(x)

    variables = scramble(Model().init(jax.random.key(0), X[:, 0, 0]))
    rule = {r"bn_\d": module, "LayerNorm_0": ("layer", {"epsilon": 1e-4})}
    norms = convert.from_model(convert.from_linen, variables, rule)
    assert [norm.eps for norm in norms.values()] == [1e-5, 1e-5, 1e-4]
    exported = convert.to_model(convert.to_linen, norms)
    assert exported.arguments["bn_1"]["momentum"] == 0.8
    expected = {name: v for name, v in variables["params"].items() if "Dense" not in name}
    same(exported.variables, {"params": expected, "batch_stats": variables["batch_stats"]})
    state = jax.tree.map(lambda norm: norm.state, norms, is_leaf=lambda v: hasattr(v, "state"))
    assert nl.population.conventions(state)["bn_0"] == "Running(decay=0.8, ddof=0)"
    refused(
        "did you mean 'bn_0'",
        lambda: convert.from_model(convert.from_linen, variables, {"b_0": module}),
    )


def test_the_norms_of_a_model_of_haiku_keep_their_two_trees():
    options = {**BOTH, "decay_rate": 0.9}
    norms = {f"net/~/bn_{i}": trained(debias=True) for i in range(2)}
    norms = {path: forget_counters(norm, "count") for path, norm in norms.items()}
    variables, _ = convert.to_model(convert.to_haiku, norms, ndim=4)
    assert sorted(variables[1])[:2] == ["net/~/bn_0/~/mean_ema", "net/~/bn_0/~/var_ema"]
    again = convert.from_model(convert.from_haiku, variables, {r"net/~/bn_\d": ("batch", options)})
    same(again, norms, but=("mass",))


def test_variables_that_are_no_mapping_are_an_error():
    for read in (convert.from_linen, convert.from_torch, convert.from_keras):
        refused("variables of type list", lambda read=read: read([jnp.ones(3)], "layer"))
    refused("a pair", lambda: convert.from_haiku({}, "instance", path="n", **BOTH))
    refused("a layer of type builtins.dict", lambda: convert.from_nnx({}))
    rule = {"a": "layer"}
    refused("nested mappings", lambda: convert.from_model(convert.from_torch, None, rule))


@pytest.mark.parametrize("name", [n for n in convert.__all__ if not n.isupper()])
def test_what_is_public_documents_its_arguments(name):
    value = getattr(convert, name)
    doc = inspect.getdoc(value)
    names = getattr(value, "_fields", None) or inspect.signature(value).parameters
    assert doc
    assert all(f"{word}: " in doc for word in names)


def test_the_examples_of_the_documentation_run():
    text = (Path(__file__).parent.parent / "docs/convert.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["kernel"].shape == (3, 5)


def test_a_chain_through_the_libraries_with_a_plain_average_loses_nothing():
    norm = forget_counters(trained(debias=False))
    through = norm
    for library in (*PLAIN, *PLAIN[::-1]):
        to, back = LOOPS[library]
        through = back(*to(through))
    same(through, norm)
    assert through.options == norm.options


def test_float64_goes_there_and_back(x64):
    variables = scramble(
        {name: jnp.ones(C, jnp.float64) for name in ("scale", "bias", "mean", "var")}
    )
    norm = convert.from_nnx(variables, "batch")
    assert norm.state.mass.dtype == jnp.float64
    same(convert.to_nnx(norm).variables, variables)


def test_weight_norm_without_a_gain():
    kernel = scramble({"kernel": jnp.ones((2, 3))})
    for to, back, variables in (
        (convert.to_linen, convert.from_linen, {"params": {"layer_instance": kernel}}),
        (convert.to_nnx, convert.from_nnx, {"layer_instance": kernel}),
    ):
        norm = back(variables, "weight", use_scale=False)
        exported = to(norm)
        same(exported.variables, variables)
        assert exported.arguments["use_scale"] is False
        refused("no leaf", lambda back=back, variables=variables: back(variables, "weight"))
    exported = lost(lambda allow: convert.to_torch(norm, allow=allow), "gain")
    assert exported.variables["parametrizations.weight.original0"].tolist() == [[1]] * 3


def test_a_bias_that_flax_normalizes_too_is_an_error():
    module = nn.WeightNorm(nn.Dense(3), variable_filter=None)
    variables = scramble(jax.eval_shape(module.init, jax.random.key(0), X))
    refused(
        "further leaves 'params/layer_instance/bias/scale'",
        lambda: convert.from_linen(variables, "weight"),
    )


def test_the_converters_load_no_library():
    code = "import sys, normlab.convert; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    others = {"flax", "haiku", "equinox", "torch", "keras"}
    assert others.isdisjoint(run.stdout.split())


@pytest.mark.parametrize("home", [nn, normlab.linen], ids=["flax", "normlab"])
def test_our_flax_norms_are_converted_as_flaxs_are(home):
    layer = home.BatchNorm(use_running_average=False, momentum=0.8, epsilon=1e-3)
    variables = layer.init(jax.random.key(0), jnp.ones((4, C)))
    norm = convert.from_linen(variables, layer)
    assert (norm.eps, norm.state.decay) == (1e-3, 0.8)
    nnx_home = nnx if home is nn else normlab.nnx
    norm = convert.from_nnx(nnx_home.BatchNorm(C, momentum=0.8, rngs=nnx.Rngs(0)))
    assert (norm.kind, norm.eps, norm.state.decay) == ("batch", 1e-5, 0.8)


def test_a_population_that_flax_does_not_have_is_named():
    layer = normlab.linen.BatchNorm(use_running_average=False, population="debiased")
    variables = layer.init(jax.random.key(0), jnp.ones((4, C)))
    with pytest.raises(ValueError, match=r"population \('debiased' and not 'ema'"):
        convert.from_linen(variables, layer)
