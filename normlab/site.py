"""The nouns of the library: small, immutable pytrees and one protocol.

Shapes are written with `N` examples, `C` channels and `...` for anything in between.
A kernel `w` always carries its output channels last: `[..., K, C]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from normlab._arguments import KINDS, Kind, anything, array, checked, declare, real
from normlab._trees import node
from normlab.equation import Parts, affine
from normlab.linear import Dense, Linear

Params = Any
"""Any pytree of arrays that an optimizer may change."""

State = Any
"""Any pytree of arrays that training updates outside the optimizer; `()` for a stateless norm."""


@node
class Affine(NamedTuple):
    """The learned half of a norm; either field may be `None`, which stands for 1 and 0.

    Attributes:
      g: `[C]`, the rescale (the papers' gain γ).
      b: `[C]`, the reshift (the papers' bias β).
    """

    g: Array | None
    b: Array | None


@checked("init_affine", g=real)
def init_affine(
    channels: int,
    *,
    use_gain: bool = True,
    use_bias: bool = True,
    g: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Affine:
    """Returns `Affine(g, b)` with every gain equal to `g` and every bias zero.

    Args:
      channels: `C`, the number of channels.
      rescale: Whether there is a gain; without one the field is `None`.
      reshift: Whether there is a bias; without one the field is `None`.
      g: The initial gain, a number.
      dtype: A floating type for both.

    >>> init_affine(2).g.tolist()
    [1.0, 1.0]
    """
    return Affine(
        g=jnp.full(channels, g, dtype) if use_gain else None,
        b=jnp.zeros(channels, dtype) if use_bias else None,
    )


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
    """

    a: Array
    x: Array | None = None
    w: Array | None = None
    weights: Array | None = None
    linear: Linear = Dense()

    @property
    def channels(self) -> int:
        """`C`."""
        return self.a.shape[self.linear.channel_axis]


def _site(abstract: bool) -> Kind:
    any_rank, some_rank = (array(rank=rank, abstract=abstract) for rank in (0, 1))

    def read(site: Any) -> Site:
        if not isinstance(site, Site):
            raise TypeError
        KINDS["linear"].read(site.linear)
        some_rank.read(site.a)
        for v, kind in ((site.x, any_rank), (site.w, some_rank), (site.weights, any_rank)):
            if v is not None:
                kind.read(v)
        return site

    some: Any = np.ones((2, 2))
    wrong = (None, "x", 1, True, [1.0], {}, Site, Site(some[0, 0]))
    wrong = (*wrong, Site(some)._replace(linear=Dense), Site(some)._replace(a=[1.0]))
    return Kind(
        "a Site of " + ("shapes" if abstract else "arrays"),
        "make it of the layer: Site(a=linear(x, w), x=x, w=w, linear=linear)",
        read,
        wrong,
    )


SHAPES = _site(abstract=True)
declare(site=_site(abstract=False))


@checked("shapes", x=array(rank=1, abstract=True), w=array(rank=2, abstract=True))
def shapes(x: Any, w: Any, *, linear: Linear = Dense(), weights: Any = None) -> Site:  # noqa: B008
    """Returns the `Site` of `linear(x, w)` with `jax.ShapeDtypeStruct`s in place of arrays.

    This is what `Norm.init` wants: nothing is computed, and the arrays may be abstract themselves.

    Args:
      x: The layer's input.
      w: `[..., K, C]`, its kernel.
      linear: The linear map.
      weights: The weights of the examples, if any.

    >>> shapes(jnp.ones((8, 3)), jnp.ones((3, 5))).a.shape
    (8, 5)
    """
    return jax.eval_shape(
        lambda x, w, weights: Site(linear(x, w), x, w, weights, linear), x, w, weights
    )


class Init(Protocol):
    """The first half of a norm."""

    def __call__(self, site: Site) -> tuple[Params, State]:
        """Returns the initial `(params, state)` for `site`, of which it needs only the shapes."""
        ...


class Measure(Protocol):
    """The second half of a norm: where μ and σ are measured."""

    def __call__(
        self, params: Params, state: State, site: Site, *, train: bool
    ) -> tuple[Parts, State]:
        """Returns the four parts for `site` and the next state.

        The state keeps its structure, shapes and dtypes. With `train=False` it is returned as it
        came.
        """
        ...


class Norm(NamedTuple):
    """A normalization: a pair of pure functions, the same for every norm.

    Any norm can stand in for any other: `parts` returns shift, scale, rescale and reshift, and
    what is done with them is always `affine`.

    Attributes:
      init: `site -> (params, state)`.
      parts: `(params, state, site, train=...) -> (Parts, state)`.

    >>> from normlab import get
    >>> norm = get("layer")
    >>> site = Site(a=jnp.array([[1.0, 3.0]]))
    >>> params, state = norm.init(site)
    >>> h, state = norm.apply(params, state, site, train=True)
    >>> h.round(3).tolist()
    [[-1.0, 1.0]]
    """

    init: Init
    parts: Measure

    @checked("norm", params=anything, state=anything)
    def apply(
        self, params: Params, state: State, site: Site, *, train: bool
    ) -> tuple[Array, State]:
        """Returns `(affine(parts, site.a), state)`."""
        parts, state = self.parts(params, state, site, train=train)
        channel_axis = site.linear.channel_axis
        return affine(parts, site.a, weights=site.weights, channel_axis=channel_axis), state
