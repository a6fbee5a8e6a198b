"""Statistics in a checkpoint: what they are, in words, and back from plain dicts.

Settings, such as the decay and the ddof of a `Running`, are not arrays. Orbax keeps arrays alone,
and restores them into the settings of its target; Flax's msgpack writes the settings too, and
restores those of the file. `check_conventions` compares both: settings told beside, or restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from normlab._arguments import (
    KINDS,
    anything,
    checked,
    either,
    instance,
    is_array,
    is_number,
    mapping,
    number,
    text,
)
from normlab.errors import invalid, nearest
from normlab.population._averages import never_merged
from normlab.population._batches import arrays
from normlab.population.optional import is_population
from normlab.population.running import Running


@checked("conventions")
def conventions(states: Any) -> dict[str, str]:
    """Says what each running statistic of a pytree is, in words to be kept with a checkpoint.

    Args:
      states: A state, or a pytree of states, an nnx model included.

    Returns:
      By path, the kind of each outermost `Population` and its settings.

    >>> from normlab import init_running
    >>> conventions({"stem": init_running(2, decay=0.99)})
    {'stem': 'Running(decay=0.99, ddof=0)'}
    """
    kept = lambda leaf: is_population(_value(leaf))  # noqa: E731
    leaves, _ = jax.tree_util.tree_flatten_with_path(states, is_leaf=kept)
    return {_name(path): _describe(_value(leaf)) for path, leaf in leaves if kept(leaf)}


SAID = either(
    "what conventions(states) said, or the states",
    "pass one of these",
    mapping(text("", ""), "", ""),
    KINDS["states"],
)


@checked("check conventions", saved=SAID, states=SAID)
def check_conventions(saved: Any, states: Any) -> None:
    """Compares the conventions of a checkpoint with those of the states it is restored into.

    Args:
      saved: What `conventions` said when it was saved; or the restored states themselves, where the
        format keeps settings (Flax's msgpack).
      states: The states it is restored into, or what `conventions` says of them.

    Raises:
      ValueError: If a kind, a decay, a ddof or another setting differs; it names both.

    >>> from normlab import init_running
    >>> check_conventions({"stem": "Running(decay=0.9, ddof=1)"}, {"stem": init_running(2)})
    Traceback (most recent call last):
    ValueError: check conventions: got 'stem', which is Running(decay=0.9, ddof=1) in the \
checkpoint; expected Running(decay=0.9, ddof=0), as here. To fix it, make the states as those that \
were saved, or convert them afterwards (change_ddof; state._replace for a decay).
    """
    there, here = (tree if _is_words(tree) else conventions(tree) for tree in (saved, states))
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            raise invalid(
                "check conventions",
                f"{name!r}, which is {there.get(name, 'not there')} in the checkpoint",
                f"{here.get(name, 'nothing')}, as here",
                "make the states as those that were saved, or convert them afterwards "
                "(change_ddof; state._replace for a decay)",
            )


def _like(states: Any) -> Any:
    def whole(leaf: Any) -> Any:
        return np.zeros(()) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    KINDS["states"].read(jax.tree.map(whole, states))
    return states


@checked("restore states", states=KINDS["states"]._replace(read=_like), saved=anything)
def restore_states(states: Any, saved: Any) -> Any:
    """Returns the states that a checkpoint holds as plain dicts.

    Orbax returns such dicts where it is given no target, and so do
    `flax.serialization.msgpack_restore` and `to_state_dict`, and `nnx.to_pure_dict` of a model.

    Args:
      states: A state, or any pytree that was saved: a dict of states, the variables of a linen
        model, the state of an nnx one, an optimizer's. It says the structure, the shapes, the types
        and the settings; its values do not matter, and may be those of `jax.eval_shape`.
      saved: The same as nested dicts, or lists, by the names of fields, keys and numbers. What
        tells how to merge with other devices (`Running.fresh`, `Cumulative.among`) may be missing,
        as in checkpoints from before there was such: then nothing was ever merged.

    Returns:
      The structure of `states` with the arrays of `saved`.

    Raises:
      ValueError: If something is missing, left over, or of another shape or type, or a setting is
        saved and differs; it names the path.

    >>> from normlab import init_running
    >>> saved = {"norm": init_running(2)._asdict()}
    >>> type(restore_states({"norm": init_running(2)}, saved)["norm"]).__name__
    'Running'
    """
    populations, _ = jax.tree_util.tree_flatten_with_path(states, is_leaf=is_population)
    populations = [(path, leaf) for path, leaf in populations if is_population(leaf)]
    there = {_name(path): _describe(leaf, _found(path, saved)) for path, leaf in populations}
    check_conventions(there, {_name(path): _describe(leaf) for path, leaf in populations})
    leaves, structure = jax.tree_util.tree_flatten_with_path(states)
    _check_left_over(states, saved)
    later = _later(states, saved)
    found = [later[path] if path in later else _found(path, saved) for path, _ in leaves]
    for (path, leaf), value in zip(leaves, found, strict=True):
        if _said(value) != _said(leaf) and not _is_alike(value, leaf):
            raise invalid(
                "restore states",
                f"{_name(path)!r} {_said(value)} in the checkpoint",
                f"{_said(leaf).removeprefix('of ')}, as here",
                "make the states as those that were saved, or cast the arrays before",
            )
    return jax.tree.unflatten(structure, found)


@checked(
    "change ddof",
    state=instance(Running, "change what it holds, or, of a Cumulative, state._replace(ddof=...)"),
    count=number("a number of values", "pass the examples of a batch times the positions"),
)
def change_ddof(state: Running, ddof: int, *, count: float | None = None) -> Running:
    """Returns the state with its variance biased (`ddof=0`) or unbiased (`ddof=1`).

    var ← var · (n − old ddof) / (n − ddof) with n values of a channel in a batch; exact if all
    batches had as many.

    Args:
      state: The state.
      ddof: 0 or 1.
      count: n; `None` for the average of the state's own updates.

    Raises:
      ValueError: If n is not known, or not above 1.

    >>> from normlab import init_running
    >>> state = init_running(1)._replace(var=jnp.array([3.0]))
    >>> change_ddof(state, 1, count=4).var.tolist()
    [4.0]
    """
    state = arrays(state)
    n = jnp.asarray(state.count if count is None else count, state.var.dtype)
    if not isinstance(n, Tracer) and not float(n) > 1:
        raise invalid(
            "change ddof",
            f"{n:g} values of a channel in a batch",
            "more than 1: the variances differ by the factor n / (n - 1)",
            "pass count=, the examples of a batch times the positions of each",
        )
    var = state.var * (n - state.ddof) / (n - ddof)
    new = state._replace(var=var, ddof=ddof)
    return new if ddof == state.ddof else never_merged(new)


SETTING = int | float | str | None


def _describe(state: Any, saved: Any = None) -> str:
    """The kind and the settings of a state; those in `saved` if it holds any."""
    said = []
    for name in getattr(state, "_fields", ()):
        value = getattr(state, name)
        inner = saved.get(name) if isinstance(saved, Mapping) else getattr(saved, name, None)
        if is_population(value):
            said.append(f"{name}={_describe(value, inner)}")
        elif isinstance(value, SETTING) and not isinstance(value, np.generic):
            kept = isinstance(saved, Mapping) and isinstance(saved.get(name, ()), SETTING)
            value = inner if kept else value
            said += [] if value is None else [f"{name}={value!r}"]
    return f"{type(state).__name__}({', '.join(said)})"


def _later(states: Any, saved: Any) -> dict[Any, Any]:
    """By path, what an earlier version did not save, as it follows from the rest."""
    grown = lambda leaf: hasattr(leaf, "lacking")  # noqa: E731
    found = {}
    for path, state in jax.tree_util.tree_flatten_with_path(states, is_leaf=grown)[0]:
        if not grown(state):
            continue
        there = _found(path, saved)
        if not isinstance(there, Mapping):  # what was saved itself, or nothing of the kind
            continue
        for name, value in state.lacking(dict(there)).items():
            key = jax.tree_util.GetAttrKey(name)
            leaves, _ = jax.tree_util.tree_flatten_with_path(value)
            found |= {(*path, key, *more): leaf for more, leaf in leaves}
    return found


def _found(path: Any, saved: Any) -> Any:
    """What plain dicts (or lists, or what was saved itself) have at a path of a pytree."""
    for i, key in enumerate(path):
        name, known = _name((key,)), _children(saved)
        if name not in known:
            if name == BOX and is_array(saved):  # a pure dict has the array itself
                continue
            raise invalid(
                "restore states",
                f"a checkpoint without {_name(path[: i + 1])!r}",
                "all that the states hold",
                f"make the states as those that were saved: {nearest(name, known)}",
            )
        saved = known[name]
    unboxed = _children(saved)
    return unboxed[BOX] if unboxed.keys() == {BOX} else saved


BOX = "value"
"""The name under which the variable of an nnx model has its array."""


def _children(saved: Any) -> dict[str, Any]:
    """What lies in a node, by name; nothing in what is none."""
    if isinstance(saved, Mapping):
        return {str(name): value for name, value in saved.items()}
    if isinstance(saved, tuple) and hasattr(saved, "_fields"):
        return saved._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    values = saved if isinstance(saved, list | tuple) else ()
    return {str(i): value for i, value in enumerate(values)}


def _check_left_over(node: Any, saved: Any, at: str = "") -> None:
    """Raises ValueError for an array of a checkpoint that the states have no place for."""
    below, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda v: v is not node)
    known = {_name(path): child for path, child in below if path}
    held = _children(saved)
    if not known or (held.keys() == {BOX} and BOX not in known):  # what restores a leaf
        return
    for name, value in held.items():
        if name in known:
            _check_left_over(known[name], value, f"{at}{name}/")
        elif name not in getattr(node, "_fields", ()) and jax.tree.leaves(value):
            raise invalid(
                "restore states",
                f"a checkpoint with {at + name!r}, which the states do not have",
                "no more than the states hold",
                "make the states as those that were saved, or pass the part of the checkpoint that "
                f"they are: {nearest(name, known)}",
            )


def _said(leaf: Any) -> str:
    """The type and the shape of what a checkpoint holds."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not is_number(leaf):
        return f"that is {leaf!r}"
    dtype = getattr(leaf, "dtype", type(leaf).__name__)
    return f"of shape {jnp.shape(leaf)} and type {dtype}"


def _is_alike(value: Any, leaf: Any) -> bool:
    """Whether one of them is a number of Python that stands for an array of rank 0."""
    single = (is_number(v) or getattr(v, "shape", None) == () for v in (value, leaf))
    return any(map(is_number, (value, leaf))) and all(single)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _value(leaf: Any) -> Any:
    """What a variable of nnx holds."""
    return leaf.get_value() if hasattr(leaf, "get_value") else leaf


def _is_words(tree: Any) -> bool:
    return isinstance(tree, Mapping) and all(isinstance(v, str) for v in tree.values())
