"""dm-haiku: `{module: {"scale", "offset"}}`, and averages in `{module}/~/mean_ema` and `var_ema`.

An average keeps `hidden`, which starts at 0, `counter`, and average = hidden / (1 − decay^counter).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from normlab._arguments import anything, checked, integer, text
from normlab.convert.leaves import flatten, take, vector
from normlab.convert.library import REQUIRED, Layer, Library, refuse
from normlab.convert.spectral import EPSILON, from_vectors, to_vectors
from normlab.convert.statistics import average, counted, mass_after, statistics_dtype
from normlab.convert.value import NORM, Converted, Exported, check
from normlab.errors import invalid
from normlab.population.protocol import Population

AFFINE = {"create_scale": REQUIRED, "create_offset": REQUIRED, "eps": 1e-5}
FORMAT = {"data_format": "channels_last"}
SYNC = {"cross_replica_axis": None, "cross_replica_axis_index_groups": None}

HAIKU = Library(
    "haiku",
    ("haiku",),
    {
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
        "spectral": Layer(("SpectralNorm",), {"n_steps": 1, "eps": 1e-4}),
    },
    {"eps": "eps", "decay": "decay_rate", "groups": "groups", "axes": "axis"}
    | {"g": "create_scale", "b": "create_offset"},
    {"g": "scale", "b": "offset"},
    bias="offset",
    whole=slice(1, None),
)
AVERAGES = {"mean": "mean_ema", "var": "var_ema"}
INSIDE = ("average", "hidden", "counter")


KERNEL = text("the path of a parameter", "pass for example kernel='linear/w'")


@checked("from haiku", variables=anything, kernel=KERNEL)
def from_haiku(
    variables: tuple[Mapping[str, Any], Mapping[str, Any]],
    layer: Any,
    *,
    path: str,
    kernel: str | None = None,
    allow: Sequence[str] = (),
    **arguments: Any,
) -> Converted:
    """Returns a norm of dm-haiku as normlab's.

    Args:
      variables: `(params, state)` as a transformed function has them; `{}` for no state.
      layer: A kind: `"batch"`, `"layer"`, `"rms"`, `"group"`, `"instance"` or `"spectral"`.
      path: The module's name, as `"resnet/~/initial_batchnorm"`.
      kernel: Of spectral norm, the parameter that it normalizes, as `"linear/w"`, whose module's
        `b` is the bias if there is one.
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
    kind, values = HAIKU.settings(where, layer, arguments, allow)
    if not isinstance(variables, Sequence) or len(variables) != 2:
        given = f"variables of type {type(variables).__name__}"
        raise invalid(where, given, "a pair (params, state)", "pass (params, {}) without a state")
    leaves = flatten(where, {"params": variables[0], "state": variables[1]})
    if kind == "spectral":
        return _from_spectral(where, leaves, path, kernel, values, allow)
    wanted = {n: f"params/{path}/{leaf}" for n, leaf in HAIKU.wanted(kind, values).items()}
    if kind == "batch":
        for ours, name in AVERAGES.items():
            wanted |= {f"{ours}/{leaf}": f"state/{path}/~/{name}/{leaf}" for leaf in INSIDE}
    found = take(where, leaves, wanted, [f"params/{path}/", f"state/{path}/"])
    found |= {n: vector(where, n, found[n]) for n in ("g", "b") if n in found}
    state = _from_averages(where, found, values["decay_rate"]) if kind == "batch" else None
    return HAIKU.converted(where, kind, found, values, state)


