"""Maps of the weights: norms that are a change of the kernel alone, written once as either.

    w' = g · (w − m) / σ        h = linear(x, w') + b = g · (linear(x, w) − linear(x, m)) / σ + b

`Mapped` holds what was measured of a kernel, and `weight_map` makes a norm of any such measure: a
`WeightMap`, which gives the kernel too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import a_function, anything, array, checked
from normlab._checks import expand, gain_and_bias, inputs, kernel, no_mean, promote, result_dtype
from normlab._trees import node
from normlab.equation import Parts
from normlab.linear import Dense, Linear
from normlab.making import initial_affine
from normlab.site import SHAPES, Norm, Params, Site, State


class KernelOf(Protocol):
    """How a map of the weights makes a kernel: `linear` and `x` say where w stands, if it asks."""

    def __call__(
        self,
        params: Params,
        state: State,
        w: Array,
        *,
        linear: Linear = ...,
        x: Array | jax.ShapeDtypeStruct | None = None,
        train: bool,
    ) -> tuple[Array, State]: ...


@dataclass(frozen=True, eq=False, repr=False)
class WeightMap(Norm):
    """A norm of the weights alone, which is a change of the kernel: `linear(x, w') + b` is it too.

    `normlab.weight_map` makes one. The kernel that is stored stays as it is, w' is made of it in
    every call: a reparametrization.

    Attributes:
      init_kernel: `(w, linear=, x=) -> (params, state)`, as `init` of the layer; w may be a shape.
      kernel: `(params, state, w, linear=, x=, train=) -> (w', state)`, w' in the shape and floating
        type of w. Of params the gain is used; the bias is the layer's.

    >>> import jax.numpy as jnp
    >>> from normlab import get
    >>> get("weight").kernel(None, (), jnp.array([[3.0], [4.0]]), train=False)[0].round(3).tolist()
    [[0.6000000238418579], [0.800000011920929]]
    """

    init_kernel: Callable[..., tuple[Params, State]] = field(kw_only=True)
    kernel: KernelOf = field(kw_only=True)


@node
class Mapped(NamedTuple):
    """What a map of the weights, w' = g · (w − m)/σ, measured of a kernel w `[..., K, C]`.

    Attributes:
      unit: (w − m)/σ, in the shape of w: the new kernel, without a gain.
      shift: m: one number for each unit, `[1, ..., 1, C]`, or in the shape of w; `None` for 0.
      sigma: σ ≥ 0, `[]`, or `[1, ..., 1, C]`; 0 where the map makes zero of a unit.

    >>> def centred(w, state, **_):
    ...     mean = w.mean(0, keepdims=True)
    ...     return Mapped(unit=w - mean, shift=mean, sigma=jnp.ones(())), state
    >>> weight_map(centred).kernel(None, (), jnp.array([[1.0], [5.0]]), train=False)[0].tolist()
    [[-2.0], [2.0]]
    """

    unit: Array
    shift: Array | None
    sigma: Array


class MeasureOfWeights(Protocol):
    """Where a `Mapped` comes from; the next state is as of a `Measure`."""

    def __call__(
        self,
        w: Array,
        state: State,
        *,
        linear: Linear,
        x: Array | jax.ShapeDtypeStruct | None,
        train: bool,
    ) -> tuple[Mapped, State]: ...


SHAPED_KERNEL = array("a kernel [..., K, C], or its shape", rank=2, abstract=True)
INPUT = array("the input of the layer, or its shape", rank=1, abstract=True)


@checked("weight map", measure=a_function(), params=a_function(), state=a_function())
def weight_map(
    measure: MeasureOfWeights,
    params: Callable[[Site], Any] = initial_affine,
    state: Callable[[Any, Linear, Any], State] = lambda *_: (),
    *,
    name: str = "weight map",
) -> WeightMap:
    """Returns the norm, and the change of a kernel, that a measure of the weights is.

    A map that has no σ of its own, w' = f(w), is `Mapped(f(w), w - f(w), jnp.ones(()))`.

    Args:
      measure: `(w, state, *, linear, x, train) -> (Mapped, state)`: w is in float32 at least. The
        layer and its input, of which the shape alone may be looked at, say where w stands; they are
        `Dense()` and `None` where a kernel is asked for alone.
      params: `site -> params`, the initial parameters.
      state: `(w, linear, x) -> state`, the initial state; all of them may be shapes.
      name: Its name in errors.

    >>> def halves(w, state, *, linear, x, train):
    ...     return Mapped(w / 2, None, 2 * jnp.ones(())), state
    >>> weight_map(halves).kernel(None, (), jnp.ones((1, 1)), train=False)[0].tolist()
    [[0.5]]
    """
    where = name

    def init(site: Site) -> tuple[Params, State]:
        w = kernel(where, site, of_x=False)
        begun = state(w, site.linear, site.x)
        jax.eval_shape(lambda s, site: parts(None, s, site, train=False), begun, site)
        return params(site), begun

    def init_kernel(
        w: Any,
        *,
        linear: Linear = Dense(),  # noqa: B008
        x: Any = None,
    ) -> tuple[Params, State]:
        one: Any = jax.ShapeDtypeStruct((1, w.shape[-1]), w.dtype)
        return params(Site(one, w=w)), state(w, linear, x)

    def parts(params: Params, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        w = promote(kernel(where, site, of_x=False))
        mapped, state = measure(w, state, linear=site.linear, x=site.x, train=train)
        return mapped_parts(where, mapped, site, params), state

    def kernel_of(
        params: Params,
        state: State,
        w: Array,
        *,
        linear: Linear = Dense(),  # noqa: B008
        x: Array | jax.ShapeDtypeStruct | None = None,
        train: bool,
    ) -> tuple[Array, State]:
        mapped, state = measure(promote(w), state, linear=linear, x=x, train=train)
        return mapped_kernel(where, mapped, w, params), state

    return WeightMap(
        checked(where, site=SHAPES)(init),
        checked(where, state=anything)(parts),
        init_kernel=checked(where, w=SHAPED_KERNEL, x=INPUT)(init_kernel),
        kernel=checked(where, state=anything, x=INPUT)(kernel_of),
    )


def mapped_kernel(where: str, mapped: Mapped, w: ArrayLike, params: Any) -> Array:
    """The new kernel, in the type of the old one `w`."""
    gain, _ = gain_and_bias(where, params, w, -1)
    return (gain * mapped.unit).astype(result_dtype(w))


def mapped_parts(where: str, mapped: Mapped, site: Site, params: Any) -> Parts:
    """The parts that do to `linear(x, w)` what the new kernel does to x.

    Where σ = 0 it is 1, and with a shift g = 0, so that h = b whatever rounding leaves of a − μ.
    """
    channel = site.linear.channel_axis
    g, b = gain_and_bias(where, params, site.a, channel)

    def per_unit(v: Array) -> Array:
        return expand(v, site.a.ndim, channel) if v.ndim else v

    sigma = per_unit(mapped.sigma)
    nothing = sigma == 0
    sigma = jnp.where(nothing, 1, sigma)
    if mapped.shift is None:
        return Parts(no_mean(sigma.dtype), sigma, g, b)
    w, x = promote(kernel(where, site)), inputs(where, site)
    if mapped.shift.size == w.shape[-1]:
        mu = per_unit(mapped.shift) * site.linear.patch_sum(x, w)
    else:
        mu = site.linear(promote(x), jnp.broadcast_to(mapped.shift, w.shape))
    return Parts(mu, sigma, jnp.where(nothing, 0, g), b)


def named(state: State) -> dict[str, Array]:
    """The arrays of a state of a map of the weights by name, as a model keeps them."""
    if hasattr(state, "_fields"):
        return dict(state._asdict())
    return {} if isinstance(state, tuple) else {"state": state}


def unnamed(like: State, arrays: Mapping[str, Array]) -> State:
    """Undoes `named`, for a state like another."""
    if hasattr(like, "_fields"):
        return type(like)(**arrays)
    return like if isinstance(like, tuple) else arrays["state"]


def gain_alone(params: Params) -> Params:
    """Params of a map of the weights without the bias, which is the layer's."""
    return params._replace(b=None) if hasattr(params, "_replace") else params
