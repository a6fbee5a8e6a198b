"""A client of normlab: Flax's ImageNet ResNet-50, whose one changed line is the norm's import."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import normlab.linen
from tests.client_resnet import ResNet50
from tests.helpers import draw, gap

NORMS = {"flax": nn.BatchNorm, "normlab": normlab.linen.BatchNorm}
OTHER = {"flax": "normlab", "normlab": "flax"}
NARROW, FULL = 8, 64
"""Channels of the first convolution: all 50 layers in an eighth of the width, and ResNet-50."""

STEPS = 3
IMAGES = draw(0, 8, 64, 64, 3).astype(np.float32)
LABELS = np.arange(8)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


class Checkpoint(NamedTuple):
    """What training goes on from."""

    variables: dict[str, Any]
    opt_state: optax.OptState


def model(norm: str, filters: int):
    return ResNet50(classes=10, filters=filters, batch_norm=NORMS[norm])


@functools.cache
def initial(filters: int) -> Checkpoint:
    key = jax.random.key(0, impl="rbg")  # compiles faster than the default one
    init = jax.jit(lambda: model("flax", filters).init(key, IMAGES[:1], train=False))
    variables = init()
    return Checkpoint(variables, OPTIMIZER.init(variables["params"]))


@functools.cache
def compiled_step(norm: str, filters: int):
    network = model(norm, filters)

    def loss(params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, changed = network.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return losses.mean(), changed["batch_stats"]

    def step(checkpoint: Checkpoint):
        params, batch_stats = (checkpoint.variables[k] for k in ("params", "batch_stats"))
        (value, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(params, batch_stats)
        updates, opt_state = OPTIMIZER.update(grads, checkpoint.opt_state, params)
        params = optax.apply_updates(params, updates)
        return Checkpoint({"params": params, "batch_stats": batch_stats}, opt_state), value

    return jax.jit(step).lower(initial(filters)).compile()


@functools.cache
def trained(norm: str, filters: int):
    """The losses, the running statistics after each step, and where training ended."""
    checkpoint, losses, statistics = initial(filters), [], []
    for _ in range(STEPS):
        checkpoint, loss = compiled_step(norm, filters)(checkpoint)
        losses.append(loss)
        statistics.append(checkpoint.variables["batch_stats"])
    return jnp.stack(losses), statistics, checkpoint


def shapes(norm: str):
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    network = ResNet50(classes=1000, batch_norm=NORMS[norm])
    return jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), image)


def test_the_variables_of_the_one_are_those_of_the_other():
    variables = shapes("flax")
    assert shapes("normlab") == variables
    assert sum(v.size for v in jax.tree.leaves(variables["params"])) == 25_557_032


@pytest.mark.parametrize("filters", [NARROW, pytest.param(FULL, marks=pytest.mark.slow)])
def test_three_steps_from_the_same_variables_give_the_same_losses_and_statistics(filters):
    losses, statistics, _ = trained("normlab", filters)
    expected_losses, expected_statistics, _ = trained("flax", filters)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert losses[2] < losses[1] < losses[0]
    for got, expected in zip(statistics, expected_statistics, strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        assert gap(got, expected) < 1e-5


def as_bytes(checkpoint: Checkpoint, template: Checkpoint, _) -> Checkpoint:
    loaded: Any = flax.serialization.from_bytes(template, flax.serialization.to_bytes(checkpoint))
    return loaded


def by_orbax(checkpoint: Checkpoint, template: Checkpoint, path) -> Checkpoint:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", checkpoint)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", template)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("carry", [as_bytes, by_orbax])
def test_training_goes_on_from_the_checkpoint_of_the_other(norm, carry, tmp_path):
    _, _, ended = trained(OTHER[norm], NARROW)
    loaded = carry(ended, initial(NARROW), tmp_path)
    assert jax.tree.structure(loaded) == jax.tree.structure(ended)
    assert gap(loaded, ended) == 0
    got, loss = compiled_step(norm, NARROW)(jax.tree.map(jnp.asarray, loaded))
    expected, expected_loss = compiled_step(OTHER[norm], NARROW)(ended)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert gap(got.variables["batch_stats"], expected.variables["batch_stats"]) < 1e-5
