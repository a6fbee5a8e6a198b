"""Gradients by layer: lengths, means, and what the steps of the layers before change in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import array, checked, instance, integer, mapping, sequence, text, tree
from normlab.equation import Parts
from normlab.errors import invalid, nearest
from normlab.instruments.vectors import as_vector, check_alike, cosine, norm


@checked("gradient norms", depth=integer("1 or more", "use 1 for top-level keys", 1))
def gradient_norms(grads: Any, *, depth: int = 1) -> dict[str, Array]:
    """‖g‖₂ of each layer: whether gradients vanish or explode with depth.

    Bengio, Simard & Frasconi 1994; Glorot & Bengio 2010
    (https://proceedings.mlr.press/v9/glorot10a.html) compare layers by it. Gradients of 1e-30 or
    1e30 keep their norm: nothing that small or large is squared.

    Args:
      grads: A pytree, such as what `jax.grad` returns for the `params` of a model.
      depth: How many names of the path make a layer: 1 for the top-level keys, 2 to tell the
        `norm` from the `kernel` inside `{"Normed_0": {"kernel": …, "norm": {…}}}`.

    Returns:
      The norms by path, written `Normed_0/norm`. The order is that of the pytree: JAX sorts the
      keys of dicts.

    Raises:
      ValueError: If `depth` is less than 1.

    >>> grads = {"Dense_0": {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array(4.0)}}
    >>> gradient_norms(grads), list(gradient_norms(grads, depth=2))
    ({'Dense_0': Array(5., dtype=float32)}, ['Dense_0/bias', 'Dense_0/kernel'])
    """
    layers: dict[str, list[Array]] = {}
    for path, g in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path[:depth], simple=True, separator="/")
        layers.setdefault(name, []).append(g)
    return {name: norm(as_vector(gs)) for name, gs in layers.items()}


class Backward(NamedTuple):
    """What the gradient meets in a norm, with z = (a − μ)/σ and g = ∂L/∂z.

    Attributes:
      g: The mean of ∂L/∂z over the values that one σ is of.
      gz: That of ∂L/∂z · z. Of batch norm both are what its gradient loses.

    >>> from normlab import Parts, affine
    >>> parts, a = Parts(*map(jnp.float32, (0, 1, 1, 0))), jnp.array([[1.0], [3.0]])
    >>> seen = jax.grad(lambda t: affine(tapped(parts, t, a), a).mean())(tap(parts))
    >>> seen.g.item(), seen.gz.item()                                  # g = 1/2, z = 1 and 3
    (0.5, 1.0)
    """

    g: Array
    gz: Array


@checked("tap")
def tap(parts: Parts) -> Backward:
    """Zeros, for `tapped`: one for each σ.

    Args:
      parts: Of a norm, or their shapes.

    >>> from normlab import layer_parts
    >>> tap(layer_parts(jnp.ones((4, 3)))).g.shape
    (4, 1)
    """
    shape = jnp.broadcast_shapes(parts.mu.shape, parts.sigma.shape)
    zeros = jnp.zeros(shape, parts.sigma.dtype)
    return Backward(zeros, zeros)


@checked("tapped", a=array(), tap=instance(Backward, "make it with tap(parts)"))
def tapped(parts: Parts, tap: Backward, a: ArrayLike) -> Parts:
    """The parts of a norm, with a tap: its gradient is what the backward pass has met there.

        μ − σ·tap.g/n        σ·(1 − tap.gz/n)

    of which the derivatives by the tap, at zero, are ⟨∂L/∂z⟩ and ⟨∂L/∂z · z⟩: no further pass, and
    to the bit the same parts. On several devices each finds its own share.

    Args:
      parts: Of any norm.
      tap: Zeros, from `tap`.
      a: What the parts are applied to.

    >>> from normlab import Parts, affine
    >>> parts, a = Parts(*map(jnp.float32, (1.0, 2.0, 3.0, 0.0))), jnp.array([[1.0], [5.0]])
    >>> loss = lambda seen: jnp.square(affine(tapped(parts, seen, a), a)).sum() / 2
    >>> [v.item() for v in jax.grad(loss)(tap(parts))]                 # h = 0, 6 and g = 0, 18
    [9.0, 18.0]
    """
    n = jnp.size(a) / max(tap.gz.size, 1)
    mu = parts.mu - parts.sigma * (tap.g / n)
    return parts._replace(mu=mu, sigma=parts.sigma * (1 - tap.gz / n))


class CovariateShift(NamedTuple):
    """How the steps of the layers before it change each layer's gradient.

    Attributes:
      distance: `[L]`, ‖G − G′‖₂; 0 for the first layer.
      cosine: `[L]`, of the angle between G and G′; 0 where one of them is zero.
      norm: `[L]`, ‖G‖₂.
      norm_after: `[L]`, ‖G′‖₂.

    >>> def loss(p):
    ...     return 0.5 * (p["first"] * p["second"]) ** 2
    >>> before, after = {"first": 2.0, "second": 3.0}, {"first": 1.0, "second": 7.0}
    >>> found = covariate_shift(loss, before, after, layers=["first", "second"])
    >>> found.norm.tolist(), found.norm_after.tolist(), found.cosine.round(2).tolist()
    ([18.0, 12.0], [18.0, 3.0], [1.0, 1.0])
    """

    distance: Array
    cosine: Array
    norm: Array
    norm_after: Array


LAYERS = mapping(
    tree("", "", jnp.floating), "parameters by layer", "pass a dict of pytrees of arrays"
)


@checked(
    "covariate shift",
    before=LAYERS,
    after=LAYERS,
    layers=sequence(text("", ""), "the keys of the layers", "list them from input to output"),
)
def covariate_shift(
    loss: Callable[[Any], Array],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    layers: Sequence[str],
) -> CovariateShift:
    """Internal covariate shift as Santurkar et al. 2018 define it (definition 2.1).

    For layer i, on one batch:

        G_i  = gradient of the loss by W_i at (W_1, …, W_k)
        G′_i = the same after the layers before it took their step: (W′_1, …, W′_{i−1}, W_i, …, W_k)

    ‖G − G′‖ is what the layer could not know when it took its own step
    (https://arxiv.org/abs/1805.11604). It costs one gradient per layer, in a loop that is compiled
    once.

    Args:
      loss: The loss of one batch, a function of the parameters alone.
      before: The parameters by layer, those of the step's start.
      after: The parameters after the step, of the same structure.
      layers: Keys of `before` from the input to the output. Not read off the dict: `jit` sorts its
        keys, and `Dense_10` comes before `Dense_2`. What is not named stays as in `before`.

    Returns:
      `CovariateShift`, in the order of `layers`.

    Raises:
      ValueError: If a layer is unknown or named twice, or there is none.

    >>> def loss(p):
    ...     return 0.5 * (p["first"] * p["second"]) ** 2
    >>> before, after = {"first": 2.0, "second": 3.0}, {"first": 1.0, "second": 7.0}
    >>> covariate_shift(loss, before, after, layers=["first", "second"]).distance.tolist()
    [0.0, 9.0]
    """
    _check_layers(before, after, layers)
    check_alike("covariate shift", dict(before), dict(after))
    start = jax.tree.map(jnp.asarray, dict(before))

    def mixed(i: Array) -> dict[str, Any]:
        params = dict(start)
        for k, name in enumerate(layers):
            params[name] = jax.tree.map(partial(jnp.where, k < i), after[name], start[name])
        return params

    def measure(first: Any, i: Array) -> tuple[Any, CovariateShift]:
        later = jax.grad(loss)(mixed(i))
        # With no layer before it, the mixed parameters are those of the start, and this is G.
        first = jax.tree.map(lambda g, g2: jnp.where(i == 0, g2, g), first, later)
        pairs = [(as_vector(first[name]), as_vector(later[name])) for name in layers]
        rows = [CovariateShift(norm(g - g2), cosine(g, g2), norm(g), norm(g2)) for g, g2 in pairs]
        return first, jax.tree.map(lambda *values: jnp.stack(values)[i], *rows)

    return lax.scan(measure, jax.tree.map(jnp.zeros_like, start), jnp.arange(len(layers)))[1]


def _check_layers(before: Mapping[str, Any], after: Mapping[str, Any], layers: Sequence[str]):
    where = "covariate shift"
    if not layers or len(set(layers)) != len(layers):
        raise invalid(
            where,
            f"layers={layers!r}",
            "the keys of the layers, each once",
            "list them from the input to the output",
        )
    for name in layers:
        if name not in before or name not in after:
            raise invalid(
                where,
                f"a layer {name!r} that the parameters do not have",
                "top-level keys of before and after",
                f"use a known one: {nearest(str(name), map(str, before))}",
            )
