"""flax.nnx: a module, its `nnx.State` or a plain dict: `{"scale", "bias", "mean", "var"}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normlab._arguments import anything, checked
from normlab._checks import invalid
from normlab.convert.flax_weight import nnx_to_weight, weight_to_nnx
from normlab.convert.layers import Layer, is_a, settings, spectral
from normlab.convert.leaves import flatten, given, nest, take
from normlab.convert.linen import LAYERS as LINEN
from normlab.convert.linen import affine_names, assemble, disassemble
from normlab.convert.value import NORM, Converted, Exported, check

HOME = ("flax.nnx", "normlab.nnx")
LAYERS = {
    kind: Layer(
        layer.classes,
        layer.arguments,
        {name: value for name, value in layer.fixed.items() if name != "force_float32_reductions"},
    )
    for kind, layer in LINEN.items()
}


@checked("from nnx", variables=anything)
def from_nnx(
    variables: Any,
    layer: Any = None,
    *,
    path: str = "",
    allow: Sequence[str] = (),
    **arguments: Any,
) -> Converted:
    """Returns a norm of flax.nnx as normlab's.

    Args:
      variables: The module, or the variables of the layer or of a whole model: an `nnx.State` or
        nested dicts of arrays.
      layer: The module, if `variables` is not it, or a kind: `"batch"`, `"layer"`, `"rms"`,
        `"group"`, `"instance"` or `"weight"`, which comes before the class of the module: that
        says its own arguments all the same.
      path: Where the layer is in a model, as `"blocks/0/norm"`.
      allow: The conventions that may be lost.
      **arguments: nnx's own arguments, where the layer was not made with nnx's defaults.

    Raises:
      ValueError: As `from_linen`.

    >>> import jax.numpy as jnp
    >>> from_nnx({"scale": jnp.ones(3), "bias": jnp.zeros(3)}, "layer").eps
    1e-06
    """
    where = "from nnx"
    module = None if hasattr(variables, "items") else _submodule(where, variables, path)
    layer = (variables if module is None else module) if layer is None else layer
    kind, values = settings(where, LAYERS, HOME, layer, arguments, allow, module=module)
    if module is not None:
        variables = nest(path, _variables(where, module, kind))
    leaves = flatten(where, variables)
    root = path + "/" if path else ""
    if kind == "weight":
        return nnx_to_weight(where, leaves, root, values, allow)
    wanted = {ours: root + theirs for ours, theirs in affine_names(values).items()}
    if kind == "batch":
        wanted |= {name: root + name for name in ("mean", "var")}
    return assemble(where, kind, take(where, leaves, wanted, [root]), values)


@checked("to nnx", norm=NORM)
def to_nnx(norm: Converted, *, path: str = "", allow: Sequence[str] = ()) -> Exported:
    """Returns `(variables, arguments)`, the inverse of `from_nnx`.

    The variables are plain dicts, for `nnx.update(module, variables)`.

    Args:
      norm: The norm.
      path: Where to put the variables in a model's.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If nnx has no such norm, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> from normlab.equation import Affine
    >>> sorted(to_nnx(Converted("rms", Affine(jnp.ones(3), None), eps=1e-6)).variables)
    ['scale']
    """
    where = "to nnx"
    if check(where, norm).kind == "weight":
        return weight_to_nnx(where, norm, path, allow)
    params, statistics, arguments = disassemble(where, norm, allow)
    return Exported(nest(path, {**params, **statistics}), arguments)


def _submodule(where: str, module: Any, path: str) -> Any:
    """What is under a path of names and numbers, without a word of nnx."""
    for name in path.split("/") if path else []:
        try:
            module = getattr(module, name) if hasattr(module, name) else module[int(name)]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            given = f"path={path!r}, and no {name!r} in a {type(module).__name__}"
            change = "name the attributes and the places in lists that lead to it, a/0/b"
            raise invalid(where, given, "where a module is in the model", change) from error
    return module


def _variables(where: str, module: Any, kind: str) -> dict[str, Any]:
    """The variables of a module, without a word of nnx."""
    if kind == "weight":
        if is_a(module, "SpectralNorm"):
            raise spectral(where)
        layer = getattr(module, "layer_instance", None)
        own = given({name: getattr(layer, name, None) for name in ("kernel", "bias")})
        return {"layer_instance": own, **given({"scales": getattr(module, "scales", None)})}
    names = ("scale", "bias", "mean", "var")
    return given({name: getattr(module, name, None) for name in names})
