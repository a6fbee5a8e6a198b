"""Variables of a model by path: nested dicts, the layers in them, and rules that name layers.

A layer is what lies under one path. `flax.linen` keeps the parts of a layer in collections, of
which `params` and `batch_stats` are taken together; a tree without collections is taken as it is
(`nnx.to_pure_dict`). Of any other pytree `named` has the paths. They are written
`encoder/layer_0/norm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax

from normlab.errors import invalid, nearest

Key = tuple[Any, ...]
"""Where a leaf lies in the nested dicts, the collection first if there is one."""

Layer = dict[str, Key]
"""The variables of a layer: their names, and where they lie."""

T = TypeVar("T")


def flatten(tree: Mapping[Any, Any], prefix: Key = ()) -> dict[Key, Any]:
    """Returns the leaves of nested mappings by key; an empty mapping is a leaf.

    Raises:
      ValueError: For a leaf that is a box around its array.
    """
    flat = {}
    for name, value in tree.items():
        if is_box(value):
            raise invalid(
                "variables",
                f"a {type(value).__name__} at {path_of((*prefix, name))!r}",
                "nested dicts of arrays",
                "take it out of its box: flax.linen.unbox(variables), nnx.to_pure_dict(state)",
            )
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, (*prefix, name))
        else:
            flat[*prefix, name] = value
    return flat


def unflatten(flat: Mapping[Key, Any]) -> dict[Any, Any]:
    """Undoes `flatten`, into dicts."""
    tree = {}
    for key, value in flat.items():
        level = tree
        for name in key[:-1]:
            level = level.setdefault(name, {})
        level[key[-1]] = value
    return tree


def path_of(key: Key) -> str:
    """Returns the names of a key without a collection, joined by `/`."""
    return "/".join(map(str, key))


def layers_of(flat: Mapping[Key, Any]) -> dict[str, Layer]:
    """Returns the layers by path."""
    collections = any(key[0] == "params" for key in flat)
    layers = {}
    for key in flat:
        if not collections or key[0] in ("params", "batch_stats"):
            path = path_of(key[bool(collections) : -1])
            layers.setdefault(path, {})[str(key[-1])] = key
    return layers


def is_box(value: Any) -> bool:
    """Whether it is a box around an array: of linen with metadata, or a variable of nnx."""
    return hasattr(type(value), "unbox") or hasattr(type(value), "get_value")


def named(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """Returns the leaves of any pytree with their paths, and its structure."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    name = jax.tree_util.keystr
    return [(name(path, simple=True, separator="/"), leaf) for path, leaf in found], structure


def matches(
    where: str, rule: Mapping[str, T], paths: Iterable[str], what: str = "layer"
) -> list[tuple[str, T, re.Match[str] | None]]:
    """Returns the paths that a rule names, each with its value and the match of its pattern.

    Args:
      where: The caller, for the errors.
      rule: A path, or a regular expression for the whole of one, to a value. What is a path is
        not read as an expression; there the match is `None`.
      paths: The paths there are.
      what: What lies there, for the errors.

    Raises:
      ValueError: For a pattern that fits no path, or a path that fits two patterns.
    """
    paths, found = list(paths), {}
    for pattern, value in rule.items():
        fits = _fits(where, pattern, paths, what)
        if not fits:
            raise invalid(
                where,
                f"a rule for {pattern!r}, which fits no {what}",
                f"the path of a {what}, or a regular expression for the whole of it",
                f"use a known one: {nearest(pattern, paths)}",
            )
        for path, match in fits.items():
            if path in found:
                raise invalid(
                    where,
                    f"a rule that names {path!r} twice, the second time by {pattern!r}",
                    f"one pattern for each {what}",
                    "make the patterns narrower",
                )
            found[path] = (path, value, match)
    return list(found.values())


def _fits(where: str, pattern: str, paths: list[str], what: str) -> dict[str, re.Match[str] | None]:
    if pattern in paths:
        return {pattern: None}
    try:
        found = {path: re.fullmatch(pattern, path) for path in paths}
    except re.error as error:
        expected = f"the path of a {what}, or a regular expression for the whole of it"
        raise invalid(where, f"a rule for {pattern!r}: {error}", expected, "correct it") from error
    return {path: match for path, match in found.items() if match}
