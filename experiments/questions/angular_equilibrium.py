"""Do weights before a norm turn by √(2·lr·λ) a step, whatever the layer and its gradient?

Claim: Scale-invariant weights under SGD with weight decay λ settle where decay and gradient
balance. From then on a step turns them by √(2·lr·λ), with momentum α by √(2·lr·λ/(1 + α)), in every
layer. The balance comes at the rate of the decay: a start c times as long as the balance is late by
ln(c)/(lr·λ) steps.

Source: Wan et al. 2020, https://arxiv.org/abs/2006.08419, and Kosson et al. 2023,
https://arxiv.org/abs/2305.17212, who extend it to other optimizers. They name no tolerance: 10% is
ours. That weights which are not scale-invariant do otherwise is the control, ours, and so is the
course after a longer start, which follows from their equations for the length:
1/√(1 + (c⁴ − 1)·e^(−4·lr·λ·t)) of the angle's balance.

Protocol: MNIST at 7×7 pixels through two layers of 32 ReLUs with batch norm (of each unit), layer
norm (of the whole kernel) or none, and a dense output layer; no gains, no biases, ε = 1e-12;
batches of 60, constant rate, decay multiplied by the rate, on all kernels. Measured: the root of
the mean square of the angle of a step over units and steps, in the last quarter of the training.

Command: normlab run angular_equilibrium
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    pooled,
)
from ..training.trainer import minibatches, stretches

NEAR = 0.1
"""How far the angle may be from √(2·lr·λ/(1 + α)), as a share of that; chosen before any run."""

WAN = Source("wan2020", "", "√(2·lr·λ/(1 + α))", "second-hand")

LAYERS = ("w0", "w1", "v")
"""Two kernels before a norm, and that of the output, before none."""


class Setting(NamedTuple):
    """How a net is trained, and c, by which its first kernels are multiplied."""

    lr: float
    decay: float
    momentum: float = 0.0
    scale: float = 1.0

    @property
    def balance(self) -> float:
        """The angle that is claimed."""
        return (2 * self.lr * self.decay / (1 + self.momentum)) ** 0.5


@dataclasses.dataclass(frozen=True)
class AngularEquilibrium(Config):
    """The config.

    Attributes:
      norms: What stands before the ReLUs.
      settings: Each a learning rate, a decay, a momentum, and the factor of the first kernels. The
        first is that of all norms.
      width: The units of each layer.
      pool: Pixels along each axis whose mean makes one.
    """

    norms: tuple[str, ...] = ("batch", "layer", "none")
    settings: tuple[tuple[float, float, float, float], ...] = (
        (0.1, 0.01, 0.0, 1.0),
        (0.1, 0.03, 0.0, 1.0),
        (0.03, 0.01, 0.9, 1.0),
        (0.1, 0.01, 0.0, 10.0),
    )
    steps: int = 4000
    evaluations: int = 40
    width: int = 32
    pool: int = 4


QUICK = AngularEquilibrium()
SECONDS = 27
FULL = AngularEquilibrium(pool=1, width=256, steps=20_000)


def run(config: AngularEquilibrium) -> Iterator[Condition]:
    """All settings with batch norm, the first with the others."""
    for norm in config.norms:
        settings = [Setting(*s) for s in config.settings[: None if norm == "batch" else 1]]
        says = [{**s._asdict(), "layer": layer} for s in settings for layer in LAYERS]
        yield Condition({"norm": norm}, exact(turning, config, norm, settings), says)


def turning(config: AngularEquilibrium, norm: str, settings: Sequence[Setting]) -> Iterator[Record]:
    """The angle of a step over the claimed one, and the length, of each layer over training."""
    data = pooled(dataset(config.dataset, config.data_dir), config.pool)
    images = data.train_inputs.reshape(len(data.train_inputs), -1)
    images = jnp.asarray(images / 255, jnp.float32)
    labels = jnp.asarray(data.train_labels)
    rows = [(s, seed) for s in settings for seed in config.each_seed]
    each = [kernels(seed, images.shape[1], config.width, data.classes, s.scale) for s, seed in rows]
    params = {k: jnp.stack([one[k] for one in each]) for k in LAYERS}
    speed = jax.tree.map(jnp.zeros_like, params)
    how = jnp.array([s[:3] for s, _ in rows], jnp.float32)
    drawn = [minibatches(seed, len(images), config.batch_size, config.steps) for _, seed in rows]
    chosen = np.stack(drawn, axis=1)
    advance = stepping(norm)
    for start, stop in stretches(config.steps, config.evaluations):
        params, speed, found = advance(params, speed, how, images, labels, chosen[start:stop])
        squares, lengths = ({k: np.asarray(v, np.float64) for k, v in f.items()} for f in found)
        for i, (s, seed) in enumerate(rows):
            for layer in LAYERS:
                yield {
                    "kind": "turn",
                    "seed": seed,
                    **s._asdict(),
                    "layer": layer,
                    "step": stop,
                    "ratio": float(np.sqrt(squares[layer][:, i].mean()) / s.balance),
                    "length": float(lengths[layer][:, i].mean()),
                }


def kernels(seed: int, inputs: int, width: int, classes: int, scale: float) -> dict[str, Array]:
    """Gaussian kernels, those before a norm `scale` times as long."""
    rng = np.random.default_rng(seed)
    sizes = dict(zip(LAYERS, ((inputs, width), (width, width), (width, classes)), strict=True))
    drawn = {k: rng.normal(size=s) / np.sqrt(s[0]) for k, s in sizes.items()}
    return {k: jnp.asarray(v * (1 if k == "v" else scale), jnp.float32) for k, v in drawn.items()}


def stepping(name: str) -> Any:
    """What makes a step of all nets for each row of `chosen`; angles and lengths on the way."""
    norm = nl.get(
        name, use_bias=False, **({} if name == "none" else {"use_gain": False, "eps": 1e-12})
    )
    axes = None if name == "layer" else 0

    def loss(params: dict[str, Array], x: Array, y: Array) -> Array:
        for layer in LAYERS[:-1]:
            site = nl.Site(x @ params[layer], x, params[layer])
            x = jax.nn.relu(norm.apply(*norm.init(site), site, train=True)[0])
        z = x @ params[LAYERS[-1]]
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    def one(w: Any, v: Any, how: Array, x: Array, y: Array) -> Any:
        lr, decay, momentum = how
        grads = jax.grad(loss)(w, x, y)
        v = jax.tree.map(lambda v, g, w: momentum * v + g + decay * w, v, grads, w)
        after = jax.tree.map(lambda w, v: w - lr * v, w, v)
        angles = {k: instruments.angular_update(w[k], after[k], axes=axes) for k in w}
        squares = jax.tree.map(lambda a: jnp.square(a).mean(), angles)
        lengths = {k: jnp.sqrt(jnp.square(u).sum(axes)).mean() for k, u in after.items()}
        return after, v, (squares, lengths)

    @jax.jit
    def advance(w: Any, v: Any, how: Array, images: Array, labels: Array, chosen: Array) -> Any:
        def step(state: Any, at: Array) -> Any:
            *after, found = jax.vmap(one)(state[0], state[1], how, images[at], labels[at])
            return tuple(after), found

        (w, v), found = lax.scan(step, (w, v), chosen)
        return w, v, found

    return advance


def settled(records: Records, layer: str, **wanted: Any) -> np.ndarray:
    """The angle over the claimed one in the last quarter of the training."""
    last = max(records.values("step"))
    here = records.where(lambda r: r["step"] > 0.75 * last, layer=layer, **wanted)
    return here.by_seed("ratio", of=lambda v: float(np.sqrt(np.mean(np.square(v)))))


def lateness(records: Records, start: Records) -> np.ndarray:
    """When the first layer, from a longer start, is at half of its angle, over what is derived.

    The length at the balance, by which c is known, is that of the ordinary `start`.
    """

    def of(seed: int) -> float:
        mine = records.where(seed=seed, layer=LAYERS[0])
        steps, ratios, lengths = (
            np.array([r[k] for r in mine]) for k in ("step", "ratio", "length")
        )
        middle = steps - steps[0] / 2
        c = lengths[0] / start.where(seed=seed, layer=LAYERS[0])[-1]["length"]
        rate = 4 * mine[0]["lr"] * mine[0]["decay"]
        derived = middle[0] + np.log((c**4 - 1) / 3) / rate  # from where the length was measured
        at = int(np.argmax(ratios >= 0.5))
        if not at:
            return float("nan")
        share = (0.5 - ratios[at - 1]) / (ratios[at] - ratios[at - 1])
        return float((middle[at - 1] + share * (middle[at] - middle[at - 1])) / derived)

    return np.array([of(seed) for seed in sorted(records.values("seed"))])


def verdict(records: Records) -> Iterator[Verdict]:
    """The angle of each layer under each setting, what has no norm, and a longer start."""
    near = {"at_least": 1 - NEAR, "at_most": 1 + NEAR, "geometric": True}
    first, *_ = settings = [Setting(*s) for s in records.values(*Setting._fields)]
    for s in settings:
        if s.scale != 1:
            continue
        where = f"lr {s.lr:g}, λ {s.decay:g}, momentum {s.momentum:g}"
        name = f"lr-{s.lr:g}.decay-{s.decay:g}.momentum-{s.momentum:g}"
        for layer in LAYERS[:-1]:
            found = settled(records, layer, norm="batch", **s._asdict())
            claim = f"batch norm, {where}, layer {layer[1]}: its angle over √(2·lr·λ/(1 + α))"
            yield decide(f"batch.{name}.{layer}", claim, found, **near, source=WAN)
    for layer in LAYERS[:-1]:
        claim = f"layer norm, the whole kernel of layer {layer[1]}: its angle over √(2·lr·λ)"
        found = settled(records, layer, norm="layer", **first._asdict())
        yield decide(f"layer.{layer}", claim, found, **near, source=WAN)
    for norm, layer, what in (
        ("batch", "v", "the output layer"),
        ("none", "w0", "no norm, layer 0"),
    ):
        found = settled(records, layer, norm=norm, **first._asdict())
        claim = f"{what}, not scale-invariant, turns by less (its angle over √(2·lr·λ))"
        yield decide(f"control.{norm}.{layer}", claim, found, at_most=1 - NEAR, geometric=True)
    batch = records.where(norm="batch", lr=first.lr, decay=first.decay, momentum=first.momentum)
    longer = batch.where(lambda r: r["scale"] != 1)
    claim = "from a longer start, the steps to half of the balance's angle over those derived"
    found = lateness(longer, batch.where(scale=1.0))
    yield decide("longer.half", claim, found, **near)


def figure(records: Records) -> Figure:
    """The angle over training under each setting, and by norm and layer."""
    picture, (left, right) = draw.canvas(2, width=5)
    batch = records.where(norm="batch")
    lines = [
        r
        | {"line": f"lr {r['lr']:g}, λ {r['decay']:g}, α {r['momentum']:g}, start ×{r['scale']:g}"}
        for r in batch.where(layer=LAYERS[0])
    ]
    draw.over_steps(left, lines, "ratio", by="line")
    draw.frame(left, threshold=1, yscale="log", title="batch norm, layer 0", legend=True)
    left.set_ylabel("angle of a step / √(2·lr·λ/(1 + α))")
    s = Setting(*records.values(*Setting._fields)[0])
    names = {"w0": "layer 0", "w1": "layer 1", "v": "output"}
    groups = {
        f"{norm}, {names[layer]}": settled(records, layer, norm=norm, **s._asdict())
        for norm in records.values("norm")
        for layer in LAYERS
    }
    draw.columns(right, groups)
    draw.frame(
        right, threshold=(1 - NEAR, 1 + NEAR), title=f"lr {s.lr:g}, λ {s.decay:g}, at the end"
    )
    right.set_ylabel("angle of a step / √(2·lr·λ)")
    return picture
