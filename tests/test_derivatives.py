"""Derivatives of every norm: forward, reverse and second order, and where nothing varies.

The truth is the NumPy oracle of each norm in float64. Its first derivatives are complex steps,
exact to rounding; its second ones are central differences of those.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from tests import oracles
from tests.cases import CASES, NAMES, Case, first_of
from tests.helpers import array, draw, gap

# One case of each norm with a dense layer, and with weights, if it has them; with a convolution of
# the norms that look at w and x, for the others of which it is but more examples; and shapes in
# which sums are laid out in another way: of many examples, of many positions.
_MANY = {"linear": nl.Conv(), "x": (2, 4, 4, 3), "w": (1, 1, 3, 4)}
POINTS = (
    *{
        (c.name, type(c.linear), c.weights is None): c
        for c in reversed(CASES)
        if isinstance(c.linear, nl.Dense) or c.row.needs & {"w", "x"}
    }.values(),
    Case("batch-many", "batch", x=(32, 3), w=(3, 2)),
    Case("group-many", "group", {"groups": 2}, **_MANY),
    Case("instance-many", "instance", **_MANY),
)
over_points = pytest.mark.parametrize("case", POINTS, ids=lambda case: case.label, scope="module")
over_names = pytest.mark.parametrize(
    "case", [pytest.param(first_of(n), id=n) for n in NAMES], scope="module"
)

EXACT = 1e-10  # float64 against complex steps: 1e-16 a rounding, times what a layer amplifies
BACKWARD = 2e-5  # float32 against the oracle: 6e-8 a rounding, of some dozens, over σ ≥ 0.1
EPS = 1e-5  # the default ε


def has_eps(case):
    """Whether the norm's σ is the root of something and ε."""
    known = inspect.signature(case.row.factory).parameters
    return "eps" in known and known["eps"].default is not None


# 1. First and second order in float64, against the oracle.


def smooth(h, c):
    """A scalar of h whose derivatives of every order are bounded: Σ c·tanh h."""
    return (c * (jnp if isinstance(h, jax.Array) else np).tanh(h)).sum()


def layout(case, v, back=False):
    """Channels-last `v` in the layout of the layer, or back."""
    ends = (case.linear.channel_axis, -1) if back else (-1, case.linear.channel_axis)
    return (np if isinstance(v, np.ndarray) else jnp).moveaxis(v, *ends)


def in_jax(case, point):
    """`(x, w, params)` for the layer from numbers `(x, w, g, b)`; no `g` where there is none."""
    x, w, *affine = (array(v, jnp.float64) for v in point)
    template, _ = case.init(layout(case, x), w)
    kept = (None if p is None else v for p, v in zip(template, affine, strict=True))
    return layout(case, x), w, nl.Affine(*kept)


def in_numpy(case, point):
    """Numbers again, channels last, zero for what is not there."""
    x, w, params = point
    zero = np.zeros(case.w[-1])
    g, b = (zero if p is None else np.asarray(p) for p in params)
    return layout(case, np.asarray(x), back=True), np.asarray(w), g, b


def numbers_at(case, where):
    """The point `(x, w, g, b)`; all pre-activations are equal where it is "flat"."""
    x, w, g, b = case.numbers()
    return (np.full_like(x, 0.75), np.full_like(w, 0.5), g, b) if where == "flat" else (x, w, g, b)


@functools.cache
def programs(label):
    """What autodiff is asked about a case, as one compiled `f(point, direction)`."""
    case = next(c for c in POINTS if c.label == label)
    x, w, _ = in_jax(case, case.numbers())
    _, state = case.init(x, w)
    h = case.oracle(*case.numbers())
    c, ct = (array(layout(case, draw(seed, *h.shape)), jnp.float64) for seed in (9, 10))

    def layer(point):
        x, w, params = point
        return case.apply(params, state, x, w)[0]

    def loss(point):
        return smooth(layer(point), c)

    @jax.jit
    def everything(point, v):
        h, dh = jax.jvp(layer, (point,), (v,))
        grad = jax.grad(loss)
        return {
            "h": h,
            "jvp": dh,
            "vjp": jax.vjp(layer, point)[1](ct)[0],
            "forward over reverse": jax.jvp(grad, (point,), (v,))[1],
            "reverse over reverse": jax.vjp(grad, point)[1](v)[0],
        }

    return everything, c, ct


