"""The family: one table of norms, of which `tests/test_family.py` tests every law on every row.

A member is a norm with its options, the shapes it is tried on, and its oracle: h in NumPy float64,
from the definition, sharing no code with the library. A norm of the registry that has no case in
`tests/cases.py` has a member here, and every option is some member's: a test says so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import normlab as nl
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
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

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


# Lengths.


def scale(p: Problem) -> np.ndarray:
    """Nguyen & Salazar 2019, section 3.2: g·x/‖x‖."""
    return p.affine(p.a / np.maximum(np.sqrt((p.a**2).sum(-1, keepdims=True)), 1e-5))


LENGTHS = (
    Member("scale", scale),
    Member("scale", scale, {"gain": "plain", "use_bias": True, "eps": 1e-5}),
    Member("scale", scale, {"use_gain": False}),
)

# The value itself; with the activation; measured gains.

POINTWISE = ()

# Mixtures and compositions.

MIXTURES = ()

# Windows and segments.

WINDOWS = ()

# Maps of the weights.

MAPS = ()

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

MEMBERS: tuple[Member, ...] = (*LENGTHS, *POINTWISE, *MIXTURES, *WINDOWS, *MAPS, *WHITENING)
