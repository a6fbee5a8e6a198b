"""What synchronization costs: the collectives of one training step, read from its program.

    python -m experiments ledger --norms batch layer --sync all local groups=2
    python -m experiments ledger --topology v5p:16x16x24    # needs libtpu: pip install -e '.[tpu]'
    python -m experiments ledger --topology h100:1x128x8    # needs CUDA: pip install -e '.[cuda]'

A data-parallel step of plain SGD is compiled, for devices of this host or ahead of time for a
machine that need not be here, and what its program says is listed: a row for each norm layer and
direction, one for the parameters' gradients and the loss, and the sum. Nothing runs. Times are
those of a model (`experiments.programs.machines`), for one collective after another.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator
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

from .. import models
from ..rundir import RunError
from ..training import syncs
from ..training.config import require_mesh
from ..training.trainer import on_devices, set_devices
from .collectives import Collective, collectives, shape_of
from .config import Ledger
from .machines import Machine, abstract, machine

CLASSES = 10
SCOPE = "norm"
"""What the compiler calls everything a norm does."""


class Purpose(NamedTuple):
    """What a collective is for.

    Attributes:
      what: A norm layer by name, `"gradients"` (of the parameters), `"exchange"` (of delayed
        statistics), `"loss"` or `"other"`.
      direction: Of a norm layer, `"forward"` or `"backward"`.
    """

    what: str
    direction: str = ""

    def __str__(self) -> str:
        """In words."""
        return f"{self.what} {self.direction}".strip()


class Entry(NamedTuple):
    """The collectives of one purpose; of several where the compiler made one of several."""

    purposes: tuple[Purpose, ...]
    collectives: tuple[Collective, ...]


class Account(NamedTuple):
    """What the program of one norm and topology says.

    Attributes:
      norm, sync: As given.
      entries: Layer by layer.
      memory: Bytes a device holds: of arguments, results, temporaries and code.
      seconds: Time the compiler took.
    """

    norm: str
    sync: str
    entries: list[Entry]
    memory: dict[str, int]
    seconds: float

    def __str__(self) -> str:
        """The norm, and the topology if it has one."""
        return ", ".join(filter(None, (self.norm, self.sync)))


class Found(NamedTuple):
    """What was asked for, the machine, and what its programs say."""

    config: Ledger
    machine: Machine
    accounts: list[Account]


def compile_all(config: Ledger, say: Callable[[str], None] = lambda _: None) -> Found:
    """Compiles for each norm and topology in turn, and writes the JSON that was asked for.

    Args:
      config: What to compile.
      say: Receives short messages about what is going on.

    Raises:
      RunError: For a model, norm, topology or machine that there is not, or that do not fit.
    """
    jax.config.update("jax_platforms", "cpu")
    if config.topology is None:
        set_devices(config.devices)
    there = machine(config.topology, config.devices)
    found = Found(config, there, [])
    for norm in config.norms:
        synced = _synced(norm)
        for sync in config.sync if synced else ("",):
            say(f"compiling {norm} {sync}")
            found.accounts.append(_account(config, norm, sync, there))
    if config.json:
        content = [_as_json(config, account, there) for account in found.accounts]
        try:
            config.json.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise RunError(f"--json: cannot write {config.json}: {error.strerror}.") from error
    return found


def table(found: Found) -> Iterator[tuple[str, ...]]:
    """Headings, then the rows; the algorithm and the model only where there are any."""
    headings = ("norm, sync", "what", "collectives", "bytes", "groups", "algorithm", "µs, modelled")
    rows = []
    for account in found.accounts:
        whole = [one for entry in account.entries for one in entry.collectives]
        total = Entry((Purpose(f"whole {found.config.program}"),), tuple(whole))
        entries = [*account.entries, total]
        for i, entry in enumerate(entries):
            rows.append(("" if i else str(account), *_row(found.machine, entry)))
    used = [k for k in range(len(headings)) if k < 5 or any(row[k] for row in rows)]
    for row in (headings, *rows):
        yield tuple(row[k] for k in used)


def remarks(found: Found) -> Iterator[str]:
    """What the table does not say of itself."""
    config = found.config
    said = f"{config.program} of {config.model} in {config.mode}, {config.batch_size} examples a "
    said += f"device, on {found.machine.name}. Bytes: what each device puts in."
    if found.machine.network:
        said += " Times are those of an α-β model (docs/ledger.md). They are not measurements."
    yield said
    for account in found.accounts:
        parts = [f"{nbytes / 2**20:.2f} MiB {kind}" for kind, nbytes in account.memory.items()]
        yield f"{account}: on each device {', '.join(parts)}; compiled in {account.seconds:.1f} s"


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
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    found: dict[tuple[Purpose, ...], list[Collective]] = {}
    for one in collectives(compiled, count):
        found.setdefault(purposes(one), []).append(one)
    order = {"forward": 0, "backward": 1, "": 2}
    entries = [Entry(key, tuple(found[key])) for key in found]
    entries.sort(key=lambda entry: order[entry.purposes[0].direction])
    used = compiled.memory_analysis()
    memory = {
        "arguments": used.argument_size_in_bytes,
        "results": used.output_size_in_bytes,
        "temporary": used.temp_size_in_bytes,
        "code": used.generated_code_size_in_bytes,
    }
    return Account(norm, sync, entries, memory, seconds)


def purposes(one: Collective) -> tuple[Purpose, ...]:
    """What a collective is for, from where it came."""
    found = dict.fromkeys(_purpose(name, one.last) for name in one.names)
    named = sorted((p for p in found if p.what != "other"), key=lambda p: not p.direction)
    return tuple(named) or (Purpose("other"),)


def _purpose(name: str, last: bool) -> Purpose:
    backward = "transpose(" in name
    if layer := re.search(rf"(\w+)\)*/{SCOPE}\b", name):
        # In plain jit the compiler sums the gradients of g and b, too. What nothing is made of
        # that is summed later, as a kernel's gradient is of the statistics', is such a sum.
        mapped = "shard_map" in name[: layer.start()]
        if mapped or not backward or not last:
            return Purpose(layer[1], "backward" if backward else "forward")
    for what in ("exchange", "gradients", "loss"):
        if re.search(rf"\b{what}\b", name):
            return Purpose(what)
    return Purpose("gradients" if backward else "other")


# --- The program ------------------------------------------------------------------------------


class Named(nl.Norm):
    """A norm whose instructions carry `SCOPE` in their names; made of another's two functions."""

    def apply(self, *args: Any, **options: Any) -> Any:
        """As `Norm.apply`."""
        with jax.named_scope(SCOPE):
            return super().apply(*args, **options)


