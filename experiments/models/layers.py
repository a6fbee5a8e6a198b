"""The layer that every network is made of: a linear map, a norm and an activation.

    before    h = f(norm(w·x))          the bias is the norm's
    after     h = norm(f(w·x + b))

Every norm of the registry can stand before the activation. After it there is no linear map any
more: a norm that looks at w or x cannot stand there, and says so. Where the activation is part of
the norm (`norm.fused`), as in EvoNorm, f is left out.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

import normlab as nl
from normlab.errors import invalid, nearest

PARTS = "parts"
"""The variable collection into which every layer sows its four parts."""

ACTIVATIONS = "activations"
"""The variable collection into which every layer sows what flows through it."""

DEPTH = "depth"
"""The variable collection into which every block sows statistics of its stream and attention."""

STATE = "norm_state"
"""The variable collection of the norms' states."""

Placement = Literal["before", "after"]
"""Where a norm stands: before the activation or after it."""

Where = str | tuple[str, ...] | Callable[[str], bool]
"""Which layers carry the norm: a regular expression that matches the whole name, the names
themselves, or a predicate of the name."""

NONE = nl.get("none")
"""What stands in a layer that does not carry the norm: a bias."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class MatmulConv(nl.Conv):
    """`nl.Conv` over images [N, H, W, K], as matrix products over gathered windows.

    The same numbers. XLA's own convolution is many times slower inside a scan on a CPU, and a norm
    is compared inside one. Windows take up as many times the image as a window has places: where
    they would not stay in the processor's cache, a few images are taken at a time, and their
    windows gathered anew for the gradient (`normlab bench conv`).
    """

    BLOCK: ClassVar[int] = 2**18
    """Bytes of the windows of one block. Up to four times as much is not cut."""

    def __call__(self, x: Array, w: Array) -> Array:
        if self.dilation != 1 or self.groups != 1 or self.channel_axis != -1:
            return super().__call__(x, w)
        images = self.images_per_block(x, w)
        if images == len(x):
            return self.product(x, w)
        product = jax.checkpoint(self.product)
        y = lax.map(lambda block: product(block, w), x.reshape(-1, images, *x.shape[1:]))
        return y.reshape(-1, *y.shape[2:])

    def images_per_block(self, x: Array, w: Array) -> int:
        """How many images are taken at a time: all of them, or a number that divides them."""
        windows = math.prod(x.shape[1:3]) // math.prod(self._strides())
        image = windows * math.prod(w.shape[:-1]) * x.dtype.itemsize
        if len(x) * image <= 4 * self.BLOCK:
            return len(x)
        fit = range(1, max(1, self.BLOCK // image) + 1)
        return max(n for n in fit if len(x) % n == 0)

    def product(self, x: Array, w: Array) -> Array:
        """The convolution as one product over the windows of all images."""
        height, width, _, channels = w.shape
        strides, pads = self._strides(), self.padding
        if isinstance(pads, str):
            pads = lax.padtype_to_pads(x.shape[1:3], (height, width), strides, pads)
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        rows, columns = (
            (size - window) // stride + 1
            for size, window, stride in zip(x.shape[1:3], (height, width), strides, strict=True)
        )
        windows = [
            x[:, i : i + strides[0] * rows : strides[0], j : j + strides[1] * columns : strides[1]]
            for i in range(height)
            for j in range(width)
        ]
        windows = [v[:, :rows, :columns] for v in windows]
        return jnp.concatenate(windows, -1) @ w.reshape(-1, channels)

    def _strides(self) -> Sequence[int]:
        return (self.strides, self.strides) if isinstance(self.strides, int) else self.strides


def conv(**options: Any) -> nl.Conv:
    """The fastest convolution of the default backend."""
    return (MatmulConv if jax.default_backend() == "cpu" else nl.Conv)(**options)


class Activations(NamedTuple):
    """What flows through a layer.

    Attributes:
      a: `[N, ..., C]`, w·x, without a bias.
      z: What enters the activation function.
      h: What leaves the layer.
    """

    a: Array
    z: Array
    h: Array


class Normed(nn.Module):
    """A linear map, a norm and an activation: f(r(norm(w·x))), or norm(f(r(w·x + b))).

    Attributes:
      linear: The linear map.
      norm: The norm; `NONE` for a bias alone.
      kernel_shape: The shape of w.
      activation: f; `None` for none. A fused norm has its own in its place.
      placement: Where the norm stands.
      kernel_init: How w is drawn.
      gain: What the norm's initial gain is multiplied by.
      steps: Keeps a state of the norm for each of so many time steps; `None` keeps one.
    """

    linear: nl.Linear
    norm: nl.Norm
    kernel_shape: tuple[int, ...]
    activation: Callable[[Array], Array] | None = None
    placement: Placement = "before"
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    gain: float = 1.0
    steps: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        train: bool,
        *,
        connect: Callable[[Array], Array] | None = None,
        step: Array | None = None,
    ) -> Array:
        """`connect` is r, a residual connection; `step` is the time step, with `steps`."""
        f = self.activation if self.activation and not self.norm.fused else lambda a: a
        w = self.param("kernel", self.kernel_init, self.kernel_shape)
        a = self.linear(x, w)
        if self.placement == "before":
            site = nl.Site(a, x, w, linear=self.linear)
            z = normalize(self, site, train, step=step)
            z = z if connect is None else connect(z)
            return self._show(a, z, f(z))
        z = a + self.param("bias", nn.initializers.zeros, self.kernel_shape[-1:])
        z = z if connect is None else connect(z)
        h = f(z)
        if needs_kernel(self.norm, h):
            raise invalid(
                "/".join(self.path),
                'placement="after" for a norm that looks at w or x',
                "a norm of activations: behind f there is no linear map to look at",
                'use placement="before", where such a norm changes w·x itself',
            )
        return self._show(a, z, normalize(self, nl.Site(h, linear=self.linear), train, step=step))

    def _show(self, a: Array, z: Array, h: Array) -> Array:
        if not self.is_initializing():
            self.sow(ACTIVATIONS, "layer", Activations(a, z, h))
        return h


class Activation(nn.Module):
    """A norm of an activation [N, ..., C] that no linear map of its own made.

    Attributes:
      norm: A norm that looks at activations alone.
      gain: As in `Normed`.
      steps: As in `Normed`.
    """

    norm: nl.Norm
    gain: float = 1.0
    steps: int | None = None

    @nn.compact
    def __call__(self, a: Array, train: bool, *, step: Array | None = None) -> Array:
        if needs_kernel(self.norm, a):
            raise invalid(
                "/".join(self.path),
                "a norm that looks at w or x",
                "a norm of activations: no linear map of its own stands here",
                "let `where` name linear layers only, or choose another norm",
            )
        return normalize(self, nl.Site(a), train, step=step)


class Branch(nn.Module):
    """A residual connection: x' = S(α·x + β·O(F(s·I(x)))), as `nl.placement` has it.

    Its parameters and states are `nl.placement.Residual`s. The parts of its norms are sown as
    those of `inner`, `outer` and `total`.
    """

    @nn.compact
    def __call__(
        self,
        placement: nl.placement.Placement,
        F: Callable[[Array], Array],
        x: Array,
        train: bool,
        shortcut: Callable[[Array], Array] | None = None,
    ) -> Array:
        init = functools.partial(nl.placement.init_residual, placement, x, shortcut=shortcut)
        params = self.param("norm", lambda _: init()[0])
        states = self.variable(STATE, "norm", lambda: init()[1])
        if self.is_mutable_collection(PARTS) and not self.is_initializing():
            places = {p: getattr(placement, p) for p in ("inner", "outer", "total")}
            shown = {p: self._showing(p, norm) for p, norm in places.items() if norm is not None}
            placement = replace(placement, **shown)
        x, after = nl.placement.residual(
            placement, params, states.value, F, x, train=train, shortcut=shortcut
        )
        if train and not self.is_initializing():
            states.value = after
        return x

    def _showing(self, place: str, norm: nl.Norm) -> nl.Norm:
        def parts(*args: Any, train: bool) -> tuple[nl.Parts, Any]:
            found, after = norm.parts(*args, train=train)
            self.sow(PARTS, place, nl.Parts(found.mu, found.sigma, found.g, found.b))
            return found, after

        return replace(norm, parts=parts)


def scaled(init: nn.initializers.Initializer, factor: float) -> nn.initializers.Initializer:
    """An initializer that draws so many times what another one draws."""
    if factor == 1:
        return init
    return lambda *args, **kwargs: factor * init(*args, **kwargs)


def normalize(
    layer: Normed | Activation, site: nl.Site, train: bool, *, step: Array | None = None
) -> Array:
    """Applies a layer's norm: its parameters and its state are the layer's variables.

    Args:
      layer: The layer, inside its call.
      site: What the norm may look at.
      train: Whether to train.
      step: The time step, where there is a state of each; steps beyond the last share that one.

    Returns:
      The normalized activation. The parts are sown into `PARTS` where that may change.
    """

    def init_params() -> Any:
        return rescaled(layer.norm.init(site)[0], layer.gain)

    def init_state() -> Any:
        state = layer.norm.init(site)[1]
        if layer.steps is None:
            return state
        return jax.tree.map(lambda v: jnp.broadcast_to(v, (layer.steps, *v.shape)), state)

    params = layer.param("norm", lambda _: init_params())
    states = layer.variable(STATE, "norm", init_state)
    state = states.value if layer.steps is None else _at(states.value, step)
    if layer.is_mutable_collection(PARTS) and not layer.is_initializing():
        parts, _ = layer.norm.parts(params, state, site, train=train)
        layer.sow(PARTS, "norm", nl.Parts(parts.mu, parts.sigma, parts.g, parts.b))
    h, after = layer.norm.apply(params, state, site, train=train)
    if train and not layer.is_initializing():
        states.value = after if layer.steps is None else _put(states.value, step, after)
    return h


def rescaled(params: Any, gain: float) -> Any:
    """The params of a norm with its gain multiplied; as they are where it keeps none of its own.

    >>> rescaled(nl.Offset(jnp.zeros(1), None), 0.5).d.tolist()
    [-0.5]
    """
    g = getattr(params, "g", None)
    if gain == 1 or g is None:
        return params
    kept = {"d": gain * g - 1} if isinstance(params, nl.Offset) else {"g": gain * g}
    kept = {"s": jnp.log(gain * g)} if isinstance(params, nl.Log) else kept
    return params._replace(**kept) if kept.keys() <= {*params._fields} else params


def _at(states: Any, step: Any) -> Any:
    return jax.tree.map(lambda v: v[_row(v, step)], states)


def _put(states: Any, step: Any, state: Any) -> Any:
    return jax.tree.map(lambda v, new: v.at[_row(v, step)].set(new), states, state)


def _row(v: Array, step: Any) -> Any:
    return jnp.minimum(step, v.shape[0] - 1)


def needs_kernel(norm: nl.Norm, a: Array) -> bool:
    """Whether a norm looks at w or x, so that `a` alone is not enough for it.

    Raises:
      ValueError: The norm's own, if it fits `a` in neither way.
    """
    try:
        jax.eval_shape(norm.init, nl.Site(a))
    except ValueError as error:
        w = jnp.eye(a.shape[-1], dtype=a.dtype)
        try:
            jax.eval_shape(norm.init, nl.Site(a, a, w))
        except ValueError:
            raise error from None
        return True
    return False


class Network(nn.Module):
    """What the networks have in common.

    Attributes:
      norm: The norm.
      classes: The size of the output.
      activation: f.
      placement: Where the norm stands, of each layer that carries it.
      where: Which layers of `layers` carry it; `None` for the model's default, the hidden layers.
    """

    text: ClassVar[bool] = False
    """Whether it reads the ids of tokens, and says of each which token follows."""

    flat: ClassVar[bool] = False
    """Whether its layers have no positions, which instance norm measures over: in a transformer
    every token is an example."""

    norm: nl.Norm
    classes: int
    activation: Callable[[Array], Array] = nn.relu
    placement: Placement = "before"
    where: Where | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that may carry the norm, in order."""
        raise invalid(
            type(self).__name__,
            "no property `layers`",
            "the names of the layers that may carry the norm, in order",
            "define it, beside `__call__`",
        )

    def carriers(self) -> frozenset[str]:
        """The names of the layers that carry the norm.

        Raises:
          ValueError: If `where` matches none, or names one that there is not.
        """
        name = type(self).__name__
        if self.placement not in get_args(Placement):
            raise invalid(
                name, f"placement={self.placement!r}", "'before' or 'after'", "use one of the two"
            )
        return frozenset(
            self.layers if self.where is None else choose(name, self.where, self.layers)
        )

    def project(self, params: Any) -> Any:
        """The parameters after a step: as they are, where they may be anything."""
        return params

    def layer(self, name: str, linear: nl.Linear, shape: tuple[int, ...], **options: Any) -> Normed:
        """The layer called `name`, with the norm if it carries it, with a bias if not."""
        if name not in self.layers:
            given = f"a layer {name!r}; {nearest(name, self.layers)}"
            expected = "the name of a layer that is in `layers`"
            raise invalid(type(self).__name__, given, expected, "let `layers` name it too")
        if name not in self.carriers():
            return Normed(linear, NONE, shape, name=name, **options)
        return Normed(linear, self.norm, shape, placement=self.placement, name=name, **options)


def choose(model: str, where: Where, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The names among `layers` that `where` chooses.

    Args:
      model: The model, for the error.
      where: The rule.
      layers: All names.

    Raises:
      ValueError: If there is none, with the nearest names.

    >>> choose("mlp", "hidden[01]", ("hidden0", "hidden1", "hidden2"))
    ('hidden0', 'hidden1')
    """

    def wrong(given: str, word: str) -> ValueError:
        expected = "a regular expression, names or a predicate that choose a layer"
        return invalid(model, given, expected, f"choose a layer: {nearest(word, layers)}")

    if isinstance(where, str):
        try:
            chosen = [name for name in layers if re.fullmatch(where, name)]
        except re.error as error:
            raise wrong(f"where={where!r} ({error})", where) from None
    elif callable(where):
        chosen = [name for name in layers if where(name)]
    else:
        for name in where:
            if name not in layers:
                raise wrong(f"where={where!r}, and there is no layer {name!r}", name)
        chosen = [name for name in layers if name in where]
    if not chosen:
        raise wrong(f"where={where!r}, which matches no layer", str(where))
    return tuple(chosen)
