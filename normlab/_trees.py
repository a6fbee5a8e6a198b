"""The library's own pytree nodes: static fields, and names under which `jax.export` keeps them."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import export

Class = TypeVar("Class", bound=type)


def node(cls: Class) -> Class:
    """Gives a NamedTuple a name for `jax.export`: what takes or returns one can be serialized."""
    export.register_namedtuple_serialization(cls, serialized_name=f"normlab.{cls.__name__}")
    return cls


def static(cls: Class) -> Class:
    """Makes a frozen dataclass of Python values a node without leaves, of which `jit` knows all."""
    cls = jax.tree_util.register_static(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    _name(cls, lambda spec: {n: getattr(spec, n) for n in names}, lambda given: cls(**given))
    return cls


def leaves(*numbers: str) -> Callable[[Class], Class]:
    """Makes the `numbers` of a frozen dataclass the leaves of a pytree, and all else static."""

    def decorate(cls: Class) -> Class:
        settings = [field.name for field in dataclasses.fields(cls) if field.name not in numbers]

        def unflatten(static: tuple[Any, ...], given: Any) -> Any:
            made = object.__new__(cls)  # the leaves may be anything that jax puts there
            for name, value in zip((*numbers, *settings), (*given, *static), strict=True):
                object.__setattr__(made, name, value)
            return made

        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda value: (
                [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in numbers],
                tuple(getattr(value, name) for name in settings),
            ),
            unflatten,
        )
        return cls

    return decorate


def register(cls: type, *settings: str) -> None:
    """Makes the `settings` of a NamedTuple static, the other fields its pytree's leaves."""
    fields: tuple[str, ...] = getattr(cls, "_fields")  # noqa: B009
    arrays = [name for name in fields if name not in settings]

    def flatten(state: Any) -> tuple[Any, Any]:
        return [getattr(state, name) for name in arrays], tuple(
            getattr(state, name) for name in settings
        )

    def flatten_with_keys(state: Any) -> tuple[Any, Any]:
        leaves, static = flatten(state)
        return list(zip(map(jax.tree_util.GetAttrKey, arrays), leaves, strict=True)), static

    def unflatten(static: Any, leaves: Any) -> Any:
        return cls(**dict(zip((*arrays, *settings), (*leaves, *static), strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    _name(cls, lambda values: values, lambda values: values)


def _name(cls: type, to: Any, back: Any) -> None:
    """Names a node whose static part is made of numbers, strings and tuples of them."""
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"normlab.{cls.__name__}",
        serialize_auxdata=lambda aux: repr(to(aux)).encode(),
        deserialize_auxdata=lambda text: back(ast.literal_eval(bytes(text).decode())),
    )
