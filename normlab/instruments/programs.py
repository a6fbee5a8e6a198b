"""What a program's devices tell each other, read from what was compiled.

Nothing runs: the program may be for a machine that is not here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from normlab._arguments import Kind, checked
from normlab.errors import invalid
from normlab.instruments.collectives import Collective, Entry, Purpose, by_purpose, of_program
from normlab.instruments.hlo import parse


class Ledger(NamedTuple):
    """What a compiled program says of its devices; `print` it for the table.

    Attributes:
      collectives: All of them, in the order of the program.
      devices: How many devices it is for.
      memory: Bytes on each device, by what they hold: `"arguments"`, `"results"`, `"aliased"`
        (results in the place of arguments), `"temporary"` and `"code"`. Empty where the compiler
        does not tell.
      flops: Of each device; of loops the body counts once. `None` where the compiler does not tell.

    >>> import jax.numpy as jnp
    >>> found = ledger(jnp.tanh, jnp.ones(4))                          # of one device alone
    >>> found.collectives, found.nbytes, found.devices, found.memory["arguments"]
    ((), 0, 1, 16)
    """

    collectives: tuple[Collective, ...]
    devices: int
    memory: dict[str, int]
    flops: float | None

    @property
    def steady(self) -> tuple[Collective, ...]:
        """Those that run whatever the numbers are."""
        return tuple(one for one in self.collectives if not one.when_needed)

    @property
    def when_needed(self) -> tuple[Collective, ...]:
        """Those in a branch of a conditional, or in a loop of which the end is not known."""
        return tuple(one for one in self.collectives if one.when_needed)

    @property
    def nbytes(self) -> int:
        """What each device puts into the steady ones."""
        return sum(one.nbytes * one.times for one in self.steady)

    @property
    def entries(self) -> list[Entry]:
        """The rows of the table: those of one purpose, from one line of the source."""
        return by_purpose(self.collectives, lambda one: one.purposes, lambda one: one.line)

    def as_dicts(self) -> list[dict[str, Any]]:
        """A row of the table each: what for, how many of which kind, bytes, who, which line.

        `json.dumps` and `pandas.DataFrame` take it.
        """
        return [
            {
                "what": ", ".join(map(str, entry.purposes)),
                "when_needed": entry.when_needed,
                "collectives": entry.kinds,
                "count": sum(one.times for one in entry.collectives),
                "bytes": entry.nbytes,
                "received": entry.received,
                "groups": entry.distinct(lambda one: one.shape),
                "line": entry.distinct(lambda one: one.line),
            }
            for entry in self.entries
        ]

    def __str__(self) -> str:
        """The table, and under it the memory."""
        devices = f"{self.devices} device{'s' * (self.devices != 1)}"
        if not self.collectives:
            alone = "no device asks another one anything"
            alone = "there is one device" if self.devices == 1 else alone
            return f"no collectives: {alone}\n{devices}. {self._each()}"
        totals = [Entry((Purpose("in all"),), False, self.steady)]
        if self.when_needed:
            totals.append(Entry((Purpose("in all"),), True, self.when_needed))
        rows = [["what", "collectives", "bytes", "received", "groups", "line"]]
        for entry in (*self.entries, *totals):
            words = entry.distinct(lambda one: one.shape), entry.distinct(lambda one: one.line)
            rows.append([*entry.cells, *(("", "") if entry in totals else words)])
        said = f"{devices}; bytes are what each of them puts in. {self._each()}"
        return f"{_aligned(rows)}\n{said}"

    def _each(self) -> str:
        known = [f"{_size(nbytes)} {kind}" for kind, nbytes in self.memory.items() if nbytes]
        known += [] if self.flops is None else [f"{self.flops:.3g} flops"]
        return f"On each {', '.join(known) or 'nothing is known'}."


def _size(nbytes: int) -> str:
    for power, unit in ((2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.2f} {unit}"
    return f"{nbytes} B"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows under their headings, numbers to the right, without columns that say nothing."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    padded = []
    for heading, *cells in columns:
        width = max(map(len, (heading, *cells)))
        right = heading in ("bytes", "received")
        pad = str.rjust if right else str.ljust
        padded.append([pad(cell, width) for cell in (heading, *cells)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def _program(value: Any) -> Any:
    if not callable(value) and not hasattr(value, "compile") and not hasattr(value, "as_text"):
        raise TypeError
    return value


PROGRAM = Kind(
    "a function of arrays, or one that is lowered or compiled",
    "pass the step itself, step.lower(...) or step.lower(...).compile()",
    _program,
    (1.0, "text", None),
)


@checked("ledger", f=PROGRAM)
def ledger(f: Callable[..., Any] | Any, *args: Any, **kwargs: Any) -> Ledger:
    """Every collective of a program: of which kind, how large, between whom, from where.

    The program is compiled for the devices on which the arguments lie, and read; it does not run.
    A device that is not here will do (`jax.experimental.topologies`): docs/ledger.md.

    Bytes are what each device puts in; of a gather each receives as many times that as there are
    in its group. Where a collective comes from is the path of
    `jax.named_scope`s, of which Flax makes one for each module, and the line of the source that is
    none of an installed package; in the backward pass of a gradient it says so. What stands in a
    branch of a conditional or in a loop of unknown length runs `when_needed`, and is in no sum.

    Args:
      f: A function, jitted or not; what its `lower` returns; or what that one's `compile` returns.
      *args: Its arguments, or `jax.ShapeDtypeStruct`s with their `sharding`; none for a program
        that is lowered or compiled.
      **kwargs: Likewise.

    Raises:
      ValueError: For a function that cannot be traced, or arguments of a program that has them.

    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> def mean(x):
    ...     with jax.named_scope("mean"):
    ...         return jax.lax.pmean(x.mean(0), "data")
    >>> mean = jax.shard_map(mean, mesh=mesh, in_specs=P("data"), out_specs=P())
    >>> x = jax.device_put(jax.numpy.ones((16, 4)), jax.NamedSharding(mesh, P("data")))
    >>> [row] = ledger(mean, x).as_dicts()
    >>> row["what"], row["collectives"], row["bytes"], row["groups"]
    ('mean', '1 all-reduce', 16, 'all 8')
    """
    compiled = _compiled(f, args, kwargs)
    program = parse(compiled, "ledger")
    found = of_program(program, program.devices)
    return Ledger(tuple(found), program.devices, _memory(compiled), _flops(compiled))


def _compiled(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lower = getattr(f, "lower", None)
    if lower is None and callable(f) and not hasattr(f, "as_text"):
        lower = jax.jit(f).lower
    if lower is None and (args or kwargs):
        raise invalid(
            "ledger",
            "arguments for a program that is lowered",
            "none: it has its own",
            "leave them out, or pass the function itself",
        )
    if lower is not None:
        try:
            f = lower(*args, **kwargs)
        except (TypeError, NameError, IndexError) as error:  # JAX's own are among them
            raise invalid(
                "ledger",
                f"{getattr(f, '__name__', f)}, which jax cannot trace ({_first(error)})",
                "a function of arrays and the arguments that it takes",
                "pass the whole step, with its shard_map, pmap or mesh; what is no array goes "
                "through jax.jit(f, static_argnames=...)",
            ) from error
    compile_it = getattr(f, "compile", None)
    if compile_it is None:
        return f
    with _own_names():
        return compile_it()


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """A program from JAX's cache on disk has the names of the first one that was like it."""
    option = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, option)
    jax.config.update(option, True)
    try:
        yield
    finally:
        jax.config.update(option, before)


def _memory(compiled: Any) -> dict[str, int]:
    used = compiled.memory_analysis()
    if used is None:
        return {}
    return {
        "arguments": used.argument_size_in_bytes,
        "results": used.output_size_in_bytes,
        "aliased": used.alias_size_in_bytes,
        "temporary": used.temp_size_in_bytes,
        "code": used.generated_code_size_in_bytes,
    }


def _flops(compiled: Any) -> float | None:
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) and cost else cost
    return cost.get("flops") if isinstance(cost, dict) else None
