"""Machines that need not be here: how to compile for them, and a model of their networks.

A topology is a name and the sizes of a machine: `v5p:16x16x24` is a torus of 6144 TPU chips,
`h100:1x128x8` one cluster of 128 hosts with 8 GPUs each. The time of a collective is that of an
α-β model: α seconds for each hop or step on the way, and bytes / β for what passes the slowest
place. It is a model. It knows nothing of congestion, of what overlaps with computing, nor of the
time to start a kernel; nothing here was measured on the machines.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from normlab.errors import nearest

from ..rundir import RunError

TARGETS = {"cpu": "", "tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}
"""What can be compiled for, and the module that holds the compiler, if it is not jaxlib's."""


class Missing(RuntimeError):
    """The compiler of a target is not installed; the text says how to install it."""


_H100 = """
platform_name: "CUDA"
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
"""What the compiler asks of a GPU: an H100 SXM's properties, as CUDA reports them."""


def missing(target: str) -> str:
    """Returns the command that installs the compiler of a target; empty where it is installed."""
    module = TARGETS[target]
    try:
        installed = not module or importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that would hold it
        installed = False
    return "" if installed else f"pip install 'normlab[{target}]'"


class Torus(NamedTuple):
    """TPU chips, each linked to its neighbours.

    Attributes:
      link: β of one link in one direction, bytes per second: the bandwidth of a chip, in both
        directions and over all its ports, divided by two and by the ports.
      wraps: A dimension of so many chips, or with `multiples` a multiple of it, is a ring;
        any other is a line.
      multiples: See `wraps`.
      hop: α, seconds for each link on the way.
    """

    link: float
    wraps: int
    multiples: bool
    hop: float = 1e-6

    def ring(self, length: int, extent: int) -> bool:
        """Whether `extent` chips in a row of `length` are a ring."""
        whole = length % self.wraps == 0 if self.multiples else length == self.wraps
        return whole and extent == length


class Protocol(NamedTuple):
    """One of NCCL's: seconds to start a ring or a tree, and for a step within and between hosts."""

    ring: tuple[float, float, float]
    tree: tuple[float, float, float]
    share: float  # of the bandwidth


class Cluster(NamedTuple):
    """Hosts of GPUs: all linked within a host, one network adapter for each GPU between hosts."""

    within: float  # β in one direction, bytes per second of a GPU
    between: float  # and of an adapter
    protocols: tuple[Protocol, ...]


# α: "How to Scale Your Model" (Austin et al. 2025, part 3, "A note on ICI latency"): typically
# around 1 µs per hop. Its authors measured 8 µs where that model says 3.
# β: Google's "TPU system architecture" pages give a chip's bandwidth over all its ports in both
# directions, in GB/s: v5e 400 over 4 ports, v5p 1200 over 6, v6e 800 over 4, TPU7x 1200 over 6;
# of v4, "TPU v4" (Jouppi et al. 2023, table 4) has 6 links of 50 GB/s.
# Rings: v4, v5p and TPU7x close dimensions that are multiples of 4, v5e and v6e those of 16 chips.
TPUS = {
    "v4": Torus(50e9, 4, True),
    "v5e": Torus(50e9, 16, False),
    "v5p": Torus(100e9, 4, True),
    "v6e": Torus(100e9, 16, False),
    "tpu7x": Torus(100e9, 4, True),
}

# α: the table by which NCCL itself chooses an algorithm (src/graph/tuning.cc, baseLat and hwLat, of
# NCCL 2.20), for the protocols LL, LL128 and Simple; a step within a host waits for the network's
# overhead of 1 µs (3 µs in Simple) where a ring has several hosts. β: an H100 SXM has 900 GB/s of
# NVLink in both directions (NVIDIA's data sheet), a DGX H100 an adapter of 400 Gb/s for each GPU.
GPUS = {
    "h100": Cluster(
        450e9,
        50e9,
        (
            Protocol((6.6e-6, 0.6e-6, 2.7e-6), (6.8e-6, 0.6e-6, 5.0e-6), 1 / 4),
            Protocol((14e-6, 1.9e-6, 4.0e-6), (14e-6, 1.25e-6, 8.5e-6), 0.92),
            Protocol((8.4e-6, 3.4e-6, 14e-6), (0.0, 28e-6, 28e-6), 1.0),
        ),
    )
}


