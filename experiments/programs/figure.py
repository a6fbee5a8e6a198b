"""The figure of docs/ledger.md: what a model says synchronization costs on large machines.

    python -m experiments.ledger_figure docs/ledger.png    # both compilers: '.[tpu,cuda]'

Every point is a training step that is compiled ahead of time for its machine, of which the
collectives are read; only their times are those of the model in `experiments.programs.machines`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

from ..figures import encode
from ..rundir import RunError
from .ledger import Account, Ledger, compile_all, modelled
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


def against_chips(kind: str) -> list[tuple[int, dict[str, float]]]:
    """All devices together, on larger and larger machines; `local` is the step without."""
    points = []
    for sizes in CHIPS[kind]:
        config = Ledger(topology=f"{kind}:{sizes}", widths=WIDTHS, sync=("all", "local"))
        found = compile_all(config)
        synced, local = (cost(account, found.machine) for account in found.accounts)
        points.append((len(found.machine.devices), {**synced, "local": local["step"]}))
    return points


def against_groups(kind: str) -> list[tuple[int, dict[str, float]]]:
    """Groups of more and more devices that are neighbours, along the last axis of a mesh."""
    sizes, count = GROUPS_ON[kind]
    points = []
    for size in SIZES:
        mesh = (count // size, size) if size < count else ()
        sync = ("inner" if mesh else "all",)
        config = Ledger(topology=f"{kind}:{sizes}", widths=WIDTHS, sync=sync, mesh=mesh)
        found = compile_all(config)
        points.append((size, cost(found.accounts[0], found.machine)))
    return points


def main(path: Path) -> None:
    """Compiles, draws and writes the figure."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    for kind, colour in COLOURS.items():
        name = {"v5p": "TPU v5p", "h100": "H100"}[kind]
        chips = against_chips(kind)
        for axes, points in ((left, chips), (right, against_groups(kind))):
            for what, (marker, line, label) in LINES.items():
                axes.plot(
                    [x for x, _ in points],
                    [y[what] for _, y in points],
                    marker=marker,
                    ls=line,
                    color=colour,
                    label=f"{name}: {label}",
                    markersize=5,
                )
        left.plot(
            [x for x, _ in chips],
            [y["local"] for _, y in chips],
            ls=":",
            color=colour,
            label=f"{name}: whole step, local statistics",
        )
    left.set(xlabel="devices, all synchronized", ylabel="time in collectives, modelled (µs)")
    right.set(xlabel="devices in a group, of 512")
    for axes in (left, right):
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
        main(Path(sys.argv[1]))
    except (RunError, IndexError) as error:
        said = (
            error if isinstance(error, RunError) else "name the file to write, as docs/ledger.png"
        )
        Console(stderr=True).print(f"error: {said}", markup=False, soft_wrap=True)
        sys.exit(2)
