"""What `bench ops` times, and the side of it that runs in a process for a family of libraries.

The families do not share threads or an allocator. The module itself imports neither jax nor torch:
a process loads only its own.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from .turns import INSTALL, Repeated, first_line

SHAPES = {
    "conv": ((64, 28, 28, 64), (32, 56, 56, 32)),
    "dense": ((4096, 256), (128, 1024)),
    "tokens": ((16, 128, 768),),
}
KINDS_OF = {
    "batch": ("conv", "dense", "tokens"),
    "layer": ("conv", "dense", "tokens"),
    "rms": ("dense", "tokens"),
    "group": ("conv",),
    "instance": ("conv",),
}
BYTES = {"float32": 4, "bfloat16": 2}
PEERS = {
    "flax.linen": ("flax", "flax"),
    "flax.nnx": ("flax", "flax"),
    "haiku": ("haiku", "dm-haiku"),
    "equinox": ("equinox", "equinox"),
    "torch": ("torch", "torch"),
}
"""For each peer the module to look for and the package it comes in."""

OTHERS = {
    "jax.numpy": ("jax", "jax"),
    "tokamax": ("tokamax", "tokamax"),
    "torch.compile": ("torch", "torch"),
    "liger": ("liger_kernel", "liger-kernel"),
    "quack": ("quack", "quack-kernels"),
}
"""And those that `bench ops` measures where they are named."""

TORCH = ("torch", "torch.compile", "liger", "quack")
"""The family of torch; all others are JAX's."""

COMMANDS = {
    **dict.fromkeys((*PEERS, "torch.compile"), INSTALL),
    "tokamax": f"{INSTALL.replace('peers', 'tokamax')}, with Python 3.12 or later",
    "liger": "pip install liger-kernel",
    "quack": "pip install quack-kernels",
}
"""The commands that install them."""


def installed(peer: str) -> bool:
    """Whether the module of a peer is there."""
    return importlib.util.find_spec({**PEERS, **OTHERS}[peer][0]) is not None


EPS, DECAY, GROUPS = 1e-5, 0.9, 8
FORWARD, BOTH = DIRECTIONS = ("forward", "forward+backward")
COPY = "copy"
"""The contestant that only reads x and writes it."""

COPIES = {FORWARD: 1.0, BOTH: 2.5}
"""The bytes that must move, in copies of x."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape and type."""

    op: str
    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def label(self) -> str:
        """Such as `batch 64×28×28×64 f32`."""
        dtype = {"float32": "f32", "bfloat16": "bf16"}[self.dtype]
        return f"{self.op} {'×'.join(map(str, self.shape))} {dtype}"

    def inputs(self) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
        """Returns `(x, dy, parameters)` in float32; RMS norm has a gain only."""
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal(self.shape, np.float32) for _ in range(2))
        g, b = (0.1 * rng.standard_normal(self.shape[-1], np.float32) for _ in range(2))
        return x, dy, (1 + g,) if self.op == "rms" else (1 + g, b)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A library's way to do the op of a case.

    Attributes:
      peer: The library.
      name: The library and, where it has several ways, which.
      f: `(x, *parameters) -> (y, aux)`, all arrays of the family; aux are new running statistics.
      safe: Whether a large mean costs no digits: the variance is not E[x²] − E[x]².
      default: Whether the library does it this way unless told otherwise.
      note: What a reader should know of how it was asked.
    """

    peer: str
    name: str
    f: Callable[..., tuple[Any, Any]]
    safe: bool
    default: bool = True
    note: str = ""


class Built(NamedTuple):
    """A contestant ready to run: a call per direction, and the peak of temporary memory."""

    calls: Mapping[str, Callable[[], Any]]
    temp_bytes: int | None


class Family(Protocol):
    """What a family of libraries must know."""

    def environment(self) -> dict[str, Any]:
        """Device, threads, versions."""
        ...

    def contestants(self, peer: str, case: Case) -> list[Contestant]:
        """The ways in which a library does the op."""
        ...

    def load(self, case: Case) -> None:
        """Puts the inputs of a case on the device."""
        ...

    def copy(self) -> Callable[[], Any]:
        """A call that reads x once and writes it once."""
        ...

    def build(self, contestant: Contestant) -> Built:
        """Compiles a contestant for the inputs that are loaded."""
        ...

    def wait(self, out: Any) -> None:
        """Returns when `out` is there."""
        ...


class Server:
    """Holds the contestants of one case."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._turns: dict[tuple[str, str], Repeated] = {}

    def environment(self) -> dict[str, Any]:
        """What the family says of itself."""
        return self.family.environment()

    def prepare(self, case: Case, peers: Sequence[str], turn_ms: float) -> list[dict[str, Any]]:
        """Compiles and calibrates the contestants of a case; returns what is known of each.

        One that cannot run has a `reason`, and no turns.
        """
        family = self.family
        self._turns.clear()
        gc.collect()
        family.load(case)
        self._turns[COPY, FORWARD] = Repeated(family.copy(), turn_ms, family.wait)
        contestants, rows = [], []
        for peer in peers:
            try:
                contestants += family.contestants(peer, case)
            except Exception as error:  # whatever a library raises: it is left out, and said
                said = str(error) if type(error) is ValueError else first_line(error)
                rows.append({"peer": peer, "name": peer, "reason": said})
        with ThreadPoolExecutor(2) as pool:
            built = [pool.submit(family.build, contestant) for contestant in contestants]
        for contestant, future in zip(contestants, built, strict=True):
            row: dict[str, Any] = dataclasses.asdict(contestant)
            del row["f"]
            row |= {"reason": None, "temp_bytes": None, "repetitions": {}}
            rows.append(row)
            try:
                calls, row["temp_bytes"] = future.result()
                for direction, call in calls.items():
                    turn = Repeated(call, turn_ms, family.wait)
                    self._turns[contestant.name, direction] = turn
                    row["repetitions"][direction] = turn.repetitions
            except Exception as error:
                row["reason"] = first_line(error)
        return rows

    def turn(self, name: str, direction: str) -> float:
        """Returns milliseconds per call."""
        return self._turns[name, direction]()


def serve(family: str, platform: str = "") -> Server:
    """What a process makes for a family, `"jax"` or `"torch"`.

    Args:
      family: Which.
      platform: Where it is to compute: `"cpu"`, `"cuda"`; `""` leaves it the choice.
    """
    warnings.simplefilter("ignore")
    gc.disable()  # a collection in the middle of a turn would be timed
    return Server(importlib.import_module(f".peers_{family}", __package__).family(platform))
