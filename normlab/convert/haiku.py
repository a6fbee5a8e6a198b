"""dm-haiku: `{module: {"scale", "offset"}}`, and averages in `{module}/~/mean_ema` and `var_ema`.

An average keeps `hidden`, which starts at 0, `counter`, and average = hidden / (1 − decay^counter).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from normlab._arguments import anything, checked, integer
from normlab._checks import invalid
from normlab.convert.layers import REQUIRED, Layer, axes_from, axes_to, refuse, settings, supported
from normlab.convert.leaves import flatten, take, vector
from normlab.convert.statistics import counted, decay_of, mass_after, running, statistics_dtype
from normlab.convert.value import NORM, Converted, Exported, check
from normlab.equation import Affine
from normlab.population.running import Running

HOME = ("haiku",)
AFFINE = {"create_scale": REQUIRED, "create_offset": REQUIRED, "eps": 1e-5}
FORMAT = {"data_format": "channels_last"}
SYNC = {"cross_replica_axis": None, "cross_replica_axis_index_groups": None}

LAYERS = {
    "batch": Layer(
        ("BatchNorm",), {**AFFINE, "decay_rate": REQUIRED}, {"axis": None, **SYNC, **FORMAT}
    ),
    "layer": Layer(("LayerNorm",), {**AFFINE, "axis": REQUIRED}, {"param_axis": -1}),
    "rms": Layer(
        ("RMSNorm",), {"axis": REQUIRED, "eps": 1e-5, "create_scale": True}, {"param_axis": -1}
    ),
    "group": Layer(
        ("GroupNorm",),
        {**AFFINE, "groups": REQUIRED, "create_scale": True, "create_offset": True},
        {"axis": slice(1, None), **FORMAT},
    ),
    "instance": Layer(("InstanceNorm",), AFFINE, FORMAT),
}
AVERAGES = {"mean": "mean_ema", "var": "var_ema"}


@checked("from haiku", variables=anything)
def from_haiku(
    variables: tuple[Mapping[str, Any], Mapping[str, Any]],
    layer: Any,
    *,
    path: str,
    allow: Sequence[str] = (),
    **arguments: Any,
) -> Converted:
    """Returns a norm of dm-haiku as normlab's.

    Args:
      variables: `(params, state)` as a transformed function has them; `{}` for no state.
      layer: A kind: `"batch"`, `"layer"`, `"rms"`, `"group"` or `"instance"`.
      path: The module's name, as `"resnet/~/initial_batchnorm"`.
      allow: The conventions that may be lost.
      **arguments: haiku's own arguments; required where haiku has no default.

    Raises:
      ValueError: If a leaf is missing, too many or of the wrong shape, an argument unknown or
        missing, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> params = {"ln": {"scale": jnp.ones(3)}}
    >>> options = {"create_scale": True, "create_offset": False, "axis": -1}
    >>> from_haiku((params, {}), "layer", path="ln", **options).params.g.shape
    (3,)
    """
    where = "from haiku"
    kind, values = settings(where, LAYERS, HOME, layer, arguments, allow)
    if not isinstance(variables, Sequence) or len(variables) != 2:
        given = f"variables of type {type(variables).__name__}"
        raise invalid(where, given, "a pair (params, state)", "pass (params, {}) without a state")
    leaves = flatten(where, {"params": variables[0], "state": variables[1]})
    wanted = {ours: f"params/{path}/{theirs}" for ours, theirs in _affine(values).items()}
    if kind == "batch":
        for ours, average in AVERAGES.items():
            wanted |= {
                f"{ours}/{leaf}": f"state/{path}/~/{average}/{leaf}"
                for leaf in ("average", "hidden", "counter")
            }
    found = take(where, leaves, wanted, [f"params/{path}/", f"state/{path}/"])
    norm = Converted(
        kind,
        Affine(*(vector(where, n, found[n]) if n in found else None for n in ("g", "b"))),
        _from_averages(where, found, values["decay_rate"]) if kind == "batch" else (),
        eps=values["eps"],
        groups=values["groups"] if kind == "group" else None,
        axes=_axes(where, values["axis"]) if kind in ("layer", "rms") else "channels",
    )
    return check(where, norm)


@checked("to haiku", norm=NORM, ndim=integer("a rank, at least 1", "pass that of the input", 1))
def to_haiku(
    norm: Converted, *, path: str, ndim: int | None = None, allow: Sequence[str] = ()
) -> Exported:
    """Returns `((params, state), arguments)`, the inverse of `from_haiku`.

    Args:
      norm: The norm.
      path: The module's name.
      ndim: The rank of the layer's input, which is that of batch norm's leaves in haiku.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If haiku has no such norm, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> norm = Converted("instance", Affine(jnp.ones(3), None), eps=1e-5)
    >>> to_haiku(norm, path="norm").variables[0]["norm"]["scale"].shape
    (3,)
    """
    where = "to haiku"
    supported(where, LAYERS, check(where, norm).kind, "write the kernel that weight_norm returns")
    lost: dict[str, str] = {}
    g, b = norm.params
    arguments = {"eps": norm.eps, "create_scale": g is not None, "create_offset": b is not None}
    params, state = {"scale": g, "offset": b}, {}
    if norm.kind == "batch":
        if ndim is None:
            change = "pass ndim=2 for [N, C], ndim=4 for [N, H, W, C]"
            raise invalid(where, "batch norm and no ndim", "the rank of its input", change)
        shape = (*[1] * (ndim - 1), -1)
        params = {name: v.reshape(shape) for name, v in params.items() if v is not None}
        state = _to_averages(where, norm, path, shape, lost)
        arguments |= decay_of(norm, "decay_rate")
    if norm.kind in ("layer", "rms"):
        axes = slice(1, None) if norm.axes == "all" else axes_to(where, norm.axes)
        arguments |= {"axis": axes, "param_axis": -1}
    if norm.kind == "rms":
        del arguments["create_offset"]
        if b is not None:
            lost["offset"] = "haiku's RMS norm has none: add it after the layer"
    if norm.kind == "group":
        arguments["groups"] = norm.groups
    refuse(where, lost, allow)
    names = _affine(arguments).values()
    params = {path: {name: params[name] for name in names}} if names else {}
    return Exported((params, state), arguments)


def _affine(values: Mapping[str, Any]) -> dict[str, str]:
    """Haiku's names under normlab's, of the parameters that a layer has."""
    names = {"g": "scale", "b": "offset"}
    return {ours: name for ours, name in names.items() if values.get(f"create_{name}")}


def _from_averages(where: str, found: Mapping[str, Array], decay: float) -> Running:
    """The averages as they are, and the mass by which haiku divided to get them."""
    counter = int(found["mean/counter"])
    if counter != int(found["var/counter"]):
        given = f"{counter} updates of the mean and {int(found['var/counter'])} of the variance"
        raise invalid(where, given, "as many", "convert the two averages of one layer")
    dtype = statistics_dtype(where, found["mean/average"])
    hidden, average = (
        np.concatenate([np.ravel(found[f"{ours}/{leaf}"]) for ours in AVERAGES]).astype(np.float64)
        for leaf in ("hidden", "average")
    )
    expected = np.asarray(mass_after(counter, decay, dtype))
    if hidden.shape != average.shape:
        given = f"{hidden.size} values of hidden and {average.size} of average"
        raise invalid(where, given, "as many", "convert the averages of one layer")
    if not np.allclose(hidden, average * expected, rtol=1e-4, atol=1e-30):
        given = f"averages that are not hidden / {expected:g}, after {counter} updates"
        change = "pass the decay_rate with which the layer was trained"
        raise invalid(where, given, "hidden / (1 - decay_rate ** counter)", change)
    seen = average != 0
    mass = np.median(hidden[seen] / average[seen]) if seen.any() else expected
    vectors = {ours: vector(where, ours, found[f"{ours}/average"]) for ours in AVERAGES}
    return running(where, vectors, decay=decay, mass=mass.astype(dtype), updates=counter)


def _to_averages(
    where: str, norm: Converted, path: str, shape: tuple[int, ...], lost: dict[str, str]
) -> dict[str, Any]:
    mean, var, updates = counted(where, norm, lost)
    mass = getattr(norm.state, "mass", 0)
    counter = jnp.asarray(updates, jnp.int32)
    return {
        f"{path}/~/{AVERAGES[ours]}": {
            "average": v.reshape(shape),
            "hidden": (v * mass).reshape(shape),
            "counter": counter,
        }
        for ours, v in {"mean": mean, "var": var}.items()
    }


def _axes(where: str, axis: Any) -> Any:
    """The `axes` of normlab from haiku's, which may be a slice."""
    if axis == slice(1, None):
        return "all"
    if isinstance(axis, slice):
        raise invalid(where, f"axis={axis}", "slice(1, None) or numbers", "pass axis by numbers")
    return axes_from(axis)