@functools.cache
def derivatives(label, where="drawn"):
    """The facts along two directions in the space of x, w, g and b at once.

    Where the layer has no g, the direction has none either.
    """
    case = next(c for c in POINTS if c.label == label)
    everything, c, ct = programs(label)
    point = in_jax(case, numbers_at(case, where))
    u, v = (in_jax(case, case.numbers(seed)) for seed in (20, 30))
    return c, ct, (u, v), everything(point, v), everything(point, u)


def dot(p, q):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: float((a * b).sum()), p, q)))


@over_points
def test_forward_mode_is_the_directional_derivative(case, x64):
    """∂h along a direction in x, w, g and b at once, by one complex step."""
    _, _, (_, v), facts, _ = derivatives(case.label)
    moved = (p + 1e-40j * t for p, t in zip(case.numbers(), in_numpy(case, v), strict=True))
    expected = case.oracle(*moved)
    assert gap(case.channels_last(facts["h"]), expected.real) < EXACT
    assert gap(case.channels_last(facts["jvp"]), expected.imag / 1e-40) < EXACT


@over_points
def test_reverse_mode_is_the_adjoint_of_forward_mode(case, x64):
    """⟨u, Jv⟩ = ⟨Jᵀu, v⟩."""
    _, ct, (u, v), facts, other = derivatives(case.label)
    for direction, dh in ((v, facts["jvp"]), (u, other["jvp"])):
        forward, reverse = float((ct * dh).sum()), dot(facts["vjp"], direction)
        assert abs(forward - reverse) < EXACT * float(abs(ct * dh).sum())


@pytest.mark.parametrize(
    ("case", "where"),
    [
        pytest.param(case, where, id=case.label if where == "drawn" else f"{case.label}-{where}")
        for case in POINTS
        for where in (("drawn", "flat") if has_eps(case) else ("drawn",))
    ],
    scope="module",
)
def test_second_derivatives_are_differences_of_exact_first_ones(case, where, x64):
    """The Hessian of a smooth loss in x, w, g and b at once, along a direction, both ways.

    With ε also where the variance is zero: the step of the differences is small beside √ε.
    """
    c, _, (_, v), facts, _ = derivatives(case.label, where)
    c, v = layout(case, np.asarray(c), back=True), in_numpy(case, v)
    step, bound = (1e-5, 1e-7) if where == "drawn" else (1e-6, 1e-5)

    def exact(sign):
        point = (p + sign * step * t for p, t in zip(numbers_at(case, where), v, strict=True))
        return oracles.gradient(lambda *p: smooth(case.oracle(*p), c), *point)

    expected = [(p - q) / (2 * step) for p, q in zip(exact(1), exact(-1), strict=True)]
    x, w, params = in_jax(case, expected)
    for order in ("forward over reverse", "reverse over reverse"):
        assert gap(facts[order], (x, w, params)) < bound, order
    # Between themselves they agree to rounding.
    assert gap(facts["forward over reverse"], facts["reverse over reverse"]) < EXACT


@over_points
def test_the_hessian_is_symmetric(case, x64):
    """⟨u, Hv⟩ = ⟨v, Hu⟩: no gradient was stopped on one way and not on the other."""
    _, _, (u, v), of_v, of_u = derivatives(case.label)
    for order in ("forward over reverse", "reverse over reverse"):
        assert abs(dot(u, of_v[order]) - dot(v, of_u[order])) < 1e-8


# 2. Where nothing varies, in float32.


