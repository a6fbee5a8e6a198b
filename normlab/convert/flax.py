"""Flax: flax.linen, and flax.nnx, whose norms have the same names and defaults.

linen has `{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}`, nnx a module, its
`nnx.State` or a plain dict of these leaves. Of weight norm a wrapper keeps the gain: in linen in
its scope, under the path of the kernel from there, `{"Dense_0": {"kernel"}, "WeightNorm_0":
{"Dense_0/kernel/scale"}}`, or, if the wrapper made the layer, `{"layer_instance": {"kernel"},
"layer_instance/kernel/scale"}`; in nnx beside it, `{"layer_instance": {"kernel"}, "scales":
{("kernel",)}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from normlab._arguments import anything, checked
from normlab.convert.leaves import flatten, given, held, nest, take
from normlab.convert.library import Layer, Library, is_a, refuse, spectral
from normlab.convert.spectral import from_vectors, to_vectors
from normlab.convert.statistics import mean_and_var
from normlab.convert.value import NORM, OF_KERNELS, Converted, Exported, check
from normlab.convert.weight import EPSILON, from_units_last, to_units_last
from normlab.errors import invalid

SYNC = {"axis_name": None, "axis_index_groups": None}
NUMBERS = {"dtype": None, "force_float32_reductions": True}
AFFINE = {"epsilon": 1e-6, "use_scale": True, "use_bias": True}

LINEN = Library(
    "Flax",
    ("flax.linen", "normlab.linen"),
    {
        "batch": Layer(
            ("BatchNorm",),
            {**AFFINE, "epsilon": 1e-5, "momentum": 0.99},
            {"axis": -1, "population": "ema", **SYNC, **NUMBERS},
        ),
        "layer": Layer(
            ("LayerNorm",),
            {**AFFINE, "reduction_axes": -1, "feature_axes": -1},
            {**SYNC, **NUMBERS},
        ),
        "rms": Layer(
            ("RMSNorm",),
            {"epsilon": 1e-6, "use_scale": True, "reduction_axes": -1, "feature_axes": -1},
            {**SYNC, **NUMBERS},
        ),
        "group": Layer(
            ("GroupNorm",),
            {**AFFINE, "num_groups": 32, "group_size": None},
            {"reduction_axes": None, **SYNC, **NUMBERS},
        ),
        "instance": Layer(("InstanceNorm",), AFFINE, {"feature_axes": -1, **SYNC, **NUMBERS}),
        "weight": Layer(
            ("WeightNorm",),
            {"epsilon": EPSILON, "use_scale": True},
            {"feature_axes": -1, "dtype": None},
        ),
        "spectral": Layer(
            ("SpectralNorm",),
            {"n_steps": 1, "epsilon": EPSILON},
            {"dtype": None, "collection_name": "batch_stats"},
        ),
    },
    {"eps": "epsilon", "decay": "momentum", "groups": "num_groups"}
    | {"axes": "reduction_axes", "features": "feature_axes"}
    | {"g": "use_scale", "b": "use_bias"},
    {"g": "scale", "b": "bias", "mean": "mean", "var": "var"},
)
LINENS_OWN = ("force_float32_reductions", "collection_name")
NNX = LINEN._replace(
    home=("flax.nnx", "normlab.nnx"),
    layers={
        kind: layer._replace(fixed={n: v for n, v in layer.fixed.items() if n not in LINENS_OWN})
        for kind, layer in LINEN.layers.items()
    },
)


@checked("from linen", variables=anything)
def from_linen(
    variables: Mapping[str, Any],
    layer: Any,
    *,
    path: str = "",
    allow: Sequence[str] = (),
    **arguments: Any,
) -> Converted:
    """Returns a norm of flax.linen as normlab's.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`, of the layer alone or of a whole model.
      layer: The module, `nn.BatchNorm(...)`, or a kind: `"batch"`, `"layer"`, `"rms"`, `"group"`,
        `"instance"`, `"weight"` or `"spectral"`.
      path: Where the layer's variables are in a model's, as `"Block_0/BatchNorm_0"`; of weight
        and spectral norm, where the layer is whose kernel is normalized, as `"Dense_0"`.
      allow: The conventions that may be lost.
      **arguments: linen's own arguments, where the layer was not made with linen's defaults.

    Raises:
      ValueError: If a leaf is missing, too many or of the wrong shape, an argument unknown, or a
        convention would be lost.

    >>> import jax.numpy as jnp
    >>> variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    >>> from_linen(variables, "layer", epsilon=1e-6).eps
    1e-06
    """
    where = "from linen"
    kind, values = LINEN.settings(where, layer, arguments, allow)
    leaves = flatten(where, variables)
    if kind in OF_KERNELS:
        read = _linen_weight if kind == "weight" else _linen_spectral
        values["moves"] = not _is_ours(layer)
        return read(where, leaves, path or "layer_instance", values, allow)
    root = path + "/" if path else ""
    wanted = {
        ours: f"{'batch_stats' if ours in ('mean', 'var') else 'params'}/{root}{theirs}"
        for ours, theirs in LINEN.wanted(kind, values).items()
    }
    found = take(where, leaves, wanted, [f"{collection}/{root}" for collection in variables])
    return _converted(where, kind, found, values)


@checked("to linen", norm=NORM)
def to_linen(norm: Converted, *, path: str = "", allow: Sequence[str] = ()) -> Exported:
    """Returns `(variables, arguments)`, the inverse of `from_linen`.

    Args:
      norm: The norm.
      path: Where to put the variables in a model's.
      allow: The conventions that may be lost.

    Raises:
      ValueError: If linen has no such norm, or a convention would be lost.

    >>> import jax.numpy as jnp
    >>> from normlab import Affine
    >>> to_linen(Converted("layer", Affine(jnp.ones(3), None), eps=1e-5)).arguments
    {'epsilon': 1e-05, 'use_scale': True, 'use_bias': False, 'reduction_axes': -1}
    """
    where = "to linen"
    scope, _, name = (path or "layer_instance").rpartition("/")
    if check(where, norm).kind == "spectral":
        layer, vectors, arguments = _to_spectral(where, norm, allow)
        held = {f"{name}/kernel/{leaf}": v for leaf, v in vectors.items()}
        if name != "layer_instance":
            held = {"SpectralNorm_0": held}
        trees = {"params": {name: layer}, "batch_stats": held}
        return Exported({c: nest(scope, tree) for c, tree in trees.items()}, arguments)
    if norm.kind == "weight":
        layer, g, arguments = to_units_last(where, norm, allow)
        gain = {} if g is None else {f"{name}/kernel/scale": g}
        if gain and name != "layer_instance":
            gain = {"WeightNorm_0": gain}
        return Exported({"params": nest(scope, {name: layer, **gain})}, arguments)
    params, statistics, arguments = _to_flax(where, norm, allow)
    trees = {"params": params, "batch_stats": statistics}
    return Exported({name: nest(path, tree) for name, tree in trees.items() if tree}, arguments)


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
        `"group"`, `"instance"`, `"weight"` or `"spectral"`, which comes before the class of the
        module: that says its own arguments all the same.
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
    kind, values = NNX.settings(where, layer, arguments, allow, module=module)
    if module is not None:
        variables = nest(path, _variables(where, module, kind))
    leaves = flatten(where, variables)
    root = path + "/" if path else ""
    if kind == "weight" and root + "batch_stats/kernel/u" in leaves:
        raise spectral(where)
    if kind == "spectral":
        inner, held_in = root + "layer_instance/", root + "batch_stats/kernel/"
        wanted = {"kernel": inner + "kernel", "b": inner + "bias"}
        wanted |= {"u": held_in + "u", "sigma": held_in + "sigma"}
        ours = _is_ours(layer) or _is_ours(module)
        return _from_spectral(where, leaves, wanted, [root], values, allow, ours=ours, writes=True)
    if kind == "weight":
        inner = root + "layer_instance/"
        wanted = {"kernel": inner + "kernel", "b": inner + "bias", "g": root + "scales/kernel"}
        return from_units_last(where, leaves, wanted, [root], values, allow)
    wanted = {ours: root + theirs for ours, theirs in NNX.wanted(kind, values).items()}
    found = take(where, leaves, wanted, [root])
    return _converted(where, kind, found, values)


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
    >>> from normlab import Affine
    >>> sorted(to_nnx(Converted("rms", Affine(jnp.ones(3), None), eps=1e-6)).variables)
    ['scale']
    """
    where = "to nnx"
    if check(where, norm).kind == "spectral":
        layer, vectors, arguments = _to_spectral(where, norm, allow, writes=True)
        stats = {("kernel", leaf): v for leaf, v in vectors.items()}
        return Exported(nest(path, {"layer_instance": layer, "batch_stats": stats}), arguments)
    if norm.kind == "weight":
        layer, g, arguments = to_units_last(where, norm, allow)
        gain = {} if g is None else {"scales": {("kernel",): g}}
        return Exported(nest(path, {"layer_instance": layer, **gain}), arguments)
    params, statistics, arguments = _to_flax(where, norm, allow)
    return Exported(nest(path, {**params, **statistics}), arguments)


