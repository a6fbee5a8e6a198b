"""Norms of the weights of a whole model, written into plain kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from normlab._arguments import a_function, checked, mapping
from normlab._checks import normalize_axes, promote
from normlab._paths import Key, Layer, flatten, layers_of, matches
from normlab.equation import Affine
from normlab.errors import invalid, nearest
from normlab.folding.comparison import Apply, FoldedLayer, FoldReport, check_applies, compared
from normlab.folding.kernel import check_finite, rounding

RULE = mapping(a_function(), "paths of layers, each to a function", 'pass {"layer": weight_norm}')


@checked("plain_weights", rule=RULE)
def plain_weights(
    variables: Mapping[str, Any],
    rule: Mapping[str, Callable[..., Array]],
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
    taken out.

    Args:
      variables: Nested dicts of arrays.
      rule: The path of a layer or wrapper, or a regular expression for the whole of it, to what the
        model does to its kernels, units last: `{r"(.*)WeightNorm_\d+": weight_norm}`.
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
        for key, length in _kernels(where, path, layers, flat):
            (units,) = normalize_axes(where, unit_axis, flat[key].ndim)
            old = jnp.moveaxis(flat[key], units, -1)
            kernel = (
                function(old) if length is None else function(old, Affine(new.pop(length), None))
            )
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


def _kernels(
    where: str, path: str, layers: Mapping[str, Layer], flat: Mapping[Key, Any]
) -> list[tuple[Key, Key | None]]:
    """The kernel of the layer at `path`, or the kernels it wraps, each with its length."""
    if "kernel" in layers[path]:
        return [(layers[path]["kernel"], None)]
    found = []
    for name, key in layers[path].items():
        inner = tuple(name.split("/")[:-1])  # Dense_0/kernel of Dense_0/kernel/scale
        places = [(*key[:-2], *inner), (*key[:-1], *inner)]  # beside the wrapper, or in it
        found += [
            (place, key)
            for place in places
            if name == "/".join((*inner, "scale")) and place in flat
        ]
    if len(found) != len(layers[path]):
        raise invalid(
            where,
            f"{path!r}, which holds {', '.join(sorted(layers[path]))}",
            "a layer with a kernel, or a flax.linen.WeightNorm of kernels",
            f"use another: {nearest(path, [p for p, v in layers.items() if 'kernel' in v])}",
        )
    return found
