"""What is done with params beside an optimizer's step: which decay, and which are projected.

Params are any pytree: of linen, of `nnx.state`, of equinox or haiku, or of the library's own
`Affine`, `Offset` and their like. A rule names them by path, as everywhere in the library.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from normlab._arguments import Kind, axes, checked, flag, is_array, is_number, mapping, tree
from normlab._checks import normalize_axes
from normlab._paths import is_box, matches, named
from normlab._units import units_and_lengths
from normlab.errors import invalid

Tree = TypeVar("Tree")


def _rule(item: Kind, expected: str, change: str) -> Kind:
    kind = mapping(item, expected, change)

    def value_of(value: Any) -> Any:
        if not all(isinstance(name, str) for name in kind.read(value)):
            raise TypeError
        return value

    return kind._replace(read=value_of)


def _shaped(value: Any) -> Any:
    for leaf in jax.tree.leaves(value):
        if not (is_array(leaf) or is_number(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
            raise TypeError
    return value


_PARAMS = tree("a pytree of arrays", "pass the params of the model")
_SHAPES = _PARAMS._replace(expected="a pytree of arrays or shapes", read=_shaped)
_AXES = _rule(axes, "paths of params, each to an axis or axes", "pass {'.*/kernel': -2}")
_FLAGS = _rule(flag(), "paths of params, each to True or False", "pass {'embed/.*': False}")


@checked("project", params=_PARAMS, rule=_AXES)
def project(params: Tree, rule: Mapping[str, int | Sequence[int]]) -> Tree:
    """Divides params by their lengths, w/‖w‖ along an axis: back to unit rows after each step.

    nGPT (Loshchilov et al. 2024, https://arxiv.org/abs/2410.01131) does so to all matrices, along
    the axis that lies in the residual stream. For kernels `[K, C]` with units last:

        params = optax.apply_updates(params, updates)
        params = project(params, {".*/(q|k|v|up|gate)/kernel": -2, ".*/(out|down)/kernel": -1,
                                  "embed/embedding": -1})

    This is a projection: the gradient before it is that of the kernel as it is. Where the kernel
    is to be normalized within the net, use `weight_norm`.

    Args:
      params: A pytree of params, or variables of linen with a collection "params".
      rule: A path, or a regular expression for the whole of one, to the axis along which the
        length is taken, or to several that have one length together. Where layers are stacked for
        a scan, count axes from the end.

    Returns:
      The same tree, of the same types. Lengths are taken in float32 at least, and neither overflow
      nor underflow; what is zero stays zero.

    Raises:
      ValueError: For a pattern that fits nothing, a path that fits two, an axis that an array does
        not have, or params that are no floating numbers.

    >>> project({"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}, {"kernel": 0})["kernel"].tolist()
    [[0.6000000238418579, 0.0], [0.800000011920929, 0.0]]
    """
    leaves, structure = named(params, is_box)
    known, new = _parameters(params, leaves), [leaf for _, leaf in leaves]

    def unit(path: str, axis: Any, w: Any) -> Array:
        along = normalize_axes(f"project {path!r}", axis, jnp.ndim(w))
        if not _is_floating(w):
            given = f"{path!r} of type {jnp.result_type(w)}"
            raise invalid("project", given, "floating numbers", "leave it out of the rule")
        return units_and_lengths(w, along)[0].astype(jnp.result_type(w))

    for path, axis, _ in matches("project", rule, known, "parameter"):
        i = known[path]
        new[i] = jax.tree.map(functools.partial(unit, path, axis), new[i])
    return jax.tree.unflatten(structure, new)


_KERNELS = frozenset({"kernel", "w", "embedding"})
_EXEMPT = frozenset(
    {"bias", "b", "offset", "scale", "g", "gain", "gamma", "beta", "d", "s", "alpha", "shift"}
    | {"skip", "branch", "static"}
)
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)


@checked("decay mask", params=_SHAPES, rule=_FLAGS)
def decay_mask(params: Tree, rule: Mapping[str, bool] | None = None) -> Tree:
    """Which params weight decay is for: matrices, and no gains, biases or norm params.

    For `optax.adamw(rate, weight_decay=0.1, mask=decay_mask)`, and everything else that takes such
    a mask. As in nanoGPT, what has two axes or more decays, embeddings too, and what is called a
    kernel. An array that is stacked for a scan has one more: so gains and biases are known by their
    names, in linen, nnx, haiku and torch (a `weight` right under a norm), and the params of the
    library's norms by what they are, such as `Affine`. What streams are weighed by (`static` of a
    `Mixing`) is a gain too: drawn to 0, hyper-connections would lose the streams.

    Args:
      params: As in `project`; the shapes suffice.
      rule: A path, or a regular expression for the whole of one, to whether that decays, where it
        is to be otherwise. `{"embed/.*": False}` exempts embeddings; `{".*/d": True}` draws the
        gains that are kept as an `Offset` to 1.

    Returns:
      The tree with `True` or `False` in the place of each array.

    Raises:
      ValueError: For a pattern that fits nothing, or a path that fits two.

    >>> from normlab import init_affine
    >>> decay_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "norm": init_affine(2)})
    {'bias': False, 'kernel': True, 'norm': Affine(g=False, b=False)}
    """
    leaves, structure = named(params, is_box)
    known = _parameters(params, leaves)
    norms = [f"{path}/" for path, v in named(params, _is_of_norm)[0] if _is_of_norm(v)]
    decays = dict.fromkeys(range(len(leaves)), False)
    for path, i in known.items():
        inside = any(norm == "/" or f"{leaves[i][0]}/".startswith(norm) for norm in norms)
        decays[i] = not inside and _decays(path, leaves[i][1])
    for path, value, _ in matches("decay mask", rule or {}, known, "parameter"):
        decays[known[path]] = value
    new = [jax.tree.map(lambda _, i=i: decays[i], leaf) for i, (_, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(structure, new)


def _parameters(tree: Any, leaves: list[tuple[str, Any]]) -> dict[str, int]:
    """The places of the params among the leaves, by path; of collections those of "params"."""
    if not (isinstance(tree, Mapping) and "params" in tree):
        return {path: i for i, (path, _) in enumerate(leaves)}
    places = {path: i for i, (path, _) in enumerate(leaves) if path.startswith("params/")}
    return {path.removeprefix("params/"): i for path, i in places.items()}


def _is_of_norm(value: Any) -> bool:
    """Whether it is the params of a norm of the library, by what every norm asks of them."""
    return isinstance(value, tuple) and hasattr(value, "g") and hasattr(value, "b")


def _decays(path: str, leaf: Any) -> bool:
    *parents, last = [name for name in re.split(r"[/.]", path) if not name.isdigit()] or [""]
    named_so = last in _KERNELS or not (parents and _NORM.search(parents[-1]))
    axes = 1 if last == "kernel" else 2  # that of one output may be a vector
    matrix = all(len(jnp.shape(v)) >= axes and _is_floating(v) for v in jax.tree.leaves(leaf))
    return matrix and named_so and last not in _EXEMPT


def _is_floating(v: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(v), jnp.floating)