def _converted(
    where: str, kind: str, found: Mapping[str, Array], values: dict[str, Any]
) -> Converted:
    """The norm of these leaves and arguments, of which groups may be given by their size."""
    groups, size = values.get("num_groups"), values.get("group_size")
    if kind == "group" and size is not None:
        channels = next(iter(found.values())).size if found else None
        if not channels or groups not in (None, channels // size):
            given, change = (
                f"num_groups={groups}, group_size={size}",
                "pass num_groups and group_size=None",
            )
            raise invalid(where, given, "one of the two", change)
        values = {**values, "num_groups": channels // size}
    return LINEN.converted(where, kind, found, values)


def _to_flax(
    where: str, norm: Converted, allow: Sequence[str]
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    """Flax's parameters, statistics and arguments of a norm; not of weight norm."""
    lost: dict[str, str] = {}
    arguments = LINEN.arguments(where, norm, lost)
    statistics = {}
    if norm.kind == "batch":
        statistics["mean"], statistics["var"] = mean_and_var(where, norm, lost)
    refuse(where, lost, allow)
    return LINEN.params(norm), statistics, arguments


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
    if kind in OF_KERNELS:
        if kind == "weight" and is_a(module, "SpectralNorm"):
            raise spectral(where)
        inner = held(getattr(module, "layer_instance", None), "kernel", "bias")
        return {"layer_instance": inner, **held(module, "scales", "batch_stats")}
    return held(module, "scale", "bias", "mean", "var")


def _linen_weight(
    where: str,
    leaves: Mapping[str, Any],
    at: str,
    values: Mapping[str, Any],
    allow: Sequence[str],
) -> Converted:
    """Weight norm, of which `at` is the path of the wrapped layer."""
    layer = f"params/{at}/"
    if any(_wraps(name, f"batch_stats/{at}/kernel/u") for name in leaves):
        raise spectral(where)
    gains = [name for name in leaves if _wraps(name, f"{layer}kernel/scale")]
    gain = gains[0] if len(gains) == 1 else f"params/WeightNorm_0/{at}/kernel/scale"
    within = [layer, *(name.removesuffix("kernel/scale") for name in gains)]
    wanted = {"kernel": layer + "kernel", "b": layer + "bias", "g": gain}
    return from_units_last(where, leaves, wanted, within, values, allow)


def _linen_spectral(
    where: str,
    leaves: Mapping[str, Any],
    at: str,
    values: Mapping[str, Any],
    allow: Sequence[str],
) -> Converted:
    """Spectral norm, of which `at` is the path of the wrapped layer."""
    layer = f"params/{at}/"
    names = [name for name in leaves if _wraps(name, f"batch_stats/{at}/kernel/u")]
    u = names[0] if len(names) == 1 else f"batch_stats/SpectralNorm_0/{at}/kernel/u"
    sigma = u.removesuffix("u") + "sigma"
    wanted = {"kernel": layer + "kernel", "b": layer + "bias", "u": u, "sigma": sigma}
    within = [layer, *(name.removesuffix("kernel/u") for name in names)]
    return _from_spectral(where, leaves, wanted, within, values, allow, ours=not values["moves"])


def _from_spectral(
    where: str,
    leaves: Mapping[str, Any],
    wanted: Mapping[str, str],
    within: Sequence[str],
    values: Mapping[str, Any],
    allow: Sequence[str],
    *,
    ours: bool,
    writes: bool = False,
) -> Converted:
    names = {n: name for n, name in wanted.items() if n != "b" or name in leaves}
    found = take(where, leaves, names, within)
    how: Any = {"squared": not ours, "moves": not ours, "writes": writes and not ours}
    return from_vectors(where, found, values["n_steps"], values["epsilon"], allow, **how)


def _to_spectral(
    where: str, norm: Converted, allow: Sequence[str], *, writes: bool = False
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    """The leaves of the wrapped layer, u and σ̂, and the wrapper's arguments."""
    found = to_vectors(where, norm, allow, squared=True, moves=True, writes=writes)
    layer = given({"kernel": found["kernel"], "bias": found.get("b")})
    vectors = {"u": found["u"][None], "sigma": found["sigma"]}
    return layer, vectors, {"n_steps": norm.steps, "epsilon": EPSILON}


def _is_ours(layer: Any) -> bool:
    """Whether a module is this library's own, which means by its words what this library does."""
    return type(layer).__module__.startswith("normlab")


def _wraps(name: str, leaf: str) -> bool:
    """Whether a leaf has that path, or has it less the name of a wrapper."""
    parts = name.split("/")
    return leaf in (name, *("/".join(parts[:i] + parts[i + 1 :]) for i in range(1, len(parts))))
