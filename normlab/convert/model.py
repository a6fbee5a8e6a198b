"""The norms of a whole model, by a rule that names them by path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normlab._arguments import a_function, anything, checked, mapping
from normlab._paths import flatten as by_key
from normlab._paths import matches, unflatten
from normlab.convert.leaves import flatten
from normlab.convert.value import NORM, Converted, Exported
from normlab.errors import invalid

_INSIDE = (
    "/layer_instance",
    "/batch_stats/kernel",
    ".parametrizations.weight.0",
    ".parametrizations.weight",
    "/~/mean_ema",
    "/~/var_ema",
)
"""Where libraries keep some of a norm's leaves, below the path of the norm."""


RULE = mapping(anything, "paths of norms, each to its kind", 'pass {"norm": "batch"}')


@checked("from model", read=a_function(), variables=anything, rule=RULE)
def from_model(
    read: Callable[..., Converted],
    variables: Any,
    rule: Mapping[str, Any],
    *,
    allow: Sequence[str] = (),
) -> dict[str, Converted]:
    """Returns the norms of a model by path.

    Args:
      read: `from_torch`, `from_linen`, `from_nnx`, `from_haiku` or `from_keras`.
      variables: The variables of the whole model, as `read` wants them.
      rule: The path of a norm, or a regular expression for the whole of one, to its kind or module,
        or to a pair of that and the arguments by name. Each must fit a layer, and no layer two.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If a pattern fits nothing or a norm cannot be converted.

    >>> import numpy as np
    >>> leaves = {f"{i}.weight": np.ones(2, "float32") for i in range(3)}
    >>> from normlab.convert.torch import from_torch
    >>> sorted(from_model(from_torch, leaves, {"[01]": "rms", "2": ("rms", {"eps": 1e-6})}))
    ['0', '1', '2']
    """
    norms = {}
    for path, value, _ in matches("from model", rule, _paths(variables)):
        layer, arguments = value if isinstance(value, tuple) else (value, {})
        norms[path] = read(variables, layer, path=path, allow=allow, **arguments)
    return norms


NORMS = mapping(NORM, "norms by path", "pass what from_model returned")


@checked("to model", write=a_function(), norms=NORMS)
def to_model(
    write: Callable[..., Exported],
    norms: Mapping[str, Converted],
    *,
    allow: Sequence[str] = (),
    **options: Any,
) -> Exported:
    """Returns the variables of many norms in one, and their arguments by path.

    Args:
      write: `to_torch`, `to_linen`, `to_nnx`, `to_haiku` or `to_keras`.
      norms: The norms by path.
      allow: The conventions that may be lost.
      **options: Options of `write` for all.

    Raises:
      ValueError: If a norm cannot be converted.

    >>> import flax.linen as nn
    >>> import jax
    >>> from normlab.convert import from_linen, to_torch
    >>> model = nn.Sequential([nn.Dense(4), nn.LayerNorm()])
    >>> variables = model.init(jax.random.key(0), jax.numpy.ones((2, 3)))
    >>> norms = from_model(from_linen, variables, {"layers_1": nn.LayerNorm()})
    >>> written = to_model(to_torch, norms)
    >>> sorted(written.variables), written.arguments["layers_1"]["eps"]
    (['layers_1.bias', 'layers_1.weight'], 1e-06)
    """
    written = {path: write(norm, path=path, allow=allow, **options) for path, norm in norms.items()}
    trees = [v if isinstance(v, tuple) else (v,) for v, _ in written.values()] or [({},)]
    merged = [
        unflatten({key: leaf for tree in column for key, leaf in by_key(tree).items()})
        for column in zip(*trees, strict=True)
    ]
    variables = tuple(merged) if len(merged) > 1 else merged[0]
    return Exported(variables, {path: exported.arguments for path, exported in written.items()})


def _paths(variables: Any) -> list[str]:
    """The paths under which there are leaves, in the order of the leaves."""
    if isinstance(variables, tuple):  # haiku's params and state
        trees = list(variables)
    elif isinstance(variables, Mapping):  # in linen's collections, or as it is
        trees = list(variables.values()) if "params" in variables else [variables]
    else:
        given = f"variables of type {type(variables).__name__}"
        raise invalid("from model", given, "nested mappings", "pass its state_dict or nnx.State")
    names = [name for tree in trees for name in flatten("from model", tree)]
    separator = "/" if any("/" in name for name in names) else "."
    paths = [name.rpartition(separator)[0] for name in names]
    for inside in _INSIDE:
        paths = [path.removesuffix(inside) for path in paths]
    return list(dict.fromkeys(paths))
