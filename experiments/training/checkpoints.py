"""The checkpoints of a run, which another number of devices can read as well."""

from __future__ import annotations

import functools
import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

import normlab as nl

from ..rundir import RunError
from .trainer import TrainState


class Layout(Protocol):
    """How the state lies on the devices.

    Attributes:
      devices: How many there are, each with norm states of its own.
      copied: The sharding of what is alike on all.
    """

    devices: int
    copied: NamedSharding

    def spread(self, copied: Any, split: Any) -> tuple[Any, Any]:
        """Puts what one device has on all of them: copied, or stacked with one row for each."""
        ...


class Checkpoints:
    """The checkpoints of a run: Orbax, written in the background.

    Args:
      path: The run directory.
      keep: How many to keep.
    """

    def __init__(self, path: Path, keep: int) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self.path = path / "checkpoints"
        self.manager = ocp.CheckpointManager(
            self.path, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def save(self, step: int, state: TrainState) -> None:
        """Begins to save; returns when the state may change."""
        if self.manager.latest_step() != step:
            self.manager.save(
                step,
                args=ocp.args.StandardSave(state._asdict()),
                custom_metadata={"norm_state": nl.population.conventions(state.norm_state)},
                force=True,
            )

    def restore(self, program: Layout, new: TrainState) -> tuple[int, TrainState]:
        """The latest checkpoint, or the new state if there is none.

        The running statistics of another number of devices are merged.

        Raises:
          RunError: If the checkpoint is not of this model.
        """
        step = self.manager.latest_step()
        if step is None:
            return 0, new
        kept = (self.manager.metadata(step).custom_metadata or {}).get("norm_state", {})
        here = {f"norm_state.{k}": v for k, v in nl.population.conventions(new.norm_state).items()}
        self._check(step, {f"norm_state.{k}": v for k, v in kept.items()}, here)
        there, here = _shapes(self.manager.item_metadata(step)), _shapes(new._asdict())
        devices = next((v[0] for k, v in there.items() if k.startswith("norm_state")), 0)
        devices = devices or program.devices
        for name, shape in here.items():
            if name.startswith("norm_state"):
                here[name] = (devices, *shape[1:])
        self._check(step, there, here)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, new)
        if devices != program.devices:
            stacked = jax.tree.map(
                lambda v: jax.ShapeDtypeStruct(
                    (devices, *v.shape[1:]), v.dtype, sharding=program.copied
                ),
                new.norm_state,
            )
            abstract = abstract._replace(norm_state=stacked)
        args = ocp.args.StandardRestore(abstract._asdict())
        state = TrainState(**self.manager.restore(step, args=args))
        if devices != program.devices:
            merge = functools.partial(_merge, devices=program.devices)
            merged = jax.jit(merge, out_shardings=program.copied)(state.norm_state)
            state = state._replace(norm_state=program.spread((), merged)[1])
        return step, state

    def _check(self, step: int, there: dict[str, Any], here: dict[str, Any]) -> None:
        """Raises RunError unless what is there, by name, is what is here."""
        for name in [*here, *there]:
            if there.get(name) == here.get(name):
                continue
            said = [side.get(name, "not there") for side in (there, here)]
            missing = [side for side in (there, here) if name not in side]
            near = get_close_matches(name, [k for side in missing for k in side], n=3)
            nearest = f" (nearest: {', '.join(near)})" if near else ""
            raise RunError(
                f"the checkpoint of step {step} in {self.path} is not of this model: {name} is "
                f"{said[0]} in it and {said[1]} here{nearest}. Choose another --run-dir."
            )


def _merge(states: Any, devices: int) -> Any:
    """What each of `devices` keeps of the states of other devices, which are stacked."""
    leaves = [(v == v[:1]).all() for v in jax.tree.leaves(states)]
    alike = jnp.stack(leaves).all() if leaves else True  # synced: each has seen everything
    shared = nl.population.share_running(nl.population.merge_running(states), devices)
    return jax.tree.map(lambda v, one: jnp.where(alike, v[0], one), states, shared)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of a tree, or of a checkpoint's description of one, by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(getattr(tree, "tree", tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(v.shape)
        for path, v in leaves
        if hasattr(v, "shape")
    }
