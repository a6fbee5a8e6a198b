"""What the questions about small transformers have in common: the net, and how a text is read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

import normlab as nl

from .. import models
from ..data import Dataset
from ..rundir import Record, require
from ..training.tasks import Task
from .learn import dataset
from .question import Config


@dataclasses.dataclass(frozen=True)
class Language(Config):
    """A small language model of a text.

    Attributes:
      context: Tokens of a window; divides those of the data set's windows, 128.
      tests: Windows that are measured, of the test and of the validation set.
      width: The width of the stream.
      depth: Blocks.
      heads: Heads of each attention.
    """

    dataset: str = "gutenberg"
    model: str = "lm"
    optimizer: str = "adamw"
    schedule: str = "cosine"  # pyright: ignore
    batch_size: int = 8
    steps: int = 300
    warmup: int = 30
    lr: float = 3e-3
    evaluations: int = 1
    context: int = 32
    tests: int = 256
    width: int = 32
    depth: int = 2
    heads: int = 2

    def __post_init__(self) -> None:
        """Raises RunError as `Config` does, and for a context that does not divide 128."""
        super().__post_init__()
        self.require_counts("tests", "width", "depth", "heads", expected="1 or more")
        fits = self.context >= 1 and 128 % self.context == 0
        require(fits, "context", self.context, "a divisor of 128")

    @property
    def sizes(self) -> dict[str, Any]:
        """What the model is told beside the norm and where it stands."""
        return {"width": self.width, "depth": self.depth, "heads": self.heads}

    def prepare(self, data: Dataset) -> Dataset:
        """The text in windows of `context` tokens, numbered among those that occur."""
        return recut(data, self.context, self.tests)

    @property
    def chance(self) -> float:
        """Bits per byte of one who knows how frequent each token is, and nothing else."""
        return _chance(self)

    def frequencies(self) -> Iterator[Record]:
        """A record of that, of `kind` "frequencies"."""
        yield {"kind": "frequencies", "bits_per_byte": self.chance}


@functools.lru_cache(maxsize=4)
def _chance(config: Language) -> float:
    return Task.of(config.prepare(dataset(config.dataset, config.data_dir))).chance


def recut(data: Dataset, context: int, tests: int) -> Dataset:
    """A text in shorter windows, of which `tests` are measured, and tokens that all occur."""
    assert data.text is not None, data.name
    text = data.text
    split = {
        "train": (data.train_inputs, data.train_labels),
        "test": (data.test_inputs, data.test_labels),
        "validation": (text.validation_inputs, text.validation_labels),
    }
    known = np.unique(np.concatenate([np.unique(v) for each in split.values() for v in each]))

    def shorter(v: np.ndarray, few: bool) -> np.ndarray:
        v = np.searchsorted(known, v).astype(np.uint8 if len(known) <= 256 else np.int32)
        v = v.reshape(-1, context)
        places = np.arange(min(tests, len(v))) * len(v) // min(tests, len(v))
        return v[places] if few else v

    cut = {name: [shorter(v, name != "train") for v in each] for name, each in split.items()}
    reading = text.reading._replace(context=context, measured=tests)
    inputs, labels = cut["validation"]
    text = text._replace(validation_inputs=inputs, validation_labels=labels, reading=reading)
    halves = {
        f"{name}_{half}": v
        for name in ("train", "test")
        for half, v in zip(("inputs", "labels"), cut[name], strict=True)
    }
    return data._replace(**halves, classes=len(known), text=text)


def first_gradients(
    scheme: str, norm: nl.Norm, *, batch_size: int, length: int, **sizes: Any
) -> Callable[[int], Any]:
    """A function of a seed: the gradient of a language model at its initialization, by block.

    The mean loss of random tokens, which the seed draws with the weights; the head is no embedding.

    Args:
      scheme: Where the norms stand.
      norm: Which norm.
      batch_size: Sequences.
      length: Their tokens.
      **sizes: Of the model.

    Returns:
      The gradient by the params as a tree with `block0` and so on.
    """
    options = {"scheme": scheme, "mlp": "gelu", "tied": False, "scan": True, **sizes}
    model: Any = models.build("lm", norm, 256, **options)

    @jax.jit
    def look(key: Array, tokens: Array) -> Any:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        variables = model.init(key, inputs, train=False)

        def loss(params: Any) -> Array:
            logits: Any = model.apply({**variables, "params": params}, inputs, train=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        return model.unstack(jax.grad(loss)(variables["params"]))

    def of_seed(seed: int) -> Any:
        tokens = np.random.default_rng(seed).integers(0, 256, (batch_size, length + 1))
        return look(jax.random.key(seed), tokens)

    return of_seed
