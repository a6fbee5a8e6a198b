"""The options of the ledger."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ..rundir import RunError, require_effect, require_positive


@dataclasses.dataclass(frozen=True)
class Ledger:
    """List the collectives of one training step, and what a model says they cost.

    They are read from the compiled program, on devices of this host or, with --topology, ahead of
    time for a machine that need not be here. Nothing runs.
    """

    model: str = "conv"
    """conv, mlp, resnet50, lm, or another of `normlab list`."""

    widths: tuple[int, ...] = ()
    """Channels of the layers; by default the model's own."""

    width: int | None = None
    """Of lm and vit: the size of the residual stream; by default 768, in heads of 64."""

    depth: int | None = None
    """Of lm and vit: the number of blocks; by default 12."""

    context: int | None = None
    """Of lm: the tokens of an example, bytes; by default 1024."""

    image: tuple[int, int, int] | None = None
    """Height, width and channels of an image; by default 28 28 1, of resnet50 224 224 3."""

    norms: tuple[str, ...] = ("batch",)
    """Norms by name; `normlab list` describes them. flax is flax.linen.BatchNorm,
    with --sync all, inner or local."""

    sync: tuple[str, ...] = ()
    """Over which devices batch statistics are measured: local, all, groups=4, groups=0,2|1,3,
    ring=1, virtual=64, ghost=4; of a --mesh inner (its last axis) or together=axis0; joined by +
    with staged, every=2, gradient=forward, second=always and the like. By default all, local."""

    devices: int | None = None
    """Devices of this host, without a topology; by default 8."""

    topology: tuple[str, ...] = ()
    """Machines to compile for, one after the other: v4:4x4x8, v5e:16x16, v5p:16x16x24, v6e:16x16 or
    tpu7x:4x4x8, in chips; h100:1x128x8, in slices x hosts x GPUs."""

    mesh: tuple[int, ...] = ()
    """Sizes of the mesh's axes, as in 16 8; by default one axis of all devices."""

    mode: Literal["shard_map", "pmap", "jit"] = "shard_map"
    """How the step is mapped over the devices; jit: one program on a sharded batch."""

    program: Literal["forward", "both", "step"] = "step"
    """The forward pass alone, with the backward pass, or the whole step."""

    per_device: int = 32
    """Examples on each device; a batch has as many more as there are devices."""

    by: Literal["auto", "layer", "direction", "step"] = "auto"
    """A row for each layer and direction, one for all layers in a direction, or the whole step
    alone; auto: by layer where there are no more than eight."""

    def __post_init__(self) -> None:
        """Raises RunError for values that cannot be compiled."""
        from .. import models  # which, as the words of --sync, need jax
        from ..training import syncs
        from ..training.config import require_mesh
        from ..training.trainer import require_form

        require_positive(self, "per_device")
        for name in ("widths", "image"):
            if any(size < 1 for size in getattr(self, name) or ()):
                raise RunError(f"--{name}: got {getattr(self, name)}; they must be at least 1.")
        for name in ("width", "depth", "devices", "context"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        try:
            models.require(self.model, **self.model_options)
        except ValueError as error:
            raise RunError(f"--model: {error}.") from None
        text = models.reads_text(self.model)
        for idle, beside, why in (
            ("devices", bool(self.topology), "--topology, which has devices of its own"),
            ("context", not text, f"--model {self.model}, which reads images"),
            ("image", text, f"--model {self.model}, which reads text"),
        ):
            require_effect(self, not beside, idle, f"beside {why}")
        require_mesh(self.mesh)
        require_form(self.mode, self.mesh, "mode")
        for text in self.sync:
            syncs.parse(text, self.axes)

    @property
    def axes(self) -> str | tuple[str, ...]:
        """The names of the mesh's axes."""
        from ..training.trainer import axes_of

        return axes_of(self.mesh)

    @property
    def model_options(self) -> dict[str, Any]:
        """What the model is told beside the norm."""
        options = {"widths": self.widths or None, "width": self.width, "depth": self.depth}
        if self.model in REAL:
            options = {**REAL[self.model], **{k: v for k, v in options.items() if v}}
            options.setdefault("heads", max(1, options["width"] // 64))
        return {name: value for name, value in options.items() if value}


REAL = {"lm": {"width": 768, "depth": 12}, "vit": {"width": 768, "depth": 12}}
"""Widths at which such a model is of use: those of GPT-2 small (Radford et al. 2019) and ViT-B."""