def slope(case, c):
    """Σ|c|·max g/σ, with the smallest σ: √ε, or 1 without ε."""
    _, _, g, _ = case.numbers()
    total = np.abs(np.asarray(c)).sum() * max(1, np.abs(g).max())
    return total / np.sqrt(EPS) if has_eps(case) else total


def points(case):
    """Numbers `(x, w)` where something that is divided by vanishes."""
    x, w, _, _ = case.numbers()
    zero_case, zero_unit, flat_case, flat_unit = x.copy(), w.copy(), x.copy(), w.copy()
    zero_case[1], zero_unit[..., 1] = 0, 0
    flat_case[1], flat_unit[..., 1] = 0.7, 0.7
    same = np.broadcast_to(x[:1], x.shape), np.broadcast_to(w[..., :1], w.shape)
    return {
        "x = 0": (0 * x, w),
        "w = 0": (x, 0 * w),
        "x = w = 0": (0 * x, 0 * w),
        "one case zero": (zero_case, w),
        "one unit zero": (x, zero_unit),
        "one case constant": (flat_case, w),
        "one unit constant": (x, flat_unit),
        "all constant": (np.full_like(x, 0.7), np.full_like(w, 0.3)),
        "all cases alike": (same[0], w),
        "all units alike": (x, same[1]),
        "all cases and units alike": same,
    }


@functools.cache
def at_degenerate_points(name):
    """h and the first and second derivatives of a smooth loss, in float32, at every point."""
    case = first_of(name)
    x, w, params = case.values()
    _, state = case.init(x, w)
    c = array(draw(9, *case.linear(x, w).shape))
    v = jax.tree.map(lambda p: array(draw(p.size, *p.shape)), (x, w, params))

    def loss(point):
        x, w, params = point
        h = case.apply(params, state, x, w)[0]
        return smooth(h, c), h

    @jax.jit
    def everything(point):
        grad = jax.grad(loss, has_aux=True)
        (grads, h), (second, _) = jax.jvp(grad, (point,), (v,))
        return h, grads, second

    return c, {
        where: everything((array(x), array(w), params)) for where, (x, w) in points(case).items()
    }


@over_names
@pytest.mark.parametrize("where", points(first_of("none")))
def test_derivatives_are_finite_and_bounded_where_nothing_varies(case, where):
    """The derivative (P − ĥĥᵀ/n)/σ of whatever is standardized is a contraction over σ.

    P takes the mean away, and the bracket lies between 0 and I. With ε, σ ≥ √ε; without, σ is 1
    where it would be 0, and else the length of a vector, here at least `least`. The rest of the
    chain: the linear map, bounded by the lengths of x and w; the gain; and tanh' ≤ 1.
    """
    c, facts = at_degenerate_points(case.name)
    h, (dx, dw, dparams), second = facts[where]
    x, w = points(case)[where]
    vectors = oracles.patches(x, w, case.linear), np.swapaxes(oracles.units(w, case.linear), 1, 2)
    lengths = [np.linalg.norm(v, axis=-1).ravel() for v in vectors]
    lengths += [np.linalg.norm(v - v.mean(-1, keepdims=True), axis=-1).ravel() for v in vectors]
    least = min([1.0, *(n for n in np.concatenate(lengths) if n > 1e-6)])
    reach = max(1, np.linalg.norm(x)) * max(1, np.linalg.norm(w)) / least
    chain = slope(case, c)

    assert np.isfinite(h).all()
    for leaf in (dx, dw):
        assert np.abs(leaf).max() <= chain * reach
    total = np.abs(np.asarray(c)).sum()
    assert np.abs(dparams.b).max() <= total
    if dparams.g is not None:  # |ĥ| ≤ √n where n values were measured, ‖x‖·‖w‖/σ elsewhere
        assert np.abs(dparams.g).max() <= total * max(reach, np.sqrt(h.size))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(second))


# With ε nothing is singular; without, there is no zero or constant vector among these.
REGULAR = ("all cases alike", "all units alike", "all cases and units alike")


