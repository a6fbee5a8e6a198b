"""A comparison on a Ray cluster: each norm is trained by a worker of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..cluster import Call, Cluster, Ended
from ..data import Dataset

if TYPE_CHECKING:
    from .comparison import Lane, Measured


def turns(
    lanes: Sequence[Lane],
    data: Dataset,
    *,
    address: str,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Lane, Measured]]:
    """Joins a Ray cluster; returns what trains norms there, and what was measured, as it comes.

    One whose worker was killed begins again elsewhere: to the same numbers, of which those that
    came before do not come twice. One that fails says so in its lane.

    Args:
      lanes: The norms.
      data: The data set.
      address: As `ray.init` takes it, or `cluster.LOCAL`.
      say: Receives where the cluster stands.
      warn: Receives what went wrong and was mended.

    Raises:
      RunError: If the cluster does not answer, or its nodes have other versions.
    """
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(address, say=say, warn=warn))
        shared = cluster.share(data)
        calls = [
            Call(
                f"{__package__}.comparison:measure",
                lambda lane=lane: (lane.config, lane.name, shared),
                lane.config.devices,
                len(cores),  # for as many XLA makes the programs of a comparison here
            )
            for lane in lanes
        ]
        found = cluster.run(calls)
        return _followed(lanes, found, stack.pop_all())


def _followed(
    lanes: Sequence[Lane], running: Iterator[tuple[int, Any]], leaving: contextlib.ExitStack
) -> Iterator[tuple[Lane, Measured]]:
    with leaving:
        for number, found in running:
            lane = lanes[number]
            if isinstance(found, Ended):
                lane.failed = found.error
            elif found.step > lane.step:
                yield lane, found
