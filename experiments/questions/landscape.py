"""Does batch norm smooth the landscape along the step?

Claim: Along the gradient from where training stands, the loss of a net with batch norm ranges over
less, and its gradient changes less, in length and for the length of the step: the landscape is
smoother.

Source: Santurkar et al. 2018, section 3.2 and figure 4, https://arxiv.org/abs/1805.11604, which we
know from summaries. The figure has no number; a factor of 3 is ours. That this, and not a still
distribution, is why batch norm helps is the paper's thesis, and is not tested here.

Protocol: Ten hidden layers of 100 ReLUs on MNIST, batches of 60, SGD. At several places of
training, one batch of 256 examples: the loss and its gradient at w − t·∇L for t from half the rate
to four times the rate, as in the paper's figure. The width of the loss is its range there; the
change of the gradient is its largest ‖∇L(w − t·∇L) − ∇L(w)‖, and the effective β the largest over
the length of the step. Each is averaged over training, after its first step. The paper's nets are
VGG and a deep linear net.

Command: normlab run landscape
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..engine import Condition, Config, Net, Records, Source, Verdict, decide, draw, learn

SIZE = 3.0
"""The factor by which the loss ranges over less with batch norm, and by which its effective β is
smaller, if the effect is large. Ours, set before the first run."""

SOURCE = Source("santurkar2018", "section 3.2, figure 4", "", "second-hand")

STEPS = tuple(0.5 * k for k in range(1, 9))
"""The lengths along the gradient, in units of the learning rate."""


@dataclasses.dataclass(frozen=True)
class Landscape(Config):
    """The config.

    Attributes:
      depth: Hidden layers.
    """

    depth: int = 10
    steps: int = 500
    evaluations: int = 10
    lr: float = 0.1


QUICK = Landscape()
SECONDS = 70
FULL = Landscape(steps=15_000, evaluations=100)


def run(config: Landscape) -> Iterator[Condition]:
    """Without a norm and with batch norm."""
    for name in ("none", "batch"):
        measure = learn(
            config,
            nl.get(name),
            instrument=walk,
            widths=(100,) * config.depth,
            activation=jax.nn.relu,
        )
        yield Condition({"norm": name}, measure)


def walk(net: Net) -> dict[str, Array]:
    """The range of the loss, of the change of the gradient, and the effective β along the step."""
    along = instruments.along_step(
        net.loss, net.params, jax.grad(net.loss)(net.params), jnp.array(STEPS) * net.lr
    )
    return {
        "lowest": along.losses.min(),
        "highest": along.losses.max(),
        "width": along.losses.max() - along.losses.min(),
        "change": along.distances.max(),
        "beta": along.beta,
    }


def over_training(records: Records, key: str, norm: str) -> np.ndarray:
    """The mean over training of each seed; the initialization does not count."""
    return records.trained().by_seed(key, of=np.mean, kind="evaluation", norm=norm)


def verdict(records: Records) -> Iterator[Verdict]:
    """How much less the loss and the gradient range over with batch norm."""
    for claim, key in (
        ("the loss along the step ranges over less with batch norm (factor)", "width"),
        ("the gradient along the step changes less with batch norm (factor)", "change"),
        ("the gradient along the step is smoother with batch norm (factor of β)", "beta"),
    ):
        factor = over_training(records, key, "none") / over_training(records, key, "batch")
        how = {"at_least": 1, "size": SIZE, "geometric": True, "untuned": True, "source": SOURCE}
        yield decide(key, f"ReLU net: {claim}", factor, **how)


def figure(records: Records) -> Figure:
    """Along the step the loss as a band, and the gradient; the accuracy; over training."""
    picture, (left, change, middle, right) = draw.canvas(4, width=3.3)
    shown = records.trained()
    for norm, style in draw.styles(shown.values("norm")).items():
        here = shown.where(norm=norm)
        steps, low = draw.along(here, "step", "lowest")
        _, high = draw.along(here, "step", "highest")
        ends = np.median(low, axis=1), np.median(high, axis=1)
        left.fill_between(steps, *ends, color=style["color"], alpha=0.3, lw=0)
    left.set(xlabel="optimizer step", ylabel="loss along the step (nats)", title="median seed")
    draw.over_steps(change, shown, "change")
    draw.frame(change, ylabel="change of the gradient along the step", log=True)
    draw.over_steps(middle, shown, "beta")
    draw.frame(middle, ylabel="effective β", log=True)
    draw.over_steps(right, shown, draw.accuracy)
    return draw.finish(picture, key=middle)
