"""What every converter reads into and writes from: one norm, with its conventions named."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array

from normlab.checks import check_eps, invalid, nearest
from normlab.example import Axes
from normlab.population.protocol import Population
from normlab.population.running import Running
from normlab.trees import register
from normlab.types import Affine, Params, State

KINDS = ("batch", "layer", "rms", "group", "instance", "weight")
"""The norms that can be converted, by their names in the registry."""


class Converted(NamedTuple):
    """One norm as normlab has it: its values, and all that its numbers depend on.

    Where data have their channels is no part of it: normlab takes a `channel_axis` in each call.

    Attributes:
      kind: The name in the registry, one of `KINDS`; not a leaf.
      params: `Affine(g [C], b [C])`; a field is `None` where the layer has no such parameter.
      state: Batch norm's population, `Running` as a rule; otherwise `()`. It names its own decay
        and ddof.
      kernel: `[..., K, C]`, weight norm's direction v; otherwise `None`.
      eps: ε, added to the variance under the root; `None` for weight norm; not a leaf.
      groups: The number of groups of group norm; otherwise `None`; not a leaf.
      axes: What layer and RMS norm measure over, as in `layer_norm`; not a leaf.

    >>> import jax.numpy as jnp
    >>> Converted("layer", Affine(jnp.ones(3), None), eps=1e-6).options
    {'rescale': True, 'reshift': False, 'eps': 1e-06, 'axes': 'channels'}
    """

    kind: str
    params: Params = Affine(None, None)
    state: State = ()
    kernel: Array | None = None
    eps: float | None = None
    groups: int | None = None
    axes: Axes = "channels"

    @property
    def options(self) -> dict[str, Any]:
        """The options with which `normlab.get(kind, **options)` is this norm."""
        options: dict[str, Any] = {
            "rescale": self.params.g is not None,
            "reshift": self.params.b is not None,
        }
        if self.kind != "weight":
            options["eps"] = self.eps
        if self.kind in ("layer", "rms"):
            options["axes"] = self.axes
        if self.kind == "group":
            options["groups"] = self.groups
        if isinstance(self.state, Running):
            options |= {"decay": self.state.decay, "ddof": self.state.ddof}
        return options


register(Converted, "kind", "eps", "groups", "axes")


class Exported(NamedTuple):
    """One norm as another library has it.

    Attributes:
      variables: The leaves under the library's own names.
      arguments: The arguments of the library's constructor that the numbers depend on.
    """

    variables: Any
    arguments: dict[str, Any]


def check(where: str, norm: Converted) -> Converted:
    """Returns `norm` if its fields fit together; `where` names the converter in the error.

    Raises:
      ValueError: If they do not.
    """
    if norm.kind not in KINDS:
        change = f"use a known one: {nearest(norm.kind, KINDS)}"
        raise invalid(where, f"the kind {norm.kind!r}", "a norm that can be converted", change)
    if (norm.kernel is not None) != (norm.kind == "weight"):
        given = "no kernel" if norm.kernel is None else "a kernel"
        expected = "a kernel with weight norm and with no other"
        raise invalid(where, f"{given} for {norm.kind} norm", expected, "set Converted.kernel")
    if norm.kind != "weight" and norm.eps is None:
        raise invalid(where, f"no eps for {norm.kind} norm", "a number", "set Converted.eps")
    if norm.eps is not None:
        check_eps(where, norm.eps)
    if (norm.groups is not None) != (norm.kind == "group"):
        given = f"groups={norm.groups!r} for {norm.kind} norm"
        expected = "a number of groups with group norm and with no other"
        raise invalid(where, given, expected, "set Converted.groups")
    if norm.kind != "batch" and norm.state != ():
        given = f"a {type(norm.state).__name__} for {norm.kind} norm"
        raise invalid(where, given, "a state with batch norm only", "set Converted.state=()")
    _check_shapes(where, norm)
    return norm


def _check_shapes(where: str, norm: Converted) -> None:
    """Everything a norm holds per channel has one and the same shape `[C]`."""
    vectors = {"the gain": norm.params.g, "the bias": norm.params.b}
    if isinstance(norm.state, Population):
        vectors["the mean"], vectors["the variance"] = norm.state.read()
    found = {name: v.shape for name, v in vectors.items() if v is not None}
    if norm.kernel is not None:
        found["the kernel's units"] = norm.kernel.shape[-1:]
    if any(len(shape) != 1 for shape in found.values()) or len(set(found.values())) > 1:
        given = ", ".join(f"{name} of shape {shape}" for name, shape in found.items())
        expected = "one value per channel in each, and as many channels"
        change = "convert a layer whose parameters vary along the channels alone, and of the "
        change += "statistics of several devices what merge_running makes of them"
        raise invalid(where, given, expected, change)
