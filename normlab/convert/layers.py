"""What a library calls its norms: classes, arguments, defaults, and what normlab cannot say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from normlab._arguments import Kind, flag, integer, read, real
from normlab._checks import invalid, nearest
from normlab.example import Axes

REQUIRED = object()
"""In place of a default: the library has none, so it must be given."""

ADVICE = {
    "axis": "pass channel_axis to normlab's norm",
    "data_format": "pass channel_axis to normlab's norm",
    "feature_axes": "normlab's parameters lie along channel_axis",
    "param_axis": "normlab's parameters lie along channel_axis",
    "axis_name": "pass axis_name to normlab's norm",
    "cross_replica_axis": "pass axis_name to normlab's norm",
    "axis_index_groups": "pass axis_name=normlab.Sync(...) to normlab's norm",
    "cross_replica_axis_index_groups": "pass axis_name=normlab.Sync(...) to normlab's norm",
    "synchronized": "pass axis_name to normlab's norm",
    "dtype": "normlab's output has its input's type: cast around it",
    "compute_dtype": "normlab's output has its input's type: cast around it",
    "force_float32_reductions": "normlab's statistics are float32 at least",
    "trainable": "normlab.population.freeze(state) freezes the statistics",
    "mode": "in training it normalizes by the running statistics, normlab by those of the batch",
    "track_running_stats": "normlab's instance norm measures each example at evaluation too; as "
    "the kind 'batch' its statistics are those of inference",
    "renorm": "build the state with normlab.get('batch', population='renorm') instead",
    "dim": "normlab's weight norm has a gain for each unit, of dim=0",
    "weight axis": "normlab's weight norm has a gain for each unit, of axis=0",
    "weight_name": "normlab's weight norm is that of the kernel",
}
"""What to do about an argument that is not carried over, or about that of one kind."""


class Layer(NamedTuple):
    """What a library calls one kind of norm.

    Attributes:
      classes: The names of its classes.
      arguments: Those that are carried over, with the library's own defaults.
      fixed: Those that are not, each with the value at which nothing is lost.
    """

    classes: tuple[str, ...]
    arguments: dict[str, Any]
    fixed: dict[str, Any] = {}  # noqa: RUF012


SIZE = integer("a whole number", "pass an int")
WORDS: dict[str, Kind] = dict.fromkeys(("groups", "num_groups", "group_size"), SIZE)
WORDS |= dict.fromkeys(("eps", "epsilon", "momentum", "decay_rate"), real)
"""What arguments must be that are given by name; whether they fit the layer is seen later."""

UNSEEN = ("eps", "epsilon", "momentum")
"""Arguments of which no leaf tells: a module without such an attribute has them elsewhere."""


def settings(
    where: str,
    layers: Mapping[str, Layer],
    home: tuple[str, ...],
    layer: Any,
    given: Mapping[str, Any],
    allow: Sequence[str],
    *,
    module: Any = None,
) -> tuple[str, dict[str, Any]]:
    """Returns the kind of a layer and its arguments, under the library's own names.

    Args:
      where: The converter, for the errors.
      layers: The library's norms by kind.
      home: The packages that have the library's classes.
      layer: A kind by name, whatever the class of `module`, or a layer object.
      given: Arguments by name, which come first.
      allow: The arguments that may be lost.
      module: The object of which a layer given by name has its arguments; `None` for the
        library's defaults.

    Raises:
      ValueError: If the kind, the class or an argument is unknown, an argument is missing, or one
        cannot be carried over.
    """
    if isinstance(layer, str):
        kind = layer
    else:
        kind, module = _kind(where, layers, home, layer), layer
    if kind not in layers:
        change = f"use a known one: {nearest(kind, layers)}"
        raise invalid(where, f"the kind {kind!r}", "a norm that the library has", change)
    known = {**layers[kind].arguments, **layers[kind].fixed}
    for name in given:
        if name not in known:
            expected = f"an argument of {kind} norm that its numbers depend on"
            raise invalid(where, f"{name}={given[name]!r}", expected, nearest(name, known))
        word = flag() if isinstance(known[name], bool) else WORDS.get(name)
        if word and given[name] is not None:
            read(where, name, given[name], word)
    own = {} if module is None else _attributes(module, known, UNSEEN if kind != "weight" else ())
    values = {**known, **own, **given}
    for name, value in values.items():
        if value is REQUIRED:
            by = "the library has no default for it"
            if module is not None:
                by = f"a {type(module).__name__} does not say it"
            change = f"pass {name}=..., with which the layer was made"
            raise invalid(where, f"no {name}", f"it: {by}", change)
    lost = {}
    for name, value in layers[kind].fixed.items():
        if values[name] != value:
            advice = ADVICE.get(name, "normlab has no such thing")
            advice = ADVICE.get(f"{kind} {name}", advice)
            lost[name] = f"{values[name]!r} and not {value!r}: {advice}"
    refuse(where, lost, allow)
    return kind, values


def refuse(where: str, lost: Mapping[str, str], allow: Sequence[str]) -> None:
    """Raises ValueError if a convention would be lost that is not allowed to be.

    Args:
      where: The converter.
      lost: The convention's name -> what it is, and how to keep it.
      allow: The names of those that may be lost.
    """
    allow = (allow,) if isinstance(allow, str) else tuple(allow)
    left = {name: text for name, text in lost.items() if name not in allow}
    if left:
        raise invalid(
            where,
            "what cannot be carried over: " + "; ".join(f"{n} ({t})" for n, t in left.items()),
            "a norm of which nothing is lost",
            f"follow these hints, or lose it knowingly with allow={(*allow, *left)!r}",
        )


def supported(where: str, layers: Mapping[str, Layer], kind: str, change: str = "") -> None:
    """Raises ValueError if a library has no such norm."""
    if kind not in layers:
        change = change or "write the layer in that library by hand"
        raise invalid(where, f"a {kind} norm", f"one of {', '.join(layers)}", change)


def axes_from(axes: Any) -> Axes:
    """Returns a library's numbers of axes as normlab's `axes`; -1 alone is the channels."""
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    return "channels" if axes == (-1,) else axes


def axes_of_shape(where: str, name: str, shape: Any, found: Mapping[str, Any]) -> Axes:
    """Returns the last axes of the input, as many as a layer's shape has.

    Args:
      where: The converter.
      name: The library's word for the shape.
      shape: The shape, or a number; `None` for that of the parameters.
      found: The parameters.

    Raises:
      ValueError: If there is no shape, or the parameters have another.
    """
    own = next((v.shape for v in found.values()), None)
    shape = own if shape is None else tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if shape is None or own not in (None, shape):
        given = f"{name}={shape} and parameters of shape {own}"
        raise invalid(where, given, "the shape of the layer", f"pass {name}=...")
    return "channels" if len(shape) == 1 else tuple(range(-len(shape), 0))


def axes_to(where: str, axes: Axes) -> int | tuple[int, ...]:
    """Returns normlab's `axes` as numbers; `"channels"` is -1.

    Raises:
      ValueError: For `"all"`, which is as many axes as the input has.
    """
    if axes == "all":
        change = "say them: Converted._replace(axes=(1, 2, 3)) for an image"
        raise invalid(where, "axes='all'", "axes by number", change)
    return -1 if axes == "channels" else axes  # pyright: ignore[reportReturnType]


def is_a(module: Any, name: str) -> bool:
    """Whether an object is of a class of that name, or of a class made from one."""
    return any(name in cls.__name__ for cls in type(module).__mro__)


def _kind(where: str, layers: Mapping[str, Layer], home: tuple[str, ...], layer: Any) -> str:
    name, package = type(layer).__name__, type(layer).__module__
    if is_a(layer, "SpectralNorm"):
        raise spectral(where)
    kinds = {cls: kind for kind, entry in layers.items() for cls in entry.classes}
    if name in kinds and package.startswith(home):
        return kinds[name]
    raise invalid(
        where,
        f"a layer of type {package}.{name}",
        f"a norm of {' or '.join(home)}, or the kind of norm that it is",
        f"pass one of {', '.join(layers)}, and its arguments ({nearest(name, kinds)})",
    )


def spectral(where: str) -> ValueError:
    """Returns the error for spectral norm, which is none of the kinds."""
    return invalid(
        where,
        "spectral norm, which divides by the largest singular value of a kernel",
        "a norm that normlab has",
        "convert the layer without it: write the kernel that it computes",
    )


def _attributes(
    layer: Any, names: Mapping[str, Any], required: Sequence[str] = ()
) -> dict[str, Any]:
    found = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    return {name: REQUIRED for name in required if name in names} | found
