"""The options of `compare`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import normlab as nl
from normlab.errors import nearest

from ..cluster import require_address
from ..data import TEXTS
from ..rundir import Record, RunError, require
from ..training.again import parsed, taken
from ..training.config import (
    IMAGES,
    TEXT,
    Command,
    require_division,
    require_evaluations,
    require_kept,
    require_mesh,
)
from .sweep import sweep

COMMON = ("none", "batch", "layer", "rms", "group", "instance", "weight", "cosine")
"""The norms that are compared by default on images."""

ON_TEXT = ("none", "layer", "rms", "dyt")
"""Those on text: norms of one token."""


@dataclasses.dataclass(frozen=True)
class Compare(Command):
    """Train one network under several norms, data-parallel, on real data.

    Ends with a table, a figure of the learning curves, a figure of the four parts (μ, σ, g, b)
    of every norm in every layer, and with several rates one of what each came to. Everything
    measured is kept in the run directory. The same command with the same --run-dir goes on where it
    was stopped.
    """

    norms: tuple[str, ...] = ()
    """Which norms (`normlab list`, or module:factory for one of your own); by default
    the eight common ones, without instance norm where the model has no positions; on text four."""

    schemes: tuple[str, ...] = ()
    """Schemes in the place of --scheme: every norm is trained under each of them."""

    rates: tuple[float, ...] = ()
    """Learning rates in the place of --lr, trained side by side: each norm is shown at its best,
    with its largest stable rate. The best is chosen on the validation set of a text, and of images
    on the test set, of all norms alike; --tune holds images out for it."""

    lr_of: tuple[str, ...] = ()
    """A rate of its own for some norms, in the place of --lr, as in batch=0.3 none=0.03."""

    tune: bool = False
    """Choose each norm's rate first: on a tenth of the training images, held out (of a text on its
    validation set), with two seeds that nothing else has. The grid is that of --rates, by default
    five rates around --lr; where the best is an end two more are tried. Then train at it."""

    sync: str = "all"
    """Over which devices batch norm measures: all, local, groups=2, ring=1, virtual=64, ghost=4;
    of a --mesh inner (its last axis) or together=axis0; joined by + with every=2,
    gradient=forward, second=always and the like."""

    devices: int = 8
    """Devices that share each batch. On a CPU that many are made."""

    mesh: tuple[int, ...] = ()
    """Sizes of the axes along which they lie, as in 4 2: axis0 and axis1, neighbours along the
    last; by default one axis of all. A step over several axes is a shard_map, over one a pmap."""

    seeds: int = 3
    """Seeds 0, 1, …, trained side by side."""

    evaluations: int = 10
    """How often to measure on the way; the last time is after the last step."""

    target: float | None = None
    """For the column "steps to": a test accuracy, by default 0.95; of text bits per byte, by
    default 2.5."""

    sweep: tuple[str, ...] = ()
    """Compare at every point of a grid, batch_size=8,32 lr=0.1,0.3: one directory with a part for
    each point, and one table at the end."""

    run_dir: Path | None = None
    """Where the results go; that of a run of the same options, which was stopped, lets it go on. By
    default runs/compare-DATASET-MODEL-TIME."""

    ray: str | None = None
    """A Ray cluster to train on, each norm in a worker of its own, as ray.init(address=...) takes
    it, or auto; without an address one is started on this machine."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        from ..training import syncs
        from ..training.trainer import axes_of

        if self.sweep:
            raise RunError(
                "--sweep is read at the terminal; in Python make a Compare at each point."
            )
        if self.rates and self.lr is None:
            object.__setattr__(self, "lr", self.rates[0])
        super().__post_init__()
        self.require_counts("devices", "seeds", "evaluations")
        for value in self.rates:
            require(0 < value < math.inf, "rates", value, "positive and finite")
        require(len(set(self.rates)) == len(self.rates), "rates", self.rates, "distinct")
        if self.rates and self.lr != self.rates[0]:
            if self.lr != (TEXT if self.dataset in TEXTS else IMAGES)["lr"]:
                raise RunError(f"--lr {self.lr:g}: it has no effect beside --rates. Leave it out.")
            object.__setattr__(self, "lr", self.rates[0])
        if self.lr_of and (self.rates or self.tune):
            beside = "--rates" if self.rates else "--tune"
            raise RunError(f"--lr-of: it has no effect beside {beside}. Leave one of them out.")
        positive = self.target is None or 0 < self.target < math.inf
        require(positive, "target", self.target, "positive and finite")
        require_evaluations(self.evaluations, self.steps)
        for name in ("norms", "schemes"):
            given = getattr(self, name)
            require(len(set(given)) == len(given), name, given, "distinct")
        alone = self.scheme is None or not self.schemes
        require(alone, "scheme", self.scheme, "left out beside --schemes")
        require_division(self.batch_size, self.devices, self.microbatches)
        require_mesh(self.mesh, self.devices)
        syncs.parse(self.sync, axes_of(self.mesh), self.devices)
        require_address(self.ray)
        own = self.own_rates
        for name in own:
            if name not in self.chosen():
                raise RunError(
                    f"--lr-of {name}={own[name]:g}: {name} is not compared: "
                    f"{nearest(name, self.chosen())}."
                )

    @classmethod
    def parse(cls, read: Callable[..., Any], arguments: Sequence[str]) -> Any:
        """The options that `read` finds in the arguments; those of --config, or of a --sweep."""
        rest, words = taken(arguments, "--sweep")
        if words is None:
            found, form = parsed(read, cls, rest)
            require_kept(found)
        else:
            found, form = sweep(cls, read, rest, words, FREE)
            require_kept(*(point.config for point in found.points))
        return found, form

    def as_json(self) -> dict[str, Any]:
        """The options that the numbers depend on."""
        return {k: v for k, v in super().as_json().items() if k not in FREE}

    def require_effects(self) -> None:
        """Raises RunError for an option that changes nothing, of these norms together."""
        self.require_told(self.chosen(), self.sync, devices=self.devices)

    @property
    def own_rates(self) -> dict[str, float]:
        """The rates of --lr-of by norm."""
        found: dict[str, float] = {}
        for word in self.lr_of:
            name, _, text = word.rpartition("=")  # a norm's name may have a colon, and no "="
            try:
                lr = float(text)
            except ValueError:
                lr = math.nan
            fits = bool(name) and 0 < lr < math.inf
            require(fits, "lr_of", word, "NORM=RATE, with a rate that is positive and finite")
            require(name not in found, "lr_of", " ".join(self.lr_of), "one rate for each norm")
            found[name] = lr
        return found

    @property
    def tried(self) -> tuple[float, ...]:
        """The rates that are trained side by side, if there are several."""
        return () if self.tune else self.rates

    def alone(self, name: str) -> Compare:
        """The command of one norm, at its own rate."""
        lr = self.own_rates.get(name, self.lr)
        return dataclasses.replace(self, norms=(name,), lr=lr, lr_of=(), ray=None)

    def at(self, lr: float) -> Compare:
        """The command at the rate that was chosen."""
        return dataclasses.replace(self, lr=lr, rates=(), tune=False)

    def chosen(self) -> tuple[str, ...]:
        """The norms to compare: those asked for, or the default ones that fit the model."""
        from .. import models

        if self.norms:
            return self.norms
        if models.reads_text(self.model):
            return ON_TEXT
        flat = models.is_flat(self.model)
        return tuple(name for name in COMMON if name != "instance" or not flat)

    @property
    def lanes(self) -> list[Record]:
        """What is trained side by side: the rate and the seed of each."""
        rates = self.tried or (self.lr,)
        return [{"lr": lr, "seed": seed} for lr in rates for seed in range(self.seeds)]

    @property
    def by_scheme(self) -> dict[str, Compare]:
        """The command under each of the schemes, by what is said of a norm there."""
        if not self.schemes:
            return {"": self}
        one = dataclasses.replace(self, schemes=())
        return {f", {name}": dataclasses.replace(one, scheme=name) for name in self.schemes}

    @property
    def axis_name(self) -> nl.devices.AxisName | None:
        """The devices over which a norm measures."""
        import normlab as nl

        from ..training import syncs
        from ..training.trainer import axes_of

        sync = syncs.parse(self.sync, axes_of(self.mesh), self.devices)
        return sync if self.devices > 1 or isinstance(sync, nl.Sync) else None


FREE = ("data_dir", "run_dir", "ray", "sweep", "log")
"""Options of which no number depends."""
