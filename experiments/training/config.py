"""What commands and questions that train have in common: options, what is refused, the norms."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any, Literal

import normlab as nl

from .. import models
from ..data import Dataset
from ..rundir import RunError

Optimizer = Literal["momentum", "sgd", "rmsprop", "adam"]
"""The names of `trainer.OPTIMIZERS`."""

OWN: dict[str, dict[str, Any]] = {
    "layer": {"axes": "all"},
    "rms": {"axes": "all"},
    "weight": {"data_init": True, "axis_name": None},
}
"""What a norm is told here whatever the options are."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, on what, for how long.

    Attributes:
      dataset: mnist, fashion_mnist, cifar10 or digits (tiny, needs no download).
      model: conv (three 3×3 convolutions, ReLU), mlp (three layers of 100 sigmoids), or another of
        `python -m experiments list`.
      batch_size: Examples per optimizer step, over all devices.
      steps: Optimizer steps.
      optimizer: Plain SGD, SGD with momentum 0.9, RMSprop, or Adam.
      lr: Learning rate.
      data_dir: Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/.
    """

    dataset: str = "mnist"
    model: str = "conv"
    batch_size: int = 128
    steps: int = 600
    optimizer: str = "momentum"
    lr: float = 0.05
    data_dir: Path | None = None

    def require_counts(self, *names: str, expected: str = "at least 1") -> None:
        """Raises RunError for an option below 1."""
        for name in names:
            require(getattr(self, name) >= 1, name, getattr(self, name), expected)

    def as_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


@dataclasses.dataclass(frozen=True)
class Command(Training):
    """What `compare` and `train` have in common beside.

    Attributes:
      microbatches: Parts, one after the other, into which a device cuts its share of a batch.
      groups: Groups of the norms that have some; must divide the channels of every layer.
      decay: Weight of the old value in batch norm's running statistics; by default 0.9.
      eps: ε, added to the variance under the root.
    """

    optimizer: Optimizer = "momentum"
    microbatches: int = 1
    groups: int = 4
    decay: float | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        self.require_counts("batch_size", "steps", "microbatches", "groups")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "positive and finite")
        require(self.decay is None or 0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        try:
            models.require(self.model)
        except ValueError as error:  # an unknown name
            raise RunError(str(error)) from None

    def norm_of(
        self, name: str, axis_name: nl.devices.AxisName | None = None, **more: Any
    ) -> nl.Norm:
        """The norm called `name`, with those of the options that it takes.

        Args:
          name: What `nl.get` takes.
          axis_name: The devices over which it measures.
          **more: Further options, of which it gets those that it takes.

        Raises:
          RunError: For an unknown name, or options that the norm does not take.
        """
        try:
            given = {"eps": self.eps, "groups": self.groups, "axis_name": axis_name, **more}
            if self.decay is not None:
                given |= {"decay": self.decay, "batch": {"decay": self.decay}}
            options = {k: v for k, v in given.items() if takes(name, k)}
            return nl.get(name, **options, **OWN.get(name, {}))
        except ValueError as error:
            raise RunError(str(error)) from None


def takes(name: str, option: str) -> bool:
    """Whether the norm called `name` is told an option of the run."""
    known = inspect.signature(nl.row(name).factory).parameters
    return option in known and option not in OWN.get(name, {})


def require(holds: bool, option: str, given: Any, expected: str) -> None:
    """Raises RunError about an option unless something holds."""
    if not holds:
        raise RunError(f"--{option.replace('_', '-')}: got {given}; it must be {expected}.")


def require_evaluations(evaluations: int, steps: int) -> None:
    """Raises RunError if there are to be more evaluations than steps."""
    if evaluations > steps:
        raise RunError(
            f"--evaluations: got {evaluations}, but --steps is {steps}, and there is at most one "
            "evaluation after each step. Give fewer evaluations or more steps."
        )


def require_fit(examples: int, data: Dataset, given: str = "", change: str = "") -> None:
    """Raises RunError if a batch of so many examples is larger than the training set."""
    if examples > len(data.train_images):
        raise RunError(
            f"{given or f'--batch-size: got {examples}'}, but {data.name} has "
            f"{len(data.train_images)} training examples. {change or 'Give at most that many.'}"
        )


def require_division(batch_size: int, devices: int, microbatches: int = 1) -> None:
    """Raises RunError if a batch does not divide over the devices and their microbatches."""
    parts = devices * microbatches
    if batch_size % parts:
        near = batch_size // parts * parts
        fit = " or ".join(str(b) for b in (near, near + parts) if b)
        cut = f" times --microbatches {microbatches}" if microbatches > 1 else ""
        raise RunError(
            f"--batch-size {batch_size} does not divide over {devices} devices{cut}. Use a batch "
            f"size of {fit}, or another number of devices."
        )
