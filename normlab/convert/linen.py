"""flax.linen: `{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from normlab._arguments import anything, checked
from normlab._checks import invalid
from normlab.convert.flax_weight import EPSILON, linen_to_weight, weight_to_linen
from normlab.convert.layers import Layer, axes_from, axes_to, refuse, settings
from normlab.convert.leaves import flatten, nest, take
from normlab.convert.statistics import decay_of, mean_and_var, running
from normlab.convert.value import NORM, Converted, Exported, check
from normlab.equation import Affine

HOME = ("flax.linen", "normlab.linen")
SYNC = {"axis_name": None, "axis_index_groups": None}
NUMBERS = {"dtype": None, "force_float32_reductions": True}
AFFINE = {"epsilon": 1e-6, "use_scale": True, "use_bias": True}

LAYERS = {
    "batch": Layer(
        ("BatchNorm",),
        {**AFFINE, "epsilon": 1e-5, "momentum": 0.99},
        {"axis": -1, "population": "ema", **SYNC, **NUMBERS},
    ),
    "layer": Layer(
        ("LayerNorm",), {**AFFINE, "reduction_axes": -1}, {"feature_axes": -1, **SYNC, **NUMBERS}
    ),
    "rms": Layer(
        ("RMSNorm",),
        {"epsilon": 1e-6, "use_scale": True, "reduction_axes": -1},
        {"feature_axes": -1, **SYNC, **NUMBERS},
    ),
    "group": Layer(
        ("GroupNorm",),
        {**AFFINE, "num_groups": 32, "group_size": None},
        {"reduction_axes": None, **SYNC, **NUMBERS},
    ),
    "instance": Layer(("InstanceNorm",), AFFINE, {"feature_axes": -1, **SYNC, **NUMBERS}),
    "weight": Layer(
        ("WeightNorm",),
        {"epsilon": EPSILON, "use_scale": True},
        {"feature_axes": -1, "dtype": None},
    ),
}
"""The norms of flax.linen; those of flax.nnx have the same names and defaults."""


@checked("from linen", variables=anything)
def from_linen(
    variables: Mapping[str, Any],
    layer: Any,
    *,
    path: str = "",
    allow: Sequence[str] = (),
    **arguments: Any,
) -> Converted:
    """Returns a norm of flax.linen as normlab's.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`, of the layer alone or of a whole model.
      layer: The module, `nn.BatchNorm(...)`, or a kind: `"batch"`, `"layer"`, `"rms"`, `"group"`,
        `"instance"` or `"weight"`.
      path: Where the layer's variables are in a model's, as `"Block_0/BatchNorm_0"`; of weight
        norm, where the layer is whose kernel is normalized, as `"Dense_0"`.
      allow: The conventions that may be lost.
      **arguments: linen's own arguments, where the layer was not made with linen's defaults.

    Raises:
      ValueError: If a leaf is missing, too many or of the wrong shape, an argument unknown, or a
        convention would be lost.

    >>> import jax.numpy as jnp
    >>> variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    >>> from_linen(variables, "layer", epsilon=1e-6).eps
    1e-06
    """
    where = "from linen"
    kind, values = settings(where, LAYERS, HOME, layer, arguments, allow)
    leaves = flatten(where, variables)
    if kind == "weight":
        return linen_to_weight(where, leaves, path, values, allow)
    root = path + "/" if path else ""
    wanted = {ours: f"params/{root}{theirs}" for ours, theirs in affine_names(values).items()}
    if kind == "batch":
        wanted |= {name: f"batch_stats/{root}{name}" for name in ("mean", "var")}
    found = take(where, leaves, wanted, [f"{collection}/{root}" for collection in variables])
    return assemble(where, kind, found, values)


@checked("to linen", norm=NORM)
def to_linen(norm: Converted, *, path: str = "", allow: Sequence[str] = ()) -> Exported:
    """Returns `(variables, arguments)`, the inverse of `from_linen`.

    Args:
      norm: The norm.
      path: Where to put the variables in a model's.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If linen has no such norm, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> to_linen(Converted("layer", Affine(jnp.ones(3), None), eps=1e-5)).arguments
    {'epsilon': 1e-05, 'use_scale': True, 'use_bias': False, 'reduction_axes': -1}
    """
    where = "to linen"
    if check(where, norm).kind == "weight":
        return weight_to_linen(where, norm, path, allow)
    params, statistics, arguments = disassemble(where, norm, allow)
    variables = {"params": nest(path, params)} if params else {}
    if statistics:
        variables["batch_stats"] = nest(path, statistics)
    return Exported(variables, arguments)


def affine_names(values: Mapping[str, Any]) -> dict[str, str]:
    """Flax's names under normlab's, of the parameters that a layer has."""
    names = {"g": ("scale", "use_scale"), "b": ("bias", "use_bias")}
    return {ours: name for ours, (name, flag) in names.items() if values.get(flag)}


def assemble(
    where: str, kind: str, found: Mapping[str, Array], values: Mapping[str, Any]
) -> Converted:
    """Returns a norm of Flax from its leaves and its arguments; not weight norm."""
    state = running(where, found, decay=values["momentum"]) if kind == "batch" else ()
    norm = Converted(
        kind,
        Affine(found.get("g"), found.get("b")),
        state,
        eps=values["epsilon"],
        groups=_groups(where, found, values) if kind == "group" else None,
        axes=axes_from(values["reduction_axes"]) if kind in ("layer", "rms") else "channels",
    )
    return check(where, norm)


def disassemble(
    where: str, norm: Converted, allow: Sequence[str]
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    """Returns Flax's parameters, statistics and arguments of a norm; not of weight norm."""
    lost: dict[str, str] = {}
    g, b = norm.params
    arguments = {"epsilon": norm.eps, "use_scale": g is not None, "use_bias": b is not None}
    statistics = {}
    if norm.kind == "batch":
        mean, var = mean_and_var(where, norm, lost)
        statistics = {"mean": mean, "var": var}
        arguments |= decay_of(norm, "momentum")
    if norm.kind in ("layer", "rms"):
        arguments["reduction_axes"] = axes_to(where, norm.axes)
    if norm.kind == "group":
        arguments["num_groups"] = norm.groups
    if norm.kind == "rms":
        del arguments["use_bias"]
        if b is not None:
            lost["bias"] = "Flax's RMS norm has none: add it after the layer"
    refuse(where, lost, allow)
    names = affine_names(arguments)
    params = {theirs: getattr(norm.params, ours) for ours, theirs in names.items()}
    return params, statistics, arguments


def _groups(where: str, found: Mapping[str, Array], values: Mapping[str, Any]) -> int:
    groups, size = values["num_groups"], values["group_size"]
    channels = next(iter(found.values())).size if found else None
    if size is None:
        return groups
    if channels and groups in (None, channels // size):
        return channels // size
    change = "pass num_groups and group_size=None"
    raise invalid(where, f"num_groups={groups}, group_size={size}", "one of the two", change)
