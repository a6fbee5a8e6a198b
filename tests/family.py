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

WHITENING = ()

MEMBERS: tuple[Member, ...] = (*LENGTHS, *POINTWISE, *MIXTURES, *WINDOWS, *MAPS, *WHITENING)
