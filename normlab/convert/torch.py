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
from normlab._checks import promote_dtype
from normlab.convert.leaves import flatten, held, near, numbers, take
from normlab.convert.library import REQUIRED, Layer, Library, is_a, refuse, spectral
from normlab.convert.spectral import (
    from_vectors,
    to_vectors,
    units_first,
    units_last,
    window_first,
    window_last,
)
from normlab.convert.statistics import average, is_average, mean_and_var, mean_and_var_of
from normlab.convert.value import NORM, OF_KERNELS, Converted, Exported, check
from normlab.convert.weight import from_units_first, to_units_first
from normlab.errors import invalid
from normlab.population.by_name import init_population
from normlab.population.frozen import freeze
from normlab.population.optional import options
from normlab.population.protocol import Population

ELEMENTWISE = {"normalized_shape": None, "elementwise_affine": True}

TORCH = Library(
    "torch",
    ("torch",),
    {
        "batch": Layer(
            ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
            {
                "eps": 1e-5,
                "momentum": 0.1,
                "affine": True,
                "bias": True,
                "track_running_stats": True,
            },
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
        "spectral": Layer((), {"n_power_iterations": 1, "eps": 1e-12}, {"dim": 0}),
    },
    {"eps": "eps", "groups": "num_groups", "shape": "normalized_shape"}
    | {"g": "affine elementwise_affine", "b": "bias"},
    {"g": "weight", "b": "bias"},
    own_axes=True,
)
STATISTICS = {"mean": "running_mean", "var": "running_var", "updates": "num_batches_tracked"}
GAINS = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
)
"""Gain and direction, as `torch.nn.utils.parametrizations.weight_norm` and its elder name them."""
SPECTRAL = (
    ("parametrizations.weight.original", *(f"parametrizations.weight.0._{n}" for n in "uv")),
    ("weight_orig", "weight_u", "weight_v"),
)
"""Kernel, u and v, as `torch.nn.utils.parametrizations.spectral_norm` and its elder name them."""


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
        `"group"`, `"instance"`, `"weight"` or `"spectral"`; a module with one of the last two needs
        it too, as does one of a class that is not torch's own. A kind comes before the class of
        the module, which still says its own arguments; what a subclass adds to the norm is not
        converted.
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
        kinds = ", ".join(TORCH.layers)
        raise invalid(where, "no kind of norm", f"one of {kinds}", "pass layer=...")
    if not isinstance(layer, str) and hasattr(layer, "state_dict"):
        module = layer
    frozen = layer == "batch" and is_a(module, "FrozenBatchNorm")
    if frozen:  # it has no momentum, and some classes have no eps either
        arguments = {"eps": getattr(module, "eps", 1e-5), "momentum": 0.1, **arguments}
    if layer == "spectral":
        arguments = _spectral_arguments(module) | arguments
    own = None if layer in OF_KERNELS else module
    kind, values = TORCH.settings(where, layer, arguments, allow, module=own)
    leaves = flatten(where, leaves)
    if kind == "spectral":
        return _from_spectral(where, leaves, root, module, values, allow)
    if kind == "weight":
        return _from_weight(where, leaves, root, module)
    if values.get("bias") is not None:  # a module has its bias where its argument was a flag
        gain = values.get("affine", values.get("elementwise_affine"))
        values["bias"] = gain and values["bias"] is not False
    names = TORCH.wanted(kind, values)
    if kind == "batch" and values["track_running_stats"]:
        names |= STATISTICS
        if root + names["updates"] not in leaves:  # before torch 0.4.1, and FrozenBatchNorm2d
            del names["updates"]
    aside = [] if module is None else [name + "." for name, _ in module.named_children()]
    if kind == "instance" and values["track_running_stats"]:  # lost knowingly
        aside += STATISTICS.values()
    leaves = {n: v for n, v in leaves.items() if not n.startswith(tuple(root + a for a in aside))}
    found = take(where, leaves, {ours: root + name for ours, name in names.items()}, [root])
    state = _state(where, found, values["momentum"], count) if "mean" in found else ()
    state = freeze(state) if frozen and state != () else state
    values["eps"] = _eps(where, found, values["eps"])
    return TORCH.converted(where, kind, found, values, state)


