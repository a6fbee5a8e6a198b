"""The optimizers and schedules by name, and several learning rates side by side."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

import normlab as nl
from normlab.errors import nearest

from ..rundir import RunError

Schedule = str
"""`NAME` or `NAME:option=value,…`; the names are those of `SCHEDULES`."""

Make = Callable[[float], optax.GradientTransformation]
"""Makes an optimizer of a learning rate."""

HERE: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("sgd", {"momentum": 0.9}),
    "adamw": ("adamw", {"b2": 0.95}),
}
"""Names that stand for more than optax's function of that name; what is given wins."""

REFUSED = {
    **dict.fromkeys(("lbfgs", "contrib.momo", "contrib.momo_adam"), "it needs the loss"),
    "contrib.sophia": "it needs the loss",
    "rprop": "its first steps are the learning rate, which is set after them here",
    **dict.fromkeys(
        ("contrib.schedule_free", "contrib.schedule_free_adamw", "contrib.schedule_free_sgd"),
        "the weights that it trains are not those that are to be measured",
    ),
    "contrib.dpsgd": "it needs the gradient of each example",
}
"""Optimizers of optax that a step of these experiments cannot take, and why."""

_DECAYS = ("weight_decay", "weight_decay_rate")
_MASKS = ("mask", "weight_decay_mask")


class Named(NamedTuple):
    """What a word `NAME:option=value,…` says.

    Attributes:
      name: The name.
      options: The options.
    """

    name: str
    options: dict[str, Any]


@functools.cache
def names() -> tuple[str, ...]:
    """The optimizers: `momentum`, those of optax, and `contrib.NAME` of optax.contrib."""
    found = set(HERE)
    for module, prefix in ((optax, ""), (importlib.import_module("optax.contrib"), "contrib.")):
        for name in dir(module):
            factory = getattr(module, name)
            if name.startswith(("_", "scale_by")) or isinstance(factory, type):
                continue
            if callable(factory) and "learning_rate" in _parameters(factory):
                found.add(f"{prefix}{name}")
    return tuple(sorted(found - set(REFUSED), key=lambda name: ("." in name, name)))


def require(text: str, option: str = "optimizer") -> Named:
    """What `NAME:option=value,…` says of an optimizer.

    >>> require("sgd:momentum=0.9,nesterov=true")
    Named(name='sgd', options={'momentum': 0.9, 'nesterov': True})

    Raises:
      RunError: For an unknown name or option, with the nearest; for a value of another type.
    """
    name, options = _read(text, option)
    if name in REFUSED:
        raise RunError(f"--{option} {name}: it cannot be used here: {REFUSED[name]}.")
    if name not in names():
        raise RunError(f"--{option} {text}: unknown optimizer {name!r}: {nearest(name, names())}.")
    known = _parameters(_factory(name))
    aside = {"learning_rate": "--lr", **dict.fromkeys(_DECAYS, "--weight-decay")}
    known_names = [k for k in known if k not in (*aside, *_MASKS)]
    for key, value in options.items():
        if key in aside:
            raise RunError(f"--{option} {text}: give {key} as {aside[key]}.")
        if key not in known_names:
            raise RunError(
                f"--{option} {text}: {name} has no option {key!r}: {nearest(key, known_names)}."
            )
        _require_type(f"--{option} {text}", key, value, known[key].default)
    return Named(name, options)


def require_schedule(text: str, option: str = "schedule") -> Named:
    """What `NAME:option=value,…` says of a schedule; RunError as of `require`.

    >>> require_schedule("cosine:alpha=0.1")
    Named(name='cosine', options={'alpha': 0.1})
    """
    name, options = _read(text, option)
    if name not in SCHEDULES:
        raise RunError(f"--{option} {text}: unknown schedule {name!r}: {nearest(name, SCHEDULES)}.")
    if name == "piecewise":
        for key, value in options.items():
            share = _literal(key)
            whole = isinstance(share, float) and 0 < share < 1 and _is_number(value)
            if not whole:
                raise RunError(
                    f"--{option} {text}: got {key}={value}; it must be SHARE=FACTOR, as in "
                    "piecewise:0.5=0.1,0.75=0.1: a tenth after half of the steps, and again."
                )
        return Named(name, options)
    known = {k: v for k, v in _parameters(SCHEDULES[name]).items() if k != "steps"}
    for key, value in options.items():
        if key not in known:
            raise RunError(
                f"--{option} {text}: {name} has no option {key!r}: {nearest(key, known)}."
            )
        _require_type(f"--{option} {text}", key, value, known[key].default)
    return Named(name, options)


def _constant(steps: int) -> optax.Schedule:
    del steps
    return optax.constant_schedule(1.0)


def _linear(steps: int, end: float = 0.0) -> optax.Schedule:
    return optax.linear_schedule(1.0, end, steps)


