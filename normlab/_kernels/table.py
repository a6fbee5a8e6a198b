"""Where a kernel is faster than what XLA makes: what `implementation="auto"` goes by.

A row is added where a clock was read on that chip (`normlab bench bytes --targets
here`, with its numbers in docs/speed.md), or where a whole block of a net moves a quarter less
(`bench bytes`). None is: no accelerator's clock was read, and all norms of a transformer block are
a tenth of what it moves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Faster(NamedTuple):
    """Norms by example that a kernel is faster for.

    Attributes:
      chip: How JAX calls it, from the beginning: "TPU v5", "NVIDIA H100".
      centred: Whether they have a mean.
      groups: Into how many groups the channels are cut.
      dtype: Of x.
      least: Values of an example.
      most: Values of an example.
    """

    chip: str
    centred: bool
    groups: int
    dtype: str
    least: int
    most: int


TABLE: tuple[Faster, ...] = ()


def faster(dtype: Any, values: int, groups: int, centred: bool) -> bool:
    """Whether a row is for such examples, on the device that programs here are for."""
    chip = jax.devices()[0].device_kind if TABLE else ""
    return any(
        chip.startswith(row.chip)
        and (row.centred, row.groups, row.dtype) == (centred, groups, str(dtype))
        and row.least <= values <= row.most
        for row in TABLE
    )
