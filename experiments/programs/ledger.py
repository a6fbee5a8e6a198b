"""What synchronization costs: the collectives of one training step, read from its program.

    normlab ledger --norms batch layer --sync all local groups=2
    normlab ledger --model resnet50 --norms batch flax
    normlab ledger --topology v5p:16x16x24    # needs libtpu: pip install 'normlab[tpu]'
    normlab ledger --topology h100:1x128x8    # needs CUDA: pip install 'normlab[cuda]'

A data-parallel step of plain SGD is compiled, for devices of this host or ahead of time for a
machine that need not be here, and what its program says is listed: a row for each norm layer and
direction, one for the parameters' gradients and the loss, and the sum. Nothing runs. Times are
those of a model (`experiments.programs.machines`), for one collective after another.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from normlab.devices.mapped import vary
from normlab.devices.topology import as_sync, plan
from normlab.instruments.collectives import Collective, Entry, Purpose, by_purpose, purpose
from normlab.instruments.programs import Ledger as Program

from .. import models
from ..rundir import RunError, require_effect
from ..training import syncs
from ..training.config import require_mesh
from ..training.trainer import abstract, on_devices, set_devices
from .config import Ledger
from .machines import Machine, machine
from .peers import PEERS

CLASSES = {"resnet50": 1000, "lm": 256}
"""Of ImageNet, and of bytes; else 10."""

IMAGE = {"resnet50": (224, 224, 3)}
"""Of ImageNet; else 28 x 28 pixels of one channel."""

PEERS_SYNC = ("all", "inner", "local")
"""The words of --sync that are an `axis_name`, which is all that peers take."""

SCOPE = "norm"
"""What the compiler calls everything a norm does."""


class Account(NamedTuple):
    """What the program of one norm, topology and machine says.

    Attributes:
      norm, sync: As given.
      machine: What it was compiled for.
      program: What is read of it.
      entries: Its collectives, layer by layer.
      seconds: Time the compiler took.
      asked: Where it asks more devices than there are in a group, in words.
    """

    norm: str
    sync: str
    machine: Machine
    program: Program
    entries: list[Entry]
    seconds: float
    asked: str

    def __str__(self) -> str:
        """The norm, and the topology if it has one."""
        return ", ".join(filter(None, (self.norm, self.sync)))


class Found(NamedTuple):
    """What was asked for, what its programs say, and what was left out, in words."""

    config: Ledger
    accounts: list[Account]
    left_out: list[str]


def compile_all(config: Ledger, say: Callable[[str], None] = lambda _: None) -> Found:
    """Compiles for each machine, norm and topology in turn.

    Args:
      config: What to compile.
      say: Receives short messages about what is going on.

    Raises:
      RunError: For a model, norm, topology or machine that there is not, or that do not fit.
    """
    if config.sync and not any(map(_synced, config.norms)):
        norms = " ".join(config.norms)
        require_effect(config, False, "sync", f"beside --norms {norms}, which measure no batch")
    jax.config.update("jax_platforms", "cpu")
    if not config.topology:
        set_devices(config.devices or DEVICES)
    found = Found(config, [], [])
    for topology in config.topology or (None,):
        there = machine(topology, config.devices or DEVICES)
        for norm in config.norms:
            for sync in config.sync or SYNC if _synced(norm) else ("",):
                if norm in PEERS and sync not in PEERS_SYNC:
                    known = ", ".join(PEERS_SYNC)
                    found.left_out.append(f"{norm}, {sync}: left out; {norm} is there for {known}.")
                    continue
                say(f"compiling {norm} {sync} for {there.name}")
                found.accounts.append(_account(config, norm, sync, there))
    if not found.accounts:
        raise RunError("--norms: nothing is left to compile. " + " ".join(found.left_out))
    return found


DEVICES = 8
"""Of this host, where none are given."""

SYNC = ("all", "local")
"""What is compiled where none is given."""

CONTEXT = 1024
"""Tokens of an example, where none are given."""

HEADINGS = (
    "norm, sync",
    "machine",
    "what",
    "collectives",
    "bytes",
    "received",
    "groups",
    "algorithm",
    "µs, modelled",
    "MiB, temporary",
)
ALWAYS = ("norm, sync", "what", "collectives", "bytes")


def table(found: Found) -> Iterator[tuple[str, ...]]:
    """Headings, then the rows; of the columns that say nothing none but those of `ALWAYS`."""
    several = len({account.machine.name for account in found.accounts}) > 1
    rows = []
    for account in found.accounts:
        whole, entries = account.program, _shown(found.config, account.entries)
        what = (Purpose(f"whole {found.config.program}"),)
        totals = [Entry(what, False, whole.steady)]
        totals += [Entry(what, True, whole.when_needed)] if whole.when_needed else []
        used = account.program.memory["temporary"]
        for i, entry in enumerate((*entries, *totals)):
            there = account.machine if several and not i else None
            name = there and f"{there.name} ({len(there.devices)})"
            temporary = f"{used / 2**20:.2f}" if entry is totals[0] else ""
            row = _row(account.machine, entry, entry in totals)
            rows.append(("" if i else str(account), name or "", *row, temporary))
    kept = [k for k, h in enumerate(HEADINGS) if h in ALWAYS or any(row[k] for row in rows)]
    for row in (HEADINGS, *rows):
        yield tuple(row[k] for k in kept)


def remarks(found: Found) -> Iterator[str]:
    """What the table does not say of itself."""
    config = found.config
    machines = {account.machine.name: account.machine for account in found.accounts}
    said = f"{config.program} of {config.model} in {config.mode}, {config.per_device} examples a "
    said += f"device, on {', '.join(machines)}. Bytes: what each device puts in."
    if any(one.received > one.nbytes for a in found.accounts for one in a.program.collectives):
        said += " Received: where that is another number, of a gather a row from each device."
    if any(there.network for there in machines.values()):
        said += " Times are those of an α-β model (docs/ledger.md). They are not measurements."
    if any(account.program.when_needed for account in found.accounts):
        said += " What runs when needed (in a conditional) is in no sum of what always runs."
    yield said
    yield from found.left_out
    for account in found.accounts:
        memory = {kind: n for kind, n in account.program.memory.items() if kind != "aliased"}
        parts = [f"{nbytes / 2**20:.2f} MiB {kind}" for kind, nbytes in memory.items()]
        name = f"{account} on {account.machine.name}" if len(machines) > 1 else str(account)
        yield f"{name}: on each device {', '.join(parts)}; compiled in {account.seconds:.1f} s"
    for account in found.accounts:
        if account.asked:
            yield f"Warning: {account}: {account.asked}"


def _account(config: Ledger, norm: str, sync: str, there: Machine) -> Account:
    count = len(there.devices)
    sizes = config.mesh or (count,)
    require_mesh(sizes, count)
    names = (config.axes,) if isinstance(config.axes, str) else config.axes
    mesh = Mesh(np.array(there.devices).reshape(sizes), names, (AxisType.Auto,) * len(names))
    backend = {"cuda": "gpu"}.get(there.target, there.target)  # who asks JAX for its own hears this
    try:
        with mock.patch.object(jax, "default_backend", return_value=backend), jax.set_mesh(mesh):
            f, arguments = program(config, norm, sync, mesh)
            lowered = f.lower(*arguments)
    except ValueError as error:
        raise RunError(f"--norms {norm} --sync {sync}: {error}") from None
    begin = time.perf_counter()
    try:
        found = nl.instruments.ledger(lowered)
    except jax.errors.JaxRuntimeError as error:  # the compiler's own, of memory above all
        said = str(error).splitlines()[0]
        raise RunError(
            f"--norms {norm} --sync {sync}: {there.name} cannot have this step: {said} "
            "Try a smaller --per-device, or another machine."
        ) from None
    seconds = time.perf_counter() - begin
    entries = by_purpose(found.collectives, purposes)
    size = group_size(syncs.parse(sync, config.axes, count), config, mesh) if sync else None
    channels = _channels(arguments[1], 1 if config.mode == "jit" else count)
    asked = "" if size is None else asked_of_others(entries, size, channels)
    return Account(norm, sync, there, found, entries, seconds, asked)


def purposes(one: Collective) -> tuple[Purpose, ...]:
    """What a collective is for, from where it came."""
    found = dict.fromkeys(_purpose(name, name in one.ends) for name in one.names)
    named = sorted((p for p in found if p.what != "other"), key=lambda p: not p.direction)
    return tuple(named) or (Purpose("other"),)


def _purpose(name: str, last: bool) -> Purpose:
    """A norm layer by name, forward or backward; or another purpose, one of `OTHERS`."""
    backward = "transpose(" in name
    path = purpose(name).what.split("/")
    if SCOPE in path:
        # In plain jit the compiler sums the gradients of g and b, too. What nothing is made of
        # that is summed later, as a kernel's gradient is of the statistics', is such a sum.
        mapped = "shard_map" in name[: name.rindex(f"/{SCOPE}")]
        if mapped or not backward or not last:
            layer = "/".join(path[: path.index(SCOPE)][1:])  # but for the model
            return Purpose(layer, "backward" if backward else "forward")
    for what in OTHERS:
        if re.search(rf"\b{what}\b", name):
            return Purpose(what)
    return Purpose("gradients" if backward else "other")


OTHERS = ("exchange", "gradients", "loss")
"""What else is asked: delayed statistics, the parameters' gradients, the loss."""


