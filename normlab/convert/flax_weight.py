"""Weight norm of Flax: a wrapper that keeps the gains of a layer whose kernel stays where it is.

In linen a gain lies in the wrapper's scope, under the path of its kernel from where the wrapper is:
`{"Dense_0": {"kernel"}, "WeightNorm_0": {"Dense_0/kernel/scale"}}`, or, if the wrapper made the
layer, `{"layer_instance": {"kernel"}, "layer_instance/kernel/scale"}` in its scope. In nnx the
wrapper holds both: `{"layer_instance": {"kernel"}, "scales": {("kernel",)}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array

from normlab.convert.layers import refuse, spectral
from normlab.convert.leaves import given, nest, take
from normlab.convert.value import Converted, Exported, check
from normlab.equation import Affine

EPSILON = 1e-12
"""Flax's default ε."""


def linen_to_weight(
    where: str,
    leaves: Mapping[str, Any],
    path: str,
    values: Mapping[str, Any],
    allow: Sequence[str],
) -> Converted:
    """Returns weight norm from linen's leaves, `path` being that of the wrapped layer."""
    at = path or "layer_instance"
    layer = f"params/{at}/"
    if any(_wraps(name, f"batch_stats/{at}/kernel/u") for name in leaves):
        raise spectral(where)
    gains = [name for name in leaves if _wraps(name, f"{layer}kernel/scale")]
    gain = gains[0] if len(gains) == 1 else f"params/WeightNorm_0/{at}/kernel/scale"
    within = [layer, *(name.removesuffix("kernel/scale") for name in gains)]
    return _from_leaves(where, leaves, layer, gain, within, values, allow)


def nnx_to_weight(
    where: str,
    leaves: Mapping[str, Any],
    root: str,
    values: Mapping[str, Any],
    allow: Sequence[str],
) -> Converted:
    """Returns weight norm from nnx's leaves, `root` being the prefix of the wrapper's."""
    layer, gain = root + "layer_instance/", root + "scales/kernel"
    if root + "batch_stats/kernel/u" in leaves:
        raise spectral(where)
    return _from_leaves(where, leaves, layer, gain, [root], values, allow)


def weight_to_linen(where: str, norm: Converted, path: str, allow: Sequence[str]) -> Exported:
    """The inverse of `linen_to_weight`."""
    layer, g, arguments = _to_leaves(where, norm, allow)
    scope, _, name = (path or "layer_instance").rpartition("/")
    gain = {} if g is None else {f"{name}/kernel/scale": g}
    if gain and name != "layer_instance":
        gain = {"WeightNorm_0": gain}
    return Exported({"params": nest(scope, {name: layer, **gain})}, arguments)


def weight_to_nnx(where: str, norm: Converted, path: str, allow: Sequence[str]) -> Exported:
    """The inverse of `nnx_to_weight`."""
    layer, g, arguments = _to_leaves(where, norm, allow)
    gain = {} if g is None else {"scales": {("kernel",): g}}
    return Exported(nest(path, {"layer_instance": layer, **gain}), arguments)


def _from_leaves(
    where: str,
    leaves: Mapping[str, Any],
    layer: str,
    gain: str,
    within: Sequence[str],
    values: Mapping[str, Any],
    allow: Sequence[str],
) -> Converted:
    wanted = {"kernel": layer + "kernel"}
    if layer + "bias" in leaves:
        wanted["b"] = layer + "bias"
    if values["use_scale"]:
        wanted["g"] = gain
    found = take(where, leaves, wanted, within)
    refuse(where, _lost_epsilon(found["kernel"], values["epsilon"]), allow)
    params = Affine(found.get("g"), found.get("b"))
    return check(where, Converted("weight", params, kernel=found["kernel"]))


def _to_leaves(
    where: str, norm: Converted, allow: Sequence[str]
) -> tuple[dict[str, Array], Array | None, dict[str, Any]]:
    """The wrapped layer's leaves, the gain, and the wrapper's arguments."""
    refuse(where, _lost_epsilon(norm.kernel, EPSILON), allow)
    g, b = norm.params
    arguments = {"epsilon": EPSILON, "use_scale": g is not None}
    return given({"kernel": norm.kernel, "bias": b}), g, arguments


def _lost_epsilon(kernel: Any, eps: float) -> dict[str, str]:
    """What is lost with Flax's ε in σ = √(‖v‖² + ε): nothing, if it is below rounding."""
    square = np.square(np.asarray(kernel, np.float64)).sum(axis=tuple(range(kernel.ndim - 1)))
    smallest = square[square > 0].min(initial=np.inf)
    if eps <= smallest * 2.0**-24:
        return {}
    text = f"{eps:g} under the root, where a unit has ‖v‖² = {smallest:.3g}: normlab has no ε there"
    return {"epsilon": text}


def _wraps(name: str, leaf: str) -> bool:
    """Whether a leaf has that path, or has it less the name of a wrapper."""
    parts = name.split("/")
    return leaf in (name, *("/".join(parts[:i] + parts[i + 1 :]) for i in range(1, len(parts))))
