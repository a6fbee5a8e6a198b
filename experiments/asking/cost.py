"""`cost`: what a profile costs on one GPU, by the operations of its programs.

A model, for planning: nothing of it was measured on a GPU. The operations of one optimizer step and
of one evaluation are those that XLA counts in the lowered program, times their numbers. A small
step does not fill a GPU, so that it takes `STEP` at least. Rates that are tried beyond the end of a
grid are not counted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

from .. import models, questions
from ..engine.learn import Learning, optimizer
from ..engine.question import Condition
from ..rundir import RunError
from ..terminal import outcome, show
from ..training.trainer import DeviceData, Trainer
from .answers import chosen
from .config import Cost
from .page import duration

RATE = 2e13
"""Operations per second: a third of what an H100 does in float32 outside its tensor cores."""

STEP = 5e-4
"""Seconds that a step takes at least: about a hundred kernels, one after the other."""

PIECE = 480.0
"""Seconds of a piece, `--minutes 8`."""


class Count(NamedTuple):
    """What a condition computes.

    Attributes:
      steps: Optimizer steps, one after the other.
      operations: All floating point operations; `None` where they were not counted, because the
        condition is no training of `learn` or `tuned`.
    """

    steps: int
    operations: float | None

    @property
    def seconds(self) -> float:
        """What the model says."""
        return max((self.operations or 0.0) / RATE, self.steps * STEP)


def cost(command: Cost) -> int:
    """Prints a row for each question."""
    names = command.names or questions.NAMES
    asked, broken = chosen(command, names, command.config)
    if broken:
        raise RunError(broken[0].failed)
    columns = ("question", "conditions", "steps", "operations", "one GPU, a model", "pieces")
    table = Table(*columns, title=f"cost of the {command.profile} profile")
    total, rest, told = 0.0, 0, []
    for asking in asked:
        conditions = [*asking.question.run(asking.config)]
        counts = [count(condition) for condition in conditions]
        seconds = sum(c.seconds for c in counts)
        known = [c.operations for c in counts if c.operations is not None]
        total, rest = total + seconds, rest + len(counts) - len(known)
        table.add_row(
            asking.name,
            f"{len(known)} of {len(counts)}",
            f"{sum(c.steps for c in counts):,}",
            f"{sum(known):.2g}",
            duration(seconds) if known else "–",
            f"{math.ceil(seconds / PIECE)}" if known else "–",
        )
        told.append(
            {
                "question": asking.name,
                "conditions": len(counts),
                "counted": len(known),
                "steps": sum(c.steps for c in counts),
                "operations": sum(known),
                "seconds": seconds if known else None,
            }
        )
    table.add_section()
    pieces = math.ceil(total / PIECE)
    table.add_row("all", "", "", "", duration(total), str(pieces))
    table.caption = (
        f"{RATE:.0e} operations a second, {1e3 * STEP:g} ms a step at least; {rest} conditions "
        "that are no training of one device were not counted. A piece is --minutes 8"
    )
    show(table)
    outcome(profile=command.profile, questions=told, seconds=total)
    return 0


def count(condition: Condition) -> Count:
    """The operations of a condition, without running it."""
    stages = getattr(condition.measure, "stages", None)
    if stages is None:
        return Count(0, None)
    lanes = max(len(stage.rows) for stage in stages)  # compiled once, for all of them
    step, evaluation = of_net(stages[-1])
    jax.clear_caches()  # programs hold their data, of which there are many
    steps = sum(stage.config.steps for stage in stages)
    evaluations = sum(stage.config.evaluations for stage in stages)
    return Count(steps, lanes * (steps * step + evaluations * evaluation))


def of_net(learning: Learning) -> tuple[float, float]:
    """The operations of a step and of an evaluation of one net, without an instrument."""
    config = learning.config
    data = DeviceData(learning.data, 1)
    options = {name: v for name, v in learning.options.items() if name != "only"}

    def kernels() -> Any:
        return models.draw_kernels(config.model, data.task.classes, range(1), data.probe, **options)

    one = jax.tree.map(lambda v: jnp.zeros((1, *v.shape[1:]), v.dtype), jax.eval_shape(kernels))
    model = models.build(config.model, learning.norm, data.task.classes, **options)
    trainer = Trainer(model, optimizer(config)(config.lr), data, one, synced=True, parts=False)
    state = jax.eval_shape(jax.vmap(trainer.init_one), one)
    state = jax.tree.map(lambda v: jax.ShapeDtypeStruct((1, *v.shape), v.dtype), state)
    indices = jax.ShapeDtypeStruct((1, 1, 1, config.batch_size), jnp.int32)
    step = trainer._train.lower(state, data.inputs, data.labels, indices)
    batches = math.ceil(data.tests / data.task.batch)
    evaluation = trainer._evaluate.lower(state, *data.test, data.probe)  # the loop's body once
    return _operations(step), batches * _operations(evaluation)


def _operations(lowered: Any) -> float:
    found = lowered.cost_analysis()
    return float(found["flops"])
