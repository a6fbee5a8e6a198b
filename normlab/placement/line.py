"""Where a norm stands: one line for every residual connection, as the equation is for every norm.

    x' = S(α·x + β·O(F(s·I(x))))

F is the branch, attention or an MLP, say. I, O and S are norms, or nothing; α and β are numbers or
learned. `Placement` holds them, `residual` applies them; with several streams in the place of x it
is a `Connection` of another kind (`streams.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import (
    a_function,
    array,
    checked,
    either,
    flag,
    instance,
    integer,
    is_array,
    number,
    one_of,
    real,
)
from normlab._checks import (
    floating,
    gain_and_bias,
    normalize_axes,
    promote,
    promote_dtype,
    result_dtype,
)
from normlab._trees import leaves, node, static
from normlab.equation import Affine
from normlab.errors import invalid
from normlab.linear import Conv, Dense
from normlab.site import Norm, Site

Per = Literal["scalar", "channel"]
"""Whether a learned gain is one number or one for each channel."""


FACTOR = number(
    "a finite number that is not 0",
    "leave it out for 1",
    lambda v: v != 0 and math.isfinite(v),
    static=True,
)


@static
@checked("Learned", init=real, per=one_of(Per, "'scalar' or 'channel'"), factor=FACTOR)
@dataclass(frozen=True)
class Learned:
    """A gain α or β that is learned.

    Attributes:
      init: What it is at first.
      per: One number, or one for each channel.
      factor: The gain is this times the parameter, which starts at `init / factor`: for Adam, whose
        steps do not depend on the size of a gradient, a learning rate of its own.

    >>> Learned(0.0)  # a factor that starts at 0, as in ReZero
    Learned(init=0.0, per='scalar', factor=1.0)
    """

    init: float
    per: Per = "scalar"
    factor: float = 1.0


_GAIN = either(
    "a number, or Learned(init)",
    "pass a float, or Learned(0.0) for one that is learned from 0 on",
    instance(Learned, "", arrays=False),
    array(),
)
_NORM = instance(Norm, "make it with get(name), or Norm(init, parts)", arrays=False)
AXIS = integer("-1, or 1 for [N, C, ...]", "move the channels last", among=(-1, 1))


class Call(NamedTuple):
    """What a connection is given beside its parameters and x.

    Attributes:
      norm: `norm(name, a)` makes that norm's h of a; of `init`, its parameters and states.
      branch: `branch(a, b)` makes F(a), which has the shape of b; `init` has no need of it.
      shortcut: What x goes through beside the branch; `None` for nothing.
      channel_axis: -1, or 1.
    """

    norm: Callable[..., Any]
    branch: Any = None
    shortcut: Callable[[Array], Array] | None = None
    channel_axis: int = -1


class Connection:
    """A residual connection of any kind, as `init_residual` and `residual` take it.

    Every kind has a norm `inner` of what enters the branch and a norm `outer` of what leaves it, or
    `None`, and says what `total` is; and it says how many `streams` x has, `None` if it is one
    itself. What it learns, and its norms' states, are in those fields of `Residual` that it uses.

    >>> from normlab.placement import HyperConnection, Placement
    >>> one, several = Placement(), HyperConnection(streams=4)
    >>> isinstance(one, Connection), isinstance(several, Connection), one.streams, several.streams
    (True, True, None, 4)
    """

    inner: Norm | None
    outer: Norm | None
    total: Norm | None
    streams: Any = None

    def init(self, x: Any, call: Call) -> dict[str, Any]:
        """The initial gains by field of `Residual`, for an x of this shape and type."""
        raise NotImplementedError

    def apply(self, params: Residual, x: Array, call: Call) -> Array:
        """Returns x'."""
        raise NotImplementedError


