"""The options of the benchmarks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..rundir import RunError, require_positive
from .turns import available_cores
from .worker import BYTES, KINDS_OF, PEERS, SHAPES, Case

EXAMPLES = 60_000
"""Of the data that a step is timed on: as many as MNIST has."""


@dataclasses.dataclass(frozen=True)
class BenchStep:
    """Time one batch norm training step beside the same step in an eager PyTorch loop."""

    batch_size: int = 60
    """Examples per step; 60 is the paper's."""

    steps: int = 300
    """Steps per turn."""

    rounds: int = 7
    """Turns of each; the medians are reported."""

    lr: float = 0.1
    """Learning rate of plain SGD."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        require_positive(self, "steps", "rounds")
        if not 1 <= self.batch_size <= EXAMPLES:
            raise RunError(f"--batch-size: got {self.batch_size}; choose 1 to {EXAMPLES}.")


@dataclasses.dataclass(frozen=True)
class BenchFigure1(BenchStep):
    """Time the runs of the BN paper's figure 1 beside an eager PyTorch loop."""

    seeds: int = 3
    """Seeds of each net."""

    whole: int = 50_000
    """Steps of the figure, to which the times are extrapolated."""

    sd: float = 0.1
    """Standard deviation of the initial kernels, which are Gaussian."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed, in the processes of all contestants."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        super().__post_init__()
        require_positive(self, "seeds", "whole")


@dataclasses.dataclass(frozen=True)
class BenchConv:
    """Time forms of a convolution on a CPU beside an eager PyTorch loop."""

    seeds: int = 3
    """Kernels, and batches, side by side under vmap."""

    batch_size: int = 64
    """Images per step and seed."""

    steps: int = 2
    """Steps per turn."""

    rounds: int = 5
    """Turns of each; the medians are reported."""

    cores: int = 1
    """Cores that the process is pinned to; 1 is what a worker of the questions has."""

    xla: bool = True
    """Whether XLA's own convolution takes part: it takes most of the time."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        require_positive(self, "seeds", "batch_size", "steps", "rounds", "cores")
        if self.cores > len(available_cores()):
            raise RunError(
                f"--cores: got {self.cores}, and there are {len(available_cores())}: ask for fewer."
            )


@dataclasses.dataclass(frozen=True)
class BenchSync:
    """Time synced batch norm beside flax's, haiku's and PyTorch's, and count its collectives."""

    devices: int = 2
    """Devices of the one process that has several."""

    processes: int = 2
    """Processes of one device each, joined by gloo on 127.0.0.1; 1 leaves them out."""

    rounds: int = 31
    """Turns of each; the medians count."""

    turn_ms: float = 50.0
    """How long a turn lasts: the op is repeated to fill it."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed, in the processes of all contestants."""

    markdown: bool = False
    """Print the tables as Markdown."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        require_positive(self, "devices", "processes", "rounds", "turn_ms")


@dataclasses.dataclass(frozen=True)
class BenchLm:
    """Time training the small language model beside PyTorch, and what its norms take of it."""

    width: int = 128
    """Size of the residual stream."""

    depth: int = 4
    """Blocks."""

    heads: int = 4
    """Heads of the attention; twice their number divides the width."""

    length: int = 128
    """Tokens of a sequence."""

    batch_size: int = 16
    """Sequences per step."""

    vocabulary: int = 256
    """Different tokens."""

    scheme: str = "pre"
    """Where the norms stand. PyTorch has pre alone."""

    scan: bool = False
    """Whether normlab's blocks are a scan; they are written out otherwise, as PyTorch's are."""

    remat: bool = False
    """Whether normlab computes the activations of a block anew for the gradient."""

    steps: int = 10
    """Steps per turn."""

    rounds: int = 7
    """Turns of each; the medians are reported."""

    lr: float = 1e-3
    """Learning rate of AdamW."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed, in the processes of all contestants."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        sizes = ("width", "depth", "heads", "length", "batch_size", "vocabulary")
        require_positive(self, *sizes, "steps", "rounds", "lr")
        if self.width % (2 * self.heads):
            raise RunError(
                f"--heads: got {self.heads} for --width {self.width}; twice as many must divide it."
            )


@dataclasses.dataclass(frozen=True)
class BenchCompile:
    """Time compiling a training step of the language model, scanned over its blocks or written out.

    Every time is that of a fresh process without a cache of programs. Nothing runs.
    """

    depths: tuple[int, ...] = (4, 12, 48)
    """Numbers of blocks."""

    deepest: int = 12
    """With more blocks the program is not written out, which takes minutes."""

    scheme: str = "pre"
    """Where the norms stand."""

    rounds: int = 3
    """Turns of each; the medians are reported."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        require_positive(self, "deepest", "rounds")
        if not self.depths or min(self.depths) < 1:
            raise RunError(f"--depths: got {self.depths}; name one at least, each at least 1.")


@dataclasses.dataclass(frozen=True)
class BenchOps:
    """Time each norm, forward and forward+backward, beside the same op of other libraries.

    Ends with a table of times in units of the floor (the bytes that must move, timed as a copy), a
    table of ratios and a figure. Every turn is kept in the run directory. Libraries that are not
    installed are named and left out.
    """

    ops: tuple[str, ...] = tuple(KINDS_OF)
    """batch, layer, rms, group (8 groups), instance."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Kinds of input: conv [N, H, W, C], dense [N, C], tokens [N, T, C]. An op runs on those it is
    used for."""

    dtypes: tuple[str, ...] = tuple(BYTES)
    """Types of x: float32, bfloat16. Parameters are float32."""

    peers: tuple[str, ...] = tuple(PEERS)
    """flax.linen, flax.nnx, haiku, equinox, torch."""

    rounds: int = 11
    """Turns of each; the medians are reported."""

    turn_ms: float = 20.0
    """How long a turn lasts: the op is repeated to fill it."""

    scale: int = 1
    """Multiplies the batch axis; a GPU wants more than 1."""

    reuse_memory: bool = True
    """Whether the C library keeps memory that was freed, as a long-running program comes to do.
    Otherwise it may return large arrays to the system, and every call pays for fresh pages."""

    run_dir: Path | None = None
    """Where the results go; must not exist. By default runs/bench-ops-TIME."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        choices = {"ops": KINDS_OF, "shapes": SHAPES, "dtypes": BYTES, "peers": PEERS}
        for option, known in choices.items():
            for name in getattr(self, option):
                if name not in known:
                    from normlab.errors import nearest  # which brings jax

                    raise RunError(f"--{option}: unknown {name!r}: {nearest(name, known)}.")
        require_positive(self, "rounds", "scale", "turn_ms")
        if not self.cases():
            kinds = "; ".join(f"{op}: {', '.join(KINDS_OF[op])}" for op in self.ops or KINDS_OF)
            raise RunError(f"--ops and --shapes leave nothing to time. Ops run on ({kinds}).")

    def cases(self) -> list[Case]:
        """What is timed, in order."""
        return [
            Case(op, kind, (shape[0] * self.scale, *shape[1:]), dtype)
            for op, kinds in KINDS_OF.items()
            for kind in kinds
            for shape in SHAPES[kind]
            for dtype in BYTES
            if op in self.ops and kind in self.shapes and dtype in self.dtypes
        ]
