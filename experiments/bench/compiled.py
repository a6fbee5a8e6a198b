"""The side of `bench bytes` that runs in a process for a target: it compiles, and reads or runs.

Ahead of time a target's process has JAX_PLATFORMS=cpu, so that JAX looks for no hardware.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from ..programs.passes import lower, moves, passes, place
from ..rundir import environment
from .blocks import HERE, Program
from .blocks_jax import arguments, contestants
from .peers_jax import copy_of, forward_and_backward
from .turns import Repeated, first_line
from .worker import BOTH, Contestant


class Target:
    """Compiles the programs of all contestants for one target.

    Args:
      name: As `place` has it, or `HERE` for the default device, on which they run as well.
    """

    def __init__(self, name: str) -> None:
        warnings.simplefilter("ignore")
        atexit.register(gc.freeze)  # a last collection takes longer than the others wait
        logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax warns of every shape
        self.name = name
        here = name == HERE
        self.where = SingleDeviceSharding(jax.devices()[0]) if here else place(name)
        self._arrays: Any = None
        self._ways: dict[str, Contestant] = {}
        self._turns: dict[tuple[str, str], Repeated] = {}

    def environment(self) -> dict[str, Any]:
        """As `rundir.environment`."""
        return environment()

    def prepare(self, program: Program, peers: Sequence[str]) -> list[dict[str, Any]]:
        """What is known of the contestants of a program; one that cannot take part has a reason."""
        self.program, rows = program, []
        self._arrays = None
        self._ways.clear()
        self._turns.clear()
        for peer in peers:
            try:
                with self._at_the_target():
                    found = contestants(peer, program)
            except Exception as error:  # whatever a library raises: it is left out, and said
                said = str(error) if type(error) is ValueError else first_line(error)
                rows.append({"peer": peer, "name": peer, "reason": said})
                continue
            for one in found:
                self._ways[one.name] = one
                row = {k.name: getattr(one, k.name) for k in dataclasses.fields(one)}
                del row["f"]
                rows.append(row | {"reason": None})
        return rows

    def count(self, name: str, direction: str) -> dict[str, Any]:
        """Compiles one direction of a contestant: the bytes it moves and what else is read of it.

        Returns:
          `nbytes`; `temp_bytes`; `kernels`, the instructions that run; `passes` over arrays of at
          least the size of x, read and written. Loops that run only when needed are not in them.
        """
        f, values = self._ways[name].f, arguments(self.program)
        if direction == BOTH:
            f, values = forward_and_backward(f), (values[0], *values)
        with self._at_the_target():
            compiled = lower(f, self.where, *values).compile()
        memory = compiled.memory_analysis()
        found = [move for move in moves(compiled) if not move.when_needed]
        if self.name == HERE:
            self._turns[name, direction] = self._timed(compiled, direction)
        return {
            "nbytes": sum(move.nbytes for move in found),
            "temp_bytes": memory.temp_size_in_bytes if memory else 0,
            "kernels": sum(move.times for move in found),
            "passes": passes(compiled, self.program.nbytes),
        }

    def turn(self, name: str, direction: str) -> float:
        """Milliseconds per call, of a direction that was counted or, as `COPY`, of a copy of x."""
        if (name, direction) not in self._turns:
            x = self._values()[0]
            self._turns[name, direction] = self._repeated(copy_of(x))
        return self._turns[name, direction]()

    def _timed(self, compiled: Callable[..., Any], direction: str) -> Repeated:
        x, *params = self._values()
        given = (x, x, *params) if direction == BOTH else (x, *params)
        return self._repeated(lambda: compiled(*given))

    def _repeated(self, call: Callable[[], Any]) -> Repeated:
        return Repeated(call, TURN_MS, jax.block_until_ready)

    def _values(self) -> Any:
        """Arrays for the program, of unit variance behind every kernel; x stands for dy as well."""
        if self._arrays is None:
            rng = np.random.default_rng(0)

            def one(v: Any) -> Any:
                fan_in = math.prod(v.shape[:-1])
                drawn = rng.standard_normal(v.shape, np.float32)
                return jax.device_put((drawn * fan_in**-0.5).astype(v.dtype), self.where)

            x, norms, kernels = arguments(self.program)
            drawn = rng.standard_normal(x.shape, np.float32).astype(x.dtype)
            self._arrays = jax.device_put(drawn, self.where), *jax.tree.map(one, (norms, kernels))
        return self._arrays

    @contextlib.contextmanager
    def _at_the_target(self) -> Iterator[None]:
        """Who asks JAX where it runs hears the target: normlab, the blocks, tokamax."""
        if self.name == HERE:
            yield
            return
        (device,) = self.where.device_set
        backend = {"cuda": "gpu"}.get(self.name, self.name)
        with contextlib.ExitStack() as stack:
            for what, said in (("default_backend", backend), ("devices", [device])):
                stack.enter_context(mock.patch.object(jax, what, return_value=said))
            if self.name == "cuda" and "tokamax" in sys.modules:  # which wants to see the device
                stack.enter_context(sys.modules["tokamax"].config.cross_compile(True))
            yield


TURN_MS = 20.0
"""How long a turn lasts: a program is repeated to fill it."""
