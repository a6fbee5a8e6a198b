"""The optimizers, with their schedules, and several learning rates side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

import normlab as nl

Schedule = Literal["constant", "linear", "cosine"]

Make = Callable[[float], optax.GradientTransformation]
"""Makes an optimizer of a learning rate."""

OPTIMIZERS: dict[str, Callable[[float, float], optax.GradientTransformation]] = {
    "sgd": lambda lr, _: optax.sgd(lr),
    "momentum": lambda lr, _: optax.sgd(lr, momentum=0.9),
    "adagrad": lambda lr, _: optax.adagrad(lr),
    "rmsprop": lambda lr, _: optax.rmsprop(lr),
    "adam": lambda lr, _: optax.adam(lr),
    "adamw": lambda lr, decay: optax.adamw(lr, b2=0.95, weight_decay=decay, mask=nl.decay_mask),
}
"""Every optimizer by name, of a learning rate and the weight decay, which is that of adamw.

Momentum is 0.9; the squared gradients' is 0.95 in adamw and 0.999 in adam.
"""


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
      name: One of `OPTIMIZERS`.
      steps: How many there will be.
      schedule: How the rate falls to 0 over the steps after the warm-up, or "constant".
      warmup: Steps in which the rate rises to its value, by as much in each.
      clip: The norm of the whole gradient is cut to it; 0 leaves the gradient as it is.
      weight_decay: Of adamw: this share of the kernels, times the rate, is taken off them.
    """
    make = OPTIMIZERS[name]
    before = [optax.clip_by_global_norm(clip)] if clip else []
    after = []
    if schedule != "constant" or warmup:
        fall = {
            "constant": optax.constant_schedule(1.0),
            "linear": optax.linear_schedule(1.0, 0.0, steps - warmup),
            "cosine": optax.cosine_decay_schedule(1.0, steps - warmup),
        }[schedule]

        def share(step: Any) -> Any:
            at = jnp.float32(step)
            rise = jnp.minimum(1.0, (at + 1) / max(1, warmup))
            return rise * fall(jnp.maximum(at - warmup, 0.0))

        after = [optax.scale_by_schedule(share)]
    return lambda lr: optax.chain(*before, make(lr, weight_decay), *after)


def at_rates(make: Make) -> optax.GradientTransformation:
    """An optimizer for lanes whose rates `set_rates` sets."""
    return optax.inject_hyperparams(make)(math.nan)


def set_rates(opt_state: Any, rates: Sequence[float], devices: int, sharding: Sharding) -> Any:
    """The state `[devices, lanes, ...]` of an optimizer of `at_rates`, with the rate of each."""
    (name,) = opt_state.hyperparams
    values = np.broadcast_to(np.array(rates, np.float32), (devices, len(rates)))
    return opt_state._replace(hyperparams={name: jax.device_put(values, sharding)})