@checked(
    "to haiku",
    norm=NORM,
    ndim=integer("a rank, at least 1", "pass that of the input", 1),
    kernel=KERNEL,
)
def to_haiku(
    norm: Converted,
    *,
    path: str,
    ndim: int | None = None,
    kernel: str | None = None,
    allow: Sequence[str] = (),
) -> Exported:
    """Returns `((params, state), arguments)`, the inverse of `from_haiku`.

    Args:
      norm: The norm.
      path: The module's name.
      ndim: The rank of the layer's input, which is that of batch norm's leaves in haiku.
      kernel: Of spectral norm, where to put the parameter that it normalizes, as `"linear/w"`.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If haiku has no such norm, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> from normlab import Affine
    >>> norm = Converted("instance", Affine(jnp.ones(3), None), eps=1e-5)
    >>> to_haiku(norm, path="norm").variables[0]["norm"]["scale"].shape
    (3,)
    """
    where = "to haiku"
    lost: dict[str, str] = {}
    if check(where, norm).kind == "spectral":
        module, name = _parameter(where, kernel)
        found = to_vectors(where, norm, allow, squared=True, moves=True)
        params = {name: found["kernel"]} | ({"b": found["b"]} if "b" in found else {})
        state = {"u0": found["u"][None], "sigma": found["sigma"]}
        arguments = {"n_steps": norm.steps, "eps": EPSILON}
        return Exported(({module: params}, {path: state}), arguments)
    arguments = HAIKU.arguments(where, norm, lost)
    params, state = HAIKU.params(norm), {}
    if "param_axis" in HAIKU.layers[norm.kind].fixed:
        arguments["param_axis"] = -1
    if norm.kind == "batch":
        if ndim is None:
            change = "pass ndim=2 for [N, C], ndim=4 for [N, H, W, C]"
            raise invalid(where, "batch norm and no ndim", "the rank of its input", change)
        shape = (*[1] * (ndim - 1), -1)
        params = {name: v.reshape(shape) for name, v in params.items()}
        state = _to_averages(where, norm, path, shape, lost)
    refuse(where, lost, allow)
    return Exported(({path: params} if params else {}, state), arguments)


def _parameter(where: str, kernel: str | None) -> tuple[str, str]:
    """The module and the name of a parameter."""
    module, _, name = (kernel or "").rpartition("/")
    if not module:
        given = f"spectral norm and kernel={kernel!r}"
        raise invalid(where, given, "the parameter that it normalizes", "pass kernel='linear/w'")
    return module, name


def _from_spectral(
    where: str,
    leaves: Mapping[str, Any],
    path: str,
    kernel: str | None,
    values: Mapping[str, Any],
    allow: Sequence[str],
) -> Converted:
    module, name = _parameter(where, kernel)
    wanted = {"kernel": f"params/{module}/{name}", "b": f"params/{module}/b"}
    wanted |= {"u": f"state/{path}/u0", "sigma": f"state/{path}/sigma"}
    wanted = {n: v for n, v in wanted.items() if n != "b" or v in leaves}
    found = take(where, leaves, wanted, [f"state/{path}/"])
    how: Any = {"squared": True, "moves": True}
    return from_vectors(where, found, values["n_steps"], values["eps"], allow, **how)


def _from_averages(where: str, found: Mapping[str, Array], decay: float) -> Population:
    """The averages as they are, and the mass by which haiku divided to get them."""
    counter = int(found["mean/counter"])
    if counter != int(found["var/counter"]):
        given = f"{counter} updates of the mean and {int(found['var/counter'])} of the variance"
        raise invalid(where, given, "as many", "convert the two averages of one layer")
    dtype = statistics_dtype(where, found["mean/average"])
    hidden, read = (
        np.concatenate([np.ravel(found[f"{ours}/{leaf}"]) for ours in AVERAGES]).astype(np.float64)
        for leaf in ("hidden", "average")
    )
    expected = np.asarray(mass_after(counter, decay, dtype))
    if hidden.shape != read.shape:
        given = f"{hidden.size} values of hidden and {read.size} of average"
        raise invalid(where, given, "as many", "convert the averages of one layer")
    if not np.allclose(hidden, read * expected, rtol=1e-4, atol=1e-30):
        given = f"averages that are not hidden / {expected:g}, after {counter} updates"
        change = "pass the decay_rate with which the layer was trained"
        raise invalid(where, given, "hidden / (1 - decay_rate ** counter)", change)
    seen = read != 0
    mass = np.median(hidden[seen] / read[seen]) if seen.any() else expected
    vectors = {ours: vector(where, ours, found[f"{ours}/average"]) for ours in AVERAGES}
    return average(where, vectors, decay=decay, mass=mass.astype(dtype), updates=counter)


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
