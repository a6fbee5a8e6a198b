"""Norms of the registry as modules, and the exchange of the norms of a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from normlab._flax.calls import weights
from normlab._flax.exchange import Choice, Rule, is_norm, replacement
from normlab._flax.layers import NORM, from_registry, learned
from normlab._flax.state import is_training
from normlab._flax.words import checked, read
from normlab.errors import invalid
from normlab.nnx.transactions import MODEL, Kept, Stateful
from normlab.site import Norm, Site


class RegistryNorm(Stateful):
    """Any norm of the registry that looks at the pre-activation alone, its channels last.

    The parameters are `scale` and `bias`, a state is `population`, a `BatchStat` for each array.

    >>> layer = RegistryNorm("group", 6, {"groups": 2})
    >>> layer(jnp.ones((4, 6))).shape
    (4, 6)
    """

    @checked("RegistryNorm", norm=NORM)
    def __init__(
        self,
        norm: str | Norm,
        num_features: int,
        options: Mapping[str, Any] | None = None,
        *,
        use_running_average: bool | None = False,
    ) -> None:
        """Makes the variables.

        Args:
          norm: Its name, as in `normlab.get`; or the norm itself.
          num_features: The number of channels.
          options: Its options, beside a name.
          use_running_average: As in `BatchNorm`, for a norm with a state.
        """
        self.norm = norm
        self.num_features = num_features
        self.options = tuple(sorted((options or {}).items()))
        self.use_running_average = use_running_average
        some: Any = jax.ShapeDtypeStruct((2, 2, 2, num_features), jnp.float32)
        params, state = from_registry(norm, dict(self.options)).init(Site(some))
        self.scale = self.bias = nnx.data(None)
        self.learned = learned(params, self._learn)
        self._keep(state)
        self.pending = nnx.data(None)

    def _learn(self, name: str, value: Any) -> str:
        setattr(self, name, nnx.data(jax.tree.map(nnx.Param, value)))
        return name

    def _value(self, name: str) -> Any:
        kept, of = getattr(self, name), nnx.Variable
        return jax.tree.map(lambda v: v[...], kept, is_leaf=lambda v: isinstance(v, of))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        segments: Any = None,
    ) -> Array:
        """Normalizes `x`; arguments as those of `BatchNorm`, and the ids of `nl.Site.segments`."""
        where = str(self.norm)
        train = is_training(where, use_running_average, self.use_running_average)
        norm = from_registry(self.norm, dict(self.options))
        x = jnp.asarray(read(where, "x", x))
        site = Site(x, weights=weights(where, mask, x.shape), segments=segments)
        state, write = self._kept(train)
        params = learned(self.learned, lambda _, name: self._value(name))
        h, state = norm.apply(params, state, site, train=train)
        if train:
            write(state)
        return h


@checked("swap", model=MODEL)
def swap(model: Any, rule: Rule, *, rngs: nnx.Rngs | None = None) -> Any:
    """Exchanges norms of a model, in place, by path.

    A norm is a module whose class has a name that ends in `Norm`. A replacement by a class takes
    over those arguments of the old norm that it has too, and, if it is of the same name (flax's
    `BatchNorm` by this library's), its variables; one of another kind begins with new variables.
    A replacement by a module is a copy of it. A norm that is shared is replaced wherever it is.

    Args:
      model: A module.
      rule: Which norms become what, a `normlab._flax.exchange.Rule`.
      rngs: For new variables; `nnx.Rngs(0)` if not given.

    Returns:
      The model; its replacement, if it is itself a norm.

    Raises:
      ValueError: If a pattern matches nothing; the model is then unchanged.

    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs))
    >>> type(swap(model, {"layers/1": "rms"}).layers[1]).__name__
    'RegistryNorm'
    """
    choice, top = Choice(rule), {"": model}
    places: dict[int, list[tuple[Any, Any]]] = {}
    chosen: dict[int, tuple[Any, Any]] = {}
    for path, parent, key, old in _norms(top, (), set()):
        places.setdefault(id(old), []).append((parent, key))
        new = choice.find("/".join(map(str, path[1:])), old)
        if new is not None:
            chosen.setdefault(id(old), (new, old))
    choice.check()
    for which in chosen:
        for parent, key in places[which]:
            if isinstance(parent, tuple):
                given, change = f"a norm in a tuple, at {key}", "make the tuple an nnx.List"
                raise invalid("swap", given, "norms in attributes, lists and dicts", change)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    make = {"registry_norm": _registry_norm, "converted": functools.partial(_converted, rngs)}
    made = {i: replacement(new, old, nnx.Module, **make) for i, (new, old) in chosen.items()}
    for which, new in made.items():
        new = nnx.clone(new) if new is chosen[which][0] else new
        for parent, key in places[which]:
            _put(parent, key, new)
    return top[""]


def _norms(node: Any, path: tuple[Any, ...], seen: set[int]) -> Any:
    """Every place of a norm below `node`: its path, the node that holds it, its key, the norm."""
    if id(node) in seen:
        return
    seen.add(id(node))
    for key, child in _children(node):
        if isinstance(child, nnx.Module) and is_norm(child):
            yield (*path, key), node, key, child
        else:
            yield from _norms(child, (*path, key), seen)


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, nnx.Dict | dict):
        return list(node.items())
    if isinstance(node, nnx.Module):
        return [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree__")]
    return []


def _put(parent: Any, key: Any, new: Any) -> None:
    if isinstance(parent, nnx.List | list | nnx.Dict | dict):
        parent[key] = new
    else:
        setattr(parent, key, new)


def _features(old: Any) -> int:
    if hasattr(old, "num_features"):
        return old.num_features
    if hasattr(old, "num_groups"):
        return old.num_groups * old.group_size
    raise invalid(
        "swap",
        f"a {type(old).__name__} without num_features",
        "a norm that knows the number of its features",
        "give the new module itself",
    )


def _registry_norm(old: Any, name: str, options: Mapping[str, Any]) -> nnx.Module:
    mode = getattr(old, "use_running_average", False)
    return RegistryNorm(name, _features(old), options, use_running_average=mode)


def _converted(
    rngs: nnx.Rngs, old: Any, new: type, taken: dict[str, Any], given: Mapping[str, Any]
) -> nnx.Module:
    if "num_groups" in taken:
        taken.pop("group_size", None)  # an attribute that follows from the number
    taken = {name: value for name, value in taken.items() if not isinstance(value, nnx.Variable)}
    module = new(_features(old), **taken | dict(given), rngs=rngs)
    if type(old).__name__ == new.__name__:
        for name, value in vars(old).items():
            if isinstance(value, Kept | nnx.Variable):
                setattr(module, name, value)
    return module
