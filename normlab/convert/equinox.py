"""equinox: a module and its `State`, or a dict of what they hold under the module's own names.

`BatchNorm(mode="batch")` keeps `batch_counter` and `batch_state_index`, a mean and a variance that
inference divides by 1 − decay^counter. The variance starts at 1 and is divided all the same, so
that it is too large for hundreds of steps; the conversion keeps it so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from normlab._arguments import anything, checked
from normlab.convert.leaves import given, held, take, vector
from normlab.convert.library import REQUIRED, Layer, Library, is_a, refuse, spectral
from normlab.convert.spectral import (
    from_vectors,
    to_vectors,
    units_first,
    units_last,
    window_first,
    window_last,
)
from normlab.convert.statistics import average, counted, mass_after, statistics_dtype
from normlab.convert.value import NORM, Converted, Exported, check
from normlab.convert.weight import from_units_first, to_units_first
from normlab.errors import invalid
from normlab.population.protocol import Population

COUNTERS = {"batch": "batch_counter", "ema": "ema_first_time_index"}
FLAGS = {"use_weight": True, "use_bias": True}

EQUINOX = Library(
    "equinox",
    ("equinox",),
    {
        "batch": Layer(
            ("BatchNorm",),
            {"eps": 1e-5, "momentum": 0.99, "channelwise_affine": True},
            {"mode": "batch"},
        ),
        "layer": Layer(("LayerNorm",), {"shape": None, "eps": 1e-5, **FLAGS}),
        "rms": Layer(("RMSNorm",), {"shape": None, "eps": 1e-5, **FLAGS}),
        "group": Layer(
            ("GroupNorm",), {"groups": REQUIRED, "eps": 1e-5, "channelwise_affine": True}
        ),
        "weight": Layer(("WeightNorm",), {}, {"weight_name": "weight", "axis": 0}),
        "spectral": Layer(
            ("SpectralNorm",),
            {"num_power_iterations": 1, "eps": 1e-12},
            {"weight_name": "weight"},
        ),
    },
    {"eps": "eps", "decay": "momentum", "groups": "groups", "shape": "shape"}
    | {"g": "use_weight channelwise_affine", "b": "use_bias channelwise_affine"},
    {"g": "weight", "b": "bias"},
    own_axes=True,
)
WEIGHT = {"kernel": "weight", "g": "g", "b": "bias"}


@checked("from equinox", variables=anything, state=anything)
def from_equinox(
    variables: Any,
    layer: Any = None,
    *,
    state: Any = None,
    allow: Sequence[str] = (),
    **arguments: Any,
) -> Converted:
    """Returns a norm of equinox as normlab's.

    Args:
      variables: The module, or a dict `{"weight", "bias", "batch_counter", "batch_state_index"}`;
        of weight norm `{"weight", "bias", "g"}`, of spectral norm `{"weight", "bias", "uv_index"}`.
      layer: The module, if `variables` is not it, or a kind: `"batch"`, `"layer"`, `"rms"`,
        `"group"`, `"weight"` or `"spectral"`, which comes before the class of the module: that
        says its own arguments all the same.
      state: The `eqx.nn.State` that goes with a module of batch norm or of spectral norm.
      allow: The conventions that may be lost.
      **arguments: equinox's own arguments, where the layer was not made with its defaults.

    Raises:
      ValueError: If a leaf is missing, too many or of the wrong shape, an argument unknown, or a
        convention would be lost: batch norm with `mode="ema"`, or that has seen no batch.

    >>> import jax.numpy as jnp
    >>> from_equinox({"weight": jnp.ones(3), "bias": jnp.zeros(3)}, "layer").eps
    1e-05
    """
    where = "from equinox"
    if variables is None:
        raise invalid(where, "variables=None", "a module, or a dict of arrays", "pass the layer")
    layer = variables if layer is None else layer
    module = None if isinstance(variables, Mapping) else variables
    kind, values = EQUINOX.settings(where, layer, arguments, allow, module=module)
    leaves = dict(variables) if module is None else _variables(where, module, kind, state)
    if kind == "weight":
        return from_units_first(where, leaves, WEIGHT, [""])
    if kind == "spectral":
        return _from_spectral(where, leaves, values, allow)
    wanted = EQUINOX.wanted(kind, values)
    if kind == "batch":
        mode = values["mode"]
        index = f"{mode}_state_index"
        pair = leaves.get(index, 0)
        if isinstance(pair, Sequence) or np.ndim(pair):
            leaves |= {f"{index}[{i}]": v for i, v in enumerate(leaves.pop(index))}
        wanted |= {"mean": f"{index}[0]", "var": f"{index}[1]", "counter": COUNTERS[mode]}
    found = take(where, leaves, wanted, [""])
    state = _state(where, found, values, allow) if kind == "batch" else None
    return EQUINOX.converted(where, kind, found, values, state)


@checked("to equinox", norm=NORM)
def to_equinox(norm: Converted, *, allow: Sequence[str] = ()) -> Exported:
    """Returns `(variables, arguments)`, the inverse of `from_equinox` for a dict.

    Put them into a module with `eqx.tree_at` and `state.set(module.batch_counter, ...)`.

    Args:
      norm: The norm.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If equinox has no such norm, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> from normlab import Affine
    >>> to_equinox(Converted("rms", Affine(jnp.ones(3), None), eps=1e-5)).arguments
    {'eps': 1e-05, 'use_weight': True, 'use_bias': False, 'shape': (3,)}
    """
    where = "to equinox"
    lost: dict[str, str] = {}
    if check(where, norm).kind == "spectral":
        found = to_vectors(where, norm, allow, first="u")
        leaves = {"weight": units_first(found["kernel"]), "bias": found.get("b")}
        leaves["uv_index"] = (found["u"], window_last(found["v"]))
        _with_positions(leaves, "weight", "bias")
        return Exported(given(leaves), {"num_power_iterations": norm.steps, "eps": 1e-12})
    if norm.kind == "weight":
        leaves = to_units_first(norm, lost)
        refuse(where, lost, allow)
        _with_positions(leaves, "kernel", "b")
        return Exported(given({WEIGHT[name]: v for name, v in leaves.items()}), {})
    arguments = EQUINOX.arguments(where, norm, lost)
    variables = EQUINOX.params(norm)
    if "channelwise_affine" in arguments:
        if len(variables) == 1:
            lost["affine"] = "equinox has a gain and a bias, or neither: the other is 1, or 0"
            (like,) = variables.values()
            variables = {"weight": jnp.ones_like(like), "bias": jnp.zeros_like(like), **variables}
        arguments["channelwise_affine"] = bool(variables)
    if norm.kind == "batch":
        variables |= _to_average(where, norm, lost)
        arguments["mode"] = "batch"
    refuse(where, lost, allow)
    return Exported(variables, arguments)


def _variables(where: str, module: Any, kind: str, state: Any) -> dict[str, Any]:
    if kind != "spectral" and is_a(module, "SpectralNorm"):
        raise spectral(where)
    variables = held(getattr(module, "layer", module), "weight", "bias")
    if kind == "weight":
        return variables | held(module, "g")
    if kind not in ("batch", "spectral"):
        return variables
    if state is None:
        raise invalid(where, "no state", "the State of the module", "pass state=...")
    if kind == "spectral":
        return {**variables, "uv_index": state.get(module.uv_index)}
    names = (COUNTERS[module.mode], f"{module.mode}_state_index")
    return {**variables, **{name: state.get(getattr(module, name)) for name in names}}


def _with_positions(leaves: dict[str, Any], kernel: str, bias: str) -> None:
    """The bias of a convolution has an axis for each position."""
    if (b := leaves[bias]) is not None:
        leaves[bias] = b.reshape(-1, *[1] * (leaves[kernel].ndim - 2))


def _from_spectral(
    where: str, leaves: dict[str, Any], values: Mapping[str, Any], allow: Sequence[str]
) -> Converted:
    pair = leaves.pop("uv_index", ())
    leaves |= {f"uv_index[{i}]": v for i, v in enumerate(pair)}
    names = {"kernel": "weight", "u": "uv_index[0]", "v": "uv_index[1]"}
    names |= {"b": "bias"} if "bias" in leaves else {}
    found = take(where, leaves, names, [""])
    found["kernel"] = units_last(found["kernel"])
    found["v"] = window_first(found["v"], found["kernel"])
    if "b" in found:
        found["b"] = vector(where, "the bias", found["b"])
    steps, eps = values["num_power_iterations"], values["eps"]
    return from_vectors(where, found, steps, eps, allow, first="u")


def _state(
    where: str, found: Mapping[str, Any], values: Mapping[str, Any], allow: Sequence[str]
) -> Population:
    """Mean and variance as inference has them, and the mass that it divides by."""
    counter, decay = int(found["counter"]), values["momentum"]
    if values["mode"] == "ema":
        if counter:
            change = "convert it after its first step"
            raise invalid(where, "a BatchNorm that has seen no batch", "statistics", change)
        return average(where, found, decay=decay)
    mass = mass_after(counter, decay, statistics_dtype(where, found["mean"]))
    if not counter:
        text = "0: the variance starts at 1 and stays too large, normlab's does not"
        refuse(where, {"batch_counter": text}, allow)
        return average(where, found, decay=decay, mass=mass)
    vectors = {name: found[name] / mass for name in ("mean", "var")}
    return average(where, vectors, decay=decay, mass=mass, updates=counter)


def _to_average(where: str, norm: Converted, lost: dict[str, str]) -> dict[str, Any]:
    mean, var, updates = counted(where, norm, lost)
    if not updates:
        lost["batch_counter"] = "0: equinox's variance starts at 1 and stays too large"
        return {"batch_counter": jnp.array(0), "batch_state_index": (mean, var)}
    mass = mass_after(updates, norm.state.decay, mean.dtype)
    return {"batch_counter": jnp.array(updates), "batch_state_index": (mean * mass, var * mass)}
