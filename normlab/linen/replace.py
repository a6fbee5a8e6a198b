"""Norms of the registry as modules, and the exchange of the norms of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import instance
from normlab._flax.calls import weights
from normlab._flax.exchange import Choice, Rule, is_norm, replacement
from normlab._flax.layers import NORM, before_the_map, from_registry, learned
from normlab._flax.words import check_mode, checked, read
from normlab.errors import invalid
from normlab.linen.norms import merged_mode, stored
from normlab.site import Norm, Site


@checked("RegistryNorm", norm=NORM)
class RegistryNorm(nn.Module):
    """Any norm of the registry that looks at the pre-activation alone, its channels last.

    The parameters are `scale` and `bias`, and what else the norm learns by its own name; a state
    is the variable `population` of `batch_stats`.

    Attributes:
      norm: Its name, as in `normlab.get`; or the norm itself.
      options: Its options, beside a name.
      use_running_average: As in `BatchNorm`, for a norm with a state.

    >>> layer = RegistryNorm("group", {"groups": 2})
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((4, 6))))
    {'params': {'bias': (6,), 'scale': (6,)}}
    """

    norm: str | Norm
    options: Mapping[str, Any] = dataclasses.field(default_factory=core.FrozenDict)
    use_running_average: bool | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        segments: Any = None,
    ) -> Array:
        """Normalizes `x`; arguments as those of `BatchNorm`, and the ids of `nl.Site.segments`."""
        norm, where = from_registry(self.norm, self.options), str(self.norm)
        x = jnp.asarray(read(where, "x", x))
        site = Site(x, weights=weights(where, mask, x.shape), segments=segments)
        params, fresh = norm.init(site)
        check_mode(where, use_running_average)
        stateful = bool(jax.tree.leaves(fresh))
        train = not (stateful and merged_mode(self, where, use_running_average))
        state, write = stored(self, fresh, train)
        params = learned(params, lambda name, v: self.param(name, lambda key: v))
        # Variables are made with the statistics of inference: any one example will do.
        train = train and not self.is_initializing()
        norm = before_the_map(norm) if self.is_initializing() else norm
        h, state = norm.apply(params, state, site, train=train)
        if train:
            write(state)
        return h


class Swapped(nn.Module):
    """A model with other norms; its variables have the names they have in the model.

    Attributes:
      plan: The model, the rule and the method: what `swap` was given.

    >>> model, x = nn.Sequential([nn.Dense(4), nn.LayerNorm()]), jnp.ones((2, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> h = swap(model, {"layers_1": "rms"}).apply(variables, x)     # with the model's variables
    >>> jnp.square(h).mean(-1).round(2).tolist()
    [1.0, 1.0]
    """

    plan: _Plan

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's method; each norm that the rule names is replaced where it is called.

        Raises:
          ValueError: If a pattern of the rule matches no norm.
        """
        choice, made = Choice(self.plan.rule), []
        start = len(self.path)

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            old = context.module
            mine = any(old is new for new in made)
            if context.method_name != "__call__" or mine or not is_norm(old):
                return call(*args, **kwargs)
            new = choice.find("/".join(old.path[start:]), old)
            if new is None:
                return call(*args, **kwargs)
            new = replacement(new, old, nn.Module, _registry_norm, _converted)
            new = new.clone(parent=old.scope, name=None)
            made.append(new)
            return new(*args, **kwargs)

        model = self.plan.model.clone(parent=self.scope, name=None)
        with nn.intercept_methods(intercept):
            out = getattr(model, self.plan.method)(*args, **kwargs)
        choice.check()
        return out


def _registry_norm(old: nn.Module, name: str, options: Mapping[str, Any]) -> nn.Module:
    mode = getattr(old, "use_running_average", None)
    return RegistryNorm(name, core.freeze(dict(options)), mode)


def _converted(
    old: nn.Module, new: type, taken: dict[str, Any], given: Mapping[str, Any]
) -> nn.Module:
    del old
    return new(**taken | dict(given))


class _Plan:
    """What a `Swapped` holds: in an object of its own, where Flax does not take it for a layer."""

    def __init__(self, model: nn.Module, rule: Rule, method: str) -> None:
        self.model, self.rule, self.method = model, rule, method


MODEL = instance(nn.Module, "pass the model", arrays=False)


@checked("swap", model=MODEL)
def swap(model: nn.Module, rule: Rule, *, method: str = "__call__") -> Swapped:
    """Returns the model with other norms, by path.

    A norm is a module whose class has a name that ends in `Norm`. Its replacement takes its place
    in the tree of variables: parameters of the same name and shape are found there again. A class
    takes over those arguments of the old norm that it has too. What `nn.jit` has compiled
    does not ask which norm to use, which is an error: put `jax.jit` around the whole.

    Args:
      model: A module that is not bound; one made inside another must have parent=None.
      rule: Which norms become what, a `normlab._flax.exchange.Rule`.
      method: The method of the model that is called.

    Returns:
      A module with `init` and `apply`. Calling it raises ValueError if a pattern matches nothing.

    Raises:
      ValueError: If the model has a parent, or a pattern is no regular expression.

    >>> model = nn.Sequential([nn.Dense(4), nn.LayerNorm()])
    >>> other = swap(model, {"layers_1": "rms"})
    >>> jax.tree.map(jnp.shape, other.init(jax.random.key(0), jnp.ones((2, 3)))["params"])
    {'layers_0': {'bias': (4,), 'kernel': (3, 4)}, 'layers_1': {'bias': (4,), 'scale': (4,)}}
    """
    if isinstance(model.parent, nn.Module):
        raise invalid(
            "swap",
            f"a {type(model).__name__} that is a part of {type(model.parent).__name__}",
            "a module without a parent",
            "make it with parent=None",
        )
    Choice(rule)
    return Swapped(_Plan(model, rule, method), name=model.name)
