"""What every converter reads into and writes from: one norm, with its conventions named."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from normlab._arguments import (
    Kind,
    anything,
    declare,
    either,
    instance,
    is_array,
    norm_axes,
    read,
    sequence,
    text,
)
from normlab._trees import register
from normlab.equation import Affine
from normlab.errors import invalid, nearest
from normlab.example import Axes
from normlab.family.spectral import STEPS, First, Spectral
from normlab.gains import Offset
from normlab.population.optional import options as population_options
from normlab.population.protocol import Population
from normlab.site import Params, State

KINDS = ("batch", "layer", "rms", "group", "instance", "weight", "spectral")
"""The norms that can be converted, by their names in the registry."""

OF_KERNELS = ("weight", "spectral")
"""Those that are converted with the kernel that they are of."""


class Converted(NamedTuple):
    """One norm as normlab has it: its values, and all that its numbers depend on.

    Where data have their channels is no part of it: normlab takes a `channel_axis` in each call.

    Attributes:
      kind: The name in the registry, one of `KINDS`; not a leaf.
      params: `Affine(g [C], b [C])`; a field is `None` where the layer has no such parameter. Of
        layer and RMS norm over several axes they may lie along these, `[H, W]`. Of these two it
        is an `Offset` where the layer keeps g − 1.
      state: Batch norm's population, an average as a rule, which names its own decay and ddof;
        spectral norm's u and v; otherwise `()`.
      kernel: `[..., K, C]`, weight norm's direction v, or the kernel of spectral norm; otherwise
        `None`.
      eps: ε, added to the variance under the root; `None` for norms of a kernel; not a leaf.
      groups: The number of groups of group norm; otherwise `None`; not a leaf.
      axes: What layer and RMS norm measure over, as in `layer_norm`; not a leaf.
      steps: Those of spectral norm in a training call; otherwise `None`; not a leaf.
      first: Which vector these renew first, as in `spectral_norm`; not a leaf.

    >>> import jax.numpy as jnp
    >>> Converted("layer", Affine(jnp.ones(3), None), eps=1e-6).options
    {'use_gain': True, 'use_bias': False, 'eps': 1e-06, 'axes': 'channels'}
    """

    kind: str
    params: Params = Affine(None, None)
    state: State = ()
    kernel: Array | None = None
    eps: float | None = None
    groups: int | None = None
    axes: Axes = "channels"
    steps: int | None = None
    first: First = "v"

    @property
    def feature_axes(self) -> tuple[int, ...] | None:
        """The axes along which the parameters lie, if they are several: those it measures over."""
        several = any(v is not None and v.ndim > 1 for v in self.params)
        return self.axes if several and isinstance(self.axes, tuple) else None

    @property
    def options(self) -> dict[str, Any]:
        """The options with which `normlab.get(kind, **options)` is this norm.

        Of batch norm they name the population too: what `init` returns is one of the same kind
        and conventions, before its first batch; `state` is where the conversion stands.
        """
        options: dict[str, Any] = {
            "use_gain": self.params.g is not None,
            "use_bias": self.params.b is not None,
        }
        if isinstance(self.params, Offset):
            options["gain"] = "offset"
        if self.kind not in OF_KERNELS:
            options["eps"] = self.eps
        if self.kind == "spectral":
            options |= {"steps": self.steps, "first": self.first}
        if self.kind in ("layer", "rms"):
            options["axes"] = self.axes
        if self.feature_axes is not None:
            options["feature_axes"] = self.feature_axes
        if self.kind == "group":
            options["groups"] = self.groups
        if self.kind == "batch":
            options |= population_options(self.state)
        return options


register(Converted, "kind", "eps", "groups", "axes", "steps", "first")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _layer(value: Any) -> Any:
    if is_array(value) or isinstance(value, bool | int | float | complex | bytes | list | tuple):
        raise TypeError
    return value


NORM = instance(Converted, "pass what a from_* returned", arrays=False)
PARAMS = instance((Affine, Offset), "make them with init_affine(channels)")
NAME = text("a name", "pass a string")
declare(
    layer=Kind(
        "a kind by name, or the layer",
        'pass for example "batch"',
        _layer,
        (1, True, [], 1.0, b"x", np.ones(2)),
    ),
    path=Kind("a path, which may be empty", "pass a string", _string, (None, 1, [], object())),
    allow=either("names of conventions", "pass a list of strings", sequence(NAME), NAME),
)


class Exported(NamedTuple):
    """One norm as another library has it.

    Attributes:
      variables: The leaves under the library's own names.
      arguments: The arguments of the library's constructor that the numbers depend on.

    >>> import jax.numpy as jnp
    >>> from normlab import Affine
    >>> from normlab.convert import to_torch
    >>> exported = to_torch(Converted("layer", Affine(jnp.ones(3), jnp.zeros(3)), eps=1e-5))
    >>> sorted(exported.variables), exported.arguments["eps"]
    (['bias', 'weight'], 1e-05)
    """

    variables: Any
    arguments: dict[str, Any]


def check(where: str, norm: Converted) -> Converted:
    """Returns `norm` if its fields fit together; `where` names the converter in the error.

    Raises:
      ValueError: If they do not.
    """
    read(where, "kind", norm.kind, NAME)
    if norm.kind not in KINDS:
        change = f"use a known one: {nearest(norm.kind, KINDS)}"
        raise invalid(where, f"the kind {norm.kind!r}", "a norm that can be converted", change)
    if (norm.kernel is not None) != (norm.kind in OF_KERNELS):
        given = "no kernel" if norm.kernel is None else "a kernel"
        expected = f"a kernel with {' and '.join(OF_KERNELS)} norm and with no other"
        raise invalid(where, f"{given} for {norm.kind} norm", expected, "set Converted.kernel")
    if norm.kind not in OF_KERNELS and norm.eps is None:
        raise invalid(where, f"no eps for {norm.kind} norm", "a number", "set Converted.eps")
    read(where, "params", norm.params, PARAMS)
    if isinstance(norm.params, Offset) and norm.kind not in ("layer", "rms"):
        change = "set Converted.params to Affine(params.g, params.b)"
        raise invalid(where, f"an Offset for {norm.kind} norm", "an Affine", change)
    read(where, "state", norm.state, anything if norm.kind == "spectral" else None)
    read(where, "axes", norm.axes, norm_axes)
    for name, value in (("eps", norm.eps), ("groups", norm.groups), ("kernel", norm.kernel)):
        if value is not None:
            read(where, name, value)
    if (norm.groups is not None) != (norm.kind == "group"):
        given = f"groups={norm.groups!r} for {norm.kind} norm"
        expected = "a number of groups with group norm and with no other"
        raise invalid(where, given, expected, "set Converted.groups")
    sizes = [v.shape[-1] for v in norm.params if v is not None and v.ndim == 1]
    if norm.groups is not None and (norm.groups < 1 or any(size % norm.groups for size in sizes)):
        given = f"groups={norm.groups} for parameters of {max(sizes, default=0)} channels"
        raise invalid(
            where, given, "groups that divide the channels", "pass the layer's own number"
        )
    if norm.kind == "spectral":
        _check_spectral(where, norm)
    elif norm.kind != "batch" and norm.state != ():
        given = f"a {type(norm.state).__name__} for {norm.kind} norm"
        raise invalid(where, given, "a state with batch norm only", "set Converted.state=()")
    _check_shapes(where, norm)
    return norm


def _check_spectral(where: str, norm: Converted) -> None:
    read(where, "steps", norm.steps, STEPS)
    read(where, "first", norm.first)
    shape = getattr(norm.kernel, "shape", ())
    if not isinstance(norm.state, Spectral) or (
        [v.shape for v in norm.state] != [shape[-1:], shape[:-1]]
    ):
        given = f"{norm.state!r:.80} for spectral norm of a kernel of shape {shape}"
        change = "set Converted.state to what init_spectral returns, or to a trained one"
        raise invalid(where, given, "a Spectral of its u and v", change)


def _check_shapes(where: str, norm: Converted) -> None:
    """Everything a norm holds per channel has one and the same shape `[C]`."""
    vectors = {"the gain": norm.params.g, "the bias": norm.params.b}
    if isinstance(norm.state, Population):
        vectors["the mean"], vectors["the variance"] = norm.state.read()
    found = {name: v.shape for name, v in vectors.items() if v is not None}
    if norm.kernel is not None:
        found["the kernel's units"] = norm.kernel.shape[-1:]
    rank = 1 if norm.feature_axes is None else len(norm.feature_axes)
    if all(len(shape) == rank for shape in found.values()) and len(set(found.values())) < 2:
        return
    given = ", ".join(f"{name} of shape {shape}" for name, shape in found.items())
    expected = "one value per channel in each, and as many channels"
    change = "pass leaves of one and the same layer"
    several = {name: shape for name, shape in found.items() if len(shape) != 1}
    if several and all(math.prod(shape) == max(shape, default=1) for shape in several.values()):
        change = " and ".join(f"reshape {name} to {(math.prod(s),)}" for name, s in several.items())
        change += " before, v.reshape(-1): only the channels are no axis of length 1"
    elif {"the mean", "the variance"} & several.keys():
        change = "convert of the statistics of several devices what merge_running makes of them"
    elif several:
        change = "convert a layer whose parameters vary along the channels alone"
    raise invalid(where, given, expected, change)
