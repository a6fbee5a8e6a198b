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
from normlab._checks import invalid
from normlab.convert.kernels import from_units_first, to_units_first
from normlab.convert.layers import (
    REQUIRED,
    Layer,
    axes_of_shape,
    axes_to,
    is_a,
    refuse,
    settings,
    spectral,
    supported,
)
from normlab.convert.leaves import given, take
from normlab.convert.statistics import counted, decay_of, mass_after, running, statistics_dtype
from normlab.convert.value import NORM, Converted, Exported, check
from normlab.equation import Affine
from normlab.example import Axes
from normlab.population.running import Running

HOME = ("equinox",)
COUNTERS = {"batch": "batch_counter", "ema": "ema_first_time_index"}
FLAGS = {"use_weight": True, "use_bias": True}

LAYERS = {
    "batch": Layer(
        ("BatchNorm",),
        {"eps": 1e-5, "momentum": 0.99, "channelwise_affine": True},
        {"mode": "batch"},
    ),
    "layer": Layer(("LayerNorm",), {"shape": None, "eps": 1e-5, **FLAGS}),
    "rms": Layer(("RMSNorm",), {"shape": None, "eps": 1e-5, **FLAGS}),
    "group": Layer(("GroupNorm",), {"groups": REQUIRED, "eps": 1e-5, "channelwise_affine": True}),
    "weight": Layer(("WeightNorm",), {}, {"weight_name": "weight", "axis": 0}),
}


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
        of weight norm `{"weight", "bias", "g"}`.
      layer: The module, if `variables` is not it, or a kind: `"batch"`, `"layer"`, `"rms"`,
        `"group"` or `"weight"`, which comes before the class of the module: that says its own
        arguments all the same.
      state: The `eqx.nn.State` that goes with a module of batch norm.
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
    kind, values = settings(where, LAYERS, HOME, layer, arguments, allow, module=module)
    leaves = dict(variables) if module is None else _variables(where, module, kind, state)
    if kind == "weight":
        return _from_weight(where, leaves)
    wanted = {ours: name for ours, (name, flag) in _AFFINE.items() if _has(values, flag)}
    if kind == "batch":
        mode = values["mode"]
        index = f"{mode}_state_index"
        held = leaves.get(index, 0)
        if isinstance(held, Sequence) or np.ndim(held):
            leaves |= {f"{index}[{i}]": v for i, v in enumerate(leaves.pop(index))}
        wanted |= {"mean": f"{index}[0]", "var": f"{index}[1]", "counter": COUNTERS[mode]}
    found = take(where, leaves, wanted, [""])
    axes: Axes = "channels"
    if kind in ("layer", "rms"):  # over all of its input, of which a `vmap` makes a batch
        axes = axes_of_shape(where, "shape", values["shape"], found)
    norm = Converted(
        kind,
        Affine(found.get("g"), found.get("b")),
        _state(where, found, values, allow) if kind == "batch" else (),
        eps=values["eps"],
        groups=values["groups"] if kind == "group" else None,
        axes=axes,
    )
    return check(where, norm)


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
    >>> to_equinox(Converted("rms", Affine(jnp.ones(3), None), eps=1e-5)).arguments
    {'eps': 1e-05, 'shape': (3,), 'use_weight': True, 'use_bias': False}
    """
    where = "to equinox"
    check(where, norm)
    change = "norm._replace(kind='group', groups=C) measures the same"
    supported(where, LAYERS, norm.kind, change if norm.kind == "instance" else "")
    lost: dict[str, str] = {}
    if norm.kind == "weight":
        kernel, gain, b = to_units_first(norm, lost)
        refuse(where, lost, allow)
        if b is not None:  # a convolution's has an axis for each of the positions
            b = b.reshape(-1, *[1] * (kernel.ndim - 2))
        return Exported(given({"weight": kernel, "g": gain, "bias": b}), {})
    if norm.kind in ("layer", "rms"):
        variables, arguments = _elementwise(where, norm)
    else:
        variables, arguments = _channelwise(norm, lost)
    if norm.kind == "group":
        arguments["groups"] = norm.groups
    if norm.kind == "batch":
        variables |= _to_average(where, norm, lost)
        arguments |= {"mode": "batch", **decay_of(norm, "momentum")}
    refuse(where, lost, allow)
    return Exported(variables, {"eps": norm.eps, **arguments})


_AFFINE = {"g": ("weight", "use_weight"), "b": ("bias", "use_bias")}


def _has(values: Mapping[str, Any], flag: str) -> bool:
    return values.get(flag, values.get("channelwise_affine"))


def _elementwise(where: str, norm: Converted) -> tuple[dict[str, Any], dict[str, Any]]:
    """A gain and a bias of the shape of the input, which is that of the layer."""
    g, b = norm.params
    variables = given({"weight": g, "bias": b})
    if axes_to(where, norm.axes) != -1 or not variables:
        values = f"axes={norm.axes!r} and {len(variables)} parameters"
        expected = "the channels, and a parameter that says how many"
        raise invalid(where, values, expected, "make the layer by hand, from its shape")
    shape = next(iter(variables.values())).shape
    return variables, {"shape": shape, "use_weight": g is not None, "use_bias": b is not None}


def _channelwise(norm: Converted, lost: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A gain and a bias, or neither of them."""
    variables = given({"weight": norm.params.g, "bias": norm.params.b})
    if len(variables) == 1:
        lost["affine"] = "equinox has a gain and a bias, or neither: the other is 1, or 0"
        like = next(iter(variables.values()))
        variables = {"weight": jnp.ones_like(like), "bias": jnp.zeros_like(like), **variables}
    return variables, {"channelwise_affine": bool(variables)}


