"""Keras 3: a layer, or its variables by name: `gamma`, `beta`, `moving_mean`, `moving_variance`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from normlab._arguments import anything, checked
from normlab.convert.leaves import flatten, near, numbers, take
from normlab.convert.library import Layer, Library, refuse
from normlab.convert.spectral import EPSILON, from_vectors, to_vectors
from normlab.convert.statistics import mean_and_var
from normlab.convert.value import NORM, Converted, Exported, check
from normlab.errors import invalid

AFFINE = {"epsilon": 1e-3, "scale": True, "center": True}
FLOAT = {"compute_dtype": "float32"}
BATCH = {"axis": -1, "renorm": False, "synchronized": False, "trainable": True, **FLOAT}

KERAS = Library(
    "Keras",
    ("keras",),
    {
        "batch": Layer(("BatchNormalization",), {**AFFINE, "momentum": 0.99}, BATCH),
        "layer": Layer(
            ("LayerNormalization",), {**AFFINE, "axis": -1}, {"rms_scaling": False, **FLOAT}
        ),
        "rms": Layer(("RMSNormalization",), {"epsilon": 1e-6, "axis": -1}, FLOAT),
        "group": Layer(("GroupNormalization",), {**AFFINE, "groups": 32}, {"axis": -1, **FLOAT}),
        "instance": Layer((), AFFINE, {"groups": -1, "axis": -1, **FLOAT}),
        "spectral": Layer(("SpectralNormalization",), {"power_iterations": 1}, FLOAT),
    },
    {"eps": "epsilon", "decay": "momentum", "groups": "groups", "axes": "axis"}
    | {"g": "scale", "b": "center"},
    {"g": "gamma", "b": "beta", "mean": "moving_mean", "var": "moving_variance"},
    own_axes=True,
)
RMS = {"g": "scale"}
"""What RMS norm has, always and without a word for it."""


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
      layer: The layer, if `variables` is not it, or a kind: `"batch"`, `"layer"`, `"rms"`,
        `"group"` or `"spectral"`, which comes before the class of a layer: that says its own
        arguments all the same. `groups=-1`, or as many as channels, is instance norm.
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
    kind, values = KERAS.settings(where, layer, arguments, allow, module=module)
    if module is not None:
        if not getattr(module, "built", True):
            change = "call it on a batch, or build it with the shape of its input"
            raise invalid(where, "a layer that is not built", "one with variables", change)
        variables = {root + v.name: v for v in module.variables}
    leaves = flatten(where, variables)
    if kind == "spectral":
        names = {"kernel": "kernel", "u": "vector_u", "b": "bias"}
        names = {n: root + v for n, v in names.items() if n != "b" or root + v in leaves}
        found = take(where, leaves, names, [root])
        how: Any = {"writes": True, "divides": False}
        return from_vectors(where, found, values["power_iterations"], EPSILON, allow, **how)
    names = RMS if kind == "rms" else KERAS.wanted(kind, values)
    found = take(where, leaves, {n: root + name for n, name in names.items()}, [root])
    if kind == "group" and values["groups"] in (-1, *(v.size for v in found.values())):
        kind = "instance"
    return KERAS.converted(where, kind, found, values)


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
    >>> from normlab import Affine
    >>> to_keras(Converted("instance", Affine(jnp.ones(4), None), eps=1e-3)).arguments
    {'epsilon': 0.001, 'scale': True, 'center': False, 'groups': -1}
    """
    where = "to keras"
    lost: dict[str, str] = {}
    root = path + "/" if path else ""
    if check(where, norm).kind == "spectral":
        found = to_vectors(where, norm, allow, writes=True)
        sigma = jnp.where(found["sigma"] == 0, 1, found["sigma"])
        leaves = {"kernel": (found["kernel"] / sigma).astype(found["kernel"].dtype)}
        leaves |= {"vector_u": found["u"][None]} | ({"bias": found["b"]} if "b" in found else {})
        made = numbers({root + name: v for name, v in leaves.items()})
        return Exported(made, {"power_iterations": norm.steps})
    arguments = KERAS.arguments(where, norm, lost)
    variables = KERAS.params(norm)
    if norm.kind == "instance":
        arguments["groups"] = -1
    if norm.kind == "rms":
        variables = {RMS["g"]: norm.params.g}
        if norm.params.g is None:
            lost["scale"] = "none: Keras's RMS norm always has one, which would be 1"
    if norm.kind == "batch":
        names = (KERAS.leaves["mean"], KERAS.leaves["var"])
        variables |= zip(names, mean_and_var(where, norm, lost), strict=True)
    refuse(where, lost, allow)
    return Exported(numbers({root + name: v for name, v in variables.items()}), arguments)


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
