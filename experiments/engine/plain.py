"""Training in plain JAX, for what the trainer has no place for: other losses, many states, phases.

model, params, states = begin(config, norm, data, activation=nn.relu)     [seeds, ...]
step = sgd(model, optax.sgd(0.1))
params, states, opt = step((params, states, opt), (x, y))                 of one seed
flags = right(model, params, states, x, y)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import normlab as nl

from .. import models
from ..data import Dataset
from ..rundir import Record, packed
from .question import Config

Carry = tuple[Any, Any, Any]
"""The params, the norms' states, the optimizer's state."""


def begin(
    config: Config, norm: nl.Norm, data: Dataset, **options: Any
) -> tuple[models.Network, Any, Any]:
    """The config's model with a norm, and its first params and norms' states `[seeds, ...]`.

    Args:
      config: Says which model, and which seeds.
      norm: The norm.
      data: Of a floating type.
      **options: Of the model, as in `models.build`.
    """
    model = models.build(config.model, norm, data.classes, **options)
    probe = jnp.asarray(data.train_inputs[:32])
    kernels = models.draw_kernels(config.model, data.classes, config.each_seed, probe, **options)
    complete = jax.jit(jax.vmap(lambda k: models.split(models.complete(model, k, probe))))
    return model, *complete(kernels)


def loss(model: models.Network, params: Any, states: Any, x: Array, y: Array) -> tuple[Array, Any]:
    """The mean cross-entropy of a batch in training, in nats, and the norms' next states."""
    variables = {"params": params, models.STATE: states}
    logits, after = model.apply(variables, x, train=True, mutable=[models.STATE])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), after.get(models.STATE, states)


def sgd(
    model: models.Network, rule: optax.GradientTransformation
) -> Callable[[Carry, tuple[Array, Array]], Carry]:
    """A step of training: `(params, states, opt), (x, y)` to the next three."""

    def step(carry: Carry, batch: tuple[Array, Array]) -> Carry:
        params, states, opt = carry
        grads, states = jax.grad(lambda p: loss(model, p, states, *batch), has_aux=True)(params)
        updates, opt = rule.update(grads, opt, params)
        return optax.apply_updates(params, updates), states, opt

    return step


def right(model: models.Network, params: Any, states: Any, x: Array, y: Array) -> Array:
    """Which examples `[N]` are told right in inference."""
    logits: Array = model.apply({"params": params, models.STATE: states}, x, train=False)  # type: ignore[assignment]
    return logits.argmax(-1) == y


def each_seed(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(arrays, *of_a_seed)` compiled for all seeds side by side: `[seeds, ...]` but the arrays.

    What a program closes over is copied into it, which takes memory and time; data are arguments.
    """
    return jax.jit(lambda arrays, *given: jax.vmap(functools.partial(f, arrays))(*given))


def evaluations(config: Config, flags: Array, **labels: Any) -> Iterator[Record]:
    """A record of the end for each seed, of `flags` `[seeds, N]`."""
    for seed, each in zip(config.each_seed, np.asarray(flags), strict=True):
        found = {"accuracy": float(each.mean()), "accuracy_each": packed(each)}
        yield {"kind": "evaluation", **labels, "seed": seed, "step": config.steps, **found}
