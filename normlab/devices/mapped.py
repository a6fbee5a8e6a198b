"""Mapped axes: whether they are bound, of what size, what varies over them; who hears whom."""

from __future__ import annotations

import contextlib
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from normlab.errors import invalid

Tree = TypeVar("Tree")


def is_bound(names: tuple[str, ...]) -> bool:
    """Whether the axes are mapped here; those of a mesh in plain `jit` are not."""
    with contextlib.suppress(NameError):
        lax.axis_size(names)
        return True
    return False


def check_bound(where: str, names: tuple[str, ...]) -> None:
    """Raises ValueError, with the axes that are bound, unless all of these are."""
    if is_bound(names):
        return
    raise invalid(
        where,
        f"axis_name={names[0]!r}" if len(names) == 1 else f"axis_name={names!r}",
        f"the name of a mapped axis; bound here: {_bound_names()}",
        "call this inside pmap, shard_map or vmap with that axis_name, under jax.set_mesh with a "
        "mesh that has it, or pass axis_name=None",
    )


def _bound_names() -> str:
    """The mapped axes, for an error; JAX tells them by no public function."""
    found: list[str] = []
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.core import get_axis_env

        found = [str(name) for name in get_axis_env().axis_sizes]
    return ", ".join(map(repr, found)) or "none"


def device_count(names: tuple[str, ...]) -> int:
    """The number of devices along mapped axes."""
    return lax.axis_size(names) if names else 1


def axis_sizes(names: tuple[str, ...]) -> tuple[int, ...]:
    """The sizes of mapped axes."""
    return tuple(lax.axis_size(name) for name in names)


def is_typed(names: tuple[str, ...]) -> bool:
    """Whether the types of arrays say over which axes they vary: shard_map with check_vma."""
    return bool(names) and bool(varying_axes(lax.axis_index(names)))


def varying_axes(v: Array) -> frozenset[str]:
    """The mapped axes over which an array varies, where types say so; else none."""
    return jax.typeof(v).manual_axis_type.varying  # pyright: ignore[reportAttributeAccessIssue]


def vary(tree: Tree, names: tuple[str, ...]) -> Tree:
    """The arrays, of a type that varies over all the names where there are such types."""

    def one(v: Array) -> Array:
        missing = tuple(name for name in names if name not in varying_axes(v))
        return lax.pcast(v, missing, to="varying") if missing else v

    return jax.tree.map(one, tree) if is_typed(names) else tree


def gather(v: Array, names: tuple[str, ...]) -> Array:
    """`v` of every device, `[D, ...]`; of the type of what is alike on all where there are types.

    What it costs grows with the number of devices: it is for what is wanted of each of them.
    """
    if is_typed(names):
        return lax.all_gather(vary(v, names), names, to="invarying")
    if len(names) == 1:
        return lax.all_gather(v, names[0])
    # vmap gathers no two axes at once, but it adds.
    table = jnp.zeros((device_count(names), *v.shape), v.dtype)
    return lax.psum(table.at[lax.axis_index(names)].set(v), names)


def permute(v: Array, names: tuple[str, ...], pairs: tuple[tuple[int, int], ...]) -> Array:
    """What the source of the `(source, target)` that names this device sent; zeros without one."""
    if set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        return lax.ppermute(vary(v, names), names, pairs)
    # vmap, on one device: it permutes one axis, and all of it.
    source = [-1] * device_count(names)
    for sender, receiver in pairs:
        source[receiver] = sender
    own = jnp.asarray(source)[lax.axis_index(names)]
    return jnp.where(own < 0, 0, gather(v, names)[own])
