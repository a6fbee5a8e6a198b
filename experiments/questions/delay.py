"""Can the statistics of other devices be some steps old?

Claim: Not as they are: statistics of earlier steps, whose weights were others, cost accuracy, even
those of the step before, and the more the older they are. Where the gradient takes a device's own
moments for the merged ones, statistics of the step before still do better than none of the others'.

Source: Yao et al. 2021, cross-iteration batch norm, https://arxiv.org/abs/2002.05712 (its abstract:
activations of different iterations are not comparable, since the weights change; compensated for
that, statistics of earlier iterations are better than without, and than batch norm). It gives no
number there, says nothing of statistics as they are against batch norm, and adds a device's own
earlier minibatches, where here it is other devices that are late. So what old statistics cost
against fresh ones is its claim, and all else is ours.

Protocol: Fashion-MNIST, an MLP (three layers of 100 sigmoids), 400 steps of SGD with momentum 0.9
at rate 0.05 on 8 devices with 4 examples each. Each device merges its
own moments with those that the others had when statistics were last exchanged, every 1, 4, …
steps. Beside it fresh statistics of all devices, and each device alone. What is received carries no
gradient, so that the gradient sees the device's own moments alone: with their share of the merged
ones, or ("forward") as if they were the merged ones. "fresh, forward" tells apart what is due to
age and what to that; so does in the full profile "fresh, constant" (no gradient through
statistics). All have the one rate.

Command: normlab run delay
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Records, Source, Verdict, decide, draw
from ..engine.devices import Config, learn

LOSS = 0.5
"""Points of test accuracy that old statistics cost: ours, and small."""

SOURCE = Source("yao2021", read="abstract")


@dataclasses.dataclass(frozen=True)
class Delay(Config):
    """The config.

    Attributes:
      every: After how many steps statistics are exchanged.
      constant: Whether to train with fresh statistics that carry no gradient, too.
    """

    every: tuple[int, ...] = (1, 4)
    constant: bool = False
    steps: int = 400
    evaluations: int = 2


QUICK = Delay()
SECONDS = 250
FULL = Delay(
    dataset="cifar10",
    model="conv",
    every=(1, 2, 4, 8, 16, 32),
    constant=True,
    steps=20_000,
    evaluations=20,
)


def run(config: Delay) -> Iterator[Condition]:
    """Trains with fresh statistics, with each delay, and with none of the others'."""
    syncs = {"fresh": nl.Sync(config.axes), "local": nl.Sync(config.axes, groups=1)}
    syncs["fresh, forward"] = nl.Sync(config.axes, gradient="forward")
    if config.constant:
        syncs["fresh, constant"] = nl.Sync(config.axes, gradient="none")
    for every in config.every:
        syncs[f"every {every}"] = nl.Sync(config.axes, every=every)
        syncs[f"every {every}, forward"] = nl.Sync(config.axes, every=every, gradient="forward")
    for name, sync in syncs.items():
        yield Condition({"condition": name}, learn(config, sync))


def verdict(records: Records) -> Iterator[Verdict]:
    """What the delays cost against fresh statistics, and against none of the others'."""
    points = functools.partial(decide, unit="points", untuned=True)
    fresh, local, forward = (records.accuracy(n) for n in ("fresh", "local", "fresh, forward"))
    delays = delays_of(records)
    for every in delays:
        old = f"statistics exchanged every {'step' if every == 1 else f'{every} steps'}"
        plain = records.accuracy(f"every {every}")
        claim = f"{old} cost accuracy against fresh ones"
        how = {"at_least": 0, "size": LOSS, "source": SOURCE}
        yield points(f"every-{every}.fresh", claim, fresh - plain, **how)
        claim = f"{old} are no better than each device's own"
        yield points(f"every-{every}.local", claim, plain - local, at_most=0)
        claim = f"forward: {old} cost accuracy against fresh ones with this gradient"
        own = records.accuracy(f"every {every}, forward")
        yield points(f"forward.every-{every}.fresh", claim, forward - own, at_least=0, size=LOSS)
    first = min(delays)
    own = records.accuracy(f"every {first}, forward")
    claim = "forward: statistics of the step before are better than each device's own"
    yield points(f"forward.every-{first}.local", claim, own - local, at_least=0, size=LOSS)


def delays_of(records: Records) -> list[int]:
    """The delays that were measured."""
    names = [name for name in records.values("condition") if name.startswith("every")]
    return sorted({int(name.split()[1].strip(",")) for name in names})


def figure(records: Records) -> Figure:
    """The test error at the end against the delay, beside that of each reference."""
    errors = {name: 100 - records.accuracy(name)[:, 0] for name in records.values("condition")}
    references = [name for name in errors if not name.startswith("every")]
    delays = delays_of(records)
    gradients = {"": "own moments by their share", ", forward": "own moments whole"}
    styles = draw.styles([*gradients, *references])
    picture, (axes,) = draw.canvas(width=8, height=4.2)
    for gradient, label in gradients.items():
        values = [errors[f"every {delay}{gradient}"] for delay in delays]
        draw.spread(axes, delays, values, label=f"old, {label}", **styles[gradient])
    for at, name in enumerate(references, 1):
        place = 2 * max(delays) * 1.25**at
        draw.spread(axes, [place], [errors[name]], label=name, **{**styles[name], "ls": ""})
        axes.axhline(float(np.mean(errors[name])), color=styles[name]["color"], lw=0.8, ls=":")
    draw.frame(axes, xlabel="steps between exchanges", doubling=True, ticks=delays)
    axes.set_ylabel("test error (%)")
    picture.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    last = max(records.values("step"))
    picture.suptitle(f"Delayed statistics: {last} steps; mean and 95% interval", fontsize=10)
    return picture
