"""torch: a `state_dict`, with a prefix; `{"weight", "bias", "running_mean", "running_var", ...}`.

The running variance is the unbiased one (ddof 1), momentum the weight of the new value. With
`momentum=None` all batches weigh the same, whatever their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from normlab.checks import invalid
from normlab.convert.kernels import from_units_first, to_units_first
from normlab.convert.layers import REQUIRED, Layer, axes_to, refuse, settings, supported
from normlab.convert.leaves import flatten, numbers, take
from normlab.convert.statistics import mean_and_var, running
from normlab.convert.value import Converted, Exported, check
from normlab.example import Axes
from normlab.population.cumulative import Cumulative, init_cumulative
from normlab.population.running import Running
from normlab.types import Affine

HOME = ("torch",)
ELEMENTWISE = {"normalized_shape": None, "elementwise_affine": True}

LAYERS = {
    "batch": Layer(
        ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
        {"eps": 1e-5, "momentum": 0.1, "affine": True, "bias": True, "track_running_stats": True},
    ),
    "layer": Layer(("LayerNorm",), {"eps": 1e-5, **ELEMENTWISE, "bias": True}),
    "rms": Layer(("RMSNorm",), {"eps": None, **ELEMENTWISE}),
    "group": Layer(
        ("GroupNorm",), {"num_groups": REQUIRED, "eps": 1e-5, "affine": True, "bias": True}
    ),
    "instance": Layer(
        ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        {"eps": 1e-5, "affine": False, "bias": True},
        {"track_running_stats": False},
    ),
    "weight": Layer((), {}, {"dim": 0}),
}
STATISTICS = {"mean": "running_mean", "var": "running_var", "updates": "num_batches_tracked"}
GAINS = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
)
"""Gain and direction, as `torch.nn.utils.parametrizations.weight_norm` and its elder name them."""


def from_torch(
    variables: Any,
    layer: Any = None,
    *,
    path: str = "",
    count: float | None = None,
    allow: Sequence[str] = (),
    **arguments: Any,
) -> Converted:
    """Returns a norm of torch as normlab's.

    torch has its channels on axis 1 but for layer and RMS norm: pass `channel_axis=1` to normlab's
    norm, or move the axis of the data.

    Args:
      variables: The module, or a `state_dict`, of tensors or of NumPy arrays.
      layer: The module, if `variables` is none, or a kind: `"batch"`, `"layer"`, `"rms"`,
        `"group"`, `"instance"` or `"weight"`, which a module of weight norm needs too. Where
        `variables` is a module, the one at `path` says its own arguments.
      path: The prefix in the `state_dict` of a model, as `"layer1.0.bn1"`.
      count: With `momentum=None`, the number of values of a channel in a batch (the examples times
        the positions), which has to be the same for all batches.
      allow: The conventions that may be lost.
      **arguments: torch's own arguments, where the layer was not made with torch's defaults.

    Raises:
      ValueError: If a leaf is missing, too many or of the wrong shape, an argument unknown, or a
        convention would be lost.

    >>> import numpy as np
    >>> leaves = {"norm.weight": np.ones(3, "float32"), "norm.bias": np.zeros(3, "float32")}
    >>> from_torch(leaves, "layer", path="norm").eps
    1e-05
    """
    where = "from torch"
    leaves = module = variables
    if hasattr(variables, "state_dict"):
        leaves = variables.state_dict()
        module = variables.get_submodule(path)
        layer = layer if layer == "weight" or not isinstance(layer, str | None) else module
    kind, values = settings(where, LAYERS, HOME, layer, arguments, allow)
    leaves = flatten(where, leaves)
    root = path + "." if path else ""
    if kind == "weight":
        return _from_weight(where, leaves, root, module)
    statistics = kind == "batch" and values["track_running_stats"]
    wanted = {ours: root + name for ours, name in _affine(values).items()}
    if statistics:
        wanted |= {ours: root + name for ours, name in STATISTICS.items()}
    found = take(where, leaves, wanted, [root])
    norm = Converted(
        kind,
        Affine(found.get("g"), found.get("b")),
        _state(where, found, values["momentum"], count) if statistics else (),
        eps=_eps(where, found, values["eps"]),
        groups=values["num_groups"] if kind == "group" else None,
        axes=_axes(values["normalized_shape"]) if kind in ("layer", "rms") else "channels",
    )
    return check(where, norm)


def to_torch(
    norm: Converted, *, path: str = "", old_names: bool = False, allow: Sequence[str] = ()
) -> Exported:
    """Returns `(state_dict, arguments)`, the inverse of `from_torch`.

    The leaves are NumPy arrays: `{name: torch.as_tensor(v) for name, v in state_dict.items()}`.

    Args:
      norm: The norm.
      path: The prefix in the `state_dict` of a model.
      old_names: Whether weight norm's leaves are `weight_g` and `weight_v`.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If torch has no such norm, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> norm = Converted("group", Affine(jnp.ones(4), jnp.zeros(4)), eps=1e-5, groups=2)
    >>> to_torch(norm).arguments
    {'eps': 1e-05, 'affine': True, 'num_groups': 2}
    """
    where = "to torch"
    supported(where, LAYERS, check(where, norm).kind)
    lost: dict[str, str] = {}
    g, b = norm.params
    if norm.kind == "weight":
        kernel, gain, b = to_units_first(norm, lost)
        leaves = {**dict(zip(GAINS[old_names], (gain, kernel), strict=True)), "bias": b}
        arguments = {"dim": 0}
    else:
        leaves, arguments = {"weight": g, "bias": b}, _arguments(where, norm, lost)
    if norm.kind == "batch" and norm.state != ():
        leaves |= _statistics(where, norm, lost)
    refuse(where, lost, allow)
    root = path + "." if path else ""
    return Exported({root + name: v for name, v in numbers(leaves).items()}, arguments)


def _affine(values: Mapping[str, Any]) -> dict[str, str]:
    """Torch's names under normlab's; a module has its bias where its argument was a flag."""
    names = {"g": "weight"} if values.get("affine", values.get("elementwise_affine")) else {}
    bias = values.get("bias")
    return {**names, "b": "bias"} if names and bias is not None and bias is not False else names


def _state(
    where: str, found: Mapping[str, Any], momentum: float | None, count: float | None
) -> Running | Cumulative:
    if momentum is not None:
        decay = 1 - float(momentum)
        return running(where, found, decay=decay, ddof=1, updates=found["updates"])
    if count is None or not count > 1:
        raise invalid(
            where,
            f"momentum=None and count={count}",
            "the number of values of a channel in a batch, more than 1",
            "pass count=..., or momentum=0.1 to go on from here with an average that forgets",
        )
    mean, updates = found["mean"], found["updates"]
    seen = updates.astype(mean.dtype)
    empty = init_cumulative(mean.size, ddof=1, estimator="within", dtype=mean.dtype)
    return empty._replace(
        count=jnp.full_like(mean, count * seen),
        mean=mean,
        within=found["var"] * ((count - 1) * seen),
        updates=updates,
    )


def _statistics(where: str, norm: Converted, lost: dict[str, str]) -> dict[str, Any]:
    state = norm.state
    if isinstance(state, Cumulative) and state.estimator == "within":
        mean, var = state.read()
        if state.ddof != 1:
            lost["ddof"] = f"{state.ddof}, torch's variance has 1"
        if np.any(state.between):
            lost["between"] = "the deviations between the batches: torch keeps those within"
        if np.any(state.skipped):
            lost["skipped"] = f"{int(state.skipped)}: torch has no such counter"
        lost["count"] = "torch's batches all weigh the same, normlab's by their count"
    else:
        mean, var = mean_and_var(where, norm, lost, ddof=1, holds=("updates",))
    updates = np.asarray(getattr(state, "updates", 0), np.int64)
    return {"running_mean": mean, "running_var": var, "num_batches_tracked": updates}


def _arguments(where: str, norm: Converted, lost: dict[str, str]) -> dict[str, Any]:
    g, b = norm.params
    size = next((v.size for v in (g, b) if v is not None), None)
    arguments: dict[str, Any] = {"eps": norm.eps}
    if norm.kind in ("layer", "rms"):
        if axes_to(where, norm.axes) != -1 or size is None:
            given = f"axes={norm.axes!r} and parameters of size {size}"
            expected = "the channels, and a parameter that says how many"
            raise invalid(where, given, expected, "make the layer by hand, from its shape")
        arguments |= {"normalized_shape": (size,), "elementwise_affine": g is not None}
    else:
        arguments["affine"] = g is not None
    if g is None and b is not None:
        lost["bias"] = "torch has no bias without a gain"
    if norm.kind == "rms" and b is not None:
        lost["bias"] = "torch's RMS norm has none: add it after the layer"
    if g is not None and b is None and norm.kind != "rms":
        arguments["bias"] = False
    if norm.kind == "group":
        arguments["num_groups"] = norm.groups
    if norm.kind == "batch":
        arguments |= {"track_running_stats": norm.state != ()}
        if isinstance(norm.state, Running):
            arguments["momentum"] = momentum(norm.state.decay)
        if isinstance(norm.state, Cumulative):
            arguments["momentum"] = None
    return arguments


def momentum(decay: float) -> float:
    """The weight of the new value, as short a number as has that decay."""
    short = round(1 - decay, 15)
    return short if 1 - short == decay else 1 - decay


def _from_weight(where: str, leaves: Mapping[str, Any], root: str, module: Any) -> Converted:
    if "ConvTranspose" in type(module).__name__:
        given = f"a {type(module).__name__}, whose kernel has its inputs first"
        raise invalid(where, given, "units first", "transpose the leaves of its state_dict before")
    names = next((pair for pair in GAINS if root + pair[0] in leaves), GAINS[0])
    wanted = {"g": root + names[0], "kernel": root + names[1]}
    if root + "bias" in leaves:
        wanted["b"] = root + "bias"
    found = take(where, leaves, wanted, [root])
    return from_units_first(where, found["kernel"], found["g"], found.get("b"))


def _eps(where: str, found: Mapping[str, Any], eps: float | None) -> float:
    """RMS norm's `None` stands for the rounding of its input's type: here, of its gain's."""
    if eps is not None:
        return eps
    if "g" not in found:
        raise invalid(
            where, "eps=None and no gain", "a number", "pass eps=..., as the layer has it"
        )
    return float(jnp.finfo(found["g"].dtype).eps)


def _axes(shape: Any) -> Axes:
    """The last axes of the input, as many as the parameters have."""
    ndim = len(shape) if isinstance(shape, Sequence) else 1
    return "channels" if ndim == 1 else tuple(range(-ndim, 0))
