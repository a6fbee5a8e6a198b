"""A comparison on a Ray cluster: each norm is trained by a worker of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from ..cluster import Call, Cluster, Ended
from ..data import Dataset


def turns(cluster: Cluster, lanes: Sequence[Any], data: Dataset) -> Iterator[tuple[Any, Any]]:
    """Asks the nodes; returns what trains norms there, and each `comparison.Measured` as it comes.

    One whose worker was killed begins again elsewhere: to the same numbers, of which those that
    came before do not come twice. One that fails says so in its lane.

    Args:
      cluster: Where.
      lanes: The norms, each a `comparison.Lane`.
      data: The data set.

    Raises:
      RunError: If nodes of the cluster have other versions.
    """
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
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
    return _followed(lanes, cluster.run(calls))


def _followed(
    lanes: Sequence[Any], running: Iterator[tuple[int, Any]]
) -> Iterator[tuple[Any, Any]]:
    for number, found in running:
        lane = lanes[number]
        if isinstance(found, Ended):
            lane.failed = found.error
        elif found.step > lane.step:
            yield lane, found
