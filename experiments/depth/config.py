"""The options of `depth`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import normlab as nl

from ..data import TEXTS, is_kept, is_own
from ..rundir import Record, RunError, require, require_effect
from ..training.config import require_place

if TYPE_CHECKING:
    from .. import models
    from ..training.trainer import DeviceData

RANDOM = "random"
"""What random bytes are called in the place of a data set."""


@dataclasses.dataclass(frozen=True)
class Depth:
    """Look through the blocks of nets that differ in where their norms stand, or in which.

    Draws one figure: a panel for each instrument, the blocks along it, a line for each net.
    """

    schemes: tuple[str, ...] = ("post", "pre", "peri", "lns")
    """Where the norms stand: the schemes of docs/placement.md."""

    norms: tuple[str, ...] = ("rms",)
    """Which norms (`normlab list`); each stands in each scheme."""

    inside: tuple[str, ...] = ()
    """Where the norm stands beside the scheme's places: q k is QK norm."""

    model: str = "lm"
    """lm, a language model, vit, a vision transformer, or mypackage.module:Net, a transformer of
    your own."""

    depth: int = 12
    """Blocks."""

    width: int = 128
    """The size of the residual stream."""

    dataset: str = RANDOM
    """Random bytes, which can only be looked at; to train, a text, or images for the vit
    (`normlab list`), or mypackage.module:load, a function of your own."""

    context: int = 128
    """Of text: the tokens of a sequence."""

    steps: int = 0
    """Optimizer steps; the net is measured before and after them."""

    batch_size: int = 32
    """Examples of a step; of text, sequences."""

    optimizer: str = "adamw"
    """Any of optax by name, with options, as in `normlab compare --help`."""

    lr: float = 1e-3
    """Learning rate."""

    weight_decay: float = 0.0
    """Of kernels, not of gains, biases and norms."""

    seed: int = 0
    """What draws the weights and the minibatches."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""

    run_dir: Path | None = None
    """Where the results go; must not exist. By default runs/depth-DATASET-MODEL-TIME."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be run."""
        from .. import models
        from ..training import optimizers

        for name in ("depth", "width", "context", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.steps >= 0, "steps", self.steps, "0 or more")
        require(0 < self.lr < math.inf, "lr", self.lr, "positive and finite")
        for name in ("schemes", "norms"):
            given = getattr(self, name)
            distinct = 0 < len(set(given)) == len(given)
            require(distinct, name, given, "at least one, and distinct")
        optimizers.require(self.optimizer)
        random = self.dataset == RANDOM
        require(not (random and self.steps), "steps", self.steps, f"0 on {RANDOM} bytes")
        require_effect(self, bool(self.steps), "batch_size", "without --steps")
        why = f"on --dataset {self.dataset}, of which no file is kept"
        require_effect(self, is_kept(self.dataset), "data_dir", why)
        try:
            reads_text = models.reads_text(self.model)
            models.require(self.model, **self.options(self.schemes[0]))
        except ValueError as error:
            raise RunError(str(error)) from None
        require_effect(self, reads_text, "context", "on images")
        if not is_own(self.dataset) and reads_text != (random or self.dataset in TEXTS):
            raise RunError(
                f"--dataset {self.dataset}: got it with --model {self.model}; lm reads text "
                f"({', '.join((RANDOM, *TEXTS))}), vit images. Change one of them."
            )

    @property
    def nets(self) -> dict[str, tuple[str, str]]:
        """The scheme and the norm of each net, by the word in which it differs from the others."""
        named = {}
        for scheme, norm in itertools.product(self.schemes, self.norms):
            words = [scheme] * (len(self.schemes) > 1) + [norm] * (len(self.norms) > 1)
            named[", ".join(words) or scheme] = scheme, norm
        return named

    def build(self, scheme: str, norm: str, data: DeviceData) -> models.Network:
        """The net; raises RunError where there is none."""
        import jax

        from .. import models

        try:
            options = self.options(scheme)
            model = models.build(self.model, nl.get(norm), data.task.classes, **options)
            jax.eval_shape(lambda: model.init(jax.random.key(0), data.probe, train=False))
        except ValueError as error:
            raise RunError(str(error)) from None
        chosen = len(self.schemes) == 1 and self.norms != Depth.norms
        if len(self.norms) > 1 or chosen:
            require_place(norm, model)
        return model

    def options(self, scheme: str) -> dict[str, Any]:
        """What the model is told beside the norm. Blocks are scanned, which compiles fast."""
        sizes = {"depth": self.depth, "width": self.width}
        return {"scheme": scheme, "inside": self.inside, "scan": True, **sizes}

    def as_json(self) -> Record:
        """The options as JSON values."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
