"""The programs of `bench bytes`: a norm alone, in a transformer block, in a block of a ResNet.

    transformer   x + attention(norm(x)), then x + down(gelu(up(norm(x))))
    bottleneck    relu(x + norm(w3·relu(norm(w2 * relu(norm(w1·x))))))

The module imports no jax: it says what there is, and `blocks_jax` does it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from .worker import BOTH, BYTES, FORWARD, Case

HERE = "here"
"""The target that is JAX's default device; programs run there as well."""

OURS = ("normlab", "normlab, xla", "normlab, pallas", "normlab, pallas, fused")
"""normlab's: as it chooses by itself, and by each implementation; alone, nothing is to be fused."""

WITHOUT = "no norm"
"""The contestant that leaves its input as it is."""


class Block(NamedTuple):
    """What stands around a norm.

    Attributes:
      ops: The norms that stand in it.
      widths: Of the channels of x, those of each norm.
      kernels: And the shapes of the kernels by name.
    """

    ops: tuple[str, ...]
    widths: Callable[[int], tuple[int, ...]] = lambda c: (c,)
    kernels: Callable[[int], dict[str, tuple[int, ...]]] = lambda _: {}


BLOCKS = {
    "alone": Block(("layer", "rms", "batch", "group", "instance")),
    "transformer": Block(
        ("layer", "rms"),
        lambda c: (c, c),
        lambda c: (
            {**dict.fromkeys(("q", "k", "v", "out"), (c, c)), "up": (c, 4 * c)}
            | {"down": (4 * c, c)}
        ),
    ),
    "bottleneck": Block(
        ("batch", "group"),
        lambda c: (c // 4, c // 4, c),
        lambda c: (
            {"conv0": (1, 1, c, c // 4), "conv1": (3, 3, c // 4, c // 4)}
            | {"conv2": (1, 1, c // 4, c)}
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A norm where it stands.

    Attributes:
      block: A name of `BLOCKS`.
      op: The norm.
      dtype: That of x and of the kernels; the parameters of norms are float32.
      shape: Of x.
    """

    block: str
    op: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        """Such as `transformer, layer 8×1024×4096 bf16`."""
        case = Case(self.op, "", self.shape, self.dtype).label
        return case if self.block == "alone" else f"{self.block}, {case}"

    @property
    def nbytes(self) -> int:
        """Those of x."""
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def cases(self) -> tuple[Case, ...]:
        """Each norm in it."""
        kind = {2: "dense", 3: "tokens", 4: "conv"}[len(self.shape)]
        widths = BLOCKS[self.block].widths(self.shape[-1])
        return tuple(Case(self.op, kind, (*self.shape[:-1], w), self.dtype) for w in widths)

    @property
    def normed(self) -> int:
        """The bytes of all that is normalized."""
        return sum(math.prod(case.shape) * BYTES[self.dtype] for case in self.cases)


FLOOR = {FORWARD: (1, 1), BOTH: (3, 2)}
"""Passes, read and written, of a norm whose sample stays in fast memory, a kernel each way."""

FLOOR_OF_BATCH = {FORWARD: (2, 1), BOTH: (5, 2)}
"""And of one whose sample does not; alone, its backward sums may be taken while y is written."""


def floor(block: str, op: str, direction: str) -> tuple[int, int] | None:
    """The passes that a norm alone cannot do without; `None` of a block."""
    if block != "alone":
        return None
    return (FLOOR_OF_BATCH if op == "batch" else FLOOR)[direction]
