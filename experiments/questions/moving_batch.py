"""Do averages over past batches win back what batch norm loses on tiny ones?

Claim: Batch norm over two examples is far less accurate than over many. With moving averages in
both passes (MABN) most of that is won back, more than batch renormalization does; averages in the
forward pass alone win back less.

Source: Yan et al. 2020, https://arxiv.org/abs/2001.06838 (a ResNet-50 on ImageNet, error: batch
norm over 32 images 23.41%, over 2 35.22%, batch renormalization over 2 30.29%, MABN over 2 23.67%;
of what is lost that is 98 and 42%). The threshold and the ablation's order are ours.

Protocol: MNIST, three layers of 100 ReLUs; 32 examples in each of 1,000 steps of SGD, whose rate
falls from 0.1 to zero as a cosine. Each of 16 devices has two of the examples and statistics of its
own, gradients are averaged; batch norm of 32 is one device. MABN keeps the last 16 batches of its
device and centres the weights of the layer before; its r is 1 for the first 100 steps. For
inference the devices' running statistics are pooled. One rate for all, which nobody chose for any.

Command: normlab run moving_batch
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Schedule,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    plain,
    shuffled,
)
from ..engine.learn import optimizer
from .precise import floats

WON_BACK = 0.8
"""The share of what is lost over few examples that MABN wins back, at least; chosen before any
run, below the source's 0.98."""

YAN = functools.partial(Source, "yan2020", "the authors' repository, results")

DEVICES = "devices"


@dataclasses.dataclass(frozen=True)
class MovingBatch(Config):
    """The config.

    Attributes:
      together: How many examples a device has.
      size: How many batches MABN keeps.
      warmup: The steps in which its r is 1.
    """

    together: int = 2
    size: int = 16
    warmup: int = 100
    batch_size: int = 32
    schedule: Schedule = "cosine"


QUICK = MovingBatch()
SECONDS = 110
FULL = MovingBatch(steps=20_000)


def run(config: MovingBatch) -> Iterator[Condition]:
    """Batch norm over all examples and over few, and what is to repair it."""
    window = functools.partial(nl.population.init_mabn, size=config.size, begin=config.warmup)
    mabn = nl.combine.chain(
        [nl.get("centred_weight", use_bias=False), nl.get("batch", population=window)]
    )
    few = config.together
    for name, norm, together in (
        ("all", nl.get("batch"), config.batch_size),
        ("few", nl.get("batch"), few),
        ("renorm", nl.get("batch", population="renorm"), few),
        ("forward", mabn, few),
        ("mabn", mabn, few),
    ):
        train = exact(trained, config, norm, together, backward=name == "mabn")
        yield Condition({"condition": name, "together": together}, train)


def trained(
    config: MovingBatch, norm: nl.Norm, together: int, *, backward: bool
) -> Iterator[Record]:
    """The test accuracy of each seed at the end.

    Args:
      config: The config.
      norm: The norm.
      together: Examples on each device.
      backward: Whether the norms keep what the gradient meets (`nl.population.take_back`).
    """
    data = floats(dataset(config.dataset, config.data_dir))
    model, params, states = plain.begin(config, norm, data, activation=nn.relu)
    rule = optimizer(config)(config.lr)

    def loss(params: Any, taps: Any, states: Any, x: Array, y: Array) -> tuple[Array, Any]:
        states = nl.population.tapped(states, taps) if backward else states
        each = jax.vmap(lambda *one: plain.loss(model, params, *one))
        losses, states = each(states, x, y)
        return losses.mean(), states

    pool = functools.partial(nl.population.pool_running, axis_name=DEVICES)

    @plain.each_seed
    def train(arrays: Any, params: Any, state: Any, drawn: Array) -> Array:
        inputs, labels, *tests = arrays

        def step(carry: Any, chosen: Array) -> tuple[Any, None]:
            params, states, opt = carry
            chosen = chosen.reshape(-1, together)
            taps = nl.population.taps(states) if backward else ()
            given = (params, taps, states, inputs[chosen], labels[chosen])
            (grads, seen), states = jax.grad(loss, (0, 1), has_aux=True)(*given)
            if (
                backward
            ):  # in units of the gradient of the devices' mean loss, as what it is put into
                states = jax.vmap(nl.population.take_back)(states, seen)
            updates, opt = rule.update(grads, opt)
            return (optax.apply_updates(params, updates), states, opt), None

        devices = config.batch_size // together
        states = jax.tree.map(lambda v: jnp.broadcast_to(v, (devices, *v.shape)), state)
        params, states, _ = lax.scan(step, (params, states, rule.init(params)), drawn)[0]
        pooled = jax.vmap(pool, axis_name=DEVICES)(states)
        state = jax.tree.map(lambda v: v[0], pooled)
        return plain.right(model, params, state, tests[0], tests[1])

    drawn = jnp.stack([shuffled(seed, data, config) for seed in config.each_seed])
    arrays = (data.train_inputs, data.train_labels, data.test_inputs, data.test_labels)
    yield from plain.evaluations(config, train(arrays, params, states, drawn))


def verdict(records: Records) -> Iterator[Verdict]:
    """What few examples cost, and how much of it each repair wins back."""
    accuracy = {name: records.accuracy(name) for name in records.values("condition")}
    sizes = records.values("together")
    few, lost = f"over {min(sizes)}", accuracy["all"] - accuracy["few"]
    points = functools.partial(decide, at_least=0, unit="points", untuned=True)
    claim = f"batch norm {few} examples is less accurate than over {max(sizes)}"
    yield points("lost", claim, lost, source=YAN("error 23.41 → 35.22%"))
    claim = f"{few}: MABN is more accurate than batch norm"
    won = accuracy["mabn"] - accuracy["few"]
    yield points("gain", claim, won, source=YAN("error 35.22 → 23.67%"))
    claim = f"{few}: MABN wins back {WON_BACK:.0%} of what batch norm loses (points beyond that)"
    yield points("won-back", claim, won - WON_BACK * lost, source=YAN("98% won back"))
    claim = f"{few}: MABN is more accurate than batch renormalization"
    gain = accuracy["mabn"] - accuracy["renorm"]
    yield points("renorm", claim, gain, source=YAN("error 30.29 → 23.67%"))
    claim = f"{few}: MABN is more accurate than its averages in the forward pass alone"
    yield points("backward", claim, accuracy["mabn"] - accuracy["forward"])


def figure(records: Records) -> Figure:
    """The test accuracy of each, a point for each seed."""
    picture, (axes,) = draw.canvas(width=5)
    names = {
        "all": f"batch, over {max(records.values('together'))}",
        "few": "batch",
        "renorm": "renorm",
        "forward": "MABN, forward alone",
        "mabn": "MABN",
    }
    draw.columns(axes, {said: records.accuracy(name) for name, said in names.items()})
    title = f"statistics over {min(records.values('together'))} examples; a point is a seed"
    axes.set(ylabel="test accuracy (%)", title=title)
    return picture
