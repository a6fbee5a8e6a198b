"""Which norms of a model are exchanged for which: a rule by path, for both kinds of module."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from normlab.errors import invalid, nearest
from normlab.registry import row

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


_ARGUMENTS = {"axis": -1, "dtype": None, "param_dtype": jnp.float32}
_ARGUMENTS |= {"axis_name": None, "axis_index_groups": None, "use_bias": True, "use_scale": True}
_OWN = {"self", "rngs", "num_features", "parent", "name"}  # what a module does not take over
_OPTIONS = {"use_scale": "use_gain"}  # of a norm in the registry, where they have another name


def check_taken(old: Any, taken: Iterable[str], axis_of: str | None) -> None:
    """Raises ValueError if an argument of the old norm, which says something, is lost.

    `taken` are the arguments, or the options of a norm of the registry, that its replacement takes
    over or is given; `axis_of` what lies along its axes of devices, as in `Row.axis_of`. The axes
    of a batch mean nothing to what measures none.
    """
    taken = set(taken)
    synced = axis_of == "batch" or not _measures_batch(old)
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


def _measures_batch(old: Any) -> bool:
    return hasattr(old, "use_running_average")


def replacement(
    new: Any,
    old: Any,
    kind: type,
    registry_norm: Callable[[Any, str, Mapping[str, Any]], Any],
    converted: Callable[[Any, type, dict[str, Any], Mapping[str, Any]], Any],
) -> Any:
    """The module of a `kind` that is to stand where `old` stands, if the rule says `new`.

    `registry_norm` makes one, for the old norm, of a name in the registry and options; `converted`
    of a class, the old norm's arguments that it has too, and its own. Raises ValueError if the rule
    says something else, or an argument of the old norm is lost.
    """
    if isinstance(new, str):
        new = (new, {})
    if isinstance(new, tuple) and len(new) == 2 and isinstance(new[0], str):
        name, options = new
        check_taken(old, options, row(name).axis_of)
        return registry_norm(old, name, options)
    function = getattr(new, "func", new)
    if isinstance(function, type) and issubclass(function, kind):
        names = sorted(set(inspect.signature(function.__init__).parameters) - _OWN)
        given = getattr(new, "keywords", {})
        axis_of = "batch" if "use_running_average" in names else "example"
        if _measures_batch(old) != (axis_of == "batch"):  # other axes than those of the old norm
            names = [name for name in names if not name.startswith("axis_")]
        check_taken(old, {*names, *given}, axis_of)
        taken = {n: getattr(old, n) for n in names if hasattr(old, n) and not hasattr(kind, n)}
        return converted(old, function, taken, given)
    if isinstance(new, kind):
        return new
    raise invalid(
        "swap",
        f"{new!r}",
        "a module, a class of modules, a name of the registry, or a pair of name and options",
        "return None to leave the norm",
    )