class Machine(NamedTuple):
    """The devices of a machine, and where they stand.

    Attributes:
      name: The topology, or how many devices this host has.
      target: A name of `TARGETS`.
      devices: In the order in which they are numbered.
      places: Of each, its coordinates: in the torus, or `(host, GPU)`.
      network: What joins them; `None` of this host's.
    """

    name: str
    target: str
    devices: Sequence[Any]
    places: Sequence[tuple[int, ...]]
    network: Torus | Cluster | None

    def seconds(
        self, kind: str, nbytes: int, groups: Sequence[Sequence[int]], algorithm: str = ""
    ) -> float | None:
        """The modelled time of a collective; `None` where there is no model.

        Args:
          kind: `"all-gather"` and so on.
          nbytes: What each device puts in.
          groups: The numbers of the devices that work together; the slowest group counts.
          algorithm: What the compiler says of it: on a TPU, whether it is one ring of all.
        """
        if self.network is None or kind not in _ROUNDS:
            return None
        alike: dict[Any, list[tuple[int, ...]]] = {}
        for group in groups:
            there = [self.places[i] for i in group]
            corner = [min(axis) for axis in zip(*there, strict=True)]
            shape = tuple(tuple(p - c for p, c in zip(q, corner, strict=True)) for q in there)
            alike.setdefault(shape, there)
        several = [there for there in alike.values() if len(there) > 1]
        if isinstance(self.network, Torus):
            ring = re.search(r"SinglePhaseRing|\bRing, phases: 1\b", algorithm) is not None
            times = (_torus_time(self, kind, nbytes, there, ring) for there in several)
        else:
            times = (_cluster_time(self, kind, nbytes, there) for there in several)
        return max(times, default=0.0)


_ROUNDS = {
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-reduce": 2,  # a reduce-scatter and an all-gather
    "all-to-all": 1,
    "collective-permute": 1,
    "collective-broadcast": 1,
}


def _moved(kind: str, nbytes: int, count: int) -> float:
    """What passes a device in one round, of the whole array in question."""
    if kind == "collective-permute":
        return nbytes
    whole = nbytes * count if kind == "all-gather" else nbytes
    return whole * (count - 1) / count


def _torus_time(
    m: Machine, kind: str, nbytes: int, there: Sequence[tuple[int, ...]], ring_of_all: bool
) -> float:
    """Dimension by dimension, in both directions of every ring, all dimensions' links in use.

    Or in one ring of all, as if the next were always a neighbour. A permute's messages go the
    shorter way round, and a link passes on as many of them as that way is long.
    """
    assert isinstance(m.network, Torus)
    if kind == "collective-permute":
        hops = 0
        for axis, whole in zip(zip(*there, strict=True), zip(*m.places, strict=True), strict=True):
            far, length = max(axis) - min(axis), max(whole) + 1
            hops += min(far, length - far) if m.network.ring(length, length) else far
        return hops * (m.network.hop + nbytes / m.network.link)
    hops, links = 0, 0
    for axis, whole in zip(zip(*there, strict=True), zip(*m.places, strict=True), strict=True):
        extent = max(axis) - min(axis) + 1
        if extent > 1:
            ring = m.network.ring(max(whole) + 1, extent)
            hops += extent // 2 if ring else extent - 1
            links += 2 if ring else 1
    if ring_of_all:
        hops, links = len(there) // 2, 2
    through = _moved(kind, nbytes, len(there)) / (m.network.link * max(links, 1))
    return _ROUNDS[kind] * (m.network.hop * max(hops, 1) + through)


