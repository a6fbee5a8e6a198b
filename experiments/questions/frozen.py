"""Do frozen statistics mend a net that was trained on small batches?

Claim: Where few examples are normalized together, training and inference see different nets. With
frozen statistics in the last part of training both see the same, and inference is more accurate.

Source: Wu & Johnson 2021, section 4, https://arxiv.org/abs/2105.07576, of ResNet-50 on ImageNet,
for the last 20 of 100 epochs, with small normalization batches. We know it from summaries, without
its numbers. That nothing is won or lost over many examples is ours, and so are data, net and sizes.

Protocol: MNIST, three layers of 100 ReLUs, 1,000 steps of SGD with 128 examples each, of which few
are normalized together; the rate falls linearly from 0.1 to 0, for all. After four fifths of the
steps each net goes on twice, over the same minibatches: as before, and with the statistics that
inference reads, frozen. These are a moving average that remembers ten steps.

Command: normlab run frozen
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Config,
    Nets,
    Record,
    Records,
    Schedule,
    Source,
    Verdict,
    dataset,
    decide,
    draw,
    exact,
    lanes,
    shuffled,
)
from ..training.driver import Progress, drive
from ..training.trainer import turns

GAIN = 0.3
"""Points of test accuracy by which frozen statistics are better over few examples, if they are as
many as we count in figure 1. Ours, set before the first run."""

EQUAL = 0.2
"""Points by which they may differ from a batch's over the most. Ours, as above."""

SOURCE = Source("wu2021", "section 4", "", "second-hand")


@dataclasses.dataclass(frozen=True)
class Frozen(Config):
    """The config.

    Attributes:
      together: How many examples are normalized together.
      frozen: The share of the steps, at the end, for which statistics are frozen.
      decay: Weight of the old value in the running statistics.
    """

    together: tuple[int, ...] = (2, 4, 16)
    frozen: float = 0.2
    decay: float = 0.9
    batch_size: int = 128
    schedule: Schedule = "linear"
    steps: int = 1000
    evaluations: int = 10


QUICK = Frozen()
SECONDS = 100
FULL = Frozen(together=(2, 4, 8, 16, 32), steps=20_000, evaluations=20)


def run(config: Frozen) -> Iterator[Condition]:
    """Over each number of examples, with both ends."""
    for together in config.together:
        yield Condition({"together": together}, exact(measured, config, together))


def measured(config: Frozen, together: int) -> Iterator[Record]:
    """Trains until the statistics are frozen, then to both ends."""
    data = dataset(config.dataset, config.data_dir)
    rows = lanes(config)
    parts = nl.Sync(virtual_batch=together)
    norm = nl.get("batch", axis_name=parts, decay=config.decay, ddof=1)
    nets = Nets(config, norm, data, rows, activation=nn.relu)
    trainer, state = nets.trainer, nets.start(rows)
    drawn = [shuffled(row["seed"], data, config) for row in rows]
    cut = list(turns(drawn, config.evaluations))
    parting = round((1 - config.frozen) * config.evaluations)
    at = begin = Progress.start(state, len(rows))
    for at in drive(trainer, begin, cut[:parting]):
        yield from at.records([{"then": "both", **row} for row in rows])
    parted = jax.device_get(at.checkpoint())  # training reuses the buffers of a state
    for then in ("batch", "frozen"):
        begin = Progress.start(state, len(rows), parted)
        if then == "frozen":
            frozen = begin.state._replace(norm_state=nl.population.freeze(begin.state.norm_state))
            begin = dataclasses.replace(begin, state=frozen)
        ends = [{"then": then, **row} for row in rows]
        for at in drive(trainer, begin, cut[parting:]):
            yield from at.records(ends, each=at.step == config.steps)


def verdict(records: Records) -> Iterator[Verdict]:
    """What frozen statistics win, over each number of examples."""
    *few, many = sorted(records.values("together"))
    for together in (*few, many):
        here = records.where(together=together)
        gain = here.accuracy(then="frozen") - here.accuracy(then="batch")
        claim = f"over {together}: frozen for the last part, inference is "
        how = {"unit": "points", "untuned": True}
        if together == many:
            id, claim = f"over-{together}.equal", claim + "as accurate"
            yield decide(id, claim, gain, at_least=-EQUAL, at_most=EQUAL, **how)
        else:
            id, claim = f"over-{together}.gain", claim + "more accurate"
            yield decide(id, claim, gain, at_least=0, size=GAIN, source=SOURCE, **how)


def figure(records: Records) -> Figure:
    """The test error on the way to both ends, over each number of examples."""
    picture, panels = draw.panels(records, "together")
    for axes, together, here in panels:
        ends = {"of the batch": ("both", "batch"), "frozen": ("both", "frozen")}
        lines = [r | {"line": said} for said in ends for r in here if r["then"] in ends[said]]
        draw.over_steps(axes, lines, draw.test_error, by="line", marker=True)
        draw.dotted(axes, max(here.where(then="both").values("step")), vertical=True)
        draw.frame(axes, log=True, title=f"{together} normalized together")
    title = "Training with statistics …; dotted: where they part. Median, band of all seeds"
    return draw.finish(picture, title)
