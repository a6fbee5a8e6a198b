"""Kernels of programs over several devices in plain `jit`, where XLA decides what lies where.

XLA cannot cut a kernel: it would gather x on every device. Examples are independent, so that each
device can run the kernel on its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def by_examples(f: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """Returns `f`, run by each device on its examples.

    Arrays of two axes or more have the examples first, and stay where these are; other axes are
    whole on each device, so that channels on several are gathered. Arrays of one axis are on all
    devices; as results they are sums over the examples, which the devices add up. Examples that
    the devices do not divide are gathered.

    Args:
      f: Of arrays, the first of which has examples; returns a tuple of arrays.
    """

    def run(*arrays: Array) -> tuple[Array, ...]:
        call = custom_partitioning(f)
        results = jax.eval_shape(f, *arrays)
        factors = (f"f{i}" for i in itertools.count())

        def axes(v: Any) -> list[str]:
            each = list(itertools.islice(factors, v.ndim))
            return ["n", *each[1:]] if v.ndim > 1 else each

        given, found = [axes(v) for v in arrays], [axes(v) for v in results]
        rule = " -> ".join(", ".join(map(" ".join, side)) for side in (given, found))
        whole = tuple(name for each in (*given, *found) for name in each if name != "n")
        call.def_partition(
            partition=_partition(f),
            sharding_rule=rule,
            need_replication_factors=whole,
        )
        return call(*arrays)

    return run


def _partition(f: Callable[..., tuple[Array, ...]]) -> Callable[..., Any]:
    def partition(mesh: Any, given: Any, found: Any) -> Any:
        spec = given[0].sharding.spec
        along = spec[0] if spec else None
        names = along if isinstance(along, tuple) else (along,) if along else ()
        if given[0].shape[0] % math.prod(mesh.shape[name] for name in names):
            names = ()

        def place(v: Any) -> NamedSharding:
            first = (names,) if names and len(v.shape) > 1 else ()
            return NamedSharding(mesh, PartitionSpec(*first))

        def own(*arrays: Array) -> tuple[Array, ...]:
            results = f(*arrays)
            if not names:
                return results
            return tuple(v if v.ndim > 1 else jax.lax.psum(v, names) for v in results)

        return mesh, own, tuple(map(place, found)), tuple(map(place, given))

    return partition
