"""Does it depend on the amount of data whether DyT is better than layer norm?

Claim: After many epochs over little data a language model with DyT has a lower test loss than one
with layer norm; where the data are plenty, it has a higher one. What decides little data is that
DyT overfits less: at the best evaluation on the way it is no better.

Source: Verma 2026, a preprint, https://arxiv.org/abs/2604.23434, abstract and results: at 64
million weights the final validation loss is 27.3% lower on 1 million tokens (5,000 steps, 164
epochs) and 18.8% higher on 118 million (1.4 epochs). The best evaluation on the way is our
question.

Protocol: A pre-norm language model of 2 blocks of width 32 (26,000 weights) on bytes of 18 books,
windows of 32, batches of 8, 600 steps of AdamW at one rate, on 2,048 bytes (75 epochs), drawn with
the seed, or on all of it (part of one epoch). DyT starts at α = 0.5. Measured is the test loss in
bits per byte, of 256 windows, in the end and at its lowest.

Found: On little data its lowest loss on the way is lower as well, by 4%.

Command: normlab run dyt_data
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..data import Dataset
from ..engine import Condition, Config, Language, Records, Source, Verdict, decide, draw, learn
from ..training.trainer import minibatches

BETTER, WORSE = 0.727, 1.188
"""The loss with DyT over that with layer norm on little and on much data: the paper's numbers."""


@dataclasses.dataclass(frozen=True)
class DytData(Language):
    """The config.

    Attributes:
      norms: Which norms.
      little: Windows of the small training set.
    """

    norms: tuple[str, ...] = ("layer", "dyt")
    little: int = 64
    steps: int = 600
    evaluations: int = 12
    schedule: str = "constant"


QUICK = DytData()
SECONDS = 110
FULL = DytData(
    steps=20_000,
    width=128,
    depth=4,
    heads=4,
    context=128,
    batch_size=32,
    little=512,
    lr=1e-3,
)


def run(config: DytData) -> Iterator[Condition]:
    """Each norm on little and on much data."""
    for norm in config.norms:
        for amount in ("little", "much"):
            options = {"prepare": config.prepare, **config.sizes}
            options |= {"draw": drawn} if amount == "little" else {}
            yield Condition({"norm": norm, "data": amount}, learn(config, nl.get(norm), **options))


def drawn(seed: int, data: Dataset, config: Config) -> np.ndarray:
    """The minibatches of a few windows, which the seed draws."""
    assert isinstance(config, DytData)
    few = np.random.default_rng(seed).choice(len(data.train_inputs), config.little, replace=False)
    return few[minibatches(seed, config.little, config.batch_size, config.steps)]


def verdict(records: Records) -> Iterator[Verdict]:
    """The ratio of the losses in the end, and of the lowest on the way."""

    def ratio(data: str) -> np.ndarray:
        bits = [records.bits_per_byte(norm=norm, data=data) for norm in ("dyt", "layer")]
        return bits[0] / bits[1]

    def least(norm: str) -> np.ndarray:
        return records.by_seed("bits_per_byte", of=min, norm=norm, data="little", kind="evaluation")

    how = {"geometric": True, "untuned": True, "unit": "times"}
    source = Source("verma2026", "abstract", "−27.3%", read="abstract")
    claim = "on little data the final loss is lower with DyT than with layer norm (ratio)"
    yield decide("little", claim, ratio("little"), at_most=1, size=BETTER, source=source, **how)
    source = Source("verma2026", "abstract", "+18.8%", read="abstract")
    claim = "on much data the final loss is higher with DyT than with layer norm (ratio)"
    yield decide("much", claim, ratio("much"), at_least=1, size=WORSE, source=source, **how)
    claim = "on little data the lowest loss on the way is no lower with DyT (ratio)"
    yield decide("little.lowest", claim, least("dyt") / least("layer"), at_least=1, **how)


def figure(records: Records) -> Figure:
    """The test loss on the way, by the amount of data."""
    picture, panels = draw.panels(records.where(kind="evaluation"), "data")
    for axes, data, here in panels:
        draw.over_steps(axes, here, "bits_per_byte")
        draw.frame(axes, title=f"{data} data", ylabel="test bits per byte")
    return draw.finish(picture)
