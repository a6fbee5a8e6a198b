"""Where records go beside the run directory: TensorBoard and Weights & Biases.

Each net, which is what stands before the `step` of a record, is a run of its own there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from .rundir import Record, RunError

Name = Literal["tensorboard", "wandb"]
"""What `--log` takes."""

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""What each is written with."""


class Writer(Protocol):
    """Receives records as they are measured."""

    def write(self, records: Sequence[Record]) -> None:
        """Keeps the numbers of records that have a `step`."""
        ...

    def close(self) -> None:
        """Ends: everything is kept."""
        ...


def require(names: Sequence[str]) -> None:
    """Raises RunError for a library that is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise RunError(
                f"--log {name}: {PACKAGES[name]} is not installed. "
                f"pip install 'normlab[{name}]', or leave it out."
            )


def writers(names: Sequence[str], path: Path, config: Mapping[str, Any]) -> list[Writer]:
    """A writer for each name.

    Args:
      names: `tensorboard`, whose files lie in the run directory, or `wandb`, whose project is
        $WANDB_PROJECT or normlab.
      path: The run directory.
      config: What was asked.

    Raises:
      RunError: For a library that is not installed.
    """
    require(names)
    made = {"tensorboard": TensorBoard, "wandb": Wandb}
    return [made[name](path, config) for name in names]


def net(record: Record) -> dict[str, Any]:
    """What sets a net apart: what stands before the `step`, but the `kind`.

    >>> net({"kind": "evaluation", "norm": "batch", "lr": 0.1, "seed": 0, "step": 60, "loss": 1.0})
    {'norm': 'batch', 'lr': 0.1, 'seed': 0}
    """
    labels = itertools.takewhile(lambda item: item[0] != "step", record.items())
    return {name: value for name, value in labels if name != "kind" and value is not None}


def title(labels: Mapping[str, Any]) -> str:
    """A net in one word, for a folder.

    >>> title({"norm": "batch", "lr": 0.1, "seed": 0})
    'batch-lr0.1-seed0'
    """
    words = (str(v) if isinstance(v, str) else f"{k}{v}" for k, v in labels.items())
    return re.sub(r"[^\w.+=-]+", "-", "-".join(words)) or "run"


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by the name of a chart; words behind the `step` are in its name.

    >>> scalars({"kind": "part", "seed": 0, "step": 9, "layer": "Conv_0", "part": "mu", "p50": 0.5})
    {'Conv_0/mu/p50': 0.5}
    """
    rest = itertools.dropwhile(lambda item: item[0] != "step", record.items())
    found = dict(itertools.islice(rest, 1, None))
    where = [v for k, v in found.items() if isinstance(v, str) and not k.endswith("_each")]
    return {
        "/".join([*where, key]): float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoard:
    """Event files in `tensorboard` of the run directory: `tensorboard --logdir runs`.

    Args:
      path: The run directory.
      config: What was asked.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path / "tensorboard", config
        self._open: dict[str, Any] = {}

    def write(self, records: Sequence[Record]) -> None:
        """Keeps the numbers of records that have a `step`."""
        from tensorboardX import SummaryWriter

        for record in (r for r in records if "step" in r):
            name, step = title(net(record)), record["step"]
            if name not in self._open:  # a run that goes on hides what it measures again
                folder = str(self.path / name)
                self._open[name] = SummaryWriter(folder, purge_step=step, write_to_disk=True)
            for tag, value in scalars(record).items():
                self._open[name].add_scalar(tag, value, step)
        for writer in self._open.values():
            writer.flush()

    def close(self) -> None:
        """Ends: everything is kept."""
        for writer in self._open.values():
            writer.close()


class Wandb:
    """Runs of Weights & Biases, in a group for the run directory.

    Args:
      path: The run directory.
      config: What was asked.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, config
        self._open: dict[str, Any] = {}

    def write(self, records: Sequence[Record]) -> None:
        """Keeps the numbers of records that have a `step`."""
        for record in (r for r in records if "step" in r):
            labels = net(record)
            name = title(labels)
            if name not in self._open:
                self._open[name] = self._start(name, labels)
            self._open[name].log(scalars(record), step=record["step"])

    def _start(self, name: str, labels: Mapping[str, Any]) -> Any:
        import wandb  # pyright: ignore[reportMissingImports]

        where = f"{self.path.resolve()}/{name}"
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "normlab"),
            dir=str(self.path),
            group=self.path.name,
            name=f"{self.path.name}/{name}",
            id=hashlib.sha256(where.encode()).hexdigest()[:16],  # a run that goes on is the same
            resume="allow",
            config={**self.config, **labels},
            reinit="create_new",  # nets are trained side by side
        )

    def close(self) -> None:
        """Ends: everything is kept."""
        for run in self._open.values():
            run.finish()