@pytest.mark.parametrize(
    ("case", "where"),
    [
        pytest.param(case, where, id=f"{case.name}-{where}")
        for case in map(first_of, NAMES)
        for where in (points(case) if has_eps(case) else REGULAR)
    ],
)
def test_gradients_are_right_where_nothing_varies(case, where):
    """Every entry is a sum of terms of the size of c·g/σ, each rounded to 6e-8."""
    x, w = points(case)[where]
    _, _, g, b = case.numbers()
    c, facts = at_degenerate_points(case.name)
    _, (dx, dw, dparams), _ = facts[where]
    wide = case.channels_last(c).astype(np.float64)
    expected = oracles.gradient(lambda *p: smooth(case.oracle(*p), wide), x, w, g, b)
    for have, want in zip((case.channels_last(dx), dw, *dparams), expected, strict=True):
        if have is not None:
            assert np.abs(have - want).max() < 1e-6 * slope(case, c)


@functools.cache
def pulled_back(form, name):
    """`(x, w) -> h, gradients of Σ h` of a norm that looks at w."""

    @jax.jit
    def both(x, w):
        out, pull = jax.vjp(FORMS[form](name), x, w)
        return out, pull(jnp.ones_like(out))

    return lambda x, w: both(array(x), array(w))


@pytest.mark.parametrize("form", ["plain", "parts"])
@pytest.mark.parametrize("size", [3, 100])
def test_a_constant_unit_has_no_correlation_and_a_bounded_gradient(form, size):
    """What rounding leaves of w − w̄ is no direction: such a unit would have a gradient of 1e7/‖w‖.

    The parts' σ is ‖w‖‖x‖ there, so |∂h/∂w| ≤ 1/‖w‖; the plain function has brought w and x to
    size 1 before, so |∂h/∂w| ≤ √K. In the other units |∂h/∂x| ≤ 1/‖x − x̄‖.
    """
    for constant in (0.1, 0.7, 1.0, 1000.3):
        x, w = draw(0, 2, size), draw(1, size, 4)
        w[:, 2] = constant
        out, (dx, dw) = pulled_back(form, "centred_cosine")(x, w)
        assert np.abs(out[:, 2]).max() < 1e-6
        steepest = max(np.sqrt(size), 1 / np.linalg.norm(w[:, 2]))
        assert np.abs(dw[:, 2]).max() <= len(x) * steepest, constant
        shortest = np.linalg.norm(x - x.mean(1, keepdims=True), axis=1).min()
        assert np.abs(dx).max() <= w.shape[1] / shortest


# The norms that look at a alone, each as a case on a itself: w is the identity.
_OPTIONS = {"group": {"groups": 2}, "layer": {"axes": "all"}, "rms": {"axes": "all"}}
ON_A = (
    *(
        Case(name, name, _OPTIONS.get(name, {}), x=(4, 16, 6), w=(6, 6))
        for name in NAMES
        if "a" in nl.row(name).needs
    ),
    Case("layer-channels", "layer", x=(4, 16, 6), w=(6, 6)),
    Case("rms-channels", "rms", x=(4, 16, 6), w=(6, 6)),
)
over_a = pytest.mark.parametrize("case", ON_A, ids=lambda case: case.label, scope="module")


def on_a(case, a, params, weights=None):
    """h of the registry's norm."""
    site = nl.Site(a, weights=weights)
    _, state = case.norm.init(site)
    return case.norm.apply(params, state, site, train=True)[0]


def numbers_on_a(case):
    """`(a, c, g, b)` in NumPy."""
    return draw(0, *case.x), draw(1, *case.x), draw(2, 6, mean=1.0, scale=0.3), draw(3, 6)


@functools.cache
def gradient_on_a(label):
    """∂/∂a of Σ c·h."""
    case = next(c for c in ON_A if c.label == label)
    return jax.jit(jax.grad(lambda a, params, c: (c * on_a(case, a, params)).sum()))


