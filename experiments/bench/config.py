"""The options of the benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from normlab.errors import nearest

from ..rundir import RunError, require_effect, require_positive, words
from .blocks import BLOCKS, HERE, Program
from .turns import available_cores
from .worker import BYTES, GROUPS, KINDS_OF, OTHERS, PEERS, SHAPES, Case

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

    context: int = 128
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
        sizes = ("width", "depth", "heads", "context", "batch_size", "vocabulary")
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
        usual = BenchCompile.deepest  # between which and this a number of blocks is to lie
        moved = any((d > self.deepest) != (d > usual) for d in self.depths)
        require_effect(self, moved, "deepest", f"on --depths {words(self.depths)}")


@dataclasses.dataclass(frozen=True)
class BenchOps:
    """Time each norm, forward and forward+backward, beside the same op of other libraries.

    Ends with a table of times in units of the floor (the bytes that must move, timed as a copy), a
    table of ratios and a figure. Every turn is kept in the run directory. Libraries that are not
    installed are named and left out.
    """

    norms: tuple[str, ...] = tuple(KINDS_OF)
    """batch, layer, rms, group (8 groups), instance."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Kinds of input: conv [N, H, W, C], dense [N, C], tokens [N, T, C]. A norm runs on those it is
    used for."""

    dtypes: tuple[str, ...] = tuple(BYTES)
    """Types of x: float32, bfloat16. Parameters are float32."""

    peers: tuple[str, ...] = tuple(PEERS)
    """flax.linen, flax.nnx, haiku, equinox, torch; by name also jax.numpy (the textbook's formula),
    tokamax, torch.compile, and on a GPU liger and quack."""

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
        choices = {
            "norms": KINDS_OF,
            "shapes": SHAPES,
            "dtypes": BYTES,
            "peers": {**PEERS, **OTHERS},
        }
        require_known(self, choices)
        require_positive(self, "rounds", "scale", "turn_ms")
        if not self.cases():
            kinds = "; ".join(f"{op}: {', '.join(KINDS_OF[op])}" for op in self.norms or KINDS_OF)
            raise RunError(f"--norms and --shapes leave nothing to time. They run on ({kinds}).")
        require_used(self, "norms", {case.op for case in self.cases()}, "shapes")
        require_used(self, "shapes", {case.kind for case in self.cases()}, "norms")

    def cases(self) -> list[Case]:
        """What is timed, in order."""
        return [
            Case(op, kind, (shape[0] * self.scale, *shape[1:]), dtype)
            for op, kinds in KINDS_OF.items()
            for kind in kinds
            for shape in SHAPES[kind]
            for dtype in BYTES
            if op in self.norms and kind in self.shapes and dtype in self.dtypes
        ]


PEERS_OF_BYTES = ("flax.linen", "tokamax", "jax.numpy", "flax.nnx", "haiku", "equinox")
TARGETS = {"tpu": "TPU v5e", "cuda": "H100", "cpu": "CPU", HERE: "here"}
"""What `bench bytes` compiles for, and what its tables call it."""


@dataclasses.dataclass(frozen=True)
class BenchBytes:
    """Count the bytes that programs move, with each library's norm in the same place.

    That is a norm alone, a transformer block, and a bottleneck block of a ResNet in training. They
    are compiled ahead of time, for machines that need not be here, and read; nothing runs but on
    the target `here`. What is not installed is named and left out.
    """

    blocks: tuple[str, ...] = tuple(BLOCKS)
    """alone, transformer (layer and RMS norm), bottleneck (batch and group norm)."""

    norms: tuple[str, ...] = BLOCKS["alone"].ops
    """layer, rms, batch, group (8 groups), instance: in each block those that stand there."""

    dtypes: tuple[str, ...] = tuple(BYTES)
    """Types of x and of the kernels: float32, bfloat16. Parameters of norms are float32."""

    targets: tuple[str, ...] = ("tpu", "cuda", "cpu")
    """tpu (a v5e), cuda (an H100), cpu (this one); here: JAX's default device, timed as well."""

    peers: tuple[str, ...] = PEERS_OF_BYTES[:3]
    """flax.linen (its default, and with the two-pass variance), tokamax, jax.numpy (the textbook's
    formula in float32); by name also flax.nnx, haiku, equinox."""

    tokens: tuple[int, int, int] = (8, 1024, 4096)
    """Sequences, tokens of each, channels of the transformer; a norm alone sees them as rows."""

    images: tuple[int, int, int, int] = (128, 56, 56, 256)
    """Images, height, width, channels of the bottleneck; a norm alone sees half the channels."""

    rounds: int = 7
    """Turns of each on the target here; the medians are reported."""

    run_dir: Path | None = None
    """Where the results go; must not exist. By default runs/bench-bytes-TIME."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be compiled."""
        choices = {
            "blocks": BLOCKS,
            "norms": BLOCKS["alone"].ops,
            "dtypes": BYTES,
            "targets": TARGETS,
            "peers": PEERS_OF_BYTES,
        }
        require_known(self, choices)
        require_positive(self, "rounds")
        for name, unit in (("tokens", 1), ("images", 4 * GROUPS)):
            sizes = getattr(self, name)
            if min(sizes) < 1 or sizes[-1] % unit:
                many = "" if unit == 1 else f", the channels a multiple of {unit}"
                raise RunError(f"--{name}: got {sizes}; all must be at least 1{many}.")
        for name in ("targets", "dtypes"):
            if not getattr(self, name):
                raise RunError(f"--{name}: name one at least: {', '.join(choices[name])}.")
        if not self.programs():
            stands = "; ".join(f"{name}: {', '.join(b.ops)}" for name, b in BLOCKS.items())
            raise RunError(f"--blocks and --norms leave nothing to compile. There are ({stands}).")
        require_used(self, "norms", {program.op for program in self.programs()}, "blocks")
        require_used(self, "blocks", {program.block for program in self.programs()}, "norms")
        require_effect(self, HERE in self.targets, "rounds", f"without --targets {HERE}")
        see = {"tokens" if program.op in ROWS else "images" for program in self.programs()}
        without = f"beside --blocks {words(self.blocks)} --norms {words(self.norms)}"
        for name in ("tokens", "images"):
            require_effect(self, name in see, name, without)

    def programs(self) -> list[Program]:
        """What is compiled, in order."""
        sequences, tokens, width = self.tokens
        *positions, channels = self.images
        shapes = {"transformer": self.tokens, "bottleneck": self.images}
        rows, maps = (sequences * tokens, width), (*positions, channels // 2)
        return [
            Program(name, op, dtype, shapes.get(name) or (rows if op in ROWS else maps))
            for name, block in BLOCKS.items()
            for op in block.ops
            for dtype in BYTES
            if name in self.blocks and op in self.norms and dtype in self.dtypes
        ]


ROWS = ("layer", "rms")
"""The norms that see tokens, or rows of them where they stand alone; the others see images."""


def require_known(config: Any, choices: Mapping[str, Iterable[str]]) -> None:
    """Raises RunError for a name that there is not, with the nearest, or that is given twice."""
    for option, known in choices.items():
        given = getattr(config, option)
        for name in given:
            if name not in known:
                raise RunError(f"--{option}: unknown {name!r}: {nearest(name, known)}.")
            if given.count(name) > 1:
                raise RunError(f"--{option}: got {name} twice. Give each name once.")


def require_used(config: Any, option: str, used: Collection[str], beside: str) -> None:
    """Raises RunError for a name of an option that another option leaves nothing of.

    Args:
      config: Where both are.
      option: The one; what it has by default nobody asked for.
      used: Its names of which something is left.
      beside: The other.
    """
    given, default = getattr(config, option), getattr(type(config), option)
    idle = [name for name in given if name not in used]
    if idle and {*given} != {*default}:
        raise RunError(
            f"--{option} {words(idle)}: it has no effect beside --{beside} "
            f"{words(getattr(config, beside))}. Leave it out, or give {beside} that go with it."
        )


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed beside other libraries, and the bytes that programs move."""

    SUBCOMMANDS: ClassVar[dict[str, type]] = {
        "step": BenchStep,
        "ops": BenchOps,
        "bytes": BenchBytes,
        "figure1": BenchFigure1,
        "conv": BenchConv,
        "lm": BenchLm,
        "compile": BenchCompile,
        "sync": BenchSync,
    }

    bench: (
        Annotated[BenchStep, tyro.conf.subcommand("step")]
        | Annotated[BenchOps, tyro.conf.subcommand("ops")]
        | Annotated[BenchBytes, tyro.conf.subcommand("bytes")]
        | Annotated[BenchFigure1, tyro.conf.subcommand("figure1")]
        | Annotated[BenchConv, tyro.conf.subcommand("conv")]
        | Annotated[BenchLm, tyro.conf.subcommand("lm")]
        | Annotated[BenchCompile, tyro.conf.subcommand("compile")]
        | Annotated[BenchSync, tyro.conf.subcommand("sync")]
    )
