"""Does weight normalization have the gradients, the start and the growth that its paper derives?

Claim: With w = g·v/‖v‖ the gradients are ∇g = ∇w·v/‖v‖ and ∇v = (g/‖v‖)∇w − (g∇g/‖v‖²)v. So
∇v is orthogonal to v, and under plain gradient descent ‖v‖ never falls: a step makes it
√(1 + c²) times as long, where c = rate·‖∇v‖/‖v‖. Chosen from one batch, g and b give every
pre-activation mean 0 and variance 1 on it.

Source: Salimans & Kingma 2016, sections 2.1 (equation 3) and 3, https://arxiv.org/abs/1602.07868

Protocol: A net of three hidden layers of 100 sigmoids on MNIST. ∇w is that of a net without a norm
whose kernels are w; the equations make ∇g and ∇v of it, and these are compared with what autodiff
finds through the norm, in float64. The start is taken from one batch, layer by layer, in float32.
Then plain SGD on batches of 60, and after every step the length of each unit's v. A seed draws
kernels and batches.

Command: normlab run weight_norm
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..data import Dataset
from ..engine import Condition, Config, Record, Records, Verdict, dataset, decide, draw, exact
from ..training.trainer import DeviceData, minibatches

ROUNDING = 1e-8
"""What float64 may leave, relative: of gradients, of the cosine of ∇v and v, of a new length."""

MEAN = 1e-5
"""|mean| of every pre-activation on the batch of the start, at most, in float32."""

SPREAD = 1e-4
"""Its |standard deviation − 1|, at most."""

QUICK = Config(steps=200, evaluations=40)
SECONDS = 15
FULL = Config(steps=1000, evaluations=100)

LAYERS = ("Normed_0", "Normed_1", "Normed_2")


def run(config: Config) -> Iterator[Condition]:
    """One condition; a seed after the other."""
    yield Condition({"norm": "weight"}, exact(measure, config))


def measure(config: Config) -> Iterator[Record]:
    """The records of every seed."""
    data = dataset(config.dataset, config.data_dir)
    compare = jax.jit(gradients)
    walk = jax.jit(lambda *args: train(config.lr, *args))
    images, _ = examples(data, np.arange(config.batch_size), jnp.float32)
    kernels = models.draw_kernels("mlp", data.classes, config.each_seed, images)
    for i, seed in enumerate(config.each_seed):
        batches = minibatches(seed, len(data.train_labels), config.batch_size, config.steps)
        own = jax.tree.map(lambda v, i=i: v[i], kernels)
        variables, *start = begin(own, examples(data, batches[0], jnp.float32)[0])
        with jax.enable_x64(True):
            params = jax.tree.map(lambda v: v.astype(jnp.float64), variables["params"])
            images, labels = examples(data, batches, jnp.float64)
            wrong, cosine = compare(params, images[0], labels[0])
            lengths, expected = walk(params, images, labels)
            lengths, expected = np.asarray(lengths), np.asarray(expected)  # [T, layers, units]
        growth = lengths[1:] / lengths[:-1]
        yield {
            "kind": "exact",
            "seed": seed,
            "gradients": float(wrong),
            "cosine": float(cosine),
            "mean": float(start[0]),
            "spread": float(start[1]),
            "length": float(np.abs(growth / expected[:-1] - 1).max()),
        }
        for step in range(0, config.steps, -(-config.steps // config.evaluations)):
            for at in range(len(LAYERS)):
                longer = float(np.median(lengths[step, at] / lengths[0, at]))
                yield {
                    "kind": "length",
                    "layer": f"layer {at + 1}",
                    "seed": seed,
                    "step": step,
                    "longer": longer,
                }


def network(name: str, **options: Any) -> Any:
    """The net with a norm."""
    return models.build("mlp", nl.get(name, **options), 10)


def examples(data: Dataset, chosen: np.ndarray, dtype: Any) -> tuple[Array, Array]:
    """The chosen images, preprocessed, and their labels."""
    images = DeviceData(data, 1, dtype).preprocess(data.train_inputs[chosen])
    return images, jnp.asarray(data.train_labels[chosen])


@jax.jit
def begin(kernels: Any, images: Array) -> tuple[Any, Array, Array]:
    """A net started from one batch, and how far from mean 0 and deviation 1 it is there."""
    model = network("weight", data_init=True)
    variables = models.complete(model, kernels, images)
    _, sown = model.apply(variables, images, train=True, mutable=[models.ACTIVATIONS, models.STATE])
    z = jnp.stack([flowing.z for flowing in models.activations_by_layer(sown).values()])
    return variables, jnp.abs(z.mean(1)).max(), jnp.abs(z.std(1) - 1).max()


def loss(model: Any, params: Any, images: Array, labels: Array) -> Array:
    """The cross-entropy of a batch."""
    logits, _ = model.apply({"params": params}, images, train=True, mutable=[models.STATE])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gradients(params: Any, images: Array, labels: Array) -> tuple[Array, Array]:
    """How far autodiff and the paper's equations differ, relatively; the cosine of ∇v and v."""
    found = jax.grad(lambda p: loss(network("weight"), p, images, labels))(params)
    plain = dict(params)
    for layer in LAYERS:
        v, (g, b) = params[layer]["kernel"], params[layer]["norm"]
        plain[layer] = {"kernel": nl.weight_norm(v, nl.Affine(g, None)), "norm": nl.Affine(None, b)}
    by_w = jax.grad(lambda p: loss(network("none"), p, images, labels))(plain)
    wrong, cosines = [], []
    for layer in LAYERS:
        v, g = params[layer]["kernel"], params[layer]["norm"].g
        dw, dv, dg = by_w[layer]["kernel"], found[layer]["kernel"], found[layer]["norm"].g
        length = jnp.linalg.norm(v, axis=0)
        paper_g = (dw * v).sum(0) / length
        paper_v = g / length * dw - g * paper_g / length**2 * v
        for ours, theirs in ((dg, paper_g), (dv, paper_v)):
            wrong.append(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
        cosines.append(jnp.abs((dv * v).sum(0)) / (jnp.linalg.norm(dv, axis=0) * length))
    return jnp.stack(wrong).max(), jnp.stack(cosines).max()


def train(lr: float, params: Any, images: Array, labels: Array) -> tuple[Array, Array]:
    """‖v‖ before every step, and √(1 + c²) of the step, `[steps, layers, units]`."""

    def step(params: Any, batch: tuple[Array, Array]) -> tuple[Any, tuple[Array, Array]]:
        grads = jax.grad(lambda p: loss(network("weight"), p, *batch))(params)
        length = unit_lengths(params)
        after = jax.tree.map(lambda w, g: w - lr * g, params, grads)
        return after, (length, jnp.sqrt(1 + jnp.square(lr * unit_lengths(grads) / length)))

    _, found = jax.lax.scan(step, params, (images, labels))
    return found


def unit_lengths(params: Any) -> Array:
    """‖v‖ of every unit of the hidden layers, `[layers, units]`."""
    return jnp.stack([jnp.linalg.norm(params[layer]["kernel"], axis=0) for layer in LAYERS])


def verdict(records: Records) -> Iterator[Verdict]:
    """Each equation."""
    claims = {
        "gradients": "autodiff finds the paper's gradients of g and v (relative difference)",
        "cosine": "the gradient of v is orthogonal to v (cosine)",
        "length": "a step of SGD makes ‖v‖ √(1 + c²) ≥ 1 times as long (relative difference)",
        "mean": "after its start every unit has mean 0 on that batch (largest |mean|)",
        "spread": "after its start every unit has deviation 1 (largest |sd − 1|)",
    }
    limits = {"mean": MEAN, "spread": SPREAD}
    for key, claim in claims.items():
        off, limit = records.by_seed(key), limits.get(key, ROUNDING)
        how = {"at_most": limit, "geometric": True, "exact": True}
        yield decide(key, f"weight norm: {claim}", off, **how)


def figure(records: Records) -> Figure:
    """How far each equation is off, and the lengths over training."""
    picture, (left, right) = draw.canvas(2)
    names = ("∇g, ∇v", "cos(∇v, v)", "growth of ‖v‖", "|mean|", "|sd − 1|")
    keys = ("gradients", "cosine", "length", "mean", "spread")
    off = {name: records.by_seed(key) for name, key in zip(names, keys, strict=True)}
    draw.columns(left, off)
    for at, limit in enumerate((*[ROUNDING] * 3, MEAN, SPREAD)):
        left.plot([at - 0.3, at + 0.4], [limit, limit], color="grey", lw=1, ls=":")
    draw.frame(left, log=True, ylabel="relative error", title="off by (dotted: the threshold)")
    draw.over_steps(right, records.where(kind="length"), "longer", by="layer")
    draw.frame(right, title="plain SGD", legend=True)
    right.set_ylabel("‖v‖ / ‖v‖ at the start, median unit")
    return picture
