"""The family: one table of norms, of which `tests/test_family.py` tests every law on every row.

A member is a norm with its options, the shapes it is tried on, and its oracle: h in NumPy float64,
from the definition, sharing no code with the library. A norm of the registry that has no case in
`tests/cases.py` has a member here, and every option is some member's: a test says so.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import normlab as nl
from tests import oracles
from tests.helpers import draw


class Problem(NamedTuple):
    """What an oracle is given, in NumPy float64 and channels last.

    Attributes:
      a: `[N, ..., C]`, w·x.
      x: The input of the linear map.
      w: Its kernel.
      params: The norm's, the same pytree.
      state: The norm's, the same pytree, before the call.
      train: Whether this is training.
      options: Those of the norm.
      at: The problem at which derivatives are taken: what has no gradient is measured on that.
    """

    a: np.ndarray
    x: np.ndarray
    w: np.ndarray
    params: Any
    state: Any
    train: bool
    options: dict[str, Any]
    at: Any = None

    def affine(self, h: np.ndarray) -> np.ndarray:
        """g·h + b, for g and b of `[C]` or of no axis."""
        g, b = self.params.g, self.params.b
        h = h if g is None else g * h
        return h if b is None else h + b


class Member(NamedTuple):
    """A norm of the family.

    Attributes:
      name: The registry's name.
      oracle: `problem -> h`.
      options: The factory's options.
      x: The input's shape, `[N, ..., K]`.
      w: The kernel's.
      linear: The layer.
      folds: Whether `fold_norm` takes it, as inference has it.
      weights: Whether it takes weights of examples and positions; if not, it refuses them.
      one: The shape of an input `a` whose statistics are of one value each, which it refuses.
      slack: By what factor float32 may be worse than in the laws of the first ten.
    """

    name: str
    oracle: Callable[[Problem], np.ndarray]
    options: dict[str, Any] = {}  # noqa: RUF012
    x: tuple[int, ...] = (4, 6, 5)
    w: tuple[int, ...] = (5, 6)
    linear: Any = nl.Dense()
    folds: bool = False
    weights: bool = False
    one: tuple[int, ...] | None = None
    slack: float = 1.0

    @property
    def label(self) -> str:
        """The test's id."""
        options = [f"{k}={getattr(v, '__name__', v)}" for k, v in self.options.items()]
        return "-".join([self.name, *options, *[f"rank{len(self.x)}"] * (len(self.x) != 3)])

    @property
    def row(self) -> nl.Row:
        """The registry's row."""
        return nl.row(self.name)

    @property
    def norm(self) -> nl.Norm:
        """The norm itself."""
        return nl.get(self.name, **self.options)

    def site(self, x: Any, w: Any, weights: Any = None) -> nl.Site:
        """The site, with values."""
        return nl.Site(self.linear(x, w), x, w, weights, self.linear)

    def numbers(self, seed: int = 0, x: tuple[int, ...] | None = None) -> tuple:
        """`(x, w)` in NumPy float64."""
        return draw(seed, *(x or self.x), mean=0.3), draw(seed + 1, *self.w)

    def values(self, dtype: Any, seed: int = 0) -> tuple:
        """`(x, w, params, state)`; the params are the initial ones, each moved a little."""
        x, w = (jnp.asarray(v, dtype) for v in self.numbers(seed))
        params, state = self.norm.init(self.site(x, w))
        leaves, tree = jax.tree.flatten(params)
        moved = [
            v + jnp.asarray(draw(seed + 5 + i, *v.shape, scale=0.2), v.dtype)
            for i, v in enumerate(leaves)
        ]
        return x, w, jax.tree.unflatten(tree, moved), state

    def problem(self, x: Any, w: Any, params: Any, state: Any, *, train: bool) -> Problem:
        """For the oracle."""
        a = self.linear(x, w)
        numpy = [
            jax.tree.map(lambda v: np.asarray(v, np.float64), tree)
            for tree in (a, x, w, params, state)
        ]
        return Problem(*numpy, train, self.options)


