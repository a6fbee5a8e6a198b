"""The laws that every norm of the registry obeys, over the table of `tests/cases.py`."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from tests import oracles
from tests.cases import CASES, KINDS, NAMES, everything, first_of, reference, stack
from tests.helpers import MAPPERS, array, draw, gap, mappers

# A float32 keeps 24 bits: one rounding is 6e-8 of a value. Sums of up to 90 terms in any order and
# a few operations on them stay under 30 roundings forward; a backward pass doubles the operations.
FORWARD = {"float32": 2e-6, "float64": 1e-10}
BACKWARD = {"float32": 5e-6, "float64": 1e-10}

# Module scope groups the tests of a case, so that what they share is compiled once.
over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label, scope="module")
over_names = pytest.mark.parametrize("case", [pytest.param(first_of(n), id=n) for n in NAMES])


def test_every_case_has_a_label_of_its_own():
    assert len({case.label for case in CASES}) == len(CASES)


# 1. One equation.

HALVES = ("bfloat16", "float16")
RUNS = (("float32", True), ("float32", False), ("float64", False))


@functools.cache
def _facts(label: str, precision: str, train: bool):
    """Everything about the equation of one case, computed in one compiled function."""
    case = next(case for case in CASES if case.label == label)
    x, w, params = case.values(jnp.dtype(precision))
    _, state = case.init(x, w)

    @jax.jit
    def facts(params, state, x, w):
        site = case.site(x, w)
        parts, after = case.norm.parts(params, state, site, train=train)
        h = nl.affine(parts, site.a)
        return {
            "a": site.a,
            "parts": parts,
            "h": h,
            "state": after,
            "apply": case.norm.apply(params, state, site, train=train),
            "plain": case.plain(params, x, w) if train else None,
            "inverted": nl.invert(parts, h),
            "again": nl.affine(parts, nl.invert(parts, h)),
        }

    return facts(params, state, x, w)


# The stateless know no difference between training and inference.
over_runs = pytest.mark.parametrize(
    ("case", "precision", "train"),
    [
        pytest.param(case, *run, id="-".join([case.label, run[0], "train" if run[1] else "eval"]))
        for case in CASES
        for run in (RUNS if case.name == "batch" else RUNS[:1])
    ],
    indirect=["precision"],
)


@over_runs
def test_apply_is_affine_of_the_parts(case, precision, train):
    facts = _facts(case.label, precision, train)
    h, state = facts["apply"]
    assert h.dtype == precision
    assert gap(h, facts["h"]) < FORWARD[precision]
    assert gap(state, facts["state"]) < FORWARD[precision]


@over_cases
def test_apply_equals_the_plain_function(case):
    facts = _facts(case.label, "float32", True)
    assert gap(facts["plain"], facts["h"]) < FORWARD["float32"]


@over_cases
def test_invert_undoes_affine(case):
    facts = _facts(case.label, "float32", True)
    assert gap(facts["inverted"], facts["a"]) < FORWARD["float32"]
    assert gap(facts["again"], facts["h"]) < FORWARD["float32"]


@over_runs
def test_parts_broadcast_to_the_preactivation(case, precision, train):
    facts = _facts(case.label, precision, train)
    parts, a = facts["parts"], facts["a"]
    for part in parts:
        assert jnp.broadcast_shapes(part.shape, a.shape) == a.shape
        assert part.dtype == precision
        assert np.isfinite(part).all()
    assert (np.asarray(parts.sigma) > 0).all()
    assert case.options.get("use_gain", case.name != "none") or (parts.g == 1).all()
    assert case.options.get("use_bias", True) or (parts.b == 0).all()


@over_runs
def test_inference_alone_leaves_the_state_as_it_came(case, precision, train):
    x, w, _ = case.values(jnp.dtype(precision))
    _, state = case.init(x, w)
    after = _facts(case.label, precision, train)["state"]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert (gap(after, state) == 0) != (train and "batch" in case.row.needs)


# 2. The oracle.


@over_cases
def test_values_and_gradients_equal_the_oracle(case, precision):
    numbers = case.numbers()
    x, w, params = case.values(jnp.dtype(precision))
    _, state = case.init(x, w)
    h, _, (dparams, dx, dw) = reference(case, precision, params, state, x, w)
    assert gap(case.channels_last(h), case.oracle(*numbers)) < FORWARD[precision]

    c = case.channels_last(draw(9, *h.shape))
    grads = oracles.gradient(lambda *args: (c * case.oracle(*args)).sum(), *numbers)
    assert gap(case.channels_last(dx), grads[0]) < BACKWARD[precision]
    assert gap(dw, grads[1]) < BACKWARD[precision]
    for have, want in zip(dparams, grads[2:], strict=True):
        assert have is None or gap(have, want) < BACKWARD[precision]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, HALVES[i % 2], id=f"{c.label}-{HALVES[i % 2]}") for i, c in enumerate(KINDS)],
)
def test_statistics_are_float32_whatever_the_input(case, dtype):
    """The output is that of the same numbers in float32, rounded once."""
    x, w, params = case.values()
    _, state = case.init(x, w)
    site = case.site(x, w)._replace(a=_facts(case.label, "float32", True)["a"])
    site = site._replace(**{k: getattr(site, k).astype(dtype) for k in "axw"})

    @jax.jit
    def both(params, state, site):
        wide = site._replace(**{k: getattr(site, k).astype("float32") for k in "axw"})
        return (
            case.norm.apply(params, state, site, train=True),
            case.norm.apply(params, state, wide, train=True),
        )

    (h, after), (expected, expected_after) = both(params, state, site)
    assert h.dtype == dtype
    assert expected.dtype == jnp.float32
    # The two float32 may differ by a rounding, and so be cast to neighbours.
    assert gap(h, expected) <= jnp.finfo(dtype).eps
    assert (h == expected.astype(dtype)).mean() > 0.95
    assert gap(after, expected_after) < FORWARD["float32"]


@over_names
@pytest.mark.parametrize("dtype", ["int32", "int8", "bool"])
def test_integers_are_normalized_as_floats(case, dtype):
    x, w, params = case.values()
    _, state = case.init(x, w)
    site = case.site(x, w)
    whole = site._replace(a=jnp.round(site.a) if dtype != "bool" else site.a > 0)
    whole = whole._replace(a=whole.a.astype(dtype))
    h, _ = case.norm.apply(params, state, whole, train=True)
    expected, _ = case.norm.apply(
        params, state, whole._replace(a=whole.a.astype("float32")), train=True
    )
    assert h.dtype == jnp.float32
    assert (h == expected).all()


@over_names
def test_half_precision_does_not_overflow_in_the_statistics(case):
    """300² is more than float16 holds."""
    x, w, params = case.values()
    _, state = case.init(x, w)
    h, _ = case.apply(params, state, (300 * x).astype("float16"), w.astype("float16"))
    assert np.isfinite(h).all()


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.linear.channel_axis == 1], ids=lambda case: case.label
)
def test_channels_first_is_transposed_channels_last(case):
    x, w, params = case.values()
    _, state = case.init(x, w)
    last = case._replace(linear=nl.Conv())
    h, after = _facts(case.label, "float32", True)["apply"]
    expected, expected_after = jax.jit(last.apply)(params, state, jnp.moveaxis(x, 1, -1), w)
    assert gap(case.channels_last(h), expected) < FORWARD["float32"]
    assert gap(after, expected_after) < FORWARD["float32"]


# 3. Invariances: the table is tested with the family's.


def _change(case, x, w, moved):
    """max |Δh| in float64 with ε out of the way."""
    _, _, params = case.values(jnp.float64)
    tiny = case._replace(
        options=case.options | {"eps": 1e-30}
        if "eps" in inspect.signature(case.row.factory).parameters
        else case.options
    )
    state = tiny.init(array(x, jnp.float64), array(w, jnp.float64))[1]
    h, after = (
        tiny.apply(params, state, array(x, jnp.float64), array(w, jnp.float64))[0]
        for x, w in ((x, w), moved)
    )
    return float(jnp.abs(after - h).max())


@pytest.mark.parametrize("name", ["cosine", "centred_cosine"])
@pytest.mark.parametrize("moved", ["w", "x"])
def test_only_the_centred_cosine_ignores_constants(name, moved, x64):
    """w_j + c_j·1 for each unit, x_i + c_i·1 for each example."""
    case = first_of(name)
    x, w, _, _ = case.numbers()
    to = (x, w + draw(5, w.shape[-1])) if moved == "w" else (x + draw(5, x.shape[0], 1), w)
    change = _change(case, x, w, to)
    assert change < 1e-8 if name == "centred_cosine" else change > 1e-3


# 5. The state.


@over_cases
def test_the_state_keeps_its_structure_and_one_trace_serves_all_steps(case):
    x, w, params = case.values()
    _, state = case.init(x, w)
    traces = 0

    @jax.jit
    def step(params, state, x, w):
        nonlocal traces
        traces += 1
        return case.apply(params, state, x, w)

    for i in range(3):
        h, after = step(params, state, x + i, w)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, old.weak_type)
        assert h.shape == case.linear(x, w).shape
        state = after
    assert traces == 1


@over_cases
def test_init_needs_only_shapes(case):
    if {"data_init", "bounded"} & case.options.keys():
        pytest.skip("starts from values by its nature")
    x, w, _ = case.values()
    weights = None if case.weights is None else array(case.weights)
    assert (
        gap(case.norm.init(nl.shapes(x, w, linear=case.linear, weights=weights)), case.init(x, w))
        == 0
    )


# 6. Transformations.


def _problems(case, seeds):
    """Problems with their answers, each alone and compiled: `state, (x, w, params), answers`."""
    problems = [case.values(seed=seed) for seed in seeds]
    state = case.init(*problems[0][:2])[1]
    answers = [reference(case, "float32", p, state, x, w) for x, w, p in problems]
    return state, stack(*problems), stack(*answers)


@over_names
def test_numbers_are_the_same_under_vmap_of_scan_of_checkpoint(case):
    """Problems side by side and one after the other, with the forward pass run twice."""
    state, problems, answers = _problems(case, (0, 50, 100, 150))
    rematted = everything(case, jax.checkpoint)

    def step(_, problem):
        x, w, params = problem
        return None, rematted(params, state, x, w)

    grid = jax.tree.map(lambda v: v.reshape(2, 2, *v.shape[1:]), problems)
    _, out = jax.jit(jax.vmap(lambda *problems: jax.lax.scan(step, None, problems)))(*grid)
    out = jax.tree.map(lambda v: v.reshape(4, *v.shape[2:]), out)
    assert gap(out, answers) < BACKWARD["float32"]


@over_names
def test_numbers_are_the_same_without_jit(case):
    x, w, params = case.values()
    _, state = case.init(x, w)
    h, after, _ = reference(case, "float32", params, state, x, w)
    assert gap(case.apply(params, state, x, w), (h, after)) < FORWARD["float32"]


@over_names
@pytest.mark.parametrize("mapper", MAPPERS)
def test_numbers_are_the_same_on_many_devices(case, mapper):
    """Without `axis_name` a mapped axis changes nothing: every device has its own problem."""
    state, problems, answers = _problems(case, (0, 50))

    def on_device(state, problem):
        x, w, params = problem
        return everything(case)(params, state, x, w)

    assert gap(mappers(2)[mapper](on_device)(state, problems), answers) < BACKWARD["float32"]


@over_names
def test_second_derivatives_agree_both_ways(case, x64):
    """Reverse over reverse equals forward over reverse, and is symmetric."""
    x, w, params = case.values(jnp.float64)
    _, state = case.init(x, w)
    c = draw(7, *case.linear(x, w).shape)

    def loss(x):
        return (jnp.asarray(c) * jnp.tanh(case.apply(params, state, x, w)[0])).sum()

    u, v = jnp.asarray(draw(1, *x.shape)), jnp.asarray(draw(2, *x.shape))
    grad = jax.grad(loss)
    forward = jax.jit(lambda v: jax.jvp(grad, (x,), (v,))[1])
    reverse = jax.jit(jax.grad(lambda x: jnp.vdot(grad(x), v)))(x)
    assert gap(forward(v), reverse) < 1e-10
    assert abs(jnp.vdot(u, forward(v)) - jnp.vdot(v, forward(u))) < 1e-8


# The exact equalities behind "one equation": parts measured on w and x, against the usual way.

LAYERS = [first_of("cosine"), *(c for c in CASES if c.label in ("cosine-conv", "cosine-odd"))]


def _usual(name, p, u):
    if name == "weight":
        return oracles.product(p, u / np.linalg.norm(u, axis=1, keepdims=True))
    if name == "centred_cosine":
        rows = p.reshape(-1, *p.shape[-2:])
        r = np.array(
            [
                [
                    np.corrcoef(row[g], u[g, :, c])[0, 1]
                    for g in range(len(u))
                    for c in range(u.shape[2])
                ]
                for row in rows
            ]
        )
        return r.reshape(*p.shape[:-2], -1)
    lengths = np.linalg.norm(p, axis=-1)[..., None] * np.linalg.norm(u, axis=1)
    return oracles.product(p, u) / lengths.reshape(*p.shape[:-2], -1)


@pytest.mark.parametrize("name", ["weight", "cosine", "centred_cosine"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda case: case.label.removeprefix("cosine-"))
def test_the_usual_computation_is_affine_of_the_parts(name, layer, precision):
    case = layer._replace(name=name, options={"use_gain": False, "use_bias": False})
    x, w, _, _ = case.numbers()
    site = case.site(array(x, precision), array(w, precision))
    parts, _ = case.norm.parts(None, (), site, train=True)
    usual = _usual(name, oracles.patches(x, w, case.linear), oracles.units(w, case.linear))
    assert gap(nl.affine(parts, site.a), usual) < FORWARD[precision]


def test_the_hand_derived_backward_equals_autodiff_and_complex_steps(x64):
    """Batch norm's from the paper; layer and instance norm's are the same over other axes."""
    a, dh = draw(0, 4, 5, 3), draw(1, 4, 5, 3)
    for axes, norm in (
        ((0, 1), lambda a: nl.batch_norm(a, train=True)[0]),
        ((2,), nl.layer_norm),
        ((1,), nl.instance_norm),
    ):
        by_hand = oracles.standardized_backward(dh, a, axes, 1e-5)
        (by_steps,) = oracles.gradient(
            lambda a, axes=axes: (dh * oracles.standardized(a, axes, 1e-5)).sum(), a
        )
        by_jax = jax.jit(jax.grad(lambda a, norm=norm: (dh * norm(a)).sum()))(jnp.asarray(a))
        assert gap(by_steps, by_hand) < 1e-12
        assert gap(by_jax, by_hand) < 1e-12
