"""Which norms of a model are exchanged for which: a rule by path, for both kinds of module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from normlab._checks import invalid, nearest

Rule = Mapping[str, Any] | Callable[[str, Any], Any]
"""Patterns of paths with what is to stand there, or a function of path and module.

A pattern is a path such as `"encoder/block_0/norm"`, or a regular expression for the whole of one;
the first that matches holds. What is to stand there is a module, a class of modules or a
`functools.partial` of one, the name of a norm in the registry, or a pair of name and options. A
function returns one of these, or `None` to leave the norm.
"""


class Choice:
    """A rule that is applied to the norms of one model, and remembers what it met."""

    def __init__(self, rule: Rule) -> None:
        """Nothing is met yet."""
        self._rule = rule
        self._paths: list[str] = []
        self._unmatched = [] if callable(rule) else [_checked(pattern) for pattern in rule]
        self._found = False

    def find(self, path: str, module: Any) -> Any:
        """What is to stand at `path`, where `module` stands; `None` for the module itself."""
        self._paths.append(path)
        if callable(self._rule):
            new = self._rule(path, module)
        else:
            hits = [pattern for pattern in self._rule if matches(pattern, path)]
            self._unmatched = [p for p in self._unmatched if p not in hits]
            new = self._rule[hits[0]] if hits else None
        self._found |= new is not None
        return new

    def check(self) -> None:
        """Raises ValueError for a pattern that matched nothing, or a rule that changed nothing."""
        if self._found and not self._unmatched:
            return
        pattern = next(iter(self._unmatched), None)
        given = "a rule that replaces no norm" if pattern is None else f"the pattern {pattern!r}"
        known = list(dict.fromkeys(self._paths))
        raise invalid(
            "swap",
            given,
            "the path of a norm of the model",
            nearest(str(pattern), known)
            if known
            else "pass a model with norms, which linen must not have compiled by nn.jit",
        )


def _checked(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise invalid(
            "swap",
            f"the pattern {pattern!r}: {error}",
            "a path, or a regular expression for the whole of one",
            "write '.*' for anything, '[^/]*' for any name",
        ) from None
    return pattern


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is a path, or a regular expression for the whole of it.

    >>> matches("block_./norm", "block_1/norm"), matches("block_.", "block_1/norm")
    (True, False)
    """
    return pattern == path or re.fullmatch(pattern, path) is not None


def is_norm(module: Any) -> bool:
    """Whether a module normalizes what it is given: by its class's name, wrappers left out."""
    return type(module).__name__.endswith("Norm") and not hasattr(module, "layer_instance")


def by_name(new: Any) -> tuple[str, Mapping[str, Any]] | None:
    """The name and the options if a replacement is one of the registry's norms."""
    if isinstance(new, str):
        return new, {}
    if isinstance(new, tuple) and len(new) == 2 and isinstance(new[0], str):
        return new
    return None


_ARGUMENTS = {"axis": -1, "dtype": None, "param_dtype": jnp.float32}
_ARGUMENTS |= {"axis_name": None, "axis_index_groups": None, "use_bias": True, "use_scale": True}
_OPTIONS = {"use_bias": "use_bias", "use_scale": "use_gain", "axis_name": "axis_name"}


def check_taken(old: Any, taken: Iterable[str], *, synced: bool = True) -> None:
    """Raises ValueError if an argument of the old norm, which says something, is lost.

    Args:
      old: The old norm.
      taken: The arguments, or the options of a norm of the registry, that its replacement has.
      synced: Whether the replacement measures a batch, so that `axis_name` means something.
    """
    taken = set(taken)
    lost = [
        f"{name}={getattr(old, name)!r}"
        for name, default in _ARGUMENTS.items()
        if not {name, _OPTIONS.get(name, name)} & taken
        and getattr(old, name, default) != default
        and (synced or not name.startswith("axis_"))
    ]
    if lost:
        raise invalid(
            "swap",
            f"a {type(old).__name__} with {', '.join(lost)}",
            "arguments that its replacement has too",
            "name a class that has them, a module, or functools.partial(SomeNorm, ...)",
        )


def by_class(new: Any, kind: type) -> tuple[type, Mapping[str, Any]] | None:
    """The class and the arguments if a replacement is a class of modules, or a `partial` of one."""
    function = getattr(new, "func", new)
    if isinstance(function, type) and issubclass(function, kind):
        return function, getattr(new, "keywords", {})
    return None