def _variables(where: str, module: Any, kind: str, state: Any) -> dict[str, Any]:
    if is_a(module, "SpectralNorm"):
        raise spectral(where)
    layer = getattr(module, "layer", module)
    variables = {name: getattr(layer, name, None) for name in ("weight", "bias")}
    if kind == "weight":
        variables["g"] = getattr(module, "g", None)
    variables = given(variables)
    if kind != "batch":
        return variables
    if state is None:
        raise invalid(where, "no state", "the State of the module", "pass state=...")
    names = (COUNTERS[module.mode], f"{module.mode}_state_index")
    return {**variables, **{name: state.get(getattr(module, name)) for name in names}}


def _state(
    where: str, found: Mapping[str, Any], values: Mapping[str, Any], allow: Sequence[str]
) -> Running:
    """Mean and variance as inference has them, and the mass that it divides by."""
    counter, decay = int(found["counter"]), values["momentum"]
    if values["mode"] == "ema":
        if counter:
            change = "convert it after its first step"
            raise invalid(where, "a BatchNorm that has seen no batch", "statistics", change)
        return running(where, found, decay=decay)
    mass = mass_after(counter, decay, statistics_dtype(where, found["mean"]))
    if not counter:
        text = "0: the variance starts at 1 and stays too large, normlab's does not"
        refuse(where, {"batch_counter": text}, allow)
        return running(where, found, decay=decay, mass=mass)
    vectors = {name: found[name] / mass for name in ("mean", "var")}
    return running(where, vectors, decay=decay, mass=mass, updates=counter)


def _to_average(where: str, norm: Converted, lost: dict[str, str]) -> dict[str, Any]:
    mean, var, updates = counted(where, norm, lost)
    if not updates:
        lost["batch_counter"] = "0: equinox's variance starts at 1 and stays too large"
        return {"batch_counter": jnp.array(0), "batch_state_index": (mean, var)}
    mass = mass_after(updates, norm.state.decay, mean.dtype)
    return {"batch_counter": jnp.array(updates), "batch_state_index": (mean * mass, var * mass)}


def _from_weight(where: str, leaves: Mapping[str, Any]) -> Converted:
    wanted = {"kernel": "weight", "g": "g"} | ({"b": "bias"} if "bias" in leaves else {})
    found = take(where, leaves, wanted, [""])
    return from_units_first(where, found["kernel"], found["g"], found.get("b"))
