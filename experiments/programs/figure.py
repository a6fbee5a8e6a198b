"""The figure of docs/ledger.md: what a model says synchronization costs on large machines.

    python -m experiments.programs.figure docs/ledger.png    # needs .[tpu,cuda]

Every point is a training step that is compiled ahead of time for its machine, of which the
collectives are read; only their times are those of the model in `experiments.programs.machines`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt

from ..figures import encode
from ..rundir import RunError
from ..terminal import report
from .command import Ledger
from .ledger import Account, compile_all, modelled
from .machines import Machine

WIDTHS = (64, 128, 256, 512)
LAYER = f"Normed_{len(WIDTHS) - 1}"
CHIPS = {
    "v5p": ("2x2x2", "4x4x4", "8x8x8", "8x16x16", "16x16x24"),
    "h100": ("1x1x8", "1x8x8", "1x64x8", "1x256x8"),
}
GROUPS_ON = {"v5p": ("8x8x8", 512), "h100": ("1x64x8", 512)}
SIZES = (2, 8, 32, 128, 512)
COLOURS = {"v5p": "#0072B2", "h100": "#D55E00"}
LINES = {
    "step": ("o", "-", "whole step"),
    "layer": ("s", "--", f"one layer, {WIDTHS[-1]} channels"),
}


def cost(account: Account, there: Machine) -> dict[str, float]:
    """Modelled microseconds: of the whole step, and of one layer, forward and backward."""
    total, layer = 0.0, 0.0
    for entry in account.entries:
        seconds = sum(modelled(there, one) or 0.0 for one in entry.collectives)
        total += seconds
        layer += seconds if any(p.what == LAYER for p in entry.purposes) else 0.0
    return {"step": 1e6 * total, "layer": 1e6 * layer}


def larger_machines(kind: str) -> Iterator[Ledger]:
    """All devices together, on larger and larger machines, beside the step that is not synced."""
    for sizes in CHIPS[kind]:
        yield Ledger(topology=f"{kind}:{sizes}", widths=WIDTHS, sync=("all", "local"))


def larger_groups(kind: str) -> Iterator[Ledger]:
    """Groups of more and more devices that are neighbours, along the last axis of a mesh."""
    sizes, count = GROUPS_ON[kind]
    for size in SIZES:
        mesh = (count // size, size) if size < count else ()
        sync = ("inner" if mesh else "all",)
        yield Ledger(topology=f"{kind}:{sizes}", widths=WIDTHS, sync=sync, mesh=mesh)


def main(path: Path) -> None:
    """Compiles, draws and writes the figure."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    for kind, colour in COLOURS.items():
        name = {"v5p": "TPU v5p", "h100": "H100"}[kind]
        for axes, configs in zip(panels, (larger_machines, larger_groups), strict=True):
            x, costs = [], []
            for config in configs(kind):
                found = compile_all(config)
                x.append(config.mesh[-1] if config.mesh else len(found.machine.devices))
                costs.append([cost(account, found.machine) for account in found.accounts])
            for what, (marker, line, label) in LINES.items():
                y = [synced[what] for synced, *_ in costs]
                style = {"marker": marker, "ls": line, "markersize": 5}
                axes.plot(x, y, color=colour, label=f"{name}: {label}", **style)
            if len(costs[0]) > 1:
                y = [local["step"] for _, local in costs]
                label = f"{name}: whole step, local statistics"
                axes.plot(x, y, color=colour, label=label, ls=":")
    left, right = panels
    left.set(xlabel="devices, all synchronized", ylabel="time in collectives, modelled (µs)")
    right.set(xlabel="devices in a group, of 512")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both", lw=0.5)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(
        "One training step with four synced batch norms: collectives read from programs compiled "
        "ahead of time,\ntimes of an α-β model. Nothing was measured on these machines.",
        fontsize=10,
    )
    path.write_bytes(encode(figure, "png"))


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise RunError("name the file to write, as docs/ledger.png")
        main(Path(sys.argv[1]))
    except RunError as error:
        sys.exit(report(error))