def _cosine(steps: int, alpha: float = 0.0, exponent: float = 1.0) -> optax.Schedule:
    return optax.cosine_decay_schedule(1.0, steps, alpha, exponent)


def _polynomial(steps: int, power: float = 2.0, end: float = 0.0) -> optax.Schedule:
    return optax.polynomial_schedule(1.0, end, power, steps)


def _exponential(steps: int, rate: float = 0.01) -> optax.Schedule:
    return optax.exponential_decay(1.0, steps, rate)


def _piecewise(steps: int, **factors: float) -> optax.Schedule:
    at = {round(float(share) * steps): factor for share, factor in factors.items()}
    return optax.piecewise_constant_schedule(1.0, at)


SCHEDULES: Mapping[str, Callable[..., optax.Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "exponential": _exponential,
    "piecewise": _piecewise,
}
"""By what the rate is multiplied, of the steps after the warm-up: schedules of optax from 1 on."""


def optimizer(
    name: str,
    steps: int,
    *,
    schedule: Schedule = "constant",
    warmup: int = 0,
    clip: float = 0.0,
    weight_decay: float = 0.0,
) -> Make:
    """What makes an optimizer, with what stands around it, of a learning rate.

    Args:
      name: As `require` reads it.
      steps: How many there will be.
      schedule: How the rate falls over the steps after the warm-up, as `require_schedule` reads it.
      warmup: Steps in which the rate rises to its value, by as much in each.
      clip: The norm of the whole gradient is cut to it; 0 leaves the gradient as it is.
      weight_decay: Of kernels alone (`normlab.decay_mask`). Where optax's optimizer has it, this
        share, times the rate, is taken off them; to others it is an L2 penalty: it is added to the
        gradient, as in PyTorch's SGD.
    """
    named, factory = require(name), _factory(require(name).name)
    options, known = {**HERE.get(named.name, ("", {}))[1], **named.options}, _parameters(factory)
    before = [optax.clip_by_global_norm(clip)] if clip else []
    after = []
    mask = next((key for key in _MASKS if key in known), None)
    decay = next((key for key in _DECAYS if key in known), None)
    if decay and mask:
        options |= {decay: weight_decay, mask: nl.decay_mask}
    else:
        options |= {decay: 0.0} if decay else {}
        if weight_decay:
            before.append(optax.add_decayed_weights(weight_decay, nl.decay_mask))
    how = require_schedule(schedule)
    if how.name != "constant" or warmup:
        fall = SCHEDULES[how.name](steps - warmup, **how.options)

        def share(step: Any) -> Any:
            at = jnp.float32(step)
            rise = jnp.minimum(1.0, (at + 1) / max(1, warmup))
            return rise * fall(jnp.maximum(at - warmup, 0.0))

        after = [optax.scale_by_schedule(share)]
    return lambda lr: optax.chain(*before, factory(learning_rate=lr, **options), *after)


def at_rates(make: Make) -> optax.GradientTransformation:
    """An optimizer for lanes whose rates `set_rates` sets."""
    return optax.inject_hyperparams(make)(math.nan)


def set_rates(opt_state: Any, rates: Sequence[float], devices: int, sharding: Sharding) -> Any:
    """The state `[devices, lanes, ...]` of an optimizer of `at_rates`, with the rate of each."""
    (name,) = opt_state.hyperparams
    values = np.broadcast_to(np.array(rates, np.float32), (devices, len(rates)))
    return opt_state._replace(hyperparams={name: jax.device_put(values, sharding)})


def _factory(name: str) -> Callable[..., optax.GradientTransformation]:
    """What makes the optimizer: a function of optax or of optax.contrib."""
    name, _ = HERE.get(name, (name, {}))
    module, _, last = f"optax.{name}".rpartition(".")
    return getattr(importlib.import_module(module), last)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C
        return {}


def _read(text: str, option: str) -> Named:
    """`NAME:option=value,…` in parts."""
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for word in rest.split(",") if colon else ():
        key, equals, value = word.partition("=")
        if not key or not equals or not value:
            raise RunError(
                f"--{option} {text}: got {word!r}; it must be NAME or NAME:OPTION=VALUE,…, as in "
                "sgd:momentum=0.9,nesterov=true or cosine:alpha=0.1."
            )
        if key in options:
            raise RunError(f"--{option} {text}: {key} is given twice. Give it once.")
        options[key] = _literal(value)
    return Named(name, options)


def _literal(value: str) -> Any:
    """A number, true, false or none; what is none of these is a string."""
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_type(where: str, key: str, value: Any, default: Any) -> None:
    """Raises RunError for a value that is not of the type of the default."""
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif _is_number(default) or default is inspect.Parameter.empty:
        fits, expected = _is_number(value), "a number"
    elif isinstance(default, str):
        fits, expected = isinstance(value, str), "a word"
    else:  # none, or something that makes arrays
        fits, expected = default is None or value is None, "left out"
    if not fits:
        raise RunError(f"{where}: got {key}={value}; it must be {expected}.")
