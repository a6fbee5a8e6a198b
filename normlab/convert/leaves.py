"""Leaves by their names: found, none missing and none too many, and read without loss."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from normlab.errors import invalid


def flatten(where: str, tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns the leaves of nested mappings under their paths, joined by `/`.

    Raises:
      ValueError: If `tree` is no mapping; `where` names the converter.
    """
    if not hasattr(tree, "items"):
        change = "pass the variables as the library has them"
        raise invalid(where, f"variables of type {type(tree).__name__}", "a mapping", change)
    leaves = {}
    for key, value in tree.items():
        name = "/".join(map(str, key)) if isinstance(key, tuple) else str(key)
        if hasattr(value, "items"):
            leaves |= {f"{name}/{rest}": leaf for rest, leaf in flatten(where, value).items()}
        else:
            leaves[name] = value
    return leaves


def nest(path: str, value: Any) -> Any:
    """Returns `value` inside a mapping for each part of `path`; as it is for the path `""`."""
    for part in reversed(path.split("/") if path else []):
        value = {part: value}
    return value


def take(
    where: str, leaves: Mapping[str, Any], wanted: Mapping[str, str], within: Sequence[str]
) -> dict[str, Array]:
    """Returns the wanted leaves, by the names that normlab has for them.

    Args:
      where: The converter, for the error.
      leaves: All leaves by name.
      wanted: normlab's name -> the library's.
      within: Prefixes under which there must be no other leaves.

    Raises:
      ValueError: If a leaf is missing, or there is another, or one is not a numeric array, or is
        none of the numbers that it stands for.
    """
    names = set(wanted.values())
    missing = [name for name in wanted.values() if name not in leaves]
    extra = [name for name in leaves if name.startswith(tuple(within)) and name not in names]
    if missing or extra:
        parts = []
        if missing:
            parts += [f"no leaf {listed(missing)} (the nearest are {near(missing, leaves)})"]
        if extra:
            parts += [f"further leaves {listed(extra)}"]
        raise invalid(
            where,
            " and ".join(parts),
            f"just the leaves {listed(wanted.values())}",
            "name the layer by path=..., or say by the layer's own arguments what it has",
        )
    return {ours: _as(ours, where, theirs, leaves[theirs]) for ours, theirs in wanted.items()}


def _as(ours: str, where: str, name: str, value: Any) -> Array:
    """Reads a leaf as what normlab calls it: a counter, a statistic or a parameter."""
    part = ours.partition("/")
    if "updates" in part or "counter" in part:
        return counter(where, name, value)
    array = read(where, name, value)
    if part[0] in ("mean", "var"):
        values = np.asarray(array, np.float64)
        bad = ~np.isfinite(values) | ((values < 0) if part[0] == "var" else False)
        if bad.any():
            worst = values[bad][0]
            given = f"{name} with {worst:g} in {bad.sum()} of {bad.size} places"
            expected = "finite numbers" + ", 0 at least" * (part[0] == "var")
            change = "convert a checkpoint from before the training diverged"
            if np.isfinite(worst):
                change = "if rounding made it negative, pass jax.numpy.maximum(v, 0)"
            raise invalid(where, given, expected, change)
    return array


def read(where: str, name: str, value: Any) -> Array:
    """Returns a floating leaf of any library as a JAX array of the same values and type.

    Raises:
      ValueError: If it is no floating array, or JAX has no room for its type.
    """
    given = _numpy(where, name, value)
    if not jnp.issubdtype(given.dtype, np.floating):
        change = f"cast it before, for example {name.rpartition('/')[2]}.astype('float32')"
        raise invalid(where, f"{name} of type {given.dtype}", "a floating type", change)
    array = jnp.array(given)
    if array.dtype == given.dtype:
        return array
    change = "set jax_enable_x64, or cast it before"
    raise invalid(where, f"{name} in {given.dtype}", "a type that JAX keeps as it is", change)


def counter(where: str, name: str, value: Any) -> Array:
    """Returns a counter, a whole number of any type, as an int32 `[]`.

    Raises:
      ValueError: If it is negative, no whole number, or more than one.
    """
    given = _numpy(where, name, value)
    one = given.size == 1 and given.dtype.kind in "biuf"
    number = float(given.reshape(-1)[0]) if one else -1.0
    if not (number.is_integer() and 0 <= number < 2**31):
        shown = given if given.size == 1 else f"an array of shape {given.shape}"
        change = "pass the counter as the library keeps it, of several devices or seeds that of "
        change += "one with its statistics, or count the updates anew from 0"
        raise invalid(where, f"{name} of {shown}", "one whole number, 0 at least", change)
    return jnp.asarray(int(number), jnp.int32)


def _numpy(where: str, name: str, value: Any) -> np.ndarray:
    """Returns a leaf of any library as a NumPy array of numbers, booleans among them."""
    if type(value).__name__.startswith("Uninitialized") or getattr(value, "is_meta", False):
        expected, change = "an array with values", "call the layer on a batch, or load its values"
        raise invalid(where, f"{name}, which has no values yet", expected, change)
    if hasattr(value, "detach"):  # a torch tensor, of a type that NumPy has or of bfloat16
        half = str(value.dtype) == "torch.bfloat16"
        value = value.detach().cpu()
        value = value.float().numpy().astype(jnp.bfloat16) if half else value.numpy()
    given = np.asarray(value)
    if given.dtype != bool and not jnp.issubdtype(given.dtype, np.number):
        change = "pass the library's own variables, unboxed"
        raise invalid(where, f"{name} of type {type(value).__name__}", "an array", change)
    return given


def vector(where: str, name: str, value: Array) -> Array:
    """Returns `[C]` from an array of which at most one axis is longer than 1."""
    if value.size != max(value.shape, default=1):
        raise invalid(
            where,
            f"{name} of shape {value.shape}",
            "one value per channel",
            "convert a layer whose parameters vary along the channels alone",
        )
    return value.reshape(-1)


def numbers(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns NumPy copies, which may be written to, of those that are not `None`."""
    return {name: np.array(value) for name, value in values.items() if value is not None}


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those values that are not `None`."""
    return {name: value for name, value in values.items() if value is not None}


def held(module: Any, *names: str) -> dict[str, Any]:
    """Returns those attributes of a module that it has, by their names."""
    return given({name: getattr(module, name, None) for name in names})


def listed(names: Iterable[str]) -> str:
    """Returns the first eight names, quoted, and how many more there are, for an error."""
    names = [repr(name) for name in names]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def near(missing: Sequence[str], leaves: Iterable[str]) -> str:
    """Returns the names that are nearest to those that are missing, or some, for an error."""
    leaves = list(leaves)
    close = {n: None for m in missing for n in difflib.get_close_matches(m, leaves, 3, cutoff=0.3)}
    return listed(close or leaves) or "none: there are no leaves at all"
