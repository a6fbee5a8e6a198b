"""torch: a `state_dict`, with a prefix; `{"weight", "bias", "running_mean", "running_var", ...}`.

The running variance is the unbiased one (ddof 1), momentum the weight of the new value. With
`momentum=None` all batches weigh the same, whatever their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from normlab._arguments import anything, checked, flag, number
from normlab._checks import invalid, promote_dtype
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
from normlab.convert.leaves import flatten, near, numbers, take
from normlab.convert.statistics import mean_and_var, running, statistics
from normlab.convert.value import NORM, Converted, Exported, check
from normlab.equation import Affine
from normlab.example import Axes
from normlab.population.cumulative import Cumulative, init_cumulative
from normlab.population.frozen import Frozen
from normlab.population.running import Running

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
SPECTRAL = ("parametrizations.weight.0._u", "weight_u")
"""Of spectral norm, whose elder has a `weight_v` too."""


@checked(
    "from torch",
    variables=anything,
    count=number("a number of values", "pass the examples of a batch times the positions"),
)
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
        `"group"`, `"instance"` or `"weight"`, which a module of weight norm needs too, as does one
        of a class that is not torch's own. A kind comes before the class of the module, which
        still says its own arguments; what a subclass adds to the norm is not converted.
      path: Where the module is in a model, and the prefix in its `state_dict`: `"layer1.0.bn1"`.
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
    root = path + "." if path else ""
    leaves, module = variables, None
    if hasattr(variables, "state_dict"):
        module = _submodule(where, variables, path)
        leaves = module.state_dict(prefix=root)
        layer = module if layer is None else layer
    elif layer is None:
        raise invalid(where, "no kind of norm", "one of " + ", ".join(LAYERS), "pass layer=...")
    if not isinstance(layer, str) and hasattr(layer, "state_dict"):
        module = layer
    frozen = layer == "batch" and is_a(module, "FrozenBatchNorm")
    if frozen:  # it has no momentum, and some classes have no eps either
        arguments = {"eps": getattr(module, "eps", 1e-5), "momentum": 0.1, **arguments}
    own = None if layer == "weight" else module
    kind, values = settings(where, LAYERS, HOME, layer, arguments, allow, module=own)
    leaves = flatten(where, leaves)
    if kind == "weight":
        return _from_weight(where, leaves, root, module)
    names = _affine(values)
    if kind == "batch" and values["track_running_stats"]:
        names |= STATISTICS
        if root + names["updates"] not in leaves:  # before torch 0.4.1, and FrozenBatchNorm2d
            del names["updates"]
    elif values.get("track_running_stats"):  # instance norm's, lost knowingly
        leaves = {
            n: v for n, v in leaves.items() if n.removeprefix(root) not in STATISTICS.values()
        }
    if module is not None:
        parts = tuple(root + name + "." for name, _ in module.named_children())
        leaves = {name: v for name, v in leaves.items() if not name.startswith(parts)}
    found = take(where, leaves, {ours: root + name for ours, name in names.items()}, [root])
    state = _state(where, found, values["momentum"], count) if "mean" in found else ()
    axes: Axes = "channels"
    if kind in ("layer", "rms"):
        axes = axes_of_shape(where, "normalized_shape", values["normalized_shape"], found)
    norm = Converted(
        kind,
        Affine(found.get("g"), found.get("b")),
        Frozen(state) if frozen and state != () else state,
        eps=_eps(where, found, values["eps"]),
        groups=values["num_groups"] if kind == "group" else None,
        axes=axes,
    )
    return check(where, norm)


@checked("to torch", norm=NORM, old_names=flag())
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
        return running(where, found, decay=decay, ddof=1, updates=found.get("updates", 0))
    mean, var = statistics(where, found)
    updates = found.get("updates", jnp.zeros((), jnp.int32))
    if not updates and ((mean != 0).any() or (var != 1).any()):
        raise invalid(
            where,
            "momentum=None and statistics of no batch",
            "num_batches_tracked, by which they are averaged",
            "add it to the state_dict, or pass momentum=0.1 to go on with an average that forgets",
        )
    if count is None or not count > 1:
        raise invalid(
            where,
            f"momentum=None and count={count}",
            "the number of values of a channel in a batch, more than 1",
            "pass count=..., or momentum=0.1 to go on from here with an average that forgets",
        )
    seen = updates.astype(mean.dtype)
    empty = init_cumulative(mean.size, ddof=1, estimator="within", dtype=mean.dtype)
    return empty._replace(
        count=jnp.full_like(mean, count * seen),
        mean=mean,
        within=var * ((count - 1) * seen),
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


def _submodule(where: str, model: Any, path: str) -> Any:
    known = [name for name, _ in model.named_modules()]
    if path not in known:
        change = f"name a module of it, as {near([path], known[1:])}"
        raise invalid(where, f"path={path!r}", "where a module is in the model", change)
    return model.get_submodule(path)


def _from_weight(where: str, leaves: Mapping[str, Any], root: str, module: Any) -> Converted:
    if getattr(module, "transposed", False) or is_a(module, "ConvTranspose"):
        change = "convert the kernel that it computes, module.weight: with dim=0, torch's default, "
        change += "its gains are those of the inputs"
        given = f"a {type(module).__name__}, whose kernel has its inputs first"
        raise invalid(where, given, "a layer with its units first", change)
    if any(root + name in leaves for name in SPECTRAL):
        raise spectral(where)
    names = next((pair for pair in GAINS if root + pair[0] in leaves), GAINS[0])
    wanted = {"g": root + names[0], "kernel": root + names[1]}
    if root + "bias" in leaves:
        wanted["b"] = root + "bias"
    found = take(where, leaves, wanted, [root])
    return from_units_first(where, found["kernel"], found["g"], found.get("b"))


def _eps(where: str, found: Mapping[str, Any], eps: float | None) -> float:
    """RMS norm's `None` stands for the rounding of the type that its input, here its gain, has.

    Of float32 at least: torch computes in it (some earlier versions took half precision's own).
    """
    if eps is not None:
        return eps
    if "g" not in found:
        raise invalid(
            where, "eps=None and no gain", "a number", "pass eps=..., as the layer has it"
        )
    return float(jnp.finfo(promote_dtype(found["g"])).eps)
