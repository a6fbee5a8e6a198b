"""What the arguments of the Flax modules must be, by name; beside the table of the library."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

from normlab._arguments import (
    KINDS,
    Kind,
    a_function,
    anything,
    array,
    axes,
    either,
    flag,
    integer,
    mapping,
    only,
    real,
    sequence,
    settled_decay,
    text,
)
from normlab._arguments import checked as by_name
from normlab._arguments import read as read_as
from normlab.devices.topology import SHARDS

F = TypeVar("F", bound=Callable[..., Any])


RNGS = only(lambda v: not isinstance(v, type) and callable(getattr(v, "params", None)))
SIZE = integer("a whole number, at least 1", "count them", 1)
STEPS = either(
    "a whole number, at least 1, or one for each axis", "pass ints", SIZE, sequence(SIZE)
)
EDGE = integer("a whole number", "pass an int")
EDGES = either("", "", EDGE, sequence(EDGE, length=2))
INIT = a_function("an initializer", "pass one of flax.linen.initializers", of=3)
MODE = flag(
    "pass a Python bool (what a condition made is applied to the result: h * (1 + scale) + shift)"
)._replace(expected="True or False (a mask goes by its name, mask=...)")
METADATA = mapping(anything, "a mapping", "pass a dict")
MOMENTUM = settled_decay._replace(
    change='pass for example momentum=0.9, or, for statistics that stay, population="frozen"'
)

WORDS: dict[str, Kind] = {
    "axis": axes,
    "axis_index_groups": SHARDS._replace(expected="groups of the numbers of devices"),
    "bias_metadata": METADATA,
    "epsilon": real,  # how large it has to be depends on the type of the input
    "feature_axes": axes,
    "kernel_size": STEPS,
    "layer_instance": a_function("a layer", "pass a module"),
    "mask": array("booleans or weights (a mask of rank 0 says nothing)", "leave it out", rank=1),
    "method": text("the name of a method", "pass a string"),
    "momentum": MOMENTUM,
    "norm": text("the name of a norm", "use one of normlab.names()"),
    "options": mapping(anything, "options by name", "pass a dict"),
    "padding": either(
        "'SAME', 'VALID', a number, or a number or (low, high) for each axis",
        "use one",
        text("", ""),
        EDGE,
        sequence(EDGES),
    ),
    "parent": anything,
    "promote_dtype": a_function(),
    "reduction_axes": axes,
    "rngs": Kind("an nnx.Rngs", "pass nnx.Rngs(0)", RNGS, (None, "x", 1, [])),
    "rule": either(
        "a mapping from paths, or a function of path and module",
        "pass for example {'norm': 'layer'}",
        mapping(anything, "", ""),
        a_function(of=2),
    ),
    "scale_metadata": METADATA,
    "collection_name": text("the name of a collection", "pass a string"),
    "error_on_non_matrix": flag(),
    "n_steps": integer("a number of steps; below 1 for no norm", "pass 1"),
    "update_stats": flag("pass True in training, False else"),
    "variable_filter": anything,
    "x": array("an array [..., C], a real one", rank=1),
}
"""Where Flax has a word of its own. Those that the library has too mean the same."""
WORDS |= dict.fromkeys(("features", "num_features", "in_features", "out_features"), SIZE)
WORDS |= dict.fromkeys(("num_groups", "group_size", "feature_group_count"), SIZE)
WORDS |= dict.fromkeys(("strides", "kernel_dilation"), STEPS)
WORDS |= dict.fromkeys(("bias_init", "kernel_init", "scale_init"), INIT)
WORDS |= dict.fromkeys(("use_bias", "use_scale", "use_fast_variance"), flag())
WORDS |= {"force_float32_reductions": flag(), "use_running_average": MODE}
WORDS["param_dtype"] = KINDS["dtype"]


def checked(where: str, **special: Kind) -> Callable[[F], F]:
    """As `normlab._arguments.checked`, of a module of Flax or its `__init__`."""

    def decorate(f: F) -> F:
        inner: Any = f
        names = signature(inner.__init__ if isinstance(f, type) else inner).parameters
        words = {name: kind for name, kind in WORDS.items() if name in names}
        decorated: F = by_name(where, **{**words, **special})(inner)
        return decorated

    return decorate


def read(where: str, name: str, value: Any) -> Any:
    """Returns the value of an argument of a call, as `normlab._arguments.read`."""
    return read_as(where, name, value, WORDS.get(name))


def check_mode(where: str, use_running_average: Any) -> None:
    """Raises ValueError unless it is True, False or `None`: not, say, a mask in its place."""
    if use_running_average is not None:
        read(where, "use_running_average", use_running_average)
