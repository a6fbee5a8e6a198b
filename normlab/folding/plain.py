"""Norms of the weights of a whole model, written into plain kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from normlab._arguments import a_function, checked, either, instance, mapping
from normlab._checks import normalize_axes, promote
from normlab._paths import Key, Layer, flatten, layers_of, matches
from normlab.equation import Affine
from normlab.errors import invalid, nearest
from normlab.family.spectral import Spectral, of_u
from normlab.folding.comparison import Apply, FoldedLayer, FoldReport, check_applies, compared
from normlab.folding.kernel import check_finite, rounding
from normlab.maps import WeightMap, named, unnamed

RULE = mapping(
    either("", "", a_function(), instance(WeightMap, "", arrays=False)),
    "paths of layers, each to a function or a WeightMap",
    'pass {"layer": weight_norm}',
)


@checked("plain_weights", rule=RULE)
def plain_weights(
    variables: Mapping[str, Any],
    rule: Mapping[str, Callable[..., Array] | WeightMap],
    *,
    unit_axis: int = -1,
    dtype: DTypeLike | None = None,
    apply: Apply | None = None,
    folded_apply: Apply | None = None,
) -> tuple[dict[str, Any], FoldReport]:
    r"""Writes norms of the weights into plain kernels, for a model without these norms.

    Two kinds of path can be named. A layer with a `kernel`, which becomes `function(kernel)`: so
    for a layer that standardizes its weights. A `flax.linen.WeightNorm`, which holds the lengths
    g of the kernels it wraps: these become `function(kernel, Affine(g, None))`, and the lengths are
    taken out. So are the singular vectors of a `SpectralNorm`, and what a
    `normlab.linen.RegistryWeights` holds; a map of the weights, `normlab.get("spectral")`, reads
    its gain and its state of them, as in inference.

    Args:
      variables: Nested dicts of arrays.
      rule: The path of a layer or wrapper, or a regular expression for the whole of it, to what the
        model does to its kernels, units last: `{r"(.*)WeightNorm_\d+": weight_norm}`. It may be a
        `WeightMap`, as `normlab.get` returns it.
      unit_axis: Where the kernels have their units, as in `fold`.
      dtype: The type the layers compute in, if coarser than that of their kernels.
      apply: The outputs of the model for given variables.
      folded_apply: The outputs of the model without these norms for the new ones.

    Returns:
      The new variables and a `FoldReport`.

    Raises:
      ValueError: For a pattern that fits nothing, a path without kernels, a function that changes
        their shape, numbers that are not finite, or outputs that are not the same.

    >>> from normlab import weight_norm
    >>> variables = {
    ...     "Dense_0": {"kernel": jnp.array([[3.0], [4.0]])},
    ...     "WeightNorm_0": {"Dense_0/kernel/scale": jnp.array([10.0])},
    ... }
    >>> plain_weights(variables, {"WeightNorm_0": weight_norm})[0]
    {'Dense_0': {'kernel': Array([[6.],
           [8.]], dtype=float32)}}
    """
    where = "plain_weights"
    check_applies(where, apply, folded_apply, another=True)
    flat = flatten(variables)
    layers = layers_of(flat)
    new, done = dict(flat), {}
    for path, function, _ in matches(where, rule, layers):
        for key, held in _kernels(where, path, layers, flat):
            (units,) = normalize_axes(where, unit_axis, flat[key].ndim)
            old = jnp.moveaxis(flat[key], units, -1)
            leaves = {name: new.pop(place) for name, place in held.items()}
            kernel = _mapped(f"{where}: {path}", function, old, leaves)
            if key in done or jnp.shape(kernel) != old.shape:
                raise invalid(
                    f"{where}: {path}",
                    f"a kernel named twice, or one of {jnp.shape(kernel)} made of {old.shape}",
                    "one function for each kernel, that keeps its shape",
                    "name either the wrapper or the layer, and return kernels with units last",
                )
            kernel = kernel.astype(old.dtype)
            check_finite(f"{where}: {path}", kernel, kernel)
            new[key] = jnp.moveaxis(kernel, -1, units)
            size = 2 * jnp.abs(promote(kernel)).sum(range(kernel.ndim - 1)).max()
            slope = rounding(kernel.shape, [kernel.dtype, dtype or kernel.dtype]) * float(size)
            (linear,) = (p for p, layer in layers.items() if layer.get("kernel") == key)
            done[key] = FoldedLayer(path, linear, slope, 0.0)
    report = FoldReport(tuple(done.values()))
    return compared(where, variables, new, list(done), report, dtype, apply, folded_apply)


def _mapped(
    where: str, function: Callable[..., Array] | WeightMap, old: Array, leaves: Mapping[str, Array]
) -> Array:
    """The kernel that the layer used, of that which it stored and what a wrapper held beside."""
    if not isinstance(function, WeightMap):
        return function(old, Affine(leaves["scale"], None)) if "scale" in leaves else function(old)
    params, state = function.init_kernel(jax.ShapeDtypeStruct(old.shape, old.dtype))
    arrays = {name: leaves[name] for name in named(state) if name in leaves}
    if isinstance(state, Spectral) and set(arrays) == {"u"}:  # Flax's: [1, C], and σ
        state = of_u(arrays["u"].ravel(), promote(old))
    elif arrays.keys() == named(state).keys():
        state = unnamed(state, arrays)
    else:
        missing = ", ".join(named(state).keys() - arrays.keys())
        change = "name the wrapper that holds it, or pass a function of the kernel"
        raise invalid(where, f"no {missing} of {function!r}", "its state", change)
    fields: tuple[str, ...] = getattr(params, "_fields", ())
    given = {f: leaves.get({"g": "scale"}.get(f, f)) for f in fields}
    return function.kernel(type(params)(**given), state, old, train=False)[0]


def _kernels(
    where: str, path: str, layers: Mapping[str, Layer], flat: Mapping[Key, Any]
) -> list[tuple[Key, dict[str, Key]]]:
    """The kernel of the layer at `path`, or the kernels it wraps, each with what it holds of it."""
    if "kernel" in layers[path]:
        return [(layers[path]["kernel"], {})]
    found: dict[Key, dict[str, Key]] = {}
    for name, key in layers[path].items():
        *inner, leaf = name.split("/")  # Dense_0/kernel of Dense_0/kernel/scale
        base = ("params", *key[1:]) if key[0] == "batch_stats" else key
        places = [(*base[:-2], *inner), (*base[:-1], *inner)]  # beside the wrapper, or in it
        for place in places if inner else ():
            if place in flat:
                found.setdefault(place, {})[leaf] = key
    if sum(map(len, found.values())) != len(layers[path]):
        raise invalid(
            where,
            f"{path!r}, which holds {', '.join(sorted(layers[path]))}",
            "a layer with a kernel, or a wrapper such as WeightNorm and SpectralNorm",
            f"use another: {nearest(path, [p for p, v in layers.items() if 'kernel' in v])}",
        )
    return list(found.items())