@over_a
@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-4, 1e-2, 1.0, 1e6])
def test_the_gradient_is_at_most_the_gain_over_root_eps_long(case, spread):
    """‖Jᵀc‖ ≤ max|g|·‖c‖/√(var + ε), for any data: J is a contraction times g/σ.

    At zero variance it is reached, up to the loss of the mean.
    """
    a, c, g, b = numbers_on_a(case)
    c, params = array(c), nl.Affine(array(g), array(b))
    grad = gradient_on_a(case.label)(array(spread * a), params, c)
    bound = np.abs(g).max() * np.linalg.norm(c) / np.sqrt(EPS)
    assert np.linalg.norm(grad) <= bound * (1 + 1e-5)
    assert spread > 1e-4 or np.linalg.norm(grad) > bound / 4


@over_a
def test_the_gradient_at_a_large_mean_is_right(case):
    """Of float32 numbers around 1e4, which are 1e-3 apart, and so are μ and the true mean.

    Over the innermost axis the default takes the mean as XLA sums it, which doubles the error.
    """
    _, _, g, b = numbers_on_a(case)
    mean = 0 if case.name == "rms" else 1e4
    a, c = draw(4, *case.x, mean=mean).astype(np.float32), draw(5, *case.x)
    grad = gradient_on_a(case.label)(array(a), nl.Affine(array(g), array(b)), array(c))
    (expected,) = oracles.gradient(
        lambda a: (c * case.oracle(a, np.eye(6), g, b)).sum(), a.astype(np.float64)
    )
    assert gap(grad, expected) < (6e-3 if case.label == "layer-channels" else 3e-3)


@over_a
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_half_precision_are_rounded_once(case, dtype):
    """Everything between is float32. The cotangents are halves, which the cast of h keeps."""
    _, c, g, b = numbers_on_a(case)
    a, c = array(draw(4, *case.x, mean=3.0), dtype), np.round(2 * c) / 2
    grad = gradient_on_a(case.label)(a, nl.Affine(array(g), array(b)), array(c, dtype))
    (expected,) = oracles.gradient(
        lambda a: (c * case.oracle(a, np.eye(6), g, b)).sum(), np.asarray(a, np.float64)
    )
    assert grad.dtype == dtype
    assert gap(grad, expected) < jnp.finfo(dtype).eps


# 3. What weighs nothing, in float32.

RAGGED = np.arange(16) < np.array([16, 9, 3, 1])[:, None]  # positions of four examples
JUNK = (np.nan, np.inf, -np.inf)


def subset_gradient(case, scale=1.0):
    """∂/∂(a, g, b) of Σ c·tanh h over the valid positions, the only ones the oracle is given."""
    a, c, g, b = numbers_on_a(case)

    def loss(a, g, b):
        if case.name == "batch":
            groups = [a[RAGGED][None]]
        else:
            groups = [a[i : i + 1, RAGGED[i]] for i in range(len(a))]
        h = np.concatenate([case.oracle(v, np.eye(6), g, b)[0] for v in groups])
        return smooth(h, c[RAGGED])

    return oracles.gradient(loss, scale * a, g, b)


def valid_loss(case, a, params, form):
    """The same in jax of all positions; the others are weighted out of the loss, or selected."""
    h, c = on_a(case, a, params, array(RAGGED)), array(numbers_on_a(case)[1])
    valid = array(RAGGED, bool)[..., None]
    h = h if form == "weighted" else jnp.where(valid, h, 0)
    return smooth(h, c * valid.astype(c.dtype))


@over_a
@pytest.mark.parametrize("form", ["weighted", "selected"])
def test_gradients_of_the_valid_are_those_of_the_subset(case, form):
    """With junk in the positions of weight zero: everywhere finite, and zero there.

    Also in forward mode, whatever the tangent there, and of second order.
    """
    a, _, g, b = numbers_on_a(case)
    expected = subset_gradient(case)
    params = nl.Affine(array(g), array(b))
    v, mask = draw(4, *a.shape), RAGGED[..., None]

    @jax.jit
    def everything(a, v):
        def loss(a, params):
            return valid_loss(case, a, params, form)

        return jax.jvp(
            jax.value_and_grad(loss, (0, 1)), (a, params), (v, jax.tree.map(jnp.ones_like, params))
        )

    _, clean = everything(array(a), array(v))
    for junk in JUNK:
        dirty = np.where(mask, a, junk)
        (_, (da, dparams)), second = everything(array(dirty), array(np.where(mask, v, 1e3)))
        assert gap((da, *dparams), expected) < BACKWARD
        assert (da[~RAGGED] == 0).all()
        assert gap(second, clean) < BACKWARD
        assert (second[1][0][~RAGGED] == 0).all()


