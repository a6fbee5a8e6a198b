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
    Member("scale", scale, weights=True),
    Member("scale", scale, {"gain": "plain", "use_bias": True, "eps": 1e-5}, weights=True),
    Member("scale", scale, {"use_gain": False}, weights=True),
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
    return p.affine(p.a - of_batch(p, p.a, p.state)[0])


def weight_mean_only(p: Problem) -> np.ndarray:
    """The same, of t = w·x/‖w‖."""
    return p.affine((p.a - of_batch(p, p.a, p.state[0])[0]) / np.sqrt((p.w**2).sum(0)))


def extended_batch(p: Problem) -> np.ndarray:
    """Luo et al. 2020: the mean by channel, one variance."""
    mu, var = of_batch(p, p.a, p.state)
    whole = np.mean(var) + (np.var(mu) if p.options.get("about") == "all" else 0)
    return p.affine((p.a - mu) / np.sqrt(whole + 1e-5))


def lp_batch(p: Problem) -> np.ndarray:
    """Hoffer et al. 2018, section 4: L1, L∞ and top k."""
    first, second = p.state
    mu = of_batch(p, p.a, first)[0]
    away, n = np.abs(p.a - mu), p.a[..., 0].size
    if p.options.get("spread", "l1") == "l1":
        c = np.sqrt(np.pi / 2)
        s = c * of_batch(p, away, second)[0] if p.train else c * second.mean + 1
    else:
        k = 1 if p.options["spread"] == "max" else p.options.get("k", 10)
        top = np.sort(away.reshape(n, -1), 0)[-k:].mean(0)
        c = 0.5 * (1 + np.sqrt(np.pi * np.log(4))) / np.sqrt(2 * np.log(n))
        s = c * top if p.train else second.mean + 1
    return p.affine((p.a - mu) / np.sqrt(s**2 + p.options.get("eps", 1e-5)))


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


def batch_rms(p: Problem) -> np.ndarray:
    """Shen et al. 2020, section 4.1."""
    square = (p.a**2).mean(tuple(range(p.a.ndim - 1))) if p.train else p.state.inner.var
    return p.affine(p.a / np.sqrt(square + p.options.get("eps", 1e-5)))


def cross_iteration(p: Problem) -> np.ndarray:
    """Yao et al. 2021 on the first batch; tests/test_adaptive.py has the others."""
    mu, var = of_batch(p, p.a, p.state.inner)
    return p.affine((p.a - mu) / np.sqrt(var + p.options.get("eps", 1e-5)))


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
    Member("batch_rms", batch_rms, folds=True, one=(1, 6), **_MIXED),
    Member("batch_rms", batch_rms, {"eps": 0.1, "batch": {"decay": 0.5}}, **_MIXED),
    Member("cross_iteration", cross_iteration, folds=True, **_MIXED),
    Member(
        "cross_iteration",
        cross_iteration,
        {"size": 2, "eps": 0.1, "batch": {"decay": 0.5}},
        x=(3, 5, 4, 4),
        w=(3, 2, 4, 6),
        linear=nl.Conv(),
    ),
    Member("extended_batch", extended_batch, {"about": "all", "eps": 1e-5, "batch": {}}),
    Member("lp_batch", lp_batch, folds=True, **_MIXED),
    Member("lp_batch", lp_batch, {"spread": "max", "eps": 0.1, "batch": {}}, (5, 4, 5), one=(1, 4)),
    Member("lp_batch", lp_batch, {"spread": "top", "k": 3}, one=(1, 4)),
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