@checked("to torch", norm=NORM, old_names=flag())
def to_torch(
    norm: Converted, *, path: str = "", old_names: bool = False, allow: Sequence[str] = ()
) -> Exported:
    """Returns `(state_dict, arguments)`, the inverse of `from_torch`.

    The leaves are NumPy arrays: `{name: torch.as_tensor(v) for name, v in state_dict.items()}`.

    Args:
      norm: The norm.
      path: The prefix in the `state_dict` of a model.
      old_names: Whether weight norm's leaves are `weight_g` and `weight_v`, and spectral norm's
        `weight_orig`, `weight_u` and `weight_v`.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If torch has no such norm, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> from normlab import Affine
    >>> norm = Converted("group", Affine(jnp.ones(4), jnp.zeros(4)), eps=1e-5, groups=2)
    >>> to_torch(norm).arguments
    {'eps': 1e-05, 'affine': True, 'num_groups': 2}
    """
    where = "to torch"
    lost: dict[str, str] = {}
    arguments: dict[str, Any]
    g, b = norm.params
    if check(where, norm).kind == "spectral":
        found = to_vectors(where, norm, allow, first="v" if old_names else "u")
        found |= {"kernel": units_first(found["kernel"]), "v": window_last(found["v"])}
        names = dict(zip(("kernel", "u", "v"), SPECTRAL[old_names], strict=True)) | {"b": "bias"}
        leaves = {name: found[ours] for ours, name in names.items() if ours in found}
        arguments = {"n_power_iterations": norm.steps, "eps": 1e-12, "dim": 0}
    elif norm.kind == "weight":
        named = dict(zip(("g", "kernel"), GAINS[old_names], strict=True)) | {"b": "bias"}
        leaves = {named[name]: v for name, v in to_units_first(norm, lost).items()}
        arguments = {"dim": 0}
    else:
        leaves, arguments = TORCH.params(norm), TORCH.arguments(where, norm, lost)
        if g is None and b is not None:
            lost.setdefault("bias", "torch has no bias without a gain")
        if g is None or b is not None:  # earlier versions have no such argument
            arguments.pop("bias", None)
    if norm.kind == "batch":
        arguments["track_running_stats"] = norm.state != ()
        if norm.state != ():
            leaves |= _statistics(where, norm, lost)
        if is_average(norm):
            arguments["momentum"] = momentum(norm.state.decay)
        elif options(norm.state).get("population") == "cumulative":
            arguments["momentum"] = None
    refuse(where, lost, allow)
    root = path + "." if path else ""
    return Exported({root + name: v for name, v in numbers(leaves).items()}, arguments)


def _state(
    where: str, found: Mapping[str, Any], momentum: float | None, count: float | None
) -> Population:
    if momentum is not None:
        decay = 1 - float(momentum)
        return average(where, found, decay=decay, ddof=1, updates=found.get("updates", 0))
    mean, var = mean_and_var_of(where, found)
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
    empty = init_population("cumulative", mean.size, ddof=1, estimator="within", dtype=mean.dtype)
    return empty._replace(
        count=jnp.full_like(mean, count * seen),
        mean=mean,
        within=var * ((count - 1) * seen),
        updates=updates,
    )


def _statistics(where: str, norm: Converted, lost: dict[str, str]) -> dict[str, Any]:
    state = norm.state
    if options(state).get("estimator") == "within":
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
    _check_units_first(where, module)
    if any(root + u in leaves for _, u, _ in SPECTRAL):
        raise spectral(where)
    g, kernel = next((pair for pair in GAINS if root + pair[0] in leaves), GAINS[0])
    wanted = {"g": root + g, "kernel": root + kernel, "b": root + "bias"}
    return from_units_first(where, leaves, wanted, [root])


def _check_units_first(where: str, module: Any) -> None:
    """Raises ValueError for a transposed convolution, where the module says that it is one."""
    if getattr(module, "transposed", False) or is_a(module, "ConvTranspose"):
        change = "convert the kernel that it computes, module.weight: of dim=0 are the inputs there"
        given = f"a {type(module).__name__}, whose kernel has its inputs first"
        raise invalid(where, given, "a layer with its units first", change)


def _spectral_arguments(module: Any) -> dict[str, Any]:
    """What a module says of its spectral norm: of the parametrization, or of the elder's hook."""
    found = [*getattr(getattr(module, "parametrizations", None), "weight", ())]
    found += getattr(module, "_forward_pre_hooks", {}).values()
    for one in found:
        if hasattr(one, "n_power_iterations"):
            return held(one, *TORCH.layers["spectral"].arguments, "dim")
    return {}


def _from_spectral(
    where: str,
    leaves: Mapping[str, Any],
    root: str,
    module: Any,
    values: Mapping[str, Any],
    allow: Sequence[str],
) -> Converted:
    _check_units_first(where, module)
    named = next((names for names in SPECTRAL if root + names[1] in leaves), SPECTRAL[0])
    ours = ("kernel", "u", "v")
    wanted: dict[str, str] = {n: root + name for n, name in zip(ours, named, strict=True)}
    if root + "bias" in leaves:
        wanted["b"] = root + "bias"
    found = take(where, leaves, wanted, [root])
    if found["kernel"].ndim < 2:
        given = f"a kernel of shape {found['kernel'].shape}"
        raise invalid(where, given, "[C, K, ...]", "divide a vector by its length by hand")
    last = units_last(found["kernel"])
    found |= {"kernel": last, "v": window_first(found["v"], last)}
    first = "v" if named == SPECTRAL[1] else "u"
    steps, eps = values["n_power_iterations"], values["eps"]
    return from_vectors(where, found, steps, eps, allow, first=first)


def _eps(where: str, found: Mapping[str, Any], eps: float | None) -> float:
    """RMS norm's `None` stands for the rounding of the type that its input, here its gain, has.

    Of float32 at least: torch computes in it (some earlier versions took half precision's own).
    """
    if eps is not None:
        return eps
    if "g" not in found:
        change = "pass eps=..., as the layer has it"
        raise invalid(where, "eps=None and no gain", "a number", change)
    return float(jnp.finfo(promote_dtype(found["g"])).eps)
