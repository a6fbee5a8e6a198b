"""Folding the norms of a whole model, by the paths of its variables (see `normlab._paths`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from normlab._arguments import checked, flag, mapping, text
from normlab._checks import promote_dtype
from normlab._paths import Key, Layer, flatten, layers_of, matches
from normlab.equation import Parts
from normlab.errors import invalid, nearest
from normlab.folding.comparison import Apply, FoldedLayer, FoldReport, check_applies, compared
from normlab.folding.kernel import check_finite, fold, rounding

_NEUTRAL = {"mean": 0.0, "bias": 0.0, "scale": 1.0, "var": 1.0}
_STATISTICS = {"mean", "var"}


RULE = mapping(text("", ""), "paths of norms, each to that of a layer", 'pass {"norm": "layer"}')


@checked("fold_model", rule=RULE, remove=flag())
def fold_model(
    variables: Mapping[str, Any],
    rule: Mapping[str, str],
    *,
    eps: float = 1e-5,
    unit_axis: int = -1,
    remove: bool = False,
    dtype: DTypeLike | None = None,
    apply: Apply | None = None,
    folded_apply: Apply | None = None,
) -> tuple[dict[str, Any], FoldReport]:
    r"""Folds the batch norms of a model, as at inference, into the linear layers before them.

    A norm is a path with `mean` and `var`, and `scale` and `bias` if it has them; a linear layer is
    a path with a `kernel`, and a `bias` if it has one.

    The result has the structure of `variables` and runs in the same model: a folded norm becomes
    the identity, exactly (mean 0, var 1 − ε, scale 1, bias 0). If the linear layer has no bias, the
    norm keeps what belongs there, in its `bias`, or negated in its `mean`. With `remove=True` the
    norms are taken out instead, and every folded layer has a `bias`: for a model built without
    these norms.

    Variables do not say what a model computes. Give `apply`, and the fold is refused unless the
    outputs stay as they were, to what rounding explains. That finds a wrong ε, a function between
    the layer and the norm, and a second reader of the layer's output.

    Args:
      variables: Nested dicts of arrays.
      rule: The path of a norm, or a regular expression for the whole of it, to the path of the
        linear layer before it, in which `\1` stands for the expression's first group.
      eps: ε of the norms, which their variables do not hold. Where it differs, fold twice.
      unit_axis: Where the kernels have their units, as in `fold`.
      remove: Whether to take the norms out.
      dtype: The type the layers compute in, if coarser than that of their kernels.
      apply: The outputs of the model at inference for given variables, for example
        `lambda variables: model.apply(variables, x, train=False)`.
      folded_apply: The same for the folded variables, if they belong to another model.

    Returns:
      The new variables and a `FoldReport`.

    Raises:
      ValueError: For a pattern that fits nothing, a norm without population statistics, a path
        without a kernel, a layer before two norms, shapes that do not fit, numbers that are not
        finite, or outputs that are not the same.

    >>> variables = {
    ...     "Dense_0": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([1.0])},
    ...     "BatchNorm_0": {"mean": jnp.array([3.0]), "var": jnp.array([0.75])},
    ... }
    >>> folded, _ = fold_model(variables, {r"BatchNorm_(\d+)": r"Dense_\1"}, eps=0.25)
    >>> folded["Dense_0"]["kernel"].tolist(), folded["Dense_0"]["bias"].tolist()
    ([[2.0]], [-2.0])
    """
    where = "fold_model"
    check_applies(where, apply, folded_apply, another=remove)
    flat = flatten(variables)
    layers = layers_of(flat)
    new, done, changed = dict(flat), [], []
    for path, target in _pairs(where, rule, layers):
        norm, kernel_key = layers[path], layers[target]["kernel"]
        kernel, bias = flat[kernel_key], flat.get(layers[target].get("bias", ()))
        parts = _parts(f"{where}: {path} after {target}", norm, flat, kernel, bias, unit_axis, eps)
        folded, b = fold(parts, kernel, bias, unit_axis=unit_axis)
        if remove:
            new = {key: value for key, value in new.items() if key not in norm.values()}
        else:
            new |= {norm[n]: _neutral(n, flat[norm[n]], eps) for n in _NEUTRAL if n in norm}
        if remove or bias is not None:
            bias_key = (*kernel_key[:-1], "bias")
        else:
            bias_key = norm.get("bias", norm["mean"])
        b = b.astype(flat.get(bias_key, kernel).dtype)
        check_finite(f"{where}: {path} after {target}", folded, b)
        new |= {kernel_key: folded, bias_key: -b if bias_key == norm["mean"] else b}
        changed += [kernel_key, bias_key]
        unit = rounding(kernel.shape, [kernel.dtype, b.dtype, dtype or kernel.dtype], unit_axis)
        slope, offset = _sizes(parts, kernel, bias, folded, b, unit_axis)
        done.append(FoldedLayer(path, target, unit * slope, unit * offset))
    paths = {layer.norm for layer in done}
    left = (path for path, layer in layers.items() if layer.keys() >= _STATISTICS)
    report = FoldReport(tuple(done), tuple(path for path in left if path not in paths))
    return compared(where, variables, new, changed, report, dtype, apply, folded_apply)


def _pairs(
    where: str, rule: Mapping[str, str], layers: Mapping[str, Layer]
) -> list[tuple[str, str]]:
    """The paths of the norms that the rule names, each with that of the layer before it."""
    linears = [path for path, layer in layers.items() if "kernel" in layer]
    pairs = {}
    for path, template, match in matches(where, rule, layers):
        if not layers[path].keys() >= _STATISTICS:
            raise invalid(
                where,
                f"{path!r}, which holds {', '.join(sorted(layers[path]))}",
                "a norm with population statistics, mean and var: what measures μ or σ on its "
                "input, as layer, RMS, group and instance norm do, cannot be folded",
                "make the patterns narrower, and keep such a norm as a layer of its own; of a "
                "population state write read() out as mean and var",
            )
        try:
            target = match.expand(template) if match else template
        except (re.error, IndexError) as error:
            raise invalid(
                where, f"{template!r} for {path!r}: {error}", "groups of the pattern", "correct it"
            ) from error
        if target not in linears:
            raise invalid(
                where,
                f"{target!r} as the layer before {path!r}, which has no kernel",
                "the path of a layer with a kernel",
                f"use a known one: {nearest(target, linears)}",
            )
        if target in pairs:
            raise invalid(
                where,
                f"{target!r} as the layer before both {pairs[target]!r} and {path!r}",
                "one norm after each layer: a kernel can hold only one",
                "keep both norms, or give each a layer of its own",
            )
        pairs[target] = path
    return [(path, target) for target, path in pairs.items()]


def _parts(
    where: str,
    norm: Layer,
    flat: Mapping[Key, Any],
    kernel: Array,
    bias: Array | None,
    unit_axis: int,
    eps: float,
) -> Parts:
    """The parts of the norm at inference, each `[C]`."""
    given = {name: flat[norm[name]] for name in _NEUTRAL if name in norm}
    channels = kernel.shape[unit_axis] if -kernel.ndim <= unit_axis < kernel.ndim else None
    shapes = {jnp.shape(v) for v in (*given.values(), *([] if bias is None else [bias]))}
    if shapes != {(channels,)}:
        raise invalid(
            where,
            f"a kernel of shape {kernel.shape}, its bias and the norm's variables of shapes "
            f"{', '.join(map(str, shapes))}",
            f"one value for each unit on axis {unit_axis} of the kernel",
            "correct the rule, set unit_axis, or fold the layers of a scan one by one with fold",
        )
    dtype = promote_dtype(kernel)
    for value in given.values():
        dtype = jnp.promote_types(dtype, promote_dtype(value))
    given = {n: given.get(n, jnp.full(channels, v)).astype(dtype) for n, v in _NEUTRAL.items()}
    return Parts(given["mean"], jnp.sqrt(given["var"] + eps), given["scale"], given["bias"])


def _neutral(name: str, value: Array, eps: float) -> Array:
    """What makes the norm the identity. (1 − ε) + ε is 1, not nearly 1, in the type of `value`."""
    neutral = jnp.full_like(value, _NEUTRAL[name])
    return neutral - jnp.asarray(eps, value.dtype) if name == "var" else neutral


def _sizes(
    parts: Parts, kernel: Array, bias: Array | None, folded: Array, b: Array, unit_axis: int
) -> tuple[float, float]:
    """The largest Σ|w| and Σ|b| of a channel, before and after folding together."""

    def size(v: Array) -> np.ndarray:
        return np.abs(np.asarray(v, np.float64))

    def lengths(w: Array) -> np.ndarray:
        return np.moveaxis(size(w), unit_axis, 0).reshape(w.shape[unit_axis], -1).sum(1)

    mu, sigma, g, after = map(size, parts)
    slope = g / sigma * lengths(kernel) + lengths(folded)
    offset = g / sigma * (mu + (0 if bias is None else size(bias))) + after + size(b)
    return float(slope.max()), float(offset.max())
