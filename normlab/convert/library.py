"""What a library calls its norms and their parts, and what a converter makes of these words.

A library is a table, `Library`, in a file of its own. Beside it the file has what is peculiar to
the library: how its variables are nested, and what its numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax import Array

from normlab._arguments import Kind, flag, integer, read, real
from normlab.convert.statistics import average, decay_of
from normlab.convert.value import OF_KERNELS, Converted, check
from normlab.equation import Affine
from normlab.errors import invalid, nearest
from normlab.example import Axes
from normlab.gains import Offset
from normlab.site import State

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
    "weight_name": "normlab's norms of a kernel are that of the weight",
    "collection_name": "the converter reads batch_stats",
    "spectral dim": "normlab's spectral norm is of the matrix of all units, of dim=0",
}
"""What to do about an argument that is not carried over, or about that of one kind."""

INSTEAD = {
    "weight": "write the kernel that weight_norm returns",
    "spectral": "write the kernel that spectral_norm returns",
    "instance": "norm._replace(kind='group', groups=C) measures the same",
}
"""What to do where a library has no such norm."""

SIZE = integer("a whole number", "pass an int")
WORDS: dict[str, Kind] = dict.fromkeys(("groups", "num_groups", "group_size"), SIZE)
STEPS = ("n_steps", "n_power_iterations", "num_power_iterations", "power_iterations")
WORDS |= dict.fromkeys(STEPS, integer("a number of steps, at least 1", "pass 1", 1))
WORDS |= dict.fromkeys(("eps", "epsilon", "momentum", "decay_rate"), real)
"""What arguments must be that are given by name; whether they fit the layer is seen later."""

UNSEEN = ("eps", "epsilon", "momentum")
"""Arguments of which no leaf tells: a module without such an attribute has them elsewhere."""


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


class Library(NamedTuple):
    """A library's words.

    Attributes:
      name: That of the library, for errors.
      home: The packages that have its classes.
      layers: Its norms by kind.
      words: normlab's `eps`, `decay`, `groups`, `axes` and `features`, the axes of the parameters,
        -> the library's arguments, and its flags for a gain `g` and a bias `b`. `shape` stands for
        axes that are as many as a shape has. Where kinds have different words these stand side by
        side, with a space.
      leaves: normlab's `g` and `b` -> the library's leaves; and `mean` and `var`, where these are
        no more than leaves too.
      bias: Its word for a bias, as one that is lost.
      whole: Its word for all axes but the first, if it has one.
      own_axes: Whether its parameters lie along all axes that it measures over.
    """

    name: str
    home: tuple[str, ...]
    layers: dict[str, Layer]
    words: dict[str, str]
    leaves: dict[str, str]
    bias: str = "bias"
    whole: Any = None
    own_axes: bool = False

    def word(self, kind: str, name: str) -> str | None:
        """Returns the library's word for one of normlab's, if layers of that kind have one."""
        known = self.layers[kind].arguments
        return next((word for word in self.words.get(name, "").split() if word in known), None)

    def settings(
        self,
        where: str,
        layer: Any,
        given: Mapping[str, Any],
        allow: Sequence[str],
        *,
        module: Any = None,
    ) -> tuple[str, dict[str, Any]]:
        """Returns the kind of a layer and its arguments, under the library's own names.

        A layer is a kind by name, whatever the class of `module`, or an object. Its arguments are
        those that are `given`, then the attributes of the module, then the library's defaults.

        Raises:
          ValueError: If the kind, the class or an argument is unknown, an argument is missing, or
            one cannot be carried over.
        """
        if isinstance(layer, str):
            kind = layer
        else:
            kind, module = self._kind(where, layer), layer
        if kind not in self.layers:
            change = f"use a known one: {nearest(kind, self.layers)}"
            raise invalid(where, f"the kind {kind!r}", "a norm that the library has", change)
        fixed = self.layers[kind].fixed
        known = {**self.layers[kind].arguments, **fixed}
        for name in given:
            if name not in known:
                expected = f"an argument of {kind} norm that its numbers depend on"
                raise invalid(where, f"{name}={given[name]!r}", expected, nearest(name, known))
            word = flag() if isinstance(known[name], bool) else WORDS.get(name)
            if word and given[name] is not None:
                read(where, name, given[name], word)
        own = {}
        if module is not None:
            own = dict.fromkeys(UNSEEN, REQUIRED) if kind not in OF_KERNELS else {}
            own |= {name: getattr(module, name) for name in known if hasattr(module, name)}
        values = {name: {**known, **own, **given}[name] for name in known}
        for name, value in values.items():
            if value is REQUIRED:
                by = "the library has no default for it"
                if module is not None:
                    by = f"a {type(module).__name__} does not say it"
                change = f"pass {name}=..., with which the layer was made"
                raise invalid(where, f"no {name}", f"it: {by}", change)
        lost = {}
        for name, value in fixed.items():
            if values[name] != value:
                advice = ADVICE.get(name, "normlab has no such thing")
                advice = ADVICE.get(f"{kind} {name}", advice)
                lost[name] = f"{values[name]!r} and not {value!r}: {advice}"
        refuse(where, lost, allow)
        return kind, values

    def _kind(self, where: str, layer: Any) -> str:
        name, package = type(layer).__name__, type(layer).__module__
        kinds = {cls: kind for kind, entry in self.layers.items() for cls in entry.classes}
        if name in kinds and package.startswith(self.home):
            return kinds[name]
        raise invalid(
            where,
            f"a layer of type {package}.{name}",
            f"a norm of {' or '.join(self.home)}, or the kind of norm that it is",
            f"pass one of {', '.join(self.layers)}, and its arguments ({nearest(name, kinds)})",
        )

    def wanted(self, kind: str, values: Mapping[str, Any]) -> dict[str, str]:
        """Returns the leaves that a layer with these arguments has, normlab's name -> its own."""
        names = [name for name in ("g", "b") if values.get(self.word(kind, name) or "")]
        names += ["mean", "var"] if kind == "batch" else []
        return {name: self.leaves[name] for name in names if name in self.leaves}

    def converted(
        self,
        where: str,
        kind: str,
        found: Mapping[str, Array],
        values: Mapping[str, Any],
        state: State = None,
    ) -> Converted:
        """Returns the norm of the leaves `found` and the arguments `values`.

        Batch norm's state is the plain average of the mean and the variance, if none is given.
        """
        value = {name: values[word] for name in self.words if (word := self.word(kind, name))}
        if state is None:
            state = average(where, found, decay=value["decay"]) if kind == "batch" else ()
        axes: Axes = "channels"
        if "shape" in value:
            axes = _axes_of_shape(where, str(self.word(kind, "shape")), value["shape"], found)
        elif "axes" in value:
            axes = self._axes_from(where, value["axes"])
        params = Affine(found.get("g"), found.get("b"))
        norm = Converted(
            kind, params, state, eps=value["eps"], groups=value.get("groups"), axes=axes
        )
        along = self._axes_from(where, value.get("features", -1))
        if along != "channels" and along != axes:
            given = f"feature_axes={value['features']} and axes {axes}"
            change = "normlab's parameters lie along channel_axis, or along the axes measured over"
            raise invalid(where, given, "the same axes, or -1", change)
        return check(where, norm)

    def arguments(self, where: str, norm: Converted, lost: dict[str, str]) -> dict[str, Any]:
        """Returns the arguments of the layer that is this norm, and says what is `lost`.

        Raises:
          ValueError: If the library has no such norm.
        """
        kind = check(where, norm).kind
        if kind not in self.layers:
            change = INSTEAD.get(kind, "write the layer in that library by hand")
            raise invalid(where, f"a {kind} norm", f"one of {', '.join(self.layers)}", change)
        if isinstance(norm.params, Offset):
            given = "a gain kept as its distance from 1, an Offset"
            change = "pass norm._replace(params=Affine(norm.params.g, norm.params.b)), in float32"
            raise invalid(where, given, f"the gain itself, as {self.name} keeps it", change)
        g, b = norm.params
        values = {"eps": norm.eps, "g": g is not None, "b": b is not None, "groups": norm.groups}
        values |= decay_of(norm)
        if self.word(kind, "shape"):
            values["shape"] = self._shape_of(where, norm)
        if self.word(kind, "axes"):
            values["axes"] = self._axes_to(where, norm.axes)
        if norm.feature_axes is not None:
            values["features"] = norm.feature_axes
            if not (self.word(kind, "features") or self.own_axes):
                given = f"parameters along the axes {norm.feature_axes}"
                change = f"{self.name} has no such layer: write it by hand"
                raise invalid(where, given, "parameters along the channels", change)
        if kind == "rms" and b is not None and not self.word(kind, "b"):
            lost[self.bias] = f"{self.name}'s RMS norm has none: add it after the layer"
        return {word: v for name, v in values.items() if (word := self.word(kind, name))}

    def _axes_from(self, where: str, axes: Any) -> Axes:
        """The library's numbers of axes as normlab's `axes`; -1 alone is the channels."""
        if isinstance(axes, slice):
            if axes == self.whole:
                return "all"
            expected = "slice(1, None) or numbers"
            raise invalid(where, f"axis={axes}", expected, "pass axis by numbers")
        axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
        return "channels" if axes == (-1,) else axes

    def _axes_to(self, where: str, axes: Axes) -> Any:
        if axes == "all" and self.whole is None:  # which is as many as the input has
            change = "say them: Converted._replace(axes=(1, 2, 3)) for an image"
            raise invalid(where, "axes='all'", "axes by number", change)
        return {"channels": -1, "all": self.whole}[axes] if isinstance(axes, str) else axes

    def _shape_of(self, where: str, norm: Converted) -> tuple[int, ...]:
        """The shape of the input of a layer that measures all of it, `[C]`."""
        shapes = [v.shape for v in norm.params if v is not None]
        along = norm.feature_axes
        last = norm.axes == "channels" or (along and along == tuple(range(-len(along), 0)))
        if not last or not shapes:
            given = f"axes={norm.axes!r} and {len(shapes)} parameters"
            expected = "the channels, and a parameter that says how many"
            raise invalid(where, given, expected, "make the layer by hand, from its shape")
        return shapes[0]

    def params(self, norm: Converted) -> dict[str, Array]:
        """Returns the gain and the bias by the library's names, as far as its layer has them."""
        found = zip(("g", "b"), norm.params, strict=True)
        return {self.leaves[n]: v for n, v in found if v is not None and self.word(norm.kind, n)}


def refuse(where: str, lost: Mapping[str, str], allow: Sequence[str]) -> None:
    """Raises ValueError if a convention would be lost that is not allowed to be.

    `lost` has for the convention's name what it is, and how to keep it.
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


def is_a(module: Any, name: str) -> bool:
    """Whether an object is of a class of that name, or of a class made from one."""
    return any(name in cls.__name__ for cls in type(module).__mro__)


def spectral(where: str) -> ValueError:
    """Returns the error for spectral norm as another kind."""
    given = "spectral norm, which divides by the largest singular value of a kernel"
    return invalid(where, given, "the kind 'spectral'", "pass layer='spectral'")


def _axes_of_shape(where: str, name: str, shape: Any, found: Mapping[str, Any]) -> Axes:
    """The last axes of the input, as many as a layer's shape has; of `None` that of its leaves."""
    own = next((v.shape for v in found.values()), None)
    shape = own if shape is None else tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if shape is None or own not in (None, shape):
        given = f"{name}={shape} and parameters of shape {own}"
        raise invalid(where, given, "the shape of the layer", f"pass {name}=...")
    return "channels" if len(shape) == 1 else tuple(range(-len(shape), 0))
