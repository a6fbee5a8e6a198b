"""What a model is asked to do with a data set, and the number by which nets are compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import DTypeLike

import normlab as nl

from .. import models
from ..data import Dataset
from ..rundir import Record


class Evaluation(NamedTuple):
    """What an evaluation measures.

    Attributes:
      loss: `[seeds]`, mean cross-entropy of the labels of the test set, in nats.
      accuracy: `[seeds]`, share of those labels that are told right.
      parts: By layer, each part's percentiles `QUANTILES` on a probe batch, `[seeds, 3]`.
      more: What else the task measures, by name, `[seeds]`.
      each: Of each example of the test set, `[seeds, examples]`, by what it is called in a record.
    """

    loss: np.ndarray
    accuracy: np.ndarray
    parts: dict[str, nl.Parts]
    more: Mapping[str, np.ndarray] = {}
    each: Mapping[str, np.ndarray] = {}


class Score(NamedTuple):
    """The number by which nets are compared.

    Attributes:
      key: What it is called in a record.
      name: In words.
      higher: Whether more is better.
      factor: What it is multiplied by to be shown.
      unit: Then: "%", or nothing.
      target: What a good net reaches.
      choice: The key by which a learning rate is chosen.
      drawn: What an axis is called along which it is drawn; there less is better.
      chance: Who reaches `Task.chance`.
    """

    key: str
    name: str
    higher: bool
    factor: float
    unit: str
    target: float
    choice: str
    drawn: str
    chance: str

    @property
    def best(self) -> Callable[..., Any]:
        """Which of several values is the best: `max` or `min`."""
        return max if self.higher else min

    def draw(self, record: Record) -> float | None:
        """What is drawn of a record; nothing of a net whose loss is not finite."""
        value = record[self.key]
        if value is None or record["test_loss"] is None:
            return None
        return self.factor * (1 - value if self.higher else value)


@dataclasses.dataclass(frozen=True)
class Task:
    """To tell the label of an example, or its labels: the loss is their mean cross-entropy.

    Attributes:
      classes: How many different labels there are.
      uninformed: Nats per label of the test set for one who knows how frequent each label is in
        the training set, and nothing else.
      labels: How many labels an example has.
    """

    score: ClassVar[Score]
    probe: ClassVar[int]
    """Training examples on which a data-dependent init and every evaluation look."""

    batch: ClassVar[int]
    """Examples of the test set that are measured at a time."""

    classes: int
    uninformed: float
    labels: int

    @classmethod
    def of(cls, data: Dataset, dtype: DTypeLike = jnp.float32) -> Task:
        """What a data set is there for.

        Args:
          data: The data set; images of a floating type are taken as they are.
          dtype: The type of what a model sees of images.
        """
        counts = np.bincount(data.train_labels.ravel(), minlength=data.classes) + 1
        told = np.log(counts / counts.sum())[data.test_labels]
        common: Any = {
            "classes": data.classes,
            "uninformed": -float(told.mean()),
            "labels": math.prod(data.train_labels.shape[1:]),
        }
        if data.text is not None:
            return Language(**common, bytes_per_token=data.text.bytes_per_token)
        mean, std = 0.0, 1.0
        if not np.issubdtype(data.train_inputs.dtype, np.floating):
            pixels = data.train_inputs[:10_000].astype(np.float32)
            mean, std = float(pixels.mean()), float(pixels.std())
        return Classification(**common, mean=mean, std=std, dtype=dtype)

    def as_json(self) -> Record:
        """What figures are drawn with, as JSON values; `from_json` reads them."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in ("mean", "std", "dtype")}

    @staticmethod
    def from_json(values: Record) -> Task:
        """A task that draws, and trains nothing."""
        if "bytes_per_token" in values:
            return Language(**values)
        return Classification(**values, mean=0.0, std=1.0, dtype=jnp.float32)

    @property
    def chance(self) -> float:
        """What is drawn of one who knows nothing of the inputs."""
        raise NotImplementedError

    def along(self, batch_size: int) -> tuple[str, int]:
        """Against what a curve is drawn, and how much of it a step of so many examples is."""
        raise NotImplementedError

    def preprocess(self, inputs: Any) -> Array:
        """What the model sees of the inputs."""
        raise NotImplementedError

    def measures(self, test: np.ndarray, validation: np.ndarray | None) -> dict[str, np.ndarray]:
        """What else than loss and accuracy follows from the sums `[..., 3]` of `sums`."""
        raise NotImplementedError

    def losses(
        self,
        model: nn.Module,
        params: Any,
        norm_state: Any,
        inputs: Array,
        labels: Array,
        **more: Any,
    ) -> tuple[Array, Any]:
        """The cross-entropy of each label in training, in nats, and the norms' next state."""
        logits, changed = model.apply(
            {"params": params, models.STATE: norm_state},
            self.preprocess(inputs),
            train=True,
            mutable=[models.STATE],
            **more,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))
        return losses, changed.get(models.STATE, norm_state)

    def sums(
        self, model: nn.Module, variables: Any, inputs: Array, labels: Array, weights: Array
    ) -> tuple[Array, Array]:
        """Of held-out examples `[N, ...]` with weights `[N]`: sums over their labels.

        Returns:
          `[3]`: of the losses, of the labels that are told right, of the weights; and what is
          kept of each example, `[N]`.
        """
        labels = labels.astype(jnp.int32)
        logits: Any = model.apply(variables, self.preprocess(inputs), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        weights = jnp.broadcast_to(weights.reshape(-1, *[1] * (labels.ndim - 1)), labels.shape)
        right = (logits.argmax(-1) == labels).astype(weights.dtype)
        sums = jnp.stack([(weights * losses).sum(), (weights * right).sum(), weights.sum()])
        return sums, self.each(losses, right)

    def evaluation(
        self, test: Any, parts: dict[str, nl.Parts], validation: Any = None, each: Any = None
    ) -> Evaluation:
        """An evaluation of the sums `[..., 3]` of `sums`; the share is exact."""
        test = np.asarray(test)
        loss, right, total = np.moveaxis(test, -1, 0)
        held = None if validation is None else np.asarray(validation)
        more = self.measures(test, held)
        kept = {} if each is None else {f"{self.score.key}_each": self.kept(each)}
        return Evaluation(loss / total, right / total.astype(np.float64), parts, more, kept)

    def each(self, losses: Array, right: Array) -> Array:
        """What is kept of each example, of the losses and of what is told right of its labels."""
        raise NotImplementedError

    def kept(self, each: Any) -> np.ndarray:
        """In what unit: `<score.key>_each` of a record."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """To tell the classes of images.

    Attributes:
      mean, std: By which pixels are shifted and scaled: two numbers of the training set.
      dtype: The type of what a model sees.
    """

    score = Score(
        key="accuracy",
        name="test accuracy",
        higher=True,
        factor=100.0,
        unit="%",
        target=0.95,
        choice="accuracy",
        drawn="test error (%)",
        chance="chance",
    )
    probe = batch = 256

    mean: float
    std: float
    dtype: DTypeLike

    @property
    def chance(self) -> float:
        """The error of one who names any class."""
        return 100 * (1 - 1 / self.classes)

    def along(self, batch_size: int) -> tuple[str, int]:
        """Steps."""
        return "optimizer step", 1

    def preprocess(self, inputs: Any) -> Array:
        """Shifts and scales pixels."""
        return (jnp.asarray(inputs).astype(self.dtype) - self.mean) / self.std

    def measures(self, test: np.ndarray, validation: np.ndarray | None) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def each(self, losses: Array, right: Array) -> Array:
        """Whether its label is told right."""
        return right

    def kept(self, each: Any) -> np.ndarray:
        """As flags."""
        return np.asarray(each) > 0


@dataclasses.dataclass(frozen=True)
class Language(Task):
    """To tell the token that follows each token of a window.

    Attributes:
      bytes_per_token: Of the labels of the test set.
    """

    score = Score(
        key="bits_per_byte",
        name="bits per byte",
        higher=False,
        factor=1.0,
        unit="",
        target=2.5,
        choice="validation_loss",
        drawn="test bits per byte",
        chance="the tokens' frequencies",
    )
    probe = batch = 32

    bytes_per_token: float

    @property
    def chance(self) -> float:
        """The bits per byte of one who knows how frequent each token is."""
        return self.bits_per_byte(self.uninformed)

    def along(self, batch_size: int) -> tuple[str, int]:
        """Tokens."""
        return "tokens", batch_size * self.labels

    def preprocess(self, inputs: Any) -> Array:
        """The ids of the tokens."""
        return jnp.asarray(inputs).astype(jnp.int32)

    def bits_per_byte(self, loss: Any) -> Any:
        """Of a loss in nats per token: what the test set takes up when it is coded by the model.

        >>> Language(256, 0.0, 1, bytes_per_token=2.0).bits_per_byte(np.log(16.0)).item()
        2.0
        """
        return loss / math.log(2) / self.bytes_per_token

    def measures(self, test: np.ndarray, validation: np.ndarray | None) -> dict[str, np.ndarray]:
        """`bits_per_byte` on the test set, and `validation_loss` in nats per token."""
        found = {"bits_per_byte": self.bits_per_byte(test[..., 0] / test[..., 2])}
        if validation is not None:
            found["validation_loss"] = validation[..., 0] / validation[..., 2]
        return found

    def each(self, losses: Array, right: Array) -> Array:
        """The mean loss of its labels."""
        return losses.mean(axis=1)

    def kept(self, each: Any) -> np.ndarray:
        """In bits per byte."""
        return self.bits_per_byte(np.asarray(each, np.float64))