def _shown(config: Ledger, entries: Sequence[Entry]) -> list[Entry]:
    """The entries as rows: all, those of all layers together, or none."""
    layers = {p.what for entry in entries for p in entry.purposes if p.direction}
    by = config.by if config.by != "auto" else "layer" if len(layers) <= 8 else "direction"
    if by == "layer":
        return list(entries)
    if by == "step":
        return []
    merged: dict[tuple[tuple[Purpose, ...], bool], list[Collective]] = {}
    for entry in entries:
        alike = (Purpose("norms", p.direction) if p.direction else p for p in entry.purposes)
        key = tuple(dict.fromkeys(alike)), entry.when_needed
        merged.setdefault(key, []).extend(entry.collectives)
    return [Entry(*key, tuple(each)) for key, each in merged.items()]


# --- Who is asked -----------------------------------------------------------------------------


def group_size(
    asked: nl.Sync | str | tuple[str, ...] | None, config: Ledger, mesh: Mesh
) -> int | None:
    """How many devices normalize together at most; `None` for all along the axes of the mesh."""
    sync = as_sync(asked)
    sizes = [mesh.shape[name] for name in sync.names]
    if sync.whole:
        return math.prod(sizes) if math.prod(sizes) < mesh.devices.size else None
    cut = plan("ledger", sync, sizes, config.per_device)
    if cut.members is None:
        return 1
    return max(len({shard // cut.shards for shard in row}) for row in cut.members)


def asked_of_others(entries: Sequence[Entry], group: int, channels: Mapping[str, int]) -> str:
    """Which norms ask more devices than those of a group, for the group's sake; empty if none.

    The running statistics are those of all devices, so one sum over all is right forward: of a
    count, a mean and a variance for each channel at most. A gather, whose result has a row of each
    device, a larger sum, and any backward are not.

    Args:
      entries: The collectives.
      group: How many devices normalize together.
      channels: Of each layer.
    """
    found = []
    for entry in entries:
        if not all(p.direction for p in entry.purposes):
            continue  # sent with what all devices are to know
        enough = 4 * sum(3 * channels.get(p.what, 2**31) + 8 for p in entry.purposes)
        for one in entry.collectives:
            wide = one.kind != "collective-permute" and max(map(len, one.groups)) > group
            backward = all(p.direction == "backward" for p in entry.purposes)
            if wide and (backward or one.kind == "all-gather" or one.nbytes > enough):
                found.append((entry, max(map(len, one.groups))))
    if not found:
        return ""
    said = ", ".join(dict.fromkeys(str(entry) for entry, _ in found[:3]))
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"{said}{more} ask {max(n for _, n in found)} devices, and what normalizes is of {group}; "
        "their bytes or results grow with the number of devices. Groups that are an axis of the "
        "mesh (--mesh, --sync inner) ask each other alone."
    )


def _channels(states: Any, devices: int) -> dict[str, int]:
    """The channels of each layer, from the states of the norms."""
    found: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(states):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        layer = "/".join(name for name in names if name != "norm")
        found[layer] = max(found.get(layer, 0), math.prod(leaf.shape) // devices)
    return found


# --- The program ------------------------------------------------------------------------------


class Named(nl.Norm):
    """A norm whose instructions carry `SCOPE` in their names; made of another's two functions."""

    def apply(self, *args: Any, **options: Any) -> Any:
        """As `Norm.apply`."""
        with jax.named_scope(SCOPE):
            return super().apply(*args, **options)


def program(config: Ledger, norm: str, sync: str, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The program to compile, and its abstract arguments.

    `program(params, norm_state, inputs, labels)`: parameters are alike on all devices; the norms'
    states are `[devices, ...]`, since the devices' may differ, but in plain jit.
    """
    count = mesh.devices.size
    model = _model(config, norm, sync, count)
    inputs, labels = _example(config)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)
    params, state = models.split(variables)
    axes = config.axes
    asked = syncs.parse(sync, axes, count) if sync else None
    step = _steps(model, () if config.mode == "jit" else axes, asked)[config.program]
    alike, split = (NamedSharding(mesh, spec) for spec in (P(), P(axes)))
    shapes = (inputs, labels)
    if config.mode == "jit":
        batch = jax.tree.map(lambda v: v.update(shape=(count * v.shape[0], *v.shape[1:])), shapes)
        arguments = (abstract(params, alike), abstract(state, alike), *abstract(batch, split))
        return jax.jit(step), arguments

    def own(params: Any, *args: Any) -> Any:
        # Each device has its own gradients: the step sums them.
        return step(vary(params, mesh.axis_names), *args)

    mapped = on_devices(config.mode, mesh, own, in_axes=(None, 0, 0, 0))
    return mapped, (abstract(params, alike), *abstract((state, *shapes), split, count))


def _example(config: Ledger) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """A batch of one device: images or tokens, and their labels."""
    if models.reads_text(config.model):
        tokens = jax.ShapeDtypeStruct((config.per_device, config.context or CONTEXT), jnp.int32)
        return tokens, tokens
    size = config.image or IMAGE.get(config.model, (28, 28, 1))
    images = jax.ShapeDtypeStruct((config.per_device, *size), jnp.float32)
    return images, jax.ShapeDtypeStruct((config.per_device,), jnp.int32)


def _steps(
    model: nn.Module, axis: str | tuple[str, ...], sync: nl.Sync | str | tuple[str, ...] | None
) -> dict[str, Callable[..., Any]]:
    def loss(params: Any, state: Any, inputs: Array, labels: Array) -> tuple[Array, Any]:
        logits, changed = model.apply(
            {"params": params, models.STATE: state}, inputs, train=True, mutable=[models.STATE]
        )
        with jax.named_scope("loss"):
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), changed.get(models.STATE, state)

    def both(params: Any, state: Any, inputs: Array, labels: Array) -> Any:
        return jax.value_and_grad(loss, has_aux=True)(params, state, inputs, labels)

    def step(params: Any, state: Any, inputs: Array, labels: Array) -> Any:
        (value, state), grads = both(params, state, inputs, labels)
        if axis:
            with jax.named_scope("gradients"):
                flat, unravel = ravel_pytree(grads)
                grads = unravel(lax.pmean(flat, axis))
            with jax.named_scope("loss"):
                value = lax.pmean(value, axis)
        if isinstance(sync, nl.Sync) and sync.every:
            with jax.named_scope("exchange"):
                state = nl.population.exchange(state, sync)
        return jax.tree.map(lambda v, g: v - 0.1 * g, params, grads), state, value

    return {"forward": loss, "both": both, "step": step}


def _model(config: Ledger, name: str, sync: str, count: int) -> nn.Module:
    mapped, classes = config.mode != "jit", CLASSES.get(config.model, 10)
    if name in PEERS:
        along = {"all": config.axes, "inner": config.axes[-1]}
        peer = PEERS[name](along.get(sync) if mapped else None)
        norm = dataclasses.replace(peer, call=jax.named_scope(SCOPE)(peer.call))
    else:
        options: dict[str, Any] = {"group": {"groups": 4}}.get(name, {})
        if _synced(name):
            options["axis_name"] = syncs.parse(sync, config.axes, count, mapped=mapped)
        made = nl.get(name, **options)
        norm = Named(made.init, made.parts)
    return models.build(config.model, norm, classes, **config.model_options)


def _synced(norm: str) -> bool:
    """Whether a norm merges its statistics over devices in every step."""
    if norm in PEERS:
        return True
    try:
        options = inspect.signature(nl.row(norm).factory).parameters
    except ValueError as error:
        raise RunError(f"--norms {norm}: {error}") from None
    return {"axis_name", "decay"} <= set(options)


# --- What is printed --------------------------------------------------------------------------


def _row(there: Machine, entry: Entry, whole: bool) -> tuple[str, ...]:
    times = [modelled(there, one) for one in entry.collectives]
    modelled_all = there.network and None not in times
    return (
        *entry.cells,
        "" if whole else entry.distinct(lambda one: one.shape),
        "" if whole else entry.distinct(lambda one: one.algorithm),
        f"{1e6 * sum(filter(None, times)):.1f}" if modelled_all else "",
    )


def modelled(there: Machine, one: Collective) -> float | None:
    """The modelled seconds of a collective, however often it runs; `None` without a model."""
    seconds = there.seconds(one.kind, one.nbytes, one.groups, one.algorithm)
    return None if seconds is None else seconds * one.times


def as_json(config: Ledger, account: Account) -> dict[str, Any]:
    """A program and its collectives as JSON values; times are in seconds."""
    return {
        "norm": account.norm,
        "sync": account.sync,
        "machine": account.machine.name,
        "config": dataclasses.asdict(config),
        "devices": len(account.machine.devices),
        "memory_bytes": account.program.memory,
        "flops": account.program.flops,
        "compile_seconds": account.seconds,
        "asked_of_others": account.asked,
        "collectives": [
            {
                "purposes": list(map(str, entry.purposes)),
                **one._asdict(),
                "modelled_seconds": modelled(account.machine, one),
            }
            for entry in account.entries
            for one in entry.collectives
        ],
    }
