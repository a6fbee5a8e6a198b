"""Keras 3: a layer, or its variables by name: `gamma`, `beta`, `moving_mean`, `moving_variance`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normlab._arguments import anything, checked
from normlab._checks import invalid
from normlab.convert.layers import Layer, axes_from, axes_to, refuse, settings, supported
from normlab.convert.leaves import flatten, near, numbers, take
from normlab.convert.statistics import decay_of, mean_and_var, running
from normlab.convert.value import NORM, Converted, Exported, check
from normlab.equation import Affine

HOME = ("keras",)
AFFINE = {"epsilon": 1e-3, "scale": True, "center": True}
FLOAT = {"compute_dtype": "float32"}
BATCH = {"axis": -1, "renorm": False, "synchronized": False, "trainable": True, **FLOAT}

LAYERS = {
    "batch": Layer(("BatchNormalization",), {**AFFINE, "momentum": 0.99}, BATCH),
    "layer": Layer(
        ("LayerNormalization",), {**AFFINE, "axis": -1}, {"rms_scaling": False, **FLOAT}
    ),
    "rms": Layer(("RMSNormalization",), {"epsilon": 1e-6, "axis": -1}, FLOAT),
    "group": Layer(("GroupNormalization",), {**AFFINE, "groups": 32}, {"axis": -1, **FLOAT}),
}


@checked("from keras", variables=anything)
def from_keras(
    variables: Any,
    layer: Any = None,
    *,
    path: str = "",
    allow: Sequence[str] = (),
    **arguments: Any,
) -> Converted:
    """Returns a norm of Keras 3 as normlab's.

    Args:
      variables: The layer, or variables by name or path, `{v.path: v for v in model.variables}`.
      layer: The layer, if `variables` is not it, or a kind: `"batch"`, `"layer"`, `"rms"` or
        `"group"`, which comes before the class of a layer: that says its own arguments all the
        same. `groups=-1`, or as many as channels, is instance norm.
      path: Where the layer's variables are in a model's, as `"model/batch_normalization"`.
      allow: The conventions that may be lost.
      **arguments: Keras's own arguments, where the layer was not made with its defaults.

    Raises:
      ValueError: If a leaf is missing, too many or of the wrong shape, an argument unknown, or a
        convention would be lost.

    >>> import jax.numpy as jnp
    >>> from_keras({"gamma": jnp.ones(4), "beta": jnp.zeros(4)}, "group", groups=2).eps
    0.001
    """
    where = "from keras"
    root = path + "/" if path else ""
    module = _layer(where, variables, path) if hasattr(variables, "variables") else None
    layer = module or variables if layer is None else layer
    kind, values = settings(where, LAYERS, HOME, layer, arguments, allow, module=module)
    if module is not None:
        if not getattr(module, "built", True):
            change = "call it on a batch, or build it with the shape of its input"
            raise invalid(where, "a layer that is not built", "one with variables", change)
        variables = {root + v.name: v for v in module.variables}
    leaves = flatten(where, variables)
    wanted = {ours: root + theirs for ours, theirs in _names(kind, values).items()}
    found = take(where, leaves, wanted, [root])
    groups = values["groups"] if kind == "group" else None
    channels = next(iter(found.values())).size if found else None
    if groups is not None and groups in (-1, channels):
        kind, groups = "instance", None
    norm = Converted(
        kind,
        Affine(found.get("g"), found.get("b")),
        running(where, found, decay=values["momentum"]) if kind == "batch" else (),
        eps=values["epsilon"],
        groups=groups,
        axes=axes_from(values["axis"]) if kind in ("layer", "rms") else "channels",
    )
    return check(where, norm)


@checked("to keras", norm=NORM)
def to_keras(norm: Converted, *, path: str = "", allow: Sequence[str] = ()) -> Exported:
    """Returns `(variables, arguments)`, the inverse of `from_keras`.

    The variables are NumPy arrays by name: `for v in layer.variables: v.assign(variables[v.name])`.

    Args:
      norm: The norm.
      path: Where to put the variables in a model's.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If Keras has no such norm, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> to_keras(Converted("instance", Affine(jnp.ones(4), None), eps=1e-3)).arguments
    {'epsilon': 0.001, 'scale': True, 'center': False, 'groups': -1}
    """
    where = "to keras"
    kind = "group" if check(where, norm).kind == "instance" else norm.kind
    supported(where, LAYERS, kind, "write the kernel that weight_norm returns")
    lost: dict[str, str] = {}
    g, b = norm.params
    values = {"g": g, "b": b}
    arguments: dict[str, Any] = {"epsilon": norm.eps, "scale": g is not None}
    arguments["center"] = b is not None
    if kind == "batch":
        values["mean"], values["var"] = mean_and_var(where, norm, lost)
        arguments |= decay_of(norm, "momentum")
    if kind in ("layer", "rms"):
        arguments["axis"] = axes_to(where, norm.axes)
    if kind == "group":
        arguments["groups"] = -1 if norm.groups is None else norm.groups
    if kind == "rms":
        del arguments["scale"], arguments["center"]
        if g is None:
            lost["scale"] = "none: Keras's RMS norm always has one, which would be 1"
        if b is not None:
            lost["bias"] = "Keras's RMS norm has none: add it after the layer"
    refuse(where, lost, allow)
    root = path + "/" if path else ""
    named = {root + theirs: values[ours] for ours, theirs in _names(kind, arguments).items()}
    return Exported(numbers(named), arguments)


def _layer(where: str, model: Any, path: str) -> Any:
    """The layer at a path of a model, which is that of its variables."""
    if not path:
        return model
    layers, found = [model], {}
    while layers:
        layer = layers.pop()
        found[getattr(layer, "path", None) or layer.name] = layer
        layers += getattr(layer, "layers", [])
    if path not in found:
        change = f"name a layer of it, as {near([path], found)}"
        raise invalid(where, f"path={path!r}", "where a layer is in the model", change)
    return found[path]


def _names(kind: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Keras's names under normlab's, of the variables that a layer has."""
    if kind == "rms":
        return {"g": "scale"}
    flags = {"g": ("gamma", "scale"), "b": ("beta", "center")}
    names = {ours: name for ours, (name, flag) in flags.items() if values[flag]}
    if kind == "batch":
        names |= {"mean": "moving_mean", "var": "moving_variance"}
    return names