def windows(p: Problem, sizes: dict[int, int], about: Any, counts: str = "values") -> tuple:
    """The mean of every window, and that of its squares about it, 0 or each value's window's."""

    def means(values: np.ndarray) -> np.ndarray:
        out = np.empty(p.a.shape)
        for i in np.ndindex(p.a.shape):
            at = [
                slice(max(0, i[k] - n // 2), i[k] + (n - 1) // 2 + 1)
                for k, n in ((k, sizes.get(k, 1)) for k in range(p.a.ndim))
            ]
            window = values[i] if values.ndim > p.a.ndim else values
            window = window[tuple(at)]
            out[i] = window.sum() / (
                math.prod(sizes.values()) if counts == "window" else window.size
            )
        return out

    if about is False:
        return np.zeros(()), means(p.a**2)
    mean = means(p.a)
    if about == "each":
        return mean, means((p.a - mean) ** 2)
    return mean, means((p.a - mean.reshape(*p.a.shape, *[1] * p.a.ndim)) ** 2)


def local(p: Problem) -> np.ndarray:
    """(a − μ)/(k + ε + α·var)^power of the window about each value, by loops."""
    o, rank = p.options, p.a.ndim
    each = o.get("window", 3)
    each = (each,) * (rank - 2) if isinstance(each, int) else each
    sizes = dict(zip(range(1, rank - 1), each, strict=True))
    sizes |= {rank - 1: o["channel_window"]} if "channel_window" in o else {}
    sizes |= {rank - 1: 99} if o.get("groups") == 1 else {}
    mean, square = windows(p, sizes, o.get("centred", True), o.get("counts", "values"))
    scale = o.get("k", 0.0) + o.get("eps", 1e-5) + o.get("alpha", 1.0) * square
    return p.affine((p.a - mean) / scale ** o.get("power", 0.5))


def local_response(p: Problem) -> np.ndarray:
    """Krizhevsky et al. 2012, section 3.3: a/(k + α/n·Σ a²)^β."""
    defaults = {"channel_window": 5, "alpha": 5e-4, "k": 2.0, "power": 0.75, "counts": "window"}
    eps = {"eps": 0.0, "centred": False, "window": 1}
    return local(p._replace(options=defaults | eps | p.options))


def divisive(p: Problem) -> np.ndarray:
    """Ren et al. 2017, equations 5 to 7: v/√(σ² + mean v²)."""
    options = {"window": 5, "k": 1.0, "groups": 1, "centred": "each", "eps": 0.0} | p.options
    options["window"] = options["window"] or 1
    return local(p._replace(options=options))


def local_context(p: Problem) -> np.ndarray:
    """Ortiz et al. 2020, equations 1 to 4, of every block of channels apart."""
    size, window = p.options["group_size"], p.options.get("window", 227)
    options = {"window": window, "groups": 1, "eps": p.options.get("eps", 1e-5)}
    bare = nl.Affine(None, None)
    blocks = np.split(p.a, p.a.shape[-1] // size, -1)
    z = [local(p._replace(a=v, options=options, params=bare)) for v in blocks]
    return p.affine(np.concatenate(z, -1))


def segment(p: Problem) -> np.ndarray:
    """Instance norm; or layer norm of an example."""
    axes = tuple(range(1, p.a.ndim - (not p.options.get("channels_too", False))))
    mu, var = mean_and_var(p.a, axes)
    return p.affine((p.a - mu) / np.sqrt(var + p.options.get("eps", 1e-5)))


def graph(p: Problem) -> np.ndarray:
    """Cai et al. 2021, equation 6: γ(a − αμ)/σ̂ + β, σ̂² the mean of (a − αμ)²."""
    axes = tuple(range(1, p.a.ndim - 1))
    d = p.a - p.params.alpha * p.a.mean(axes, keepdims=True)
    square = (d**2).mean(axes, keepdims=True)
    return p.affine(d / np.sqrt(square + p.options.get("eps", 1e-5)))


def pair_of_nodes(p: Problem) -> np.ndarray:
    """Zhao & Akoglu 2020, equations 10 and 11: s·x̃/√(mean ‖x̃‖²)."""
    axes = tuple(range(1, p.a.ndim - 1))
    d = p.a - p.a.mean(axes, keepdims=True)
    square = (d**2).sum(-1, keepdims=True)
    square = square if p.options.get("individually") else square.mean(axes, keepdims=True)
    return p.affine(d / np.sqrt(square + p.options.get("eps", 1e-5)))


AROUND = {"window": (3, 2), "channel_window": 4, "eps": 1e-3}
WINDOWS = (
    Member("local", local, {"window": 3, "eps": 1e-2}, weights=True, one=(4, 1, 6)),
    Member("local", local, {"window": 2, "centred": "each", "k": 0.1}, weights=True),
    Member("local", local, {"window": 99, "groups": 1}),
    Member("local", local, AROUND, **IMAGES),
    Member(
        "local",
        local,
        {"channel_window": 3, "centred": False, "power": 0.75, "alpha": 0.5, "counts": "window"},
        x=(4, 5),
    ),
    Member("local_response", local_response, {"use_gain": True, "use_bias": True}, weights=True),
    Member("local_response", local_response),
    Member(
        "local_response",
        local_response,
        {"channel_window": 4, "alpha": 0.5, "k": 1.0, "power": 0.5, "counts": "values"},
    ),
    Member("divisive", divisive, weights=True),
    Member("divisive", divisive, {"window": None, "k": 0.5}, x=(4, 5)),
    Member("local_context", local_context, {"group_size": 3, "window": 3}, weights=True),
    Member("local_context", local_context, {"group_size": 2, "eps": 1e-3}, **IMAGES),
    Member("segment", segment, {"eps": 1e-4, "num_segments": 3}, weights=True, one=(4, 1, 6)),
    Member("segment", segment, {"channels_too": True}, x=(4, 5)),
    Member("graph", graph, weights=True, one=(4, 1, 6)),
    Member("graph", graph, {"alpha": 0.3, "eps": 1e-3, "num_segments": 3}, **IMAGES),
    Member("pair", pair_of_nodes, weights=True, one=(4, 1, 6)),
    Member("pair", pair_of_nodes, {"individually": True, "eps": 1e-3, "num_segments": 3}),
)

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


def _inverse_root(cov: np.ndarray, options: dict[str, Any], default: str) -> np.ndarray:
    """W of Σ for a whitener: Kessy, Lewin & Strimmer 2018; Newton's iteration as published."""
    size, whitener = len(cov), options.get("whitener", default)
    eps = options.get("eps", 1e-3 if default == "cholesky" else 1e-5)
    cov = cov + eps * np.eye(size) * (np.trace(cov) / size if options.get("relative") else 1)
    if whitener == "cholesky":
        return np.linalg.inv(np.linalg.cholesky(cov))
    if whitener == "newton":
        p, s = np.eye(size), cov / np.trace(cov)
        for _ in range(options.get("steps", 5)):
            p = (3 * p - p @ p @ p @ s) / 2
        return p / np.sqrt(np.trace(cov))
    variances, axes = np.linalg.eigh(cov)
    if whitener == "zca":
        return axes / np.sqrt(variances) @ axes.T
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(size)])
    return (axes / np.sqrt(variances)).T[::-1]


def _covariances(a: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """μ `[C]` and Σ `[G, D, D]` over all but the last axis."""
    rows = a.reshape(-1, a.shape[-1])
    split = np.split(rows - rows.mean(0), groups, -1)
    return rows.mean(0), np.stack([v.T @ v / len(v) for v in split])


def _whitened(a: np.ndarray, mu: np.ndarray, ws: list[np.ndarray]) -> np.ndarray:
    parts = np.split(a - mu, len(ws), -1)
    return np.concatenate([v @ w.T for v, w in zip(parts, ws, strict=True)], -1)


def _groups(p: Problem) -> int:
    size = p.options.get("group_size", 16)
    return p.options.get("groups") or -(-p.a.shape[-1] // size)


def _of_batch(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    frozen = p.options.get("population") == "frozen"
    if not frozen and (p.train or not p.state):
        return _covariances(p.a, _groups(p))
    if frozen or hasattr(p.state, "var"):
        kept = p.state.inner if frozen else p.state
        return kept.mean, kept.var
    assert p.options["estimator"] == "within"
    lost = p.options["ddof"] * p.state.updates
    return p.state.mean, p.state.within / (p.state.count[0] - lost)


def whitening(p: Problem) -> np.ndarray:
    """Huang et al. 2018, Siarohin et al. 2019, Huang et al. 2019."""
    mu, covs = _of_batch(p)
    ws = [_inverse_root(cov, p.options, "cholesky") for cov in covs]
    return p.affine(_whitened(p.a, mu, ws))


def group_whitening(p: Problem) -> np.ndarray:
    """Huang et al. 2021: each example's groups, as `[groups, values]`."""
    out = []
    for a in p.a:
        rows = a.T.reshape(p.options["groups"], -1)
        rows = rows - rows.mean(1, keepdims=True)
        w = _inverse_root(rows @ rows.T / rows.shape[1], p.options, "newton")
        out.append((w @ rows).reshape(a.T.shape).T)
    return p.affine(np.stack(out))


def switchable_whitening(p: Problem) -> np.ndarray:
    """Pan et al. 2019, equations 4 and 5."""
    of, groups = p.options.get("of", ("bw", "iw")), _groups(p)
    shift, scale = (np.exp(v) / np.exp(v).sum() for v in (p.params.of_mean, p.params.of_covariance))
    eye = np.eye(p.a.shape[-1] // groups)
    out = []
    for a in p.a:
        found = {"bw": _of_batch(p), "iw": _covariances(a, groups)}
        found["ln"] = np.full(a.shape[-1], a.mean()), np.stack([a.var() * eye] * groups)
        for whole, alone in (("bw", "bn"), ("iw", "in")):
            found[alone] = found[whole][0], found[whole][1] * eye
        mu, covs = (
            sum(w * found[name][i] for name, w in zip(of, weights, strict=True))
            for i, weights in enumerate((shift, scale))
        )
        ws = [_inverse_root(cov, p.options, "newton") for cov in covs]
        out.append(_whitened(a, mu, ws))
    return p.affine(np.stack(out))


_ACROSS: dict[str, Any] = {"x": (4, 6, 7), "w": (7, 6), "weights": True}
_KEPT = {"population": "cumulative", "estimator": "within", "ddof": 1, "state_gradient": True}
WHITENING = (
    Member("whitening", whitening, folds=True, one=(6, 6), slack=30, **_ACROSS),
    Member("whitening", whitening, {"whitener": "zca", "group_size": 3}, slack=30, **_ACROSS),
    Member("whitening", whitening, {"whitener": "pca", "groups": 2}, slack=30, **_ACROSS),
    Member("whitening", whitening, {"whitener": "newton", "steps": 7, "relative": True}, **_ACROSS),
    Member(
        "whitening",
        whitening,
        {"eps": 1e-2, "bad_batch": "raise", "groups": 3, **_KEPT},
        slack=30,
        **_ACROSS,
    ),
    Member("whitening", whitening, {"population": "frozen", "decay": 0.5}, **_ACROSS),
    Member("group_whitening", group_whitening, {"groups": 3}, weights=True, one=(4, 6), slack=10),
    Member(
        "group_whitening",
        group_whitening,
        {"groups": 2, "whitener": "zca", "steps": 3, "eps": 1e-2, "relative": True},
        slack=10,
    ),
    Member("switchable_whitening", switchable_whitening, one=(8, 6), slack=10, **_ACROSS),
    Member(
        "switchable_whitening",
        switchable_whitening,
        {"of": ("bw", "iw", "bn", "in", "ln"), "whitener": "zca", "group_size": 3, "eps": 1e-3},
        slack=10,
        **_ACROSS,
    ),
    Member(
        "switchable_whitening",
        switchable_whitening,
        {"of": ("bn", "ln"), "groups": 2, "steps": 6, "relative": True, "bad_batch": "raise"}
        | _KEPT,
        slack=10,
        **_ACROSS,
    ),
    Member("switchable_whitening", switchable_whitening, {"of": ("iw",), "decay": 0.5}, **_ACROSS),
)

MEMBERS: tuple[Member, ...] = (*LENGTHS, *GAINS, *POINTWISE, *MIXTURES, *WINDOWS, *MAPS, *WHITENING)
