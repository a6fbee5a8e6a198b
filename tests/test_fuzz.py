"""Random cases against float64 NumPy: what the other tests hold at chosen places, anywhere.

A case is a few words and integers from which its arrays are made: what fails prints one line, which
is the argument of the check that failed. `NORMLAB_FUZZ=5000 pytest tests/test_fuzz.py` draws that
many cases at random, and other ones each time; without it a hundred or so are always the same.
"""

import dataclasses
import functools
import math
import os

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from tests import oracles
from tests.helpers import array, draw, mesh

LONG = int(os.environ.get("NORMLAB_FUZZ", "0"))
pytestmark = pytest.mark.timeout(0 if LONG else 300)


def fuzz(short: int, share: float):
    """So many examples; in a long run a share of `NORMLAB_FUZZ`."""
    return hypothesis.settings(
        max_examples=math.ceil(LONG * share) if LONG else short,
        derandomize=not LONG,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck) if LONG else (),
    )


def forget(seed: int) -> None:
    """Every compiled program is kept: thousands of them would fill the memory."""
    if LONG and seed % 100 == 0:
        jax.clear_caches()


# Norms of pre-activations.

OPS = ("batch", "layer", "rms", "group", "instance")
TYPES = ("float32", "bfloat16", "float16", "float64")
MODES = ("eager", "jit", "vmap", "remat", "reverse", "forward", "hvp")
DERIVATIVES = MODES[3:]
WEIGHTS = ("none", "none", "mask", "importance", "tiny", "huge", "nan")
SHAPES = {  # channels last; the first of each is small enough for all its derivatives
    2: ((4, 6), (33, 6), (2, 768)),
    3: ((3, 4, 6), (5, 17, 6)),
    4: ((2, 3, 2, 6), (2, 7, 7, 4)),
    5: ((2, 2, 2, 2, 4), (2, 3, 2, 4, 6)),
}
DATA = {  # mean and standard deviation, before one thing is changed
    "normal": (0.3, 1.0),
    "mean of 100 sigma": (100.0, 1.0),
    "mean of 10000 sigma": (10000.0, 1.0),
    "constant": (777.777, 0.0),
    "constant channel": (0.3, 1.0),
    "zeros": (0.0, 0.0),
    "outlier": (0.3, 1.0),
    "tiny": (0.0, 1e-20),
    "huge": (1e15, 1e15),
    "overflow": (0.0, 3e25),
}
RANGE = {"float16": {"tiny": (0.0, 1e-5), "huge": (0.0, 1e4), "overflow": (0.0, 1e4)}}
# What overflows in float64 does so in the oracle too.
RANGE["float64"] = {"tiny": (0.0, 1e-100), "huge": (1e120, 1e120), "overflow": (0.0, 1e120)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A norm of a pre-activation; `over` is the axes of layer and RMS norm, or the groups."""

    op: str
    shape: tuple[int, ...]
    channel: int
    over: str | tuple[int, ...] | int | None
    dtype: str
    data: str
    weights: str
    mode: str
    algorithm: str
    eps: float
    seed: int

    @property
    def wide(self) -> str:
        """The type of the arithmetic."""
        return "float64" if self.dtype == "float64" else "float32"


@st.composite
def cases(draw):
    op, mode, dtype = (draw(st.sampled_from(v)) for v in (OPS, MODES, TYPES))
    rank = draw(st.integers(3 if op == "instance" else 2, 5))
    shape = draw(st.sampled_from(SHAPES[rank][: 1 if mode in DERIVATIVES else None]))
    channel = draw(st.integers(0 if op == "batch" else 1, rank - 1))
    over = None
    if op in ("layer", "rms"):
        numbers = st.sets(st.integers(0, rank - 1), min_size=1).map(lambda v: tuple(sorted(v)))
        over = draw(st.one_of(st.just("channels"), st.just("all"), numbers))
    elif op == "group":
        over = draw(st.sampled_from([1, 2]))
    data = draw(st.sampled_from(tuple(DATA)))
    if mode in DERIVATIVES and data == "overflow":
        data = "normal"
    if mode == "hvp":  # float32 at least, and σ⁻⁴ is a number
        dtype = draw(st.sampled_from(("float32", "float64")))
        data = "normal" if data == "huge" else data
    eps = draw(st.sampled_from((1e-5, 1e-3, 1e-12)))
    if mode in DERIVATIVES and dtype == "float16":
        eps = 1e-3  # 1/σ is a number
    algorithm = draw(st.sampled_from(("auto", "auto", "shifted", "two_pass", "one_pass")))
    weights, seed = draw(st.sampled_from(WEIGHTS)), draw(st.integers(0, 10**6))
    return Case(op, shape, channel, over, dtype, data, weights, mode, algorithm, eps, seed)


def rounded(value, dtype) -> np.ndarray:
    """The numbers of a type nearest to these, in float64."""
    return np.asarray(value).astype(jnp.dtype(dtype)).astype(np.float64)


def spacing(dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def tiny(dtype) -> float:
    return float(jnp.finfo(dtype).tiny)


class Sample:
    """What a case is made of, channels last in float64, and how well-conditioned it is."""

    def __init__(self, case: Case, seed: int = 0):
        self.case, rng = case, np.random.default_rng(case.seed + seed)
        mean, sd = RANGE.get(case.dtype, {}).get(case.data, DATA[case.data])
        a = mean + sd * rng.normal(size=case.shape)
        if case.data == "constant channel":
            a[..., 1] = 7.7
        elif case.data == "outlier":
            a.flat[rng.integers(a.size)] = 3e4
        self.a = rounded(a, case.dtype)
        self.g = rounded(1 + 0.3 * rng.normal(size=case.shape[-1]), case.dtype)
        self.b = rounded(0.3 * rng.normal(size=case.shape[-1]), case.dtype)
        kept = rng.integers(1, a.ndim)  # [N], [N, H], ...
        w = rng.uniform(0.1, 1, size=case.shape[:kept])
        if case.weights in ("mask", "nan"):
            w = np.ones_like(w)
        w = np.where(rng.uniform(size=w.shape) < 0.3, 0, w)
        w *= {"tiny": 1e-30, "huge": 1e30}.get(case.weights, 1)
        w = rounded(w, case.wide)
        self.w = None if case.weights == "none" else w
        full = np.ones_like(w) if self.w is None else w
        self.each = np.broadcast_to(full.reshape(w.shape + (1,) * (a.ndim - w.ndim)), a.shape)
        self.lost = (self.each == 0) & (case.weights == "nan")  # NaN for the library, 0 here
        self.a[self.lost] = 0
        self._measure()

    def _measure(self) -> None:
        """The axes, and for each value what its own sample is like."""
        case, rank = self.case, self.a.ndim
        named = {
            "batch": tuple(range(rank - 1)),
            "group": (*range(1, rank - 1), rank),
            "instance": tuple(range(1, rank - 1)),
            "channels": (rank - 1,),
            "all": tuple(range(1, rank)),
        }
        order = [i for i in range(rank) if i != case.channel] + [case.channel]
        self.axes = axes = (
            named.get(case.op) or named.get(case.over) or tuple(order.index(i) for i in case.over)
        )
        split = case.shape
        if case.op == "group":
            split = (*split[:-1], case.over, split[-1] // case.over)
        x, w = self.a.reshape(split), self.each.reshape(split)
        total, mean = w.sum(axes, keepdims=True), case.op != "rms"  # whether it subtracts one
        lowest = np.where(w > 0, x, np.inf).min(axes, keepdims=True)
        highest = np.where(w > 0, x, -np.inf).max(axes, keepdims=True)
        origin = np.where(total > 0, lowest, 0) * mean
        n, d = np.where(total > 0, total, 1), x - origin
        offset = (w * d).sum(axes, keepdims=True) / n * mean
        spread = np.sqrt((w / n * (d - offset) ** 2).sum(axes, keepdims=True))
        sigma = np.hypot(spread, np.sqrt(case.eps))
        still = (lowest >= highest) & mean
        # The mean is right to two units in its last place, of a constant to none: that much beside
        # σ; and `one_pass` takes the square of it from the square of another.
        kappa = 4 * np.abs(origin + offset) / sigma * mean
        kappa = np.where(still, 0, kappa) + kappa**2 / 4 * (case.algorithm == "one_pass")
        square = np.where(w > 0, d**2, 0).max(axes, keepdims=True) * x.size
        limit = float(jnp.finfo(case.wide).max) / 10
        self.origin, self.sigma, self.xhat, self.spread, self.still, self.kappa = (
            np.broadcast_to(v, split).reshape(case.shape)
            for v in (origin, sigma, np.abs((d - offset) / sigma), spread / sigma, still, kappa)
        )
        self.x = self.a - self.origin
        self.empty, self.overflows = (
            np.broadcast_to(v, split).reshape(case.shape)
            for v in (total == 0, (square > limit) & ~still)
        )

    def oracle(self, x, g, b):
        """h of x, which is a without its origin; the bias where nothing was measured."""
        case = self.case
        options = {"eps": case.eps, "weights": self.w}
        if case.op in ("layer", "rms"):
            options["axes"] = self.axes
        elif case.op == "group":
            options["groups"] = case.over
        with np.errstate(all="ignore"):
            h = getattr(oracles, case.op)(x, **options)
        return np.where(self.empty, 0, h) * g + b

    def bound(self):
        """How far h may be off.

        30 roundings of x̂ and of the deviations' sum (the oracle of float64 rounds too), those of
        the mean, and one of h in its type.
        """
        noise = 30 * (self.xhat + self.spread) + self.kappa
        h = self.xhat * np.abs(self.g) + np.abs(self.b)
        noise = spacing(self.case.wide) * noise * np.abs(self.g)
        return noise + spacing(self.case.dtype) * h + tiny(self.case.dtype)


def place(sample: Sample):
    """`(a, g, b)` and the weights as the library has them, in the layout of the case."""
    case = sample.case
    a = np.where(sample.lost, np.nan, sample.a)
    a = array(np.moveaxis(a, -1, case.channel), case.dtype)
    w = sample.w
    w = None if w is None else array(w, case.wide)
    return (a, array(sample.g, case.dtype), array(sample.b, case.dtype)), w


def norm(case: Case):
    """`f(a, g, b, weights) -> h`, of the library."""
    options = {"eps": case.eps, "channel_axis": case.channel}
    if case.op != "rms":
        options["algorithm"] = case.algorithm
    if case.op in ("layer", "rms"):
        options["axes"] = case.over
    elif case.op == "group":
        options["groups"] = case.over

    def f(a, g, b, weights):
        params = nl.Affine(g, b)
        if case.op == "batch":
            return nl.batch_norm(a, params, train=True, weights=weights, **options)[0]
        return getattr(nl, f"{case.op}_norm")(a, params, weights=weights, **options)

    return f


def within(found, expected, bound, case) -> None:
    """No NaN is."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    wrong = ~(np.abs(found - expected) <= bound)
    assert not wrong.any(), (
        f"{case}\n{wrong.sum()} of {wrong.size}, the first {found[wrong][0]} for "
        f"{expected[wrong][0]}, bound {np.broadcast_to(bound, wrong.shape)[wrong][0]}"
    )


def check_forward(sample: Sample, h) -> None:
    case = sample.case
    assert h.dtype == jnp.dtype(case.dtype)
    h = np.moveaxis(np.asarray(h, np.float64), case.channel, -1)
    expected = sample.oracle(sample.x, sample.g, sample.b)
    # Squares that overflow give NaN, if not what is right; so does h itself in a half type.
    limit = float(jnp.finfo(case.dtype).max)
    away = sample.overflows & np.isnan(h) | (np.abs(expected) >= limit) & ~(np.abs(h) < limit)
    exact = sample.still & (sample.each > 0) | sample.empty
    bound = np.where(exact, 0, sample.bound())
    expected = np.where(exact, sample.b, expected)
    within(np.where(away, expected, h), expected, bound, case)


def check_derivatives(sample: Sample) -> None:
    """Of Σ c·h backward and of h forward; or the product of the Hessian of Σ c·h² and a vector."""
    case = sample.case
    args, w = place(sample)
    c, v = (rounded(draw(case.seed + i, *case.shape), case.dtype) for i in (2, 3))
    v = v * ~sample.lost
    f = jax.checkpoint(norm(case)) if case.mode == "remat" else norm(case)
    power = 2 if case.mode == "hvp" else 1

    def put(v):
        return array(np.moveaxis(v, -1, case.channel), case.dtype)

    def back(v):
        return np.moveaxis(np.asarray(v, np.float64), case.channel, -1)

    def loss(*args):
        return (put(c).astype(case.wide) * f(*args, w).astype(case.wide) ** power).sum()

    def oracle(*args):
        return (c * sample.oracle(*args) ** power).sum()

    x, *affine = sample.x, sample.g, sample.b
    # A derivative sums terms like c·g/σ, and these times two values of x̂, each as good as h is; in
    # half types what is summed has been rounded to them.
    coarse, least = 4 * spacing(case.dtype), tiny(case.dtype)
    noise = spacing(case.wide) * (60 + 2 * sample.kappa) + coarse
    g, top = np.abs(sample.g).max(), 1 + sample.xhat.max()
    by_a = noise * g * top**2 / sample.sigma * np.abs(v if case.mode == "forward" else c).max()
    if case.mode == "forward":
        found = jax.jit(lambda a, v: jax.jvp(lambda a: f(a, *args[1:], w), (a,), (v,))[1])
        expected = sample.oracle(x + 1e-40j * v, *affine).imag / 1e-40
        within(back(found(args[0], put(v))), expected, by_a + least, case)
    elif case.mode == "hvp":
        found = jax.jit(jax.grad(lambda a: (jax.grad(loss)(a, *args[1:]) * put(v)).sum()))
        step = 1e-4 * sample.sigma.min() / np.abs(v).max()  # of which the square is lost
        up, down = (
            oracles.gradient(lambda x: oracle(x, *affine), x + s * v)[0] for s in (step, -step)
        )
        bound = (
            by_a
            * (1 + 1e-8 / spacing(case.wide))
            * top**2
            * np.abs(v).max()
            * (g + 1)
            / sample.sigma
        )
        expected = np.where(sample.lost, 0, up - down) / (2 * step)
        within(back(found(args[0])), expected, bound + least, case)
    else:
        found = jax.jit(jax.grad(loss, (0, 1, 2)))(*args)
        by = oracles.gradient(oracle, x, *affine)
        others = tuple(range(x.ndim - 1))
        by_g = (np.abs(c) * (sample.bound() / np.abs(sample.g) + coarse * top)).sum(others)
        by_b = noise.max() * np.abs(c).sum(others)
        within(back(found[0]), np.where(sample.lost, 0, by[0]), by_a + least, case)
        within(found[1], by[1], by_g, case)
        within(found[2], by[2], by_b, case)


@hypothesis.given(cases())
@fuzz(short=40, share=0.6)
def test_a_norm_of_the_preactivation(case):
    forget(case.seed)
    with jax.enable_x64(case.dtype == "float64"):
        check(case)


def check(case: Case) -> None:
    """One case; float64 wants x64."""
    sample = Sample(case)
    if case.mode in DERIVATIVES:
        check_derivatives(sample)
        return
    f = {"jit": jax.jit, "vmap": jax.vmap}.get(case.mode, lambda f: f)(norm(case))
    if case.mode == "vmap":
        samples = [sample, Sample(case, seed=1)]
        if sample.w is not None and samples[1].w.shape != sample.w.shape:
            samples[1] = sample
        args, w = zip(*map(place, samples), strict=True)
        args = [jnp.stack(v) for v in zip(*args, strict=True)]
        for one, h in zip(samples, f(*args, None if w[0] is None else jnp.stack(w)), strict=True):
            check_forward(one, h)
    else:
        args, w = place(sample)
        check_forward(sample, f(*args, w))


# Norms of kernels.


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight or cosine norm, and the layer: of an input of some spatial rank, 0 for dense."""

    op: str
    rank: int
    channel: int
    padding: str
    dtype: str
    x: str
    w: str
    mode: str
    seed: int


KERNEL_DATA = {
    "normal": (0.3, 1.0),
    "mean of 100 sigma": (100.0, 1.0),
    "constant": (7.7, 0.0),
    "zeros": (0.0, 0.0),
    "tiny": (0.0, 1e-20),
    "huge": (0.0, 1e15),
}


@st.composite
def kernels(draw):
    rank = draw(st.integers(0, 2))
    return Kernel(
        op=draw(st.sampled_from(("weight", "weight_standardization", "cosine", "centred_cosine"))),
        rank=rank,
        channel=draw(st.sampled_from((-1, 1))) if rank else -1,
        padding=draw(st.sampled_from(("SAME", "VALID"))),
        dtype=draw(st.sampled_from(("float32", "bfloat16", "float64"))),
        x=draw(st.sampled_from(tuple(KERNEL_DATA))),
        w=draw(st.sampled_from(tuple(KERNEL_DATA))),
        mode=draw(st.sampled_from(("eager", "jit", "reverse"))),
        seed=draw(st.integers(0, 10**6)),
    )


@hypothesis.given(kernels())
@fuzz(short=14, share=0.15)
def test_a_norm_of_the_kernel(case):
    forget(case.seed)
    with jax.enable_x64(case.dtype == "float64"):
        check_kernel(case)


def check_kernel(case: Kernel) -> None:
    """h and the gradients, of a layer that itself is not normalized away."""
    linear = nl.Conv(channel_axis=case.channel, padding=case.padding) if case.rank else nl.Dense()
    cosine = case.op.endswith("cosine")

    def make(i, kind, *shape):
        mean, sd = KERNEL_DATA[kind]
        return rounded(draw(case.seed + i, *shape, mean=mean, scale=sd), case.dtype)

    x = make(0, case.x if cosine else "normal", 2, *(4, 3)[: case.rank], 5)
    w = make(1, case.w, *(3, 2)[: case.rank], 5, 3)
    g, b = make(2, "normal", 3), make(3, "normal", 3)
    wide = "float64" if case.dtype == "float64" else "float32"

    def ours(x, w, g, b):
        if cosine:
            centred = case.op == "centred_cosine"
            return nl.cosine_norm(x, w, nl.Affine(g, b), linear=linear, centred=centred)
        return getattr(nl, case.op if "_" in case.op else "weight_norm")(
            w, None if g is None else nl.Affine(g, None)
        )

    p, u = oracles.patches(x, w, linear), oracles.units(w, linear)
    centred = case.op in ("weight_standardization", "centred_cosine")

    def nothing(v, axis):  # no direction: zero, or for those that subtract the mean constant
        return np.ptp(v, axis) == 0 if centred else (v == 0).all(axis)

    dead_u, dead_p = nothing(u, 1).ravel(), nothing(p, -1) & cosine

    def oracle(x, w, g, b):
        with np.errstate(all="ignore"):
            if not cosine:
                v = w - w.mean(tuple(range(w.ndim - 1)), keepdims=True) * centred
                return np.where(dead_u, 0, v / oracles.length(v.reshape(-1, 3), 0)) * g
            h = oracles.cosine(
                oracles.patches(x, w, linear), oracles.units(w, linear), centred=centred
            )
        return np.where(dead_u | dead_p, 0, h) * g + b

    def layout(v):
        return np.moveaxis(v, -1, case.channel)

    def back(v, input=True):
        v = np.asarray(v, np.float64)
        return np.moveaxis(v, case.channel, -1) if input else v

    args = [array(v, case.dtype) for v in (layout(x), w, g, b)]
    # 30 roundings, those of the means beside the deviations, and of h in its type.
    kappa = sum(
        (np.abs(v.mean(axis)) / np.where(np.ptp(v, axis) == 0, np.inf, v.std(axis))).max()
        for v, axis in ((u, 1), (p, -1))
    )
    unit, coarse = spacing(wide), spacing(case.dtype)
    noise = unit * (30 + 4 * centred * kappa) + coarse
    size = 1 + np.abs(g) + np.abs(b)
    if case.mode != "reverse":
        h = (jax.jit if case.mode == "jit" else lambda f: f)(ours)(*args)
        within(back(h, cosine), oracle(x, w, g, b), noise * size, case)
        return
    if dead_u.any() or dead_p.any():  # has no derivative
        return
    c = make(4, "normal", *oracle(x, w, g, b).shape)
    cj = array(layout(c) if cosine else c, wide)
    found = jax.jit(jax.grad(lambda *a: (cj * ours(*a).astype(wide)).sum(), (0, 1, 2, 3)))(*args)
    expected = oracles.gradient(lambda *a: (c * oracle(*a)).sum(), x, w, g, b)
    for i, (one, other, arg) in enumerate(zip(found, expected, (x, w, g, b), strict=True)):
        # What one relative change of the argument does to Σ c·h.
        reach = np.abs(c).sum() * size.max() * (1 + kappa) / (np.abs(arg).max() or 1)
        within(back(one, i == 0), other, 4 * noise * reach + tiny(case.dtype), case)


# Meshes.


@dataclasses.dataclass(frozen=True)
class Mesh:
    """A case under plain `jit`, and which of its axes lie over the mesh's "i" and "j"."""

    case: Case
    kind: str
    i: int | None
    j: int | None


@st.composite
def meshes(draw):
    case = draw(cases())
    rank, data = len(case.shape), "normal" if case.data == "overflow" else case.data
    case = dataclasses.replace(case, shape=(8,) * rank, dtype="float32", data=data, mode="jit")
    axis = st.one_of(st.none(), st.integers(0, rank - 1))
    return Mesh(case, draw(st.sampled_from(("Explicit", "Auto"))), draw(axis), draw(axis))


@hypothesis.given(meshes())
@fuzz(short=10, share=0.1)
def test_a_sharded_array(case):
    forget(case.case.seed)
    check_mesh(case)


def check_mesh(laid: Mesh) -> None:
    case, sample = laid.case, Sample(laid.case)
    (a, g, b), w = place(sample)
    names = range(a.ndim)
    spec = P(*(tuple(n for n in "ij" if getattr(laid, n) == axis) or None for axis in names))
    c, v = (draw(case.seed + i, *case.shape) * ~sample.lost for i in (2, 3))

    @jax.jit
    def f(a, c, w):
        h, back = jax.vjp(lambda a: norm(case)(a, g, b, w), a)
        return h, back(c)[0]

    grid = mesh(AxisType[laid.kind], i=4, j=2)
    with jax.set_mesh(grid):
        c_ = array(np.moveaxis(c, -1, case.channel))
        a, c_ = jax.device_put((a, c_), NamedSharding(grid, spec))
        h, grad = f(a, c_, w)
        if laid.kind == "Explicit":
            assert jax.typeof(h).sharding.spec == jax.typeof(a).sharding.spec
    check_forward(sample, np.asarray(h))
    # The gradient by one number, its product with v.
    slope = (sample.oracle(sample.x + 1e-40j * v, sample.g, sample.b).imag / 1e-40 * c).sum()
    grad = np.moveaxis(np.asarray(grad, np.float64), case.channel, -1)
    noise = spacing(case.dtype) * (60 + 2 * sample.kappa) * np.abs(sample.g).max()
    bound = noise * (1 + sample.xhat.max()) ** 2 / sample.sigma * np.abs(c).max()
    within((grad * v).sum(), slope, np.linalg.norm(bound) * np.linalg.norm(v), laid)


# Devices.

SYNCS = {  # of 4 devices with 4 examples each: the examples that are one batch
    "i": (nl.Sync("i"), [range(16)]),
    "staged": (nl.Sync("i", staged=True), [range(16)]),
    "blocks": (nl.Sync("i", groups=2), [range(8), range(8, 16)]),
    "strided": (
        nl.Sync("i", groups=((0, 2), (1, 3))),
        [[*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]],
    ),
    "uneven": (nl.Sync("i", groups=((0,), (1, 2, 3))), [range(4), range(4, 16)]),
    "ghosts": (nl.Sync("i", shards=2, groups=1), [range(k, k + 2) for k in range(0, 16, 2)]),
    "halves": (nl.Sync("i", shards=2, groups=4), [range(8), range(8, 16)]),
    "virtual": (nl.Sync("i", virtual_batch=2), [range(k, k + 2) for k in range(0, 16, 2)]),
    "across": (nl.Sync("i", virtual_batch=8), [range(8), range(8, 16)]),
}


@dataclasses.dataclass(frozen=True)
class Devices:
    """Batch norm of a `Sync` and where it runs."""

    sync: str
    where: str
    rank: int
    weights: str
    data: str
    seed: int


def devices():
    return st.builds(
        Devices,
        sync=st.sampled_from(tuple(SYNCS)),
        where=st.sampled_from(("vmap", "shard_map", "unchecked", "Explicit", "Auto")),
        rank=st.integers(2, 3),
        weights=st.sampled_from(("none", "mask", "importance", "huge")),
        data=st.sampled_from(("normal", "mean of 100 sigma", "constant", "constant channel")),
        seed=st.integers(0, 10**6),
    )


@hypothesis.given(devices())
@fuzz(short=10, share=0.1)
def test_a_batch_on_devices(case):
    forget(case.seed)
    check_devices(case)


def check_devices(case: Devices) -> None:
    sync, groups = SYNCS[case.sync]
    shape = (16, 3, 4) if case.rank == 3 else (16, 4)
    word = ("batch", shape, case.rank - 1, None, "float32", case.data)
    whole = Sample(Case(*word, case.weights, "jit", "auto", 1e-5, case.seed))
    (a, g, b), w = place(whole)
    w = None if w is None else w.reshape(16, -1)[:, 0]  # one for each example
    c, v = (draw(case.seed + i, *shape) for i in (2, 3))

    def f(a, w, c):
        def run(a):
            params, state = nl.Affine(g, b), nl.init_running(shape[-1])
            return nl.batch_norm(a, params, state, train=True, axis_name=sync, weights=w)

        h, back, state = jax.vjp(run, a, has_aux=True)
        return h, back(c)[0], state

    args = a, w, array(c)
    if case.where == "vmap":
        split = jax.tree.map(lambda v: v.reshape(4, 4, *v.shape[1:]), args)
        h, grad, state = jax.jit(jax.vmap(f, axis_name="i"))(*split)
        state = jax.tree.map(lambda v: v[0], state)
    elif case.where in ("shard_map", "unchecked"):
        specs = {"in_specs": P("i"), "out_specs": (P("i"), P("i"), P())}
        checked = case.where == "shard_map"
        body = jax.shard_map(f, mesh=mesh(i=4), **specs, check_vma=checked)
        h, grad, state = jax.jit(body)(*args)
    else:
        grid = mesh(AxisType[case.where], i=4)
        with jax.set_mesh(grid):
            h, grad, state = jax.jit(f)(*jax.device_put(args, NamedSharding(grid, P("i"))))
    h, grad = (np.asarray(v, np.float64).reshape(shape) for v in (h, grad))

    weights = np.ones(16) if w is None else np.float64(w)
    live = [k for k in map(list, groups) if weights[k].any()]

    def oracle(x):
        h = np.zeros_like(x)
        for k in live:
            h[k] = oracles.batch(x[k], weights=weights[k])
        return h * whole.g + whole.b

    def measured(k):
        x, each = whole.a[k], weights[k].reshape(-1, *(1,) * (case.rank - 1))
        axes = tuple(range(case.rank - 1))
        mean = np.average(x, axes, np.broadcast_to(each, x.shape))
        return mean, np.average((x - mean) ** 2, axes, np.broadcast_to(each, x.shape))

    # A group may be of two examples: the bound is that of the smallest σ of any.
    x, unit = whole.a - whole.a[(0,) * (case.rank - 1)], spacing("float32")
    sigma = min((np.sqrt(measured(k)[1] + 1e-5).min() for k in live), default=1.0)
    noise = unit * (30 + 4 * np.abs(whole.a).max() / sigma)
    expected = oracle(x)
    within(h, expected, noise * (1 + np.abs(expected).max()), case)
    slope = (oracle(x + 1e-40j * v).imag / 1e-40 * c).sum()
    reach = 2 * noise * (1 + np.abs(expected).max()) ** 2 / sigma
    within((grad * v).sum(), slope, reach * np.linalg.norm(c) * np.linalg.norm(v), case)
    if live:
        mean, var = measured(range(16))
        within(state.mean, mean, 4 * unit * np.abs(whole.a).max(), case)
        # The parts' means, each right to two units, are in the variance between them.
        off = 4 * unit * np.abs(mean)
        within(state.var, var, 30 * unit * var + 2 * off * np.sqrt(var) + off**2, case)


# Populations.

KEPT = ("debiased", "ema", "cumulative", "renorm", "domains", "domain of each", "frozen", "batch")


@dataclasses.dataclass(frozen=True)
class Kept:
    """Some steps of batch norm with a population, each of one batch or more, and inference."""

    name: str
    steps: tuple[str, ...]
    micro: int
    ddof: int
    decay: float
    mean: float
    jit: bool
    seed: int


def populations():
    step = st.sampled_from(("plain", "plain", "mask", "nan", "constant"))
    return st.builds(
        Kept,
        name=st.sampled_from(KEPT),
        steps=st.lists(step, min_size=1, max_size=4).map(tuple),
        micro=st.sampled_from((0, 0, 1, 2)),  # the batches of a transaction, 0 for none
        ddof=st.sampled_from((0, 1)),
        decay=st.sampled_from((0.0, 0.9)),
        mean=st.sampled_from((0.0, 2.0, 100.0)),
        jit=st.booleans(),
        seed=st.integers(0, 10**6),
    )


class Average:
    """What each population keeps, in NumPy."""

    def __init__(self, case: Kept):
        self.case, self.debias = case, case.name != "ema"
        self.mass, self.mean, self.var = 1.0 - self.debias, np.zeros(3), np.ones(3)
        self.updates = self.skipped = 0
        self.seen = []

    def update(self, a, w) -> None:
        case = self.case
        if np.isnan(a[w > 0]).any():
            self.skipped += 1
            return
        a = a[w > 0]
        n, mean, var = len(a), a.mean(0), a.var(0)
        self.updates += 1
        if case.name == "cumulative":
            self.seen.append(a)
            a = np.concatenate(self.seen)
            self.mean, self.var = a.mean(0), a.var(0, ddof=case.ddof)
            return
        var = var * n / (n - case.ddof)
        self.mass = case.decay * self.mass + 1 - case.decay
        rate = (1 - case.decay) / self.mass
        self.mean = self.mean + rate * (mean - self.mean)
        if case.name == "renorm":
            sigma = (1 - rate) * np.sqrt(self.var + 1e-5) + rate * np.sqrt(var + 1e-5)
            self.var = sigma**2 - 1e-5
        else:
            self.var = (1 - rate) * self.var + rate * var


def start(case: Kept):
    """The library's state."""
    if case.name == "batch":
        return ()
    if case.name == "cumulative":
        return nl.population.init_population("cumulative", 3, ddof=case.ddof)
    options = {"decay": case.decay, "ddof": case.ddof}
    if case.name == "renorm":
        options |= {"begin": 0, "r_end": 1, "d_end": 1}
    if case.name == "domain of each":
        options["examples"] = 8
    name = "domains" if case.name == "domain of each" else case.name
    return nl.population.init_population(name, 3, **options)


@hypothesis.given(populations())
@fuzz(short=12, share=0.15)
def test_a_population(case):
    forget(case.seed)
    check_population(case)


def check_population(case: Kept) -> None:
    rng, state = np.random.default_rng(case.seed), start(case)
    averages = [Average(case), Average(case)]
    train = functools.partial(nl.batch_norm, train=True)
    train = jax.jit(train) if case.jit else train
    unit = spacing("float32")
    for number, kind in enumerate(case.steps):
        # Whose average it is: one for the step, or one for each example.
        domains = np.zeros(8, int)
        if case.name == "domains":
            domains[:] = number % 2
            state = nl.population.select_domain(state, number % 2)
        elif case.name == "domain of each":
            domains = np.arange(8) // 2 % 2
            state = nl.population.select_domain(state, array(domains, "int32"))
        state = nl.population.begin(state) if case.micro else state
        seen = []
        for _ in range(max(case.micro, 1)):
            a = rounded(case.mean + 3 * rng.normal(size=(8, 3)), "float32")
            w = np.ones(8)
            if kind == "constant":
                a[:] = case.mean + 7.7
                a = rounded(a, "float32")
            elif kind == "nan":
                a[rng.integers(8), 1] = np.nan
            elif kind == "mask":
                w[[0, 3]] = 0
                a[0] = np.nan
            inner = state.inner if case.micro and hasattr(state, "inner") else state
            h, state = train(array(a), None, state, weights=array(w))
            for d in {*domains}:
                own = domains == d
                check_output(
                    case, a[own], w[own], np.asarray(h, np.float64)[own], averages[d], inner
                )
            seen.append((a, w, domains))
        if case.micro:
            state = nl.population.commit(state)
        a, w, d = (np.concatenate(v) for v in zip(*seen, strict=True))
        broken = np.isnan(a[w > 0]).any()
        if case.name not in ("frozen", "batch"):
            for k in {*d}:
                own = d == k
                if case.micro and broken:  # the step counts for all or for none
                    averages[k].skipped += 1
                else:
                    averages[k].update(a[own], w[own])
    if case.name == "batch":
        assert state == ()
        return
    first = averages[domains[0]]
    read = [np.asarray(v, np.float64) for v in state.read()]
    mean, var = (v[0] if v.ndim == 2 else v for v in read)
    size = case.mean + 20
    within(mean, first.mean, 8 * unit * size, case)
    # That of a batch has 30 roundings and the square of what the mean is off by.
    within(var, first.var, 40 * unit * (first.var + 1) + (8 * unit * size) ** 2, case)
    kept = getattr(state, "inner", state)
    for field in ("updates", "skipped"):
        counted = np.asarray(getattr(kept, field))
        expected = [getattr(average, field) for average in averages]
        assert (counted == (expected if counted.ndim else expected[0])).all(), (case, field)
    a = rounded(case.mean + 3 * rng.normal(size=(8, 3)), "float32")
    h = np.asarray(nl.batch_norm(array(a), None, state, train=False)[0], np.float64)
    mean, var = read
    sigma = np.sqrt(var + 1e-5)
    expected = (a - mean) / sigma
    within(h, expected, unit * (8 * np.abs(expected) + 4 * np.abs(mean) / sigma), case)


def check_output(case: Kept, a, w, h, average: Average, state) -> None:
    """What training made of a batch: by itself, or as the population has it."""
    if np.isnan(a[w > 0]).any() or (case.micro and case.name == "renorm"):
        return
    good = np.where(np.isnan(a), 0, a)
    kept = good[w > 0]
    mean, sigma = kept.mean(0), np.sqrt(kept.var(0) + 1e-5)
    shift, scale = mean, sigma
    if case.name == "frozen":
        shift, scale = np.zeros(3), np.sqrt(np.ones(3) + 1e-5)
    elif case.name == "renorm" and average.updates:
        old = np.sqrt(average.var + 1e-5)
        r = np.clip(sigma / old, 1 / 3, 3)
        d = np.clip((mean - average.mean) / old, -5, 5)
        shift, scale = mean - d * sigma / r, sigma / r
    expected = (good - shift) / scale
    unit = spacing("float32")
    still = np.ptp(kept, 0) == 0  # of which the mean is exact
    kappa = np.where(still & (case.name != "renorm"), 0, (np.abs(mean) + np.abs(shift)) / scale)
    within(h, expected, unit * (40 * np.abs(expected) + 40 + 8 * kappa), case)
