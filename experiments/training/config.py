"""What commands and questions that train have in common: options, what is refused, the norms."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import normlab as nl

from .. import writers
from ..data import NAMES, TEXTS, Dataset, Reading, Unit, is_kept, is_own
from ..rundir import RunError, default_path, require, require_effect, words
from .again import parsed

if TYPE_CHECKING:  # what takes JAX is imported where it is used
    from jax.typing import ArrayLike

    from .. import models
    from . import optimizers

Augmentation = Literal["flip", "crop"]
"""What `--augment` takes."""

IMAGES = {"model": "conv", "norm": "batch", "batch_size": 128, "optimizer": "momentum", "lr": 0.05}
TEXT = {"model": "lm", "norm": "rms", "batch_size": 16, "optimizer": "adamw", "lr": 3e-3}
"""What suits the data: what options that are "auto" or not given stand for."""

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
      dataset: mnist, fashion_mnist, cifar10 or digits (tiny, needs no download); of text
        tiny_shakespeare, gutenberg, lm1b or markov (tiny, needs no download); or
        mypackage.module:load, a function of your own.
      model: conv (three 3×3 convolutions, ReLU), mlp (three layers of 100 sigmoids), lm (of text),
        another of `normlab list`, or mypackage.module:Net, one of your own.
      batch_size: Examples per optimizer step, over all devices; of text windows.
      steps: Optimizer steps.
      optimizer: As `Command` has it.
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
      model: conv (three 3×3 convolutions, ReLU), mlp (three layers of 100 sigmoids), lm (of text),
        another of `normlab list`, or mypackage.module:Net, one of your own; auto is conv, of text
        lm.
      batch_size: Examples per optimizer step, over all devices; by default 128, of text 16
        windows.
      optimizer: Any of optax by name, contrib.muon and the like too, with options as in
        sgd:momentum=0.9,nesterov=true; momentum is SGD with 0.9, and adamw has b2=0.95 if not told
        otherwise. auto is momentum, of text adamw.
      lr: Learning rate; by default 0.05, of text 0.003.
      microbatches: Parts, one after the other, into which a device cuts its share of a batch.
      groups: Groups of the norms that have some; must divide the channels of every layer.
      decay: Weight of the old value in batch norm's running statistics; by default 0.9.
      eps: ε, added to the variance under the root; by default each norm's own, mostly 1e-5.
      schedule: How the rate falls over the steps after the warm-up: constant, linear, cosine (to
        0), polynomial, exponential or piecewise, of optax; with options as in cosine:alpha=0.1 or
        piecewise:0.5=0.1,0.75=0.1.
      warmup: Steps in which the rate rises to its value; by default 0, of text a tenth of all.
      clip: The norm to which the gradient of all parameters is cut; 0 leaves it as it is.
      weight_decay: Of kernels, not of gains, biases and norms. Where optax's optimizer has it, as
        adamw and lion; with others an L2 penalty on the loss, as in PyTorch's SGD.
      config: What is not given is as in the config.json of another run: the file, or its directory.
      augment: Of images: flip (left to right) and crop (moved by up to an eighth), at random.
      context: Of text: the tokens that a model sees at once.
      unit: Of text: what a token is.
      measured: Of text: windows of the validation and of the test set that are measured; 0 is all.
      scheme: Where the norms stand, of a model that has residual branches: pre, post, ….
      inside: Where the norm stands inside the branches beside: q k is QK norm.
      depth: The model's number of blocks, if not its own.
      width: The model's size of the residual stream, if not its own.
      log: Where the measurements go as well: tensorboard (event files in the run directory) or
        wandb (the project of $WANDB_PROJECT, or normlab).
    """

    model: str = "auto"
    optimizer: str = "auto"
    if not TYPE_CHECKING:  # what is not given is set below, by the data
        batch_size: int | None = None
        lr: float | None = None
        warmup: int | None = None
    else:
        batch_size: int = 128
        lr: float = 0.05
        warmup: int = 0
    schedule: str = "constant"
    clip: float = 0.0
    weight_decay: float = 0.0
    augment: tuple[Augmentation, ...] = ()
    config: Path | None = None
    context: int = 128
    unit: Unit = "bytes"
    measured: int = 512
    scheme: str | None = None
    inside: tuple[str, ...] = ()
    depth: int | None = None
    width: int | None = None
    microbatches: int = 1
    groups: int = 4
    decay: float | None = None
    eps: float | None = None
    log: tuple[writers.Name, ...] = ()

    def __post_init__(self) -> None:
        """Sets what suits the data; raises RunError for values that cannot be run."""
        from .. import models
        from . import optimizers

        if self.config is not None:
            raise RunError("--config is read at the terminal; in Python use again.read_config.")
        try:
            text = self.dataset in TEXTS or (
                is_own(self.dataset) and self.model != "auto" and models.reads_text(self.model)
            )
        except ValueError as error:  # an unknown model
            raise RunError(str(error)) from None
        warmup = {"warmup": self.steps // 10 if text else 0}
        for name, value in ((TEXT if text else IMAGES) | warmup).items():
            if getattr(self, name, value) in ("auto", None):  # `norm` is of train alone
                object.__setattr__(self, name, value)
        self.require_counts("batch_size", "steps", "microbatches", "groups", "context")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            finite = value is None or 0 < value < math.inf
            require(finite, name, value, "positive and finite")
        for name in ("warmup", "clip", "weight_decay", "measured"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "0 or more, and finite")
        last = f"less than --steps {self.steps}"
        require(self.warmup < self.steps, "warmup", self.warmup, last)
        optimizers.require(self.optimizer)
        optimizers.require_schedule(self.schedule)
        distinct = len(set(self.augment)) == len(self.augment)
        require(distinct, "augment", " ".join(self.augment), "distinct")
        writers.require(self.log)
        require(self.decay is None or 0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        try:
            models.require(self.model, **self.model_options)
        except ValueError as error:  # an unknown name
            raise RunError(str(error)) from None
        reads_text = models.reads_text(self.model)
        if self.dataset in NAMES and reads_text != (self.dataset in TEXTS):
            reads, others = (
                ("text", TEXTS)
                if reads_text
                else ("images", [name for name in NAMES if name not in TEXTS])
            )
            raise RunError(
                f"--model {self.model} reads {reads}, and --dataset {self.dataset} is none: use "
                f"one of {', '.join(others)}, or another model."
            )
        if self.dataset in NAMES and not text:
            for name in ("context", "unit", "measured"):
                require_effect(self, False, name, "on images")
        if text:
            require_effect(self, False, "augment", "on text")

    def as_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {k: v for k, v in super().as_json().items() if k != "config"}

    @classmethod
    def parse(cls, read: Callable[..., Any], arguments: Sequence[str]) -> Any:
        """The options that `read` finds in the arguments, and those of --config."""
        return parsed(read, cls, arguments)

    def require_told(self, norms: Sequence[str], sync: str, *, devices: int | None = None) -> None:
        """Raises RunError for an option of norms that none of these is told.

        Args:
          norms: Their names.
          sync: The words of --sync.
          devices: How many there are, where that is known.
        """
        from . import syncs

        try:
            told = {option: [n for n in norms if takes(n, option)] for option in NORMS_OPTIONS}
        except ValueError as error:  # an unknown name
            raise RunError(str(error)) from None
        beside = f"on norm {', '.join(norms)}" if len(norms) < 4 else "on these norms"
        require_effect(self, bool(told["groups"]), "groups", beside)
        require_effect(self, bool(told["eps"]), "eps", beside)
        require_effect(self, bool(told["decay"] or told["batch"]), "decay", beside)
        if sync != "all":
            alone = devices == 1 and syncs.parse(sync, devices=1) in (None, "data")
            why = f"{beside}, which measures no batch" if len(norms) < 2 else beside
            require_effect(self, bool(told["axis_name"]), "sync", why)
            require_effect(self, not alone, "sync", "on one device")

    @property
    def reading(self) -> Reading:
        """How a text is read."""
        return Reading(self.context, self.unit, self.measured)

    @property
    def model_options(self) -> dict[str, Any]:
        """What the model is told beside the norm: those of the options that are given."""
        options = {name: getattr(self, name) for name in ("scheme", "inside", "depth", "width")}
        return {name: value for name, value in options.items() if value not in (None, ())}

    @property
    def make_optimizer(self) -> optimizers.Make:
        """What makes the optimizer of a learning rate."""
        from . import optimizers

        return optimizers.optimizer(
            self.optimizer,
            self.steps,
            schedule=self.schedule,
            warmup=self.warmup,
            clip=self.clip,
            weight_decay=self.weight_decay,
        )

    def draw_kernels(self, classes: int, seeds: Iterable[int], probe: ArrayLike) -> Any:
        """What the nets start from, of each seed; see `models.draw_kernels`.

        Raises:
          RunError: For a scheme or sizes that the model cannot have.
        """
        from .. import models

        try:
            return models.draw_kernels(self.model, classes, seeds, probe, **self.model_options)
        except ValueError as error:
            raise RunError(f"--model {self.model}: {error}") from error

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
        from .. import models

        try:
            given = {"groups": self.groups, "axis_name": axis_name, **more}
            if self.eps is not None:
                given |= {"eps": self.eps}
            if self.decay is not None:
                given |= {"decay": self.decay, "batch": {"decay": self.decay}}
            options = {k: v for k, v in given.items() if takes(name, k)}
            own = OWN.get(name, {})
            if models.is_flat(self.model):  # by channels: the same there, and right for heads
                own = {k: v for k, v in own.items() if k != "axes"}
            return nl.get(name, **options, **own)
        except ValueError as error:
            raise RunError(str(error)) from None


NORMS_OPTIONS = ("groups", "eps", "decay", "batch", "axis_name")
"""What `Command.norm_of` tells those norms that take it."""


def takes(name: str, option: str) -> bool:
    """Whether the norm called `name` is told an option of the run.

    It is told its number of groups where it has none by itself, and the axis of the data where it
    measures the batch.
    """
    row = nl.row(name)
    known = inspect.signature(row.factory).parameters
    if option not in known or option in OWN.get(name, {}):
        return False
    if option == "axis_name" and row.axis_of != "batch":  # those of a run share its examples
        return False
    return option != "groups" or known[option].default in (None, inspect.Parameter.empty)


def require_kept(*configs: Command) -> None:
    """Raises RunError for a `data_dir` where none of these configs, which share it, keeps data."""
    names = tuple(dict.fromkeys(config.dataset for config in configs))
    kept = any(is_kept(name) or not (name in NAMES or is_own(name)) for name in names)
    why = f"on --dataset {words(names)}, of which no file is kept"
    require_effect(configs[0], kept, "data_dir", why)


def require_mesh(sizes: Sequence[int], devices: int | None = None) -> None:
    """Raises RunError for sizes of a mesh that are none, or not those of so many `devices`."""
    said = " ".join(map(str, sizes))
    require(all(size >= 1 for size in sizes), "mesh", said, "sizes of at least 1")
    if sizes and devices not in (None, math.prod(sizes)):
        raise RunError(
            f"--mesh {said}: that is {math.prod(sizes)} devices, and there are {devices}. Give "
            "sizes whose product is their number, or that number of devices."
        )


def require_evaluations(evaluations: int, steps: int) -> None:
    """Raises RunError if there are to be more evaluations than steps."""
    if evaluations > steps:
        raise RunError(
            f"--evaluations: got {evaluations}, but --steps is {steps}, and there is at most one "
            "evaluation after each step. Give fewer evaluations or more steps."
        )


def require_fit(examples: int, data: Dataset, given: str = "", change: str = "") -> None:
    """Raises RunError if a batch of so many examples is larger than the training set."""
    if examples > len(data.train_inputs):
        raise RunError(
            f"{given or f'--batch-size: got {examples}'}, but {data.name} has "
            f"{len(data.train_inputs)} training examples. {change or 'Give at most that many.'}"
        )


def require_reading(model: str, data: Dataset) -> None:
    """Raises RunError if a model does not read what the data are: a text, images, other inputs."""
    from .. import models

    if models.reads_text(model) != (data.text is not None):
        what, change = (
            ("arrays of inputs and labels", "Take a model of images, or return a string")
            if data.text is None
            else ("a text", "Give --model lm, or return arrays of inputs and labels")
        )
        raise RunError(f"--dataset {data.name} is {what}, which {model} does not read. {change}.")
    shape = data.train_inputs.shape[1:]
    if data.text is None and len(shape) != 3 and model in models.MODELS and model != "mlp":
        said = ", ".join(map(str, ("N", *shape)))
        raise RunError(
            f"--dataset {data.name} has inputs [{said}], and {model} reads images [N, H, W, C]. "
            "Take --model mlp or one of your own, or return images."
        )


def require_place(name: str, model: models.Network) -> None:
    """Raises RunError if the norm called `name` stands nowhere in a model."""
    from .. import models

    placed = not isinstance(model, models.Transformer) or model.norm in model.norms().values()
    if not placed and name != "none":
        raise RunError(
            f"norm {name!r} stands nowhere under --scheme {model.plan.name}, so all such norms "
            "would be one net. Take norm none (--norms none, --norm none), one of weights, or "
            "another --scheme."
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


@dataclasses.dataclass(frozen=True)
class Joining:
    """How the processes of a run find each other, and when they give up.

    Attributes:
      coordinator: HOST:PORT of process 0, where no cluster says it; with --processes and --process.
      processes: With --coordinator: how many processes there are.
      process: With --coordinator: which of them this is.
      cluster: Whether to ask the cluster for the other processes: if its variables are there, or
        always (TPU VMs have none), or never.
      start_timeout: Seconds in which all processes must have started.
      heartbeat_timeout: Seconds after which a process that is not heard of is dead, and the others
        end.
      shutdown_timeout: Seconds that a process that is done waits for the others.
      step_timeout: Seconds for a step; the watchdog ends a process that is over it.
      grace: Seconds for the first step, which compiles, for a checkpoint and for the evaluation.
    """

    coordinator: str | None = None
    processes: int = 1
    process: int = 0
    cluster: Literal["auto", "yes", "no"] = "auto"
    start_timeout: int = 120
    heartbeat_timeout: int = 10
    shutdown_timeout: int = 8
    step_timeout: float = 60.0
    grace: float = 600.0


FREE = {
    *("steps", "checkpoint_every", "keep", "log_every", "data_dir", "run_dir", "devices", "log"),
    *(field.name for field in dataclasses.fields(Joining)),
}
"""Options that may change when a run goes on: they change no number up to a given step."""


@dataclasses.dataclass(frozen=True)
class Train(Joining, Command):
    """Train one network, data-parallel, in one process or many; go on where it was stopped.

    The same command with the same --run-dir goes on from the last checkpoint. Under Slurm,
    Kubernetes and on TPU pods the processes find each other; `launch` starts them elsewhere.
    """

    norm: str = "auto"
    """Which norm (`normlab list`, or module:factory for one of your own); auto is
    batch, of text rms."""

    sync: str = "all"
    """Over which devices batch norm measures: all, local, groups=2, ring=1, virtual=64, ghost=4;
    of a --mesh inner (its last axis) or together=axis0; joined by + with every=2,
    gradient=forward, second=always and the like."""

    mesh: tuple[int, ...] = ()
    """Sizes of the axes along which the devices of all processes lie, as in 4 2: axis0 and axis1,
    neighbours along the last; by default one axis of all."""

    steps: int = 200
    """Optimizer steps; more than before lets a run that is done go on, if its rate is constant
    behind the same --warmup."""

    seed: int = 0
    """Draws the kernels and the minibatches."""

    population: str = "debiased"
    """What batch norm keeps: debiased, ema, cumulative, renorm, frozen, or batch (nothing)."""

    checkpoint_every: int = 50
    """Steps between checkpoints; there is one at the end and one at a stop as well."""

    keep: int = 2
    """How many checkpoints to keep."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    devices: int = 0
    """On a CPU, devices that each process makes; 0 takes those that there are."""

    run_dir: Path | None = None
    """Where the results go; the place of a run of the same options lets that run go on. By default
    runs/train-DATASET-MODEL-TIME, for one process; several must share a directory."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        from . import syncs
        from .trainer import axes_of

        super().__post_init__()
        require_kept(self)
        self.require_counts(
            *("keep", "log_every", "checkpoint_every", "processes"),
            *("start_timeout", "heartbeat_timeout", "shutdown_timeout"),
        )
        for name in ("step_timeout", "grace"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "positive and finite")
        require(self.devices >= 0, "devices", self.devices, "0 or more")
        last = f"one of 0 to {self.processes - 1}"
        require(0 <= self.process < self.processes, "process", self.process, last)
        together = self.processes == 1 or self.coordinator is not None
        require(together, "processes", self.processes, "beside a --coordinator HOST:PORT")
        known = self.dataset in NAMES or is_own(self.dataset)
        require(known, "dataset", self.dataset, f"one of {', '.join(NAMES)}")
        for name in ("batch", self.norm):  # no array is made: JAX must not start yet
            self.norm_of(name, population=self.population)
        self.require_told((self.norm,), self.sync)
        why = f"on norm {self.norm}, which keeps no statistics"
        require_effect(self, takes(self.norm, "population"), "population", why)
        require_mesh(self.mesh)
        syncs.parse(self.sync, axes_of(self.mesh))

    @property
    def path(self) -> Path:
        """The run directory."""
        default = default_path(f"train-{self.dataset}-{self.model}")
        return (self.run_dir or default).expanduser().resolve()

    def as_json(self) -> dict[str, Any]:
        """The options that the numbers depend on."""
        free = FREE if self.schedule == "constant" else FREE - {"steps"}
        return {k: v for k, v in super().as_json().items() if k not in free}


@dataclasses.dataclass(frozen=True)
class Launch:
    """Run a training run on several processes, and start it again when one dies.

    Example: `launch --workers 4 -- train --dataset mnist --sync all`. What follows `--` is `train`
    with its options. Ctrl-C or SIGTERM stops all processes with a checkpoint.
    """

    command: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """After `--`: train, and its options."""

    workers: int = 2
    """Processes."""

    gpus: int = 0
    """GPUs for each process; without any, the processes compute on CPUs."""

    ray: str | None = None
    """A Ray cluster, as ray.init(address=...) takes it; by default this machine alone. This
    checkout, the data and --run-dir must be at the same place on all of its machines."""

    max_failures: int = 3
    """How often to start all processes again after one of them failed."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        for name, least in (("workers", 1), ("gpus", 0), ("max_failures", 0)):
            value = getattr(self, name)
            require(value >= least, name, value, f"at least {least}")
        example = "for example: launch --workers 4 -- train --dataset mnist"
        if not self.command:
            raise RunError(f"there is nothing to launch; {example}")
        if self.command[0] != "train":
            raise RunError(f"cannot launch {self.command[0]!r}, only train; {example}")