def program(config: Ledger, norm: str, sync: str, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The program to compile, and its abstract arguments.

    `program(params, norm_state, images, labels)`: parameters are alike on all devices; the norms'
    states are `[devices, ...]`, since the devices' may differ, but in plain jit.
    """
    count = mesh.devices.size
    model = _model(config, norm, sync, count)
    images = jax.ShapeDtypeStruct((config.batch_size, 28, 28, 1), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    params, state = models.split(variables)
    axes = config.axes
    asked = syncs.parse(sync, axes, count) if sync else None
    step = _steps(model, () if config.mode == "jit" else axes, asked)[config.program]
    alike, split = (NamedSharding(mesh, spec) for spec in (P(), P(axes)))
    shapes = (images, jax.ShapeDtypeStruct((config.batch_size,), jnp.int32))
    if config.mode == "jit":
        batch = jax.tree.map(lambda v: v.update(shape=(count * v.shape[0], *v.shape[1:])), shapes)
        arguments = (abstract(params, alike), abstract(state, alike), *abstract(batch, split))
        return jax.jit(step), arguments

    def own(params: Any, *args: Any) -> Any:
        # Each device has its own gradients: the step sums them.
        return step(vary(params, mesh.axis_names), *args)

    mapped = on_devices(config.mode, mesh, own, in_axes=(None, 0, 0, 0))
    return mapped, (abstract(params, alike), *abstract((state, *shapes), split, count))


def _steps(
    model: nn.Module, axis: str | tuple[str, ...], sync: nl.Sync | str | tuple[str, ...] | None
) -> dict[str, Callable[..., Any]]:
    def loss(params: Any, state: Any, images: Array, labels: Array) -> tuple[Array, Any]:
        logits, changed = model.apply(
            {"params": params, models.STATE: state}, images, train=True, mutable=[models.STATE]
        )
        with jax.named_scope("loss"):
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), changed.get(models.STATE, state)

    def both(params: Any, state: Any, images: Array, labels: Array) -> Any:
        return jax.value_and_grad(loss, has_aux=True)(params, state, images, labels)

    def step(params: Any, state: Any, images: Array, labels: Array) -> Any:
        (value, state), grads = both(params, state, images, labels)
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
    options: dict[str, Any] = {"widths": config.widths} if config.widths else {}
    settings: dict[str, Any] = {"group": {"groups": 4}}.get(name, {})
    if _synced(name):
        mapped = config.mode != "jit"
        settings["axis_name"] = syncs.parse(sync, config.axes, count, mapped=mapped)
    made = nl.get(name, **settings)
    norm = Named(made.init, made.parts)
    return models.build(config.model, norm, CLASSES, **options)


def _synced(norm: str) -> bool:
    """Whether a norm merges its statistics over devices in every step."""
    try:
        options = inspect.signature(nl.row(norm).factory).parameters
    except ValueError as error:
        raise RunError(f"--norms {norm}: {error}") from None
    return {"axis_name", "decay"} <= set(options)


# --- What is printed --------------------------------------------------------------------------


def _row(there: Machine, entry: Entry) -> tuple[str, ...]:
    kinds: dict[str, int] = {}
    for one in entry.collectives:
        kinds[one.kind] = kinds.get(one.kind, 0) + one.times
    nbytes = sum(one.nbytes * one.times for one in entry.collectives)
    times = [modelled(there, one) for one in entry.collectives]
    modelled_all = there.network and None not in times
    whole = entry.purposes[0].what.startswith("whole ")
    return (
        ", ".join(map(str, entry.purposes)),
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none",
        f"{nbytes:,}",
        "" if whole else _distinct(shape_of(one.groups) for one in entry.collectives),
        "" if whole else _distinct(one.algorithm for one in entry.collectives),
        f"{1e6 * sum(filter(None, times)):.1f}" if modelled_all else "",
    )


def modelled(there: Machine, one: Collective) -> float | None:
    """The modelled seconds of a collective, however often it runs; `None` without a model."""
    seconds = there.seconds(one.kind, one.nbytes, one.groups, one.algorithm)
    return None if seconds is None else seconds * one.times


def _distinct(texts: Iterator[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _as_json(config: Ledger, account: Account, there: Machine) -> dict[str, Any]:
    settings = {
        k: v for k, v in dataclasses.asdict(config).items() if k not in ("json", "markdown")
    }
    return {
        "config": {**settings, "norms": account.norm, "sync": account.sync},
        "devices": len(there.devices),
        "memory_bytes": account.memory,
        "compile_seconds": account.seconds,
        "collectives": [
            {
                "purposes": list(map(str, entry.purposes)),
                **one._asdict(),
                "modelled_seconds": modelled(there, one),
            }
            for entry in account.entries
            for one in entry.collectives
        ],
    }
