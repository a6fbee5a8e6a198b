"""The nouns of the library: small, immutable pytrees and one protocol.

Shapes are written with `N` examples, `C` channels and `...` for anything in between.
A kernel `w` always carries its output channels last: `[..., K, C]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import anything, array, checked, declare, site_kind
from normlab._checks import one_array
from normlab._trees import node
from normlab.equation import Parts, affine
from normlab.linear import Dense, Linear

Params = Any
"""What an optimizer may change: any pytree of arrays; `Affine` in the norms of the library."""

State = Any
"""Any pytree of arrays that training updates outside the optimizer; `()` for a stateless norm."""

S = TypeVar("S")


@node
class Site(NamedTuple):
    """Everything a norm may look at in one layer. Also used, with abstract arrays, for shapes.

    Attributes:
      a: `[N, ..., C]`, the pre-activation, `linear(x, w)`, without a bias.
      x: The layer's input; only norms that look at `x` need it.
      w: `[..., K, C]`, the layer's kernel; only norms that look at `w` need it.
      weights: Importance of the examples (or of the positions), aligned with the leading axes of
        `a` other than the channels'; zero leaves an example out of the statistics. `None` weighs
        all the same.
      linear: The linear map; its `channel_axis` says where `a` has its channels.
      segments: `[N]` integers, or one for each position: which of them are one graph, set or packed
        sequence. Only the norms of segments look at it (`normlab.family.segments`).

    >>> import jax.numpy as jnp
    >>> Site(jnp.ones((8, 5))).channels
    5
    """

    a: Array
    x: Array | None = None
    w: Array | None = None
    weights: Array | None = None
    linear: Linear = Dense()
    segments: Array | None = None

    @property
    def channels(self) -> int:
        """`C`."""
        return self.a.shape[self.linear.channel_axis]


SHAPES = site_kind(Site, abstract=True)
declare(site=site_kind(Site, abstract=False))


@checked("shapes", x=array(rank=1, abstract=True), w=array(rank=2, abstract=True))
def shapes(x: Any, w: Any, *, linear: Linear = Dense(), weights: Any = None) -> Site:  # noqa: B008
    """Returns the `Site` of `linear(x, w)` with `jax.ShapeDtypeStruct`s in place of arrays.

    This is what `Norm.init` wants: nothing is computed, and the arrays may be abstract themselves.

    Args:
      x: The layer's input.
      w: `[..., K, C]`, its kernel.
      linear: The linear map.
      weights: The weights of the examples, if any.

    >>> import jax.numpy as jnp
    >>> shapes(jnp.ones((8, 3)), jnp.ones((3, 5))).a.shape
    (8, 5)
    """
    return jax.eval_shape(
        lambda x, w, weights: Site(linear(x, w), x, w, weights, linear), x, w, weights
    )


Init = Callable[[Site], tuple[Params, State]]
"""The first half of a norm: `site -> (params, state)`, of which the shapes suffice."""


class Measure(Protocol):
    """The second half of a norm: where μ and σ are measured.

    The next state keeps its structure, shapes and types. With `train=False` it is returned as it
    came.
    """

    def __call__(
        self, params: Params, state: State, site: Site, *, train: bool
    ) -> tuple[Parts, State]: ...


@dataclass(frozen=True, eq=False, repr=False)
class Norm:
    """A normalization: a pair of pure functions, the same for every norm.

    Any norm can stand in for any other: `parts` returns μ, σ, g and b, and what is done with them
    is always `affine`. What `get` returned is equal to, and hashes as, what it returns for the same
    name and options, so that it may be a static argument of `jit`.

    Attributes:
      init: `site -> (params, state)`.
      parts: `(params, state, site, train=...) -> (Parts, state)`.
      fused: Whether the activation is part of it, so that a model applies none after it.
      made: How `get` made it: the name and the options that were given; `None` for a norm of
        one's own, which is equal to one of the same two functions.

    >>> import jax.numpy as jnp
    >>> from normlab import get
    >>> norm = get("layer", eps=1e-6)
    >>> norm, norm == get("layer", eps=1e-6)
    (get('layer', eps=1e-06), True)
    >>> site = Site(a=jnp.array([[1.0, 3.0]]))
    >>> params, state = norm.init(site)
    >>> h, state = norm.apply(params, state, site, train=True)
    >>> h.round(3).tolist()
    [[-1.0, 1.0]]
    """

    init: Init
    parts: Measure
    fused: bool = False
    made: Made | None = field(default=None, init=False)

    def known_as(self, made: Made | None, *, fused: bool = False) -> Norm:
        """The same norm, as `get` made it, of a row that is fused or not."""
        norm = replace(self, fused=self.fused or fused)
        object.__setattr__(norm, "made", made)
        return norm

    @checked("norm", params=anything, state=anything)
    def apply(
        self,
        params: Params,
        state: S,
        site: Site,
        *,
        train: bool,
        residual: ArrayLike | None = None,
        activation: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, S]:
        """Returns `(affine(parts, site.a, residual=..., activation=...), state)`."""
        site = site._replace(a=one_array(site.a)) if isinstance(site, Site) else site
        parts, state = self.parts(params, state, site, train=train)
        how: Any = {"weights": site.weights, "channel_axis": site.linear.channel_axis}
        how |= {"residual": residual, "activation": activation}
        return affine(parts, site.a, **how), state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Norm) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        if self.made is None:
            more = ", fused=True" if self.fused else ""
            return f"{type(self).__name__}({self.init!r}, {self.parts!r}{more})"
        options = (f"{name}={value!r}" for name, value in self.made.options)
        return f"get({', '.join([repr(self.made.name), *options])})"

    def _key(self) -> Any:
        return (self.init, self.parts, self.fused) if self.made is None else self.made


class Made(NamedTuple):
    """How a norm was made: by its name, or `"module:factory"`; options in the order of names."""

    name: str
    factory: Any
    options: tuple[tuple[str, Any], ...]
