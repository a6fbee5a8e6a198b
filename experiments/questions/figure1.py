"""Does batch norm learn faster, and does it keep the distribution of activations still?

Claim: With batch norm the network reaches a higher test accuracy, in fewer steps, and the
distribution of the inputs to a typical sigmoid of the last hidden layer is much more stable over
training, in its middle and in its width.

Source: Ioffe & Szegedy 2015, section 4.1 and figure 1, https://arxiv.org/abs/1502.03167, which
shows curves and gives no number: the sizes here are ours.

Protocol: The paper's network: binary MNIST, three hidden layers of 100 sigmoids, small Gaussian
initial weights, batches of 60, plain SGD. The paper takes 50,000 steps, and so does the full
profile. The quick one takes 15,000, in which from the smaller weights the net without a norm has
only begun to learn. The paper names neither the learning rate nor the size of the initial weights:
rate 0.1 with standard deviations 0.1 and 0.01 here; in the full profile rate 0.5 and standard
deviation 1 beside them, which are ours. Both nets have the one rate. The distribution is that of
each unit's input over 256 training images. Over training its median wanders, measured in units of
its mean width (from the 15th to the 85th percentile), and its width ranges, in the same units; the
median unit counts. A net that does not come to 95% counts with its last step.

Command: normlab run figure1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments

from ..data import Dataset
from ..engine import Condition, Config, Net, Records, Source, Verdict, decide, draw, lanes, learn

GAIN = 0.3
"""Points of test accuracy that batch norm is better at the end. Ours, as all three sizes."""

SPEED = 0.75
"""Its steps to the accuracy `TARGET`, as a share of those without a norm."""

TARGET = 0.95

STILLER = 2.0
"""The factor by which the median wanders less with batch norm, and the width ranges over less."""

SMALL = (0.1, 0.01)
"""Standard deviations of initial weights that are small, as the paper's."""

RATE = 0.1
"""The learning rate that the paper's start has here."""


@dataclasses.dataclass(frozen=True)
class Figure1(Config):
    """The config.

    Attributes:
      norms: What stands before each sigmoid.
      starts: Pairs of the initial kernels' standard deviation and the learning rate.
    """

    INSTEAD: ClassVar = {"lr": "--starts"}

    norms: tuple[str, ...] = ("none", "batch")
    starts: tuple[tuple[float, float], ...] = tuple((sd, RATE) for sd in SMALL)
    steps: int = 15_000
    evaluations: int = 60


QUICK = Figure1()
SECONDS = 540
FULL = Figure1(
    starts=((0.1, 0.1), (0.01, 0.1), (0.1, 0.5), (1.0, 0.1)), steps=50_000, evaluations=200
)


def run(config: Figure1) -> Iterator[Condition]:
    """Each norm, with all starts and seeds side by side."""
    rows = [lane for sd, lr in config.starts for lane in lanes(config, sd=[sd], lr=[lr])]
    for name in config.norms:
        measure = learn(config, nl.get(name), side_by_side=rows, prepare=binary, instrument=inputs)
        yield Condition({"norm": name}, measure, [{"percentiles": np.ones((3, 2))}])


def binary(data: Dataset) -> Dataset:
    """Pixels of 0 and 1."""
    train, test = ((v > 127).astype(np.float32) for v in (data.train_inputs, data.test_inputs))
    return data._replace(train_inputs=train, test_inputs=test)


def inputs(net: Net) -> dict[str, Array]:
    """The percentiles of what enters the sigmoids of the last hidden layer, `[3, units]`."""
    *_, flowing = net.activations(train=True).values()
    return {"percentiles": instruments.percentiles(flowing.z)}


def moved(records: Records, of: Callable[[Any], np.ndarray], **wanted: object) -> np.ndarray:
    """How far the median unit of each seed moves: `of` its percentiles at each evaluation."""
    here = records.trained().where(**wanted)
    return here.each_seed(lambda mine: np.median(of([r["percentiles"] for r in mine])))


def wandered(percentiles: Any) -> np.ndarray:
    """The range of each unit's median over its mean width; the percentiles are `[T, 3, units]`."""
    low, middle, high = np.array(percentiles).swapaxes(0, 1)
    return np.ptp(middle, axis=0) / (high - low).mean(axis=0)


def ranged(percentiles: Any) -> np.ndarray:
    """The range of each unit's width over its mean width."""
    low, _, high = np.array(percentiles).swapaxes(0, 1)
    return np.ptp(high - low, axis=0) / (high - low).mean(axis=0)


def verdict(records: Records) -> Iterator[Verdict]:
    """Accuracy, steps and stability, at the paper's small initial weights and beside them."""
    for sd, lr in records.values("sd", "lr"):
        where = f"sd {sd:g}, rate {lr:g}: "
        id = f"sd-{sd:g}" + (f".rate-{lr:g}" if lr != RATE else "")
        papers = sd in SMALL and lr == RATE
        one, two = (
            {
                "untuned": True,
                "source": Source("ioffe2015", f"figure 1({part})") if papers else None,
            }
            for part in ("a", "b, c")
        )
        none, batch = ({"norm": norm, "sd": sd, "lr": lr} for norm in ("none", "batch"))
        gain = records.accuracy(**batch) - records.accuracy(**none)
        claim = where + "batch norm ends more accurate"
        yield decide(f"{id}.gain", claim, gain, at_least=0, size=GAIN, unit="points", **one)
        share = records.share_of_steps(TARGET, batch, none)
        claim = where + f"it is at {TARGET:.0%} in fewer steps (as a share)"
        yield decide(f"{id}.steps", claim, share, at_most=1, size=SPEED, geometric=True, **one)
        for name, of, does in (
            ("median", wandered, "medians of the last layer's inputs wander less"),
            ("width", ranged, "widths of the last layer's inputs range over less"),
        ):
            factor = moved(records, of, **none) / moved(records, of, **batch)
            claim = f"{where}the {does} (factor)"
            how = {"at_least": 1, "size": STILLER, "geometric": True, **two}
            yield decide(f"{id}.{name}", claim, factor, **how)


def figure(records: Records) -> Figure:
    """The paper's figure: accuracy, and the percentiles of a typical input without and with."""
    starts = records.values("sd", "lr")
    picture, grid = draw.canvas(3, len(starts), height=2.9)
    for (sd, lr), (first, *others) in zip(starts, np.atleast_2d(grid), strict=True):
        here = records.where(sd=sd, lr=lr)
        draw.over_steps(first, here.trained(), draw.accuracy)
        first.set_title(f"sd {sd:g}, rate {lr:g}")
        for axes, norm in zip(others, ("none", "batch"), strict=True):
            mine = here.where(norm=norm, seed=min(here.values("seed")))
            values = np.array([r["percentiles"] for r in mine])  # [T, 3, units]
            unit = np.argsort(wandered(values[1:]))[values.shape[-1] // 2]  # as the median unit
            look = {"color": draw.styles([norm])[norm]["color"], "label": norm}
            for at, line in enumerate((":", "-", ":")):
                axes.plot(mine.values("step"), values[:, at, unit], ls=line, **look)
            axes.set(title=f"{norm}, unit {unit}", xlabel="optimizer step")
            axes.set_ylabel("input to the sigmoid")
    for axes in picture.axes:
        axes.locator_params(axis="x", nbins=5)
    title = "Accuracy; 15th, 50th, 85th percentile of an input that wanders typically"
    return draw.finish(picture, title)