@checked(
    "Placement",
    **dict.fromkeys(("inner", "outer", "total"), _NORM),
    **dict.fromkeys(("skip", "branch"), _GAIN),
    scale=array("a number", "pass a float"),
    **dict.fromkeys(("lerp", "delayed"), flag()),
)
@leaves("skip", "branch", "scale")
@dataclass(frozen=True)
class Placement(Connection):
    """Where the norms of one residual connection stand: x' = S(α·x + β·O(F(s·I(x)))).

    It is a pytree. α, β and s are its leaves where they are numbers, so that the placements of
    many blocks can be stacked and scanned over; all else is static. Two placements of the same
    norms and the same learned gains have the same structure.

    Attributes:
      inner: I, a norm of what enters the branch; `None` for none.
      outer: O, a norm of what leaves it.
      total: S, a norm of the sum.
      skip: α, the gain of x: a number, or `Learned`.
      branch: β, the gain of the branch: a number, or `Learned`.
      scale: s, a number by which what enters the branch is multiplied.
      lerp: Whether the two are interpolated instead: x' = S(x + |β|·(O(F(s·I(x))) − x)).
      delayed: Whether the gradient of the branch is multiplied by β where x enters it and not where
        the branch is added, so that the gradients inside are as large as without β (Blake et al.
        2023, unit scaling, https://arxiv.org/abs/2303.11257). The gradient of x is the same, those
        of the branch's parameters are 1/β times theirs. β must be a number.

    >>> from normlab import get
    >>> pre = Placement(inner=get("layer"))
    >>> jax.tree.leaves(pre)
    [1.0, 1.0, 1.0]
    """

    inner: Norm | None = None
    outer: Norm | None = None
    total: Norm | None = None
    skip: Any = 1.0
    branch: Any = 1.0
    scale: Any = 1.0
    lerp: bool = False
    delayed: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for values that contradict each other."""
        if self.lerp and not _is_one(self.skip):
            given = f"lerp=True and skip={self.skip!r}"
            raise invalid("Placement", given, "skip=1, which lerp replaces", "leave skip out")
        if self.delayed and (self.lerp or isinstance(self.branch, Learned)):
            given = f"delayed=True with branch={self.branch!r} and lerp={self.lerp}"
            raise invalid("Placement", given, "a number, and no lerp", "set branch to a number")

    def init(self, x: Any, call: Call) -> dict[str, Any]:
        """The learned gains."""
        leaving: Any = x if call.shortcut is None else jax.eval_shape(call.shortcut, x)
        for name, a in (("inner", x), ("outer", leaving), ("total", leaving)):
            call.norm(name, a)
        made = {}
        for name in ("skip", "branch"):
            gain = getattr(self, name)
            if isinstance(gain, Learned):
                size = () if gain.per == "scalar" else (leaving.shape[call.channel_axis],)
                made[name] = jnp.full(size, gain.init / gain.factor, promote_dtype(leaving))
        return made

    def apply(self, params: Residual, x: Array, call: Call) -> Array:
        """The line, in its order."""
        wide = promote_dtype(x)

        def gained(name: str, a: Array) -> Array:
            """α·a or β·a, in float32 at least."""
            gain, own, a = getattr(self, name), getattr(params, name), a.astype(wide)
            if own is None and isinstance(gain, Learned):
                raise missing(name, gain)
            if own is None and _is_one(gain):
                return a
            if own is not None:
                gain = promote(own) * (gain.factor if isinstance(gain, Learned) else 1)
            made = Affine(floating(gain), None)
            g, _ = gain_and_bias(f"residual {name}", made, a, call.channel_axis)
            return (jnp.abs(g) if self.lerp else g) * a

        entering = x
        if self.delayed:
            if params.branch is not None:
                change = "put a gate in a placement without delayed"
                raise invalid("residual", "params.branch with delayed=True", "none", change)
            entering = _times_in_tangent(entering, self.branch)
        entering = call.norm("inner", entering)
        if not _is_one(self.scale):
            scaled = jnp.asarray(self.scale, wide) * entering.astype(wide)
            entering = scaled.astype(entering.dtype)
        beside = x if call.shortcut is None else jnp.asarray(call.shortcut(x))
        y = call.norm("outer", call.branch(entering, beside)).astype(wide)
        if self.lerp:
            beside = beside.astype(wide)
            total = beside + gained("branch", y - beside)
        elif self.delayed:
            total = gained("skip", beside) + _times_in_value(y, self.branch)
        else:
            total = gained("skip", beside) + gained("branch", y)
        return call.norm("total", total.astype(x.dtype))


@node
class Residual(NamedTuple):
    """What belongs to each place of a connection: its parameters, or its states.

    Attributes:
      inner: Those of I; `None` where there is none.
      outer: Those of O.
      total: Those of S.
      skip: α, where it is learned.
      branch: β, where it is learned.
      read: What weighs or normalizes the streams that the branch reads, where there are several.

    >>> from normlab import get
    >>> pre = Residual(inner=get("rms"))  # x + F(norm(x))
    >>> pre.outer, pre.total
    (None, None)
    """

    inner: Any = None
    outer: Any = None
    total: Any = None
    skip: Any = None
    branch: Any = None
    read: Any = None


PLACEMENT = instance(
    Connection, "make one: Placement(inner=norm), or scheme(name).at(block)", arrays=False
)


@checked(
    "init_residual",
    placement=PLACEMENT,
    x=array(rank=1, abstract=True),
    shortcut=a_function(),
    channel_axis=AXIS,
)
def init_residual(
    placement: Connection,
    x: ArrayLike,
    *,
    shortcut: Callable[[Array], Array] | None = None,
    channel_axis: int = -1,
) -> tuple[Residual, Residual]:
    """Returns the initial parameters and states of a connection.

    Args:
      placement: Where its norms stand.
      x: `[N, ..., C]`, what flows through it; its shape suffices. Several streams stand in front of
        the channels, `[N, ..., S, C]`.
      shortcut: As in `residual`.
      channel_axis: -1, or 1 for `[N, C, ...]` and `[N, S, C, ...]`.

    Returns:
      `(params, state)`, each a `Residual`.

    Raises:
      ValueError: If a norm does not fit x, or looks at weights, of which there are none here.

    >>> params, _ = init_residual(Placement(branch=Learned(0.1, "channel")), jnp.ones((1, 2)))
    >>> params.branch.tolist()
    [0.10000000149011612, 0.10000000149011612]
    """
    normalize_axes("init_residual", channel_axis, jnp.ndim(x))
    params: dict[str, Any] = {}
    states: dict[str, Any] = {}

    def norm(name: str, a: Any, channel_axis: int = channel_axis) -> None:
        of = getattr(placement, name)
        if of is None:
            return
        try:
            params[name], states[name] = of.init(Site(a, linear=_linear(channel_axis)))
        except ValueError as error:
            change = "take one that looks at activations alone, or that fits the shape"
            given = f"{name}={of!r} for an input of shape {a.shape}: {error}"
            raise invalid("placement", given, "a norm of activations", change) from error

    some: Any = jax.ShapeDtypeStruct(jnp.shape(x), result_dtype(x))
    gains = placement.init(some, Call(norm, shortcut=shortcut, channel_axis=channel_axis))
    return Residual(**params, **gains), Residual(**states)


RESIDUAL = instance(Residual, "take what init_residual returned", arrays=False)


@checked(
    "residual",
    placement=PLACEMENT,
    params=RESIDUAL,
    state=RESIDUAL,
    F=a_function(),
    x=array(rank=1),
    shortcut=a_function(),
    has_aux=flag(),
    channel_axis=AXIS,
)
def residual(
    placement: Connection,
    params: Residual,
    state: Residual,
    F: Callable[[Array], Any],
    x: ArrayLike,
    *,
    train: bool,
    shortcut: Callable[[Array], Array] | None = None,
    weights: ArrayLike | None = None,
    channel_axis: int = -1,
    has_aux: bool = False,
) -> Any:
    """One residual connection: x' = S(α·x + β·O(F(s·I(x)))).

    The sum is taken in float32 at least and rounded once, to the type of x.

    Args:
      placement: Where its norms stand.
      params: Their parameters and the learned gains, from `init_residual`. A gain that depends on
        the call, as in adaLN-Zero, takes the place of a learned one: `params._replace(branch=gate)`
        with `[N, C]`, or as many axes as x; a norm's own goes through `modulate`.
      state: Their states.
      F: The branch: what it returns has the shape of x, or of its shortcut, or of one stream.
      x: `[N, ..., C]`, or several streams, as in `init_residual`.
      train: As of a norm.
      shortcut: What x goes through beside the branch, where that changes the shape: a ResNet's 1×1
        convolution, or every other position.
      weights: Those of the examples or positions, for the norms' statistics.
      channel_axis: -1, or 1 for `[N, C, ...]`.
      has_aux: Whether F returns `(y, aux)`, its own next states, say.

    Returns:
      `(x', state)`; with `has_aux`, `(x', state, aux)`.

    Raises:
      ValueError: If F changes the shape or does not return what `has_aux` says, or parameters do
        not fit, or are there for a norm that is not.

    >>> from normlab import get
    >>> post = Placement(total=get("layer"))
    >>> x = jnp.array([[1.0, 3.0]])
    >>> params, state = init_residual(post, x)
    >>> residual(post, params, state, jnp.square, x, train=True)[0].round(3).tolist()
    [[-1.0, 1.0]]
    """
    for name in ("inner", "outer", "total"):
        if getattr(placement, name) is None and getattr(params, name) is not None:
            change = "take the params of init_residual for this placement"
            raise invalid("residual", f"params of {name}, where there is no norm", "none", change)
    after: dict[str, Any] = {}
    aux = None

    def norm(name: str, a: Array, channel_axis: int = channel_axis) -> Array:
        of = getattr(placement, name)
        if of is None:
            return a
        site = Site(a, weights=weights, linear=_linear(channel_axis))  # pyright: ignore[reportArgumentType]
        h, after[name] = of.apply(getattr(params, name), getattr(state, name), site, train=train)
        return h

    def branch(a: Array) -> Any:
        nonlocal aux
        y = F(a)
        if not has_aux:
            return y
        if not (isinstance(y, tuple) and len(y) == 2):
            given = f"has_aux=True with a branch that returns a {type(y).__name__}"
            raise invalid(
                "residual", given, "a tuple (y, aux)", "return both, or leave has_aux out"
            )
        y, aux = y
        return y

    h = connect(placement, params, x, norm, branch, shortcut, channel_axis)
    done = Residual(**after)
    return (h, done, aux) if has_aux else (h, done)


def connect(
    connection: Connection,
    gains: Residual,
    x: ArrayLike,
    norm: Callable[..., Array],
    F: Callable[[Array], Any],
    shortcut: Callable[[Array], Array] | None,
    channel_axis: int = -1,
) -> Array:
    """Returns x' of a connection whose norms are applied by `norm(name, a)`."""

    def branch(a: Array, beside: Array) -> Array:
        y = F(a)
        if not is_array(y):
            change = "return that alone; where there is more, (y, aux) with residual(has_aux=True)"
            raise invalid("residual", f"a branch that returns a {type(y).__name__}", "y", change)
        if jnp.shape(y) != beside.shape:
            given = f"a branch that makes {jnp.shape(y)} of {a.shape}, and {beside.shape} beside it"
            change = "project inside the branch, or give x a shortcut"
            raise invalid("residual", given, "one shape", change)
        return jnp.asarray(y)

    return connection.apply(gains, floating(x), Call(norm, branch, shortcut, channel_axis))


def missing(name: str, gain: Any) -> ValueError:
    """The error of params that are not those of the placement."""
    change = "take the params of init_residual for this placement"
    return invalid("residual", f"params without {name}", f"{gain!r}", change)


def _linear(channel_axis: int) -> Any:
    return Dense() if channel_axis == -1 else Conv(channel_axis=channel_axis)


def _is_one(gain: Any) -> bool:
    """Whether it is Python's 1; an array may be any number."""
    return isinstance(gain, int | float) and gain == 1


@jax.custom_jvp
def _times_in_value(y: Array, gain: Any) -> Array:
    """gain·y, whose derivative is that of y."""
    return jnp.asarray(gain, y.dtype) * y


@_times_in_value.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _times_in_value(*primals), tangents[0]


@jax.custom_jvp
def _times_in_tangent(x: Array, gain: Any) -> Array:
    """x, whose derivative is multiplied by gain."""
    del gain
    return x


@_times_in_tangent.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, gain = primals
    wide = promote_dtype(x)
    return x, (jnp.asarray(gain, wide) * tangents[0].astype(wide)).astype(x.dtype)
