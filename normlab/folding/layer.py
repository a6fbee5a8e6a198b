"""Folding a norm into the linear layer before it, and the error that rounding makes of it.

A norm folds if it is the same affine function of every input. Two kinds are:

    μ, σ, g, b do not depend on x           w ← w·k           b ← (c − μ)·k + b      k = g/σ
    μ alone does, as linear(x, m) + μ₀      w ← (w − m)·k     b ← (c − μ₀)·k + b

Batch norm and whitening, of which 1/σ is a matrix, with population statistics and weight norm are
of the first kind, weight standardization, where m = w̄, is of the second. All other norms of the
library measure x.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from normlab._arguments import array, checked, instance, tree
from normlab._checks import expand, promote_dtype
from normlab.equation import Parts, affine
from normlab.errors import invalid
from normlab.folding.kernel import check_finite, fold, rounding
from normlab.linear import Conv, Dense, Linear
from normlab.site import Norm, Params, Site, State


class Folded(NamedTuple):
    """A linear layer that holds the norm after it.

    Attributes:
      kernel: `[..., K, C]`, in the type of the layer's own.
      bias: `[C]`, float32 at least.
      error: `[C]`, the largest |folded − unfolded| of a channel on the examples, relative to the
        largest |unfolded| of that channel. Measured.
      bound: `[C]`, in the same unit: what rounding alone can make of it, in any order of the sums,
        while nothing over- or underflows. Never below `error`.

    >>> from normlab import get, init_running
    >>> state = init_running(1)._replace(var=jnp.array([4.0]))
    >>> folded = fold_norm(get("batch"), None, state, jnp.array([[6.0]]), x=jnp.ones((1, 1)))
    >>> folded.kernel.round(2).tolist(), bool((folded.error <= folded.bound).all())
    ([[3.0]], True)
    """

    kernel: Array
    bias: Array
    error: Array
    bound: Array


STATE = tree("the norm's own, a pytree of arrays", "pass what norm.init or training returned")


@checked(
    "fold_norm",
    norm=instance(Norm, "make it with get(name), or Norm(init, parts)", arrays=False),
    params=STATE,
    state=STATE,
    x=array("examples [N, ..., K], or their shape", abstract=True, rank=1),
)
def fold_norm(
    norm: Norm,
    params: Params,
    state: State,
    kernel: Array,
    bias: Array | None = None,
    *,
    x: Array | jax.ShapeDtypeStruct,
    linear: Linear = Dense(),  # noqa: B008
) -> Folded:
    """Folds a norm, as it is with `train=False`, into the linear layer before it.

    `norm.apply` after `linear(x, kernel) + bias` equals `linear(x, folded.kernel) + folded.bias`:
    with k = g/σ the kernel w becomes w·k, and the bias c becomes (c − μ)·k + b.

    Whether the norm can be folded is not judged by its name. The parts are traced, and those that
    depend on the values of x are found; μ may, if it is linear in x (weight
    standardization's). Then the result is compared with the norm on `x`. For use outside of `jit`.

    Args:
      norm: The norm; one of the registry, or a user's own.
      params: Its parameters.
      state: Its state.
      kernel: `[..., K, C]`, the layer's.
      bias: `[C]`, the layer's own bias, added before the norm; `None` for none.
      x: Example inputs of the layer, on which the error is measured; a `jax.ShapeDtypeStruct`
        stands for normal random ones.
      linear: The linear map.

    Returns:
      `Folded(kernel, bias, error, bound)`.

    Raises:
      ValueError: If the norm depends on its input, and which of its parts do; or if the folded
        layer is not finite, or not the same function on `x`.

    >>> from normlab import get
    >>> kernel, norm = jnp.array([[3.0], [4.0]]), get("weight")
    >>> params = norm.init(Site(jnp.ones((1, 1)), w=kernel))[0]._replace(g=jnp.array([10.0]))
    >>> folded = fold_norm(norm, params, (), kernel, x=jnp.eye(2))
    >>> folded.kernel.tolist(), folded.bias.tolist()
    ([[6.0], [8.0]], [0.0])
    """
    if bias is not None and jnp.shape(bias) != kernel.shape[-1:]:
        raise invalid(
            "fold_norm",
            f"a bias of shape {jnp.shape(bias)} for a kernel of shape {kernel.shape}",
            f"shape {kernel.shape[-1:]}",
            "pass the bias of the same layer",
        )
    if isinstance(x, jax.ShapeDtypeStruct):
        x = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    with jax.default_matmul_precision("highest"):  # a TF32 product is no measure of a fold
        folded = _folded(norm, linear, params, state, kernel, bias, x)
    check_finite("fold_norm", folded.kernel, folded.bias)
    if not bool((folded.error <= folded.bound).all()):
        worst = int(jnp.argmax(folded.error - folded.bound))
        raise invalid(
            "fold_norm",
            f"a norm that differs from its folded form by {float(folded.error[worst]):.1e} of "
            f"channel {worst}'s largest output, where rounding explains "
            f"{float(folded.bound[worst]):.1e}",
            "one affine function of the input, at every position",
            "keep this norm as a layer of its own, or pass finite examples x",
        )
    return folded


@functools.partial(jax.jit, static_argnames=("norm", "linear"))
def _folded(
    norm: Norm,
    linear: Linear,
    params: Params,
    state: State,
    kernel: Array,
    bias: Array | None,
    x: Array,
) -> Folded:
    dtype = jnp.promote_types(promote_dtype(x), promote_dtype(kernel))
    x, w = x.astype(dtype), kernel.astype(dtype)
    c = jnp.zeros(w.shape[-1], dtype) if bias is None else bias.astype(dtype)

    def parts(x: Array, linear: Linear) -> Parts:
        site = Site(_layer(linear, x, w, c), x, w, linear=linear)
        return norm.parts(params, state, site, train=False)[0]

    constant, m = _constant_parts(parts, x, w, linear)
    new, new_bias = fold(constant, w - m, c)
    new = new.astype(kernel.dtype)
    v = new.astype(dtype)

    found = parts(x, linear)
    h = affine(found, _layer(linear, x, w, c))
    gap = jnp.abs(_layer(linear, x, v, new_bias) - h)
    before = _layer(linear, jnp.abs(x), jnp.abs(w), jnp.abs(c)) + jnp.abs(found.mu)
    after = _layer(linear, jnp.abs(x), jnp.abs(v), jnp.abs(new_bias))
    sizes = jax.tree.map(jnp.abs, found)._replace(mu=jnp.zeros_like(found.mu))
    size = affine(sizes, before) + after  # |g/σ|·before + |b| + after
    mixed = 0 if isinstance(found, Parts) else found.matrix.shape[-1]
    size = rounding(kernel.shape, [kernel.dtype, dtype], mixed=mixed) * size
    error, bound = (_of_channels(v, h, linear.channel_axis) for v in (gap, size))
    return Folded(new, new_bias, error, bound)


def _layer(linear: Linear, x: Array, w: Array, b: Array) -> Array:
    a = linear(x, w)
    return a + expand(b.astype(a.dtype), a.ndim, linear.channel_axis)


def _of_channels(v: Array, h: Array, channel_axis: int) -> Array:
    """The largest v of each channel, relative to its largest |h|; absolute where that is zero."""
    axes = tuple(i for i in range(h.ndim) if i != channel_axis % h.ndim)
    scale = jnp.abs(h).max(axes)
    return jnp.broadcast_to(v, h.shape).max(axes) / jnp.where(scale > 0, scale, 1)


def _constant_parts(
    parts: Callable[[Array, Linear], Parts], x: Array, w: Array, linear: Linear
) -> tuple[Parts, Array]:
    """Returns parts that do not depend on x, and m of their mu = linear(x, m) + μ₀ (or zeros).

    Raises:
      ValueError: If there are none.
    """

    def at(x: Array, name: str = "mu", linear: Linear = linear) -> Array:
        return getattr(parts(x, linear), name)

    def slope(x: Array) -> Array:
        return jax.jvp(at, (x,), (jnp.ones_like(x),))[1]

    made = jax.eval_shape(lambda x: parts(x, linear), x)  # says what is wrong with the norm itself
    arrays = [name for name, part in made._asdict().items() if hasattr(part, "shape")]
    found = [name for name in arrays if _varies(lambda x, n=name: at(x, n), x)]
    if not found:
        return parts(x, linear), jnp.zeros_like(w)
    if (
        found != ["mu"]
        or not isinstance(made, Parts)
        or _varies(slope, x)
        or not isinstance(linear, Dense | Conv)
    ):
        raise invalid(
            "fold_norm",
            f"a norm whose {' and '.join(found)} {'depend' if found[1:] else 'depends'} on the "
            "input of the layer",
            "parts that are the same for every input (or a mu that is linear in it, after a "
            "Dense or a Conv)",
            "keep this norm as a layer of its own; batch norm folds with population statistics",
        )
    zero = parts(jnp.zeros_like(x), linear)
    mu = jnp.moveaxis(jnp.broadcast_to(zero.mu, linear(x, w).shape), linear.channel_axis, -1)
    return zero._replace(mu=mu.reshape(-1, mu.shape[-1])[0]), _kernel_of(at, w, linear)


def _kernel_of(f: Callable[..., Array], w: Array, linear: Dense | Conv) -> Array:
    """The m, in the shape of w, of an affine f(x) = linear(x, m) + constant.

    One window is the whole input; m is the derivative along each of its places.
    """
    window, dilation, groups, channel_axis = w.shape[:-2], (), 1, -1
    if isinstance(linear, Conv):
        linear = dataclasses.replace(linear, strides=1, padding=((0, 0),) * len(window))
        dilation = linear.dilation
        dilation = (dilation,) * len(window) if isinstance(dilation, int) else dilation
        groups, channel_axis = linear.groups, linear.channel_axis
    reach = [(n - 1) * d + 1 for n, d in zip(window, dilation, strict=True)]
    places = tuple(slice(None, None, d) for d in dilation)

    def derivative(place: Array) -> Array:
        one = jax.nn.one_hot(place, math.prod(w.shape[:-1]), dtype=w.dtype).reshape(w.shape[:-1])
        x = jnp.zeros((*reach, w.shape[-2]), w.dtype).at[places].set(one)
        x = jnp.moveaxis(jnp.tile(x, groups)[None], -1, channel_axis)
        slope = jax.jvp(lambda x: f(x, linear=linear), (jnp.zeros_like(x),), (x,))[1]
        return jnp.broadcast_to(slope, linear(x, w).shape).reshape(w.shape[-1])

    return jax.lax.map(derivative, jnp.arange(math.prod(w.shape[:-1])), batch_size=64).reshape(
        w.shape
    )


def _varies(f: Callable[[Array], Any], x: Array) -> bool:
    """Whether `f` looks at the values of x: under vmap, what does not stays unmapped."""
    try:
        jax.eval_shape(jax.vmap(f, out_axes=None), jax.ShapeDtypeStruct((1, *x.shape), x.dtype))
    except ValueError:
        return True
    return False