def mean_and_var(a: np.ndarray, axes: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the biased variance over some axes, which stay."""
    return a.mean(axes, keepdims=True), a.var(axes, keepdims=True)


# Lengths.


def scale(p: Problem) -> np.ndarray:
    """Nguyen & Salazar 2019, section 3.2: g·x/‖x‖."""
    return p.affine(p.a / np.maximum(np.sqrt((p.a**2).sum(-1, keepdims=True)), 1e-5))


LENGTHS = (
    Member("scale", scale),
    Member("scale", scale, {"gain": "plain", "use_bias": True, "eps": 1e-5}),
    Member("scale", scale, {"use_gain": False}),
)

# Gains, and samples of other shapes: variants of the ten.


def layer(p: Problem) -> np.ndarray:
    """Ba et al. 2016, equation 3, with a gain of any shape."""
    mu, var = mean_and_var(p.a, p.options.get("axes", -1))
    return p.affine((p.a - mu) / np.sqrt(var + 1e-5))


def rms(p: Problem) -> np.ndarray:
    """Zhang & Sennrich 2019, equation 4, of groups, or of a part of the channels."""
    groups, part = p.options.get("groups", 1), p.options.get("part", 1.0)
    cut = p.a.reshape(*p.a.shape[:-1], groups, -1)
    square = (cut[..., : max(1, int(cut.shape[-1] * part))]) ** 2
    axes = (1, -1) if p.options.get("axes") == "all" else p.options.get("axes", -1)
    h = cut / np.sqrt(square.mean(axes, keepdims=True) + 1e-5)
    return p.affine(h.reshape(p.a.shape))


def group_about_zero(p: Problem) -> np.ndarray:
    """RMS norm of each group over all positions."""
    cut = p.a.reshape(len(p.a), -1, p.options["groups"], p.a.shape[-1] // p.options["groups"])
    h = cut / np.sqrt((cut**2).mean((1, 3), keepdims=True) + 1e-5)
    return p.affine(h.reshape(p.a.shape))


LAST = (-2, -1)
GAINS = (
    Member("rms", rms, {"groups": 2}, weights=True),
    Member("rms", rms, {"groups": 3, "axes": "all"}),
    Member("rms", rms, {"part": 0.5}),
    Member("rms", rms, {"part": 0.5, "groups": 2, "axes": "all"}, w=(5, 8)),
    Member("rms", rms, {"gain": "offset", "use_bias": False}),
    Member("rms", rms, {"gain": "log"}),
    Member("rms", rms, {"gain": "scalar"}),
    Member("rms", rms, {"feature_axes": LAST}),
    Member("layer", layer, {"gain": "offset"}, weights=True),
    Member("layer", layer, {"axes": LAST, "feature_axes": LAST}),
    Member("group", group_about_zero, {"groups": 2, "centred": False}, weights=True),
    Member("group", group_about_zero, {"groups": 2, "centred": False}, x=(2, 3, 4, 5), w=(5, 8)),
)

# The value itself; with the activation; measured gains.

IMAGES = {"x": (4, 3, 2, 5), "w": (5, 6)}


def pointwise(p: Problem) -> np.ndarray:
    """h = γ·φ(αa + s) + β: Zhu et al. 2025, equation 1; Chen et al. 2025; Stollenwerk 2025."""
    shift = getattr(p.params, "shift", None)
    u = p.params.alpha * p.a + (0 if shift is None else shift)
    phi = {
        "tanh": np.tanh,
        "erf": np.vectorize(math.erf),
        "isru": lambda u: u / np.sqrt(1 + u**2),
        "hardtanh": lambda u: np.clip(u, -1, 1),
        "softsign": lambda u: u / (1 + abs(u)),
    }
    return p.affine(phi.get(p.options["phi"], np.arctan)(u))


def dyisru(p: Problem) -> np.ndarray:
    """Stollenwerk 2025: √C·x/√(β + x²)."""
    beta, channels = p.params.alpha**-2, p.a.shape[-1]
    return p.affine(math.sqrt(channels) * p.a / np.sqrt(beta + p.a**2))


def named(phi: str) -> Callable[[Problem], np.ndarray]:
    """`pointwise` of a norm that says φ by its name."""
    return lambda p: pointwise(p._replace(options={"phi": phi}))


def moments(p: Problem, axes: tuple[int, ...], groups: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the variance over axes, or over all positions and a group of channels."""
    if not groups:
        return p.a.mean(axes, keepdims=True), p.a.var(axes, keepdims=True)
    split = p.a.reshape(len(p.a), -1, groups, p.a.shape[-1] // groups)
    mean, var = (f((1, 3), keepdims=True) for f in (split.mean, split.var))
    back = (np.broadcast_to(v, split.shape).reshape(p.a.shape) for v in (mean, var))
    mean, var = back
    return mean, var


def sigmoid(u: np.ndarray) -> np.ndarray:
    """1/(1 + e^−u)."""
    return 1 / (1 + np.exp(-u))


def evo_b0(p: Problem) -> np.ndarray:
    """Liu et al. 2020, table 2: x/max(√(s²_{b,w,h} + ε), v₁x + √(s²_{w,h} + ε))·γ + β."""
    batch = moments(p, tuple(range(p.a.ndim - 1)))[1] if p.train else p.state.read()[1]
    instance = moments(p, tuple(range(1, p.a.ndim - 1)))[1]
    eps = p.options.get("eps", 1e-3)
    own = p.params.v * p.a + np.sqrt(instance + eps)
    return p.affine(p.a / np.maximum(np.sqrt(batch + eps), own))


def evo_s(form: int) -> Callable[[Problem], np.ndarray]:
    """Liu et al. 2020, table 2 and appendix: x·σ(v₁x)/√(s²_{w,h,c/g} + ε)·γ + β."""

    def oracle(p: Problem) -> np.ndarray:
        mean, var = moments(p, (), p.options["groups"])
        square = var + mean**2 if form == 2 else var
        v = p.params.v if form == 0 else 1
        sigma = np.sqrt(square + p.options.get("eps", 1e-5))
        return p.affine(p.a * sigmoid(v * p.a) / sigma)

    return oracle


def frn(p: Problem) -> np.ndarray:
    """Singh & Krishnan 2019, equations 1 to 5 and section 3.1: max(γx/√(ν² + ε) + β, τ)."""
    square = (p.a**2).mean(tuple(range(1, p.a.ndim - 1)), keepdims=True)
    learned = 0 if p.params.eps is None else abs(p.params.eps)
    h = p.affine(p.a / np.sqrt(square + p.options.get("eps", 1e-6) + learned))
    return np.maximum(h, p.params.tau)


def grn(p: Problem) -> np.ndarray:
    """Woo et al. 2023, algorithm 1: γ·(x·N(G(x))) + β + x."""
    length = np.sqrt((p.a**2).sum(tuple(range(1, p.a.ndim - 1)), keepdims=True))
    ratio = length / (length.mean(-1, keepdims=True) + p.options.get("eps", 1e-6))
    return p.affine(p.a * ratio) + p.a


def seed(p: Problem) -> np.ndarray:
    """Cai et al. 2026, equation 2: [tanh(x·βᵀ)·α + γ] ⊙ x/RMS(x)."""
    rms = np.sqrt((p.a**2).mean(-1, keepdims=True) + p.options.get("eps", 1e-5))
    gain = 1 if p.params.g is None else p.params.g
    gain = gain + np.tanh(p.a @ p.params.beta)[..., None] * p.params.alpha
    h = gain * p.a / rms
    return h if p.params.b is None else h + p.params.b


KEPT = {"decay": 0.7, "ddof": 1, "population": "ema", "bad_batch": "propagate"}
POINTWISE = (
    Member("pointwise", pointwise, {"phi": "isru", "alpha": 0.7, "shift": 0.2}, weights=True),
    Member("pointwise", pointwise, {"phi": "hardtanh"}, x=(4, 5), weights=True),
    Member("pointwise", pointwise, {"phi": "softsign"}, weights=True),
    Member("pointwise", pointwise, {"phi": jnp.arctan}, weights=True),
    Member("dyt", named("tanh"), weights=True),
    Member("dyt", named("tanh"), {"alpha": 2.0, "use_gain": False}, weights=True),
    Member("derf", named("erf"), weights=True),
    Member("derf", named("erf"), {"alpha": 1.0, "shift": -0.5}, weights=True),
    Member("dyisru", dyisru, weights=True),
    Member("dyisru", dyisru, {"beta": 0.5}, weights=True),
    Member("evo_b0", evo_b0, **IMAGES, weights=True, one=(4, 1, 6)),
    Member("evo_b0", evo_b0, {"batch": KEPT, "eps": 1e-3}, **IMAGES, weights=True),
    Member("evo_b0", evo_b0, {"batch": {"population": "cumulative"}}, **IMAGES, weights=True),
    Member("evo_s0", evo_s(0), {"groups": 2, "eps": 1e-3}, **IMAGES, weights=True, one=(4, 1, 2)),
    Member("evo_s1", evo_s(1), {"groups": 3, "eps": 1e-5}, weights=True, one=(4, 1, 3)),
    Member("evo_s2", evo_s(2), {"groups": 2, "eps": 1e-5}, weights=True, one=(4, 1, 2)),
    Member("frn", frn, **IMAGES, weights=True, one=(4, 1, 6)),
    Member("frn", frn, {"learned_eps": True, "eps": 1e-4}, x=(2, 3, 5), weights=True),
    Member("frn", frn, {"learned_eps": True, "eps": 0.5}, x=(2, 5), weights=True),
    Member("grn", grn, **IMAGES, weights=True),
    Member("grn", grn, {"eps": 1e-3}, x=(4, 5), weights=True),
    Member("seed", seed, weights=True),
    Member("seed", seed, {"alpha": 0.3, "eps": 1e-6, "use_bias": True}, weights=True),
)

# Mixtures and compositions.


def of_batch(p: Problem, a: np.ndarray, state: Any) -> tuple[np.ndarray, np.ndarray]:
    """Those of batch norm: of the batch in training, else of the population."""
    if p.train:
        return mean_and_var(a, tuple(range(a.ndim - 1)))
    return state.mean, state.var


def softmax(v: np.ndarray) -> np.ndarray:
    """e^v / Σ e^v."""
    return np.exp(v) / np.exp(v).sum()


def switchable(p: Problem) -> np.ndarray:
    """Luo et al. 2019, equation 3."""
    a, of = p.a, p.options.get("of", ("instance", "layer", "batch"))
    found = {
        "layer": mean_and_var(a, tuple(range(1, a.ndim))),
        "batch": of_batch(p, a, p.state[-1]),
    }
    found["instance"] = mean_and_var(a, tuple(range(1, a.ndim - 1)))
    shift, scale = map(softmax, p.params.weights)
    mu = sum(w * found[name][0] for w, name in zip(shift, of, strict=True))
    var = sum(w * found[name][1] for w, name in zip(scale, of, strict=True))
    return p.affine((a - mu) / np.sqrt(var + 1e-5))


def batch_instance(p: Problem) -> np.ndarray:
    """Nam & Kim 2018, equation 3."""
    (m, v), rho = of_batch(p, p.a, p.state[0]), p.params.weights.rho
    mu, var = mean_and_var(p.a, tuple(range(1, p.a.ndim - 1)))
    eps = p.options.get("eps", 1e-5)
    both = rho * (p.a - m) / np.sqrt(v + eps) + (1 - rho) * (p.a - mu) / np.sqrt(var + eps)
    return p.affine(both)


def ibn(p: Problem) -> np.ndarray:
    """Pan et al. 2018, figure 3a."""
    first = int(p.options.get("ratio", 0.5) * p.a.shape[-1])
    left, right = p.a[..., :first], p.a[..., first:]
    found = [mean_and_var(left, tuple(range(1, p.a.ndim - 1))), of_batch(p, right, p.state[1])]
    parts = [
        own.g * (a - mu) / np.sqrt(var + 1e-5) + own.b
        for a, (mu, var), own in zip((left, right), found, p.params, strict=True)
    ]
    return np.concatenate(parts, -1)


def batch_channel(p: Problem) -> np.ndarray:
    """Qiao et al. 2019, algorithm 1."""
    mu, var = of_batch(p, p.a, p.state[0])
    h = p.params[0].g * (p.a - mu) / np.sqrt(var + 1e-5) + p.params[0].b
    cut = h.reshape(len(h), -1, p.options["groups"], h.shape[-1] // p.options["groups"])
    mu, var = mean_and_var(cut, (1, 3))
    h = ((cut - mu) / np.sqrt(var + 1e-5)).reshape(h.shape)
    return p.params[1].g * h + p.params[1].b


def mean_only(p: Problem) -> np.ndarray:
    """Salimans & Kingma 2016, equation 15."""
    return p.affine(p.a - of_batch(p, p.a, p.state[0])[0])


def weight_mean_only(p: Problem) -> np.ndarray:
    """The same, of t = w·x/‖w‖."""
    return p.affine((p.a - of_batch(p, p.a, p.state[0])[0]) / np.sqrt((p.w**2).sum(0)))


def extended_batch(p: Problem) -> np.ndarray:
    """Luo et al. 2020: the mean by channel, one variance."""
    mu, var = of_batch(p, p.a, p.state[0])
    whole = np.mean(var) + (np.var(mu) if p.options.get("about") == "all" else 0)
    return p.affine((p.a - mu) / np.sqrt(whole + 1e-5))


def of_domain(p: Problem, domain: int = 0) -> np.ndarray:
    """Ioffe & Szegedy 2015, algorithm 1, of a batch of one domain."""
    inner = jax.tree.map(lambda v: v[domain], p.state.inner)
    mu, var = of_batch(p, p.a, inner)
    return (p.a - mu) / np.sqrt(var + 1e-5)


def auxiliary(p: Problem) -> np.ndarray:
    """Xie et al. 2020, section 4.1: everything by domain."""
    return p.params.g[0] * of_domain(p) + p.params.b[0]


def transferable(p: Problem) -> np.ndarray:
    """Wang et al. 2019, equations 5 and 6; from the population, in which this batch is."""
    mean, var = np.array(p.state.inner.mean), np.array(p.state.inner.var)
    if p.train:  # the first batch
        a = p.at.a
        mean[0], var[0] = a.mean(tuple(range(a.ndim - 1))), a.var(tuple(range(a.ndim - 1)))
    ratio = mean / np.sqrt(var + 1e-5)
    near = 1 / (1 + np.abs(ratio[0] - ratio[1]))
    return (1 + near / near.mean()) * p.affine(of_domain(p))


def recurrent(p: Problem) -> np.ndarray:
    """Cooijmans et al. 2016, equation 4, at the first step."""
    return p.affine(of_domain(p))


_MIXED: dict[str, Any] = {"weights": True}
MIXTURES = (
    Member("switchable", switchable, **_MIXED),
    Member("switchable", switchable, {"of": ("layer", "batch")}, x=(7, 5), **_MIXED),
    Member("switchable", switchable, {"eps": 1e-5, "batch": {"decay": 0.5}}, **_MIXED),
    Member("batch_instance", batch_instance, **_MIXED),
    Member(
        "batch_instance", batch_instance, {"eps": 0.1, "batch": {"population": "ema"}}, **_MIXED
    ),
    Member("ibn", ibn, **_MIXED),
    Member(
        "ibn", ibn, {"ratio": 0.34, "eps": 1e-5, "batch": {"ddof": 0}}, x=(3, 4, 2, 5), **_MIXED
    ),
    Member("batch_channel", batch_channel, {"groups": 2}, **_MIXED),
    Member("batch_channel", batch_channel, {"groups": 3, "eps": 1e-5, "batch": {}}, **_MIXED),
    Member("mean_only_batch", mean_only, folds=True, **_MIXED),
    Member("mean_only_batch", mean_only, {"batch": {"decay": 0.5}, "use_gain": True}, x=(5, 5)),
    Member("weight_mean_only_batch", weight_mean_only, folds=True, **_MIXED),
    Member("weight_mean_only_batch", weight_mean_only, {"batch": {"decay": 0.5}}),
    Member("extended_batch", extended_batch, folds=True, **_MIXED),
    Member("extended_batch", extended_batch, {"about": "all", "eps": 1e-5, "batch": {}}),
    Member("auxiliary_batch", auxiliary, folds=True, **_MIXED),
    Member("auxiliary_batch", auxiliary, {"domains": 3, "eps": 1e-5, "batch": {}}),
    Member("transferable_batch", transferable, folds=True, **_MIXED),
    Member("transferable_batch", transferable, {"eps": 1e-5, "batch": {}}),
    Member("auxiliary_batch", auxiliary, {"examples": 4}),
    Member("transferable_batch", transferable, {"examples": 4}),
    Member("recurrent_batch", recurrent, {"steps": 2}, folds=True, **_MIXED),
    Member("recurrent_batch", recurrent, {"steps": 2, "g": 0.2, "eps": 1e-5, "batch": {}}),
)

# Windows and segments.

WINDOWS = ()

# Maps of the weights.


def _unit(y: np.ndarray, old: np.ndarray) -> np.ndarray:
    return y / np.linalg.norm(y) if y.any() else old


def spectral(p: Problem, linear: Any = None) -> np.ndarray:
    """Miyato et al. 2018, algorithm 1; of a map as the matrix that it is on one example."""

    def matrix(w: np.ndarray) -> np.ndarray:
        if linear is None:
            return w.reshape(-1, w.shape[-1])
        inputs = np.eye(p.x[0].size).reshape(-1, *p.x.shape[1:])
        return oracles.preactivation(inputs, w, linear).reshape(len(inputs), -1)

    w = matrix(p.at.w)
    u, v = p.state.u.ravel(), p.state.v.ravel()
    for _ in range(p.options.get("steps", 1) if p.train else 0):
        if p.options.get("first") == "u":
            u = _unit(v @ w, u)
        v = _unit(w @ u, v)
        if p.options.get("first") != "u":
            u = _unit(v @ w, u)
    sigma = v @ (matrix(p.w) if p.options.get("through", True) else w) @ u
    bound = p.options.get("bound")
    return p.affine(p.a / (sigma if bound is None else np.maximum(1, sigma / bound)))


def centred_weight(p: Problem) -> np.ndarray:
    """x·(w − w̄), behind a dense layer."""
    return p.affine(p.x @ (p.w - p.w.mean(0)))


STRIDED = nl.Conv(strides=(2, 1), padding=((1, 1), (0, 1)), dilation=(1, 2), groups=2)
MAPS = (
    Member("spectral", spectral, folds=True, weights=True),
    Member("spectral", spectral, {"bound": 0.5, "steps": 3, "warm": 0, "first": "u"}),
    Member("spectral", spectral, {"bound": 50.0, "use_gain": True}),
    Member(
        "spectral", spectral, {"through": False, "warm": 4}, (2, 4, 5, 3), (3, 2, 3, 4), nl.Conv()
    ),
    Member(
        "spectral",
        functools.partial(spectral, linear=STRIDED),
        {"of": "map"},
        (2, 4, 5, 4),
        (3, 2, 2, 6),
        STRIDED,
    ),
    Member("centred_weight", centred_weight, folds=True, weights=True),
    Member("centred_weight", centred_weight, {"use_gain": True}),
)

# Whitening.

WHITENING = ()

MEMBERS: tuple[Member, ...] = (*LENGTHS, *GAINS, *POINTWISE, *MIXTURES, *WINDOWS, *MAPS, *WHITENING)