@over_a
def test_the_lowest_number_reaches_no_gradient_where_it_weighs_nothing(case):
    """−3.4e38, a common mark of what is masked: finite, but neither its square nor its double is.

    The valid values are small, so that it is not finite either when divided by σ.
    """
    a, _, g, b = numbers_on_a(case)
    expected = subset_gradient(case, 0.1)
    dirty = np.where(RAGGED[..., None], 0.1 * a, np.finfo(np.float32).min)
    grads = jax.jit(jax.grad(lambda a, p: valid_loss(case, a, p, "selected"), (0, 1)))
    da, dparams = grads(array(dirty), nl.Affine(array(g), array(b)))
    assert gap((da, *dparams), expected) < BACKWARD


# 4. Weights and inputs of any length, in float32.

SCALES = (1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30)


def by_registry(name):
    """h from the four parts."""
    norm = nl.get(name, use_gain=False, use_bias=False)

    def h(x, w):
        return norm.apply(None, (), nl.Site(x @ w, x, w), train=True)[0]

    return h


PLAIN = {
    "weight": lambda x, w: x @ nl.weight_norm(w),
    "weight_standardization": lambda x, w: x @ nl.weight_standardization(w),
    "cosine": nl.cosine_norm,
    "centred_cosine": functools.partial(nl.cosine_norm, centred=True),
}
FORMS = {"plain": PLAIN.get, "parts": by_registry}
SCALED = [
    pytest.param(FORMS[form](name), which, id=f"{name}-{form}-{which}")
    for name in PLAIN
    for form in FORMS
    for which in (("w", "x") if "cosine" in name else ("w",))
]


@pytest.mark.parametrize(("h", "which"), SCALED)
def test_the_gradient_by_a_vector_is_inverse_to_its_length(h, which):
    """h(s·v) = h(v) for s > 0, so s·h'(s·v) = h'(v); its derivative by the other stays.

    Also where ‖v‖² under- or overflows float32: at ‖v‖ = 1e-20 the gradient is 1e20 long.
    """
    x, w, c = draw(0, 3, 5), draw(1, 5, 4), array(draw(2, 3, 4))
    grad = jax.jit(jax.grad(lambda x, w: smooth(h(x, w), c), (0, 1)))
    dx, dw = grad(array(x), array(w))
    worst = {}
    for scale in SCALES:
        sx, sw = (scale, 1) if which == "x" else (1, scale)
        got_x, got_w = grad(array(sx * x), array(sw * w))
        worst[scale] = gap((np.float64(sx) * got_x, np.float64(sw) * got_w), (dx, dw))
    assert np.max([*worst.values()]) < 1e-5, worst  # NaN included


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PLAIN)
def test_tiny_and_huge_weights_are_a_unit_vector_with_a_finite_gradient(name, form):
    """h for the rows of the identity is w/‖w‖, of w centred or not.

    For the centred cosine these rows are of length √((K − 1)/K), and h is so much longer.
    """
    x, w = np.eye(5), draw(1, 5, 4)
    expected = np.sqrt(5 / 4) if name == "centred_cosine" else 1
    for length in (1e-20, 1e20):
        h, grads = pulled_back(form, name)(x, w * length / np.linalg.norm(w, axis=0))
        assert np.abs(np.linalg.norm(np.asarray(h, np.float64), axis=0) - expected).max() < 1e-6
        assert all(np.isfinite(g).all() for g in grads), length