def _cluster_time(m: Machine, kind: str, nbytes: int, there: Sequence[tuple[int, ...]]) -> float:
    """The faster of NCCL's rings and, for an all-reduce, trees, over its protocols."""
    assert isinstance(m.network, Cluster)
    hosts = len({host for host, _ in there})
    each = -(-len(there) // hosts)
    beta = m.network.within
    if hosts > 1:
        beta = min(beta, each * m.network.between)
    steps = _ROUNDS[kind] * (len(there) - 1)
    between = 0 if hosts == 1 else 2 * hosts if kind == "all-reduce" else hosts - 1
    between = min(between, steps)
    times = []
    for protocol in m.network.protocols:
        start, inner, outer = protocol.ring
        if hosts > 1:
            inner = max(inner, 3e-6 if protocol.share == 1 else 1e-6)
        through = _ROUNDS[kind] * _moved(kind, nbytes, len(there)) / (beta * protocol.share)
        times.append(start + (steps - between) * inner + between * outer + through)
        if kind == "all-reduce":
            start, inner, outer = protocol.tree
            climb = 2 * ((each - 1) * inner + math.ceil(math.log2(hosts)) * outer)
            times.append(start + climb + 2 * nbytes / (beta * protocol.share))
    return min(times)


def compile_for(target: str, topology: str) -> Sequence[Any]:
    """The devices of a topology, to compile for; of a CPU, those that are here.

    Call this in a process with JAX_PLATFORMS=cpu, so that JAX does not look for the hardware.

    Args:
      target: One of `TARGETS`.
      topology: As the compiler names it; of a GPU with slices x hosts x GPUs behind the colon.

    Raises:
      Missing: If the target's compiler is not installed.
    """
    if command := missing(target):
        raise Missing(f"there is no compiler for {target!r} here; to install it: {command}")
    if target == "cpu":
        return jax.devices("cpu")
    if target == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no cloud to ask which TPU this is
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # nor what else there is
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # any; the topology decides
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # processes share the compiler
        return topologies.get_topology_desc(topology, "tpu").devices
    options = {"target_config": _H100, "topology": topology.partition(":")[2]}
    return topologies.get_topology_desc("h100", target, **options).devices


def machine(topology: str | None, devices: int) -> Machine:
    """The machine of a topology; of `None`, the first `devices` devices of this host.

    Args:
      topology: As in `TPUS` and `GPUS`, `v5p:16x16x24`.
      devices: How many there are here.

    Raises:
      RunError: For a topology that there is not, or whose compiler is not installed.
    """
    if topology is None:
        return Machine(f"{devices} devices here", "cpu", jax.devices()[:devices], (), None)
    kind, _, sizes = topology.partition(":")
    known = {**TPUS, **GPUS}
    if kind not in known:
        raise RunError(f"--topology {topology}: unknown machine {kind!r}: {nearest(kind, known)}.")
    target = "tpu" if kind in TPUS else "cuda"
    shape = [int(n) if n.isdecimal() else 0 for n in sizes.split("x")]
    rank = 2 if kind in ("v5e", "v6e") else 3
    if len(shape) != rank or min(shape) < 1:
        example = (
            {2: f"{kind}:16x16", 3: f"{kind}:4x4x8"}[rank] if target == "tpu" else "h100:1x4x8"
        )
        raise RunError(
            f"--topology {topology}: {rank} sizes were expected, as in {example}"
            + ("." if target == "tpu" else " (slices x hosts x GPUs).")
        )
    jax.config.update("jax_platforms", "cpu")  # or JAX would look for the hardware
    try:
        found = compile_for(target, topology)
    except Missing as error:
        raise RunError(f"--topology {topology}: {error}") from None
    except (RuntimeError, ValueError) as error:  # the compiler's own checks
        said = str(error).splitlines()[0]
        raise RunError(
            f"--topology {topology}: the compiler knows no such machine: {said}"
        ) from None
    if target == "tpu":
        places = [tuple(device.coords) for device in found]
    else:
        places = [(i // shape[2], i % shape[2]) for i in range(len(found))]
    return Machine(topology, target, found, places, known[kind])
